//! The client: typed calls, on the core itself.
//!
//! A [`Client`] from [`Server::client`](crate::Server::client) calls the member in this process: no socket, no encoding,
//! the same outcomes and errors as over the wire. It is cheap to clone, works on any runtime, and outlives its server: then
//! its calls end with [`Error::Stopped`].
//!
//! Requests and answers are etcd's messages; [`Client::put`], [`Client::get`] and [`Client::delete`] are shorthands.

use std::future::poll_fn;
use std::sync::Arc;

use bytes::Bytes;

use crate::api::Api;
use crate::error::{ApplyError, Error, Result};
use crate::lock::lock;
use crate::mvcc::watch::{Batch, Session};
use crate::node::Node;
use crate::proto::etcdserverpb::{
    AlarmMember, AlarmRequest, AlarmResponse, CompactionRequest, CompactionResponse, DeleteRangeRequest, DeleteRangeResponse,
    LeaseGrantRequest, LeaseGrantResponse, LeaseRevokeRequest, LeaseRevokeResponse, Member, PutRequest, PutResponse, RangeRequest,
    RangeResponse, TxnRequest, TxnResponse, WatchCreateRequest,
};
use crate::proto::{EncodedKv, KeyValue};

/// A client of one member. See the [module](self).
#[derive(Clone)]
pub struct Client {
    node: Arc<Node>,
    api: Api,
}

impl std::fmt::Debug for Client {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Client").field("member", &self.node.identity).finish_non_exhaustive()
    }
}

/// What a key may have been deleted or put as; see [`WatchEvent`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EventKind {
    /// The key was written.
    Put,
    /// The key was deleted; the event's pair has the key and the revision alone.
    Delete,
}

/// One change of one key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WatchEvent {
    /// What happened.
    pub kind: EventKind,
    /// The pair after it.
    pub kv: KeyValue,
    /// The pair before it, if it was asked for, there was one, and it has not been compacted.
    pub prev_kv: Option<KeyValue>,
}

/// Something that a [`Watcher`] was told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum WatchMessage {
    /// Changes, in order; all of a revision are in one message.
    Events(Vec<WatchEvent>),
    /// Everything up to this revision has been told.
    Progress {
        /// The revision.
        revision: i64,
    },
    /// The watch has ended: its next revision was compacted away. Read the keys anew, and watch from there.
    Compacted {
        /// The oldest revision from which a watch can begin.
        revision: i64,
    },
}

impl Client {
    pub(crate) fn local(node: Arc<Node>, api: Api) -> Self {
        Client { node, api }
    }

    /// Puts a key.
    ///
    /// # Errors
    /// etcd's outcomes as [`Error::Apply`]; `Timeout` when it is not known whether it was written.
    pub async fn put(&self, key: impl Into<Bytes>, value: impl Into<Bytes>) -> Result<PutResponse> {
        self.put_with(PutRequest { key: key.into(), value: value.into(), ..PutRequest::default() }).await
    }

    /// Puts a key, with all that a request can say.
    ///
    /// # Errors
    /// As [`put`](Self::put).
    pub async fn put_with(&self, request: PutRequest) -> Result<PutResponse> {
        self.node.put(request).await
    }

    /// Reads a key as it is now; `None` when there is none. Linearizable: it sees every write acknowledged before.
    ///
    /// # Errors
    /// etcd's outcomes as [`Error::Apply`].
    pub async fn get(&self, key: impl Into<Bytes>) -> Result<Option<KeyValue>> {
        let response = self.range(RangeRequest { key: key.into(), ..RangeRequest::default() }).await?;
        response.kvs.first().map(decode).transpose()
    }

    /// Reads keys. Pairs of the answer are [`EncodedKv`]s; `decode` them.
    ///
    /// # Errors
    /// etcd's outcomes as [`Error::Apply`].
    pub async fn range(&self, request: RangeRequest) -> Result<RangeResponse> {
        self.node.range(&request).await?.collect()
    }

    /// Deletes a key and says whether it was there.
    ///
    /// # Errors
    /// As [`put`](Self::put).
    pub async fn delete(&self, key: impl Into<Bytes>) -> Result<bool> {
        let response = self.delete_with(DeleteRangeRequest { key: key.into(), ..DeleteRangeRequest::default() }).await?;
        Ok(response.deleted > 0)
    }

    /// Deletes keys.
    ///
    /// # Errors
    /// As [`put`](Self::put).
    pub async fn delete_with(&self, request: DeleteRangeRequest) -> Result<DeleteRangeResponse> {
        self.node.delete_range(request).await
    }

    /// Compares, and carries out one of two lists of operations, as one.
    ///
    /// # Errors
    /// As [`put`](Self::put); after an error, none of it was done.
    pub async fn txn(&self, request: TxnRequest) -> Result<TxnResponse> {
        self.node.txn(request).await
    }

    /// Forgets the history below a revision.
    ///
    /// # Errors
    /// As [`put`](Self::put).
    pub async fn compact(&self, revision: i64) -> Result<CompactionResponse> {
        self.node.compact(CompactionRequest { revision, physical: false }).await
    }

    /// Watches keys. The request's `watch_id` and `fragment` mean nothing here.
    ///
    /// # Errors
    /// [`Error::Config`] with the reason when the request makes no sense.
    pub fn watch(&self, request: WatchCreateRequest) -> Result<Watcher> {
        let mut session = self.node.watch();
        session.create(&WatchCreateRequest { watch_id: 0, fragment: false, ..request });
        Ok(Watcher { session, node: self.node.clone(), ended: false })
    }

