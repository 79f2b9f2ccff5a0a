//! Writes under a condition, as one Txn: create if absent, compare and swap, compare and delete.

use bytes::Bytes;

use super::watch::decode;
use super::{Client, Result};
use crate::error::Error;
use crate::proto::KeyValue;
use crate::proto::etcdserverpb::compare::{CompareResult, CompareTarget, TargetUnion};
use crate::proto::etcdserverpb::request_op::Request;
use crate::proto::etcdserverpb::response_op::Response;
use crate::proto::etcdserverpb::{Compare, DeleteRangeRequest, PutRequest, RangeRequest, RequestOp, TxnRequest, TxnResponse};

/// What came of a write under a condition.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Swap {
    /// It was carried out, at this revision.
    Done {
        /// The revision; the key's new `mod_revision` if it was put.
        revision: i64,
    },
    /// The condition did not hold, and nothing was changed.
    Differs {
        /// The pair as it is; `None` if there is none.
        current: Option<KeyValue>,
    },
}

impl Swap {
    /// Whether it was carried out.
    pub fn is_done(&self) -> bool {
        matches!(self, Swap::Done { .. })
    }
}

impl Client {
    /// Puts a key if there is none.
    ///
    /// # Errors
    /// As [`put`](Self::put).
    pub async fn create(&self, key: impl Into<Bytes>, value: impl Into<Bytes>) -> Result<Swap> {
        self.create_with(PutRequest { key: key.into(), value: value.into(), ..PutRequest::default() }).await
    }

    /// Puts a key if there is none, with all that a put can say.
    ///
    /// # Errors
    /// As [`put`](Self::put).
    pub async fn create_with(&self, request: PutRequest) -> Result<Swap> {
        let key = request.key.clone();
        self.swap(key.clone(), Compare::create_revision_is(key, 0), Request::RequestPut(request)).await
    }

    /// Puts a key if it has not been changed since `mod_revision`, which is what was read then. 0 stands for a key that is not there.
    ///
    /// # Errors
    /// As [`put`](Self::put). After one that leaves the outcome open, read the key again to see.
    ///
    /// ```
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(async {
    /// # let dir = tempfile::tempdir()?;
    /// # let mut config = quorate::Config::default();
    /// # config.data_dir = Some(dir.path().into());
    /// # config.listen_client_urls.clear();
    /// # config.listen_peer_urls.clear();
    /// # let server = quorate::Server::start(config).await?;
    /// # let client = server.client();
    /// use quorate::client::Swap;
    /// assert!(client.create("counter", "1").await?.is_done());
    /// let read = client.get("counter").await?.expect("it was just made");
    /// assert_eq!(client.compare_and_swap("counter", read.mod_revision, "2").await?, Swap::Done { revision: 3 });
    /// let late = client.compare_and_swap("counter", read.mod_revision, "2").await?;
    /// assert!(matches!(late, Swap::Differs { current: Some(kv) } if kv.value == "2"));
    /// # server.shutdown().await?;
    /// # Ok(())
    /// # })
    /// # }
    /// ```
    pub async fn compare_and_swap(&self, key: impl Into<Bytes>, mod_revision: i64, value: impl Into<Bytes>) -> Result<Swap> {
        self.compare_and_swap_with(mod_revision, PutRequest { key: key.into(), value: value.into(), ..PutRequest::default() }).await
    }

    /// As [`compare_and_swap`](Self::compare_and_swap), with all that a put can say.
    ///
    /// # Errors
    /// As [`put`](Self::put).
    pub async fn compare_and_swap_with(&self, mod_revision: i64, request: PutRequest) -> Result<Swap> {
        let key = request.key.clone();
        self.swap(key.clone(), Compare::mod_revision_is(key, mod_revision), Request::RequestPut(request)).await
    }

    /// Deletes a key if it has not been changed since `mod_revision`.
    ///
    /// # Errors
    /// As [`put`](Self::put).
    pub async fn compare_and_delete(&self, key: impl Into<Bytes>, mod_revision: i64) -> Result<Swap> {
        let key = key.into();
        let delete = DeleteRangeRequest { key: key.clone(), ..DeleteRangeRequest::default() };
        self.swap(key.clone(), Compare::mod_revision_is(key, mod_revision), Request::RequestDeleteRange(delete)).await
    }

    async fn swap(&self, key: Bytes, condition: Compare, write: Request) -> Result<Swap> {
        let read = Request::RequestRange(RangeRequest { key, ..RangeRequest::default() });
        let op = |request| vec![RequestOp { request: Some(request) }];
        let answer = self.txn(TxnRequest { compare: vec![condition], success: op(write), failure: op(read) }).await?;
        if answer.succeeded {
            return Ok(Swap::Done { revision: answer.header.map_or(0, |header| header.revision) });
        }
        Ok(Swap::Differs { current: first_of(&answer, 0)? })
    }
}

/// The first pair that the Range found which was the Txn's operation of that number.
pub(super) fn first_of(answer: &TxnResponse, number: usize) -> Result<Option<KeyValue>> {
    match answer.responses.get(number).and_then(|op| op.response.as_ref()) {
        Some(Response::ResponseRange(range)) => range.kvs.first().map(decode).transpose(),
        _ => Err(Error::Failed("a Txn was answered with another one's answer".into())),
    }
}

impl Compare {
    /// That the key was put first at this revision; 0: that there is none.
    pub fn create_revision_is(key: impl Into<Bytes>, revision: i64) -> Compare {
        Compare {
            result: CompareResult::Equal as i32,
            target: CompareTarget::Create as i32,
            key: key.into(),
            target_union: Some(TargetUnion::CreateRevision(revision)),
            ..Compare::default()
        }
    }

    /// That the key was put last at this revision; 0: that there is none.
    pub fn mod_revision_is(key: impl Into<Bytes>, revision: i64) -> Compare {
        Compare {
            result: CompareResult::Equal as i32,
            target: CompareTarget::Mod as i32,
            key: key.into(),
            target_union: Some(TargetUnion::ModRevision(revision)),
            ..Compare::default()
        }
    }
}
