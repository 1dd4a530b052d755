//! How often, and after what pause, something is tried again.

use std::time::Duration;

use crate::error::{Error, Result};

/// Tries after the first.
const RETRIES: u32 = 3;
/// Before the second try; doubled before each further one.
const FIRST_PAUSE: Duration = Duration::from_millis(500);

/// Tries that are left.
#[derive(Debug)]
pub(crate) struct Patience {
    left: u32,
    pause: Duration,
}

impl Patience {
    pub fn new() -> Patience {
        Patience {
            left: RETRIES,
            pause: FIRST_PAUSE,
        }
    }

    /// Waits, where another try may help and one is left.
    ///
    /// # Errors
    /// The one that was given, where not.
    pub fn bear(&mut self, error: Error) -> Result<()> {
        if !error.is_passing() || self.left == 0 {
            return Err(error);
        }
        std::thread::sleep(self.pause);
        self.left -= 1;
        self.pause *= 2;
        Ok(())
    }
}
