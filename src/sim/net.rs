//! The network between simulated members: calls and answers as bytes, each with a delay of its own.
//!
//! A connection leads to one start of one member, as TCP's do. What is sent while the way is cut is held back, and goes on somewhat after
//! the way is whole again, as with TCP's sending again; who has given up by then is not told. Now and then a connection breaks, before
//! a call has arrived or after, and nobody who waits for an answer knows which. Calls overtake each other. Nothing arrives twice, which
//! TCP would not let happen either.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use bytes::Bytes;
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use prost::Message;
use rand::Rng;
use rand::rngs::StdRng;
use tokio::sync::{Notify, oneshot};
use tonic::Status;

use super::{Cluster, LIVES_MAX};
use crate::api::peer;
use crate::lock::lock;
use crate::proto::peer::AppendRequest;
use crate::raft::network::MESSAGE_BYTES_MAX;
use crate::raft::wire::{Call, Carry, Wire};

/// How the network is, between all members that are not cut off from each other.
#[derive(Clone, Debug)]
pub struct Weather {
    /// How long a message is under way, from and to, in milliseconds.
    pub delay_ms: (u64, u64),
    /// Of a thousand messages, how many take much longer,
    pub late: u32,
    /// by up to this many milliseconds.
    pub late_ms: u64,
    /// Of a thousand calls, how many end with a broken connection.
    pub broken: u32,
    /// How much a line carries: what is long takes longer.
    pub bytes_per_ms: u64,
}

impl Default for Weather {
    fn default() -> Self {
        Weather { delay_ms: (0, 2), late: 0, late_ms: 1, broken: 0, bytes_per_ms: 100_000 }
    }
}

/// See the [module](self).
pub struct Net {
    inner: Mutex<Inner>,
    changed: Notify,
}

struct Inner {
    chance: StdRng,
    weather: Weather,
    /// Ways that are cut, from and to.
    cut: BTreeSet<(usize, usize)>,
    calls: BTreeMap<String, u64>,
}

impl Net {
    pub(super) fn new(chance: StdRng) -> Net {
        let inner = Inner { chance, weather: Weather::default(), cut: BTreeSet::new(), calls: BTreeMap::new() };
        Net { inner: Mutex::new(inner), changed: Notify::new() }
    }

    /// Changes how the network is.
    pub fn set(&self, weather: Weather) {
        lock(&self.inner).weather = weather;
    }

    /// Cuts the way from one member to another; not the way back.
    pub fn cut(&self, from: usize, to: usize) {
        lock(&self.inner).cut.insert((from, to));
    }

    /// Makes all ways whole.
    pub fn heal(&self) {
        lock(&self.inner).cut.clear();
        self.changed.notify_waiters();
    }

    /// How often each method was called.
    pub fn calls(&self) -> BTreeMap<String, u64> {
        lock(&self.inner).calls.clone()
    }

    /// The time that a message takes.
    async fn travel(&self, from: usize, to: usize, bytes: usize) {
        loop {
            let (cut, delay) = {
                let mut inner = lock(&self.inner);
                let Inner { chance, weather, cut, .. } = &mut *inner;
                let (least, most) = weather.delay_ms;
                let mut delay = chance.random_range(least..=most);
                if chance.random_ratio(weather.late.min(1000), 1000) {
                    delay += chance.random_range(0..=weather.late_ms);
                }
                delay += bytes as u64 / weather.bytes_per_ms.max(1);
                (cut.contains(&(from, to)), delay)
            };
            if cut {
                self.changed.notified().await;
                // It is sent again with some distance.
                let again = lock(&self.inner).chance.random_range(1..=400);
                tokio::time::sleep(Duration::from_millis(again)).await;
                continue;
            }
            if delay == 0 {
                tokio::task::yield_now().await;
            } else {
                tokio::time::sleep(Duration::from_millis(delay)).await;
            }
            return;
        }
    }

    fn breaks(&self) -> bool {
        let mut inner = lock(&self.inner);
        let broken = inner.weather.broken.min(1000);
        broken > 0 && inner.chance.random_ratio(broken, 1000)
    }

    fn coin(&self) -> bool {
        lock(&self.inner).chance.random_ratio(1, 2)
    }
}

/// A connection from one member to one start of another.
struct Connection {
    cluster: Weak<Cluster>,
    from: usize,
    to: usize,
    start: u64,
}

fn broken() -> Status {
    Status::unavailable("the connection is broken")
}

