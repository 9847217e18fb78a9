//! The way to the database: how long it may be silent.

use std::time::Duration;

use postgres::Config;

/// The longest timeout that the server takes, and the socket.
const TIMEOUT_MAX: Duration = Duration::from_millis(i32::MAX as u64);
/// What the client sets where its user says nothing.
const KEEPALIVES_IDLE_UNSAID: Duration = Duration::from_secs(2 * 60 * 60);
/// Keepalives count in whole seconds, and not above this.
const KEEPALIVES_MAX: Duration = Duration::from_secs(32_767);
const KEEPALIVES_RETRIES: u32 = 3;

/// What can be waited for, in milliseconds.
pub(super) fn timeout(wanted: Duration) -> Duration {
    wanted.clamp(Duration::from_millis(1), TIMEOUT_MAX)
}

/// The parameters, with bounds where they leave them open: a connection whose other end is silent
/// for so long is given up. What was sent and is not acknowledged is bounded by one setting, an
/// answer that does not come by the others, since a machine that has vanished acknowledges nothing.
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

#[cfg(test)]
mod tests {
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
}
