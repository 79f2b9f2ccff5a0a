//! Messages between members: a [`Link`] to each of them, for Raft and for what members do for each other's clients.
//!
//! A link is a gRPC connection to the peer port, made when it is first needed and made anew when it broke, or has been silent; a member
//! with several peer URLs is tried at the next one after each failure. openraft asks for a link of its own for each of its tasks, so that a
//! heartbeat never waits behind entries in one queue. A member that moves is followed: connections are made to where the newest membership has it.
//! One that has moved while nobody led, of which the membership can say nothing, is tried at a [hint](Network::hint), too.
//!
//! ```text
//! Append {vote, previous, entries} + headers quorate-cluster, quorate-from, quorate-to  ->  success | conflict | higher vote
//! ```
//!
//! Every failure is told to openraft as that the member cannot be reached: it waits a moment and tries again, whatever the reason.
//!
//! # Snapshots
//! A member that lags so far that the log has been cut off before it is sent the state: in pieces of about 512 KiB, each made when the one
//! before is in a file there. So neither side has more than a piece in memory, the revision and the history below it are held as long as it
//! takes, and when a connection breaks, the piece under way is what has to be sent again. After [`STUCK`] without any progress it is given
//! up, and openraft begins with a new one. For a member that is not there at all nothing is held, and no further snapshot is begun until
//! it is: to begin one copies what is kept beside the history, on the thread that does everything.

use std::collections::BTreeMap;
use std::future::Future;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use futures_util::FutureExt;
use futures_util::future::{BoxFuture, Shared};
use openraft::error::{RPCError, ReplicationClosed, StreamingError, Unreachable};
use openraft::network::{RPCOption, RaftNetworkFactory, RaftNetworkV2};
use openraft::raft::{
    AppendEntriesRequest, AppendEntriesResponse, SnapshotResponse, TransferLeaderError, TransferLeaderRequest, TransferLeaderResponse,
    VoteRequest, VoteResponse,
};
use openraft::{AnyError, OptionalSend};
use tokio::time::Instant;
use tonic::metadata::{AsciiMetadataKey, AsciiMetadataValue};
use tonic::transport::Endpoint;
use tonic::{Code, Request, Status};

use crate::cork::{self, Corked};
use crate::error::Error;
use crate::lock::lock;
use crate::metrics::Counters;
use crate::metrics::peers::PeerMetrics;
use crate::proto::internal;
use crate::proto::peer::append_response::Outcome;
use crate::proto::peer::install_snapshot_response::Outcome as Installed;
use crate::proto::peer::peer_client::PeerClient;
use crate::proto::peer::{self, AppendRequest, AppendResponse, LogEntry};
use crate::slow::Refusals;
use crate::storage::dir::Identity;
use crate::tls::Connector;
use crate::world;

use super::apply::{Machine, SnapshotHandle};
use super::outgoing::{SnapshotStart, Writer};
use super::wire::Wire;
use super::{
    LogId, Membership, RaftEntry, TypeConfig, Vote, decode_payload, encode_payload, log_id_from_proto, log_id_to_proto, vote_from_proto,
    vote_to_proto,
};

/// Headers of every call: the cluster, who calls, and who is meant; each as 16 hexadecimal digits.
pub(crate) const CLUSTER: &str = "quorate-cluster";
pub(crate) const FROM: &str = "quorate-from";
pub(crate) const TO: &str = "quorate-to";

/// Headers of calls between members that have incarnations: the caller's, and the one that the called member is known by.
pub(crate) const FROM_INCARNATION: &str = "quorate-from-incarnation";
pub(crate) const TO_INCARNATION: &str = "quorate-to-incarnation";

/// How long making a connection may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);

/// How long a connection may go without an answer, while answers are due, before it is given up for a new one: a link that was cut and
/// is whole again is tried at once by a new connection, and by the old one only when TCP sends again.
const SILENCE: Duration = Duration::from_secs(2);

/// Heartbeats that syncing entries at another member may take, and the bytes a second that a line carries at least. What is slower is given
/// up, and tried again.
const SYNC_HEARTBEATS: u32 = 5;
const LINE_BYTES_PER_SECOND: f64 = (1 << 20) as f64;

