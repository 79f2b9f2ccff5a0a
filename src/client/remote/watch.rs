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
use crate::client::watch::{EventKind, WatchEvent, WatchMessage, decode};
use crate::error::{Error, Result};
use crate::proto::etcdserverpb::watch_client::WatchClient;
use crate::proto::etcdserverpb::watch_request::RequestUnion;
use crate::proto::etcdserverpb::{WatchCreateRequest, WatchProgressRequest, WatchRequest, WatchResponse};
use crate::proto::mvccpb::Event;
use crate::proto::mvccpb::event::EventType;

use super::links::Link;
use super::verdict::{Verdict, verdict};

/// Messages that wait to be taken. Beyond it the stream is not read, and the member keeps what comes, as for any slow client.
const MESSAGES_MAX: usize = 16;

/// How long a member may take to open a watch before the next one is asked.
const OPEN_LIMIT: Duration = Duration::from_secs(5);

pub(in crate::client) struct RemoteWatch {
    messages: mpsc::Receiver<Result<WatchMessage>>,
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
        let follow = Follow { remote, request, next, tell, asked, place, wants_progress: false, parts: Vec::new() };
        RemoteWatch { messages, asks, started, task: Task::spawn(&runtime, follow.run()) }
    }

    pub async fn started(&mut self) -> Result<i64> {
        if let Ok(start) = self.started.wait_for(Option::is_some).await {
            return start.ok_or(Error::Stopped);
        }
        // It ended before it began, and has said why.
        match self.messages.recv().await {
            Some(Err(err)) => Err(err),
            _ => Err(Error::Stopped),
        }
    }

    pub async fn next(&mut self) -> Result<Option<WatchMessage>> {
        self.messages.recv().await.transpose()
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
    /// Events of a message of which the last fragment has not come. No more than a revision's, which fit in one request.
    parts: Vec<Event>,
}

/// Why a stream is read no more.
enum End {
    /// The watch is over, or nobody listens.
    Over,
    /// It is to be opened anew.
    Broken(Error),
}

impl Follow {
    async fn run(mut self) {
        let mut pauses = Pauses::new();
        loop {
            let err = match self.remote.shared.links.link(&self.remote.timers).await {
                Err(err) => err,
                Ok(link) => {
                    let before = self.next;
                    match self.follow(&link).await {
                        End::Over => return,
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
                () = pause => {}
                () = self.tell.closed() => return,
            }
        }
    }

    /// Opens the watch with a member and tells what comes.
    async fn follow(&mut self, link: &Link) -> End {
        self.parts.clear();
        let (requests, receiver) = mpsc::channel(2);
        let opening = self.remote.timers.within(Some(OPEN_LIMIT), self.open(link, &requests, receiver)).await;
        let mut answers = match opening {
            Some(Ok(answers)) => answers,
            Some(Err(status)) => return self.broken(&status).await,
            None => return End::Broken(Error::Timeout),
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
        &self,
        link: &Link,
        requests: &mpsc::Sender<WatchRequest>,
        receiver: mpsc::Receiver<WatchRequest>,
    ) -> Result<Streaming<WatchResponse>, Status> {
        let create = WatchCreateRequest { start_revision: self.next, watch_id: 0, fragment: true, ..self.request.clone() };
        // There is room for it, or the stream is gone, which shows.
        let _ = requests.try_send(WatchRequest { request_union: Some(RequestUnion::CreateRequest(create)) });
        let requests = stream::unfold(receiver, |mut requests| async move { requests.recv().await.map(|request| (request, requests)) });
        let mut client = WatchClient::new(link.channel.clone()).max_decoding_message_size(usize::MAX);
        Ok(client.watch(led(requests)).await?.into_inner())
    }

    /// What an error of the stream comes to: an answer is the watch's end, all else is a matter of the connection.
    async fn broken(&self, status: &Status) -> End {
        match verdict(status) {
            Verdict::Answer(err) => self.end(Err(err)).await,
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
                self.end(Err(Error::Config(answer.cancel_reason))).await
            });
        }
        if answer.created {
            self.remote.note(answer.header.as_ref());
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
        self.parts.extend(answer.events);
        if answer.fragment {
            return None;
        }
        match self.events() {
            Ok(events) if events.is_empty() => None,
            Ok(events) => self.tell(WatchMessage::Events(events)).await,
            Err(err) => Some(self.end(Err(err)).await),
        }
    }

    /// What was gathered, and not told before.
    fn events(&mut self) -> Result<Vec<WatchEvent>> {
        let mut events = Vec::with_capacity(self.parts.len());
        for event in self.parts.drain(..) {
            let kv = event.kv.as_ref().ok_or_else(|| Error::Failed("an event came without its key".into()))?;
            let kv = decode(kv)?;
            if kv.mod_revision >= self.next {
                let kind = if event.r#type == EventType::Delete as i32 { EventKind::Delete } else { EventKind::Put };
                events.push(WatchEvent { kind, kv, prev_kv: event.prev_kv.as_ref().map(decode).transpose()? });
            }
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
