//! A Watch stream whose answers are collected by a task of their own, so that a test can go on writing meanwhile.

use std::time::{Duration, Instant};

use tokio::sync::mpsc;
use tonic::transport::Channel;

use super::pb::watch_client::WatchClient;
use super::pb::watch_request::RequestUnion;
use super::pb::{self, WatchCreateRequest, WatchRequest, WatchResponse};

/// How long an answer may take that must come. Only a broken server gets near it.
const ANSWER_LIMIT: Duration = Duration::from_secs(20);

/// How long to wait until a progress request is sent again: etcd drops it while a watch of the stream is catching up.
const PROGRESS_RETRY: Duration = Duration::from_millis(20);

/// One stream. Answers are kept in the order in which they came, in [`WatchStream::seen`].
pub struct WatchStream {
    requests: mpsc::Sender<WatchRequest>,
    answers: mpsc::UnboundedReceiver<Result<WatchResponse, tonic::Status>>,
    pub seen: Vec<WatchResponse>,
    /// How the stream ended, if it has: the error, or `None` for a clean end.
    pub ended: Option<Option<tonic::Status>>,
}

impl WatchStream {
    pub async fn open(client: &WatchClient<Channel>) -> WatchStream {
        let mut client = client.clone();
        let (requests, to_send) = mpsc::channel(256);
        let (deliver, answers) = mpsc::unbounded_channel();
        tokio::spawn(async move {
            let stream = match client.watch(tokio_stream::wrappers::ReceiverStream::new(to_send)).await {
                Ok(answer) => answer.into_inner(),
                Err(status) => return drop(deliver.send(Err(status))),
            };
            let mut stream = stream;
            loop {
                match stream.message().await {
                    Ok(Some(answer)) => drop(deliver.send(Ok(answer))),
                    Ok(None) => return,
                    Err(status) => return drop(deliver.send(Err(status))),
                }
            }
        });
        WatchStream { requests, answers, seen: Vec::new(), ended: None }
    }

    pub async fn send(&mut self, request: RequestUnion) {
        // A stream that the server has ended shows in what is received.
        let _ = self.requests.send(WatchRequest { request_union: Some(request) }).await;
    }

    /// Sends a request without any union member set.
    pub async fn send_empty(&mut self) {
        let _ = self.requests.send(WatchRequest { request_union: None }).await;
    }

    /// Takes in what has come so far, without waiting.
    pub fn drain(&mut self) {
        while self.ended.is_none() {
            match self.answers.try_recv() {
                Ok(answer) => self.take(Some(answer)),
                Err(mpsc::error::TryRecvError::Empty) => return,
                Err(mpsc::error::TryRecvError::Disconnected) => self.take(None),
            }
        }
    }

    fn take(&mut self, answer: Option<Result<WatchResponse, tonic::Status>>) {
        match answer {
            Some(Ok(answer)) => self.seen.push(answer),
            Some(Err(status)) => self.ended = Some(Some(status)),
            None => self.ended = Some(None),
        }
    }

    /// Waits until `found` holds for the list of answers; false if it did not within `limit` or the stream ended.
    pub async fn until(&mut self, limit: Duration, mut found: impl FnMut(&[WatchResponse]) -> bool) -> bool {
        let deadline = Instant::now() + limit;
        loop {
            self.drain();
            if found(&self.seen) {
                return true;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() || self.ended.is_some() {
                return false;
            }
            if let Ok(answer) = tokio::time::timeout(left, self.answers.recv()).await {
                self.take(answer);
            }
        }
    }

    /// Creates a watch and returns the answer that says so. That may be a refusal.
    ///
    /// # Panics
    /// When no such answer comes.
    pub async fn create(&mut self, request: WatchCreateRequest) -> WatchResponse {
        self.drain();
        let from = self.seen.len();
        self.send(RequestUnion::CreateRequest(request.clone())).await;
        let created = |seen: &[WatchResponse]| seen[from..].iter().position(|r| r.created);
        assert!(self.until(ANSWER_LIMIT, |seen| created(seen).is_some()).await, "no answer to {request:?}: {:?}", self.ended);
        self.seen[from + created(&self.seen).unwrap_or_default()].clone()
    }

    /// Cancels a watch that is there, and waits for the answer that says so.
    ///
    /// # Panics
    /// When no such answer comes.
    pub async fn cancel(&mut self, watch_id: i64) {
        self.drain();
        let from = self.seen.len();
        self.send(RequestUnion::CancelRequest(pb::WatchCancelRequest { watch_id })).await;
        let done = |seen: &[WatchResponse]| seen[from..].iter().any(|r| r.canceled && r.watch_id == watch_id);
        assert!(self.until(ANSWER_LIMIT, done).await, "no answer to the cancelling of watch {watch_id}: {:?}", self.ended);
    }

    /// Waits until every watch of the stream has been sent everything up to `revision`: until a progress answer for the
    /// whole stream says so. The stream must have at least one watch; etcd answers for an empty one never.
    ///
    /// # Panics
    /// When no such answer comes.
    pub async fn barrier(&mut self, revision: i64) {
        self.drain();
        let from = self.seen.len();
        let reached = |r: &WatchResponse| is_progress(r) && r.watch_id == -1 && r.header.as_ref().is_some_and(|h| h.revision >= revision);
        let deadline = Instant::now() + ANSWER_LIMIT;
        loop {
            self.send(RequestUnion::ProgressRequest(pb::WatchProgressRequest {})).await;
            if self.until(PROGRESS_RETRY, |seen| seen[from..].iter().any(reached)).await {
                return;
            }
            assert!(self.ended.is_none(), "the stream ended: {:?}", self.ended);
            assert!(Instant::now() < deadline, "no progress answer for revision {revision}");
        }
    }
}

/// Whether an answer says nothing but how far the stream has come.
pub fn is_progress(r: &WatchResponse) -> bool {
    r.events.is_empty() && !r.created && !r.canceled
}
