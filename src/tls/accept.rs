//! The side that is connected to: handshakes, in bounded time and number, and what comes through them.
//!
//! ```text
//! connection -> handshake begins -> the CA and the names of its certificate -> its address -> ServerStream
//!                 |  HANDSHAKE_TIMEOUT, HANDSHAKES_MAX
//!                 '-> refused: closed, and a line in the log, one in a second at most
//! ```

use std::collections::BTreeMap;
use std::io::{self, IoSlice};
use std::net::{IpAddr, SocketAddr, ToSocketAddrs};
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::Duration;

use rustls::ServerConfig;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::sync::{Semaphore, oneshot};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use super::certificate::{self, Hosts};
use super::files::Watched;
use super::settings::Settings;
use crate::error::Result;
use crate::lock::lock;
use crate::slow::Refusals;

/// How long a handshake may take, with all that is checked in it. Beyond it the connection is closed.
pub(super) const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);

/// Handshakes of one plane at the same time. One more, and the oldest is given up: a handshake takes milliseconds, and only those that
/// are not meant to end get old. So strangers who begin many and go on with none do not keep others out.
const HANDSHAKES_MAX: usize = 512;

/// Names of a certificate that are looked up to find out whether it comes from one of them. Those beyond count for nothing.
const NAMES_MAX: usize = 16;

/// Makes connections of one plane into such that TLS is spoken on. Clones share everything.
#[derive(Clone)]
pub(crate) struct Acceptor(Arc<Inner>);

struct Inner {
    plane: &'static str,
    config: Arc<Watched<ServerConfig>>,
    handshakes: Mutex<Handshakes>,
    /// Whether a certificate has to come from an address that it is made out to.
    check_address: bool,
    /// Names are looked up one at a time, so that it takes no more than one of the threads that may wait.
    lookup: Arc<Semaphore>,
    refused: Refusals,
}

/// Those under way, by age.
#[derive(Default)]
struct Handshakes {
    next: u64,
    under_way: BTreeMap<u64, oneshot::Sender<()>>,
}

/// One of them, until it is dropped.
struct Handshake<'a> {
    all: &'a Mutex<Handshakes>,
    id: u64,
}

impl Drop for Handshake<'_> {
    fn drop(&mut self) {
        lock(self.all).under_way.remove(&self.id);
    }
}

/// Begins one. What is received ends when it is given up for a newer one.
fn begin(all: &Mutex<Handshakes>) -> (Handshake<'_>, oneshot::Receiver<()>) {
    let (keep, given_up) = oneshot::channel();
    let mut now = lock(all);
    let id = now.next;
    now.next += 1;
    now.under_way.insert(id, keep);
    if now.under_way.len() > HANDSHAKES_MAX {
        now.under_way.pop_first();
    }
    (Handshake { all, id }, given_up)
}

impl Acceptor {
    pub(super) fn open(plane: &'static str, settings: Settings, check_address: bool) -> Result<Acceptor> {
        let config = Watched::open(settings.server_files(), move || settings.server())?;
        Ok(Acceptor(Arc::new(Inner {
            plane,
            config,
            handshakes: Mutex::default(),
            check_address,
            lookup: Arc::new(Semaphore::new(1)),
            refused: Refusals::new(),
        })))
    }

    /// The handshake. None for who has not come through it, which has been logged then.
    pub async fn accept(&self, stream: TcpStream) -> Option<ServerStream> {
        let remote = stream.peer_addr().ok();
        let (_handshake, given_up) = begin(&self.0.handshakes);
        let shaken = tokio::select! {
            biased;
            shaken = tokio::time::timeout(HANDSHAKE_TIMEOUT, self.shake(stream, remote)) => shaken,
            _ = given_up => Ok(Err("there were too many handshakes under way, and this was the oldest".into())),
        };
        match shaken {
            Ok(Ok(stream)) => Some(stream),
            Ok(Err(why)) => self.refuse(remote, &why),
            Err(_) => self.refuse(remote, "it did not come to the end of the handshake in time"),
        }
    }

    fn refuse(&self, remote: Option<SocketAddr>, error: &str) -> Option<ServerStream> {
        if let Some(unreported) = self.0.refused.tell() {
            let remote = remote.map(|remote| remote.to_string()).unwrap_or_default();
            match self.0.plane {
                "peer" => tracing::warn!(remote, error, unreported, "rejected connection on peer endpoint"),
                _ => tracing::warn!(remote, error, unreported, "rejected connection on client endpoint"),
            }
        }
        None
    }

