//! The text model's numbers out of a Hugging Face `config.json`, and the JSON itself, carried through every save.

use std::ops::RangeInclusive;
use std::path::Path;

use files::outside;
use kernel::DType;
use serde_json::{Map, Value};

use crate::{Error, Result};

/// What a count can be, far beyond every released model: within these no product of two widths, summed over all layers, overflows.
static COUNTS: [(&str, RangeInclusive<u64>); 11] = [
    ("vocab_size", 1..=1 << 24),
    ("hidden_size", 1..=1 << 18),
    ("intermediate_size", 1..=1 << 20),
    ("num_hidden_layers", 1..=1024),
    ("num_attention_heads", 1..=4096),
    ("num_key_value_heads", 1..=4096),
    ("head_dim", 1..=4096),
    ("linear_num_key_heads", 1..=4096),
    ("linear_key_head_dim", 1..=4096),
    ("linear_num_value_heads", 1..=4096),
    ("linear_value_head_dim", 1..=4096),
];

/// Width of the causal convolution that the kernels implement.
pub(crate) const CONV_WIDTH: usize = 4;

/// Longest context that a model can be made for: positions are counted in f32, exactly up to here.
const MOST_POSITIONS: f64 = (1 << 24) as f64;

/// Which mixer a layer has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LayerType {
    /// `linear_attention`: gated delta net.
    Linear,
    /// `full_attention`: gated softmax attention.
    Full,
}

/// Which of the two checkpoint forms a config describes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Form {
    /// `Qwen3_5ForConditionalGeneration`: text numbers under `text_config`, tensors under `model.language_model.`.
    Nested,
    /// `Qwen3_5ForCausalLM`: text numbers at the top, tensors under `model.`.
    TextOnly,
}

/// Qwen3.5's text configuration; fields are named as upstream.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// Ids that the embedding table has rows for.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the feed-forward.
    pub intermediate_size: usize,
    /// One entry a layer.
    pub layer_types: Vec<LayerType>,
    /// Query heads of an attention layer.
    pub num_attention_heads: usize,
    /// Key and value heads of an attention layer.
    pub num_key_value_heads: usize,
    /// Width of each head of an attention layer.
    pub head_dim: usize,
    /// Dimensions of each head that rotate: head_dim · partial_rotary_factor.
    pub rotary_dims: usize,
    /// Base of the rotary wavelengths.
    pub rope_theta: f64,
    /// Key heads of a delta net.
    pub linear_num_key_heads: usize,
    /// Width of each key head of a delta net.
    pub linear_key_head_dim: usize,
    /// Value heads of a delta net.
    pub linear_num_value_heads: usize,
    /// Width of each value head of a delta net.
    pub linear_value_head_dim: usize,
    /// Added to mean squares by the norms.
    pub rms_norm_eps: f32,
    /// The head is the embedding table.
    pub tie_word_embeddings: bool,
    /// Standard deviation of fresh matrices.
    pub initializer_range: f64,
    /// Longest context, in tokens, that the model was made for.
    pub max_position_embeddings: usize,
    pub(crate) form: Form,
    raw: Value,
}

impl Config {
    /// Reads `config.json` in `dir`.
    ///
    /// # Errors
    /// [`Error::NoModel`] if it is absent, [`Error::Json`], and those of [`Config::from_json`].
    pub fn load(dir: &Path) -> Result<Self> {
        let path = dir.join("config.json");
        if !path.exists() {
            return Err(Error::NoModel {
                dir: dir.to_owned(),
                missing: "config.json".to_owned(),
            });
        }
        Config::from_json(&read_json(&path)?)
    }

