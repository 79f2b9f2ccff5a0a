//! The plain HTTP paths: `/health`, `/livez`, `/readyz`, `/version`, `/metrics`.
//!
//! Bodies, codes and headers are etcd's to the byte, since load balancers and kubelets compare them; the recorded answers of
//! a real etcd are in `tests/compat/http.txt`. Everything is answered from a query string and [`Checks`]; request bodies are not looked at.
//!
//! ```text
//! GET /readyz?verbose&exclude=non_learner      200  [+]data_corruption ok
//!                                                   [+]serializable_read ok
//!                                                   [+]linearizable_read ok
//!                                                   ok
//! GET /health        under a NOSPACE alarm     503  {"health":"false","reason":"ALARM NOSPACE"}
//! ```
//!
//! # Where we differ
//! - etcd prints checks in random order; we print them in one order.
//! - `/version` has one more field, `quorate`. Over HTTP/2 these paths work without TLS too.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::sync::Arc;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use http::header::{ALLOW, CONTENT_TYPE, HeaderName};
use http::{HeaderValue, Method, Response, StatusCode, Uri};

use crate::error::Error;
use crate::metrics::{Metrics, TEXT_TYPE};
use crate::proto::etcdserverpb::AlarmType;

const TEXT: HeaderValue = HeaderValue::from_static("text/plain; charset=utf-8");
const JSON: HeaderValue = HeaderValue::from_static("application/json");
const NOSNIFF: (HeaderName, HeaderValue) = (HeaderName::from_static("x-content-type-options"), HeaderValue::from_static("nosniff"));

/// Any web page may ask, as with etcd: nothing here can be changed from outside.
const CORS: [(HeaderName, HeaderValue); 3] = [
    (HeaderName::from_static("access-control-allow-headers"), HeaderValue::from_static("accept, content-type, authorization")),
    (HeaderName::from_static("access-control-allow-methods"), HeaderValue::from_static("POST, GET, OPTIONS, PUT, DELETE")),
    (HeaderName::from_static("access-control-allow-origin"), HeaderValue::from_static("*")),
];

/// What the paths need to know of the member.
pub(crate) trait Checks: Send + Sync + 'static {
    /// The alarms that are raised, as numbers of `AlarmType`, in the order etcd lists them: by type.
    fn alarms(&self) -> Vec<i32>;

    /// Whether this member knows a leader.
    fn has_leader(&self) -> bool;

    /// Whether this member is a learner.
    fn is_learner(&self) -> bool;

    /// Reads one key: from this member alone, or as of now. The second may wait for as long as a request may.
    fn read(&self, serializable: bool) -> BoxFuture<'_, Result<(), Error>>;
}

/// The versions that `/version` tells.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Versions {
    /// etcd's release that we claim to be.
    pub server: &'static str,
    pub cluster: &'static str,
    pub storage: &'static str,
}

/// One of the named checks.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Check {
    DataCorruption,
    SerializableRead,
    LinearizableRead,
    NonLearner,
}

const LIVEZ: [Check; 1] = [Check::SerializableRead];
const READYZ: [Check; 4] = [Check::DataCorruption, Check::SerializableRead, Check::LinearizableRead, Check::NonLearner];

impl Check {
    fn name(self) -> &'static str {
        match self {
            Check::DataCorruption => "data_corruption",
            Check::SerializableRead => "serializable_read",
            Check::LinearizableRead => "linearizable_read",
            Check::NonLearner => "non_learner",
        }
    }

    async fn run(self, member: &dyn Checks) -> Result<(), String> {
        let read = match self {
            Check::DataCorruption if member.alarms().contains(&(AlarmType::Corrupt as i32)) => {
                return Err("alarm activated: CORRUPT".into());
            }
            // etcd's wording.
            Check::NonLearner if member.is_learner() => return Err("not supported for learner".into()),
            Check::DataCorruption | Check::NonLearner => return Ok(()),
            Check::SerializableRead => member.read(true).await,
            Check::LinearizableRead => member.read(false).await,
        };
        read.map_err(|err| err.to_string())
    }
}

/// Pages that etcd has not, or another `/metrics`, by path: the kind of text, and the text. It is asked first.
pub(crate) type Pages = Arc<dyn Fn(&str) -> Option<(HeaderValue, String)> + Send + Sync>;

/// Answers the plain HTTP paths.
pub(crate) struct Http {
    checks: Arc<dyn Checks>,
    metrics: Arc<Metrics>,
    versions: Versions,
    pages: Option<Pages>,
}

impl Http {
    pub fn new(checks: Arc<dyn Checks>, metrics: Arc<Metrics>, versions: Versions) -> Self {
        Http { checks, metrics, versions, pages: None }
    }

    /// The same with more pages.
    pub fn with_pages(self, pages: Pages) -> Self {
        Http { pages: Some(pages), ..self }
    }

    /// Answers a request. It never fails, and waits only where a check reads.
    pub async fn answer(&self, method: &Method, uri: &Uri) -> Response<Bytes> {
        let mut response = self.route(method, uri).await;
        response.headers_mut().extend(CORS);
        if method == Method::HEAD {
            *response.body_mut() = Bytes::new();
        }
        response
    }

