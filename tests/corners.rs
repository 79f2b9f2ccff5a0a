//! What random requests do not reach, on real etcd and on the member under test: leases that run out, answers too big
//! for one message, requests at the limits of size, streams that go on for long, and the answers that are not about keys.
//!
//! Each test is a script that writes down what it sees; both members must make it write the same.

mod common;

use std::fmt::Write;
use std::time::Duration;

use common::build::*;
use common::pb::watch_request::RequestUnion;
use common::pb::*;
use common::watch::WatchStream;
use common::{Clients, Kind, Process, raw, render};
use tokio_stream::wrappers::ReceiverStream;

/// Runs a script on both members and compares what it wrote.
async fn compare(script: impl AsyncFn(&mut Process, &mut String)) {
    let Some(reference) = common::reference() else { return };
    let Some(subject) = Kind::subject(Some(&reference)) else { return };
    let mut written = Vec::new();
    for kind in [Kind::Etcd(reference.etcd.clone()), subject] {
        let mut process = Process::start(kind, &[]).await;
        let mut out = String::new();
        script(&mut process, &mut out).await;
        written.push(out);
    }
    assert!(written[0] == written[1], "the members differ\nETCD:\n{}\nFOUND:\n{}", written[0], written[1]);
    if std::env::var_os("QUORATE_PRINT").is_some() {
        println!("{}", written[0]);
    }
}

/// Writes a line; writing to a string cannot fail.
macro_rules! note {
    ($out:expr, $($arg:tt)*) => { writeln!($out, $($arg)*).unwrap_or_default() };
}

async fn put_note(c: &mut Clients, out: &mut String, request: PutRequest) {
    let size = request.value.len();
    note!(out, "{size} bytes: {}", render::outcome(c.kv.put(request).await, render::put));
}

/// A lease that runs out deletes its keys in one revision, in order, and not before its time.
#[tokio::test]
async fn leases_run_out() {
    compare(async |process, out| {
        let mut c = process.clients().await;
        let mut stream = WatchStream::open(&c.watch).await;
        stream.create(WatchCreateRequest { prev_kv: true, ..watch("", "\0", 0) }).await;
        for (id, ttl) in [(1, 4), (2, 6), (3, 100_000)] {
            note!(out, "{}", render::outcome(c.lease.lease_grant(LeaseGrantRequest { id, ttl }).await, |r| render::grant(r, true)));
        }
        for (key, lease) in [("c", 1), ("a", 1), ("b", 2), ("d", 3), ("e", 1), ("f", 0), ("e", 0), ("b/2", 2)] {
            note!(out, "{}", render::outcome(c.kv.put(PutRequest { lease, ..put(key, "") }).await, render::put));
        }
        // The second is kept alive until the first has run out with its two keys.
        let events = |n| move |seen: &[WatchResponse]| seen.iter().map(|r| r.events.len()).sum::<usize>() == n;
        while !stream.until(Duration::from_millis(500), events(10)).await {
            let mut beats =
                c.lease.lease_keep_alive(tokio_stream::iter([LeaseKeepAliveRequest { id: 2 }])).await.expect("a stream").into_inner();
            assert_eq!(beats.message().await.expect("a beat").expect("a beat").ttl, 6);
        }
        note!(out, "{}", contents(&mut c).await);
        assert!(stream.until(Duration::from_secs(20), events(12)).await, "the second lease does not run out");
        for answer in stream.seen.drain(..) {
            note!(out, "{}", render::watch(&answer));
        }
        note!(out, "{}", contents(&mut c).await);
        for id in [1, 2, 3] {
            let request = LeaseTimeToLiveRequest { id, keys: true };
            note!(out, "{}", render::outcome(c.lease.lease_time_to_live(request).await, render::ttl));
        }
        let mut beats =
            c.lease.lease_keep_alive(tokio_stream::iter([LeaseKeepAliveRequest { id: 1 }])).await.expect("a stream").into_inner();
        note!(out, "{:?}", beats.message().await.expect("a beat").map(|b| b.ttl));
    })
    .await;
}

async fn contents(c: &mut Clients) -> String {
    render::outcome(c.kv.range(everything()).await, |r| render::range(r, &everything()))
}

