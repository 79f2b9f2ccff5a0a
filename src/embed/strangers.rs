//! Nodes of another cluster at the entries of JOIN: a node that belongs to a cluster says so when it meets them, and changes nothing.
//!
//! Two clusters with one list are a mistake that people have to mend: one was restored while the other still runs, or the lists were
//! different once. Neither can tell which of the two is meant. So each node looks at the entries now and then, whatever its role, warns in
//! the log, and lists them in its [health](super::Node::health_json) for as long as they answer:
//!
//! ```text
//! "strangers": [{ "address": "http://10.0.0.2:5707", "cluster": "30c2..." }]
//! ```

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;
use tokio::time::{Instant, MissedTickBehavior};

use super::founding::agree::{Answer, Ask};
use super::founding::drive::{Caller, Driver, Progress};
use super::health::Report;

/// How often the entries are asked.
const LOOK: Duration = Duration::from_secs(10);

/// How often the log is told of the same one.
const WARN_INTERVAL: Duration = Duration::from_secs(600);

/// Somebody of another cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Stranger {
    /// The peer URL at which it answers.
    pub address: String,
    pub cluster: u128,
}

impl Stranger {
    pub fn to_json(&self) -> serde_json::Value {
        serde_json::json!({ "address": self.address, "cluster": format!("{:032x}", self.cluster) })
    }
}

/// Looks until it is dropped. `join` are the URLs of the listed nodes. Without a driver there is nobody to look for.
pub(super) async fn watch(driver: Option<&Driver>, join: &[String], report: &Arc<Report>) {
    let Some(driver) = driver else { return std::future::pending().await };
    let own = &driver.me().peer_url;
    let mut callers: Vec<Caller> = join.iter().filter(|url| *url != own).map(|url| driver.caller(url.clone())).collect();
    let mut told = Told::default();
    let mut looks = tokio::time::interval(LOOK);
    looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        looks.tick().await;
        let Progress::Bound(_, known) = driver.progress().borrow().clone() else { continue };
        let ours = known.decision.cluster;
        let answers = join_all(callers.iter_mut().map(|caller| async move {
            let answer = caller.ask(None, &Ask::Hello).await.ok()?;
            match answer {
                Answer::Bound { who, known } if who != driver.node() && known.decision.cluster != ours => {
                    Some(Stranger { address: caller.url().to_owned(), cluster: known.decision.cluster })
                }
                _ => None,
            }
        }));
        let strangers: Vec<Stranger> = answers.await.into_iter().flatten().collect();
        for Stranger { address, cluster } in told.due(&strangers, Instant::now()) {
            tracing::warn!(
                %address, ours = %format_args!("{ours:032x}"), theirs = %format_args!("{cluster:032x}"),
                "a node of another cluster is at an entry of JOIN; nothing is changed: take it out of the list, or have it join without its \
                 directory"
            );
        }
        report.set(|facts| facts.strangers = strangers);
    }
}

/// Of whom the log was told, and when. There are no more of them than entries in the list.
#[derive(Default)]
struct Told(BTreeMap<(String, u128), Instant>);

impl Told {
    /// Those that it is to be told of now.
    fn due<'a>(&mut self, strangers: &'a [Stranger], now: Instant) -> Vec<&'a Stranger> {
        self.0.retain(|_, at| now.saturating_duration_since(*at) < WARN_INTERVAL);
        let due = strangers.iter().filter(|stranger| !self.0.contains_key(&(stranger.address.clone(), stranger.cluster)));
        let due: Vec<&Stranger> = due.collect();
        self.0.extend(due.iter().map(|stranger| ((stranger.address.clone(), stranger.cluster), now)));
        due
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stranger_is_told_of_once_in_a_while() {
        let one = |address: &str, cluster| Stranger { address: address.into(), cluster };
        let (a, b, c) = (one("a", 7), one("b", 7), one("a", 8));
        let (mut told, now) = (Told::default(), Instant::now());
        assert_eq!(told.due(&[a.clone(), b.clone()], now), [&a, &b]);
        assert!(told.due(&[a.clone(), b.clone()], now + WARN_INTERVAL / 2).is_empty());
        assert_eq!(told.due(&[c.clone(), b.clone()], now + WARN_INTERVAL / 2), [&c], "there is another one now");
        assert_eq!(told.due(&[a.clone(), b.clone()], now + WARN_INTERVAL), [&a, &b]);
        assert_eq!(a.to_json()["cluster"], "00000000000000000000000000000007");
    }
}
