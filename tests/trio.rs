//! Three members as processes of their own, beside three real etcd members: what they answer when most of them are gone, whom they do
//! not let in, and what an operator does to them with etcdctl.
#![cfg(feature = "cli")]

mod common;

use std::time::{Duration, Instant};

use common::pb::watch_request::RequestUnion;
use common::pb::{PutRequest, RangeRequest, WatchCreateRequest, WatchRequest};
use common::trio::{PATIENCE, Trio, url};
use common::{Kind, ports::free_port};
use tonic::metadata::MetadataValue;
use tonic::{Request, Status};

/// How long etcd lets a request wait that it cannot carry out: five seconds, and twice the election timeout.
const REQUEST_LIMIT: Duration = Duration::from_secs(5 + 2);

/// What a busy machine may take besides. Less than the limit itself: who waits twice is seen.
const SLACK: Duration = Duration::from_secs(5);

/// What etcd says when the time is up, and nobody knows whether a write will be carried out. Which of them depends on what the member has
/// noticed of its leader's end, and when.
const TIMEOUTS: [&str; 3] = [
    "DeadlineExceeded: context deadline exceeded",
    "Unavailable: etcdserver: request timed out",
    "Unavailable: etcdserver: request timed out, possibly due to previous leader failure",
];

/// Only one trio is timed at once.
static ONE_AT_A_TIME: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());

/// The members under test, and those of the reference where it is at hand.
fn kinds() -> Vec<Kind> {
    let reference = common::reference();
    let subject = Kind::subject(reference.as_ref()).expect("a program to test");
    reference.map(|reference| Kind::Etcd(reference.etcd)).into_iter().chain([subject]).collect()
}

fn told(status: &Status) -> String {
    format!("{:?}: {}", status.code(), status.message())
}

/// A request of a client that wants to be refused where there is no leader.
fn with_leader<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.metadata_mut().insert("hasleader", MetadataValue::from_static("true"));
    request
}

fn put() -> PutRequest {
    PutRequest { key: "a".into(), value: "2".into(), ..Default::default() }
}

fn get(serializable: bool) -> RangeRequest {
    RangeRequest { key: "a".into(), serializable, ..Default::default() }
}

/// A stream with one watch, whose creation has been confirmed, and what keeps it open.
type Watching = (tonic::Streaming<common::pb::WatchResponse>, tokio::sync::mpsc::Sender<WatchRequest>);

async fn watch(trio: &Trio, at: usize, wants_leader: bool) -> Watching {
    let (requests, receiver) = tokio::sync::mpsc::channel(1);
    let create = WatchCreateRequest { key: "a".into(), ..Default::default() };
    requests.send(WatchRequest { request_union: Some(RequestUnion::CreateRequest(create)) }).await.unwrap();
    let stream = tokio_stream::wrappers::ReceiverStream::new(receiver);
    let request = if wants_leader { with_leader(stream) } else { Request::new(stream) };
    let mut answers = trio.clients(at).await.watch.watch(request).await.unwrap().into_inner();
    assert!(answers.message().await.unwrap().unwrap().created);
    (answers, requests)
}

