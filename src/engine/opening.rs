//! How a directory is taken: made where it is missing, or not; at once, or when others have closed
//! it.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use crate::clock::uptime;
use crate::error::{Error, Result};
use crate::recovery;
use crate::storage::{CheckedStorage, RealStorage, Storage};

/// Between two looks whether the directory is free.
const LOOK_EVERY: Duration = Duration::from_millis(10);

/// Which directory is opened, and how.
#[derive(Debug)]
pub(crate) struct Opening {
    pub(crate) dir: PathBuf,
    /// Whether an engine is made where there is none.
    pub(crate) may_create: bool,
    /// For how long others may have it.
    pub(crate) wait_for_lock: Duration,
}

impl Opening {
    pub(crate) fn new(dir: &Path) -> Self {
        Self { dir: dir.to_path_buf(), may_create: true, wait_for_lock: Duration::ZERO }
    }

    /// Takes the directory.
    ///
    /// # Errors
    /// `Locked` where others had it all the time; `NoEngine`; those of [`RealStorage::open`].
    pub(super) fn storage(&self) -> Result<Arc<dyn Storage>> {
        let deadline = uptime().saturating_add(self.wait_for_lock);
        let mut opened =
            if self.may_create { RealStorage::open(&self.dir) } else { self.existing() };
        while let Err(Error::Locked { .. }) = opened {
            let left = deadline.saturating_sub(uptime());
            if left.is_zero() {
                break;
            }
            thread::sleep(left.min(LOOK_EVERY));
            // By its path: it may be another directory by now. Whoever has it has made it.
            opened = if self.may_create {
                RealStorage::open_existing(&self.dir)
            } else {
                self.existing()
            };
        }
        let storage: Arc<dyn Storage> = Arc::new(CheckedStorage::new(Arc::new(opened?)));
        // Once more, under the lock, and whether more than its name was left by a creation.
        if !self.may_create && !recovery::holds_engine(&storage)? {
            return Err(self.no_engine(true));
        }
        Ok(storage)
    }

    /// Before the lock, whose file is made where it is missing: what is not an engine's directory
    /// stays as it is.
    fn existing(&self) -> Result<RealStorage> {
        let look = RealStorage::open_read_only(&self.dir).map_err(|error| match error {
            Error::Io { source, .. } if source.kind() == std::io::ErrorKind::NotFound => {
                self.no_engine(false)
            }
            error => error,
        })?;
        let look: Arc<dyn Storage> = Arc::new(look);
        if !recovery::has_names_of_engine(&look)? {
            return Err(self.no_engine(true));
        }
        RealStorage::open_existing(&self.dir)
    }

    fn no_engine(&self, exists: bool) -> Error {
        Error::NoEngine { dir: self.dir.clone(), exists }
    }
}

#[cfg(test)]
#[cfg(not(loom))]
mod tests {
    use std::fs;

    use super::*;
    use crate::config::Config;
    use crate::engine::Owner;
    use crate::engine::order_tests::small;
    use crate::identity::{self, Identity};
    use crate::model::{EngineId, Quota};

    fn existing(dir: &Path) -> Opening {
        Opening { may_create: false, ..Opening::new(dir) }
    }

    fn open(opening: &Opening) -> Result<Owner> {
        Owner::open(opening, small(), Vec::new())
    }

    fn names(dir: &Path) -> Vec<String> {
        let entries = fs::read_dir(dir).unwrap();
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }

    /// A mistyped path, or a file system that is not mounted, was an engine with nothing counted.
    #[test]
    fn what_must_be_there_is_not_made() {
        let root = tempfile::tempdir().unwrap();
        let missing = root.path().join("missing");
        let refused = open(&existing(&missing));
        assert!(matches!(refused, Err(Error::NoEngine { exists: false, .. })), "{refused:?}");
        assert!(!missing.exists());
        let theirs = root.path().join("theirs");
        fs::create_dir(&theirs).unwrap();
        for name in ["", "notes.txt"] {
            if !name.is_empty() {
                fs::write(theirs.join(name), "theirs").unwrap();
            }
            let refused = open(&existing(&theirs));
            assert!(matches!(refused, Err(Error::NoEngine { exists: true, .. })), "{refused:?}");
            assert_eq!(names(&theirs).concat(), name);
        }
        // Whether the clock is there or not: what is refused for its values is so before.
        let config = Config::default().lanes(0);
        let refused = Owner::open(&existing(&missing), config, Vec::new());
        assert!(matches!(refused, Err(Error::InvalidConfig { .. })), "{refused:?}");
    }

    #[test]
    fn what_is_there_is_opened() {
        let dir = tempfile::tempdir().unwrap();
        let owner = open(&Opening::new(dir.path())).unwrap();
        let id = owner.engine.define(&Quota::new("requests", 10)).unwrap();
        drop(owner);
        let owner = open(&existing(dir.path())).unwrap();
        assert_eq!(owner.engine.quota_by_name("requests"), Some(id));
    }

    /// A creation that was broken off has acknowledged nothing.
    #[test]
    fn half_a_creation_is_no_engine() {
        let dir = tempfile::tempdir().unwrap();
        let storage: Arc<dyn Storage> = Arc::new(RealStorage::open(dir.path()).unwrap());
        let engine = EngineId::from_u128(7);
        identity::write(&storage, Identity { engine, is_created: false }).unwrap();
        drop(storage);
        let refused = open(&existing(dir.path()));
        assert!(matches!(refused, Err(Error::NoEngine { exists: true, .. })), "{refused:?}");
        let owner = open(&Opening::new(dir.path())).unwrap();
        assert!(owner.engine.report().created);
    }

    /// One process ends while the next begins.
    #[test]
    fn an_open_waits_for_the_one_before() {
        let dir = tempfile::tempdir().unwrap();
        let first = open(&Opening::new(dir.path())).unwrap();
        let id = first.engine.define(&Quota::new("requests", 10)).unwrap();
        let waiting = |may_create, wait_for_lock| Opening {
            may_create,
            wait_for_lock,
            ..Opening::new(dir.path())
        };
        let began = uptime();
        let short = Duration::from_millis(50);
        for may_create in [true, false] {
            let refused = open(&waiting(may_create, short));
            assert!(matches!(refused, Err(Error::Locked { .. })), "{refused:?}");
        }
        assert!(uptime() - began >= 2 * short);
        let mut first = Some(first);
        for may_create in [true, false] {
            let opening = waiting(may_create, Duration::from_secs(60));
            let next = thread::scope(|scope| {
                let next = scope.spawn(|| open(&opening));
                thread::sleep(short);
                assert!(!next.is_finished());
                drop(first.take());
                next.join().unwrap().unwrap()
            });
            assert_eq!(next.engine.quota_by_name("requests"), Some(id));
            first = Some(next);
        }
    }
}
