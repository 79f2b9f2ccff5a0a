//! The members in other processes: calls over gRPC, and from a member that fails to the next.
//!
//! ```text
//! call ── link: the connection in use, or a new one to the next endpoint that takes it
//!      ── attempt ── answer                                        -> done
//!                 ── certain that nothing was done                 -> leave this member, try the next
//!                 ── no answer, or one that leaves the outcome open -> a read: leave this member, try the next
//!                                                                  -> a write: say so
//! ```
//!
//! # Rules
//! - A write is sent a second time only when it is certain that nothing came of the first: it never left (`verdict.rs` knows when), or the
//!   member refused it without looking, having no leader or no vote. So no write is carried out twice by our own doing.
//! - A read is tried again until it is answered, or its time is up. A member that is silent is given half of that time.
//! - Each call but a serializable read, a status and a backup carries `hasleader: true`: a member that has lost its leader refuses it at
//!   once, and the next is asked.
//! - Whether TLS is spoken, the URL of an endpoint says (`dial.rs`). A user's calls show a token (`login.rs`); one that is refused for its token
//!   has done nothing, and is made again with another.
//! - All calls of a client share one connection. It is replaced when it fails, for all of them. Only renewals of sessions that the member in use
//!   does not answer in time go to all members at once (`renew.rs`).
//!
//! # Caveats
//! - Name resolution is the system's, within the connect timeout.
//! - Pings keep to what etcd's servers allow (none while nothing is under way, and not more often than every five seconds).

use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use bytes::Bytes;
use futures_util::stream;
use rand::Rng;
use tokio::runtime::Handle;
use tokio::time::Instant;
use tonic::metadata::AsciiMetadataValue;
use tonic::{Request, Response, Status, Streaming};

use super::LeaseTime;
use super::backend::{RuntimeEnd, Task, Timers};
use crate::config::Url;
use crate::error::{Error, Result};
use crate::lock::lock;
use crate::mvcc::txn;
use crate::proto::etcdserverpb::cluster_client::ClusterClient;
use crate::proto::etcdserverpb::kv_client::KvClient;
use crate::proto::etcdserverpb::lease_client::LeaseClient;
use crate::proto::etcdserverpb::maintenance_client::MaintenanceClient;
use crate::proto::etcdserverpb::{
    AlarmMember, AlarmRequest, AlarmResponse, CompactionRequest, CompactionResponse, DefragmentRequest, DeleteRangeRequest,
    DeleteRangeResponse, HashKvRequest, HashKvResponse, LeaseGrantRequest, LeaseGrantResponse, LeaseKeepAliveRequest,
    LeaseKeepAliveResponse, LeaseLeasesRequest, LeaseRevokeRequest, LeaseRevokeResponse, LeaseTimeToLiveRequest, Member, MemberListRequest,
    PutRequest, PutResponse, RangeRequest, RangeResponse, ResponseHeader, SnapshotRequest, SnapshotResponse, StatusRequest, StatusResponse,
    TxnRequest, TxnResponse, WatchCreateRequest, alarm_request::AlarmAction,
};
use links::{Link, Links};
use login::ENTRIES_MAX;
use verdict::{Verdict, verdict};

mod dial;
mod links;
mod login;
mod options;
pub(super) mod renew;
mod verdict;
pub(super) mod watch;

pub(crate) use dial::{Line, Lines};
pub(crate) use login::{Fault, Ticket};
pub use options::{Endpoints, RemoteOptions, Secret};

/// Pauses between attempts once every endpoint has failed: the first, and what doubling it comes to at most. A random part is added, so
/// that many clients do not come back all at once.
const PAUSE_MIN: Duration = Duration::from_millis(50);
const PAUSE_MAX: Duration = Duration::from_secs(1);

/// How often the members are asked for each other, for a client that follows them.
const FOLLOW_INTERVAL: Duration = Duration::from_secs(30);

/// The same, after it has failed.
const FOLLOW_RETRY: Duration = Duration::from_secs(2);

#[derive(Clone)]
pub(super) struct Remote {
    shared: Arc<Shared>,
    pub timers: Timers,
}

