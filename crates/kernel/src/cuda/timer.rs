//! Times a stretch of queued work by the GPU's own clock.

use cudarc::driver::{result, sys};

use super::{Cuda, check};
use crate::Result;

/// Started with [`Timer::start`]; [`Timer::stop`] waits for the work in between.
#[derive(Debug)]
pub struct Timer {
    cuda: Cuda,
    start: sys::CUevent,
    end: sys::CUevent,
}

impl Timer {
    /// # Errors
    /// [`crate::Error::Cuda`] if the GPU is gone.
    pub fn start(cuda: Cuda) -> Result<Timer> {
        cuda.bind()?;
        let create = || {
            check(
                "create event",
                result::event::create(sys::CUevent_flags::CU_EVENT_DEFAULT),
            )
        };
        let timer = Timer {
            cuda,
            start: create()?,
            end: create()?,
        };
        // SAFETY: event and stream are alive.
        check("record event", unsafe {
            result::event::record(timer.start, cuda.stream())
        })?;
        Ok(timer)
    }

    /// Milliseconds since the start, once all work queued so far is done.
    ///
    /// # Errors
    /// [`crate::Error::Cuda`] if any of the work failed.
    pub fn stop(self) -> Result<f32> {
        self.cuda.bind()?;
        // SAFETY: both events are alive until the end of this function.
        unsafe {
            check(
                "record event",
                result::event::record(self.end, self.cuda.stream()),
            )?;
            check("wait for event", result::event::synchronize(self.end))?;
            check("time", result::event::elapsed(self.start, self.end))
        }
    }
}

impl Drop for Timer {
    fn drop(&mut self) {
        // SAFETY: created in `start`, destroyed once.
        unsafe {
            let _ = result::event::destroy(self.start);
            let _ = result::event::destroy(self.end);
        }
    }
}
