//! What was found, as Markdown and as JSON.
//!
//! A [`Finding`] is one line of the first table: one metric of one row, one value for each round and side. Rounds are paired: the ratio is
//! the median of the rounds' ratios, with the least and the greatest, so that what slows the whole machine down cancels out.

use std::fmt::Write;

use serde_json::{Value, json};

use crate::limits::Syncs;
use crate::load::Round;
use crate::pause::Phase;
use crate::rows::{Bound, Metric, Row};
use crate::stats::{Spread, median};

/// One row, with the rounds of both sides.
pub struct Measured {
    pub row: Row,
    pub sides: [Vec<Round>; 2],
}

impl Measured {
    fn values(&self, side: usize, metric: Metric) -> Vec<f64> {
        self.sides.get(side).into_iter().flatten().filter_map(|round| value(round, metric)).collect()
    }

    /// Both sides' values, in which the same place is the same round: one that a side could not measure is left out on both, unless that
    /// side has none at all.
    fn pairs(&self, metric: Metric) -> [Vec<f64>; 2] {
        let [a, b] = self.sides.each_ref().map(|rounds| rounds.iter().map(|round| value(round, metric)).collect::<Vec<_>>());
        if a.iter().all(Option::is_none) || b.iter().all(Option::is_none) {
            return [self.values(0, metric), self.values(1, metric)];
        }
        a.into_iter().zip(b).filter_map(|(a, b)| Some((a?, b?))).map(|(a, b)| [a, b]).fold(
            Default::default(),
            |[mut all_a, mut all_b], [a, b]| {
                all_a.push(a);
                all_b.push(b);
                [all_a, all_b]
            },
        )
    }

    /// What was written for an operation over all rounds: a server writes some things only now and then, such as a new file of its log, and
    /// a median would leave them out.
    fn written(&self) -> Option<[f64; 2]> {
        let mean = |rounds: &[Round]| {
            let bytes: f64 = rounds.iter().map(|round| round.server.map(|server| server.written_bytes)).sum::<Option<f64>>()?;
            let operations: u64 = rounds.iter().map(|round| round.weighed_operations).sum();
            (operations > 0).then(|| bytes / operations as f64)
        };
        Some([mean(&self.sides[0])?, mean(&self.sides[1])?])
    }

    pub fn median(&self, side: usize, metric: Metric) -> Option<f64> {
        Spread::of(&self.values(side, metric)).map(|spread| spread.median)
    }

    fn errors(&self) -> u64 {
        self.sides.iter().flatten().map(|round| round.errors).sum()
    }

    /// A finding for every bound; for a row without any, its throughput.
    pub fn findings(&self) -> Vec<Finding> {
        let finding = |metric, bound| Finding {
            title: self.row.title.to_string(),
            metric,
            sides: self.pairs(metric),
            overall: if metric == Metric::Written { self.written() } else { None },
            bound,
            errors: self.errors(),
        };
        match self.row.bounds {
            [] => vec![finding(Metric::Throughput, None)],
            bounds => bounds.iter().map(|bound| finding(bound.metric, Some(*bound))).collect(),
        }
    }
}

fn value(round: &Round, metric: Metric) -> Option<f64> {
    match metric {
        Metric::Throughput => Some(round.per_second()),
        Metric::P50 => (round.operations > 0).then_some(round.p50_us),
        Metric::P99 => (round.operations > 0).then_some(round.p99_us),
        Metric::Cpu => Some(round.per_operation(round.server?.cpu_us)),
        Metric::Written => Some(round.per_operation(round.server?.written_bytes)),
        Metric::Memory => Some(round.server?.rss_bytes),
        Metric::Disk | Metric::StartTime | Metric::Pause => None,
    }
}

/// One metric of both sides, and what is asked of it.
pub struct Finding {
    pub title: String,
    pub metric: Metric,
    pub sides: [Vec<f64>; 2],
    /// Of both sides over all rounds, where that is what counts and not the median.
    pub overall: Option<[f64; 2]>,
    pub bound: Option<Bound>,
    pub errors: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The aim is reached.
    Aim,
    Pass,
    Miss,
    /// Answers were wrong or missing, so the figures mean nothing.
    Errors,
    /// One side could not be measured.
    Unknown,
    /// Nothing is asked of it.
    None,
}