/// The largest message between members: entries as they go into the log's frames, and what surrounds them.
pub(crate) const MESSAGE_BYTES_MAX: usize = 64 << 20;

/// How long one piece of a snapshot may take to be in a file at the other end. Beyond it it is sent again.
const PIECE_TIMEOUT: Duration = Duration::from_secs(10);

/// How long a snapshot may be without any progress. Beyond it, it is given up; what it held is let go of.
const STUCK: Duration = Duration::from_secs(60);

/// How often a member that is not there is looked for, to send it a snapshot.
const ABSENT_LOOK: Duration = Duration::from_millis(500);

/// How long to wait before a piece is sent again, or a pending installation is asked for again.
const SNAPSHOT_RETRY: Duration = Duration::from_millis(100);

/// How long one who is about to join waits for a member to say who is in the cluster.
const MEMBERS_TIMEOUT: Duration = Duration::from_secs(3);

/// Makes links to members. Clones share where the members are.
#[derive(Clone)]
pub(crate) struct Network {
    pub identity: Identity,
    pub counters: Arc<Counters>,
    /// For members with `https` URLs.
    tls: Option<Connector>,
    /// What is known of the members; none for who only fetches a state yet.
    machine: Option<Arc<Machine>>,
    /// The peer URLs of each member by the newest membership, so that a link follows a member that moves.
    book: Arc<Mutex<BTreeMap<u64, Vec<String>>>>,
    /// Where members are said to be that are not where the membership has them. One for each member at most.
    hints: Arc<Mutex<BTreeMap<u64, Hint>>>,
    /// Members that refuse this one: each heartbeat comes to a refusal.
    refused: Arc<Refusals>,
}

/// The way to one member.
#[derive(Clone)]
pub(crate) struct Link {
    ours: Network,
    id: u64,
    /// Where it was when the link was made.
    urls: Vec<String>,
    /// The URL to try, counted on after each failure.
    turn: usize,
    client: Option<PeerClient<Wire>>,
    /// The connection being made: kept when the call that began it has run out of time, for one may take longer than a heartbeat may.
    connecting: Option<Connecting>,
    /// When the member was last known to be there: its last answer, or the connection.
    heard: Instant,
}

/// A message on its way to a member. It counts as failed unless it is answered before this is dropped.
struct Sending {
    peer: Option<Arc<PeerMetrics>>,
    answered: bool,
}

impl Sending {
    fn sends(&self, bytes: usize) {
        if let Some(peer) = &self.peer {
            peer.sent_bytes.add(bytes as u64);
        }
    }

    fn is_answered(&mut self, bytes: usize) {
        self.answered = true;
        if let Some(peer) = &self.peer {
            peer.received_bytes.add(bytes as u64);
        }
    }
}

impl Drop for Sending {
    fn drop(&mut self) {
        if let (false, Some(peer)) = (self.answered, &self.peer) {
            peer.sent_failures.inc();
        }
    }
}

/// Where a member may be, and whether it is looked for there first.
struct Hint {
    url: String,
    first: bool,
}

type Connecting = Shared<BoxFuture<'static, Result<PeerClient<Wire>, Status>>>;

impl Network {
    pub fn new(identity: Identity, counters: Arc<Counters>, machine: Option<Arc<Machine>>, tls: Option<Connector>) -> Network {
        Network { identity, counters, machine, tls, book: Arc::default(), hints: Arc::default(), refused: Arc::new(Refusals::new()) }
    }

    /// What every call to a member says of both.
    fn headers(&self, to: u64) -> Vec<(&'static str, u64)> {
        let Identity { cluster_id, member_id, incarnation, .. } = self.identity;
        let known = self.machine.as_ref().and_then(|machine| lock(&machine.members).incarnation(to));
        let ours = Some(incarnation).filter(|incarnation| *incarnation != 0);
        let mut headers = vec![(CLUSTER, cluster_id), (FROM, member_id), (TO, to)];
        headers.extend(ours.map(|incarnation| (FROM_INCARNATION, incarnation)));
        headers.extend(known.map(|incarnation| (TO_INCARNATION, incarnation)));
        headers
    }

