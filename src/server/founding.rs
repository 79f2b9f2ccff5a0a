//! Who a new member is: one of those who found a cluster, or one that joins it.
//!
//! Founders agree without a word: the ids of the members follow from their peer URLs and the token, the cluster's id from theirs, so that
//! all who are told the same `initial-cluster` come to the same ids. One that joins is told its id by the members, which have to have
//! added it before.
//!
//! ```text
//! new       a=http://h1:2380,b=http://h2:2380 + token  ->  ids of a and b -> id of the cluster
//! existing  Members, asked at b                        ->  the member with a's URLs: its id, and the cluster's
//! enlisted  told its id; Members, asked at b           ->  that it is one still, and has not been up as that
//! ```
//!
//! # Invariants
//! - Who was a member before, and has lost what it had, is not taken in again under the same id: it would break its word.

use std::time::Duration;

use sha2::{Digest, Sha256};
use tokio::time::Instant;

use crate::config::{Config, Url};
use crate::error::{Error, Result};
use crate::proto::peer::MembersResponse;
use crate::raft::network;
use crate::storage::dir::Identity;
use crate::tls::Connector;

/// Election timeouts for which a member that is to join waits for its cluster to have a leader, and how long it waits between two looks. Beyond
/// it its start fails, and can be tried again.
const JOIN_ELECTIONS: u32 = 20;
const JOIN_RETRY: Duration = Duration::from_millis(200);

/// Who is enlisted is told who it is, and looks for the cluster by itself.
#[derive(Clone, Debug)]
pub(crate) struct Enlistment {
    /// Its id as a member, and that of the members' cluster.
    pub member: u64,
    pub cluster: u64,
    /// Peer URLs of members, and of others who may be members.
    pub at: Vec<String>,
}

/// How often it is told that who is enlisted still looks for its cluster.
const JOIN_TELL: Duration = Duration::from_secs(10);

/// Who founds the cluster: id, name and peer URLs of each, by id. The ids follow from the peer URLs and the token, so that founders who
/// are told the same come to the same ids.
pub(crate) fn founders(config: &Config, peer_urls: &[Url]) -> Result<Vec<(u64, String, Vec<Url>)>> {
    let mut members = config.initial_members()?;
    if members.is_empty() {
        members.push((config.name.clone(), peer_urls.to_vec()));
    }
    let mut founders: Vec<_> =
        members.into_iter().map(|(name, urls)| (member_id(&urls, &config.initial_cluster_token), name, urls)).collect();
    founders.sort_by_key(|(id, ..)| *id);
    Ok(founders)
}

/// The id of a founder.
pub(crate) fn member_id(urls: &[Url], token: &str) -> u64 {
    let mut urls: Vec<String> = urls.iter().map(Url::to_string).collect();
    urls.sort();
    let mut member = Sha256::new();
    for part in urls.iter().map(String::as_str).chain([token]) {
        // Each part with its length, so that no two lists look alike.
        member.update((part.len() as u64).to_be_bytes());
        member.update(part);
    }
    first_u64(&member.finalize())
}

/// Where the others are that the configuration tells this member to found or to join a cluster with.
pub(super) fn others_told(config: &Config, identity: &Identity) -> Result<Vec<String>> {
    let told = config.initial_members()?;
    let others = told.into_iter().filter(|(name, _)| *name != identity.name && *name != config.name);
    Ok(others.flat_map(|(_, urls)| urls).map(|url| url.to_string()).collect())
}

/// The identity of a new member. The cluster's id follows from those of its founders.
pub(crate) fn found(config: &Config, peer_urls: &[Url]) -> Result<Identity> {
    let founders = founders(config, peer_urls)?;
    let ours = founders.iter().find(|(_, name, _)| *name == config.name);
    let (member_id, ..) = ours.ok_or_else(|| Error::Config(format!("initial-cluster does not name this member, {:?}", config.name)))?;
    Ok(Identity {
        cluster_id: cluster_id(founders.iter().map(|(id, ..)| *id).collect()),
        member_id: *member_id,
        name: config.name.clone(),
        joined: false,
        incarnation: 0,
    })
}

