//! One file a command; each is `run(args, ui)`.

pub mod bench;
pub mod chat;
pub mod corpus;
pub mod doctor;
pub mod eval;
pub mod export;
pub mod fetch;
pub mod generate;
pub mod live;
pub mod merge;
pub mod recipe;
pub mod score;
pub mod selftest;
pub mod serve;
pub mod train;

use anyhow::Result;

use crate::cli::Command;
use crate::ui::Ui;

/// Runs what was asked for.
///
/// # Errors
/// Whatever the command reports; [`crate::ui::Misuse`] becomes exit code 2, everything else 1.
pub fn run(command: Command, ui: &Ui) -> Result<()> {
    match command {
        Command::Live(args) => live::run(&args, ui),
        Command::Doctor(args) => doctor::run(&args, ui),
        Command::Fetch(args) => fetch::run(&args, ui),
        Command::Corpus(args) => corpus::run(args, ui),
        Command::Train(args) => train::run(&args, ui),
        Command::Score(args) => score::run(&args, ui),
        Command::Generate(args) => generate::run(&args, ui),
        Command::Eval(args) => eval::run(&args, ui),
        Command::Merge(args) => merge::run(&args, ui),
        Command::Export(args) => export::run(&args, ui),
        Command::Serve(args) => serve::run(&args, ui),
        Command::Chat(args) => chat::run(&args, ui),
        Command::Recipe(args) => recipe::run(&args, ui),
        Command::Bench(args) => bench::run(args, ui),
        Command::Selftest(args) => selftest::run(&args, ui),
    }
}
