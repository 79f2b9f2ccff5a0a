//! gRPC over HTTP/2, without a framework where it counts: unary calls are read, decoded, handled, encoded and sent right here.
//!
//! A [`Router`] knows every method by its path. A *unary* method has a handler, an async function from message to message;
//! a *streaming* one belongs to a tonic service, which this room feeds and drains. Everything else is refused in the words
//! of Go's gRPC, which are what etcd's clients have seen so far.
//!
//! ```text
//! HEADERS :path=/etcdserverpb.KV/Put          -> Router: the method, its counters
//! DATA    00 00000014 0a 05 68 65 6c 6c 6f ..  -> one message; key and value are slices of the frame
//!                                                handler(state, metadata, PutRequest) -> PutResponse
//! HEADERS content-type: application/grpc
//! DATA    00 0000001c ..                       <- one buffer of exactly the right size
//! HEADERS grpc-status: 0                       <- an error is these alone ("Trailers-Only"), with grpc-message
//! ```
//!
//! # Invariants
//! - No more than `limit` bytes of message are ever gathered, and what is gathered is counted ([`Partial`]).
//! - A call ends when its client resets it, when its connection ends or when its deadline (`grpc-timeout`) passes; its
//!   handler is dropped then. A handler must therefore leave things whole at each of its `await`s.
//! - Every call that was started is handled, once, in the counters; one that was dropped counts as `Canceled`.
//! - An answer is either in one buffer, or made piece by piece as the peer takes it ([`Streamed`]): never both.
//!
//! # Caveats
//! - Compressed requests are refused with UNIMPLEMENTED. etcd takes gzip, but Go's clients do not send it unless told to.
//! - A message that follows the first of a unary request is ignored, as in Go.
//! - `prost` gives up at 100 nested messages; a Txn nested that deep is answered `too many operations`.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use futures_util::stream::BoxStream;
use h2::server::SendResponse;
use h2::{RecvStream, SendStream};
use http::header::CONTENT_TYPE;
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Response, StatusCode};
use tokio::time::Instant;
use tonic::service::Routes;
use tonic::{Code, Status};

use super::conversation::Converse;
use super::serve::{self, App, Call, REQUEST_TIMEOUT};
use super::stream::{Guarded, Incoming, Terms, send_all, send_streamed, stream};
use super::wire::{OpenStream, Partial, Wire};
use crate::metrics::{InFlight, MethodKind, MethodMetrics, Metrics};
use crate::slow::Slow;

/// What a message may be larger than the largest request: room for what surrounds it, as in etcd.
pub(crate) const MESSAGE_OVERHEAD: usize = 512 << 10;

/// Answers up to this size are handed to h2 at once if the peer's window allows; larger ones go in pieces as it takes them.
const DIRECT_MAX: usize = 64 << 10;

/// What is set aside for a message that comes in several frames, before they have come. It grows with what comes.
const GATHER_START: usize = 32 << 10;

/// A message's prefix: one byte of flags, four of length.
pub(super) const PREFIX: usize = 5;

const GRPC: HeaderValue = HeaderValue::from_static("application/grpc");
pub(super) const GRPC_STATUS: HeaderName = HeaderName::from_static("grpc-status");
const GRPC_MESSAGE: HeaderName = HeaderName::from_static("grpc-message");

/// The headers of a request: what of them concerns a handler.
pub(crate) struct Metadata(HeaderMap);

/// Whether the client wants to be refused when this member knows no leader.
pub(super) fn requires_leader(headers: &HeaderMap) -> bool {
    headers.get("hasleader").is_some_and(|value| value == "true")
}

/// # Errors
/// That there is no leader, if the client asks to be told so.
pub(super) fn check_leader(there_is_one: bool, headers: &HeaderMap) -> Result<(), Status> {
    if there_is_one || !requires_leader(headers) { Ok(()) } else { Err(super::status(crate::error::ApplyError::NoLeader.into())) }
}

#[allow(dead_code, reason = "for users")]
impl Metadata {
    /// Whether the client wants to be refused when this member knows no leader.
    pub fn requires_leader(&self) -> bool {
        requires_leader(&self.0)
    }

    /// A header, if it is text.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.0.get(name)?.to_str().ok()
    }

    /// The client's auth token, if it has sent one that is text.
    pub fn token(&self) -> Option<&str> {
        let token = self.0.get("token").or_else(|| self.0.get("authorization"))?.to_str().ok()?;
        Some(token.strip_prefix("Bearer ").unwrap_or(token))
    }
}

/// An answer that is made as the peer takes it: for those too large to be held.
pub(crate) struct Streamed {
    /// The length of the encoded message, known before its first byte is made.
    pub len: usize,
    /// Its bytes in order, in pieces of any size, each made when the one before was taken. All together `len` bytes. An
    /// error ends the call with that status; the client then throws away what it has.
    pub chunks: BoxStream<'static, Result<Bytes, Status>>,
}

/// What a handler answers with: a message, or the pieces of one.
pub(crate) enum Answer {
    /// The message with its prefix.
    Whole(Bytes),
    Streamed(Streamed),
}

/// What can be made an [`Answer`]: every message, [`Streamed`], and either of the two.
pub(crate) trait IntoAnswer: Send + 'static {
    fn into_answer(self) -> Result<Answer, Status>;

    /// Bytes that are held as soon as it is one.
    fn held_len(&self) -> usize;
}

impl<M: prost::Message + 'static> IntoAnswer for M {
    fn into_answer(self) -> Result<Answer, Status> {
        frame(&self).map(Answer::Whole)
    }

    fn held_len(&self) -> usize {
        self.encoded_len()
    }
}

