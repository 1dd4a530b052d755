//! Calls with the decays and document lengths at which the rule is known to break.

use super::{CHUNK, Gradients, Inputs};
use crate::DType::{self, Bf16, F32};
use crate::Tensor;
use crate::example::{Example, Sizes, Tolerance, offsets};

/// bf16 operands of matrix products, also behind outputs that are stored as f32.
const ROUNDED: Tolerance = Tolerance {
    f32: 1e-2,
    bf16: 1e-2,
};

/// One-token documents, ones that end at, before and behind the end of a chunk, an empty one.
const LENGTHS: &[usize] = &[1, 63, 0, 64, 65, 3, 130, 1, 2];
const USUAL: [f32; 2] = [-0.5, 0.0];

pub(crate) fn compared() -> Vec<Example> {
    let mut all = Vec::new();
    // Value heads, key heads, key dim, value dim.
    for dims in [
        [2, 2, 32, 32],
        [4, 2, 64, 64],
        [3, 1, 32, 64],
        [2, 1, 128, 128],
        [1, 1, 256, 40],
        [1, 1, 17, 5],
    ] {
        all.extend(Call::new(LENGTHS, dims, USUAL, F32).both());
    }
    for dims in [
        [2, 2, 128, 128],
        [4, 2, 128, 128],
        [6, 2, 128, 128],
        [4, 2, 32, 32],
        [2, 1, 64, 256],
    ] {
        all.extend(Call::new(LENGTHS, dims, USUAL, Bf16).both());
    }
    // The heads of a 4B model, and one document of many chunks.
    all.extend(Call::new(&[90, 40], [32, 16, 128, 128], USUAL, Bf16).both());
    all.extend(Call::new(&[1000], [2, 1, 128, 128], [-1e-2, 0.0], Bf16).both());
    for dtype in [F32, Bf16] {
        for gates in [
            // So slow that whatever leaks into the next document stays.
            [-1e-4, -1e-5],
            [-20.0, 0.0],
            [-50.0, -15.0],
            [-1e4, -1e3],
        ] {
            all.extend(Call::new(&[70, 150, 5], [2, 1, 128, 128], gates, dtype).both());
        }
        let zeros = Call {
            has_zeros: true,
            ..Call::new(&[70, 80], [2, 1, 128, 128], USUAL, dtype)
        };
        all.extend(zeros.both());
    }
    for (dtype, dims) in [
        (F32, [4, 2, 32, 64]),
        (F32, [2, 1, 128, 128]),
        (Bf16, [4, 2, 32, 64]),
        (Bf16, [6, 2, 128, 128]),
    ] {
        for t in [1, 63, 64, 200] {
            all.push(with_state(t, dims, dtype));
        }
    }
    all
}

pub(crate) fn timed(sizes: &Sizes) -> Vec<Example> {
    let (t, [g, h, k, v]) = (sizes.n_tokens, sizes.delta);
    let call = Call {
        cu_seqlens: sizes.cu_seqlens.clone(),
        label: format!("t{t}_doc{}_g{g}_h{h}_k{k}_v{v}", sizes.longest()),
        dims: [h, g, k, v],
        gates: USUAL,
        dtype: sizes.dtype,
        has_zeros: false,
    };
    // A product with the state, and one with the lower triangle of a chunk's pairs, for all tokens and value heads.
    let (state, values) = (2.0 * (t * h * k * v) as f64, (t * h * CHUNK * v) as f64);
    let keys = (t * g * CHUNK * k) as f64;
    let [forward, backward] = call.both();
    vec![
        forward.operations_at_least(3.0 * state + 2.0 * values + 2.0 * keys),
        // The states again (2), their gradients (3), and what both give to queries, keys and values (3).
        backward.operations_at_least(8.0 * state + 5.0 * values + 6.0 * keys),
    ]
}

/// The dims, value heads to key heads.
pub(in crate::ops) fn heads([h, g, k, v]: [usize; 4]) -> String {
    format!("{h}:{g} heads of {k}x{v}")
}

/// q, k, v, g and beta of `t` tokens; gates between two values.
pub(in crate::ops) fn inputs(
    example: Example,
    t: usize,
    [h, g, k, v]: [usize; 4],
    gates: [f32; 2],
    dtype: DType,
) -> Example {
    let unit = move |scale: f32| move |x: &mut [f32]| normalise(x, k, scale);
    example
        .input("q", &[t, g, k], dtype)
        .changed(unit(1.0 / (k as f32).sqrt()))
        .input("k", &[t, g, k], dtype)
        .changed(unit(1.0))
        .input("v", &[t, h, v], dtype)
        .input_in("g", &[t, h], F32, gates)
        .input_in("beta", &[t, h], F32, [0.0, 1.0])
}

/// Every row of `width` to this norm.
fn normalise(x: &mut [f32], width: usize, scale: f32) {
    for row in x.chunks_mut(width) {
        let norm = row.iter().map(|x| x * x).sum::<f32>().sqrt();
        row.iter_mut().for_each(|x| *x *= scale / norm);
    }
}

