//! Locks: queues of keys in which the oldest has its turn.
//!
//! # As etcd has it
//! A lock named `n` is the keys `n/<lease in hexadecimal>`, each hanging on its owner's lease. Who wants it puts its key if that is not there,
//! and holds it once no key under `n/` has a lower create revision; until then it waits for the one just before its own to be deleted. So
//! `etcdctl lock n` and etcd's concurrency package stand in the same queue.
//!
//! # Invariants
//! - Each attempt is one Txn that does nothing the second time, so that it may be repeated when its answer was lost.
//! - After the wait the own key is read once more: it may have gone with its lease meanwhile.
//! - A place that is given up is left by deleting its key at that revision only; and until that is known to be done, or the session is lost, the
//!   session takes no other place in that queue ([`Turns`](super::turns) see to that).
//! - A place is taken by a task of its own, and handed over. If nobody takes it from its hands any more, it is given up again: no key is left
//!   behind of which nobody knows.
//!
//! # Caveat
//! A request whose answer was lost is made again. If the lost one is carried out only after the place that came of the second was given up,
//! the session has a place of which it does not know, until it takes that lock again, or ends. A member carries out what it has taken within
//! its request timeout, so that takes a lock that is held for less.

use std::sync::atomic::{AtomicBool, Ordering};

use bytes::{BufMut, Bytes, BytesMut};
use tokio::sync::oneshot;

use super::session::Session;
use super::swap::first_of;
use super::turns::Turn;
use super::watch::{EventKind, WatchMessage, decode};
use super::{Client, Result, prefix_end};
use crate::error::{Error, ErrorKind};
use crate::proto::KeyValue;
use crate::proto::etcdserverpb::range_request::{SortOrder, SortTarget};
use crate::proto::etcdserverpb::request_op::Request;
use crate::proto::etcdserverpb::{Compare, DeleteRangeRequest, PutRequest, RangeRequest, RequestOp, TxnRequest, WatchCreateRequest};

/// A lock that is held, from [`Session::lock`]. Dropped, it is given up, soon and if possible; [`unlock`](Self::unlock) does so at once.
#[derive(Debug)]
pub struct Lock(Place);

