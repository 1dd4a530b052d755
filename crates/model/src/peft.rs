//! Adapter folders as PEFT reads and writes them: every setting that changes the arithmetic is honoured or refused by name.

use std::collections::BTreeMap;
use std::path::Path;

use fancy_regex::Regex;
use files::FileName;
use kernel::{DType, Tensor};
use safetensors::Dtype;
use serde_json::{Map, Value, json};

use crate::checkpoint::{self, Checkpoint, Planned, Writer};
use crate::config::read_json;
use crate::lora::{Adapter, LoraConfig, RANKS, Scaling};
use crate::parameter::Parameter;
use crate::qwen3_5::Model;
use crate::qwen3_5::names::{self, AdapterTensor, Side};
use crate::{Error, Result};

const CONFIG: &str = "adapter_config.json";
const WEIGHTS: &str = checkpoint::ADAPTER_WEIGHTS;

/// What to do with an adapter that is more than plain LoRA.
const MERGE_IT: &str =
    "merge it with PEFT (merge_and_unload, save_pretrained) and use the merged folder";

/// Keys that say where an adapter comes from or how its first values were drawn: whatever they hold, its tensors mean the same.
const WITHOUT_EFFECT: [&str; 14] = [
    "task_type",
    "auto_mapping",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "peft_version",
    "runtime_config",
    "megatron_core",
    "qalora_group_size",
    "ensure_weight_tying",
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
];

/// Keys that [`Settings`] reads; any other must be off (null, false or empty).
const READ: [&str; 13] = [
    "peft_type",
    "r",
    "lora_alpha",
    "lora_dropout",
    "bias",
    "use_rslora",
    "init_lora_weights",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
];

/// Ways to draw an adapter's first values that leave the base as it was released.
const PLAIN_STARTS: [&str; 3] = ["gaussian", "orthogonal", "eva"];

/// See [`crate::Model::load_adapter`].
pub(crate) fn load(model: &mut Model, dir: &Path) -> Result<()> {
    for name in [CONFIG, WEIGHTS] {
        if !dir.join(name).exists() {
            return Err(missing_file(dir, name));
        }
    }
    let settings = Settings::read(dir)?;
    let mut pairs = read_pairs(dir)?;
    let prefix = prefix_of(&pairs);
    // 1. every layer that is a target has its tensors, and they fit
    let mut adapters = Vec::new();
    let mut targets = Vec::new();
    for (layer_number, (module, linear)) in model.linears().into_iter().enumerate() {
        let Some(pair) = pairs.remove(&module) else {
            if settings.names_as_target(&format!("{prefix}{module}"))? {
                return Err(settings.error(format!(
                    "`target_modules` names `{module}`, and the file has no tensors of it; save the adapter again, or take it out of `target_modules`"
                )));
            }
            adapters.push(None);
            continue;
        };
        let shape = [0, 1].map(|axis| linear.weight.tensor.shape()[axis]);
        adapters.push(Some(settings.adapter(pair, shape, layer_number as u64)?));
        let target = names::last_part(&module).to_owned();
        if !targets.contains(&target) {
            targets.push(target);
        }
    }
    // 2. and nothing else is there
    if let Some(pair) = pairs.values().next() {
        return Err(settings.error(out_of_place(&pair.module)));
    }
    for ((_, linear), adapter) in model.linears_mut().into_iter().zip(adapters) {
        linear.adapter = adapter;
    }
    model.lora = Some(LoraConfig {
        rank: settings.rank,
        alpha: settings.alpha,
        dropout: settings.dropout,
        targets,
    });
    Ok(())
}

/// Why a layer that the file has tensors of gets none.
fn out_of_place(module: &str) -> String {
    let is_head = names::HEAD.strip_suffix(".weight") == Some(module);
    match is_head || names::is_carried(module) {
        // PEFT's `all-linear` on the released models adapts the vision tower too.
        true => format!(
            "it adapts `{module}` as well, and here only the layers of the text model below the head are adapted; {MERGE_IT}"
        ),
        false => format!(
            "`{module}` is no linear layer of this model; use the base that the adapter was trained on"
        ),
    }
}

