//! The pass against the primitives that it joins, and gradients against f64.

use super::*;
use crate::ops::testing::{
    BF16_REL, assert_close, bits_from_row, dot, f64s, gradient, offsets, plus, poison_like, pool,
    rows, tensor,
};
use crate::ops::{l2_norm, split};
use crate::{DType, Error};

const EPS: f32 = 1e-6;
const SCALE: f32 = 0.5;
/// Borders inside a task, at its end, documents shorter than the filter, one longer than a task.
const LENGTHS: [usize; 11] = [1, 2, 0, 3, 122, 1, 63, 64, 65, 130, 4];
/// G, K, H, V; the last with more channels of values than a tile has. Heads of one dim have hardly a gradient: 0 but for eps.
const HEADS: [[usize; 4]; 3] = [[1, 8, 1, 1], [2, 12, 3, 10], [2, 96, 3, 80]];
/// Relative error (of norms) of f32 sums.
const F32_REL: f64 = 1e-6;

struct Case {
    dims: Dims,
    qkv: Tensor,
    w: Tensor,
    /// Of q, k and v.
    d_outs: [Tensor; 3],
    cu_seqlens: Vec<u32>,
}

impl Case {
    fn new(lengths: &[usize], [g, k, h, v]: [usize; 4], dtype: DType) -> Self {
        let t = lengths.iter().sum();
        let dims = Dims { t, g, k, h, v };
        let c = 2 * g * k + h * v;
        let heads = [3, 4].map(|seed| tensor(&[t, g, k], seed, dtype));
        let [d_q, d_k] = heads;
        Case {
            dims,
            qkv: tensor(&[t, c], 1, dtype),
            w: tensor(&[c, 1, 4], 2, dtype),
            d_outs: [d_q, d_k, tensor(&[t, h, v], 5, dtype)],
            cu_seqlens: offsets(lengths),
        }
    }

    /// q, k, v and the two rstd.
    fn forward(&self) -> Result<[Tensor; 5]> {
        let dtype = self.d_outs[0].dtype();
        let [q, k, v] = self.d_outs.each_ref().map(|like| poison_like(like, dtype));
        let shape = [self.dims.t, self.dims.g];
        let rstds = [0, 1].map(|_| Tensor::poison(&shape, DType::F32));
        let [q_rstd, k_rstd] = rstds;
        let mut outs = [q, k, v, q_rstd, k_rstd];
        let [q, k, v, q_rstd, k_rstd] = &mut outs;
        let outputs = Outputs {
            q_tgk: q,
            k_tgk: k,
            v_thv: v,
            q_rstd_tg: q_rstd,
            k_rstd_tg: k_rstd,
        };
        forward(outputs, &self.inputs(), EPS)?;
        Ok(outs)
    }

    fn inputs(&self) -> Inputs<'_> {
        Inputs {
            qkv_tc: &self.qkv,
            w: &self.w,
            cu_seqlens: &self.cu_seqlens,
            q_scale: SCALE,
        }
    }

    /// d_qkv, after adding to `d_w`.
    fn backward(&self, d_w: Option<&mut Tensor>) -> Tensor {
        let [.., q_rstd, k_rstd] = self.forward().unwrap();
        let mut d_qkv = poison_like(&self.qkv, self.qkv.dtype());
        let [d_q, d_k, d_v] = &self.d_outs;
        let saved = Saved {
            d_q_tgk: d_q,
            d_k_tgk: d_k,
            d_v_thv: d_v,
            q_rstd_tg: &q_rstd,
            k_rstd_tg: &k_rstd,
        };
        backward(&mut d_qkv, d_w, &saved, &self.inputs()).unwrap();
        d_qkv
    }

    /// q, k, v, d_qkv and d_w.
    fn run(&self) -> [Tensor; 5] {
        let [q, k, v, ..] = self.forward().unwrap();
        let mut d_w = Tensor::zeros(self.w.shape(), DType::F32);
        let d_qkv = self.backward(Some(&mut d_w));
        [q, k, v, d_qkv, d_w]
    }

    /// The gradients of q, k and v of each token side by side.
    fn d_out(&self) -> Vec<f64> {
        side_by_side(self.dims.t, self.d_outs.each_ref())
    }
}