impl Session {
    /// Takes a lock, waiting for its turn. Who gives up waiting (drops the future) leaves the queue, soon and if possible.
    ///
    /// A session, with all its clones, holds a lock once: who asks for it a second time waits until it was given up.
    ///
    /// # Errors
    /// `SessionLost` when the lease cannot be relied on any more; else as [`Client::txn`].
    ///
    /// ```
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(async {
    /// # let dir = tempfile::tempdir()?;
    /// # let mut config = quorate::Config::default();
    /// # config.data_dir = Some(dir.path().into());
    /// # config.listen_client_urls.clear();
    /// # config.listen_peer_urls.clear();
    /// # let server = quorate::Server::start(config).await?;
    /// # let client = server.client();
    /// use quorate::proto::etcdserverpb::request_op::Request;
    /// use quorate::proto::etcdserverpb::{PutRequest, RequestOp, TxnRequest};
    ///
    /// let (mine, yours) = (client.session(10).await?, client.session(10).await?);
    /// let lock = mine.lock("maintenance").await?;
    /// assert!(yours.try_lock("maintenance").await?.is_none());
    /// // What is written under the lock is written only if it is still held.
    /// let put = PutRequest { key: "state".into(), value: "in work".into(), ..Default::default() };
    /// let write = RequestOp { request: Some(Request::RequestPut(put)) };
    /// let answer = client.txn(TxnRequest { compare: vec![lock.is_held()], success: vec![write], failure: vec![] }).await?;
    /// assert!(answer.succeeded);
    /// lock.unlock().await?;
    /// assert!(yours.try_lock("maintenance").await?.is_some());
    /// # server.shutdown().await?;
    /// # Ok(())
    /// # })
    /// # }
    /// ```
    pub async fn lock(&self, name: impl AsRef<[u8]>) -> Result<Lock> {
        let queue = Queue::of(self, name.as_ref());
        let turn = queue.turn().await?;
        let (place, first) = queue.take(turn, Bytes::new()).await?;
        if !first {
            place.wait().await?;
        }
        Ok(Lock(place))
    }

    /// Takes a lock if nobody has it, nor waits for it; `None` if somebody does, and be it another task with a clone of this session.
    ///
    /// # Errors
    /// As [`lock`](Self::lock).
    pub async fn try_lock(&self, name: impl AsRef<[u8]>) -> Result<Option<Lock>> {
        let queue = Queue::of(self, name.as_ref());
        let Some(turn) = queue.turn_now().await? else { return Ok(None) };
        let (place, first) = queue.take(turn, Bytes::new()).await?;
        if !first {
            place.leave().await?;
            return Ok(None);
        }
        Ok(Some(Lock(place)))
    }
}

impl Lock {
    /// The key that is the lock, as etcd has it: the name, a slash, and the lease in hexadecimal.
    pub fn key(&self) -> &Bytes {
        &self.0.key
    }

    /// The fencing token: the create revision of the key. Every later holder has a higher one; a storage that refuses lower ones than it has seen
    /// refuses those that do not know yet that they have lost the lock.
    pub fn revision(&self) -> i64 {
        self.0.revision
    }

    /// The condition under which a Txn writes only while the lock is held.
    pub fn is_held(&self) -> Compare {
        self.0.is_held()
    }

    /// The session that holds it. Once that is [lost](Session::lost), so is the lock.
    pub fn session(&self) -> &Session {
        &self.0.session
    }

    /// Gives it up.
    ///
    /// # Errors
    /// `SessionLost` when it went before: others may have had the lock meanwhile. Else as [`Client::txn`].
    pub async fn unlock(self) -> Result<()> {
        self.0.leave().await
    }
}

/// A queue, as a session stands in it.
pub(super) struct Queue {
    session: Session,
    /// What its keys begin with.
    prefix: Bytes,
    /// The session's.
    key: Bytes,
}

/// A place in a queue: a key on the session's lease. Dropped, it is given up, soon and if possible.
#[derive(Debug)]
pub(super) struct Place {
    pub session: Session,
    /// The queue: what its keys begin with.
    prefix: Bytes,
    pub key: Bytes,
    pub revision: i64,
    /// The value that it was found with; another than asked for when the key was there before.
    pub value: Bytes,
    /// None once it was given up.
    turn: Option<Turn>,
}

/// What the keys of a queue begin with.
pub(super) fn queue_prefix(name: &[u8]) -> Bytes {
    let mut prefix = BytesMut::with_capacity(name.len() + 1);
    prefix.put_slice(name);
    prefix.put_u8(b'/');
    prefix.freeze()
}

/// Reads the first in a queue.
pub(super) fn first_in(prefix: &Bytes) -> RangeRequest {
    RangeRequest {
        key: prefix.clone(),
        range_end: prefix_end(prefix),
        sort_target: SortTarget::Create as i32,
        sort_order: SortOrder::Ascend as i32,
        limit: 1,
        ..RangeRequest::default()
    }
}

fn op(request: Request) -> RequestOp {
    RequestOp { request: Some(request) }
}

impl Queue {
    pub fn of(session: &Session, name: &[u8]) -> Queue {
        let prefix = queue_prefix(name);
        let mut key = BytesMut::from(&prefix[..]);
        key.extend_from_slice(format!("{:x}", session.lease()).as_bytes());
        Queue { session: session.clone(), prefix, key: key.freeze() }
    }

    /// The turn of who asks, among those who share the session.
    ///
    /// # Errors
    /// `SessionLost`.
    pub async fn turn(&self) -> Result<Turn> {
        self.session.unless_lost(self.session.turns().wait(&self.key)).await?.ok_or(Error::SessionLost)
    }

    /// The same, if nobody else of them has to do with the queue.
    async fn turn_now(&self) -> Result<Option<Turn>> {
        self.session.unless_lost(self.session.turns().try_now(&self.key)).await
    }

    /// Takes a place at the end, or the one that the lease has already; and says whether it is the first.
    pub async fn take(self, turn: Turn, value: Bytes) -> Result<(Place, bool)> {
        let (hand_over, taken) = oneshot::channel();
        let session = self.session.clone();
        // By a task, which goes on if nobody waits for it any more: the Txn may have been sent, and its key then has to be deleted.
        let taking = async move {
            // Not taken from its hands, the place is dropped, and so given up.
            let _ = hand_over.send(self.place(turn, value).await);
        };
        session.client().backend.spawn(taking).detach();
        // If the task ends without a word, so has the runtime that it ran on.
        taken.await.unwrap_or(Err(Error::Stopped))
    }

    async fn place(self, turn: Turn, value: Bytes) -> Result<(Place, bool)> {
        let Queue { session, prefix, key } = self;
        let put = PutRequest { key: key.clone(), value: value.clone(), lease: session.lease(), ..PutRequest::default() };
        let own = RangeRequest { key: key.clone(), ..RangeRequest::default() };
        let txn = TxnRequest {
            compare: vec![Compare::create_revision_is(key.clone(), 0)],
            success: vec![op(Request::RequestPut(put)), op(Request::RequestRange(first_in(&prefix)))],
            failure: vec![op(Request::RequestRange(own)), op(Request::RequestRange(first_in(&prefix)))],
        };
        let answer = session.insist(|| session.client().txn(txn.clone())).await?;
        let (revision, value) = if answer.succeeded {
            (answer.header.as_ref().map_or(0, |header| header.revision), value)
        } else {
            let own = first_of(&answer, 0)?.ok_or_else(|| Error::Failed("a key is neither there nor not there".into()))?;
            (own.create_revision, own.value)
        };
        let first = first_of(&answer, 1)?;
        let place = Place { session, prefix, key, revision, value, turn: Some(turn) };
        let is_first = first.is_none_or(|first| first.create_revision >= revision);
        Ok((place, is_first))
    }
}

impl Place {
    pub fn is_held(&self) -> Compare {
        Compare::create_revision_is(self.key.clone(), self.revision)
    }

    /// Waits until it is the first.
    pub async fn wait(&self) -> Result<()> {
        let client = self.session.client();
        // The one before: of those that came earlier, the last.
        let before = RangeRequest {
            sort_order: SortOrder::Descend as i32,
            max_create_revision: self.revision - 1,
            keys_only: true,
            ..first_in(&self.prefix)
        };
        loop {
            let answer = self.session.insist(|| client.range(before.clone())).await?;
            let Some(before) = answer.kvs.first().map(decode).transpose()? else { break };
            let revision = answer.header.as_ref().map_or(0, |header| header.revision);
            tokio::select! {
                biased;
                () = self.session.lost() => return Err(Error::SessionLost),
                deleted = wait_deleted(client, before.key, revision + 1) => deleted?,
            }
        }
        // It is its turn, if it is still there.
        let own = RangeRequest { key: self.key.clone(), ..RangeRequest::default() };
        let answer = self.session.insist(|| client.range(own.clone())).await?;
        let own = answer.kvs.first().map(decode).transpose()?;
        if own.is_none_or(|own| own.create_revision != self.revision) || self.session.is_lost() {
            return Err(Error::SessionLost);
        }
        Ok(())
    }

    /// Writes the key's value, if it is still there.
    pub async fn put(&self, value: Bytes) -> Result<i64> {
        let put = PutRequest { key: self.key.clone(), value, lease: self.session.lease(), ..PutRequest::default() };
        let txn = TxnRequest { compare: vec![self.is_held()], success: vec![op(Request::RequestPut(put))], failure: Vec::new() };
        let answer = self.session.insist(|| self.session.client().txn(txn.clone())).await?;
        if answer.succeeded { Ok(answer.header.map_or(0, |header| header.revision)) } else { Err(Error::SessionLost) }
    }

    /// Gives the place up.
    ///
    /// # Errors
    /// `SessionLost` when the key was gone before.
    pub async fn leave(mut self) -> Result<()> {
        if let Some(turn) = &self.turn {
            turn.leaving();
        }
        // Once there is an answer there is nothing left to do, whatever it says.
        let outcome = delete(&self.session, self.is_held()).await;
        self.turn = None;
        outcome
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let Some(turn) = self.turn.take() else { return };
        if self.session.is_lost() {
            return;
        }
        turn.leaving();
        let (session, held) = (self.session.clone(), self.is_held());
        let leave = async move {
            if let Err(err) = delete(&session, held).await {
                tracing::debug!(error = %err, "a place in a queue is left to its lease");
            }
            drop(turn);
        };
        // It tries as long as the session lasts, and keeps it for that long; then the key goes with the lease.
        self.session.client().backend.spawn(leave).detach();
    }
}

/// Deletes a key, if it is still the one that was meant.
///
/// # Errors
/// `SessionLost` when it was not; else as [`Client::txn`].
async fn delete(session: &Session, held: Compare) -> Result<()> {
    let delete = DeleteRangeRequest { key: held.key.clone(), ..DeleteRangeRequest::default() };
    let txn = TxnRequest { compare: vec![held], success: vec![op(Request::RequestDeleteRange(delete))], failure: Vec::new() };
    // Whether an attempt may have been carried out of which no answer came: then it may have been this that has deleted it.
    let open = AtomicBool::new(false);
    let attempt = async || {
        let outcome = session.client().txn(txn.clone()).await;
        if outcome.as_ref().is_err_and(|err| err.kind() == ErrorKind::OutcomeUnknown) {
            open.store(true, Ordering::Relaxed);
        }
        outcome
    };
    let answer = session.insist(attempt).await?;
    if answer.succeeded || open.load(Ordering::Relaxed) { Ok(()) } else { Err(Error::SessionLost) }
}

/// Waits for a key to be deleted after a revision.
async fn wait_deleted(client: &Client, key: Bytes, from: i64) -> Result<()> {
    let mut watcher = client.watch(WatchCreateRequest { key, start_revision: from, ..WatchCreateRequest::default() })?;
    while let Some(message) = watcher.next().await? {
        match message {
            WatchMessage::Events(events) if events.iter().any(|event| event.kind == EventKind::Delete) => return Ok(()),
            // It is looked at again.
            WatchMessage::Compacted { .. } => return Ok(()),
            WatchMessage::Events(_) | WatchMessage::Progress { .. } => {}
        }
    }
    Ok(())
}

/// The first in a queue now.
pub(super) async fn head_of(client: &Client, name: &[u8]) -> Result<(Option<KeyValue>, i64)> {
    let answer = client.range(first_in(&queue_prefix(name))).await?;
    let revision = answer.header.as_ref().map_or(0, |header| header.revision);
    Ok((answer.kvs.first().map(decode).transpose()?, revision))
}
