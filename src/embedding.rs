//! `quorate embed`: a node of the embedded mode by itself, so that one can be tried from a shell; and `quorate node`, which changes who the
//! servers are.
//!
//! It is told everything by variables (see [`quorate::embed::config`]; of the log, `LOG_LEVEL`, `LOG_FORMAT` and `KV_LOG_FILTER`), and does what a host
//! program does: it starts the node, tries again for as long as there is no cluster, and says in its log what role it has and whether the
//! store can be written, and since when. When the node is enlisted it is stopped and started again, in the same process: then it is a
//! server. Should it have come too late, it is started once more, as the client that it is then.
//!
//! It ends when it is asked to, and when its server has stopped by itself. Exit codes are those of the server.

use std::convert::Infallible;
use std::future::Future;
use std::pin::Pin;
use std::time::Duration;

use quorate::Error;
use quorate::cli::{LogConfig, LogFormat, LogLevel};
use quorate::embed::members::Order;
use quorate::embed::{EmbedConfig, Node};

/// How long to wait between two tries to start.
const RETRY: Duration = Duration::from_secs(1);

/// What `quorate embed --help` prints.
pub const HELP: &str = "Usage:\n\n  quorate embed\n    Run a node of the embedded mode. It is told everything by variables.\n\n\
  JOIN             the nodes that may found the cluster: host[:port],... The same on all nodes.\n\
  ADVERTISE_IP     the address of this node. Default: that from which it reaches the others.\n\
  HOSTNAME         its name. Default: node\n\
  KV_SERVERS       1, 3 or auto. Default: auto, three if JOIN has as many entries\n\
  KV_CLIENT_PORT   Default: 5706\n\
  KV_PEER_PORT     Default: 5707\n\
  KV_DATA_DIR      Default: /var/lib/quorate\n\
  KV_TOKEN, KV_TOKEN_FILE   a secret that all nodes share, itself or its file\n\
  KV_TLS_CA, KV_TLS_CERT, KV_TLS_KEY   files, read again when they change: whose certificates are good, this node's, its key\n\
  KV_PEER_TLS_CA, KV_PEER_TLS_CERT, KV_PEER_TLS_KEY   others for the peer port. Default: the same\n\
  KV_PLAINTEXT     true: plain text will do. Needed without certificates, but not on loopback\n\
  KV_START_TIMEOUT how long one try to start may take. Default: 1m; it is tried again\n\
  KV_HEALTH_PORT   serves /health, /livez, /readyz, /metrics and /v1/health. Default: none\n\
  KV_BACKUP_STORE  a directory for backups, which the nodes may share, or a URL such as s3://bucket/prefix. Default: none\n\
  KV_BACKUP_SCHEDULE   when the leader makes one: cron, in UTC, such as 0 */12 * * *\n\
  KV_BACKUP_KEEP, KV_BACKUP_JITTER   how many are kept, and the delay by chance. Default: 5, 5s\n\
  KV_ENLIST_TIMEOUT   how long a node that is to be a server, for which it starts again by itself, may make no progress. Default: 5m\n\
  KV_REPLACE_AFTER   seconds, or a time, after which a client takes the place of a server that is not heard of. Default: never\n\
  KV_BACKEND       embedded, or etcd with KV_ADDR=host[:port],... Default: embedded\n\
  TLS_ETCD_CA, TLS_ETCD_CLIENT_CERT, TLS_ETCD_CLIENT_KEY   for an etcd at https:// URLs\n\
  ETCD_USERNAME, ETCD_PASSWORD   the user to log in as at an etcd\n\
  ETCD_NAMESPACE   what goes before every key. Default: nothing\n\
  KV_CONFIG_FILE   a YAML file with the same settings, as join: and kv-data-dir:\n\
  LOG_LEVEL        debug, info, warn or error. Default: info\n\
  LOG_FORMAT       json or console. Default: json\n\
  KV_LOG_FILTER, LOG_FILTER  instead of LOG_LEVEL: levels by module, such as info,quorate::embed=debug\n";

/// What `quorate node --help` prints.
pub const NODE_HELP: &str = "Usage:\n\n  quorate node grow NODE...\n    Make servers of clients, so that there are three.\n\
  \n  quorate node replace SERVER NODE [--even-alive]\n    Make a server of a client, in the place of one that is dead, or of any one.\n\
  \n  quorate node remove SERVER\n    Remove a server. Of three that leaves two, and neither of them may fail: to replace one is better.\n\n\
  A NODE is host[:port] of its peer port, a SERVER the same, or its name or its id. A node that is to be a server is one when it is started\n\
  again, which `quorate embed` does by itself.\n\
  The cluster is looked for at JOIN, with KV_TOKEN or KV_TOKEN_FILE, as by `quorate embed`.\n";

