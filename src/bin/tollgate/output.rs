//! Printing. A pipe that nobody reads any more (`| head`, `| tee` after Ctrl-C) or a full disk does
//! not end the program in the middle, as it would with `println!`.

use std::fmt::Display;
use std::io::{self, ErrorKind, IsTerminal as _, Write};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::Duration;

use indicatif::ProgressBar;
use serde_json::{Value, json};
use tollgate::{Error, Finding};

use crate::Failure;

/// How often a spinner turns.
const TICK: Duration = Duration::from_millis(200);

/// A line for whoever looks on.
pub(crate) fn say(line: impl Display) {
    let _ = writeln!(io::stdout().lock(), "{line}");
}

/// A line about trouble.
pub(crate) fn complain(line: impl Display) {
    let _ = writeln!(io::stderr().lock(), "tollgate: {line}");
}

/// Shows on a terminal that something takes a while.
pub(crate) fn with_spinner<T>(message: String, work: impl FnOnce() -> T) -> T {
    if !io::stderr().is_terminal() {
        return work();
    }
    let spinner = ProgressBar::new_spinner().with_message(message);
    let (done, pause) = channel::<()>();
    let turning = spinner.clone();
    // indicatif's own thread would panic where none can be made: then nothing turns.
    let ticker = thread::Builder::new().name("tollgate-spinner".to_owned()).spawn(move || {
        while pause.recv_timeout(TICK) == Err(RecvTimeoutError::Timeout) {
            turning.tick();
        }
    });
    let result = work();
    drop(done);
    let _ = ticker.map(thread::JoinHandle::join);
    spinner.finish_and_clear();
    result
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

/// An error, without the advice to run the command that the operator is running, or is told of.
pub(crate) fn damage(error: &Error) -> String {
    match error {
        Error::Damaged { path, offset, reason, .. } => {
            format!("{} is damaged at byte {offset}: {reason}", path.display())
        }
        error => error.to_string(),
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
