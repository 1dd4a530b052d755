//! f32 functions, element by element, written so that loops over them vectorise.
//!
//! None uses a fused multiply-add: the results are the same bytes with SSE2, AVX2 and AVX-512.

pub(crate) use super::reduce::{dot, dot3, max, sum, sum_exp, sum_squares};

/// e^x with a relative error below 2e-7; 0 below -86.9, infinity above 88.72, NaN for NaN.
/// Cody-Waite reduction by ln 2, then a polynomial on [-ln 2 / 2, ln 2 / 2] (coefficients of Cephes `expf`).
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    // Adding 1.5 · 2^23 leaves the nearest integer in the low bits of the mantissa.
    const ROUND: f32 = 12_582_912.0;
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = (x - n * 0.693_359_4) - n * -2.121_944_4e-4;
    let p = 1.987_569_1e-4;
    let p = p * r + 1.398_2e-3;
    let p = p * r + 8.333_452e-3;
    let p = p * r + 4.166_579_6e-2;
    let p = p * r + 1.666_666_6e-1;
    let p = p * r + 5e-1;
    let p = p * (r * r) + r + 1.0;
    // 2^(n-1), doubled by the last product: n = 128 would overflow the exponent field.
    let half_scale = f32::from_bits((shifted.to_bits() << 23).wrapping_add(126 << 23));
    let y = (p * half_scale) * 2.0;
    let y = if x < -86.9 { 0.0 } else { y };
    if x > 88.722_84 { f32::INFINITY } else { y }
}

/// 1 / (1 + e^-x).
#[inline(always)]
pub(crate) fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// x · sigmoid(x).
#[inline(always)]
pub(crate) fn silu(x: f32) -> f32 {
    x / (1.0 + exp(-x))
}

/// Derivative of `silu`: s + x s (1 - s) with s = sigmoid(x).
#[inline(always)]
pub(crate) fn d_silu(x: f32) -> f32 {
    let s = sigmoid(x);
    s * (1.0 + x * (1.0 - s))
}

/// ln(1 + e^x), x itself above 20 (PyTorch's threshold).
#[inline(always)]
pub(crate) fn softplus(x: f32) -> f32 {
    if x > 20.0 { x } else { x.exp().ln_1p() }
}

/// x = e^(x - shift) in place; returns the sum of the results.
#[inline(always)]
pub(crate) fn exp_in_place(x: &mut [f32], shift: f32) -> f32 {
    for x in x.iter_mut() {
        *x = exp(*x - shift);
    }
    sum(x)
}

/// y += x.
#[inline(always)]
pub(crate) fn add(y: &mut [f32], x: &[f32]) {
    assert_eq!(y.len(), x.len(), "add: vectors of one length");
    for (y, x) in y.iter_mut().zip(x) {
        *y += x;
    }
}

/// y += alpha x.
#[inline(always)]
pub(crate) fn add_scaled(y: &mut [f32], x: &[f32], alpha: f32) {
    assert_eq!(y.len(), x.len(), "add_scaled: vectors of one length");
    for (y, x) in y.iter_mut().zip(x) {
        *y += alpha * x;
    }
}

/// x *= alpha.
#[inline(always)]
pub(crate) fn scale(x: &mut [f32], alpha: f32) {
    for x in x {
        *x *= alpha;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::simd;

    fn rel(got: f32, want: f64) -> f64 {
        (got as f64 - want).abs() / want.abs()
    }

    #[test]
    fn exp_agrees_with_f64() {
        let mut worst = 0.0f64;
        for i in -869_000..=887_200 {
            let x = i as f32 * 1e-4;
            worst = worst.max(rel(exp(x), (x as f64).exp()));
        }
        assert!(worst < 2e-7, "{worst:e}");
    }

    #[test]
    fn exp_ends_in_zero_infinity_and_nan() {
        assert_eq!(exp(-87.0), 0.0);
        assert_eq!(exp(-1e30), 0.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(89.0), f32::INFINITY);
        assert_eq!(exp(1e30), f32::INFINITY);
        assert_eq!(exp(f32::INFINITY), f32::INFINITY);
        assert_eq!(exp(0.0), 1.0);
        assert!(exp(f32::NAN).is_nan());
    }

    #[test]
    fn exp_gives_the_same_bits_in_wide_vectors() {
        let x: Vec<f32> = (0..10_007).map(|i| (i as f32 - 5000.0) * 0.0173).collect();
        let mut wide = x.clone();
        simd(
            #[inline(always)]
            || wide.iter_mut().for_each(|x| *x = exp(*x)),
        );
        assert!(
            wide.iter()
                .zip(&x)
                .all(|(w, x)| w.to_bits() == exp(*x).to_bits())
        );
    }

    #[test]
    fn sigmoid_and_silu_agree_with_f64() {
        for i in -8000..=8000 {
            let x = i as f32 * 1e-2;
            let s = 1.0 / (1.0 + (-x as f64).exp());
            assert!(rel(sigmoid(x), s) < 4e-7, "sigmoid({x})");
            if i != 0 {
                assert!(rel(silu(x), x as f64 * s) < 4e-7, "silu({x})");
            }
            let d = s * (1.0 + x as f64 * (1.0 - s));
            assert!((d_silu(x) as f64 - d).abs() < 1e-6, "d_silu({x})");
        }
        assert_eq!(sigmoid(-1000.0), 0.0);
        assert_eq!(silu(-1000.0), 0.0);
        assert_eq!(d_silu(-1000.0), 0.0);
    }
}
