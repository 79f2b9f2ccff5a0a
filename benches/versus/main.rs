//! Quorate and etcd, side by side: `cargo bench --bench versus -- --etcd PATH`.
//!
//! Both are started as fresh members on loopback with their data on the same disk, loaded with the same keys, and driven by the same
//! generator in turn: A, B, A, B. Each row of the comparison says how much faster B has to be (`must`) and is hoped to be (`aim`), and
//! the table says whether it is. Beside it stand the limits: what the transport and the disk can do at all.
//!
//! ```text
//! cargo bench --bench versus -- --etcd etcd                                 everything, about half an hour
//! cargo bench --bench versus -- --etcd etcd --rows put,get-64 --rounds 3    some rows
//! cargo bench --bench versus -- --etcd etcd --quick                         does it work?
//! cargo bench --bench versus -- --etcd etcd --growth                        10k to 5M keys, 1 to 100 versions
//! cargo bench --bench versus -- --endpoints-a http://10.0.0.1:2379 --endpoints-b http://10.0.0.2:2379
//! ```
//!
//! | file | what it is for |
//! |---|---|
//! | `args` | the command line |
//! | `rows` | which rows there are, and their bounds |
//! | `member` | starting, stopping and weighing servers |
//! | `wire`, `requests` | gRPC on bare HTTP/2; what is sent and what must come back |
//! | `load`, `streams` | the generator: closed loops of clients |
//! | `embedded` | the library in the process, against itself over gRPC |
//! | `pause` | latency during compaction, defragmentation, snapshot: an open load |
//! | `limits` | transport and disk by themselves |
//! | `stats`, `report`, `plot`, `machine` | counting; Markdown, JSON, SVG; facts about the machine |
//!
//! # What makes it fair, and what does not
//!
//! - Rounds alternate and ratios are taken within a round, so what disturbs the machine for minutes disturbs both.
//! - Rows that write get fresh members; rows that only read follow each other on the same ones.
//! - A faster server stores more revisions in the same time, so its later rounds run on more data. That is to its disadvantage.
//! - Server and generator share the machine; the generator's CPU per operation is in the table. The other server stands still meanwhile
//!   (SIGSTOP), if the harness has started it and it is alone: what it has put off falls into its own time, not into this one's.
//! - Flags are the same on both sides and the defaults otherwise.
//!
//! # Its own tests
//!
//! A bench target without Cargo's test harness cannot run tests, so `tests/versus.rs` takes the same files in and runs theirs. Here, where
//! Cargo sets `cfg(test)` nevertheless, the test modules are left without their tests; hence their `allow(unused)`.
#![forbid(unsafe_code)]

mod args;
mod embedded;
mod limits;
mod load;
mod machine;
mod member;
mod pause;
mod plot;
mod report;
mod requests;
mod rows;
mod stats;
mod streams;
mod wire;

use std::fs;
use std::io::IsTerminal;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use quorate::proto::etcdserverpb::{
    CompactionRequest, CompactionResponse, DeleteRangeRequest, DeleteRangeResponse, RangeRequest, RangeResponse,
};
use rustix::process::Signal;

use crate::args::{Args, Growth, USAGE};
use crate::embedded::Embedded;
use crate::load::{Round, Settings};
use crate::member::{Cluster, Program};
use crate::report::{Finding, Measured, Report, Size, count, time, whole};
use crate::requests::{COMPACT, DELETE_RANGE, PREFIX, PREFIX_END, RANGE, key};
use crate::rows::{EMBEDDED_ROWS, LIMITS, MEMORY, MEMORY_AND_START, Metric, NULL_ROWS, PAUSES, ROWS, Row, START};
use crate::wire::{Channel, Result, block_on};

/// After memory has been filled, until it is weighed: what is only there for the load may go. Go's collector runs every two minutes at least,
/// and gives pages back after that.
const MEMORY_SETTLE: Duration = Duration::from_secs(150);

/// After the keys were loaded, until bytes are counted: quorate has synced its state, etcd has committed.
const REST: Duration = Duration::from_secs(7);

