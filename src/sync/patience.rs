//! How a thread waits for another that is in the middle of an operation, and will not be long.

/// So often it looks again at once: what is waited for takes less than a microsecond.
#[cfg(not(loom))]
const SPINS: u32 = 64;
/// Until so many looks it lets others run: the one that is waited for may have no processor.
#[cfg(not(loom))]
const YIELDS: u32 = 164;
/// Then it sleeps for so long at a time, maybe with a counter's cell held: the other may never get
/// this one's processor otherwise.
#[cfg(not(loom))]
const NAP: std::time::Duration = std::time::Duration::from_micros(50);

/// What a thread has of it, for one wait.
#[derive(Debug, Default)]
pub(crate) struct Patience {
    #[cfg(not(loom))]
    rounds: u32,
}

impl Patience {
    /// To be called between two looks.
    #[cfg(not(loom))]
    pub(crate) fn wait(&mut self) {
        self.rounds = self.rounds.saturating_add(1);
        match self.rounds {
            0..SPINS => std::hint::spin_loop(),
            SPINS..YIELDS => std::thread::yield_now(),
            YIELDS.. => std::thread::sleep(NAP),
        }
    }

    /// loom lets another run.
    #[cfg(loom)]
    pub(crate) fn wait(&mut self) {
        loom::thread::yield_now();
    }
}
