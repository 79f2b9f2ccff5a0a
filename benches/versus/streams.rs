//! The clients that hold streams or leases, or do several things.
//!
//! - [`KeepAlive`], [`GrantRevoke`]: leases.
//! - [`Fan`] and [`FanWriter`]: a few writers, many watchers. A writer's put is done when *every* watcher has its event, so the load is
//!   closed, nothing is lost unseen, and what is counted was delivered: with 16 writers and 100 watchers, 1600 events are under way.
//! - [`Mixed`] and [`Watches`]: what a Kubernetes control plane does.

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::{Bytes, BytesMut};
use h2::SendStream;
use http::Request;
use prost::Message;
use quorate::proto::etcdserverpb::compare::{CompareResult, CompareTarget, TargetUnion};
use quorate::proto::etcdserverpb::request_op;
use quorate::proto::etcdserverpb::watch_request::RequestUnion;
use quorate::proto::etcdserverpb::{
    Compare, LeaseGrantRequest, LeaseGrantResponse, LeaseKeepAliveRequest, LeaseKeepAliveResponse, LeaseRevokeRequest, PutRequest,
    RangeRequest, TxnRequest, TxnResponse, WatchCancelRequest, WatchCreateRequest, WatchRequest, WatchResponse, response_op,
};
use tokio::sync::{Notify, oneshot};

use crate::load::{Client, Shared};
use crate::requests::{
    Check, FAN_PREFIX, FAN_PREFIX_END, LEASE_GRANT, LEASE_KEEP_ALIVE, LEASE_REVOKE, PUT, RANGE, Stamp, TXN, WATCH, fan_key, key, number_of,
    op, value,
};
use crate::rows::{MIXED_LIST_KEYS, MIXED_OWN_KEYS, MIXED_WATCHES};
use crate::stats::Rng;
use crate::wire::{Channel, Field, Incoming, Result, fields, frame};

/// Seconds that a lease lasts: longer than any round.
const LEASE_TTL_S: i64 = 3600;
/// The lease of the first client; the next client has the next. They are kept from round to round, for to revoke a thousand leases
/// takes etcd longer than a round, and end by themselves where the members go on.
const FIRST_LEASE: i64 = 0x7665_7273_7573_0000;

/// Renews one lease on a stream of its own.
pub struct KeepAlive {
    channel: Channel,
    lease: i64,
    renewal: Bytes,
    stream: Option<(SendStream<Bytes>, Incoming)>,
}

impl KeepAlive {
    pub fn new(client: usize, channel: Channel) -> Self {
        let lease = FIRST_LEASE.saturating_add_unsigned(client as u64);
        Self { channel, lease, renewal: frame(&LeaseKeepAliveRequest { id: lease }), stream: None }
    }
}

impl Client for KeepAlive {
    async fn set_up(&mut self) -> Result<()> {
        let grant = LeaseGrantRequest { ttl: LEASE_TTL_S, id: self.lease };
        match self.channel.call::<LeaseGrantResponse>(LEASE_GRANT, &grant).await {
            Err(error) if !error.to_string().contains("lease already exists") => return Err(error),
            _ => {}
        }
        let method = self.channel.method(LEASE_KEEP_ALIVE);
        self.stream = Some(self.channel.open(&method).await?);
        Ok(())
    }

    async fn step(&mut self) -> Result<u64> {
        let (requests, answers) = self.stream.as_mut().ok_or("no stream")?;
        requests.send_data(self.renewal.clone(), false)?;
        let answer = answers.next().await?.ok_or("the keep-alive stream ended")?;
        let answer = LeaseKeepAliveResponse::decode(answer)?;
        if answer.id != self.lease || answer.ttl != LEASE_TTL_S {
            return Err(format!("lease {} has {} s, not {} with {LEASE_TTL_S}", answer.id, answer.ttl, self.lease).into());
        }
        Ok(1)
    }
}

/// Grants a lease and revokes it.
pub struct GrantRevoke {
    channel: Channel,
    grant: Request<()>,
    revoke: Request<()>,
    wish: Bytes,
}