fn side_by_side(t: usize, parts: [&Tensor; 3]) -> Vec<f64> {
    let parts = parts.map(f64s);
    (0..t)
        .flat_map(|row| {
            let row_of = |part: &Vec<f64>| {
                let width = part.len() / t;
                part[row * width..][..width].to_vec()
            };
            parts.iter().flat_map(row_of).collect::<Vec<_>>()
        })
        .collect()
}

/// (index in w, index in x) of what the filter multiplies for a token and channel.
fn taps(document_start: usize, t: usize, c: usize, channel: usize) -> Vec<(usize, usize)> {
    (0..4)
        .filter(|j| t + j >= document_start + 3)
        .map(|j| (channel * 4 + j, (t + j - 3) * c + channel))
        .collect()
}

/// Scales of a token's heads of q and k, in their order.
fn head_scales(dims: Dims) -> impl Iterator<Item = f64> {
    (0..2 * dims.g).map(move |head| if head < dims.g { SCALE.into() } else { 1.0 })
}

/// q, k and v of each token side by side.
fn define(case: &Case, x: &[f64], w: &[f64]) -> Vec<f64> {
    let (dims, c) = (case.dims, w.len() / 4);
    let keys = 2 * dims.g * dims.k;
    let mut out = Vec::new();
    for ends in case.cu_seqlens.windows(2) {
        for t in ends[0] as usize..ends[1] as usize {
            let activated = |channel| {
                let seen = taps(ends[0] as usize, t, c, channel);
                let y: f64 = seen
                    .iter()
                    .map(|(w_idx, x_idx)| w[*w_idx] * x[*x_idx])
                    .sum();
                y / (1.0 + (-y).exp())
            };
            let conv: Vec<f64> = (0..c).map(activated).collect();
            for (raw, scale) in conv[..keys].chunks(dims.k).zip(head_scales(dims)) {
                let norm = (dot(raw, raw) + f64::from(EPS)).sqrt();
                out.extend(raw.iter().map(|x| scale * x / norm));
            }
            out.extend(&conv[keys..]);
        }
    }
    out
}

/// d_qkv and d_w, by the derivatives of norm, SiLU and filter.
fn define_backward(case: &Case, x: &[f64], w: &[f64]) -> [Vec<f64>; 2] {
    let (dims, c, d_out) = (case.dims, w.len() / 4, case.d_out());
    let keys = 2 * dims.g * dims.k;
    let (mut d_x, mut d_w) = (vec![0.0; x.len()], vec![0.0; w.len()]);
    for ends in case.cu_seqlens.windows(2) {
        for t in ends[0] as usize..ends[1] as usize {
            let seen: Vec<_> = (0..c)
                .map(|channel| taps(ends[0] as usize, t, c, channel))
                .collect();
            let y: Vec<f64> = seen
                .iter()
                .map(|seen| {
                    seen.iter()
                        .map(|(w_idx, x_idx)| w[*w_idx] * x[*x_idx])
                        .sum()
                })
                .collect();
            let mut d_y = d_out[t * c..][..c].to_vec();
            let conv: Vec<f64> = y.iter().map(|y| y / (1.0 + (-y).exp())).collect();
            let heads = d_y[..keys].chunks_mut(dims.k).zip(conv.chunks(dims.k));
            for ((d, raw), scale) in heads.zip(head_scales(dims)) {
                let r = 1.0 / (dot(raw, raw) + f64::from(EPS)).sqrt();
                let pull = dot(d, raw) * r * r;
                for (d, raw) in d.iter_mut().zip(raw) {
                    *d = scale * r * (*d - raw * pull);
                }
            }
            for ((d_y, y), seen) in d_y.iter().zip(&y).zip(&seen) {
                let s = 1.0 / (1.0 + (-y).exp());
                let d_y = d_y * (s + y * s * (1.0 - s));
                for (w_idx, x_idx) in seen {
                    d_x[*x_idx] += d_y * w[*w_idx];
                    d_w[*w_idx] += d_y * x[*x_idx];
                }
            }
        }
    }
    [d_x, d_w]
}

