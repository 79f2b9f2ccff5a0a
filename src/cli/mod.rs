//! What the command line, the environment and the configuration file ask for, in etcd's words.
//!
//! [`parse`] is a pure function from arguments, variables and a way to read a file to an [`Action`]; the binary does what it says. Nothing
//! here reads a clock, the real environment or (but for [`read_config_file`]) a disk, and no input makes it panic.
//!
//! ```
//! use quorate::cli::{Action, parse};
//!
//! let args = ["--name=node-1", "-election-timeout", "2000", "--pre-vote=false"].map(Into::into);
//! let env = [("ETCD_NAME".into(), "shadowed".into()), ("ETCD_MAX_TXN_OPS".into(), "256".into())];
//! let Action::Run(run) = parse(args, env, |_| unreachable!("no file is named"))? else { panic!("nothing asks for help") };
//! assert_eq!((run.config.name.as_str(), run.config.max_txn_ops, run.config.pre_vote), ("node-1", 256, false));
//!
//! let error = parse(["--nmae=x".into()], [], |_| unreachable!()).unwrap_err().to_string();
//! assert!(error.contains("--nmae"));
//! # Ok::<(), quorate::Error>(())
//! ```
//!
//! # Precedence
//! As in etcd: a configuration file, named by `--config-file` or `ETCD_CONFIG_FILE`, makes all flags and variables be ignored (flags must
//! still be well-formed). Without one, a flag beats its variable, and a variable beats the default. Of a repeated flag the last counts. An
//! empty variable is as good as none.
//!
//! # Where this differs from etcd
//! - Every wrong flag, variable, file or combination exits with 2; etcd exits with 1 for some of them.
//! - A variable that a flag shadows is a warning; etcd, against its own documentation, refuses to start.
//! - An unknown key in a file is a warning; etcd says nothing. A second document in a file is refused; etcd takes no notice of it.
//! - Negative times are refused; etcd takes them for zero or worse.
//! - `--listen-client-urls` without `--advertise-client-urls` is fine unless it listens everywhere; etcd always refuses it.
//! - `--client-cert-auth` is refused where there is no CA, or no `https` URL at all to ask for certificates at; etcd takes the system's CAs, and
//!   lets everybody in. A CA for clients may come with plain URLs beside the `https` ones; the log then warns of them.
//! - Flags for what is not built are refused, see the table in `flags.rs` for the rule.

mod backup;
mod flags;
mod log;
mod yaml;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fmt::Write as _;
use std::io;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use crate::config::{Config, ETCD_VERSION, without_user};
use crate::error::{Error, Result};
pub use backup::{BackupCommand, RestoreCommand};
use flags::{Act, FLAGS, Flag, Kind};
pub use log::PrintLog;
pub(crate) use yaml::plain_entries;

/// Largest configuration file: 1 MiB. [`read_config_file`] refuses a larger one, and [`parse`] too.
pub const CONFIG_FILE_BYTES_MAX: usize = 1024 * 1024;

/// What the command line asks for.
#[derive(Clone, Debug)]
pub enum Action {
    /// Print this text on standard output and exit with 0.
    Print(String),
    /// Run a server.
    Run(Box<Run>),
    /// Print the requests in a member's log, and exit.
    PrintLog(PrintLog),
    /// Make backups or list them, and exit.
    Backup(BackupCommand),
    /// Make a backup into a member of a new cluster, and exit.
    Restore(Box<RestoreCommand>),
}

/// A server to run.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Run {
    /// Its configuration, already validated.
    pub config: Config,
    /// Where and how to log.
    pub log: LogConfig,
    /// What the log should say about how the configuration came about, in order. Values are never in it: they may be secret.
    pub notes: Vec<Note>,
}

/// A remark for the log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Note {
    /// Whether it is a warning, or mere information.
    pub is_warning: bool,
    /// The sentence.
    pub text: String,
}

impl Note {
    fn warning(text: String) -> Self {
        Note { is_warning: true, text }
    }

    fn info(text: String) -> Self {
        Note { is_warning: false, text }
    }
}

