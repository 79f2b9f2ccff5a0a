//! The data directory: whose it is, who holds it, and where things stand in it.
//!
//! ```text
//! <data-dir>/                 mode 0700
//!   member/
//!     LOCK                    held exclusively while a server runs
//!     identity                format version, cluster and member id, name; written once
//!     removed                 the member does not belong to its cluster any more
//!     peers                   where the other members were last known to be
//!     wal/                    the Raft log (elsewhere with --wal-dir)
//!     state/                  the applied state
//!     rebuilding              what is in state/ is nothing yet: another is being fetched
//!     state.damaged-<n>       a state that was found damaged and set aside, for people to look at; nothing here reads it
//!     incoming-<id>           a snapshot that a leader is sending; removed by the next start
//! ```
//!
//! `identity` is a few lines of text with a checksum over those before it, so that a person can read it and a program can
//! tell damage from a directory that is not ours:
//!
//! ```text
//! quorate 1
//! cluster cdf818194e3a8c32
//! member 8e9e05c52164694d
//! name default
//! joined yes                  (only of a member that has joined a cluster that was there)
//! incarnation 6a1f00c2d3b4e597
//! crc32c 5d1b3f0a
//! ```
//!
//! # The incarnation
//! A number drawn at random when the directory is made. The members tell it each other, and keep it with what they know of a member: one
//! that comes back under its id with another directory, and so without what it has voted and acknowledged, is known by it. A directory
//! from before there were any gets one when it is opened.
//!
//! `peers` has a line for each other member, its id and its peer URLs, and a checksum as above. It serves one purpose: a member whose
//! state is damaged finds those who have it. So a damaged one is as good as none.
//!
//! # Invariants
//! - The lock is taken before anything else is read or written, and by one server at a time, in this process or another.
//! - A directory that another program (such as etcd itself) or a newer release has written is refused, and left as it is.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};

use crate::error::{Error, Result};

/// Version of the directory's format. A release reads its own and older ones.
const FORMAT_VERSION: u32 = 1;

const IDENTITY: &str = "identity";
const REMOVED: &str = "removed";
const PEERS: &str = "peers";
const REBUILDING: &str = "rebuilding";

/// How the names of states that were set aside begin; a number follows.
const DAMAGED: &str = "state.damaged-";

/// Damaged states that are kept. Beyond it the oldest is removed: one that is damaged again and again tells nothing new, and each takes as
/// much of the disk as the state.
const DAMAGED_MAX: usize = 3;

/// How the names of half-received snapshots begin.
const INCOMING: &str = "incoming-";

/// Who a member is; chosen when the directory is made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Identity {
    pub cluster_id: u64,
    pub member_id: u64,
    /// One line; the configuration sees to that.
    pub name: String,
    /// It has joined a cluster that was there, and must never found one.
    pub joined: bool,
    /// Of the data directory; see the module's head. 0 only before the directory has one.
    pub incarnation: u64,
}

/// A data directory, held by this server until it is dropped.
#[derive(Debug)]
pub(crate) struct DataDir {
    member: PathBuf,
    wal: PathBuf,
    identity: Option<Identity>,
    _lock: File,
}

impl DataDir {
    /// Makes the directory if it is missing, and takes hold of it.
    ///
    /// # Errors
    /// `Locked` when another server has it, `Format` when it is not ours or too new, `Corrupt` when `identity` is damaged, `Removed`,
    /// `Config` when its log is here and another is asked for, `Io`.
    pub fn open(dir: &Path, wal_dir: Option<&Path>) -> Result<DataDir> {
        let member = dir.join("member");
        make_dir(dir)?;
        make_dir(&member)?;
        let lock = lock_in(&member, dir)?;
        if member.join(REMOVED).exists() {
            return Err(Error::Removed);
        }
        let identity = read_identity(&member.join(IDENTITY))?;
        if identity.is_none() {
            for foreign in ["snap/db", "snap", "wal", "state"] {
                if member.join(foreign).exists() {
                    let what = format!("member/{foreign} is there, but no member/{IDENTITY}: this is not a data directory of quorate");
                    return Err(Error::Format { path: dir.to_owned(), what });
                }
            }
        }
        if let Some(elsewhere) = wal_dir {
            check_log_elsewhere(&member.join("wal"), elsewhere)?;
        }
        remove_incoming(&member)?;
        let wal = wal_dir.map_or_else(|| member.join("wal"), Path::to_owned);
        Ok(DataDir { member, wal, identity, _lock: lock })
    }

