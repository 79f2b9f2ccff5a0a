//! Consensus: openraft, told what our entries, members and votes are, and nothing else.
//!
//! This folder is the thin wrapper that keeps openraft's types from spreading: [`log`] puts its log into our segments,
//! [`apply`] is the state machine, [`members`] what it knows of members, [`network`] carries its messages, [`outgoing`] and [`incoming`]
//! turn a state into a snapshot and back, [`restored`] is what a cluster begins with that was made of a backup. The layers above see
//! [`Proposal`], [`Reply`] and `u64`s.
//!
//! # One entry, many requests
//! A log entry holds a *batch* of commands that arrived while the entry before was on its way to disk. It is appended,
//! made durable and replicated as one, and each command in it gets its own outcome.
//!
//! # The bytes of an entry
//! One byte for the kind, then a message of `proto/quorate/internal.proto`. The log around it has term, index and
//! checksum.
//!
//! | kind | body |
//! |---|---|
//! | 0 | none: a new leader's first entry |
//! | 1 | `Entry`: commands |
//! | 2 | `Membership` |

use std::collections::BTreeSet;
use std::fmt;
use std::sync::Arc;

use bytes::{BufMut, Bytes, BytesMut};
use openraft::EntryPayload;
use prost::Message;

use crate::error::{ApplyError, Error};
use crate::proto::etcdserverpb::{
    AlarmResponse, CompactionResponse, DeleteRangeResponse, LeaseGrantResponse, LeaseRevokeResponse, PutResponse, TxnResponse,
};
use crate::proto::internal;

pub(crate) mod apply;
pub(crate) mod incoming;
pub(crate) mod log;
pub(crate) mod members;
pub(crate) mod network;
pub(crate) mod outgoing;
pub(crate) mod restored;
pub(crate) mod wire;

/// openraft's types, as we use them.
#[derive(Debug, Clone, Copy, Default, Eq, PartialEq, Ord, PartialOrd)]
pub(crate) struct TypeConfig {}

impl openraft::RaftTypeConfig for TypeConfig {
    type D = Proposal;
    type R = Vec<Outcome>;
    type NodeId = u64;
    type Node = internal::Member;
    type Term = u64;
    // At most one leader a term, as in the Raft paper and in etcd.
    type LeaderId = openraft::impls::leader_id_std::LeaderId<u64, u64>;
    type Vote = openraft::impls::Vote<Self::LeaderId>;
    type Payload = EntryPayload<Proposal, u64, internal::Member>;
    type Entry = openraft::Entry<<Self::LeaderId as openraft::vote::RaftLeaderId>::Committed, Self::Payload>;
    type AsyncRuntime = crate::world::Runtime;
    type Responder<T>
        = Callback<T>
    where
        T: openraft::OptionalSend + 'static;
    type Batch<T>
        = openraft::impls::InlineBatch<T>
    where
        T: openraft::OptionalSend + 'static;
    type ErrorSource = openraft::impls::BoxedErrorSource;
}

pub(crate) type LogId = openraft::alias::LogIdOf<TypeConfig>;
pub(crate) type Vote = openraft::alias::VoteOf<TypeConfig>;
pub(crate) type RaftEntry = openraft::alias::EntryOf<TypeConfig>;
pub(crate) type Membership = openraft::Membership<u64, internal::Member>;
pub(crate) type StoredMembership = openraft::alias::StoredMembershipOf<TypeConfig>;
pub(crate) type SnapshotMeta = openraft::alias::SnapshotMetaOf<TypeConfig>;
pub(crate) type Raft = openraft::Raft<TypeConfig, apply::StateMachine>;

/// A batch of commands on its way through the log. Cheap to clone: the log's cache and the applier share it.
#[derive(Clone, PartialEq)]
pub(crate) struct Proposal {
    pub commands: Arc<Vec<internal::Command>>,
}

// openraft's own log lines print payloads; what clients store is nobody's business there.
impl fmt::Debug for Proposal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} commands", self.commands.len())
    }
}

impl fmt::Display for Proposal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

/// What applying one command gave: an answer, or one of etcd's refusals.
pub(crate) type Outcome = Result<Reply, ApplyError>;

/// The answer to a command, headers holding the revision alone.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Reply {
    Put(PutResponse),
    DeleteRange(DeleteRangeResponse),
    Txn(TxnResponse),
    Compaction(CompactionResponse),
    LeaseGrant(LeaseGrantResponse),
    LeaseRevoke(LeaseRevokeResponse),
    LeaseCheckpoint,
    Alarm(AlarmResponse),
    ClusterVersion,
    MemberAttributes,
}

/// Called once with the result of a proposal, wherever openraft completes it.
pub(crate) struct Callback<T>(pub Box<dyn FnOnce(T) + Send>);

