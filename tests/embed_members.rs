//! Changing who the servers of a cluster of nodes are: from one to three, another for a dead one, one less, and servers that move.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use quorate::embed::{Access, EmbedConfig, Node, Role, Servers};
use quorate::{Client, Error};

#[path = "common/nodes.rs"]
#[allow(dead_code, reason = "other tests use the rest")]
mod nodes;
#[path = "common/ports.rs"]
mod ports;
use nodes::{PATIENCE, get, places, put, start, start_all, until, until_access};
use ports::free_port;

fn config(dir: &Path, name: &str, join: &[String]) -> EmbedConfig {
    let mut config = nodes::config(dir, 0, places(1)[0], join.to_vec());
    config.hostname = name.into();
    config.data_dir = dir.join(name);
    config
}

fn at(config: &EmbedConfig) -> String {
    format!("{}:{}", config.advertise_ip.unwrap(), config.peer_port)
}

/// A cluster of so many servers, founded by the first nodes, and so many clients. The nodes are `n0`, `n1` and so on, servers first.
fn configs(dir: &Path, servers: usize, clients: usize) -> Vec<EmbedConfig> {
    let mut configs: Vec<EmbedConfig> = (0..servers + clients).map(|n| config(dir, &format!("n{n}"), &[])).collect();
    let join: Vec<String> = configs[..servers].iter().map(at).collect();
    for config in &mut configs {
        config.join.clone_from(&join);
    }
    configs
}

/// Stops a node, whatever became of it, and starts it again.
async fn restart(nodes: &mut Vec<Node>, at: usize, config: &EmbedConfig) {
    let _ = nodes.remove(at).shutdown().await;
    nodes.insert(at, start(config).await.unwrap());
}

async fn until_written(node: &Node) {
    until_access(node, Access::ReadWrite).await;
}

async fn enlisted(node: &Node, wanted: bool) {
    let mut enlisted = node.enlisted();
    tokio::time::timeout(PATIENCE, enlisted.wait_for(|enlisted| *enlisted == wanted)).await.unwrap().unwrap();
    assert_eq!((node.role(), node.health_json()["enlisted"].as_bool()), (Role::Client, Some(wanted)));
}

/// The names of the servers that vote, as a server has them.
fn voters(node: &Node) -> BTreeSet<String> {
    let members = node.local().unwrap().last_members();
    members.into_iter().filter(|member| !member.is_learner).map(|member| member.name).collect()
}

async fn until_voters(node: &Node, names: &[&str]) {
    let wanted: BTreeSet<String> = names.iter().map(|name| (*name).to_owned()).collect();
    until(&format!("{names:?} vote"), async || voters(node) == wanted).await;
}

/// The client URLs of all servers, as this node has them, are those.
async fn until_endpoints(node: &Node, configs: &[&EmbedConfig]) {
    let wanted: BTreeSet<String> =
        configs.iter().map(|config| format!("http://{}:{}", config.advertise_ip.unwrap(), config.client_port)).collect();
    let endpoints = node.endpoints();
    until(&format!("{node:?} knows {wanted:?}"), async || endpoints.borrow().iter().cloned().collect::<BTreeSet<_>>() == wanted).await;
}

