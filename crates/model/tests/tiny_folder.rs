//! Folders of a seeded tiny model: round trips, names, and what the errors say.
#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

mod common;

use std::path::Path;

use common::{Tensors, tiny, tiny_json};
use kernel::DType;
use model::{Config, Error, LoraConfig, Model, SaveOptions};
use serde_json::{Value, json};

fn saved(model: &Model) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    model.save(dir.path(), None).unwrap();
    dir
}

fn edit_config(dir: &Path, edit: impl FnOnce(&mut Value)) {
    let path = dir.join("config.json");
    let mut json: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    edit(&mut json);
    std::fs::write(path, json.to_string()).unwrap();
}

/// The error text of loading, which must name all of `parts`.
fn load_error(dir: &Path, parts: &[&str]) -> Error {
    let error = Model::load(dir, DType::F32).unwrap_err();
    for part in parts {
        assert!(error.to_string().contains(part), "`{part}` not in: {error}");
    }
    error
}

#[test]
fn tied_and_untied_heads_survive_a_round_trip() {
    for tied in [true, false] {
        let model = tiny(tied, 1);
        let dir = saved(&model);
        let names = Tensors::open(dir.path().join("model.safetensors")).names();
        assert_eq!(names.contains(&"lm_head.weight".to_owned()), !tied);
        let again = Model::load(dir.path(), DType::F32).unwrap();
        assert_eq!(again.trainable_names(), model.trainable_names());
        assert_eq!(again.trainable(), model.trainable());
        assert_eq!(again.config(), model.config());
    }
}

#[test]
fn text_only_folder_loads_and_keeps_its_names() {
    let mut config = tiny_json(false)["text_config"].clone();
    config["architectures"] = json!(["Qwen3_5ForCausalLM"]);
    config["tie_word_embeddings"] = json!(false);
    let model = Model::init(Config::from_json(&config).unwrap(), 2, DType::F32);
    let dir = saved(&model);
    let names = Tensors::open(dir.path().join("model.safetensors")).names();
    assert!(names.contains(&"model.layers.0.linear_attn.A_log".to_owned()));
    let again = Model::load(dir.path(), DType::F32).unwrap();
    assert_eq!(again.trainable(), model.trainable());

    // Fine-tuning tools also write a nested config over text-only names.
    let nested =
        json!({"model_type": "qwen3_5", "text_config": config, "tie_word_embeddings": false});
    std::fs::write(dir.path().join("config.json"), nested.to_string()).unwrap();
    let again = Model::load(dir.path(), DType::F32).unwrap();
    assert_eq!(again.trainable(), model.trainable());
}

#[test]
fn stated_dtype_rounds_weights_and_keeps_the_f32_ones() {
    let model = tiny(true, 3);
    let dir = tempfile::tempdir().unwrap();
    model.save(dir.path(), Some(DType::Bf16)).unwrap();
    let file = Tensors::open(dir.path().join("model.safetensors"));
    for name in file.names() {
        let f32_kept = name.ends_with("A_log") || name.ends_with("linear_attn.norm.weight");
        let expected = if f32_kept { "F32" } else { "BF16" };
        assert_eq!(file.raw(&name).0.to_string(), expected, "{name}");
    }
    edit_config(dir.path(), |json| {
        assert_eq!(json["dtype"], "bfloat16");
        assert_eq!(json["text_config"]["dtype"], "bfloat16");
    });
}

#[test]
fn saving_over_the_loaded_folder_is_safe() {
    let dir = saved(&tiny(true, 4));
    let mut model = Model::load(dir.path(), DType::F32).unwrap();
    model.trainable_mut()[0].f32s_mut()[0] = 42.0;
    std::fs::write(dir.path().join("tokenizer.json"), "{}").unwrap();
    let options = SaveOptions {
        max_shard_bytes: 8_000,
        ..SaveOptions::default()
    };
    model.save_with(dir.path(), &options).unwrap();
    let again = Model::load(dir.path(), DType::F32).unwrap();
    assert_eq!(again.trainable(), model.trainable());
    assert!(dir.path().join("tokenizer.json").exists());
    assert!(!dir.path().join("model.safetensors").exists());
}