/// After keys were loaded, until their number's part in the cost is looked at: the other side stands still from the first round on.
const GROWTH_SETTLE: Duration = Duration::from_secs(20);

/// After half of the keys were deleted and compacted, until the disk is looked at: space is given back in the background.
const DISK_SETTLE: Duration = Duration::from_secs(15);

/// One call that takes longer, a compaction of half of all keys say, has failed.
const PATIENCE: Duration = Duration::from_secs(600);

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let outcome = if args.first().is_some_and(|arg| arg == limits::SERVE_NOTHING) { limits::serve_nothing() } else { compare(&args) };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("versus: {error}");
            ExitCode::FAILURE
        }
    }
}

fn compare(words: &[String]) -> Result<()> {
    let Some(args) = Args::parse(words.iter().cloned(), option_env!("CARGO_BIN_EXE_quorate"))? else {
        print!("{USAGE}");
        return Ok(());
    };
    fs::create_dir_all(&args.dir)?;
    let mount = machine::mount_of(&args.dir);
    if mount.is_some_and(|mount| mount.kind == "tmpfs") {
        return Err(format!("{} is in memory, where no write is ever slow; see --dir", args.dir.display()).into());
    }
    member::end_with_signals()?;
    let mut run = Run::new(args, words)?;
    run.all()?;
    run.write()
}

/// One run of the harness.
struct Run {
    args: Args,
    settings: Settings,
    report: Report,
    began: Instant,
}

impl Run {
    fn new(args: Args, words: &[String]) -> Result<Self> {
        let measured = args.measured;
        let settings = Settings {
            keys: args.keys,
            value_bytes: args.value_bytes,
            connections: args.connections,
            threads: args.threads,
            warm: (measured / 4).min(Duration::from_millis(500)),
            measured,
        };
        let mut report = Report { facts: machine::facts(&args.dir), is_quick: args.is_quick, ..Report::default() };
        report.facts.push(("members on each side", args.members.to_string()));
        report.facts.push(("data", format!("{} keys with values of {} bytes", args.keys, args.value_bytes)));
        report.facts.push(("rounds", format!("{} of {} s, in turn", args.rounds, measured.as_secs_f64())));
        report.facts.push(("command", format!("`{}`", machine::command_line(words))));
        let mut run = Self { args, settings, report, began: Instant::now() };
        for side in [0, 1] {
            let name = run.name(side)?;
            run.report.names[side] = name;
        }
        // The same program on both sides measures the harness: every ratio should be 1.
        let [a, b] = &mut run.report.names;
        if a == b {
            a.push_str(" (A)");
            b.push_str(" (B)");
        }
        Ok(run)
    }

    /// What a side is called: by its program's first line of `--version`, or by what its member says.
    fn name(&self, side: usize) -> Result<String> {
        let given = &self.args.sides[side];
        match &given.binary {
            Some(binary) if given.endpoints.is_empty() => {
                let text = machine::version(binary)?.replace(" Version:", "");
                Ok(text.split_whitespace().collect::<Vec<_>>().join(" "))
            }
            _ => Ok(format!("{} {}", ["A", "B"][side], Cluster::join("", &given.endpoints, &[])?.version()?)),
        }
    }

    fn all(&mut self) -> Result<()> {
        if let Some(growth) = self.args.growth.clone() {
            return self.growth(&growth);
        }
        if self.args.wants(LIMITS) {
            self.limits()?;
        }
        self.rows()?;
        self.embedded()?;
        if self.args.wants(MEMORY_AND_START) {
            self.memory_and_start()?;
        }
        if self.args.wants(PAUSES) {
            self.pauses()?;
        }
        Ok(())
    }

    fn say(&self, text: &str) {
        let s = self.began.elapsed().as_secs();
        // Over what was ticked.
        let clear = if std::io::stderr().is_terminal() { "\r\x1b[K" } else { "" };
        eprintln!("{clear}[{:02}:{:02}] {text}", s / 60, s % 60);
    }

