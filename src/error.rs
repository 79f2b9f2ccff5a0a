//! Two error types for the whole crate.
//!
//! [`Error`] is what the host program and the operator see: a start that failed, a file that is damaged, a member that
//! has stopped. It always names what was being done and where. What to *do* about one, its [kind](Error::kind) says: that is the
//! same whichever way a [client](crate::Client) has to the store, in this process or through the network.
//!
//! [`ApplyError`] is the *deterministic* outcome of a request: every member that applies the same log entry to the same
//! state gets the same one. Its codes and texts are etcd's, because etcd's client libraries match on the text. Anything
//! else that goes wrong while applying is not an answer but a fault, and stops the member.
//!
//! ```
//! use quorate::ApplyError;
//! assert_eq!(ApplyError::Compacted.to_string(), "etcdserver: mvcc: required revision has been compacted");
//! assert_eq!(ApplyError::Compacted.code(), 11); // OutOfRange
//! ```

use std::io;
use std::path::{Path, PathBuf};

/// Result with the crate's [`Error`], unless another is named.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Everything that can go wrong with a server or a client, apart from what disks and networks do to a single request.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A setting is missing, malformed or contradicts another. The text names the setting and the value.
    #[error("invalid configuration: {0}")]
    Config(String),

    /// An operating-system call failed. `what` says which step, `path` on which file or directory.
    #[error("{what} {}: {source}", path.display())]
    Io { what: &'static str, path: PathBuf, source: std::sync::Arc<io::Error> },

    /// Bytes on disk are not what was written there. Nothing has been changed; `what` says what was found, and `offset` at which byte, if that is known.
    #[error("{} is damaged{}: {what}", path.display(), offset.map_or(String::new(), |offset| format!(" at byte {offset}")))]
    Corrupt { path: PathBuf, offset: Option<u64>, what: String },

    /// A file or directory was written by a newer release, or is not this crate's at all.
    #[error("{}: {what}", path.display())]
    Format { path: PathBuf, what: String },

    /// Another process, or another server in this process, holds the data directory.
    #[error("{} is in use by another server", path.display())]
    Locked { path: PathBuf },

    /// The request was carried out, or refused, with one of etcd's own outcomes.
    #[error(transparent)]
    Apply(#[from] ApplyError),

    /// The member has stopped or is stopping, and takes no requests.
    #[error("etcdserver: server stopped")]
    Stopped,

    /// The member stopped by itself because it could no longer keep its promises; the text says what failed.
    #[error("the member has failed: {0}")]
    Failed(String),

    /// The member was removed from its cluster: it serves no more, and its directory is of no use.
    #[error("the member has been permanently removed from the cluster")]
    Removed,

    /// The node belongs to no cluster: there is none to join yet, and too few nodes to found one, and the text says who is missing; or
    /// nodes of different clusters answer, and the text says where. It can be tried again.
    #[error("the node belongs to no cluster yet: {0}")]
    Founding(String),

    /// A stop had come to the end of its time, and this was cut off. All else was given up in order.
    #[error("the stop took longer than it was given, and has cut off {0}")]
    CutOff(String),

    /// A change of a cluster's servers was refused, and nothing was changed. `reason` is its name, which stays (see
    /// [`embed::members`](crate::embed::members)); `what` says who is meant, and what would be right.
    #[error("{reason}: {what}")]
    Ineligible { reason: String, what: String },

    /// The request could not be completed in time; a write may or may not have happened.
    #[error("etcdserver: request timed out")]
    Timeout,

    /// No member could be asked, so nothing was done. The text names each endpoint that was tried, and what it failed with.
    #[error("no member can be reached: {0}")]
    Unavailable(String),

    /// The request was sent, and its answer lost with the connection or the member: a write may have been carried out, or may be yet.
    #[error("the outcome is unknown: {0}")]
    OutcomeUnknown(String),

    /// The server refused in words that are not among etcd's outcomes that this crate knows. `code` is gRPC's, as its number.
    #[error("refused (gRPC code {code}): {message}")]
    Refused { code: i32, message: String },

    /// The session's lease has run out, or may have: what was held by it may be somebody else's.
    #[error("the session's lease is lost")]
    SessionLost,
}

/// What an [`Error`] means to who has made a request. The kinds are stable, and the same for every client: in this process, remote, or of
/// an etcd.
///
/// ```
/// use quorate::{ApplyError, Error, ErrorKind};
/// assert_eq!(Error::Apply(ApplyError::Compacted).kind(), ErrorKind::Compacted);
/// assert_eq!(Error::Timeout.kind(), ErrorKind::OutcomeUnknown);
/// assert!(ErrorKind::NoLeader.nothing_was_done() && !ErrorKind::OutcomeUnknown.nothing_was_done());
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// No member can be reached, or takes such a request. Nothing was done.
    Unavailable,
    /// The cluster has no leader, so it takes no writes and no linearizable reads now. Nothing was done.
    NoLeader,
    /// No answer came in time, or it was lost, or the member stopped. A read can be made again; a write may have been carried out, or may be
    /// yet.
    OutcomeUnknown,
    /// The revision was compacted away.
    Compacted,
    /// The revision has not come yet.
    FutureRevision,
    /// The space quota, or the disk, is used up: what needs space is refused.
    NoSpace,
    /// More requests wait than the member takes. Nothing was done; try again later.
    Overloaded,
    /// There is no such lease (any more).
    LeaseNotFound,
    /// A lease of that id is there already.
    LeaseExists,
    /// There is no such key, where one is needed.
    KeyNotFound,
    /// There is no such member.
    MemberNotFound,
    /// The request is malformed, too large, or asks for what cannot be.
    InvalidRequest,
    /// The state of the cluster or of its members does not allow it now.
    FailedPrecondition,
    /// Who asks may not.
    PermissionDenied,
    /// The server does not have it.
    Unsupported,
    /// A session's lease was lost, and with it what was held.
    SessionLost,
    /// Data is damaged, or members disagree.
    Corrupt,
    /// Everything else: a configuration, the operating system, a member that has failed.
    Other,
}

