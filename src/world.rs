//! What a member takes from outside of itself beside clocks, disk and network: chance, tasks, and threads for work that blocks.
//!
//! Ordinarily that is the system's randomness, and tokio's tasks and threads; nothing here costs anything then. With the feature
//! `simulation`, and on a thread that has [entered](simulated::enter) one, a seed decides all of it: random numbers come from the seed,
//! work that blocks is a task like any other, and every task belongs to the [life](simulated::Life) of the member that began it, so
//! that a member can be stopped between any two steps, for a while or for good, as a signal or a power cut would.
//!
//! ```text
//! life.enter(member starts) -> its tasks, their tasks, ...     life.pause(): none of them is polled any more, time goes on
//! ```
//!
//! # Caveats
//! - A task is stopped where it waits. A real thread can be stopped anywhere, but nothing else runs between two of its waits here.

#[cfg(not(feature = "simulation"))]
pub(crate) use ordinary::*;
#[cfg(feature = "simulation")]
pub(crate) use simulated::*;

/// What a simulation can have done wrong, to see that it is found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(dead_code, reason = "some are for simulations alone")]
pub enum Fault {
    /// A leader that is started again leads on in its term, and confirms reads before it knows what was committed.
    RestoredLeader,
    /// The log calls durable what is not on disk yet.
    EarlyAcknowledgement,
    /// Linearizable reads ask nobody.
    UnconfirmedReads,
    /// A leader renews leases without being sure that it still leads.
    UnsureRenewals,
}

#[cfg(not(feature = "simulation"))]
mod ordinary {
    use std::future::Future;

    use tokio::runtime::Handle;
    use tokio::task::JoinHandle;

    /// What openraft runs on.
    pub(crate) type Runtime = openraft_rt_tokio::TokioRuntime;

    /// A number that nobody can foresee.
    pub(crate) fn random() -> u64 {
        rand::random()
    }

    /// Whether something is to be done wrong.
    pub(crate) const fn has_fault(_: super::Fault) -> bool {
        false
    }

    /// The task, as one of the member's that begins it.
    pub(crate) fn owned<F: Future>(task: F) -> F {
        task
    }

    /// Runs work that may block on a thread that is kept for such.
    pub(crate) fn blocking<T: Send + 'static>(runtime: &Handle, work: impl FnOnce() -> T + Send + 'static) -> JoinHandle<T> {
        runtime.spawn_blocking(work)
    }
}

#[cfg(feature = "simulation")]
mod simulated {
    use std::cell::{Cell, RefCell};
    use std::convert::Infallible;
    use std::future::Future;
    use std::pin::Pin;
    use std::sync::{Arc, Mutex};
    use std::task::{Context, Poll, Waker};
    use std::time::Duration;

    use openraft::{AsyncRuntime, OptionalSend};
    use openraft_rt_tokio::TokioRuntime;
    use rand::rngs::StdRng;
    use rand::{RngCore, SeedableRng};
    use tokio::runtime::Handle;
    use tokio::task::JoinHandle;

    use crate::lock::lock;

    thread_local! {
        static CHANCE: RefCell<Option<StdRng>> = const { RefCell::new(None) };
        static FAULT: Cell<Option<super::Fault>> = const { Cell::new(None) };
        static LIFE: RefCell<Option<Arc<Life>>> = const { RefCell::new(None) };
    }

    /// Has a seed decide for this thread until the guard is dropped.
    pub(crate) fn enter(seed: u64, fault: Option<super::Fault>) -> Entered {
        CHANCE.set(Some(StdRng::seed_from_u64(seed)));
        FAULT.set(fault);
        Entered
    }

    /// See [`enter`].
    pub(crate) struct Entered;

    impl Drop for Entered {
        fn drop(&mut self) {
            CHANCE.set(None);
            FAULT.set(None);
        }
    }

    /// Whether a seed decides for this thread.
    pub(crate) fn is_simulated() -> bool {
        CHANCE.with_borrow(Option::is_some)
    }

    /// Whether something is to be done wrong.
    pub(crate) fn has_fault(fault: super::Fault) -> bool {
        FAULT.get() == Some(fault)
    }

    /// A number that nobody can foresee; in a simulation the seed's next.
    pub(crate) fn random() -> u64 {
        CHANCE.with_borrow_mut(|chance| chance.as_mut().map(RngCore::next_u64)).unwrap_or_else(rand::random)
    }

    /// The task, as one of the member's that begins it.
    pub(crate) fn owned<F: Future>(task: F) -> Owned<F> {
        Owned { life: LIFE.with_borrow(Clone::clone), task: Box::pin(task) }
    }

