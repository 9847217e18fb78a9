//! The real disk, in temporary directories.

use std::ffi::OsString;
use std::fmt::Debug;
use std::fs::OpenOptions;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::process::Command;

use super::*;
use crate::sync::Ordering;

/// Tells the test binary, started again by `another_process_is_refused`, what to open.
const CHILD_DIR: &str = "TOLLGATE_TEST_LOCKED_DIR";

fn open(dir: &tempfile::TempDir) -> RealStorage {
    RealStorage::open(dir.path()).unwrap()
}

fn kind_of<T: Debug>(result: io::Result<T>) -> ErrorKind {
    result.unwrap_err().kind()
}

#[test]
fn a_directory_has_one_owner_until_it_lets_go() {
    let dir = tempfile::tempdir().unwrap();
    let first = open(&dir);
    assert!(matches!(RealStorage::open(dir.path()), Err(Error::Locked { .. })));
    drop(first);
    open(&dir);
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().mode() & 0o777
}

/// Under the usual umask everybody could read who used how much.
#[test]
fn what_is_created_is_for_its_owner_alone() {
    let root = tempfile::tempdir().unwrap();
    let (between, there) = (root.path().join("between"), root.path().join("there"));
    fs::create_dir(&there).unwrap();
    let before = mode(&there);
    for dir in [&between.join("data"), &there] {
        let storage = RealStorage::open(dir).unwrap();
        storage.create("ring").unwrap();
        assert_eq!([LOCK_NAME, "ring"].map(|name| mode(&dir.join(name))), [0o600; 2]);
    }
    assert_eq!(mode(&between.join("data")), 0o700);
    assert_eq!([&between, &there].map(|dir| mode(dir)), [before; 2], "as the umask says");
}

/// A process that is being started has a copy of all open files until it runs its program.
#[test]
fn a_child_that_is_being_started_keeps_nothing_locked() {
    let dir = tempfile::tempdir().unwrap();
    for lets_go in [RealStorage::release, |_: &RealStorage| {}] {
        let first = open(&dir);
        let lock = first.lock.lock().as_ref().unwrap().file().try_clone().unwrap();
        let copies = [lock, first.directory.handle().try_clone().unwrap()];
        lets_go(&first);
        drop(first);
        open(&dir);
        drop(copies);
    }
}

/// Nobody can open it by its path any more, which says nothing about the disk.
#[test]
fn a_directory_is_synced_whatever_becomes_of_its_path() {
    let dir = tempfile::tempdir().unwrap();
    let (before, after) = (dir.path().join("before"), dir.path().join("after"));
    let storage = RealStorage::open(&before).unwrap();
    fs::rename(&before, &after).unwrap();
    storage.sync_directory().unwrap();
}

/// A copy of all its files.
fn copy_directory(from: &Path, to: &Path) {
    fs::create_dir(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
    }
}

fn files_in(dir: &Path) -> Vec<(OsString, Vec<u8>)> {
    let read = |entry: fs::DirEntry| (entry.file_name(), fs::read(entry.path()).unwrap());
    let mut files: Vec<_> = fs::read_dir(dir).unwrap().map(|entry| read(entry.unwrap())).collect();
    files.sort();
    files
}

/// The directory was moved, and a copy put in its place, which someone else then has: what was
/// opened first went on in the other's files, by their paths.
#[test]
fn a_directory_stays_the_one_that_was_opened_whatever_its_path_names_later() {
    let dir = tempfile::tempdir().unwrap();
    let (data, moved) = (dir.path().join("data"), dir.path().join("moved"));
    let first = RealStorage::open(&data).unwrap();
    for name in ["ring", "old", "spare", "rest"] {
        first.create(name).unwrap().allocate(64).unwrap();
    }
    fs::rename(&data, &moved).unwrap();
    copy_directory(&moved, &data);
    let second = RealStorage::open(&data).unwrap();
    let before = files_in(&data);

    first.create("new").unwrap().write_all_at(b"new", 0).unwrap();
    first.rename("spare", "old").unwrap();
    first.remove("rest").unwrap();
    first.open("old").unwrap().write_all_at(b"old", 0).unwrap();
    first.map("ring").unwrap().words()[0].store(7, Ordering::Relaxed);
    first.sync_directory().unwrap();
    let mut names = first.list().unwrap();
    names.sort();
    assert_eq!(names, ["new", "old", "ring"]);
    assert_eq!(files_in(&data), before);
    assert_eq!(fs::read(moved.join("ring")).unwrap()[0], 7);
    assert_eq!(second.list().unwrap().len(), 4);
}

