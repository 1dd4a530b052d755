//! `cyrene train`: a recipe to a trained model, with progress, Ctrl-C that saves, and the same command to go on.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use corpus::account::{self, SourceAccount};
use eval::TrainedRows;
use kernel::Device;
use model::Model;
use text::Persona;
use train::launch::{self, Launch};
use train::metrics::{AlertLine, ValidationLine};
use train::ranks::{Limits, Ranks};
use train::schedule;
use train::validate::ALL;
use train::{Job, Progress, RunLock, SetAside, Silent, Start, StepReport, Summary};

use crate::cli::Train as Args;
use crate::recipe::Recipe;
use crate::recipe_inputs::{self, Inputs};
use crate::ui::{Bar, Ui, misused, of_eval, size};
use crate::{env, interrupt, load};

/// Runs the command; the error is a [`crate::ui::Misuse`] where the arguments are at fault.
pub fn run(args: &Args, ui: &Ui) -> Result<()> {
    let mut recipe = Recipe::load(&args.recipe, &args.set)?;
    if let Some(character) = &args.character {
        // Beside the recipe's other paths, which are relative to it.
        let path = std::path::absolute(character)
            .with_context(|| format!("finding {}", character.display()))?;
        recipe.character = Some(path);
    }
    recipe_inputs::check(&recipe)?;
    let out = args
        .out
        .clone()
        .unwrap_or_else(|| Path::new("runs").join(run_name(&args.recipe)));
    let folder = args.recipe.parent().unwrap_or(Path::new(""));
    let (ranks, device) = match misused(launch::from_env(&env::get))? {
        None => {
            let device = load::device_within(&args.device.device, &args.memory)?;
            (Ranks::alone(), device)
        }
        Some(launch) => join(&launch, args, &recipe, ui)?,
    };
    let options = RunOptions {
        device,
        ranks: &ranks,
        rows_at_once: args.rows_at_once.map(|rows| rows as usize),
        force: args.force,
    };
    let trained = train(&recipe, folder, &out, &options, ui);
    match &trained {
        Err(error) if !is_of_all_ranks(error) => ranks.fail(&format!("{error:#}")),
        _ => ranks.leave(),
    }
    let trained = trained?;
    match ranks.is_first() {
        true => ui.result(&trained, || describe(&trained.summary)),
        false => Ok(()),
    }
}

/// Name of a recipe's run where none is given: the recipe's, or for one that a run saved in its folder, the folder's and `-again`.
fn run_name(recipe: &Path) -> String {
    let text = |name: &std::ffi::OsStr| name.to_string_lossy().into_owned();
    let folder = || recipe.parent()?.file_name().map(text);
    match recipe.file_stem().map(text) {
        Some(stem) if stem == "recipe" => folder().map_or(stem, |folder| format!("{folder}-again")),
        stem => stem.unwrap_or_else(|| "run".to_owned()),
    }
}

/// Connects to the processes that the launcher started beside this one.
fn join(launch: &Launch, args: &Args, recipe: &Recipe, ui: &Ui) -> Result<(Ranks, Device)> {
    interrupt::expect_echo();
    let name = launch.device(&args.device.device, kernel::cuda::device_count());
    let device = load::device_within(&name, &args.memory)?;
    let limits = Limits {
        rendezvous: Duration::from_secs(args.wait_for_ranks),
        ..Limits::default()
    };
    let recipe_hash = files::sha256(recipe.resolved()?.as_bytes());
    let run = format!(
        "recipe {} with cyrene {}",
        &recipe_hash[..12],
        env!("CARGO_PKG_VERSION")
    );
    let ranks = Ranks::join(&launch.place(run), limits, device)?;
    if ranks.is_first() {
        ui.note(ranks_joined(ranks.n_ranks(), device));
    }
    Ok((ranks, device))
}

