//! Random requests, dense in the corners: few keys, so that they meet; revisions around the current and the compacted
//! one; options that contradict each other.
//!
//! The same seed and the same answers give the same requests. Left out is only what cannot be compared, each with its
//! reason here: requests that kill the reference (see `killers.rs`) or, with a compaction at revision 0, make it answer
//! nonsense; sort orders outside the enum (3.5 answers them, 3.7 does not); and leases that run out while the test runs
//! (the two members do not tick together).

use bytes::Bytes;
use rand::prelude::*;
use rand::rngs::StdRng;

use super::pb::compare::TargetUnion;
use super::pb::request_op::Request;
use super::pb::*;

/// All keys that requests use, so few that most requests meet others.
pub const KEYS: [&[u8]; 18] = [
    b"a",
    b"a\0",
    b"a/",
    b"a/b",
    b"a/b/c",
    b"a/c",
    b"aa",
    b"b",
    b"b\0",
    b"b/1",
    b"c",
    b"\0",
    b"\0\0",
    b"\x7f",
    b"zz",
    b"\xff",
    b"\xff\xff",
    b"\xff\xff\xff",
];

/// Lease ids that requests use. Any number but 0 is legal.
pub const LEASES: [i64; 6] = [1, 2, 3, 0x7777, -1, i64::MAX];

/// A TTL that outlasts the test.
pub const LONG_TTL: i64 = 100_000;

/// Watch streams open at a time.
pub const STREAMS: usize = 3;

/// One step of the test, sent to both members.
#[derive(Clone, Debug)]
pub enum Op {
    Put(PutRequest),
    Range(RangeRequest),
    Delete(DeleteRangeRequest),
    Txn(TxnRequest),
    Compact(CompactionRequest),
    Grant(LeaseGrantRequest),
    /// A grant whose id the server chooses, or whose TTL is too short to wait for; revoked right after.
    GrantAndRevoke(LeaseGrantRequest),
    Revoke(LeaseRevokeRequest),
    TimeToLive(LeaseTimeToLiveRequest),
    Leases,
    KeepAlive(LeaseKeepAliveRequest),
    HashKv(HashKvRequest),
    Members,
    Alarms(AlarmRequest),
    Watch(usize, WatchCreateRequest),
    CancelWatch(usize, i64),
    /// Ends a stream and opens another in its place.
    Reopen(usize),
    /// Waits for all events and compares them.
    Barrier,
    /// Compares everything that can be read.
    FullState,
}

/// What the generator knows of the members.
#[derive(Debug, Default)]
pub struct Known {
    pub revision: i64,
    pub compacted: i64,
    /// Revisions at which the reference must not be compacted, because it would lose a key and later die of it: those
    /// of a Txn that deletes a key by an open range, unseen by the overlap check, and puts it again.
    pub poisoned: Vec<i64>,
    /// Live watches by stream: id and start revision.
    pub watches: [Vec<(i64, i64)>; STREAMS],
}

pub struct Generator {
    rng: StdRng,
}

impl Generator {
    pub fn new(seed: u64) -> Generator {
        Generator { rng: StdRng::seed_from_u64(seed) }
    }

