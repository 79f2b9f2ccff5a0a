//! Three members in one process, over loopback.

use std::path::Path;
use std::time::{Duration, Instant};

use quorate::{Config, Error, Server};

use crate::ports::free_port;

const NAMES: [&str; 3] = ["a", "b", "c"];

/// What a cluster may take to come to something. A test that waits longer has failed.
const PATIENCE: Duration = Duration::from_secs(120);

pub fn ports() -> [u16; 3] {
    [(); 3].map(|()| free_port())
}

pub fn config(dir: &Path, ports: &[u16; 3], at: usize) -> Config {
    let url = |at: usize| format!("http://127.0.0.1:{}", ports[at]);
    let mut config = Config::default();
    config.name = NAMES[at].into();
    config.data_dir = Some(dir.join(NAMES[at]));
    config.listen_client_urls = vec!["http://127.0.0.1:0".parse().unwrap()];
    config.listen_peer_urls = vec![url(at).parse().unwrap()];
    config.initial_advertise_peer_urls = config.listen_peer_urls.clone();
    config.initial_cluster = (0..3).map(|at| format!("{}={}", NAMES[at], url(at))).collect::<Vec<_>>().join(",");
    config
}

/// Starts the three as `config` says.
pub async fn start_all(config: impl Fn(usize) -> Config) -> Vec<Server> {
    let mut servers = Vec::new();
    for at in 0..3 {
        servers.push(Server::start(config(at)).await.unwrap());
    }
    servers
}

/// Tries however often it takes: while there is no leader it may.
pub async fn insist<T, F: Future<Output = quorate::Result<T>>>(what: &str, mut attempt: impl FnMut() -> F) -> T {
    let began = Instant::now();
    loop {
        match attempt().await {
            Ok(done) => return done,
            Err(err) => {
                assert!(began.elapsed() < PATIENCE, "{what}: {err}");
                assert!(matches!(err, Error::Timeout | Error::Apply(_)), "{what}: {err}");
            }
        }
    }
}

pub async fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let began = Instant::now();
    while !is_so() {
        assert!(began.elapsed() < PATIENCE, "{what}: not within {PATIENCE:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

pub async fn stop_all(servers: Vec<Server>) {
    for server in servers {
        server.shutdown().await.unwrap();
    }
}
