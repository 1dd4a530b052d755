//! One token of the gated delta rule for each of several sequences: the recurrence itself, for decoding.
//!
//! S ← exp(g) S + k dᵀ with d = beta (v - exp(g) Sᵀk), out = Sᵀq with the new S, for each sequence and value head.
//! Source: arXiv 2412.06464; agrees with [`super::gated_delta_rule`] up to f32 rounding.

// T sequences (one token each), H value heads, G key heads (H a multiple of G), K key dim, V value dim.

use super::check;
use super::gated_delta_rule::{Dims, Inputs};
use crate::{Device, Result, Tensor};

/// `out` [T,H,V] assigned, the states, T tensors [H,K,V] f32, updated: one for each token of `inputs`.
///
/// # Errors
/// [`crate::Error::Shape`] where shapes disagree or H is no multiple of G; [`crate::Error::DType`] where g, beta or a state
/// is not f32. Nothing is written then.
pub fn forward(
    out_thv: &mut Tensor,
    states_hkv: &mut [&mut Tensor],
    inputs: &Inputs,
) -> Result<()> {
    const OP: &str = "gated_delta_step::forward";
    let dims = inputs.check(OP)?;
    let Dims { t, h, k, v, .. } = dims;
    check::shape(OP, "out_thv", out_thv, &[t, h, v])?;
    check::len(OP, "states_hkv", states_hkv.len(), t)?;
    for state in states_hkv.iter() {
        check::shape(OP, "states_hkv", state, &[h, k, v])?;
        check::f32(OP, "states_hkv", state)?;
    }
    let device = inputs.device(OP, out_thv, &[])?;
    for state in states_hkv.iter() {
        check::device(OP, out_thv, &[("states_hkv", state)])?;
    }
    match device {
        Device::Cpu => cpu::forward(out_thv, states_hkv, inputs),
        Device::Cuda(cuda) => cuda::forward(cuda, out_thv, states_hkv, inputs)?,
    }
    Ok(())
}

mod cpu {
    use rayon::prelude::*;

    use super::{Dims, Inputs};
    use crate::Tensor;
    use crate::cpu::{View, ViewMut, math, simd};

    /// State elements that make a task worth handing to another thread.
    const TASK_ELEMENTS: usize = 1 << 15;

    struct Head<'a> {
        /// Row of [T,H].
        row: usize,
        out_v: ViewMut<'a>,
        state_kv: &'a mut [f32],
    }

    pub(super) fn forward(out_thv: &mut Tensor, states_hkv: &mut [&mut Tensor], inputs: &Inputs) {
        let Dims { h, g, k, v, .. } = inputs.dims();
        let (g_th, beta_th) = (inputs.g_th.f32s(), inputs.beta_th.f32s());
        let [queries, keys, values] = [inputs.q_tgk, inputs.k_tgk, inputs.v_thv].map(View::of);
        let states = states_hkv
            .iter_mut()
            .flat_map(|state| state.f32s_mut().chunks_exact_mut(k * v));
        let heads: Vec<Head> = ViewMut::of(out_thv)
            .chunks(v)
            .into_iter()
            .zip(states)
            .enumerate()
            .map(|(row, (out_v, state_kv))| Head {
                row,
                out_v,
                state_kv,
            })
            .collect();
        heads
            .into_par_iter()
            .with_min_len((TASK_ELEMENTS / (k * v)).max(1))
            .for_each_init(
                || [vec![0.0; k], vec![0.0; k], vec![0.0; v], vec![0.0; v]],
                |[query, key, delta, out], mut head| {
                    let (sequence, value_head) = (head.row / h, head.row % h);
                    let key_head = (sequence * g + value_head * g / h) * k;
                    simd(
                        #[inline(always)]
                        || {
                            queries.slice(key_head..key_head + k).read_into(query);
                            keys.slice(key_head..key_head + k).read_into(key);
                            let row = head.row * v..(head.row + 1) * v;
                            values.slice(row).read_into(delta);
                            let gates = [math::exp(g_th[head.row]), beta_th[head.row]];
                            step(head.state_kv, delta, out, query, key, gates);
                            head.out_v.store(out);
                        },
                    );
                },
            );
    }

    /// `delta_v` comes in as the value and goes out as d.
    #[inline(always)]
    fn step(
        state_kv: &mut [f32],
        delta_v: &mut [f32],
        out_v: &mut [f32],
        query_k: &[f32],
        key_k: &[f32],
        [decay, beta]: [f32; 2],
    ) {
        let v = out_v.len();
        // 1. d = beta (v - decayed Sᵀk), and decayed Sᵀq in the same walk over S
        out_v.fill(0.0);
        for (row, (&query, &key)) in state_kv.chunks_exact(v).zip(query_k.iter().zip(key_k)) {
            let (query, key) = (decay * query, decay * key);
            for ((out, delta), &s) in out_v.iter_mut().zip(delta_v.iter_mut()).zip(row) {
                *out += query * s;
                *delta -= key * s;
            }
        }
        math::scale(delta_v, beta);
        // 2. out = Sᵀq of the new S, without reading it again
        math::add_scaled(out_v, delta_v, math::dot(query_k, key_k));
        // 3. the new S
        for (row, &key) in state_kv.chunks_exact_mut(v).zip(key_k) {
            for (s, &delta) in row.iter_mut().zip(delta_v.iter()) {
                *s = decay * *s + key * delta;
            }
        }
    }
}

