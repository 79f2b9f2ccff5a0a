//! The tests of the comparison harness in `benches/versus`: a bench target that has no test harness of Cargo's cannot run them.
//! No server is started here.
#![allow(dead_code)] // Half of it is used by the harness's own main file alone.

#[path = "../benches/versus/args.rs"]
mod args;
#[path = "../benches/versus/embedded.rs"]
mod embedded;
#[path = "../benches/versus/limits.rs"]
mod limits;
#[path = "../benches/versus/load.rs"]
mod load;
#[path = "../benches/versus/machine.rs"]
mod machine;
#[path = "../benches/versus/member.rs"]
mod member;
#[path = "../benches/versus/pause.rs"]
mod pause;
#[path = "../benches/versus/plot.rs"]
mod plot;
#[path = "../benches/versus/report.rs"]
mod report;
#[path = "../benches/versus/requests.rs"]
mod requests;
#[path = "../benches/versus/rows.rs"]
mod rows;
#[path = "../benches/versus/stats.rs"]
mod stats;
#[path = "../benches/versus/streams.rs"]
mod streams;
#[path = "../benches/versus/wire.rs"]
mod wire;
