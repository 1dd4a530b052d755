//! AdamW with decoupled weight decay, one tensor a call or many.
//!
//! With g = grad_scale · grad: w -= lr weight_decay w; m += (1 - beta1) (g - m); v = beta2 v + (1 - beta2) g²;
//! w -= lr / (1 - beta1^step) · m / (sqrt(v) / sqrt(1 - beta2^step) + eps).
//! Source: arXiv 1711.05101; the order of operations is that of `torch.optim.AdamW` (single tensor).
//!
//! What is stored as bf16 is rounded stochastically: up with the chance that equals the part of the step to the upper neighbour.
//! So updates far below the 8 bits of a bf16 weight count on average, where rounding to nearest loses them all: [`Rounding::Nearest`]
//! is there to measure that.

use super::check;
use crate::{Device, Result, Tensor};

/// Scalars of one update. `step` counts from 1.
#[derive(Debug, Clone, Copy)]
pub struct Update {
    /// Learning rate.
    pub lr: f32,
    /// Decay of the first moment.
    pub beta1: f32,
    /// Decay of the second moment.
    pub beta2: f32,
    /// Added to the root of the second moment.
    pub eps: f32,
    /// 0 for parameters without decay.
    pub weight_decay: f32,
    /// Number of the step, from 1: what the moments' bias is corrected by.
    pub step: u64,
    /// Multiplied into the gradient first: clipping and averaging.
    pub grad_scale: f32,
    /// Of the stochastic rounding, with `step` and an element's index: give every tensor its own. Unused where all is f32.
    pub seed: u64,
    /// Of w, m and v alike. Unused where all is f32.
    pub rounding: Rounding,
}

/// How an f32 result becomes the bf16 that is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Rounding {
    /// To one of the two neighbours, by chance, so that the mean over many steps is right.
    #[default]
    Stochastic,
    /// To the nearest, ties to even: a step below half the distance to the neighbour is lost.
    Nearest,
}

/// w, m and v updated in place, those that are bf16 rounded as `update` says. Shapes: any, all alike. The same bits on every device.
///
/// # Errors
/// [`crate::Error::Shape`] where shapes differ.
pub fn step(
    w: &mut Tensor,
    m: &mut Tensor,
    v: &mut Tensor,
    grad: &Tensor,
    update: &Update,
) -> Result<()> {
    const OP: &str = "adamw::step";
    for (arg, tensor) in [("m", &*m), ("v", &*v), ("grad", grad)] {
        check::shape(OP, arg, tensor, w.shape())?;
    }
    match check::device(OP, w, &[("m", &*m), ("v", &*v), ("grad", grad)])? {
        Device::Cpu => cpu::step(w, m, v, grad, update),
        Device::Cuda(cuda) => cuda::step(cuda, w, m, v, grad, update)?,
    }
    Ok(())
}

/// A tensor of [`step_all`], as the arguments of [`step`]; of [`Update`], what is its own.
#[derive(Debug)]
pub struct Part<'a> {
    /// Weights.
    pub w: &'a mut Tensor,
    /// First moment.
    pub m: &'a mut Tensor,
    /// Second moment.
    pub v: &'a mut Tensor,
    /// Gradient.
    pub grad: &'a Tensor,
    /// As [`Update::weight_decay`].
    pub weight_decay: f32,
    /// As [`Update::seed`].
    pub seed: u64,
}

/// [`step`] for each part with its own decay and seed in place of the update's: the same bits, on a GPU in one launch, which is
/// what many small tensors need.
///
/// # Errors
/// [`crate::Error::Shape`] where shapes of a part differ.
pub fn step_all(parts: &mut [Part], update: &Update) -> Result<()> {
    const OP: &str = "adamw::step_all";
    let Some(first) = parts.first() else {
        return Ok(());
    };
    let mut all = Vec::with_capacity(4 * parts.len());
    for part in &*parts {
        for (arg, tensor) in [("m", &*part.m), ("v", &*part.v), ("grad", part.grad)] {
            check::shape(OP, arg, tensor, part.w.shape())?;
            all.push((arg, tensor));
        }
        all.push(("w", &*part.w));
    }
    match check::device(OP, first.w, &all)? {
        Device::Cpu => {
            for part in parts {
                let update = part.update(update);
                cpu::step(part.w, part.m, part.v, part.grad, &update);
            }
        }
        Device::Cuda(cuda) => cuda::step_all(cuda, parts, update)?,
    }
    Ok(())
}

