//! The binary's log: zap's lines from `tracing`'s events.
//!
//! `{"level":"info","ts":"2026-01-02T03:04:05.678901Z","caller":"server.rs:123","msg":"...","field":1}`, in that order, or the same parts
//! with tabs between for people. Only the binary installs this; a program that embeds the library brings its own subscriber.
//!
//! # Invariants
//! - A line is written by one call per output, so that lines of several threads do not mix; all outputs have them in the same order, that of
//!   their times.
//! - Logging never fails the server: a line that an output does not take is lost.
//!
//! # Caveats
//! An output that does not read, such as a full pipe, makes the thread that logs wait, as in etcd.

use std::fmt::{self, Write as _};
use std::fs::{File, OpenOptions};
use std::io::{self, Write as _};
use std::sync::{Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use quorate::Error;
use quorate::cli::{LogConfig, LogFormat, LogLevel, LogOutput};
use tracing::field::{Field, Visit};
use tracing::level_filters::LevelFilter;
use tracing::{Event, Level, Metadata, Subscriber};
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::{Context, Layer, SubscriberExt as _};
use tracing_subscriber::util::SubscriberInitExt as _;

/// Makes the log of this process what `config` says. `now` is the clock for the lines.
///
/// # Errors
/// The file of an output that cannot be opened; a filter that cannot be read.
pub fn install(config: &LogConfig, now: fn() -> SystemTime) -> Result<(), Error> {
    let outputs = config.outputs.iter().map(Output::open).collect::<Result<Vec<_>, Error>>()?;
    let level = match config.level {
        LogLevel::Debug => LevelFilter::DEBUG,
        LogLevel::Info => LevelFilter::INFO,
        LogLevel::Warn => LevelFilter::WARN,
        LogLevel::Error => LevelFilter::ERROR,
    };
    // The libraries below say much of little use to an operator: they are one step quieter.
    let below = match config.level {
        LogLevel::Debug => LevelFilter::INFO,
        LogLevel::Info | LogLevel::Warn => LevelFilter::WARN,
        LogLevel::Error => LevelFilter::ERROR,
    };
    // openraft warns of each heartbeat that does not arrive; the node tells that once.
    let raft = if level < LevelFilter::DEBUG { below.min(LevelFilter::ERROR) } else { below };
    let filter = match &config.filter {
        Some(text) => read_filter(text).map_err(Error::Config)?,
        None => Targets::new().with_default(below).with_target("quorate", level).with_target("openraft", raft),
    };
    let lines = Lines { format: config.format, outputs, turn: Mutex::new(()), now };
    // Fails only if a subscriber is there already, and then there is a log.
    let _ = tracing_subscriber::registry().with(filter).with(lines).try_init();
    Ok(())
}

/// Reads a filter: `level` and `module=level`, with commas between. There are no spans to filter by.
///
/// # Errors
/// What would be right.
pub fn read_filter(text: &str) -> Result<Targets, String> {
    let right = "it must be levels and modules, such as info,quorate::embed=debug,openraft=off";
    text.parse::<Targets>().map_err(|err| format!("the filter of the log is {text:?}: {err}; {right}"))
}

enum Output {
    Stderr,
    Stdout,
    File(File),
}

impl Output {
    fn open(to: &LogOutput) -> Result<Self, Error> {
        match to {
            LogOutput::Stderr => Ok(Output::Stderr),
            LogOutput::Stdout => Ok(Output::Stdout),
            LogOutput::File(path) => match OpenOptions::new().append(true).create(true).open(path) {
                Ok(file) => Ok(Output::File(file)),
                Err(error) => Err(Error::Config(format!("log-outputs is {path:?}; it cannot be opened: {error}"))),
            },
        }
    }

    fn write(&self, line: &[u8]) -> io::Result<()> {
        match self {
            Output::Stderr => io::stderr().lock().write_all(line),
            Output::Stdout => io::stdout().lock().write_all(line),
            // Opened for appending, so that one write is one piece of the file.
            Output::File(file) => (&mut &*file).write_all(line),
        }
    }
}

struct Lines {
    format: LogFormat,
    outputs: Vec<Output>,
    turn: Mutex<()>,
    now: fn() -> SystemTime,
}

impl<S: Subscriber> Layer<S> for Lines {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let mut parts = Parts::default();
        event.record(&mut parts);
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        let line = match self.format {
            LogFormat::Json => json_line(event.metadata(), &parts, (self.now)()),
            LogFormat::Console => console_line(event.metadata(), &parts, (self.now)()),
        };
        for output in &self.outputs {
            let _ = output.write(line.as_bytes());
        }
    }
}

