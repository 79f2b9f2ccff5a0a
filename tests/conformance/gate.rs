//! A wire between client and member that can be cut, and muted.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{JoinHandle, JoinSet};

/// How often the port is tried again after the gate was cut: somebody else may have it for a moment.
const BIND_TRIES: u32 = 600;

pub struct Gate {
    address: SocketAddr,
    target: SocketAddr,
    muted: Arc<AtomicBool>,
    /// Accepts, and holds the connections; none while it is cut.
    acceptor: Option<JoinHandle<()>>,
}

impl Gate {
    pub async fn new(target: SocketAddr) -> Gate {
        let mut gate = Gate { address: "127.0.0.1:0".parse().unwrap(), target, muted: Arc::default(), acceptor: None };
        gate.mend().await;
        gate
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Ends all connections; new ones are refused.
    pub async fn cut(&mut self) {
        if let Some(acceptor) = self.acceptor.take() {
            acceptor.abort();
            let _ = acceptor.await;
        }
    }

    /// From now on what the member says is lost, and what is said to it arrives. Until the gate is mended.
    pub fn mute(&self) {
        self.muted.store(true, Ordering::SeqCst);
    }

    pub async fn mend(&mut self) {
        self.cut().await;
        self.muted.store(false, Ordering::SeqCst);
        let mut tries = 0;
        let listener = loop {
            match TcpListener::bind(self.address).await {
                Ok(listener) => break listener,
                Err(err) => assert!(tries < BIND_TRIES, "{}: {err}", self.address),
            }
            tries += 1;
            tokio::time::sleep(Duration::from_millis(100)).await;
        };
        self.address = listener.local_addr().unwrap();
        let (target, muted) = (self.target, self.muted.clone());
        self.acceptor = Some(tokio::spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((client, _)) = listener.accept().await {
                connections.spawn(carry(client, target, muted.clone()));
            }
        }));
    }
}

impl Drop for Gate {
    fn drop(&mut self) {
        if let Some(acceptor) = &self.acceptor {
            acceptor.abort();
        }
    }
}

async fn carry(client: TcpStream, target: SocketAddr, muted: Arc<AtomicBool>) {
    let Ok(member) = TcpStream::connect(target).await else { return };
    let _ = (client.set_nodelay(true), member.set_nodelay(true));
    let (mut from_client, mut to_client) = client.into_split();
    let (mut from_member, mut to_member) = member.into_split();
    let there = async { tokio::io::copy(&mut from_client, &mut to_member).await.map(drop) };
    let back = async {
        let mut buffer = vec![0; 64 << 10];
        loop {
            let read = from_member.read(&mut buffer).await?;
            if read == 0 {
                return Ok(());
            }
            if !muted.load(Ordering::SeqCst) {
                to_client.write_all(&buffer[..read]).await?;
            }
        }
    };
    // Whoever ends it, ends it for both.
    let _: std::io::Result<()> = tokio::select! { ended = there => ended, ended = back => ended };
}