impl GrantRevoke {
    pub fn new(channel: Channel) -> Self {
        let (grant, revoke) = (channel.method(LEASE_GRANT), channel.method(LEASE_REVOKE));
        Self { channel, grant, revoke, wish: frame(&LeaseGrantRequest { ttl: LEASE_TTL_S, id: 0 }) }
    }
}

impl Client for GrantRevoke {
    async fn step(&mut self) -> Result<u64> {
        let granted = LeaseGrantResponse::decode(self.channel.unary(&self.grant, self.wish.clone()).await?)?;
        if granted.id == 0 || granted.ttl != LEASE_TTL_S {
            return Err(format!("lease {} was granted for {} s", granted.id, granted.ttl).into());
        }
        self.channel.unary(&self.revoke, frame(&LeaseRevokeRequest { id: granted.id })).await?;
        Ok(1)
    }
}

/// The watchers of one prefix, and for each key below it how many of them have its newest event.
pub struct Fan {
    slots: Vec<FanSlot>,
    watchers: usize,
}

#[derive(Default)]
struct FanSlot {
    arrived: AtomicUsize,
    all_here: Notify,
}

impl Fan {
    pub fn new(slots: usize, watchers: usize) -> Self {
        Self { slots: (0..slots).map(|_| FanSlot::default()).collect(), watchers }
    }

    /// Opens a stream, creates that many watchers on it, and counts their events from then on.
    pub async fn watch(self: Arc<Self>, channel: &mut Channel, watchers: usize, shared: Arc<Shared>) -> Result<()> {
        let method = channel.method(WATCH);
        let (mut requests, mut answers) = channel.open(&method).await?;
        for id in 1..=watchers {
            let create = WatchCreateRequest {
                key: FAN_PREFIX.into(),
                range_end: FAN_PREFIX_END.into(),
                watch_id: i64::try_from(id)?,
                ..Default::default()
            };
            requests.send_data(frame(&WatchRequest { request_union: Some(RequestUnion::CreateRequest(create)) }), false)?;
        }
        for _ in 0..watchers {
            let answer = WatchResponse::decode(answers.next().await?.ok_or("the watch stream ended")?)?;
            if !answer.created || answer.canceled {
                return Err(format!("a watcher was refused: {}", answer.cancel_reason).into());
            }
        }
        tokio::spawn(async move {
            // The sending half stays open as long as there is somebody to listen.
            let _requests = requests;
            loop {
                let counted = match answers.next().await {
                    Ok(Some(answer)) => self.count(&answer),
                    Ok(None) => Err("the watch stream ended".into()),
                    Err(error) => Err(error),
                };
                if let Err(error) = counted {
                    return shared.fail(error);
                }
            }
        });
        Ok(())
    }

    /// Counts the events of one `WatchResponse`.
    fn count(&self, answer: &[u8]) -> Result<()> {
        for field in fields(answer) {
            match field? {
                Field::Number(4, 1) => return Err("a watcher was cancelled".into()),
                Field::Bytes(11, event) => {
                    let slot = slot_of(event)?.and_then(|slot| self.slots.get(slot)).ok_or("an event of a key that nobody wrote")?;
                    let arrived = slot.arrived.fetch_add(1, Ordering::Relaxed) + 1;
                    if arrived == self.watchers {
                        slot.all_here.notify_one();
                    } else if arrived > self.watchers {
                        return Err("an event came twice".into());
                    }
                }
                _ => {}
            }
        }
        Ok(())
    }
}

/// The number at the end of an event's key.
fn slot_of(event: &[u8]) -> Result<Option<usize>> {
    for field in fields(event) {
        if let Field::Bytes(2, pair) = field? {
            for field in fields(pair) {
                if let Field::Bytes(1, key) = field? {
                    return Ok(number_of(key));
                }
            }
        }
    }
    Ok(None)
}

/// Puts one key and waits until every watcher has the event.
pub struct FanWriter {
    fan: Arc<Fan>,
    slot: usize,
    channel: Channel,
    put: Request<()>,
    frame: Bytes,
}