    /// Takes a note of where the members are. Connections that work are kept.
    pub fn note(&self, membership: &Membership) {
        self.counters.peers.follow(membership.nodes().map(|(&id, _)| id).filter(|id| *id != self.identity.member_id));
        let now: BTreeMap<u64, Vec<String>> = membership.nodes().map(|(&id, member)| (id, member.peer_urls.clone())).collect();
        let before = std::mem::replace(&mut *lock(&self.book), now.clone());
        // Of whom the membership has news, that is newer than any hint.
        lock(&self.hints).retain(|id, _| now.contains_key(id) && now.get(id) == before.get(id));
    }

    /// Takes a hint where a member is: it is tried there in turn with where the membership has it, until that says something else, or the
    /// hint is that. A wrong one costs a connection now and then; whoever is found there has to be the member, as everywhere. Returns
    /// whether it is news.
    pub fn hint(&self, id: u64, url: &str) -> bool {
        let is_known = lock(&self.book).get(&id).is_none_or(|urls| urls.iter().any(|known| known == url));
        let mut hints = lock(&self.hints);
        if is_known {
            hints.remove(&id);
            return false;
        }
        let is_news = hints.get(&id).is_none_or(|hint| hint.url != url);
        if is_news {
            hints.insert(id, Hint { url: url.to_owned(), first: true });
        }
        is_news
    }

    /// A link to a member.
    pub fn link(&self, id: u64, member: &internal::Member) -> Link {
        Link { ours: self.clone(), id, urls: member.peer_urls.clone(), turn: 0, client: None, connecting: None, heard: Instant::now() }
    }

    /// Asks whoever listens there for its cluster and the members: [`members_at`].
    pub async fn members_at(&self, url: &str) -> Result<peer::MembersResponse, Status> {
        members_at(url, &self.tls).await
    }
}

impl Link {
    /// Whom it leads to.
    pub fn id(&self) -> u64 {
        self.id
    }

    /// Makes the connection, unless there is one.
    ///
    /// # Errors
    /// That the member cannot be reached; nothing was sent then.
    pub async fn reach(&mut self) -> Result<PeerClient<Wire>, Status> {
        if let Some(client) = &self.client {
            return Ok(client.clone());
        }
        let connecting = match self.connecting.clone() {
            Some(connecting) => connecting,
            None => {
                let noted = lock(&self.ours.book).get(&self.id).cloned();
                let hinted = lock(&self.ours.hints).get(&self.id).filter(|hint| hint.first).map(|hint| hint.url.clone());
                let urls = noted.as_ref().unwrap_or(&self.urls);
                let url = hinted.or_else(|| urls.get(self.turn % urls.len().max(1)).cloned());
                let url = url.ok_or_else(|| Status::unavailable("it has no peer URL"))?;
                self.connecting.insert(connect(url, self.ours.tls.clone()).boxed().shared()).clone()
            }
        };
        // The caller may give up here; whoever calls next goes on.
        let connected = connecting.await;
        self.connecting = None;
        let client = connected.inspect_err(|_| self.turn_elsewhere())?;
        self.client = Some(client.clone());
        self.heard = Instant::now();
        Ok(client)
    }

