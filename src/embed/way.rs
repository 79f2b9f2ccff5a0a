//! The way to one server elsewhere, for the probes: a line of their own, in TLS and as a user where the node's client is.
//!
//! What it takes to have one, the connection and the login, goes on beside the probes, for on a busy machine it takes longer than one of them
//! may:
//!
//! ```text
//! Closed ── a probe ──> Opening ── connected, and logged in ──> Open ── its token is refused ──> Opening, over the same connection
//!    ^                     |  '─── the login is refused ──> Shut, for LOGIN_PAUSE                |
//!    '─────────────────────'────────────────────────────────── it is broken ────────────────────'
//! ```
//!
//! # Invariants
//! - A probe that is given up leaves the way as it is; what is being opened goes on, and ends with the way.

use std::time::Duration;

use bytes::Bytes;
use futures_util::FutureExt;
use futures_util::future::ready;
use tokio::time::{Instant, timeout, timeout_at};
use tokio_util::task::AbortOnDropHandle;
use tonic::{Code, Status};

use crate::client::{Fault, Line, Lines, Ticket};
use crate::config::Url;
use crate::proto::etcdserverpb::alarm_request::AlarmAction;
use crate::proto::etcdserverpb::kv_client::KvClient;
use crate::proto::etcdserverpb::maintenance_client::MaintenanceClient;
use crate::proto::etcdserverpb::{AlarmMember, AlarmRequest, AlarmType, RangeRequest};

/// How long connecting and logging in may take together. Longer is given up, and begun anew by the next probe.
const OPEN_TIMEOUT: Duration = Duration::from_secs(10);

/// How long a refused login is not tried again: to look at a password costs an etcd a tenth of a second.
const LOGIN_PAUSE: Duration = Duration::from_secs(5);

/// Who was found to answer a linearizable read: how fast, and the alarms if they were looked at.
pub(super) type Found = (Duration, Option<Vec<AlarmMember>>);

/// Why nobody was.
#[derive(Clone, Debug)]
pub(super) enum Trouble {
    /// The next time it may be otherwise.
    Bad(String),
    /// The same, and a login is under way.
    Token(String),
    /// The user is not let in, until somebody does something about it.
    Refused(String),
}

impl Trouble {
    pub fn why(self) -> String {
        match self {
            Trouble::Bad(why) | Trouble::Token(why) | Trouble::Refused(why) => why,
        }
    }
}

/// What a probe asks for. As etcd's own health check has it; whether the key is there does not matter.
pub(super) fn request(serializable: bool) -> RangeRequest {
    RangeRequest { key: Bytes::from_static(b"health"), limit: 1, serializable, ..RangeRequest::default() }
}

type Opened = Result<(Line, Ticket), Trouble>;

/// How long an answer took; and the line, if more can be asked there.
type Asked = (Duration, Option<Line>);

/// See the [module](self).
#[derive(Default)]
pub(super) struct Way(State);

#[derive(Default)]
enum State {
    #[default]
    Closed,
    Opening(AbortOnDropHandle<Opened>),
    Open(Line, Ticket),
    Shut(String, Instant),
}

impl Way {
    /// Asks `endpoint`, to which this is the way, for a linearizable read, and for its alarms if they are to be looked at.
    ///
    /// # Errors
    /// That there is no answer, or none that says that it could be read.
    pub async fn write_probe(&mut self, lines: &Lines, endpoint: &str, look: bool, until: Instant) -> Result<Found, Trouble> {
        let (took, line) = self.ask(lines, endpoint, false, until).await?;
        let Some(line) = line.filter(|_| look) else { return Ok((took, None)) };
        let alarms = timeout_at(until, alarms(line)).await;
        Ok((took, alarms.ok().and_then(Result::ok)))
    }

    /// How long the server takes to answer from what it has itself.
    ///
    /// # Errors
    /// Why it does not answer.
    pub async fn reach(&mut self, lines: &Lines, endpoint: &str, until: Instant) -> Result<Duration, String> {
        let asked = self.ask(lines, endpoint, true, until).await;
        asked.map(|(took, _)| took).map_err(Trouble::why)
    }

    /// Asks, once more after a login if the token has expired, and says how long the answer took.
    async fn ask(&mut self, lines: &Lines, endpoint: &str, serializable: bool, until: Instant) -> Result<Asked, Trouble> {
        match self.ask_once(lines, endpoint, serializable, until).await {
            Err(Trouble::Token(_)) => self.ask_once(lines, endpoint, serializable, until).await,
            asked => asked,
        }
    }

