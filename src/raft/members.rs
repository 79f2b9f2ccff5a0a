//! What the state knows of members beside the Raft membership: what each has published of itself, and who was removed.
//!
//! ```text
//! membership entry: a, b, c        ->  c removed: noted for good, what it had published is forgotten
//! member_attributes {b, urls}      ->  kept under b's id, told by each member from then on
//! ```
//!
//! # Invariants
//! - An id that was removed is never used again: who comes with it is refused, so that a removed member cannot disturb the others.
//! - The incarnation that a member has first published is its own until it is removed: who comes with another has not what it had.
//! - Both follow from the log alone, and are the same at every member that has applied as much of it.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use prost::Message;

use crate::proto::internal::MemberAttributes;

use super::Membership;

/// Names of what is stored beside the history. Frozen.
const META_ATTRIBUTES: &[u8] = b"member/attributes/";
const META_REMOVED: &[u8] = b"member/removed/";

/// See the module's head. As many ids as the cluster has ever had members.
#[derive(Debug, Default)]
pub(crate) struct Members {
    attributes: BTreeMap<u64, MemberAttributes>,
    removed: BTreeSet<u64>,
}

/// A change of what is stored: a name, and its value; none when it goes.
pub(super) type Stored = (Vec<u8>, Option<Bytes>);

impl Members {
    /// Takes over something stored. Returns whether it was one of ours.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn load(&mut self, name: &[u8], value: &Bytes) -> Result<bool, String> {
        let id = |bytes: &[u8]| <[u8; 8]>::try_from(bytes).map(u64::from_be_bytes).map_err(|_| "its member is not 8 bytes long".to_owned());
        if let Some(member) = name.strip_prefix(META_ATTRIBUTES) {
            let attributes = MemberAttributes::decode(value.clone()).map_err(|err| err.to_string())?;
            self.attributes.insert(id(member)?, attributes);
        } else if let Some(member) = name.strip_prefix(META_REMOVED) {
            self.removed.insert(id(member)?);
        } else {
            return Ok(false);
        }
        Ok(true)
    }

    /// All of it, as it is stored.
    pub fn metas(&self) -> impl Iterator<Item = (Vec<u8>, Bytes)> {
        let attributes = self.attributes.iter().map(|(&id, attributes)| (name(META_ATTRIBUTES, id), attributes.encode_to_vec().into()));
        attributes.chain(self.removed.iter().map(|&id| (name(META_REMOVED, id), Bytes::new())))
    }

    /// What a member has published.
    pub fn attributes(&self, id: u64) -> Option<&MemberAttributes> {
        self.attributes.get(&id)
    }

    pub fn is_removed(&self, id: u64) -> bool {
        self.removed.contains(&id)
    }

    /// The incarnation of a member's data directory, once it is known.
    pub fn incarnation(&self, id: u64) -> Option<u64> {
        self.attributes.get(&id).map(|attributes| attributes.incarnation).filter(|incarnation| *incarnation != 0)
    }

    /// Notes what a member publishes, if it belongs to the cluster.
    pub(super) fn publish(&mut self, attributes: &MemberAttributes, membership: &Membership) -> Option<Stored> {
        membership.get_node(&attributes.id)?;
        let mut attributes = attributes.clone();
        if let Some(known) = self.incarnation(attributes.id) {
            attributes.incarnation = known;
        }
        let stored = (name(META_ATTRIBUTES, attributes.id), Some(attributes.encode_to_vec().into()));
        self.attributes.insert(attributes.id, attributes);
        Some(stored)
    }

    /// Follows a change of the membership.
    pub(super) fn follow(&mut self, before: &Membership, after: &Membership) -> Vec<Stored> {
        let mut stored = Vec::new();
        for (&id, _) in before.nodes().filter(|(id, _)| after.get_node(id).is_none()) {
            self.removed.insert(id);
            stored.push((name(META_REMOVED, id), Some(Bytes::new())));
            if self.attributes.remove(&id).is_some() {
                stored.push((name(META_ATTRIBUTES, id), None));
            }
        }
        stored
    }
}

fn name(prefix: &[u8], id: u64) -> Vec<u8> {
    [prefix, &id.to_be_bytes()[..]].concat()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::internal::Member;

    fn of(ids: &[u64]) -> Membership {
        Membership::new(vec![ids.iter().copied().collect()], ids.iter().map(|&id| (id, Member::default())).collect::<BTreeMap<_, _>>())
            .unwrap()
    }

    #[test]
    fn who_is_removed_stays_so_and_is_forgotten_otherwise() {
        let mut members = Members::default();
        let attributes =
            |id| MemberAttributes { id, name: format!("m{id}"), client_urls: vec!["http://127.0.0.1:1".into()], incarnation: 0 };
        assert!(members.publish(&attributes(2), &of(&[1, 2])).is_some());
        assert!(members.publish(&attributes(3), &of(&[1, 2])).is_none());
        let stored = members.follow(&of(&[1, 2]), &of(&[1, 3]));
        assert_eq!(stored.len(), 2);
        assert!(members.is_removed(2) && !members.is_removed(1) && members.attributes(2).is_none());
        assert!(members.publish(&attributes(3), &of(&[1, 3])).is_some());
        // What is stored brings back the same.
        let mut again = Members::default();
        for (name, value) in members.metas() {
            assert_eq!(again.load(&name, &value), Ok(true));
        }
        assert_eq!(again.load(b"lease/12345678", &Bytes::new()), Ok(false));
        assert!(again.load(b"member/removed/1", &Bytes::new()).is_err());
        assert!(again.is_removed(2) && again.attributes(3) == Some(&attributes(3)));
    }

    #[test]
    fn the_first_incarnation_stays() {
        let mut members = Members::default();
        let attributes = |incarnation| MemberAttributes { id: 1, incarnation, ..MemberAttributes::default() };
        // A release, or a directory, of before there were any; then one; then another; then an older release again.
        for (published, known) in [(0, None), (7, Some(7)), (8, Some(7)), (0, Some(7))] {
            members.publish(&attributes(published), &of(&[1, 2]));
            assert_eq!(members.incarnation(1), known);
        }
        members.follow(&of(&[1, 2]), &of(&[2]));
        assert_eq!(members.incarnation(1), None);
    }
}
