//! What backups and their restoration are told: [`BackupConfig`] and [`RestoreOptions`].

use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use croner::Cron;

use super::{Config, Url};
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
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct BackupConfig {
    /// The directory; it is made if it is missing. It is for one member, and one process at a time: whoever comes second is refused.
    pub dir: PathBuf,
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

impl BackupConfig {
    /// On demand only, into this directory.
    pub fn new(dir: impl Into<PathBuf>) -> Self {
        BackupConfig { dir: dir.into(), schedule: None, jitter: Duration::from_secs(5), keep: 5, keep_for: None }
    }

    /// Checks the settings.
    ///
    /// # Errors
    /// [`Error::Config`], which names the setting and its value.
    pub fn validate(&self) -> Result<()> {
        if self.dir.as_os_str().is_empty() {
            return Err(Error::Config("the directory for backups is empty".into()));
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