#[test]
fn adapter_round_trips_and_blocks_a_whole_save() {
    let mut model = tiny(true, 5);
    let config = LoraConfig {
        rank: 2,
        alpha: 3.0,
        dropout: 0.05,
        targets: vec!["v_proj".to_owned(), "in_proj_z".to_owned()],
    };
    model.attach_lora(&config, 6).unwrap();
    let dir = tempfile::tempdir().unwrap();
    assert!(matches!(
        model.save(dir.path(), None),
        Err(Error::UnmergedAdapter)
    ));
    model.save_adapter(dir.path(), "tiny").unwrap();
    let mut again = tiny(true, 5);
    again.load_adapter(dir.path()).unwrap();
    assert_eq!(again.trainable_names(), model.trainable_names());
    assert_eq!(again.trainable(), model.trainable());
    let lora = again.lora().unwrap();
    assert_eq!((lora.rank, lora.alpha, lora.dropout), (2, 3.0, 0.05));
}

#[test]
fn shapes_beyond_every_model_are_refused_with_key_and_range() {
    let dir = saved(&tiny(true, 5));
    for key in [
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "head_dim",
        "linear_num_value_heads",
        "linear_value_head_dim",
        "max_position_embeddings",
    ] {
        for value in [0, 1 << 31, 1 << 63, u64::MAX] {
            let mut before = Value::Null;
            edit_config(dir.path(), |json| {
                let text = json["text_config"].as_object_mut().unwrap();
                text.remove("layer_types");
                let old = text.insert(key.to_owned(), json!(value));
                before = old.unwrap_or_default();
            });
            let error = load_error(dir.path(), &[key, "config.json"]);
            assert!(matches!(error, Error::Config { .. }), "{error}");
            edit_config(dir.path(), |json| json["text_config"][key] = before);
        }
    }
}

#[test]
fn shape_that_the_files_do_not_hold_is_refused_before_memory_is_taken() {
    let dir = saved(&tiny(true, 5));
    // Some 4 TB in f32.
    edit_config(dir.path(), |json| {
        json["text_config"]["vocab_size"] = json!(1 << 24);
        json["text_config"]["hidden_size"] = json!(1 << 16);
    });
    let error = load_error(dir.path(), &["embed_tokens", "16777216", "65536"]);
    assert!(matches!(error, Error::TensorShape { .. }), "{error}");
}

#[test]
fn folder_in_place_of_a_file_is_named() {
    for name in ["config.json", "model.safetensors"] {
        let dir = saved(&tiny(true, 5));
        std::fs::remove_file(dir.path().join(name)).unwrap();
        std::fs::create_dir(dir.path().join(name)).unwrap();
        load_error(dir.path(), &[name, "it is a folder"]);
    }
}

#[test]
fn rank_beyond_every_adapter_is_refused() {
    let mut model = tiny(true, 5);
    let config = LoraConfig {
        rank: 2,
        alpha: 3.0,
        dropout: 0.0,
        targets: vec!["v_proj".to_owned()],
    };
    model.attach_lora(&config, 6).unwrap();
    let dir = tempfile::tempdir().unwrap();
    model.save_adapter(dir.path(), "tiny").unwrap();
    let path = dir.path().join("adapter_config.json");
    let mut json: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    // The tensors have the rank of the pattern; memory would be planned by the other.
    json["rank_pattern"] = json!({"v_proj": 2});
    json["r"] = json!(1_u64 << 40);
    std::fs::write(&path, json.to_string()).unwrap();
    let error = tiny(true, 5).load_adapter(dir.path()).unwrap_err();
    assert!(
        error.to_string().contains("`r` is 1099511627776"),
        "{error}"
    );
    let config = LoraConfig {
        rank: 1 << 40,
        ..config
    };
    let error = tiny(true, 5).attach_lora(&config, 6).unwrap_err();
    assert!(error.to_string().contains("1 to 65536"), "{error}");
}

#[test]
fn adapter_that_is_no_number_is_found_in_memory_and_in_its_folder() {
    let mut model = tiny(true, 5);
    let config = LoraConfig {
        rank: 2,
        alpha: 3.0,
        dropout: 0.0,
        targets: vec!["v_proj".to_owned()],
    };
    model.attach_lora(&config, 6).unwrap();
    let dir = tempfile::tempdir().unwrap();
    model.check_finite().unwrap();
    model.save_adapter(dir.path(), "tiny").unwrap();
    model::checkpoint::check_finite(dir.path()).unwrap();
    model.trainable_mut()[1].f32s_mut()[0] = f32::NAN;
    let error = model.check_finite().unwrap_err().to_string();
    assert!(error.contains("lora_B"), "{error}");
    model.save_adapter(dir.path(), "tiny").unwrap();
    let error = model::checkpoint::check_finite(dir.path()).unwrap_err();
    let error = error.to_string();
    assert!(
        error.contains("lora_B") && error.contains("adapter_model"),
        "{error}"
    );
}