impl Part<'_> {
    fn update(&self, shared: &Update) -> Update {
        Update {
            weight_decay: self.weight_decay,
            seed: self.seed,
            ..*shared
        }
    }
}

/// The scalars as torch has them: combined in f64, used in f32.
struct Scalars {
    keep: f32,
    to_m: f32,
    to_v: f32,
    step_size: f32,
    root_correction: f32,
}

impl Scalars {
    fn of(update: &Update) -> Scalars {
        let (lr, beta1, beta2) = (update.lr as f64, update.beta1 as f64, update.beta2 as f64);
        let steps = update.step as f64;
        Scalars {
            keep: (1.0 - lr * update.weight_decay as f64) as f32,
            to_m: (1.0 - beta1) as f32,
            to_v: (1.0 - beta2) as f32,
            step_size: (lr / (1.0 - beta1.powf(steps))) as f32,
            root_correction: (1.0 - beta2.powf(steps)).sqrt() as f32,
        }
    }
}

mod cpu {
    use super::{Rounding, Scalars, Update};
    use crate::cpu::{In, Out, for_rows};
    use crate::{DType, Tensor, random};

    pub(super) fn step(
        w: &mut Tensor,
        m: &mut Tensor,
        v: &mut Tensor,
        grad: &Tensor,
        update: &Update,
    ) {
        let Scalars {
            keep,
            to_m,
            to_v,
            step_size,
            root_correction,
        } = Scalars::of(update);
        let Update {
            beta2,
            eps,
            grad_scale,
            ..
        } = *update;
        // Storing rounds to the nearest by itself.
        let by_chance = [&*w, m, v]
            .map(|tensor| tensor.dtype() == DType::Bf16 && update.rounding == Rounding::Stochastic);
        let key = random::key(update.seed, update.step);
        for_rows(
            [Out::update(w, 1), Out::update(m, 1), Out::update(v, 1)],
            [In::new(grad, 1)],
            #[inline(always)]
            |first, [w, m, v], [grad]| {
                let moments = m.iter_mut().zip(v.iter_mut());
                for ((w, (m, v)), grad) in w.iter_mut().zip(moments).zip(grad) {
                    let g = grad * grad_scale;
                    *m += to_m * (g - *m);
                    *v = *v * beta2 + to_v * (g * g);
                    let denominator = v.sqrt() / root_correction + eps;
                    *w = *w * keep - step_size * (*m / denominator);
                }
                // Each of the three has 16 bits of an element's 64.
                for (part, (values, by_chance)) in [w, m, v].into_iter().zip(by_chance).enumerate()
                {
                    if by_chance {
                        for (index, value) in (first as u64..).zip(values) {
                            let noise = random::bits_of(key, index) >> (16 * part);
                            *value = round_by_chance(*value, noise as u16);
                        }
                    }
                }
            },
        );
    }

    /// One of the two bf16 values around x, which storing then leaves as it is; a bf16 value stays itself.
    #[inline(always)]
    pub(super) fn round_by_chance(x: f32, noise: u16) -> f32 {
        let bits = x.to_bits();
        let rounded = bits.wrapping_add(u32::from(noise)) & 0xffff_0000;
        f32::from_bits(if x.is_nan() { bits } else { rounded })
    }
}

pub(super) mod cuda {
    use std::ops::Range;

    use super::{Part, Rounding, Scalars, Update};
    use crate::cuda::sources::ADAMW;
    use crate::cuda::{Args, Cuda, Grid, Table};
    use crate::{DType, Result, Tensor, random};

    const THREADS: u32 = 256;

