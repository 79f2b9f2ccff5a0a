//! The place at a URL: an object store, in which a backup is one object. Built with the cargo feature `object-store`.
//!
//! ```text
//! s3://bucket/prefix/
//!   quorate-20261123T044012.345Z-r900.backup      there only once the store has all of it
//!   last-try                                      as in a directory
//!
//! bytes -> 8 MiB in memory -> one part, sent -> ... -> the store is told that this is all -> read back from end to end -> made
//! ```
//!
//! What each kind of URL means, and by which variables it is told its credentials, is the business of the crate `object_store`: `AWS_*` for
//! `s3://`, `GOOGLE_*` for `gs://`, `AZURE_*` for `az://`.
//!
//! # Invariants
//! - An object gets its name whole or not at all: it is sent in parts, and the store puts them together when it has them all. A try that
//!   fails gives its parts up, and removes what it has made.
//! - What was made is read back, by the code that restores, before it counts. The store's own checksums are not enough: each kind has
//!   others, some have none, and they say nothing of what was sent to it.
//! - Memory holds one part, and as much of what comes next as is handed on in one go.
//! - All of it has a thread of its own, and a time: [`OPERATION`] for each request with its repetitions. Who waits for it is a thread for
//!   things that block, and waits no longer when the backups are to stop.
//! - Of what a store answers to a mistake only the code and the message are told: the rest may repeat what it was sent, tokens and all. An
//!   answer that has neither is told as one short line, and not at all if it speaks of anything secret.
//! - What was begun is given up before the backups have ended, if the store answers within [`GIVE_UP_STOPPING`].
//!
//! # Caveats
//! - Nobody holds the store. Two that make a backup at the same time make two, and each removes what is surplus; the newest stays. Only the
//!   name could be the same, if both begin in the same millisecond at the same revision, after each has seen that nobody has it: then the
//!   later one counts.
//! - Who looks between the last part and the reading back sees a backup that nobody has read yet, and who dies then leaves it; `quorate
//!   backup list` reads it. Who dies before, or is stopped while the store does not answer, leaves parts that no listing shows: have the
//!   store remove uploads that were not finished after a day, by a rule of the bucket.

use std::io::{self, Read};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, SystemTime};

use bytes::{Buf, Bytes, BytesMut};
use futures_util::TryStreamExt;
use futures_util::future::BoxFuture;
use object_store::aws::AmazonS3Builder;
use object_store::azure::MicrosoftAzureBuilder;
use object_store::gcp::GoogleCloudStorageBuilder;
use object_store::path::Path as Key;
use object_store::{GetOptions, MultipartUpload, ObjectStore, ObjectStoreExt, ObjectStoreScheme, RetryConfig};
use tokio::runtime::{Builder, Runtime};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tokio_util::task::task_tracker::TaskTrackerToken;

use super::dial::Dialer;
use super::format::{self, Source};
use super::store::{
    BackupInfo, Clusters, LAST_TRY, LAST_TRY_BYTES, LastTry, Part, Place, Soundness, check_least, name, parse_name, read_try, write_try,
};
use crate::config::StoreOptions;
use crate::error::{Error, Result};

/// What is sent, and read back, in one request. Of the bytes of a backup that come, those beyond it wait until they are sent. A store takes
/// ten thousand parts: 80 GB, of which a member's quota is a tenth.
const PART_BYTES: usize = 8 << 20;

/// What is read of a backup first: how it begins is far shorter.
const FIRST_BYTES: u64 = 64 << 10;

/// Objects that are looked at in one listing. Beyond it the listing fails: something else is kept under that prefix.
const OBJECTS_MAX: usize = 100_000;

/// How long one request may take with all its repetitions, and a listing with all its pages. Beyond it the backup has failed.
const OPERATION: Duration = Duration::from_secs(180);

/// How much longer is waited for the thread to say so. Beyond it something else holds it up, such as a disk that hangs with the CAs on it.
const WORD: Duration = Duration::from_secs(10);

/// How often a request is repeated, and for how long. Beyond it, it has failed.
const RETRIES: RetryConfig = RetryConfig {
    backoff: object_store::BackoffConfig { init_backoff: Duration::from_millis(100), max_backoff: Duration::from_secs(5), base: 2.0 },
    max_retries: 3,
    retry_timeout: Duration::from_secs(60),
};