impl FanWriter {
    pub fn new(fan: Arc<Fan>, slot: usize, channel: Channel, value_bytes: usize) -> Self {
        let put = PutRequest { key: fan_key(slot).into(), value: value(value_bytes).into(), ..Default::default() };
        Self { fan, slot, put: channel.method(PUT), channel, frame: frame(&put) }
    }
}

impl Client for FanWriter {
    async fn step(&mut self) -> Result<u64> {
        let slot = self.fan.slots.get(self.slot).ok_or("no such slot")?;
        // All events of the last put are here, so whatever arrives from now on is this one's.
        slot.arrived.store(0, Ordering::Relaxed);
        let answer = self.channel.unary(&self.put, self.frame.clone()).await?;
        Check::Put.check(&answer)?;
        while slot.arrived.load(Ordering::Relaxed) < self.fan.watchers {
            slot.all_here.notified().await;
        }
        Ok(self.fan.watchers as u64)
    }
}

/// A watch stream of the mixed row.
pub struct Watches {
    requests: Mutex<SendStream<Bytes>>,
    state: Mutex<WatchesState>,
}

#[derive(Default)]
struct WatchesState {
    last: i64,
    /// Who waits for which watch to be there. Never more than there are clients.
    starting: BTreeMap<i64, oneshot::Sender<()>>,
    /// Oldest first.
    live: VecDeque<i64>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Watches {
    pub async fn open(channel: &mut Channel, shared: Arc<Shared>) -> Result<Arc<Self>> {
        let method = channel.method(WATCH);
        let (requests, mut answers) = channel.open(&method).await?;
        let watches = Arc::new(Self { requests: Mutex::new(requests), state: Mutex::default() });
        let listener = watches.clone();
        tokio::spawn(async move {
            loop {
                let heard = match answers.next().await {
                    Ok(Some(answer)) => listener.hear(&answer),
                    Ok(None) => Err("the watch stream ended".into()),
                    Err(error) => Err(error),
                };
                if let Err(error) = heard {
                    // Whoever waits for a watch is told as well.
                    lock(&listener.state).starting.clear();
                    return shared.fail(error);
                }
            }
        });
        Ok(watches)
    }

    /// Events are only looked at; what matters is that they are sent and taken.
    fn hear(&self, answer: &[u8]) -> Result<()> {
        let (mut id, mut created, mut cancelled) = (0, false, false);
        for field in fields(answer) {
            match field? {
                Field::Number(2, number) => id = number.cast_signed(),
                Field::Number(3, flag) => created = flag == 1,
                Field::Number(4, flag) => cancelled = flag == 1,
                _ => {}
            }
        }
        let mut state = lock(&self.state);
        if created && !cancelled {
            let waiter = state.starting.remove(&id).ok_or("a watch that nobody asked for")?;
            state.live.push_back(id);
            let _ = waiter.send(());
        } else if cancelled && (created || state.live.contains(&id)) {
            return Err(format!("watch {id} was refused or cancelled").into());
        }
        Ok(())
    }

    /// Starts a watch of a hundredth of the keys and waits until it is there.
    pub async fn start(&self, rng: &mut Rng, keys: u64) -> Result<()> {
        let width = (keys / MIXED_WATCHES as u64).max(1);
        let first = rng.below(MIXED_WATCHES as u64) * width;
        let (waiter, created) = oneshot::channel();
        let watch_id = {
            let mut state = lock(&self.state);
            state.last += 1;
            let id = state.last;
            state.starting.insert(id, waiter);
            id
        };
        let (key, range_end) = (key(first).into(), key(first + width).into());
        self.send(RequestUnion::CreateRequest(WatchCreateRequest { key, range_end, watch_id, ..Default::default() }))?;
        Ok(created.await?)
    }

    /// Ends the oldest watch.
    fn end_oldest(&self) -> Result<()> {
        let oldest = lock(&self.state).live.pop_front();
        oldest.map_or(Ok(()), |watch_id| self.send(RequestUnion::CancelRequest(WatchCancelRequest { watch_id })))
    }

    fn send(&self, request: RequestUnion) -> Result<()> {
        Ok(lock(&self.requests).send_data(frame(&WatchRequest { request_union: Some(request) }), false)?)
    }
}

/// One component of a control plane: it reads, lists, updates what is its own, and starts watches.
pub struct Mixed {
    channel: Channel,
    watches: Arc<Watches>,
    range: Request<()>,
    txn: Request<()>,
    get: Stamp,
    list: Stamp,
    keys: u64,
    value: Bytes,
    /// Keys that only this client updates, with the revision it knows of each; 0 until it knows.
    own: Vec<(u64, i64)>,
    rng: Rng,
    buffer: BytesMut,
}

impl Mixed {
    /// `place` is the number of the client and of all clients.
    pub fn new(channel: Channel, watches: Arc<Watches>, place: (u64, u64), keys: u64, value_bytes: usize) -> Self {
        let apart = (keys / (MIXED_OWN_KEYS * place.1)).max(1);
        let own = (0..MIXED_OWN_KEYS).map(|index| ((place.0 + index * place.1) * apart % keys, 0)).collect();
        Self {
            watches,
            range: channel.method(RANGE),
            txn: channel.method(TXN),
            channel,
            get: Stamp::get(false),
            list: Stamp::range(),
            keys,
            value: value(value_bytes).into(),
            own,
            rng: Rng::new(place.0),
            buffer: BytesMut::new(),
        }
    }

