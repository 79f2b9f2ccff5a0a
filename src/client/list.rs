//! Many keys as they were at one revision: page by page, as a whole, and followed from there on.

use bytes::{BufMut, Bytes, BytesMut};

use super::watch::{WatchEvent, WatchMessage, Watcher, decode};
use super::{Client, Result, prefix_range};
use crate::error::{Error, ErrorKind};
use crate::proto::KeyValue;
use crate::proto::etcdserverpb::range_request::{SortOrder, SortTarget};
use crate::proto::etcdserverpb::{RangeRequest, WatchCreateRequest};

/// Keys in a page, unless the request has a limit.
const PAGE_KEYS: i64 = 1000;

/// How often a listing begins anew because its revision was compacted while it was read. Beyond it whoever asked is told.
const LIST_TRIES: u32 = 5;

/// Keys at one revision.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Listing {
    /// The revision. A watch from the next one on misses nothing.
    pub revision: i64,
    /// The pairs, in the order of their keys.
    pub kvs: Vec<KeyValue>,
}

/// The pages of a range, all of one revision; from [`Client::pages`].
#[derive(Debug)]
pub struct Pages {
    client: Client,
    /// What is to be asked next; none at the end.
    request: Option<RangeRequest>,
    revision: i64,
}

impl Pages {
    /// The revision of all pages; 0 before the first, if the request named none.
    pub fn revision(&self) -> i64 {
        self.revision
    }

    /// The next page: none after the last.
    ///
    /// Cancel-safe: a page that was not returned is read again.
    ///
    /// # Errors
    /// As [`Client::range`]; `Compacted` when the revision was compacted meanwhile. After an error the same page can be asked for again.
    pub async fn next(&mut self) -> Result<Option<Vec<KeyValue>>> {
        let Some(request) = &self.request else { return Ok(None) };
        let answer = self.client.range(request.clone()).await?;
        if self.revision == 0 {
            self.revision = answer.header.as_ref().map_or(0, |header| header.revision);
        }
        let kvs = answer.kvs.iter().map(decode).collect::<Result<Vec<_>>>()?;
        self.request = match (kvs.last(), self.request.take()) {
            (Some(last), Some(request)) if answer.more => {
                Some(RangeRequest { key: following(&last.key), revision: self.revision, ..request })
            }
            _ => None,
        };
        Ok((!kvs.is_empty()).then_some(kvs))
    }
}

/// The first key behind this one.
fn following(key: &[u8]) -> Bytes {
    let mut next = BytesMut::with_capacity(key.len() + 1);
    next.put_slice(key);
    next.put_u8(0);
    next.freeze()
}

impl Client {
    /// Reads a range page by page, in the order of the keys, all at the revision of the first page. The request's limit is that of a page
    /// (1000 without).
    ///
    /// # Errors
    /// `Config` for a request that is to be sorted otherwise.
    pub fn pages(&self, request: RangeRequest) -> Result<Pages> {
        let by_key = request.sort_target == SortTarget::Key as i32;
        if !by_key || request.sort_order == SortOrder::Descend as i32 {
            return Err(Error::Config("pages are in the order of the keys: a range that is sorted otherwise has none".into()));
        }
        let limit = if request.limit > 0 { request.limit } else { PAGE_KEYS };
        let revision = request.revision.max(0);
        Ok(Pages { client: self.clone(), request: Some(RangeRequest { limit, ..request }), revision })
    }

    /// All keys that begin with `prefix`, with their values, as they were at one revision. No prefix means all keys.
    ///
    /// They are read in pages; if their revision is compacted meanwhile, from the beginning.
    ///
    /// # Errors
    /// As [`range`](Self::range).
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
    /// client.put("volumes/a", "1").await?;
    /// client.put("volumes/b", "2").await?;
    /// client.put("nodes/x", "3").await?;
    /// let volumes = client.list("volumes/").await?;
    /// assert_eq!((volumes.kvs.len(), volumes.revision), (2, 4));
    /// # server.shutdown().await?;
    /// # Ok(())
    /// # })
    /// # }
    /// ```
    pub async fn list(&self, prefix: impl Into<Bytes>) -> Result<Listing> {
        let (key, range_end) = prefix_range(prefix.into());
        self.list_range(RangeRequest { key, range_end, ..RangeRequest::default() }).await
    }