/// How long giving up what was begun may take, and once the backups are to stop. Beyond it the parts stay, until the store removes them.
const GIVE_UP: Duration = Duration::from_secs(30);
const GIVE_UP_STOPPING: Duration = Duration::from_secs(1);

/// How much longer the end of the backups waits for that. Beyond it something else has the processors.
const SAYING_SO: Duration = Duration::from_millis(500);

/// See the module's head.
pub(super) struct Bucket {
    line: Arc<Line>,
    clusters: Clusters,
}

/// The store, and the thread that speaks with it.
struct Line {
    /// As it was given, without a slash at its end.
    url: String,
    prefix: Key,
    store: Arc<dyn ObjectStore>,
    /// One thread. It is there until this is dropped.
    runtime: Option<Runtime>,
    /// Backups that were begun, and are neither made nor given up.
    unfinished: TaskTracker,
    stop: CancellationToken,
}

impl Bucket {
    /// Asks the network for nothing.
    ///
    /// # Errors
    /// `Config`, for a URL or an option that is none, and where a credential is missing that cannot be asked for; `Io` without a thread.
    pub fn open(url: &str, options: &StoreOptions, stop: &CancellationToken) -> Result<Bucket> {
        let (store, prefix) = connect(url, options).map_err(|err| Error::Config(format!("the place of backups is {url:?}: {err}")))?;
        let runtime =
            Builder::new_multi_thread().worker_threads(1).max_blocking_threads(1).thread_name("quorate-backup").enable_all().build();
        let runtime = runtime.map_err(|err| Error::io("starting the thread for", url, err))?;
        let (runtime, unfinished) = (Some(runtime), TaskTracker::new());
        let line = Line { url: url.to_owned(), prefix, store, runtime, unfinished, stop: stop.clone() };
        Ok(Bucket { line: Arc::new(line), clusters: Clusters::default() })
    }
}

fn connect(url: &str, options: &StoreOptions) -> object_store::Result<(Arc<dyn ObjectStore>, Key)> {
    let wrong = |why: String| object_store::Error::Generic { store: "URL", source: why.into() };
    let parsed = url::Url::parse(url).map_err(|err| wrong(err.to_string()))?;
    let (scheme, prefix) = ObjectStoreScheme::parse(&parsed)?;
    // The variables first, then what was given, then the URL: what comes later counts.
    macro_rules! built {
        ($builder:ty) => {{
            let mut builder = <$builder>::from_env();
            for (name, value) in options.reveal() {
                let key = name.parse().map_err(|_| wrong(format!("it has no option {name:?}")))?;
                builder = builder.with_config(key, value);
            }
            Arc::new(builder.with_url(url).with_http_connector(Dialer::default()).with_retry(RETRIES).build()?)
        }};
    }
    let store: Arc<dyn ObjectStore> = match scheme {
        ObjectStoreScheme::AmazonS3 => built!(AmazonS3Builder),
        ObjectStoreScheme::GoogleCloudStorage => built!(GoogleCloudStorageBuilder),
        ObjectStoreScheme::MicrosoftAzure => built!(MicrosoftAzureBuilder),
        _ => return Err(wrong("no such store is built; there are s3://, gs:// and az://".into())),
    };
    Ok((store, prefix))
}

impl Line {
    fn key(&self, name: &str) -> Key {
        self.prefix.clone().join(name)
    }

    fn path(&self, name: &str) -> PathBuf {
        PathBuf::from(format!("{}/{name}", self.url))
    }

