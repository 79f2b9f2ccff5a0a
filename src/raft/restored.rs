//! The beginning of a cluster that was restored: where its log begins, who its members are, and what of the backup goes into its state.
//!
//! All its members begin with the same state, and say that it is that of entry 1, before which there is no log. So they are as members are
//! that were [sent a snapshot](super::incoming): who joins them later is sent one, too, and never a log that lacks what came from the backup.
//!
//! ```text
//! backup: keys, leases, the compaction, members 1 2 3, their alarms
//! entry 1 of the new log: keys, leases, the compaction, members 7 8 9
//! ```
//!
//! # Invariants
//! - Nothing is kept that speaks of members: those of the backup are not those of the new cluster, whoever they were.
//! - The vote of term 1 is given to the member with the least id, which never asks for it: the first leader is elected in term 2.

use std::collections::BTreeMap;

use bytes::Bytes;
use prost::Message;

use crate::error::{Error, Result};
use crate::lease::Lease;
use crate::proto::internal;
use crate::storage::wal;

use super::apply::{META_LEASE, META_MEMBERSHIP, META_VERSION};
use super::{Membership, StoredMembership, Vote, log_id, log_id_to_proto, stored_membership_to_proto, vote_to_proto};

/// Where the log begins.
const TERM: u64 = 1;
const INDEX: u64 = 1;

/// What each member of a restored cluster begins with.
pub(crate) struct Beginning {
    /// The name and the value of what the state knows of the members.
    pub membership: (&'static [u8], Bytes),
    pub vote: Bytes,
    /// The entry up to which the log is gone.
    pub purged: wal::LogId,
}

impl Beginning {
    /// Of a cluster of these members, all of which vote.
    ///
    /// # Errors
    /// `Config` when there are none.
    pub fn of(members: BTreeMap<u64, internal::Member>) -> Result<Beginning> {
        let ids = members.keys().copied().collect();
        let least = members.keys().next().copied().ok_or_else(|| Error::Config("a cluster needs a member".into()))?;
        let membership = Membership::new(vec![ids], members).map_err(|err| Error::Config(err.to_string()))?;
        let stored = StoredMembership::new(Some(log_id(TERM, INDEX)), membership);
        Ok(Beginning {
            membership: (META_MEMBERSHIP, stored_membership_to_proto(&stored).encode_to_vec().into()),
            vote: vote_to_proto(&Vote::new(TERM, least)).encode_to_vec().into(),
            purged: wal::LogId { term: TERM, node: 0, index: INDEX },
        })
    }

    /// What the history is to be committed with, at this revision.
    pub fn applied(&self, revision: i64) -> Bytes {
        let log_id = Some(log_id_to_proto(log_id(TERM, INDEX)));
        internal::Applied { log_id, revision }.encode_to_vec().into()
    }
}

/// Whether what is kept in a backup under this name beside the history belongs into the state of a new cluster. The compaction is not
/// asked for here.
pub(crate) fn is_kept(name: &[u8]) -> bool {
    name.starts_with(META_LEASE) || name == META_VERSION
}

/// What becomes of something that [is kept](is_kept). A lease has its whole time again: what was left of it when the backup was made may
/// have passed since.
///
/// # Errors
/// A text that says what is wrong with a lease.
pub(crate) fn renewed(name: &[u8], value: Bytes) -> std::result::Result<Bytes, String> {
    if !name.starts_with(META_LEASE) {
        return Ok(value);
    }
    let lease = Lease::decode(&value)?;
    Ok(Bytes::copy_from_slice(&Lease { remaining_ttl: 0, ..lease }.encode()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lease_has_its_whole_time_again() {
        let lease = Lease { id: 7, ttl: 3600, remaining_ttl: 300 };
        let value = renewed(b"lease/12345678", Bytes::copy_from_slice(&lease.encode())).unwrap();
        assert_eq!(Lease::decode(&value), Ok(Lease { remaining_ttl: 0, ..lease }));
        assert!(renewed(b"lease/12345678", Bytes::from_static(b"ten seconds")).is_err());
        assert_eq!(renewed(META_VERSION, Bytes::from_static(b"3.5.0")), Ok(Bytes::from_static(b"3.5.0")));
    }

    #[test]
    fn what_speaks_of_members_is_not_kept() {
        for (name, kept) in [
            (&b"lease/12345678"[..], true),
            (b"cluster/version", true),
            (b"alarm/123456789012", false),
            (b"alarm-by-quota/12345678", false),
            (b"raft/membership", false),
            (b"raft/installed", false),
            (b"member/removed/12345678", false),
            (b"member/attributes/12345678", false),
        ] {
            assert_eq!(is_kept(name), kept, "{}", name.escape_ascii());
        }
        assert!(Beginning::of(BTreeMap::new()).is_err());
    }
}