/// The id of a cluster, by those of its founders.
pub(crate) fn cluster_id(mut founders: Vec<u64>) -> u64 {
    founders.sort_unstable();
    let mut cluster = Sha256::new();
    for id in founders {
        cluster.update(id.to_be_bytes());
    }
    first_u64(&cluster.finalize())
}

/// The identity of a member that joins: as the members of the cluster know it, which has to know it before.
///
/// # Errors
/// `Config`, when none of them answers, or their members are not those of `initial-cluster`; the text says which. `Stopped` when the start was
/// given up.
pub(super) async fn join_cluster(config: &Config, tls: &Option<Connector>, given_up: &(dyn Fn() -> bool + Sync)) -> Result<Identity> {
    // A cluster that is there, and has no leader at this moment, is about to have one.
    let patience = Duration::from_millis(config.election_timeout_ms) * JOIN_ELECTIONS;
    let began = Instant::now();
    loop {
        let mut no_leader = false;
        match try_to_join(config, tls, &mut no_leader).await {
            Err(_) if given_up() => return Err(Error::Stopped),
            Err(err) if no_leader && began.elapsed() < patience => {
                tracing::debug!(error = %err, "the cluster to join has no leader yet");
                tokio::time::sleep(JOIN_RETRY).await;
            }
            tried => return tried,
        }
    }
}

/// The identity of a member that is enlisted, once a member has said that it is one still.
///
/// # Errors
/// `Removed`, when it is none any more: it was put out before it has come. `Config`, when it has been up before, with data that it has lost.
/// `Unavailable`, when the start was given up before anyone had said so.
pub(super) async fn join_enlisted(
    config: &Config,
    enlistment: &Enlistment,
    tls: &Option<Connector>,
    given_up: &(dyn Fn() -> bool + Sync),
) -> Result<Identity> {
    let Enlistment { member, cluster, at } = enlistment;
    let mut told: Option<Instant> = None;
    loop {
        let asked = at.iter().map(|url| async move { (url, network::members_at(url, tls).await) });
        let mut tried = Vec::new();
        for (url, answer) in futures_util::future::join_all(asked).await {
            match answer {
                Ok(there) if there.cluster_id != *cluster => tried.push(format!("{url}: it belongs to cluster {:x}", there.cluster_id)),
                // It may be from before this member was enlisted.
                Ok(there) if !there.newest => tried.push(format!("{url}: it does not know of a leader")),
                Ok(there) => match there.members.iter().find(|other| other.id == *member) {
                    None => return Err(Error::Removed),
                    Some(other) if other.published || other.votes => return Err(bootstrapped(*member)),
                    Some(_) => {
                        let name = config.name.clone();
                        return Ok(Identity { cluster_id: *cluster, member_id: *member, name, joined: true, incarnation: 0 });
                    }
                },
                Err(status) => tried.push(status.message().to_owned()),
            }
        }
        if given_up() {
            return Err(Error::Unavailable(format!("no member of the cluster that this one is enlisted for: {}", tried.join("; "))));
        }
        if told.is_none_or(|told| told.elapsed() >= JOIN_TELL) {
            tracing::warn!(tried = tried.join("; "), "this member is enlisted, and no member of its cluster answers yet: asking on");
            told = Some(Instant::now());
        }
        tokio::time::sleep(JOIN_RETRY).await;
    }
}

