//! Three members as processes, and what befalls them.

use std::io::Write;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;
use std::time::{Duration, Instant};

use rand::prelude::*;
use rand::rngs::StdRng;
use rustix::process::Signal;

use crate::checkers::history::Request;
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

/// As in the flags below. Longer than the defaults, for the machine of a test may be short of time itself.
const ELECTION_MS: u64 = 1_500;

const FLAGS: &[&str] = &[
    "--heartbeat-interval=300",
    "--election-timeout=1500",
    "--experimental-watch-progress-notify-interval=200ms",
    "--experimental-snapshot-catchup-entries=100000000",
];

pub struct Cluster {
    pub home: Home,
    pub members: Vec<Member>,
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
}

const FAULTS: [(Fault, u32); 10] = [
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
];

impl Cluster {
    /// Starts three fresh members.
    pub async fn start(program: &Program, record: &Arc<Record>) -> Cluster {
        let (home, mut links) = (Home::new("faults"), Links::new().await);
        let name = |at: usize| ["a", "b", "c"][at];
        let urls: Vec<String> = links.addresses.iter().map(|address| format!("http://{address}")).collect();
        let all = urls.iter().enumerate().map(|(at, url)| format!("{}={url}", name(at))).collect::<Vec<_>>().join(",");
        let members: Vec<Member> = (0..MEMBERS)
            .map(|at| {
                let own = [format!("--name={}", name(at)), format!("--initial-advertise-peer-urls={}", urls[at])];
                let mut flags: Vec<&str> = own.iter().map(String::as_str).collect();
                flags.extend(["--initial-cluster", &all]);
                flags.extend(FLAGS);
                Member::new(program, home.path(), &home.path().join(name(at)), &flags)
            })
            .collect();
        links.serve(std::array::from_fn(|at| members[at].peer_address()));
        let mut cluster = Cluster { home, members, links, record: record.clone(), trouble: None };
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
        let (fault, _) = *FAULTS.choose_weighted(rng, |(_, weight)| *weight).expect("not empty");
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
            Fault::KillAll => {
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
            Fault::PauseLeader => self.pause_leader().await?,
            Fault::PauseAny => {
                self.signal(any, Signal::STOP);
                pause().await;
                self.signal(any, Signal::CONT);
            }
            Fault::Rolling => {
                for at in 0..MEMBERS {
                    self.record.note(&format!("member {at} is asked to stop"));
                    let status = self.members[at].stop().await;
                    if !self.members[at].program.is_etcd && status.code() != Some(0) {
                        return Err(format!("member {at}, asked to stop, ended with {status}"));
                    }
                    self.spawn(at);
                    self.answers(at).await?;
                }
            }
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
    async fn pause_leader(&mut self) -> Result<(), String> {
        let Some(leader) = self.leader(None).await else {
            self.record.note("there is no leader to pause");
            return Ok(());
        };
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
        if is_written { Ok(()) } else { Err(format!("no write while member {leader} is paused")) }
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