    fn say_round(&self, row: &str, round: usize, of: usize, name: &str, measured: &Round) {
        let cpu = measured.server.map_or(String::new(), |server| format!(", {}/op", time(measured.per_operation(server.cpu_us))));
        let error = measured.first_error.as_ref().map_or(String::new(), |error| format!(", {} ERRORS: {error}", measured.errors));
        let (p50, p99) = (time(measured.p50_us), time(measured.p99_us));
        let generator = time(measured.per_operation(measured.generator_cpu_us));
        let speed = count(measured.per_second());
        self.say(&format!("{row} {}/{of} {name}: {speed}/s, p50 {p50}, p99 {p99}{cpu} (generator {generator}/op){error}", round + 1));
    }

    /// Both sides, with so many keys in so many versions: fresh members, or the given ones emptied of what the harness wrote before.
    fn fresh(&self, keys: u64, versions: u64) -> Result<[Cluster; 2]> {
        Ok([self.fresh_side(0, keys, versions)?, self.fresh_side(1, keys, versions)?])
    }

    fn fresh_side(&self, side: usize, keys: u64, versions: u64) -> Result<Cluster> {
        let (name, given) = (&self.report.names[side], &self.args.sides[side]);
        let began = Instant::now();
        let cluster = if given.endpoints.is_empty() {
            let binary = given.binary.clone().ok_or("neither binary nor endpoints")?;
            let program = Program { name: name.clone(), binary, flags: given.flags.clone(), members: self.args.members };
            Cluster::start(&program, &self.args.dir)?
        } else {
            let cluster = Cluster::join(name, &given.endpoints, &given.pids)?;
            let all = DeleteRangeRequest { key: PREFIX.into(), range_end: PREFIX_END.into(), prev_kv: false };
            call::<DeleteRangeResponse>(&cluster, DELETE_RANGE, &all)?;
            cluster
        };
        self.fill(&cluster, keys, versions)?;
        self.say(&format!("{name} is up with {} keys, {}", whole(keys), time(began.elapsed().as_micros() as f64)));
        Ok(cluster)
    }

    /// Writes the keys and counts them.
    fn fill(&self, cluster: &Cluster, keys: u64, versions: u64) -> Result<()> {
        load::load(cluster, keys, versions, self.settings.value_bytes, |puts| {
            tick(&format!("{} puts", whole(puts)));
        })?;
        let range = RangeRequest { key: PREFIX.into(), range_end: PREFIX_END.into(), count_only: true, ..Default::default() };
        let counted = call::<RangeResponse>(cluster, RANGE, &range)?.count;
        if u64::try_from(counted)? != keys {
            return Err(format!("{} has {counted} keys after {keys} were written", cluster.name).into());
        }
        Ok(())
    }

    fn limits(&mut self) -> Result<()> {
        self.say("limits: transport and disk");
        let (cluster, _process) = limits::start_nothing()?;
        for row in NULL_ROWS {
            let round = load::run(&cluster, row, &self.settings)?;
            self.say_round(row.name, 0, 1, "a server that does nothing", &round);
            self.report.transport.push((*row, round));
        }
        let syncs = limits::syncs(&self.args.dir, self.settings.measured)?;
        self.say(&format!("fdatasync: {}/s, p50 {}, p99 {}", count(syncs.per_second), time(syncs.p50_us), time(syncs.p99_us)));
        self.report.syncs = Some(syncs);
        Ok(())
    }

    fn rows(&mut self) -> Result<()> {
        let wanted: Vec<&Row> = ROWS.iter().filter(|row| self.args.wants(row.name)).collect();
        let mut clusters = None;
        for (index, row) in wanted.iter().enumerate() {
            self.say(&format!("row {} of {}: {}", index + 1, wanted.len(), row.title));
            let both = match clusters.take() {
                Some(both) if row.only_reads() => both,
                _ => self.fresh(self.settings.keys, 1)?,
            };
            if row.bounds.iter().any(|bound| bound.metric == Metric::Written) {
                std::thread::sleep(REST);
            }
            let measured = self.measure(&both, row)?;
            self.report.rows.push(measured);
            clusters = row.only_reads().then_some(both);
        }
        Ok(())
    }

