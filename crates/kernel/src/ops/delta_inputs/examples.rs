//! Calls over ragged packed documents in both storage types.

use super::{Inputs, Outputs, Saved};
use crate::DType::{self, F32};
use crate::example::{Example, Sizes, TYPES, Tolerance, offsets, zeros_like};

const EPS: f32 = 1e-6;
/// Lengths of packed documents: none, shorter than the filter, borders in and at the ends of runs of tokens.
const DOCUMENTS: [&[usize]; 6] = [
    &[1],
    &[2],
    &[5, 1, 2],
    &[1, 2, 0, 3, 122, 1, 63, 64, 65, 130, 4],
    &[0, 16, 16, 0, 0, 17, 15, 0],
    &[700],
];

pub(crate) fn compared() -> Vec<Example> {
    let mut all = Vec::new();
    for types in TYPES {
        for lengths in DOCUMENTS {
            for heads in [
                [2, 2, 128, 128],
                [2, 4, 128, 128],
                [1, 3, 64, 64],
                [1, 1, 256, 256],
                [3, 3, 12, 10],
                [2, 2, 24, 40],
            ] {
                let call = Call {
                    cu_seqlens: offsets(lengths),
                    heads,
                    types,
                    n_zeros: 0,
                };
                all.extend([call.forward(), call.backward(), call.backward_frozen()]);
            }
        }
        // Heads of norm 0, whose gradients eps alone keeps finite.
        let zeros = Call {
            cu_seqlens: offsets(&[70, 61]),
            heads: [2, 4, 128, 128],
            types,
            n_zeros: 70,
        };
        all.extend([zeros.forward(), zeros.backward(), zeros.backward_frozen()]);
    }
    all
}

pub(crate) fn timed(sizes: &Sizes) -> Vec<Example> {
    let call = Call {
        cu_seqlens: sizes.cu_seqlens.clone(),
        heads: sizes.delta,
        types: [sizes.dtype; 3],
        n_zeros: 0,
    };
    vec![call.forward(), call.backward()]
}

struct Call {
    cu_seqlens: Vec<u32>,
    /// Key heads, value heads, key dim, value dim.
    heads: [usize; 4],
    types: [DType; 3],
    /// Tokens from the first that are zeros: whole documents.
    n_zeros: usize,
}

impl Call {
    fn example(&self, name: &'static str) -> Example {
        let [g, h, k, v] = self.heads;
        let (t, n_documents) = (self.n_tokens(), self.cu_seqlens.len() - 1);
        // In f32, a head's norm near zero is divided by. In bf16 the CPU rounds what lies between to the type of its input,
        // the GPU does not, and f32 outputs show it.
        let f32 = if self.types[0] == F32 { 2e-5 } else { 1e-2 };
        let documents = match n_documents {
            1 => String::new(),
            n => format!("_docs{n}"),
        };
        let zeros = match self.n_zeros {
            0 => String::new(),
            n => format!("_zeros{n}"),
        };
        Example::new(name, format!("t{t}{documents}{zeros}_g{g}_h{h}_k{k}_v{v}"))
            .tolerance(Tolerance { f32, bf16: 1e-2 })
    }

    fn n_tokens(&self) -> usize {
        self.cu_seqlens[self.cu_seqlens.len() - 1] as usize
    }

    fn n_channels(&self) -> usize {
        let [g, h, k, v] = self.heads;
        2 * g * k + h * v
    }

    /// The input that the zeros are in.
    fn with_qkv(&self, example: Example) -> Example {
        let (t, c) = (self.n_tokens(), self.n_channels());
        let n_zeros = self.n_zeros * c;
        example
            .input_in("qkv", &[t, c], self.types[0], [-2.0, 2.0])
            .changed(move |qkv| qkv[..n_zeros].fill(0.0))
    }

    fn q_scale(&self) -> f32 {
        1.0 / (self.heads[2] as f32).sqrt()
    }