    /// Has the thread do something, and waits for it.
    ///
    /// # Errors
    /// `Io`, with what was done to which object; `Stopped`.
    fn wait<T, F>(&self, what: &'static str, name: &str, work: impl FnOnce(Arc<dyn ObjectStore>) -> F) -> Result<T>
    where
        T: Send + 'static,
        F: Future<Output = object_store::Result<T>> + Send + 'static,
    {
        let Some(runtime) = &self.runtime else { return Err(Error::Stopped) };
        let (tell, told) = mpsc::sync_channel(1);
        let (work, stop) = (work(self.store.clone()), self.stop.clone());
        runtime.spawn(async move {
            let done = stop.run_until_cancelled(tokio::time::timeout(OPERATION, work)).await;
            // Whoever waits does so until this is said.
            let _ = tell.send(done);
        });
        let late = || io::Error::new(io::ErrorKind::TimedOut, format!("the store has not answered within {OPERATION:?}"));
        let done = match told.recv_timeout(OPERATION + WORD) {
            Ok(Some(done)) => done.map_err(|_| late()).and_then(|done| done.map_err(fault)),
            Err(RecvTimeoutError::Timeout) => Err(late()),
            Ok(None) | Err(RecvTimeoutError::Disconnected) => return Err(Error::Stopped),
        };
        done.map_err(|err| Error::io(what, self.path(name), err))
    }

    /// Does what is still to be done when something has failed, and waits for that if it `is_awaited`. The work says whether it was done.
    /// The thread is there until then, whoever else has let go of it.
    fn give_up(self: &Arc<Self>, name: &str, work: impl Future<Output = bool> + Send + 'static, is_awaited: bool) {
        let Some(runtime) = &self.runtime else { return };
        let (tell, told) = mpsc::sync_channel(1);
        let (stop, held) = (self.stop.clone(), (self.unfinished.token(), self.clone()));
        runtime.spawn(async move {
            let mut work = std::pin::pin!(tokio::time::timeout(GIVE_UP, work));
            let done = match stop.run_until_cancelled(&mut work).await {
                Some(done) => done,
                None => tokio::time::timeout(GIVE_UP_STOPPING, work).await.and_then(|done| done),
            };
            let _ = tell.send(done.unwrap_or(false));
            drop(held);
        });
        if is_awaited && told.recv_timeout(GIVE_UP + WORD) != Ok(true) {
            tracing::warn!(
                store = self.url,
                name,
                "what was sent of a backup could not be given up: the store may keep parts of it that no listing shows, or all of it, unread"
            );
        }
    }

    /// As much of an object as is asked for, and its size.
    fn get(&self, name: &str, from: u64, bytes: u64) -> Result<(Bytes, u64)> {
        let key = self.key(name);
        self.wait("reading", name, move |store| async move {
            let options = GetOptions::new().with_range(Some(from..from.saturating_add(bytes)));
            let got = store.get_opts(&key, options).await?;
            let size = got.meta.size;
            Ok((got.bytes().await?, size))
        })
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            // What hangs there is not waited for.
            runtime.shutdown_background();
        }
    }
}

/// What the store said, and of which kind it is.
fn fault(err: object_store::Error) -> io::Error {
    use object_store::Error as Fault;
    let kind = match &err {
        Fault::NotFound { .. } => io::ErrorKind::NotFound,
        Fault::PermissionDenied { .. } | Fault::Unauthenticated { .. } => io::ErrorKind::PermissionDenied,
        Fault::AlreadyExists { .. } => io::ErrorKind::AlreadyExists,
        _ => io::ErrorKind::Other,
    };
    io::Error::new(kind, said(&err.to_string()))
}

/// Bytes of an error that are kept, and of what a store has answered that is no page.
const TEXT_BYTES: usize = 1000;
const ANSWER_BYTES: usize = 200;

/// What stands before a store's answer in an error's text. Behind the first of them comes the status.
const STATUS: &str = "Server returned non-2xx status code: ";
const ANSWER: &str = "Server returned error response: ";

/// In an answer with one of these there may be something secret.
const SECRETS: [&str; 9] = ["token", "secret", "password", "signature", "credential", "authorization", "assertion", "bearer", "key\""];

/// An error's text, without the page that a store has answered: of that the code and the message, if it has them; and of an answer that is
/// no page one short line.
fn said(text: &str) -> String {
    let (before, page) = text.split_at(text.find('<').unwrap_or(text.len()));
    let element = |name: &str| Some(page.split_once(&format!("<{name}>"))?.1.split_once('<')?.0);
    let found: Vec<&str> = ["Code", "Message"].into_iter().filter_map(element).collect();
    // Where the answer begins.
    let status = before.find(STATUS).map(|at| at + STATUS.len());
    let status = status.and_then(|at| Some(at + before[at..].find(": ")? + 2));
    let answer = status.or_else(|| before.find(ANSWER).map(|at| at + ANSWER.len())).unwrap_or(before.len());
    let (before, answer) = before.split_at(answer);
    let mut said = format!("{before}{}{}", one_line(answer), found.join(": ")).replace(char::is_control, " ");
    said.truncate(said.floor_char_boundary(TEXT_BYTES));
    said
}

