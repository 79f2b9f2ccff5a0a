//! Listeners and connections: who may talk to the server, how much of it they may take, and when they are cut off.
//!
//! One port speaks HTTP/2 (gRPC, by prior knowledge) and HTTP/1.1 (health, metrics). The first bytes of a connection tell
//! which. HTTP/2 is driven here, on the `h2` crate itself: one task owns a connection and everything that goes on in it,
//! and each request is a [`Call`], a future that lives in that task. Many calls that become ready together thus leave in
//! one write, and to drop the task is to drop all it did.
//!
//! ```text
//!             accept           sniff         HTTP/2: accept streams -> calls -> flush    (one task)
//! listener  --------->  task  ------->  {
//!             limit            deadline      HTTP/1: hyper -> http.rs                    (one task)
//! ```
//!
//! At an `https` URL a connection begins with a handshake, and what is sniffed and spoken comes out of TLS; see [`tls`](crate::tls).
//!
//! A request whose outcome is at hand (a read, a refusal) is answered in the very poll that took it from the socket: no
//! task is made for it. The others wait side by side in the connection's [`FuturesUnordered`].
//!
//! # Invariants
//! - *Owned*: every task belongs to a [`Serving`]. [`Serving::stop`] returns when all have ended; dropping it ends them.
//! - *Bounded*: connections, streams, bytes of unfinished requests and bytes of untaken answers have each a named limit. A peer that
//!   reaches one is made to wait or is refused, or its connection is cut; others do not notice.
//! - *Live*: a peer that takes nothing is cut after [`WRITE_STALL`] (the whole connection) or [`STREAM_STALL`] (an answer that it
//!   gives no window for); one that says nothing at first, after [`PREFACE_TIMEOUT`]; one that answers no ping, after the ping's timeout.
//!
//! # What a peer can make us hold
//! For each connection: [`CONNECTION_WINDOW`] of data not yet looked at, [`PARTIAL_BYTES_MAX`](super::wire) of requests whose end is
//! missing, [`HELD_BYTES_MAX`](super::wire) of answers (and the one that went beyond), 64 KiB that are about to be sent, one frame, one
//! header block, and h2's record of each open stream (about 1 KiB, [`STREAMS_MAX`] of them). All connections together:
//! [`SERVER_PARTIAL_BYTES_MAX`](super::wire) of unfinished requests, [`SERVER_HELD_BYTES_MAX`](super::wire) of answers (and one for
//! each connection that has no other), [`SERVER_STREAMS_MAX`](super::wire) streams.
//!
//! An answer counts from when it is encoded until the peer has given window for all of it. There being no room is looked at twice: before
//! a request is attended to, and, for one whose outcome had to be waited for, before a large answer is encoded. A connection that is
//! made to wait has an answer under way itself; as that goes, or is given up, the connection gets on. Nobody waits for another's peer.
//!
//! # Caveats
//! - What a handler has found and not encoded yet is not counted: a request that waits for the log or for a thread brings its pairs
//!   along when it is done, as slices of what the store holds or has read.
//! - Answers of up to 64 KiB for which there is window are h2's at once and not counted; [`WRITE_STALL`] ends who does not read them.
//! - A stream that a client opens and then leaves idle stays: an idle Watch is nothing unusual. Dead peers are found by pings.
//! - A handler's panic ends the connection it came over, and nothing else.

use std::collections::VecDeque;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use h2::server::SendResponse;
use h2::{Ping, PingPong, Reason, RecvStream};
use http::Request;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, UnixListener, UnixStream};
use tokio::time::{Instant, Sleep};
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};
use tokio_util::task::TaskTracker;

use super::http::Http;
use super::unary::{self, Router};
use super::wire::{Io, Limits, Outgoing, Stream, WRITE_STALL, Wire};
use crate::error::{Error, Result};
use crate::lock::lock;
use crate::tls::Acceptor;

/// Streams that one connection may have open, if the configuration asks for no fewer; the peer is told so, and its further
/// requests wait in its own library. A stream beyond what was told is refused (RST_STREAM, REFUSED_STREAM).
pub(crate) const STREAMS_MAX: u32 = 16_384;

/// Bytes of one request's headers, decoded. Beyond it the request is answered 431, and a block that goes on for many times
/// that (HEADERS with CONTINUATION without end) ends the connection.
const HEADER_LIST_MAX: u32 = 32 << 10;

/// Streams that a peer opens and resets before we have looked at them. One more ends the connection with ENHANCE_YOUR_CALM: so a
/// "rapid reset" flood ends at once, while a client whose deadlines pass all at the same moment survives.
const PENDING_RESETS_MAX: usize = 256;

/// Streams that we had to reset because of the peer's errors, over the connection's life; one more ends the connection, as above.
const ERROR_RESETS_MAX: usize = 1024;

/// Streams that we reset, remembered for [`RESET_MEMORY`] so that frames still under way to them are no error. Beyond it the oldest is
/// forgotten.
const RESETS_REMEMBERED: usize = 128;
const RESET_MEMORY: Duration = Duration::from_secs(1);

/// What a peer may send on one stream before it is read. A larger request is read as it comes.
const STREAM_WINDOW: u32 = 512 << 10;

/// What a peer may send on a connection before it is read: a few large requests at the same time at full speed.
const CONNECTION_WINDOW: u32 = 2 << 20;

/// The largest frame we take, which is the smallest that the protocol lets us ask for, and what Go's gRPC sends at most. A frame is
/// looked at when it is complete, so this is also what a peer can make us hold of an incomplete one.
const FRAME_MAX: u32 = 16 << 10;

/// Bytes of one stream's answer that h2 keeps ready for the socket. A longer answer waits and comes piece by piece.
const SEND_BUFFER: usize = 256 << 10;

/// Requests taken from a connection before they are attended to. More wait for the next turn.
const ACCEPT_BATCH: usize = 256;

/// Turns that a connection takes before it lets the other tasks of its thread run.
const TURNS_MAX: usize = 8;

/// How long a connection on which each request follows the answer before it within this time is looked at again and again before its
/// thread sleeps. To put a thread to sleep and wake it takes 50 us and more on a virtual machine, in latency and in CPU: one client's
/// gets were found to be 1.7 times as many, at the same CPU for each. Beyond it, or for a client that thinks longer, it sleeps at once.
/// All connections of a server share one thread, and take turns: however many linger, it is that one thread that stays awake.
const LINGER: Duration = Duration::from_micros(200);

