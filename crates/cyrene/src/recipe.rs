//! A recipe: one TOML file that says what to train, on what, and how. Unknown keys are refused with the nearest known one named.
//!
//! [`keys`] lists all keys with their defaults and meanings: `cyrene recipe` prints them, the check for unknown keys reads them. Those that
//! training reads are declared with their structs (`train::recipe_table`); a test holds the others against theirs.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use corpus::examples::TrainingStage;
use corpus::{Mixture, WeightedSource};
use files::outside;
use model::Config;
use serde::{Deserialize, Serialize};
use text::labels::LossScale;
use text::pack::Packing;
use toml::{Table, Value};
use train::job::{BatchConfig, DataConfig, LoraTuner, OptimizerConfig, RunConfig, TunerConfig};
use train::needs::PlannedRun;
use train::recipe_table::Key;

use crate::misuse;

/// The whole file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// Documents or conversations.
    pub stage: TrainingStage,
    /// A folder, relative to the recipe, or a Hub id.
    pub base: String,
    /// Of order, dropout, adapters and rounding.
    #[serde(default = "default_seed")]
    pub seed: u64,
    /// Number type of the weights.
    #[serde(default)]
    pub dtype: Storage,
    /// Character file whose persona goes with the weights.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub character: Option<PathBuf>,
    /// Table `[data]`.
    pub data: Data,
    /// Table `[tuner]`.
    #[serde(default)]
    pub tuner: TunerConfig,
    /// Table `[optimizer]`.
    #[serde(default)]
    pub optimizer: OptimizerConfig,
    /// Table `[batch]`.
    #[serde(default)]
    pub batch: BatchConfig,
    /// Table `[run]`.
    #[serde(default)]
    pub run: RunConfig,
}

/// Storage of weights and activations while training.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Storage {
    #[default]
    F32,
    Bf16,
}

impl Storage {
    /// As the kernels call it.
    pub fn dtype(self) -> kernel::DType {
        match self {
            Storage::F32 => kernel::DType::F32,
            Storage::Bf16 => kernel::DType::Bf16,
        }
    }
}

/// `[data]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Data {
    /// Tokens of a row.
    #[serde(default = "default_row_tokens")]
    pub row_tokens: usize,
    /// How documents fill rows.
    #[serde(default = "default_packing")]
    pub packing: Packing,
    /// What is trained on.
    pub sources: Vec<WeightedSource>,
    /// `split.json`, relative to the recipe.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub split: Option<PathBuf>,
    /// Share of rows held out where there is no split.
    #[serde(default = "default_validation_share")]
    pub validation_share: f64,
    /// Most held-out tokens that a validation reads.
    #[serde(default = "default_validation_tokens")]
    pub validation_tokens: usize,
    /// Which parts of answers carry loss.
    #[serde(default)]
    pub loss_scale: LossScale,
}

fn default_seed() -> u64 {
    7
}

fn default_row_tokens() -> usize {
    DataConfig::default().row_tokens
}

fn default_packing() -> Packing {
    DataConfig::default().packing
}

fn default_validation_share() -> f64 {
    0.02
}

fn default_validation_tokens() -> usize {
    100_000
}

/// Keys of the file itself.
const OWN_KEYS: &[Key] = &[
    Key::required(
        "stage",
        "\"cpt\"",
        "cpt: loss on all text; sft: loss on what the assistant says",
    ),
    Key::required(
        "base",
        "\"Qwen/Qwen3.5-4B-Base\"",
        "model to start from: a Hugging Face folder (relative to this file) or a Hub id that `cyrene fetch` got",
    ),
    Key::with_default(
        "seed",
        "7",
        "order of documents, adapter initialisation, dropout",
    ),
    Key::with_default(
        "dtype",
        "\"f32\"",
        "storage of weights and activations: f32 or bf16; sums are f32 either way",
    ),
    Key::optional(
        "character",
        "\"../characters/ovelle.toml\"",
        "whose name, system prompt, greeting and profile the result carries (persona.json); default is the base's",
    ),
];

/// Keys of `[data]` beside those that training reads.
const DATA_KEYS: &[Key] = &[
    Key::required(
        "data.sources",
        "[{ path = \"corpora/pt/amphoreus\", weight = 3 }, { path = \"corpora/pt/amphoreus/chs.jsonl\", weight = 1 }]",
        "files of rows or folders of them (docs/rows.md); a weight of n is n passes an epoch, reshuffled each time",
    ),
    Key::optional(
        "data.split",
        "\"corpora/split.json\"",
        "scenes held out for validation, as `cyrene corpus split` wrote them",
    ),
    Key::with_default(
        "data.validation_share",
        "0.02",
        "without data.split: share of the documents held out by seed and text; 0 for none",
    ),
    Key::with_default(
        "data.validation_tokens",
        "100000",
        "tokens of each held-out side scored during training, documents drawn by seed; `cyrene eval` scores all",
    ),
    Key::with_default(
        "data.loss_scale",
        "\"ignore_empty_think\"",
        "sft: ignore_empty_think, default (the empty think block carries loss too) or last_round",
    ),
];

