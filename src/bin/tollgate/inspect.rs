//! `tollgate inspect`: what a data directory holds.

use std::io::{self, Write};

use serde_json::{Value, json};
use tollgate::sink::Position;
use tollgate::{InspectedFile, InspectedFileState, InspectedQuota, InspectedSink, Inspection};

use crate::Failure;
use crate::cli::InspectOptions;
use crate::definition::describe;
use crate::output::{findings_json, publish, with_spinner};

/// Prints it.
pub(crate) fn run(options: &InspectOptions) -> Result<(), Failure> {
    let message = format!("reading {}", options.dir.display());
    let inspection = with_spinner(message, || tollgate::inspect(&options.dir));
    let inspection = inspection.map_err(|error| error.to_string())?;
    publish(|out| match options.json {
        true => writeln!(out, "{:#}", as_json(&inspection)),
        false => print_text(out, &inspection),
    })
}

fn print_text(out: &mut dyn Write, inspection: &Inspection) -> io::Result<()> {
    let Inspection { engine_id, generation, last_batch, durable_batch, report, .. } = inspection;
    writeln!(out, "engine {engine_id}, times opened: {generation}")?;
    writeln!(out, "batches up to {last_batch}, known durable up to {durable_batch}")?;
    writeln!(out, "\nquotas")?;
    for InspectedQuota { id, quota, counters, used, largest, .. } in &inspection.quotas {
        let window = quota.counting_window();
        writeln!(out, "  {id} {:?}: limit {}, window {window}", quota.name(), quota.limit())?;
        write!(out, "     {counters} counters in open windows, {used} used")?;
        match largest {
            Some((user, most)) => writeln!(out, ", most by user {user}: {most}")?,
            None => writeln!(out)?,
        }
    }
    writeln!(out, "\nlanes")?;
    for lane in &inspection.lanes {
        writeln!(
            out,
            "  {}: {} of {} records wait for the journal, which goes on at {}",
            lane.name, lane.waiting, lane.capacity, lane.next
        )?;
    }
    if !inspection.sinks.is_empty() {
        writeln!(out, "\nsinks")?;
    }
    for InspectedSink { name, position, in_flight, backlog, .. } in &inspection.sinks {
        let [at, sent] = [position, in_flight]
            .map(|at| at.map_or_else(|| "none".to_owned(), |at| at.to_string()));
        writeln!(
            out,
            "  {name}: position {at}, in flight {sent}, {} files of backlog",
            backlog.len()
        )?;
    }
    writeln!(out, "\nfiles")?;
    for file in &inspection.files {
        writeln!(out, "  {}: {} bytes, {}", file.name, file.bytes, state_text(&file.state))?;
    }
    if !report.findings.is_empty() {
        writeln!(out, "\nan open would report")?;
        for finding in &report.findings {
            writeln!(out, "  {finding}")?;
        }
    }
    Ok(())
}

fn state_text(state: &InspectedFileState) -> String {
    match state {
        InspectedFileState::HoldsAfter(batch) => format!("batches after {batch}"),
        InspectedFileState::Prepared => "prepared".to_owned(),
        InspectedFileState::Unreadable(reason) => format!("unreadable: {reason}"),
        InspectedFileState::Snapshot { batch, sums } => {
            format!("snapshot up to batch {batch}, {sums} sums")
        }
        InspectedFileState::DamagedSnapshot(reason) => format!("damaged: {reason}"),
        _ => "unknown".to_owned(),
    }
}

fn as_json(inspection: &Inspection) -> Value {
    let quotas: Vec<_> = inspection
        .quotas
        .iter()
        .map(|entry| {
            let mut quota = describe(entry.id, &entry.quota);
            quota["counters"] = json!(entry.counters);
            quota["used"] = json!(entry.used.to_string());
            let largest = entry.largest;
            quota["largest"] =
                json!(largest.map(|(user, used)| json!({ "user": user, "used": used })));
            quota
        })
        .collect();
    let lanes: Vec<_> = inspection
        .lanes
        .iter()
        .map(|lane| {
            json!({
                "name": lane.name,
                "capacity": lane.capacity,
                "next": lane.next,
                "waiting": lane.waiting,
            })
        })
        .collect();
    let position =
        |at: Option<Position>| at.map(|at| json!({ "batch": at.batch, "check": at.check }));
    let sink = |sink: &InspectedSink| {
        json!({
            "name": sink.name,
            "position": position(sink.position),
            "in_flight": position(sink.in_flight),
            "backlog": sink.backlog,
        })
    };
    let file = |file: &InspectedFile| json!({ "name": file.name, "bytes": file.bytes, "state": state_text(&file.state) });
    json!({
        "engine": inspection.engine_id.to_string(),
        "generation": inspection.generation,
        "last_batch": inspection.last_batch,
        "durable_batch": inspection.durable_batch,
        "quotas": quotas,
        "lanes": lanes,
        "sinks": inspection.sinks.iter().map(sink).collect::<Vec<_>>(),
        "files": inspection.files.iter().map(file).collect::<Vec<_>>(),
        "findings": findings_json(&inspection.report.findings),
    })
}
