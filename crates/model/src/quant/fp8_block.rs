//! FP8_BLOCK: E4M3 weights with one scale a 128 × 128 block, as compressed-tensors or as Hugging Face `fp8` folders.
//!
//! Attention and feed-forward matrices are quantized; embedding, head, delta nets, vision tower and mtp are copied bit for bit,
//! which is more exact than llm-compressor 0.14: that rounds the (1 + w) norms, `A_log` and the gated norms to bf16.

use std::collections::HashSet;
use std::path::Path;

use kernel::ops::quantize_fp8::{self, BLOCK, Fp8Blocks};
use kernel::{DType, Tensor, bf16};
use safetensors::Dtype;
use serde_json::{Map, Value, json};

use crate::checkpoint::{self, Checkpoint, Planned, View, Writer};
use crate::config::{Config, LayerType};
use crate::qwen3_5::{Kind, check_head, names, table};
use crate::{Error, Result};

pub use kernel::ops::quantize_fp8::Division;

/// Which folder to write. Bytes and meaning are the same; names and types of the scales, and the note in config.json, differ.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Layout {
    /// `weight_scale` bf16, quant_method `compressed-tensors`: what llm-compressor writes; read by vLLM and SGLang.
    #[default]
    CompressedTensors,
    /// `weight_scale_inv` f32 (multiplied all the same), quant_method `fp8`: what Qwen and DeepSeek release.
    HuggingFace,
}

/// How to export.
#[derive(Debug, Clone)]
pub struct Options {
    /// Which folder to write.
    pub layout: Layout,
    /// Bf16 gives llm-compressor's bytes; F32 rounds once instead of twice.
    pub division: Division,
    /// Largest size of one file's tensors.
    pub max_shard_bytes: u64,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            layout: Layout::default(),
            division: Division::Bf16,
            max_shard_bytes: 5_000_000_000,
        }
    }
}

/// What an export did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Summary {
    /// Weights that were quantized.
    pub n_quantized: usize,
    /// Tensors that were copied bit for bit.
    pub n_copied: usize,
    /// Bytes of all tensors before.
    pub source_bytes: u64,
    /// Bytes of all tensors after.
    pub written_bytes: u64,
}

/// Reads the folder `from` and writes a quantized one to `to`, tensor by tensor: no more than one tensor is in memory.
/// Files that a server wants beside the weights are copied; without a `generation_config.json` a minimal one is written.
///
/// # Errors
/// Those of reading a folder; [`Error::AlreadyQuantized`]; [`Error::TwoHeads`]; [`Error::NotFinite`]; [`Error::TensorType`] for a weight that is no plain float; [`Error::Io`].
pub fn export(from: &Path, to: &Path, options: &Options) -> Result<Summary> {
    let config = Config::load(from)?;
    if let Some(note) = config.raw().get("quantization_config") {
        let method = note.get("quant_method").and_then(Value::as_str);
        return Err(Error::AlreadyQuantized {
            dir: from.to_owned(),
            method: method.unwrap_or("unknown").to_owned(),
        });
    }
    let source = Checkpoint::open(from)?;
    check_head(&source, &config)?;
    let quantized = quantized(&config, &source);
    let planned = plan(&source, &quantized, options.layout)?;
    let summary = Summary {
        n_quantized: source.names().filter(|n| quantized.contains(*n)).count(),
        n_copied: source.names().filter(|n| !quantized.contains(*n)).count(),
        source_bytes: source
            .names()
            .filter_map(|name| source.get(name))
            .map(|view| view.bytes.len() as u64)
            .sum(),
        written_bytes: planned.iter().map(Planned::bytes).sum(),
    };
    let mut writer = Writer::create(to, "model", planned, options.max_shard_bytes)?;
    for name in source.names() {
        let view = source.require(name)?;
        if !checkpoint::view_is_finite(view) {
            return Err(Error::NotFinite {
                name: name.to_owned(),
                place: source.path_of(name).display().to_string(),
            });
        }
        if quantized.contains(name) {
            write_quantized(&mut writer, &source, name, view, options)?;
        } else {
            writer.put(name, view.bytes)?;
        }
    }
    write_companions(&mut writer, &config, &source, from, options.layout)?;
    writer.commit()?;
    Ok(summary)
}

