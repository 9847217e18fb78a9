//! Draws the plots of `docs/performance.md`, and fills in its tables, from what the benchmarks have
//! written: `cargo run --release --example plots`.
//!
//! The folder that holds the JSON and gets the SVG is `docs/plots`, or the first argument; the
//! table goes to `docs/performance.md` only where that folder is.
#![allow(clippy::print_stdout, reason = "an example says what it does")]

use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};

use plotters::chart::SeriesAnno;
use plotters::prelude::*;
use serde_json::Value;

type Outcome = Result<(), Box<dyn Error>>;

const SIZE: (u32, u32) = (960, 480);
const FONT: &str = "sans-serif";
const BLUE_TONE: RGBColor = RGBColor(0x1F, 0x77, 0xB4);
const LIGHT_BLUE: RGBColor = RGBColor(0x8C, 0xC0, 0xE6);
const GREY_TONE: RGBColor = RGBColor(0x8A, 0x8A, 0x8A);
const ORANGE: RGBColor = RGBColor(0xE0, 0x80, 0x20);
const RED: RGBColor = RGBColor(0xC0, 0x40, 0x40);

fn main() -> Outcome {
    let folder = std::env::args().nth(1).map_or_else(|| PathBuf::from("docs/plots"), PathBuf::from);
    cost(&read(&folder, "throughput")?, &folder.join("cost.svg"))?;
    latency(&read(&folder, "tail")?, &folder.join("latency.svg"))?;
    bytes(&read(&folder, "sustained")?, &folder.join("bytes.svg"))?;
    let scenarios = read(&folder, "scenarios")?;
    designs(&scenarios, &folder.join("scenarios.svg"))?;
    let page = folder.join("../performance.md");
    fill(&page, "scenarios", &designs_table(&scenarios))?;
    fill(&page, "figures", &targets_table(&folder)?)
}

/// Replaces what is between the page's markers of this name.
fn fill(page: &Path, name: &str, rows: &str) -> Outcome {
    let text = fs::read_to_string(page)?;
    let markers = [format!("<!-- {name} -->\n"), format!("<!-- end of {name} -->")];
    let [begin, end] = markers.map(|marker| text.find(&marker).map(|at| (at, at + marker.len())));
    let (Some((_, begin)), Some((end, _))) = (begin, end) else {
        return Err(format!("{} has no markers of {name}", page.display()).into());
    };
    fs::write(page, [&text[..begin], rows, &text[end..]].concat())?;
    println!("filled in: {}, {name}", page.display());
    Ok(())
}

/// What has a target, and what it reached.
fn targets_table(folder: &Path) -> Result<String, Box<dyn Error>> {
    const BENCHMARKS: [&str; 7] =
        ["throughput", "ledger", "sustained", "tail", "durable", "recovery", "scenarios"];
    let mut rows = String::from(
        "\n| what | measured | must reach | | `cargo bench --bench` ... |\n| --- | --- | --- | --- | --- |\n",
    );
    for name in BENCHMARKS {
        let report = read(folder, name)?;
        for row in report["rows"].as_array().into_iter().flatten() {
            judged(row, &mut |what, measured, judgement| {
                let (Some(target), Some(met)) =
                    (judgement["target"].as_str(), judgement["met"].as_bool())
                else {
                    return;
                };
                let met = if met { "met" } else { "**missed**" };
                rows.push_str(&format!("| {what} | {measured} | {target} | {met} | `{name}` |\n"));
            });
        }
    }
    rows.push('\n');
    Ok(rows)
}

const LOADS: [&str; 3] = ["100/s", "1,000/s", "burst 100-2,000/s"];
const DESIGNS: [(&str, RGBColor); 5] = [
    ("transaction", ORANGE),
    ("channel", RED),
    ("tollgate, consume_sync", LIGHT_BLUE),
    ("tollgate", BLUE_TONE),
    ("bare map", GREY_TONE),
];
/// Of the times of a call, and of those from when it was due.
const SERVICE: &str = "service";
const RESPONSE: &str = "response";

