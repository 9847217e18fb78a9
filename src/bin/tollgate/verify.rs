//! `tollgate verify`: everything in a data directory, read and held against each other.

use std::io::{self, Write};
use std::process::ExitCode;

use serde_json::{Value, json};
use tollgate::{Verdict, Verification, VerifiedFile};

use crate::Failure;
use crate::cli::VerifyOptions;
use crate::output::{damage, findings_json, publish_beside_status, with_spinner};

/// An open finds the exact state, but something that it does not need is damaged.
const WEAKENED: u8 = 3;
/// An open reports what it left out or made up for.
const FINDINGS: u8 = 4;
/// An open refuses.
const REFUSED: u8 = 5;

/// Prints it; the status says what an open would do.
pub(crate) fn run(options: &VerifyOptions) -> Result<ExitCode, Failure> {
    let message = format!("reading {}", options.dir.display());
    let verification = with_spinner(message, || tollgate::verify(&options.dir));
    let verification = verification.map_err(|error| error.to_string())?;
    publish_beside_status(|out| match options.json {
        true => writeln!(out, "{:#}", as_json(&verification)),
        false => print_text(out, &verification),
    });
    Ok(match verification.verdict {
        Verdict::Sound => ExitCode::SUCCESS,
        Verdict::Weakened => ExitCode::from(WEAKENED),
        Verdict::Findings => ExitCode::from(FINDINGS),
        _ => ExitCode::from(REFUSED),
    })
}

fn print_text(out: &mut dyn Write, verification: &Verification) -> io::Result<()> {
    let Verification { verdict, report, last_batch, files, .. } = verification;
    for VerifiedFile { name, bytes, holds, damage, .. } in files {
        match damage {
            None => writeln!(out, "{name}: {bytes} bytes, {holds}: ok")?,
            Some((offset, what)) => {
                writeln!(out, "{name}: {bytes} bytes, {holds}: damaged at {offset}: {what}")?;
            }
        }
    }
    for finding in &report.findings {
        writeln!(out, "an open would report: {finding}")?;
    }
    match verdict {
        Verdict::Refused(error) => writeln!(out, "refused: {}", damage(error))?,
        verdict => writeln!(out, "{}: batches up to {last_batch}", verdict_text(verdict))?,
    }
    Ok(())
}

fn verdict_text(verdict: &Verdict) -> &'static str {
    match verdict {
        Verdict::Sound => "sound",
        Verdict::Weakened => "opens exactly, but what it would fall back on is damaged",
        Verdict::Findings => "opens, with findings",
        _ => "refused",
    }
}

/// The same for programs.
fn verdict_name(verdict: &Verdict) -> &'static str {
    match verdict {
        Verdict::Sound => "sound",
        Verdict::Weakened => "weakened",
        Verdict::Findings => "findings",
        _ => "refused",
    }
}

fn as_json(verification: &Verification) -> Value {
    let file = |file: &VerifiedFile| {
        let damage = file.damage.as_ref();
        let damage = damage.map(|(offset, what)| json!({ "offset": offset, "what": what }));
        json!({ "name": file.name, "bytes": file.bytes, "holds": file.holds, "damage": damage })
    };
    let refusal = match &verification.verdict {
        Verdict::Refused(error) => Some(damage(error)),
        _ => None,
    };
    json!({
        "engine": verification.engine_id.map(|engine| engine.to_string()),
        "verdict": verdict_name(&verification.verdict),
        "text": verdict_text(&verification.verdict),
        "refusal": refusal,
        "last_batch": verification.last_batch,
        "findings": findings_json(&verification.report.findings),
        "files": verification.files.iter().map(file).collect::<Vec<_>>(),
    })
}
