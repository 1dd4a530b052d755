//! `cyrene train`: a recipe to a trained model, with progress, Ctrl-C that saves, and the same command to go on.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use corpus::account::{self, SourceAccount};
use corpus::examples::{self, Encoding, SourceExample};
use corpus::split::{Side, Split};
use corpus::{BadRows, RowNotes};
use eval::TrainedRows;
use kernel::Device;
use model::{Config, Model};
use text::{Persona, Tokenizer};
use train::data::Account;
use train::job::ResultKind;
use train::launch::{self, Launch};
use train::metrics::{AlertLine, ValidationLine};
use train::ranks::{Limits, Ranks};
use train::validate::ALL;
use train::{
    DataConfig, Document, Job, Progress, SetAside, Silent, Start, StepReport, Summary,
    ValidationSet,
};

use super::fetch::{default_folder, is_hub_id};
use crate::cli::Train as Args;
use crate::lock::RunLock;
use crate::recipe::Recipe;
use crate::ui::{Bar, Misuse, Ui, misused, of_eval, of_rows, size};
use crate::{env, interrupt, load, misuse};

/// Runs the command; the error is a [`crate::ui::Misuse`] where the arguments are at fault.
pub fn run(args: &Args, ui: &Ui) -> Result<()> {
    let mut recipe = Recipe::load(&args.recipe, &args.set)?;
    if let Some(character) = &args.character {
        // Beside the recipe's other paths, which are relative to it.
        let path = std::path::absolute(character)
            .with_context(|| format!("finding {}", character.display()))?;
        recipe.character = Some(path);
    }
    let name = args
        .recipe
        .file_stem()
        .and_then(|stem| stem.to_str())
        .unwrap_or("run");
    let out = args
        .out
        .clone()
        .unwrap_or_else(|| Path::new("runs").join(name));
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
    let base = base_folder(&recipe.base, folder)?;
    let character = recipe.character.as_ref().map(|path| folder.join(path));
    let persona = load::persona(&base, None, character.as_deref())?;
    let tokenizer = load::tokenizer(&base)?.map(Arc::new);
    let split = load_split(recipe, folder)?;
    let vocab_size = Config::load(&base)?.vocab_size;
    let data = rows(
        recipe,
        folder,
        split.as_ref(),
        tokenizer.as_deref(),
        vocab_size,
    )?;
    if ranks.is_first() {
        data.notes.lines().iter().for_each(|line| ui.note(line));
    }
    let account = account(recipe, folder, split.as_ref())?;
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
            Some(RunLock::take(out)?)
        }
        false => None,
    };
    let job = Job {
        out_dir: out.to_owned(),
        origin: serde_json::json!({
            "recipe_sha256": files::sha256(resolved.as_bytes()),
            "version": env!("CARGO_PKG_VERSION"),
            "device": device.to_string(),
        }),
        base_sha256: Some(files::sha256_of_files(&base, is_of_model)?),
        rows_at_once: options.rows_at_once,
        force: options.force,
        stop: interrupt::flag(),
        ..job(recipe, data, tokenizer)
    };
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
        rows.insert(&document.encoded.input_ids);
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

/// Files of a base that decide what is trained: its weights and its shapes.
fn is_of_model(name: &str) -> bool {
    name == "config.json" || (name.ends_with(".safetensors") && !name.contains('/'))
}

/// The split that a recipe names.
///
/// # Errors
/// [`crate::ui::Misuse`] where the file is no split.
pub fn load_split(recipe: &Recipe, folder: &Path) -> Result<Option<Split>> {
    let path = recipe.data.split.as_ref();
    misused(path.map(|path| Split::load(&folder.join(path))).transpose())
}

/// Where the tokens of a recipe's sources are, and how often its weights show a scene.
fn account(recipe: &Recipe, folder: &Path, split: Option<&Split>) -> Result<Option<SourceAccount>> {
    let sources: Vec<(PathBuf, f64)> = recipe
        .data
        .sources
        .iter()
        .map(|source| (folder.join(&source.path), source.weight))
        .collect();
    let sources: Vec<(&Path, f64)> = sources.iter().map(|(p, w)| (p.as_path(), *w)).collect();
    Ok(account::of_sources(&sources, split)?)
}

