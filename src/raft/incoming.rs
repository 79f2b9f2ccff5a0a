//! A snapshot on its way in: from a received file, in [the format](crate::snapshot), to a store beside the one in use.
//!
//! ```text
//! incoming-<id>  --Builder::step, a bounded piece at a time-->  a successor in the state's directory, synced
//!                --finish: read back whole, as at a start----->  Prepared
//! Prepared       --openraft, between two entries-------------->  CURRENT names it: from here on a restart finds it
//!                                                                Machine::replace: from here on requests find it
//!                --openraft, after that------------------------>  the log up to it is purged
//! ```
//!
//! # Invariants
//! - Until `CURRENT` names the new store the old one is what it was; a file that is cut short, damaged, of another cluster or of another
//!   entry than its sender says ends in an error that names it, and the new store's files are removed.
//! - What is in the new store was checked three times: each frame and the whole file by its checksums, the store by its own when it is
//!   read back, and its revision against the one that was recorded.
//! - The new store says up to which entry it was installed ([`META_INSTALLED`]). A start that finds the log older than that knows that
//!   it was interrupted between the two, and [finishes](Machine::installed) the purge; nothing else may be ahead of the log.

use std::fs::File;
use std::io::BufReader;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use prost::Message;

use crate::error::{Error, Result};
use crate::mvcc::Store;
use crate::proto::internal;
use crate::snapshot::{Decoder, Header, Item};
use crate::storage::Backend;
use crate::storage::history::{History, HistoryOptions, META_BYTES_MAX, META_NAME_BYTES_MAX};

use super::apply::{META_INSTALLED, Machine, Prepared};
use super::{LogId, log_id, log_id_to_proto};

/// Bytes of items that one step puts into the new store, or one item more: some tens of milliseconds of disk.
const STEP_BYTES: usize = 2 << 20;

/// What the file is read through.
const READ_BYTES: usize = 256 << 10;

/// Builds a store from a file. See the module's head. All of it blocks on the disk.
pub(crate) struct Builder {
    path: PathBuf,
    decoder: Decoder<BufReader<File>>,
    backend: Arc<dyn Backend>,
    history: History,
    applied: Bytes,
    last: LogId,
}

impl Builder {
    /// Opens the file and makes an empty store beside the machine's. The snapshot must be of this cluster and of this entry.
    ///
    /// # Errors
    /// `Format` or `Corrupt` names the file; `Io`.
    pub fn begin(path: &Path, machine: &Machine, cluster_id: u64, last: LogId) -> Result<Builder> {
        let file = File::open(path).map_err(|err| Error::io("open", path, err))?;
        let decoder = Decoder::new(BufReader::with_capacity(READ_BYTES, file), path)?;
        let header = decoder.header();
        check(header, cluster_id, last).map_err(|what| Error::Format { path: path.to_owned(), what })?;
        let applied = internal::Applied { log_id: Some(log_id_to_proto(last)), revision: header.revision };
        let backend = machine.store().history().backend().successor()?;
        let (history, _) = History::open(backend.clone(), HistoryOptions::default(), &mut |_, _| Ok(()))?;
        Ok(Builder { path: path.to_owned(), decoder, backend, history, applied: applied.encode_to_vec().into(), last })
    }

    /// Puts more of the file into the new store. Returns whether there is more to come.
    ///
    /// # Errors
    /// Damage of the file, with the byte where it was noticed, and `Io`.
    pub fn step(&mut self) -> Result<bool> {
        let mut bytes = 0;
        let mut more = true;
        while more && bytes < STEP_BYTES {
            match self.decoder.next_item()? {
                None => more = false,
                Some(Item::Meta { key, value }) => {
                    if key.len() > META_NAME_BYTES_MAX || key.len() + value.len() > META_BYTES_MAX {
                        let what = format!("the meta {:?} is larger than this release stores", key.escape_ascii().to_string());
                        return Err(Error::Corrupt { path: self.path.clone(), offset: None, what });
                    }
                    bytes += key.len() + value.len();
                    self.history.put_meta(&key, Some(value));
                }
                Some(Item::Record { main, sub, tombstone, bytes: record }) => {
                    bytes += record.len();
                    // The decoder has checked the order and the size.
                    self.history.append(crate::storage::Revision { main, sub }, crate::storage::Record { bytes: record, tombstone });
                }
            }
        }
        if !more {
            self.history.put_meta(META_INSTALLED, Some(log_id_to_proto(self.last).encode_to_vec().into()));
        }
        self.history.commit(self.applied.clone());
        self.history.write_out()?;
        Ok(more)
    }