/// An answer that is no page, unless it may have something secret in it.
fn one_line(answer: &str) -> String {
    let lower = answer.to_ascii_lowercase();
    if SECRETS.iter().any(|secret| lower.contains(secret)) {
        return "(its answer may hold a secret, and is not shown)".into();
    }
    let mut line = answer.split_whitespace().collect::<Vec<_>>().join(" ");
    line.truncate(line.floor_char_boundary(ANSWER_BYTES));
    line
}

impl Place for Bucket {
    fn list(&self) -> Result<Vec<BackupInfo>> {
        let prefix = self.line.prefix.clone();
        let objects = self.line.wait("listing", "", move |store| async move {
            let (mut objects, mut seen) = (Vec::new(), 0);
            let mut listed = store.list(Some(&prefix));
            while let Some(object) = listed.try_next().await? {
                seen += 1;
                if seen > OBJECTS_MAX {
                    let why = format!("there are more than {OBJECTS_MAX} objects; give backups a prefix of their own");
                    return Err(object_store::Error::Generic { store: "listing", source: why.into() });
                }
                // Those right behind the prefix, and nothing deeper.
                let name = object.location.prefix_match(&prefix).and_then(|mut parts| Some((parts.next()?, parts.next().is_none())));
                if let Some((name, true)) = name
                    && let Some(of) = parse_name(name.as_ref())
                {
                    objects.push((name.as_ref().to_owned(), of, object.size));
                }
            }
            Ok(objects)
        })?;
        let backups = objects.into_iter().map(|(name, (created, revision), bytes)| {
            let path = self.line.path(&name);
            BackupInfo { name, path, created, cluster_id: None, revision, bytes, soundness: Soundness::WhenWritten }
        });
        let mut backups: Vec<BackupInfo> = backups.collect();
        backups.sort_by_key(|backup| (backup.created, backup.revision));
        self.clusters.fill(&mut backups, |backup| {
            if backup.bytes == 0 {
                return Ok(None);
            }
            let begins = self.open(&backup.name).and_then(|source| format::beginning(source, &backup.path));
            match begins {
                Ok((cluster_id, _)) => Ok(Some(cluster_id)),
                // Removed meanwhile, put away where it cannot be read at once, or damaged. A store that is away is not asked for all the
                // others.
                Err(Error::Io { source, .. }) if [io::ErrorKind::NotFound, io::ErrorKind::PermissionDenied].contains(&source.kind()) => {
                    Ok(None)
                }
                Err(err @ (Error::Io { .. } | Error::Stopped)) => Err(err),
                Err(_) => Ok(None),
            }
        })?;
        Ok(backups)
    }

