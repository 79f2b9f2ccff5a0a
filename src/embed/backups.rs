//! The backups of a node: on demand on any of them, on a schedule on the server that leads.
//!
//! All nodes may be told the same: `KV_BACKUP_STORE=/mnt/backups`, `KV_BACKUP_SCHEDULE="0 */12 * * *"`. At noon each server looks whether
//! it is the leader, and the one that is makes a backup of what it has itself. Clients make none unless they are asked.
//!
//! ```text
//! the store is shared: a network file system, or     each backup is made once, whoever leads; all nodes see all of them
//! the URL of an object store
//! each node has a directory of its own there         those that were made while it led; who led last has the newest
//! ```
//!
//! [`crate::backup`] makes them, keeps them and forgets them; here is who does so, and when.
//!
//! # Invariants
//! - A store that is away, full or slow costs a backup and a line in the log, and no more: it is not looked for when the node starts, work
//!   there takes no more than [`THREADS`] of the node's pool, which has others beside them, and a node that stops waits for it no longer
//!   than [`END`].
//! - `newestAt` and the age are those of the node's own cluster: what a lost one has left in the same store makes nothing look younger.
//!
//! # Caveats
//! - When the lead changes at the very time of a backup, it may be made twice, or be left out until the next time.
//! - A store that does not answer keeps the thread that has asked it, also beyond the end of the node: until it does.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use super::availability::unix_ms;
use crate::backup::{self, BackupConfig, BackupInfo, Backups, IsOurs, Status};
use crate::client::Client;
use crate::config::Where;
use crate::error::Result;
use crate::metrics::Counters;

/// How often the store is looked at, for what others have made there; an object store less often, where each look may cost money.
const LOOK: Duration = Duration::from_secs(30);
const LOOK_FAR: Duration = Duration::from_secs(300);

/// How long a node that stops waits for a backup to be given up. Beyond it the disk does not answer, and is left alone.
pub(super) const END: Duration = Duration::from_secs(2);

/// Threads of the node's pool that work at the store may take: one for the backup, one for a listing, and one for what comes of either.
pub(super) const THREADS: usize = 3;

/// The backups of a node.
pub(super) struct Keeper {
    backups: Backups,
    counters: Arc<Counters>,
    /// The node's cluster, as its members have the id.
    cluster: Option<u64>,
    look: Duration,
}

impl Keeper {
    /// Begins, on the runtime it is called on, for a node of this cluster. `leads` is that of a server; without, the schedule is left to
    /// others.
    ///
    /// # Errors
    /// `Config`.
    pub fn start(
        client: Client,
        config: &BackupConfig,
        counters: Arc<Counters>,
        cluster: Option<u64>,
        leads: Option<IsOurs>,
    ) -> Result<Keeper> {
        let mut config = config.clone();
        if leads.is_none() {
            config.schedule = None;
        }
        let look = if matches!(Where::read(&config.dir), Ok(Where::Store(_))) { LOOK_FAR } else { LOOK };
        let backups = Backups::shared(client, config, counters.clone(), leads.unwrap_or_else(|| Arc::new(|| false)))?;
        Ok(Keeper { backups, counters, cluster, look })
    }

    pub async fn back_up(&self) -> Result<BackupInfo> {
        self.backups.back_up().await
    }

    pub async fn status(&self) -> Result<Status> {
        let status = self.backups.status().await?;
        self.counters.backups.see(backup::newest(&status.backups, self.cluster, SystemTime::now()));
        Ok(status)
    }

    /// Looks at the store now and then, until it is dropped.
    pub async fn watch(&self) {
        let mut looks = tokio::time::interval(self.look);
        loop {
            looks.tick().await;
            if let Err(error) = self.status().await {
                tracing::debug!(%error, "the store of backups cannot be looked at");
            }
        }
    }

    /// Whether one is being made.
    pub fn is_at_work(&self) -> bool {
        self.backups.is_running()
    }

    /// Ends the schedule, and gives up what is being made.
    pub async fn close(&self) {
        self.backups.close().await;
    }