    /// Calls the member.
    ///
    /// # Errors
    /// Its refusal; that it cannot be reached, and then the next call tries a new connection; or that it has not answered in time, which
    /// costs the connection only when there has been no answer for [`SILENCE`].
    pub async fn call<Req, Resp, F, Fut>(&mut self, message: Req, limit: Duration, method: F) -> Result<Resp, Status>
    where
        F: FnOnce(PeerClient<Wire>, Request<Req>) -> Fut,
        Fut: Future<Output = Result<tonic::Response<Resp>, Status>>,
        Req: prost::Message,
        Resp: prost::Message,
    {
        let mut sending = Sending { peer: self.ours.counters.peers.get(self.id), answered: false };
        let client = match tokio::time::timeout(limit, self.reach()).await {
            Ok(client) => client?,
            Err(_) => {
                self.turn_elsewhere();
                return Err(Status::unavailable("it cannot be connected to in time"));
            }
        };
        sending.sends(message.encoded_len());
        let mut request = Request::new(message);
        request.set_timeout(limit);
        for (name, id) in self.ours.headers(self.id) {
            let value = AsciiMetadataValue::try_from(format!("{id:016x}")).map_err(|err| Status::internal(err.to_string()))?;
            request.metadata_mut().insert(AsciiMetadataKey::from_static(name), value);
        }
        let answer = match tokio::time::timeout(limit, method(client, request)).await {
            Ok(answer) => answer,
            Err(_) => Err(Status::deadline_exceeded(format!("no answer within {limit:?}"))),
        };
        match &answer {
            Err(status) if status.code() == Code::DeadlineExceeded && self.heard.elapsed() < SILENCE => {}
            // A refusal, too: another member may stand where this one was.
            Err(_) => {
                self.turn_elsewhere();
                self.client = None;
            }
            Ok(answer) => {
                self.heard = Instant::now();
                sending.is_answered(answer.get_ref().encoded_len());
            }
        }
        answer.map(tonic::Response::into_inner)
    }

    /// The next connection is made to another address, if there is one. Links that are made for one question each, as for votes, shall not
    /// all go by the same hint: so whose turn it is stands beside the hint, and not in the link.
    fn turn_elsewhere(&mut self) {
        if let Some(hint) = lock(&self.ours.hints).get_mut(&self.id) {
            hint.first = !hint.first;
            if !hint.first {
                return;
            }
        }
        self.turn = self.turn.wrapping_add(1);
    }

    fn unreachable(&self, status: &Status) -> RPCError<TypeConfig> {
        if status.code() == Code::FailedPrecondition
            && let Some(unreported) = self.ours.refused.tell()
        {
            tracing::warn!(peer = %format_args!("{:x}", self.id), error = status.message(), unreported, "a member refuses this one");
        }
        RPCError::Unreachable(Unreachable::new(&AnyError::error(format!("member {:x}: {}", self.id, status.message()))))
    }

    async fn ask(
        &mut self,
        rpc: VoteRequest<TypeConfig>,
        limit: Duration,
        ask_only: bool,
    ) -> Result<VoteResponse<TypeConfig>, RPCError<TypeConfig>> {
        let request = peer::VoteRequest {
            vote: Some(vote_to_proto(&rpc.vote)),
            last: rpc.last_log_id.map(log_id_to_proto),
            transfer: rpc.leadership_transfer,
            ask_only,
        };
        let answer = self.call(request, limit, |mut client, request| async move { client.vote(request).await }).await;
        let answer = answer.map_err(|status| self.unreachable(&status))?;
        Ok(VoteResponse::new(vote_from_proto(answer.vote.unwrap_or_default()), answer.last.map(log_id_from_proto), answer.granted))
    }
}

/// Connects to a peer port, in TLS if its URL says so.
async fn connect(url: String, tls: Option<Connector>) -> Result<PeerClient<Wire>, Status> {
    #[cfg(feature = "simulation")]
    if world::is_simulated() {
        let wire = tokio::time::timeout(CONNECT_TIMEOUT, super::wire::dial(&url)).await;
        return Ok(PeerClient::new(wire.unwrap_or_else(|_| Err(Status::unavailable(format!("{url}: no connection"))))?));
    }
    let is_tls = url.starts_with("https://");
    if is_tls && tls.is_none() {
        let what = "peer-trusted-ca-file is not set, so that nobody's certificate could be trusted";
        return Err(Status::unavailable(format!("{url}: {what}")));
    }
    let endpoint = Endpoint::from_shared(url.clone()).map_err(|err| Status::unavailable(format!("{url}: {err}")))?;
    let endpoint = endpoint.http2_adaptive_window(true);
    let connecting = async {
        match tls {
            Some(tls) if is_tls => endpoint.connect_with_connector(Corked(tls)).await,
            _ => endpoint.connect_with_connector(cork::plain()).await,
        }
    };
    let connected = tokio::time::timeout(CONNECT_TIMEOUT, connecting).await;
    let connected = connected.map_err(|_| Status::unavailable(format!("{url}: no connection within {CONNECT_TIMEOUT:?}")))?;
    let channel = connected.map_err(|err| Status::unavailable(format!("{url}: {}", whole(&err))))?;
    let client = PeerClient::new(super::wire::of(channel));
    Ok(client.max_decoding_message_size(MESSAGE_BYTES_MAX).max_encoding_message_size(MESSAGE_BYTES_MAX))
}

