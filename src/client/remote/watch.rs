//! A watch that outlives its connections.
//!
//! One task for each watch reads its stream and knows how far it has told: when the stream breaks, it opens the watch anew, with the next
//! member, at the revision behind that. Fragments are put together before they count; so a break between two of them loses nothing and
//! repeats nothing.
//!
//! # Invariants
//! - No event below `next` is told, and none from there on is passed over.
//! - `next` grows with what was told: the revision of the last event, or of a bookmark. Not with the header of a message of events: a member
//!   that catches up cuts its messages short, and their headers have the newest revision all the same.

use std::time::Duration;

use futures_util::stream;
use tokio::sync::{mpsc, watch};
use tonic::{Status, Streaming};

use super::{Pauses, Remote, led};
use crate::client::backend::Task;
use crate::client::watch::{EventKind, WatchEvent, WatchMessage, decode, ended};
use crate::error::{ApplyError, Error, ErrorKind, Result};
use crate::proto::KeyValue;
use crate::proto::etcdserverpb::watch_client::WatchClient;
use crate::proto::etcdserverpb::watch_request::RequestUnion;
use crate::proto::etcdserverpb::{WatchCreateRequest, WatchProgressRequest, WatchRequest, WatchResponse};
use crate::proto::mvccpb::Event;
use crate::proto::mvccpb::event::EventType;

use super::links::Link;
use super::login::{ENTRIES_MAX, Ticket};
use super::verdict::{Verdict, verdict};

/// Messages that wait to be taken. Beyond it the stream is not read, and the member keeps what comes, as for any slow client.
const MESSAGES_MAX: usize = 16;

/// What the events of one revision may have, with the pairs before them. They are told in one message, so all of them are in memory at once: a
/// DeleteRange of everything, for one who wants to see it all. A watch to which more is sent ends with `ResponseTooLarge`.
const REVISION_BYTES_MAX: usize = 1 << 30;

/// How long a member may take to open a watch before the next one is asked.
const OPEN_LIMIT: Duration = Duration::from_secs(5);

pub(in crate::client) struct RemoteWatch {
    messages: mpsc::Receiver<Result<WatchMessage>>,
    /// The last message was taken.
    ended: bool,
    /// A request for a bookmark; one more while one is on its way comes to the same.
    asks: mpsc::Sender<()>,
    started: watch::Receiver<Option<i64>>,
    #[allow(dead_code, reason = "it ends when this is dropped")]
    task: Task,
}

impl RemoteWatch {
    pub fn start(remote: Remote, request: WatchCreateRequest) -> Self {
        let (tell, messages) = mpsc::channel(MESSAGES_MAX);
        let (asks, asked) = mpsc::channel(1);
        let (place, started) = watch::channel(None);
        let runtime = remote.timers.runtime().clone();
        let next = request.start_revision;
        let follow = Follow::new(remote, request, next, tell, asked, place);
        RemoteWatch { messages, ended: false, asks, started, task: Task::spawn(&runtime, follow.run()) }
    }

    pub async fn started(&mut self) -> Result<i64> {
        if let Ok(start) = self.started.wait_for(Option::is_some).await {
            return start.ok_or(Error::Stopped);
        }
        // It ended before it began, and has said why.
        match self.next().await? {
            Some(message) => Err(Error::Failed(format!("a watch began with {message:?}"))),
            None => Err(Error::Stopped),
        }
    }

    pub async fn next(&mut self) -> Result<Option<WatchMessage>> {
        if self.ended {
            return Ok(None);
        }
        match self.messages.recv().await {
            Some(message) => {
                self.ended = matches!(message, Err(_) | Ok(WatchMessage::Compacted { .. }));
                message.map(Some)
            }
            // It has ended without a word: with the runtime that its task was on.
            None => Err(Error::Stopped),
        }
    }

    pub fn request_progress(&mut self) {
        // Full: one is on its way already.
        let _ = self.asks.try_send(());
    }
}

