//! etcd's own command line against real etcd and against the member under test: the same commands, the same output,
//! the same exit codes.
//!
//! The commands stand in `tests/etcdctl/*.txt`, one test a file. A section (`== title`) starts with two new, empty
//! members; its lines run one after another on both:
//!
//! | Line | Meaning |
//! |---|---|
//! | `$ words` | run `etcdctl words` to its end; compare what it prints, what it complains of, and its exit code |
//! | `$? words` | the same, but what it complains of is not compared (it logs sizes and times) |
//! | `$% words` | the same, but of what it measures only what is measured is compared: how fast is for the machine to say |
//! | `< text` | a line of input for the command above |
//! | `& name words` | start `etcdctl words` and let it run |
//! | `@ name text` | give the running one a line of input |
//! | `! name n` | wait until it has printed `n` lines, end it, compare what it printed |
//! | `? words` | run it until it prints something, up to a limit; nothing is compared |
//! | `> alarm nospace` | raise an alarm, which etcdctl cannot |
//!
//! Words may stand in `'` or `"`. In them, `{lease}` is the id that the last `lease grant` printed, `{url}` the member,
//! `{dest}` a second member of the same kind, `{tmp}` a directory, `{member}` the member's id in hexadecimal. A title
//! that ends in `[progress]` starts the members with watch progress every second; in `[slow]`, runs only with `CI=true`
//! or `QUORATE_SLOW_TESTS=1`.
//!
//! Compared is the output with names, ids, addresses, sizes, times, terms and Raft indexes replaced by words; see
//! [`Side::mask`].

mod common;

use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use common::pb::{AlarmRequest, MemberListRequest, StatusRequest};
use common::{Kind, Process};

/// How long a command may take; the slow one needs a minute.
const LIMIT: Duration = Duration::from_secs(150);

/// How long output may take to come.
const OUTPUT_LIMIT: Duration = Duration::from_secs(20);

/// What `etcdctl version` says, whatever the member's own version is.
const ETCDCTL_VERSION: &str = "3.5.30";

/// One member and the commands that run on it.
struct Side {
    etcdctl: PathBuf,
    process: Process,
    /// A second member, for commands that copy to one.
    dest: Option<Process>,
    /// The id that the last `lease grant` printed, in hexadecimal.
    lease: String,
    /// What to replace in output, and by what.
    names: Vec<(String, &'static str)>,
    running: Vec<Running>,
}

/// A command that was started and not waited for.
struct Running {
    name: String,
    child: Child,
    stdin: Option<ChildStdin>,
    printed: Arc<Mutex<Vec<u8>>>,
}

impl Side {
    async fn start(etcdctl: &Path, kind: Kind, section: &Section) -> Side {
        let interval = match (section.progress, kind.is_etcd()) {
            (false, _) => vec![],
            // The flag's name in 3.5 and in 3.7.
            (true, true) => vec!["--experimental-watch-progress-notify-interval=1s"],
            (true, false) => vec!["--watch-progress-notify-interval=1s"],
        };
        let process = Process::start(kind.clone(), &interval).await;
        let wants_dest = section.lines.iter().any(|l| l.contains("{dest}"));
        let dest = if wants_dest { Some(Process::start(kind, &[]).await) } else { None };
        let mut names = Vec::new();
        for (process, address, name) in [(Some(&process), "URL", "NAME"), (dest.as_ref(), "DEST-URL", "DEST-NAME")] {
            let Some(process) = process else { continue };
            names.push((process.url(), address));
            names.push((process.url().replace("http://", ""), address));
            names.push((format!("http://127.0.0.1:{}", process.peer_port), "PEER-URL"));
            names.push((process.name.clone(), name));
            names.push((process.scratch().display().to_string(), "TMP"));
            let mut clients = process.clients().await;
            let members = clients.cluster.member_list(MemberListRequest::default()).await.expect("a member list").into_inner();
            let cluster = members.header.expect("a header").cluster_id;
            for (id, name) in [(members.members[0].id, "MEMBER-ID"), (cluster, "CLUSTER-ID")] {
                names.push((id.to_string(), name));
                names.push((format!("{id:x}"), name));
            }
            let version = clients.maintenance.status(StatusRequest {}).await.expect("a status").into_inner().version;
            names.push((version, "VERSION"));
        }
        names.push((ETCDCTL_VERSION.to_owned(), "VERSION"));
        Side { etcdctl: etcdctl.to_owned(), process, dest, lease: String::new(), names, running: Vec::new() }
    }

