//! A build whose rows are counted by tokenizers, which may still be on their way when the source is read.

use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use text::{Tokenizer, WordPattern};

use crate::build::stage;
use crate::error::{Error, Result};
use crate::request::{BuildRequest, Progress};
use crate::rules::{Counters, TrainingCounts, TrainingRow};
use crate::staged::BuildReport;

/// What counts: training's tokenizer, and with another pattern of words the one that the rules count with.
pub struct Tokenizers {
    training: Tokenizer,
    rules: Option<Tokenizer>,
}

impl Tokenizers {
    /// Loads Qwen3.5's tokenizer; the rules count with its vocabulary and words of `pattern`.
    ///
    /// # Errors
    /// As [`Tokenizer::load`].
    pub fn load(path: &Path, pattern: WordPattern) -> text::Result<Tokenizers> {
        let training = Tokenizer::load(path)?;
        let rules = match pattern {
            WordPattern::Qwen3_5 => None,
            pattern => Some(training.clone().with_pattern(pattern)),
        };
        Ok(Tokenizers { training, rules })
    }

    /// What the rules cut and drop by.
    fn rules(&self) -> &Tokenizer {
        self.rules.as_ref().unwrap_or(&self.training)
    }
}

/// Builds; `load` is called while the source is read.
///
/// # Errors
/// As [`crate::build()`], what `load` reports, and a text that cannot be counted. Then no data set is left or changed.
pub fn build_counting(
    request: &BuildRequest<'_>,
    load: impl FnOnce() -> text::Result<Tokenizers> + Send,
    progress: &(dyn Fn(Progress) + Sync),
) -> Result<BuildReport> {
    let tokenizers = Awaited(OnceLock::new());
    let failure = Failure::default();
    let rules = |text: &str| match tokenizers.0.wait() {
        Some(tokenizers) => failure.kept(tokenizers.rules().count(text)),
        None => 0,
    };
    let training = |row: TrainingRow<'_>| match tokenizers.0.wait() {
        Some(tokenizers) => row.counts(&tokenizers.training),
        None => Ok(TrainingCounts::default()),
    };
    let counters = Counters {
        rules: &rules,
        training: Some(&training),
    };
    let staged = std::thread::scope(|scope| {
        let loading = scope.spawn(|| tokenizers.load(load));
        let staged = stage(request, counters, progress);
        match loading.join() {
            Ok(loaded) => loaded.map_err(Error::Tokenizer)?,
            Err(panic) => std::panic::resume_unwind(panic),
        }
        staged
    })?;
    failure.into_result()?;
    staged.publish()
}

/// What counting took of a build.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Counting {
    /// Texts that the rules counted.
    pub n_texts: u64,
    /// Time in these, and in counting rows as training encodes them, added up over threads.
    pub time: Duration,
}

/// Builds with every count timed, which takes longer than [`build_counting`].
///
/// # Errors
/// As [`build_counting`].
pub fn build_timing_counts(
    request: &BuildRequest<'_>,
    tokenizers: &Tokenizers,
) -> Result<(BuildReport, Counting)> {
    let (n_texts, nanoseconds) = (AtomicU64::new(0), AtomicU64::new(0));
    let failure = Failure::default();
    let add_time_since = |start: Instant| {
        let took = start.elapsed().as_nanos() as u64;
        nanoseconds.fetch_add(took, Ordering::Relaxed);
    };
    let rules = |text: &str| {
        n_texts.fetch_add(1, Ordering::Relaxed);
        let start = Instant::now();
        let counted = tokenizers.rules().count(text);
        add_time_since(start);
        failure.kept(counted)
    };
    let training = |row: TrainingRow<'_>| {
        let start = Instant::now();
        let counted = row.counts(&tokenizers.training);
        add_time_since(start);
        counted
    };
    let counters = Counters {
        rules: &rules,
        training: Some(&training),
    };
    let staged = stage(request, counters, &|_| {})?;
    failure.into_result()?;
    let report = staged.publish()?;
    let counting = Counting {
        n_texts: n_texts.into_inner(),
        time: Duration::from_nanos(nanoseconds.into_inner()),
    };
    Ok((report, counting))
}

/// Counting cannot fail on valid UTF-8; should it, the first failure is kept and reported before anything gets its name.
#[derive(Default)]
struct Failure(Mutex<Option<text::Error>>);

impl Failure {
    fn kept(&self, counted: text::Result<usize>) -> usize {
        counted.unwrap_or_else(|error| {
            let mut first = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            first.get_or_insert(error);
            0
        })
    }

    fn into_result(self) -> Result<()> {
        let failure = self.0.into_inner().unwrap_or_else(PoisonError::into_inner);
        failure.map_or(Ok(()), |error| Err(Error::Counting(error)))
    }
}

/// Tokenizers on their way; `None` once it is known that they will not come.
struct Awaited(OnceLock<Option<Tokenizers>>);

impl Awaited {
    fn load(&self, load: impl FnOnce() -> text::Result<Tokenizers>) -> text::Result<()> {
        /// Nobody may wait for ever, even if loading panics.
        struct Give<'a>(&'a OnceLock<Option<Tokenizers>>, Option<Tokenizers>);
        impl Drop for Give<'_> {
            fn drop(&mut self) {
                self.0.get_or_init(|| self.1.take());
            }
        }
        let mut give = Give(&self.0, None);
        give.1 = Some(load()?);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whoever_waits_for_a_tokenizer_that_does_not_come_goes_on() {
        let awaited = Awaited(OnceLock::new());
        let failed =
            awaited.load(|| Tokenizers::load(Path::new("no/such/folder"), WordPattern::Qwen3_5));
        assert!(failed.is_err());
        assert!(awaited.0.wait().is_none());
    }

    #[test]
    fn the_first_failure_to_count_is_the_one_that_is_reported() {
        let failure = Failure::default();
        assert_eq!(failure.kept(Ok(3)), 3);
        for row_tokens in [1, 2] {
            let error = text::Error::RowTooShort {
                row_tokens,
                least: 9,
            };
            assert_eq!(failure.kept(Err(error)), 0);
        }
        let Err(Error::Counting(error)) = failure.into_result() else {
            panic!("no failure");
        };
        assert!(error.to_string().contains('1'), "{error}");
    }
}
