//! `cyrene bench rounding`: whether weights that train as bf16 lose small updates. The same steps from the same checkpoint three times:
//! with f32 weights, with bf16 weights rounded stochastically, as training does it, and with bf16 weights rounded to the nearest.
//!
//! All start from the checkpoint rounded to bf16, see the same rows in the same order, and are scored on the same held-out rows in f32,
//! so that the scores differ by the trained weights alone. Activations are f32 beside f32 weights and bf16 beside bf16 ones, as in any
//! training: between the two bf16 cases nothing but the rounding differs.

use std::collections::BTreeSet;
use std::fmt::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use corpus::examples::SourceExample;
use corpus::split::Side;
use eval::metric::difference::{self, Difference};
use eval::metric::loss_gap::Loss;
use eval::score::{self, Score};
use eval::{Sample, sample};
use kernel::host::HostMemory;
use kernel::{DType, Device};
use model::{Config, Model};
use serde::Serialize;
use text::Tokenizer;
use train::Job;
use train::needs::{PlannedRun, Target};
use train::rounding::{self, CASES, Case, Trained, Training};

use crate::cli::BenchRounding as Args;
use crate::recipe::Recipe;
use crate::recipe_inputs::{self, Inputs};
use crate::ui::{Ui, size};
use crate::{load, misuse};

/// The comparison, as `--json` prints it.
#[derive(Debug, Serialize)]
struct Report {
    bench: &'static str,
    recipe: PathBuf,
    model: PathBuf,
    device: String,
    steps: u64,
    /// The highest learning rate.
    lr: f64,
    seed: u64,
    /// Tokens that each training processes.
    tokens: u64,
    /// Scenes that the held-out rows come from.
    scenes: usize,
    /// Held-out loss of the checkpoint, rounded to bf16.
    before: Loss,
    /// f32, bf16 stochastic, bf16 nearest.
    cases: Vec<Outcome>,
    /// Held-out loss with stochastic rounding less that with rounding to the nearest.
    stochastic_over_nearest: Difference,
}

#[derive(Debug, Serialize)]
struct Outcome {
    weights: &'static str,
    /// None where nothing is rounded.
    rounding: Option<&'static str>,
    held_out: Loss,
    /// Held-out loss less that with f32 weights.
    over_f32: Difference,
    /// Share of the weights that differ from the checkpoint's when both are rounded to bf16.
    moved: f64,
    /// Nats a trained token, mean over all steps.
    train_loss: f64,
    seconds: f64,
}

/// The largest of the three trainings keeps its weights in f32.
///
/// # Errors
/// [`crate::ui::Misuse`] where the device has no room for it.
fn refuse_too_large(recipe: &Recipe, base: &Path, device: Device) -> Result<()> {
    let config = Config::load(base)?;
    let planned = PlannedRun {
        dtype: DType::F32,
        ..recipe.planned(&config)
    };
    let target = Target::here(device, HostMemory::now().available_bytes)?;
    let plan = planned.plan("bench rounding", 0.0, target, None)?;
    if let Some(remedy) = &plan.remedy {
        let limit = plan.limit();
        misuse!(
            "training with f32 weights needs {} of {} and has {}: {remedy}",
            size(limit.needed_bytes),
            limit.what,
            size(limit.available_bytes)
        );
    }
    Ok(())
}

/// Runs the command; the error is a [`crate::ui::Misuse`] where the arguments are at fault.
pub fn run(args: &Args, ui: &Ui) -> Result<()> {
    let device = load::device_within(&args.device.device, &args.memory)?;
    // 1. rows to train on, and held-out ones
    let mut set = args.set.clone();
    set.push(format!("run.steps={}", args.steps));
    let recipe = Recipe::load(&args.recipe, &set)?;
    if recipe.tuner.lora().is_some() {
        misuse!(
            "{} trains a LoRA, whose weights are f32 and never rounded; give a recipe with tuner.kind = \"full\"",
            args.recipe.display()
        );
    }
    let folder = args.recipe.parent().unwrap_or(Path::new(""));
    let base = match &args.model {
        Some(model) => {
            load::folder(model)?;
            model.clone()
        }
        None => recipe_inputs::base_folder(&recipe.base, folder)?,
    };
    refuse_too_large(&recipe, &base, device)?;
    let Inputs {
        base,
        tokenizer,
        examples,
        ..
    } = Inputs::open(&recipe, folder, base)?;
    let held_out = examples.held_out.get(&Side::Val);
    let held_out = held_out.map_or(&[][..], Vec::as_slice);
    let samples = samples(held_out);
    if samples.is_empty() {
        misuse!(
            "{} holds nothing out to score; give it data.split or a data.validation_share above 0",
            args.recipe.display()
        );
    }
    let job = recipe_inputs::job(&recipe, examples, tokenizer);
    job.check()?;

    // 2. three trainings, each scored
    let judge = Judge {
        device,
        tokenizer: job.tokenizer.as_deref(),
        samples: &samples,
        row_tokens: recipe.data.row_tokens,
        ui,
    };
    let before = judge.scores(start(&base, DType::F32)?)?;
    let mut n_tokens = 0;
    let mut all_scores: Vec<Vec<Score>> = Vec::new();
    let mut cases = Vec::new();
    for case in CASES {
        let trained = train(case, &base, &job, device, ui)?;
        let mut model = start(&base, DType::F32)?;
        let moved = rounding::take(&mut model, &trained.model)?;
        let scores = judge.scores(model)?;
        n_tokens = trained.n_tokens;
        cases.push(Outcome {
            weights: case.weights(),
            rounding: case.rounding(),
            held_out: loss(&samples, &scores),
            over_f32: difference::between(&samples, &scores, all_scores.first().unwrap_or(&scores)),
            moved,
            train_loss: trained.loss,
            seconds: trained.seconds,
        });
        ui.note(format_args!(
            "{}: held-out loss {:.4}, {:.1} s",
            case.name(),
            cases[cases.len() - 1].held_out.nats_per_token,
            trained.seconds
        ));
        all_scores.push(scores);
    }

    // 3. what that says
    let scenes: BTreeSet<&str> = samples.iter().map(|s| s.scene.as_str()).collect();
    let report = Report {
        bench: "rounding",
        recipe: args.recipe.clone(),
        model: base.clone(),
        device: device.to_string(),
        steps: args.steps,
        lr: recipe.optimizer.lr,
        seed: recipe.seed,
        tokens: n_tokens,
        scenes: scenes.len(),
        before: loss(&samples, &before),
        stochastic_over_nearest: difference::between(&samples, &all_scores[1], &all_scores[2]),
        cases,
    };
    ui.result(&report, || report.describe())
}

