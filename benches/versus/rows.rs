//! The rows: which work, by how many clients, and how much faster than etcd it has to be.
//!
//! A row is a name to ask for, a [`Work`] and its [`Bound`]s. A bound speaks of one [`Metric`]: `must` is what has to hold, `aim` what is
//! hoped for. Most are ratios of the second server to the first; those on a pause compare a server with itself at rest.

/// What the clients of a row do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// Put a random key.
    Put,
    /// Get a random key.
    Get { serializable: bool },
    /// Get 1000 keys in a row, linearizably, from a random one on.
    Range,
    /// In one transaction: compare a random key's version, put it, get it.
    Txn,
    /// Put one of [`FAN_SLOTS`] keys of one prefix and wait until all watchers have it. One operation is one event at one watcher.
    Fan { watchers: usize },
    /// Renew a lease on a stream of its own.
    KeepAlive,
    /// Grant a lease, revoke it. One operation is both.
    GrantRevoke,
    /// 40 % get, 40 % list of 10 keys, 15 % update in a transaction guarded by the revision last seen, 5 % start of a watch and end of
    /// the oldest; [`MIXED_WATCHES`] watches alive, which together see every key once.
    Mixed,
    /// A put against a server that does nothing but answer: what the transport costs.
    Null,
    /// The same with an answer as large as that of [`Work::Range`].
    NullRange,
}

/// Keys in the answer of the range rows.
pub const RANGE_KEYS: u64 = 1000;
/// Writers of the watch rows: puts under way at any moment.
pub const FAN_SLOTS: usize = 16;
/// Streams that the watchers of the watch rows share.
pub const FAN_STREAMS: usize = 10;
/// Watches alive in the mixed row.
pub const MIXED_WATCHES: usize = 100;
/// Streams that they share.
pub const MIXED_STREAMS: usize = 10;
/// Keys that one client of the mixed row updates; nobody else does.
pub const MIXED_OWN_KEYS: u64 = 16;
/// Keys in a list of the mixed row.
pub const MIXED_LIST_KEYS: u64 = 10;

/// What is compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Metric {
    Throughput,
    P50,
    P99,
    /// CPU time of the server for one operation.
    Cpu,
    /// Bytes written for one operation.
    Written,
    Memory,
    /// What the data directory takes on disk.
    Disk,
    StartTime,
    /// p99 during an event over p99 at rest, of the same server.
    Pause,
}

impl Metric {
    pub fn title(self) -> &'static str {
        match self {
            Self::Throughput => "operations/s",
            Self::P50 => "p50",
            Self::P99 => "p99",
            Self::Cpu => "server CPU per operation",
            Self::Written => "bytes written per operation",
            Self::Memory => "resident memory",
            Self::Disk => "data directory",
            Self::StartTime => "start to first read",
            Self::Pause => "p99 over p99 at rest",
        }
    }

    /// For the JSON, with the unit.
    pub fn key(self) -> &'static str {
        match self {
            Self::Throughput => "operations_per_s",
            Self::P50 => "p50_us",
            Self::P99 => "p99_us",
            Self::Cpu => "server_cpu_us_per_operation",
            Self::Written => "written_bytes_per_operation",
            Self::Memory => "resident_bytes",
            Self::Disk => "disk_bytes",
            Self::StartTime => "start_us",
            Self::Pause => "pause_factor",
        }
    }

    pub fn higher_is_better(self) -> bool {
        self == Self::Throughput
    }
}

/// What has to hold, and what is hoped for.
#[derive(Clone, Copy, Debug)]
pub struct Bound {
    pub metric: Metric,
    pub must: f64,
    pub aim: f64,
}

/// One line of the comparison.
#[derive(Clone, Copy, Debug)]
pub struct Row {
    pub name: &'static str,
    pub title: &'static str,
    pub work: Work,
    pub clients: usize,
    pub bounds: &'static [Bound],
}

impl Row {
    /// Whether a row leaves the key space as it was, so that the next may run on the same members.
    pub fn only_reads(&self) -> bool {
        matches!(self.work, Work::Get { .. } | Work::Range | Work::KeepAlive)
    }
}

const fn faster(must: f64, aim: f64) -> Bound {
    Bound { metric: Metric::Throughput, must, aim }
}

/// Server CPU of a put.
const CPU: Bound = Bound { metric: Metric::Cpu, must: 0.45, aim: 0.25 };

const fn row(name: &'static str, title: &'static str, work: Work, clients: usize, bounds: &'static [Bound]) -> Row {
    Row { name, title, work, clients, bounds }
}

const LINEARIZABLE: Work = Work::Get { serializable: false };
const SERIALIZABLE: Work = Work::Get { serializable: true };

