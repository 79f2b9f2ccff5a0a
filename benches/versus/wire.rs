//! gRPC on a bare HTTP/2 connection: as little between the load and the socket as can be.
//!
//! A [`Channel`] is one connection, cheap to clone; any number of calls may be under way on it at once. Requests go out as they
//! come in: one frame, five bytes and a message, made by [`frame`]. Answers come back as the message's bytes, and [`fields`] looks
//! into them without building anything; that is cheap enough to check every answer of a load.
//!
//! ```text
//! let mut channel = Channel::connect("http://127.0.0.1:2379").await?;
//! let put = channel.method("/etcdserverpb.KV/Put");
//! let answer: PutResponse = channel.call(&put, &PutRequest { .. }).await?;
//! ```
//!
//! Caveats: no TLS, no compression, no deadlines; whoever waits must bring a clock.

use std::error::Error;
use std::future::poll_fn;
use std::sync::Arc;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use h2::client::{ResponseFuture, SendRequest};
use h2::{RecvStream, SendStream};
use http::{HeaderMap, Method, Request, Response};
use prost::Message;
use prost::encoding::{WireType, decode_key, decode_varint};
use tokio::net::TcpStream;

/// What can go wrong: sockets, HTTP/2, a status other than OK, a wrong answer. Nobody here acts on the difference.
pub type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

/// Bytes the server may send ahead on one stream. Beyond it the server waits, so it must be larger than the largest answer.
const STREAM_WINDOW_BYTES: u32 = 4 << 20;
/// Bytes the server may send ahead on the whole connection; beyond it the server waits.
const CONNECTION_WINDOW_BYTES: u32 = 64 << 20;
/// One flag byte and four of length before every message.
const FRAME_HEAD_BYTES: usize = 5;
/// Longest message believed. Beyond it the answer is taken for garbage.
const MESSAGE_BYTES_MAX: usize = 64 << 20;

/// One HTTP/2 connection.
#[derive(Clone)]
pub struct Channel {
    send: SendRequest<Bytes>,
    authority: Arc<str>,
}

impl Channel {
    /// Connects to `http://host:port`. Must be called within a runtime, which then also runs the connection.
    pub async fn connect(endpoint: &str) -> Result<Self> {
        let authority = endpoint.strip_prefix("http://").ok_or_else(|| format!("{endpoint}: only http:// endpoints are supported"))?;
        let authority = authority.trim_end_matches('/');
        let tcp = TcpStream::connect(authority).await?;
        tcp.set_nodelay(true)?;
        let (send, connection) = h2::client::Builder::new()
            .initial_window_size(STREAM_WINDOW_BYTES)
            .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
            .handshake(tcp)
            .await?;
        tokio::spawn(async move {
            // Whatever ends the connection also ends its streams with the reason, and they report it.
            let _ = connection.await;
        });
        Ok(Self { send, authority: authority.into() })
    }

    /// The head of every request to one method, such as `/etcdserverpb.KV/Put`.
    pub fn method(&self, path: &str) -> Request<()> {
        let uri = format!("http://{}{path}", self.authority);
        let request = Request::builder().method(Method::POST).uri(uri).header("content-type", "application/grpc");
        request.header("te", "trailers").body(()).expect("an authority that connected and a path of ours make a URI")
    }

    /// Sends one frame, waits for the one message of the answer and for status OK.
    pub async fn unary(&mut self, method: &Request<()>, frame: Bytes) -> Result<Bytes> {
        let (response, mut request) = self.start(method).await?;
        request.send_data(frame, true)?;
        let mut body = checked(response.await?)?.into_body();
        // Nearly always the whole answer is in one piece, which is then passed on as it is.
        let mut first = Bytes::new();
        let mut whole = BytesMut::new();
        while let Some(piece) = next_piece(&mut body).await? {
            if first.is_empty() {
                first = piece;
                continue;
            }
            if whole.is_empty() {
                whole.reserve(FRAME_HEAD_BYTES + message_length(&first)?.unwrap_or_default());
                whole.put_slice(&first);
            }
            whole.put_slice(&piece);
        }
        check_status(body.trailers().await?.as_ref())?;
        let mut answer = if whole.is_empty() { first } else { whole.freeze() };
        match message_length(&answer)? {
            Some(length) if answer.len() == FRAME_HEAD_BYTES + length => Ok(answer.split_off(FRAME_HEAD_BYTES)),
            _ => Err(format!("an answer of {} bytes is not one message", answer.len()).into()),
        }
    }

