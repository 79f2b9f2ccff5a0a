//! What a node is put together from: its directory, its part in the agreement, and its server if it is one; how it comes up, what it does by
//! itself while it runs, and how it is taken apart.
//!
//! ```text
//! open ── what it remembers ──> come_up ── founded, joined or enlisted ──> live ── told to stop, or its server has ended ──> close
//! ```
//!
//! # Invariants
//! - Whatever was begun is closed, also when a start fails half-way: the backups and the server side by side, so that neither takes the
//!   other's time; then the ports; then the part in the agreement. The directory is let go last.
//! - The peer port is never shared: while the node is no server it serves founding alone, and is let go before the server takes it.

use super::*;

/// How long connections of the founding port may take to end when it is given over to the server.
const DRAIN: Duration = Duration::from_millis(200);

/// How long a leader that stops may take to hand over. Beyond it the others elect one, a little later.
const HAND_OVER: Duration = Duration::from_secs(2);

/// A node, put together.
pub(super) struct Parts {
    pub role: Role,
    pub endpoints: Vec<String>,
    /// The cluster as it was when the node started.
    pub known: Option<Known>,
    pub driver: Option<Driver>,
    pub server: Option<Server>,
    pub serving: Option<Serving>,
    pub health: Option<Serving>,
    pub keeper: Option<Arc<Keeper>>,
    pub own_url: Option<Url>,
    pub secure: Secure,
    pub replacing: Arc<Notice>,
    // Held until everything else is closed.
    pub dir: Option<Arc<NodeDir>>,
}

impl Parts {
    pub async fn start(config: &mut EmbedConfig, late: &CancellationToken, report: &Arc<Report>) -> Result<Parts> {
        let mut parts = match config.backend {
            Backend::Etcd => Parts::of_etcd(config, report).await?,
            Backend::Embedded => Parts::open(config, late, report).await?,
        };
        match parts.come_up(config, late).await {
            Ok(()) => {
                parts.tell(report);
                Ok(parts)
            }
            Err(err) => {
                // What went wrong before is what counts.
                let _ = parts.close(&mut Limit::default()).await;
                Err(err)
            }
        }
    }

    async fn of_etcd(config: &EmbedConfig, report: &Arc<Report>) -> Result<Parts> {
        let secure = Secure::open(config)?;
        let endpoints = config.addr.iter().map(Url::to_string).collect();
        let ip = config.advertise_ip.unwrap_or(Ipv4Addr::UNSPECIFIED.into());
        let health = health::open(ip, config.health_port, report).await?;
        Ok(Parts { endpoints, ..Parts::first(secure, health) })
    }

    /// What every node has; it is a client until more is known.
    fn first(secure: Secure, health: Option<Serving>) -> Parts {
        Parts {
            role: Role::Client,
            endpoints: Vec::new(),
            known: None,
            driver: None,
            server: None,
            serving: None,
            health,
            keeper: None,
            own_url: None,
            secure,
            replacing: Arc::default(),
            dir: None,
        }
    }

    /// What there is to be known of the node, now that it has come up.
    fn tell(&self, report: &Report) {
        report.set(|facts| {
            facts.role = Some(self.role);
            facts.cluster = self.known.as_ref().map(|known| known.decision.cluster);
            facts.enlisted = self.driver.as_ref().map(Driver::enlisted);
            facts.replacing = Some(self.replacing.clone());
            if let Some(server) = &self.server {
                facts.checks = Some(server.node().clone());
                facts.metrics = server.metrics().clone();
            }
        });
    }

    /// Begins to make backups, if there are to be any.
    pub fn keep_backups(&mut self, config: &EmbedConfig, client: Client, report: &Report) -> Result<()> {
        let Some(wanted) = &config.backup else { return Ok(()) };
        let leads = self.server.as_ref().map(|server| {
            let node = server.node().clone();
            Arc::new(move || node.is_leader()) as backup::IsOurs
        });
        let cluster = self.known.as_ref().and_then(|known| cluster_number(&known.decision));
        let keeper = Arc::new(Keeper::start(client, wanted, report.facts().metrics.counters.clone(), cluster, leads)?);
        report.set(|facts| facts.keeper = Some(keeper.clone()));
        self.keeper = Some(keeper);
        Ok(())
    }