/// See [`crate::Model::save_adapter`].
pub(crate) fn save(model: &Model, dir: &Path, base_name: &str) -> Result<()> {
    let lora = model.lora.as_ref().ok_or(Error::NoAdapter)?;
    let tensors: Vec<(String, &Tensor)> = model
        .trainable_names()
        .into_iter()
        .zip(model.trainable())
        .collect();
    let planned = tensors
        .iter()
        .map(|(name, tensor)| Planned {
            name: name.clone(),
            dtype: Dtype::F32,
            shape: tensor.shape().to_vec(),
        })
        .collect();
    let mut writer = Writer::create(dir, "adapter_model", planned, u64::MAX)?;
    for (name, tensor) in &tensors {
        writer.put(name, &checkpoint::to_bytes(tensor, DType::F32)?)?;
    }
    writer.put_json(CONFIG, &config_json(model, lora, base_name))?;
    writer.commit()
}

/// A and B of one layer.
struct Pair {
    /// The layer's name in the model that PEFT wrapped, such as `model.layers.0.mlp.up_proj`.
    module: String,
    a_ri: Tensor,
    b_or: Tensor,
}

/// The tensors of a file by layer below the text model; each has its other half, and only finite numbers.
fn read_pairs(dir: &Path) -> Result<BTreeMap<String, Pair>> {
    let file = Checkpoint::open_files(dir, &[FileName::of_ours(WEIGHTS)])?;
    let mut halves: BTreeMap<String, (String, [Option<Tensor>; 2])> = BTreeMap::new();
    for name in file.names() {
        let Some(AdapterTensor {
            module,
            below,
            side,
        }) = names::adapter_tensor(name)
        else {
            return Err(error(
                dir,
                format!("tensor `{name}` is no lora_A or lora_B of a layer; {MERGE_IT}"),
            ));
        };
        let (_, sides) = halves.entry(below).or_insert((module, [None, None]));
        let tensor = read_finite(&file, name)?;
        if sides[side as usize].replace(tensor).is_some() {
            return Err(error(
                dir,
                format!("tensor `{name}` is there a second time under another name; keep one"),
            ));
        }
    }
    let whole = halves.into_iter().map(|(below, (module, sides))| {
        let pair = match sides {
            [Some(a_ri), Some(b_or)] => Pair { module, a_ri, b_or },
            [None, _] => return Err(half(dir, &module, Side::B, Side::A)),
            [_, None] => return Err(half(dir, &module, Side::A, Side::B)),
        };
        Ok((below, pair))
    });
    let pairs: BTreeMap<String, Pair> = whole.collect::<Result<_>>()?;
    if pairs.is_empty() {
        return Err(error(
            dir,
            format!(
                "{WEIGHTS} holds no tensors, so that it would change nothing; save the adapter again"
            ),
        ));
    }
    Ok(pairs)
}

fn half(dir: &Path, module: &str, there: Side, missing: Side) -> Error {
    let (there, missing) = (there.name(), missing.name());
    error(
        dir,
        format!("`{module}` has a {there} and no {missing}; save the adapter again"),
    )
}

fn read_finite(file: &Checkpoint, name: &str) -> Result<Tensor> {
    let view = file.require(name)?;
    let tensor = checkpoint::to_tensor(view, DType::F32).ok_or_else(|| Error::TensorType {
        name: name.to_owned(),
        path: file.path_of(name),
        dtype: view.dtype.to_string(),
    })?;
    match checkpoint::is_finite(&tensor) {
        true => Ok(tensor),
        false => Err(Error::NotFinite {
            name: name.to_owned(),
            place: file.path_of(name).display().to_string(),
        }),
    }
}

/// What stands before a layer's name below the text model in the wrapped model's names.
fn prefix_of(pairs: &BTreeMap<String, Pair>) -> String {
    pairs
        .iter()
        .find_map(|(below, pair)| pair.module.strip_suffix(below.as_str()))
        .unwrap_or_default()
        .to_owned()
}

/// Layers that `target_modules` or `exclude_modules` names.
enum Modules {
    /// `all-linear`: every linear layer but the head.
    AllLinear,
    /// Whole names, or what they end in.
    Names(Vec<String>),
    /// A regular expression over the whole name.
    Pattern(Regex),
}

