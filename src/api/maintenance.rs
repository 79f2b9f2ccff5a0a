//! The Maintenance service: Alarm, Status, Defragment, Hash, HashKV, Snapshot, MoveLeader.
//!
//! Defragment rewrites the storage into fresh files while it goes on being used; it returns when the old ones are gone.
//! Snapshot streams a backup in the [format of this crate](crate::snapshot), taken at one point of the log. It is made step by
//! step, each when the client has taken the one before: a thread for long reads is kept for the length of a step, never while a
//! client makes up its mind, so that backups do not stand in the way of reads.

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use futures_util::Stream;
use tonic::{Request, Response, Status};

use crate::config::ETCD_VERSION;
use crate::error::{ApplyError, Error, Result};
use crate::node::Node;
use crate::pace::Activity;
use crate::proto::etcdserverpb::maintenance_server::Maintenance;
use crate::proto::etcdserverpb::{
    AlarmRequest, AlarmResponse, AlarmType, DefragmentRequest, DefragmentResponse, DowngradeInfo, DowngradeRequest, DowngradeResponse,
    HashKvRequest, HashKvResponse, HashRequest, HashResponse, MoveLeaderRequest, MoveLeaderResponse, SnapshotRequest, SnapshotResponse,
    StatusRequest, StatusResponse,
};
use crate::raft::outgoing::Writer;

use super::{Api, status};

/// Version of the data's format that Status and Snapshot tell, as etcd does: major and minor.
pub(crate) const STORAGE_VERSION: &str = "3.7.0";

/// Snapshots that clients may take at the same time, over all connections. One more is refused with `too many requests`: each
/// holds a revision, which compaction has to keep, and up to a step's bytes and one record.
pub(crate) const SNAPSHOTS_MAX: usize = 8;

/// While clients write, a backup rests after each step for this many times as long as the step took: they come first. Nobody's write
/// waits for a backup, and a backup of an idle member goes at full speed.
const REST_STEPS: u32 = 2;

impl Api {
    /// How this member is, as far as it knows without asking anyone.
    pub fn status_now(&self) -> StatusResponse {
        let node = &self.node;
        let stats = node.store().history().stats();
        let log = node.wal().log_state();
        let applied = node.machine.applied().log_id.map_or(0, |id| id.index);
        let alarms = node.alarms();
        let errors = alarms.iter().filter_map(|alarm| {
            let name = AlarmType::try_from(alarm.alarm).ok()?.as_str_name();
            Some(format!("memberID:{} alarm:{name} ", alarm.member_id))
        });
        let leader = node.present_leader();
        let signed = |number: u64| i64::try_from(number).unwrap_or(i64::MAX);
        StatusResponse {
            header: Some(node.header_now()),
            version: ETCD_VERSION.into(),
            db_size: signed(stats.disk_bytes),
            leader,
            raft_index: log.last.map_or(0, |last| last.index),
            raft_term: node.term(),
            raft_applied_index: applied,
            errors: if leader == 0 { vec!["etcdserver: no leader".into()] } else { errors.collect() },
            db_size_in_use: signed(stats.live_bytes),
            is_learner: node.is_learner(),
            storage_version: STORAGE_VERSION.into(),
            db_size_quota: signed(node.options.quota_bytes.unwrap_or(0)),
            downgrade_info: Some(DowngradeInfo::default()),
        }
    }

    /// A hash of the history up to a revision (0: all of it).
    pub async fn hash_of(&self, revision: i64) -> Result<HashKvResponse> {
        let hash = self.node.hash_kv(revision).await?;
        Ok(HashKvResponse {
            header: Some(self.node.header(hash.revision)),
            hash: hash.hash,
            compact_revision: hash.compacted,
            hash_revision: hash.hashed,
        })
    }
}

#[tonic::async_trait]
impl Maintenance for Api {
    async fn alarm(&self, request: Request<AlarmRequest>) -> Result<Response<AlarmResponse>, Status> {
        self.node.alarm(request.into_inner()).await.map(Response::new).map_err(status)
    }

    async fn status(&self, _: Request<StatusRequest>) -> Result<Response<StatusResponse>, Status> {
        Ok(Response::new(self.status_now()))
    }

