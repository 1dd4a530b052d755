//! PEFT folders from elsewhere: what is read, and what is refused by name.
#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

mod common;

use std::collections::BTreeMap;
use std::path::Path;

use common::{Tensors, tiny, trainable};
use kernel::DType;
use model::{LoraConfig, Model};
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::{Value, json};

const O_PROJ: &str = "base_model.model.model.language_model.layers.1.self_attn.o_proj";
const Q_PROJ: &str = "base_model.model.model.language_model.layers.1.self_attn.q_proj";
const UP_PROJ_0: &str = "base_model.model.model.language_model.layers.0.mlp.up_proj";

/// Name to shape and values.
type File = BTreeMap<String, (Vec<usize>, Vec<f32>)>;

/// What PEFT writes for one adapter on `o_proj` of rank 4, as in the reported cases.
fn config() -> Value {
    json!({
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 8,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": ["o_proj"],
        "task_type": "CAUSAL_LM",
        "use_rslora": false,
        "use_dora": false,
        "rank_pattern": {},
        "alpha_pattern": {},
        "fan_in_fan_out": false,
        "modules_to_save": null,
        "init_lora_weights": true,
        "base_model_name_or_path": "tiny"
    })
}

fn seeded(shape: [usize; 2], seed: usize) -> (Vec<usize>, Vec<f32>) {
    let n = shape[0] * shape[1];
    let value = |i: usize| ((i * 37 + seed * 101) % 19) as f32 / 100.0 - 0.09;
    (shape.to_vec(), (0..n).map(value).collect())
}

/// A and B of a layer with a weight [n_out, n_in].
fn pair(module: &str, [n_out, n_in]: [usize; 2], rank: usize) -> File {
    BTreeMap::from([
        (format!("{module}.lora_A.weight"), seeded([rank, n_in], 1)),
        (format!("{module}.lora_B.weight"), seeded([n_out, rank], 2)),
    ])
}

/// The tensors that fit [`config`].
fn tensors() -> File {
    pair(O_PROJ, [24, 64], 4)
}

fn write(dir: &Path, config: &Value, file: &File) {
    std::fs::create_dir_all(dir).unwrap();
    std::fs::write(dir.join("adapter_config.json"), config.to_string()).unwrap();
    let bytes: Vec<(String, Vec<usize>, Vec<u8>)> = file
        .iter()
        .map(|(name, (shape, values))| {
            let bytes = values.iter().flat_map(|x| x.to_le_bytes()).collect();
            (name.clone(), shape.clone(), bytes)
        })
        .collect();
    let views = bytes.iter().map(|(name, shape, bytes)| {
        (
            name,
            TensorView::new(Dtype::F32, shape.clone(), bytes).unwrap(),
        )
    });
    safetensors::serialize_to_file(views, None, &dir.join("adapter_model.safetensors")).unwrap();
}

/// The merged model, or the error's text.
fn merged(config: &Value, file: &File) -> Result<Model, String> {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), config, file);
    let mut model = tiny(true, 5);
    model
        .load_adapter(dir.path())
        .map_err(|error| error.to_string())?;
    model.merge_lora().unwrap();
    Ok(model)
}

fn weight_name(module: &str) -> String {
    format!(
        "{}.weight",
        module.strip_prefix("base_model.model.").unwrap()
    )
}

/// The largest difference of a merged weight from W + scale · B A.
fn merge_error(mut model: Model, file: &File, module: &str, scale: f32) -> f32 {
    let name = weight_name(module);
    let base = trainable(&mut tiny(true, 5), &name).f32s().to_vec();
    let (a_shape, a) = &file[&format!("{module}.lora_A.weight")];
    let (b_shape, b) = &file[&format!("{module}.lora_B.weight")];
    let (rank, n_in, n_out) = (a_shape[0], a_shape[1], b_shape[0]);
    let got = trainable(&mut model, &name).f32s();
    let mut worst = 0.0f32;
    for o in 0..n_out {
        for i in 0..n_in {
            let product: f32 = (0..rank).map(|r| b[o * rank + r] * a[r * n_in + i]).sum();
            let expected = base[o * n_in + i] + scale * product;
            worst = worst.max((got[o * n_in + i] - expected).abs());
        }
    }
    worst
}

