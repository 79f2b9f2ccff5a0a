//! Who leads is killed between the two entries of a change of the servers, by which one set of voters gives way to another.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::select_all;
use quorate::Config;
use quorate::sim::{Cluster, End, Weather};

/// How long anything may take, of simulated time. Those that are to come have more.
const PATIENCE: Duration = Duration::from_secs(120);
const ENLIST_LIMIT: Duration = Duration::from_secs(3600);

/// How long a message is under way: longer than what its sender does at once.
const DELAY_MS: (u64, u64) = (20, 40);

const SEEDS: std::ops::RangeInclusive<u64> = 1..=4;

/// What is changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Change {
    /// One server becomes three. The one that is killed is the only one that voted: nothing goes on before it is back.
    Grow,
    /// Of three, one that is there goes. Those that are left finish it alone.
    Replace,
    /// Of three, one is dead: it takes all others.
    ReplaceDead,
}

/// When who leads is killed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum When {
    /// Its log has the first entry, and no other has.
    Appended,
    /// Another's log has it, and who leads does not know that.
    Sent,
    /// It is committed, and who leads knows that.
    Committed,
}

async fn until(cluster: &Cluster, what: &str, condition: impl AsyncFn() -> bool) {
    let began = cluster.now();
    while !condition().await {
        assert!(cluster.now() - began < PATIENCE, "in vain: {what}; {:?}", cluster.lines());
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// A write at one member, until it is acknowledged.
async fn put(cluster: &Cluster, member: usize, key: &'static str) {
    until(cluster, key, async || matches!(cluster.at(member, move |client| async move { client.put(key, "x").await }).await, Some(Ok(_))))
        .await;
}

async fn has(cluster: &Cluster, member: usize, key: &'static str) -> bool {
    matches!(cluster.at(member, move |client| async move { client.get(key).await }).await, Some(Ok(Some(_))))
}

/// These vote, each by its own account, and no change is left open.
async fn until_voting(cluster: &Cluster, members: &[usize]) {
    let wanted = || members.iter().map(|member| cluster.id(*member)).collect::<Option<BTreeSet<u64>>>();
    for &member in members {
        let settled =
            || cluster.voting(member).is_some_and(|(sets, is_committed)| is_committed && Some(sets) == wanted().map(|ids| vec![ids]));
        until(cluster, &format!("{members:?} vote, says {member}"), async || settled()).await;
    }
}

async fn play(cluster: Arc<Cluster>, change: Change, when: When) {
    cluster.keep_lines();
    cluster.mind_enlisted(ENLIST_LIMIT);
    cluster.net().set(Weather { delay_ms: DELAY_MS, ..Weather::default() });
    let mut config = Config::default();
    config.listen_client_urls.clear();
    config.listen_peer_urls.clear();
    let founders = if change == Change::Grow { 1 } else { 3 };
    cluster.found(founders, &config);
    (0..founders).for_each(|member| cluster.start(member));
    until(&cluster, "there is a leader", async || cluster.leader().is_some()).await;
    put(&cluster, 0, "before").await;
    until_voting(&cluster, &(0..founders).collect::<Vec<_>>()).await;

    let mut leader = cluster.leader().unwrap();
    let gone = (change != Change::Grow).then(|| (leader + 1) % founders);
    if let (Change::ReplaceDead, Some(gone)) = (change, gone) {
        cluster.end(gone, End::Killed);
    }
    let new: Vec<usize> = if change == Change::Grow { vec![1, 2] } else { vec![3] };
    let replaces = gone.and_then(|gone| cluster.id(gone));
    until(&cluster, "they are enlisted", async || {
        // It may be refused for what passes: who is dead has to be missed first.
        let Some(leader) = cluster.leader() else { return false };
        let done = cluster.member_enlist(leader, &new, replaces, change == Change::Replace).await;
        cluster.note(&format!("{new:?} are enlisted: {done:?}"));
        matches!(done, Some(Ok(())))
    })
    .await;
    for &member in &new {
        let others: Vec<usize> = (0..founders).chain(new.iter().copied()).filter(|other| *other != member).collect();
        assert_eq!(cluster.joiner(&others, &config), member);
    }
    new.iter().for_each(|member| cluster.start(*member));

    // Whoever leads may change before it comes to that.
    let all: BTreeSet<usize> =
        (0..founders).chain(new.iter().copied()).filter(|member| change != Change::ReplaceDead || Some(*member) != gone).collect();
    until(&cluster, "all are up", async || all.iter().all(|member| cluster.id(*member).is_some() && cluster.voting(*member).is_some()))
        .await;
    let joint = |member: usize| cluster.voting(member).is_some_and(|(sets, _)| sets.len() == 2);
    let seen = async |is_committed: bool, at: &BTreeSet<usize>| {
        let seen = at.iter().map(|member| cluster.until_joint(*member, is_committed).boxed_local());
        let waited = tokio::time::timeout(PATIENCE, select_all(seen)).await;
        assert!(waited.is_ok(), "{:?}", cluster.lines());
    };
    match when {
        When::Appended => seen(false, &all).await,
        When::Sent => {
            seen(false, &all).await;
            leader = cluster.leader().unwrap();
            seen(false, &all.iter().copied().filter(|member| *member != leader).collect()).await;
        }
        When::Committed => seen(true, &all).await,
    }
    leader = cluster.leader().unwrap();
    let others = || all.iter().filter(|member| **member != leader);
    let logs: Vec<bool> = others().map(|member| joint(*member)).collect();
    let of_leader = cluster.voting(leader).unwrap();
    match when {
        When::Appended => assert!(of_leader.0.len() == 2 && !of_leader.1 && !logs.contains(&true), "{of_leader:?} {logs:?}"),
        When::Sent => assert!(of_leader.0.len() == 2 && !of_leader.1 && logs.contains(&true), "{of_leader:?} {logs:?}"),
        // Its own log may have the last entry by then. No other has.
        When::Committed => {
            let (sets, is_committed) = &of_leader;
            assert!((sets.len() == 2) == *is_committed && logs.contains(&true), "{of_leader:?} {logs:?}");
        }
    }
    cluster.end(leader, End::Killed);

    let last: Vec<usize> = (0..founders).chain(new.iter().copied()).filter(|member| Some(*member) != gone).collect();
    if change == Change::Replace {
        let left: Vec<usize> = last.iter().copied().filter(|member| *member != leader).collect();
        let settled = |member: usize| cluster.voting(member).is_some_and(|(sets, is_committed)| is_committed && sets.len() == 1);
        let votes = |member: usize| {
            cluster.voting(member).is_some_and(|(sets, _)| sets.iter().all(|set| cluster.id(new[0]).is_some_and(|id| set.contains(&id))))
        };
        for member in left {
            until(&cluster, "those that are left finish it", async || settled(member) && votes(member)).await;
        }
        put(&cluster, new[0], "meanwhile").await;
    }
    cluster.start(leader);
    if change == Change::ReplaceDead {
        // It is told that it is out.
        cluster.start(gone.unwrap());
    }
    until_voting(&cluster, &last).await;
    if let Some(gone) = gone {
        until(&cluster, "who was replaced knows it", async || cluster.is_removed(gone)).await;
    }
    for &member in &last {
        put(&cluster, member, "after").await;
        assert!(has(&cluster, member, "before").await && (change != Change::Replace || has(&cluster, member, "meanwhile").await));
    }
    assert!(cluster.wrong().is_empty(), "{:?}", cluster.wrong());
}

/// Whoever leads next finishes it, wherever the first entry had come to; nobody is left with two sets of voters.
#[test]
fn a_change_of_the_servers_outlives_who_leads() {
    for change in [Change::Grow, Change::Replace, Change::ReplaceDead] {
        for when in [When::Appended, When::Sent, When::Committed] {
            for seed in SEEDS {
                let dir = tempfile::tempdir().unwrap();
                println!("{change:?}, {when:?}, seed {seed}");
                quorate::sim::run(seed, None, dir.path(), |cluster| play(cluster, change, when));
            }
        }
    }
}
