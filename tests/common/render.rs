//! A printed form of every answer, with all its fields, for comparing two members and for reading the difference.
//!
//! What two members need not have in common is left out, and only that: ids of cluster and member (only whether they
//! are set), the Raft term (the same), and sizes and Raft indexes. Where etcd itself gives no order (the keys and the
//! list of leases) the printed form is sorted.

use std::fmt::Write;

use super::pb::{self, Event, KeyValue};

/// Longer values are printed by length and checksum.
const LONG: usize = 80;

pub fn bytes(b: &[u8]) -> String {
    if b.len() > LONG { format!("<{} bytes, crc {:08x}>", b.len(), crc32c::crc32c(b)) } else { format!("\"{}\"", b.escape_ascii()) }
}

pub fn header(h: &Option<pb::ResponseHeader>) -> String {
    let Some(h) = h else { return "no header".into() };
    let set = |x: u64| if x == 0 { "unset" } else { "set" };
    format!("rev={} cluster={} member={} term={}", h.revision, set(h.cluster_id), set(h.member_id), set(h.raft_term))
}

/// The header inside an answer of a Txn: etcd fills in the revision only.
fn inner_header(h: &Option<pb::ResponseHeader>) -> String {
    header(h)
}

pub fn kv(kv: &KeyValue) -> String {
    let KeyValue { key, create_revision, mod_revision, version, value, lease } = kv;
    format!("{}={} create={create_revision} mod={mod_revision} version={version} lease={lease:x}", bytes(key), bytes(value))
}

fn wire(kv_: &pb::WireKv) -> String {
    kv(&pb::kv(kv_))
}

fn optional(kv_: &Option<pb::WireKv>) -> String {
    kv_.as_ref().map_or("none".into(), wire)
}

pub fn event(e: &Event) -> String {
    let kind = match e.r#type {
        0 => "PUT".to_owned(),
        1 => "DELETE".to_owned(),
        n => format!("type {n}"),
    };
    format!("{kind} {} prev: {}", optional(&e.kv), optional(&e.prev_kv))
}

pub fn put(r: &pb::PutResponse) -> String {
    format!("PUT {}; prev: {}", header(&r.header), optional(&r.prev_kv))
}

/// etcd sorts with an algorithm that keeps the order of equal elements only up to this many of them.
const STABLE_SORT: usize = 12;

pub fn range(r: &pb::RangeResponse, asked: &pb::RangeRequest) -> String {
    let mut out = format!("RANGE {}; count={} more={}", header(&r.header), r.count, r.more);
    let mut kvs: Vec<KeyValue> = r.kvs.iter().map(pb::kv).collect();
    let unstable = asked.sort_target != 0 && r.count > STABLE_SORT as i64;
    if unstable {
        // Which of several equal elements comes first is etcd's secret; everything else about the order still counts.
        let by = |k: &KeyValue| match asked.sort_target {
            1 => k.version.to_be_bytes().to_vec(),
            2 => k.create_revision.to_be_bytes().to_vec(),
            3 => k.mod_revision.to_be_bytes().to_vec(),
            _ => k.value.to_vec(),
        };
        // With a limit, even which of the last equals are there; with keys_only there is no value to see ties by.
        let blind = asked.keys_only && asked.sort_target == 4;
        let last = kvs.last().map(&by);
        let cut = kvs.iter().position(|k| r.more && (blind || Some(by(k)) == last)).unwrap_or(kvs.len());
        for k in &kvs[cut..] {
            let _ = write!(out, "\n  one of those with {}", if blind { "any value".into() } else { bytes(&by(k)) });
        }
        kvs.truncate(cut);
        if blind {
            kvs.sort_by(|a, b| a.key.cmp(&b.key));
        } else {
            kvs.chunk_by_mut(|a, b| by(a) == by(b)).for_each(|ties| ties.sort_by(|a, b| a.key.cmp(&b.key)));
        }
    }
    for k in &kvs {
        let _ = write!(out, "\n  {}", kv(k));
    }
    out
}

pub fn delete(r: &pb::DeleteRangeResponse) -> String {
    let mut out = format!("DELETE {}; deleted={}", header(&r.header), r.deleted);
    for k in &r.prev_kvs {
        let _ = write!(out, "\n  prev {}", wire(k));
    }
    out
}

