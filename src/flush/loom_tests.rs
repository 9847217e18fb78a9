//! Models of the drain and of group commit: the real ones, over a journal file in memory.
//!
//! The condition variable of a model never times out: a wake-up that gets lost is a deadlock, which
//! loom reports.

use std::io;
use std::path::PathBuf;
use std::sync::{Arc, PoisonError};

use loom::thread;

use crate::clock::{CoarseClock, ManualClock};
use crate::error::Error;
use crate::flush::commit::{Committer, Target};
use crate::flush::drain::{Drain, DrainLimits};
use crate::journal::batch::{Batch, BatchHeader, HEADER_BYTES, LaneSpan};
use crate::journal::files::{FILE_HEADER_BYTES, FileSequence};
use crate::journal::pool::JournalFiles;
use crate::journal::writer::{ChainPoint, JournalWriter};
use crate::model::{EngineId, Timestamp};
use crate::poison::Poison;
use crate::storage::{Storage, StorageFile};
use crate::sync::{AtomicU64, Ordering, explore};
use crate::wal::lane::loom_tests::{lane, record};
use crate::wal::lanes::{Lanes, NoLane};
use crate::wal::region::Region;

const ENGINE: EngineId = EngineId(9);
const FILE_BYTES: u64 = 1 << 20;

/// A journal file: what was written, and how much of it a sync has covered.
#[derive(Debug)]
struct LogFile {
    /// Not modelled: no access of the model happens under its lock.
    bytes: std::sync::Mutex<Vec<u8>>,
    synced: AtomicU64,
    fails: bool,
}

impl LogFile {
    fn new(fails: bool) -> Arc<Self> {
        Arc::new(Self { bytes: std::sync::Mutex::default(), synced: AtomicU64::new(0), fails })
    }

    fn written(&self) -> Vec<u8> {
        self.bytes.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl StorageFile for LogFile {
    fn len(&self) -> io::Result<u64> {
        Ok(FILE_BYTES)
    }

    fn read_exact_at(&self, _: &mut [u8], _: u64) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn write_all_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        let mut bytes = self.bytes.lock().unwrap_or_else(PoisonError::into_inner);
        let begin = usize::try_from(offset).expect("small");
        let end = begin + buf.len();
        if bytes.len() < end {
            bytes.resize(end, 0);
        }
        bytes[begin..end].copy_from_slice(buf);
        Ok(())
    }

    fn allocate(&self, _: u64) -> io::Result<()> {
        Ok(())
    }

    /// Covers what was written when it began. Other threads may run before it ends.
    fn sync_data(&self) -> io::Result<()> {
        let written = self.written();
        if self.fails && written.len() > FILE_HEADER_BYTES {
            return Err(io::Error::other("injected"));
        }
        self.synced.fetch_max(written.len() as u64, Ordering::Relaxed);
        Ok(())
    }
}

/// A directory in which nothing can be created.
#[derive(Debug)]
struct NoDirectory;

impl Storage for NoDirectory {
    fn list(&self) -> io::Result<Vec<String>> {
        Ok(Vec::new())
    }

    fn create(&self, _: &str) -> io::Result<Arc<dyn StorageFile>> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn open(&self, _: &str) -> io::Result<Arc<dyn StorageFile>> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn rename(&self, _: &str, _: &str) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn remove(&self, _: &str) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn sync_directory(&self) -> io::Result<()> {
        Ok(())
    }

    fn map(&self, _: &str) -> io::Result<Region> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn path(&self, name: &str) -> PathBuf {
        name.into()
    }

    fn release(&self) {}

    fn boot_id(&self) -> u128 {
        0
    }
}

/// A lane, and the journal that it is drained to.
struct World {
    lanes: Arc<Lanes>,
    journal: Vec<Arc<LogFile>>,
}

impl World {
    /// A lane of so many slots, and as many prepared files as are given; `true` for those that
    /// can't be synced.
    fn new(slots: u64, fails: &[bool]) -> (Self, Drain, Arc<JournalFiles>, Arc<CoarseClock>) {
        let lanes = Arc::new(Lanes::new(vec![lane(slots)]));
        let journal: Vec<_> = fails.iter().map(|&fails| LogFile::new(fails)).collect();
        let prepared = journal
            .iter()
            .zip(1..)
            .map(|(file, sequence)| {
                let file: Arc<dyn StorageFile> = file.clone();
                (FileSequence(sequence), file, FILE_BYTES)
            })
            .collect();
        let files =
            JournalFiles::new(Arc::new(NoDirectory), ENGINE, FILE_BYTES, Vec::new(), prepared);
        let files = Arc::new(files);
        let writer = JournalWriter::begin(Arc::clone(&files), ChainPoint::START, &[]);
        let writer = writer.expect("a file is prepared");
        let now = Timestamp::from_unix_millis(1_767_225_600_000);
        let clock = CoarseClock::new(Arc::new(ManualClock::new(now)));
        let limits = DrainLimits::new(FILE_BYTES, FILE_BYTES);
        let drain = Drain::new(ENGINE, Arc::clone(&clock), Arc::clone(&lanes), writer, limits);
        (Self { lanes, journal }, drain, files, clock)
    }

    fn with_committer(fails: &[bool]) -> (Arc<Self>, Arc<Committer>) {
        let (world, drain, files, clock) = Self::new(4, fails);
        let poison = Arc::new(Poison::default());
        let committer = Committer::new(drain, files, clock, poison);
        (Arc::new(world), Arc::new(committer))
    }

    fn try_append(&self, user: u64) -> Result<Target, NoLane> {
        let (lane, mut permit) = self.lanes.acquire(1)?;
        let number = permit.next();
        permit.append(&record(user));
        Ok(Target::Record { lane, number })
    }

