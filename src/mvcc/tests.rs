//! Golden scripts of requests (`tests/scripts/txn`) and of watches (`tests/scripts/watch`), whose commands the README.txt
//! beside them explains; the store beside its [model]; and watches beside a writer that does not wait for them.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::sync::atomic::{AtomicBool, Ordering};

use proptest::prelude::*;

use super::model::both::{collect, on_the_wire, poll};
use super::range::{HOLD_BYTES, RangeScan};
use super::watch::{Batch, Limits, NO_WATCH, Session, WatchAnswer, WatchHub};
use super::*;
use crate::proto::etcdserverpb::compare::TargetUnion;
use crate::proto::etcdserverpb::request_op::Request;
use crate::proto::etcdserverpb::response_op::Response;
use crate::proto::etcdserverpb::{
    Compare, DeleteRangeRequest, DeleteRangeResponse, PutRequest, PutResponse, RangeRequest, RangeResponse, RequestOp, ResponseHeader,
    TxnRequest, TxnResponse, WatchCreateRequest,
};
use crate::proto::mvccpb::event::EventType;
use crate::storage::mem::Mem;

// ---- Reading commands

/// The words of a command, with `;` as a word of its own.
struct Words<'a>(std::iter::Peekable<std::vec::IntoIter<&'a str>>);

impl<'a> Words<'a> {
    fn new(words: &[&'a str]) -> Self {
        let apart = |word: &&'a str| match word.strip_suffix(';') {
            Some(word) => vec![word, ";"],
            None => vec![*word],
        };
        Words(words.iter().flat_map(apart).collect::<Vec<_>>().into_iter().peekable())
    }

    fn take(&mut self, word: &str) -> bool {
        self.0.next_if_eq(&word).is_some()
    }

    fn next(&mut self) -> &'a str {
        self.0.next().expect("the command goes on")
    }

    /// The words up to where an operation ends.
    fn options(&mut self) -> Vec<&'a str> {
        let mut options = Vec::new();
        while let Some(word) = self.0.next_if(|word| ![";", "else", "}"].contains(word)) {
            options.push(word);
        }
        options
    }
}

/// `""` is nothing, `\0` and `\xff` are those bytes, and `v*300` is 300 times v.
fn bytes(text: &str) -> Bytes {
    if let Some((byte, times)) = text.split_once('*') {
        return byte.repeat(times.parse().unwrap()).into();
    }
    let text = text.trim_matches('"');
    let mut bytes = Vec::new();
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        let (byte, len) = match rest {
            _ if rest.starts_with("\\0") => (0, 2),
            _ if rest.starts_with("\\x") => (u8::from_str_radix(&rest[2..4], 16).unwrap(), 4),
            _ => (u8::try_from(first).unwrap(), 1),
        };
        bytes.push(byte);
        rest = &rest[len..];
    }
    bytes.into()
}

/// `a` is one key, `a..c` ends before c, and `a..` has no end.
fn key_range(text: &str) -> (Bytes, Bytes) {
    match text.split_once("..") {
        None => (bytes(text), Bytes::new()),
        Some((start, "")) => (bytes(start), Bytes::from_static(b"\0")),
        Some((start, end)) => (bytes(start), bytes(end)),
    }
}

fn number(text: &str) -> i64 {
    text.parse().unwrap_or_else(|_| panic!("{text} is no number"))
}

fn parse_put(words: &mut Words<'_>) -> PutRequest {
    let what = words.next();
    let (key, value) = what.split_once('=').unwrap_or((what, ""));
    let mut put = PutRequest { key: bytes(key), value: bytes(value), ..PutRequest::default() };
    for option in words.options() {
        match option.split_once('=').unwrap_or((option, "")) {
            ("lease", id) => put.lease = number(id),
            ("prev", _) => put.prev_kv = true,
            ("ignore-value", _) => put.ignore_value = true,
            ("ignore-lease", _) => put.ignore_lease = true,
            _ => panic!("put has no option {option}"),
        }
    }
    put
}

