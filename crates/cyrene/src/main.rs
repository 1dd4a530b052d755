//! `cyrene`: from a game's story to a character that speaks. Parses the command line, runs one command, turns its outcome into an exit code.

mod cli;
mod commands;
mod corpus_request;
mod demo;
mod env;
mod interrupt;
mod key_file;
mod lines;
mod load;
mod machine;
mod recipe;
mod recipe_inputs;
mod run_plan;
mod speak;
mod stage;
mod ui;

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    let cli = cli::Cli::parse();
    let ui = ui::Ui::new(cli.json);
    ui::init_logs(cli.verbose);
    match commands::run(cli.command, &ui) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if ui::is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            ui.error(&error);
            ExitCode::from(if error.is::<ui::Misuse>() { 2 } else { 1 })
        }
    }
}
