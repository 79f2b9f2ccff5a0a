//! What befalls a simulated cluster: three adversaries at once, each at random, which of them a seed also decides.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use quorate::sim::{Cluster, End, Fault, Surroundings, Weather};
use quorate::{ApplyError, Config, Error};
use rand::prelude::*;
use rand::rngs::StdRng;

use crate::load::{Record, lock};

/// How much faster or slower than another a member's clock may go, as a part of one.
pub const CLOCK_DRIFT: f64 = 0.02;

/// How long an adversary waits for a change of the members.
const PATIENCE: Duration = Duration::from_secs(10);

/// Members that a cluster grows to at most.
const MEMBERS_MAX: usize = 5;

/// What a member's surroundings are.
pub fn surroundings(rng: &mut StdRng) -> Surroundings {
    let sync_ms = *[(0, 2), (0, 10), (1, 30), (5, 120)].choose_weighted(rng, |(_, most)| 1.0 / *most as f64).expect("not empty");
    Surroundings { rate: 1.0 + rng.random_range(-CLOCK_DRIFT / 2.0..CLOCK_DRIFT / 2.0), sync_ms }
}

/// How the network is.
pub fn weather(rng: &mut StdRng) -> Weather {
    match rng.random_range(0..4) {
        0 => Weather::default(),
        // So slow a line that entries take longer than the leader's next heartbeat.
        1 => Weather { delay_ms: (1, 20), late: 20, late_ms: 200, broken: 2, bytes_per_ms: 100 },
        2 => Weather { delay_ms: (0, 60), late: 50, late_ms: 1500, broken: 20, ..Weather::default() },
        _ => Weather { delay_ms: (0, 5), late: 10, late_ms: 4000, broken: 60, ..Weather::default() },
    }
}

/// The leader, more often than not, or any member.
fn victim(cluster: &Cluster, rng: &mut StdRng) -> usize {
    let leader = cluster.leader().filter(|_| rng.random_ratio(1, 2));
    leader.unwrap_or_else(|| rng.random_range(0..cluster.places()))
}

async fn rest(rng: &mut StdRng, from: u64, to: u64) {
    tokio::time::sleep(Duration::from_millis(rng.random_range(from..to))).await;
}

/// Crashes members, one or all, and pauses them.
pub async fn crashes(record: Arc<Record>, mut rng: StdRng, until: Duration) {
    let cluster = &record.cluster;
    while cluster.now() < until {
        rest(&mut rng, 100, 3000).await;
        let began = cluster.now();
        let member = victim(cluster, &mut rng);
        match rng.random_range(0..100) {
            0..45 => {
                cluster.end(member, if rng.random_ratio(2, 3) { End::Powerless } else { End::Killed });
                rest(&mut rng, 1, 3000).await;
                cluster.surround(member, surroundings(&mut rng));
                cluster.start(member);
            }
            45..60 => {
                // Together or almost.
                for member in 0..cluster.places() {
                    cluster.end(member, End::Powerless);
                    if rng.random_ratio(1, 3) {
                        rest(&mut rng, 1, 30).await;
                    }
                }
                for member in 0..cluster.places() {
                    rest(&mut rng, 1, 1000).await;
                    cluster.start(member);
                }
            }
            _ => {
                cluster.pause(member);
                rest(&mut rng, 50, 4000).await;
                cluster.resume(member);
            }
        }
        record.has_befallen(began);
    }
}

/// Cuts the network, and changes the weather.
pub async fn cuts(record: Arc<Record>, mut rng: StdRng, until: Duration) {
    let cluster = &record.cluster;
    while cluster.now() < until {
        rest(&mut rng, 100, 3000).await;
        let began = cluster.now();
        let (member, all) = (victim(cluster, &mut rng), cluster.places());
        let other = (member + rng.random_range(1..all.max(2))) % all;
        let net = cluster.net();
        let kind = rng.random_range(0..7);
        cluster.note(&format!("the network is cut: {kind}, at {member} and {other}"));
        match kind {
            0 => (0..all).filter(|one| *one != member).for_each(|one| {
                net.cut(one, member);
                net.cut(member, one);
            }),
            1 => (0..all).for_each(|one| net.cut(one, member)),
            2 => (0..all).for_each(|one| net.cut(member, one)),
            3 => {
                net.cut(member, other);
                net.cut(other, member);
            }
            4 => net.cut(member, other),
            5 => {
                let side: BTreeSet<usize> = (0..all).filter(|_| rng.random_ratio(1, 2)).collect();
                for (a, b) in (0..all).flat_map(|a| (0..all).map(move |b| (a, b))) {
                    if side.contains(&a) != side.contains(&b) {
                        net.cut(a, b);
                    }
                }
            }
            _ => {
                net.set(weather(&mut rng));
                record.is_rough.store(true, SeqCst);
            }
        }
        rest(&mut rng, 50, 4000).await;
        net.heal();
        cluster.note("the network is whole");
        record.has_befallen(began);
    }
}

