//! Attention of one token of each of several sequences, from the projections to the input of the last one.
//!
//! norms of queries and keys ([`super::rms_norm`]) - rotation ([`super::rope`]) - the new key and value go into the cache - attention over all
//! positions so far ([`super::attention`]) - output gate ([`super::sigmoid_gate`]). How a sequence's positions are shared among blocks of a
//! GPU depends on its length alone, so its result does not depend on the sequences beside it.

// B sequences (one token each), H query heads, G key:value heads (H a multiple of G), N head dim, S rows of a cache, P parts,
// half = R/2 turned pairs of dims.

use super::check;
use crate::cuda::Placed;
use crate::{Device, Result, Tensor};

/// Positions that a GPU's block looks at at a time, and blocks that share a sequence, as decode_attention.cu has them.
const STRETCH: usize = 64;
const MOST_PARTS: usize = 32;
/// Stretches of a part, at the least.
const LEAST_STRETCHES: usize = 2;

/// Parts that a sequence of `length` positions is cut into.
pub fn n_parts(length: usize) -> usize {
    let n_stretches = length.div_ceil(STRETCH).max(1);
    n_stretches.div_ceil(n_stretches.div_ceil(MOST_PARTS).max(LEAST_STRETCHES))
}

/// Keys and values of the sequences, one tensor each, with their addresses in a table of the step.
#[derive(Debug)]
pub struct Caches<'a, 't> {
    /// Rotated keys [S,G,N], S above the position; the row of the position is assigned.
    pub k_sgn: &'a mut [&'t mut Tensor],
    /// [S,G,N]
    pub v_sgn: &'a mut [&'t mut Tensor],
    /// Addresses of these two, in this order.
    pub addresses: [Placed<'a>; 2],
}

/// Projections and weights.
#[derive(Debug, Clone, Copy)]
pub struct Inputs<'a> {
    /// For each head N of query, then N of gate [B,H,2N], or [B,H·2N].
    pub qg_bh2n: &'a Tensor,
    /// [B,G,N]
    pub k_bgn: &'a Tensor,
    /// [B,G,N]
    pub v_bgn: &'a Tensor,
    /// [N], scales by 1 + w
    pub q_norm_n: &'a Tensor,
    /// [N], scales by 1 + w
    pub k_norm_n: &'a Tensor,
    /// Of [`turns`].
    pub turns_bp2: &'a Tensor,
    /// Tokens that each sequence has before this one.
    pub positions_b: Placed<'a>,
    /// Times the scores.
    pub scale: f32,
    /// Added to mean squares.
    pub eps: f32,
}

#[derive(Debug, Clone, Copy)]
struct Dims {
    b: usize,
    h: usize,
    g: usize,
    n: usize,
    half: usize,
}

/// Whether a GPU has a kernel for heads like these: query heads a key:value head, head dim, dims that turn.
pub fn supports(repeat: usize, n: usize) -> bool {
    [1, 2, 4, 6, 8].contains(&repeat) && n <= 256 && n.is_multiple_of(32)
}

/// Cosine and sine of each position times each frequency: turns_bp2 [B,half,2] f32 assigned; inv_freq [half] f32 of
/// [`super::rope::Rotation`].
///
/// # Errors
/// [`Error::Shape`] where shapes disagree, [`Error::DType`] where one is not f32.
pub fn turns(turns_bp2: &mut Tensor, inv_freq: &Tensor, positions_b: Placed) -> Result<()> {
    const OP: &str = "decode_attention::turns";
    let [half] = check::dims(OP, "inv_freq", inv_freq, "[half]")?;
    let b = positions_b.words.len();
    check::shape(OP, "turns_bp2", turns_bp2, &[b, half, 2])?;
    check::f32(OP, "turns_bp2", turns_bp2)?;
    check::f32(OP, "inv_freq", inv_freq)?;
    match check::device(OP, turns_bp2, &[("inv_freq", inv_freq)])? {
        Device::Cpu => cpu::turns(turns_bp2, inv_freq, positions_b.words),
        Device::Cuda(cuda) => cuda::turns(cuda, turns_bp2, inv_freq, positions_b)?,
    }
    Ok(())
}

