//! Runs a node's part in the agreement: the timer, the messages, the disk, and the lines in the log.
//!
//! One task owns the [`Agreement`] and does one thing after the other, so that its effects are carried out in order: it writes the state
//! out and waits for the disk, and only then sends or answers. One task for each entry of the JOIN list has the connection to it. When the
//! disk fails the driver ends, and says why: what it holds may be ahead of what is written, so it must not go on.
//!
//! The disk has a thread of its own, so that no name that is looked up for a connection, which can take long, stands in its way. Who
//! [stops](Driver::stop) the driver waits for what is being written: then the directory is nobody's.
//!
//! The driver goes on when the node is bound: it tells everyone who asks of the cluster.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, mpsc as blocking};
use std::thread::JoinHandle;
use std::time::Duration;

use futures_util::FutureExt;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Instant, MissedTickBehavior};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::{Code, Status};

use super::agree::{Agreement, Answer, Ask, Candidate, Effect, Grant, Known, NodeId, Refusal, Role, Standing, State};
use super::desk::Desk;
use super::state::NodeDir;
use super::wire::{self, Token};
use crate::api::peer::Say;
use crate::client::{Line, Lines};
use crate::config::Url;
use crate::error::{Error, Result};
use crate::lock::lock;
use crate::proto::founding::Envelope;
use crate::proto::founding::founding_client::FoundingClient;

/// How long a tick of the agreement is.
const TICK: Duration = Duration::from_millis(100);

/// How long making a connection may take, with TLS and the other's first word. Longer is given up, and tried again.
pub(crate) const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// How long one question with its answer may take, over a connection that is there. Longer is lost; it is asked again.
const ASK_TIMEOUT: Duration = Duration::from_secs(2);

/// What waits for the driver. Beyond it who asks is told so, and who answers waits.
const INPUTS_MAX: usize = 64;

/// Questions that wait for a node of the list. One beyond it is not asked; it is asked again later.
const QUESTIONS_MAX: usize = 4;

/// States that wait to be written. There is never more than one: what comes behind it waits for it.
const SAVES_MAX: usize = 1;

/// The largest message. Beyond it it is refused: a decision has some hundred bytes.
const MESSAGE_BYTES_MAX: usize = 256 << 10;

/// How often the log is told who is missing, while nothing changes; and how often at most, when something does.
const REPORT: Duration = Duration::from_secs(10);
const REPORT_CHANGED: Duration = Duration::from_secs(1);

/// Where a node stands, for the rest of it.
#[derive(Clone, Debug)]
pub(crate) enum Progress {
    /// It belongs to no cluster yet. The text says whom it waits for.
    Waiting(String),
    Bound(Role, Known),
    Removed,
    /// The driver has ended.
    Failed(Error),
}

enum Input {
    Asked(Ask, oneshot::Sender<Answer>),
    Answered(usize, Answer),
    Learn(Known),
    Votes,
    Removed(oneshot::Sender<()>),
}

/// A driver at work. It ends when this is [stopped](Self::stop) or dropped.
pub(crate) struct Driver {
    inputs: mpsc::Sender<Input>,
    progress: watch::Receiver<Progress>,
    /// Whether the node is enlisted, and a server from its next start on.
    enlisted: watch::Receiver<bool>,
    /// As whom it was enlisted when this life began.
    grant: Option<Grant>,
    me: Candidate,
    token: Token,
    lines: Arc<Lines>,
    desk: Arc<Desk>,
    tasks: TaskTracker,
    stop: CancellationToken,
    saver: Mutex<Option<Saver>>,
}

/// A state to be written, and who is to be told.
type Save = (State, oneshot::Sender<Result<()>>);

/// The thread that writes. It ends when nobody can send it anything any more.
struct Saver {
    thread: JoinHandle<()>,
    /// Never says anything: it closes when the thread has let go of the directory.
    ended: oneshot::Receiver<()>,
}

