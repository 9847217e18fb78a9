//! The example `token_gateway`, as its own process: budgets kept exactly, streams broken off by
//! everyone, kills. Its pure parts are tested here too, as an example has no tests of its own.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test ends where something is not as expected"
)]

#[path = "../../examples/token_gateway/bill.rs"]
#[allow(clippy::print_stderr, reason = "an example talks")]
mod bill;
#[path = "../../examples/token_gateway/estimate.rs"]
mod estimate;
#[path = "../../examples/token_gateway/metering.rs"]
#[allow(dead_code, reason = "the example uses the rest")]
#[allow(clippy::print_stderr, reason = "an example talks")]
mod metering;
mod parts;
mod process;
mod scenarios;
#[path = "../../examples/token_gateway/sse.rs"]
mod sse;
mod trouble;
mod upstream;