/// How long a new connection may take to say which protocol it speaks.
const PREFACE_TIMEOUT: Duration = Duration::from_secs(10);

/// How long a peer that speaks HTTP/2 may take to answer its first ping, if keepalive is off; it is sent at once, and tells a client from
/// something that has only sent the preface.
const FIRST_PONG_TIMEOUT: Duration = Duration::from_secs(20);

/// How long an HTTP/1 request's head may take, and how long such a connection may idle.
const HTTP1_HEAD_TIMEOUT: Duration = Duration::from_secs(30);

/// Headers of an HTTP/1 request, and the bytes of its head. Beyond: 431, and the connection is closed.
const HTTP1_HEADERS_MAX: usize = 64;
const HTTP1_HEAD_MAX: usize = 16 << 10;

/// An answer for which the peer gives no window, although it may read other things, is abandoned after this long without a byte.
pub(crate) const STREAM_STALL: Duration = Duration::from_secs(60);

/// How long a request's message may take from its headers to its last byte.
pub(crate) const REQUEST_TIMEOUT: Duration = Duration::from_secs(60);

/// How long we wait after `accept` has failed, at first and at most; it doubles from one failure to the next.
const ACCEPT_PAUSE: Duration = Duration::from_millis(5);
const ACCEPT_PAUSE_MAX: Duration = Duration::from_secs(1);

/// What a listener serves. Both: the client port. HTTP alone: a metrics port.
#[derive(Clone, Default)]
pub(crate) struct App {
    pub grpc: Option<Arc<Router>>,
    pub http: Option<Arc<Http>>,
}

/// A socket that accepts.
pub(crate) enum Listener {
    Tcp(TcpListener),
    /// Its connections begin with a handshake.
    Tls(TcpListener, Acceptor),
    /// The path is removed when the listener is dropped.
    Unix(UnixListener, #[allow(dead_code, reason = "kept for its drop")] SocketPath),
}

/// The file of a listening Unix socket, removed on drop.
pub(crate) struct SocketPath(PathBuf);

impl Drop for SocketPath {
    fn drop(&mut self) {
        // Who has removed it already has done no harm.
        let _ = std::fs::remove_file(&self.0);
    }
}

impl Listener {
    /// Listens on an address; port 0 lets the system pick one. Call it on the runtime that will serve.
    ///
    /// # Errors
    /// `Io`, naming the address.
    pub async fn tcp(addr: SocketAddr) -> Result<Self> {
        let listener = TcpListener::bind(addr).await;
        Ok(Listener::Tcp(listener.map_err(|err| Error::io("listening on", addr.to_string(), err))?))
    }

    /// The same, with TLS; a Unix socket remains as it is.
    pub fn with_tls(self, tls: Acceptor) -> Self {
        match self {
            Listener::Tcp(listener) => Listener::Tls(listener, tls),
            other => other,
        }
    }

    /// Listens on a Unix socket. A socket that a server has left behind there is replaced; one that is in use, or another kind of file, is not.
    ///
    /// # Errors
    /// `Io`, naming the path.
    pub async fn unix(path: &Path) -> Result<Self> {
        use std::os::unix::fs::FileTypeExt;
        let fault = |err| Error::io("listening on", path, err);
        if std::fs::symlink_metadata(path).is_ok_and(|file| file.file_type().is_socket()) {
            match UnixStream::connect(path).await {
                Err(err) if err.kind() == io::ErrorKind::ConnectionRefused => std::fs::remove_file(path).map_err(fault)?,
                _ => return Err(fault(io::ErrorKind::AddrInUse.into())),
            }
        }
        let listener = UnixListener::bind(path).map_err(fault)?;
        Ok(Listener::Unix(listener, SocketPath(path.to_owned())))
    }

    /// Where it listens, if that is an internet address.
    pub fn local_addr(&self) -> Option<SocketAddr> {
        match self {
            Listener::Tcp(listener) | Listener::Tls(listener, _) => listener.local_addr().ok(),
            Listener::Unix(..) => None,
        }
    }

    #[cfg_attr(not(feature = "tls"), allow(unreachable_code, reason = "there is no acceptor then"))]
    fn tls(&self) -> Option<Acceptor> {
        if let Listener::Tls(_, tls) = self { Some(tls.clone()) } else { None }
    }

    async fn accept(&self) -> io::Result<Stream> {
        match self {
            Listener::Tcp(listener) | Listener::Tls(listener, _) => {
                let (stream, _) = listener.accept().await?;
                // Answers are written whole; to wait for more to send would only delay them.
                let _ = stream.set_nodelay(true);
                Ok(Stream::Tcp(stream))
            }
            Listener::Unix(listener, _) => listener.accept().await.map(|(stream, _)| Stream::Unix(stream)),
        }
    }
}

/// A listener at work, and the connections it has accepted.
pub(crate) struct Serving {
    tasks: TaskTracker,
    stop: CancellationToken,
    cut: CancellationToken,
}

impl Serving {
    /// Starts to accept, on the runtime it is called on.
    pub fn start(listener: Listener, limits: Arc<Limits>, app: App) -> Self {
        let (tasks, stop, cut) = (TaskTracker::new(), CancellationToken::new(), CancellationToken::new());
        let accept = accept(listener, limits, app, tasks.clone(), stop.clone(), cut.clone());
        tasks.spawn(accept);
        Serving { tasks, stop, cut }
    }

