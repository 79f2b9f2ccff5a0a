//! What a node remembers: `kv-state.json`, in the data directory.
//!
//! ```json
//! {
//!   "crc32c": "5d1b3f0a",
//!   "format": 1,
//!   "node": "6f0c...",
//!   "state": { "bound": { "role": "server", "cluster": "91ab...", "founders": [...], "servers": [...], "as_of": 0 } }
//! }
//! ```
//!
//! A node that is enlisted has `"format": 2`, and `"enlisted": { "member": "...", "of": "...", "since": 9, "cluster": ... }` in place of `bound`.
//! What a release before it would understand has still format 1, and is so read by it. A node that has met two clusters has `"met"` in its
//! `unbound`, each entry with its cluster; a release before it takes no notice of that.
//!
//! The checksum is over the same without it, as it would be written: a person can read the file, and no byte of it can change unseen.
//!
//! # Invariants
//! - The file is replaced whole: written beside, synced, renamed, and the directory synced. After a crash it is the old one or the new one.
//! - Each change that a message counts on is on disk before the message is sent; see [`agree`](super::agree).
//! - A file that is damaged, or of a newer format, is refused and left as it is; so is a server's data without it.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use super::agree::{Ballot, Candidate, Decision, Grant, Known, NodeId, Role, State, Unbound};
use crate::error::{Error, Result};
use crate::storage::dir::{Hold, hold, identity_in, sync_dir, write_whole};

/// What the node remembers.
pub(crate) const FILE: &str = "kv-state.json";

/// Version of the format. A release reads its own and older ones, and writes the oldest that can say what it has to.
const FORMAT: u64 = 2;

/// Where a server keeps its data, below the node's directory.
pub(crate) const SERVER: &str = "server";

/// A node's directory, held by this node until it is dropped.
#[derive(Debug)]
pub(crate) struct NodeDir {
    path: PathBuf,
    node: NodeId,
    _hold: Hold,
}

impl NodeDir {
    /// Takes hold of a directory, and reads what the node remembers. A new one is made, with a new node id, which is on disk on return.
    ///
    /// # Errors
    /// `Locked`; `Corrupt` and `Format` for the file; `Io`.
    pub fn open(path: &Path) -> Result<(NodeDir, State)> {
        let hold = hold(path)?;
        let file = path.join(FILE);
        let bytes = match fs::read(&file) {
            Ok(bytes) => Some(bytes),
            Err(err) if err.kind() == io::ErrorKind::NotFound => None,
            Err(err) => return Err(Error::io("reading", &file, err)),
        };
        match bytes {
            Some(bytes) => {
                let (node, state) = decode(&bytes).map_err(|problem| match problem {
                    Problem::Damaged(what) => Error::Corrupt { path: file.clone(), offset: None, what },
                    Problem::Newer(format) => {
                        let what = format!("format version {format} is newer than this release's, {FORMAT}");
                        Error::Format { path: file.clone(), what }
                    }
                })?;
                Ok((NodeDir { path: path.to_owned(), node, _hold: hold }, state))
            }
            None => {
                // Until the last step of a restore there is no memory, and there is this.
                for foreign in [SERVER, "member", "restoring"] {
                    if path.join(foreign).exists() {
                        let what = format!(
                            "{foreign} is there, but no {FILE}: this is not the directory of a node, or it has lost its memory, \
                             or a restore was cut off and is to be repeated"
                        );
                        return Err(Error::Format { path: path.to_owned(), what });
                    }
                }
                let dir = NodeDir { path: path.to_owned(), node: NodeId(rand::random()), _hold: hold };
                let state = State::Unbound(Unbound::default());
                dir.save(&state)?;
                Ok((dir, state))
            }
        }
    }

    /// Who this node is.
    pub fn node(&self) -> NodeId {
        self.node
    }

    /// Where its server keeps the data, if it is one.
    pub fn server(&self) -> PathBuf {
        self.path.join(SERVER)
    }