fn parse_delete(words: &mut Words<'_>) -> DeleteRangeRequest {
    let (key, range_end) = key_range(words.next());
    let options = words.options();
    assert!(options.is_empty() || options == ["prev"], "delete has no options {options:?}");
    DeleteRangeRequest { key, range_end, prev_kv: !options.is_empty() }
}

fn parse_get(words: &mut Words<'_>) -> RangeRequest {
    let (key, range_end) = key_range(words.next());
    let mut get = RangeRequest { key, range_end, ..RangeRequest::default() };
    for option in words.options() {
        match option.split_once('=').unwrap_or((option, "")) {
            ("limit", limit) => get.limit = number(limit),
            ("rev", revision) => get.revision = number(revision),
            ("keys-only", _) => get.keys_only = true,
            ("count-only", _) => get.count_only = true,
            ("min-mod", revision) => get.min_mod_revision = number(revision),
            ("max-mod", revision) => get.max_mod_revision = number(revision),
            ("min-created", revision) => get.min_create_revision = number(revision),
            ("max-created", revision) => get.max_create_revision = number(revision),
            ("sort", sort) => {
                let (order, target) = sort.split_once(':').unwrap_or(("none", sort));
                let names = ["none", "asc", "desc"];
                get.sort_order = names.iter().position(|name| *name == order).map_or_else(|| number(order) as i32, |at| at as i32);
                let names = ["key", "version", "created", "modified", "value"];
                get.sort_target = names.iter().position(|name| *name == target).map_or_else(|| number(target) as i32, |at| at as i32);
            }
            _ => panic!("get has no option {option}"),
        }
    }
    get
}

/// `version(a)>0`, `value(a..c)=x`, `created(a)!=2`, `modified(a)<3`, `lease(a)=7`.
fn parse_compare(text: &str) -> Compare {
    let (target, rest) = text.split_once('(').unwrap();
    let (keys, rest) = rest.split_once(')').unwrap();
    let (key, range_end) = key_range(keys);
    let (result, wanted) = match rest.strip_prefix("!=") {
        Some(wanted) => (3, wanted),
        None => (["=", ">", "<"].iter().position(|sign| rest.starts_with(sign)).unwrap() as i32, &rest[1..]),
    };
    let (target, target_union) = match target {
        "version" => (0, TargetUnion::Version(number(wanted))),
        "created" => (1, TargetUnion::CreateRevision(number(wanted))),
        "modified" => (2, TargetUnion::ModRevision(number(wanted))),
        "value" => (3, TargetUnion::Value(bytes(wanted))),
        "lease" => (4, TargetUnion::Lease(number(wanted))),
        "unheard-of" => (9, TargetUnion::Version(number(wanted))),
        _ => panic!("nothing to compare: {text}"),
    };
    Compare { result, target, key, range_end, target_union: Some(target_union) }
}

/// `[if COMPARE and COMPARE] [then OP; OP] [else OP; OP]`
fn parse_txn(words: &mut Words<'_>) -> TxnRequest {
    let mut txn = TxnRequest::default();
    if words.take("if") {
        txn.compare.push(parse_compare(words.next()));
        while words.take("and") {
            txn.compare.push(parse_compare(words.next()));
        }
    }
    if words.take("then") {
        txn.success = parse_ops(words);
    }
    if words.take("else") {
        txn.failure = parse_ops(words);
    }
    txn
}

fn parse_ops(words: &mut Words<'_>) -> Vec<RequestOp> {
    let mut ops = Vec::new();
    loop {
        let request = match words.next() {
            "put" => Some(Request::RequestPut(parse_put(words))),
            "delete" => Some(Request::RequestDeleteRange(parse_delete(words))),
            "get" => Some(Request::RequestRange(parse_get(words))),
            "nothing" => None,
            "{" => {
                let txn = parse_txn(words);
                assert!(words.take("}"), "a nested txn ends with }}");
                Some(Request::RequestTxn(txn))
            }
            other => panic!("a txn cannot {other}"),
        };
        ops.push(RequestOp { request });
        if !words.take(";") {
            return ops;
        }
    }
}

