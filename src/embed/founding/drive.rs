//! Runs a node's part in the agreement: the timer, the messages, the disk, and the lines in the log.
//!
//! One task owns the [`Agreement`] and does one thing after the other, so that its effects are carried out in order: it writes the state
//! out and waits for the disk, and only then sends or answers. One task for each entry of the JOIN list has the connection to it. When the
//! disk fails the driver ends, and says why: what it holds may be ahead of what is written, so it must not go on.
//!
//! The driver goes on when the node is bound: it tells everyone who asks of the cluster.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures_util::FutureExt;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Instant, MissedTickBehavior};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status};

use super::agree::{Agreement, Answer, Ask, Effect, Known, NodeId, Role, Standing, State};
use super::state::NodeDir;
use super::wire::{self, Token};
use crate::api::peer::Say;
use crate::error::{Error, Result};
use crate::lock::lock;
use crate::proto::founding::Envelope;
use crate::proto::founding::founding_client::FoundingClient;

/// How long a tick of the agreement is.
const TICK: Duration = Duration::from_millis(100);

/// How long making a connection, and one question with its answer, may take. Longer is lost; it is asked again.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
const ASK_TIMEOUT: Duration = Duration::from_secs(2);

/// What waits for the driver. Beyond it who asks is told so, and who answers waits.
const INPUTS_MAX: usize = 64;

/// Questions that wait for a node of the list. One beyond it is not asked; it is asked again later.
const QUESTIONS_MAX: usize = 4;

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
    Removed(oneshot::Sender<()>),
}

/// A driver at work. It ends when this is [stopped](Self::stop) or dropped.
pub(crate) struct Driver {
    inputs: mpsc::Sender<Input>,
    progress: watch::Receiver<Progress>,
    node: NodeId,
    token: Token,
    tasks: TaskTracker,
    stop: CancellationToken,
}

impl Driver {
    /// Starts it, on the runtime it is called on.
    pub fn start(dir: Arc<NodeDir>, agreement: Agreement, token: Token) -> Driver {
        let (inputs, queue) = mpsc::channel(INPUTS_MAX);
        let (tasks, stop) = (TaskTracker::new(), CancellationToken::new());
        let first = match agreement.state() {
            State::Unbound(_) => Progress::Waiting("it has just begun".into()),
            State::Bound { role, known } => Progress::Bound(*role, known.clone()),
            State::Removed { .. } => Progress::Removed,
        };
        let (tell, progress) = watch::channel(first);
        let node = agreement.me().node;
        let trouble: Arc<Mutex<BTreeMap<usize, String>>> = Arc::default();
        let mut peers = Vec::new();
        for (at, entry) in agreement.list().entries.iter().enumerate() {
            let (questions, theirs) = mpsc::channel(QUESTIONS_MAX);
            peers.push(questions);
            let peer = Peer {
                at,
                caller: Caller::new(format!("http://{entry}"), token.clone()),
                who: None,
                inputs: inputs.clone(),
                trouble: trouble.clone(),
            };
            spawn(&tasks, &stop, peer.run(theirs));
        }
        let core = Core { agreement, dir, tell, peers, trouble, told: String::new(), told_at: None };
        spawn(&tasks, &stop, core.run(queue));
        Driver { inputs, progress, node, token, tasks, stop }
    }

    /// Where the node stands, as it moves.
    pub fn progress(&self) -> watch::Receiver<Progress> {
        self.progress.clone()
    }