impl Verdict {
    pub fn text(self) -> &'static str {
        match self {
            Self::Aim => "pass, aim reached",
            Self::Pass => "pass",
            Self::Miss => "**miss**",
            Self::Errors => "**errors**",
            Self::Unknown => "not measured",
            Self::None => "",
        }
    }
}

impl Finding {
    /// B to A, the middle being that of all rounds together where that counts; or B alone, for what a server is compared with itself in.
    pub fn ratio(&self) -> Option<Spread> {
        let [a, b] = &self.sides;
        if self.metric == Metric::Pause {
            return Spread::of(b);
        }
        let within = Spread::of(&a.iter().zip(b).map(|(a, b)| b / a).collect::<Vec<_>>())?;
        Some(self.overall.map_or(within, |[a, b]| Spread { median: b / a, ..within }))
    }

    pub fn verdict(&self) -> Verdict {
        let Some(bound) = self.bound else { return Verdict::None };
        if self.errors > 0 {
            return Verdict::Errors;
        }
        let Some(ratio) = self.ratio() else { return Verdict::Unknown };
        let holds = |limit: f64| if self.metric.higher_is_better() { ratio.median >= limit } else { ratio.median <= limit };
        match (holds(bound.must), holds(bound.aim)) {
            (true, true) => Verdict::Aim,
            (true, false) => Verdict::Pass,
            (false, _) => Verdict::Miss,
        }
    }

    /// Title, A, B, ratio, must, aim, verdict.
    fn cells(&self) -> [String; 7] {
        let side = |values: &[f64]| Spread::of(values).map_or("?".into(), |values| show(self.metric, values.median));
        let ratio = self.ratio().map_or("?".into(), |ratio| {
            format!("{} ({} to {})", three_digits(ratio.median), three_digits(ratio.min), three_digits(ratio.max))
        });
        let sign = if self.metric.higher_is_better() { "≥" } else { "≤" };
        let bound = |limit: fn(Bound) -> f64| self.bound.map_or(String::new(), |bound| format!("{sign} {}", limit(bound)));
        let (must, aim) = (bound(|bound| bound.must), bound(|bound| bound.aim));
        let [a, b] = [0, 1].map(|at| match self.overall {
            Some(overall) => show(self.metric, overall[at]),
            None => side(&self.sides[at]),
        });
        [self.title.clone(), a, b, ratio, must, aim, self.verdict().text().to_string()]
    }

    fn json(&self) -> Value {
        json!({
            "title": self.title, "metric": self.metric.key(), "a": self.sides[0], "b": self.sides[1], "errors": self.errors,
            "ratio": self.ratio().map(|ratio| json!({ "median": ratio.median, "min": ratio.min, "max": ratio.max })),
            "must": self.bound.map(|bound| bound.must), "aim": self.bound.map(|bound| bound.aim),
            "verdict": format!("{:?}", self.verdict()).to_lowercase(),
        })
    }
}

/// The rows at one size of the data.
pub struct Size {
    pub keys: u64,
    pub versions: u64,
    pub rows: Vec<Measured>,
}

/// Everything that one run found.
#[derive(Default)]
pub struct Report {
    pub names: [String; 2],
    pub facts: Vec<(&'static str, String)>,
    pub is_quick: bool,
    pub rows: Vec<Measured>,
    /// The same server over gRPC and in the process.
    pub embedded: Vec<Measured>,
    /// Memory and start: no loads.
    pub findings: Vec<Finding>,
    /// For each round and side.
    pub pauses: Vec<[Vec<Phase>; 2]>,
    pub syncs: Option<Syncs>,
    pub transport: Vec<(Row, Round)>,
    pub sizes: Vec<Size>,
    /// Files of plots, for links.
    pub plots: Vec<&'static str>,
}

impl Report {
    pub fn findings(&self) -> Vec<Finding> {
        let rows = self.rows.iter().flat_map(Measured::findings);
        let mut all: Vec<Finding> = rows.collect();
        all.extend(self.findings.iter().map(|finding| Finding { sides: finding.sides.clone(), title: finding.title.clone(), ..*finding }));
        all.extend(self.pause_findings());
        all
    }