fn parse_watch(words: &mut Words<'_>) -> WatchCreateRequest {
    let (key, range_end) = key_range(words.next());
    let mut watch = WatchCreateRequest { key, range_end, ..WatchCreateRequest::default() };
    for option in words.options() {
        match option.split_once('=').unwrap_or((option, "")) {
            ("id", id) => watch.watch_id = number(id),
            ("from", revision) => watch.start_revision = number(revision),
            ("prev", _) => watch.prev_kv = true,
            ("no-puts", _) => watch.filters.push(0),
            ("no-deletes", _) => watch.filters.push(1),
            ("filter", filter) => watch.filters.push(number(filter) as i32),
            ("fragment", _) => watch.fragment = true,
            ("progress", _) => watch.progress_notify = true,
            _ => panic!("watch has no option {option}"),
        }
    }
    watch
}

// ---- Showing answers

fn show(bytes: &[u8]) -> String {
    match bytes {
        [] => "\"\"".to_owned(),
        [first, rest @ ..] if rest.len() > 8 && rest.iter().all(|byte| byte == first) => {
            format!("{}*{}", first.escape_ascii(), bytes.len())
        }
        _ => bytes.escape_ascii().to_string().replace("\\x00", "\\0"),
    }
}

fn show_kv(kv: &EncodedKv) -> String {
    let kv = kv.decode().unwrap();
    let KeyValue { create_revision, mod_revision, version, .. } = kv;
    let lease = if kv.lease == 0 { String::new() } else { format!(", lease {}", kv.lease) };
    format!("{}={}  created {create_revision}, modified {mod_revision}, version {version}{lease}", show(&kv.key), show(&kv.value))
}

/// An answer without a header stands alone; within a Txn each says at which revision it was given.
fn at(header: &Option<ResponseHeader>) -> String {
    header.as_ref().map_or_else(String::new, |header| format!(", revision {}", header.revision))
}

fn show_put(response: &PutResponse) -> Vec<String> {
    let mut lines = vec![format!("put{}", at(&response.header))];
    lines.extend(response.prev_kv.iter().map(|kv| format!("  before: {}", show_kv(kv))));
    lines
}

fn show_delete(response: &DeleteRangeResponse) -> Vec<String> {
    let mut lines = vec![format!("deleted {}{}", response.deleted, at(&response.header))];
    lines.extend(response.prev_kvs.iter().map(|kv| format!("  before: {}", show_kv(kv))));
    lines
}

fn show_get(response: &RangeResponse) -> Vec<String> {
    let keys = if response.count == 1 { "key" } else { "keys" };
    let more = if response.more { ", and more than these" } else { "" };
    let mut lines = vec![format!("{} {keys}{more}{}", response.count, at(&response.header))];
    lines.extend(response.kvs.iter().map(|kv| format!("  {}", show_kv(kv))));
    lines
}

fn show_txn(response: &TxnResponse) -> Vec<String> {
    let mut lines = vec![format!("{}{}", if response.succeeded { "then" } else { "else" }, at(&response.header))];
    for one in &response.responses {
        let inner = match one.response.as_ref().unwrap() {
            Response::ResponseRange(get) => show_get(get),
            Response::ResponsePut(put) => show_put(put),
            Response::ResponseDeleteRange(delete) => show_delete(delete),
            Response::ResponseTxn(txn) => show_txn(txn),
        };
        lines.extend(inner.into_iter().map(|line| format!("  {line}")));
    }
    lines
}

