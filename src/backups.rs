//! `quorate backup` and `quorate restore`: what the library does with backups, from a shell.
//!
//! Exit codes: 0; 1 when it failed, or a backup that was listed is damaged.

use std::fmt::Write as _;
use std::io::Write as _;
use std::process::ExitCode;
use std::time::{Duration, SystemTime};

use quorate::backup::{self, BackupConfig, BackupInfo, Backups, Listing, Restored, Soundness};
use quorate::cli::{BackupCommand, RestoreCommand};
use quorate::client::RemoteOptions;
use quorate::embed::EmbedConfig;
use quorate::{Client, Error};

pub fn backup(command: BackupCommand) -> ExitCode {
    let done = match command {
        BackupCommand::Save { dir, endpoints, keep, tls } => {
            let mut options = RemoteOptions::default();
            options.tls = tls;
            let mut config = BackupConfig::new(dir);
            config.keep = keep;
            save(config, endpoints, options).map(|made| (format!("{}\n", made.path.display()), true))
        }
        BackupCommand::List { dir, verify, json } => {
            let listing = if verify { backup::list_verified(dir) } else { backup::list(dir) };
            listing.map(|listing| {
                let is_sound = !listing.backups.iter().any(|backup| matches!(backup.soundness, Soundness::Damaged(_)));
                (if json { as_json(&listing) } else { as_table(&listing) }, is_sound)
            })
        }
        _ => Err(Error::Config("this is not built".into())),
    };
    ended(done)
}

fn save(config: BackupConfig, endpoints: Vec<quorate::Url>, options: RemoteOptions) -> Result<BackupInfo, Error> {
    let runtime = super::new_runtime("the main thread")?;
    runtime.block_on(async {
        let backups = Backups::of(Client::remote(endpoints, options)?, config)?;
        let made = backups.back_up().await;
        backups.shutdown().await;
        made
    })
}

pub fn restore(command: &RestoreCommand) -> ExitCode {
    let restored = if command.node { restore_node(command) } else { restore_member(command) };
    let restored = restored.map(|(mut text, restored)| {
        // Writing to a String cannot fail.
        if let Some(aside) = &restored.aside {
            let _ = writeln!(text, "what was there is kept in {}", aside.display());
        }
        let _ = writeln!(
            text,
            "warning: what cluster {:x} wrote after revision {}, at {}, is not in it; what hangs on that may have moved on",
            restored.from_cluster_id,
            restored.backup_revision,
            time(restored.created),
        );
        (text, true)
    });
    ended(restored)
}

fn restore_member(command: &RestoreCommand) -> Result<(String, Restored), Error> {
    let restored = backup::restore(&command.file, &command.options)?;
    let Restored { cluster_id, member_id, revision, keys, .. } = &restored;
    Ok((format!("cluster {cluster_id:x} of member {member_id:x} is at revision {revision} with {keys} keys\n"), restored))
}

fn restore_node(command: &RestoreCommand) -> Result<(String, Restored), Error> {
    let mut config = EmbedConfig::from_env()?;
    if !command.options.data_dir.as_os_str().is_empty() {
        config.data_dir.clone_from(&command.options.data_dir);
    }
    let node = quorate::embed::restore(&command.file, &config, command.options.bump_revision)?;
    let Restored { revision, keys, .. } = &node.server;
    let text = format!(
        "cluster {} has one server, the node in {}, and is at revision {revision} with {keys} keys\n\
         the other nodes join it when they are started once it serves, without their directories\n",
        node.cluster,
        config.data_dir.display()
    );
    Ok((text, node.server))
}

fn ended(done: Result<(String, bool), Error>) -> ExitCode {
    match done {
        Ok((text, is_fine)) => {
            let _ = std::io::stdout().write_all(text.as_bytes());
            if is_fine { ExitCode::SUCCESS } else { ExitCode::FAILURE }
        }
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "quorate: {error}");
            ExitCode::FAILURE
        }
    }
}

fn as_table(listing: &Listing) -> String {
    let mut text = String::new();
    for backup in &listing.backups {
        let BackupInfo { name, created, revision, bytes, .. } = backup;
        let cluster = cluster(backup).unwrap_or_else(|| "unknown".into());
        let (created, soundness) = (time(*created), soundness(&backup.soundness));
        let _ = writeln!(text, "{name}  {created}  cluster {cluster}  revision {revision}  {bytes} bytes  {soundness}");
    }
    if listing.backups.is_empty() {
        text.push_str("there are no backups\n");
    }
    if let Some(last) = &listing.last_try {
        let _ = match &last.outcome {
            Ok(made) => writeln!(text, "last try: {}  made {made}", time(last.at)),
            Err(error) => writeln!(text, "last try: {}  failed: {error}", time(last.at)),
        };
    }
    text
}

fn as_json(listing: &Listing) -> String {
    let backups = listing.backups.iter().map(|backup| {
        serde_json::json!({
            "name": backup.name,
            "path": backup.path.display().to_string(),
            "created": time(backup.created),
            "cluster": cluster(backup),
            "revision": backup.revision,
            "bytes": backup.bytes,
            "soundness": soundness(&backup.soundness),
        })
    });
    let last = listing.last_try.as_ref().map(|last| {
        let (made, error) = (last.outcome.as_ref().ok(), last.outcome.as_ref().err());
        serde_json::json!({ "at": time(last.at), "made": made, "error": error })
    });
    format!("{}\n", serde_json::json!({ "backups": backups.collect::<Vec<_>>(), "last_try": last }))
}

/// The id of a backup's cluster, as etcdctl shows such ids.
fn cluster(backup: &BackupInfo) -> Option<String> {
    backup.cluster_id.map(|id| format!("{id:x}"))
}

fn soundness(soundness: &Soundness) -> String {
    match soundness {
        Soundness::WhenWritten => "verified when it was written".into(),
        Soundness::Verified => "verified".into(),
        Soundness::Damaged(what) => format!("DAMAGED: {what}"),
        _ => "unknown".into(),
    }
}

fn time(time: SystemTime) -> String {
    let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or(Duration::ZERO);
    let at = i64::try_from(since.as_secs()).ok().and_then(|seconds| chrono::DateTime::from_timestamp(seconds, 0));
    at.map_or_else(|| "an unknown time".into(), |at| at.format("%Y-%m-%dT%H:%M:%SZ").to_string())
}
