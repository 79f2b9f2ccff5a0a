//! One typed [`Config`], whether it comes from flags, the environment, a file or a program.
//!
//! The fields carry etcd's flag names in snake case, with the unit last where the type does not say it, and etcd's defaults, so that
//! etcd's own documentation explains them. [`Config::validate`] is called once, by whoever starts a server; every complaint names the
//! setting, the value it has, and what would be right.
//!
//! ```
//! use quorate::Config;
//!
//! let mut config = Config::default(); // a single member, as `etcd` without a flag
//! config.name = "node-1".into();
//! config.listen_client_urls = vec!["http://127.0.0.1:0".parse()?]; // port 0: the system picks one
//! config.listen_peer_urls.clear(); // no peers, no socket for them
//! config.validate()?;
//!
//! config.heartbeat_interval_ms = 500;
//! let complaint = config.validate().unwrap_err().to_string();
//! assert!(complaint.contains("election-timeout is 1000 ms"), "{complaint}");
//! # Ok::<(), quorate::Error>(())
//! ```
//!
//! # Invariants
//! - A validated `Config` can be used without another check: no zero that divides or stalls, no TLS that nobody would speak.
//! - What is left empty is derived, not stored: the data directory from the name, the advertised URLs from what was bound. So a changed
//!   name or port needs no second change, and port 0 works.
//!
//! # Caveats
//! - Lists of listeners may be empty: a library then opens no socket at all.
//! - Host names are not resolved here. Listeners take an IP address or `localhost`, as in etcd.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use crate::error::{Error, Result};

pub(crate) mod backup;
pub(crate) mod tls;

pub use backup::{BUMP_REVISION, BackupConfig, JITTER_MAX, RestoreOptions, StoreOptions};
pub(crate) use backup::{Where, shown as shown_place};
pub use tls::{CIPHER_SUITES, TlsFiles, TlsVersion, TransportSecurity};

/// The release of etcd whose behaviour and interfaces this crate claims.
pub const ETCD_VERSION: &str = "3.7.1";

/// Space quota when `quota_backend_bytes` is 0: 2 GiB.
pub const DEFAULT_QUOTA_BYTES: u64 = 2 * 1024 * 1024 * 1024;

/// Longest election timeout, in milliseconds. Beyond it [`Config::validate`] refuses: a cluster would be headless for a minute.
pub const ELECTION_TIMEOUT_MS_MAX: u64 = 50_000;

/// Largest `max_request_bytes`. Beyond it [`Config::validate`] refuses: a request is one entry of the log, which takes 32 MiB with what
/// frames it.
pub const REQUEST_BYTES_MAX: usize = 31 << 20;

/// Shortest interval between progress notifications of an idle watch. Below it [`Config::validate`] refuses.
pub const WATCH_PROGRESS_INTERVAL_MIN: Duration = Duration::from_millis(100);

/// Shortest interval between keepalive pings to a client; a shorter one counts as this.
pub const KEEPALIVE_INTERVAL_MIN: Duration = Duration::from_secs(1);

/// Smallest cache of values: 1 MiB. Below it [`Config::validate`] refuses; a few blocks must fit.
pub const VALUE_CACHE_BYTES_MIN: usize = 1024 * 1024;

