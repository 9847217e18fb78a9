//! The connection to the database: how long it may be silent, and attempts to connect.

use std::mem::ManuallyDrop;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use postgres::{Client, Config, Error};

use super::super::SinkError;
use super::failure::{KIND, failed};

/// The longest timeout that the server takes, and the socket.
const TIMEOUT_MAX: Duration = Duration::from_millis(i32::MAX as u64);
/// What the client sets where its user says nothing.
const KEEPALIVES_IDLE_UNSAID: Duration = Duration::from_secs(2 * 60 * 60);
/// Keepalives count in whole seconds, and not above this.
const KEEPALIVES_MAX: Duration = Duration::from_secs(32_767);
const KEEPALIVES_RETRIES: u32 = 3;
/// A host's share of an attempt, as a multiple of the time that connecting to one of its addresses
/// may take: it may have several, and the exchange before the first statement comes after that.
const HOST_TIMEOUTS: u32 = 3;

/// What can be waited for, in milliseconds.
pub(super) fn timeout(wanted: Duration) -> Duration {
    wanted.clamp(Duration::from_millis(1), TIMEOUT_MAX)
}

/// The parameters, with bounds where they set none: a connection whose other end is silent for so
/// long is given up. One setting bounds how long sent data may stay unacknowledged, the others how
/// long an answer may take, since a machine that has vanished acknowledges nothing.
pub(super) fn bounded(parameters: &Config, silence: Duration) -> Config {
    let seconds = |time: Duration| time.clamp(Duration::from_secs(1), KEEPALIVES_MAX);
    let mut config = parameters.clone();
    if config.get_tcp_user_timeout().is_none() {
        config.tcp_user_timeout(silence);
    }
    if config.get_keepalives_idle() == KEEPALIVES_IDLE_UNSAID {
        config.keepalives_idle(seconds(silence / 2));
    }
    if config.get_keepalives_interval().is_none() {
        config.keepalives_interval(seconds(silence / 2 / KEEPALIVES_RETRIES));
    }
    if config.get_keepalives_retries().is_none() {
        config.keepalives_retries(KEEPALIVES_RETRIES);
    }
    config
}

/// How long an attempt to connect may take.
pub(super) fn patience(config: &Config) -> Duration {
    let hosts = config.get_hosts().len().max(config.get_hostaddrs().len());
    let hosts = u32::try_from(hosts).unwrap_or(u32::MAX);
    let timeout = config.get_connect_timeout().copied().unwrap_or_default();
    timeout.saturating_mul(HOST_TIMEOUTS).saturating_mul(hosts)
}

/// An attempt to connect, on a thread of its own: the client does not bound how long a peer may be
/// silent, and panics when the process has no file descriptor left.
pub(super) struct Attempt(Receiver<Result<Client, Error>>);

impl Attempt {
    pub(super) fn start(
        connect: impl FnOnce() -> Result<Client, Error> + Send + 'static,
    ) -> Result<Self, SinkError> {
        let (sender, receiver) = mpsc::channel();
        let attempt = move || {
            // Where nobody takes it any more, the connection is closed here.
            drop(sender.send(connect()));
        };
        named_thread()
            .spawn(attempt)
            .map_err(|error| SinkError::unavailable(KIND, "connect", error))?;
        Ok(Self(receiver))
    }

    /// Its outcome, or the attempt itself if it has not ended.
    pub(super) fn wait(self, patience: Duration) -> Result<Result<Client, SinkError>, Self> {
        match self.0.recv_timeout(patience) {
            Ok(result) => Ok(result.map_err(failed("connect"))),
            Err(RecvTimeoutError::Timeout) => Err(self),
            Err(RecvTimeoutError::Disconnected) => {
                let reason = "the client panicked, as it does without a free file descriptor";
                Ok(Err(SinkError::unavailable(KIND, "connect", reason)))
            }
        }
    }
}

/// For work that must not be done on the current thread.
pub(super) fn named_thread() -> thread::Builder {
    thread::Builder::new().name("tollgate-postgres".to_owned())
}

