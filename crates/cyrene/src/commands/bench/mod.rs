//! `cyrene bench`: what this machine reaches, with random weights and the bundled story, so that nothing is downloaded; and what
//! storing weights as bf16 costs a recipe.

mod ceiling;
mod corpus;
mod ops;
mod peak;
mod rounding;
mod table;
mod train;

use anyhow::Result;

use crate::cli::Bench;
use crate::ui::Ui;

pub fn run(command: Bench, ui: &Ui) -> Result<()> {
    match command {
        Bench::Train(args) => train::run(&args, ui),
        Bench::Ops(args) => ops::run(&args, ui),
        Bench::Table(args) => table::run(&args, ui),
        Bench::Corpus(args) => corpus::run(args, ui),
        Bench::Rounding(args) => rounding::run(&args, ui),
    }
}
