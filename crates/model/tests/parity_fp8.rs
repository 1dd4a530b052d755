//! FP8_BLOCK folders against what llm-compressor wrote.
#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

mod common;

use std::path::{Path, PathBuf};

use common::{Tensors, assert_close, reference};
use kernel::DType;
use model::quant::fp8_block::{self, Division, Layout, Options};
use model::{Error, Model, Saved};
use safetensors::Dtype;
use serde_json::Value;

const MODELS: [&str; 2] = ["fp8_c", "fp8_d"];

struct Case {
    golden: PathBuf,
    out: tempfile::TempDir,
}

impl Case {
    fn export(name: &str, options: &Options) -> Option<Case> {
        let golden = reference()?.join("fp8").join(name);
        let out = tempfile::tempdir().unwrap();
        fp8_block::export(&golden.join("source"), &out.path().join("fp8"), options).unwrap();
        Some(Case { golden, out })
    }

    fn dir(&self) -> PathBuf {
        self.out.path().join("fp8")
    }

    fn tensors(&self) -> Tensors {
        Tensors::open(self.dir().join("model.safetensors"))
    }
}

fn json(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

#[test]
fn bf16_division_gives_llm_compressors_bytes() {
    for name in MODELS {
        let Some(case) = Case::export(name, &Options::default()) else {
            return;
        };
        let theirs = Tensors::open(case.golden.join("quantized/model.safetensors"));
        let source = Tensors::open(case.golden.join("source/model.safetensors"));
        let ours = case.tensors();
        let mut n_quantized = 0;
        for tensor in theirs.names() {
            let (dtype, shape, bytes) = ours.raw(&tensor);
            if dtype == Dtype::F8_E4M3 || tensor.ends_with("_scale") {
                assert_eq!(
                    (dtype, shape, bytes),
                    theirs.raw(&tensor),
                    "{name} {tensor}"
                );
                n_quantized += 1;
            } else {
                assert_eq!(
                    (dtype, shape, bytes),
                    source.raw(&tensor),
                    "{name} {tensor}"
                );
            }
        }
        assert_eq!(n_quantized, 20, "{name}");
        // Everything is there, mtp in the same file instead of one of its own.
        let mut expected = theirs.names();
        expected.extend(source.names().into_iter().filter(|n| n.starts_with("mtp.")));
        expected.sort();
        assert_eq!(ours.names(), expected, "{name}");
    }
}

#[test]
fn f32_division_gives_the_emulated_bytes() {
    for name in MODELS {
        let options = Options {
            division: Division::F32,
            ..Options::default()
        };
        let Some(case) = Case::export(name, &options) else {
            return;
        };
        let golden = Tensors::open(case.golden.join("f32_division_bytes.safetensors"));
        for tensor in golden.names() {
            let weight = tensor.strip_suffix(".f32_division").unwrap();
            let (_, shape, bytes) = golden.raw(&tensor);
            let ours = case.tensors().raw(weight);
            assert_eq!(ours, (Dtype::F8_E4M3, shape, bytes), "{name} {weight}");
        }
    }
}

#[test]
fn config_and_recipe_are_as_recorded() {
    for name in MODELS {
        let Some(case) = Case::export(name, &Options::default()) else {
            return;
        };
        let recorded = case.golden.join("quantized");
        for file in ["config.json", "generation_config.json"] {
            assert_eq!(
                json(&case.dir().join(file)),
                json(&recorded.join(file)),
                "{name} {file}"
            );
        }
        let recipe = |dir: &Path| std::fs::read_to_string(dir.join("recipe.yaml")).unwrap();
        assert_eq!(recipe(&case.dir()), recipe(&recorded));
    }
}

#[test]
fn dequantized_logits_match() {
    for name in MODELS {
        let Some(reference) = reference() else { return };
        let golden = reference.join("fp8").join(name);
        let logits = Tensors::open(golden.join("logits.safetensors"));
        let tokens_t = logits.ids("input_ids");
        let borders = [0, tokens_t.len() as u32];
        let check = |dir: &Path, what: &str| {
            let model = Model::load(dir, DType::F32).unwrap();
            let got = model
                .logits(&mut Saved::default(), &tokens_t, &borders)
                .unwrap();
            assert_close(
                &format!("{name} {what}"),
                got.f32s(),
                &logits.floats(what),
                1e-3,
            );
        };
        check(&golden.join("source"), "logits_source_weights");
        for layout in [Layout::CompressedTensors, Layout::HuggingFace] {
            let options = Options {
                layout,
                max_shard_bytes: 400_000,
                ..Options::default()
            };
            let case = Case::export(name, &options).unwrap();
            check(&case.dir(), "logits_dequantized_exact_norms");
        }
    }
}

#[test]
fn dequantized_model_saves_as_plain_bf16() {
    let Some(case) = Case::export("fp8_d", &Options::default()) else {
        return;
    };
    let dir = case.out.path().join("plain");
    Model::load(&case.dir(), DType::Bf16)
        .unwrap()
        .save(&dir, None)
        .unwrap();
    let source = Tensors::open(case.golden.join("source/model.safetensors"));
    let plain = Tensors::open(dir.join("model.safetensors"));
    assert_eq!(plain.names(), source.names());
    assert!(
        json(&dir.join("config.json"))
            .get("quantization_config")
            .is_none()
    );
    for name in source.names().iter().filter(|n| n.starts_with("mtp.")) {
        assert_eq!(plain.raw(name), source.raw(name));
    }
}

#[test]
fn quantizing_twice_is_refused() {
    let Some(case) = Case::export("fp8_c", &Options::default()) else {
        return;
    };
    let again = fp8_block::export(
        &case.dir(),
        &case.out.path().join("again"),
        &Options::default(),
    );
    assert!(
        matches!(again, Err(Error::AlreadyQuantized { .. })),
        "{again:?}"
    );
    assert!(!case.out.path().join("again").exists());
}
