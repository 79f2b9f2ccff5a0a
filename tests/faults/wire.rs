//! The wire: one connection to one member, in the words of the histories.

use std::time::Duration;

use quorate::proto::EncodedKv;
use quorate::proto::etcdserverpb::cluster_client::ClusterClient;
use quorate::proto::etcdserverpb::kv_client::KvClient;
use quorate::proto::etcdserverpb::lease_client::LeaseClient;
use quorate::proto::etcdserverpb::maintenance_client::MaintenanceClient;
use quorate::proto::etcdserverpb::watch_client::WatchClient;
use quorate::proto::etcdserverpb::watch_request::RequestUnion;
use quorate::proto::etcdserverpb::*;
use quorate::proto::mvccpb::event::EventType;
use tokio::sync::mpsc;
use tonic::transport::{Channel, Endpoint};
use tonic::{Status, Streaming};

use crate::checkers::history::{Answer, Change, Item, Request};
use crate::checkers::log::Hash;
use crate::checkers::watch::{Event, Scope, Told};
use crate::requests::{answer_of, answer_of_read, delete, put, read, revision, txn, watch};

/// How long a connection may take to come about.
const CONNECT_LIMIT: Duration = Duration::from_secs(2);

#[derive(Clone)]
pub struct Client {
    kv: KvClient<Channel>,
    watch: WatchClient<Channel>,
    lease: LeaseClient<Channel>,
    cluster: ClusterClient<Channel>,
    maintenance: MaintenanceClient<Channel>,
}

impl Client {
    /// Connects with the first request, and anew after a connection has broken.
    pub fn new(url: &str) -> Client {
        let endpoint = Endpoint::from_shared(url.to_owned()).expect("a valid URL");
        let channel = endpoint.connect_timeout(CONNECT_LIMIT).connect_lazy();
        Client {
            kv: KvClient::new(channel.clone()),
            watch: WatchClient::new(channel.clone()),
            lease: LeaseClient::new(channel.clone()),
            cluster: ClusterClient::new(channel.clone()),
            maintenance: MaintenanceClient::new(channel),
        }
    }

    /// Whether a linearizable read is answered; for `member.rs`.
    pub async fn read(&mut self, key: &str, _: i64) -> Result<(), Status> {
        self.send(&Request::get(key)).await.map(drop)
    }

    /// Sends a request, in the plainest form that etcd has for it.
    pub async fn send(&mut self, request: &Request) -> Result<Answer, Status> {
        if let Some(range) = read(request) {
            let answer = self.kv.range(range).await?.into_inner();
            return Ok(answer_of_read(request, &answer, decode));
        }
        match (&request.guard, &request.writes[..], &request.reads[..]) {
            (None, [Change { key, value: Some(value) }], []) => {
                let answer = self.kv.put(put(key, *value, request.lease)).await?.into_inner();
                Ok(Answer { revision: revision(answer.header), applied: true, ..Answer::default() })
            }
            (None, [Change { key, value: None }], []) => {
                let answer = self.kv.delete_range(delete(key)).await?.into_inner();
                Ok(Answer { revision: revision(answer.header), applied: true, deleted: answer.deleted, ..Answer::default() })
            }
            _ => Ok(answer_of(self.kv.txn(txn(request)).await?.into_inner(), found)),
        }
    }

    /// Watches from a revision on, with bookmarks. Whatever is sent into the watch's channel asks for one more.
    pub async fn watch(&mut self, scope: Scope, start_revision: i64) -> Result<Watching, Status> {
        let request = WatchRequest { request_union: Some(RequestUnion::CreateRequest(watch(scope, start_revision))) };
        let (requests, receiver) = mpsc::channel(1);
        requests.send(request).await.expect("there is room for one");
        let answers = self.watch.watch(tokio_stream::wrappers::ReceiverStream::new(receiver)).await?.into_inner();
        Ok(Watching { answers, requests })
    }

    pub async fn compact(&mut self, revision: i64) -> Result<(), Status> {
        self.kv.compact(CompactionRequest { revision, physical: false }).await.map(drop)
    }

    pub async fn defragment(&mut self) -> Result<(), Status> {
        self.maintenance.defragment(DefragmentRequest {}).await.map(drop)
    }

    /// The hash of the history up to a revision.
    pub async fn hash(&mut self, at: i64) -> Result<Hash, Status> {
        let answer = self.maintenance.hash_kv(HashKvRequest { revision: at }).await?.into_inner();
        Ok(Hash { revision: at, compacted: answer.compact_revision, hash: answer.hash })
    }