    fn command(&self, line: &str) -> Command {
        let mut command = Command::new(&self.etcdctl);
        command.env_clear().env("ETCDCTL_API", "3").env("PATH", std::env::var_os("PATH").unwrap_or_default());
        if !line.contains("--endpoints") {
            command.arg("--endpoints").arg(self.process.url());
        }
        let dest = self.dest.as_ref().map_or(String::new(), |d| d.url());
        for word in words(line) {
            let word = word.replace("{lease}", &self.lease).replace("{url}", &self.process.url()).replace("{dest}", &dest);
            let member = self.names.iter().filter(|n| n.1 == "MEMBER-ID").nth(1).map_or("", |n| &n.0);
            command.arg(word.replace("{member}", member).replace("{tmp}", &self.process.scratch().display().to_string()));
        }
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    /// Runs a command to its end and returns what it printed, masked.
    fn run(&mut self, line: &str, input: &str, with_stderr: bool) -> String {
        let mut child = self.command(line).spawn().expect("etcdctl starts");
        let mut stdin = child.stdin.take().expect("stdin is piped");
        // A command that reads nothing may be gone already.
        let _ = stdin.write_all(input.as_bytes());
        drop(stdin);
        let (out, err) = (collect(child.stdout.take()), collect(child.stderr.take()));
        let deadline = Instant::now() + LIMIT;
        let status = loop {
            if let Some(status) = child.try_wait().expect("waiting for a child works") {
                break status.to_string();
            }
            if Instant::now() > deadline {
                let _ = child.kill();
                let _ = child.wait();
                break format!("not ended after {LIMIT:?}");
            }
            std::thread::sleep(Duration::from_millis(2));
        };
        let (out, err) = (out.join().expect("collecting works"), err.join().expect("collecting works"));
        if let Some(id) = out.strip_prefix("lease ").and_then(|o| o.split_once(" granted")) {
            self.lease = id.0.to_owned();
            self.names.push((id.0.to_owned(), "LEASE"));
            if let Ok(number) = i64::from_str_radix(id.0, 16) {
                self.names.push((number.to_string(), "LEASE"));
            }
        }
        let err = if with_stderr { self.mask(&err) } else { String::new() };
        format!("{}{err}[{status}]\n", self.mask(&out))
    }

    fn spawn(&mut self, name: &str, line: &str) {
        let mut child = self.command(line).spawn().expect("etcdctl starts");
        let printed = Arc::new(Mutex::new(Vec::new()));
        let (to, mut stdout) = (printed.clone(), child.stdout.take().expect("stdout is piped"));
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(n @ 1..) = stdout.read(&mut buffer) {
                to.lock().expect("no panic while it is held").extend_from_slice(&buffer[..n]);
            }
        });
        let stdin = child.stdin.take();
        self.running.push(Running { name: name.to_owned(), child, stdin, printed });
    }

    fn running(&mut self, name: &str) -> &mut Running {
        self.running.iter_mut().find(|r| r.name == name).unwrap_or_else(|| panic!("no command {name} is running"))
    }

    /// Waits until a running command has printed `lines` lines, ends it and returns them.
    fn finish(&mut self, name: &str, lines: usize) -> String {
        let deadline = Instant::now() + OUTPUT_LIMIT;
        let process = self.process.name.clone();
        let running = self.running(name);
        loop {
            let printed = String::from_utf8_lossy(&running.printed.lock().expect("no panic while it is held")).into_owned();
            if printed.lines().count() >= lines {
                break;
            }
            assert!(Instant::now() < deadline, "{process}: {name} has not printed {lines} lines within {OUTPUT_LIMIT:?}:\n{printed}");
            std::thread::sleep(Duration::from_millis(5));
        }
        let pid = rustix::process::Pid::from_child(&running.child);
        // Not an interrupt: where this runs in the background of a shell, that is ignored, by the children too.
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        let _ = running.child.wait();
        let printed = String::from_utf8_lossy(&running.printed.lock().expect("no panic while it is held")).into_owned();
        self.mask(&printed)
    }

