//! The agreement's messages on the wire, and who may send them.
//!
//! A question goes out in an envelope and its answer comes back in one. With a shared token both are sealed: an HMAC-SHA256 over all that
//! is in the envelope. A node with a token takes nothing that is not sealed with it, and an answer only if it belongs to the question
//! that was just asked, by its nonce. A node without a token takes what comes.
//!
//! What is meant for one node names it, so that a message that was recorded is of no use against a node whose disk is new: that has
//! another id. Hello and Present alone are meant for whoever is there. What a recorded message could do a second time is asked for with
//! something that counts once: an order with a ticket, an enlistment with an entry of the log.
//!
//! ```text
//! seal = HMAC(token, version | kind | len(to) to | len(nonce) nonce | len(body) body)      kind: question or answer
//! ```

use bytes::Bytes;
use prost::Message;
use sha2::{Digest, Sha256};
use tonic::Status;

use super::agree::{Answer, Ask, Ballot, Candidate, Decision, Grant, JOIN_MAX, Known, NodeId, NodeStanding, Order, Refusal};
use crate::proto::founding as wire;
use crate::proto::founding::order::Order as Ordered;
use crate::proto::founding::question::Question as Asked;
use crate::proto::founding::reply::Reply as Said;

/// Version of the messages.
const VERSION: u32 = 1;

/// Servers that a message may name; a cluster has three, and may be told with some more while it changes. A message with more is refused.
const SERVERS_MAX: usize = 32;

/// Bytes of a URL, or of a server's name. A message with a longer one is refused.
const TEXT_MAX: usize = 1024;

/// Bytes of a node's name. A longer one is refused, in the configuration and in a message.
const NAME_MAX: usize = 200;

/// Whether a node may be called so. Founders are told to the server in a list, `name=url,name=url`, whose parts lose the blanks around them:
/// one name that does not come out of it as it went in, and no founder could start its server.
pub(crate) fn is_name(name: &str) -> bool {
    let fits = |c: char| !c.is_control() && c != ',' && c != '=';
    (1..=NAME_MAX).contains(&name.len()) && name.trim() == name && name.chars().all(fits)
}

/// The secret that all nodes of a platform share. Never shown.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Token(Vec<u8>);

impl Token {
    /// A token; an empty one is none.
    pub fn new(secret: impl Into<Vec<u8>>) -> Token {
        Token(secret.into())
    }

    /// Whether there is one.
    pub fn is_set(&self) -> bool {
        !self.0.is_empty()
    }
}

impl std::fmt::Debug for Token {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(if self.is_set() { "(hidden)" } else { "none" })
    }
}

#[derive(Clone, Copy)]
enum Kind {
    Question = 1,
    Reply = 2,
}

fn seal(token: &Token, kind: Kind, envelope: &wire::Envelope) -> Bytes {
    if !token.is_set() {
        return Bytes::new();
    }
    let mut text = envelope.version.to_be_bytes().to_vec();
    text.push(kind as u8);
    for part in [&envelope.to, &envelope.nonce, &envelope.body] {
        text.extend((part.len() as u64).to_be_bytes());
        text.extend_from_slice(part);
    }
    Bytes::copy_from_slice(&hmac(&token.0, &text))
}

/// HMAC-SHA256, RFC 2104.
fn hmac(key: &[u8], text: &[u8]) -> [u8; 32] {
    const BLOCK: usize = 64;
    let mut block = [0u8; BLOCK];
    let short = if key.len() > BLOCK { Sha256::digest(key).to_vec() } else { key.to_vec() };
    block.iter_mut().zip(short).for_each(|(to, from)| *to = from);
    let pad = |with: u8| block.map(|byte| byte ^ with);
    let inner = Sha256::new().chain_update(pad(0x36)).chain_update(text).finalize();
    Sha256::new().chain_update(pad(0x5c)).chain_update(inner).finalize().into()
}

