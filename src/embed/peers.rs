//! How far away each server is: asked every other second, for the health page, the metrics, and the log.
//!
//! Each is asked for what it has itself, so what is measured is the way to it and its own pace, with or without a quorum. A server node
//! asks the others; a client, or a node with an external etcd, asks all of them.
//!
//! ```text
//! http://10.0.0.1:5706   alive          0.4 ms, and 99 of 100 within 1.1 ms
//! http://10.0.0.2:5706   unavailable    no answer within 1s             since 12:04
//! ```
//!
//! # Invariants
//! - It changes nothing: a slow server is told of, and no [availability](super::availability) depends on it.
//! - The first answer of a server that was away is not counted: over a new connection, it says little of those behind it.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio::sync::watch;
use tokio::time::{Instant, MissedTickBehavior};

use super::availability::{Latencies, unix_ms};
use super::probe::Remote;
use crate::metrics::Counters;
use crate::metrics::node::EndpointFigures;

/// How often the servers are asked.
const MEASURE_INTERVAL: Duration = Duration::from_secs(2);

/// What a node knows of a server, from its own place. See [`Node::peers`](super::Node::peers).
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Peer {
    /// The server's client URL.
    pub endpoint: String,
    /// Whether it has answered when it was asked last.
    pub is_alive: bool,
    /// Why not; empty if it has.
    pub message: String,
    /// Since when `is_alive` is what it is.
    pub since: SystemTime,
    /// How long its last answer took.
    pub latency: Option<Duration>,
    /// What 99 of 100 of its last answers took at most; none before there are twenty.
    pub p99: Option<Duration>,
}

impl Peer {
    /// Makes it of what was known before and what was found now. Returns the sample that counts, too.
    fn next(before: Option<&Peer>, endpoint: String, found: Result<Duration, String>, now: SystemTime) -> (Peer, Option<Duration>) {
        let was_alive = before.is_some_and(|before| before.is_alive);
        let (latency, p99) = before.map_or((None, None), |before| (before.latency, before.p99));
        let since = before.filter(|before| before.is_alive == found.is_ok()).map_or(now, |before| before.since);
        match found {
            Ok(took) => {
                let sample = was_alive.then_some(took);
                (Peer { endpoint, is_alive: true, message: String::new(), since, latency: Some(took), p99 }, sample)
            }
            Err(message) => (Peer { endpoint, is_alive: false, message, since, latency, p99 }, None),
        }
    }

    /// The same as JSON: milliseconds, and milliseconds since 1970.
    pub(super) fn to_json(&self) -> serde_json::Value {
        let ms = |took: Duration| took.as_secs_f64() * 1000.0;
        serde_json::json!({
            "endpoint": self.endpoint,
            "status": if self.is_alive { "alive" } else { "unavailable" },
            "message": self.message,
            "changedAt": unix_ms(self.since),
            "latencyMs": self.latency.map(ms),
            "latencyP99Ms": self.p99.map(ms),
        })
    }
}

/// Asks until it is dropped. `own` is the URL of this node's server, if it has one: that one is not asked.
pub(super) async fn watch_peers(mut servers: Remote, own: Option<String>, tell: &watch::Sender<Vec<Peer>>, counters: &Arc<Counters>) {
    let began = Instant::now();
    let mut latencies = Latencies::default();
    let mut known: BTreeMap<String, Peer> = BTreeMap::new();
    let mut ticks = tokio::time::interval(MEASURE_INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let found = servers.measure(own.as_deref()).await;
        let now = SystemTime::now();
        let mut next = BTreeMap::new();
        for (endpoint, found) in found {
            let (mut peer, sample) = Peer::next(known.get(&endpoint), endpoint.clone(), found, now);
            if let Some(took) = sample {
                if let Some(p99) = latencies.note(began.elapsed(), &endpoint, took) {
                    tracing::warn!(server = %endpoint, ?p99, "the way to a server is slow, or the server is");
                }
                peer.p99 = latencies.p99(&endpoint);
            }
            next.insert(endpoint, peer);
        }
        latencies.retain(|server| next.contains_key(server));
        let figures = |peer: &Peer| EndpointFigures { is_up: peer.is_alive, latency: peer.latency, p99: peer.p99 };
        counters.node.follow(next.iter().map(|(endpoint, peer)| (endpoint.clone(), figures(peer))).collect());
        tell.send_replace(next.values().cloned().collect());
        known = next;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_is_known_since_it_has_changed() {
        let at = |seconds: u64| SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
        let (ms, url) = (Duration::from_millis, || "http://a:1".to_owned());
        let (first, sample) = Peer::next(None, url(), Ok(ms(50)), at(1));
        assert_eq!((first.is_alive, first.since, first.latency, sample), (true, at(1), Some(ms(50)), None));
        let (second, sample) = Peer::next(Some(&first), url(), Ok(ms(1)), at(2));
        assert_eq!((second.since, second.latency, sample), (at(1), Some(ms(1)), Some(ms(1))));
        let (gone, sample) = Peer::next(Some(&second), url(), Err("it is down".into()), at(3));
        assert_eq!((gone.is_alive, gone.since, gone.latency, sample), (false, at(3), Some(ms(1)), None));
        let json = gone.to_json();
        assert_eq!((json["status"].as_str(), json["message"].as_str()), (Some("unavailable"), Some("it is down")));
        assert_eq!((json["changedAt"].as_u64(), json["latencyMs"].as_f64(), json["latencyP99Ms"].is_null()), (Some(3000), Some(1.0), true));
        // What comes back begins anew: its first answer is over a new connection.
        let (back, sample) = Peer::next(Some(&gone), url(), Ok(ms(9)), at(4));
        assert_eq!((back.is_alive, back.since, sample), (true, at(4), None));
    }
}