    fn pause_findings(&self) -> Vec<Finding> {
        use crate::pause::Event;
        let events = Event::ALL.into_iter().filter(|event| *event != Event::Quiet && !self.pauses.is_empty());
        let factor = |phases: &[Phase], event: Event| {
            let of = |wanted: Event| phases.iter().find(|phase| phase.event == wanted).map(|phase| phase.p99_us);
            Some(of(event)? / of(Event::Quiet)?)
        };
        events
            .map(|event| {
                let side = |side: usize| self.pauses.iter().filter_map(|round| factor(round.get(side)?, event)).collect();
                let errors = self.pauses.iter().flatten().flatten().filter(|phase| [event, Event::Quiet].contains(&phase.event));
                Finding {
                    title: format!("put during {}", event.title()),
                    metric: Metric::Pause,
                    sides: [side(0), side(1)],
                    overall: None,
                    bound: Some(crate::rows::PAUSE),
                    errors: errors.map(|phase| phase.errors).sum(),
                }
            })
            .collect()
    }

    pub fn markdown(&self) -> String {
        let mut text = String::new();
        let [a, b] = &self.names;
        let _ = writeln!(text, "# {b} and {a}\n");
        if self.is_quick {
            text += "A quick run, to see that everything works. **The figures mean nothing.**\n\n";
        }
        for (name, fact) in &self.facts {
            let _ = writeln!(text, "- {name}: {fact}");
        }
        self.comparison(&mut text);
        self.details(&mut text);
        self.embedded(&mut text);
        self.pause_table(&mut text);
        self.limits(&mut text);
        self.growth(&mut text);
        for plot in &self.plots {
            let _ = writeln!(text, "\n![{}]({plot})", plot.trim_end_matches(".svg"));
        }
        text
    }

    fn comparison(&self, text: &mut String) {
        let findings = self.findings();
        if findings.is_empty() {
            return;
        }
        let [a, b] = &self.names;
        *text += "\n## Comparison\n\nMedians over the rounds; bytes written are those of all rounds, over their operations. The ratio is that of the second server to the first within a round, median (least to \
                  greatest); where a server is compared with itself it is the second server's own.\n\n";
        let _ = writeln!(text, "| workload | measure | {a} | {b} | ratio | must | aim | |\n|---|---|---|---|---|---|---|---|");
        for finding in &findings {
            let [title, a, b, ratio, must, aim, verdict] = finding.cells();
            let _ = writeln!(text, "| {title} | {} | {a} | {b} | {ratio} | {must} | {aim} | {verdict} |", finding.metric.title());
        }
        let findings: Vec<_> = findings.into_iter().chain(self.embedded.iter().flat_map(Measured::findings)).collect();
        let count = |verdicts: &[Verdict]| findings.iter().filter(|finding| verdicts.contains(&finding.verdict())).count();
        let bounded = findings.len() - count(&[Verdict::None]);
        let (held, aims) = (count(&[Verdict::Pass, Verdict::Aim]), count(&[Verdict::Aim]));
        let _ = writeln!(text, "\n{held} of {bounded} bounds hold, those in the process among them; {aims} with the aim reached.");
    }

    fn details(&self, text: &mut String) {
        if self.rows.is_empty() {
            return;
        }
        *text += "\n## Details\n\nMedians over the rounds. Generator: its own CPU for one operation. Others: CPU of the machine that neither server \
                  nor generator used.\n\n";
        *text += "| workload | server | operations/s | p50 | p99 | greatest | server CPU | resident | written | generator CPU | others | errors |\n";
        *text += "|---|---|---|---|---|---|---|---|---|---|---|---|\n";
        for measured in &self.rows {
            for (side, rounds) in measured.sides.iter().enumerate() {
                let name = self.names.get(side).map_or("", String::as_str);
                let _ = writeln!(text, "| {} | {name} | {} |", measured.row.title, line(rounds));
            }
        }
        self.errors(text, &self.rows);
    }

