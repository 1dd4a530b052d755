//! `cyrene corpus ...`: one file a subcommand.

pub mod build;
pub mod encode;
pub mod split;

use anyhow::Result;

use crate::cli::Corpus;
use crate::ui::{Misuse, Ui};

pub fn run(command: Corpus, ui: &Ui) -> Result<()> {
    match command {
        Corpus::Build(args) => build::run(&args, ui),
        Corpus::Split(args) => split::run(&args, ui),
        Corpus::Encode(args) => encode::run(&args, ui),
    }
}

fn as_misuse<T>(result: corpus::Result<T>) -> Result<T> {
    result.map_err(|error| anyhow::Error::new(Misuse(error.to_string())))
}
