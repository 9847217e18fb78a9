//! What becomes of the files when something fails, and of the directory.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::process::Command;
use std::time::UNIX_EPOCH;

use super::*;

const ENGINE: EngineId = EngineId::from_u128(1);
/// Tells the test binary, started again, where to work.
const DIR: &str = "TOLLGATE_TEST_LINES_DIR";

fn at(batch: u64) -> Position {
    Position { batch, check: 0 }
}

/// The batch that ends there, and starts where the one before it ends.
fn batch(to: u64) -> UsageBatch {
    let from = (to > 1).then(|| at(to - 1));
    UsageBatch::new(ENGINE, from, at(to), Vec::new(), Vec::new())
}

/// The test binary runs this very test again, as another process, which may change its working
/// directory. A relative path led elsewhere from then on, and the sink refused its own engine.
#[test]
fn a_directory_given_by_a_relative_path_stays_where_it_is() {
    if let Some(dir) = std::env::var_os(DIR) {
        let dir = Path::new(&dir);
        std::env::set_current_dir(dir).unwrap();
        let mut sink = JsonLinesSink::open("lines").unwrap().file_bytes_max(1);
        std::env::set_current_dir(dir.join("elsewhere")).unwrap();
        for number in 1..4 {
            sink.apply(&batch(number)).unwrap();
        }
        assert!(sink.directory.path().is_absolute());
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("elsewhere")).unwrap();
    let output = Command::new(std::env::current_exe().unwrap())
        .args([
            "--exact",
            "sink::json_lines::tests::a_directory_given_by_a_relative_path_stays_where_it_is",
        ])
        .env(DIR, dir.path())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && said.contains("1 passed"), "{said}");
    assert_eq!(fs::read_dir(dir.path().join("elsewhere")).unwrap().count(), 0);
    let mut sink = JsonLinesSink::open(dir.path().join("lines")).unwrap();
    assert_eq!(sink.position(ENGINE).unwrap(), Some(at(3)));
}

/// A file that someone else put there, or a folder, was taken for the newest one, and did not
/// verify; or its number had no next one.
#[test]
fn names_that_the_sink_does_not_give_are_none_of_its_files() {
    let dir = tempfile::tempdir().unwrap();
    let strays = [
        "usage-2026.jsonl",
        "usage-+5.jsonl",
        "usage-+0000000000000000005.jsonl",
        "usage-000000000000000000005.jsonl",
        "usage-00000000000000000000.jsonl",
        "usage-18446744073709551615.jsonl",
    ];
    for stray in strays {
        fs::write(dir.path().join(stray), "{}\n").unwrap();
    }
    fs::create_dir(dir.path().join(file_name(7))).unwrap();
    for number in 1..4 {
        let mut sink = JsonLinesSink::open(dir.path()).unwrap().file_bytes_max(1);
        assert_eq!(sink.apply(&batch(number)).unwrap(), Applied::Now);
    }
    for stray in strays {
        assert_eq!(fs::read_to_string(dir.path().join(stray)).unwrap(), "{}\n");
    }
}

#[test]
fn the_last_number_has_no_next_one() {
    let dir = tempfile::tempdir().unwrap();
    drop(JsonLinesSink::open(dir.path()).unwrap());
    let path = |number| dir.path().join(file_name(number));
    fs::rename(path(1), path(FILE_NUMBER_MAX)).unwrap();
    let mut sink = JsonLinesSink::open(dir.path()).unwrap().file_bytes_max(1);
    // A file without a batch is begun anew under its number.
    assert_eq!(sink.apply(&batch(1)).unwrap(), Applied::Now);
    let error = sink.apply(&batch(2)).unwrap_err();
    assert!(error.to_string().contains("used up"), "{error}");
    assert_eq!(sink.position(ENGINE).unwrap(), Some(at(1)));
}

