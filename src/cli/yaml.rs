//! The configuration file: YAML, of which JSON is a part, with etcd's keys.
//!
//! The keys are the flags' names in any case, with the TLS settings one level down in `client-transport-security` and
//! `peer-transport-security`. [`entries`] makes of each key the flag and the text that the flag would have been given, so that a file, a
//! variable and a flag are read by one and the same code.
//!
//! As in etcd: what is null, or an empty text, leaves the default; a key that comes twice counts with its last value; an unknown key is no
//! error (here a warning names it). Beyond etcd: times may be written as on the command line, not only in nanoseconds, and lists of URLs as
//! lists.

use serde::de::{Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};

use super::flags::{self, Flag, Kind};
use super::{Given, Note};
use crate::error::{Error, Result};

/// Deepest nesting in a file; beyond it the file is refused. etcd's own keys need three.
const DEPTH_MAX: usize = 8;

/// Most values in a file, aliases resolved; beyond it the file is refused, as an alias bomb would be.
const NODES_MAX: usize = 10_000;

/// Settings that are one level down, and the name of the flag for each.
#[rustfmt::skip]
const SECTIONS: &[(&str, &[(&str, &str)])] = &[
    ("client-transport-security", &[
        ("cert-file", "cert-file"), ("key-file", "key-file"), ("client-cert-file", "client-cert-file"), ("client-key-file", "client-key-file"),
        ("client-cert-auth", "client-cert-auth"), ("trusted-ca-file", "trusted-ca-file"), ("auto-tls", "auto-tls"),
        ("allowed-cn", "client-cert-allowed-cn"), ("allowed-hostname", "client-cert-allowed-hostname"),
    ]),
    ("peer-transport-security", &[
        ("cert-file", "peer-cert-file"), ("key-file", "peer-key-file"), ("client-cert-file", "peer-client-cert-file"),
        ("client-key-file", "peer-client-key-file"), ("client-cert-auth", "peer-client-cert-auth"), ("trusted-ca-file", "peer-trusted-ca-file"),
        ("auto-tls", "peer-auto-tls"), ("allowed-cn", "peer-cert-allowed-cn"), ("allowed-hostname", "peer-cert-allowed-hostname"),
        ("skip-client-san-verification", "peer-skip-client-san-verification"),
    ]),
    ("socket-options", &[("reuse-port", "socket-reuse-port"), ("reuse-address", "socket-reuse-address")]),
    ("discovery-config", &[("token", "discovery-token"), ("endpoints", "discovery-endpoints")]),
];

/// A YAML value. Keys of maps that are not texts are written as texts.
#[derive(Debug, PartialEq)]
enum Node {
    Null,
    Bool(bool),
    Int(i128),
    Float(f64),
    Text(String),
    List(Vec<Node>),
    Map(Vec<(String, Node)>),
}

/// What the file gives to which flag, in order, and remarks for the log.
pub(super) fn entries(text: &str) -> Result<(Vec<Given>, Vec<Note>)> {
    let root = root(text)?;
    let (mut given, mut notes) = (Vec::new(), Vec::new());
    for (key, node) in root {
        let name = key.to_ascii_lowercase();
        if let Some((section, keys)) = SECTIONS.iter().find(|(section, _)| *section == name) {
            let inside = match node {
                Node::Null => Vec::new(),
                Node::Map(inside) => inside,
                _ => return Err(Error::Config(format!("{section} must hold keys and values"))),
            };
            for (key, node) in inside {
                let spelled = format!("{section}.{}", key.to_ascii_lowercase());
                let flag = keys.iter().find(|(inner, _)| key.eq_ignore_ascii_case(inner)).and_then(|(_, name)| flags::find(name));
                push(flag, spelled, node, &mut given, &mut notes)?;
            }
        } else {
            let flag = flags::find(&name).filter(|(flag, _)| !matches!(flag.act, flags::Act::Command));
            push(flag, name, node, &mut given, &mut notes)?;
        }
    }
    // The last of a repeated key wins, as it does by being applied last.
    Ok((given, notes))
}

/// The keys of a file and what each has, within the limits.
fn root(text: &str) -> Result<Vec<(String, Node)>> {
    let options = serde_saphyr::options! {
        budget: serde_saphyr::budget! { max_depth: DEPTH_MAX, max_nodes: NODES_MAX, max_documents: 2 },
        duplicate_keys: serde_saphyr::options::DuplicateKeyPolicy::LastWins,
        with_snippet: false,
    };
    match serde_saphyr::from_str_with_options::<Node>(text, options) {
        Ok(Node::Map(entries)) => Ok(entries),
        Ok(Node::Null) => Ok(Vec::new()),
        Ok(_) => Err(Error::Config("the configuration file must hold keys and values, such as name: node-1".into())),
        Err(serde_saphyr::Error::MultipleDocuments { .. }) => {
            Err(Error::Config("the configuration file has more than one document in it; leave one".into()))
        }
        Err(error) => Err(Error::Config(format!("the configuration file is not YAML: {error}"))),
    }
}