/// Where and how the binary logs.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct LogConfig {
    /// The least level that is logged.
    pub level: LogLevel,
    /// More exactly, by module: `info,quorate::embed=debug`, as `tracing_subscriber` reads it. It takes the level's place.
    pub filter: Option<String>,
    /// How a line looks.
    pub format: LogFormat,
    /// Where lines go; to each of these.
    pub outputs: Vec<LogOutput>,
}

impl Default for LogConfig {
    fn default() -> Self {
        LogConfig { level: LogLevel::Info, filter: None, format: LogFormat::Json, outputs: vec![LogOutput::Stderr] }
    }
}

/// The least level that is logged. etcd's `panic` and `fatal` are `Error`: the reason for an exit is always logged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogLevel {
    /// Everything.
    Debug,
    /// What happens in the course of things.
    Info,
    /// What may need attention.
    Warn,
    /// What failed.
    Error,
}

/// How a line looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    /// One JSON object.
    Json,
    /// Time, level, caller, message and fields, with tabs between.
    Console,
}

/// Where lines go.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum LogOutput {
    /// Standard error.
    Stderr,
    /// Standard output.
    Stdout,
    /// The end of this file.
    File(PathBuf),
}

impl FromStr for LogOutput {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        match text {
            "default" | "stderr" => Ok(LogOutput::Stderr),
            "stdout" => Ok(LogOutput::Stdout),
            "systemd/journal" => Err("logging to the journal is not built yet; under systemd stderr goes there by itself".into()),
            "" => Err("it must be default, stderr, stdout or the path of a file".into()),
            path => Ok(LogOutput::File(path.into())),
        }
    }
}

/// What the settings have made so far.
#[derive(Clone, Debug, Default, PartialEq)]
struct Draft {
    config: Config,
    log: LogConfig,
}

/// One setting that was given.
struct Given {
    flag: &'static Flag,
    /// As the operator wrote it: `--name`, `ETCD_NAME`, or the key in the file.
    spelled: String,
    value: String,
    /// Whether it was written with `experimental-` before its name.
    is_old: bool,
}

/// Understands the arguments (without the program's name) and the variables; `read_file` reads the configuration file, if one is named.
///
/// # Errors
/// [`Error::Config`], whose text names the flag, variable or key, and says what would be right. The binary exits with 2.
pub fn parse(
    args: impl IntoIterator<Item = OsString>,
    env: impl IntoIterator<Item = (OsString, OsString)>,
    read_file: impl FnOnce(&Path) -> io::Result<Vec<u8>>,
) -> Result<Action> {
    let mut args = args.into_iter().peekable();
    if args.next_if(|arg| arg == "log").is_some() {
        return Ok(log::parse(args)?.map_or_else(|| Action::Print(log::HELP.into()), Action::PrintLog));
    }
    if args.next_if(|arg| arg == "backup").is_some() {
        return Ok(backup::parse_backup(args)?.map_or_else(|| Action::Print(backup::BACKUP_HELP.into()), Action::Backup));
    }
    if args.next_if(|arg| arg == "restore").is_some() {
        let restore = backup::parse_restore(args)?.map(|restore| Action::Restore(Box::new(restore)));
        return Ok(restore.unwrap_or_else(|| Action::Print(backup::RESTORE_HELP.into())));
    }
    let line = match parse_args(args)? {
        Line::Help => return Ok(Action::Print(help())),
        Line::Version => return Ok(Action::Print(version())),
        Line::Settings(line) => line,
    };
    let (mut draft, mut notes) = (Draft::default(), Vec::new());
    let mut vars = read_env(env)?;
    let file_var = vars.remove("ETCD_CONFIG_FILE").filter(|path| !path.is_empty());
    match line.config_file.or(file_var) {
        Some(path) => {
            notes.push(Note::info(format!(
                "loaded server configuration, other configuration command line flags and environment variables will be ignored if provided: {path}"
            )));
            let ignored =
                line.given.iter().map(|given| given.spelled.as_str()).chain(vars.keys().filter_map(|var| known(var).map(|_| var.as_str())));
            let ignored = ignored.collect::<Vec<_>>().join(", ");
            if !ignored.is_empty() {
                notes.push(Note::warning(format!("ignored, because there is a configuration file: {ignored}")));
            }
            let about = |why: &dyn std::fmt::Display| Error::Config(format!("{path:?} cannot be used as configuration file: {why}"));
            let bytes = read_file(Path::new(&path)).map_err(|error| about(&error))?;
            if bytes.len() > CONFIG_FILE_BYTES_MAX {
                return Err(about(&format!("it is larger than {CONFIG_FILE_BYTES_MAX} bytes")));
            }
            let text = String::from_utf8(bytes).map_err(|_| about(&"it is not UTF-8"))?;
            let mut take = || {
                let (given, remarks) = yaml::entries(&text)?;
                notes.extend(remarks);
                apply(&mut draft, &mut notes, &given)
            };
            take().map_err(|error| match error {
                Error::Config(text) => Error::Config(format!("{text} (in {path})")),
                other => other,
            })?;
        }
        None => {
            let mut given = from_env(vars, &mut notes, &line.given);
            given.extend(line.given);
            apply(&mut draft, &mut notes, &given)?;
        }
    }
    draft.config.validate()?;
    Ok(Action::Run(Box::new(Run { config: draft.config, log: draft.log, notes })))
}

