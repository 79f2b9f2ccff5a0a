//! The ways to the store. An enum and no trait object: in this process a read is little more than a function call, and stays that.

use std::future::poll_fn;
use std::pin::pin;
use std::sync::{Arc, RwLock};
use std::task::Poll;
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::in_process::InProcess;
use super::remote::Remote;
use super::{LeaseTime, Result};
use crate::error::Error;
use crate::lock::{read, write};
use crate::proto::etcdserverpb::{
    AlarmRequest, AlarmResponse, CompactionRequest, CompactionResponse, DeleteRangeRequest, DeleteRangeResponse, HashKvResponse,
    LeaseGrantRequest, LeaseGrantResponse, LeaseRevokeRequest, LeaseRevokeResponse, Member, PutRequest, PutResponse, RangeRequest,
    RangeResponse, StatusResponse, TxnRequest, TxnResponse,
};

#[derive(Clone)]
pub(super) enum Backend {
    InProcess(InProcess),
    Remote(Remote),
}

/// The same call on either. The future of a remote one is many times as large; in a box it does not burden the other.
macro_rules! either {
    ($self:ident, $call:ident($($arg:expr),*)) => {
        match $self {
            Backend::InProcess(member) => member.$call($($arg),*).await,
            Backend::Remote(remote) => Box::pin(remote.$call($($arg),*)).await,
        }
    };
}

impl Backend {
    pub async fn range(&self, request: RangeRequest) -> Result<RangeResponse> {
        either!(self, range(request))
    }

    pub async fn put(&self, request: PutRequest) -> Result<PutResponse> {
        either!(self, put(request))
    }

    pub async fn delete_range(&self, request: DeleteRangeRequest) -> Result<DeleteRangeResponse> {
        either!(self, delete_range(request))
    }

    pub async fn txn(&self, request: TxnRequest) -> Result<TxnResponse> {
        either!(self, txn(request))
    }

    pub async fn compact(&self, request: CompactionRequest) -> Result<CompactionResponse> {
        either!(self, compact(request))
    }

    pub async fn lease_grant(&self, request: LeaseGrantRequest) -> Result<LeaseGrantResponse> {
        either!(self, lease_grant(request))
    }

    pub async fn lease_revoke(&self, request: LeaseRevokeRequest) -> Result<LeaseRevokeResponse> {
        either!(self, lease_revoke(request))
    }

    /// Renews a lease; 0 when there is none.
    pub async fn lease_renew(&self, id: i64) -> Result<i64> {
        either!(self, lease_renew(id))
    }

    /// The same, of which the time is short: one member is waited for no longer than `patience`, before all others are asked, too; and if it
    /// is late, none is asked alone.
    pub async fn lease_renew_soon(&self, id: i64, patience: Duration, is_late: bool) -> Result<i64> {
        either!(self, lease_renew_soon(id, patience, is_late))
    }

    pub async fn lease_time_to_live(&self, id: i64) -> Result<Option<LeaseTime>> {
        either!(self, lease_time_to_live(id))
    }

    pub async fn leases(&self) -> Result<Vec<i64>> {
        either!(self, leases())
    }

    pub async fn alarm(&self, request: AlarmRequest) -> Result<AlarmResponse> {
        either!(self, alarm(request))
    }

    pub async fn member_list(&self) -> Result<Vec<Member>> {
        either!(self, member_list())
    }

    pub async fn member_status(&self) -> Result<StatusResponse> {
        either!(self, member_status())
    }

    pub async fn hash_kv(&self, revision: i64) -> Result<HashKvResponse> {
        either!(self, hash_kv(revision))
    }

    pub async fn defragment(&self) -> Result<()> {
        either!(self, defragment())
    }

    /// Waits.
    ///
    /// # Errors
    /// `Stopped` when the member in this process has stopped, or the node that the client is of.
    pub async fn pause(&self, pause: Duration) -> Result<()> {
        match self {
            Backend::InProcess(member) => member.node.pause(pause).await,
            Backend::Remote(remote) => remote.timers.sleep(pause).await,
        }
    }

    /// Starts a task, where there are timers for it: on the server's runtime, or on the one that the client was made on.
    pub fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) -> Task {
        let runtime = match self {
            Backend::InProcess(member) => member.node.runtime(),
            Backend::Remote(remote) => remote.timers.runtime(),
        };
        Task::spawn(runtime, task)
    }
}

/// A task that ends when this is dropped.
pub(super) struct Task(Option<JoinHandle<()>>);