impl IntoAnswer for Streamed {
    fn into_answer(self) -> Result<Answer, Status> {
        Ok(Answer::Streamed(self))
    }

    /// None: its pieces are counted as they are made.
    fn held_len(&self) -> usize {
        0
    }
}

/// One or the other.
pub(crate) enum Either<M> {
    Message(M),
    Streamed(Streamed),
}

impl<M: IntoAnswer> IntoAnswer for Either<M> {
    fn into_answer(self) -> Result<Answer, Status> {
        match self {
            Either::Message(message) => message.into_answer(),
            Either::Streamed(streamed) => streamed.into_answer(),
        }
    }

    fn held_len(&self) -> usize {
        match self {
            Either::Message(message) => message.held_len(),
            Either::Streamed(streamed) => streamed.held_len(),
        }
    }
}

/// A message with its prefix, in one buffer of exactly that size.
pub(crate) fn frame(message: &impl prost::Message) -> Result<Bytes, Status> {
    let len = message.encoded_len();
    let mut buf = BytesMut::with_capacity(PREFIX + len);
    buf.put_slice(&prefix(len)?);
    // It fails only where there is no room, and there is.
    message.encode(&mut buf).map_err(|err| Status::internal(err.to_string()))?;
    Ok(buf.freeze())
}

pub(super) fn prefix(len: usize) -> Result<[u8; PREFIX], Status> {
    let too_large = |_| Status::resource_exhausted(format!("grpc: message of {len} bytes is larger than gRPC can send"));
    let [a, b, c, d] = u32::try_from(len).map_err(too_large)?.to_be_bytes();
    Ok([0, a, b, c, d])
}

/// Every method, and who handles it.
pub(crate) struct Router {
    methods: BTreeMap<String, Entry>,
    services: BTreeSet<&'static str>,
    routes: Option<Routes>,
    guard: Option<Guard>,
    limit: usize,
    metrics: Arc<Metrics>,
    slow: Arc<SlowRequests>,
}

/// Looks at a call's headers before anything else is looked at.
type Guard = Box<dyn Fn(&str, &HeaderMap) -> Result<(), Status> + Send + Sync>;

enum Entry {
    Unary(Box<dyn Unary>),
    Conversation(Box<dyn Converse>, Arc<MethodMetrics>),
    Streaming(Arc<MethodMetrics>, Pace),
}

/// What is asked of a client that is sent a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pace {
    /// Nothing: the stream may rest for days, and costs little while it does.
    Any,
    /// To take what is there: the stream has an end, and keeps a revision from compaction until then. Who gives no window for
    /// [`STREAM_STALL`](super::serve::STREAM_STALL) is given up.
    Steady,
}

trait Unary: Send + Sync {
    fn call(&self, exchange: Exchange) -> Call;
}

struct Handler<S, F, Req> {
    state: S,
    handle: F,
    metrics: Arc<MethodMetrics>,
    slow: Arc<SlowRequests>,
    request: std::marker::PhantomData<fn() -> Req>,
}

impl<S, F, Req, Fut, Resp> Unary for Handler<S, F, Req>
where
    S: Clone + Send + Sync + 'static,
    F: Fn(S, Metadata, Req) -> Fut + Clone + Send + Sync + 'static,
    Fut: Future<Output = Result<Resp, Status>> + Send + 'static,
    Req: prost::Message + Default + 'static,
    Resp: IntoAnswer,
{
    fn call(&self, mut exchange: Exchange) -> Call {
        let in_flight = self.metrics.start();
        let (state, handle, slow) = (self.state.clone(), self.handle.clone(), self.slow.clone());
        // What it holds is looked after, so that it fits the allocator's quick lists (1 kB): what is rare is in boxes of its own, and nothing is
        // moved into it twice.
        Box::pin(async move {
            let outcome = async {
                let message = exchange.receive(&in_flight).await?;
                let request = Req::decode(message).map_err(undecodable)?;
                let metadata = Metadata(std::mem::take(&mut exchange.headers));
                let handling = pin!(handle(state, metadata, request));
                Ok(exchange.until_gone(handling).await??)
            };
            let outcome: Result<Resp, Failure> = outcome.await;
            slow.look_at(&in_flight, &outcome);
            let answer = match outcome {
                Ok(response) if exchange.lacks_room(&response) => {
                    let room = Box::pin(exchange.wait_for_room()).await;
                    room.and_then(|()| Ok(response.into_answer()?))
                }
                outcome => outcome.and_then(|response| Ok(response.into_answer()?)),
            };
            match answer {
                Ok(answer) => {
                    if let Some(rest) = exchange.answer(answer, in_flight) {
                        rest.await;
                    }
                }
                Err(Failure::Status(status)) => exchange.fail(&status, in_flight),
                // Nobody waits any more; the guard counts it.
                Err(Failure::Gone) => {}
            }
        })
    }
}

/// Tells the log of unary requests that took long.
struct SlowRequests {
    slow: Slow,
    /// Where the time begins by which lines are spaced.
    epoch: Instant,
}

impl SlowRequests {
    /// Looks at a request when its outcome is there; how long the client takes to take it is the client's business.
    fn look_at<T>(&self, in_flight: &InFlight, outcome: &Result<T, Failure>) {
        let took = in_flight.elapsed();
        if self.slow.is_slow(took)
            && let Some(unreported) = self.slow.tell(self.epoch.elapsed())
        {
            let outcome = match outcome {
                Ok(_) => Code::Ok,
                Err(Failure::Status(status)) => status.code(),
                Err(Failure::Gone) => Code::Cancelled,
            };
            // Not what was asked for: keys may be nobody else's business.
            tracing::warn!(method = in_flight.method(), ?took, ?outcome, unreported, "a request took long");
        }
    }
}