    /// As [`unary`](Self::unary), for messages of any kind. For what is not measured.
    pub async fn call<A: Message + Default>(&mut self, method: &str, request: &impl Message) -> Result<A> {
        let method = self.method(method);
        Ok(A::decode(self.unary(&method, frame(request)).await?)?)
    }

    /// Opens a stream in both directions.
    pub async fn open(&mut self, method: &Request<()>) -> Result<(SendStream<Bytes>, Incoming)> {
        let (response, request) = self.start(method).await?;
        Ok((request, Incoming { response: Some(response), body: None, rest: Bytes::new() }))
    }

    async fn start(&mut self, method: &Request<()>) -> Result<(ResponseFuture, SendStream<Bytes>)> {
        poll_fn(|context| self.send.poll_ready(context)).await?;
        Ok(self.send.send_request(method.clone(), false)?)
    }
}

/// The messages that arrive on a stream.
pub struct Incoming {
    /// Until the head of the answer is here; servers may send it only with the first message.
    response: Option<ResponseFuture>,
    body: Option<RecvStream>,
    /// What arrived and was not handed out yet.
    rest: Bytes,
}

impl Incoming {
    /// The next message; `None` once the server has ended the stream with status OK.
    pub async fn next(&mut self) -> Result<Option<Bytes>> {
        if let Some(response) = self.response.take() {
            self.body = Some(checked(response.await?)?.into_body());
        }
        let Some(body) = &mut self.body else { return Err("the stream had failed before".into()) };
        loop {
            if let Some(length) = message_length(&self.rest)?
                && self.rest.len() >= FRAME_HEAD_BYTES + length
            {
                self.rest.advance(FRAME_HEAD_BYTES);
                return Ok(Some(self.rest.split_to(length)));
            }
            let Some(piece) = next_piece(body).await? else { break };
            if self.rest.is_empty() {
                self.rest = piece;
            } else {
                let mut joined = BytesMut::with_capacity(self.rest.len() + piece.len());
                joined.put_slice(&self.rest);
                joined.put_slice(&piece);
                self.rest = joined.freeze();
            }
        }
        check_status(body.trailers().await?.as_ref())?;
        if self.rest.is_empty() { Ok(None) } else { Err("the stream ended within a message".into()) }
    }
}

/// The next bytes of an answer. They are given back to the flow control at once: nobody here is slow on purpose.
async fn next_piece(body: &mut RecvStream) -> Result<Option<Bytes>> {
    loop {
        let Some(piece) = body.data().await.transpose()? else { return Ok(None) };
        body.flow_control().release_capacity(piece.len())?;
        if !piece.is_empty() {
            return Ok(Some(piece));
        }
    }
}

fn checked(response: Response<RecvStream>) -> Result<Response<RecvStream>> {
    if response.status() != http::StatusCode::OK {
        return Err(format!("HTTP status {}", response.status()).into());
    }
    // A refused call has its status here and no body. A stream that is well has none yet.
    if response.headers().contains_key("grpc-status") {
        check_status(Some(response.headers()))?;
    }
    Ok(response)
}

fn check_status(trailers: Option<&HeaderMap>) -> Result<()> {
    let Some(trailers) = trailers else { return Err("an answer without a status".into()) };
    match trailers.get("grpc-status") {
        Some(status) if status == "0" => Ok(()),
        status => {
            let text =
                |value: Option<&http::HeaderValue>| value.map_or(String::new(), |value| String::from_utf8_lossy(value.as_bytes()).into());
            Err(format!("grpc-status {} {}", text(status), text(trailers.get("grpc-message"))).into())
        }
    }
}