    /// Removes what a server has left that this node is not, if there is anything: one that was enlisted, and put out before it has voted. What a
    /// founder has is never removed.
    ///
    /// # Errors
    /// `Io`, and those of reading who the server was.
    pub fn forget_server(&self) -> Result<()> {
        let server = self.server();
        if identity_in(&server.join("member"))?.is_some_and(|identity| !identity.joined) {
            tracing::warn!(path = %server.display(), "this node is a client, and has the data of a server that has founded a cluster: it is left as it is");
            return Ok(());
        }
        match fs::remove_dir_all(&server) {
            Ok(()) => tracing::info!(path = %server.display(), "removed what this node had as a server, which it is not"),
            Err(err) if err.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(err) => return Err(Error::io("removing", &server, err)),
        }
        sync_dir(&self.path)
    }

    /// Puts the state on disk, in place of what was there.
    ///
    /// # Errors
    /// `Io`. What is on disk then is the old state or the new one; only reading it again tells.
    pub fn save(&self, state: &State) -> Result<()> {
        write(&self.path, self.node, state)
    }
}

/// Puts what a node remembers into a directory.
///
/// # Errors
/// As [`NodeDir::save`].
pub(crate) fn write(path: &Path, node: NodeId, state: &State) -> Result<()> {
    write_whole(path, FILE, encode(node, state).as_bytes())
}

fn encode(node: NodeId, state: &State) -> String {
    let mut whole = Map::new();
    let format = if matches!(state, State::Enlisted { .. }) { FORMAT } else { 1 };
    whole.insert("format".into(), format.into());
    whole.insert("node".into(), hex(node.0));
    whole.insert("state".into(), state_to_json(state));
    seal(whole)
}

/// The text of a file, with the checksum over the text without it.
fn seal(mut whole: Map<String, Value>) -> String {
    let crc = crc32c::crc32c(text(&whole).as_bytes());
    whole.insert("crc32c".into(), format!("{crc:08x}").into());
    text(&whole)
}

fn text(whole: &Map<String, Value>) -> String {
    // Keys are in order, so that equal values have equal texts.
    format!("{:#}\n", Value::Object(whole.clone()))
}

#[derive(Debug)]
enum Problem {
    Damaged(String),
    Newer(u64),
}

fn decode(bytes: &[u8]) -> Result<(NodeId, State), Problem> {
    let damaged = |what: &str| Problem::Damaged(what.to_owned());
    let whole: Value = serde_json::from_slice(bytes).map_err(|err| Problem::Damaged(format!("it is not JSON: {err}")))?;
    let Value::Object(mut whole) = whole else { return Err(damaged("it is not an object")) };
    whole.remove("crc32c");
    if seal(whole.clone()).as_bytes() != bytes {
        return Err(damaged("the checksum does not match, or it was edited"));
    }
    // Only a whole file is read for what it says; its version comes first, for the rest may differ in another.
    let format = whole.get("format").and_then(Value::as_u64).ok_or_else(|| damaged("the format version is missing"))?;
    if format > FORMAT {
        return Err(Problem::Newer(format));
    }
    let read = || Some((NodeId(from_hex(whole.get("node")?)?), state_from_json(whole.get("state")?)?));
    read().ok_or_else(|| damaged("a part is missing, or is not what it should be"))
}

fn hex(number: u128) -> Value {
    format!("{number:032x}").into()
}

fn from_hex(value: &Value) -> Option<u128> {
    u128::from_str_radix(value.as_str()?, 16).ok()
}

fn state_to_json(state: &State) -> Value {
    match state {
        State::Unbound(Unbound { list, entries, promised, accepted, met }) => {
            let mut unbound = json!({
                "list": hex(*list),
                "join": entries,
                "promised": promised.as_ref().map(ballot_to_json),
                "accepted": accepted.as_ref().map(|(ballot, decision)| json!({
                    "ballot": ballot_to_json(ballot),
                    "cluster": hex(decision.cluster),
                    "founders": candidates_to_json(&decision.founders),
                })),
            });
            // Not but where there is something to be said: it is rare.
            if let Some(unbound) = unbound.as_object_mut().filter(|_| !met.is_empty()) {
                unbound.insert("met".into(), met.iter().map(|(entry, cluster)| (entry.clone(), hex(*cluster))).collect());
            }
            json!({ "unbound": unbound })
        }
        State::Bound { role, known } => json!({ "bound": known_to_json(known, [("role", role.to_string().into())]) }),
        State::Enlisted { known, grant } => {
            // As text: a number in JSON may not have all of its bits.
            let id = |id: u64| format!("{id:016x}").into();
            let grant = [("member", id(grant.member)), ("of", id(grant.cluster)), ("since", grant.since.into())];
            json!({ "enlisted": known_to_json(known, grant) })
        }
        State::Removed { cluster } => json!({ "removed": { "cluster": hex(*cluster) } }),
    }
}

