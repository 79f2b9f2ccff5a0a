//! The ways to the store. An enum and no trait object: in this process a read is little more than a function call, and stays that.

use std::time::Duration;

use tokio::runtime::Handle;
use tokio::task::JoinHandle;

use super::in_process::InProcess;
use super::remote::Remote;
use super::{LeaseTime, Result};
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

    /// Renews a lease; 0 when there is none. `patience` is how long one member is given, if not as long as usual.
    pub async fn lease_renew(&self, id: i64, patience: Option<Duration>) -> Result<i64> {
        either!(self, lease_renew(id, patience))
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
    /// `Stopped` when the member in this process has stopped.
    pub async fn pause(&self, pause: Duration) -> Result<()> {
        match self {
            Backend::InProcess(member) => member.node.pause(pause).await,
            Backend::Remote(remote) => {
                remote.timers.sleep(pause).await;
                Ok(())
            }
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

/// Timers of a runtime, for whoever polls, on whatever executor.
#[derive(Clone)]
pub(super) struct Timers(Handle);

impl Timers {
    pub fn new(runtime: Handle) -> Self {
        Timers(runtime)
    }

    pub fn runtime(&self) -> &Handle {
        &self.0
    }

    pub fn sleep(&self, pause: Duration) -> tokio::time::Sleep {
        let _entered = self.0.enter();
        tokio::time::sleep(pause)
    }

    /// The outcome, if it comes within that time; `None` for as long as it takes.
    pub async fn within<T>(&self, limit: Option<Duration>, what: impl Future<Output = T>) -> Option<T> {
        let Some(limit) = limit else { return Some(what.await) };
        let timer = self.sleep(limit);
        tokio::select! {
            biased;
            value = what => Some(value),
            () = timer => None,
        }
    }
}
