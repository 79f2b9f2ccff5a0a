//! Which cluster an unbound node joins: the one that answers at the entries of the JOIN list, if it is one.
//!
//! ```text
//! a: "I belong to 7f.."                             heard, and not joined yet: the others are given a moment
//! b: "I belong to 7f..", c is silent                joined, as soon as all have answered or the moment is over
//! b: "I belong to 30.."                             two: none is joined, in later tries neither, until people have looked
//! ```
//!
//! # Invariants
//! - Joining beats forming: who has heard of a cluster neither proposes nor promises nor accepts. That is as if the questions were lost, so
//!   it takes nothing away from what was agreed.
//! - Of two clusters none is chosen, also when one of them falls silent: that would be choosing by chance. What an entry says last counts:
//!   a node that was wiped, or that has joined the other cluster, settles it. So it is with an entry that is taken out of JOIN.
//! - Two that were met are on disk, so that the next start does not choose by chance either. One alone is not: what was heard of it in an
//!   earlier life is heard again, or was of no use.
//! - Who has accepted a decision, and hears that it was made, is a part of it, and waits for nobody.

use std::collections::BTreeMap;

use super::{Agreement, Effect, FRESH_TICKS, Known, State};

/// Ticks that the others are given to answer, once one has said that it belongs to a cluster: more than a question and its answer may take
/// over a connection that is there. Who cannot be connected to in that time is not waited for.
pub const JOIN_TICKS: u64 = 2 * FRESH_TICKS;

/// What was heard of clusters, by places of the list.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct Claims {
    by: BTreeMap<usize, Known>,
    /// The clusters that places have said in an earlier life, where two were met; those that have not answered since.
    before: BTreeMap<usize, u128>,
    since: u64,
    /// When each place has answered last.
    answered: BTreeMap<usize, u64>,
}

impl Claims {
    pub fn is_empty(&self) -> bool {
        self.by.is_empty() && self.before.is_empty()
    }

    /// What the outcome can depend on.
    pub fn essence(&self) -> impl std::hash::Hash + '_ {
        (&self.by, &self.before)
    }

    /// The cluster that a place says it belongs to.
    pub fn at(&self, place: usize) -> Option<u128> {
        self.by.get(&place).map(|known| known.decision.cluster).or_else(|| self.before.get(&place).copied())
    }

    /// A place has answered; if `belongs` not, then with something else than a cluster.
    pub fn hear(&mut self, place: usize, now: u64, belongs: bool) {
        self.answered.insert(place, now);
        self.before.remove(&place);
        if !belongs {
            self.by.remove(&place);
        }
    }
}

impl Agreement {
    /// The clusters that were heard of, each with the places of the list at which it answers. Empty for a node that is bound.
    pub fn clusters(&self) -> BTreeMap<u128, Vec<usize>> {
        let mut clusters: BTreeMap<u128, Vec<usize>> = BTreeMap::new();
        for (place, known) in &self.claims.by {
            clusters.entry(known.decision.cluster).or_default().push(*place);
        }
        for (place, cluster) in &self.claims.before {
            clusters.entry(*cluster).or_default().push(*place);
        }
        clusters
    }

    /// What its disk has of clusters that were met, for a life that begins. Entries that JOIN has no more settle it.
    pub(super) fn recall(&mut self, join: &[String]) {
        let State::Unbound(unbound) = &mut self.state else { return };
        unbound.met.retain(|entry, _| join.contains(entry));
        let places = self.list.entries.iter().enumerate();
        self.claims.before = places.filter_map(|(place, entry)| Some((place, *unbound.met.get(entry)?))).collect();
        if self.clusters().len() < 2 {
            self.claims.before.clear();
        }
    }

    /// Sees to it that two clusters that were met, or have been settled, are on disk.
    pub(super) fn remember(&mut self) -> Option<Effect> {
        if self.clusters().len() < 2 {
            self.claims.before.clear();
        }
        let are_two = self.clusters().len() > 1;
        let met = |(place, entry): (usize, &String)| self.claims.at(place).filter(|_| are_two).map(|cluster| (entry.clone(), cluster));
        let met: BTreeMap<String, u128> = self.list.entries.iter().enumerate().filter_map(met).collect();
        let unbound = self.unbound()?;
        if unbound.met == met {
            return None;
        }
        unbound.met = met;
        Some(Effect::Save(self.state.clone()))
    }

    /// Whether the node is at one of the entries itself; none while that is not known.
    pub fn is_listed(&self) -> Option<bool> {
        if self.own.is_some() { Some(true) } else { (self.now > FRESH_TICKS).then_some(false) }
    }

    /// A node at a place of the list belongs to a cluster.
    pub(super) fn claim(&mut self, place: usize, known: Known) -> Vec<Effect> {
        let State::Unbound(unbound) = &self.state else { return self.learn(known) };
        if unbound.has_accepted(&known.decision) {
            return self.bind(known);
        }
        if self.claims.by.is_empty() {
            self.claims.since = self.now;
        }
        self.claims.by.insert(place, known);
        self.attempt = None;
        Vec::new()
    }