/// What adapter_config.json says of the arithmetic.
struct Settings<'a> {
    dir: &'a Path,
    rank: usize,
    alpha: f32,
    dropout: f32,
    scaling: Scaling,
    /// None: whatever has tensors.
    targets: Option<Modules>,
    excluded: Option<Modules>,
    /// Numbers of the layers that are adapted, of those that a name's end makes targets; None: all.
    layers: Option<Vec<u64>>,
    /// How a layer's number is found in a name, in the order of trial.
    layer_patterns: Vec<Regex>,
    rank_pattern: Vec<(Regex, usize)>,
    alpha_pattern: Vec<(Regex, f32)>,
}

impl<'a> Settings<'a> {
    fn read(dir: &'a Path) -> Result<Self> {
        let json = read_json(&dir.join(CONFIG))?;
        let keys = Keys {
            dir,
            json: json
                .as_object()
                .ok_or_else(|| error(dir, format!("{CONFIG} is no JSON object")))?,
        };
        keys.refuse_what_is_not_plain()?;
        let settings = Settings {
            dir,
            rank: keys.required("r", as_rank)?,
            alpha: keys.required("lora_alpha", as_alpha)?,
            dropout: keys.optional("lora_dropout", as_dropout)?.unwrap_or(0.0),
            scaling: match keys.optional("use_rslora", Value::as_bool)? {
                Some(true) => Scaling::RankRoot,
                _ => Scaling::Rank,
            },
            targets: keys.modules("target_modules")?,
            excluded: keys.modules("exclude_modules")?,
            // An empty list means all layers, as in PEFT.
            layers: keys
                .optional("layers_to_transform", as_layers)?
                .filter(|layers| !layers.is_empty()),
            layer_patterns: keys.layer_patterns()?,
            rank_pattern: keys.pattern("rank_pattern", as_rank)?,
            alpha_pattern: keys.pattern("alpha_pattern", as_alpha)?,
        };
        Ok(settings)
    }

    /// The adapter of a layer with a weight of this shape [O,I].
    fn adapter(&self, pair: Pair, [n_out, n_in]: [usize; 2], layer_number: u64) -> Result<Adapter> {
        let module = &pair.module;
        if !self.is_target(module)?.unwrap_or(true) {
            return Err(self.error(format!(
                "the file has tensors of `{module}`, which its `target_modules` leave out (or `exclude_modules`, `layers_to_transform`); name it there, or take the tensors out"
            )));
        }
        let rank = self.of_pattern(&self.rank_pattern, module)?;
        let rank = rank.unwrap_or(self.rank);
        let alpha = self.of_pattern(&self.alpha_pattern, module)?;
        let (a, b) = (pair.a_ri.shape(), pair.b_or.shape());
        if a != [rank, n_in] || b != [n_out, rank] {
            return Err(self.error(format!(
                "`{module}` has A {a:?} and B {b:?} for a weight [{n_out}, {n_in}] and rank {rank}; use the base that the adapter was trained on"
            )));
        }
        Ok(Adapter {
            a_ri: Parameter::of(pair.a_ri),
            b_or: Parameter::of(pair.b_or),
            alpha: alpha.unwrap_or(self.alpha),
            scaling: self.scaling,
            dropout: self.dropout,
            layer_number,
            place: 0,
        })
    }

    /// Whether PEFT puts an adapter beside the layer of this whole name; None where the file's tensors alone say so.
    fn is_target(&self, module: &str) -> Result<Option<bool>> {
        let Some(targets) = &self.targets else {
            return Ok(None);
        };
        let excluded = match &self.excluded {
            Some(excluded) => self.holds(excluded, module)?,
            None => false,
        };
        if excluded {
            return Ok(Some(false));
        }
        // As PEFT's check_target_module_exists: a whole name needs no layer number.
        Ok(Some(match targets {
            Modules::Names(names) if names.iter().any(|name| name == module) => true,
            _ => self.holds(targets, module)? && self.is_in_layers(module)?,
        }))
    }

    fn names_as_target(&self, module: &str) -> Result<bool> {
        Ok(self.is_target(module)?.unwrap_or(false))
    }

