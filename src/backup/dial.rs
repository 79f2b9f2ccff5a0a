//! The way to an object store: HTTP/1.1, in TLS as the members speak it, one connection for each request.
//!
//! The crate `object_store` makes the requests, signs them, and repeats what failed; how they are carried is left to who uses it. Its own
//! way would bring a second HTTP client and a second set of roots; this one is hyper and rustls with *ring*, which are there anyway, and
//! trusts the CAs of the system, or those that `SSL_CERT_FILE` and `SSL_CERT_DIR` name. A part of a backup is large, so that a connection
//! of its own costs little, and none can have gone stale.
//!
//! # Invariants
//! - Each request has a time, `timeout` of the store's options, until the answer begins, and the same again for each piece of the answer. A
//!   connection ends with its answer.
//! - Plain HTTP is refused unless the options allow it.
//!
//! # Caveats
//! - Proxies, HTTP/2, and certificates that are not looked at are not built: options that ask for them are refused. Redirections are not
//!   followed.

use std::pin::Pin;
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use http::header::HOST;
use http::{HeaderValue, Uri, uri};
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper_util::rt::TokioIo;
use object_store::client::{
    HttpClient, HttpConnector, HttpError, HttpErrorKind, HttpRequest, HttpRequestBody, HttpResponse, HttpResponseBody, HttpService,
};
use object_store::{ClientConfigKey, ClientOptions};
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, RootCertStore};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::time::{Instant, Sleep};
use tokio_rustls::TlsConnector;
use tokio_util::task::AbortOnDropHandle;

use crate::config::parse_duration;

/// Whom to trust, once it was looked for: not before the first request in TLS.
type Roots = Arc<OnceLock<Result<Arc<ClientConfig>, String>>>;

/// Makes the ways. Clones share what is trusted.
#[derive(Clone, Debug, Default)]
pub(super) struct Dialer {
    roots: Roots,
}

impl HttpConnector for Dialer {
    fn connect(&self, options: &ClientOptions) -> object_store::Result<HttpClient> {
        let wrong = |why: String| object_store::Error::Generic { store: "HTTP", source: why.into() };
        let given = |key: ClientConfigKey| options.get_config_value(&key);
        let refused = [
            (given(ClientConfigKey::ProxyUrl).is_some(), "a proxy is not built"),
            (given(ClientConfigKey::AllowInvalidCertificates).as_deref() == Some("true"), "invalid certificates are not allowed"),
            (given(ClientConfigKey::NoSystemCertificates).as_deref() == Some("true"), "no other certificates than the system's are built"),
            (given(ClientConfigKey::Http2Only).as_deref() == Some("true"), "HTTP/2 is not built"),
        ];
        if let Some((_, why)) = refused.into_iter().find(|(is_asked_for, _)| *is_asked_for) {
            return Err(wrong(format!("{why}: unset that option of the store")));
        }
        let time = |key: ClientConfigKey, name: &str, usual: Duration| match given(key) {
            None => Ok(usual),
            // With or without blanks: "1m 30s".
            Some(text) => parse_duration(&text.replace(' ', "")).map_err(|right| wrong(format!("its option {name} is {text:?}; {right}"))),
        };
        Ok(HttpClient::new(Way {
            roots: self.roots.clone(),
            allow_http: given(ClientConfigKey::AllowHttp).as_deref() == Some("true"),
            connect: time(ClientConfigKey::ConnectTimeout, "connect_timeout", Duration::from_secs(5))?,
            request: time(ClientConfigKey::Timeout, "timeout", Duration::from_secs(30))?,
        }))
    }
}

#[derive(Debug)]
struct Way {
    roots: Roots,
    allow_http: bool,
    /// How long making a connection may take, with TLS.
    connect: Duration,
    /// How long an answer may take to begin; and each piece of it.
    request: Duration,
}

