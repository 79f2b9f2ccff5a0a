//! The binary: flags, variables and file -> [`Config`](quorate::Config) -> [`Server`].
//!
//! `quorate log` prints a member's log instead, and touches nothing; `quorate backup` and `quorate restore` are in `backups.rs`.
//!
//! Exit codes: 0 after help, version, or a stop that was asked for by SIGTERM or SIGINT; 1 when the server did not start or stopped by
//! itself; 2 when the configuration is wrong, before anything was touched. A second signal ends the process at once, with 128 plus its
//! number: whatever was acknowledged is on disk already.
#![forbid(unsafe_code)]

mod backups;
mod embedding;
mod logging;

use std::io::Write;
use std::process::ExitCode;
use std::time::{Duration, SystemTime};

use quorate::cli::{self, Action, PrintLog, Run};
use quorate::embed::EmbedConfig;
use quorate::embed::members::Order;
use quorate::{Error, Server};
use tokio::runtime::{Builder, Runtime};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::oneshot;

/// Exit code for a wrong configuration, as for etcd's wrong flags.
const EXIT_USAGE: u8 = 2;

/// How long a start that was begun may go on after the signal to stop. Beyond it the process ends: what was acknowledged is on disk.
const START_GRACE: Duration = Duration::from_secs(10);

fn main() -> ExitCode {
    let mut args = std::env::args_os().skip(1);
    let first = args.next();
    if first.as_ref().is_some_and(|first| first == "node") {
        return node(&args.map(|arg| arg.to_string_lossy().into_owned()).collect::<Vec<_>>());
    }
    if first.is_some_and(|first| first == "embed") {
        return match args.next() {
            None => embed(),
            Some(arg) if arg == "--help" || arg == "-h" => {
                let _ = std::io::stdout().write_all(embedding::HELP.as_bytes());
                ExitCode::SUCCESS
            }
            Some(arg) => usage(&Error::Config(format!("embed takes variables, and no argument such as {arg:?}")), "quorate embed --help"),
        };
    }
    match cli::parse(std::env::args_os().skip(1), std::env::vars_os(), cli::read_config_file) {
        Ok(Action::Print(text)) => {
            let _ = std::io::stdout().write_all(text.as_bytes());
            ExitCode::SUCCESS
        }
        Ok(Action::Run(run)) => serve(*run),
        Ok(Action::PrintLog(print)) => print_log(&print),
        Ok(Action::Backup(command)) => backups::backup(command),
        Ok(Action::Restore(command)) => backups::restore(&command),
        Err(error) => usage(&error, "quorate --help"),
    }
}

/// What has to be done for a node to be a server, once that is ordered.
const AGAIN: &str = "it takes a new start, which `quorate embed` makes by itself, and other hosts when they are told";

/// Changes who the servers of a cluster of nodes are.
fn node(args: &[String]) -> ExitCode {
    if args.iter().any(|arg| arg == "--help" || arg == "-h") {
        let _ = std::io::stdout().write_all(embedding::NODE_HELP.as_bytes());
        return ExitCode::SUCCESS;
    }
    let (order, config) = match embedding::order(args).and_then(|order| Ok((order, EmbedConfig::from_env()?))) {
        Ok(both) => both,
        Err(error) => return usage(&error, "quorate node --help"),
    };
    let given = new_runtime("the main thread").and_then(|runtime| runtime.block_on(quorate::embed::members::give(&config, &order)));
    match given {
        Ok(()) => {
            let done = match &order {
                Order::Grow { nodes } => format!("{} are to be servers: {AGAIN}", nodes.join(" and ")),
                Order::Replace { by, .. } => format!("{by} is to be a server: {AGAIN}"),
                Order::Remove { server } => format!("{server} is a server no more"),
            };
            let _ = writeln!(std::io::stdout(), "{done}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "quorate: {error}");
            ExitCode::FAILURE
        }
    }
}

fn print_log(print: &PrintLog) -> ExitCode {
    let mut out = std::io::BufWriter::new(std::io::stdout().lock());
    match quorate::listing::print(&print.wal_dir, print.from, print.json, &mut out) {
        Ok(()) => ExitCode::SUCCESS,
        // Whoever closed the pipe has read enough.
        Err(Error::Io { source, .. }) if source.kind() == std::io::ErrorKind::BrokenPipe => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "quorate: {error}");
            ExitCode::FAILURE
        }
    }
}

fn usage(error: &Error, help: &str) -> ExitCode {
    // Not println: whoever closed the pipe has read enough, and that is no reason to panic.
    let _ = writeln!(std::io::stderr(), "quorate: {error}\n`{help}` lists what can be set.");
    ExitCode::from(EXIT_USAGE)
}

