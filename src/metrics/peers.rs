//! What is counted of each of the other members, under etcd's names, with the member's id as label.
//!
//! ```text
//! follow([b, c])                       the membership: series of b and c, from 0
//! get(b)?.sent_bytes.add(300)          etcd_network_peer_sent_bytes_total{To="b"} 300
//! follow([b])                          c was removed, and so are its series
//! ```
//!
//! # Invariants
//! - There are series for members alone: what a stranger says of itself makes none.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use prometheus_client::encoding::{EncodeGaugeValue, MetricEncoder};
use prometheus_client::metrics::MetricType;

use super::{Counter, Latency, Page, encode_counter, encode_histogram};
use crate::lock::lock;

/// Upper bounds, in seconds, of etcd's histogram of round trips.
const ROUND_TRIP_BUCKETS: [f64; 16] =
    [0.0001, 0.0002, 0.0004, 0.0008, 0.0016, 0.0032, 0.0064, 0.0128, 0.0256, 0.0512, 0.1024, 0.2048, 0.4096, 0.8192, 1.6384, 3.2768];

/// Those of sending or receiving a snapshot.
const SNAPSHOT_BUCKETS: [f64; 10] = [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 25.6, 51.2];

/// Snapshots on their way to a member, or from it.
#[derive(Debug)]
pub struct Transfers {
    under_way: AtomicU64,
    successes: Counter,
    failures: Counter,
    took: Latency,
}

impl Default for Transfers {
    fn default() -> Self {
        let took = Latency::new(&SNAPSHOT_BUCKETS);
        Transfers { under_way: AtomicU64::new(0), successes: Counter::default(), failures: Counter::default(), took }
    }
}

/// One of them: it has failed, unless it is said to be done before this is dropped.
#[derive(Debug)]
pub struct Transfer {
    peer: Arc<PeerMetrics>,
    of: fn(&PeerMetrics) -> &Transfers,
    began: Instant,
    done: bool,
}

impl Transfer {
    /// All of it is there.
    pub fn done(mut self) {
        self.done = true;
    }
}

impl Drop for Transfer {
    fn drop(&mut self) {
        let transfers = (self.of)(&self.peer);
        transfers.under_way.fetch_sub(1, Ordering::Relaxed);
        if self.done {
            transfers.successes.inc();
            transfers.took.observe(self.began.elapsed());
        } else {
            transfers.failures.inc();
        }
    }
}

/// What is counted of one member.
#[derive(Debug)]
pub struct PeerMetrics {
    /// Messages to it and from it, in bytes; requests and answers alike.
    pub sent_bytes: Counter,
    #[allow(missing_docs)]
    pub received_bytes: Counter,
    /// Messages that it has not answered.
    pub sent_failures: Counter,
    round_trip: Latency,
    is_active: AtomicBool,
    disconnected: Counter,
    sent_snapshots: Transfers,
    received_snapshots: Transfers,
}

impl Default for PeerMetrics {
    fn default() -> Self {
        PeerMetrics {
            sent_bytes: Counter::default(),
            received_bytes: Counter::default(),
            sent_failures: Counter::default(),
            round_trip: Latency::new(&ROUND_TRIP_BUCKETS),
            is_active: AtomicBool::new(false),
            disconnected: Counter::default(),
            sent_snapshots: Transfers::default(),
            received_snapshots: Transfers::default(),
        }
    }
}

impl PeerMetrics {
    /// It has answered a question that asked for no work, after this time.
    pub fn answered(&self, took: Duration) {
        self.round_trip.observe(took);
        self.is_active.store(true, Ordering::Relaxed);
    }

    /// It has not.
    pub fn lost(&self) {
        if self.is_active.swap(false, Ordering::Relaxed) {
            self.disconnected.inc();
        }
    }

    /// A snapshot begins to be sent to it.
    pub fn begin_sending(self: &Arc<Self>) -> Transfer {
        self.begin(|peer| &peer.sent_snapshots)
    }

    /// It begins to send a snapshot.
    pub fn begin_receiving(self: &Arc<Self>) -> Transfer {
        self.begin(|peer| &peer.received_snapshots)
    }

