//! `quorate backup` and `quorate restore`: what the library does with backups, from a shell.
//!
//! Exit codes: 0; 1 when it failed, or a backup that was listed is damaged.

use std::fmt::Write as _;
use std::io::Write as _;
use std::process::ExitCode;
use std::time::{Duration, SystemTime};

use quorate::backup::{self, BackupConfig, BackupInfo, Backups, Listing, Soundness};
use quorate::cli::{BackupCommand, RestoreCommand};
use quorate::client::RemoteOptions;
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
    let restored = backup::restore(&command.file, &command.options).map(|restored| {
        let mut text = format!(
            "cluster {:x} of member {:x} is at revision {} with {} keys\n",
            restored.cluster_id, restored.member_id, restored.revision, restored.keys
        );
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
        let _ = writeln!(text, "{name}  {}  revision {revision}  {bytes} bytes  {}", time(*created), soundness(&backup.soundness));
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
