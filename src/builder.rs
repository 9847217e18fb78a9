//! Options given before a directory is opened.

use std::fmt;
use std::path::Path;
use std::time::Duration;

use crate::config::Config;
use crate::delivery::NamedSink;
use crate::engine::{Opening, Owner};
#[cfg(doc)]
use crate::error::Error;
use crate::error::Result;
use crate::gate::Tollgate;
use crate::sink::UsageSink;

/// A data directory about to be opened, with its sinks. Made by [`Tollgate::builder`].
#[must_use = "nothing is opened until `open` is called"]
pub struct Builder {
    opening: Opening,
    config: Config,
    sinks: Vec<NamedSink>,
}

impl Builder {
    pub(crate) fn new(dir: &Path) -> Self {
        Self { opening: Opening::new(dir), config: Config::default(), sinks: Vec::new() }
    }

    /// The configuration; without this call it is the default.
    pub fn config(mut self, config: Config) -> Self {
        self.config = config;
        self
    }

    /// Attaches a sink, one of at most 64. The directory remembers the sink's position under
    /// `name`, which must stay the same from one open to the next: 1 to 64 characters of a-z, 0-9,
    /// `-` and `_`.
    ///
    /// A sink without a position yet begins with the engine's totals; one with a position continues
    /// from it. See [`sink`](crate::sink).
    pub fn sink(mut self, name: impl Into<String>, sink: impl UsageSink + 'static) -> Self {
        self.sinks.push((name.into(), Box::new(sink)));
        self
    }

    /// Whether an engine is made where there is none: in a directory that is missing, which is
    /// created, or one that holds no engine. Default: true. With false that is
    /// [`Error::NoEngine`], and nothing is created: a path that is mistyped, or whose file system
    /// is not mounted, is not taken for an engine in which nothing was counted.
    ///
    /// ```
    /// use tollgate::{Config, Error, Tollgate};
    ///
    /// # let root = tempfile::tempdir()?;
    /// # let dir = root.path().join("data");
    /// let open_existing = || Tollgate::builder(&dir).create_if_missing(false).open();
    /// assert!(matches!(open_existing(), Err(Error::NoEngine { exists: false, .. })));
    ///
    /// Tollgate::open(&dir, Config::default())?.close()?; // once, to set it up
    /// open_existing()?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn create_if_missing(mut self, create: bool) -> Self {
        self.opening.may_create = create;
        self
    }

    /// How long [`open`](Self::open) waits for another process, or another [`Tollgate`] or
    /// [`verify`](crate::verify) in this one, to let go of the directory; then it is
    /// [`Error::Locked`]. Default: not at all. For a restart in which the next process begins
    /// before the last has ended. The directory is looked at every 10 milliseconds.
    pub fn wait_for_lock(mut self, at_most: Duration) -> Self {
        self.opening.wait_for_lock = at_most;
        self
    }

    /// Opens the directory, see [`Tollgate::open`].
    ///
    /// # Errors
    ///
    /// Those of [`Tollgate::open`]. [`Error::InvalidConfig`] for a sink's name that is not allowed
    /// or used twice, [`Error::TooMany`] sinks, [`Error::NoEngine`] where
    /// [`create_if_missing`](Self::create_if_missing) is false. A sink that can't be reached is not
    /// an error: [`Tollgate::health`] says so.
    pub fn open(self) -> Result<Tollgate> {
        let Self { opening, config, sinks } = self;
        Ok(Tollgate::of(Owner::open(&opening, config, sinks)?))
    }
}

impl fmt::Debug for Builder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let sinks: Vec<_> = self.sinks.iter().map(|(name, _)| name).collect();
        f.debug_struct("Builder")
            .field("opening", &self.opening)
            .field("config", &self.config)
            .field("sinks", &sinks)
            .finish()
    }
}
