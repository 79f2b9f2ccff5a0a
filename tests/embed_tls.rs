//! The embedded mode in TLS: nodes in one process, over loopback, with certificates of the tests' own; and a node whose store is an etcd that
//! asks for certificates and has users.
#![cfg(feature = "tls")]

mod common;

#[path = "common/certificates.rs"]
mod certificates;
#[path = "common/nodes.rs"]
#[allow(dead_code, reason = "other tests use the rest")]
mod nodes;
#[path = "common/secure.rs"]
#[allow(dead_code, reason = "other tests use the rest")]
mod secure;

use std::path::Path;
use std::time::{Duration, Instant};

use certificates::{Ca, replace};
use common::ports::{self, free_port};
use common::{Kind, Process};
use nodes::{PATIENCE, Place, config, get, join, places, put, start, start_all, stop_all, until_available};
use quorate::client::{RemoteOptions, TlsFiles};
use quorate::embed::{Access, Availability, EmbedConfig, Node, Role, Token};
use quorate::{Client, Error, ErrorKind};
use secure::{Pki, Users};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// How long a call, or a start, is to go on trying that will come to nothing.
const IN_VAIN: Duration = Duration::from_secs(3);

/// A node in plain text, and without a token.
fn plain(dir: &Path, at: usize, places: &[Place]) -> EmbedConfig {
    let mut config = config(dir, at, places[at], join(places));
    config.token = Token::default();
    config
}

/// The files of a node: it serves and calls with the same.
fn files(pki: &Pki) -> TlsFiles {
    TlsFiles { ca: Some(pki.ca_file.clone()), cert: Some(pki.server.0.clone()), key: Some(pki.server.1.clone()) }
}

/// A node in TLS.
fn secure(pki: &Pki, dir: &Path, at: usize, places: &[Place]) -> EmbedConfig {
    let mut config = plain(dir, at, places);
    config.tls = files(pki);
    config
}

fn can_write(now: &Availability) -> bool {
    now.access == Access::ReadWrite
}

/// Tries to start until all of this is said of those that are missing: one of the words of each row.
async fn finds_nothing(mut config: EmbedConfig, wanted: &[&[&str]]) {
    config.start_timeout = IN_VAIN;
    let began = Instant::now();
    loop {
        let why = match Node::start(config.clone()).await {
            Err(err @ Error::Founding(_)) => err.to_string(),
            // A start that nobody waited for any more may still be coming to its end.
            Err(err @ (Error::Locked { .. } | Error::Io { .. })) => err.to_string(),
            other => panic!("{other:?}"),
        };
        if wanted.iter().all(|row| row.iter().any(|word| why.contains(word))) {
            return;
        }
        assert!(began.elapsed() < PATIENCE, "{why}, wanted {wanted:?}");
    }
}

/// That a client is told one of these words, and nothing comes of what it writes.
async fn refused(url: &str, mut options: RemoteOptions, wanted: &[&str]) {
    options.request_timeout = IN_VAIN;
    let began = Instant::now();
    loop {
        let client = Client::remote(vec![url.parse().unwrap()], options.clone()).unwrap();
        let err = client.put("stranger", "was here").await.unwrap_err();
        assert_eq!(err.kind(), ErrorKind::Unavailable, "{err}");
        if wanted.iter().any(|word| err.to_string().contains(word)) {
            return;
        }
        assert!(began.elapsed() < PATIENCE, "{err}, wanted one of {wanted:?}");
    }
}

fn with(files: TlsFiles) -> RemoteOptions {
    let mut options = RemoteOptions::default();
    options.tls = files;
    options
}

/// What a stranger may be told whose certificate is missing, or is of another CA.
const CERTIFICATE: &[&str] = &["ertificate", "alert"];
/// What it is told who speaks no TLS, and what of one.
const NEEDS_TLS: &[&str] = &["this node needs KV_TLS_CA, KV_TLS_CERT and KV_TLS_KEY"];
const NO_TLS: &[&str] = &["not answer in TLS", "not speak TLS"];
/// What they say who are shown a certificate of another CA.
const UNKNOWN: &[&str] = &["invalid peer certificate"];

