//! The only map between this model's weights and checkpoint names.
//!
//! Names here are below the text model (`layers.0.mlp.up_proj.weight`); [`full`] puts the checkpoint's prefix before them.

use crate::config::Form;
use crate::linear::Linear;
use crate::parameter::Parameter;

use super::Qwen3_5;
use super::block::Mixer;

const NESTED_PREFIX: &str = "model.language_model.";
const TEXT_ONLY_PREFIX: &str = "model.";
const PEFT_PREFIX: &str = "base_model.model.";
/// The embedding table, below the text model.
pub(crate) const EMBEDDING: &str = "embed_tokens.weight";
/// A head of its own, beside the text model.
pub(crate) const HEAD: &str = "lm_head.weight";

/// Tensors of a checkpoint that this engine carries through without using them.
const CARRIED: [&str; 3] = ["model.visual.", "visual.", "mtp."];

/// Quantized by the FP8_BLOCK recipe (everything linear but the head, the vision tower and the delta nets).
const FP8_BLOCK: [&str; 7] = [
    ".self_attn.q_proj.weight",
    ".self_attn.k_proj.weight",
    ".self_attn.v_proj.weight",
    ".self_attn.o_proj.weight",
    ".mlp.gate_proj.weight",
    ".mlp.up_proj.weight",
    ".mlp.down_proj.weight",
];

/// Linear layers of a delta net in the order that transformers defines them: the order of `ignore` in recorded configs.
pub(crate) const DELTA_NET_LINEARS: [&str; 5] = [
    "out_proj",
    "in_proj_qkv",
    "in_proj_z",
    "in_proj_b",
    "in_proj_a",
];

/// Linear layers of a vision block and of the merger, likewise in the order of definition.
pub(crate) const VISUAL_BLOCK_LINEARS: [&str; 4] =
    ["attn.qkv", "attn.proj", "mlp.linear_fc1", "mlp.linear_fc2"];
pub(crate) const VISUAL_MERGER_LINEARS: [&str; 2] = ["linear_fc1", "linear_fc2"];

/// A named part of the model.
pub(crate) enum Part<L, P> {
    Linear(L),
    Plain(P),
}

/// Writes the walk over all weights once for shared and once for exclusive access.
macro_rules! walk {
    ($name:ident, $($mutable:tt)?) => {
        /// Every weight with its name, in the fixed order of gradients and saves.
        pub(crate) fn $name(
            model: &$($mutable)? Qwen3_5,
        ) -> Vec<(String, Part<&$($mutable)? Linear, &$($mutable)? Parameter>)> {
            use Part::{Linear, Plain};
            let mut parts = vec![(
                EMBEDDING.to_owned(),
                Plain(&$($mutable)? model.embed_tokens),
            )];
            for (layer_idx, block) in (&$($mutable)? model.layers).into_iter().enumerate() {
                let mut add = |name: &str, part| parts.push((format!("layers.{layer_idx}.{name}"), part));
                add("input_layernorm.weight", Plain(&$($mutable)? block.input_layernorm));
                match &$($mutable)? block.mixer {
                    Mixer::DeltaNet(w) => {
                        add("linear_attn.A_log", Plain(&$($mutable)? w.a_log));
                        add("linear_attn.conv1d.weight", Plain(&$($mutable)? w.conv1d));
                        add("linear_attn.dt_bias", Plain(&$($mutable)? w.dt_bias));
                        add("linear_attn.in_proj_a.weight", Linear(&$($mutable)? w.in_proj_a));
                        add("linear_attn.in_proj_b.weight", Linear(&$($mutable)? w.in_proj_b));
                        add("linear_attn.in_proj_qkv.weight", Linear(&$($mutable)? w.in_proj_qkv));
                        add("linear_attn.in_proj_z.weight", Linear(&$($mutable)? w.in_proj_z));
                        add("linear_attn.norm.weight", Plain(&$($mutable)? w.norm));
                        add("linear_attn.out_proj.weight", Linear(&$($mutable)? w.out_proj));
                    }
                    Mixer::Attention(w) => {
                        add("self_attn.k_norm.weight", Plain(&$($mutable)? w.k_norm));
                        add("self_attn.k_proj.weight", Linear(&$($mutable)? w.k_proj));
                        add("self_attn.o_proj.weight", Linear(&$($mutable)? w.o_proj));
                        add("self_attn.q_norm.weight", Plain(&$($mutable)? w.q_norm));
                        add("self_attn.q_proj.weight", Linear(&$($mutable)? w.q_proj));
                        add("self_attn.v_proj.weight", Linear(&$($mutable)? w.v_proj));
                    }
                }
                add(
                    "post_attention_layernorm.weight",
                    Plain(&$($mutable)? block.post_attention_layernorm),
                );
                add("mlp.down_proj.weight", Linear(&$($mutable)? block.mlp.down_proj));
                add("mlp.gate_proj.weight", Linear(&$($mutable)? block.mlp.gate_proj));
                add("mlp.up_proj.weight", Linear(&$($mutable)? block.mlp.up_proj));
            }
            parts.push(("norm.weight".to_owned(), Plain(&$($mutable)? model.norm)));
            if let Some(head) = &$($mutable)? model.lm_head {
                parts.push((HEAD.to_owned(), Plain(head)));
            }
            parts
        }
    };
}

