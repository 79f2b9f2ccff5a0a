//! The command line.

use std::path::PathBuf;
use std::time::Duration;

use crate::rows::{EMBEDDED_ROWS, GROWTH_ROWS, LIMITS, MEMORY_AND_START, PAUSES, ROWS};
use crate::wire::Result;

pub const USAGE: &str = "\
Compares two etcd-compatible servers: A, which is etcd, and B, which is quorate.

    cargo bench --bench versus -- --etcd PATH [options]

servers
  --etcd PATH             binary of A
  --quorate PATH          binary of B [the one of this package]
  --members N             members on each side, 1 or 3 [1]
  --args-a, --args-b ARGS further flags for A or B, separated by blanks
  --endpoints-a, --endpoints-b URL,...
                          use running servers instead; keys below /versus/ are overwritten and deleted
  --pids-a, --pids-b PID,...
                          their processes, to weigh their CPU, memory and bytes

what
  --rows NAME,...         rows by name or by the name's first part, such as put-64,get,limits [all]
  --rounds N              rounds, A and B in turn [5]
  --seconds S             measured time of a round [3]
  --keys N                keys in the store [100000]
  --value-bytes N         length of a value [256]
  --quick                 see that it works: one round of half a second, little data; the figures mean nothing
  --growth                the rows of interest again with more keys and more revisions, nothing else
  --growth-keys, --growth-versions N,...
                          at which sizes [10000,100000,1000000,5000000 keys; 1,10,100 versions of --keys keys]

how
  --connections N         connections of the generator [4]
  --threads N             threads of the generator [1]
  --dir DIR               where the servers keep their data; not a tmpfs [below target]
  --out DIR               where versus.md, versus.json and the plots go [target/versus]
";

/// What to do, checked.
#[derive(Clone, Debug)]
pub struct Args {
    /// Binary, endpoints, process ids, further flags; for A and B.
    pub sides: [Side; 2],
    pub members: usize,
    pub rows: Vec<String>,
    pub rounds: usize,
    pub measured: Duration,
    pub keys: u64,
    pub value_bytes: usize,
    pub is_quick: bool,
    pub growth: Option<Growth>,
    pub connections: usize,
    pub threads: usize,
    pub dir: PathBuf,
    pub out: PathBuf,
    /// Keys of the memory row.
    pub memory_keys: u64,
    /// Revisions that are compacted.
    pub pause_revisions: u64,
}

#[derive(Clone, Debug, Default)]
pub struct Side {
    pub binary: Option<PathBuf>,
    pub endpoints: Vec<String>,
    pub pids: Vec<u32>,
    pub flags: Vec<String>,
}

#[derive(Clone, Debug)]
pub struct Growth {
    pub keys: Vec<u64>,
    pub versions: Vec<u64>,
}

impl Args {
    /// `None` when there is nothing to do: `cargo bench` without arguments runs every bench target, this one too.
    ///
    /// # Errors
    /// A sentence that names the argument.
    pub fn parse(args: impl IntoIterator<Item = String>, own_binary: Option<&str>) -> Result<Option<Self>> {
        let mut parsed = Self {
            sides: [Side::default(), Side { binary: own_binary.map(PathBuf::from), ..Side::default() }],
            members: 1,
            rows: Vec::new(),
            rounds: 5,
            measured: Duration::from_secs(3),
            keys: 100_000,
            value_bytes: 256,
            is_quick: false,
            growth: None,
            connections: 4,
            threads: 1,
            dir: PathBuf::from(env!("CARGO_TARGET_TMPDIR")),
            out: PathBuf::from("target/versus"),
            memory_keys: 1_000_000,
            pause_revisions: 1_000_000,
        };
        let growth = |quick: bool| match quick {
            false => Growth { keys: vec![10_000, 100_000, 1_000_000, 5_000_000], versions: vec![1, 10, 100] },
            true => Growth { keys: vec![2000, 4000], versions: vec![1, 3] },
        };
        // Cargo adds --bench. Quick comes first, so that what is said besides counts.
        let all: Vec<String> = args.into_iter().filter(|arg| arg != "--bench").collect();
        if all.iter().any(|arg| arg == "--quick") {
            parsed.is_quick = true;
            (parsed.rounds, parsed.measured, parsed.keys) = (1, Duration::from_millis(500), 10_000);
            (parsed.memory_keys, parsed.pause_revisions) = (50_000, 20_000);
        }
        let mut args = all.iter().filter(|arg| *arg != "--quick");
        while let Some(arg) = args.next() {
            if arg == "--growth" {
                parsed.growth.get_or_insert_with(|| growth(parsed.is_quick));
                continue;
            }
            let (name, value) = match arg.split_once('=') {
                Some((name, value)) => (name, value.to_string()),
                None if arg == "--help" || arg == "-h" => return Ok(None),
                None => (arg.as_str(), args.next().ok_or_else(|| format!("{arg}: unknown, or its value is missing"))?.clone()),
            };
            let [a, b] = &mut parsed.sides;
            match name {
                "--etcd" => a.binary = Some(value.into()),
                "--quorate" => b.binary = Some(value.into()),
                "--endpoints-a" => a.endpoints = list(name, &value)?,
                "--endpoints-b" => b.endpoints = list(name, &value)?,
                "--pids-a" => a.pids = list(name, &value)?,
                "--pids-b" => b.pids = list(name, &value)?,
                "--args-a" => a.flags = value.split_whitespace().map(String::from).collect(),
                "--args-b" => b.flags = value.split_whitespace().map(String::from).collect(),
                "--members" => parsed.members = one(name, &value)?,
                "--rows" => parsed.rows = list(name, &value)?,
                "--rounds" => parsed.rounds = one(name, &value)?,
                "--seconds" => parsed.measured = Duration::try_from_secs_f64(one(name, &value)?)?,
                "--keys" => parsed.keys = one(name, &value)?,
                "--value-bytes" => parsed.value_bytes = one(name, &value)?,
                "--growth-keys" => parsed.growth.get_or_insert_with(|| growth(parsed.is_quick)).keys = list(name, &value)?,
                "--growth-versions" => parsed.growth.get_or_insert_with(|| growth(parsed.is_quick)).versions = list(name, &value)?,
                "--connections" => parsed.connections = one(name, &value)?,
                "--threads" => parsed.threads = one(name, &value)?,
                "--dir" => parsed.dir = value.into(),
                "--out" => parsed.out = value.into(),
                _ => return Err(format!("{name}: unknown").into()),
            }
        }
        if parsed.sides.iter().all(|side| side.endpoints.is_empty()) && parsed.sides[0].binary.is_none() {
            return Ok(None);
        }
        parsed.check()?;
        Ok(Some(parsed))
    }