/// Five nodes found a cluster and write, without a shared token, with certificates of another CA among peers than with clients. Those who have
/// no certificate, or another, or speak no TLS, find nothing, and nothing comes of them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn five_nodes_found_one_cluster_in_tls() {
    let (pki, peers, other) = (Pki::new(), Pki::new(), Pki::new());
    let (dir, places) = (tempfile::tempdir().unwrap(), places(5));
    let config = |at: usize| {
        let mut config = secure(&pki, dir.path(), at, &places);
        config.peer_tls = files(&peers);
        config
    };
    let nodes = start_all(&[0, 1, 2, 3, 4].map(config)).await;
    let servers: Vec<usize> = (0..5).filter(|at| nodes[*at].role() == Role::Server).collect();
    assert_eq!(servers.len(), 3);
    let cluster = nodes[0].cluster_id();
    for (at, node) in nodes.iter().enumerate() {
        assert_eq!(node.cluster_id(), cluster);
        let endpoints = node.endpoints().borrow().clone();
        assert!(endpoints.len() == 3 && endpoints.iter().all(|url| url.starts_with("https://127.0.0.1:")), "{endpoints:?}");
        until_available(node, can_write).await;
        put(node.client(), &format!("nodes/{at}"), "x").await;
    }
    let local = nodes[servers[0]].local().unwrap();
    assert!(local.get("nodes/4").await.unwrap().is_some());
    let revision = local.revision();

    // At the ports of a server, and at that of a client, where others would found with it.
    let client = (0..5).find(|at| !servers.contains(at)).unwrap();
    let url = |port: u16| format!("https://127.0.0.1:{port}");
    let peer_ports = [places[servers[0]].0, places[client].0];
    for (port, pki) in [(places[servers[0]].1, &pki), (peer_ports[0], &peers), (peer_ports[1], &peers)] {
        refused(&url(port), with(TlsFiles { cert: None, key: None, ..files(pki) }), CERTIFICATE).await;
        refused(&url(port), with(TlsFiles { ca: files(pki).ca, ..files(&other) }), CERTIFICATE).await;
        refused(&url(port), with(files(&other)), UNKNOWN).await;
        refused(&url(port).replace("https://", "http://"), RemoteOptions::default(), &["its URL is https://"]).await;
    }
    // A client's certificate opens no peer port.
    refused(&url(peer_ports[0]), with(TlsFiles { ca: files(&peers).ca, ..files(&pki) }), CERTIFICATE).await;
    for port in peer_ports {
        let mut stream = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
        stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").await.unwrap();
        let mut answer = Vec::new();
        let _ = tokio::time::timeout(PATIENCE, stream.read_to_end(&mut answer)).await.unwrap();
        // A TLS alert at most.
        assert!(answer.is_empty() || answer[0] == 21, "{answer:?}");
    }
    // And as nodes: in plain text, as somebody else, and as one who trusts the right ones.
    let place = [places.clone(), vec![(free_port(), free_port())]].concat();
    let stranger = |name: &str, tls: TlsFiles| {
        let mut config = plain(&dir.path().join(name), 5, &place);
        config.tls = tls;
        config
    };
    finds_nothing(stranger("plain", TlsFiles::default()), &[NEEDS_TLS]).await;
    finds_nothing(stranger("other", files(&other)), &[UNKNOWN]).await;
    finds_nothing(stranger("half", TlsFiles { ca: files(&peers).ca, ..files(&other) }), &[CERTIFICATE]).await;

    assert_eq!((local.revision(), local.last_members().len()), (revision, 3));
    for (at, node) in nodes.iter().enumerate() {
        assert_eq!((node.cluster_id(), node.endpoints().borrow().len()), (cluster.clone(), 3));
        until_available(node, can_write).await;
        put(node.client(), &format!("again/{at}"), "x").await;
    }
    stop_all(nodes).await;
}

/// Nodes that would found a cluster, of which one speaks no TLS and one has a certificate of another CA: they are told from such that are
/// down. With the right files they found it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn plain_and_tls_are_told_apart() {
    let (pki, other, dir, places) = (Pki::new(), Pki::new(), tempfile::tempdir().unwrap(), places(3));
    let others = [plain(dir.path(), 1, &places), secure(&other, dir.path(), 2, &places)];
    let [first, second] = others.clone().map(Node::start);
    tokio::select! {
        started = first => panic!("{started:?}"),
        started = second => panic!("{started:?}"),
        () = finds_nothing(secure(&pki, dir.path(), 0, &places), &[NO_TLS, UNKNOWN, &["1 of 3"]]) => {}
    }
    // The same from the plain one's side.
    let alone = [secure(&pki, dir.path(), 0, &places)];
    let first = start_all(&alone);
    let mut plain = others[0].clone();
    plain.data_dir = dir.path().join("plain");
    tokio::select! {
        _ = first => panic!("one of three has founded"),
        () = finds_nothing(plain, &[NEEDS_TLS]) => {}
    }
    let nodes = start_all(&[0, 1, 2].map(|at| secure(&pki, dir.path(), at, &places))).await;
    for node in &nodes {
        assert_eq!(node.role(), Role::Server);
        until_available(node, can_write).await;
    }
    stop_all(nodes).await;
}