fn show_answer(answer: &WatchAnswer, store: &Store) -> Vec<String> {
    let response = on_the_wire(answer, store);
    let who = if response.watch_id == NO_WATCH { "no watch".to_owned() } else { format!("watch {}", response.watch_id) };
    let revision = response.header.as_ref().unwrap().revision;
    if response.canceled {
        let created = if response.created { "created and " } else { "" };
        let compacted = if response.compact_revision > 0 { format!(", compacted at {}", response.compact_revision) } else { String::new() };
        let reason = if response.cancel_reason.is_empty() { String::new() } else { format!(": {}", response.cancel_reason) };
        return vec![format!("{who}: {created}canceled{compacted}{reason}, revision {revision}")];
    }
    if response.created {
        return vec![format!("{who}: created, revision {revision}")];
    }
    if response.events.is_empty() {
        return vec![format!(
            "{}: nothing more up to revision {revision}",
            if response.watch_id == NO_WATCH { "all watches" } else { &who }
        )];
    }
    let mut lines = vec![format!("{who}: events, revision {revision}{}", if response.fragment { ", to be continued" } else { "" })];
    for event in &response.events {
        let kv = event.kv.as_ref().unwrap().decode().unwrap();
        let was = event.prev_kv.as_ref().map_or_else(String::new, |kv| format!(", was {}", show(&kv.decode().unwrap().value)));
        let what = match EventType::try_from(event.r#type).unwrap() {
            EventType::Put => format!("put {}={}", show(&kv.key), show(&kv.value)),
            EventType::Delete => format!("delete {}", show(&kv.key)),
        };
        lines.push(format!("  {} {what}{was}", kv.mod_revision));
    }
    lines
}

// ---- Carrying commands out

const LIMITS: Limits = Limits {
    queue_bytes: 1 << 20,
    response_revisions: 1000,
    response_bytes: 1 << 20,
    fragment_bytes: 1 << 20,
    catch_up_records: 1000,
    catch_up_bytes: 1 << 20,
    catch_up_events: 1000,
};

/// What a script works on: a store, leases that are only a set, and streams of watches by name.
struct Script {
    mem: Arc<Mem>,
    store: Arc<Store>,
    hub: Arc<WatchHub>,
    streams: BTreeMap<String, Session>,
    leases: BTreeMap<i64, BTreeSet<Bytes>>,
    /// The batches and the encoded events of the answers polled, by revision; kept, so that none takes another's place in memory.
    polled: BTreeMap<i64, Vec<(Arc<Batch>, Bytes)>>,
}

fn open(mem: &Arc<Mem>) -> Arc<Store> {
    Arc::new(Store::open(mem.clone(), HistoryOptions::default(), &mut |_, _| {}).unwrap().0)
}

impl Script {
    fn new() -> Self {
        let mem = Arc::new(Mem::new());
        let store = open(&mem);
        let hub = Arc::new(WatchHub::with_limits(store.revision(), LIMITS));
        Script { mem, store, hub, streams: BTreeMap::new(), leases: BTreeMap::new(), polled: BTreeMap::new() }
    }

    fn stream(&mut self, name: &str) -> &mut Session {
        let (hub, store) = (&self.hub, &self.store);
        self.streams.entry(name.to_owned()).or_insert_with(|| Session::new(hub.clone(), store.clone()))
    }