/// Asks each of the members once. Notes whether one of them is there and knows of no leader.
async fn try_to_join(config: &Config, tls: &Option<Connector>, no_leader: &mut bool) -> Result<Identity> {
    let told = config.initial_members()?;
    let others = told.iter().filter(|(name, _)| *name != config.name).flat_map(|(_, urls)| urls);
    let (mut tried, mut unlike) = (Vec::new(), None);
    for url in others {
        match network::members_at(&url.to_string(), tls).await {
            // What it knows may be from before this member was added, or was up.
            Ok(there) if !there.newest => {
                *no_leader = true;
                tried.push(format!("{url}: it does not know of a leader"));
            }
            // One that lags may not know of this member yet.
            Ok(there) => match place(config, &told, &there) {
                Ok(identity) => return Ok(identity),
                Err(err) => unlike = Some(err),
            },
            Err(err) => tried.push(format!("{url}: {}", err.message())),
        }
    }
    if let Some(err) = unlike {
        *no_leader = false;
        return Err(err);
    }
    let what = "could not retrieve cluster information from the given URLs";
    Err(Error::Config(format!("cannot fetch cluster info from peer urls: {what}: {}", tried.join("; "))))
}

/// Finds a joining member's place: as many members here as there, each with the same URLs.
fn place(config: &Config, told: &[(String, Vec<Url>)], there: &MembersResponse) -> Result<Identity> {
    let list = |members: &mut dyn Iterator<Item = String>| members.collect::<Vec<_>>().join(", ");
    let wrong = |what: String| {
        let known = list(&mut there.members.iter().map(|member| format!("{:x} {}={}", member.id, member.name, member.peer_urls.join(","))));
        Err(Error::Config(format!(
            "error validating peerURLs of initial-cluster {:?}: {what}; the cluster has {known}",
            config.initial_cluster
        )))
    };
    if told.len() != there.members.len() {
        return wrong(format!("member count is unequal: {} here, {} there", told.len(), there.members.len()));
    }
    let mut ours = None;
    for member in &there.members {
        let urls: Vec<Url> = member.peer_urls.iter().filter_map(|url| url.parse().ok()).collect();
        let all_among = |some: &[Url], others: &[Url]| some.iter().all(|url| others.iter().any(|other| url.may_be_same_place(other)));
        let found = told.iter().find(|(_, told)| all_among(told, &urls) && all_among(&urls, told));
        match found {
            Some((name, _)) if *name == config.name => ours = Some(member),
            Some(_) => {}
            None => {
                return wrong(format!("PeerURLs: no match found for existing member ({:x}, [{}])", member.id, member.peer_urls.join(" ")));
            }
        }
    }
    match ours {
        Some(member) if member.published || member.votes => Err(bootstrapped(member.id)),
        Some(member) => {
            let name = config.name.clone();
            Ok(Identity { cluster_id: there.cluster_id, member_id: member.id, name, joined: true, incarnation: 0 })
        }
        None => wrong(format!("no member has the URLs of {:?}", config.name)),
    }
}

/// A member that has voted and acknowledged before would break its word without what it wrote then.
fn bootstrapped(id: u64) -> Error {
    Error::Config(format!("member {id:x} has already been bootstrapped: remove it, and add it anew"))
}

/// Sees to it that a founder whose directory is empty has not founded the cluster before, and lost what it had. Who else is to found it is
/// asked; those who are not there yet, as when all start for the first time, say nothing.
///
/// # Errors
/// `Config`, when one of them knows the cluster as founded.
pub(super) async fn check_not_founded(config: &Config, ours: &Identity, tls: &Option<Connector>) -> Result<()> {
    let told = config.initial_members()?;
    let others = told.iter().filter(|(name, _)| *name != config.name).flat_map(|(_, urls)| urls);
    let asked = others.map(|url| async move { network::members_at(&url.to_string(), tls).await });
    let answers = futures_util::future::join_all(asked).await;
    for there in answers.into_iter().flatten().filter(|there| there.cluster_id == ours.cluster_id) {
        let found = there.members.iter().find(|member| member.id == ours.member_id);
        match found {
            Some(member) if member.published => return Err(bootstrapped(ours.member_id)),
            // Listed from its beginning, unless it was removed.
            None if !there.members.is_empty() => return Err(bootstrapped(ours.member_id)),
            _ => {}
        }
    }
    Ok(())
}

fn first_u64(digest: &[u8]) -> u64 {
    let first = digest.iter().take(8).fold(0, |id, byte| id << 8 | u64::from(*byte));
    // 0 stands for nobody.
    first.max(1)
}