    /// Whether one is on its way to it.
    pub fn is_sent_snapshot(&self) -> bool {
        self.sent_snapshots.under_way.load(Ordering::Relaxed) > 0
    }

    fn begin(self: &Arc<Self>, of: fn(&PeerMetrics) -> &Transfers) -> Transfer {
        of(self).under_way.fetch_add(1, Ordering::Relaxed);
        Transfer { peer: self.clone(), of, began: Instant::now(), done: false }
    }
}

/// All of them, by id.
#[derive(Debug, Default)]
pub struct Peers(Mutex<BTreeMap<u64, Arc<PeerMetrics>>>);

impl Peers {
    /// From here on these are the other members.
    pub fn follow(&self, ids: impl IntoIterator<Item = u64>) {
        let mut known = lock(&self.0);
        *known = ids.into_iter().map(|id| (id, known.get(&id).cloned().unwrap_or_default())).collect();
    }

    /// A member's; none for who is not one.
    pub fn get(&self, id: u64) -> Option<Arc<PeerMetrics>> {
        lock(&self.0).get(&id).cloned()
    }
}

/// Writes the families, if there are other members.
pub(super) fn encode(page: &mut Page<'_>, peers: &Peers, local: u64) -> fmt::Result {
    let all: Vec<(String, Arc<PeerMetrics>)> = lock(&peers.0).iter().map(|(id, peer)| (format!("{id:x}"), peer.clone())).collect();
    if all.is_empty() {
        return Ok(());
    }
    let local = format!("{local:x}");
    let to = |id: &str| vec![("To".to_owned(), id.to_owned())];
    let from = |id: &str| vec![("From".to_owned(), id.to_owned())];
    let both = |id: &str| vec![("Local".to_owned(), local.clone()), ("Remote".to_owned(), id.to_owned())];
    let mut family = |name: &str, help: &str, kind, labels: &Labels<'_>, write: &Write| {
        let mut family = page.family(name, help, kind)?;
        all.iter().try_for_each(|(id, peer)| write(&mut family, &labels(id), peer))
    };
    let (counter, gauge, histogram) = (MetricType::Counter, MetricType::Gauge, MetricType::Histogram);

    family("etcd_network_active_peers", "The current number of active peer connections", gauge, &both, &|out, labels, peer| {
        number(out, labels, u64::from(peer.is_active.load(Ordering::Relaxed)))
    })?;
    family("etcd_network_disconnected_peers", "The total number of disconnected peers", counter, &both, &|out, labels, peer| {
        encode_counter(out, labels, &peer.disconnected)
    })?;
    family("etcd_network_peer_sent_bytes", "The total number of bytes sent to peers", counter, &to, &|out, labels, peer| {
        encode_counter(out, labels, &peer.sent_bytes)
    })?;
    family("etcd_network_peer_received_bytes", "The total number of bytes received from peers", counter, &from, &|out, labels, peer| {
        encode_counter(out, labels, &peer.received_bytes)
    })?;
    family("etcd_network_peer_sent_failures", "The total number of send failures from peers", counter, &to, &|out, labels, peer| {
        encode_counter(out, labels, &peer.sent_failures)
    })?;
    let help = "Round-Trip-Time histogram between peers";
    family("etcd_network_peer_round_trip_time_seconds", help, histogram, &to, &|out, labels, peer| {
        encode_histogram(out.encode_family(labels)?, &peer.round_trip.histogram())
    })?;
    let help = "Total number of successful snapshot sends";
    family("etcd_network_snapshot_send_success", help, counter, &to, &|out, labels, peer| {
        encode_counter(out, labels, &peer.sent_snapshots.successes)
    })?;
    let help = "Total number of snapshot send failures";
    family("etcd_network_snapshot_send_failures", help, counter, &to, &|out, labels, peer| {
        encode_counter(out, labels, &peer.sent_snapshots.failures)
    })?;
    let help = "Total number of inflight snapshot sends";
    family("etcd_network_snapshot_send_inflights_total", help, gauge, &to, &|out, labels, peer| {
        number(out, labels, peer.sent_snapshots.under_way.load(Ordering::Relaxed))
    })?;
    let help = "Total latency distributions of v3 snapshot sends";
    family("etcd_network_snapshot_send_total_duration_seconds", help, histogram, &to, &|out, labels, peer| {
        encode_histogram(out.encode_family(labels)?, &peer.sent_snapshots.took.histogram())
    })?;
    let help = "Total number of successful snapshot receives";
    family("etcd_network_snapshot_receive_success", help, counter, &from, &|out, labels, peer| {
        encode_counter(out, labels, &peer.received_snapshots.successes)
    })?;
    let help = "Total number of snapshot receive failures";
    family("etcd_network_snapshot_receive_failures", help, counter, &from, &|out, labels, peer| {
        encode_counter(out, labels, &peer.received_snapshots.failures)
    })?;
    let help = "Total number of inflight snapshot receives";
    family("etcd_network_snapshot_receive_inflights_total", help, gauge, &from, &|out, labels, peer| {
        number(out, labels, peer.received_snapshots.under_way.load(Ordering::Relaxed))
    })?;
    let help = "Total latency distributions of v3 snapshot receives";
    family("etcd_network_snapshot_receive_total_duration_seconds", help, histogram, &from, &|out, labels, peer| {
        encode_histogram(out.encode_family(labels)?, &peer.received_snapshots.took.histogram())
    })
}