    fn holds(&self, modules: &Modules, module: &str) -> Result<bool> {
        match modules {
            Modules::AllLinear => Ok(true),
            Modules::Names(names) => Ok(names.iter().any(|name| {
                let before = module.strip_suffix(name.as_str());
                before.is_some_and(|before| before.is_empty() || before.ends_with('.'))
            })),
            Modules::Pattern(pattern) => self.matches(pattern, module),
        }
    }

    fn is_in_layers(&self, module: &str) -> Result<bool> {
        let Some(layers) = &self.layers else {
            return Ok(true);
        };
        for pattern in &self.layer_patterns {
            let found = pattern
                .captures(module)
                .map_err(|problem| self.too_hard(pattern, &problem))?;
            if let Some(number) = found.and_then(|groups| groups.get(1)) {
                let number = number.as_str().parse().ok();
                return Ok(number.is_some_and(|number| layers.contains(&number)));
            }
        }
        Ok(false)
    }

    /// The value of the first entry that matches.
    fn of_pattern<T: Copy>(&self, entries: &[(Regex, T)], module: &str) -> Result<Option<T>> {
        for (pattern, value) in entries {
            if self.matches(pattern, module)? {
                return Ok(Some(*value));
            }
        }
        Ok(None)
    }

    fn matches(&self, pattern: &Regex, module: &str) -> Result<bool> {
        pattern
            .is_match(module)
            .map_err(|problem| self.too_hard(pattern, &problem))
    }

    fn too_hard(&self, pattern: &Regex, problem: &fancy_regex::Error) -> Error {
        self.error(format!(
            "{CONFIG}: the expression `{}` cannot be tried ({problem}); list the modules by name",
            pattern.as_str()
        ))
    }

    fn error(&self, problem: String) -> Error {
        error(self.dir, problem)
    }
}

/// The keys of adapter_config.json.
struct Keys<'a> {
    dir: &'a Path,
    json: &'a Map<String, Value>,
}

