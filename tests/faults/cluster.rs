//! Three members as processes, and what befalls them.

use std::io::Write;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering::SeqCst};
use std::time::{Duration, Instant};

use quorate::storage::wal;
use rand::prelude::*;
use rand::rngs::StdRng;
use rustix::process::Signal;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::checkers::history::Request;
use crate::disk::PowerDisk;
use crate::links::{Links, MEMBERS};
use crate::load::Record;
use crate::member::{Home, Member, Program};
use crate::wire::Client;

/// What a cluster may take to come to something, however busy the machine. Beyond it the cluster is stuck.
const PATIENCE: Duration = Duration::from_secs(60);

/// How long one request may take in a wait that tries again.
const TRY: Duration = Duration::from_secs(3);

/// Reads sent to a paused leader shortly before it goes on.
const READS: usize = 8;

/// etcd's default, as the members have it.
pub const ELECTION_MS: u64 = 1_000;

/// A disk of its own for each member; it takes only what is written of the real one.
const DISK_BYTES: u64 = 3 << 30;

const FLAGS: &[&str] = &["--experimental-watch-progress-notify-interval=200ms"];

pub struct Cluster {
    // In the order in which they have to go.
    pub members: Vec<Member>,
    /// The members' disks, if this machine lets the test have any.
    disks: Vec<PowerDisk>,
    pub home: Home,
    pub links: Links,
    pub record: Arc<Record>,
    /// What was found wrong when there was no time to say so.
    trouble: Option<String>,
}

/// What can be done to a cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    Kill,
    KillAll,
    PauseLeader,
    PauseAny,
    Rolling,
    Isolate,
    OneWay,
    Partial,
    Slow,
    IsolateAndKill,
    PowerLoss,
    PowerLossOfAll,
    DiskStandsStill,
    FullDisk,
    Replace,
}

impl Fault {
    fn needs_disk(self) -> bool {
        matches!(self, Fault::PowerLoss | Fault::PowerLossOfAll | Fault::DiskStandsStill | Fault::FullDisk)
    }
}

const FAULTS: [(Fault, u32); 15] = [
    (Fault::Kill, 4),
    (Fault::KillAll, 2),
    (Fault::PauseLeader, 4),
    (Fault::PauseAny, 1),
    (Fault::Rolling, 1),
    (Fault::Isolate, 4),
    (Fault::OneWay, 3),
    (Fault::Partial, 2),
    (Fault::Slow, 2),
    (Fault::IsolateAndKill, 2),
    (Fault::PowerLoss, 3),
    (Fault::PowerLossOfAll, 2),
    (Fault::DiskStandsStill, 3),
    (Fault::FullDisk, 2),
    (Fault::Replace, 2),
];

impl Cluster {
    /// Starts three fresh members, who keep so many entries of the log for those who lag.
    pub async fn start(program: &Program, record: &Arc<Record>, catchup_entries: u64) -> Cluster {
        let (home, mut links) = (Home::new("faults"), Links::new().await);
        let disk = |at: usize| {
            let place = home.path().join(format!("disk-{at}"));
            std::fs::create_dir(&place).map_err(|err| err.to_string())?;
            PowerDisk::new(&place, DISK_BYTES)
        };
        let disks = (0..MEMBERS).map(disk).collect::<Result<Vec<_>, _>>().unwrap_or_else(|why| {
            println!("skipped: what befalls disks, for there are none to be had: {why}");
            assert!(!std::env::var("CI").is_ok_and(|ci| ci == "true"), "with CI=true nothing may be skipped");
            Vec::new()
        });
        let data = |at: usize, name: &str| disks.get(at).map_or_else(|| home.path().join(name), |disk| disk.mount.path.join("data"));
        let name = |at: usize| ["a", "b", "c"][at];
        let urls: Vec<String> = links.addresses.iter().map(|address| format!("http://{address}")).collect();
        let all = urls.iter().enumerate().map(|(at, url)| format!("{}={url}", name(at))).collect::<Vec<_>>().join(",");
        let members: Vec<Member> = (0..MEMBERS)
            .map(|at| {
                let own = [
                    format!("--name={}", name(at)),
                    format!("--initial-advertise-peer-urls={}", urls[at]),
                    format!("--experimental-snapshot-catchup-entries={catchup_entries}"),
                ];
                let mut flags: Vec<&str> = own.iter().map(String::as_str).collect();
                flags.extend(["--initial-cluster", &all]);
                flags.extend(FLAGS);
                Member::new(program, home.path(), &data(at, name(at)), &flags)
            })
            .collect();
        links.serve(std::array::from_fn(|at| members[at].peer_address()));
        let mut cluster = Cluster { home, members, disks, links, record: record.clone(), trouble: None };
        (0..MEMBERS).for_each(|at| cluster.spawn(at));
        cluster
    }