    pub(super) fn step(
        cuda: Cuda,
        w: &mut Tensor,
        m: &mut Tensor,
        v: &mut Tensor,
        grad: &Tensor,
        update: &Update,
    ) -> Result<()> {
        let moments = [&*m, v].map(|tensor| (tensor.device_pointer(), tensor.dtype()));
        let all = 0..w.numel();
        step_piece(cuda, w, moments, grad, &all, update)
    }

    /// The update of some elements, of which the first is a multiple of 8: `moments` are addresses and types of those alone.
    pub(in crate::ops) fn step_piece(
        cuda: Cuda,
        w: &mut Tensor,
        moments: [(u64, DType); 2],
        grad: &Tensor,
        elements: &Range<usize>,
        update: &Update,
    ) -> Result<()> {
        let scalars = Scalars::of(update);
        let (first, n) = (elements.start, elements.len());
        let key = random::key(update.seed, update.step);
        let at = |tensor: &Tensor| tensor.device_pointer() + (first * tensor.dtype().size()) as u64;
        let [(m, m_dtype), (v, v_dtype)] = moments;
        let args = Args::new()
            .view_at(at(w), w.dtype())
            .view_at(m, m_dtype)
            .view_at(v, v_dtype)
            .view_at(at(grad), grad.dtype())
            .u64(n as u64)
            .u64(random::key_from(key, first as u64))
            .f32(update.grad_scale)
            .f32(scalars.to_m)
            .f32(update.beta2)
            .f32(scalars.to_v)
            .f32(scalars.root_correction)
            .f32(update.eps)
            .f32(scalars.keep)
            .f32(scalars.step_size)
            .u32(to_nearest(update));
        if n.is_multiple_of(8) {
            return cuda.launch(&ADAMW, "adamw_step_8", Grid::each(n / 8, THREADS), args);
        }
        cuda.launch(&ADAMW, "adamw_step", Grid::each(n, THREADS), args)
    }

    /// Elements of a block of `adamw_step_all`.
    const BLOCK: usize = 8192;

    pub(super) fn step_all(cuda: Cuda, parts: &mut [Part], update: &Update) -> Result<()> {
        let mut table = Table::new(parts.len());
        for part in parts {
            let update = part.update(update);
            let n = part.w.numel();
            let tensors = [&*part.w, part.m, part.v, part.grad];
            let narrow = tensors.iter().enumerate().fold(0, |bits, (k, tensor)| {
                bits | u32::from(tensor.dtype() == DType::Bf16) << k
            });
            table.push(n.div_ceil(BLOCK), |to| {
                for tensor in tensors {
                    to.u64(tensor.device_pointer());
                }
                to.u64(n as u64)
                    .u64(random::key(update.seed, update.step))
                    .f32(Scalars::of(&update).keep)
                    .u32(narrow);
            });
        }
        let scalars = Scalars::of(update);
        let grid = Grid::line(table.n_blocks(), THREADS);
        let args = table.upload(cuda, Args::new())?;
        let args = args
            .f32(update.grad_scale)
            .f32(scalars.to_m)
            .f32(update.beta2)
            .f32(scalars.to_v)
            .f32(scalars.root_correction)
            .f32(update.eps)
            .f32(scalars.step_size)
            .u32(to_nearest(update));
        cuda.launch(&ADAMW, "adamw_step_all", grid, args)
    }

    /// The kernels' flag.
    fn to_nearest(update: &Update) -> usize {
        usize::from(update.rounding == Rounding::Nearest)
    }
}

pub(crate) mod examples {
    use super::{Part, Rounding, Update};
    use crate::DType::{self, Bf16, F32};
    use crate::example::{Example, Sizes, Tolerance};

    /// Of w, m, v and the gradient.
    const KINDS: [[DType; 4]; 5] = [
        [F32, F32, F32, F32],
        [Bf16, F32, F32, F32],
        [Bf16, Bf16, Bf16, F32],
        [Bf16, Bf16, Bf16, Bf16],
        [F32, Bf16, Bf16, F32],
    ];

    /// Values of m and v, as they are in training.
    pub(in crate::ops) const M: [f32; 2] = [-0.1, 0.1];
    pub(in crate::ops) const V: [f32; 2] = [0.0, 0.01];