/// Checks the seal, in the same time whatever of it is wrong.
fn check(token: &Token, kind: Kind, envelope: &wire::Envelope) -> Result<(), Status> {
    if envelope.version > VERSION {
        return Err(Status::failed_precondition(format!("founding messages of version {} are newer than {VERSION}", envelope.version)));
    }
    if !token.is_set() {
        return Ok(());
    }
    if envelope.seal.is_empty() {
        return Err(Status::unauthenticated(
            "the message is not sealed: one of the two has a shared token (KV_TOKEN), and the other has none",
        ));
    }
    let ours = seal(token, kind, envelope);
    let differ = ours.len() != envelope.seal.len() || ours.iter().zip(&envelope.seal).fold(0, |all, (a, b)| all | (a ^ b)) != 0;
    if differ { Err(Status::unauthenticated("the seal does not match: the other node has another shared token")) } else { Ok(()) }
}

/// Puts a question into an envelope. `to` is the node that is meant, if any one is.
pub(crate) fn question(token: &Token, to: Option<NodeId>, ask: &Ask) -> wire::Envelope {
    let question = match ask {
        Ask::Hello => Asked::Hello(wire::Hello {}),
        Ask::Prepare { list, ballot } => Asked::Prepare(wire::Prepare { list: id(*list), ballot: Some(ballot_to(ballot)) }),
        Ask::Accept { list, ballot, decision } => {
            Asked::Accept(wire::Accept { list: id(*list), proposal: Some(proposal_to(ballot, decision)) })
        }
        Ask::Decided { decision } => Asked::Decided(decision_to(decision)),
        Ask::Present { from } => Asked::Present(wire::Present {
            from: from.as_ref().map(|(_, who)| candidate_to(who)),
            cluster: from.as_ref().map_or_else(Bytes::new, |(cluster, _)| id(*cluster)),
        }),
        Ask::Enlist { known, grant: Grant { member, cluster, since } } => {
            Asked::Enlist(wire::Enlist { member: *member, cluster: *cluster, since: *since, known: Some(known_to(known)) })
        }
        Ask::Order { ticket, order } => Asked::Order(wire::Order { ticket: id(*ticket), order: Some(order_to(order)) }),
    };
    let body = wire::Question { question: Some(question) }.encode_to_vec().into();
    let nonce = Bytes::copy_from_slice(&rand::random::<[u8; 16]>());
    let to = to.map_or_else(Bytes::new, |to| id(to.0));
    let mut envelope = wire::Envelope { version: VERSION, to, body, nonce, seal: Bytes::new() };
    envelope.seal = seal(token, Kind::Question, &envelope);
    envelope
}

/// Takes a question out of its envelope, as node `own`.
///
/// # Errors
/// That it is not sealed as it should be, is meant for another node, or makes no sense.
pub(crate) fn open_question(token: &Token, own: NodeId, envelope: &wire::Envelope) -> Result<Ask, Status> {
    check(token, Kind::Question, envelope)?;
    let question = wire::Question::decode(envelope.body.clone()).map_err(|err| Status::invalid_argument(err.to_string()))?.question;
    let is_for_all = matches!(question, Some(Asked::Hello(_) | Asked::Present(_)));
    if !is_for_all && from_id(&envelope.to) != Some(own.0) {
        return Err(Status::failed_precondition(format!("this is node {own}, and another is meant")));
    }
    let read = || {
        Some(match question? {
            Asked::Hello(_) => Ask::Hello,
            Asked::Prepare(prepare) => Ask::Prepare { list: from_id(&prepare.list)?, ballot: ballot_from(prepare.ballot?)? },
            Asked::Accept(accept) => {
                let (ballot, decision) = proposal_from(accept.proposal?)?;
                Ask::Accept { list: from_id(&accept.list)?, ballot, decision }
            }
            Asked::Decided(decision) => Ask::Decided { decision: decision_from(decision)? },
            Asked::Present(wire::Present { from: None, .. }) => Ask::Present { from: None },
            Asked::Present(wire::Present { from: Some(who), cluster }) => {
                Ask::Present { from: Some((from_id(&cluster)?, candidate_from(who)?)) }
            }
            Asked::Enlist(wire::Enlist { member, cluster, since, known }) => {
                Ask::Enlist { known: known_from(known?)?, grant: Grant { member, cluster, since } }
            }
            Asked::Order(order) => Ask::Order { ticket: from_id(&order.ticket)?, order: order_from(order.order?)? },
        })
    };
    read().ok_or_else(|| Status::invalid_argument("a founding message that makes no sense"))
}

