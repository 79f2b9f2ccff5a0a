//! The one table of flags: what each is called, takes, means and does. Flags, variables, file keys and help are all read from it.
//!
//! A flag is of one of three sorts ([`Act`]). The rule for a flag of etcd that is not honoured: where leaving it out of account would
//! weaken security, lose data or make another cluster than the one asked for, it is refused; where it costs but speed or insight, or
//! only tunes something that is refused by itself, it is accepted and a warning says that it has no effect.

use std::str::FromStr;
use std::time::Duration;

use super::{Draft, LogFormat, LogLevel, LogOutput};
use crate::config::{AutoCompactionMode, ClusterState, TlsVersion, Url, WATCH_PROGRESS_INTERVAL_MIN, parse_duration, parse_url};

/// Result of reading one value; the error is a sentence that follows "invalid value ... for ...".
pub(super) type Set<T = ()> = Result<T, String>;

/// What a value looks like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// `true` or `false`; on the command line the bare flag is `true`.
    Bool,
    /// A whole number.
    Number,
    /// A time as Go writes it; in a file also nanoseconds.
    Duration,
    /// A text.
    Text,
    /// A text that may be a number in a file.
    Amount,
    /// Texts with commas between; in a file also a list.
    List,
}

/// What a flag does.
pub(super) enum Act {
    /// Of the command line alone: help, version, config-file.
    Command,
    /// Honoured.
    Set(fn(&mut Draft, &str) -> Set),
    /// Without effect; why.
    NoOp(&'static str),
    /// Refused unless it has its default value; why.
    Refuse(&'static str),
}

/// One flag.
pub(super) struct Flag {
    pub name: &'static str,
    pub kind: Kind,
    /// As it would be written; the effective default where an empty value stands for it.
    pub default: &'static str,
    pub help: &'static str,
    pub group: &'static str,
    pub act: Act,
}

const CRL: &str = "revocation lists are not read";
const AUTO: &str =
    "certificates are not made here, for one that nobody can check keeps nobody out; give cert-file, key-file and trusted-ca-file";
const GATEWAY: &str = "the JSON gateway, which would use it, is not built yet";
const AUTH: &str = "users and roles are not built yet";
const DISCOVERY: &str = "discovery is not built yet";
const V2: &str = "etcd's v2 interface is not offered";
const ONE_STORE: &str = "the storage engine has no such knob";
const CHECKPOINTS: &str = "what long leases have left is always noted, and kept";
const NOT_YET: &str = "what it tunes is not built yet";
const GONE: &str = "etcd itself ignores it";

const fn set(
    group: &'static str,
    name: &'static str,
    kind: Kind,
    default: &'static str,
    help: &'static str,
    f: fn(&mut Draft, &str) -> Set,
) -> Flag {
    Flag { name, kind, default, help, group, act: Act::Set(f) }
}

const fn noop(name: &'static str, kind: Kind, default: &'static str, why: &'static str) -> Flag {
    Flag { name, kind, default, help: "", group: "", act: Act::NoOp(why) }
}

const fn refuse(name: &'static str, kind: Kind, default: &'static str, why: &'static str) -> Flag {
    Flag { name, kind, default, help: "", group: "", act: Act::Refuse(why) }
}

const fn command(name: &'static str, kind: Kind, help: &'static str) -> Flag {
    Flag { name, kind, default: "", help, group: "Command", act: Act::Command }
}

use Kind::{Amount, Bool, Duration as Time, List, Number, Text};

const MEMBER: &str = "Member";
const CLUSTER: &str = "Clustering";
const SECURITY: &str = "Security";
const RETENTION: &str = "Retention";
const WATCHING: &str = "Monitoring";
const LOGGING: &str = "Logging";
const UNSAFE: &str = "Unsafe";

/// Every flag, in the order of the help.
#[rustfmt::skip]
pub(super) static FLAGS: &[Flag] = &[
    command("config-file", Text, "Read the configuration from this YAML or JSON file; all other flags and ETCD_ variables are then ignored."),
    command("version", Bool, "Print the versions and exit."),
    command("help", Bool, "Print this and exit."),

    set(MEMBER, "name", Text, "default", "Name of this member, for people.", |d, v| { d.config.name = v.into(); Ok(()) }),
    set(MEMBER, "data-dir", Text, "", "Directory of the data. Empty: <name>.etcd.", |d, v| { d.config.data_dir = path(v); Ok(()) }),
    set(MEMBER, "wal-dir", Text, "", "Directory of the Raft log. Empty: in the data directory.", |d, v| { d.config.wal_dir = path(v); Ok(()) }),
    set(MEMBER, "listen-client-urls", List, "http://localhost:2379", "URLs to listen on for clients.", |d, v| urls(v).map(|v| d.config.listen_client_urls = v)),
    set(MEMBER, "listen-peer-urls", List, "http://localhost:2380", "URLs to listen on for peers.", |d, v| urls(v).map(|v| d.config.listen_peer_urls = v)),
    set(MEMBER, "listen-client-http-urls", List, "", "URLs for clients' HTTP alone; listen-client-urls then serve gRPC alone.", |d, v| urls(v).map(|v| d.config.listen_client_http_urls = v)),
    set(MEMBER, "heartbeat-interval", Number, "100", "Milliseconds between heartbeats of the leader.", |d, v| uint(v).map(|v| d.config.heartbeat_interval_ms = v)),
    set(MEMBER, "election-timeout", Number, "1000", "Milliseconds without a heartbeat after which an election starts.", |d, v| uint(v).map(|v| d.config.election_timeout_ms = v)),
    set(MEMBER, "snapshot-count", Number, "10000", "No effect yet: the log is cut off as soon as the state holds what it says.", |d, v| uint(v).map(|v| d.config.snapshot_count = or(v, 10_000))),
    set(MEMBER, "snapshot-catchup-entries", Number, "5000", "Entries of the log to keep, at most, for members that lag; who lags more is sent a snapshot.", |d, v| uint(v).map(|v| d.config.snapshot_catchup_entries = v)),
    set(MEMBER, "quota-backend-bytes", Number, "0", "Bytes that the data may take before writes are refused. 0: 2 GiB; negative: no quota.", |d, v| int(v).map(|v| d.config.quota_backend_bytes = v)),
    set(MEMBER, "max-txn-ops", Number, "128", "Operations in one transaction.", |d, v| uint(v).map(|v| d.config.max_txn_ops = v)),
    set(MEMBER, "max-request-bytes", Number, "1572864", "Bytes in one request.", |d, v| uint(v).map(|v| d.config.max_request_bytes = v)),
    set(MEMBER, "max-concurrent-streams", Number, "4294967295", "Streams that one connection may have open.", |d, v| uint(v).map(|v| d.config.max_concurrent_streams = or(v, u32::MAX))),
    set(MEMBER, "grpc-keepalive-min-time", Time, "5s", "No effect yet: nobody is disconnected for its pings.", |d, v| parse_duration(v).map(|v| d.config.grpc_keepalive_min_time = v)),
    set(MEMBER, "grpc-keepalive-interval", Time, "2h", "How often an idle connection is pinged. 0: never.", |d, v| parse_duration(v).map(|v| d.config.grpc_keepalive_interval = v)),
    set(MEMBER, "grpc-keepalive-timeout", Time, "20s", "How long a ping may remain unanswered. 0: forever.", |d, v| parse_duration(v).map(|v| d.config.grpc_keepalive_timeout = v)),
    set(MEMBER, "value-cache-bytes", Number, "0", "Bytes of memory for values that are on disk; 0: half of the quota, at most a quarter of the machine's memory. Not one of etcd's flags.", |d, v| uint(v).map(|v: usize| d.config.value_cache_bytes = Some(v).filter(|v| *v > 0))),

    set(CLUSTER, "advertise-client-urls", List, "", "URLs to tell clients. Empty: those listened on.", |d, v| urls(v).map(|v| d.config.advertise_client_urls = v)),
    set(CLUSTER, "initial-advertise-peer-urls", List, "", "URLs to tell peers. Empty: those listened on.", |d, v| urls(v).map(|v| d.config.initial_advertise_peer_urls = v)),
    set(CLUSTER, "initial-cluster", Text, "", "Founding members, as name=url,name=url. Empty: this one alone.", |d, v| { d.config.initial_cluster = v.into(); Ok(()) }),
    set(CLUSTER, "initial-cluster-state", Text, "new", "Whether the cluster is 'new' or 'existing'. No matter once there is data.", |d, v| choose(v, &[("new", ClusterState::New), ("existing", ClusterState::Existing)]).map(|v| d.config.initial_cluster_state = v)),
    set(CLUSTER, "initial-cluster-token", Text, "etcd-cluster", "Tells clusters of the same members apart.", |d, v| { d.config.initial_cluster_token = v.into(); Ok(()) }),
    set(CLUSTER, "strict-reconfig-check", Bool, "true", "Refuse changes of the members that might cost the quorum.", |d, v| boolean(v).map(|v| d.config.strict_reconfig_check = v)),
    set(CLUSTER, "pre-vote", Bool, "true", "Ask for votes before standing for election.", |d, v| boolean(v).map(|v| d.config.pre_vote = v)),
    set(CLUSTER, "max-learners", Number, "1", "Learners that the cluster may have at the same time.", |d, v| uint(v).map(|v| d.config.max_learners = v)),

    set(SECURITY, "cert-file", Text, "", "Certificate of this server for clients, in PEM.", |d, v| { d.config.client_transport_security.cert_file = path(v); Ok(()) }),
    set(SECURITY, "key-file", Text, "", "Its private key.", |d, v| { d.config.client_transport_security.key_file = path(v); Ok(()) }),
    set(SECURITY, "trusted-ca-file", Text, "", "CAs whose certificates clients need. Empty: they need none.", |d, v| { d.config.client_transport_security.trusted_ca_file = path(v); Ok(()) }),
    set(SECURITY, "client-cert-auth", Bool, "false", "Ask clients for a certificate; trusted-ca-file does, too.", |d, v| boolean(v).map(|v| d.config.client_transport_security.client_cert_auth = v)),
    set(SECURITY, "client-cert-allowed-hostname", List, "", "Only clients whose certificates are made out to one of these hosts.", |d, v| { d.config.client_transport_security.allowed_hostname = texts(v); Ok(()) }),
    set(SECURITY, "client-cert-allowed-cn", List, "", "Only clients whose certificates have one of these common names. Not one of etcd's flags.", |d, v| { d.config.client_transport_security.allowed_cn = texts(v); Ok(()) }),
    set(SECURITY, "peer-cert-file", Text, "", "Certificate of this server for peers, in PEM.", |d, v| { d.config.peer_transport_security.cert_file = path(v); Ok(()) }),
    set(SECURITY, "peer-key-file", Text, "", "Its private key.", |d, v| { d.config.peer_transport_security.key_file = path(v); Ok(()) }),
    set(SECURITY, "peer-client-cert-file", Text, "", "Certificate to show to peers that are connected to. Empty: peer-cert-file.", |d, v| { d.config.peer_transport_security.client_cert_file = path(v); Ok(()) }),
    set(SECURITY, "peer-client-key-file", Text, "", "Its private key.", |d, v| { d.config.peer_transport_security.client_key_file = path(v); Ok(()) }),
    set(SECURITY, "peer-trusted-ca-file", Text, "", "CAs whose certificates peers need, on both ends.", |d, v| { d.config.peer_transport_security.trusted_ca_file = path(v); Ok(()) }),
    set(SECURITY, "peer-client-cert-auth", Bool, "false", "Ask peers for a certificate; peer-trusted-ca-file does, too.", |d, v| boolean(v).map(|v| d.config.peer_transport_security.client_cert_auth = v)),
    set(SECURITY, "peer-cert-allowed-cn", List, "", "Only peers whose certificates have one of these common names.", |d, v| { d.config.peer_transport_security.allowed_cn = texts(v); Ok(()) }),
    set(SECURITY, "peer-cert-allowed-hostname", List, "", "Only peers whose certificates are made out to one of these hosts.", |d, v| { d.config.peer_transport_security.allowed_hostname = texts(v); Ok(()) }),
    set(SECURITY, "peer-skip-client-san-verification", Bool, "false", "Take a peer's certificate from addresses that it is not made out to.", |d, v| boolean(v).map(|v| d.config.peer_transport_security.skip_client_san_verification = v)),
    set(SECURITY, "tls-min-version", Text, "TLS1.2", "The oldest TLS that is spoken: TLS1.2 or TLS1.3.", |d, v| choose(v, &[("TLS1.2", TlsVersion::V1_2), ("TLS1.3", TlsVersion::V1_3)]).map(|v| d.config.tls_min_version = v)),
    set(SECURITY, "tls-max-version", Text, "", "The newest TLS that is spoken. Empty: the newest there is.", |d, v| choose(v, &[("", None), ("TLS1.2", Some(TlsVersion::V1_2)), ("TLS1.3", Some(TlsVersion::V1_3))]).map(|v| d.config.tls_max_version = v)),
    set(SECURITY, "cipher-suites", List, "", "Of TLS 1.2 only these cipher suites. Empty: all that are good.", |d, v| { d.config.cipher_suites = texts(v); Ok(()) }),

    set(RETENTION, "auto-compaction-mode", Text, "periodic", "What the retention counts: 'periodic' (time) or 'revision'.", |d, v| choose(v, &[("periodic", AutoCompactionMode::Periodic), ("revision", AutoCompactionMode::Revision)]).map(|v| d.config.auto_compaction_mode = v)),
    set(RETENTION, "auto-compaction-retention", Amount, "0", "History to keep: 5m, 5 (hours), or a number of revisions. 0: all.", |d, v| { d.config.auto_compaction_retention = v.into(); Ok(()) }),
    set(RETENTION, "compaction-batch-limit", Number, "1000", "No effect: a compaction goes in short steps by itself.", |d, v| uint(v).map(|v| d.config.compaction_batch_limit = or(v, 1_000))),
    set(RETENTION, "compaction-sleep-interval", Time, "10ms", "No effect: a compaction rests by itself.", |d, v| parse_duration(v).map(|v| d.config.compaction_sleep_interval = or_time(v, Duration::from_millis(10)))),

    set(WATCHING, "listen-metrics-urls", List, "", "More URLs that answer /metrics and /health.", |d, v| urls(v).map(|v| d.config.listen_metrics_urls = v)),
    set(WATCHING, "watch-progress-notify-interval", Time, "10m", "How often an idle watch that asked for it is told the revision.", |d, v| parse_duration(v).map(|v| d.config.watch_progress_notify_interval = or_time(v, Duration::from_secs(600)).max(WATCH_PROGRESS_INTERVAL_MIN))),
    set(WATCHING, "experimental-initial-corrupt-check", Bool, "true", "Compare the state with the other members' before serving. etcd: false.", |d, v| boolean(v).map(|v| d.config.initial_corrupt_check = v)),
    set(WATCHING, "corrupt-check-time", Time, "0s", "How often the leader compares all members' states, by reading all of them. 0: never.", |d, v| parse_duration(v).map(|v| d.config.corrupt_check_time = v)),
    set(WATCHING, "experimental-compact-hash-check-enabled", Bool, "true", "The leader compares what members found at compactions. etcd: false.", |d, v| boolean(v).map(|v| d.config.compact_hash_check = v)),
    set(WATCHING, "compact-hash-check-time", Time, "1m", "How often it does.", |d, v| parse_duration(v).map(|v| d.config.compact_hash_check_time = v)),
    set(WATCHING, "warning-apply-duration", Time, "100ms", "Warn when an entry takes longer to apply.", |d, v| parse_duration(v).map(|v| d.config.warning_apply_duration = v)),
    set(WATCHING, "warning-unary-request-duration", Time, "300ms", "Warn when a request takes longer.", |d, v| parse_duration(v).map(|v| d.config.warning_unary_request_duration = or_time(v, Duration::from_millis(300)))),

    set(LOGGING, "logger", Text, "zap", "Only 'zap', the form of the lines.", |_, v| choose(v, &[("zap", ())])),
    set(LOGGING, "log-level", Text, "info", "debug, info, warn, error, panic or fatal.", |d, v| choose(v, &[("debug", LogLevel::Debug), ("info", LogLevel::Info), ("warn", LogLevel::Warn), ("error", LogLevel::Error), ("dpanic", LogLevel::Error), ("panic", LogLevel::Error), ("fatal", LogLevel::Error)]).map(|v| d.log.level = v)),
    set(LOGGING, "log-format", Text, "json", "json or console.", |d, v| choose(v, &[("json", LogFormat::Json), ("console", LogFormat::Console)]).map(|v| d.log.format = v)),
    set(LOGGING, "log-outputs", List, "default", "default (stderr), stderr, stdout or paths of files to append to.", |d, v| outputs(v).map(|v| d.log.outputs = v)),

    set(UNSAFE, "unsafe-no-fsync", Bool, "false", "Do not wait for the disk: a crash of the machine loses acknowledged writes.", |d, v| boolean(v).map(|v| d.config.unsafe_no_fsync = v)),

    noop("max-snapshots", Number, "5", ONE_STORE),
    noop("max-wals", Number, "5", ONE_STORE),
    noop("backend-batch-interval", Time, "0s", ONE_STORE),
    noop("backend-batch-limit", Number, "0", ONE_STORE),
    noop("backend-bbolt-freelist-type", Text, "map", ONE_STORE),
    noop("bootstrap-defrag-threshold-megabytes", Number, "0", ONE_STORE),
    noop("experimental-txn-mode-write-with-shared-buffer", Bool, "true", ONE_STORE),
    noop("experimental-stop-grpc-service-on-defrag", Bool, "false", "defragmentation does not stop the service"),
    noop("memory-mlock", Bool, "false", "memory is not locked"),
    noop("socket-reuse-port", Bool, "false", "ports are not shared"),
    noop("socket-reuse-address", Bool, "false", "the system's way is used"),
    noop("initial-election-tick-advance", Bool, "true", NOT_YET),
    noop("raft-read-timeout", Time, "5s", NOT_YET),
    noop("raft-write-timeout", Time, "5s", NOT_YET),
    noop("downgrade-check-time", Time, "5s", NOT_YET),
    noop("experimental-enable-lease-checkpoint", Bool, "false", CHECKPOINTS),
    noop("experimental-enable-lease-checkpoint-persist", Bool, "false", CHECKPOINTS),
    noop("feature-gates", List, "", "there are no feature gates"),
    noop("enable-grpc-gateway", Bool, "false", "the JSON gateway is not built yet"),
    noop("enable-pprof", Bool, "false", "profiles of the Go runtime do not exist here"),
    noop("metrics", Text, "basic", "there is one set of metrics"),
    noop("disable-log-sampling", Bool, "false", "log lines are never sampled"),
    noop("log-rotation-config-json", Text, "", "log rotation is not built yet"),
    noop("distributed-tracing-address", Text, "localhost:4317", "tracing is not built yet"),
    noop("distributed-tracing-service-name", Text, "etcd", "tracing is not built yet"),
    noop("distributed-tracing-instance-id", Text, "", "tracing is not built yet"),
    noop("distributed-tracing-sampling-rate", Number, "0", "tracing is not built yet"),
    noop("client-cert-file", Text, "", GATEWAY),
    noop("client-key-file", Text, "", GATEWAY),
    noop("self-signed-cert-validity", Number, "1", "certificates are not made here"),
    noop("discovery-fallback", Text, "exit", DISCOVERY),
    noop("discovery-proxy", Text, "", DISCOVERY),
    noop("discovery-srv-name", Text, "", DISCOVERY),
    noop("discovery-dial-timeout", Time, "2s", DISCOVERY),
    noop("discovery-request-timeout", Time, "5s", DISCOVERY),
    noop("discovery-keepalive-time", Time, "2s", DISCOVERY),
    noop("discovery-keepalive-timeout", Time, "6s", DISCOVERY),
    noop("discovery-insecure-transport", Bool, "true", DISCOVERY),
    noop("discovery-insecure-skip-tls-verify", Bool, "false", DISCOVERY),
    noop("discovery-cert", Text, "", DISCOVERY),
    noop("discovery-key", Text, "", DISCOVERY),
    noop("discovery-cacert", Text, "", DISCOVERY),
    noop("discovery-user", Text, "", DISCOVERY),
    noop("discovery-password", Text, "", DISCOVERY),
    noop("v2-deprecation", Text, "", V2),
    noop("proxy-failure-wait", Number, "5000", V2),
    noop("proxy-refresh-interval", Number, "30000", V2),
    noop("proxy-dial-timeout", Number, "1000", V2),
    noop("proxy-write-timeout", Number, "5000", V2),
    noop("proxy-read-timeout", Number, "0", V2),
    noop("cluster-active-size", Bool, "", GONE),
    noop("cluster-remove-delay", Bool, "", GONE),
    noop("cluster-sync-interval", Bool, "", GONE),
    noop("config", Bool, "", GONE),
    noop("force", Bool, "", GONE),
    noop("max-result-buffer", Bool, "", GONE),
    noop("max-retry-attempts", Bool, "", GONE),
    noop("peer-heartbeat-interval", Bool, "", GONE),
    noop("peer-election-timeout", Bool, "", GONE),
    noop("retry-interval", Bool, "", GONE),
    noop("snapshot", Bool, "", GONE),
    noop("v", Bool, "", GONE),
    noop("vv", Bool, "", GONE),

    refuse("client-crl-file", Text, "", CRL),
    refuse("auto-tls", Bool, "false", AUTO),
    refuse("peer-crl-file", Text, "", CRL),
    refuse("peer-auto-tls", Bool, "false", AUTO),
    refuse("auth-token", Text, "simple", AUTH),
    refuse("auth-token-ttl", Number, "300", AUTH),
    refuse("bcrypt-cost", Number, "10", AUTH),
    refuse("cors", List, "*", "the JSON gateway is not built yet"),
    refuse("host-whitelist", List, "*", "checking host names is not built yet"),
    refuse("discovery", Text, "", DISCOVERY),
    refuse("discovery-token", Text, "", DISCOVERY),
    refuse("discovery-endpoints", List, "", DISCOVERY),
    refuse("discovery-srv", Text, "", DISCOVERY),
    refuse("force-new-cluster", Bool, "false", "recovering a member from a lost cluster is not built yet"),
    refuse("enable-log-rotation", Bool, "false", "log rotation is not built yet"),
    refuse("enable-distributed-tracing", Bool, "false", "tracing is not built yet"),
    refuse("enable-v2", Bool, "false", V2),
    refuse("experimental-enable-v2v3", Text, "", V2),
    refuse("proxy", Text, "off", V2),
];

/// The flag of that name, and whether the name is the old one with `experimental-` before it.
pub(super) fn find(name: &str) -> Option<(&'static Flag, bool)> {
    let exact = |name: &str| FLAGS.iter().find(|flag| flag.name == name);
    exact(name).map(|flag| (flag, false)).or_else(|| exact(name.strip_prefix("experimental-")?).map(|flag| (flag, true)))
}

/// The name nearest to a mistyped one, if any is near.
pub(super) fn nearest(name: &str) -> Option<&'static str> {
    // Longer than any flag by more than can be a slip: not worth comparing.
    const NAME_LENGTH_MAX: usize = 64;
    if name.len() > NAME_LENGTH_MAX {
        return None;
    }
    let far = 1 + name.len() / 4;
    FLAGS.iter().map(|flag| (distance(name, flag.name), flag.name)).filter(|(d, _)| *d <= far).min().map(|(_, name)| name)
}

/// How many letters must be put in, taken out or changed to make the one text of the other.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, left) in a.chars().enumerate() {
        let mut diagonal = i;
        let mut before = i + 1;
        for (cell, right) in row.iter_mut().skip(1).zip(&b) {
            let here = (diagonal + usize::from(left != *right)).min(*cell + 1).min(before + 1);
            diagonal = std::mem::replace(cell, here);
            before = here;
        }
        if let Some(first) = row.first_mut() {
            *first = i + 1;
        }
    }
    row.last().copied().unwrap_or(0)
}

