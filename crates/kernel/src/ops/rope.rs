//! Rotary position embedding on the first R dims of each head, half-split pairs (i, i + R/2), angle = position · theta^(-2i/R);
//! the other N - R dims pass unchanged.
//!
//! (x_i, x_j) -> (x_i cos - x_j sin, x_j cos + x_i sin) with j = i + R/2; the gradient is turned by the opposite angle.
//! Source: arXiv 2104.09864; `Qwen3_5TextRotaryEmbedding` of transformers 5.17 (for text its three position planes are equal).

use super::check;
use crate::{Device, Error, Result, Tensor};

/// Rotation parameters; angles are computed in f32 as transformers does (inverse frequency first, then times the position).
#[derive(Debug, Clone)]
pub struct Rotation {
    /// theta^(-2i/R), [R/2] f32.
    pub inv_freq: Vec<f32>,
}

impl Rotation {
    /// Of base `theta` over the first `rotary_dims` = R dims of a head. R is even.
    pub fn new(theta: f64, rotary_dims: usize) -> Self {
        // transformers: the exponent is f32, and so are the power (theta becomes f32 for it) and its reciprocal.
        let inv_freq = (0..rotary_dims / 2)
            .map(|i| 1.0 / (theta as f32).powf((2 * i) as f32 / rotary_dims as f32))
            .collect();
        Rotation { inv_freq }
    }
}

/// Rotates x_thn [T,H,N] in place; positions_t [T] count from 0 in each document.
///
/// # Errors
/// [`Error::Shape`] where there is not one position a token or R > N.
pub fn forward(x_thn: &mut Tensor, rotation: &Rotation, positions_t: &[u32]) -> Result<()> {
    check_rotation("rope::forward", "x_thn", x_thn, rotation, positions_t)?;
    rotate(x_thn, rotation, positions_t, 1.0)
}

/// Rotates the gradient d_x_thn [T,H,N] back, in place.
///
/// # Errors
/// As [`forward`].
pub fn backward(d_x_thn: &mut Tensor, rotation: &Rotation, positions_t: &[u32]) -> Result<()> {
    check_rotation("rope::backward", "d_x_thn", d_x_thn, rotation, positions_t)?;
    rotate(d_x_thn, rotation, positions_t, -1.0)
}

/// Turns by +angle or, with `direction` = -1, by -angle.
fn rotate(
    x_thn: &mut Tensor,
    rotation: &Rotation,
    positions_t: &[u32],
    direction: f32,
) -> Result<()> {
    match x_thn.device() {
        Device::Cpu => cpu::rotate(x_thn, rotation, positions_t, direction),
        Device::Cuda(cuda) => cuda::rotate(cuda, x_thn, rotation, positions_t, direction)?,
    }
    Ok(())
}

fn check_rotation(
    op: &'static str,
    arg: &'static str,
    x_thn: &Tensor,
    rotation: &Rotation,
    positions_t: &[u32],
) -> Result<()> {
    let [t, _, n] = check::dims(op, arg, x_thn, "[T,H,N]")?;
    check::len(op, "positions_t", positions_t.len(), t)?;
    let rotary_dims = 2 * rotation.inv_freq.len();
    if rotary_dims > n {
        return Err(Error::Shape {
            op,
            arg,
            expected: format!("[T,H,N] with N of at least the {rotary_dims} rotary dims"),
            got: format!("{:?}", x_thn.shape()),
        });
    }
    Ok(())
}

mod cpu {
    use super::Rotation;
    use crate::Tensor;
    use crate::cpu::{Out, for_rows, with_scratch};

