//! The delta net of one token of each of several sequences in one launch: from the projections to the input of the last one.
//!
//! convolution and SiLU ([`super::causal_conv1d`]) - l2 norms of queries and keys ([`super::l2_norm`]) - gates ([`super::delta_gate`]) - the
//! step of the rule ([`super::gated_delta_step`]) - gated norm ([`super::gated_rms_norm`]). What lies between is f32 and never stored.

// B sequences (one token each), G key heads, H value heads (a multiple of G), K key dim, V value dim, C = 2·G·K + H·V channels.

use super::check;
use crate::cuda::Placed;
use crate::{Device, Result, Tensor};

/// What the sequences carry from token to token, one tensor each, with the addresses of each list in a table of the step.
#[derive(Debug)]
pub struct States<'a, 't> {
    /// [H,K,V] f32, updated.
    pub state_hkv: &'a mut [&'t mut Tensor],
    /// The last three inputs of the convolution, oldest first [3,C] f32.
    pub conv_3c: &'a [&'t Tensor],
    /// The same after this token, assigned: heads share what they read of `conv_3c`, so it stays as it is.
    pub next_conv_3c: &'a mut [&'t mut Tensor],
    /// Addresses of these three, in this order.
    pub addresses: [Placed<'a>; 3],
}

/// Projections and weights.
#[derive(Debug, Clone, Copy)]
pub struct Inputs<'a> {
    /// Queries, keys, values before the convolution [B,C].
    pub qkv_bc: &'a Tensor,
    /// Gate of the output [B,H,V], or [B,H·V].
    pub z_bhv: &'a Tensor,
    /// [B,H], see [`super::delta_gate`].
    pub a_bh: &'a Tensor,
    /// [B,H]
    pub b_bh: &'a Tensor,
    /// Filter [C,1,4].
    pub conv_w: &'a Tensor,
    /// [H] f32
    pub a_log_h: &'a Tensor,
    /// [H]
    pub dt_bias_h: &'a Tensor,
    /// Of the gated norm [V] f32.
    pub norm_v: &'a Tensor,
    /// Times the normalised queries.
    pub q_scale: f32,
    /// Added to the sums of squares of queries and keys.
    pub l2_eps: f32,
    /// Added to the mean square of the gated norm.
    pub eps: f32,
}

#[derive(Debug, Clone, Copy)]
struct Dims {
    b: usize,
    g: usize,
    h: usize,
    k: usize,
    v: usize,
    c: usize,
}

/// Whether a GPU has a kernel for these key and value dims.
pub fn supports(k: usize, v: usize) -> bool {
    v.is_power_of_two() && (16..=128).contains(&v) && k <= 128 && k <= 8 * (512 / (v / 4))
}

/// `out` [B,H,V] or [B,H·V] assigned, the states taken on by one token.
///
/// # Errors
/// [`Error::Shape`] where shapes disagree, [`Error::DType`] where a state is not f32, [`Error::Unsupported`] on a GPU for other dims than
/// [`supports`] says or projections that are not bf16. Nothing is written then.
pub fn forward(out_bhv: &mut Tensor, states: States, inputs: &Inputs) -> Result<()> {
    const OP: &str = "decode_delta_net::forward";
    let dims = check_dims(OP, out_bhv, &states, inputs)?;
    let others = [
        ("qkv_bc", inputs.qkv_bc),
        ("z_bhv", inputs.z_bhv),
        ("a_bh", inputs.a_bh),
        ("b_bh", inputs.b_bh),
        ("conv_w", inputs.conv_w),
        ("a_log_h", inputs.a_log_h),
        ("dt_bias_h", inputs.dt_bias_h),
        ("norm_v", inputs.norm_v),
    ];
    match check::device(OP, out_bhv, &others)? {
        Device::Cpu => cpu::forward(out_bhv, states, inputs, dims),
        Device::Cuda(cuda) => cuda::forward(cuda, OP, out_bhv, states, inputs, dims)?,
    }
    Ok(())
}

