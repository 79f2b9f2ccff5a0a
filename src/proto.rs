//! The messages: etcd's packages as Rust types, and ours for the log.
//!
//! Everything here but this file's own code is generated at build time from `proto/**/*.proto` (see `proto/build.rs`).
//! Package, message and field names, numbers and types are etcd's v3.7; keys and values are [`Bytes`], so decoding a
//! request shares the buffer it came in instead of copying. Enum fields are plain `i32` as the wire has them: a client may
//! send any number, so compare with `Enum::try_from` and refuse what is unknown.
//!
//! # A key-value pair is encoded once
//!
//! `mvccpb.KeyValue` is two types. [`KeyValue`] is the plain struct. [`EncodedKv`] stands in every generated message where
//! etcd has a `KeyValue`, and holds the *encoded* pair: the same bytes that the history keeps on disk. To answer a range of
//! a thousand keys is to copy a thousand byte strings; nothing is taken apart and put together again.
//!
//! ```
//! use prost::Message;
//! use quorate::proto::etcdserverpb::RangeResponse;
//! use quorate::proto::{EncodedKv, KeyValue};
//!
//! let kv = KeyValue { key: "k".into(), create_revision: 2, mod_revision: 2, version: 1, value: "v".into(), lease: 0 };
//! let stored = EncodedKv::encode(&kv); // once, by the writer
//! let answer = RangeResponse { kvs: vec![stored.clone()], count: 1, ..Default::default() };
//!
//! let received = RangeResponse::decode(answer.encode_to_vec().as_slice())?; // by a client
//! assert_eq!(received.kvs[0], stored);
//! assert_eq!(received.kvs[0].decode()?, kv);
//! # Ok::<(), prost::DecodeError>(())
//! ```
//!
//! # Invariants
//!
//! - *Canonical*: what [`EncodedKv::encode`] makes, and what decoding a message makes, has its fields in ascending order and
//!   leaves defaults out, which is byte for byte what etcd writes. Fields we do not know follow at the end, as received.
//! - Decoding takes time and memory in proportion to the message, whatever order or number of fields a peer sends.
//! - Decoding foreign bytes gives a value or a [`DecodeError`], never a panic.
//!
//! # Caveats
//!
//! - [`EncodedKv::from_encoded`] believes its caller: bytes that are no `KeyValue` go to the wire as they are, and only
//!   [`decode`](EncodedKv::decode) and [`view`](EncodedKv::view) find out.
//! - A small `Bytes` cut out of a large buffer keeps the whole buffer alive. What is kept for long must be copied out.

use std::fmt;
use std::hash::{Hash, Hasher};
use std::mem;

use bytes::{Buf, BufMut, Bytes};
use prost::encoding::{DecodeContext, WireType, check_wire_type, decode_key, decode_varint, skip_field};
use prost::{DecodeError, Message};

/// The key space, leases, members, maintenance and users: nearly all of etcd's API.
#[allow(missing_docs, clippy::all, clippy::pedantic)]
pub mod etcdserverpb {
    tonic::include_proto!("etcdserverpb");
}

/// Events. Their key-value pairs are [`EncodedKv`].
#[allow(missing_docs, clippy::all, clippy::pedantic)]
pub mod mvccpb {
    tonic::include_proto!("mvccpb");
}

/// Users, roles and permissions as they are stored.
#[allow(missing_docs, clippy::all, clippy::pedantic)]
pub mod authpb {
    tonic::include_proto!("authpb");
}

/// The lock service.
#[allow(missing_docs, clippy::all, clippy::pedantic)]
pub mod v3lockpb {
    tonic::include_proto!("v3lockpb");
}

/// The election service.
#[allow(missing_docs, clippy::all, clippy::pedantic)]
pub mod v3electionpb {
    tonic::include_proto!("v3electionpb");
}