mod cuda {
    use super::{Dims, Inputs};
    use crate::cuda::sources::GATED_DELTA_STEP;
    use crate::cuda::{Args, Cuda, Grid};
    use crate::{Error, Result, Tensor};

    /// Value columns of a block.
    const COLUMNS: usize = 32;

    pub(super) fn forward(
        cuda: Cuda,
        out_thv: &mut Tensor,
        states_hkv: &mut [&mut Tensor],
        inputs: &Inputs,
    ) -> Result<()> {
        let Dims { t, h, g, k, v } = inputs.dims();
        if t == 0 {
            return Ok(());
        }
        let kernel = match k {
            0..=32 => "gated_delta_step_32",
            33..=64 => "gated_delta_step_64",
            65..=128 => "gated_delta_step_128",
            129..=256 => "gated_delta_step_256",
            _ => {
                return Err(Error::Unsupported {
                    op: "gated_delta_step::forward",
                    what: format!("{k} key dims; at most 256"),
                });
            }
        };
        // Little-endian words of the addresses.
        let addresses: Vec<u32> = states_hkv
            .iter()
            .map(|state| state.device_pointer())
            .flat_map(|pointer| [pointer as u32, (pointer >> 32) as u32])
            .collect();
        let args = Args::new()
            .view_mut(out_thv)
            .pointer(cuda.upload(&addresses)?)
            .view(inputs.q_tgk)
            .view(inputs.k_tgk)
            .view(inputs.v_thv)
            .tensor(inputs.g_th)
            .tensor(inputs.beta_th)
            .u32(h)
            .u32(g)
            .u32(k)
            .u32(v);
        let grid = Grid::line(t * h * v.div_ceil(COLUMNS), 256);
        cuda.launch(&GATED_DELTA_STEP, kernel, grid, args)
    }
}

pub(crate) mod examples {
    use super::Inputs;
    use crate::DType::{Bf16, F32};
    use crate::example::Example;
    use crate::ops::gated_delta_rule::examples::{heads, inputs};