struct Shared {
    options: RemoteOptions,
    links: Links,
    /// The newest revision that an answer has told.
    revision: AtomicI64,
    heard: Mutex<Heard>,
    /// Follows the members, if that is asked for. It ends with the last client.
    follower: Mutex<Option<Task>>,
}

/// What members have told last.
#[derive(Clone, Default)]
pub(super) struct Heard {
    pub members: Vec<Member>,
    pub alarms: Vec<AlarmMember>,
    pub status: StatusResponse,
}

/// What is to be known of a call to try it rightly.
#[derive(Clone, Copy)]
struct Terms {
    /// It changes nothing, or comes to the same when it is done twice.
    is_read: bool,
    /// It may take as long as it takes.
    is_long: bool,
}

impl Terms {
    const WRITE: Terms = Terms { is_read: false, is_long: false };
    const READ: Terms = Terms { is_read: true, is_long: false };

    fn long(self) -> Terms {
        Terms { is_long: true, ..self }
    }
}

/// Pauses that grow.
pub(super) struct Pauses(Duration);

impl Pauses {
    pub fn new() -> Self {
        Pauses(PAUSE_MIN)
    }

    pub fn next(&mut self) -> Duration {
        let pause = self.0;
        self.0 = (2 * pause).min(PAUSE_MAX);
        pause + rand::rng().random_range(Duration::ZERO..=pause / 2)
    }

    pub fn reset(&mut self) {
        *self = Self::new();
    }
}

/// Logging in has failed, so what it was for was not sent.
fn not_sent(err: Error) -> Error {
    if err.kind().nothing_was_done() { err } else { Error::Unavailable(format!("logging in: {err}")) }
}

/// A request that a member without a leader refuses.
fn led<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.metadata_mut().insert("hasleader", AsciiMetadataValue::from_static("true"));
    request
}

impl Remote {
    pub fn new(endpoints: Endpoints, options: RemoteOptions, end: RuntimeEnd) -> Result<Self> {
        let runtime = Handle::try_current().map_err(|err| Error::Config(format!("a remote client has to be made on a runtime: {err}")))?;
        let shared = Arc::new(Shared {
            links: Links::new(endpoints.0, &options)?,
            options,
            revision: AtomicI64::new(0),
            heard: Mutex::default(),
            follower: Mutex::default(),
        });
        let remote = Remote { shared, timers: Timers::new(runtime, end) };
        if remote.shared.options.follow_members {
            let follow = follow(Arc::downgrade(&remote.shared), remote.timers.clone());
            *lock(&remote.shared.follower) = Some(Task::spawn(remote.timers.runtime(), follow));
        }
        Ok(remote)
    }

    pub fn endpoint(&self) -> Option<Url> {
        self.shared.links.current().map(|link| link.url)
    }

    pub fn revision(&self) -> i64 {
        self.shared.revision.load(Ordering::Relaxed)
    }

    pub fn heard(&self) -> Heard {
        lock(&self.shared.heard).clone()
    }

    fn note(&self, header: Option<&ResponseHeader>) {
        if let Some(header) = header {
            self.shared.revision.fetch_max(header.revision, Ordering::Relaxed);
        }
    }

