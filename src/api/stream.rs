//! What goes on over a stream after its headers: answers that the peer takes piece by piece, and the calls of tonic services.
//!
//! A tonic service is fed the frames of the request as it asks for them, so that h2's window holds back a client that sends
//! faster than the service reads; and its answers go out as the peer opens its window, one frame at a time.
//!
//! ```text
//! RecvStream -> Incoming -> tonic service -> drain -> SendStream
//!               (counts messages)            (counts messages, finds the status)
//! ```
//!
//! # Caveats
//! - An answer that the peer does not take is given up after [`STREAM_STALL`], and so is a stream that has an end ([`Pace::Steady`]). Others
//!   are not, for a watch may rest for days. What it then holds is one frame here, and what its service allows.

use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::{Buf, Bytes};
use futures_util::StreamExt;
use h2::server::SendResponse;
use h2::{Reason, RecvStream, SendStream};
use http::{HeaderMap, Request, Response, StatusCode};
use http_body::Body as _;
use tokio::time::Instant;
use tonic::codegen::Service as _;
use tonic::service::Routes;
use tonic::{Code, Status};

use super::serve::{Call, STREAM_STALL};
use super::unary::{Failure, GRPC_STATUS, PREFIX, Pace, Streamed, deadline_exceeded, prefix, refuse, status_headers};
use super::wire::{OpenStream, Wire};
use crate::metrics::InFlight;

/// A future that is given up when `gone` says so.
pub(super) struct Guarded<'a, F, G> {
    pub handler: Pin<&'a mut F>,
    pub gone: G,
}

impl<F: Future, G: FnMut(&mut Context<'_>) -> bool + Unpin> Future for Guarded<'_, F, G> {
    type Output = Result<F::Output, Failure>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        if let Poll::Ready(output) = self.handler.as_mut().poll(cx) {
            return Poll::Ready(Ok(output));
        }
        if (self.gone)(cx) { Poll::Ready(Err(Failure::Gone)) } else { Poll::Pending }
    }
}

/// Sends bytes as fast as the peer opens its window, and gives up, resetting the stream, when it does not for too long.
pub(super) async fn send_all(send: &mut SendStream<Bytes>, bytes: Bytes, end: bool) -> Result<(), Failure> {
    send_pieces(send, bytes, Pace::Steady, end).await
}

/// Sends bytes as the peer opens its window, as long as the pace allows. `end`: none follow.
pub(super) async fn send_pieces(send: &mut SendStream<Bytes>, mut bytes: Bytes, pace: Pace, end: bool) -> Result<(), Failure> {
    while !bytes.is_empty() {
        send.reserve_capacity(bytes.len());
        if send.capacity() == 0 {
            window(send, pace).await?;
        }
        let piece = bytes.split_to(send.capacity().min(bytes.len()));
        if !piece.is_empty() {
            let last = end && bytes.is_empty();
            send.send_data(piece, last).map_err(|_| Failure::Gone)?;
        }
    }
    Ok(())
}

/// Waits for room, as long as the pace allows; then the stream is reset.
async fn window(send: &mut SendStream<Bytes>, pace: Pace) -> Result<(), Failure> {
    let opened = match pace {
        Pace::Any => poll_fn(|cx| send.poll_capacity(cx)).await,
        Pace::Steady => match tokio::time::timeout(STREAM_STALL, poll_fn(|cx| send.poll_capacity(cx))).await {
            Ok(opened) => opened,
            Err(_) => {
                send.send_reset(Reason::CANCEL);
                None
            }
        },
    };
    if matches!(opened, Some(Ok(_))) { Ok(()) } else { Err(Failure::Gone) }
}

