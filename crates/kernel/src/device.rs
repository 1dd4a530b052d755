//! Where tensors live and ops run.

use std::cell::RefCell;
use std::fmt;
use std::str::FromStr;
use std::sync::{Mutex, MutexGuard, PoisonError};

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

static TESTED: Mutex<()> = Mutex::new(());

thread_local! {
    static TESTING: RefCell<Option<MutexGuard<'static, ()>>> = const { RefCell::new(None) };
}

impl Device {
    /// Where tests compute: the CPU, or what `CYRENE_TEST_DEVICE` names. One thread at a time may call the ops of a GPU, so a test's
    /// thread has it until it ends, and others wait.
    ///
    /// # Panics
    /// If the variable names no device that is there.
    #[doc(hidden)]
    pub fn for_tests() -> Device {
        let name = std::env::var("CYRENE_TEST_DEVICE").unwrap_or_else(|_| "cpu".to_owned());
        let device = match name.parse() {
            Ok(device) => device,
            Err(error) => panic!("CYRENE_TEST_DEVICE: {error}"),
        };
        if device != Device::Cpu {
            TESTING.with_borrow_mut(|mine| {
                mine.get_or_insert_with(|| TESTED.lock().unwrap_or_else(PoisonError::into_inner));
            });
        }
        device
    }

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