/// How a call ends otherwise than with an answer.
pub(super) enum Failure {
    Status(Status),
    /// The client has reset the stream.
    Gone,
}

impl From<Status> for Failure {
    fn from(status: Status) -> Self {
        Failure::Status(status)
    }
}

pub(super) fn undecodable(err: prost::DecodeError) -> Status {
    let text = err.to_string();
    // Only a Txn contains itself, so only a Txn goes that deep.
    if text.contains("recursion limit reached") {
        let err = crate::error::ApplyError::TooManyOps;
        return Status::new(Code::from_i32(err.code()), err.to_string());
    }
    Status::internal(format!("grpc: error unmarshalling request: {text}"))
}

impl Router {
    /// A router without methods. `limit` is the largest message taken, in bytes: `max_request_bytes` and [`MESSAGE_OVERHEAD`].
    /// Unary requests that take longer than `slow` are logged.
    pub fn new(limit: usize, slow: Duration, metrics: Arc<Metrics>) -> Self {
        let slow = Arc::new(SlowRequests { slow: Slow::new(slow), epoch: Instant::now() });
        Router { methods: BTreeMap::new(), services: BTreeSet::new(), routes: None, guard: None, limit, metrics, slow }
    }

    /// Adds a unary method.
    ///
    /// `state` is cloned for each call; an `Arc`, or a few of them. The handler is dropped at any `await` if the client goes away.
    ///
    /// ```text
    /// let router = Router::new(limit, slow, metrics)
    ///     .unary("etcdserverpb.KV", "Put", &api, |api: Api, _, request: PutRequest| async move { api.put(request).await });
    /// ```
    pub fn unary<S, F, Req, Fut, Resp>(self, service: &'static str, method: &'static str, state: &S, handle: F) -> Self
    where
        S: Clone + Send + Sync + 'static,
        F: Fn(S, Metadata, Req) -> Fut + Clone + Send + Sync + 'static,
        Fut: Future<Output = Result<Resp, Status>> + Send + 'static,
        Req: prost::Message + Default + 'static,
        Resp: IntoAnswer,
    {
        let metrics = self.metrics.method(service, method, MethodKind::Unary);
        let handler = Handler { state: state.clone(), handle, metrics, slow: self.slow.clone(), request: std::marker::PhantomData };
        self.add(service, method, Entry::Unary(Box::new(handler)))
    }

    /// Adds a method that answers each message of a stream with one.
    pub(super) fn conversation(self, service: &'static str, method: &'static str, conversation: impl Converse + 'static) -> Self {
        let metrics = self.metrics.method(service, method, MethodKind::BidiStream);
        self.add(service, method, Entry::Conversation(Box::new(conversation), metrics))
    }

    /// Adds a method that [`routes`](Self::routes) handle.
    pub fn streaming(self, service: &'static str, method: &'static str, kind: MethodKind, pace: Pace) -> Self {
        let metrics = self.metrics.method(service, method, kind);
        self.add(service, method, Entry::Streaming(metrics, pace))
    }

    /// Sets who looks at the path and the headers of every call first, and may refuse it for them.
    pub fn guard(mut self, guard: impl Fn(&str, &HeaderMap) -> Result<(), Status> + Send + Sync + 'static) -> Self {
        self.guard = Some(Box::new(guard));
        self
    }

    /// Sets the tonic services that handle the streaming methods. They enforce their own limit on a message's size.
    pub fn routes(mut self, routes: Routes) -> Self {
        self.routes = Some(routes.prepare());
        self
    }

    fn add(mut self, service: &'static str, method: &'static str, entry: Entry) -> Self {
        self.services.insert(service);
        self.methods.insert(format!("/{service}/{method}"), entry);
        self
    }

    fn call(&self, request: Request<RecvStream>, respond: SendResponse<Bytes>, wire: &Arc<Wire>, open: OpenStream) -> Call {
        let (mut head, body) = request.into_parts();
        let accepted = Instant::now();
        let refused = if !is_grpc(&head.headers) {
            Err((StatusCode::UNSUPPORTED_MEDIA_TYPE, Status::invalid_argument(bad_content_type(&head.headers))))
        } else if head.method != Method::POST {
            let text = format!("Received a HEADERS frame with :method {:?} which should be POST", head.method.as_str());
            Err((StatusCode::METHOD_NOT_ALLOWED, Status::internal(text)))
        } else {
            let guarded = self.guard.as_ref().map_or(Ok(()), |guard| guard(head.uri.path(), &head.headers));
            guarded
                .map_err(|status| (StatusCode::OK, status))
                .and_then(|()| timeout(&head.headers).map_err(|text| (StatusCode::BAD_REQUEST, Status::internal(text))))
        };
        let timeout = match refused {
            Ok(timeout) => timeout,
            Err((code, status)) => {
                refuse(respond, code, &status);
                return done();
            }
        };
        let deadline = timeout.and_then(|timeout| accepted.checked_add(timeout));
        match self.methods.get(head.uri.path()) {
            Some(Entry::Unary(unary)) => {
                let headers = std::mem::take(&mut head.headers);
                unary.call(Exchange { respond, body, headers, deadline, wire: wire.clone(), limit: self.limit, open })
            }
            Some(Entry::Conversation(conversation, metrics)) => {
                let headers = std::mem::take(&mut head.headers);
                let exchange = Exchange { respond, body, headers, deadline, wire: wire.clone(), limit: self.limit, open };
                conversation.call(exchange, metrics.start())
            }
            Some(Entry::Streaming(metrics, pace)) if let Some(routes) = &self.routes => {
                let in_flight = Arc::new(metrics.start());
                let body = tonic::body::Body::new(Incoming::new(body, in_flight.clone()));
                stream(routes.clone(), Request::from_parts(head, body), respond, Terms { deadline, pace: *pace }, in_flight, open)
            }
            _ => {
                refuse(respond, StatusCode::OK, &self.unknown(head.uri.path()));
                done()
            }
        }
    }