/// The lock's file is like any other to those who tidy up. Without it a second owner came in.
#[test]
fn a_removed_lock_file_lets_nobody_in() {
    let dir = tempfile::tempdir().unwrap();
    let first = open(&dir);
    fs::remove_file(dir.path().join(LOCK_NAME)).unwrap();
    for _ in 0..2 {
        assert!(matches!(RealStorage::open(dir.path()), Err(Error::Locked { .. })));
        let looked = RealStorage::open_locked_read_only(dir.path());
        assert!(matches!(looked, Err(Error::Locked { .. })));
    }
    first.release();
    let looker = RealStorage::open_locked_read_only(dir.path()).unwrap();
    let other_looker = RealStorage::open_locked_read_only(dir.path()).unwrap();
    assert!(matches!(RealStorage::open(dir.path()), Err(Error::Locked { .. })));
    drop((looker, other_looker));
    open(&dir);
}

/// Earlier versions of this library lock the file alone.
#[test]
fn a_locked_lock_file_alone_keeps_others_out() {
    let dir = tempfile::tempdir().unwrap();
    open(&dir);
    let file = File::open(dir.path().join(LOCK_NAME)).unwrap();
    file.try_lock().unwrap();
    assert!(matches!(RealStorage::open(dir.path()), Err(Error::Locked { .. })));
    let looked = RealStorage::open_locked_read_only(dir.path());
    assert!(matches!(looked, Err(Error::Locked { .. })));
    file.unlock().unwrap();
    let _owner = open(&dir);
    assert!(matches!(file.try_lock_shared(), Err(fs::TryLockError::WouldBlock)));
}

#[test]
fn a_relative_path_is_made_absolute() {
    let storage = RealStorage::open_read_only(Path::new("src")).unwrap();
    assert!(storage.path("x").is_absolute() && storage.path("x").ends_with("src/x"));
}

/// The test binary runs this very test again, as another process, while the directory is locked.
#[test]
fn another_process_is_refused() {
    if let Some(dir) = std::env::var_os(CHILD_DIR) {
        let second = RealStorage::open(Path::new(&dir));
        assert!(matches!(second, Err(Error::Locked { .. })), "{second:?}");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let _first = open(&dir);
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "storage::real::tests::another_process_is_refused"])
        .env(CHILD_DIR, dir.path())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && said.contains("1 passed"), "{said}");
    let pid = fs::read_to_string(dir.path().join(LOCK_NAME)).unwrap();
    assert_eq!(pid.trim(), std::process::id().to_string(), "the owner's, not the other's");
}

#[test]
fn missing_parents_are_created_and_a_file_in_the_way_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let deep = dir.path().join("a/b/c");
    RealStorage::open(&deep).unwrap();
    let file = dir.path().join("file");
    fs::write(&file, "x").unwrap();
    for path in [file.clone(), file.join("below")] {
        let error = RealStorage::open(&path).unwrap_err();
        assert!(matches!(&error, Error::Io { path: named, .. } if *named == path), "{error}");
    }
}

/// Root may write anywhere; for others the message says what was refused.
#[test]
fn a_directory_that_may_not_be_written_to_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let closed = dir.path().join("closed");
    fs::create_dir(&closed).unwrap();
    fs::set_permissions(&closed, fs::Permissions::from_mode(0o500)).unwrap();
    match RealStorage::open(&closed) {
        Ok(_) => assert!(fs::metadata("/proc/self").unwrap().uid() == 0, "only root may"),
        Err(Error::Io { action, path, source }) => {
            assert_eq!((action, path), ("open", closed.join(LOCK_NAME)));
            assert_eq!(source.kind(), ErrorKind::PermissionDenied);
        }
        Err(other) => panic!("{other}"),
    }
}

