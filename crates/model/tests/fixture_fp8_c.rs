//! Parity that a fresh clone can check: a small quantized folder with its logits, and blocks before and after quantization.
#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

mod common;

use common::{Tensors, assert_close, fixture};
use kernel::ops::quantize_fp8::{self, Division};
use kernel::{DType, Tensor, bf16};
use model::{Model, Saved};

const WEIGHTS: [&str; 2] = [
    "model.language_model.layers.0.mlp.down_proj.weight",
    "model.language_model.layers.1.self_attn.q_proj.weight",
];

#[test]
fn quantized_folder_gives_the_recorded_logits() {
    let golden = Tensors::open(fixture("fp8_c/logits.safetensors"));
    let tokens_t = golden.ids("input_ids");
    let expected = golden.floats("logits_dequantized");
    let model = Model::load(&fixture("fp8_c/quantized"), DType::F32).unwrap();
    let borders = [0, tokens_t.len() as u32];
    let logits = model
        .logits(&mut Saved::default(), &tokens_t, &borders)
        .unwrap();
    assert_close("full", logits.f32s(), &expected, 1e-4);

    let mut state = model.new_state().unwrap();
    let mut pieces = Vec::new();
    for tokens in tokens_t.chunks(9) {
        pieces.extend_from_slice(model.prefill_all(&mut state, tokens).unwrap().f32s());
    }
    assert_close("pieces", &pieces, &expected, 1e-4);
}

#[test]
fn blocks_are_quantized_to_the_recorded_bytes() {
    let blocks = Tensors::open(fixture("fp8_c/blocks.safetensors"));
    let quantized = Tensors::open(fixture("fp8_c/quantized/model.safetensors"));
    for name in WEIGHTS {
        let source = format!("source.{name}");
        let shape = blocks.shape(&source);
        let values = blocks.floats(&source).into_iter().map(bf16::from_f32);
        let weight = Tensor::from_bf16(&shape, values.collect());

        let halved = quantize_fp8::encode(&weight, Division::Bf16).unwrap();
        let (_, _, theirs) = quantized.raw(name);
        assert_eq!(halved.bytes, theirs[..halved.bytes.len()], "{name}");
        let scales = quantized.floats(&format!("{name}_scale"));
        for (ours, theirs) in halved.scales.iter().zip(scales) {
            assert_eq!(ours.to_f32(), theirs, "{name}");
        }

        let exact = quantize_fp8::encode(&weight, Division::F32).unwrap();
        assert_eq!(
            exact.bytes,
            blocks.raw(&format!("f32_division.{name}")).2,
            "{name}"
        );
    }
}
