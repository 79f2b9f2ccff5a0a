//! How a member is connected to: in plain text or in TLS, as its URL says; and not before it has said its first word.
//!
//! ```text
//! http://   TCP ────────────────────────────────────────> HTTP/2: our preface ── its first byte ─> a line
//! https://  TCP ── handshake, its certificate, ours ────> HTTP/2: our preface ── its first byte ─> a line
//!                                                                             '─ none, or no HTTP/2 ─> why, in plain words
//! ```
//!
//! Its first word is waited for because an open port says little. Who speaks TLS to somebody who does not ends the connection without a
//! word, or with an alert; and who does not take a certificate says so only after the handshake, as far as the client can see. All that is
//! known before a request is sent, so that it is certain that nothing was done.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use http::{HeaderName, HeaderValue, Request, Response, Uri};
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::watch;
use tonic::body::Body;
use tonic::codegen::Service;
use tonic::transport::{Channel, Endpoint};

use super::RemoteOptions;
use super::login::Pass;
use super::options::FILE_NAMES;
use crate::config::Url;
use crate::cork::Cork;
use crate::error::Result;
use crate::raft::network::CLUSTER;
use crate::tls::{self, Connector};

/// What a member may send of one answer, or one watch, before it was taken: a large answer shall not wait for a round trip every 64 KiB. Beyond
/// it the member waits; so much memory may each hold here that nobody reads.
const STREAM_WINDOW: u32 = 1 << 20;

/// The same for all of them together, which share the connection: some thousand times as much, so that a watcher that nobody reads takes
/// nothing away from others. Beyond a thousand such watchers all would wait for them. hyper's adaptive windows are of no use for that reason:
/// there both are of one size.
const CONNECTION_WINDOW: u32 = 1 << 30;

/// The header that has a user's token.
const TOKEN: HeaderName = HeaderName::from_static("token");

/// The first byte of a TLS alert, and of an answer in HTTP/1. An HTTP/2 server begins with a frame that is shorter than that would mean.
const TLS_ALERT: u8 = 21;
const HTTP_1: u8 = b'H';

/// What there is to know to connect to any of the members. Clones share the certificates, and who the client is.
#[derive(Clone)]
pub(crate) struct Lines {
    tls: Option<Connector>,
    pass: Pass,
    /// How long TCP alone may take; no more than the next.
    tcp_timeout: Duration,
    /// The cluster that is meant, as the members' own calls name theirs.
    cluster: Option<HeaderValue>,
    connect_timeout: Duration,
    keep_alive: (Duration, Duration),
    /// What it means that a member speaks TLS where it is spoken to in plain text.
    hint: &'static str,
}

/// A connection to a member, that shows who calls. It is made anew when it broke.
#[derive(Clone)]
pub(crate) struct Line {
    pub(super) channel: Channel,
    pub(super) pass: Pass,
    cluster: Option<HeaderValue>,
}

impl Lines {
    /// Reads the files that the options name.
    ///
    /// # Errors
    /// `Config`: a file is missing, cannot be read, or is not what it should be.
    pub fn new(options: &RemoteOptions) -> Result<Lines> {
        options.validate()?;
        let tls = if options.tls.is_empty() { None } else { Some(tls::connector(FILE_NAMES, &options.tls)?) };
        Ok(Lines::with(tls, options))
    }

    /// With files that were read already, whatever the options say of them.
    pub fn with(tls: Option<Connector>, options: &RemoteOptions) -> Lines {
        Lines {
            tls,
            pass: Pass::new(&options.username, &options.password),
            tcp_timeout: options.connect_timeout,
            cluster: options.cluster.and_then(cluster_header),
            connect_timeout: options.connect_timeout,
            keep_alive: (options.keep_alive_interval, options.keep_alive_timeout),
            hint: "its URL is https://",
        }
    }

    /// The same, with other limits: for TCP alone, by which it shows whether a member is there, and for all of a connection, which on a busy
    /// machine takes longer where TLS is spoken.
    pub fn limited(self, tcp_timeout: Duration, connect_timeout: Duration) -> Lines {
        Lines { tcp_timeout, connect_timeout, ..self }
    }

    /// The same, for members of one cluster alone: those of another refuse what is asked.
    pub fn of_cluster(self, cluster: Option<u64>) -> Lines {
        Lines { cluster: cluster.and_then(cluster_header), ..self }
    }