/// A lease keeps its time over a restart, as far as anybody can tell who does not look at the clock.
#[tokio::test]
async fn leases_and_keys_survive_a_restart() {
    compare(async |process, out| {
        let mut c = process.clients().await;
        for id in [5, -7, i64::MAX] {
            c.lease.lease_grant(LeaseGrantRequest { id, ttl: 100_000 }).await.expect("a grant");
            c.kv.put(PutRequest { lease: id, ..put(&format!("key of {id}"), "") }).await.expect("a put");
        }
        c.kv.delete_range(delete("key of 5", "")).await.expect("a delete");
        c.kv.compact(CompactionRequest { revision: 4, physical: true }).await.expect("a compaction");
        process.kill();
        process.restart().await;
        let mut c = process.clients().await;
        note!(out, "{}", contents(&mut c).await);
        for id in [5, -7, i64::MAX] {
            let request = LeaseTimeToLiveRequest { id, keys: true };
            note!(out, "{}", render::outcome(c.lease.lease_time_to_live(request).await, render::ttl));
        }
        for revision in [0, 3, 4, 5] {
            note!(out, "{}", render::outcome(c.maintenance.hash_kv(HashKvRequest { revision }).await, render::hash_kv));
        }
        // The lease is still tied to its key.
        note!(out, "{}", render::outcome(c.lease.lease_revoke(LeaseRevokeRequest { id: -7 }).await, render::revoke));
        note!(out, "{}", contents(&mut c).await);
    })
    .await;
}

/// More events than fit into one message: cut up where the watch allows it, whole where it does not.
#[tokio::test]
async fn watches_of_big_events() {
    compare(async |process, out| {
        let mut c = process.clients().await;
        for i in 0..6 {
            let request = PutRequest { key: format!("k{i}").into(), value: blob(700_000), ..Default::default() };
            put_note(&mut c, out, request).await;
        }
        for fragment in [false, true] {
            let mut stream = WatchStream::open(&c.watch).await;
            stream.create(WatchCreateRequest { fragment, ..watch("", "\0", 1) }).await;
            let complete = |seen: &[WatchResponse]| seen.iter().map(|r| r.events.len()).sum::<usize>() == 6;
            assert!(stream.until(Duration::from_secs(20), complete).await, "fragment={fragment}: not all events");
            let answers: Vec<_> = stream.seen.iter().filter(|a| !a.events.is_empty()).collect();
            for event in answers.iter().flat_map(|a| &a.events) {
                note!(out, "fragment={fragment}: {}", render::event(event));
            }
            if fragment {
                // Where exactly the cuts are is the server's business.
                assert!(answers.len() > 1, "not cut up");
                assert!(answers.iter().all(|a| a.events.len() <= 2), "no message above the limit");
            }
            note!(out, "fragment={fragment}: the last one says {}", answers[answers.len() - 1].fragment);
            // Between two revisions quorate begins a new answer where etcd makes one of any size; within one it does not.
        }
    })
    .await;
}

/// What is refused for its size, with which words, and what is looked at first.
#[tokio::test]
async fn sizes() {
    compare(async |process, out| {
        let mut c = process.clients().await;
        let big = |size| PutRequest { key: "big".into(), value: blob(size), ..Default::default() };
        for size in [1_000_000, 1_500_000, 1_572_700, 1_573_000, 1_900_000, 2_097_000, 2_097_200, 3_000_000] {
            put_note(&mut c, out, big(size)).await;
        }
        put_note(&mut c, out, PutRequest { ignore_value: true, ..big(1_600_000) }).await;
        put_note(&mut c, out, PutRequest { lease: 77, ..big(1_600_000) }).await;
        put_note(&mut c, out, PutRequest { key: "".into(), ..big(1_600_000) }).await;
        let long = || "x".repeat(1_600_000);
        let print = |r: &RangeResponse| format!("RANGE {} {}", render::header(&r.header), r.count);
        note!(out, "{}", render::outcome(c.kv.range(range(&long(), "")).await, print));
        note!(out, "{}", render::outcome(c.kv.delete_range(delete(&long(), "")).await, render::delete));
        let read_only = txn([range(&long(), "").op()]);
        note!(out, "{}", render::outcome(c.kv.txn(read_only).await, |r| format!("TXN {}", r.succeeded)));
        let write = txn([put(&long(), "").op()]);
        note!(out, "{}", render::outcome(c.kv.txn(write).await, |r| format!("TXN {}", r.succeeded)));
        // An answer may be bigger than any request.
        for i in 0..5 {
            c.kv.put(PutRequest { key: format!("part{i}").into(), ..big(1_000_000) }).await.expect("a put");
        }
        note!(out, "{}", contents(&mut c).await);
    })
    .await;
}