/// The weight that a scale tensor belongs to; None if this is no scale.
pub(crate) fn scaled_weight(name: &str) -> Option<&str> {
    [Layout::CompressedTensors, Layout::HuggingFace]
        .into_iter()
        .find_map(|layout| name.strip_suffix(scale_suffix(layout)))
        .filter(|weight| weight.ends_with(".weight"))
}

/// A block-quantized tensor of either layout as one of `dtype`: w = byte · scale, one rounding.
///
/// # Errors
/// [`Error::MissingTensor`] without scales, [`Error::TensorShape`] if they are not one a block, [`Error::TensorType`].
pub(crate) fn read(source: &Checkpoint, name: &str, view: View, dtype: DType) -> Result<Tensor> {
    let scale_name = [Layout::CompressedTensors, Layout::HuggingFace]
        .map(|layout| format!("{name}{}", scale_suffix(layout)))
        .into_iter()
        .find(|scale_name| source.get(scale_name).is_some())
        .unwrap_or_else(|| format!("{name}{}", scale_suffix(Layout::CompressedTensors)));
    let scale_view = source.require(&scale_name)?;
    let [rows, cols] = matrix(source, name, view)?;
    let scale_shape = scale_shape(rows, cols);
    if scale_view.shape != scale_shape {
        return Err(Error::TensorShape {
            path: source.path_of(&scale_name),
            name: scale_name,
            expected: scale_shape.to_vec(),
            got: scale_view.shape.to_vec(),
        });
    }
    let scales =
        checkpoint::to_tensor(scale_view, DType::F32).ok_or_else(|| Error::TensorType {
            path: source.path_of(&scale_name),
            name: scale_name,
            dtype: scale_view.dtype.to_string(),
        })?;

    // Scales may be f32, the kernel's are bf16: decode with ones, then scale here.
    let unscaled = Fp8Blocks {
        rows,
        cols,
        bytes: view.bytes.to_vec(),
        scales: vec![bf16::ONE; scale_shape[0] * scale_shape[1]],
    };
    let mut tensor = quantize_fp8::decode(&unscaled, DType::F32);
    for (row_idx, row) in tensor.f32s_mut().chunks_exact_mut(cols).enumerate() {
        let row_scales = &scales.f32s()[row_idx / BLOCK * scale_shape[1]..];
        for (block, scale) in row.chunks_mut(BLOCK).zip(row_scales) {
            block.iter_mut().for_each(|w| *w *= scale);
        }
    }
    Ok(tensor.to_dtype(dtype))
}

fn scale_suffix(layout: Layout) -> &'static str {
    match layout {
        Layout::CompressedTensors => "_scale",
        Layout::HuggingFace => "_scale_inv",
    }
}

fn scale_shape(rows: usize, cols: usize) -> [usize; 2] {
    [rows.div_ceil(BLOCK), cols.div_ceil(BLOCK)]
}

fn matrix(source: &Checkpoint, name: &str, view: View) -> Result<[usize; 2]> {
    <[usize; 2]>::try_from(view.shape).map_err(|_| Error::TensorShape {
        name: name.to_owned(),
        path: source.path_of(name),
        expected: vec![0, 0],
        got: view.shape.to_vec(),
    })
}

/// Full names of the weights that the FP8_BLOCK recipe quantizes: everything linear but the head, the vision tower and the delta nets.
fn quantized(config: &Config, source: &Checkpoint) -> HashSet<String> {
    let form = names::form_of(|name| source.get(name).is_some(), config.form);
    let rows = table::rows(config).into_iter();
    rows.filter(|row| row.kind == Kind::QuantizedLinear)
        .map(|row| names::full(form, &row.name))
        .collect()
}