    async fn route(&self, method: &Method, uri: &Uri) -> Response<Bytes> {
        if method == Method::OPTIONS {
            return Response::new(Bytes::new());
        }
        let path = uri.path();
        if let Some((kind, text)) = self.pages.as_ref().and_then(|pages| pages(path)) {
            return answer(StatusCode::OK, kind, text);
        }
        let second = path.match_indices('/').nth(1).map_or(path.len(), |(at, _)| at);
        let checks: &[Check] = match path.split_at(second) {
            ("/metrics", "") => {
                return answer(StatusCode::OK, HeaderValue::from_static(TEXT_TYPE), self.metrics.text());
            }
            ("/health", "") | ("/version", "") => &[],
            ("/livez", "") => &LIVEZ,
            ("/readyz", "") => &READYZ,
            ("/livez", name) => named(&LIVEZ, name),
            ("/readyz", name) => named(&READYZ, name),
            _ => &[],
        };
        let known = matches!(path, "/health" | "/version") || !checks.is_empty();
        if !known {
            return error(StatusCode::NOT_FOUND, "404 page not found\n");
        }
        if method != Method::GET {
            let mut response = error(StatusCode::METHOD_NOT_ALLOWED, "Method Not Allowed\n");
            response.headers_mut().insert(ALLOW, HeaderValue::from_static("GET"));
            return response;
        }
        let query = uri.query().unwrap_or_default();
        match path {
            "/version" => self.version(),
            "/health" => self.health(query).await,
            "/livez" | "/readyz" => self.check(checks, query, true).await,
            _ => self.check(checks, query, false).await,
        }
    }

    fn version(&self) -> Response<Bytes> {
        let Versions { server, cluster, storage } = self.versions;
        let own = env!("CARGO_PKG_VERSION");
        let body = format!(r#"{{"etcdserver":"{server}","etcdcluster":"{cluster}","storage":"{storage}","quorate":"{own}"}}"#);
        answer(StatusCode::OK, JSON, body)
    }

    /// The older health check: alarms, then the leader, then a read.
    async fn health(&self, query: &str) -> Response<Bytes> {
        let excluded: BTreeSet<String> = values(query, "exclude").collect();
        let serializable = values(query, "serializable").next().is_some_and(|value| value == "true");
        let alarms = self.checks.alarms();
        let alarm = alarms.iter().map(|alarm| alarm_name(*alarm)).find(|name| !excluded.contains(name));
        let reason = match alarm {
            Some(name) => Some(format!("ALARM {name}")),
            None if !serializable && !self.checks.has_leader() => Some("RAFT NO LEADER".into()),
            None => self.checks.read(serializable).await.err().map(|err| format!("RANGE ERROR:{err}")),
        };
        match reason {
            None => {
                self.metrics.counters.health_success.inc();
                answer(StatusCode::OK, TEXT, r#"{"health":"true","reason":""}"#)
            }
            Some(reason) => {
                self.metrics.counters.health_failures.inc();
                let reason = serde_json::Value::from(reason);
                error(StatusCode::SERVICE_UNAVAILABLE, format!("{{\"health\":\"false\",\"reason\":{reason}}}\n"))
            }
        }
    }

    /// The newer ones. `exclude` counts for the whole list only, not where one check is asked for by its path.
    async fn check(&self, checks: &[Check], query: &str, list: bool) -> Response<Bytes> {
        let excluded: BTreeSet<String> = values(query, "exclude").filter(|_| list).collect();
        let verbose = values(query, "verbose").next().is_some();
        let mut lines = String::new();
        let mut failed = false;
        for check in checks.iter().filter(|check| !excluded.contains(check.name())) {
            // Writing to a String does not fail.
            let _ = match check.run(&*self.checks).await {
                Ok(()) => writeln!(lines, "[+]{} ok", check.name()),
                Err(why) => {
                    failed = true;
                    writeln!(lines, "[-]{} failed: {why}", check.name())
                }
            };
        }
        if failed {
            self.metrics.counters.health_failures.inc();
            tracing::warn!(checks = lines.trim_end(), "a health check has failed");
            return error(StatusCode::SERVICE_UNAVAILABLE, lines + "\n");
        }
        self.metrics.counters.health_success.inc();
        let lines = if verbose { lines } else { String::new() };
        error(StatusCode::OK, lines + "ok\n")
    }
}

/// The check of that name, with its slash, if it is in the list.
fn named<'a>(list: &'a [Check], name: &str) -> &'a [Check] {
    let at = list.iter().position(|check| name.strip_prefix('/') == Some(check.name()));
    at.and_then(|at| list.get(at..=at)).unwrap_or_default()
}

fn alarm_name(alarm: i32) -> String {
    AlarmType::try_from(alarm).map_or_else(|_| alarm.to_string(), |alarm| alarm.as_str_name().to_owned())
}

/// What a parameter of the query is set to, each time it is.
fn values<'a>(query: &'a str, name: &'a str) -> impl Iterator<Item = String> + 'a {
    // As in Go, a pair with a semicolon or a wrong escape is as if it were not there.
    let pairs = query.split('&').filter(|pair| !pair.contains(';')).filter_map(|pair| {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        Some((unescape(key)?, unescape(value)?))
    });
    pairs.filter(move |(key, _)| key == name).map(|(_, value)| value)
}

