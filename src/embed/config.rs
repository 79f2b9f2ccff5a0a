//! What a node is told: one typed [`EmbedConfig`], whether it comes from the environment, a file or a program.
//!
//! ```
//! use quorate::embed::{Backend, EmbedConfig};
//!
//! let vars = [("JOIN", "10.0.0.1,10.0.0.2,10.0.0.3"), ("ADVERTISE_IP", "10.0.0.2"), ("HOSTNAME", "node-2"), ("KV_PLAINTEXT", "true")];
//! let config = EmbedConfig::from_vars(vars.map(|(name, value)| (name.into(), value.into())))?;
//! assert_eq!((config.backend, config.founders()), (Backend::Embedded, 3));
//! assert_eq!(config.join, ["10.0.0.1:5707", "10.0.0.2:5707", "10.0.0.3:5707"]);
//!
//! let complaint = EmbedConfig::from_vars([("KV_BACKEND".into(), "zookeeper".into())]).unwrap_err().to_string();
//! assert!(complaint.contains("KV_BACKEND is \"zookeeper\""), "{complaint}");
//! # Ok::<(), quorate::Error>(())
//! ```
//!
//! # Names
//! A variable and a key of the file are the same word: `KV_DATA_DIR` is `kv-data-dir` in the file. A variable beats the file, which
//! `KV_CONFIG_FILE` names; an empty variable is as good as none. An unknown key of the file is an error, for it is a mistake; an unknown
//! variable is somebody else's.
//!
//! | variable | default | |
//! |---|---|---|
//! | `KV_BACKEND` | `embedded` | or `etcd`: the store is elsewhere, and this node its client |
//! | `KV_ADDR` | | with `etcd`: where it is, `host[:port],...` or `https://host[:port],...`, port 2379 by default |
//! | `JOIN` | | with `embedded`: the nodes that may found the cluster, `host[:port],...`; the same on all nodes |
//! | `KV_SERVERS` | `auto` | `1`, `3`, or three if `JOIN` has as many entries |
//! | `ADVERTISE_IP` | found out | the address at which the other nodes reach this one, and on which it listens |
//! | `KV_CLIENT_PORT`, `KV_PEER_PORT` | 5706, 5707 | |
//! | `HOSTNAME` | `node` | for people; no commas, equals signs and outer blanks |
//! | `KV_DATA_DIR` | `/var/lib/quorate` | what the node remembers, and a server's data |
//! | `KV_TOKEN`, `KV_TOKEN_FILE` | | a secret that all nodes share, itself or its file; founding messages are sealed with it. Blanks around it do not count |
//! | `KV_TLS_CA`, `KV_TLS_CERT`, `KV_TLS_KEY` | | files, in PEM: whose certificates are good among the nodes and their clients, this node's, and its key. Read again when they change |
//! | `KV_PEER_TLS_CA`, `KV_PEER_TLS_CERT`, `KV_PEER_TLS_KEY` | the same | others for the peer port; the CA may be another by itself |
//! | `KV_PLAINTEXT` | `false` | `true`: plain text will do. Needed without certificates, but not on loopback |
//! | `KV_START_TIMEOUT` | `1m` | how long a start may take; it can be tried again |
//! | `KV_HEALTH_PORT` | | serves `/health`, `/livez`, `/readyz`, `/metrics` and `/v1/health` at `ADVERTISE_IP`, in plain HTTP; with an external etcd and no such address, at all of them |
//! | `KV_BACKUP_STORE` | | a directory for backups, on a file system that the nodes share or of this node's own; or `s3://bucket/prefix`, `gs://`, `az://` (cargo feature `object-store`), with the variables of the store, such as `AWS_ACCESS_KEY_ID` |
//! | `KV_BACKUP_SCHEDULE` | | when the leader makes one by itself: a cron expression in UTC, such as `0 */12 * * *` |
//! | `KV_BACKUP_KEEP`, `KV_BACKUP_JITTER` | 5, `5s` | how many are kept (0: all), and how much later than scheduled one may begin, by chance |
//! | `KV_ENLIST_TIMEOUT` | `5m` | how long a node that is to become a server may make no progress with that, before it is a client again |
//! | `KV_REPLACE_AFTER` | never | how long a server may not be heard of before a client takes its place by itself: seconds, or a time such as `3m`, which is a good one; 30 s or more. The same on all nodes |
//! | `ETCD_NAMESPACE` | | goes before every key, in the nodes themselves as in an external etcd |
//! | `TLS_ETCD_CA`, `TLS_ETCD_CLIENT_CERT`, `TLS_ETCD_CLIENT_KEY` | | with `etcd` and `https://` in `KV_ADDR`: the CA of its certificate, and what to show. Also as `ETCD_TLS_CLIENT_CA` and so on |
//! | `ETCD_USERNAME`, `ETCD_PASSWORD` | | with `etcd`: the user to log in as |
//!
//! # Invariants
//! - Every complaint names the setting, its value, and what would be right. A secret's value is in none, nor in `Debug`.
//! - A validated configuration has a `JOIN` list of distinct `host:port`, all of them on loopback if this node is, and none if it is not.
//! - A node with a known address has certificates, or was told that plain text will do, or is on loopback; `secure.rs` says what certificates
//!   are to be like. One that finds its address out when it starts is held to the same then.
//! - Nothing here asks the network: names in `JOIN` are looked up by the node, once it runs.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::address;
use super::founding::agree::JOIN_MAX;
use super::founding::drive::node_url;
use super::founding::wire::{Token, is_name};
use super::secure;
use crate::client::{Secret, TlsFiles};
use crate::config::{AutoCompactionMode, BackupConfig, Config, Url, Where, parse_duration, shown_place, without_user};
use crate::error::{Error, Result};

/// Where the peers and the clients of a node's server connect, unless told otherwise.
pub const CLIENT_PORT: u16 = 5706;
/// See [`CLIENT_PORT`].
pub const PEER_PORT: u16 = 5707;

/// The port of an external etcd, unless told otherwise.
const ETCD_PORT: u16 = 2379;

/// The largest file with a token. Beyond it is refused: it is some other file.
const TOKEN_BYTES_MAX: u64 = 4096;

/// How many revisions of history a node's server keeps, unless told otherwise: enough for a watch to go on after a change of servers.
const REVISIONS_KEPT: &str = "1000";

/// The shortest time after which a file or the environment may have a server replaced: it may have to be started again, with its machine.
pub const REPLACE_AFTER_MIN: Duration = Duration::from_secs(30);

/// Where the store is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Backend {
    /// In the nodes themselves.
    #[default]
    Embedded,
    /// In an etcd elsewhere.
    Etcd,
}

/// How many servers a cluster has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Servers {
    /// Three if the JOIN list has as many entries, otherwise one.
    #[default]
    Auto,
    /// One.
    One,
    /// Three.
    Three,
}