    fn unknown(&self, path: &str) -> Status {
        match path.strip_prefix('/').and_then(|path| path.rsplit_once('/')) {
            None => Status::unimplemented(format!("malformed method name: {path:?}")),
            Some((service, method)) if self.services.contains(service) => {
                Status::unimplemented(format!("unknown method {method} for service {service}"))
            }
            Some((service, _)) => Status::unimplemented(format!("unknown service {service}")),
        }
    }
}

/// What to do about a request.
pub(super) fn call(app: &App, request: Request<RecvStream>, respond: SendResponse<Bytes>, wire: &Arc<Wire>) -> Call {
    let Some(open) = wire.open_stream() else {
        serve::refuse(respond);
        return done();
    };
    let grpc =
        |router: &&Arc<Router>| is_grpc(request.headers()) || app.http.is_none() || router.methods.contains_key(request.uri().path());
    if let Some(router) = app.grpc.as_ref().filter(grpc) {
        return router.call(request, respond, wire, open);
    }
    let Some(http) = app.http.clone() else {
        serve::refuse(respond);
        return done();
    };
    let wire = wire.clone();
    Box::pin(async move {
        let _open = open;
        let (head, body) = http.answer(request.method(), request.uri()).await.into_parts();
        let _held = wire.hold(body.len());
        let mut respond = respond;
        if let Ok(mut send) = respond.send_response(Response::from_parts(head, ()), body.is_empty())
            && !body.is_empty()
        {
            // Who has gone away needs no answer.
            let _ = send_all(&mut send, body, true).await;
        }
    })
}

fn done() -> Call {
    Box::pin(std::future::ready(()))
}

fn is_grpc(headers: &HeaderMap) -> bool {
    headers.get(CONTENT_TYPE).is_some_and(|value| {
        let rest = value.as_bytes().strip_prefix(b"application/grpc");
        matches!(rest, Some([] | [b'+' | b';', ..]))
    })
}

fn bad_content_type(headers: &HeaderMap) -> String {
    let found = headers.get(CONTENT_TYPE).map(|value| String::from_utf8_lossy(value.as_bytes())).unwrap_or_default();
    format!("invalid gRPC request content-type {found:?}")
}

/// What the client gives us to answer, from `grpc-timeout`: up to eight digits and a unit.
fn timeout(headers: &HeaderMap) -> Result<Option<Duration>, String> {
    let Some(value) = headers.get("grpc-timeout") else { return Ok(None) };
    let malformed = |what: &str| {
        let value = String::from_utf8_lossy(value.as_bytes());
        format!("malformed grpc-timeout: transport: timeout {what}: {value:?}")
    };
    let (digits, unit) = match value.as_bytes() {
        [] | [_] => return Err(malformed("string is too short")),
        bytes if bytes.len() > 9 => return Err(malformed("string is too long")),
        [digits @ .., unit] => (digits, unit),
    };
    let mut amount = 0u64;
    for digit in digits {
        if !digit.is_ascii_digit() {
            return Err(malformed("is not a number"));
        }
        amount = amount * 10 + u64::from(digit - b'0');
    }
    Ok(Some(match unit {
        b'H' => Duration::from_secs(amount * 3600),
        b'M' => Duration::from_secs(amount * 60),
        b'S' => Duration::from_secs(amount),
        b'm' => Duration::from_millis(amount),
        b'u' => Duration::from_micros(amount),
        b'n' => Duration::from_nanos(amount),
        _ => return Err(malformed("unit is not recognized")),
    }))
}

pub(super) fn deadline_exceeded() -> Status {
    Status::deadline_exceeded("context deadline exceeded")
}

/// A call that is served here: its request and the way back.
pub(super) struct Exchange {
    pub respond: SendResponse<Bytes>,
    pub body: RecvStream,
    headers: HeaderMap,
    pub deadline: Option<Instant>,
    pub wire: Arc<Wire>,
    limit: usize,
    open: OpenStream,
}

impl Exchange {
    /// The request's message, without its prefix.
    async fn receive(&mut self, in_flight: &InFlight) -> Result<Bytes, Failure> {
        self.check_encoding()?;
        // Nearly always everything is there by now, in one frame.
        let first = poll_fn(|cx| Poll::Ready(self.body.poll_data(cx))).await;
        let message = match first {
            Poll::Ready(Some(Ok(mut frame))) => {
                // Ours to count from here on, if anybody's.
                let _ = self.body.flow_control().release_capacity(frame.len());
                match self.message_len(&frame)? {
                    Some(len) if frame.len() >= PREFIX + len => {
                        frame.truncate(PREFIX + len);
                        frame.advance(PREFIX);
                        frame
                    }
                    _ => Box::pin(self.gather(frame)).await?,
                }
            }
            Poll::Ready(Some(Err(_))) => return Err(Failure::Gone),
            Poll::Ready(None) => return Err(Status::unknown("EOF").into()),
            Poll::Pending => Box::pin(self.gather(Bytes::new())).await?,
        };
        in_flight.received(message.len());
        Ok(message)
    }

