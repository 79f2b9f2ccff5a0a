//! Quorate in the process that uses it, against the same server over gRPC.
//!
//! The server runs within the harness. Its client calls it directly, from a thread and runtime of its own as any host would; beside it the
//! usual generator calls the same server through a socket. Both do the same, on the same data, in turn.
//!
//! Caveat: here server and generator are one process, so their CPU cannot be told apart and is not reported.

use std::path::Path;

use bytes::{Bytes, BytesMut};
use quorate::proto::etcdserverpb::RangeRequest;
use quorate::{Config, Server};
use tokio::runtime::Runtime;

use crate::load::Client;
use crate::member::{Cluster, DataDir};
use crate::requests::{quick_key, value};
use crate::rows::Work;
use crate::stats::Rng;
use crate::wire::Result;

/// A server in this process. It stops when this is dropped.
pub struct Embedded {
    server: Option<Server>,
    runtime: Runtime,
    _dir: DataDir,
}

impl Embedded {
    /// Starts a fresh server with its data below `parent`. The first of the sides is the way through the socket, the second the direct one.
    pub fn start(parent: &Path) -> Result<(Self, [Cluster; 2])> {
        let dir = DataDir::new(parent)?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let mut config = Config::default();
        config.data_dir = Some(dir.path().join("data"));
        config.listen_client_urls = vec!["http://127.0.0.1:0".parse()?];
        config.listen_peer_urls = Vec::new();
        let server = runtime.block_on(Server::start(config))?;
        let address = server.client_addrs().first().ok_or("the server listens nowhere")?;
        let sides =
            [Cluster::join("over gRPC", &[format!("http://{address}")], &[])?, Cluster::embedded("in the process", server.client())];
        Ok((Self { server: Some(server), runtime, _dir: dir }, sides))
    }
}

impl Drop for Embedded {
    fn drop(&mut self) {
        if let Some(server) = self.server.take() {
            let _ = self.runtime.block_on(server.shutdown());
        }
    }
}

/// A task that calls the server directly.
pub struct Direct {
    client: quorate::Client,
    work: Work,
    keys: u64,
    value: Bytes,
    rng: Rng,
    buffer: BytesMut,
}

impl Direct {
    pub fn new(client: quorate::Client, work: Work, seed: usize, keys: u64, value_bytes: usize) -> Self {
        Self { client, work, keys, value: value(value_bytes).into(), rng: Rng::new(seed as u64), buffer: BytesMut::new() }
    }
}

impl Client for Direct {
    async fn step(&mut self) -> Result<u64> {
        let key = quick_key(&mut self.buffer, self.rng.below(self.keys));
        match self.work {
            Work::Put => {
                let answer = self.client.put(key, self.value.clone()).await?;
                answer.header.ok_or("an answer without a header")?;
            }
            Work::Get { serializable } => {
                let answer = self.client.range(RangeRequest { key, serializable, ..Default::default() }).await?;
                if (answer.count, answer.kvs.len()) != (1, 1) {
                    return Err(format!("{} keys, {} counted", answer.kvs.len(), answer.count).into());
                }
            }
            other => return Err(format!("{other:?} is not done in the process").into()),
        }
        Ok(1)
    }
}
