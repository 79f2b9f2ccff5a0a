//! `quorate embed`: a node of the embedded mode by itself, so that one can be tried from a shell.
//!
//! It is told everything by variables (see [`quorate::embed::config`]; of the log, `LOG_LEVEL` and `LOG_FORMAT`), and does what a host
//! program does: it starts the node, tries again for as long as there is no cluster, and says in its log what role it has and whether the
//! store can be written. Exit codes are those of the server.

use std::future::Future;

use quorate::Error;
use quorate::cli::{LogConfig, LogFormat, LogLevel};
use quorate::embed::{EmbedConfig, Node};

/// What `quorate embed --help` prints.
pub const HELP: &str = "Usage:\n\n  quorate embed\n    Run a node of the embedded mode. It is told everything by variables.\n\n\
  JOIN             the nodes that may found the cluster: host[:port],... The same on all nodes.\n\
  ADVERTISE_IP     the address of this node. Default: that from which it reaches the others.\n\
  HOSTNAME         its name. Default: node\n\
  KV_SERVERS       1, 3 or auto. Default: auto, three if JOIN has as many entries\n\
  KV_CLIENT_PORT   Default: 5706\n\
  KV_PEER_PORT     Default: 5707\n\
  KV_DATA_DIR      Default: /var/lib/quorate\n\
  KV_TOKEN, KV_TOKEN_FILE   a secret that all nodes share\n\
  KV_START_TIMEOUT how long one try to start may take. Default: 1m; it is tried again\n\
  KV_BACKEND       embedded, or etcd with KV_ADDR=host[:port],... Default: embedded\n\
  KV_CONFIG_FILE   a YAML file with the same settings, as join: and kv-data-dir:\n\
  LOG_LEVEL        debug, info, warn or error. Default: info\n\
  LOG_FORMAT       json or console. Default: json\n";

/// What the variables say of the log.
///
/// # Errors
/// [`Error::Config`], which names the variable.
pub fn log_config() -> Result<LogConfig, Error> {
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
    Ok(log)
}

/// Runs until asked to stop.
///
/// # Errors
/// Why it could not start, other than that there is no cluster yet; or what went wrong when it stopped.
pub async fn run(config: EmbedConfig, asked: impl Future<Output = &'static str>) -> Result<(), Error> {
    let mut asked = std::pin::pin!(asked);
    let node = loop {
        tokio::select! {
            biased;
            signal = &mut asked => {
                tracing::info!(signal, "received signal before there was a cluster");
                return Ok(());
            }
            started = Node::start(config.clone()) => match started {
                Ok(node) => break node,
                Err(Error::Founding(why)) => tracing::warn!(why, "there is no cluster yet; trying again"),
                Err(err) => return Err(err),
            },
        }
    };
    tracing::info!(
        role = %node.role(),
        cluster = node.cluster_id().unwrap_or_default(),
        servers = ?*node.endpoints().borrow(),
        "the node runs"
    );
    let signal = asked.await;
    tracing::info!(signal, "received signal, shutting down");
    node.shutdown().await?;
    tracing::info!("node stopped");
    Ok(())
}