/// Puts an answer into an envelope, for the question it belongs to.
pub(crate) fn reply(token: &Token, question: &wire::Envelope, answer: &Answer) -> wire::Envelope {
    let said = match answer {
        Answer::Unbound { who, list, listed, servers } => {
            let (listed, servers) = (u32::try_from(*listed).unwrap_or(u32::MAX), u32::try_from(*servers).unwrap_or(u32::MAX));
            Said::Unbound(wire::Unbound { who: Some(candidate_to(who)), list: id(*list), listed, servers })
        }
        Answer::Promise { who, ballot, accepted } => Said::Promise(wire::Promise {
            who: Some(candidate_to(who)),
            ballot: Some(ballot_to(ballot)),
            accepted: accepted.as_ref().map(|(ballot, decision)| proposal_to(ballot, decision)),
        }),
        Answer::Accepted { ballot, .. } => Said::Accepted(ballot_to(ballot)),
        Answer::Refused { ballot, promised, .. } => {
            Said::Refused(wire::Refused { ballot: Some(ballot_to(ballot)), promised: Some(ballot_to(promised)) })
        }
        Answer::Bound { known, .. } => Said::Bound(known_to(known)),
        Answer::Removed { .. } => Said::Removed(wire::Hello {}),
        Answer::Present { who, standing, known, ticket } => Said::Presented(wire::Presented {
            who: Some(candidate_to(who)),
            standing: match standing {
                NodeStanding::Client => 1,
                NodeStanding::Enlisted => 2,
                NodeStanding::Server => 3,
            },
            known: Some(known_to(known)),
            ticket: id(*ticket),
        }),
        Answer::Enlisted { .. } => Said::Enlisted(wire::Hello {}),
        Answer::Ordered { outcome, .. } => {
            let failure = outcome.as_ref().err().cloned().map(|Refusal { reason, what }| wire::OrderFailure { reason, what });
            Said::Ordered(wire::Ordered { failure })
        }
    };
    let body = wire::Reply { who: id(answer.who().0), reply: Some(said) }.encode_to_vec().into();
    let mut envelope = wire::Envelope { version: VERSION, to: Bytes::new(), body, nonce: question.nonce.clone(), seal: Bytes::new() };
    envelope.seal = seal(token, Kind::Reply, &envelope);
    envelope
}

/// Takes an answer out of its envelope, which must belong to the question.
///
/// # Errors
/// As [`open_question`].
pub(crate) fn open_reply(token: &Token, question: &wire::Envelope, envelope: &wire::Envelope) -> Result<Answer, Status> {
    check(token, Kind::Reply, envelope)?;
    if envelope.nonce != question.nonce {
        return Err(Status::unauthenticated("an answer to another question"));
    }
    let reply = wire::Reply::decode(envelope.body.clone()).map_err(|err| Status::invalid_argument(err.to_string()))?;
    let read = || {
        let who = NodeId(from_id(&reply.who)?);
        let answer = match reply.reply? {
            Said::Unbound(unbound) => Answer::Unbound {
                who: candidate_from(unbound.who?)?,
                list: from_id(&unbound.list)?,
                listed: unbound.listed as usize,
                servers: unbound.servers as usize,
            },
            Said::Promise(promise) => Answer::Promise {
                who: candidate_from(promise.who?)?,
                ballot: ballot_from(promise.ballot?)?,
                accepted: match promise.accepted {
                    Some(accepted) => Some(proposal_from(accepted)?),
                    None => None,
                },
            },
            Said::Accepted(ballot) => Answer::Accepted { who, ballot: ballot_from(ballot)? },
            Said::Refused(refused) => {
                Answer::Refused { who, ballot: ballot_from(refused.ballot?)?, promised: ballot_from(refused.promised?)? }
            }
            Said::Bound(known) => Answer::Bound { who, known: known_from(known)? },
            Said::Removed(_) => Answer::Removed { who },
            Said::Presented(wire::Presented { who, standing, known, ticket }) => Answer::Present {
                who: candidate_from(who?)?,
                standing: match standing {
                    1 => NodeStanding::Client,
                    2 => NodeStanding::Enlisted,
                    3 => NodeStanding::Server,
                    _ => return None,
                },
                known: known_from(known?)?,
                ticket: from_id(&ticket)?,
            },
            Said::Enlisted(_) => Answer::Enlisted { who },
            Said::Ordered(wire::Ordered { failure }) => Answer::Ordered {
                who,
                outcome: match failure {
                    None => Ok(()),
                    Some(wire::OrderFailure { reason, what }) => Err(Refusal { reason, what }),
                },
            },
        };
        (answer.who() == who).then_some(answer)
    };
    read().ok_or_else(|| Status::invalid_argument("a founding message that makes no sense"))
}

