//! Who a client trusts, and who it says it is: TLS with certificates on both sides, and users, with quorate and with a real etcd.
//!
//! What a client can do once it is let in, the conformance suite shows, on both, as `remote_tls` and `etcd_tls`. Here is what becomes of
//! those who are not, and of certificates and tokens that get old.
#![cfg(feature = "tls")]

mod common;

#[path = "common/certificates.rs"]
#[allow(dead_code, reason = "other tests use the rest")]
mod certificates;
#[path = "conformance/gate.rs"]
#[allow(dead_code, reason = "other tests use the rest")]
mod gate;
#[path = "common/secure.rs"]
#[allow(dead_code, reason = "other tests use the rest")]
mod secure;

use std::time::{Duration, Instant};

use certificates::{Ca, replace};
use common::{Kind, Process};
use gate::Gate;
use quorate::client::{RemoteOptions, Secret, TlsFiles, WatchMessage, prefix_end};
use quorate::proto::etcdserverpb::WatchCreateRequest;
use quorate::{ApplyError, Client, Error, ErrorKind, Server};
use secure::{Pki, Users};

/// What anything here may take. A test that waits longer has failed.
const PATIENCE: Duration = Duration::from_secs(60);

/// How long a call is to go on trying that will come to nothing.
const IN_VAIN: Duration = Duration::from_secs(3);

fn client(url: &str, options: RemoteOptions) -> Client {
    Client::remote(vec![url.parse().unwrap()], options).unwrap()
}

/// That a write comes to nothing, for certain, and is told why in one of these words. A busy machine may say sooner that it took too long.
async fn refused(url: &str, mut options: RemoteOptions, wanted: &[&str]) {
    options.request_timeout = IN_VAIN;
    let began = Instant::now();
    loop {
        let err = client(url, options.clone()).put("stranger", "was here").await.unwrap_err();
        let said = err.to_string();
        assert!(err.kind() == ErrorKind::Unavailable && said.contains(url), "{said}");
        if wanted.iter().any(|wanted| said.contains(wanted)) {
            return;
        }
        assert!(began.elapsed() < PATIENCE, "{said}, wanted one of {wanted:?}");
    }
}