impl<T: openraft::OptionalSend + 'static> openraft::raft::responder::Responder<TypeConfig, T> for Callback<T> {
    fn on_complete(self, result: T) {
        (self.0)(result);
    }
}

/// First byte of an entry's payload. Frozen: logs on disk have it.
mod kind {
    pub const BLANK: u8 = 0;
    pub const COMMANDS: u8 = 1;
    pub const MEMBERSHIP: u8 = 2;
}

/// The payload's bytes for the log.
pub(crate) fn encode_payload(payload: &EntryPayload<Proposal, u64, internal::Member>) -> Bytes {
    let (kind, len) = match payload {
        EntryPayload::Blank => return Bytes::from_static(&[kind::BLANK]),
        EntryPayload::Normal(proposal) => {
            // The same bytes as an `internal::Entry` of these commands, without moving them into one.
            let field = |len: usize| 1 + prost::length_delimiter_len(len) + len;
            (kind::COMMANDS, proposal.commands.iter().map(|command| field(command.encoded_len())).sum())
        }
        EntryPayload::Membership(membership) => (kind::MEMBERSHIP, membership_to_proto(membership).encoded_len()),
    };
    let mut out = BytesMut::with_capacity(1 + len);
    out.put_u8(kind);
    match payload {
        EntryPayload::Blank => {}
        EntryPayload::Normal(proposal) => {
            for command in proposal.commands.iter() {
                prost::encoding::message::encode(1, command, &mut out);
            }
        }
        EntryPayload::Membership(membership) => membership_to_proto(membership).encode_raw(&mut out),
    }
    out.freeze()
}

/// Reads back what [`encode_payload`] wrote; keys and values share the given bytes.
///
/// # Errors
/// A description of what is wrong; the caller knows which entry it is.
pub(crate) fn decode_payload(mut bytes: Bytes) -> Result<EntryPayload<Proposal, u64, internal::Member>, String> {
    if bytes.is_empty() {
        return Err("an entry without a kind".into());
    }
    let kind = bytes.split_to(1)[0];
    match kind {
        kind::BLANK => Ok(EntryPayload::Blank),
        kind::COMMANDS => {
            let entry = internal::Entry::decode(bytes).map_err(|err| err.to_string())?;
            Ok(EntryPayload::Normal(Proposal { commands: Arc::new(entry.commands) }))
        }
        kind::MEMBERSHIP => {
            let membership = internal::Membership::decode(bytes).map_err(|err| err.to_string())?;
            Ok(EntryPayload::Membership(membership_from_proto(membership)?))
        }
        kind => Err(format!("an entry of the unknown kind {kind}")),
    }
}

pub(crate) fn membership_to_proto(membership: &Membership) -> internal::Membership {
    internal::Membership {
        configs: membership.get_joint_config().iter().map(|ids| internal::VoterSet { ids: ids.iter().copied().collect() }).collect(),
        members: membership.nodes().map(|(id, member)| (*id, member.clone())).collect(),
    }
}

fn membership_from_proto(membership: internal::Membership) -> Result<Membership, String> {
    let configs: Vec<BTreeSet<u64>> = membership.configs.into_iter().map(|set| set.ids.into_iter().collect()).collect();
    Membership::new(configs, membership.members).map_err(|err| err.to_string())
}

pub(crate) fn log_id_to_proto(log_id: LogId) -> internal::LogId {
    internal::LogId { term: *log_id.leader_id, index: log_id.index }
}

pub(crate) fn log_id_from_proto(id: internal::LogId) -> LogId {
    log_id(id.term, id.index)
}

pub(crate) fn vote_to_proto(vote: &Vote) -> internal::Vote {
    internal::Vote { term: vote.leader_id.term, node: vote.leader_id.voted_for, committed: vote.committed }
}

pub(crate) fn vote_from_proto(vote: internal::Vote) -> Vote {
    if vote.committed { Vote::new_committed(vote.term, vote.node) } else { Vote::new(vote.term, vote.node) }
}

pub(crate) fn log_id(term: u64, index: u64) -> LogId {
    LogId::new(openraft::vote::leader_id_std::CommittedLeaderId::new(term), index)
}

pub(crate) fn stored_membership_to_proto(stored: &StoredMembership) -> internal::StoredMembership {
    internal::StoredMembership { log_id: stored.log_id().map(log_id_to_proto), membership: Some(membership_to_proto(stored.membership())) }
}

pub(crate) fn stored_membership_from_proto(stored: internal::StoredMembership) -> Result<StoredMembership, String> {
    let log_id = stored.log_id.map(log_id_from_proto);
    Ok(StoredMembership::new(log_id, membership_from_proto(stored.membership.unwrap_or_default())?))
}

/// Our errors in the form that openraft takes from its storage.
pub(crate) fn to_io(err: Error) -> std::io::Error {
    std::io::Error::other(err)
}