// Generated code names other packages by their position in this tree (`super::super::etcdserverpb`), so a package with
// dots needs as many modules; the outer ones are of no use to anybody else.
mod grpc {
    pub mod health {
        #[allow(missing_docs, clippy::all, clippy::pedantic)]
        pub mod v1 {
            tonic::include_proto!("grpc.health.v1");
        }
    }
}
mod quorate {
    #[allow(missing_docs, clippy::all, clippy::pedantic)]
    pub mod founding {
        tonic::include_proto!("quorate.founding");
    }
    #[allow(missing_docs, clippy::all, clippy::pedantic)]
    pub mod internal {
        tonic::include_proto!("quorate.internal");
    }
    #[allow(missing_docs, clippy::all, clippy::pedantic)]
    pub mod peer {
        tonic::include_proto!("quorate.peer");
    }
}

#[doc(inline)]
pub use self::grpc::health::v1 as health;
#[doc(inline)]
pub use self::quorate::founding;
#[doc(inline)]
pub use self::quorate::internal;
#[doc(inline)]
pub use self::quorate::peer;

/// The public packages as an encoded `google.protobuf.FileDescriptorSet`, imports included and comments left out: what
/// server reflection serves.
pub const FILE_DESCRIPTOR_SET: &[u8] = tonic::include_file_descriptor_set!("quorate_descriptor");

/// One version of one key, taken apart. `proto/mvccpb/kv.proto` describes the message.
///
/// A tombstone has only `key` and `mod_revision`.
#[derive(Clone, PartialEq, Eq, Hash, prost::Message)]
pub struct KeyValue {
    /// The key; never empty in the store.
    #[prost(bytes = "bytes", tag = "1")]
    pub key: Bytes,
    /// Revision of the put that created the key.
    #[prost(int64, tag = "2")]
    pub create_revision: i64,
    /// Revision of the write that made this version.
    #[prost(int64, tag = "3")]
    pub mod_revision: i64,
    /// Number of puts since the key was created, this one included.
    #[prost(int64, tag = "4")]
    pub version: i64,
    /// The value; may be empty.
    #[prost(bytes = "bytes", tag = "5")]
    pub value: Bytes,
    /// The lease attached, or 0.
    #[prost(int64, tag = "6")]
    pub lease: i64,
}

/// A [`KeyValue`] that borrows its bytes: what [`EncodedKv::view`] gives. Fields mean the same.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct KeyValueRef<'a> {
    /// The key.
    pub key: &'a [u8],
    /// Revision of the put that created the key.
    pub create_revision: i64,
    /// Revision of the write that made this version.
    pub mod_revision: i64,
    /// Number of puts since the key was created, this one included.
    pub version: i64,
    /// The value.
    pub value: &'a [u8],
    /// The lease attached, or 0.
    pub lease: i64,
}

/// An encoded `mvccpb.KeyValue`, in the place of that message in every generated type.
///
/// It writes its bytes to the wire as they are. A clone of one that was made by [`encode`](Self::encode) or
/// [`from_encoded`](Self::from_encoded) costs a reference count.
///
/// Two are equal when they write the same bytes.
///
/// ```
/// use quorate::proto::{EncodedKv, KeyValue};
///
/// let kv = EncodedKv::encode(&KeyValue { key: "k".into(), mod_revision: 7, ..Default::default() });
/// assert_eq!(&kv.to_bytes()[..], b"\x0a\x01k\x18\x07"); // field 1: one byte, "k"; field 3: 7
/// ```
#[derive(Clone, Default)]
pub struct EncodedKv {
    form: Form,
}

/// Bytes that come from the wire arrive field by field. To add each to an encoding would mean to search it for an earlier
/// one of the same number and shift what follows, again and again; so they are collected apart and encoded when needed.
#[derive(Clone)]
enum Form {
    /// As stored.
    Encoded(Bytes),
    /// As received. Boxed, so that the stored form, of which answers hold thousands, stays at four words.
    Received(Box<Received>),
}

impl Default for Form {
    fn default() -> Self {
        Self::Encoded(Bytes::new())
    }
}

