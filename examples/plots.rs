//! Draws the plots of `docs/performance.md`, and fills in its table, from what the benchmarks have
//! written: `cargo run --release --example plots`.
//!
//! The folder that holds the JSON and gets the SVG is `docs/plots`, or the first argument; the table
//! goes to `docs/performance.md` only where that folder is.
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

fn main() -> Outcome {
    let folder = std::env::args().nth(1).map_or_else(|| PathBuf::from("docs/plots"), PathBuf::from);
    cost(&read(&folder, "throughput")?, &folder.join("cost.svg"))?;
    latency(&read(&folder, "tail")?, &folder.join("latency.svg"))?;
    bytes(&read(&folder, "sustained")?, &folder.join("bytes.svg"))?;
    table(&folder, &folder.join("../performance.md"))
}

/// Replaces the table between the markers by what has a target, and what it reached.
fn table(folder: &Path, page: &Path) -> Outcome {
    const BENCHMARKS: [&str; 5] = ["throughput", "sustained", "tail", "durable", "recovery"];
    const MARKERS: [&str; 2] = ["<!-- figures -->\n", "<!-- end of figures -->"];
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
    let text = fs::read_to_string(page)?;
    let [begin, end] = MARKERS.map(|marker| text.find(marker).map(|at| (at, at + marker.len())));
    let (Some((_, begin)), Some((end, _))) = (begin, end) else {
        return Err(format!("{} has no markers", page.display()).into());
    };
    fs::write(page, [&text[..begin], &rows, &text[end..]].concat())?;
    println!("filled in: {}", page.display());
    Ok(())
}

/// Calls `tell` with the row itself, and with its comparisons.
fn judged(row: &Value, tell: &mut dyn FnMut(String, String, &Value)) {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let what = format!("{}: {}", text(&row["scenario"]), text(&row["name"]));
    let median = short(row["median"].as_f64().unwrap_or(f64::NAN));
    tell(what.clone(), format!("{median} {}", text(&row["unit"])), row);
    for against in row["against"].as_array().into_iter().flatten() {
        let ratio = against["ratio"].as_f64().unwrap_or(f64::NAN);
        tell(what.clone(), format!("{ratio:.2} x {}", text(&against["baseline"])), against);
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
