//! What a node does by itself: it follows Raft, revokes what has expired, watches the space, compacts if so configured, and lets the log
//! be cut off below what is durable.

use super::*;
use crate::proto::internal::{LeaseCheckpoints, LeaseExpiry};

impl Node {
    /// Keeps term and leader at hand, and the lessor in its role.
    pub(super) async fn follow_raft(self: Arc<Self>) {
        let mut metrics = self.raft.metrics();
        // The term for which the lessor is in charge.
        let mut led = None;
        let mut noted = None;
        let mut removed = false;
        loop {
            {
                let now = metrics.borrow_and_update();
                if let Err(fatal) = &now.running_state {
                    let text = fatal.to_string();
                    drop(now);
                    let err = self.wal.failed().unwrap_or(Error::Failed(text));
                    self.fail(err);
                    return;
                }
                if noted.as_ref() != Some(now.membership_config.log_id()) {
                    noted = Some(*now.membership_config.log_id());
                    self.follow_membership(now.membership_config.membership());
                }
                removed = removed || self.stop_if_removed();
                self.term.store(now.current_term, Ordering::Relaxed);
                let leader = now.current_leader.unwrap_or(0);
                if leader != self.leader.swap(leader, Ordering::Relaxed) {
                    self.leader_changed.notify_waiters();
                    if leader != 0 {
                        self.counters().leader_changes_seen.inc();
                    }
                }
                let membership = now.membership_config.membership();
                let only = membership.voter_ids().eq([self.identity.member_id]);
                let leader = now.state == openraft::ServerState::Leader;
                // A leader may read by itself once an entry of its own term was applied.
                let settled = now.last_applied.is_some_and(|applied| *applied.leader_id == now.current_term);
                let growing = self.growing.load(Ordering::Acquire) > 0;
                self.alone.store(only && leader && settled && !growing, Ordering::Release);
                if self.growing.load(Ordering::Acquire) > 0 {
                    // It has begun since it was looked at, on another thread.
                    self.alone.store(false, Ordering::Release);
                }
                let leads = (leader && (settled || led == Some(now.current_term))).then_some(now.current_term);
                if leads != led {
                    let mut lessor = lock(&self.machine.lessor);
                    match leads {
                        // Also of a term after one's own, with others' between that were not seen here: they may have renewed leases.
                        Some(term) => {
                            lessor.promote(self.machine.now(), self.options.election_timeout);
                            self.lease_term.store(term, Ordering::Relaxed);
                            self.machine.leases_changed.notify_one();
                        }
                        None => lessor.demote(),
                    }
                    led = leads;
                }
            }
            self.heed_corruption();
            if metrics.changed().await.is_err() {
                // Whoever stops this member has ended this task before.
                self.fail(Error::Failed("the Raft of this member has ended by itself".into()));
                return;
            }
        }
    }

    /// Counts the heartbeats that went out late: all that this member does is done on one thread, and when a tick on it comes too late, so
    /// did the heartbeats.
    pub(super) async fn watch_heartbeats(self: Arc<Self>) {
        let every = self.options.heartbeat;
        loop {
            if !self.is_leader() || !self.has_peers() {
                // It sends none.
                tokio::time::sleep(WATCHDOG_INTERVAL).await;
                continue;
            }
            let last = Instant::now();
            tokio::time::sleep(every).await;
            // As in etcd: one that is late by more than its own interval.
            if last.elapsed() > 2 * every {
                let followers = self.raft.metrics().borrow_watched().membership_config.membership().nodes().count().saturating_sub(1);
                self.counters().heartbeat_send_failures.add(followers as u64);
            }
        }
    }