    fn check(&self) -> Result<()> {
        let wrong = |text: &str| Err(text.into());
        for (side, names) in self.sides.iter().zip(["--etcd or --endpoints-a", "--quorate or --endpoints-b"]) {
            if side.endpoints.is_empty() && side.binary.is_none() {
                return wrong(&format!("{names}: missing"));
            }
        }
        match self {
            _ if self.members != 1 && self.members != 3 => wrong("--members: 1 or 3"),
            _ if !(2000..=90_000_000).contains(&self.keys) => wrong("--keys: from 2000, for ranges of 1000, to 90000000"),
            _ if !(1..=100_000).contains(&self.value_bytes) => wrong("--value-bytes: from 1 to 100000"),
            _ if self.rounds == 0 || self.connections == 0 || self.threads == 0 => wrong("--rounds, --connections, --threads: at least 1"),
            _ if self.measured < Duration::from_millis(100) => wrong("--seconds: at least 0.1"),
            _ => match self.rows.iter().find(|name| !all_names().any(|known| matches(name, known))) {
                Some(name) => Err(format!("--rows: there is no {name}; there are {}", all_names().collect::<Vec<_>>().join(" ")).into()),
                None => Ok(()),
            },
        }
    }

    /// Whether a row or section was asked for.
    pub fn wants(&self, name: &str) -> bool {
        self.rows.is_empty() || self.rows.iter().any(|wanted| matches(wanted, name))
    }

    /// Whether a row was asked for in the growth section.
    pub fn wants_growth_of(&self, name: &str) -> bool {
        if self.rows.is_empty() { GROWTH_ROWS.contains(&name) } else { self.wants(name) }
    }
}

fn all_names() -> impl Iterator<Item = &'static str> {
    ROWS.iter().chain(EMBEDDED_ROWS).map(|row| row.name).chain([LIMITS, MEMORY_AND_START, PAUSES])
}

/// `put` stands for `put-1`, `put-64` and so on.
fn matches(wanted: &str, name: &str) -> bool {
    wanted == name || name.split_once('-').is_some_and(|(family, _)| family == wanted)
}

fn one<T: std::str::FromStr>(name: &str, value: &str) -> Result<T> {
    value.parse().map_err(|_| format!("{name}: {value} is not a number of that kind").into())
}

fn list<T: std::str::FromStr>(name: &str, value: &str) -> Result<Vec<T>> {
    value.split(',').filter(|part| !part.is_empty()).map(|part| one(name, part)).collect()
}

#[cfg(test)]
#[allow(unused)] // See main.rs.
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Option<Args>> {
        Args::parse(line.split(' ').map(String::from), Some("quorate"))
    }

    #[test]
    fn what_can_be_said() {
        assert!(parse("--bench").unwrap().is_none());
        assert!(parse("--help").unwrap().is_none());
        let args = parse("--etcd etcd --rows put,get-64 --rounds=2 --quick --keys 5000 --bench").unwrap().unwrap();
        assert!(args.wants("put-1000") && args.wants("get-64") && !args.wants("get-1") && !args.wants("sget-64"));
        assert_eq!((args.rounds, args.keys, args.measured), (2, 5000, Duration::from_millis(500)));
        let args = parse("--endpoints-a http://a:1,http://b:2 --pids-a 7,8 --growth-keys 3000").unwrap().unwrap();
        assert_eq!((args.sides[0].endpoints.len(), args.sides[0].pids.len()), (2, 2));
        assert_eq!(args.growth.unwrap().keys, [3000]);
    }

    #[test]
    fn what_cannot() {
        for line in [
            "--etcd",
            "--etcd x --rows putt",
            "--etcd x --rounds 0",
            "--etcd x --keys 10",
            "--etcd x --members 2",
            "--etcd x --seconds -1",
            "--etcd x --what 1",
            "--etcd x --keys many",
        ] {
            assert!(parse(line).is_err(), "{line}");
        }
    }
}