/// Everything that a server can be told. See the [module](self) for how its fields are named and checked.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Config {
    /// This member's name, for people and for `initial_cluster`. Default: `default`.
    pub name: String,
    /// Where everything is kept. `None`: `<name>.etcd` in the working directory.
    pub data_dir: Option<PathBuf>,
    /// Where the Raft log is kept, if elsewhere than in the data directory; a second disk shortens the wait for writes.
    pub wal_dir: Option<PathBuf>,

    /// Where to listen for clients, gRPC and HTTP. Empty: nowhere. Default: `http://localhost:2379`.
    pub listen_client_urls: Vec<Url>,
    /// Where to listen for peers. Empty: nowhere. Default: `http://localhost:2380`.
    pub listen_peer_urls: Vec<Url>,
    /// Where to listen for clients' HTTP alone; if not empty, `listen_client_urls` serve gRPC alone.
    pub listen_client_http_urls: Vec<Url>,
    /// More places that answer `/metrics` and `/health`.
    pub listen_metrics_urls: Vec<Url>,
    /// The URLs told to clients. Empty: those that were bound, see [`Config::advertised_client_urls`].
    pub advertise_client_urls: Vec<Url>,
    /// The URLs told to peers. Empty: derived, see [`Config::advertised_peer_urls`].
    pub initial_advertise_peer_urls: Vec<Url>,

    /// The certificates of clients' listeners, and whose clients are asked for.
    pub client_transport_security: TransportSecurity,
    /// The certificates of the peers' listeners, and of the connections to other members.
    pub peer_transport_security: TransportSecurity,
    /// The oldest TLS that is spoken. Default: 1.2.
    pub tls_min_version: TlsVersion,
    /// The newest TLS that is spoken. `None`: the newest there is.
    pub tls_max_version: Option<TlsVersion>,
    /// Of TLS 1.2 only these, of [`CIPHER_SUITES`]. Empty: all of them.
    pub cipher_suites: Vec<String>,

    /// The founding members as `name=url,name=url`. Empty: this member alone.
    pub initial_cluster: String,
    /// Whether the members found a cluster or join one. Means nothing once there is data.
    pub initial_cluster_state: ClusterState,
    /// Told apart by this, two clusters with the same members get different ids. Default: `etcd-cluster`.
    pub initial_cluster_token: String,
    /// Refuse changes of the members that would cost the quorum.
    pub strict_reconfig_check: bool,
    /// Learners that the cluster may have at the same time; 0: none. Default: 1.
    pub max_learners: usize,
    /// Ask for votes before standing for election, so that a returning member does not unseat a leader.
    pub pre_vote: bool,

    /// Milliseconds between heartbeats of the leader. Default: 100.
    pub heartbeat_interval_ms: u64,
    /// Milliseconds without a heartbeat after which an election starts. Default: 1000.
    pub election_timeout_ms: u64,
    /// Log entries between two snapshots. Without effect: the log is cut off as the state reaches the disk. Default: 10,000.
    pub snapshot_count: u64,
    /// Log entries kept behind what is durable, for members that lag; one that lags further is sent a snapshot. Without effect on a member
    /// that is alone. Default: 5,000.
    pub snapshot_catchup_entries: u64,

    /// Bytes that the data may take before writes are refused. 0: [`DEFAULT_QUOTA_BYTES`]; negative: no quota. See [`Config::quota`].
    pub quota_backend_bytes: i64,
    /// Compares or operations in one Txn. Default: 128.
    pub max_txn_ops: usize,
    /// Bytes in one request. Default: 1.5 MiB.
    pub max_request_bytes: usize,
    /// Streams that one connection may have open. Default: no limit of its own.
    pub max_concurrent_streams: u32,

    /// Clients that ping more often than this are disconnected, in etcd; here none is. Default: 5 s.
    pub grpc_keepalive_min_time: Duration,
    /// How often an idle connection is pinged; zero: never. See [`Config::grpc_keepalive`]. Default: 2 h.
    pub grpc_keepalive_interval: Duration,
    /// How long a ping may remain unanswered; zero: forever. Default: 20 s.
    pub grpc_keepalive_timeout: Duration,

    /// What `auto_compaction_retention` counts.
    pub auto_compaction_mode: AutoCompactionMode,
    /// How much history to keep: `5m`, or `5` for five hours, or a number of revisions; `0`: all. See [`Config::auto_compaction`].
    pub auto_compaction_retention: String,
    /// Revisions that one step of a compaction handles. Without effect: steps are short as they are. Default: 1,000.
    pub compaction_batch_limit: usize,
    /// Rest between two steps of a compaction. Without effect, as above. Default: 10 ms.
    pub compaction_sleep_interval: Duration,

    /// Before it serves, the member compares its state with the other members': one that differs from the majority does not start. Costs a
    /// hash over the history, here and there, and no more than five seconds. Default: true; etcd's is false.
    pub initial_corrupt_check: bool,
    /// How often the leader compares all members' states, over the whole history; zero: never. Default: zero, for it reads everything.
    pub corrupt_check_time: Duration,
    /// The leader compares what the members have found at their compactions, which is at hand anyway. Default: true; etcd's is false.
    pub compact_hash_check: bool,
    /// How often it does. Default: 1 min.
    pub compact_hash_check_time: Duration,

    /// How often an idle watch that asked for it is told the revision. Default: 10 min.
    pub watch_progress_notify_interval: Duration,
    /// Log a warning, one in a second at most, when an entry takes longer than this to apply. Default: 100 ms.
    pub warning_apply_duration: Duration,
    /// Log a warning, one in a second at most, when a unary request takes longer than this. Default: 300 ms.
    pub warning_unary_request_duration: Duration,

    /// Bytes of memory for values that are on disk. Not one of etcd's settings. Default: what [`Config::value_cache`] says.
    pub value_cache_bytes: Option<usize>,
    /// Do not wait for the disk. A crash of the machine then loses acknowledged writes, or all of them; a crash of the process
    /// does not. For tests only; the log warns of it at the start.
    pub unsafe_no_fsync: bool,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            name: "default".into(),
            data_dir: None,
            wal_dir: None,
            listen_client_urls: vec![Url::http("localhost", 2379)],
            listen_peer_urls: vec![Url::http("localhost", 2380)],
            listen_client_http_urls: Vec::new(),
            listen_metrics_urls: Vec::new(),
            advertise_client_urls: Vec::new(),
            initial_advertise_peer_urls: Vec::new(),
            client_transport_security: TransportSecurity::default(),
            peer_transport_security: TransportSecurity::default(),
            tls_min_version: TlsVersion::V1_2,
            tls_max_version: None,
            cipher_suites: Vec::new(),
            initial_cluster: String::new(),
            initial_cluster_state: ClusterState::New,
            initial_cluster_token: "etcd-cluster".into(),
            strict_reconfig_check: true,
            max_learners: 1,
            pre_vote: true,
            heartbeat_interval_ms: 100,
            election_timeout_ms: 1000,
            snapshot_count: 10_000,
            snapshot_catchup_entries: 5_000,
            quota_backend_bytes: 0,
            max_txn_ops: 128,
            max_request_bytes: 1_572_864,
            max_concurrent_streams: u32::MAX,
            grpc_keepalive_min_time: Duration::from_secs(5),
            grpc_keepalive_interval: Duration::from_secs(2 * 60 * 60),
            grpc_keepalive_timeout: Duration::from_secs(20),
            auto_compaction_mode: AutoCompactionMode::Periodic,
            auto_compaction_retention: "0".into(),
            compaction_batch_limit: 1_000,
            compaction_sleep_interval: Duration::from_millis(10),
            initial_corrupt_check: true,
            corrupt_check_time: Duration::ZERO,
            compact_hash_check: true,
            compact_hash_check_time: Duration::from_secs(60),
            watch_progress_notify_interval: Duration::from_secs(10 * 60),
            warning_apply_duration: Duration::from_millis(100),
            warning_unary_request_duration: Duration::from_millis(300),
            value_cache_bytes: None,
            unsafe_no_fsync: false,
        }
    }
}