fn id(id: u128) -> Bytes {
    Bytes::copy_from_slice(&id.to_be_bytes())
}

fn from_id(bytes: &[u8]) -> Option<u128> {
    bytes.try_into().ok().map(u128::from_be_bytes)
}

fn ballot_to(ballot: &Ballot) -> wire::Ballot {
    wire::Ballot { round: ballot.round, by: id(ballot.by.0) }
}

/// A round near the end of the numbers would leave no room for another: nobody has come there honestly.
fn ballot_from(ballot: wire::Ballot) -> Option<Ballot> {
    (ballot.round < u64::MAX / 2).then_some(Ballot { round: ballot.round, by: NodeId(from_id(&ballot.by)?) })
}

fn candidate_to(candidate: &Candidate) -> wire::Candidate {
    let Candidate { node, name, peer_url, client_url } = candidate.clone();
    wire::Candidate { node: id(node.0), name, peer_url, client_url }
}

/// One that founds, or may.
fn candidate_from(candidate: wire::Candidate) -> Option<Candidate> {
    server_from(candidate).filter(|candidate| is_name(&candidate.name))
}

/// A server as the membership has it, whatever it is called there: it may have come by another way than founding.
fn server_from(candidate: wire::Candidate) -> Option<Candidate> {
    let wire::Candidate { node, name, peer_url, client_url } = candidate;
    let fits = [&name, &peer_url, &client_url].iter().all(|text| text.len() <= TEXT_MAX);
    let are_urls = [&peer_url, &client_url].iter().all(|url| url.parse::<crate::config::Url>().is_ok());
    (fits && are_urls).then_some(Candidate { node: NodeId(from_id(&node)?), name, peer_url, client_url })
}

fn all_from(candidates: Vec<wire::Candidate>, one_from: fn(wire::Candidate) -> Option<Candidate>) -> Option<Vec<Candidate>> {
    let some = (1..=SERVERS_MAX.min(JOIN_MAX)).contains(&candidates.len());
    some.then_some(())?;
    candidates.into_iter().map(one_from).collect()
}

fn decision_to(decision: &Decision) -> wire::Decision {
    wire::Decision { cluster: id(decision.cluster), founders: decision.founders.iter().map(candidate_to).collect() }
}

fn decision_from(decision: wire::Decision) -> Option<Decision> {
    Some(Decision { cluster: from_id(&decision.cluster)?, founders: all_from(decision.founders, candidate_from)? })
}

fn proposal_to(ballot: &Ballot, decision: &Decision) -> wire::Proposal {
    wire::Proposal { ballot: Some(ballot_to(ballot)), decision: Some(decision_to(decision)) }
}

fn proposal_from(proposal: wire::Proposal) -> Option<(Ballot, Decision)> {
    Some((ballot_from(proposal.ballot?)?, decision_from(proposal.decision?)?))
}