/// One KeepAlive stream for many leases, some of which are not there.
#[tokio::test]
async fn a_long_keep_alive_stream() {
    compare(async |process, out| {
        let mut c = process.clients().await;
        for id in [1, 2] {
            c.lease.lease_grant(LeaseGrantRequest { id, ttl: 1000 * id }).await.expect("a grant");
        }
        let (requests, to_send) = tokio::sync::mpsc::channel(16);
        // The stream must not wait for a first answer that is still to be asked for.
        requests.send(LeaseKeepAliveRequest { id: 1 }).await.expect("room for one");
        let mut beats = c.lease.lease_keep_alive(ReceiverStream::new(to_send)).await.expect("a stream").into_inner();
        note!(out, "{:?}", beats.message().await.expect("a beat").map(|b| render::keep_alive(&b)));
        for id in [2, 3, 0, 1, 1, -1] {
            requests.send(LeaseKeepAliveRequest { id }).await.expect("an open stream");
            note!(out, "{:?}", beats.message().await.expect("a beat").map(|b| render::keep_alive(&b)));
        }
        c.lease.lease_revoke(LeaseRevokeRequest { id: 2 }).await.expect("a revoke");
        requests.send(LeaseKeepAliveRequest { id: 2 }).await.expect("an open stream");
        note!(out, "{:?}", beats.message().await.expect("a beat").map(|b| render::keep_alive(&b)));
        drop(requests);
        note!(out, "{:?}", beats.message().await.expect("the end").map(|b| render::keep_alive(&b)));
    })
    .await;
}

/// A Watch stream goes on when the client has nothing more to ask for; requests that say nothing are passed over.
#[tokio::test]
async fn watch_streams() {
    compare(async |process, out| {
        let mut c = process.clients().await;
        let mut stream = WatchStream::open(&c.watch).await;
        stream.send_empty().await;
        stream.send(RequestUnion::CancelRequest(WatchCancelRequest { watch_id: 12 })).await;
        stream.send(RequestUnion::ProgressRequest(WatchProgressRequest {})).await;
        // Numbers are given from 0 on, passing over those in use, and not given again.
        for watch_id in [0, 0, 3, 3, 0, 0, -1, -1, 0] {
            let answer = stream.create(WatchCreateRequest { watch_id, ..watch("a", "", 0) }).await;
            note!(out, "asked for {watch_id}: {}", render::watch(&answer));
        }
        for id in [1, 3, -1] {
            stream.cancel(id).await;
        }
        for watch_id in [0, 3, 1] {
            let answer = stream.create(WatchCreateRequest { watch_id, ..watch("a", "", 0) }).await;
            note!(out, "asked for {watch_id}: {}", render::watch(&answer));
        }
        stream.barrier(1).await;
        stream.seen.clear();
        c.kv.put(put("a", "1")).await.expect("a put");
        stream.barrier(2).await;
        let mut ids: Vec<_> = stream.seen.iter().filter(|a| !a.events.is_empty()).map(|a| a.watch_id).collect();
        ids.sort();
        note!(out, "delivered to {ids:?}");

        // The client's side ended right after one request.
        let request = WatchRequest { request_union: Some(RequestUnion::CreateRequest(watch("b", "", 0))) };
        let mut answers = c.watch.watch(tokio_stream::iter([request])).await.expect("a stream").into_inner();
        let created = answers.message().await.expect("an answer").expect("an answer");
        note!(out, "{}", render::watch(&created));
        c.kv.put(put("b", "1")).await.expect("a put");
        let event = answers.message().await.expect("an answer").expect("an answer");
        note!(out, "{}", render::watch(&event));
    })
    .await;
}

