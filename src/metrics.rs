//! Metrics: etcd's names, of this server alone.
//!
//! A [`Metrics`] belongs to one server and is handed to those who count; nothing here is global, so that many servers live
//! in one process and a host can take a server's metrics into its own registry ([`Metrics::register`]).
//!
//! Values come from three places. What happens often is *counted* where it happens, in an atomic that was looked up once
//! ([`MethodMetrics`], [`Counters`]): no lock, no label to hash. What other rooms know anyway is *asked for* when somebody
//! scrapes ([`Gauges`]). What the system knows of the process is read from `/proc` then.
//!
//! ```text
//! GET /metrics -> Metrics::text -> prometheus_client's encoding -> plain text format 0.0.4
//!                    |-- Counters, MethodMetrics     loads
//!                    |-- source() -> Gauges          the server looks into node, store, log
//!                    '-- /proc/self                  CPU, memory, files
//! ```
//!
//! # The format
//! `prometheus_client` writes OpenMetrics, in which a counter `x_total` belongs to a family `x` and the text ends with `# EOF`. etcd
//! serves the older format 0.0.4, where the family has the name of its samples, and so do we: [`plain`] translates. Some of
//! etcd's counters do not end in `_total` at all ([`BARE_COUNTERS`]).
//!
//! # Invariants
//! - Names, types and label names are etcd's; what etcd has not begins with `quorate_`.
//! - Every series is there from the start, with 0: rates need a first value.
//! - Number and length of the series do not depend on what clients send.
//!
//! # Caveats
//! - etcd's figures of Go's runtime, of the v2 store and of its proxy are not here: there is nothing behind them.
//! - `etcd_disk_backend_commit_duration_seconds` is how long one write-out of the background writer takes; no request waits for it.

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime};

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeGaugeValue, EncodeLabelSet, MetricEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::Registry;

use crate::lock::lock;

pub mod backups;
pub mod node;
pub mod peers;

use backups::Backups;
use node::NodeFigures;
use peers::Peers;

/// Upper bounds, in seconds, of etcd's histograms of the log's and the backend's syncs.
pub const SYNC_BUCKETS: [f64; 14] = [0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.128, 0.256, 0.512, 1.024, 2.048, 4.096, 8.192];

/// Those of rewriting the whole store.
pub const REWRITE_BUCKETS: [f64; 13] = [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 25.6, 51.2, 102.4, 204.8, 409.6];

/// Those of hashing it, or sending a snapshot of it.
pub const LONG_BUCKETS: [f64; 17] =
    [0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92, 163.84, 327.68, 655.36];

/// Those of gRPC's handling times.
const RPC_BUCKETS: [f64; 11] = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0];

/// etcd's counters whose names do not end in `_total`.
const BARE_COUNTERS: [&str; 7] = [
    "etcd_server_health_success",
    "etcd_server_health_failures",
    "etcd_server_learner_promote_successes",
    "etcd_network_snapshot_send_success",
    "etcd_network_snapshot_send_failures",
    "etcd_network_snapshot_receive_success",
    "etcd_network_snapshot_receive_failures",
];

/// The names of gRPC's status codes as Go has them, by number.
const CODES: [&str; 17] = [
    "OK",
    "Canceled",
    "Unknown",
    "InvalidArgument",
    "DeadlineExceeded",
    "NotFound",
    "AlreadyExists",
    "PermissionDenied",
    "ResourceExhausted",
    "FailedPrecondition",
    "Aborted",
    "OutOfRange",
    "Unimplemented",
    "Internal",
    "Unavailable",
    "DataLoss",
    "Unauthenticated",
];

/// A number that only grows.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Counts one.
    pub fn inc(&self) {
        self.add(1);
    }

    /// Counts some.
    pub fn add(&self, count: u64) {
        self.0.fetch_add(count, Ordering::Relaxed);
    }

    /// What was counted so far.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// A histogram of durations that many threads add to.
#[derive(Debug)]
pub struct Latency {
    bounds: &'static [f64],
    /// One for each bound, and one for what is longer than all.
    buckets: Box<[AtomicU64]>,
    nanos: AtomicU64,
}

impl Latency {
    /// An empty histogram with upper bounds in seconds, ascending.
    pub fn new(bounds: &'static [f64]) -> Self {
        Latency { bounds, buckets: (0..=bounds.len()).map(|_| AtomicU64::new(0)).collect(), nanos: AtomicU64::new(0) }
    }