/// An error with all that it comes from: what is on top of a failed connection says nothing.
fn whole(err: &dyn std::error::Error) -> String {
    let mut text = err.to_string();
    let mut source = err.source();
    while let Some(cause) = source {
        text += ": ";
        text += &cause.to_string();
        source = cause.source();
    }
    text
}

/// Asks whoever listens at a peer URL for its cluster and the members, as one who does not belong to it yet.
///
/// # Errors
/// That there is nobody, or nobody who says so.
pub(crate) async fn members_at(url: &str, tls: &Option<Connector>) -> Result<peer::MembersResponse, Status> {
    let asked = async {
        let answer = connect(url.to_owned(), tls.clone()).await?.members(peer::MembersRequest { newest: true }).await?;
        Ok(answer.into_inner())
    };
    tokio::time::timeout(MEMBERS_TIMEOUT, asked).await.unwrap_or_else(|_| Err(Status::deadline_exceeded(format!("{url}: no answer"))))
}

impl Link {
    /// Asks for the next piece of a snapshot; for one that has lost its state.
    ///
    /// # Errors
    /// As [`call`](Self::call).
    pub async fn get_snapshot(&mut self, id: u64, offset: u64) -> Result<peer::GetSnapshotResponse, Status> {
        let request = peer::GetSnapshotRequest { id, offset };
        self.call(request, PIECE_TIMEOUT, |mut client, request| async move { client.get_snapshot(request).await }).await
    }
}

impl RaftNetworkFactory<TypeConfig> for Network {
    type Network = Link;

    async fn new_client(&mut self, id: u64, member: &internal::Member) -> Link {
        self.link(id, member)
    }
}

impl RaftNetworkV2<TypeConfig> for Link {
    type SnapshotData = SnapshotHandle;

    async fn append_entries(
        &mut self,
        rpc: AppendEntriesRequest<TypeConfig>,
        option: RPCOption,
    ) -> Result<AppendEntriesResponse<TypeConfig>, RPCError<TypeConfig>> {
        let request = append_to_proto(&rpc);
        let limit = append_limit(option.hard_ttl(), request.entries.len(), prost::Message::encoded_len(&request));
        let answer = self.call(request, limit, |mut client, request| async move { client.append(request).await }).await;
        let answer = answer.map_err(|status| self.unreachable(&status))?;
        match answer.outcome {
            Some(Outcome::Success(_)) => Ok(AppendEntriesResponse::Success),
            Some(Outcome::Partial(upto)) => Ok(AppendEntriesResponse::PartialSuccess(upto.id.map(log_id_from_proto))),
            Some(Outcome::Conflict(_)) => Ok(AppendEntriesResponse::Conflict),
            Some(Outcome::HigherVote(vote)) => Ok(AppendEntriesResponse::HigherVote(vote_from_proto(vote))),
            None => Err(self.unreachable(&Status::internal("an answer without an outcome"))),
        }
    }

    async fn vote(&mut self, rpc: VoteRequest<TypeConfig>, option: RPCOption) -> Result<VoteResponse<TypeConfig>, RPCError<TypeConfig>> {
        self.ask(rpc, option.hard_ttl(), false).await
    }

    async fn pre_vote(
        &mut self,
        rpc: VoteRequest<TypeConfig>,
        option: RPCOption,
    ) -> Result<VoteResponse<TypeConfig>, RPCError<TypeConfig>> {
        self.ask(rpc, option.hard_ttl(), true).await
    }

