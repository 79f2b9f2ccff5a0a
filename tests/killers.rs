//! Requests that kill or wedge a running etcd 3.5.30, and others of their kind. The member under test answers each with
//! an error or something sane, leaves no trace of what it refused, serves on, and starts again.
//!
//! Every attack says what it does to etcd. Where the subject is etcd itself (`QUORATE_SUBJECT=etcd`), that is what is
//! tested, so that the attacks stay real; those that would take the machine along are never sent to etcd.

mod common;

use std::time::Duration;

use bytes::{BufMut, Bytes, BytesMut};
use common::build::*;
use common::pb::watch_request::RequestUnion;
use common::pb::*;
use common::watch::WatchStream;
use common::{Clients, Kind, Process, raw, render};
use tonic::Request;
use tonic::metadata::MetadataMap;

/// What an attack does to etcd 3.5.30.
#[derive(Clone, Copy, PartialEq)]
enum Etcd {
    /// The process dies.
    Dies,
    /// It dies or refuses to start when it is started again.
    DoesNotStart,
    /// It survives. Here so that we do, too.
    Lives,
    /// It would need more memory or time than a test has.
    NotTried,
}

/// What the subject has to answer, and what the store has to look like afterwards.
struct Expected {
    etcd: Etcd,
    /// One of these must be the beginning of the printed answer.
    answers: &'static [&'static str],
    /// What the store holds afterwards, printed; `None` if what it held before, [`ANYTHING`] if that cannot be said.
    leaves: Option<&'static str>,
}

const INVALID: &str = "ERROR InvalidArgument (3)";
const ANY_ERROR: &str = "ERROR";

/// For attacks that give requests up, which may still be carried out at any time.
const ANYTHING: &str = "*";

/// The pairs that every attack finds in the store: a, b and c, each with its own name as the value, revisions 2 to 4.
const STORE: &str = "count=3 more=false
  \"a\"=\"a\" create=2 mod=2 version=1 lease=0
  \"b\"=\"b\" create=3 mod=3 version=1 lease=0
  \"c\"=\"c\" create=4 mod=4 version=1 lease=0";

async fn contents(clients: &mut Clients) -> String {
    let all = clients.kv.range(everything()).await.expect("a range after the attack");
    let text = render::range(all.get_ref(), &everything());
    text.split_once("; ").map_or(text.clone(), |(_, pairs)| pairs.to_owned())
}

/// Runs an attack on a fresh member and looks whether it lives.
async fn survive(expected: Expected, attack: impl AsyncFnOnce(Clients) -> String) {
    let reference = std::env::var_os("QUORATE_REFERENCE_DIR").and_then(|_| common::reference());
    let Some(subject) = Kind::subject(reference.as_ref()) else {
        println!("skipped: no quorate binary, and QUORATE_REFERENCE_DIR is not set");
        return;
    };
    if subject.is_etcd() && expected.etcd == Etcd::NotTried {
        return;
    }
    let etcd_falls = subject.is_etcd() && expected.etcd != Etcd::Lives;
    let mut member = Process::start(subject, &[]).await;
    let mut clients = member.clients().await;
    for key in ["a", "b", "c"] {
        clients.kv.put(put(key, key)).await.expect("a put before the attack");
    }
    let watchdog = Watchdog::start(member.pid());
    let answer = attack(clients.clone()).await;
    if etcd_falls {
        return etcd_has_fallen(member, expected.etcd, &answer).await;
    }
    assert_eq!(member.exited(), None, "the member died; its answer: {answer}");
    let peak = watchdog.stop();
    assert!(peak < MEMORY_LIMIT, "the attack took {} MiB of memory", peak >> 20);
    assert!(expected.answers.iter().any(|e| answer.starts_with(e)), "unexpected answer: {answer}");

    // It serves, with nothing left of what was refused.
    let mut clients = member.clients().await;
    let leaves = expected.leaves.unwrap_or(STORE);
    let before = revision(&mut clients).await;
    if leaves != ANYTHING {
        assert_eq!(contents(&mut clients).await, leaves);
    }
    clients.kv.put(put("after", "1")).await.expect("a put after the attack");
    if leaves != ANYTHING {
        assert_eq!(revision(&mut clients).await, before + 1);
    }
    clients.kv.delete_range(delete("after", "")).await.expect("a delete after the attack");

    // It starts again from its log, although the attack may be in there.
    member.kill();
    member.restart().await;
    let mut clients = member.clients().await;
    if leaves != ANYTHING {
        assert_eq!(contents(&mut clients).await, leaves);
    }
    clients.kv.put(put("after", "2")).await.expect("a put after the restart");
}

