//! `cyrene corpus ...`: one file a subcommand.

pub mod build;
pub mod encode;
mod export;
mod import;
mod peek;
pub mod split;
mod stats;

use anyhow::Result;

use crate::cli::Corpus;
use crate::ui::Ui;

/// Runs the command; the error is a [`crate::ui::Misuse`] where the arguments are at fault.
pub fn run(command: Corpus, ui: &Ui) -> Result<()> {
    match command {
        Corpus::Build(args) => build::run(&args, ui),
        Corpus::Import(args) => import::run(&args, ui),
        Corpus::Split(args) => split::run(&args, ui),
        Corpus::Stats(args) => stats::run(&args, ui),
        Corpus::Peek(args) => peek::run(&args, ui),
        Corpus::Encode(args) => encode::run(&args, ui),
        Corpus::Export(args) => export::run(&args, ui),
    }
}