fn error(kind: HttpErrorKind, why: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> HttpError {
    HttpError::new_boxed(kind, why.into())
}

fn late(what: &str, limit: Duration) -> HttpError {
    error(HttpErrorKind::Timeout, format!("{what} within {limit:?}"))
}

/// What hyper says. All that has to do with the connection may be tried again.
fn broken(err: hyper::Error) -> HttpError {
    let kind = if err.is_parse() || err.is_user() { HttpErrorKind::Decode } else { HttpErrorKind::Interrupted };
    // With its cause: by itself it says little.
    let cause = std::error::Error::source(&err).map_or(String::new(), |cause| format!(": {cause}"));
    error(kind, format!("{err}{cause}"))
}

#[async_trait]
impl HttpService for Way {
    async fn call(&self, request: HttpRequest) -> Result<HttpResponse, HttpError> {
        let (mut parts, body) = request.into_parts();
        let to = std::mem::take(&mut parts.uri).into_parts();
        let (Some(scheme), Some(authority)) = (to.scheme, to.authority) else {
            return Err(error(HttpErrorKind::Unknown, "the URL has no host"));
        };
        let is_tls = scheme == uri::Scheme::HTTPS;
        if !is_tls && !self.allow_http {
            return Err(error(HttpErrorKind::Unknown, "the store's endpoint is http://, and allow_http is not set"));
        }
        parts.uri = to
            .path_and_query
            .map_or_else(|| Ok(Uri::from_static("/")), |path| path.as_str().parse())
            .map_err(|err| error(HttpErrorKind::Unknown, err))?;
        let host = authority.port().map_or_else(|| authority.host().to_owned(), |port| format!("{}:{port}", authority.host()));
        if !parts.headers.contains_key(HOST) {
            parts.headers.insert(HOST, HeaderValue::from_str(&host).map_err(|err| error(HttpErrorKind::Unknown, err))?);
        }
        let port = authority.port_u16().unwrap_or(if is_tls { 443 } else { 80 });
        let dialed = tokio::time::timeout(self.connect, self.dial(authority.host(), port, is_tls)).await;
        let (mut sender, line) = dialed.map_err(|_| late("no connection", self.connect))??;
        let answer = tokio::time::timeout(self.request, sender.send_request(http::Request::from_parts(parts, body))).await;
        let (head, body) = answer.map_err(|_| late("no answer", self.request))?.map_err(broken)?.into_parts();
        let answer = Answer { body, _line: line, limit: self.request, late: Box::pin(tokio::time::sleep(self.request)) };
        Ok(HttpResponse::from_parts(head, HttpResponseBody::new(answer)))
    }
}

impl Way {
    async fn dial(&self, host: &str, port: u16, is_tls: bool) -> Result<(SendRequest<HttpRequestBody>, AbortOnDropHandle<()>), HttpError> {
        let connect = |err: std::io::Error| error(HttpErrorKind::Connect, err);
        // As an address is written in a URL, if it is one of IPv6.
        let host = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
        let stream = TcpStream::connect((host, port)).await.map_err(connect)?;
        stream.set_nodelay(true).map_err(connect)?;
        if !is_tls {
            return begin(stream).await;
        }
        let config = self.roots.get_or_init(roots).clone().map_err(|why| error(HttpErrorKind::Unknown, why))?;
        let name = ServerName::try_from(host.to_owned()).map_err(|err| error(HttpErrorKind::Unknown, err))?;
        begin(TlsConnector::from(config).connect(name, stream).await.map_err(connect)?).await
    }
}

async fn begin(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
) -> Result<(SendRequest<HttpRequestBody>, AbortOnDropHandle<()>), HttpError> {
    let (sender, line) = handshake(TokioIo::new(stream)).await.map_err(broken)?;
    // What goes wrong there, the request is told as well.
    let line = tokio::spawn(async move { drop(line.await) });
    Ok((sender, AbortOnDropHandle::new(line)))
}

/// Whom to trust: the system's CAs.
fn roots() -> Result<Arc<ClientConfig>, String> {
    let found = rustls_native_certs::load_native_certs();
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(found.certs);
    if roots.is_empty() {
        return Err("the system has no CA certificates that could be trusted; SSL_CERT_FILE may name a file with some".into());
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions().map_err(|err| err.to_string())?;
    Ok(Arc::new(config.with_root_certificates(roots).with_no_client_auth()))
}

/// An answer's body. It holds the connection, and gives up when nothing comes for too long.
struct Answer {
    body: Incoming,
    _line: AbortOnDropHandle<()>,
    limit: Duration,
    late: Pin<Box<Sleep>>,
}

impl Body for Answer {
    type Data = Bytes;
    type Error = HttpError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, HttpError>>> {
        if let Poll::Ready(frame) = Pin::new(&mut self.body).poll_frame(cx) {
            let next = Instant::now() + self.limit;
            self.late.as_mut().reset(next);
            return Poll::Ready(frame.map(|frame| frame.map_err(broken)));
        }
        let limit = self.limit;
        self.late.as_mut().poll(cx).map(|()| Some(Err(late("nothing more of the answer", limit))))
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
