//! From a backup to the directory of a node that has founded a new cluster with it, offline.
//!
//! A node's directory holds what was agreed (`kv-state.json`) and, of a server, its data (`server/`). A restore makes both anew: the
//! outcome of a founding with one founder, this node, and a member of that cluster which has the backup's state. Nothing is left to be
//! agreed on when it starts: it is bound, as after any other founding, and needs nobody.
//!
//! ```text
//! the cluster is lost; all nodes are stopped
//! one node:    restore(file, its config)       the old directory's content is in old-20261123T050000Z/
//! the others:  their directories are removed
//! it starts, and serves as the only server; then the others start, find it by JOIN, and are its clients
//! ```
//!
//! The order counts: without their directories the others remember nothing, and where JOIN has four entries or more they are enough to found
//! another cluster while the restored node is not there yet.
//!
//! The new cluster has another id, and this node another, so whoever remembers the old one is no part of it: its calls name the cluster that
//! it means, and are refused. Such a node says that it has met a stranger, and is read-only until its directory is removed; and its server,
//! if it has one, is refused by the peer port. But old servers that are a quorum are the old cluster, and go on with it. The revision lies
//! far above the backup's, as [`crate::backup::restore()`] says.
//!
//! # Invariants
//! - Who holds the directory, such as a node that runs, hinders the restore; and the other way round.
//! - Until all of the new is on disk, what was there is untouched. Then it is moved aside, what was agreed first; and what was agreed anew
//!   comes into place last. Cut off in between, the directory is one without a memory, which a node refuses to start on: the restore is to
//!   be repeated. Nothing that was there is ever removed.
//! - Data and agreement of two different clusters are never served: the node looks whether they belong together when it starts.
//!
//! # Caveats
//! - The restored cluster has one server, whatever `KV_SERVERS` says.
//! - Other clients of etcd's protocol than nodes do not say which cluster they mean, and may not notice.

use std::fs;
use std::path::{Path, PathBuf};

use super::config::{Backend, EmbedConfig};
use super::founding::agree::{Candidate, Decision, Known, NodeId, Role, State};
use super::founding::state;
use super::life::token;
use crate::backup::{RestoreOptions, Restored, free_names, restore_as};
use crate::error::{Error, Result};
use crate::storage::dir::{hold, sync_dir};

/// What is in the directory while it is not the node's yet.
const RESTORING: &str = "restoring";

/// What a node's directory has of a node, in the order in which it is moved aside; it comes into place the other way round.
const PARTS: [&str; 2] = [state::FILE, state::SERVER];

/// What a restore of a node has made.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct RestoredNode {
    /// The new cluster, as [`Node::cluster_id`](super::Node::cluster_id) has it.
    pub cluster: String,
    /// Its only server, and what there is to be known of the backup; `aside` is where the node's directory is now as it was.
    pub server: Restored,
}

/// Makes a backup into the server of a new cluster, in the directory of the node with this configuration. See the [module](self). It
/// blocks on the disk. `file` may be the URL of a backup in an object store. The new revision is `bump_revision` above the backup's;
/// [`BUMP_REVISION`](crate::backup::BUMP_REVISION) unless there is a reason. 0 leaves it as it was, for a store that nobody has ever seen.
///
/// # Errors
/// `Config`, also when the node's address cannot be told; `Format` or `Corrupt` for a file that is not a backup, or a damaged one;
/// `Locked` while a node runs there; `Io`. What was there is as it was then, and in its place. Otherwise it is `Failed`, and the text says
/// where it is.
pub fn restore(file: impl AsRef<Path>, config: &EmbedConfig, bump_revision: u64) -> Result<RestoredNode> {
    let mut config = config.clone();
    config.validate()?;
    if config.backend != Backend::Embedded {
        return Err(Error::Config("KV_BACKEND is etcd; a backup is restored to a node that has the store itself".into()));
    }
    let (peer_url, client_url, name) = (config.peer_url()?, config.client_url()?, config.hostname.clone());
    let data_dir = &config.data_dir;
    let is_new = !data_dir.exists();
    let _hold = hold(data_dir)?;
    // Of somebody who has started the server in it by itself.
    let member = data_dir.join(state::SERVER).join("member");
    let _old = if member.exists() { Some(hold(&member)?) } else { None };
    let working = data_dir.join(RESTORING);
    remove_all(&working)?;

    let (peer, client) = (peer_url.to_string(), client_url.to_string());
    let founder = Candidate { node: NodeId(rand::random()), name: name.clone(), peer_url: peer.clone(), client_url: client };
    let decision = Decision { cluster: rand::random(), founders: vec![founder.clone()] };
    let made = || -> Result<(Restored, Option<PathBuf>)> {
        let mut options = RestoreOptions::new(working.join(state::SERVER));
        options.initial_cluster = format!("{name}={peer}");
        options.name = name;
        options.initial_advertise_peer_urls = vec![peer_url];
        options.initial_cluster_token = token(&decision);
        options.bump_revision = bump_revision;
        options.mark_compacted = bump_revision > 0;
        options.store_options = config.backup.as_ref().map(|backup| backup.store_options.clone()).unwrap_or_default();
        let restored = restore_as(file.as_ref(), &options, true)?;
        let known = Known { servers: decision.founders.clone(), decision: decision.clone(), as_of: 0 };
        state::write(&working, founder.node, &State::Bound { role: Role::Server, known })?;
        Ok((restored, take_place(data_dir, &working)?))
    };
    let (mut server, aside) = made().inspect_err(|_| {
        // What cannot be removed now is removed by the next one.
        let _ = fs::remove_dir_all(&working);
        if is_new {
            let _ = fs::remove_file(data_dir.join("LOCK"));
            let _ = fs::remove_dir(data_dir);
        }
    })?;
    server.aside = aside;
    // Empty by now.
    let _ = fs::remove_dir_all(&working);
    Ok(RestoredNode { cluster: token(&decision), server })
}

