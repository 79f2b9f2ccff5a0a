//! The commands `quorate backup` and `quorate restore`: what to save or to list, and what a backup is to become.
//!
//! ```
//! use quorate::cli::{Action, parse};
//!
//! let args = ["restore", "q.backup", "--data-dir=/var/lib/q", "--name", "a", "--bump-revision=7"].map(Into::into);
//! let Action::Restore(restore) = parse(args, [], |_| unreachable!())? else { panic!("nothing else was asked for") };
//! assert_eq!((restore.file.to_str(), restore.options.name.as_str(), restore.options.bump_revision), (Some("q.backup"), "a", 7));
//! # Ok::<(), quorate::Error>(())
//! ```

use std::ffi::OsString;
use std::path::PathBuf;
use std::str::FromStr;

use super::utf8;
use crate::config::{RestoreOptions, TlsFiles, Url, without_user};
use crate::error::{Error, Result};

/// What is to be done with backups.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum BackupCommand {
    /// Make one of a running member.
    Save {
        /// Where it goes: a directory, or a URL.
        dir: PathBuf,
        /// Where members are.
        endpoints: Vec<Url>,
        /// How many are kept; 0: all.
        keep: usize,
        /// The files for members with `https` URLs.
        tls: TlsFiles,
    },
    /// Tell which there are.
    List {
        /// Where they are: a directory, or a URL.
        dir: PathBuf,
        /// Whether to read each of them.
        verify: bool,
        /// One JSON object, instead of a table.
        json: bool,
    },
}

/// A backup to restore.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct RestoreCommand {
    /// The backup: a file, or its URL.
    pub file: PathBuf,
    /// What it is to become.
    pub options: RestoreOptions,
    /// Whether it is to become a node of the embedded mode: which, its variables say. Then an empty `options.data_dir` is that of the
    /// variables, and of the rest only the revision counts.
    pub node: bool,
}

pub(super) const BACKUP_HELP: &str = "Usage:

  quorate backup save DIR [flags]
    Make a backup of a running member into a directory: synced, read back, and only then given its name, which is printed.
    DIR may be a URL: file:///mnt/backups, or s3://bucket/prefix, gs:// and az://, if the build knows object stores (the cargo feature
    `object-store`). Credentials are variables then, such as AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION and AWS_ENDPOINT.

  --endpoints 'http://localhost:2379'
    Where members are, with commas between; the first that can be reached is asked. Those with https:// are asked in TLS.
  --cacert ''
    The file with the CA of https endpoints.
  --cert '', --key ''
    The certificate to show to them, and its key.
  --keep 0
    Remove the oldest backups beyond so many, once the new one is there. 0: none.

  quorate backup list DIR [flags]
    List the backups of a directory or a URL, of which cluster each is, and what came of the last try to make one. Each is read from end to
    end. Exits with 1 if one is damaged.

  --no-verify
    Do not read them.
  --json
    One JSON object.
";

pub(super) const RESTORE_HELP: &str = "Usage:

  quorate restore FILE --data-dir DIR [flags]
    Make a backup into a member of a new cluster. FILE may be the URL of a backup, as `quorate backup save` prints it. No server may use the
    directory; the member that is in it is kept aside, in DIR/old-<time>.
    The new cluster has another id than the one that the backup was made of. All its members are restored from the same file. The same file
    restored again to the same members needs another token: in the place of the first it is refused without.

  --data-dir DIR
    The data directory of the new member.
  --name 'default'
    Its name.
  --initial-cluster 'default=http://localhost:2380'
    All members of the new cluster. Without it the member is alone.
  --initial-advertise-peer-urls 'http://localhost:2380'
    Its peer URLs.
  --initial-cluster-token 'etcd-cluster'
    Tells the new cluster apart from others that the same file was restored to.
  --bump-revision '1000000000'
    How much higher its revision is than the backup's, so that no revision that was seen before comes to stand for something else.
  --node
    Make it into a node of the embedded mode, of which the variables are set as for `quorate embed`: JOIN, ADVERTISE_IP, HOSTNAME and others. It
    has founded a cluster with itself as the only server. --data-dir is KV_DATA_DIR then, unless it is given. The other nodes join it when
    they are started once it serves, without their directories. Of the other flags only --bump-revision is taken.
  --mark-compacted
    Have everything below count as compacted, so that watches from before are told that they have missed something. It is so if the
    revision is bumped, and only then.
