//! What must hold of every client.

use std::collections::BTreeMap;

use futures_util::future::try_join_all;
use quorate::client::{EventKind, ListUpdate, Swap, WatchEvent, WatchMessage, Watcher, prefix_end};
use quorate::proto::etcdserverpb::range_request::{SortOrder, SortTarget};
use quorate::proto::etcdserverpb::request_op::Request;
use quorate::proto::etcdserverpb::response_op::Response;
use quorate::proto::etcdserverpb::watch_create_request::FilterType;
use quorate::proto::etcdserverpb::*;
use quorate::proto::{EncodedKv, KeyValue};
use quorate::{ApplyError, Client, Error, ErrorKind};

use crate::Store;
pub use crate::queues::*;

fn key_of(kv: &EncodedKv) -> String {
    String::from_utf8(kv.decode().unwrap().key.to_vec()).unwrap()
}

fn keys_of(answer: &RangeResponse) -> Vec<String> {
    answer.kvs.iter().map(key_of).collect()
}

fn revision(header: &Option<ResponseHeader>) -> i64 {
    header.as_ref().unwrap().revision
}

fn op(request: Request) -> RequestOp {
    RequestOp { request: Some(request) }
}

fn put_op(key: &str, value: &str) -> RequestOp {
    op(Request::RequestPut(PutRequest { key: key.to_owned().into(), value: value.to_owned().into(), ..Default::default() }))
}

fn range(key: &str, range_end: &str) -> RangeRequest {
    RangeRequest { key: key.to_owned().into(), range_end: range_end.to_owned().into(), ..Default::default() }
}

fn watch(prefix: &str, start_revision: i64) -> WatchCreateRequest {
    let range_end = prefix_end(prefix.as_bytes());
    WatchCreateRequest { key: prefix.to_owned().into(), range_end, start_revision, ..Default::default() }
}

