//! The limits: what the transport and the disk can do at all, measured in the same run.
//!
//! - *Transport*: the load of the put rows against [`serve_nothing`], an HTTP/2 server that reads each request and answers it from
//!   memory, on one thread in a process of its own, so that its CPU is told apart from the generator's. No server on this transport is
//!   faster with the same generator on the same cores.
//! - *Disk*: one thread that appends to a zero-filled file and calls `fdatasync`, over and over. A server that makes one client's put
//!   durable before it answers is no faster than this.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use bytes::{BufMut, Bytes, BytesMut};
use http::{HeaderMap, Response};
use quorate::proto::etcdserverpb::{PutResponse, RangeResponse, ResponseHeader};
use quorate::proto::{EncodedKv, KeyValue};

use crate::member::{Cluster, Guard};
use crate::requests::{RANGE, key, value};
use crate::rows::RANGE_KEYS;
use crate::stats::Histogram;
use crate::wire::{Result, frame};

/// The argument that makes this program the server that does nothing.
pub const SERVE_NOTHING: &str = "serve-nothing";
/// Bytes of one append: a put of 256 bytes with what a log keeps beside it.
const APPEND_BYTES: usize = 320;
/// Length of the file that is appended to; at its end the next append goes to its beginning.
const FILE_BYTES: usize = 64 << 20;
/// Bytes of an answer to hand over at once: what fits into one HTTP/2 frame of default size.
const PIECE_BYTES: usize = 16 << 10;

/// Runs the server that does nothing: writes its port to the standard output, then answers until it is killed.
pub fn serve_nothing() -> Result<()> {
    crate::wire::block_on(async {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
        writeln!(std::io::stdout(), "{}", listener.local_addr()?.port())?;
        serve(listener).await
    })
}

async fn serve(listener: tokio::net::TcpListener) -> Result<()> {
    let header = || Some(ResponseHeader { cluster_id: 1 << 60, member_id: 1 << 61, revision: 100_000, raft_term: 2 });
    let put = frame(&PutResponse { header: header(), prev_kv: None });
    let pair = |number| KeyValue {
        key: key(number).into(),
        create_revision: 100_000,
        mod_revision: 100_000,
        version: 1,
        value: value(256).into(),
        lease: 0,
    };
    let kvs: Vec<_> = (0..RANGE_KEYS).map(|number| EncodedKv::encode(&pair(number))).collect();
    let range = frame(&RangeResponse { header: header(), count: kvs.len().try_into()?, kvs, more: false });
    loop {
        let (tcp, _) = listener.accept().await?;
        tcp.set_nodelay(true)?;
        let (put, range) = (put.clone(), range.clone());
        tokio::spawn(async move {
            let Ok(mut connection) = h2::server::handshake(tcp).await else { return };
            while let Some(Ok((request, respond))) = connection.accept().await {
                let answer = if request.uri().path() == RANGE { range.clone() } else { put.clone() };
                tokio::spawn(answer_one(request.into_body(), respond, answer));
            }
        });
    }
}

async fn answer_one(mut body: h2::RecvStream, mut respond: h2::server::SendResponse<Bytes>, mut answer: Bytes) -> Result<()> {
    while let Some(piece) = body.data().await.transpose()? {
        body.flow_control().release_capacity(piece.len())?;
    }
    let mut stream = respond.send_response(Response::builder().header("content-type", "application/grpc").body(())?, false)?;
    while !answer.is_empty() {
        stream.send_data(answer.split_to(answer.len().min(PIECE_BYTES)), false)?;
    }
    let mut trailers = HeaderMap::new();
    trailers.insert("grpc-status", http::HeaderValue::from_static("0"));
    Ok(stream.send_trailers(trailers)?)
}

/// Starts the server that does nothing, in a process of its own.
pub fn start_nothing() -> Result<(Cluster, Guard)> {
    let mut command = Command::new(std::env::current_exe()?);
    let mut guard = Guard::start(command.arg(SERVE_NOTHING).stdin(Stdio::null()).stdout(Stdio::piped()))?;
    let mut port = String::new();
    BufReader::new(guard.output().ok_or("no output")?).read_line(&mut port)?;
    let endpoint = format!("http://127.0.0.1:{}", port.trim());
    Ok((Cluster::join("nothing", &[endpoint], &[guard.pid()])?, guard))
}

/// What the disk gave.
#[derive(Clone, Copy, Debug)]
pub struct Syncs {
    pub per_second: f64,
    pub p50_us: f64,
    pub p99_us: f64,
}

/// Appends and calls `fdatasync` for so long, in a file below `dir`.
pub fn syncs(dir: &Path, time: Duration) -> Result<Syncs> {
    let path = tempfile::NamedTempFile::new_in(dir)?;
    let file: &File = path.as_file();
    for start in (0..FILE_BYTES).step_by(1 << 20) {
        file.write_all_at(&[0; 1 << 20], start as u64)?;
    }
    file.sync_all()?;
    let mut record = BytesMut::new();
    record.put_bytes(b'x', APPEND_BYTES);
    let (mut histogram, mut count, mut at) = (Histogram::new(), 0_u64, 0);
    let began = Instant::now();
    while began.elapsed() < time {
        let append = Instant::now();
        file.write_all_at(&record, at as u64)?;
        file.sync_data()?;
        histogram.record(append.elapsed());
        count += 1;
        at = (at + APPEND_BYTES) % (FILE_BYTES - APPEND_BYTES);
    }
    let per_second = count as f64 / began.elapsed().as_secs_f64();
    Ok(Syncs { per_second, p50_us: histogram.quantile_us(0.5), p99_us: histogram.quantile_us(0.99) })
}

#[cfg(test)]
#[allow(unused)] // See main.rs.
mod tests {
    use super::*;
    use crate::load::{self, Settings};
    use crate::rows::{NULL_ROWS, ROWS};

    /// The generator end to end, without a server to install: every answer is taken, checked and counted.
    #[test]
    fn the_generator_against_nothing() {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0")).unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        runtime.spawn(serve(listener));
        let cluster = Cluster::join("nothing", &[endpoint], &[]).unwrap();
        let time = Duration::from_millis(50);
        for threads in [1, 2] {
            let settings = Settings { keys: 2000, value_bytes: 256, connections: 4, threads, warm: time, measured: time };
            for row in NULL_ROWS {
                let round = load::run(&cluster, row, &settings).unwrap();
                assert_eq!(round.first_error, None, "{}", row.name);
                assert!(round.operations > 0 && round.weighed_operations >= round.operations, "{}: {round:?}", row.name);
            }
        }
        // An answer of another kind than expected is an error, and never counts.
        let get = ROWS.iter().find(|row| row.name == "get-64").unwrap();
        let settings = Settings { keys: 2000, value_bytes: 256, connections: 4, threads: 1, warm: time, measured: time };
        let round = load::run(&cluster, get, &settings).unwrap();
        assert!(round.errors > 0 && round.operations == 0 && round.first_error.is_some(), "{round:?}");
    }

    #[test]
    fn the_disk_syncs() {
        let syncs = syncs(Path::new(env!("CARGO_TARGET_TMPDIR")), Duration::from_millis(20)).unwrap();
        assert!(syncs.per_second > 0.0 && syncs.p50_us <= syncs.p99_us, "{syncs:?}");
    }
}
