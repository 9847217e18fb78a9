//! What keeps an engine open: the count of its handles, split into as many counts as threads are
//! likely to run at a time, so that threads that take and drop handles all the time do not contend
//! for one.

use std::sync::Arc;

use crossbeam::utils::CachePadded;

use crate::engine::Owner;
use crate::seats::thread_hint;

const STRIPES: usize = 16;

/// Keeps an engine open as long as it is there.
pub(crate) type Keeper = Arc<CachePadded<Arc<Owner>>>;

/// Those of one engine.
#[derive(Debug, Clone)]
pub(crate) struct Keepers(Arc<[Keeper; STRIPES]>);

impl Keepers {
    pub(crate) fn new(owner: &Arc<Owner>) -> Self {
        let keeper = |_| Arc::new(CachePadded::new(Arc::clone(owner)));
        Self(Arc::new(std::array::from_fn(keeper)))
    }

    /// One for a handle.
    #[inline]
    pub(crate) fn one(&self) -> Keeper {
        Arc::clone(&self.0[thread_hint() % STRIPES])
    }
}
