//! The wire: one connection to a member, and its answers in the words of the model.

use std::collections::BTreeMap;
use std::time::Duration;

use quorate::proto::EncodedKv;
use quorate::proto::etcdserverpb::compare::{CompareResult, CompareTarget, TargetUnion};
use quorate::proto::etcdserverpb::kv_client::KvClient;
use quorate::proto::etcdserverpb::lease_client::LeaseClient;
use quorate::proto::etcdserverpb::maintenance_client::MaintenanceClient;
use quorate::proto::etcdserverpb::request_op::Request;
use quorate::proto::etcdserverpb::watch_client::WatchClient;
use quorate::proto::etcdserverpb::watch_request::RequestUnion;
use quorate::proto::etcdserverpb::*;
use quorate::proto::mvccpb::event::EventType;
use tonic::transport::{Channel, Endpoint};
use tonic::{Status, Streaming};

use crate::model::{Answer, Event, Item, Op, Text};

/// How long a connection may take to come about.
const CONNECT_LIMIT: Duration = Duration::from_secs(5);

/// The range that holds all keys begins and ends with this.
const ALL: &[u8] = b"\0";

/// A connection of its own.
#[derive(Clone)]
pub struct Client {
    kv: KvClient<Channel>,
    watch: WatchClient<Channel>,
    lease: LeaseClient<Channel>,
    maintenance: MaintenanceClient<Channel>,
}

/// What a member says of itself in an answer, and all keys of a range with what is stored with them.
pub struct Found {
    pub header: ResponseHeader,
    pub items: BTreeMap<Text, Item>,
}

impl Client {
    /// Connects with the first request.
    pub fn new(url: &str) -> Client {
        let endpoint = Endpoint::from_shared(url.to_owned()).expect("a valid URL");
        let channel = endpoint.connect_timeout(CONNECT_LIMIT).connect_lazy();
        Client {
            kv: KvClient::new(channel.clone()).max_decoding_message_size(usize::MAX),
            watch: WatchClient::new(channel.clone()).max_decoding_message_size(usize::MAX),
            lease: LeaseClient::new(channel.clone()),
            maintenance: MaintenanceClient::new(channel),
        }
    }

    /// Sends a request that changes something.
    pub async fn send(&mut self, op: &Op) -> Result<Answer, Status> {
        let (mut deleted, mut succeeded) = (0, true);
        let header = match op {
            Op::Put { key, value, lease } => self.kv.put(put(key, value, *lease)).await?.into_inner().header,
            Op::Delete { key, end } => {
                let answer = self.kv.delete_range(delete(key, end)).await?.into_inner();
                deleted = answer.deleted;
                answer.header
            }
            Op::Txn { key, version, then, otherwise } => {
                let compare = Compare {
                    result: CompareResult::Equal as i32,
                    target: CompareTarget::Version as i32,
                    key: key.0.clone(),
                    target_union: Some(TargetUnion::Version(*version)),
                    ..Default::default()
                };
                let branch = |ops: &[Op]| ops.iter().map(txn_op).collect();
                let request = TxnRequest { compare: vec![compare], success: branch(then), failure: branch(otherwise) };
                let answer = self.kv.txn(request).await?.into_inner();
                succeeded = answer.succeeded;
                answer.header
            }
            Op::Grant { id, ttl } => self.lease.lease_grant(LeaseGrantRequest { id: *id, ttl: *ttl }).await?.into_inner().header,
            Op::Revoke { id } => self.lease.lease_revoke(LeaseRevokeRequest { id: *id }).await?.into_inner().header,
            Op::Compact { revision } => {
                self.kv.compact(CompactionRequest { revision: *revision, physical: false }).await?.into_inner().header
            }
        };
        let revision = header.map_or(0, |header| header.revision);
        Ok(Answer { revision, deleted, succeeded })
    }

    /// The keys that begin with `prefix`, all of them if it is empty, at a revision (0: now).
    pub async fn read(&mut self, prefix: &str, revision: i64) -> Result<Found, Status> {
        let mut request = RangeRequest { key: prefix.to_owned().into(), revision, ..Default::default() };
        if prefix.is_empty() {
            (request.key, request.range_end) = (ALL.into(), ALL.into());
        } else {
            let mut end = prefix.as_bytes().to_vec();
            *end.last_mut().expect("not empty") += 1;
            request.range_end = end.into();
        }
        let answer = self.kv.range(request).await?.into_inner();
        assert_eq!(answer.count, answer.kvs.len() as i64, "the count of {prefix:?} at revision {revision}");
        Ok(Found { header: answer.header.unwrap_or_default(), items: answer.kvs.iter().map(item).collect() })
    }