    fn chance(&mut self, percent: u32) -> bool {
        self.rng.random_range(0..100) < percent
    }

    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.rng.random_range(0..from.len())]
    }

    pub fn next(&mut self, known: &Known) -> Op {
        match self.rng.random_range(0..1000) {
            0..220 => Op::Put(self.put(true)),
            220..400 => Op::Range(self.range(known, false)),
            400..480 => Op::Delete(self.delete()),
            480..680 => Op::Txn(self.txn(known)),
            680..692 => Op::Compact(self.compact(known)),
            692..722 => self.grant(),
            722..737 => Op::Revoke(LeaseRevokeRequest { id: self.lease() }),
            737..757 => Op::TimeToLive(LeaseTimeToLiveRequest { id: self.lease(), keys: self.chance(70) }),
            757..762 => Op::Leases,
            762..772 => Op::KeepAlive(LeaseKeepAliveRequest { id: self.lease() }),
            772..812 => Op::HashKv(HashKvRequest { revision: self.revision(known) }),
            812..815 => Op::Members,
            815..818 => {
                Op::Alarms(AlarmRequest { alarm: self.rng.random_range(0..3), member_id: self.pick(&[0, 7]), ..Default::default() })
            }
            818..900 => Op::Watch(self.rng.random_range(0..STREAMS), self.watch(known)),
            900..940 => {
                let stream = self.rng.random_range(0..STREAMS);
                match known.watches[stream].choose(&mut self.rng) {
                    Some((id, _)) => Op::CancelWatch(stream, *id),
                    None => Op::Barrier,
                }
            }
            940..945 => Op::Reopen(self.rng.random_range(0..STREAMS)),
            945..970 => Op::Barrier,
            970..974 => Op::FullState,
            _ => Op::Put(self.put(false)),
        }
    }

    fn key(&mut self) -> Bytes {
        if self.chance(1) { Bytes::new() } else { Bytes::from_static(self.pick(&KEYS)) }
    }

    /// An end for a range from `key`: none, open, the prefix's, another key (maybe below), the key itself, the next.
    fn range_end(&mut self, key: &[u8]) -> Bytes {
        match self.rng.random_range(0..10) {
            0..4 => Bytes::new(),
            4 => Bytes::from_static(b"\0"),
            5 => prefix_end(key),
            6 => Bytes::copy_from_slice(key),
            7 => [key, b"\0"].concat().into(),
            _ => Bytes::from_static(self.pick(&KEYS)),
        }
    }

    /// A short value out of few, so that they are often the same.
    fn value(&mut self) -> Bytes {
        match self.rng.random_range(0..20) {
            0..3 => Bytes::new(),
            3..17 => format!("v{}", self.rng.random_range(0..8)).into(),
            17 => Bytes::from_static(b"\0\xff"),
            _ => vec![b'x'; self.rng.random_range(100..5000)].into(),
        }
    }

    fn lease(&mut self) -> i64 {
        if self.chance(6) { self.pick(&[0, 99, i64::MIN]) } else { self.pick(&LEASES) }
    }

    fn revision(&mut self, known: &Known) -> i64 {
        let Known { revision, compacted, .. } = *known;
        match self.rng.random_range(0..12) {
            0..3 => 0,
            3 => self.pick(&[-1, -2, i64::MIN, i64::MAX, 1, 2]),
            4 => compacted + self.rng.random_range(-1..=1),
            5 => revision + self.rng.random_range(-1..=1),
            _ => self.rng.random_range(compacted.max(1)..=revision.max(compacted).max(1)),
        }
    }

    fn put(&mut self, wild: bool) -> PutRequest {
        let mut put = PutRequest { key: self.key(), value: self.value(), prev_kv: self.chance(30), ..Default::default() };
        if self.chance(25) {
            put.lease = self.lease();
        }
        if wild {
            put.ignore_value = self.chance(12);
            put.ignore_lease = self.chance(12);
            if put.ignore_value && self.chance(85) {
                put.value.clear();
            }
            if put.ignore_lease && self.chance(85) {
                put.lease = 0;
            }
        }
        put
    }

    fn range(&mut self, known: &Known, in_txn: bool) -> RangeRequest {
        let key = self.key();
        let mut range = RangeRequest { range_end: self.range_end(&key), key, ..Default::default() };
        if self.chance(15) {
            // Everything, which is where order and limits show.
            (range.key, range.range_end) = (Bytes::from_static(b"\0"), Bytes::from_static(b"\0"));
        }
        if self.chance(40) {
            range.limit = self.pick(&[1, 2, 3, 5, 17, 18, 100, -1, i64::MIN, i64::MAX]);
        }
        if self.chance(if in_txn { 15 } else { 40 }) {
            range.revision = self.revision(known);
        }
        if self.chance(40) {
            range.sort_order = self.rng.random_range(0..3);
            range.sort_target = self.rng.random_range(0..5);
        }
        range.serializable = self.chance(20);
        range.keys_only = self.chance(15);
        range.count_only = self.chance(15);
        for _ in 0..2 {
            if self.chance(12) {
                let bound = if self.chance(15) { -3 } else { self.rng.random_range(1..=known.revision.max(1)) };
                match self.rng.random_range(0..4) {
                    0 => range.min_mod_revision = bound,
                    1 => range.max_mod_revision = bound,
                    2 => range.min_create_revision = bound,
                    _ => range.max_create_revision = bound,
                }
            }
        }
        range
    }

    fn delete(&mut self) -> DeleteRangeRequest {
        let key = self.key();
        // Open ranges would leave the store empty most of the time.
        let range_end = if self.chance(60) { Bytes::new() } else { self.range_end(&key) };
        DeleteRangeRequest { key, range_end, prev_kv: self.chance(50) }
    }

    /// Compactions at the edges and in between, never at a poisoned revision.
    fn compact(&mut self, known: &Known) -> CompactionRequest {
        let mut revision = match self.rng.random_range(0..10) {
            0 => self.pick(&[0, -1, i64::MIN, i64::MAX]),
            1 => known.compacted,
            2 => known.revision + 1,
            3 => known.revision,
            _ => self.rng.random_range(known.compacted.max(0)..=known.revision.max(known.compacted)),
        };
        while known.poisoned.contains(&revision) {
            revision -= 1;
        }
        if revision == 0 && known.compacted < 0 {
            // Accepted, and from then on the reference answers HashKV(0) with the hash of nothing.
            revision = 1;
        }
        CompactionRequest { revision, physical: self.chance(50) }
    }

    fn grant(&mut self) -> Op {
        match self.rng.random_range(0..10) {
            0 => Op::GrantAndRevoke(LeaseGrantRequest { id: 0, ttl: LONG_TTL }),
            1 => Op::GrantAndRevoke(LeaseGrantRequest { id: 55, ttl: self.pick(&[0, 1, -5, i64::MIN]) }),
            2 => Op::Grant(LeaseGrantRequest { id: self.lease_id(), ttl: self.pick(&[9_000_000_001, i64::MAX]) }),
            3 => Op::Grant(LeaseGrantRequest { id: self.lease_id(), ttl: 9_000_000_000 }),
            _ => Op::Grant(LeaseGrantRequest { id: self.lease_id(), ttl: LONG_TTL + self.rng.random_range(0..1000) }),
        }
    }

    fn lease_id(&mut self) -> i64 {
        self.pick(&LEASES)
    }

    fn compare(&mut self, known: &Known) -> Compare {
        let key = self.key();
        let near = self.rng.random_range(0..=known.revision.max(1));
        let target = if self.chance(4) { 9 } else { self.rng.random_range(0..5) };
        let union = if self.chance(6) { self.rng.random_range(0..5) } else { target };
        let target_union = match union {
            0 => Some(TargetUnion::Version(self.rng.random_range(0..4))),
            1 => Some(TargetUnion::CreateRevision(near)),
            2 => Some(TargetUnion::ModRevision(near)),
            3 => Some(TargetUnion::Value(self.value())),
            4 => Some(TargetUnion::Lease(self.lease())),
            _ => None,
        };
        let range_end = if self.chance(80) { Bytes::new() } else { self.range_end(&key) };
        Compare { result: if self.chance(4) { 9 } else { self.rng.random_range(0..4) }, target, key, range_end, target_union }
    }

    fn txn(&mut self, known: &Known) -> TxnRequest {
        let mut txn = self.txn_level(known, 0);
        if self.chance(70) {
            // Most random Txns would only be told of their duplicate keys.
            let mut used = Vec::new();
            drop_overlaps(&mut txn, &mut used);
        }
        if self.chance(2) {
            // Around the limit of operations, on one level and below.
            let one =
                RequestOp { request: Some(Request::RequestRange(RangeRequest { key: Bytes::from_static(b"a"), ..Default::default() })) };
            let nested =
                RequestOp { request: Some(Request::RequestTxn(TxnRequest { success: vec![one.clone(); 3], ..Default::default() })) };
            let count = self.pick(&[124, 125, 126, 127, 128, 129, 200]);
            txn.success = vec![one; count];
            if self.chance(50) {
                txn.success.pop();
                txn.success.push(nested);
            }
        }
        if has_open_delete(&txn) {
            // With ignore_value or ignore_lease this kills the reference.
            clear_ignores(&mut txn);
        }
        txn
    }

    fn txn_level(&mut self, known: &Known, depth: u32) -> TxnRequest {
        let compares = self.pick(&[0, 0, 1, 1, 2, 3]);
        TxnRequest {
            compare: (0..compares).map(|_| self.compare(known)).collect(),
            success: self.ops(known, depth),
            failure: self.ops(known, depth),
        }
    }

    fn ops(&mut self, known: &Known, depth: u32) -> Vec<RequestOp> {
        let count = self.pick(&[0, 1, 1, 2, 3, 4]);
        (0..count)
            .map(|_| {
                let request = match self.rng.random_range(0..100) {
                    0..38 => Some(Request::RequestPut(self.put(true))),
                    38..63 => Some(Request::RequestRange(self.range(known, true))),
                    63..80 => Some(Request::RequestDeleteRange(self.delete())),
                    80..99 if depth < 3 => Some(Request::RequestTxn(self.txn_level(known, depth + 1))),
                    80..99 => Some(Request::RequestRange(self.range(known, true))),
                    _ => None,
                };
                RequestOp { request }
            })
            .collect()
    }

    fn watch(&mut self, known: &Known) -> WatchCreateRequest {
        let key = self.key();
        let mut range_end = self.range_end(&key);
        if self.chance(30) {
            range_end = Bytes::from_static(b"\0");
        }
        let start_revision = match self.rng.random_range(0..10) {
            0..4 => 0,
            4 => known.revision + self.rng.random_range(1..4),
            5 => known.compacted + self.rng.random_range(-2..=2),
            6 => self.pick(&[-1, i64::MIN, 1, 2]),
            _ => self.rng.random_range(known.compacted.max(1)..=known.revision.max(1)),
        };
        let filters = match self.rng.random_range(0..10) {
            0 => vec![0],
            1 => vec![1],
            2 => vec![0, 1],
            3 => vec![1, 1, 7],
            _ => vec![],
        };
        WatchCreateRequest {
            key,
            range_end,
            start_revision,
            filters,
            prev_kv: self.chance(50),
            progress_notify: self.chance(20),
            fragment: self.chance(20),
            watch_id: if self.chance(25) { self.pick(&[1, 2, 3, 5, 77, -1, i64::MIN]) } else { 0 },
        }
    }
}