fn plan(source: &Checkpoint, quantized: &HashSet<String>, layout: Layout) -> Result<Vec<Planned>> {
    let mut planned = Vec::new();
    for name in source.names() {
        let view = source.require(name)?;
        let copied = Planned {
            name: name.to_owned(),
            dtype: view.dtype,
            shape: view.shape.to_vec(),
        };
        if !quantized.contains(name) {
            planned.push(copied);
            continue;
        }
        let [rows, cols] = matrix(source, name, view)?;
        planned.push(Planned {
            dtype: Dtype::F8_E4M3,
            ..copied
        });
        planned.push(Planned {
            name: format!("{name}{}", scale_suffix(layout)),
            dtype: match layout {
                Layout::CompressedTensors => Dtype::BF16,
                Layout::HuggingFace => Dtype::F32,
            },
            shape: scale_shape(rows, cols).to_vec(),
        });
    }
    Ok(planned)
}

fn write_quantized(
    writer: &mut Writer,
    source: &Checkpoint,
    name: &str,
    view: View,
    options: &Options,
) -> Result<()> {
    let stored = match view.dtype {
        Dtype::BF16 => DType::Bf16,
        _ => DType::F32,
    };
    let weight = checkpoint::to_tensor(view, stored).ok_or_else(|| Error::TensorType {
        name: name.to_owned(),
        path: source.path_of(name),
        dtype: view.dtype.to_string(),
    })?;
    let blocks = quantize_fp8::encode(&weight, options.division)?;
    let scale_type = match options.layout {
        Layout::CompressedTensors => DType::Bf16,
        Layout::HuggingFace => DType::F32,
    };
    let scales = Tensor::from_bf16(&scale_shape(blocks.rows, blocks.cols), blocks.scales);
    writer.put(name, &blocks.bytes)?;
    writer.put(
        &format!("{name}{}", scale_suffix(options.layout)),
        &checkpoint::to_bytes(&scales, scale_type)?,
    )
}

fn write_companions(
    writer: &mut Writer,
    config: &Config,
    source: &Checkpoint,
    from: &Path,
    layout: Layout,
) -> Result<()> {
    let unquantized = unquantized_linears(config, source);
    let note = match layout {
        Layout::CompressedTensors => compressed_tensors_note(unquantized),
        Layout::HuggingFace => hugging_face_note(unquantized),
    };
    let mut json = config.raw().clone();
    if let Some(top) = json.as_object_mut() {
        top.insert("quantization_config".to_owned(), note);
    }
    writer.put_json("config.json", &sorted(&json))?;
    if layout == Layout::CompressedTensors {
        writer.put_file("recipe.yaml", RECIPE.as_bytes())?;
    }
    checkpoint::copy_companions(from, writer.staging())?;
    if !from.join("generation_config.json").is_file() {
        writer.put_json("generation_config.json", &generation_config(config.raw()))?;
    }
    Ok(())
}

/// The linear layers left alone, each by name, in the order that llm-compressor lists them: vision tower, text layers, head.
fn unquantized_linears(config: &Config, source: &Checkpoint) -> Vec<String> {
    let mut modules = Vec::new();
    let has = |module: &str| source.get(&format!("{module}.weight")).is_some();
    let visual = "model.visual";
    let blocks = (0..).map(|i| {
        (
            format!("{visual}.blocks.{i}"),
            &names::VISUAL_BLOCK_LINEARS[..],
        )
    });
    let mergers = [(
        format!("{visual}.merger"),
        &names::VISUAL_MERGER_LINEARS[..],
    )];
    let deep = (0..).map(|i| {
        (
            format!("{visual}.deepstack_merger_list.{i}"),
            &names::VISUAL_MERGER_LINEARS[..],
        )
    });
    let mut add_while_present =
        |parents: &mut dyn Iterator<Item = (String, &'static [&'static str])>| {
            for (parent, linears) in parents {
                let present: Vec<String> = linears
                    .iter()
                    .map(|linear| format!("{parent}.{linear}"))
                    .filter(|module| has(module))
                    .collect();
                if present.is_empty() {
                    break;
                }
                modules.extend(present);
            }
        };
    add_while_present(&mut blocks.into_iter());
    add_while_present(&mut mergers.into_iter());
    add_while_present(&mut deep.into_iter());

    let form = names::form_of(|name| source.get(name).is_some(), config.form);
    for (layer_idx, layer_type) in config.layer_types.iter().enumerate() {
        if *layer_type == LayerType::Linear {
            modules.extend(names::DELTA_NET_LINEARS.map(|linear| {
                names::full(form, &format!("layers.{layer_idx}.linear_attn.{linear}"))
            }));
        }
    }
    modules.push("lm_head".to_owned());
    if source.names().any(|name| name.starts_with("mtp.")) {
        modules.push("re:^mtp.*".to_owned());
    }
    modules
}