#[test]
fn names_that_leave_the_directory_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let storage = open(&dir);
    for name in ["", ".", "..", "a/b", "/etc/passwd", LOCK_NAME] {
        assert_eq!(kind_of(storage.open(name)), ErrorKind::InvalidInput, "{name}");
        assert_eq!(kind_of(storage.create(name)), ErrorKind::InvalidInput, "{name}");
        assert_eq!(kind_of(storage.remove(name)), ErrorKind::InvalidInput, "{name}");
        assert_eq!(kind_of(storage.map(name)), ErrorKind::InvalidInput, "{name}");
    }
}

#[test]
fn files_are_created_once_renamed_over_and_removed() {
    let dir = tempfile::tempdir().unwrap();
    let storage = open(&dir);
    fs::create_dir(dir.path().join("folder")).unwrap();
    storage.create("old").unwrap().write_all_at(b"old", 0).unwrap();
    storage.create("new").unwrap().write_all_at(b"new", 0).unwrap();
    assert_eq!(kind_of(storage.create("old")), ErrorKind::AlreadyExists);
    assert_eq!(kind_of(storage.open("none")), ErrorKind::NotFound);
    storage.rename("new", "old").unwrap();
    assert_eq!(storage.list().unwrap(), ["old"], "neither the folder nor the lock is listed");
    let mut bytes = [0; 3];
    storage.open("old").unwrap().read_exact_at(&mut bytes, 0).unwrap();
    assert_eq!(&bytes, b"new");
    storage.remove("old").unwrap();
    storage.sync_directory().unwrap();
    assert_eq!(kind_of(storage.remove("old")), ErrorKind::NotFound);
    assert_eq!(storage.path("x"), dir.path().join("x"));
}

#[test]
fn a_mapping_and_the_file_are_one() {
    let dir = tempfile::tempdir().unwrap();
    let storage = open(&dir);
    let file = storage.create("ring").unwrap();
    file.allocate(8192).unwrap();
    let region = storage.map("ring").unwrap();
    region.prefault(0, 1024).unwrap();
    region.words()[1000].store(77_u64.to_le(), Ordering::Relaxed);
    let mut word = [0; 8];
    file.read_exact_at(&mut word, 8000).unwrap();
    assert_eq!(u64::from_le_bytes(word), 77);
    file.write_all_at(&78_u64.to_le_bytes(), 16).unwrap();
    assert_eq!(u64::from_le(region.words()[2].load(Ordering::Relaxed)), 78);
    assert_eq!(storage.list().unwrap(), ["ring"], "the lock file is not listed");
}

#[test]
fn what_is_allocated_reads_as_zeros_and_keeps_what_was_written() {
    let dir = tempfile::tempdir().unwrap();
    let storage = open(&dir);
    let file = storage.create("journal").unwrap();
    file.allocate(0).unwrap();
    assert_eq!(file.len().unwrap(), 0);
    file.write_all_at(b"head", 0).unwrap();
    file.allocate(100_000).unwrap();
    assert_eq!(file.len().unwrap(), 100_000);
    let mut bytes = vec![1; 100_000];
    file.read_exact_at(&mut bytes, 0).unwrap();
    assert_eq!(&bytes[..4], b"head");
    assert!(bytes[4..].iter().all(|&byte| byte == 0));
    file.sync_data().unwrap();
    file.allocate(10).unwrap();
    assert_eq!(file.len().unwrap(), 100_000, "nothing is ever cut off");
}

/// The way where blocks can't be reserved, which the file system of this machine may not need.
#[test]
fn zeros_are_written_where_blocks_cannot_be_reserved() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("file");
    let mut options = OpenOptions::new();
    let file = options.read(true).write(true).create_new(true).open(path).unwrap();
    let file = RealFile { file, is_writable: true };
    file.write_all_at(b"head", 0).unwrap();
    file.write_zeros_up_to(150_000).unwrap();
    let mut bytes = vec![1; 150_000];
    file.read_exact_at(&mut bytes, 0).unwrap();
    assert_eq!(&bytes[..4], b"head");
    assert!(bytes[4..].iter().all(|&byte| byte == 0));
    assert_eq!(file.len().unwrap(), 150_000);
}