fn check_scale(config: &Value, scale: f32) {
    let model = merged(config, &tensors()).unwrap();
    let error = merge_error(model, &tensors(), O_PROJ, scale);
    assert!(error < 1e-6, "{error} at scale {scale}");
}

/// Fails to load, and the text names all of `parts`.
fn refused(config: &Value, file: &File, parts: &[&str]) {
    let error = merged(config, file).unwrap_err();
    for part in parts {
        assert!(error.contains(part), "`{part}` not in: {error}");
    }
}

fn with(key: &str, value: Value) -> Value {
    let mut config = config();
    config[key] = value;
    config
}

#[test]
fn plain_lora_is_scaled_by_alpha_over_rank() {
    check_scale(&config(), 2.0);
}

#[test]
fn rslora_is_scaled_by_alpha_over_the_root_of_the_rank() {
    check_scale(&with("use_rslora", json!(true)), 4.0);
}

#[test]
fn alpha_pattern_overrides_alpha_for_the_names_that_match() {
    check_scale(&with("alpha_pattern", json!({"o_proj": 2})), 0.5);
    check_scale(&with("alpha_pattern", json!({"v_proj": 2})), 2.0);
    check_scale(&with("alpha_pattern", json!({"^model.*o_proj": 4})), 1.0);
    // The first that matches, in the file's order and no other.
    let both = json!({"layers.1.self_attn.o_proj": 6, "o_proj": 2});
    check_scale(&with("alpha_pattern", both), 1.5);
    let both = json!({"o_proj": 2, "layers.1.self_attn.o_proj": 6});
    check_scale(&with("alpha_pattern", both), 0.5);
}

#[test]
fn rank_pattern_overrides_the_rank_in_shape_and_scale() {
    let mut config = config();
    config["target_modules"] = json!(["o_proj", "up_proj"]);
    config["layers_to_transform"] = json!([0, 1]);
    config["rank_pattern"] = json!({r"layers\.0\.mlp\.up_proj": 2});
    let mut file = tensors();
    file.extend(pair(UP_PROJ_0, [40, 24], 2));
    file.extend(pair(
        &UP_PROJ_0.replace("layers.0", "layers.1"),
        [40, 24],
        4,
    ));
    let model = merged(&config, &file).unwrap();
    assert!(merge_error(model, &file, UP_PROJ_0, 4.0) < 1e-6);
    let model = merged(&config, &file).unwrap();
    assert!(merge_error(model, &file, O_PROJ, 2.0) < 1e-6);

    config["rank_pattern"] = json!({});
    refused(&config, &file, &["layers.0.mlp.up_proj", "rank 4"]);
}

#[test]
fn targets_are_read_as_list_name_expression_and_all_linear() {
    for targets in [
        json!(["o_proj"]),
        json!(["model.language_model.layers.1.self_attn.o_proj"]),
        json!(["k_norm", "o_proj"]),
        json!(r"^(model\.language_model(?=\.).*\.(o_proj))$"),
        json!(r".*\.o_proj"),
        json!(null),
    ] {
        check_scale(&with("target_modules", targets), 2.0);
    }
    let all = with("target_modules", json!("all-linear"));
    refused(
        &all,
        &tensors(),
        &["`target_modules`", "layers.0.", "no tensors"],
    );
    let model = {
        let mut model = tiny(true, 5);
        let lora = LoraConfig {
            rank: 2,
            alpha: 4.0,
            dropout: 0.0,
            targets: Vec::new(),
        };
        model.attach_lora(&lora, 6).unwrap();
        model
    };
    let dir = tempfile::tempdir().unwrap();
    model.save_adapter(dir.path(), "tiny").unwrap();
    edit(dir.path(), |config| {
        config["target_modules"] = json!("all-linear")
    });
    let mut again = tiny(true, 5);
    again.load_adapter(dir.path()).unwrap();
    assert_eq!(again.trainable(), model.trainable());
}