/// Makes the labels of a member's series.
type Labels<'a> = dyn Fn(&str) -> Vec<(String, String)> + 'a;

/// Writes a member's series.
type Write = dyn Fn(&mut MetricEncoder<'_>, &Vec<(String, String)>, &PeerMetrics) -> fmt::Result;

fn number(out: &mut MetricEncoder<'_>, labels: &Vec<(String, String)>, value: impl EncodeGaugeValue) -> fmt::Result {
    out.encode_family(labels)?.encode_gauge(&value)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::{Gauges, Metrics};

    #[test]
    fn series_follow_the_members() {
        let metrics = Metrics::new("3.7.1", "3.7");
        metrics.set_source(Some(Arc::new(|| Gauges { member_id: 0xa, ..Gauges::default() })));
        let peers = &metrics.counters.peers;
        assert!(peers.get(0xb).is_none() && !metrics.text().contains("etcd_network_peer"));
        peers.follow([0xb, 0xc]);
        let b = peers.get(0xb).unwrap();
        b.sent_bytes.add(300);
        b.answered(Duration::from_micros(300));
        b.begin_sending().done();
        drop(b.begin_receiving());
        let under_way = b.begin_sending();
        let has = |lines: &[&str]| {
            let text = metrics.text();
            for line in lines {
                assert!(text.lines().any(|told| told == *line), "{line}\n{text}");
            }
        };
        has(&[
            "# TYPE etcd_network_peer_sent_bytes_total counter",
            r#"etcd_network_peer_sent_bytes_total{To="b"} 300"#,
            r#"etcd_network_peer_received_bytes_total{From="c"} 0"#,
            r#"etcd_network_active_peers{Local="a",Remote="b"} 1"#,
            r#"etcd_network_active_peers{Local="a",Remote="c"} 0"#,
            r#"etcd_network_peer_round_trip_time_seconds_bucket{To="b",le="0.0002"} 0"#,
            r#"etcd_network_peer_round_trip_time_seconds_bucket{To="b",le="0.0004"} 1"#,
            "# TYPE etcd_network_snapshot_send_success counter",
            r#"etcd_network_snapshot_send_success{To="b"} 1"#,
            r#"etcd_network_snapshot_send_failures{To="b"} 0"#,
            r#"etcd_network_snapshot_send_inflights_total{To="b"} 1"#,
            r#"etcd_network_snapshot_receive_failures{From="b"} 1"#,
            r#"etcd_network_snapshot_send_total_duration_seconds_count{To="b"} 1"#,
        ]);
        drop(under_way);
        b.lost();
        b.lost();
        has(&[r#"etcd_network_disconnected_peers_total{Local="a",Remote="b"} 1"#, r#"etcd_network_snapshot_send_failures{To="b"} 1"#]);
        peers.follow([0xb]);
        assert!(peers.get(0xc).is_none() && Arc::ptr_eq(&b, &peers.get(0xb).unwrap()));
    }
}