    /// The same, where it is not a URL that says how members are spoken to. `hint` follows on "it speaks TLS, so".
    pub fn hinting(self, hint: &'static str) -> Lines {
        Lines { hint, ..self }
    }

    /// Whether members can be spoken to in TLS.
    pub fn is_tls(&self) -> bool {
        self.tls.is_some()
    }

    /// Whether a member with that URL could be connected to.
    ///
    /// # Errors
    /// What is missing for it.
    pub fn can_reach(&self, url: &Url) -> Result<(), String> {
        if url.is_tls() && url.socket_path().is_some() {
            return Err("TLS over a Unix socket is not built".into());
        }
        if url.is_tls() && self.tls.is_none() {
            return Err("it is to be spoken to in TLS, and there is no CA whose certificates could be trusted: set tls.ca".into());
        }
        Ok(())
    }

    /// A line that is connected with its first call.
    ///
    /// # Errors
    /// That there can be none.
    pub fn lazy(&self, url: &Url) -> Result<Line, String> {
        let endpoint = self.endpoint(url)?;
        let channel = match self.dialer(url, watch::channel(None).0) {
            Some(dialer) => endpoint.connect_with_connector_lazy(dialer),
            None => endpoint.connect_lazy(),
        };
        Ok(Line { channel, pass: self.pass.clone(), cluster: self.cluster.clone() })
    }

    /// A line to a member that has said its first word. To be awaited on the runtime that is to have the connection, within a limit.
    ///
    /// # Errors
    /// Why there is none.
    pub fn connect(&self, url: &Url) -> Result<BoxFuture<'static, Result<Line, String>>, String> {
        let (endpoint, pass, cluster) = (self.endpoint(url)?, self.pass.clone(), self.cluster.clone());
        let (tell, mut told) = watch::channel(None);
        let dialer = self.dialer(url, tell);
        Ok(async move {
            let channel = match dialer {
                Some(dialer) => {
                    let channel = endpoint.connect_with_connector(dialer).await.map_err(|err| chain(&err))?;
                    let first = told.wait_for(Option::is_some).await.map(|first| first.clone());
                    first.ok().flatten().unwrap_or_else(|| Err("the connection has ended".into()))?;
                    channel
                }
                None => endpoint.connect().await.map_err(|err| chain(&err))?,
            };
            Ok(Line { channel, pass, cluster })
        }
        .boxed())
    }

    fn endpoint(&self, url: &Url) -> Result<Endpoint, String> {
        self.can_reach(url)?;
        let (interval, timeout) = self.keep_alive;
        let endpoint = Endpoint::from_shared(url.to_string()).map_err(|err| err.to_string())?;
        Ok(endpoint
            .connect_timeout(self.connect_timeout)
            .http2_keep_alive_interval(interval)
            .keep_alive_timeout(timeout)
            // An etcd takes offence at pings while nothing is under way.
            .keep_alive_while_idle(false)
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW))
    }

    /// None for a Unix socket: there nobody speaks anything else.
    fn dialer(&self, url: &Url, tell: watch::Sender<First>) -> Option<Dialer> {
        if url.socket_path().is_some() {
            return None;
        }
        let mut tcp = HttpConnector::new();
        tcp.enforce_http(false);
        tcp.set_nodelay(true);
        tcp.set_connect_timeout(Some(self.tcp_timeout));
        Some(Dialer { tcp, tls: self.tls.clone().filter(|_| url.is_tls()), hint: self.hint, tell: Arc::new(tell) })
    }
}

fn cluster_header(cluster: u64) -> Option<HeaderValue> {
    HeaderValue::try_from(format!("{cluster:016x}")).ok()
}

impl Service<Request<Body>> for Line {
    type Response = Response<Body>;
    type Error = tonic::transport::Error;
    type Future = <Channel as Service<Request<Body>>>::Future;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.channel.poll_ready(cx)
    }

    fn call(&mut self, mut request: Request<Body>) -> Self::Future {
        if let Some(token) = self.pass.token() {
            request.headers_mut().insert(TOKEN, token);
        }
        if let Some(cluster) = &self.cluster {
            request.headers_mut().insert(CLUSTER, cluster.clone());
        }
        self.channel.call(request)
    }
}

/// What the member's first word has shown; none before it.
type First = Option<Result<(), String>>;