    fn embedded(&self, text: &mut String) {
        if self.embedded.is_empty() {
            return;
        }
        *text += "\n## In the process\n\nThe library called directly, without a socket, against the same server over gRPC. Medians over the rounds.\n\n\
                  | workload | over gRPC | in the process | ratio | must | aim | |\n|---|---|---|---|---|---|---|\n";
        for finding in self.embedded.iter().flat_map(Measured::findings) {
            let _ = writeln!(text, "| {} |", finding.cells().join(" | "));
        }
        self.errors(text, &self.embedded);
    }

    fn errors(&self, text: &mut String, rows: &[Measured]) {
        let errors = rows.iter().flat_map(|row| row.sides.iter().flatten().map(move |round| (row.row.title, round)));
        for (title, error) in errors.filter_map(|(title, round)| Some((title, round.first_error.as_ref()?))) {
            let _ = writeln!(text, "\nError in \"{title}\": {error}");
        }
    }

    fn pause_table(&self, text: &mut String) {
        if self.pauses.is_empty() {
            return;
        }
        let pace = crate::pause::PACE_PER_S;
        let _ = writeln!(text, "\n## Pauses\n\n{pace} puts a second are due, whatever the server does. Medians over the rounds.\n");
        *text += "| event | server | took | p50 | p99 | greatest | errors |\n|---|---|---|---|---|---|---|\n";
        for event in crate::pause::Event::ALL {
            for (side, name) in self.names.iter().enumerate() {
                let phases = || self.pauses.iter().filter_map(|round| round.get(side)?.iter().find(|phase| phase.event == event));
                let of = |value: fn(&Phase) -> f64| median(&phases().map(value).collect::<Vec<_>>());
                let errors: u64 = phases().map(|phase| phase.errors).sum();
                let (p50, p99, max) = (time(of(|phase| phase.p50_us)), time(of(|phase| phase.p99_us)), time(of(|phase| phase.max_us)));
                let took = match of(|phase| phase.bytes as f64) {
                    0.0 => time(of(|phase| phase.took_s) * 1e6),
                    bytes => format!("{} for {}", time(of(|phase| phase.took_s) * 1e6), size(bytes)),
                };
                let took = if event == crate::pause::Event::Quiet { String::new() } else { took };
                let _ = writeln!(text, "| {} | {name} | {took} | {p50} | {p99} | {max} | {errors} |", event.title());
            }
        }
        for phase in self.pauses.iter().flatten().flatten() {
            if let Some(error) = &phase.first_error {
                let _ = writeln!(text, "\nError during {}: {error}", phase.event.title());
            }
        }
    }

    fn limits(&self, text: &mut String) {
        if self.syncs.is_none() && self.transport.is_empty() {
            return;
        }
        *text += "\n## Limits\n\nWhat no server can exceed here: a server that does nothing but answer, on the same transport with the same \
                  generator; and one thread that appends and calls fdatasync.\n\n";
        *text += "| load | operations/s | p50 | p99 | greatest | server CPU | resident | written | generator CPU | others | errors |\n";
        *text += "|---|---|---|---|---|---|---|---|---|---|---|\n";
        for (row, round) in &self.transport {
            let _ = writeln!(text, "| {} | {} |", row.title, line(std::slice::from_ref(round)));
        }
        if let Some(Syncs { per_second, p50_us, p99_us }) = self.syncs {
            let _ = writeln!(
                text,
                "| fdatasync | {} | {} | {} | | | | | | | |",
                show(Metric::Throughput, per_second),
                time(p50_us),
                time(p99_us)
            );
        }
    }