    /// Stops: accepts no more, tells peers to go away, lets requests end for as long as `drain`, then cuts what is left.
    ///
    /// Streams that do not end by themselves must be told to by their service; those that are not are cut in the end. Returns whether any was.
    pub async fn stop(&self, drain: Duration) -> bool {
        self.stop.cancel();
        self.tasks.close();
        let is_late = tokio::time::timeout(drain, self.tasks.wait()).await.is_err();
        if is_late {
            self.cut.cancel();
            self.tasks.wait().await;
        }
        is_late
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        self.stop.cancel();
        self.cut.cancel();
        self.tasks.close();
    }
}

async fn accept(listener: Listener, limits: Arc<Limits>, app: App, tasks: TaskTracker, stop: CancellationToken, cut: CancellationToken) {
    let mut pause = ACCEPT_PAUSE;
    let mut turned_away = 0u64;
    loop {
        let accepted = tokio::select! {
            () = stop.cancelled() => return,
            accepted = listener.accept() => accepted,
        };
        let stream = match accepted {
            Ok(stream) => stream,
            // The peer was gone before we came to it.
            Err(err) if matches!(err.kind(), io::ErrorKind::ConnectionAborted | io::ErrorKind::Interrupted) => continue,
            Err(err) => {
                // No files or no memory: both may be there again in a while, and until then the call fails at once each time.
                tracing::warn!(error = %err, "accepting a connection");
                tokio::select! {
                    () = stop.cancelled() => return,
                    () = tokio::time::sleep(pause) => {}
                }
                pause = (pause * 2).min(ACCEPT_PAUSE_MAX);
                continue;
            }
        };
        pause = ACCEPT_PAUSE;
        if limits.connections() >= limits.connections_max {
            turned_away += 1;
            if turned_away.is_power_of_two() {
                tracing::warn!(limit = limits.connections_max, turned_away, "too many connections");
            }
            continue;
        }
        let wire = Wire::new(limits.clone());
        let connection = connection(stream, listener.tls(), wire, app.clone(), stop.clone());
        let cut = cut.clone();
        tasks.spawn(async move {
            tokio::select! {
                biased;
                () = cut.cancelled() => {}
                () = connection => {}
            }
        });
    }
}

/// One connection, from its first byte.
async fn connection(stream: Stream, tls: Option<Acceptor>, wire: Arc<Wire>, app: App, stop: CancellationToken) {
    let stream = match (tls, stream) {
        (Some(tls), Stream::Tcp(stream)) => {
            // In a place of its own, which connections without it need not have.
            let mut handshake = Box::pin(tls.accept(stream));
            let shaken = tokio::select! {
                () = stop.cancelled() => return,
                shaken = &mut handshake => shaken,
            };
            match shaken {
                Some(stream) => Stream::Tls(stream),
                None => return,
            }
        }
        (_, stream) => stream,
    };
    let mut io = Io::new(stream, wire.clone());
    let sniffed = tokio::select! {
        () = stop.cancelled() => return,
        sniffed = tokio::time::timeout(PREFACE_TIMEOUT, io.is_http2()) => sniffed,
    };
    match sniffed {
        Ok(Ok(true)) => http2(io, wire, app, stop).await,
        Ok(Ok(false)) => http1(io, wire, app, stop).await,
        Ok(Err(err)) => tracing::debug!(error = %err, "a connection ended before it said anything"),
        Err(_) => tracing::debug!("a connection said nothing"),
    }
}

async fn http1(io: Io, wire: Arc<Wire>, app: App, stop: CancellationToken) {
    let Some(http) = app.http else { return };
    let service = hyper::service::service_fn(move |request: Request<hyper::body::Incoming>| {
        let http = http.clone();
        // A body would mean nothing to any of the paths; hyper reads over it, or closes the connection.
        async move { Ok::<_, std::convert::Infallible>(http.answer(request.method(), request.uri()).await.map(http_body_util::Full::new)) }
    });
    let mut connection = std::pin::pin!(
        hyper::server::conn::http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HTTP1_HEAD_TIMEOUT)
            .max_headers(HTTP1_HEADERS_MAX)
            .max_buf_size(HTTP1_HEAD_MAX)
            .serve_connection(TokioIo::new(io), service)
    );
    let mut stopping = false;
    loop {
        tokio::select! {
            ended = connection.as_mut() => {
                if let Err(err) = ended {
                    tracing::debug!(error = %err, "an HTTP/1 connection ended");
                }
                return;
            }
            () = stop.cancelled(), if !stopping => {
                stopping = true;
                connection.as_mut().graceful_shutdown();
            }
            () = tokio::time::sleep(WRITE_STALL / 4) => {
                if wire.stalled() {
                    return;
                }
            }
        }
    }
}

async fn http2(mut io: Io, wire: Arc<Wire>, app: App, stop: CancellationToken) {
    let options = &wire.limits.options;
    let mut builder = h2::server::Builder::new();
    builder
        .max_concurrent_streams(options.max_concurrent_streams.clamp(1, STREAMS_MAX))
        .max_header_list_size(HEADER_LIST_MAX)
        .max_pending_accept_reset_streams(PENDING_RESETS_MAX)
        .max_local_error_reset_streams(Some(ERROR_RESETS_MAX))
        .max_concurrent_reset_streams(RESETS_REMEMBERED)
        .reset_stream_duration(RESET_MEMORY)
        .initial_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_frame_size(FRAME_MAX)
        .max_send_buffer_size(SEND_BUFFER);
    let out = io.gather();
    let mut handshake = std::pin::pin!(builder.handshake(io));
    let handshake = std::future::poll_fn(|cx| {
        let done = handshake.as_mut().poll(cx);
        // An error shows when h2 reads.
        let _ = lock(&out).poll_flush(cx);
        done
    });
    let mut conn = match tokio::time::timeout(PREFACE_TIMEOUT, handshake).await {
        Ok(Ok(conn)) => conn,
        Ok(Err(err)) => return tracing::debug!(error = %err, "an HTTP/2 connection ended before it began"),
        Err(_) => return tracing::debug!("an HTTP/2 connection did not begin"),
    };
    let now = Instant::now();
    let mut pings = conn.ping_pong();
    let first = pings.as_mut().and_then(|pings| pings.send_ping(Ping::opaque()).ok());
    let timeout = options.keepalive.and_then(|(_, timeout)| timeout).unwrap_or(FIRST_PONG_TIMEOUT);
    let mut peer = Peer {
        conn,
        out,
        calls: FuturesUnordered::new(),
        incoming: VecDeque::new(),
        app,
        pings,
        pong_due: first.map(|()| now + timeout),
        ping_due: None,
        alarm: Box::pin(tokio::time::sleep_until(now + timeout)),
        stop: Box::pin(stop.cancelled_owned()),
        stopping: false,
        idle_since: now,
        is_eager: false,
        wire,
    };
    loop {
        let step = std::future::poll_fn(|cx| match peer.poll(cx) {
            Poll::Ready(ended) => Poll::Ready(Some(ended)),
            Poll::Pending if peer.lingers() => Poll::Ready(None),
            Poll::Pending => Poll::Pending,
        });
        match step.await {
            Some(Ok(())) => return,
            Some(Err(why)) => return tracing::debug!(why, "an HTTP/2 connection was ended"),
            // Back after all others have had their turn, and the sockets have been looked at.
            None => tokio::task::yield_now().await,
        }
    }
}