    /// Carries out a request that writes, and says which leases it changed.
    fn write<T>(
        &mut self,
        request: impl FnOnce(&mut Writer<'_>, &dyn Fn(i64) -> bool) -> Result<T>,
        show: impl Fn(&T) -> Vec<String>,
    ) -> Vec<String> {
        let store = self.store.clone();
        let mut writer = store.begin();
        let response = match request(&mut writer, &|id| self.leases.contains_key(&id)) {
            Ok(response) => response,
            Err(Error::Apply(refused)) => return vec![format!("refused: {refused}")],
            Err(fault) => panic!("{fault}"),
        };
        let mut lines = show(&response);
        let Some(committed) = writer.finish() else { return lines };
        for (key, left, joined) in &committed.leases {
            if let Some(keys) = self.leases.get_mut(left) {
                keys.remove(key);
                lines.push(format!("lease {left} loses {}", key.escape_ascii()));
            }
            if let Some(keys) = self.leases.get_mut(joined) {
                keys.insert(key.clone());
                lines.push(format!("lease {joined} gets {}", key.escape_ascii()));
            }
        }
        self.hub.publish(&committed);
        lines
    }

    fn get(&self, get: &RangeRequest) -> Result<RangeResponse, ApplyError> {
        range::check(get)?;
        let pin = self.store.pin(get.revision)?;
        let found = RangeScan::new(get, pin.at(), HOLD_BYTES).start(&self.store).unwrap_or_else(|scan| scan.run(&pin)).unwrap();
        Ok(collect(found, &pin, get.keys_only, HOLD_BYTES))
    }

    fn history(&self) -> Vec<String> {
        let mut lines = Vec::new();
        let all = Revision::default()..Revision { main: i64::MAX, sub: 0 };
        let scanned = self.store.history().scan(all.start, all.end, &mut |Revision { main, sub }, record| {
            let kv = EncodedKv::from_encoded(record.bytes.clone());
            let key = kv.decode().unwrap().key;
            lines.push(format!(
                "{main}.{sub} {}",
                if record.tombstone { format!("delete {}", show(&key)) } else { format!("put {}", show_kv(&kv)) }
            ));
            Ok(true)
        });
        scanned.unwrap();
        lines
    }

    fn run(&mut self, command: &[&str]) -> Vec<String> {
        let mut words = Words::new(command);
        let stream = if words.take("on") { words.next() } else { "A" };
        let refused = |err: ApplyError| vec![format!("refused: {err}")];
        match words.next() {
            "put" => {
                let put = parse_put(&mut words);
                match txn::check_put(&put) {
                    Ok(()) => self.write(|writer, leases| txn::put(writer, &put, leases), show_put),
                    Err(err) => refused(err),
                }
            }
            "delete" => {
                let delete = parse_delete(&mut words);
                match txn::check_delete(&delete) {
                    Ok(()) => self.write(|writer, _| txn::delete_range(writer, &delete), show_delete),
                    Err(err) => refused(err),
                }
            }
            "txn" => {
                let txn = parse_txn(&mut words);
                assert_eq!(words.0.next(), None, "the txn ends");
                match txn::check_txn(&txn, 8) {
                    Ok(()) => self.write(|writer, leases| txn::txn(writer, &txn, leases), show_txn),
                    Err(err) => refused(err),
                }
            }
            "get" => match self.get(&parse_get(&mut words)) {
                Ok(response) => show_get(&response),
                Err(err) => refused(err),
            },
            "compact" => match self.store.compact(number(words.next())) {
                Ok(()) => {
                    while self.store.compact_step().unwrap().is_some() {}
                    Vec::new()
                }
                Err(err) => refused(err),
            },
            "lease" => {
                self.leases.insert(number(words.next()), BTreeSet::new());
                Vec::new()
            }
            "revoke" => {
                let keys = self.leases.remove(&number(words.next())).unwrap();
                self.write(
                    |writer, _| {
                        let _: () = keys.iter().for_each(|key| writer.delete(key));
                        Ok(())
                    },
                    |()| vec![format!("deleted {}", keys.len())],
                )
            }
            "history" => self.history(),
            "revision" => {
                let (newest, compacted) = self.store.revisions();
                vec![format!(
                    "revision {newest}, {}",
                    if compacted < 0 { "never compacted".into() } else { format!("compacted at {compacted}") }
                )]
            }
            "restart" => {
                self.store.history().commit(Bytes::new());
                self.store.history().sync().unwrap();
                self.streams.clear();
                self.store = open(&self.mem);
                self.hub = Arc::new(WatchHub::with_limits(self.store.revision(), LIMITS));
                Vec::new()
            }
            "limits" => {
                let mut limits = LIMITS;
                for option in words.options() {
                    let (name, value) = option.split_once('=').unwrap();
                    *match name {
                        "queue-bytes" => &mut limits.queue_bytes,
                        "response-revisions" => &mut limits.response_revisions,
                        "response-bytes" => &mut limits.response_bytes,
                        "fragment-bytes" => &mut limits.fragment_bytes,
                        "records-read" => &mut limits.catch_up_records,
                        "bytes-read" => &mut limits.catch_up_bytes,
                        "events-read" => &mut limits.catch_up_events,
                        other => panic!("there is no limit {other}"),
                    } = value.parse().unwrap();
                }
                self.streams.clear();
                self.hub = Arc::new(WatchHub::with_limits(self.store.revision(), limits));
                Vec::new()
            }
            "watch" => {
                let watch = parse_watch(&mut words);
                self.stream(stream).create(&watch);
                Vec::new()
            }
            "cancel" => {
                let id = number(words.next());
                self.stream(stream).cancel(id);
                Vec::new()
            }
            "progress" => {
                self.stream(stream).progress();
                Vec::new()
            }
            "tick" => {
                self.stream(stream).notify_progress();
                Vec::new()
            }
            "poll" => self.poll(stream, words.take("all")),
            "behind" => {
                let behind = self.stream(stream).behind();
                let lines: Vec<String> = behind.iter().map(|(id, next)| format!("watch {id} reads on from revision {next}")).collect();
                if lines.is_empty() { vec!["all are synced".to_owned()] } else { lines }
            }
            "close" => {
                self.streams.remove(stream).unwrap();
                Vec::new()
            }
            "watches" => vec![format!("{} open", self.hub.figures().watches)],
            "shared" => {
                let polled = std::mem::take(&mut self.polled);
                let line = |(revision, parts): (i64, Vec<(Arc<Batch>, Bytes)>)| {
                    let batches: BTreeSet<_> = parts.iter().map(|(batch, _)| Arc::as_ptr(batch)).collect();
                    let encodings: BTreeSet<_> = parts.iter().map(|(_, bytes)| bytes.as_ptr()).collect();
                    format!("revision {revision}: answers {}, batches {}, encodings {}", parts.len(), batches.len(), encodings.len())
                };
                polled.into_iter().map(line).collect()
            }
            other => panic!("there is no command {other}"),
        }
    }

    fn poll(&mut self, stream: &str, all: bool) -> Vec<String> {
        let store = self.store.clone();
        let mut lines = Vec::new();
        while let Some(answer) = poll(self.stream(stream)) {
            lines.extend(show_answer(&answer, &store));
            for (batch, body) in answer.batches.iter().zip(answer.bodies(&store).unwrap()) {
                self.polled.entry(batch.revision).or_default().push((batch.clone(), body));
            }
            if !all {
                return lines;
            }
        }
        if lines.is_empty() { vec!["nothing".to_owned()] } else { lines }
    }

    fn check(&self) {
        self.store.check().unwrap();
        let leased = self.leases.iter().flat_map(|(id, keys)| keys.iter().map(|key| (key.clone(), *id)));
        assert_eq!(self.store.attached().into_iter().collect::<BTreeMap<_, _>>(), leased.collect());
    }
}

fn run_scripts(room: &str) {
    crate::testing::run_scripts(room, |_| {
        let mut script = Script::new();
        move |command: &[&str]| {
            let lines = script.run(command);
            script.check();
            lines.into_iter().fold(String::new(), |mut out, line| {
                writeln!(out, "{line}").unwrap();
                out
            })
        }
    });
}

#[test]
fn txn_scripts() {
    run_scripts("txn");
}

#[test]
fn watch_scripts() {
    run_scripts("watch");
}

// ---- Compaction in steps

fn put_many(store: &Store, times: usize) {
    for number in 0..times {
        let mut writer = store.begin();
        writer.put(&Bytes::from_static(b"key"), &format!("{number:060}").into(), 0);
        writer.finish().unwrap();
        store.history().commit(Bytes::new());
    }
}

/// All that dies stands under one key, and is marked a few at a time all the same; what a crash takes back is found again.
#[test]
fn one_key_with_many_revisions_is_compacted_in_steps() {
    let mem = Arc::new(Mem::new());
    let mut store = open(&mem);
    put_many(&store, 100);
    // The key is gone in the end, and must not come back with a half of its deaths.
    let mut writer = store.begin();
    writer.delete(&Bytes::from_static(b"key"));
    writer.finish().unwrap();
    let mut writer = store.begin();
    writer.put(&Bytes::from_static(b"other"), &Bytes::new(), 0);
    writer.finish().unwrap();
    store.history().commit(Bytes::new());
    store.compact(store.revision()).unwrap();
    store.history().commit(Bytes::new());
    store.history().sync().unwrap();
    for restart in [true, false] {
        let mut removed = 0;
        while let Some(now) = store.compact_step().unwrap() {
            assert!(now <= STEP_KEYS, "{now} at once");
            removed += now;
            store.check().unwrap();
            store.history().write_out().unwrap();
            if restart && removed > 50 {
                break;
            }
        }
        assert_eq!(store.compaction_pending(), restart);
        if restart {
            mem.crash(mem.unsynced() / 2);
            store = open(&mem);
            assert!(store.compaction_pending());
            store.check().unwrap();
            assert_eq!((store.keys(), store.get(b"key", 0).unwrap().is_some()), (1, false));
        }
    }
    assert_eq!((store.history().stats().live_records, store.history().deaths_waiting()), (1, 0));
}

/// Records may be large: then a step of the hash looks at fewer of them, and the hash is the same.
#[test]
fn a_step_of_the_hash_is_bounded_in_bytes() {
    let store = open(&Arc::new(Mem::new()));
    put_many(&store, 20);
    let hash = |max_bytes| {
        let mut scan = hash::HashScan::of_compaction(store.revision(), -1);
        let mut steps = 1;
        while scan.step(&store, usize::MAX, max_bytes).unwrap() {
            steps += 1;
        }
        store.remember(scan);
        (steps, lock(&store.hashes).pop_back().unwrap())
    };
    let (steps, whole) = hash(usize::MAX);
    assert_eq!(steps, 1);
    assert_eq!(hash(1), (20, whole));
}

// ---- Beside the model

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, ..ProptestConfig::default() })]
    #[test]
    fn the_store_is_what_the_model_is(bytes in proptest::collection::vec(any::<u8>(), 0..2000)) {
        model::run(&bytes);
    }
}

