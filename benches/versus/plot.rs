//! Plots, as SVG written by hand: a few panels of lines, readable in a browser and in a README, light or dark.

use std::fmt::Write;

use crate::load::Round;
use crate::pause::{Event, Phase};
use crate::report::{Report, time, whole};
use crate::rows::{Metric, Work};

const PANEL_WIDTH: f64 = 380.0;
const PANEL_HEIGHT: f64 = 250.0;
/// Around the axes of a panel: left, right, top, bottom.
const MARGIN: [f64; 4] = [64.0, 14.0, 34.0, 40.0];
const HEAD: f64 = 52.0;
/// For A and B; they differ in brightness too.
const COLOURS: [&str; 2] = ["#c4691c", "#1f5fa8"];

#[derive(Clone, Copy, PartialEq, Eq)]
enum Scale {
    /// From zero.
    Linear,
    Log,
}

struct Axis {
    title: &'static str,
    scale: Scale,
    /// How a number at the axis is written.
    show: fn(f64) -> String,
}

struct Panel {
    title: String,
    x: Axis,
    y: Axis,
    /// For A and B.
    lines: [Vec<Vec<(f64, f64)>>; 2],
    /// Where the event ended, for A and B.
    marks: [Option<f64>; 2],
}

/// Throughput and p99 over the number of clients, for put and get.
pub fn clients(report: &Report) -> Option<String> {
    let kinds = [
        ("put", Work::Put),
        ("linearizable get", Work::Get { serializable: false }),
        ("serializable get", Work::Get { serializable: true }),
    ];
    let mut panels = Vec::new();
    for (metric, title, scale, show) in [
        (Metric::Throughput, "operations/s", Scale::Linear, brief_count as fn(f64) -> String),
        (Metric::P99, "p99", Scale::Log, brief_time),
    ] {
        for (name, work) in kinds {
            let rows = || report.rows.iter().filter(|row| row.row.work == work);
            let line = |side| rows().filter_map(|row| Some((row.row.clients as f64, row.median(side, metric)?))).collect::<Vec<_>>();
            if rows().count() > 1 {
                panels.push(Panel {
                    title: name.to_string(),
                    x: Axis { title: "clients", scale: Scale::Log, show: brief_count },
                    y: Axis { title, scale, show },
                    lines: [vec![line(0)], vec![line(1)]],
                    marks: [None, None],
                });
            }
        }
    }
    let columns = panels.len() / 2;
    (!panels.is_empty()).then(|| document("Throughput and latency over clients", &report.names, &panels, columns))
}

/// Latency over time around each event, of the last round: the greatest of every tenth of a second.
pub fn pauses(report: &Report) -> Option<String> {
    let round = report.pauses.last()?;
    let events = Event::ALL.into_iter().map(|event| {
        let phase = |side: usize| round.get(side).and_then(|phases| phases.iter().find(|phase| phase.event == event));
        let line = |phase: Option<&Phase>| phase.map(|phase| phase.points.iter().map(|point| (point.at_s, point.max_us)).collect());
        let mark = |phase: Option<&Phase>| phase.filter(|_| event != Event::Quiet).map(|phase| phase.took_s);
        Panel {
            title: format!("put, {}", event.title()),
            x: Axis { title: "s since its begin; the dashed line is its end", scale: Scale::Linear, show: |s| format!("{s}") },
            y: Axis { title: "greatest latency in 0.1 s", scale: Scale::Log, show: brief_time },
            lines: [line(phase(0)).into_iter().collect(), line(phase(1)).into_iter().collect()],
            marks: [mark(phase(0)), mark(phase(1))],
        }
    });
    let panels: Vec<_> = events.collect();
    Some(document("Put latency while a server looks after itself", &report.names, &panels, 2))
}

/// Throughput over the number of keys, one version of each.
pub fn growth(report: &Report) -> Option<String> {
    let sizes = || report.sizes.iter().filter(|size| size.versions == 1);
    (sizes().count() > 1).then_some(())?;
    let first = sizes().next()?;
    let panels = first.rows.iter().enumerate().map(|(index, row)| {
        let line = |side| {
            let point = |size: &crate::report::Size| Some((size.keys as f64, size.rows.get(index)?.median(side, Metric::Throughput)?));
            sizes().filter_map(point).collect::<Vec<_>>()
        };
        Panel {
            title: row.row.title.to_string(),
            x: Axis { title: "keys", scale: Scale::Log, show: brief_count },
            y: Axis { title: "operations/s", scale: Scale::Linear, show: brief_count },
            lines: [vec![line(0)], vec![line(1)]],
            marks: [None, None],
        }
    });
    Some(document("Throughput over the number of keys", &report.names, &panels.collect::<Vec<_>>(), 3))
}