    pub fn check_encoding(&self) -> Result<(), Status> {
        match self.headers.get("grpc-encoding").map(HeaderValue::as_bytes) {
            None | Some(b"identity" | b"") => Ok(()),
            // Refused later, if it is used.
            Some(b"gzip") => Ok(()),
            Some(other) => Err(self.unknown_encoding(other)),
        }
    }

    fn unknown_encoding(&self, encoding: &[u8]) -> Status {
        let encoding = String::from_utf8_lossy(encoding);
        Status::unimplemented(format!("grpc: Decompressor is not installed for grpc-encoding {encoding:?}"))
    }

    /// The length that the prefix announces; none while it is incomplete.
    pub fn message_len(&self, bytes: &[u8]) -> Result<Option<usize>, Status> {
        let [flags, a, b, c, d, ..] = *bytes else { return Ok(None) };
        let len = u32::from_be_bytes([a, b, c, d]) as usize;
        match flags {
            0 => {}
            1 => {
                return Err(match self.headers.get("grpc-encoding").map(HeaderValue::as_bytes) {
                    None | Some(b"identity" | b"") => Status::internal("grpc: compressed flag set with identity or empty encoding"),
                    Some(encoding) => self.unknown_encoding(encoding),
                });
            }
            other => return Err(Status::internal(format!("grpc: received unexpected payload format {other}"))),
        }
        if len > self.limit {
            let text = format!("grpc: received message larger than max ({len} vs. {})", self.limit);
            return Err(Status::resource_exhausted(text));
        }
        Ok(Some(len))
    }

    /// A message that comes in several frames, of which `first` has come.
    async fn gather(&mut self, first: Bytes) -> Result<Bytes, Failure> {
        let late = Instant::now() + REQUEST_TIMEOUT;
        let until = self.deadline.map_or(late, |deadline| deadline.min(late));
        let gathered = tokio::time::timeout_at(until, self.gather_all(first)).await;
        gathered.unwrap_or_else(|_| Err(deadline_exceeded().into()))
    }

    async fn gather_all(&mut self, mut frame: Bytes) -> Result<Bytes, Failure> {
        let mut partial: Partial = self.wire.partial();
        let mut all = BytesMut::new();
        loop {
            partial.grow(frame.len())?;
            if all.is_empty() && !frame.is_empty() {
                // Not the announced length: who announces much and sends little must not cost much.
                all.reserve(GATHER_START);
            }
            all.extend_from_slice(&frame);
            if let Some(len) = self.message_len(&all)?
                && all.len() >= PREFIX + len
            {
                all.truncate(PREFIX + len);
                all.advance(PREFIX);
                return Ok(all.freeze());
            }
            frame = match poll_fn(|cx| self.body.poll_data(cx)).await {
                Some(Ok(frame)) => frame,
                Some(Err(_)) => return Err(Failure::Gone),
                None if all.len() < PREFIX => return Err(Status::unknown("EOF").into()),
                None => return Err(Status::unknown("unexpected EOF").into()),
            };
            let _ = self.body.flow_control().release_capacity(frame.len());
        }
    }

