//! Openings for the micro-benchmarks, behind the feature `internals`. No part of the API, and nothing of the server uses it.
//!
//! Benchmarks are a crate of their own and see what is public alone, and what they measure is not. So each opening here wraps
//! one private thing and hands calls on, to the same functions that a member calls; nothing is decided here. What is measured,
//! and against what, is told in `benches/micro.rs`.
//!
//! # Caveats
//! - Nobody runs the background thread: [`Member::tidy`] does its work when the caller has time.
//! - The storage is in memory. No call that is measured here waits for the disk in a member either.

use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures_util::FutureExt;
use openraft::EntryPayload;
use openraft::storage::RaftStateMachine;
use prost::Message;

use crate::api::unary;
use crate::error::{Error, Result};
use crate::lease::{Lessor, LessorOptions};
use crate::mvcc::index::{KeyIndex, Meta};
use crate::mvcc::range::{HOLD_BYTES, RangeResult, RangeScan};
use crate::mvcc::tree::{Bound, Tree};
use crate::mvcc::watch::{Session, WatchHub, encode_answer};
use crate::mvcc::{Committed, Event, Store, txn, write_entry};
use crate::node::RangeAnswer;
use crate::proto::etcdserverpb::{RangeRequest, RangeResponse, ResponseHeader, TxnRequest, TxnResponse, WatchCreateRequest, WatchResponse};
use crate::proto::internal::{Applied, Command};
use crate::proto::{EncodedKv, KeyValue};
use crate::raft::apply::{Machine, StateMachine};
use crate::raft::{Proposal, RaftEntry, log_id, log_id_to_proto};
use crate::storage::Revision;
use crate::storage::history::HistoryOptions;
use crate::storage::mem::Mem;

/// Bytes that one step of tidying up may rewrite: four times the background thread's, so that what is measured is the work.
const STEP_BYTES: usize = 1 << 20;

/// No entry takes so long that it would be logged.
const SLOW: Duration = Duration::MAX;

/// The header's ids in answers: of a usual length, which is all that matters.
const SOME_ID: u64 = 0x1234_5678_9abc_def0;

/// The index alone.
#[derive(Default)]
pub struct Index {
    tree: Tree<KeyIndex>,
}

impl Index {
    /// Notes a put of a key at a revision, which lies above all before.
    pub fn put(&mut self, key: &[u8], main: i64) {
        let revision = Revision { main, sub: 0 };
        self.tree.update(key, |entry| {
            let version = entry.as_ref().and_then(|entry| entry.current()?.meta).map_or(1, |meta| meta.version + 1);
            write_entry(entry, revision, Some(Meta { created: main - version + 1, version, lease: 0 }))
        });
    }

    /// Forgets a key.
    pub fn remove(&mut self, key: &[u8]) {
        self.tree.remove(key);
    }

    /// The revision of a key's last write.
    pub fn get(&self, key: &[u8]) -> Option<i64> {
        Some(self.tree.get(key)?.current()?.revision.main)
    }

    /// Walks over `count` keys from `start` on as they stood at revision `at`. Returns the sum of their revisions.
    pub fn range(&self, start: &[u8], count: usize, at: i64) -> i64 {
        let found = self.tree.range(start, Bound::Unbounded).filter_map(|(_, entry)| entry.at(at));
        found.take(count).map(|found| found.revision.main).sum()
    }
}

/// The applied state of a member: store, leases and watch hub, without a log and without the wire.
pub struct Member {
    state: StateMachine,
    /// Log entries applied.
    index: u64,
}

/// A committed log entry.
pub struct Entry(RaftEntry);

impl Member {
    /// An empty one.
    ///
    /// # Errors
    /// None that could come from memory.
    pub fn new() -> Result<Member> {
        let (store, saved) = Store::open(Arc::new(Mem::new()), HistoryOptions::default(), &mut |_, _| ())?;
        let lessor = Lessor::new(LessorOptions::default());
        let machine = Machine::new(Arc::new(store), saved, Vec::new(), lessor, Arc::new(|| Duration::ZERO), SLOW, Arc::default())?;
        Ok(Member { state: StateMachine { machine: Arc::new(machine) }, index: 0 })
    }

    fn store(&self) -> Arc<Store> {
        self.state.machine.store()
    }

    /// The log's next entry, with these commands.
    pub fn entry(&mut self, commands: Vec<Command>) -> Entry {
        self.index += 1;
        let payload = EntryPayload::Normal(Proposal { commands: Arc::new(commands) });
        Entry(RaftEntry { log_id: log_id(1, self.index), payload })
    }

    /// Applies an entry, as openraft has it applied when nobody waits for the answers.
    ///
    /// # Errors
    /// A fault of the store.
    pub fn apply(&mut self, entry: Entry) -> Result<()> {
        let entries = futures_util::stream::iter([Ok((entry.0, None))]);
        // It awaits the next entry and nothing else.
        let applied = self.state.apply(entries).now_or_never().ok_or(Error::Timeout)?;
        applied.map_err(|err| Error::Failed(err.to_string()))
    }

