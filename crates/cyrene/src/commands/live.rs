//! `cyrene live`: the stages in order, each in its folder, each skipped when nothing that it depends on has changed.

use std::path::{Path, PathBuf};

use ::train::RunLock;
use ::train::from_seed;
use ::train::launch;
use ::train::needs::Target;
use ::train::ranks::Ranks;
use anyhow::{Context, Result};
use corpus::survey::Survey;
use corpus::{
    BuildRequest, Character, SourceKind, SplitOptions, SplitRequest, Task, Tokenizers,
    WeightedSource,
};
use eval::TrainedRows;
use files::outside;
use kernel::{DType, Device, timing};
use model::quant::fp8_block::{Division, Layout};
use model::{Config, Model, sizes};
use serde_json::{Value, json};
use text::WordPattern;

use crate::cli::{DTypeArg, Live, ModelArgs, StageName};
use crate::commands::{
    corpus as corpus_command, eval as eval_command, export, fetch, merge, serve, train,
};
use crate::machine::Machine;
use crate::recipe::Recipe;
use crate::recipe_inputs;
use crate::run_plan::{Ahead, RunPlan};
use crate::stage::Stage;
use crate::ui::{Misuse, Ui, misused, of_eval};
use crate::{demo, env, load, misuse};

/// The character file as a training's folder keeps it, beside the recipe that names it.
const CHARACTER: &str = "character.toml";
/// Seed of everything in a run that a recipe does not seed.
const SEED: u64 = 7;

/// Runs the command; the error is a [`crate::ui::Misuse`] where the arguments are at fault.
pub fn run(args: &Live, ui: &Ui) -> Result<()> {
    if misused(launch::from_env(&env::get))?.is_some_and(|launch| launch.n_ranks > 1) {
        misuse!(
            "`live` runs as one process; prepare the data with `live --until corpus`, then start `cyrene train RECIPE` with the launcher"
        );
    }
    let device = load::device_within(&args.device.device, &args.memory)?;
    let access = match last_stage(args) {
        StageName::Serve => Some(serve::access(&args.access, &args.address, ui)?),
        _ => None,
    };
    let mut live = Run::new(args, device, *ui)?;
    let lock = misused(RunLock::take(&live.dir))?;
    let last = live.last;
    let stages: [(StageName, Work); 7] = [
        (StageName::Doctor, Run::doctor),
        (StageName::Fetch, Run::fetch),
        (StageName::Corpus, Run::corpus),
        (StageName::Cpt, Run::cpt),
        (StageName::Sft, Run::sft),
        (StageName::Eval, Run::eval),
        (StageName::Export, Run::export),
    ];
    for (name, stage) in stages.into_iter().take_while(|(name, _)| *name <= last) {
        let started = std::time::Instant::now();
        stage(&mut live)?;
        tracing::debug!(?name, seconds = started.elapsed().as_secs_f64(), "stage");
    }
    let Some(access) = access else {
        return ui.result(&json!({ "run": live.dir, "stages": live.done }), || {
            format!(
                "{} in {}",
                live.done
                    .iter()
                    .map(|stage| stage["stage"].as_str().unwrap_or(""))
                    .collect::<Vec<_>>()
                    .join(", "),
                live.dir.display()
            )
        });
    };
    // What is served is only read.
    drop(lock);
    ui.note("[8/8] serve: the page to talk on, and the API");
    let model = ModelArgs {
        model: live.fp8(),
        adapter: None,
        dtype: DTypeArg::F32,
        device: crate::cli::Device {
            device: args.device.device.clone(),
        },
    };
    serve::serve(
        &serve::Serving {
            model: &model,
            address: &args.address,
            name: Some(&live.name),
            profile: None,
            character: None,
            max_sequences: 4,
            context: None,
            access: &access,
            allowed_origins: ::serve::AllowedOrigins::default(),
        },
        ui,
    )
}

/// The last stage that the command line asks for.
fn last_stage(args: &Live) -> StageName {
    match args.no_serve {
        true => args.until.min(StageName::Export),
        false => args.until,
    }
}

/// One stage's work.
type Work = fn(&mut Run) -> Result<()>;