/// The keys of a file with a plain value each, as texts; lists with commas. A key that comes twice is there twice. `None`: the default.
pub(crate) fn plain_entries(text: &str) -> Result<Vec<(String, Option<String>)>> {
    fn plain(node: Node) -> Option<String> {
        match node {
            Node::Bool(value) => Some(value.to_string()),
            Node::Int(value) => Some(value.to_string()),
            Node::Float(value) => Some(value.to_string()),
            Node::Text(text) => Some(text),
            Node::Null | Node::List(_) | Node::Map(_) => None,
        }
    }
    let entries = root(text)?.into_iter().map(|(key, node)| {
        let value = match node {
            Node::Null => Some(None),
            Node::List(items) => items.into_iter().map(plain).collect::<Option<Vec<_>>>().map(|items| Some(items.join(","))),
            node => plain(node).map(Some),
        };
        let value =
            value.ok_or_else(|| Error::Config(format!("invalid value for {key}: it must be a text, a number or a list of them")))?;
        Ok((key, value))
    });
    entries.collect()
}

fn push(flag: Option<(&'static Flag, bool)>, spelled: String, node: Node, given: &mut Vec<Given>, notes: &mut Vec<Note>) -> Result<()> {
    let Some((flag, is_old)) = flag else {
        let near =
            flags::nearest(&spelled).filter(|name| *name != spelled).map(|name| format!("; did you mean {name}?")).unwrap_or_default();
        notes.push(Note::warning(format!("unknown key in the configuration file, ignored: {spelled}{near}")));
        return Ok(());
    };
    match text_of(flag.kind, node) {
        Ok(None) => Ok(()),
        Ok(Some(value)) => {
            given.push(Given { flag, spelled, value, is_old });
            Ok(())
        }
        Err(right) => Err(Error::Config(format!("invalid value for {spelled}: it must be {right}"))),
    }
}

/// The value as it would be written on the command line; `None` leaves the default. The error says what the value must be.
fn text_of(kind: Kind, node: Node) -> std::result::Result<Option<String>, &'static str> {
    // Whole floats up to this are exact.
    const FLOAT_EXACT_MAX: f64 = 9_007_199_254_740_992.0;
    let text = match (kind, node) {
        (_, Node::Null) => return Ok(None),
        (_, Node::Text(text)) if text.is_empty() => return Ok(None),
        (Kind::Bool, Node::Bool(value)) => value.to_string(),
        (Kind::Bool, _) => return Err("true or false"),
        (Kind::Number | Kind::Amount, Node::Int(value)) => value.to_string(),
        (Kind::Number, Node::Float(value)) if value.fract() == 0.0 && value.abs() <= FLOAT_EXACT_MAX => format!("{value:.0}"),
        (Kind::Number, _) => return Err("a whole number without quotes"),
        (Kind::Duration, Node::Int(nanos)) => format!("{nanos}ns"),
        (Kind::Duration, Node::Text(text)) => text,
        (Kind::Duration, _) => return Err("a time such as 5m30s, or nanoseconds"),
        (Kind::Text | Kind::Amount | Kind::List, Node::Text(text)) => text,
        (Kind::Text, _) => return Err("a text; put it in quotes"),
        (Kind::Amount, _) => return Err("a number or a text such as 5m"),
        (Kind::List, Node::List(items)) => {
            let texts = items.into_iter().map(|item| match item {
                Node::Text(text) => Ok(text),
                _ => Err("a list of texts"),
            });
            texts.collect::<std::result::Result<Vec<_>, _>>()?.join(",")
        }
        (Kind::List, _) => return Err("a text, with commas between its parts, or a list of texts"),
    };
    Ok(Some(text))
}

impl<'de> Deserialize<'de> for Node {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        deserializer.deserialize_any(NodeVisitor)
    }
}

struct NodeVisitor;

impl<'de> Visitor<'de> for NodeVisitor {
    type Value = Node;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("any value")
    }

    fn visit_unit<E>(self) -> std::result::Result<Node, E> {
        Ok(Node::Null)
    }

    fn visit_none<E>(self) -> std::result::Result<Node, E> {
        Ok(Node::Null)
    }

    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> std::result::Result<Node, D::Error> {
        Node::deserialize(deserializer)
    }

    fn visit_bool<E>(self, value: bool) -> std::result::Result<Node, E> {
        Ok(Node::Bool(value))
    }

    fn visit_i64<E>(self, value: i64) -> std::result::Result<Node, E> {
        Ok(Node::Int(value.into()))
    }

    fn visit_u64<E>(self, value: u64) -> std::result::Result<Node, E> {
        Ok(Node::Int(value.into()))
    }

    fn visit_i128<E>(self, value: i128) -> std::result::Result<Node, E> {
        Ok(Node::Int(value))
    }

    fn visit_u128<E>(self, value: u128) -> std::result::Result<Node, E> {
        Ok(i128::try_from(value).map(Node::Int).unwrap_or(Node::Float(f64::INFINITY)))
    }

    fn visit_f64<E>(self, value: f64) -> std::result::Result<Node, E> {
        Ok(Node::Float(value))
    }

    fn visit_str<E>(self, value: &str) -> std::result::Result<Node, E> {
        Ok(Node::Text(value.to_owned()))
    }

    fn visit_string<E>(self, value: String) -> std::result::Result<Node, E> {
        Ok(Node::Text(value))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> std::result::Result<Node, A::Error> {
        let mut list = Vec::new();
        while let Some(item) = items.next_element()? {
            list.push(item);
        }
        Ok(Node::List(list))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> std::result::Result<Node, A::Error> {
        let mut map = Vec::new();
        while let Some((key, value)) = entries.next_entry::<Node, Node>()? {
            let key = match key {
                Node::Text(key) => key,
                other => format!("{other:?}"),
            };
            map.push((key, value));
        }
        Ok(Node::Map(map))
    }
}