/// `out` [B,H,N] or [B,H·N] assigned, and the caches' rows of the positions. `parts` [B,H,P,N + 2] f32 is room for a GPU's blocks, P at
/// least [`n_parts`] of every sequence.
///
/// # Errors
/// [`Error::Shape`] where shapes disagree or a cache has no row for its position, [`Error::Unsupported`] on a GPU for other heads than
/// [`supports`] says or anything that is not bf16. Nothing is written then.
pub fn forward(
    out_bhn: &mut Tensor,
    parts: &mut Tensor,
    caches: Caches,
    inputs: &Inputs,
) -> Result<()> {
    const OP: &str = "decode_attention::forward";
    let dims = check_dims(OP, out_bhn, &caches, inputs)?;
    let [_, _, p, _] = check::dims(OP, "parts", parts, "[B,H,P,N + 2]")?;
    let lengths = inputs.positions_b.words.iter().map(|at| *at as usize + 1);
    let p = p.max(lengths.map(n_parts).max().unwrap_or(1));
    check::shape(OP, "parts", parts, &[dims.b, dims.h, p, dims.n + 2])?;
    check::f32(OP, "parts", parts)?;
    let others = [
        ("parts", &*parts),
        ("qg_bh2n", inputs.qg_bh2n),
        ("k_bgn", inputs.k_bgn),
        ("v_bgn", inputs.v_bgn),
        ("q_norm_n", inputs.q_norm_n),
        ("k_norm_n", inputs.k_norm_n),
        ("turns_bp2", inputs.turns_bp2),
    ];
    match check::device(OP, out_bhn, &others)? {
        Device::Cpu => cpu::forward(out_bhn, caches, inputs, dims),
        Device::Cuda(cuda) => cuda::forward(cuda, OP, out_bhn, parts, caches, inputs, dims)?,
    }
    Ok(())
}

fn check_dims(op: &'static str, out: &Tensor, caches: &Caches, inputs: &Inputs) -> Result<Dims> {
    let [b, half, _] = check::dims(op, "turns_bp2", inputs.turns_bp2, "[B,half,2]")?;
    let [n] = check::dims(op, "q_norm_n", inputs.q_norm_n, "[N]")?;
    check::shape(op, "k_norm_n", inputs.k_norm_n, &[n])?;
    check::f32(op, "turns_bp2", inputs.turns_bp2)?;
    let h = out.numel() / (b * n).max(1);
    let g = inputs.k_bgn.numel() / (b * n).max(1);
    if g == 0 || !h.is_multiple_of(g) || 2 * half > n {
        let expected = format!("[{b},H,{n}] with H a multiple of {g} and 2·{half} dims that turn");
        return Err(check::shape_error(op, "out_bhn", out, expected));
    }
    check::numel(op, "out_bhn", out, b * h * n)?;
    check::numel(op, "qg_bh2n", inputs.qg_bh2n, 2 * b * h * n)?;
    check::numel(op, "k_bgn", inputs.k_bgn, b * g * n)?;
    check::numel(op, "v_bgn", inputs.v_bgn, b * g * n)?;
    check::len(op, "positions_b", inputs.positions_b.words.len(), b)?;
    for (arg, list) in [("k_sgn", &caches.k_sgn), ("v_sgn", &caches.v_sgn)] {
        check::len(op, arg, list.len(), b)?;
        for (cache, position) in list.iter().zip(inputs.positions_b.words) {
            let [s, _, _] = check::dims(op, arg, cache, "[S,G,N]")?;
            let least = *position as usize + 1;
            if s < least || cache.shape() != [s, g, n] {
                let expected = format!("[S,{g},{n}] with S of {least} or more");
                return Err(check::shape_error(op, arg, cache, expected));
            }
            check::device(op, out, &[(arg, cache)])?;
        }
    }
    Ok(Dims { b, h, g, n, half })
}