fn edit(dir: &Path, edit: impl FnOnce(&mut Value)) {
    let path = dir.join("adapter_config.json");
    let mut json: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    edit(&mut json);
    std::fs::write(path, json.to_string()).unwrap();
}

#[test]
fn tensors_and_targets_that_do_not_agree_are_refused() {
    let other = with("target_modules", json!(["q_proj"]));
    refused(&other, &tensors(), &["o_proj", "`target_modules`"]);
    let pattern = with("target_modules", json!(r".*\.layers\.0\..*"));
    refused(&pattern, &tensors(), &["layers.0", "no tensors"]);
    let mut more = tensors();
    more.extend(pair(Q_PROJ, [128, 24], 4));
    refused(&config(), &more, &["q_proj", "`target_modules`"]);
    let excluded = with("exclude_modules", json!(["self_attn.o_proj"]));
    refused(&excluded, &tensors(), &["o_proj", "`exclude_modules`"]);
    let layer = with("layers_to_transform", json!([0]));
    refused(&layer, &tensors(), &["o_proj", "`layers_to_transform`"]);
}

#[test]
fn layers_and_exclusions_choose_the_targets_that_need_tensors() {
    let both = json!(["o_proj", "up_proj"]);
    let mut config = with("target_modules", both);
    refused(&config, &tensors(), &["layers.0.mlp.up_proj", "no tensors"]);
    config["exclude_modules"] = json!(r".*\.mlp\..*");
    check_scale(&config, 2.0);
    config["exclude_modules"] = json!(["up_proj"]);
    check_scale(&config, 2.0);

    let mut file = tensors();
    let up_proj_1 = UP_PROJ_0.replace("layers.0", "layers.1");
    file.extend(pair(&up_proj_1, [40, 24], 4));
    config["exclude_modules"] = json!(null);
    for (layers, pattern) in [
        (json!([1]), json!(null)),
        (json!(1), json!("layers")),
        (json!([1, 7]), json!(["h", "layers"])),
    ] {
        config["layers_to_transform"] = layers;
        config["layers_pattern"] = pattern;
        let model = merged(&config, &file).unwrap();
        assert!(merge_error(model, &file, &up_proj_1, 2.0) < 1e-6);
    }
}

#[test]
fn layers_that_are_not_stated_are_all_of_them() {
    for pattern in [json!(null), json!(""), json!([]), json!("layers")] {
        let mut config = with("layers_to_transform", json!([]));
        config["layers_pattern"] = pattern.clone();
        check_scale(&config, 2.0);
        config["layers_to_transform"] = json!([1]);
        check_scale(&config, 2.0);
        config["layers_to_transform"] = json!([0]);
        refused(&config, &tensors(), &["o_proj", "`layers_to_transform`"]);
    }
}

#[test]
fn a_target_named_in_full_needs_no_layer_number() {
    let mut config = with("layers_to_transform", json!([0]));
    config["target_modules"] = json!(["model.language_model.layers.1.self_attn.o_proj"]);
    check_scale(&config, 2.0);
    config["exclude_modules"] = json!(["o_proj"]);
    refused(&config, &tensors(), &["o_proj", "`exclude_modules`"]);
    config["exclude_modules"] = json!(null);
    config["target_modules"] = json!(["layers.1.self_attn.o_proj"]);
    refused(&config, &tensors(), &["o_proj", "`layers_to_transform`"]);
}

#[test]
fn an_adapter_of_more_than_the_text_model_is_to_be_merged() {
    for module in [
        "model.visual.blocks.0.attn.qkv",
        "visual.merger.linear_fc1",
        "mtp.layers.0.mlp.up_proj",
        "lm_head",
    ] {
        let mut file = tensors();
        file.extend(pair(&format!("base_model.model.{module}"), [12, 8], 4));
        refused(&config(), &file, &[module, "merge it with PEFT"]);
    }
}