/// A run's folder, what it is made from, and how far it is.
struct Run {
    ui: Ui,
    device: Device,
    dir: PathBuf,
    name: String,
    story: PathBuf,
    character_path: PathBuf,
    character: Character,
    survey: Survey,
    size: String,
    base: Option<String>,
    /// Whether the base is made here, with a tokenizer learned from the story.
    from_seed: bool,
    set: Vec<String>,
    /// Where the run ends.
    last: StageName,
    /// Key of the last stage: what comes after depends on it.
    key: String,
    done: Vec<Value>,
}

impl Run {
    fn new(args: &Live, device: Device, ui: Ui) -> Result<Self> {
        let name = match (&args.name, &args.character) {
            (Some(name), _) => name.clone(),
            (None, Some(path)) => path
                .file_stem()
                .and_then(|stem| stem.to_str())
                .unwrap_or("run")
                .to_owned(),
            (None, None) => "demo".to_owned(),
        };
        let dir = args.runs.join(&name);
        std::fs::create_dir_all(&dir).with_context(|| format!("making {}", dir.display()))?;
        let (story, character_path) = match (&args.story, &args.character) {
            (Some(story), Some(character)) => (story.clone(), character.clone()),
            _ => {
                // The bundled story becomes a file like any other.
                let (story, character) = (dir.join("story.jsonl"), dir.join("character.toml"));
                files::write(&story, demo::STORY.as_bytes())?;
                files::write(&character, demo::CHARACTER.as_bytes())?;
                (story, character)
            }
        };
        if !story.exists() {
            misuse!(
                "{} does not exist; --story names a story file or folder (docs/story-format.md)",
                story.display()
            );
        }
        let misuse = |error: corpus::Error| anyhow::Error::new(Misuse(error.to_string()));
        let character = Character::load(&character_path).map_err(misuse)?;
        load::character(&character_path)?;
        if let Some(base) = &args.base
            && !Path::new(base).is_dir()
            && !recipe_inputs::may_be_of_the_hub(base, Path::new(""))
        {
            misuse!(
                "--base {base} is no folder, and no Hub id either; expected a model's folder, or owner/name such as Qwen/Qwen3.5-4B-Base"
            );
        }
        let survey = corpus::survey::survey(&story, &character).map_err(misuse)?;
        if !survey.silent_ids.is_empty() {
            ui.note(format_args!(
                "warning: nobody in the story has the speaker ids {} of {}",
                survey.silent_ids.join(", "),
                character_path.display()
            ));
        }
        let run = Run {
            device,
            ui,
            dir,
            name,
            story,
            character_path,
            character,
            survey,
            size: args.size.clone(),
            base: args.base.clone(),
            from_seed: args.from_seed
                || (args.base.is_none() && sizes::is_never_released(&args.size)),
            set: args.set.clone(),
            last: last_stage(args),
            key: String::new(),
            done: Vec::new(),
        };
        for stage in ["cpt", "sft"] {
            recipe_inputs::check(&run.recipe(stage)?)?;
        }
        Ok(run)
    }

    /// Runs `work` unless its result is there; `inputs` and the stages before decide.
    fn stage(
        &mut self,
        number: u32,
        name: &'static str,
        inputs: Value,
        work: impl FnOnce(&Self, &Path) -> Result<Value>,
    ) -> Result<()> {
        let stage = self.keyed(name, inputs);
        self.run_stage(number, stage, work)
    }

    fn keyed(&self, name: &'static str, inputs: Value) -> Stage {
        let inputs = json!({ "before": self.key, "inputs": inputs });
        Stage::new(&self.dir, name, inputs)
    }

    fn run_stage(
        &mut self,
        number: u32,
        stage: Stage,
        work: impl FnOnce(&Self, &Path) -> Result<Value>,
    ) -> Result<()> {
        let name = stage.name;
        let cached = stage.is_cached();
        let mut outcome = Value::Null;
        if cached {
            self.ui.note(format_args!(
                "[{number}/8] {name}: cached (made before, and nothing that it depends on has changed)"
            ));
        } else {
            self.ui
                .note(format_args!("[{number}/8] {name}: {}", purpose(name)));
            let started = std::time::Instant::now();
            stage.begin()?;
            outcome = work(self, &stage.dir).with_context(|| format!("stage {name}"))?;
            stage.finish()?;
            self.ui.note(format_args!(
                "[{number}/8] {name}: done in {}",
                crate::ui::clock(started.elapsed())
            ));
        }
        self.key = stage.key;
        self.done
            .push(json!({ "stage": name, "cached": cached, "dir": stage.dir, "outcome": outcome }));
        Ok(())
    }