/// The definition, plainly.
mod cpu {
    use super::{Caches, Dims, Inputs};
    use crate::Tensor;
    use crate::cpu::math::sigmoid;
    use crate::cpu::{View, ViewMut};

    pub(super) fn turns(turns: &mut Tensor, inv_freq: &Tensor, positions: &[u32]) {
        let half = inv_freq.numel();
        for (i, turn) in turns.f32s_mut().chunks_exact_mut(2).enumerate() {
            let angle = positions[i / half] as f32 * inv_freq.f32s()[i % half];
            turn.copy_from_slice(&[angle.cos(), angle.sin()]);
        }
    }

    pub(super) fn forward(out: &mut Tensor, caches: Caches, inputs: &Inputs, dims: Dims) {
        let Dims { b, h, g, n, .. } = dims;
        let [qg, k, v] = [inputs.qg_bh2n, inputs.k_bgn, inputs.v_bgn].map(Tensor::to_f32_vec);
        let row = g * n;
        let mut mixed = Vec::with_capacity(b * h * n);
        for sequence in 0..b {
            let position = inputs.positions_b.words[sequence] as usize;
            // 1. the new key and value
            let key: Vec<f32> = (0..g)
                .map(|head| (sequence * g + head) * n)
                .flat_map(|at| prepare(&k[at..at + n], inputs.k_norm_n, sequence, inputs, dims))
                .collect();
            let at = position * row..(position + 1) * row;
            let new_value = &v[sequence * row..(sequence + 1) * row];
            ViewMut::of(caches.k_sgn[sequence])
                .slice(at.clone())
                .store(&key);
            ViewMut::of(caches.v_sgn[sequence])
                .slice(at)
                .store(new_value);
            let read = |cache: &Tensor| {
                let mut rows = vec![0.0; (position + 1) * row];
                View::of(cache).slice(0..rows.len()).read_into(&mut rows);
                rows
            };
            let (keys, values) = (read(caches.k_sgn[sequence]), read(caches.v_sgn[sequence]));
            for head in 0..h {
                // 2. attend
                let first = (sequence * h + head) * 2 * n;
                let query = prepare(
                    &qg[first..first + n],
                    inputs.q_norm_n,
                    sequence,
                    inputs,
                    dims,
                );
                let heads = head / (h / g) * n;
                let weighted = attend(&query, &keys[heads..], &values[heads..], row, inputs.scale);
                // 3. gate
                let gate = &qg[first + n..first + 2 * n];
                mixed.extend(
                    weighted
                        .iter()
                        .zip(gate)
                        .map(|(x, gate)| x * sigmoid(*gate)),
                );
            }
        }
        ViewMut::of(out).store(&mixed);
    }

    /// A head normalised and turned.
    fn prepare(
        x: &[f32],
        w: &Tensor,
        sequence: usize,
        inputs: &Inputs,
        Dims { n, half, .. }: Dims,
    ) -> Vec<f32> {
        let mean = x.iter().map(|x| x * x).sum::<f32>() / n as f32;
        let factor = 1.0 / (mean + inputs.eps).sqrt();
        let w = w.to_f32_vec();
        let mut y: Vec<f32> = x
            .iter()
            .zip(&w)
            .map(|(x, w)| x * factor * (1.0 + w))
            .collect();
        let turns = &inputs.turns_bp2.f32s()[sequence * half * 2..];
        for i in 0..half {
            let (cos, sin, low, high) = (turns[2 * i], turns[2 * i + 1], y[i], y[i + half]);
            y[i] = low * cos - high * sin;
            y[i + half] = high * cos + low * sin;
        }
        y
    }

