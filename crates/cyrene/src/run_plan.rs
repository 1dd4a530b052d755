//! What the stages of `live` will need, said before the first byte is fetched: download, disk, memory, time.
//!
//! Everything is reckoned from the story's text, the recipes and the shapes of the model; tokens are not counted, since the tokenizer may
//! still be to fetch.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::Result;
use corpus::Language;
use corpus::survey::Survey;
use kernel::Device;
use model::Config;
use serde::Serialize;
use train::needs::{StagePlan, Target};

use crate::machine::Machine;
use crate::recipe::Recipe;
use crate::stage::STAGE_MARK;
use crate::ui::{clock_of, size};

/// What is known before the run.
pub struct Ahead<'a> {
    /// Shape of the model.
    pub config: &'a Config,
    /// Whether the base comes over the network.
    pub downloads: bool,
    /// What the story holds.
    pub survey: &'a Survey,
    /// Bytes of text that a token of the vocabulary holds, about.
    pub bytes_per_token: f64,
    /// The first training.
    pub cpt: &'a Recipe,
    /// The second one.
    pub sft: &'a Recipe,
    /// Folder of the run: what its stages have written already needs no more room.
    pub run_dir: &'a Path,
}

/// The needs of all stages.
#[derive(Debug, Clone, Serialize)]
pub struct RunPlan {
    /// In their order.
    pub stages: Vec<Needs>,
    /// What the run's folder will hold.
    pub disk_bytes: u64,
    /// What it has yet to grow by.
    pub disk_missing_bytes: u64,
    /// Bytes from the network.
    pub download_bytes: u64,
    /// Seconds, about.
    pub eta_s: f64,
    /// Whether the disk has room for what is missing; true where that is not known.
    pub fits_disk: bool,
}

/// The needs of one stage, all of them estimates.
#[derive(Debug, Clone, Serialize)]
pub struct Needs {
    /// Of the stage.
    pub name: &'static str,
    /// Bytes from the network.
    pub download_bytes: u64,
    /// Bytes that are written.
    pub disk_bytes: u64,
    /// Seconds, about.
    pub eta_s: f64,
    /// Memory and tokens, of the stages that train.
    pub training: Option<StagePlan>,
}

impl RunPlan {
    /// Plans a run on a machine whose arithmetic does `flops` operations a second.
    ///
    /// # Errors
    /// A shape or recipe that no memory plan can be made of.
    pub fn new(
        ahead: &Ahead<'_>,
        machine: &Machine,
        target: Target,
        flops: f64,
    ) -> Result<RunPlan> {
        let n_params = ahead.config.n_params();
        let text: u64 = ahead.survey.text_bytes.values().sum();
        let weights = ahead.config.checkpoint_bytes();
        let cpt = training("cpt", ahead, ahead.cpt, target, flops)?;
        let sft = training("sft", ahead, ahead.sft, target, flops)?;
        // Both models look at what is held out and as much of what was trained on: a quarter of the text, forward alone.
        let scored = text as f64 / ahead.bytes_per_token / 4.0;
        let eval_s = 2.0 * 2.0 * n_params as f64 * scored / flops;
        let stage = |name, download_bytes, disk_bytes, eta_s| Needs {
            name,
            download_bytes,
            disk_bytes,
            eta_s,
            training: None,
        };
        let download = if ahead.downloads { weights } else { 0 };
        let stages = vec![
            stage("fetch", download, weights, 0.0),
            // Documents, conversations and the manifest.
            stage("corpus", 0, 3 * text, text as f64 / 2e6),
            cpt,
            sft,
            stage("eval", 0, 1 << 20, eval_s),
            // A byte a weight, but for embeddings and norms.
            stage("export", 0, weights * 2 / 3, 0.0),
        ];
        let sum = |of: fn(&Needs) -> u64| stages.iter().map(of).sum();
        let missing = stages.iter().map(|stage| stage.missing(ahead.run_dir));
        let disk_missing_bytes = missing.sum();
        Ok(RunPlan {
            disk_bytes: sum(|stage| stage.disk_bytes),
            disk_missing_bytes,
            download_bytes: sum(|stage| stage.download_bytes),
            eta_s: stages.iter().map(|stage| stage.eta_s).sum(),
            fits_disk: machine
                .disk_free_bytes
                .is_none_or(|free| disk_missing_bytes < free),
            stages,
        })
    }

    /// A line a stage, and one for all.
    pub fn describe(&self) -> String {
        let mut lines: Vec<String> = self.stages.iter().map(Needs::describe).collect();
        let there = match self.disk_missing_bytes == self.disk_bytes {
            true => String::new(),
            false => format!(" ({} of it still to come)", size(self.disk_missing_bytes)),
        };
        let room = match self.fits_disk {
            true => there,
            false => format!("{there}, MORE THAN THE DISK HAS FREE"),
        };
        lines.push(format!(
            "in all: about {} of disk{room}, {} to download, {} without the download (estimated; training says exactly)",
            size(self.disk_bytes),
            size(self.download_bytes),
            spoken(self.eta_s)
        ));
        lines.join("\n")
    }

