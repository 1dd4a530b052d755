//! Bytes of a GPU's memory in use, the most there were, and how many may be.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Pages that the driver maps; a buffer of half a page or more has its own.
const PAGE: usize = 2 << 20;
/// Beginnings of smaller buffers, which share pages.
const SMALL: usize = 512;

/// Bytes of GPU memory behind a buffer of `bytes`.
pub fn footprint(bytes: usize) -> usize {
    let unit = if bytes >= PAGE / 2 { PAGE } else { SMALL };
    bytes.next_multiple_of(unit)
}

#[derive(Debug, Default)]
pub(super) struct Meter(Mutex<Levels>);

#[derive(Debug, Default)]
struct Levels {
    bytes: usize,
    peak_bytes: usize,
    limit: Option<usize>,
}

impl Meter {
    /// Books a buffer.
    ///
    /// # Errors
    /// Bytes in use and the limit, where it would go beyond.
    pub fn take(&self, bytes: usize) -> Result<(), (usize, usize)> {
        let mut levels = self.get();
        let bytes = levels.bytes + footprint(bytes);
        if let Some(limit) = levels.limit
            && bytes > limit
        {
            return Err((levels.bytes, limit));
        }
        levels.bytes = bytes;
        levels.peak_bytes = levels.peak_bytes.max(bytes);
        Ok(())
    }

    pub fn give_back(&self, bytes: usize) {
        self.get().bytes -= footprint(bytes);
    }

    /// Now, and at most.
    pub fn levels(&self) -> (usize, usize) {
        let levels = self.get();
        (levels.bytes, levels.peak_bytes)
    }

    pub fn reset_peak(&self) {
        let mut levels = self.get();
        levels.peak_bytes = levels.bytes;
    }

    pub fn limit(&self) -> Option<usize> {
        self.get().limit
    }

    pub fn set_limit(&self, bytes: usize) {
        self.get().limit = Some(bytes);
    }

    /// Bytes below the limit, if there is one.
    pub fn left(&self) -> Option<usize> {
        let levels = self.get();
        levels.limit.map(|limit| limit.saturating_sub(levels.bytes))
    }

    fn get(&self) -> MutexGuard<'_, Levels> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn large_buffers_take_whole_pages() {
        for (bytes, want) in [(0, 0), (1, 512), (PAGE / 2 - 1, PAGE / 2), (PAGE / 2, PAGE)] {
            assert_eq!(footprint(bytes), want, "{bytes}");
        }
        assert_eq!(footprint(5 * PAGE + 1), 6 * PAGE);
    }

    #[test]
    fn nothing_is_booked_beyond_the_limit() {
        let meter = Meter::default();
        assert_eq!(meter.take(3 * PAGE), Ok(()));
        meter.set_limit(4 * PAGE);
        assert_eq!(meter.take(PAGE + 1), Err((3 * PAGE, 4 * PAGE)));
        assert_eq!(meter.left(), Some(PAGE));
        assert_eq!(meter.take(PAGE), Ok(()));
        meter.give_back(3 * PAGE);
        assert_eq!(meter.levels(), (PAGE, 4 * PAGE));
        meter.reset_peak();
        assert_eq!(meter.levels(), (PAGE, PAGE));
    }
}