impl Keys<'_> {
    /// Kinds of adapters, and settings that change what its tensors mean or what else is added.
    fn refuse_what_is_not_plain(&self) -> Result<()> {
        let kind = self.json.get("peft_type").and_then(Value::as_str);
        if kind != Some("LORA") {
            let kind = kind.unwrap_or("missing");
            return Err(self.error(format!(
                "`peft_type` is {kind}; only LORA is supported: {MERGE_IT}"
            )));
        }
        let bias = self.json.get("bias").unwrap_or(&Value::Null);
        if !is_off(bias) && bias != "none" {
            return Err(self.refused("bias", bias));
        }
        self.refuse_changed_base()?;
        let other = self.json.iter().find(|(key, value)| {
            let known = WITHOUT_EFFECT.contains(&key.as_str()) || READ.contains(&key.as_str());
            !known && !is_off(value)
        });
        match other {
            Some((key, value)) => Err(self.refused(key, value)),
            None => Ok(()),
        }
    }

    /// PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA subtract the adapter's first values from the base, which then is no released one.
    fn refuse_changed_base(&self) -> Result<()> {
        match self.json.get("init_lora_weights") {
            None | Some(Value::Null | Value::Bool(_)) => Ok(()),
            Some(Value::String(start)) if PLAIN_STARTS.contains(&start.as_str()) => Ok(()),
            Some(start) => Err(self.error(format!(
                "`init_lora_weights` is {start}, so that the adapter fits a base with changed weights alone; convert it with PEFT (save_pretrained with path_initial_model_for_weight_conversion), or, if the base is that changed one, set the key to true"
            ))),
        }
    }

    fn required<T>(&self, key: &str, read: impl Fn(&Value) -> Option<T>) -> Result<T> {
        self.optional(key, read)?.ok_or_else(|| {
            self.error(format!(
                "`{key}` is missing from {CONFIG}; save the adapter again"
            ))
        })
    }

    fn optional<T>(&self, key: &str, read: impl Fn(&Value) -> Option<T>) -> Result<Option<T>> {
        match self.json.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => match read(value) {
                Some(read) => Ok(Some(read)),
                None => Err(self.bad(key, value)),
            },
        }
    }

    fn modules(&self, key: &str) -> Result<Option<Modules>> {
        Ok(match self.json.get(key) {
            None | Some(Value::Null) => None,
            Some(Value::String(name)) if name == "all-linear" => Some(Modules::AllLinear),
            Some(Value::String(pattern)) => Some(Modules::Pattern(
                self.regex(key, &format!(r"^(?:{pattern})\z"))?,
            )),
            Some(value @ Value::Array(list)) => {
                let names = list.iter().map(|name| name.as_str().map(str::to_owned));
                let names: Option<Vec<String>> = names.collect();
                let names = names.ok_or_else(|| self.bad(key, value))?;
                (!names.is_empty()).then_some(Modules::Names(names))
            }
            Some(value) => return Err(self.bad(key, value)),
        })
    }

    /// As PEFT's check_target_module_exists: `layers_pattern` is what stands before the number, and any name where it is empty.
    fn layer_patterns(&self) -> Result<Vec<Regex>> {
        let stated = match self.json.get("layers_pattern") {
            None | Some(Value::Null) => Vec::new(),
            Some(Value::String(pattern)) if pattern.is_empty() => Vec::new(),
            Some(Value::String(pattern)) => vec![pattern.as_str()],
            Some(value @ Value::Array(list)) => {
                let patterns: Option<Vec<&str>> = list.iter().map(Value::as_str).collect();
                patterns.ok_or_else(|| self.bad("layers_pattern", value))?
            }
            Some(value) => return Err(self.bad("layers_pattern", value)),
        };
        let stated = match stated.is_empty() {
            true => vec!["[^.]*"],
            false => stated,
        };
        let patterns = stated
            .into_iter()
            .map(|pattern| self.regex("layers_pattern", &format!(r"^.*\.(?:{pattern})\.(\d+)\.")));
        patterns.collect()
    }

    /// Entries of `rank_pattern` or `alpha_pattern`, each matched against the end of a name as PEFT's get_pattern_key does.
    fn pattern<T>(&self, key: &str, read: impl Fn(&Value) -> Option<T>) -> Result<Vec<(Regex, T)>> {
        let entries = match self.json.get(key) {
            None | Some(Value::Null) => return Ok(Vec::new()),
            Some(Value::Object(entries)) => entries,
            Some(value) => return Err(self.bad(key, value)),
        };
        let read = entries.iter().map(|(pattern, value)| {
            let regex = self.regex(key, &format!(r"^(?:.*\.)?(?:{pattern})$"))?;
            let value = read(value).ok_or_else(|| self.bad(key, value))?;
            Ok((regex, value))
        });
        read.collect()
    }

    fn regex(&self, key: &str, pattern: &str) -> Result<Regex> {
        Regex::new(pattern).map_err(|problem| {
            self.error(format!(
                "`{key}` holds an expression that cannot be read ({problem}); list the modules by name"
            ))
        })
    }

    fn refused(&self, key: &str, value: &Value) -> Error {
        self.error(format!(
            "`{key}` is {value} in {CONFIG}, which plain LoRA does not compute; {MERGE_IT}"
        ))
    }

    fn bad(&self, key: &str, value: &Value) -> Error {
        self.error(format!(
            "`{key}` is {value} in {CONFIG}, which PEFT does not write; save the adapter again"
        ))
    }

    fn error(&self, problem: String) -> Error {
        error(self.dir, problem)
    }
}

/// Null, false and what is empty: the key changes nothing.
fn is_off(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::String(text) => text.is_empty(),
        Value::Array(list) => list.is_empty(),
        Value::Object(map) => map.is_empty(),
        Value::Bool(true) | Value::Number(_) => false,
    }
}

fn as_rank(value: &Value) -> Option<usize> {
    let rank = usize::try_from(value.as_u64()?).ok()?;
    RANKS.contains(&rank).then_some(rank)
}

fn as_alpha(value: &Value) -> Option<f32> {
    let alpha = value.as_f64()? as f32;
    alpha.is_finite().then_some(alpha)
}

fn as_dropout(value: &Value) -> Option<f32> {
    let dropout = value.as_f64()? as f32;
    (0.0..1.0).contains(&dropout).then_some(dropout)
}

