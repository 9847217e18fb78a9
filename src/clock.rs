//! Time. The only module that asks the operating system for it.

use std::fmt::Debug;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock, Weak};
use std::time::{Duration, Instant, SystemTime};

use crossbeam::utils::CachePadded;
use parking_lot::Mutex;

use crate::model::Timestamp;

/// Where the engine's time comes from.
///
/// The wall clock decides which window a consume belongs to; it may jump. The monotonic clock
/// measures how long things take. Both are read by background threads and before a denial, not on
/// every call.
pub trait Clock: Debug + Send + Sync {
    /// The wall clock.
    fn now(&self) -> Timestamp;

    /// The time since an arbitrary point. Never goes back.
    fn monotonic(&self) -> Duration;

    /// Receives a coarse clock that reads this one now and then. A clock whose time changes on
    /// command, rather than by itself, [pushes](CoarseClock::push) each change into it, so that the
    /// change is seen at once. The default does nothing.
    fn attach(&self, _listener: Weak<CoarseClock>) {}
}

/// The operating system's clocks.
#[derive(Debug, Clone, Copy, Default)]
pub struct SystemClock;

static MONOTONIC_ORIGIN: LazyLock<Instant> = LazyLock::new(monotonic_now);

#[expect(clippy::disallowed_methods, reason = "this is the module that time comes from")]
fn monotonic_now() -> Instant {
    Instant::now()
}

/// How long the process has used this module, in real time even under a [`ManualClock`]. For
/// deadlines and signs of life, which a test's clock must not stop.
pub(crate) fn uptime() -> Duration {
    SystemClock.monotonic()
}

impl Clock for SystemClock {
    #[expect(clippy::disallowed_methods, reason = "this is the module that time comes from")]
    fn now(&self) -> Timestamp {
        Timestamp::from(SystemTime::now())
    }

    fn monotonic(&self) -> Duration {
        let origin = *MONOTONIC_ORIGIN;
        monotonic_now().saturating_duration_since(origin)
    }
}

impl Timestamp {
    /// The time by the operating system's clock, whatever [`Clock`] an engine has.
    ///
    /// ```
    /// use tollgate::Timestamp;
    ///
    /// assert!(Timestamp::now() > Timestamp::MIN);
    /// ```
    #[must_use]
    pub fn now() -> Self {
        SystemClock.now()
    }
}

/// A clock that stands still until it is told to move, for tests. Clones share the time.
///
/// ```
/// use std::time::Duration;
/// use tollgate::{Clock, ManualClock, Timestamp};
///
/// let clock = ManualClock::new(Timestamp::from_unix_millis(1_000));
/// clock.advance(Duration::from_secs(2));
/// assert_eq!(clock.now(), Timestamp::from_unix_millis(3_000));
/// ```
#[derive(Debug, Clone)]
pub struct ManualClock {
    shared: Arc<ManualShared>,
}

#[derive(Debug)]
struct ManualShared {
    time: Mutex<ManualTime>,
    /// Locked first, for the whole of a change, so that changes are pushed in the order in which
    /// they are made.
    listeners: Mutex<Vec<Weak<CoarseClock>>>,
}

#[derive(Debug, Clone, Copy)]
struct ManualTime {
    since_1970: Duration,
    monotonic: Duration,
}

impl ManualClock {
    /// A clock that shows `start`.
    #[must_use]
    pub fn new(start: Timestamp) -> Self {
        let time = ManualTime { since_1970: since_1970(start), monotonic: Duration::ZERO };
        let shared = ManualShared { time: Mutex::new(time), listeners: Mutex::default() };
        Self { shared: Arc::new(shared) }
    }

    /// Sets the wall clock, forward or back, as an operator or a time server would. The monotonic
    /// clock stays as it is, so this is a jump; [`advance`](Self::advance) lets time pass.
    pub fn set(&self, now: Timestamp) {
        self.change(|time| time.since_1970 = since_1970(now));
    }

    /// Lets time pass on both clocks.
    pub fn advance(&self, duration: Duration) {
        self.change(|time| {
            time.since_1970 = time.since_1970.saturating_add(duration);
            time.monotonic = time.monotonic.saturating_add(duration);
        });
    }

    fn change(&self, change: impl FnOnce(&mut ManualTime)) {
        let mut listeners = self.shared.listeners.lock();
        change(&mut self.shared.time.lock());
        let now = self.now();
        listeners.retain(|listener| {
            let coarse = listener.upgrade();
            if let Some(coarse) = &coarse {
                coarse.push(now);
            }
            coarse.is_some()
        });
    }
}

fn since_1970(time: Timestamp) -> Duration {
    Duration::from_millis(time.as_unix_millis())
}

impl Clock for ManualClock {
    fn now(&self) -> Timestamp {
        Timestamp::from_since_1970(self.shared.time.lock().since_1970)
    }

    fn monotonic(&self) -> Duration {
        self.shared.time.lock().monotonic
    }

    fn attach(&self, listener: Weak<CoarseClock>) {
        self.shared.listeners.lock().push(listener);
    }
}