// ---- Beside a writer

/// Puts in these revisions: more than the queue ever holds.
const PUTS: i64 = 3000;

/// The watcher has a thread of its own, and a queue for a few events; the writer never waits for it, and another thread
/// moves what was written out of memory meanwhile.
#[test]
fn a_watch_beside_a_writer_misses_nothing() {
    let store = open(&Arc::new(Mem::new()));
    let hub = Arc::new(WatchHub::with_limits(store.revision(), Limits { queue_bytes: 1000, catch_up_records: 50, ..LIMITS }));
    let done = AtomicBool::new(false);
    let mut session = Session::new(hub.clone(), store.clone());
    for (key, range_end) in [("k", "l"), ("k3", "")] {
        session.create(&WatchCreateRequest { key: key.into(), range_end: range_end.into(), start_revision: 2, ..Default::default() });
    }
    let mut told: BTreeMap<i64, Vec<i64>> = BTreeMap::new();
    std::thread::scope(|threads| {
        threads.spawn(|| {
            for number in 0..PUTS {
                let mut writer = store.begin();
                writer.put(&format!("k{}", number % 8).into(), &number.to_string().into(), 0);
                hub.publish(&writer.finish().unwrap());
                store.history().commit(Bytes::new());
            }
            done.store(true, Ordering::Release);
        });
        threads.spawn(|| {
            while !done.load(Ordering::Acquire) {
                store.history().write_out().unwrap();
            }
        });
        loop {
            // Looked at first: what is there once the writer is done has all been published.
            let last = done.load(Ordering::Acquire);
            while let Some(answer) = poll(&mut session) {
                told.entry(answer.watch_id).or_default().extend(answer.batches.iter().map(|batch| batch.revision));
            }
            if last {
                break;
            }
            std::thread::yield_now();
        }
    });
    let all: Vec<i64> = (2..2 + PUTS).collect();
    assert_eq!(told[&0], all);
    assert_eq!(told[&1], all.into_iter().filter(|revision| (revision - 2) % 8 == 3).collect::<Vec<_>>());
}

