//! Where the other members are, noted on disk for a start that has lost its state and has to ask them for theirs.
//!
//! ```text
//! membership: a, b, c (this is c)  ->  peers: a http://..., b http://...
//! ```
//!
//! The file follows the newest membership that this member goes by, a moment later: what it says may be old, and is only where to begin
//! to ask. Nothing waits for it, and nothing fails when it cannot be written.

use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use tokio::runtime::Handle;

use crate::lock::lock;
use crate::raft::Membership;
use crate::storage::dir;

type Peers = Vec<(u64, Vec<String>)>;

/// See the module's head.
pub(super) struct Roster {
    dir: PathBuf,
    wanted: Mutex<Peers>,
    /// What is in the file; none when that is not known. Held while it is written.
    noted: Mutex<Option<Peers>>,
}

impl Roster {
    pub fn new(dir: PathBuf) -> Self {
        Roster { dir, wanted: Mutex::default(), noted: Mutex::default() }
    }

    /// Has the members but for this one written down, if it belongs to them.
    pub fn note(self: &Arc<Self>, runtime: &Handle, membership: &Membership, own: u64) {
        if membership.get_node(&own).is_none() {
            return;
        }
        let others = membership.nodes().filter(|(id, _)| **id != own);
        *lock(&self.wanted) = others.map(|(&id, member)| (id, member.peer_urls.clone())).collect();
        let roster = self.clone();
        drop(crate::world::blocking(runtime, move || roster.write()));
    }

    /// Writes what is wanted now: whichever of two comes last, the newest stands.
    fn write(&self) {
        let mut noted = lock(&self.noted);
        let wanted = lock(&self.wanted).clone();
        if noted.as_ref() == Some(&wanted) {
            return;
        }
        match dir::set_peers(&self.dir, &wanted) {
            Ok(()) => *noted = Some(wanted),
            Err(err) => tracing::warn!(error = %err, "noting where the other members are"),
        }
    }
}