/// Every key there is, in the order of the reference; those that training reads stand beside their structs.
fn keys() -> impl Iterator<Item = &'static Key> {
    [
        OWN_KEYS,
        DataConfig::KEYS,
        DATA_KEYS,
        &[TunerConfig::KIND],
        LoraTuner::KEYS,
        OptimizerConfig::KEYS,
        BatchConfig::KEYS,
        RunConfig::KEYS,
    ]
    .into_iter()
    .flatten()
}

impl Recipe {
    /// Reads a recipe file and applies `--set key=value` changes.
    ///
    /// # Errors
    /// [`crate::ui::Misuse`] for a missing file, broken TOML, unknown keys or values of the wrong type, with line and key.
    pub fn load(path: &Path, set: &[String]) -> Result<Self> {
        let text = match outside::read_text(path) {
            Ok(text) => text,
            Err(error) => misuse!(
                "cannot read recipe {}: {error}; `cyrene recipe` prints one to start from",
                path.display()
            ),
        };
        Self::parse(&text, &path.display().to_string(), set)
    }

    /// As `load`, from text; `name` stands in messages for the file.
    ///
    /// # Errors
    /// As `load`.
    pub fn parse(text: &str, name: &str, set: &[String]) -> Result<Self> {
        let mut table: Table = match text.parse() {
            Ok(table) => table,
            Err(error) => misuse!("{name} is not TOML: {error}"),
        };
        for change in set {
            apply(&mut table, change)?;
        }
        refuse_unknown(&table, text, name)?;
        match table.try_into() {
            Ok(recipe) => Ok(recipe),
            Err(error) => misuse!("{name}: {error}"),
        }
    }

    /// The same recipe for another folder: its paths, relative to `from`, lead to the same places from `to`. Both folders are there. A
    /// base that is no folder is a Hub id and stays.
    ///
    /// # Errors
    /// A place that is not there any more.
    pub fn moved(&self, from: &Path, to: &Path) -> Result<Recipe> {
        let mut moved = self.clone();
        if from == to {
            return Ok(moved);
        }
        if from.join(&self.base).is_dir() {
            moved.base = files::relative(&from.join(&self.base), to)?;
        }
        for source in &mut moved.data.sources {
            source.path = files::relative(&from.join(&source.path), to)?.into();
        }
        for path in [&mut moved.data.split, &mut moved.character]
            .into_iter()
            .flatten()
        {
            *path = files::relative(&from.join(&*path), to)?.into();
        }
        Ok(moved)
    }

    /// What training is fed with; the paths are relative to `folder`, the recipe's.
    pub fn mixture<'a>(&'a self, folder: &'a Path) -> Mixture<'a> {
        Mixture {
            folder,
            sources: &self.data.sources,
            split: self.data.split.as_deref(),
            validation_share: self.data.validation_share,
            validation_tokens: self.data.validation_tokens,
            seed: self.seed,
        }
    }

    /// The training of a model of this shape, for those who ask what it needs.
    pub fn planned<'a>(&'a self, config: &'a Config) -> PlannedRun<'a> {
        PlannedRun {
            config,
            dtype: self.dtype.dtype(),
            row_tokens: self.data.row_tokens,
            tuner: &self.tuner,
            batch: &self.batch,
            run: &self.run,
        }
    }

    /// The recipe with every default filled in, as TOML.
    ///
    /// # Errors
    /// None in practice: every value has a TOML form.
    pub fn resolved(&self) -> Result<String> {
        toml::to_string(self).context("writing the recipe as TOML")
    }
}

/// Sets a dotted key to a TOML value (a bare word is taken as a string).
fn apply(table: &mut Table, change: &str) -> Result<()> {
    let Some((path, text)) = change.split_once('=') else {
        misuse!("--set {change}: expected KEY=VALUE, e.g. optimizer.lr=1e-5");
    };
    let value = match format!("v = {text}").parse::<Table>() {
        Ok(mut parsed) => parsed.remove("v").unwrap_or(Value::Boolean(false)),
        Err(_) => Value::String(text.to_owned()),
    };
    let mut table = table;
    let mut parts = path.trim().split('.').peekable();
    while let Some(part) = parts.next() {
        if parts.peek().is_none() {
            // An integer stands for a float where the key wants one; serde's f64 accepts it.
            table.insert(part.to_owned(), value);
            return Ok(());
        }
        let entry = table
            .entry(part.to_owned())
            .or_insert_with(|| Value::Table(Table::new()));
        let Value::Table(inner) = entry else {
            misuse!("--set {change}: `{part}` is not a table");
        };
        table = inner;
    }
    Ok(())
}