    fn doctor(&mut self) -> Result<()> {
        // What a machine has may change between two starts: never cached, and nothing depends on it.
        self.ui
            .note("[1/8] doctor: this machine, and what the run will need");
        let mut machine = Machine::here(&self.dir);
        machine.device = self.device.to_string();
        for line in machine.describe().lines() {
            self.ui.note(format_args!("      {line}"));
        }
        let plan = self.plan(&machine)?;
        for line in plan.describe().lines() {
            self.ui.note(format_args!("      {line}"));
        }
        if let (true, Some(refusal)) = (
            self.last > StageName::Corpus,
            plan.refusal(&machine, self.device),
        ) {
            misuse!("{refusal}");
        }
        self.done
            .push(json!({ "stage": "doctor", "cached": false, "outcome": machine, "plan": plan }));
        Ok(())
    }

    /// What the stages will need, from the story's text and the shapes of the model.
    fn plan(&self, machine: &Machine) -> Result<RunPlan> {
        let local = self
            .base
            .as_ref()
            .map(Path::new)
            .filter(|base| base.is_dir());
        let vocabulary = sizes::vocabulary(&self.size);
        let config = match local {
            Some(folder) => Config::load(folder)?,
            None => {
                let json = match self.from_seed {
                    true => sizes::config_for(&self.size, vocabulary, 0),
                    false => sizes::config(&self.size),
                };
                Config::from_json(&json.context("a size without a shape")?)?
            }
        };
        let (mut cpt, mut sft) = (self.recipe("cpt")?, self.recipe("sft")?);
        self.point_to_corpus(&mut cpt, "pt/everything");
        self.point_to_corpus(&mut sft, "sft/cyrene");
        let ahead = Ahead {
            config: &config,
            downloads: !self.from_seed && local.is_none() && !self.base_model().is_dir(),
            survey: &self.survey,
            // Seen on the demo's story and on the released vocabulary.
            bytes_per_token: if self.from_seed { 3.0 } else { 4.2 },
            cpt: &cpt,
            sft: &sft,
            run_dir: &self.dir,
        };
        let target = Target::here(self.device, machine.memory_free_bytes)?;
        RunPlan::new(&ahead, machine, target, timing::matmul_flops(self.device)?)
    }

    /// The base model: fetched, or a tokenizer trained on the story and weights from a seed.
    fn fetch(&mut self) -> Result<()> {
        let released = || sizes::hub_id(&self.size).map(str::to_owned);
        let base = match self.from_seed {
            true => None,
            false => self.base.clone().or_else(released),
        };
        let inputs = match &base {
            // A base on this disk may be trained anew in its place.
            Some(base) if Path::new(base).is_dir() => {
                json!({ "base": base, "sha256": recipe_inputs::sha256_of_model(Path::new(base))? })
            }
            Some(base) => json!({ "base": base }),
            None => {
                json!({ "size": self.size, "story": corpus::story_sha256(&self.story)?, "character": files::sha256_of(&self.character_path)?, "seed": SEED })
            }
        };
        self.stage(2, "fetch", inputs, |run, dir| {
            let folder = dir.join("model");
            match base {
                Some(base) if Path::new(&base).is_dir() => {
                    files::link_files(Path::new(&base), &folder)?
                }
                Some(base) => {
                    fetch::fetch(&base, "main", &folder, &run.ui)?;
                }
                None => make_base(run, &folder)?,
            }
            Ok(json!({ "model": folder }))
        })
    }