/// Who is there, and how they speak to each other.
fn ranks_joined(n_ranks: usize, device: Device) -> String {
    let by = match device {
        Device::Cpu => "over TCP".to_owned(),
        Device::Cuda(_) => kernel::cuda::nccl::version()
            .map_or("over NCCL".to_owned(), |version| {
                format!("over NCCL {version}")
            }),
    };
    let plural = if n_ranks == 1 { "" } else { "s" };
    format!("{n_ranks} rank{plural} {by}")
}

/// How several ranks share a whole step, and what that leaves idle.
fn micro_batches_of_ranks(micro_batches: usize, n_ranks: usize) -> String {
    let most = micro_batches.div_ceil(n_ranks);
    let uneven = match micro_batches % n_ranks {
        0 => String::new(),
        busy => format!(
            ": the first {busy} compute {most}, the others wait; a batch.accumulate that makes them a multiple of {n_ranks} would keep all busy"
        ),
    };
    format!(
        "{n_ranks} ranks share the {micro_batches} micro-batches of a step, {most} at most each{uneven}"
    )
}

/// Whether the other ranks have the same error, and need not be told.
fn is_of_all_ranks(error: &anyhow::Error) -> bool {
    let error = error.downcast_ref::<train::Error>();
    error.is_some_and(train::Error::is_of_all_ranks)
}

/// What a finished run has to say, as `--json` prints it.
#[derive(Debug, serde::Serialize)]
pub struct Trained {
    /// Steps, losses, where the result lies.
    #[serde(flatten)]
    pub summary: Summary,
    /// Where every token of the sources is; None if one of them was not built by `corpus build`.
    pub sources: Option<SourceAccount>,
}

/// Name of the file in the run's folder that holds [`Trained::sources`].
const ACCOUNT: &str = "account.json";

/// What a run is done with, beside the recipe.
pub struct RunOptions<'a> {
    /// What computes.
    pub device: Device,
    /// This process among those that train together.
    pub ranks: &'a Ranks,
    /// See [`Job::rows_at_once`].
    pub rows_at_once: Option<usize>,
    /// Go on from a checkpoint of another recipe or other data.
    pub force: bool,
}

/// Runs `recipe`, whose paths are relative to `folder`, into `out`; rank 0 alone writes there and says something.
///
/// # Errors
/// A recipe that cannot be done (exit code 2), or whatever training reports.
pub fn train(
    recipe: &Recipe,
    folder: &Path,
    out: &Path,
    options: &RunOptions,
    ui: &Ui,
) -> Result<Trained> {
    let RunOptions { device, ranks, .. } = *options;
    // 1. who shall speak, and the data, in ids
    let base = recipe_inputs::base_folder(&recipe.base, folder)?;
    let character = recipe.character.as_ref().map(|path| folder.join(path));
    let persona = load::persona(&base, None, character.as_deref())?;
    let inputs = Inputs::open(recipe, folder, base)?;
    if ranks.is_first() {
        let notes = inputs.examples.notes.lines();
        notes.iter().for_each(|line| ui.note(line));
    }
    let account = recipe.mixture(folder).account(inputs.split.as_ref())?;
    if let (Some(account), true) = (&account, ranks.is_first()) {
        for line in account::table(&account.tokens).lines() {
            ui.note(format_args!("      {line}"));
        }
    }

    // 2. the job
    let resolved = recipe.resolved()?;
    // Held to the end: two processes in one folder would tear its checkpoints.
    let _lock = match ranks.is_first() {
        true => {
            std::fs::create_dir_all(out).with_context(|| format!("making {}", out.display()))?;
            Some(misused(RunLock::take(out))?)
        }
        false => None,
    };
    let job = Job {
        base_sha256: Some(recipe_inputs::sha256_of_model(&inputs.base)?),
        out_dir: out.to_owned(),
        origin: serde_json::json!({
            "recipe_sha256": files::sha256(resolved.as_bytes()),
            "version": env!("CARGO_PKG_VERSION"),
            "device": device.to_string(),
        }),
        rows_at_once: options.rows_at_once,
        force: options.force,
        stop: interrupt::flag(),
        ..recipe_inputs::job(recipe, inputs.examples, inputs.tokenizer)
    };
    let base = inputs.base;
    let model = Model::load(&base, recipe.dtype.dtype())
        .with_context(|| format!("loading {}", base.display()))?
        .to_device(device)?;

    // 3. train, then put beside the weights what belongs to them
    if !ranks.is_first() {
        let (_, summary) = train::run_among(model, &job, ranks, &mut Silent)?;
        return Ok(Trained {
            summary,
            sources: account,
        });
    }
    let saved = recipe.moved(folder, out)?.resolved()?;
    let mut drawing = Drawing {
        ui: *ui,
        recipe,
        bar: None,
        account,
        account_path: out.join(ACCOUNT),
        account_written: Ok(()),
    };
    let (_, summary) = train::run_among(model, &job, ranks, &mut drawing)?;
    drawing.account_written?;
    if let Some(bar) = drawing.bar {
        bar.finish();
    }
    files::write(&out.join("recipe.toml"), saved.as_bytes())?;
    let mut rows = of_eval(TrainedRows::read(&base))?.unwrap_or_default();
    rows.row_tokens = Some(recipe.data.row_tokens);
    if recipe.stage == corpus::examples::TrainingStage::Sft {
        rows.loss_scale = recipe.data.loss_scale;
    }
    for (document, _) in job
        .train
        .iter()
        .zip(&summary.is_trained)
        .filter(|(_, is_trained)| **is_trained)
    {
        rows.insert(&document.input_ids);
    }
    load::copy_companions(&base, &summary.result, Some(&rows))?;
    if persona != Persona::default() {
        persona.write(&summary.result)?;
    }
    Ok(Trained {
        summary,
        sources: drawing.account,
    })
}