/// What a node is told. See the [module](self); a program may set the fields itself.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct EmbedConfig {
    /// Where the store is.
    pub backend: Backend,
    /// Where the external etcd is, one URL for each server.
    pub addr: Vec<Url>,
    /// The nodes that may found the cluster, `host[:port]`.
    pub join: Vec<String>,
    /// How many servers there are to be.
    pub servers: Servers,
    /// The address of this node. `None`: that from which it reaches the others, which it finds out when it starts.
    pub advertise_ip: Option<IpAddr>,
    /// Where a server's clients connect.
    pub client_port: u16,
    /// Where the other nodes connect.
    pub peer_port: u16,
    /// This node's name.
    pub hostname: String,
    /// What the node remembers, and a server's data. Made for this user alone if it is missing.
    pub data_dir: PathBuf,
    /// The secret that all nodes share.
    pub token: Token,
    /// How long [`Node::start`](super::Node::start) may wait for other nodes.
    pub start_timeout: Duration,
    /// How long a node that is enlisted to be a server may take to come, or make no progress, before it is put out again; see
    /// [`members`](super::members). That of the server that leads counts.
    pub enlist_timeout: Duration,
    /// How long a server may not be heard of before a client takes its place by itself; see [`members`](super::members). `None`: however long,
    /// it is left to people. That of the server that leads counts, and a client that has none is found by its `JOIN` entry alone: give it to
    /// all nodes. Three minutes are a good one. Less than [`REPLACE_AFTER_MIN`] is for tests: a server that is started again would be replaced.
    pub replace_after: Option<Duration>,
    /// What nodes and their clients speak TLS with. None: in plain text.
    pub tls: TlsFiles,
    /// What the peer port speaks TLS with, where that is something else.
    pub peer_tls: TlsFiles,
    /// Whether plain text will do: needed where there are no certificates, but not on loopback.
    pub plaintext: bool,
    /// What an external etcd is spoken to with, at `https` URLs.
    pub etcd_tls: TlsFiles,
    /// The user at an external etcd. Empty: nobody.
    pub username: String,
    /// Its password.
    pub password: Secret,
    /// What goes before every key of [`Node::client`](super::Node::client), whatever the backend.
    pub namespace: String,
    /// Where to tell how the node is. `None`: nowhere.
    pub health_port: Option<u16>,
    /// Where backups go, and when the server that leads makes them. The same on all nodes. `None`: there are none.
    pub backup: Option<BackupConfig>,
    /// Limits and times of this node's server, should it be one. Names, addresses, directories (also `wal_dir`), members and the files of
    /// certificates are set by the node. The default differs from [`Config::default`] in that history is compacted: a thousand revisions are
    /// kept. The quota is the server's own, and space is given back without being asked for: defragmentation is nothing to be scheduled.
    pub server: Config,
}

impl Default for EmbedConfig {
    fn default() -> Self {
        EmbedConfig {
            backend: Backend::Embedded,
            addr: Vec::new(),
            join: Vec::new(),
            servers: Servers::Auto,
            advertise_ip: None,
            client_port: CLIENT_PORT,
            peer_port: PEER_PORT,
            hostname: "node".into(),
            data_dir: "/var/lib/quorate".into(),
            token: Token::default(),
            start_timeout: Duration::from_secs(60),
            enlist_timeout: Duration::from_secs(300),
            replace_after: None,
            tls: TlsFiles::default(),
            peer_tls: TlsFiles::default(),
            plaintext: false,
            etcd_tls: TlsFiles::default(),
            username: String::new(),
            password: Secret::default(),
            namespace: String::new(),
            health_port: None,
            backup: None,
            server: Config {
                auto_compaction_mode: AutoCompactionMode::Revision,
                auto_compaction_retention: REVISIONS_KEPT.into(),
                ..Config::default()
            },
        }
    }
}

/// A setting's reader. The error says what would be right.
type Set = fn(&mut EmbedConfig, &str) -> std::result::Result<(), String>;

/// Every setting: its variable, other names of that, whether it is secret, and what reads it.
#[rustfmt::skip]
const SETTINGS: &[(&str, &[&str], bool, Set)] = &[
    ("KV_BACKEND", &[], false, |config, text| {
        config.backend = match text {
            "embedded" => Backend::Embedded,
            "etcd" => Backend::Etcd,
            _ => return Err("it must be embedded or etcd".into()),
        };
        Ok(())
    }),
    ("KV_ADDR", &["ETCD_ENDPOINTS"], false, |config, text| {
        config.addr = text.split(',').map(|part| etcd_url(part.trim())).collect::<Result<_, _>>()?;
        Ok(())
    }),
    ("JOIN", &[], false, |config, text| {
        config.join = text.split(',').map(|part| part.trim().to_owned()).collect();
        Ok(())
    }),
    ("KV_SERVERS", &[], false, |config, text| {
        config.servers = match text {
            "auto" => Servers::Auto,
            "1" => Servers::One,
            "3" => Servers::Three,
            _ => return Err("it must be 1, 3 or auto".into()),
        };
        Ok(())
    }),
    ("ADVERTISE_IP", &[], false, |config, text| {
        config.advertise_ip = Some(text.parse().map_err(|_| "it must be an IP address")?);
        Ok(())
    }),
    ("KV_CLIENT_PORT", &[], false, |config, text| { config.client_port = port(text)?; Ok(()) }),
    ("KV_PEER_PORT", &[], false, |config, text| { config.peer_port = port(text)?; Ok(()) }),
    ("HOSTNAME", &[], false, |config, text| { config.hostname = text.to_owned(); Ok(()) }),
    ("KV_DATA_DIR", &[], false, |config, text| { config.data_dir = text.into(); Ok(()) }),
    ("KV_TOKEN", &[], true, |config, text| { config.token = read_token(text.as_bytes())?; Ok(()) }),
    ("KV_TOKEN_FILE", &[], false, |config, text| { config.token = read_token_file(Path::new(text))?; Ok(()) }),
    ("KV_START_TIMEOUT", &[], false, |config, text| { config.start_timeout = parse_duration(text)?; Ok(()) }),
    ("KV_ENLIST_TIMEOUT", &[], false, |config, text| { config.enlist_timeout = parse_duration(text)?; Ok(()) }),
    ("KV_REPLACE_AFTER", &[], false, |config, text| { config.replace_after = replace_after(text)?; Ok(()) }),
    ("KV_TLS_CA", &[], false, |config, text| { config.tls.ca = Some(text.into()); Ok(()) }),
    ("KV_TLS_CERT", &[], false, |config, text| { config.tls.cert = Some(text.into()); Ok(()) }),
    ("KV_TLS_KEY", &[], false, |config, text| { config.tls.key = Some(text.into()); Ok(()) }),
    ("KV_PEER_TLS_CA", &[], false, |config, text| { config.peer_tls.ca = Some(text.into()); Ok(()) }),
    ("KV_PEER_TLS_CERT", &[], false, |config, text| { config.peer_tls.cert = Some(text.into()); Ok(()) }),
    ("KV_PEER_TLS_KEY", &[], false, |config, text| { config.peer_tls.key = Some(text.into()); Ok(()) }),
    ("KV_PLAINTEXT", &[], false, |config, text| {
        config.plaintext = text.parse().map_err(|_| "it must be true or false")?;
        Ok(())
    }),
    ("TLS_ETCD_CA", &["ETCD_TLS_CLIENT_CA"], false, |config, text| { config.etcd_tls.ca = Some(text.into()); Ok(()) }),
    ("TLS_ETCD_CLIENT_CERT", &["ETCD_TLS_CLIENT_CERT"], false, |config, text| { config.etcd_tls.cert = Some(text.into()); Ok(()) }),
    ("TLS_ETCD_CLIENT_KEY", &["ETCD_TLS_CLIENT_KEY"], false, |config, text| { config.etcd_tls.key = Some(text.into()); Ok(()) }),
    ("ETCD_USERNAME", &[], false, |config, text| { config.username = text.to_owned(); Ok(()) }),
    ("ETCD_PASSWORD", &[], true, |config, text| { config.password = Secret::new(text); Ok(()) }),
    ("KV_HEALTH_PORT", &[], false, |config, text| { config.health_port = Some(port(text)?); Ok(()) }),
    ("KV_BACKUP_STORE", &[], false, |config, text| { backup(config).dir = text.into(); Ok(()) }),
    ("KV_BACKUP_SCHEDULE", &[], false, |config, text| { backup(config).schedule = Some(text.to_owned()); Ok(()) }),
    ("KV_BACKUP_KEEP", &[], false, |config, text| {
        backup(config).keep = text.parse().map_err(|_| "it must be a number of backups; 0 keeps all")?;
        Ok(())
    }),
    ("KV_BACKUP_JITTER", &[], false, |config, text| { backup(config).jitter = parse_duration(text)?; Ok(()) }),
    ("ETCD_NAMESPACE", &[], false, |config, text| { config.namespace = text.to_owned(); Ok(()) }),
];