/// What brings a mistake that is built in to light, over and over, so that a few seeds are enough.
pub async fn aimed(cluster: Arc<Cluster>, fault: Fault, mut rng: StdRng, until: Duration) {
    while cluster.now() < until {
        rest(&mut rng, 300, 1500).await;
        let Some(leader) = cluster.leader() else { continue };
        match fault {
            // Back before anybody misses it.
            Fault::RestoredLeader => {
                cluster.end(leader, End::Killed);
                rest(&mut rng, 1, 200).await;
                cluster.start(leader);
            }
            // Whatever only one of them has on its disk, or nobody, is lost.
            Fault::EarlyAcknowledgement => {
                (0..cluster.places()).for_each(|member| cluster.end(member, End::Powerless));
                (0..cluster.places()).for_each(|member| cluster.start(member));
                rest(&mut rng, 2000, 3000).await;
            }
            // It sleeps over an election, and has requests to answer when it wakes up.
            Fault::UnconfirmedReads | Fault::UnsureRenewals => {
                cluster.pause(leader);
                rest(&mut rng, 2000, 4000).await;
                cluster.resume(leader);
            }
        }
    }
}

/// Changes the members, moves the lead, compacts.
pub async fn changes(record: Arc<Record>, config: Config, mut rng: StdRng, until: Duration, members: bool) {
    let cluster = record.cluster.clone();
    while cluster.now() < until {
        rest(&mut rng, 100, 3000).await;
        match rng.random_range(0..100) {
            0..40 => {
                // What every witness has seen.
                let revision = record.told_before() - 1 - rng.random_range(0..20);
                if revision > 1 {
                    let at = rng.random_range(0..cluster.places());
                    let done = record.ask(at, PATIENCE, move |client| async move { client.compact(revision).await }).await;
                    cluster.note(&format!("compacted to {revision}: {}", matches!(done, Some(Ok(_)))));
                    record.count("compactions", usize::from(matches!(done, Some(Ok(_)))));
                }
            }
            40..60 => {
                let Some(leader) = cluster.leader() else { continue };
                let Some(to) = cluster.id(rng.random_range(0..cluster.places())) else { continue };
                let began = cluster.now();
                let moved = tokio::time::timeout(PATIENCE, cluster.move_leader(leader, to)).await;
                record.has_befallen(began);
                let has_moved = matches!(moved, Ok(Some(Ok(()))));
                cluster.note(&format!("the lead moves from {leader} to {to:x}: {has_moved}"));
                record.count("moves of the lead", usize::from(has_moved && cluster.id(leader) != Some(to)));
            }
            60..100 if members => {
                let began = cluster.now();
                if rng.random() {
                    add(&record, &config, &mut rng).await;
                } else {
                    remove(&record, &mut rng).await;
                }
                record.has_befallen(began);
            }
            _ => {}
        }
    }
}

/// The members as one of them knows them, by id and place.
pub async fn members(record: &Record, at: usize) -> Vec<(u64, usize, bool)> {
    let listed = record.ask(at, PATIENCE, |client| async move { client.last_members() }).await.unwrap_or_default();
    let place = |urls: &[String]| (0..=record.cluster.places()).find(|place| urls.contains(&Cluster::peer_url(*place)));
    listed.iter().filter_map(|member| Some((member.id, place(&member.peer_urls)?, member.is_learner))).collect()
}

async fn add(record: &Arc<Record>, config: &Config, rng: &mut StdRng) {
    let cluster = &record.cluster;
    let (at, member, learner) = (rng.random_range(0..cluster.places()), cluster.places(), rng.random_ratio(1, 2));
    if members(record, at).await.len() >= MEMBERS_MAX {
        return;
    }
    let added = tokio::time::timeout(PATIENCE, cluster.member_add(at, member, learner)).await;
    cluster.note(&format!("member {member} is added at {at}, learner {learner}: {added:?}"));
    let Ok(Some(Ok(id))) = added else { return };
    let others: Vec<usize> = members(record, at).await.into_iter().map(|(_, place, _)| place).filter(|place| *place != member).collect();
    if others.is_empty() {
        return;
    }
    cluster.joiner(&others, config);
    cluster.surround(member, surroundings(rng));
    cluster.start(member);
    if !learner {
        return;
    }
    for _ in 0..20 {
        rest(rng, 100, 1000).await;
        let at = rng.random_range(0..cluster.places());
        let promoted = tokio::time::timeout(PATIENCE, cluster.member_promote(at, id)).await;
        cluster.note(&format!("member {member} is promoted at {at}: {promoted:?}"));
        record.count("promotions", usize::from(matches!(promoted, Ok(Some(Ok(()))))));
        if matches!(promoted, Ok(Some(Ok(()) | Err(Error::Apply(ApplyError::MemberNotLearner | ApplyError::MemberNotFound))))) {
            return;
        }
    }
}

async fn remove(record: &Arc<Record>, rng: &mut StdRng) {
    let cluster = &record.cluster;
    let at = rng.random_range(0..cluster.places());
    let listed = members(record, at).await;
    let Some(&(id, place, _)) = listed.choose(rng).filter(|_| listed.len() > 2) else { return };
    let removed = tokio::time::timeout(PATIENCE, cluster.member_remove(at, id)).await;
    cluster.note(&format!("member {place} is removed at {at}: {removed:?}"));
    if matches!(removed, Ok(Some(Ok(())))) {
        lock(&record.removed).insert((place, id));
    }
}