    /// "If the key is as I know it, put it, otherwise tell me how it is." The first time of a key teaches only its revision.
    async fn update(&mut self) -> Result<()> {
        let own = self.own.len() as u64;
        let (number, revision) = self.own.get_mut(usize::try_from(self.rng.below(own))?).ok_or("no keys of its own")?;
        let key = Bytes::from(key(*number));
        let unchanged = Compare {
            result: CompareResult::Equal.into(),
            target: CompareTarget::Mod.into(),
            key: key.clone(),
            target_union: Some(TargetUnion::ModRevision(*revision)),
            ..Default::default()
        };
        let put = PutRequest { key: key.clone(), value: self.value.clone(), ..Default::default() };
        let get = RangeRequest { key, ..Default::default() };
        let txn = TxnRequest {
            compare: vec![unchanged],
            success: vec![op(request_op::Request::RequestPut(put))],
            failure: vec![op(request_op::Request::RequestRange(get))],
        };
        let answer = TxnResponse::decode(self.channel.unary(&self.txn, frame(&txn)).await?)?;
        if answer.succeeded {
            *revision = answer.header.ok_or("an answer without a header")?.revision;
            return Ok(());
        }
        if *revision != 0 {
            return Err(format!("key {number} is no longer as of revision {revision}, though nobody else writes it").into());
        }
        let Some(response_op::Response::ResponseRange(found)) = answer.responses.into_iter().next().and_then(|op| op.response) else {
            return Err("a transaction without its read".into());
        };
        *revision = found.kvs.first().ok_or("a key that was loaded is not there")?.view()?.mod_revision;
        Ok(())
    }
}

impl Client for Mixed {
    async fn step(&mut self) -> Result<u64> {
        match self.rng.below(100) {
            0..40 => {
                let frame = self.get.fill(&mut self.buffer, self.rng.below(self.keys), 0, 0);
                Check::Range(1).check(&self.channel.unary(&self.range, frame).await?)?;
            }
            40..80 => {
                let first = self.rng.below(self.keys - MIXED_LIST_KEYS + 1);
                let frame = self.list.fill(&mut self.buffer, first, first + MIXED_LIST_KEYS, 0);
                Check::Range(MIXED_LIST_KEYS).check(&self.channel.unary(&self.range, frame).await?)?;
            }
            80..95 => self.update().await?,
            _ => {
                self.watches.start(&mut self.rng, self.keys).await?;
                self.watches.end_oldest()?;
            }
        }
        Ok(1)
    }
}