    /// Adds one duration.
    pub fn observe(&self, took: Duration) {
        let seconds = took.as_secs_f64();
        let bucket = self.bounds.iter().position(|bound| seconds <= *bound).unwrap_or(self.bounds.len());
        if let Some(bucket) = self.buckets.get(bucket) {
            bucket.fetch_add(1, Ordering::Relaxed);
        }
        self.nanos.fetch_add(u64::try_from(took.as_nanos()).unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    fn histogram(&self) -> Histogram {
        let counts = self.buckets.iter().map(|bucket| bucket.load(Ordering::Relaxed)).collect();
        Histogram { bounds: self.bounds, counts, sum: self.nanos.load(Ordering::Relaxed) as f64 / 1e9 }
    }
}

/// A histogram as plain numbers.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Histogram {
    /// Upper bounds, ascending.
    pub bounds: &'static [f64],
    /// How many are up to each bound and above the one before; one more for what is above all.
    pub counts: Vec<u64>,
    /// All values together.
    pub sum: f64,
}

/// What happens in one server, counted by who does it. Each field is named after its metric.
#[derive(Debug)]
#[allow(missing_docs)]
pub struct Counters {
    pub leader_changes_seen: Counter,
    pub proposals_failed: Counter,
    pub slow_apply: Counter,
    pub heartbeat_send_failures: Counter,
    pub read_indexes_failed: Counter,
    pub slow_read_indexes: Counter,
    pub learner_promote_successes: Counter,
    pub health_success: Counter,
    pub health_failures: Counter,
    /// Puts applied, those in Txns included; and likewise the next two.
    pub puts: Counter,
    pub deletes: Counter,
    pub ranges: Counter,
    pub txns: Counter,
    /// Keys and values of all puts, in bytes.
    pub put_bytes: Counter,
    /// Events sent to watchers.
    pub events: Counter,
    /// Records removed by compactions.
    pub compacted_keys: Counter,
    pub leases_granted: Counter,
    pub leases_revoked: Counter,
    pub leases_renewed: Counter,
    pub leases_expired: Counter,
    /// The background writer's write-outs.
    pub backend_commit: Latency,
    pub defragment: Latency,
    pub snapshot: Latency,
    /// HashKV.
    pub hash_rev: Latency,
    /// Snapshots that members were sent, or that this one was sent and has installed; and their bytes, of unfinished ones too.
    pub snapshots_sent: Counter,
    pub snapshots_received: Counter,
    pub snapshot_sent_bytes: Counter,
    pub snapshot_received_bytes: Counter,
    /// Another member's state compared with this one's: each time it could be, could not be, and was another.
    pub corruption_compared: Counter,
    pub corruption_skipped: Counter,
    pub corruption_mismatches: Counter,
    /// Whether this start has set a damaged state aside and made a new one.
    pub state_rebuilds: Counter,
    pub backups: Backups,
    /// Of the node of the embedded mode that this is of, if it is.
    pub node: NodeFigures,
    /// Messages of gRPC clients, in bytes.
    pub grpc_received_bytes: Counter,
    pub grpc_sent_bytes: Counter,
    /// What is counted of each other member.
    pub peers: Peers,
}

impl Default for Counters {
    fn default() -> Self {
        Counters {
            leader_changes_seen: Counter::default(),
            proposals_failed: Counter::default(),
            slow_apply: Counter::default(),
            heartbeat_send_failures: Counter::default(),
            read_indexes_failed: Counter::default(),
            slow_read_indexes: Counter::default(),
            learner_promote_successes: Counter::default(),
            health_success: Counter::default(),
            health_failures: Counter::default(),
            puts: Counter::default(),
            deletes: Counter::default(),
            ranges: Counter::default(),
            txns: Counter::default(),
            put_bytes: Counter::default(),
            events: Counter::default(),
            compacted_keys: Counter::default(),
            leases_granted: Counter::default(),
            leases_revoked: Counter::default(),
            leases_renewed: Counter::default(),
            leases_expired: Counter::default(),
            backend_commit: Latency::new(&SYNC_BUCKETS),
            defragment: Latency::new(&REWRITE_BUCKETS),
            snapshot: Latency::new(&LONG_BUCKETS),
            hash_rev: Latency::new(&LONG_BUCKETS[..15]),
            snapshots_sent: Counter::default(),
            snapshots_received: Counter::default(),
            snapshot_sent_bytes: Counter::default(),
            snapshot_received_bytes: Counter::default(),
            corruption_compared: Counter::default(),
            corruption_skipped: Counter::default(),
            corruption_mismatches: Counter::default(),
            state_rebuilds: Counter::default(),
            backups: Backups::default(),
            node: NodeFigures::default(),
            grpc_received_bytes: Counter::default(),
            grpc_sent_bytes: Counter::default(),
            peers: Peers::default(),
        }
    }
}

/// What the other rooms know at the moment of a scrape, as plain numbers. `Default` is a member that has just begun.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Gauges {
    /// This member's id.
    pub member_id: u64,
    /// Whether it knows a leader, is the leader, is a learner.
    pub has_leader: bool,
    #[allow(missing_docs)]
    pub is_leader: bool,
    #[allow(missing_docs)]
    pub is_learner: bool,
    /// Log indexes.
    pub proposals_committed: u64,
    #[allow(missing_docs)]
    pub proposals_applied: u64,
    /// Requests that wait to be committed.
    pub proposals_pending: u64,
    /// Whether a snapshot of the leader's is being taken in.
    pub snapshot_apply_in_progress: bool,
    /// The space quota in bytes; 0 if there is none.
    pub quota_bytes: u64,
    /// What the files take, and what of it is in use, in bytes.
    pub db_total_bytes: u64,
    #[allow(missing_docs)]
    pub db_in_use_bytes: u64,
    /// Whether the files are being rewritten.
    pub defrag_inflight: bool,
    /// Reads that hold a revision.
    pub open_reads: u64,
    /// The newest revision, and the newest compacted one (-1: none).
    pub revision: i64,
    #[allow(missing_docs)]
    pub compact_revision: i64,
    /// Unix time of the last compaction since the start, in seconds; 0: none.
    pub compacted_at: u64,
    /// Keys that exist.
    pub keys: u64,
    /// Watch streams, watches, those that catch up, and events that wait to be sent.
    pub watch_streams: u64,
    #[allow(missing_docs)]
    pub watchers: u64,
    #[allow(missing_docs)]
    pub slow_watchers: u64,
    #[allow(missing_docs)]
    pub pending_events: u64,
    /// Leases that exist.
    pub leases: u64,
    /// The log's syncs, and the bytes written to it since the start.
    pub wal_fsync: Histogram,
    #[allow(missing_docs)]
    pub wal_written_bytes: u64,
    /// The log's segments and their bytes.
    pub wal_segments: u64,
    #[allow(missing_docs)]
    pub wal_disk_bytes: u64,
    /// Bytes of entries kept in memory, and of those that wait for a sync.
    pub wal_cache_bytes: u64,
    #[allow(missing_docs)]
    pub wal_queued_bytes: u64,
    /// Records and bytes that are applied but not written out yet.
    pub tail_records: u64,
    #[allow(missing_docs)]
    pub tail_bytes: u64,
    /// Bytes of the block cache.
    pub block_cache_bytes: u64,
    /// Bytes written to the backend since the start.
    pub backend_written_bytes: u64,
    /// Client connections, and requests and streams on them.
    pub connections: u64,
    #[allow(missing_docs)]
    pub streams: u64,
}

/// How a method's messages go, as `grpc_type` names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum MethodKind {
    Unary,
    ClientStream,
    ServerStream,
    BidiStream,
}

impl MethodKind {
    fn name(self) -> &'static str {
        match self {
            MethodKind::Unary => "unary",
            MethodKind::ClientStream => "client_stream",
            MethodKind::ServerStream => "server_stream",
            MethodKind::BidiStream => "bidi_stream",
        }
    }
}