    fn measure(&self, clusters: &[Cluster; 2], row: &Row) -> Result<Measured> {
        let mut measured = Measured { row: *row, sides: [Vec::new(), Vec::new()] };
        for round in 0..self.args.rounds {
            for ((cluster, other), rounds) in clusters.iter().zip(clusters.iter().rev()).zip(&mut measured.sides) {
                let _still = other.still();
                let result = load::run(cluster, row, &self.settings).map_err(|error| format!("{}, {}: {error}", row.name, cluster.name))?;
                self.say_round(row.name, round, self.args.rounds, &cluster.name, &result);
                rounds.push(result);
            }
        }
        Ok(measured)
    }

    fn embedded(&mut self) -> Result<()> {
        for row in EMBEDDED_ROWS.iter().filter(|row| self.args.wants(row.name)) {
            self.say(row.title);
            let (_server, sides) = Embedded::start(&self.args.dir)?;
            self.fill(&sides[0], self.settings.keys, 1)?;
            let measured = self.measure(&sides, row)?;
            self.report.embedded.push(measured);
        }
        Ok(())
    }

    fn memory_and_start(&mut self) -> Result<()> {
        let keys = self.args.memory_keys;
        self.say(&format!("memory with {} keys, and the start on them", whole(keys)));
        let mut clusters = self.fresh(keys, 1)?;
        std::thread::sleep(MEMORY_SETTLE);
        let resident = |cluster: &Cluster| cluster.usage().map(|usage| usage.rss_bytes);
        let mut loaded: [Vec<f64>; 2] = Default::default();
        let mut restarted: [Vec<f64>; 2] = Default::default();
        let mut starts: [[Vec<f64>; 2]; 2] = Default::default();
        for (side, cluster) in clusters.iter().enumerate() {
            loaded[side].extend(resident(cluster));
        }
        for round in 0..self.args.rounds {
            for (side, cluster) in clusters.iter_mut().enumerate().filter(|(_, cluster)| cluster.is_own()) {
                for (how, signal) in [Signal::TERM, Signal::KILL].into_iter().enumerate() {
                    cluster.stop(signal)?;
                    let took = cluster.run()?.as_micros() as f64;
                    starts[how][side].push(took);
                    self.say(&format!(
                        "start {}/{} {} after {}: {}",
                        round + 1,
                        self.args.rounds,
                        cluster.name,
                        ["a stop", "a kill"][how],
                        time(took)
                    ));
                }
                restarted[side].extend(resident(cluster));
            }
        }
        let mut disk: [[Vec<f64>; 2]; 2] = Default::default();
        for (side, cluster) in clusters.iter().enumerate().filter(|(_, cluster)| cluster.is_own()) {
            disk[0][side].extend(cluster.disk_bytes());
            let half = DeleteRangeRequest { key: key(0).into(), range_end: key(keys / 2).into(), prev_kv: false };
            let deleted = call::<DeleteRangeResponse>(cluster, DELETE_RANGE, &half)?;
            let revision = deleted.header.ok_or("no header")?.revision;
            call::<CompactionResponse>(cluster, COMPACT, &CompactionRequest { revision, physical: true })?;
            std::thread::sleep(DISK_SETTLE);
            disk[1][side].extend(cluster.disk_bytes());
        }
        let ([stopped, killed], [full, halved]) = (starts, disk);
        let keys = whole(keys);
        for (title, metric, sides, bound) in [
            (format!("{keys} keys"), Metric::Memory, loaded, Some(MEMORY)),
            (format!("{keys} keys, after a restart"), Metric::Memory, restarted, None),
            (format!("{keys} keys"), Metric::StartTime, stopped, Some(START)),
            (format!("{keys} keys, after a kill"), Metric::StartTime, killed, None),
            (format!("{keys} keys"), Metric::Disk, full, None),
            (format!("half of {keys} keys deleted and compacted"), Metric::Disk, halved, None),
        ] {
            // Members that somebody else runs are not restarted.
            if sides.iter().all(Vec::is_empty) {
                continue;
            }
            self.report.findings.push(Finding { title, metric, sides, overall: None, bound, errors: 0 });
        }
        Ok(())
    }