impl ErrorKind {
    /// Whether it is certain that nothing was done: the same request may be made again, even a write.
    pub fn nothing_was_done(self) -> bool {
        matches!(self, ErrorKind::Unavailable | ErrorKind::NoLeader | ErrorKind::Overloaded)
    }
}

impl Error {
    /// What it means to who has made a request.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Error::Apply(err) => err.kind(),
            Error::Unavailable(_) => ErrorKind::Unavailable,
            // What was under way when the member stopped may be in its log.
            Error::Timeout | Error::Stopped | Error::Removed | Error::OutcomeUnknown(_) => ErrorKind::OutcomeUnknown,
            Error::SessionLost => ErrorKind::SessionLost,
            Error::Corrupt { .. } => ErrorKind::Corrupt,
            Error::Refused { code: code::INVALID_ARGUMENT, .. } => ErrorKind::InvalidRequest,
            Error::Refused { code: code::PERMISSION_DENIED | code::UNAUTHENTICATED, .. } => ErrorKind::PermissionDenied,
            Error::Refused { code: code::UNIMPLEMENTED, .. } => ErrorKind::Unsupported,
            Error::Refused { code: code::FAILED_PRECONDITION, .. } | Error::Ineligible { .. } => ErrorKind::FailedPrecondition,
            Error::Refused { code: code::RESOURCE_EXHAUSTED, .. } => ErrorKind::Overloaded,
            err if err.is_disk_full() => ErrorKind::NoSpace,
            Error::Config(_)
            | Error::Io { .. }
            | Error::Format { .. }
            | Error::Locked { .. }
            | Error::Failed(_)
            | Error::Founding(_)
            | Error::CutOff(_)
            | Error::Refused { .. } => ErrorKind::Other,
        }
    }

    /// An [`Error::Io`] that says what was done to which path.
    pub(crate) fn io(what: &'static str, path: impl AsRef<Path>, source: io::Error) -> Self {
        Error::Io { what, path: path.as_ref().to_owned(), source: std::sync::Arc::new(source) }
    }

    /// Whether the cause is a full disk (ENOSPC or EDQUOT), which a member survives, unlike any other write error.
    pub(crate) fn is_disk_full(&self) -> bool {
        matches!(self, Error::Io { source, .. }
            if matches!(source.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded))
    }
}

/// gRPC status codes, by their numbers on the wire.
mod code {
    pub const UNKNOWN: i32 = 2;
    pub const INVALID_ARGUMENT: i32 = 3;
    pub const NOT_FOUND: i32 = 5;
    pub const PERMISSION_DENIED: i32 = 7;
    pub const RESOURCE_EXHAUSTED: i32 = 8;
    pub const FAILED_PRECONDITION: i32 = 9;
    pub const OUT_OF_RANGE: i32 = 11;
    pub const UNIMPLEMENTED: i32 = 12;
    pub const UNAVAILABLE: i32 = 14;
    pub const DATA_LOSS: i32 = 15;
    pub const UNAUTHENTICATED: i32 = 16;
}