#[derive(Clone, Default)]
struct Received {
    known: KeyValue,
    /// Fields with numbers we do not know, key and all, one after the other. Never longer than the message they came in.
    unknown: Vec<u8>,
}

impl Received {
    fn parse(mut bytes: Bytes, ctx: DecodeContext) -> Result<Self, DecodeError> {
        let mut received = Self::default();
        while bytes.has_remaining() {
            let (tag, wire_type) = decode_key(&mut bytes)?;
            received.merge_field(tag, wire_type, &mut bytes, ctx.clone())?;
        }
        Ok(received)
    }

    fn merge_field(&mut self, tag: u32, wire_type: WireType, buf: &mut impl Buf, ctx: DecodeContext) -> Result<(), DecodeError> {
        match tag {
            1..=6 => self.known.merge_field(tag, wire_type, buf, ctx),
            _ => {
                prost::encoding::encode_key(tag, wire_type, &mut self.unknown);
                skip_field(wire_type, tag, &mut Recorder { from: buf, to: &mut self.unknown }, ctx)
            }
        }
    }

    fn encoded_len(&self) -> usize {
        self.known.encoded_len() + self.unknown.len()
    }

    fn encode_raw(&self, buf: &mut impl BufMut) {
        self.known.encode_raw(buf);
        buf.put_slice(&self.unknown);
    }
}

/// Reads from one buffer and notes down all that is read, so that `skip_field` becomes "keep field".
struct Recorder<'a, B> {
    from: &'a mut B,
    to: &'a mut Vec<u8>,
}

impl<B: Buf> Buf for Recorder<'_, B> {
    fn remaining(&self) -> usize {
        self.from.remaining()
    }

    fn chunk(&self) -> &[u8] {
        self.from.chunk()
    }

    fn advance(&mut self, count: usize) {
        self.to.put((&mut *self.from).take(count));
    }
}

impl EncodedKv {
    /// Encodes a pair: fields in ascending order, defaults left out. The buffer is exactly as long as the encoding.
    pub fn encode(kv: &KeyValue) -> Self {
        Self::from_encoded(kv.encode_to_vec().into())
    }

    /// Takes bytes that [`to_bytes`](Self::to_bytes) gave, such as a record of the history. They are not looked at.
    pub fn from_encoded(bytes: Bytes) -> Self {
        Self { form: Form::Encoded(bytes) }
    }

    /// The encoded pair. Free for what was stored; encodes what was received from the wire.
    pub fn to_bytes(&self) -> Bytes {
        match &self.form {
            Form::Encoded(bytes) => bytes.clone(),
            Form::Received(_) => self.encode_to_vec().into(),
        }
    }

    /// Takes the pair apart. Key and value share the bytes of `self`; unknown fields are dropped.
    ///
    /// # Errors
    /// The bytes given to [`from_encoded`](Self::from_encoded) are no `mvccpb.KeyValue`. Never for one that was decoded
    /// from the wire.
    pub fn decode(&self) -> Result<KeyValue, DecodeError> {
        match &self.form {
            Form::Encoded(bytes) => KeyValue::decode(bytes.clone()),
            Form::Received(received) => Ok(received.known.clone()),
        }
    }

    /// Looks at the pair without taking it apart: as [`decode`](Self::decode), but allocates and counts nothing. Time does
    /// not depend on the length of key and value.
    ///
    /// # Errors
    /// As [`decode`](Self::decode).
    ///
    /// ```
    /// use quorate::proto::{EncodedKv, KeyValue};
    ///
    /// let kv = EncodedKv::encode(&KeyValue { key: "k".into(), lease: 7, ..Default::default() });
    /// assert_eq!(kv.view()?.lease, 7);
    /// # Ok::<(), prost::DecodeError>(())
    /// ```
    pub fn view(&self) -> Result<KeyValueRef<'_>, DecodeError> {
        match &self.form {
            Form::Encoded(bytes) => KeyValueRef::parse(bytes),
            Form::Received(received) => Ok(received.known.view()),
        }
    }
}