fn check_dims(op: &'static str, out: &Tensor, states: &States, inputs: &Inputs) -> Result<Dims> {
    let [b, c] = check::dims(op, "qkv_bc", inputs.qkv_bc, "[B,C]")?;
    let [h] = check::dims(op, "a_log_h", inputs.a_log_h, "[H]")?;
    let [v] = check::dims(op, "norm_v", inputs.norm_v, "[V]")?;
    let n_states = [
        states.state_hkv.len(),
        states.conv_3c.len(),
        states.next_conv_3c.len(),
    ];
    for n in n_states {
        check::len(op, "states", n, b)?;
    }
    let k = match states.state_hkv.first() {
        Some(state) => check::dims::<3>(op, "state_hkv", state, "[H,K,V]")?[1],
        None => 0,
    };
    let g = c.saturating_sub(h * v) / (2 * k).max(1);
    if 2 * g * k + h * v != c || g == 0 || !h.is_multiple_of(g) {
        let expected = format!("[B,C] with C = 2·G·{k} + {h}·{v} and {h} a multiple of G");
        return Err(check::shape_error(op, "qkv_bc", inputs.qkv_bc, expected));
    }
    check::numel(op, "out_bhv", out, b * h * v)?;
    check::numel(op, "z_bhv", inputs.z_bhv, b * h * v)?;
    check::numel(op, "a_bh", inputs.a_bh, b * h)?;
    check::numel(op, "b_bh", inputs.b_bh, b * h)?;
    check::numel(op, "conv_w", inputs.conv_w, 4 * c)?;
    check::shape(op, "dt_bias_h", inputs.dt_bias_h, &[h])?;
    check::f32(op, "a_log_h", inputs.a_log_h)?;
    check::f32(op, "norm_v", inputs.norm_v)?;
    for state in states.state_hkv.iter() {
        check::shape(op, "state_hkv", state, &[h, k, v])?;
        check::f32(op, "state_hkv", state)?;
        check::device(op, out, &[("state_hkv", state)])?;
    }
    let next = states.next_conv_3c.iter().map(|conv| &**conv);
    for conv in states.conv_3c.iter().copied().chain(next) {
        check::shape(op, "conv_3c", conv, &[3, c])?;
        check::f32(op, "conv_3c", conv)?;
        check::device(op, out, &[("conv_3c", conv)])?;
    }
    Ok(Dims { b, g, h, k, v, c })
}

/// The definition, plainly.
mod cpu {
    use super::{Dims, Inputs, States};
    use crate::Tensor;
    use crate::cpu::ViewMut;
    use crate::cpu::math::{sigmoid, silu};

    pub(super) fn forward(out: &mut Tensor, states: States, inputs: &Inputs, dims: Dims) {
        let Dims { b, h, v, c, .. } = dims;
        let [qkv, z] = [inputs.qkv_bc, inputs.z_bhv].map(Tensor::to_f32_vec);
        let mut mixed = vec![0.0; b * h * v];
        for sequence in 0..b {
            let x = &qkv[sequence * c..(sequence + 1) * c];
            let (conv, next) = (
                states.conv_3c[sequence].f32s(),
                states.next_conv_3c[sequence].f32s_mut(),
            );
            let channels = convolve(next, conv, x, inputs.conv_w);
            for head in 0..h {
                let row = sequence * h + head;
                let state = states.state_hkv[sequence].f32s_mut();
                let y = step(state, &channels, row, head, inputs, dims);
                let mean = y.iter().map(|y| y * y).sum::<f32>() / v as f32;
                let factor = 1.0 / (mean + inputs.eps).sqrt();
                let norm = inputs.norm_v.f32s();
                for (i, y) in y.iter().enumerate() {
                    mixed[row * v + i] = y * factor * norm[i] * silu(z[row * v + i]);
                }
            }
        }
        ViewMut::of(out).store(&mixed);
    }

