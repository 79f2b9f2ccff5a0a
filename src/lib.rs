//! An etcd-v3-compatible key-value store that lives inside the process that needs it.
//!
//! quorate is a *library* first: [`Server::start`] makes a member of a cluster out of a [`Config`], [`Server::client`] calls
//! it without a socket. It is also an etcd: the same server speaks etcd's gRPC API on its client port, and the binary of the
//! same name takes etcd's flags, so that etcdctl, every etcd client library, and programs built on them work unchanged.
//!
//! # Ten lines
//! ```
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(async {
//! # let dir = tempfile::tempdir()?;
//! let mut config = quorate::Config::default();
//! config.data_dir = Some(dir.path().join("data"));
//! config.listen_client_urls = vec!["http://127.0.0.1:0".parse()?]; // or none: no socket at all
//! config.listen_peer_urls = vec![];
//! let server = quorate::Server::start(config).await?;
//! let client = server.client();
//! client.put("volumes/a", "3 replicas").await?; // returns when it is on disk
//! let volume = client.get("volumes/a").await?.expect("it was just put");
//! assert_eq!((&volume.value[..], volume.version), (&b"3 replicas"[..], 1));
//! server.shutdown().await?; // ports, files, locks and threads are given up (but for sled's idle ones, which the process keeps)
//! # Ok(())
//! # })
//! # }
//! ```
//!
//! # What it promises
//! - An acknowledged write is on disk. After a failed write to the log the member stops and says so; it never goes on as if
//!   nothing had happened.
//! - Every file is checksummed. Damage is refused with the name of the file and what was found, never served.
//! - Reads are linearizable unless asked to be `serializable`; watches get every event once, in order.
//! - Nothing that a client sends makes a member panic. Nothing here exits the process, installs a logger or a signal handler,
//!   or leaves a task behind after [`Server::shutdown`]. Log lines go to [`tracing`].
//!
//! # The house
//! From the ground up; each room uses only those below it (a test, `tests/layers.rs`, sees to that).
//!
//! | room | what it is |
//! |---|---|
//! | `error`, `proto` | two error enums; etcd's messages |
//! | `world` | chance, tasks and threads: the system's, or those of a simulation |
//! | `storage/` | bytes on disk: the Raft log's segments (`wal`), the history of revisions in blocks (`history`) on an ordered map (`sled`; `mem` for tests), the data directory (`dir`) |
//! | `config`, `cork`, `lease`, `metrics`, `slow` | what a member is told; small writes joined; leases, without a clock; what it tells, in figures and of what takes long |
//! | `tls/` | who may talk to whom, and the files that say so (feature `tls`) |
//! | `mvcc/` | revisions: the `index` on a counting `tree`, `range`, `txn`, `watch` |
//! | `snapshot` | the format of snapshots, and of backups |
//! | `raft/` | openraft: its `log` on our segments, `apply`, the `network` |
//! | `listing` | the log as lines of text, for people and for tests (feature `cli`) |
//! | `background` | the thread that takes applied state to the storage and keeps it in shape |
//! | `node` | requests in, outcomes out; everything that waits or happens by itself |
//! | `api/` | the wire: etcd's services, HTTP, connections |
//! | `client`, `server` | calls without a wire; a member, whole |
//! | `backup/` | backups, on demand and on a schedule, and what becomes of them again |
//! | `embed/` | the platform's mode: nodes that are told one list of addresses, and found or join one cluster |
//! | `sim` | clusters whose time, chance, disks and network a seed decides; for tests (feature `simulation`) |
//! | `cli` | etcd's flags, variables and configuration file; for the binary (feature `cli`) |
//!
//! ## A put
//! `api/unary` decodes it, `node` checks it and queues it; all that is queued becomes one Raft entry, which `raft/log` hands
//! to `storage/wal` for one write and one fsync. Once it is committed, `raft/apply` runs it through `mvcc/txn`: the record goes
//! to the history's tail in memory, its revision to the index, its event to the watch hub, and the answer back to the caller.
//! A second later, or once there are 2 MiB, `background` writes the tail to the storage, as one batch with the log id.
//!
//! ## A watch event
//! `raft/apply` publishes the commit, `mvcc/watch` finds the watchers and hands each a pointer, `api/watch` copies the event's
//! bytes, encoded once for all of them, into the stream.
// Heads of public modules explain with the rooms behind them; `cargo doc --document-private-items` has those, too.
#![allow(rustdoc::private_intra_doc_links)]
#![forbid(unsafe_code)]

mod api;
mod background;
pub mod backup;
#[cfg(feature = "cli")]
pub mod cli;
pub mod client;
pub mod config;
mod cork;
pub mod embed;
mod error;
#[allow(dead_code, reason = "invariants that tests check")]
mod lease;
#[cfg(feature = "cli")]
pub mod listing;
mod lock;
pub mod metrics;
#[allow(dead_code, reason = "invariants that tests check")]
mod mvcc;
mod node;
mod pace;
pub mod proto;
#[allow(dead_code, reason = "invariants that tests check")]
mod raft;
mod server;
#[cfg(feature = "simulation")]
#[doc(hidden)]
pub mod sim;
mod slow;
// For the fuzz targets, which are a crate of their own; no part of the API.
#[doc(hidden)]
pub mod snapshot;
#[doc(hidden)]
pub mod storage;
// For the micro-benchmarks, likewise.
#[cfg(feature = "internals")]
#[doc(hidden)]
pub mod internals;
#[cfg(test)]
mod testing;
#[cfg(feature = "tls")]
mod tls;
#[cfg(not(feature = "tls"))]
#[path = "tls/off.rs"]
mod tls;
mod world;

pub use client::Client;
pub use config::{Config, Url};
pub use error::{ApplyError, Error, ErrorKind, Result};
#[cfg(fuzzing)]
#[doc(hidden)]
pub use mvcc::model;
pub use server::Server;

/// The README's code is tested with the documentation's.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
