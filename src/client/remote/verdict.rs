//! What a failed attempt means: was anything done?

use h2::Reason;
use tonic::{Code, ConnectError, Status};

use crate::api::router::OTHER_CLUSTER;
use crate::error::{ApplyError, Error};

#[derive(Debug)]
pub(super) enum Verdict {
    /// The server has spoken; another would say the same.
    Answer(Error),
    /// Refused because of who asks, and nothing was done: the same with another token may be answered.
    Entry(Error),
    /// It is certain that nothing was done, and another member may do it.
    NotDone(Error),
    /// Something may have been done, or may be yet.
    Open(Error),
}

pub(super) fn verdict(status: &Status) -> Verdict {
    if let Some(source) = std::error::Error::source(status) {
        let text = format!("{}: {source}", status.message());
        return if never_sent(source) { Verdict::NotDone(Error::Unavailable(text)) } else { Verdict::Open(Error::OutcomeUnknown(text)) };
    }
    let text = status.message();
    match ApplyError::of_text(text) {
        // Refused before anyone has looked at it.
        Some(err @ (ApplyError::NoLeader | ApplyError::NotSupportedForLearner)) => return Verdict::NotDone(err.into()),
        Some(err @ (ApplyError::InvalidAuthToken | ApplyError::AuthOldRevision | ApplyError::UserEmpty | ApplyError::PermissionDenied)) => {
            return Verdict::Entry(err.into());
        }
        Some(ApplyError::Timeout) => return Verdict::Open(Error::Timeout),
        // It may have stopped between the log and the answer.
        Some(ApplyError::Stopped) => return Verdict::Open(Error::OutcomeUnknown(text.into())),
        Some(err @ (ApplyError::TimeoutLeaderFail | ApplyError::LeaderChanged)) => return Verdict::Open(err.into()),
        Some(err) => return Verdict::Answer(err.into()),
        None => {}
    }
    // Nor has it here; another may belong to the one that is meant.
    if status.code() == Code::FailedPrecondition && text.starts_with(OTHER_CLUSTER) {
        return Verdict::NotDone(Error::Unavailable(text.into()));
    }
    // etcd has more timeouts than one, by what it was waiting for.
    if text.starts_with("etcdserver: request timed out") {
        return Verdict::Open(Error::Timeout);
    }
    // Past the limit of a message, and not only of a request.
    if status.code() == Code::ResourceExhausted && text.contains("message larger than max") {
        return Verdict::Answer(ApplyError::RequestTooLarge.into());
    }
    match status.code() {
        Code::Unavailable | Code::Cancelled | Code::DeadlineExceeded | Code::Unknown | Code::Internal | Code::Aborted | Code::DataLoss => {
            Verdict::Open(Error::OutcomeUnknown(format!("{:?}: {text}", status.code())))
        }
        code => Verdict::Answer(Error::Refused { code: code as i32, message: text.into() }),
    }
}

/// Whether the request has not reached anyone who could have acted on it.
fn never_sent(mut source: &(dyn std::error::Error + 'static)) -> bool {
    loop {
        // There was no connection.
        if source.is::<ConnectError>() {
            return true;
        }
        // It was still in our own queue when the connection ended.
        if source.downcast_ref::<hyper::Error>().is_some_and(hyper::Error::is_canceled) {
            return true;
        }
        // The server says that it has not looked at it: one stream too many, or one after it had said that it takes no more. Streams
        // that it has still taken are not ended by a GOAWAY, but by the end of the connection.
        if let Some(err) = source.downcast_ref::<h2::Error>()
            && err.is_remote()
            && (err.reason() == Some(Reason::REFUSED_STREAM) || (err.is_go_away() && err.reason() == Some(Reason::NO_ERROR)))
        {
            return true;
        }
        match source.source() {
            Some(cause) => source = cause,
            None => return false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_member_says_is_told_from_what_is_open() {
        let is = |code: Code, text: &str| match verdict(&Status::new(code, text)) {
            Verdict::Answer(err) => format!("answer {:?}", err.kind()),
            Verdict::Entry(err) => format!("entry {:?}", err.kind()),
            Verdict::NotDone(err) => format!("not done {:?}", err.kind()),
            Verdict::Open(err) => format!("open {:?}", err.kind()),
        };
        for (code, text, expected) in [
            (Code::Unavailable, "etcdserver: no leader", "not done NoLeader"),
            (Code::Unavailable, "etcdserver: rpc not supported for learner", "not done Unavailable"),
            (Code::Unavailable, "etcdserver: request timed out", "open OutcomeUnknown"),
            (Code::Unavailable, "etcdserver: request timed out, possibly due to connection lost", "open OutcomeUnknown"),
            (Code::Unavailable, "etcdserver: request timed out, possibly due to previous leader failure", "open OutcomeUnknown"),
            (Code::Unavailable, "etcdserver: leader changed", "open OutcomeUnknown"),
            (Code::Unavailable, "etcdserver: server stopped", "open OutcomeUnknown"),
            (Code::Unavailable, "the member has failed", "open OutcomeUnknown"),
            (Code::Unknown, "etcdserver: too many requests", "answer Overloaded"),
            (Code::OutOfRange, "etcdserver: mvcc: required revision has been compacted", "answer Compacted"),
            (Code::ResourceExhausted, "etcdserver: mvcc: database space exceeded", "answer NoSpace"),
            (Code::NotFound, "etcdserver: requested lease not found", "answer LeaseNotFound"),
            (Code::ResourceExhausted, "grpc: received message larger than max (2097160 vs. 2097152)", "answer InvalidRequest"),
            (Code::PermissionDenied, "etcdserver: permission denied", "entry PermissionDenied"),
            (Code::InvalidArgument, "etcdserver: authentication failed, invalid user ID or password", "answer PermissionDenied"),
            (Code::Unauthenticated, "etcdserver: invalid auth token", "entry PermissionDenied"),
            (Code::InvalidArgument, "etcdserver: revision of auth store is old", "entry PermissionDenied"),
            (Code::InvalidArgument, "etcdserver: user name is empty", "entry PermissionDenied"),
            (Code::Unimplemented, "unknown service x", "answer Unsupported"),
            (Code::FailedPrecondition, "this member belongs to another cluster: 7, and not 8", "not done Unavailable"),
            (Code::FailedPrecondition, "something else", "answer FailedPrecondition"),
        ] {
            assert_eq!(is(code, text), expected, "{text}");
        }
    }

    #[test]
    fn a_request_that_found_no_connection_was_not_sent() {
        let refused = std::io::Error::from(std::io::ErrorKind::ConnectionRefused);
        let status = Status::from_error(Box::new(ConnectError(refused.into())));
        assert!(matches!(verdict(&status), Verdict::NotDone(Error::Unavailable(_))));
        let broken = std::io::Error::from(std::io::ErrorKind::BrokenPipe);
        assert!(matches!(verdict(&Status::from_error(Box::new(broken))), Verdict::Open(Error::OutcomeUnknown(_))));
        let refused = h2::Error::from(Reason::REFUSED_STREAM);
        assert!(!never_sent(&refused), "ours, and not the server's word");
    }
}