/// A watch below the compaction is canceled by the server; its id is free again when the client has canceled it, too.
#[tokio::test]
async fn watches_of_what_is_compacted() {
    compare(async |process, out| {
        let mut c = process.clients().await;
        for i in 0..5 {
            c.kv.put(put("a", &i.to_string())).await.expect("a put");
        }
        c.kv.delete_range(delete("a", "")).await.expect("a delete");
        for revision in [0, 0, 3] {
            let request = CompactionRequest { revision, physical: true };
            note!(out, "{}", render::outcome(c.kv.compact(request).await, render::compact));
        }
        let mut stream = WatchStream::open(&c.watch).await;
        for start in [1, 2, 3, 4, 7] {
            let request = WatchCreateRequest { watch_id: 10 + start, prev_kv: true, ..watch("a", "", start) };
            note!(out, "from {start}: {}", render::watch(&stream.create(request).await));
        }
        let canceled = |seen: &[WatchResponse]| seen.iter().filter(|a| a.compact_revision != 0).count() == 2;
        assert!(stream.until(Duration::from_secs(20), canceled).await, "not canceled");
        let again = WatchCreateRequest { watch_id: 11, ..watch("a", "", 0) };
        note!(out, "again: {}", render::watch(&stream.create(again.clone()).await));
        stream.cancel(11).await;
        stream.cancel(12).await;
        note!(out, "again: {}", render::watch(&stream.create(again).await));
        stream.barrier(7).await;
        let mut lines: Vec<String> = stream.seen.iter().filter(|a| a.canceled || !a.events.is_empty()).map(render::watch).collect();
        lines.sort();
        note!(out, "{}", lines.join("\n"));
        // What remains when the compaction meets the deletion.
        let request = CompactionRequest { revision: 7, physical: true };
        note!(out, "{}", render::outcome(c.kv.compact(request).await, render::compact));
        for revision in [6, 7, 8, -1, i64::MIN] {
            note!(out, "{}", render::outcome(c.maintenance.hash_kv(HashKvRequest { revision }).await, render::hash_kv));
        }
        let mut stream = WatchStream::open(&c.watch).await;
        stream.create(WatchCreateRequest { prev_kv: true, ..watch("a", "", 7) }).await;
        stream.barrier(7).await;
        note!(out, "{}", stream.seen.iter().filter(|a| !a.events.is_empty()).map(render::watch).collect::<String>());
    })
    .await;
}

/// A watch that waits for a revision to come is not told of what comes before, and is not told of progress.
#[tokio::test]
async fn watches_of_the_future() {
    compare(async |process, out| {
        let mut c = process.clients().await;
        let mut stream = WatchStream::open(&c.watch).await;
        stream.create(watch("", "\0", 5)).await;
        stream.create(WatchCreateRequest { prev_kv: true, ..watch("a", "", 4) }).await;
        stream.create(watch("a", "", 1)).await;
        stream.send(RequestUnion::ProgressRequest(WatchProgressRequest {})).await;
        for i in 0..6 {
            c.kv.put(put("a", &i.to_string())).await.expect("a put");
        }
        stream.barrier(7).await;
        let mut lines: Vec<String> = Vec::new();
        for answer in &stream.seen {
            lines.extend(answer.events.iter().map(|e| format!("watch {}: {}", answer.watch_id, render::event(e))));
        }
        lines.sort();
        note!(out, "{lines:#?}");
    })
    .await;
}