    pub fn urls(&self) -> [String; MEMBERS] {
        std::array::from_fn(|at| self.members[at].client_url())
    }

    /// Where the log of all starts of a member before the newest is kept.
    pub fn earlier_log(&self, at: usize) -> PathBuf {
        self.home.path().join(format!("earlier-{at}.log"))
    }

    fn spawn(&mut self, at: usize) {
        let mut earlier = std::fs::File::options().create(true).append(true).open(self.earlier_log(at)).expect("a log file");
        earlier.write_all(self.members[at].log().as_bytes()).expect("space for a log");
        self.record.starts[at].fetch_add(1, SeqCst);
        self.members[at].spawn();
        self.links.set_pid(at, self.members[at].pid().as_raw_nonzero().get() as u32);
        self.record.note(&format!("member {at} starts"));
    }

    fn kill(&mut self, at: usize) {
        self.record.note(&format!("member {at} is killed"));
        self.look_at(at);
        self.members[at].kill();
        self.links.set_pid(at, 0);
    }

    fn signal(&self, at: usize, signal: Signal) {
        self.record.note(&format!("member {at}: signal {signal:?}"));
        self.members[at].signal(signal);
    }

    /// The member that the others, or it itself, hold for the leader.
    pub async fn leader(&self, without: Option<usize>) -> Option<usize> {
        let mut ids = [0; MEMBERS];
        let mut leaders = Vec::new();
        for at in (0..MEMBERS).filter(|at| Some(*at) != without) {
            let mut client = self.members[at].client();
            if let Ok(Ok((id, leader))) = tokio::time::timeout(TRY, client.leader()).await {
                ids[at] = id;
                leaders.push(leader);
            }
        }
        leaders.iter().find_map(|leader| ids.iter().position(|id| id == leader && *id != 0))
    }

    async fn leader_or_any(&self, rng: &mut StdRng) -> usize {
        let any = rng.random_range(0..MEMBERS);
        self.leader(None).await.unwrap_or(any)
    }

