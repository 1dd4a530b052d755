//! Sums and maxima of f32 vectors, in explicit vectors: the compiler does not reorder a sum by itself.
//!
//! The order is fixed by the length and the machine's vector width (not by threads or by position in memory).

use pulp::{Simd, WithSimd};

use super::math;

/// Partial results that are kept apart, in vectors: enough to hide the latency of an addition.
const CHAINS: usize = 4;

/// Σ a b.
#[inline(always)]
pub(crate) fn dot(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len(), "dot: vectors of one length");
    pulp::Arch::new().dispatch(Dot { a, b })
}

/// Σ a b c.
#[inline(always)]
pub(crate) fn dot3(a: &[f32], b: &[f32], c: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len(), "dot3: vectors of one length");
    assert_eq!(a.len(), c.len(), "dot3: vectors of one length");
    pulp::Arch::new().dispatch(Dot3 { a, b, c })
}

/// Σ x².
#[inline(always)]
pub(crate) fn sum_squares(x: &[f32]) -> f32 {
    dot(x, x)
}

/// Σ x.
#[inline(always)]
pub(crate) fn sum(x: &[f32]) -> f32 {
    pulp::Arch::new().dispatch(Sum { x })
}

/// The largest element, -infinity for none. A NaN among them may be passed over: the sums that follow a maximum carry it on.
#[inline(always)]
pub(crate) fn max(x: &[f32]) -> f32 {
    pulp::Arch::new().dispatch(Max { x })
}

/// Σ e^(x - shift).
#[inline(always)]
pub(crate) fn sum_exp(x: &[f32], shift: f32) -> f32 {
    const PIECE: usize = 256;
    let mut total = 0.0;
    for x in x.chunks(PIECE) {
        let mut exps = [0.0; PIECE];
        for (exp, x) in exps.iter_mut().zip(x) {
            *exp = math::exp(x - shift);
        }
        total += sum(&exps[..x.len()]);
    }
    total
}

struct Dot<'a> {
    a: &'a [f32],
    b: &'a [f32],
}

impl WithSimd for Dot<'_> {
    type Output = f32;

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> f32 {
        let (a, a_rest) = S::as_simd_f32s(self.a);
        let (b, b_rest) = S::as_simd_f32s(self.b);
        let (a_chunks, a_singles) = a.as_chunks::<CHAINS>();
        let (b_chunks, b_singles) = b.as_chunks::<CHAINS>();
        let mut acc = [simd.splat_f32s(0.0); CHAINS];
        for (a, b) in a_chunks.iter().zip(b_chunks) {
            for i in 0..CHAINS {
                acc[i] = simd.mul_add_e_f32s(a[i], b[i], acc[i]);
            }
        }
        for (a, b) in a_singles.iter().zip(b_singles) {
            acc[0] = simd.mul_add_e_f32s(*a, *b, acc[0]);
        }
        let (a, b) = (
            simd.partial_load_f32s(a_rest),
            simd.partial_load_f32s(b_rest),
        );
        acc[1] = simd.mul_add_e_f32s(a, b, acc[1]);
        total(simd, acc)
    }
}

struct Dot3<'a> {
    a: &'a [f32],
    b: &'a [f32],
    c: &'a [f32],
}

impl WithSimd for Dot3<'_> {
    type Output = f32;

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> f32 {
        let (a, a_rest) = S::as_simd_f32s(self.a);
        let (b, b_rest) = S::as_simd_f32s(self.b);
        let (c, c_rest) = S::as_simd_f32s(self.c);
        let (a_chunks, a_singles) = a.as_chunks::<CHAINS>();
        let (b_chunks, b_singles) = b.as_chunks::<CHAINS>();
        let (c_chunks, c_singles) = c.as_chunks::<CHAINS>();
        let mut acc = [simd.splat_f32s(0.0); CHAINS];
        for ((a, b), c) in a_chunks.iter().zip(b_chunks).zip(c_chunks) {
            for i in 0..CHAINS {
                acc[i] = simd.mul_add_e_f32s(simd.mul_f32s(a[i], b[i]), c[i], acc[i]);
            }
        }
        for ((a, b), c) in a_singles.iter().zip(b_singles).zip(c_singles) {
            acc[0] = simd.mul_add_e_f32s(simd.mul_f32s(*a, *b), *c, acc[0]);
        }
        let (a, b) = (
            simd.partial_load_f32s(a_rest),
            simd.partial_load_f32s(b_rest),
        );
        acc[1] = simd.mul_add_e_f32s(simd.mul_f32s(a, b), simd.partial_load_f32s(c_rest), acc[1]);
        total(simd, acc)
    }
}