    /// Returns when this member can serve: it knows a leader, and has applied what the log held. One that has peers does not wait for
    /// them, for they may not have been started yet: until a quorum is there, requests wait. Nor does one that joins,
    /// which is called from outside.
    pub async fn ready(&self) -> Result<()> {
        let mut health = self.health();
        loop {
            if self.alone.load(Ordering::Acquire) || self.has_peers() || self.identity.joined {
                return Ok(());
            }
            tokio::select! {
                biased;
                changed = health.wait_for(|health| !matches!(health, Health::Running)) => {
                    return match changed.map(|health| health.clone()) {
                        Ok(Health::Failed(err)) => Err(err),
                        _ => Err(Error::Stopped),
                    };
                }
                () = tokio::time::sleep(Duration::from_millis(1)) => {}
            }
        }
    }

    /// Proposes to revoke what has expired, and to note what long leases have left.
    pub(super) async fn revoke_expired(self: Arc<Self>) {
        loop {
            let next = {
                let lessor = lock(&self.machine.lessor);
                lessor.next_expiry().into_iter().chain(lessor.next_checkpoint()).min()
            };
            let wait = next.map_or(Duration::from_secs(3600), |at| at.saturating_sub(self.machine.now()));
            tokio::select! {
                biased;
                () = self.machine.leases_changed.notified() => continue,
                () = tokio::time::sleep(wait) => {}
            }
            if self.is_condemned() {
                // Its leases may be wrong, too.
                tokio::time::sleep(WATCHDOG_INTERVAL).await;
                continue;
            }
            let (expired, noted, term) = {
                let mut lessor = lock(&self.machine.lessor);
                let (now, term) = (self.machine.now(), self.lease_term.load(Ordering::Relaxed));
                let expired = lessor.expired(now, REVOKE_MAX);
                let checkpoints = lessor.checkpoints_due(now);
                let mut noted = None;
                if !checkpoints.is_empty() {
                    let checkpoints = checkpoints.into_iter().map(|(id, remaining_ttl)| LeaseCheckpoint { id, remaining_ttl }).collect();
                    let op = Some(Op::LeaseCheckpoints(LeaseCheckpoints { term, checkpoints }));
                    // In the queue before anybody can renew one of these leases, whose renewal undoes this. What finds no room there is offered
                    // again after another interval.
                    noted = self.enqueue_at_once(internal::Command { id: 0, op }).ok();
                }
                (expired, noted, term)
            };
            if let Some(noted) = noted
                && let Err(err) = self.outcome_of(noted, self.deadline()).await
                && !matches!(err, Error::Apply(ApplyError::NotLeader))
            {
                tracing::warn!(error = %err, "noting what leases have left");
            }
            // Together, so that they become one entry, and thus one sync.
            // By this member in this term, or not at all: who leads by the time that a cut-off leader is heard again may have renewed them,
            // and what is still queued then may go into an entry of a term in which this member leads anew.
            let revoked = expired.into_iter().map(|id| {
                let op = Some(Op::LeaseExpiry(LeaseExpiry { id, term }));
                self.propose_here(internal::Command { id: 0, op }, self.deadline())
            });
            for result in futures_util::future::join_all(revoked).await {
                match result {
                    Ok(_) => self.counters().leases_expired.inc(),
                    Err(Error::Apply(ApplyError::LeaseNotFound | ApplyError::NotLeader)) => {}
                    // The lessor offers it again.
                    Err(err) => tracing::warn!(error = %err, "revoking an expired lease"),
                }
            }
        }
    }