/// The clock that every call reads: the wall clock as of the last tick, at the cost of a load.
///
/// Made by the engine, which refreshes it every `clock_tick`. A clock of your own receives it in
/// [`Clock::attach`].
#[derive(Debug)]
pub struct CoarseClock {
    /// Milliseconds since 1970. On a cache line of its own: it is read by all and written once a
    /// tick.
    ///
    /// All accesses are relaxed: the value is complete in itself and publishes no other memory, and
    /// readers accept it as late as a tick. Not one of `crate::sync`'s: loom has nothing to find in
    /// a single independent word.
    millis: CachePadded<AtomicU64>,
    source: Arc<dyn Clock>,
}

impl CoarseClock {
    pub(crate) fn new(source: Arc<dyn Clock>) -> Arc<Self> {
        let millis = CachePadded::new(AtomicU64::new(source.now().as_unix_millis()));
        let coarse = Arc::new(Self { millis, source });
        coarse.source.attach(Arc::downgrade(&coarse));
        // A change between the first reading and the attachment was not pushed.
        coarse.refresh();
        coarse
    }

    /// The time at the last tick, refresh or push.
    #[inline]
    pub(crate) fn now(&self) -> Timestamp {
        Timestamp::of_millis(self.millis.load(Ordering::Relaxed))
    }

    /// Reads the source; `now` returns what it says from here on.
    pub(crate) fn refresh(&self) -> Timestamp {
        let before = self.millis.load(Ordering::Relaxed);
        let now = self.source.now();
        // An unchanged time is not stored, so that a storm of denials does not take the line from
        // its readers. A changed one is stored unless somebody was quicker: theirs is as fresh, and
        // a push must not be undone.
        if before != now.as_unix_millis() {
            let _ = self.millis.compare_exchange(
                before,
                now.as_unix_millis(),
                Ordering::Relaxed,
                Ordering::Relaxed,
            );
        }
        now
    }

    /// The source's monotonic clock.
    pub(crate) fn monotonic(&self) -> Duration {
        self.source.monotonic()
    }

    /// Sets the time, ahead of the next tick. For implementations of [`Clock::attach`].
    pub fn push(&self, now: Timestamp) {
        self.millis.store(now.as_unix_millis(), Ordering::Relaxed);
    }
}

/// The wall clock for decisions that can't be undone: a jump ahead is believed only after a day.
#[derive(Debug)]
pub(crate) struct WaryClock {
    source: Arc<CoarseClock>,
    /// The time that was last believed, and when that was on the monotonic clock.
    believed: Timestamp,
    at: Duration,
    /// Since when the wall clock has been ahead, on the monotonic clock.
    ahead_since: Option<Duration>,
}

impl WaryClock {
    /// How far ahead of the monotonic clock it may be without counting as a jump.
    const STEP_MAX: Duration = Duration::from_mins(1);
    pub(crate) const DOUBTED_FOR: Duration = Duration::from_hours(24);

    /// Believes what the clock says now.
    pub(crate) fn new(source: Arc<CoarseClock>) -> Self {
        let (believed, at) = (source.now(), source.monotonic());
        Self { source, believed, at, ahead_since: None }
    }

    /// What it believes now.
    pub(crate) fn now(&mut self) -> Timestamp {
        let (wall, monotonic) = (self.source.now(), self.source.monotonic());
        self.look_at(wall, monotonic)
    }

    /// [`now`](Self::now), when the clock shows this.
    fn look_at(&mut self, wall: Timestamp, monotonic: Duration) -> Timestamp {
        let expected = self.believed.saturating_add(monotonic.saturating_sub(self.at));
        let is_ahead = wall > expected.saturating_add(Self::STEP_MAX);
        self.ahead_since = is_ahead
            .then(|| self.ahead_since.unwrap_or(monotonic))
            .filter(|&since| monotonic.saturating_sub(since) < Self::DOUBTED_FOR);
        self.believed = if self.ahead_since.is_some() { expected } else { wall };
        self.at = self.at.max(monotonic);
        self.believed
    }
}

/// A [`WaryClock`] that many threads read, mostly at the cost of two loads.
#[derive(Debug)]
pub(crate) struct BelievedClock {
    source: Arc<CoarseClock>,
    wary: Mutex<WaryClock>,
    /// The time last believed, in milliseconds. Relaxed: a time, complete in itself.
    believed: AtomicU64,
}

impl BelievedClock {
    /// Believes what the clock says now.
    pub(crate) fn new(source: Arc<CoarseClock>) -> Self {
        let wary = WaryClock::new(Arc::clone(&source));
        let believed = AtomicU64::new(wary.believed.as_unix_millis());
        Self { source, wary: Mutex::new(wary), believed }
    }

    pub(crate) fn now(&self) -> Timestamp {
        let wall = self.source.now();
        let believed = Timestamp::of_millis(self.believed.load(Ordering::Relaxed));
        // From what was believed it would be no jump, and all the less from what is expected since.
        if wall <= believed.saturating_add(WaryClock::STEP_MAX) { wall } else { self.look() }
    }