    fn growth(&self, text: &mut String) {
        if self.sizes.is_empty() {
            return;
        }
        let [a, b] = &self.names;
        let _ = writeln!(
            text,
            "\n## Growth\n\nOperations/s of {b}, and the ratio to {a}. A row fails when it falls faster than the logarithm of the number of \
             revisions stored, counted from the smallest size.\n"
        );
        let name = |size: &Size| match size.versions {
            1 => format!("{} keys", whole(size.keys)),
            versions => format!("{} keys x {versions}", whole(size.keys)),
        };
        let _ = writeln!(text, "| workload | {} | |", self.sizes.iter().map(name).collect::<Vec<_>>().join(" | "));
        let _ = writeln!(text, "|---|{}---|", "---|".repeat(self.sizes.len()));
        for (index, first) in self.sizes.first().into_iter().flat_map(|size| size.rows.iter().enumerate()) {
            let _ = write!(text, "| {} |", first.row.title);
            for size in &self.sizes {
                let cell = size.rows.get(index).and_then(|row| {
                    let (a, b) = (row.median(0, Metric::Throughput)?, row.median(1, Metric::Throughput)?);
                    Some(format!("{} ({} x)", show(Metric::Throughput, b), three_digits(b / a)))
                });
                let _ = write!(text, " {} |", cell.unwrap_or("?".into()));
            }
            let _ = writeln!(text, " {} |", if self.falls_slowly(index) { "pass" } else { "**miss**" });
        }
    }

    /// Whether a row of B, from the smallest size on, loses no more than the logarithm of the revisions stored allows, and has no errors.
    fn falls_slowly(&self, row: usize) -> bool {
        let points = self.sizes.iter().map(|size| {
            let row = size.rows.get(row)?;
            (row.errors() == 0).then_some(())?;
            Some((((size.keys * size.versions) as f64).ln(), row.median(1, Metric::Throughput)?))
        });
        let Some(mut points) = points.collect::<Option<Vec<_>>>() else { return false };
        points.sort_by(|a, b| a.0.total_cmp(&b.0));
        let Some(first) = points.first().copied() else { return true };
        points.iter().all(|point| point.1 >= first.1 * first.0 / point.0)
    }