/// An order is refused for this reason. It may be for another one, or come to nothing, in passing: while an election is under way, somebody is
/// not missed yet, or an order before it, whose answer was lost, is still being carried out.
async fn refused(expected: &str, order: impl AsyncFn() -> Result<(), Error>) {
    let began = Instant::now();
    loop {
        match order().await {
            Ok(()) => panic!("it was to be refused: {expected}"),
            Err(Error::Ineligible { reason, .. }) if reason == expected => return,
            Err(err) => {
                println!("{err}, and not yet {expected}");
                assert!(began.elapsed() < PATIENCE, "{err}, and not {expected}");
            }
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// Gives an order until it is carried out. It may be refused for what passes by itself: a server that is dead has to be missed first, and one that
/// is back heard.
async fn carried_out(order: impl AsyncFn() -> Result<(), Error>) {
    let (began, mut unknown) = (Instant::now(), false);
    loop {
        match order().await {
            Ok(()) => return,
            // It was, and the answer was lost.
            Err(Error::Ineligible { reason, .. })
                if unknown && ["Busy", "NotAServer", "NotAClient", "AlreadyMember"].contains(&&*reason) =>
            {
                return;
            }
            Err(Error::Ineligible { reason, .. })
                if ["StillAlive", "QuorumAtRisk", "Unreachable", "Failed", "Busy"].contains(&&*reason) => {}
            Err(err @ Error::Ineligible { .. }) => panic!("{err}"),
            Err(err) => {
                unknown = true;
                println!("{err}");
            }
        }
        assert!(began.elapsed() < PATIENCE, "it is never carried out");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// Every membership that a server has in its log: the sets of voters of each, by size.
fn memberships(config: &EmbedConfig) -> Vec<Vec<usize>> {
    let wal: PathBuf = config.data_dir.join("server/member/wal");
    let mut out = Vec::new();
    quorate::listing::print(&wal, 0, true, &mut out).unwrap();
    let lines = std::str::from_utf8(&out).unwrap().lines().filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
    let sets = lines.filter_map(|line| line["membership"]["voters"].as_array().cloned());
    sets.map(|sets| sets.iter().map(|set| set.as_array().unwrap().len()).collect()).collect()
}

async fn shut_down(nodes: Vec<Node>) {
    for node in nodes {
        node.shutdown().await.unwrap();
    }
}

/// A node that is a process of its own, and is killed when this is dropped.
struct Process(Child);

impl Process {
    fn start(config: &EmbedConfig) -> Process {
        let mut binary = Command::new(env!("CARGO_BIN_EXE_quorate"));
        binary.arg("embed").env_clear().env("JOIN", config.join.join(",")).env("KV_TOKEN", "a secret").env("HOSTNAME", &config.hostname);
        binary.env("ADVERTISE_IP", config.advertise_ip.unwrap().to_string()).env("KV_DATA_DIR", &config.data_dir);
        binary.env("KV_PEER_PORT", config.peer_port.to_string()).env("KV_CLIENT_PORT", config.client_port.to_string());
        Process(binary.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// `quorate node`, as one who is told where this node is. Whether it has succeeded, and what it has said.
fn command(config: &EmbedConfig, args: &[&str]) -> (bool, String) {
    let mut binary = Command::new(env!("CARGO_BIN_EXE_quorate"));
    binary.arg("node").args(args).env_clear().env("JOIN", at(config)).env("KV_TOKEN", "a secret").env("ADVERTISE_IP", "127.0.0.1");
    let done = binary.output().unwrap();
    (done.status.success(), String::from_utf8(done.stderr).unwrap())
}

/// Writes without rest, and knows what was acknowledged.
struct Load {
    stop: Arc<AtomicBool>,
    task: tokio::task::JoinHandle<BTreeMap<String, String>>,
}

impl Load {
    fn begin(client: Client, name: &'static str) -> Load {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let task = tokio::spawn(async move {
            let mut acknowledged = BTreeMap::new();
            for n in 0.. {
                if stopped.load(Ordering::Relaxed) {
                    break;
                }
                let (key, value) = (format!("{name}/{:03}", n % 500), n.to_string());
                match client.put(key.clone(), value.clone()).await {
                    Ok(_) => drop(acknowledged.insert(key, value)),
                    // It may have been written, or not.
                    Err(_) => drop(acknowledged.remove(&key)),
                }
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
            acknowledged
        });
        Load { stop, task }
    }

    /// What was acknowledged is there, and as it was acknowledged, as `client` reads it.
    async fn end(self, client: &Client) {
        self.stop.store(true, Ordering::Relaxed);
        let acknowledged = self.task.await.unwrap();
        assert!(acknowledged.len() > 10, "{acknowledged:?}");
        for (key, value) in acknowledged {
            assert_eq!(get(client, &key).await, Some(value), "{key}");
        }
    }
}

/// Under load, by order of a client; the new ones are started again at different times, and again before they vote.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_server_becomes_three() {
    let dir = tempfile::tempdir().unwrap();
    let configs = configs(dir.path(), 1, 3);
    let mut nodes = start_all(&configs).await;
    assert_eq!(nodes.iter().map(Node::role).collect::<Vec<_>>(), [Role::Server, Role::Client, Role::Client, Role::Client]);
    let load = Load::begin(nodes[0].client().clone(), "first");
    let (b, c) = (at(&configs[1]), at(&configs[2]));
    refused("ServerCount", async || nodes[3].grow(&[&b]).await).await;
    refused("SameNode", async || nodes[3].grow(&[&b, &b]).await).await;
    refused("NotAClient", async || nodes[3].grow(&[&b, &at(&configs[0])]).await).await;
    refused("Unreachable", async || nodes[3].grow(&[&b, "127.0.0.1:1"]).await).await;
    assert!(!*nodes[1].enlisted().borrow());
    carried_out(async || nodes[3].grow(&[&b, &c]).await).await;
    enlisted(&nodes[1], true).await;
    enlisted(&nodes[2], true).await;
    refused("Busy", async || nodes[0].grow(&[&b, &c]).await).await;

    // One comes, goes, and comes again: alone it does not vote.
    for _ in 0..2 {
        restart(&mut nodes, 1, &configs[1]).await;
        assert_eq!(nodes[1].role(), Role::Server);
        until("the first has the data", async || nodes[1].local().unwrap().last_status().raft_applied_index > 3).await;
        until_voters(&nodes[0], &["n0"]).await;
    }
    // The one that was there first is started again, too: what is intended is not forgotten.
    let load_again = Load::begin(nodes[3].client().clone(), "second");
    load.end(nodes[0].client()).await;
    restart(&mut nodes, 0, &configs[0]).await;
    let d = at(&configs[3]);
    refused("Busy", async || nodes[3].grow(&[&c, &d]).await).await;
    // The other one comes, and is killed as soon as it is known to be there: whether it votes by then is left open.
    nodes.remove(2).shutdown().await.unwrap();
    let process = Process::start(&configs[2]);
    let has_come = || nodes[0].local().unwrap().last_members().iter().any(|member| member.name == "n2");
    until("the second has come", async || has_come()).await;
    drop(process);
    nodes.insert(2, start(&configs[2]).await.unwrap());
    for node in &nodes[..3] {
        until_voters(node, &["n0", "n1", "n2"]).await;
    }
    for node in &nodes {
        until_endpoints(node, &[&configs[0], &configs[1], &configs[2]]).await;
        until_written(node).await;
    }
    // One is enough no more, and any one may be missing.
    let gone = nodes.remove(0);
    gone.shutdown().await.unwrap();
    put(nodes[0].client(), "after", "n0 has gone").await;
    load_again.end(nodes[0].client()).await;
    assert_eq!(get(nodes[2].client(), "after").await.as_deref(), Some("n0 has gone"));
    // They are servers for good.
    for at in [0, 1] {
        restart(&mut nodes, at, &configs[at + 1]).await;
        assert_eq!(nodes[at].role(), Role::Server);
    }
    until_written(&nodes[0]).await;
    shut_down(nodes).await;
    // The one that has founded the cluster alone does not do so again when it has lost its data.
    std::fs::remove_dir_all(configs[0].data_dir.join("server")).unwrap();
    let why = start(&configs[0]).await.unwrap_err().to_string();
    assert!(why.contains("its data is gone, and the cluster has other servers"), "{why}");
    let seen = memberships(&configs[1]);
    assert!(seen.contains(&vec![1, 3]) && seen.last() == Some(&vec![3]) && !seen.iter().any(|sets| sets.contains(&2)), "{seen:?}");
}

/// A dead server's place is taken; all that are left are started again in between. When the dead one comes back it knows that it is out.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dead_server_is_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let configs = configs(dir.path(), 3, 1);
    let mut nodes = start_all(&configs).await;
    until_endpoints(&nodes[3], &[&configs[0], &configs[1], &configs[2]]).await;
    for node in &nodes[..3] {
        until_voters(node, &["n0", "n1", "n2"]).await;
        until_written(node).await;
    }
    put(nodes[3].client(), "before", "1").await;
    let new = at(&configs[3]);
    // Nobody else, and nobody who is there.
    let lonely = config(dir.path(), "lonely", &["127.0.0.1:1".to_owned(), "127.0.0.1:2".to_owned()]);
    let mut foreign = config(dir.path(), "foreign", &[]);
    (foreign.join, foreign.servers) = (vec![at(&foreign)], Servers::One);
    let stranger = start(&foreign).await.unwrap();
    let refusal = async |reason: &str, server: &str, by: &str| refused(reason, async || nodes[3].replace(server, by).await).await;
    refusal("StillAlive", "n2", &new).await;
    refusal("NotAServer", "n7", &new).await;
    refusal("OtherCluster", "n2", &at(&foreign)).await;
    refusal("NotAClient", "n2", &at(&configs[1])).await;
    refused("ServerCount", async || nodes[0].grow(&[&new]).await).await;
    let at_lonely = at(&lonely);
    tokio::select! {
        started = Node::start(lonely.clone()) => panic!("{started:?}"),
        () = refusal("NoCluster", "n2", &at_lonely) => {}
    }
    stranger.shutdown().await.unwrap();
    assert_eq!(voters(&nodes[0]).len(), 3);

    let client = nodes.pop().unwrap();
    nodes.pop().unwrap().shutdown().await.unwrap();
    carried_out(async || client.replace("n2", &new).await).await;
    enlisted(&client, true).await;
    let remaining = std::mem::take(&mut nodes);
    shut_down(remaining).await;
    nodes = start_all(&configs[..2]).await;
    nodes.push(client);
    restart(&mut nodes, 2, &configs[3]).await;
    for node in &nodes {
        assert_eq!(node.role(), Role::Server);
        until_voters(node, &["n0", "n1", "n3"]).await;
        until_endpoints(node, &[&configs[0], &configs[1], &configs[3]]).await;
    }
    assert_eq!(get(nodes[2].local().unwrap(), "before").await.as_deref(), Some("1"));

    // It hears that it was replaced, and its host may begin anew with it.
    let back = start(&configs[2]).await;
    if let Ok(back) = back {
        let why = tokio::time::timeout(PATIENCE, back.stopped()).await.unwrap();
        assert!(matches!(why, Err(Error::Removed)), "{why:?}");
        let _ = back.shutdown().await;
    }
    let again = start(&configs[2]).await;
    assert!(matches!(again, Err(Error::Removed)), "{again:?}");
    std::fs::remove_dir_all(&configs[2].data_dir).unwrap();
    let anew = start(&configs[2]).await.unwrap();
    assert_eq!(anew.role(), Role::Client);
    assert_eq!(get(anew.client(), "before").await.as_deref(), Some("1"));
    // It takes the place of one that is there, because somebody says so.
    carried_out(async || anew.replace_alive("n3", &at(&configs[2])).await).await;
    enlisted(&anew, true).await;
    anew.shutdown().await.unwrap();
    let anew = start(&configs[2]).await.unwrap();
    until_voters(&anew, &["n0", "n1", "n2"]).await;
    let out = nodes.pop().unwrap();
    let why = tokio::time::timeout(PATIENCE, out.stopped()).await.unwrap();
    assert!(matches!(why, Err(Error::Removed)), "{why:?}");
    let _ = out.shutdown().await;
    until_written(&anew).await;
    anew.shutdown().await.unwrap();
    shut_down(nodes).await;
    let seen = memberships(&configs[0]);
    assert!(seen.iter().all(|sets| sets.iter().all(|set| *set == 3)) && seen.contains(&vec![3, 3]), "{seen:?}");
}

/// Who is enlisted and does not come is put out, and with it the one that has come; both are clients then, and may be enlisted again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_is_enlisted_and_does_not_come_is_put_out() {
    let dir = tempfile::tempdir().unwrap();
    let mut configs = configs(dir.path(), 1, 2);
    configs[0].enlist_timeout = Duration::from_secs(10);
    let mut nodes = start_all(&configs).await;
    let (b, c) = (at(&configs[1]), at(&configs[2]));
    carried_out(async || nodes[0].grow(&[&b, &c]).await).await;
    enlisted(&nodes[1], true).await;
    enlisted(&nodes[2], true).await;
    restart(&mut nodes, 1, &configs[1]).await;
    // It may have come too late, and found out while it started.
    if nodes[1].role() == Role::Server {
        let why = tokio::time::timeout(PATIENCE, nodes[1].stopped()).await.unwrap();
        assert!(matches!(why, Err(Error::Removed)), "{why:?}");
    }
    let members = || nodes[0].local().unwrap().last_members().len();
    until("both are put out", async || members() == 1).await;
    put(nodes[0].client(), "alone", "as ever").await;
    for at in [1, 2] {
        restart(&mut nodes, at, &configs[at]).await;
        enlisted(&nodes[at], false).await;
        assert!(!configs[at].data_dir.join("server").exists());
        assert_eq!(get(nodes[at].client(), "alone").await.as_deref(), Some("as ever"));
    }
    // With more time.
    configs[0].enlist_timeout = PATIENCE;
    restart(&mut nodes, 0, &configs[0]).await;
    carried_out(async || nodes[1].grow(&[&b, &c]).await).await;
    for at in [1, 2] {
        enlisted(&nodes[at], true).await;
        restart(&mut nodes, at, &configs[at]).await;
    }
    until_voters(&nodes[1], &["n0", "n1", "n2"]).await;
    shut_down(nodes).await;
}

/// `quorate embed` is a host that heeds what its node tells it: an order is enough. And it still ends when it is asked to.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_process_that_is_enlisted_becomes_a_server_by_itself() {
    let dir = tempfile::tempdir().unwrap();
    let configs = configs(dir.path(), 1, 2);
    let first = start(&configs[0]).await.unwrap();
    put(first.client(), "before", "1").await;
    let mut others = [Process::start(&configs[1]), Process::start(&configs[2])];
    let (b, c) = (at(&configs[1]), at(&configs[2]));
    // They may not have come yet.
    until("they are to be servers", async || {
        if let Err(err) = first.grow(&[&b, &c]).await {
            println!("{err}");
        }
        first.local().unwrap().last_members().len() == 3
    })
    .await;
    until_voters(&first, &["n0", "n1", "n2"]).await;
    until_endpoints(&first, &[&configs[0], &configs[1], &configs[2]]).await;
    put(first.client(), "before", "2").await;
    for process in &mut others[..1] {
        assert!(Command::new("kill").args(["-TERM", &process.0.id().to_string()]).status().unwrap().success());
        let mut code = None;
        until("it has ended", async || {
            code = process.0.try_wait().unwrap();
            code.is_some()
        })
        .await;
        assert_eq!(code.unwrap().code(), Some(0));
    }
    put(first.client(), "after", "n1 has gone").await;
    first.shutdown().await.unwrap();
}

/// What a node says of servers that are replaced by themselves.
fn replacement(node: &Node) -> serde_json::Value {
    node.health_json()["replacement"].clone()
}

/// The one of these nodes that is enlisted, once one is.
async fn one_enlisted(nodes: &[Node], among: &[usize]) -> usize {
    let is_enlisted = |at: &usize| *nodes[*at].enlisted().borrow();
    until("one is enlisted", async || among.iter().any(is_enlisted)).await;
    *among.iter().find(|at| is_enlisted(at)).unwrap()
}

/// One that comes back in time stays. One that does not is missed: while no client is there, that is said; the first one that is enlisted does not come
/// and is called off, and another is tried before it. The dead one knows that it is out when it comes back.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dead_server_is_replaced_by_itself() {
    let dir = tempfile::tempdir().unwrap();
    let mut patient = configs(dir.path(), 3, 2);
    for config in &mut patient {
        (config.replace_after, config.enlist_timeout) = (Some(2 * PATIENCE), 2 * PATIENCE);
    }
    let mut impatient = patient.clone();
    for config in &mut impatient {
        config.replace_after = Some(Duration::from_secs(1));
    }
    let mut nodes = start_all(&patient).await;
    for node in &nodes[..3] {
        until_voters(node, &["n0", "n1", "n2"]).await;
        until_written(node).await;
    }
    put(nodes[3].client(), "before", "1").await;
    restart(&mut nodes, 2, &patient[2]).await;
    until_written(&nodes[2]).await;
    put(nodes[3].client(), "before", "2").await;
    assert!(nodes.iter().all(|node| replacement(node)["begun"] == 0 && !*node.enlisted().borrow()));
    assert_eq!(voters(&nodes[2]).len(), 3);

    // It goes, and so do the clients. From here on two are left, and nobody but it can be missed by one who hears of a quorum.
    while nodes.len() > 2 {
        nodes.pop().unwrap().shutdown().await.unwrap();
    }
    for at in [0, 1] {
        restart(&mut nodes, at, &impatient[at]).await;
    }
    let wanting = |node: &Node| {
        let wanted = replacement(node)["wanted"].clone();
        let refused =
            wanted["refused"].as_array().is_some_and(|why| why.iter().any(|why| why.as_str().unwrap().starts_with("Unreachable: ")));
        let is_counted = node.metrics().text().lines().any(|line| line == "quorate_replacement_wanting 1");
        wanted["server"].as_str().is_some_and(|server| server.starts_with("n2 (")) && refused && is_counted
    };
    until("nobody is there to take its place", async || nodes.iter().any(wanting)).await;
    assert_eq!(voters(&nodes[0]).len(), 3);

    // Neither is in the servers' JOIN.
    nodes.extend(start_all(&impatient[3..]).await.into_iter());
    let first = one_enlisted(&nodes, &[2, 3]).await;
    let counts = |nodes: &[Node], what: &str| nodes.iter().any(|node| replacement(node)[what].as_u64().unwrap() >= 1);
    until("it is counted, and nobody is wanting", async || counts(&nodes, "begun") && !nodes.iter().any(wanting)).await;
    let second = 5 - first;
    until("all know of the first", async || nodes[..2].iter().all(|node| node.local().unwrap().last_members().len() == 4)).await;
    carried_out(async || nodes[0].remove(&at(&impatient[first + 1])).await).await;
    one_enlisted(&nodes, &[second]).await;
    until("it is counted that the first has not come", async || counts(&nodes, "failed")).await;
    // From here on nobody is missed who is only slow.
    for at in [0, 1] {
        restart(&mut nodes, at, &patient[at]).await;
    }
    restart(&mut nodes, second, &patient[second + 1]).await;
    assert_eq!(nodes[second].role(), Role::Server);
    let name = format!("n{}", second + 1);
    for at in [0, 1, second] {
        until_voters(&nodes[at], &["n0", "n1", &name]).await;
        until_endpoints(&nodes[at], &[&patient[0], &patient[1], &patient[second + 1]]).await;
    }
    assert_eq!(get(nodes[second].local().unwrap(), "before").await.as_deref(), Some("2"));

    let back = start(&patient[2]).await;
    if let Ok(back) = back {
        let why = tokio::time::timeout(PATIENCE, back.stopped()).await.unwrap();
        assert!(matches!(why, Err(Error::Removed)), "{why:?}");
        let _ = back.shutdown().await;
    }
    std::fs::remove_dir_all(&patient[2].data_dir).unwrap();
    let anew = start(&patient[2]).await.unwrap();
    assert_eq!(anew.role(), Role::Client);
    assert_eq!(get(anew.client(), "before").await.as_deref(), Some("2"));
    anew.shutdown().await.unwrap();
    shut_down(nodes).await;
    let seen = memberships(&patient[0]);
    assert!(seen.iter().all(|sets| sets.iter().all(|set| *set == 3)) && seen.contains(&vec![3, 3]), "{seen:?}");
}

/// By order of any node, as long as those that are left can go on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_is_removed() {
    let dir = tempfile::tempdir().unwrap();
    let configs = configs(dir.path(), 3, 1);
    let mut nodes = start_all(&configs).await;
    for node in &nodes[..3] {
        until_voters(node, &["n0", "n1", "n2"]).await;
    }
    put(nodes[3].client(), "key", "value").await;
    refused("NotAServer", async || nodes[3].remove("n9").await).await;
    // One is down, and is missed once it may be replaced: none of the others may go.
    nodes.remove(2).shutdown().await.unwrap();
    let client = at(&configs[3]);
    carried_out(async || nodes[2].replace("n2", &client).await).await;
    enlisted(&nodes[2], true).await;
    refused("QuorumAtRisk", async || nodes[2].remove("n1").await).await;
    // That is called off; the one that is down may go. Also by who is no node, and is told of a client alone.
    carried_out(async || nodes[2].remove(&client).await).await;
    let (done, said) = command(&configs[3], &["remove", "n9"]);
    assert!(!done && said.contains("NotAServer: \"n9\" is no server"), "{said}");
    until("the command is carried out", async || {
        let (done, said) = command(&configs[3], &["remove", "n2"]);
        println!("{said}");
        done || said.contains("NotAServer")
    })
    .await;
    until_endpoints(&nodes[2], &[&configs[0], &configs[1]]).await;
    // By its address; the one that carries it out may be the one that goes.
    carried_out(async || nodes[2].remove(&at(&configs[1])).await).await;
    until_endpoints(&nodes[2], &[&configs[0]]).await;
    restart(&mut nodes, 2, &configs[3]).await;
    enlisted(&nodes[2], false).await;
    let removed = nodes.remove(1);
    let why = tokio::time::timeout(PATIENCE, removed.stopped()).await.unwrap();
    assert!(matches!(why, Err(Error::Removed)), "{why:?}");
    let _ = removed.shutdown().await;
    refused("QuorumAtRisk", async || nodes[0].remove("n0").await).await;
    assert_eq!(get(nodes[1].client(), "key").await.as_deref(), Some("value"));
    shut_down(nodes).await;
}

/// One server moves, then all of them at once, then again with one address for all to begin with; clients find them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn servers_move() {
    let dir = tempfile::tempdir().unwrap();
    let mut configs = configs(dir.path(), 3, 2);
    // One client stays as it is, all the time: it knows the servers, and the other client.
    let other_client = at(&configs[4]);
    configs[3].join.push(other_client);
    let mut nodes = start_all(&configs).await;
    for node in &nodes[..3] {
        until_voters(node, &["n0", "n1", "n2"]).await;
    }
    put(nodes[3].client(), "key", "0").await;
    let place = |config: &mut EmbedConfig, ip: [u8; 4]| {
        config.advertise_ip = Some(IpAddr::from(ip));
        (config.peer_port, config.client_port) = (free_port(), free_port());
    };

    place(&mut configs[2], [127, 0, 0, 2]);
    restart(&mut nodes, 2, &configs[2]).await;
    for node in &nodes {
        until_endpoints(node, &[&configs[0], &configs[1], &configs[2]]).await;
    }
    put(nodes[4].client(), "key", "1").await;

    // A node of another cluster listens at one of the addresses that all are told, too.
    let mut foreign = config(dir.path(), "foreign", &[]);
    (foreign.join, foreign.servers) = (vec![at(&foreign)], Servers::One);
    let stranger = start(&foreign).await.unwrap();
    for round in 2..4 {
        let clients = nodes.split_off(3);
        shut_down(nodes).await;
        for (n, config) in configs[..3].iter_mut().enumerate() {
            place(config, [127, 0, round, 1 + n as u8]);
        }
        let first = at(&configs[0]);
        let join: Vec<String> = match round {
            2 => configs[..3].iter().chain([&foreign]).map(at).collect(),
            _ => vec![first],
        };
        for n in [0, 1, 2, 4] {
            configs[n].join.clone_from(&join);
        }
        nodes = start_all(&configs[..3]).await;
        nodes.extend(clients);
        restart(&mut nodes, 4, &configs[4]).await;
        for node in &nodes {
            until_endpoints(node, &[&configs[0], &configs[1], &configs[2]]).await;
            assert_eq!(get(node.client(), "key").await, Some((round - 1).to_string()));
        }
        put(nodes[3].client(), "key", &round.to_string()).await;
    }
    stranger.shutdown().await.unwrap();
    shut_down(nodes).await;
}