    /// [`now`](Self::now), for those who ask regularly, so that others need not.
    pub(crate) fn look(&self) -> Timestamp {
        // The clock may be the application's, which may call us: it is asked without the lock.
        let (wall, monotonic) = (self.source.now(), self.source.monotonic());
        let mut wary = self.wary.lock();
        let now = wary.look_at(wall, monotonic);
        self.believed.store(now.as_unix_millis(), Ordering::Relaxed);
        now
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicBool;

    use super::*;

    fn at(millis: u64) -> Timestamp {
        Timestamp::from_unix_millis(millis)
    }

    #[test]
    fn the_system_clock_moves_on() {
        let (wall, monotonic) = (SystemClock.now(), SystemClock.monotonic());
        assert!(wall > at(1_700_000_000_000), "{wall}");
        std::thread::sleep(Duration::from_millis(2));
        assert!(SystemClock.monotonic() >= monotonic + Duration::from_millis(2));
    }

    #[test]
    fn advancing_moves_both_clocks_and_setting_the_wall_clock_only() {
        let clock = ManualClock::new(at(1000));
        let same = clock.clone();
        same.advance(Duration::from_micros(1500));
        assert_eq!((clock.now(), clock.monotonic()), (at(1001), Duration::from_micros(1500)));
        same.advance(Duration::from_micros(500));
        assert_eq!((clock.now(), clock.monotonic()), (at(1002), Duration::from_millis(2)));
        same.set(at(10));
        assert_eq!((clock.now(), clock.monotonic()), (at(10), Duration::from_millis(2)));
        same.set(at(9000));
        assert_eq!((clock.now(), clock.monotonic()), (at(9000), Duration::from_millis(2)));
    }

    #[test]
    fn a_coarse_clock_sees_a_manual_change_at_once() {
        let clock = ManualClock::new(at(1000));
        let coarse = CoarseClock::new(Arc::new(clock.clone()));
        assert_eq!(coarse.now(), at(1000));
        clock.advance(Duration::from_millis(5));
        assert_eq!(coarse.now(), at(1005));
        clock.set(at(3));
        assert_eq!((coarse.now(), coarse.monotonic()), (at(3), Duration::from_millis(5)));
    }

    #[test]
    fn a_jump_ahead_is_doubted_for_a_day() {
        const HOUR: Duration = Duration::from_hours(1);
        let clock = ManualClock::new(at(1000));
        let coarse = CoarseClock::new(Arc::new(clock.clone()));
        let mut wary = WaryClock::new(coarse);
        clock.advance(3 * HOUR);
        let right = clock.now();
        assert_eq!(wary.now(), right);
        let ahead = right.saturating_add(365 * 24 * HOUR);
        clock.set(ahead);
        assert_eq!(wary.now(), right);
        clock.advance(23 * HOUR);
        let right = right.saturating_add(23 * HOUR);
        assert_eq!(wary.now(), right);
        // Set right within the day: nothing has happened. As far ahead as it may jump, too.
        clock.set(right.saturating_add(WaryClock::STEP_MAX));
        assert_eq!(wary.now(), clock.now());
        // A day from the next time on.
        clock.set(ahead);
        assert!(wary.now() < ahead);
        clock.advance(23 * HOUR);
        assert!(wary.now() < ahead);
        clock.advance(HOUR);
        assert_eq!(wary.now(), clock.now());
        // Back is believed at once.
        clock.set(at(5));
        assert_eq!(wary.now(), at(5));
    }

    #[test]
    fn a_dropped_listener_is_forgotten() {
        let clock = ManualClock::new(at(1000));
        drop(CoarseClock::new(Arc::new(clock.clone())));
        assert_eq!(clock.shared.listeners.lock().len(), 1);
        clock.advance(Duration::from_millis(1));
        assert_eq!(clock.shared.listeners.lock().len(), 0);
    }

    /// A clock that changes and says so while a refresh is between reading it and storing what it
    /// read.
    #[derive(Debug, Default)]
    struct Overtaken {
        listener: Mutex<Weak<CoarseClock>>,
        armed: AtomicBool,
    }

    impl Clock for Overtaken {
        fn now(&self) -> Timestamp {
            if !self.armed.swap(false, Ordering::Relaxed) {
                return at(1000);
            }
            self.listener.lock().upgrade().unwrap().push(at(2000));
            at(1001)
        }

        fn monotonic(&self) -> Duration {
            Duration::ZERO
        }

        fn attach(&self, listener: Weak<CoarseClock>) {
            *self.listener.lock() = listener;
        }
    }

    #[test]
    fn a_refresh_does_not_undo_a_push() {
        let source = Arc::new(Overtaken::default());
        let coarse = CoarseClock::new(source.clone());
        source.armed.store(true, Ordering::Relaxed);
        assert_eq!(coarse.refresh(), at(1001));
        assert_eq!(coarse.now(), at(2000));
        assert_eq!(coarse.refresh(), at(1000));
        assert_eq!(coarse.now(), at(1000));
    }
}
