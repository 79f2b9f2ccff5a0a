//! What the tests of this folder share: a server on a loopback port with a few methods, and a bare HTTP/2 client.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use bytes::{BufMut, Bytes, BytesMut};
use futures_util::StreamExt;
use futures_util::future::BoxFuture;
use h2::client::SendRequest;
use http::{HeaderMap, Request};
use tokio::net::TcpStream;
use tokio_util::sync::CancellationToken;
use tonic::Status;

use super::conversation::Conversation;
use super::http::{Checks, Http, Versions};
use super::serve::{App, Listener, Serving};
use super::unary::{Either, Metadata, Pace, Router, Streamed};
use super::wire::{Limits, ServeOptions};
use crate::error::{ApplyError, Error};
use crate::metrics::{MethodKind, Metrics};
use crate::proto::etcdserverpb::watch_server::{Watch, WatchServer};
use crate::proto::etcdserverpb::{
    DeleteRangeRequest, DeleteRangeResponse, LeaseKeepAliveRequest, LeaseKeepAliveResponse, PutRequest, PutResponse, RangeRequest,
    RangeResponse, TxnRequest, TxnResponse, WatchRequest, WatchResponse,
};
use crate::proto::{EncodedKv, KeyValue};

/// The largest message that the test server takes.
pub const LIMIT: usize = 2 << 20;

/// What takes longer is logged.
pub const SLOW: Duration = Duration::from_millis(300);

/// The state of the test server's handlers.
#[derive(Default)]
pub struct State {
    /// Handlers that were begun and dropped before they were done.
    pub dropped: AtomicUsize,
    /// Chunks of streamed answers that were made.
    pub chunks: AtomicUsize,
    pub alarms: std::sync::Mutex<Vec<i32>>,
    pub leaderless: AtomicBool,
    pub learner: AtomicBool,
    pub unreadable: AtomicBool,
    pub stop: CancellationToken,
}

impl Checks for State {
    fn alarms(&self) -> Vec<i32> {
        self.alarms.lock().unwrap().clone()
    }

    fn has_leader(&self) -> bool {
        !self.leaderless.load(Ordering::Relaxed)
    }

    fn is_learner(&self) -> bool {
        self.learner.load(Ordering::Relaxed)
    }

    fn read(&self, serializable: bool) -> BoxFuture<'_, Result<(), Error>> {
        Box::pin(async move {
            if self.unreadable.load(Ordering::Relaxed) || (!serializable && self.leaderless.load(Ordering::Relaxed)) {
                return Err(Error::Timeout);
            }
            Ok(())
        })
    }
}

/// Counts when it is dropped.
struct Dropped(Arc<State>);

impl Drop for Dropped {
    fn drop(&mut self) {
        self.0.dropped.fetch_add(1, Ordering::Relaxed);
    }
}

/// Answers with the key and the value it was sent. Keys say what else is to happen: `error`, `hang`, `token`, `later`, `mib`.
async fn put(state: Arc<State>, metadata: Metadata, request: PutRequest) -> Result<PutResponse, Status> {
    match &request.key[..] {
        b"" => return Err(Status::invalid_argument(ApplyError::EmptyKey.to_string())),
        b"error" => return Err(Status::out_of_range("100 %\nfür alle")),
        b"hang" => {
            let _dropped = Dropped(state.clone());
            std::future::pending().await
        }
        b"later" | b"mib later" => tokio::time::sleep(Duration::from_millis(1)).await,
        b"token" => {
            let value = format!("{:?} {}", metadata.token(), metadata.requires_leader()).into();
            return Ok(PutResponse { header: None, prev_kv: Some(EncodedKv::encode(&KeyValue { value, ..Default::default() })) });
        }
        _ => {}
    }
    let value = if request.key.starts_with(b"mib") { vec![b'v'; 1 << 20].into() } else { request.value };
    let kv = KeyValue { key: request.key, value, ..Default::default() };
    Ok(PutResponse { header: None, prev_kv: Some(EncodedKv::encode(&kv)) })
}