/// The counters of one gRPC method.
#[derive(Debug)]
pub struct MethodMetrics {
    service: &'static str,
    method: &'static str,
    kind: MethodKind,
    started: Counter,
    handled: [Counter; CODES.len()],
    received: Counter,
    sent: Counter,
    took: Latency,
    counters: Arc<Counters>,
}

impl MethodMetrics {
    fn labels(&self) -> [(&'static str, &'static str); 3] {
        [("grpc_method", self.method), ("grpc_service", self.service), ("grpc_type", self.kind.name())]
    }

    /// A call begins. It counts as canceled unless [`InFlight::finish`] says otherwise before the guard is dropped.
    pub fn start(self: &Arc<Self>) -> InFlight {
        self.started.inc();
        InFlight { metrics: self.clone(), began: Instant::now(), finished: AtomicBool::new(false) }
    }
}

/// A call under way.
#[derive(Debug)]
pub struct InFlight {
    metrics: Arc<MethodMetrics>,
    began: Instant,
    finished: AtomicBool,
}

impl InFlight {
    /// How long it has taken so far.
    pub fn elapsed(&self) -> Duration {
        self.began.elapsed()
    }

    /// The method's name.
    pub fn method(&self) -> &'static str {
        self.metrics.method
    }

    /// A message of so many bytes has come.
    pub fn received(&self, bytes: usize) {
        self.metrics.received.inc();
        self.metrics.counters.grpc_received_bytes.add(bytes as u64);
    }

    /// A message of so many bytes was sent.
    pub fn sent(&self, bytes: usize) {
        self.metrics.sent.inc();
        self.metrics.counters.grpc_sent_bytes.add(bytes as u64);
    }

    /// The call has ended. Only the first of several counts.
    pub fn finish(&self, code: tonic::Code) {
        if self.finished.swap(true, Ordering::Relaxed) {
            return;
        }
        if let Some(handled) = self.metrics.handled.get(code as usize) {
            handled.inc();
        }
        self.metrics.took.observe(self.began.elapsed());
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.finish(tonic::Code::Cancelled);
    }
}

/// Where a scrape gets what is not counted here.
type Source = Arc<dyn Fn() -> Gauges + Send + Sync>;

/// The metrics of one server. See the module's head.
pub struct Metrics {
    /// What everyone counts in.
    pub counters: Arc<Counters>,
    registry: Registry,
    catalogue: Arc<Catalogue>,
}

/// What [`Metrics`] has to tell, in a form that any registry takes.
struct Catalogue {
    etcd_version: &'static str,
    cluster_version: &'static str,
    /// Whether there is a server whose figures these are.
    of_server: bool,
    counters: Arc<Counters>,
    methods: Mutex<Vec<Arc<MethodMetrics>>>,
    source: Mutex<Option<Source>>,
}

impl Metrics {
    /// Metrics of a server that claims these versions: etcd's in full (`3.7.1`) and the cluster's in short (`3.7`).
    pub fn new(etcd_version: &'static str, cluster_version: &'static str) -> Arc<Self> {
        Metrics::make(etcd_version, cluster_version, true)
    }

    /// Metrics of a process without a server, such as a client node of the embedded mode: what it tells of itself, and nothing that alerts
    /// would take for a server without a leader.
    pub(crate) fn of_client() -> Arc<Self> {
        Metrics::make("", "", false)
    }

    fn make(etcd_version: &'static str, cluster_version: &'static str, of_server: bool) -> Arc<Self> {
        let counters = Arc::new(Counters::default());
        let catalogue = Arc::new(Catalogue {
            etcd_version,
            cluster_version,
            of_server,
            counters: counters.clone(),
            methods: Mutex::default(),
            source: Mutex::default(),
        });
        let mut registry = Registry::default();
        registry.register_collector(Box::new(Shared(catalogue.clone())));
        Arc::new(Metrics { counters, registry, catalogue })
    }

    /// The counters of a method, to be kept by who calls it. Asked twice for the same, it gives the same.
    pub fn method(&self, service: &'static str, method: &'static str, kind: MethodKind) -> Arc<MethodMetrics> {
        let mut methods = lock(&self.catalogue.methods);
        if let Some(known) = methods.iter().find(|known| known.service == service && known.method == method) {
            return known.clone();
        }
        let new = Arc::new(MethodMetrics {
            service,
            method,
            kind,
            started: Counter::default(),
            handled: Default::default(),
            received: Counter::default(),
            sent: Counter::default(),
            took: Latency::new(&RPC_BUCKETS),
            counters: self.counters.clone(),
        });
        methods.push(new.clone());
        new
    }

    /// Sets where gauges come from, or takes it away. The source is called on each scrape, on the scraper's thread, and must not wait;
    /// what it holds lives as long as these metrics, unless it is taken away.
    pub fn set_source(&self, source: Option<Source>) {
        // What is dropped may hold anything, so not under the lock.
        let old = std::mem::replace(&mut *lock(&self.catalogue.source), source);
        drop(old);
    }

    /// Puts these metrics into a host's own registry as well.
    pub fn register(&self, registry: &mut Registry) {
        registry.register_collector(Box::new(Shared(self.catalogue.clone())));
    }

    /// Everything, in the text format 0.0.4.
    pub fn text(&self) -> String {
        let mut text = String::new();
        match prometheus_client::encoding::text::encode(&mut text, &self.registry) {
            Ok(()) => plain(&text),
            // Writing to a String does not fail, and neither does what we write.
            Err(fmt::Error) => String::new(),
        }
    }
}

/// What stands in `Content-Type` for [`Metrics::text`].
pub const TEXT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8; escaping=underscores";