/// What a recipe and its data say of a job: nowhere to write to yet, nobody who stops it.
pub fn job(recipe: &Recipe, data: Data, tokenizer: Option<Arc<Tokenizer>>) -> Job {
    let documents =
        |rows: Vec<HeldOut>| rows.into_iter().map(|held| document(held.row, held.source));
    let validation = data.held_out.into_iter().map(|(side, rows)| ValidationSet {
        name: side.name().to_owned(),
        documents: documents(rows).collect(),
    });
    Job {
        seed: recipe.seed,
        data: DataConfig {
            row_tokens: recipe.data.row_tokens,
            packing: recipe.data.packing,
        },
        tuner: recipe.tuner.clone(),
        optimizer: recipe.optimizer.clone(),
        batch: recipe.batch.clone(),
        run: recipe.run.clone(),
        train: data.train,
        source_weights: recipe
            .data
            .sources
            .iter()
            .map(|source| source.weight)
            .collect(),
        validation: validation.collect(),
        tokenizer,
        out_dir: PathBuf::new(),
        base_name: recipe.base.clone(),
        base_sha256: None,
        origin: serde_json::Value::Null,
        rows_at_once: None,
        force: false,
        stop: Arc::default(),
    }
}

/// Whether a recipe's values can be, before its data are read.
///
/// # Errors
/// The key, and what is expected.
pub fn check(recipe: &Recipe) -> Result<()> {
    let mut job = job(recipe, Data::default(), None);
    // That something is held out shows later.
    job.run.result = ResultKind::Last;
    job.check()
        .map_err(|error| anyhow::Error::new(Misuse(error.to_string())))
}

/// Rows of a recipe, by side.
#[derive(Default)]
pub struct Data {
    /// Documents to train on.
    pub train: Vec<Document>,
    /// `val` first, then the others that have rows; of each as many as `data.validation_tokens` lets through.
    pub held_out: BTreeMap<Side, Vec<HeldOut>>,
    /// What is worth saying about rows that were read all the same.
    pub notes: RowNotes,
}

/// A row that nobody trains on.
pub struct HeldOut {
    /// The row in ids.
    pub row: SourceExample,
    /// Place of its source in the recipe.
    source: u32,
}

/// Reads and encodes the sources of a recipe for a model of so many ids.
///
/// # Errors
/// A missing source or split; rows that cannot be used, with file and line; nothing to train on.
pub fn rows(
    recipe: &Recipe,
    folder: &Path,
    split: Option<&Split>,
    tokenizer: Option<&Tokenizer>,
    vocab_size: usize,
) -> Result<Data> {
    let encoding = Encoding {
        stage: recipe.stage,
        loss_scale: recipe.data.loss_scale,
        tokenizer,
        vocab_size: Some(vocab_size),
    };
    let mut bad = BadRows::default();
    let mut notes = RowNotes::default();
    let mut paths = std::collections::HashSet::new();
    let mut train = Vec::new();
    let mut held_out: BTreeMap<Side, Vec<HeldOut>> = BTreeMap::new();
    let mut seen = std::collections::HashSet::new();
    for (source_idx, source) in recipe.data.sources.iter().enumerate() {
        let source_idx = source_idx as u32;
        let path = folder.join(&source.path);
        let found = match examples::source(&path, split, encoding) {
            // Those of all sources are named together.
            Err(corpus::Error::BadRows(rows)) => {
                bad.append(rows);
                continue;
            }
            found => of_rows(found)?,
        };
        if paths.insert(path) {
            notes.append(found.notes);
        }
        for row in found.examples {
            let is_drawn = split.is_none()
                && drawn(recipe.seed, &row.encoded.input_ids) < recipe.data.validation_share;
            let side = if is_drawn { Side::Val } else { row.side };
            match side {
                // Only what is explicitly for training in its language.
                Side::Train => train.push(document(row, source_idx)),
                Side::Val | Side::ValStrict | Side::ProbeX => {
                    // A source named twice to weigh more is held out once.
                    if seen.insert(row.encoded.input_ids.clone()) {
                        let rows = held_out.entry(side).or_default();
                        rows.push(HeldOut {
                            row,
                            source: source_idx,
                        });
                    }
                }
                Side::Contaminated | Side::Filtered => {}
            }
        }
    }
    of_rows(bad.into_result())?;
    if train.is_empty() {
        let n_held_out = held_out.values().map(Vec::len).sum();
        misuse!("{}", nothing_to_train(recipe, n_held_out));
    }
    for rows in held_out.values_mut() {
        let all = std::mem::take(rows);
        let length = |held: &HeldOut| held.row.encoded.input_ids.len();
        *rows = sampled(all, length, recipe.data.validation_tokens, recipe.seed);
    }
    Ok(Data {
        train,
        held_out,
        notes,
    })
}