    /// Makes a call, as the head of this file has it.
    async fn call<T, Fut>(&self, terms: Terms, attempt: impl Fn(Link) -> Fut) -> Result<T>
    where
        Fut: Future<Output = Result<Response<T>, Status>>,
    {
        let Shared { options, links, .. } = &*self.shared;
        self.timers.check()?;
        let deadline = Instant::now() + options.request_timeout;
        let mut pauses = Pauses::new();
        let (mut failures, mut entries) = (0, 0);
        // What the attempt before has failed with: it says more than that there was no time for another one.
        let mut last = None;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let err = match self.timers.within(Some(left), links.link(&self.timers)).await {
                Err(Error::Timeout) => last.take().unwrap_or_else(|| links.too_slow()),
                Ok(Err(err @ Error::Unavailable(_))) => err,
                Ok(Err(err)) | Err(err) => return Err(err),
                Ok(Ok(link)) => {
                    let left = deadline.saturating_duration_since(Instant::now());
                    let limit = match (terms.is_long, terms.is_read) {
                        (true, _) => None,
                        (false, true) => Some((options.request_timeout / 2).min(left)),
                        (false, false) => Some(left),
                    };
                    let (err, again) = match self.enter(&link, left).await? {
                        Err(err) => (err, true),
                        Ok(ticket) => match self.timers.within(limit, attempt(link.clone())).await {
                            Ok(Ok(answer)) => return Ok(answer.into_inner()),
                            Ok(Err(status)) => match verdict(&status) {
                                Verdict::Entry(err) if entries < ENTRIES_MAX && link.line.renew(ticket, &err) => {
                                    entries += 1;
                                    continue;
                                }
                                Verdict::Answer(err) | Verdict::Entry(err) => return Err(err),
                                Verdict::NotDone(err) => (err, true),
                                Verdict::Open(err) => (err, terms.is_read),
                            },
                            Err(Error::Timeout) => (Error::Timeout, terms.is_read),
                            Err(err) => return Err(err),
                        },
                    };
                    tracing::debug!(endpoint = %link.url, error = %err, again, "a call has failed");
                    links.leave(&link);
                    if !again {
                        return Err(err);
                    }
                    failures += 1;
                    if failures < links.count() && Instant::now() < deadline {
                        continue;
                    }
                    err
                }
            };
            let pause = pauses.next();
            if Instant::now() + pause >= deadline {
                return Err(err);
            }
            last = Some(err);
            self.timers.sleep(pause).await?;
        }
    }

    /// Sees to it that a call over that link can show who calls. The inner error is one after which another member may be asked: nothing of
    /// the call was sent.
    ///
    /// # Errors
    /// That the user is not taken; `Stopped`.
    async fn enter(&self, link: &Link, left: Duration) -> Result<Result<Ticket>> {
        match self.timers.within(Some(left), link.line.enter()).await {
            Ok(Ok(ticket)) => Ok(Ok(ticket)),
            Ok(Err(status)) => match verdict(&status) {
                Verdict::Answer(err) | Verdict::Entry(err) => Err(err),
                Verdict::NotDone(err) | Verdict::Open(err) => Ok(Err(not_sent(err))),
            },
            Err(Error::Timeout) => Ok(Err(Error::Unavailable(format!("{}: logging in took too long", link.url)))),
            Err(err) => Err(err),
        }
    }

    // ---- Keys

    pub async fn range(&self, request: RangeRequest) -> Result<RangeResponse> {
        let answer = self.call(Terms::READ, |link| {
            let request = if request.serializable { Request::new(request.clone()) } else { led(request.clone()) };
            async move { kv(link).range(request).await }
        });
        let answer = answer.await?;
        self.note(answer.header.as_ref());
        Ok(answer)
    }

    pub async fn put(&self, request: PutRequest) -> Result<PutResponse> {
        let answer = self.call(Terms::WRITE, |link| {
            let request = led(request.clone());
            async move { kv(link).put(request).await }
        });
        let answer = answer.await?;
        self.note(answer.header.as_ref());
        Ok(answer)
    }

    pub async fn delete_range(&self, request: DeleteRangeRequest) -> Result<DeleteRangeResponse> {
        let answer = self.call(Terms::WRITE, |link| {
            let request = led(request.clone());
            async move { kv(link).delete_range(request).await }
        });
        let answer = answer.await?;
        self.note(answer.header.as_ref());
        Ok(answer)
    }

    pub async fn txn(&self, request: TxnRequest) -> Result<TxnResponse> {
        let terms = if txn::is_read_only(&request) { Terms::READ } else { Terms::WRITE };
        let needs_leader = !(terms.is_read && txn::is_serializable(&request));
        let answer = self.call(terms, |link| {
            let request = if needs_leader { led(request.clone()) } else { Request::new(request.clone()) };
            async move { kv(link).txn(request).await }
        });
        let answer = answer.await?;
        self.note(answer.header.as_ref());
        Ok(answer)
    }

    pub async fn compact(&self, request: CompactionRequest) -> Result<CompactionResponse> {
        let terms = if request.physical { Terms::WRITE.long() } else { Terms::WRITE };
        let answer = self.call(terms, |link| async move { kv(link).compact(led(request)).await }).await?;
        self.note(answer.header.as_ref());
        Ok(answer)
    }

    // ---- Leases

    pub async fn lease_grant(&self, request: LeaseGrantRequest) -> Result<LeaseGrantResponse> {
        let answer = self.call(Terms::WRITE, |link| async move { leases(link).lease_grant(led(request)).await }).await?;
        if answer.error.is_empty() { Ok(answer) } else { Err(Error::Refused { code: 2, message: answer.error }) }
    }

    pub async fn lease_revoke(&self, request: LeaseRevokeRequest) -> Result<LeaseRevokeResponse> {
        let answer = self.call(Terms::WRITE, |link| async move { leases(link).lease_revoke(led(request)).await }).await?;
        self.note(answer.header.as_ref());
        Ok(answer)
    }

    pub async fn lease_renew(&self, id: i64) -> Result<i64> {
        let answer = self.call(Terms::READ, |link| keep_alive(link, id));
        Ok(answer.await?.ttl.max(0))
    }

    /// As [`renew`] has it.
    pub async fn lease_renew_soon(&self, id: i64, patience: Duration, is_late: bool) -> Result<i64> {
        #[derive(Clone)]
        enum Way {
            InUse(Link),
            To(Url),
        }
        self.timers.check()?;
        let links = &self.shared.links;
        // Late, it may be another call that has gone back to a silent one.
        let in_use = links.current().filter(|_| !is_late);
        let all = || {
            if let Some(link) = &in_use {
                links.leave(link);
            }
            links.all().into_iter().map(Way::To).collect()
        };
        let ask = |way: Way| async move {
            let link = match way {
                Way::InUse(link) => link,
                Way::To(url) => links.spare(&url, &self.timers)?,
            };
            let asked = async {
                let ticket = link.line.enter().await?;
                let answer = keep_alive(link.clone(), id).await;
                if let Err(Verdict::Entry(err)) = answer.as_ref().map_err(verdict) {
                    // It is asked again in a moment.
                    link.line.renew(ticket, &err);
                }
                answer
            };
            match asked.await {
                Ok(answer) => {
                    links.adopt(link);
                    Ok(answer.into_inner().ttl.max(0))
                }
                // A connection that has failed is made anew with the next call on it.
                Err(status) => {
                    let (Verdict::Answer(err) | Verdict::Entry(err) | Verdict::NotDone(err) | Verdict::Open(err)) = verdict(&status);
                    Err(err)
                }
            }
        };
        let renewed = renew::soon(&self.timers, patience, in_use.clone().map(Way::InUse), all, ask).await;
        if renewed.is_err() {
            links.leave_spares();
        }
        renewed
    }

    pub async fn lease_time_to_live(&self, id: i64) -> Result<Option<LeaseTime>> {
        let request = LeaseTimeToLiveRequest { id, keys: true };
        let found = self.call(Terms::READ, |link| async move { leases(link).lease_time_to_live(led(request)).await }).await?;
        let mut keys = found.keys;
        keys.sort_unstable();
        Ok((found.ttl >= 0).then_some(LeaseTime { granted: found.granted_ttl, remaining: found.ttl, keys }))
    }

    pub async fn leases(&self) -> Result<Vec<i64>> {
        let answer = self.call(Terms::READ, |link| async move { leases(link).lease_leases(led(LeaseLeasesRequest {})).await }).await?;
        Ok(answer.leases.into_iter().map(|lease| lease.id).collect())
    }

    // ---- Members

    pub async fn alarm(&self, request: AlarmRequest) -> Result<AlarmResponse> {
        let reads = request.action == AlarmAction::Get as i32;
        let terms = if reads { Terms::READ } else { Terms::WRITE };
        let answer = self.call(terms, |link| async move { maintenance(link).alarm(led(request)).await }).await?;
        if reads {
            lock(&self.shared.heard).alarms.clone_from(&answer.alarms);
        }
        Ok(answer)
    }

    pub async fn member_list(&self) -> Result<Vec<Member>> {
        let request = MemberListRequest { linearizable: true };
        let answer = self.call(Terms::READ, |link| async move { ClusterClient::new(link.line).member_list(led(request)).await });
        let mut members = answer.await?.members;
        members.sort_unstable_by_key(|member| member.id);
        lock(&self.shared.heard).members.clone_from(&members);
        Ok(members)
    }

    pub async fn member_status(&self) -> Result<StatusResponse> {
        let status = self.call(Terms::READ, |link| async move { maintenance(link).status(StatusRequest {}).await }).await?;
        self.note(status.header.as_ref());
        lock(&self.shared.heard).status.clone_from(&status);
        Ok(status)
    }

    pub async fn hash_kv(&self, revision: i64) -> Result<HashKvResponse> {
        let request = HashKvRequest { revision };
        self.call(Terms::READ.long(), |link| async move { maintenance(link).hash_kv(request).await }).await
    }

    pub async fn defragment(&self) -> Result<()> {
        self.call(Terms::READ.long(), |link| async move { maintenance(link).defragment(DefragmentRequest {}).await }).await.map(drop)
    }

    pub async fn backup(&self) -> Result<Backup> {
        let parts = self.call(Terms::READ.long(), |link| async move { maintenance(link).snapshot(SnapshotRequest {}).await }).await?;
        Ok(Backup(parts))
    }

    pub fn watch(&self, request: WatchCreateRequest) -> watch::RemoteWatch {
        watch::RemoteWatch::start(self.clone(), request)
    }
}