walk!(parts,);
walk!(parts_mut, mut);

/// Every weight, linear or not.
pub(crate) fn parameters(model: &Qwen3_5) -> Vec<(String, &Parameter)> {
    parts(model)
        .into_iter()
        .map(|(name, part)| match part {
            Part::Linear(linear) => (name, &linear.weight),
            Part::Plain(parameter) => (name, parameter),
        })
        .collect()
}

/// As [`parameters`], exclusively.
pub(crate) fn parameters_mut(model: &mut Qwen3_5) -> Vec<(String, &mut Parameter)> {
    parts_mut(model)
        .into_iter()
        .map(|(name, part)| match part {
            Part::Linear(linear) => (name, &mut linear.weight),
            Part::Plain(parameter) => (name, parameter),
        })
        .collect()
}

/// Every linear layer, by module name (without `.weight`).
pub(crate) fn linears(model: &Qwen3_5) -> Vec<(String, &Linear)> {
    let linears = parts(model)
        .into_iter()
        .filter_map(|(name, part)| match part {
            Part::Linear(linear) => Some((module(&name), linear)),
            Part::Plain(_) => None,
        });
    linears.collect()
}

/// As [`linears`], exclusively.
pub(crate) fn linears_mut(model: &mut Qwen3_5) -> Vec<(String, &mut Linear)> {
    let linears = parts_mut(model)
        .into_iter()
        .filter_map(|(name, part)| match part {
            Part::Linear(linear) => Some((module(&name), linear)),
            Part::Plain(_) => None,
        });
    linears.collect()
}

/// How a fresh weight is drawn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Initial {
    /// normal(0, initializer_range): matrices and the embedding.
    Normal,
    /// uniform(±1/√4), torch's default for a convolution of width 4: a start near 0 would leave the delta rule without values.
    Convolution,
    /// ln uniform(0, 16)
    ALog,
    /// Gated norms and dt_bias.
    One,
    /// Norms that scale by 1 + w.
    Zero,
}

/// The draw for the weight of this name.
pub(crate) fn initial(name: &str) -> Initial {
    match name {
        _ if name.ends_with("linear_attn.A_log") => Initial::ALog,
        _ if name.ends_with("linear_attn.dt_bias") => Initial::One,
        _ if name.ends_with("linear_attn.norm.weight") => Initial::One,
        _ if name.ends_with("conv1d.weight") => Initial::Convolution,
        _ if name.ends_with("norm.weight") => Initial::Zero,
        _ => Initial::Normal,
    }
}

/// Released checkpoints hold these in f32 among bf16 tensors.
pub(crate) fn keeps_f32(name: &str) -> bool {
    name.ends_with("linear_attn.A_log") || name.ends_with("linear_attn.norm.weight")
}

