//! The sizes that `live --size` knows: where the released ones come from, and the shapes of all.

use serde_json::{Value, json};

use crate::{Error, Result};

/// Released base models by the name of their size.
const RELEASED: [(&str, &str); 4] = [
    ("0.8b", "Qwen/Qwen3.5-0.8B-Base"),
    ("2b", "Qwen/Qwen3.5-2B-Base"),
    ("4b", "Qwen/Qwen3.5-4B-Base"),
    ("9b", "Qwen/Qwen3.5-9B-Base"),
];

/// Name of the size for a demo on a CPU.
pub const TINY: &str = "tiny";
/// Name of the size that a GPU trains from a seed in minutes.
pub const SMALL: &str = "small";

/// Hub id of a released size.
pub fn hub_id(size: &str) -> Option<&'static str> {
    RELEASED
        .iter()
        .find(|(name, _)| *name == size)
        .map(|(_, id)| *id)
}

/// All names, for messages.
pub fn names() -> String {
    let released: Vec<&str> = RELEASED.iter().map(|(name, _)| *name).collect();
    format!("{TINY}, {SMALL}, {}", released.join(", "))
}

/// The size that a command line names, in any case: `4B` is `4b`.
///
/// # Errors
/// [`Error::NoSize`] with what is known, for a name that is not.
pub fn parse(text: &str) -> Result<String> {
    let size = text.trim().to_ascii_lowercase();
    match is_never_released(&size) || hub_id(&size).is_some() {
        true => Ok(size),
        false => Err(Error::NoSize { known: names() }),
    }
}

/// Whether weights of this size can come from a seed only.
pub fn is_never_released(size: &str) -> bool {
    [TINY, SMALL].contains(&size)
}

/// Tokens of the vocabulary that is learned from the story for a model of this size from a seed, the 33 added ones among them.
pub fn vocabulary(size: &str) -> usize {
    if size == TINY { 2048 } else { 8192 }
}

/// `config.json` of a size, without its weights, with the released vocabulary or, where none was released, that of [`vocabulary`].
pub fn config(size: &str) -> Option<Value> {
    match is_never_released(size) {
        true => config_for(size, vocabulary(size), 0),
        false => config_for(size, 248_320, 248_046),
    }
}

/// `config.json` of a size for a vocabulary: Qwen3.5's architecture, one full attention after three delta nets (after one in tiny), widths
/// that divide by the FP8 block. Tiny has about two million parameters, small a hundred million; the others have the released shapes.
pub fn config_for(size: &str, vocab_size: usize, end_id: u32) -> Option<Value> {
    struct Shape {
        hidden: usize,
        layers: usize,
        /// Every which layer is one of full attention; the others are delta nets.
        attention_every: usize,
        wide: usize,
        /// Query heads, key:value heads and their width.
        heads: [usize; 3],
        /// Key heads and value heads of the delta nets, and their width.
        linear_heads: [usize; 3],
        tied: bool,
    }
    let shape = |hidden, layers, wide, heads, linear_heads, tied| Shape {
        hidden,
        layers,
        attention_every: 4,
        wide,
        heads,
        linear_heads,
        tied,
    };
    let shape = match size {
        // Few layers: in a demo's minutes two learn more than four (JOURNAL.md, 2026-12-01).
        TINY => Shape {
            attention_every: 2,
            ..shape(256, 2, 768, [4, 2, 64], [4, 8, 32], true)
        },
        SMALL => shape(768, 12, 2304, [4, 2, 256], [6, 6, 128], true),
        "0.8b" => shape(1024, 24, 3584, [8, 2, 256], [16, 16, 128], true),
        "2b" => shape(2048, 24, 6144, [8, 2, 256], [16, 16, 128], true),
        "4b" => shape(2560, 32, 9216, [16, 4, 256], [16, 32, 128], true),
        "9b" => shape(4096, 32, 12288, [16, 4, 256], [16, 32, 128], false),
        _ => return None,
    };
    let layer_types: Vec<&str> = (1..=shape.layers)
        .map(|layer| match layer % shape.attention_every {
            0 => "full_attention",
            _ => "linear_attention",
        })
        .collect();
    let [n_q, n_kv, head_dim] = shape.heads;
    let [n_linear_k, n_linear_v, linear_dim] = shape.linear_heads;
    // A quarter of a head's pairs turn; the released models split those of 256 as 11, 11, 10.
    let sections = match head_dim {
        256 => [11, 11, 10],
        _ => [3, 3, 2],
    };
    Some(json!({
        "architectures": ["Qwen3_5ForConditionalGeneration"],
        "model_type": "qwen3_5",
        "dtype": if size == TINY { "float32" } else { "bfloat16" },
        "tie_word_embeddings": shape.tied,
        "text_config": {
            "model_type": "qwen3_5_text",
            "dtype": if size == TINY { "float32" } else { "bfloat16" },
            "vocab_size": vocab_size,
            "hidden_size": shape.hidden,
            "intermediate_size": shape.wide,
            "num_hidden_layers": shape.layers,
            "full_attention_interval": shape.attention_every,
            "layer_types": layer_types,
            "num_attention_heads": n_q,
            "num_key_value_heads": n_kv,
            "head_dim": head_dim,
            "attn_output_gate": true,
            "attention_bias": false,
            "attention_dropout": 0.0,
            "linear_num_key_heads": n_linear_k,
            "linear_num_value_heads": n_linear_v,
            "linear_key_head_dim": linear_dim,
            "linear_value_head_dim": linear_dim,
            "linear_conv_kernel_dim": 4,
            "mamba_ssm_dtype": "float32",
            "hidden_act": "silu",
            "rms_norm_eps": 1e-6,
            "initializer_range": 0.02,
            "max_position_embeddings": 4096,
            "mtp_num_hidden_layers": 0,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10_000_000,
                "partial_rotary_factor": 0.25,
                "mrope_interleaved": true,
                "mrope_section": sections
            },
            "bos_token_id": null,
            "eos_token_id": end_id,
            "pad_token_id": null,
            "tie_word_embeddings": shape.tied,
            "use_cache": true
        }
    }))
}

#[cfg(test)]
mod tests {
    use crate::Config;

    use super::*;

    #[test]
    fn sizes_have_the_parameters_their_names_promise() {
        for (size, low, high) in [
            (TINY, 2e6, 2.5e6),
            (SMALL, 90e6, 115e6),
            ("0.8b", 0.7e9, 0.9e9),
            ("2b", 1.8e9, 2.1e9),
            ("4b", 4.0e9, 4.5e9),
            ("9b", 8.5e9, 9.5e9),
        ] {
            assert_eq!(parse(&size.to_uppercase()).unwrap(), size);
            let n = Config::from_json(&config(size).unwrap())
                .unwrap()
                .n_params() as f64;
            assert!((low..high).contains(&n), "{size}: {n}");
        }
        for size in [TINY, SMALL] {
            let config = Config::from_json(&config(size).unwrap()).unwrap();
            assert_eq!(config.vocab_size, vocabulary(size), "{size}");
        }
        assert!(config("3b").is_none() && parse("3b").is_err());
    }
}
