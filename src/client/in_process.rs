//! The member in this process: each call is one of its node's, with nothing in between.

use std::future::poll_fn;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use tokio::time::{Interval, MissedTickBehavior, interval_at};

use super::watch::{EventKind, WatchEvent, WatchMessage, decode, ended};
use super::{LeaseTime, Result};
use crate::api::Api;
use crate::api::kv::collect;
use crate::api::maintenance::Backup;
use crate::error::{ApplyError, Error};
use crate::lock::lock;
use crate::mvcc::watch::{Batch, Session, WatchAnswer};
use crate::node::{Health, Node};
use crate::proto::etcdserverpb::{
    AlarmRequest, AlarmResponse, CompactionRequest, CompactionResponse, DeleteRangeRequest, DeleteRangeResponse, HashKvResponse,
    LeaseGrantRequest, LeaseGrantResponse, LeaseRevokeRequest, LeaseRevokeResponse, Member, PutRequest, PutResponse, RangeRequest,
    RangeResponse, StatusResponse, TxnRequest, TxnResponse, WatchCreateRequest,
};

#[derive(Clone)]
pub(super) struct InProcess {
    pub node: Arc<Node>,
    pub api: Api,
}

impl InProcess {
    pub async fn range(&self, request: RangeRequest) -> Result<RangeResponse> {
        let answer = self.node.range(&request).await?;
        collect(&self.node, answer).await
    }

    pub async fn put(&self, request: PutRequest) -> Result<PutResponse> {
        // Lazily: whether the member runs is looked at before the put is queued.
        self.written(async { self.node.put(request).await }).await
    }

    pub async fn delete_range(&self, request: DeleteRangeRequest) -> Result<DeleteRangeResponse> {
        self.written(self.node.delete_range(request)).await
    }

    pub async fn txn(&self, request: TxnRequest) -> Result<TxnResponse> {
        self.written(self.node.txn(request)).await
    }

    pub async fn compact(&self, request: CompactionRequest) -> Result<CompactionResponse> {
        self.written(self.node.compact(request)).await
    }

    pub async fn lease_grant(&self, request: LeaseGrantRequest) -> Result<LeaseGrantResponse> {
        self.written(self.node.lease_grant(request)).await
    }

    pub async fn lease_revoke(&self, request: LeaseRevokeRequest) -> Result<LeaseRevokeResponse> {
        self.written(self.node.lease_revoke(request)).await
    }

    pub async fn lease_renew(&self, id: i64) -> Result<i64> {
        self.node.lease_renew(id).await
    }

    /// The member finds the leader by itself, and tries every few milliseconds while there is none.
    pub async fn lease_renew_soon(&self, id: i64, _: Duration, _: bool) -> Result<i64> {
        self.node.lease_renew(id).await
    }

    pub async fn lease_time_to_live(&self, id: i64) -> Result<Option<LeaseTime>> {
        self.node.read_barrier().await?;
        let remaining = self.node.lease_remaining(id).await?;
        let found = lock(&self.node.machine.lessor).time_to_live(id, self.node.machine.now(), true);
        Ok(found.filter(|_| remaining >= 0).map(|found| LeaseTime { granted: found.granted, remaining, keys: found.keys }))
    }

    pub async fn leases(&self) -> Result<Vec<i64>> {
        self.node.read_barrier().await?;
        Ok(lock(&self.node.machine.lessor).leases())
    }

    pub async fn alarm(&self, request: AlarmRequest) -> Result<AlarmResponse> {
        self.written(self.node.alarm(request)).await
    }

    pub async fn member_list(&self) -> Result<Vec<Member>> {
        self.node.read_barrier().await?;
        Ok(self.api.members())
    }

    pub async fn member_status(&self) -> Result<StatusResponse> {
        self.check_running()?;
        Ok(self.api.status_now())
    }

    pub async fn hash_kv(&self, revision: i64) -> Result<HashKvResponse> {
        self.api.hash_of(revision).await
    }

    pub async fn defragment(&self) -> Result<()> {
        self.node.background().defragment().await
    }

    pub async fn backup(&self) -> Result<Backup> {
        Backup::start(self.node.clone()).await
    }

    fn is_running(&self) -> bool {
        matches!(*self.node.health().borrow(), Health::Running)
    }