/// Reads a configuration file, for [`parse`].
///
/// # Errors
/// Those of opening and reading, and [`io::ErrorKind::FileTooLarge`] beyond [`CONFIG_FILE_BYTES_MAX`].
pub fn read_config_file(path: &Path) -> io::Result<Vec<u8>> {
    use std::io::Read;
    let limit = CONFIG_FILE_BYTES_MAX as u64;
    let mut bytes = Vec::new();
    std::fs::File::open(path)?.take(limit + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > limit {
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, format!("it is larger than {limit} bytes")));
    }
    Ok(bytes)
}

/// What the command line says.
enum Line {
    Help,
    Version,
    Settings(Settings),
}

struct Settings {
    given: Vec<Given>,
    config_file: Option<String>,
}

/// Reads the arguments in Go's way: one dash or two, `-flag value` or `-flag=value`, and a bare flag for `true`.
fn parse_args(args: impl IntoIterator<Item = OsString>) -> Result<Line> {
    let mut settings = Settings { given: Vec::new(), config_file: None };
    let mut wants_version = false;
    // Values are tried here, so that a wrong flag is found even if a file makes it be ignored.
    let mut trial = Draft::default();
    let mut args = args.into_iter();
    while let Some(arg) = args.next() {
        let arg = utf8(arg, "argument")?;
        let body = match arg.strip_prefix("--").or_else(|| arg.strip_prefix('-')) {
            Some("") if arg == "--" => {
                if let Some(next) = args.next() {
                    return Err(stray(&utf8(next, "argument")?));
                }
                break;
            }
            Some(body) if !body.is_empty() => body,
            _ => return Err(stray(&arg)),
        };
        if body.starts_with(['-', '=']) {
            return Err(Error::Config(format!("{arg:?} is not a flag; write --flag value or --flag=value")));
        }
        let (name, value) = match body.split_once('=') {
            Some((name, value)) => (name, Some(value.to_owned())),
            None => (body, None),
        };
        if matches!(name, "help" | "h") {
            return Ok(Line::Help);
        }
        let Some((flag, is_old)) = flags::find(name) else {
            let near = flags::nearest(name).map(|name| format!("; did you mean --{name}?")).unwrap_or_default();
            return Err(Error::Config(format!("unknown flag --{name}{near}")));
        };
        let spelled = format!("--{name}");
        let value = match value {
            Some(value) => value,
            None if flag.kind == Kind::Bool => "true".to_owned(),
            None => utf8(args.next().ok_or_else(|| Error::Config(format!("flag {spelled} needs a value")))?, &spelled)?,
        };
        let given = Given { flag, spelled, value, is_old };
        match (&flag.act, flag.name) {
            (Act::Command, "config-file") => settings.config_file = (!given.value.is_empty()).then_some(given.value),
            (Act::Command, _) => {
                flag.kind.check(&given.value).map_err(|why| invalid(&given, &why))?;
                wants_version = flag.kind.same(&given.value, "true");
            }
            _ => {
                read_value(&mut trial, &given)?;
                settings.given.push(given);
            }
        }
    }
    Ok(if wants_version { Line::Version } else { Line::Settings(settings) })
}

