//! Where the time of a build goes, by stage; added up over threads.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Seconds of all threads by stage.
#[derive(Debug, Clone, Copy, Default)]
pub struct Times {
    /// Reading the tables of a tree, or a story.
    pub tables: Duration,
    /// Reading the text maps of a tree.
    pub maps: Duration,
    /// Making rows: look-ups, rules, counting tokens, writing.
    pub rows: Duration,
    /// The part of `rows` that writing took.
    pub write: Duration,
    /// Writing token counts and manifest, and naming the files.
    pub publish: Duration,
}

/// Takes the times of stages that run on many threads.
#[derive(Default)]
pub(crate) struct Stopwatch(Mutex<Times>);

impl Stopwatch {
    pub fn tables<R>(&self, work: impl FnOnce() -> R) -> R {
        self.add(work, |times| &mut times.tables)
    }

    pub fn maps<R>(&self, work: impl FnOnce() -> R) -> R {
        self.add(work, |times| &mut times.maps)
    }

    pub fn rows<R>(&self, work: impl FnOnce() -> R) -> R {
        self.add(work, |times| &mut times.rows)
    }

    pub fn total(self) -> Times {
        self.0.into_inner().unwrap_or_else(PoisonError::into_inner)
    }

    fn add<R>(&self, work: impl FnOnce() -> R, stage: fn(&mut Times) -> &mut Duration) -> R {
        let start = Instant::now();
        let result = work();
        let mut times = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        *stage(&mut times) += start.elapsed();
        result
    }
}