    /// Replaces what differs between any two members.
    fn mask(&self, text: &str) -> String {
        let mut text = text.to_owned();
        let mut names = self.names.clone();
        // Longer ones first: an address contains another's beginning.
        names.sort_by_key(|n| std::cmp::Reverse(n.0.len()));
        for (name, word) in &names {
            text = text.replace(name.as_str(), word);
        }
        // Fields of JSON, of `-w fields` and of plain text whose value is a size, a time, a term or an index.
        const FIELDS: [&str; 19] = [
            "\"raft_term\":",
            "\"RaftTerm\" : ",
            "\"dbSize\":",
            "\"DBSize\" : ",
            "\"dbSizeInUse\":",
            "\"dbSizeQuota\":",
            "\"DBSizeInUse\" : ",
            "\"raftIndex\":",
            "\"RaftIndex\" : ",
            "\"raftTerm\":",
            "\"raftAppliedIndex\":",
            "\"RaftAppliedIndex\" : ",
            "\"took\":",
            "\"Took\" : ",
            "took = ",
            "took ",
            "remaining(",
            "\"ttl\":",
            "\"TTL\" : ",
        ];
        let mut out = String::new();
        // Left out: what the client logs, and progress bars, of which the last may have what is printed next on its line.
        for line in text.lines().filter(|l| !l.starts_with("{\"level\":")) {
            let verdict = ["PASS:", "FAIL:"].iter().find_map(|verdict| line.find(verdict)).filter(|_| line.contains('\r'));
            let mut line = match verdict {
                Some(at) => line.split_at(at).1.to_owned(),
                None if line.contains('\r') => continue,
                None => line.to_owned(),
            };
            for field in FIELDS {
                let mut from = 0;
                while let Some(at) = line[from..].find(field).map(|at| from + at + field.len()) {
                    let end = line[at..].find([',', '}', ')', ';', ' ', ']']).map_or(line.len(), |end| at + end);
                    line.replace_range(at..end, "#");
                    from = at;
                }
            }
            out += &plain_table(&line);
            out.push('\n');
        }
        out
    }
}

/// What `check perf` says without figures and without whether they are good enough, by the first word of each line:
/// a slow disk beside the test makes it fail, whoever serves it.
fn without_verdict(text: &str) -> String {
    let kept = text.lines().filter(|line| !matches!(*line, "PASS" | "FAIL") && !line.starts_with("[exit status: "));
    let words = kept.map(|line| line.strip_prefix("PASS: ").or_else(|| line.strip_prefix("FAIL: ")).unwrap_or(line));
    words.map(|line| format!("{}\n", line.split(' ').next().unwrap_or(line))).collect()
}

/// Makes lines of a table independent of how wide its cells are, and hides those of `endpoint status` and
/// `endpoint health` that hold sizes, times, terms and indexes: in both forms they come in a row of known length.
fn plain_table(line: &str) -> String {
    let mut line = line.to_owned();
    if line.starts_with(['┌', '├', '└', '│']) {
        while line.contains("──") || line.contains("  ") {
            line = line.replace("──", "─").replace("  ", " ");
        }
    }
    let (separator, first) = if line.starts_with('│') { (" │ ", "│ URL") } else { (", ", "URL, ") };
    if !line.starts_with(first) {
        return line;
    }
    let mut cells: Vec<&str> = line.split(separator).collect();
    match cells.len() {
        // ENDPOINT, ID, VERSION, DB SIZE, IS LEADER, IS LEARNER, RAFT TERM, RAFT INDEX, RAFT APPLIED INDEX, ERRORS
        9.. => [3, 6, 7, 8].into_iter().for_each(|i| cells[i] = "#"),
        // ENDPOINT, HEALTH, TOOK, ERROR
        4 => cells[2] = "#",
        _ => {}
    }
    cells.join(separator)
}

impl Drop for Side {
    fn drop(&mut self) {
        for running in &mut self.running {
            let _ = running.child.kill();
            let _ = running.child.wait();
        }
    }
}

/// Reads a pipe to its end on a thread of its own, so that the writer never waits.
fn collect(pipe: Option<impl Read + Send + 'static>) -> std::thread::JoinHandle<String> {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        if let Some(mut pipe) = pipe {
            let _ = pipe.read_to_end(&mut bytes);
        }
        String::from_utf8_lossy(&bytes).into_owned()
    })
}

/// Splits a line into words, as a shell does, with `'` and `"`.
fn words(line: &str) -> Vec<String> {
    let mut words = Vec::new();
    let (mut word, mut quote) = (None::<String>, None);
    for c in line.chars() {
        match quote {
            Some(q) if c == q => quote = None,
            Some(_) => word.get_or_insert_default().push(c),
            None if c == '\'' || c == '"' => {
                quote = Some(c);
                word.get_or_insert_default();
            }
            None if c == ' ' => words.extend(word.take()),
            None => word.get_or_insert_default().push(c),
        }
    }
    words.extend(word);
    words
}

