//! What the tests share: the reference pack, comparisons, a seeded tiny model.
#![allow(dead_code, reason = "each test binary uses its own part")]

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use kernel::{DType, Device, Tensor};
use model::{Config, Model};
use safetensors::{Dtype, SafeTensors};
use serde_json::{Value, json};

/// The reference pack, or None (and a note) in a clone that has none beside it.
pub fn reference() -> Option<PathBuf> {
    let shared = match std::env::var_os("CYRENE_SHARED") {
        Some(dir) => PathBuf::from(dir),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared"),
    };
    let reference = shared.join("reference");
    if reference.is_dir() {
        return Some(reference);
    }
    assert!(
        std::env::var_os("CYRENE_REQUIRE_SHARED").is_none_or(|v| v != "1"),
        "no reference pack at {}",
        reference.display()
    );
    println!("skipped: no ../shared");
    None
}

/// The model of this folder on the tests' device.
pub fn load_model(dir: &Path, dtype: DType) -> Model {
    let model = Model::load(dir, dtype).unwrap();
    model.to_device(Device::for_tests()).unwrap()
}

/// A tensor's numbers, wherever it lies.
pub fn host(tensor: &Tensor) -> Vec<f32> {
    tensor
        .to_device(Device::Cpu)
        .unwrap()
        .to_dtype(DType::F32)
        .f32s()
        .to_vec()
}

pub fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/fixtures")
        .join(name)
}

/// A safetensors file in memory.
pub struct Tensors {
    bytes: Vec<u8>,
}

impl Tensors {
    pub fn open(path: impl AsRef<Path>) -> Self {
        let path = path.as_ref();
        let bytes = std::fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        Tensors { bytes }
    }

    fn parsed(&self) -> SafeTensors<'_> {
        SafeTensors::deserialize(&self.bytes).unwrap()
    }

    pub fn names(&self) -> Vec<String> {
        let mut names: Vec<String> = self
            .parsed()
            .names()
            .into_iter()
            .map(str::to_owned)
            .collect();
        names.sort();
        names
    }

    pub fn has(&self, name: &str) -> bool {
        self.parsed().tensor(name).is_ok()
    }

    /// (type, shape, bytes)
    pub fn raw(&self, name: &str) -> (Dtype, Vec<usize>, Vec<u8>) {
        let parsed = self.parsed();
        let view = parsed
            .tensor(name)
            .unwrap_or_else(|e| panic!("{name}: {e}"));
        (view.dtype(), view.shape().to_vec(), view.data().to_vec())
    }

    pub fn shape(&self, name: &str) -> Vec<usize> {
        self.raw(name).1
    }

    pub fn floats(&self, name: &str) -> Vec<f32> {
        let (dtype, _, bytes) = self.raw(name);
        match dtype {
            Dtype::F32 => bytes
                .chunks_exact(4)
                .map(|b| f32::from_le_bytes(b.try_into().unwrap()))
                .collect(),
            Dtype::BF16 => bytes
                .chunks_exact(2)
                .map(|b| kernel::bf16::from_le_bytes(b.try_into().unwrap()).to_f32())
                .collect(),
            other => panic!("{name} is {other}"),
        }
    }

    pub fn ints(&self, name: &str) -> Vec<i64> {
        let (dtype, _, bytes) = self.raw(name);
        assert_eq!(dtype, Dtype::I64, "{name}");
        bytes
            .chunks_exact(8)
            .map(|b| i64::from_le_bytes(b.try_into().unwrap()))
            .collect()
    }

    pub fn ids(&self, name: &str) -> Vec<u32> {
        self.ints(name).into_iter().map(|id| id as u32).collect()
    }
}

/// A packed row in the model's terms.
pub struct Row {
    pub tokens_t: Vec<u32>,
    pub targets_t: Vec<i32>,
    pub cu_seqlens: Vec<u32>,
}

impl Row {
    /// From recorded tensors: positions restart at each document; labels are unshifted, -100 where there is no loss.
    pub fn recorded(tensors: &Tensors, prefix: &str) -> Self {
        let tokens_t = tensors.ids(&format!("{prefix}input_ids"));
        let labels = tensors.ints(&format!("{prefix}labels"));
        let positions = tensors.ints(&format!("{prefix}position_ids"));
        let mut cu_seqlens: Vec<u32> = (0..positions.len())
            .filter(|t| positions[*t] == 0)
            .map(|t| t as u32)
            .collect();
        cu_seqlens.push(positions.len() as u32);
        let targets_t = (0..labels.len())
            .map(|t| match labels.get(t + 1) {
                Some(label) if positions[t + 1] != 0 && *label >= 0 => *label as i32,
                _ => -1,
            })
            .collect();
        Row {
            tokens_t,
            targets_t,
            cu_seqlens,
        }
    }