    /// silu(conv) [C], and the inputs that the next token needs.
    fn convolve(next: &mut [f32], conv: &[f32], x: &[f32], w: &Tensor) -> Vec<f32> {
        let (c, w) = (x.len(), w.to_f32_vec());
        next[..2 * c].copy_from_slice(&conv[c..]);
        next[2 * c..].copy_from_slice(x);
        let taps = |i: usize| &w[4 * i..4 * i + 4];
        let sum = |i: usize| {
            let past: f32 = (0..3).map(|t| taps(i)[t] * conv[t * c + i]).sum();
            silu(past + taps(i)[3] * x[i])
        };
        (0..c).map(sum).collect()
    }

    /// One head: its state [H,K,V] taken on, its output [V] before the norm.
    fn step(
        state: &mut [f32],
        channels: &[f32],
        row: usize,
        head: usize,
        inputs: &Inputs,
        Dims { g, h, k, v, .. }: Dims,
    ) -> Vec<f32> {
        let key_head = head / (h / g);
        let normed = |first: usize, scale: f32| -> Vec<f32> {
            let x = &channels[first..first + k];
            let square: f32 = x.iter().map(|x| x * x).sum();
            let factor = scale / (square + inputs.l2_eps).sqrt();
            x.iter().map(|x| x * factor).collect()
        };
        let query = normed(key_head * k, inputs.q_scale);
        let key = normed((g + key_head) * k, 1.0);
        let value = &channels[2 * g * k + head * v..][..v];
        let [a, b, bias] = [inputs.a_bh, inputs.b_bh, inputs.dt_bias_h].map(Tensor::to_f32_vec);
        let x = a[row] + bias[head];
        let softplus = x.max(0.0) + (-x.abs()).exp().ln_1p();
        let decay = (-inputs.a_log_h.f32s()[head].exp() * softplus).exp();
        let beta = sigmoid(b[row]);

        let state = &mut state[head * k * v..(head + 1) * k * v];
        state.iter_mut().for_each(|s| *s *= decay);
        let read = |state: &[f32], by: &[f32], i: usize| -> f32 {
            (0..k).map(|row| by[row] * state[row * v + i]).sum()
        };
        let delta: Vec<f32> = (0..v)
            .map(|i| beta * (value[i] - read(state, &key, i)))
            .collect();
        for (row, key) in state.chunks_exact_mut(v).zip(&key) {
            for (s, delta) in row.iter_mut().zip(&delta) {
                *s += key * delta;
            }
        }
        (0..v).map(|i| read(state, &query, i)).collect()
    }
}

mod cuda {
    use super::{Dims, Inputs, States, supports};
    use crate::cuda::sources::DECODE_DELTA_NET;
    use crate::cuda::{Args, Cuda, Grid};
    use crate::{DType, Error, Result, Tensor};

    const THREADS: u32 = 512;

    pub(super) fn forward(
        cuda: Cuda,
        op: &'static str,
        out: &mut Tensor,
        states: States,
        inputs: &Inputs,
        dims: Dims,
    ) -> Result<()> {
        let Dims { b, g, h, k, v, .. } = dims;
        let projections = [
            &*out,
            inputs.qkv_bc,
            inputs.z_bhv,
            inputs.a_bh,
            inputs.b_bh,
            inputs.conv_w,
            inputs.dt_bias_h,
        ];
        if !supports(k, v) || projections.iter().any(|x| x.dtype() != DType::Bf16) {
            return Err(Error::Unsupported {
                op,
                what: format!("{k} key dims, {v} value dims, {}", inputs.qkv_bc.dtype()),
            });
        }
        let [state, conv, next] = states.addresses;
        let are_there = state.are_of(states.state_hkv.iter().map(|state| &**state))
            && conv.are_of(states.conv_3c.iter().copied())
            && next.are_of(states.next_conv_3c.iter().map(|next| &**next));
        assert!(are_there, "a table with the addresses of other states");
        let args = Args::new()
            .tensor_mut(out)
            .pointer(state.pointer)
            .pointer(conv.pointer)
            .pointer(next.pointer)
            .tensor(inputs.qkv_bc)
            .tensor(inputs.z_bhv)
            .tensor(inputs.a_bh)
            .tensor(inputs.b_bh)
            .tensor(inputs.conv_w)
            .tensor(inputs.a_log_h)
            .tensor(inputs.dt_bias_h)
            .tensor(inputs.norm_v)
            .u32(h)
            .u32(g)
            .u32(k)
            .u32(v)
            .f32(inputs.q_scale)
            .f32(inputs.l2_eps)
            .f32(inputs.eps);
        let grid = Grid {
            blocks: [h as u32, b as u32, 1],
            threads: THREADS,
            shared_bytes: 0,
        };
        cuda.launch_early(&DECODE_DELTA_NET, "decode_delta_net", grid, args)
    }
}