    fn forward(&self) -> Example {
        let ([_, out_type, w_type], [g, h, k, v]) = (self.types, self.heads);
        let (t, c) = (self.n_tokens(), self.n_channels());
        let (cu_seqlens, q_scale) = (self.cu_seqlens.clone(), self.q_scale());
        let example = self
            .example("delta_inputs/forward")
            .out("q", &[t, g, k], out_type)
            .out("k", &[t, g, k], out_type)
            .out("v", &[t, h, v], out_type)
            .out("q_rstd", &[t, g], F32)
            .out("k_rstd", &[t, g], F32);
        self.with_qkv(example).input("w", &[c, 1, 4], w_type).run(
            move |[q_tgk, k_tgk, v_thv, q_rstd_tg, k_rstd_tg], [qkv_tc, w]| {
                let outputs = Outputs {
                    q_tgk,
                    k_tgk,
                    v_thv,
                    q_rstd_tg,
                    k_rstd_tg,
                };
                let inputs = Inputs {
                    qkv_tc,
                    w,
                    cu_seqlens: &cu_seqlens,
                    q_scale,
                };
                super::forward(outputs, &inputs, EPS)
            },
        )
    }

    fn backward_inputs(&self, example: Example) -> Example {
        let ([_, d_type, w_type], [g, h, k, v]) = (self.types, self.heads);
        let (t, c) = (self.n_tokens(), self.n_channels());
        let (cu_seqlens, q_scale) = (self.cu_seqlens.clone(), self.q_scale());
        let example = example
            .input("d_q", &[t, g, k], d_type)
            .input("d_k", &[t, g, k], d_type)
            .input("d_v", &[t, h, v], d_type);
        self.with_qkv(example)
            .input("w", &[c, 1, 4], w_type)
            .saved("q_rstd", &[t, g], F32)
            .saved("k_rstd", &[t, g], F32)
            .prepared(move |[q, k, v, qkv_tc, w, q_rstd_tg, k_rstd_tg]| {
                let outputs = Outputs {
                    q_tgk: &mut zeros_like(q)?,
                    k_tgk: &mut zeros_like(k)?,
                    v_thv: &mut zeros_like(v)?,
                    q_rstd_tg,
                    k_rstd_tg,
                };
                let inputs = Inputs {
                    qkv_tc,
                    w,
                    cu_seqlens: &cu_seqlens,
                    q_scale,
                };
                super::forward(outputs, &inputs, EPS)
            })
    }

    fn backward(&self) -> Example {
        let (t, c) = (self.n_tokens(), self.n_channels());
        let (cu_seqlens, q_scale) = (self.cu_seqlens.clone(), self.q_scale());
        let example = self
            .example("delta_inputs/backward")
            .out("d_qkv", &[t, c], self.types[1])
            .updated("d_w", &[c, 1, 4], F32);
        self.backward_inputs(example).run(
            move |[d_qkv, d_w], [d_q_tgk, d_k_tgk, d_v_thv, qkv_tc, w, q_rstd_tg, k_rstd_tg]| {
                let saved = Saved {
                    d_q_tgk,
                    d_k_tgk,
                    d_v_thv,
                    q_rstd_tg,
                    k_rstd_tg,
                };
                let inputs = Inputs {
                    qkv_tc,
                    w,
                    cu_seqlens: &cu_seqlens,
                    q_scale,
                };
                super::backward(d_qkv, Some(d_w), &saved, &inputs)
            },
        )
    }

    fn backward_frozen(&self) -> Example {
        let (t, c) = (self.n_tokens(), self.n_channels());
        let (cu_seqlens, q_scale) = (self.cu_seqlens.clone(), self.q_scale());
        let example =
            self.example("delta_inputs/backward")
                .out("d_qkv, frozen", &[t, c], self.types[1]);
        self.backward_inputs(example).run(
            move |[d_qkv], [d_q_tgk, d_k_tgk, d_v_thv, qkv_tc, w, q_rstd_tg, k_rstd_tg]| {
                let saved = Saved {
                    d_q_tgk,
                    d_k_tgk,
                    d_v_thv,
                    q_rstd_tg,
                    k_rstd_tg,
                };
                let inputs = Inputs {
                    qkv_tc,
                    w,
                    cu_seqlens: &cu_seqlens,
                    q_scale,
                };
                super::backward(d_qkv, None, &saved, &inputs)
            },
        )
    }
}
