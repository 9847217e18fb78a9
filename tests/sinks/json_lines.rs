//! The sink that writes JSON lines.

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use serde_json::Value;
use tempfile::TempDir;
use tollgate::Timestamp;
use tollgate::sink::{Applied, JsonLinesSink, SinkError, UsageSink};

use crate::contract::{Store, holds_for};
use crate::feed::{DAY_MS, Feed, Key, Totals, totals};

/// Small, so that every few batches begin a file.
const FILE_BYTES_MAX: u64 = 4096;

struct Lines {
    dir: TempDir,
}

impl Lines {
    fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap() }
    }

    fn sink(&self) -> JsonLinesSink {
        let sink = JsonLinesSink::open(self.dir.path()).unwrap();
        sink.with_events().file_bytes_max(FILE_BYTES_MAX)
    }

    /// The lines of complete batches, in order: what a reader takes.
    fn committed(&self) -> Vec<Value> {
        let mut committed = Vec::new();
        for file in files(self.dir.path()) {
            let mut batch = Vec::new();
            for line in fs::read_to_string(file).unwrap().lines() {
                let line: Value = serde_json::from_str(line).unwrap();
                match line["type"].as_str() {
                    Some("start") => assert!(batch.is_empty()),
                    Some("commit") => {
                        assert_eq!(line["lines"], batch.len());
                        committed.append(&mut batch);
                    }
                    _ => batch.push(line),
                }
            }
        }
        committed
    }
}

fn files(dir: &Path) -> Vec<PathBuf> {
    let mut files: Vec<_> = fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "jsonl"))
        .collect();
    files.sort();
    files
}

impl Store for Lines {
    fn open(&self) -> Box<dyn UsageSink> {
        Box::new(self.sink())
    }

    fn totals(&self) -> Totals {
        let mut totals = Totals::new();
        for line in self.committed() {
            if line["type"] == "usage" {
                let total = totals.entry(key(&line)).or_insert((0, 0));
                total.0 += i128::from(line["added"].as_i64().unwrap());
                total.1 = line["limit"].as_u64().unwrap();
            }
        }
        totals
    }

    fn events(&self) -> Option<u64> {
        let lines = self.committed();
        Some(lines.iter().filter(|line| line["type"] == "event").count() as u64)
    }

    /// Each line says what it means.
    fn compares_meaning(&self) -> bool {
        false
    }
}

fn key(line: &Value) -> Key {
    let start = line["window_start"].as_str().map_or(0, |start| {
        let last = Timestamp::MAX.as_unix_millis() / DAY_MS;
        let mut days = (0..10).chain(20_000..20_010).chain([last]).map(|day| day * DAY_MS);
        days.find(|ms| Timestamp::from_unix_millis(*ms).to_string() == start).unwrap()
    });
    (line["user"].as_u64().unwrap(), line["quota"].as_str().unwrap().to_owned(), start)
}

#[test]
fn the_contract_holds() {
    holds_for(Lines::new);
}

#[test]
fn a_directory_has_one_writer() {
    let store = Lines::new();
    let sink = store.sink();
    let error = JsonLinesSink::open(store.dir.path()).unwrap_err();
    assert!(error.to_string().contains("in use"), "{error}");
    drop(sink);
    store.sink();
}

/// The newest file is cut at every length behind what was committed, as by the death of the
/// process while it wrote, and the batch is delivered again.
#[test]
fn an_unfinished_batch_is_cut_off() {
    let store = Lines::new();
    let mut feed = Feed::new(1, 1);
    let mut sink = store.sink();
    sink.apply(&feed.next()).unwrap();
    let before = feed.position();
    let path = files(store.dir.path()).pop().unwrap();
    let committed = fs::read(&path).unwrap();
    let batch = feed.next();
    sink.apply(&batch).unwrap();
    drop(sink);
    let whole = fs::read(&path).unwrap();
    assert!(whole.len() > committed.len() + 1000);
    for len in (committed.len()..whole.len()).filter(|len| len % 10 == 0 || len + 200 > whole.len())
    {
        fs::write(&path, &whole[..len]).unwrap();
        let mut sink = store.sink();
        assert_eq!(sink.position(feed.engine()).unwrap(), before, "cut at {len}");
        assert_eq!(fs::read(&path).unwrap(), committed);
        if len % 100 == 0 {
            assert_eq!(sink.apply(&batch).unwrap(), Applied::Now);
            assert_eq!(fs::read(&path).unwrap(), whole);
        }
    }
}