/// Draws a run on stderr.
struct Drawing<'a> {
    ui: Ui,
    recipe: &'a Recipe,
    bar: Option<Bar>,
    account: Option<SourceAccount>,
    account_path: PathBuf,
    account_written: Result<()>,
}

impl Drawing<'_> {
    /// Writes the account, or takes away that of an earlier job in the same folder.
    fn write_account(&self) -> Result<()> {
        let path = &self.account_path;
        match &self.account {
            Some(account) => Ok(files::write(path, &serde_json::to_vec_pretty(account)?)?),
            None if path.exists() => {
                std::fs::remove_file(path).with_context(|| format!("removing {}", path.display()))
            }
            None => Ok(()),
        }
    }
}

impl Progress for Drawing<'_> {
    fn started(&mut self, start: &Start) {
        // Only now: the job has passed every check, so what is said of its data holds.
        self.account_written = self.write_account();
        let account = &start.account;
        self.ui.note(format_args!(
            "{} documents, {} tokens to learn from in each pass, in {} rows; {} tokens held out; {} of {} steps to go; {} values are trained",
            account.documents,
            account.trained_labels_per_epoch,
            account.rows_per_epoch,
            account.held_out_labels,
            start.total_steps.saturating_sub(start.resumed_step),
            start.total_steps,
            start.trainable,
        ));
        if let Some(memory) = &start.memory {
            let peak = size(memory.peak_bytes() as u64);
            self.ui
                .note(format_args!("{}; {peak} at most", memory.describe()));
        }
        if start.n_ranks > 1 {
            self.ui
                .note(micro_batches_of_ranks(start.micro_batches, start.n_ranks));
        }
        if let Some(sources) = &self.account {
            let epochs = account.tokens as f64 / account.tokens_per_epoch.max(1) as f64;
            for line in account::passes(&sources.passes, epochs).lines() {
                self.ui.note(line);
            }
        }
        let Recipe {
            optimizer,
            batch,
            run,
            ..
        } = self.recipe;
        for warning in schedule::warnings(optimizer, batch, run, start.total_steps) {
            self.ui.note(warning);
        }
        if start.resumed_step > 0 {
            self.ui
                .note(format_args!("going on from step {}", start.resumed_step));
        }
        if let Some(cut) = account.describe_cuts(start.row_tokens) {
            self.ui.note(cut);
        }
        if account.documents_without_label > 0 {
            self.ui.note(format_args!(
                "{} documents have nothing to learn from (no token carries loss) and were left out",
                account.documents_without_label
            ));
        }
        self.bar = Some(self.ui.bar("train", start.total_steps));
    }

    fn step(&mut self, report: &StepReport) {
        let line = &report.line;
        if let Some(bar) = &mut self.bar {
            let message = format!(
                "loss {:.3} · lr {:.1e} · {:.0} tok/s",
                line.loss, line.lr, line.tokens_per_s
            );
            bar.set_with_eta(
                line.step,
                &message,
                Duration::from_secs_f64(report.eta_s.max(0.0)),
            );
        }
    }

    fn validation(&mut self, lines: &[ValidationLine]) {
        if let Some(all) = lines.first() {
            let gap = all.gap.map_or(String::new(), |gap| {
                format!(", {:+.1} % against text it was trained on", 100.0 * gap)
            });
            let bits = all.bits_per_byte.map_or(String::new(), bits);
            self.ui.note(format_args!(
                "step {}: loss on held-out text {:.4}{bits}{gap}{}",
                all.step,
                all.loss,
                others(lines)
            ));
        }
    }

    fn set_aside(&mut self, damaged: &SetAside) {
        self.ui.note(format_args!(
            "warning: the checkpoint of step {} is damaged ({}) and lies in {} now; an older one is gone on from",
            damaged.step,
            damaged.problem,
            damaged.folder.display()
        ));
    }

    fn alert(&mut self, alert: &AlertLine) {
        self.ui.note(format_args!(
            "{}: {}",
            alert.level.to_uppercase(),
            alert.text
        ));
    }

    fn checkpoint(&mut self, folder: &Path) {
        tracing::debug!(folder = %folder.display(), "checkpoint");
    }
}