fn document(title: &str, names: &[String; 2], panels: &[Panel], columns: usize) -> String {
    let columns = columns.max(1);
    let (width, height) = (columns as f64 * PANEL_WIDTH, HEAD + panels.len().div_ceil(columns) as f64 * PANEL_HEIGHT);
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" width=\"{width}\" height=\"{height}\" \
         font-family=\"system-ui, sans-serif\" font-size=\"11\" fill=\"#333\">\n<rect width=\"100%\" height=\"100%\" fill=\"#fff\"/>\n"
    );
    text(&mut svg, (12.0, 22.0), "start", "font-size=\"15\" font-weight=\"600\"", title);
    for ((name, colour), at) in names.iter().zip(COLOURS).zip([12.0, 12.0 + 190.0]) {
        let _ = writeln!(svg, "<path d=\"M{at} 38h22\" stroke=\"{colour}\" stroke-width=\"2.5\"/>");
        text(&mut svg, (at + 28.0, 42.0), "start", "", name);
    }
    for (index, panel) in panels.iter().enumerate() {
        let _ = writeln!(
            svg,
            "<g transform=\"translate({} {})\">",
            (index % columns) as f64 * PANEL_WIDTH,
            HEAD + (index / columns) as f64 * PANEL_HEIGHT
        );
        panel.draw(&mut svg);
        svg += "</g>\n";
    }
    svg + "</svg>\n"
}

fn text(svg: &mut String, (x, y): (f64, f64), anchor: &str, style: &str, text: &str) {
    let text = text.replace('&', "&amp;").replace('<', "&lt;");
    let _ = writeln!(svg, "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\" {style}>{text}</text>");
}

impl Panel {
    fn draw(&self, svg: &mut String) {
        let [left, right, top, bottom] = MARGIN;
        let (x_end, y_end) = (PANEL_WIDTH - right, PANEL_HEIGHT - bottom);
        let points = || self.lines.iter().flatten().flatten().copied();
        text(svg, (left, top - 12.0), "start", "font-weight=\"600\"", &self.title);
        let (Some(xs), Some(ys)) =
            (Span::of(points().map(|point| point.0), self.x.scale), Span::of(points().map(|point| point.1), self.y.scale))
        else {
            return text(svg, (left, top + 20.0), "start", "", "not measured");
        };
        // Time starts where the load did, amounts at zero.
        let ys = if self.y.scale == Scale::Linear { Span { low: 0.0, high: ys.high * 1.05, ..ys } } else { ys };
        let x = |value: f64| left + xs.place(value) * (x_end - left);
        let y = |value: f64| y_end - ys.place(value) * (y_end - top);

        for tick in ys.ticks() {
            let at = y(tick);
            let _ = writeln!(svg, "<path d=\"M{left} {at:.1}H{x_end}\" stroke=\"#ddd\"/>");
            text(svg, (left - 6.0, at + 4.0), "end", "", &(self.y.show)(tick));
        }
        // Few numbers of clients or keys are marked as they are; time gets a scale.
        let mut ticks: Vec<f64> = if self.x.scale == Scale::Log { points().map(|point| point.0).collect() } else { xs.ticks() };
        ticks.sort_by(f64::total_cmp);
        ticks.dedup();
        for tick in ticks {
            let at = x(tick);
            let _ = writeln!(svg, "<path d=\"M{at:.1} {y_end}v4\" stroke=\"#999\"/>");
            text(svg, (at, y_end + 16.0), "middle", "", &(self.x.show)(tick));
        }
        if xs.low < 0.0 {
            let _ = writeln!(svg, "<path d=\"M{:.1} {top}V{y_end}\" stroke=\"#bbb\"/>", x(0.0));
        }
        let _ = writeln!(svg, "<path d=\"M{left} {top}V{y_end}H{x_end}\" fill=\"none\" stroke=\"#999\"/>");
        text(svg, (f64::midpoint(left, x_end), y_end + 32.0), "middle", "fill=\"#777\"", self.x.title);
        text(svg, (x_end, top - 12.0), "end", "fill=\"#777\"", self.y.title);

        for ((lines, mark), colour) in self.lines.iter().zip(self.marks).zip(COLOURS) {
            if let Some(mark) = mark.filter(|mark| *mark <= xs.high) {
                let at = x(mark);
                let _ = writeln!(svg, "<path d=\"M{at:.1} {top}V{y_end}\" stroke=\"{colour}\" stroke-dasharray=\"3 3\"/>");
            }
            for line in lines {
                let mut path = String::new();
                for (index, point) in line.iter().enumerate() {
                    let _ = write!(path, "{}{:.1} {:.1}", if index == 0 { "M" } else { "L" }, x(point.0), y(point.1));
                }
                let _ =
                    writeln!(svg, "<path d=\"{path}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"1.8\" stroke-linejoin=\"round\"/>");
                // Dots where each point is a measurement of its own.
                for point in line.iter().filter(|_| line.len() <= 12) {
                    let _ = writeln!(svg, "<circle cx=\"{:.1}\" cy=\"{:.1}\" r=\"2.6\" fill=\"{colour}\"/>", x(point.0), y(point.1));
                }
            }
        }
    }
}

/// What an axis covers.
#[derive(Clone, Copy)]
struct Span {
    low: f64,
    high: f64,
    scale: Scale,
}