/// Whether `initial_cluster` founds a cluster or is joined.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClusterState {
    /// The members found it.
    New,
    /// It is there already.
    Existing,
}

/// What `auto_compaction_retention` counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AutoCompactionMode {
    /// Time; a number without a unit is hours.
    Periodic,
    /// Revisions.
    Revision,
}

/// Automatic compaction, as [`Config::auto_compaction`] understood it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AutoCompaction {
    /// Keep what was current within this time.
    Periodic(Duration),
    /// Keep this many revisions.
    Revision(i64),
}

/// A complaint in the one form that all have: the setting, its value, what would be right.
fn bad(setting: &str, value: impl fmt::Display, right: impl fmt::Display) -> Error {
    Error::Config(format!("{setting} is {value}; {right}"))
}

impl Config {
    /// Checks every setting by itself and against the others.
    ///
    /// # Errors
    /// [`Error::Config`] for the first one that is wrong.
    pub fn validate(&self) -> Result<()> {
        self.validate_member()?;
        self.validate_urls()?;
        self.validate_tls()?;
        self.validate_limits()?;
        self.auto_compaction().map(drop)
    }

    fn validate_member(&self) -> Result<()> {
        if self.name.is_empty() || self.name.contains([',', '=']) || self.name.chars().any(char::is_control) {
            return Err(bad(
                "name",
                format!("{:?}", self.name),
                "it must be a text, not empty, without commas, equals signs and control characters",
            ));
        }
        if self.data_dir.is_none() && self.name.contains(['/', '\\']) {
            return Err(bad("name", format!("{:?}", self.name), "with a slash in it, data-dir must be set"));
        }
        for (setting, path) in [("data-dir", &self.data_dir), ("wal-dir", &self.wal_dir)] {
            if path.as_ref().is_some_and(|path| path.as_os_str().is_empty()) {
                return Err(bad(setting, "empty", "name a directory or leave it unset"));
            }
        }
        Ok(())
    }

    fn validate_urls(&self) -> Result<()> {
        let listeners = [
            ("listen-client-urls", &self.listen_client_urls),
            ("listen-peer-urls", &self.listen_peer_urls),
            ("listen-client-http-urls", &self.listen_client_http_urls),
            ("listen-metrics-urls", &self.listen_metrics_urls),
        ];
        let mut taken: Vec<(&str, &Url)> = Vec::new();
        for (setting, urls) in listeners {
            for url in urls {
                self.validate_listener(setting, url)?;
                if url.socket_path().is_none() && url.listen_ip().is_none() {
                    return Err(bad(setting, url, "to listen on, give an IP address or localhost"));
                }
                if let Some((other, _)) = taken.iter().find(|(_, held)| held.is_same_place(url)) {
                    return Err(bad(setting, url, format!("{other} has it already, give another port")));
                }
                taken.push((setting, url));
            }
        }
        let told =
            [("advertise-client-urls", &self.advertise_client_urls), ("initial-advertise-peer-urls", &self.initial_advertise_peer_urls)];
        for (setting, urls) in told {
            if let Some(url) = urls.iter().find(|url| url.port() == Some(0)) {
                return Err(bad(setting, url, "others cannot connect to port 0, give the real one or leave it unset"));
            }
        }
        // Clients that ask for the endpoints get these; "everywhere" is an answer that works on this machine only.
        let everywhere = |url: &&Url| url.listen_ip().is_some_and(|ip| ip.is_unspecified());
        if self.advertise_client_urls.is_empty()
            && let Some(url) = self.listen_client_urls.iter().find(everywhere)
        {
            return Err(bad("listen-client-urls", url, "set advertise-client-urls to what clients reach this member by"));
        }
        Ok(())
    }

    fn validate_limits(&self) -> Result<()> {
        let (heartbeat, election) = (self.heartbeat_interval_ms, self.election_timeout_ms);
        if heartbeat == 0 {
            return Err(bad("heartbeat-interval", "0 ms", "it must be at least 1 ms"));
        }
        let least = heartbeat.saturating_mul(5);
        if election < least {
            return Err(bad(
                "election-timeout",
                format!("{election} ms"),
                format!("it must be at least 5 times heartbeat-interval ({heartbeat} ms), so {least} ms or more"),
            ));
        }
        if election > ELECTION_TIMEOUT_MS_MAX {
            let right = format!("it must be at most {ELECTION_TIMEOUT_MS_MAX} ms");
            return Err(bad("election-timeout", format!("{election} ms"), right));
        }
        if self.snapshot_count == 0 {
            return Err(bad("snapshot-count", 0, "it must be at least 1"));
        }
        if self.max_txn_ops == 0 {
            return Err(bad("max-txn-ops", 0, "it must be at least 1"));
        }
        if self.max_request_bytes == 0 || self.max_request_bytes > REQUEST_BYTES_MAX {
            return Err(bad("max-request-bytes", self.max_request_bytes, format!("it must be from 1 to {REQUEST_BYTES_MAX}")));
        }
        if self.max_concurrent_streams == 0 {
            return Err(bad("max-concurrent-streams", 0, "it must be at least 1"));
        }
        if self.compaction_batch_limit == 0 {
            return Err(bad("compaction-batch-limit", 0, "it must be at least 1"));
        }
        if self.watch_progress_notify_interval < WATCH_PROGRESS_INTERVAL_MIN {
            let (is, least) = (self.watch_progress_notify_interval, WATCH_PROGRESS_INTERVAL_MIN);
            return Err(bad("watch-progress-notify-interval", format!("{is:?}"), format!("it must be at least {least:?}")));
        }
        if let Some(bytes) = self.value_cache_bytes.filter(|bytes| *bytes < VALUE_CACHE_BYTES_MIN) {
            return Err(bad("value-cache-bytes", bytes, format!("it must be at least {VALUE_CACHE_BYTES_MIN}")));
        }
        if self.compact_hash_check && self.compact_hash_check_time.is_zero() {
            return Err(bad(
                "compact-hash-check-time",
                "0s",
                "it must be more than zero while experimental-compact-hash-check-enabled is true",
            ));
        }
        Ok(())
    }

