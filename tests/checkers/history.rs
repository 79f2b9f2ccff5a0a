//! How a history is written down: requests, answers, and when each was sent and came.

use std::fmt;

pub type Key = String;

/// What a key holds. Values are numbers that no two requests have in common.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Item {
    pub value: u64,
    /// The revision that wrote it.
    pub modified: i64,
    /// The revision that wrote it first since it was not there.
    pub created: i64,
    /// How often it was written since then, with that.
    pub version: i64,
}

/// One key changed: put, or deleted.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Change {
    pub key: Key,
    /// None deletes.
    pub value: Option<u64>,
}

/// What is asked for: if the guard holds, all changes at one revision; and then, whether or not it held, the keys to read.
#[derive(Clone, PartialEq, Eq, Default)]
pub struct Request {
    /// The revision that wrote this key must be this one; 0: there is no such key.
    pub guard: Option<(Key, i64)>,
    /// No key stands twice here.
    pub writes: Vec<Change>,
    pub reads: Vec<Key>,
    /// Read all keys from the first up to but without the second. Nothing else is asked for then.
    pub span: Option<(Key, Key)>,
    /// Read what the store held at this revision; 0: what it holds. Nothing is written then.
    pub at: i64,
    /// Read what the member has, which may be old. Nothing is written then.
    pub serializable: bool,
    /// The lease that what is put is attached to; 0: none.
    pub lease: i64,
}

#[derive(Clone, PartialEq, Eq, Default)]
pub struct Answer {
    /// That of the changes, if there are any, or the one that was read at.
    pub revision: i64,
    /// Whether the guard held.
    pub applied: bool,
    /// Keys that were deleted.
    pub deleted: i64,
    /// What the keys to read hold, in their order.
    pub found: Vec<Option<Item>>,
    /// What there is in the span to read, in the order of keys.
    pub span: Vec<(Key, Item)>,
}

#[derive(Clone, PartialEq, Eq)]
pub enum Outcome {
    Answered {
        at: u64,
        answer: Answer,
    },
    /// It was said that nothing will be carried out.
    Refused,
    /// It may have been, or will be, or never.
    Unknown,
}

/// One operation of one client. Times are nanoseconds on one clock.
#[derive(Clone)]
pub struct Op {
    pub client: usize,
    /// The member that was asked.
    pub member: usize,
    /// How often that member had been started when it was asked.
    pub start: u32,
    pub call: u64,
    pub request: Request,
    pub outcome: Outcome,
}

impl Request {
    pub fn get(key: &str) -> Request {
        Request { reads: vec![key.into()], ..Request::default() }
    }

    pub fn put(key: &str, value: u64) -> Request {
        Request { writes: vec![Change { key: key.into(), value: Some(value) }], ..Request::default() }
    }

    pub fn delete(key: &str) -> Request {
        Request { writes: vec![Change { key: key.into(), value: None }], ..Request::default() }
    }

    /// Puts the key if this revision wrote what it holds, and reads it.
    pub fn swap(key: &str, modified: i64, value: u64) -> Request {
        Request { guard: Some((key.into(), modified)), reads: vec![key.into()], ..Request::put(key, value) }
    }

    /// All keys that the request names.
    pub fn keys(&self) -> impl Iterator<Item = &Key> {
        self.guard.iter().map(|(key, _)| key).chain(self.writes.iter().map(|write| &write.key)).chain(&self.reads)
    }

    /// A value that it writes, by which it is recognised.
    pub fn mark(&self) -> Option<u64> {
        self.writes.iter().find_map(|write| write.value)
    }
}

impl Op {
    pub fn answer(&self) -> Option<(u64, &Answer)> {
        match &self.outcome {
            Outcome::Answered { at, answer } => Some((*at, answer)),
            Outcome::Refused | Outcome::Unknown => None,
        }
    }
}

// One line each, as histories are long.

impl fmt::Debug for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some((key, modified)) = &self.guard {
            write!(f, "if {key}@{modified} ")?;
        }
        for write in &self.writes {
            match write.value {
                Some(value) => write!(f, "put {}={value} ", write.key)?,
                None => write!(f, "delete {} ", write.key)?,
            }
        }
        if self.lease != 0 {
            write!(f, "with lease {:x} ", self.lease)?;
        }
        for key in &self.reads {
            write!(f, "{} {key} ", if self.serializable { "peek" } else { "get" })?;
        }
        if let Some((from, to)) = &self.span {
            write!(f, "{} {from}..{to} ", if self.serializable { "peek" } else { "get" })?;
        }
        if self.at != 0 {
            write!(f, "at {} ", self.at)?;
        }
        Ok(())
    }
}

impl fmt::Debug for Answer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "revision {}", self.revision)?;
        if !self.applied {
            write!(f, ", guard did not hold")?;
        }
        if self.deleted != 0 {
            write!(f, ", deleted {}", self.deleted)?;
        }
        for item in &self.found {
            match item {
                Some(item) => write!(f, ", {}@{}", item.value, item.modified)?,
                None => write!(f, ", nothing")?,
            }
        }
        for (key, item) in &self.span {
            write!(f, ", {key}={}@{}", item.value, item.modified)?;
        }
        Ok(())
    }
}

impl fmt::Debug for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ms = |time: u64| time as f64 / 1e6;
        write!(f, "{:10.3} ", ms(self.call))?;
        match &self.outcome {
            Outcome::Answered { at, .. } => write!(f, "{:10.3}", ms(*at))?,
            Outcome::Refused | Outcome::Unknown => write!(f, "{:>10}", "-")?,
        }
        write!(f, " client {} member {} start {}: {:?}-> ", self.client, self.member, self.start, self.request)?;
        match &self.outcome {
            Outcome::Answered { answer, .. } => write!(f, "{answer:?}"),
            Outcome::Refused => write!(f, "refused"),
            Outcome::Unknown => write!(f, "unknown"),
        }
    }
}