impl Span {
    /// `None` for no values.
    fn of(values: impl Iterator<Item = f64>, scale: Scale) -> Option<Self> {
        let usable = values.filter(|value| value.is_finite() && (scale == Scale::Linear || *value > 0.0));
        let (low, high) = usable.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), value| (low.min(value), high.max(value)));
        (low <= high).then(|| match scale {
            // A single value must not make an empty axis.
            Scale::Linear => Self { low, high: if high > low { high } else { low + 1.0 }, scale },
            Scale::Log => Self { low: low / 1.15, high: high * 1.15, scale },
        })
    }

    fn place(&self, value: f64) -> f64 {
        match self.scale {
            Scale::Linear => (value - self.low) / (self.high - self.low),
            Scale::Log => (value.max(self.low).ln() - self.low.ln()) / (self.high.ln() - self.low.ln()),
        }
    }

    /// A few round numbers within.
    fn ticks(&self) -> Vec<f64> {
        match self.scale {
            Scale::Linear => {
                let raw = (self.high - self.low) / 6.0;
                let power = 10_f64.powf(raw.log10().floor());
                let step = [1.0, 2.0, 5.0, 10.0].into_iter().map(|factor| factor * power).find(|step| *step >= raw).unwrap_or(raw);
                let first = (self.low / step).ceil() as i64;
                let last = (self.high / step).floor() as i64;
                (first..=last).map(|index| round(index as f64 * step)).collect()
            }
            Scale::Log => {
                let (first, last) = (self.low.log10().floor() as i32, self.high.log10().ceil() as i32);
                let factors: &[f64] = if last - first > 3 { &[1.0] } else { &[1.0, 2.0, 5.0] };
                let all = (first..=last).flat_map(|power| factors.iter().map(move |factor| factor * 10_f64.powi(power)));
                all.filter(|tick| *tick >= self.low && *tick <= self.high).map(round).collect()
            }
        }
    }
}

fn brief_count(number: f64) -> String {
    whole(number as u64)
}

/// Marks of an axis are round numbers: no zeros behind the point.
fn brief_time(us: f64) -> String {
    time(us).replace(".00 ", " ").replace(".0 ", " ")
}

/// Without what floating point leaves behind the ninth digit.
fn round(value: f64) -> f64 {
    (value * 1e9).round() / 1e9
}

#[cfg(test)]
#[allow(unused)] // See main.rs.
mod tests {
    use super::*;
    use crate::pause::Point;
    use crate::report::{Measured, Size};
    use crate::rows::ROWS;

    fn report() -> Report {
        let round = |per_second| vec![Round { seconds: 1.0, operations: per_second, p99_us: 900.0, ..Round::default() }];
        let rows = || ROWS.iter().map(|row| Measured { row: *row, sides: [round(1000), round(3000)] }).collect();
        let phase = |event| Phase {
            event,
            took_s: 0.4,
            bytes: 0,
            p50_us: 1.0,
            p99_us: 1.0,
            max_us: 1.0,
            errors: 0,
            first_error: None,
            points: (-5..20)
                .map(|at| Point { at_s: f64::from(at) / 10.0, p50_us: 1.0, p99_us: 1.0, max_us: f64::from(at + 6) * 100.0 })
                .collect(),
        };
        let phases = || Event::ALL.map(phase).to_vec();
        let size = |keys| Size { keys, versions: 1, rows: rows() };
        Report {
            names: ["etcd & co".into(), "quorate".into()],
            rows: rows(),
            pauses: vec![[phases(), Vec::new()]],
            sizes: vec![size(1000), size(2000)],
            ..Report::default()
        }
    }

    #[test]
    fn plots_are_well_formed() {
        let report = report();
        for (plot, panels) in [(clients(&report), 6), (pauses(&report), 4), (growth(&report), ROWS.len())] {
            let svg = plot.unwrap();
            assert_eq!(svg.matches("<g ").count(), panels);
            assert_eq!(svg.matches("</g>").count(), panels);
            assert!(!svg.contains("NaN") && !svg.contains("inf") && !svg.contains("etcd & co"), "{svg}");
            assert_eq!(svg.matches("<text").count(), svg.matches("</text>").count());
        }
        assert!(clients(&Report::default()).is_none() && pauses(&Report::default()).is_none() && growth(&Report::default()).is_none());
    }

    #[test]
    fn ticks_are_round() {
        let ticks = |low, high, scale| Span { low, high, scale }.ticks();
        assert_eq!(ticks(0.0, 43_000.0, Scale::Linear), [0.0, 10_000.0, 20_000.0, 30_000.0, 40_000.0]);
        assert_eq!(ticks(-1.0, 1.0, Scale::Linear), [-1.0, -0.5, 0.0, 0.5, 1.0]);
        assert_eq!(ticks(90.0, 2100.0, Scale::Log), [100.0, 200.0, 500.0, 1000.0, 2000.0]);
        assert_eq!(ticks(1.0, 1e6, Scale::Log).len(), 7);
    }
}