/// One request, from its headers to the last byte of its answer.
pub(super) type Call = Pin<Box<dyn Future<Output = ()> + Send>>;

/// The other end of an HTTP/2 connection, and all that goes on with it.
struct Peer {
    conn: h2::server::Connection<Io, Bytes>,
    /// What h2 has written and we have not sent.
    out: Arc<Mutex<Outgoing>>,
    calls: FuturesUnordered<Call>,
    /// Requests taken but not attended to yet; empty between two polls, unless answers have to be taken first.
    incoming: VecDeque<(Request<RecvStream>, SendResponse<Bytes>)>,
    app: App,
    wire: Arc<Wire>,
    pings: Option<PingPong>,
    /// When the answer to the ping under way is due.
    pong_due: Option<Instant>,
    /// When to ping next.
    ping_due: Option<Instant>,
    /// Rings at the first of all that is due, or earlier.
    alarm: Pin<Box<Sleep>>,
    stop: Pin<Box<WaitForCancellationFutureOwned>>,
    stopping: bool,
    /// Since when there has been nothing to do, and whether the last request came within [`LINGER`] of that.
    idle_since: Instant,
    is_eager: bool,
}

impl Peer {
    /// Does what can be done, and sends what came of it. Ready when the connection is over.
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<std::result::Result<(), &'static str>> {
        // First what a full socket has left behind: until then nothing is taken.
        self.flush(cx)?;
        let ended = self.take_turns(cx);
        self.flush(cx)?;
        if ended.is_ready() { ended } else { self.poll_time(cx) }
    }

    /// Whether to look for the next request instead of going to sleep.
    fn lingers(&mut self) -> bool {
        self.is_eager &= self.calls.is_empty() && self.idle_since.elapsed() < LINGER;
        self.is_eager
    }

    fn flush(&mut self, cx: &mut Context<'_>) -> std::result::Result<(), &'static str> {
        match lock(&self.out).poll_flush(cx) {
            Poll::Ready(Err(err)) => {
                tracing::debug!(error = %err, "writing to a connection failed");
                Err("error")
            }
            Poll::Ready(Ok(())) | Poll::Pending => Ok(()),
        }
    }

    /// Takes requests and answers them, in turn.
    fn take_turns(&mut self, cx: &mut Context<'_>) -> Poll<std::result::Result<(), &'static str>> {
        if !self.stopping && self.stop.as_mut().poll(cx).is_ready() {
            self.stopping = true;
            self.conn.graceful_shutdown();
        }
        for turn in 0.. {
            if turn == TURNS_MAX {
                cx.waker().wake_by_ref();
                break;
            }
            // All that has come is taken before any of it is answered, since h2 writes each time it is asked for more.
            let may_accept = self.wire.may_accept();
            let ended = self.take_incoming(cx);
            if !self.incoming.is_empty() {
                self.is_eager = self.idle_since.elapsed() < LINGER;
            }
            let mut progress = false;
            // Looked at for each of them: one answer may be all that there is room for.
            while self.wire.may_accept()
                && let Some((request, respond)) = self.incoming.pop_front()
            {
                progress = true;
                let mut call = unary::call(&self.app, request, respond, &self.wire);
                if call.as_mut().poll(cx).is_pending() {
                    self.calls.push(call);
                }
            }
            while let Poll::Ready(Some(())) = self.calls.poll_next_unpin(cx) {
                progress = true;
            }
            // What waited for room has it now, and nothing else might wake us for it.
            progress |= (!may_accept || !self.incoming.is_empty()) && self.wire.may_accept();
            if let Some(ended) = ended {
                return Poll::Ready(ended);
            }
            if !progress {
                break;
            }
            self.idle_since = Instant::now();
        }
        Poll::Pending
    }

    /// Takes what requests have come, and has h2 read and write. Some when the connection is over.
    fn take_incoming(&mut self, cx: &mut Context<'_>) -> Option<std::result::Result<(), &'static str>> {
        loop {
            let ended = if self.wire.may_accept() {
                if self.incoming.len() >= ACCEPT_BATCH {
                    return None;
                }
                match self.conn.poll_accept(cx) {
                    Poll::Ready(Some(Ok(request))) => {
                        self.incoming.push_back(request);
                        continue;
                    }
                    Poll::Ready(Some(Err(err))) => Err(err),
                    Poll::Ready(None) => Ok(()),
                    Poll::Pending => return None,
                }
            } else {
                match self.conn.poll_closed(cx) {
                    Poll::Ready(ended) => ended,
                    Poll::Pending => return None,
                }
            };
            return Some(ended.map_err(|err| {
                tracing::debug!(error = %err, "an HTTP/2 connection failed");
                "error"
            }));
        }
    }

    /// Pings, pongs and stalls.
    fn poll_time(&mut self, cx: &mut Context<'_>) -> Poll<std::result::Result<(), &'static str>> {
        if self.pong_due.is_some()
            && let Some(pings) = &mut self.pings
            && pings.poll_pong(cx).is_ready()
        {
            self.pong_due = None;
            self.ping_due = self.wire.limits.options.keepalive.map(|(interval, _)| Instant::now() + interval);
        }
        loop {
            let stall_due = self.wire.blocked_since().map(|since| since + WRITE_STALL);
            let due = [self.pong_due, self.ping_due, stall_due].into_iter().flatten().min();
            match due {
                // A deadline that has moved away is found when the alarm rings for the old one.
                Some(due) if due < self.alarm.deadline() || self.alarm.is_elapsed() => self.alarm.as_mut().reset(due),
                Some(_) => {}
                None if self.alarm.is_elapsed() => return Poll::Pending,
                None => {}
            }
            ready!(self.alarm.as_mut().poll(cx));
            let now = Instant::now();
            if self.pong_due.is_some_and(|due| due <= now) {
                return Poll::Ready(Err("it has answered no ping"));
            }
            if stall_due.is_some_and(|due| due <= now) {
                return Poll::Ready(Err("it has taken nothing"));
            }
            if self.ping_due.is_some_and(|due| due <= now) {
                self.ping_due = None;
                let sent = self.pings.as_mut().is_some_and(|pings| pings.send_ping(Ping::opaque()).is_ok());
                let timeout = self.wire.limits.options.keepalive.and_then(|(_, timeout)| timeout);
                self.pong_due = timeout.filter(|_| sent).map(|timeout| now + timeout);
                // So that h2 writes it.
                cx.waker().wake_by_ref();
            }
        }
    }
}

/// Abandons a stream with a reason.
pub(super) fn refuse(mut respond: SendResponse<Bytes>) {
    respond.send_reset(Reason::REFUSED_STREAM);
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering::Relaxed;

    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpStream;

    use super::super::testing::raw::{
        CONTINUATION, DATA, END_HEADERS, END_STREAM, HEADERS, PING, RST_STREAM, WINDOW_UPDATE, frame, frames, headers, hello,
    };
    use super::super::testing::*;
    use super::super::wire::{HELD_BYTES_MAX, PARTIAL_BYTES_MAX, PREFACE, ServeOptions};
    use super::*;
    use crate::proto::etcdserverpb::{PutRequest, RangeRequest};

    const PUT: &str = "/etcdserverpb.KV/Put";
    const RANGE: &str = "/etcdserverpb.KV/Range";

    fn put(key: &'static str) -> Bytes {
        message(&PutRequest { key: key.into(), ..Default::default() })
    }

    fn range(kib: i64) -> Bytes {
        message(&RangeRequest { key: "k".into(), limit: kib, ..Default::default() })
    }

    /// That the server still serves.
    async fn well(server: &TestServer) {
        let client = server.connect().await;
        let answer = post(&client, request(PUT), vec![put("k")]).await.unwrap();
        assert_eq!(answer.status(), (0, ""));
    }

    /// Writes while it can be, and reads to the end.
    async fn attack(server: &TestServer, bytes: &[u8]) -> Vec<u8> {
        let (mut read, mut write) = TcpStream::connect(server.addr).await.unwrap().into_split();
        let mut received = Vec::new();
        let writing = async {
            // It fails when the server has had enough.
            let _ = write.write_all(bytes).await;
        };
        let reading = async {
            // A reset instead of an end is to be expected from who has not read all that we wrote.
            let _ = read.read_to_end(&mut received).await;
        };
        tokio::join!(writing, reading);
        received
    }

    #[tokio::test]
    async fn rapid_reset() {
        let server = TestServer::start().await;
        let mut bytes = hello(&[]);
        for stream in (1..20_000).step_by(2) {
            bytes.extend(frame(HEADERS, END_HEADERS, stream, &headers(PUT)));
            bytes.extend(frame(RST_STREAM, 0, stream, &[0, 0, 0, 8]));
        }
        let received = attack(&server, &bytes).await;
        // A reset connection may have lost what was written last.
        assert!(received.is_empty() || frames(&received).len() < 1000);
        server.until(|server| server.limits.connections() == 0 && server.limits.streams() == 0).await;
        well(&server).await;
    }

    /// Each stream is reset only after its handler has begun: no limit of h2's counts these, but no handler outlives its stream.
    #[tokio::test]
    async fn slow_reset() {
        let server = TestServer::start().await;
        let client = server.connect().await;
        for count in 1..=200 {
            let (response, mut stream) = client.clone().ready().await.unwrap().send_request(request(PUT).body(()).unwrap(), false).unwrap();
            stream.send_data(put("hang"), true).unwrap();
            server.until(|server| server.limits.streams() == 1).await;
            stream.send_reset(Reason::CANCEL);
            drop(response);
            server.until(|server| server.limits.streams() == 0).await;
            assert_eq!(server.state.dropped.load(Relaxed), count);
        }
        well(&server).await;
    }

    #[tokio::test]
    async fn too_many_streams() {
        let server = TestServer::start_with(ServeOptions { max_concurrent_streams: 10, keepalive: None }).await;
        let mut stream = TcpStream::connect(server.addr).await.unwrap();
        let mut bytes = hello(&[]);
        for id in (1..41).step_by(2) {
            bytes.extend(frame(HEADERS, END_HEADERS, id, &headers(PUT)));
            bytes.extend(frame(DATA, END_STREAM, id, &put("hang")));
        }
        stream.write_all(&bytes).await.unwrap();
        let mut received = Vec::new();
        while frames(&received).iter().filter(|(kind, _)| *kind == RST_STREAM).count() < 10 {
            assert!(stream.read_buf(&mut received).await.unwrap() > 0);
        }
        // First of all; that data comes on streams that are closed by then is said as well.
        let resets: Vec<_> = frames(&received).into_iter().filter(|(kind, _)| *kind == RST_STREAM).collect();
        assert!(resets[..10].iter().all(|(_, reason)| reason[..] == [0, 0, 0, 7]), "REFUSED_STREAM");
        assert_eq!(server.limits.streams(), 10);
        drop(stream);
        server.until(|server| server.limits.streams() == 0).await;
        assert_eq!(server.state.dropped.load(Relaxed), 10);
    }

    #[tokio::test]
    async fn continuation_flood() {
        let server = TestServer::start().await;
        let mut bytes = hello(&[]);
        bytes.extend(frame(HEADERS, 0, 1, &headers(PUT)));
        let more = [&[0x00, 1, b'x', 126][..], &[b'y'; 126]].concat().repeat(100);
        for _ in 0..2000 {
            bytes.extend(frame(CONTINUATION, 0, 1, &more));
        }
        let received = attack(&server, &bytes).await;
        assert!(frames(&received).len() < 10);
        server.until(|server| server.limits.connections() == 0).await;
        well(&server).await;
    }

    #[tokio::test]
    async fn large_headers() {
        let server = TestServer::start().await;
        let client = server.connect().await;
        let answer = post(&client, request(PUT).header("large", "x".repeat(40 << 10)), vec![put("k")]).await.unwrap();
        assert_eq!(answer.code, 431);
        let answer = post(&client, request(PUT).header("small", "x".repeat(20 << 10)), vec![put("k")]).await.unwrap();
        assert_eq!(answer.status(), (0, ""));
    }

    /// A client that asks for more and more and reads nothing: what is made for it is bounded, and in the end it is cut.
    #[tokio::test]
    async fn never_reads() {
        let server = TestServer::start().await;
        let mut stream = TcpStream::connect(server.addr).await.unwrap();
        let most = (1 << 31) - 1;
        stream.write_all(&hello(&[(4, most)])).await.unwrap();
        stream.write_all(&frame(WINDOW_UPDATE, 0, 0, &(most - 65_535).to_be_bytes())).await.unwrap();
        for id in (1..201).step_by(2) {
            let request = [frame(HEADERS, END_HEADERS, id, &headers(RANGE)), frame(DATA, END_STREAM, id, &range(1 << 20))].concat();
            stream.write_all(&request).await.unwrap();
        }
        server.until(|server| server.state.chunks.load(Relaxed) > 0).await;
        server.until_later(|server| server.limits.connections() == 0).await;
        assert_eq!(server.limits.streams(), 0);
        let made = server.state.chunks.load(Relaxed);
        assert!(made < 64 << 10, "{made} KiB of 100 GiB were made");
        drop(stream);
    }

    /// One that reads, but gives no window: its answers are given up one by one, its connection stays.
    #[tokio::test]
    async fn gives_no_window() {
        let server = TestServer::start().await;
        let mut stream = TcpStream::connect(server.addr).await.unwrap();
        stream.write_all(&hello(&[(4, 0)])).await.unwrap();
        let request =
            |id, path, message: &[u8]| [frame(HEADERS, END_HEADERS, id, &headers(path)), frame(DATA, END_STREAM, id, message)].concat();
        stream.write_all(&request(1, RANGE, &range(1000))).await.unwrap();
        stream.write_all(&request(3, PUT, &put("k"))).await.unwrap();
        server.until(|server| server.limits.streams() == 2).await;
        tokio::time::pause();
        let mut received = Vec::new();
        while frames(&received).iter().filter(|(kind, _)| *kind == RST_STREAM).count() < 2 {
            assert!(stream.read_buf(&mut received).await.unwrap() > 0);
            for (kind, payload) in frames(&received).iter().filter(|(kind, _)| *kind == PING) {
                stream.write_all(&frame(*kind, 1, 0, payload)).await.unwrap();
            }
        }
        assert_eq!(server.limits.connections(), 1);
        assert_eq!(server.limits.streams(), 0);
        assert!(server.state.chunks.load(Relaxed) <= 1);
    }

    /// Requests of which each has an answer of 1 MiB, over a connection without window.
    async fn ask_for_mibs(server: &TestServer, key: &'static str, count: u32) -> TcpStream {
        let mut stream = TcpStream::connect(server.addr).await.unwrap();
        let mut bytes = hello(&[(4, 0)]);
        for id in (1..2 * count).step_by(2) {
            bytes.extend(frame(HEADERS, END_HEADERS, id, &headers(PUT)));
            bytes.extend(frame(DATA, END_STREAM, id, &put(key)));
        }
        stream.write_all(&bytes).await.unwrap();
        stream
    }

    /// All requests come in one packet; however their answers are made, no more of them than the limit are held.
    #[tokio::test]
    async fn asks_for_much_at_once() {
        for key in ["mib", "mib later"] {
            let server = TestServer::start().await;
            let mut stream = ask_for_mibs(&server, key, 100).await;
            server.until(|server| server.limits.held.load(Relaxed) >= HELD_BYTES_MAX).await;
            // Whatever else would be made is made by then.
            tokio::time::sleep(Duration::from_millis(100)).await;
            let held = server.limits.held.load(Relaxed);
            assert!(held <= HELD_BYTES_MAX + (1 << 20), "{key}: {held} bytes are held");
            // The window opens, and every one of them is answered.
            let most = (1u32 << 31) - 1;
            stream.write_all(&frame(4, 0, 0, &[&[0, 4][..], &most.to_be_bytes()].concat())).await.unwrap();
            stream.write_all(&frame(WINDOW_UPDATE, 0, 0, &(most - 65_535).to_be_bytes())).await.unwrap();
            let mut received = 0;
            let mut buf = vec![0; 1 << 20];
            while received < 100 << 20 {
                let read = stream.read(&mut buf).await.unwrap();
                assert!(read > 0);
                received += read;
            }
            server.until(|server| server.limits.streams() == 0).await;
            assert_eq!(server.limits.held.load(Relaxed), 0);
        }
    }

    /// As above, with answers that are made in pieces, and a window for no more than their prefixes.
    #[tokio::test]
    async fn asks_for_many_streamed_answers() {
        let server = TestServer::start().await;
        let mut stream = TcpStream::connect(server.addr).await.unwrap();
        let mut bytes = hello(&[(4, 5)]);
        let range = message(&RangeRequest { key: "mib".into(), limit: 10, ..Default::default() });
        for id in (1..200).step_by(2) {
            bytes.extend(frame(HEADERS, END_HEADERS, id, &headers(RANGE)));
            bytes.extend(frame(DATA, END_STREAM, id, &range));
        }
        stream.write_all(&bytes).await.unwrap();
        server.until(|server| server.limits.held.load(Relaxed) >= HELD_BYTES_MAX).await;
        tokio::time::sleep(Duration::from_millis(100)).await;
        let held = server.limits.held.load(Relaxed);
        assert!(held <= HELD_BYTES_MAX + (2 << 20), "{held} bytes are held");
        drop(stream);
        server.until(|server| server.limits.held.load(Relaxed) == 0).await;
    }

    #[tokio::test]
    async fn held_answers_of_all_connections() {
        let (state, metrics) = (Arc::new(State::default()), crate::metrics::Metrics::new("3.7.1", "3.7"));
        let mut limits = Limits::new(ServeOptions { max_concurrent_streams: 100, keepalive: None });
        Arc::get_mut(&mut limits).unwrap().held_max = 2 << 20;
        let listener = Listener::tcp(([127, 0, 0, 1], 0).into()).await.unwrap();
        let addr = listener.local_addr().unwrap();
        let serving = Serving::start(listener, limits.clone(), app(&state, &metrics));
        let server = TestServer { addr, state, metrics, limits, serving };
        let mut peers = Vec::new();
        for key in ["mib", "mib later", "mib", "mib later"] {
            peers.push(ask_for_mibs(&server, key, 10).await);
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
        let held = server.limits.held.load(Relaxed);
        assert!((4 << 20..7 << 20).contains(&held), "each holds one, and the first two a second: {held} bytes");
        // Who takes its answers gets them, however many.
        let client = server.connect().await;
        for answer in futures_util::future::join_all((0..10).map(|_| post(&client, request(PUT), vec![put("mib later")]))).await {
            assert_eq!(answer.unwrap().status(), (0, ""));
        }
        drop(peers);
        server.until(|server| server.limits.held.load(Relaxed) == 0).await;
    }

    /// The same with streams: one that has an end is given up, one that may rest is not.
    #[tokio::test]
    async fn gives_streams_no_window() {
        let server = TestServer::start().await;
        let mut stream = TcpStream::connect(server.addr).await.unwrap();
        stream.write_all(&hello(&[(4, 0)])).await.unwrap();
        for (id, path) in [(1, "/endless/Steady"), (3, "/endless/Any")] {
            let request = [frame(HEADERS, END_HEADERS, id, &headers(path)), frame(DATA, END_STREAM, id, &put("k"))].concat();
            stream.write_all(&request).await.unwrap();
        }
        server.until(|server| server.limits.streams() == 2).await;
        tokio::time::pause();
        let began = Instant::now();
        let mut received = Vec::new();
        while server.limits.streams() == 2 && began.elapsed() < 2 * STREAM_STALL {
            let read = tokio::time::timeout(Duration::from_secs(1), stream.read_buf(&mut received)).await;
            assert!(read.is_err() || read.unwrap().unwrap() > 0);
            for (kind, payload) in frames(&received).iter().filter(|(kind, _)| *kind == PING) {
                stream.write_all(&frame(*kind, 1, 0, payload)).await.unwrap();
            }
        }
        assert!(began.elapsed() >= STREAM_STALL - Duration::from_secs(1));
        assert_eq!((server.limits.streams(), server.state.dropped.load(Relaxed)), (1, 1));
        tokio::time::sleep(2 * STREAM_STALL).await;
        assert_eq!((server.limits.connections(), server.limits.streams()), (1, 1));
    }

    /// Asks for pongs without end and reads none of them.
    #[tokio::test]
    async fn ping_flood() {
        let server = TestServer::start().await;
        let stream = TcpStream::connect(server.addr).await.unwrap();
        let (_read, mut write) = stream.into_split();
        let flood = tokio::spawn(async move {
            let pings = frame(PING, 0, 0, &[0; 8]).repeat(1000);
            if write.write_all(&hello(&[])).await.is_ok() {
                while write.write_all(&pings).await.is_ok() {}
            }
        });
        server.until(|server| server.limits.connections() == 1).await;
        tokio::time::pause();
        flood.await.unwrap();
        server.until(|server| server.limits.connections() == 0).await;
        tokio::time::resume();
        well(&server).await;
    }

    /// What a connection says at first, and that it is cut when nothing follows.
    #[tokio::test]
    async fn says_nothing() {
        let starts: [&[u8]; 5] =
            [b"", b"PRI * HT", PREFACE, b"GET /health HTTP/1.1\r\nHost", b"POST /x HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\n"];
        for start in starts {
            let server = TestServer::start().await;
            let mut stream = TcpStream::connect(server.addr).await.unwrap();
            stream.write_all(start).await.unwrap();
            tokio::time::pause();
            // The last one is answered before it is cut.
            let _ = stream.read_to_end(&mut Vec::new()).await;
            tokio::time::resume();
            server.until(|server| server.limits.connections() == 0).await;
        }
    }

    /// Opens streams and sends nothing on them.
    #[tokio::test]
    async fn requests_without_a_message() {
        let server = TestServer::start().await;
        let client = server.connect().await;
        let (response, _stream) = client.clone().send_request(request(PUT).body(()).unwrap(), false).unwrap();
        server.until(|server| server.limits.streams() == 1).await;
        tokio::time::pause();
        assert_eq!(response.await.unwrap().headers()["grpc-status"], "4");
        server.until(|server| server.limits.streams() == 0).await;
    }

    #[tokio::test]
    async fn a_dead_peer_is_found_by_pings() {
        let keepalive = Some((Duration::from_secs(60), Some(Duration::from_secs(20))));
        let server = TestServer::start_with(ServeOptions { max_concurrent_streams: 100, keepalive }).await;
        let mut stream = TcpStream::connect(server.addr).await.unwrap();
        stream.write_all(&hello(&[])).await.unwrap();
        let mut received = Vec::new();
        let pings = |received: &[u8]| frames(received).into_iter().filter(|(kind, _)| *kind == PING).collect::<Vec<_>>();
        while pings(&received).is_empty() {
            stream.read_buf(&mut received).await.unwrap();
        }
        // The first ping is answered, the one a minute later is not.
        stream.write_all(&frame(PING, 1, 0, &pings(&received)[0].1)).await.unwrap();
        let began = Instant::now();
        // Answered by the server before the clock begins to jump: it has seen our pong then.
        stream.write_all(&frame(PING, 0, 0, b"question")).await.unwrap();
        while !pings(&received).iter().any(|(_, payload)| payload == b"question") {
            stream.read_buf(&mut received).await.unwrap();
        }
        server.until_later(|server| server.limits.connections() == 0).await;
        assert!(began.elapsed() >= Duration::from_secs(80));
        stream.read_to_end(&mut received).await.unwrap();
        assert_eq!(pings(&received).len(), 3);
    }

    #[tokio::test]
    async fn too_many_connections() {
        let (state, metrics) = (Arc::new(State::default()), crate::metrics::Metrics::new("3.7.1", "3.7"));
        let mut limits = Limits::new(ServeOptions { max_concurrent_streams: 10, keepalive: None });
        Arc::get_mut(&mut limits).unwrap().connections_max = 2;
        let listener = Listener::tcp(([127, 0, 0, 1], 0).into()).await.unwrap();
        let addr = listener.local_addr().unwrap();
        let serving = Serving::start(listener, limits.clone(), app(&state, &metrics));
        let server = TestServer { addr, state, metrics, limits, serving };
        let one = server.connect().await;
        let _two = server.connect().await;
        assert!(TcpStream::connect(addr).await.unwrap().read(&mut [0]).await.is_ok_and(|read| read == 0), "it is turned away");
        assert_eq!(post(&one, request(PUT), vec![put("k")]).await.unwrap().status(), (0, ""));
        drop(one);
        server.until(|server| server.limits.connections() == 1).await;
        well(&server).await;
    }

    #[tokio::test]
    async fn a_graceful_end() {
        let server = TestServer::start().await;
        let client = server.connect().await;
        let idle = TcpStream::connect(server.addr).await.unwrap();
        let (later, _stream) = {
            let (response, mut stream) = client.clone().send_request(request(PUT).body(()).unwrap(), false).unwrap();
            stream.send_data(put("later"), true).unwrap();
            (response, stream)
        };
        server.until(|server| server.limits.streams() == 1).await;
        let (answer, _) = tokio::join!(later, server.serving.stop(Duration::from_secs(3600)));
        assert_eq!(answer.unwrap().status(), 200);
        assert_eq!(server.limits.connections(), 0);
        assert!(TcpStream::connect(server.addr).await.is_err(), "nobody listens any more");
        drop(idle);
    }

    #[tokio::test]
    async fn an_end_that_waits_for_nobody() {
        let server = TestServer::start().await;
        let client = server.connect().await;
        let (hangs, mut stream) = client.clone().send_request(request(PUT).body(()).unwrap(), false).unwrap();
        stream.send_data(put("hang"), true).unwrap();
        server.until(|server| server.limits.streams() == 1).await;
        server.serving.stop(Duration::from_millis(20)).await;
        assert!(hangs.await.is_err());
        assert_eq!((server.limits.connections(), server.limits.streams(), server.state.dropped.load(Relaxed)), (0, 0, 1));
    }

    #[tokio::test]
    async fn a_dropped_server_leaves_nothing_behind() {
        let TestServer { limits, serving, state, addr, metrics } = TestServer::start().await;
        let stream = TcpStream::connect(addr).await.unwrap();
        let (mut client, connection): (h2::client::SendRequest<Bytes>, _) = h2::client::handshake(stream).await.unwrap();
        let connection = tokio::spawn(connection);
        let (_response, mut stream) = client.send_request(request(PUT).body(()).unwrap(), false).unwrap();
        stream.send_data(put("hang"), true).unwrap();
        let server = TestServer { limits, serving, state, addr, metrics };
        server.until(|server| server.limits.streams() == 1).await;
        let TestServer { limits, serving, state, .. } = server;
        drop(serving);
        // The connection ends, one way or the other.
        let _ = connection.await.unwrap();
        while Arc::strong_count(&state) > 1 || limits.connections() > 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    #[tokio::test]
    async fn unix_sockets() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let (state, metrics) = (Arc::new(State::default()), crate::metrics::Metrics::new("3.7.1", "3.7"));
        let limits = Limits::new(ServeOptions { max_concurrent_streams: 10, keepalive: None });
        // One that was left behind is replaced, one in use is not, and nothing else is.
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        let listener = Listener::unix(&path).await.unwrap();
        assert!(Listener::unix(&path).await.is_err());
        assert!(Listener::unix(dir.path()).await.is_err());
        let serving = Serving::start(listener, limits.clone(), app(&state, &metrics));
        let (client, connection) = h2::client::handshake(UnixStream::connect(&path).await.unwrap()).await.unwrap();
        let connection = tokio::spawn(connection);
        assert_eq!(post(&client, request(PUT), vec![put("k")]).await.unwrap().status(), (0, ""));
        serving.stop(Duration::from_secs(3600)).await;
        drop(client);
        connection.await.unwrap().unwrap();
        assert!(!path.exists());
    }

    #[tokio::test]
    async fn plain_http_on_the_same_port() {
        let server = TestServer::start().await;
        let received =
            attack(&server, b"GET /health HTTP/1.1\r\nHost: x\r\n\r\nGET /livez HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").await;
        let text = String::from_utf8(received).unwrap();
        assert!(
            text.starts_with("HTTP/1.1 200 OK\r\n") && text.contains("{\"health\":\"true\",\"reason\":\"\"}HTTP/1.1 200 OK\r\n"),
            "{text}"
        );
        assert!(text.ends_with("\r\n\r\nok\n"), "{text}");
        let received = attack(&server, b"nonsense\r\n\r\n").await;
        assert!(received.starts_with(b"HTTP/1.1 400 "));

        let client = server.connect().await;
        let get = |path: &str| http::Request::get(format!("http://x{path}"));
        let answer = post(&client, get("/livez?verbose"), vec![Bytes::new()]).await.unwrap();
        assert_eq!((answer.code, &answer.body[..]), (200, &b"[+]serializable_read ok\nok\n"[..]));
        let answer = post(&client, get("/metrics"), vec![Bytes::new()]).await.unwrap();
        assert!(answer.body.ends_with(b"\n") && answer.body.len() > 20_000);
        let answer = post(&client, get("/nothing"), vec![Bytes::new()]).await.unwrap();
        assert_eq!((answer.code, &answer.body[..]), (404, &b"404 page not found\n"[..]));
    }

    #[tokio::test]
    async fn unfinished_requests_are_counted() {
        let limits = Limits::new(ServeOptions { max_concurrent_streams: 10, keepalive: None });
        let wire = Wire::new(limits.clone());
        let (mut one, mut other) = (wire.partial(), wire.partial());
        assert!(one.grow(PARTIAL_BYTES_MAX - 10).is_ok() && other.grow(10).is_ok() && other.grow(1).is_err());
        drop(one);
        assert!(wire.partial().grow(PARTIAL_BYTES_MAX - 11).is_ok() && other.grow(1).is_ok());
        drop(other);
        let wires: Vec<_> = (0..9).map(|_| Wire::new(limits.clone())).collect();
        let mut partials: Vec<_> = wires.iter().map(Wire::partial).collect();
        let refused = partials.iter_mut().filter_map(|partial| partial.grow(PARTIAL_BYTES_MAX).err()).count();
        assert_eq!(refused, 1, "all connections together");
        drop((partials, wires, wire));
        assert_eq!((limits.partial.load(Relaxed), limits.connections()), (0, 0));
    }
}
