//! Streams on which each message of the client is answered by one, in order: LeaseKeepAlive.
//!
//! Like a unary call, such a stream is served right here, without tonic: a client that renews a thousand leases each second sends small
//! messages one by one, and what surrounds each of them costs more than the renewal.
//!
//! ```text
//! DATA [prefix id=7][prefix id=9]  -> handler(7) -> DATA [prefix 7, ttl]
//!                                     handler(9) -> DATA [prefix 9, ttl]
//! END_STREAM                       -> grpc-status: 0
//! ```
//!
//! # Invariants
//! - A message is handled when the answer to the one before has been handed to h2, so that who takes no answers is not read.
//! - What has come of an incomplete message is counted ([`Partial`]) and given [`REQUEST_TIMEOUT`].

use std::future::{Future, poll_fn};
use std::marker::PhantomData;
use std::pin::pin;
use std::task::{Context, Poll};

use bytes::{Buf, Bytes, BytesMut};
use http::HeaderMap;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tonic::{Code, Status};

use super::serve::{Call, REQUEST_TIMEOUT};
use super::status;
use super::stream::{Guarded, by, send_pieces};
use super::unary::{Exchange, Failure, PREFIX, Pace, deadline_exceeded, frame, head, status_headers, trailers_ok, undecodable};
use super::wire::Partial;
use crate::error::ApplyError;
use crate::metrics::InFlight;

/// A method of this kind.
pub(super) trait Converse: Send + Sync {
    fn call(&self, exchange: Exchange, in_flight: InFlight) -> Call;
}

/// One with its handler, which is called for each message, and dropped when the client goes away. When `stop` is told, the stream ends
/// with an error. `state` is cloned for each message; an `Arc`, or a few of them.
pub(super) struct Conversation<S, F, Req> {
    state: S,
    handle: F,
    stop: CancellationToken,
    request: PhantomData<fn() -> Req>,
}

impl<S: Clone, F, Req> Conversation<S, F, Req> {
    pub fn new(state: &S, stop: CancellationToken, handle: F) -> Self {
        Conversation { state: state.clone(), handle, stop, request: PhantomData }
    }
}