/// An event's message, and its other fields as `,"name":value` each.
#[derive(Default)]
struct Parts {
    message: String,
    fields: String,
    /// Where an event of the `log` crate came from; its own metadata do not tell.
    log_file: Option<String>,
    log_line: Option<u64>,
}

impl Parts {
    fn push(&mut self, field: &Field, value: impl fmt::Display) {
        // These four lead every line, and a name must not come twice.
        let prefix = if matches!(field.name(), "level" | "ts" | "caller" | "msg") { "field." } else { "" };
        let _ = write!(self.fields, ",{}:{value}", quoted(&format!("{prefix}{}", field.name())));
    }
}

impl Visit for Parts {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        match field.name() {
            "message" => {
                let _ = write!(self.message, "{value:?}");
            }
            name if name.starts_with("log.") => {}
            _ => self.push(field, quoted(&format!("{value:?}"))),
        }
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        match field.name() {
            "message" => self.message.push_str(value),
            "log.file" => self.log_file = Some(value.to_owned()),
            name if name.starts_with("log.") => {}
            _ => self.push(field, quoted(value)),
        }
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.push(field, value);
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.push(field, value);
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        if field.name() == "log.line" {
            self.log_line = Some(value);
        } else {
            self.push(field, value);
        }
    }

    fn record_f64(&mut self, field: &Field, value: f64) {
        if value.is_finite() {
            self.push(field, value);
        } else {
            self.push(field, quoted(&value.to_string()));
        }
    }
}

fn json_line(metadata: &Metadata<'_>, parts: &Parts, now: SystemTime) -> String {
    let (level, caller, msg) = (level_name(metadata), quoted(&caller(metadata, parts)), quoted(&parts.message));
    format!("{{\"level\":\"{level}\",\"ts\":\"{}\",\"caller\":{caller},\"msg\":{msg}{}}}\n", timestamp(now), parts.fields)
}

fn console_line(metadata: &Metadata<'_>, parts: &Parts, now: SystemTime) -> String {
    // A line break in a message would let it pass for two lines.
    let message = parts.message.replace('\n', "\\n").replace('\r', "\\r");
    let mut line = format!("{}\t{}\t{}\t{message}", timestamp(now), level_name(metadata), caller(metadata, parts));
    if let Some(fields) = parts.fields.strip_prefix(',') {
        let _ = write!(line, "\t{{{fields}}}");
    }
    line.push('\n');
    line
}

