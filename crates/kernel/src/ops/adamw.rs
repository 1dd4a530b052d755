//! AdamW with decoupled weight decay, one tensor a call.
//!
//! With g = grad_scale · grad: w -= lr weight_decay w; m += (1 - beta1) (g - m); v = beta2 v + (1 - beta2) g²;
//! w -= lr / (1 - beta1^step) · m / (sqrt(v) / sqrt(1 - beta2^step) + eps).
//! Source: arXiv 1711.05101; the order of operations is that of `torch.optim.AdamW` (single tensor).

use super::check;
use crate::{Result, Tensor};

/// Scalars of one update. `step` counts from 1.
#[derive(Debug, Clone, Copy)]
pub struct Update {
    pub lr: f32,
    pub beta1: f32,
    pub beta2: f32,
    pub eps: f32,
    /// 0 for parameters without decay.
    pub weight_decay: f32,
    pub step: u64,
    /// Multiplied into the gradient first: clipping and averaging.
    pub grad_scale: f32,
}

/// w, m and v updated in place. Shapes: any, all alike; m, v, grad f32; w f32, or bf16 rounded to nearest on store.
///
/// # Errors
/// [`crate::Error::Shape`] where shapes differ, [`crate::Error::DType`] where m, v or grad is not f32.
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
        check::f32(OP, arg, tensor)?;
    }
    cpu::step(w, m, v, grad, update);
    Ok(())
}

mod cpu {
    use super::Update;
    use crate::Tensor;
    use crate::cpu::{In, Out, for_rows};

    pub(super) fn step(
        w: &mut Tensor,
        m: &mut Tensor,
        v: &mut Tensor,
        grad: &Tensor,
        update: &Update,
    ) {
        // The scalars as torch has them: combined in f64, used in f32.
        let (lr, beta1, beta2) = (update.lr as f64, update.beta1 as f64, update.beta2 as f64);
        let steps = update.step as f64;
        let keep = (1.0 - lr * update.weight_decay as f64) as f32;
        let to_m = (1.0 - beta1) as f32;
        let to_v = (1.0 - beta2) as f32;
        let step_size = (lr / (1.0 - beta1.powf(steps))) as f32;
        let root_correction = (1.0 - beta2.powf(steps)).sqrt() as f32;
        let Update {
            beta2,
            eps,
            grad_scale,
            ..
        } = *update;
        for_rows(
            [Out::update(w, 1), Out::update(m, 1), Out::update(v, 1)],
            [In::new(grad, 1)],
            #[inline(always)]
            |_, [w, m, v], [grad]| {
                for (((w, m), v), grad) in w.iter_mut().zip(m).zip(v).zip(grad) {
                    let g = grad * grad_scale;
                    *m += to_m * (g - *m);
                    *v = *v * beta2 + to_v * (g * g);
                    let denominator = v.sqrt() / root_correction + eps;
                    *w = *w * keep - step_size * (*m / denominator);
                }
            },
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{STORAGES, assert_close, f64s, tensor};
    use crate::{DType, Error};

    const UPDATE: Update = Update {
        lr: 1e-2,
        beta1: 0.9,
        beta2: 0.95,
        eps: 1e-8,
        weight_decay: 0.1,
        step: 1,
        grad_scale: 0.5,
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
    fn moments_must_be_f32() {
        let mut w = Tensor::zeros(&[2], DType::Bf16);
        let (mut m, mut v) = (w.clone(), Tensor::zeros(&[2], DType::F32));
        let grad = v.clone();
        let got = step(&mut w, &mut m, &mut v, &grad, &UPDATE);
        assert!(matches!(got, Err(Error::DType { arg: "m", .. })));
    }
}