/// A store into a hole of a mapped ring kills the process where the disk is full.
#[test]
fn holes_of_a_copy_are_filled_where_blocks_cannot_be_reserved() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("file");
    let mut options = OpenOptions::new();
    let file = options.read(true).write(true).create_new(true).open(path).unwrap();
    file.set_len(300_000).unwrap();
    let file = RealFile { file, is_writable: true };
    file.write_all_at(b"head", 0).unwrap();
    file.write_all_at(b"tail", 299_996).unwrap();
    file.write_zeros_up_to(400_000).unwrap();
    assert!(file.has_blocks(400_000).unwrap());
    let mut bytes = vec![1; 400_000];
    file.read_exact_at(&mut bytes, 0).unwrap();
    assert_eq!((&bytes[..4], &bytes[299_996..300_000]), (&b"head"[..], &b"tail"[..]));
    assert_eq!(bytes.iter().filter(|&&byte| byte != 0).count(), 8);
}

#[test]
fn a_file_that_someone_cut_off_ends_early_and_does_not_hang() {
    let dir = tempfile::tempdir().unwrap();
    let storage = open(&dir);
    let file = storage.create("journal").unwrap();
    file.write_all_at(&[7; 1000], 0).unwrap();
    OpenOptions::new().write(true).open(storage.path("journal")).unwrap().set_len(10).unwrap();
    let mut bytes = [0; 1000];
    assert_eq!(kind_of(file.read_exact_at(&mut bytes, 0)), ErrorKind::UnexpectedEof);
    assert_eq!(kind_of(file.read_exact_at(&mut bytes, 5000)), ErrorKind::UnexpectedEof);
}

#[test]
fn a_look_from_outside_changes_nothing_and_needs_no_lock() {
    let dir = tempfile::tempdir().unwrap();
    let owner = open(&dir);
    owner.create("ring").unwrap().allocate(64).unwrap();
    let looker = RealStorage::open_read_only(dir.path()).unwrap();
    let denied = ErrorKind::PermissionDenied;
    assert_eq!(kind_of(looker.create("x")), denied);
    assert_eq!(kind_of(looker.remove("ring")), denied);
    assert_eq!(kind_of(looker.rename("ring", "x")), denied);
    assert_eq!(kind_of(looker.sync_directory()), denied);
    let file = looker.open("ring").unwrap();
    assert_eq!(kind_of(file.write_all_at(&[1], 0)), denied);
    assert_eq!(kind_of(file.allocate(128)), denied);
    assert_eq!(kind_of(file.sync_data()), denied);
    let copy = looker.map("ring").unwrap();
    copy.words()[0].store(1, Ordering::Relaxed);
    let original = owner.map("ring").unwrap();
    assert_eq!(original.words()[0].load(Ordering::Relaxed), 0);
}

#[test]
fn a_look_from_outside_creates_nothing() {
    let dir = tempfile::tempdir().unwrap();
    assert!(RealStorage::open_read_only(&dir.path().join("missing")).is_err());
    RealStorage::open_read_only(dir.path()).unwrap();
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}

/// What a mapped store wrote into reserved blocks is among what may hold something, at once; what
/// is not said to hold anything is zeros.
#[test]
fn what_was_stored_into_a_mapping_is_told_apart_from_what_was_only_reserved() {
    const LEN: u64 = 4 << 20;
    let dir = tempfile::tempdir().unwrap();
    let storage = open(&dir);
    storage.create("ring").unwrap().allocate(LEN).unwrap();
    let region = storage.map("ring").unwrap();
    let places = [5000, 300_000];
    for place in places {
        region.words()[place].store(7, Ordering::Relaxed);
    }
    let file = File::open(dir.path().join("ring")).unwrap();
    let Some(parts) = written_parts(&file) else {
        return;
    };
    let holds = |place: usize| {
        let byte = place as u64 * 8;
        parts.iter().any(|part| part.contains(&byte))
    };
    assert!(places.into_iter().all(holds), "{parts:?}");
    for (place, word) in region.words().iter().enumerate() {
        assert!(word.load(Ordering::Relaxed) == 0 || holds(place), "{place} in {parts:?}");
    }
    assert!(parts.is_sorted_by(|one, next| one.end <= next.start), "{parts:?}");
    assert!(parts.last().is_some_and(|last| last.end <= LEN), "{parts:?}");
}