    /// Who the member is; none in a new directory.
    pub fn identity(&self) -> Option<&Identity> {
        self.identity.as_ref()
    }

    /// Writes who the member is, for good.
    ///
    /// # Errors
    /// `Io`; then the directory is as it was.
    pub fn set_identity(&mut self, identity: Identity) -> Result<()> {
        let same = |known: &Identity| Identity { incarnation: identity.incarnation, ..known.clone() } == identity;
        debug_assert!(self.identity.as_ref().is_none_or(same), "the identity {:?} is replaced by {identity:?}", self.identity);
        write_whole(&self.member, IDENTITY, encode_identity(&identity).as_bytes())?;
        self.identity = Some(identity);
        Ok(())
    }

    /// Where the other members were last known to be: id and peer URLs; none when that is not known.
    pub fn peers(&self) -> Option<Vec<(u64, Vec<String>)>> {
        let path = self.member.join(PEERS);
        let bytes = match fs::read(&path) {
            Ok(bytes) => bytes,
            Err(err) if err.kind() == io::ErrorKind::NotFound => return None,
            Err(err) => {
                tracing::warn!(path = %path.display(), error = %err, "where the other members are cannot be read");
                return None;
            }
        };
        let peers = decode_peers(&bytes);
        if peers.is_none() {
            tracing::warn!(path = %path.display(), "the file is damaged, and is written anew once the member has started");
        }
        peers
    }

    /// Sets the state aside, for people to look at, so that another can be made in its place. Whoever had it open has closed it. Returns
    /// where it is now; none when it was but the beginning of a new one, which is removed.
    ///
    /// # Errors
    /// `Io`.
    pub fn set_state_aside(&self) -> Result<Option<PathBuf>> {
        if self.is_rebuilding() {
            // An earlier start has set aside what there was.
            let state = self.state();
            return match fs::remove_dir_all(&state) {
                Err(err) if err.kind() != io::ErrorKind::NotFound => Err(Error::io("removing", &state, err)),
                _ => Ok(None),
            };
        }
        let mut kept = damaged_states(&self.member)?;
        let number = kept.last().map_or(1, |(number, _)| number + 1);
        let (state, aside) = (self.state(), self.member.join(format!("{DAMAGED}{number}")));
        fs::rename(&state, &aside).map_err(|err| Error::io("setting aside", &state, err))?;
        write_whole(&self.member, REBUILDING, b"")?;
        kept.push((number, aside.clone()));
        let surplus = kept.len().saturating_sub(DAMAGED_MAX);
        for (_, old) in kept.drain(..surplus) {
            match fs::remove_dir_all(&old) {
                Ok(()) => tracing::warn!(path = %old.display(), kept = DAMAGED_MAX, "removed the oldest of the states that were set aside"),
                Err(err) => tracing::warn!(path = %old.display(), error = %err, "could not remove a state that was set aside"),
            }
        }
        Ok(Some(aside))
    }

    fn is_rebuilding(&self) -> bool {
        self.member.join(REBUILDING).exists()
    }

    /// Notes that the state is one again, if it was set aside.
    ///
    /// # Errors
    /// `Io`.
    pub fn set_rebuilt(&self) -> Result<()> {
        if !self.is_rebuilding() {
            return Ok(());
        }
        let path = self.member.join(REBUILDING);
        fs::remove_file(&path).map_err(|err| Error::io("removing", &path, err))?;
        sync_dir(&self.member)
    }

