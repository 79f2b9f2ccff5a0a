//! How a node speaks with others: in TLS with certificates on both sides, or in plain text, which it has to be told; and who it is to an
//! external etcd.
//!
//! ```text
//! KV_TLS_CA, KV_TLS_CERT, KV_TLS_KEY     every port of the node is https; who connects shows a certificate, and so does the node itself
//! KV_PEER_TLS_CA, ..._CERT, ..._KEY      others for the peer port, which founds the cluster and carries its data; default: the same
//! KV_PLAINTEXT=true                      no certificates, on a network that is to be trusted
//! none of them                           loopback alone
//!
//! TLS_ETCD_CA, ETCD_USERNAME, ...        for an external etcd, and only for that
//! ```
//!
//! A certificate is made out to where it is called: to the address of its node (`ADVERTISE_IP`), by which the nodes know each other, and to
//! the names and addresses by which the node stands in `JOIN`, each as a subject alternative name. On the peer plane it has to come from
//! there, too, unless it is made out to `*.` something, or to nobody. It serves and calls, so it is good for both.
//!
//! # Invariants
//! - A node with certificates speaks to no other node in plain text, and hears none; nor does it go on with a cluster that was founded in
//!   plain text, nor one without certificates with one that was founded in TLS.
//! - Files are read when the node starts, before anything else is done, and again when they change. Complaints name the variable.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use super::config::{Backend, EmbedConfig};
use super::founding::agree::State;
use super::founding::drive::CONNECT_TIMEOUT;
use crate::client::{Lines, RemoteOptions, TlsFiles};
use crate::config::tls::FileNames;
use crate::config::{TransportSecurity, Url};
use crate::error::{Error, Result};
use crate::tls::{self, Acceptor};

const NODES: FileNames = FileNames { ca: "KV_TLS_CA", cert: "KV_TLS_CERT", key: "KV_TLS_KEY" };
const PEERS: FileNames = FileNames { ca: "KV_PEER_TLS_CA", cert: "KV_PEER_TLS_CERT", key: "KV_PEER_TLS_KEY" };
const ETCD: FileNames = FileNames { ca: "TLS_ETCD_CA", cert: "TLS_ETCD_CLIENT_CERT", key: "TLS_ETCD_CLIENT_KEY" };

/// What it takes that others speak TLS, and this node does not.
const HINT: &str = "this node needs KV_TLS_CA, KV_TLS_CERT and KV_TLS_KEY, too";

/// How long TCP may take to another node's peer port. What comes after it, within [`CONNECT_TIMEOUT`], takes long only where a machine is busy.
const TCP_TIMEOUT: Duration = Duration::from_secs(1);

fn wrong<T>(what: String) -> Result<T> {
    Err(Error::Config(what))
}

/// The files that are set, with what they are called.
fn set(names: FileNames, files: &TlsFiles) -> impl Iterator<Item = (&'static str, &PathBuf)> {
    let all = [(names.ca, &files.ca), (names.cert, &files.cert), (names.key, &files.key)];
    all.into_iter().filter_map(|(name, file)| Some((name, file.as_ref()?)))
}

fn first(names: FileNames, files: &TlsFiles) -> Option<&'static str> {
    set(names, files).next().map(|(name, _)| name)
}

/// Checks that a certificate and its key are there, or none of them.
fn pair(names: FileNames, files: &TlsFiles) -> Result<()> {
    match (&files.cert, &files.key) {
        (Some(_), None) => wrong(format!("{} is set, and {} is not; they belong together", names.cert, names.key)),
        (None, Some(_)) => wrong(format!("{} is set, and {} is not; they belong together", names.key, names.cert)),
        _ => Ok(()),
    }
}

/// Whether what is said of certificates, plain text and users fits together. No file is read.
///
/// # Errors
/// `Config`, for the first thing that is wrong.
pub(super) fn validate(config: &EmbedConfig) -> Result<()> {
    let all = set(ETCD, &config.etcd_tls).chain(set(NODES, &config.tls)).chain(set(PEERS, &config.peer_tls));
    for (name, file) in all {
        if file.as_os_str().is_empty() {
            return wrong(format!("{name} is empty; name a file or leave it unset"));
        }
        if !cfg!(feature = "tls") {
            return wrong(format!("{name} is set, but this build has no TLS (the cargo feature `tls`)"));
        }
    }
    match config.backend {
        Backend::Etcd => validate_etcd(config),
        Backend::Embedded => validate_nodes(config),
    }
}