pub fn txn(r: &pb::TxnResponse, asked: &pb::TxnRequest) -> String {
    use pb::request_op::Request;
    use pb::response_op::Response;
    let mut out = format!("TXN {}; succeeded={}", header(&r.header), r.succeeded);
    let branch = if r.succeeded { &asked.success } else { &asked.failure };
    if branch.len() != r.responses.len() {
        let _ = write!(out, "; {} operations, {} answers", branch.len(), r.responses.len());
    }
    for (i, answer) in r.responses.iter().enumerate() {
        let op = branch.get(i).and_then(|op| op.request.as_ref());
        let text = match (&answer.response, op) {
            (None, _) => "nothing".into(),
            (Some(Response::ResponseRange(r)), Some(Request::RequestRange(q))) => range(r, q),
            (Some(Response::ResponsePut(r)), _) => put(r),
            (Some(Response::ResponseDeleteRange(r)), _) => delete(r),
            (Some(Response::ResponseTxn(r)), Some(Request::RequestTxn(q))) => txn(r, q),
            _ => "an answer of the wrong kind".into(),
        };
        let _ = write!(out, "\n  - {}", text.replace('\n', "\n    "));
    }
    out
}

pub fn compact(r: &pb::CompactionResponse) -> String {
    format!("COMPACT {}", header(&r.header))
}

/// With `own_id`, the id was asked for and must be the one given; without, it only has to be positive.
pub fn grant(r: &pb::LeaseGrantResponse, own_id: bool) -> String {
    let id = match (own_id, r.id > 0) {
        (true, _) => format!("{:x}", r.id),
        (false, true) => "random".into(),
        (false, false) => format!("bad {:x}", r.id),
    };
    format!("GRANT {}; id={id} ttl={} error={:?}", header(&r.header), r.ttl, r.error)
}

pub fn revoke(r: &pb::LeaseRevokeResponse) -> String {
    format!("REVOKE {}", header(&r.header))
}

/// The time left is printed as `full` within [`TTL_TOLERANCE`] of the granted one: the two members were not asked at the
/// same instant.
pub fn ttl(r: &pb::LeaseTimeToLiveResponse) -> String {
    const TTL_TOLERANCE: i64 = 60;
    let left = match r.granted_ttl - r.ttl {
        _ if r.granted_ttl == 0 => r.ttl.to_string(),
        0..=TTL_TOLERANCE => "full".into(),
        _ => r.ttl.to_string(),
    };
    let mut keys: Vec<_> = r.keys.iter().map(|k| bytes(k)).collect();
    keys.sort();
    format!("TTL {}; id={:x} ttl={left} granted={} keys=[{}]", header(&r.header), r.id, r.granted_ttl, keys.join(" "))
}

pub fn leases(r: &pb::LeaseLeasesResponse) -> String {
    let mut ids: Vec<_> = r.leases.iter().map(|l| l.id).collect();
    ids.sort();
    format!("LEASES {}; {ids:x?}", header(&r.header))
}

pub fn keep_alive(r: &pb::LeaseKeepAliveResponse) -> String {
    format!("KEEPALIVE {}; id={:x} ttl={}", header(&r.header), r.id, r.ttl)
}

pub fn hash_kv(r: &pb::HashKvResponse) -> String {
    format!("HASHKV {}; hash={:08x} compact_revision={}", header(&r.header), r.hash, r.compact_revision)
}

pub fn members(r: &pb::MemberListResponse, name: &str) -> String {
    let mut out = format!("MEMBERS {}", header(&r.header));
    for m in &r.members {
        let own = if m.name == name { "own" } else { &m.name };
        let id = if m.id == 0 { "unset" } else { "set" };
        let urls = (m.peer_urls.len(), m.client_urls.len());
        let _ = write!(out, "\n  id={id} name={own} learner={} urls={urls:?}", m.is_learner);
    }
    out
}

pub fn alarm(r: &pb::AlarmResponse) -> String {
    let mut list: Vec<_> = r.alarms.iter().map(|a| (a.member_id != 0, a.alarm)).collect();
    list.sort();
    format!("ALARMS {}; {list:?}", header(&r.header))
}

pub fn error(s: &tonic::Status) -> String {
    format!("ERROR {:?} ({}): {}", s.code(), s.code() as i32, s.message())
}

/// An answer or an error, whichever it was.
pub fn outcome<T>(r: Result<tonic::Response<T>, tonic::Status>, print: impl FnOnce(&T) -> String) -> String {
    match r {
        Ok(r) => print(r.get_ref()),
        Err(s) => error(&s),
    }
}

/// Everything of an answer of a watch stream but the events and the header's revision, which depends on the moment.
pub fn watch_control(r: &pb::WatchResponse) -> String {
    let pb::WatchResponse { watch_id, created, canceled, compact_revision, cancel_reason, fragment, .. } = r;
    format!(
        "id={watch_id} created={created} canceled={canceled} compact_revision={compact_revision} fragment={fragment} reason={cancel_reason:?}"
    )
}

/// The whole answer, for messages.
pub fn watch(r: &pb::WatchResponse) -> String {
    let mut out = format!("WATCH {}; {}", header(&r.header), watch_control(r));
    for e in &r.events {
        let _ = write!(out, "\n  {}", event(e));
    }
    out
}