    /// Notes that the member was removed from its cluster: the directory is not opened any more.
    ///
    /// # Errors
    /// `Io`.
    pub fn set_removed(&self) -> Result<()> {
        write_whole(&self.member, REMOVED, b"")
    }

    pub fn wal(&self) -> &Path {
        &self.wal
    }

    pub fn state(&self) -> PathBuf {
        self.member.join("state")
    }

    /// The directory for snapshots that are being received; see [`incoming`].
    pub fn member(&self) -> &Path {
        &self.member
    }
}

/// Refuses a log elsewhere when there is one in the directory: a member that was restored has its log there, and the one elsewhere, of what it was
/// before, would be played over the restored state.
fn check_log_elsewhere(here: &Path, elsewhere: &Path) -> Result<()> {
    let is_same = matches!((here.canonicalize(), elsewhere.canonicalize()), (Ok(here), Ok(elsewhere)) if here == elsewhere);
    let has_log = fs::read_dir(here).is_ok_and(|mut entries| entries.next().is_some());
    if is_same || !has_log {
        return Ok(());
    }
    Err(Error::Config(format!("this member's log is in {}, not in {}: start it without --wal-dir", here.display(), elsewhere.display())))
}

/// Takes the lock in a directory; `whole` is the one to be named to whoever comes second.
fn lock_in(dir: &Path, whole: &Path) -> Result<File> {
    let path = dir.join("LOCK");
    let lock = OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(&path);
    let lock = lock.map_err(|err| Error::io("opening", &path, err))?;
    match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(lock),
        Err(rustix::io::Errno::WOULDBLOCK) => Err(Error::Locked { path: whole.to_owned() }),
        Err(err) => Err(Error::io("locking", &path, err.into())),
    }
}

/// The lock of a directory, until it is dropped.
#[derive(Debug)]
pub(crate) struct Hold {
    _lock: File,
}

/// Makes a directory if it is missing, for this user alone, and takes hold of it.
///
/// # Errors
/// `Locked`, `Io`.
pub(crate) fn hold(dir: &Path) -> Result<Hold> {
    make_dir(dir)?;
    Ok(Hold { _lock: lock_in(dir, dir)? })
}

/// Takes hold of a directory without a file in it, so that what is in it may be renamed and removed meanwhile. It is made if it is missing.
///
/// # Errors
/// `Locked`, `Io`; the latter also on a file system that locks no directories, as NFS.
pub(crate) fn hold_itself(dir: &Path) -> Result<Hold> {
    make_dir(dir)?;
    let fault = |err| Error::io("locking", dir, err);
    let lock = File::open(dir).map_err(fault)?;
    match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(Hold { _lock: lock }),
        Err(rustix::io::Errno::WOULDBLOCK) => Err(Error::Locked { path: dir.to_owned() }),
        Err(err) => Err(fault(err.into())),
    }
}

/// Who the member is in a `member` directory, without taking hold of it.
///
/// # Errors
/// As [`DataDir::open`].
pub(crate) fn identity_in(member: &Path) -> Result<Option<Identity>> {
    read_identity(&member.join(IDENTITY))
}

/// The file for a snapshot that is being received.
pub(crate) fn incoming(member: &Path, id: u64) -> PathBuf {
    member.join(format!("{INCOMING}{id:016x}"))
}

/// Notes in a member's directory where the other members are.
///
/// # Errors
/// `Io`; the file is as it was then.
pub(crate) fn set_peers(member: &Path, peers: &[(u64, Vec<String>)]) -> Result<()> {
    write_whole(member, PEERS, encode_peers(peers).as_bytes())
}

