//! Where tensors live and ops run.

use std::fmt;
use std::str::FromStr;

use crate::cuda::{self, Cuda};
use crate::{Error, Result};

/// A device that can hold tensors.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Device {
    /// The host: rayon over all cores, f32 sums.
    #[default]
    Cpu,
    /// An NVIDIA GPU, opened.
    Cuda(Cuda),
}

impl Device {
    /// Waits for queued work; nothing to do on a CPU.
    ///
    /// # Errors
    /// [`Error::Cuda`] if any of it failed.
    pub fn synchronize(self) -> Result<()> {
        match self {
            Device::Cpu => Ok(()),
            Device::Cuda(cuda) => cuda.synchronize(),
        }
    }
}

impl FromStr for Device {
    type Err = Error;

    /// Reads `auto` (the first GPU, else the CPU), `cpu` or `cuda[:N]`, and opens the GPU.
    ///
    /// # Errors
    /// [`Error::NoDevice`] for a GPU that is not there and for an unknown name; [`Error::Cuda`] for one that cannot be opened.
    fn from_str(text: &str) -> Result<Self> {
        let unknown = || Error::NoDevice {
            asked: text.to_owned(),
        };
        match text {
            "cpu" => Ok(Device::Cpu),
            "auto" if cuda::device_count() == 0 => Ok(Device::Cpu),
            "auto" | "cuda" => Ok(Device::Cuda(Cuda::open(0)?)),
            other => {
                let ordinal = other.strip_prefix("cuda:").ok_or_else(unknown)?;
                let ordinal = ordinal.parse().map_err(|_| unknown())?;
                Ok(Device::Cuda(Cuda::open(ordinal)?))
            }
        }
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Device::Cpu => f.write_str("cpu"),
            Device::Cuda(cuda) => write!(f, "cuda:{} ({})", cuda.ordinal(), cuda.name()),
        }
    }
}