    /// Checks what matters only on an empty data directory: etcd too takes no notice of it on a restart.
    ///
    /// # Errors
    /// [`Error::Config`] when this member is to join a cluster, or is not, or not with its URLs, in `initial_cluster`.
    pub fn validate_bootstrap(&self) -> Result<()> {
        let joining = self.initial_cluster_state == ClusterState::Existing;
        let members = self.initial_members()?;
        if joining && members.len() < 2 {
            let right = "initial-cluster-state is existing: it must name the cluster's members and this one";
            return Err(bad("initial-cluster", &self.initial_cluster, right));
        }
        if members.is_empty() {
            return Ok(());
        }
        let Some((_, urls)) = members.iter().find(|(name, _)| *name == self.name) else {
            return Err(bad("initial-cluster", &self.initial_cluster, format!("it must name this member, {:?}", self.name)));
        };
        let told = &self.initial_advertise_peer_urls;
        let all_among = |some: &[Url], others: &[Url]| some.iter().all(|url| others.iter().any(|other| url.may_be_same_place(other)));
        let agree = told.is_empty() || (all_among(urls, told) && all_among(told, urls));
        if !agree {
            let right = format!("initial-advertise-peer-urls has {} for this member, make the two agree", join(told));
            return Err(bad("initial-cluster", &self.initial_cluster, right));
        }
        Ok(())
    }

    /// The founding members of `initial_cluster`, by name, each with its peer URLs. Empty if the setting is.
    ///
    /// # Errors
    /// [`Error::Config`] when the text is not of the form `name=url,name=url`.
    pub fn initial_members(&self) -> Result<Vec<(String, Vec<Url>)>> {
        let mut members: std::collections::BTreeMap<String, Vec<Url>> = Default::default();
        if self.initial_cluster.trim().is_empty() {
            return Ok(Vec::new());
        }
        for part in self.initial_cluster.split(',').map(str::trim) {
            let wrong = |why: &str| bad("initial-cluster", &self.initial_cluster, format!("write name=url,name=url: {why}"));
            let (name, url) = part.split_once('=').ok_or_else(|| wrong(&format!("{part:?} has no equals sign")))?;
            if name.is_empty() {
                return Err(wrong(&format!("{part:?} has no name")));
            }
            let url = parse_url(url).map_err(|why| wrong(&why))?;
            let urls = members.entry(name.to_owned()).or_default();
            if !urls.contains(&url) {
                urls.push(url);
            }
        }
        Ok(members.into_iter().collect())
    }

    /// The data directory in use: `data_dir`, or `<name>.etcd`.
    pub fn effective_data_dir(&self) -> PathBuf {
        self.data_dir.clone().unwrap_or_else(|| format!("{}.etcd", self.name).into())
    }

    /// What cached values may take in memory, in bytes: what [`value_cache_bytes`](Config::value_cache_bytes) says, or else half of the
    /// quota, and at most a quarter of the machine's memory. It is taken only as there are values to fill it.
    ///
    /// A value that is not cached costs some 100 us of processor time, a cached one 1 us, so it is worth its memory; and with all of
    /// its values cached a member still takes less than etcd, whose memory grows with its whole file.
    pub fn value_cache(&self) -> usize {
        self.value_cache_bytes.unwrap_or_else(|| {
            let info = rustix::system::sysinfo();
            let memory = (info.totalram as u64).saturating_mul(u64::from(info.mem_unit));
            let bytes = (self.quota().unwrap_or(u64::MAX) / 2).min(memory / 4);
            usize::try_from(bytes).unwrap_or(usize::MAX).max(VALUE_CACHE_BYTES_MIN)
        })
    }

    /// The quota in bytes; `None`: there is none.
    pub fn quota(&self) -> Option<u64> {
        match self.quota_backend_bytes {
            0 => Some(DEFAULT_QUOTA_BYTES),
            bytes => u64::try_from(bytes).ok(),
        }
    }

    /// How often to ping an idle connection and, if there is a limit, how long to wait for the answer; `None`: do not ping.
    pub fn grpc_keepalive(&self) -> Option<(Duration, Option<Duration>)> {
        let some = |duration: Duration| (!duration.is_zero()).then_some(duration);
        some(self.grpc_keepalive_interval).map(|interval| (interval.max(KEEPALIVE_INTERVAL_MIN), some(self.grpc_keepalive_timeout)))
    }