    /// How things stand, without a look at the store. Times are milliseconds since 1970.
    pub fn to_json(&self) -> serde_json::Value {
        let counted = &self.counters.backups;
        let newest = counted.newest();
        let last = self.backups.last_try().map(
            |last| serde_json::json!({ "at": unix_ms(last.at), "made": last.outcome.as_ref().ok(), "error": last.outcome.as_ref().err() }),
        );
        serde_json::json!({
            "newestAt": (newest > 0).then(|| newest.saturating_mul(1000)),
            "ageSeconds": counted.age(SystemTime::now()),
            "made": counted.made.get(),
            "failed": counted.failed.get(),
            "lastTry": last,
        })
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;
    use crate::config::Config;
    use crate::server::Server;

    /// What anything here may take. A test that waits longer has failed.
    const PATIENCE: Duration = Duration::from_secs(60);

    async fn until(what: &str, mut is_so: impl AsyncFnMut() -> bool) {
        let waiting = async {
            while !is_so().await {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        assert!(tokio::time::timeout(PATIENCE, waiting).await.is_ok(), "{what}: not within {PATIENCE:?}");
    }

    /// Only who leads makes what is scheduled; anybody makes what is asked for; and a store that is away costs that backup alone.
    #[tokio::test]
    async fn the_schedule_is_followed_by_who_leads() {
        let home = tempfile::tempdir().unwrap();
        let mut config = Config { data_dir: Some(home.path().join("data")), ..Config::default() };
        config.listen_client_urls.clear();
        config.listen_peer_urls.clear();
        let server = Server::start(config).await.unwrap();
        server.client().put("a", "1").await.unwrap();
        // It cannot be made where a file is.
        let away = home.path().join("away");
        std::fs::write(&away, "").unwrap();
        let mut wanted = BackupConfig::new(away.join("backups"));
        wanted.schedule = Some("* * * * * *".into());
        wanted.jitter = Duration::ZERO;
        let leads = Arc::new(AtomicBool::new(false));
        let asked = leads.clone();
        let counters = Arc::new(Counters::default());
        let is_ours: IsOurs = Arc::new(move || asked.load(Ordering::SeqCst));
        let keeper = Keeper::start(server.client(), &wanted, counters.clone(), Some(server.cluster_id()), Some(is_ours)).unwrap();
        keeper.back_up().await.unwrap_err();
        assert!(keeper.to_json()["lastTry"]["error"].as_str().is_some_and(|why| why.contains("away")), "{}", keeper.to_json());
        std::fs::remove_file(&away).unwrap();

        // Two are due, and left to others.
        let next = async || keeper.status().await.unwrap().next;
        for _ in 0..2 {
            let due = next().await;
            until("the next is due", async || next().await > due).await;
        }
        assert_eq!((counters.backups.made.get(), counters.backups.failed.get()), (0, 1));
        leads.store(true, Ordering::SeqCst);
        until("a scheduled backup", async || counters.backups.made.get() > 0).await;
        leads.store(false, Ordering::SeqCst);
        let made = keeper.back_up().await.unwrap();
        assert_eq!((made.revision, keeper.status().await.unwrap().backups.contains(&made)), (2, true));
        assert!(keeper.to_json()["newestAt"].as_u64().is_some_and(|at| at > 1_700_000_000_000));
        // A client, beside it, shares the store.
        let client = Keeper::start(server.client(), &wanted, Arc::default(), Some(server.cluster_id()), None).unwrap();
        assert_eq!(client.status().await.unwrap().next, None);
        client.back_up().await.unwrap();
        assert!(client.to_json()["newestAt"].is_u64());
        // Of another cluster, it sees them all, and none of them is its own.
        let stranger = Keeper::start(server.client(), &wanted, Arc::default(), Some(server.cluster_id() ^ 1), None).unwrap();
        assert_eq!(stranger.status().await.unwrap().backups, client.status().await.unwrap().backups);
        assert!(client.to_json()["newestAt"].is_u64() && stranger.to_json()["newestAt"].is_null());
        stranger.close().await;
        for keeper in [client, keeper] {
            keeper.close().await;
            assert!(keeper.back_up().await.is_err());
        }
        server.shutdown().await.unwrap();
    }
}