    pub(in crate::ops) const UPDATE: Update = Update {
        lr: 1e-4,
        beta1: 0.9,
        beta2: 0.95,
        eps: 1e-8,
        weight_decay: 0.1,
        step: 17,
        grad_scale: 0.37,
        seed: 5,
        rounding: Rounding::Stochastic,
    };

    pub(crate) fn compared() -> Vec<Example> {
        let mut all = Vec::new();
        for rounding in [Rounding::Stochastic, Rounding::Nearest] {
            for kind in KINDS {
                for (n, step) in [(1, 1), (1021, 3), (8, 2), (100_000, 12_345)] {
                    let update = Update {
                        step,
                        rounding,
                        ..UPDATE
                    };
                    let label = format!("n{n}_{rounding:?}");
                    all.push(self::step(label, &[n], kind, update).tolerance(Tolerance::EXACT));
                }
                all.push(step_all(kind, rounding));
            }
        }
        all
    }

    pub(crate) fn timed(sizes: &Sizes) -> Vec<Example> {
        let (d, f) = (sizes.hidden, sizes.feed_forward);
        let kind = [sizes.dtype, sizes.dtype, sizes.dtype, F32];
        vec![step(format!("f{f}_d{d}"), &[f, d], kind, UPDATE)]
    }

    fn step(label: String, shape: &[usize], kind: [DType; 4], update: Update) -> Example {
        let [w_type, m_type, v_type, grad_type] = kind;
        Example::new("adamw/step", label)
            .updated("w", shape, w_type)
            .updated_in("m", shape, m_type, M)
            .updated_in("v", shape, v_type, V)
            .input("grad", shape, grad_type)
            .run(move |[w, m, v], [grad]| super::step(w, m, v, grad, &update))
    }