fn as_inputs<'a>([q, k, v, g, beta]: [&'a Tensor; 5]) -> Inputs<'a> {
    Inputs {
        q_tgk: q,
        k_tgk: k,
        v_thv: v,
        g_th: g,
        beta_th: beta,
    }
}

fn tolerance(dtype: DType) -> Tolerance {
    match dtype {
        F32 => Tolerance::USUAL,
        Bf16 => ROUNDED,
    }
}

struct Call {
    cu_seqlens: Vec<u32>,
    label: String,
    /// Value heads, key heads, key dim, value dim.
    dims: [usize; 4],
    gates: [f32; 2],
    dtype: DType,
    /// Whether some rows of every input are zero, and some tokens write nothing.
    has_zeros: bool,
}

impl Call {
    fn new(lengths: &[usize], dims: [usize; 4], gates: [f32; 2], dtype: DType) -> Self {
        let n = lengths.len();
        Call {
            cu_seqlens: offsets(lengths),
            label: format!("{n} documents, {}, gates {gates:?}", heads(dims)),
            dims,
            gates,
            dtype,
            has_zeros: false,
        }
    }

    fn both(&self) -> [Example; 2] {
        let ([h, g, k, v], t) = (self.dims, self.n_tokens());
        let cu_seqlens = self.cu_seqlens.clone();
        let forward = Example::new("gated_delta_rule/forward", self.label.clone());
        let forward = self.inputs(forward.out("out", &[t, h, v], self.dtype));
        let forward =
            forward.run(move |[out], ins| super::forward(out, &as_inputs(ins), &cu_seqlens));

        let cu_seqlens = self.cu_seqlens.clone();
        let backward = Example::new("gated_delta_rule/backward", self.label.clone())
            .out("d_q", &[t, g, k], self.dtype)
            .out("d_k", &[t, g, k], self.dtype)
            .out("d_v", &[t, h, v], self.dtype)
            .out("d_g", &[t, h], F32)
            .out("d_beta", &[t, h], F32);
        let backward = self
            .inputs(backward)
            .input("d_out", &[t, h, v], self.dtype)
            .changed(self.zero_rows(h * v, 0));
        let backward = backward.run(
            move |[d_q_tgk, d_k_tgk, d_v_thv, d_g_th, d_beta_th], [q, k, v, g, beta, d_out]| {
                let gradients = Gradients {
                    d_q_tgk,
                    d_k_tgk,
                    d_v_thv,
                    d_g_th,
                    d_beta_th,
                };
                let inputs = as_inputs([q, k, v, g, beta]);
                super::backward(gradients, d_out, &inputs, &cu_seqlens)
            },
        );
        [forward, backward].map(|example| example.tolerance(tolerance(self.dtype)))
    }

    fn n_tokens(&self) -> usize {
        self.cu_seqlens[self.cu_seqlens.len() - 1] as usize
    }

    fn inputs(&self, example: Example) -> Example {
        let ([h, g, k, v], t) = (self.dims, self.n_tokens());
        if !self.has_zeros {
            return inputs(example, t, self.dims, self.gates, self.dtype);
        }
        let unit = |scale: f32| {
            let zero = self.zero_rows(g * k, 0);
            move |x: &mut [f32]| {
                normalise(x, k, scale);
                zero(x);
            }
        };
        example
            .input("q", &[t, g, k], self.dtype)
            .changed(unit(1.0 / (k as f32).sqrt()))
            .input("k", &[t, g, k], self.dtype)
            .changed(unit(1.0))
            .input("v", &[t, h, v], self.dtype)
            .changed(self.zero_rows(h * v, 0))
            .input_in("g", &[t, h], F32, self.gates)
            .input_in("beta", &[t, h], F32, [0.0, 1.0])
            .changed(self.zero_rows(h, 3))
    }

    /// Zeroes some rows of `width`, `behind` the usual ones, if this call has zeros.
    fn zero_rows(&self, width: usize, behind: usize) -> impl Fn(&mut [f32]) + use<> {
        let (t, has_zeros) = (self.n_tokens(), self.has_zeros);
        move |x: &mut [f32]| {
            if has_zeros {
                for row in [0, 1, 5, 63, 64, 70, 149] {
                    x[(row + behind) % t * width..][..width].fill(0.0);
                }
            }
        }
    }
}

fn with_state(t: usize, dims: [usize; 4], dtype: DType) -> Example {
    let [h, _, k, v] = dims;
    let label = format!("{t} tokens, {}", heads(dims));
    let example = Example::new("gated_delta_rule/forward_with_state", label)
        .tolerance(tolerance(dtype))
        .out("out", &[t, h, v], dtype)
        .updated("state", &[h, k, v], F32);
    inputs(example, t, dims, [-0.05, 0.0], dtype)
        .run(|[out, state], ins| super::forward_with_state(out, state, &as_inputs(ins)))
}
