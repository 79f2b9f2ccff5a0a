//! The binary from outside: what it prints where, what it exits with, how it takes signals.
#![cfg(feature = "cli")]

use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};

/// In an empty directory of its own and without the variables of whoever runs the tests.
fn quorate(dir: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_quorate"));
    command.args(args).current_dir(dir).env_clear().stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

fn run(args: &[&str]) -> (i32, String, String) {
    let dir = tempfile::tempdir().unwrap();
    let result = outcome(quorate(dir.path(), args).output().unwrap());
    let left: Vec<_> = std::fs::read_dir(dir.path()).unwrap().collect();
    assert!(left.is_empty(), "{args:?} left {left:?} behind");
    result
}

fn outcome(output: Output) -> (i32, String, String) {
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (output.status.code().unwrap(), text(output.stdout), text(output.stderr))
}

/// A server that does not outlive a test that fails.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Starts a server with ports that the system picks, and waits until it says that it is ready; returns the lines of its log so far.
fn start(mut command: Command) -> (Running, BufReader<std::process::ChildStderr>, Vec<String>) {
    command.args(["--listen-client-urls=http://127.0.0.1:0", "--listen-peer-urls=http://127.0.0.1:0"]);
    let mut child = Running(command.spawn().unwrap());
    let mut stderr = BufReader::new(child.0.stderr.take().unwrap());
    let mut lines = Vec::new();
    loop {
        let mut line = String::new();
        assert_ne!(stderr.read_line(&mut line).unwrap(), 0, "it ended before it was ready: {lines:?}");
        lines.push(line);
        if lines.last().is_some_and(|line| line.contains("ready to serve client requests")) {
            return (child, stderr, lines);
        }
    }
}

fn send(signal: &str, child: &Running) {
    assert!(Command::new("kill").args([signal, &child.0.id().to_string()]).status().unwrap().success());
}

#[test]
fn help_and_version_go_to_stdout() {
    for args in [["--help"], ["-h"], ["-help"]] {
        let (code, stdout, stderr) = run(&args);
        assert_eq!((code, stderr.as_str()), (0, ""));
        assert!(stdout.contains("--listen-client-urls 'http://localhost:2379'"), "{stdout}");
    }
    let (code, stdout, stderr) = run(&["--version"]);
    assert_eq!((code, stderr.as_str()), (0, ""));
    let lines: Vec<&str> = stdout.lines().collect();
    assert_eq!(lines[0], "etcd Version: 3.7.1");
    assert_eq!(lines[1], concat!("quorate Version: ", env!("CARGO_PKG_VERSION")));
    assert!(lines[2].starts_with("OS/Arch: "), "{stdout}");
}

#[test]
fn a_wrong_configuration_exits_with_2_and_names_the_culprit() {
    for (args, culprit) in [
        (&["--nope"][..], "--nope"),
        (&["--listen-client-url=x"], "--listen-client-urls"),
        (&["--heartbeat-interval=x"], "--heartbeat-interval"),
        (&["--heartbeat-interval=900"], "election-timeout"),
        (&["--name"], "--name"),
        (&["dump"], "dump"),
        (&["gateway", "start"], "gateway"),
        (&["--config-file=missing.yml"], "missing.yml"),
        (&["--config-file=."], "\".\""),
        (&["--config-file=/dev/zero"], "/dev/zero"),
        (&["--cert-file=x"], "key-file must be given, too"),
        (&["--auto-tls"], "--auto-tls"),
    ] {
        let (code, stdout, stderr) = run(args);
        assert_eq!((code, stdout.as_str()), (2, ""), "{args:?}: {stderr}");
        assert!(stderr.starts_with("quorate: ") && stderr.contains(culprit), "{args:?}: {stderr}");
    }
    let dir = tempfile::tempdir().unwrap();
    let (code, _, stderr) = outcome(quorate(dir.path(), &[]).env("ETCD_MAX_TXN_OPS", "x").output().unwrap());
    assert_eq!(code, 2);
    assert!(stderr.contains("ETCD_MAX_TXN_OPS"), "{stderr}");
}

#[test]
fn a_start_that_fails_exits_with_1() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("taken"), "").unwrap();
    let (code, _, stderr) = outcome(quorate(dir.path(), &["--data-dir=taken/data"]).output().unwrap());
    assert_eq!(code, 1, "{stderr}");
    assert!(stderr.contains("\"level\":\"error\"") && stderr.contains("taken"), "{stderr}");

    let (code, _, stderr) = outcome(quorate(dir.path(), &["--log-outputs=taken/log"]).output().unwrap());
    assert_eq!(code, 1, "{stderr}");
    assert!(stderr.contains("log-outputs") && stderr.contains("taken/log"), "{stderr}");
}

#[test]
fn a_signal_stops_it_cleanly() {
    for signal in ["-TERM", "-INT"] {
        let dir = tempfile::tempdir().unwrap();
        let mut command = quorate(dir.path(), &["--name=a", "--max-wals=3"]);
        command.env("ETCD_MAX_TXN_OPS", "7").env("ETCD_NAME", "b").env("ETCD_WHAT", "c");
        let (mut child, mut stderr, lines) = start(command);
        for want in ["--max-wals has no effect", "ETCD_NAME is shadowed by flag --name", "unrecognized environment variable ETCD_WHAT"] {
            assert!(
                lines.iter().any(|line| line.contains(want) && line.starts_with("{\"level\":\"warn\",\"ts\":\"")),
                "{want} in {lines:?}"
            );
        }
        assert!(dir.path().join("a.etcd").is_dir());
        send(signal, &child);
        let mut rest = String::new();
        stderr.read_to_string(&mut rest).unwrap();
        assert_eq!(child.0.wait().unwrap().code(), Some(0), "{rest}");
        for line in lines.iter().map(String::as_str).chain(rest.lines()) {
            let parsed: serde_json::Value = serde_json::from_str(line).unwrap_or_else(|error| panic!("{line}: {error}"));
            assert!(["level", "ts", "caller", "msg"].iter().all(|key| parsed[key].is_string()), "{line}");
        }
    }
}

#[test]
fn the_log_goes_where_it_is_told() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("log"), "before\n").unwrap();
    std::fs::write(
        dir.path().join("c.yml"),
        "name: a\nlog-outputs: [stderr, stdout, log]\nlisten-client-urls: http://127.0.0.1:0\nlisten-peer-urls: http://127.0.0.1:0\n",
    )
    .unwrap();
    let (mut child, mut stderr, lines) = start(quorate(dir.path(), &["--config-file=c.yml"]));
    send("-TERM", &child);
    let (mut rest, mut stdout) = (String::new(), String::new());
    stderr.read_to_string(&mut rest).unwrap();
    child.0.stdout.take().unwrap().read_to_string(&mut stdout).unwrap();
    assert_eq!(child.0.wait().unwrap().code(), Some(0));
    let said = lines.concat() + &rest;
    assert_eq!(stdout, said);
    assert_eq!(std::fs::read_to_string(dir.path().join("log")).unwrap(), format!("before\n{said}"));
}

#[test]
fn errors_alone_are_logged_when_asked() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("taken"), "").unwrap();
    let args = ["--data-dir=taken/data", "--log-level=error", "--log-format=console", "--max-wals=3"];
    let (code, _, stderr) = outcome(quorate(dir.path(), &args).output().unwrap());
    assert_eq!((code, stderr.lines().count()), (1, 1), "{stderr}");
    assert!(stderr.contains("\terror\tmain.rs:"), "{stderr}");
}
