//! Tries the store twice a second, and makes the node's [`Availability`] of it. See [`availability`](super::availability).

use std::collections::BTreeMap;
use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use futures_util::future::{BoxFuture, join_all};
use tokio::sync::watch;
use tokio::time::{Instant, MissedTickBehavior};

use super::availability::{Access, Availability, Latencies, PROBE_INTERVAL, PROBE_TIMEOUT, Probe, Tracker};
use super::founding::drive::CONNECT_TIMEOUT;
use super::way::{Found, Trouble, Way, request};
use crate::client::{Client, Gate, Lines};
use crate::metrics::Counters;
use crate::proto::etcdserverpb::{AlarmMember, AlarmType};

/// How often the state is looked at while a probe is under way.
const LOOK: Duration = Duration::from_millis(100);

/// How long the server that answered last is waited for, before the others are asked, too.
const FIRST_TIMEOUT: Duration = Duration::from_millis(400);

/// How long all of them are waited for from then on. With the time before it, it is within [`PROBE_TIMEOUT`].
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

/// Where it is told what can be done with the store: to the host, to the metrics, and to the node's own client.
pub(crate) struct Signal {
    pub tell: watch::Sender<Availability>,
    pub gate: Arc<Gate>,
    pub counters: Arc<Counters>,
}

impl Signal {
    /// Tells it. A store that `is_lost` takes no writes: nobody has to wait to hear that.
    pub fn set(&self, access: Access, reason: &str, kv: bool, kv_write: bool, is_lost: bool) {
        self.counters.node.set_access(kv, kv_write);
        self.gate.set(is_lost.then_some(reason));
        self.tell.send_if_modified(|now| {
            if now.access != access {
                match access {
                    Access::ReadWrite => tracing::info!(%access, before = %now.access, "the store's availability has changed"),
                    _ => tracing::warn!(%access, before = %now.access, reason, "the store's availability has changed"),
                }
            }
            now.set(SystemTime::now(), access, reason, kv, kv_write)
        });
    }
}

/// Tries until it is dropped.
pub(crate) async fn watch_store(mut store: Box<dyn Store>, signal: &Signal) {
    let began = Instant::now();
    let mut tracker = Tracker::new(Duration::ZERO);
    let mut latencies = Latencies::default();
    let (mut kv, mut kv_write) = (false, false);
    let mut probes = tokio::time::interval(PROBE_INTERVAL);
    probes.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        probes.tick().await;
        let tried = {
            let mut probe = pin!(tokio::time::timeout(PROBE_TIMEOUT, store.probe()));
            loop {
                tokio::select! {
                    biased;
                    tried = &mut probe => break tried,
                    () = tokio::time::sleep(LOOK) => {
                        tracker.passed(began.elapsed());
                        publish(signal, &tracker, began.elapsed(), kv, kv_write);
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
        publish(signal, &tracker, began.elapsed(), kv, kv_write);
    }
}

fn publish(signal: &Signal, tracker: &Tracker, now: Duration, kv: bool, kv_write: bool) {
    signal.set(tracker.access(), tracker.reason(), kv, kv_write, tracker.is_lost(now));
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
            let read = by.is_some() || self.0.range(request(true)).await.is_ok();
            Tried { probe, read, by }
        })
    }
}

/// Servers elsewhere.
pub(crate) struct Remote {
    endpoints: watch::Receiver<Vec<String>>,
    ways: BTreeMap<String, Way>,
    lines: Lines,
    /// Who answered last.
    first: Option<String>,
    /// Whether looking at the alarms is cheap.
    is_ours: bool,
    count: u32,
    /// What the alarms said last.
    alarms: Option<Probe>,
}

impl Remote {
    pub fn new(endpoints: watch::Receiver<Vec<String>>, is_ours: bool, lines: Lines) -> Remote {
        // Whether anybody is there shows soon; what comes after that may take long.
        let lines = lines.limited(FIRST_TIMEOUT + OTHERS_TIMEOUT, CONNECT_TIMEOUT);
        Remote { endpoints, ways: BTreeMap::new(), lines, first: None, is_ours, count: 0, alarms: None }
    }

