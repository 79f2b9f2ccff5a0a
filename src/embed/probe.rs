//! Tries the store twice a second, and makes the node's [`Availability`] of it. See [`availability`](super::availability).

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use futures_util::future::{BoxFuture, join_all};
use tokio::sync::watch;
use tokio::time::{Instant, MissedTickBehavior};
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status};

use super::availability::{Access, Availability, Latencies, PROBE_INTERVAL, PROBE_TIMEOUT, Probe, Tracker};
use crate::client::Client;
use crate::proto::etcdserverpb::alarm_request::AlarmAction;
use crate::proto::etcdserverpb::kv_client::KvClient;
use crate::proto::etcdserverpb::maintenance_client::MaintenanceClient;
use crate::proto::etcdserverpb::{AlarmMember, AlarmRequest, AlarmType, RangeRequest};

/// How often the state is looked at while a probe is under way.
const LOOK: Duration = Duration::from_millis(100);

/// How long the server that answered last is waited for, before the others are asked.
const FIRST_TIMEOUT: Duration = Duration::from_millis(400);

/// How long all the others are waited for together. With the time before it, it is within [`PROBE_TIMEOUT`].
const OTHERS_TIMEOUT: Duration = Duration::from_millis(500);

/// Probes of an external etcd between two looks at its alarms, which cost it a write to its log.
const ALARMS_EVERY: u32 = 10;

/// What came of one probe.
pub(crate) struct Tried {
    pub probe: Probe,
    /// Whether something could be read, at least what one server has.
    pub read: bool,
    /// Who answered, and how fast.
    pub by: Option<(String, Duration)>,
}

/// Something that can be tried.
pub(crate) trait Store: Send {
    fn probe(&mut self) -> BoxFuture<'_, Tried>;
}

/// Tries until it is dropped.
pub(crate) async fn watch_store(mut store: Box<dyn Store>, tell: watch::Sender<Availability>) {
    let began = Instant::now();
    let mut tracker = Tracker::new(Duration::ZERO);
    let mut latencies = Latencies::default();
    let (mut kv, mut kv_write) = (false, false);
    let mut probes = tokio::time::interval(PROBE_INTERVAL);
    probes.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        probes.tick().await;
        let tried = {
            let mut probe = std::pin::pin!(tokio::time::timeout(PROBE_TIMEOUT, store.probe()));
            loop {
                tokio::select! {
                    biased;
                    tried = &mut probe => break tried,
                    () = tokio::time::sleep(LOOK) => {
                        tracker.passed(began.elapsed());
                        publish(&tell, &tracker, kv, kv_write);
                    }
                }
            }
        };
        let late = |_| Tried { probe: Probe::Bad(format!("no answer within {PROBE_TIMEOUT:?}")), read: false, by: None };
        let tried = tried.unwrap_or_else(late);
        if let Some((server, took)) = &tried.by
            && let Some(p99) = latencies.note(began.elapsed(), server, *took)
        {
            tracing::warn!(%server, ?p99, "a server answers slowly: the store may soon seem to be away");
        }
        (kv, kv_write) = (tried.read, tried.probe == Probe::Good);
        tracker.probed(began.elapsed(), tried.probe);
        publish(&tell, &tracker, kv, kv_write);
    }
}

fn publish(tell: &watch::Sender<Availability>, tracker: &Tracker, kv: bool, kv_write: bool) {
    tell.send_if_modified(|now| {
        let (access, reason) = (tracker.access(), tracker.reason());
        if now.access != access {
            match access {
                Access::ReadWrite => tracing::info!(%access, before = %now.access, "the store's availability has changed"),
                _ => tracing::warn!(%access, before = %now.access, reason, "the store's availability has changed"),
            }
        }
        now.set(SystemTime::now(), access, reason, kv, kv_write)
    });
}

fn request(serializable: bool) -> RangeRequest {
    // As etcd's own health check has it. Whether the key is there does not matter.
    RangeRequest { key: Bytes::from_static(b"health"), limit: 1, serializable, ..RangeRequest::default() }
}

fn refused(alarms: &[AlarmMember]) -> Option<Probe> {
    let raised = |alarm: AlarmType| alarms.iter().any(|raised| raised.alarm == alarm as i32);
    if raised(AlarmType::Corrupt) {
        return Some(Probe::Refused("the CORRUPT alarm is raised: servers differ in their data".into()));
    }
    raised(AlarmType::Nospace).then(|| Probe::Refused("the NOSPACE alarm is raised: the space quota is used up".into()))
}

/// The server in this process.
pub(crate) struct Local(pub Client);

impl Store for Local {
    fn probe(&mut self) -> BoxFuture<'_, Tried> {
        Box::pin(async move {
            let limit = PROBE_TIMEOUT * 4 / 5;
            let began = Instant::now();
            let probe = match tokio::time::timeout(limit, self.0.range(request(false))).await {
                Ok(Ok(_)) => refused(&self.0.last_alarms()).unwrap_or(Probe::Good),
                Ok(Err(err)) => Probe::Bad(err.to_string()),
                Err(_) => Probe::Bad(format!("no quorum has answered within {limit:?}")),
            };
            let by = (probe == Probe::Good).then(|| ("this node".to_owned(), began.elapsed()));
            let read = matches!(probe, Probe::Good) || self.0.range(request(true)).await.is_ok();
            Tried { probe, read, by }
        })
    }
}