    pub(super) fn rotate(
        x_thn: &mut Tensor,
        rotation: &Rotation,
        positions_t: &[u32],
        direction: f32,
    ) {
        let (head_dim, row_width) = match x_thn.shape() {
            [_, h, n] => (*n, h * n),
            _ => return,
        };
        let half = rotation.inv_freq.len();
        if half == 0 || row_width == 0 {
            return;
        }
        for_rows(
            [Out::update(x_thn, row_width)],
            [],
            #[inline(always)]
            |first_row, [x], []| {
                with_scratch(
                    2 * half,
                    #[inline(always)]
                    |scratch| {
                        let (cos, sin) = scratch.split_at_mut(half);
                        for (row, x) in x.chunks_exact_mut(row_width).enumerate() {
                            let position = positions_t[first_row + row] as f32;
                            let angles = cos.iter_mut().zip(&mut *sin).zip(&rotation.inv_freq);
                            for ((cos, sin), inv_freq) in angles {
                                let angle = position * inv_freq;
                                *cos = angle.cos();
                                *sin = direction * angle.sin();
                            }
                            for head in x.chunks_exact_mut(head_dim) {
                                let (low, rest) = head.split_at_mut(half);
                                let pairs = low.iter_mut().zip(&mut rest[..half]);
                                for ((a, b), (cos, sin)) in pairs.zip(cos.iter().zip(&*sin)) {
                                    (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
                                }
                            }
                        }
                    },
                );
            },
        );
    }
}

mod cuda {
    use super::Rotation;
    use crate::cuda::sources::ROPE;
    use crate::cuda::{Args, Cuda, Grid};
    use crate::ops::rows;
    use crate::{Result, Tensor};

    const THREADS: u32 = 128;
    /// Pairs and heads of a thread, as rope.cu has them.
    const PAIRS: usize = 8;
    const HEADS: usize = 4;

    pub(super) fn rotate(
        cuda: Cuda,
        x_thn: &mut Tensor,
        rotation: &Rotation,
        positions_t: &[u32],
        direction: f32,
    ) -> Result<()> {
        let half = rotation.inv_freq.len();
        let &[t, h, n] = x_thn.shape() else {
            return Ok(());
        };
        if half == 0 || x_thn.numel() == 0 {
            return Ok(());
        }
        let inv_freq: Vec<u32> = rotation.inv_freq.iter().map(|x| x.to_bits()).collect();
        let n_threads = t * half.div_ceil(PAIRS) * h.div_ceil(HEADS);
        let kernel = rows::instance(["rope_turn_bf16", "rope_turn_any"], &[x_thn], &[half, n]);
        let args = Args::new()
            .view_mut(x_thn)
            .pointer(cuda.upload(&inv_freq)?)
            .pointer(cuda.upload(positions_t)?)
            .u32(t)
            .u32(h)
            .u32(n)
            .u32(half)
            .f32(direction);
        cuda.launch(&ROPE, kernel, Grid::each(n_threads, THREADS), args)
    }
}

pub(crate) mod examples {
    use super::Rotation;
    use crate::DType::{self, Bf16, F32};
    use crate::Tensor;
    use crate::example::{Example, Sizes};

    pub(crate) fn compared() -> Vec<Example> {
        let mut all = Vec::new();
        for dtype in [F32, Bf16] {
            for (shape, rotary_dims) in [
                ([1, 16, 256], 64),
                ([70, 4, 256], 64),
                ([33, 24, 256], 64),
                ([9, 2, 128], 128),
                ([7, 3, 64], 16),
                ([5, 1, 10], 6),
                ([4, 5, 24], 10),
            ] {
                // Two documents, the second far into its text.
                let position = |t: u32| if t < 3 { t } else { 977 * (t - 3) };
                let positions: Vec<u32> = (0..shape[0] as u32).map(position).collect();
                let rotation = Rotation::new(1e7, rotary_dims);
                for (name, pass) in PASSES {
                    let (rotation, positions) = (rotation.clone(), positions.clone());
                    let example = example(name, shape, rotary_dims, dtype);
                    all.push(example.run(move |[x], []| pass(x, &rotation, &positions)));
                }
            }
        }
        all
    }

    pub(crate) fn timed(sizes: &Sizes) -> Vec<Example> {
        let (t, [h, _, n], r) = (sizes.n_tokens, sizes.attention, sizes.rotary_dims);
        let rotation = Rotation::new(sizes.rope_theta, r);
        let positions: Vec<u32> = (0..t as u32).collect();
        let example = example("rope/forward", [t, h, n], r, sizes.dtype);
        // Only the dims that turn are touched.
        let bytes = example.bytes() * r as f64 / n as f64;
        let example = example.bytes_at_least(bytes);
        vec![example.run(move |[x], []| super::forward(x, &rotation, &positions))]
    }