    async fn transfer_leader(
        &mut self,
        rpc: TransferLeaderRequest<TypeConfig>,
        option: RPCOption,
    ) -> Result<TransferLeaderResponse<TypeConfig>, RPCError<TypeConfig>> {
        let request = peer::TransferLeaderRequest {
            vote: Some(vote_to_proto(rpc.from_leader())),
            to: *rpc.to_node_id(),
            last: rpc.last_log_id().copied().map(log_id_to_proto),
        };
        let limit = option.hard_ttl();
        let answer = self.call(request, limit, |mut client, request| async move { client.transfer_leader(request).await }).await;
        let answer = answer.map_err(|status| self.unreachable(&status))?;
        if answer.refused.is_empty() {
            return Ok(Ok(()));
        }
        tracing::warn!(peer = %format_args!("{:x}", self.id), error = answer.refused, "a member does not take the lead");
        // What it lacks is known there; openraft only logs it here.
        Ok(Err(TransferLeaderError::LogNotFlushed { expected: rpc.last_log_id().copied(), actual: None }))
    }

    async fn full_snapshot(
        &mut self,
        vote: Vote,
        snapshot: openraft::alias::SnapshotOf<TypeConfig, SnapshotHandle>,
        cancel: impl Future<Output = ReplicationClosed> + OptionalSend + 'static,
        _: RPCOption,
    ) -> Result<SnapshotResponse<TypeConfig>, StreamingError<TypeConfig>> {
        let SnapshotHandle::Outgoing(start) = snapshot.snapshot else {
            let what = format!("the snapshot for member {:x} has nothing in it", self.id);
            return Err(StreamingError::Unreachable(Unreachable::new(&AnyError::error(what))));
        };
        if self.ours.machine.as_ref().is_some_and(|machine| machine.is_corrupt(self.ours.identity.member_id)) {
            // It leads until another does; what it has is for nobody.
            let what = "this member's state is known to be wrong, and is not handed on";
            return Err(StreamingError::Unreachable(Unreachable::new(&AnyError::error(what))));
        }
        let attempt = async {
            if let Err(status) = self.ask_room().await {
                // Nothing is held for a member that is down: once it is back, openraft comes with a new snapshot.
                drop(start);
                let peer = format!("{:x}", self.id);
                tracing::warn!(peer, error = status.message(), "a member needs a snapshot, and is waited for until it takes one");
                self.wait_for_room().await;
                return Err(status);
            }
            self.send_snapshot(&vote, *start).await
        };
        let sent = tokio::select! {
            biased;
            closed = cancel => return Err(StreamingError::Closed(closed)),
            sent = attempt => sent,
        };
        sent.map(|vote| SnapshotResponse { vote }).map_err(|status| {
            tracing::warn!(peer = %format_args!("{:x}", self.id), error = status.message(), "a snapshot could not be sent");
            StreamingError::Unreachable(Unreachable::new(&AnyError::error(format!("member {:x}: {}", self.id, status.message()))))
        })
    }
}

/// How long an append may take, when a heartbeat may take `heartbeat`. Entries have to be sent, and synced there: given up too early, the same
/// ones would be sent again and again, and a member behind a slow line or disk would never get any.
fn append_limit(heartbeat: Duration, entries: usize, bytes: usize) -> Duration {
    if entries == 0 { heartbeat } else { SYNC_HEARTBEATS * heartbeat + Duration::from_secs_f64(bytes as f64 / LINE_BYTES_PER_SECOND) }
}

impl Link {
    /// Whether the member is there, and takes snapshots.
    async fn ask_room(&mut self) -> Result<(), Status> {
        // No snapshot has anything there, so that nothing comes of it.
        let request = peer::PutSnapshotRequest { offset: u64::MAX, ..peer::PutSnapshotRequest::default() };
        let answer = self.call(request, PIECE_TIMEOUT, |mut client, request| async move { client.put_snapshot(request).await }).await?;
        if answer.refused.is_empty() { Ok(()) } else { Err(Status::unavailable(answer.refused)) }
    }

    /// Waits until the member is there, however long that takes. Who waits is told when it does not matter any more.
    async fn wait_for_room(&mut self) {
        loop {
            tokio::time::sleep(ABSENT_LOOK).await;
            if self.ask_room().await.is_ok() {
                return;
            }
        }
    }

