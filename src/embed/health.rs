//! How a node is, as one report: for the host's own health page, and for a port of its own, `KV_HEALTH_PORT`.
//!
//! | path | what it says |
//! |---|---|
//! | `/livez` | whether the node answers; of a server, whether it can read what it has. It does not depend on a quorum |
//! | `/readyz` | whether the store can be used from here: of a server as etcd says it, of a client whether it could be written a moment ago |
//! | `/health` | the same, as etcd's older check |
//! | `/v1/health` | all of it, as JSON: [`Node::health_json`](super::Node::health_json). Always 200 |
//! | `/metrics`, `/version` | the server's metrics, or those of a client |
//!
//! A server answers there by the very code that answers on its client port. The port is open as soon as the node has its directory and
//! knows its own address, while it still waits for others: it lives, and is not ready, and `/readyz` and `founding` in `/v1/health` say who is
//! missing, and why. It is closed while the node stops, and between a try to start that has failed and the next one.
//!
//! # Caveats
//! - It is plain HTTP without a login, also where all else is in TLS: it tells addresses, and no keys. By default there is no such port.

use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex};

use futures_util::future::BoxFuture;
use http::HeaderValue;
use tokio::sync::watch;

use super::availability::Availability;
use super::backups::Keeper;
use super::founding::agree::Role;
use super::founding::drive::Progress;
use super::peers::Peer;
use super::replacing::Notice;
use super::strangers::Stranger;
use crate::api::http::{Checks, Http, Pages, Versions};
use crate::api::maintenance::STORAGE_VERSION;
use crate::api::serve::{App, Listener, Serving};
use crate::api::wire::{Limits, ServeOptions};
use crate::config::{Config, ETCD_VERSION};
use crate::error::{Error, Result};
use crate::lock::lock;
use crate::metrics::{Metrics, TEXT_TYPE};

/// What there is to be known of a node.
pub(super) struct Report {
    availability: watch::Receiver<Availability>,
    peers: watch::Receiver<Vec<Peer>>,
    facts: Mutex<Facts>,
}

/// What is known once the node has come up.
#[derive(Clone)]
pub(super) struct Facts {
    pub role: Option<Role>,
    pub cluster: Option<u128>,
    /// Whether the node is enlisted, once that can be said.
    pub enlisted: Option<watch::Receiver<bool>>,
    /// A server's own.
    pub checks: Option<Arc<dyn Checks>>,
    pub metrics: Arc<Metrics>,
    pub keeper: Option<Arc<Keeper>>,
    /// What is to be said of servers that are replaced by themselves.
    pub replacing: Option<Arc<Notice>>,
    /// Where founding stands, once it has begun.
    pub progress: Option<watch::Receiver<Progress>>,
    /// Nodes of another cluster at the entries of JOIN.
    pub strangers: Vec<Stranger>,
}

impl Default for Facts {
    fn default() -> Self {
        let metrics = Metrics::of_client();
        let (keeper, replacing, progress, strangers) = Default::default();
        Facts { role: None, cluster: None, enlisted: None, checks: None, metrics, keeper, replacing, progress, strangers }
    }
}

impl Report {
    pub fn new(availability: watch::Receiver<Availability>, peers: watch::Receiver<Vec<Peer>>) -> Arc<Report> {
        Arc::new(Report { availability, peers, facts: Mutex::default() })
    }

    /// The node has come up, or has come to its end.
    pub fn set(&self, change: impl FnOnce(&mut Facts)) {
        change(&mut lock(&self.facts));
    }

    pub fn facts(&self) -> Facts {
        lock(&self.facts).clone()
    }

    pub fn peers(&self) -> Vec<Peer> {
        self.peers.borrow().clone()
    }

    pub fn to_json(&self) -> serde_json::Value {
        let mut health = self.availability.borrow().to_json();
        let Facts { role, cluster, enlisted, keeper, replacing, strangers, .. } = self.facts();
        if let Some(health) = health.as_object_mut() {
            health.insert("role".into(), role.map(|role| role.to_string()).into());
            health.insert("cluster".into(), cluster.map(|cluster| format!("{cluster:032x}")).into());
            health.insert("enlisted".into(), enlisted.is_some_and(|enlisted| *enlisted.borrow()).into());
            health.insert("founding".into(), self.waiting().into());
            health.insert("strangers".into(), strangers.iter().map(Stranger::to_json).collect());
            health.insert("servers".into(), self.peers.borrow().iter().map(Peer::to_json).collect());
            health.insert("backups".into(), keeper.map_or(serde_json::Value::Null, |keeper| keeper.to_json()));
            health.insert("replacement".into(), replacing.map_or(serde_json::Value::Null, |notice| notice.to_json()));
        }
        health
    }