/// An argument that is no flag, nor a command.
fn stray(arg: &str) -> Error {
    match arg {
        "gateway" | "grpc-proxy" => Error::Config(format!("the command {arg} of etcd is not built")),
        _ => Error::Config(format!(
            "unknown command or stray argument {arg:?}; flags start with a dash, and true or false needs --flag=false"
        )),
    }
}

fn utf8(text: OsString, what: &str) -> Result<String> {
    text.into_string().map_err(|text| Error::Config(format!("{what}: {:?} is not UTF-8", text.to_string_lossy())))
}

/// The variables that begin with `ETCD_` and are not empty, in a fixed order.
fn read_env(env: impl IntoIterator<Item = (OsString, OsString)>) -> Result<BTreeMap<String, String>> {
    let mut vars = BTreeMap::new();
    for (name, value) in env {
        let Ok(name) = name.into_string() else { continue };
        // etcd reads ETCD_UNSUPPORTED_ARCH on platforms of which it is unsure; here there are none such.
        if name.starts_with("ETCD_") && name != "ETCD_UNSUPPORTED_ARCH" && !value.is_empty() {
            let value = if known(&name).is_some() { utf8(value, &name)? } else { String::new() };
            vars.insert(name, value);
        }
    }
    Ok(vars)
}

/// The flag that a variable stands for.
fn known(variable: &str) -> Option<(&'static Flag, bool)> {
    let name = variable.strip_prefix("ETCD_").filter(|name| !name.contains(|c: char| c.is_ascii_lowercase() || c == '-'))?;
    flags::find(&name.to_ascii_lowercase().replace('_', "-"))
        .filter(|(flag, _)| !matches!(flag.act, Act::Command) || flag.name == "config-file")
}

/// The settings that variables give and flags do not.
fn from_env(vars: BTreeMap<String, String>, notes: &mut Vec<Note>, flags: &[Given]) -> Vec<Given> {
    let mut given: BTreeMap<&'static str, Given> = BTreeMap::new();
    for (variable, value) in vars {
        let Some((flag, is_old)) = known(&variable) else {
            notes.push(Note::warning(format!("unrecognized environment variable {variable}")));
            continue;
        };
        if let Some(winner) = flags.iter().rev().find(|given| given.flag.name == flag.name) {
            notes.push(Note::warning(format!("environment variable {variable} is shadowed by flag {}", winner.spelled)));
            continue;
        }
        notes.push(Note::info(format!("recognized and used environment variable {variable}")));
        // The name without "experimental" wins; the fixed order alone would let the other, which comes later, win at times.
        if !is_old || !given.contains_key(flag.name) {
            given.insert(flag.name, Given { flag, spelled: variable, value, is_old });
        }
    }
    given.into_values().collect()
}

/// Makes the settings take effect, the later over the earlier, and remarks on those without effect.
fn apply(draft: &mut Draft, notes: &mut Vec<Note>, given: &[Given]) -> Result<()> {
    for one in given {
        read_value(draft, one)?;
        let is_default = one.flag.kind.same(&one.value, one.flag.default);
        match one.flag.act {
            Act::Refuse(why) if !is_default => {
                return Err(Error::Config(format!("{} cannot be honoured: {why}; leave it out", one.spelled)));
            }
            Act::NoOp(why) if !is_default => notes.push(Note::warning(format!("{} has no effect: {why}", one.spelled))),
            _ => {}
        }
        if one.is_old {
            notes.push(Note::warning(format!("{} is the old name of {}", one.spelled, one.flag.name)));
        }
    }
    Ok(())
}

/// Puts one value where it belongs, or only checks it.
fn read_value(draft: &mut Draft, given: &Given) -> Result<()> {
    match given.flag.act {
        Act::Set(set) => set(draft, &given.value),
        Act::Command | Act::NoOp(_) | Act::Refuse(_) => given.flag.kind.check(&given.value),
    }
    .map_err(|why| invalid(given, &why))
}

