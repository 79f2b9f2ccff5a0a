//! Elections: the same queues as [locks](super::lock), in which a key's value is what its owner has to say as the leader.
//!
//! `etcdctl elect` and etcd's concurrency package stand in the same queues.

use bytes::Bytes;

use super::lock::{Place, Queue, head_of, queue_prefix};
use super::session::Session;
use super::watch::Watcher;
use super::{Client, Result, prefix_end};
use crate::proto::KeyValue;
use crate::proto::etcdserverpb::{Compare, WatchCreateRequest};

/// An election that a session may stand in, from [`Session::election`].
#[derive(Clone, Debug)]
pub struct Election {
    session: Session,
    name: Bytes,
}

impl Session {
    /// The election of that name.
    pub fn election(&self, name: impl Into<Bytes>) -> Election {
        Election { session: self.clone(), name: name.into() }
    }
}

impl Election {
    /// Stands for election with a value, and waits to be the leader. Who gives up waiting (drops the future) leaves the queue, soon and if
    /// possible. A session, with all its clones, stands once: who stands a second time waits until the first has resigned.
    ///
    /// # Errors
    /// As [`Session::lock`].
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
    /// let session = client.session(10).await?;
    /// let lead = session.election("scheduler").campaign("node-1").await?;
    /// assert_eq!(client.leader_of("scheduler").await?.expect("there is one").value, "node-1");
    /// lead.proclaim("node-1, ready").await?;
    /// lead.resign().await?;
    /// assert_eq!(client.leader_of("scheduler").await?, None);
    /// # server.shutdown().await?;
    /// # Ok(())
    /// # })
    /// # }
    /// ```
    pub async fn campaign(&self, value: impl Into<Bytes>) -> Result<Leadership> {
        let value = value.into();
        let queue = Queue::of(&self.session, &self.name);
        let turn = queue.turn().await?;
        let (place, first) = queue.take(turn, value.clone()).await?;
        if place.value != value {
            // The lease stood already, with another value.
            place.put(value).await?;
        }
        if !first {
            place.wait().await?;
        }
        Ok(Leadership(place))
    }
}

/// The lead in an election. Dropped, it is given up, soon and if possible; [`resign`](Self::resign) does so at once.
#[derive(Debug)]
pub struct Leadership(Place);

impl Leadership {
    /// The leader's key.
    pub fn key(&self) -> &Bytes {
        &self.0.key
    }

    /// The fencing token, as [`Lock::revision`](super::Lock::revision): every later leader has a higher one.
    pub fn revision(&self) -> i64 {
        self.0.revision
    }

    /// The condition under which a Txn writes only while this leads.
    pub fn is_held(&self) -> Compare {
        self.0.is_held()
    }

    /// The session that leads. Once that is [lost](Session::lost), so is the lead.
    pub fn session(&self) -> &Session {
        &self.0.session
    }

    /// Says something else, without another election.
    ///
    /// # Errors
    /// `SessionLost` when this leads no more; else as [`Client::txn`].
    pub async fn proclaim(&self, value: impl Into<Bytes>) -> Result<()> {
        self.0.put(value.into()).await.map(drop)
    }

    /// Gives the lead up.
    ///
    /// # Errors
    /// As [`Lock::unlock`](super::Lock::unlock).
    pub async fn resign(self) -> Result<()> {
        self.0.leave().await
    }
}

impl Client {
    /// The leader of an election: its key, and what it says; `None` when there is none.
    ///
    /// # Errors
    /// As [`get`](Self::get).
    pub async fn leader_of(&self, election: impl AsRef<[u8]>) -> Result<Option<KeyValue>> {
        Ok(head_of(self, election.as_ref()).await?.0)
    }

    /// Tells the leaders of an election as they come, and what they say.
    pub fn observe(&self, election: impl Into<Bytes>) -> Observer {
        Observer { client: self.clone(), name: election.into(), watcher: None, look: true, last: None }
    }
}

/// Follows an election; from [`Client::observe`].
#[derive(Debug)]
pub struct Observer {
    client: Client,
    name: Bytes,
    /// Tells that something has changed; none before the first look.
    watcher: Option<Watcher>,
    /// Whether something may have changed since the last look: there was none, or the watcher has said so.
    look: bool,
    /// What was told last: the revisions at which the leader came, and has spoken.
    last: Option<(i64, i64)>,
}

impl Observer {
    /// The next leader, or the next word of the same one; the first time, who leads now. What is over when it is looked at is not told, and nor
    /// is that there is no leader.
    ///
    /// Cancel-safe.
    ///
    /// # Errors
    /// As [`Client::get`] and [`Watcher::next`]; the next call goes on.
    pub async fn next(&mut self) -> Result<KeyValue> {
        loop {
            if !self.look
                && let Some(watcher) = &mut self.watcher
                && watcher.next().await?.is_none()
            {
                self.watcher = None;
            }
            // What the watcher has told it tells once; so this is remembered until the look has succeeded.
            self.look = true;
            let (leader, revision) = head_of(&self.client, &self.name).await?;
            if self.watcher.is_none() {
                let key = queue_prefix(&self.name);
                let range_end = prefix_end(&key);
                let request = WatchCreateRequest { key, range_end, start_revision: revision + 1, ..WatchCreateRequest::default() };
                self.watcher = Some(self.client.watch(request)?);
            }
            self.look = false;
            if let Some(leader) = leader {
                let now = (leader.create_revision, leader.mod_revision);
                if self.last != Some(now) {
                    self.last = Some(now);
                    return Ok(leader);
                }
            }
        }
    }
}
