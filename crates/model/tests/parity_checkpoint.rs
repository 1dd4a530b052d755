//! Reading and writing whole reference folders.
#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

mod common;

use common::{Tensors, reference};
use kernel::DType;
use model::{Model, SaveOptions};

const FOLDERS: [&str; 4] = [
    "models/tiny_a",
    "models/tiny_b",
    "fp8/fp8_c/source",
    "fp8/fp8_d/source",
];

#[test]
fn load_and_save_keep_every_byte() {
    let Some(reference) = reference() else { return };
    for folder in FOLDERS {
        let source = reference.join(folder);
        let out = tempfile::tempdir().unwrap();
        let dir = out.path().join("saved");
        Model::load(&source, DType::F32)
            .unwrap()
            .save(&dir, None)
            .unwrap();
        let theirs = Tensors::open(source.join("model.safetensors"));
        let ours = Tensors::open(dir.join("model.safetensors"));
        assert_eq!(ours.names(), theirs.names(), "{folder}");
        for name in theirs.names() {
            assert_eq!(ours.raw(&name), theirs.raw(&name), "{folder} {name}");
        }
        let json = |dir: &std::path::Path| -> serde_json::Value {
            serde_json::from_slice(&std::fs::read(dir.join("config.json")).unwrap()).unwrap()
        };
        assert_eq!(json(&dir), json(&source), "{folder}");
    }
}

#[test]
fn bf16_checkpoint_survives_bf16_memory() {
    let Some(reference) = reference() else { return };
    let source = reference.join("fp8/fp8_d/source");
    let out = tempfile::tempdir().unwrap();
    let dir = out.path().join("saved");
    Model::load(&source, DType::Bf16)
        .unwrap()
        .save(&dir, None)
        .unwrap();
    let theirs = Tensors::open(source.join("model.safetensors"));
    let ours = Tensors::open(dir.join("model.safetensors"));
    for name in theirs.names() {
        assert_eq!(ours.raw(&name), theirs.raw(&name), "{name}");
    }
}

#[test]
fn sharded_save_loads_the_same_weights() {
    let Some(reference) = reference() else { return };
    let model = Model::load(&reference.join("models/tiny_b"), DType::F32).unwrap();
    let out = tempfile::tempdir().unwrap();
    let dir = out.path().join("sharded");
    let options = SaveOptions {
        max_shard_bytes: 500_000,
        ..SaveOptions::default()
    };
    model.save_with(&dir, &options).unwrap();
    assert!(!dir.join("model.safetensors").exists());
    let n_shards = std::fs::read_dir(&dir)
        .unwrap()
        .filter(|f| {
            f.as_ref()
                .unwrap()
                .path()
                .extension()
                .is_some_and(|e| e == "safetensors")
        })
        .count();
    assert!(n_shards > 5, "{n_shards}");
    let again = Model::load(&dir, DType::F32).unwrap();
    assert_eq!(again.trainable(), model.trainable());

    // A later save in one file leaves no stale shard behind.
    again.save(&dir, None).unwrap();
    let theirs = Tensors::open(reference.join("models/tiny_b/model.safetensors"));
    let ours = Tensors::open(dir.join("model.safetensors"));
    for name in theirs.names() {
        assert_eq!(ours.raw(&name), theirs.raw(&name), "{name}");
    }
    let mut left: Vec<String> = std::fs::read_dir(&dir)
        .unwrap()
        .map(|f| f.unwrap().file_name().to_string_lossy().into_owned())
        .collect();
    left.sort();
    assert_eq!(left, ["config.json", "model.safetensors"]);
}
