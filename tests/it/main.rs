//! All integration tests, in one binary: each further one costs a link.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::print_stderr,
    clippy::cast_possible_truncation,
    reason = "a test ends where something is not as expected"
)]

mod allocations;
mod api;
mod golden;
mod intervals;
mod model;
#[cfg(feature = "server")]
mod operator;
mod read_back;
mod reservations;
#[cfg(feature = "server")]
mod server;
#[cfg(feature = "server")]
mod server_groups;
#[cfg(feature = "server")]
mod server_records;
#[cfg(feature = "server")]
mod server_replies;
#[cfg(feature = "server")]
mod server_start;
#[cfg(feature = "server")]
mod server_trouble;
mod stress;
mod support;
mod tidy;
