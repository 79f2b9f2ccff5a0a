//! What a node of the embedded mode tells of itself: whether it can read and write the store, how far away each server is, and what servers it
//! has replaced by itself, if it is to.
//!
//! ```text
//! set_access(true, false)          quorate_node_can_read 1, quorate_node_can_write 0
//! follow([http://10.0.0.1:5706])   quorate_endpoint_up{endpoint="http://10.0.0.1:5706"} 1, its latency, and its 99th percentile
//! ```
//!
//! A server that is no node of that mode has none of these series. A latency that is not known is left out.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Mutex;
use std::time::Duration;

use prometheus_client::encoding::EncodeGaugeValue;
use prometheus_client::metrics::MetricType;

use super::Page;
use crate::lock::lock;

/// How a server was found to answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EndpointFigures {
    /// Whether it has answered when it was asked last.
    pub is_up: bool,
    /// How long its last answer took.
    pub latency: Option<Duration>,
    /// What 99 of 100 of its answers took at most.
    pub p99: Option<Duration>,
}

/// What a server, while it led, has done for those that were dead. See `embed::replacing`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ReplacementFigures {
    /// Replacements that it has begun: a client was enlisted in a server's place.
    pub begun: u64,
    /// Those of them whose client was put out before it voted.
    pub failed: u64,
    /// A server is to be replaced now, and nobody can take its place.
    pub is_wanting: bool,
}

/// See the module's head.
#[derive(Debug, Default)]
pub struct NodeFigures {
    access: Mutex<Option<(bool, bool)>>,
    replacements: Mutex<Option<ReplacementFigures>>,
    endpoints: Mutex<BTreeMap<String, EndpointFigures>>,
}

impl NodeFigures {
    /// Whether the store can be read, and written.
    pub fn set_access(&self, read: bool, write: bool) {
        *lock(&self.access) = Some((read, write));
    }

    /// How it stands with servers that are replaced by themselves.
    pub fn set_replacements(&self, figures: ReplacementFigures) {
        *lock(&self.replacements) = Some(figures);
    }

    /// From here on these are the servers, by their URLs.
    pub fn follow(&self, endpoints: BTreeMap<String, EndpointFigures>) {
        *lock(&self.endpoints) = endpoints;
    }
}

/// Writes the families of a node, if this is one.
pub(super) fn encode(page: &mut Page<'_>, node: &NodeFigures) -> fmt::Result {
    let Some((read, write)) = *lock(&node.access) else { return Ok(()) };
    page.gauge("quorate_node_can_read", "Whether this node could read the store a moment ago", i64::from(read))?;
    page.gauge("quorate_node_can_write", "Whether this node could write the store a moment ago", i64::from(write))?;
    if let Some(figures) = *lock(&node.replacements) {
        let help = "Replacements of dead servers that this node has begun by itself while it led";
        page.counter("quorate_replacements_begun", help, figures.begun)?;
        let help = "Those of them whose new server was put out before it voted";
        page.counter("quorate_replacements_failed", help, figures.failed)?;
        let help = "Whether this node leads, a server is to be replaced, and nobody can take its place";
        page.gauge("quorate_replacement_wanting", help, i64::from(figures.is_wanting))?;
    }
    let endpoints = lock(&node.endpoints).clone();
    let help = "Whether a server has answered this node a moment ago";
    family(page, "quorate_endpoint_up", help, &endpoints, |found| Some(i64::from(found.is_up)))?;
    let help = "How long the last answer of a server to this node took";
    family(page, "quorate_endpoint_latency_seconds", help, &endpoints, |found| found.latency.map(|took| took.as_secs_f64()))?;
    let help = "What 99 of 100 answers of a server to this node took at most";
    family(page, "quorate_endpoint_latency_p99_seconds", help, &endpoints, |found| found.p99.map(|took| took.as_secs_f64()))
}

fn family<V: EncodeGaugeValue>(
    page: &mut Page<'_>,
    name: &str,
    help: &str,
    endpoints: &BTreeMap<String, EndpointFigures>,
    of: impl Fn(&EndpointFigures) -> Option<V>,
) -> fmt::Result {
    if !endpoints.values().any(|found| of(found).is_some()) {
        return Ok(());
    }
    let mut family = page.family(name, help, MetricType::Gauge)?;
    for (endpoint, found) in endpoints {
        if let Some(value) = of(found) {
            family.encode_family(&[("endpoint", endpoint.as_str())])?.encode_gauge(&value)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::Metrics;

    #[test]
    fn a_node_tells_how_far_away_each_server_is() {
        for metrics in [Metrics::new("3.7.1", "3.7"), Metrics::of_client()] {
            assert!(!metrics.text().contains("quorate_node") && !metrics.text().contains("quorate_endpoint"));
            let node = &metrics.counters.node;
            node.set_access(true, false);
            let near = EndpointFigures { is_up: true, latency: Some(Duration::from_millis(2)), p99: Some(Duration::from_millis(4)) };
            node.follow([("http://a:1".to_owned(), near), ("http://b:1".to_owned(), EndpointFigures::default())].into());
            assert!(!metrics.text().contains("quorate_replacement"));
            node.set_replacements(ReplacementFigures { begun: 2, failed: 1, is_wanting: true });
            let text = metrics.text();
            for line in [
                "quorate_replacements_begun_total 2",
                "quorate_replacements_failed_total 1",
                "quorate_replacement_wanting 1",
                "quorate_node_can_read 1",
                "quorate_node_can_write 0",
                r#"quorate_endpoint_up{endpoint="http://a:1"} 1"#,
                r#"quorate_endpoint_up{endpoint="http://b:1"} 0"#,
                r#"quorate_endpoint_latency_seconds{endpoint="http://a:1"} 0.002"#,
                r#"quorate_endpoint_latency_p99_seconds{endpoint="http://a:1"} 0.004"#,
            ] {
                assert!(text.lines().any(|found| found == line), "{line}\n{text}");
            }
            assert!(!text.contains(r#"latency_seconds{endpoint="http://b:1"}"#), "{text}");
        }
    }

    /// Who has no server has no figures of one: an alert would take them for a server that has lost its leader.
    #[test]
    fn a_client_does_not_look_like_a_server() {
        let text = Metrics::of_client().text();
        assert!(!text.contains("etcd_") && !text.contains("grpc_"), "{text}");
        for name in ["quorate_build_info", "quorate_backup_newest_age_seconds 0", "process_open_fds"] {
            assert!(text.contains(name), "{name}\n{text}");
        }
    }
}