/// A member that asks for certificates: of clients that have a wrong one, or none, or do not speak TLS at all, it hears nothing; and a
/// client says nothing to a member whose certificate it does not trust. Each of them is told why.
async fn strangers(url: &str, pki: &Pki) {
    let plain = url.replace("https://", "http://");
    let with = |change: fn(&mut TlsFiles)| {
        let mut options = pki.options();
        change(&mut options.tls);
        options
    };
    let other = Pki::new();
    // Who speaks no TLS is told to, whether or not it has the files for it.
    for options in [RemoteOptions::default(), pki.options()] {
        refused(&plain, options, &["its URL is https://"]).await;
    }
    refused(url, with(|files| (files.cert, files.key) = (None, None)), &["ertificate"]).await;
    let mut options = pki.options();
    (options.tls.cert, options.tls.key) = (other.client_files().cert, other.client_files().key);
    refused(url, options, &["alert", "ertificate"]).await;
    // Nor has the client spoken with one that it does not trust, or that is somebody else.
    let mut options = pki.options();
    options.tls.ca = other.client_files().ca;
    refused(url, options, &["invalid peer certificate"]).await;
    pki.ca.sign("a server", &["elsewhere.example.org"]).write(pki.dir.path(), "server");
    let began = Instant::now();
    loop {
        let mut options = pki.options();
        options.request_timeout = IN_VAIN;
        // A server takes a moment to see that its files have changed.
        match client(url, options).get("a").await {
            Err(err) if err.to_string().contains("not valid for name") => break,
            outcome => assert!(began.elapsed() < PATIENCE, "{outcome:?}"),
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn strangers_are_told_why() {
    let (pki, dir) = (Pki::new(), tempfile::tempdir().unwrap());
    let server = Server::start(pki.server(dir.path())).await.unwrap();
    let url = format!("https://{}", server.client_addrs()[0]);
    let known = client(&url, pki.options());
    known.put("a", "1").await.unwrap();
    assert_eq!(known.endpoint().unwrap().to_string(), url);
    strangers(&url, &pki).await;
    // The connection that was open goes on; and nothing has come of the others.
    assert_eq!(known.get("a").await.unwrap().unwrap().value, "1");
    assert_eq!(server.client().revision(), 2);
    server.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn etcd_tells_strangers_why() {
    let Some(reference) = common::reference() else { return };
    let pki = Pki::new();
    let process = Process::start_with_tls(Kind::Etcd(reference.etcd), &[], Some(pki.server_files())).await;
    let known = client(&process.tls_url(), pki.options());
    known.put("a", "1").await.unwrap();
    strangers(&process.tls_url(), &pki).await;
    assert_eq!((known.get("a").await.unwrap().unwrap().value, known.revision()), ("1".into(), 2));
}

/// What is wrong with the options is told when the client is made, by its name; and TLS to one who does not speak it, by the first call.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_be_is_named() {
    let pki = Pki::new();
    let said = |change: &dyn Fn(&mut RemoteOptions)| {
        let mut options = pki.options();
        change(&mut options);
        Client::remote(vec!["https://127.0.0.1:1".parse().unwrap()], options).unwrap_err().to_string()
    };
    let at = |name: &str| pki.dir.path().join(name);
    std::fs::write(at("empty"), "").unwrap();
    let other = Ca::new("another").sign("x", &[]).write(pki.dir.path(), "other");
    type Change<'a> = &'a dyn Fn(&mut RemoteOptions);
    let cases: &[(Change<'_>, &str)] = &[
        (&|options| options.tls = TlsFiles::default(), "the endpoint https://127.0.0.1:1: it is to be spoken to in TLS"),
        (&|options| options.tls.ca = None, "tls.ca is not set"),
        (&|options| options.tls.key = None, "tls.key is not set"),
        (&|options| options.tls.cert = None, "tls.cert is not set"),
        (&|options| options.tls.ca = Some(at("none")), "it cannot be read: No such file"),
        (&|options| options.tls.ca = Some(at("empty")), "there is no certificate in it"),
        (&|options| options.tls.key = options.tls.cert.clone(), "there is no private key in it"),
        (&|options| options.tls.key = Some(other.1.clone()), "the key in tls.key is not its own"),
        (&|options| options.password = Secret::new("hunter2"), "password is set, and username is not"),
    ];
    for (change, want) in cases {
        let said = said(change);
        assert!(said.contains(want) && !said.contains("hunter2"), "{said}, wanted {want}");
    }
    let shown = format!("{:?}", user(&pki, "storage", "hunter2"));
    assert!(shown.contains("storage") && !shown.contains("hunter2"), "{shown}");

    let dir = tempfile::tempdir().unwrap();
    let mut config = pki.server(dir.path());
    config.client_transport_security = Default::default();
    config.listen_client_urls = vec!["http://127.0.0.1:0".parse().unwrap()];
    let server = Server::start(config).await.unwrap();
    refused(&format!("https://{}", server.client_addrs()[0]), pki.options(), &["not answer in TLS", "not speak TLS"]).await;
    // Nor are there users.
    let mut options = RemoteOptions::default();
    (options.username, options.password) = ("root".into(), Secret::new("hunter2"));
    let err = client(&format!("http://{}", server.client_addrs()[0]), options).get("a").await.unwrap_err();
    assert!(err.kind() == ErrorKind::Unsupported && err.to_string().contains("nobody to log in as at this server"), "{err}");
    server.shutdown().await.unwrap();
}

/// The certificates of both sides are replaced by those of another CA, while the client is in use. Each new connection shows the new ones.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_clients_certificate_is_renewed() {
    let (pki, dir) = (Pki::new(), tempfile::tempdir().unwrap());
    let server = Server::start(pki.server(dir.path())).await.unwrap();
    let mut gate = Gate::new(server.client_addrs()[0]).await;
    let mut options = pki.options();
    options.request_timeout = IN_VAIN;
    let client = client(&gate.url().replace("http://", "https://"), options);
    client.put("a", "1").await.unwrap();

    // The server has another certificate, and trusts another CA: the client knows neither, until its own files are renewed, too.
    let next = Ca::new("the next CA");
    let (ca, cert, key) = (pki.dir.path().join("next.crt"), &pki.client.0, &pki.client.1);
    replace(&ca, &next.pem);
    next.sign("a server", &["127.0.0.1"]).write(pki.dir.path(), "server");
    let renewed = next.sign("a client", &[]);
    let began = Instant::now();
    loop {
        gate.cut().await;
        gate.mend().await;
        match client.get("a").await {
            Err(err) if err.to_string().contains("invalid peer certificate") => break,
            outcome => assert!(began.elapsed() < PATIENCE, "{outcome:?}"),
        }
    }
    replace(&pki.ca_file, &next.pem);
    replace(cert, &renewed.cert);
    replace(key, &renewed.key);
    let began = Instant::now();
    while let Err(err) = client.get("a").await {
        assert!(began.elapsed() < PATIENCE, "{err}");
    }
    client.put("a", "2").await.unwrap();
    server.shutdown().await.unwrap();
}

fn user(pki: &Pki, name: &str, password: &str) -> RemoteOptions {
    let mut options = pki.options();
    (options.username, options.password) = (name.into(), Secret::new(password));
    options.request_timeout = PATIENCE;
    options
}

/// Users of an etcd: who is one is let in, to where it may go, and stays when its token gets old.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_user_logs_in() {
    let Some(reference) = common::reference() else { return };
    let pki = Pki::new();
    let process = Process::start_with_tls(Kind::Etcd(reference.etcd), &[], Some(pki.server_files())).await;
    let (url, mut users) = (process.tls_url(), Users::of(&process).await);
    // There are no users yet, so nobody has to be one.
    let early = client(&url, user(&pki, "storage", "hunter2"));
    early.put("storage/a", "1").await.unwrap();
    users.enable().await;
    users.add("storage", "hunter2").await;
    users.add_role("storing", "storage/").await;
    users.grant("storage", "storing").await;
    early.put("storage/a", "2").await.unwrap();

    let is = |err: Error, what: ApplyError| {
        assert!(matches!(&err, Error::Apply(got) if *got == what), "{err}, wanted {what}");
        assert_eq!(err.kind(), ErrorKind::PermissionDenied);
    };
    is(client(&url, user(&pki, "storage", "hunter3")).put("storage/b", "1").await.unwrap_err(), ApplyError::AuthFailed);
    is(client(&url, user(&pki, "nobody", "hunter2")).put("storage/b", "1").await.unwrap_err(), ApplyError::AuthFailed);
    is(client(&process.url(), RemoteOptions::default()).put("storage/b", "1").await.unwrap_err(), ApplyError::UserEmpty);

    let storage = client(&url, user(&pki, "storage", "hunter2"));
    assert_eq!(storage.get("storage/a").await.unwrap().unwrap().value, "2");
    is(storage.put("elsewhere", "1").await.unwrap_err(), ApplyError::PermissionDenied);
    is(storage.list("").await.unwrap_err(), ApplyError::PermissionDenied);
    let session = storage.session(60).await.unwrap();
    let lock = session.lock("storage/lock").await.unwrap();
    let watch = |prefix: &str, start_revision| {
        let range_end = prefix_end(prefix.as_bytes());
        storage.watch(WatchCreateRequest { key: prefix.to_owned().into(), range_end, start_revision, ..Default::default() }).unwrap()
    };
    let mut watcher = watch("storage/a", storage.revision() + 1);
    is(watch("elsewhere", 0).next().await.unwrap_err(), ApplyError::PermissionDenied);

    // All tokens are thrown away; and roles change, by which tokens get old. A write and a watch each meet that first.
    for round in 0..6 {
        if round % 2 == 0 {
            users.disable().await;
            users.enable().await;
        } else {
            users.add_role(&format!("another-{round}"), "x/").await;
        }
        if round < 4 {
            storage.put("storage/a", format!("round {round}")).await.unwrap();
        } else {
            let mut late = watch("storage/", 1);
            let told = tokio::time::timeout(PATIENCE, late.next()).await.unwrap().unwrap();
            assert!(matches!(told, Some(WatchMessage::Events(_))), "{told:?}");
            storage.put("storage/a", format!("round {round}")).await.unwrap();
        }
    }
    let mut told = Vec::new();
    while told.len() < 6 {
        match tokio::time::timeout(PATIENCE, watcher.next()).await.unwrap().unwrap() {
            Some(WatchMessage::Events(events)) => told.extend(events.into_iter().map(|event| event.kv.value)),
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(told, (0..6).map(|round| format!("round {round}")).collect::<Vec<_>>());
    // Many at once ask for one token.
    users.disable().await;
    users.enable().await;
    let writes = (0..32).map(|at| storage.put(format!("storage/many/{at}"), "1"));
    for outcome in futures_util::future::join_all(writes).await {
        outcome.unwrap();
    }
    assert_eq!(storage.list("storage/many/").await.unwrap().kvs.len(), 32);
    assert!(!session.is_lost());
    lock.unlock().await.unwrap();
    session.close().await.unwrap();
}
