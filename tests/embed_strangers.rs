//! Nodes that meet another cluster at the entries of JOIN: who belongs to one says so, and who belongs to none joins neither of two.

use std::path::Path;
use std::time::{Duration, Instant};

use quorate::Error;
use quorate::embed::{EmbedConfig, Node, Role};

#[path = "common/nodes.rs"]
#[allow(dead_code, reason = "other tests use the rest")]
mod nodes;
#[path = "common/ports.rs"]
mod ports;
use nodes::{PATIENCE, Place, join, places};

fn config(dir: &Path, name: &str, place: Place, listed: &[Place]) -> EmbedConfig {
    let mut config = nodes::config(dir, 0, place, join(listed));
    config.hostname = name.into();
    config.data_dir = dir.join(name);
    config
}

/// Tries to start until it is refused with all of these words.
async fn refused_until(config: &EmbedConfig, words: &[&str]) {
    let began = Instant::now();
    loop {
        match Node::start(config.clone()).await {
            Err(Error::Founding(why)) if words.iter().all(|word| why.contains(word)) => return,
            Err(Error::Founding(why)) => assert!(began.elapsed() < PATIENCE, "{why}, without one of {words:?}"),
            other => panic!("{other:?}"),
        }
    }
}

/// Two clusters in one list. A node without a memory names both and joins neither; those that belong to one see the other in their health;
/// and when people have settled it, it is joined.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_two_clusters_a_node_joins_neither() {
    let dir = tempfile::tempdir().unwrap();
    let places = places(3);
    let (a, b) = (places[0].0, places[1].0);
    // Founded apart from each other; then all are told of all.
    let mut clusters = Vec::new();
    for (name, place) in [("a", places[0]), ("b", places[1])] {
        let node = Node::start(config(dir.path(), name, place, &[place])).await.unwrap();
        clusters.push(node.cluster_id().unwrap());
        node.shutdown().await.unwrap();
    }
    assert_ne!(clusters[0], clusters[1]);
    let first = Node::start(config(dir.path(), "a", places[0], &places)).await.unwrap();
    let second = Node::start(config(dir.path(), "b", places[1], &places)).await.unwrap();
    assert_eq!((first.role(), second.role()), (Role::Server, Role::Server));
    for (node, cluster, port) in [(&first, &clusters[1], b), (&second, &clusters[0], a)] {
        let began = Instant::now();
        let wanted = serde_json::json!([{ "address": format!("http://127.0.0.1:{port}"), "cluster": cluster }]);
        while node.health_json()["strangers"] != wanted {
            assert!(began.elapsed() < PATIENCE, "{}", node.health_json());
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    let mut third = config(dir.path(), "c", places[2], &places);
    // No longer than others are waited for: so nobody who is slow to answer leaves it with one of them alone.
    third.start_timeout = Duration::from_secs(2);
    let at = |cluster: &str, port: u16| format!("{cluster} at 127.0.0.1:{port}");
    let words = [&*at(&clusters[0], a), &at(&clusters[1], b), "joins none of them"];
    refused_until(&third, &words).await;

    // One of them goes. That does not settle it, however long the next try takes.
    second.shutdown().await.unwrap();
    third.start_timeout = Duration::from_secs(6);
    match Node::start(third.clone()).await {
        Err(Error::Founding(why)) => assert!(words.iter().all(|word| why.contains(word)), "{why}"),
        other => panic!("{other:?}"),
    }
    // It comes back as a node of the other.
    std::fs::remove_dir_all(dir.path().join("b")).unwrap();
    third.start_timeout = PATIENCE;
    let second = Node::start(config(dir.path(), "b", places[1], &places)).await.unwrap();
    let third = Node::start(third).await.unwrap();
    for node in [&second, &third] {
        assert_eq!((node.role(), node.cluster_id().as_ref()), (Role::Client, Some(&clusters[0])));
    }
    let began = Instant::now();
    while first.health_json()["strangers"] != serde_json::json!([]) {
        assert!(began.elapsed() < PATIENCE, "{}", first.health_json());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    for node in [third, second, first] {
        node.shutdown().await.unwrap();
    }
}

/// Who waits says why: another number of servers is told apart from other entries, and a node that is not in the list says so itself.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn it_is_said_what_differs() {
    let dir = tempfile::tempdir().unwrap();
    let places = places(3);
    let mut other = config(dir.path(), "b", places[1], &places);
    other.servers = quorate::embed::Servers::One;
    let mut first = config(dir.path(), "a", places[0], &places);
    first.start_timeout = Duration::from_secs(4);
    tokio::select! {
        started = Node::start(other) => panic!("{started:?}"),
        () = refused_until(&first, &["another KV_SERVERS", "1 servers there, 3 here"]) => {}
    }
    let mut unlisted = config(dir.path(), "c", places[2], &places[..2]);
    unlisted.start_timeout = Duration::from_secs(4);
    refused_until(&unlisted, &[&format!("http://127.0.0.1:{}, was reached at no entry of JOIN", places[2].0), "is missing"]).await;
}
