//! In the place of TLS where it was not built: nothing that could be made. A configuration that asks for it has been refused before.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use http::Uri;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tonic::codegen::Service;

use crate::config::tls::FileNames;
use crate::config::{Config, TlsFiles};
use crate::error::{Error, Result};

/// # Errors
/// Always: a client that has files for TLS is not to go on without.
pub(crate) fn connector(names: FileNames, _: &TlsFiles) -> Result<Connector> {
    Err(Error::Config(format!("{} is set, but this build has no TLS (the cargo feature `tls`)", names.ca)))
}

/// # Errors
/// Always, likewise.
pub(crate) fn peers(names: FileNames, _: &Config) -> Result<(Acceptor, Connector)> {
    Err(Error::Config(format!("{} is set, but this build has no TLS (the cargo feature `tls`)", names.ca)))
}

/// No plane speaks TLS.
pub(crate) struct Tls {
    pub client: Option<Acceptor>,
    pub peer: Option<Acceptor>,
    pub connector: Option<Connector>,
}

impl Tls {
    /// # Errors
    /// None.
    pub fn open(_: &Config) -> Result<Tls> {
        Ok(Tls { client: None, peer: None, connector: None })
    }
}

/// There is none.
#[derive(Clone)]
pub(crate) enum Acceptor {}

impl Acceptor {
    pub async fn accept(&self, _: TcpStream) -> Option<ServerStream> {
        match *self {}
    }
}

/// There is none.
pub(crate) enum ServerStream {}

impl ServerStream {
    pub fn taken(&self) -> u64 {
        match *self {}
    }
}

impl AsyncRead for ServerStream {
    fn poll_read(self: Pin<&mut Self>, _: &mut Context<'_>, _: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match *self {}
    }
}

impl AsyncWrite for ServerStream {
    fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, _: &[u8]) -> Poll<io::Result<usize>> {
        match *self {}
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        match *self {}
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        match *self {}
    }
}

/// There is none.
#[derive(Clone, Debug)]
pub(crate) enum Connector {}

impl Connector {
    /// # Errors
    /// None.
    pub async fn shake(&self, _: &str, _: TcpStream) -> io::Result<TcpStream> {
        match *self {}
    }
}

impl Service<Uri> for Connector {
    type Response = TokioIo<TcpStream>;
    type Error = io::Error;
    type Future = std::future::Ready<io::Result<Self::Response>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        match *self {}
    }

    fn call(&mut self, _: Uri) -> Self::Future {
        match *self {}
    }
}
