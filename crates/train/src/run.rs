//! The training loop. CPT and SFT are the same loop; they differ in their rows.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::time::Instant;

use kernel::DType;
use model::Model;

use crate::checkpoint::{self, Best, Checkpoints, State};
use crate::data::{Account, Plan};
use crate::error::{Error, IoContext, Result};
use crate::identity;
use crate::job::{Job, ResultKind, SaveDType};
use crate::memory::StepRows;
use crate::metrics::{TrainLine, ValidationLine};
use crate::progress::{Clock, Progress, Remaining, Start, StepReport};
use crate::ranks::Ranks;
use crate::record::Record;
use crate::schedule::Schedule;
use crate::seed::{Purpose, derive};
use crate::step::Trainer;
use crate::validate::{Pass, Validator, gap_alert};

/// What a finished run has to say.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct Summary {
    /// Steps that were trained.
    pub steps: u64,
    /// Where the documents and tokens are.
    pub account: Account,
    /// The last training step.
    pub train: Option<TrainLine>,
    /// The last held-out losses: of each set `all` first, then by language.
    pub validation: Vec<ValidationLine>,
    /// The lowest held-out loss and its step.
    pub best: Option<Best>,
    /// Seconds of training, over all starts.
    pub seconds: f64,
    /// For each of [`Job::train`] whether the weights of `result` were trained on all its labels.
    #[serde(skip)]
    pub is_trained: Vec<bool>,
    /// `model/` or `adapter/` in the job's folder.
    pub result: PathBuf,
}

/// Trains `model` as `job` says, going on from the newest checkpoint in the job's folder if there is one.
///
/// The same job gives the same bytes, however often it was stopped and started again; only times differ.
///
/// # Errors
/// A job that cannot be done ([`Error::BadValue`], [`Error::NoTrainableToken`], [`Error::TokenBeyondVocabulary`]), a checkpoint of another
/// job ([`Error::RecipeChanged`]), a loss that is no number ([`Error::NotFinite`]), a GPU that fails ([`Error::DeviceFailed`]), a stop that was asked for ([`Error::Interrupted`]), a disk
/// that refuses. The checkpoints written so far stay whole.
pub fn run(model: Model, job: &Job, progress: &mut dyn Progress) -> Result<(Model, Summary)> {
    run_among(model, job, &Ranks::alone(), progress)
}

/// As [`run`], by several processes together, each with the same model and job: a step's micro-batches and the optimizer's moments are
/// divided among them, and what is learned is the same up to the order of sums. Rank 0 alone reads and writes the job's folder; its checkpoints
/// are those of one process, and any number of ranks goes on from them.
///
/// # Errors
/// As [`run`]; fewer micro-batches a step than ranks ([`Error::TooFewMicroBatches`]); ranks that were not started alike ([`Error::RanksDiffer`]); a rank
/// that failed ([`Error::Rank`]). Whoever calls this must tell the others of an error by [`Ranks::fail`], unless it is [`Error::is_of_all_ranks`].
pub fn run_among(
    model: Model,
    job: &Job,
    ranks: &Ranks,
    progress: &mut dyn Progress,
) -> Result<(Model, Summary)> {
    let mut run = Run::start(model, job, ranks, progress)?;
    loop {
        run.validate_if_due()?;
        run.checkpoint_if_due()?;
        if run.is_done() {
            return run.finish();
        }
        run.train_step()?;
    }
}

struct Run<'a> {
    job: &'a Job,
    ranks: &'a Ranks,
    progress: &'a mut dyn Progress,
    plan: Plan,
    schedule: Schedule,
    validator: Validator,
    trainer: Trainer,
    checkpoints: Checkpoints,
    state: State,
    record: Record,
    clock: Clock,
    started: Instant,
    elapsed_before_s: f64,
    last_save: Instant,
}