/// Written parts that are too many are not told apart: the last one told goes to the end.
#[test]
fn many_written_parts_are_told_in_few() {
    let dir = tempfile::tempdir().unwrap();
    let storage = open(&dir);
    let file = storage.create("ring").unwrap();
    let count = 2 * PARTS_TOLD_APART as u64;
    file.allocate(count << 17).unwrap();
    for part in 0..count {
        file.write_all_at(&[1; 4096], part << 17).unwrap();
    }
    let file = File::open(dir.path().join("ring")).unwrap();
    let Some(parts) = written_parts(&file) else { return };
    assert!(parts.len() <= PARTS_TOLD_APART, "{}", parts.len());
    assert!((0..count).all(|part| parts.iter().any(|told| told.contains(&(part << 17)))));
}

/// A page that is not in the file any more stands for one that the disk does not give back.
#[test]
#[cfg(target_os = "linux")]
fn a_page_that_can_not_be_read_is_an_error_before_anybody_looks() {
    const PAGE: u64 = 4096;
    let file = tempfile::tempfile().unwrap();
    file.set_len(4 * PAGE).unwrap();
    let map = MmapOptions::new().map_raw(&file).unwrap();
    read_in(&map, None).unwrap();
    file.set_len(2 * PAGE).unwrap();
    read_in(&map, Some(&[])).unwrap();
    read_in(&map, Some(&[0..PAGE, PAGE..2 * PAGE])).unwrap();
    for unreadable in [2 * PAGE..3 * PAGE, 0..4 * PAGE] {
        let error = read_in(&map, Some(&[0..1, unreadable])).unwrap_err();
        assert_eq!(Errno::from_io_error(&error), Some(Errno::IO), "{error}");
    }
    read_in(&map, None).unwrap_err();
}

/// What the file system keeps about a file counts as blocks of it, and hid a hole of a copy: a
/// store into that would have killed the process once the disk was full.
#[cfg(target_os = "linux")]
#[test]
fn a_hole_is_filled_whatever_else_takes_blocks() {
    const PAGES: u64 = 64;
    let dir = tempfile::tempdir().unwrap();
    let storage = open(&dir);
    let file = storage.create("ring").unwrap();
    file.allocate(PAGES * 4096).unwrap();
    // In so many parts, written and not, that ext4 takes a block for saying where they are.
    for page in (0..PAGES).step_by(2) {
        file.write_all_at(&[1; 4096], page * 4096).unwrap();
    }
    let raw = OpenOptions::new().write(true).open(dir.path().join("ring")).unwrap();
    let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    if rustix::fs::fallocate(&raw, punch, 10 * 4096, 4096).is_err() {
        return;
    }
    raw.sync_all().unwrap();
    let with_hole = raw.metadata().unwrap().blocks();
    file.allocate(PAGES * 4096).unwrap();
    let blocks = raw.metadata().unwrap().blocks();
    assert!(blocks > with_hole, "{with_hole} blocks, and then {blocks}");
}

/// A child that had the rings would keep them in memory, and could write to them.
#[test]
#[cfg(target_os = "linux")]
fn a_mapped_ring_does_not_go_to_forked_children() {
    let dir = tempfile::tempdir().unwrap();
    let storage = open(&dir);
    storage.create("ring").unwrap().write_all_at(&[1; 4096], 0).unwrap();
    let _ring = storage.map("ring").unwrap();
    let maps = fs::read_to_string("/proc/self/smaps").unwrap();
    let name = dir.path().join("ring").display().to_string();
    let mut lines = maps.lines().skip_while(|line| !line.ends_with(&name));
    // `dc`: it is not copied on fork.
    let flags = lines.find(|line| line.starts_with("VmFlags:")).unwrap();
    assert!(flags.split_whitespace().any(|flag| flag == "dc"), "{flags}");
}

/// It counted as full.
#[test]
#[cfg(target_os = "linux")]
fn a_file_system_that_does_not_say_how_large_it_is_has_room() {
    let storage = RealStorage::open_read_only(Path::new("/proc")).unwrap();
    assert_eq!(storage.free_bytes().unwrap(), u64::MAX);
}