/// Makes the connections of one line, one after the other.
struct Dialer {
    tcp: HttpConnector,
    tls: Option<Connector>,
    hint: &'static str,
    tell: Arc<watch::Sender<First>>,
}

impl Service<Uri> for Dialer {
    type Response = TokioIo<Cork<Greeted>>;
    type Error = io::Error;
    type Future = BoxFuture<'static, io::Result<Self::Response>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.tcp.poll_ready(cx).map_err(io::Error::other)
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        let (tls, hint, tell) = (self.tls.clone(), self.hint, self.tell.clone());
        let host = uri.host().unwrap_or_default().to_owned();
        let connecting = self.tcp.call(uri);
        async move {
            let stream = connecting.await.map_err(|err| io::Error::other(chain(&err)))?.into_inner();
            let is_tls = tls.is_some();
            let stream: Box<dyn Stream> = match tls {
                Some(tls) => {
                    // As an address is written in a URL, if it is one of IPv6.
                    let host = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(&host);
                    Box::new(tls.shake(host, stream).await?)
                }
                None => Box::new(stream),
            };
            Ok(TokioIo::new(Cork::new(Greeted { stream, is_tls, hint, tell: Some(tell) })))
        }
        .boxed()
    }
}

trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<S: AsyncRead + AsyncWrite + Send + Unpin> Stream for S {}

/// A connection whose first byte is looked at.
struct Greeted {
    stream: Box<dyn Stream>,
    is_tls: bool,
    hint: &'static str,
    /// Until it has come.
    tell: Option<Arc<watch::Sender<First>>>,
}

impl Greeted {
    /// What is wrong with the first read.
    fn complaint(&self, read: &io::Result<()>, first: Option<u8>) -> Option<String> {
        let hint = match self.is_tls {
            true => "it may ask for a certificate, or for another one".to_owned(),
            false => format!("if it speaks TLS, {}", self.hint),
        };
        match (read, first) {
            (Ok(()), Some(TLS_ALERT)) => Some(format!("it speaks TLS, so {}", self.hint)),
            (Ok(()), Some(HTTP_1)) => Some("it answers in HTTP/1, and not in gRPC".into()),
            (Ok(()), Some(_)) => None,
            (Ok(()), None) => Some(format!("it has ended the connection before it said anything; {hint}")),
            (Err(err), _) => Some(format!("it has ended the connection before it said anything ({err}); {hint}")),
        }
    }
}

impl Greeted {
    /// Who has turned away has said why, and then takes nothing more. So as long as it was not heard, it is not the failed write that ends the
    /// connection, but what is read then: its last word, or the end.
    fn or_unheard<T>(&self, written: io::Result<T>, all: T) -> io::Result<T> {
        if self.tell.is_some() { Ok(written.unwrap_or(all)) } else { written }
    }
}

impl AsyncRead for Greeted {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let read = ready!(Pin::new(&mut self.stream).poll_read(cx, buf));
        let Some(tell) = self.tell.take() else { return Poll::Ready(read) };
        let complaint = self.complaint(&read, buf.filled().get(before).copied());
        let told = complaint.clone().map_or(Ok(()), Err);
        tell.send_replace(Some(told));
        Poll::Ready(match complaint {
            None => read,
            Some(complaint) => Err(io::Error::new(io::ErrorKind::ConnectionAborted, complaint)),
        })
    }
}

impl AsyncWrite for Greeted {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let written = ready!(Pin::new(&mut self.stream).poll_write(cx, buf));
        Poll::Ready(self.or_unheard(written, buf.len()))
    }

    fn poll_write_vectored(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bufs: &[io::IoSlice<'_>]) -> Poll<io::Result<usize>> {
        let written = ready!(Pin::new(&mut self.stream).poll_write_vectored(cx, bufs));
        Poll::Ready(self.or_unheard(written, bufs.iter().map(|buf| buf.len()).sum()))
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let flushed = ready!(Pin::new(&mut self.stream).poll_flush(cx));
        Poll::Ready(self.or_unheard(flushed, ()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

impl Drop for Greeted {
    fn drop(&mut self) {
        if let Some(tell) = self.tell.take() {
            tell.send_replace(Some(Err("the connection has ended before the member said anything".into())));
        }
    }
}

/// An error and what caused it, for tonic says little more of its own than "transport error".
pub(super) fn chain(err: &dyn std::error::Error) -> String {
    let mut text = err.to_string();
    let mut source = err.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        source = cause.source();
    }
    text
}