/// Certificates that have expired are replaced before the cluster is founded, and all of them, with their CA, while it runs: no node is
/// started anew for it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn certificates_of_nodes_are_renewed_without_a_restart() {
    let (pki, dir, places) = (Pki::new(), tempfile::tempdir().unwrap(), places(4));
    let (founders, hosts) = (&places[..3], ["localhost", "127.0.0.1"]);
    let old = pki.client_files();
    pki.ca.sign_expired("a node", &hosts).write(pki.dir.path(), "server");
    let config = |at: usize| secure(&pki, dir.path(), at, founders);
    let configs = [0, 1, 2].map(config);
    let starting = tokio::spawn(async move { start_all(&configs).await });
    // Their files are read: they listen.
    for (peer, _) in founders {
        let began = Instant::now();
        while TcpStream::connect(("127.0.0.1", *peer)).await.is_err() {
            assert!(began.elapsed() < PATIENCE);
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
    assert!(!starting.is_finished());
    pki.ca.sign("a node", &hosts).write(pki.dir.path(), "server");
    let mut nodes = tokio::time::timeout(PATIENCE, starting).await.expect("they found it").unwrap();
    for node in &nodes {
        assert_eq!(node.role(), Role::Server);
        until_available(node, can_write).await;
    }
    put(nodes[0].client(), "before", "x").await;

    // The next CA is trusted beside the old one, then has its certificates, and then is the only one.
    let next = Ca::new("the next CA");
    replace(&pki.ca_file, &format!("{}{}", pki.ca.pem, next.pem));
    next.sign("a node", &hosts).write(pki.dir.path(), "server");
    replace(&pki.ca_file, &next.pem);
    // One that knows the new one alone finds the others; and one that was there before comes back to them.
    let mut late = secure(&pki, dir.path(), 3, &places);
    late.join.truncate(3);
    let late = Node::start(late).await.unwrap();
    assert_eq!((late.role(), late.cluster_id()), (Role::Client, nodes[0].cluster_id()));
    until_available(&late, can_write).await;
    put(late.client(), "with new ones", "x").await;
    nodes.pop().unwrap().shutdown().await.unwrap();
    nodes.extend(start_all(&[config(2)]).await);
    until_available(&nodes[2], can_write).await;
    put(nodes[2].client(), "and again", "x").await;
    // Certificates of the old CA are good for nothing any more.
    let old_ones = TlsFiles { ca: Some(pki.ca_file.clone()), ..old };
    for port in [places[0].0, places[0].1, places[3].0] {
        refused(&format!("https://127.0.0.1:{port}"), with(old_ones.clone()), CERTIFICATE).await;
    }
    for node in &nodes {
        until_available(node, can_write).await;
    }
    nodes.push(late);
    stop_all(nodes).await;
}

/// One server becomes three, and one of them is replaced, with certificates of another CA among peers than with clients: those that are enlisted show
/// theirs from their first call as servers on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_become_servers_in_tls() {
    let (pki, peers) = (Pki::new(), Pki::new());
    let (dir, places) = (tempfile::tempdir().unwrap(), places(4));
    let config = |at: usize| {
        let mut config = secure(&pki, dir.path(), at, &places);
        config.peer_tls = files(&peers);
        config.join.truncate(1);
        config
    };
    let place = |at: usize| format!("127.0.0.1:{}", places[at].0);
    let mut nodes = start_all(&[0, 1, 2, 3].map(config)).await;
    assert_eq!(nodes.iter().filter(|node| node.role() == Role::Server).count(), 1);
    until_available(&nodes[0], can_write).await;
    put(nodes[3].client(), "before", "1").await;
    let endpoints = async |node: &Node, servers: &[usize]| {
        let mut wanted: Vec<String> = servers.iter().map(|at| format!("https://127.0.0.1:{}", places[*at].1)).collect();
        wanted.sort();
        let mut known = node.endpoints();
        let is_so = |known: &Vec<String>| {
            let mut known = known.clone();
            known.sort();
            known == wanted
        };
        let waited = tokio::time::timeout(PATIENCE, known.wait_for(is_so)).await;
        assert!(matches!(waited, Ok(Ok(_))), "{node:?} knows {:?}, and not {wanted:?}", node.endpoints().borrow());
    };
    // Each is enlisted, and started again.
    async fn ordered(order: impl AsyncFn() -> Result<(), Error>) {
        let began = Instant::now();
        while let Err(err) = order().await {
            // Also that it was carried out, and the answer was lost.
            if matches!(&err, Error::Ineligible { reason, .. } if ["Busy", "NotAServer", "NotAClient", "AlreadyMember"].contains(&reason.as_str()))
            {
                return;
            }
            assert!(began.elapsed() < PATIENCE, "{err}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
    async fn come(nodes: &mut Vec<Node>, at: usize, config: EmbedConfig) {
        let mut enlisted = nodes[at].enlisted();
        tokio::time::timeout(PATIENCE, enlisted.wait_for(|enlisted| *enlisted)).await.unwrap().unwrap();
        nodes.remove(at).shutdown().await.unwrap();
        nodes.insert(at, start(&config).await.unwrap());
        assert_eq!(nodes[at].role(), Role::Server);
    }
    ordered(async || nodes[3].grow(&[&place(1), &place(2)]).await).await;
    come(&mut nodes, 1, config(1)).await;
    come(&mut nodes, 2, config(2)).await;
    for node in &nodes {
        endpoints(node, &[0, 1, 2]).await;
        until_available(node, can_write).await;
    }
    put(nodes[3].client(), "with three", "1").await;

    let gone = nodes.remove(1);
    gone.shutdown().await.unwrap();
    ordered(async || nodes[2].replace(&place(1), &place(3)).await).await;
    come(&mut nodes, 2, config(3)).await;
    for node in &nodes {
        endpoints(node, &[0, 2, 3]).await;
        until_available(node, can_write).await;
    }
    for key in ["before", "with three"] {
        assert!(get(nodes[2].local().unwrap(), key).await.is_some(), "{key}");
    }
    let back = start(&config(1)).await;
    if let Ok(back) = back {
        let why = tokio::time::timeout(PATIENCE, back.stopped()).await.unwrap();
        assert!(matches!(why, Err(Error::Removed)), "{why:?}");
        let _ = back.shutdown().await;
    }
    stop_all(nodes).await;
}

/// Neither is a cluster of plain text gone on with in TLS, nor the other way round.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cluster_keeps_to_what_it_was_founded_with() {
    let (pki, dir, places) = (Pki::new(), tempfile::tempdir().unwrap(), places(1));
    let (plain, tls) = (plain(&dir.path().join("plain"), 0, &places), secure(&pki, &dir.path().join("tls"), 0, &places));
    for (first, mut second, wanted) in [
        (plain.clone(), tls.clone(), "KV_TLS_CA is set, but this node's cluster was founded in plain text (http://127.0.0.1:"),
        (tls, plain, "KV_TLS_CA is not set, but this node's cluster was founded in TLS (https://127.0.0.1:"),
    ] {
        Node::start(first.clone()).await.unwrap().shutdown().await.unwrap();
        second.data_dir = first.data_dir.clone();
        let said = Node::start(second).await.unwrap_err().to_string();
        assert!(said.contains(wanted), "{said}");
        let node = Node::start(first).await.unwrap();
        until_available(&node, can_write).await;
        node.shutdown().await.unwrap();
    }
}

/// What is wrong with which file is told by the name of its variable, and nothing is touched.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wrong_file_of_a_node_is_named() {
    let (pki, dir, places) = (Pki::new(), tempfile::tempdir().unwrap(), places(1));
    let at = |name: &str| Some(pki.dir.path().join(name));
    std::fs::write(at("empty").unwrap(), "").unwrap();
    let unlike = pki.ca.sign("x", &[]).write(pki.dir.path(), "other").1;
    type Change<'a> = &'a dyn Fn(&mut EmbedConfig);
    let cases: &[(Change<'_>, &str, &str)] = &[
        (&|config| config.tls.cert = at("none"), "KV_TLS_CERT is ", "it cannot be read: No such file"),
        (&|config| config.tls.ca = at("empty"), "KV_TLS_CA is ", "there is no certificate in it"),
        (&|config| config.tls.key = config.tls.cert.clone(), "KV_TLS_KEY is ", "there is no private key in it"),
        (&|config| config.tls.key = Some(unlike.clone()), "KV_TLS_CERT is ", "the key in KV_TLS_KEY is not its own"),
        (&|config| config.peer_tls.ca = at("empty"), "KV_PEER_TLS_CA is ", "there is no certificate in it"),
        (&|config| config.peer_tls = TlsFiles { key: at("none"), ..files(&pki) }, "KV_PEER_TLS_KEY is ", "it cannot be read"),
    ];
    for (change, name, what) in cases {
        let mut config = secure(&pki, dir.path(), 0, &places);
        change(&mut config);
        let said = Node::start(config).await.unwrap_err().to_string();
        assert!(said.contains(name) && said.contains(what), "{said}, wanted {name} and {what}");
    }
    assert!(!dir.path().join("node-0").exists());
    let vars = [("KV_BACKEND", "etcd"), ("KV_ADDR", "https://127.0.0.1:1"), ("TLS_ETCD_CA", "/nowhere/at/all")];
    let config = EmbedConfig::from_vars(vars.map(|(name, value)| (name.to_owned(), value.to_owned()))).unwrap();
    let said = Node::start(config).await.unwrap_err().to_string();
    assert!(said.contains("TLS_ETCD_CA is /nowhere/at/all; it cannot be read"), "{said}");
}

/// A node whose store is an etcd: it shows its certificate, and logs in; the probe, too. When its password is another one, it says so, and
/// goes on when that is mended.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_is_a_user_of_an_etcd() {
    let Some(reference) = common::reference() else { return };
    let pki = Pki::new();
    let process = Process::start_with_tls(Kind::Etcd(reference.etcd), &[], Some(pki.server_files())).await;
    let mut users = Users::of(&process).await;
    users.enable().await;
    users.add("storage", "hunter2").await;
    users.add_role("storing", "storage/").await;
    users.grant("storage", "storing").await;
    let (url, TlsFiles { ca, cert, key, .. }) = (process.tls_url(), pki.client_files());
    let path = |file: &Option<std::path::PathBuf>| file.as_ref().unwrap().display().to_string();
    let start = async |password: &str| {
        let vars = [
            ("KV_BACKEND", "etcd".to_owned()),
            ("KV_ADDR", url.clone()),
            ("TLS_ETCD_CA", path(&ca)),
            ("ETCD_TLS_CLIENT_CERT", path(&cert)),
            ("TLS_ETCD_CLIENT_KEY", path(&key)),
            ("ETCD_USERNAME", "storage".to_owned()),
            ("ETCD_PASSWORD", password.to_owned()),
            ("ETCD_NAMESPACE", "storage/".to_owned()),
        ];
        let vars = vars.map(|(name, value)| (name.to_owned(), value));
        Node::start(EmbedConfig::from_vars(vars).unwrap()).await.unwrap()
    };
    let refused = |now: &Availability| now.access == Access::ReadOnly && !now.kv && now.reason.contains("authentication failed");
    let node = start("hunter2").await;
    assert_eq!((node.role(), node.endpoints().borrow().clone()), (Role::Client, vec![url.clone()]));
    until_available(&node, can_write).await;
    put(node.client(), "a", "x").await;

    let wrong = start("hunter3").await;
    until_available(&wrong, refused).await;
    assert!(!wrong.health_json().to_string().contains("hunter"), "{}", wrong.health_json());
    assert_eq!(wrong.client().put("a", "y").await.unwrap_err().kind(), ErrorKind::PermissionDenied);
    wrong.shutdown().await.unwrap();

    // Tokens are thrown away; then the password is another, and then the right one again.
    users.disable().await;
    users.enable().await;
    put(node.client(), "b", "x").await;
    users.change_password("storage", "hunter4").await;
    until_available(&node, refused).await;
    users.change_password("storage", "hunter2").await;
    until_available(&node, can_write).await;
    put(node.client(), "c", "x").await;
    assert_eq!(node.client().list("").await.unwrap().kvs.len(), 3);
    node.shutdown().await.unwrap();
}
