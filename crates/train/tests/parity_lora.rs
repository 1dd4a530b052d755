//! LoRA training: recorded PEFT runs on the two tiny models, from the recorded adapter to the saved one.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "common/golden.rs"]
mod golden;

use std::fs;

use golden::{
    GRAD_NORM_REL, LOSS_REL, ROWS, Tensors, assert_close, check_steps, json, largest_difference,
    load, loss, reference,
};
use train::OptimizerConfig;
use train::schedule::Schedule;
use train::step::Trainer;

/// Adapter weights, absolute, after updates of up to 1.5e-3: as for AdamW at lr 1e-3, see `parity_adamw.rs`.
const WEIGHT_ABS: f32 = 2e-4;

fn check(model_name: &str) {
    let Some(reference) = reference() else {
        return;
    };
    let goldens = reference.join("goldens").join(model_name);
    let lora = goldens.join("lora");
    let recorded = json(&lora.join("lora.json"));
    let config = OptimizerConfig {
        lr: recorded["optimizer"]["lr"].as_f64().unwrap(),
        min_lr: 0.0,
        warmup_steps: Some(1),
        ..OptimizerConfig::default()
    };

    // The recorded first adapter as a PEFT folder.
    let dir = tempfile::tempdir().unwrap();
    let first = dir.path().join("first");
    fs::create_dir(&first).unwrap();
    for (from, to) in [
        ("adapter_config.json", "adapter_config.json"),
        ("adapter_init.safetensors", "adapter_model.safetensors"),
    ] {
        fs::write(first.join(to), fs::read(lora.join(from)).unwrap()).unwrap();
    }
    let mut model = load(&reference, model_name);
    model.load_adapter(&first).unwrap();

    let mut trainer = Trainer::new(model, &config, 0, ROWS).unwrap();
    let batches = Tensors::read(&lora.join("steps.safetensors"));
    check_steps(
        &mut trainer,
        &Schedule::new(&config, 3),
        &batches,
        &recorded["steps_log"],
        LOSS_REL,
        GRAD_NORM_REL,
    );

    let saved = dir.path().join("saved");
    trainer.model.save_adapter(&saved, model_name).unwrap();
    let got = Tensors::read(&saved.join("adapter_model.safetensors"));
    let expect = Tensors::read(&lora.join("adapter_model.safetensors"));
    let sorted = |tensors: &Tensors| {
        let mut names = tensors.names();
        names.sort();
        names
    };
    assert_eq!(sorted(&got), sorted(&expect));
    for name in got.names() {
        let difference = largest_difference(&got.f32s(&name), &expect.f32s(&name));
        assert!(difference <= WEIGHT_ABS, "{name}: {difference}");
    }

    let probe = Tensors::read(&lora.join("merged.safetensors"));
    assert_close(
        loss(&trainer.model, &probe.row("probe")),
        &recorded["probe_loss_after_training"],
        LOSS_REL,
        "probe loss",
    );
}

#[test]
fn lora_steps_of_tiny_a_agree() {
    check("tiny_a");
}

#[test]
fn lora_steps_of_tiny_b_agree() {
    check("tiny_b");
}