    /// Why the run cannot go through, if it cannot.
    pub fn refusal(&self, machine: &Machine, device: Device) -> Option<String> {
        if !self.fits_disk {
            return Some(format!(
                "the run needs about {} more of disk, and {} are free; make room, or name another place with --runs",
                size(self.disk_missing_bytes),
                size(machine.disk_free_bytes.unwrap_or_default())
            ));
        }
        self.stages.iter().find_map(|stage| {
            let plan = stage.training.as_ref()?;
            let remedy = plan.remedy.as_ref()?;
            // What is free on a CPU changes; beyond the whole memory there is no hope.
            if device == Device::Cpu && plan.peak_bytes < machine.memory_bytes {
                return None;
            }
            let limit = plan.limit();
            // A key of a stage's recipe is set by its stage's name here.
            let remedy = remedy.replace(
                "tuner.kind = \"lora\"",
                &format!("--set {}.tuner.kind=lora", stage.name),
            );
            Some(format!(
                "stage {} needs {} of {} and has {}: {remedy}",
                stage.name,
                size(limit.needed_bytes),
                limit.what,
                size(limit.available_bytes)
            ))
        })
    }
}

impl Needs {
    /// What its folder in `run_dir` does not hold yet: nothing where the stage is done.
    fn missing(&self, run_dir: &Path) -> u64 {
        let folder = run_dir.join(self.name);
        match folder.join(STAGE_MARK).is_file() {
            true => 0,
            false => self.disk_bytes.saturating_sub(files::tree_bytes(&folder)),
        }
    }

    fn describe(&self) -> String {
        let mut parts = Vec::new();
        if let Some(plan) = &self.training {
            let limit = plan.limit();
            let (needed, available) = (size(limit.needed_bytes), size(limit.available_bytes));
            let verdict = match &plan.remedy {
                None => format!("fits in {available}"),
                Some(remedy) => format!("DOES NOT FIT in {available}: {remedy}"),
            };
            parts.push(format!("{needed} of {}, {verdict}", limit.what));
            let tokens = plan.tokens.unwrap_or_default();
            parts.push(format!("about {tokens} tokens"));
        }
        if self.download_bytes > 0 {
            parts.push(format!("{} to download", size(self.download_bytes)));
        }
        parts.push(format!("{} of disk", size(self.disk_bytes)));
        if self.eta_s >= 1.0 {
            parts.push(spoken(self.eta_s));
        }
        format!("{}: {}", self.name, parts.join(", "))
    }
}

fn spoken(seconds: f64) -> String {
    format!("about {}", clock_of(seconds))
}

fn training(
    name: &'static str,
    ahead: &Ahead<'_>,
    recipe: &Recipe,
    target: Target,
    flops: f64,
) -> Result<Needs> {
    let text_bytes = &ahead.survey.text_bytes;
    let all: u64 = text_bytes.values().sum();
    let share = match name {
        "cpt" => 1.0,
        // Her lines, and about as much again twice of what others say before them.
        _ => (3.0 * ahead.survey.character_bytes as f64 / all.max(1) as f64).min(1.0),
    };
    let epoch_tokens = epoch_bytes(recipe, text_bytes) * share / ahead.bytes_per_token;
    let run = recipe.planned(ahead.config);
    let plan = run.plan(name, epoch_tokens, target, Some(flops))?;
    let merged = match recipe.tuner.lora() {
        Some(_) => ahead.config.checkpoint_bytes(),
        None => 0,
    };
    Ok(Needs {
        name,
        download_bytes: 0,
        disk_bytes: run.disk_bytes() + merged,
        eta_s: plan.eta_s.unwrap_or_default(),
        training: Some(plan),
    })
}