/// A node of the embedded mode.
fn embed() -> ExitCode {
    let log = || embedding::log_config(|text| logging::read_filter(text).map(drop));
    let (config, log) = match EmbedConfig::from_env().and_then(|config| Ok((config, log()?))) {
        Ok(both) => both,
        Err(error) => return usage(&error, "quorate embed --help"),
    };
    if let Err(error) = logging::install(&log, SystemTime::now) {
        let _ = writeln!(std::io::stderr(), "quorate: {error}");
        return ExitCode::FAILURE;
    }
    let served = watch_signals().and_then(|asked| {
        let asked = async { asked.await.unwrap_or("none") };
        new_runtime("the main thread")?.block_on(embedding::run(config, asked))
    });
    ended(served, "the node failed")
}

fn serve(run: Run) -> ExitCode {
    if let Err(error) = logging::install(&run.log, SystemTime::now) {
        let _ = writeln!(std::io::stderr(), "quorate: {error}");
        return ExitCode::FAILURE;
    }
    for note in &run.notes {
        if note.is_warning {
            tracing::warn!("{}", note.text);
        } else {
            tracing::info!("{}", note.text);
        }
    }
    let served = watch_signals().and_then(|asked| new_runtime("the main thread")?.block_on(run_server(run, asked)));
    ended(served, "the server failed")
}

fn ended(served: Result<(), Error>, what: &str) -> ExitCode {
    match served {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!(%error, "{what}");
            ExitCode::FAILURE
        }
    }
}

/// Runs until asked to stop. A signal that comes during the start waits for its end, but not for longer than [`START_GRACE`]: a
/// half-started server has nothing to lose, but a start that is broken off has everything to do again; and one that waits for other
/// members may never end.
async fn run_server(run: Run, mut asked: oneshot::Receiver<&'static str>) -> Result<(), Error> {
    let mut start = std::pin::pin!(Server::start(run.config));
    let server = tokio::select! {
        biased;
        server = &mut start => server?,
        signal = &mut asked => {
            tracing::info!(signal = signal.unwrap_or("none"), "received signal during the start, which is to end first");
            return match tokio::time::timeout(START_GRACE, start).await {
                Ok(server) => server?.shutdown().await,
                Err(_) => {
                    tracing::warn!(waited = ?START_GRACE, "the start was broken off");
                    Ok(())
                }
            };
        }
    };
    tokio::select! {
        biased;
        result = server.stopped() => return result,
        signal = asked => tracing::info!(signal = signal.unwrap_or("none"), "received signal, shutting down"),
    }
    server.shutdown().await?;
    tracing::info!("server stopped");
    Ok(())
}

/// Tells of the first SIGTERM or SIGINT; the second ends the process.
///
/// On a thread and a runtime of its own, so that the second one is heard even while the main thread is stuck.
fn watch_signals() -> Result<oneshot::Receiver<&'static str>, Error> {
    let (tell, asked) = oneshot::channel();
    let runtime = new_runtime("the signal handler")?;
    let listen = |kind| {
        let _inside = runtime.enter();
        signal(kind).map_err(|error| failed("the signal handler", &error))
    };
    let (mut term, mut int) = (listen(SignalKind::terminate())?, listen(SignalKind::interrupt())?);
    let wait = move || {
        runtime.block_on(async move {
            let (first, _) = next(&mut term, &mut int).await;
            // If nobody listens any more the process is about to end anyway.
            let _ = tell.send(first);
            let (_, number) = next(&mut term, &mut int).await;
            std::process::exit(128 + number);
        });
    };
    std::thread::Builder::new().name("signals".into()).spawn(wait).map_err(|error| failed("the signal handler", &error))?;
    Ok(asked)
}

/// The next signal's name and number.
async fn next(term: &mut Signal, int: &mut Signal) -> (&'static str, i32) {
    tokio::select! {
        _ = term.recv() => ("terminated", SignalKind::terminate().as_raw_value()),
        _ = int.recv() => ("interrupt", SignalKind::interrupt().as_raw_value()),
    }
}

/// The main thread and the signal handler only wait; the server has a runtime of its own for its work.
fn new_runtime(what: &str) -> Result<Runtime, Error> {
    Builder::new_current_thread().enable_all().build().map_err(|error| failed(what, &error))
}

fn failed(what: &str, error: &std::io::Error) -> Error {
    Error::Failed(format!("{what} could not be started: {error}"))
}