/// Answers that are not about keys: which fields are set, and how a snapshot is cut up.
#[tokio::test]
async fn maintenance() {
    compare(async |process, out| {
        let mut c = process.clients().await;
        c.kv.put(put("a", "1")).await.expect("a put");
        let members = c.cluster.member_list(MemberListRequest { linearizable: false }).await.expect("a list").into_inner();
        let own = members.members[0].id;
        note!(out, "{}", render::members(&members, &process.name));
        note!(out, "{}", members.header.as_ref().is_some_and(|h| h.member_id == own));

        let status = c.maintenance.status(StatusRequest {}).await.expect("a status").into_inner();
        note!(out, "{}", render::header(&status.header));
        note!(out, "version {} db {} in use {}", !status.version.is_empty(), status.db_size > 0, status.db_size_in_use > 0);
        note!(out, "in use no more than there is: {}", status.db_size_in_use <= status.db_size);
        note!(out, "leader {} term {} index {}", status.leader == own, status.raft_term > 0, status.raft_index > 0);
        note!(out, "applied {} learner {}", (1..=status.raft_index).contains(&status.raft_applied_index), status.is_learner);
        note!(out, "errors {:?}", status.errors);
        note!(out, "the header's term is the member's: {}", status.header.is_some_and(|h| h.raft_term == status.raft_term));

        note!(
            out,
            "{:?}",
            c.maintenance.defragment(DefragmentRequest {}).await.map(|r| r.into_inner().header).map_err(|s| render::error(&s))
        );
        for target_id in [0, 5, own] {
            let answer = c.maintenance.move_leader(MoveLeaderRequest { target_id }).await;
            note!(out, "{:?}", answer.map(|r| r.into_inner().header).map_err(|s| render::error(&s)));
        }
        note!(out, "{}", render::outcome(c.maintenance.hash(HashRequest {}).await, |r| render::header(&r.header)));
        note!(out, "{}", render::outcome(c.maintenance.alarm(AlarmRequest::default()).await, render::alarm));

        let mut parts = c.maintenance.snapshot(SnapshotRequest {}).await.expect("a snapshot").into_inner();
        let (mut size, mut left, mut last, mut headers) = (0u64, None, 0, 0);
        while let Some(part) = parts.message().await.expect("a part") {
            let length = part.blob.len() as u64;
            if let Some(left) = left
                && part.remaining_bytes > 0
            {
                assert_eq!(part.remaining_bytes + length, left, "what remains is what remained without this part");
            }
            headers += usize::from(part.header.is_some());
            (size, left, last) = (size + length, Some(part.remaining_bytes), length);
        }
        // etcdctl takes what has this length for a snapshot with a checksum at its end, and refuses any other.
        note!(out, "ends with {last} bytes, of a length that is {} modulo 512, {left:?} left, {headers} headers", size % 512);
    })
    .await;
}

/// Code and text for methods and services that do not exist.
#[tokio::test]
async fn unknown_methods() {
    compare(async |process, out| {
        let c = process.clients().await;
        for path in ["/etcdserverpb.KV/Nothing", "/etcdserverpb.Maintenance/Nothing", "/nothing/Nothing", "/nothing.at.all/Nothing"] {
            let answer = raw::unary(&c.channel, path, bytes::Bytes::new()).await;
            note!(out, "{path}: {:?}", answer.map(|_| ()).map_err(|s| render::error(&s)));
        }
        for body in [&b"\xff"[..], b"\x0a\x05a"] {
            let answer = raw::unary(&c.channel, "/etcdserverpb.KV/Range", bytes::Bytes::from_static(body)).await;
            note!(out, "{body:?}: {:?}", answer.map(|_| ()).map_err(|s| s.code()));
        }
        // Fields that do not exist are passed over.
        let mut unknown = b"\x0a\x01a".to_vec();
        unknown.extend(b"\xf8\x07\x01\xfa\x07\x03abc");
        let answer = raw::unary(&c.channel, "/etcdserverpb.KV/Range", unknown.into()).await;
        note!(out, "{:?}", answer.map(|_| ()).map_err(|s| render::error(&s)));
    })
    .await;
}