    /// The automatic compaction that the mode and the retention ask for; `None`: none.
    ///
    /// # Errors
    /// [`Error::Config`] when the retention does not fit the mode.
    pub fn auto_compaction(&self) -> Result<Option<AutoCompaction>> {
        let text = self.auto_compaction_retention.trim();
        let wrong = |right: &str| bad("auto-compaction-retention", format!("{text:?}"), right);
        match self.auto_compaction_mode {
            AutoCompactionMode::Revision => match text.parse::<i64>() {
                Ok(0) => Ok(None),
                Ok(revisions @ 1..) => Ok(Some(AutoCompaction::Revision(revisions))),
                _ => Err(wrong("with auto-compaction-mode revision it must be a number of revisions, such as 1000, or 0 for none")),
            },
            AutoCompactionMode::Periodic => {
                let hours = || text.parse::<u64>().ok()?.checked_mul(3600).map(Duration::from_secs);
                match hours().or_else(|| parse_duration(text).ok()) {
                    Some(Duration::ZERO) => Ok(None),
                    Some(duration) => Ok(Some(AutoCompaction::Periodic(duration))),
                    None => Err(wrong(
                        "with auto-compaction-mode periodic it must be a number of hours, or a time such as 5m30s, or 0 for none",
                    )),
                }
            }
        }
    }

    /// The URLs to tell clients, given those that are really listened on (with the ports that the system picked).
    pub fn advertised_client_urls(&self, listening: &[Url]) -> Vec<Url> {
        if self.advertise_client_urls.is_empty() { listening.to_vec() } else { self.advertise_client_urls.clone() }
    }

    /// The URLs to tell peers: those set, or those that `initial_cluster` has for this member, or those really listened on.
    ///
    /// A member that listens everywhere is told as `localhost`, as etcd does; with other members about, set the URLs.
    pub fn advertised_peer_urls(&self, listening: &[Url]) -> Vec<Url> {
        if !self.initial_advertise_peer_urls.is_empty() {
            return self.initial_advertise_peer_urls.clone();
        }
        let members = self.initial_members().unwrap_or_default();
        if let Some((_, urls)) = members.into_iter().find(|(name, _)| *name == self.name) {
            return urls;
        }
        let reachable = |url: &Url| match url.listen_ip() {
            Some(ip) if ip.is_unspecified() => Url { host: "localhost".into(), ..url.clone() },
            _ => url.clone(),
        };
        listening.iter().map(reachable).collect()
    }
}

/// How a [`Url`] is spoken to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Scheme {
    /// `http`: TCP.
    Http,
    /// `https`: TLS over TCP.
    Https,
    /// `unix`: a Unix socket.
    Unix,
    /// `unixs`: TLS over a Unix socket.
    Unixs,
}

impl Scheme {
    const ALL: [(Scheme, &'static str); 4] =
        [(Scheme::Http, "http"), (Scheme::Https, "https"), (Scheme::Unix, "unix"), (Scheme::Unixs, "unixs")];

    /// As it stands in a URL.
    pub fn as_str(self) -> &'static str {
        match self {
            Scheme::Http => "http",
            Scheme::Https => "https",
            Scheme::Unix => "unix",
            Scheme::Unixs => "unixs",
        }
    }
}

/// A place to listen on or to connect to: `http://host:port`, `https://host:port`, `unix://path` or `unixs://path`, and no more.
///
/// ```
/// use quorate::Url;
/// let url: Url = "http://[::1]:2379".parse()?;
/// assert_eq!((url.host(), url.port()), ("::1", Some(2379)));
/// assert_eq!(url.to_string(), "http://[::1]:2379");
/// let socket: Url = "unix:///run/quorate.sock".parse()?;
/// assert_eq!(socket.socket_path(), Some("/run/quorate.sock".as_ref()));
/// assert!("http://localhost:2379/path".parse::<Url>().is_err());
/// # Ok::<(), quorate::Error>(())
/// ```
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Url {
    scheme: Scheme,
    /// Without brackets; for a Unix socket its path.
    host: String,
    /// 0 for a Unix socket.
    port: u16,
}

impl Url {
    /// `http://host:port`, of parts known to be good.
    fn http(host: &str, port: u16) -> Self {
        Url { scheme: Scheme::Http, host: host.into(), port }
    }

    /// How to speak to it.
    pub fn scheme(&self) -> Scheme {
        self.scheme
    }

    /// Whether it is spoken to in TLS.
    pub fn is_tls(&self) -> bool {
        matches!(self.scheme, Scheme::Https | Scheme::Unixs)
    }

    /// The host name or IP address, without brackets; empty for a Unix socket.
    pub fn host(&self) -> &str {
        if self.is_socket() { "" } else { &self.host }
    }

    /// The TCP port; `None` for a Unix socket.
    pub fn port(&self) -> Option<u16> {
        (!self.is_socket()).then_some(self.port)
    }

    /// The same place with another port, such as the one the system picked for port 0. A Unix socket remains as it is.
    pub fn with_port(&self, port: u16) -> Url {
        Url { port: if self.is_socket() { 0 } else { port }, ..self.clone() }
    }

    /// The path of a Unix socket.
    pub fn socket_path(&self) -> Option<&Path> {
        self.is_socket().then(|| Path::new(&self.host))
    }

    /// The address to bind, `localhost` being 127.0.0.1; `None` for a name or a Unix socket.
    pub fn listen_ip(&self) -> Option<IpAddr> {
        match self.host() {
            "localhost" => Some(Ipv4Addr::LOCALHOST.into()),
            host => host.parse().ok(),
        }
    }

    fn is_socket(&self) -> bool {
        matches!(self.scheme, Scheme::Unix | Scheme::Unixs)
    }

    /// Whether the two cannot both be bound. Port 0 never collides.
    fn is_same_place(&self, other: &Url) -> bool {
        match (self.socket_path(), other.socket_path()) {
            (Some(a), Some(b)) => a == b,
            (None, None) => self.port != 0 && self.port == other.port && self.listen_ip() == other.listen_ip(),
            _ => false,
        }
    }