    /// Reads what the node remembers, and begins to look for the others.
    async fn open(config: &mut EmbedConfig, late: &CancellationToken, report: &Arc<Report>) -> Result<Parts> {
        let secure = Secure::open(config)?;
        let (dir, state) = NodeDir::open(&config.data_dir)?;
        if let State::Removed { cluster } = &state {
            let cluster = format_args!("{cluster:032x}");
            tracing::warn!(%cluster, "this node was a server of the cluster, and was removed from it; it founds and joins none, until its data directory is removed");
            return Err(Error::Removed);
        }
        secure.check(&state)?;
        if matches!(state, State::Bound { role: Role::Client, .. }) {
            // Of one that was enlisted, and put out before it has voted.
            dir.forget_server()?;
        }
        address::settle(config, &state, dir.node(), late).await?;
        let (peer_url, client_url) = (config.peer_url()?, config.client_url()?);
        let list = List::new(config.join.clone(), config.founders());
        heed_changes(&state, &list);
        if !config.token.is_set() && !secure.is_tls() && !peer_url.listen_ip().is_some_and(|ip| ip.is_loopback()) {
            tracing::warn!("neither KV_TLS_CA nor KV_TOKEN is set: founding messages are not authenticated");
        }
        let (peer, client) = (peer_url.to_string(), client_url.to_string());
        let me = Candidate { node: dir.node(), name: config.hostname.clone(), peer_url: peer, client_url: client };
        let health = health::open(config.advertised_ip()?, config.health_port, report).await?;
        let dir = Arc::new(dir);
        let driver = Driver::start(dir.clone(), Agreement::new(me, list, state), config.token.clone(), &secure.peers)?;
        report.set(|facts| facts.progress = Some(driver.progress()));
        let replacing = Notice::new(config.replace_after);
        Ok(Parts { driver: Some(driver), own_url: Some(peer_url), replacing, dir: Some(dir), ..Parts::first(secure, health) })
    }

    /// Finds out what the node is, and becomes that.
    async fn come_up(&mut self, config: &EmbedConfig, late: &CancellationToken) -> Result<()> {
        let (Some(driver), Some(dir), Some(peer_url)) = (&self.driver, &self.dir, &self.own_url) else { return Ok(()) };
        // Until the node is a server its peer port serves nothing but founding; then the server takes it over.
        if !matches!(*driver.progress().borrow(), Progress::Bound(Role::Server, _)) {
            self.serving = Some(serve_founding(peer_url, driver, &self.secure).await?);
        }
        let (mut role, known) = bound(driver, late).await?;
        if role == Role::Server {
            if let Some(serving) = self.serving.take() {
                serving.stop(DRAIN).await;
            }
            let member = server_config(config, dir, driver.grant(), &known, peer_url)?;
            let started = match driver.grant() {
                // What names another cluster was no server's of this one.
                Some(grant) if cluster_number(&known.decision) != Some(grant.cluster) => Err(Error::Removed),
                grant => {
                    let enlistment = grant.map(|grant| enlistment(config, grant, &known, peer_url));
                    Server::start_as(member, Some(driver.say()), late.clone(), enlistment).await
                }
            };
            match started {
                Ok(server) => {
                    server.node().mind_enlisted(config.enlist_timeout);
                    self.server = Some(server);
                }
                Err(Error::Removed) if driver.grant().is_some() => {
                    tracing::warn!("this node was enlisted, and put out before it has voted: it is a client");
                    driver.removed().await;
                    dir.forget_server()?;
                    self.serving = Some(serve_founding(peer_url, driver, &self.secure).await?);
                    role = Role::Client;
                }
                Err(Error::Stopped) if late.is_cancelled() => {
                    return Err(Error::Unavailable(format!("no other server has given its state within {:?}", config.start_timeout)));
                }
                Err(err) => {
                    if matches!(err, Error::Removed) {
                        driver.removed().await;
                    }
                    return Err(err);
                }
            }
        }
        (self.role, self.endpoints, self.known) = (role, client_urls(&known, &self.secure), Some(known));
        Ok(())
    }