    type Pass = fn(&mut Tensor, &Rotation, &[u32]) -> crate::Result<()>;
    const PASSES: [(&str, Pass); 2] = [
        ("rope/forward", super::forward),
        ("rope/backward", super::backward),
    ];

    fn example(name: &'static str, [t, h, n]: [usize; 3], r: usize, dtype: DType) -> Example {
        let example = Example::new(name, format!("t{t}_h{h}_n{n}_r{r}"));
        example.updated("x", &[t, h, n], dtype)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::DType;
    use crate::ops::testing::{STORAGES, assert_close, dot, f64s, gradient, tensor};

    /// Angles from f32 frequencies as stored, everything after in f64.
    fn define(x: &[f64], shape: [usize; 3], rotation: &Rotation, positions: &[u32]) -> Vec<f64> {
        let [_, h, n] = shape;
        let half = rotation.inv_freq.len();
        let mut out = x.to_vec();
        for (row, out) in out.chunks_mut(n).enumerate() {
            for i in 0..half {
                let angle = (positions[row / h] as f32 * rotation.inv_freq[i]) as f64;
                let (a, b) = (x[row * n + i], x[row * n + i + half]);
                out[i] = a * angle.cos() - b * angle.sin();
                out[i + half] = b * angle.cos() + a * angle.sin();
            }
        }
        out
    }

    #[test]
    fn inverse_frequencies_are_powers_of_theta() {
        let rotation = Rotation::new(1e7, 64);
        assert_eq!(rotation.inv_freq.len(), 32);
        assert_eq!(rotation.inv_freq[0], 1.0);
        for (i, got) in rotation.inv_freq.iter().enumerate() {
            let want = 1e7f64.powf(-2.0 * i as f64 / 64.0);
            assert!((*got as f64 / want - 1.0).abs() < 2e-7, "{i}");
        }
    }

    #[test]
    fn forward_agrees_with_definition_far_into_a_document() {
        for (dtype, tolerance) in STORAGES {
            for (shape, rotary_dims) in [([5, 1, 2], 2), ([7, 3, 10], 6), ([40, 4, 64], 16)] {
                let rotation = Rotation::new(1e7, rotary_dims);
                let positions: Vec<u32> = (0..shape[0] as u32).map(|t| t * 6_007).collect();
                let x = tensor(&shape, 1, dtype);
                let mut out = x.clone();
                forward(&mut out, &rotation, &positions).unwrap();
                let want = define(&f64s(&x), shape, &rotation, &positions);
                assert_close("out", &out, &want, tolerance);
            }
        }
    }

    #[test]
    fn backward_agrees_with_differences() {
        for (dtype, tolerance) in STORAGES {
            let shape = [4, 2, 9];
            let rotation = Rotation::new(1e4, 6);
            let positions = [0, 1, 0, 3];
            let d_out = tensor(&shape, 1, dtype);
            let mut d_x = d_out.clone();
            backward(&mut d_x, &rotation, &positions).unwrap();
            let at = [f64s(&tensor(&shape, 2, DType::F32))];
            let loss =
                |x: &[Vec<f64>]| dot(&f64s(&d_out), &define(&x[0], shape, &rotation, &positions));
            assert_close("d_x", &d_x, &gradient(&at, 0, loss), tolerance);
        }
    }

    #[test]
    fn position_zero_changes_nothing() {
        let x = tensor(&[1, 2, 8], 1, DType::F32);
        let mut out = x.clone();
        forward(&mut out, &Rotation::new(1e7, 4), &[0]).unwrap();
        assert_eq!(out, x);
    }

    #[test]
    fn wrong_arguments_are_refused() {
        let mut x = tensor(&[3, 2, 8], 1, DType::F32);
        let got = forward(&mut x, &Rotation::new(1e7, 4), &[0, 1]);
        assert!(matches!(
            got,
            Err(Error::Shape {
                arg: "positions_t",
                ..
            })
        ));
        let got = forward(&mut x, &Rotation::new(1e7, 10), &[0, 1, 2]);
        assert!(matches!(got, Err(Error::Shape { arg: "x_thn", .. })));
    }
}