/// OpenMetrics' text as the plain format 0.0.4.
fn plain(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut help = None;
    // Set within a family whose samples are not to end in `_total`.
    let mut bare = None;
    for line in text.lines() {
        if let Some(comment) = line.strip_prefix("# HELP ") {
            help = comment.split_once(' ');
        } else if let Some((name, kind)) = line.strip_prefix("# TYPE ").and_then(|comment| comment.split_once(' ')) {
            bare = BARE_COUNTERS.contains(&name).then_some(name);
            let (suffix, kind) = match kind {
                "counter" if bare.is_none() => ("_total", "counter"),
                "info" => ("_info", "gauge"),
                "unknown" => ("", "untyped"),
                "stateset" => ("", "gauge"),
                kind => ("", kind),
            };
            if let Some((_, text)) = help.take() {
                out.extend(["# HELP ", name, suffix, " ", text, "\n"]);
            }
            out.extend(["# TYPE ", name, suffix, " ", kind, "\n"]);
        } else if !line.starts_with('#') {
            let (name, rest) = line.split_at(line.find(['{', ' ']).unwrap_or(line.len()));
            let name = match bare {
                Some(bare) if name.strip_suffix("_total") == Some(bare) => bare,
                _ => name,
            };
            // Exemplars are OpenMetrics' alone.
            let rest = rest.split_once(" # {").map_or(rest, |(rest, _)| rest);
            out.push_str(name);
            match rest.split_once("} ").and_then(|(labels, value)| Some((bucket(labels.strip_prefix('{')?)?, value))) {
                Some((("", bound), value)) => out.extend(["{le=\"", bound, "\"} ", value]),
                Some(((labels, bound), value)) => out.extend(["{", labels, ",le=\"", bound, "\"} ", value]),
                None => out.push_str(rest),
            }
            out.push('\n');
        }
    }
    out
}

/// Takes a bucket's bound out of its labels, as etcd writes it: at the end, and a whole number without the ".0" by which Prometheus would
/// tell our series from etcd's.
fn bucket(labels: &str) -> Option<(&str, &str)> {
    let (labels, bound) = match labels.strip_prefix("le=\"") {
        Some(rest) => rest.split_once('"').map(|(bound, labels)| (labels.trim_start_matches(','), bound))?,
        None => labels.rsplit_once(",le=\"").and_then(|(labels, bound)| Some((labels, bound.strip_suffix('"')?)))?,
    };
    let whole = bound.strip_suffix(".0").filter(|whole| whole.bytes().all(|byte| byte.is_ascii_digit()));
    Some((labels, whole.unwrap_or(bound)))
}

struct Shared(Arc<Catalogue>);

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a server's metrics")
    }
}

impl Collector for Shared {
    fn encode(&self, encoder: DescriptorEncoder) -> fmt::Result {
        self.0.encode(Page { encoder })
    }
}

/// Writes families.
struct Page<'a> {
    encoder: DescriptorEncoder<'a>,
}

impl Page<'_> {
    fn family<'s>(&'s mut self, name: &'s str, help: &str, kind: MetricType) -> Result<MetricEncoder<'s>, fmt::Error> {
        self.encoder.encode_descriptor(name, help, None, kind)
    }

    /// `name` is without `_total`.
    fn counter(&mut self, name: &str, help: &str, value: u64) -> fmt::Result {
        self.family(name, help, MetricType::Counter)?.encode_counter::<NoLabelSet, u64, u64>(&value, None)
    }

    fn gauge(&mut self, name: &str, help: &str, value: impl EncodeGaugeValue) -> fmt::Result {
        self.family(name, help, MetricType::Gauge)?.encode_gauge(&value)
    }

    /// A gauge that is 1 and says what it says in its label.
    fn fact(&mut self, name: &str, help: &str, label: &str, value: &str) -> fmt::Result {
        self.family(name, help, MetricType::Gauge)?.encode_family(&[(label, value)])?.encode_gauge(&1i64)
    }

    fn histogram(&mut self, name: &str, help: &str, histogram: &Histogram) -> fmt::Result {
        encode_histogram(self.family(name, help, MetricType::Histogram)?, histogram)
    }

    fn counters_of_methods(
        &mut self,
        name: &str,
        help: &str,
        all: &[Arc<MethodMetrics>],
        of: fn(&MethodMetrics) -> &Counter,
    ) -> fmt::Result {
        let mut family = self.family(name, help, MetricType::Counter)?;
        for method in all {
            encode_counter(&mut family, &method.labels(), of(method))?;
        }
        Ok(())
    }
}

fn encode_counter(family: &mut MetricEncoder<'_>, labels: &impl EncodeLabelSet, counter: &Counter) -> fmt::Result {
    family.encode_family(labels)?.encode_counter::<NoLabelSet, u64, u64>(&counter.get(), None)
}

fn encode_histogram(mut encoder: MetricEncoder<'_>, histogram: &Histogram) -> fmt::Result {
    let bounds = histogram.bounds.iter().copied().chain([f64::INFINITY]);
    let buckets: Vec<(f64, u64)> = bounds.zip(histogram.counts.iter().copied().chain(std::iter::repeat(0))).collect();
    let count = buckets.iter().map(|(_, count)| count).sum();
    encoder.encode_histogram::<NoLabelSet>(histogram.sum, count, &buckets, None)
}

impl Catalogue {
    fn encode(&self, mut page: Page<'_>) -> fmt::Result {
        if !self.of_server {
            page.fact("quorate_build_info", "The version of quorate that runs", "version", env!("CARGO_PKG_VERSION"))?;
            self.encode_backups(&mut page)?;
            node::encode(&mut page, &self.counters.node)?;
            return encode_process(&mut page);
        }
        let source = lock(&self.source).clone();
        let gauges = source.map(|source| source()).unwrap_or_default();
        self.encode_server(&mut page, &gauges)?;
        self.encode_store(&mut page, &gauges)?;
        self.encode_disk(&mut page, &gauges)?;
        self.encode_grpc(&mut page, &gauges)?;
        peers::encode(&mut page, &self.counters.peers, gauges.member_id)?;
        node::encode(&mut page, &self.counters.node)?;
        encode_process(&mut page)
    }

