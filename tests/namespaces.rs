//! Founding for real: five processes in five network namespaces, started in random order, cut off from each other and killed while they
//! found their cluster. However it goes, there is one cluster, and three of the five are its servers.
//!
//! It needs root, and `ip`; where namespaces cannot be made it says so and passes. All traffic stays within the namespaces, which have a
//! bridge of their own and no way out.
//!
//! ```text
//! FOUNDING_ROUNDS=50 cargo test --test namespaces -- --nocapture
//! FOUNDING_ROUND=17 cargo test --test namespaces -- --nocapture      # one round again
//! ```

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const NODES: usize = 5;

/// What a round may take after the harm has ended. The machine may be busy.
const PATIENCE: Duration = Duration::from_secs(120);

/// SplitMix64.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % limit
    }
}

fn ip(args: &str) -> bool {
    let run = Command::new("ip").args(args.split_whitespace()).stdout(Stdio::null()).stderr(Stdio::null()).status();
    run.is_ok_and(|status| status.success())
}

/// The namespaces of a run, removed with it.
struct Net {
    name: String,
}

impl Net {
    fn new() -> Option<Net> {
        let net = Net { name: format!("qf{}", std::process::id()) };
        let hub = format!("{}h", net.name);
        if !ip(&format!("netns add {hub}")) {
            return None;
        }
        let mut made = ip(&format!("-n {hub} link add br0 type bridge")) && ip(&format!("-n {hub} link set br0 up"));
        for at in 0..NODES {
            let ns = net.ns(at);
            for step in [
                format!("netns add {ns}"),
                format!("-n {ns} link set lo up"),
                format!("-n {hub} link add v{at} type veth peer name eth0 netns {ns}"),
                format!("-n {hub} link set v{at} master br0"),
                format!("-n {hub} link set v{at} up"),
                format!("-n {ns} addr add {}/24 dev eth0", address(at)),
                format!("-n {ns} link set eth0 up"),
            ] {
                made = made && ip(&step);
            }
        }
        made.then_some(net)
    }

    fn ns(&self, at: usize) -> String {
        format!("{}n{at}", self.name)
    }

    /// Cuts a node off at the bridge, or connects it again. Its own address stays up.
    fn connect(&self, at: usize, connected: bool) {
        let how = if connected { "up" } else { "down" };
        assert!(ip(&format!("-n {}h link set v{at} {how}", self.name)));
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        for at in 0..NODES {
            ip(&format!("netns del {}", self.ns(at)));
        }
        ip(&format!("netns del {}h", self.name));
    }
}

fn address(at: usize) -> String {
    format!("10.99.0.{}", at + 1)
}

/// The nodes' processes, ended with the round.
struct Nodes<'a> {
    net: &'a Net,
    dir: PathBuf,
    running: [Option<Child>; NODES],
}

impl Nodes<'_> {
    fn start(&mut self, at: usize) {
        if self.running[at].is_some() {
            return;
        }
        let join = (0..NODES).map(address).collect::<Vec<_>>().join(",");
        let log = fs::OpenOptions::new().create(true).append(true).open(self.dir.join(format!("node-{at}.log"))).unwrap();
        let child = Command::new("ip")
            .args(["netns", "exec", &self.net.ns(at), env!("CARGO_BIN_EXE_quorate"), "embed"])
            .envs([("JOIN", join), ("ADVERTISE_IP", address(at)), ("HOSTNAME", format!("node-{at}")), ("KV_TOKEN", "secret".into())])
            .env("KV_DATA_DIR", self.data(at))
            .env("KV_PLAINTEXT", "true")
            .env("LOG_FORMAT", "console")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        self.running[at] = Some(child);
    }

    fn kill(&mut self, at: usize) {
        if let Some(mut child) = self.running[at].take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    fn data(&self, at: usize) -> PathBuf {
        self.dir.join(format!("node-{at}"))
    }

    /// The role and the cluster that a node has on disk.
    fn bound(&self, at: usize) -> Option<(String, String)> {
        let text = fs::read_to_string(self.data(at).join("kv-state.json")).ok()?;
        let state: serde_json::Value = serde_json::from_str(&text).ok()?;
        let bound = state["state"].get("bound")?;
        Some((bound["role"].as_str()?.to_owned(), bound["cluster"].as_str()?.to_owned()))
    }

    fn log(&self, at: usize) -> String {
        fs::read_to_string(self.dir.join(format!("node-{at}.log"))).unwrap_or_default()
    }
}