/// The note of compressed-tensors 0.19 for the FP8_BLOCK preset; activations are quantized by the reader, per token in groups of 128.
fn compressed_tensors_note(ignore: Vec<String>) -> Value {
    json!({
        "config_groups": {"group_0": {
            "format": "float-quantized",
            "input_activations": {
                "actorder": null,
                "block_structure": null,
                "dynamic": true,
                "group_size": BLOCK,
                "num_bits": 8,
                "observer": null,
                "observer_kwargs": {},
                "scale_dtype": null,
                "strategy": "group",
                "symmetric": true,
                "type": "float",
                "zp_dtype": null
            },
            "output_activations": null,
            "targets": ["Linear"],
            "weights": {
                "actorder": null,
                "block_structure": [BLOCK, BLOCK],
                "dynamic": false,
                "group_size": null,
                "num_bits": 8,
                "observer": "memoryless_minmax",
                "observer_kwargs": {},
                "scale_dtype": null,
                "strategy": "block",
                "symmetric": true,
                "type": "float",
                "zp_dtype": null
            }
        }},
        "format": "float-quantized",
        "global_compression_ratio": null,
        "ignore": ignore,
        "kv_cache_scheme": null,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "sparsity_config": {},
        "transform_config": {},
        "version": "0.19.0"
    })
}

fn hugging_face_note(unquantized: Vec<String>) -> Value {
    let modules: Vec<String> = unquantized
        .into_iter()
        .map(|module| module.replace("re:^mtp.*", "mtp"))
        .collect();
    json!({
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "modules_to_not_convert": modules,
        "quant_method": "fp8",
        "weight_block_size": [BLOCK, BLOCK]
    })
}

/// Says what was done, in llm-compressor's words; readers do not need it.
const RECIPE: &str = "default_stage:
  default_modifiers:
    QuantizationModifier:
      targets: [Linear]
      ignore: [lm_head, 're:.*visual.*', 're:.*linear_attn.*']
      scheme: FP8_BLOCK
      bypass_divisibility_checks: false
      requires_calibration_data: false
";

fn generation_config(config: &Value) -> Value {
    let text = config.get("text_config").unwrap_or(config);
    let mut json = Map::new();
    json.insert("_from_model_config".to_owned(), true.into());
    if let Some(eos) = text.get("eos_token_id").filter(|eos| !eos.is_null()) {
        json.insert("eos_token_id".to_owned(), eos.clone());
    }
    if let Some(version) = config.get("transformers_version") {
        json.insert("transformers_version".to_owned(), version.clone());
    }
    json.insert("use_cache".to_owned(), true.into());
    Value::Object(json)
}

/// Keys in alphabetical order at every depth, as the recorded configs have them.
fn sorted(json: &Value) -> Value {
    match json {
        Value::Object(map) => {
            let mut keys: Vec<&String> = map.keys().collect();
            keys.sort();
            let entries = keys.into_iter().map(|key| (key.clone(), sorted(&map[key])));
            Value::Object(entries.collect())
        }
        Value::Array(items) => Value::Array(items.iter().map(sorted).collect()),
        other => other.clone(),
    }
}
