//! What backups and their restoration are told: [`BackupConfig`] and [`RestoreOptions`]; and how the [place](Where) of backups is written.
//!
//! ```text
//! /mnt/backups              a directory
//! file:///mnt/backups       the same one
//! s3://bucket/prefix        an object store: also gs://, az:// (cargo feature `object-store`)
//! ```

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use croner::Cron;

use super::{Config, Url, without_user};
use crate::error::{Error, Result};

/// Longest random delay of a backup. Beyond it [`BackupConfig::validate`] refuses: a schedule would say little.
pub const JITTER_MAX: Duration = Duration::from_secs(24 * 60 * 60);

/// How much higher a restored store's revision is than the backup's, unless told otherwise: more than any cluster writes between
/// a backup and the disaster. etcd's documentation recommends the same.
pub const BUMP_REVISION: u64 = 1_000_000_000;

/// Where backups go, when they are made, and which are kept.
///
/// ```
/// use quorate::backup::BackupConfig;
///
/// let mut config = BackupConfig::new("/var/backups/metadata");
/// config.schedule = Some("0 */12 * * *".into()); // at noon and at midnight, UTC
/// config.keep = 14;
/// config.validate()?;
///
/// config.schedule = Some("noon".into());
/// assert!(config.validate().unwrap_err().to_string().contains("\"noon\""));
/// # Ok::<(), quorate::Error>(())
/// ```
#[derive(Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct BackupConfig {
    /// The directory; it is made if it is missing. It is for one member, and one process at a time: whoever comes second is refused.
    ///
    /// Or the URL of an object store, such as `s3://bucket/prefix`, with the cargo feature `object-store`; see [`crate::backup`]. Nobody
    /// holds that: several may make backups there.
    pub dir: PathBuf,
    /// Options of an object store, beside those of the environment, which they beat. Nothing for a directory.
    pub store_options: StoreOptions,
    /// When backups are made by themselves: a cron expression of five fields (minute, hour, day, month, weekday), or of six with seconds
    /// before them, or a name such as `@daily`. In UTC. `None`: only when asked for. Default: `None`.
    pub schedule: Option<String>,
    /// A scheduled backup begins up to this much later, by chance, so that not all members read their disks at once; at most
    /// [`JITTER_MAX`]. Default: 5 s.
    pub jitter: Duration,
    /// How many are kept; older ones go after a new one has been made and verified. 0: no limit. Default: 5.
    pub keep: usize,
    /// How old a backup may get; older ones go as above. The newest stays however old it is. `None`: no limit. Default: `None`.
    pub keep_for: Option<Duration>,
}

impl fmt::Debug for BackupConfig {
    /// The place as error texts show it: somebody may have written credentials into its URL.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let BackupConfig { dir, store_options, schedule, jitter, keep, keep_for } = self;
        let mut fields = f.debug_struct("BackupConfig");
        fields.field("dir", &shown(dir)).field("store_options", store_options).field("schedule", schedule);
        fields.field("jitter", jitter).field("keep", keep).field("keep_for", keep_for).finish()
    }
}

impl BackupConfig {
    /// On demand only, into this directory.
    pub fn new(dir: impl Into<PathBuf>) -> Self {
        let store_options = StoreOptions::default();
        BackupConfig { dir: dir.into(), store_options, schedule: None, jitter: Duration::from_secs(5), keep: 5, keep_for: None }
    }

    /// Checks the settings.
    ///
    /// # Errors
    /// [`Error::Config`], which names the setting and its value.
    pub fn validate(&self) -> Result<()> {
        if self.dir.as_os_str().is_empty() {
            return Err(Error::Config("the directory for backups is empty".into()));
        }
        if let Err(right) = Where::read(&self.dir) {
            return Err(Error::Config(format!("the place of backups is {:?}; {right}", shown(&self.dir))));
        }
        if self.jitter > JITTER_MAX {
            return Err(Error::Config(format!("the jitter of backups is {:?}; at most {JITTER_MAX:?} make sense", self.jitter)));
        }
        if self.keep_for.is_some_and(|age| age.is_zero()) {
            return Err(Error::Config("backups are to be kept for no time at all; leave it out to keep them by number".into()));
        }
        self.cron().map(drop)
    }