    /// Syncs the new store, reads it back, and has it ready to take the old one's place. Only after a step that said that it was the last.
    ///
    /// # Errors
    /// `Corrupt` when the store is not what the snapshot said, `Io`.
    pub fn finish(self, machine: &Machine, options: HistoryOptions) -> Result<Prepared> {
        let Builder { path, decoder, backend, history, last, .. } = self;
        if decoder.summary().is_none() {
            return Err(Error::Failed(format!("the snapshot {} was not read to its end", path.display())));
        }
        history.sync()?;
        drop(history);
        let mut attached = Vec::new();
        let (store, saved) = Store::open(backend, options, &mut |lease, key| attached.push((lease, key)))?;
        let prepared = machine.prepare(Arc::new(store), saved, attached)?;
        match prepared.meta().last_log_id {
            Some(found) if found == last => Ok(prepared),
            found => Err(Error::Failed(format!("the snapshot {} gave a state of entry {found:?}, not {last}", path.display()))),
        }
    }
}

fn check(header: &Header, cluster_id: u64, last: LogId) -> std::result::Result<(), String> {
    if header.cluster_id != cluster_id {
        return Err(format!("it is of cluster {:x}, not of {cluster_id:x}", header.cluster_id));
    }
    let applied = log_id(header.applied.term, header.applied.index);
    if applied != last {
        return Err(format!("it holds the state of entry {applied}, and its sender says {last}"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::time::Duration;

    use futures_util::FutureExt;
    use openraft::EntryPayload;
    use openraft::storage::RaftStateMachine;

    use super::*;
    use crate::lease::{Lessor, LessorOptions};
    use crate::lock::lock;
    use crate::proto::etcdserverpb::{AlarmRequest, CompactionRequest, DeleteRangeRequest, LeaseCheckpoint, LeaseGrantRequest, PutRequest};
    use crate::proto::internal::{Command, command::Op};
    use crate::raft::apply::StateMachine;
    use crate::raft::outgoing::Writer;
    use crate::raft::{Membership, Proposal, RaftEntry};
    use crate::storage::sled::Sled;

    const CLUSTER: u64 = 0xc;

    fn tempdir() -> tempfile::TempDir {
        tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap()
    }

    fn open(dir: &Path) -> Arc<Machine> {
        let mut attached = Vec::new();
        let backend = Arc::new(Sled::open(dir).unwrap());
        let (store, saved) = Store::open(backend, HistoryOptions::default(), &mut |lease, key| attached.push((lease, key))).unwrap();
        let lessor = Lessor::new(LessorOptions::default());
        let clock = Arc::new(|| Duration::ZERO);
        let machine = Machine::new(Arc::new(store), saved, attached, lessor, clock, Duration::MAX, Arc::default());
        Arc::new(machine.unwrap())
    }

    fn apply(machine: &Arc<Machine>, payloads: impl IntoIterator<Item = EntryPayload<Proposal, u64, internal::Member>>) {
        let next = machine.applied().log_id.map_or(1, |id| id.index + 1);
        let entries = (next..).zip(payloads).map(|(index, payload)| Ok((RaftEntry { log_id: log_id(2, index), payload }, None)));
        let entries: Vec<_> = entries.collect();
        let mut state = StateMachine { machine: machine.clone() };
        state.apply(futures_util::stream::iter(entries)).now_or_never().unwrap().unwrap();
    }

    fn commands(ops: impl IntoIterator<Item = Op>) -> EntryPayload<Proposal, u64, internal::Member> {
        let commands = ops.into_iter().map(|op| Command { id: 0, op: Some(op) }).collect();
        EntryPayload::Normal(Proposal { commands: Arc::new(commands) })
    }

    fn put(key: String, lease: i64) -> Op {
        Op::Put(PutRequest { key: key.into(), value: vec![b'v'; 1000].into(), lease, ..PutRequest::default() })
    }

    /// A state with everything in it: a few hundred keys, deletions, a lease, an alarm, a compaction, a membership.
    fn furnish(machine: &Arc<Machine>) {
        let members = [(1, internal::Member { name: "a".into(), ..internal::Member::default() })];
        let membership = Membership::new(vec![[1].into()], std::collections::BTreeMap::from(members)).unwrap();
        apply(machine, [EntryPayload::Membership(membership), commands((0..300).map(|key| put(format!("k{key:03}"), 0)))]);
        let delete = |key: i32| Op::DeleteRange(DeleteRangeRequest { key: format!("k{key:03}").into(), ..DeleteRangeRequest::default() });
        let alarm = Op::Alarm(AlarmRequest { action: 1, member_id: 1, alarm: 1 });
        let grant = Op::LeaseGrant(LeaseGrantRequest { id: 7, ttl: 100 });
        let compact = Op::Compaction(CompactionRequest { revision: 310, physical: false });
        let version = Op::ClusterVersion(internal::ClusterVersion { version: "3.7.0".into() });
        apply(machine, [commands((0..50).map(delete)), commands([grant, put("leased".into(), 7), alarm, compact, version])]);
        assert_eq!(machine.metas().get(&b"cluster/version"[..]).map(|version| &version[..]), Some(&b"3.7.0"[..]));
    }

    /// Entries here are of term 2. What has expired in another may have been renewed by who led in between.
    #[test]
    fn an_expiry_counts_in_its_own_term() {
        let dir = tempdir();
        let machine = open(dir.path());
        let grant = Op::LeaseGrant(LeaseGrantRequest { id: 7, ttl: 100 });
        let expiry = |term| Op::LeaseExpiry(internal::LeaseExpiry { id: 7, term });
        apply(&machine, [commands([grant, put("leased".into(), 7)]), commands([expiry(1), expiry(3), expiry(0)])]);
        assert!(lock(&machine.lessor).contains(7) && machine.store().get(b"leased", 0).unwrap().is_some());
        apply(&machine, [commands([expiry(2)])]);
        assert!(!lock(&machine.lessor).contains(7) && machine.store().get(b"leased", 0).unwrap().is_none());
    }

    /// So does what a lease has left.
    #[test]
    fn a_checkpoint_counts_in_its_own_term() {
        let dir = tempdir();
        let machine = open(dir.path());
        let grant = |id| Op::LeaseGrant(LeaseGrantRequest { id, ttl: 1000 });
        let seen = |term, left| {
            let one = |id| LeaseCheckpoint { id, remaining_ttl: left };
            Op::LeaseCheckpoints(internal::LeaseCheckpoints { term, checkpoints: vec![one(7), one(9), one(8)] })
        };
        let left = |id| {
            let mut lessor = lock(&machine.lessor);
            lessor.demote();
            lessor.promote(Duration::ZERO, Duration::ZERO);
            lessor.time_to_live(id, Duration::ZERO, false).map(|found| found.remaining)
        };
        apply(&machine, [commands([grant(7), grant(8)]), commands([seen(1, 100), seen(3, 100)])]);
        assert_eq!((left(7), left(8), left(9)), (Some(1000), Some(1000), None));
        apply(&machine, [commands([seen(2, 600)])]);
        assert_eq!((left(7), left(8)), (Some(600), Some(600)));
        let forget = Op::LeaseCheckpoint(LeaseCheckpoint { id: 7, remaining_ttl: 0 });
        apply(&machine, [commands([forget])]);
        assert_eq!((left(7), left(8)), (Some(1000), Some(600)));
    }

    fn written(machine: &Machine, to: &Path) -> LogId {
        let start = machine.begin_snapshot(true).unwrap();
        let last = start.position.log_id.unwrap();
        let mut writer = Writer::new(CLUSTER, 1, 0, start).unwrap();
        let mut bytes = Vec::new();
        while !writer.is_finished() {
            bytes.extend(writer.step().unwrap().into_iter().flatten());
        }
        fs::write(to, bytes).unwrap();
        last
    }

    fn built(machine: &Machine, file: &Path, last: LogId) -> Result<Prepared> {
        let mut builder = Builder::begin(file, machine, CLUSTER, last)?;
        while builder.step()? {}
        builder.finish(machine, HistoryOptions::default())
    }

    /// What can be seen of a state.
    fn seen(machine: &Machine) -> impl PartialEq + std::fmt::Debug + use<> {
        machine.check().unwrap();
        let (position, store) = (machine.applied(), machine.store());
        let hash = store.hash(0).unwrap();
        (store.revisions(), (hash.hash, hash.compacted), position.log_id, position.membership, machine.metas())
    }

    #[test]
    fn a_state_goes_over_whole_and_is_found_after_a_restart() {
        let (from, to, file) = (tempdir(), tempdir(), tempdir());
        let (sender, receiver) = (open(from.path()), open(to.path()));
        furnish(&sender);
        apply(&receiver, [commands([put("old".into(), 0)])]);
        let file = file.path().join("incoming");
        let last = written(&sender, &file);
        // What comes after the beginning is not in it.
        let at_once = seen(&sender);
        apply(&sender, [commands([put("later".into(), 0)])]);
        let reader = receiver.store();
        let prepared = built(&receiver, &file, last).unwrap();
        prepared.store().history().backend().take_over().unwrap();
        receiver.replace(prepared);
        assert_eq!(seen(&receiver), at_once);
        assert_eq!(receiver.durable().log_id, Some(last));
        assert!(lock(&receiver.lessor).contains(7));
        // Who reads the old store still can; its files go when it is read no more.
        assert!(reader.get(b"old", 0).unwrap().is_some() && receiver.take_unused().is_empty());
        drop(reader);
        assert_eq!(receiver.take_unused().len(), 1);
        assert_eq!(fs::read_dir(to.path()).unwrap().count(), 2);
        // It takes the entries that follow, and is there after a restart.
        apply(&receiver, [commands([put("later".into(), 0)])]);
        assert_eq!(seen(&receiver), seen(&sender));
        receiver.store().history().sync().unwrap();
        let expected = seen(&receiver);
        receiver.close();
        let again = open(to.path());
        assert_eq!(seen(&again), expected);
        assert_eq!(again.installed(), Some(last));
    }

    /// Wherever a stream is cut or changed, it is refused by name and the state is what it was.
    #[test]
    fn a_cut_or_changed_stream_is_refused_and_changes_nothing() {
        let (from, to, file) = (tempdir(), tempdir(), tempdir());
        let (sender, receiver) = (open(from.path()), open(to.path()));
        furnish(&sender);
        apply(&receiver, [commands([put("old".into(), 0)])]);
        receiver.store().history().sync().unwrap();
        let (before, file) = (seen(&receiver), file.path().join("incoming"));
        let last = written(&sender, &file);
        let sound = fs::read(&file).unwrap();
        let refused = |bytes: &[u8]| {
            fs::write(&file, bytes).unwrap();
            let text = built(&receiver, &file, last).err().unwrap().to_string();
            assert!(text.contains(&file.display().to_string()), "{text}");
            text
        };
        for at in [0, 7, 100, sound.len() / 2, sound.len() - 33, sound.len() - 1] {
            refused(&sound[..at]);
            let mut changed = sound.clone();
            changed[at] ^= 0x10;
            refused(&changed);
        }
        assert!(refused(&sound[..sound.len() / 2]).contains("cut off"));
        fs::write(&file, &sound).unwrap();
        assert!(Builder::begin(&file, &receiver, CLUSTER + 1, last).err().unwrap().to_string().contains("cluster"));
        assert!(Builder::begin(&file, &receiver, CLUSTER, log_id(2, 999)).err().unwrap().to_string().contains("999"));
        assert_eq!(seen(&receiver), before);
        assert_eq!(fs::read_dir(to.path()).unwrap().count(), 2);
        // One that is never finished is nothing either.
        let mut builder = Builder::begin(&file, &receiver, CLUSTER, last).unwrap();
        assert!(builder.step().is_ok());
        drop(builder);
        drop(built(&receiver, &file, last).unwrap());
        receiver.close();
        assert_eq!(fs::read_dir(to.path()).unwrap().count(), 2);
        assert_eq!(seen(&open(to.path())), before);
    }
}