    fn encode_server(&self, page: &mut Page<'_>, gauges: &Gauges) -> fmt::Result {
        let c = &self.counters;
        let member = format!("{:x}", gauges.member_id);
        page.fact(
            "etcd_server_id",
            "Server or member ID in hexadecimal format. 1 for 'server_id' label with current ID",
            "server_id",
            &member,
        )?;
        let version = "Which version is running. 1 for 'server_version' label with current version";
        page.fact("etcd_server_version", version, "server_version", self.etcd_version)?;
        let version = "Which version is running. 1 for 'cluster_version' label with current cluster version";
        page.fact("etcd_cluster_version", version, "cluster_version", self.cluster_version)?;
        page.fact("quorate_build_info", "The version of quorate that runs", "version", env!("CARGO_PKG_VERSION"))?;
        page.gauge("etcd_server_has_leader", "Whether or not a leader exists. 1 is existence, 0 is not", i64::from(gauges.has_leader))?;
        page.gauge("etcd_server_is_leader", "Whether or not this member is a leader. 1 if is, 0 otherwise", i64::from(gauges.is_leader))?;
        page.gauge(
            "etcd_server_is_learner",
            "Whether or not this member is a learner. 1 if is, 0 otherwise",
            i64::from(gauges.is_learner),
        )?;
        page.counter("etcd_server_leader_changes_seen", "The number of leader changes seen", c.leader_changes_seen.get())?;
        let name = "etcd_server_learner_promote_successes";
        page.counter(
            name,
            "The total number of successful learner promotions while this member is leader",
            c.learner_promote_successes.get(),
        )?;
        let (name, help) = ("etcd_server_proposals_committed_total", "The total number of consensus proposals committed");
        page.gauge(name, help, gauges.proposals_committed)?;
        page.gauge("etcd_server_proposals_applied_total", "The total number of consensus proposals applied", gauges.proposals_applied)?;
        page.gauge("etcd_server_proposals_pending", "The current number of pending proposals to commit", gauges.proposals_pending)?;
        page.counter("etcd_server_proposals_failed", "The total number of failed proposals seen", c.proposals_failed.get())?;
        let (name, help) = ("etcd_server_slow_apply", "The total number of slow apply requests (likely overloaded from slow disk)");
        page.counter(name, help, c.slow_apply.get())?;
        let help = "The total number of leader heartbeat send failures (likely overloaded from slow disk)";
        page.counter("etcd_server_heartbeat_send_failures", help, c.heartbeat_send_failures.get())?;
        page.counter("etcd_server_read_indexes_failed", "The total number of failed read indexes seen", c.read_indexes_failed.get())?;
        let help = "The total number of pending read indexes not in sync with leader's or timed out read index requests";
        page.counter("etcd_server_slow_read_indexes", help, c.slow_read_indexes.get())?;
        let (name, help) = ("etcd_server_snapshot_apply_in_progress_total", "1 if the server is applying the incoming snapshot. 0 if none");
        page.gauge(name, help, i64::from(gauges.snapshot_apply_in_progress))?;
        page.gauge("etcd_server_quota_backend_bytes", "Current backend storage quota size in bytes", gauges.quota_bytes)?;
        page.counter("etcd_server_health_success", "The total number of successful health checks", c.health_success.get())?;
        page.counter("etcd_server_health_failures", "The total number of failed health checks", c.health_failures.get())?;
        page.gauge("quorate_client_connections", "Client connections that are open", gauges.connections)?;
        page.gauge("quorate_client_streams", "Requests and streams of clients that are open", gauges.streams)
    }

    fn encode_store(&self, page: &mut Page<'_>, gauges: &Gauges) -> fmt::Result {
        let c = &self.counters;
        let (name, help) = ("etcd_mvcc_db_total_size_in_bytes", "Total size of the underlying database physically allocated in bytes");
        page.gauge(name, help, gauges.db_total_bytes)?;
        let (name, help) = ("etcd_mvcc_db_total_size_in_use_in_bytes", "Total size of the underlying database logically in use in bytes");
        page.gauge(name, help, gauges.db_in_use_bytes)?;
        page.gauge("etcd_mvcc_db_open_read_transactions", "The number of currently open read transactions", gauges.open_reads)?;
        page.counter("etcd_mvcc_put", "Total number of puts seen by this member", c.puts.get())?;
        page.counter("etcd_mvcc_delete", "Total number of deletes seen by this member", c.deletes.get())?;
        page.counter("etcd_mvcc_range", "Total number of ranges seen by this member", c.ranges.get())?;
        page.counter("etcd_debugging_mvcc_range", "Total number of ranges seen by this member", c.ranges.get())?;
        page.counter("etcd_mvcc_txn", "Total number of txns seen by this member", c.txns.get())?;
        page.histogram(
            "etcd_mvcc_hash_rev_duration_seconds",
            "The latency distribution of storage hash by revision operation",
            &c.hash_rev.histogram(),
        )?;
        page.gauge("etcd_debugging_mvcc_current_revision", "The current revision of store", gauges.revision)?;
        page.gauge("etcd_debugging_mvcc_compact_revision", "The revision of the last compaction in store", gauges.compact_revision)?;
        page.gauge("etcd_debugging_mvcc_keys_total", "Total number of keys", gauges.keys)?;
        let (name, help) = ("etcd_debugging_mvcc_total_put_size_in_bytes", "The total size of put kv pairs seen by this member");
        page.gauge(name, help, c.put_bytes.get())?;
        page.counter("etcd_debugging_mvcc_db_compaction_keys", "Total number of db keys compacted", c.compacted_keys.get())?;
        let (name, help) = ("etcd_debugging_mvcc_db_compaction_last", "The unix time of the last db compaction. Resets to 0 on start");
        page.gauge(name, help, gauges.compacted_at)?;
        page.counter("etcd_debugging_mvcc_events", "Total number of events sent by this member", c.events.get())?;
        page.gauge("etcd_debugging_mvcc_pending_events_total", "Total number of pending events to be sent", gauges.pending_events)?;
        page.gauge("etcd_debugging_mvcc_watch_stream_total", "Total number of watch streams", gauges.watch_streams)?;
        page.gauge("etcd_debugging_mvcc_watcher_total", "Total number of watchers", gauges.watchers)?;
        page.gauge("etcd_debugging_mvcc_slow_watcher_total", "Total number of unsynced slow watchers", gauges.slow_watchers)?;
        page.counter("etcd_debugging_lease_granted", "The total number of granted leases", c.leases_granted.get())?;
        page.counter("etcd_debugging_lease_revoked", "The total number of revoked leases", c.leases_revoked.get())?;
        page.counter("etcd_debugging_lease_renewed", "The number of renewed leases seen by the leader", c.leases_renewed.get())?;
        page.counter("etcd_debugging_server_lease_expired", "The total number of expired leases", c.leases_expired.get())?;
        page.gauge("quorate_leases", "Leases that exist", gauges.leases)
    }