    /// softmax(scale · query keysᵀ) values; keys and values begin with the head, `row` apart.
    fn attend(query: &[f32], keys: &[f32], values: &[f32], row: usize, scale: f32) -> Vec<f32> {
        let score = |key: &[f32]| -> f32 { query.iter().zip(key).map(|(q, k)| q * k).sum() };
        let scores: Vec<f32> = keys.chunks(row).map(|key| scale * score(key)).collect();
        let most = scores.iter().fold(f32::NEG_INFINITY, |a, b| a.max(*b));
        let weights: Vec<f32> = scores.iter().map(|score| (score - most).exp()).collect();
        let sum: f32 = weights.iter().sum();
        let mut out = vec![0.0; query.len()];
        for (value, weight) in values.chunks(row).zip(&weights) {
            for (out, value) in out.iter_mut().zip(value) {
                *out += weight / sum * value;
            }
        }
        out
    }
}

mod cuda {
    use super::{Caches, Dims, Inputs, supports};
    use crate::cuda::sources::DECODE_ATTENTION;
    use crate::cuda::{Args, Cuda, Grid, Placed};
    use crate::{DType, Error, Result, Tensor};

    const THREADS: u32 = 256;

    pub(super) fn turns(
        cuda: Cuda,
        turns: &mut Tensor,
        inv_freq: &Tensor,
        positions: Placed,
    ) -> Result<()> {
        let args = Args::new()
            .tensor_mut(turns)
            .tensor(inv_freq)
            .pointer(positions.pointer)
            .u32(inv_freq.numel());
        let grid = Grid::line(positions.words.len(), 64);
        cuda.launch_early(&DECODE_ATTENTION, "decode_attention_turns", grid, args)
    }

    pub(super) fn forward(
        cuda: Cuda,
        op: &'static str,
        out: &mut Tensor,
        parts: &mut Tensor,
        caches: Caches,
        inputs: &Inputs,
        dims: Dims,
    ) -> Result<()> {
        let Dims { b, h, g, n, half } = dims;
        check_supported(op, out, &caches, inputs, dims)?;
        let kernel = match h / g {
            1 => "decode_attention_part_1",
            2 => "decode_attention_part_2",
            4 => "decode_attention_part_4",
            6 => "decode_attention_part_6",
            _ => "decode_attention_part_8",
        };
        let [keys, values] = caches.addresses;
        let are_there = keys.are_of(caches.k_sgn.iter().map(|cache| &**cache))
            && values.are_of(caches.v_sgn.iter().map(|cache| &**cache));
        assert!(are_there, "a table with the addresses of other caches");
        let n_parts = parts.shape()[2];
        let args = Args::new()
            .tensor_mut(parts)
            .pointer(keys.pointer)
            .pointer(values.pointer)
            .tensor(inputs.qg_bh2n)
            .tensor(inputs.k_bgn)
            .tensor(inputs.v_bgn)
            .tensor(inputs.q_norm_n)
            .tensor(inputs.k_norm_n)
            .tensor(inputs.turns_bp2)
            .pointer(inputs.positions_b.pointer)
            .u32(g)
            .u32(n)
            .u32(half)
            // The kernel's exponentials are powers of two.
            .f32(inputs.scale * std::f32::consts::LOG2_E)
            .f32(inputs.eps);
        let grid = Grid {
            blocks: [n_parts as u32, g as u32, b as u32],
            threads: THREADS,
            shared_bytes: 0,
        };
        cuda.launch_early(&DECODE_ATTENTION, kernel, grid, args)?;
        let args = Args::new()
            .tensor_mut(out)
            .tensor(parts)
            .tensor(inputs.qg_bh2n)
            .pointer(inputs.positions_b.pointer)
            .u32(n_parts)
            .u32(h)
            .u32(n);
        let grid = Grid {
            blocks: [h as u32, b as u32, 1],
            threads: n as u32,
            shared_bytes: 0,
        };
        cuda.launch_early(&DECODE_ATTENTION, "decode_attention_join", grid, args)
    }