fn validate_etcd(config: &EmbedConfig) -> Result<()> {
    let files = &config.etcd_tls;
    pair(ETCD, files)?;
    let (plain, secure) = (config.addr.iter().find(|url| !url.is_tls()), config.addr.iter().find(|url| url.is_tls()));
    match (&files.ca, plain, secure) {
        (None, _, Some(url)) => {
            let right = "name the file of the CA that etcd's certificate is from";
            return wrong(format!("KV_ADDR has {url}, and TLS_ETCD_CA is not set; {right}"));
        }
        (None, ..) if files.cert.is_some() => {
            let right = "name the file of the CA that etcd's certificate is from, and write https:// in KV_ADDR";
            return wrong(format!("TLS_ETCD_CLIENT_CERT is set, and TLS_ETCD_CA is not; {right}"));
        }
        (Some(_), Some(url), _) => {
            let right = url.to_string().replacen("http", "https", 1);
            return wrong(format!("KV_ADDR has {url}, and TLS_ETCD_CA is set; write {right}, or unset TLS_ETCD_CA"));
        }
        _ => {}
    }
    let has_password = !config.password.reveal().is_empty();
    match (config.username.is_empty(), has_password) {
        (true, true) => wrong("ETCD_PASSWORD is set, and ETCD_USERNAME is not; nobody can log in with it alone".into()),
        (false, false) => wrong("ETCD_USERNAME is set, and ETCD_PASSWORD is not; nobody can log in without".into()),
        _ => Ok(()),
    }
}

fn validate_nodes(config: &EmbedConfig) -> Result<()> {
    if let Some(name) = first(ETCD, &config.etcd_tls) {
        let right = "unset it, or set KV_BACKEND=etcd; the nodes' own certificates are KV_TLS_CA, KV_TLS_CERT and KV_TLS_KEY";
        return wrong(format!("{name} is set, but KV_BACKEND is embedded; {right}"));
    }
    let has_password = !config.password.reveal().is_empty();
    for (is_set, name) in [(!config.username.is_empty(), "ETCD_USERNAME"), (has_password, "ETCD_PASSWORD")] {
        if is_set {
            return wrong(format!("{name} is set, but KV_BACKEND is embedded; unset it, or set KV_BACKEND=etcd: the nodes have no users"));
        }
    }
    let files = &config.tls;
    if let Some(name) = first(NODES, files) {
        for (missing, file) in [(NODES.ca, &files.ca), (NODES.cert, &files.cert), (NODES.key, &files.key)] {
            if file.is_none() {
                return wrong(format!("{name} is set, and {missing} is not; set KV_TLS_CA, KV_TLS_CERT and KV_TLS_KEY, or none of them"));
            }
        }
        if config.plaintext {
            return wrong(format!("{name} is set, and KV_PLAINTEXT is true; unset one of them"));
        }
    } else if let Some(name) = first(PEERS, &config.peer_tls) {
        let right = "set KV_TLS_CA, KV_TLS_CERT and KV_TLS_KEY, too: they count for clients, and for peers where nothing else is set";
        return wrong(format!("{name} is set, and KV_TLS_CA is not; {right}"));
    }
    pair(PEERS, &config.peer_tls)
}

/// What the peer plane speaks with: its own files, and otherwise those of the node.
fn of_peers(config: &EmbedConfig) -> TlsFiles {
    let (own, all) = (config.peer_tls.clone(), config.tls.clone());
    let (cert, key) = if own.cert.is_some() { (own.cert, own.key) } else { (all.cert, all.key) };
    TlsFiles { ca: own.ca.or(all.ca), cert, key }
}

/// The client and the peer plane of the node's server. What is not a file is as the host has set it.
pub(super) fn planes(config: &EmbedConfig) -> (TransportSecurity, TransportSecurity) {
    let plane = |files: TlsFiles, set: &TransportSecurity| TransportSecurity {
        client_cert_auth: files.ca.is_some(),
        cert_file: files.cert,
        key_file: files.key,
        trusted_ca_file: files.ca,
        client_cert_file: None,
        client_key_file: None,
        ..set.clone()
    };
    let server = &config.server;
    (plane(config.tls.clone(), &server.client_transport_security), plane(of_peers(config), &server.peer_transport_security))
}

