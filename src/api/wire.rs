//! A connection below its protocol: its bytes, and what is counted of it.
//!
//! [`Io`] is the socket as HTTP sees it, [`Outgoing`] the way out of it. h2 wants to write each frame of some size by itself; what it writes
//! is gathered here instead, and leaves in one write when the connection's task has done all it could ([`Outgoing::poll_flush`]):
//!
//! ```text
//! h2: HEADERS | DATA 300 B | HEADERS | HEADERS | DATA 300 B | HEADERS | flush
//!        +--------+------------+---------+----------+------------+---> gathered ---> one write, at the end of the poll
//! ```
//!
//! [`Wire`] counts what one connection holds and [`Limits`] what all of a server's do, each by guards that give back what they counted.
//!
//! # Invariants
//! - Bytes leave in the order in which they were written, and none stays behind when the connection's task goes to sleep, unless the
//!   socket takes no more. Then [`Wire::blocked_since`] tells since when, and the task is woken when it does.
//! - No more than [`GATHER_MAX`] is gathered: beyond it a write goes to the socket, or waits for it.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Buf, Bytes};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf};
use tokio::net::{TcpStream, UnixStream, tcp, unix};
use tokio::sync::Notify;
use tokio::time::Instant;
use tonic::Status;

use crate::lock::lock;
use crate::tls::ServerStream;

/// Connections of one server at the same time, unless the limit of open files leaves room for fewer. One that comes beyond
/// it is closed at once, so that its client turns to another member.
const CONNECTIONS_MAX: usize = 10_000;

/// Open files of the process that are left to everything but connections.
const FILES_RESERVED: usize = 256;

/// Streams of all connections together. A request beyond it is refused with REFUSED_STREAM, which is safe to retry.
const SERVER_STREAMS_MAX: usize = 262_144;

/// Answers that wait for the peer's window, per connection. Beyond it the connection's further requests wait unread, and large answers
/// unencoded.
pub(super) const HELD_BYTES_MAX: usize = 8 << 20;

/// As above, all connections together. Beyond it a connection gets on only while no answer of its own waits: so each gets its answers,
/// one by one, whatever the others do.
const SERVER_HELD_BYTES_MAX: usize = 512 << 20;

/// Requests of which a part has come, per connection. Beyond it a request is refused with ResourceExhausted.
pub(super) const PARTIAL_BYTES_MAX: usize = 64 << 20;

/// As above, all connections together.
const SERVER_PARTIAL_BYTES_MAX: usize = 512 << 20;

/// A connection of which the peer takes nothing although there is something to take is cut after this long.
pub(super) const WRITE_STALL: Duration = Duration::from_secs(20);

/// Bytes that wait for the end of their connection's turn, to leave in one write. Beyond it they leave earlier, or wait in h2. The
/// allocation may be twice that.
const GATHER_MAX: usize = 64 << 10;

/// What is kept allocated for them between two turns.
const GATHER_KEPT: usize = 8 << 10;

/// What of the configuration concerns connections.
#[derive(Clone, Debug)]
pub(crate) struct ServeOptions {
    /// Streams per connection; more than [`STREAMS_MAX`](super::serve::STREAMS_MAX) counts as that.
    pub max_concurrent_streams: u32,
    /// How often a peer is pinged, and how long it may take to answer; none: never, after the first time.
    pub keepalive: Option<(Duration, Option<Duration>)>,
}

/// What all listeners of a server share: the options and what is counted over all connections.
pub(crate) struct Limits {
    pub(super) options: ServeOptions,
    pub(super) connections_max: usize,
    connections: AtomicUsize,
    pub(super) streams: AtomicUsize,
    pub(super) partial: AtomicUsize,
    pub(super) held_max: usize,
    pub(super) held: AtomicUsize,
}

impl Limits {
    pub fn new(options: ServeOptions) -> Arc<Self> {
        let files = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
        let files = files.and_then(|files| usize::try_from(files).ok()).unwrap_or(usize::MAX);
        let connections_max = CONNECTIONS_MAX.min(files.saturating_sub(FILES_RESERVED)).max(16);
        Arc::new(Limits {
            options,
            connections_max,
            connections: AtomicUsize::new(0),
            streams: AtomicUsize::new(0),
            partial: AtomicUsize::new(0),
            held_max: SERVER_HELD_BYTES_MAX,
            held: AtomicUsize::new(0),
        })
    }