    fn check_supported(
        op: &'static str,
        out: &Tensor,
        caches: &Caches,
        inputs: &Inputs,
        Dims { h, g, n, .. }: Dims,
    ) -> Result<()> {
        let projections = [
            out,
            inputs.qg_bh2n,
            inputs.k_bgn,
            inputs.v_bgn,
            inputs.q_norm_n,
            inputs.k_norm_n,
        ];
        let all = caches.k_sgn.iter().chain(caches.v_sgn.iter());
        let mut all = all.map(|cache| &**cache).chain(projections);
        match supports(h / g, n) && all.all(|x| x.dtype() == DType::Bf16) {
            true => Ok(()),
            false => Err(Error::Unsupported {
                op,
                what: format!("{h} heads over {g} of {n} dims, {}", out.dtype()),
            }),
        }
    }
}

pub(crate) mod examples {
    use super::{Caches, Inputs};
    use crate::DType::{Bf16, F32};
    use crate::Tensor;
    use crate::cuda::StepTable;
    use crate::example::{Example, Tolerance};
    use crate::ops::rope::Rotation;

    /// Heads [H,G,N], dims that turn, positions.
    type Case = ([usize; 3], usize, &'static [u32]);

    const CASES: [Case; 6] = [
        ([16, 4, 256], 64, &[512]),
        ([16, 4, 256], 64, &[0, 63, 64, 2500]),
        ([8, 2, 256], 64, &[127, 5, 300]),
        ([4, 2, 32], 16, &[70, 4]),
        ([4, 1, 64], 16, &[9, 200]),
        ([3, 3, 96], 20, &[66]),
    ];

    pub(crate) fn compared() -> Vec<Example> {
        CASES.into_iter().map(example).collect()
    }

    fn example((heads, rotary_dims, positions): Case) -> Example {
        let [h, g, n] = heads;
        let b = positions.len();
        let shape = format!("h{h}_g{g}_n{n}_at{positions:?}");
        let mut example = Example::new("decode_attention/forward", shape);
        example = example.out("out", &[b, h, n], Bf16);
        for _ in ["k", "v"] {
            for position in positions {
                let rows = *position as usize + 3;
                example = example.updated("cache", &[rows, g, n], Bf16);
            }
        }
        example
            .input("qg", &[b, h, 2 * n], Bf16)
            .input("k", &[b, g, n], Bf16)
            .input("v", &[b, g, n], Bf16)
            .input("q_norm", &[n], Bf16)
            .input("k_norm", &[n], Bf16)
            // Queries and weights are rounded to bf16 for the products.
            .tolerance(Tolerance {
                f32: 1e-5,
                bf16: 1e-2,
            })
            .run_all(move |outs, ins| {
                let [out, caches @ ..] = outs else {
                    unreachable!("an output and caches")
                };
                let (keys, values) = caches.split_at_mut(b);
                let [qg, k, v, q_norm, k_norm] = ins else {
                    unreachable!("five inputs")
                };
                let device = out.device();
                let inv_freq = Rotation::new(1e7, rotary_dims).inv_freq;
                let half = inv_freq.len();
                let inv_freq = Tensor::from_f32(&[half], inv_freq).to_device(device)?;
                let mut turns = Tensor::zeros_on(&[b, half, 2], F32, device)?;
                let lengths = positions.iter().map(|at| *at as usize + 1);
                let p = lengths.map(super::n_parts).max().unwrap_or(1);
                let mut parts = Tensor::zeros_on(&[b, h, p, n + 2], F32, device)?;
                let mut table = StepTable::new(device, 6 * b)?;
                let slots = [table.push_tensors(&*keys), table.push_tensors(&*values)];
                let positions_b = table.push(positions.iter().copied());
                table.upload()?;
                let positions_b = table.at(positions_b);
                super::turns(&mut turns, &inv_freq, positions_b)?;
                let caches = Caches {
                    k_sgn: &mut keys.iter_mut().collect::<Vec<_>>(),
                    v_sgn: &mut values.iter_mut().collect::<Vec<_>>(),
                    addresses: slots.map(|slot| table.at(slot)),
                };
                let inputs = Inputs {
                    qg_bh2n: qg,
                    k_bgn: k,
                    v_bgn: v,
                    q_norm_n: q_norm,
                    k_norm_n: k_norm,
                    turns_bp2: &turns,
                    positions_b,
                    scale: 1.0 / (n as f32).sqrt(),
                    eps: 1e-6,
                };
                super::forward(out, &mut parts, caches, &inputs)
            })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::DType;
    use crate::cuda::StepTable;
    use crate::ops::testing::{Random, assert_close, f64s};
    use crate::ops::{attention, copy, rms_norm, rope, sigmoid_gate, split};

    #[test]
    fn one_step_agrees_with_the_ops_one_by_one() {
        let [h, g, n, rotary, position] = [4, 2, 16, 8, 5usize];
        let mut random = Random::new(8);
        let mut draw = |shape: &[usize]| random.tensor(shape, -1.0, 1.0);
        let (mut keys, mut values) = (draw(&[8, g, n]), draw(&[8, g, n]));
        let (qg, k, v) = (draw(&[1, h, 2 * n]), draw(&[1, g, n]), draw(&[1, g, n]));
        let (q_norm, k_norm) = (draw(&[n]), draw(&[n]));
        let rotation = rope::Rotation::new(1e4, rotary);

        // The ops that the layers of a prefill call.
        let make = |shape: &[usize]| Tensor::poison(shape, DType::F32);
        let (mut raw, mut gate, mut q, mut key) = (
            make(&[1, h, n]),
            make(&[1, h, n]),
            make(&[1, h, n]),
            make(&[1, g, n]),
        );
        split::query_gate(&mut raw, &mut gate, &qg).unwrap();
        rms_norm::forward(&mut q, &mut make(&[1, h]), &raw, &q_norm, 1e-6).unwrap();
        rms_norm::forward(&mut key, &mut make(&[1, g]), &k, &k_norm, 1e-6).unwrap();
        rope::forward(&mut q, &rotation, &[position as u32]).unwrap();
        rope::forward(&mut key, &rotation, &[position as u32]).unwrap();
        let (mut want_keys, mut want_values) = (keys.clone(), values.clone());
        copy::forward(&mut want_keys, position * g * n, &key, 0, g * n).unwrap();
        copy::forward(&mut want_values, position * g * n, &v, 0, g * n).unwrap();
        let (mut mixed, mut want) = (make(&[1, h, n]), make(&[1, h, n]));
        attention::forward_cached(&mut mixed, &q, &want_keys, &want_values, position, 0.25)
            .unwrap();
        sigmoid_gate::forward(&mut want, &mixed, &gate).unwrap();

        let mut table = StepTable::new(Device::Cpu, 8).unwrap();
        let slots = [table.push_tensors([&keys]), table.push_tensors([&values])];
        let positions = table.push([position as u32]);
        let inv_freq = Tensor::from_f32(&[rotary / 2], rotation.inv_freq.clone());
        let mut turned = make(&[1, rotary / 2, 2]);
        turns(&mut turned, &inv_freq, table.at(positions)).unwrap();
        let inputs = Inputs {
            qg_bh2n: &qg,
            k_bgn: &k,
            v_bgn: &v,
            q_norm_n: &q_norm,
            k_norm_n: &k_norm,
            turns_bp2: &turned,
            positions_b: table.at(positions),
            scale: 0.25,
            eps: 1e-6,
        };
        let caches = Caches {
            k_sgn: &mut [&mut keys],
            v_sgn: &mut [&mut values],
            addresses: slots.map(|slot| table.at(slot)),
        };
        let mut out = make(&[1, h, n]);
        forward(&mut out, &mut make(&[1, h, 1, n + 2]), caches, &inputs).unwrap();
        assert_close("out", &out, &f64s(&want), 1e-5);
        assert_close("keys", &keys, &f64s(&want_keys), 1e-6);
        assert_eq!(values, want_values);
    }
}