    /// Whether all have had the time to speak.
    pub(super) fn have_all_spoken(&self) -> bool {
        let since = self.claims.since;
        let has = |place: usize| self.claims.answered.get(&place).is_some_and(|at| *at >= since);
        self.now.saturating_sub(since) > JOIN_TICKS || self.others().all(has)
    }

    /// Joins the cluster that was heard of, if it is one. [`tick`](Self::tick) calls it in time; it is harmless at any other.
    pub fn settle(&mut self) -> Vec<Effect> {
        if self.clusters().len() > 1 {
            return Vec::new();
        }
        let mut heard = self.claims.by.values();
        let Some(mut newest) = heard.next() else { return Vec::new() };
        for known in heard {
            if known.as_of > newest.as_of {
                newest = known;
            }
        }
        let newest = newest.clone();
        self.bind(newest)
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Answer, Ask, Ballot, Candidate, Decision, List, NodeId, Role, Standing, Unbound};
    use super::*;

    fn candidate(node: u128) -> Candidate {
        let url = |port: u16| format!("http://10.0.0.{node}:{port}");
        Candidate { node: NodeId(node), name: format!("n{node}"), peer_url: url(5707), client_url: url(5706) }
    }

    fn list() -> List {
        List::new((0..4).map(|at| format!("n{at}:5707")).collect(), 1)
    }

    /// Node 3, at the last place of four.
    fn wiped() -> Agreement {
        begun(State::Unbound(Unbound::default()), list())
    }

    /// The same node, with that on its disk.
    fn begun(state: State, list: List) -> Agreement {
        let own = list.entries.iter().position(|entry| entry == "n3:5707");
        let mut node = Agreement::new(candidate(3), list, state);
        if let Some(own) = own {
            node.answered(own, unbound(3));
        }
        node
    }

    fn saved(effects: &[Effect]) -> Option<&State> {
        effects.iter().rev().find_map(|effect| if let Effect::Save(state) = effect { Some(state) } else { None })
    }

    fn unbound(node: u128) -> Answer {
        Answer::Unbound { who: candidate(node), list: list().id, listed: 4, servers: 1 }
    }

    fn of(node: u128, cluster: u128, as_of: u64) -> Answer {
        let decision = Decision { cluster, founders: vec![candidate(9)] };
        Answer::Bound { who: NodeId(node), known: Known { decision, servers: vec![candidate(9)], as_of } }
    }

    fn cluster(node: &Agreement) -> Option<(Role, u128, u64)> {
        node.bound().map(|(role, known)| (role, known.decision.cluster, known.as_of))
    }

    #[test]
    fn one_cluster_is_joined_once_all_have_spoken() {
        let mut node = wiped();
        assert!(node.answered(0, of(0, 7, 4)).is_empty() && node.standings()[0] == Standing::Member { cluster: 7 });
        node.answered(1, of(1, 7, 5));
        node.tick();
        assert_eq!(cluster(&node), None, "one has not spoken");
        node.answered(2, unbound(2));
        let effects = node.tick();
        assert!(matches!(effects[..], [.., Effect::Save(_), Effect::Bound]), "{effects:?}");
        assert_eq!(cluster(&node), Some((Role::Client, 7, 5)), "as the newest has it");
        // Who is silent is not waited for for long.
        let mut node = wiped();
        node.answered(0, of(0, 7, 4));
        for _ in 0..=JOIN_TICKS {
            assert_eq!(cluster(&node), None);
            node.tick();
        }
        assert_eq!(cluster(&node), Some((Role::Client, 7, 4)));
    }

    #[test]
    fn of_two_clusters_none_is_chosen() {
        let mut node = wiped();
        node.answered(0, of(0, 7, 4));
        node.answered(1, of(1, 8, 9));
        node.answered(2, of(2, 7, 4));
        // One of them falls silent.
        for _ in 0..JOIN_TICKS * 10 {
            node.answered(0, of(0, 7, 4));
            let asks_hello_alone = |effect: &Effect| matches!(effect, Effect::Ask { ask: Ask::Hello, .. });
            assert!(node.tick().iter().all(asks_hello_alone));
        }
        assert_eq!((cluster(&node), node.clusters()), (None, BTreeMap::from([(7, vec![0, 2]), (8, vec![1])])));
        // Nor does it take part in the founding of a third.
        let ballot = Ballot { round: 9, by: NodeId(1) };
        let decision = Decision { cluster: 9, founders: vec![candidate(1)] };
        let before = node.clone();
        for ask in [
            Ask::Prepare { list: list().id, ballot },
            Ask::Accept { list: list().id, ballot, decision: decision.clone() },
            Ask::Decided { decision },
        ] {
            assert!(matches!(node.asked(&ask)[..], [Effect::Answer(Answer::Unbound { .. })]), "{ask:?}");
            assert!(node == before);
        }
        // Its disk is wiped, and so it is settled.
        node.answered(1, unbound(11));
        node.tick();
        assert_eq!(cluster(&node), Some((Role::Client, 7, 4)));
    }

