//! What a [link](super::network::Link) sends its calls through: a gRPC channel; with the feature `simulation` also a carrier that a
//! simulation provides, which gets each call as the bytes and headers that would have gone over the network.

#[cfg(not(feature = "simulation"))]
pub(crate) use tonic::transport::Channel as Wire;

#[cfg(not(feature = "simulation"))]
pub(crate) fn of(channel: Wire) -> Wire {
    channel
}

#[cfg(feature = "simulation")]
pub(crate) use simulated::*;

#[cfg(feature = "simulation")]
mod simulated {
    use std::cell::RefCell;
    use std::future::ready;
    use std::sync::Arc;
    use std::task::{Context, Poll};

    use bytes::{BufMut, Bytes, BytesMut};
    use futures_util::future::BoxFuture;
    use http::{HeaderMap, HeaderValue, Request, Response};
    use http_body_util::{BodyExt, Full};
    use tonic::Status;
    use tonic::body::Body;
    use tonic::codegen::{Service, StdError};
    use tonic::transport::Channel;

    /// A message's prefix: one byte of flags, four of length.
    const PREFIX: usize = 5;

    /// A call on its way to another member.
    pub(crate) struct Call {
        pub path: String,
        pub headers: HeaderMap,
        /// The message, encoded.
        pub message: Bytes,
    }

    /// A connection of a simulation.
    pub(crate) trait Carry: Send + Sync {
        /// Takes a call to the other end, and brings its answer.
        fn carry(&self, call: Call) -> BoxFuture<'static, Result<Bytes, Status>>;
    }

    /// Makes connections to a URL, for whoever lives the life of this number.
    pub(crate) type Dial = Box<dyn Fn(u64, &str) -> BoxFuture<'static, Result<Wire, Status>>>;

    thread_local! {
        static DIAL: RefCell<Option<Dial>> = const { RefCell::new(None) };
    }

    /// Has the connections of this thread's simulation made by someone; or, at its end, by nobody.
    pub(crate) fn dial_with(dial: Option<Dial>) {
        DIAL.set(dial);
    }

    /// Makes a connection of the simulation.
    pub(crate) async fn dial(url: &str) -> Result<Wire, Status> {
        let dialing = DIAL.with_borrow(|dial| dial.as_ref().map(|dial| dial(crate::world::life(), url)));
        match dialing {
            Some(dialing) => dialing.await,
            None => Err(Status::unavailable("the simulation has ended")),
        }
    }

    #[derive(Clone)]
    pub(crate) enum Wire {
        Channel(Channel),
        Simulated(Arc<dyn Carry>),
    }

    impl std::fmt::Debug for Wire {
        fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.write_str("Wire")
        }
    }

    pub(crate) fn of(channel: Channel) -> Wire {
        Wire::Channel(channel)
    }

    impl Service<Request<Body>> for Wire {
        type Response = Response<Body>;
        type Error = StdError;
        type Future = BoxFuture<'static, Result<Response<Body>, StdError>>;

        fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), StdError>> {
            match self {
                Wire::Channel(channel) => channel.poll_ready(cx).map_err(StdError::from),
                Wire::Simulated(_) => Poll::Ready(Ok(())),
            }
        }

        fn call(&mut self, request: Request<Body>) -> Self::Future {
            match self {
                Wire::Channel(channel) => {
                    let answer = channel.call(request);
                    Box::pin(async move { answer.await.map_err(StdError::from) })
                }
                Wire::Simulated(carrier) => {
                    let carrier = carrier.clone();
                    Box::pin(async move {
                        let (head, body) = request.into_parts();
                        let body = body.collect().await?.to_bytes();
                        let message = body.slice(PREFIX.min(body.len())..);
                        let call = Call { path: head.uri.path().to_owned(), headers: head.headers, message };
                        Ok(answer(carrier.carry(call).await))
                    })
                }
            }
        }
    }

    fn answer(answer: Result<Bytes, Status>) -> Response<Body> {
        let message = match answer {
            Ok(message) => message,
            Err(status) => return status.into_http(),
        };
        let mut framed = BytesMut::with_capacity(PREFIX + message.len());
        framed.put_u8(0);
        framed.put_u32(message.len() as u32);
        framed.put(message);
        let mut trailers = HeaderMap::new();
        trailers.insert("grpc-status", HeaderValue::from_static("0"));
        let body = Full::new(framed.freeze()).with_trailers(ready(Some(Ok(trailers))));
        let mut response = Response::new(Body::new(body));
        response.headers_mut().insert("content-type", HeaderValue::from_static("application/grpc"));
        response
    }
}