/// Two of three are killed, and the one that is left is asked: what it answers, in which words, and whether in time.
async fn answers_of_one_left(kind: Kind, leads: bool) -> Vec<String> {
    let mut trio = Trio::start(kind).await;
    let mut leader = None;
    while leader.is_none() {
        for at in 0..3 {
            let (id, lead) = trio.leader(at).await;
            leader = if id == lead { Some(at) } else { leader };
        }
    }
    let at = leader.map(|leader| if leads { leader } else { (leader + 1) % 3 }).unwrap();
    let mut clients = trio.clients(at).await;
    clients.kv.put(put()).await.unwrap();
    let (mut cut, _cut) = watch(&trio, at, true).await;
    let (mut kept, _kept) = watch(&trio, at, false).await;
    for other in (0..3).filter(|other| *other != at) {
        trio.kill(common::trio::NAMES[other]);
    }
    // Who leads notices that nobody follows, and who follows that nobody leads.
    let refused = async |_: &mut Trio| clients.clone().kv.range(with_leader(get(true))).await.is_err();
    trio.until("no leader", refused).await;
    let mut answers = Vec::new();
    let mut add = |what: &str, answer: Result<(), Status>, began: Instant, limit: Duration| {
        let took = began.elapsed();
        println!("{leads}, {what}: {answer:?} after {took:.1?}");
        assert!(took < limit + SLACK, "{what}: answered after {took:.1?}: {answer:?}");
        let mut answer = answer.map_or_else(|status| told(&status), |()| "done".into());
        if ["a put", "a grant"].contains(&what) && TIMEOUTS.contains(&answer.as_str()) {
            answer = "it is not known".into();
        }
        answers.push(format!("{what}: {answer}"));
    };
    let began = Instant::now();
    let ended = tokio::time::timeout(PATIENCE, cut.message()).await.expect("it is cut off").map(|_| ());
    add("a watch that wants a leader", ended, began, PATIENCE);
    let began = Instant::now();
    let done = clients.kv.put(with_leader(put())).await.map(|_| ());
    add("a put that wants a leader", done, began, Duration::ZERO);
    let began = Instant::now();
    let done = clients.kv.range(with_leader(get(true))).await.map(|_| ());
    add("a serializable read that wants a leader", done, began, Duration::ZERO);
    let began = Instant::now();
    let done = clients.kv.range(get(true)).await.map(|_| ());
    add("a serializable read", done, began, Duration::ZERO);
    // Together: they wait for the same.
    let (mut writer, mut txns, mut leases, mut reader) = (clients.clone(), clients.clone(), clients.clone(), clients.clone());
    let began = Instant::now();
    let timed = async |answer: Result<(), Status>| (answer, Instant::now());
    let (write, txn, grant, read) = tokio::join!(
        async { timed(writer.kv.put(put()).await.map(|_| ())).await },
        async { timed(txns.kv.txn(common::pb::TxnRequest::default()).await.map(|_| ())).await },
        async { timed(leases.lease.lease_grant(common::pb::LeaseGrantRequest { id: 7, ttl: 60 }).await.map(|_| ())).await },
        async { timed(reader.kv.range(get(false)).await.map(|_| ())).await },
    );
    for (what, (answer, at)) in [("a put", write), ("a txn", txn), ("a grant", grant), ("a linearizable read", read)] {
        add(what, answer, Instant::now() - (at - began), REQUEST_LIMIT);
    }
    answers.push(format!("its leader: {}", trio.leader(at).await.1));
    // Whoever asks for no leader goes on watching.
    let still = tokio::time::timeout(Duration::from_millis(100), kept.message()).await;
    answers.push(format!("a watch: {}", if still.is_err() { "goes on" } else { "has ended" }));
    answers
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_quorum_they_answer_as_etcd_does() {
    let _one = ONE_AT_A_TIME.lock().await;
    for leads in [false, true] {
        let mut answers = Vec::new();
        for kind in kinds() {
            answers.push(answers_of_one_left(kind, leads).await);
        }
        assert!(answers.iter().all(|other| *other == answers[0]), "the one that led: {leads}; {answers:#?}");
    }
}

// ---- Strangers

/// Who has another token is another cluster, though it listens where a member did; who has another name is no member. They are refused, by
/// an error that says why, and the others go on.
#[tokio::test(flavor = "multi_thread")]
async fn who_does_not_belong_is_refused() {
    let _one = ONE_AT_A_TIME.lock().await;
    let subject = Kind::subject(common::reference().as_ref()).expect("a program to test");
    if subject.is_etcd() {
        return;
    }
    let mut trio = Trio::start(subject).await;
    let cluster = trio
        .clients(0)
        .await
        .cluster
        .member_list(common::pb::MemberListRequest::default())
        .await
        .unwrap()
        .into_inner()
        .header
        .unwrap()
        .cluster_id;
    trio.kill("c");
    let elsewhere = |trio: &Trio, name: &str| format!("--data-dir={}", trio.data_dir(name).display());
    let dir = elsewhere(&trio, "another-token");
    trio.spawn(2, &["--initial-cluster-token=another", &dir]);
    let refusal = format!("belongs to cluster {cluster:x}, not to ");
    trio.until("a refusal that is told", async |trio| trio.log("c").contains(&refusal)).await;
    for at in [0, 1] {
        let mut clients = trio.clients(at).await;
        trio.until("a write", async |_| clients.kv.put(put()).await.is_ok()).await;
    }
    // It has none of it.
    let mut stranger = trio.clients(2).await;
    let own = stranger.kv.range(get(true)).await;
    assert!(own.as_ref().is_err() || own.as_ref().is_ok_and(|own| own.get_ref().count == 0), "{own:?}");
    let refused = stranger.kv.range(with_leader(get(false))).await.unwrap_err();
    assert_eq!(told(&refused), "Unavailable: etcdserver: no leader");
    trio.kill("c");

    // As a founder under another name: somebody is known there.
    let all = format!("--initial-cluster=a={},b={},d={}", url(trio.peer_ports[0]), url(trio.peer_ports[1]), url(trio.peer_ports[2]));
    let (dir, client, peer) = (elsewhere(&trio, "another-name"), trio.client_ports[2], trio.peer_ports[2]);
    trio.spawn_other("d", client, peer, &[&all, &dir]);
    trio.until("its end", async |trio| trio.has_ended("d")).await;
    assert!(trio.log("d").contains("has already been bootstrapped"), "{}", trio.log("d"));
    // One that is not among the founders that it names.
    trio.spawn_other("e", free_port(), free_port(), &[]);
    trio.until("its end", async |trio| trio.has_ended("e")).await;
    assert!(trio.log("e").contains("it must name this member, \\\"e\\\""), "{}", trio.log("e"));
    // With its own data the member is back.
    trio.spawn(2, &[]);
    trio.until("an answer", async |trio| trio.answers(2).await).await;
}

// ---- The operator

/// The commands that are about all members, as an operator gives them.
#[tokio::test(flavor = "multi_thread")]
async fn etcdctl_sees_and_changes_three_processes() {
    let _one = ONE_AT_A_TIME.lock().await;
    let Some(reference) = common::reference() else { return };
    let subject = Kind::subject(Some(&reference)).expect("a program to test");
    let is_etcd = subject.is_etcd();
    let mut trio = Trio::start(subject).await;
    // What it prints, and what it complains of.
    let run = |url: &str, words: &str| {
        let mut command = std::process::Command::new(&reference.etcdctl);
        let out = command.arg(format!("--endpoints={url}")).args(words.split(' ')).output().unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        (out.status.success(), text(&out.stdout), text(&out.stderr))
    };
    let works = |url: &str, words: &str| {
        let (success, stdout, stderr) = run(url, words);
        assert!(success, "{words}: {stdout}{stderr}");
        stdout
    };
    let refused = |url: &str, words: &str, why: &str| {
        let (success, _, stderr) = run(url, words);
        !success && stderr.contains(&format!("Error: {why}"))
    };
    let urls = [trio.url(0), trio.url(1), trio.url(2)];
    works(&urls[0], "put key value");
    trio.until("all are published", async |_| works(&urls[0], "member list").matches(", started, ").count() == 3).await;
    for url in &urls {
        assert_eq!(works(url, "member list -w table").lines().count(), 7);
        assert_eq!(works(url, "member list -w json").matches("\"clientURLs\"").count(), 3);
        assert_eq!(works(url, "endpoint health --cluster").matches("is healthy").count(), 3);
        let statuses = works(url, "endpoint status --cluster");
        assert_eq!((statuses.lines().count(), statuses.matches(", true, false, ").count()), (3, 1), "{statuses}");
        let hashes = works(url, "endpoint hashkv --cluster");
        let hashes: Vec<_> = hashes.lines().map(|line| line.split(", ").nth(1)).collect();
        assert!(hashes.len() == 3 && hashes.iter().all(|hash| *hash == hashes[0]), "{hashes:?}");
    }
    // Whoever leads hands over, to the next one; unless it has changed meanwhile.
    trio.until("a lead that is moved", async |trio| {
        let ids = [trio.leader(0).await, trio.leader(1).await, trio.leader(2).await];
        let Some(leads) = ids.iter().position(|(id, leader)| id == leader) else { return false };
        let (from, to) = (ids[leads].0, ids[(leads + 1) % 3].0);
        let (_, moved, _) = run(&urls[leads], &format!("move-leader {to:x}"));
        moved.trim() == format!("Leadership transferred from {from:x} to {to:x}")
    })
    .await;

    // A fourth that votes.
    let (client, peer) = (free_port(), free_port());
    let mut added = String::new();
    let add = format!("member add d --peer-urls={}", url(peer));
    trio.until("an added voter", async |_| {
        let (success, stdout, _) = run(&urls[1], &add);
        added = stdout;
        success
    })
    .await;
    let id = added.split_whitespace().nth(1).unwrap().to_owned();
    let cluster = added.lines().find_map(|line| line.strip_prefix("ETCD_INITIAL_CLUSTER=")).unwrap().trim_matches('"').to_owned();
    assert!(added.starts_with("Member ") && added.contains("ETCD_INITIAL_CLUSTER_STATE=\"existing\""), "{added}");
    assert!(works(&urls[2], "member list").contains(&format!("{id}, unstarted, , {}, , false", url(peer))));
    trio.spawn_other("d", client, peer, &[&format!("--initial-cluster={cluster}"), "--initial-cluster-state=existing"]);
    trio.until("four members", async |_| works(&urls[0], "member list").matches(", started, ").count() == 4).await;
    trio.until("four that are healthy", async |_| run(&urls[0], "endpoint health --cluster").1.matches("is healthy").count() == 4).await;
    assert!(works(&url(client), "get key").contains("value"));
    trio.until("it is removed", async |_| run(&urls[0], &format!("member remove {id}")).0).await;
    trio.until("its end", async |trio| is_etcd || trio.has_ended("d")).await;
    assert!(refused(&urls[0], &format!("member remove {id}"), "etcdserver: member not found"));

    // A learner that nobody starts.
    let mut added = String::new();
    let add = format!("member add e --learner --peer-urls={}", url(free_port()));
    trio.until("an added learner", async |_| {
        let (success, stdout, _) = run(&urls[0], &add);
        added = stdout;
        success
    })
    .await;
    let id = added.split_whitespace().nth(1).unwrap().to_owned();
    let another = format!("member add f --learner --peer-urls={}", url(free_port()));
    let promote = format!("member promote {id}");
    for url in &urls {
        // For want of a leader it may be something else, for a while.
        let many = "etcdserver: too many learner members in cluster";
        trio.until("too many learners", async |_| refused(url, &another, many)).await;
        let unready = "etcdserver: can only promote a learner member which is in sync with leader";
        trio.until("not ready", async |_| refused(url, &promote, unready)).await;
    }
    works(&urls[2], &format!("member remove {id}"));
    assert_eq!(works(&urls[1], "member list").lines().count(), 3);

    // With one of them down nobody joins.
    trio.kill("c");
    let add = format!("member add g --peer-urls={}", url(free_port()));
    trio.until("an unhealthy cluster", async |_| {
        let (success, stdout, stderr) = run(&urls[0], &add);
        if success {
            // The leader had not missed it yet.
            let _ = run(&urls[0], &format!("member remove {}", stdout.split_whitespace().nth(1).unwrap()));
        }
        stderr.contains("Error: etcdserver: unhealthy cluster")
    })
    .await;
    works(&urls[1], "put key again");
}