    pub fn json(&self) -> Value {
        let measured = |row: &Measured| {
            json!({
                "name": row.row.name, "title": row.row.title, "clients": row.row.clients,
                "a": row.sides[0].iter().map(round_json).collect::<Vec<_>>(), "b": row.sides[1].iter().map(round_json).collect::<Vec<_>>(),
            })
        };
        let rows = |rows: &[Measured]| rows.iter().map(measured).collect::<Vec<_>>();
        json!({
            "a": self.names[0], "b": self.names[1], "is_quick": self.is_quick,
            "machine": self.facts.iter().map(|(name, fact)| ((*name).to_string(), json!(fact))).collect::<serde_json::Map<_, _>>(),
            "comparison": self.findings().iter().map(Finding::json).collect::<Vec<_>>(),
            "rows": rows(&self.rows),
            "in_process": {
                "comparison": self.embedded.iter().flat_map(Measured::findings).map(|finding| finding.json()).collect::<Vec<_>>(),
                "rows": rows(&self.embedded),
            },
            "pauses": self.pauses.iter().map(|[a, b]| {
                json!({ "a": a.iter().map(phase_json).collect::<Vec<_>>(), "b": b.iter().map(phase_json).collect::<Vec<_>>() })
            }).collect::<Vec<_>>(),
            "limits": {
                "transport": self.transport.iter().map(|(row, round)| json!({ "name": row.name, "title": row.title, "round": round_json(round) })).collect::<Vec<_>>(),
                "fdatasync": self.syncs.map(|syncs| json!({ "per_s": syncs.per_second, "p50_us": syncs.p50_us, "p99_us": syncs.p99_us })),
            },
            "growth": self.sizes.iter().map(|size| json!({ "keys": size.keys, "versions": size.versions, "rows": rows(&size.rows) })).collect::<Vec<_>>(),
        })
    }
}

fn round_json(round: &Round) -> Value {
    json!({
        "seconds": round.seconds, "operations": round.operations, "operations_per_s": round.per_second(), "p50_us": round.p50_us,
        "p99_us": round.p99_us, "max_us": round.max_us, "errors": round.errors, "first_error": round.first_error,
        "server_cpu_us_per_operation": value(round, Metric::Cpu), "written_bytes_per_operation": value(round, Metric::Written),
        "resident_bytes": value(round, Metric::Memory), "generator_cpu_us_per_operation": round.per_operation(round.generator_cpu_us),
        "others_share_of_machine": round.others,
    })
}

fn phase_json(phase: &Phase) -> Value {
    let point = |point: &crate::pause::Point| json!([point.at_s, point.p50_us, point.p99_us, point.max_us]);
    json!({
        "event": phase.event.title(), "took_s": phase.took_s, "bytes": phase.bytes, "p50_us": phase.p50_us, "p99_us": phase.p99_us,
        "max_us": phase.max_us, "errors": phase.errors, "first_error": phase.first_error,
        "points_s_p50_p99_max_us": phase.points.iter().map(point).collect::<Vec<_>>(),
    })
}

/// Medians of the rounds of one side, as cells of a table.
pub fn line(rounds: &[Round]) -> String {
    let of = |metric| {
        let values: Vec<f64> = rounds.iter().filter_map(|round| value(round, metric)).collect();
        Spread::of(&values).map_or("?".into(), |spread| show(metric, spread.median))
    };
    let others: Vec<f64> = rounds.iter().filter_map(|round| round.others).collect();
    let middle = |value: fn(&Round) -> f64| median(&rounds.iter().map(value).collect::<Vec<_>>());
    [
        of(Metric::Throughput),
        of(Metric::P50),
        of(Metric::P99),
        time(middle(|round| round.max_us)),
        of(Metric::Cpu),
        of(Metric::Memory),
        of(Metric::Written),
        time(middle(|round| round.per_operation(round.generator_cpu_us))),
        Spread::of(&others).map_or("?".into(), |others| format!("{:.0} %", others.median * 100.0)),
        rounds.iter().map(|round| round.errors).sum::<u64>().to_string(),
    ]
    .join(" | ")
}

fn show(metric: Metric, value: f64) -> String {
    match metric {
        Metric::Throughput => count(value),
        Metric::P50 | Metric::P99 | Metric::Cpu | Metric::StartTime => time(value),
        Metric::Written | Metric::Memory | Metric::Disk => size(value),
        Metric::Pause => format!("{} x", three_digits(value)),
    }
}

/// Three digits that count: 1234 -> 1230, 12.345 -> 12.3.
pub fn three_digits(value: f64) -> String {
    match value.abs() {
        size if size >= 100.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

pub fn count(value: f64) -> String {
    match value.abs() {
        size if size >= 1e6 => format!("{}M", three_digits(value / 1e6)),
        size if size >= 1e4 => format!("{}k", three_digits(value / 1e3)),
        _ => format!("{value:.0}"),
    }
}

/// A number that somebody chose: 100k, not 100.0k.
pub fn whole(number: u64) -> String {
    count(number as f64).replace(".00M", "M").replace(".0M", "M").replace(".0k", "k")
}

pub fn time(us: f64) -> String {
    match us.abs() {
        size if size >= 1e6 => format!("{} s", three_digits(us / 1e6)),
        size if size >= 1e3 => format!("{} ms", three_digits(us / 1e3)),
        _ => format!("{} us", three_digits(us)),
    }
}

fn size(bytes: f64) -> String {
    match bytes.abs() {
        size if size >= 1e9 => format!("{} GB", three_digits(bytes / 1e9)),
        size if size >= 1e6 => format!("{} MB", three_digits(bytes / 1e6)),
        size if size >= 1e4 => format!("{} kB", three_digits(bytes / 1e3)),
        _ => format!("{bytes:.0} B"),
    }
}

#[cfg(test)]
#[allow(unused)] // See main.rs.
mod tests {
    use super::*;
    use crate::member::Usage;
    use crate::rows::ROWS;

    fn round(per_second: u64, p99_us: f64) -> Round {
        let server = Some(Usage { cpu_us: 1e6, rss_bytes: 1e8, written_bytes: 1e6 });
        Round { seconds: 1.0, operations: per_second, weighed_operations: per_second, p99_us, server, ..Round::default() }
    }

    fn put_64(a: &[u64], b: &[u64]) -> Measured {
        let row = *ROWS.iter().find(|row| row.name == "put-64").unwrap();
        let rounds = |all: &[u64], p99: f64| all.iter().map(|per_second| round(*per_second, p99)).collect();
        Measured { row, sides: [rounds(a, 10_000.0), rounds(b, 5000.0)] }
    }

    #[test]
    fn rounds_are_paired_and_judged() {
        let measured = put_64(&[10_000, 20_000, 10_000], &[25_000, 50_000, 29_000]);
        let findings = measured.findings();
        assert_eq!(findings[0].ratio(), Some(Spread { median: 2.5, min: 2.5, max: 2.9 }));
        let verdicts: Vec<_> = findings.iter().map(Finding::verdict).collect();
        // Throughput 2.5 of 2.2 and 3; CPU 0.4 of 0.45 and 0.25; p99 0.5 of 0.6 and 0.3; bytes 0.4 of 1 and 0.5.
        assert_eq!(verdicts, [Verdict::Pass, Verdict::Pass, Verdict::Pass, Verdict::Aim]);
        assert_eq!(put_64(&[10_000], &[15_000]).findings()[0].verdict(), Verdict::Miss);
        assert_eq!(put_64(&[], &[15_000]).findings()[0].verdict(), Verdict::Unknown);
        let mut wrong = put_64(&[10_000], &[90_000]);
        wrong.sides[1][0].errors = 1;
        assert_eq!(wrong.findings()[0].verdict(), Verdict::Errors);
    }

    #[test]
    fn growth_is_held_against_the_logarithm() {
        let size = |keys, per_second| Size { keys, versions: 1, rows: vec![put_64(&[1000], &[per_second])] };
        let grown = |last| Report { sizes: vec![size(10_000, 30_000), size(1_000_000, last)], ..Report::default() };
        assert!(grown(20_001).falls_slowly(0));
        assert!(!grown(19_999).falls_slowly(0));
    }

    #[test]
    fn figures_for_readers() {
        assert_eq!((count(950.0), count(21_600.0), count(1_234_567.0)), ("950".into(), "21.6k".into(), "1.23M".into()));
        assert_eq!(
            (whole(2000), whole(100_000), whole(5_000_000), whole(1_050_000)),
            ("2000".into(), "100k".into(), "5M".into(), "1.05M".into())
        );
        assert_eq!((time(7.5), time(4410.0), time(3.6e6)), ("7.50 us".into(), "4.41 ms".into(), "3.60 s".into()));
        assert_eq!((size(612.0), size(582e6), size(1.5e9)), ("612 B".into(), "582 MB".into(), "1.50 GB".into()));
    }

    #[test]
    fn the_report_has_every_table_and_is_valid_json() {
        let report = Report {
            names: ["etcd".into(), "quorate".into()],
            rows: vec![put_64(&[10_000], &[25_000])],
            embedded: vec![put_64(&[10_000], &[15_000])],
            sizes: vec![Size { keys: 10_000, versions: 1, rows: vec![put_64(&[1], &[2])] }],
            syncs: Some(Syncs { per_second: 1.0, p50_us: 1.0, p99_us: 1.0 }),
            ..Report::default()
        };
        let text = report.markdown();
        for part in [
            "## Comparison",
            "## Details",
            "## In the process",
            "## Limits",
            "## Growth",
            "6 of 8 bounds hold",
            "2.50 (2.50 to 2.50) | ≥ 2.2 | ≥ 3 | pass |",
        ] {
            assert!(text.contains(part), "no {part} in\n{text}");
        }
        for table in text.split("\n\n").filter(|part| part.starts_with('|')) {
            let columns: Vec<_> = table.lines().filter(|line| line.starts_with('|')).map(|line| line.matches('|').count()).collect();
            assert!(columns.windows(2).all(|pair| pair[0] == pair[1]), "{columns:?} in\n{table}");
        }
        assert_eq!(report.json()["comparison"][0]["verdict"], "pass");
    }
}
