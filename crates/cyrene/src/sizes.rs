//! The sizes that `live --size` knows: where the released ones come from, and the shape of the tiny one that is made from a seed.

use serde_json::{Value, json};

/// Released base models by the name of their size.
const RELEASED: [(&str, &str); 4] = [
    ("0.8b", "Qwen/Qwen3.5-0.8B-Base"),
    ("2b", "Qwen/Qwen3.5-2B-Base"),
    ("4b", "Qwen/Qwen3.5-4B-Base"),
    ("9b", "Qwen/Qwen3.5-9B-Base"),
];

/// Name of the size that needs no download.
pub const TINY: &str = "tiny";

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
    format!("{TINY}, {}", released.join(", "))
}

/// `config.json` of a size, without its weights: the released shapes, or the tiny one for a small vocabulary.
pub fn config(size: &str) -> Option<Value> {
    // hidden, layers, feed-forward, query heads, key:value heads, value heads of the delta nets, tied head
    let (hidden, layers, wide, n_q, n_kv, n_v, tied) = match size {
        TINY => return Some(tiny_config(TINY_VOCABULARY, 0)),
        "0.8b" => (1024, 24, 3584, 8, 2, 16, true),
        "2b" => (2048, 24, 6144, 8, 2, 16, true),
        "4b" => (2560, 32, 9216, 16, 4, 32, true),
        "9b" => (4096, 32, 12288, 16, 4, 32, false),
        _ => return None,
    };
    let mut config = tiny_config(248_320, 248_046);
    let layer_types: Vec<&str> = (1..=layers)
        .map(|layer| match layer % 4 {
            0 => "full_attention",
            _ => "linear_attention",
        })
        .collect();
    let changes = json!({
        "hidden_size": hidden,
        "intermediate_size": wide,
        "num_hidden_layers": layers,
        "layer_types": layer_types,
        "num_attention_heads": n_q,
        "num_key_value_heads": n_kv,
        "head_dim": 256,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": n_v,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "tie_word_embeddings": tied,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10_000_000,
            "partial_rotary_factor": 0.25,
            "mrope_interleaved": true,
            "mrope_section": [11, 11, 10]
        }
    });
    config["tie_word_embeddings"] = json!(tied);
    if let (Some(text), Value::Object(changes)) = (config["text_config"].as_object_mut(), changes) {
        text.extend(changes);
    }
    Some(config)
}

/// Ids of the tiny size's table where no tokenizer says otherwise.
const TINY_VOCABULARY: usize = 4096;

/// `config.json` of a model of about four million parameters for a vocabulary of `vocab_size`:
/// Qwen3.5's architecture, four layers (three linear, one full attention), head dims and widths that divide by the FP8 block.
pub fn tiny_config(vocab_size: usize, end_id: u32) -> Value {
    json!({
        "architectures": ["Qwen3_5ForConditionalGeneration"],
        "model_type": "qwen3_5",
        "dtype": "float32",
        "tie_word_embeddings": true,
        "text_config": {
            "model_type": "qwen3_5_text",
            "dtype": "float32",
            "vocab_size": vocab_size,
            "hidden_size": 256,
            "intermediate_size": 768,
            "num_hidden_layers": 4,
            "full_attention_interval": 4,
            "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"],
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 64,
            "attn_output_gate": true,
            "attention_bias": false,
            "attention_dropout": 0.0,
            "linear_num_key_heads": 4,
            "linear_num_value_heads": 8,
            "linear_key_head_dim": 32,
            "linear_value_head_dim": 32,
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
                "mrope_section": [3, 3, 2]
            },
            "bos_token_id": null,
            "eos_token_id": end_id,
            "pad_token_id": null,
            "tie_word_embeddings": true,
            "use_cache": true
        }
    })
}