    /// Whom the node waits for, and why, while it belongs to no cluster.
    fn waiting(&self) -> Option<String> {
        let progress = lock(&self.facts).progress.clone()?;
        match &*progress.borrow() {
            Progress::Waiting(why) => Some(why.clone()),
            _ => None,
        }
    }

    fn checks(&self) -> Option<Arc<dyn Checks>> {
        lock(&self.facts).checks.clone()
    }
}

impl Checks for Report {
    fn alarms(&self) -> Vec<i32> {
        // A client's are a reason why it cannot write.
        self.checks().map_or(Vec::new(), |server| server.alarms())
    }

    fn has_leader(&self) -> bool {
        self.checks().is_none_or(|server| server.has_leader())
    }

    fn is_learner(&self) -> bool {
        self.checks().is_some_and(|server| server.is_learner())
    }

    fn read(&self, serializable: bool) -> BoxFuture<'_, Result<()>> {
        Box::pin(async move {
            if let Some(server) = self.checks() {
                return server.read(serializable).await;
            }
            if let Some(why) = self.waiting().filter(|_| !serializable) {
                return Err(Error::Founding(why));
            }
            let now = self.availability.borrow();
            // It has nothing to read itself: that it answers is all there is to its life.
            if serializable || now.kv_write { Ok(()) } else { Err(Error::Unavailable(now.reason.clone())) }
        })
    }
}

/// Opens the port, if there is to be one, on the runtime it is called on.
///
/// # Errors
/// `Io`, naming the address.
pub(super) async fn open(ip: IpAddr, port: Option<u16>, report: &Arc<Report>) -> Result<Option<Serving>> {
    let Some(port) = port else { return Ok(None) };
    let listener = Listener::tcp(SocketAddr::new(ip, port)).await?;
    let pages: Pages = {
        let report = report.clone();
        Arc::new(move |path| match path {
            "/v1/health" => Some((HeaderValue::from_static("application/json"), report.to_json().to_string())),
            "/metrics" => Some((HeaderValue::from_static(TEXT_TYPE), report.facts().metrics.text())),
            _ => None,
        })
    };
    let versions = Versions { server: ETCD_VERSION, cluster: STORAGE_VERSION, storage: STORAGE_VERSION };
    let http = Http::new(report.clone(), report.facts().metrics, versions).with_pages(pages);
    let defaults = Config::default();
    let options = ServeOptions { max_concurrent_streams: defaults.max_concurrent_streams, keepalive: defaults.grpc_keepalive() };
    Ok(Some(Serving::start(listener, Limits::new(options), App { grpc: None, http: Some(Arc::new(http)) })))
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use http::Method;

    use super::super::availability::Access;
    use super::*;

    /// A client lives whatever becomes of the servers, and is ready when it can write.
    #[tokio::test]
    async fn a_client_lives_without_servers() {
        let (tell, availability) = watch::channel(Availability::default());
        let report = Report::new(availability, watch::channel(Vec::new()).1);
        let versions = Versions { server: ETCD_VERSION, cluster: STORAGE_VERSION, storage: STORAGE_VERSION };
        let http = Http::new(report.clone(), Metrics::of_client(), versions);
        let get = async |path: &str| {
            let answer = http.answer(&Method::GET, &path.parse().unwrap()).await;
            (answer.status().as_u16(), String::from_utf8(answer.body().to_vec()).unwrap())
        };
        for (access, can_write, code) in [(Access::Starting, false, 503), (Access::ReadWrite, true, 200), (Access::ReadOnly, false, 503)] {
            tell.send_modify(|now| {
                now.set(SystemTime::now(), access, if can_write { "" } else { "nobody answers" }, true, can_write);
            });
            assert_eq!(get("/livez").await, (200, "ok\n".into()));
            let (ready, health) = (get("/readyz").await, get("/health").await);
            assert_eq!((ready.0, health.0), (code, code), "{access}");
            assert!(can_write || (ready.1.contains("nobody answers") && health.1.contains("nobody answers")), "{ready:?} {health:?}");
        }
        assert!(report.to_json()["role"].is_null() && report.to_json()["backups"].is_null());
        let (founding, progress) = watch::channel(Progress::Waiting("b:5707 is missing".into()));
        report.set(|facts| facts.progress = Some(progress));
        assert_eq!((report.to_json()["founding"].as_str(), get("/livez").await.0), (Some("b:5707 is missing"), 200));
        let ready = get("/readyz").await;
        assert!(ready.0 == 503 && ready.1.contains("b:5707 is missing"), "{ready:?}");
        founding.send_replace(Progress::Removed);
        assert!(report.to_json()["founding"].is_null() && report.to_json()["strangers"].as_array().is_some_and(Vec::is_empty));
        report.set(|facts| facts.role = Some(Role::Client));
        assert_eq!(report.to_json()["role"], "client");
    }
}