    /// Runs work that may block: as a task of its own in a simulation, otherwise on a thread that is kept for such.
    pub(crate) fn blocking<T: Send + 'static>(runtime: &Handle, work: impl FnOnce() -> T + Send + 'static) -> JoinHandle<T> {
        if is_simulated() { runtime.spawn(owned(async move { work() })) } else { runtime.spawn_blocking(work) }
    }

    /// The number of the life that this task belongs to; 0 for none.
    pub(crate) fn life() -> u64 {
        LIFE.with_borrow(|life| life.as_ref().map_or(0, |life| life.number))
    }

    /// One start of a member, from its first task to the end of all of them.
    pub(crate) struct Life {
        number: u64,
        state: Mutex<State>,
    }

    #[derive(Default)]
    struct State {
        pace: Pace,
        /// Tasks that wanted to go on while they could not. As many as the member has.
        waiting: Vec<Waker>,
    }

    #[derive(Default, PartialEq)]
    enum Pace {
        #[default]
        Runs,
        Rests,
        Ended,
    }

    impl Life {
        pub fn new(number: u64) -> Arc<Life> {
            Arc::new(Life { number, state: Mutex::default() })
        }

        /// Makes a task, and all that it begins, part of this life.
        pub fn enter<F: Future>(self: &Arc<Self>, task: F) -> Owned<F> {
            Owned { life: Some(self.clone()), task: Box::pin(task) }
        }

        /// None of its tasks goes on.
        pub fn pause(&self) {
            let mut state = lock(&self.state);
            if state.pace == Pace::Runs {
                state.pace = Pace::Rests;
            }
        }

        /// They go on.
        pub fn resume(&self) {
            let mut state = lock(&self.state);
            if state.pace == Pace::Rests {
                state.pace = Pace::Runs;
                for waker in std::mem::take(&mut state.waiting) {
                    waker.wake();
                }
            }
        }

        /// None of its tasks ever goes on.
        pub fn end(&self) {
            let mut state = lock(&self.state);
            state.pace = Pace::Ended;
            state.waiting = Vec::new();
        }

        fn may_go_on(&self, waker: &Waker) -> bool {
            let mut state = lock(&self.state);
            if state.pace == Pace::Rests && !state.waiting.iter().any(|other| other.will_wake(waker)) {
                state.waiting.push(waker.clone());
            }
            state.pace == Pace::Runs
        }
    }

    /// A task of a member.
    pub(crate) struct Owned<F> {
        life: Option<Arc<Life>>,
        task: Pin<Box<F>>,
    }

    impl<F: Future> Future for Owned<F> {
        type Output = F::Output;

        fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
            let Some(life) = self.life.clone() else { return self.task.as_mut().poll(cx) };
            if !life.may_go_on(cx.waker()) {
                return Poll::Pending;
            }
            let before = LIFE.replace(Some(life));
            let polled = self.task.as_mut().poll(cx);
            LIFE.set(before);
            polled
        }
    }

    /// What openraft runs on: tokio, with the seed's random numbers.
    #[derive(Debug)]
    pub(crate) struct Runtime(TokioRuntime);

    /// openraft's source of random numbers.
    pub(crate) struct Random;

    impl rand_core::TryRng for Random {
        type Error = Infallible;

        fn try_next_u32(&mut self) -> Result<u32, Infallible> {
            Ok(random() as u32)
        }

        fn try_next_u64(&mut self) -> Result<u64, Infallible> {
            Ok(random())
        }

        fn try_fill_bytes(&mut self, to: &mut [u8]) -> Result<(), Infallible> {
            for part in to.chunks_mut(8) {
                part.copy_from_slice(&random().to_le_bytes()[..part.len()]);
            }
            Ok(())
        }
    }

    impl AsyncRuntime for Runtime {
        type JoinError = <TokioRuntime as AsyncRuntime>::JoinError;
        type JoinHandle<T: OptionalSend + 'static> = <TokioRuntime as AsyncRuntime>::JoinHandle<T>;
        type Sleep = <TokioRuntime as AsyncRuntime>::Sleep;
        type Instant = <TokioRuntime as AsyncRuntime>::Instant;
        type TimeoutError = <TokioRuntime as AsyncRuntime>::TimeoutError;
        type Timeout<R, T: Future<Output = R> + OptionalSend> = <TokioRuntime as AsyncRuntime>::Timeout<R, T>;
        type ThreadLocalRng = Random;
        type Mpsc = <TokioRuntime as AsyncRuntime>::Mpsc;
        type Watch = <TokioRuntime as AsyncRuntime>::Watch;
        type Oneshot = <TokioRuntime as AsyncRuntime>::Oneshot;
        type Mutex<T: OptionalSend + 'static> = <TokioRuntime as AsyncRuntime>::Mutex<T>;

        fn spawn<T>(future: T) -> Self::JoinHandle<T::Output>
        where
            T: Future + OptionalSend + 'static,
            T::Output: OptionalSend + 'static,
        {
            TokioRuntime::spawn(owned(future))
        }

        fn sleep(duration: Duration) -> Self::Sleep {
            TokioRuntime::sleep(duration)
        }

        fn sleep_until(deadline: Self::Instant) -> Self::Sleep {
            TokioRuntime::sleep_until(deadline)
        }

        fn timeout<R, F: Future<Output = R> + OptionalSend>(duration: Duration, future: F) -> Self::Timeout<R, F> {
            TokioRuntime::timeout(duration, future)
        }

        fn timeout_at<R, F: Future<Output = R> + OptionalSend>(deadline: Self::Instant, future: F) -> Self::Timeout<R, F> {
            TokioRuntime::timeout_at(deadline, future)
        }

        fn is_panic(join_error: &Self::JoinError) -> bool {
            TokioRuntime::is_panic(join_error)
        }

        fn thread_rng() -> Random {
            Random
        }

        fn new(threads: usize) -> Self {
            Runtime(TokioRuntime::new(threads))
        }

        fn block_on<F, T>(&mut self, future: F) -> T
        where
            F: Future<Output = T>,
        {
            self.0.block_on(future)
        }
    }
}