    /// Every token predicts the next, in documents of these lengths.
    pub fn seeded(lengths: &[usize], vocab: u32, seed: u64) -> Self {
        let n: usize = lengths.iter().sum();
        let mut state = seed.wrapping_mul(2654435761).wrapping_add(12345);
        let tokens_t: Vec<u32> = (0..n)
            .map(|_| {
                state = state
                    .wrapping_mul(6364136223846793005)
                    .wrapping_add(1442695040888963407);
                ((state >> 33) as u32) % vocab
            })
            .collect();
        let mut cu_seqlens = vec![0u32];
        for length in lengths {
            cu_seqlens.push(cu_seqlens.last().unwrap() + *length as u32);
        }
        let mut targets_t: Vec<i32> = (0..n)
            .map(|t| tokens_t.get(t + 1).map_or(-1, |id| *id as i32))
            .collect();
        for border in &cu_seqlens[1..] {
            targets_t[*border as usize - 1] = -1;
        }
        Row {
            tokens_t,
            targets_t,
            cu_seqlens,
        }
    }

    pub fn batch(&self) -> model::Batch<'_> {
        model::Batch {
            tokens_t: &self.tokens_t,
            targets_t: &self.targets_t,
            cu_seqlens: &self.cu_seqlens,
        }
    }

    pub fn n_targets(&self) -> usize {
        self.targets_t.iter().filter(|t| **t >= 0).count()
    }

    /// Document `i` alone.
    pub fn document(&self, i: usize) -> Row {
        let range = self.cu_seqlens[i] as usize..self.cu_seqlens[i + 1] as usize;
        Row {
            tokens_t: self.tokens_t[range.clone()].to_vec(),
            targets_t: self.targets_t[range.clone()].to_vec(),
            cu_seqlens: vec![0, range.len() as u32],
        }
    }
}

/// |a - b| / |b| in the Euclidean norm.
pub fn relative_error(got: &[f32], expected: &[f32]) -> f64 {
    assert_eq!(got.len(), expected.len());
    let mut difference = 0.0;
    let mut norm = 0.0;
    for (a, b) in got.iter().zip(expected) {
        difference += (f64::from(*a) - f64::from(*b)).powi(2);
        norm += f64::from(*b).powi(2);
    }
    if norm == 0.0 {
        return difference.sqrt();
    }
    (difference / norm).sqrt()
}

/// Fails, naming `what`, unless the relative error is below `tolerance`; NaN fails.
pub fn assert_close(what: &str, got: &[f32], expected: &[f32], tolerance: f64) {
    let error = relative_error(got, expected);
    assert!(
        error < tolerance,
        "{what}: relative error {error:e}, tolerated {tolerance:e}"
    );
}

pub fn sum(values: &[f32]) -> f64 {
    values.iter().map(|x| f64::from(*x)).sum()
}

/// Config of a model small enough for finite differences: two delta nets around an attention layer.
pub fn tiny_json(tied: bool) -> Value {
    json!({
        "architectures": ["Qwen3_5ForConditionalGeneration"],
        "model_type": "qwen3_5",
        "dtype": "float32",
        "tie_word_embeddings": tied,
        "text_config": {
            "model_type": "qwen3_5_text",
            "dtype": "float32",
            "vocab_size": 61,
            "hidden_size": 24,
            "intermediate_size": 40,
            "num_hidden_layers": 3,
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 8,
            "linear_num_value_heads": 4,
            "linear_value_head_dim": 8,
            "initializer_range": 0.2,
            "rope_parameters": {"rope_theta": 10000.0, "partial_rotary_factor": 0.25, "rope_type": "default"}
        }
    })
}

pub fn tiny(tied: bool, seed: u64) -> Model {
    let config = Config::from_json(&tiny_json(tied)).unwrap();
    Model::init(config, seed, DType::F32)
}

/// The trainable tensor of this name.
pub fn trainable<'a>(model: &'a mut Model, name: &str) -> &'a mut kernel::Tensor {
    let i = model
        .trainable_names()
        .iter()
        .position(|n| n == name)
        .unwrap_or_else(|| panic!("no {name}"));
    model.trainable_mut().swap_remove(i)
}

/// Name to gradient.
pub fn named(model: &Model, grads: model::Gradients) -> HashMap<String, kernel::Tensor> {
    let on_host = |tensor: kernel::Tensor| tensor.to_device(Device::Cpu).unwrap();
    model
        .trainable_names()
        .into_iter()
        .zip(grads.tensors.into_iter().map(on_host))
        .collect()
}
