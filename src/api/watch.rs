//! The Watch service: one stream in each direction, any number of watches on it.
//!
//! The stream is one state machine and no task of its own: when the connection can take a message it is polled, looks at
//! what the client asked for, and then at what its [`Session`] has to tell. A client that does not read is not polled, and
//! falls behind in its session alone.
//!
//! Answers are encoded by hand into the frame: a head for this watch, and the events' bytes that all watchers share.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use futures_util::{FutureExt, Stream, StreamExt};
use tokio::time::{Interval, MissedTickBehavior, interval_at};
use tokio_util::sync::WaitForCancellationFutureOwned;
use tonic::codec::{Codec, EncodeBuf, Encoder};
use tonic::codegen::{Body, BoxFuture, StdError};
use tonic::server::{Grpc, NamedService, StreamingService};
use tonic::{Request, Response, Status, Streaming};
use tonic_prost::{ProstCodec, ProstDecoder};

use crate::error::ApplyError;
use crate::mvcc::watch::{Session, WatchAnswer, encode_answer};
use crate::node::Node;
use crate::proto::etcdserverpb::watch_request::RequestUnion;
use crate::proto::etcdserverpb::{WatchRequest, WatchResponse};

use super::unary::requires_leader;
use super::{Api, status};

/// Answers that may wait in a session before the client's next request is read. Beyond it the client has to take answers
/// first: requests wait in the connection, and in the end at the client.
const BACKLOG_MAX: usize = 128;

/// Extra delay of a periodic progress response, in percent of the interval at most, so that those of many streams do not
/// all come at once.
const PROGRESS_JITTER_PERCENT: u32 = 10;

/// Looks, an election timeout apart, that have to find no leader before a client that asks for one (`hasleader`) is sent elsewhere, as in
/// etcd.
const LEADERLESS_LOOKS: u32 = 3;

/// A response on its way to the wire.
pub(crate) struct Frame {
    head: WatchResponse,
    bodies: Vec<Bytes>,
}

/// Encodes frames, decodes requests.
#[derive(Clone, Copy, Debug, Default)]
struct WatchCodec;

impl Codec for WatchCodec {
    type Encode = Frame;
    type Decode = WatchRequest;
    type Encoder = WatchEncoder;
    type Decoder = ProstDecoder<WatchRequest>;

    fn encoder(&mut self) -> WatchEncoder {
        WatchEncoder
    }

    fn decoder(&mut self) -> Self::Decoder {
        ProstCodec::<WatchResponse, WatchRequest>::default().decoder()
    }
}

struct WatchEncoder;

impl Encoder for WatchEncoder {
    type Item = Frame;
    type Error = Status;

    fn encode(&mut self, frame: Frame, out: &mut EncodeBuf<'_>) -> Result<(), Status> {
        out.reserve(frame.bodies.iter().map(Bytes::len).sum::<usize>() + 128);
        encode_answer(&frame.head, &frame.bodies, out).map_err(status)
    }
}

/// The service, in the form that the router takes.
#[derive(Clone)]
pub(crate) struct WatchService {
    pub api: Api,
    /// Bytes that a request may have.
    pub max_request_bytes: usize,
}

impl NamedService for WatchService {
    const NAME: &'static str = "etcdserverpb.Watch";
}

impl<B> tonic::codegen::Service<http::Request<B>> for WatchService
where
    B: Body + Send + 'static,
    B::Error: Into<StdError> + Send + 'static,
{
    type Response = http::Response<tonic::body::Body>;
    type Error = std::convert::Infallible;
    type Future = BoxFuture<Self::Response, Self::Error>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<B>) -> Self::Future {
        let api = self.api.clone();
        let limit = self.max_request_bytes;
        Box::pin(async move {
            if request.uri().path() != "/etcdserverpb.Watch/Watch" {
                return Ok(Status::unimplemented("unknown method for service etcdserverpb.Watch").into_http());
            }
            let mut grpc = Grpc::new(WatchCodec).apply_max_message_size_config(Some(limit), None);
            Ok(grpc.streaming(Open(api), request).await)
        })
    }
}

struct Open(Api);

impl StreamingService<WatchRequest> for Open {
    type Response = Frame;
    type ResponseStream = WatchStream;
    type Future = std::future::Ready<Result<Response<WatchStream>, Status>>;