    fn encode_disk(&self, page: &mut Page<'_>, gauges: &Gauges) -> fmt::Result {
        let c = &self.counters;
        let fsync = match &gauges.wal_fsync {
            none if none.bounds.is_empty() => &Histogram { bounds: &SYNC_BUCKETS, counts: Vec::new(), sum: 0.0 },
            fsync => fsync,
        };
        page.histogram("etcd_disk_wal_fsync_duration_seconds", "The latency distributions of fsync called by WAL", fsync)?;
        page.gauge("etcd_disk_wal_write_bytes_total", "Total number of bytes written in WAL", gauges.wal_written_bytes)?;
        let (name, help) = ("etcd_disk_backend_commit_duration_seconds", "The latency distributions of commit called by backend");
        page.histogram(name, help, &c.backend_commit.histogram())?;
        let (name, help) = ("etcd_disk_backend_snapshot_duration_seconds", "The latency distribution of backend snapshots");
        page.histogram(name, help, &c.snapshot.histogram())?;
        let (name, help) = ("etcd_disk_backend_defrag_duration_seconds", "The latency distribution of backend defragmentation");
        page.histogram(name, help, &c.defragment.histogram())?;
        let (name, help) = ("etcd_disk_defrag_inflight", "Whether or not defrag is active on the member. 1 means active, 0 means not");
        page.gauge(name, help, i64::from(gauges.defrag_inflight))?;
        page.gauge("quorate_wal_segments", "Segments of the Raft log", gauges.wal_segments)?;
        page.gauge("quorate_wal_disk_bytes", "What the Raft log takes on disk, in bytes", gauges.wal_disk_bytes)?;
        page.gauge("quorate_wal_cache_bytes", "Entries of the Raft log kept in memory, in bytes", gauges.wal_cache_bytes)?;
        page.gauge("quorate_wal_queued_bytes", "What waits to be synced to the Raft log, in bytes", gauges.wal_queued_bytes)?;
        page.gauge("quorate_tail_records", "Records that are applied but not written out yet", gauges.tail_records)?;
        page.gauge("quorate_tail_bytes", "What is applied but not written out yet, in bytes", gauges.tail_bytes)?;
        page.gauge("quorate_block_cache_bytes", "Blocks of records kept in memory, in bytes", gauges.block_cache_bytes)?;
        page.counter("quorate_backend_written_bytes", "Bytes given to the backend", gauges.backend_written_bytes)
    }

    fn encode_backups(&self, page: &mut Page<'_>) -> fmt::Result {
        let backups = &self.counters.backups;
        page.counter("quorate_backups_made", "Backups made and verified", backups.made.get())?;
        page.counter("quorate_backups_failed", "Backups that were tried and came to nothing", backups.failed.get())?;
        page.gauge("quorate_backup_newest_timestamp_seconds", "When the newest backup was made; 0 if there is none", backups.newest())?;
        let help = "How old the newest backup is; without one, how long backups have been wanted; 0 where they are not";
        page.gauge("quorate_backup_newest_age_seconds", help, backups.age(SystemTime::now()))
    }

    fn encode_grpc(&self, page: &mut Page<'_>, _gauges: &Gauges) -> fmt::Result {
        let c = &self.counters;
        let (name, help) = ("etcd_network_client_grpc_received_bytes", "The total number of bytes received from grpc clients");
        page.counter(name, help, c.grpc_received_bytes.get())?;
        page.counter("etcd_network_client_grpc_sent_bytes", "The total number of bytes sent to grpc clients", c.grpc_sent_bytes.get())?;

        page.counter("quorate_snapshots_sent", "Snapshots that other members were sent", c.snapshots_sent.get())?;
        page.counter("quorate_snapshots_received", "Snapshots that took the place of this member's state", c.snapshots_received.get())?;
        page.counter("quorate_snapshot_sent_bytes", "Bytes of snapshots sent to other members", c.snapshot_sent_bytes.get())?;
        page.counter("quorate_snapshot_received_bytes", "Bytes of snapshots received", c.snapshot_received_bytes.get())?;
        let (name, help) = ("quorate_corruption_compared", "How often another member's state could be compared with this one's");
        page.counter(name, help, c.corruption_compared.get())?;
        let (name, help) = ("quorate_corruption_skipped", "How often another member's state was to be compared and could not be");
        page.counter(name, help, c.corruption_skipped.get())?;
        let (name, help) = ("quorate_corruption_mismatches", "How often a comparison has found that states differ");
        page.counter(name, help, c.corruption_mismatches.get())?;
        page.counter("quorate_state_rebuilds", "Damaged states that this start has set aside and replaced", c.state_rebuilds.get())?;
        self.encode_backups(page)?;

        let mut methods = lock(&self.methods).clone();
        methods.sort_unstable_by_key(|method| (method.service, method.method));
        page.counters_of_methods("grpc_server_started", "Total number of RPCs started on the server", &methods, |method| &method.started)?;
        let help = "Total number of RPC stream messages received on the server";
        page.counters_of_methods("grpc_server_msg_received", help, &methods, |method| &method.received)?;
        let help = "Total number of gRPC stream messages sent by the server";
        page.counters_of_methods("grpc_server_msg_sent", help, &methods, |method| &method.sent)?;
        let help = "Total number of RPCs completed on the server, regardless of success or failure";
        let mut handled = page.family("grpc_server_handled", help, MetricType::Counter)?;
        for method in &methods {
            let [name, service, kind] = method.labels();
            for (code, counter) in CODES.iter().zip(&method.handled) {
                encode_counter(&mut handled, &[("grpc_code", *code), name, service, kind], counter)?;
            }
        }
        let help = "Histogram of response latency (seconds) of gRPC that had been application-level handled by the server";
        let mut took = page.family("grpc_server_handling_seconds", help, MetricType::Histogram)?;
        for method in &methods {
            encode_histogram(took.encode_family(&method.labels())?, &method.took.histogram())?;
        }
        Ok(())
    }
}

