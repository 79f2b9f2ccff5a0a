//! One suite for every way to a store: in this process, over the network, and to a real etcd.
//!
//! The cases are in `conformance/cases.rs` and `conformance/queues.rs`, and know nothing of where their client leads. Each runs as a test of
//! its own on each backend: `cargo test --test conformance in_process`, `... remote`, `... etcd`. The last needs the reference binaries;
//! without them each test says so and passes, unless `CI` is `true`. `remote_tls` and `etcd_tls` are the last two again, in TLS with certificates
//! on both sides, and with the etcd as one of its users. What only several members show, and what a client makes of its node's
//! end, is in `failover.rs`, with a wire between client and members that can be cut; and `etcdctl.rs` has locks and elections shared with
//! etcdctl.

mod common;

#[path = "conformance/cases.rs"]
mod cases;
#[path = "common/certificates.rs"]
#[allow(dead_code, reason = "other tests use the rest")]
mod certificates;
#[path = "conformance/etcdctl.rs"]
mod etcdctl;
#[path = "conformance/failover.rs"]
mod failover;
#[path = "conformance/gate.rs"]
mod gate;
#[path = "conformance/queues.rs"]
mod queues;
#[path = "common/secure.rs"]
#[allow(dead_code, reason = "other tests use the rest")]
mod secure;
#[path = "common/three.rs"]
#[allow(dead_code, reason = "other tests use the rest")]
mod three;

use std::time::Duration;

use common::{Kind, Process, ports};
use quorate::client::{RemoteOptions, Secret};
use quorate::{Client, Config, Server, Url};
use secure::{Pki, Users};
use tempfile::TempDir;

/// What a case may take, however busy the machine. Beyond it something waits that should not.
const PATIENCE: Duration = Duration::from_secs(120);

/// A store, and a client of it.
pub struct Store {
    pub client: Client,
    is_etcd: bool,
    held: Held,
    /// Whose certificates it and its clients have, where it speaks TLS.
    pki: Option<Pki>,
}

enum Held {
    Server(Server, TempDir),
    Process(Box<Process>),
}

pub fn remote_client(urls: &[String]) -> Client {
    remote_client_with(urls, RemoteOptions::default())
}

fn remote_client_with(urls: &[String], mut options: RemoteOptions) -> Client {
    let urls: Vec<Url> = urls.iter().map(|url| url.parse().unwrap()).collect();
    options.request_timeout = Duration::from_secs(60);
    Client::remote(urls, options).unwrap()
}

impl Store {
    async fn server(sockets: bool) -> (Server, TempDir) {
        let dir = tempfile::tempdir().unwrap();
        let mut config = Config::default();
        config.data_dir = Some(dir.path().to_owned());
        config.listen_client_urls = if sockets { vec!["http://127.0.0.1:0".parse().unwrap()] } else { vec![] };
        config.listen_peer_urls = vec![];
        (Server::start(config).await.unwrap(), dir)
    }

    /// With no listener at all: a call that wanted a socket would find none.
    async fn in_process() -> Option<Store> {
        let (server, dir) = Self::server(false).await;
        assert_eq!(server.client_addrs(), []);
        Some(Store { client: server.client(), is_etcd: false, held: Held::Server(server, dir), pki: None })
    }

    async fn remote() -> Option<Store> {
        let (server, dir) = Self::server(true).await;
        let client = remote_client(&[format!("http://{}", server.client_addrs()[0])]);
        Some(Store { client, is_etcd: false, held: Held::Server(server, dir), pki: None })
    }

    async fn etcd() -> Option<Store> {
        let reference = common::reference()?;
        let process = Process::start(Kind::Etcd(reference.etcd), &[]).await;
        Some(Store { client: remote_client(&[process.url()]), is_etcd: true, held: Held::Process(Box::new(process)), pki: None })
    }

    /// A member that asks for certificates.
    async fn remote_tls() -> Option<Store> {
        let (pki, dir) = (Pki::new(), tempfile::tempdir().unwrap());
        let server = Server::start(pki.server(dir.path())).await.unwrap();
        let client = remote_client_with(&[format!("https://{}", server.client_addrs()[0])], pki.options());
        Some(Store { client, is_etcd: false, held: Held::Server(server, dir), pki: Some(pki) })
    }

    /// An etcd that asks for certificates, and has users.
    async fn etcd_tls() -> Option<Store> {
        let (reference, pki) = (common::reference()?, Pki::new());
        let process = Process::start_with_tls(Kind::Etcd(reference.etcd), &[], Some(pki.server_files())).await;
        Users::of(&process).await.enable().await;
        let mut options = pki.options();
        (options.username, options.password) = ("root".into(), Secret::new(secure::ROOT_PASSWORD));
        let client = remote_client_with(&[process.tls_url()], options);
        Some(Store { client, is_etcd: true, held: Held::Process(Box::new(process)), pki: Some(pki) })
    }

    /// Where another client finds it.
    pub fn url(&self) -> String {
        assert!(self.pki.is_none(), "it would need certificates");
        match &self.held {
            Held::Server(server, _) => format!("http://{}", server.client_addrs()[0]),
            Held::Process(process) => process.url(),
        }
    }

    async fn run(store: Option<Store>, case: impl AsyncFnOnce(&Store)) {
        let Some(store) = store else { return };
        tokio::time::timeout(PATIENCE, case(&store)).await.expect("a case waits in vain");
        if let Held::Server(server, _dir) = store.held {
            server.shutdown().await.unwrap();
        }
    }
}

macro_rules! on_each_backend {
    ($backend:ident: $($case:ident)*) => {
        mod $backend {
            $(
                #[tokio::test]
                async fn $case() {
                    super::Store::run(super::Store::$backend().await, super::cases::$case).await;
                }
            )*
        }
    };
    ($($backend:ident),*; $cases:tt) => { $(on_each_backend! { @ $backend $cases })* };
    (@ $backend:ident { $($case:ident)* }) => { on_each_backend! { $backend: $($case)* } };
}

on_each_backend! {
    in_process, remote, etcd, remote_tls, etcd_tls;
    {
        keys_are_put_read_and_deleted
        ranges_have_all_their_options
        txns_are_whole
        swaps_have_their_conditions
        pages_and_lists_are_of_one_revision
        history_is_compacted
        a_watch_tells_past_and_present
        a_watch_filters_and_bookmarks
        a_large_revision_comes_whole
        a_watch_without_history_says_so
        a_list_is_followed
        what_makes_no_sense_is_refused
        leases_come_and_go
        a_session_lasts_and_is_lost
        locks_exclude
        elections_are_won_one_after_the_other
        a_dropped_lock_takes_no_other_with_it
        a_session_holds_a_lock_once
        a_lock_that_went_is_missed
        an_observer_may_be_dropped
        an_unread_watcher_stalls_nobody
        a_namespace_is_the_whole
        members_tell_of_themselves
        alarms_stop_writes
        backups_are_streamed
    }
}