    fn corpus(&mut self) -> Result<()> {
        let inputs = json!({ "story": corpus::story_sha256(&self.story)?, "character": files::sha256_of(&self.character_path)?, "seed": SEED });
        self.stage(3, "corpus", inputs, |run, dir| {
            let tasks = [Task::PtEverything, Task::SftCyrene];
            let request = BuildRequest {
                source: SourceKind::Story,
                root: &run.story,
                character: &run.character,
                tasks: &tasks,
                languages: None,
                out: dir,
            };
            let load = || Tokenizers::load(&run.base_model(), WordPattern::Qwen2);
            let report = corpus_command::build::build(&request, load, &run.ui)?;
            let split = run.split()?;
            split.save(&dir.join("split.json"), true)?;
            for (task, dataset) in &report.datasets {
                let training = dataset.training().map_or(String::new(), |training| {
                    format!(
                        ", {} as training reads them with system prompt and template",
                        training.tokens
                    )
                });
                run.ui.note(format_args!(
                    "      {task}: {} rows, {} tokens{training}",
                    dataset.n_rows(),
                    dataset.n_tokens()
                ));
            }
            for line in split.describe().lines() {
                run.ui.note(format_args!("      {line}"));
            }
            Ok(json!({ "tokens": report.n_tokens(), "split": split.report }))
        })
    }

    fn cpt(&mut self) -> Result<()> {
        let mut recipe = self.recipe("cpt")?;
        recipe.base = "../fetch/model".to_owned();
        self.point_to_corpus(&mut recipe, "pt/everything");
        let inputs = json!({ "recipe": recipe });
        self.stage(4, "cpt", inputs, |run, dir| {
            Ok(serde_json::to_value(run.train_and_merge(&recipe, dir)?)?)
        })
    }

    fn sft(&mut self) -> Result<()> {
        let mut recipe = self.recipe("sft")?;
        recipe.base = "../cpt/model".to_owned();
        self.point_to_corpus(&mut recipe, "sft/cyrene");
        let inputs = json!({ "recipe": recipe });
        self.stage(5, "sft", inputs, |run, dir| {
            Ok(serde_json::to_value(run.train_and_merge(&recipe, dir)?)?)
        })
    }

    fn eval(&mut self) -> Result<()> {
        self.stage(6, "eval", json!({ "seed": SEED }), |run, dir| {
            let folder = run.dir.join("sft/model");
            let asked = eval_command::Asked {
                folder: &folder,
                adapter: None,
                trained: of_eval(TrainedRows::read(&folder))?,
                split: &run.dir.join("corpus/split.json"),
                out: dir,
                n_replies: 4,
                seed: SEED,
                profile: None,
                languages: Vec::new(),
                persona: load::persona(&folder, None, None)?,
            };
            // As trained: in f32 a model would take twice the room.
            let dtype = match run.device {
                Device::Cpu => DType::F32,
                Device::Cuda(_) => run.recipe("cpt")?.dtype.dtype(),
            };
            let load = |folder: &Path| Ok(Model::load(folder, dtype)?.to_device(run.device)?);
            let base = || load(&run.base_model());
            let report = eval_command::evaluate(&asked, || load(&folder), Some(base), &run.ui)?;
            for line in eval_command::describe(&report, dir).lines() {
                run.ui.note(format_args!("      {line}"));
            }
            Ok(json!({ "red_flag": report.red_flag, "report": dir.join("report.html") }))
        })
    }

    fn export(&mut self) -> Result<()> {
        let inputs = json!({ "format": "fp8-block", "division": "f32" });
        // Who serves the last export goes on until there is a new one.
        let stage = self.keyed("export", inputs).replacing();
        self.run_stage(7, stage, |run, _| {
            let (from, to) = (run.dir.join("sft/model"), run.fp8());
            export::fp8(&from, &to, Layout::CompressedTensors, Division::F32)?;
            let (before, after) = (files::folder_bytes(&from)?, files::folder_bytes(&to)?);
            run.ui.note(format_args!(
                "      {} -> {}",
                crate::ui::size(before),
                crate::ui::size(after)
            ));
            Ok(json!({ "folder": to, "source_bytes": before, "bytes": after }))
        })
    }

    /// The held-out split of the story: the same whenever it is asked for.
    fn split(&self) -> Result<corpus::Split> {
        let options = SplitOptions {
            seed: SEED,
            ..SplitOptions::default()
        };
        Ok(corpus::make_split(&SplitRequest {
            source: SourceKind::Story,
            root: &self.story,
            vendor: None,
            character: &self.character,
            options,
        })?)
    }

    fn base_model(&self) -> PathBuf {
        self.dir.join("fetch/model")
    }