    /// How long each of the servers takes to answer, but for one, or why it does not. What it has itself is asked for, so the time is that of
    /// the way and the server, and has nothing to do with the others.
    pub async fn measure(&mut self, but: Option<&str>) -> Vec<(String, Result<Duration, String>)> {
        let endpoints = self.endpoints.borrow().iter().filter(|endpoint| Some(endpoint.as_str()) != but).cloned().collect();
        self.follow(endpoints);
        let (lines, until) = (&self.lines, Instant::now() + PROBE_TIMEOUT);
        let asked = self.ways.iter_mut().map(|(endpoint, way)| async move { (endpoint.clone(), way.reach(lines, endpoint, until).await) });
        join_all(asked).await
    }

    /// Has a way to each of these servers, and to no other.
    fn follow(&mut self, endpoints: Vec<String>) {
        self.ways.retain(|endpoint, _| endpoints.contains(endpoint));
        for endpoint in endpoints {
            self.ways.entry(endpoint).or_default();
        }
    }
}

impl Store for Remote {
    fn probe(&mut self) -> BoxFuture<'_, Tried> {
        Box::pin(async move {
            let endpoints = self.endpoints.borrow().clone();
            self.count = self.count.wrapping_add(1);
            let look = self.is_ours || self.count % ALARMS_EVERY == 1;
            let first = self.first.clone().filter(|first| endpoints.contains(first)).or_else(|| endpoints.first().cloned());
            self.follow(endpoints);
            // The first is given all the time there is; the others are asked beside it when that takes long.
            let (lines, until) = (&self.lines, Instant::now() + FIRST_TIMEOUT + OTHERS_TIMEOUT);
            let (firsts, others): (Vec<_>, Vec<_>) = self.ways.iter_mut().partition(|(endpoint, _)| Some(*endpoint) == first.as_ref());
            let Some((first, first_way)) = firsts.into_iter().next() else {
                return Tried { probe: Probe::Bad("no server is known".into()), read: false, by: None };
            };
            let answers = {
                let mut asked = pin!(first_way.probe(lines, first, look, until));
                let soon = tokio::time::timeout(FIRST_TIMEOUT, asked.as_mut()).await;
                if let Ok((Ok(found), read)) = soon {
                    vec![(first.clone(), Ok(found), read)]
                } else {
                    let others = others.into_iter().map(|(endpoint, way)| async move {
                        let (found, read) = way.probe(lines, endpoint, look, until).await;
                        (endpoint.clone(), found, read)
                    });
                    let (of_first, others) = match soon {
                        Ok(of_first) => (of_first, join_all(others).await),
                        Err(_) => tokio::join!(asked, join_all(others)),
                    };
                    [(first.clone(), of_first.0, of_first.1)].into_iter().chain(others).collect()
                }
            };
            let (mut found, mut read, mut troubles) = (None, false, Vec::new());
            for (endpoint, asked, has_read) in answers {
                read |= has_read;
                match asked {
                    // Whoever was quicker is asked first the next time.
                    Ok(of) if found.as_ref().is_none_or(|(_, best): &(String, Found)| of.0 < best.0) => found = Some((endpoint, of)),
                    Ok(_) => {}
                    Err(trouble) => troubles.push((endpoint, trouble)),
                }
            }
            match found {
                Some((endpoint, found)) => self.found(endpoint, found),
                None => Tried { probe: failed(troubles), read, by: None },
            }
        })
    }
}

/// What is to be said when no server has answered.
fn failed(troubles: Vec<(String, Trouble)>) -> Probe {
    // All of them have the same users.
    let is_refused = troubles.iter().any(|(_, trouble)| matches!(trouble, Trouble::Refused(_)));
    let why = troubles.into_iter().map(|(endpoint, trouble)| format!("{endpoint}: {}", trouble.why())).collect::<Vec<_>>().join("; ");
    if is_refused { Probe::Refused(why) } else { Probe::Bad(why) }
}

impl Remote {
    fn found(&mut self, endpoint: String, (took, alarms): Found) -> Tried {
        if let Some(alarms) = alarms {
            self.alarms = refused(&alarms);
        }
        self.first = Some(endpoint.clone());
        Tried { probe: self.alarms.clone().unwrap_or(Probe::Good), read: true, by: Some((endpoint, took)) }
    }
}