/// Every row that is a load of some seconds.
pub const ROWS: &[Row] = &[
    row("put-1", "put, 1 client", Work::Put, 1, &[faster(1.3, 2.0)]),
    row(
        "put-64",
        "put, 64 clients",
        Work::Put,
        64,
        &[
            faster(2.2, 3.0),
            CPU,
            Bound { metric: Metric::P99, must: 0.6, aim: 0.3 },
            Bound { metric: Metric::Written, must: 1.0, aim: 0.5 },
        ],
    ),
    row("put-256", "put, 256 clients", Work::Put, 256, &[faster(1.8, 2.5), CPU]),
    row("put-1000", "put, 1000 clients", Work::Put, 1000, &[faster(1.6, 2.2), CPU]),
    row("get-1", "linearizable get, 1 client", LINEARIZABLE, 1, &[faster(2.0, 4.0)]),
    row("get-64", "linearizable get, 64 clients", LINEARIZABLE, 64, &[faster(1.8, 3.0)]),
    row("get-1000", "linearizable get, 1000 clients", LINEARIZABLE, 1000, &[faster(1.7, 3.0)]),
    row("sget-1", "serializable get, 1 client", SERIALIZABLE, 1, &[faster(2.0, 4.0)]),
    row("sget-64", "serializable get, 64 clients", SERIALIZABLE, 64, &[faster(2.0, 3.5)]),
    row("sget-1000", "serializable get, 1000 clients", SERIALIZABLE, 1000, &[faster(2.0, 3.0)]),
    row("range-1", "range of 1000 keys, 1 stream", Work::Range, 1, &[faster(3.0, 10.0)]),
    row("range-16", "range of 1000 keys, 16 streams", Work::Range, 16, &[faster(4.0, 10.0)]),
    row("keepalive-64", "lease keep-alive, 64 streams", Work::KeepAlive, 64, &[faster(1.2, 3.0)]),
    row("keepalive-1000", "lease keep-alive, 1000 streams", Work::KeepAlive, 1000, &[faster(1.2, 3.0)]),
    row("lease-64", "lease grant and revoke, 64 clients", Work::GrantRevoke, 64, &[faster(2.0, 3.0)]),
    row("txn-64", "txn (compare, put, get), 64 clients", Work::Txn, 64, &[faster(2.2, 3.0)]),
    row("watch-100", "watch fan-out, 100 watchers", Work::Fan { watchers: 100 }, FAN_SLOTS, &[faster(2.0, 5.0)]),
    row("watch-1000", "watch fan-out, 1000 watchers", Work::Fan { watchers: 1000 }, FAN_SLOTS, &[faster(2.0, 5.0)]),
    row("mixed-64", "mixed, as a Kubernetes control plane, 64 clients", Work::Mixed, 64, &[faster(2.0, 3.0)]),
];

/// The transport by itself, against a server that only answers.
pub const NULL_ROWS: &[Row] = &[
    row("null-1", "put, 1 client", Work::Null, 1, &[]),
    row("null-64", "put, 64 clients", Work::Null, 64, &[]),
    row("null-256", "put, 256 clients", Work::Null, 256, &[]),
    row("null-1000", "put, 1000 clients", Work::Null, 1000, &[]),
    row("null-range-16", "answers as of 1000 keys, 16 streams", Work::NullRange, 16, &[]),
];

/// A server in the process that uses it, called directly, against the same server over gRPC.
pub const EMBEDDED_ROWS: &[Row] = &[
    row("embedded-sget", "serializable get in the process, 64 tasks", SERIALIZABLE, 64, &[faster(20.0, 50.0)]),
    row("embedded-put", "put in the process, 64 tasks", Work::Put, 64, &[faster(1.5, 2.0)]),
    row("embedded-sget-1", "serializable get in the process, 1 task", SERIALIZABLE, 1, &[]),
    row("embedded-put-1", "put in the process, 1 task", Work::Put, 1, &[]),
];

/// Memory with a million keys, and the start on them.
pub const MEMORY: Bound = Bound { metric: Metric::Memory, must: 0.7, aim: 0.5 };
pub const START: Bound = Bound { metric: Metric::StartTime, must: 0.6, aim: 0.3 };
/// p99 of puts during an event, against rest.
pub const PAUSE: Bound = Bound { metric: Metric::Pause, must: 2.0, aim: 1.2 };

/// The sections that are no plain rows, by the names to ask for them.
pub const LIMITS: &str = "limits";
pub const MEMORY_AND_START: &str = "memory";
pub const PAUSES: &str = "pause";

/// Which row to measure while the data grow, unless told otherwise.
pub const GROWTH_ROWS: &[&str] = &["put-64", "get-64", "sget-64", "range-16", "txn-64", "mixed-64"];

#[cfg(test)]
#[allow(unused)] // See main.rs.
mod tests {
    use super::*;

    #[test]
    fn rows_are_in_order() {
        for row in ROWS.iter().chain(EMBEDDED_ROWS) {
            assert_eq!(ROWS.iter().chain(EMBEDDED_ROWS).filter(|other| other.name == row.name).count(), 1, "{} is there twice", row.name);
            for bound in row.bounds {
                assert!(bound.metric.higher_is_better() == (bound.aim > bound.must), "{}: the aim is easier than the must", row.name);
            }
        }
        assert!(GROWTH_ROWS.iter().all(|name| ROWS.iter().any(|row| row.name == *name)));
        assert_eq!(FAN_STREAMS * (100 / FAN_STREAMS), 100);
        assert_eq!(MIXED_STREAMS * (MIXED_WATCHES / MIXED_STREAMS), MIXED_WATCHES);
    }
}