    fn fp8(&self) -> PathBuf {
        self.dir.join("export/fp8-block")
    }

    /// The bundled recipe for a stage of this size with this run's `--set stage.key=value` changes.
    fn recipe(&self, stage: &str) -> Result<Recipe> {
        let name = &match self.from_seed {
            true if self.size == sizes::TINY => format!("tiny-{stage}"),
            true => format!("small-{stage}"),
            false => stage.to_owned(),
        };
        let text =
            super::recipe::bundled(name).with_context(|| format!("no bundled recipe {name}"))?;
        let mut set = Vec::new();
        for change in &self.set {
            match change.split_once('.') {
                Some(("cpt" | "sft", _)) => set.extend(
                    change
                        .strip_prefix(stage)
                        .and_then(|rest| rest.strip_prefix('.'))
                        .map(str::to_owned),
                ),
                _ => misuse!("--set {change}: expected cpt.KEY=VALUE or sft.KEY=VALUE"),
            }
        }
        Recipe::parse(text, name, &set)
    }

    /// Trains, and merges the adapter where one was trained: the next stage starts from `model`.
    fn train_and_merge(&self, recipe: &Recipe, dir: &Path) -> Result<train::Trained> {
        let trained = self.train(recipe, dir)?;
        let merged = dir.join("model");
        if trained.summary.result != merged {
            merge::merge(&dir.join(&recipe.base), &trained.summary.result, &merged)?;
        }
        Ok(trained)
    }

    /// Trains by this one process, in the stage's folder.
    fn train(&self, recipe: &Recipe, dir: &Path) -> Result<train::Trained> {
        let character = outside::read(&self.character_path, outside::MOST_SETTINGS_BYTES)
            .with_context(|| format!("reading {}", self.character_path.display()))?;
        files::write(&dir.join(CHARACTER), &character)?;
        let options = train::RunOptions {
            device: self.device,
            ranks: &Ranks::alone(),
            rows_at_once: None,
            force: false,
        };
        train::train(recipe, dir, dir, &options, &self.ui)
    }

    /// The recipe's mixture on this run's data set: all languages, and single ones once more where the character has them. A story has
    /// no vendor pages, so that source falls away.
    fn point_to_corpus(&self, recipe: &mut Recipe, task: &str) {
        recipe.character = Some(CHARACTER.into());
        recipe.data.split = Some("../corpus/split.json".into());
        let folder = Path::new("../corpus").join(task);
        let languages = self.character.languages();
        let moved = recipe.data.sources.iter().filter_map(|source| {
            let is_file = source.path.extension().is_some();
            let code = source.path.file_stem()?.to_str()?;
            let path = match corpus::Language::from_code(code) {
                Some(language) if is_file && languages.contains(&language) => {
                    folder.join(format!("{code}.jsonl"))
                }
                _ if is_file => return None,
                _ => folder.clone(),
            };
            Some(WeightedSource {
                path,
                weight: source.weight,
            })
        });
        recipe.data.sources = moved.collect();
    }
}

/// A base whose vocabulary and weights come from this run alone.
fn make_base(run: &Run, folder: &Path) -> Result<()> {
    let request = BuildRequest {
        source: SourceKind::Story,
        root: &run.story,
        character: &run.character,
        tasks: &[Task::PtEverything],
        languages: None,
        out: &folder.with_file_name("texts"),
    };
    let texts = corpus::training_texts(&request, &run.split()?)?;
    let made = from_seed::make(folder, &run.size, SEED, &texts)?;
    run.ui.note(format_args!(
        "      {} parameters, random from seed {SEED}; a vocabulary of {} tokens learned from {} texts",
        made.n_params,
        made.vocab_size,
        texts.len()
    ));
    Ok(())
}

/// What a stage is for, in words for people.
fn purpose(stage: &str) -> &'static str {
    match stage {
        "fetch" => "the model to start from",
        "corpus" => "texts and conversations from the story, a part held out to test with",
        "cpt" => "learning the story's language (continued pre-training)",
        "sft" => "learning to answer as the character (fine-tuning on her conversations)",
        "eval" => "testing on what was held out",
        _ => "smaller weights for the server (FP8)",
    }
}