    /// Whether the two can be the same member: names are not resolved, so a name may be any address.
    pub(crate) fn may_be_same_place(&self, other: &Url) -> bool {
        let hosts = match (self.listen_ip(), other.listen_ip()) {
            (Some(a), Some(b)) => a == b,
            (None, None) if self.is_socket() => self.host == other.host,
            _ => true,
        };
        hosts && self.scheme == other.scheme && self.port == other.port
    }
}

impl fmt::Display for Url {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scheme = self.scheme.as_str();
        if self.is_socket() {
            write!(f, "{scheme}://{}", self.host)
        } else if self.host.contains(':') {
            write!(f, "{scheme}://[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{scheme}://{}:{}", self.host, self.port)
        }
    }
}

impl fmt::Debug for Url {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Url {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        parse_url(text).map_err(Error::Config)
    }
}

/// A URL, or a list of them, for an error text: without what stands before an `@`, for that may be a password.
pub(crate) fn without_user(text: &str) -> std::borrow::Cow<'_, str> {
    let Some((hidden, rest)) = text.rsplit_once('@') else { return text.into() };
    // A comma may be one of the password as well as one between two URLs, so nothing behind the first scheme is shown.
    let scheme = Scheme::ALL.iter().find_map(|(_, name)| hidden.starts_with(&format!("{name}://")).then_some(*name));
    match scheme {
        Some(scheme) => format!("{scheme}://...@{rest}").into(),
        None => format!("...@{rest}").into(),
    }
}

/// As [`Url::from_str`], but the error is the bare sentence, for a caller that knows the setting.
pub(crate) fn parse_url(text: &str) -> std::result::Result<Url, String> {
    let text = text.trim();
    let wrong = |why: &str| Err(format!("{:?} {why}", without_user(text)));
    let scheme = text.split_once("://").and_then(|(scheme, rest)| {
        let known = Scheme::ALL.iter().find(|(_, name)| name.eq_ignore_ascii_case(scheme))?;
        Some((known.0, rest))
    });
    let Some((scheme, rest)) = scheme else {
        return wrong("is not a URL of the form http://host:port, https://host:port, unix://path or unixs://path");
    };
    if rest.contains(|c: char| c.is_control() || c.is_whitespace()) {
        return wrong("has a blank or control character in it");
    }
    if matches!(scheme, Scheme::Unix | Scheme::Unixs) {
        return if rest.is_empty() { wrong("has no path") } else { Ok(Url { scheme, host: rest.into(), port: 0 }) };
    }
    if rest.contains(['/', '?', '#', '@']) {
        return wrong("must end after the port and have no user, path or query");
    }
    let Some((host, port)) = rest.rsplit_once(':') else {
        return wrong("has no port; write host:port");
    };
    let (host, is_v6) = match host.strip_prefix('[').and_then(|host| host.strip_suffix(']')) {
        Some(inside) => (inside, true),
        None => (host, false),
    };
    if host.is_empty() {
        return wrong("has no host");
    }
    if is_v6 && host.parse::<Ipv6Addr>().is_err() {
        return wrong("has something other than an IPv6 address in its brackets");
    }
    if !is_v6 && host.contains([':', '[', ']']) {
        return wrong("has a colon or bracket in its host; write an IPv6 address as [::1]");
    }
    match port.parse::<u16>() {
        Ok(number) if port.bytes().all(|b| b.is_ascii_digit()) => Ok(Url { scheme, host: host.into(), port: number }),
        _ => wrong("has a port that is not a number from 0 to 65535"),
    }
}

/// Comma-separated, as on the command line.
fn join(urls: &[Url]) -> String {
    urls.iter().map(Url::to_string).collect::<Vec<_>>().join(",")
}