    /// What answers the others' questions.
    pub fn say(&self) -> Say {
        let (inputs, token, node) = (self.inputs.clone(), self.token.clone(), self.node);
        Arc::new(move |question: Envelope| {
            let (inputs, token) = (inputs.clone(), token.clone());
            async move {
                let ask = wire::open_question(&token, node, &question)?;
                let (answer, wait) = oneshot::channel();
                let gone = || Status::unavailable("the node is not ready to answer");
                inputs.try_send(Input::Asked(ask, answer)).map_err(|_| gone())?;
                let answer = wait.await.map_err(|_| gone())?;
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

    /// Tells it that this node was removed from the cluster; returns when that is on disk.
    pub async fn removed(&self) {
        let (done, wait) = oneshot::channel();
        if self.inputs.send(Input::Removed(done)).await.is_ok() {
            let _ = wait.await;
        }
    }

    /// Ends it, and returns when it has ended.
    pub async fn stop(&self) {
        self.stop.cancel();
        self.tasks.close();
        self.tasks.wait().await;
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
    dir: Arc<NodeDir>,
    tell: watch::Sender<Progress>,
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
            State::Removed { .. } => tracing::info!("founding: saving that the node was removed from the cluster"),
        }
        let dir = self.dir.clone();
        let saved = tokio::task::spawn_blocking(move || dir.save(&state)).await;
        saved.unwrap_or_else(|err| Err(Error::Failed(format!("the thread that saves has ended: {err}"))))
    }

    fn announce(&self, state: &State) {
        match state {
            State::Unbound(_) => {}
            State::Bound { role, known } => drop(self.tell.send_replace(Progress::Bound(*role, known.clone()))),
            State::Removed { .. } => drop(self.tell.send_replace(Progress::Removed)),
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
        let text = if self.agreement.is_twice() {
            format!("{text}; two entries of JOIN lead to this node, or to a copy of its directory, so it does not propose")
        } else {
            text
        };
        let due = match self.told_at {
            None => true,
            Some(at) => at.elapsed() >= if text == self.told { REPORT } else { REPORT_CHANGED },
        };
        if due {
            tracing::info!(ready, needed, missing = ?missing, twice = self.agreement.is_twice(), "founding: waiting");
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
                Standing::Removed => missing.push(format!("{entry} was removed from a cluster")),
                Standing::Twice => missing.push(format!("{entry} is the same node as another entry")),
            }
        }
        (ready, missing)
    }
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

/// Asks whoever is at an address.
pub(crate) struct Caller {
    url: String,
    token: Token,
    client: Option<FoundingClient<Channel>>,
}

impl Caller {
    pub fn new(url: String, token: Token) -> Caller {
        Caller { url, token, client: None }
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
        let answer = tokio::time::timeout(ASK_TIMEOUT, self.exchange(to, ask)).await;
        let answer = answer.unwrap_or_else(|_| Err(Status::deadline_exceeded(format!("no answer within {ASK_TIMEOUT:?}"))));
        if answer.is_err() {
            self.client = None;
        }
        answer
    }

    async fn exchange(&mut self, to: Option<NodeId>, ask: &Ask) -> Result<Answer, Status> {
        let mut client = match &self.client {
            Some(client) => client.clone(),
            None => self.client.insert(connect(&self.url).await?).clone(),
        };
        let question = wire::question(&self.token, to, ask);
        let answer = client.say(question.clone()).await?.into_inner();
        wire::open_reply(&self.token, &question, &answer)
    }
}

/// Connects to a peer port. The one place where it is decided how that is spoken to.
async fn connect(url: &str) -> Result<FoundingClient<Channel>, Status> {
    let endpoint = Endpoint::from_shared(url.to_owned()).map_err(|err| Status::unavailable(err.to_string()))?;
    let connected = tokio::time::timeout(CONNECT_TIMEOUT, endpoint.tcp_nodelay(true).connect()).await;
    let connected = connected.map_err(|_| Status::unavailable(format!("no connection within {CONNECT_TIMEOUT:?}")))?;
    let channel = connected.map_err(|err| Status::unavailable(root_cause(&err)))?;
    Ok(FoundingClient::new(channel).max_decoding_message_size(MESSAGE_BYTES_MAX))
}

/// The innermost reason: tonic's own text says only "transport error".
fn root_cause(err: &dyn std::error::Error) -> String {
    let mut cause = err;
    while let Some(inner) = cause.source() {
        cause = inner;
    }
    cause.to_string()
}
