//! Which limits a call may meet while others change them: those that were in force when it began,
//! and those that were asked for until it returned.

use std::sync::Mutex;

use super::{Page, USERS};

/// All limits of the adjusted quota in one life.
pub(crate) struct Limits {
    default: Mutex<History>,
    /// 0 is no limit of one's own.
    own: [Mutex<History>; USERS],
}

struct History {
    asked: Vec<u64>,
    /// The place of the last one whose call has returned.
    in_force: usize,
}

/// How far the limits had come before a call.
#[derive(Clone, Copy)]
pub(crate) struct Before {
    default: usize,
    own: usize,
}

impl Limits {
    /// Those that the page has, before anybody changes them.
    pub(crate) fn of(page: &Page) -> Self {
        let history = |user| History { asked: vec![page.limit(user)[0]], in_force: 0 };
        Self {
            default: Mutex::new(history(None)),
            own: std::array::from_fn(|user| Mutex::new(history(Some(user)))),
        }
    }

    fn with<T>(&self, user: Option<usize>, then: impl FnOnce(&mut History) -> T) -> T {
        let history = user.map_or(&self.default, |user| &self.own[user]);
        then(&mut history.lock().expect("nobody panics with it"))
    }

    pub(crate) fn ask(&self, user: Option<usize>, limit: u64) {
        self.with(user, |history| history.asked.push(limit));
    }

    /// What was asked last is in force. Only one thread changes limits.
    pub(crate) fn acknowledge(&self, user: Option<usize>) {
        self.with(user, |history| history.in_force = history.asked.len() - 1);
    }

    /// Of a user whose limits don't change, any.
    pub(crate) fn before(&self, user: usize) -> Before {
        let in_force = |user| self.with(user, |history| history.in_force);
        Before { default: in_force(None), own: in_force(Some(user % USERS)) }
    }

    /// Whether a call that began at `before` and has returned may have met `limit`. Own limits are
    /// odd.
    pub(crate) fn may_be(&self, user: usize, before: Before, limit: u64) -> bool {
        let has =
            |user, from, limit| self.with(user, |history| history.asked[from..].contains(&limit));
        if limit % 2 == 1 {
            has(Some(user), before.own, limit)
        } else {
            has(Some(user), before.own, 0) && has(None, before.default, limit)
        }
    }
}
