//! The client: one set of typed calls, whatever way there is to the store.
//!
//! | client | made by | its calls |
//! |---|---|---|
//! | in process | [`Server::client`](crate::Server::client) | are the member's own: no socket, no encoding, and any executor will do |
//! | remote | [`Client::remote`] | go to the members of a quorate cluster, or of an etcd, over gRPC, and from one that fails to the next; in TLS where an endpoint's URL says so, and as a user where there are users |
//!
//! Requests and answers are etcd's messages; [`Client::put`], [`Client::get`], [`Client::delete`] and others are shorthands. Errors are of
//! the same [kinds](crate::ErrorKind) everywhere. A client is cheap to clone. One in process outlives its server: then its calls end with
//! [`Error::Stopped`].
//!
//! # What is built on the calls
//! - [`Client::list`] and [`Client::pages`]: many keys, all as they were at one revision.
//! - [`Client::list_then_watch`]: a listing, and everything behind it; listed again when history was compacted.
//! - [`Client::create`], [`Client::compare_and_swap`], [`Client::compare_and_delete`].
//! - [`Client::session`]: a lease that is kept alive, and a word in time when it can be no more; with it [locks](Session::lock) and
//!   [elections](Session::election), laid out as etcd's, so that etcdctl stands in the same queues.
//! - [`Client::namespaced`]: a part of the key space as if it were the whole.
//!
//! ```
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(async {
//! # let dir = tempfile::tempdir()?;
//! # let mut config = quorate::Config::default();
//! # config.data_dir = Some(dir.path().into());
//! # config.listen_client_urls = vec!["http://127.0.0.1:0".parse()?];
//! # config.listen_peer_urls.clear();
//! # let server = quorate::Server::start(config).await?;
//! # let urls = [server.client_addrs()[0]].map(|address| format!("http://{address}"));
//! use quorate::Client;
//! let here = server.client();
//! let there = Client::remote(urls.iter().map(|url| url.parse()).collect::<Result<Vec<_>, _>>()?, Default::default())?;
//! here.put("volumes/a", "3 replicas").await?;
//! assert_eq!(there.get("volumes/a").await?, here.get("volumes/a").await?);
//!
//! let session = there.session(10).await?;
//! let lock = session.lock("maintenance").await?;
//! assert!(lock.revision() > 2); // grows from holder to holder: what is written under the lock can be fenced with it
//! lock.unlock().await?;
//! session.close().await?;
//! # server.shutdown().await?;
//! # Ok(())
//! # })
//! # }
//! ```

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use bytes::{Bytes, BytesMut};

use crate::api::Api;
use crate::config::Url;
use crate::error::{ApplyError, Error, Result};
use crate::node::Node;
use crate::proto::KeyValue;
use crate::proto::etcdserverpb::{
    AlarmMember, AlarmRequest, AlarmResponse, CompactionRequest, CompactionResponse, DeleteRangeRequest, DeleteRangeResponse,
    HashKvResponse, LeaseGrantRequest, LeaseGrantResponse, LeaseRevokeRequest, LeaseRevokeResponse, Member, PutRequest, PutResponse,
    RangeRequest, RangeResponse, StatusResponse, TxnRequest, TxnResponse, WatchCreateRequest, alarm_request::AlarmAction,
};

mod backend;
mod election;
mod in_process;
mod list;
mod lock;
mod namespace;
mod remote;
mod session;
mod swap;
mod turns;
mod watch;

use backend::Backend;
pub(crate) use backend::RuntimeEnd;
use in_process::{InProcess, InProcessWatch};
use namespace::Namespace;
use watch::{Source, decode};

pub use crate::config::TlsFiles;
pub use election::{Election, Leadership, Observer};
pub use list::{ListUpdate, ListWatch, Listing, Pages};
pub use lock::Lock;
pub use remote::{Endpoints, RemoteOptions, Secret};
pub(crate) use remote::{Fault, Line, Lines, Ticket};
pub use session::Session;
pub use swap::Swap;
pub use watch::{EventKind, WatchEvent, WatchMessage, Watcher};

/// A client of a store. See the [module](self).
#[derive(Clone)]
pub struct Client {
    backend: Backend,
    space: Option<Namespace>,
    gate: Option<Arc<Gate>>,
}

/// Stops writes before anybody is asked, while it is known that nobody would answer.
#[derive(Debug, Default)]
pub(crate) struct Gate {
    is_shut: AtomicBool,
    why: Mutex<String>,
}

impl Gate {
    /// Shuts it, or opens it.
    pub fn set(&self, why: Option<&str>) {
        if let Some(why) = why {
            why.clone_into(&mut crate::lock::lock(&self.why));
        }
        self.is_shut.store(why.is_some(), Ordering::Release);
    }

    /// # Errors
    /// `Unavailable` while it is shut.
    async fn pass(&self) -> Result<()> {
        if !self.is_shut.load(Ordering::Acquire) {
            return Ok(());
        }
        // Who tries again and again lets others run in between.
        tokio::task::yield_now().await;
        Err(Error::Unavailable(format!("the store is read-only: {}", crate::lock::lock(&self.why))))
    }
}

impl std::fmt::Debug for Client {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut f = f.debug_struct("Client");
        match &self.backend {
            Backend::InProcess(member) => f.field("member", &member.node.identity),
            Backend::Remote(remote) => f.field("endpoint", &remote.endpoint()),
        };
        f.finish_non_exhaustive()
    }
}

/// Where the keys end that begin with `prefix`: the `range_end` of a request for all of them. A prefix without an end (empty, or all bytes
/// 255) has all keys from it on: `"\0"`.
///
/// ```
/// use quorate::client::prefix_end;
/// assert_eq!(prefix_end(b"volumes/"), "volumes0");
/// assert_eq!(prefix_end(b"\xff\xff"), "\0");
/// ```
pub fn prefix_end(prefix: &[u8]) -> Bytes {
    let mut end = BytesMut::from(prefix);
    while let Some(last) = end.last_mut() {
        if *last < u8::MAX {
            *last += 1;
            return end.freeze();
        }
        end.truncate(end.len() - 1);
    }
    Bytes::from_static(&[0])
}

/// Key and end of a range of all keys with that prefix.
fn prefix_range(prefix: Bytes) -> (Bytes, Bytes) {
    let end = prefix_end(&prefix);
    if prefix.is_empty() { (Bytes::from_static(&[0]), end) } else { (prefix, end) }
}

impl Client {
    pub(crate) fn local(node: Arc<Node>, api: Api) -> Self {
        Client { backend: Backend::InProcess(InProcess { node, api }), space: None, gate: None }
    }

    /// A client of a cluster in other processes, quorate's or etcd's. It connects with its first call, to whichever of the endpoints takes
    /// it, and stays with that one until it fails.
    ///
    /// Make it on a tokio runtime: that one then has its connections and timers. Its calls may be made from anywhere, as long as that runtime
    /// lives.
    ///
    /// # Errors
    /// `Config` when there is no runtime, an option makes no sense, a file for TLS cannot be used, or an endpoint has an `https` URL and there
    /// are no files. Endpoints that cannot be reached are told by the calls.
    pub fn remote(endpoints: impl Into<Endpoints>, options: RemoteOptions) -> Result<Client> {
        Self::remote_until(endpoints, options, RuntimeEnd::default())
    }

    /// The same on a runtime of which the end is announced: calls then end with [`Error::Stopped`], as those in process do.
    pub(crate) fn remote_until(endpoints: impl Into<Endpoints>, options: RemoteOptions, end: RuntimeEnd) -> Result<Client> {
        let remote = remote::Remote::new(endpoints.into(), options, end)?;
        Ok(Client { backend: Backend::Remote(remote), space: None, gate: None })
    }

    /// The same, whose writes stop at a gate. Leases are renewed and revoked past it.
    pub(crate) fn gated(self, gate: Arc<Gate>) -> Client {
        Client { gate: Some(gate), ..self }
    }

    async fn pass(&self) -> Result<()> {
        match &self.gate {
            Some(gate) => gate.pass().await,
            None => Ok(()),
        }
    }

    /// The same store, confined to the keys that begin with `prefix`, and without that prefix: keys, ranges, watches, Txns, locks and
    /// elections, as in etcd's namespace package. Clients without the namespace see the keys whole.
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
    /// let tenant = client.namespaced("tenants/a/");
    /// tenant.put("volume", "1").await?;
    /// assert_eq!(tenant.list("").await?.kvs[0].key, "volume");
    /// assert_eq!(client.list("").await?.kvs[0].key, "tenants/a/volume");
    /// # server.shutdown().await?;
    /// # Ok(())
    /// # })
    /// # }
    /// ```
    pub fn namespaced(&self, prefix: impl Into<Bytes>) -> Client {
        Client { backend: self.backend.clone(), space: Namespace::within(self.space.as_ref(), prefix.into()), gate: self.gate.clone() }
    }

    /// Where the member is that answers now; `None` in process, and while there is no connection.
    pub fn endpoint(&self) -> Option<Url> {
        match &self.backend {
            Backend::InProcess(_) => None,
            Backend::Remote(remote) => remote.endpoint(),
        }
    }

    // ---- Keys

    /// Puts a key.
    ///
    /// # Errors
    /// etcd's outcomes as [`Error::Apply`]. After an error of the kind [`OutcomeUnknown`](crate::ErrorKind::OutcomeUnknown) it is open whether it was
    /// written, or will be; after any other it was not, and will not be. A remote client tries a write again by itself only when it is
    /// certain that nothing was done.
    pub async fn put(&self, key: impl Into<Bytes>, value: impl Into<Bytes>) -> Result<PutResponse> {
        self.put_with(PutRequest { key: key.into(), value: value.into(), ..PutRequest::default() }).await
    }

    /// Puts a key, with all that a request can say.
    ///
    /// # Errors
    /// As [`put`](Self::put).
    pub async fn put_with(&self, request: PutRequest) -> Result<PutResponse> {
        self.pass().await?;
        let Some(space) = &self.space else { return self.backend.put(request).await };
        space.was_put(self.backend.put(space.put(request)?).await?)
    }

    /// Reads a key as it is now; `None` when there is none. Linearizable: it sees every write acknowledged before.
    ///
    /// # Errors
    /// etcd's outcomes as [`Error::Apply`].
    pub async fn get(&self, key: impl Into<Bytes>) -> Result<Option<KeyValue>> {
        let response = self.range(RangeRequest { key: key.into(), ..RangeRequest::default() }).await?;
        response.kvs.first().map(decode).transpose()
    }

    /// Reads keys. Pairs of the answer are [`EncodedKv`](crate::proto::EncodedKv)s; `decode` them.
    ///
    /// A `serializable` read is answered from what one member has, without a leader, too; after a failover it may be older than the one
    /// before.
    ///
    /// # Errors
    /// etcd's outcomes as [`Error::Apply`].
    pub async fn range(&self, request: RangeRequest) -> Result<RangeResponse> {
        let Some(space) = &self.space else { return self.backend.range(request).await };
        space.ranged(self.backend.range(space.range(request)?).await?)
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
        self.pass().await?;
        let Some(space) = &self.space else { return self.backend.delete_range(request).await };
        space.deleted(self.backend.delete_range(space.delete(request)?).await?)
    }

    /// Compares, and carries out one of two lists of operations, as one.
    ///
    /// # Errors
    /// As [`put`](Self::put): after an error that leaves it open all of it or nothing may have been done; after any other, none of it.
    pub async fn txn(&self, request: TxnRequest) -> Result<TxnResponse> {
        // What only reads is up to the servers, which may read what they have.
        if !crate::mvcc::txn::is_read_only(&request) {
            self.pass().await?;
        }
        let Some(space) = &self.space else { return self.backend.txn(request).await };
        space.done(self.backend.txn(space.txn(request)?).await?)
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
        self.pass().await?;
        self.backend.compact(request).await
    }

    /// Watches keys. The request's `watch_id` and `fragment` mean nothing here. It begins at `start_revision`; without, now, which for a
    /// remote client is [a little later](Watcher::started).
    ///
    /// # Errors
    /// None yet. What is wrong with the request, [`Watcher::next`] says.
    pub fn watch(&self, request: WatchCreateRequest) -> Result<Watcher> {
        let request = match &self.space {
            Some(space) => space.watch(request),
            None => request,
        };
        let source = match &self.backend {
            Backend::InProcess(member) => Source::InProcess(Box::new(InProcessWatch::new(member, request))),
            Backend::Remote(remote) => Source::Remote(remote.watch(request)),
        };
        Ok(Watcher::new(source, self.space.clone()))
    }

    // ---- Leases

    /// Grants a lease of `ttl` seconds; with `id` 0 the server picks one.
    ///
    /// # Errors
    /// As [`put`](Self::put).
    pub async fn lease_grant(&self, id: i64, ttl: i64) -> Result<LeaseGrantResponse> {
        self.pass().await?;
        self.backend.lease_grant(LeaseGrantRequest { id, ttl }).await
    }

    /// Ends a lease and deletes its keys.
    ///
    /// # Errors
    /// As [`put`](Self::put).
    pub async fn lease_revoke(&self, id: i64) -> Result<LeaseRevokeResponse> {
        self.backend.lease_revoke(LeaseRevokeRequest { id }).await
    }

    /// Renews a lease for its whole TTL, which is returned in seconds. A [`Session`] does so by itself.
    ///
    /// # Errors
    /// [`ApplyError::LeaseNotFound`] when there is none.
    pub async fn lease_keep_alive(&self, id: i64) -> Result<i64> {
        match self.backend.lease_renew(id).await? {
            0 => Err(ApplyError::LeaseNotFound.into()),
            ttl => Ok(ttl),
        }
    }

    /// The seconds that a lease was granted for and has left, and the keys attached to it; `None` when there is none.
    ///
    /// # Errors
    /// As [`get`](Self::get).
    pub async fn lease_time_to_live(&self, id: i64) -> Result<Option<LeaseTime>> {
        let found = self.backend.lease_time_to_live(id).await?;
        Ok(match &self.space {
            Some(space) => found.map(|lease| space.lease(lease)),
            None => found,
        })
    }

    /// The ids of all leases, the one to expire first at the front.
    ///
    /// # Errors
    /// As [`get`](Self::get).
    pub async fn leases(&self) -> Result<Vec<i64>> {
        self.backend.leases().await
    }

    // ---- Members

    /// Reads, raises or lowers alarms.
    ///
    /// # Errors
    /// As [`put`](Self::put).
    pub async fn alarm(&self, request: AlarmRequest) -> Result<AlarmResponse> {
        self.backend.alarm(request).await
    }

    /// The alarms that are raised.
    ///
    /// # Errors
    /// As [`get`](Self::get).
    pub async fn alarm_list(&self) -> Result<Vec<AlarmMember>> {
        Ok(self.alarm(AlarmRequest { action: AlarmAction::Get as i32, ..AlarmRequest::default() }).await?.alarms)
    }

    /// Lowers an alarm, and returns what was lowered. A default `AlarmMember`, of no member and no type, stands for all that are raised.
    ///
    /// # Errors
    /// As [`put`](Self::put).
    pub async fn alarm_disarm(&self, alarm: AlarmMember) -> Result<Vec<AlarmMember>> {
        let chosen = if alarm == AlarmMember::default() { self.alarm_list().await? } else { vec![alarm] };
        let mut lowered = Vec::new();
        for AlarmMember { member_id, alarm } in chosen {
            let request = AlarmRequest { action: AlarmAction::Deactivate as i32, member_id, alarm };
            lowered.extend(self.alarm(request).await?.alarms);
        }
        Ok(lowered)
    }

    /// The members of the cluster in the order of their ids.
    ///
    /// # Errors
    /// As [`get`](Self::get).
    pub async fn member_list(&self) -> Result<Vec<Member>> {
        self.backend.member_list().await
    }

    /// How the member is that this client talks to: versions, leader, term, how far log and state have come, alarms (`errors`), and sizes in
    /// bytes. It asks no other member, so it answers without a leader, too.
    ///
    /// # Errors
    /// As [`get`](Self::get).
    pub async fn member_status(&self) -> Result<StatusResponse> {
        self.backend.member_status().await
    }

    // What is known without asking. In process that is live; a remote client knows what it was told last, and before that nothing.

    /// The alarms that are raised, without asking anyone: as far as this member has applied the log. A remote client gives what
    /// [`alarm_list`](Self::alarm_list) told it last, and none before that.
    pub fn last_alarms(&self) -> Vec<AlarmMember> {
        match &self.backend {
            Backend::InProcess(member) => member.node.alarms(),
            Backend::Remote(remote) => remote.heard().alarms,
        }
    }

    /// The members of the cluster in the order of their ids, without asking anyone: as far as this member has applied the log. A remote
    /// client gives what [`member_list`](Self::member_list) told it last, and none before that.
    pub fn last_members(&self) -> Vec<Member> {
        match &self.backend {
            Backend::InProcess(member) => member.api.members(),
            Backend::Remote(remote) => remote.heard().members,
        }
    }

    /// How this member is, without asking anyone. A remote client gives what [`member_status`](Self::member_status) told it last, and an
    /// empty one before that.
    pub fn last_status(&self) -> StatusResponse {
        match &self.backend {
            Backend::InProcess(member) => member.api.status_now(),
            Backend::Remote(remote) => remote.heard().status,
        }
    }

    /// The newest revision that this client knows of, without asking anyone: that this member has applied; for a remote client, the newest
    /// that an answer has told, and 0 before the first.
    pub fn revision(&self) -> i64 {
        match &self.backend {
            Backend::InProcess(member) => member.node.store().revision(),
            Backend::Remote(remote) => remote.revision(),
        }
    }

    /// The CRC-32C of the history up to a revision (0: all of it), as etcd's HashKV computes it: `hash`, over the revisions behind
    /// `compact_revision` (-1: all from the first) up to `hash_revision`. Members of which these three are equal have the same history.
    ///
    /// # Errors
    /// `Compacted` and `FutureRevision` as [`Error::Apply`].
    pub async fn hash_kv(&self, revision: i64) -> Result<HashKvResponse> {
        self.backend.hash_kv(revision).await
    }

    /// Begins a backup: all keys with their history, leases, alarms and members, as they are at one moment, in this crate's own
    /// checksummed format, or an etcd's in its own. Compaction waits for it; take its chunks, or drop it.
    ///
    /// # Errors
    /// As [`get`](Self::get).
    pub async fn backup(&self) -> Result<Backup> {
        Ok(Backup(match &self.backend {
            Backend::InProcess(member) => Chunks::InProcess(Box::new(member.backup().await?)),
            Backend::Remote(remote) => Chunks::Remote(Box::new(Box::pin(remote.backup()).await?)),
        }))
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
        self.backend.defragment().await
    }
}

/// A backup that is being made. What compaction keeps for it goes when it is dropped.
pub struct Backup(Chunks);

enum Chunks {
    InProcess(Box<crate::api::maintenance::Backup>),
    Remote(Box<remote::Backup>),
}

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
    /// `Corrupt` and `Io` for the storage; `Stopped` when the member stops; `Unavailable` when the connection breaks: another has to be begun.
    pub async fn next(&mut self) -> Result<Option<Bytes>> {
        match &mut self.0 {
            Chunks::InProcess(backup) => backup.next().await,
            Chunks::Remote(backup) => backup.next().await,
        }
    }
}

/// What is left of a lease.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct LeaseTime {
    /// The TTL that was granted, in seconds.
    pub granted: i64,
    /// Seconds until it expires.
    pub remaining: i64,
    /// The keys attached to it, in order.
    pub keys: Vec<Bytes>,
}
