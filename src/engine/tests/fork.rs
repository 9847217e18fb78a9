//! What a forked process does with the engine of its parent: nothing.

use std::panic::{AssertUnwindSafe, catch_unwind};

use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::ForkResult;

use super::*;
use crate::{Reserved, Tollgate};

/// How a child ended that did this. It has this thread only.
fn in_a_child(work: impl FnOnce()) -> WaitStatus {
    // SAFETY: the child ends in `work` and the exit below; the memory allocator is usable there.
    #[expect(unsafe_code, reason = "the child has only one of the process's threads")]
    match unsafe { nix::unistd::fork() }.unwrap() {
        ForkResult::Parent { child } => waitpid(child, None).unwrap(),
        ForkResult::Child => {
            let code = i32::from(catch_unwind(AssertUnwindSafe(work)).is_err());
            // SAFETY: it does not come back, and nothing of this process is needed any more.
            #[expect(unsafe_code, reason = "an exit would run what the parent has registered")]
            unsafe {
                nix::libc::_exit(code)
            }
        }
    }
}

/// A child that dropped its copy of the gate wrote the sums that it had inherited where its parent
/// wrote, too: the next open refused the directory as damaged.
#[test]
fn a_forked_process_leaves_the_journal_to_its_parent() {
    let dir = tempfile::tempdir().unwrap();
    let opened = Tollgate::open(dir.path(), small().lanes(1)).unwrap();
    let quota = opened.define(Quota::new("requests", 1000)).unwrap();
    let mut used = 0;
    let mut opened = Some(opened);
    for _ in 0..3 {
        let gate = opened.as_ref().unwrap();
        gate.consume(7, quota, 5).unwrap();
        used += 5;
        // Summed up by now, and not yet written.
        while gate.stats().backlog > 0 {
            std::thread::yield_now();
        }
        let ended = in_a_child(|| {
            let gate = opened.take().unwrap();
            assert!(matches!(gate.sync(), Err(Error::Closed)));
            assert!(matches!(gate.set_limit(7, quota, 1), Err(Error::Closed)));
            assert!(matches!(gate.define(Quota::new("other", 1)), Err(Error::Closed)));
            assert!(matches!(gate.snapshot(), Err(Error::Closed)));
            gate.close().unwrap();
            drop(gate);
        });
        let gate = opened.as_ref().unwrap();
        assert!(matches!(ended, WaitStatus::Exited(_, 0)), "{ended:?}");
        gate.consume(7, quota, 1).unwrap();
        used += 1;
        gate.sync().unwrap();
        assert!(matches!(Tollgate::open(dir.path(), small()), Err(Error::Locked { .. })));
    }
    opened.take().unwrap().close().unwrap();
    let gate = Tollgate::open(dir.path(), small()).unwrap();
    assert_eq!(gate.usage(7, quota).unwrap().used, used);
}

/// A child that dropped its copy of a reservation went to where the rings are in its parent, and
/// crashed.
#[test]
fn a_forked_process_leaves_a_reservation_to_its_parent() {
    let dir = tempfile::tempdir().unwrap();
    let gate = Tollgate::open(dir.path(), small().lanes(1)).unwrap();
    let quota = gate.define(Quota::new("requests", 10)).unwrap();
    let reserve = || gate.reserve(7, quota, 10, Duration::from_secs(60)).unwrap();
    let Reserved::Open(reservation) = reserve() else { panic!("it fits") };
    let mut reservation = Some(reservation);
    let ended = in_a_child(|| drop(reservation.take()));
    assert!(matches!(ended, WaitStatus::Exited(_, 0)), "{ended:?}");
    assert_eq!(gate.usage(7, quota).unwrap().used, 10);
    // The child's drop was of its own copy.
    drop(reservation.take());
    assert_eq!(gate.usage(7, quota).unwrap().used, 0);
}

/// The engine of a process without the flushers goes with its owner, and with it the lock, which
/// was the parent's.
#[test]
fn a_forked_process_that_drops_the_engine_does_not_unlock_the_directory() {
    let dir = tempfile::tempdir().unwrap();
    let open = || -> Result<Owner> {
        let storage: Arc<dyn Storage> = Arc::new(RealStorage::open(dir.path())?);
        Owner::open_at_rest(&storage, small())
    };
    let owner = open().unwrap();
    let quota = define(&owner);
    consume(&owner, 1, quota, false).unwrap();
    let mut owner = Some(owner);
    let ended = in_a_child(|| drop(owner.take()));
    assert!(matches!(ended, WaitStatus::Exited(_, 0)), "{ended:?}");
    assert!(matches!(open(), Err(Error::Locked { .. })));
    let of_parent = owner.take().unwrap();
    assert_eq!(consume(&of_parent, 1, quota, true).unwrap(), 2);
    drop(of_parent);
    let owner = open().unwrap();
    assert_eq!(consume(&owner, 1, quota, false).unwrap(), 3);
}

/// The parent had closed the engine, so that its copy in the child was the last to hold the rings.
/// They are not mapped there: what the child had put where they were in the parent went with them.
#[test]
fn a_forked_process_that_drops_a_closed_engine_keeps_its_own_memory() {
    use nix::libc;

    let dir = tempfile::tempdir().unwrap();
    let gate = Tollgate::open(dir.path(), small().lanes(1)).unwrap();
    let rings = {
        let lane = gate.owner.engine.lanes.get(0).unwrap();
        lane.words().as_ptr_range()
    };
    gate.close().unwrap();
    let mut gate = Some(gate);
    let ended = in_a_child(|| {
        let (start, end) = (rings.start.addr(), rings.end.addr());
        let (protection, flags) = (
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE,
        );
        let wanted = rings.start.cast_mut().cast();
        // SAFETY: it replaces nothing that is mapped.
        #[expect(unsafe_code, reason = "what an allocator or a new thread's stack may do")]
        let own = unsafe { libc::mmap(wanted, end - start, protection, flags, -1, 0) };
        assert_eq!(own, wanted, "the rings are mapped in the child");
        drop(gate.take());
        // SAFETY: it was mapped above, and nothing but this function has its address.
        #[expect(unsafe_code, reason = "where it is gone, a signal ends the child")]
        let first = unsafe { own.cast::<u8>().read_volatile() };
        assert_eq!(first, 0);
    });
    assert!(matches!(ended, WaitStatus::Exited(_, 0)), "{ended:?}");
}