/// The end of the range of all keys that begin with `key`; open if there is no such end.
pub fn prefix_end(key: &[u8]) -> Bytes {
    let mut end = key.to_vec();
    while let Some(last) = end.pop() {
        if last < 0xff {
            end.push(last + 1);
            return end.into();
        }
    }
    Bytes::from_static(b"\0")
}

/// Calls `f` for every operation of the Txn, of both branches, at every depth.
fn each_op(txn: &mut TxnRequest, f: &mut impl FnMut(&mut Request)) {
    for op in txn.success.iter_mut().chain(&mut txn.failure) {
        if let Some(request) = &mut op.request {
            f(request);
            if let Request::RequestTxn(nested) = request {
                each_op(nested, f);
            }
        }
    }
}

/// Whether the Txn deletes by a range that is open at its end.
pub fn has_open_delete(txn: &TxnRequest) -> bool {
    let mut found = false;
    each_op(&mut txn.clone(), &mut |op| found |= matches!(op, Request::RequestDeleteRange(d) if d.range_end.as_ref() == b"\0"));
    found
}

pub fn has_put(txn: &TxnRequest) -> bool {
    let mut found = false;
    each_op(&mut txn.clone(), &mut |op| found |= matches!(op, Request::RequestPut(_)));
    found
}

fn clear_ignores(txn: &mut TxnRequest) {
    each_op(txn, &mut |op| {
        if let Request::RequestPut(put) = op {
            (put.ignore_value, put.ignore_lease) = (false, false);
        }
    });
}

/// Turns writes of a key that an earlier operation writes into reads.
fn drop_overlaps(txn: &mut TxnRequest, used: &mut Vec<(Bytes, Bytes)>) {
    let hits = |used: &[(Bytes, Bytes)], key: &Bytes, end: &Bytes| {
        let end = if end.is_empty() { [key.as_ref(), b"\0"].concat().into() } else { end.clone() };
        let open = end.as_ref() == b"\0";
        used.iter().any(|(k, e)| (open || *k < end) && (e.as_ref() == b"\0" || key < e))
    };
    each_op(txn, &mut |op| {
        let (key, end) = match op {
            Request::RequestPut(p) => (p.key.clone(), Bytes::new()),
            Request::RequestDeleteRange(d) => (d.key.clone(), d.range_end.clone()),
            _ => return,
        };
        if hits(used, &key, &end) {
            *op = Request::RequestRange(RangeRequest { key, ..Default::default() });
        } else {
            let end = if end.is_empty() { [key.as_ref(), b"\0"].concat().into() } else { end };
            used.push((key, end));
        }
    });
}