    async fn defragment(&self, _: Request<DefragmentRequest>) -> Result<Response<DefragmentResponse>, Status> {
        self.node.background().defragment().await.map_err(status)?;
        // etcd's answer has no header either.
        Ok(Response::new(DefragmentResponse { header: None }))
    }

    async fn hash(&self, _: Request<HashRequest>) -> Result<Response<HashResponse>, Status> {
        let hash = self.node.hash_kv(0).await.map_err(status)?;
        Ok(Response::new(HashResponse { header: Some(self.node.header(hash.revision)), hash: hash.hash }))
    }

    async fn hash_kv(&self, request: Request<HashKvRequest>) -> Result<Response<HashKvResponse>, Status> {
        self.hash_of(request.into_inner().revision).await.map(Response::new).map_err(status)
    }

    type SnapshotStream = Pin<Box<dyn Stream<Item = Result<SnapshotResponse, Status>> + Send>>;

    async fn snapshot(&self, _: Request<SnapshotRequest>) -> Result<Response<Self::SnapshotStream>, Status> {
        let Ok(place) = self.snapshots.clone().try_acquire_owned() else {
            return Err(status(ApplyError::TooManyRequests.into()));
        };
        let backup = Backup::start(self.node.clone()).await.map_err(status)?;
        let blobs = futures_util::stream::try_unfold((backup, place), |(mut backup, place)| async move {
            let Some(blob) = backup.next().await.map_err(status)? else { return Ok(None) };
            let response = SnapshotResponse { blob, version: STORAGE_VERSION.into(), ..SnapshotResponse::default() };
            Ok(Some((response, (backup, place))))
        });
        Ok(Response::new(Box::pin(blobs)))
    }

    async fn move_leader(&self, request: Request<MoveLeaderRequest>) -> Result<Response<MoveLeaderResponse>, Status> {
        self.node.move_leader(request.into_inner().target_id).await.map_err(status)?;
        Ok(Response::new(MoveLeaderResponse { header: None }))
    }

    async fn downgrade(&self, _: Request<DowngradeRequest>) -> Result<Response<DowngradeResponse>, Status> {
        Err(Status::unimplemented("etcdserver: downgrading is not implemented"))
    }
}

/// A backup in the making: everything that can be read at one revision or later, chunk by chunk.
///
/// Compaction keeps what it still has to read, until it is dropped.
pub(crate) struct Backup {
    node: Arc<Node>,
    began: Duration,
    /// None while a step is under way, and after one was given up.
    writer: Option<Writer>,
    ready: VecDeque<Bytes>,
    /// Of the store's revision.
    activity: Activity,
}

impl Backup {
    /// Begins one at the newest point of the log.
    ///
    /// # Errors
    /// As a linearizable read.
    pub async fn start(node: Arc<Node>) -> Result<Backup> {
        let began = node.machine.now();
        let start = node.start_backup().await?;
        let created = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let writer = Writer::new(node.identity.cluster_id, node.identity.member_id, created.as_secs(), start)?;
        Ok(Backup { node, began, writer: Some(writer), ready: VecDeque::new(), activity: Activity::default() })
    }

    /// The next chunk, of up to 64 KiB; none after the last, which is the checksum alone, as etcd sends it.
    ///
    /// When the future is dropped before it is ready, the backup is over: the next call fails.
    ///
    /// # Errors
    /// What reading the storage fails with, and `Stopped` when the member stops.
    pub async fn next(&mut self) -> Result<Option<Bytes>> {
        loop {
            if let Some(chunk) = self.ready.pop_front() {
                return Ok(Some(chunk));
            }
            let Some(mut writer) = self.writer.take() else { return Err(Error::Failed("a backup was given up halfway".into())) };
            if writer.is_finished() {
                self.writer = Some(writer);
                return Ok(None);
            }
            let began = self.node.machine.now();
            let beside_writes = self.activity.is_recent(began, self.node.store().revision());
            let step = self.node.blocking(move || writer.step().map(|chunks| (writer, chunks))).await?;
            let (writer, chunks) = step?;
            if !writer.is_finished() && beside_writes {
                self.node.pause(REST_STEPS * self.node.machine.now().saturating_sub(began)).await?;
            }
            if writer.is_finished() {
                self.node.counters().snapshot.observe(self.node.machine.now().saturating_sub(self.began));
            }
            self.writer = Some(writer);
            self.ready = chunks;
        }
    }
}
