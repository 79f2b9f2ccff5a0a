//! A connection that leaves what is written to it lie for a moment, so that what belongs together leaves in one write.
//!
//! A call's headers and its message are two frames, and the HTTP/2 client hands them on in two turns of its task: the room for the message
//! is given out when the headers go. Each write is a system call, a packet, and a wake-up of the other end, where the first of the two has
//! nothing to do but to wait for the second. A [`Cork`] takes the first flush after a write for a request to be called once more: by then all
//! tasks that could run have run, and their frames go out together, those of other calls on the same connection too.
//!
//! ```text
//! write HEADERS, flush (later, please) ... write DATA, flush  ->  one write of both
//! ```
//!
//! # Invariants
//! - Bytes leave in the order in which they were written, and nothing is held beyond the second flush: it is asked for at once, by the first.
//! - Nothing is held when the connection is shut down. When it is dropped without that, what it held is lost, as what lay in a socket
//!   may be.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use http::Uri;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tonic::codegen::Service;

/// What is held at most. What does not fit beside it goes to the connection without a copy, after what is held.
const HELD_BYTES: usize = 32 << 10;

/// A connection that is written to with a delay of one turn of its task.
pub(crate) struct Cork<S> {
    inner: S,
    /// Of these, those from `gone` on are to be written.
    held: Vec<u8>,
    gone: usize,
    /// Whether the first flush has come.
    was_asked: bool,
}

impl<S: AsyncWrite + Unpin> Cork<S> {
    pub fn new(inner: S) -> Cork<S> {
        Cork { inner, held: Vec::new(), gone: 0, was_asked: false }
    }

    /// Writes out what is held.
    fn poll_drain(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while let Some(rest @ [_, ..]) = self.held.get(self.gone..) {
            let written = ready!(Pin::new(&mut self.inner).poll_write(cx, rest))?;
            if written == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.gone += written;
        }
        self.held.clear();
        self.gone = 0;
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Cork<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_read(cx, buf)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Cork<S> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(cx, &[IoSlice::new(buf)])
    }

    fn poll_write_vectored(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bufs: &[IoSlice<'_>]) -> Poll<io::Result<usize>> {
        let len = bufs.iter().map(|buf| buf.len()).sum::<usize>();
        if self.held.len() + len <= HELD_BYTES {
            bufs.iter().for_each(|buf| self.held.extend_from_slice(buf));
            return Poll::Ready(Ok(len));
        }
        ready!(self.poll_drain(cx))?;
        Pin::new(&mut self.inner).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if !self.held.is_empty() && !self.was_asked {
            self.was_asked = true;
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        ready!(self.poll_drain(cx))?;
        self.was_asked = false;
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_drain(cx))?;
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}

/// Corks the connections that another connector makes.
#[derive(Clone)]
pub(crate) struct Corked<C>(pub C);

/// Connections over TCP, without TLS.
pub(crate) fn plain() -> Corked<HttpConnector> {
    let mut connector = HttpConnector::new();
    connector.set_nodelay(true);
    Corked(connector)
}

impl<C, S> Service<Uri> for Corked<C>
where
    C: Service<Uri, Response = TokioIo<S>>,
    C::Future: Send + 'static,
    S: AsyncWrite + Unpin,
{
    type Response = TokioIo<Cork<S>>;
    type Error = C::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, C::Error>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), C::Error>> {
        self.0.poll_ready(cx)
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        let connecting = self.0.call(uri);
        Box::pin(async move { Ok(TokioIo::new(Cork::new(connecting.await?.into_inner()))) })
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;
    use crate::lock::lock;

    /// Takes a few bytes at a time and notes each write.
    #[derive(Clone, Default)]
    struct Line {
        writes: Arc<Mutex<Vec<Vec<u8>>>>,
        /// How much it takes at once; everything, if 0.
        narrow: usize,
        is_shut: Arc<Mutex<bool>>,
    }

    impl AsyncWrite for Line {
        fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
            let len = if self.narrow == 0 { buf.len() } else { buf.len().min(self.narrow) };
            lock(&self.writes).push(buf[..len].to_vec());
            Poll::Ready(Ok(len))
        }

        fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }

        fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            *lock(&self.is_shut) = true;
            Poll::Ready(Ok(()))
        }
    }

    #[tokio::test]
    async fn what_is_written_in_two_turns_leaves_in_one_write() {
        let line = Line::default();
        let mut cork = Cork::new(line.clone());
        let mut turns = 0;
        std::future::poll_fn(|cx| {
            turns += 1;
            let written = Pin::new(&mut cork).poll_write(cx, format!("part {turns};").as_bytes());
            assert!(matches!(written, Poll::Ready(Ok(7))));
            Pin::new(&mut cork).poll_flush(cx)
        })
        .await
        .unwrap();
        assert_eq!(*lock(&line.writes), [b"part 1;part 2;".to_vec()]);
        // And again.
        cork.write_all(b"more").await.unwrap();
        cork.flush().await.unwrap();
        cork.flush().await.unwrap();
        assert_eq!(lock(&line.writes).len(), 2);
    }

    #[tokio::test]
    async fn everything_arrives_in_order_whatever_its_size() {
        for narrow in [0, 1000] {
            let line = Line { narrow, ..Line::default() };
            let mut cork = Cork::new(line.clone());
            let mut all = Vec::new();
            for (turn, size) in [10, HELD_BYTES, 1, HELD_BYTES - 1, 2, 3 * HELD_BYTES, 7].into_iter().enumerate() {
                let bytes = vec![turn as u8; size];
                cork.write_all(&bytes).await.unwrap();
                assert!(cork.held.len() <= HELD_BYTES);
                all.extend_from_slice(&bytes);
                if turn % 3 == 2 {
                    cork.flush().await.unwrap();
                    assert_eq!(lock(&line.writes).concat(), all);
                }
            }
            cork.shutdown().await.unwrap();
            assert_eq!(lock(&line.writes).concat(), all);
            assert!(*lock(&line.is_shut));
        }
    }

    #[tokio::test]
    async fn reading_is_not_delayed() {
        let (ours, mut theirs) = tokio::io::duplex(64);
        let mut cork = Cork::new(ours);
        theirs.write_all(b"hello").await.unwrap();
        let mut read = [0; 5];
        cork.read_exact(&mut read).await.unwrap();
        assert_eq!(&read, b"hello");
    }
}
