//! Pauses: what a client that only puts feels of a compaction, a defragmentation and a snapshot.
//!
//! A closed load hides a stall: while the server stands still nobody asks, and one slow answer for each client drowns among thousands of
//! quick ones. So the load here is open: [`PACE_PER_S`] puts a second are due, whatever the server does, and one that leaves late because
//! all clients are stuck is counted from the moment it was due. The pace is far below what either server can do, and the same for both.
//!
//! ```text
//! quiet:  rest |-lead-|====== WINDOW ======|-tail-|
//! event:  rest |-lead-|== from its start to its end, or WINDOW if that is longer ==|-tail-|
//! ```
//!
//! A round writes a million revisions over the keys, then measures at rest, during `Compact` of all of them (physical: until they are off
//! the disk), during `Defragment`, and while a snapshot is streamed and thrown away. The figure that is judged is p99 during over p99 at
//! rest, of the same server in the same round.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use bytes::BytesMut;
use quorate::proto::etcdserverpb::{
    CompactionRequest, CompactionResponse, DefragmentRequest, DefragmentResponse, PutRequest, PutResponse, SnapshotRequest,
};
use tokio::task::JoinSet;

use crate::load::{Settings, bulk};
use crate::member::Cluster;
use crate::requests::{COMPACT, Check, DEFRAGMENT, FAN_PREFIX, PUT, SNAPSHOT, Stamp};
use crate::stats::{Histogram, Rng};
use crate::wire::{Channel, Result, block_on, frame};

/// Puts due in a second.
pub const PACE_PER_S: u64 = 2000;
/// Puts under way at most. Beyond it they wait, which counts as their latency.
const PACE_CLIENTS: u64 = 512;
/// Puts under way while revisions are written.
const FILL_CLIENTS: u64 = 512;
/// Load before and after every window.
const MARGIN: Duration = Duration::from_millis(1000);
/// After the revisions were written, and after every event, until the next thing is looked at: what the server has put off is over. Without
/// it "at rest" would be anything but that.
const REST: Duration = Duration::from_secs(10);
/// How long is looked at at rest, and at least during an event: the 99th percentile is of 20,000 puts then.
pub const WINDOW: Duration = Duration::from_secs(10);
/// An event that takes longer has failed.
const PATIENCE: Duration = Duration::from_secs(600);
/// Width of a point in a plot.
pub const POINT: Duration = Duration::from_millis(100);

/// What happens while the puts go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    Quiet,
    Compaction,
    Defragmentation,
    Snapshot,
}

impl Event {
    pub const ALL: [Self; 4] = [Self::Quiet, Self::Compaction, Self::Defragmentation, Self::Snapshot];

    pub fn title(self) -> &'static str {
        match self {
            Self::Quiet => "at rest",
            Self::Compaction => "compaction",
            Self::Defragmentation => "defragmentation",
            Self::Snapshot => "snapshot",
        }
    }
}

/// One put: when it was due, since the load began, and what it took from then on.
#[derive(Clone, Copy, Debug)]
struct Sample {
    due: Duration,
    latency: Duration,
}

/// The latencies of a tenth of a second.
#[derive(Clone, Copy, Debug)]
pub struct Point {
    /// Since the event began; negative before it.
    pub at_s: f64,
    pub p50_us: f64,
    pub p99_us: f64,
    pub max_us: f64,
}

/// One event of one round.
#[derive(Clone, Debug)]
pub struct Phase {
    pub event: Event,
    /// How long the event itself took.
    pub took_s: f64,
    /// Bytes of the snapshot.
    pub bytes: u64,
    pub p50_us: f64,
    pub p99_us: f64,
    pub max_us: f64,
    pub errors: u64,
    pub first_error: Option<String>,
    pub points: Vec<Point>,
}