    async fn shake(&self, stream: TcpStream, remote: Option<SocketAddr>) -> std::result::Result<ServerStream, String> {
        let config = self.0.config.current().await;
        let stream = TlsAcceptor::from(config).accept(Socket { stream, taken: 0 }).await;
        let stream = stream.map_err(|err| describe(&err))?;
        let shown = stream.get_ref().1.peer_certificates().and_then(<[_]>::first);
        if let (true, Some(shown), Some(remote)) = (self.0.check_address, shown, remote) {
            let hosts = certificate::hosts(shown).ok_or("its certificate cannot be read")?;
            self.comes_from(hosts, remote.ip().to_canonical()).await?;
        }
        Ok(ServerStream(Box::new(stream)))
    }

    /// Whether an address is one of those that a certificate is made out to, or it is made out to none.
    async fn comes_from(&self, hosts: Hosts, ip: IpAddr) -> std::result::Result<(), String> {
        let Hosts { mut names, addresses } = hosts;
        let is_free = names.is_empty() && addresses.is_empty();
        if is_free || addresses.iter().any(|address| address.to_canonical() == ip) || names.iter().any(|name| name.starts_with("*.")) {
            return Ok(());
        }
        let other = format!("its certificate is made out to {:?}, and not to where it comes from", (&addresses, &names));
        names.truncate(NAMES_MAX);
        for name in names {
            let Ok(turn) = self.0.lookup.clone().acquire_owned().await else { break };
            // It may go on when nobody waits for it any more, and keeps its turn until it ends.
            let found = tokio::task::spawn_blocking(move || {
                let _turn = turn;
                (name.as_str(), 0).to_socket_addrs().is_ok_and(|mut found| found.any(|at| at.ip().to_canonical() == ip))
            });
            if found.await.is_ok_and(|found| found) {
                return Ok(());
            }
        }
        Err(other)
    }
}

/// Why a handshake failed, in words that tell whose fault it is.
fn describe(err: &io::Error) -> String {
    let cause = err.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>());
    match cause {
        Some(rustls::Error::InvalidMessage(_)) => format!("first record does not look like a TLS handshake: {err}"),
        Some(rustls::Error::NoCertificatesPresented) => "client didn't provide a certificate".to_owned(),
        Some(rustls::Error::InvalidCertificate(rustls::CertificateError::NotValidForName)) => {
            "client certificate authentication failed: it is not made out to who is allowed".to_owned()
        }
        Some(rustls::Error::InvalidCertificate(why)) => format!("client certificate authentication failed: {why:?}"),
        _ => err.to_string(),
    }
}

/// A socket that counts what it has taken, by which it is told whether the other side takes anything.
pub(super) struct Socket {
    stream: TcpStream,
    taken: u64,
}

impl AsyncRead for Socket {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Socket {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(cx, &[IoSlice::new(buf)])
    }

    fn poll_write_vectored(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bufs: &[IoSlice<'_>]) -> Poll<io::Result<usize>> {
        // Whatever budget this turn has used up: only the socket may say that it takes no more.
        let written = match self.stream.try_write_vectored(bufs) {
            Err(err) if err.kind() == io::ErrorKind::WouldBlock => Pin::new(&mut self.stream).poll_write_vectored(cx, bufs),
            written => Poll::Ready(written),
        };
        if let Poll::Ready(Ok(len)) = written {
            self.taken += len as u64;
        }
        written
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

/// A connection that has come through its handshake.
pub(crate) struct ServerStream(Box<TlsStream<Socket>>);

impl ServerStream {
    /// Bytes that the socket has taken so far.
    pub fn taken(&self) -> u64 {
        self.0.get_ref().0.taken
    }
}

impl AsyncRead for ServerStream {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, buf)
    }
}

impl AsyncWrite for ServerStream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_oldest_is_given_up() {
        let all = Mutex::default();
        let mut begun: Vec<_> = (0..HANDSHAKES_MAX).map(|_| begin(&all)).collect();
        assert!(begun.iter_mut().all(|(_, given_up)| given_up.try_recv() == Err(oneshot::error::TryRecvError::Empty)));
        let _one_more = begin(&all);
        assert_eq!(begun[0].1.try_recv(), Err(oneshot::error::TryRecvError::Closed));
        assert_eq!(begun[1].1.try_recv(), Err(oneshot::error::TryRecvError::Empty));
        // Those that end make room.
        begun.truncate(10);
        assert_eq!(lock(&all).under_way.len(), 10);
        let _another = begin(&all);
        assert_eq!(begun[1].1.try_recv(), Err(oneshot::error::TryRecvError::Empty));
    }
}