    fn begin(&self, now: SystemTime) -> Result<Box<dyn Part>> {
        // Whether the store is there at all, before a member is asked for a backup.
        let key = self.line.key(LAST_TRY);
        match self.line.wait("looking for", LAST_TRY, move |store| async move { store.head(&key).await }) {
            Err(Error::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {}
            looked => drop(looked?),
        }
        let (line, begun, waiting) = (self.line.clone(), now, BytesMut::new());
        let _counted = line.unfinished.token();
        Ok(Box::new(Unfinished { line, _counted, begun, waiting, sent: 0, named: None, upload: None, may_be_there: false }))
    }

    fn open(&self, name: &str) -> Result<Source> {
        Ok(Box::new(Ranges { line: self.line.clone(), name: name.to_owned(), at: 0, size: None, bytes: Bytes::new() }))
    }

    fn remove(&self, name: &str) -> Result<()> {
        let key = self.line.key(name);
        match self.line.wait("removing", name, move |store| async move { store.delete(&key).await }) {
            Err(Error::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => Ok(()),
            done => done,
        }
    }

    fn note(&self, last: &LastTry) -> Result<()> {
        let (key, text) = (self.line.key(LAST_TRY), write_try(last));
        let noted = self.line.wait("writing", LAST_TRY, move |store| async move { store.put(&key, text.into()).await.map(drop) });
        // Out of reach, of which the log has just been told.
        if last.outcome.is_err() { Ok(()) } else { noted }
    }

    fn noted(&self) -> Option<LastTry> {
        let (bytes, _) = self.line.get(LAST_TRY, 0, LAST_TRY_BYTES as u64).ok()?;
        read_try(std::str::from_utf8(&bytes).ok()?)
    }

    fn ended(&self) -> BoxFuture<'_, ()> {
        let unfinished = &self.line.unfinished;
        unfinished.close();
        Box::pin(async move {
            // Beyond it, it is given up on.
            let _ = tokio::time::timeout(GIVE_UP_STOPPING + SAYING_SO, unfinished.wait()).await;
        })
    }
}

/// An object, read in ranges: each is a request of its own, with its own time.
struct Ranges {
    line: Arc<Line>,
    name: String,
    at: u64,
    size: Option<u64>,
    bytes: Bytes,
}

impl Read for Ranges {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        if self.bytes.is_empty() && self.size.is_none_or(|size| self.at < size) && !out.is_empty() {
            let wanted = if self.at == 0 { FIRST_BYTES } else { PART_BYTES as u64 };
            let (bytes, size) = self.line.get(&self.name, self.at, wanted).map_err(|err| match err {
                Error::Io { source, .. } => io::Error::new(source.kind(), source.to_string()),
                other => io::Error::other(other.to_string()),
            })?;
            if bytes.is_empty() {
                return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the store gives nothing of an object that has more"));
            }
            self.at += bytes.len() as u64;
            (self.bytes, self.size) = (bytes, Some(size));
        }
        let many = out.len().min(self.bytes.len());
        self.bytes.copy_to_slice(&mut out[..many]);
        Ok(many)
    }
}

/// Parts that are sent. Shared with what the thread does with it, which may be given up at any moment.
type Upload = Arc<tokio::sync::Mutex<Box<dyn MultipartUpload>>>;

/// An object being sent.
struct Unfinished {
    line: Arc<Line>,
    /// Until nothing is left of it, or it is made.
    _counted: TaskTrackerToken,
    begun: SystemTime,
    /// What has not been sent yet.
    waiting: BytesMut,
    sent: u64,
    /// Its name, once it is known; and its cluster and revision, by how it begins.
    named: Option<(String, SystemTime, u64, i64)>,
    /// Once there is more of it than one part.
    upload: Option<Upload>,
    /// Whether the store may have it under its name.
    may_be_there: bool,
}

impl Part for Unfinished {
    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.waiting.extend_from_slice(bytes);
        while self.waiting.len() > PART_BYTES {
            self.send(PART_BYTES).inspect_err(|_| self.undo(true))?;
        }
        Ok(())
    }

    fn finish(mut self: Box<Self>, least: i64, stop: &CancellationToken) -> Result<BackupInfo> {
        self.complete(least, stop).inspect_err(|_| self.undo(true))
    }
}

impl Unfinished {
    /// Gives it a name, by its first bytes, that no other has.
    fn name(&mut self) -> Result<(String, SystemTime, u64, i64)> {
        if let Some(named) = &self.named {
            return Ok(named.clone());
        }
        let (cluster_id, revision) = format::beginning(&self.waiting[..], &self.line.path("what was to be sent"))?;
        let mut created = self.begun;
        loop {
            let name = name(created, revision);
            let key = self.line.key(&name);
            match self.line.wait("looking for", &name, move |store| async move { store.head(&key).await }) {
                Err(Error::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                    // As the name has it: to the millisecond.
                    let created = parse_name(&name).map_or(created, |(created, _)| created);
                    return Ok(self.named.insert((name, created, cluster_id, revision)).clone());
                }
                looked => drop(looked?),
            }
            created += Duration::from_millis(1);
        }
    }

    /// Sends so many bytes as a part.
    fn send(&mut self, bytes: usize) -> Result<()> {
        let (name, ..) = self.name()?;
        let upload = match &self.upload {
            Some(upload) => upload.clone(),
            None => {
                let key = self.line.key(&name);
                let begun = self.line.wait("beginning", &name, move |store| async move { store.put_multipart(&key).await })?;
                self.upload.insert(Arc::new(tokio::sync::Mutex::new(begun))).clone()
            }
        };
        let part = self.waiting.split_to(bytes).freeze();
        self.line.wait("sending", &name, move |_| async move {
            let sent = upload.lock().await.put_part(part.into());
            sent.await
        })?;
        self.sent += bytes as u64;
        Ok(())
    }