fn known_to(known: &Known) -> wire::Known {
    wire::Known {
        decision: Some(decision_to(&known.decision)),
        servers: known.servers.iter().map(candidate_to).collect(),
        as_of: known.as_of,
    }
}

fn order_to(order: &Order) -> Ordered {
    match order.clone() {
        Order::Grow { nodes } => Ordered::Grow(wire::Grow { nodes }),
        Order::Replace { server, by, even_alive } => Ordered::Replace(wire::Replace { server, by, even_alive }),
        Order::Remove { server } => Ordered::Remove(server),
    }
}

fn order_from(order: Ordered) -> Option<Order> {
    let fits = |text: &String| !text.is_empty() && text.len() <= TEXT_MAX;
    match order {
        Ordered::Grow(wire::Grow { nodes }) => {
            let some = (1..=SERVERS_MAX).contains(&nodes.len()) && nodes.iter().all(fits);
            some.then_some(Order::Grow { nodes })
        }
        Ordered::Replace(wire::Replace { server, by, even_alive }) => {
            (fits(&server) && fits(&by)).then_some(Order::Replace { server, by, even_alive })
        }
        Ordered::Remove(server) => fits(&server).then_some(Order::Remove { server }),
    }
}

fn known_from(known: wire::Known) -> Option<Known> {
    Some(Known { decision: decision_from(known.decision?)?, servers: all_from(known.servers, server_from)?, as_of: known.as_of })
}

#[cfg(test)]
mod tests {
    use super::super::agree::candidate;
    use super::*;

    fn decision() -> Decision {
        Decision { cluster: 77, founders: vec![candidate(1), candidate(2), candidate(3)] }
    }

    fn asks() -> Vec<Ask> {
        let ballot = Ballot { round: 3, by: NodeId(1) };
        vec![
            Ask::Hello,
            Ask::Prepare { list: 5, ballot },
            Ask::Accept { list: 5, ballot, decision: decision() },
            Ask::Decided { decision: decision() },
            Ask::Present { from: None },
            Ask::Present { from: Some((77, candidate(3))) },
            Ask::Enlist { known: known(), grant: Grant { member: u64::MAX, cluster: 1, since: 2 } },
            Ask::Order { ticket: 4, order: Order::Grow { nodes: vec!["a:1".into(), "b:2".into()] } },
            Ask::Order { ticket: 4, order: Order::Replace { server: "n1".into(), by: "b:2".into(), even_alive: true } },
            Ask::Order { ticket: 4, order: Order::Remove { server: "n1".into() } },
        ]
    }

    fn known() -> Known {
        Known { decision: decision(), servers: vec![candidate(4)], as_of: 12 }
    }

    fn answers() -> Vec<Answer> {
        let (who, ballot) = (NodeId(2), Ballot { round: 3, by: NodeId(1) });
        let known = known();
        vec![
            Answer::Unbound { who: candidate(2), list: 5, listed: 3, servers: 1 },
            Answer::Promise { who: candidate(2), ballot, accepted: None },
            Answer::Promise { who: candidate(2), ballot, accepted: Some((ballot, decision())) },
            Answer::Accepted { who, ballot },
            Answer::Refused { who, ballot, promised: Ballot { round: 4, by: NodeId(9) } },
            Answer::Present { who: candidate(2), standing: NodeStanding::Enlisted, known: known.clone(), ticket: 5 },
            Answer::Bound { who, known },
            Answer::Removed { who },
            Answer::Enlisted { who },
            Answer::Ordered { who, outcome: Ok(()) },
            Answer::Ordered { who, outcome: Err(Refusal { reason: "Busy".into(), what: "n1".into() }) },
        ]
    }

    #[test]
    fn what_is_sent_is_received() {
        for token in [Token::default(), Token::new("secret")] {
            for ask in asks() {
                let envelope = question(&token, Some(NodeId(2)), &ask);
                assert_eq!(open_question(&token, NodeId(2), &envelope).unwrap(), ask);
                for answer in answers() {
                    let reply = reply(&token, &envelope, &answer);
                    assert_eq!(open_reply(&token, &envelope, &reply).unwrap(), answer);
                }
            }
        }
    }