    /// All events from a revision on.
    pub async fn watch(&mut self, start_revision: i64) -> Result<Watching, Status> {
        let request = WatchCreateRequest { key: ALL.into(), range_end: ALL.into(), start_revision, ..Default::default() };
        let request = WatchRequest { request_union: Some(RequestUnion::CreateRequest(request)) };
        let (requests, receiver) = tokio::sync::mpsc::channel(1);
        requests.send(request).await.expect("there is room for one");
        let answers = self.watch.watch(tokio_stream::wrappers::ReceiverStream::new(receiver)).await?.into_inner();
        Ok(Watching { answers, _requests: requests })
    }

    /// Revision, compaction (0: none) and hash of the history.
    pub async fn hash(&mut self) -> Result<(i64, i64, u32), Status> {
        let answer = self.maintenance.hash_kv(HashKvRequest { revision: 0 }).await?.into_inner();
        Ok((answer.header.map_or(0, |header| header.revision), answer.compact_revision.max(0), answer.hash))
    }

    /// The ids of all leases, in order.
    pub async fn leases(&mut self) -> Result<Vec<i64>, Status> {
        let answer = self.lease.lease_leases(LeaseLeasesRequest {}).await?.into_inner();
        let mut ids: Vec<i64> = answer.leases.iter().map(|lease| lease.id).collect();
        ids.sort_unstable();
        Ok(ids)
    }

    /// What is left of a lease, what it was granted, and its keys in order.
    pub async fn lease(&mut self, id: i64) -> Result<(i64, i64, Vec<Text>), Status> {
        let answer = self.lease.lease_time_to_live(LeaseTimeToLiveRequest { id, keys: true }).await?.into_inner();
        let mut keys: Vec<Text> = answer.keys.into_iter().map(Text).collect();
        keys.sort();
        Ok((answer.ttl, answer.granted_ttl, keys))
    }

    /// Whether there is a NOSPACE alarm.
    pub async fn has_alarm(&mut self) -> Result<bool, Status> {
        let answer = self.maintenance.alarm(AlarmRequest::default()).await?.into_inner();
        Ok(answer.alarms.iter().any(|alarm| alarm.alarm == AlarmType::Nospace as i32))
    }

    pub async fn defragment(&mut self) -> Result<(), Status> {
        self.maintenance.defragment(DefragmentRequest {}).await.map(|_| ())
    }
}

/// A watch under way.
pub struct Watching {
    answers: Streaming<WatchResponse>,
    /// Held open, for the watch ends with it.
    _requests: tokio::sync::mpsc::Sender<WatchRequest>,
}

impl Watching {
    /// The next events, by the revision they belong to; `None` at the end of the stream.
    pub async fn next(&mut self) -> Result<Option<Vec<(i64, Vec<Event>)>>, Status> {
        let Some(answer) = self.answers.message().await? else { return Ok(None) };
        assert!(!answer.canceled, "a watch is cancelled: {}, compacted at {}", answer.cancel_reason, answer.compact_revision);
        let mut revisions: Vec<(i64, Vec<Event>)> = Vec::new();
        for event in &answer.events {
            let (key, item) = item(event.kv.as_ref().expect("an event has a key"));
            let revision = item.modified;
            let event = if event.r#type == EventType::Delete as i32 { Event::Delete(key) } else { Event::Put(key, item) };
            match revisions.last_mut() {
                Some((last, events)) if *last == revision => events.push(event),
                _ => revisions.push((revision, vec![event])),
            }
        }
        Ok(Some(revisions))
    }
}

fn item(kv: &EncodedKv) -> (Text, Item) {
    let kv = kv.decode().expect("a member sends well-formed pairs");
    let item =
        Item { created: kv.create_revision, modified: kv.mod_revision, version: kv.version, lease: kv.lease, value: Text::new(kv.value) };
    (Text::new(kv.key), item)
}

fn put(key: &Text, value: &Text, lease: i64) -> PutRequest {
    PutRequest { key: key.0.clone(), value: value.0.clone(), lease, ..Default::default() }
}

fn delete(key: &Text, end: &Text) -> DeleteRangeRequest {
    DeleteRangeRequest { key: key.0.clone(), range_end: end.0.clone(), ..Default::default() }
}

fn txn_op(op: &Op) -> RequestOp {
    let request = match op {
        Op::Put { key, value, lease } => Request::RequestPut(put(key, value, *lease)),
        Op::Delete { key, end } => Request::RequestDeleteRange(delete(key, end)),
        other => panic!("{other:?} in a Txn"),
    };
    RequestOp { request: Some(request) }
}