/// Answers with `limit` pairs of 1 KiB, or 1 MiB for the key `mib`, streamed; `count` is announced too large for the key `lie`, and the key `fail` breaks off.
async fn range(state: Arc<State>, _: Metadata, request: RangeRequest) -> Result<Either<RangeResponse>, Status> {
    use prost::Message;
    if request.key.is_empty() {
        return Ok(Either::Message(RangeResponse { count: 7, ..Default::default() }));
    }
    let size = if &request.key[..] == b"mib" { 1 << 20 } else { 1024 };
    let kv = KeyValue { key: request.key.clone(), value: vec![b'v'; size].into(), ..Default::default() };
    let one = Bytes::from(RangeResponse { kvs: vec![EncodedKv::encode(&kv)], ..Default::default() }.encode_to_vec());
    let count = request.limit as usize;
    let len = one.len() * count + usize::from(&request.key[..] == b"lie");
    let fail = &request.key[..] == b"fail";
    let chunks = futures_util::stream::iter(0..count).map(move |at| {
        state.chunks.fetch_add(1, Ordering::Relaxed);
        if fail && at == 3 { Err(Status::data_loss("it is gone")) } else { Ok(one.clone()) }
    });
    Ok(Either::Streamed(Streamed { len, chunks: chunks.boxed() }))
}

async fn txn(_: Arc<State>, _: Metadata, _: TxnRequest) -> Result<TxnResponse, Status> {
    Ok(TxnResponse::default())
}

/// A renewal whose TTL is the id; none for 0, and an endless one for -1.
async fn keep_alive(state: Arc<State>, request: LeaseKeepAliveRequest) -> Result<LeaseKeepAliveResponse, Status> {
    match request.id {
        0 => Err(Status::not_found("no lease")),
        -1 => {
            let _dropped = Dropped(state);
            std::future::pending().await
        }
        id => Ok(LeaseKeepAliveResponse { header: None, id, ttl: id }),
    }
}

async fn delete(_: Arc<State>, _: Metadata, _: DeleteRangeRequest) -> Result<DeleteRangeResponse, Status> {
    panic!("a handler's bug")
}

/// Answers each request of a watch with its own bytes' number; endless ones for an empty request.
struct Echo;

#[tonic::async_trait]
impl Watch for Echo {
    type WatchStream = std::pin::Pin<Box<dyn futures_util::Stream<Item = Result<WatchResponse, Status>> + Send>>;

    async fn watch(&self, request: tonic::Request<tonic::Streaming<WatchRequest>>) -> Result<tonic::Response<Self::WatchStream>, Status> {
        let mut requests = request.into_inner();
        let answers = futures_util::stream::poll_fn(move |cx| requests.poll_next_unpin(cx)).enumerate().map(|(at, request)| {
            request.map(|request| WatchResponse { watch_id: at as i64, created: request.request_union.is_some(), ..Default::default() })
        });
        Ok(tonic::Response::new(Box::pin(answers)))
    }
}

/// Answers everything with messages of 1 KiB without end.
#[derive(Clone)]
struct Endless(Arc<State>);

impl tonic::server::NamedService for Endless {
    const NAME: &'static str = "endless";
}

impl tonic::codegen::Service<Request<tonic::body::Body>> for Endless {
    type Response = http::Response<tonic::body::Body>;
    type Error = std::convert::Infallible;
    type Future = std::future::Ready<Result<Self::Response, Self::Error>>;