/// The length of the message that begins here; `None` while its head is incomplete.
fn message_length(bytes: &[u8]) -> Result<Option<usize>> {
    let Some((&[flag, a, b, c, d], _)) = bytes.split_first_chunk::<FRAME_HEAD_BYTES>() else { return Ok(None) };
    let length = u32::from_be_bytes([a, b, c, d]) as usize;
    if flag != 0 || length > MESSAGE_BYTES_MAX {
        return Err(format!("a frame of {length} bytes with flag {flag}").into());
    }
    Ok(Some(length))
}

/// One message as it goes to the wire.
pub fn frame(message: &impl Message) -> Bytes {
    let length = message.encoded_len();
    let mut frame = BytesMut::with_capacity(FRAME_HEAD_BYTES + length);
    frame.put_u8(0);
    frame.put_u32(u32::try_from(length).expect("our own messages are small"));
    message.encode(&mut frame).expect("the buffer grows");
    frame.freeze()
}

/// One field of a message: its number and what it holds.
#[derive(Debug, PartialEq)]
pub enum Field<'a> {
    Number(u32, u64),
    Bytes(u32, &'a [u8]),
}

/// The top-level fields of an encoded message, in order, nothing decoded beneath them.
pub fn fields(mut rest: &[u8]) -> impl Iterator<Item = Result<Field<'_>>> {
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let field = next_field(&mut rest);
        if field.is_err() {
            rest = &[];
        }
        Some(field)
    })
}

fn next_field<'a>(rest: &mut &'a [u8]) -> Result<Field<'a>> {
    let (number, kind) = decode_key(rest)?;
    match kind {
        WireType::Varint => Ok(Field::Number(number, decode_varint(rest)?)),
        WireType::LengthDelimited => {
            let length = usize::try_from(decode_varint(rest)?)?;
            let (bytes, behind) = rest.split_at_checked(length).ok_or("a field longer than its message")?;
            *rest = behind;
            Ok(Field::Bytes(number, bytes))
        }
        other => Err(format!("field {number} has wire type {other:?}").into()),
    }
}

/// Runs one future to its end on a runtime of its own.
pub fn block_on<T>(future: impl Future<Output = Result<T>>) -> Result<T> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(future)
}

#[cfg(test)]
#[allow(unused)] // See main.rs.
mod tests {
    use quorate::proto::etcdserverpb::{PutRequest, RangeResponse};

    use super::*;

    #[test]
    fn frames_and_their_fields() {
        let frame = frame(&PutRequest { key: "k".into(), value: "v".into(), lease: 300, ..Default::default() });
        assert_eq!(&frame[..], b"\0\0\0\0\x09\x0a\x01k\x12\x01v\x18\xac\x02");
        assert_eq!(message_length(&frame).unwrap(), Some(9));
        assert_eq!(message_length(&frame[..4]).unwrap(), None);
        let seen: Vec<_> = fields(&frame[5..]).map(|field| field.unwrap()).collect();
        assert_eq!(seen, [Field::Bytes(1, b"k"), Field::Bytes(2, b"v"), Field::Number(3, 300)]);
    }

    #[test]
    fn garbage_is_an_error_and_an_end() {
        for bytes in [&b"\x0a\x05k"[..], b"\x0a", b"\x08\xff", b"\x0d\0\0\0\0", b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff"] {
            let seen: Vec<_> = fields(bytes).collect();
            assert_eq!(seen.len(), 1);
            assert!(seen[0].is_err());
        }
        assert!(message_length(b"\x01\0\0\0\0").is_err());
        assert!(message_length(b"\0\xff\xff\xff\xff").is_err());
        assert_eq!(fields(&RangeResponse::default().encode_to_vec()).count(), 0);
    }
}
