//! Nodes of the embedded mode, several in one process and on loopback: where they are, and waiting for them.
//!
//! ```text
//! let places = places(3);
//! let nodes = start_all(&[config(dir, 0, places[0], join(&places)), ...]).await;
//! until_access(&nodes[0], Access::ReadWrite).await;
//! ```

use std::path::Path;
use std::time::{Duration, Instant};

use quorate::embed::{Access, Availability, EmbedConfig, Node, Token};
use quorate::{Client, Error};

use crate::ports::free_port;

/// What anything here may take. A test that waits longer has failed.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// Where a node is: its peer port, its client port.
pub type Place = (u16, u16);

pub fn places(count: usize) -> Vec<Place> {
    (0..count).map(|_| (free_port(), free_port())).collect()
}

pub fn join(places: &[Place]) -> Vec<String> {
    places.iter().map(|(peer, _)| format!("127.0.0.1:{peer}")).collect()
}

/// A node in plain text, with a directory of its own below `dir`, and the token that all have.
pub fn config(dir: &Path, at: usize, place: Place, join: Vec<String>) -> EmbedConfig {
    let mut config = EmbedConfig::default();
    config.advertise_ip = Some([127, 0, 0, 1].into());
    (config.peer_port, config.client_port) = place;
    config.join = join;
    config.hostname = format!("node-{at}");
    config.data_dir = dir.join(format!("node-{at}"));
    config.token = Token::new("a secret");
    config.start_timeout = PATIENCE;
    config
}

/// Starts a node; one that was only just stopped, or whose start nobody waited for any more, may not have let go of everything yet.
pub async fn start(config: &EmbedConfig) -> Result<Node, Error> {
    let began = Instant::now();
    loop {
        match Node::start(config.clone()).await {
            Err(Error::Locked { .. } | Error::Io { .. }) if began.elapsed() < PATIENCE => {
                tokio::time::sleep(Duration::from_millis(50)).await
            }
            started => return started,
        }
    }
}

/// Starts nodes at the same time. They have a cluster then, and may not be able to write yet.
pub async fn start_all(configs: &[EmbedConfig]) -> Vec<Node> {
    let started = futures_util::future::join_all(configs.iter().map(start)).await;
    started.into_iter().map(|node| node.unwrap_or_else(|err| panic!("{err}"))).collect()
}

pub async fn stop_all(nodes: Vec<Node>) {
    for node in nodes {
        node.shutdown().await.unwrap();
    }
}

pub async fn until(what: &str, mut is_so: impl AsyncFnMut() -> bool) {
    let began = Instant::now();
    while !is_so().await {
        assert!(began.elapsed() < PATIENCE, "{what}: not within {PATIENCE:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Waits until the store is as it should be to a node.
pub async fn until_available(node: &Node, is_so: impl Fn(&Availability) -> bool) {
    let mut availability = node.availability();
    let waited = tokio::time::timeout(PATIENCE, availability.wait_for(is_so)).await;
    let last = node.availability().borrow().clone();
    assert!(matches!(waited, Ok(Ok(_))), "{node:?} is {last:?}");
}

pub async fn until_access(node: &Node, access: Access) {
    until_available(node, |now| now.access == access).await;
}

/// Writes, as soon as that can be done.
pub async fn put(client: &Client, key: &str, value: &str) {
    let began = Instant::now();
    while let Err(err) = client.put(key.to_owned(), value.to_owned()).await {
        assert!(began.elapsed() < PATIENCE, "putting {key}: {err}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Reads, as soon as that can be done.
pub async fn get(client: &Client, key: &str) -> Option<String> {
    let began = Instant::now();
    loop {
        match client.get(key.to_owned()).await {
            Ok(kv) => return kv.map(|kv| String::from_utf8(kv.value.to_vec()).unwrap()),
            Err(err) => assert!(began.elapsed() < PATIENCE, "getting {key}: {err}"),
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