/// Why no row is there to train on, and what would bring some.
fn nothing_to_train(recipe: &Recipe, n_held_out: usize) -> String {
    match &recipe.data.split {
        _ if n_held_out == 0 => {
            "data.sources hold no row to train on; name files or folders that do".to_owned()
        }
        Some(split) => format!(
            "data.split ({}) holds out every row of data.sources ({n_held_out}), so that none is left to train on; name data sets with scenes of its training side",
            split.display()
        ),
        None => format!(
            "data.validation_share = {} holds out every row of data.sources ({n_held_out}), so that none is left to train on; lower it (0 holds out none) or give more rows",
            recipe.data.validation_share
        ),
    }
}

/// Rows drawn by seed until they hold `tokens`; all of them, in their order, if they hold no more.
fn sampled<R>(rows: Vec<R>, length: impl Fn(&R) -> usize, tokens: usize, seed: u64) -> Vec<R> {
    let mut drawn: Vec<usize> = (0..rows.len()).collect();
    drawn.sort_by_cached_key(|at| files::sha256(format!("{seed} held out {at}").as_bytes()));
    let mut left = tokens;
    let mut kept = vec![false; rows.len()];
    for at in drawn {
        let length = length(&rows[at]);
        if length <= left {
            left -= length;
            kept[at] = true;
        }
    }
    let pairs = rows.into_iter().zip(kept);
    pairs
        .filter_map(|(row, kept)| kept.then_some(row))
        .collect()
}

fn document(row: SourceExample, source: u32) -> Document {
    Document {
        encoded: row.encoded,
        source,
        language: row.language,
        bytes: row.bytes,
    }
}

/// A number in [0, 1) for a row, from the seed and what the row says: the same row is on one side, in whatever source it stands.
fn drawn(seed: u64, ids: &[u32]) -> f64 {
    let seed = seed.to_le_bytes().into_iter();
    let bytes: Vec<u8> = seed
        .chain(ids.iter().flat_map(|id| id.to_le_bytes()))
        .collect();
    let digest = files::sha256(&bytes);
    let bits = u64::from_str_radix(&digest[..13], 16).unwrap_or(0);
    bits as f64 / (1u64 << 52) as f64
}

