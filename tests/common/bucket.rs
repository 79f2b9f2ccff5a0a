//! A tiny object store on loopback, as far as S3's clients need one: objects, ranges, listings in pages, uploads in parts. It can be told
//! to be away, to hang, to lose connections, and to damage what it is given.
//!
//! ```no_run
//! let store = Store::start();
//! let mut config = BackupConfig::new(store.url());
//! config.store_options = StoreOptions::new(store.options());
//! store.set(Fault::Hang);
//! ```

#![allow(dead_code)]

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

pub const KEY: &str = "a-key";
pub const SECRET: &str = "hunter2-never-shown";

/// Objects in one page of a listing.
const PAGE: usize = 2;

/// What it does wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    None,
    /// Connections end at once.
    Away,
    /// Nothing is ever answered.
    Hang,
    /// Parts of an upload are not answered; all else is.
    HangParts,
    /// Of so many parts that come, and of as many objects that are asked for, the connection is lost in the middle.
    Cut(usize),
    /// Objects are kept with one bit changed.
    Damage,
    /// Everything is refused, with all that was sent in the answer.
    Denied,
    /// No object can be read.
    Frozen,
}

#[derive(Default)]
struct State {
    objects: BTreeMap<String, Vec<u8>>,
    uploads: BTreeMap<String, BTreeMap<usize, Vec<u8>>>,
    /// Each request, as `GET` and what it was for.
    requests: Vec<String>,
    next: usize,
    fault: Option<Fault>,
    /// Connections that hang.
    hanging: Vec<TcpStream>,
}

pub struct Store {
    at: SocketAddr,
    state: Arc<Mutex<State>>,
    thread: Option<JoinHandle<()>>,
}

impl Store {
    pub fn start() -> Store {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let at = listener.local_addr().unwrap();
        let state: Arc<Mutex<State>> = Arc::default();
        let shared = state.clone();
        let thread = std::thread::spawn(move || {
            let mut answering = Vec::new();
            for stream in listener.incoming() {
                let Ok(stream) = stream else { return };
                if locked(&shared).next == usize::MAX {
                    break;
                }
                let state = shared.clone();
                // Who asks may have gone away.
                answering.push(std::thread::spawn(move || drop(answer(stream, &state))));
            }
            for thread in answering {
                let _ = thread.join();
            }
        });
        Store { at, state, thread: Some(thread) }
    }

    pub fn url(&self) -> String {
        "s3://bucket/some/prefix".into()
    }

    /// What a client has to be told.
    pub fn options(&self) -> Vec<(&'static str, String)> {
        vec![
            ("aws_endpoint", format!("http://{}", self.at)),
            ("aws_region", "nowhere-1".into()),
            ("aws_access_key_id", KEY.into()),
            ("aws_secret_access_key", SECRET.into()),
            ("aws_allow_http", "true".into()),
        ]
    }