/// Scripts that delete what is old take the lock's file with them. A second writer came in.
#[test]
fn a_removed_lock_file_lets_no_second_writer_in() {
    let dir = tempfile::tempdir().unwrap();
    let sink = JsonLinesSink::open(dir.path()).unwrap();
    fs::remove_file(dir.path().join(LOCK)).unwrap();
    let error = JsonLinesSink::open(dir.path()).unwrap_err();
    assert!(error.to_string().contains("in use"), "{error}");
    drop(sink);
    JsonLinesSink::open(dir.path()).unwrap();
}

/// The disk was full, or a sync failed: what was written of the batch is taken back, also when
/// it looks complete, and the next one goes to a new file.
#[test]
fn after_a_failure_the_batch_is_taken_back() {
    let dir = tempfile::tempdir().unwrap();
    let mut sink = JsonLinesSink::open(dir.path()).unwrap();
    sink.apply(&batch(1)).unwrap();
    let first = fs::read(dir.path().join(file_name(1))).unwrap();

    sink.file.write(&batch(2), &[]).unwrap();
    sink.file.is_in_doubt = true;

    assert_eq!(sink.position(ENGINE).unwrap(), Some(at(1)));
    assert_eq!(sink.apply(&batch(2)).unwrap(), Applied::Now);
    drop(sink);
    assert_eq!(fs::read(dir.path().join(file_name(1))).unwrap(), first);
    let mut sink = JsonLinesSink::open(dir.path()).unwrap();
    assert_eq!(sink.position(ENGINE).unwrap(), Some(at(2)));
    assert_eq!(sink.file.number, 2);
}

/// The sync failed, and the process ended before it came back to the sink: the batch stood in the
/// file as if it were complete, and the next open took its position for stored.
#[test]
fn a_batch_whose_sync_failed_is_gone_before_anybody_else_opens_the_file() {
    let dir = tempfile::tempdir().unwrap();
    let mut sink = JsonLinesSink::open(dir.path()).unwrap();
    sink.apply(&batch(1)).unwrap();
    sink.file.sync = |_| Err(io::Error::other("injected"));
    sink.apply(&batch(2)).unwrap_err();
    assert!(sink.file.is_in_doubt);
    drop(sink);
    let mut sink = JsonLinesSink::open(dir.path()).unwrap();
    assert_eq!(sink.position(ENGINE).unwrap(), Some(at(1)));
    assert_eq!(sink.apply(&batch(2)).unwrap(), Applied::Now);
}

/// Each attempt left a file behind, with its first line and no batch.
#[test]
fn failures_in_a_row_leave_one_file() {
    let dir = tempfile::tempdir().unwrap();
    let mut sink = JsonLinesSink::open(dir.path()).unwrap();
    sink.apply(&batch(1)).unwrap();
    for attempt in 0..20 {
        if attempt % 5 == 4 {
            drop(sink);
            sink = JsonLinesSink::open(dir.path()).unwrap();
        }
        assert_eq!(sink.position(ENGINE).unwrap(), Some(at(1)));
        sink.file.sync = |_| Err(io::Error::other("injected"));
        sink.apply(&batch(2)).unwrap_err();
    }
    assert_eq!(file_numbers(&sink.directory).unwrap().len(), 2);
    assert_eq!(sink.apply(&batch(2)).unwrap(), Applied::Now);
    assert_eq!(file_numbers(&sink.directory).unwrap().into_iter().max(), Some(2));
    sink.file.sync = |_| Err(io::Error::other("injected"));
    sink.apply(&batch(3)).unwrap_err();
    drop(sink);
    let mut sink = JsonLinesSink::open(dir.path()).unwrap();
    assert_eq!(sink.position(ENGINE).unwrap(), Some(at(2)));
}