impl<S, F, Req, Fut, Resp> Converse for Conversation<S, F, Req>
where
    S: Clone + Send + Sync + 'static,
    F: Fn(S, Req) -> Fut + Clone + Send + Sync + 'static,
    Fut: Future<Output = Result<Resp, Status>> + Send + 'static,
    Req: prost::Message + Default + 'static,
    Resp: prost::Message + 'static,
{
    fn call(&self, mut exchange: Exchange, in_flight: InFlight) -> Call {
        let (state, handle, stop) = (self.state.clone(), self.handle.clone(), self.stop.clone());
        Box::pin(async move {
            if let Err(status) = exchange.check_encoding() {
                return exchange.fail(&status, in_flight);
            }
            let Ok(mut send) = exchange.respond.send_response(head(), false) else { return };
            let deadline = exchange.deadline;
            let talk = async {
                let mut stopped = pin!(stop.cancelled_owned());
                let mut rest = BytesMut::new();
                loop {
                    let message = {
                        let mut next = pin!(next(&mut exchange, &mut rest));
                        poll_fn(|cx| match next.as_mut().poll(cx) {
                            Poll::Pending => stopped.as_mut().poll(cx).map(|()| Err(status(ApplyError::Stopped.into()).into())),
                            next => next,
                        })
                        .await?
                    };
                    let Some(message) = message else { return Ok(()) };
                    in_flight.received(message.len());
                    let request = Req::decode(message).map_err(undecodable)?;
                    let handler = pin!(handle(state.clone(), request));
                    let response = Guarded { handler, gone: |cx: &mut Context<'_>| send.poll_reset(cx).is_ready() }.await??;
                    let bytes = frame(&response)?;
                    let len = bytes.len() - PREFIX;
                    send_pieces(&mut send, bytes, Pace::Any, false).await?;
                    in_flight.sent(len);
                }
            };
            let trailers = match by(deadline, talk).await {
                Ok(()) => {
                    in_flight.finish(Code::Ok);
                    trailers_ok()
                }
                Err(Failure::Status(status)) => {
                    in_flight.finish(status.code());
                    status_headers(&status, HeaderMap::with_capacity(2))
                }
                Err(Failure::Gone) => return,
            };
            // An error here means that the client has gone.
            let _ = send.send_trailers(trailers);
        })
    }
}

/// The next message, without its prefix; none at the end. `rest` is what has come and was not handled.
async fn next(exchange: &mut Exchange, rest: &mut BytesMut) -> Result<Option<Bytes>, Failure> {
    // Of a message that has begun: how it is counted, and until when the rest of it has to come.
    let mut begun: Option<(Partial, Instant)> = None;
    loop {
        if let Some(len) = exchange.message_len(rest)?
            && rest.len() >= PREFIX + len
        {
            let mut message = rest.split_to(PREFIX + len);
            message.advance(PREFIX);
            return Ok(Some(message.freeze()));
        }
        if begun.is_none() && !rest.is_empty() {
            let mut partial = exchange.wire.partial();
            partial.grow(rest.len())?;
            begun = Some((partial, Instant::now() + REQUEST_TIMEOUT));
        }
        let data = poll_fn(|cx| exchange.body.poll_data(cx));
        let frame = match &begun {
            None => data.await,
            Some((_, until)) => tokio::time::timeout_at(*until, data).await.map_err(|_| deadline_exceeded())?,
        };
        let frame = match frame {
            Some(Ok(frame)) => frame,
            Some(Err(_)) => return Err(Failure::Gone),
            None if rest.is_empty() => return Ok(None),
            None => return Err(Status::unknown("unexpected EOF").into()),
        };
        let _ = exchange.body.flow_control().release_capacity(frame.len());
        if let Some((partial, _)) = &mut begun {
            partial.grow(frame.len())?;
        }
        rest.extend_from_slice(&frame);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering::Relaxed;

    use h2::Reason;

    use super::super::testing::*;
    use super::*;
    use crate::proto::etcdserverpb::{LeaseKeepAliveRequest, LeaseKeepAliveResponse};

    const PATH: &str = "/etcdserverpb.Lease/LeaseKeepAlive";

    fn renew(id: i64) -> Bytes {
        message(&LeaseKeepAliveRequest { id })
    }

    fn renewed(ids: &[i64]) -> Bytes {
        let answers = ids.iter().map(|&id| message(&LeaseKeepAliveResponse { header: None, id, ttl: id }));
        answers.collect::<Vec<_>>().concat().into()
    }

    #[tokio::test]
    async fn each_message_is_answered_however_they_are_cut() {
        let server = TestServer::start().await;
        let client = server.connect().await;
        let all = [renew(1), renew(300), renew(7)].concat();
        for size in [1, 2, 5, 6, 9, all.len()] {
            let frames = all.chunks(size).map(Bytes::copy_from_slice).collect();
            let answer = post(&client, request(PATH), frames).await.unwrap();
            assert_eq!((answer.status(), answer.trailers_only), ((0, ""), false), "in frames of {size}");
            assert_eq!(answer.body, renewed(&[1, 300, 7]));
        }
        let answer = post(&client, request(PATH), vec![Bytes::new()]).await.unwrap();
        assert_eq!((answer.status(), answer.body.len()), ((0, ""), 0));
    }

    #[tokio::test]
    async fn an_error_ends_it() {
        let server = TestServer::start().await;
        let client = server.connect().await;
        let cases: &[(&[u8], (i32, &str))] = &[
            (&renew(0), (5, "no lease")),
            (b"\0\0\0\0\x05\x0a", (2, "unexpected EOF")),
            (b"\0\0", (2, "unexpected EOF")),
            (b"\x01\0\0\0\0", (13, "grpc: compressed flag set with identity or empty encoding")),
            (b"\x02\0\0\0\0", (13, "grpc: received unexpected payload format 2")),
            (b"\0\x7f\0\0\0", (8, "grpc: received message larger than max (2130706432 vs. 2097152)")),
        ];
        for (bytes, status) in cases {
            let answer = post(&client, request(PATH), vec![renew(4), Bytes::copy_from_slice(bytes)]).await.unwrap();
            assert_eq!((answer.status(), &answer.body), (*status, &renewed(&[4])), "{bytes:02x?}");
        }
        let answer = post(&client, request(PATH).header("grpc-encoding", "foo"), vec![renew(4)]).await.unwrap();
        assert_eq!(answer.status(), (12, "grpc: Decompressor is not installed for grpc-encoding \"foo\""));
    }

    #[tokio::test]
    async fn ends_with_its_client_and_its_server() {
        let server = TestServer::start().await;
        let client = server.connect().await;
        // A handler at work, a stream that rests, and one whose message is incomplete.
        for begin in [renew(-1), renew(1), renew(1).slice(..3)] {
            let (_response, mut stream) =
                client.clone().ready().await.unwrap().send_request(request(PATH).body(()).unwrap(), false).unwrap();
            stream.send_data(begin, false).unwrap();
            server.until(|server| server.limits.streams() == 1).await;
            stream.send_reset(Reason::CANCEL);
            server.until(|server| server.limits.streams() == 0).await;
        }
        assert!(server.state.dropped.load(Relaxed) <= 1);
        let (response, mut stream) = client.clone().ready().await.unwrap().send_request(request(PATH).body(()).unwrap(), false).unwrap();
        stream.send_data(renew(5), false).unwrap();
        let mut body = response.await.unwrap().into_body();
        assert_eq!(body.data().await.unwrap().unwrap(), renewed(&[5]));
        server.state.stop.cancel();
        assert!(body.data().await.is_none());
        let trailers = body.trailers().await.unwrap().unwrap();
        assert_eq!(trailers.get("grpc-message").unwrap(), "etcdserver: server stopped");
    }

    #[tokio::test]
    async fn half_a_message_is_waited_for_only_so_long() {
        let server = TestServer::start().await;
        let client = server.connect().await;
        let (response, mut stream) = client.clone().ready().await.unwrap().send_request(request(PATH).body(()).unwrap(), false).unwrap();
        stream.send_data(renew(5).slice(..4), false).unwrap();
        let mut body = response.await.unwrap().into_body();
        server.until_later(|server| server.limits.streams() == 0).await;
        assert!(body.data().await.is_none());
        assert_eq!(body.trailers().await.unwrap().unwrap().get("grpc-status").unwrap(), "4");
    }
}