    pub fn local(&self) -> Option<Client> {
        self.server.as_ref().map(Server::client)
    }

    /// What the node does by itself while it runs: it follows the membership.
    ///
    /// # Errors
    /// Why its server has stopped by itself.
    pub async fn live(
        &self,
        config: &EmbedConfig,
        announce: watch::Sender<Vec<String>>,
        orders: &mut mpsc::Receiver<members::Request>,
    ) -> Result<()> {
        let (Some(driver), Some(known)) = (&self.driver, &self.known) else { return std::future::pending().await };
        let mut progress = driver.progress();
        let announced = async {
            while progress.changed().await.is_ok() {
                if let Progress::Bound(_, known) = &*progress.borrow_and_update() {
                    let urls = client_urls(known, &self.secure);
                    announce.send_if_modified(|now| {
                        let differs = *now != urls;
                        if differs {
                            tracing::info!(servers = ?urls, "the servers have changed");
                            *now = urls;
                        }
                        differs
                    });
                }
            }
            std::future::pending::<()>().await;
        };
        let join = join_urls(config);
        match &self.server {
            Some(server) => {
                tokio::select! {
                    () = announced => Ok(()),
                    () = follow::as_server(server, driver, known.clone()) => Ok(()),
                    () = members::as_server(server, driver, config.peer_port, orders) => Ok(()),
                    () = members::tell_enlisted(server, driver) => Ok(()),
                    () = replacing::as_server(server, driver, config, &self.replacing) => Ok(()),
                    () = moved::look_around(server, driver, &join) => Ok(()),
                    stopped = server.stopped() => {
                        if matches!(stopped, Err(Error::Removed)) {
                            driver.removed().await;
                        }
                        stopped.and(Err(Error::Stopped))
                    }
                }
            }
            None => {
                tokio::select! {
                    () = announced => Ok(()),
                    () = members::as_client(driver, orders) => Ok(()),
                    () = follow::as_client(driver, &join) => Ok(()),
                    () = replacing::as_client(driver, config) => Ok(()),
                }
            }
        }
    }

    /// Stops everything, in order. All of it is tried, whatever fails.
    pub async fn close(self, limit: &mut Limit) -> Result<()> {
        // A store of backups that hangs takes none of the server's time.
        let (left, keeper) = (limit.left(backups::END), self.keeper);
        let kept = async move {
            let Some(keeper) = keeper else { return true };
            let was_at_work = keeper.is_at_work();
            tokio::time::timeout(left, keeper.close()).await.is_ok() || !was_at_work
        };
        let server = self.server;
        let served = async {
            let Some(server) = server else { return Ok(()) };
            hand_over(&server, limit).await;
            let (closed, cut) = server.shutdown_by(limit.until).await;
            limit.cut.extend(cut);
            match closed {
                // That was the reason to stop, and is remembered.
                Err(Error::Removed) => Ok(()),
                other => other,
            }
        };
        let (kept, result) = tokio::join!(kept, served);
        if !kept {
            limit.cut("a backup");
        }
        for serving in [self.serving, self.health].into_iter().flatten() {
            serving.stop(limit.left(DRAIN)).await;
        }
        if let Some(driver) = self.driver {
            driver.stop().await;
        }
        result
    }
}

/// Hands the lead to another voter, if this server has it, so that nobody has to wait for an election.
async fn hand_over(server: &Server, limit: &mut Limit) {
    let node = server.node();
    if !node.is_leader() {
        return;
    }
    let others = server.client().last_members().into_iter().filter(|member| !member.is_learner && member.id != server.member_id());
    for member in others {
        if limit.left(HAND_OVER).is_zero() {
            return limit.cut("handing over the lead");
        }
        match tokio::time::timeout(limit.left(HAND_OVER), node.move_leader(member.id)).await {
            Ok(Ok(())) => return,
            Ok(Err(err)) => tracing::debug!(to = %member.name, error = %err, "handing over the lead"),
            Err(_) if limit.left(HAND_OVER).is_zero() => return limit.cut("handing over the lead"),
            Err(_) => tracing::debug!(to = %member.name, "handing over the lead took too long"),
        }
    }
}

