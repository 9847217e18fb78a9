//! `tollgate salvage`: a new data directory from all that verifies in a damaged one.

use std::io::{self, Write};
use std::process::ExitCode;

use serde_json::{Value, json};
use tollgate::Salvage;

use crate::Failure;
use crate::cli::SalvageOptions;
use crate::output::{findings_json, publish_beside_status, with_spinner};

/// Something is lost, or may be.
const LOSSES: u8 = 4;

/// Makes it, and prints what is in it and what is not; the status says whether anything is lost.
pub(crate) fn run(options: &SalvageOptions) -> Result<ExitCode, Failure> {
    let (dir, to) = (options.dir.display(), options.to.display());
    let salvage =
        with_spinner(format!("reading {dir}"), || tollgate::salvage(&options.dir, &options.to));
    let salvage = salvage.map_err(|error| error.to_string())?;
    publish_beside_status(|out| {
        if options.json {
            return writeln!(out, "{:#}", as_json(&salvage));
        }
        print_text(out, &salvage)?;
        writeln!(out, "{to} is a data directory now; {dir} is as it was")
    });
    Ok(if salvage.losses.is_empty() { ExitCode::SUCCESS } else { ExitCode::from(LOSSES) })
}

fn print_text(out: &mut dyn Write, salvage: &Salvage) -> io::Result<()> {
    let Salvage { source_engine_id, engine_id, last_batch, journal_batches, .. } = salvage;
    writeln!(out, "engine {source_engine_id}, now engine {engine_id}")?;
    match salvage.snapshot_batch {
        Some(batch) => writeln!(out, "the snapshot of batch {batch}")?,
        None => writeln!(out, "no snapshot")?,
    }
    writeln!(out, "{journal_batches} batches of the journal, the last is {last_batch}")?;
    writeln!(out, "{} records of the rings that no batch holds", salvage.lane_records)?;
    writeln!(out, "{} quotas, {} sums, {} limits", salvage.quotas, salvage.sums, salvage.limits)?;
    for sink in &salvage.sinks {
        writeln!(
            out,
            "sink {sink:?}: to it this is a new engine, which delivers its totals on top of what the \
             old one delivered; empty it first, or use another"
        )?;
    }
    for (title, findings) in [("damaged", &salvage.damage), ("lost", &salvage.losses)] {
        for finding in findings {
            writeln!(out, "{title}: {finding}")?;
        }
    }
    if salvage.losses.is_empty() {
        writeln!(out, "nothing is lost")?;
    }
    Ok(())
}

fn as_json(salvage: &Salvage) -> Value {
    json!({
        "source_engine": salvage.source_engine_id.to_string(),
        "engine": salvage.engine_id.to_string(),
        "snapshot_batch": salvage.snapshot_batch,
        "journal_batches": salvage.journal_batches,
        "last_batch": salvage.last_batch,
        "lane_records": salvage.lane_records,
        "quotas": salvage.quotas,
        "sums": salvage.sums,
        "limits": salvage.limits,
        "sinks": salvage.sinks,
        "damage": findings_json(&salvage.damage),
        "losses": findings_json(&salvage.losses),
    })
}
