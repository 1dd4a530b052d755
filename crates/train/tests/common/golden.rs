//! The reference pack's recorded runs, where it lies beside the checkout.
#![allow(dead_code, reason = "each test file uses its own part")]

use std::fs;
use std::path::{Path, PathBuf};

use kernel::{DType, Device};
use model::{Model, Saved};
use safetensors::SafeTensors;
use serde_json::Value;
use text::pack::PackedRow;
use train::data::as_batch;
use train::memory::StepRows;
use train::schedule::Schedule;
use train::step::Trainer;

/// Of no consequence on a CPU; on a GPU, larger batches than planned only make buffers grow.
pub const ROWS: StepRows = StepRows {
    rows: 1,
    row_tokens: 64,
    accumulate: 1,
    at_once: 1,
};

/// Losses, relative: both sides are f32 and sum in their own order.
pub const LOSS_REL: f64 = 1e-5;
/// Gradient norms before clipping, relative: the recorded f32 gradients are themselves up to 6e-5 off the f64 ones.
pub const GRAD_NORM_REL: f64 = 1e-4;

/// `reference/` of the pack; None, with a note, where it is absent and not required.
pub fn reference() -> Option<PathBuf> {
    let shared = std::env::var_os("CYRENE_SHARED").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared"),
        PathBuf::from,
    );
    let reference = shared.join("reference");
    if reference.is_dir() {
        return Some(reference);
    }
    assert!(
        std::env::var_os("CYRENE_REQUIRE_SHARED").is_none_or(|value| value != "1"),
        "{} is required",
        reference.display()
    );
    eprintln!("skipped: no ../shared");
    None
}

pub fn json(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

/// A safetensors file in memory.
pub struct Tensors(Vec<u8>);

impl Tensors {
    pub fn read(path: &Path) -> Self {
        Tensors(fs::read(path).unwrap())
    }

    pub fn names(&self) -> Vec<String> {
        let tensors = SafeTensors::deserialize(&self.0).unwrap();
        tensors.names().into_iter().map(str::to_string).collect()
    }

    pub fn i64s(&self, name: &str) -> Vec<i64> {
        let tensors = SafeTensors::deserialize(&self.0).unwrap();
        let (chunks, _) = tensors.tensor(name).unwrap().data().as_chunks();
        chunks
            .iter()
            .map(|bytes| i64::from_le_bytes(*bytes))
            .collect()
    }

    pub fn f32s(&self, name: &str) -> Vec<f32> {
        let tensors = SafeTensors::deserialize(&self.0).unwrap();
        let (chunks, _) = tensors.tensor(name).unwrap().data().as_chunks();
        chunks
            .iter()
            .map(|bytes| f32::from_le_bytes(*bytes))
            .collect()
    }

    /// The packed row recorded under `prefix`: a document begins where the position is 0.
    pub fn row(&self, prefix: &str) -> PackedRow {
        let tokens_t: Vec<u32> = self
            .i64s(&format!("{prefix}.input_ids"))
            .into_iter()
            .map(|id| id as u32)
            .collect();
        let labels = self.i64s(&format!("{prefix}.labels"));
        let positions = self.i64s(&format!("{prefix}.position_ids"));
        let starts = positions
            .iter()
            .enumerate()
            .filter(|(_, position)| **position == 0);
        let mut cu_seqlens: Vec<u32> = starts.map(|(t, _)| t as u32).collect();
        cu_seqlens.push(tokens_t.len() as u32);
        let target = |t: usize| match labels.get(t + 1) {
            Some(label) if positions[t + 1] != 0 => (*label).max(-1) as i32,
            _ => -1,
        };
        PackedRow {
            targets_t: (0..tokens_t.len()).map(target).collect(),
            examples: (0..cu_seqlens.len() - 1).collect(),
            tokens_t,
            cu_seqlens,
        }
    }
}

/// On the CPU, or on what `CYRENE_TEST_DEVICE` names (`cuda`).
pub fn load(reference: &Path, name: &str) -> Model {
    let model = Model::load(&reference.join("models").join(name), DType::F32).unwrap();
    model.to_device(Device::for_tests()).unwrap()
}

pub fn n_targets(row: &PackedRow) -> u64 {
    row.targets_t.iter().filter(|target| **target >= 0).count() as u64
}

/// Mean loss of one row.
pub fn loss(model: &Model, row: &PackedRow) -> f64 {
    let nll_t = model.nll(&mut Saved::default(), &as_batch(row)).unwrap();
    nll_t.iter().map(|nll| f64::from(*nll)).sum::<f64>() / n_targets(row) as f64
}

/// Repeats recorded steps; each must have the recorded learning rate, loss and gradient norm.
pub fn check_steps(
    trainer: &mut Trainer,
    schedule: &Schedule,
    batches: &Tensors,
    steps_log: &Value,
    loss_rel: f64,
    grad_norm_rel: f64,
) {
    for (step_idx, recorded) in steps_log.as_array().unwrap().iter().enumerate() {
        let row = batches.row(&format!("step{step_idx}"));
        let lr = schedule.lr_at(step_idx as u64);
        assert_close(lr, &recorded["lr"], 1e-12, "lr");
        let n_targets = n_targets(&row);
        if let Some(valid) = recorded["num_valid"].as_u64() {
            assert_eq!(n_targets, valid);
        }
        let outcome = trainer.step(std::iter::once(row), n_targets, lr).unwrap();
        assert_close(outcome.loss, &recorded["loss"], loss_rel, "loss");
        assert_close(
            f64::from(outcome.grad_norm),
            &recorded["grad_norm"],
            grad_norm_rel,
            "gradient norm",
        );
    }
}

/// Relative to the expected value.
pub fn assert_close(got: f64, expect: &Value, tolerance: f64, what: &str) {
    let expect = expect.as_f64().unwrap();
    assert!(
        (got - expect).abs() <= tolerance * expect.abs(),
        "{what}: {got}, recorded {expect}"
    );
}

/// Largest absolute difference.
pub fn largest_difference(got: &[f32], expect: &[f32]) -> f32 {
    assert_eq!(got.len(), expect.len());
    let differences = got.iter().zip(expect).map(|(a, b)| (a - b).abs());
    differences.fold(0.0, f32::max)
}