impl Saver {
    fn start(dir: Arc<NodeDir>) -> Result<(Saver, blocking::SyncSender<Save>)> {
        let (saves, queue) = blocking::sync_channel::<Save>(SAVES_MAX);
        let (alive, ended) = oneshot::channel();
        let write = move || {
            while let Ok((state, done)) = queue.recv() {
                // Who waited may have been stopped.
                let _ = done.send(dir.save(&state));
            }
            drop(dir);
            drop::<oneshot::Sender<()>>(alive);
        };
        let thread = std::thread::Builder::new().name("quorate-embed-save".into()).spawn(write);
        let thread = thread.map_err(|err| Error::io("starting the thread of", "the node's memory", err))?;
        Ok((Saver { thread, ended }, saves))
    }

    async fn end(self) {
        let _ = self.ended.await;
        if self.thread.join().is_err() {
            tracing::error!("the thread that writes what the node remembers has panicked");
        }
    }
}

impl Driver {
    /// Starts it, on the runtime it is called on. The others are spoken to over `lines`.
    ///
    /// # Errors
    /// `Io` when there is no thread to be had.
    pub fn start(dir: Arc<NodeDir>, agreement: Agreement, token: Token, lines: &Arc<Lines>) -> Result<Driver> {
        let (saver, saves) = Saver::start(dir)?;
        let (inputs, queue) = mpsc::channel(INPUTS_MAX);
        let (tasks, stop) = (TaskTracker::new(), CancellationToken::new());
        let first = progress_of(agreement.state(), agreement.serves()).unwrap_or_else(|| Progress::Waiting("it has just begun".into()));
        let (tell, progress) = watch::channel(first);
        let (tell_enlisted, enlisted) = watch::channel(false);
        let (me, grant) = (agreement.me().clone(), agreement.grant().cloned());
        let trouble: Arc<Mutex<BTreeMap<usize, String>>> = Arc::default();
        let mut peers = Vec::new();
        for (at, entry) in agreement.list().entries.iter().enumerate() {
            let (questions, theirs) = mpsc::channel(QUESTIONS_MAX);
            peers.push(questions);
            let peer = Peer {
                at,
                caller: Caller::new(node_url(entry, lines.is_tls()), token.clone(), lines.clone()),
                who: None,
                inputs: inputs.clone(),
                trouble: trouble.clone(),
            };
            spawn(&tasks, &stop, peer.run(theirs));
        }
        let core = Core { agreement, saves, tell, tell_enlisted, peers, trouble, told: String::new(), told_at: None };
        spawn(&tasks, &stop, core.run(queue));
        let (desk, saver) = (Arc::new(Desk::new()), Mutex::new(Some(saver)));
        Ok(Driver { inputs, progress, enlisted, grant, me, token, lines: lines.clone(), desk, tasks, stop, saver })
    }

    /// Which node this is.
    pub fn node(&self) -> NodeId {
        self.me.node
    }

    /// The same, as it presents itself.
    pub fn me(&self) -> &Candidate {
        &self.me
    }

    /// As whom the node was enlisted when it started.
    pub fn grant(&self) -> Option<&Grant> {
        self.grant.as_ref()
    }

    /// Whether the node is enlisted, and a server from its next start on; as it changes.
    pub fn enlisted(&self) -> watch::Receiver<bool> {
        self.enlisted.clone()
    }

    /// What is asked of it as a server.
    pub fn desk(&self) -> &Desk {
        &self.desk
    }

    /// Whether the nodes speak TLS with each other.
    pub fn is_tls(&self) -> bool {
        self.lines.is_tls()
    }

    /// Asks whoever is at a peer URL, with the shared token.
    pub fn caller(&self, url: String) -> Caller {
        Caller::new(url, self.token.clone(), self.lines.clone())
    }

    /// Where the node stands, as it moves.
    pub fn progress(&self) -> watch::Receiver<Progress> {
        self.progress.clone()
    }