/// A store with this many keys, `k000000` and on.
fn filled(keys: usize) -> Arc<Store> {
    let store = open(&Arc::new(Mem::new()));
    for some in (0..keys).collect::<Vec<_>>().chunks(1000) {
        let mut writer = store.begin();
        for number in some {
            writer.put(&format!("k{number:06}").into(), &format!("v{}", number % 7).into(), 0);
        }
        writer.finish();
        store.history().commit(Bytes::new());
    }
    store
}

fn in_txn(request: Request) -> RequestOp {
    RequestOp { request: Some(request) }
}

fn all_keys() -> RangeRequest {
    RangeRequest { key: "k".into(), range_end: "l".into(), ..RangeRequest::default() }
}

/// Txns whose work or whose answers multiply are refused before they have done much, whatever they are made of.
#[test]
fn a_txn_is_bounded() {
    let store = filled(20_000);
    let refused = |txn: &TxnRequest| match super::txn::txn(&mut store.begin(), txn, &|_| true) {
        Err(crate::Error::Apply(refused)) => refused,
        other => panic!("{other:?}"),
    };
    let every = Compare { key: "k".into(), range_end: "l".into(), target: 1, result: 1, ..Compare::default() };
    let compares = TxnRequest { compare: vec![every; 60], ..TxnRequest::default() };
    let nested = TxnRequest { success: vec![in_txn(Request::RequestTxn(compares.clone())); 60], ..TxnRequest::default() };
    assert!(super::txn::txn(&mut store.begin(), &compares, &|_| true).unwrap().succeeded);
    assert_eq!(refused(&nested), ApplyError::TooManyOps);
    // Names alone are an answer, too.
    let names = RangeRequest { keys_only: true, ..all_keys() };
    let txn = TxnRequest { success: vec![in_txn(Request::RequestRange(names)); 100], ..TxnRequest::default() };
    assert_eq!(refused(&txn), ApplyError::ResponseTooLarge);
    // A count costs nothing, and an answer of a few pairs is not weighed.
    let count = RangeRequest { count_only: true, ..all_keys() };
    let few = RangeRequest { limit: 2, ..all_keys() };
    let ops = (0..100).map(|number| in_txn(Request::RequestRange(if number < 90 { count.clone() } else { few.clone() })));
    let response = super::txn::txn(&mut store.begin(), &TxnRequest { success: ops.collect(), ..TxnRequest::default() }, &|_| true).unwrap();
    assert!(response.responses.iter().all(|one| matches!(&one.response, Some(Response::ResponseRange(range)) if range.count == 20_000)));
}