#[test]
fn all_namings_of_peft_are_read() {
    let (a, b) = (seeded([4, 64], 1), seeded([24, 4], 2));
    for prefix in [
        "base_model.model.model.language_model.",
        "base_model.model.model.",
        "base_model.model.language_model.",
        "base_model.model.",
    ] {
        for suffix in ["weight", "default.weight"] {
            let module = format!("{prefix}layers.1.self_attn.o_proj");
            let file = BTreeMap::from([
                (format!("{module}.lora_A.{suffix}"), a.clone()),
                (format!("{module}.lora_B.{suffix}"), b.clone()),
            ]);
            let model = merged(&config(), &file).unwrap();
            assert!(merge_error(model, &tensors(), O_PROJ, 2.0) < 1e-6);
        }
    }
}

#[test]
fn settings_that_change_the_arithmetic_are_refused_by_name() {
    for (key, value) in [
        ("peft_type", json!("IA3")),
        ("bias", json!("all")),
        ("bias", json!("lora_only")),
        ("use_dora", json!(true)),
        ("use_qalora", json!(true)),
        ("lora_bias", json!(true)),
        ("fan_in_fan_out", json!(true)),
        ("modules_to_save", json!(["lm_head"])),
        ("trainable_token_indices", json!([1, 2])),
        ("trainable_token_indices", json!({"embed_tokens": [1]})),
        ("layer_replication", json!([[0, 2], [1, 3]])),
        ("target_parameters", json!(["experts.down_proj"])),
        ("alora_invocation_tokens", json!([5])),
        ("arrow_config", json!({"top_k": 3})),
        ("megatron_config", json!({"tensor_parallel": 2})),
        ("velora_config", json!({"n": 1})),
        ("init_lora_weights", json!("pissa")),
        ("init_lora_weights", json!("pissa_niter_16")),
        ("init_lora_weights", json!("olora")),
        ("init_lora_weights", json!("corda")),
        ("init_lora_weights", json!("loftq")),
        ("init_lora_weights", json!("lora_ga")),
        ("init_lora_weights", json!("of_next_year")),
        ("scale_of_next_year", json!(3)),
        ("mode_of_next_year", json!("wide")),
    ] {
        refused(&with(key, value), &tensors(), &[key]);
    }
}

#[test]
fn settings_without_effect_are_let_pass() {
    for (key, value) in [
        ("init_lora_weights", json!(false)),
        ("init_lora_weights", json!("gaussian")),
        ("init_lora_weights", json!("orthogonal")),
        ("init_lora_weights", json!("eva")),
        ("eva_config", json!({"rho": 2.0})),
        ("loftq_config", json!({"loftq_bits": 4})),
        ("task_type", json!("SEQ_2_SEQ_LM")),
        ("inference_mode", json!(false)),
        ("revision", json!("main")),
        ("megatron_core", json!("megatron.core")),
        ("qalora_group_size", json!(16)),
        ("lora_dropout", json!(0.1)),
        ("of_next_year", json!(null)),
        ("of_next_year", json!(false)),
        ("of_next_year", json!({})),
        ("of_next_year", json!([])),
        ("of_next_year", json!("")),
    ] {
        check_scale(&with(key, value), 2.0);
    }
}

#[test]
fn values_that_no_adapter_has_are_named() {
    for (key, value) in [
        ("r", json!(0)),
        ("r", json!(-4)),
        ("r", json!("4")),
        ("r", json!(null)),
        ("lora_alpha", json!("8")),
        ("lora_alpha", json!(1e300)),
        ("lora_dropout", json!(1.0)),
        ("use_rslora", json!("yes")),
        ("target_modules", json!(["o_proj", 3])),
        ("target_modules", json!("(o_proj")),
        ("layers_to_transform", json!("1")),
        ("rank_pattern", json!({"o_proj": 0})),
        ("alpha_pattern", json!(["o_proj"])),
    ] {
        refused(&with(key, value), &tensors(), &[key]);
    }
}