impl Report {
    fn describe(&self) -> String {
        let mut text = format!(
            "{} steps of {} tokens in all at lr {:e} from {}; {} held-out rows of {} scenes, {} tokens, scored in f32\n",
            self.steps,
            self.tokens,
            self.lr,
            self.model.display(),
            self.before.rows,
            self.scenes,
            self.before.tokens,
        );
        let mut row = |name: &str, loss: &Loss, over: Option<&Difference>, moved: Option<f64>| {
            let moved = moved.map_or(String::new(), |moved| format!("{:.1} %", 100.0 * moved));
            let over = over.map_or(String::new(), spelled);
            // A String takes all that is written to it.
            let _ = writeln!(
                text,
                "{name:<18} {:>10.4} {:>10} {over:>32} {moved:>8}",
                loss.nats_per_token,
                match loss.bytes {
                    0 => String::new(),
                    _ => format!("{:.4}", loss.bits_per_byte),
                },
            );
        };
        row("before", &self.before, None, None);
        for (case, outcome) in CASES.iter().zip(&self.cases) {
            let over = case.rounding().map(|_| &outcome.over_f32);
            row(&case.name(), &outcome.held_out, over, Some(outcome.moved));
        }
        let head = format!(
            "{:<18} {:>10} {:>10} {:>32} {:>8}\n",
            "weights", "nats/token", "bits/byte", "nats over f32 (95 %)", "moved"
        );
        let at = text.find('\n').map_or(0, |end| end + 1);
        text.insert_str(at, &head);
        text.push_str(&format!(
            "stochastic over nearest: {} nats a token",
            spelled(&self.stochastic_over_nearest)
        ));
        text
    }
}

fn spelled(difference: &Difference) -> String {
    format!(
        "{:+.5} ({:+.5} to {:+.5})",
        difference.nats_per_token, difference.low, difference.high
    )
}

/// Held-out rows as metrics take them; a row that comes from no scene is one of its own.
fn samples(held_out: &[SourceExample]) -> Vec<Sample> {
    let samples = held_out.iter().enumerate().filter_map(|(at, held)| {
        let mut sample = sample(held)?;
        if held.scene.is_none() {
            sample.scene = format!("row {at}");
        }
        Some(sample).filter(|sample| sample.encoded.n_targets() > 0)
    });
    samples.collect()
}

/// Over all samples; bits a byte are no number where rows came as ids.
fn loss(samples: &[Sample], scores: &[Score]) -> Loss {
    let mut loss = Loss::of(samples, scores, |_| true);
    if loss.bytes == 0 {
        loss.bits_per_byte = f64::NAN;
    }
    loss
}

/// Trains one case, with a progress bar.
fn train(case: Case, base: &Path, job: &Job, device: Device, ui: &Ui) -> Result<Trained> {
    let model = start(base, case.dtype)?.to_device(device)?;
    let training = Training::new(case, model, job)?;
    if let Some(memory) = training.memory() {
        ui.note(format_args!("{}: {}", case.name(), memory.describe()));
    }
    let mut bar = ui.bar(&case.name(), training.total_steps());
    let trained = training.run(|step, loss| bar.set(step, &format!("loss {loss:.4}")))?;
    bar.finish();
    Ok(trained)
}

fn start(base: &Path, dtype: DType) -> Result<Model> {
    rounding::start(base, dtype).with_context(|| format!("loading {}", base.display()))
}

/// Scores weights on the held-out rows, always in f32.
struct Judge<'a> {
    device: Device,
    tokenizer: Option<&'a Tokenizer>,
    samples: &'a [Sample],
    row_tokens: usize,
    ui: &'a Ui,
}

impl Judge<'_> {
    fn scores(&self, model: Model) -> Result<Vec<Score>> {
        let model = model.to_device(self.device)?;
        let mut bar = self.ui.bar("held out", self.samples.len() as u64);
        let scores = score::samples(
            &model,
            self.tokenizer,
            self.samples,
            self.row_tokens,
            |done| bar.set(done as u64, ""),
        )?;
        bar.finish();
        Ok(scores)
    }
}