/// The variable that names the file.
const CONFIG_FILE: &str = "KV_CONFIG_FILE";

impl EmbedConfig {
    /// From the variables of this process, and the file that `KV_CONFIG_FILE` names, if it does. Validated.
    ///
    /// # Errors
    /// [`Error::Config`] for the first thing that is wrong.
    pub fn from_env() -> Result<EmbedConfig> {
        let utf8 = |(name, value): (std::ffi::OsString, std::ffi::OsString)| {
            let name = name.into_string().ok()?;
            // What is not text would be refused below, by name; a variable that is not ours may be anything.
            find(&name).map(|_| (name, value.to_string_lossy().into_owned()))
        };
        let file = std::env::var_os(CONFIG_FILE).filter(|path| !path.is_empty());
        let file = file.map(|path| (CONFIG_FILE.to_owned(), path.to_string_lossy().into_owned()));
        EmbedConfig::from_vars(std::env::vars_os().filter_map(utf8).chain(file))
    }

    /// From variables that are given. See [`from_env`](Self::from_env).
    ///
    /// # Errors
    /// [`Error::Config`] for the first thing that is wrong.
    pub fn from_vars(vars: impl IntoIterator<Item = (String, String)>) -> Result<EmbedConfig> {
        let mut vars: Vec<(String, String)> = vars.into_iter().filter(|(_, value)| !value.is_empty()).collect();
        // Other names first, so that the first one counts.
        vars.sort_by_key(|(name, _)| find(name).is_some_and(|(first, ..)| *first == name.as_str()));
        let mut config = EmbedConfig::default();
        if let Some((_, path)) = vars.iter().find(|(name, _)| name == CONFIG_FILE) {
            config.read_file(Path::new(path))?;
        }
        one_token(vars.iter().map(|(name, _)| name.as_str()))?;
        for (name, value) in &vars {
            if let Some(setting) = find(name) {
                config.set(setting, name, value)?;
            }
        }
        config.validate()?;
        Ok(config)
    }

    /// From a file, in YAML or JSON: `kv-backend: embedded`. Validated.
    ///
    /// # Errors
    /// [`Error::Config`] for the first thing that is wrong, such as a key that there is not.
    pub fn from_file(path: impl AsRef<Path>) -> Result<EmbedConfig> {
        let mut config = EmbedConfig::default();
        config.read_file(path.as_ref())?;
        config.validate()?;
        Ok(config)
    }

    #[cfg(feature = "cli")]
    fn read_file(&mut self, path: &Path) -> Result<()> {
        let about = |why: &dyn std::fmt::Display| Error::Config(format!("{} cannot be used as configuration file: {why}", path.display()));
        let bytes = crate::cli::read_config_file(path).map_err(|err| about(&err))?;
        let text = String::from_utf8(bytes).map_err(|_| about(&"it is not UTF-8"))?;
        self.read_text(&text).map_err(|err| match err {
            Error::Config(why) => Error::Config(format!("{why} (in {})", path.display())),
            other => other,
        })
    }

    #[cfg(not(feature = "cli"))]
    fn read_file(&mut self, path: &Path) -> Result<()> {
        Err(Error::Config(format!("{} cannot be read: files need the feature cli", path.display())))
    }

    #[cfg(feature = "cli")]
    fn read_text(&mut self, text: &str) -> Result<()> {
        let (mut seen, mut given) = (std::collections::BTreeSet::new(), Vec::new());
        for (key, value) in crate::cli::plain_entries(text)? {
            let name = key.to_ascii_uppercase().replace('-', "_");
            let Some(setting) = find(&name) else { return Err(Error::Config(format!("there is no setting {key:?}"))) };
            if !seen.insert(setting.0) {
                return Err(Error::Config(format!("{key} is there twice")));
            }
            if let Some(value) = value.filter(|value| !value.is_empty()) {
                given.push(setting.0);
                self.set(setting, &key, &value)?;
            }
        }
        one_token(given.into_iter())
    }

    fn set(&mut self, (_, _, is_secret, set): &(&str, &[&str], bool, Set), spelled: &str, value: &str) -> Result<()> {
        let shown = if *is_secret { "what it is".to_owned() } else { format!("{:?}", without_user(value)) };
        set(self, value).map_err(|right| Error::Config(format!("{spelled} is {shown}; {right}")))
    }

