//! Three members as processes, for benches that compare clusters: quorate's or etcd's, on loopback, with their data on one disk.

use std::fs::File;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use quorate::proto::etcdserverpb::kv_client::KvClient;
use quorate::proto::etcdserverpb::maintenance_client::MaintenanceClient;
use quorate::proto::etcdserverpb::{PutRequest, StatusRequest, StatusResponse};
use tempfile::TempDir;
use tokio::time::timeout;
use tonic::transport::{Channel, Endpoint};

pub const MEMBERS: usize = 3;

/// How long anything may take before the run is given up.
pub const LIMIT: Duration = Duration::from_secs(60);

/// How long one request may take in a wait that tries again.
const TRY: Duration = Duration::from_secs(3);

pub type Result<T> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;

/// A bench's main: usage when no arguments came of it, and the exit code. An interrupt ends the work, and with it what it has started.
pub fn main<A>(name: &str, usage: &str, args: Result<Option<A>>, work: impl AsyncFnOnce(A) -> Result<()>) -> ExitCode {
    let run = async || {
        let Some(args) = args? else {
            print!("{usage}");
            return Ok(());
        };
        tokio::select! {
            done = work(args) => done,
            // What was started ends with its guards.
            _ = tokio::signal::ctrl_c() => Err("interrupted".into()),
        }
    };
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
    match runtime.map_err(Into::into).and_then(|runtime| runtime.block_on(run())) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{name}: {error}");
            ExitCode::FAILURE
        }
    }
}

pub struct Cluster {
    pub members: Vec<Member>,
    /// After the members, so that it goes when they are gone.
    #[allow(dead_code, reason = "kept for its drop")]
    dir: TempDir,
}

pub struct Member {
    binary: PathBuf,
    args: Vec<String>,
    log: PathBuf,
    pub url: String,
    pub process: Option<Guard>,
}

/// A process that ends with its guard.
pub struct Guard(pub Child);

impl Drop for Guard {
    fn drop(&mut self) {
        // An error says that it has ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Cluster {
    pub async fn start(binary: &Path, parent: &Path, flags: Vec<String>) -> Result<Cluster> {
        let dir = tempfile::Builder::new().prefix("three-").tempdir_in(parent)?;
        // All listeners are held until every port is known, so that none comes twice.
        let listeners = (0..2 * MEMBERS).map(|_| TcpListener::bind("127.0.0.1:0")).collect::<std::io::Result<Vec<_>>>()?;
        let urls = listeners.iter().map(|listener| Ok(format!("http://{}", listener.local_addr()?))).collect::<Result<Vec<_>>>()?;
        drop(listeners);
        let (clients, peers) = urls.split_at(MEMBERS);
        let all: Vec<String> = peers.iter().enumerate().map(|(at, url)| format!("m{at}={url}")).collect();
        let mut members = Vec::new();
        for (at, (client, peer)) in clients.iter().zip(peers).enumerate() {
            let mut args = vec![
                format!("--name=m{at}"),
                format!("--data-dir={}", dir.path().join(format!("m{at}")).display()),
                format!("--listen-client-urls={client}"),
                format!("--advertise-client-urls={client}"),
                format!("--listen-peer-urls={peer}"),
                format!("--initial-advertise-peer-urls={peer}"),
                format!("--initial-cluster={}", all.join(",")),
                "--log-level=error".to_owned(),
            ];
            args.extend(flags.iter().cloned());
            let log = dir.path().join(format!("m{at}.log"));
            members.push(Member { binary: binary.to_owned(), args, log, url: client.clone(), process: None });
        }
        let mut cluster = Cluster { members, dir };
        for member in &mut cluster.members {
            member.start()?;
        }
        cluster.all_answer().await?;
        Ok(cluster)
    }

    /// Waits until each member takes a write.
    pub async fn all_answer(&self) -> Result<()> {
        let began = Instant::now();
        for member in &self.members {
            loop {
                let mut kv = KvClient::new(member.channel()?);
                match timeout(TRY, kv.put(put("ready"))).await {
                    Ok(Ok(_)) => break,
                    other if began.elapsed() > LIMIT => {
                        return Err(format!("{} does not answer: {other:?}: {}", member.url, self.logs()).into());
                    }
                    _ => tokio::time::sleep(Duration::from_millis(50)).await,
                }
            }
        }
        Ok(())
    }

    /// The leader, once all members agree on it.
    pub async fn leader(&self) -> Result<usize> {
        let began = Instant::now();
        loop {
            let mut told = Vec::new();
            for member in &self.members {
                let status = member.status().await?;
                told.push((status.header.map_or(0, |header| header.member_id), status.leader));
            }
            let (_, leader) = told[0];
            let found = told.iter().position(|(id, _)| *id == leader);
            match found.filter(|_| told.iter().all(|(_, other)| *other == leader)) {
                Some(leader) => return Ok(leader),
                None if began.elapsed() > LIMIT => return Err(format!("no leader: {told:x?}").into()),
                None => tokio::time::sleep(Duration::from_millis(50)).await,
            }
        }
    }

    pub async fn version(&self) -> Result<String> {
        let output = Command::new(&self.members[0].binary).arg("--version").output()?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        // Quorate says in its second line what it is, and in the first whom it resembles; etcd has one line.
        let line = text.lines().find(|line| line.starts_with("quorate")).or(text.lines().next()).unwrap_or_default();
        Ok(line.rsplit(' ').next().unwrap_or_default().to_owned())
    }

    /// The ends of all logs, for an error.
    pub fn logs(&self) -> String {
        const LINES: usize = 8;
        let mut text = String::new();
        for member in &self.members {
            let log = std::fs::read_to_string(&member.log).unwrap_or_default();
            let lines: Vec<&str> = log.lines().collect();
            text += &format!("\n  {}:\n    {}", member.url, lines[lines.len().saturating_sub(LINES)..].join("\n    "));
        }
        text
    }
}

impl Member {
    pub fn start(&mut self) -> Result<()> {
        let log = File::options().create(true).append(true).open(&self.log)?;
        let mut command = Command::new(&self.binary);
        command.env_clear().args(&self.args).stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        self.process = Some(Guard(command.spawn().map_err(|error| format!("{}: {error}", self.binary.display()))?));
        Ok(())
    }

    pub fn channel(&self) -> Result<Channel> {
        Ok(Endpoint::from_shared(self.url.clone())?.connect_timeout(TRY).connect_lazy())
    }

    pub async fn status(&self) -> Result<StatusResponse> {
        Ok(timeout(TRY, MaintenanceClient::new(self.channel()?).status(StatusRequest {})).await??.into_inner())
    }
}

/// A put of one key.
pub fn put(value: &'static str) -> PutRequest {
    PutRequest { key: "three".into(), value: value.into(), ..Default::default() }
}
