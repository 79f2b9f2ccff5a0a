//! One run: a cluster is founded, works under what befalls it, is healed, goes on, and is judged.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use quorate::Config;
use quorate::sim::{Cluster, Fault, Surroundings, Weather};
use rand::prelude::*;
use rand::rngs::StdRng;

use crate::checkers::history::Request;
use crate::load::{self, Record, WITNESSES};
use crate::{faults, judge};

/// How long clients work and adversaries do harm, from and to, in milliseconds.
const WORK_MS: std::ops::Range<u64> = 4_000..14_000;

/// Clients of either kind that ask again and again, where a mistake is built in.
const IMPATIENT: usize = 4;

/// What a run has come to.
#[derive(Default)]
pub struct Report {
    pub wrong: Vec<String>,
    pub trace: (u64, u64),
    pub lines: Vec<String>,
    /// What was done, and how often.
    pub counts: BTreeMap<String, u64>,
}

/// Plays one run. With an aim it is played such that this mistake shows, if it is built in.
pub async fn play(cluster: Arc<Cluster>, seed: u64, aim: Option<Fault>, keep_lines: bool) -> Report {
    if keep_lines {
        cluster.keep_lines();
    }
    let mut rng = StdRng::seed_from_u64(seed);
    let rng = &mut rng;
    let mut config = Config::default();
    config.listen_client_urls.clear();
    config.listen_peer_urls.clear();
    config.snapshot_catchup_entries = *[0, 5, 50, 5000].choose(rng).expect("not empty");
    config.watch_progress_notify_interval = Duration::from_millis(500);
    let founders = *[1, 2, 3, 3, 3, 3, 3, 3, 3, 5].choose(rng).expect("not empty");
    let founders = if aim.is_some() { 3 } else { founders };
    cluster.found(founders, &config);
    let is_calm = rng.random_ratio(1, 4) || aim.is_some();
    for member in 0..founders {
        let mut surroundings = faults::surroundings(rng);
        if aim == Some(Fault::EarlyAcknowledgement) {
            surroundings.sync_ms = (50, 200);
        }
        cluster.surround(member, surroundings);
    }
    if !is_calm {
        cluster.net().set(faults::weather(rng));
    }
    for member in 0..founders {
        cluster.start(member);
        tokio::time::sleep(Duration::from_millis(rng.random_range(0..300))).await;
    }
    let record = Record::new(cluster.clone());
    // Where a mistake may be built in, what befalls the cluster is not counted.
    record.is_rough.store(!is_calm || aim.is_some(), SeqCst);
    let mut clients = Vec::new();
    for _ in 0..rng.random_range(2..7) {
        clients.push(tokio::spawn(load::work(record.clone(), StdRng::from_rng(rng))));
    }
    if rng.random_ratio(1, 2) {
        let rest_ms = rng.random_range(5..100);
        clients.push(tokio::spawn(load::bulk(record.clone(), StdRng::from_rng(rng), rest_ms)));
    }
    for _ in 0..rng.random_range(0..3) {
        clients.push(tokio::spawn(load::lease(record.clone(), StdRng::from_rng(rng))));
    }
    for witness in 0..WITNESSES {
        tokio::spawn(load::witness(record.clone(), witness, StdRng::from_rng(rng)));
    }
    if aim.is_some() {
        for _ in 0..IMPATIENT {
            clients.push(tokio::spawn(load::impatient(record.clone(), StdRng::from_rng(rng))));
            clients.push(tokio::spawn(load::renewals(record.clone(), StdRng::from_rng(rng))));
        }
    }
    let until = cluster.now() + Duration::from_millis(rng.random_range(WORK_MS));
    let mut adversaries = Vec::new();
    if let Some(fault) = aim {
        adversaries.push(tokio::spawn(faults::aimed(cluster.clone(), fault, StdRng::from_rng(rng), until)));
    }
    let any = aim.is_none();
    if any && rng.random_ratio(3, 4) {
        adversaries.push(tokio::spawn(faults::crashes(record.clone(), StdRng::from_rng(rng), until)));
    }
    if any && rng.random_ratio(2, 3) {
        adversaries.push(tokio::spawn(faults::cuts(record.clone(), StdRng::from_rng(rng), until)));
    }
    if any && rng.random_ratio(2, 3) {
        let members = rng.random_ratio(1, 2);
        adversaries.push(tokio::spawn(faults::changes(record.clone(), config.clone(), StdRng::from_rng(rng), until, members)));
    }
    tokio::time::sleep(until.saturating_sub(cluster.now())).await;
    for adversary in adversaries {
        if let Err(err) = adversary.await {
            record.blame(format!("an adversary has ended: {err}"));
        }
    }
    heal(&cluster);
    let mut wrong = Vec::new();
    // Clients work on while the cluster finds itself.
    let expected = judge::progress(&record, &mut wrong).await;
    record.stop.store(true, SeqCst);
    for client in clients {
        if let Err(err) = client.await {
            record.blame(format!("a client has ended: {err}"));
        }
    }
    judge::gather(&record, &expected, &mut wrong).await;
    wrong.extend(cluster.wrong());
    wrong.extend(record.wrong());
    let mut counts: BTreeMap<String, u64> =
        cluster.net().calls().into_iter().map(|(method, times)| (format!("calls of {method}"), times)).collect();
    counts.insert("events of the trace".into(), cluster.trace().1);
    counts.insert("operations".into(), record.ops().len() as u64);
    counts.insert("operations answered".into(), record.ops().iter().filter(|op| op.answer().is_some()).count() as u64);
    counts.insert("leases".into(), load::lock(&record.leases).len() as u64);
    counts.insert("starts".into(), (0..cluster.places()).map(|member| cluster.starts(member)).sum());
    counts.insert("seconds of simulated time".into(), cluster.now().as_secs());
    counts.insert("members removed".into(), load::lock(&record.removed).len() as u64);
    counts.insert("members joined".into(), (founders..cluster.places()).filter(|member| cluster.id(*member).is_some()).count() as u64);
    counts.extend(record.counts().into_iter().map(|(what, times)| (what.to_owned(), times)));
    counts.extend(record.errors().into_iter().map(|(text, times)| (format!("times: {text}"), times)));
    Report { wrong, trace: cluster.trace(), lines: cluster.lines(), counts }
}

/// Makes everything whole.
fn heal(cluster: &Arc<Cluster>) {
    cluster.note("everything is made whole");
    cluster.net().heal();
    cluster.net().set(Weather::default());
    for member in 0..cluster.places() {
        cluster.resume(member);
        cluster.surround(member, Surroundings { sync_ms: (0, 5), ..Surroundings::default() });
        cluster.start(member);
    }
}

/// A write that is tried until it succeeds.
pub async fn write_at(record: &Record, member: usize, until: Duration) -> bool {
    let number = record.client();
    while record.cluster.now() < until {
        let request = Request::put(&format!("progress-{member}"), record.value());
        let op = record.send(number, member, request, until.saturating_sub(record.cluster.now())).await;
        if op.answer().is_some() {
            return true;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    false
}