/// A time as Go writes it: `5m30s`, `1.5h`, `100ms`, `0`. Exact to the nanosecond, at most what Go holds (some 292 years). The error is a
/// sentence that does not repeat the text.
pub(crate) fn parse_duration(text: &str) -> std::result::Result<Duration, String> {
    const UNITS: [(&str, u128); 8] = [
        ("ns", 1),
        ("us", 1_000),
        ("µs", 1_000),
        ("μs", 1_000),
        ("ms", 1_000_000),
        ("s", 1_000_000_000),
        ("m", 60 * 1_000_000_000),
        ("h", 3_600 * 1_000_000_000),
    ];
    // More digits of a fraction than this are below a nanosecond even for hours; they are read and dropped.
    const FRACTION_DIGITS_MAX: usize = 18;
    let wrong = || "it must be a time such as 5m30s, 1.5h or 100ms".to_owned();

    if text.starts_with('-') {
        return Err("it must be a time such as 5m30s, and not negative".into());
    }
    let mut rest = text.strip_prefix('+').unwrap_or(text);
    if rest == "0" {
        return Ok(Duration::ZERO);
    }
    if rest.is_empty() {
        return Err(wrong());
    }
    let digits = |text: &str| text.bytes().take_while(u8::is_ascii_digit).count();
    let mut nanos: u128 = 0;
    while !rest.is_empty() {
        let (whole, after) = rest.split_at(digits(rest));
        let (fraction, after) = match after.strip_prefix('.') {
            Some(after) => after.split_at(digits(after)),
            None => ("", after),
        };
        if whole.is_empty() && fraction.is_empty() {
            return Err(wrong());
        }
        let end = after.find(|c: char| c == '.' || c.is_ascii_digit()).unwrap_or(after.len());
        let (unit, after) = after.split_at(end);
        let (_, unit) = UNITS.iter().find(|(name, _)| *name == unit).ok_or_else(wrong)?;
        let whole: u128 = if whole.is_empty() { 0 } else { u128::from(whole.parse::<u64>().map_err(|_| wrong())?) };
        let fraction = &fraction[..fraction.len().min(FRACTION_DIGITS_MAX)];
        let parts: u128 = if fraction.is_empty() { 0 } else { u128::from(fraction.parse::<u64>().map_err(|_| wrong())?) };
        let scale = 10u128.pow(fraction.len() as u32);
        // u64 times at most 3.6e12 is far inside u128.
        nanos += whole * unit + parts * unit / scale;
        if nanos > i64::MAX as u128 {
            return Err("it must be a time of less than 292 years".into());
        }
        rest = after;
    }
    u64::try_from(nanos).map(Duration::from_nanos).map_err(|_| wrong())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn url(text: &str) -> Url {
        text.parse().unwrap()
    }

    #[test]
    fn the_default_is_valid() {
        Config::default().validate().unwrap();
        Config::default().validate_bootstrap().unwrap();
    }

    #[test]
    fn no_listener_at_all_is_valid() {
        let mut config = Config::default();
        config.listen_client_urls.clear();
        config.listen_peer_urls.clear();
        config.validate().unwrap();
        assert!(config.advertised_client_urls(&[]).is_empty() && config.advertised_peer_urls(&[]).is_empty());
    }

    /// Every complaint names the setting and its value.
    #[test]
    fn each_wrong_setting_is_named() {
        type Change = fn(&mut Config);
        let cases: &[(Change, &str)] = &[
            (|c| c.name = "a=b".into(), "name is \"a=b\""),
            (|c| c.name = "a\nb".into(), "name is \"a\\nb\""),
            (|c| c.data_dir = Some("".into()), "data-dir is empty"),
            (|c| c.wal_dir = Some("".into()), "wal-dir is empty"),
            (|c| c.listen_peer_urls = vec![url("unixs://x")], "listen-peer-urls is unixs://x"),
            (|c| c.listen_metrics_urls = vec![url("http://localhost:2379")], "listen-metrics-urls is http://localhost:2379"),
            (|c| c.listen_client_http_urls = vec![url("unix://a"), url("unix://a")], "listen-client-http-urls is unix://a"),
            (|c| c.listen_client_urls = vec![url("http://[::]:1")], "listen-client-urls is http://[::]:1"),
            (|c| c.heartbeat_interval_ms = 0, "heartbeat-interval is 0 ms"),
            (|c| c.heartbeat_interval_ms = u64::MAX, "election-timeout is 1000 ms"),
            (|c| c.election_timeout_ms = 499, "election-timeout is 499 ms"),
            (|c| c.election_timeout_ms = 50_001, "election-timeout is 50001 ms"),
            (|c| c.snapshot_count = 0, "snapshot-count is 0"),
            (|c| c.max_txn_ops = 0, "max-txn-ops is 0"),
            (|c| c.max_request_bytes = 0, "max-request-bytes is 0"),
            (|c| c.max_request_bytes = REQUEST_BYTES_MAX + 1, "max-request-bytes is 32505857"),
            (|c| c.max_concurrent_streams = 0, "max-concurrent-streams is 0"),
            (|c| c.compaction_batch_limit = 0, "compaction-batch-limit is 0"),
            (|c| c.watch_progress_notify_interval = Duration::ZERO, "watch-progress-notify-interval is 0ns"),
            (|c| c.value_cache_bytes = Some(1), "value-cache-bytes is 1"),
            (|c| c.initial_cluster = "a=http://h:1,".into(), "initial-cluster is a=http://h:1,"),
            (|c| c.initial_cluster = "=http://h:1".into(), "initial-cluster is =http://h:1"),
            (|c| c.auto_compaction_retention = "-5".into(), "auto-compaction-retention is \"-5\""),
            (|c| c.auto_compaction_retention = "".into(), "auto-compaction-retention is \"\""),
        ];
        for (change, want) in cases {
            let mut config = Config::default();
            change(&mut config);
            let got = config.validate().expect_err(want).to_string();
            assert!(got.strip_prefix("invalid configuration: ").is_some_and(|got| got.starts_with(want)), "{got}, wanted {want}");
        }
    }

    #[test]
    fn quota_and_keepalive() {
        let mut config = Config::default();
        for (bytes, quota) in [(0, Some(DEFAULT_QUOTA_BYTES)), (5, Some(5)), (-1, None), (i64::MIN, None)] {
            config.quota_backend_bytes = bytes;
            assert_eq!(config.quota(), quota);
        }
        config.grpc_keepalive_interval = Duration::from_millis(1);
        assert_eq!(config.grpc_keepalive(), Some((KEEPALIVE_INTERVAL_MIN, Some(Duration::from_secs(20)))));
        config.grpc_keepalive_timeout = Duration::ZERO;
        assert_eq!(config.grpc_keepalive(), Some((KEEPALIVE_INTERVAL_MIN, None)));
        config.grpc_keepalive_interval = Duration::ZERO;
        assert_eq!(config.grpc_keepalive(), None);
    }

    #[test]
    fn automatic_compaction() {
        use AutoCompactionMode::{Periodic, Revision};
        let periodic = |seconds| Some(Some(AutoCompaction::Periodic(Duration::from_secs(seconds))));
        for (mode, retention, want) in [
            (Periodic, "0", Some(None)),
            (Periodic, "0s", Some(None)),
            (Periodic, "5", periodic(5 * 3600)),
            (Periodic, "5m30s", periodic(330)),
            (Periodic, "18446744073709551615", None),
            (Periodic, "x", None),
            (Revision, "0", Some(None)),
            (Revision, "1000", Some(Some(AutoCompaction::Revision(1000)))),
            (Revision, "-1", None),
            (Revision, "1h", None),
        ] {
            let config = Config { auto_compaction_mode: mode, auto_compaction_retention: retention.into(), ..Config::default() };
            assert_eq!(config.auto_compaction().ok(), want, "{mode:?} {retention}");
        }
    }

    #[test]
    fn what_is_advertised() {
        let mut config = Config::default();
        let listening = [url("http://0.0.0.0:32000"), url("http://127.0.0.1:32001")];
        assert_eq!(config.advertised_client_urls(&listening), listening);
        assert_eq!(config.advertised_peer_urls(&listening), [url("http://localhost:32000"), url("http://127.0.0.1:32001")]);
        config.initial_cluster = "default=http://node:2380".into();
        assert_eq!(config.advertised_peer_urls(&listening), [url("http://node:2380")]);
        config.initial_advertise_peer_urls = vec![url("http://10.0.0.1:2380")];
        assert_eq!(config.advertised_peer_urls(&listening), [url("http://10.0.0.1:2380")]);
        // The name may well be that address.
        config.validate_bootstrap().unwrap();
    }

    #[test]
    fn founding() {
        let told = |cluster: &str, urls: &[&str]| Config {
            initial_cluster: cluster.into(),
            initial_advertise_peer_urls: urls.iter().map(|text| url(text)).collect(),
            ..Config::default()
        };
        told("default=http://127.0.0.1:1", &["http://localhost:1"]).validate_bootstrap().unwrap();
        told("default=http://127.0.0.1:1,default=http://127.0.0.1:2", &["http://127.0.0.1:2", "http://127.0.0.1:1"])
            .validate_bootstrap()
            .unwrap();
        for (cluster, urls) in [
            ("other=http://127.0.0.1:1", &[][..]),
            ("default=http://127.0.0.1:1", &["http://127.0.0.1:2"]),
            ("default=http://127.0.0.1:1", &["http://127.0.0.2:1"]),
            ("default=http://127.0.0.1:1", &["http://127.0.0.1:1", "http://127.0.0.1:2"]),
            ("default=http://127.0.0.1:1", &["https://127.0.0.1:1"]),
        ] {
            let config = told(cluster, urls);
            config.validate().unwrap(); // fine on a restart
            assert!(config.validate_bootstrap().is_err(), "{cluster} {urls:?}");
        }
        let joining = Config { initial_cluster_state: ClusterState::Existing, ..Config::default() };
        joining.validate().unwrap();
        assert!(joining.validate_bootstrap().unwrap_err().to_string().contains("initial-cluster-state is existing"));
    }

    #[test]
    fn times() {
        for (text, nanos) in [
            ("0", 0),
            ("+0", 0),
            ("0s", 0),
            ("1ns", 1),
            ("1us", 1_000),
            ("1µs", 1_000),
            ("1.5h2m", 5_520_000_000_000),
            ("1h0m0.000000001s", 3_600_000_000_001),
            (".5s", 500_000_000),
            ("1.s", 1_000_000_000),
            ("0.1234567890123456789012345678901234567890s", 123_456_789),
            ("9223372036854775807ns", i64::MAX as u64),
        ] {
            assert_eq!(parse_duration(text), Ok(Duration::from_nanos(nanos)), "{text}");
        }
        for text in [
            "",
            "5",
            "s",
            ".",
            ".s",
            "1 s",
            "1d",
            "-1s",
            "--1s",
            "+",
            "1s1",
            "1e3s",
            "9223372036854775808ns",
            "99999999999999999999h",
            "2562048h",
        ] {
            assert!(parse_duration(text).is_err(), "{text}");
        }
    }

    #[test]
    fn urls_that_are_none() {
        for text in [
            "",
            "http",
            "http://",
            "http://a",
            "http://:1",
            "http://a:",
            "http://a:-1",
            "http://a:+1",
            "http://a:65536",
            "http://a:1/",
            "http://a:1?x",
            "http://[a]:1",
            "http://[::1:1",
            "http://::1:1",
            "http://[fe80::1%25lo]:1",
            "ftp://a:1",
            "unix://",
            "http://a b:1",
            "unix://a\0b",
        ] {
            let error = text.parse::<Url>().expect_err(text).to_string();
            assert!(error.contains(&format!("{text:?}")), "{error}");
        }
        // Who writes a user there may have written a password, too.
        let error = "http://u:hunter2@a:1".parse::<Url>().unwrap_err().to_string();
        assert!(error.contains("\"http://...@a:1\"") && !error.contains("hunter2"), "{error}");
        assert_eq!(url(" HTTP://localhost:1 ").to_string(), "http://localhost:1");
    }

    proptest! {
        #[test]
        fn urls_read_as_they_are_written(scheme in 0..4usize, host in "[a-z0-9.-]{1,20}", v6: u128, is_v6: bool, port: u16) {
            let scheme = Scheme::ALL[scheme].0;
            let is_socket = matches!(scheme, Scheme::Unix | Scheme::Unixs);
            let host = if is_v6 && !is_socket { Ipv6Addr::from(v6).to_string() } else { host };
            let made = Url { scheme, host, port: if is_socket { 0 } else { port } };
            prop_assert_eq!(made.to_string().parse::<Url>().unwrap(), made);
        }

        #[test]
        fn no_text_panics(text in "\\PC{0,40}", number in "[0-9.]{0,45}(ns|s|h)") {
            let _ = text.parse::<Url>();
            let _ = parse_duration(&text);
            let _ = parse_duration(&number);
        }
    }
}