    /// Grants a lease of `ttl` seconds; with `id` 0 the server picks one.
    ///
    /// # Errors
    /// As [`put`](Self::put).
    pub async fn lease_grant(&self, id: i64, ttl: i64) -> Result<LeaseGrantResponse> {
        self.node.lease_grant(LeaseGrantRequest { id, ttl }).await
    }

    /// Ends a lease and deletes its keys.
    ///
    /// # Errors
    /// As [`put`](Self::put).
    pub async fn lease_revoke(&self, id: i64) -> Result<LeaseRevokeResponse> {
        self.node.lease_revoke(LeaseRevokeRequest { id }).await
    }

    /// Renews a lease for its whole TTL, which is returned in seconds.
    ///
    /// # Errors
    /// [`ApplyError::LeaseNotFound`] when there is none.
    pub async fn lease_keep_alive(&self, id: i64) -> Result<i64> {
        match self.node.lease_renew(id).await? {
            0 => Err(ApplyError::LeaseNotFound.into()),
            ttl => Ok(ttl),
        }
    }

    /// The seconds that a lease was granted for and has left, and the keys attached to it; `None` when there is none.
    ///
    /// # Errors
    /// As [`get`](Self::get).
    pub async fn lease_time_to_live(&self, id: i64) -> Result<Option<LeaseTime>> {
        self.node.read_barrier().await?;
        let found = lock(&self.node.machine.lessor).time_to_live(id, self.node.machine.now(), true);
        Ok(found.map(|found| LeaseTime { granted: found.granted, remaining: found.remaining, keys: found.keys }))
    }

    /// The ids of all leases, the one to expire first at the front.
    ///
    /// # Errors
    /// As [`get`](Self::get).
    pub async fn leases(&self) -> Result<Vec<i64>> {
        self.node.read_barrier().await?;
        Ok(lock(&self.node.machine.lessor).leases())
    }

    /// Reads, raises or lowers alarms.
    ///
    /// # Errors
    /// As [`put`](Self::put).
    pub async fn alarm(&self, request: AlarmRequest) -> Result<AlarmResponse> {
        self.node.alarm(request).await
    }

    /// The alarms that are raised.
    pub fn alarms(&self) -> Vec<AlarmMember> {
        self.node.alarms()
    }

    /// The members of the cluster.
    pub fn members(&self) -> Vec<Member> {
        self.api.members()
    }

    /// The newest revision that this member has applied.
    pub fn revision(&self) -> i64 {
        self.node.store().revision()
    }

    /// The CRC-32C of the history up to a revision (0: all of it), as etcd's HashKV computes it.
    ///
    /// # Errors
    /// `Compacted` and `FutureRevision` as [`Error::Apply`].
    pub async fn hash_kv(&self, revision: i64) -> Result<u32> {
        Ok(self.node.hash_kv(revision).await?.hash)
    }

    /// Rewrites the storage into fresh files, while it goes on being used.
    ///
    /// # Errors
    /// `Io` when the disk has no room for it; the old files go on unharmed.
    pub async fn defragment(&self) -> Result<()> {
        self.node.background().defragment().await
    }
}

/// What is left of a lease.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LeaseTime {
    /// The TTL that was granted, in seconds.
    pub granted: i64,
    /// Seconds until it expires.
    pub remaining: i64,
    /// The keys attached to it, in order.
    pub keys: Vec<Bytes>,
}

fn decode(kv: &EncodedKv) -> Result<KeyValue> {
    kv.decode().map_err(|err| Error::Failed(format!("a stored pair cannot be read: {err}")))
}

/// A watch. It ends when it is dropped.
pub struct Watcher {
    session: Session,
    node: Arc<Node>,
    ended: bool,
}

impl std::fmt::Debug for Watcher {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Watcher").field("ended", &self.ended).finish_non_exhaustive()
    }
}

impl Watcher {
    /// Waits for the next message. After [`WatchMessage::Compacted`] there is none: `None`.
    ///
    /// Cancel-safe: nothing is lost when the future is dropped.
    ///
    /// # Errors
    /// `Config` when the request made no sense; `Stopped` when the member has stopped.
    pub async fn next(&mut self) -> Result<Option<WatchMessage>> {
        let mut health = self.node.health();
        while !self.ended {
            let answer = tokio::select! {
                answer = poll_fn(|cx| self.session.poll_next(cx)) => answer?,
                _ = health.wait_for(|health| !matches!(health, crate::node::Health::Running)) => return Err(Error::Stopped),
            };
            if answer.canceled {
                self.ended = true;
                if answer.compact_revision > 0 {
                    return Ok(Some(WatchMessage::Compacted { revision: answer.compact_revision }));
                }
                return Err(Error::Config(answer.cancel_reason));
            }
            if answer.created {
                continue;
            }
            if answer.batches.is_empty() {
                return Ok(Some(WatchMessage::Progress { revision: answer.revision }));
            }
            let mut events = Vec::new();
            for event in answer.batches.iter().flat_map(|batch| &batch.events) {
                let prev = if answer.prev_kv { Batch::prev(event, self.session.store())? } else { None };
                events.push(WatchEvent {
                    kind: if event.delete { EventKind::Delete } else { EventKind::Put },
                    kv: decode(&event.kv)?,
                    prev_kv: prev.as_ref().map(decode).transpose()?,
                });
            }
            return Ok(Some(WatchMessage::Events(events)));
        }
        Ok(None)
    }

    /// Asks for a [`WatchMessage::Progress`] as soon as everything before it has been told.
    pub fn request_progress(&mut self) {
        self.session.progress();
    }
}