/// The folder of a recipe's base: a path relative to the recipe, or a Hub id that was fetched.
///
/// # Errors
/// [`crate::ui::Misuse`] if it is neither.
pub fn base_folder(base: &str, folder: &Path) -> Result<PathBuf> {
    let path = folder.join(base);
    if path.is_dir() {
        return Ok(path);
    }
    // What begins with a folder that is there names a place on the disk, not a repository.
    let first = Path::new(base).components().next();
    let in_a_folder = first.is_some_and(|first| folder.join(first).is_dir());
    if !is_hub_id(base) || in_a_folder {
        misuse!(
            "base `{base}` is no folder ({} does not exist); give a model's folder, relative to the recipe, or a Hub id such as Qwen/Qwen3.5-4B-Base",
            path.display()
        );
    }
    let fetched = default_folder(base);
    if fetched.is_dir() {
        return Ok(fetched);
    }
    misuse!(
        "base `{base}` is neither a folder ({}) nor a fetched model ({}); `cyrene fetch {base}` gets it from the Hub",
        path.display(),
        fetched.display()
    );
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
            start.total_steps - start.resumed_step,
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
        for warning in self.recipe.rate_warnings(start.total_steps) {
            self.ui.note(warning);
        }
        if start.resumed_step > 0 {
            self.ui
                .note(format_args!("going on from step {}", start.resumed_step));
        }
        if let Some(cut) = cut(account, start.row_tokens) {
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

/// What was longer than a row, and what became of it.
fn cut(account: &Account, row_tokens: usize) -> Option<String> {
    let n = |n: u64, what: &str| format!("{n} {what}{}", if n == 1 { "" } else { "s" });
    let verbs = |n: u64| {
        if n == 1 {
            ("is", "was")
        } else {
            ("are", "were")
        }
    };
    let mut parts = Vec::new();
    if account.conversations_split > 0 {
        let (are, were) = verbs(account.conversations_split);
        let rounds = match account.rounds_split {
            0 => String::new(),
            rounds => format!(
                "; {} of them {} longer than a row alone and cut inside the answer, behind the same question",
                n(rounds, "round"),
                verbs(rounds).0
            ),
        };
        parts.push(format!(
            "{} {are} longer than a row of {row_tokens} tokens and {were} cut between rounds into {}, the system message in front of each{rounds}",
            n(account.conversations_split, "conversation"),
            n(account.conversation_pieces, "piece"),
        ));
    }
    if account.documents_split > 0 {
        let (are, were) = verbs(account.documents_split);
        parts.push(format!(
            "{} {are} longer than a row of {row_tokens} tokens and {were} cut at sentence ends",
            n(account.documents_split, "document")
        ));
    }
    (!parts.is_empty()).then(|| parts.join("\n"))
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
        crate::ui::clock(Duration::from_secs_f64(summary.seconds)),
        summary.result.display()
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    /// More than any row here has.
    const N_IDS: usize = 2000;

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

    #[test]
    fn what_was_cut_is_said_with_its_numbers() {
        let none = Account::default();
        assert_eq!(cut(&none, 96), None);
        let some = Account {
            conversations_split: 3,
            conversation_pieces: 8,
            ..none
        };
        assert_eq!(
            cut(&some, 96).unwrap(),
            "3 conversations are longer than a row of 96 tokens and were cut between rounds into 8 pieces, the system message in front of each"
        );
        let long_round = Account {
            conversations_split: 1,
            conversation_pieces: 4,
            rounds_split: 1,
            documents_split: 1,
            ..none
        };
        let said = cut(&long_round, 96).unwrap();
        assert!(said.contains("1 conversation is longer"), "{said}");
        assert!(
            said.contains("1 round of them is longer than a row alone"),
            "{said}"
        );
        assert!(
            said.ends_with(
                "1 document is longer than a row of 96 tokens and was cut at sentence ends"
            ),
            "{said}"
        );
    }

    #[test]
    fn held_out_sample_fits_the_budget_and_follows_the_seed() {
        let rows = |n: u32| -> Vec<u32> { (0..n).collect() };
        let ten = |_: &u32| 10;
        assert_eq!(sampled(rows(5), ten, 50, 7), [0, 1, 2, 3, 4]);
        let some = sampled(rows(50), ten, 105, 7);
        assert_eq!(some.len(), 10);
        assert_eq!(some, sampled(rows(50), ten, 105, 7));
        assert_ne!(some, sampled(rows(50), ten, 105, 8));
    }

    /// Six scenes in two languages, built; `s<n>` says "word<n>" in English and "字<n>" in Chinese.
    fn built_story(folder: &Path) -> Result<Tokenizer> {
        let story: String = (0..6)
            .map(|n| {
                let line = serde_json::json!({ "kind": "narration", "text": { "en": format!("word{n}"), "chs": format!("字{n}") } });
                serde_json::json!({ "campaign": "c", "scene": format!("s{n}"), "lines": [line] }).to_string() + "\n"
            })
            .collect();
        std::fs::write(folder.join("story.jsonl"), &story)?;
        let character =
            "languages = [\"chs\", \"en\"]\n[name]\nen = \"A\"\n[story]\nspeaker_ids = [\"a\"]\n";
        let character = corpus::Character::parse(character, Path::new("a.toml"))?;
        corpus::build(
            &corpus::BuildRequest {
                source: corpus::SourceKind::Story,
                root: &folder.join("story.jsonl"),
                character: &character,
                tasks: &[corpus::Task::PtEverything],
                languages: None,
                out: folder,
            },
            corpus::Counters::same(&|text| text.len()),
            &|_| {},
        )?;
        let split = corpus::make_split(&corpus::SplitRequest {
            source: corpus::SourceKind::Story,
            root: &folder.join("story.jsonl"),
            vendor: None,
            character: &character,
            options: corpus::SplitOptions::default(),
        })?;
        let ids = |n: usize| std::collections::BTreeSet::from([format!("s{n}")]);
        let split = Split {
            train: ids(0),
            val: ids(1),
            val_strict: ids(2),
            probe_x: [("s3".to_owned(), corpus::Language::En)].into(),
            contaminated: ids(4),
            filtered: [("s5".to_owned(), "a rule".to_owned())].into(),
            ..split
        };
        split.save(&folder.join("split.json"), true)?;
        Ok(Tokenizer::train([story.as_str()].into_iter(), 300)?)
    }

    #[test]
    fn nothing_but_the_train_side_of_its_language_is_trained() {
        let folder = tempfile::tempdir().unwrap();
        let tokenizer = built_story(folder.path()).unwrap();
        let recipe = "stage = \"cpt\"\nbase = \"x\"\n[data]\nsplit = \"split.json\"\nsources = [{ path = \"pt/everything\" }, { path = \"pt/everything/en.jsonl\" }]\n";
        let recipe = Recipe::parse(recipe, "test", &[]).unwrap();
        let split = load_split(&recipe, folder.path()).unwrap();
        let data = rows(
            &recipe,
            folder.path(),
            split.as_ref(),
            Some(&tokenizer),
            N_IDS,
        )
        .unwrap();
        let job = job(&recipe, data, None);
        let texts = |documents: &[Document]| -> Vec<String> {
            documents
                .iter()
                .map(|d| tokenizer.decode(&d.encoded.input_ids, true).unwrap())
                .collect()
        };
        assert_eq!(texts(&job.train), ["字0", "字3", "word0", "word0"]);
        let held_out: Vec<_> = job
            .validation
            .iter()
            .map(|set| (set.name.as_str(), texts(&set.documents)))
            .collect();
        let own = |texts: &[&str]| texts.iter().map(|t| (*t).to_owned()).collect::<Vec<_>>();
        assert_eq!(
            held_out,
            [
                ("val", own(&["字1", "word1"])),
                ("val-strict", own(&["字2", "word2"])),
                ("probe-x", own(&["word3"])),
            ]
        );
    }

    /// A source named twice weighs more, and a folder holds its files: without a split, too, no row is on both sides.
    #[test]
    fn row_in_two_sources_is_on_one_side() {
        let folder = tempfile::tempdir().unwrap();
        let rows_of = |from: usize, to: usize| -> String {
            (from..to)
                .map(|n| {
                    format!(
                        "{{\"input_ids\":[{n},{},1],\"labels\":[{n},{},1]}}\n",
                        n * 7,
                        n * 7
                    )
                })
                .collect()
        };
        std::fs::write(folder.path().join("a.jsonl"), rows_of(10, 110)).unwrap();
        std::fs::write(folder.path().join("b.jsonl"), rows_of(60, 160)).unwrap();
        let recipe = |seed: u64| {
            let text = format!(
                "stage = \"cpt\"\nbase = \"x\"\nseed = {seed}\n[data]\nvalidation_share = 0.3\n\
                 sources = [{{ path = \"a.jsonl\", weight = 2 }}, {{ path = \"b.jsonl\" }}, {{ path = \"a.jsonl\" }}]\n"
            );
            Recipe::parse(&text, "test", &[]).unwrap()
        };
        let held_out = |seed: u64| -> std::collections::BTreeSet<u32> {
            let data = rows(&recipe(seed), folder.path(), None, None, N_IDS).unwrap();
            let job = job(&recipe(seed), data, None);
            let first = |d: &Document| d.encoded.input_ids[0];
            let val: Vec<u32> = job.validation[0].documents.iter().map(first).collect();
            let train: Vec<u32> = job.train.iter().map(first).collect();
            assert!(val.iter().all(|row| !train.contains(row)));
            let of_150 = 150 - val.len();
            let trained: std::collections::BTreeSet<u32> = train.into_iter().collect();
            assert_eq!(trained.len(), of_150);
            assert!((20..70).contains(&val.len()), "{}", val.len());
            val.into_iter().collect()
        };
        assert_eq!(held_out(7), held_out(7));
        assert_ne!(held_out(7), held_out(8));
    }

    #[test]
    fn rows_that_no_manifest_lists_are_refused_with_a_split() {
        let folder = tempfile::tempdir().unwrap();
        let tokenizer = built_story(folder.path()).unwrap();
        let elsewhere = tempfile::tempdir().unwrap();
        let copy = elsewhere.path().join("en.jsonl");
        std::fs::copy(folder.path().join("pt/everything/en.jsonl"), &copy).unwrap();
        let recipe =
            format!("stage = \"cpt\"\nbase = \"x\"\n[data]\nsources = [{{ path = {copy:?} }}]\n");
        let recipe = Recipe::parse(&recipe, "test", &[]).unwrap();
        let split = Split::load(&folder.path().join("split.json")).unwrap();
        let rows = |split| rows(&recipe, folder.path(), split, Some(&tokenizer), N_IDS);
        let error = rows(Some(&split)).err().unwrap().to_string();
        assert!(error.contains("with a manifest.json beside it"), "{error}");
        assert!(rows(None).is_ok());
    }

    #[test]
    fn rows_that_are_all_held_out_are_said_to_be() {
        let folder = tempfile::tempdir().unwrap();
        let said = |rows: &str, share: f64| {
            std::fs::write(folder.path().join("a.jsonl"), rows).unwrap();
            let text = format!(
                "stage = \"cpt\"\nbase = \"x\"\n[data]\nvalidation_share = {share:?}\nsources = [{{ path = \"a.jsonl\" }}]\n"
            );
            let recipe = Recipe::parse(&text, "test", &[]).unwrap();
            let read = super::rows(&recipe, folder.path(), None, None, N_IDS);
            read.map(|data| data.train.len()).map_err(|error| {
                assert!(error.is::<crate::ui::Misuse>());
                error.to_string()
            })
        };
        let row = "{\"input_ids\":[1,2],\"labels\":[-100,2]}\n";
        let all = said(row, 1.0).unwrap_err();
        assert!(all.contains("data.validation_share = 1"), "{all}");
        assert!(all.contains("every row of data.sources (1)"), "{all}");
        assert_eq!(said(row, 0.0), Ok(1));
        let none = said("\n", 0.0).unwrap_err();
        assert!(none.contains("hold no row"), "{none}");
    }

    #[test]
    fn bad_rows_of_all_sources_are_named_together() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["a.jsonl", "b.jsonl"] {
            let rows = "{\"input_ids\":[1,2],\"labels\":[-100,2]}\n{\"input_ids\":[1,2],\"labels\":[-100,99999]}\n";
            std::fs::write(folder.path().join(name), rows).unwrap();
        }
        let text = "stage = \"cpt\"\nbase = \"x\"\n[data]\nsources = [{ path = \"a.jsonl\" }, { path = \"b.jsonl\" }, { path = \"a.jsonl\" }]\n";
        let recipe = Recipe::parse(text, "test", &[]).unwrap();
        let error = rows(&recipe, folder.path(), None, None, N_IDS);
        let said = error.err().unwrap().to_string();
        assert!(said.starts_with("2 rows cannot be used:"), "{said}");
        for place in ["a.jsonl:2: the label", "b.jsonl:2: the label"] {
            assert!(said.contains(place), "{said}");
        }
    }
}