";

/// A flag or a word, in order.
enum Word {
    Flag { name: String, value: Option<String> },
    Plain(String),
}

/// What is left of the command line.
struct Words<I>(I);

impl<I: Iterator<Item = OsString>> Words<I> {
    fn next(&mut self) -> Result<Option<Word>> {
        let Some(arg) = self.0.next() else { return Ok(None) };
        let arg = utf8(arg, "argument")?;
        let Some(body) = arg.strip_prefix("--").or_else(|| arg.strip_prefix('-')).filter(|body| !body.is_empty()) else {
            return Ok(Some(Word::Plain(arg)));
        };
        Ok(Some(match body.split_once('=') {
            Some((name, value)) => Word::Flag { name: name.to_owned(), value: Some(value.to_owned()) },
            None => Word::Flag { name: body.to_owned(), value: None },
        }))
    }

    /// The value of a flag: what stands behind its equals sign, or the next word.
    fn value(&mut self, name: &str, value: Option<String>) -> Result<String> {
        match value {
            Some(value) => Ok(value),
            None => utf8(self.0.next().ok_or_else(|| Error::Config(format!("flag --{name} needs a value")))?, name),
        }
    }

    fn parsed<T: FromStr>(&mut self, name: &str, value: Option<String>, right: &str) -> Result<T> {
        let text = self.value(name, value)?;
        text.parse().map_err(|_| Error::Config(format!("invalid value {text:?} for --{name}: it must be {right}")))
    }
}

fn flag(name: &str, value: &Option<String>) -> Result<bool> {
    match value.as_deref() {
        None | Some("true") => Ok(true),
        Some("false") => Ok(false),
        Some(other) => Err(Error::Config(format!("invalid value {other:?} for --{name}: it must be true or false"))),
    }
}

fn urls(name: &str, text: &str) -> Result<Vec<Url>> {
    let wrong = |err| match err {
        Error::Config(what) => Error::Config(format!("invalid value {:?} for --{name}: {what}", without_user(text))),
        err => err,
    };
    text.split(',').map(|url| url.trim().parse::<Url>().map_err(wrong)).collect()
}

/// Understands what follows `backup`; None if help is asked for.
pub(super) fn parse_backup(args: impl IntoIterator<Item = OsString>) -> Result<Option<BackupCommand>> {
    let mut words = Words(args.into_iter());
    let is_save = match words.next()? {
        Some(Word::Plain(word)) if word == "save" => true,
        Some(Word::Plain(word)) if word == "list" => false,
        Some(Word::Flag { name, .. }) if name == "help" || name == "h" => return Ok(None),
        _ => return Err(Error::Config("`quorate backup` is followed by save or list, and a directory".into())),
    };
    let (mut dir, mut endpoints, mut keep, mut verify, mut json) = (None, "http://localhost:2379".to_owned(), 0, true, false);
    let mut tls = TlsFiles::default();
    while let Some(word) = words.next()? {
        match word {
            Word::Plain(word) if dir.is_none() && !word.is_empty() => dir = Some(PathBuf::from(word)),
            Word::Plain(word) => return Err(Error::Config(format!("{word:?} is too much: one directory is meant"))),
            Word::Flag { name, value } => match name.as_str() {
                "help" | "h" => return Ok(None),
                "endpoints" if is_save => endpoints = words.value(&name, value)?,
                "cacert" if is_save => tls.ca = Some(words.value(&name, value)?.into()),
                "cert" if is_save => tls.cert = Some(words.value(&name, value)?.into()),
                "key" if is_save => tls.key = Some(words.value(&name, value)?.into()),
                "keep" if is_save => keep = words.parsed(&name, value, "a number of backups")?,
                "no-verify" if !is_save => verify = !flag(&name, &value)?,
                "json" if !is_save => json = flag(&name, &value)?,
                _ => return Err(Error::Config(format!("--{name} is nothing that this command of `quorate backup` takes"))),
            },
        }
    }
    let dir = dir.ok_or_else(|| Error::Config("`quorate backup` needs the directory of the backups".into()))?;
    // As etcdctl takes them: what has no scheme is spoken to in plain text.
    let endpoints: Vec<_> =
        endpoints.split(',').map(str::trim).map(|url| if url.contains("://") { url.into() } else { format!("http://{url}") }).collect();
    let endpoints = urls("endpoints", &endpoints.join(","))?;
    if tls.ca.is_none() && endpoints.iter().any(Url::is_tls) {
        return Err(Error::Config("--endpoints has https URLs: --cacert has to name the file with their CA".into()));
    }
    Ok(Some(if is_save { BackupCommand::Save { dir, endpoints, keep, tls } } else { BackupCommand::List { dir, verify, json } }))
}