/// The designs' times by load, and what the database had; then what a kill has lost.
fn designs_table(report: &Value) -> String {
    const CASES: [&str; 3] =
        ["bare map, database killed", "tollgate, database killed", "tollgate, new users"];
    let mut rows = String::from(
        "\n| load | design | mean | p50 | p99 | max | p99 from due | max from due | counted | in the database |\n\
         | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |\n",
    );
    for load in LOADS {
        for design in DESIGNS.iter().map(|(design, _)| *design).chain(CASES) {
            let run = format!("{load}, {design}");
            let [service, response] = [SERVICE, RESPONSE].map(|of| format!("{run}, {of}"));
            let times = [
                (&service, "mean"),
                (&service, "p50"),
                (&service, "p99"),
                (&service, "max"),
                (&response, "p99"),
                (&response, "max"),
            ];
            let times = times.map(|(scenario, name)| median(report, scenario, name).map(micros));
            let counts = ["counted", "in the database"].map(|name| median(report, &run, name));
            let cells = times.into_iter().chain(counts.map(|count| Some(count?.to_string())));
            // Not every case is measured under every load.
            if let Some(cells) = cells.collect::<Option<Vec<_>>>() {
                rows.push_str(&format!("| {load} | {design} | {} |\n", cells.join(" | ")));
            }
        }
    }
    rows.push_str("\n| killed at 1,000/s | acknowledged | lost |\n| --- | --- | --- |\n");
    for (design, _) in DESIGNS {
        let scenario = format!("killed at 1,000/s, {design}");
        let count = |name| median(report, &scenario, name);
        if let (Some(acknowledged), Some(lost)) = (count("acknowledged"), count("lost")) {
            rows.push_str(&format!("| {design} | {acknowledged} | {lost} |\n"));
        }
    }
    rows.push('\n');
    rows
}

fn micros(value: f64) -> String {
    match value {
        _ if value >= 1e3 => format!("{:.2} ms", value / 1e3),
        _ if value >= 100.0 => format!("{value:.0} us"),
        _ if value >= 10.0 => format!("{value:.1} us"),
        _ => format!("{value:.2} us"),
    }
}

/// Microseconds of a call by design and load: a bar from the median to the 99th percentile, a line
/// on to the longest, and a ring for the 99th percentile from when it was due.
fn designs(report: &Value, path: &Path) -> Outcome {
    let root = SVGBackend::new(path, SIZE).into_drawing_area();
    root.fill(&WHITE)?;
    let caption = "Check and consume: bar p50 to p99, line to max, ring p99 from when it was due";
    let mut chart = ChartBuilder::on(&root)
        .caption(caption, (FONT, 20))
        .margin(12)
        .x_label_area_size(36)
        .y_label_area_size(72)
        .build_cartesian_2d(0.0..LOADS.len() as f64 * 1.12, (0.01..1e6).log_scale())?;
    chart
        .configure_mesh()
        .disable_x_mesh()
        .disable_x_axis()
        .y_label_formatter(&|micros| duration(micros * 1e3))
        .label_style((FONT, 13))
        .draw()?;
    let width = 0.8 / DESIGNS.len() as f64;
    for (index, (design, color)) in DESIGNS.into_iter().enumerate() {
        let (mut bars, mut lines, mut rings) = (Vec::new(), Vec::new(), Vec::new());
        for (place, load) in LOADS.iter().enumerate() {
            let time = |of, name| median(report, &format!("{load}, {design}, {of}"), name);
            let times = ["p50", "p99", "max"].map(|name| time(SERVICE, name));
            let ([Some(p50), Some(p99), Some(max)], Some(due)) = (times, time(RESPONSE, "p99"))
            else {
                continue;
            };
            let left = place as f64 + 0.1 + index as f64 * width;
            let middle = left + width * 0.4;
            bars.push(Rectangle::new([(left, p50), (left + width * 0.8, p99)], color.filled()));
            lines.push(PathElement::new([(middle, p99), (middle, max)], color.stroke_width(2)));
            rings.push(Circle::new((middle, due), 5, BLACK.stroke_width(1)));
        }
        key(chart.draw_series(bars)?, design, color);
        chart.draw_series(lines)?;
        chart.draw_series(rings)?;
    }
    for (place, load) in LOADS.iter().enumerate() {
        let at = chart.backend_coord(&(place as f64 + 0.3, 0.01));
        root.draw(&Text::new(*load, (at.0, at.1 + 10), (FONT, 13)))?;
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperRight)
        .border_style(BLACK.mix(0.3))
        .background_style(WHITE)
        .draw()?;
    finish(&root, path)
}

