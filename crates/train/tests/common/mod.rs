//! A small seeded model, documents for it and a job that trains it in a second.
#![allow(dead_code, reason = "each test file uses its own part")]

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use kernel::DType;
use model::{Config, Model};
use serde_json::{Value, json};
use text::Example;
use train::job::LoraTuner;
use train::job::{SaveDType, ScheduleKind};
use train::metrics::TrainLine;
use train::{
    BatchConfig, DataConfig, Job, OptimizerConfig, RunConfig, Silent, Summary, TunerConfig,
    ValidationSet,
};

pub const VOCAB: usize = 96;

/// Two layers, one of each kind.
pub fn tiny_config() -> Config {
    let text = json!({
        "model_type": "qwen3_5_text",
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "layer_types": ["linear_attention", "full_attention"],
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "hidden_act": "silu",
        "attention_bias": false,
        "attn_output_gate": true,
        "linear_conv_kernel_dim": 4,
        "linear_num_key_heads": 1,
        "linear_key_head_dim": 16,
        "linear_num_value_heads": 2,
        "linear_value_head_dim": 16,
        "rms_norm_eps": 1e-6,
        "initializer_range": 0.05,
        "rope_parameters": { "rope_type": "default", "rope_theta": 10000, "partial_rotary_factor": 0.5 },
        "max_position_embeddings": 512,
        "tie_word_embeddings": true,
    });
    let config = json!({
        "architectures": ["Qwen3_5ForConditionalGeneration"],
        "model_type": "qwen3_5",
        "text_config": text,
        "tie_word_embeddings": true,
    });
    Config::from_json(&config).unwrap()
}

pub fn tiny_model() -> Model {
    Model::init(tiny_config(), 11, DType::F32)
}

/// A document whose ids follow from `seed`; all but the first carry loss.
pub fn document(seed: u64, n_tokens: usize, language: &str) -> Example {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let input_ids: Vec<u32> = (0..n_tokens)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state % VOCAB as u64) as u32
        })
        .collect();
    labelled(input_ids, language)
}

/// The ids, all but the first with loss, three bytes a token.
pub fn labelled(input_ids: Vec<u32>, language: &str) -> Example {
    let mut labels: Vec<i32> = input_ids.iter().map(|id| *id as i32).collect();
    if let Some(first) = labels.first_mut() {
        *first = -100;
    }
    let bytes = 3 * input_ids.len().saturating_sub(1);
    let mut example = Example::document(input_ids, labels);
    example.origin.bytes = bytes;
    example.origin.language = Some(language.to_string());
    example
}

/// Twelve training documents and four held-out ones in two languages; two epochs of five steps.
pub fn job(out_dir: &Path) -> Job {
    let documents = |seed: u64, n: u64| {
        (0..n)
            .map(|i| {
                let language = ["chs", "en"][(i % 2) as usize];
                document(seed + i, 9 + 3 * i as usize % 14, language)
            })
            .collect::<Vec<_>>()
    };
    Job {
        seed: 7,
        data: DataConfig {
            row_tokens: 24,
            packing: text::pack::Packing::BinPack,
        },
        tuner: TunerConfig::Full {},
        optimizer: OptimizerConfig {
            lr: 2e-3,
            min_lr: 2e-4,
            schedule: ScheduleKind::Cosine,
            ..OptimizerConfig::default()
        },
        batch: BatchConfig {
            rows: 1,
            accumulate: 2,
        },
        run: RunConfig {
            epochs: 2,
            validate_every: 4,
            save_every: 3,
            save_every_minutes: 0.0,
            save_dtype: SaveDType::F32,
            ..RunConfig::default()
        },
        train: documents(100, 12),
        source_weights: Vec::new(),
        validation: vec![ValidationSet {
            name: "val".to_string(),
            examples: documents(900, 4),
        }],
        tokenizer: None,
        out_dir: out_dir.to_path_buf(),
        base_name: "tiny".to_string(),
        base_sha256: None,
        origin: json!({ "commit": "none" }),
        rows_at_once: None,
        force: false,
        stop: Arc::new(AtomicBool::new(false)),
    }
}

/// The same with LoRA, dropout and all.
pub fn with_adapter(mut job: Job) -> Job {
    job.tuner = TunerConfig::Lora(LoraTuner {
        rank: 3,
        alpha: 6.0,
        dropout: 0.2,
        targets: Vec::new(),
    });
    job
}

pub fn run_silently(job: &Job) -> (Model, Summary) {
    train::run(tiny_model(), job, &mut Silent).unwrap()
}

/// The lines of metrics.jsonl.
pub fn metrics(out_dir: &Path) -> Vec<Value> {
    let path = out_dir.join("metrics.jsonl");
    std::fs::read_to_string(path)
        .unwrap()
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

/// The lines of metrics.jsonl without what the clock says.
pub fn timeless_metrics(out_dir: &Path) -> Vec<Value> {
    let mut lines = metrics(out_dir);
    for line in &mut lines {
        line.as_object_mut().unwrap().remove("tokens_per_s");
    }
    lines
}

pub fn train_lines(out_dir: &Path) -> Vec<TrainLine> {
    metrics(out_dir)
        .into_iter()
        .filter(|line| line.get("lr").is_some())
        .map(|line| serde_json::from_value(line).unwrap())
        .collect()
}

/// Bits of every trained weight.
pub fn weight_bits(model: &Model) -> Vec<Vec<u32>> {
    let bits = |tensor: &&kernel::Tensor| tensor.f32s().iter().map(|x| x.to_bits()).collect();
    model.trainable().iter().map(bits).collect()
}

/// Names in a folder, sorted.
pub fn listing(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> = std::fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}