/// Writes the revisions; measures every event, and each for `window` at least. `progress` hears the number of revisions written and the phases as they end.
pub fn round(
    cluster: &Cluster,
    settings: &Settings,
    (revisions, window): (u64, Duration),
    written: fn(u64),
    progress: impl Fn(&Phase),
) -> Result<Vec<Phase>> {
    let (stamp, keys) = (Stamp::put(settings.value_bytes), settings.keys);
    bulk(cluster, PUT, revisions, FILL_CLIENTS, move |number, buffer| {
        if number.is_multiple_of(1 << 14) {
            written(number);
        }
        stamp.fill(buffer, number % keys, 0, number)
    })?;
    let mut phases = Vec::new();
    for event in Event::ALL {
        thread::sleep(REST);
        let phase = phase(cluster, settings, window, event)?;
        progress(&phase);
        phases.push(phase);
    }
    Ok(phases)
}

fn phase(cluster: &Cluster, settings: &Settings, window: Duration, event: Event) -> Result<Phase> {
    let endpoint = cluster.endpoints.first().ok_or("no endpoints")?.clone();
    let load = Paced::start(cluster, settings)?;
    thread::sleep(MARGIN);
    let began = load.began.elapsed();
    let outcome = block_on(async {
        let in_time = tokio::time::timeout(PATIENCE, take_place(event, endpoint)).await;
        in_time.unwrap_or_else(|_| Err(format!("{}: not over within {} s", event.title(), PATIENCE.as_secs()).into()))
    });
    let ended = load.began.elapsed();
    // A short event is looked at as long as the rest is, for enough samples.
    let window = (ended - began).max(window);
    thread::sleep((began + window + MARGIN).saturating_sub(load.began.elapsed()));
    // Stopped first, whatever became of the event.
    let trace = load.stop()?;
    let bytes = outcome?;

    let mut histogram = Histogram::new();
    for sample in trace.samples.iter().filter(|sample| sample.due >= began && sample.due < began + window) {
        histogram.record(sample.latency);
    }
    let (p50_us, p99_us, max_us) = (histogram.quantile_us(0.5), histogram.quantile_us(0.99), histogram.max_us());
    let (took_s, points) = ((ended - began).as_secs_f64(), points(trace.samples, began));
    Ok(Phase { event, took_s, bytes, p50_us, p99_us, max_us, errors: trace.errors, first_error: trace.first_error, points })
}

/// Carries the event out, to its end. Gives the bytes that came back.
async fn take_place(event: Event, endpoint: String) -> Result<u64> {
    let mut channel = Channel::connect(&endpoint).await?;
    match event {
        Event::Quiet => Ok(0),
        Event::Compaction => {
            // A put, only to learn the present revision.
            let put = PutRequest { key: FAN_PREFIX.into(), ..Default::default() };
            let answer: PutResponse = channel.call(PUT, &put).await?;
            let revision = answer.header.ok_or("an answer without a header")?.revision;
            channel.call::<CompactionResponse>(COMPACT, &CompactionRequest { revision, physical: true }).await?;
            Ok(0)
        }
        Event::Defragmentation => channel.call::<DefragmentResponse>(DEFRAGMENT, &DefragmentRequest {}).await.map(|_| 0),
        Event::Snapshot => {
            let method = channel.method(SNAPSHOT);
            let (mut request, mut answers) = channel.open(&method).await?;
            request.send_data(frame(&SnapshotRequest {}), true)?;
            let mut bytes = 0;
            while let Some(part) = answers.next().await? {
                bytes += part.len() as u64;
            }
            Ok(bytes)
        }
    }
}

fn points(mut samples: Vec<Sample>, event: Duration) -> Vec<Point> {
    samples.sort_by_key(|sample| sample.due);
    let place = |sample: &Sample| sample.due.as_millis() / POINT.as_millis();
    let of = |group: &[Sample]| {
        let mut histogram = Histogram::new();
        group.iter().for_each(|sample| histogram.record(sample.latency));
        let middle = group.first().map_or(0, place) as f64 * POINT.as_secs_f64() + POINT.as_secs_f64() / 2.0;
        Point {
            at_s: middle - event.as_secs_f64(),
            p50_us: histogram.quantile_us(0.5),
            p99_us: histogram.quantile_us(0.99),
            max_us: histogram.max_us(),
        }
    };
    samples.chunk_by(|a, b| place(a) == place(b)).map(of).collect()
}