/// Servers elsewhere.
pub(crate) struct Remote {
    endpoints: watch::Receiver<Vec<String>>,
    channels: BTreeMap<String, Channel>,
    /// Who answered last.
    first: Option<String>,
    /// Whether looking at the alarms is cheap.
    is_ours: bool,
    count: u32,
    /// What the alarms said last.
    alarms: Option<Probe>,
}

impl Remote {
    pub fn new(endpoints: watch::Receiver<Vec<String>>, is_ours: bool) -> Remote {
        Remote { endpoints, channels: BTreeMap::new(), first: None, is_ours, count: 0, alarms: None }
    }

    fn channel(&mut self, endpoint: &str) -> Result<Channel, Status> {
        if let Some(channel) = self.channels.get(endpoint) {
            return Ok(channel.clone());
        }
        let made = Endpoint::from_shared(endpoint.to_owned()).map_err(|err| Status::unavailable(format!("{endpoint}: {err}")))?;
        // Connects when it is first used, and again when it broke.
        let channel = made.tcp_nodelay(true).connect_timeout(FIRST_TIMEOUT).connect_lazy();
        self.channels.insert(endpoint.to_owned(), channel.clone());
        Ok(channel)
    }
}

impl Store for Remote {
    fn probe(&mut self) -> BoxFuture<'_, Tried> {
        Box::pin(async move {
            let endpoints = self.endpoints.borrow().clone();
            self.channels.retain(|endpoint, _| endpoints.contains(endpoint));
            self.count = self.count.wrapping_add(1);
            let look = self.is_ours || self.count % ALARMS_EVERY == 1;
            let mut channels = Vec::new();
            for endpoint in &endpoints {
                if let Ok(channel) = self.channel(endpoint) {
                    channels.push((endpoint.clone(), channel));
                }
            }
            let first = self.first.clone().and_then(|first| channels.iter().position(|(endpoint, _)| *endpoint == first)).unwrap_or(0);
            if channels.is_empty() {
                return Tried { probe: Probe::Bad("no server is known".into()), read: false, by: None };
            }
            let (endpoint, channel) = channels.swap_remove(first);
            let mut why = match write_probe(channel.clone(), look, FIRST_TIMEOUT).await {
                Ok(found) => return self.found(endpoint, found),
                Err(status) => format!("{endpoint}: {}", status.message()),
            };
            let others = channels
                .iter()
                .map(|(endpoint, channel)| async move { (endpoint.clone(), write_probe(channel.clone(), look, OTHERS_TIMEOUT).await) });
            let reads = channels.iter().map(|(_, channel)| channel.clone()).chain([channel]).map(read_probe);
            let (others, reads) = tokio::join!(join_all(others), join_all(reads));
            for (endpoint, found) in others {
                match found {
                    Ok(found) => return self.found(endpoint, found),
                    Err(status) => why = format!("{why}; {endpoint}: {}", status.message()),
                }
            }
            Tried { probe: Probe::Bad(why), read: reads.contains(&true), by: None }
        })
    }
}

/// Who was found to answer a linearizable read: how fast, and the alarms if they were looked at.
type Found = (Duration, Option<Vec<AlarmMember>>);

impl Remote {
    fn found(&mut self, endpoint: String, (took, alarms): Found) -> Tried {
        if let Some(alarms) = alarms {
            self.alarms = refused(&alarms);
        }
        self.first = Some(endpoint.clone());
        Tried { probe: self.alarms.clone().unwrap_or(Probe::Good), read: true, by: Some((endpoint, took)) }
    }
}

async fn write_probe(channel: Channel, look: bool, limit: Duration) -> Result<Found, Status> {
    let asked = async {
        let began = Instant::now();
        match KvClient::new(channel.clone()).range(request(false)).await {
            Ok(_) => {}
            // Somebody is there, and decides who may do what. As etcd's own health check takes it.
            Err(status) if matches!(status.code(), Code::PermissionDenied | Code::Unauthenticated) => return Ok((began.elapsed(), None)),
            Err(status) => return Err(status),
        }
        let took = began.elapsed();
        if !look {
            return Ok((took, None));
        }
        let all = AlarmRequest { action: AlarmAction::Get as i32, member_id: 0, alarm: AlarmType::None as i32 };
        let alarms = MaintenanceClient::new(channel).alarm(all).await;
        Ok((took, alarms.ok().map(|alarms| alarms.into_inner().alarms)))
    };
    tokio::time::timeout(limit, asked).await.unwrap_or_else(|_| Err(Status::deadline_exceeded(format!("no answer within {limit:?}"))))
}

async fn read_probe(channel: Channel) -> bool {
    let asked = async move { KvClient::new(channel).range(request(true)).await.is_ok() };
    tokio::time::timeout(OTHERS_TIMEOUT, asked).await.unwrap_or(false)
}
