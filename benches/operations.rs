//! Single operations, by criterion: `cargo bench --bench operations`. Same key again and again, so
//! that everything is in the cache: what the instructions themselves cost.
#![allow(
    clippy::expect_used,
    clippy::print_stdout,
    clippy::disallowed_methods,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a benchmark prints, reads the real clock, and stops where it can't go on"
)]
#![allow(missing_docs, reason = "criterion's macros define what nobody calls")]

mod common;

use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use tollgate::{Config, Consume};

use common::gates::Gate;
use common::peers::{BareMap, Governor};

const USER: u64 = 42;
const USERS: u32 = 1000;
const BATCH: u64 = 100;
/// Why no operation fails.
const WORKS: &str = "the log has room";

fn open() -> Gate {
    let gate = Gate::open(Config::default()).expect("the directory is fresh");
    gate.populate(USERS).expect("the disk works");
    // So that no refund finds nothing to give back.
    gate.gate.consume(USER, gate.quota, 1 << 60).expect(WORKS);
    gate
}

fn by_key(criterion: &mut Criterion) {
    let gate = open();
    let (quota, gate) = (gate.quota, &gate.gate);
    let mut group = criterion.benchmark_group("by_key");
    group.bench_function("try_consume", |bencher| {
        bencher.iter(|| gate.try_consume(black_box(USER), quota, 1).expect(WORKS));
    });
    group.bench_function("consume", |bencher| {
        bencher.iter(|| gate.consume(black_box(USER), quota, 1).expect(WORKS));
    });
    group.bench_function("refund", |bencher| {
        bencher.iter(|| gate.refund(black_box(USER), quota, 1).expect(WORKS));
    });
    group.bench_function("check", |bencher| {
        bencher.iter(|| gate.check(black_box(USER), quota, 1).expect(WORKS));
    });
    group.bench_function("usage", |bencher| {
        bencher.iter(|| gate.usage(black_box(USER), quota).expect(WORKS));
    });
    let items: Vec<_> = (0..BATCH).map(|user| Consume { user, quota, amount: 1 }).collect();
    group.throughput(Throughput::Elements(BATCH));
    group.bench_function("consume_batch", |bencher| {
        bencher.iter(|| gate.consume_batch(black_box(&items)).expect(WORKS));
    });
    group.finish();
}

fn by_handle(criterion: &mut Criterion) {
    let gate = open();
    let counter = gate.gate.counter(USER, gate.quota).expect("the quota is defined");
    let mut group = criterion.benchmark_group("by_handle");
    group.bench_function("try_consume", |bencher| {
        bencher.iter(|| black_box(&counter).try_consume(1).expect(WORKS));
    });
    group.bench_function("consume", |bencher| {
        bencher.iter(|| black_box(&counter).consume(1).expect(WORKS));
    });
    group.bench_function("refund", |bencher| {
        bencher.iter(|| black_box(&counter).refund(1).expect(WORKS));
    });
    group.bench_function("check", |bencher| {
        bencher.iter(|| black_box(&counter).check(1).expect(WORKS));
    });
    group.bench_function("usage", |bencher| {
        bencher.iter(|| black_box(&counter).usage());
    });
    group.finish();
}

fn peers(criterion: &mut Criterion) {
    let (bare, governor) = (BareMap::populated(USERS), Governor::populated(USERS));
    let mut group = criterion.benchmark_group("peers");
    group.bench_function("bare map", |bencher| bencher.iter(|| bare.add(black_box(42))));
    group.bench_function("governor", |bencher| bencher.iter(|| governor.admits(black_box(42))));
    group.finish();
}

criterion_group!(operations, by_key, by_handle, peers);
criterion_main!(operations);