    /// Many tensors at once: of no elements, of less than a block, of several.
    fn step_all([w_type, m_type, v_type, grad_type]: [DType; 4], rounding: Rounding) -> Example {
        let sizes = [1, 8, 0, 1021, 8192, 20_000, 0];
        let example = Example::new("adamw/step_all", format!("{sizes:?}_{rounding:?}"));
        let example = sizes.iter().fold(example, |example, n| {
            example
                .updated("w", &[*n], w_type)
                .updated_in("m", &[*n], m_type, M)
                .updated_in("v", &[*n], v_type, V)
                .input("grad", &[*n], grad_type)
        });
        example
            .tolerance(Tolerance::EXACT)
            .run_all(move |outs, ins| {
                let mut parts = Vec::new();
                for ((tensors, grad), seed) in outs.chunks_mut(3).zip(ins).zip(0..) {
                    let [w, m, v] = tensors else {
                        unreachable!("three outputs for each gradient")
                    };
                    parts.push(Part {
                        w,
                        m,
                        v,
                        grad,
                        weight_decay: 0.1 * (seed % 2) as f32,
                        seed,
                    });
                }
                super::step_all(&mut parts, &Update { rounding, ..UPDATE })
            })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::DType;
    use crate::ops::testing::{BF16_REL, STORAGES, assert_close, f64s, tensor};

    const UPDATE: Update = Update {
        lr: 1e-2,
        beta1: 0.9,
        beta2: 0.95,
        eps: 1e-8,
        weight_decay: 0.1,
        step: 1,
        grad_scale: 0.5,
        seed: 7,
        rounding: Rounding::Stochastic,
    };

    fn define(w: &mut [f64], m: &mut [f64], v: &mut [f64], grad: &[f64], u: &Update) {
        let (lr, b1, b2) = (u.lr as f64, u.beta1 as f64, u.beta2 as f64);
        for i in 0..w.len() {
            let g = grad[i] * u.grad_scale as f64;
            w[i] -= lr * u.weight_decay as f64 * w[i];
            m[i] = b1 * m[i] + (1.0 - b1) * g;
            v[i] = b2 * v[i] + (1.0 - b2) * g * g;
            let m_hat = m[i] / (1.0 - b1.powi(u.step as i32));
            let v_hat = v[i] / (1.0 - b2.powi(u.step as i32));
            w[i] -= lr * m_hat / (v_hat.sqrt() + u.eps as f64);
        }
    }

    #[test]
    fn steps_agree_with_definition() {
        for (dtype, tolerance) in STORAGES {
            let shape = [37, 61];
            let mut w = tensor(&shape, 1, dtype);
            let (mut m, mut v) = (
                Tensor::zeros(&shape, DType::F32),
                Tensor::zeros(&shape, DType::F32),
            );
            let (mut w_want, mut m_want, mut v_want) = (f64s(&w), f64s(&m), f64s(&v));
            for count in 1..=5 {
                let update = Update {
                    step: count,
                    ..UPDATE
                };
                let grad = tensor(&shape, 1 + count, DType::F32);
                step(&mut w, &mut m, &mut v, &grad, &update).unwrap();
                define(&mut w_want, &mut m_want, &mut v_want, &f64s(&grad), &update);
            }
            assert_close("w", &w, &w_want, tolerance);
            assert_close("m", &m, &m_want, 1e-6);
            assert_close("v", &v, &v_want, 1e-6);
        }
    }

    #[test]
    fn all_at_once_equals_one_by_one() {
        let shapes: [&[usize]; 3] = [&[5, 7], &[0], &[64]];
        let state = |dtype| {
            shapes.map(|shape| {
                let zeros = || Tensor::zeros(shape, dtype);
                (tensor(shape, 1, dtype), zeros(), zeros())
            })
        };
        for (dtype, _) in STORAGES {
            let grads = shapes.map(|shape| tensor(shape, 2, DType::F32));
            let update = |seed| Update { seed, ..UPDATE };
            let (mut one_by_one, mut at_once) = (state(dtype), state(dtype));
            for ((w, m, v), (grad, seed)) in one_by_one.iter_mut().zip(grads.iter().zip(0..)) {
                step(w, m, v, grad, &update(seed)).unwrap();
            }
            let parts = at_once.iter_mut().zip(grads.iter().zip(0..));
            let mut parts: Vec<Part> = parts
                .map(|((w, m, v), (grad, seed))| Part {
                    w,
                    m,
                    v,
                    grad,
                    weight_decay: UPDATE.weight_decay,
                    seed,
                })
                .collect();
            step_all(&mut parts, &UPDATE).unwrap();
            for (one, all) in one_by_one.iter().zip(&at_once) {
                for (one, all) in [(&one.0, &all.0), (&one.1, &all.1), (&one.2, &all.2)] {
                    assert_eq!(one.to_f32_vec(), all.to_f32_vec());
                }
            }
        }
    }

    #[test]
    fn first_step_without_decay_moves_by_lr_against_the_sign() {
        let mut w = Tensor::zeros(&[2], DType::F32);
        let (mut m, mut v) = (w.clone(), w.clone());
        let grad = Tensor::from_f32(&[2], vec![3.0, -1e-3]);
        step(
            &mut w,
            &mut m,
            &mut v,
            &grad,
            &Update {
                weight_decay: 0.0,
                ..UPDATE
            },
        )
        .unwrap();
        assert_close("w", &w, &[-1e-2, 1e-2], 3e-5);
    }

    #[test]
    fn zero_gradient_only_decays() {
        let mut w = Tensor::from_f32(&[1], vec![2.0]);
        let (mut m, mut v) = (
            Tensor::zeros(&[1], DType::F32),
            Tensor::zeros(&[1], DType::F32),
        );
        let grad = Tensor::zeros(&[1], DType::F32);
        step(&mut w, &mut m, &mut v, &grad, &UPDATE).unwrap();
        assert_close("w", &w, &[2.0 * (1.0 - 1e-3)], 1e-7);
    }

    #[test]
    fn bf16_moments_stay_near_the_definition() {
        let shape = [300, 40];
        let mut w = tensor(&shape, 1, DType::Bf16);
        let (mut m, mut v) = (
            Tensor::zeros(&shape, DType::Bf16),
            Tensor::zeros(&shape, DType::Bf16),
        );
        let (mut w_want, mut m_want, mut v_want) = (f64s(&w), f64s(&m), f64s(&v));
        for count in 1..=5 {
            let update = Update {
                step: count,
                ..UPDATE
            };
            let grad = tensor(&shape, 1 + count, DType::Bf16);
            step(&mut w, &mut m, &mut v, &grad, &update).unwrap();
            define(&mut w_want, &mut m_want, &mut v_want, &f64s(&grad), &update);
        }
        assert_close("w", &w, &w_want, BF16_REL);
        assert_close("m", &m, &m_want, BF16_REL);
        assert_close("v", &v, &v_want, BF16_REL);
    }

    /// How far weights of 1 get in 20 steps of lr 1e-4 down, as a share of the 20 steps' sum.
    fn moved(rounding: Rounding) -> f64 {
        // Below 1 a bf16 weight moves in steps of 2^-8; each update is a fortieth of one.
        let n = 4096;
        let mut w = Tensor::from_f32(&[n], vec![1.0; n]).to_dtype(DType::Bf16);
        let zeros = || Tensor::zeros(&[n], DType::F32);
        let (mut m, mut v) = (zeros(), zeros());
        let grad = Tensor::from_f32(&[n], vec![1.0; n]);
        let lr = 1e-4;
        for count in 1..=20 {
            let update = Update {
                lr,
                weight_decay: 0.0,
                step: count,
                rounding,
                ..UPDATE
            };
            step(&mut w, &mut m, &mut v, &grad, &update).unwrap();
        }
        let mean = f64s(&w).iter().sum::<f64>() / n as f64;
        (1.0 - mean) / (20.0 * f64::from(lr))
    }

    #[test]
    fn updates_below_half_a_step_count_on_average_and_are_lost_to_nearest() {
        let by_chance = moved(Rounding::Stochastic);
        assert!((by_chance - 1.0).abs() < 0.1, "{by_chance}");
        assert_eq!(moved(Rounding::Nearest), 0.0);
    }

    #[test]
    fn nearest_is_the_f32_result_rounded_to_even() {
        let update = Update {
            rounding: Rounding::Nearest,
            step: 3,
            ..UPDATE
        };
        let shape = [37, 61];
        let grad = tensor(&shape, 4, DType::F32);
        let start = || [1, 2, 3].map(|seed| tensor(&shape, seed, DType::Bf16));
        let [mut w, mut m, v] = start();
        let mut v = positive(&v);
        let [mut w_want, mut m_want, v_want] = start().map(|t| t.to_dtype(DType::F32));
        let mut v_want = positive(&v_want);
        step(&mut w, &mut m, &mut v, &grad, &update).unwrap();
        step(&mut w_want, &mut m_want, &mut v_want, &grad, &update).unwrap();
        for (got, want) in [(w, w_want), (m, m_want), (v, v_want)] {
            assert_eq!(got, want.to_dtype(DType::Bf16));
        }
    }

    fn positive(x: &Tensor) -> Tensor {
        let values = x.to_f32_vec().into_iter().map(f32::abs).collect();
        Tensor::from_f32(x.shape(), values).to_dtype(x.dtype())
    }

    #[test]
    fn rounding_by_chance_keeps_bf16_values_infinities_and_nan() {
        for noise in [0, 1, u16::MAX] {
            for x in [0.0, -1.5, 3.0e38, f32::INFINITY, f32::NEG_INFINITY] {
                let x = f32::from_bits(x.to_bits() & 0xffff_0000);
                assert_eq!(cpu::round_by_chance(x, noise), x);
            }
            for nan in [f32::NAN, f32::from_bits(0xffff_ffff)] {
                assert!(cpu::round_by_chance(nan, noise).is_nan());
            }
        }
        let x = f32::from_bits(0x3f80_4000);
        assert_eq!(cpu::round_by_chance(x, 0xbfff), 1.0);
        assert_eq!(cpu::round_by_chance(x, 0xc000), 1.0078125);
    }
}