fn invalid(given: &Given, why: &str) -> Error {
    // A URL may have a password in it.
    Error::Config(format!("invalid value {:?} for {}: {why}", without_user(&given.value), given.spelled))
}

/// What `--version` prints: etcd's own first line, because scripts look for it, then ours.
fn version() -> String {
    let arch = match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        "powerpc64" => "ppc64le",
        arch => arch,
    };
    let ours = env!("CARGO_PKG_VERSION");
    format!("etcd Version: {ETCD_VERSION}\nquorate Version: {ours}\nOS/Arch: {}/{arch}\n", std::env::consts::OS)
}

/// What `--help` prints.
fn help() -> String {
    let mut text = String::from(
        "Usage:\n\n  quorate [flags]\n    Start a server.\n\n  quorate log --data-dir DIR\n    Print the requests in a member's log; `quorate log --help` says more.\n\n\
         \x20 quorate backup save|list DIR\n    Make a backup of a running member, or list those that there are; `quorate backup --help` says more.\n\n\
         \x20 quorate restore FILE --data-dir DIR\n    Make a backup into a new cluster; `quorate restore --help` says more.\n\n\
         \x20 quorate embed\n    Run one node of the embedded mode, told by variables; `quorate embed --help` lists them.\n\n\
         \x20 quorate node grow|replace|remove ...\n    Change the servers of a cluster of such nodes; `quorate node --help` says more.\n\n\
         A flag is written --flag value, --flag=value or -flag=value, and one of true or false also --flag alone.\n\
         Each can be given as a variable too: --data-dir is ETCD_DATA_DIR. A flag goes before its variable.\n",
    );
    let mut group = "";
    // Writing to a String cannot fail.
    for flag in FLAGS.iter().filter(|flag| !flag.group.is_empty()) {
        if flag.group != group {
            group = flag.group;
            let _ = write!(text, "\n{group}:\n");
        }
        let _ = match flag.act {
            Act::Command => writeln!(text, "  --{}\n    {}", flag.name, flag.help),
            _ => writeln!(text, "  --{} '{}'\n    {}", flag.name, flag.default, flag.help),
        };
    }
    for (title, is_refused) in [
        ("Taken without effect, for etcd's sake", false),
        ("Refused unless they have etcd's default, because what they ask for is not built", true),
    ] {
        let is_of_sort = |flag: &&Flag| if is_refused { matches!(flag.act, Act::Refuse(_)) } else { matches!(flag.act, Act::NoOp(_)) };
        let _ = write!(text, "\n{title}:\n");
        let mut line = String::from(" ");
        for flag in FLAGS.iter().filter(is_of_sort) {
            if line.len() + flag.name.len() > 110 {
                let _ = writeln!(text, "{line}");
                line = String::from(" ");
            }
            let _ = write!(line, " --{}", flag.name);
        }
        let _ = writeln!(text, "{line}");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Runs the scripts under `tests/scripts/cli`. A case is a title, then what is given, then `---`, then what comes of it:
    ///
    /// ```text
    /// a flag beats its variable
    /// $ --name=from-flag --data-dir 'a b'
    /// ENV ETCD_NAME=from-variable
    /// FILE etcd.yml
    /// | name: from-file
    /// ---
    /// name: "from-flag"
    /// warning: environment variable ETCD_NAME is shadowed by flag --name
    /// ```
    ///
    /// Of the settings only those are shown that differ from the default. With `UPDATE_SCRIPTS=1` the results are written anew, to be
    /// read before they are believed.
    #[test]
    fn scripts() {
        let update = std::env::var_os("UPDATE_SCRIPTS").is_some();
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/scripts/cli");
        let mut files: Vec<PathBuf> = std::fs::read_dir(&dir).unwrap().map(|entry| entry.unwrap().path()).collect();
        files.sort();
        assert!(!files.is_empty());
        for file in files {
            let text = std::fs::read_to_string(&file).unwrap();
            let cases: Vec<&str> = text.split("\n\n").map(str::trim).filter(|case| !case.is_empty()).collect();
            let run: Vec<String> = cases.iter().map(|case| run_case(case)).collect();
            if update {
                std::fs::write(&file, run.join("\n\n") + "\n").unwrap();
            } else {
                for (want, got) in cases.iter().zip(&run) {
                    assert_eq!(want, got, "{}", file.display());
                }
            }
        }
    }

    fn run_case(case: &str) -> String {
        if case.starts_with('#') {
            return case.to_owned();
        }
        let given = case.split("\n---").next().unwrap();
        let (mut args, mut env, mut file_name, mut file) = (Vec::new(), Vec::new(), None, String::new());
        for line in given.lines().skip(1) {
            if let Some(rest) = line.strip_prefix('$') {
                args.extend(words(rest).into_iter().map(OsString::from));
            } else if let Some(rest) = line.strip_prefix("ENV ") {
                env.extend(words(rest).iter().map(|word| word.split_once('=').unwrap()).map(|(k, v)| (k.into(), v.into())));
            } else if let Some(name) = line.strip_prefix("FILE ") {
                file_name = Some(PathBuf::from(name));
            } else {
                file += line.strip_prefix("| ").or(line.strip_prefix('|')).unwrap_or_else(|| panic!("{line:?} in {case}"));
                file.push('\n');
            }
        }
        let read = |path: &Path| match file_name {
            Some(name) if name == path => Ok(file.into_bytes()),
            _ => Err(io::Error::new(io::ErrorKind::NotFound, "no such file")),
        };
        let outcome = match parse(args, env, read) {
            Ok(Action::Print(text)) => format!("prints: {}", text.lines().next().unwrap_or_default()),
            Ok(Action::PrintLog(print)) => format!("{print:?}"),
            Ok(Action::Backup(command)) => format!("{command:?}"),
            Ok(Action::Restore(command)) => format!("{command:?}"),
            Ok(Action::Run(run)) => {
                let mut lines = differences(&run.config, &Config::default());
                lines.extend(differences(&run.log, &LogConfig::default()).into_iter().map(|line| format!("log {line}")));
                let kind = |note: &Note| if note.is_warning { "warning" } else { "info" };
                lines.extend(run.notes.iter().map(|note| format!("{}: {}", kind(note), note.text)));
                if lines.is_empty() { "all default".to_owned() } else { lines.join("\n") }
            }
            Err(error) => format!("error: {error}"),
        };
        format!("{given}\n---\n{outcome}")
    }

    /// Words between blanks, or between single quotes.
    fn words(line: &str) -> Vec<String> {
        let (mut words, mut word, mut quoted) = (Vec::new(), None::<String>, false);
        for c in line.chars() {
            match c {
                '\'' => {
                    quoted = !quoted;
                    word.get_or_insert_default();
                }
                ' ' if !quoted => words.extend(word.take()),
                c => word.get_or_insert_default().push(c),
            }
        }
        words.extend(word);
        words
    }

    /// The fields that differ, one per line, as `Debug` shows them.
    fn differences(left: &impl std::fmt::Debug, right: &impl std::fmt::Debug) -> Vec<String> {
        let fields = |value: &dyn std::fmt::Debug| {
            let mut fields: Vec<String> = Vec::new();
            for line in format!("{value:#?}").lines().filter(|line| line.starts_with("    ")) {
                let is_new = !line.starts_with("     ") && line.contains(": ");
                match fields.last_mut() {
                    Some(field) if !is_new => field.push_str(line.trim()),
                    _ => fields.push(line.trim().to_owned()),
                }
            }
            fields
        };
        let pairs = fields(left).into_iter().zip(fields(right));
        pairs
            .filter(|(left, right)| left != right)
            .map(|(left, _)| left.trim_end_matches(',').replace(",]", "]").replace(",)", ")"))
            .collect()
    }

    /// The names of every flag of etcd 3.5 and 3.7, as a file beside this one: each must be known.
    #[test]
    fn every_flag_of_etcd_is_known() {
        let names = include_str!("../../tests/etcd-flags.txt");
        let unknown: Vec<&str> = names.lines().filter(|name| !name.starts_with('#') && flags::find(name).is_none()).collect();
        assert_eq!(unknown, Vec::<&str>::new());
    }

    #[test]
    fn names_that_are_not_utf8_are_named() {
        use std::os::unix::ffi::OsStringExt;
        let bad = || OsString::from_vec(b"--name=\xff".to_vec());
        let no_file = |_: &Path| -> io::Result<Vec<u8>> { unreachable!() };
        assert!(parse([bad()], [], no_file).unwrap_err().to_string().contains("is not UTF-8"));
        let error = parse([], [("ETCD_NAME".into(), bad())], no_file).unwrap_err().to_string();
        assert!(error.contains("ETCD_NAME"), "{error}");
        assert!(parse([], [("OTHER".into(), bad()), ("ETCD_OTHER".into(), bad())], no_file).is_ok());
    }

    #[test]
    fn a_large_file_is_refused() {
        let error = parse(["--config-file=x".into()], [], |_| Ok(vec![b' '; CONFIG_FILE_BYTES_MAX + 1])).unwrap_err().to_string();
        assert!(error.contains("larger than"), "{error}");
    }

    #[test]
    fn hostile_files_end() {
        let bomb = "a: &a [x,x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b,*b,*b]\n\
                    d: &d [*c,*c,*c,*c,*c,*c,*c,*c,*c,*c]\ne: [*d,*d,*d,*d,*d,*d,*d,*d,*d,*d]\n";
        for text in [bomb.to_owned(), "[".repeat(100_000), "{a: ".repeat(100_000), "- ".repeat(100_000), "a: ".repeat(100_000)] {
            let result = parse(["--config-file=x".into()], [], |_| Ok(text.clone().into_bytes()));
            assert!(result.is_err(), "{}", &text[..20]);
        }
    }

    proptest! {
        /// Whatever is typed, there is an answer, and an accepted configuration is a valid one.
        #[test]
        fn nothing_panics(args in prop::collection::vec(argument(), 0..5), vars in prop::collection::vec(("(ETCD_[A-Z_]{0,12}|ETCD_NAME|ETCD_LISTEN_CLIENT_URLS)", value()), 0..3), file in prop::option::of(yaml_text())) {
            let mut args: Vec<OsString> = args.into_iter().map(OsString::from).collect();
            if file.is_some() {
                args.push("--config-file=f".into());
            }
            let env = vars.into_iter().map(|(name, value)| (name.into(), value.into()));
            if let Ok(Action::Run(run)) = parse(args, env, |_| file.map(String::into_bytes).ok_or_else(|| io::ErrorKind::NotFound.into())) {
                prop_assert!(run.config.validate().is_ok());
            }
        }
    }

    fn flag_name() -> impl Strategy<Value = String> {
        prop_oneof![4 => prop::sample::select(FLAGS.iter().map(|flag| flag.name.to_owned()).collect::<Vec<_>>()), 1 => "[a-z-]{0,10}"]
    }

    fn value() -> impl Strategy<Value = String> {
        prop_oneof![
            "\\PC{0,12}",
            "-?(0[xob])?[0-9a-f_]{1,20}",
            "[-+]?([0-9]{0,20}\\.?[0-9]{0,25}(ns|us|ms|s|m|h|µs)){1,3}",
            "(http|https|unix|unixs)://(\\[?[0-9a-f:.]{0,12}\\]?|localhost)?:[0-9]{0,6}(,x)?",
            Just("true".to_owned()),
        ]
    }

    fn argument() -> impl Strategy<Value = String> {
        (prop::sample::select(vec!["--", "-", ""]), flag_name(), prop::option::of(value()))
            .prop_map(|(dashes, name, value)| format!("{dashes}{name}{}", value.map(|value| format!("={value}")).unwrap_or_default()))
    }

    fn yaml_text() -> impl Strategy<Value = String> {
        let line = (flag_name(), value()).prop_map(|(name, value)| format!("{name}: {value}\n"));
        prop_oneof![prop::collection::vec(line, 0..6).prop_map(|lines| lines.concat()), "[\\[\\]{}:,&*!|>'\"%@`#a-z0-9 \n-]{0,60}"]
    }
}