pub(crate) mod examples {
    use super::{Inputs, States};
    use crate::DType::{Bf16, F32};
    use crate::Tensor;
    use crate::cuda::StepTable;
    use crate::example::Example;

    pub(crate) fn compared() -> Vec<Example> {
        [
            (1, [16, 32, 128, 128]),
            (3, [2, 2, 128, 128]),
            (2, [2, 4, 32, 32]),
            (5, [1, 3, 64, 32]),
            (2, [2, 2, 40, 64]),
        ]
        .into_iter()
        .map(|(b, dims)| example(b, dims))
        .collect()
    }

    fn example(b: usize, [g, h, k, v]: [usize; 4]) -> Example {
        let c = 2 * g * k + h * v;
        let shape = format!("b{b}_g{g}_h{h}_k{k}_v{v}");
        let mut example = Example::new("decode_delta_net/forward", shape);
        example = example.out("out", &[b, h, v], Bf16);
        for _ in 0..b {
            example = example.updated("state", &[h, k, v], F32);
        }
        for _ in 0..b {
            example = example.out("next_conv", &[3, c], F32);
        }
        for _ in 0..b {
            example = example.input("conv", &[3, c], F32);
        }
        example
            .input("qkv", &[b, c], Bf16)
            .input("z", &[b, h, v], Bf16)
            .input("a", &[b, h], Bf16)
            .input("b", &[b, h], Bf16)
            .input("w", &[c, 1, 4], Bf16)
            .input_in("a_log", &[h], F32, [-2.0, 1.0])
            .input("dt_bias", &[h], Bf16)
            .input_in("norm", &[v], F32, [0.5, 1.5])
            .run_all(move |outs, ins| {
                let [out, rest @ ..] = outs else {
                    unreachable!("an output and states")
                };
                let (states, next) = rest.split_at_mut(b);
                let (conv, ins) = ins.split_at(b);
                let [qkv, z, a, beta, w, a_log, dt_bias, norm] = ins else {
                    unreachable!("eight inputs behind the states")
                };
                let mut table = StepTable::new(out.device(), 6 * b)?;
                let slots = [
                    table.push_tensors(&*states),
                    table.push_tensors(conv),
                    table.push_tensors(&*next),
                ];
                table.upload()?;
                let states = States {
                    state_hkv: &mut states.iter_mut().collect::<Vec<_>>(),
                    conv_3c: &conv.iter().collect::<Vec<&Tensor>>(),
                    next_conv_3c: &mut next.iter_mut().collect::<Vec<_>>(),
                    addresses: slots.map(|slot| table.at(slot)),
                };
                let inputs = Inputs {
                    qkv_bc: qkv,
                    z_bhv: z,
                    a_bh: a,
                    b_bh: beta,
                    conv_w: w,
                    a_log_h: a_log,
                    dt_bias_h: dt_bias,
                    norm_v: norm,
                    q_scale: 1.0 / (k as f32).sqrt(),
                    l2_eps: 1e-6,
                    eps: 1e-6,
                };
                super::forward(out, states, &inputs)
            })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::DType;
    use crate::cuda::StepTable;
    use crate::ops::gated_delta_rule::Inputs as RuleInputs;
    use crate::ops::testing::{Random, assert_close, f64s};
    use crate::ops::{causal_conv1d, delta_gate, gated_delta_step, gated_rms_norm, l2_norm, split};

    const B: usize = 1;
    const G: usize = 2;
    const H: usize = 4;
    const K: usize = 8;
    const V: usize = 16;
    const C: usize = 2 * G * K + H * V;

    /// What the ops of a step one by one give: (out, state, convolution's inputs).
    fn apart(inputs: &Inputs, state: &Tensor, conv: &Tensor) -> (Tensor, Tensor, Tensor) {
        let make = |shape: &[usize]| Tensor::poison(shape, DType::F32);
        let (mut state, mut conv) = (state.clone(), conv.clone());
        let mut channels = make(&[B, C]);
        causal_conv1d::forward_with_state(&mut channels, &mut conv, inputs.qkv_bc, inputs.conv_w)
            .unwrap();
        let (mut raw_q, mut raw_k, mut v) = (make(&[B, G, K]), make(&[B, G, K]), make(&[B, H, V]));
        split::qkv(&mut raw_q, &mut raw_k, &mut v, &channels).unwrap();
        let (mut q, mut k, mut rstd) = (make(&[B, G, K]), make(&[B, G, K]), make(&[B, G]));
        l2_norm::forward(&mut q, &mut rstd, &raw_q, inputs.q_scale, inputs.l2_eps).unwrap();
        l2_norm::forward(&mut k, &mut rstd, &raw_k, 1.0, inputs.l2_eps).unwrap();
        let (mut g, mut beta) = (make(&[B, H]), make(&[B, H]));
        let gates = delta_gate::Inputs {
            a_th: inputs.a_bh,
            b_th: inputs.b_bh,
            a_log_h: inputs.a_log_h,
            dt_bias_h: inputs.dt_bias_h,
        };
        delta_gate::forward(&mut g, &mut beta, &gates).unwrap();
        let rule = RuleInputs {
            q_tgk: &q,
            k_tgk: &k,
            v_thv: &v,
            g_th: &g,
            beta_th: &beta,
        };
        let (mut mixed, mut out) = (make(&[B, H, V]), make(&[B, H, V]));
        gated_delta_step::forward(&mut mixed, &mut [&mut state], &rule).unwrap();
        let gated = gated_rms_norm::Inputs {
            x_thv: &mixed,
            z_thv: inputs.z_bhv,
            w_v: inputs.norm_v,
        };
        let mut rstd = make(&[B, H]);
        gated_rms_norm::forward(&mut out, &mut rstd, &gated, inputs.eps).unwrap();
        (out, state, conv)
    }

    #[test]
    fn one_launch_agrees_with_the_ops_one_by_one() {
        let mut random = Random::new(3);
        let mut draw = |shape: &[usize]| random.tensor(shape, -1.0, 1.0);
        let (mut state, conv, mut next) = (
            draw(&[H, K, V]),
            draw(&[3, C]),
            Tensor::poison(&[3, C], DType::F32),
        );
        let (qkv, z) = (draw(&[B, C]), draw(&[B, H, V]));
        let (a, b, w) = (draw(&[B, H]), draw(&[B, H]), draw(&[C, 1, 4]));
        let (a_log, dt_bias, norm) = (draw(&[H]), draw(&[H]), draw(&[V]));
        let inputs = Inputs {
            qkv_bc: &qkv,
            z_bhv: &z,
            a_bh: &a,
            b_bh: &b,
            conv_w: &w,
            a_log_h: &a_log,
            dt_bias_h: &dt_bias,
            norm_v: &norm,
            q_scale: 0.3,
            l2_eps: 1e-6,
            eps: 1e-6,
        };
        let want = apart(&inputs, &state, &conv);
        let mut table = StepTable::new(Device::Cpu, 2).unwrap();
        let slot = table.push_tensors([&conv]);
        let mut out = Tensor::poison(&[B, H, V], DType::F32);
        let states = States {
            state_hkv: &mut [&mut state],
            conv_3c: &[&conv],
            next_conv_3c: &mut [&mut next],
            addresses: [table.at(slot); 3],
        };
        forward(&mut out, states, &inputs).unwrap();
        assert_close("out", &out, &f64s(&want.0), 1e-5);
        assert_close("state", &state, &f64s(&want.1), 1e-5);
        assert_eq!(next, want.2);
    }
}