#[test]
fn definition_agrees_with_finite_differences() {
    let case = Case::new(&[5, 1, 2], [2, 4, 1, 3], DType::F32);
    let (at, d_out) = ([f64s(&case.qkv), f64s(&case.w)], case.d_out());
    let loss = |at: &[Vec<f64>]| dot(&d_out, &define(&case, &at[0], &at[1]));
    for (which, want) in define_backward(&case, &at[0], &at[1]).iter().enumerate() {
        for (slope, want) in gradient(&at, which, loss).iter().zip(want) {
            assert!((slope - want).abs() < 1e-7, "{slope} for {want}");
        }
    }
}

#[test]
fn outputs_and_gradients_agree_with_the_definition() {
    for (dtype, tolerance) in [(DType::F32, F32_REL), (DType::Bf16, BF16_REL)] {
        for heads in HEADS {
            let case = Case::new(&LENGTHS, heads, dtype);
            let (x, w) = (f64s(&case.qkv), f64s(&case.w));
            let [q, k, v, q_rstd, k_rstd] = case.forward().unwrap();
            let got = side_by_side(case.dims.t, [&q, &k, &v]);
            let got = Tensor::from_f32(&[got.len()], got.iter().map(|x| *x as f32).collect());
            assert_close("out", &got, &define(&case, &x, &w), tolerance);
            for rstd in [q_rstd, k_rstd] {
                assert!(rstd.f32s().iter().all(|r| r.is_finite() && *r > 0.0));
            }
            let before = tensor(case.w.shape(), 6, DType::F32);
            let mut d_w = before.clone();
            let d_qkv = case.backward(Some(&mut d_w));
            let [want_d_qkv, want_d_w] = define_backward(&case, &x, &w);
            assert_close("d_qkv", &d_qkv, &want_d_qkv, tolerance);
            assert_close("d_w", &d_w, &plus(&want_d_w, &before), tolerance);
        }
    }
}

/// A token of zeros in a document of zeros has heads of norm 0: their reciprocal is 1/√eps, and so much larger are their gradients.
#[test]
fn zeroed_tokens_give_zeros_and_the_gradient_that_eps_bounds() {
    const ZEROS: usize = 6;
    for (dtype, tolerance) in [(DType::F32, F32_REL), (DType::Bf16, BF16_REL)] {
        for heads in HEADS {
            let mut case = Case::new(&[ZEROS, 9], heads, dtype);
            let (t, c) = (case.dims.t, case.qkv.shape()[1]);
            let mut values = case.qkv.to_f32_vec();
            values[..ZEROS * c].fill(0.0);
            case.qkv = Tensor::from_f32(&[t, c], values).to_dtype(dtype);
            let [q, k, v, q_rstd, k_rstd] = case.forward().unwrap();
            for out in [q, k, v] {
                let zeroed = rows(&out, 0..ZEROS).to_f32_vec();
                assert!(zeroed.iter().all(|x| *x == 0.0));
            }
            for rstd in [q_rstd, k_rstd] {
                let zeroed = rows(&rstd, 0..ZEROS).to_f32_vec();
                assert!(zeroed.iter().all(|r| (r * EPS.sqrt() - 1.0).abs() < 1e-5));
            }
            let mut d_w = Tensor::zeros(case.w.shape(), DType::F32);
            let d_qkv = case.backward(Some(&mut d_w));
            let (x, w) = (f64s(&case.qkv), f64s(&case.w));
            let [want, want_d_w] = define_backward(&case, &x, &w);
            // Apart: beside the zeroed document's gradients those of the other would not show.
            let (zeroed, others) = want.split_at(ZEROS * c);
            assert_close("zeroed", &rows(&d_qkv, 0..ZEROS), zeroed, tolerance);
            assert_close("others", &rows(&d_qkv, ZEROS..t), others, tolerance);
            assert_close("d_w", &d_w, &want_d_w, tolerance);
        }
    }
}

