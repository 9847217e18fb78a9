//! Options given before a directory is opened.

use std::fmt;
use std::path::{Path, PathBuf};

use crate::config::Config;
use crate::delivery::NamedSink;
use crate::engine::Owner;
#[cfg(doc)]
use crate::error::Error;
use crate::error::Result;
use crate::gate::Tollgate;
use crate::sink::UsageSink;

/// A data directory about to be opened, with its sinks. Made by [`Tollgate::builder`].
#[must_use = "nothing is opened until `open` is called"]
pub struct Builder {
    dir: PathBuf,
    config: Config,
    sinks: Vec<NamedSink>,
}

impl Builder {
    pub(crate) fn new(dir: &Path) -> Self {
        Self { dir: dir.to_path_buf(), config: Config::default(), sinks: Vec::new() }
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

    /// Opens the directory, see [`Tollgate::open`].
    ///
    /// # Errors
    ///
    /// Those of [`Tollgate::open`]. [`Error::InvalidConfig`] for a sink's name that is not allowed
    /// or used twice, [`Error::TooMany`] sinks. A sink that can't be reached is not an error:
    /// [`Tollgate::health`] says so.
    pub fn open(self) -> Result<Tollgate> {
        let Self { dir, config, sinks } = self;
        Ok(Tollgate::of(Owner::open(&dir, config, sinks)?))
    }
}

impl fmt::Debug for Builder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let sinks: Vec<_> = self.sinks.iter().map(|(name, _)| name).collect();
        f.debug_struct("Builder")
            .field("dir", &self.dir)
            .field("config", &self.config)
            .field("sinks", &sinks)
            .finish()
    }
}