    /// One node with such a name would keep all founders from starting their servers.
    #[test]
    fn names_that_no_server_could_have_are_refused() {
        let token = Token::default();
        let envelope = question(&token, None, &Ask::Hello);
        for (name, good) in [("a b", true), ("", false), (" a", false), ("a\t", false), ("a,b", false), ("a=b", false), ("a\u{a0}", false)]
        {
            let who = Candidate { name: name.into(), ..candidate(2) };
            let reply = reply(&token, &envelope, &Answer::Unbound { who, list: 5, listed: 3, servers: 1 });
            assert_eq!(open_reply(&token, &envelope, &reply).is_ok(), good, "{name:?}");
        }
        // A server is called as it is: it may have been added by hand, or have a part of its id behind a long name.
        for (name, good) in [("a,b", true), (&*"n".repeat(NAME_MAX + 9), true), (&*"n".repeat(TEXT_MAX + 1), false)] {
            let servers = vec![Candidate { name: name.into(), ..candidate(4) }];
            let known = Known { decision: decision(), servers, as_of: 12 };
            let reply = reply(&token, &envelope, &Answer::Bound { who: NodeId(2), known });
            assert_eq!(open_reply(&token, &envelope, &reply).is_ok(), good);
        }
        let long = "n".repeat(NAME_MAX);
        assert!(is_name(&long) && !is_name(&format!("{long}n")));
    }

    #[test]
    fn strangers_are_refused() {
        let (token, none) = (Token::new("secret"), Token::default());
        let ask = Ask::Decided { decision: decision() };
        let refused = |envelope: &wire::Envelope| open_question(&token, NodeId(2), envelope).unwrap_err().message().to_owned();
        assert!(refused(&question(&none, Some(NodeId(2)), &ask)).contains("and the other has none"));
        assert!(refused(&question(&Token::new("other"), Some(NodeId(2)), &ask)).contains("another shared token"));
        // One that was meant for the node that was here before its disk was wiped.
        assert!(refused(&question(&token, Some(NodeId(1)), &ask)).contains("another is meant"));
        assert!(refused(&question(&token, None, &ask)).contains("another is meant"));
        let good = question(&token, Some(NodeId(2)), &ask);
        for change in 0..3 {
            let mut bad = good.clone();
            let part = [&mut bad.to, &mut bad.body, &mut bad.nonce].into_iter().nth(change).unwrap();
            let mut bytes = part.to_vec();
            bytes[0] ^= 1;
            *part = bytes.into();
            assert!(refused(&bad).contains("seal"), "part {change}");
        }
        // An answer to another question; and a question that is sent back as an answer.
        let answer = &answers()[3];
        let other = reply(&token, &question(&token, None, &Ask::Hello), answer);
        assert!(open_reply(&token, &good, &other).is_err() && open_reply(&token, &good, &good).is_err());
        let newer = wire::Envelope { version: VERSION + 1, ..good };
        assert!(refused(&newer).contains("newer"));
    }

    #[test]
    fn the_token_is_not_shown() {
        assert!(!format!("{:?}", Token::new("secret")).contains("secret"));
    }

    /// RFC 4231, cases 1, 2 and 6.
    #[test]
    fn hmac_is_the_standard_one() {
        let hex = |bytes: [u8; 32]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
        for (key, text, want) in [
            (vec![0x0b; 20], "Hi There", "b0344c61d8db38535ca8afceaf0bf12b881dc200c9833da726e9376c2e32cff7"),
            (b"Jefe".to_vec(), "what do ya want for nothing?", "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843"),
            (
                vec![0xaa; 131],
                "Test Using Larger Than Block-Size Key - Hash Key First",
                "60e431591ee0b67f0d8a26aacbf5b77f8e0bc6213728c5140546040f0ee37f54",
            ),
        ] {
            assert_eq!(hex(hmac(&key, text.as_bytes())), want);
        }
    }
}
