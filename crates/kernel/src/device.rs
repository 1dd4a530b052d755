//! Where tensors live and ops run.

use std::fmt;
use std::str::FromStr;

use crate::{Error, Result};

/// A device that can hold tensors.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Device {
    /// The host: rayon over all cores, f32 sums.
    #[default]
    Cpu,
}

impl FromStr for Device {
    type Err = Error;

    /// Reads `auto`, `cpu` or `cuda[:N]`.
    ///
    /// # Errors
    /// [`Error::NoDevice`] for `cuda`, which this build does not drive, and for an unknown name.
    fn from_str(text: &str) -> Result<Self> {
        match text {
            "auto" | "cpu" => Ok(Device::Cpu),
            other => Err(Error::NoDevice {
                asked: other.to_owned(),
            }),
        }
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Device::Cpu => f.write_str("cpu"),
        }
    }
}
