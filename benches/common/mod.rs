//! What the benchmarks share: options, pinning, keys, peers, passes, reports.
#![allow(dead_code, reason = "each benchmark uses a part of it")]

pub(crate) mod gates;
pub(crate) mod keys;
pub(crate) mod numbers;
pub(crate) mod open_loop;
pub(crate) mod options;
pub(crate) mod passes;
pub(crate) mod peers;
pub(crate) mod pin;
pub(crate) mod proc;
pub(crate) mod quiet;
pub(crate) mod report;

pub(crate) type AnyError = Box<dyn std::error::Error>;