/// Understands what follows `restore`; None if help is asked for.
pub(super) fn parse_restore(args: impl IntoIterator<Item = OsString>) -> Result<Option<RestoreCommand>> {
    let mut words = Words(args.into_iter());
    let (mut file, mut data_dir, mut marked, mut node, mut of_member) = (None, None, None, false, None);
    let mut options = RestoreOptions::new("");
    while let Some(word) = words.next()? {
        match word {
            Word::Plain(word) if file.is_none() && !word.is_empty() => file = Some(PathBuf::from(word)),
            Word::Plain(word) => return Err(Error::Config(format!("{word:?} is too much: one file is restored"))),
            Word::Flag { name, value } => match name.as_str() {
                "help" | "h" => return Ok(None),
                "node" => node = flag(&name, &value)?,
                "data-dir" => data_dir = Some(words.value(&name, value)?).filter(|dir| !dir.is_empty()),
                "name" | "initial-cluster" | "initial-advertise-peer-urls" | "initial-cluster-token" => {
                    let text = words.value(&name, value)?;
                    match name.as_str() {
                        "name" => options.name = text,
                        "initial-cluster" => options.initial_cluster = text,
                        "initial-cluster-token" => options.initial_cluster_token = text,
                        _ => options.initial_advertise_peer_urls = urls(&name, &text)?,
                    }
                    of_member = Some(name);
                }
                "bump-revision" => options.bump_revision = words.parsed(&name, value, "a number of revisions")?,
                "mark-compacted" => marked = Some(flag(&name, &value)?),
                "skip-hash-check" | "wal-dir" | "initial-memory-map-size" => {
                    let what =
                        format!("--{name} of etcdutl is not built: a backup is restored only if it is sound, and into one directory");
                    return Err(Error::Config(what));
                }
                _ => return Err(Error::Config(format!("--{name} is nothing that `quorate restore` takes; --help says what is"))),
            },
        }
    }
    let missing = |what: &str| Error::Config(format!("`quorate restore` needs {what}"));
    if node {
        if let Some(name) = of_member {
            return Err(Error::Config(format!("--{name} is nothing for a node: with --node its variables say so")));
        }
        if marked.is_some_and(|marked| marked != (options.bump_revision > 0)) {
            return Err(Error::Config("--mark-compacted goes with --bump-revision, and with --node it need not be given".into()));
        }
        options.mark_compacted = options.bump_revision > 0;
        options.data_dir = data_dir.unwrap_or_default().into();
        return Ok(Some(RestoreCommand { file: file.ok_or_else(|| missing("the file of a backup"))?, options, node }));
    }
    options.data_dir = data_dir.ok_or_else(|| missing("--data-dir"))?.into();
    options.mark_compacted = marked.unwrap_or(options.bump_revision > 0);
    options.founding()?;
    Ok(Some(RestoreCommand { file: file.ok_or_else(|| missing("the file of a backup"))?, options, node }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(text: &str) -> Vec<OsString> {
        text.split_whitespace().map(Into::into).collect()
    }

    #[test]
    fn what_is_asked_for_is_understood() {
        let save = parse_backup(args("save --endpoints=http://127.0.0.1:1,http://127.0.0.1:2 /b --keep 3")).unwrap().unwrap();
        let endpoints = urls("endpoints", "http://127.0.0.1:1,http://127.0.0.1:2").unwrap();
        assert_eq!(save, BackupCommand::Save { dir: "/b".into(), endpoints: endpoints.clone(), keep: 3, tls: TlsFiles::default() });
        let save = parse_backup(args("save --endpoints=127.0.0.1:1,http://127.0.0.1:2 /b --cacert=ca --cert c --key k")).unwrap().unwrap();
        let tls = TlsFiles { ca: Some("ca".into()), cert: Some("c".into()), key: Some("k".into()) };
        assert_eq!(save, BackupCommand::Save { dir: "/b".into(), endpoints, keep: 0, tls });
        let list = parse_backup(args("list /b --json --no-verify")).unwrap().unwrap();
        assert_eq!(list, BackupCommand::List { dir: "/b".into(), verify: false, json: true });
        let text = "q --data-dir d --name a --initial-cluster a=http://127.0.0.1:1 --initial-advertise-peer-urls http://127.0.0.1:1 \
                    --initial-cluster-token t --bump-revision 0";
        let restore = parse_restore(args(text)).unwrap().unwrap();
        assert_eq!((restore.options.bump_revision, restore.options.mark_compacted), (0, false));
        assert_eq!(restore.options.initial_cluster_token, "t");
        let node = parse_restore(args("q --node --bump-revision=7")).unwrap().unwrap();
        assert!(node.node && !restore.node && node.options.data_dir.as_os_str().is_empty() && node.options.mark_compacted);
        assert_eq!(parse_restore(args("q --node --data-dir=d")).unwrap().unwrap().options.data_dir, PathBuf::from("d"));
        assert!(parse_restore(args("--help")).unwrap().is_none() && parse_backup(args("-h")).unwrap().is_none());
    }

    #[test]
    fn a_password_is_not_repeated() {
        let error = parse_backup(args("save /b --endpoints=http://root:hunter2@127.0.0.1:2379")).unwrap_err().to_string();
        assert!(error.contains("--endpoints") && !error.contains("hunter2"), "{error}");
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (text, culprit) in [
            ("", "save or list"),
            ("prune /b", "save or list"),
            ("list", "directory"),
            ("list /a /b", "\"/b\""),
            ("list /a --keep=1", "--keep"),
            ("save /a --keep=x", "--keep"),
            ("save /a --endpoints=x:y", "--endpoints"),
            ("list /a --cacert=ca", "--cacert"),
            ("save /a --endpoints=https://127.0.0.1:1", "--cacert"),
            ("list /a --json=1", "--json"),
        ] {
            let error = parse_backup(args(text)).unwrap_err().to_string();
            assert!(error.contains(culprit), "{text}: {error}");
        }
        for (text, culprit) in [
            ("q", "--data-dir"),
            ("--data-dir=d", "the file"),
            ("q r --data-dir=d", "\"r\""),
            ("q --data-dir", "needs a value"),
            ("q --data-dir=d --bump-revision=-1", "--bump-revision"),
            ("q --data-dir=d --bump-revision=1 --mark-compacted=false", "mark-compacted is required"),
            ("q --data-dir=d --bump-revision=0 --mark-compacted", "mark-compacted is not allowed"),
            ("q --data-dir=d --initial-cluster=b=http://127.0.0.1:1", "\"default\""),
            ("q --data-dir=d --skip-hash-check", "--skip-hash-check"),
            ("q --data-dir=d --nope", "--nope"),
            ("--node", "the file"),
            ("q --node --name=a", "--name is nothing for a node"),
            ("q --node --bump-revision=0 --mark-compacted", "--mark-compacted"),
        ] {
            let error = parse_restore(args(text)).unwrap_err().to_string();
            assert!(error.contains(culprit), "{text}: {error}");
        }
    }
}