/// That the attack does to etcd what is said of it.
async fn etcd_has_fallen(mut member: Process, expected: Etcd, answer: &str) {
    if expected == Etcd::DoesNotStart {
        member.kill();
        assert!(!member.try_restart().await, "etcd starts again; its answer was: {answer}");
        return;
    }
    for _ in 0..100 {
        if member.exited().is_some() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("etcd lives; its answer: {answer}");
}

async fn revision(clients: &mut Clients) -> i64 {
    let answer = clients.kv.range(range("a", "")).await.expect("a range").into_inner();
    answer.header.expect("a header").revision
}

/// More resident memory than any of these attacks may cost.
const MEMORY_LIMIT: u64 = 1 << 30;

/// Watches the memory of the attacked process and ends it before it takes the machine along.
struct Watchdog {
    stop: std::sync::mpsc::Sender<()>,
    thread: std::thread::JoinHandle<u64>,
}

impl Watchdog {
    fn start(pid: u32) -> Watchdog {
        let (stop, stopped) = std::sync::mpsc::channel();
        let thread = std::thread::spawn(move || {
            let mut peak = 0;
            loop {
                let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
                let resident =
                    status.lines().find_map(|l| l.strip_prefix("VmRSS:")?.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok());
                peak = peak.max(resident.unwrap_or(0) << 10);
                if peak >= 2 * MEMORY_LIMIT
                    && let Some(pid) = rustix::process::Pid::from_raw(pid as i32)
                {
                    let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
                }
                if stopped.recv_timeout(Duration::from_millis(20)) != Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
                    return peak;
                }
            }
        });
        Watchdog { stop, thread }
    }

    /// The most resident memory seen, in bytes; 0 where /proc does not tell.
    fn stop(self) -> u64 {
        let _ = self.stop.send(());
        self.thread.join().expect("the watchdog does not panic")
    }
}

/// The outcome of a Txn whose answer's details do not matter.
async fn send_txn(mut clients: Clients, request: TxnRequest) -> String {
    render::outcome(clients.kv.txn(request).await, |r| format!("TXN {}", r.succeeded))
}

async fn send_alarm(mut clients: Clients, action: i32, alarm: i32) -> String {
    render::outcome(clients.maintenance.alarm(AlarmRequest { action, alarm, member_id: 1 }).await, render::alarm)
}

/// Puts four pairs of 1 MiB in place of what is there, and returns the revision.
async fn four_big_pairs(c: &mut Clients) -> i64 {
    c.kv.delete_range(delete("\0", "\0")).await.expect("a delete");
    for i in 0..4 {
        c.kv.put(PutRequest { key: format!("big{i}").into(), value: blob(1 << 20), ..Default::default() }).await.expect("a put");
    }
    revision(c).await
}

/// Makes a test of each attack.
macro_rules! attacks {
    ($($(#[$doc:meta])* $name:ident: $expected:expr, $attack:expr;)*) => {
        $($(#[$doc])* #[tokio::test] async fn $name() { survive($expected, $attack).await })*
    };
}

const fn dies(answers: &'static [&'static str]) -> Expected {
    Expected { etcd: Etcd::Dies, answers, leaves: None }
}

const fn does_not_start(answers: &'static [&'static str]) -> Expected {
    Expected { etcd: Etcd::DoesNotStart, answers, leaves: None }
}

const fn lives(answers: &'static [&'static str]) -> Expected {
    Expected { etcd: Etcd::Lives, answers, leaves: None }
}

const fn not_tried(answers: &'static [&'static str]) -> Expected {
    Expected { etcd: Etcd::NotTried, answers, leaves: None }
}

