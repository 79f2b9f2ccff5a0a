//! What must hold at the end of a run.
//!
//! | promise | how it is seen |
//! |---|---|
//! | progress | each member takes a write within [`RECOVERY`] after everything is whole; a removed one has stopped |
//! | linearizable, nothing lost, invented or twice | `checkers/log.rs` and, by search, `checkers/kv.rs`, with the log as the witnesses were told it |
//! | watches | `checkers/watch.rs`: each witness was told all that it asked for, once, in order, though it went from member to member |
//! | equal state at equal revision | HashKV of each member, and nobody has raised an alarm |
//! | leases never early | no lease is gone, nor its key deleted, before its newest answered renewal, from when that was sent, has run out |
//! | leases not late | in a calm network, none ends later than TTL and election timeout after its last renewal, or after the last that befell the cluster; all keys of leases are gone, TTL and election timeout after the cluster takes writes again and nobody renews |
//! | one leader a term | seen in the network, by whoever sends entries or heartbeats |

use std::collections::BTreeMap;
use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use quorate::proto::etcdserverpb::RangeRequest;

use crate::checkers::history::{Op, Request};
use crate::checkers::log::{Hash, Log, check_hashes};
use crate::checkers::watch::{self, Told, next_revision};
use crate::checkers::{kv, log};
use crate::load::{ALL_SEEING, LEASED, Record, WITNESSES, early, lock, scope};
use crate::{faults, scenario};

/// How long after everything is whole each member takes writes again: two elections, a snapshot, and a request that has to time out.
const RECOVERY: Duration = Duration::from_secs(40);

/// How long a healthy member may take to answer.
const PATIENCE: Duration = Duration::from_secs(10);

/// The longest TTL, an election timeout, and two seconds for what is on its way.
const LEASES_GONE: Duration = Duration::from_secs(5 + LATE.as_secs());

/// An election timeout, and two seconds for what is on its way.
const LATE: Duration = Duration::from_secs(1 + 2);

/// What it may take until there is a leader, once nothing befalls the members any more.
const NEW_LEADER: Duration = Duration::from_secs(4);

/// How long the witnesses may take to be told of the end.
const TOLD_LIMIT: Duration = Duration::from_secs(20);