    fn append(&self, user: u64) -> Target {
        self.try_append(user).expect("there is room")
    }

    /// The users whose record the journal holds, each as often as it counts; only what a sync has
    /// covered, or all that was written.
    fn journaled(&self, only_synced: bool) -> Vec<u64> {
        let mut users = Vec::new();
        let mut spans: Vec<LaneSpan> = Vec::new();
        for file in &self.journal {
            let mut bytes = file.written();
            if only_synced {
                let synced = file.synced.load(Ordering::Relaxed);
                bytes.truncate(usize::try_from(synced).expect("small"));
            }
            let mut rest = bytes.get(FILE_HEADER_BYTES..).unwrap_or_default();
            while let Some(head) = rest.first_chunk::<HEADER_BYTES>() {
                let header = BatchHeader::decode(ENGINE, head).expect("a whole batch");
                let (batch, others) = rest.split_at(usize::try_from(header.total_len()).unwrap());
                rest = others;
                let batch = Batch::decode(ENGINE, batch).expect("a whole batch");
                spans.extend(&batch.spans);
                let mut sums = batch.sums();
                while let Some(sum) = sums.next_sum().expect("whole sums") {
                    users.extend((0..sum.amount).map(|_| sum.key.user));
                }
            }
        }
        if self.journal.len() == 1 {
            for index in 0..self.lanes.len() {
                let mut at = 0;
                for span in spans.iter().filter(|span| usize::from(span.lane) == index) {
                    assert_eq!(span.from, at, "the spans of a lane follow each other");
                    at = span.next;
                }
            }
        }
        users.sort_unstable();
        users
    }
}

/// The drain empties a ring of two slots, and skips it to its start, while a writer fills it: each
/// record is in one batch, once.
///
/// Fails when `append_batch` frees the slots before it folds them, when `fold_lane` goes on beyond
/// a skip that no batch names, when `skip_lanes` moves a lane without its lock, or when a batch
/// that ends at a skip does not say where the lane goes on.
#[test]
fn loom_a_drained_and_skipped_lane_loses_nothing() {
    explore(|| {
        let (world, mut drain, _, _) = World::new(2, &[false]);
        let drainer = thread::spawn(move || {
            for _ in 0..2 {
                drain.append_batch().expect("there is room");
            }
            drain
        });
        let is_appended = |user: &u64| world.try_append(*user).is_ok();
        let appended: Vec<u64> = (10..13).filter(is_appended).collect();
        let mut drain = drainer.join().unwrap();
        let tails = drain.tails();
        drain.flush(&tails).expect("there is room");
        assert_eq!(world.journaled(false), appended);
    });
}

/// Two callers wait for the disk, and share a commit or follow each other: whoever returns finds
/// its record synced, and nobody sleeps for good.
///
/// Fails when `lead` takes the lanes' positions after the sync instead of before, when
/// `publish` comes before the sync, or when the leader does not wake the others.
#[test]
fn loom_who_waited_for_the_disk_is_on_it() {
    explore(|| {
        let (world, committer) = World::with_committer(&[false]);
        let wait = |user| {
            let (world, committer) = (Arc::clone(&world), Arc::clone(&committer));
            move || {
                let target = world.append(user);
                committer.wait_durable(target).expect("the disk works");
                assert!(world.journaled(true).contains(&user));
            }
        };
        let other = thread::spawn(wait(10));
        wait(11)();
        other.join().unwrap();
    });
}

/// `commit` covers all that was appended before it, also when another commit is under way that read
/// the lanes' tails too early.
///
/// Fails when `commit` is content with a commit that it came too late to join.
#[test]
fn loom_a_commit_covers_what_was_before_it() {
    explore(|| {
        let (world, committer) = World::with_committer(&[false]);
        let commit = |user| {
            let (world, committer) = (Arc::clone(&world), Arc::clone(&committer));
            move || {
                world.append(user);
                committer.commit().expect("the disk works");
                assert!(world.journaled(true).contains(&user));
            }
        };
        let other = thread::spawn(commit(10));
        commit(11)();
        other.join().unwrap();
    });
}

/// The first sync fails: what it should have covered is in the second file when anybody returns.
///
/// Fails when `lead` publishes although the sync failed, or when a rescue leaves batches out.
#[test]
fn loom_a_failed_sync_is_made_good_before_anybody_returns() {
    explore(|| {
        let (world, committer) = World::with_committer(&[true, false]);
        let wait = |user| {
            let (world, committer) = (Arc::clone(&world), Arc::clone(&committer));
            move || {
                let target = world.append(user);
                committer.wait_durable(target).expect("the second file works");
                assert!(world.journaled(true).contains(&user));
            }
        };
        let other = thread::spawn(wait(10));
        wait(11)();
        other.join().unwrap();
    });
}

/// Both files fail: everybody who waits gets the error, and nobody sleeps for good.
///
/// Fails when a leader that meets an error does not wake the others, or when who is woken does not
/// look at the poison.
#[test]
fn loom_lost_durability_wakes_all_who_wait() {
    explore(|| {
        let (world, committer) = World::with_committer(&[true, true]);
        let wait = |user| {
            let (world, committer) = (Arc::clone(&world), Arc::clone(&committer));
            move || {
                let target = world.append(user);
                let outcome = committer.wait_durable(target);
                assert!(matches!(outcome, Err(Error::DurabilityLost { .. })), "{outcome:?}");
            }
        };
        let other = thread::spawn(wait(10));
        wait(11)();
        other.join().unwrap();
    });
}
