//! Models of a shard: those who read it past its lock, and who writes to it.

use std::sync::Arc;

use loom::cell::UnsafeCell;
use loom::sync::RwLock;
use loom::thread;

use super::*;
use crate::seats::sit_at;
use crate::sync::explore;

/// A shard's lock, and what it guards, of which loom notices that two are in it.
struct Shard {
    bias: Bias,
    lock: RwLock<()>,
    value: UnsafeCell<u64>,
}

impl Shard {
    fn new() -> Arc<Self> {
        let (lock, value) = (RwLock::new(()), UnsafeCell::new(0));
        Arc::new(Self { bias: Bias::new(1), lock, value })
    }

    fn get(&self) -> u64 {
        // SAFETY: what the models are about: nobody writes meanwhile.
        self.value.with(|value| unsafe { *value })
    }

    /// As [`Bias::read`].
    fn read(&self, enter: impl FnOnce(&Bias) -> Option<Inside<'_>>) -> u64 {
        if let Some(inside) = enter(&self.bias) {
            let value = self.get();
            drop(inside);
            return value;
        }
        let _shared = self.lock.read().expect("nobody panics");
        self.bias.count_reads(0, 1);
        self.get()
    }

    /// As [`Bias::write`].
    fn add_one(&self) {
        let _alone = self.lock.write().expect("nobody panics");
        self.bias.close(0);
        // SAFETY: likewise.
        self.value.with_mut(|value| unsafe { *value += 1 });
    }

    fn open(&self) {
        for _ in 0..READS_TO_OPEN {
            self.read(|_| None);
        }
        assert_eq!(self.bias.words[0].load(Ordering::Relaxed), OPEN);
    }
}

/// An open shard is read by two threads, one of which is in several, while a third writes.
///
/// Fails when a reader looks whether the shard is open before it sits down, when the writer does
/// not pass the barrier, does not wait, or waits for one name only.
#[test]
fn loom_nobody_writes_while_somebody_reads() {
    explore(|| {
        let shard = Shard::new();
        shard.open();
        let readers = [1, 2].map(|seat| {
            let shard = Arc::clone(&shard);
            thread::spawn(move || {
                sit_at(seat);
                shard.read(|bias| if seat == 1 { bias.enter(0) } else { bias.enter_each(&[0]) })
            })
        });
        shard.add_one();
        for reader in readers {
            assert!(reader.join().unwrap() <= 1);
        }
    });
}

/// A shard is opened by one thread, read past its lock by it, and written to twice meanwhile.
///
/// Fails when `count_read` stores without the lock or by a plain store, or is Relaxed.
#[test]
fn loom_a_shard_that_opens_shows_what_was_written() {
    explore(|| {
        let shard = Shard::new();
        let readers = [1, 2].map(|seat| {
            let shard = Arc::clone(&shard);
            thread::spawn(move || {
                sit_at(seat);
                let before = shard.read(|_| None);
                let after = shard.read(|bias| bias.enter(0));
                assert!(before <= after);
            })
        });
        shard.add_one();
        shard.add_one();
        readers.into_iter().for_each(|reader| reader.join().unwrap());
        assert_eq!(shard.read(|_| None), 2);
    });
}