    /// Runs the handler, unless the client goes away or the deadline passes before it is done.
    async fn until_gone<T>(&mut self, handler: Pin<&mut impl Future<Output = T>>) -> Result<T, Failure> {
        let respond = &mut self.respond;
        let guarded = pin!(Guarded { handler, gone: |cx: &mut Context<'_>| respond.poll_reset(cx).is_ready() });
        match self.deadline {
            None => guarded.await,
            Some(deadline) => {
                Box::pin(tokio::time::timeout_at(deadline, guarded)).await.unwrap_or_else(|_| Err(deadline_exceeded().into()))
            }
        }
    }

    /// Whether this answer has to wait for [room](Self::wait_for_room): it is large, and others may have been answered since the request
    /// was taken.
    fn lacks_room(&self, response: &impl IntoAnswer) -> bool {
        !self.wire.has_room() && response.held_len() > DIRECT_MAX
    }

    async fn wait_for_room(&mut self) -> Result<(), Failure> {
        let wire = self.wire.clone();
        self.until_gone(pin!(wire.room())).await
    }

    /// Sends the answer, if the peer's window takes it now, as it nearly always does. What is left to do otherwise is returned.
    fn answer(mut self, answer: Answer, in_flight: InFlight) -> Option<Call> {
        let Ok(mut send) = self.respond.send_response(head(), false) else { return None };
        match answer {
            Answer::Whole(bytes) if bytes.len() <= DIRECT_MAX => {
                let len = bytes.len();
                send.reserve_capacity(len);
                if send.capacity() < len {
                    return Some(Box::pin(self.answer_slowly(send, Answer::Whole(bytes), in_flight)));
                }
                if send.send_data(bytes, false).is_ok() {
                    end(&mut send, len - PREFIX, in_flight);
                }
                None
            }
            answer => Some(Box::pin(self.answer_slowly(send, answer, in_flight))),
        }
    }

    async fn answer_slowly(self, mut send: SendStream<Bytes>, answer: Answer, in_flight: InFlight) {
        match answer {
            Answer::Whole(bytes) => {
                let len = bytes.len();
                let _held = self.wire.hold(len);
                if send_all(&mut send, bytes, false).await.is_ok() {
                    end(&mut send, len - PREFIX, in_flight);
                }
            }
            Answer::Streamed(streamed) => {
                let len = streamed.len;
                match send_streamed(&mut send, streamed, &self.wire).await {
                    Ok(()) => end(&mut send, len, in_flight),
                    Err(Failure::Status(status)) => {
                        // An error here means that the client has gone.
                        let _ = send.send_trailers(status_headers(&status, HeaderMap::with_capacity(2)));
                        in_flight.finish(status.code());
                    }
                    Err(Failure::Gone) => {}
                }
            }
        }
        drop(self.open);
    }

    pub fn fail(self, status: &Status, in_flight: InFlight) {
        refuse(self.respond, StatusCode::OK, status);
        in_flight.finish(status.code());
    }
}

/// The end of an answer that went well. `len`: that of its message.
fn end(send: &mut SendStream<Bytes>, len: usize, in_flight: InFlight) {
    if send.send_trailers(trailers_ok()).is_ok() {
        in_flight.sent(len);
        in_flight.finish(Code::Ok);
    }
}

pub(super) fn head() -> Response<()> {
    let mut response = Response::new(());
    response.headers_mut().insert(CONTENT_TYPE, GRPC);
    response
}

pub(super) fn trailers_ok() -> HeaderMap {
    let mut trailers = HeaderMap::with_capacity(1);
    trailers.insert(GRPC_STATUS, HeaderValue::from_static("0"));
    trailers
}

pub(super) fn status_headers(status: &Status, mut headers: HeaderMap) -> HeaderMap {
    headers.insert(GRPC_STATUS, HeaderValue::from(status.code() as i32));
    if let Ok(message) = HeaderValue::try_from(percent_encode(status.message())) {
        headers.insert(GRPC_MESSAGE, message);
    }
    if status.code() == Code::Unimplemented {
        headers.insert("grpc-accept-encoding", HeaderValue::from_static("identity"));
    }
    headers
}

/// As gRPC has it: printable ASCII stays as it is, but for `%`.
fn percent_encode(text: &str) -> String {
    let mut encoded = String::with_capacity(text.len());
    for byte in text.bytes() {
        match byte {
            b' '..=b'~' if byte != b'%' => encoded.push(char::from(byte)),
            // Writing to a String does not fail.
            _ => _ = write!(encoded, "%{byte:02X}"),
        }
    }
    encoded
}

/// Answers with a status and nothing else.
pub(super) fn refuse(mut respond: SendResponse<Bytes>, code: StatusCode, status: &Status) {
    let mut response = head();
    *response.status_mut() = code;
    *response.headers_mut() = status_headers(status, std::mem::take(response.headers_mut()));
    // An error here means that the client has gone.
    let _ = respond.send_response(response, true);
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering;

    use prost::Message;

    use super::super::testing::*;
    use super::*;
    use h2::Reason;

    use crate::proto::KeyValue;
    use crate::proto::etcdserverpb::kv_client::KvClient;
    use crate::proto::etcdserverpb::watch_client::WatchClient;
    use crate::proto::etcdserverpb::{
        PutRequest, PutResponse, RangeRequest, RangeResponse, RequestOp, TxnRequest, WatchCreateRequest, WatchRequest, request_op,
        watch_request,
    };

    const PUT: &str = "/etcdserverpb.KV/Put";

    fn put(key: &'static str, value: impl Into<Bytes>) -> PutRequest {
        PutRequest { key: key.into(), value: value.into(), ..Default::default() }
    }

    /// What is sent with which headers, and what a real etcd 3.5.30 answers to it: HTTP code, gRPC code, text.
    #[tokio::test]
    async fn refusals() {
        let server = TestServer::start().await;
        let client = server.connect().await;
        let cases: &[(&str, &[(&str, &str)], &[u8], (u16, i32, &str))] = &[
            (PUT, &[], b"\0\0\0\0\0", (200, 3, "etcdserver: key is not provided")),
            (PUT, &[], b"\0\0\0\0\0\0\0\0\0\0", (200, 3, "etcdserver: key is not provided")),
            (PUT, &[], b"", (200, 2, "EOF")),
            (PUT, &[], b"\0", (200, 2, "EOF")),
            (PUT, &[], b"\0\0\0\0\x05\x0a", (200, 2, "unexpected EOF")),
            (PUT, &[], b"\x01\0\0\0\0", (200, 13, "grpc: compressed flag set with identity or empty encoding")),
            (PUT, &[("grpc-encoding", "foo")], b"\x01\0\0\0\0", (200, 12, "grpc: Decompressor is not installed for grpc-encoding \"foo\"")),
            (PUT, &[("grpc-encoding", "foo")], b"\0\0\0\0\0", (200, 12, "grpc: Decompressor is not installed for grpc-encoding \"foo\"")),
            (
                PUT,
                &[("grpc-encoding", "gzip")],
                b"\x01\0\0\0\0",
                (200, 12, "grpc: Decompressor is not installed for grpc-encoding \"gzip\""),
            ),
            (PUT, &[("grpc-encoding", "identity")], b"\0\0\0\0\0", (200, 3, "etcdserver: key is not provided")),
            (PUT, &[], b"\x02\0\0\0\0", (200, 13, "grpc: received unexpected payload format 2")),
            (PUT, &[], b"\0\xff\xff\xff\xff", (200, 8, "grpc: received message larger than max (4294967295 vs. 2097152)")),
            (PUT, &[("grpc-timeout", "1n")], b"\0\0\0\0\x06\x0a\x04hang", (200, 4, "context deadline exceeded")),
            (
                PUT,
                &[("grpc-timeout", "123456789S")],
                b"\0\0\0\0\0",
                (400, 13, "malformed grpc-timeout: transport: timeout string is too long: \"123456789S\""),
            ),
            (PUT, &[("content-type", "application/json")], b"", (415, 3, "invalid gRPC request content-type \"application/json\"")),
            (PUT, &[("content-type", "")], b"", (415, 3, "invalid gRPC request content-type \"\"")),
            ("/foo", &[], b"", (200, 12, "malformed method name: \"/foo\"")),
            ("/", &[], b"", (200, 12, "malformed method name: \"/\"")),
            ("/nothing/Foo", &[], b"", (200, 12, "unknown service nothing")),
            ("/a/b/c", &[], b"", (200, 12, "unknown service a/b")),
            ("/etcdserverpb.KV/Foo", &[], b"", (200, 12, "unknown method Foo for service etcdserverpb.KV")),
            ("/etcdserverpb.KV/", &[], b"", (200, 12, "unknown method  for service etcdserverpb.KV")),
        ];
        for (path, headers, body, (code, grpc, text)) in cases {
            let mut request = request(path);
            for (name, value) in *headers {
                request.headers_mut().unwrap().insert(*name, value.parse().unwrap());
            }
            let answer = post(&client, request, vec![Bytes::from_static(body)]).await.unwrap();
            assert_eq!((answer.code, answer.status()), (*code, (*grpc, *text)), "{path} {headers:?} {body:?}");
            assert!(answer.trailers_only, "{path} {headers:?} {body:?}");
            assert_eq!(answer.header("content-type"), "application/grpc");
            assert_eq!(answer.header("grpc-accept-encoding"), if *grpc == 12 { "identity" } else { "" });
        }
        let get = Request::get("http://x/etcdserverpb.KV/Put").header("content-type", "application/grpc");
        let answer = post(&client, get, vec![Bytes::new()]).await.unwrap();
        assert_eq!((answer.code, answer.status()), (405, (13, "Received a HEADERS frame with :method \"GET\" which should be POST")));
        let text = server.metrics.text();
        assert!(
            text.contains("grpc_server_started_total{grpc_method=\"Put\",grpc_service=\"etcdserverpb.KV\",grpc_type=\"unary\"} 13\n"),
            "{text}"
        );
        assert!(text.contains("grpc_server_handled_total{grpc_code=\"InvalidArgument\",grpc_method=\"Put\",grpc_service=\"etcdserverpb.KV\",grpc_type=\"unary\"} 3\n"));
    }

    #[tokio::test]
    async fn malformed_messages() {
        let server = TestServer::start().await;
        let client = server.connect().await;
        for body in [&b"\0\0\0\0\x05\x0a\x09aaa"[..], b"\0\0\0\0\x02\x0f\x01", b"\0\0\0\0\x01\xff"] {
            let answer = post(&client, request(PUT), vec![Bytes::from_static(body)]).await.unwrap();
            let (code, text) = answer.status();
            assert_eq!(code, 13);
            assert!(text.starts_with("grpc: error unmarshalling request: "), "{text}");
        }
        let mut txn = TxnRequest::default();
        for _ in 0..200 {
            txn = TxnRequest { success: vec![RequestOp { request: Some(request_op::Request::RequestTxn(txn)) }], ..Default::default() };
        }
        let answer = post(&client, request("/etcdserverpb.KV/Txn"), vec![message(&txn)]).await.unwrap();
        assert_eq!(answer.status(), (3, "etcdserver: too many operations in txn request"));
    }

    #[tokio::test]
    async fn generated_clients() {
        let server = TestServer::start().await;
        let channel = tonic::transport::Endpoint::from_shared(format!("http://{}", server.addr)).unwrap().connect().await.unwrap();
        let mut kv = KvClient::new(channel.clone()).max_decoding_message_size(usize::MAX);

        for key in ["k", "later"] {
            let answer = kv.put(put(key, "v")).await.unwrap().into_inner();
            assert_eq!(answer.prev_kv.unwrap().decode().unwrap(), KeyValue { key: key.into(), value: "v".into(), ..Default::default() });
        }
        let refused = kv.put(put("error", "")).await.unwrap_err();
        assert_eq!((refused.code(), refused.message()), (Code::OutOfRange, "100 %\nfür alle"));

        let mut request = tonic::Request::new(put("token", ""));
        request.metadata_mut().insert("authorization", "Bearer abc".parse().unwrap());
        request.metadata_mut().insert("hasleader", "true".parse().unwrap());
        let answer = kv.put(request).await.unwrap().into_inner();
        assert_eq!(answer.prev_kv.unwrap().decode().unwrap().value, "Some(\"abc\") true");

        // Many frames, the largest message, and one byte more.
        let overhead = put("k", vec![0; LIMIT / 2]).encoded_len() - LIMIT / 2;
        let value = Bytes::from(vec![b'x'; LIMIT - overhead]);
        let answer = kv.put(put("k", value.clone())).await.unwrap().into_inner();
        assert!(answer.prev_kv.unwrap().decode().unwrap().value == value);
        let refused = kv.put(put("k", vec![b'x'; LIMIT - overhead + 1])).await.unwrap_err();
        assert_eq!(
            (refused.code(), refused.message()),
            (Code::ResourceExhausted, "grpc: received message larger than max (2097153 vs. 2097152)")
        );

        // Streamed answers: as long as announced, another length, an error on the way.
        let range = |key: &'static str, limit| RangeRequest { key: key.into(), limit, ..Default::default() };
        assert_eq!(kv.range(range("", 0)).await.unwrap().into_inner(), RangeResponse { count: 7, ..Default::default() });
        for count in [0, 1, 20_000] {
            let answer = kv.range(range("k", count)).await.unwrap().into_inner();
            assert_eq!(answer.kvs.len(), count as usize);
        }
        assert!(kv.range(range("lie", 3)).await.is_err());
        assert!(kv.range(range("fail", 10)).await.is_err());

        let mut watch = WatchClient::new(channel);
        let create = watch_request::RequestUnion::CreateRequest(WatchCreateRequest::default());
        let requests = [WatchRequest::default(), WatchRequest { request_union: Some(create) }];
        let mut answers = watch.watch(tokio_stream::iter(requests)).await.unwrap().into_inner();
        let mut seen = Vec::new();
        while let Some(answer) = answers.message().await.unwrap() {
            seen.push((answer.watch_id, answer.created));
        }
        assert_eq!(seen, [(0, false), (1, true)]);

        let text = server.metrics.text();
        for line in [
            r#"grpc_server_handled_total{grpc_code="OK",grpc_method="Watch",grpc_service="etcdserverpb.Watch",grpc_type="bidi_stream"} 1"#,
            r#"grpc_server_msg_received_total{grpc_method="Watch",grpc_service="etcdserverpb.Watch",grpc_type="bidi_stream"} 2"#,
            r#"grpc_server_msg_sent_total{grpc_method="Watch",grpc_service="etcdserverpb.Watch",grpc_type="bidi_stream"} 2"#,
            r#"grpc_server_handled_total{grpc_code="OutOfRange",grpc_method="Put",grpc_service="etcdserverpb.KV",grpc_type="unary"} 1"#,
            r#"grpc_server_handled_total{grpc_code="DataLoss",grpc_method="Range",grpc_service="etcdserverpb.KV",grpc_type="unary"} 1"#,
        ] {
            assert!(text.lines().any(|found| found == line), "{line}\n{text}");
        }
        server.serving.stop(Duration::from_secs(60)).await;
        assert_eq!((server.limits.connections(), server.limits.streams()), (0, 0));
    }

    /// Series cost memory here and in whatever scrapes: what clients send must not make any.
    #[tokio::test]
    async fn no_request_makes_a_series() {
        let server = TestServer::start().await;
        let client = server.connect().await;
        let series = || -> Vec<String> {
            let text = server.metrics.text();
            text.lines().filter(|line| !line.starts_with('#')).filter_map(|line| Some(line.rsplit_once(' ')?.0.to_owned())).collect()
        };
        let before = series();
        for number in 0..50 {
            for path in [format!("/etcdserverpb.KV/Put{number}"), format!("/service{number}/Put"), format!("/{number}"), PUT.into()] {
                let mut request = request(&path);
                for name in ["client-api-version", "grpc-encoding", "user-agent", "authorization", "x-request-id"] {
                    request = request.header(name, format!("{number}"));
                }
                post(&client, request, vec![message(&put("k", ""))]).await.unwrap();
            }
            let get = Request::get(format!("http://x/metrics/{number}?a={number}"));
            assert_eq!(post(&client, get, vec![Bytes::new()]).await.unwrap().code, 404);
        }
        assert_eq!(series(), before);
    }

    /// The prefix and the message may come in pieces of any size.
    #[tokio::test]
    async fn pieces() {
        let server = TestServer::start().await;
        let client = server.connect().await;
        let whole = message(&put("key", "value"));
        for size in 1..=whole.len() {
            let frames = whole.chunks(size).map(Bytes::copy_from_slice).collect();
            let answer = post(&client, request(PUT), frames).await.unwrap();
            assert_eq!(answer.status(), (0, ""));
            let response = PutResponse::decode(answer.body.slice(PREFIX..)).unwrap();
            assert_eq!(response.prev_kv.unwrap().decode().unwrap().value, "value");
        }
    }

    #[tokio::test]
    async fn a_reset_drops_the_handler() {
        let server = TestServer::start().await;
        let client = server.connect().await;
        let (response, mut stream) = client.clone().send_request(request(PUT).body(()).unwrap(), false).unwrap();
        stream.send_data(message(&put("hang", "")), true).unwrap();
        server.until(|server| server.limits.streams() == 1).await;
        stream.send_reset(Reason::CANCEL);
        drop(response);
        server.until(|server| server.state.dropped.load(Ordering::Relaxed) == 1 && server.limits.streams() == 0).await;
        let canceled =
            r#"grpc_server_handled_total{grpc_code="Canceled",grpc_method="Put",grpc_service="etcdserverpb.KV",grpc_type="unary"} 1"#;
        assert!(server.metrics.text().contains(canceled));
    }

    #[tokio::test]
    async fn a_panic_ends_its_connection_only() {
        let server = TestServer::start().await;
        let (one, other) = (server.connect().await, server.connect().await);
        assert!(post(&one, request("/etcdserverpb.KV/DeleteRange"), vec![Bytes::from_static(b"\0\0\0\0\0")]).await.is_err());
        assert_eq!(post(&other, request(PUT), vec![message(&put("k", ""))]).await.unwrap().status(), (0, ""));
    }

    #[test]
    fn timeouts() {
        let parse = |value: &str| timeout(&HeaderMap::from_iter([(HeaderName::from_static("grpc-timeout"), value.parse().unwrap())]));
        assert_eq!(parse("1S"), Ok(Some(Duration::from_secs(1))));
        assert_eq!(parse("99999999H"), Ok(Some(Duration::from_secs(99_999_999 * 3600))));
        assert_eq!(parse("20u"), Ok(Some(Duration::from_micros(20))));
        assert_eq!(parse("0n"), Ok(Some(Duration::ZERO)));
        for wrong in ["", "S", "1", "1s", "-1S", "1.5S", "123456789S", "xyz"] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
    }
}