pub(super) async fn send_streamed(send: &mut SendStream<Bytes>, streamed: Streamed, wire: &Arc<Wire>) -> Result<(), Failure> {
    let Streamed { len, mut chunks } = streamed;
    send_all(send, Bytes::copy_from_slice(&prefix(len)?), false).await?;
    // Its first piece waits for room like any answer; each later one takes the place of the one before.
    if !wire.has_room() {
        Guarded { handler: pin!(wire.room()), gone: |cx: &mut Context<'_>| send.poll_reset(cx).is_ready() }.await?;
    }
    let mut left = len;
    loop {
        let next = Guarded { handler: pin!(chunks.next()), gone: |cx: &mut Context<'_>| send.poll_reset(cx).is_ready() }.await?;
        let Some(chunk) = next.transpose()? else { break };
        let Some(rest) = left.checked_sub(chunk.len()) else {
            left = usize::MAX;
            break;
        };
        left = rest;
        let _held = wire.hold(chunk.len());
        send_all(send, chunk, false).await?;
    }
    if left != 0 {
        tracing::error!(len, left, "an answer has not the length that was announced");
        send.send_reset(Reason::INTERNAL_ERROR);
        return Err(Failure::Gone);
    }
    Ok(())
}

/// How long a call may take: until when, and between two answers.
pub(super) struct Terms {
    pub deadline: Option<Instant>,
    pub pace: Pace,
}

/// A call that a tonic service handles.
pub(super) fn stream(
    mut routes: Routes,
    request: Request<tonic::body::Body>,
    mut respond: SendResponse<Bytes>,
    terms: Terms,
    in_flight: Arc<InFlight>,
    open: OpenStream,
) -> Call {
    let Terms { deadline, pace } = terms;
    Box::pin(async move {
        let _open = open;
        let answered = {
            let response = pin!(routes.call(request));
            let guarded = Guarded { handler: response, gone: |cx: &mut Context<'_>| respond.poll_reset(cx).is_ready() };
            by(deadline, guarded).await
        };
        let response = match answered {
            Ok(Ok(response)) => response,
            Err(Failure::Status(status)) => {
                refuse(respond, StatusCode::OK, &status);
                in_flight.finish(status.code());
                return;
            }
            Err(Failure::Gone) => return,
            Ok(Err(never)) => match never {},
        };
        let (head, body) = response.into_parts();
        let code = grpc_code(&head.headers);
        let end = body.is_end_stream();
        let Ok(mut send) = respond.send_response(Response::from_parts(head, ()), end) else { return };
        if end {
            in_flight.finish(code.unwrap_or(Code::Unknown));
            return;
        }
        let outcome = by(deadline, drain(&mut send, body, pace, &in_flight)).await;
        match outcome {
            Ok(last) => in_flight.finish(last.or(code).unwrap_or(Code::Unknown)),
            Err(Failure::Status(status)) => {
                let _ = send.send_trailers(status_headers(&status, HeaderMap::with_capacity(2)));
                in_flight.finish(status.code());
            }
            Err(Failure::Gone) => {}
        }
    })
}

pub(super) async fn by<T>(deadline: Option<Instant>, what: impl Future<Output = Result<T, Failure>>) -> Result<T, Failure> {
    match deadline {
        None => what.await,
        Some(deadline) => tokio::time::timeout_at(deadline, what).await.unwrap_or_else(|_| Err(deadline_exceeded().into())),
    }
}

fn grpc_code(headers: &HeaderMap) -> Option<Code> {
    headers.get(GRPC_STATUS).map(|code| Code::from_bytes(code.as_bytes()))
}

/// Sends a service's answers as they come and as the peer takes them; returns the status at the end.
///
/// What waits for a peer that takes none is one frame here, and what its service allows.
async fn drain(send: &mut SendStream<Bytes>, body: tonic::body::Body, pace: Pace, in_flight: &InFlight) -> Result<Option<Code>, Failure> {
    let mut body = pin!(body);
    let mut counter = MessageCounter::default();
    loop {
        let next = poll_fn(|cx| body.as_mut().poll_frame(cx));
        let next = Guarded { handler: pin!(next), gone: |cx: &mut Context<'_>| send.poll_reset(cx).is_ready() }.await?;
        let frame = match next {
            None => {
                // No trailers: the service has broken off.
                send.send_reset(Reason::INTERNAL_ERROR);
                return Ok(None);
            }
            Some(Err(status)) => return Err(Failure::Status(status)),
            Some(Ok(frame)) => frame,
        };
        match frame.into_data() {
            Ok(data) => {
                counter.count(&data, |len| in_flight.sent(len));
                send_pieces(send, data, pace, false).await?;
            }
            Err(frame) => {
                if let Ok(trailers) = frame.into_trailers() {
                    let code = grpc_code(&trailers);
                    send.send_trailers(trailers).map_err(|_| Failure::Gone)?;
                    return Ok(code);
                }
            }
        }
    }
}

/// A streaming request's messages, as tonic wants them.
pub(super) struct Incoming {
    body: RecvStream,
    counter: MessageCounter,
    in_flight: Arc<InFlight>,
}

impl Incoming {
    pub fn new(body: RecvStream, in_flight: Arc<InFlight>) -> Self {
        Incoming { body, counter: MessageCounter::default(), in_flight }
    }
}

impl http_body::Body for Incoming {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<http_body::Frame<Bytes>, Status>>> {
        let this = &mut *self;
        this.body.poll_data(cx).map(|data| {
            let data = data?.map_err(|err| Status::cancelled(err.to_string()));
            if let Ok(data) = &data {
                let _ = this.body.flow_control().release_capacity(data.len());
                this.counter.count(data, |len| this.in_flight.received(len));
            }
            Some(data.map(http_body::Frame::data))
        })
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }
}

/// Finds the messages in a stream of bytes by their prefixes.
#[derive(Default)]
struct MessageCounter {
    /// Bytes of the message under way that have not come yet.
    left: usize,
    prefix: [u8; PREFIX],
    /// Bytes of the prefix that have come.
    seen: usize,
}

impl MessageCounter {
    /// Takes note of bytes, and calls back with the length of each message that begins in them.
    fn count(&mut self, mut bytes: &[u8], mut message: impl FnMut(usize)) {
        while !bytes.is_empty() {
            let body = self.left.min(bytes.len());
            bytes.advance(body);
            self.left -= body;
            while self.left == 0
                && let Some(byte) = bytes.first()
            {
                self.prefix[self.seen] = *byte;
                self.seen += 1;
                bytes.advance(1);
                if self.seen == PREFIX {
                    let [_, a, b, c, d] = self.prefix;
                    self.left = u32::from_be_bytes([a, b, c, d]) as usize;
                    self.seen = 0;
                    message(self.left);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_counted_however_they_are_cut() {
        let lengths = [0usize, 1, 5, 300];
        let bytes: Vec<u8> = lengths.iter().flat_map(|len| [&[0][..], &(*len as u32).to_be_bytes(), &vec![9; *len]].concat()).collect();
        for size in 1..=bytes.len() {
            let mut counter = MessageCounter::default();
            let mut seen = Vec::new();
            for piece in bytes.chunks(size) {
                counter.count(piece, |len| seen.push(len));
            }
            assert_eq!(seen, lengths);
        }
    }
}
