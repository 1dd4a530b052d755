//! LoRA against PEFT's recorded adapters, gradients and merged weights.
#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

mod common;

use common::{Row, Tensors, assert_close, host, load_model, named, reference};
use kernel::DType;
use model::{Model, Saved};
use serde_json::Value;

const MODELS: [&str; 2] = ["tiny_a", "tiny_b"];

/// The model, the folder of recorded LoRA files, and a folder that holds `file` of it as an adapter.
fn load(name: &str, file: &str) -> Option<(Model, std::path::PathBuf, tempfile::TempDir)> {
    let reference = reference()?;
    let model = load_model(&reference.join("models").join(name), DType::F32);
    let goldens = reference.join("goldens").join(name).join("lora");
    let adapter = tempfile::tempdir().unwrap();
    let copy = |from: &str, to: &str| {
        std::fs::copy(goldens.join(from), adapter.path().join(to)).unwrap();
    };
    copy("adapter_config.json", "adapter_config.json");
    copy(file, "adapter_model.safetensors");
    Some((model, goldens, adapter))
}

fn json(path: std::path::PathBuf) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

#[test]
fn first_step_gradients_match() {
    for name in MODELS {
        let Some((mut model, goldens, adapter)) = load(name, "adapter_init.safetensors") else {
            return;
        };
        model.load_adapter(adapter.path()).unwrap();
        let steps = Tensors::open(goldens.join("steps.safetensors"));
        let row = Row::recorded(&steps, "step0.");
        let d_nll = 1.0 / row.n_targets() as f32;
        let mut grads = model.gradients().unwrap();
        let nll = model
            .forward_backward(&mut Saved::default(), &mut grads, &row.batch(), d_nll, 0)
            .unwrap();
        let loss = common::sum(&nll) * f64::from(d_nll);
        let log = json(goldens.join("lora.json"));
        let expected = log["steps_log"][0]["loss"].as_f64().unwrap();
        assert!((loss - expected).abs() < 1e-5, "{loss} {expected}");

        let grads = named(&model, grads);
        let recorded: Vec<String> = steps
            .names()
            .into_iter()
            .filter_map(|n| n.strip_prefix("grad0.").map(str::to_owned))
            .collect();
        assert_eq!(recorded.len(), grads.len());
        for adapter_name in recorded {
            let expected = steps.floats(&format!("grad0.{adapter_name}"));
            assert_close(&adapter_name, grads[&adapter_name].f32s(), &expected, 1e-4);
        }
    }
}

#[test]
fn merged_weights_match() {
    for name in MODELS {
        let Some((mut model, goldens, adapter)) = load(name, "adapter_model.safetensors") else {
            return;
        };
        model.load_adapter(adapter.path()).unwrap();
        let tokens_t: Vec<u32> = (1..60).collect();
        let borders = [0, 59];
        let mut saved = Saved::default();
        let beside = model.logits(&mut saved, &tokens_t, &borders).unwrap();
        model.merge_lora().unwrap();
        let merged = model.logits(&mut saved, &tokens_t, &borders).unwrap();
        assert_close("logits", merged.f32s(), beside.f32s(), 1e-4);

        let golden = Tensors::open(goldens.join("merged.safetensors"));
        let weights = model.trainable_names().into_iter().zip(model.trainable());
        let weights: std::collections::HashMap<_, _> = weights.collect();
        let mut n_compared = 0;
        for weight in golden.names() {
            let Some(tensor) = weights.get(&weight) else {
                continue;
            };
            assert_close(&weight, &host(tensor), &golden.floats(&weight), 1e-6);
            n_compared += 1;
        }
        let stored = json(goldens.join("lora.json"))["stored_merged_tensors"].clone();
        assert_eq!(n_compared, stored.as_array().unwrap().len());
    }
}

#[test]
fn saved_adapter_is_what_peft_wrote() {
    for name in MODELS {
        let Some((mut model, goldens, adapter)) = load(name, "adapter_model.safetensors") else {
            return;
        };
        model.load_adapter(adapter.path()).unwrap();
        let out = tempfile::tempdir().unwrap();
        let dir = out.path().join("adapter");
        model.save_adapter(&dir, name).unwrap();

        let theirs = Tensors::open(goldens.join("adapter_model.safetensors"));
        let ours = Tensors::open(dir.join("adapter_model.safetensors"));
        assert_eq!(ours.names(), theirs.names());
        for tensor in theirs.names() {
            assert_eq!(ours.raw(&tensor), theirs.raw(&tensor), "{tensor}");
        }

        let mut theirs = json(goldens.join("adapter_config.json"));
        let mut ours = json(dir.join("adapter_config.json"));
        // The pattern lists the same modules in another order.
        let alternatives = |config: &mut Value| -> (String, Vec<String>) {
            let pattern = config["target_modules"].take();
            let pattern = pattern.as_str().unwrap();
            let (before, rest) = pattern.rsplit_once('(').unwrap();
            let mut list: Vec<String> = rest
                .trim_end_matches("))$")
                .split('|')
                .map(str::to_owned)
                .collect();
            list.sort();
            (before.to_owned(), list)
        };
        assert_eq!(alternatives(&mut ours), alternatives(&mut theirs));
        assert_eq!(ours, theirs);
    }
}
