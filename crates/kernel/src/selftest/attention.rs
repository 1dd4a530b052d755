//! Attention in both storage types: ragged packed documents, every head dim and ratio, pieces of backward, and a cache.

use super::{Check, Tolerance};
use crate::ops::attention;
use crate::{DType, Result, Tensor};

/// Documents of one token, around tiles of 16, 32, 64 and 128, and beyond one.
const LENGTHS: [usize; 11] = [1, 63, 0, 64, 65, 3, 130, 1, 2, 33, 190];

/// Both sides sum in f32; on the GPU's matrix units weights and score gradients are rounded to bf16 before the second product.
const TOLERANCE: Tolerance = Tolerance {
    f32: 1e-5,
    bf16: 8e-3,
};

pub(super) fn run(check: &mut Check) -> Result<()> {
    for heads in [[2, 2, 64], [4, 2, 128], [3, 1, 256], [8, 1, 64]] {
        for dtype in [DType::F32, DType::Bf16] {
            packed(check, &LENGTHS, heads, [dtype; 4], 1.0, None)?;
        }
    }
    // Head dims that no kernel is made for, and one that is no multiple of 4.
    packed(check, &LENGTHS, [4, 2, 32], [DType::Bf16; 4], 1.0, None)?;
    packed(check, &[5, 40], [2, 1, 5], [DType::F32; 4], 1.0, None)?;
    // The outputs' type, and one input's, is not that of the others.
    let (f32, bf16) = (DType::F32, DType::Bf16);
    packed(
        check,
        &LENGTHS,
        [2, 1, 64],
        [f32, bf16, bf16, bf16],
        1.0,
        None,
    )?;
    packed(
        check,
        &LENGTHS,
        [2, 1, 128],
        [bf16, bf16, f32, bf16],
        1.0,
        None,
    )?;
    // The heads of the 4B model; scores that leave few weights; a document of many tiles.
    packed(check, &[40, 129], [16, 4, 256], [bf16; 4], 1.0, None)?;
    packed(check, &[150, 20], [4, 1, 256], [bf16; 4], 8.0, None)?;
    packed(check, &[700], [1, 1, 256], [bf16; 4], 1.0, None)?;
    // Room for the score gradients of so many 64 keys and 32 queries: one head at a time, documents apart, documents in pieces.
    for n_blocks in [300, 60, 1] {
        let bytes = Some(n_blocks * 4096);
        packed(check, &[300, 1, 190], [4, 2, 64], [bf16; 4], 1.0, bytes)?;
    }

    for n in [64, 128, 256] {
        for dtype in [f32, bf16] {
            // One token, as many as share a tile with their heads, one more, and a prompt; nothing cached, and several blocks' worth.
            for [t, past] in [[1, 0], [1, 299], [4, 100], [5, 61], [70, 130], [1, 1500]] {
                cached(check, t, past, [4, 1, n], [dtype; 2])?;
            }
        }
    }
    cached(check, 3, 700, [6, 2, 256], [bf16; 2])?;
    cached(check, 2, 300, [4, 2, 128], [f32, bf16])
}

/// Forward and backward; types of the outputs, of q, of k and v, of out's gradient.
fn packed(
    check: &mut Check,
    lengths: &[usize],
    [h, g, n]: [usize; 3],
    [out_type, q_type, kv_type, d_out_type]: [DType; 4],
    sharpness: f32,
    score_bytes: Option<usize>,
) -> Result<()> {
    let mut cu_seqlens = vec![0];
    for length in lengths {
        cu_seqlens.push(cu_seqlens[cu_seqlens.len() - 1] + *length as u32);
    }
    let t: usize = lengths.iter().sum();
    let scale = sharpness / (n as f32).sqrt();
    let case = format!(
        "{q_type} to {out_type}, {kv_type} keys, {h}:{g} heads of {n}, {} documents of {t} tokens{}",
        lengths.len(),
        score_bytes.map_or(String::new(), |bytes| format!(", {bytes} bytes of scores")),
    );
    let q = check.range(&[t, h, n], q_type, -2.0, 2.0);
    let k = check.range(&[t, g, n], kv_type, -2.0, 2.0);
    let v = check.tensor(&[t, g, n], kv_type);
    let d_out = check.tensor(&[t, h, n], d_out_type);
    let outputs = vec![
        ("out", Tensor::poison(&[t, h, n], out_type)),
        ("lse", Tensor::poison(&[t, h], DType::F32)),
    ];
    if score_bytes.is_none() {
        check.both(&case, TOLERANCE, outputs, &[&q, &k, &v], |outs, ins| {
            let [out, lse] = outs else { unreachable!() };
            attention::forward(out, lse, &ins[0], &ins[1], &ins[2], &cu_seqlens, scale)
        })?;
    }

    let mut out = Tensor::poison(&[t, h, n], out_type);
    let mut lse = Tensor::poison(&[t, h], DType::F32);
    attention::forward(&mut out, &mut lse, &q, &k, &v, &cu_seqlens, scale)?;
    let outputs = vec![
        ("d_q", Tensor::poison(&[t, h, n], q_type)),
        ("d_k", Tensor::poison(&[t, g, n], kv_type)),
        ("d_v", Tensor::poison(&[t, g, n], kv_type)),
    ];
    let inputs = [&d_out, &out, &lse, &q, &k, &v];
    check.both(&case, TOLERANCE, outputs, &inputs, |outs, ins| {
        let ([d_q, d_k, d_v], [d_out, out, lse, q, k, v]) = (outs, ins) else {
            unreachable!()
        };
        attention::backward_within(
            [d_q, d_k, d_v],
            [d_out, out, lse],
            [q, k, v],
            &cu_seqlens,
            scale,
            score_bytes,
        )
    })
}

/// T tokens after `past` others; what lies behind them in the cache is NaN. Types of the output and of the rest.
fn cached(
    check: &mut Check,
    t: usize,
    past: usize,
    [h, g, n]: [usize; 3],
    [out_type, in_type]: [DType; 2],
) -> Result<()> {
    const SPARE: usize = 7;
    let case = format!("{in_type} to {out_type}, {h}:{g} heads of {n}, {t} after {past} cached");
    let q = check.range(&[t, h, n], in_type, -2.0, 2.0);
    let [k, v] = [(); 2].map(|()| {
        let used = check.range(&[past + t, g, n], DType::F32, -2.0, 2.0);
        let mut rows = used.to_f32_vec();
        rows.extend(vec![f32::NAN; SPARE * g * n]);
        Tensor::from_f32(&[past + t + SPARE, g, n], rows).to_dtype(in_type)
    });
    let outputs = vec![("out", Tensor::poison(&[t, h, n], out_type))];
    check.both(&case, TOLERANCE, outputs, &[&q, &k, &v], |outs, ins| {
        let scale = 1.0 / (n as f32).sqrt();
        attention::forward_cached(&mut outs[0], &ins[0], &ins[1], &ins[2], past, scale)
    })
}
