//! What stands between this machine and a GPU, for whoever asks why it computes on the CPU.

use std::fmt;

use cudarc::driver::{result, sys};
use cudarc::{cublaslt, nvrtc};

/// The first thing that is missing to compute on a GPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Missing {
    /// No NVIDIA driver.
    Driver,
    /// A driver that does not start.
    Answer,
    /// A driver that shows no GPU.
    Gpu,
    /// The library that compiles the kernels.
    Nvrtc,
    /// The library of matrix products.
    CublasLt,
}

/// What is missing, in the order in which it is needed; None where driver, GPU and libraries are there. Opens nothing: that the GPU is too
/// old, [`super::Cuda::open`] says.
pub fn missing() -> Option<Missing> {
    // SAFETY: each probes for a library by name; nothing else runs.
    let [has_driver, has_nvrtc, has_blas] = unsafe {
        [
            sys::is_culib_present(),
            nvrtc::sys::is_culib_present(),
            cublaslt::sys::is_culib_present(),
        ]
    };
    if !has_driver {
        return Some(Missing::Driver);
    }
    if result::init().is_err() {
        return Some(Missing::Answer);
    }
    match super::device_count() {
        0 => Some(Missing::Gpu),
        _ if !has_nvrtc => Some(Missing::Nvrtc),
        _ if !has_blas => Some(Missing::CublasLt),
        _ => None,
    }
}

impl fmt::Display for Missing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let path = match cfg!(windows) {
            true => "PATH",
            false => "LD_LIBRARY_PATH",
        };
        match self {
            Missing::Driver => f.write_str(
                "no NVIDIA driver is installed; only NVIDIA GPUs can be used (RTX 30 series, A100 or newer). With such a card, install its driver (Ubuntu: `sudo ubuntu-drivers install`; else nvidia.com/drivers); a container needs `--gpus all`",
            ),
            Missing::Answer => f.write_str(
                "the NVIDIA driver is installed but does not start; `nvidia-smi` says why, and after an update of the driver a restart helps",
            ),
            Missing::Gpu => f.write_str(
                "the NVIDIA driver shows no GPU; `nvidia-smi` lists those that it sees, and CUDA_VISIBLE_DEVICES may hide them",
            ),
            Missing::Nvrtc => write!(
                f,
                "the driver is there, but not the library NVRTC, which compiles the kernels; `python3 -m pip install nvidia-cuda-nvrtc` brings it (`pip show -f nvidia-cuda-nvrtc` lists its folder, which belongs on {path}), or a CUDA toolkit"
            ),
            Missing::CublasLt => write!(
                f,
                "the driver is there, but not the library cuBLASLt; `python3 -m pip install nvidia-cublas` brings it (`pip show -f nvidia-cublas` lists its folder, which belongs on {path}), or a CUDA toolkit"
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gpu_that_is_shown_is_not_called_missing() {
        let without_gpu = matches!(
            missing(),
            Some(Missing::Driver | Missing::Answer | Missing::Gpu)
        );
        assert_eq!(without_gpu, super::super::device_count() == 0);
    }

    #[test]
    fn each_says_what_brings_it() {
        for (missing, command) in [
            (Missing::Driver, "ubuntu-drivers install"),
            (Missing::Answer, "nvidia-smi"),
            (Missing::Gpu, "CUDA_VISIBLE_DEVICES"),
            (Missing::Nvrtc, "pip install nvidia-cuda-nvrtc"),
            (Missing::CublasLt, "pip install nvidia-cublas"),
        ] {
            let said = missing.to_string();
            assert!(said.contains(command), "{said}");
        }
    }
}
