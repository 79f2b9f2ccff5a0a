//! Which address this node has, where it was not told.
//!
//! It is the one that the system would send from to another node, so nothing is sent to find it out; but names have to be looked up first.
//! That is done once, when the node starts, and without blocking its thread: what was found counts for the life of the node.
//!
//! ```text
//! ADVERTISE_IP, or towards an address in JOIN     no name is looked up
//! else towards a name in JOIN                     the first that is not this machine itself, tried until the start's time is over
//! else, with data on disk                         the address that the node had
//! else, when all names are of this machine        loopback, for nodes of one machine
//! else, with data on disk                         the address by which it reaches the world
//! ```
//!
//! # Invariants
//! - A node with data does not wait for names: it tries each once.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use super::config::EmbedConfig;
use super::founding::agree::{NodeId, State};
use crate::config::Url;
use crate::error::{Error, Result};

/// How long looking up one name may take. The lookup may go on behind that, for as long as the system's resolver likes.
const LOOKUP_TIMEOUT: Duration = Duration::from_secs(2);

/// How long to wait before the names are looked up again.
const RETRY: Duration = Duration::from_secs(1);

/// Somewhere in the world: an address of those that documents use for examples, to which nobody ever sends.
const WORLD: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1)), 9);

/// The address that the system would send from to another. Nothing is sent.
pub(super) fn towards(there: SocketAddr) -> Option<IpAddr> {
    let any: IpAddr = if there.is_ipv6() { Ipv6Addr::UNSPECIFIED.into() } else { Ipv4Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::bind((any, 0)).ok()?;
    socket.connect(there).ok()?;
    socket.local_addr().ok().map(|addr| addr.ip())
}

/// Finds out the node's address and keeps it, in `advertise_ip`. It ends when `late` is cancelled.
///
/// # Errors
/// `Founding` when there was no time to find it out; `Config` when it and JOIN cannot be meant together.
pub(super) async fn settle(config: &mut EmbedConfig, state: &State, node: NodeId, late: &CancellationToken) -> Result<()> {
    let found = match config.advertised_ip() {
        Ok(ip) => ip,
        Err(_) => tokio::select! {
            biased;
            ip = look(&config.join, remembered(state, node), state.known().is_some()) => ip,
            () = late.cancelled() => {
                return Err(Error::Founding("ADVERTISE_IP is not set, and no name in JOIN leads anywhere yet".into()));
            }
        },
    };
    config.check_ip(found)?;
    config.advertise_ip = Some(found);
    Ok(())
}

/// Where a server was.
fn remembered(state: &State, node: NodeId) -> Option<IpAddr> {
    state.own(node).and_then(|own| own.peer_url.parse::<Url>().ok()?.listen_ip())
}

async fn look(names: &[String], remembered: Option<IpAddr>, has_data: bool) -> IpAddr {
    let mut told = false;
    loop {
        let (mut loopback, mut all) = (None, true);
        for name in names {
            let addresses = tokio::time::timeout(LOOKUP_TIMEOUT, tokio::net::lookup_host(name.as_str())).await;
            let addresses: Vec<SocketAddr> = addresses.ok().and_then(|found| found.ok()).into_iter().flatten().collect();
            // Others' names may only not be known yet.
            all &= !addresses.is_empty();
            for own in addresses.into_iter().filter_map(towards) {
                // Many machines have their own name on loopback: another node's tells more.
                if !own.is_loopback() {
                    return own;
                }
                loopback = Some(own);
            }
        }
        let world = || if has_data { towards(WORLD) } else { None };
        if let Some(own) = remembered.or(loopback.filter(|_| all)).or_else(world) {
            return own;
        }
        if !told {
            tracing::warn!(join = ?names, "ADVERTISE_IP is not set, and no name in JOIN leads anywhere: trying on");
            told = true;
        }
        tokio::time::sleep(RETRY).await;
    }
}

#[cfg(test)]
mod tests {
    use super::super::founding::agree::{Decision, Known, Role, Unbound, candidate};
    use super::*;

    fn unbound() -> State {
        State::Unbound(Unbound::default())
    }

    /// No name, so that nobody is asked.
    const NONE: &str = "a..b:1";

    #[tokio::test]
    async fn a_name_leads_to_an_address() {
        let (all, some) = (["localhost:1".to_owned()], [NONE.to_owned(), "localhost:1".to_owned()]);
        assert!(look(&all, None, false).await.is_loopback());
        assert_eq!(look(&some, Some(WORLD.ip()), true).await, WORLD.ip());
        assert_eq!(look(&all, Some(WORLD.ip()), true).await, WORLD.ip());
        // While other names are not known, a new node does not take itself for the only machine.
        let waited = tokio::time::timeout(Duration::from_millis(100), look(&some, None, false)).await;
        assert!(waited.is_err(), "{waited:?}");
    }

    #[tokio::test]
    async fn who_knows_nothing_waits_and_who_has_data_does_not() {
        let mut config = EmbedConfig { join: vec![NONE.into()], ..EmbedConfig::default() };
        let late = CancellationToken::new();
        let given_up = late.clone();
        let timer = tokio::spawn(async move {
            tokio::time::sleep(Duration::from_millis(50)).await;
            given_up.cancel();
        });
        let waited = settle(&mut config, &unbound(), NodeId(1), &late).await;
        assert!(matches!(waited, Err(Error::Founding(_))), "{waited:?}");
        timer.await.unwrap();
        let own = candidate(1);
        let decision = Decision { cluster: 1, founders: vec![own.clone()] };
        let state = State::Bound { role: Role::Server, known: Known { decision, servers: vec![own], as_of: 0 } };
        // It has found out that it would speak in plain text over a network.
        let untold = settle(&mut config, &state, NodeId(1), &CancellationToken::new()).await;
        assert!(matches!(&untold, Err(Error::Config(why)) if why.contains("KV_PLAINTEXT=true")), "{untold:?}");
        config.plaintext = true;
        settle(&mut config, &state, NodeId(1), &CancellationToken::new()).await.unwrap();
        assert_eq!(config.advertise_ip, Some([10, 0, 0, 1].into()));
    }
}
