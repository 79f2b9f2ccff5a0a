//! The links between members, which can be cut and slowed down, each direction by itself.
//!
//! Every member tells its peers the address of a proxy of this test, which passes on to where the member listens. There is one proxy for
//! each member, so a connection says by itself only where it leads to; whose it is, the kernel knows: `/proc/net/tcp` has the socket at
//! its other end, and `/proc/PID/fd` who holds that socket.
//!
//! ```text
//! a ---connects---> [proxy of b] ---> b        a's bytes to b wait while the link a->b is cut, b's answers while b->a is
//! ```
//!
//! Nothing is lost on the way, as TCP loses nothing: what is held back arrives when the link heals, however old it is by then, or the
//! connection is reset.

use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering::SeqCst};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

pub const MEMBERS: usize = 3;

/// Bytes passed on at once. What is beyond waits in the kernel's buffers, and then at its sender's.
const CHUNK: usize = 64 << 10;

/// One direction between two members.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Link {
    pub is_cut: bool,
    /// How long each chunk takes: a slow link is narrow, too.
    pub delay: Duration,
}

/// All links, by source and destination.
#[derive(Clone, Copy, Debug, Default)]
struct Table {
    links: [[Link; MEMBERS]; MEMBERS],
    /// Raised to reset all connections.
    resets: u64,
}

struct Shared {
    table: watch::Sender<Table>,
    /// The members' processes; 0: not running.
    pids: [AtomicU32; MEMBERS],
    /// The kernel's table of connections, and when it was read. Who comes while it is read shares the next reading with all that wait: on
    /// a busy machine it takes long, and a member that is not connected in time tries again.
    sockets: Mutex<(Instant, String)>,
}

pub struct Links {
    shared: Arc<Shared>,
    /// Where members are to be reached by each other.
    pub addresses: [SocketAddrV4; MEMBERS],
    listeners: Vec<TcpListener>,
    tasks: Vec<tokio::task::JoinHandle<()>>,
}

impl Links {
    /// Whole links on ports that nobody else has.
    pub async fn new() -> Links {
        let mut listeners = Vec::new();
        for _ in 0..MEMBERS {
            listeners.push(TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("a free port"));
        }
        let addresses = std::array::from_fn(|at| match listeners[at].local_addr() {
            Ok(SocketAddr::V4(address)) => address,
            other => panic!("{other:?}"),
        });
        let shared = Shared {
            table: watch::Sender::new(Table::default()),
            pids: Default::default(),
            sockets: Mutex::new((Instant::now(), String::new())),
        };
        Links { shared: Arc::new(shared), addresses, listeners, tasks: Vec::new() }
    }

    /// Starts to pass on, to where the members listen.
    pub fn serve(&mut self, targets: [SocketAddrV4; MEMBERS]) {
        for (to, listener) in self.listeners.drain(..).enumerate() {
            let shared = self.shared.clone();
            self.tasks.push(tokio::spawn(async move {
                loop {
                    if let Ok((stream, _)) = listener.accept().await {
                        tokio::spawn(pass_on(shared.clone(), stream, to, targets[to]));
                    }
                }
            }));
        }
    }

    pub fn set_pid(&self, member: usize, pid: u32) {
        self.shared.pids[member].store(pid, SeqCst);
    }

    /// Changes links, by source and destination.
    pub fn change(&self, mut change: impl FnMut(usize, usize, &mut Link)) {
        self.shared.table.send_modify(|table| {
            for (from, row) in table.links.iter_mut().enumerate() {
                for (to, link) in row.iter_mut().enumerate().filter(|(to, _)| *to != from) {
                    change(from, to, link);
                }
            }
        });
    }

    /// Makes all links whole; at wish with new connections, so that what was held back is lost.
    pub fn heal(&self, reset: bool) {
        self.change(|_, _, link| *link = Link::default());
        self.shared.table.send_modify(|table| table.resets += u64::from(reset));
    }
}

impl Drop for Links {
    fn drop(&mut self) {
        self.tasks.iter().for_each(tokio::task::JoinHandle::abort);
    }
}

async fn pass_on(shared: Arc<Shared>, inward: TcpStream, to: usize, target: SocketAddrV4) {
    let mut table = shared.table.subscribe();
    let resets = table.borrow_and_update().resets;
    // Who has ended meanwhile has no use for its connection.
    let (Ok(SocketAddr::V4(theirs)), Ok(SocketAddr::V4(ours))) = (inward.peer_addr(), inward.local_addr()) else { return };
    let found = tokio::task::spawn_blocking({
        let shared = shared.clone();
        move || owner(&shared, theirs, ours)
    });
    let Ok(Some(from)) = found.await else { return };
    if from == to {
        return;
    }
    let Ok(outward) = TcpStream::connect(target).await else { return };
    let _ = (inward.set_nodelay(true), outward.set_nodelay(true));
    let ((in_read, in_write), (out_read, out_write)) = (inward.into_split(), outward.into_split());
    tokio::select! {
        () = pump(shared.table.subscribe(), from, to, in_read, out_write) => {}
        () = pump(shared.table.subscribe(), to, from, out_read, in_write) => {}
        _ = table.wait_for(|table| table.resets != resets) => {}
    }
}

/// Passes bytes on in one direction until either end closes.
async fn pump(mut table: watch::Receiver<Table>, from: usize, to: usize, mut read: OwnedReadHalf, mut write: OwnedWriteHalf) {
    let mut chunk = vec![0; CHUNK];
    while let Ok(length @ 1..) = read.read(&mut chunk).await {
        let delay = table.borrow().links[from][to].delay;
        if !delay.is_zero() {
            tokio::time::sleep(delay).await;
        }
        if table.wait_for(|table| !table.links[from][to].is_cut).await.is_err() || write.write_all(&chunk[..length]).await.is_err() {
            return;
        }
    }
    // That the other end has closed is not known beyond a cut link either.
    let _ = table.wait_for(|table| !table.links[from][to].is_cut).await;
}

/// Which member has the other end of a connection.
fn owner(shared: &Shared, theirs: SocketAddrV4, ours: SocketAddrV4) -> Option<usize> {
    let text = |address: SocketAddrV4| format!("{:08X}:{:04X}", u32::from_ne_bytes(address.ip().octets()), address.port());
    let ends = format!(" {} {} ", text(theirs), text(ours));
    /// The kernel's table may change while it is read, and a row be missed.
    const TRIES: u32 = 2;
    for _ in 0..TRIES {
        let came = Instant::now();
        let inode = {
            let mut sockets = shared.sockets.lock().unwrap_or_else(PoisonError::into_inner);
            if sockets.0 < came {
                *sockets = (Instant::now(), std::fs::read_to_string("/proc/net/tcp").ok()?);
            }
            let rest = sockets.1.find(&ends).map(|at| &sockets.1[at + ends.len()..]);
            rest.and_then(|rest| rest.split_whitespace().nth(6)).map(String::from)
        };
        let Some(inode) = inode else { continue };
        if inode == "0" {
            // It has given up waiting. Looking for it again would only keep others waiting, until they give up.
            return None;
        }
        let socket = format!("socket:[{inode}]");
        for (member, pid) in shared.pids.iter().enumerate() {
            let pid = pid.load(SeqCst);
            let Ok(files) = std::fs::read_dir(format!("/proc/{pid}/fd")) else { continue };
            if pid != 0 && files.flatten().any(|file| std::fs::read_link(file.path()).is_ok_and(|link| link == Path::new(&socket))) {
                return Some(member);
            }
        }
    }
    None
}