/// Declares [`ApplyError`] from one table of name, code and text, so that the three cannot drift apart.
macro_rules! apply_errors {
    ($($(#[$doc:meta])* $name:ident = $code:ident, $text:literal;)*) => {
        /// An outcome that etcd defines, with etcd's gRPC code and text.
        ///
        /// Source: etcd's `api/v3rpc/rpctypes/error.go`, where the table of codes and texts stands.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, thiserror::Error)]
        #[non_exhaustive]
        pub enum ApplyError {
            $($(#[$doc])* #[error($text)] $name,)*
        }

        impl ApplyError {
            /// All of them.
            pub(crate) const ALL: &'static [ApplyError] = &[$(ApplyError::$name,)*];

            /// The gRPC status code, as its number on the wire.
            pub fn code(self) -> i32 {
                match self { $(ApplyError::$name => code::$code,)* }
            }
        }
    };
}

apply_errors! {
    /// A request without a key.
    EmptyKey = INVALID_ARGUMENT, "etcdserver: key is not provided";
    /// `ignore_value` or `ignore_lease` on a key that does not exist.
    KeyNotFound = INVALID_ARGUMENT, "etcdserver: key not found";
    /// `ignore_value` together with a value.
    ValueProvided = INVALID_ARGUMENT, "etcdserver: value is provided";
    /// `ignore_lease` together with a lease.
    LeaseProvided = INVALID_ARGUMENT, "etcdserver: lease is provided";
    /// More compares or operations than `max-txn-ops`.
    TooManyOps = INVALID_ARGUMENT, "etcdserver: too many operations in txn request";
    /// Two operations of one Txn write the same key.
    DuplicateKey = INVALID_ARGUMENT, "etcdserver: duplicate key given in txn request";
    /// A sort order or target that is not in its enum.
    InvalidSortOption = INVALID_ARGUMENT, "etcdserver: invalid sort option";
    /// An alarm action or type that is not in its enum.
    InvalidAlarm = INVALID_ARGUMENT, "etcdserver: invalid alarm request";
    /// A proposal larger than `max-request-bytes`.
    RequestTooLarge = INVALID_ARGUMENT, "etcdserver: request is too large";
    /// Auth is not there to be used yet.
    AuthNotEnabled = FAILED_PRECONDITION, "etcdserver: authentication is not enabled";
    /// The revision lies below the last compaction.
    Compacted = OUT_OF_RANGE, "etcdserver: mvcc: required revision has been compacted";
    /// The revision lies above the newest one.
    FutureRevision = OUT_OF_RANGE, "etcdserver: mvcc: required revision is a future revision";
    /// A lease TTL above 9,000,000,000 seconds.
    LeaseTtlTooLarge = OUT_OF_RANGE, "etcdserver: too large lease TTL";
    /// The space quota is used up; only requests that need no space are taken.
    NoSpace = RESOURCE_EXHAUSTED, "etcdserver: mvcc: database space exceeded";
    /// A Txn or a DeleteRange whose answer would not fit in memory; etcd has no such limit and may die of it.
    ResponseTooLarge = RESOURCE_EXHAUSTED, "etcdserver: response is too large";
    /// More requests wait than the member takes.
    TooManyRequests = UNKNOWN, "etcdserver: too many requests";
    /// No lease of that id.
    LeaseNotFound = NOT_FOUND, "etcdserver: requested lease not found";
    /// No member of that id.
    MemberNotFound = NOT_FOUND, "etcdserver: member not found";
    /// The peer URLs of a member to be added or changed are missing, or malformed.
    MemberBadUrls = INVALID_ARGUMENT, "etcdserver: given member URLs are invalid";
    /// Another member has that peer URL.
    PeerUrlExists = FAILED_PRECONDITION, "etcdserver: Peer URLs already exists";
    /// Only a learner can be promoted.
    MemberNotLearner = FAILED_PRECONDITION, "etcdserver: can only promote a learner member";
    /// The learner lacks too much of the log to be promoted.
    LearnerNotReady = FAILED_PRECONDITION, "etcdserver: can only promote a learner member which is in sync with leader";
    /// There are as many learners as there may be.
    TooManyLearners = FAILED_PRECONDITION, "etcdserver: too many learner members in cluster";
    /// The change would leave too few members that have ever been up.
    NotEnoughStarted = UNKNOWN, "etcdserver: re-configuration failed due to not enough started members";
    /// The change would leave too few members that are up now.
    UnhealthyCluster = UNAVAILABLE, "etcdserver: unhealthy cluster";
    /// A learner serves only what needs no vote.
    NotSupportedForLearner = UNAVAILABLE, "etcdserver: rpc not supported for learner";
    /// A lease of that id is there already.
    LeaseExists = FAILED_PRECONDITION, "etcdserver: lease already exists";
    /// Leadership cannot be handed to that member.
    BadLeaderTransferee = FAILED_PRECONDITION, "etcdserver: bad leader transferee";
    /// The member is not the leader.
    NotLeader = FAILED_PRECONDITION, "etcdserver: not leader";
    /// A capability that is not built.
    NotCapable = UNAVAILABLE, "etcdserver: not capable";
    /// The cluster has no leader.
    NoLeader = UNAVAILABLE, "etcdserver: no leader";
    /// The leader changed before the request was committed.
    LeaderChanged = UNAVAILABLE, "etcdserver: leader changed";
    /// The member has stopped.
    Stopped = UNAVAILABLE, "etcdserver: server stopped";
    /// The request was not finished in time.
    Timeout = UNAVAILABLE, "etcdserver: request timed out";
    /// The member that led was not heard of any more before the request was finished: whether it was, is not known.
    TimeoutLeaderFail = UNAVAILABLE, "etcdserver: request timed out, possibly due to previous leader failure";
    /// The member that leadership was to be handed to has not taken it in time.
    TimeoutLeaderTransfer = UNAVAILABLE, "etcdserver: request timed out, leader transfer took too long";
    /// A member's data differs from the others'.
    Corrupt = DATA_LOSS, "etcdserver: corrupt cluster";
    /// An RPC that is not built yet.
    Unimplemented = UNIMPLEMENTED, "etcdserver: not implemented";
    /// There is no such user, or its password is another one.
    AuthFailed = INVALID_ARGUMENT, "etcdserver: authentication failed, invalid user ID or password";
    /// A request without a user, where there have to be users.
    UserEmpty = INVALID_ARGUMENT, "etcdserver: user name is empty";
    /// The user may not do that.
    PermissionDenied = PERMISSION_DENIED, "etcdserver: permission denied";
    /// A token that stands for nobody (any more).
    InvalidAuthToken = UNAUTHENTICATED, "etcdserver: invalid auth token";
    /// Users or roles have changed since the token was made.
    AuthOldRevision = INVALID_ARGUMENT, "etcdserver: revision of auth store is old";
    /// A fault that has no code of its own.
    Internal = UNKNOWN, "etcdserver: internal error";
}

impl ApplyError {
    fn kind(self) -> ErrorKind {
        use ApplyError::*;
        match self {
            Compacted => ErrorKind::Compacted,
            FutureRevision => ErrorKind::FutureRevision,
            NoSpace => ErrorKind::NoSpace,
            TooManyRequests => ErrorKind::Overloaded,
            LeaseNotFound => ErrorKind::LeaseNotFound,
            LeaseExists => ErrorKind::LeaseExists,
            KeyNotFound => ErrorKind::KeyNotFound,
            MemberNotFound => ErrorKind::MemberNotFound,
            NoLeader => ErrorKind::NoLeader,
            NotSupportedForLearner => ErrorKind::Unavailable,
            // What a member says that gave up waiting; the entry may be in the log.
            Stopped | Timeout | TimeoutLeaderFail | TimeoutLeaderTransfer | LeaderChanged => ErrorKind::OutcomeUnknown,
            EmptyKey | ValueProvided | LeaseProvided | TooManyOps | DuplicateKey | InvalidSortOption | InvalidAlarm | RequestTooLarge
            | LeaseTtlTooLarge | ResponseTooLarge | MemberBadUrls => ErrorKind::InvalidRequest,
            AuthNotEnabled | PeerUrlExists | MemberNotLearner | LearnerNotReady | TooManyLearners | NotEnoughStarted | UnhealthyCluster
            | BadLeaderTransferee | NotLeader => ErrorKind::FailedPrecondition,
            NotCapable | Unimplemented => ErrorKind::Unsupported,
            AuthFailed | UserEmpty | PermissionDenied | InvalidAuthToken | AuthOldRevision => ErrorKind::PermissionDenied,
            Corrupt => ErrorKind::Corrupt,
            Internal => ErrorKind::Other,
        }
    }

    /// The outcome that has this text on the wire.
    pub(crate) fn of_text(text: &str) -> Option<ApplyError> {
        Self::ALL.iter().copied().find(|err| err.to_string() == text)
    }
}