/// Does something on another thread, and waits for it: the client blocks, and panics where it is
/// not allowed to, on a thread of an asynchronous runtime.
pub(super) fn elsewhere<T: Send>(
    action: &'static str,
    work: impl FnOnce() -> Result<T, SinkError> + Send,
) -> Result<T, SinkError> {
    let failed = |reason: String| SinkError::unavailable(KIND, action, reason);
    thread::scope(|scope| {
        let thread = named_thread().spawn_scoped(scope, work);
        let thread = thread.map_err(|error| failed(error.to_string()))?;
        thread.join().unwrap_or_else(|_| Err(failed("the client panicked".to_owned())))
    })
}

/// Drops a value on another thread, and waits for that. If no thread can be started, the value is
/// leaked.
pub(super) fn drop_elsewhere<T: Send + 'static>(value: T, elsewhere: thread::Builder) {
    let value = ManuallyDrop::new(value);
    match elsewhere.spawn(move || drop(ManuallyDrop::into_inner(value))) {
        // A panic was the value's, and ends with the thread.
        Ok(thread) => drop(thread.join()),
        Err(error) => tracing::debug!(%error, "no thread to close a connection on"),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::TryRecvError;

    use super::*;

    fn bounds(parameters: &str, silence: Duration) -> [u128; 4] {
        let config = bounded(&parameters.parse().unwrap(), silence);
        [
            config.get_tcp_user_timeout().unwrap().as_millis(),
            config.get_keepalives_idle().as_millis(),
            config.get_keepalives_interval().unwrap().as_millis(),
            config.get_keepalives_retries().unwrap().into(),
        ]
    }

    /// A statement was sent and acknowledged, and the machine vanishes: without keepalives nothing
    /// tells, and the client's own begin after two hours.
    #[test]
    fn a_silent_connection_is_given_up_in_time() {
        let minute = Duration::from_secs(60);
        assert_eq!(bounds("host=db", minute), [60_000, 30_000, 10_000, 3]);
        let said = "host=db tcp_user_timeout=5 keepalives_idle=7 keepalives_interval=8 \
                    keepalives_retries=9";
        assert_eq!(bounds(said, minute), [5_000, 7_000, 8_000, 9]);
        // What the socket takes, whatever was asked for.
        assert_eq!(bounds("host=db", timeout(Duration::ZERO)), [1, 1000, 1000, 3]);
        let longest = timeout(Duration::MAX);
        assert_eq!(bounds("host=db", longest), [0x7fff_ffff, 32_767_000, 32_767_000, 3]);
    }

    #[test]
    fn each_host_has_its_time() {
        let seconds = |parameters: &str| patience(&parameters.parse().unwrap()).as_secs();
        assert_eq!(seconds("host=a connect_timeout=2"), 6);
        assert_eq!(seconds("host=a,b connect_timeout=2"), 12);
        assert_eq!(seconds("hostaddr=127.0.0.1 connect_timeout=2"), 6);
    }

    #[test]
    fn a_client_that_panics_is_another_failed_attempt() {
        let attempt = Attempt::start(|| panic!("as asked for")).unwrap();
        let ended = attempt.wait(Duration::from_secs(60)).ok().unwrap();
        assert!(ended.err().unwrap().is_retryable());
    }

    #[test]
    fn work_that_panics_elsewhere_has_failed() {
        let failed = elsewhere::<()>("work", || panic!("as asked for")).unwrap_err();
        assert!(failed.is_retryable(), "{failed}");
        assert!(matches!(elsewhere("work", || Ok(7)), Ok(7)));
    }

    /// The value is a channel's end: the other one tells.
    #[test]
    fn what_has_no_thread_to_be_dropped_on_is_not_dropped_here() {
        let (value, other) = mpsc::channel::<()>();
        drop_elsewhere(value, named_thread().stack_size(1 << 60));
        assert_eq!(other.try_recv(), Err(TryRecvError::Empty));
        let (value, other) = mpsc::channel::<()>();
        drop_elsewhere(value, named_thread());
        assert_eq!(other.try_recv(), Err(TryRecvError::Disconnected));
    }
}