    /// Does one thing to the cluster, and undoes it.
    pub async fn suffer(&mut self, rng: &mut StdRng) -> Result<(), String> {
        let weight = |(fault, weight): &(Fault, u32)| if fault.needs_disk() && self.disks.is_empty() { 0 } else { *weight };
        let (mut fault, _) = *FAULTS.choose_weighted(rng, weight).expect("not empty");
        if self.members[0].program.is_etcd && fault == Fault::FullDisk {
            // etcd ends when its disk is full.
            fault = Fault::Kill;
        }
        self.record.healed.store(u64::MAX, SeqCst);
        let any = rng.random_range(0..MEMBERS);
        let leader = if rng.random_ratio(2, 3) { self.leader_or_any(rng).await } else { any };
        let while_ms = rng.random_range(200..3 * ELECTION_MS);
        self.record.note(&format!("{fault:?}: any is {any}, the leader or any {leader}, for {while_ms} ms"));
        let pause = || tokio::time::sleep(Duration::from_millis(while_ms));
        match fault {
            Fault::Kill => {
                self.kill(leader);
                pause().await;
                self.spawn_for_good(leader, rng).await;
            }
            Fault::KillAll => self.kill_all(rng).await,
            Fault::PauseLeader => {
                self.pause_leader().await?;
            }
            Fault::PauseAny => {
                self.signal(any, Signal::STOP);
                pause().await;
                self.signal(any, Signal::CONT);
            }
            Fault::Rolling => self.restart_all().await?,
            Fault::PowerLoss => {
                self.cut_power(&[leader]).await?;
                pause().await;
                self.power_on(leader).await?;
                self.spawn_for_good(leader, rng).await;
            }
            Fault::PowerLossOfAll => {
                let mut order = [0, 1, 2];
                order.shuffle(rng);
                self.cut_power(&order).await?;
                order.shuffle(rng);
                for at in order {
                    self.power_on(at).await?;
                    tokio::time::sleep(Duration::from_millis(rng.random_range(0..400))).await;
                    self.spawn_for_good(at, rng).await;
                }
            }
            Fault::DiskStandsStill => {
                self.disk_stands_still(leader, Duration::from_millis(while_ms)).await?;
            }
            Fault::FullDisk => {
                let ballast = self.disks[leader].mount.path.join("ballast");
                self.disks[leader].fill(&ballast)?;
                self.record.note(&format!("the disk of member {leader} is full"));
                pause().await;
                std::fs::remove_file(&ballast).map_err(|err| err.to_string())?;
            }
            Fault::Replace => self.replace(any).await?,
            Fault::Isolate => {
                self.links.change(|from, to, link| link.is_cut = from == leader || to == leader);
                pause().await;
            }
            Fault::OneWay => {
                let outward = rng.random();
                self.record.note(if outward { "nothing gets out of it" } else { "nothing gets into it" });
                self.links.change(|from, to, link| link.is_cut = if outward { from == leader } else { to == leader });
                pause().await;
            }
            Fault::Partial => {
                let other = (leader + rng.random_range(1..MEMBERS)) % MEMBERS;
                self.record.note(&format!("between {leader} and {other}"));
                self.links.change(|from, to, link| link.is_cut = [(leader, other), (other, leader)].contains(&(from, to)));
                pause().await;
            }
            Fault::Slow => {
                let delay = Duration::from_millis(rng.random_range(1..300));
                let all = rng.random_ratio(1, 3);
                self.record.note(&format!("by {delay:?}, all links: {all}"));
                self.links.change(|from, to, link| link.delay = if all || from == leader || to == leader { delay } else { Duration::ZERO });
                pause().await;
            }
            Fault::IsolateAndKill => {
                self.links.change(|from, to, link| link.is_cut = from == leader || to == leader);
                let other = (leader + rng.random_range(1..MEMBERS)) % MEMBERS;
                pause().await;
                self.kill(other);
                tokio::time::sleep(Duration::from_millis(rng.random_range(0..1_000))).await;
                if rng.random() {
                    // The one that was cut off and the one that comes back are the quorum now.
                    let third = MEMBERS - leader - other;
                    self.links.change(|from, to, link| link.is_cut = from == third || to == third);
                }
                self.spawn_for_good(other, rng).await;
                tokio::time::sleep(Duration::from_millis(rng.random_range(0..2 * ELECTION_MS))).await;
            }
        }
        let reset = rng.random();
        self.record.note(&format!("healed, connections reset: {reset}"));
        self.links.heal(reset);
        self.record.healed.store(self.record.now(), SeqCst);
        Ok(())
    }

    /// Kills all, and starts them again, in any order.
    pub async fn kill_all(&mut self, rng: &mut StdRng) {
        let mut order = [0, 1, 2];
        order.shuffle(rng);
        for at in order {
            self.kill(at);
            tokio::time::sleep(Duration::from_millis(rng.random_range(0..20))).await;
        }
        order.shuffle(rng);
        for at in order {
            tokio::time::sleep(Duration::from_millis(rng.random_range(0..400))).await;
            self.spawn_for_good(at, rng).await;
        }
    }