/// The key of an encoded pair of which only the beginning is at hand; `None` when the key is not wholly in it.
pub(crate) fn leading_key(head: &Bytes) -> Option<Bytes> {
    let mut rest = head.as_ref();
    let (1, WireType::LengthDelimited) = decode_key(&mut rest).ok()? else { return None };
    let length = usize::try_from(decode_varint(&mut rest).ok()?).ok()?;
    rest.get(..length).map(|key| head.slice_ref(key))
}

impl KeyValue {
    fn view(&self) -> KeyValueRef<'_> {
        KeyValueRef {
            key: &self.key,
            create_revision: self.create_revision,
            mod_revision: self.mod_revision,
            version: self.version,
            value: &self.value,
            lease: self.lease,
        }
    }
}

impl<'a> KeyValueRef<'a> {
    fn parse(mut rest: &'a [u8]) -> Result<Self, DecodeError> {
        let mut kv = Self::default();
        while !rest.is_empty() {
            let (tag, wire_type) = decode_key(&mut rest)?;
            match tag {
                1 => kv.key = take_bytes(wire_type, tag, &mut rest)?,
                2 => kv.create_revision = take_int64(wire_type, &mut rest)?,
                3 => kv.mod_revision = take_int64(wire_type, &mut rest)?,
                4 => kv.version = take_int64(wire_type, &mut rest)?,
                5 => kv.value = take_bytes(wire_type, tag, &mut rest)?,
                6 => kv.lease = take_int64(wire_type, &mut rest)?,
                _ => skip_field(wire_type, tag, &mut rest, DecodeContext::default())?,
            }
        }
        Ok(kv)
    }
}

fn take_int64(wire_type: WireType, rest: &mut &[u8]) -> Result<i64, DecodeError> {
    check_wire_type(WireType::Varint, wire_type)?;
    decode_varint(rest).map(|number| number as i64)
}

fn take_bytes<'a>(wire_type: WireType, tag: u32, rest: &mut &'a [u8]) -> Result<&'a [u8], DecodeError> {
    check_wire_type(WireType::LengthDelimited, wire_type)?;
    // prost makes the errors and checks the length; the field is then what lies between the length and the next field.
    let mut field = *rest;
    skip_field(wire_type, tag, rest, DecodeContext::default())?;
    let length = decode_varint(&mut field)? as usize;
    Ok(field.get(..length).unwrap_or_default())
}

impl Message for EncodedKv {
    fn encode_raw(&self, buf: &mut impl BufMut) {
        match &self.form {
            Form::Encoded(bytes) => buf.put_slice(bytes),
            Form::Received(received) => received.encode_raw(buf),
        }
    }

    fn merge_field(&mut self, tag: u32, wire_type: WireType, buf: &mut impl Buf, ctx: DecodeContext) -> Result<(), DecodeError> {
        // After an error the value is empty; prost promises nothing about it either.
        let mut received = match mem::take(&mut self.form) {
            Form::Encoded(bytes) => Box::new(Received::parse(bytes, ctx.clone())?),
            Form::Received(received) => received,
        };
        received.merge_field(tag, wire_type, buf, ctx)?;
        self.form = Form::Received(received);
        Ok(())
    }

    fn encoded_len(&self) -> usize {
        match &self.form {
            Form::Encoded(bytes) => bytes.len(),
            Form::Received(received) => received.encoded_len(),
        }
    }

    fn clear(&mut self) {
        *self = Self::default();
    }
}

impl PartialEq for EncodedKv {
    fn eq(&self, other: &Self) -> bool {
        self.to_bytes() == other.to_bytes()
    }
}

impl Eq for EncodedKv {}

impl Hash for EncodedKv {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.to_bytes().hash(state);
    }
}