fn known_to_json<const N: usize>(known: &Known, more: [(&str, Value); N]) -> Value {
    let of_cluster = [
        ("cluster", hex(known.decision.cluster)),
        ("founders", candidates_to_json(&known.decision.founders)),
        ("servers", candidates_to_json(&known.servers)),
        ("as_of", known.as_of.into()),
    ];
    Value::Object(of_cluster.into_iter().chain(more).map(|(name, value)| (name.to_owned(), value)).collect())
}

fn state_from_json(value: &Value) -> Option<State> {
    let (kind, of) = value.as_object()?.iter().next()?;
    let decision =
        |of: &Value| Some(Decision { cluster: from_hex(of.get("cluster")?)?, founders: candidates_from_json(of.get("founders")?)? });
    let known = |of: &Value| {
        let servers = candidates_from_json(of.get("servers")?)?;
        Some(Known { decision: decision(of)?, servers, as_of: of.get("as_of")?.as_u64()? })
    };
    match kind.as_str() {
        "unbound" => {
            let entries = of.get("join")?.as_array()?.iter().map(|entry| entry.as_str().map(str::to_owned)).collect::<Option<_>>()?;
            let promised = match of.get("promised")? {
                Value::Null => None,
                ballot => Some(ballot_from_json(ballot)?),
            };
            let accepted = match of.get("accepted")? {
                Value::Null => None,
                accepted => Some((ballot_from_json(accepted.get("ballot")?)?, decision(accepted)?)),
            };
            let met = match of.get("met") {
                None => BTreeMap::new(),
                Some(met) => met.as_object()?.iter().map(|(entry, of)| Some((entry.clone(), from_hex(of)?))).collect::<Option<_>>()?,
            };
            Some(State::Unbound(Unbound { list: from_hex(of.get("list")?)?, entries, promised, accepted, met }))
        }
        "bound" => {
            let role = match of.get("role")?.as_str()? {
                "server" => Role::Server,
                "client" => Role::Client,
                _ => return None,
            };
            Some(State::Bound { role, known: known(of)? })
        }
        "enlisted" => {
            let id = |name: &str| u64::from_str_radix(of.get(name)?.as_str()?, 16).ok();
            let grant = Grant { member: id("member")?, cluster: id("of")?, since: of.get("since")?.as_u64()? };
            Some(State::Enlisted { known: known(of)?, grant })
        }
        "removed" => Some(State::Removed { cluster: from_hex(of.get("cluster")?)? }),
        _ => None,
    }
}

fn ballot_to_json(ballot: &Ballot) -> Value {
    json!({ "round": ballot.round, "by": hex(ballot.by.0) })
}

fn ballot_from_json(value: &Value) -> Option<Ballot> {
    Some(Ballot { round: value.get("round")?.as_u64()?, by: NodeId(from_hex(value.get("by")?)?) })
}

fn candidates_to_json(candidates: &[Candidate]) -> Value {
    let all = candidates.iter().map(|Candidate { node, name, peer_url, client_url }| {
        json!({ "node": hex(node.0), "name": name, "peer_url": peer_url, "client_url": client_url })
    });
    all.collect()
}

fn candidates_from_json(value: &Value) -> Option<Vec<Candidate>> {
    let text = |of: &Value, name: &str| of.get(name)?.as_str().map(str::to_owned);
    let one = |of: &Value| {
        let node = NodeId(from_hex(of.get("node")?)?);
        Some(Candidate { node, name: text(of, "name")?, peer_url: text(of, "peer_url")?, client_url: text(of, "client_url")? })
    };
    value.as_array()?.iter().map(one).collect()
}