impl<'a> Run<'a> {
    fn start(
        mut model: Model,
        job: &'a Job,
        ranks: &'a Ranks,
        progress: &'a mut dyn Progress,
    ) -> Result<Self> {
        // 1. what to do
        job.check()?;
        attach(&mut model, job)?;
        let vocab_size = model.config().vocab_size;
        let mut plan = Plan::new(job, vocab_size)?;
        let validator = Validator::new(job, &plan, vocab_size)?;
        let schedule = Schedule::new(&job.optimizer, plan.total_steps());
        let identity = identity::of(job, model.dtype());
        ranks.require_same(&identity)?;
        // 2. where it had got to, as rank 0 finds it
        let checkpoints = match ranks.is_first() {
            true => {
                fs::create_dir_all(&job.out_dir).during("making", &job.out_dir)?;
                // Whole weights that a killed save left beside their place.
                files::clear_leftovers(&job.out_dir, |name| ["model", "adapter"].contains(&name))?;
                Checkpoints::open(&job.out_dir)?
            }
            false => Checkpoints::of_first_rank(&job.out_dir),
        };
        for damaged in checkpoints.set_aside() {
            progress.set_aside(damaged);
        }
        let resumed = match checkpoints.newest() {
            Some((_, folder)) => Some((resumable(job, &identity, &folder)?, folder)),
            None => None,
        };
        if let Some((_, folder)) = &resumed {
            checkpoint::read_weights(folder, &mut model)?;
        }
        ranks.copy_from_first(model.trainable_mut())?;
        let rows = StepRows::of(job);
        let mut trainer = Trainer::among(model, &job.optimizer, job.seed, rows, ranks.clone())?;
        plan.rows_per_batch = trainer.rows_per_batch;
        let (state, record, checkpoints) = if ranks.is_first() {
            let (state, record, folder) = match resumed {
                Some((state, folder)) => {
                    let record =
                        Record::resume(&job.out_dir, state.metrics_bytes, &state.tensorboard)?;
                    (state, record, Some(folder))
                }
                None => {
                    let (record, position) = Record::start(&job.out_dir)?;
                    let origin = job.origin.clone();
                    let state = State::start(plan.total_steps(), identity, origin, position);
                    (state, record, None)
                }
            };
            checkpoint::share_state(&state, folder.is_some(), ranks)?;
            if let Some(folder) = folder {
                let names = trainer.model.trainable_names();
                checkpoint::read_optimizer(&folder, &names, &mut trainer.optimizer, ranks)?;
            }
            (state, record, checkpoints)
        } else {
            let (state, has_moments) = checkpoint::shared_state(&job.out_dir, ranks)?;
            if has_moments {
                checkpoint::receive_optimizer(&mut trainer.optimizer, ranks)?;
            }
            let newest = has_moments.then_some(state.step);
            (state, Record::none(), checkpoints.with_newest(newest))
        };
        trainer.optimizer.steps = state.step;
        // 3. tell it
        progress.started(&Start {
            total_steps: plan.total_steps(),
            resumed_step: state.step,
            warmup_steps: schedule.warmup_steps,
            account: *plan.account(),
            row_tokens: job.data.row_tokens,
            memory: trainer.memory.clone(),
            micro_batches: rows.micro_batches(trainer.rows_per_batch),
            n_ranks: ranks.n_ranks(),
            trainable: trainer
                .model
                .trainable()
                .iter()
                .map(|tensor| tensor.numel() as u64)
                .sum(),
        });
        Ok(Run {
            elapsed_before_s: state.elapsed_s,
            job,
            ranks,
            progress,
            plan,
            schedule,
            validator,
            trainer,
            checkpoints,
            state,
            record,
            clock: Clock::default(),
            started: Instant::now(),
            last_save: Instant::now(),
        })
    }

    fn is_done(&self) -> bool {
        self.state.step >= self.plan.total_steps()
    }

    fn train_step(&mut self) -> Result<()> {
        let step_started = Instant::now();
        let step_idx = self.state.step;
        let step = self.plan.step(step_idx).clone();
        let lr = self.schedule.lr_at(step_idx);
        let batches = self.plan.micro_batches(&step);
        let outcome = self
            .trainer
            .step(batches, step.n_targets, lr)
            .map_err(|error| error.in_step(step_idx + 1, self.newest_checkpoint()))?;
        let seconds = step_started.elapsed().as_secs_f64();
        self.clock.trained(seconds, step.n_tokens);
        self.state.step += 1;
        let line = TrainLine {
            step: self.state.step,
            epoch: self.plan.epoch_after(&step),
            loss: outcome.loss,
            lr,
            grad_norm: f64::from(outcome.grad_norm),
            tokens: step.n_tokens,
            trained_tokens: step.n_targets,
            tokens_per_s: (step.n_tokens as f64 / seconds.max(1e-9) * 10.0).round() / 10.0,
        };
        self.record.line(&line)?;
        self.record.scalars(
            line.step,
            &[
                ("train/loss", line.loss),
                ("train/lr", line.lr),
                ("train/grad_norm", line.grad_norm),
                ("train/tokens_per_s", line.tokens_per_s),
            ],
        )?;
        tracing::debug!(
            step = line.step,
            loss = line.loss,
            lr = line.lr,
            grad_norm = line.grad_norm,
            tokens_per_s = line.tokens_per_s
        );
        self.state.last_train = Some(line.clone());
        self.progress.step(&StepReport {
            line,
            total_steps: self.plan.total_steps(),
            eta_s: self.clock.eta_s(self.remaining()),
        });
        Ok(())
    }

