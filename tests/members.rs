//! Who belongs to a cluster, and how that is changed: members in one process, over loopback, asked over gRPC.
//!
//! The errors are etcd's, to the letter: `ETCD` has them as etcd 3.5.30 gave them to the same requests.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use quorate::config::ClusterState;
use quorate::proto::etcdserverpb::cluster_client::ClusterClient;
use quorate::proto::etcdserverpb::kv_client::KvClient;
use quorate::proto::etcdserverpb::maintenance_client::MaintenanceClient;
use quorate::proto::etcdserverpb::*;
use quorate::{Client, Config, Error, Server};
use tonic::transport::Channel;
use tonic::{Code, Status};

use ports::free_port;

#[path = "common/ports.rs"]
mod ports;

/// What a cluster may take to come to something. A test that waits longer has failed.
const PATIENCE: Duration = Duration::from_secs(60);

/// What etcd 3.5.30 answers.
mod etcd {
    use tonic::Code;
    pub const NOT_FOUND: (Code, &str) = (Code::NotFound, "etcdserver: member not found");
    pub const URL_EXISTS: (Code, &str) = (Code::FailedPrecondition, "etcdserver: Peer URLs already exists");
    pub const NOT_LEARNER: (Code, &str) = (Code::FailedPrecondition, "etcdserver: can only promote a learner member");
    pub const NOT_READY: (Code, &str) =
        (Code::FailedPrecondition, "etcdserver: can only promote a learner member which is in sync with leader");
    pub const TOO_MANY_LEARNERS: (Code, &str) = (Code::FailedPrecondition, "etcdserver: too many learner members in cluster");
    pub const UNHEALTHY: (Code, &str) = (Code::Unavailable, "etcdserver: unhealthy cluster");
    pub const NOT_STARTED: (Code, &str) = (Code::Unknown, "etcdserver: re-configuration failed due to not enough started members");
    pub const LEARNER: (Code, &str) = (Code::Unavailable, "etcdserver: rpc not supported for learner");
    pub const NOT_LEADER: (Code, &str) = (Code::FailedPrecondition, "etcdserver: not leader");
    pub const BAD_TRANSFEREE: (Code, &str) = (Code::FailedPrecondition, "etcdserver: bad leader transferee");
    pub const BAD_URLS: (Code, &str) = (Code::InvalidArgument, "etcdserver: given member URLs are invalid");
    pub const REMOVED: &str = "the member has been permanently removed from the cluster";
}

fn url(port: u16) -> String {
    format!("http://127.0.0.1:{port}")
}

fn config(dir: &Path, name: &str, port: u16, cluster: &[(&str, u16)], state: ClusterState) -> Config {
    let mut config = Config::default();
    config.name = name.into();
    config.data_dir = Some(dir.to_owned());
    config.listen_client_urls = vec!["http://127.0.0.1:0".parse().unwrap()];
    config.listen_peer_urls = vec![url(port).parse().unwrap()];
    config.initial_advertise_peer_urls = config.listen_peer_urls.clone();
    config.initial_cluster = cluster.iter().map(|(name, port)| format!("{name}={}", url(*port))).collect::<Vec<_>>().join(",");
    config.initial_cluster_state = state;
    config
}

struct One {
    server: Server,
    name: String,
    port: u16,
    dir: PathBuf,
    channel: Channel,
}

impl One {
    async fn start(config: Config) -> Result<One, Error> {
        let (name, dir) = (config.name.clone(), config.data_dir.clone().unwrap());
        let port = config.listen_peer_urls[0].to_string().rsplit(':').next().unwrap().parse().unwrap();
        let server = Server::start(config).await?;
        let channel = Channel::from_shared(format!("http://{}", server.client_addrs()[0])).unwrap().connect_lazy();
        Ok(One { server, name, port, dir, channel })
    }

    fn id(&self) -> u64 {
        self.server.member_id()
    }

    fn client(&self) -> Client {
        self.server.client()
    }

    fn cluster(&self) -> ClusterClient<Channel> {
        ClusterClient::new(self.channel.clone())
    }

    async fn add(&self, port: u16, is_learner: bool) -> Result<u64, Status> {
        let added = self.cluster().member_add(MemberAddRequest { peer_urls: vec![url(port)], is_learner }).await?.into_inner();
        let member = added.member.unwrap();
        assert!(added.members.contains(&member) && member.is_learner == is_learner && member.peer_urls == [url(port)], "{member:?}");
        Ok(member.id)
    }