    /// Runs a Txn on the store, without the leases and watches that the applier would tell.
    ///
    /// # Errors
    /// A refusal, or a fault of the store.
    pub fn txn(&mut self, request: &TxnRequest) -> Result<TxnResponse> {
        let store = self.store();
        let mut writer = store.begin();
        let response = txn::txn(&mut writer, request, &|_| false)?;
        drop(writer.finish());
        Ok(response)
    }

    /// Answers a Range, as the node and the KV service do between them.
    ///
    /// # Errors
    /// A refusal, or a fault of the store.
    pub fn range(&self, request: &RangeRequest) -> Result<RangeResponse> {
        let store = self.store();
        if let Some((result, revision)) = RangeResult::of_one(&store, request) {
            return RangeAnswer { result, pin: None, keys_only: false, header: header(revision) }.collect();
        }
        let pin = store.pin(request.revision)?;
        let header = header(store.revision());
        let result = match RangeScan::new(request, pin.at(), HOLD_BYTES).start(&store) {
            Ok(result) => result?,
            Err(scan) => scan.run(&pin)?,
        };
        RangeAnswer { result, pin: Some(pin), keys_only: request.keys_only, header }.collect()
    }

    /// Compacts at the newest revision and writes everything out, so that the next round finds the store as this one did.
    ///
    /// # Errors
    /// None that could come from memory.
    pub fn tidy(&mut self) -> Result<()> {
        let store = self.store();
        let revision = store.revision();
        if store.revisions().1 < revision {
            store.compact(revision)?;
        }
        let applied = Applied { log_id: Some(log_id_to_proto(log_id(1, self.index))), revision };
        store.history().commit(applied.encode_to_vec().into());
        while store.compact_step()?.is_some() {}
        while store.history().write_out()? {}
        while store.history().collect(STEP_BYTES)? {}
        store.history().sync()?;
        Ok(())
    }
}

/// Many clients, each with one watch, all on the same range.
pub struct Watchers {
    hub: Arc<WatchHub>,
    sessions: Vec<Session>,
    event: Event,
    out: BytesMut,
}

/// What one event came to on the wire.
#[derive(Debug, PartialEq, Eq)]
pub struct Delivered {
    /// Answers given.
    pub answers: usize,
    /// Encodings of the event; those that share one are one.
    pub encodings: usize,
    /// Bytes of all answers.
    pub bytes: usize,
}

impl Watchers {
    /// Opens the watches. Each event will be a put of `kv`, whose key the request should cover.
    ///
    /// # Errors
    /// None that could come from memory.
    pub fn new(count: usize, request: &WatchCreateRequest, kv: &KeyValue) -> Result<Watchers> {
        let member = Member::new()?;
        let store = member.store();
        let hub = Arc::new(WatchHub::new(store.revision(), Arc::default()));
        let mut sessions: Vec<Session> = (0..count).map(|_| Session::new(hub.clone(), store.clone())).collect();
        for session in &mut sessions {
            session.create(request);
            // The answer that says so.
            let _ = session.poll_next(&mut Context::from_waker(Waker::noop()))?;
        }
        let revision = Revision { main: store.revision(), sub: 0 };
        let event = Event { key: kv.key.clone(), revision, delete: false, kv: EncodedKv::encode(kv) };
        Ok(Watchers { hub, sessions, event, out: BytesMut::new() })
    }

    /// Publishes the event at a new revision, and takes each watcher's answer as far as the bytes of its frame.
    ///
    /// # Errors
    /// None that could come from memory.
    pub fn deliver(&mut self) -> Result<Delivered> {
        self.event.revision.main += 1;
        self.hub.publish(&Committed { revision: self.event.revision.main, events: vec![self.event.clone()], leases: Vec::new() });
        let mut delivered = Delivered { answers: 0, encodings: 0, bytes: 0 };
        let mut last = None;
        for session in &mut self.sessions {
            let Poll::Ready(answer) = session.poll_next(&mut Context::from_waker(Waker::noop())) else { continue };
            let answer = answer?;
            let bodies = answer.bodies(session.store())?;
            let head = WatchResponse { header: Some(header(answer.revision)), watch_id: answer.watch_id, ..WatchResponse::default() };
            self.out.clear();
            self.out.reserve(bodies.iter().map(Bytes::len).sum::<usize>() + 128);
            encode_answer(&head, &bodies, &mut self.out)?;
            delivered.answers += 1;
            delivered.bytes += self.out.len();
            for body in bodies {
                delivered.encodings += usize::from(last.replace(body.as_ptr()) != Some(body.as_ptr()));
            }
        }
        Ok(delivered)
    }
}

/// A message as it goes out in answer to a unary call, with gRPC's prefix.
///
/// # Errors
/// When it is larger than gRPC can send.
pub fn frame(message: &impl Message) -> Result<Bytes> {
    unary::frame(message).map_err(|status| Error::Failed(status.message().to_owned()))
}

fn header(revision: i64) -> ResponseHeader {
    ResponseHeader { cluster_id: SOME_ID, member_id: SOME_ID, revision, raft_term: 2 }
}
