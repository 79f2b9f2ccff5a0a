//! The side that connects: to a member, whose certificate has to be from the CA that is trusted and made out to the host that was asked for.

use std::fmt;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use http::Uri;
use hyper_util::rt::TokioIo;
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tonic::codegen::Service;

use super::files::Watched;
use super::settings::Settings;
use crate::error::Result;

/// The port of an `https` URL that has none.
const HTTPS: u16 = 443;

/// Makes connections in TLS. Clones share the certificates.
#[derive(Clone)]
pub(crate) struct Connector(Arc<Watched<ClientConfig>>);

impl Connector {
    pub(super) fn open(settings: Settings) -> Result<Connector> {
        Watched::open(settings.client_files(), move || settings.client()).map(Connector)
    }

    /// Connects, and shakes hands. How long it may take is the caller's business.
    ///
    /// # Errors
    /// Those of the connection; and what is wrong with the other's certificate, or what it says is wrong with ours.
    pub async fn connect(&self, host: &str, port: u16) -> io::Result<TlsStream<TcpStream>> {
        let stream = TcpStream::connect((host, port)).await?;
        stream.set_nodelay(true)?;
        self.shake(host, stream).await
    }

    /// Shakes hands with that host, over a connection that leads to it.
    ///
    /// # Errors
    /// As [`connect`](Self::connect).
    pub async fn shake(&self, host: &str, stream: TcpStream) -> io::Result<TlsStream<TcpStream>> {
        let name = ServerName::try_from(host.to_owned()).map_err(io::Error::other)?;
        TlsConnector::from(self.0.current().await).connect(name, stream).await.map_err(describe)
    }
}

/// Why a handshake failed, in words that say whether the other side speaks TLS at all.
fn describe(err: io::Error) -> io::Error {
    let cause = err.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>());
    match cause {
        Some(rustls::Error::InvalidMessage(_)) => io::Error::new(err.kind(), format!("it does not answer in TLS: {err}")),
        None if is_ended(err.kind()) => io::Error::new(err.kind(), format!("it may not speak TLS: {err}")),
        _ => err,
    }
}

/// Whether the other side has ended the connection, as it may that does not take a handshake for anything.
fn is_ended(kind: io::ErrorKind) -> bool {
    matches!(kind, io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe)
}

impl fmt::Debug for Connector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a TLS connector")
    }
}

/// As tonic's transport uses it.
impl Service<Uri> for Connector {
    type Response = TokioIo<TlsStream<TcpStream>>;
    type Error = io::Error;
    type Future = Pin<Box<dyn Future<Output = io::Result<Self::Response>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        let this = self.clone();
        Box::pin(async move {
            let host = uri.host().ok_or_else(|| io::Error::other("the URL has no host"))?;
            // As an address is written in a URL, if it is one of IPv6.
            let host = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
            this.connect(host, uri.port_u16().unwrap_or(HTTPS)).await.map(TokioIo::new)
        })
    }
}