    async fn remove(&self, id: u64) -> Result<Vec<Member>, Status> {
        Ok(self.cluster().member_remove(MemberRemoveRequest { id }).await?.into_inner().members)
    }

    async fn update(&self, id: u64, port: u16) -> Result<Vec<Member>, Status> {
        Ok(self.cluster().member_update(MemberUpdateRequest { id, peer_urls: vec![url(port)] }).await?.into_inner().members)
    }

    async fn promote(&self, id: u64) -> Result<Vec<Member>, Status> {
        Ok(self.cluster().member_promote(MemberPromoteRequest { id }).await?.into_inner().members)
    }

    async fn list(&self) -> Vec<Member> {
        self.cluster().member_list(MemberListRequest { linearizable: true }).await.unwrap().into_inner().members
    }

    async fn move_leader(&self, target_id: u64) -> Result<(), Status> {
        MaintenanceClient::new(self.channel.clone()).move_leader(MoveLeaderRequest { target_id }).await.map(drop)
    }
}

/// Three members, with their names published, and a leader that has heard of all of them.
async fn three(dir: &Path) -> Vec<One> {
    let cluster = [("a", free_port()), ("b", free_port()), ("c", free_port())];
    let mut members = Vec::new();
    for (name, port) in cluster {
        members.push(One::start(config(&dir.join(name), name, port, &cluster, ClusterState::New)).await.unwrap());
    }
    published(&members).await;
    members
}

/// Waits until each of these members knows each other's client URLs.
async fn published(members: &[One]) {
    for member in members {
        let all = || async {
            member.client().last_members().iter().filter(|other| !other.client_urls.is_empty() && !other.name.is_empty()).count()
        };
        until("the members are published", async || all().await >= members.len()).await;
    }
}