    /// Connections open now.
    pub fn connections(&self) -> usize {
        self.connections.load(Ordering::Relaxed)
    }

    /// Requests and streams open now, over all connections.
    pub fn streams(&self) -> usize {
        self.streams.load(Ordering::Relaxed)
    }
}

/// What is counted of one connection, shared by its task and its calls.
pub(super) struct Wire {
    pub(super) limits: Arc<Limits>,
    opened: Instant,
    /// Milliseconds from `opened` to when the socket would take no more, and 1; 0 while it takes.
    blocked: AtomicU64,
    held: AtomicUsize,
    /// Told whenever less is held than before.
    less_held: Notify,
    partial: AtomicUsize,
}

impl Wire {
    pub fn new(limits: Arc<Limits>) -> Arc<Self> {
        limits.connections.fetch_add(1, Ordering::Relaxed);
        Arc::new(Wire {
            limits,
            opened: Instant::now(),
            blocked: AtomicU64::new(0),
            held: AtomicUsize::new(0),
            less_held: Notify::new(),
            partial: AtomicUsize::new(0),
        })
    }

    /// Whether further requests are taken: not from a peer that does not take what it has asked for.
    pub fn may_accept(&self) -> bool {
        self.blocked.load(Ordering::Relaxed) == 0 && self.has_room()
    }

    /// Whether another answer may be held. The first of a connection always may.
    pub fn has_room(&self) -> bool {
        let held = self.held.load(Ordering::Relaxed);
        held == 0 || (held < HELD_BYTES_MAX && self.limits.held.load(Ordering::Relaxed) < self.limits.held_max)
    }

    /// Waits until there is room. Who has waited holds its answer, or ends, in the same poll: the next in line is woken already.
    pub async fn room(&self) {
        while !self.has_room() {
            self.less_held.notified().await;
        }
        self.less_held.notify_one();
    }

    pub fn blocked_since(&self) -> Option<Instant> {
        let blocked = self.blocked.load(Ordering::Relaxed).checked_sub(1)?;
        Some(self.opened + Duration::from_millis(blocked))
    }

    pub fn stalled(&self) -> bool {
        self.blocked_since().is_some_and(|since| since.elapsed() >= WRITE_STALL)
    }

    fn note_taken(&self) {
        self.blocked.store(0, Ordering::Relaxed);
    }

    fn note_blocked(&self) {
        if self.blocked.load(Ordering::Relaxed) == 0 {
            self.blocked.store(self.opened.elapsed().as_millis() as u64 + 1, Ordering::Relaxed);
        }
    }

    /// Counts an answer that waits, until the guard is dropped.
    pub fn hold(self: &Arc<Self>, bytes: usize) -> Held {
        self.held.fetch_add(bytes, Ordering::Relaxed);
        self.limits.held.fetch_add(bytes, Ordering::Relaxed);
        Held { wire: self.clone(), bytes }
    }

    /// Counts a stream, until the guard is dropped; none if there are too many.
    pub fn open_stream(self: &Arc<Self>) -> Option<OpenStream> {
        let open = OpenStream(self.clone());
        (self.limits.streams.fetch_add(1, Ordering::Relaxed) < SERVER_STREAMS_MAX).then_some(open)
    }

    /// For the bytes of a request of which not all have come.
    pub fn partial(self: &Arc<Self>) -> Partial {
        Partial { wire: self.clone(), bytes: 0 }
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        self.limits.connections.fetch_sub(1, Ordering::Relaxed);
    }
}

/// An open stream is counted while this lives.
pub(super) struct OpenStream(Arc<Wire>);