/// Calls `tell` with the row itself, and with its comparisons.
fn judged(row: &Value, tell: &mut dyn FnMut(String, String, &Value)) {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let what = format!("{}: {}", text(&row["scenario"]), text(&row["name"]));
    let median = short(row["median"].as_f64().unwrap_or(f64::NAN));
    tell(what.clone(), format!("{median} {}", text(&row["unit"])), row);
    for against in row["against"].as_array().into_iter().flatten() {
        let ratio = against["ratio"].as_f64().unwrap_or(f64::NAN);
        let ratio = format!("{ratio:.2} x {}", text(&against["baseline"]));
        tell(what.clone(), format!("{ratio} ({median} {})", text(&row["unit"])), against);
    }
}

fn short(value: f64) -> String {
    match value {
        _ if value >= 1e6 => format!("{:.1} M", value / 1e6),
        _ if value >= 1e4 => format!("{:.1} k", value / 1e3),
        _ if value >= 100.0 => format!("{value:.0}"),
        _ => format!("{value:.2}"),
    }
}

/// What the benchmark of this name has written.
fn read(folder: &Path, name: &str) -> Result<Value, Box<dyn Error>> {
    let path = folder.join(format!("{name}.json"));
    let text = fs::read_to_string(&path).map_err(|error| {
        let path = path.display();
        format!("{path}: {error}; `cargo bench --bench {name} -- --json {path}` writes it")
    })?;
    Ok(serde_json::from_str(&text)?)
}

/// The median of the row, in a scenario.
fn median(report: &Value, scenario: &str, name: &str) -> Option<f64> {
    let row = report["rows"]
        .as_array()?
        .iter()
        .find(|row| row["scenario"] == scenario && row["name"] == name)?;
    row["median"].as_f64()
}

/// Nanoseconds per operation, by keys and threads.
fn cost(report: &Value, path: &Path) -> Outcome {
    const CONTESTANTS: [(&str, RGBColor); 4] = [
        ("try_consume", BLUE_TONE),
        ("handle", LIGHT_BLUE),
        ("bare map", GREY_TONE),
        ("governor", ORANGE),
    ];
    const SCENARIOS: [(&str, &str); 8] = [
        ("uniform-100k-1t", "100k, 1 thread"),
        ("uniform-100k-2t", "100k, 2 threads"),
        ("zipf-100k-1t", "Zipf, 1 thread"),
        ("zipf-100k-2t", "Zipf, 2 threads"),
        ("uniform-1m-1t", "1M, 1 thread"),
        ("uniform-1m-2t", "1M, 2 threads"),
        ("one-user-1t", "1 user, 1 thread"),
        ("one-user-2t", "1 user, 2 threads"),
    ];
    let value = |scenario, contestant| median(report, scenario, contestant).unwrap_or(0.0);
    let all = SCENARIOS
        .iter()
        .flat_map(|(scenario, _)| CONTESTANTS.iter().map(|(name, _)| value(scenario, name)));
    let highest = all.fold(0.0, f64::max) * 1.1;

    let root = SVGBackend::new(path, SIZE).into_drawing_area();
    root.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&root)
        .caption("Nanoseconds per operation and thread", (FONT, 20))
        .margin(12)
        .x_label_area_size(36)
        .y_label_area_size(56)
        .build_cartesian_2d(0.0..SCENARIOS.len() as f64, 0.0..highest)?;
    chart.configure_mesh().disable_x_mesh().disable_x_axis().label_style((FONT, 13)).draw()?;
    for (index, (name, color)) in CONTESTANTS.iter().enumerate() {
        let bars = SCENARIOS.iter().enumerate().map(|(place, (scenario, _))| {
            let width = 0.8 / CONTESTANTS.len() as f64;
            let left = place as f64 + 0.1 + index as f64 * width;
            let corners = [(left, 0.0), (left + width * 0.92, value(scenario, name))];
            Rectangle::new(corners, color.filled())
        });
        key(chart.draw_series(bars)?, name, *color);
    }
    for (place, (_, label)) in SCENARIOS.iter().enumerate() {
        let at = chart.backend_coord(&(place as f64 + 0.1, 0.0));
        root.draw(&Text::new(*label, (at.0, at.1 + 10), (FONT, 12)))?;
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperLeft)
        .border_style(BLACK.mix(0.3))
        .background_style(WHITE)
        .draw()?;
    finish(&root, path)
}