impl Kind {
    /// Whether the value can be read at all, for a flag that does nothing with it.
    pub(super) fn check(self, value: &str) -> Set {
        match self {
            Kind::Bool => boolean(value).map(drop),
            Kind::Number => int::<i128>(value).map(drop),
            // A time that is not used may be negative: etcd takes it.
            Kind::Duration => parse_duration(value.strip_prefix('-').unwrap_or(value)).map(drop),
            Kind::Text | Kind::Amount | Kind::List => Ok(()),
        }
    }

    /// Whether two values mean the same.
    pub(super) fn same(self, a: &str, b: &str) -> bool {
        match self {
            Kind::Bool => boolean(a).ok() == boolean(b).ok(),
            Kind::Number => int::<i128>(a).ok() == int::<i128>(b).ok(),
            Kind::Duration => parse_duration(a).ok() == parse_duration(b).ok(),
            Kind::Text | Kind::Amount | Kind::List => a.trim() == b.trim(),
        }
    }
}

/// The words that Go's `strconv.ParseBool` takes.
fn boolean(value: &str) -> Set<bool> {
    match value {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Ok(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Ok(false),
        _ => Err("it must be true or false".into()),
    }
}

/// A whole number of zero or more.
fn uint<T: TryFrom<i128>>(value: &str) -> Set<T> {
    let wrong = || "it must be a whole number, not negative and not too large".to_owned();
    if value.starts_with(['+', '-']) {
        return Err(wrong());
    }
    int(value).map_err(|_| wrong())
}

/// A whole number as Go's flags take it: decimal, or with 0x, 0o, 0 or 0b before it, and single underscores between digits.
fn int<T: TryFrom<i128>>(value: &str) -> Set<T> {
    let wrong = || "it must be a whole number, not too large".to_owned();
    let (negative, text) = match value.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, value.strip_prefix('+').unwrap_or(value)),
    };
    let lower = text.to_ascii_lowercase();
    let (radix, digits) = match lower.as_bytes() {
        [b'0', b'x', ..] => (16, lower.get(2..)),
        [b'0', b'o', ..] => (8, lower.get(2..)),
        [b'0', b'b', ..] => (2, lower.get(2..)),
        [b'0', _, ..] => (8, lower.get(1..)),
        _ => (10, Some(lower.as_str())),
    };
    let digits = digits.ok_or_else(wrong)?;
    // Go lets an underscore follow the prefix, but neither lead a decimal number, nor stand at the end, nor twice in a row.
    let digits = if radix == 10 { digits } else { digits.strip_prefix('_').unwrap_or(digits) };
    if digits.starts_with(['_', '+', '-']) || digits.ends_with('_') || digits.contains("__") {
        return Err(wrong());
    }
    // The sign is put before the digits rather than applied to the number, so that the smallest i64 can be read too.
    let plain: String = digits.chars().filter(|c| *c != '_').collect();
    let number = i128::from_str_radix(&plain, radix).map_err(|_| wrong())?;
    T::try_from(if negative { -number } else { number }).map_err(|_| wrong())
}