/// The other sides' losses over all languages.
fn others(lines: &[ValidationLine]) -> String {
    let first = lines.first().map(|line| line.split.as_str());
    lines
        .iter()
        .filter(|line| line.language == ALL && Some(line.split.as_str()) != first)
        .map(|line| {
            let bits = line.bits_per_byte.map_or(String::new(), bits);
            let what = match line.split.as_str() {
                "val-strict" => "whole missions held out (val-strict)",
                "probe-x" => "scenes held out in one language (probe-x)",
                other => other,
            };
            format!("; {what} {:.4}{bits}", line.loss)
        })
        .collect()
}

/// The loss in the measure that does not depend on the tokenizer.
fn bits(bits: f64) -> String {
    format!(" ({bits:.3} bits for each byte of text)")
}

fn describe(summary: &Summary) -> String {
    let loss = summary.train.as_ref().map_or(f64::NAN, |line| line.loss);
    let held_out = summary
        .validation
        .first()
        .map_or(String::new(), |line| format!(", held-out {:.4}", line.loss));
    format!(
        "{} steps in {}, last loss {loss:.4}{held_out}: {}",
        summary.steps,
        crate::ui::clock_of(summary.seconds),
        summary.result.display()
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_saved_recipe_gives_its_run_a_name_of_its_own() {
        for (recipe, name) in [
            ("recipes/cpt.toml", "cpt"),
            ("runs/bo/recipe.toml", "bo-again"),
            ("recipe.toml", "recipe"),
        ] {
            assert_eq!(run_name(Path::new(recipe)), name);
        }
    }

    #[test]
    fn what_is_said_of_idle_ranks_follows_from_the_real_micro_batches() {
        for (micro_batches, n_ranks, expect) in [
            (8, 4, "2 at most each"),
            (
                6,
                4,
                "2 at most each: the first 2 compute 2, the others wait;",
            ),
            (
                4,
                3,
                "2 at most each: the first 1 compute 2, the others wait;",
            ),
        ] {
            let said = micro_batches_of_ranks(micro_batches, n_ranks);
            assert!(said.contains(expect), "{said}");
            assert!(said.contains(&format!("the {micro_batches} micro-batches")));
        }
    }
}
