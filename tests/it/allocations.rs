//! The path of a caller allocates nothing: shown by an allocator that counts.
#![allow(unsafe_code, reason = "an allocator is unsafe by its trait")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use tollgate::sink::{Position, UsageBatch, UsageRow};
use tollgate::{EngineId, Quota, QuotaId, Tollgate};

use crate::support::small;

/// Counts what each thread allocates.
struct Counting;

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

// SAFETY: everything is handed to the system's allocator; counting touches a plain thread-local.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // A thread that ends has no thread-locals any more.
        let _ = ALLOCATIONS.try_with(|count| count.set(count.get() + 1));
        // SAFETY: the caller keeps the contract of `alloc`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller keeps the contract of `dealloc`.
        unsafe { System.dealloc(pointer, layout) }
    }
}

fn allocations_of(work: impl FnOnce()) -> u64 {
    let before = ALLOCATIONS.get();
    work();
    ALLOCATIONS.get() - before
}

/// A first delivery has a row for each counter there is: putting them in order once took half as
/// much memory again.
#[test]
fn a_delivery_is_put_in_order_where_it_lies() {
    let name: std::sync::Arc<str> = std::sync::Arc::from("requests");
    let row = |user: u64| {
        let user = user.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        UsageRow::new(user, QuotaId::from_u16(1), std::sync::Arc::clone(&name), 1, 9)
    };
    let rows: Vec<_> = (0..10_000).map(row).collect();
    let to = Position { batch: 1, check: 1 };
    let mut batch = None;
    let engine = EngineId::from_u128(1);
    let allocations =
        allocations_of(|| batch = Some(UsageBatch::new(engine, None, to, rows, Vec::new())));
    assert_eq!((allocations, batch.unwrap().rows().len()), (0, 10_000));
}

#[test]
fn operations_on_a_counter_that_is_there_allocate_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let gate = Tollgate::open(dir.path(), small().lane_records(1 << 12)).unwrap();
    let quota = gate.define(Quota::new("requests", 1_000)).unwrap();
    gate.consume(1, quota, 1).unwrap();
    let counter = gate.counter(2, quota).unwrap();
    assert!(allocations_of(|| drop(vec![0_u8; 10])) > 0, "the allocator counts");
    let counted = allocations_of(|| {
        for _ in 0..100 {
            let _ = gate.check(1, quota, 1).unwrap();
            let _ = gate.try_consume(1, quota, 1).unwrap();
            let _ = gate.consume(1, quota, 1).unwrap();
            let _ = gate.try_consume(1, quota, 2_000).unwrap();
            let _ = gate.refund(1, quota, 1).unwrap();
            let _ = counter.try_consume(1).unwrap();
        }
    });
    assert_eq!(counted, 0);
}