/// The states that were set aside, with their numbers, oldest first.
fn damaged_states(member: &Path) -> Result<Vec<(u64, PathBuf)>> {
    let fault = |err| Error::io("listing", member, err);
    let mut found = Vec::new();
    for entry in fs::read_dir(member).map_err(fault)? {
        let entry = entry.map_err(fault)?;
        let name = entry.file_name();
        if let Some(number) = name.to_str().and_then(|name| name.strip_prefix(DAMAGED)).and_then(|number| number.parse().ok()) {
            found.push((number, entry.path()));
        }
    }
    found.sort();
    Ok(found)
}

/// Removes what a process that ended had received of snapshots: their sender begins anew.
fn remove_incoming(member: &Path) -> Result<()> {
    let fault = |err| Error::io("removing what was left of a snapshot in", member, err);
    for entry in fs::read_dir(member).map_err(fault)? {
        let entry = entry.map_err(fault)?;
        if entry.file_name().to_str().is_some_and(|name| name.starts_with(INCOMING)) {
            fs::remove_file(entry.path()).map_err(fault)?;
        }
    }
    Ok(())
}

/// Makes a directory, with those above it; each new one is there for good, also after a power cut.
fn make_dir(dir: &Path) -> Result<()> {
    let fault = |err| Error::io("making directory", dir, err);
    let missing: Vec<_> = dir.ancestors().take_while(|dir| !dir.as_os_str().is_empty() && !dir.exists()).collect();
    fs::DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(fault)?;
    for made in missing {
        sync_dir(made.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new(".")))?;
    }
    Ok(())
}

/// Makes what was created, renamed or removed in a directory durable.
pub(crate) fn sync_dir(path: &Path) -> Result<()> {
    File::open(path).and_then(|dir| dir.sync_all()).map_err(|err| Error::io("sync the directory", path, err))
}

/// Puts a file in place at once and for good: old content or new, also after a power cut.
pub(crate) fn write_whole(dir: &Path, name: &str, content: &[u8]) -> Result<()> {
    let path = dir.join(name);
    let temporary = dir.join(format!("{name}.new"));
    let write = || -> io::Result<()> {
        let mut file = OpenOptions::new().create(true).truncate(true).write(true).mode(0o600).open(&temporary)?;
        file.write_all(content)?;
        file.sync_all()?;
        fs::rename(&temporary, &path)
    };
    write().map_err(|err| Error::io("writing", &path, err))?;
    sync_dir(dir)
}

fn encode_identity(identity: &Identity) -> String {
    let Identity { cluster_id, member_id, name, joined, incarnation } = identity;
    let joined = if *joined { "joined yes\n" } else { "" };
    let incarnation = if *incarnation == 0 { String::new() } else { format!("incarnation {incarnation:016x}\n") };
    with_sum(format!("quorate {FORMAT_VERSION}\ncluster {cluster_id:016x}\nmember {member_id:016x}\nname {name}\n{joined}{incarnation}"))
}

/// A text with its checksum behind it.
fn with_sum(text: String) -> String {
    let crc = crc32c::crc32c(text.as_bytes());
    format!("{text}crc32c {crc:08x}\n")
}

fn encode_peers(peers: &[(u64, Vec<String>)]) -> String {
    // URLs have no blanks in them.
    with_sum(peers.iter().map(|(id, urls)| format!("{id:016x} {}\n", urls.join(" "))).collect())
}

fn decode_peers(bytes: &[u8]) -> Option<Vec<(u64, Vec<String>)>> {
    let text = std::str::from_utf8(bytes).ok()?;
    let (body, _) = text.split_at(text.rfind("crc32c ")?);
    if text != with_sum(body.to_owned()) {
        return None;
    }
    let peer = |line: &str| {
        let mut words = line.split_whitespace();
        let id = u64::from_str_radix(words.next()?, 16).ok()?;
        Some((id, words.map(str::to_owned).collect()))
    };
    body.lines().map(peer).collect()
}

