//! The only map between names below the text model (`layers.0.mlp.up_proj.weight`, as the table of weights has them) and those of
//! checkpoints and adapters.

use crate::config::Form;

const NESTED_PREFIX: &str = "model.language_model.";
const TEXT_ONLY_PREFIX: &str = "model.";
const PEFT_PREFIX: &str = "base_model.model.";
/// The embedding table, below the text model.
pub(crate) const EMBEDDING: &str = "embed_tokens.weight";
/// A head of its own, beside the text model.
pub(crate) const HEAD: &str = "lm_head.weight";

/// Tensors of a checkpoint that this engine carries through without using them.
const CARRIED: [&str; 3] = ["model.visual.", "visual.", "mtp."];

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

#[cfg(test)]
mod tests {
    use crate::config::{Config, LayerType};
    use crate::sizes;

    use super::super::{Kind, table};
    use super::*;

    #[test]
    fn every_linear_layer_that_is_never_quantized_is_named() {
        let json = sizes::config_for(sizes::TINY, 64, 0).unwrap();
        let config = Config::from_json(&json).unwrap();
        let rows = table::rows(&config).into_iter();
        let unquantized = rows.filter(|row| row.kind == Kind::Linear);
        let mut in_table: Vec<String> = unquantized.map(|row| row.name).collect();
        let layers = config.layer_types.iter().enumerate();
        let delta_nets = layers.filter(|(_, layer_type)| **layer_type == LayerType::Linear);
        let mut in_list: Vec<String> = delta_nets
            .flat_map(|(layer_idx, _)| {
                DELTA_NET_LINEARS
                    .map(|linear| format!("layers.{layer_idx}.linear_attn.{linear}.weight"))
            })
            .collect();
        in_table.sort();
        in_list.sort();
        assert!(!in_list.is_empty());
        assert_eq!(in_list, in_table);
    }
}