struct Section {
    title: String,
    lines: Vec<String>,
    progress: bool,
    slow: bool,
}

fn sections(file: &str) -> Vec<Section> {
    let mut sections: Vec<Section> = Vec::new();
    for line in file.lines().filter(|l| !l.is_empty() && !l.starts_with('#')) {
        if let Some(title) = line.strip_prefix("== ") {
            let (progress, slow) = (title.ends_with("[progress]"), title.ends_with("[slow]"));
            sections.push(Section { title: title.to_owned(), lines: Vec::new(), progress, slow });
        } else {
            sections.last_mut().expect("a file begins with a section").lines.push(line.to_owned());
        }
    }
    sections
}

/// Does one line on one side and returns what is to be compared.
async fn step(side: &mut Side, line: &str, input: &str) -> String {
    let (kind, rest) = line.split_once(' ').unwrap_or((line, ""));
    match kind {
        "$" => side.run(rest, input, true),
        "$?" => side.run(rest, input, false),
        "$%" => without_verdict(&side.run(rest, input, true)),
        "&" => {
            let (name, words) = rest.split_once(' ').expect("& name words");
            side.spawn(name, words);
            for line in input.lines() {
                let stdin = side.running(name).stdin.as_mut().expect("stdin is open");
                writeln!(stdin, "{line}").expect("the command reads its input");
            }
            String::new()
        }
        "@" => {
            let (name, text) = rest.split_once(' ').expect("@ name text");
            let stdin = side.running(name).stdin.as_mut().expect("stdin is open");
            writeln!(stdin, "{text}").expect("the command reads its input");
            String::new()
        }
        "!" => {
            let (name, lines) = rest.split_once(' ').expect("! name lines");
            side.finish(name, lines.parse().expect("a number of lines"))
        }
        "?" => {
            let deadline = Instant::now() + OUTPUT_LIMIT;
            while Instant::now() < deadline {
                let printed = side.run(rest, input, false);
                if printed.lines().count() > 1 {
                    return String::new();
                }
                std::thread::sleep(Duration::from_millis(50));
            }
            panic!("{line} printed nothing within {OUTPUT_LIMIT:?}")
        }
        ">" => {
            assert_eq!(rest, "alarm nospace", "the only other step there is");
            let mut clients = side.process.clients().await;
            let own = clients.cluster.member_list(MemberListRequest::default()).await.expect("a member list").into_inner().members[0].id;
            clients.maintenance.alarm(AlarmRequest { action: 1, alarm: 1, member_id: own }).await.expect("an alarm");
            String::new()
        }
        _ => panic!("what is {line:?}?"),
    }
}

async fn run_file(name: &str, file: &str) {
    let Some(reference) = common::reference() else { return };
    let Some(subject) = Kind::subject(Some(&reference)) else { return };
    let slow = common::on_ci() || std::env::var("QUORATE_SLOW_TESTS").is_ok_and(|v| v == "1");
    let verbose = std::env::var_os("QUORATE_ETCDCTL_PRINT").is_some();
    let mut commands = 0;
    for section in sections(file) {
        if section.slow && !slow {
            println!("skipped: {} (takes a minute; runs with CI=true or QUORATE_SLOW_TESTS=1)", section.title);
            continue;
        }
        let mut expected = Side::start(&reference.etcdctl, Kind::Etcd(reference.etcd.clone()), &section).await;
        let mut found = Side::start(&reference.etcdctl, subject.clone(), &section).await;
        let mut lines = section.lines.iter().peekable();
        while let Some(line) = lines.next() {
            let mut input = String::new();
            while let Some(more) = lines.next_if(|l| *l == "<" || l.starts_with("< ")) {
                input += more.strip_prefix("< ").unwrap_or("");
                input.push('\n');
            }
            let etcd = step(&mut expected, line, &input).await;
            let ours = step(&mut found, line, &input).await;
            if verbose {
                println!("{line}\n{etcd}");
            }
            assert!(etcd == ours, "{name}, {}\n{line}\nETCD:\n{etcd}\nFOUND:\n{ours}", section.title);
            commands += 1;
        }
    }
    println!("{name}: {commands} steps, the same");
}

/// Makes a test of each file.
macro_rules! files {
    ($($name:ident)*) => {
        $(#[tokio::test] async fn $name() {
            run_file(stringify!($name), include_str!(concat!("etcdctl/", stringify!($name), ".txt"))).await
        })*
    };
}

files! { kv txn watch lease cluster maintenance }
