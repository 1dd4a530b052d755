//! `cyrene bench rounding`: whether weights that train as bf16 lose small updates. The same steps from the same checkpoint three times:
//! with f32 weights, with bf16 weights rounded stochastically, as training does it, and with bf16 weights rounded to the nearest.
//!
//! All start from the checkpoint rounded to bf16, see the same rows in the same order, and are scored on the same held-out rows in f32,
//! so that the scores differ by the trained weights alone. Activations are f32 beside f32 weights and bf16 beside bf16 ones, as in any
//! training: between the two bf16 cases nothing but the rounding differs.

use std::collections::BTreeSet;
use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result};
use corpus::split::Side;
use eval::metric::difference::{self, Difference};
use eval::metric::loss_gap::Loss;
use eval::score::{self, Score};
use eval::{Sample, sample};
use kernel::ops::adamw::Rounding;
use kernel::{DType, Device, Tensor};
use model::{Config, Model};
use serde::Serialize;
use text::Tokenizer;
use train::Job;
use train::data::Plan;
use train::memory::StepRows;
use train::schedule::Schedule;
use train::step::Trainer;

use crate::cli::BenchRounding as Args;
use crate::commands::train::{HeldOut, base_folder, job, load_split, rows};
use crate::recipe::Recipe;
use crate::ui::Ui;
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

/// One of the three trainings.
#[derive(Debug, Clone, Copy)]
struct Case {
    dtype: DType,
    rounding: Rounding,
}

/// f32 first: the others are held against it.
const CASES: [Case; 3] = [
    Case {
        dtype: DType::F32,
        rounding: Rounding::Stochastic,
    },
    Case {
        dtype: DType::Bf16,
        rounding: Rounding::Stochastic,
    },
    Case {
        dtype: DType::Bf16,
        rounding: Rounding::Nearest,
    },
];

impl Case {
    fn weights(self) -> &'static str {
        match self.dtype {
            DType::F32 => "f32",
            DType::Bf16 => "bf16",
        }
    }

    fn rounding(self) -> Option<&'static str> {
        match (self.dtype, self.rounding) {
            (DType::F32, _) => None,
            (DType::Bf16, Rounding::Stochastic) => Some("stochastic"),
            (DType::Bf16, Rounding::Nearest) => Some("nearest"),
        }
    }

    fn name(self) -> String {
        match self.rounding() {
            None => self.weights().to_owned(),
            Some(rounding) => format!("{}, {rounding}", self.weights()),
        }
    }
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
        None => base_folder(&recipe.base, folder)?,
    };
    let tokenizer = load::tokenizer(&base)?.map(Arc::new);
    let split = load_split(&recipe, folder)?;
    let vocab_size = Config::load(&base)?.vocab_size;
    let data = rows(
        &recipe,
        folder,
        split.as_ref(),
        tokenizer.as_deref(),
        vocab_size,
    )?;
    let held_out = data.held_out.get(&Side::Val).map_or(&[][..], Vec::as_slice);
    let samples = samples(held_out);
    if samples.is_empty() {
        misuse!(
            "{} holds nothing out to score; give it data.split or a data.validation_share above 0",
            args.recipe.display()
        );
    }
    let job = job(&recipe, data, tokenizer);
    job.check()?;

    // 2. three trainings, each scored
    let judge = Judge {
        base: &base,
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
        let (model, moved) = judge.taking(&trained.model)?;
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
fn samples(held_out: &[HeldOut]) -> Vec<Sample> {
    let samples = held_out.iter().enumerate().filter_map(|(at, held)| {
        let mut sample = sample(&held.row)?;
        if held.row.scene.is_none() {
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

/// The checkpoint rounded to bf16, with weights of `dtype`: the same numbers whatever it is.
fn start(base: &Path, dtype: DType) -> Result<Model> {
    let load =
        |dtype| Model::load(base, dtype).with_context(|| format!("loading {}", base.display()));
    let rounded = load(DType::Bf16)?;
    if dtype == DType::Bf16 {
        return Ok(rounded);
    }
    let mut model = load(dtype)?;
    for (to, from) in model.trainable_mut().into_iter().zip(rounded.trainable()) {
        to.copy_from(&from.to_dtype(dtype))?;
    }
    Ok(model)
}

struct Trained {
    /// On the host.
    model: Model,
    n_tokens: u64,
    loss: f64,
    seconds: f64,
}

fn train(case: Case, base: &Path, job: &Job, device: Device, ui: &Ui) -> Result<Trained> {
    let model = start(base, case.dtype)?.to_device(device)?;
    let mut plan = Plan::new(job, model.config().vocab_size)?;
    let schedule = Schedule::new(&job.optimizer, plan.total_steps());
    let mut trainer = Trainer::new(model, &job.optimizer, job.seed, StepRows::of(job))?;
    trainer.optimizer.rounding = case.rounding;
    plan.rows_per_batch = trainer.rows_per_batch;
    if let Some(memory) = &trainer.memory {
        ui.note(format_args!("{}: {}", case.name(), memory.describe()));
    }
    let started = Instant::now();
    let mut bar = ui.bar(&case.name(), plan.total_steps());
    let mut sum = 0.0;
    for step_idx in 0..plan.total_steps() {
        let step = plan.step(step_idx).clone();
        let micro_batches = plan.micro_batches(&step);
        let outcome = trainer.step(micro_batches, step.n_targets, schedule.lr_at(step_idx))?;
        sum += outcome.loss;
        bar.set(step_idx + 1, &format!("loss {:.4}", outcome.loss));
    }
    device.synchronize()?;
    bar.finish();
    let seconds = started.elapsed().as_secs_f64();
    let Trainer { model, .. } = trainer;
    Ok(Trained {
        model: model.to_device(Device::Cpu)?,
        n_tokens: plan.tokens_from(0),
        loss: sum / plan.total_steps() as f64,
        seconds,
    })
}

/// Scores weights on the held-out rows, always in f32.
struct Judge<'a> {
    base: &'a Path,
    device: Device,
    tokenizer: Option<&'a Tokenizer>,
    samples: &'a [Sample],
    row_tokens: usize,
    ui: &'a Ui,
}

impl Judge<'_> {
    /// An f32 model with the weights of `trained`, and the share of them that are not the checkpoint's as bf16.
    fn taking(&self, trained: &Model) -> Result<(Model, f64)> {
        let mut model = start(self.base, DType::F32)?;
        let as_bf16 = |tensor: &Tensor| tensor.to_dtype(DType::Bf16).to_f32_vec();
        let (mut moved, mut all) = (0, 0);
        for (to, from) in model.trainable_mut().into_iter().zip(trained.trainable()) {
            let (old, new) = (as_bf16(to), as_bf16(from));
            moved += old.iter().zip(&new).filter(|(old, new)| old != new).count();
            all += old.len();
            to.copy_from(&from.to_dtype(DType::F32))?;
        }
        Ok((model, moved as f64 / all as f64))
    }

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