impl Drop for OpenStream {
    fn drop(&mut self) {
        self.0.limits.streams.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Bytes of an answer are counted while this lives.
pub(super) struct Held {
    wire: Arc<Wire>,
    bytes: usize,
}

impl Drop for Held {
    fn drop(&mut self) {
        self.wire.held.fetch_sub(self.bytes, Ordering::Relaxed);
        self.wire.limits.held.fetch_sub(self.bytes, Ordering::Relaxed);
        self.wire.less_held.notify_one();
    }
}

/// Bytes of an unfinished request are counted while this lives.
pub(super) struct Partial {
    wire: Arc<Wire>,
    bytes: usize,
}

impl Partial {
    /// Counts more.
    ///
    /// # Errors
    /// When that is too many, of this connection or of all.
    pub fn grow(&mut self, bytes: usize) -> Result<(), Status> {
        self.bytes += bytes;
        let here = self.wire.partial.fetch_add(bytes, Ordering::Relaxed) + bytes;
        let all = self.wire.limits.partial.fetch_add(bytes, Ordering::Relaxed) + bytes;
        let fits = here <= PARTIAL_BYTES_MAX && all <= SERVER_PARTIAL_BYTES_MAX;
        if fits { Ok(()) } else { Err(Status::resource_exhausted("etcdserver: too many requests")) }
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        self.wire.partial.fetch_sub(self.bytes, Ordering::Relaxed);
        self.wire.limits.partial.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

/// A connected socket.
pub(super) enum Stream {
    Tcp(TcpStream),
    Unix(UnixStream),
    Tls(ServerStream),
}

enum ReadHalf {
    Tcp(tcp::OwnedReadHalf),
    Unix(unix::OwnedReadHalf),
    /// TLS has one state for both ways. They are taken in turn, by the connection's task alone.
    Tls(Arc<Mutex<ServerStream>>),
}

enum WriteHalf {
    Tcp(tcp::OwnedWriteHalf),
    Unix(unix::OwnedWriteHalf),
    Tls(Arc<Mutex<ServerStream>>),
}

/// The way out of a connection: what has been written to it and has not left yet.
pub(super) struct Outgoing {
    half: WriteHalf,
    gathered: Vec<u8>,
    /// How many of these have left.
    sent: usize,
    wire: Arc<Wire>,
}

impl Outgoing {
    /// Sends what was gathered. Ready when all of it has left.
    pub fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if let WriteHalf::Tls(tls) = &self.half {
            let mut tls = lock(tls);
            let before = tls.taken();
            let sent = poll_send(&mut tls, cx, &self.gathered, &mut self.sent);
            if tls.taken() != before {
                self.wire.note_taken();
            }
            if sent.is_pending() {
                self.wire.note_blocked();
            }
            ready!(sent)?;
        }
        while let Some(left) = self.gathered.get(self.sent..).filter(|left| !left.is_empty()) {
            // Whatever budget this turn has used up: only the socket may say that it takes no more.
            let write = match &mut self.half {
                WriteHalf::Tcp(half) => half.try_write(left),
                WriteHalf::Unix(half) => half.try_write(left),
                // Nothing is left.
                WriteHalf::Tls(_) => Ok(0),
            };
            let written = match (write, &mut self.half) {
                (Err(err), WriteHalf::Tcp(half)) if err.kind() == io::ErrorKind::WouldBlock => Pin::new(half).poll_write(cx, left),
                (Err(err), WriteHalf::Unix(half)) if err.kind() == io::ErrorKind::WouldBlock => Pin::new(half).poll_write(cx, left),
                (written, _) => Poll::Ready(written),
            };
            match written {
                Poll::Ready(Ok(0)) => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                Poll::Ready(Ok(len)) => self.sent += len,
                Poll::Ready(Err(err)) => return Poll::Ready(Err(err)),
                Poll::Pending => {
                    self.wire.note_blocked();
                    return Poll::Pending;
                }
            }
            self.wire.note_taken();
        }
        self.gathered.clear();
        self.gathered.shrink_to(GATHER_KEPT);
        self.sent = 0;
        Poll::Ready(Ok(()))
    }

    /// Takes some of what is written, at least a byte; if there is no room, what was gathered has to leave first.
    fn poll_gather(&mut self, cx: &mut Context<'_>, bufs: &[IoSlice<'_>]) -> Poll<io::Result<usize>> {
        if self.gathered.len() >= GATHER_MAX {
            ready!(self.poll_flush(cx))?;
        }
        let mut room = GATHER_MAX - self.gathered.len();
        let before = room;
        for buf in bufs {
            let len = buf.len().min(room);
            self.gathered.extend_from_slice(&buf[..len]);
            room -= len;
        }
        Poll::Ready(Ok(before - room))
    }
}

/// Sends what is left of these bytes, and what TLS makes of them.
fn poll_send(tls: &mut ServerStream, cx: &mut Context<'_>, bytes: &[u8], sent: &mut usize) -> Poll<io::Result<()>> {
    while let Some(left) = bytes.get(*sent..).filter(|left| !left.is_empty()) {
        match ready!(Pin::new(&mut *tls).poll_write(cx, left))? {
            0 => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
            len => *sent += len,
        }
    }
    Pin::new(tls).poll_flush(cx)
}

/// A connection's bytes: first those that were read to find out what it speaks, then the socket's.
pub(super) struct Io {
    read: Bytes,
    half: ReadHalf,
    out: Arc<Mutex<Outgoing>>,
    /// Whether a flush is left to who drives the connection.
    is_gathering: bool,
}

/// The first bytes of every HTTP/2 connection.
pub(super) const PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

impl Io {
    pub fn new(stream: Stream, wire: Arc<Wire>) -> Self {
        let (half, out) = match stream {
            Stream::Tcp(stream) => {
                let (read, write) = stream.into_split();
                (ReadHalf::Tcp(read), WriteHalf::Tcp(write))
            }
            Stream::Unix(stream) => {
                let (read, write) = stream.into_split();
                (ReadHalf::Unix(read), WriteHalf::Unix(write))
            }
            Stream::Tls(stream) => {
                let both = Arc::new(Mutex::new(stream));
                (ReadHalf::Tls(both.clone()), WriteHalf::Tls(both))
            }
        };
        let out = Arc::new(Mutex::new(Outgoing { half: out, gathered: Vec::new(), sent: 0, wire }));
        Io { read: Bytes::new(), half, out, is_gathering: false }
    }

    /// From here on what is written stays until the caller flushes it: to be done whenever the connection's task has nothing more to do.
    pub fn gather(&mut self) -> Arc<Mutex<Outgoing>> {
        self.is_gathering = true;
        self.out.clone()
    }

    /// Reads until it is known whether HTTP/2 is spoken; what was read is read again afterwards.
    ///
    /// # Errors
    /// The connection ended, or failed, before that.
    pub async fn is_http2(&mut self) -> io::Result<bool> {
        let mut seen = [0; PREFACE.len()];
        let mut len = 0;
        while len < PREFACE.len() && PREFACE.starts_with(&seen[..len]) {
            let read = match &mut self.half {
                ReadHalf::Tcp(half) => half.read(&mut seen[len..]).await?,
                ReadHalf::Unix(half) => half.read(&mut seen[len..]).await?,
                ReadHalf::Tls(both) => {
                    let mut buf = ReadBuf::new(&mut seen[len..]);
                    std::future::poll_fn(|cx| Pin::new(&mut *lock(both)).poll_read(cx, &mut buf)).await?;
                    buf.filled().len()
                }
            };
            if read == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            len += read;
        }
        self.read = Bytes::copy_from_slice(&seen[..len]);
        Ok(seen[..len] == PREFACE[..])
    }
}

impl AsyncRead for Io {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if self.read.has_remaining() {
            let len = self.read.len().min(buf.remaining());
            buf.put_slice(&self.read.split_to(len));
            return Poll::Ready(Ok(()));
        }
        match &mut self.half {
            ReadHalf::Tcp(half) => Pin::new(half).poll_read(cx, buf),
            ReadHalf::Unix(half) => Pin::new(half).poll_read(cx, buf),
            ReadHalf::Tls(both) => Pin::new(&mut *lock(both)).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Io {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(cx, &[IoSlice::new(buf)])
    }

    fn poll_write_vectored(self: Pin<&mut Self>, cx: &mut Context<'_>, bufs: &[IoSlice<'_>]) -> Poll<io::Result<usize>> {
        lock(&self.out).poll_gather(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.is_gathering { Poll::Ready(Ok(())) } else { lock(&self.out).poll_flush(cx) }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut out = lock(&self.out);
        ready!(out.poll_flush(cx))?;
        match &mut out.half {
            WriteHalf::Tcp(half) => Pin::new(half).poll_shutdown(cx),
            WriteHalf::Unix(half) => Pin::new(half).poll_shutdown(cx),
            WriteHalf::Tls(both) => Pin::new(&mut *lock(both)).poll_shutdown(cx),
        }
    }
}