/// The quota's alarm: what is refused, with which words, and what goes on.
#[tokio::test]
async fn alarms() {
    compare(async |process, out| {
        let mut c = process.clients().await;
        let own = c.cluster.member_list(MemberListRequest::default()).await.expect("a list").into_inner().members[0].id;
        for key in ["a", "b", "c"] {
            c.kv.put(put(key, "1")).await.expect("a put");
        }
        c.lease.lease_grant(LeaseGrantRequest { id: 1, ttl: 100_000 }).await.expect("a grant");
        // GET, ACTIVATE, DEACTIVATE; NONE, NOSPACE, CORRUPT.
        let both = [
            (1, own, 1),
            (1, own, 1),
            (0, 0, 0),
            (0, 0, 1),
            (0, 0, 2),
            (0, 5, 1),
            (2, 5, 1),
            (2, 0, 1),
            (2, own, 0),
            (1, own, 0),
            (0, 0, 0),
        ];
        for (action, member_id, alarm) in both {
            let answer = c.maintenance.alarm(AlarmRequest { action, member_id, alarm }).await;
            note!(out, "{action} {alarm}: {}", render::outcome(answer, render::alarm));
        }
        for (alarm, name) in [(1, "space"), (2, "corrupt")] {
            let print_txn = |r: &TxnResponse| format!("TXN {}", render::header(&r.header));
            for request in [
                put("", ""),
                put("new", "1"),
                PutRequest { lease: 99, ..put("new", "1") },
                PutRequest { ignore_value: true, ..put("x", "") },
            ] {
                note!(out, "{name}: {}", render::outcome(c.kv.put(request).await, render::put));
            }
            note!(out, "{name}: {}", render::outcome(c.kv.range(range("a", "")).await, |r| render::range(r, &range("a", ""))));
            let local = RangeRequest { serializable: true, ..range("a", "") };
            note!(out, "{name}: {}", render::outcome(c.kv.range(local.clone()).await, |r| render::range(r, &local)));
            for ops in
                [vec![range("a", "").op()], vec![put("a", "").op()], vec![put("", "").op()], vec![range("", "").op(), put("a", "").op()]]
            {
                note!(out, "{name}: {}", render::outcome(c.kv.txn(txn(ops)).await, print_txn));
            }
            let untaken = TxnRequest { failure: vec![put("a", "").op()], ..Default::default() };
            note!(out, "{name}: {}", render::outcome(c.kv.txn(untaken).await, print_txn));
            note!(out, "{name}: {}", render::outcome(c.kv.txn(txn([delete("none", "").op()])).await, print_txn));
            for (id, ttl) in [(2, 1000), (1, 1000), (2, i64::MAX)] {
                note!(
                    out,
                    "{name}: {}",
                    render::outcome(c.lease.lease_grant(LeaseGrantRequest { id, ttl }).await, |r| render::grant(r, true))
                );
            }
            note!(out, "{name}: {}", render::outcome(c.lease.lease_revoke(LeaseRevokeRequest { id: 99 }).await, render::revoke));
            note!(out, "{name}: {}", render::outcome(c.lease.lease_leases(LeaseLeasesRequest {}).await, render::leases));
            let request = LeaseTimeToLiveRequest { id: 1, keys: true };
            note!(out, "{name}: {}", render::outcome(c.lease.lease_time_to_live(request).await, render::ttl));
            note!(out, "{name}: {}", render::outcome(c.kv.delete_range(delete("b", "")).await, render::delete));
            note!(
                out,
                "{name}: {}",
                render::outcome(c.kv.compact(CompactionRequest { revision: 2 + i64::from(alarm), physical: true }).await, render::compact)
            );
            note!(out, "{name}: {}", render::outcome(c.maintenance.hash_kv(HashKvRequest { revision: 0 }).await, render::hash_kv));
            let status = c.maintenance.status(StatusRequest {}).await.expect("a status").into_inner();
            note!(out, "{name}: {:?}", status.errors.iter().map(|e| e.replace(&own.to_string(), "own")).collect::<Vec<_>>());
            let off = AlarmRequest { action: 2, member_id: own, alarm };
            note!(out, "{name}: {}", render::outcome(c.maintenance.alarm(off).await, render::alarm));
            note!(out, "{name}: {}", render::outcome(c.kv.put(put("a", "2")).await, render::put));
            if alarm == 1 {
                let on = AlarmRequest { action: 1, member_id: own, alarm: 2 };
                note!(out, "{name}: {}", render::outcome(c.maintenance.alarm(on).await, render::alarm));
            }
        }
        // An alarm outlives a restart.
        let on = AlarmRequest { action: 1, member_id: own, alarm: 1 };
        note!(out, "{}", render::outcome(c.maintenance.alarm(on).await, render::alarm));
        process.kill();
        process.restart().await;
        let mut c = process.clients().await;
        note!(out, "{}", render::outcome(c.maintenance.alarm(AlarmRequest::default()).await, render::alarm));
        note!(out, "{}", render::outcome(c.kv.put(put("a", "3")).await, render::put));
    })
    .await;
}
