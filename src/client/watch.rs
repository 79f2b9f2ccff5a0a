//! Watches: what a [`Watcher`] tells, and where it has it from.
//!
//! # What is promised
//! - Each matching event once, in the order of revisions; all events of a revision in one message.
//! - A watch goes on at the revision behind the last that it has told, wherever that is: when a connection breaks or a member fails, a
//!   remote watch goes to the next member, and its user notices nothing but time. A [bookmark](WatchMessage::Progress) counts as told, so that a
//!   watch of keys that rarely change does not fall behind compaction.
//! - When that revision has been compacted away, the watch says so, and ends. [`ListWatch`](super::ListWatch) then lists anew by itself.

use crate::client::in_process::InProcessWatch;
use crate::client::namespace::Namespace;
use crate::client::remote::watch::RemoteWatch;
use crate::error::{ApplyError, Error, Result};
use crate::proto::{EncodedKv, KeyValue};

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
#[non_exhaustive]
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
#[non_exhaustive]
pub enum WatchMessage {
    /// Changes, in order; all of a revision are in one message.
    Events(Vec<WatchEvent>),
    /// Everything up to this revision has been told: a bookmark.
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

pub(super) fn decode(kv: &EncodedKv) -> Result<KeyValue> {
    kv.decode().map_err(|err| Error::Failed(format!("a stored pair cannot be read: {err}")))
}

/// Why a server has ended a watch for another reason than a compaction: before it has begun because of the request, or afterwards.
pub(super) fn ended(at_once: bool, reason: String) -> Error {
    // etcd's own words may come with gRPC's around them.
    match ApplyError::of_text(reason.rsplit_once(" desc = ").map_or(&*reason, |(_, text)| text)) {
        Some(err) => err.into(),
        None if at_once => Error::Config(reason),
        None => Error::Refused { code: CANCELLED, message: if reason.is_empty() { "the watch was ended".into() } else { reason } },
    }
}

/// gRPC's code for what the server has ended by itself, as its number on the wire.
const CANCELLED: i32 = 1;

/// A watch. It ends when it is dropped.
pub struct Watcher {
    source: Source,
    space: Option<Namespace>,
}

pub(super) enum Source {
    InProcess(Box<InProcessWatch>),
    Remote(RemoteWatch),
}

impl std::fmt::Debug for Watcher {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let source = match self.source {
            Source::InProcess(_) => "in process",
            Source::Remote(_) => "remote",
        };
        f.debug_struct("Watcher").field("source", &source).finish_non_exhaustive()
    }
}

impl Watcher {
    pub(super) fn new(source: Source, space: Option<Namespace>) -> Self {
        Watcher { source, space }
    }

    /// Waits until the watch is in place, and returns the revision from which on it tells. In this process that is so at once; a remote
    /// watch that begins "now" begins when the member has heard of it, which may be after a write that is made meanwhile.
    ///
    /// Cancel-safe.
    ///
    /// # Errors
    /// As [`next`](Self::next).
    pub async fn started(&mut self) -> Result<i64> {
        match &mut self.source {
            Source::InProcess(watch) => watch.started().await,
            Source::Remote(watch) => watch.started().await,
        }
    }

    /// Waits for the next message. After [`WatchMessage::Compacted`], and after an error with which the watch has ended, there is none:
    /// `None`.
    ///
    /// A remote watch waits as long as no member can be reached, however long that is.
    ///
    /// Cancel-safe: nothing is lost when the future is dropped.
    ///
    /// # Errors
    /// Each ends the watch. `Config` when the request made no sense; `Refused`, or one of etcd's outcomes as [`Error::Apply`], when the server has
    /// ended it; `ResponseTooLarge` when the events of one revision are more than a remote client gathers (1 GiB); `Stopped`, again and again,
    /// when the member in this process has stopped, or the node that the client is of.
    pub async fn next(&mut self) -> Result<Option<WatchMessage>> {
        let message = match &mut self.source {
            Source::InProcess(watch) => watch.next().await?,
            Source::Remote(watch) => watch.next().await?,
        };
        Ok(match &self.space {
            Some(space) => message.map(|message| space.told(message)),
            None => message,
        })
    }

    /// Asks for a [`WatchMessage::Progress`] as soon as everything before it has been told. While the watch has to catch up, there may be
    /// no answer, as in etcd; ask again.
    pub fn request_progress(&mut self) {
        match &mut self.source {
            Source::InProcess(watch) => watch.request_progress(),
            Source::Remote(watch) => watch.request_progress(),
        }
    }
}