#[test]
fn an_adapter_without_tensors_is_refused() {
    refused(&config(), &File::new(), &["no tensors", "change nothing"]);
}

#[test]
fn an_a_or_b_without_its_other_half_is_refused() {
    for (there, missing) in [("lora_A", "lora_B"), ("lora_B", "lora_A")] {
        let mut file = tensors();
        file.remove(&format!("{O_PROJ}.{missing}.weight")).unwrap();
        refused(&config(), &file, &["o_proj", there, missing]);
    }
}

#[test]
fn tensors_that_are_no_numbers_are_refused() {
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        for name in tensors().keys() {
            let mut file = tensors();
            file.get_mut(name).unwrap().1[7] = bad;
            refused(&config(), &file, &[name, "NaN"]);
        }
    }
}

#[test]
fn tensors_that_fit_nothing_are_refused_by_name() {
    let layer_9 = O_PROJ.replace("layers.1", "layers.9");
    for (name, shape) in [
        (format!("{layer_9}.lora_A.weight"), [4, 64]),
        (format!("{O_PROJ}.bias"), [1, 24]),
        ("base_model.model.lm_head.weight".to_owned(), [61, 24]),
        (format!("{O_PROJ}.lora_magnitude_vector.weight"), [1, 24]),
        (
            "model.layers.1.self_attn.o_proj.lora_A.weight".to_owned(),
            [4, 64],
        ),
    ] {
        let mut file = tensors();
        file.insert(name.clone(), seeded(shape, 3));
        let module = name.split(".lora_A").next().unwrap();
        let module = module.strip_prefix("base_model.model.").unwrap_or(module);
        refused(&config(), &file, &[module]);
    }
    let mut beyond = tensors();
    beyond.extend(pair(&layer_9, [24, 64], 4));
    refused(&config(), &beyond, &["layers.9", "no linear layer"]);
    let twice = BTreeMap::from([(
        format!("{O_PROJ}.lora_A.default.weight"),
        seeded([4, 64], 3),
    )]);
    let twice: File = twice.into_iter().chain(tensors()).collect();
    refused(&config(), &twice, &["o_proj", "second time"]);
}

#[test]
fn shapes_of_another_base_are_named() {
    for (shape, rank) in [([24, 63], 4), ([23, 64], 4), ([24, 64], 3)] {
        refused(
            &config(),
            &pair(O_PROJ, shape, rank),
            &["o_proj", "[24, 64]", "rank 4"],
        );
    }
}

#[test]
fn missing_files_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let mut model = tiny(true, 5);
    let mut error = || model.load_adapter(dir.path()).unwrap_err().to_string();
    assert!(error().contains("adapter_config.json"));
    std::fs::write(dir.path().join("adapter_config.json"), config().to_string()).unwrap();
    assert!(error().contains("adapter_model.safetensors"));
    std::fs::write(dir.path().join("adapter_model.bin"), "").unwrap();
    assert!(error().contains("safe_serialization"));
}

#[test]
fn a_refused_adapter_leaves_the_attached_one() {
    let mut model = tiny(true, 5);
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), &config(), &tensors());
    model.load_adapter(dir.path()).unwrap();
    let before: Vec<Vec<f32>> = model
        .trainable()
        .iter()
        .map(|t| t.f32s().to_vec())
        .collect();
    write(dir.path(), &with("use_dora", json!(true)), &tensors());
    model.load_adapter(dir.path()).unwrap_err();
    let after: Vec<Vec<f32>> = model
        .trainable()
        .iter()
        .map(|t| t.f32s().to_vec())
        .collect();
    assert_eq!(before, after);
}