fn kv(link: Link) -> KvClient<Line> {
    // Large answers are the user's own: of as many keys as were asked for.
    KvClient::new(link.line).max_decoding_message_size(usize::MAX)
}

fn leases(link: Link) -> LeaseClient<Line> {
    LeaseClient::new(link.line).max_decoding_message_size(usize::MAX)
}

/// Asks a member to renew a lease.
async fn keep_alive(link: Link, id: i64) -> Result<Response<LeaseKeepAliveResponse>, Status> {
    let request = led(stream::iter([LeaseKeepAliveRequest { id }]));
    let mut answers = leases(link).lease_keep_alive(request).await?.into_inner();
    let answer = answers.message().await?.ok_or_else(|| Status::unavailable("a keep-alive has ended without an answer"))?;
    Ok(Response::new(answer))
}

fn maintenance(link: Link) -> MaintenanceClient<Line> {
    MaintenanceClient::new(link.line).max_decoding_message_size(usize::MAX)
}

/// A backup that comes from another process.
pub(super) struct Backup(Streaming<SnapshotResponse>);

impl Backup {
    pub async fn next(&mut self) -> Result<Option<Bytes>> {
        match self.0.message().await {
            Ok(part) => Ok(part.map(|part| part.blob)),
            Err(status) => Err(Error::Unavailable(format!("the backup broke off: {}", status.message()))),
        }
    }
}

/// Asks the members for each other again and again, as long as there is a client.
async fn follow(shared: Weak<Shared>, timers: Timers) {
    loop {
        let pause = {
            let Some(shared) = shared.upgrade() else { return };
            let remote = Remote { shared, timers: timers.clone() };
            match remote.member_list().await {
                Ok(members) => {
                    // A learner serves little; a member that is not started yet advertises nothing.
                    let urls = members.iter().filter(|member| !member.is_learner).flat_map(|member| &member.client_urls);
                    remote.shared.links.learn(urls.filter_map(|url| url.parse().ok()).collect());
                    FOLLOW_INTERVAL
                }
                Err(err) => {
                    tracing::debug!(error = %err, "the members could not be asked for each other");
                    FOLLOW_RETRY
                }
            }
        };
        if timers.sleep(pause).await.is_err() {
            return;
        }
    }
}