    /// Kills all, three times, while each of them defragments as often as it can, and compacts up to a revision that all watchers have.
    pub async fn kill_busy(&mut self, compact_at: i64, rng: &mut StdRng) -> Result<(), String> {
        let defragmented = Arc::new(AtomicU32::new(0));
        let mut busy = Vec::new();
        for at in 0..MEMBERS {
            let (mut client, defragmented) = (self.client(at), defragmented.clone());
            busy.push(tokio::spawn(async move {
                loop {
                    let done = tokio::time::timeout(TRY, client.defragment()).await;
                    defragmented.fetch_add(u32::from(done.is_ok_and(|done| done.is_ok())), SeqCst);
                    let _ = tokio::time::timeout(TRY, client.compact(compact_at)).await;
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
            }));
        }
        let mut outcome = Ok(());
        for _ in 0..3 {
            // Only who can defragment is killed while it does.
            let before = defragmented.load(SeqCst);
            outcome = outcome.and(self.insist("a defragmentation", async || defragmented.load(SeqCst) > before).await);
            tokio::time::sleep(Duration::from_millis(rng.random_range(300..1_000))).await;
            self.kill_all(rng).await;
            for at in 0..MEMBERS {
                outcome = outcome.and(self.answers(at).await);
            }
        }
        busy.iter().for_each(tokio::task::JoinHandle::abort);
        outcome
    }

    /// Cuts a member off until the others have cut their logs off behind it, so that it needs a snapshot; and waits until it has got one.
    pub async fn cut_off_past_the_log(&mut self, at: usize) -> Result<(), String> {
        self.record.note(&format!("member {at} is cut off until it needs a snapshot"));
        self.links.change(|from, to, link| link.is_cut = from == at || to == at);
        if self.members[at].program.is_etcd {
            tokio::time::sleep(Duration::from_secs(20)).await;
            self.links.heal(true);
            return Ok(());
        }
        let log = |at: usize| wal::dump(self.members[at].data.join("member/wal")).map(|(log, _)| log.state);
        let end = log(at).map_err(|err| err.to_string())?.next();
        // The state is synced every few seconds, and with it the log cut off.
        let others: Vec<usize> = (0..MEMBERS).filter(|other| *other != at).collect();
        // A file that is just being removed is no log that was cut off.
        let behind = async || others.iter().all(|other| log(*other).is_ok_and(|log| log.first > end));
        self.insist("cutting the logs off", behind).await?;
        self.links.heal(true);
        self.record.note(&format!("the logs begin after entry {end}, and member {at} is back"));
        self.insist("a snapshot", async || self.received_snapshots(at).await.is_some_and(|received| received > 0)).await
    }

    /// How many snapshots a member has received since it was started.
    async fn received_snapshots(&self, at: usize) -> Option<u64> {
        let address = self.members[at].client_url().strip_prefix("http://")?.to_owned();
        let mut text = String::new();
        let read = async {
            let mut stream = tokio::net::TcpStream::connect(&address).await?;
            stream.write_all(format!("GET /metrics HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n").as_bytes()).await?;
            stream.read_to_string(&mut text).await
        };
        tokio::time::timeout(TRY, read).await.ok()?.ok()?;
        text.lines().find_map(|line| line.strip_prefix("quorate_snapshots_received_total "))?.trim().parse().ok()
    }

    /// Asks each member in turn to stop, and starts it again once it has.
    pub async fn restart_all(&mut self) -> Result<(), String> {
        for at in 0..MEMBERS {
            self.record.note(&format!("member {at} is asked to stop"));
            self.look_at(at);
            let status = self.members[at].stop().await;
            if !self.members[at].program.is_etcd && status.code() != Some(0) {
                return Err(format!("member {at}, asked to stop, ended with {status}"));
            }
            self.spawn(at);
            self.answers(at).await?;
        }
        Ok(())
    }

    /// Removes a member, wipes its data, adds it as a learner, and has it vote again.
    pub async fn replace(&mut self, at: usize) -> Result<(), String> {
        let mut client = self.client((at + 1) % MEMBERS);
        let url = format!("http://{}", self.links.addresses[at]);
        let members = async |client: &mut Client| match tokio::time::timeout(TRY, client.members()).await {
            Ok(Ok(members)) => Some(members.into_iter().find(|(_, theirs, _)| *theirs == url).map(|(id, _, learner)| (id, learner))),
            _ => None,
        };
        // What became of a try that failed is seen in the list of the members.
        self.record.note(&format!("member {at} is removed"));
        self.insist("removing a member", async || match members(&mut client).await {
            Some(None) => true,
            Some(Some((id, _))) => tokio::time::timeout(TRY, client.remove_member(id)).await.is_ok_and(|removed| removed.is_ok()),
            None => false,
        })
        .await?;
        let status = self.members[at].wait().await;
        self.record.note(&format!("it has ended with {status}"));
        if self.members[at].log().contains("panicked at") {
            return Err(format!("member {at} has panicked"));
        }
        self.links.set_pid(at, 0);
        std::fs::remove_dir_all(&self.members[at].data).map_err(|err| err.to_string())?;
        self.insist("adding a learner", async || match members(&mut client).await {
            Some(Some(_)) => true,
            Some(None) => tokio::time::timeout(TRY, client.add_learner(&url)).await.is_ok_and(|added| added.is_ok()),
            None => false,
        })
        .await?;
        self.members[at].add_flag("--initial-cluster-state=existing");
        self.spawn(at);
        self.insist("promoting the learner", async || match members(&mut client).await {
            Some(Some((_, false))) => true,
            Some(Some((id, true))) => tokio::time::timeout(TRY, client.promote_member(id)).await.is_ok_and(|promoted| promoted.is_ok()),
            _ => false,
        })
        .await?;
        self.record.note(&format!("member {at} votes again"));
        self.answers(at).await
    }

    async fn insist(&self, what: &str, mut is_done: impl AsyncFnMut() -> bool) -> Result<(), String> {
        let began = Instant::now();
        while !is_done().await {
            if began.elapsed() > PATIENCE {
                return Err(format!("{what}: not within {PATIENCE:?}"));
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        Ok(())
    }

    /// Takes the power from members, at the same time. What they had not synced is gone.
    async fn cut_power(&mut self, which: &[usize]) -> Result<(), String> {
        // Paused first: an fsync that the cut meets half-way may return success, which no program can help.
        which.iter().for_each(|at| self.signal(*at, Signal::STOP));
        tokio::time::sleep(Duration::from_millis(30)).await;
        for at in which {
            self.disks[*at].cut_power()?;
        }
        for at in which {
            self.kill(*at);
            self.disks[*at].power_off()?;
        }
        Ok(())
    }

    async fn power_on(&mut self, at: usize) -> Result<(), String> {
        self.record.note(&format!("member {at} has power again"));
        let began = Instant::now();
        loop {
            self.disks[at].power_on()?;
            // The kernel may not be done with the file system as it was, and give that back.
            let probe = self.disks[at].mount.path.join("probe");
            match std::fs::write(&probe, "x").and_then(|()| std::fs::remove_file(&probe)) {
                Ok(()) => return Ok(()),
                Err(err) if began.elapsed() > PATIENCE => return Err(format!("{}: {err}", probe.display())),
                Err(_) => self.disks[at].power_off()?,
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    /// Has a member's disk stand still for a while, and until somebody else leads. Returns how long that took; None without disks.
    pub async fn disk_stands_still(&self, at: usize, for_a_while: Duration) -> Result<Option<Duration>, String> {
        let Some(disk) = self.disks.get(at) else { return Ok(None) };
        let still = disk.stand_still()?;
        let began = Instant::now();
        self.record.note(&format!("the disk of member {at} stands still"));
        let mut led = Ok(());
        // etcd's leader goes on leading.
        while !self.members[at].program.is_etcd && self.leader(Some(at)).await.is_none_or(|leader| leader == at) {
            if began.elapsed() > PATIENCE {
                led = Err(format!("member {at} still leads, and its disk stands still"));
                break;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let took = began.elapsed();
        tokio::time::sleep(for_a_while.saturating_sub(took)).await;
        drop(still);
        self.record.note("it goes on");
        led.map(|()| Some(took))
    }

    /// Who leads, once that is known.
    async fn known_leader(&self) -> Result<usize, String> {
        let began = Instant::now();
        loop {
            match self.leader(None).await {
                Some(leader) => return Ok(leader),
                None if began.elapsed() > PATIENCE => return Err("there is no leader".into()),
                None => tokio::time::sleep(Duration::from_millis(20)).await,
            }
        }
    }

    /// The same with the leader's, once it is known who leads.
    pub async fn leaders_disk_stands_still(&self) -> Result<(), String> {
        let leader = self.known_leader().await?;
        if let Some(took) = self.disk_stands_still(leader, Duration::from_millis(3 * ELECTION_MS)).await? {
            println!("the disk of the leader, member {leader}, stood still; somebody else led after {took:.1?}");
        }
        Ok(())
    }

    /// Starts a member, at times after killing it once more in the middle of its start.
    async fn spawn_for_good(&mut self, at: usize, rng: &mut StdRng) {
        if rng.random_ratio(1, 4) {
            self.spawn(at);
            tokio::time::sleep(Duration::from_millis(rng.random_range(0..200))).await;
            self.kill(at);
        }
        self.spawn(at);
    }

    /// A leader that does not know how long it slept must not answer reads by what it knew before.
    ///
    /// It is stopped until the others have a new leader and have acknowledged a write. Then it is sent reads, which wait in its sockets,
    /// and goes on: what it answers has to show that write.
    /// Returns how many reads it answered.
    pub async fn pause_leader(&mut self) -> Result<usize, String> {
        let leader = self.known_leader().await?;
        let mut warm = self.members[leader].client();
        let (number, record) = (self.record.client(), self.record.clone());
        record.send(number, leader, &mut warm, Request::get("a"), TRY).await;
        self.signal(leader, Signal::STOP);
        let began = Instant::now();
        let other = loop {
            match self.leader(Some(leader)).await {
                Some(other) => break other,
                None if began.elapsed() > PATIENCE => {
                    self.signal(leader, Signal::CONT);
                    return Err(format!("no new leader while member {leader} is paused"));
                }
                None => tokio::time::sleep(Duration::from_millis(20)).await,
            }
        };
        let mut client = self.members[other].client();
        let mut is_written = false;
        while !is_written && began.elapsed() < PATIENCE {
            (is_written, _) = record.send(number, other, &mut client, Request::put("a", record.value()), TRY).await;
        }
        let reads: Vec<_> = (0..READS)
            .map(|at| {
                // Half of them on a connection that is there, half on new ones.
                let mut client = if at % 2 == 0 { warm.clone() } else { self.members[leader].client() };
                let record = record.clone();
                tokio::spawn(async move {
                    let number = record.client();
                    record.send(number, leader, &mut client, Request::get("a"), Duration::from_secs(9)).await.0
                })
            })
            .collect();
        tokio::time::sleep(Duration::from_millis(20)).await;
        self.signal(leader, Signal::CONT);
        let mut answered = 0;
        for read in reads {
            answered += usize::from(read.await.expect("it does not panic"));
        }
        record.note(&format!("of {READS} reads sent to the paused leader {answered} were answered"));
        if is_written { Ok(answered) } else { Err(format!("no write while member {leader} is paused")) }
    }

    /// Waits until a member takes a write and answers a linearizable read.
    pub async fn answers(&self, at: usize) -> Result<(), String> {
        let (began, mut client) = (Instant::now(), self.members[at].client());
        let number = self.record.client();
        for request in [Request::put("a", self.record.value()), Request::get("a")] {
            // Each try is another request: what became of the one before is not known.
            let again = |request: &Request| match request.mark() {
                Some(_) => Request::put("a", self.record.value()),
                None => request.clone(),
            };
            while !self.record.send(number, at, &mut client, again(&request), TRY).await.0 {
                if began.elapsed() > PATIENCE {
                    return Err(format!("member {at} does not answer {request:?}within {PATIENCE:?} after all is healed"));
                }
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
        Ok(())
    }

    fn look_at(&mut self, at: usize) {
        let member = &mut self.members[at];
        if let Some(status) = member.exited() {
            self.trouble = Some(format!("member {at} has ended by itself: {status}"));
        }
        if !member.program.is_etcd && member.log().contains("panicked at") {
            self.trouble = Some(format!("member {at} has panicked"));
        }
    }

    /// # Errors
    /// When a member has ended by itself, or has panicked.
    pub fn check_running(&mut self) -> Result<(), String> {
        (0..MEMBERS).for_each(|at| self.look_at(at));
        self.trouble.take().map_or(Ok(()), Err)
    }

    pub fn client(&self, at: usize) -> Client {
        self.members[at].client()
    }
}