/// A program that rotates logs took the newest file: what came next was confirmed, and in no file
/// that anybody could find.
#[test]
fn after_the_newest_file_was_taken_away_the_next_batch_goes_to_a_new_one() {
    type Take = fn(&Path) -> io::Result<()>;
    let ways: [Take; 4] = [
        |path| fs::remove_file(path),
        |path| fs::rename(path, path.with_extension("1")),
        |path| fs::remove_file(path).and_then(|()| fs::write(path, "another's")),
        |path| File::options().write(true).open(path)?.set_len(0),
    ];
    for (take, batches) in ways.into_iter().flat_map(|take| [(take, 2), (take, 0)]) {
        let dir = tempfile::tempdir().unwrap();
        let path = |number| dir.path().join(file_name(number));
        let mut sink = JsonLinesSink::open(dir.path()).unwrap();
        for number in 1..=batches {
            sink.apply(&batch(number)).unwrap();
        }
        take(&path(1)).unwrap();
        let left = fs::read(path(1)).ok();
        for number in batches + 1..batches + 3 {
            assert_eq!(sink.apply(&batch(number)).unwrap(), Applied::Now);
        }
        assert_eq!(fs::read(path(1)).ok(), left);
        let found = scan::scan(&File::open(path(2)).unwrap()).unwrap().unwrap();
        assert!(found.last > 0, "both are in it");
        drop(sink);
        let mut sink = JsonLinesSink::open(dir.path()).unwrap();
        assert_eq!(sink.position(ENGINE).unwrap(), Some(at(batches + 2)));
    }
}

/// What an open finds may be in memory only, and taken for written there. The sync that follows is
/// about it only when it was written again, which shows in the file's time.
#[test]
fn the_last_batch_is_written_again_before_its_position_is_answered() {
    let dir = tempfile::tempdir().unwrap();
    let mut sink = JsonLinesSink::open(dir.path()).unwrap();
    let path = dir.path().join(file_name(1));
    let mut ends = Vec::new();
    for number in 1..4 {
        sink.apply(&batch(number)).unwrap();
        ends.push(fs::metadata(&path).unwrap().len());
    }
    drop(sink);
    let before = fs::read(&path).unwrap();
    let file = File::options().write(true).open(&path).unwrap();
    file.set_modified(UNIX_EPOCH).unwrap();
    let mut sink = JsonLinesSink::open(dir.path()).unwrap();
    assert_eq!(sink.position(ENGINE).unwrap(), Some(at(3)));
    assert!(file.metadata().unwrap().modified().unwrap() > UNIX_EPOCH);
    assert_eq!(fs::read(&path).unwrap(), before);
    let found = scan::scan(&File::open(&path).unwrap()).unwrap().unwrap();
    assert_eq!((found.last, found.committed), (ends[1], ends[2]));
}

/// Holes stand for what is only shown: what was written again takes blocks.
#[test]
fn all_of_a_long_batch_is_written_again() {
    let file = tempfile::tempfile().unwrap();
    file.set_len(300_000).unwrap();
    write_again(&file, 1000..300_000).unwrap();
    file.sync_all().unwrap();
    let metadata = file.metadata().unwrap();
    assert_eq!(metadata.len(), 300_000);
    assert!(metadata.blocks() * 512 >= 299_000, "{}", metadata.blocks());
}

/// Made again under its path, it was said not to be there.
#[test]
fn a_removed_directory_is_said_to_be_removed() {
    let root = tempfile::tempdir().unwrap();
    let dir = root.path().join("lines");
    let mut sink = JsonLinesSink::open(&dir).unwrap();
    sink.apply(&batch(1)).unwrap();
    fs::remove_dir_all(&dir).unwrap();
    fs::create_dir(&dir).unwrap();
    let error = sink.apply(&batch(2)).unwrap_err().to_string();
    assert!(error.contains("the directory was removed") && error.contains("restart"), "{error}");
    assert_eq!(fs::read_dir(&dir).unwrap().count(), 0);
}

#[test]
fn files_are_for_their_owner_alone() {
    let root = tempfile::tempdir().unwrap();
    let dir = root.path().join("lines");
    let _sink = JsonLinesSink::open(&dir).unwrap();
    let mode = |path: &Path| fs::metadata(path).unwrap().mode() & 0o777;
    assert_eq!((mode(&dir), mode(&dir.join(file_name(1)))), (0o700, 0o600));
}