    /// Reads the nested form (`model_type` qwen3_5) or the text-only form (qwen3_5_text).
    ///
    /// # Errors
    /// [`Error::Architecture`] for another `model_type`; [`Error::Config`] for a key that is missing, of a wrong type, or that asks for
    /// something this engine does not compute.
    pub fn from_json(json: &Value) -> Result<Self> {
        let (form, text) = match json.get("model_type").and_then(Value::as_str) {
            Some("qwen3_5") => (Form::Nested, json.get("text_config")),
            Some("qwen3_5_text") => (Form::TextOnly, Some(json)),
            other => {
                return Err(Error::Architecture {
                    model_type: other.unwrap_or("(none)").to_owned(),
                });
            }
        };
        let text = text
            .and_then(Value::as_object)
            .ok_or_else(|| bad("text_config", "is missing"))?;
        refuse_unsupported(text)?;

        let head_dim = count(text, "head_dim")?;
        let (rope_theta, partial) = rope(text)?;
        let rotary_dims = (head_dim as f64 * partial).round() as usize;
        if rotary_dims == 0 || !rotary_dims.is_multiple_of(2) || rotary_dims > head_dim {
            return Err(bad(
                "rope_parameters.partial_rotary_factor",
                format!("gives {rotary_dims} rotary dims of {head_dim}"),
            ));
        }
        let tie_word_embeddings = json
            .get("tie_word_embeddings")
            .or_else(|| text.get("tie_word_embeddings"))
            .and_then(Value::as_bool)
            .unwrap_or(false);
        let config = Config {
            vocab_size: count(text, "vocab_size")?,
            hidden_size: count(text, "hidden_size")?,
            intermediate_size: count(text, "intermediate_size")?,
            layer_types: layer_types(text)?,
            num_attention_heads: count(text, "num_attention_heads")?,
            num_key_value_heads: count(text, "num_key_value_heads")?,
            head_dim,
            rotary_dims,
            rope_theta,
            linear_num_key_heads: count(text, "linear_num_key_heads")?,
            linear_key_head_dim: count(text, "linear_key_head_dim")?,
            linear_num_value_heads: count(text, "linear_num_value_heads")?,
            linear_value_head_dim: count(text, "linear_value_head_dim")?,
            rms_norm_eps: number(text, "rms_norm_eps", 1e-6, 0.0..=1.0)? as f32,
            tie_word_embeddings,
            initializer_range: number(text, "initializer_range", 0.02, 0.0..=100.0)?,
            max_position_embeddings: number(
                text,
                "max_position_embeddings",
                262_144.0,
                1.0..=MOST_POSITIONS,
            )? as usize,
            form,
            raw: json.clone(),
        };
        multiple(
            "num_attention_heads",
            config.num_attention_heads,
            config.num_key_value_heads,
        )?;
        multiple(
            "linear_num_value_heads",
            config.linear_num_value_heads,
            config.linear_num_key_heads,
        )?;
        Ok(config)
    }

    /// The JSON this was read from.
    pub fn raw(&self) -> &Value {
        &self.raw
    }

    /// Ids that end a reply, as `generation_config.json` in `dir` has them, else this configuration.
    pub fn end_ids(&self, dir: &Path) -> Vec<u32> {
        let read = |value: &Value| -> Vec<u32> {
            let ids = match value {
                Value::Array(list) => list.iter().filter_map(Value::as_u64).collect(),
                other => other.as_u64().into_iter().collect::<Vec<_>>(),
            };
            let ids = ids.into_iter();
            ids.filter_map(|id| u32::try_from(id).ok()).collect()
        };
        let path = dir.join("generation_config.json");
        let generation = outside::read(&path, outside::MOST_SETTINGS_BYTES).ok();
        let generation = generation.and_then(|bytes| serde_json::from_slice::<Value>(&bytes).ok());
        let of_generation = generation.map(|config| read(&config["eos_token_id"]));
        match of_generation.filter(|ids| !ids.is_empty()) {
            Some(ids) => ids,
            None => read(&self.raw.get("text_config").unwrap_or(&self.raw)["eos_token_id"]),
        }
    }

    /// Bytes of a checkpoint of this shape, in f32 where the configuration says so, else in bf16.
    pub fn checkpoint_bytes(&self) -> u64 {
        let text = self.raw.get("text_config").unwrap_or(&self.raw);
        let dtype = text.get("dtype").or_else(|| self.raw.get("dtype"));
        let each = match dtype.and_then(Value::as_str) {
            Some("float32") => 4,
            _ => 2,
        };
        self.n_params() * each
    }

    /// Channels of the delta net's convolution: queries, keys and values side by side.
    pub(crate) fn conv_channels(&self) -> usize {
        2 * self.linear_num_key_heads * self.linear_key_head_dim
            + self.linear_num_value_heads * self.linear_value_head_dim
    }

    /// Width of the delta net's values: all value heads side by side.
    pub(crate) fn value_width(&self) -> usize {
        self.linear_num_value_heads * self.linear_value_head_dim
    }

    /// Width of attention's queries: all heads side by side.
    pub(crate) fn query_width(&self) -> usize {
        self.num_attention_heads * self.head_dim
    }

    /// Width of attention's keys, and of its values.
    pub(crate) fn key_width(&self) -> usize {
        self.num_key_value_heads * self.head_dim
    }

    /// The JSON to save: without a quantization note, and with the stated dtype if weights change theirs.
    pub(crate) fn json_for(&self, dtype: Option<DType>) -> Value {
        let mut json = self.raw.clone();
        let Some(top) = json.as_object_mut() else {
            return json;
        };
        top.shift_remove("quantization_config");
        if let Some(dtype) = dtype {
            set_dtype(top, dtype);
            if let Some(text) = top.get_mut("text_config").and_then(Value::as_object_mut) {
                set_dtype(text, dtype);
            }
        }
        json
    }
}

pub(crate) fn read_json(path: &Path) -> Result<Value> {
    let bytes = outside::read(path, outside::MOST_SETTINGS_BYTES);
    let bytes = bytes.map_err(Error::io("read", path))?;
    serde_json::from_slice(&bytes).map_err(|source| Error::Json {
        path: path.to_owned(),
        source,
    })
}

fn set_dtype(object: &mut Map<String, Value>, dtype: DType) {
    let name = match dtype {
        DType::F32 => "float32",
        DType::Bf16 => "bfloat16",
    };
    for key in ["dtype", "torch_dtype"] {
        if object.contains_key(key) {
            object.insert(key.to_owned(), name.into());
        }
    }
}