/// The line, from 1, on which a key or a table stands in a recipe's text; none for what `--set` brings.
fn line_of(path: &str, source: &str) -> Option<usize> {
    let mut table = String::new();
    for (at, line) in source.lines().enumerate() {
        let line = line.trim();
        if let Some(name) = line
            .strip_prefix('[')
            .and_then(|rest| rest.split(']').next())
        {
            table = format!("{}.", name.trim());
            if path == name.trim() {
                return Some(at + 1);
            }
        }
        let key = line.split('=').next().unwrap_or_default().trim();
        if format!("{table}{key}") == path {
            return Some(at + 1);
        }
    }
    None
}

fn refuse_unknown(table: &Table, source: &str, name: &str) -> Result<()> {
    let known: Vec<&str> = keys().map(|key| key.path).collect();
    let tables: Vec<&str> = known
        .iter()
        .filter_map(|path| path.split_once('.').map(|(table, _)| table))
        .collect();
    let check = |path: String| -> Result<()> {
        if known.contains(&path.as_str()) {
            return Ok(());
        }
        if tables.contains(&path.as_str()) {
            misuse!(
                "`{path}` in {name} is a table: write [{path}] and its keys below (`cyrene recipe` lists every key)"
            );
        }
        let place = line_of(&path, source).map_or(String::new(), |line| format!(":{line}"));
        let near = text::near::nearest(&path, known.iter().chain(&tables).copied()).unwrap_or("");
        misuse!(
            "unknown key `{path}` in {name}{place}; did you mean `{near}`? (`cyrene recipe` lists every key)"
        );
    };
    for (key, value) in table {
        match value {
            Value::Table(inner) if tables.contains(&key.as_str()) => {
                for inner_key in inner.keys() {
                    check(format!("{key}.{inner_key}"))?;
                }
            }
            _ => check(key.clone())?,
        }
    }
    Ok(())
}

/// Every key with its default and meaning, as a recipe that can be edited and run.
pub fn reference() -> String {
    let mut out = String::from(
        "# Every key of a recipe. Keys behind `#` are absent by default; the value shown is an example.\n",
    );
    let mut table = "";
    for key in keys() {
        let (in_table, name) = key.path.split_once('.').unwrap_or(("", key.path));
        if in_table != table {
            out.push_str(&format!("\n[{in_table}]\n"));
            table = in_table;
        }
        let mark = if key.optional { "# " } else { "" };
        let need = if key.required { " (required)" } else { "" };
        out.push_str(&format!(
            "# {}{need}\n{mark}{name} = {}\n",
            key.doc, key.value
        ));
    }
    out
}