    /// Neither is one chosen by who is started again while one of them is silent.
    #[test]
    fn two_that_were_met_are_remembered() {
        let mut node = wiped();
        assert!(node.answered(0, of(0, 7, 4)).is_empty(), "one alone is not remembered");
        let met = node.answered(1, of(1, 8, 9));
        let met = saved(&met).unwrap().clone();
        assert!(node.answered(2, of(2, 7, 4)).len() == 1 && node.answered(1, of(1, 8, 10)).is_empty(), "what is new is saved");

        let mut node = begun(met.clone(), list());
        assert_eq!(node.clusters(), BTreeMap::from([(7, vec![0]), (8, vec![1])]));
        let ballot = Ballot { round: 9, by: NodeId(1) };
        assert!(matches!(node.asked(&Ask::Prepare { list: list().id, ballot })[..], [Effect::Answer(Answer::Unbound { .. })]));
        for _ in 0..JOIN_TICKS * 10 {
            node.answered(0, of(0, 7, 4));
            node.answered(2, unbound(2));
            node.tick();
        }
        assert_eq!((cluster(&node), node.standings()[1].clone()), (None, Standing::Member { cluster: 8 }));
        // The silent one comes back without its disk.
        let effects = node.answered(1, unbound(11));
        assert!(matches!(saved(&effects), Some(State::Unbound(Unbound { met, .. })) if met.is_empty()));
        node.tick();
        assert_eq!(cluster(&node), Some((Role::Client, 7, 4)));

        // Or its entry is taken out of JOIN, in whatever place the others are then.
        let shorter = List::new(["n3", "n2", "n0"].map(|name| format!("{name}:5707")).to_vec(), 1);
        let mut node = begun(met.clone(), shorter.clone());
        assert!(node.clusters().is_empty());
        node.answered(1, unbound(2));
        node.answered(2, of(0, 7, 4));
        node.tick();
        assert_eq!(cluster(&node), Some((Role::Client, 7, 4)));

        // Who has accepted a decision keeps to its list, and goes by what is in JOIN all the same.
        let State::Unbound(mut accepted) = met else { panic!("it belongs to no cluster") };
        accepted.accepted = Some((ballot, Decision { cluster: 9, founders: vec![candidate(1)] }));
        let node = begun(State::Unbound(accepted.clone()), list());
        assert_eq!(node.clusters().len(), 2);
        let node = begun(State::Unbound(accepted), shorter);
        assert!(node.clusters().is_empty() && node.list().entries.len() == 4);
    }

    /// What it has agreed to itself it joins at once, whatever else there is.
    #[test]
    fn who_has_accepted_waits_for_nobody() {
        let mut node = wiped();
        let ballot = Ballot { round: 9, by: NodeId(1) };
        let decision = Decision { cluster: 7, founders: vec![candidate(3)] };
        node.asked(&Ask::Accept { list: list().id, ballot, decision: decision.clone() });
        node.answered(0, of(0, 8, 1));
        let known = Known { servers: decision.founders.clone(), decision, as_of: 0 };
        let effects = node.answered(1, Answer::Bound { who: NodeId(1), known });
        assert!(matches!(effects[..], [Effect::Save(_), Effect::Bound]), "{effects:?}");
        assert_eq!(cluster(&node), Some((Role::Server, 7, 0)));
        // The same by whoever has decided it; what others have decided is not its business.
        let mut node = wiped();
        let decision = Decision { cluster: 7, founders: vec![candidate(3)] };
        node.asked(&Ask::Accept { list: list().id, ballot, decision: decision.clone() });
        node.answered(0, of(0, 8, 1));
        let other = Decision { cluster: 6, ..decision.clone() };
        assert!(matches!(node.asked(&Ask::Decided { decision: other })[..], [Effect::Answer(Answer::Unbound { .. })]));
        let effects = node.asked(&Ask::Decided { decision });
        assert!(matches!(effects[..], [Effect::Save(_), Effect::Bound, Effect::Answer(Answer::Bound { .. })]), "{effects:?}");
        assert_eq!(cluster(&node), Some((Role::Server, 7, 0)));
    }

    #[test]
    fn it_is_told_why_a_list_differs_and_whether_the_node_is_in_it() {
        let mut node = wiped();
        let elsewhere =
            |list: List| Answer::Unbound { who: candidate(1), list: list.id, listed: list.entries.len(), servers: list.servers };
        node.answered(0, elsewhere(List::new(list().entries, 3)));
        node.answered(1, elsewhere(List::new((0..4).map(|at| format!("m{at}:5707")).collect(), 1)));
        let name = "n1".to_owned();
        assert_eq!(node.standings()[0], Standing::OtherServers { name: name.clone(), servers: 3 });
        assert_eq!(node.standings()[1], Standing::OtherList { name, listed: 4, servers: 1 });
        assert_eq!(node.is_listed(), Some(true));
        let mut node = Agreement::new(candidate(5), list(), State::Unbound(Unbound::default()));
        assert_eq!(node.is_listed(), None);
        for _ in 0..=FRESH_TICKS {
            node.tick();
        }
        assert_eq!(node.is_listed(), Some(false));
    }
}