/// What a node speaks with, once its files were read.
pub(super) struct Secure {
    /// To other nodes' peer ports.
    pub peers: Arc<Lines>,
    /// Of the node's own peer port, while it has no server.
    pub acceptor: Option<Acceptor>,
    /// As a client of the store; and the same for whoever calls one server of it.
    pub options: RemoteOptions,
    pub store: Lines,
}

impl Secure {
    /// Reads the files.
    ///
    /// # Errors
    /// `Config`: one is missing, cannot be read, or is not what it should be; the text names its variable.
    pub fn open(config: &EmbedConfig) -> Result<Secure> {
        let mut options = RemoteOptions::default();
        let names = match config.backend {
            Backend::Embedded => {
                options.tls = config.tls.clone();
                NODES
            }
            Backend::Etcd => {
                options.tls = config.etcd_tls.clone();
                (options.username, options.password) = (config.username.clone(), config.password.clone());
                let is_open = |url: &&Url| !url.is_tls() && !url.listen_ip().is_some_and(|ip| ip.is_loopback());
                if let Some(url) = config.addr.iter().find(is_open).filter(|_| !config.username.is_empty()) {
                    tracing::warn!(%url, "ETCD_PASSWORD is sent in plain text: with https:// in KV_ADDR and TLS_ETCD_CA it is not");
                }
                ETCD
            }
        };
        // By these names it is told what is wrong; the client opens them again by its own.
        let connector = if options.tls.is_empty() { None } else { Some(tls::connector(names, &options.tls)?) };
        let store = Lines::with(connector, &options);
        let (acceptor, connector) = match config.backend {
            Backend::Embedded if config.is_tls() => {
                let name = |own: &Option<PathBuf>, peer, node| if own.is_some() { peer } else { node };
                let own = &config.peer_tls;
                let ca = name(&own.ca, PEERS.ca, NODES.ca);
                let names = FileNames { ca, cert: name(&own.cert, PEERS.cert, NODES.cert), key: name(&own.key, PEERS.key, NODES.key) };
                let (acceptor, connector) = tls::peers(names, &config.member())?;
                (Some(acceptor), Some(connector))
            }
            _ => (None, None),
        };
        let peers = Lines::with(connector, &RemoteOptions::default()).limited(TCP_TIMEOUT, CONNECT_TIMEOUT).hinting(HINT);
        Ok(Secure { peers: Arc::new(peers), acceptor, options, store })
    }

    /// Whether nodes speak TLS with each other.
    pub fn is_tls(&self) -> bool {
        self.acceptor.is_some()
    }

    /// Whether the node can go on with what it remembers: a cluster keeps to what it was founded with.
    ///
    /// # Errors
    /// `Config`, when all that it knows of speak otherwise.
    pub fn check(&self, state: &State) -> Result<()> {
        let known = match state {
            State::Bound { known, .. } | State::Enlisted { known, .. } => &known.servers,
            State::Unbound(unbound) => match &unbound.accepted {
                Some((_, decision)) => &decision.founders,
                None => return Ok(()),
            },
            State::Removed { .. } => return Ok(()),
        };
        let Some(other) = known.first().filter(|_| known.iter().all(|server| speaks_tls(&server.peer_url) != self.is_tls())) else {
            return Ok(());
        };
        let url = &other.peer_url;
        if self.is_tls() {
            let right = "unset KV_TLS_CA, KV_TLS_CERT and KV_TLS_KEY, or found another cluster in empty directories";
            return wrong(format!(
                "KV_TLS_CA is set, but this node's cluster was founded in plain text ({url}), and keeps to that; {right}"
            ));
        }
        let right = "set KV_TLS_CA, KV_TLS_CERT and KV_TLS_KEY";
        wrong(format!("KV_TLS_CA is not set, but this node's cluster was founded in TLS ({url}), and keeps to that; {right}"))
    }
}

/// Whether a URL is one of TLS.
pub(super) fn speaks_tls(url: &str) -> bool {
    url.starts_with("https://")
}