/// A recipe file with the meaning of each key it sets behind the key.
pub fn explain(text: &str) -> String {
    let mut table = String::new();
    let mut out = String::new();
    for line in text.lines() {
        if let Some(name) = line
            .trim()
            .strip_prefix('[')
            .and_then(|rest| rest.strip_suffix(']'))
        {
            table = format!("{name}.");
        }
        let name = line.split('=').next().unwrap_or("").trim();
        let path = format!("{table}{name}");
        if let Some(key) = keys().find(|key| key.path == path && line.contains('=')) {
            out.push_str(&format!("# {}\n", key.doc));
        }
        out.push_str(line);
        out.push('\n');
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unknown_key_is_named_on_its_own_line() {
        let refusal = |text: &str, set: &[String]| {
            let text = format!("stage = \"cpt\"\nbase = \"x\"\n{text}");
            let error = Recipe::parse(&text, "r.toml", set).unwrap_err();
            error.to_string()
        };
        let said = refusal("[batch]\nrows = 3\n[tuner]\nrows = 1\n", &[]);
        assert!(said.contains("`tuner.rows` in r.toml:6;"), "{said}");
        // What the command line brings is on no line.
        let said = refusal("[batch]\nrows = 3\n", &["batch.row=2".to_owned()]);
        assert!(
            said.contains("`batch.row` in r.toml;") && said.contains("`batch.rows`"),
            "{said}"
        );
        let said = refusal("optimizer = 3\n", &[]);
        assert!(said.contains("is a table: write [optimizer]"), "{said}");
    }

    #[test]
    fn recipe_leads_to_the_same_places_from_another_folder() {
        let dir = tempfile::tempdir().unwrap();
        let [recipes, data, run] = ["recipes", "data/pt", "runs/a"].map(|name| {
            let folder = dir.path().join(name);
            std::fs::create_dir_all(&folder).unwrap();
            folder
        });
        for file in [
            data.join("en.jsonl"),
            data.join("split.json"),
            recipes.join("bo.toml"),
        ] {
            std::fs::write(file, "").unwrap();
        }
        let text = "stage = \"cpt\"\nbase = \"../data\"\ncharacter = \"bo.toml\"\n[data]\nsplit = \"../data/pt/split.json\"\nsources = [{ path = \"../data/pt\" }, { path = \"../data/pt/en.jsonl\", weight = 2 }]\n";
        let recipe = Recipe::parse(text, "test", &[]).unwrap();
        let moved = recipe.moved(&recipes, &run).unwrap();
        assert_eq!(moved.base, "../../data");
        let paths: Vec<&Path> = moved
            .data
            .sources
            .iter()
            .map(|s| s.path.as_path())
            .collect();
        assert_eq!(
            paths,
            [
                Path::new("../../data/pt"),
                Path::new("../../data/pt/en.jsonl")
            ]
        );
        assert_eq!(
            moved.data.split.as_deref(),
            Some(Path::new("../../data/pt/split.json"))
        );
        assert_eq!(
            moved.character.as_deref(),
            Some(Path::new("../../recipes/bo.toml"))
        );
        // From there back again, and to where it is already.
        assert_eq!(moved.moved(&run, &recipes).unwrap(), recipe);
        assert_eq!(recipe.moved(&recipes, &recipes).unwrap(), recipe);
        let hub = Recipe {
            base: "Qwen/Qwen3.5-4B-Base".to_owned(),
            ..recipe
        };
        assert_eq!(hub.moved(&recipes, &run).unwrap().base, hub.base);
    }

    fn minimal() -> Recipe {
        Recipe::parse(
            "stage = \"cpt\"\nbase = \"b\"\n[data]\nsources = [{ path = \"rows.jsonl\" }]\n",
            "r.toml",
            &[],
        )
        .unwrap()
    }

    #[test]
    fn reference_states_the_defaults_that_the_structs_have() {
        let mut printed = Recipe::parse(&reference(), "reference", &[]).unwrap();
        let defaults = minimal();
        printed.base = defaults.base.clone();
        printed.data.sources = defaults.data.sources.clone();
        assert_eq!(printed, defaults);
    }

    #[test]
    fn every_key_of_the_structs_is_documented() {
        let resolved: Table = minimal().resolved().unwrap().parse().unwrap();
        refuse_unknown(&resolved, "", "resolved").unwrap();
    }

    #[test]
    fn every_documented_key_is_accepted() {
        let lora = reference()
            .replace("\n# ", "\n#")
            .replace("kind = \"full\"", "kind = \"lora\"");
        let all: String = lora
            .lines()
            .map(|line| match line.strip_prefix('#') {
                Some(rest)
                    if keys().any(|key| {
                        key.optional
                            && rest.starts_with(&format!(
                                "{} = ",
                                key.path.rsplit('.').next().unwrap()
                            ))
                    }) =>
                {
                    format!("{rest}\n")
                }
                _ => format!("{line}\n"),
            })
            .collect();
        let recipe = Recipe::parse(&all, "all", &[]).unwrap();
        assert_eq!(recipe.run.steps, Some(1200));
        assert_eq!(
            recipe.data.split.as_deref(),
            Some(Path::new("corpora/split.json"))
        );
        assert!(matches!(
            recipe.tuner,
            TunerConfig::Lora(LoraTuner { rank: 16, .. })
        ));
    }

    #[test]
    fn unknown_key_names_line_and_nearest() {
        let text = "stage = \"cpt\"\nbase = \"b\"\n[data]\nsources = []\n[optimizer]\nlearning_rte = 1\nwarmup_ration = 0.1\n";
        let error =
            Recipe::parse(&text.replace("learning_rte = 1\n", ""), "r.toml", &[]).unwrap_err();
        assert!(error.is::<crate::ui::Misuse>());
        assert_eq!(
            error.to_string(),
            "unknown key `optimizer.warmup_ration` in r.toml:6; did you mean `optimizer.warmup_ratio`? (`cyrene recipe` lists every key)"
        );
    }

    #[test]
    fn set_overrides_and_refuses_unknown() {
        let text = "stage = \"cpt\"\nbase = \"b\"\n[data]\nsources = []\n";
        let recipe = Recipe::parse(
            text,
            "r",
            &[
                "optimizer.lr=1e-3".into(),
                "batch.rows=2".into(),
                "base=other".into(),
            ],
        )
        .unwrap();
        assert_eq!(
            (recipe.optimizer.lr, recipe.batch.rows, recipe.base.as_str()),
            (1e-3, 2, "other")
        );
        assert!(
            Recipe::parse(text, "r", &["batch.row=2".into()])
                .unwrap_err()
                .to_string()
                .contains("did you mean `batch.rows`")
        );
    }
}