struct Follow {
    remote: Remote,
    request: WatchCreateRequest,
    /// The first revision that was not told; 0: now, whenever that will be.
    next: i64,
    tell: mpsc::Sender<Result<WatchMessage>>,
    asked: mpsc::Receiver<()>,
    place: watch::Sender<Option<i64>>,
    /// A bookmark was asked for, and has not come.
    wants_progress: bool,
    /// Events of a revision of which more may come: the last one's of a message whose last fragment has not come. Up to
    /// [`REVISION_BYTES_MAX`].
    parts: Vec<WatchEvent>,
    /// The bytes of those.
    parts_bytes: usize,
    /// With what the watch was opened last.
    ticket: Option<Ticket>,
    /// How often it was refused because of that, one time after the other.
    entries: u32,
}

/// What an event takes up here.
fn weight(event: &WatchEvent) -> usize {
    let of = |kv: &KeyValue| kv.key.len() + kv.value.len();
    size_of::<WatchEvent>() + of(&event.kv) + event.prev_kv.as_ref().map_or(0, of)
}

/// Why a stream is read no more.
enum End {
    /// The watch is over, or nobody listens.
    Over,
    /// It is to be opened anew, elsewhere.
    Broken(Error),
    /// It was refused because of who asks.
    Refused(Error),
}

impl Follow {
    fn new(
        remote: Remote,
        request: WatchCreateRequest,
        next: i64,
        tell: mpsc::Sender<Result<WatchMessage>>,
        asked: mpsc::Receiver<()>,
        place: watch::Sender<Option<i64>>,
    ) -> Follow {
        let (parts, parts_bytes, ticket) = (Vec::new(), 0, None);
        Follow { remote, request, next, tell, asked, place, wants_progress: false, parts, parts_bytes, ticket, entries: 0 }
    }

    async fn run(mut self) {
        let mut pauses = Pauses::new();
        loop {
            let err = match self.remote.shared.links.link(&self.remote.timers).await {
                Err(err) => err,
                Ok(link) => {
                    let before = self.next;
                    match self.follow(&link).await {
                        End::Over => return,
                        End::Refused(err) => {
                            self.entries += 1;
                            if self.entries > ENTRIES_MAX || !self.ticket.is_some_and(|ticket| link.line.renew(ticket, &err)) {
                                self.end(Err(err)).await;
                                return;
                            }
                            err
                        }
                        End::Broken(err) => {
                            self.remote.shared.links.leave(&link);
                            if self.next > before {
                                pauses.reset();
                            }
                            err
                        }
                    }
                }
            };
            tracing::debug!(error = %err, next = self.next, "a watch goes on elsewhere");
            let pause = self.remote.timers.sleep(pauses.next());
            tokio::select! {
                paused = pause => if paused.is_err() { return },
                () = self.tell.closed() => return,
            }
        }
    }

    /// Opens the watch with a member and tells what comes.
    async fn follow(&mut self, link: &Link) -> End {
        self.parts.clear();
        self.parts_bytes = 0;
        let (requests, receiver) = mpsc::channel(2);
        let timers = self.remote.timers.clone();
        let opening = timers.within(Some(OPEN_LIMIT), self.open(link, &requests, receiver)).await;
        let mut answers = match opening {
            Ok(Ok(answers)) => answers,
            Ok(Err(status)) => return self.broken(&status).await,
            Err(Error::Timeout) => return End::Broken(Error::Timeout),
            // The runtime ends: without a last word, which is what it says.
            Err(_) => return End::Over,
        };
        loop {
            tokio::select! {
                biased;
                () = self.tell.closed() => return End::Over,
                Some(()) = self.asked.recv() => {
                    self.wants_progress = true;
                    ask_progress(&requests);
                }
                answer = answers.message() => match answer {
                    Ok(Some(answer)) => if let Some(end) = self.take(answer, &requests).await {
                        return end;
                    },
                    Ok(None) => return End::Broken(Error::Unavailable("the stream has ended".into())),
                    Err(status) => return self.broken(&status).await,
                }
            }
        }
    }