impl Drop for Nodes<'_> {
    fn drop(&mut self) {
        for at in 0..NODES {
            self.kill(at);
        }
    }
}

fn round(net: &Net, number: u64, dir: &Path) -> String {
    let mut random = Random(number);
    let mut nodes = Nodes { net, dir: dir.to_owned(), running: [const { None }; NODES] };
    let mut order: Vec<usize> = (0..NODES).collect();
    for at in (1..NODES).rev() {
        order.swap(at, random.below(at as u64 + 1) as usize);
    }
    let (mut cuts, mut kills) = (0, 0);
    // The harm: about as long as founding takes.
    let steps = 8 + random.below(16);
    for step in 0..steps {
        if random.below(2) == 0
            && let Some(at) = order.pop()
        {
            nodes.start(at);
        }
        match random.below(6) {
            0 | 1 => {
                net.connect(random.below(NODES as u64) as usize, false);
                cuts += 1;
            }
            2 => net.connect(random.below(NODES as u64) as usize, true),
            3 if step > 2 => {
                let at = random.below(NODES as u64) as usize;
                kills += u64::from(nodes.running[at].is_some());
                nodes.kill(at);
                if !order.contains(&at) {
                    order.insert(0, at);
                }
            }
            _ => {}
        }
        std::thread::sleep(Duration::from_millis(random.below(400)));
    }
    for at in 0..NODES {
        net.connect(at, true);
        nodes.start(at);
    }
    let began = Instant::now();
    let logs = |nodes: &Nodes<'_>| (0..NODES).map(|at| format!("--- node-{at}\n{}", nodes.log(at))).collect::<String>();
    loop {
        let bound: Vec<_> = (0..NODES).filter_map(|at| nodes.bound(at)).collect();
        let mut clusters: Vec<_> = bound.iter().map(|(_, cluster)| cluster.clone()).collect();
        clusters.sort();
        clusters.dedup();
        assert!(clusters.len() <= 1, "round {number}: two clusters, {clusters:?}\n{}", logs(&nodes));
        let writable = (0..NODES).all(|at| nodes.log(at).contains("read-write"));
        if bound.len() == NODES && writable {
            let servers = bound.iter().filter(|(role, _)| role == "server").count();
            assert_eq!(servers, 3, "round {number}: {bound:?}");
            let took = began.elapsed();
            return format!(
                "round {number}: one cluster, {}, after {cuts} cuts and {kills} kills; all could write {took:.1?} after the end of the harm",
                clusters[0]
            );
        }
        assert!(began.elapsed() < PATIENCE, "round {number}: not all are there: {bound:?}\n{}", logs(&nodes));
        std::thread::sleep(Duration::from_millis(100));
    }
}

#[test]
fn five_processes_found_one_cluster() {
    let Some(net) = Net::new() else {
        println!("network namespaces cannot be made here; nothing was tested");
        return;
    };
    let number = |name: &str| std::env::var(name).ok().map(|text| text.parse::<u64>().expect("a number"));
    let rounds = match number("FOUNDING_ROUND") {
        Some(one) => one..one + 1,
        None => 0..number("FOUNDING_ROUNDS").unwrap_or(2),
    };
    for at in rounds {
        let dir = tempfile::tempdir().unwrap();
        println!("{}", round(&net, at, dir.path()));
    }
}