/// No crash leaves such a file: it has its name only once its first line is synced.
#[test]
fn a_file_cut_off_within_its_first_line_is_refused_until_it_is_moved_away() {
    let store = Lines::new();
    let mut feed = Feed::new(1, 1);
    store.sink().apply(&feed.next()).unwrap();
    let path = files(store.dir.path()).pop().unwrap();
    let whole = fs::read(&path).unwrap();
    let first = whole.iter().position(|&byte| byte == b'\n').unwrap();
    for len in [0, 1, first] {
        fs::write(&path, &whole[..len]).unwrap();
        let refused = JsonLinesSink::open(store.dir.path());
        assert!(matches!(refused, Err(SinkError::Damaged { offset: 0, .. })), "cut at {len}");
    }
    fs::rename(&path, store.dir.path().join("away")).unwrap();
    assert_eq!(store.sink().position(feed.engine()).unwrap(), None);
}

/// After a loss of power the end of a file may be there without what is before it.
#[test]
fn a_batch_with_a_hole_is_cut_off_and_damage_before_it_is_refused() {
    let store = Lines::new();
    let mut feed = Feed::new(1, 2);
    let mut sink = store.sink();
    let path = files(store.dir.path()).pop().unwrap();
    let mut ends = vec![fs::metadata(&path).unwrap().len()];
    let mut positions = vec![None];
    for _ in 0..2 {
        sink.apply(&feed.next()).unwrap();
        ends.push(fs::metadata(&path).unwrap().len());
        positions.push(feed.position());
    }
    drop(sink);
    let whole = fs::read(&path).unwrap();
    for offset in (0..whole.len()).filter(|offset| offset % 7 == 0 || *offset < 200) {
        let mut torn = whole.clone();
        torn[offset] ^= 1;
        fs::write(&path, &torn).unwrap();
        match JsonLinesSink::open(store.dir.path()) {
            Ok(mut sink) => {
                assert!(offset as u64 >= ends[1], "byte {offset} of {ends:?}");
                assert_eq!(sink.position(feed.engine()).unwrap(), positions[1]);
            }
            Err(SinkError::Damaged { offset: at, .. }) => {
                assert!((offset as u64) < ends[1], "byte {offset} of {ends:?}");
                // Without the line feed, the two first lines are one.
                assert_eq!(at, if (offset as u64) < ends[0] { 0 } else { ends[0] });
            }
            Err(other) => panic!("byte {offset}: {other}"),
        }
    }
}

#[test]
fn files_are_rotated_and_the_older_ones_are_not_needed() {
    let store = Lines::new();
    let (mut one, mut other) = (Feed::new(1, 3), Feed::new(2, 4));
    let mut sink = store.sink();
    sink.apply(&other.next()).unwrap();
    for _ in 0..20 {
        sink.apply(&one.next()).unwrap();
    }
    drop(sink);
    let mut files = files(store.dir.path());
    assert!(files.len() > 3, "{files:?}");
    assert_eq!(store.totals(), totals(&[&one, &other]));
    files.pop();
    files.iter().for_each(|file| fs::remove_file(file).unwrap());
    // What a process left that died while it began a file.
    OpenOptions::new()
        .create_new(true)
        .write(true)
        .open(store.dir.path().join("usage.tmp"))
        .unwrap()
        .write_all(b"{\"type\":\"sta")
        .unwrap();
    let mut sink = store.sink();
    assert_eq!(sink.position(one.engine()).unwrap(), one.position());
    assert_eq!(sink.position(other.engine()).unwrap(), other.position());
    for _ in 0..5 {
        assert_eq!(sink.apply(&one.next()).unwrap(), Applied::Now);
    }
}
