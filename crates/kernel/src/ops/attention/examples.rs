//! Calls in both storage types: ragged packed documents, every head dim and ratio, pieces of backward, and a cache.

use super::{Gradients, Inputs, Saved};
use crate::DType::{self, Bf16, F32};
use crate::example::{Example, Sizes, Tolerance, offsets};

/// Documents of one token, around tiles of 16, 32, 64 and 128, and beyond one.
const LENGTHS: &[usize] = &[1, 63, 0, 64, 65, 3, 130, 1, 2, 33, 190];

/// Both sides sum in f32; on the GPU's matrix units weights and score gradients are rounded to bf16 before the second product.
const TOLERANCE: Tolerance = Tolerance {
    f32: 1e-5,
    bf16: 8e-3,
};

pub(crate) fn compared() -> Vec<Example> {
    let mut calls = Vec::new();
    for heads in [[2, 2, 64], [4, 2, 128], [3, 1, 256], [8, 1, 64]] {
        for dtype in [F32, Bf16] {
            calls.push(Call::new(LENGTHS, heads, [dtype; 4]));
        }
    }
    // Head dims that no kernel is made for, and one that is no multiple of 4.
    calls.push(Call::new(LENGTHS, [4, 2, 32], [Bf16; 4]));
    calls.push(Call::new(&[5, 40], [2, 1, 5], [F32; 4]));
    // The outputs' type, and one input's, is not that of the others.
    calls.push(Call::new(LENGTHS, [2, 1, 64], [F32, Bf16, Bf16, Bf16]));
    calls.push(Call::new(LENGTHS, [2, 1, 128], [Bf16, Bf16, F32, Bf16]));
    // The heads of the 4B model; scores that leave few weights; a document of many tiles.
    calls.push(Call::new(&[40, 129], [16, 4, 256], [Bf16; 4]));
    calls.push(Call {
        sharpness: 8.0,
        ..Call::new(&[150, 20], [4, 1, 256], [Bf16; 4])
    });
    calls.push(Call::new(&[700], [1, 1, 256], [Bf16; 4]));
    let mut all: Vec<Example> = calls
        .iter()
        .flat_map(|call| [call.forward(), call.backward(None)])
        .collect();
    // Room for the score gradients of so many 64 keys and 32 queries: one head at a time, documents apart, documents in pieces.
    for n_blocks in [300, 60, 1] {
        let call = Call::new(&[300, 1, 190], [4, 2, 64], [Bf16; 4]);
        all.push(call.backward(Some(n_blocks * 4096)));
    }

    for n in [64, 128, 256] {
        for dtype in [F32, Bf16] {
            // One token, as many as share a tile with their heads, one more, and a prompt; nothing cached, and several blocks' worth.
            for [t, past] in [[1, 0], [1, 299], [4, 100], [5, 61], [70, 130], [1, 1500]] {
                all.push(cached(t, past, [4, 1, n], [dtype; 2]));
            }
        }
    }
    all.push(cached(3, 700, [6, 2, 256], [Bf16; 2]));
    all.push(cached(2, 300, [4, 2, 128], [F32, Bf16]));
    all
}

pub(crate) fn timed(sizes: &Sizes) -> Vec<Example> {
    let (t, heads) = (sizes.n_tokens, sizes.attention);
    let [h, g, n] = heads;
    let call = Call {
        cu_seqlens: sizes.cu_seqlens.clone(),
        label: format!("t{t}_doc{}_h{h}_g{g}_n{n}", sizes.longest()),
        heads,
        types: [sizes.dtype; 4],
        sharpness: 1.0,
    };
    // One product of every pair of tokens and head.
    let product = 2.0 * sizes.pairs() * (h * n) as f64;
    vec![
        call.forward().operations_at_least(2.0 * product),
        call.backward(None).operations_at_least(5.0 * product),
    ]
}

struct Call {
    cu_seqlens: Vec<u32>,
    label: String,
    /// Query heads, key:value heads, head dim.
    heads: [usize; 3],
    /// Of the outputs, of q, of k and v, of out's gradient.
    types: [DType; 4],
    /// What scores are multiplied by, over N^-1/2.
    sharpness: f32,
}

impl Call {
    fn new(lengths: &[usize], heads: [usize; 3], types: [DType; 4]) -> Self {
        let ([h, g, n], n_documents) = (heads, lengths.len());
        let cu_seqlens = offsets(lengths);
        let t = cu_seqlens[n_documents];
        Call {
            cu_seqlens,
            label: format!("{h}:{g} heads of {n}, {n_documents} documents of {t} tokens"),
            heads,
            types,
            sharpness: 1.0,
        }
    }

