//! Printing. A pipe that nobody reads any more (`| head`, `| tee` after Ctrl-C) or a full disk does
//! not end the program in the middle, as it would with `println!`.

use std::fmt::Display;
use std::io::{self, ErrorKind, Write};

use serde_json::{Value, json};
use tollgate::Finding;

use crate::Failure;

/// A line for whoever looks on.
pub(crate) fn say(line: impl Display) {
    let _ = writeln!(io::stdout().lock(), "{line}");
}

/// A line about trouble.
pub(crate) fn complain(line: impl Display) {
    let _ = writeln!(io::stderr().lock(), "tollgate: {line}");
}

/// What a command was asked for. Who stops reading has read enough; that it can't be written for
/// another reason is a failure.
pub(crate) fn publish(write: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> Result<(), Failure> {
    let mut out = io::stdout().lock();
    match write(&mut out).and_then(|()| out.flush()) {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => Err(format!("can't print: {error}")),
        _ => Ok(()),
    }
}

/// [`publish`] for a command whose status says more than whether it could print.
pub(crate) fn publish_beside_status(write: impl FnOnce(&mut dyn Write) -> io::Result<()>) {
    if let Err(failure) = publish(write) {
        complain(failure);
    }
}

pub(crate) fn findings_json(findings: &[Finding]) -> Vec<Value> {
    let object = |finding: &Finding| {
        json!({
            "file": finding.path.display().to_string(),
            "offset": finding.offset,
            "what": finding.what,
        })
    };
    findings.iter().map(object).collect()
}
