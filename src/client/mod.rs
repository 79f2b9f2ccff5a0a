//! The client: typed calls, on the core itself.
//!
//! A [`Client`] from [`Server::client`](crate::Server::client) calls the member in this process: no socket, no encoding,
//! the same outcomes and errors as over the wire. It is cheap to clone, and works on any executor: timers and threads are the
//! server's. It outlives its server: then its calls end with [`Error::Stopped`].
//!
//! Requests and answers are etcd's messages; [`Client::put`], [`Client::get`] and [`Client::delete`] are shorthands.

use std::future::poll_fn;
use std::io;
use std::sync::Arc;

use bytes::Bytes;

use crate::api::{Api, maintenance};
use crate::error::{ApplyError, Error, Result};
use crate::lock::lock;
use crate::mvcc::watch::{Batch, Session};
use crate::node::Node;
use crate::proto::etcdserverpb::alarm_request::AlarmAction;
use crate::proto::etcdserverpb::{
    AlarmMember, AlarmRequest, AlarmResponse, CompactionRequest, CompactionResponse, DeleteRangeRequest, DeleteRangeResponse,
    HashKvResponse, LeaseGrantRequest, LeaseGrantResponse, LeaseRevokeRequest, LeaseRevokeResponse, Member, PutRequest, PutResponse,
    RangeRequest, RangeResponse, StatusResponse, TxnRequest, TxnResponse, WatchCreateRequest,
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
    /// etcd's outcomes as [`Error::Apply`]. After [`Error::Timeout`], [`Error::Stopped`] and [`ApplyError::TimeoutLeaderFail`] it is open
    /// whether it was written, or will be.
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
    /// As [`put`](Self::put): after an error that leaves it open all of it or nothing may have been done; after any other, none of it.
    pub async fn txn(&self, request: TxnRequest) -> Result<TxnResponse> {
        self.node.txn(request).await
    }

    /// Forgets the history below a revision: of each key, what was older than its newest pair at that revision.
    ///
    /// # Errors
    /// As [`put`](Self::put); `Compacted` for a revision that was compacted before, `FutureRevision` for one that is not there yet.
    pub async fn compact(&self, revision: i64) -> Result<CompactionResponse> {
        self.compact_with(CompactionRequest { revision, physical: false }).await
    }

    /// Compacts, with all that a request can say: with `physical` it returns only when the storage has let the history go.
    ///
    /// # Errors
    /// As [`compact`](Self::compact); with `physical`, `Timeout` when a long read keeps what was compacted, which goes when that ends.
    pub async fn compact_with(&self, request: CompactionRequest) -> Result<CompactionResponse> {
        self.node.compact(request).await
    }

    /// Watches keys. The request's `watch_id` and `fragment` mean nothing here.
    ///
    /// # Errors
    /// None yet. What is wrong with the request, [`Watcher::next`] says.
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
        let remaining = self.node.lease_remaining(id).await?;
        let found = lock(&self.node.machine.lessor).time_to_live(id, self.node.machine.now(), true);
        Ok(found.filter(|_| remaining >= 0).map(|found| LeaseTime { granted: found.granted, remaining, keys: found.keys }))
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

    /// Lowers an alarm, and returns what was lowered. A default `AlarmMember`, of no member and no type, stands for all that are raised.
    ///
    /// # Errors
    /// As [`put`](Self::put).
    pub async fn alarm_disarm(&self, alarm: AlarmMember) -> Result<Vec<AlarmMember>> {
        let chosen = if alarm == AlarmMember::default() { self.alarms() } else { vec![alarm] };
        let mut lowered = Vec::new();
        for AlarmMember { member_id, alarm } in chosen {
            let request = AlarmRequest { action: AlarmAction::Deactivate as i32, member_id, alarm };
            lowered.extend(self.alarm(request).await?.alarms);
        }
        Ok(lowered)
    }

    /// The alarms that are raised, as far as this member has applied the log.
    pub fn alarms(&self) -> Vec<AlarmMember> {
        self.node.alarms()
    }

    /// The members of the cluster in the order of their ids, as far as this member has applied the log.
    pub fn members(&self) -> Vec<Member> {
        self.api.members()
    }

    /// The newest revision that this member has applied.
    pub fn revision(&self) -> i64 {
        self.node.store().revision()
    }

    /// How this member is: versions, leader, term, how far log and state have come, alarms (`errors`), and sizes in bytes. It asks no
    /// other member, so it answers without a leader, too.
    pub fn status(&self) -> StatusResponse {
        self.api.status_now()
    }

    /// The CRC-32C of the history up to a revision (0: all of it), as etcd's HashKV computes it: `hash`, over the revisions behind
    /// `compact_revision` (-1: all from the first) up to `hash_revision`. Members of which these three are equal have the same history.
    ///
    /// # Errors
    /// `Compacted` and `FutureRevision` as [`Error::Apply`].
    pub async fn hash_kv(&self, revision: i64) -> Result<HashKvResponse> {
        self.api.hash_of(revision).await
    }

    /// Begins a backup: all keys with their history, leases, alarms and members, as they are at one moment, in this crate's own
    /// checksummed format. Compaction waits for it; take its chunks, or drop it.
    ///
    /// # Errors
    /// As [`get`](Self::get).
    pub async fn backup(&self) -> Result<Backup> {
        Ok(Backup(maintenance::Backup::start(self.node.clone()).await?))
    }

    /// Writes a [backup](Self::backup), and returns how many bytes it has. It flushes, but does not sync: if it is to outlive a power
    /// cut, see to that afterwards. The writing blocks whoever polls; a writer that may take long belongs on a thread of its own.
    ///
    /// # Errors
    /// As [`get`](Self::get), and `Io` when the writer fails; what was written then is no backup.
    pub async fn backup_to(&self, writer: &mut impl io::Write) -> Result<u64> {
        let fault = |err| Error::io("writing", "the backup", err);
        let mut backup = self.backup().await?;
        let mut bytes = 0;
        while let Some(chunk) = backup.next().await? {
            writer.write_all(&chunk).map_err(fault)?;
            bytes += chunk.len() as u64;
        }
        writer.flush().map_err(fault)?;
        Ok(bytes)
    }

    /// Rewrites the storage into fresh files, while it goes on being used. It returns when the old ones are gone.
    ///
    /// # Errors
    /// `Io` when the disk has no room for it; the old files go on unharmed.
    pub async fn defragment(&self) -> Result<()> {
        self.node.background().defragment().await
    }
}

/// A backup that is being made. What compaction keeps for it goes when it is dropped.
pub struct Backup(maintenance::Backup);

impl std::fmt::Debug for Backup {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Backup").finish_non_exhaustive()
    }
}

impl Backup {
    /// The next bytes, up to 64 KiB; `None` at the end. Only all of them together, in order, are a backup.
    ///
    /// Not cancel-safe: when the future is dropped before it is ready, the backup is over and the next call fails.
    ///
    /// # Errors
    /// `Corrupt` and `Io` for the storage; `Stopped` when the member stops.
    pub async fn next(&mut self) -> Result<Option<Bytes>> {
        self.0.next().await
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
            if self.node.is_condemned() {
                return Err(ApplyError::Corrupt.into());
            }
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
