//! The one place of this room that knows what is in a backup: which bytes are one, whether they are sound, and what they restore.
//!
//! Today a backup is a [snapshot](crate::snapshot), as `Client::backup` and the Snapshot RPC give it. Whoever brings another format
//! changes this file: the rest of the room sees bytes, [`Facts`] and items.

use std::io::{BufReader, Read};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use crate::client::{self, Client};
use crate::error::{Error, Result};
use crate::proto::etcdserverpb::RangeRequest;
use crate::snapshot::{Decoder, Summary};

pub(super) use crate::snapshot::Item;

/// What it is read through.
const READ_BYTES: usize = 256 << 10;

/// What is known of a backup once all of it was read and found sound.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Facts {
    /// The cluster that it was made of.
    pub cluster_id: u64,
    /// The revision that it shows.
    pub revision: i64,
    /// When it was made, by the clock of the member that made it.
    pub created: SystemTime,
    pub bytes: u64,
    /// No two backups have the same.
    pub digest: [u8; 32],
}

impl From<&Summary> for Facts {
    fn from(summary: &Summary) -> Self {
        let header = &summary.header;
        let created = SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(header.created_unix_s));
        Facts {
            cluster_id: header.cluster_id,
            revision: header.revision,
            created: created.unwrap_or(SystemTime::UNIX_EPOCH),
            bytes: summary.size,
            digest: summary.sha256,
        }
    }
}

/// Begins a backup of what is behind the client.
///
/// # Errors
/// As a linearizable read.
pub(super) async fn begin(client: &Client) -> Result<client::Backup> {
    client.backup().await
}

/// The revision that the store has at least, now: a backup that is begun later and shows less is of a member that has fallen behind, as a
/// learner may that nobody brings up to date.
///
/// # Errors
/// As a linearizable read; also of a learner, which cannot tell.
pub(super) async fn least(client: &Client) -> Result<i64> {
    let request = RangeRequest { key: vec![0].into(), count_only: true, ..RangeRequest::default() };
    let header = client.range(request).await?.header;
    Ok(header.map_or(0, |header| header.revision))
}

/// The cluster that a backup was made of, and the revision that it shows, by its beginning alone. Errors name `path`.
///
/// # Errors
/// As [`verify`].
pub(super) fn beginning(source: impl Read, path: &Path) -> Result<(u64, i64)> {
    let decoder = Decoder::new(BufReader::new(source), path)?;
    Ok((decoder.header().cluster_id, decoder.header().revision))
}

/// Reads a whole backup, and says what it holds. Errors name `path`.
///
/// # Errors
/// `Format`, `Corrupt` and `Io`.
pub(super) fn verify(source: impl Read + Send + 'static, path: &Path) -> Result<Facts> {
    let mut reader = Reader::new(Box::new(source), path)?;
    while reader.next()?.is_some() {}
    reader.facts()
}

/// What a backup is read from.
pub(super) type Source = Box<dyn Read + Send>;

/// The items of a backup, one by one: first what is kept beside the history, by name, then the history.
pub(super) struct Reader {
    path: PathBuf,
    decoder: Decoder<BufReader<Source>>,
}

impl Reader {
    /// # Errors
    /// As [`verify`].
    pub fn new(source: Source, path: &Path) -> Result<Reader> {
        let decoder = Decoder::new(BufReader::with_capacity(READ_BYTES, source), path)?;
        Ok(Reader { path: path.to_owned(), decoder })
    }

    /// The next one; none when all of it was read and found sound. What was taken before that means nothing until then.
    ///
    /// # Errors
    /// As [`verify`].
    pub fn next(&mut self) -> Result<Option<Item>> {
        self.decoder.next_item()
    }

    /// What has been read, after its end.
    ///
    /// # Errors
    /// `Failed` before.
    pub fn facts(&self) -> Result<Facts> {
        let summary = self.decoder.summary().map(Facts::from);
        summary.ok_or_else(|| Error::Failed(format!("the backup {} was not read to its end", self.path.display())))
    }
}