    /// The schedule, understood; none when there is none.
    pub(crate) fn cron(&self) -> Result<Option<Cron>> {
        let Some(text) = &self.schedule else { return Ok(None) };
        let cron = Cron::from_str(text);
        let wrong =
            |err| Error::Config(format!("the schedule of backups is {text:?}: {err}; write a cron expression such as 0 */12 * * *"));
        cron.map(Some).map_err(wrong)
    }
}

/// Options of an object store by the names that the crate `object_store` documents, such as `aws_access_key_id` or `aws_endpoint`. Their
/// values are never shown.
///
/// ```
/// use quorate::backup::{BackupConfig, StoreOptions};
///
/// let mut config = BackupConfig::new("/var/backups/metadata");
/// config.store_options = StoreOptions::new([("aws_secret_access_key", "hunter2")]);
/// assert!(!format!("{config:?}").contains("hunter2"));
/// ```
#[derive(Clone, Default, PartialEq, Eq)]
pub struct StoreOptions(BTreeMap<String, String>);

impl StoreOptions {
    /// Takes names and values. Of a name that is there twice the last value counts.
    pub fn new<K: Into<String>, V: Into<String>>(options: impl IntoIterator<Item = (K, V)>) -> StoreOptions {
        StoreOptions(options.into_iter().map(|(name, value)| (name.into().to_ascii_lowercase(), value.into())).collect())
    }

    /// The names and the values, for whoever must send them.
    #[cfg(feature = "object-store")]
    pub(crate) fn reveal(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0.iter().map(|(name, value)| (name.as_str(), value.as_str()))
    }
}

impl fmt::Debug for StoreOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.0.keys()).finish()
    }
}

/// The kinds of URLs that lead to object stores.
const SCHEMES: [&str; 8] = ["s3", "s3a", "gs", "az", "azure", "abfs", "abfss", "https"];

/// Those of them in which a name stands before an `@`, and is no secret: `abfs://container@account`.
const WITH_ACCOUNT: [&str; 4] = ["az", "azure", "abfs", "abfss"];

/// Where backups are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Where {
    Directory(PathBuf),
    /// A URL without a slash at its end.
    Store(String),
}