    /// The alarms that are raised.
    pub async fn alarms(&mut self) -> Result<Vec<AlarmMember>, Status> {
        let request = AlarmRequest { action: alarm_request::AlarmAction::Get as i32, ..Default::default() };
        Ok(self.maintenance.alarm(request).await?.into_inner().alarms)
    }

    /// Grants a lease; its TTL in seconds.
    pub async fn grant(&mut self, id: i64, ttl: i64) -> Result<i64, Status> {
        Ok(self.lease.lease_grant(LeaseGrantRequest { id, ttl }).await?.into_inner().ttl)
    }

    pub async fn revoke(&mut self, id: i64) -> Result<(), Status> {
        self.lease.lease_revoke(LeaseRevokeRequest { id }).await.map(drop)
    }

    /// Renews a lease once; its TTL in seconds, 0 if there is no such lease.
    pub async fn renew(&mut self, id: i64) -> Result<i64, Status> {
        let requests = tokio_stream::once(LeaseKeepAliveRequest { id });
        let mut answers = self.lease.lease_keep_alive(requests).await?.into_inner();
        answers.message().await?.map(|answer| answer.ttl).ok_or_else(|| Status::aborted("the stream ended"))
    }

    /// All members: id, peer URL, and whether it is a learner.
    pub async fn members(&mut self) -> Result<Vec<(u64, String, bool)>, Status> {
        let answer = self.cluster.member_list(MemberListRequest { linearizable: true }).await?.into_inner();
        Ok(answer.members.into_iter().map(|member| (member.id, member.peer_urls.concat(), member.is_learner)).collect())
    }

    pub async fn remove_member(&mut self, id: u64) -> Result<(), Status> {
        self.cluster.member_remove(MemberRemoveRequest { id }).await.map(drop)
    }

    pub async fn add_learner(&mut self, peer_url: &str) -> Result<(), Status> {
        self.cluster.member_add(MemberAddRequest { peer_urls: vec![peer_url.to_owned()], is_learner: true }).await.map(drop)
    }

    pub async fn promote_member(&mut self, id: u64) -> Result<(), Status> {
        self.cluster.member_promote(MemberPromoteRequest { id }).await.map(drop)
    }

    /// The member's own id, and the leader's (0: none).
    pub async fn leader(&mut self) -> Result<(u64, u64), Status> {
        let answer = self.maintenance.status(StatusRequest {}).await?.into_inner();
        Ok((answer.header.map_or(0, |header| header.member_id), answer.leader))
    }
}

/// A watch under way.
pub struct Watching {
    answers: Streaming<WatchResponse>,
    requests: mpsc::Sender<WatchRequest>,
}

impl Watching {
    /// What it is told next; None at the end of the stream.
    pub async fn next(&mut self) -> Result<Option<Told>, Status> {
        loop {
            let Some(answer) = self.answers.message().await? else { return Ok(None) };
            if answer.canceled {
                return Err(Status::aborted(format!("cancelled: {} (compacted at {})", answer.cancel_reason, answer.compact_revision)));
            }
            if answer.created {
                continue;
            }
            let header = revision(answer.header);
            if answer.events.is_empty() {
                return Ok(Some(Told::Progress(header)));
            }
            let events = answer.events.iter().map(|event| {
                let (key, item) = decode(event.kv.as_ref().expect("an event has a key"));
                let value = (event.r#type != EventType::Delete as i32).then_some(item.value);
                let before = event.prev_kv.as_ref().map(|kv| decode(kv).1);
                let Item { modified: revision, created, version, .. } = item;
                Event { revision, change: Change { key, value }, created, version, before }
            });
            return Ok(Some(Told::Events(header, events.collect())));
        }
    }

    /// Asks for a bookmark; not if the last one asked for is still on its way out.
    pub fn ask_for_progress(&self) {
        let _ = self.requests.try_send(WatchRequest { request_union: Some(RequestUnion::ProgressRequest(WatchProgressRequest {})) });
    }
}

fn found(answer: &RangeResponse) -> Option<Item> {
    answer.kvs.first().map(|kv| decode(kv).1)
}

/// A deletion has no value: it counts as 0 here.
fn decode(kv: &EncodedKv) -> (String, Item) {
    let kv = kv.decode().expect("a member sends well-formed pairs");
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).expect("only texts are written");
    let value = text(&kv.value).parse().unwrap_or(0);
    (text(&kv.key), Item { value, modified: kv.mod_revision, created: kv.create_revision, version: kv.version })
}