    fn poll_ready(&mut self, _: &mut std::task::Context<'_>) -> std::task::Poll<Result<(), Self::Error>> {
        std::task::Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: Request<tonic::body::Body>) -> Self::Future {
        let dropped = Dropped(self.0.clone());
        let frames = futures_util::stream::repeat_with(move || {
            dropped.0.chunks.fetch_add(1, Ordering::Relaxed);
            Ok::<_, Status>(http_body::Frame::data(Bytes::from([&[0, 0, 0, 4, 0][..], &[b'v'; 1024]].concat())))
        });
        let body = tonic::body::Body::new(http_body_util::StreamBody::new(frames));
        std::future::ready(Ok(http::Response::builder().header("content-type", "application/grpc").body(body).unwrap()))
    }
}

pub const VERSIONS: Versions = Versions { server: "3.7.1", cluster: "3.7.0", storage: "3.7.0" };

/// A server with the methods above.
pub struct TestServer {
    pub addr: SocketAddr,
    pub state: Arc<State>,
    pub metrics: Arc<Metrics>,
    pub limits: Arc<Limits>,
    pub serving: Serving,
}

pub fn app(state: &Arc<State>, metrics: &Arc<Metrics>) -> App {
    let router = Router::new(LIMIT, SLOW, metrics.clone())
        .unary("etcdserverpb.KV", "Put", state, put)
        .unary("etcdserverpb.KV", "Range", state, range)
        .unary("etcdserverpb.KV", "Txn", state, txn)
        .unary("etcdserverpb.KV", "DeleteRange", state, delete)
        .conversation("etcdserverpb.Lease", "LeaseKeepAlive", Conversation::new(state, state.stop.clone(), keep_alive))
        .streaming("etcdserverpb.Watch", "Watch", MethodKind::BidiStream, Pace::Any)
        .streaming("endless", "Steady", MethodKind::ServerStream, Pace::Steady)
        .streaming("endless", "Any", MethodKind::ServerStream, Pace::Any)
        .routes(tonic::service::Routes::new(WatchServer::new(Echo)).add_service(Endless(state.clone())));
    let http = Http::new(state.clone(), metrics.clone(), VERSIONS);
    App { grpc: Some(Arc::new(router)), http: Some(Arc::new(http)) }
}

impl TestServer {
    pub async fn start() -> Self {
        Self::start_with(ServeOptions { max_concurrent_streams: 1000, keepalive: None }).await
    }

    pub async fn start_with(options: ServeOptions) -> Self {
        let listener = Listener::tcp(([127, 0, 0, 1], 0).into()).await.unwrap();
        let addr = listener.local_addr().unwrap();
        let (state, metrics, limits) = (Arc::new(State::default()), Metrics::new("3.7.1", "3.7"), Limits::new(options));
        let serving = Serving::start(listener, limits.clone(), app(&state, &metrics));
        TestServer { addr, state, metrics, limits, serving }
    }

    pub async fn connect(&self) -> SendRequest<Bytes> {
        let stream = TcpStream::connect(self.addr).await.unwrap();
        let (send, connection) = h2::client::handshake(stream).await.unwrap();
        tokio::spawn(async move {
            let _ = connection.await;
        });
        send.ready().await.unwrap()
    }