    fn complete(&mut self, least: i64, stop: &CancellationToken) -> Result<BackupInfo> {
        let (name, created, cluster_id, revision) = self.name()?;
        check_least(revision, least)?;
        if self.upload.is_some() && !self.waiting.is_empty() {
            self.send(self.waiting.len())?;
        }
        if stop.is_cancelled() {
            return Err(Error::Stopped);
        }
        self.may_be_there = true;
        match self.upload.clone() {
            Some(upload) => {
                self.line.wait("completing", &name, move |_| async move { upload.lock().await.complete().await.map(drop) })?;
                // It has no parts any more.
                self.upload = None;
            }
            None => {
                let (key, bytes) = (self.line.key(&name), std::mem::take(&mut self.waiting).freeze());
                self.sent = bytes.len() as u64;
                self.line.wait("sending", &name, move |store| async move { store.put(&key, bytes.into()).await.map(drop) })?;
            }
        }
        let path = self.line.path(&name);
        let source = Ranges { line: self.line.clone(), name: name.clone(), at: 0, size: None, bytes: Bytes::new() };
        let facts = format::verify(source, &path)?;
        if (facts.cluster_id, facts.revision, facts.bytes) != (cluster_id, revision, self.sent) {
            return Err(Error::Corrupt { path, offset: None, what: "what the store gives is another backup than was sent".into() });
        }
        self.may_be_there = false;
        let bytes = facts.bytes;
        Ok(BackupInfo { name, path, created, cluster_id: Some(cluster_id), revision, bytes, soundness: Soundness::WhenWritten })
    }