    /// What answers the others' questions.
    pub fn say(&self) -> Say {
        let (inputs, token, desk, node) = (self.inputs.clone(), self.token.clone(), self.desk.clone(), self.node());
        Arc::new(move |question: Envelope| {
            let (inputs, token, desk) = (inputs.clone(), token.clone(), desk.clone());
            async move {
                let ask = match wire::open_question(&token, node, &question)? {
                    Ask::Order { ticket, order } => {
                        let outcome = match desk.order(ticket, order) {
                            Ok(wait) => wait.await.unwrap_or_else(|_| {
                                let what = "the server has stopped while it carried the order out".into();
                                Err(Refusal { reason: String::new(), what })
                            }),
                            Err(refusal) => Err(refusal),
                        };
                        return Ok(wire::reply(&token, &question, &Answer::Ordered { who: node, outcome }));
                    }
                    Ask::Present { from: Some((cluster, who)) } => {
                        desk.hear(cluster, who);
                        Ask::Present { from: None }
                    }
                    ask => ask,
                };
                let (answer, wait) = oneshot::channel();
                let gone = || Status::unavailable("the node is not ready to answer");
                inputs.try_send(Input::Asked(ask, answer)).map_err(|_| gone())?;
                let mut answer = wait.await.map_err(|_| gone())?;
                if let Answer::Present { ticket, .. } = &mut answer {
                    *ticket = desk.ticket();
                }
                Ok(wire::reply(&token, &question, &answer))
            }
            .boxed()
        })
    }

    /// Tells it who the servers are now.
    pub async fn learn(&self, known: Known) {
        // Gone: then nobody needs it any more.
        let _ = self.inputs.send(Input::Learn(known)).await;
    }

    /// Tells it that this node's server votes.
    pub async fn votes(&self) {
        let _ = self.inputs.send(Input::Votes).await;
    }

    /// Tells it that this node was removed from the cluster; returns when that is on disk.
    pub async fn removed(&self) {
        let (done, wait) = oneshot::channel();
        if self.inputs.send(Input::Removed(done)).await.is_ok() {
            let _ = wait.await;
        }
    }