    /// Takes back the quota's alarm when there is room again.
    pub(super) async fn watch_space(self: Arc<Self>) {
        let mut ticks = tokio::time::interval(WATCHDOG_INTERVAL);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            self.give_up_replaced().await;
            self.give_up_offer().await;
            self.stand_back().await;
            self.give_up_incoming().await;
            let room = self.options.quota_bytes.is_none_or(|quota| self.store().history().live_bytes() <= quota / 100 * HEAL_PERCENT);
            if !room || !self.is_leader() {
                continue;
            }
            // Whoever has raised it: they hold the same, and some may be members no more.
            for member in self.machine.raised_by_quota() {
                match self.propose_alarm(member, AlarmAction::Deactivate).await {
                    Ok(()) => tracing::info!(
                        member = %format_args!("{member:x}"),
                        "there is room within the space quota again: the NOSPACE alarm is taken back"
                    ),
                    Err(err) => tracing::warn!(error = %err, "taking back the NOSPACE alarm"),
                }
            }
        }
    }

    /// Compacts old revisions, if the configuration says so.
    pub(super) async fn compact_by_itself(self: Arc<Self>, auto: AutoCompaction) {
        let (every, keep) = match auto {
            // As often as etcd: by revision every five minutes, by time every tenth of it, at most hourly.
            AutoCompaction::Revision(revisions) => (Duration::from_secs(300), Some(revisions)),
            AutoCompaction::Periodic(period) => (period.min(Duration::from_secs(3600)) / 10, None),
        };
        let mut seen: std::collections::VecDeque<(Instant, i64)> = std::collections::VecDeque::new();
        loop {
            let now = Instant::now();
            let newest = self.store().revision();
            let upto = match (&auto, keep) {
                (_, Some(revisions)) => newest.saturating_sub(revisions),
                (AutoCompaction::Periodic(period), None) => {
                    seen.push_back((now, newest));
                    let mut upto = 0;
                    while let Some(&(at, revision)) = seen.front()
                        && now.duration_since(at) >= *period
                    {
                        upto = revision;
                        seen.pop_front();
                    }
                    upto
                }
                _ => 0,
            };
            if upto > 0 && upto > self.store().revisions().1 && self.is_leader() {
                match self.compact(CompactionRequest { revision: upto, physical: false }).await {
                    Ok(_) => tracing::info!(revision = upto, "compacted by itself"),
                    Err(err) => tracing::warn!(revision = upto, error = %err, "compacting by itself"),
                }
            }
            tokio::time::sleep(every.max(Duration::from_millis(100))).await;
        }
    }

    /// Has openraft cut the log off below what is durable, as that moves. While a member is sent a snapshot, and somewhat longer, nothing
    /// is cut off: what is written meanwhile it will want from the log. Otherwise, if there are other members, as much is kept for those
    /// who lag as the configuration says, and [`LOG_LAG_BYTES`] allow; who lags more is sent a snapshot.
    pub async fn purge_log(self: Arc<Self>, mut durable: watch::Receiver<u64>) {
        let mut keep = self.options.catchup_entries;
        while durable.changed().await.is_ok() {
            while self.machine.sendings.need_log() && !self.wal.space_low() && self.wal.metrics().disk_bytes < LOG_KEPT_BYTES {
                tokio::time::sleep(WATCHDOG_INTERVAL).await;
            }
            let index = *durable.borrow_and_update();
            tracing::debug!(index, "the state is durable, the log before it may go");
            if let Err(err) = self.raft.trigger().snapshot().await {
                tracing::warn!(error = %err, "noting the durable state");
                continue;
            }
            // What is not noted yet is not cut off: then the rest goes with the next.
            let wait = self.raft.wait(Some(WATCHDOG_INTERVAL));
            let _ = wait.metrics(|now| now.snapshot.is_some_and(|id| id.index >= index), "the durable state is noted").await;
            keep = self.log_to_keep(keep);
            if index > keep
                && let Err(err) = self.raft.trigger().purge_log(index - keep).await
            {
                tracing::warn!(error = %err, "cutting off the log");
            }
        }
    }

    /// How many entries below what is durable are kept for members that lag, when as many were kept until now.
    fn log_to_keep(&self, until_now: u64) -> u64 {
        let most = if self.has_peers() { self.options.catchup_entries } else { 0 };
        if self.wal.space_low() {
            0
        } else if self.wal.metrics().disk_bytes > LOG_LAG_BYTES {
            // Entries differ in size by much: as many as fit are found by halving, and by doubling while there is room.
            until_now.min(most) / 2
        } else {
            until_now.saturating_mul(2).saturating_add(1).min(most)
        }
    }

    pub fn spawn_purge(self: &Arc<Self>, durable: watch::Receiver<u64>) {
        self.spawn(self.clone().purge_log(durable));
    }
}