    /// Checks every setting by itself and against the others, and gives the JOIN list its one spelling.
    ///
    /// # Errors
    /// [`Error::Config`] for the first thing that is wrong.
    pub fn validate(&mut self) -> Result<()> {
        let wrong = |text: String| Err(Error::Config(text));
        if self.enlist_timeout.is_zero() {
            return wrong("KV_ENLIST_TIMEOUT is 0s; a node needs some time to start again and to fetch the data, such as 5m".into());
        }
        if self.replace_after.is_some_and(|after| after.is_zero()) {
            return wrong(
                "KV_REPLACE_AFTER is 0s; a server needs some time to be started again, such as 3m; leave it out for never".into(),
            );
        }
        if self.start_timeout.is_zero() {
            return wrong("KV_START_TIMEOUT is 0s; a start needs some time, such as 1m".into());
        }
        self.validate_backup()?;
        if self.backend == Backend::Etcd {
            if self.addr.is_empty() {
                return wrong("KV_ADDR is not set; with KV_BACKEND=etcd it must say where etcd is".into());
            }
            if self.replace_after.is_some() {
                return wrong("KV_REPLACE_AFTER is set, but KV_BACKEND is etcd: its members are its own business; unset it".into());
            }
            return secure::validate(self);
        }
        if !self.addr.is_empty() {
            return wrong("KV_ADDR is set, but KV_BACKEND is embedded; unset it, or set KV_BACKEND=etcd".into());
        }
        secure::validate(self)?;
        self.member().validate()?;
        if !is_name(&self.hostname) {
            let right = "it must be a text, not empty, without commas, equals signs and blanks around it";
            return wrong(format!("HOSTNAME is {:?}; {right}", self.hostname));
        }
        if self.client_port == self.peer_port {
            return wrong(format!("KV_CLIENT_PORT and KV_PEER_PORT are both {}; give another to one of them", self.peer_port));
        }
        if let Some(port) = self.health_port.filter(|port| [self.client_port, self.peer_port].contains(port)) {
            return wrong(format!("KV_HEALTH_PORT is {port}, and so is another port of the node; give another"));
        }
        if self.data_dir.as_os_str().is_empty() {
            return wrong("KV_DATA_DIR is empty; name a directory".into());
        }
        self.validate_join()
    }

    fn validate_backup(&self) -> Result<()> {
        let Some(backup) = &self.backup else { return Ok(()) };
        if backup.dir.as_os_str().is_empty() {
            return Err(Error::Config(
                "KV_BACKUP_STORE is not set; the other settings of backups need it: a directory, or a URL such as s3://bucket/prefix"
                    .into(),
            ));
        }
        if let Err(right) = Where::read(&backup.dir) {
            return Err(Error::Config(format!("KV_BACKUP_STORE is {:?}; {right}", shown_place(&backup.dir))));
        }
        if self.backend == Backend::Etcd {
            return Err(Error::Config(
                "KV_BACKUP_STORE is set, but KV_BACKEND is etcd: back that up with its own tools, and unset it".into(),
            ));
        }
        backup.validate()
    }

    /// The settings of this node's server, without all that the node sets.
    pub(super) fn member(&self) -> Config {
        let neutral = Config::default();
        let (client_transport_security, peer_transport_security) = secure::planes(self);
        Config {
            client_transport_security,
            peer_transport_security,
            name: neutral.name,
            // Any, so that what is derived from the name is not looked at.
            data_dir: Some(self.data_dir.clone()),
            wal_dir: None,
            listen_client_urls: Vec::new(),
            advertise_client_urls: Vec::new(),
            listen_peer_urls: Vec::new(),
            initial_advertise_peer_urls: Vec::new(),
            initial_cluster: String::new(),
            initial_cluster_token: neutral.initial_cluster_token,
            initial_cluster_state: neutral.initial_cluster_state,
            ..self.server.clone()
        }
    }

    fn validate_join(&mut self) -> Result<()> {
        let wrong = |text: String| Err(Error::Config(text));
        if self.join.iter().all(|entry| entry.trim().is_empty()) {
            let right = "it must name the nodes that may found the cluster, also if it is this one alone: JOIN=$ADVERTISE_IP";
            return wrong(format!("JOIN is blank; {right}"));
        }
        if self.join.len() > JOIN_MAX {
            return wrong(format!("JOIN has {} entries; it may have {JOIN_MAX}, and three or five are enough", self.join.len()));
        }
        let mut join: Vec<String> = Vec::new();
        for entry in &self.join {
            let one = address(entry, self.peer_port).map_err(|why| Error::Config(format!("JOIN has {:?}; {why}", without_user(entry))))?;
            if join.contains(&one) {
                return wrong(format!("JOIN has {one} twice; leave one"));
            }
            join.push(one);
        }
        self.join = join;
        if self.servers == Servers::Three && self.join.len() < 3 {
            return wrong(format!("KV_SERVERS is 3, but JOIN has {} entries; name three or more", self.join.len()));
        }
        match self.known_ip() {
            Some(own) => self.check_ip(own),
            // The node looks at it when it has found it out.
            None => Ok(()),
        }
    }

    /// Whether this address of the node, and those of the list, can be meant together.
    pub(super) fn check_ip(&self, own: IpAddr) -> Result<()> {
        let wrong = |text: String| Err(Error::Config(text));
        if own.is_unspecified() {
            return wrong(format!("ADVERTISE_IP is {own}; it must be the one address at which others reach this node"));
        }
        for entry in &self.join {
            let is_loopback = self.is_loopback(entry);
            if is_loopback != own.is_loopback() {
                let (named, why) = if is_loopback {
                    (entry.as_str(), "every node is that to itself, and would found a cluster of its own")
                } else {
                    ("ADVERTISE_IP", "no other node can reach that")
                };
                let right = "use addresses at which the nodes reach each other, or loopback addresses alone for nodes of one machine";
                return wrong(format!("JOIN has {entry} and ADVERTISE_IP is {own}: {named} is a loopback address, and {why}; {right}"));
            }
        }
        if !own.is_loopback() && !self.is_tls() && !self.plaintext {
            let right = "set KV_TLS_CA, KV_TLS_CERT and KV_TLS_KEY, or KV_PLAINTEXT=true where the network is to be trusted";
            return wrong(format!(
                "the nodes would speak in plain text, for KV_TLS_CA is not set and this node's address is {own}; {right}"
            ));
        }
        Ok(())
    }

    fn is_loopback(&self, entry: &str) -> bool {
        let host = entry.rsplit_once(':').map_or(entry, |(host, _)| host).trim_matches(['[', ']']);
        host.eq_ignore_ascii_case("localhost") || host.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
    }

    /// Whether this node speaks TLS with the others, and its server with its clients.
    pub fn is_tls(&self) -> bool {
        !self.tls.is_empty()
    }

    /// How many servers the cluster is to have.
    pub fn founders(&self) -> usize {
        match self.servers {
            Servers::One => 1,
            Servers::Three => 3,
            Servers::Auto => {
                if self.join.len() >= 3 {
                    3
                } else {
                    1
                }
            }
        }
    }

    /// The address of this node: as set, or that from which it would send to the first address in the JOIN list. Nothing is sent, and no name
    /// is looked up; a node that knows only names finds its address out when it starts.
    ///
    /// # Errors
    /// [`Error::Config`] when that cannot be told.
    pub fn advertised_ip(&self) -> Result<IpAddr> {
        let unknown = || Error::Config("ADVERTISE_IP is not set, and cannot be told from JOIN; set it to this node's address".into());
        self.known_ip().ok_or_else(unknown)
    }