/// Which part of the operations took longer than so long.
fn latency(report: &Value, path: &Path) -> Outcome {
    const CONTESTANTS: [(&str, RGBColor); 3] =
        [("try_consume", BLUE_TONE), ("bare map", GREY_TONE), ("governor", ORANGE)];
    let root = SVGBackend::new(path, SIZE).into_drawing_area();
    root.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&root)
        .caption("Operations that took longer, at 1 M a second, compaction running", (FONT, 20))
        .margin(12)
        .x_label_area_size(44)
        .y_label_area_size(72)
        .build_cartesian_2d((10.0..1e8).log_scale(), (1e-8..1.0).log_scale())?;
    chart
        .configure_mesh()
        .x_desc("nanoseconds")
        .y_desc("part of all operations")
        .x_label_formatter(&|nanos| duration(*nanos))
        .y_label_formatter(&|part| format!("{part:e}"))
        .label_style((FONT, 13))
        .draw()?;
    for (name, color) in CONTESTANTS {
        let points = slower_than(&report["extra"][format!("{name} service")]);
        key(chart.draw_series(LineSeries::new(points, color.stroke_width(2)))?, name, color);
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperRight)
        .border_style(BLACK.mix(0.3))
        .background_style(WHITE)
        .draw()?;
    finish(&root, path)
}

/// From how many took how long to which part took longer.
fn slower_than(counts: &Value) -> Vec<(f64, f64)> {
    let counts = counts.as_array().map(Vec::as_slice).unwrap_or_default();
    let pairs: Vec<(f64, f64)> =
        counts.iter().filter_map(|pair| Some((pair[0].as_f64()?, pair[1].as_f64()?))).collect();
    let total: f64 = pairs.iter().map(|(_, count)| count).sum();
    let mut left = total;
    let mut points = Vec::new();
    for (nanos, count) in pairs {
        points.push((nanos, left / total));
        left -= count;
    }
    points
}

fn duration(nanos: f64) -> String {
    match nanos {
        _ if nanos >= 1e6 => format!("{} ms", nanos / 1e6),
        _ if nanos >= 1e3 => format!("{} us", nanos / 1e3),
        _ => format!("{nanos} ns"),
    }
}

/// Bytes that a consume costs the disk, by rate.
fn bytes(report: &Value, path: &Path) -> Outcome {
    const RATES: [&str; 5] =
        ["1000 a second", "10000 a second", "100000 a second", "1000000 a second", "full speed"];
    const RAW_RECORD: f64 = 32.0;
    const COUNTS: [(&str, &str, RGBColor); 2] = [
        ("by the device", "tollgate, as the device counts", BLUE_TONE),
        ("by the engine", "tollgate, journal and snapshots alone", LIGHT_BLUE),
    ];

    let root = SVGBackend::new(path, SIZE).into_drawing_area();
    root.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&root)
        .caption("Bytes written to disk for each consume", (FONT, 20))
        .margin(12)
        .x_label_area_size(44)
        .y_label_area_size(72)
        .build_cartesian_2d((500.0..1e8).log_scale(), (1.0..1e5).log_scale())?;
    chart
        .configure_mesh()
        .x_desc("consumes a second")
        .y_desc("bytes a consume")
        .x_label_formatter(&|rate| format!("{rate:e}"))
        .label_style((FONT, 13))
        .draw()?;
    for (count, name, color) in COUNTS {
        let point = |rate: &&str| {
            let scenario = format!("bytes-at-rate, {rate}");
            Some((median(report, &scenario, "consumes")?, median(report, &scenario, count)?))
        };
        let points: Vec<_> = RATES.iter().filter_map(point).collect();
        let line = LineSeries::new(points.iter().copied(), color.stroke_width(2));
        key(chart.draw_series(line)?, name, color);
        chart.draw_series(points.iter().map(|&at| Circle::new(at, 4, color.filled())))?;
    }
    let raw = LineSeries::new([(500.0, RAW_RECORD), (1e8, RAW_RECORD)], GREY_TONE.stroke_width(2));
    key(chart.draw_series(raw)?, "each record written as it is", GREY_TONE);
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperRight)
        .border_style(BLACK.mix(0.3))
        .background_style(WHITE)
        .draw()?;
    finish(&root, path)
}

/// Names a series in the legend.
fn key<'a>(series: &mut SeriesAnno<'a, SVGBackend<'a>>, name: &str, color: RGBColor) {
    series.label(name).legend(move |(x, y)| {
        Rectangle::new([(x, y - 5), (x + 14, y + 5)], color.filled()).into_dyn()
    });
}

fn finish(root: &DrawingArea<SVGBackend<'_>, plotters::coord::Shift>, path: &Path) -> Outcome {
    root.present()?;
    println!("drawn: {}", path.display());
    Ok(())
}