/// That many events; bookmarks between them count for nothing.
async fn events(watcher: &mut Watcher, count: usize) -> Vec<WatchEvent> {
    let mut seen = Vec::new();
    while seen.len() < count {
        match watcher.next().await.unwrap().expect("the watch goes on") {
            WatchMessage::Events(events) => seen.extend(events),
            WatchMessage::Progress { .. } => {}
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(seen.len(), count, "{seen:?}");
    seen
}

fn kind<T: std::fmt::Debug>(outcome: quorate::Result<T>) -> ErrorKind {
    outcome.unwrap_err().kind()
}

pub async fn keys_are_put_read_and_deleted(store: &Store) {
    let client = &store.client;
    let first = revision(&client.put("a", "1").await.unwrap().header);
    let second = client.put_with(PutRequest { key: "a".into(), value: "2".into(), prev_kv: true, ..Default::default() }).await.unwrap();
    assert_eq!(second.prev_kv.unwrap().decode().unwrap().value, "1");
    let a = client.get("a").await.unwrap().unwrap();
    let expected = KeyValue { key: "a".into(), value: "2".into(), create_revision: first, mod_revision: first + 1, version: 2, lease: 0 };
    assert_eq!(a, expected);
    assert_eq!(client.get("b").await.unwrap(), None);
    assert!(client.delete("a").await.unwrap());
    assert!(!client.delete("a").await.unwrap());
    client.put("c/1", "1").await.unwrap();
    client.put("c/2", "2").await.unwrap();
    let request = DeleteRangeRequest { key: "c/".into(), range_end: "c0".into(), prev_kv: true };
    let deleted = client.delete_with(request).await.unwrap();
    assert_eq!((deleted.deleted, deleted.prev_kvs.iter().map(key_of).collect::<Vec<_>>()), (2, vec!["c/1".into(), "c/2".into()]));
    assert_eq!(client.revision(), revision(&deleted.header));
}

pub async fn ranges_have_all_their_options(store: &Store) {
    let client = &store.client;
    for (key, value) in [("k/1", "c"), ("k/2", "a"), ("k/3", "b"), ("z", "")] {
        client.put(key, value).await.unwrap();
    }
    let before = client.revision();
    client.put("k/1", "d").await.unwrap();
    client.delete("k/2").await.unwrap();
    let all = || range("k/", "k0");
    assert_eq!(keys_of(&client.range(all()).await.unwrap()), ["k/1", "k/3"]);
    let past = client.range(RangeRequest { revision: before, ..all() }).await.unwrap();
    assert_eq!(keys_of(&past), ["k/1", "k/2", "k/3"]);
    let limited = client.range(RangeRequest { revision: before, limit: 2, ..all() }).await.unwrap();
    assert_eq!((keys_of(&limited), limited.more, limited.count), (vec!["k/1".into(), "k/2".into()], true, 3));
    let by_value = RangeRequest { sort_target: SortTarget::Value as i32, sort_order: SortOrder::Descend as i32, revision: before, ..all() };
    assert_eq!(keys_of(&client.range(by_value).await.unwrap()), ["k/1", "k/3", "k/2"]);
    let counted = client.range(RangeRequest { count_only: true, ..all() }).await.unwrap();
    assert_eq!((counted.count, counted.kvs.len()), (2, 0));
    let bare = client.range(RangeRequest { keys_only: true, ..all() }).await.unwrap();
    assert!(bare.kvs.iter().all(|kv| kv.decode().unwrap().value.is_empty()) && bare.kvs.len() == 2);
    let local = client.range(RangeRequest { serializable: true, ..range("k/1", "") }).await.unwrap();
    assert_eq!(local.kvs[0].decode().unwrap().value, "d");
    assert_eq!(keys_of(&client.range(range("k/3", "\0")).await.unwrap()), ["k/3", "z"]);
    let changed = client.range(RangeRequest { min_mod_revision: before + 1, ..all() }).await.unwrap();
    assert_eq!(keys_of(&changed), ["k/1"]);
    assert_eq!(kind(client.range(RangeRequest { revision: before + 1000, ..all() }).await), ErrorKind::FutureRevision);
    assert_eq!(kind(client.range(range("", "")).await), ErrorKind::InvalidRequest);
}

pub async fn txns_are_whole(store: &Store) {
    let client = &store.client;
    let inner = TxnRequest {
        compare: vec![Compare::create_revision_is("none", 0)],
        success: vec![put_op("inner", "yes")],
        failure: vec![put_op("inner", "no")],
    };
    let txn = TxnRequest {
        compare: vec![Compare::create_revision_is("a", 0)],
        success: vec![put_op("a", "1"), put_op("b", "1"), op(Request::RequestRange(range("b", ""))), op(Request::RequestTxn(inner))],
        failure: vec![op(Request::RequestRange(range("a", "c")))],
    };
    let done = client.txn(txn.clone()).await.unwrap();
    assert!(done.succeeded);
    let Some(Response::ResponseRange(found)) = &done.responses[2].response else { panic!("{done:?}") };
    assert_eq!(keys_of(found), ["b"]);
    assert!(matches!(&done.responses[3].response, Some(Response::ResponseTxn(inner)) if inner.succeeded));
    let of_one_revision = client.get("inner").await.unwrap().unwrap();
    assert_eq!((of_one_revision.value, of_one_revision.mod_revision), ("yes".into(), revision(&done.header)));
    let again = client.txn(txn).await.unwrap();
    assert!(!again.succeeded);
    assert!(matches!(&again.responses[0].response, Some(Response::ResponseRange(found)) if found.count == 2));
    let twice = TxnRequest { success: vec![put_op("c", "1"), put_op("c", "2")], ..Default::default() };
    let refused = client.txn(twice).await.unwrap_err();
    assert!(matches!(refused, Error::Apply(ApplyError::DuplicateKey)), "{refused}");
    assert_eq!(client.get("c").await.unwrap(), None);
    let reads = TxnRequest { success: vec![op(Request::RequestRange(range("a", "")))], ..Default::default() };
    assert_eq!(revision(&client.txn(reads).await.unwrap().header), revision(&done.header), "a read makes no revision");
}

pub async fn swaps_have_their_conditions(store: &Store) {
    let client = &store.client;
    let Swap::Done { revision: created } = client.create("a", "1").await.unwrap() else { panic!("it was not there") };
    let Swap::Differs { current: Some(kv) } = client.create("a", "2").await.unwrap() else { panic!("it was there") };
    assert_eq!((&kv.value[..], kv.mod_revision), (&b"1"[..], created));
    let Swap::Done { revision: swapped } = client.compare_and_swap("a", created, "2").await.unwrap() else { panic!("it was as read") };
    assert!(matches!(client.compare_and_swap("a", created, "3").await.unwrap(), Swap::Differs { current: Some(kv) } if kv.value == "2"));
    assert!(!client.compare_and_delete("a", created).await.unwrap().is_done());
    assert!(client.compare_and_delete("a", swapped).await.unwrap().is_done());
    assert_eq!(client.compare_and_swap("a", swapped, "3").await.unwrap(), Swap::Differs { current: None });
    // Of many who would create it, one does.
    let made = try_join_all((0..16).map(|number| client.create("one", number.to_string()))).await.unwrap();
    assert_eq!(made.iter().filter(|made| made.is_done()).count(), 1);
    // Of many who count, each counts once.
    let count = async |client: &Client| {
        loop {
            let now = client.get("count").await.unwrap();
            let (revision, count) =
                now.map_or((0, 0), |kv| (kv.mod_revision, std::str::from_utf8(&kv.value).unwrap().parse::<u32>().unwrap()));
            if client.compare_and_swap("count", revision, (count + 1).to_string()).await.unwrap().is_done() {
                return;
            }
        }
    };
    futures_util::future::join_all((0..8).map(|_| count(client))).await;
    assert_eq!(client.get("count").await.unwrap().unwrap().value, "8");
}

pub async fn pages_and_lists_are_of_one_revision(store: &Store) {
    let client = &store.client;
    let key = |number: u32| format!("p/{number:03}");
    try_join_all((0..50).map(|number| client.put(key(number), "old"))).await.unwrap();
    client.put("q", "x").await.unwrap();
    let at = client.revision();
    let mut pages = client.pages(RangeRequest { limit: 7, ..range("p/", "p0") }).unwrap();
    let mut seen = pages.next().await.unwrap().unwrap();
    assert_eq!((seen.len(), pages.revision()), (7, at));
    // What happens meanwhile is of no account.
    client.put(key(40), "new").await.unwrap();
    client.delete(key(41)).await.unwrap();
    client.put("p/0001", "between").await.unwrap();
    let mut count = 1;
    while let Some(page) = pages.next().await.unwrap() {
        assert!(page.len() <= 7);
        seen.extend(page);
        count += 1;
    }
    assert_eq!((count, pages.next().await.unwrap()), (8, None));
    assert_eq!(
        seen.iter().map(|kv| kv.key.clone()).collect::<Vec<_>>(),
        (0..50).map(|number| key(number).into()).collect::<Vec<bytes::Bytes>>()
    );
    assert!(seen.iter().all(|kv| kv.value == "old"));

    let listing = client.list("p/").await.unwrap();
    assert_eq!((listing.revision, listing.kvs.len()), (client.revision(), 50));
    assert_eq!(client.list("").await.unwrap().kvs.len(), 51);
    assert_eq!(client.list("none").await.unwrap().kvs, []);
    let sorted = RangeRequest { sort_target: SortTarget::Mod as i32, ..range("p/", "p0") };
    assert!(matches!(client.pages(sorted), Err(Error::Config(_))));
    // More keys than a page has.
    for chunk in 0..12 {
        let success = (0..100).map(|number| put_op(&format!("many/{chunk:02}{number:02}"), "x")).collect();
        client.txn(TxnRequest { success, ..Default::default() }).await.unwrap();
    }
    assert_eq!(client.list("many/").await.unwrap().kvs.len(), 1200);
}

pub async fn history_is_compacted(store: &Store) {
    let client = &store.client;
    for value in ["1", "2", "3"] {
        client.put("a", value).await.unwrap();
    }
    let newest = client.revision();
    client.compact(newest - 1).await.unwrap();
    let past = client.range(RangeRequest { revision: newest - 2, ..range("a", "") }).await;
    assert_eq!(kind(past), ErrorKind::Compacted);
    assert_eq!(client.range(RangeRequest { revision: newest - 1, ..range("a", "") }).await.unwrap().kvs[0].decode().unwrap().value, "2");
    assert_eq!(kind(client.compact(newest - 1).await), ErrorKind::Compacted);
    assert_eq!(kind(client.compact(newest + 1).await), ErrorKind::FutureRevision);
    client.compact_with(CompactionRequest { revision: newest, physical: true }).await.unwrap();
    client.defragment().await.unwrap();
    assert_eq!(client.get("a").await.unwrap().unwrap().value, "3");
    let mut pages = client.pages(RangeRequest { revision: newest - 1, ..range("a", "b") }).unwrap();
    assert_eq!(kind(pages.next().await), ErrorKind::Compacted);
}

pub async fn a_watch_tells_past_and_present(store: &Store) {
    let client = &store.client;
    client.put("k/1", "a").await.unwrap();
    let from = client.revision();
    client.put("k/1", "b").await.unwrap();
    let mut watcher = client.watch(WatchCreateRequest { prev_kv: true, ..watch("k/", from) }).unwrap();
    assert_eq!(watcher.started().await.unwrap(), from);
    client.put("other", "x").await.unwrap();
    client.delete("k/1").await.unwrap();
    client.txn(TxnRequest { success: vec![put_op("k/2", "c"), put_op("k/3", "d")], ..Default::default() }).await.unwrap();
    let seen = events(&mut watcher, 5).await;
    let brief: Vec<_> = seen
        .iter()
        .map(|event| (event.kind, event.kv.mod_revision - from, event.prev_kv.as_ref().map(|kv| kv.mod_revision - from)))
        .collect();
    let put = EventKind::Put;
    assert_eq!(brief, [(put, 0, None), (put, 1, Some(0)), (EventKind::Delete, 3, Some(1)), (put, 4, None), (put, 4, None)]);

    // From now on.
    let mut now = client.watch(WatchCreateRequest { key: "one".into(), ..Default::default() }).unwrap();
    let start = now.started().await.unwrap();
    assert_eq!(start, client.revision() + 1);
    client.put("one", "1").await.unwrap();
    client.put("two", "2").await.unwrap();
    client.put("one", "3").await.unwrap();
    let seen = events(&mut now, 2).await;
    assert_eq!((seen[0].kv.mod_revision, seen[1].kv.mod_revision), (start, start + 2));

    // From a revision that is still to come.
    let next = client.revision() + 2;
    let mut later = client.watch(WatchCreateRequest { key: "one".into(), start_revision: next, ..Default::default() }).unwrap();
    later.started().await.unwrap();
    client.put("one", "4").await.unwrap();
    client.put("one", "5").await.unwrap();
    assert_eq!(events(&mut later, 1).await[0].kv.value, "5");
}

pub async fn a_watch_filters_and_bookmarks(store: &Store) {
    let client = &store.client;
    client.put("k", "1").await.unwrap();
    let from = client.revision();
    let filtered = |filter: FilterType| WatchCreateRequest { filters: vec![filter as i32], ..watch("k", from) };
    let mut deletes = client.watch(filtered(FilterType::Noput)).unwrap();
    let mut puts = client.watch(filtered(FilterType::Nodelete)).unwrap();
    client.delete("k").await.unwrap();
    client.put("k", "2").await.unwrap();
    assert_eq!(events(&mut deletes, 1).await[0].kind, EventKind::Delete);
    assert!(events(&mut puts, 2).await.iter().all(|event| event.kind == EventKind::Put));
    // While it catches up, there may be no answer.
    client.put("elsewhere", "3").await.unwrap();
    let newest = client.revision();
    loop {
        puts.request_progress();
        let wait = tokio::time::timeout(std::time::Duration::from_millis(200), puts.next());
        match wait.await {
            Ok(Ok(Some(WatchMessage::Progress { revision }))) if revision >= newest => break,
            Ok(Ok(Some(WatchMessage::Progress { .. }))) | Err(_) => {}
            other => panic!("{other:?}"),
        }
    }
    client.put("k", "4").await.unwrap();
    assert_eq!(events(&mut puts, 1).await[0].kv.value, "4");
}

/// More than a message of the wire has: it comes in fragments, and is told as one.
pub async fn a_large_revision_comes_whole(store: &Store) {
    let client = &store.client;
    let start = client.revision() + 1;
    let mut watcher = client.watch(WatchCreateRequest { prev_kv: true, ..watch("large/", start.max(1)) }).unwrap();
    let text = |round: usize| round.to_string().repeat(70 << 10);
    for round in 0..3 {
        let success = (0..20).map(|number| put_op(&format!("large/{number:02}"), &text(round))).collect();
        client.txn(TxnRequest { success, ..Default::default() }).await.unwrap();
    }
    let mut revisions = Vec::new();
    let mut count = 0;
    while count < 60 {
        let Some(WatchMessage::Events(events)) = watcher.next().await.unwrap() else { continue };
        let mut parts: BTreeMap<i64, usize> = BTreeMap::new();
        for event in &events {
            *parts.entry(event.kv.mod_revision).or_default() += 1;
        }
        assert!(parts.values().all(|&part| part == 20), "a revision was split: {parts:?}");
        revisions.extend(parts.keys().copied());
        let round = revisions.len() - 1;
        let last = events.last().unwrap();
        assert_eq!(last.kv.value, text(round));
        assert_eq!(last.prev_kv.as_ref().map(|kv| kv.value.clone()), round.checked_sub(1).map(|before| text(before).into()));
        count += events.len();
    }
    assert!(revisions.is_sorted_by(|a, b| a < b) && revisions.len() == 3, "{revisions:?}");
}

pub async fn a_watch_without_history_says_so(store: &Store) {
    let client = &store.client;
    client.put("k", "1").await.unwrap();
    let from = client.revision();
    client.put("k", "2").await.unwrap();
    client.put("k", "3").await.unwrap();
    client.compact(from + 2).await.unwrap();
    let mut late = client.watch(watch("k", from)).unwrap();
    assert_eq!(late.next().await.unwrap(), Some(WatchMessage::Compacted { revision: from + 2 }));
    assert_eq!(late.next().await.unwrap(), None);
    let mut edge = client.watch(watch("k", from + 2)).unwrap();
    assert_eq!(events(&mut edge, 1).await[0].kv.value, "3");
}

pub async fn a_list_is_followed(store: &Store) {
    let client = &store.client;
    for number in 0..5 {
        client.put(format!("f/{number}"), "1").await.unwrap();
    }
    let mut updates = client.list_then_watch("f/");
    let ListUpdate::Snapshot(listing) = updates.next().await.unwrap() else { panic!("the listing comes first") };
    let mut known: BTreeMap<_, _> = listing.kvs.into_iter().map(|kv| (kv.key, kv.value)).collect();
    assert_eq!(known.len(), 5);
    client.put("f/5", "2").await.unwrap();
    client.delete("f/0").await.unwrap();
    client.put("f/1", "3").await.unwrap();
    let last = client.revision();
    let mut seen = 0;
    while seen < last {
        let ListUpdate::Events(events) = updates.next().await.unwrap() else { continue };
        for event in events {
            seen = event.kv.mod_revision;
            match event.kind {
                EventKind::Put => known.insert(event.kv.key, event.kv.value),
                EventKind::Delete => known.remove(&event.kv.key),
            };
        }
    }
    let now: BTreeMap<_, _> = client.list("f/").await.unwrap().kvs.into_iter().map(|kv| (kv.key, kv.value)).collect();
    assert_eq!(known, now);
}

pub async fn what_makes_no_sense_is_refused(store: &Store) {
    let client = &store.client;
    assert_eq!(kind(client.put("", "1").await), ErrorKind::InvalidRequest);
    assert_eq!(kind(client.delete("").await), ErrorKind::InvalidRequest);
    assert_eq!(kind(client.put("k", vec![0; 2 << 20]).await), ErrorKind::InvalidRequest);
    assert_eq!(
        kind(client.put_with(PutRequest { key: "k".into(), ignore_value: true, ..Default::default() }).await),
        ErrorKind::KeyNotFound
    );
    assert_eq!(kind(client.put_with(PutRequest { key: "k".into(), lease: 77, ..Default::default() }).await), ErrorKind::LeaseNotFound);
    assert_eq!(kind(client.lease_grant(0, 9_000_000_001).await), ErrorKind::InvalidRequest);
    let many = TxnRequest { success: (0..129).map(|number| put_op(&format!("{number}"), "")).collect(), ..Default::default() };
    assert_eq!(kind(client.txn(many).await), ErrorKind::InvalidRequest);
    let backwards = WatchCreateRequest { key: "b".into(), range_end: "a".into(), ..Default::default() };
    let refused = client.watch(backwards.clone()).unwrap().next().await.unwrap_err();
    assert!(matches!(refused, Error::Config(_)), "{refused}");
    assert!(matches!(client.watch(backwards).unwrap().started().await, Err(Error::Config(_))));
    assert_eq!(client.list("").await.unwrap().revision, 1, "nothing was done");
}

pub async fn leases_come_and_go(store: &Store) {
    let client = &store.client;
    let lease = client.lease_grant(0, 100).await.unwrap();
    assert_eq!(lease.ttl, 100);
    let short = client.lease_grant(4711, 50).await.unwrap();
    assert_eq!(short.id, 4711);
    assert_eq!(kind(client.lease_grant(4711, 50).await), ErrorKind::LeaseExists);
    for key in ["b", "a"] {
        client.put_with(PutRequest { key: key.into(), lease: lease.id, ..Default::default() }).await.unwrap();
    }
    let left = client.lease_time_to_live(lease.id).await.unwrap().unwrap();
    assert_eq!((left.granted, left.keys), (100, vec!["a".into(), "b".into()]));
    assert!((90..=100).contains(&left.remaining), "{}", left.remaining);
    assert_eq!(client.lease_keep_alive(lease.id).await.unwrap(), 100);
    let mut all = client.leases().await.unwrap();
    all.sort_unstable();
    let mut expected = vec![4711, lease.id];
    expected.sort_unstable();
    assert_eq!(all, expected);
    client.lease_revoke(lease.id).await.unwrap();
    assert_eq!(client.get("a").await.unwrap(), None);
    assert_eq!(client.lease_time_to_live(lease.id).await.unwrap(), None);
    assert_eq!(kind(client.lease_keep_alive(lease.id).await), ErrorKind::LeaseNotFound);
    assert_eq!(kind(client.lease_revoke(lease.id).await), ErrorKind::LeaseNotFound);
    // One that nobody keeps alive takes its keys with it.
    let short = client.lease_grant(0, 2).await.unwrap().id;
    client.put_with(PutRequest { key: "c".into(), lease: short, ..Default::default() }).await.unwrap();
    let mut watcher = client.watch(watch("c", client.revision() + 1)).unwrap();
    assert_eq!(events(&mut watcher, 1).await[0].kind, EventKind::Delete);
}

pub async fn a_session_lasts_and_is_lost(store: &Store) {
    let client = &store.client;
    let session = client.session(12).await.unwrap();
    client.put_with(PutRequest { key: "mine".into(), lease: session.lease(), ..Default::default() }).await.unwrap();
    // Longer than the TTL.
    tokio::time::sleep(std::time::Duration::from_secs(15)).await;
    assert!(!session.is_lost());
    assert!(client.get("mine").await.unwrap().is_some());
    // Somebody takes the lease away: the next renewal finds out.
    client.lease_revoke(session.lease()).await.unwrap();
    session.lost().await;
    assert!(session.is_lost());
    assert!(matches!(session.lock("l").await, Err(Error::SessionLost)));
    session.close().await.unwrap();

    let session = client.session(60).await.unwrap();
    client.put_with(PutRequest { key: "mine".into(), lease: session.lease(), ..Default::default() }).await.unwrap();
    let clone = session.clone();
    session.close().await.unwrap();
    assert!(clone.is_lost());
    assert_eq!(client.get("mine").await.unwrap(), None);
    assert_eq!(kind(client.session_of(clone.lease()).await), ErrorKind::LeaseNotFound);
    let lease = client.lease_grant(0, 30).await.unwrap().id;
    assert_eq!(client.session_of(lease).await.unwrap().lease(), lease);
}

pub async fn locks_exclude(store: &Store) {
    let client = &store.client;
    let sessions = try_join_all((0..4).map(|_| client.session(30))).await.unwrap();
    let held = sessions[0].lock("l").await.unwrap();
    assert_eq!(held.key(), &format!("l/{:x}", sessions[0].lease()));
    assert!(sessions[1].try_lock("l").await.unwrap().is_none());
    assert!(sessions[1].try_lock("other").await.unwrap().is_some());
    assert_eq!(client.list("l/").await.unwrap().kvs.len(), 1, "who has tried in vain leaves nothing behind");
    // Those who wait have it one after the other, each with a higher revision.
    let inside = std::cell::Cell::new(false);
    let turn = async |number: usize| {
        let lock = sessions[number].lock("l").await.unwrap();
        assert!(!inside.replace(true), "two hold it");
        for _ in 0..5 {
            client.put("step", number.to_string()).await.unwrap();
        }
        let write = TxnRequest { compare: vec![lock.is_held()], success: vec![put_op("fenced", "x")], ..Default::default() };
        assert!(client.txn(write).await.unwrap().succeeded);
        inside.set(false);
        let revision = lock.revision();
        lock.unlock().await.unwrap();
        revision
    };
    let first = held.revision();
    let fence = held.is_held();
    let (revisions, ()) = futures_util::join!(futures_util::future::join_all([turn(1), turn(2), turn(3)]), async {
        while client.list("l/").await.unwrap().kvs.len() < 4 {}
        held.unlock().await.unwrap();
    });
    assert!(revisions.iter().all(|&revision| revision > first));
    let late = TxnRequest { compare: vec![fence], success: vec![put_op("fenced", "y")], ..Default::default() };
    assert!(!client.txn(late).await.unwrap().succeeded, "who does not hold it any more writes nothing");
    // Dropped is given up; and who stops waiting is not waited for.
    let held = sessions[0].lock("l").await.unwrap();
    {
        let mut waiting = std::pin::pin!(sessions[1].lock("l"));
        while client.list("l/").await.unwrap().kvs.len() < 2 {
            let _ = futures_util::poll!(waiting.as_mut());
        }
        // Until it knows that it has a place.
        let mut turns = 0;
        while turns < 20 {
            let _ = tokio::time::timeout(std::time::Duration::from_millis(10), waiting.as_mut()).await;
            turns += 1;
        }
    }
    drop(held);
    let lock = sessions[2].lock("l").await.unwrap();
    // A holder whose lease is taken away is out, and the next is in.
    let (next, ()) = futures_util::join!(sessions[3].lock("l"), async {
        while client.list("l/").await.unwrap().kvs.len() < 2 {}
        client.lease_revoke(sessions[2].lease()).await.unwrap();
    });
    assert!(next.unwrap().revision() > lock.revision());
}

pub async fn elections_are_won_one_after_the_other(store: &Store) {
    let client = &store.client;
    let (one, two) = (client.session(30).await.unwrap(), client.session(30).await.unwrap());
    assert_eq!(client.leader_of("e").await.unwrap(), None);
    let mut observer = client.observe("e");
    let lead = one.election("e").campaign("one").await.unwrap();
    assert_eq!(observer.next().await.unwrap().value, "one");
    lead.proclaim("one, still").await.unwrap();
    assert_eq!(observer.next().await.unwrap().value, "one, still");
    assert_eq!(client.leader_of("e").await.unwrap().unwrap().key, lead.key());
    let first = lead.revision();
    let election = two.election("e");
    let (next, ()) = futures_util::join!(election.campaign("two"), async {
        while client.list("e/").await.unwrap().kvs.len() < 2 {}
        assert_eq!(client.leader_of("e").await.unwrap().unwrap().value, "one, still");
        lead.resign().await.unwrap();
    });
    let next = next.unwrap();
    assert!(next.revision() > first);
    assert_eq!(observer.next().await.unwrap().value, "two");
    // The lead goes with the session.
    two.close().await.unwrap();
    assert!(matches!(next.proclaim("two, still").await, Err(Error::SessionLost)));
    assert_eq!(client.leader_of("e").await.unwrap(), None);
}

pub async fn a_namespace_is_the_whole(store: &Store) {
    let client = &store.client;
    let inside = client.namespaced("n/");
    client.put("k", "outside").await.unwrap();
    client.put("n0", "behind").await.unwrap();
    let start = client.revision() + 1;
    let mut watcher = inside.watch(WatchCreateRequest { prev_kv: true, ..watch("", start) }).unwrap();
    inside.put("k", "1").await.unwrap();
    let put = PutRequest { key: "k".into(), value: "2".into(), prev_kv: true, ..Default::default() };
    assert_eq!(inside.put_with(put).await.unwrap().prev_kv.unwrap().decode().unwrap().key, "k");
    inside.put("m", "3").await.unwrap();
    let seen = events(&mut watcher, 3).await;
    assert_eq!((&seen[1].kv.key[..], &seen[1].prev_kv.as_ref().unwrap().key[..]), (&b"k"[..], &b"k"[..]));
    assert_eq!(keys_of(&inside.range(range("\0", "\0")).await.unwrap()), ["k", "m"]);
    assert_eq!(keys_of(&client.range(range("n/", "n0")).await.unwrap()), ["n/k", "n/m"]);
    assert_eq!(inside.list("").await.unwrap().kvs.len(), 2);
    assert_eq!(kind(inside.put("", "1").await), ErrorKind::InvalidRequest);
    let nested = TxnRequest {
        compare: vec![Compare::create_revision_is("k", 0)],
        failure: vec![op(Request::RequestTxn(TxnRequest {
            success: vec![
                op(Request::RequestRange(range("k", "l"))),
                op(Request::RequestDeleteRange(DeleteRangeRequest { key: "m".into(), prev_kv: true, ..Default::default() })),
                put_op("o", "4"),
            ],
            ..Default::default()
        }))],
        ..Default::default()
    };
    let answer = inside.txn(nested).await.unwrap();
    let Some(Response::ResponseTxn(answer)) = &answer.responses[0].response else { panic!("{answer:?}") };
    assert!(matches!(&answer.responses[0].response, Some(Response::ResponseRange(found)) if keys_of(found) == ["k"]));
    assert!(matches!(&answer.responses[1].response, Some(Response::ResponseDeleteRange(gone)) if key_of(&gone.prev_kvs[0]) == "m"));
    assert_eq!(client.get("n/o").await.unwrap().unwrap().value, "4");
    assert_eq!(client.get("k").await.unwrap().unwrap().value, "outside");
    let session = inside.session(30).await.unwrap();
    let lock = session.lock("l").await.unwrap();
    assert_eq!(lock.key(), &format!("l/{:x}", session.lease()));
    assert_eq!(client.list("n/l/").await.unwrap().kvs.len(), 1);
    assert_eq!(inside.lease_time_to_live(session.lease()).await.unwrap().unwrap().keys, [lock.key().clone()]);
    assert!(inside.namespaced("deep/").create("k", "5").await.unwrap().is_done());
    assert_eq!(client.get("n/deep/k").await.unwrap().unwrap().value, "5");
    assert_eq!(
        inside.delete_with(DeleteRangeRequest { key: "\0".into(), range_end: "\0".into(), ..Default::default() }).await.unwrap().deleted,
        4
    );
    assert_eq!(client.list("").await.unwrap().kvs.len(), 2);
}

pub async fn members_tell_of_themselves(store: &Store) {
    let client = &store.client;
    client.put("a", "1").await.unwrap();
    let members = client.member_list().await.unwrap();
    assert_eq!((members.len(), client.last_members().len()), (1, 1));
    let status = client.member_status().await.unwrap();
    assert_eq!((status.leader, revision(&status.header), status.is_learner), (members[0].id, client.revision(), false));
    assert!(status.raft_applied_index > 0 && status.db_size > 0 && !status.version.is_empty());
    assert_eq!(client.last_status().leader, status.leader);
    let hash = client.hash_kv(0).await.unwrap();
    assert_eq!((hash.hash, hash.compact_revision), (client.hash_kv(client.revision()).await.unwrap().hash, -1));
    assert_eq!(kind(client.hash_kv(client.revision() + 5).await), ErrorKind::FutureRevision);
}

pub async fn alarms_stop_writes(store: &Store) {
    let client = &store.client;
    client.put("a", "1").await.unwrap();
    let member_id = client.member_status().await.unwrap().leader;
    assert_eq!(client.alarm_list().await.unwrap(), []);
    let alarm = AlarmMember { member_id, alarm: AlarmType::Nospace as i32 };
    client.alarm(AlarmRequest { action: 1, member_id, alarm: alarm.alarm }).await.unwrap();
    assert_eq!((client.alarm_list().await.unwrap(), client.last_alarms()), (vec![alarm], vec![alarm]));
    assert_eq!(kind(client.put("b", "1").await), ErrorKind::NoSpace);
    assert_eq!(kind(client.lease_grant(0, 10).await), ErrorKind::NoSpace);
    assert!(client.delete("a").await.unwrap());
    assert_eq!(client.alarm_disarm(AlarmMember::default()).await.unwrap(), [alarm]);
    client.put("b", "1").await.unwrap();
}

pub async fn backups_are_streamed(store: &Store) {
    let client = &store.client;
    for number in 0..20 {
        client.put(format!("large/{number}"), vec![number; 100 << 10]).await.unwrap();
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("backup");
    let written = client.backup_to(&mut std::fs::File::create(&path).unwrap()).await.unwrap();
    assert!(written > 20 * (100 << 10));
    if !store.is_etcd {
        assert_eq!(quorate::snapshot::verify(&path).unwrap().records, 20);
    }
}