    fn known_ip(&self) -> Option<IpAddr> {
        let address = |entry: &String| {
            let (host, port) = host_and_port(entry, self.peer_port).ok()?;
            let ip = if host == "localhost" { Some(Ipv4Addr::LOCALHOST.into()) } else { host.parse::<IpAddr>().ok() };
            Some(SocketAddr::new(ip?, port))
        };
        self.advertise_ip.or_else(|| self.join.iter().filter_map(address).find_map(address::towards))
    }

    /// Where other nodes reach this one.
    ///
    /// # Errors
    /// As [`advertised_ip`](Self::advertised_ip).
    pub fn peer_url(&self) -> Result<Url> {
        self.url(self.peer_port)
    }

    /// Where clients reach this node's server, if it is one.
    ///
    /// # Errors
    /// As [`advertised_ip`](Self::advertised_ip).
    pub fn client_url(&self) -> Result<Url> {
        self.url(self.client_port)
    }

    fn url(&self, port: u16) -> Result<Url> {
        node_url(&SocketAddr::new(self.advertised_ip()?, port).to_string(), self.is_tls()).parse()
    }
}

fn find(name: &str) -> Option<&'static (&'static str, &'static [&'static str], bool, Set)> {
    SETTINGS.iter().find(|(first, others, ..)| *first == name || others.contains(&name))
}

fn backup(config: &mut EmbedConfig) -> &mut BackupConfig {
    config.backup.get_or_insert_with(|| BackupConfig::new(""))
}

/// A time, or a number of seconds; 0 for never.
fn replace_after(text: &str) -> std::result::Result<Option<Duration>, String> {
    let right = || format!("it must be {REPLACE_AFTER_MIN:?} or more, such as 180 or 3m, or 0 for never");
    let after = match text.parse::<u32>() {
        Ok(seconds) => Duration::from_secs(seconds.into()),
        Err(_) => parse_duration(text).map_err(|_| right())?,
    };
    match after {
        Duration::ZERO => Ok(None),
        after if after < REPLACE_AFTER_MIN => Err(right()),
        after => Ok(Some(after)),
    }
}

fn port(text: &str) -> std::result::Result<u16, String> {
    text.parse().ok().filter(|port| *port != 0).ok_or_else(|| "it must be a port from 1 to 65535".into())
}

/// `host:port` of a node, in its one spelling.
pub(super) fn address(text: &str, default: u16) -> std::result::Result<String, String> {
    let (host, port) = host_and_port(text, default)?;
    Ok(if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") })
}

/// `host`, `host:port`, `[v6]`, `[v6]:port`, or a bare IPv6 address. Names in lower case, addresses in their one spelling.
fn host_and_port(text: &str, default: u16) -> std::result::Result<(String, u16), String> {
    let text = text.trim();
    if text.is_empty() {
        return Err("there is an empty entry".into());
    }
    if let Ok(ip) = text.parse::<IpAddr>() {
        return Ok((ip.to_string(), default));
    }
    let (host, port) = match text.rsplit_once(':') {
        Some((host, number)) if !number.ends_with(']') => (host, port(number)?),
        _ => (text, default),
    };
    if let Some(inside) = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')) {
        let ip: Ipv6Addr = inside.parse().map_err(|_| "in its brackets there is no IPv6 address")?;
        return Ok((ip.to_string(), port));
    }
    if let Ok(ip) = host.parse::<IpAddr>() {
        return Ok((ip.to_string(), port));
    }
    let fits = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '.' || c == '_';
    if host.is_empty() || !host.chars().all(fits) {
        return Err("it must be a host name or an IP address, with or without :port".into());
    }
    Ok((host.to_ascii_lowercase(), port))
}

fn etcd_url(text: &str) -> std::result::Result<Url, String> {
    let (scheme, rest) = match text.split_once("://") {
        Some((scheme @ ("http" | "https"), rest)) => (scheme, rest.strip_suffix('/').unwrap_or(rest)),
        Some((scheme, _)) => return Err(format!("{}:// is not spoken; use http:// or https://", without_user(scheme))),
        None => ("http", text),
    };
    let (host, port) = host_and_port(rest, ETCD_PORT)?;
    let host = if host.contains(':') { format!("[{host}]") } else { host };
    crate::config::parse_url(&format!("{scheme}://{host}:{port}"))
}

/// A token is told once: of two, one would be used and the other be thought to be.
fn one_token<'a>(mut given: impl Iterator<Item = &'a str>) -> Result<()> {
    let both = given.try_fold(None, |before, name| match name {
        "KV_TOKEN" | "KV_TOKEN_FILE" if before.is_some_and(|before| before != name) => Err(()),
        "KV_TOKEN" | "KV_TOKEN_FILE" => Ok(Some(name)),
        _ => Ok(before),
    });
    both.map(drop).map_err(|()| Error::Config("KV_TOKEN and KV_TOKEN_FILE are both set; leave one".into()))
}

fn read_token_file(path: &Path) -> std::result::Result<Token, String> {
    use std::io::Read;
    let mut bytes = Vec::new();
    let file = std::fs::File::open(path).map_err(|err| format!("that cannot be opened: {err}"))?;
    file.take(TOKEN_BYTES_MAX + 1).read_to_end(&mut bytes).map_err(|err| format!("that cannot be read: {err}"))?;
    if bytes.len() as u64 > TOKEN_BYTES_MAX {
        return Err(format!("that is larger than {TOKEN_BYTES_MAX} bytes"));
    }
    read_token(&bytes)
}

