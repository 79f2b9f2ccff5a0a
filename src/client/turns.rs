//! Turns within a session: of the tasks that share it, one at a time has to do with a queue's key.
//!
//! A session has one key in each queue (its name and the lease), so the store cannot tell two tasks of it from each other. A [`Turn`] does:
//! who has it may put the key, wait at its place, hold what it stands for, and delete it; the next one has it when all that is over. Above
//! all a place that was given up keeps its turn until the key is known to be deleted. Without that, the same session could find the old key,
//! take it for a place of its own, and lose it to the deletion that was still on its way.
//!
//! # Invariants
//! - For each name there is one `Turn` at most, and there is a slot as long as there is one.
//! - Turns go round in the order in which they were asked for. Who has stopped waiting is passed over.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use tokio::sync::oneshot;

use crate::lock::lock;

/// The turns of a session.
#[derive(Default)]
pub(super) struct Turns(Mutex<BTreeMap<Bytes, Slot>>);

#[derive(Default)]
struct Slot {
    /// Who has the turn is giving up its place.
    is_leaving: bool,
    /// Those who come next: as many as there are tasks that wait, each with a future of its own.
    waiting: VecDeque<oneshot::Sender<Turn>>,
}

/// The right to a queue's key, among the tasks of a session.
pub(super) struct Turn {
    turns: Arc<Turns>,
    name: Bytes,
    /// It was not handed over, and there is nothing to pass on.
    is_void: bool,
}

impl std::fmt::Debug for Turn {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Turn").field(&self.name).finish()
    }
}

/// What there is for who asks.
enum Asked {
    Now(Turn),
    Later(oneshot::Receiver<Turn>),
    No,
}

impl Turns {
    /// The turn, when it comes.
    pub async fn wait(self: &Arc<Self>, name: &Bytes) -> Option<Turn> {
        self.ask(name, |_| true).await
    }

    /// The turn, if nobody has it, or who has it is only giving up; `None` otherwise.
    pub async fn try_now(self: &Arc<Self>, name: &Bytes) -> Option<Turn> {
        self.ask(name, |slot| slot.is_leaving && slot.waiting.is_empty()).await
    }

    async fn ask(self: &Arc<Self>, name: &Bytes, waits: impl Fn(&Slot) -> bool) -> Option<Turn> {
        let asked = {
            let mut slots = lock(&self.0);
            match slots.get_mut(name) {
                None => {
                    slots.insert(name.clone(), Slot::default());
                    Asked::Now(Turn { turns: self.clone(), name: name.clone(), is_void: false })
                }
                Some(slot) if waits(slot) => {
                    let (next, turn) = oneshot::channel();
                    // Those who wait no more go when there is somebody to be put behind them.
                    slot.waiting.retain(|waiting| !waiting.is_closed());
                    slot.waiting.push_back(next);
                    Asked::Later(turn)
                }
                Some(_) => Asked::No,
            }
        };
        match asked {
            Asked::Now(turn) => Some(turn),
            Asked::Later(turn) => turn.await.ok(),
            Asked::No => None,
        }
    }

    fn pass(self: &Arc<Self>, name: &Bytes) {
        loop {
            let next = {
                let mut slots = lock(&self.0);
                let Some(slot) = slots.get_mut(name) else { return };
                slot.is_leaving = false;
                match slot.waiting.pop_front() {
                    Some(next) => next,
                    None => {
                        slots.remove(name);
                        return;
                    }
                }
            };
            // If it is taken out of the hands of one who has stopped waiting after this, it passes itself on.
            match next.send(Turn { turns: self.clone(), name: name.clone(), is_void: false }) {
                Ok(()) => return,
                Err(mut turn) => turn.is_void = true,
            }
        }
    }
}

impl Turn {
    /// What is left to do with it is to give the place up. Who tries for the turn waits for that.
    pub fn leaving(&self) {
        if let Some(slot) = lock(&self.turns.0).get_mut(&self.name) {
            slot.is_leaving = true;
        }
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        if !self.is_void {
            self.turns.pass(&self.name);
        }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    #[test]
    fn turns_go_round_in_order() {
        let (turns, name) = (Arc::new(Turns::default()), Bytes::from_static(b"l/1"));
        let first = turns.wait(&name).now_or_never().flatten().expect("it is free");
        assert!(turns.try_now(&name).now_or_never().expect("at once").is_none());
        let mut second = Box::pin(turns.wait(&name));
        assert!(second.as_mut().now_or_never().is_none());
        // Many who have given up, and one who has not.
        for _ in 0..10_000 {
            assert!(turns.wait(&name).now_or_never().is_none());
        }
        assert!(lock(&turns.0)[&name].waiting.len() <= 2, "who waits no more is not kept");
        let mut last = Box::pin(turns.wait(&name));
        assert!(last.as_mut().now_or_never().is_none());
        drop(first);
        let turn = second.now_or_never().flatten().expect("it is its turn");
        assert!(last.as_mut().now_or_never().is_none());
        // Handed over to who has stopped waiting: it goes on.
        let mut unread = Box::pin(turns.wait(&name));
        assert!(unread.as_mut().now_or_never().is_none());
        turn.leaving();
        assert!(turns.try_now(&name).now_or_never().expect("at once").is_none(), "others wait");
        drop(turn);
        drop(last.now_or_never().flatten().expect("it is its turn"));
        drop(unread);
        assert!(lock(&turns.0).is_empty());
    }

    #[test]
    fn who_tries_waits_for_one_who_leaves() {
        let (turns, name) = (Arc::new(Turns::default()), Bytes::from_static(b"l/1"));
        let turn = turns.try_now(&name).now_or_never().flatten().expect("it is free");
        turn.leaving();
        let mut trying = Box::pin(turns.try_now(&name));
        assert!(trying.as_mut().now_or_never().is_none());
        drop(turn);
        let turn = trying.now_or_never().flatten().expect("it was given up");
        assert!(turns.try_now(&name).now_or_never().expect("at once").is_none(), "it is held again");
        drop(turn);
        assert!(lock(&turns.0).is_empty());
    }
}