fn read_identity(path: &Path) -> Result<Option<Identity>> {
    let bytes = match fs::read(path) {
        Ok(bytes) => bytes,
        Err(err) if err.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(err) => return Err(Error::io("reading", path, err)),
    };
    decode_identity(&bytes).map(Some).map_err(|problem| match problem {
        Problem::Damaged(offset, what) => Error::Corrupt { path: path.to_owned(), offset: Some(offset), what: what.into() },
        Problem::Newer(version) => Error::Format {
            path: path.to_owned(),
            what: format!("format version {version} is newer than this release's, {FORMAT_VERSION}"),
        },
    })
}

enum Problem {
    Damaged(u64, &'static str),
    Newer(u32),
}

fn decode_identity(bytes: &[u8]) -> std::result::Result<Identity, Problem> {
    let damaged = |offset: usize, what| Problem::Damaged(offset as u64, what);
    let text = std::str::from_utf8(bytes).map_err(|err| damaged(err.valid_up_to(), "it is not text"))?;
    let at = text.rfind("crc32c ").ok_or_else(|| damaged(text.len(), "the checksum is missing"))?;
    let (body, crc) = text.split_at(at);
    if crc != format!("crc32c {:08x}\n", crc32c::crc32c(body.as_bytes())) {
        return Err(damaged(at, "the checksum does not match what stands before it"));
    }
    // Only a whole file is read for what it says; its version comes first, for the rest may differ in another.
    let mut lines = body.lines();
    let mut field = |name: &str| lines.next().and_then(|line| line.strip_prefix(name)).and_then(|rest| rest.strip_prefix(' '));
    let version: u32 =
        field("quorate").and_then(|text| text.parse().ok()).ok_or_else(|| damaged(0, "it does not begin with a format version"))?;
    if version > FORMAT_VERSION {
        return Err(Problem::Newer(version));
    }
    let mut number = |name: &str| field(name).and_then(|text| u64::from_str_radix(text, 16).ok());
    let cluster_id = number("cluster").ok_or_else(|| damaged(0, "the cluster id is missing"))?;
    let member_id = number("member").ok_or_else(|| damaged(0, "the member id is missing"))?;
    let name = field("name").ok_or_else(|| damaged(0, "the name is missing"))?.to_owned();
    // What may be there or not.
    let rest = || body.lines().skip(4).filter_map(|line| line.split_once(' '));
    let joined = rest().any(|line| line == ("joined", "yes"));
    let incarnation = rest().find(|(name, _)| *name == "incarnation").map_or(Some(0), |(_, text)| u64::from_str_radix(text, 16).ok());
    let incarnation = incarnation.ok_or_else(|| damaged(0, "the incarnation is no number"))?;
    Ok(Identity { cluster_id, member_id, name, joined, incarnation })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Identity {
        Identity { cluster_id: 7, member_id: u64::MAX, name: "a member".into(), joined: true, incarnation: 0x1f }
    }

    #[test]
    fn a_directory_of_before_has_no_incarnation_and_gets_one() {
        let old = Identity { incarnation: 0, joined: false, ..sample() };
        assert!(matches!(decode_identity(encode_identity(&old).as_bytes()), Ok(identity) if identity == old));
        let dir = tempfile::tempdir().unwrap();
        let mut open = DataDir::open(dir.path(), None).unwrap();
        open.set_identity(old.clone()).unwrap();
        drop(open);
        let mut again = DataDir::open(dir.path(), None).unwrap();
        assert_eq!(again.identity(), Some(&old));
        let new = Identity { incarnation: 7, ..old };
        again.set_identity(new.clone()).unwrap();
        drop(again);
        assert_eq!(DataDir::open(dir.path(), None).unwrap().identity(), Some(&new));
    }

    #[test]
    fn peers_are_remembered_and_damage_is_none() {
        let dir = tempfile::tempdir().unwrap();
        let open = DataDir::open(dir.path(), None).unwrap();
        assert_eq!(open.peers(), None);
        let peers = vec![(7, vec!["http://a:1".to_owned(), "http://b:2".to_owned()]), (u64::MAX, Vec::new())];
        set_peers(open.member(), &peers).unwrap();
        assert_eq!(open.peers(), Some(peers.clone()));
        let good = encode_peers(&peers).into_bytes();
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] ^= 1;
            assert_eq!(decode_peers(&bad), None, "byte {at}");
        }
        set_peers(open.member(), &[]).unwrap();
        assert_eq!(open.peers(), Some(Vec::new()));
    }

    #[test]
    fn some_damaged_states_are_kept() {
        let dir = tempfile::tempdir().unwrap();
        let open = DataDir::open(dir.path(), None).unwrap();
        for round in 1..=DAMAGED_MAX + 2 {
            fs::create_dir(open.state()).unwrap();
            fs::write(open.state().join("db"), round.to_string()).unwrap();
            let aside = open.set_state_aside().unwrap().unwrap();
            assert_eq!(fs::read_to_string(aside.join("db")).unwrap(), round.to_string());
            assert!(!open.state().exists());
            // What is made in its place is nothing to keep before it is a state.
            fs::create_dir(open.state()).unwrap();
            assert_eq!(open.set_state_aside().unwrap(), None);
            assert!(!open.state().exists());
            open.set_rebuilt().unwrap();
        }
        let kept: Vec<u64> = damaged_states(open.member()).unwrap().into_iter().map(|(number, _)| number).collect();
        assert_eq!(kept, [3, 4, 5]);
    }

    #[test]
    fn is_remembered_and_held_alone() {
        let dir = tempfile::tempdir().unwrap();
        let mut first = DataDir::open(dir.path(), None).unwrap();
        assert_eq!(first.identity(), None);
        first.set_identity(sample()).unwrap();
        assert!(matches!(DataDir::open(dir.path(), None), Err(Error::Locked { .. })));
        drop(first);
        let again = DataDir::open(dir.path(), None).unwrap();
        assert_eq!(again.identity(), Some(&sample()));
        again.set_removed().unwrap();
        drop(again);
        assert!(matches!(DataDir::open(dir.path(), None), Err(Error::Removed)));
        use std::os::unix::fs::PermissionsExt;
        assert_eq!(fs::metadata(dir.path().join("member")).unwrap().permissions().mode() & 0o777, 0o700);
    }

    #[test]
    fn a_log_elsewhere_is_refused_where_there_is_one() {
        let (dir, elsewhere) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let open = |wal: &Path| DataDir::open(dir.path(), Some(wal));
        open(elsewhere.path()).unwrap().set_identity(sample()).unwrap();
        let here = dir.path().join("member/wal");
        fs::create_dir(&here).unwrap();
        open(elsewhere.path()).unwrap();
        fs::write(here.join("a segment"), b"x").unwrap();
        assert!(matches!(open(elsewhere.path()), Err(Error::Config(what)) if what.contains("without --wal-dir")));
        open(&here).unwrap();
        DataDir::open(dir.path(), None).unwrap();
    }

    #[test]
    fn every_flipped_byte_is_found() {
        let good = encode_identity(&sample()).into_bytes();
        assert!(matches!(decode_identity(&good), Ok(identity) if identity == sample()));
        for at in 0..good.len() {
            for bit in 0..8 {
                let mut bad = good.clone();
                bad[at] ^= 1 << bit;
                assert!(matches!(decode_identity(&bad), Err(Problem::Damaged(..))), "byte {at}, bit {bit}");
            }
        }
    }

    #[test]
    fn foreign_and_newer_directories_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("member/snap")).unwrap();
        fs::write(dir.path().join("member/snap/db"), b"bolt").unwrap();
        assert!(matches!(DataDir::open(dir.path(), None), Err(Error::Format { .. })));
        let newer = "quorate 2\nsomething new\n";
        let newer = format!("{newer}crc32c {:08x}\n", crc32c::crc32c(newer.as_bytes()));
        assert!(matches!(decode_identity(newer.as_bytes()), Err(Problem::Newer(2))));
    }
}