/// Keys that change the computation in ways that no op here follows.
fn refuse_unsupported(text: &Map<String, Value>) -> Result<()> {
    let expected: [(&str, Value); 4] = [
        ("attn_output_gate", true.into()),
        ("attention_bias", false.into()),
        ("hidden_act", "silu".into()),
        ("linear_conv_kernel_dim", CONV_WIDTH.into()),
    ];
    for (key, value) in expected {
        match text.get(key) {
            Some(got) if *got != value => {
                return Err(bad(key, format!("is {got}, only {value} is supported")));
            }
            _ => {}
        }
    }
    match text.get("num_experts").and_then(Value::as_u64) {
        Some(experts) if experts > 0 => {
            Err(bad("num_experts", "mixture of experts is not supported"))
        }
        _ => Ok(()),
    }
}

/// (rope_theta, partial_rotary_factor). transformers 5 keeps both in `rope_parameters`; a stray top-level factor that it writes is ignored then.
fn rope(text: &Map<String, Value>) -> Result<(f64, f64)> {
    let nested = ["rope_parameters", "rope_scaling"]
        .iter()
        .find_map(|key| text.get(*key).and_then(Value::as_object));
    let get = |key: &str| {
        nested
            .and_then(|parameters| parameters.get(key))
            .or_else(|| text.get(key))
    };
    let rope_type = get("rope_type")
        .and_then(Value::as_str)
        .unwrap_or("default");
    if rope_type != "default" {
        return Err(bad(
            "rope_parameters.rope_type",
            format!("is `{rope_type}`, only `default` is supported"),
        ));
    }
    let theta = get("rope_theta")
        .and_then(Value::as_f64)
        .ok_or_else(|| bad("rope_parameters.rope_theta", "is missing or no number"))?;
    let partial = get("partial_rotary_factor")
        .and_then(Value::as_f64)
        .unwrap_or(0.25);
    Ok((
        within("rope_parameters.rope_theta", theta, 1.0..=1e18)?,
        within("rope_parameters.partial_rotary_factor", partial, 0.0..=1.0)?,
    ))
}

/// `layer_types`, or every `full_attention_interval`-th layer full.
fn layer_types(text: &Map<String, Value>) -> Result<Vec<LayerType>> {
    let n_layers = count(text, "num_hidden_layers")?;
    let Some(listed) = text.get("layer_types").and_then(Value::as_array) else {
        let interval = number(text, "full_attention_interval", 4.0, 1.0..=1024.0)? as usize;
        return Ok((1..=n_layers)
            .map(|number| match number % interval {
                0 => LayerType::Full,
                _ => LayerType::Linear,
            })
            .collect());
    };
    if listed.len() != n_layers {
        return Err(bad(
            "layer_types",
            format!(
                "lists {} layers, num_hidden_layers is {n_layers}",
                listed.len()
            ),
        ));
    }
    listed
        .iter()
        .map(|name| match name.as_str() {
            Some("linear_attention") => Ok(LayerType::Linear),
            Some("full_attention") => Ok(LayerType::Full),
            _ => Err(bad(
                "layer_types",
                format!("holds {name}, known are linear_attention and full_attention"),
            )),
        })
        .collect()
}

/// One of [`COUNTS`].
fn count(text: &Map<String, Value>, key: &str) -> Result<usize> {
    let range = COUNTS.iter().find(|(name, _)| *name == key);
    assert!(range.is_some(), "a count without a range: {key}");
    let (least, most) = range.map_or((1, 1), |(_, range)| (*range.start(), *range.end()));
    let Some(n) = text.get(key).and_then(Value::as_u64) else {
        return Err(bad(key, "is missing or no positive whole number"));
    };
    match (least..=most).contains(&n) {
        true => Ok(n as usize),
        false => Err(bad(key, format!("is {n}, and must be {least} to {most}"))),
    }
}

fn number(
    text: &Map<String, Value>,
    key: &str,
    default: f64,
    range: RangeInclusive<f64>,
) -> Result<f64> {
    let number = match text.get(key) {
        None | Some(Value::Null) => default,
        Some(value) => value.as_f64().ok_or_else(|| bad(key, "is no number"))?,
    };
    within(key, number, range)
}

fn within(key: &str, number: f64, range: RangeInclusive<f64>) -> Result<f64> {
    match range.contains(&number) {
        true => Ok(number),
        false => {
            let (least, most) = range.into_inner();
            let problem = format!("is {number}, and must be {least} to {most}");
            Err(bad(key, problem))
        }
    }
}

fn multiple(key: &str, n: usize, of: usize) -> Result<()> {
    if n.is_multiple_of(of) {
        return Ok(());
    }
    Err(bad(key, format!("{n} is no multiple of {of} key heads")))
}

fn bad(key: &str, problem: impl Into<String>) -> Error {
    Error::Config {
        key: key.to_owned(),
        problem: problem.into(),
    }
}