/// What the arguments of `quorate node` ask for.
///
/// # Errors
/// [`Error::Config`], when they make no sense.
pub fn order(args: &[String]) -> Result<Order, Error> {
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    if let Some(flag) = args.iter().find(|arg| arg.starts_with('-') && **arg != "--even-alive") {
        return Err(Error::Config(format!("node has no flag {flag}")));
    }
    match args[..] {
        ["grow", ref nodes @ ..] if !nodes.is_empty() && !nodes.contains(&"--even-alive") => {
            Ok(Order::Grow { nodes: nodes.iter().map(|node| (*node).to_owned()).collect() })
        }
        ["replace", server, by] | ["replace", server, by, "--even-alive"] | ["replace", "--even-alive", server, by]
            if server != "--even-alive" && by != "--even-alive" =>
        {
            Ok(Order::Replace { server: server.to_owned(), by: by.to_owned(), even_alive: args.len() > 3 })
        }
        ["remove", server] if server != "--even-alive" => Ok(Order::Remove { server: server.to_owned() }),
        _ => Err(Error::Config("node takes `grow NODE...`, `replace SERVER NODE` or `remove SERVER`".into())),
    }
}

/// What the variables say of the log; `check_filter` says whether a filter can be read.
///
/// # Errors
/// [`Error::Config`], which names the variable.
pub fn log_config(check_filter: impl Fn(&str) -> Result<(), String>) -> Result<LogConfig, Error> {
    let mut log = LogConfig::default();
    let var = |name| std::env::var(name).unwrap_or_default();
    let wrong = |name, value: &str, right| Err(Error::Config(format!("{name} is {value:?}; it must be {right}")));
    log.level = match var("LOG_LEVEL").as_str() {
        "debug" => LogLevel::Debug,
        "" | "info" => LogLevel::Info,
        "warn" => LogLevel::Warn,
        "error" => LogLevel::Error,
        other => return wrong("LOG_LEVEL", other, "debug, info, warn or error"),
    };
    log.format = match var("LOG_FORMAT").as_str() {
        "" | "json" => LogFormat::Json,
        "console" => LogFormat::Console,
        other => return wrong("LOG_FORMAT", other, "json or console"),
    };
    for name in ["KV_LOG_FILTER", "LOG_FILTER"] {
        let filter = var(name);
        if !filter.is_empty() {
            check_filter(&filter).map_err(|why| Error::Config(format!("{name}: {why}")))?;
            log.filter = Some(filter);
            break;
        }
    }
    Ok(log)
}

/// Tells the log of the node's health, now and whenever it changes.
async fn tell_health(node: &Node) -> Infallible {
    let mut availability = node.availability();
    let mut told = None;
    loop {
        let now = {
            let now = availability.borrow_and_update();
            (now.access, now.kv, now.kv_write)
        };
        if told != Some(now) {
            tracing::info!(health = %node.health_json(), "health");
            told = Some(now);
        }
        if availability.changed().await.is_err() {
            // The node has stopped, which is heard elsewhere.
            std::future::pending::<()>().await;
        }
    }
}

/// Returns when the node is enlisted, and is to be started again.
async fn enlisted(node: &Node) {
    if node.enlisted().wait_for(|enlisted| *enlisted).await.is_err() {
        // The node has stopped, which is heard elsewhere.
        std::future::pending().await
    }
}

/// Starts the node, as often as it takes. None when it was asked to stop meanwhile.
async fn start(config: &EmbedConfig, mut asked: Pin<&mut impl Future<Output = &'static str>>) -> Result<Option<Node>, Error> {
    loop {
        let tried = async {
            let started = Node::start(config.clone()).await;
            match &started {
                Err(Error::Founding(why)) => tracing::warn!(why, "the node belongs to no cluster yet; trying again"),
                Err(err @ Error::Unavailable(_)) => tracing::warn!(error = %err, "the others are missing; trying again"),
                _ => return Some(started),
            }
            tokio::time::sleep(RETRY).await;
            None
        };
        tokio::select! {
            biased;
            signal = &mut asked => {
                tracing::info!(signal, "received signal before the node ran");
                return Ok(None);
            }
            started = tried => match started {
                Some(started) => return started.map(Some),
                None => continue,
            },
        }
    }
}

/// Runs until asked to stop.
///
/// # Errors
/// Why it could not start, other than that others are missing; why its server has stopped by itself; or what went wrong when it stopped.
pub async fn run(config: EmbedConfig, asked: impl Future<Output = &'static str>) -> Result<(), Error> {
    let mut asked = std::pin::pin!(asked);
    // Whether the node was started again because it was enlisted.
    let mut again = false;
    loop {
        let Some(node) = start(&config, asked.as_mut()).await? else { return Ok(()) };
        tracing::info!(
            role = %node.role(),
            cluster = node.cluster_id().unwrap_or_default(),
            servers = ?*node.endpoints().borrow(),
            "the node runs"
        );
        let is_enlisted = tokio::select! {
            biased;
            stopped = node.stopped() => {
                let closed = node.shutdown().await;
                // It may have been put out before it has voted: then it is a client, and if not, its next start says so.
                if again && matches!(stopped, Err(Error::Removed)) {
                    again = false;
                    tracing::warn!("the server was removed: starting again as what the node is now");
                    continue;
                }
                return stopped.and(closed);
            }
            signal = asked.as_mut() => {
                tracing::info!(signal, "received signal, shutting down");
                false
            }
            () = enlisted(&node) => true,
            never = tell_health(&node) => match never {},
        };
        let closed = node.shutdown().await;
        if !is_enlisted {
            closed?;
            tracing::info!("node stopped");
            return Ok(());
        }
        if let Err(error) = closed {
            tracing::warn!(%error, "stopping the client");
        }
        tracing::info!("the node is enlisted: starting again, as a server");
        again = true;
    }
}