    /// Ends it, and returns when it has ended, and what it was writing is written.
    pub async fn stop(&self) {
        self.stop.cancel();
        self.tasks.close();
        self.tasks.wait().await;
        // Whoever could send it anything is gone with the tasks.
        let saver = lock(&self.saver).take();
        if let Some(saver) = saver {
            saver.end().await;
        }
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

fn spawn(tasks: &TaskTracker, stop: &CancellationToken, task: impl Future<Output = ()> + Send + 'static) {
    let stop = stop.clone();
    tasks.spawn(async move {
        tokio::select! {
            () = stop.cancelled() => {}
            () = task => {}
        }
    });
}

struct Core {
    agreement: Agreement,
    saves: blocking::SyncSender<Save>,
    tell: watch::Sender<Progress>,
    tell_enlisted: watch::Sender<bool>,
    peers: Vec<mpsc::Sender<Ask>>,
    trouble: Arc<Mutex<BTreeMap<usize, String>>>,
    told: String,
    told_at: Option<Instant>,
}

impl Core {
    async fn run(mut self, mut queue: mpsc::Receiver<Input>) {
        let mut ticks = tokio::time::interval(TICK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        if let State::Unbound(_) = self.agreement.state() {
            let list = self.agreement.list();
            tracing::info!(
                node = %self.agreement.me().node, join = ?list.entries, servers = list.servers, needed = self.agreement.needed(),
                "founding: looking for a cluster, or for enough nodes to found one"
            );
        }
        loop {
            let step = tokio::select! {
                input = queue.recv() => match input {
                    Some(input) => self.take(input).await,
                    None => return,
                },
                _ = ticks.tick() => {
                    let effects = self.agreement.tick();
                    self.report();
                    self.carry(effects, None).await
                }
            };
            if let Err(err) = step {
                tracing::error!(error = %err, "founding: what the node agrees to cannot be written; it takes no further part");
                self.tell.send_replace(Progress::Failed(err));
                return;
            }
        }
    }

    async fn take(&mut self, input: Input) -> Result<()> {
        match input {
            Input::Asked(ask, answer) => {
                let effects = self.agreement.asked(&ask);
                self.carry(effects, Some(answer)).await
            }
            Input::Answered(at, answer) => {
                let effects = self.agreement.answered(at, answer);
                self.carry(effects, None).await
            }
            Input::Learn(known) => {
                let effects = self.agreement.learn(known);
                self.carry(effects, None).await
            }
            Input::Votes => {
                let effects = self.agreement.votes();
                self.carry(effects, None).await
            }
            Input::Removed(done) => {
                let effects = self.agreement.removed();
                self.carry(effects, None).await?;
                let _ = done.send(());
                Ok(())
            }
        }
    }

    /// Carries out effects in their order; after a failed save, nothing more.
    async fn carry(&mut self, effects: Vec<Effect>, mut asker: Option<oneshot::Sender<Answer>>) -> Result<()> {
        for effect in effects {
            match effect {
                Effect::Save(state) => {
                    self.save(state.clone()).await?;
                    self.announce(&state);
                }
                Effect::Answer(answer) => {
                    if let Some(asker) = asker.take() {
                        // Who asked may have given up.
                        let _ = asker.send(answer);
                    }
                }
                Effect::Ask { at, ask } => {
                    if let Some(peer) = self.peers.get(at)
                        && (ask != Ask::Hello || peer.capacity() == QUESTIONS_MAX)
                    {
                        let _ = peer.try_send(ask);
                    }
                }
                Effect::Bound => {
                    if let Some((role, known)) = self.agreement.bound() {
                        let servers: Vec<_> = known.servers.iter().map(|server| server.name.as_str()).collect();
                        tracing::info!(%role, cluster = %format_args!("{:032x}", known.decision.cluster), ?servers, "founding: the node belongs to a cluster");
                    }
                }
                Effect::Conflict { ours, theirs } => tracing::error!(
                    ours = %format_args!("{ours:032x}"), theirs = %format_args!("{theirs:032x}"),
                    "founding: a node of another cluster was met; nothing is changed. Different JOIN lists, or more lost disks than founding can bear"
                ),
            }
        }
        Ok(())
    }

    async fn save(&self, state: State) -> Result<()> {
        match &state {
            State::Unbound(unbound) => {
                tracing::debug!(promised = ?unbound.promised, accepted = unbound.accepted.is_some(), "founding: saving")
            }
            State::Bound { .. } => tracing::debug!("founding: saving the cluster"),
            State::Enlisted { grant, .. } => {
                tracing::debug!(member = %format_args!("{:x}", grant.member), "founding: saving that the node is enlisted")
            }
            State::Removed { .. } => tracing::info!("founding: saving that the node was removed from the cluster"),
        }
        let gone = || Error::Failed("the thread that saves has ended".into());
        let (done, saved) = oneshot::channel();
        // It does not block: the one before was waited for.
        self.saves.send((state, done)).map_err(|_| gone())?;
        saved.await.unwrap_or_else(|_| Err(gone()))
    }

    /// Tells the rest of the node of what was saved.
    fn announce(&self, state: &State) {
        if let Some(progress) = progress_of(state, self.agreement.serves()) {
            self.tell.send_replace(progress);
        }
        let waits = matches!(state, State::Enlisted { .. }) && !self.agreement.serves();
        if waits != *self.tell_enlisted.borrow() {
            if waits {
                tracing::warn!("this node is enlisted: it is a client, and will be a server when it is started again");
            }
            self.tell_enlisted.send_replace(waits);
        }
    }

    /// Tells the log, and whoever starts the node, who is missing.
    fn report(&mut self) {
        if !matches!(self.agreement.state(), State::Unbound(_)) {
            return;
        }
        let (ready, missing) = self.look();
        let needed = self.agreement.needed();
        let text = format!(
            "{ready} of {needed} nodes are ready to found a cluster{}",
            if missing.is_empty() { String::new() } else { format!("; {}", missing.join(", ")) }
        );
        let at = &self.agreement.me().peer_url;
        let text = match (self.rivals(), self.agreement.is_twice(), self.agreement.is_listed()) {
            (Some(rivals), ..) => rivals,
            (_, true, _) => format!("{text}; two entries of JOIN lead to this node, or to a copy of its directory, so it does not propose"),
            (_, _, Some(false)) => {
                format!("{text}; this node itself, {at}, was reached at no entry of JOIN: it can join a cluster, but not found one")
            }
            _ => text,
        };
        let due = match self.told_at {
            None => true,
            Some(at) => at.elapsed() >= if text == self.told { REPORT } else { REPORT_CHANGED },
        };
        if due {
            match self.rivals() {
                Some(rivals) => tracing::error!(%at, "founding: {rivals}"),
                None => {
                    let (twice, listed) = (self.agreement.is_twice(), self.agreement.is_listed().unwrap_or(true));
                    tracing::info!(%at, ready, needed, missing = ?missing, twice, listed, "founding: waiting");
                }
            }
            self.told_at = Some(Instant::now());
            self.told.clone_from(&text);
        }
        self.tell.send_if_modified(|progress| match progress {
            Progress::Waiting(before) if *before != text => {
                *before = text;
                true
            }
            _ => false,
        });
    }

    /// What there is to be said when more than one cluster answers at the entries of the list: none of them is joined.
    fn rivals(&self) -> Option<String> {
        let clusters = self.agreement.clusters();
        if clusters.len() < 2 {
            return None;
        }
        let entries = &self.agreement.list().entries;
        let at = |places: &[usize]| places.iter().filter_map(|at| entries.get(*at)).map(String::as_str).collect::<Vec<_>>().join(", ");
        let each: Vec<_> = clusters.iter().map(|(cluster, places)| format!("{cluster:032x} at {}", at(places))).collect();
        Some(format!(
            "nodes of different clusters have answered at the entries of JOIN: {}. This node joins none of them: leave the entries of one cluster alone \
             in JOIN, or have the nodes of the others join it without their directories, and start this node again",
            each.join("; ")
        ))
    }

    /// How many are ready, and what there is to be said of each that is not.
    fn look(&self) -> (usize, Vec<String>) {
        let trouble = lock(&self.trouble);
        let (mut ready, mut missing) = (0, Vec::new());
        let list = self.agreement.list();
        for (at, (entry, standing)) in list.entries.iter().zip(self.agreement.standings()).enumerate() {
            match standing {
                Standing::Own | Standing::Ready(_) => ready += 1,
                Standing::Silent => missing.push(match trouble.get(&at) {
                    Some(why) => format!("{entry} is missing ({why})"),
                    None => format!("{entry} is missing"),
                }),
                Standing::OtherList { name, listed, servers } => missing.push(format!(
                    "{entry} ({name}) has another JOIN list (JoinSetMismatch: {listed} entries for {servers} servers there, {} for {} here)",
                    list.entries.len(),
                    list.servers
                )),
                Standing::OtherServers { name, servers } => missing.push(format!(
                    "{entry} ({name}) has the same JOIN list and another KV_SERVERS (JoinSetMismatch: {servers} servers there, {} here)",
                    list.servers
                )),
                Standing::Member { cluster } => missing.push(format!("{entry} belongs to cluster {cluster:032x}")),
                Standing::Removed => missing.push(format!("{entry} was removed from a cluster")),
                Standing::Twice => missing.push(format!("{entry} is the same node as another entry")),
            }
        }
        (ready, missing)
    }
}

/// Where a node with this on disk stands, once it belongs to a cluster. One that is enlisted may serve already.
fn progress_of(state: &State, serves: bool) -> Option<Progress> {
    Some(match state {
        State::Unbound(_) => return None,
        State::Bound { role, known } => Progress::Bound(*role, known.clone()),
        State::Enlisted { known, .. } => Progress::Bound(if serves { Role::Server } else { Role::Client }, known.clone()),
        State::Removed { .. } => Progress::Removed,
    })
}

/// The way to a node of the list.
struct Peer {
    at: usize,
    caller: Caller,
    /// Who was there last.
    who: Option<NodeId>,
    inputs: mpsc::Sender<Input>,
    trouble: Arc<Mutex<BTreeMap<usize, String>>>,
}

impl Peer {
    async fn run(mut self, mut questions: mpsc::Receiver<Ask>) {
        while let Some(ask) = questions.recv().await {
            if ask != Ask::Hello && self.who.is_none() {
                // Nobody can be meant yet; Hello tells.
                continue;
            }
            match self.caller.ask(self.who, &ask).await {
                Ok(answer) => {
                    lock(&self.trouble).remove(&self.at);
                    self.who = Some(answer.who());
                    if self.inputs.send(Input::Answered(self.at, answer)).await.is_err() {
                        return;
                    }
                }
                Err(status) => {
                    if status.code() == Code::FailedPrecondition {
                        self.who = None;
                    }
                    lock(&self.trouble).insert(self.at, status.message().to_owned());
                }
            }
        }
    }
}

/// The URL of a node's port, `host:port`.
pub(crate) fn node_url(place: &str, is_tls: bool) -> String {
    let scheme = if is_tls { "https" } else { "http" };
    format!("{scheme}://{place}")
}

/// Asks whoever is at an address.
pub(crate) struct Caller {
    url: String,
    token: Token,
    lines: Arc<Lines>,
    client: Option<FoundingClient<Line>>,
}

impl Caller {
    pub fn new(url: String, token: Token, lines: Arc<Lines>) -> Caller {
        Caller { url, token, lines, client: None }
    }

    /// Where.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// Asks, and waits for the answer.
    ///
    /// # Errors
    /// That there is none, or that it is not to be trusted. The next question goes over a new connection then.
    pub async fn ask(&mut self, to: Option<NodeId>, ask: &Ask) -> Result<Answer, Status> {
        self.ask_within(ASK_TIMEOUT, to, ask).await
    }

    /// As [`ask`](Self::ask), of what takes longer.
    ///
    /// # Errors
    /// As [`ask`](Self::ask).
    pub async fn ask_within(&mut self, limit: Duration, to: Option<NodeId>, ask: &Ask) -> Result<Answer, Status> {
        let answer = self.exchange(limit, to, ask).await;
        if answer.is_err() {
            self.client = None;
        }
        answer
    }

    /// Making the connection has a limit of its own.
    async fn exchange(&mut self, limit: Duration, to: Option<NodeId>, ask: &Ask) -> Result<Answer, Status> {
        let mut client = match &self.client {
            Some(client) => client.clone(),
            None => self.client.insert(connect(&self.url, &self.lines).await.map_err(Status::unavailable)?).clone(),
        };
        let question = wire::question(&self.token, to, ask);
        let answer = tokio::time::timeout(limit, client.say(question.clone())).await;
        let answer = answer.map_err(|_| Status::deadline_exceeded(format!("no answer within {limit:?}")))?;
        wire::open_reply(&self.token, &question, &answer?.into_inner())
    }
}

/// Connects to a peer port, in TLS or in plain text, as this node speaks with all others.
async fn connect(url: &str, lines: &Lines) -> Result<FoundingClient<Line>, String> {
    let url = url.parse::<Url>().map_err(|err| err.to_string())?;
    if url.is_tls() != lines.is_tls() {
        let ours = if lines.is_tls() { "TLS" } else { "plain text" };
        return Err(format!("its URL is {url}, and this node speaks {ours} with all others"));
    }
    let connected = tokio::time::timeout(CONNECT_TIMEOUT, lines.connect(&url)?).await;
    let line = connected.unwrap_or_else(|_| Err(format!("no connection within {CONNECT_TIMEOUT:?}")));
    // What tonic says of its own says nothing.
    let line = line.map_err(|why| why.strip_prefix("transport error: ").unwrap_or(&why).to_owned())?;
    Ok(FoundingClient::new(line).max_decoding_message_size(MESSAGE_BYTES_MAX))
}

#[cfg(test)]
mod tests {
    use super::super::agree::{Candidate, List, candidate};
    use super::*;
    use crate::client::RemoteOptions;

    /// The driver is stopped at any moment, and when it has stopped the directory can be taken hold of again: what was being written is.
    #[tokio::test]
    async fn a_stopped_driver_has_let_go_of_the_directory() {
        let dir = tempfile::tempdir().unwrap();
        let lines = Arc::new(Lines::with(None, &RemoteOptions::default()));
        for round in 0..20 {
            let (held, state) = NodeDir::open(dir.path()).unwrap();
            let me = Candidate { node: held.node(), ..candidate(1) };
            let held = Arc::new(held);
            let list = List::new(vec!["127.0.0.1:1".into()], 1);
            let driver = Driver::start(held.clone(), Agreement::new(me, list, state), Token::default(), &lines).unwrap();
            let prepare = Ask::Prepare {
                list: List::new(vec!["127.0.0.1:1".into()], 1).id,
                ballot: super::super::agree::Ballot { round: round + 1, by: NodeId(7) },
            };
            let (answer, _wait) = oneshot::channel();
            driver.inputs.try_send(Input::Asked(prepare, answer)).map_err(|_| "full").unwrap();
            // Now and then before it has begun to write, now and then while it does.
            for _ in 0..round {
                tokio::task::yield_now().await;
            }
            driver.stop().await;
            drop((driver, held));
        }
        NodeDir::open(dir.path()).unwrap();
    }
}