impl fmt::Debug for EncodedKv {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.decode() {
            Ok(kv) => kv.fmt(f),
            Err(error) => write!(f, "EncodedKv({} bytes that are no KeyValue: {error})", self.encoded_len()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;
    use prost::encoding::{encode_key, encode_varint};

    use super::etcdserverpb::{PutResponse, RangeResponse};
    use super::*;

    /// etcd's methods: packages and services with their methods; a star marks a stream, on the client's or server's side.
    const METHODS: &str = "
        etcdserverpb.KV: Range RangeStream* Put DeleteRange Txn Compact
        etcdserverpb.Watch: *Watch*
        etcdserverpb.Lease: LeaseGrant LeaseRevoke *LeaseKeepAlive* LeaseTimeToLive LeaseLeases
        etcdserverpb.Cluster: MemberAdd MemberRemove MemberUpdate MemberList MemberPromote
        etcdserverpb.Maintenance: Alarm Status Defragment Hash HashKV Snapshot* MoveLeader Downgrade
        etcdserverpb.Auth: AuthEnable AuthDisable AuthStatus Authenticate UserAdd UserGet UserList UserDelete UserChangePassword \
            UserGrantRole UserRevokeRole RoleAdd RoleGet RoleList RoleDelete RoleGrantPermission RoleRevokePermission
        v3lockpb.Lock: Lock Unlock
        v3electionpb.Election: Campaign Proclaim Leader Observe* Resign
        grpc.health.v1.Health: Check List Watch*
    ";

    #[test]
    fn the_descriptor_holds_every_method() {
        let set = prost_types::FileDescriptorSet::decode(FILE_DESCRIPTOR_SET).unwrap();
        let mut found = BTreeSet::new();
        for file in &set.file {
            for service in &file.service {
                for method in &service.method {
                    let star = |streams: bool| if streams { "*" } else { "" };
                    let (client, server) = (star(method.client_streaming()), star(method.server_streaming()));
                    found.insert(format!("{}.{}: {client}{}{server}", file.package(), service.name(), method.name()));
                }
            }
        }
        let mut expected = BTreeSet::new();
        for line in METHODS.lines().filter(|line| !line.trim().is_empty()) {
            let (service, methods) = line.trim().split_once(": ").unwrap();
            expected.extend(methods.split_whitespace().map(|method| format!("{service}: {method}")));
        }
        assert_eq!(found, expected);
        assert_eq!(found.iter().filter(|method| !method.starts_with("grpc.")).count(), 49, "methods of etcd");
    }

    #[test]
    fn the_descriptor_keeps_private_packages_and_comments_to_itself() {
        let set = prost_types::FileDescriptorSet::decode(FILE_DESCRIPTOR_SET).unwrap();
        assert!(set.file.iter().all(|file| !file.package().starts_with("quorate") && file.source_code_info.is_none()));
        let names = set.file.iter().flat_map(|file| &file.message_type).flat_map(|message| &message.field).map(|field| field.name());
        assert_eq!(names.filter(|name| *name == "peerURLs").count(), 3, "etcd's spelling, whatever the Rust field is called");
    }

    #[test]
    fn reflection_takes_the_descriptor() {
        let builder = tonic_reflection::server::Builder::configure().register_encoded_file_descriptor_set(FILE_DESCRIPTOR_SET);
        assert!(builder.build_v1().is_ok());
    }

    #[test]
    fn encoding_by_hand() {
        let kv = KeyValue { key: "foo".into(), create_revision: 2, mod_revision: 300, version: 5, value: "bar".into(), lease: 0x1234 };
        let bytes = b"\x0a\x03foo\x10\x02\x18\xac\x02\x20\x05\x2a\x03bar\x30\xb4\x24";
        assert_eq!(&EncodedKv::encode(&kv).to_bytes()[..], bytes);
        // A negative number takes ten bytes; defaults take none.
        let odd = KeyValue { version: -1, ..Default::default() };
        assert_eq!(&EncodedKv::encode(&odd).to_bytes()[..], b"\x20\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01");
        assert!(EncodedKv::encode(&KeyValue::default()).to_bytes().is_empty());
    }

    #[test]
    fn stored_bytes_go_out_as_they_are() {
        // Out of order, a default written out, a field twice: not what we would write, but not ours to change.
        let bytes = Bytes::from_static(b"\x20\x00\x0a\x01b\x0a\x01a\x7a\x01x");
        let kv = EncodedKv::from_encoded(bytes.clone());
        assert_eq!(PutResponse { header: None, prev_kv: Some(kv.clone()) }.encode_to_vec(), [b"\x12\x0b", &bytes[..]].concat());
        assert_eq!((kv.view().unwrap().key, &kv.decode().unwrap().key[..]), (&b"a"[..], &b"a"[..]));
        // From the wire the same bytes come in order, with the unknown field last.
        assert_eq!(&received(&bytes).unwrap().to_bytes()[..], b"\x0a\x01a\x7a\x01x");
    }

    #[test]
    fn decoding_shares_bytes() {
        let kv = EncodedKv::encode(&KeyValue { key: "key".into(), value: "value".into(), ..Default::default() });
        let (bytes, plain) = (kv.to_bytes(), kv.decode().unwrap());
        assert!(bytes.as_ptr_range().contains(&plain.key.as_ptr()) && bytes.as_ptr_range().contains(&plain.value.as_ptr()));
        let wire = Bytes::from(PutResponse { header: None, prev_kv: Some(kv) }.encode_to_vec());
        let plain = PutResponse::decode(wire.clone()).unwrap().prev_kv.unwrap().decode().unwrap();
        assert!(wire.as_ptr_range().contains(&plain.value.as_ptr()));
    }

    #[test]
    fn merging_keeps_what_was_there() {
        let mut kv = EncodedKv::from_encoded(Bytes::from_static(b"\x0a\x01a\x10\x02\x7a\x01x"));
        kv.merge(&b"\x10\x03\x18\x04"[..]).unwrap();
        assert_eq!(&kv.to_bytes()[..], b"\x0a\x01a\x10\x03\x18\x04\x7a\x01x");
        kv.clear();
        assert_eq!(kv, EncodedKv::default());
        // A singular message that comes twice is merged, as protobuf wants it.
        let twice = PutResponse::decode(&b"\x12\x03\x0a\x01a\x12\x02\x10\x02"[..]).unwrap().prev_kv.unwrap();
        assert_eq!(&twice.to_bytes()[..], b"\x0a\x01a\x10\x02");
    }

    #[test]
    fn damage_is_an_error() {
        for bytes in [
            &b"\x0a"[..],                                     // no length
            b"\x0a\x05abc",                                   // too short
            b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01a", // a length near 2^64
            b"\x0d\x00\x00\x00\x00",                          // a key that is a fixed32
            b"\x12\x01a",                                     // a revision that is a string
            b"\x10\xff\xff\xff\xff\xff\xff\xff\xff\xff\x7f",  // a number beyond 64 bits
            b"\x00\x01",                                      // field number 0
            b"\x7b\x08\x01",                                  // a group without an end
            b"\x7c",                                          // an end without a group
            b"\x7e",                                          // no such wire type
        ] {
            let kv = EncodedKv::from_encoded(Bytes::from_static(bytes));
            assert!(kv.decode().is_err() && kv.view().is_err() && received(bytes).is_err(), "{bytes:?}");
            assert!(kv.clone().merge(&b"\x10\x01"[..]).is_err(), "{bytes:?}");
            assert!(format!("{kv:?}").contains("no KeyValue"), "{kv:?}");
        }
        // Groups within groups end at a fixed depth, before the stack does.
        assert!(received(&[0x7b; 100_000]).is_err());
    }

    /// Linear, not quadratic: a megabyte of value, then half a million more fields, would otherwise copy it as often.
    #[test]
    fn many_fields_cost_no_more_than_their_bytes() {
        let mut bytes = KeyValue { key: "k".into(), value: vec![7; 1 << 20].into(), ..Default::default() }.encode_to_vec();
        bytes.extend(b"\x10\x05\x78\x01".repeat(1 << 18));
        let kv = received(&bytes).unwrap();
        assert_eq!(kv.view().unwrap().create_revision, 5);
        assert_eq!(kv.encoded_len(), 3 + 2 + 4 + (1 << 20) + (2 << 18)); // key, revision, head of the value, value, unknown
    }

    fn wire(kv: &[u8]) -> Vec<u8> {
        let mut wire = vec![0x12];
        encode_varint(kv.len() as u64, &mut wire);
        [&wire, kv].concat()
    }

    /// What a client makes of an answer that holds these bytes as its only pair.
    fn received(kv: &[u8]) -> Result<EncodedKv, DecodeError> {
        let mut answer = RangeResponse::decode(wire(kv).as_slice())?;
        assert_eq!(answer.kvs.len(), 1);
        Ok(answer.kvs.remove(0))
    }

    /// The same with the buffer in two pieces, as it may come from the network.
    fn received_in_pieces(kv: &[u8], cut: usize) -> Result<EncodedKv, DecodeError> {
        let wire = wire(kv);
        let (head, tail) = wire.split_at(cut.min(wire.len()));
        Ok(RangeResponse::decode(head.chain(tail))?.kvs.remove(0))
    }

    fn some_bytes() -> impl Strategy<Value = Bytes> {
        prop::collection::vec(any::<u8>(), 0..200).prop_map(Bytes::from)
    }

    fn some_number() -> impl Strategy<Value = i64> {
        prop_oneof![Just(0), 1..300i64, any::<i64>()]
    }

    prop_compose! {
        fn some_kv()(key in some_bytes(), create_revision in some_number(), mod_revision in some_number(), version in some_number(),
            value in some_bytes(), lease in some_number()) -> KeyValue {
            KeyValue { key, create_revision, mod_revision, version, value, lease }
        }
    }

    /// A well-formed field with any number: the first six as a `KeyValue` has them, others of any kind.
    fn some_field() -> impl Strategy<Value = (u32, Vec<u8>)> {
        let number = |tag, number: i64| {
            let mut field = Vec::new();
            encode_key(tag, WireType::Varint, &mut field);
            encode_varint(number as u64, &mut field);
            (tag, field)
        };
        let bytes = |tag, bytes: &[u8]| {
            let mut field = Vec::new();
            encode_key(tag, WireType::LengthDelimited, &mut field);
            encode_varint(bytes.len() as u64, &mut field);
            (tag, [&field, bytes].concat())
        };
        let fixed = |tag, wire_type, bytes: &[u8]| {
            let mut field = Vec::new();
            encode_key(tag, wire_type, &mut field);
            (tag, [&field, bytes].concat())
        };
        let group = move |tag, inner: &[u8]| {
            let mut field = Vec::new();
            encode_key(tag, WireType::StartGroup, &mut field);
            field.extend(bytes(3, inner).1);
            encode_key(tag, WireType::EndGroup, &mut field);
            (tag, field)
        };
        let unknown = || 7..1u32 << 29;
        prop_oneof![
            (prop::sample::select(vec![1, 5]), some_bytes()).prop_map(move |(tag, value)| bytes(tag, &value)),
            (prop::sample::select(vec![2, 3, 4, 6]), some_number()).prop_map(move |(tag, value)| number(tag, value)),
            (unknown(), some_bytes()).prop_map(move |(tag, value)| bytes(tag, &value)),
            (unknown(), some_number()).prop_map(move |(tag, value)| number(tag, value)),
            (unknown(), any::<[u8; 4]>()).prop_map(move |(tag, value)| fixed(tag, WireType::ThirtyTwoBit, &value)),
            (unknown(), any::<[u8; 8]>()).prop_map(move |(tag, value)| fixed(tag, WireType::SixtyFourBit, &value)),
            (unknown(), some_bytes()).prop_map(move |(tag, value)| group(tag, &value)),
        ]
    }

    /// Whatever the bytes, the three ways to look at a pair agree, and nothing panics.
    fn check_any(bytes: &[u8], cut: usize) {
        let stored = EncodedKv::from_encoded(Bytes::copy_from_slice(bytes));
        let plain = KeyValue::decode(bytes).ok();
        assert_eq!(stored.decode().ok(), plain);
        assert_eq!(stored.view().ok(), plain.as_ref().map(KeyValue::view));
        assert!(!format!("{stored:?}").is_empty());
        assert_eq!(stored.to_bytes(), bytes);
        let arrived = received(bytes).ok();
        assert_eq!(arrived.as_ref().map(|kv| kv.decode().unwrap()), plain);
        assert_eq!(received_in_pieces(bytes, cut).ok(), arrived);
        if let Some(arrived) = arrived {
            assert_eq!(arrived.encoded_len(), arrived.to_bytes().len());
            // What arrived is canonical: to send it on and receive it again changes nothing.
            assert_eq!(received(&arrived.to_bytes()).unwrap(), arrived);
            assert_eq!(EncodedKv::from_encoded(arrived.to_bytes()), arrived);
        }
    }

    proptest! {
        #[test]
        fn round_trip(kvs in prop::collection::vec(some_kv(), 0..8)) {
            let encoded: Vec<_> = kvs.iter().map(EncodedKv::encode).collect();
            let answer = RangeResponse { kvs: encoded.clone(), count: kvs.len() as i64, ..Default::default() };
            let back = RangeResponse::decode(Bytes::from(answer.encode_to_vec())).unwrap();
            prop_assert_eq!(&back, &answer);
            prop_assert_eq!(back.encode_to_vec(), answer.encode_to_vec());
            for (kv, (sent, got)) in kvs.iter().zip(encoded.iter().zip(&back.kvs)) {
                prop_assert_eq!(sent.to_bytes(), kv.encode_to_vec());
                prop_assert_eq!(sent.to_bytes(), got.to_bytes());
                prop_assert_eq!(&got.decode().unwrap(), kv);
                prop_assert_eq!(got.view().unwrap(), kv.view());
                prop_assert_eq!(sent.view().unwrap(), kv.view());
                prop_assert_eq!(format!("{sent:?}"), format!("{got:?}"));
            }
        }

        #[test]
        fn any_order_and_number_of_fields(fields in prop::collection::vec(some_field(), 0..12), cut in 0usize..400) {
            let bytes: Vec<u8> = fields.iter().flat_map(|(_, field)| field.clone()).collect();
            let plain = KeyValue::decode(bytes.as_slice()).unwrap();
            let unknown = fields.iter().filter(|(tag, _)| *tag > 6).flat_map(|(_, field)| field.clone()).collect();
            let expected: Vec<u8> = [plain.encode_to_vec(), unknown].concat();
            prop_assert_eq!(received(&bytes).unwrap().to_bytes(), expected);
            check_any(&bytes, cut);
        }

        #[test]
        fn any_bytes(bytes in prop::collection::vec(any::<u8>(), 0..64), cut in 0usize..70) {
            check_any(&bytes, cut);
            let _ = RangeResponse::decode(bytes.as_slice());
            let _ = internal::Entry::decode(bytes.as_slice());
        }

        #[test]
        fn damaged_encodings(kv in some_kv(), at in any::<prop::sample::Index>(), byte in any::<u8>(), length in any::<prop::sample::Index>()) {
            let mut bytes = kv.encode_to_vec();
            prop_assume!(!bytes.is_empty());
            let at = at.index(bytes.len());
            bytes[at] = byte;
            check_any(&bytes, at);
            check_any(&bytes[..length.index(bytes.len())], at);
        }
    }
}
