//! The Maintenance service: Alarm, Status, Defragment, Hash, HashKV, Snapshot.
//!
//! Defragment rewrites the storage into fresh files while it goes on being used; it returns when the old ones are gone.
//! Snapshot streams a backup in the [format of this crate](crate::snapshot), taken at one point of the log; it is made as
//! fast as the client takes it, on a thread kept for long reads.

use std::pin::Pin;
use std::time::SystemTime;

use bytes::Bytes;
use futures_util::Stream;
use tokio::sync::mpsc;
use tonic::{Request, Response, Status};

use crate::config::ETCD_VERSION;
use crate::error::{ApplyError, Error, Result};
use crate::node::{BackupStart, Node};
use crate::proto::etcdserverpb::maintenance_server::Maintenance;
use crate::proto::etcdserverpb::{
    AlarmRequest, AlarmResponse, AlarmType, DefragmentRequest, DefragmentResponse, DowngradeInfo, DowngradeRequest, DowngradeResponse,
    HashKvRequest, HashKvResponse, HashRequest, HashResponse, MoveLeaderRequest, MoveLeaderResponse, SnapshotRequest, SnapshotResponse,
    StatusRequest, StatusResponse,
};
use crate::snapshot::{Encoder, Header, Item, LogPosition};
use crate::storage::Revision;

use super::{Api, status};

/// Version of the data's format that Status and Snapshot tell, as etcd does: major and minor.
pub(crate) const STORAGE_VERSION: &str = "3.7.0";

/// Chunks of a backup that wait for the client, each up to 64 KiB. Beyond it the backup waits.
const SNAPSHOT_CHUNKS: usize = 8;

/// The checksum behind a backup: a SHA-256.
const CHECKSUM_BYTES: usize = 32;

#[tonic::async_trait]
impl Maintenance for Api {
    async fn alarm(&self, request: Request<AlarmRequest>) -> Result<Response<AlarmResponse>, Status> {
        self.node.alarm(request.into_inner()).await.map(Response::new).map_err(status)
    }

    async fn status(&self, _: Request<StatusRequest>) -> Result<Response<StatusResponse>, Status> {
        let node = &self.node;
        let stats = node.store().history().stats();
        let log = node.wal().log_state();
        let applied = node.machine.applied().log_id.map_or(0, |id| id.index);
        let alarms = node.alarms();
        let errors = alarms.iter().filter_map(|alarm| {
            let name = AlarmType::try_from(alarm.alarm).ok()?.as_str_name();
            Some(format!("memberID:{} alarm:{name} ", alarm.member_id))
        });
        let signed = |number: u64| i64::try_from(number).unwrap_or(i64::MAX);
        let response = StatusResponse {
            header: Some(node.header_now()),
            version: ETCD_VERSION.into(),
            db_size: signed(stats.disk_bytes),
            leader: node.leader(),
            raft_index: log.last.map_or(0, |last| last.index),
            raft_term: node.term(),
            raft_applied_index: applied,
            errors: if node.leader() == 0 { vec!["etcdserver: no leader".into()] } else { errors.collect() },
            db_size_in_use: signed(stats.live_bytes),
            is_learner: false,
            storage_version: STORAGE_VERSION.into(),
            db_size_quota: signed(node.options.quota_bytes.unwrap_or(0)),
            downgrade_info: Some(DowngradeInfo::default()),
        };
        Ok(Response::new(response))
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
        let hash = self.node.hash_kv(request.into_inner().revision).await.map_err(status)?;
        Ok(Response::new(HashKvResponse {
            header: Some(self.node.header(hash.revision)),
            hash: hash.hash,
            compact_revision: hash.compacted,
            hash_revision: hash.hashed,
        }))
    }

    type SnapshotStream = Pin<Box<dyn Stream<Item = Result<SnapshotResponse, Status>> + Send>>;

    async fn snapshot(&self, _: Request<SnapshotRequest>) -> Result<Response<Self::SnapshotStream>, Status> {
        let start = self.node.start_backup().await.map_err(status)?;
        let (chunks, mut receiver) = mpsc::channel(SNAPSHOT_CHUNKS);
        let node = self.node.clone();
        self.node.spawn_blocking(move || {
            let began = node.machine.now();
            let sent = backup(&node, start, &mut |blob| {
                let response = SnapshotResponse { blob, version: STORAGE_VERSION.into(), ..SnapshotResponse::default() };
                // A client that has gone away ends the backup.
                chunks.blocking_send(Ok(response)).map_err(|_| Error::Stopped)
            });
            match sent {
                Ok(()) => node.counters().snapshot.observe(node.machine.now().saturating_sub(began)),
                Err(err) => _ = chunks.blocking_send(Err(status(err))),
            }
        });
        Ok(Response::new(Box::pin(futures_util::stream::poll_fn(move |cx| receiver.poll_recv(cx)))))
    }

    async fn move_leader(&self, request: Request<MoveLeaderRequest>) -> Result<Response<MoveLeaderResponse>, Status> {
        // The only member leads already; there is nobody else to hand over to.
        if request.into_inner().target_id == self.node.identity.member_id {
            Ok(Response::new(MoveLeaderResponse { header: None }))
        } else {
            Err(status(ApplyError::BadLeaderTransferee.into()))
        }
    }

    async fn downgrade(&self, _: Request<DowngradeRequest>) -> Result<Response<DowngradeResponse>, Status> {
        Err(Status::unimplemented("etcdserver: downgrading is not implemented"))
    }
}

/// Writes everything that can be read at the start's revision or later, chunk by chunk.
pub(crate) fn backup(node: &Node, start: BackupStart, send: &mut dyn FnMut(Bytes) -> Result<()>) -> Result<()> {
    let BackupStart { pin, compacted, applied, metas } = start;
    let created = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let header = Header {
        cluster_id: node.identity.cluster_id,
        member_id: node.identity.member_id,
        revision: pin.at(),
        compact_revision: compacted,
        applied: LogPosition { term: applied.map_or(0, |id| *id.leader_id), node: 0, index: applied.map_or(0, |id| id.index) },
        created_unix_s: created.as_secs(),
        version: env!("CARGO_PKG_VERSION").into(),
    };
    let mut encoder = Encoder::new(&header)?;
    let mut push = |encoder: &mut Encoder, item: &Item| -> Result<()> {
        encoder.push(item)?;
        while let Some(chunk) = encoder.next_chunk() {
            send(chunk)?;
        }
        Ok(())
    };
    for (key, value) in metas {
        push(&mut encoder, &Item::Meta { key: key.into(), value })?;
    }
    let end = Revision { main: pin.at() + 1, sub: 0 };
    pin.store().history().scan(Revision::default(), end, &mut |revision, record| {
        let item = Item::Record { main: revision.main, sub: revision.sub, tombstone: record.tombstone, bytes: record.bytes.clone() };
        push(&mut encoder, &item)?;
        Ok(true)
    })?;
    encoder.finish();
    let mut last = Bytes::new();
    while let Some(chunk) = encoder.next_chunk() {
        if !last.is_empty() {
            send(std::mem::replace(&mut last, chunk))?;
        } else {
            last = chunk;
        }
    }
    // The checksum comes in a part of its own, as etcd sends it.
    let sum = last.split_off(last.len().saturating_sub(CHECKSUM_BYTES));
    send(last)?;
    send(sum)?;
    Ok(())
}