async fn until(what: &str, condition: impl AsyncFn() -> bool) {
    let began = Instant::now();
    while !condition().await {
        assert!(began.elapsed() < PATIENCE, "in vain: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Repeats a change while the cluster is not settled: the leader has not heard of all members lately, or there is none.
async fn settled<T>(what: &str, change: impl AsyncFn() -> Result<T, Status>) -> T {
    let began = Instant::now();
    loop {
        match change().await {
            Ok(done) => return done,
            Err(err) => {
                let answer = (err.code(), err.message());
                let passing = err.code() == Code::Unavailable || answer == etcd::NOT_READY || answer == etcd::NOT_LEADER;
                assert!(passing && began.elapsed() < PATIENCE, "{what}: {err}");
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
    }
}

fn refused<T: std::fmt::Debug>(result: Result<T, Status>) -> (Code, String) {
    let status = result.unwrap_err();
    (status.code(), status.message().to_owned())
}

/// Asks until the answer is not about an election that happens to be under way: on a busy machine there may be one at any time.
macro_rules! assert_refused {
    ($result:expr, $expected:expr) => {{
        let (began, expected) = (Instant::now(), ($expected.0, $expected.1.to_owned()));
        loop {
            let refusal = refused($result);
            if refusal == expected {
                break;
            }
            assert!(refusal.0 == Code::Unavailable && began.elapsed() < PATIENCE, "{refusal:?}, not {expected:?}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }};
}

/// The leader's place, agreed on by all.
async fn leader(members: &[One]) -> usize {
    let agreed = || {
        let first = members[0].client().last_status().leader;
        members.iter().all(|member| member.client().last_status().leader == first).then_some(first)
    };
    until("all agree on a leader", async || agreed().is_some_and(|id| members.iter().any(|member| member.id() == id))).await;
    let id = agreed().unwrap_or_else(|| members[0].client().last_status().leader);
    members.iter().position(|member| member.id() == id).unwrap()
}

async fn put(client: &Client, key: &str, value: &str) {
    let began = Instant::now();
    while let Err(err) = client.put(key.to_owned(), value.to_owned()).await {
        assert!(began.elapsed() < PATIENCE, "putting {key}: {err}");
        assert!(matches!(err, Error::Timeout | Error::Apply(_)), "{err}");
    }
}

async fn value(client: &Client, key: &str) -> Option<String> {
    let began = Instant::now();
    loop {
        match client.get(key.to_owned()).await {
            Ok(kv) => return kv.map(|kv| String::from_utf8(kv.value.to_vec()).unwrap()),
            Err(err) => assert!(began.elapsed() < PATIENCE, "getting {key}: {err}"),
        }
    }
}

async fn stop(members: Vec<One>) {
    for member in members {
        member.server.shutdown().await.unwrap();
    }
}

/// A member that joins with what the others say of themselves.
async fn join(dir: &Path, name: &str, port: u16, members: &[One]) -> Result<One, Error> {
    let mut cluster: Vec<(&str, u16)> = members.iter().map(|member| (member.name.as_str(), member.port)).collect();
    cluster.push((name, port));
    One::start(config(dir, name, port, &cluster, ClusterState::Existing)).await
}

#[tokio::test(flavor = "multi_thread")]
async fn each_member_tells_all() {
    let dir = tempfile::tempdir().unwrap();
    let members = three(dir.path()).await;
    let first = members[0].list().await;
    assert_eq!(first.len(), 3);
    for member in &members {
        assert_eq!(member.list().await, first);
        let told = first.iter().find(|told| told.id == member.id()).unwrap();
        assert_eq!(told.name, member.name);
        assert_eq!(told.peer_urls, [url(member.port)]);
        assert_eq!(told.client_urls, [format!("http://{}", member.server.client_addrs()[0])]);
        assert!(!told.is_learner && !member.client().last_status().is_learner);
    }
    stop(members).await;
}

/// It might vote twice in a term, and does not have what it has acknowledged.
#[tokio::test(flavor = "multi_thread")]
async fn a_founder_without_its_data_does_not_found_again() {
    let dir = tempfile::tempdir().unwrap();
    let mut members = three(dir.path()).await;
    let cluster: Vec<(String, u16)> = members.iter().map(|member| (member.name.clone(), member.port)).collect();
    let cluster: Vec<(&str, u16)> = cluster.iter().map(|(name, port)| (name.as_str(), *port)).collect();
    let gone = members.pop().unwrap();
    let (id, port, path) = (gone.id(), gone.port, gone.dir.clone());
    gone.server.shutdown().await.unwrap();
    std::fs::remove_dir_all(&path).unwrap();
    let again = || config(&path, "c", port, &cluster, ClusterState::New);
    let refusal = Server::start(again()).await.unwrap_err().to_string();
    assert!(refusal.contains(&format!("member {id:x} has already been bootstrapped")), "{refusal}");
    // Nor once it is removed.
    settled("removing it", async || members[0].remove(id).await).await;
    let refusal = Server::start(again()).await.unwrap_err().to_string();
    assert!(refusal.contains("has already been bootstrapped"), "{refusal}");
    stop(members).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn leadership_moves_where_it_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let members = three(dir.path()).await;
    for to in [0, 1, 2, 0] {
        // Whoever leads when it is asked: it answers when it has seen the other lead.
        settled("moving the leader", async || members[leader(&members).await].move_leader(members[to].id()).await).await;
        settled("moving it where it is", async || members[leader(&members).await].move_leader(members[to].id()).await).await;
        let wrong = async || members[leader(&members).await].move_leader(0xdead).await;
        until("a bad transferee", async || refused(wrong().await) == (etcd::BAD_TRANSFEREE.0, etcd::BAD_TRANSFEREE.1.to_owned())).await;
        let elsewhere = async || members[(leader(&members).await + 1) % 3].move_leader(members[to].id()).await;
        until("not the leader", async || elsewhere().await.is_err_and(|err| (err.code(), err.message()) == etcd::NOT_LEADER)).await;
        for member in &members {
            put(&member.client(), "key", &member.name).await;
        }
    }
    stop(members).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn changes_are_refused_as_etcd_refuses_them() {
    let dir = tempfile::tempdir().unwrap();
    let mut members = three(dir.path()).await;
    let ids: Vec<u64> = members.iter().map(One::id).collect();
    let taken = members[1].port;
    for member in &members {
        // A new leader has to hear of all before anybody may be added: until then the cluster is unhealthy.
        settled("healthy", async || match member.add(taken, false).await {
            Err(err) if (err.code(), err.message()) == etcd::URL_EXISTS => Ok(()),
            other => other.map(drop),
        })
        .await;
        assert_refused!(member.remove(0xdead).await, etcd::NOT_FOUND);
        assert_refused!(member.update(0xdead, free_port()).await, etcd::NOT_FOUND);
        assert_refused!(member.promote(0xdead).await, etcd::NOT_FOUND);
        assert_refused!(member.promote(ids[1]).await, etcd::NOT_LEARNER);
        assert_refused!(member.update(ids[0], taken).await, etcd::URL_EXISTS);
        let malformed = MemberAddRequest { peer_urls: vec!["nowhere".into()], is_learner: false };
        assert_refused!(member.cluster().member_add(malformed.clone()).await, etcd::BAD_URLS);
    }
    let learner = settled("adding a learner", async || members[0].add(free_port(), true).await).await;
    for member in &members {
        assert_refused!(member.add(free_port(), true).await, etcd::TOO_MANY_LEARNERS);
        assert_refused!(member.promote(learner).await, etcd::NOT_READY);
        let listed = member.list().await;
        let told = listed.iter().find(|told| told.id == learner).unwrap();
        assert!(told.is_learner && told.name.is_empty() && told.client_urls.is_empty());
    }
    let leads = leader(&members).await;
    assert_refused!(members[leads].move_leader(learner).await, etcd::BAD_TRANSFEREE);
    assert_eq!(members[2].remove(learner).await.unwrap().len(), 3);
    // One is down: it may be removed, another may not.
    let down = members.swap_remove((leads + 1) % 3);
    let id = down.id();
    down.server.shutdown().await.unwrap();
    let leads = leader(&members).await;
    until("the leader misses it", async || match members[leads].add(free_port(), false).await {
        Err(err) => (err.code(), err.message()) == etcd::UNHEALTHY,
        Ok(added) => {
            members[leads].remove(added).await.unwrap();
            false
        }
    })
    .await;
    for member in &members {
        assert_refused!(member.remove(members[leads].id()).await, etcd::UNHEALTHY);
        assert_refused!(member.remove(members[1 - leads].id()).await, etcd::UNHEALTHY);
    }
    assert_eq!(members[0].remove(id).await.unwrap().len(), 2);
    // An added voter that never comes: no other until it has, and the two go on without it.
    let unstarted = settled("adding a voter", async || members[0].add(free_port(), false).await);
    // Of two members, three with the new one, both must be up.
    let unstarted = unstarted.await;
    assert_refused!(members[1].add(free_port(), false).await, etcd::NOT_STARTED);
    assert_refused!(members[1].remove(members[0].id()).await, etcd::NOT_STARTED);
    put(&members[0].client(), "goes", "on").await;
    members[0].remove(unstarted).await.unwrap();
    stop(members).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_learner_joins_and_becomes_a_voter() {
    let dir = tempfile::tempdir().unwrap();
    let mut members = three(dir.path()).await;
    put(&members[0].client(), "before", "0").await;
    let port = free_port();
    // Nobody knows it yet.
    let err = join(&dir.path().join("d"), "d", port, &members).await.err().unwrap();
    assert!(err.to_string().contains("member count is unequal"), "{err}");
    let id = settled("adding a learner", async || members[1].add(port, true).await).await;
    let mut wrong: Vec<(&str, u16)> = members.iter().map(|member| (member.name.as_str(), member.port)).collect();
    wrong[2].1 = self::free_port();
    wrong.push(("d", port));
    let err = One::start(config(&dir.path().join("d"), "d", port, &wrong, ClusterState::Existing)).await.err().unwrap();
    assert!(err.to_string().contains("no match found for existing member"), "{err}");

    let learner = join(&dir.path().join("d"), "d", port, &members).await.unwrap();
    assert_eq!((learner.id(), learner.server.cluster_id()), (id, members[0].server.cluster_id()));
    until("it knows that it is a learner", async || learner.client().last_status().is_learner).await;
    // What a learner serves, and what it does not.
    let own = || RangeRequest { key: "before".into(), serializable: true, ..Default::default() };
    until("it has the log", async || learner.client().range(own()).await.unwrap().count == 1).await;
    let mut kv = KvClient::new(learner.channel.clone());
    assert_eq!(kv.range(own()).await.unwrap().into_inner().kvs.len(), 1);
    assert_refused!(kv.range(RangeRequest { serializable: false, ..own() }).await, etcd::LEARNER);
    assert_refused!(kv.put(PutRequest::default()).await, etcd::LEARNER);
    assert_refused!(kv.txn(TxnRequest::default()).await, etcd::LEARNER);
    assert_refused!(learner.add(self::free_port(), false).await, etcd::LEARNER);
    assert_refused!(learner.cluster().member_list(MemberListRequest::default()).await, etcd::LEARNER);
    let mut maintenance = MaintenanceClient::new(learner.channel.clone());
    assert!(maintenance.status(StatusRequest {}).await.unwrap().into_inner().is_learner);
    assert_refused!(maintenance.hash_kv(HashKvRequest::default()).await, etcd::LEARNER);
    assert_refused!(maintenance.move_leader(MoveLeaderRequest { target_id: id }).await, etcd::LEARNER);
    let mut backup = maintenance.snapshot(SnapshotRequest {}).await.unwrap().into_inner();
    assert!(backup.message().await.unwrap().is_some());

    let listed = settled("promoting", async || members[2].promote(id).await).await;
    assert!(listed.iter().any(|told| told.id == id && !told.is_learner));
    members.push(learner);
    until("it knows that it votes", async || !members[3].client().last_status().is_learner).await;
    published(&members).await;
    put(&members[3].client(), "from", "d").await;
    assert_eq!(value(&members[0].client(), "from").await.as_deref(), Some("d"));
    for member in &members {
        assert_refused!(member.promote(id).await, etcd::NOT_LEARNER);
    }
    stop(members).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_member_becomes_three() {
    let dir = tempfile::tempdir().unwrap();
    let (a, b, c) = (free_port(), free_port(), free_port());
    let mut members = vec![One::start(config(&dir.path().join("a"), "a", a, &[("a", a)], ClusterState::New)).await.unwrap()];
    put(&members[0].client(), "alone", "1").await;
    for (name, port) in [("b", b), ("c", c)] {
        let id = settled("adding", async || members[0].add(port, false).await).await;
        // It costs nothing while it is not there.
        put(&members[0].client(), "meanwhile", name).await;
        let joined = join(&dir.path().join(name), name, port, &members).await.unwrap();
        assert_eq!(joined.id(), id);
        members.push(joined);
        published(&members).await;
        assert_eq!(value(&members.last().unwrap().client(), "meanwhile").await.as_deref(), Some(name));
    }
    // All three are published, so all three vote: any one may go.
    let first = members.remove(0);
    first.server.shutdown().await.unwrap();
    put(&members[0].client(), "without", "a").await;
    assert_eq!(value(&members[1].client(), "alone").await.as_deref(), Some("1"));
    // Those that have joined come back from their own data alone.
    let dirs: Vec<_> = members.iter().map(|member| (member.name.clone(), member.port, member.dir.clone())).collect();
    stop(members).await;
    let mut members = Vec::new();
    for (name, port, dir) in &dirs {
        members.push(One::start(config(dir, name, *port, &[], ClusterState::New)).await.unwrap());
    }
    assert_eq!(value(&members[0].client(), "without").await.as_deref(), Some("a"));
    stop(members).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_removed_member_stops_for_good() {
    let dir = tempfile::tempdir().unwrap();
    let mut members = three(dir.path()).await;
    // First one that follows, then the one that leads; each at the request of itself.
    for leads in [false, true] {
        let at = leader(&members).await;
        let at = if leads { at } else { (at + 1) % members.len() };
        let id = members[at].id();
        tokio::select! {
            biased;
            // Had it to be asked twice, for want of a leader, it may be gone before it answers.
            _ = members[at].server.stopped() => {}
            _ = settled("removing", async || members[at].remove(id).await) => {}
        }
        let gone = members.swap_remove(at);
        let stopped = tokio::time::timeout(PATIENCE, gone.server.stopped()).await.unwrap();
        assert_eq!(stopped.unwrap_err().to_string(), etcd::REMOVED);
        let _ = gone.server.shutdown().await;
        let again = One::start(config(&gone.dir, &gone.name, gone.port, &[], ClusterState::New)).await;
        assert_eq!(again.err().unwrap().to_string(), etcd::REMOVED);
        put(&members[0].client(), "still", "there").await;
        assert_eq!(members[0].list().await.len(), members.len());
        assert_refused!(members[0].remove(id).await, etcd::NOT_FOUND);
    }
    let last = members.pop().unwrap();
    assert_refused!(last.remove(last.id()).await, etcd::NOT_STARTED);
    stop(vec![last]).await;
}

/// A member that was down while it was removed hears of it when it is back.
#[tokio::test(flavor = "multi_thread")]
async fn who_was_away_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let mut members = three(dir.path()).await;
    let away = members.swap_remove((leader(&members).await + 1) % 3);
    let (id, name, port, dir) = (away.id(), away.name.clone(), away.port, away.dir.clone());
    away.server.shutdown().await.unwrap();
    settled("removing", async || members[0].remove(id).await).await;
    let back = One::start(config(&dir, &name, port, &[], ClusterState::New)).await.unwrap();
    let stopped = tokio::time::timeout(PATIENCE, back.server.stopped()).await.unwrap();
    assert_eq!(stopped.unwrap_err().to_string(), etcd::REMOVED);
    let _ = back.server.shutdown().await;
    assert!(matches!(One::start(config(&dir, &name, port, &[], ClusterState::New)).await, Err(Error::Removed)));
    stop(members).await;
}

/// A member moves: its peer URL is changed, then it is started there.
#[tokio::test(flavor = "multi_thread")]
async fn a_member_moves() {
    let dir = tempfile::tempdir().unwrap();
    let mut members = three(dir.path()).await;
    let at = (leader(&members).await + 1) % 3;
    let (id, to) = (members[at].id(), free_port());
    let listed = settled("updating", async || members[(at + 1) % 3].update(id, to).await).await;
    assert!(listed.iter().any(|told| told.id == id && told.peer_urls == [url(to)]));
    let moved = members.remove(at);
    let (name, dir) = (moved.name.clone(), moved.dir.clone());
    moved.server.shutdown().await.unwrap();
    put(&members[0].client(), "moved", &name).await;
    let moved = One::start(config(&dir, &name, to, &[], ClusterState::New)).await.unwrap();
    assert_eq!(value(&moved.client(), "moved").await.as_deref(), Some(name.as_str()));
    members.push(moved);
    stop(members).await;
}

/// Each member in turn is removed, wiped, added anew as a learner and promoted, while clients write: nothing acknowledged is lost.
#[tokio::test(flavor = "multi_thread")]
async fn all_members_are_replaced_under_load() {
    let dir = tempfile::tempdir().unwrap();
    let mut members = three(dir.path()).await;
    let done = Arc::new(AtomicBool::new(false));
    let mut acknowledged: Vec<String> = Vec::new();
    for round in 0..3 {
        let gone = members.remove(0);
        // Two writers, each at a member that stays.
        let writers = members.iter().enumerate().map(|(at, member)| {
            let (client, done) = (member.client(), done.clone());
            tokio::spawn(async move {
                let mut written = Vec::new();
                for number in 0.. {
                    if done.load(Ordering::Relaxed) {
                        break;
                    }
                    let key = format!("{round}/{at}/{number}");
                    if client.put(key.clone(), "x").await.is_ok() {
                        written.push(key);
                    }
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
                written
            })
        });
        let writers: Vec<_> = writers.collect();
        settled("removing", async || members[1].remove(gone.id()).await).await;
        let stopped = tokio::time::timeout(PATIENCE, gone.server.stopped()).await.unwrap();
        assert_eq!(stopped.unwrap_err().to_string(), etcd::REMOVED);
        let _ = gone.server.shutdown().await;
        std::fs::remove_dir_all(&gone.dir).unwrap();
        let id = settled("adding", async || members[0].add(gone.port, true).await).await;
        let joined = join(&gone.dir, &gone.name, gone.port, &members).await.unwrap();
        settled("promoting", async || members[0].promote(id).await).await;
        members.push(joined);
        published(&members).await;
        until("it votes", async || !members[2].client().last_status().is_learner).await;
        put(&members[2].client(), "round", &round.to_string()).await;
        done.store(true, Ordering::Relaxed);
        for writer in writers {
            acknowledged.extend(writer.await.unwrap());
        }
        done.store(false, Ordering::Relaxed);
    }
    assert!(acknowledged.len() > 30, "{}", acknowledged.len());
    for member in &members {
        let client = member.client();
        for key in &acknowledged {
            assert_eq!(value(&client, key).await.as_deref(), Some("x"), "{key} at {}", member.name);
        }
    }
    let mut hashes = Vec::new();
    let revision = members[0].client().revision();
    for member in &members {
        value(&member.client(), "round").await;
        hashes.push(member.client().hash_kv(revision).await.unwrap().hash);
    }
    assert!(hashes.iter().all(|hash| *hash == hashes[0]), "{hashes:?}");
    stop(members).await;
}

/// etcdctl of the reference release; `None` where there need not be one.
fn etcdctl() -> Option<PathBuf> {
    let Some(dir) = std::env::var_os("QUORATE_REFERENCE_DIR") else {
        assert!(std::env::var("CI").as_deref() != Ok("true"), "QUORATE_REFERENCE_DIR must be set when CI=true");
        println!("skipped: QUORATE_REFERENCE_DIR is not set");
        return None;
    };
    Some(PathBuf::from(dir).join("etcdctl"))
}

/// The commands that are about all members, as an operator gives them.
#[tokio::test(flavor = "multi_thread")]
async fn etcdctl_sees_and_changes_the_whole_cluster() {
    let Some(etcdctl) = etcdctl() else { return };
    let dir = tempfile::tempdir().unwrap();
    let mut members = three(dir.path()).await;
    let at = |member: &One| format!("http://{}", member.server.client_addrs()[0]);
    // What it prints, and what it complains of.
    let run = |member: &One, words: &str| {
        let mut command = std::process::Command::new(&etcdctl);
        let out = command.arg(format!("--endpoints={}", at(member))).args(words.split(' ')).output().unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        (out.status.success(), text(&out.stdout), text(&out.stderr))
    };
    let works = |member: &One, words: &str| {
        let (success, stdout, stderr) = run(member, words);
        assert!(success, "{words}: {stdout}{stderr}");
        stdout
    };
    put(&members[0].client(), "key", "value").await;
    let leads = leader(&members).await;
    let (id, follower) = (members[leads].id(), (leads + 1) % 3);

    let listed = works(&members[follower], "member list");
    let told = works(&members[follower], "endpoint status --cluster");
    assert_eq!((listed.lines().count(), told.lines().count()), (3, 3), "{listed}{told}");
    for member in &members {
        let line = format!("{:x}, started, {}, {}, {}, false", member.id(), member.name, url(member.port), at(member));
        assert!(listed.lines().any(|told| told == line), "{line}: {listed}");
        let line = told.lines().find(|line| line.starts_with(&format!("{}, {:x}, ", at(member), member.id()))).unwrap();
        // Whether it leads, and whether it is a learner.
        let flags: Vec<&str> = line.split(", ").skip(4).take(2).collect();
        assert_eq!(flags, [if member.id() == id { "true" } else { "false" }, "false"], "{line}");
    }
    assert_eq!(works(&members[0], "member list -w table").lines().count(), 7);
    assert_eq!(works(&members[0], "member list -w json").matches("\"clientURLs\"").count(), 3);
    assert_eq!(works(&members[0], "endpoint health --cluster").matches("is healthy").count(), 3);
    let hashes = works(&members[0], "endpoint hashkv --cluster");
    let hashes: Vec<_> = hashes.lines().map(|line| line.split(", ").nth(1)).collect();
    assert!(hashes.len() == 3 && hashes.iter().all(|hash| *hash == hashes[0]), "{hashes:?}");

    let moved = works(&members[leads], &format!("move-leader {:x}", members[follower].id()));
    assert_eq!(moved.trim(), format!("Leadership transferred from {id:x} to {:x}", members[follower].id()));

    let port = free_port();
    settled("healthy", async || match members[0].add(members[1].port, true).await {
        Err(err) if (err.code(), err.message()) == etcd::URL_EXISTS => Ok(()),
        other => other.map(drop),
    })
    .await;
    let added = works(&members[0], &format!("member add d --learner --peer-urls={}", url(port)));
    assert!(added.contains("ETCD_INITIAL_CLUSTER_STATE=\"existing\""), "{added}");
    let learner = join(&dir.path().join("d"), "d", port, &members).await.unwrap();
    let promote = format!("member promote {:x}", learner.id());
    until("promoted", async || run(&members[1], &promote).0).await;
    assert!(run(&members[1], &promote).2.contains(&format!("Error: {}", etcd::NOT_LEARNER.1)));
    works(&members[2], &format!("member update {:x} --peer-urls={},http://127.0.0.1:{}", learner.id(), url(port), self::free_port()));
    until("removed", async || run(&members[0], &format!("member remove {:x}", learner.id())).0).await;
    assert_eq!(works(&members[1], "member list").lines().count(), 3);
    let stopped = tokio::time::timeout(PATIENCE, learner.server.stopped()).await.unwrap();
    assert_eq!(stopped.unwrap_err().to_string(), etcd::REMOVED);
    let _ = learner.server.shutdown().await;
    stop(std::mem::take(&mut members)).await;
}