fn unescape(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        bytes.push(match byte {
            b'+' => b' ',
            b'%' => {
                let digit = |byte: u8| char::from(byte).to_digit(16);
                u8::try_from(digit(rest.next()?)? * 16 + digit(rest.next()?)?).ok()?
            }
            byte => byte,
        });
    }
    Some(String::from_utf8_lossy(&bytes).into_owned())
}

fn answer(code: StatusCode, kind: HeaderValue, body: impl Into<Bytes>) -> Response<Bytes> {
    let mut response = Response::new(body.into());
    *response.status_mut() = code;
    response.headers_mut().insert(CONTENT_TYPE, kind);
    response
}

/// A text that says so: browsers are not to guess.
fn error(code: StatusCode, body: impl Into<Bytes>) -> Response<Bytes> {
    let mut response = answer(code, TEXT, body);
    response.headers_mut().extend([NOSNIFF]);
    response
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering;

    use super::super::testing::{State, VERSIONS};
    use super::*;

    /// Plays the recorded answers of a real etcd.
    #[tokio::test]
    async fn recorded_answers() {
        let text = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/compat/http.txt")).unwrap();
        let state = Arc::new(State::default());
        let http = Http::new(state.clone(), Metrics::new("3.7.1", "3.7"), VERSIONS);
        let mut played = 0;
        for case in text.split("\n\n").map(str::trim).filter(|case| !case.starts_with('#')) {
            if let Some(name) = case.strip_prefix("state ") {
                let alarm = |name: &str| AlarmType::from_str_name(name).unwrap() as i32;
                *state.alarms.lock().unwrap() =
                    name.strip_prefix("alarms ").map_or(Vec::new(), |names| names.split(' ').map(alarm).collect());
                state.learner.store(name == "learner", Ordering::Relaxed);
                state.leaderless.store(name == "leaderless", Ordering::Relaxed);
                continue;
            }
            let (request, expected) = case.split_once('\n').unwrap();
            let (method, uri) = request.split_once(' ').unwrap();
            let response = http.answer(&method.parse().unwrap(), &uri.parse().unwrap()).await;
            let mut found = response.status().as_u16().to_string();
            let mut headers: Vec<_> = response.headers().iter().filter(|(name, _)| !CORS.iter().any(|(cors, _)| cors == name)).collect();
            headers.sort_by_key(|(name, _)| name.as_str());
            for (name, value) in headers {
                found += &format!("\n{name}: {}", value.to_str().unwrap());
            }
            let body = String::from_utf8(response.body().to_vec()).unwrap();
            let (mut lines, rest): (Vec<_>, Vec<_>) = body.split('\n').partition(|line| line.starts_with('['));
            lines.sort_unstable();
            let body = if uri.starts_with("/metrics") { "...".into() } else { [lines, rest].concat().join("\n") };
            found += &format!("\n{}", serde_json::Value::from(body));
            assert_eq!(found, expected, "{request}");
            for (name, value) in &CORS {
                assert_eq!(response.headers().get(name), Some(value));
            }
            played += 1;
        }
        assert!(played > 100);
    }

    #[tokio::test]
    async fn failed_reads_and_odd_requests() {
        let state = Arc::new(State::default());
        let metrics = Metrics::new("3.7.1", "3.7");
        let http = Http::new(state.clone(), metrics.clone(), VERSIONS);
        let get = async |uri: &str| {
            let response = http.answer(&Method::GET, &uri.parse().unwrap()).await;
            (response.status().as_u16(), String::from_utf8(response.body().to_vec()).unwrap())
        };
        let version =
            concat!(r#"{"etcdserver":"3.7.1","etcdcluster":"3.7.0","storage":"3.7.0","quorate":""#, env!("CARGO_PKG_VERSION"), r#""}"#);
        assert_eq!(get("/version").await, (200, version.into()));
        assert_eq!(get("*").await.0, 404);
        assert_eq!(get("host:80").await.0, 404);
        state.unreadable.store(true, Ordering::Relaxed);
        let reason = r#"{"health":"false","reason":"RANGE ERROR:etcdserver: request timed out"}"#;
        assert_eq!(get("/health").await, (503, format!("{reason}\n")));
        assert_eq!(get("/livez").await, (503, "[-]serializable_read failed: etcdserver: request timed out\n\n".into()));
        assert_eq!((metrics.counters.health_failures.get(), metrics.counters.health_success.get()), (2, 0));
    }

    #[test]
    fn queries() {
        let of = |query: &str| values(query, "a").collect::<Vec<_>>();
        assert_eq!(of(""), [""; 0]);
        assert_eq!(of("a"), [""]);
        assert_eq!(of("a=1&b=2&a=3&aa=4"), ["1", "3"]);
        assert_eq!(of("%61=x+y%20z"), ["x y z"]);
        assert_eq!(of("a=%zz&a=%&a=%4&a=1;&a=2"), ["2"]);
    }
}