    /// Sees to it that nothing is left of it.
    fn undo(&mut self, is_awaited: bool) {
        let upload = self.upload.take();
        let name = self.named.as_ref().map_or(String::new(), |(name, ..)| name.clone());
        let made = self.may_be_there.then(|| self.line.key(&name));
        self.may_be_there = false;
        if upload.is_none() && made.is_none() {
            return;
        }
        let store = self.line.store.clone();
        let undo = async move {
            let is_gone = |done| matches!(done, Ok(()) | Err(object_store::Error::NotFound { .. }));
            let mut all = true;
            if let Some(upload) = upload {
                // Whoever had it was given up before.
                all &= is_gone(upload.lock().await.abort().await);
            }
            if let Some(key) = made {
                all &= is_gone(store.delete(&key).await);
            }
            all
        };
        self.line.give_up(&name, undo, is_awaited);
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        // Who drops it may be in a hurry.
        self.undo(false);
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    fn bucket(url: &str, options: &[(&str, &str)]) -> Result<Bucket> {
        Bucket::open(url, &StoreOptions::new(options.iter().copied()), &CancellationToken::new())
    }

    #[test]
    fn a_store_is_not_quoted_at_length() {
        let page =
            "<?xml version=\"1.0\"?><Error><Code>SignatureDoesNotMatch</Code><Message>It does not match</Message><Token>hunter2</Token>";
        assert_eq!(said(&format!("403 Forbidden: {page}")), "403 Forbidden: SignatureDoesNotMatch: It does not match");
        assert_eq!((said("no answer within 1s").as_str(), said("502: <html>hunter2").as_str()), ("no answer within 1s", "502: "));
        assert_eq!(said(&"\u{fc}".repeat(TEXT_BYTES)).len(), TEXT_BYTES);
        // What is no page.
        let begins = "Error performing POST https://example.com/token in 1s - Server returned non-2xx status code: 403 Forbidden: ";
        let told = |answer: &str| said(&format!("{begins}{answer}")).strip_prefix(begins).unwrap().to_owned();
        assert_eq!(told("{\n  \"error\": {\n    \"code\": 403\n  }\n}"), "{ \"error\": { \"code\": 403 } }");
        assert_eq!(
            (told(&"a ".repeat(300)).len(), told("").as_str(), told(page).as_str()),
            (ANSWER_BYTES, "", "SignatureDoesNotMatch: It does not match")
        );
        for secret in ["{\"access_Token\": \"hunter2\"}", "Authorization: hunter2", "{\"Key\": \"hunter2\"}"] {
            assert!(told(secret).starts_with("(its answer") && !told(secret).contains("hunter2"));
        }
        assert!(!said("Server returned error response: password=hunter2").contains("hunter2"));
    }

    /// Parts that were sent, and are given up once that is allowed.
    #[derive(Debug)]
    struct Sent {
        allowed: Arc<tokio::sync::Semaphore>,
        given_up: CancellationToken,
    }

    type Done<'a, T> = std::pin::Pin<Box<dyn Future<Output = object_store::Result<T>> + Send + 'a>>;

    impl MultipartUpload for Sent {
        fn put_part(&mut self, _: object_store::PutPayload) -> object_store::UploadPart {
            Box::pin(std::future::pending())
        }

        fn complete<'a: 'b, 'b>(&'a mut self) -> Done<'b, object_store::PutResult>
        where
            Self: 'b,
        {
            Box::pin(std::future::pending())
        }

        fn abort<'a: 'b, 'b>(&'a mut self) -> Done<'b, ()>
        where
            Self: 'b,
        {
            Box::pin(async {
                let _ = self.allowed.acquire().await;
                self.given_up.cancel();
                Ok(())
            })
        }
    }

    /// Whoever lets go of an upload gives it up: the thread is there until then, and the end of the backups waits for it.
    #[test]
    fn who_lets_go_of_an_upload_gives_it_up() {
        let runtime = Builder::new_current_thread().enable_time().build().unwrap();
        for is_awaited in [false, true] {
            let stop = CancellationToken::new();
            let options = [("aws_access_key_id", "a"), ("aws_secret_access_key", "hunter2"), ("aws_region", "r")];
            let bucket = Bucket::open("s3://bucket", &StoreOptions::new(options), &stop).unwrap();
            let (allowed, given_up) = (Arc::new(tokio::sync::Semaphore::new(0)), CancellationToken::new());
            let upload: Box<dyn MultipartUpload> = Box::new(Sent { allowed: allowed.clone(), given_up: given_up.clone() });
            let line = bucket.line.clone();
            let part = Unfinished {
                _counted: line.unfinished.token(),
                line,
                begun: SystemTime::UNIX_EPOCH,
                waiting: BytesMut::new(),
                sent: 0,
                named: None,
                upload: Some(Arc::new(tokio::sync::Mutex::new(upload))),
                may_be_there: false,
            };
            runtime.block_on(async {
                if is_awaited {
                    stop.cancel();
                    let mut ended = bucket.ended();
                    assert!((&mut ended).now_or_never().is_none());
                    drop(part);
                    assert!((&mut ended).now_or_never().is_none());
                    allowed.add_permits(1);
                    ended.await;
                    assert!(given_up.is_cancelled());
                } else {
                    drop((part, bucket));
                    allowed.add_permits(1);
                    tokio::time::timeout(GIVE_UP, given_up.cancelled()).await.unwrap();
                }
            });
        }
    }

    /// Opening asks the network for nothing, and says what is wrong without what is secret.
    #[test]
    fn each_kind_of_store_is_opened() {
        let key = "aGVsbG8=";
        for (url, options) in [
            ("s3://bucket/a/b", &[("aws_access_key_id", "a"), ("aws_secret_access_key", "hunter2"), ("AWS_REGION", "r")][..]),
            ("gs://bucket", &[("google_skip_signature", "true")]),
            ("az://container/a", &[("azure_storage_account_name", "a"), ("azure_storage_account_key", key)]),
        ] {
            let opened = bucket(url, options).unwrap();
            assert_eq!(opened.line.path("x"), PathBuf::from(format!("{url}/x")));
        }
        for (url, options, want) in [
            ("s3://bucket", &[("aws_proxy_url", "http://user:hunter2@proxy")][..], "proxy"),
            ("s3://bucket", &[("aws_timeout", "soon")], "timeout"),
            ("s3://bucket", &[("hunter", "hunter2")], "no option \"hunter\""),
            ("https://example.com/a", &[], "s3://"),
        ] {
            let why = bucket(url, options).err().unwrap().to_string();
            assert!(why.contains(want) && why.contains(url) && !why.contains("hunter2"), "{why}");
        }
    }
}