    async fn open(
        &mut self,
        link: &Link,
        requests: &mpsc::Sender<WatchRequest>,
        receiver: mpsc::Receiver<WatchRequest>,
    ) -> Result<Streaming<WatchResponse>, Status> {
        self.ticket = Some(link.line.enter().await?);
        let create = WatchCreateRequest { start_revision: self.next, watch_id: 0, fragment: true, ..self.request.clone() };
        // There is room for it, or the stream is gone, which shows.
        let _ = requests.try_send(WatchRequest { request_union: Some(RequestUnion::CreateRequest(create)) });
        let requests = stream::unfold(receiver, |mut requests| async move { requests.recv().await.map(|request| (request, requests)) });
        let mut client = WatchClient::new(link.line.clone()).max_decoding_message_size(usize::MAX);
        Ok(client.watch(led(requests)).await?.into_inner())
    }

    /// What an error of the stream comes to: an answer is the watch's end, all else is a matter of the connection.
    async fn broken(&self, status: &Status) -> End {
        match verdict(status) {
            Verdict::Answer(err) => self.end(Err(err)).await,
            Verdict::Entry(err) => End::Refused(err),
            Verdict::NotDone(err) | Verdict::Open(err) => End::Broken(err),
        }
    }

    async fn end(&self, last: Result<WatchMessage>) -> End {
        // Nobody may be listening; it is over all the same.
        let _ = self.tell.send(last).await;
        End::Over
    }

    async fn take(&mut self, answer: WatchResponse, requests: &mpsc::Sender<WatchRequest>) -> Option<End> {
        let revision = answer.header.as_ref().map_or(0, |header| header.revision);
        if answer.canceled {
            return Some(if answer.compact_revision > 0 {
                self.end(Ok(WatchMessage::Compacted { revision: answer.compact_revision })).await
            } else {
                match ended(answer.created, answer.cancel_reason) {
                    err if err.kind() == ErrorKind::PermissionDenied => End::Refused(err),
                    err => self.end(Err(err)).await,
                }
            });
        }
        if answer.created {
            self.remote.note(answer.header.as_ref());
            self.entries = 0;
            if self.next == 0 {
                self.next = revision + 1;
            }
            let next = self.next;
            self.place.send_if_modified(|place| place.replace(next).is_none());
            if self.wants_progress {
                ask_progress(requests);
            }
            return None;
        }
        if answer.events.is_empty() && self.parts.is_empty() && !answer.fragment {
            self.next = self.next.max(revision + 1);
            self.wants_progress = false;
            return self.tell(WatchMessage::Progress { revision }).await;
        }
        match self.gather(answer.events, answer.fragment) {
            Ok(events) if events.is_empty() => {}
            Ok(events) => {
                if let Some(end) = self.tell(WatchMessage::Events(events)).await {
                    return Some(end);
                }
            }
            Err(err) => return Some(self.end(Err(err)).await),
        }
        None
    }

    /// Takes events that were not told before, and gives those whose revisions are whole. If more of the message comes, that may be of the
    /// last revision.
    fn gather(&mut self, events: Vec<Event>, more: bool) -> Result<Vec<WatchEvent>> {
        for event in events {
            let kv = event.kv.as_ref().ok_or_else(|| Error::Failed("an event came without its key".into()))?;
            let kv = decode(kv)?;
            if kv.mod_revision >= self.next {
                let kind = if event.r#type == EventType::Delete as i32 { EventKind::Delete } else { EventKind::Put };
                let event = WatchEvent { kind, kv, prev_kv: event.prev_kv.as_ref().map(decode).transpose()? };
                self.parts_bytes += weight(&event);
                self.parts.push(event);
            }
        }
        let whole = match self.parts.last().map(|last| last.kv.mod_revision) {
            // They are in the order of their revisions.
            Some(last) if more => self.parts.partition_point(|event| event.kv.mod_revision < last),
            _ => self.parts.len(),
        };
        let rest = self.parts.split_off(whole);
        let events = std::mem::replace(&mut self.parts, rest);
        self.parts_bytes = self.parts_bytes.saturating_sub(events.iter().map(weight).sum());
        if self.parts_bytes > REVISION_BYTES_MAX {
            return Err(ApplyError::ResponseTooLarge.into());
        }
        if let Some(last) = events.last() {
            self.next = last.kv.mod_revision + 1;
        }
        Ok(events)
    }