/// Without the blanks around it: editors end a file with a line end, and a secret is the same wherever it is read from.
fn read_token(bytes: &[u8]) -> std::result::Result<Token, String> {
    let secret = bytes.trim_ascii();
    if secret.is_empty() { Err("that is blank".into()) } else { Ok(Token::new(secret)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn from(vars: &[(&str, &str)]) -> Result<EmbedConfig> {
        EmbedConfig::from_vars(vars.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())))
    }

    fn refused(vars: &[(&str, &str)]) -> String {
        from(vars).expect_err(&format!("{vars:?}")).to_string()
    }

    #[test]
    fn every_mistake_is_named() {
        let here = ("ADVERTISE_IP", "10.0.0.1");
        for (vars, want) in [
            (&[][..], "JOIN is blank"),
            (&[("JOIN", " , ")], "JOIN is blank"),
            (&[("JOIN", "10.0.0.1,,10.0.0.2"), here], "JOIN has \"\""),
            (&[("JOIN", "10.0.0.1,10.0.0.1:5707"), here], "JOIN has 10.0.0.1:5707 twice"),
            (&[("JOIN", "a/b"), here], "JOIN has \"a/b\""),
            (&[("JOIN", "a:0"), here], "JOIN has \"a:0\""),
            (&[("JOIN", "10.0.0.1,localhost"), here], "JOIN has localhost:5707 and ADVERTISE_IP is 10.0.0.1"),
            (&[("JOIN", "127.0.0.1"), here], "JOIN has 127.0.0.1:5707"),
            (&[("JOIN", "10.0.0.1"), ("ADVERTISE_IP", "127.0.0.1")], "ADVERTISE_IP is a loopback address"),
            (&[("JOIN", "10.0.0.1"), ("ADVERTISE_IP", "node")], "ADVERTISE_IP is \"node\""),
            (&[("JOIN", "10.0.0.1"), ("ADVERTISE_IP", "0.0.0.0")], "ADVERTISE_IP is 0.0.0.0"),
            (&[("JOIN", "10.0.0.1"), here, ("KV_SERVERS", "2")], "KV_SERVERS is \"2\""),
            (&[("JOIN", "10.0.0.1,b"), here, ("KV_SERVERS", "3")], "KV_SERVERS is 3, but JOIN has 2 entries"),
            (&[("KV_BACKEND", "Etcd")], "KV_BACKEND is \"Etcd\""),
            (&[("KV_BACKEND", "etcd")], "KV_ADDR is not set"),
            (&[("JOIN", "10.0.0.1"), here, ("KV_ADDR", "e")], "KV_ADDR is set, but KV_BACKEND is embedded"),
            (&[("KV_BACKEND", "etcd"), ("KV_ADDR", "ftp://e")], "KV_ADDR is \"ftp://e\"; ftp:// is not spoken"),
            // Nothing is spoken in plain text over a network that nobody was told of.
            (&[("JOIN", "10.0.0.1"), here], "address is 10.0.0.1; set KV_TLS_CA, KV_TLS_CERT and KV_TLS_KEY, or KV_PLAINTEXT=true"),
            (&[("JOIN", "10.0.0.1"), here, ("KV_PLAINTEXT", "false")], "the nodes would speak in plain text"),
            (&[("JOIN", "10.0.0.1"), here, ("KV_PLAINTEXT", "yes")], "KV_PLAINTEXT is \"yes\"; it must be true or false"),
            // One etcd.
            (&[("KV_BACKEND", "etcd"), ("KV_ADDR", "e"), ("ETCD_PASSWORD", "hunter2")], "ETCD_PASSWORD is set, and ETCD_USERNAME is not"),
            (&[("KV_BACKEND", "etcd"), ("KV_ADDR", "e"), ("ETCD_USERNAME", "root")], "ETCD_USERNAME is set, and ETCD_PASSWORD is not"),
            (&[("JOIN", "10.0.0.1"), here, ("ETCD_USERNAME", "root")], "ETCD_USERNAME is set, but KV_BACKEND is embedded"),
            (&[("JOIN", "10.0.0.1"), here, ("ETCD_PASSWORD", "hunter2")], "ETCD_PASSWORD is set, but KV_BACKEND is embedded"),
            // Nor is what stands before an @ shown.
            (&[("KV_BACKEND", "etcd"), ("KV_ADDR", "http://root:hunter2@etcd:2379")], "KV_ADDR is \"http://...@etcd:2379\""),
            (&[("KV_BACKEND", "etcd"), ("KV_ADDR", "root:hunter2@etcd")], "KV_ADDR is \"...@etcd\""),
            (&[("KV_BACKEND", "etcd"), ("KV_ADDR", "http://root:hun,ter2@etcd")], "KV_ADDR is \"http://...@etcd\""),
            (&[("KV_BACKEND", "etcd"), ("KV_ADDR", "hunter2@x://etcd")], "KV_ADDR is \"...@x://etcd\"; ...@x:// is not spoken"),
            (&[("JOIN", "root:hunter2@a"), here], "JOIN has \"...@a\""),
            (&[("JOIN", "10.0.0.1"), here, ("KV_PEER_PORT", "70000")], "KV_PEER_PORT is \"70000\""),
            (&[("JOIN", "10.0.0.1"), here, ("KV_PEER_PORT", "5706")], "KV_CLIENT_PORT and KV_PEER_PORT are both 5706"),
            (&[("JOIN", "10.0.0.1"), here, ("HOSTNAME", "a=b")], "HOSTNAME is \"a=b\""),
            (&[("JOIN", "10.0.0.1"), here, ("HOSTNAME", " a")], "HOSTNAME is \" a\""),
            (&[("JOIN", "10.0.0.1"), here, ("KV_START_TIMEOUT", "5")], "KV_START_TIMEOUT is \"5\""),
            (&[("JOIN", "10.0.0.1"), here, ("KV_START_TIMEOUT", "0s")], "KV_START_TIMEOUT is 0s"),
            (&[("JOIN", "10.0.0.1"), here, ("KV_HEALTH_PORT", "5706")], "KV_HEALTH_PORT is 5706, and so is another"),
            (&[("JOIN", "10.0.0.1"), here, ("KV_HEALTH_PORT", "0")], "KV_HEALTH_PORT is \"0\"; it must be a port"),
            (&[("JOIN", "10.0.0.1"), here, ("KV_BACKUP_SCHEDULE", "@daily")], "KV_BACKUP_STORE is not set"),
            (&[("JOIN", "10.0.0.1"), here, ("KV_BACKUP_STORE", "/b"), ("KV_BACKUP_SCHEDULE", "noon")], "\"noon\""),
            (
                &[("JOIN", "10.0.0.1"), here, ("KV_BACKUP_STORE", "/b"), ("KV_BACKUP_KEEP", "-1")],
                "KV_BACKUP_KEEP is \"-1\"; it must be a number",
            ),
            (&[("JOIN", "10.0.0.1"), here, ("KV_BACKUP_STORE", "/b"), ("KV_BACKUP_JITTER", "5")], "KV_BACKUP_JITTER is \"5\""),
            (
                &[("JOIN", "10.0.0.1"), here, ("KV_BACKUP_STORE", "s3://key:hunter2@bucket")],
                "KV_BACKUP_STORE is \"s3://...@bucket\"; it must be a URL without a user",
            ),
            (&[("KV_BACKEND", "etcd"), ("KV_ADDR", "e"), ("KV_BACKUP_STORE", "/b")], "KV_BACKUP_STORE is set, but KV_BACKEND is etcd"),
            (&[("JOIN", "10.0.0.1"), here, ("KV_ENLIST_TIMEOUT", "0s")], "KV_ENLIST_TIMEOUT is 0s"),
            (&[("JOIN", "10.0.0.1"), here, ("KV_REPLACE_AFTER", "29")], "KV_REPLACE_AFTER is \"29\"; it must be 30s or more, such as"),
            (&[("JOIN", "10.0.0.1"), here, ("KV_REPLACE_AFTER", "29.9s")], "KV_REPLACE_AFTER is \"29.9s\"; it must be 30s or more"),
            (&[("JOIN", "10.0.0.1"), here, ("KV_REPLACE_AFTER", "soon")], "KV_REPLACE_AFTER is \"soon\"; it must be 30s or more"),
            (&[("JOIN", "10.0.0.1"), here, ("KV_REPLACE_AFTER", "-60")], "KV_REPLACE_AFTER is \"-60\""),
            (&[("KV_BACKEND", "etcd"), ("KV_ADDR", "e"), ("KV_REPLACE_AFTER", "1")], "KV_REPLACE_AFTER is \"1\""),
            (
                &[("KV_BACKEND", "etcd"), ("KV_ADDR", "e"), ("KV_REPLACE_AFTER", "3m")],
                "KV_REPLACE_AFTER is set, but KV_BACKEND is etcd: its members are its own business",
            ),
            (&[("JOIN", "10.0.0.1"), here, ("KV_TOKEN", " ")], "KV_TOKEN is what it is; that is blank"),
            (&[("JOIN", "10.0.0.1"), here, ("KV_TOKEN", "hunter2"), ("KV_TOKEN_FILE", "t")], "KV_TOKEN and KV_TOKEN_FILE are both set"),
            (
                &[("JOIN", "10.0.0.1"), here, ("KV_TOKEN_FILE", "/nowhere/at/all")],
                "KV_TOKEN_FILE is \"/nowhere/at/all\"; that cannot be opened",
            ),
        ] {
            let got = refused(vars);
            assert!(got.contains(want), "{vars:?}: {got}, wanted {want}");
            assert!(!got.contains("hunter2"), "{got}");
        }
    }

    #[test]
    #[cfg(feature = "tls")]
    fn every_mistake_with_certificates_is_named() {
        let (join, here, etcd) = (("JOIN", "10.0.0.1"), ("ADVERTISE_IP", "10.0.0.1"), ("KV_BACKEND", "etcd"));
        let (ca, cert, key) = (("KV_TLS_CA", "ca"), ("KV_TLS_CERT", "cert"), ("KV_TLS_KEY", "key"));
        for (vars, want) in [
            (&[join, here, cert, key][..], "KV_TLS_CERT is set, and KV_TLS_CA is not; set KV_TLS_CA, KV_TLS_CERT and KV_TLS_KEY, or none"),
            (&[join, here, ca], "KV_TLS_CA is set, and KV_TLS_CERT is not"),
            (&[join, here, ca, cert], "KV_TLS_CA is set, and KV_TLS_KEY is not"),
            (&[join, here, ca, key], "KV_TLS_CA is set, and KV_TLS_CERT is not"),
            (&[("JOIN", "127.0.0.1"), key], "KV_TLS_KEY is set, and KV_TLS_CA is not"),
            (&[join, here, ca, cert, key, ("KV_PLAINTEXT", "true")], "KV_TLS_CA is set, and KV_PLAINTEXT is true; unset one"),
            (&[join, here, ("KV_PEER_TLS_CA", "x")], "KV_PEER_TLS_CA is set, and KV_TLS_CA is not"),
            (&[join, here, ca, cert, key, ("KV_PEER_TLS_CERT", "x")], "KV_PEER_TLS_CERT is set, and KV_PEER_TLS_KEY is not"),
            (&[join, here, ca, cert, key, ("KV_PEER_TLS_KEY", "x")], "KV_PEER_TLS_KEY is set, and KV_PEER_TLS_CERT is not"),
            (&[join, here, ca, cert, key, ("TLS_ETCD_CA", "x")], "TLS_ETCD_CA is set, but KV_BACKEND is embedded"),
            (&[etcd, ("KV_ADDR", "https://e")], "KV_ADDR has https://e:2379, and TLS_ETCD_CA is not set"),
            (&[etcd, ("KV_ADDR", "e"), ("TLS_ETCD_CA", "c")], "KV_ADDR has http://e:2379, and TLS_ETCD_CA is set; write https://e:2379"),
            (&[etcd, ("KV_ADDR", "https://e,http://f"), ("TLS_ETCD_CA", "c")], "KV_ADDR has http://f:2379, and TLS_ETCD_CA is set"),
            (
                &[etcd, ("KV_ADDR", "https://e"), ("ETCD_TLS_CLIENT_CERT", "c")],
                "TLS_ETCD_CLIENT_CERT is set, and TLS_ETCD_CLIENT_KEY is not",
            ),
            (&[etcd, ("KV_ADDR", "e"), ("TLS_ETCD_CLIENT_KEY", "c")], "TLS_ETCD_CLIENT_KEY is set, and TLS_ETCD_CLIENT_CERT is not"),
            (
                &[etcd, ("KV_ADDR", "e"), ("TLS_ETCD_CLIENT_CERT", "c"), ("TLS_ETCD_CLIENT_KEY", "k")],
                "TLS_ETCD_CLIENT_CERT is set, and TLS_ETCD_CA is not",
            ),
        ] {
            let got = refused(vars);
            assert!(got.contains(want), "{vars:?}: {got}, wanted {want}");
        }
        // All of them; what is not said for the peers is as for clients.
        let all = [join, here, ca, cert, key, ("KV_PEER_TLS_CA", "peers-ca")];
        let mut config = from(&all).unwrap();
        assert_eq!(config.peer_url().unwrap().to_string(), "https://10.0.0.1:5707");
        let member = config.member();
        let files = |plane: &crate::config::TransportSecurity| {
            let files = [&plane.trusted_ca_file, &plane.cert_file, &plane.key_file];
            files.map(|file| file.as_ref().unwrap().to_str().unwrap().to_owned())
        };
        assert_eq!(files(&member.client_transport_security), ["ca", "cert", "key"]);
        assert_eq!(files(&member.peer_transport_security), ["peers-ca", "cert", "key"]);
        assert!(member.client_transport_security.client_cert_auth && member.peer_transport_security.client_cert_auth);
        config.tls.key = Some("".into());
        assert!(config.validate().unwrap_err().to_string().contains("KV_TLS_KEY is empty"));
        // On loopback, and where it is said, it goes without.
        from(&[("JOIN", "127.0.0.1")]).unwrap();
        let plain = from(&[join, here, ("KV_PLAINTEXT", "true")]).unwrap();
        assert!(!plain.is_tls() && plain.member().peer_transport_security.cert_file.is_none());
        let vars = [etcd, ("KV_ADDR", "https://e"), ("TLS_ETCD_CA", "c"), ("ETCD_USERNAME", "root"), ("ETCD_PASSWORD", "hunter2")];
        let config = from(&vars).unwrap();
        assert_eq!((config.username.as_str(), config.password.reveal(), config.is_tls()), ("root", "hunter2", false));
    }

    #[test]
    fn what_is_right_is_read() {
        let from = |vars: &[(&str, &str)]| from(&[vars, &[("KV_PLAINTEXT", "true")]].concat());
        let config = from(&[("JOIN", "10.0.0.3, Node-B:1 ,[fd00::0:1]"), ("ADVERTISE_IP", "10.0.0.1"), ("KV_PEER_PORT", "7")]).unwrap();
        assert_eq!(config.join, ["10.0.0.3:7", "node-b:1", "[fd00::1]:7"]);
        assert_eq!((config.founders(), config.peer_url().unwrap().to_string()), (3, "http://10.0.0.1:7".into()));
        assert_eq!(from(&[("JOIN", "10.0.0.1,b"), ("ADVERTISE_IP", "10.0.0.1")]).unwrap().founders(), 1);
        assert_eq!(from(&[("JOIN", "a,b,c"), ("ADVERTISE_IP", "10.0.0.1"), ("KV_SERVERS", "1")]).unwrap().founders(), 1);
        // Nodes of one machine; and the address found out.
        from(&[("JOIN", "127.0.0.1,127.0.0.2,127.0.0.1:8"), ("ADVERTISE_IP", "127.0.0.2")]).unwrap();
        assert_eq!(from(&[("JOIN", "127.0.0.1")]).unwrap().advertised_ip().unwrap(), IpAddr::from([127, 0, 0, 1]));
        // Names are not looked up here, not even one that there is: the node does that.
        let named = from(&[("JOIN", "localhost.,node-b")]).unwrap();
        assert!(named.advertise_ip.is_none() && matches!(named.advertised_ip(), Err(Error::Config(_))));
        let addr = "a, http://b:1,http://[::1],fd00::2,http://c/";
        let config = from(&[("KV_BACKEND", "etcd"), ("KV_ADDR", addr)]).unwrap();
        let urls: Vec<String> = config.addr.iter().map(Url::to_string).collect();
        assert_eq!(urls, ["http://a:2379", "http://b:1", "http://[::1]:2379", "http://[fd00::2]:2379", "http://c:2379"]);
        // The first name counts.
        let vars = [("KV_ADDR", "first"), ("ETCD_ENDPOINTS", "second"), ("KV_BACKEND", "etcd")];
        assert_eq!(from(&vars).unwrap().addr[0].to_string(), "http://first:2379");
        // Backups and health are off, unless asked for.
        assert_eq!((config.backup, config.health_port), (None, None));
        let vars =
            [("KV_BACKUP_KEEP", "14"), ("KV_BACKUP_SCHEDULE", "0 */12 * * *"), ("KV_BACKUP_STORE", "/b"), ("KV_BACKUP_JITTER", "1m")];
        let config =
            from(&[&[("JOIN", "10.0.0.1"), ("ADVERTISE_IP", "10.0.0.1"), ("KV_HEALTH_PORT", "5708")][..], &vars[..]].concat()).unwrap();
        let backup = config.backup.unwrap();
        assert_eq!((backup.dir.to_str(), backup.schedule.as_deref(), backup.keep), (Some("/b"), Some("0 */12 * * *"), 14));
        assert_eq!((backup.jitter, config.health_port), (Duration::from_secs(60), Some(5708)));
        // Nobody is replaced unless asked for, in seconds or as a time.
        let after = |text| from(&[("JOIN", "10.0.0.1"), ("ADVERTISE_IP", "10.0.0.1"), ("KV_REPLACE_AFTER", text)]).unwrap().replace_after;
        for (text, seconds) in
            [("", None), ("0", None), ("0s", None), ("30", Some(30)), ("180", Some(180)), ("3m", Some(180)), ("1h", Some(3600))]
        {
            assert_eq!(after(text), seconds.map(Duration::from_secs), "{text}");
        }
        let mut config = from(&[("JOIN", "127.0.0.1")]).unwrap();
        config.replace_after = Some(Duration::from_secs(2));
        config.validate().unwrap();
        config.replace_after = Some(Duration::ZERO);
        assert!(config.validate().unwrap_err().to_string().contains("KV_REPLACE_AFTER is 0s"));
        // A secret is the same from wherever.
        let token = |name, text| from(&[("JOIN", "10.0.0.1"), ("ADVERTISE_IP", "10.0.0.1"), (name, text)]).unwrap().token;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("token");
        std::fs::write(&path, " hunter2\n").unwrap();
        assert!(token("KV_TOKEN", "hunter2 ") == token("KV_TOKEN_FILE", path.to_str().unwrap()));
    }

    /// Before anything is founded with it, and it is too late.
    #[test]
    fn the_servers_settings_are_looked_at() {
        let mut config = from(&[("JOIN", "127.0.0.1")]).unwrap();
        // A node looks after its history.
        assert_eq!(config.server.auto_compaction().unwrap(), Some(crate::config::AutoCompaction::Revision(1000)));
        config.server.heartbeat_interval_ms = 500;
        let got = config.validate().unwrap_err().to_string();
        assert!(got.contains("election-timeout"), "{got}");
        config.server = Config::default();
        // What the node sets is not looked at, for it does not count.
        config.server.listen_peer_urls = vec!["https://10.0.0.1:1".parse().unwrap()];
        (config.server.name, config.server.wal_dir) = ("a=b".into(), Some("elsewhere".into()));
        config.validate().unwrap();
        assert_eq!(config.member().wal_dir, None);
    }

    #[test]
    fn secrets_are_not_shown() {
        let vars = [("JOIN", "127.0.0.1"), ("KV_TOKEN", "hunter2")];
        let config = from(&vars).unwrap();
        assert!(config.token.is_set() && !format!("{config:?}").contains("hunter2"), "{config:?}");
        let config = EmbedConfig { password: Secret::new("hunter2"), ..config };
        assert!(config.password.reveal() == "hunter2" && !format!("{config:?}").contains("hunter2"), "{config:?}");
    }

    #[cfg(feature = "cli")]
    #[test]
    fn a_file_says_the_same() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("kv.yml");
        let write = |text: &str| std::fs::write(&path, text).unwrap();
        write(
            "join: [127.0.0.1, 127.0.0.2, 127.0.0.3]\nadvertise-ip: 127.0.0.2\nkv-peer-port: 7\nKV_TOKEN: hunter2\nkv-servers:\nkv-replace-after: 90\n",
        );
        let file = EmbedConfig::from_file(&path).unwrap();
        assert_eq!(file.replace_after, Some(Duration::from_secs(90)));
        let list = "127.0.0.1,127.0.0.2,127.0.0.3";
        let vars =
            [("JOIN", list), ("ADVERTISE_IP", "127.0.0.2"), ("KV_PEER_PORT", "7"), ("KV_TOKEN", "hunter2"), ("KV_REPLACE_AFTER", "90s")];
        assert_eq!(file, from(&vars).unwrap());
        // A variable beats it.
        let both = from(&[("KV_CONFIG_FILE", path.to_str().unwrap()), ("KV_PEER_PORT", "8")]).unwrap();
        assert_eq!((both.peer_port, both.advertise_ip), (8, file.advertise_ip));
        for (text, want) in [
            ("joyn: a", "there is no setting \"joyn\""),
            ("join: a\nJOIN: b", "is there twice"),
            ("kv-servers: 2", "kv-servers is \"2\""),
            ("join: {a: b}", "join"),
            ("[", "not YAML"),
        ] {
            write(text);
            let got = EmbedConfig::from_file(&path).unwrap_err().to_string();
            assert!(got.contains(want) && got.contains("kv.yml"), "{got}, wanted {want}");
        }
    }
}
