//! What a run writes down as it goes: `metrics.jsonl` and TensorBoard's events. Rank 0 writes for all; on the others nothing is written.

use std::path::Path;

use serde::Serialize;

use crate::error::Result;
use crate::metrics::MetricsFile;
use crate::tensorboard::{EventFile, Position};

/// The two files; None on a rank that does not write.
#[derive(Debug)]
pub(crate) struct Record(Option<(MetricsFile, EventFile)>);

impl Record {
    /// Starts both files anew, removes events of an earlier run, and says where the new ones are.
    ///
    /// # Errors
    /// The folder refuses.
    pub(crate) fn start(out_dir: &Path) -> Result<(Self, Position)> {
        EventFile::remove_all(out_dir)?;
        let metrics = MetricsFile::open(&out_dir.join("metrics.jsonl"), 0)?;
        let events = EventFile::create(out_dir)?;
        let position = events.position();
        Ok((Record(Some((metrics, events))), position))
    }

    /// Goes on where a checkpoint was written: later lines are cut off and will be written again.
    ///
    /// # Errors
    /// The folder refuses.
    pub(crate) fn resume(out_dir: &Path, metrics_bytes: u64, events: &Position) -> Result<Self> {
        let metrics = MetricsFile::open(&out_dir.join("metrics.jsonl"), metrics_bytes)?;
        Ok(Record(Some((metrics, EventFile::resume(out_dir, events)?))))
    }

    /// Writes nothing.
    pub(crate) fn none() -> Self {
        Record(None)
    }

    /// Appends a line to `metrics.jsonl`.
    ///
    /// # Errors
    /// The file cannot be written.
    pub(crate) fn line(&mut self, line: &impl Serialize) -> Result<()> {
        match &mut self.0 {
            Some((metrics, _)) => metrics.line(line),
            None => Ok(()),
        }
    }

    /// Adds values to the events.
    ///
    /// # Errors
    /// The file cannot be written.
    pub(crate) fn scalars(&mut self, step: u64, values: &[(&str, f64)]) -> Result<()> {
        match &mut self.0 {
            Some((_, events)) => events.scalars(step, values),
            None => Ok(()),
        }
    }

    /// Waits until all is on the disk, and says where both files end; None on a rank that does not write.
    ///
    /// # Errors
    /// The disk refuses.
    pub(crate) fn sync(&self) -> Result<Option<(u64, Position)>> {
        let Some((metrics, events)) = &self.0 else {
            return Ok(None);
        };
        metrics.sync()?;
        events.sync()?;
        Ok(Some((metrics.bytes(), events.position())))
    }
}