/// One number or a list.
fn as_layers(value: &Value) -> Option<Vec<u64>> {
    match value {
        Value::Array(list) => list.iter().map(Value::as_u64).collect(),
        one => Some(vec![one.as_u64()?]),
    }
}

/// What PEFT 0.21 writes for plain LoRA.
fn config_json(model: &Model, lora: &LoraConfig, base_name: &str) -> Value {
    let form = model.config.form;
    let adapters: Vec<(String, &Adapter)> = model
        .linears()
        .into_iter()
        .filter_map(|(module, linear)| Some((names::full(form, &module), linear.adapter.as_ref()?)))
        .collect();
    let rank_pattern: Map<String, Value> = adapters
        .iter()
        .filter(|(_, adapter)| adapter.rank() != lora.rank)
        .map(|(module, adapter)| (module.clone(), adapter.rank().into()))
        .collect();
    let alpha_pattern: Map<String, Value> = adapters
        .iter()
        .filter(|(_, adapter)| adapter.alpha != lora.alpha)
        .map(|(module, adapter)| (module.clone(), alpha_json(adapter.alpha)))
        .collect();
    let by_root = adapters
        .iter()
        .any(|(_, adapter)| adapter.scaling == Scaling::RankRoot);
    // Shortest decimal that reads back as the same f32: 0.05 rather than 0.05000000074505806.
    let dropout: f64 = lora.dropout.to_string().parse().unwrap_or(0.0);
    json!({
        "alora_invocation_tokens": null,
        "alpha_pattern": alpha_pattern,
        "arrow_config": null,
        "auto_mapping": null,
        "base_model_name_or_path": base_name,
        "bias": "none",
        "corda_config": null,
        "ensure_weight_tying": false,
        "eva_config": null,
        "exclude_modules": null,
        "fan_in_fan_out": false,
        "inference_mode": true,
        "init_lora_weights": true,
        "kasa_config": null,
        "layer_replication": null,
        "layers_pattern": null,
        "layers_to_transform": null,
        "loftq_config": {},
        "lora_alpha": alpha_json(lora.alpha),
        "lora_bias": false,
        "lora_dropout": dropout,
        "lora_ga_config": null,
        "megatron_config": null,
        "megatron_core": "megatron.core",
        "modules_to_save": null,
        "monteclora_config": null,
        "peft_type": "LORA",
        "peft_version": "0.21.2",
        "qalora_group_size": 16,
        "r": lora.rank,
        "rank_pattern": rank_pattern,
        "revision": null,
        "target_modules": target_modules(model, lora),
        "target_parameters": null,
        "task_type": "CAUSAL_LM",
        "trainable_token_indices": null,
        "use_bdlora": null,
        "use_dora": false,
        "use_qalora": false,
        "use_rslora": by_root,
        "velora_config": null
    })
}

/// A pattern over the text model's layers, so that the vision tower never matches; a list of names where only some layers are adapted.
fn target_modules(model: &Model, lora: &LoraConfig) -> Value {
    let form = model.config.form;
    let named = model.linears().into_iter().filter(|(module, _)| {
        let last = names::last_part(module);
        lora.targets.iter().any(|target| target == last)
    });
    let (adapted, bare): (Vec<_>, Vec<_>) = named.partition(|(_, linear)| linear.adapter.is_some());
    match bare.is_empty() {
        true => names::target_pattern(form, &lora.targets).into(),
        false => adapted
            .into_iter()
            .map(|(module, _)| names::full(form, &module))
            .collect(),
    }
}

fn alpha_json(alpha: f32) -> Value {
    match alpha.fract() == 0.0 {
        true => (alpha as i64).into(),
        false => f64::from(alpha).into(),
    }
}

fn missing_file(dir: &Path, name: &str) -> Error {
    let pickle = name == WEIGHTS && dir.join("adapter_model.bin").is_file();
    error(
        dir,
        match pickle {
            true => "adapter_model.bin is a pickle, which may run code; save it again with safe_serialization=True".to_owned(),
            false => format!("`{name}` is missing; point to the folder that PEFT or a training run wrote"),
        },
    )
}

fn error(dir: &Path, problem: String) -> Error {
    Error::Adapter {
        dir: dir.to_owned(),
        problem,
    }
}