    /// Waits until a condition holds; a test that waits for ever has failed.
    pub async fn until(&self, what: impl Fn(&Self) -> bool) {
        while !what(self) {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    /// As above, with a clock that jumps ahead whenever there is nothing to do.
    pub async fn until_later(&self, what: impl Fn(&Self) -> bool) {
        tokio::time::pause();
        while !what(self) {
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
        tokio::time::resume();
    }
}

pub fn request(path: &str) -> http::request::Builder {
    Request::post(format!("http://x{path}")).header("content-type", "application/grpc").header("te", "trailers")
}

pub fn message(message: &impl prost::Message) -> Bytes {
    let mut bytes = BytesMut::new();
    bytes.put_u8(0);
    bytes.put_u32(message.encoded_len() as u32);
    message.encode(&mut bytes).unwrap();
    bytes.freeze()
}

/// An answer as it came.
#[derive(Debug)]
pub struct Answer {
    pub code: u16,
    /// Headers and trailers.
    pub headers: HeaderMap,
    pub trailers_only: bool,
    pub body: Bytes,
}

impl Answer {
    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", |value| value.to_str().unwrap())
    }

    pub fn status(&self) -> (i32, &str) {
        (self.header("grpc-status").parse().unwrap_or(-1), self.header("grpc-message"))
    }
}

/// Sends a request with a body in the given frames.
pub async fn post(send: &SendRequest<Bytes>, request: http::request::Builder, frames: Vec<Bytes>) -> Result<Answer, h2::Error> {
    let mut send = send.clone().ready().await?;
    let (response, mut stream) = send.send_request(request.body(()).unwrap(), false)?;
    let last = frames.len().saturating_sub(1);
    let sending = async {
        for (at, mut frame) in frames.into_iter().enumerate() {
            loop {
                stream.reserve_capacity(frame.len());
                while stream.capacity() == 0 && !frame.is_empty() {
                    if !matches!(std::future::poll_fn(|cx| stream.poll_capacity(cx)).await, Some(Ok(_))) {
                        return;
                    }
                }
                let piece = frame.split_to(stream.capacity().min(frame.len()));
                let _ = stream.send_data(piece, at == last && frame.is_empty());
                if frame.is_empty() {
                    break;
                }
            }
        }
    };
    let receiving = async {
        let (head, mut body) = response.await?.into_parts();
        let trailers_only = head.headers.contains_key("grpc-status");
        let mut answer = Answer { code: head.status.as_u16(), headers: head.headers, trailers_only, body: Bytes::new() };
        let mut bytes = BytesMut::new();
        while let Some(data) = body.data().await {
            let data = data?;
            let _ = body.flow_control().release_capacity(data.len());
            bytes.extend_from_slice(&data);
        }
        answer.body = bytes.freeze();
        if let Some(trailers) = body.trailers().await? {
            answer.headers.extend(trailers);
        }
        Ok(answer)
    };
    let ((), answer) = tokio::join!(sending, receiving);
    answer
}

/// A connection on which frames are written by hand.
pub mod raw {
    pub const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
    pub const DATA: u8 = 0;
    pub const HEADERS: u8 = 1;
    pub const RST_STREAM: u8 = 3;
    pub const SETTINGS: u8 = 4;
    pub const PING: u8 = 6;
    pub const WINDOW_UPDATE: u8 = 8;
    pub const CONTINUATION: u8 = 9;
    pub const END_STREAM: u8 = 1;
    pub const END_HEADERS: u8 = 4;

    pub fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
        let len = (payload.len() as u32).to_be_bytes();
        [&len[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
    }

    /// The preface, and settings: number and value.
    pub fn hello(settings: &[(u16, u32)]) -> Vec<u8> {
        let payload: Vec<u8> = settings.iter().flat_map(|(id, value)| [&id.to_be_bytes()[..], &value.to_be_bytes()].concat()).collect();
        [PREFACE, &frame(SETTINGS, 0, 0, &payload)].concat()
    }

    /// The header block of a gRPC request: two names from HPACK's static table, two literals with names from it.
    pub fn headers(path: &str) -> Vec<u8> {
        let kind = "application/grpc";
        [&[0x83, 0x86, 0x04, path.len() as u8][..], path.as_bytes(), &[0x0f, 0x10, kind.len() as u8], kind.as_bytes()].concat()
    }

    /// Cuts received bytes into frames: kind and payload of each whole one.
    pub fn frames(mut bytes: &[u8]) -> Vec<(u8, Vec<u8>)> {
        let mut frames = Vec::new();
        while let [a, b, c, kind, _, _, _, _, _, rest @ ..] = bytes {
            let len = u32::from_be_bytes([0, *a, *b, *c]) as usize;
            let Some(payload) = rest.get(..len) else { break };
            frames.push((*kind, payload.to_vec()));
            bytes = &rest[len..];
        }
        frames
    }
}