    async fn tell(&self, message: WatchMessage) -> Option<End> {
        self.tell.send(Ok(message)).await.err().map(|_| End::Over)
    }
}

fn ask_progress(requests: &mpsc::Sender<WatchRequest>) {
    // No room: requests are under way already.
    let _ = requests.try_send(WatchRequest { request_union: Some(RequestUnion::ProgressRequest(WatchProgressRequest {})) });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::client::backend::RuntimeEnd;
    use crate::client::remote::RemoteOptions;
    use crate::config::Url;
    use crate::proto::EncodedKv;

    fn event(revision: i64, key: &'static str) -> Event {
        let kv = KeyValue { key: key.into(), mod_revision: revision, ..KeyValue::default() };
        Event { kv: Some(EncodedKv::encode(&kv)), ..Event::default() }
    }

    fn follow(next: i64) -> (Follow, mpsc::Receiver<Result<WatchMessage>>) {
        let remote = Remote::new(Vec::<Url>::new().into(), RemoteOptions::default(), RuntimeEnd::default()).unwrap();
        let (tell, messages) = mpsc::channel(MESSAGES_MAX);
        let ((_, asked), (place, _)) = (mpsc::channel(1), watch::channel(None));
        let request = WatchCreateRequest::default();
        (Follow::new(remote, request, next, tell, asked, place), messages)
    }

    #[tokio::test]
    async fn fragments_are_told_revision_by_revision() {
        let (mut follow, _messages) = follow(5);
        let brief = |events: Vec<WatchEvent>| events.iter().map(|event| event.kv.mod_revision).collect::<Vec<_>>();
        // One that was told before, and the beginning of one that is not whole.
        let told = follow.gather(vec![event(4, "a"), event(5, "a"), event(6, "a"), event(7, "a")], true).unwrap();
        assert_eq!((brief(told), follow.next, follow.parts.len()), (vec![5, 6], 7, 1));
        let told = follow.gather(vec![event(7, "b")], true).unwrap();
        assert_eq!((brief(told), follow.next, follow.parts.len()), (vec![], 7, 2));
        let told = follow.gather(vec![event(7, "c"), event(8, "a")], true).unwrap();
        assert_eq!((brief(told), follow.next, follow.parts.len()), (vec![7, 7, 7], 8, 1));
        let told = follow.gather(vec![event(8, "b")], false).unwrap();
        assert_eq!((brief(told), follow.next, follow.parts_bytes), (vec![8, 8], 9, 0));
        // More than there may be of one revision.
        assert!(follow.gather(vec![event(9, "a")], true).unwrap().is_empty());
        follow.parts_bytes += REVISION_BYTES_MAX;
        let refused = follow.gather(vec![event(9, "b")], true).unwrap_err();
        assert!(matches!(refused, Error::Apply(ApplyError::ResponseTooLarge)), "{refused}");
    }

    #[tokio::test]
    async fn a_watch_that_is_ended_says_by_whom() {
        let cases = [
            (true, "mvcc: watcher range is empty", "Config"),
            (true, "etcdserver: permission denied", "who"),
            (true, "rpc error: code = PermissionDenied desc = etcdserver: permission denied", "who"),
            (true, "etcdserver: mvcc: required revision is a future revision", "Apply"),
            (false, "etcdserver: corrupt cluster", "Apply"),
            (false, "the server has had enough", "Refused"),
            (false, "", "Refused"),
        ];
        for (created, reason, expected) in cases {
            let (mut follow, mut messages) = follow(1);
            let (requests, _receiver) = mpsc::channel(2);
            let answer = WatchResponse { created, canceled: true, cancel_reason: reason.into(), ..WatchResponse::default() };
            let end = follow.take(answer, &requests).await;
            if expected == "who" {
                assert!(matches!(end, Some(End::Refused(Error::Apply(ApplyError::PermissionDenied)))), "{reason}");
                continue;
            }
            assert!(matches!(end, Some(End::Over)));
            let said = format!("{:?}", messages.recv().await.unwrap().unwrap_err());
            assert!(said.starts_with(expected), "{reason}: {said}");
        }
    }
}