    /// Sends a snapshot and has it installed. Returns the member's vote.
    ///
    /// # Errors
    /// What went wrong; another attempt has to be made with another snapshot.
    async fn send_snapshot(&mut self, vote: &Vote, start: SnapshotStart) -> Result<Vote, Status> {
        let _sending = start.sendings.begin();
        let transfer = self.ours.counters.peers.get(self.id).map(|peer| peer.begin_sending());
        let (id, last) = (world::random(), start.position.log_id);
        let (revision, index) = (start.pin.at(), last.map_or(0, |id| id.index));
        tracing::info!(peer = %format_args!("{:x}", self.id), id = %format_args!("{id:x}"), index, revision, "sending a snapshot");
        let broken = |err: Error| Status::internal(err.to_string());
        // A member asks nobody for the time of its snapshots.
        let mut writer = Writer::new(self.ours.identity.cluster_id, self.ours.identity.member_id, 0, start).map_err(broken)?;
        let mut size = 0;
        while !writer.is_finished() {
            // The history is read by a thread that may wait for the disk.
            let made = world::blocking(&tokio::runtime::Handle::current(), move || writer.piece().map(|piece| (writer, piece)));
            let (back, piece) = made.await.map_err(|err| Status::internal(err.to_string()))?.map_err(broken)?;
            writer = back;
            if !piece.is_empty() {
                self.put_piece(id, vote.leader_id.term, size, &piece).await?;
                size += piece.len() as u64;
                self.ours.counters.snapshot_sent_bytes.add(piece.len() as u64);
            }
        }
        // What it holds of the history is not needed for the rest.
        drop(writer);
        let vote = self.have_installed(id, size, vote, last).await?;
        self.ours.counters.snapshots_sent.inc();
        if let Some(transfer) = transfer {
            transfer.done();
        }
        tracing::info!(peer = %format_args!("{:x}", self.id), id = %format_args!("{id:x}"), size, "a snapshot was sent");
        Ok(vote)
    }

    /// Sends a piece, again and again, until the member has it.
    async fn put_piece(&mut self, id: u64, term: u64, offset: u64, piece: &Bytes) -> Result<(), Status> {
        let crc32c = crc32c::crc32c(piece);
        let began = Instant::now();
        let end = offset + piece.len() as u64;
        loop {
            let request = peer::PutSnapshotRequest { id, term, offset, bytes: piece.clone(), crc32c };
            let answer = self.call(request, PIECE_TIMEOUT, |mut client, request| async move { client.put_snapshot(request).await }).await;
            let failed = match answer {
                Ok(answer) if answer.refused.is_empty() && answer.have == end => return Ok(()),
                // It came damaged.
                Ok(answer) if answer.refused.is_empty() && answer.have == offset => Status::data_loss("it does not arrive whole"),
                Ok(answer) if answer.refused.is_empty() => {
                    return Err(Status::aborted(format!("the member has {} bytes of the snapshot instead of {offset}", answer.have)));
                }
                Ok(answer) => Status::unavailable(answer.refused),
                Err(status) => status,
            };
            if failed.code() == Code::FailedPrecondition || began.elapsed() > STUCK {
                return Err(failed);
            }
            tracing::debug!(peer = %format_args!("{:x}", self.id), offset, error = failed.message(), "a piece of a snapshot is sent again");
            tokio::time::sleep(SNAPSHOT_RETRY).await;
        }
    }

    /// Asks for the installation of what was sent until it is done.
    async fn have_installed(&mut self, id: u64, size: u64, vote: &Vote, last: Option<LogId>) -> Result<Vote, Status> {
        let mut heard = Instant::now();
        loop {
            let request = peer::InstallSnapshotRequest { id, size, vote: Some(vote_to_proto(vote)), last: last.map(log_id_to_proto) };
            let answer =
                self.call(request, PIECE_TIMEOUT, |mut client, request| async move { client.install_snapshot(request).await }).await;
            match answer.map(|answer| answer.outcome) {
                Ok(Some(Installed::Vote(vote))) => return Ok(vote_from_proto(vote)),
                Ok(Some(Installed::Refused(what))) => return Err(Status::aborted(what)),
                // However long it takes, for it is at it.
                Ok(Some(Installed::Pending(_))) => heard = Instant::now(),
                Ok(None) => return Err(Status::internal("an answer without an outcome")),
                Err(status) if status.code() == Code::FailedPrecondition || heard.elapsed() > STUCK => return Err(status),
                Err(_) => {}
            }
            tokio::time::sleep(SNAPSHOT_RETRY).await;
        }
    }
}