    fn validate_if_due(&mut self) -> Result<()> {
        let step = self.state.step;
        if !self.validation_due(step) || self.state.validated_step == Some(step) {
            return Ok(());
        }
        let started = Instant::now();
        let tokens = self.validator.n_tokens();
        let (job, progress) = (self.job, &mut *self.progress);
        let measured = self.validator.measure(Pass {
            model: &self.trainer.model,
            saved: &mut self.trainer.saved,
            job,
            plan: &self.plan,
            ranks: self.ranks,
            step,
            tokens_done: 0,
            go_on: &mut |done| {
                progress.validating(step, done, tokens);
                !job.stop.load(Ordering::Relaxed)
            },
        })?;
        // None: asked to stop. The checkpoint that follows knows that this measurement is still to come.
        let Some(lines) = measured else {
            return Ok(());
        };
        self.clock
            .validated(started.elapsed().as_secs_f64(), tokens);
        let of_nothing = lines.iter().find(|line| !line.loss.is_finite());
        if let Some(line) = of_nothing {
            return Err(Error::NotFinite {
                what: "held-out loss",
                value: line.loss as f32,
                step,
                last_checkpoint: self.newest_checkpoint(),
            });
        }
        self.record_validation(&lines)?;
        self.state.validated_step = Some(step);
        self.state.last_validation = lines;
        Ok(())
    }

    fn record_validation(&mut self, lines: &[ValidationLine]) -> Result<()> {
        for line in lines {
            self.record.line(line)?;
            let tag = |name: &str| format!("{}/{name}/{}", line.split, line.language);
            let tags = [tag("loss"), tag("bits_per_byte"), tag("probe"), tag("gap")];
            let values = [
                Some(line.loss),
                line.bits_per_byte,
                line.train_probe_loss,
                line.gap,
            ];
            let known: Vec<(&str, f64)> = tags
                .iter()
                .zip(values)
                .filter_map(|(tag, value)| Some((tag.as_str(), value?)))
                .collect();
            self.record.scalars(line.step, &known)?;
        }
        self.progress.validation(lines);
        let Some(all) = lines.first() else {
            return Ok(());
        };
        if let Some(alert) = gap_alert(all) {
            self.record.line(&alert)?;
            tracing::debug!(step = alert.step, alert = alert.alert, text = alert.text);
            self.progress.alert(&alert);
        }
        // The untrained model has no checkpoint to go back to, so it is never the best.
        if all.step > 0 && self.state.best.is_none_or(|best| all.loss < best.loss) {
            self.state.best = Some(Best {
                step: all.step,
                loss: all.loss,
            });
        }
        Ok(())
    }

    fn checkpoint_if_due(&mut self) -> Result<()> {
        let step = self.state.step;
        let run = &self.job.run;
        let pending = self.validation_due(step) && self.state.validated_step != Some(step);
        // All ranks do the same: one that was asked to stop stops all, and rank 0 has the clock.
        let clock_says = run.save_every_minutes > 0.0
            && self.last_save.elapsed().as_secs_f64() >= run.save_every_minutes * 60.0;
        let asked = self.job.stop.load(Ordering::Relaxed);
        let mut asks = [asked, clock_says && self.ranks.is_first()].map(|ask| f64::from(ask as u8));
        self.ranks.sum(&mut asks)?;
        let [asked, by_clock] = asks.map(|ask| ask > 0.0);
        let stop = asked && (pending || !self.is_done());
        let by_count = run.save_every > 0 && step.is_multiple_of(run.save_every);
        let is_best = run.save_best && self.state.best.is_some_and(|best| best.step == step);
        let trained = step > 0 && (by_clock || by_count || is_best || self.is_done());
        if !stop && !trained {
            return Ok(());
        }
        let started = Instant::now();
        if self.ranks.is_first() {
            self.refuse_weights_that_are_none()?;
        }
        if let Some((metrics_bytes, position)) = self.record.sync()? {
            self.state.metrics_bytes = metrics_bytes;
            self.state.tensorboard = position;
        }
        self.state.elapsed_s = self.elapsed_s();
        let folder = self.checkpoints.write(
            &self.trainer.model,
            &self.trainer.optimizer,
            &self.state,
            &self.job.base_name,
            run,
            self.ranks,
        )?;
        self.clock.saved(started.elapsed().as_secs_f64());
        self.last_save = Instant::now();
        self.progress.checkpoint(&folder);
        match stop {
            true => Err(Error::Interrupted {
                step,
                checkpoint: folder,
            }),
            false => Ok(()),
        }
    }