/// What `/proc` says of this process. What cannot be read is left out.
fn encode_process(page: &mut Page<'_>) -> fmt::Result {
    let process = Process::read();
    if let Some(seconds) = process.cpu_seconds {
        let (name, help) = ("process_cpu_seconds", "Total user and system CPU time spent in seconds");
        page.family(name, help, MetricType::Counter)?.encode_counter::<NoLabelSet, f64, u64>(&seconds, None)?;
    }
    let gauges = [
        ("process_start_time_seconds", "Start time of the process since unix epoch in seconds", process.start_seconds),
        ("process_resident_memory_bytes", "Resident memory size in bytes", process.resident_bytes.map(|bytes| bytes as f64)),
        ("process_virtual_memory_bytes", "Virtual memory size in bytes", process.virtual_bytes.map(|bytes| bytes as f64)),
        ("process_open_fds", "Number of open file descriptors", process.open_files.map(|files| files as f64)),
        ("process_max_fds", "Maximum number of open file descriptors", process.max_files.map(|files| files as f64)),
        ("os_fd_used", "The number of used file descriptors", process.open_files.map(|files| files as f64)),
        ("os_fd_limit", "The file descriptor limit", process.max_files.map(|files| files as f64)),
    ];
    for (name, help, value) in gauges {
        if let Some(value) = value {
            page.gauge(name, help, value)?;
        }
    }
    Ok(())
}

#[derive(Debug, Default)]
struct Process {
    cpu_seconds: Option<f64>,
    start_seconds: Option<f64>,
    resident_bytes: Option<u64>,
    virtual_bytes: Option<u64>,
    open_files: Option<u64>,
    max_files: Option<u64>,
}

/// The unit of times in `/proc`, per second. Linux has shown this number to programs on every common architecture for ever.
const TICKS: f64 = 100.0;