attacks! {
    /// etcd takes the sorter of an unknown target, which is none, and calls it.
    range_with_unknown_sort_target: dies(&[INVALID]), async |mut c: Clients| {
        render::outcome(c.kv.range(RangeRequest { sort_target: 9, ..everything() }).await, |r| format!("RANGE {}", r.count))
    };

    range_with_negative_sort_target: dies(&[INVALID]), async |mut c: Clients| {
        let request = RangeRequest { sort_target: -1, sort_order: 2, ..range("a", "") };
        render::outcome(c.kv.range(request).await, |r| format!("RANGE {}", r.count))
    };

    /// The put must not have happened either.
    txn_with_unknown_sort_target: dies(&[INVALID]), async |c: Clients| {
        send_txn(c, txn([put("new", "1").op(), RangeRequest { sort_target: 9, ..everything() }.op()])).await
    };

    nested_txn_with_unknown_sort_target: dies(&[INVALID]), async |c: Clients| {
        let inner = txn([RangeRequest { sort_target: 9, sort_order: 1, ..everything() }.op()]);
        send_txn(c, txn([put("new", "1").op(), txn([txn([]).op(), inner.op()]).op()])).await
    };

    /// The overlap check does not see that an open range covers the key, so the put finds nothing to keep the value of,
    /// after the delete has happened.
    txn_keeps_the_value_of_a_key_it_deletes: does_not_start(&[INVALID]), async |c: Clients| {
        send_txn(c, txn([delete("a", "\0").op(), PutRequest { ignore_value: true, ..put("b", "") }.op()])).await
    };

    txn_keeps_the_lease_of_a_key_it_deletes: does_not_start(&[INVALID]), async |c: Clients| {
        let inner = txn([PutRequest { ignore_lease: true, ..put("b", "x") }.op()]);
        send_txn(c, txn([delete("\0", "\0").op(), inner.op()])).await
    };

    /// The same with the delete below and in the branch that is taken, the put after it on the same level.
    nested_txn_deletes_a_key_whose_value_is_kept: does_not_start(&[INVALID]), async |c: Clients| {
        let inner = TxnRequest { failure: vec![delete("a", "").op()], ..txn([delete("b", "\0").op()]) };
        send_txn(c, txn([inner.op(), PutRequest { ignore_value: true, ..put("c", "") }.op()])).await
    };

    /// Accepted by etcd: the key is deleted and put in one revision. A compaction at that revision then throws the new
    /// value away, and the next read of the key is fatal.
    compaction_of_a_key_deleted_and_put_in_one_revision:
        Expected { leaves: Some("count=1 more=false\n  \"b\"=\"new\" create=5 mod=5 version=1 lease=0"), ..dies(&["RANGE", INVALID]) },
        async |mut c: Clients| {
            let txn = c.kv.txn(txn([delete("a", "\0").op(), put("b", "new").op()])).await.expect("the Txn is answered").into_inner();
            let revision = txn.header.expect("a header").revision;
            assert_eq!(revision, 5);
            c.kv.compact(CompactionRequest { revision, physical: true }).await.expect("the compaction is answered");
            render::outcome(c.kv.range(range("b", "")).await, |r| render::range(r, &range("b", "")))
        };

    /// The other way round there is nothing to lose.
    compaction_of_a_key_put_and_deleted_in_one_revision:
        Expected { leaves: Some("count=0 more=false"), ..lives(&["RANGE"]) },
        async |mut c: Clients| {
            let txn = c.kv.txn(txn([put("b", "new").op(), delete("a", "\0").op()])).await.expect("the Txn is answered").into_inner();
            let revision = txn.header.expect("a header").revision;
            c.kv.compact(CompactionRequest { revision, physical: true }).await.expect("the compaction is answered");
            render::outcome(c.kv.range(range("b", "")).await, |r| render::range(r, &range("b", "")))
        };

    /// In etcd's log for good, and fatal whenever it is applied.
    alarm_of_unknown_type: does_not_start(&[INVALID]), async |c: Clients| send_alarm(c, 1, 7).await;

    alarm_of_negative_type: does_not_start(&[INVALID]), async |c: Clients| send_alarm(c, 1, -1).await;

    /// Nothing to look up or to disarm; etcd answers so.
    get_of_unknown_alarm_type: lives(&["ALARMS", INVALID]), async |c: Clients| send_alarm(c, 0, 7).await;

    disarm_of_unknown_alarm_type: lives(&["ALARMS", INVALID]), async |c: Clients| send_alarm(c, 2, 7).await;

    /// etcd has no answer for it and dies of that.
    alarm_with_unknown_action: dies(&[INVALID]), async |c: Clients| send_alarm(c, 3, 1).await;

    alarm_with_negative_action: dies(&[INVALID]), async |c: Clients| send_alarm(c, -1, 0).await;

    alarm_of_no_type: lives(&["ALARMS", INVALID]), async |c: Clients| send_alarm(c, 1, 0).await;

    /// The value becomes a label of a metric in etcd, and those must be text.
    client_version_that_is_not_text: dies(&["RANGE", INVALID]), async |mut c: Clients| {
        let mut request = Request::new(range("a", ""));
        *request.metadata_mut() = client_version(b"\xff\xfe");
        render::outcome(c.kv.range(request).await, |r| format!("RANGE {}", r.count))
    };

    client_version_of_a_stream_that_is_not_text: dies(&["STREAM", INVALID]), async |mut c: Clients| {
        let mut request = Request::new(tokio_stream::empty());
        *request.metadata_mut() = client_version(b"\xff\xfe");
        match c.lease.lease_keep_alive(request).await {
            Err(status) => render::error(&status),
            Ok(answers) => match answers.into_inner().message().await {
                Err(status) => render::error(&status),
                Ok(_) => "STREAM".into(),
            },
        }
    };

    /// Accepted as far as the log by etcd, which then never starts again.
    downgrade_of_a_single_member: does_not_start(&[ANY_ERROR]), async |mut c: Clients| {
        render::outcome(c.maintenance.downgrade(DowngradeRequest { action: 1, version: "3.4.0".into() }).await, |r| format!("{r:?}"))
    };

    downgrades_to_nonsense: lives(&["done"]), async |mut c: Clients| {
        for (action, version) in [(0, ""), (1, "x"), (1, "999999999999999999999.1.1"), (2, ""), (9, "3.4.0"), (-1, "")] {
            let answer = c.maintenance.downgrade(DowngradeRequest { action, version: version.into() }).await;
            assert!(answer.is_err(), "{action} {version}: {answer:?}");
        }
        "done".into()
    };

    /// Hundreds of answers of 4 MiB each. Through the log in etcd, so it happens again at every start.
    txn_whose_reads_multiply: Expected { leaves: Some("count=0 more=false"), ..not_tried(&[ANY_ERROR]) }, async |mut c: Clients| {
        let before = four_big_pairs(&mut c).await;
        let inner = txn(vec![everything().op(); 120]);
        // The put makes it a write, which is evaluated where nothing else can be meanwhile.
        let mut ops = vec![inner.op(); 7];
        ops.push(put("big0", "gone").op());
        let answer = send_txn(c.clone(), txn(ops)).await;
        assert_eq!(revision(&mut c).await, before, "a refused Txn left a trace");
        c.kv.delete_range(delete("\0", "\0")).await.expect("a delete");
        answer
    };

    /// The same without a write and without nesting: 512 MiB.
    read_only_txn_whose_reads_multiply: Expected { leaves: Some("count=0 more=false"), ..not_tried(&["TXN", ANY_ERROR]) }, async |mut c: Clients| {
        four_big_pairs(&mut c).await;
        let answer = send_txn(c.clone(), txn(vec![everything().op(); 128])).await;
        c.kv.delete_range(delete("\0", "\0")).await.expect("a delete");
        answer
    };

    /// Sixteen thousand compares of every key there is.
    txn_whose_compares_multiply: not_tried(&["TXN", ANY_ERROR]), async |mut c: Clients| {
        for chunk in 0..20 {
            c.kv.txn(txn((0..100).map(|i| put(&format!("many{chunk}/{i}"), "").op()))).await.expect("a Txn of puts");
        }
        let compare = Compare { key: "\0".into(), range_end: "\0".into(), target: 2, result: 1, ..Default::default() };
        let inner = TxnRequest { compare: vec![compare; 60], ..Default::default() };
        let answer = send_txn(c.clone(), txn(vec![inner.op(); 60])).await;
        c.kv.delete_range(delete("many", "many~")).await.expect("a delete");
        answer
    };

    /// A Txn in a Txn, 32 times: as deep as quorate takes them.
    txn_nested_as_deep_as_allowed: lives(&["a deep answer"]), async |c: Clients| {
        match raw::unary(&c.channel, "/etcdserverpb.KV/Txn", nested_txn(32)).await {
            // The pair in the middle, and at least a tag and a length for each of two messages a level around it.
            Ok(answer) if answer.get_ref().len() > 32 * 4 => "a deep answer".into(),
            Ok(answer) => format!("{} bytes", answer.get_ref().len()),
            Err(status) => render::error(&status),
        }
    };

    txn_nested_too_deep: lives(&[INVALID]), async |c: Clients| {
        for depth in [129, 1_000, 10_000, 100_000] {
            let answer = raw::unary(&c.channel, "/etcdserverpb.KV/Txn", nested_txn(depth)).await;
            let status = answer.expect_err("a refusal");
            assert_eq!(status.message(), "etcdserver: too many operations in txn request", "depth {depth}");
        }
        INVALID.into()
    };

    /// On every method, and on streams.
    messages_that_are_no_protobuf: lives(&["done"]), async |c: Clients| {
        let bodies: [&[u8]; 7] = [b"\xff", b"\x0a\xff\xff\xff\xff\x0f", b"\x0a", b"\x0b\x0c", b"\x0b", b"\x00\x00", b"\x07"];
        for path in UNARY {
            for body in bodies {
                // The unlucky ones are unknown fields or nothing for one method or another; what counts is that it lives.
                let _ = raw::unary(&c.channel, path, Bytes::from_static(body)).await;
            }
        }
        for path in ["/etcdserverpb.KV/Range", "/etcdserverpb.KV/Txn", "/etcdserverpb.Lease/LeaseGrant"] {
            let status = raw::unary(&c.channel, path, Bytes::from_static(b"\x0a\xff\xff")).await.expect_err("a refusal");
            assert_eq!(status.code(), tonic::Code::Internal, "{path}: {status:?}");
        }
        for path in ["/etcdserverpb.Watch/Watch", "/etcdserverpb.Lease/LeaseKeepAlive"] {
            let status = raw::streaming(&c.channel, path, vec![Bytes::from_static(b"\xff")]).await.expect_err("a refusal");
            assert_eq!(status.code(), tonic::Code::Internal, "{path}: {status:?}");
        }
        "done".into()
    };

    revisions_at_the_ends_of_the_numbers: lives(&["done"]), async |mut c: Clients| {
        for revision in [i64::MIN, i64::MIN + 1, -1, i64::MAX - 1, i64::MAX] {
            let _ = c.kv.compact(CompactionRequest { revision, physical: true }).await.expect_err("a refusal");
            let _ = c.maintenance.hash_kv(HashKvRequest { revision }).await;
            let _ = c.kv.range(RangeRequest { revision, ..everything() }).await;
            let _ = c.kv.range(RangeRequest { limit: revision, ..everything() }).await;
            let _ = c.kv.range(RangeRequest { limit: revision, sort_order: 2, ..everything() }).await;
            let bounds = RangeRequest { min_mod_revision: revision, max_create_revision: revision, ..everything() };
            let _ = c.kv.range(bounds).await;
            let _ = send_txn(c.clone(), txn([RangeRequest { revision, ..everything() }.op()])).await;
        }
        "done".into()
    };

    watches_at_the_ends_of_the_numbers: lives(&["done"]), async |c: Clients| {
        let mut stream = WatchStream::open(&c.watch).await;
        for start in [i64::MIN, -1, i64::MAX - 1, i64::MAX] {
            for watch_id in [0, -1, i64::MIN, i64::MAX] {
                let filters = vec![0, 1, -1, i32::MAX];
                stream.create(WatchCreateRequest { watch_id, filters, prev_kv: true, fragment: true, ..watch("", "\0", start) }).await;
            }
        }
        stream.send(RequestUnion::ProgressRequest(WatchProgressRequest {})).await;
        for watch_id in [i64::MIN, -1, 12345, i64::MAX] {
            stream.send(RequestUnion::CancelRequest(WatchCancelRequest { watch_id })).await;
        }
        stream.send_empty().await;
        // It still answers.
        stream.create(WatchCreateRequest { watch_id: 9, ..watch("a", "", 0) }).await;
        "done".into()
    };

    /// Watches that are canceled while they catch up or are being canceled by the compaction.
    watches_canceled_in_every_state: Expected { leaves: Some("count=0 more=false"), ..lives(&["done"]) }, async |mut c: Clients| {
        for i in 0..40 {
            c.kv.put(put("a", &i.to_string())).await.expect("a put");
        }
        c.kv.compact(CompactionRequest { revision: 30, physical: true }).await.expect("a compaction");
        for _ in 0..10 {
            let mut stream = WatchStream::open(&c.watch).await;
            for i in 0..50 {
                stream.send(RequestUnion::CreateRequest(watch("a", "\0", 2 + i))).await;
                stream.send(RequestUnion::CancelRequest(WatchCancelRequest { watch_id: i })).await;
                if i % 10 == 0 {
                    c.kv.put(put("a", "x")).await.expect("a put");
                }
            }
        }
        c.kv.delete_range(delete("\0", "\0")).await.expect("a delete");
        "done".into()
    };

    /// Granted, used, asked for, expired: a lease's id may be any number.
    leases_at_the_ends_of_the_numbers: lives(&["done"]), async |mut c: Clients| {
        for id in [i64::MIN, -1, i64::MAX] {
            for ttl in [i64::MAX, 9_000_000_001] {
                c.lease.lease_grant(LeaseGrantRequest { id, ttl }).await.expect_err("a refusal");
            }
            c.lease.lease_grant(LeaseGrantRequest { id, ttl: i64::MIN }).await.expect("a grant");
            c.kv.put(PutRequest { lease: id, ..put("leased", "") }).await.expect("a put");
            c.lease.lease_time_to_live(LeaseTimeToLiveRequest { id, keys: true }).await.expect("an answer");
        }
        for id in [0, 1, i64::MIN + 1] {
            c.lease.lease_revoke(LeaseRevokeRequest { id }).await.expect_err("a refusal");
        }
        c.lease.lease_grant(LeaseGrantRequest { id: 7, ttl: 9_000_000_000 }).await.expect("a grant");
        c.kv.put(PutRequest { lease: 7, ..put("leased", "") }).await.expect("a put");
        let mut beats = c.lease.lease_keep_alive(tokio_stream::iter([LeaseKeepAliveRequest { id: 7 }])).await.expect("a stream").into_inner();
        assert_eq!(beats.message().await.expect("a beat").expect("a beat").ttl, 9_000_000_000);
        c.lease.lease_revoke(LeaseRevokeRequest { id: 7 }).await.expect("a revoke");
        // The others run out by themselves.
        while c.lease.lease_leases(LeaseLeasesRequest {}).await.expect("a list").get_ref().leases.iter().len() > 0 {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        "done".into()
    };

    /// Given up in the middle of the reading, which once made etcd panic.
    txn_given_up_while_it_runs: Expected { leaves: Some(ANYTHING), ..lives(&["done"]) }, async |mut c: Clients| {
        for i in 0..60 {
            c.kv.put(PutRequest { key: format!("big{i}").into(), value: blob(100_000), ..Default::default() }).await.expect("a put");
        }
        for millis in [1, 2, 4, 8, 16] {
            for write in [false, true] {
                let mut ops = vec![RangeRequest { serializable: true, ..everything() }.op(); 4];
                if write {
                    ops.push(put("x", "").op());
                }
                let mut request = Request::new(txn(ops));
                request.set_timeout(Duration::from_millis(millis));
                let _ = tokio::time::timeout(Duration::from_millis(millis), c.kv.txn(request)).await;
            }
        }
        "done".into()
    };

    requests_above_the_limits: lives(&["done"]), async |mut c: Clients| {
        let big = |size| PutRequest { key: "big".into(), value: blob(size), ..Default::default() };
        let status = c.kv.put(big(1_600_000)).await.expect_err("a refusal");
        assert_eq!((status.code(), status.message()), (tonic::Code::InvalidArgument, "etcdserver: request is too large"));
        for size in [2_100_000, 5_000_000, 50_000_000] {
            let status = c.kv.put(big(size)).await.expect_err("a refusal");
            assert_eq!(status.code(), tonic::Code::ResourceExhausted, "{size}: {status:?}");
        }
        "done".into()
    };

    /// Whatever stands in the headers, the request is answered.
    headers_that_mean_nothing: lives(&["done"]), async |mut c: Clients| {
        let headers = [("grpc-timeout", "x"), ("grpc-timeout", "99999999H"), ("grpc-encoding", "nope"), ("hasleader", "x"), ("token", "x"), ("client-api-version", "")];
        for (name, value) in headers {
            let mut request = Request::new(range("a", ""));
            request.metadata_mut().insert(name, value.parse().expect("a header value"));
            let _ = c.kv.range(request).await;
        }
        "done".into()
    };

    /// Each made a metric of its own in etcd, for ever.
    many_client_versions: not_tried(&["done"]), async |mut c: Clients| {
        for i in 0..3000 {
            let mut request = Request::new(range("a", ""));
            *request.metadata_mut() = client_version(format!("version-{i:0>200}").as_bytes());
            c.kv.range(request).await.expect("a range");
        }
        let metrics = raw::http_get(&c.url, "/metrics").expect("the metrics");
        assert!(metrics.matches("client_api_version").count() < 200, "a metric for each version: {} bytes", metrics.len());
        "done".into()
    };

    defragment_and_snapshot_and_writes_at_once: Expected { leaves: Some("count=0 more=false"), ..lives(&["done"]) }, async |mut c: Clients| {
        let mut other = c.clone();
        let snapshot = tokio::spawn(async move {
            let mut parts = other.maintenance.snapshot(SnapshotRequest {}).await.expect("a snapshot").into_inner();
            let mut size = 0;
            while let Some(part) = parts.message().await.expect("a part of the snapshot") {
                size += part.blob.len();
            }
            size
        });
        let mut other = c.clone();
        let defragment = tokio::spawn(async move { other.maintenance.defragment(DefragmentRequest {}).await.map(|_| ()) });
        for i in 0..20 {
            c.kv.put(put("a", &i.to_string())).await.expect("a put");
        }
        assert!(snapshot.await.expect("the snapshot ends") > 32);
        defragment.await.expect("the defragmentation ends").expect("an answer");
        c.kv.delete_range(delete("\0", "\0")).await.expect("a delete");
        "done".into()
    };
}

const UNARY: [&str; 15] = [
    "/etcdserverpb.KV/Range",
    "/etcdserverpb.KV/Put",
    "/etcdserverpb.KV/DeleteRange",
    "/etcdserverpb.KV/Txn",
    "/etcdserverpb.KV/Compact",
    "/etcdserverpb.Lease/LeaseGrant",
    "/etcdserverpb.Lease/LeaseRevoke",
    "/etcdserverpb.Lease/LeaseTimeToLive",
    "/etcdserverpb.Lease/LeaseLeases",
    "/etcdserverpb.Maintenance/Status",
    "/etcdserverpb.Maintenance/HashKV",
    "/etcdserverpb.Maintenance/Hash",
    "/etcdserverpb.Cluster/MemberList",
    "/etcdserverpb.Nothing/Nothing",
    "/nothing/Nothing",
];

/// Metadata as a client library sends its version in, with any bytes.
fn client_version(value: &[u8]) -> MetadataMap {
    let mut headers = http::HeaderMap::new();
    headers.insert("client-api-version", http::HeaderValue::from_bytes(value).expect("a header value"));
    MetadataMap::from_headers(headers)
}

/// The bytes of `depth` Txns, each in the `success` of the next, around a Range of one key.
fn nested_txn(depth: usize) -> Bytes {
    const TXN_SUCCESS: u8 = 2 << 3 | 2;
    const OP_RANGE: u8 = 1 << 3 | 2;
    const OP_TXN: u8 = 4 << 3 | 2;
    // From the inside out, the bytes in reverse order: RangeRequest { key: "a" }, then an operation and a Txn per level.
    let mut reversed: Vec<u8> = b"\x0a\x01a".iter().rev().copied().collect();
    let mut wrap = |tag: u8| {
        let mut length = BytesMut::new();
        prost::encoding::encode_varint(reversed.len() as u64, &mut length);
        reversed.extend(length.iter().rev());
        reversed.put_u8(tag);
    };
    wrap(OP_RANGE);
    for _ in 1..depth {
        wrap(TXN_SUCCESS);
        wrap(OP_TXN);
    }
    wrap(TXN_SUCCESS);
    reversed.reverse();
    reversed.into()
}