    /// What is saved can be gone on from: a step may end in weights that are none, and only the next one's loss would show it.
    fn refuse_weights_that_are_none(&self) -> Result<()> {
        match self.trainer.model.check_trainable_finite() {
            Err(cause @ model::Error::NotFinite { .. }) => Err(Error::WeightsNotFinite {
                cause: Box::new(cause),
                step: self.state.step,
                last_checkpoint: self.newest_checkpoint(),
            }),
            checked => Ok(checked?),
        }
    }

    fn finish(mut self) -> Result<(Model, Summary)> {
        let best = self.state.best.filter(|best| best.step < self.state.step);
        let mut n_steps = self.state.step;
        if let (ResultKind::Best, Some(best)) = (self.job.run.result, best) {
            n_steps = best.step;
            if self.ranks.is_first() {
                self.checkpoints
                    .read_checked(best.step, &mut self.trainer.model)?;
            }
        }
        let dtype = match self.job.run.save_dtype {
            SaveDType::Base => None,
            SaveDType::Bf16 => Some(DType::Bf16),
            SaveDType::F32 => Some(DType::F32),
        };
        let (model, out_dir) = (&self.trainer.model, &self.job.out_dir);
        let result = match self.ranks.is_first() {
            true => checkpoint::save_weights(model, out_dir, dtype, &self.job.base_name)?,
            false => checkpoint::weights_folder(model, out_dir),
        };
        let summary = Summary {
            steps: self.state.step,
            account: *self.plan.account(),
            seconds: self.elapsed_s(),
            is_trained: self.plan.is_trained(n_steps),
            train: self.state.last_train,
            validation: self.state.last_validation,
            best: self.state.best,
            result,
        };
        Ok((self.trainer.model, summary))
    }

    /// Held-out loss is measured at the start, every so many steps, and at the end.
    fn validation_due(&self, step: u64) -> bool {
        if self.validator.is_empty() {
            return false;
        }
        let run = &self.job.run;
        match step {
            0 => run.validate_at_start,
            _ if step == self.plan.total_steps() => true,
            _ => run.validate_every > 0 && step.is_multiple_of(run.validate_every),
        }
    }

    fn remaining(&self) -> Remaining {
        let step = self.state.step;
        let validations = (step..=self.plan.total_steps())
            .filter(|step| self.validation_due(*step))
            .count() as u64;
        Remaining {
            train_tokens: self.plan.tokens_from(step),
            validate_tokens: validations * self.validator.n_tokens(),
            save_every_s: self.job.run.save_every_minutes * 60.0,
        }
    }

    fn elapsed_s(&self) -> f64 {
        self.elapsed_before_s + self.started.elapsed().as_secs_f64()
    }

    fn newest_checkpoint(&self) -> Option<PathBuf> {
        self.checkpoints.newest().map(|(_, folder)| folder)
    }
}

/// Puts the adapter that the recipe asks for beside the weights. A model that comes with one keeps it: training goes on from there.
fn attach(model: &mut Model, job: &Job) -> Result<()> {
    let refuse = |key, value: String, expected| {
        Err(Error::BadValue {
            key,
            value,
            expected,
        })
    };
    let Some(config) = job.tuner.lora() else {
        return match model.lora() {
            None => Ok(()),
            Some(_) => refuse(
                "tuner.kind",
                "full".to_string(),
                "lora for a model with an adapter; merge the adapter first to train all weights",
            ),
        };
    };
    match model.lora() {
        None => Ok(model.attach_lora(&config, derive(job.seed, Purpose::Adapter, 0, 0))?),
        Some(adapter) if adapter.rank != config.rank => refuse(
            "tuner.rank",
            config.rank.to_string(),
            "the rank of the adapter that training goes on from",
        ),
        Some(_) => Ok(()),
    }
}

/// The state of a checkpoint, if this job may go on from it.
fn resumable(
    job: &Job,
    identity: &serde_json::Map<String, serde_json::Value>,
    folder: &Path,
) -> Result<State> {
    let mut state = checkpoint::read_state(folder)?;
    if !state.has_sums() {
        for key in identity::NEW_IN_FORM_2 {
            let value = identity.get(key).cloned();
            value.map(|value| state.identity.insert(key.to_owned(), value));
        }
    }
    let differences = identity::differences(&state.identity, identity);
    if !differences.is_empty() && !job.force {
        return Err(Error::RecipeChanged {
            dir: job.out_dir.clone(),
            differences,
        });
    }
    state.identity = identity.clone();
    Ok(state)
}