/// What the limit leaves of a sorted range is what is weighed, not what comes first by key.
#[test]
fn a_txn_weighs_what_it_answers() {
    let store = filled(100);
    let mut writer = store.begin();
    writer.put(&"k999999".into(), &vec![b'z'; 1 << 20].into(), 0);
    writer.finish();
    let largest = RangeRequest { limit: 1, sort_order: 2, sort_target: 4, ..all_keys() };
    let txn = |times| TxnRequest { success: vec![in_txn(Request::RequestRange(largest.clone())); times], ..TxnRequest::default() };
    assert!(super::txn::txn(&mut store.begin(), &txn(40), &|_| true).is_ok());
    assert_eq!(super::txn::txn(&mut store.begin(), &txn(70), &|_| true).unwrap_err().to_string(), ApplyError::ResponseTooLarge.to_string());
}

proptest! {
    /// The set of keys that a Txn deletes, beside a plain list of ranges.
    #[test]
    fn key_sets(spans in proptest::collection::vec((0u8..20, 0u8..24), 0..12), singles in proptest::collection::vec(0u8..24, 0..4)) {
        let bytes: Vec<[u8; 1]> = (0..32).map(|byte| [byte]).collect();
        let end = |end: u8| (end < 23).then(|| &bytes[usize::from(end)][..]);
        let mut set = super::txn::KeySet::default();
        for (start, last) in &spans {
            set.add_span(&bytes[usize::from(*start)], end(*last));
        }
        set.keys.extend(singles.iter().map(|key| &bytes[usize::from(*key)][..]));
        for key in 0..30u8 {
            let expected = singles.contains(&key) || spans.iter().any(|(start, last)| *start <= key && (*last >= 23 || key < *last));
            prop_assert_eq!(set.contains(&[key]), expected, "{}", key);
        }
    }
}