    fn n_tokens(&self) -> usize {
        self.cu_seqlens[self.cu_seqlens.len() - 1] as usize
    }

    fn scale(&self) -> f32 {
        self.sharpness / (self.heads[2] as f32).sqrt()
    }

    fn inputs(&self, example: Example) -> Example {
        let (t, [h, g, n], [_, q_type, kv_type, _]) = (self.n_tokens(), self.heads, self.types);
        example
            .input_in("q", &[t, h, n], q_type, [-2.0, 2.0])
            .input_in("k", &[t, g, n], kv_type, [-2.0, 2.0])
            .input("v", &[t, g, n], kv_type)
    }

    fn forward(&self) -> Example {
        let (t, [h, _, n], cu_seqlens) = (self.n_tokens(), self.heads, self.cu_seqlens.clone());
        let scale = self.scale();
        let example = Example::new("attention/forward", self.label.clone())
            .tolerance(TOLERANCE)
            .out("out", &[t, h, n], self.types[0])
            .out("lse", &[t, h], F32);
        self.inputs(example).run(move |[out, lse], [q, k, v]| {
            let inputs = Inputs {
                q_thn: q,
                k_tgn: k,
                v_tgn: v,
                cu_seqlens: &cu_seqlens,
                scale,
            };
            super::forward(out, lse, &inputs)
        })
    }

    /// `score_bytes`: of score gradients kept at a time on a GPU.
    fn backward(&self, score_bytes: Option<usize>) -> Example {
        let (t, [h, g, n]) = (self.n_tokens(), self.heads);
        let [out_type, q_type, kv_type, d_out_type] = self.types;
        let scale = self.scale();
        let label = match score_bytes {
            Some(bytes) => format!("{}, {bytes} bytes of scores", self.label),
            None => self.label.clone(),
        };
        let example = Example::new("attention/backward", label)
            .tolerance(TOLERANCE)
            .out("d_q", &[t, h, n], q_type)
            .out("d_k", &[t, g, n], kv_type)
            .out("d_v", &[t, g, n], kv_type);
        let cu_seqlens = self.cu_seqlens.clone();
        let example = self
            .inputs(example)
            .input("d_out", &[t, h, n], d_out_type)
            .saved("out", &[t, h, n], out_type)
            .saved("lse", &[t, h], F32)
            .prepared(move |[q, k, v, _, out, lse]| {
                let inputs = Inputs {
                    q_thn: q,
                    k_tgn: k,
                    v_tgn: v,
                    cu_seqlens: &cu_seqlens,
                    scale,
                };
                super::forward(out, lse, &inputs)
            });
        let cu_seqlens = self.cu_seqlens.clone();
        example.run(
            move |[d_q_thn, d_k_tgn, d_v_tgn], [q, k, v, d_out_thn, out_thn, lse_th]| {
                let gradients = Gradients {
                    d_q_thn,
                    d_k_tgn,
                    d_v_tgn,
                };
                let saved = Saved {
                    d_out_thn,
                    out_thn,
                    lse_th,
                };
                let inputs = Inputs {
                    q_thn: q,
                    k_tgn: k,
                    v_tgn: v,
                    cu_seqlens: &cu_seqlens,
                    scale,
                };
                super::backward_within(gradients, &saved, &inputs, score_bytes)
            },
        )
    }
}

/// T tokens after `past` others; what lies behind them in the cache is NaN. Types of the output and of the rest.
fn cached(
    t: usize,
    past: usize,
    [h, g, n]: [usize; 3],
    [out_type, in_type]: [DType; 2],
) -> Example {
    const SPARE: usize = 7;
    let (n_rows, used) = (past + t + SPARE, (past + t) * g * n);
    let label = format!("{h}:{g} heads of {n}, {t} after {past} cached");
    Example::new("attention/forward_cached", label)
        .tolerance(TOLERANCE)
        .out("out", &[t, h, n], out_type)
        .input_in("q", &[t, h, n], in_type, [-2.0, 2.0])
        .input_in("k", &[n_rows, g, n], in_type, [-2.0, 2.0])
        .changed(move |k| k[used..].fill(f32::NAN))
        .input_in("v", &[n_rows, g, n], in_type, [-2.0, 2.0])
        .changed(move |v| v[used..].fill(f32::NAN))
        .run(move |[out], [q, k, v]| {
            let scale = 1.0 / (n as f32).sqrt();
            super::forward_cached(out, q, k, v, past, scale)
        })
}