    pub(crate) fn compared() -> Vec<Example> {
        let mut all = Vec::new();
        for dtype in [F32, Bf16] {
            for (n, dims) in [
                (1, [32, 16, 128, 128]),
                (3, [3, 1, 128, 128]),
                (2, [4, 2, 32, 32]),
                (2, [2, 1, 64, 40]),
                (2, [2, 2, 5, 7]),
                (1, [1, 1, 256, 33]),
            ] {
                let [h, _, k, v] = dims;
                let name = "gated_delta_step/forward";
                let example = Example::new(name, format!("{n} sequences, {}", heads(dims)));
                let example = example.out("out", &[n, h, v], dtype);
                let states = (0..n).fold(example, |example, _| {
                    example.updated("state", &[h, k, v], F32)
                });
                let example = inputs(states, n, dims, [-20.0, 0.0], dtype);
                all.push(example.run_all(|outs, ins| {
                    let ([out, states @ ..], [q, k, v, g, beta]) = (outs, ins) else {
                        unreachable!("one output, states, and five inputs")
                    };
                    let mut states: Vec<&mut _> = states.iter_mut().collect();
                    let inputs = Inputs {
                        q_tgk: q,
                        k_tgk: k,
                        v_thv: v,
                        g_th: g,
                        beta_th: beta,
                    };
                    super::forward(out, &mut states, &inputs)
                }));
            }
        }
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::DType;
    use crate::ops::testing::{BF16_REL, Random, assert_close, f64s};

    /// One head's step in f64; the state is updated.
    fn define(
        state_kv: &mut [f64],
        q: &[f64],
        k: &[f64],
        v: &[f64],
        g: f64,
        beta: f64,
    ) -> Vec<f64> {
        let n = v.len();
        state_kv.iter_mut().for_each(|s| *s *= g.exp());
        let read = |state: &[f64], x: &[f64], j: usize| -> f64 {
            x.iter()
                .enumerate()
                .map(|(i, x)| x * state[i * n + j])
                .sum()
        };
        let delta: Vec<f64> = (0..n)
            .map(|j| beta * (v[j] - read(state_kv, k, j)))
            .collect();
        for (i, k) in k.iter().enumerate() {
            for (j, delta) in delta.iter().enumerate() {
                state_kv[i * n + j] += k * delta;
            }
        }
        (0..n).map(|j| read(state_kv, q, j)).collect()
    }

    fn check(b: usize, [h, g, k, v]: [usize; 4], gates: [f64; 2], dtype: DType, tolerance: f64) {
        let mut random = Random::new((b * 100 + h) as u64);
        let mut states: Vec<Tensor> = (0..b)
            .map(|_| random.tensor(&[h, k, v], -1.0, 1.0))
            .collect();
        let mut want_states: Vec<Vec<f64>> = states.iter().map(f64s).collect();
        for _ in 0..3 {
            let q = random.tensor(&[b, g, k], -0.2, 0.2).to_dtype(dtype);
            let key = random.tensor(&[b, g, k], -0.2, 0.2).to_dtype(dtype);
            let value = random.tensor(&[b, h, v], -1.0, 1.0).to_dtype(dtype);
            let gate = random.tensor(&[b, h], gates[0], gates[1]);
            let beta = random.tensor(&[b, h], 0.0, 1.0);
            let mut out = Tensor::poison(&[b, h, v], dtype);
            let mut refs: Vec<&mut Tensor> = states.iter_mut().collect();
            let inputs = Inputs {
                q_tgk: &q,
                k_tgk: &key,
                v_thv: &value,
                g_th: &gate,
                beta_th: &beta,
            };
            forward(&mut out, &mut refs, &inputs).unwrap();

            let [q, key, value, gate, beta] = [&q, &key, &value, &gate, &beta].map(f64s);
            let mut want = Vec::new();
            for row in 0..b * h {
                let (sequence, head) = (row / h, row % h);
                let keys = (sequence * g + head / (h / g)) * k;
                let state = &mut want_states[sequence][head * k * v..][..k * v];
                let (q, key) = (&q[keys..][..k], &key[keys..][..k]);
                let value = &value[row * v..][..v];
                want.extend(define(state, q, key, value, gate[row], beta[row]));
            }
            assert_close("out", &out, &want, tolerance);
        }
        for (state, want) in states.iter().zip(&want_states) {
            assert_close("state", state, want, 1e-6);
        }
    }

    /// Keys like the queries, beta like the gate.
    fn same<'a>(q: &'a Tensor, v: &'a Tensor, gate: &'a Tensor) -> Inputs<'a> {
        Inputs {
            q_tgk: q,
            k_tgk: q,
            v_thv: v,
            g_th: gate,
            beta_th: gate,
        }
    }

    #[test]
    fn steps_agree_with_f64() {
        for dims in [
            [2, 2, 32, 32],
            [4, 2, 64, 32],
            [3, 1, 128, 128],
            [2, 1, 5, 7],
        ] {
            for b in [1, 3] {
                check(b, dims, [-1.0, 0.0], DType::F32, 1e-6);
            }
        }
    }

    #[test]
    fn steps_agree_with_f64_for_bf16_storage_and_strong_decay() {
        check(2, [4, 2, 32, 64], [-1.0, 0.0], DType::Bf16, BF16_REL);
        check(2, [4, 2, 32, 64], [-20.0, -5.0], DType::F32, 1e-6);
    }

    #[test]
    fn a_sequence_does_not_depend_on_its_neighbours() {
        let [h, g, k, v] = [4, 2, 32, 32];
        let mut random = Random::new(1);
        let start = random.tensor(&[h, k, v], -1.0, 1.0);
        let q = random.tensor(&[1, g, k], -0.2, 0.2);
        let value = random.tensor(&[1, h, v], -1.0, 1.0);
        let gate = random.tensor(&[1, h], -1.0, 0.0);
        let twice = |x: &Tensor| {
            let mut shape = x.shape().to_vec();
            shape[0] = 2;
            let mut data: Vec<f32> = x.f32s().iter().map(|x| x * 0.5).collect();
            data.extend(x.f32s());
            Tensor::from_f32(&shape, data)
        };
        let mut alone = (Tensor::poison(&[1, h, v], DType::F32), start.clone());
        forward(&mut alone.0, &mut [&mut alone.1], &same(&q, &value, &gate)).unwrap();
        let mut out = Tensor::poison(&[2, h, v], DType::F32);
        let (mut other, mut state) = (Tensor::zeros(&[h, k, v], DType::F32), start);
        let [q, value, gate] = [&q, &value, &gate].map(twice);
        let states = &mut [&mut other, &mut state];
        forward(&mut out, states, &same(&q, &value, &gate)).unwrap();
        assert_eq!(out.f32s()[h * v..], *alone.0.f32s());
        assert_eq!(state, alone.1);
    }

    #[test]
    fn a_missing_state_is_refused() {
        let x = Tensor::zeros(&[2, 1, 4], DType::F32);
        let gate = Tensor::zeros(&[2, 1], DType::F32);
        let mut state = Tensor::zeros(&[1, 4, 4], DType::F32);
        let mut out = x.clone();
        let refused = forward(&mut out, &mut [&mut state], &same(&x, &x, &gate));
        assert!(matches!(
            refused,
            Err(crate::Error::Shape {
                arg: "states_hkv",
                ..
            })
        ));
    }
}