impl Task {
    pub fn spawn(runtime: &Handle, task: impl Future<Output = ()> + Send + 'static) -> Task {
        Task(Some(runtime.spawn(task)))
    }

    /// Lets it come to its own end, of which it has one.
    pub fn detach(mut self) {
        self.0 = None;
    }
}

impl Drop for Task {
    fn drop(&mut self) {
        if let Some(task) = &self.0 {
            task.abort();
        }
    }
}

/// The word that a runtime is about to end, for clients that outlive it. tokio's timers panic when they are polled after that.
#[derive(Clone, Default)]
pub(crate) struct RuntimeEnd {
    near: CancellationToken,
    /// Held shared while a timer is polled.
    polling: Arc<RwLock<()>>,
}

impl RuntimeEnd {
    /// Says so. When this returns, no timer of the clients is being polled, and none will be: the runtime may end.
    pub fn announce(&self) {
        self.near.cancel();
        // Who has not seen it yet is about to poll, and is waited for.
        drop(write(&self.polling));
    }

    fn check(&self) -> Result<()> {
        if self.near.is_cancelled() { Err(Error::Stopped) } else { Ok(()) }
    }
}

/// Timers of a runtime, for whoever polls, on whatever executor. Once the runtime's end is near there are none, and what is waited for with
/// them ends with `Stopped`.
#[derive(Clone)]
pub(super) struct Timers {
    runtime: Handle,
    end: RuntimeEnd,
}

impl Timers {
    pub fn new(runtime: Handle, end: RuntimeEnd) -> Self {
        Timers { runtime, end }
    }

    pub fn runtime(&self) -> &Handle {
        &self.runtime
    }

    /// # Errors
    /// `Stopped`: the runtime's end is near.
    pub fn check(&self) -> Result<()> {
        self.end.check()
    }

    /// # Errors
    /// `Stopped` when the runtime ends meanwhile, or has ended.
    pub async fn sleep(&self, pause: Duration) -> Result<()> {
        let timer = {
            let _entered = self.runtime.enter();
            tokio::time::sleep(pause)
        };
        let mut timer = pin!(timer);
        let over = poll_fn(|cx| {
            let _polling = read(&self.end.polling);
            // The word may have come since it was asked for last; then it wakes us.
            if self.end.near.is_cancelled() { Poll::Pending } else { timer.as_mut().poll(cx) }
        });
        tokio::select! {
            biased;
            () = self.end.near.cancelled() => Err(Error::Stopped),
            () = over => Ok(()),
        }
    }

    /// The outcome, if it comes within that time; `None` for as long as it takes.
    ///
    /// # Errors
    /// `Timeout` when it does not; as [`sleep`](Self::sleep).
    pub async fn within<T>(&self, limit: Option<Duration>, what: impl Future<Output = T>) -> Result<T> {
        let timeout = async {
            match limit {
                Some(limit) => self.sleep(limit).await.err().unwrap_or(Error::Timeout),
                None => {
                    self.end.near.cancelled().await;
                    Error::Stopped
                }
            }
        };
        tokio::select! {
            biased;
            value = what => Ok(value),
            err = timeout => Err(err),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_timer_is_polled_after_its_runtime() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let end = RuntimeEnd::default();
        let timers = Timers::new(runtime.handle().clone(), end.clone());
        let long = Duration::from_secs(3600);
        let host = tokio::runtime::Builder::new_current_thread().build().unwrap();
        host.block_on(async {
            let mut waiting = Box::pin(timers.within(Some(long), std::future::pending::<()>()));
            let mut unlimited = Box::pin(timers.within(None, std::future::pending::<()>()));
            let mut sleeping = Box::pin(timers.sleep(long));
            assert!(futures_util::poll!(waiting.as_mut()).is_pending());
            assert!(futures_util::poll!(unlimited.as_mut()).is_pending());
            assert!(futures_util::poll!(sleeping.as_mut()).is_pending());
            timers.check().unwrap();
            end.announce();
            runtime.shutdown_background();
            assert!(matches!(waiting.await, Err(Error::Stopped)));
            assert!(matches!(unlimited.await, Err(Error::Stopped)));
            assert!(matches!(sleeping.await, Err(Error::Stopped)));
            assert!(matches!(timers.sleep(Duration::ZERO).await, Err(Error::Stopped)));
            assert!(matches!(timers.check(), Err(Error::Stopped)));
            // What needs no timer is done all the same.
            assert!(matches!(timers.within(Some(long), std::future::ready(7)).await, Ok(7)));
        });
    }
}