fn remove_all(path: &Path) -> Result<()> {
    match fs::remove_dir_all(path) {
        Err(err) if err.kind() != std::io::ErrorKind::NotFound => Err(Error::io("removing", path, err)),
        _ => Ok(()),
    }
}

/// Has what was made take the place of what is there. Returns where that is now.
fn take_place(data_dir: &Path, working: &Path) -> Result<Option<PathBuf>> {
    let there: Vec<&str> = PARTS.into_iter().filter(|part| data_dir.join(part).exists()).collect();
    let aside = if there.is_empty() { None } else { Some(free_names(data_dir).1) };
    if let Some(aside) = &aside {
        fs::create_dir(aside).map_err(|err| Error::io("making directory", aside, err))?;
    }
    let away = aside.iter().flat_map(|aside| there.iter().map(|part| (data_dir.join(part), aside.join(part))));
    let into = PARTS.into_iter().rev().map(|part| (working.join(part), data_dir.join(part)));
    let mut done: Vec<(PathBuf, PathBuf)> = Vec::new();
    for (from, to) in away.chain(into) {
        // Each is on disk before the next: after a power cut, too, things stand as after one of the steps.
        let moved = fs::rename(&from, &to).map_err(|err| Error::io("renaming", &from, err));
        let moved = moved
            .inspect(|()| done.push((from, to)))
            .and_then(|()| aside.iter().map(PathBuf::as_path).chain([data_dir]).try_for_each(sync_dir));
        if let Err(err) = moved {
            put_back(&done, data_dir, &err)?;
            if let Some(aside) = &aside {
                // Empty again.
                let _ = fs::remove_dir(aside);
            }
            return Err(err);
        }
    }
    Ok(aside)
}

/// Undoes the steps that were done, the last one first.
///
/// # Errors
/// `Failed`, and where everything is, if that fails, too.
fn put_back(done: &[(PathBuf, PathBuf)], data_dir: &Path, why: &Error) -> Result<()> {
    for (from, to) in done.iter().rev() {
        if let Err(err) = fs::rename(to, from) {
            let (from, to) = (from.display(), to.display());
            let what = format!("the restore was not finished: {why}; nor could it be undone: {err}. {to} was {from} before: rename it");
            return Err(Error::Failed(what));
        }
    }
    sync_dir(data_dir)
}

#[cfg(test)]
mod tests {
    use super::super::founding::state::NodeDir;
    use super::*;
    use crate::snapshot;
    use crate::storage::dir::identity_in;

    fn backup(dir: &Path) -> PathBuf {
        let file = dir.join("a backup");
        let header = snapshot::Header { cluster_id: 7, revision: 1, ..snapshot::Header::default() };
        snapshot::write(&header, [], &mut fs::File::create(&file).unwrap(), &file).unwrap();
        file
    }

    fn config(data_dir: &Path) -> EmbedConfig {
        let mut config = EmbedConfig { data_dir: data_dir.to_owned(), join: vec!["127.0.0.1".into()], ..EmbedConfig::default() };
        config.hostname = "node-1".into();
        config
    }