/// Bytes of text that an epoch shows, by the weights of the sources: a file is its language, a folder all of them.
fn epoch_bytes(recipe: &Recipe, text_bytes: &BTreeMap<Language, u64>) -> f64 {
    let of = |path: &Path| -> u64 {
        // A folder may be called `pt`, and is not Portuguese.
        let file = path.extension().and(path.file_stem());
        let code = file.and_then(|stem| stem.to_str());
        match code.and_then(Language::from_code) {
            Some(language) => text_bytes.get(&language).copied().unwrap_or_default(),
            None => text_bytes.values().sum(),
        }
    };
    let sources = recipe.data.sources.iter();
    sources
        .map(|source| source.weight * of(&source.path) as f64)
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use model::sizes;

    fn plan(bytes_of_text: u64, free: Option<u64>) -> (RunPlan, Machine) {
        plan_in(Path::new("no/such/run"), bytes_of_text, free, "full")
    }

    fn plan_in(
        run_dir: &Path,
        bytes_of_text: u64,
        free: Option<u64>,
        tuner: &str,
    ) -> (RunPlan, Machine) {
        let config = Config::from_json(&sizes::config("4b").unwrap()).unwrap();
        let survey = Survey {
            n_scenes: 1,
            text_bytes: [(Language::En, bytes_of_text)].into(),
            character_bytes: bytes_of_text / 10,
            silent_ids: Vec::new(),
        };
        let recipe = |stage: &str| {
            let text = format!(
                "stage = \"{stage}\"\nbase = \"x\"\n[data]\nsources = [{{ path = \"pt\", weight = 2 }}, {{ path = \"pt/en.jsonl\" }}]\n[tuner]\nkind = \"{tuner}\"\n"
            );
            Recipe::parse(&text, "test", &[]).unwrap()
        };
        let mut machine = Machine::here(Path::new("."));
        machine.disk_free_bytes = free;
        let ahead = Ahead {
            config: &config,
            downloads: true,
            survey: &survey,
            bytes_per_token: 4.0,
            cpt: &recipe("cpt"),
            sft: &recipe("sft"),
            run_dir,
        };
        let target = Target::Cpu {
            free_bytes: 1 << 33,
        };
        (
            RunPlan::new(&ahead, &machine, target, 1e12).unwrap(),
            machine,
        )
    }

    #[test]
    fn a_run_counts_its_passes_its_weights_and_its_checkpoints() {
        let (plan, _) = plan(4_000_000, None);
        let stage = |name| plan.stages.iter().find(|stage| stage.name == name).unwrap();
        // Three passes of a million tokens.
        let cpt = stage("cpt").training.as_ref().unwrap();
        assert_eq!(cpt.tokens, Some(3_000_000));
        assert!(!cpt.fits && stage("cpt").eta_s > 3e6 * 6.0 * 4e9 / 1e12);
        // bf16 weights of four thousand million values.
        let weights = stage("fetch").download_bytes;
        assert!((8_000_000_000..9_000_000_000).contains(&weights));
        assert!(stage("cpt").disk_bytes > 10 * weights);
        assert_eq!(plan.download_bytes, weights);
        let text = plan.describe();
        assert_eq!(text.lines().count(), 7);
        assert!(text.contains("DOES NOT FIT in 8.0 GiB"), "{text}");
    }

    #[test]
    fn what_a_killed_run_has_written_needs_no_more_room() {
        let run = tempfile::tempdir().unwrap();
        let (fresh, _) = plan_in(run.path(), 4_000, None, "full");
        assert_eq!(fresh.disk_missing_bytes, fresh.disk_bytes);
        // Half of a stage lies there, deep in a folder; another one is done, and smaller than was reckoned.
        let checkpoint = run.path().join("fetch/model/checkpoints");
        std::fs::create_dir_all(&checkpoint).unwrap();
        std::fs::write(checkpoint.join("a"), [0; 1000]).unwrap();
        files::write(&run.path().join("export").join(STAGE_MARK), b"{}").unwrap();
        let export = fresh.stages.iter().find(|stage| stage.name == "export");
        let left = fresh.disk_bytes - 1000 - export.unwrap().disk_bytes;
        let (resumed, machine) = plan_in(run.path(), 4_000, Some(left + 1), "full");
        assert_eq!(resumed.disk_missing_bytes, left);
        assert!(resumed.fits_disk && resumed.describe().contains("still to come"));
        assert!(!plan_in(run.path(), 4_000, Some(left), "full").0.fits_disk);
        drop(machine);
    }

    #[test]
    fn an_adapter_is_counted_with_the_model_that_it_is_merged_into() {
        let (plan, _) = plan_in(Path::new("no/such/run"), 4_000, None, "lora");
        for name in ["cpt", "sft"] {
            let stage = plan.stages.iter().find(|stage| stage.name == name).unwrap();
            assert!(
                stage.disk_bytes > 8_000_000_000,
                "{name}: {}",
                stage.disk_bytes
            );
        }
    }

    #[test]
    fn what_cannot_fit_is_refused_before_the_download() {
        let (full, machine) = plan(4_000, Some(1 << 30));
        let refusal = full.refusal(&machine, Device::Cpu).unwrap();
        assert!(refusal.contains("1.0 GiB are free"), "{refusal}");
        let (roomy, mut machine) = plan(4_000, Some(1 << 50));
        machine.memory_bytes = 1 << 33;
        let refusal = roomy.refusal(&machine, Device::Cpu).unwrap();
        assert!(
            refusal.contains("stage cpt") && refusal.contains("--set cpt.tuner.kind=lora"),
            "{refusal}"
        );
        machine.memory_bytes = 1 << 50;
        assert_eq!(roomy.refusal(&machine, Device::Cpu), None);
    }
}