/// The name in a checkpoint of this form.
pub(crate) fn full(form: Form, name: &str) -> String {
    if name == HEAD {
        return name.to_owned();
    }
    match form {
        Form::Nested => format!("{NESTED_PREFIX}{name}"),
        Form::TextOnly => format!("{TEXT_ONLY_PREFIX}{name}"),
    }
}

/// The form whose names `has` knows, whatever the config says: fine-tuning tools mix them.
pub(crate) fn form_of(has: impl Fn(&str) -> bool, stated: Form) -> Form {
    [stated, Form::Nested, Form::TextOnly]
        .into_iter()
        .find(|form| has(&full(*form, EMBEDDING)))
        .unwrap_or(stated)
}

/// Whether the tensor is carried through saves unread.
pub(crate) fn is_carried(name: &str) -> bool {
    CARRIED.iter().any(|prefix| name.starts_with(prefix))
}

/// Whether the FP8_BLOCK recipe quantizes the tensor of this full name.
pub(crate) fn is_fp8_block(name: &str) -> bool {
    !is_carried(name) && FP8_BLOCK.iter().any(|suffix| name.ends_with(suffix))
}

/// PEFT's names of A and B beside a module.
pub(crate) fn lora(form: Form, module: &str) -> [String; 2] {
    let module = full(form, module);
    [Side::A, Side::B].map(|side| format!("{PEFT_PREFIX}{module}.{}.weight", side.name()))
}

/// Which half of an adapter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Side {
    A,
    B,
}

impl Side {
    pub fn name(self) -> &'static str {
        match self {
            Side::A => "lora_A",
            Side::B => "lora_B",
        }
    }
}

/// What the name of a tensor in a PEFT file says.
pub(crate) struct AdapterTensor {
    /// The layer in the model that PEFT wrapped: `model.language_model.layers.0.mlp.up_proj`, with another prefix or none for other classes.
    pub module: String,
    /// The layer below the text model: `layers.0.mlp.up_proj`.
    pub below: String,
    pub side: Side,
}

/// Reads PEFT's name of a lora_A or lora_B, with or without the adapter's name `default`; None for any other tensor.
pub(crate) fn adapter_tensor(name: &str) -> Option<AdapterTensor> {
    let named = name.strip_prefix(PEFT_PREFIX)?.strip_suffix(".weight")?;
    let named = named.strip_suffix(".default").unwrap_or(named);
    let (module, side) = [Side::A, Side::B].into_iter().find_map(|side| {
        let module = named.strip_suffix(side.name())?.strip_suffix('.')?;
        Some((module, side))
    })?;
    let below = [NESTED_PREFIX, "language_model.", TEXT_ONLY_PREFIX]
        .into_iter()
        .find_map(|prefix| module.strip_prefix(prefix))
        .unwrap_or(module);
    Some(AdapterTensor {
        module: module.to_owned(),
        below: below.to_owned(),
        side,
    })
}

/// PEFT's `target_modules`: a pattern over module names of the text model, so that the vision tower never matches.
pub(crate) fn target_pattern(form: Form, targets: &[String]) -> String {
    let model = match form {
        Form::Nested => r"model\.language_model",
        Form::TextOnly => "model",
    };
    format!(r"^({model}(?=\.).*\.({}))$", targets.join("|"))
}

/// `q_proj` of `layers.3.self_attn.q_proj`.
pub(crate) fn last_part(module: &str) -> &str {
    module.rsplit('.').next().unwrap_or(module)
}

/// The linear layer that a weight of this name belongs to; None for norms, convolutions and tables.
pub(crate) fn linear_module(weight_name: &str) -> Option<&str> {
    let module = weight_name.strip_suffix(".weight")?;
    last_part(module).contains("proj").then_some(module)
}

fn module(weight_name: &str) -> String {
    weight_name
        .strip_suffix(".weight")
        .unwrap_or(weight_name)
        .to_owned()
}
