//! The contract of `tollgate::sink::UsageSink`, the same functions against every sink.
//!
//! Databases are started by the tests, from the installed binaries, in directories of their own.
//! Where the binaries are missing the test says so and passes, unless `TOLLGATE_REQUIRE_SERVERS` is
//! set.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::print_stderr,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    clippy::disallowed_methods,
    reason = "a test ends where something is not as expected"
)]

#[cfg(feature = "postgres")]
mod cluster;
mod contract;
#[cfg(any(feature = "postgres", feature = "redis"))]
mod delivery;
#[cfg(any(feature = "postgres", feature = "redis"))]
mod embedded;
mod engine;
mod feed;
mod json_lines;
mod memory;
#[cfg(feature = "postgres")]
mod postgres;
#[cfg(any(feature = "postgres", feature = "redis"))]
mod proxy;
#[cfg(feature = "redis")]
mod redis;
#[cfg(any(feature = "postgres", feature = "redis"))]
mod servers;