/// Waits until the node belongs to a cluster, but not when it is late.
async fn bound(driver: &Driver, late: &CancellationToken) -> Result<(Role, Known)> {
    let mut progress = driver.progress();
    let is_over = |progress: &Progress| !matches!(progress, Progress::Waiting(_));
    let over = tokio::select! {
        biased;
        over = progress.wait_for(is_over) => over.map(|progress| progress.clone()),
        () = late.cancelled() => Ok(driver.progress().borrow().clone()),
    };
    match over {
        Ok(Progress::Bound(role, known)) => Ok((role, known)),
        Ok(Progress::Removed) => Err(Error::Removed),
        Ok(Progress::Failed(err)) => Err(err),
        Ok(Progress::Waiting(why)) => Err(Error::Founding(why)),
        Err(_) => Err(Error::Stopped),
    }
}

/// The peer port of a node that is no server, or not yet.
async fn serve_founding(url: &Url, driver: &Driver, secure: &Secure) -> Result<Serving> {
    let (Some(ip), Some(port)) = (url.listen_ip(), url.port()) else {
        return Err(Error::Config(format!("{url} cannot be listened on")));
    };
    let listener = Listener::tcp(std::net::SocketAddr::new(ip, port)).await?;
    let listener = match &secure.acceptor {
        Some(acceptor) => listener.with_tls(acceptor.clone()),
        None => listener,
    };
    let defaults = Config::default();
    let options = ServeOptions { max_concurrent_streams: defaults.max_concurrent_streams, keepalive: defaults.grpc_keepalive() };
    let metrics = Metrics::new(ETCD_VERSION, "3.7");
    let router = founding_router(&driver.say(), defaults.warning_unary_request_duration, &metrics);
    Ok(Serving::start(listener, Limits::new(options), App { grpc: Some(Arc::new(router)), http: None }))
}

/// The peer URLs of the listed nodes.
pub(super) fn join_urls(config: &EmbedConfig) -> Vec<String> {
    config.join.iter().map(|entry| node_url(entry, config.is_tls())).collect()
}

/// Where one that is enlisted looks for the others: where the servers were, and at the entries of JOIN.
fn enlistment(config: &EmbedConfig, grant: &Grant, known: &Known, own: &Url) -> Enlistment {
    let servers = known.servers.iter().map(|server| server.peer_url.clone());
    let mut at: Vec<String> = servers.chain(join_urls(config)).filter(|url| *url != own.to_string()).collect();
    at.sort();
    at.dedup();
    Enlistment { member: grant.member, cluster: grant.cluster, at }
}

/// What a server is told, of what was agreed.
///
/// # Errors
/// `Format`, with what would be right, when what was agreed and the data do not belong together; `Config` for an address.
fn server_config(config: &EmbedConfig, dir: &NodeDir, grant: Option<&Grant>, known: &Known, peer_url: &Url) -> Result<Config> {
    let names = names(&known.decision);
    let wrong = |what| Err(Error::Format { path: dir.server(), what });
    // Who has founded the cluster alone would found it again without its data; once there are other servers, these have what it had.
    let has_others = known.servers.iter().any(|server| server.node != dir.node());
    let needs_data = known.decision.founders.len() == 1 && has_others && grant.is_none();
    match (identity_in(&dir.server().join("member")), cluster_number(&known.decision)) {
        (Ok(Some(found)), Some(cluster)) if found.cluster_id != cluster => {
            return wrong(format!(
                "its data is of cluster {:x}, and the node of {cluster:x}: one of them was restored or copied without the other; restore the \
                 node as a whole",
                found.cluster_id
            ));
        }
        (Ok(None), _) if needs_data => {
            let what = "its data is gone, and the cluster has other servers: have it replaced, remove the node's whole directory, and start \
                        it as a client with the others in JOIN";
            return wrong(what.into());
        }
        (Err(err), _) if needs_data => return Err(err),
        // Data that cannot be read is the server's business.
        _ => {}
    }
    let client_url = config.client_url()?;
    let own = names.iter().find(|(founder, _)| founder.node == dir.node());
    let mut member = config.member();
    member.data_dir = Some(dir.server());
    member.listen_client_urls = vec![client_url.clone()];
    member.advertise_client_urls = vec![client_url];
    member.listen_peer_urls = vec![peer_url.clone()];
    member.initial_cluster_token = token(&known.decision);
    if let Some((own, name)) = own {
        member.name.clone_from(name);
        // As it was agreed: if the node has moved since, the members are told so once it runs.
        member.initial_advertise_peer_urls = vec![own.peer_url.parse()?];
        member.initial_cluster = names.iter().map(|(founder, name)| format!("{name}={}", founder.peer_url)).collect::<Vec<_>>().join(",");
        member.initial_cluster_state = ClusterState::New;
    } else {
        // It came later. Who it is it was told, or knows from its data; who the others are, only in case that is damaged. It founds nothing.
        member.name = later_name(config, dir, known);
        member.initial_advertise_peer_urls = vec![peer_url.clone()];
        let others = known.servers.iter().filter(|server| server.node != dir.node());
        let others = others.map(|server| format!("{}={}", server.node, server.peer_url));
        member.initial_cluster = others.chain([format!("{}={peer_url}", member.name)]).collect::<Vec<_>>().join(",");
        member.initial_cluster_state = ClusterState::Existing;
    }
    Ok(member)
}