    async fn list_range(&self, request: RangeRequest) -> Result<Listing> {
        let mut tries = 1;
        loop {
            match self.list_once(request.clone()).await {
                Err(err) if err.kind() == ErrorKind::Compacted && tries < LIST_TRIES => tries += 1,
                outcome => return outcome,
            }
        }
    }

    async fn list_once(&self, request: RangeRequest) -> Result<Listing> {
        let mut pages = self.pages(request)?;
        let mut kvs = Vec::new();
        while let Some(page) = pages.next().await? {
            kvs.extend(page);
        }
        Ok(Listing { revision: pages.revision(), kvs })
    }

    /// Lists the keys that begin with `prefix`, and then tells what becomes of them; see [`ListWatch`].
    pub fn list_then_watch(&self, prefix: impl Into<Bytes>) -> ListWatch {
        let (key, range_end) = prefix_range(prefix.into());
        self.list_then_watch_with(WatchCreateRequest { key, range_end, progress_notify: true, ..WatchCreateRequest::default() })
    }

    /// As [`list_then_watch`](Self::list_then_watch), with all that a watch can be asked for: its range, filters, `prev_kv`, bookmarks.
    /// The request's start is of no meaning.
    pub fn list_then_watch_with(&self, request: WatchCreateRequest) -> ListWatch {
        ListWatch { client: self.clone(), request, watcher: None }
    }
}

/// What a [`ListWatch`] tells.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ListUpdate {
    /// All keys, as they are at a revision. What was known before is to be forgotten: keys that are not here are gone.
    Snapshot(Listing),
    /// What has changed since.
    Events(Vec<WatchEvent>),
    /// Everything up to this revision has been told.
    Progress {
        /// The revision.
        revision: i64,
    },
}

/// Keys, and what becomes of them: first a [snapshot](ListUpdate::Snapshot), then each event behind it. If the watch cannot go on because
/// the history that it needs was compacted, there is another snapshot, and it goes on from there. From [`Client::list_then_watch`].
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
/// use quorate::client::{EventKind, ListUpdate};
/// use std::collections::BTreeMap;
///
/// client.put("volumes/a", "1").await?;
/// let mut updates = client.list_then_watch("volumes/");
/// let mut volumes = BTreeMap::new();
/// client.put("volumes/b", "2").await?;
/// client.delete("volumes/a").await?;
/// while volumes.len() != 1 || volumes.contains_key("volumes/a".as_bytes()) {
///     match updates.next().await? {
///         ListUpdate::Snapshot(listing) => volumes = listing.kvs.into_iter().map(|kv| (kv.key, kv.value)).collect(),
///         ListUpdate::Events(events) => {
///             for event in events {
///                 match event.kind {
///                     EventKind::Put => volumes.insert(event.kv.key, event.kv.value),
///                     EventKind::Delete => volumes.remove(&event.kv.key),
///                 };
///             }
///         }
///         _ => {} // bookmarks
///     }
/// }
/// # server.shutdown().await?;
/// # Ok(())
/// # })
/// # }
/// ```
#[derive(Debug)]
pub struct ListWatch {
    client: Client,
    request: WatchCreateRequest,
    /// None when the keys have to be listed first.
    watcher: Option<Watcher>,
}

impl ListWatch {
    /// Waits for what there is to tell next.
    ///
    /// Cancel-safe: nothing is lost when the future is dropped; at most a listing is made again.
    ///
    /// # Errors
    /// As [`Client::range`] and [`Watcher::next`]. After an error the next call lists anew, or goes on with the watch if there was one.
    pub async fn next(&mut self) -> Result<ListUpdate> {
        loop {
            let Some(watcher) = &mut self.watcher else {
                // As a watch understands it: no key means the first there can be.
                let first = || Bytes::from_static(&[0]);
                let key = if self.request.key.is_empty() { first() } else { self.request.key.clone() };
                let request = RangeRequest { key, range_end: self.request.range_end.clone(), ..RangeRequest::default() };
                let listing = self.client.list_range(request).await?;
                let request = WatchCreateRequest { start_revision: listing.revision + 1, ..self.request.clone() };
                self.watcher = Some(self.client.watch(request)?);
                return Ok(ListUpdate::Snapshot(listing));
            };
            match watcher.next().await? {
                Some(WatchMessage::Events(events)) => return Ok(ListUpdate::Events(events)),
                Some(WatchMessage::Progress { revision }) => return Ok(ListUpdate::Progress { revision }),
                Some(WatchMessage::Compacted { .. }) | None => self.watcher = None,
            }
        }
    }
}