#[test]
fn unknown_lora_target_is_named_with_the_known_ones() {
    let config = LoraConfig {
        rank: 2,
        alpha: 3.0,
        dropout: 0.0,
        targets: vec!["query".to_owned()],
    };
    let error = tiny(true, 5)
        .attach_lora(&config, 6)
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("`query`") && error.contains("q_proj"),
        "{error}"
    );
}

#[test]
fn missing_folder_and_files_are_named() {
    let dir = tempfile::tempdir().unwrap();
    load_error(&dir.path().join("nowhere"), &["nowhere", "config.json"]);
    std::fs::write(dir.path().join("config.json"), tiny_json(true).to_string()).unwrap();
    load_error(dir.path(), &["model.safetensors"]);
}

#[test]
fn truncated_weights_are_named() {
    let dir = saved(&tiny(true, 7));
    let path = dir.path().join("model.safetensors");
    let bytes = std::fs::read(&path).unwrap();
    for length in [bytes.len() - 4, 100, 3, 0] {
        std::fs::write(&path, &bytes[..length]).unwrap();
        let error = Model::load(dir.path(), DType::F32).unwrap_err().to_string();
        assert!(error.contains("model.safetensors"), "{length}: {error}");
    }
}

#[test]
fn other_architecture_is_named_with_the_supported_ones() {
    let dir = saved(&tiny(true, 8));
    edit_config(dir.path(), |json| json["model_type"] = json!("llama"));
    load_error(dir.path(), &["`llama`", "qwen3_5"]);
    edit_config(dir.path(), |json| {
        json["model_type"] = json!("qwen3_5");
        json["text_config"]["hidden_act"] = json!("gelu");
    });
    load_error(dir.path(), &["hidden_act", "gelu"]);
    std::fs::write(dir.path().join("config.json"), "{").unwrap();
    load_error(dir.path(), &["config.json", "JSON"]);
}

#[test]
fn missing_misshapen_and_unknown_tensors_are_named() {
    let dir = saved(&tiny(true, 9));
    edit_config(dir.path(), |json| {
        json["tie_word_embeddings"] = json!(false)
    });
    load_error(dir.path(), &["`lm_head.weight`", "missing"]);

    let dir = saved(&tiny(true, 9));
    edit_config(dir.path(), |json| {
        json["text_config"]["intermediate_size"] = json!(41)
    });
    let error = load_error(dir.path(), &["mlp.", "41", "40"]);
    assert!(matches!(error, Error::TensorShape { .. }));

    let dir = saved(&tiny(true, 9));
    edit_config(dir.path(), |json| {
        json["text_config"]["num_hidden_layers"] = json!(2);
        json["text_config"]["layer_types"] = json!(["linear_attention", "full_attention"]);
    });
    load_error(dir.path(), &["layers.2.", "belongs to no part"]);
}

#[test]
fn missing_shard_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let options = SaveOptions {
        max_shard_bytes: 8_000,
        ..SaveOptions::default()
    };
    tiny(true, 10).save_with(dir.path(), &options).unwrap();
    let shard = std::fs::read_dir(dir.path())
        .unwrap()
        .map(|f| f.unwrap().file_name().to_string_lossy().into_owned())
        .find(|name| name.starts_with("model-00002-of-"))
        .unwrap();
    std::fs::remove_file(dir.path().join(&shard)).unwrap();
    load_error(dir.path(), &[&shard]);
}

#[test]
fn rows_that_do_not_fit_are_refused() {
    let model = tiny(true, 11);
    let mut saved = model::Saved::default();
    let batch =
        |tokens_t: &'static [u32], targets_t: &'static [i32], cu_seqlens: &'static [u32]| {
            model::Batch {
                tokens_t,
                targets_t,
                cu_seqlens,
            }
        };
    for bad in [
        batch(&[1, 2], &[2], &[0, 2]),
        batch(&[1, 2], &[2, -1], &[0, 3]),
        batch(&[1, 2], &[2, -1], &[0, 0, 2]),
        batch(&[], &[], &[0, 0]),
        batch(&[1, 2], &[2, -1], &[]),
        batch(&[1, 61], &[2, -1], &[0, 2]),
        batch(&[1, 2], &[61, -1], &[0, 2]),
    ] {
        assert!(model.nll(&mut saved, &bad).is_err(), "{bad:?}");
    }
    assert!(model.prefill(&mut model.new_state().unwrap(), &[]).is_err());
    assert!(
        model
            .prefill(&mut model.new_state().unwrap(), &[61])
            .is_err()
    );
    assert!(model.step(&mut [], &[]).is_err());
}
