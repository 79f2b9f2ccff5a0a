//! The connection in use, and where else to go.

use std::sync::Mutex;
use std::time::Duration;

use tokio::sync::watch::Receiver;

use super::dial::{Line, Lines};
use super::{RemoteOptions, Timers};
use crate::config::Url;
use crate::error::{Error, Result};
use crate::lock::lock;

/// A connection to a member.
#[derive(Clone)]
pub(super) struct Link {
    pub url: Url,
    pub line: Line,
    /// Tells it from the one before to the same place.
    serial: u64,
}

pub(super) struct Links {
    /// What was given to us.
    given: Receiver<Vec<Url>>,
    state: Mutex<State>,
    /// Held while a connection is made, so that many calls make one.
    connecting: tokio::sync::Mutex<()>,
    lines: Lines,
    connect_timeout: Duration,
}

#[derive(Default)]
struct State {
    /// What the members have told of each other.
    learned: Vec<Url>,
    current: Option<Link>,
    /// Connections beside it, one to an endpoint at most, while members are asked all at once.
    spares: Vec<Link>,
    /// The endpoint that failed last; the one behind it is next.
    failed: Option<Url>,
    serial: u64,
}

impl Links {
    /// # Errors
    /// `Config`: an option makes no sense, a file is not what it should be, or an endpoint asks for more than the options have.
    pub fn new(given: Receiver<Vec<Url>>, options: &RemoteOptions) -> Result<Self> {
        let lines = Lines::new(options)?;
        for url in given.borrow().iter() {
            lines.can_reach(url).map_err(|why| Error::Config(format!("the endpoint {url}: {why}")))?;
        }
        let (state, connecting) = (Mutex::default(), tokio::sync::Mutex::new(()));
        Ok(Links { given, state, connecting, lines, connect_timeout: options.connect_timeout })
    }

    /// All endpoints, those given first.
    pub fn all(&self) -> Vec<Url> {
        let mut all = self.given.borrow().clone();
        for url in &lock(&self.state).learned {
            if !all.contains(url) {
                all.push(url.clone());
            }
        }
        all
    }

    pub fn count(&self) -> usize {
        self.all().len()
    }

    /// Takes what the members say of each other in the place of what they said before.
    pub fn learn(&self, urls: Vec<Url>) {
        lock(&self.state).learned = urls;
    }

    /// The connection in use, if its endpoint still counts.
    pub fn current(&self) -> Option<Link> {
        let (link, is_learned) = {
            let state = lock(&self.state);
            let link = state.current.clone()?;
            let is_learned = state.learned.contains(&link.url);
            (link, is_learned)
        };
        if is_learned || self.given.borrow().contains(&link.url) {
            return Some(link);
        }
        self.leave(&link);
        None
    }

    /// That none of the endpoints was connected with in time.
    pub fn too_slow(&self) -> Error {
        let urls: Vec<String> = self.all().iter().map(Url::to_string).collect();
        Error::Unavailable(format!("no connection in time with {}", urls.join(", ")))
    }

    /// Goes elsewhere, unless that was done already.
    pub fn leave(&self, link: &Link) {
        let mut state = lock(&self.state);
        state.spares.retain(|spare| spare.serial != link.serial);
        if state.current.as_ref().is_some_and(|current| current.serial == link.serial) {
            state.current = None;
            state.failed = Some(link.url.clone());
        }
    }

    /// A connection to that endpoint beside the one in use: it is made with its first call.
    ///
    /// # Errors
    /// `Unavailable` when there can be none.
    pub fn spare(&self, url: &Url, timers: &Timers) -> Result<Link> {
        let mut state = lock(&self.state);
        if let Some(spare) = state.spares.iter().find(|spare| spare.url == *url) {
            return Ok(spare.clone());
        }
        let line = {
            let _entered = timers.runtime().enter();
            self.lines.lazy(url).map_err(|err| Error::Unavailable(format!("{url}: {err}")))?
        };
        state.serial += 1;
        let spare = Link { url: url.clone(), line, serial: state.serial };
        state.spares.push(spare.clone());
        Ok(spare)
    }

    /// Takes a connection that has just served into use, if there is none, and lets go of those beside it.
    pub fn adopt(&self, link: Link) {
        let mut state = lock(&self.state);
        state.spares.clear();
        if state.current.is_none() {
            state.current = Some(link);
        }
    }

    /// Lets go of the connections beside the one in use: the next time they are made anew.
    pub fn leave_spares(&self) {
        lock(&self.state).spares.clear();
    }

    /// The connection in use, or a new one to the next endpoint that takes it.
    ///
    /// # Errors
    /// `Unavailable` when none does, with what each has failed with.
    pub async fn link(&self, timers: &Timers) -> Result<Link> {
        if let Some(link) = self.current() {
            return Ok(link);
        }
        let _one_at_a_time = self.connecting.lock().await;
        if let Some(link) = self.current() {
            return Ok(link);
        }
        let mut urls = self.all();
        if urls.is_empty() {
            return Err(Error::Unavailable("no endpoints are known".into()));
        }
        let failed = lock(&self.state).failed.clone();
        if let Some(at) = failed.and_then(|failed| urls.iter().position(|url| *url == failed)) {
            urls.rotate_left(at + 1);
        }
        let mut failures = Vec::new();
        for url in urls {
            match self.connect(&url, timers).await {
                Ok(line) => {
                    let mut state = lock(&self.state);
                    state.serial += 1;
                    let link = Link { url, line, serial: state.serial };
                    state.current = Some(link.clone());
                    tracing::debug!(endpoint = %link.url, "connected");
                    return Ok(link);
                }
                Err(err) => {
                    lock(&self.state).failed = Some(url.clone());
                    failures.push(format!("{url}: {err}"));
                }
            }
        }
        Err(Error::Unavailable(failures.join("; ")))
    }

    async fn connect(&self, url: &Url, timers: &Timers) -> Result<Line, String> {
        // The connection's task belongs to our runtime, whoever asks.
        let connecting = timers.runtime().spawn(self.lines.connect(url)?);
        let connected = timers.within(Some(self.connect_timeout), connecting).await;
        let connected =
            connected.map_err(|err| if matches!(err, Error::Timeout) { "no connection in time".into() } else { err.to_string() })?;
        connected.map_err(|err| err.to_string())?
    }
}
