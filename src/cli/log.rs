//! The command `quorate log`: which log to print, and how.
//!
//! ```
//! use quorate::cli::{Action, parse};
//!
//! let args = ["log", "--data-dir=/var/lib/q", "--from", "17", "--json"].map(Into::into);
//! let Action::PrintLog(print) = parse(args, [], |_| unreachable!())? else { panic!("nothing else was asked for") };
//! assert_eq!((print.wal_dir.to_str(), print.from, print.json), (Some("/var/lib/q/member/wal"), 17, true));
//! # Ok::<(), quorate::Error>(())
//! ```

use std::ffi::OsString;
use std::path::PathBuf;

use super::utf8;
use crate::error::{Error, Result};

/// A log to print.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct PrintLog {
    /// Where its segments are.
    pub wal_dir: PathBuf,
    /// The first entry to print; what the log does not hold any more is left out.
    pub from: u64,
    /// One JSON object for each entry, instead of one line for each request.
    pub json: bool,
}

pub(super) const HELP: &str = "Usage:

  quorate log --data-dir DIR [flags]
    Print the requests in a member's log, in the order in which they are carried out. The member may be running; nothing is changed.

  --data-dir DIR
    The member's data directory.
  --wal-dir DIR
    Where its log is, if it was started with --wal-dir.
  --from INDEX
    The first entry to print. Entries are numbered from the cluster's foundation on.
  --json
    One JSON object for each entry. Bytes beyond plain ASCII are written \\xNN, a backslash is written twice.

A line has the entry's index, its term, and one request. All requests of one entry were made durable together; they are carried out one
after the other, and may be refused then, which the log does not show. Entries after the line that says so may yet be replaced.
";

/// Understands what follows `log`; None if help is asked for.
pub(super) fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Option<PrintLog>> {
    let (mut data_dir, mut wal_dir, mut from, mut json) = (None, None, 0, false);
    let mut args = args.into_iter();
    while let Some(arg) = args.next() {
        let arg = utf8(arg, "argument")?;
        let body = arg.strip_prefix("--").or_else(|| arg.strip_prefix('-')).unwrap_or_default();
        let (name, value) = match body.split_once('=') {
            Some((name, value)) => (name, Some(value.to_owned())),
            None => (body, None),
        };
        let mut take = || match value.clone() {
            Some(value) => Ok(value),
            None => utf8(args.next().ok_or_else(|| Error::Config(format!("flag --{name} needs a value")))?, name),
        };
        match name {
            "help" | "h" => return Ok(None),
            "data-dir" => data_dir = Some(PathBuf::from(take()?)),
            "wal-dir" => wal_dir = Some(PathBuf::from(take()?)),
            "from" => {
                let text = take()?;
                from =
                    text.parse().map_err(|_| Error::Config(format!("invalid value {text:?} for --from: it must be an entry's index")))?;
            }
            "json" if value.is_none() => json = true,
            _ => return Err(Error::Config(format!("{arg:?} is nothing that `quorate log` takes: --data-dir, --wal-dir, --from, --json"))),
        }
    }
    let wal_dir = wal_dir.or_else(|| Some(data_dir?.join("member").join("wal")));
    let wal_dir = wal_dir.ok_or_else(|| Error::Config("`quorate log` needs --data-dir".into()))?;
    Ok(Some(PrintLog { wal_dir, from, json }))
}