impl Where {
    /// Reads it.
    ///
    /// # Errors
    /// What would be right: a sentence that does not repeat the text, for there may be a secret in it.
    pub fn read(place: &Path) -> std::result::Result<Where, String> {
        let Some((scheme, rest)) = place.to_str().and_then(|text| text.split_once("://")) else {
            return Ok(Where::Directory(place.to_owned()));
        };
        let is_file = scheme == "file";
        if !is_file && !SCHEMES.contains(&scheme) {
            return Err(format!("it must be a directory, or a URL that begins with file:// or one of {}://", SCHEMES.join("://, ")));
        }
        if rest.contains(['?', '#']) {
            return Err("it must be a URL without a query: options and credentials of a store are variables".into());
        }
        let (host, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
        if is_file {
            let path = decoded(path).filter(|path| host.is_empty() && path.starts_with('/'));
            return path.map(|path| Where::Directory(path.into())).ok_or_else(|| "it must be a URL such as file:///mnt/backups".into());
        }
        if let Some((user, _)) = host.split_once('@')
            && (user.contains(':') || !WITH_ACCOUNT.contains(&scheme))
        {
            return Err("it must be a URL without a user: credentials of a store are variables".into());
        }
        if host.is_empty() {
            return Err(format!("it must name a bucket, such as {scheme}://bucket/prefix"));
        }
        if !cfg!(feature = "object-store") {
            return Err("it must be a directory: this build knows no object stores (the cargo feature `object-store`)".into());
        }
        Ok(Where::Store(format!("{scheme}://{}", rest.trim_end_matches('/'))))
    }
}

/// A place for an error text: without what may be a secret.
pub(crate) fn shown(place: &Path) -> String {
    let text = place.to_string_lossy();
    if !text.contains("://") {
        return text.into_owned();
    }
    let (before, query) = text.split_at(text.find(['?', '#']).unwrap_or(text.len()));
    let scheme = before.split_once("://").map_or("", |(scheme, _)| scheme);
    let hidden = match without_user(before) {
        std::borrow::Cow::Owned(hidden) if !hidden.contains("://") => format!("{scheme}://{hidden}"),
        hidden => hidden.into_owned(),
    };
    format!("{hidden}{}", if query.is_empty() { "" } else { "?..." })
}

/// The path of a URL as it is meant: `%20` is a blank.
fn decoded(path: &str) -> Option<String> {
    let (mut bytes, mut rest) = (Vec::new(), path.as_bytes());
    while let Some((first, behind)) = rest.split_first() {
        rest = behind;
        bytes.push(if *first == b'%' {
            let digits = std::str::from_utf8(rest.get(..2)?).ok()?;
            rest = rest.get(2..)?;
            u8::from_str_radix(digits, 16).ok()?
        } else {
            *first
        });
    }
    String::from_utf8(bytes).ok()
}

/// The member that a backup is to become. The names are those of `etcdutl snapshot restore`.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct RestoreOptions {
    /// Its data directory. What was a member's there is [kept aside](crate::backup::Restored::aside).
    pub data_dir: PathBuf,
    /// Its name. Default: `default`.
    pub name: String,
    /// All members of the new cluster as `name=url,name=url`; each of them is restored with the same file and the same list. Empty: it is
    /// alone.
    pub initial_cluster: String,
    /// Its peer URLs. Empty: what the list says, or `http://localhost:2380`.
    pub initial_advertise_peer_urls: Vec<Url>,
    /// Tells the new cluster apart from others with the same URLs. Default: `etcd-cluster`.
    pub initial_cluster_token: String,
    /// How much higher its revision is than the backup's. Default: [`BUMP_REVISION`].
    pub bump_revision: u64,
    /// Whether everything below that revision counts as compacted, so that every watch from before is told that it has missed something.
    /// It has to be so if and only if the revision is bumped. Default: true.
    pub mark_compacted: bool,
    /// Options of the object store that the backup is in, beside those of the environment. Nothing for a file.
    pub store_options: StoreOptions,
}

impl RestoreOptions {
    /// A member alone, in this directory.
    pub fn new(data_dir: impl Into<PathBuf>) -> Self {
        let Config { name, initial_cluster_token, .. } = Config::default();
        RestoreOptions {
            data_dir: data_dir.into(),
            name,
            initial_cluster: String::new(),
            initial_advertise_peer_urls: Vec::new(),
            initial_cluster_token,
            bump_revision: BUMP_REVISION,
            mark_compacted: true,
            store_options: StoreOptions::default(),
        }
    }