    fn names(dir: &Path) -> Vec<String> {
        let mut names: Vec<_> = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    /// What is agreed and what is served are of the same cluster, as if it had been founded; and what was there is kept.
    #[test]
    fn a_restored_node_has_founded_its_cluster() {
        let dir = tempfile::tempdir().unwrap();
        let (file, data_dir) = (backup(dir.path()), dir.path().join("data"));
        let first = restore(&file, &config(&data_dir), 100).unwrap();
        assert_eq!((first.server.backup_revision, first.server.revision, first.server.from_cluster_id), (1, 101, 7));
        assert_eq!((first.server.aside.clone(), names(&data_dir)), (None, vec!["LOCK".into(), "kv-state.json".into(), "server".into()]));
        let (held, state) = NodeDir::open(&data_dir).unwrap();
        let State::Bound { role: Role::Server, known } = &state else { panic!("{state:?}") };
        assert_eq!((token(&known.decision), known.servers.len()), (first.cluster.clone(), 1));
        assert_eq!((known.servers[0].node, known.servers[0].peer_url.as_str()), (held.node(), "http://127.0.0.1:5707"));
        let identity = identity_in(&data_dir.join("server/member")).unwrap().unwrap();
        assert_eq!(super::super::cluster_number(&known.decision), Some(identity.cluster_id));
        assert_eq!((identity.cluster_id, identity.member_id), (first.server.cluster_id, first.server.member_id));
        // While a node runs nothing is touched.
        assert!(matches!(restore(&file, &config(&data_dir), 100), Err(Error::Locked { .. })));
        let node = held.node();
        drop(held);
        let second = restore(&file, &config(&data_dir), 0).unwrap();
        assert!(second.cluster != first.cluster && second.server.cluster_id != first.server.cluster_id);
        let aside = second.server.aside.unwrap();
        assert_eq!(names(&aside), ["kv-state.json", "server"]);
        // Kept as it was: renamed back, it is a node's directory.
        let (old, state) = NodeDir::open(&aside).unwrap();
        assert!(old.node() == node && matches!(state, State::Bound { known, .. } if token(&known.decision) == first.cluster));
    }

    /// Wherever it was cut off, it is not taken for a node's directory until it is repeated.
    #[test]
    fn a_restore_that_was_cut_off_is_repeated() {
        let dir = tempfile::tempdir().unwrap();
        let (file, data_dir) = (backup(dir.path()), dir.path().join("data"));
        let aside = data_dir.join("old-before");
        for cut_off in 1..=3 {
            let _ = fs::remove_dir_all(&data_dir);
            let first = restore(&file, &config(&data_dir), 0).unwrap();
            // As far as the steps go: what was agreed is aside; the data is; the new data is in place.
            fs::create_dir(&aside).unwrap();
            fs::rename(data_dir.join(state::FILE), aside.join(state::FILE)).unwrap();
            if cut_off >= 2 {
                fs::rename(data_dir.join(state::SERVER), aside.join(state::SERVER)).unwrap();
            }
            fs::create_dir(data_dir.join(RESTORING)).unwrap();
            if cut_off == 3 {
                fs::create_dir(data_dir.join(state::SERVER)).unwrap();
            }
            let opened = NodeDir::open(&data_dir);
            assert!(matches!(&opened, Err(Error::Format { what, .. }) if what.contains("restore")), "{cut_off}: {opened:?}");
            let again = restore(&file, &config(&data_dir), 0).unwrap();
            assert!(again.cluster != first.cluster && !data_dir.join(RESTORING).exists());
            NodeDir::open(&data_dir).unwrap();
            assert!(aside.join(state::FILE).exists());
        }
    }

    #[test]
    fn what_cannot_be_restored_leaves_nothing_behind() {
        let dir = tempfile::tempdir().unwrap();
        let (file, data_dir) = (dir.path().join("no backup"), dir.path().join("data"));
        fs::write(&file, "no backup").unwrap();
        restore(&file, &config(&data_dir), 0).unwrap_err();
        assert!(!data_dir.exists());
        let etcd = EmbedConfig { backend: Backend::Etcd, addr: vec!["http://127.0.0.1:1".parse().unwrap()], ..EmbedConfig::default() };
        assert!(matches!(restore(&file, &etcd, 0), Err(Error::Config(what)) if what.contains("KV_BACKEND")));
        let nowhere = EmbedConfig { join: vec!["a".into()], ..config(&data_dir) };
        assert!(matches!(restore(&file, &nowhere, 0), Err(Error::Config(what)) if what.contains("ADVERTISE_IP")));
        // A step that fails is undone.
        let good = backup(dir.path());
        let first = restore(&good, &config(&data_dir), 0).unwrap();
        let working = data_dir.join(RESTORING);
        fs::create_dir(&working).unwrap();
        assert!(matches!(take_place(&data_dir, &working), Err(Error::Io { .. })));
        let (_, state) = NodeDir::open(&data_dir).unwrap();
        assert!(matches!(state, State::Bound { known, .. } if token(&known.decision) == first.cluster));
        assert!(!names(&data_dir).iter().any(|name| name.starts_with("old-")), "{:?}", names(&data_dir));
    }
}