/// An open load of puts.
struct Paced {
    began: Instant,
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Result<Trace>>,
}

#[derive(Default)]
struct Trace {
    samples: Vec<Sample>,
    errors: u64,
    first_error: Option<String>,
}

impl Paced {
    fn start(cluster: &Cluster, settings: &Settings) -> Result<Self> {
        let (endpoints, settings) = (cluster.endpoints.clone(), settings.clone());
        let (began, stop) = (Instant::now(), Arc::new(AtomicBool::new(false)));
        let stopping = stop.clone();
        let thread = thread::Builder::new().name("paced".into()).spawn(move || block_on(pace(endpoints, settings, began, stopping)))?;
        Ok(Self { began, stop, thread })
    }

    fn stop(self) -> Result<Trace> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().map_err(|_| "the generator panicked")?
    }
}

async fn pace(endpoints: Vec<String>, settings: Settings, began: Instant, stop: Arc<AtomicBool>) -> Result<Trace> {
    let mut channels = Vec::new();
    for endpoint in endpoints.iter().cycle().take(endpoints.len().max(settings.connections)) {
        channels.push(Channel::connect(endpoint).await?);
    }
    let (stamp, next) = (Arc::new(Stamp::put(settings.value_bytes)), Arc::new(AtomicU64::new(0)));
    // Connecting took a while; what was due meanwhile is not the server's debt.
    let behind = began.elapsed();
    let mut tasks = JoinSet::new();
    for (client, channel) in (0..PACE_CLIENTS).zip(channels.iter().cycle()) {
        let (mut channel, stamp, next, stop) = (channel.clone(), stamp.clone(), next.clone(), stop.clone());
        let (mut rng, keys) = (Rng::new(client), settings.keys);
        tasks.spawn(async move {
            let (method, mut buffer, mut trace) = (channel.method(PUT), BytesMut::new(), Trace::default());
            while !stop.load(Ordering::Relaxed) {
                let number = next.fetch_add(1, Ordering::Relaxed);
                let mut due = behind + Duration::from_secs(number) / u32::try_from(PACE_PER_S).unwrap_or(u32::MAX);
                if began.elapsed() < due {
                    tokio::time::sleep_until((began + due).into()).await;
                    // The timer's own delay, up to a millisecond, is not the server's.
                    due = began.elapsed();
                }
                let frame = stamp.fill(&mut buffer, rng.below(keys), 0, number);
                match channel.unary(&method, frame).await.and_then(|answer| Check::Put.check(&answer)) {
                    Ok(()) => trace.samples.push(Sample { due, latency: began.elapsed() - due }),
                    Err(error) => {
                        trace.errors += 1;
                        trace.first_error.get_or_insert(error.to_string());
                    }
                }
            }
            trace
        });
    }
    let mut whole = Trace::default();
    while let Some(trace) = tasks.join_next().await {
        let trace = trace?;
        whole.samples.extend(trace.samples);
        whole.errors += trace.errors;
        whole.first_error = whole.first_error.or(trace.first_error);
    }
    Ok(whole)
}

#[cfg(test)]
#[allow(unused)] // See main.rs.
mod tests {
    use super::*;

    #[test]
    fn points_are_tenths_of_a_second() {
        let sample = |due_ms, latency_ms| Sample { due: Duration::from_millis(due_ms), latency: Duration::from_millis(latency_ms) };
        let points = points(vec![sample(1010, 8), sample(50, 2), sample(99, 4)], Duration::from_secs(1));
        assert_eq!(points.len(), 2);
        assert!((points[0].at_s + 0.95).abs() < 1e-9 && (points[0].max_us - 4000.0).abs() < 1.0, "{points:?}");
        assert!((points[1].at_s - 0.05).abs() < 1e-9, "{points:?}");
    }
}