impl Process {
    fn read() -> Self {
        let text = |path| std::fs::read_to_string(path).unwrap_or_default();
        let mut process = Process::default();
        // The second field, the program's name in parentheses, may hold anything; what follows it is numbers. The first of these is field 3.
        let stat = text("/proc/self/stat");
        let fields: Vec<&str> = stat.rsplit_once(')').map(|(_, rest)| rest.split_whitespace().collect()).unwrap_or_default();
        let field = |number: usize| fields.get(number - 3)?.parse::<f64>().ok();
        process.cpu_seconds = field(14).zip(field(15)).map(|(user, system)| (user + system) / TICKS);
        let system = text("/proc/stat");
        let boot = system.lines().find_map(|line| line.strip_prefix("btime ")?.trim().parse::<f64>().ok());
        process.start_seconds = boot.zip(field(22)).map(|(boot, started)| boot + started / TICKS);
        process.virtual_bytes = field(23).map(|bytes| bytes as u64);
        let status = text("/proc/self/status");
        let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:")?.trim().strip_suffix("kB")?.trim().parse::<u64>().ok());
        process.resident_bytes = resident.map(|kib| kib * 1024);
        // One less: the directory itself is open while it is read.
        process.open_files = std::fs::read_dir("/proc/self/fd").ok().map(|files| (files.count() as u64).saturating_sub(1));
        process.max_files = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
        process
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use super::*;

    /// A strict reader of the text format 0.0.4: families with their type, and the names and labels of their samples.
    fn parse(text: &str) -> BTreeMap<String, (String, BTreeSet<String>)> {
        let mut families: BTreeMap<String, (String, BTreeSet<String>)> = BTreeMap::new();
        let mut helped = None;
        let mut current = None;
        assert!(text.ends_with('\n'));
        for line in text.lines() {
            let words: Vec<_> = line.splitn(4, ' ').collect();
            match words[..] {
                ["#", "HELP", name, _] => helped = Some(name),
                ["#", "TYPE", name, kind] => {
                    assert_eq!(helped.take(), Some(name), "{line}");
                    assert!(["counter", "gauge", "histogram", "summary", "untyped"].contains(&kind), "{line}");
                    assert!(families.insert(name.into(), (kind.into(), BTreeSet::new())).is_none(), "twice: {line}");
                    current = Some((name, kind));
                }
                _ => {
                    assert!(!line.starts_with('#') && !line.is_empty(), "{line:?}");
                    let (series, value) = line.rsplit_once(' ').unwrap();
                    assert!(value == "+Inf" || value.parse::<f64>().is_ok(), "{line}");
                    let (name, labels) =
                        series.split_once('{').map_or((series, ""), |(name, rest)| (name, rest.strip_suffix('}').unwrap()));
                    let (family, kind) = current.unwrap();
                    let suffixes: &[&str] = if kind == "histogram" { &["_bucket", "_sum", "_count"] } else { &[""] };
                    assert!(suffixes.iter().any(|suffix| name.strip_suffix(suffix) == Some(family)), "{line} in {family}");
                    for label in labels.split("\",").filter(|label| !label.is_empty()) {
                        let (label, value) = label.split_once("=\"").unwrap();
                        assert!(label.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_'), "{line}");
                        assert!(!value.contains('\n'));
                    }
                    assert!(families.get_mut(family).unwrap().1.insert(series.into()), "twice: {line}");
                }
            }
        }
        families
    }

    fn some() -> Arc<Metrics> {
        let metrics = Metrics::new("3.7.1", "3.7");
        metrics.method("etcdserverpb.KV", "Put", MethodKind::Unary);
        metrics.method("etcdserverpb.Watch", "Watch", MethodKind::BidiStream);
        metrics
    }

    /// What a real etcd 3.5.30 shows: every family of ours that is not our own is there with its type, and has the same series if it has
    /// labels of the kind that we know beforehand.
    #[test]
    fn names_types_and_series_are_etcds() {
        let ours = parse(&some().text());
        let theirs = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/compat/metrics.txt")).unwrap();
        let theirs = parse(&theirs.lines().filter(|line| !line.starts_with("## ")).map(|line| format!("{line}\n")).collect::<String>());
        for (name, (kind, series)) in ours.iter().filter(|(name, _)| !name.starts_with("quorate_")) {
            let (etcds_kind, etcds_series) = theirs.get(name).unwrap_or_else(|| panic!("etcd has no {name}"));
            assert_eq!(kind, etcds_kind, "{name}");
            // These say who and which version it is.
            if !["etcd_server_id", "etcd_server_version", "etcd_cluster_version"].contains(&name.as_str()) {
                let strange: Vec<_> = series.difference(etcds_series).collect();
                assert!(strange.is_empty(), "{strange:?}");
            }
        }
        // What the mixin's rules and dashboards ask for, but for the peers' metrics, which one member has not.
        for name in [
            "etcd_server_has_leader",
            "etcd_server_leader_changes_seen_total",
            "etcd_server_proposals_committed_total",
            "etcd_server_proposals_applied_total",
            "etcd_server_proposals_pending",
            "etcd_server_proposals_failed_total",
            "etcd_server_quota_backend_bytes",
            "etcd_mvcc_db_total_size_in_bytes",
            "etcd_mvcc_db_total_size_in_use_in_bytes",
            "etcd_disk_wal_fsync_duration_seconds",
            "etcd_disk_backend_commit_duration_seconds",
            "etcd_network_client_grpc_sent_bytes_total",
            "etcd_network_client_grpc_received_bytes_total",
            "grpc_server_started_total",
            "grpc_server_handled_total",
            "grpc_server_handling_seconds",
            "process_resident_memory_bytes",
            "etcd_server_is_leader",
            "etcd_server_is_learner",
            "etcd_server_slow_apply_total",
            "etcd_server_health_failures",
            "etcd_server_heartbeat_send_failures_total",
            "etcd_debugging_mvcc_slow_watcher_total",
            "etcd_debugging_mvcc_pending_events_total",
        ] {
            assert!(ours.contains_key(name), "{name}");
        }
    }

    #[test]
    fn values() {
        let metrics = some();
        let put = metrics.method("etcdserverpb.KV", "Put", MethodKind::Unary);
        let call = put.start();
        call.received(100);
        call.sent(30);
        call.finish(tonic::Code::Ok);
        call.finish(tonic::Code::Internal);
        drop(call);
        drop(put.start());
        metrics.counters.puts.add(3);
        metrics.counters.backend_commit.observe(Duration::from_millis(3));
        metrics.counters.backend_commit.observe(Duration::from_secs(100));
        metrics.counters.health_failures.inc();
        let wal_fsync = Histogram { bounds: &SYNC_BUCKETS, counts: vec![1; SYNC_BUCKETS.len() + 1], sum: 2.5 };
        let gauges =
            Gauges { member_id: 0xbeef, has_leader: true, compact_revision: -1, wal_fsync, quota_bytes: u64::MAX, ..Gauges::default() };
        metrics.set_source(Some(Arc::new(move || gauges.clone())));
        let text = metrics.text();
        for line in [
            r#"grpc_server_started_total{grpc_method="Put",grpc_service="etcdserverpb.KV",grpc_type="unary"} 2"#,
            r#"grpc_server_handled_total{grpc_code="OK",grpc_method="Put",grpc_service="etcdserverpb.KV",grpc_type="unary"} 1"#,
            r#"grpc_server_handled_total{grpc_code="Canceled",grpc_method="Put",grpc_service="etcdserverpb.KV",grpc_type="unary"} 1"#,
            r#"grpc_server_handled_total{grpc_code="Internal",grpc_method="Put",grpc_service="etcdserverpb.KV",grpc_type="unary"} 0"#,
            r#"grpc_server_handling_seconds_bucket{grpc_method="Put",grpc_service="etcdserverpb.KV",grpc_type="unary",le="1"} 2"#,
            r#"grpc_server_handling_seconds_bucket{grpc_method="Put",grpc_service="etcdserverpb.KV",grpc_type="unary",le="+Inf"} 2"#,
            "etcd_network_client_grpc_received_bytes_total 100",
            "etcd_network_client_grpc_sent_bytes_total 30",
            "etcd_mvcc_put_total 3",
            r#"etcd_disk_backend_commit_duration_seconds_bucket{le="0.002"} 0"#,
            r#"etcd_disk_backend_commit_duration_seconds_bucket{le="0.004"} 1"#,
            r#"etcd_disk_backend_commit_duration_seconds_bucket{le="+Inf"} 2"#,
            "etcd_disk_backend_commit_duration_seconds_count 2",
            "etcd_disk_backend_commit_duration_seconds_sum 100.003",
            r#"etcd_disk_wal_fsync_duration_seconds_bucket{le="8.192"} 14"#,
            r#"etcd_disk_wal_fsync_duration_seconds_bucket{le="+Inf"} 15"#,
            "etcd_disk_wal_fsync_duration_seconds_sum 2.5",
            "etcd_server_health_failures 1",
            "# TYPE etcd_server_health_failures counter",
            "etcd_server_has_leader 1",
            "etcd_debugging_mvcc_compact_revision -1",
            r#"etcd_server_id{server_id="beef"} 1"#,
            r#"etcd_server_version{server_version="3.7.1"} 1"#,
        ] {
            assert!(text.lines().any(|found| found == line), "{line}\n{text}");
        }
        assert!(parse(&text)["process_resident_memory_bytes"].1.len() == 1);
    }

    #[test]
    fn a_host_takes_them_into_its_own_registry() {
        let mut registry = Registry::default();
        some().register(registry.sub_registry_with_label(("server".into(), "one".into())));
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
        assert!(text.contains("etcd_server_has_leader{server=\"one\"} 0\n"));
        assert!(text.ends_with("# EOF\n"));
    }

    #[test]
    fn what_a_host_registers_is_translated() {
        let open = "# HELP a A.\n# TYPE a counter\n# UNIT a bytes\na_total{x=\"1.0\"} 1 # {id=\"3\"} 1.0 2.0\n# TYPE b unknown\nb 1\n\
                    # TYPE c info\nc_info{le=\"q.0\"} 1\n# TYPE d histogram\nd_bucket{x=\"y\",le=\"10.0\"} 1\n# EOF\n";
        let expected = "# HELP a_total A.\n# TYPE a_total counter\na_total{x=\"1.0\"} 1\n# TYPE b untyped\nb 1\n\
                        # TYPE c_info gauge\nc_info{le=\"q.0\"} 1\n# TYPE d histogram\nd_bucket{x=\"y\",le=\"10\"} 1\n";
        assert_eq!(plain(open), expected);
    }
}