    async fn ask_once(&mut self, lines: &Lines, endpoint: &str, serializable: bool, until: Instant) -> Result<Asked, Trouble> {
        let (line, ticket) = self.line(lines, endpoint, until).await?;
        let began = Instant::now();
        let late = |_| Err(Status::deadline_exceeded("no answer in time"));
        let answer = timeout_at(until, KvClient::new(line.clone()).range(request(serializable))).await.unwrap_or_else(late);
        let took = began.elapsed();
        let Err(status) = answer else { return Ok((took, Some(line))) };
        match line.fault(ticket, &status) {
            Fault::Token => {
                self.0 = State::Opening(open(lines, endpoint, Some(line)));
                Err(Trouble::Token(format!("its token is refused: {}", status.message())))
            }
            Fault::Broken(why) => {
                self.0 = State::Closed;
                Err(Trouble::Bad(why))
            }
            // Somebody is there, and decides who may do what. As etcd's own health check takes it.
            Fault::None if matches!(status.code(), Code::PermissionDenied | Code::Unauthenticated) => Ok((took, None)),
            Fault::None => Err(Trouble::Bad(status.message().to_owned())),
        }
    }

    /// A [`write_probe`](Self::write_probe) and, at the same time, a serializable read: what came of the one, and whether the other succeeded.
    pub async fn probe(&mut self, lines: &Lines, endpoint: &str, look: bool, until: Instant) -> (Result<Found, Trouble>, bool) {
        match self.line(lines, endpoint, until).await {
            Ok((line, _)) => tokio::join!(self.write_probe(lines, endpoint, look, until), serializable(line, until)),
            Err(trouble) => (Err(trouble), false),
        }
    }

    /// The line, once it is there.
    async fn line(&mut self, lines: &Lines, endpoint: &str, until: Instant) -> Opened {
        loop {
            let next = match &mut self.0 {
                State::Open(line, ticket) => return Ok((line.clone(), *ticket)),
                State::Shut(why, since) if since.elapsed() < LOGIN_PAUSE => return Err(Trouble::Refused(why.clone())),
                State::Closed | State::Shut(..) => State::Opening(open(lines, endpoint, None)),
                State::Opening(task) => match timeout_at(until, task).await {
                    Ok(Ok(Ok((line, ticket)))) => State::Open(line, ticket),
                    Ok(Ok(Err(trouble))) => {
                        self.0 = match &trouble {
                            Trouble::Refused(why) => State::Shut(why.clone(), Instant::now()),
                            Trouble::Bad(_) | Trouble::Token(_) => State::Closed,
                        };
                        return Err(trouble);
                    }
                    Ok(Err(_)) => {
                        self.0 = State::Closed;
                        return Err(Trouble::Bad("connecting was given up".into()));
                    }
                    Err(_) => return Err(Trouble::Bad("no connection in time".into())),
                },
            };
            self.0 = next;
        }
    }
}

/// Connects, unless there is a line already, and logs in.
fn open(lines: &Lines, endpoint: &str, line: Option<Line>) -> AbortOnDropHandle<Opened> {
    let connecting = match line {
        Some(line) => Ok(ready(Ok(line)).boxed()),
        None => endpoint.parse::<Url>().map_err(|err| err.to_string()).and_then(|url| lines.connect(&url)),
    };
    let opening = async move {
        let line = connecting.map_err(Trouble::Bad)?.await.map_err(Trouble::Bad)?;
        match line.enter().await {
            Ok(ticket) => Ok((line, ticket)),
            Err(status) => Err(not_let_in(&status)),
        }
    };
    let late = |_| Err(Trouble::Bad(format!("no connection, or no login, within {OPEN_TIMEOUT:?}")));
    AbortOnDropHandle::new(tokio::spawn(async move { timeout(OPEN_TIMEOUT, opening).await.unwrap_or_else(late) }))
}

fn not_let_in(status: &Status) -> Trouble {
    let why = format!("logging in: {}", status.message());
    let has_spoken = std::error::Error::source(status).is_none();
    let is_certain = matches!(status.code(), Code::InvalidArgument | Code::Unauthenticated | Code::PermissionDenied | Code::Unimplemented);
    if has_spoken && is_certain { Trouble::Refused(why) } else { Trouble::Bad(why) }
}

async fn serializable(line: Line, until: Instant) -> bool {
    matches!(timeout_at(until, KvClient::new(line).range(request(true))).await, Ok(Ok(_)))
}

async fn alarms(line: Line) -> Result<Vec<AlarmMember>, Status> {
    let all = AlarmRequest { action: AlarmAction::Get as i32, member_id: 0, alarm: AlarmType::None as i32 };
    MaintenanceClient::new(line).alarm(all).await.map(|alarms| alarms.into_inner().alarms)
}