fn append_to_proto(rpc: &AppendEntriesRequest<TypeConfig>) -> AppendRequest {
    let entries =
        rpc.entries.iter().map(|entry| LogEntry { id: Some(log_id_to_proto(entry.log_id)), payload: encode_payload(&entry.payload) });
    AppendRequest {
        vote: Some(vote_to_proto(&rpc.vote)),
        previous: rpc.prev_log_id.map(log_id_to_proto),
        entries: entries.collect(),
        committed: rpc.leader_commit.map(log_id_to_proto),
    }
}

/// Reads back what [`append_to_proto`] wrote.
///
/// # Errors
/// What is wrong with it.
pub(crate) fn append_from_proto(request: AppendRequest) -> Result<AppendEntriesRequest<TypeConfig>, String> {
    let mut entries = Vec::with_capacity(request.entries.len());
    for entry in request.entries {
        let log_id = log_id_from_proto(entry.id.ok_or("an entry without an id")?);
        let payload = decode_payload(entry.payload).map_err(|what| format!("entry {}: {what}", log_id.index))?;
        entries.push(RaftEntry { log_id, payload });
    }
    Ok(AppendEntriesRequest {
        vote: vote_from_proto(request.vote.ok_or("entries without a vote")?),
        prev_log_id: request.previous.map(log_id_from_proto),
        entries,
        leader_commit: request.committed.map(log_id_from_proto),
    })
}

pub(crate) fn append_answer(answer: AppendEntriesResponse<TypeConfig>) -> AppendResponse {
    let outcome = match answer {
        AppendEntriesResponse::Success => Outcome::Success(peer::Nothing {}),
        AppendEntriesResponse::PartialSuccess(upto) => Outcome::Partial(peer::Upto { id: upto.map(log_id_to_proto) }),
        AppendEntriesResponse::Conflict => Outcome::Conflict(peer::Nothing {}),
        AppendEntriesResponse::HigherVote(vote) => Outcome::HigherVote(vote_to_proto(&vote)),
    };
    AppendResponse { outcome: Some(outcome) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hint_counts_until_the_membership_has_news() {
        let at = |url: &str| internal::Member { peer_urls: vec![url.to_owned()], ..internal::Member::default() };
        let of = |members: &[(u64, &str)]| {
            let members: BTreeMap<u64, internal::Member> = members.iter().map(|(id, url)| (*id, at(url))).collect();
            Membership::new(vec![members.keys().copied().collect()], members).unwrap()
        };
        let identity = Identity { cluster_id: 1, member_id: 1, name: "a".into(), joined: false, incarnation: 0 };
        let network = Network::new(identity, Arc::default(), None, None);
        network.note(&of(&[(1, "http://a"), (2, "http://b"), (3, "http://c")]));
        let hints = || lock(&network.hints).keys().copied().collect::<Vec<_>>();
        // It is news once, and there are none of strangers. A member that is where it is known to be has no hint any more.
        assert_eq!([("http://x", 2), ("http://x", 2), ("http://x", 9)].map(|(url, id)| network.hint(id, url)), [true, false, false]);
        assert!(hints() == [2] && !network.hint(2, "http://b") && hints().is_empty());
        assert!(network.hint(2, "http://x") && network.hint(3, "http://z"));
        // Each failure is followed by the other address, whichever link has failed: those for votes are made for one question.
        let firsts = || {
            let first = lock(&network.hints)[&2].first;
            network.link(2, &at("http://b")).turn_elsewhere();
            first
        };
        assert_eq!([firsts(), firsts(), firsts()], [true, false, true]);
        network.note(&of(&[(1, "http://d"), (2, "http://b"), (3, "http://c")]));
        assert_eq!(hints(), [2, 3]);
        network.note(&of(&[(1, "http://d"), (2, "http://y")]));
        assert!(hints().is_empty());
    }
}