#[cfg(test)]
mod tests {
    use super::super::agree::candidate;
    use super::*;

    fn states() -> Vec<State> {
        let candidate = |id: u128| Candidate { name: format!("node \"{id}\""), ..candidate(id) };
        let decision = Decision { cluster: u128::MAX, founders: vec![candidate(1), candidate(2), candidate(3)] };
        let ballot = Ballot { round: u64::MAX, by: NodeId(1) };
        let unbound = Unbound { list: 5, entries: vec!["a:1".into(), "b:2".into()], ..Unbound::default() };
        let met = BTreeMap::from([("a:1".to_owned(), 7), ("b:2".to_owned(), u128::MAX)]);
        let known = Known { decision: decision.clone(), servers: vec![candidate(4)], as_of: u64::MAX };
        vec![
            State::Unbound(unbound.clone()),
            State::Unbound(Unbound { promised: Some(ballot), ..unbound.clone() }),
            State::Unbound(Unbound { met, ..unbound.clone() }),
            State::Unbound(Unbound { promised: Some(ballot), accepted: Some((ballot, decision)), ..unbound }),
            State::Bound { role: Role::Server, known: known.clone() },
            State::Bound { role: Role::Client, known: known.clone() },
            State::Enlisted { known, grant: Grant { member: u64::MAX, cluster: 1, since: u64::MAX } },
            State::Removed { cluster: 7 },
        ]
    }

    /// As the first release has written it.
    #[test]
    fn what_was_saved_before_is_read() {
        let old = Map::from_iter([
            ("format".to_owned(), 1.into()),
            ("node".to_owned(), hex(9)),
            ("state".to_owned(), json!({ "bound": { "role": "client", "cluster": hex(3), "founders": [], "servers": [], "as_of": 5 } })),
        ]);
        let known = Known { decision: Decision { cluster: 3, founders: Vec::new() }, servers: Vec::new(), as_of: 5 };
        let state = State::Bound { role: Role::Client, known };
        let text = seal(old);
        assert!(matches!(decode(text.as_bytes()), Ok((NodeId(9), read)) if read == state));
        // And so it is written still.
        assert_eq!(encode(NodeId(9), &state), text);
    }

    #[test]
    fn what_is_saved_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("data");
        let (first, state) = NodeDir::open(&path).unwrap();
        assert!(matches!(state, State::Unbound(Unbound { promised: None, accepted: None, .. })));
        assert!(matches!(NodeDir::open(&path), Err(Error::Locked { .. })));
        let node = first.node();
        for state in states() {
            first.save(&state).unwrap();
            assert_eq!(decode(&fs::read(path.join(FILE)).unwrap()).unwrap(), (node, state));
        }
        drop(first);
        let (again, state) = NodeDir::open(&path).unwrap();
        assert_eq!((again.node(), state), (node, State::Removed { cluster: 7 }));
        use std::os::unix::fs::PermissionsExt;
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o700);
    }

    #[test]
    fn every_flipped_bit_is_found() {
        for state in states() {
            let good = encode(NodeId(9), &state).into_bytes();
            assert!(matches!(decode(&good), Ok((NodeId(9), read)) if read == state));
            for at in 0..good.len() {
                for bit in 0..8 {
                    let mut bad = good.clone();
                    bad[at] ^= 1 << bit;
                    assert!(matches!(decode(&bad), Err(Problem::Damaged(_))), "byte {at}, bit {bit}");
                }
                assert!(matches!(decode(&good[..at]), Err(Problem::Damaged(_))), "cut at {at}");
            }
        }
    }

    #[test]
    fn foreign_and_newer_directories_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join(SERVER)).unwrap();
        assert!(matches!(NodeDir::open(dir.path()), Err(Error::Format { .. })));
        let newer = seal(Map::from_iter([("format".to_owned(), (FORMAT + 1).into())]));
        fs::write(dir.path().join(FILE), newer).unwrap();
        let error = NodeDir::open(dir.path()).unwrap_err();
        assert!(matches!(&error, Error::Format { what, .. } if what.contains("newer")), "{error}");
    }
}