    fn call(&mut self, request: Request<Streaming<WatchRequest>>) -> Self::Future {
        let api = &self.0;
        let leader = requires_leader(request.metadata().as_ref()).then(|| {
            let every = api.node.options.election_timeout;
            let mut looks = interval_at(tokio::time::Instant::now() + every, every);
            looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
            (looks, 0)
        });
        let stream = WatchStream {
            leader,
            session: api.node.watch(),
            node: api.node.clone(),
            requests: Some(request.into_inner()),
            every: api.info.watch_progress_interval,
            progress: None,
            stop: Box::pin(api.stop.clone().cancelled_owned()),
        };
        std::future::ready(Ok(Response::new(stream)))
    }
}

/// One client's watches.
pub(crate) struct WatchStream {
    session: Session,
    node: Arc<Node>,
    /// None once the client has said that no more will come.
    requests: Option<Streaming<WatchRequest>>,
    every: Duration,
    progress: Option<Interval>,
    /// When the leader is looked for, and how often in a row there was none; for clients that want one.
    leader: Option<(Interval, u32)>,
    stop: Pin<Box<WaitForCancellationFutureOwned>>,
}

impl WatchStream {
    fn take(&mut self, request: WatchRequest) {
        match request.request_union {
            Some(RequestUnion::CreateRequest(create)) => {
                self.session.create(&create);
                if self.progress.is_none() && self.session.wants_progress() {
                    let jitter = self.every * rand::random_range(0..=PROGRESS_JITTER_PERCENT) / 100;
                    let every = self.every + jitter;
                    let mut interval = interval_at(tokio::time::Instant::now() + every, every);
                    interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
                    self.progress = Some(interval);
                }
            }
            Some(RequestUnion::CancelRequest(cancel)) => self.session.cancel(cancel.watch_id),
            Some(RequestUnion::ProgressRequest(_)) => self.session.progress(),
            // A request of nothing, or of something that we do not know: etcd passes over it, too.
            None => {}
        }
    }

    fn frame(&self, answer: WatchAnswer) -> Result<Frame, Status> {
        let bodies = answer.bodies(self.session.store()).map_err(status)?;
        let head = WatchResponse {
            header: Some(self.node.header(answer.revision)),
            watch_id: answer.watch_id,
            created: answer.created,
            canceled: answer.canceled,
            compact_revision: answer.compact_revision,
            cancel_reason: answer.cancel_reason,
            fragment: answer.fragment,
            events: Vec::new(),
        };
        Ok(Frame { head, bodies })
    }
}

impl Stream for WatchStream {
    type Item = Result<Frame, Status>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = &mut *self;
        if this.node.is_condemned() {
            return Poll::Ready(Some(Err(status(ApplyError::Corrupt.into()))));
        }
        while this.session.backlog() < BACKLOG_MAX {
            let Some(requests) = &mut this.requests else { break };
            match requests.poll_next_unpin(cx) {
                Poll::Ready(Some(Ok(request))) => this.take(request),
                Poll::Ready(Some(Err(err))) => return Poll::Ready(Some(Err(err))),
                // The client asks for nothing more, and may still listen; its watches go on, as in etcd.
                Poll::Ready(None) => this.requests = None,
                Poll::Pending => break,
            }
        }
        if let Some(progress) = &mut this.progress
            && progress.poll_tick(cx).is_ready()
        {
            this.session.notify_progress();
        }
        if let Some((looks, without)) = &mut this.leader {
            // Until it is not ready: then it will wake us.
            while looks.poll_tick(cx).is_ready() {
                *without = if this.node.has_leader() { 0 } else { *without + 1 };
            }
            if *without >= LEADERLESS_LOOKS {
                return Poll::Ready(Some(Err(status(ApplyError::NoLeader.into()))));
            }
        }
        match this.session.poll_next(cx) {
            Poll::Ready(Ok(answer)) => Poll::Ready(Some(this.frame(answer))),
            Poll::Ready(Err(err)) => Poll::Ready(Some(Err(status(err)))),
            Poll::Pending => match this.stop.poll_unpin(cx) {
                Poll::Ready(()) => Poll::Ready(Some(Err(status(ApplyError::Stopped.into())))),
                Poll::Pending => Poll::Pending,
            },
        }
    }
}