    fn check_running(&self) -> Result<()> {
        if self.is_running() { Ok(()) } else { Err(Error::Stopped) }
    }

    /// What came of a write: if the member stopped over it, that is open, and not the same as one that took no more requests.
    async fn written<T>(&self, write: impl Future<Output = Result<T>>) -> Result<T> {
        let was_running = self.is_running();
        match write.await {
            Err(Error::Stopped) if was_running => Err(Error::OutcomeUnknown("the member stopped before it had answered".into())),
            outcome => outcome,
        }
    }
}

/// A watch on the member in this process.
pub(super) struct InProcessWatch {
    session: Session,
    node: Arc<Node>,
    /// Ticks when a bookmark is due; none were asked for without.
    bookmarks: Option<Interval>,
    /// From which revision it tells; `None` until that is known.
    start: Option<i64>,
    asked_start: i64,
    ended: bool,
}

impl InProcessWatch {
    pub fn new(member: &InProcess, request: WatchCreateRequest) -> Self {
        let node = member.node.clone();
        let mut session = node.watch();
        let bookmarks = request.progress_notify.then(|| {
            let _entered = node.runtime().enter();
            let every = member.api.info.watch_progress_interval;
            let mut ticks = interval_at(tokio::time::Instant::now() + every, every);
            ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
            ticks
        });
        let asked_start = request.start_revision;
        session.create(&WatchCreateRequest { watch_id: 0, fragment: false, ..request });
        InProcessWatch { session, node, bookmarks, start: None, asked_start, ended: false }
    }

    /// As [`Watcher::started`](super::Watcher::started).
    pub async fn started(&mut self) -> Result<i64> {
        loop {
            if let Some(start) = self.start {
                return Ok(start);
            }
            // The creation is answered before all else.
            let answer = self.answer().await?;
            if let Some(message) = self.take(answer)? {
                // A start that was compacted away; it comes after the creation.
                return Err(Error::Failed(format!("a watch began with {message:?}")));
            }
        }
    }

    /// As [`Watcher::next`](super::Watcher::next).
    pub async fn next(&mut self) -> Result<Option<WatchMessage>> {
        while !self.ended {
            let answer = self.answer().await?;
            if let Some(message) = self.take(answer)? {
                return Ok(Some(message));
            }
        }
        Ok(None)
    }

    async fn answer(&mut self) -> Result<WatchAnswer> {
        let mut health = self.node.health();
        loop {
            let (session, bookmarks, node) = (&mut self.session, &mut self.bookmarks, &self.node);
            let tick = async {
                match bookmarks {
                    Some(bookmarks) => drop(bookmarks.tick().await),
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                _ = health.wait_for(|health| !matches!(health, Health::Running)) => return Err(Error::Stopped),
                answer = poll_fn(|cx| match session.poll_next(cx) {
                    // Looked at only now: it is woken when that changes.
                    Poll::Pending if node.is_condemned() => Poll::Ready(Err(ApplyError::Corrupt.into())),
                    polled => polled,
                }) => return answer,
                () = tick => {}
            }
            self.session.notify_progress();
        }
    }

    fn take(&mut self, answer: WatchAnswer) -> Result<Option<WatchMessage>> {
        if self.node.is_condemned() {
            return Err(ApplyError::Corrupt.into());
        }
        if answer.canceled {
            self.ended = true;
            if answer.compact_revision > 0 {
                return Ok(Some(WatchMessage::Compacted { revision: answer.compact_revision }));
            }
            return Err(ended(answer.created, answer.cancel_reason));
        }
        if answer.created {
            self.start = Some(if self.asked_start == 0 { answer.revision + 1 } else { self.asked_start });
            return Ok(None);
        }
        if answer.batches.is_empty() {
            return Ok(Some(WatchMessage::Progress { revision: answer.revision }));
        }
        let mut events = Vec::new();
        for event in answer.batches.iter().flat_map(|batch| &batch.events) {
            let prev = if answer.prev_kv { Batch::prev(event, self.session.store())? } else { None };
            events.push(WatchEvent {
                kind: if event.delete { EventKind::Delete } else { EventKind::Put },
                kv: decode(&event.kv)?,
                prev_kv: prev.as_ref().map(decode).transpose()?,
            });
        }
        Ok(Some(WatchMessage::Events(events)))
    }

    pub fn request_progress(&mut self) {
        self.session.progress();
    }
}