/// etcd takes zero for "the default" in these settings.
fn or<T: Default + PartialEq>(value: T, default: T) -> T {
    if value == T::default() { default } else { value }
}

fn or_time(value: Duration, default: Duration) -> Duration {
    or(value, default)
}

fn path(value: &str) -> Option<std::path::PathBuf> {
    (!value.is_empty()).then(|| value.into())
}

/// Texts with commas between.
fn texts(value: &str) -> Vec<String> {
    value.split(',').map(str::trim).filter(|text| !text.is_empty()).map(str::to_owned).collect()
}

/// URLs with commas between, in the order and without the repeats that etcd makes of them.
fn urls(value: &str) -> Set<Vec<Url>> {
    if value.trim().is_empty() {
        return Ok(Vec::new());
    }
    let mut urls = value.split(',').map(parse_url).collect::<Set<Vec<Url>>>()?;
    urls.sort();
    urls.dedup();
    Ok(urls)
}

fn choose<T: Copy>(value: &str, choices: &[(&str, T)]) -> Set<T> {
    let names = || choices.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(", ");
    choices.iter().find(|(name, _)| *name == value).map(|(_, choice)| *choice).ok_or_else(|| format!("it must be one of: {}", names()))
}

fn outputs(value: &str) -> Set<Vec<LogOutput>> {
    let mut outputs = value.split(',').map(LogOutput::from_str).collect::<Set<Vec<LogOutput>>>()?;
    outputs.sort();
    outputs.dedup();
    Ok(outputs)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    /// Names and defaults are facts about etcd; the table must hold each once, with a default that changes nothing.
    #[test]
    fn the_table_is_sound() {
        let mut names = BTreeSet::new();
        for flag in FLAGS {
            assert!(names.insert(flag.name), "{} stands twice", flag.name);
            assert!(flag.name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-'), "{}", flag.name);
            match flag.act {
                Act::Set(apply) => {
                    let mut draft = Draft::default();
                    apply(&mut draft, flag.default).unwrap_or_else(|why| panic!("{}: {why}", flag.name));
                    assert_eq!(draft, Draft::default(), "{}: the default in the table is not Config's", flag.name);
                    assert_eq!(flag.help.is_empty(), flag.group.is_empty(), "{}", flag.name);
                }
                Act::NoOp(why) | Act::Refuse(why) => {
                    assert!(!why.is_empty(), "{}", flag.name);
                    assert!(flag.default.is_empty() || flag.kind.check(flag.default).is_ok(), "{}", flag.name);
                }
                Act::Command => {}
            }
        }
    }

    #[test]
    fn values_are_read_as_go_reads_them() {
        for (text, number) in [
            ("0", 0i64),
            ("5000", 5000),
            ("-1", -1),
            ("+7", 7),
            ("0x10", 16),
            ("0X1f", 31),
            ("0o17", 15),
            ("017", 15),
            ("0b101", 5),
            ("1_000", 1000),
            ("0x_ff", 255),
            ("9223372036854775807", i64::MAX),
            ("-9223372036854775808", i64::MIN),
        ] {
            assert_eq!(int::<i64>(text), Ok(number), "{text}");
        }
        for text in ["", "-", "+", "x", "1.5", "1e3", " 1", "1_", "_1", "1__0", "08", "0x", "--1", "0x-1", "9223372036854775808"] {
            assert!(int::<i64>(text).is_err(), "{text}");
        }
        for text in ["-0", "+0", "-5", "18446744073709551616"] {
            assert!(uint::<u64>(text).is_err(), "{text}");
        }
        assert_eq!(uint::<u32>("4294967295"), Ok(u32::MAX));
        assert!(uint::<u32>("4294967296").is_err());
        assert_eq!((boolean("T"), boolean("0")), (Ok(true), Ok(false)));
        assert!(boolean("yes").is_err() && boolean("").is_err());
    }

    #[test]
    fn a_slip_finds_its_flag() {
        assert_eq!(nearest("listen-client-url"), Some("listen-client-urls"));
        assert_eq!(nearest("heartbeet-interval"), Some("heartbeat-interval"));
        assert_eq!(nearest("nmae"), Some("name"));
        assert_eq!(nearest("foo"), None);
        assert_eq!(nearest("nam"), Some("name"));
        assert_eq!(nearest("something-else-entirely"), None);
        assert_eq!(distance("kitten", "sitting"), 3);
    }

    #[test]
    fn the_experimental_names_still_work() {
        assert!(matches!(find("experimental-compaction-batch-limit"), Some((flag, true)) if flag.name == "compaction-batch-limit"));
        assert!(matches!(find("experimental-enable-v2v3"), Some((_, false))));
        assert!(find("experimental-nope").is_none());
    }
}