    /// The configuration that such a member would be founded with. It is validated.
    ///
    /// # Errors
    /// [`Error::Config`], as [`Config::validate_bootstrap`], and when bump and mark do not agree.
    pub(crate) fn founding(&self) -> Result<Config> {
        let mut config = Config { data_dir: Some(self.data_dir.clone()), name: self.name.clone(), ..Config::default() };
        config.listen_client_urls.clear();
        config.listen_peer_urls.clear();
        config.initial_cluster.clone_from(&self.initial_cluster);
        config.initial_advertise_peer_urls.clone_from(&self.initial_advertise_peer_urls);
        config.initial_cluster_token.clone_from(&self.initial_cluster_token);
        config.validate()?;
        config.validate_bootstrap()?;
        match (self.bump_revision > 0, self.mark_compacted) {
            (true, false) => Err(Error::Config("mark-compacted is required if bump-revision is greater than 0".into())),
            (false, true) => Err(Error::Config("mark-compacted is not allowed if bump-revision is 0".into())),
            _ => Ok(config),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_wrong_setting_is_named() {
        type Change = fn(&mut BackupConfig);
        let cases: &[(Change, &str)] = &[
            (|c| c.dir = PathBuf::new(), "directory for backups is empty"),
            (|c| c.jitter = JITTER_MAX + Duration::from_secs(1), "jitter of backups is 86401s"),
            (|c| c.keep_for = Some(Duration::ZERO), "no time at all"),
            (|c| c.schedule = Some(String::new()), "schedule of backups is \"\""),
            (|c| c.schedule = Some("* * * *".into()), "\"* * * *\""),
            (|c| c.schedule = Some("60 * * * *".into()), "\"60 * * * *\""),
        ];
        for (change, want) in cases {
            let mut config = BackupConfig::new("/backups");
            change(&mut config);
            let text = config.validate().unwrap_err().to_string();
            assert!(text.contains(want), "{text}");
        }
        for schedule in ["@daily", "0 */12 * * *", "*/5 * * * * *", "30 2 * * MON-FRI"] {
            BackupConfig { schedule: Some(schedule.into()), ..BackupConfig::new("/backups") }.validate().unwrap();
        }
    }

    #[test]
    fn a_place_is_a_directory_or_a_url() {
        for (text, path) in [("/b", "/b"), ("b/c", "b/c"), ("file:///b%20c/d", "/b c/d"), ("s3:/b", "s3:/b")] {
            assert_eq!(Where::read(Path::new(text)), Ok(Where::Directory(path.into())), "{text}");
        }
        let stores =
            ["s3://bucket", "s3://bucket/a/b", "gs://bucket/a", "az://container/a", "abfss://files@account.dfs.core.windows.net/a"];
        for text in stores {
            let found = Where::read(Path::new(&format!("{text}/")));
            if cfg!(feature = "object-store") {
                assert_eq!(found, Ok(Where::Store(text.into())));
            } else {
                assert!(found.unwrap_err().contains("the cargo feature `object-store`"));
            }
        }
        for (text, right) in [
            ("ftp://a/b", "s3://"),
            ("memory:///", "s3://"),
            ("file://host/b", "file:///mnt/backups"),
            ("file:///b%2", "file:///mnt/backups"),
            ("s3:///b", "name a bucket"),
            ("s3://key@bucket", "without a user"),
            ("az://container:hunter2@account/b", "without a user"),
            ("https://a.blob.core.windows.net/c?sig=hunter2", "without a query"),
        ] {
            let mut config = BackupConfig::new(text);
            config.store_options = StoreOptions::new([("AWS_SECRET_ACCESS_KEY", "hunter2")]);
            let why = config.validate().unwrap_err().to_string();
            assert!(why.contains(right) && !why.contains("hunter2") && !why.contains("key@"), "{why}");
            let debug = format!("{config:?}");
            assert!(debug.contains("aws_secret_access_key") && !debug.contains("hunter2") && !debug.contains("key@"), "{debug}");
        }
    }

    #[test]
    fn bump_and_mark_go_together() {
        let options = RestoreOptions::new("/data");
        options.founding().unwrap();
        for (bump, mark, fine) in [(0, true, false), (7, false, false), (0, false, true), (7, true, true)] {
            let options = RestoreOptions { bump_revision: bump, mark_compacted: mark, ..options.clone() };
            assert_eq!(options.founding().is_ok(), fine, "{bump} {mark}");
        }
        let options = RestoreOptions { initial_cluster: "other=http://127.0.0.1:1".into(), ..options };
        assert!(options.founding().unwrap_err().to_string().contains("\"default\""));
    }
}