    pub fn set(&self, fault: Fault) {
        let mut state = locked(&self.state);
        state.fault = Some(fault);
        for stream in state.hanging.drain(..) {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }

    pub fn objects(&self) -> Vec<String> {
        locked(&self.state).objects.keys().cloned().collect()
    }

    pub fn put(&self, name: &str, bytes: &[u8]) {
        locked(&self.state).objects.insert(name.to_owned(), bytes.to_vec());
    }

    pub fn get(&self, name: &str) -> Option<Vec<u8>> {
        locked(&self.state).objects.get(name).cloned()
    }

    /// Uploads that were neither completed nor given up.
    pub fn uploads(&self) -> usize {
        locked(&self.state).uploads.len()
    }

    /// Connections that hang now.
    pub fn hanging(&self) -> usize {
        locked(&self.state).hanging.len()
    }

    pub fn requests(&self) -> Vec<String> {
        locked(&self.state).requests.clone()
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        locked(&self.state).next = usize::MAX;
        self.set(Fault::None);
        let _ = TcpStream::connect(self.at);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Whoever has panicked with it: then its test has failed anyway.
fn locked(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

fn decoded(text: &str) -> String {
    let (mut bytes, mut rest) = (Vec::new(), text.bytes());
    while let Some(byte) = rest.next() {
        bytes.push(match byte {
            b'%' => u8::from_str_radix(&String::from_utf8([rest.next().unwrap(), rest.next().unwrap()].into()).unwrap(), 16).unwrap(),
            b'+' => b' ',
            byte => byte,
        });
    }
    String::from_utf8(bytes).unwrap()
}

fn between<'a>(text: &'a str, before: &str, after: &str) -> Vec<&'a str> {
    text.split(before).skip(1).filter_map(|rest| Some(rest.split_once(after)?.0)).collect()
}

fn answer(stream: TcpStream, state: &Mutex<State>) -> std::io::Result<()> {
    let fault = locked(state).fault.unwrap_or(Fault::None);
    if fault == Fault::Away {
        return Ok(());
    }
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut line = String::new();
    reader.read_line(&mut line)?;
    let mut words = line.split(' ');
    let (method, target) = (words.next().unwrap_or_default().to_owned(), words.next().unwrap_or_default().to_owned());
    let mut headers = BTreeMap::new();
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line)? == 0 {
            return Ok(());
        }
        let Some((name, value)) = line.trim_end().split_once(':') else { break };
        headers.insert(name.to_ascii_lowercase(), value.trim().to_owned());
    }
    let (path, query) = target.split_once('?').unwrap_or((&target, ""));
    let query: BTreeMap<String, String> = query
        .split('&')
        .map(|pair| pair.split_once('=').unwrap_or((pair, "")))
        .map(|(name, value)| (decoded(name), decoded(value)))
        .collect();
    let key = decoded(path.strip_prefix("/bucket").unwrap_or_default().trim_start_matches('/'));
    locked(state).requests.push(format!("{method} {key}"));
    if fault == Fault::Hang || fault == Fault::HangParts && query.contains_key("partNumber") {
        locked(state).hanging.push(stream);
        return Ok(());
    }
    let length: usize = headers.get("content-length").map_or(0, |text| text.parse().unwrap());
    let is_cut = || {
        let mut state = locked(state);
        match state.fault {
            Some(Fault::Cut(left)) if left > 0 => {
                state.fault = Some(Fault::Cut(left - 1));
                true
            }
            _ => false,
        }
    };
    if query.contains_key("partNumber") && is_cut() {
        reader.read_exact(&mut vec![0; length / 2])?;
        return stream.shutdown(Shutdown::Both);
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body)?;
    if fault == Fault::Denied {
        let quoted = format!("<Error><Code>SignatureDoesNotMatch</Code><Sent>{SECRET}</Sent></Error>");
        return reply(&stream, "403 Forbidden", &[], quoted.as_bytes(), method != "HEAD");
    }
    let whom = format!("AWS4-HMAC-SHA256 Credential={KEY}/");
    if !headers.get("authorization").is_some_and(|text| text.starts_with(&whom)) {
        return reply(&stream, "403 Forbidden", &[], b"<Error><Code>AccessDenied</Code></Error>", true);
    }
    let kept = |mut bytes: Vec<u8>| {
        if fault == Fault::Damage && bytes.len() > 4096 {
            let middle = bytes.len() / 2;
            bytes[middle] ^= 1;
        }
        bytes
    };
    let etag = ("ETag", "\"an-etag\"".to_owned());
    let id = query.get("uploadId").cloned();
    let ok = |text: String| reply(&stream, "200 OK", &[], text.as_bytes(), true);
    match (method.as_str(), id) {
        ("POST", None) if query.contains_key("uploads") => {
            let mut state = locked(state);
            state.next += 1;
            let id = state.next.to_string();
            state.uploads.insert(id.clone(), BTreeMap::new());
            ok(format!("<InitiateMultipartUploadResult><UploadId>{id}</UploadId></InitiateMultipartUploadResult>"))
        }
        ("PUT", Some(id)) => {
            let number: usize = query["partNumber"].parse().unwrap();
            match locked(state).uploads.get_mut(&id) {
                Some(parts) => drop(parts.insert(number, body)),
                // Given up meanwhile.
                None => return reply(&stream, "404 Not Found", &[], b"<Error><Code>NoSuchUpload</Code></Error>", true),
            }
            reply(&stream, "200 OK", &[etag], b"", true)
        }
        ("POST", Some(id)) => {
            let mut state = locked(state);
            let Some(parts) = state.uploads.remove(&id) else {
                return reply(&stream, "404 Not Found", &[], b"<Error><Code>NoSuchUpload</Code></Error>", true);
            };
            let named = between(std::str::from_utf8(&body).unwrap(), "<PartNumber>", "</PartNumber>").len();
            assert_eq!(named, parts.len());
            // All parts but the last are of one size, which some stores ask for.
            let sizes: Vec<usize> = parts.values().map(Vec::len).collect();
            assert!(sizes[..sizes.len() - 1].iter().all(|size| *size == 8 << 20), "{sizes:?}");
            let whole = kept(parts.into_values().flatten().collect());
            state.objects.insert(key, whole);
            ok("<CompleteMultipartUploadResult><ETag>\"an-etag\"</ETag></CompleteMultipartUploadResult>".into())
        }
        ("DELETE", Some(id)) => {
            locked(state).uploads.remove(&id);
            reply(&stream, "204 No Content", &[], b"", true)
        }
        ("PUT", None) => {
            locked(state).objects.insert(key, kept(body));
            reply(&stream, "200 OK", &[etag], b"", true)
        }
        ("DELETE", None) => {
            locked(state).objects.remove(&key);
            reply(&stream, "204 No Content", &[], b"", true)
        }
        ("POST", None) => {
            let body = String::from_utf8(body).unwrap();
            let gone = between(&body, "<Key>", "</Key>");
            for key in &gone {
                locked(state).objects.remove(*key);
            }
            let gone: String = gone.iter().map(|key| format!("<Deleted><Key>{key}</Key></Deleted>")).collect();
            ok(format!("<DeleteResult>{gone}</DeleteResult>"))
        }
        ("GET", None) if query.contains_key("list-type") => {
            let state = locked(state);
            let after = query.get("continuation-token").cloned().unwrap_or_default();
            let prefix = query.get("prefix").cloned().unwrap_or_default();
            let found: Vec<_> = state.objects.iter().filter(|(key, _)| key.starts_with(&prefix) && **key > after).collect();
            let one = |(key, bytes): &(&String, &Vec<u8>)| {
                let size = bytes.len();
                format!(
                    "<Contents><Key>{key}</Key><LastModified>2026-11-23T12:00:00.000Z</LastModified><ETag>\"an-etag\"</ETag><Size>{size}</Size></Contents>"
                )
            };
            let page: String = found.iter().take(PAGE).map(one).collect();
            let more =
                found.get(PAGE).map_or(String::new(), |_| format!("<NextContinuationToken>{}</NextContinuationToken>", found[PAGE - 1].0));
            ok(format!("<ListBucketResult>{page}{more}</ListBucketResult>"))
        }
        _ => {
            let Some(bytes) = locked(state).objects.get(&key).cloned() else {
                return reply(&stream, "404 Not Found", &[], b"<Error><Code>NoSuchKey</Code></Error>", method != "HEAD");
            };
            let mut known = vec![etag, ("Last-Modified", "Mon, 23 Nov 2026 12:00:00 GMT".to_owned())];
            let range = headers.get("range").and_then(|text| text.strip_prefix("bytes=")?.split_once('-'));
            let Some((from, to)) = range else { return reply(&stream, "200 OK", &known, &bytes, method != "HEAD") };
            if fault == Fault::Frozen {
                return reply(&stream, "403 Forbidden", &[], b"<Error><Code>InvalidObjectState</Code></Error>", true);
            }
            let (from, size): (usize, usize) = (from.parse().unwrap(), bytes.len());
            if from >= size {
                return reply(&stream, "416 Range Not Satisfiable", &[], b"<Error><Code>InvalidRange</Code></Error>", true);
            }
            let to = to.parse::<usize>().unwrap().min(size.saturating_sub(1));
            known.push(("Content-Range", format!("bytes {from}-{to}/{size}")));
            if to - from > 4096 && is_cut() {
                let mut stream = &stream;
                write!(stream, "HTTP/1.1 206 Partial Content\r\nContent-Length: {}\r\n", to + 1 - from)?;
                known.iter().try_for_each(|(name, value)| write!(stream, "{name}: {value}\r\n"))?;
                write!(stream, "\r\n")?;
                stream.write_all(&bytes[from..from + (to - from) / 2])?;
                return stream.shutdown(Shutdown::Both);
            }
            reply(&stream, "206 Partial Content", &known, &bytes[from..=to], true)
        }
    }
}

fn reply(mut stream: &TcpStream, status: &str, headers: &[(&str, String)], body: &[u8], with_body: bool) -> std::io::Result<()> {
    let mut head = format!("HTTP/1.1 {status}\r\nConnection: close\r\nContent-Length: {}\r\n", body.len());
    for (name, value) in headers {
        head += &format!("{name}: {value}\r\n");
    }
    head += "\r\n";
    stream.write_all(head.as_bytes())?;
    if with_body {
        stream.write_all(body)?;
    }
    Ok(())
}
