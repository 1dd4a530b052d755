//! `cyrene bench`: what this machine reaches, with random weights and the bundled story, so that nothing is downloaded; and what
//! storing weights as bf16 costs a recipe.

mod corpus;
mod decode;
mod ops;
mod prefill;
mod rounding;
mod speaker;
mod table;
mod train;

use anyhow::Result;
use kernel::{DType, Device};
use model::{Config, sizes};

use crate::cli::{Bench, DTypeArg};
use crate::misuse;
use crate::ui::Ui;

/// Runs the command; the error is a [`crate::ui::Misuse`] where the arguments are at fault.
pub fn run(command: Bench, ui: &Ui) -> Result<()> {
    match command {
        Bench::Train(args) => train::run(&args, ui),
        Bench::Ops(args) => ops::run(&args, ui),
        Bench::Decode(args) => decode::run(&args, ui),
        Bench::Prefill(args) => prefill::run(&args, ui),
        Bench::Table(args) => table::run(&args, ui),
        Bench::Corpus(args) => corpus::run(args, ui),
        Bench::Rounding(args) => rounding::run(&args, ui),
    }
}

/// The shapes of a size.
///
/// # Errors
/// Misuse, with the sizes that there are.
fn shapes(size: &str) -> Result<Config> {
    match sizes::config(size) {
        Some(json) => Ok(Config::from_json(&json)?),
        None => misuse!("no size `{size}`; there are {}", sizes::names()),
    }
}

/// How weights and activations are stored where nothing was asked for: as is fast on the device.
fn storage(asked: Option<DTypeArg>, device: Device) -> DType {
    match (asked, device) {
        (Some(DTypeArg::F32), _) | (None, Device::Cpu) => DType::F32,
        (Some(DTypeArg::Bf16), _) | (None, Device::Cuda(_)) => DType::Bf16,
    }
}

/// For people, with the instructions that a CPU's arithmetic has chosen.
fn device_name(device: Device) -> String {
    match device {
        Device::Cpu => format!("CPU ({})", kernel::cpu_vectors()),
        Device::Cuda(card) => card.name().to_owned(),
    }
}