#[test]
fn ranks_scales_and_layers_survive_a_save() {
    let mut config = config();
    config["use_rslora"] = json!(true);
    config["target_modules"] = json!(["o_proj", "up_proj"]);
    config["layers_to_transform"] = json!([0, 1]);
    config["rank_pattern"] = json!({"layers.0.mlp.up_proj": 2});
    config["alpha_pattern"] = json!({"o_proj": 3});
    let mut file = tensors();
    file.extend(pair(UP_PROJ_0, [40, 24], 2));
    file.extend(pair(
        &UP_PROJ_0.replace("layers.0", "layers.1"),
        [40, 24],
        4,
    ));
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), &config, &file);
    let mut model = tiny(true, 5);
    model.load_adapter(dir.path()).unwrap();
    let again = dir.path().join("again");
    model.save_adapter(&again, "tiny").unwrap();
    assert_eq!(
        Tensors::open(again.join("adapter_model.safetensors")).names(),
        file.keys().cloned().collect::<Vec<_>>()
    );
    let mut reread = tiny(true, 5);
    reread.load_adapter(&again).unwrap();
    for model in [&mut model, &mut reread] {
        model.merge_lora().unwrap();
    }
    assert_eq!(model.trainable(), reread.trainable());
    assert_ne!(model.trainable(), tiny(true, 5).trainable());
}

#[test]
fn weights_that_are_no_numbers_are_not_passed_on() {
    let dir = tempfile::tempdir().unwrap();
    let (folder, out) = (dir.path().join("model"), dir.path().join("fp8"));
    let export = |from: &Path| model::quant::fp8_block::export(from, &out, &Default::default());
    tiny(true, 5).save(&folder, None).unwrap();
    export(&folder).unwrap();
    for name in [
        "model.language_model.layers.1.self_attn.o_proj.weight",
        "model.language_model.embed_tokens.weight",
        "model.language_model.layers.0.linear_attn.A_log",
    ] {
        for bad in [f32::NAN, f32::INFINITY] {
            let mut model = tiny(true, 5);
            trainable(&mut model, name).f32s_mut()[3] = bad;
            let error = model.check_finite().unwrap_err().to_string();
            assert!(error.contains(name), "{error}");
            model.save(&folder, None).unwrap();
            let error = export(&folder).unwrap_err().to_string();
            assert!(error.contains(name) && error.contains("NaN"), "{error}");
        }
    }
}

#[test]
fn a_head_of_its_own_in_a_tied_folder_is_refused_with_both_ways_out() {
    let dir = tempfile::tempdir().unwrap();
    let (folder, out) = (dir.path().join("model"), dir.path().join("fp8"));
    tiny(false, 5).save(&folder, None).unwrap();
    let path = folder.join("config.json");
    let mut json: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    json["tie_word_embeddings"] = json!(true);
    std::fs::write(&path, json.to_string()).unwrap();
    let loaded = Model::load(&folder, DType::F32).unwrap_err().to_string();
    let exported = model::quant::fp8_block::export(&folder, &out, &Default::default());
    assert_eq!(loaded, exported.unwrap_err().to_string());
    assert!(loaded.contains("tie_word_embeddings to false"), "{loaded}");
    assert!(loaded.contains("take lm_head.weight out"), "{loaded}");
}

#[test]
fn a_head_that_repeats_the_embedding_is_one_head() {
    let dir = tempfile::tempdir().unwrap();
    let mut model = tiny(false, 5);
    let table = trainable(&mut model, "model.language_model.embed_tokens.weight")
        .f32s()
        .to_vec();
    trainable(&mut model, "lm_head.weight")
        .f32s_mut()
        .copy_from_slice(&table);
    model.save(dir.path(), None).unwrap();
    let path = dir.path().join("config.json");
    let mut json: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    json["tie_word_embeddings"] = json!(true);
    std::fs::write(&path, json.to_string()).unwrap();
    let tied = Model::load(dir.path(), DType::F32).unwrap();
    let names = tied.trainable_names();
    assert!(!names.contains(&"lm_head.weight".to_owned()));
}