/// Waits until each member goes on. Returns those that belong to the cluster, who votes first.
pub async fn progress(record: &Record, wrong: &mut Vec<String>) -> Vec<usize> {
    let cluster = &record.cluster;
    let until = cluster.now() + RECOVERY;
    let mut members = Vec::new();
    // Whoever takes a linearizable read knows of the members what is to be known.
    while members.is_empty() && cluster.now() < until {
        for place in 0..cluster.places() {
            let limit = Duration::from_secs(3);
            let read = record.ask(place, limit, |client| async move { client.get("a").await }).await;
            if matches!(read, Some(Ok(_))) {
                members = faults::members(record, place).await;
                break;
            }
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    if members.is_empty() {
        wrong.push(format!("no member has answered a read within {RECOVERY:?} after everything was made whole"));
        return Vec::new();
    }
    let mut expected = Vec::new();
    // Who does not vote takes no linearizable reads, either.
    members.sort_by_key(|(.., learner)| *learner);
    for (id, place, learner) in members {
        // An addition whose outcome is not known, or whose member could not be started: nobody is there.
        if cluster.id(place) != Some(id) {
            continue;
        }
        let is_member = if learner { Some(true) } else { takes_writes(record, place, id, until).await };
        match is_member {
            Some(true) => expected.push(place),
            Some(false) => {
                expected.push(place);
                wrong.push(format!("member {place} takes no write within {RECOVERY:?} after everything was made whole"));
            }
            // The outcome of its removal was not known, and was that it is removed.
            None => {}
        }
    }
    let removed: Vec<(usize, u64)> = lock(&record.removed).iter().copied().collect();
    for (place, id) in removed {
        // One whose addition was not known to have succeeded was never started there, and another may have been since.
        if cluster.id(place) != Some(id) {
            continue;
        }
        while cluster.is_running(place) && cluster.now() < until {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        if cluster.is_running(place) {
            wrong.push(format!("member {place} was removed, and goes on"));
        }
    }
    expected
}

/// Whether a member takes a write before `until`; None if it has stopped, and others say that it is none any more.
async fn takes_writes(record: &Record, place: usize, id: u64, until: Duration) -> Option<bool> {
    let cluster = &record.cluster;
    while cluster.now() < until {
        if scenario::write_at(record, place, until.min(cluster.now() + PATIENCE)).await {
            return Some(true);
        }
        if cluster.is_running(place) {
            continue;
        }
        for other in (0..cluster.places()).filter(|other| *other != place) {
            let members = faults::members(record, other).await;
            if !members.is_empty() && members.iter().all(|(member, ..)| *member != id) {
                return None;
            }
        }
    }
    Some(false)
}

/// Reads what is there at the end, and judges everything.
pub async fn gather(record: &Record, expected: &[usize], wrong: &mut Vec<String>) {
    let cluster = &record.cluster;
    let Some(&first) = expected.first() else {
        wrong.push("no member is left that could be judged".into());
        return;
    };
    let began = cluster.now();
    // Keys of leases that nobody renews any more.
    loop {
        let range = RangeRequest { key: LEASED.into(), range_end: "leased.".into(), ..RangeRequest::default() };
        let left = record.ask(first, PATIENCE, move |client| async move { client.range(range).await }).await;
        match left {
            Some(Ok(left)) if left.kvs.is_empty() => break,
            Some(Ok(left)) if cluster.now() > began + LEASES_GONE => {
                wrong.push(format!("{} keys of leases are left {LEASES_GONE:?} after the last renewal", left.kvs.len()));
                break;
            }
            other if cluster.now() > began + RECOVERY => {
                wrong.push(format!("no read of the leases' keys: {:?}", other.map(|other| other.map(|_| ()))));
                break;
            }
            _ => tokio::time::sleep(Duration::from_millis(100)).await,
        }
    }
    let number = record.client();
    let read = record.send(number, first, Request::get("a"), PATIENCE).await;
    let Some(end) = read.answer().map(|(_, answer)| answer.revision) else {
        wrong.push(format!("no read at the end: {read:?}"));
        return;
    };
    // The witnesses.
    let began = cluster.now();
    for witness in 0..WITNESSES {
        while next_revision(&record.told(witness), 2) <= end {
            if cluster.now() > began + TOLD_LIMIT {
                let next = next_revision(&record.told(witness), 2);
                wrong.push(format!("witness {witness} is not told of revision {next}, the store is at {end}"));
                break;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
    // Equal state.
    let began = cluster.now();
    loop {
        // One look at the clock: whoever has not answered by the last round is blamed in it.
        let is_last = cluster.now() > began + TOLD_LIMIT;
        let mut hashes = Vec::new();
        for &member in expected {
            let hash = record.ask(member, PATIENCE, move |client| async move { client.hash_kv(end).await }).await;
            match hash {
                Some(Ok(hash)) => {
                    hashes.push((member, Hash { revision: hash.hash_revision, compacted: hash.compact_revision, hash: hash.hash }))
                }
                // It has not come so far yet.
                _ if !is_last => {}
                other => wrong.push(format!("no hash from member {member}: {:?}", other.map(|other| other.map(|_| ())))),
            }
        }
        let equal = hashes.windows(2).all(|pair| pair[0].1.compacted == pair[1].1.compacted);
        if (equal && hashes.len() == expected.len()) || is_last {
            if !equal {
                wrong.push(format!("members are not compacted alike: {hashes:?}"));
            }
            wrong.extend(check_hashes(&hashes));
            break;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    for &member in expected {
        let alarms = record.ask(member, PATIENCE, |client| async move { client.last_alarms() }).await;
        if alarms.as_ref().is_none_or(|alarms| !alarms.is_empty()) {
            wrong.push(format!("the alarms of member {member} are {alarms:?}"));
        }
    }
    let mut log = Log { base: 1, start: BTreeMap::new(), revisions: BTreeMap::new(), end };
    let told: Vec<Vec<Told>> = (0..WITNESSES).map(|witness| upto(record.told(witness), end)).collect();
    for one in told.iter().take(ALL_SEEING).flatten() {
        let Told::Events(_, events) = one else { continue };
        for group in events.chunk_by(|a, b| a.revision == b.revision) {
            log.revisions.entry(group[0].revision).or_insert_with(|| group.iter().map(|event| event.change.clone()).collect());
        }
    }
    let ops = record.ops();
    let verdict = log::judge(&log, &ops);
    let late =
        ops.iter().zip(&verdict.effects).filter(|(op, effect)| op.answer().is_none() && !op.request.writes.is_empty() && effect.is_some());
    record.count("writes without an answer that took effect", late.count());
    let held = |op: &&Op| op.request.guard.is_some() && op.answer().is_some_and(|(_, answer)| answer.applied);
    record.count("guards that held", ops.iter().filter(held).count());
    let reads = |what: fn(&Request) -> bool| ops.iter().filter(|op| op.answer().is_some() && what(&op.request)).count();
    record.count("spans read", reads(|request| request.span.is_some()));
    record.count("earlier revisions read", reads(|request| request.at > 0));
    record.count("bookmarks", told.iter().flatten().filter(|one| matches!(one, Told::Progress(_))).count());
    wrong.extend(kv::check(&ops, log.base, &log.start, Some(&verdict.effects)));
    wrong.extend(verdict.wrong);
    for (witness, told) in told.iter().enumerate() {
        let found = watch::check(told, &log, log.base + 1, scope(witness));
        wrong.extend(found.into_iter().map(|found| format!("witness {witness}: {found}")));
    }
    judge_leases(record, wrong);
}

/// What was told of revisions up to `end`.
fn upto(told: Vec<Told>, end: i64) -> Vec<Told> {
    let within = told.into_iter().filter_map(|one| match one {
        Told::Progress(revision) => Some(Told::Progress(revision.min(end))),
        Told::Opened(next) => Some(Told::Opened(next.min(end + 1))),
        Told::Events(header, mut events) => {
            events.retain(|event| event.revision <= end);
            (!events.is_empty()).then_some(Told::Events(header, events))
        }
    });
    within.collect()
}

/// No key of a lease was deleted before its lease had run out, nor, where nothing befell the cluster, long after.
fn judge_leases(record: &Record, wrong: &mut Vec<String>) {
    let deleted = record.deleted();
    let befallen = record.befallen();
    let mut ended = 0;
    for lease in lock(&record.leases).values() {
        let Some(at) = deleted.get(&lease.key) else { continue };
        if *at < early(lease) {
            wrong.push(format!("a witness was told at {at:?} that the key of a lease was deleted: {lease:?}"));
        }
        if lease.revoked || record.is_rough.load(SeqCst) {
            continue;
        }
        // A new leader may give it its time once more.
        let most = Duration::from_secs(lease.ttl as u64) + LATE;
        let mut from = lease.touched;
        for (began, ended) in &befallen {
            if *began <= from + most {
                from = from.max(*ended + NEW_LEADER);
            }
        }
        ended += 1;
        if *at > from + most {
            wrong.push(format!("it was at {at:?} that the key of a lease was deleted, which ought to be by {:?}: {lease:?}", from + most));
        }
    }
    record.count("leases whose end was timed", ended);
}