/// Makes a connection to whoever has the URL.
pub(super) fn dial(cluster: Weak<Cluster>, life: u64, url: String) -> BoxFuture<'static, Result<Wire, Status>> {
    let from = (life / LIVES_MAX) as usize;
    // As for calls: what is under way does not stand still with who has sent it.
    let (tell, told) = oneshot::channel();
    tokio::spawn(async move {
        let _ = tell.send(connect(cluster, from, url).await);
    });
    async move { told.await.unwrap_or_else(|_| Err(broken())) }.boxed()
}

async fn connect(weak: Weak<Cluster>, from: usize, url: String) -> Result<Wire, Status> {
    let cluster = weak.upgrade().ok_or_else(broken)?;
    let to = (0..cluster.places()).find(|member| Cluster::peer_url(*member) == url);
    let to = to.ok_or_else(|| Status::unavailable(format!("nobody is at {url}")))?;
    cluster.net.travel(from, to, 0).await;
    let start = cluster.up(to).map(|_| cluster.starts(to));
    cluster.net.travel(to, from, 0).await;
    let start = start.ok_or_else(|| Status::unavailable("tcp connect error"))?;
    Ok(Wire::Simulated(Arc::new(Connection { cluster: weak, from, to, start })))
}

impl Carry for Connection {
    fn carry(&self, call: Call) -> BoxFuture<'static, Result<Bytes, Status>> {
        let (tell, told) = oneshot::channel();
        let Some(cluster) = self.cluster.upgrade() else { return async { Err(broken()) }.boxed() };
        tokio::spawn(journey(cluster, (self.from, self.to, self.start), call, tell));
        async move { told.await.unwrap_or_else(|_| Err(broken())) }.boxed()
    }
}

/// A call's way to the other member, and its answer's way back.
async fn journey(cluster: Arc<Cluster>, way: (usize, usize, u64), call: Call, mut tell: oneshot::Sender<Result<Bytes, Status>>) {
    let (from, to, start) = way;
    let method = call.path.rsplit('/').next().unwrap_or_default().to_owned();
    let sum = |bytes: &[u8]| crc32c::crc32c(bytes);
    cluster.note(&format!("{from}->{to} {method} {:x}", sum(&call.message)));
    *lock(&cluster.net.inner).calls.entry(method.clone()).or_default() += 1;
    if method == "Append" {
        look_at_leader(&cluster, from, &call.message);
    }
    if call.message.len() > MESSAGE_BYTES_MAX {
        cluster.blame(format!("member {from} sends {method} of {} bytes, more than one is let in with", call.message.len()));
    }
    let breaks = cluster.net.breaks();
    let arrives = !breaks || cluster.net.coin();
    cluster.net.travel(from, to, call.message.len()).await;
    let answer = async {
        if !arrives {
            return Err(broken());
        }
        let (up, life, gone) = cluster.up(to).filter(|_| cluster.starts(to) == start).ok_or_else(broken)?;
        cluster.note(&format!("{from}->{to} {method} arrives"));
        let (done, answered) = oneshot::channel();
        let handled = tokio::spawn(life.enter(async move {
            let _ = done.send(peer::serve(&up.node, call).await);
        }));
        let given_up = async {
            tell.closed().await;
            // The other end hears of it, perhaps before it is done.
            if !cluster.net.coin() {
                std::future::pending::<()>().await;
            }
            cluster.net.travel(from, to, 0).await;
        };
        tokio::select! {
            biased;
            answer = answered => answer.unwrap_or_else(|_| Err(broken())),
            () = gone.cancelled() => Err(broken()),
            () = given_up => {
                handled.abort();
                Err(broken())
            }
        }
    };
    let answer = answer.await;
    cluster.net.travel(to, from, answer.as_ref().map_or(0, Bytes::len)).await;
    match &answer {
        Ok(bytes) => cluster.note(&format!("{from}<-{to} {method} {:x}", sum(bytes))),
        Err(status) => cluster.note(&format!("{from}<-{to} {method} {:?}", status.code())),
    }
    // Who has sent it may have given up.
    let _ = tell.send(if breaks { Err(broken()) } else { answer });
}

/// Two members that send entries in one term, or heartbeats, have both been elected in it.
fn look_at_leader(cluster: &Cluster, from: usize, message: &Bytes) {
    let Ok(AppendRequest { vote: Some(vote), .. }) = AppendRequest::decode(message.clone()) else { return };
    let other = *cluster.inner().leaders.entry(vote.term).or_insert(vote.node);
    if other != vote.node || cluster.id(from).is_some_and(|id| id != vote.node) {
        cluster.blame(format!("term {} has two leaders, {other:x} and {:x}, sent by member {from}", vote.term, vote.node));
    }
}