#[test]
fn a_frozen_weight_changes_no_other_gradient() {
    let case = Case::new(&LENGTHS, HEADS[1], DType::F32);
    let [.., d_qkv, _] = case.run();
    assert_eq!(case.backward(None), d_qkv);
}

#[test]
fn changing_one_document_changes_no_bit_of_the_next() {
    let mut case = Case::new(&[70, 90], HEADS[1], DType::F32);
    let [q, k, v, d_qkv, _] = case.run();
    let before = [q, k, v, d_qkv];
    let [d_q, d_k, d_v] = &mut case.d_outs;
    for tensor in [&mut case.qkv, d_q, d_k, d_v] {
        let width = tensor.numel() / 160;
        let first = &mut tensor.f32s_mut()[..70 * width];
        first.iter_mut().for_each(|x| *x = 3.0 - *x);
    }
    let [q, k, v, d_qkv, _] = case.run();
    let after = [q, k, v, d_qkv];
    assert!(bits_from_row(&before, 0) != bits_from_row(&after, 0));
    assert!(bits_from_row(&before, 70) == bits_from_row(&after, 70));
}

#[test]
fn the_number_of_threads_changes_no_bit() {
    let case = Case::new(&LENGTHS, HEADS[2], DType::F32);
    assert!(pool(1).install(|| case.run()) == pool(5).install(|| case.run()));
}

#[test]
fn no_tokens_are_allowed() {
    let case = Case::new(&[0], HEADS[1], DType::F32);
    let [.., d_w] = case.run();
    assert!(d_w.f32s().iter().all(|d_w| *d_w == 0.0));
}

#[test]
fn one_pass_equals_single_steps_one_after_the_other_bit_for_bit() {
    for dtype in [DType::F32, DType::Bf16] {
        let case = Case::new(&[130, 1, 0, 2, 167], HEADS[2], dtype);
        let got = case.forward().unwrap();
        let c = case.qkv.shape()[1];
        for ends in case.cu_seqlens.windows(2) {
            let document = ends[0] as usize..ends[1] as usize;
            let qkv = rows(&case.qkv, document.clone());
            let mut conv = poison_like(&qkv, dtype);
            let mut state = Tensor::zeros(&[3, c], DType::F32);
            causal_conv1d::forward_with_state(&mut conv, &mut state, &qkv, &case.w).unwrap();
            let mut want = got.each_ref().map(|got| {
                let got = rows(got, document.clone());
                poison_like(&got, got.dtype())
            });
            let [q, k, v, q_rstd, k_rstd] = &mut want;
            let (mut raw_q, mut raw_k) = (q.clone(), k.clone());
            split::qkv(&mut raw_q, &mut raw_k, v, &conv).unwrap();
            l2_norm::forward(q, q_rstd, &raw_q, SCALE, EPS).unwrap();
            l2_norm::forward(k, k_rstd, &raw_k, 1.0, EPS).unwrap();
            for (got, want) in got.iter().zip(&want) {
                assert!(rows(got, document.clone()) == *want, "{dtype} {document:?}");
            }
        }
    }
}

#[test]
fn wrong_arguments_are_refused() {
    let good = || Case::new(&[5, 3], HEADS[1], DType::F32);
    let mut case = good();
    case.qkv = tensor(&[8, 18], 1, DType::F32);
    assert!(matches!(
        case.forward(),
        Err(Error::Shape { arg: "qkv_tc", .. })
    ));
    let mut case = good();
    case.w = tensor(&[case.w.shape()[0], 1, 3], 1, DType::F32);
    assert!(matches!(case.forward(), Err(Error::Shape { arg: "w", .. })));
    let mut case = good();
    case.cu_seqlens = vec![0, 9];
    let arg = "cu_seqlens";
    assert!(matches!(case.forward(), Err(Error::Shape { arg: a, .. }) if a == arg));
}