/// The name of a server that is no founder: its own, unless another server is called so.
fn later_name(config: &EmbedConfig, dir: &NodeDir, known: &Known) -> String {
    let mut others = known.servers.iter().filter(|server| server.node != dir.node());
    let name = &config.hostname;
    if others.any(|other| other.name == *name) { format!("{name}-{:.8}", dir.node().to_string()) } else { name.clone() }
}

/// The founders' names as members: their own, if those are different, otherwise with a part of their node id. All founders see the same.
pub(super) fn names(decision: &Decision) -> Vec<(&Candidate, String)> {
    let is_alone = |name: &str| decision.founders.iter().filter(|founder| founder.name == name).count() == 1;
    let distinct = decision.founders.iter().all(|founder| is_alone(&founder.name));
    let name =
        |founder: &Candidate| if distinct { founder.name.clone() } else { format!("{}-{:.8}", founder.name, founder.node.to_string()) };
    decision.founders.iter().map(|founder| (founder, name(founder))).collect()
}

pub(super) fn token(decision: &Decision) -> String {
    format!("{:032x}", decision.cluster)
}

/// The cluster's id as its servers have it, and tell it in every answer; none if a founder's URL cannot be read.
pub(super) fn cluster_number(decision: &Decision) -> Option<u64> {
    decision.founders.iter().map(|founder| founder_id(decision, founder)).collect::<Option<Vec<u64>>>().map(cluster_id)
}

/// The id that a founder has as a member.
pub(super) fn founder_id(decision: &Decision, founder: &Candidate) -> Option<u64> {
    founder.peer_url.parse().ok().map(|url| member_id(&[url], &token(decision)))
}

/// Where the servers are for clients; but nobody who would have to be spoken to in plain text by a node with certificates, or the other way
/// round.
fn client_urls(known: &Known, secure: &Secure) -> Vec<String> {
    let urls = known.servers.iter().map(|server| server.client_url.clone());
    urls.filter(|url| speaks_tls(url) == secure.is_tls()).collect()
}

/// Says so when what the node is told now is not what it has agreed to before.
fn heed_changes(state: &State, list: &List) {
    match state {
        State::Unbound(unbound) if unbound.accepted.is_some() && unbound.list != list.id => tracing::warn!(
            join = ?unbound.entries, told = ?list.entries,
            "this node has agreed to found a cluster with another JOIN list, and keeps to that until it is settled"
        ),
        State::Bound { role, known } if *role == Role::Server && known.servers.len() != list.servers => tracing::warn!(
            servers = known.servers.len(),
            told = list.servers,
            "KV_SERVERS or JOIN ask for another number of servers than the cluster has; that is not changed by them"
        ),
        _ => {}
    }
}
