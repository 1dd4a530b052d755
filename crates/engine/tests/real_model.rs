//! The engine over a small seeded Qwen3.5: what the toy cannot show, because its arithmetic never rounds.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::time::Duration;

use engine::{Engine, EngineConfig, EngineHandle, Event, Request, Sampling};
use kernel::{DType, Device};
use model::{Config, Model};
use serde_json::json;

const VOCAB: usize = 64;
const PATIENCE: Duration = Duration::from_secs(120);

fn tiny_model() -> Model {
    tiny_model_of(DType::F32)
}

fn tiny_model_of(dtype: DType) -> Model {
    let config = json!({
        "architectures": ["Qwen3_5ForCausalLM"],
        "model_type": "qwen3_5_text",
        "attention_bias": false,
        "attn_output_gate": true,
        "head_dim": 32,
        "hidden_act": "silu",
        "hidden_size": 64,
        // Wide weights: logits far apart, so that rounding decides nothing.
        "initializer_range": 0.2,
        "intermediate_size": 96,
        "layer_types": ["linear_attention", "full_attention"],
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 32,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "linear_value_head_dim": 32,
        "max_position_embeddings": 1024,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "num_key_value_heads": 1,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"partial_rotary_factor": 0.5, "rope_theta": 10000000, "rope_type": "default"},
        "tie_word_embeddings": true,
        "vocab_size": VOCAB,
    });
    Model::init(Config::from_json(&config).unwrap(), 3, dtype)
}

fn start(config: EngineConfig) -> EngineHandle {
    Engine::start(tiny_model(), config).unwrap()
}

fn request(ids: &[u32], max_tokens: usize) -> Request {
    Request {
        ids: ids.to_vec(),
        max_tokens,
        sampling: Sampling {
            seed: Some(9),
            top_k: 20,
            top_p: 0.9,
            presence_penalty: 0.5,
            ..Sampling::default()
        },
        ..Request::default()
    }
}

fn generate(engine: &EngineHandle, request: Request) -> Vec<u32> {
    let receiver = engine.submit(request).unwrap();
    let mut ids = Vec::new();
    loop {
        match receiver.recv_timeout(PATIENCE) {
            Some(Event::Token { id, .. }) => ids.push(id),
            Some(Event::Finished { .. }) => return ids,
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn greedy_equals_the_models_own_loop() {
    let model = tiny_model();
    let prompt: Vec<u32> = (0..23).map(|n| n * 5 % VOCAB as u32).collect();
    let mut state = model.new_state().unwrap();
    let mut logits = model.prefill(&mut state, &prompt).unwrap();
    let mut expected = Vec::new();
    for _ in 0..16 {
        let row = logits.f32s();
        let best = (0..row.len())
            .max_by(|a, b| row[*a].total_cmp(&row[*b]))
            .unwrap() as u32;
        expected.push(best);
        logits = model.step(&mut [&mut state], &[best]).unwrap();
    }

    let engine = start(EngineConfig {
        prefill_chunk: 7,
        ..EngineConfig::default()
    });
    let mut greedy = request(&prompt, 16);
    greedy.sampling = Sampling::greedy();
    assert_eq!(generate(&engine, greedy), expected);
}

#[test]
fn next_turn_from_a_kept_state_gives_the_same_tokens_for_less_work() {
    let remembering = start(EngineConfig::default());
    let forgetful = start(EngineConfig {
        max_snapshots: 0,
        ..EngineConfig::default()
    });
    let mut ids: Vec<u32> = (0..20).collect();
    for turn in 0..4 {
        let reply = generate(&remembering, request(&ids, 12));
        assert_eq!(
            reply,
            generate(&forgetful, request(&ids, 12)),
            "turn {turn}"
        );
        ids.extend(reply);
        ids.extend([1, 2, 3 + turn]);
    }
    let (with, without) = (remembering.stats(), forgetful.stats());
    assert_eq!(
        with.prefill_tokens + with.prefix_hit_tokens,
        without.prefill_tokens
    );
    // A turn computes its three new tokens and the last one drawn, which no state has seen.
    assert_eq!(with.prefill_tokens, 20 + 3 * 4);
}

/// On a GPU in bf16, where the decoder takes the steps and its kernels change with the number of sequences.
#[test]
fn seed_gives_the_same_tokens_in_any_company() {
    let device = Device::for_tests();
    let dtype = match device {
        Device::Cpu => DType::F32,
        Device::Cuda(_) => DType::Bf16,
    };
    let config = EngineConfig {
        max_snapshots: 0,
        max_sequences: 40,
        ..EngineConfig::default()
    };
    let model = tiny_model_of(dtype).to_device(device).unwrap();
    let engine = Engine::start(model, config).unwrap();
    let prompt: Vec<u32> = (10..40).collect();
    let alone = generate(&engine, request(&prompt, 24));
    for n_others in [1, 6, 11, 33] {
        let company: Vec<_> = (0..n_others)
            .map(|n| engine.submit(request(&[n, n + 7, 60 - n], 60)).unwrap())
            .collect();
        let among = generate(&engine, request(&prompt, 24));
        assert_eq!(alone, among, "{n_others} others");
        drop(company);
    }
}