fn level_name(metadata: &Metadata<'_>) -> &'static str {
    match *metadata.level() {
        Level::ERROR => "error",
        Level::WARN => "warn",
        Level::INFO => "info",
        _ => "debug",
    }
}

/// File and line: `server.rs:12`, `raft/log.rs:34`, and for another crate the last two parts of its path.
fn caller(metadata: &Metadata<'_>, parts: &Parts) -> String {
    let file = parts.log_file.as_deref().or(metadata.file()).unwrap_or_else(|| metadata.target());
    let line = parts.log_line.or(metadata.line().map(u64::from)).unwrap_or(0);
    let mut start = file.rmatch_indices(['/', '\\']).nth(1).map_or(0, |(at, _)| at + 1);
    if file[start..].starts_with("src/") {
        start += "src/".len();
    }
    format!("{}:{line}", &file[start..])
}

fn quoted(text: &str) -> String {
    // A string always has a JSON form.
    serde_json::to_string(text).unwrap_or_default()
}

/// The time in UTC to the microsecond, as RFC 3339 has it.
fn timestamp(now: SystemTime) -> String {
    let since = now.duration_since(UNIX_EPOCH).unwrap_or_default();
    let (seconds, micros) = (since.as_secs(), since.subsec_micros());
    let (year, month, day) = civil(seconds / 86_400);
    let (hour, minute, second) = (seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{micros:06}Z")
}

/// The date that many days after 1970-01-01, by counting off what has a fixed length: 400 years, then years, then months.
fn civil(days: u64) -> (u64, u64, u64) {
    const DAYS_IN_400_YEARS: u64 = 146_097;
    let is_leap = |year: u64| year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400));
    let mut year = 1970 + days / DAYS_IN_400_YEARS * 400;
    let mut rest = days % DAYS_IN_400_YEARS;
    loop {
        let length = if is_leap(year) { 366 } else { 365 };
        if rest < length {
            break;
        }
        rest -= length;
        year += 1;
    }
    let february = if is_leap(year) { 29 } else { 28 };
    let mut month = 1;
    for length in [31, february, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31] {
        if rest < length {
            break;
        }
        rest -= length;
        month += 1;
    }
    (year, month, rest + 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{Arc, Mutex};
    use std::time::Duration;

    /// 2026-01-02T03:04:05.678901Z, and a nanosecond that is cut off.
    fn fixed() -> SystemTime {
        UNIX_EPOCH + Duration::new(1_767_323_045, 678_901_999)
    }

    #[derive(Clone, Default)]
    struct Collect(Arc<Mutex<Vec<String>>>);

    impl<S: Subscriber> Layer<S> for Collect {
        fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
            let mut parts = Parts::default();
            event.record(&mut parts);
            // The line of this file changes with every edit.
            let cut = |line: String| line.replace(&format!(":{}", event.metadata().line().unwrap()), ":LINE");
            let mut lines = self.0.lock().unwrap();
            lines.push(cut(json_line(event.metadata(), &parts, fixed())));
            lines.push(cut(console_line(event.metadata(), &parts, fixed())));
        }
    }

    fn lines(log: impl FnOnce()) -> Vec<String> {
        let collect = Collect::default();
        tracing::subscriber::with_default(tracing_subscriber::registry().with(collect.clone()), log);
        collect.0.lock().unwrap().clone()
    }

    #[test]
    fn lines_are_zaps() {
        let got = lines(|| {
            tracing::info!(name = "a", "data-dir" = "b\"c", count = 3u64, neg = -1, ok = true, ratio = 0.5, nan = f64::NAN, list = ?[1, 2], "a \"message\"\nof two lines");
            tracing::error!(msg = "x");
            tracing::trace!("quiet");
        });
        let fields = r#""name":"a","data-dir":"b\"c","count":3,"neg":-1,"ok":true,"ratio":0.5,"nan":"NaN","list":"[1, 2]""#;
        assert_eq!(
            got,
            [
                format!(
                    "{{\"level\":\"info\",\"ts\":\"2026-01-02T03:04:05.678901Z\",\"caller\":\"logging.rs:LINE\",\"msg\":\"a \\\"message\\\"\\nof two lines\",{fields}}}\n"
                ),
                format!("2026-01-02T03:04:05.678901Z\tinfo\tlogging.rs:LINE\ta \"message\"\\nof two lines\t{{{fields}}}\n"),
                "{\"level\":\"error\",\"ts\":\"2026-01-02T03:04:05.678901Z\",\"caller\":\"logging.rs:LINE\",\"msg\":\"\",\"field.msg\":\"x\"}\n".to_owned(),
                "2026-01-02T03:04:05.678901Z\terror\tlogging.rs:LINE\t\t{\"field.msg\":\"x\"}\n".to_owned(),
                "{\"level\":\"debug\",\"ts\":\"2026-01-02T03:04:05.678901Z\",\"caller\":\"logging.rs:LINE\",\"msg\":\"quiet\"}\n".to_owned(),
                "2026-01-02T03:04:05.678901Z\tdebug\tlogging.rs:LINE\tquiet\n".to_owned(),
            ]
        );
        for line in got.iter().step_by(2) {
            serde_json::from_str::<serde_json::Value>(line).unwrap();
        }
    }

    #[test]
    fn a_filter_goes_by_module() {
        let filter = read_filter("warn,quorate::embed=debug,openraft=off").unwrap();
        for (target, level, logged) in [
            ("quorate::embed::probe", Level::DEBUG, true),
            ("quorate::embed", Level::TRACE, false),
            ("quorate::server", Level::INFO, false),
            ("quorate::server", Level::WARN, true),
            ("openraft::engine", Level::ERROR, false),
        ] {
            assert_eq!(filter.would_enable(target, &level), logged, "{target} {level}");
        }
        let why = read_filter("quorate=loud").unwrap_err();
        assert!(why.contains("\"quorate=loud\"") && why.contains("quorate::embed=debug"), "{why}");
    }

    #[test]
    fn dates() {
        for (seconds, want) in [
            (0, "1970-01-01T00:00:00.000000Z"),
            (951_782_399, "2000-02-28T23:59:59.000000Z"),
            (951_782_400, "2000-02-29T00:00:00.000000Z"),
            (951_868_800, "2000-03-01T00:00:00.000000Z"),
            (1_798_761_599, "2026-12-31T23:59:59.000000Z"),
            (4_107_542_400, "2100-03-01T00:00:00.000000Z"),
            (253_402_300_799, "9999-12-31T23:59:59.000000Z"),
        ] {
            assert_eq!(timestamp(UNIX_EPOCH + Duration::from_secs(seconds)), want);
        }
        assert_eq!(timestamp(UNIX_EPOCH - Duration::from_secs(1)), "1970-01-01T00:00:00.000000Z");
    }
}