    fn pauses(&mut self) -> Result<()> {
        let revisions = self.args.pause_revisions;
        self.say(&format!("pauses: compaction of {} revisions, defragmentation, snapshot", whole(revisions)));
        let window = if self.args.is_quick { self.settings.measured } else { pause::WINDOW };
        let clusters = self.fresh(self.settings.keys, 1)?;
        for _ in 0..self.args.rounds {
            let side = |cluster: &Cluster, other: &Cluster| {
                let _still = other.still();
                let written = |revisions| tick(&format!("{} revisions", whole(revisions)));
                pause::round(cluster, &self.settings, (revisions, window), written, |phase| {
                    let (event, took) = (phase.event.title(), time(phase.took_s * 1e6));
                    let error = phase.first_error.as_ref().map_or(String::new(), |error| format!(", {} ERRORS: {error}", phase.errors));
                    let (p50, p99, max) = (time(phase.p50_us), time(phase.p99_us), time(phase.max_us));
                    self.say(&format!("{} {event} ({took}): p50 {p50}, p99 {p99}, greatest {max}{error}", cluster.name));
                })
            };
            let both = [side(&clusters[0], &clusters[1])?, side(&clusters[1], &clusters[0])?];
            self.report.pauses.push(both);
        }
        Ok(())
    }

    fn growth(&mut self, growth: &Growth) -> Result<()> {
        let by_keys = growth.keys.iter().map(|keys| (*keys, 1));
        let by_versions = growth.versions.iter().filter(|versions| **versions > 1).map(|versions| (self.args.keys, *versions));
        for (keys, versions) in by_keys.chain(by_versions).collect::<Vec<_>>() {
            self.settings.keys = keys;
            self.say(&format!("growth: {} keys in {versions} versions", whole(keys)));
            let clusters = self.fresh(keys, versions)?;
            // What the load has put off is no part of what a row costs with so many keys.
            std::thread::sleep(if self.args.is_quick { Duration::ZERO } else { GROWTH_SETTLE });
            let mut rows: Vec<&Row> = ROWS.iter().filter(|row| self.args.wants_growth_of(row.name)).collect();
            // Those that write come last, so that the others see the size they are told.
            rows.sort_by_key(|row| !row.only_reads());
            let rows = rows.into_iter().map(|row| self.measure(&clusters, row)).collect::<Result<Vec<_>>>()?;
            self.report.sizes.push(Size { keys, versions, rows });
        }
        Ok(())
    }

    /// Prints the report; writes it and the plots to their directory.
    fn write(&mut self) -> Result<()> {
        let out = &self.args.out;
        fs::create_dir_all(out)?;
        self.report.facts.push(("took", time(self.began.elapsed().as_micros() as f64)));
        let plots = [
            ("versus-clients.svg", plot::clients(&self.report)),
            ("versus-pauses.svg", plot::pauses(&self.report)),
            ("versus-growth.svg", plot::growth(&self.report)),
        ];
        for (name, plot) in plots {
            if let Some(plot) = plot {
                fs::write(out.join(name), plot)?;
                self.report.plots.push(name);
            }
        }
        let text = self.report.markdown();
        let file = if self.args.growth.is_some() { "growth" } else { "versus" };
        fs::write(out.join(format!("{file}.md")), &text)?;
        fs::write(out.join(format!("{file}.json")), format!("{:#}\n", self.report.json()))?;
        print!("{text}");
        self.say(&format!("written to {}", out.display()));
        Ok(())
    }
}

/// Progress within a step, for who looks on; it would only fill a file.
fn tick(text: &str) {
    if std::io::stderr().is_terminal() {
        eprint!("\r\x1b[K        {text} ");
    }
}

/// One call that is not measured, to the first endpoint.
fn call<A: prost::Message + Default>(cluster: &Cluster, method: &str, request: &impl prost::Message) -> Result<A> {
    let endpoint = cluster.endpoints.first().ok_or("no endpoints")?;
    block_on(async {
        let answer = tokio::time::timeout(PATIENCE, async { Channel::connect(endpoint).await?.call(method, request).await }).await;
        answer.unwrap_or_else(|_| Err(format!("{method}: no answer within {} s", PATIENCE.as_secs()).into()))
    })
}