struct Sum<'a> {
    x: &'a [f32],
}

impl WithSimd for Sum<'_> {
    type Output = f32;

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> f32 {
        let (x, rest) = S::as_simd_f32s(self.x);
        let (chunks, singles) = x.as_chunks::<CHAINS>();
        let mut acc = [simd.splat_f32s(0.0); CHAINS];
        for x in chunks {
            for i in 0..CHAINS {
                acc[i] = simd.add_f32s(acc[i], x[i]);
            }
        }
        for x in singles {
            acc[0] = simd.add_f32s(acc[0], *x);
        }
        acc[1] = simd.add_f32s(acc[1], simd.partial_load_f32s(rest));
        total(simd, acc)
    }
}

struct Max<'a> {
    x: &'a [f32],
}

impl WithSimd for Max<'_> {
    type Output = f32;

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> f32 {
        let (x, rest) = S::as_simd_f32s(self.x);
        let (chunks, singles) = x.as_chunks::<CHAINS>();
        let mut acc = [simd.splat_f32s(f32::NEG_INFINITY); CHAINS];
        for x in chunks {
            for i in 0..CHAINS {
                acc[i] = simd.max_f32s(acc[i], x[i]);
            }
        }
        for x in singles {
            acc[0] = simd.max_f32s(acc[0], *x);
        }
        let [a, b, c, d] = acc;
        let largest = simd.max_f32s(simd.max_f32s(a, b), simd.max_f32s(c, d));
        rest.iter()
            .fold(simd.reduce_max_f32s(largest), |max, x| max.max(*x))
    }
}

#[inline(always)]
fn total<S: Simd>(simd: S, [a, b, c, d]: [S::f32s; CHAINS]) -> f32 {
    simd.reduce_sum_f32s(simd.add_f32s(simd.add_f32s(a, b), simd.add_f32s(c, d)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reductions_agree_with_f64_at_every_length() {
        for n in 0..200 {
            let a: Vec<f32> = (0..n)
                .map(|i| ((i * 37 % 101) as f32 - 50.0) / 50.0)
                .collect();
            let b: Vec<f32> = (0..n)
                .map(|i| ((i * 53 % 97) as f32 - 40.0) / 50.0)
                .collect();
            let want: f64 = a.iter().zip(&b).map(|(a, b)| *a as f64 * *b as f64).sum();
            assert!((dot(&a, &b) as f64 - want).abs() < 1e-5);
            let want: f64 = a.iter().map(|a| *a as f64).sum();
            assert!((sum(&a) as f64 - want).abs() < 1e-5);
            let want = a.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            assert_eq!(max(&a), want);
            let want: f64 = a
                .iter()
                .zip(&b)
                .map(|(a, b)| *a as f64 * *b as f64 * *a as f64)
                .sum();
            assert!((dot3(&a, &b, &a) as f64 - want).abs() < 1e-5);
            let want: f64 = a.iter().map(|a| (*a as f64 - 0.5).exp()).sum();
            assert!((sum_exp(&a, 0.5) as f64 - want).abs() <= 1e-6 * want);
        }
    }

    #[test]
    fn max_of_nothing_is_minus_infinity() {
        assert_eq!(max(&[]), f32::NEG_INFINITY);
        assert_eq!(max(&[f32::NEG_INFINITY; 40]), f32::NEG_INFINITY);
    }
}
