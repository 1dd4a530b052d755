//! SwiGLU: out = silu(gate) · up, element by element, with silu(x) = x / (1 + e^-x).
//!
//! Gradients: d_up = d_out silu(gate), d_gate = d_out up (s + gate s (1 - s)) with s = sigmoid(gate).
//! Source: arXiv 2002.05202; `Qwen3_5MLP` of transformers 5.17.

use super::check;
use crate::{Device, Result, Tensor};

/// `out` assigned. Shapes: all [T,F], or any other shape that the three share.
///
/// # Errors
/// [`crate::Error::Shape`] where shapes differ.
pub fn forward(out_tf: &mut Tensor, gate_tf: &Tensor, up_tf: &Tensor) -> Result<()> {
    const OP: &str = "swiglu::forward";
    check::shape(OP, "gate_tf", gate_tf, out_tf.shape())?;
    check::shape(OP, "up_tf", up_tf, out_tf.shape())?;
    match check::device(OP, out_tf, &[("gate_tf", gate_tf), ("up_tf", up_tf)])? {
        Device::Cpu => cpu::forward(out_tf, gate_tf, up_tf),
        Device::Cuda(cuda) => cuda::forward(cuda, out_tf, gate_tf, up_tf)?,
    }
    Ok(())
}

/// d_gate, d_up assigned. Shapes: all alike.
///
/// # Errors
/// [`crate::Error::Shape`] where shapes differ.
pub fn backward(
    d_gate_tf: &mut Tensor,
    d_up_tf: &mut Tensor,
    d_out_tf: &Tensor,
    gate_tf: &Tensor,
    up_tf: &Tensor,
) -> Result<()> {
    const OP: &str = "swiglu::backward";
    check::shape(OP, "d_up_tf", d_up_tf, d_gate_tf.shape())?;
    check::shape(OP, "d_out_tf", d_out_tf, d_gate_tf.shape())?;
    check::shape(OP, "gate_tf", gate_tf, d_gate_tf.shape())?;
    check::shape(OP, "up_tf", up_tf, d_gate_tf.shape())?;
    let others = [
        ("d_up_tf", &*d_up_tf),
        ("d_out_tf", d_out_tf),
        ("gate_tf", gate_tf),
        ("up_tf", up_tf),
    ];
    match check::device(OP, d_gate_tf, &others)? {
        Device::Cpu => cpu::backward(d_gate_tf, d_up_tf, d_out_tf, gate_tf, up_tf),
        Device::Cuda(cuda) => cuda::backward(cuda, d_gate_tf, d_up_tf, d_out_tf, gate_tf, up_tf)?,
    }
    Ok(())
}

mod cpu {
    use crate::Tensor;
    use crate::cpu::math::{sigmoid, silu};
    use crate::cpu::{In, Out, for_rows};

    pub(super) fn forward(out: &mut Tensor, gate: &Tensor, up: &Tensor) {
        for_rows(
            [Out::assign(out, 1)],
            [In::new(gate, 1), In::new(up, 1)],
            #[inline(always)]
            |_, [out], [gate, up]| {
                for ((out, gate), up) in out.iter_mut().zip(gate).zip(up) {
                    *out = silu(*gate) * up;
                }
            },
        );
    }

    pub(super) fn backward(
        d_gate: &mut Tensor,
        d_up: &mut Tensor,
        d_out: &Tensor,
        gate: &Tensor,
        up: &Tensor,
    ) {
        for_rows(
            [Out::assign(d_gate, 1), Out::assign(d_up, 1)],
            [In::new(d_out, 1), In::new(gate, 1), In::new(up, 1)],
            #[inline(always)]
            |_, [d_gate, d_up], [d_out, gate, up]| {
                let outs = d_gate.iter_mut().zip(d_up);
                let ins = d_out.iter().zip(gate).zip(up);
                for ((d_gate, d_up), ((d_out, gate), up)) in outs.zip(ins) {
                    let s = sigmoid(*gate);
                    *d_gate = d_out * up * (s * (1.0 + gate * (1.0 - s)));
                    *d_up = d_out * (gate * s);
                }
            },
        );
    }
}

mod cuda {
    use crate::cuda::sources::SWIGLU;
    use crate::cuda::{Args, Cuda};
    use crate::ops::rows;
    use crate::{Result, Tensor};

    pub(super) fn forward(cuda: Cuda, out: &mut Tensor, gate: &Tensor, up: &Tensor) -> Result<()> {
        let n = gate.numel();
        let names = ["swiglu_forward_bf16", "swiglu_forward_any"];
        let kernel = rows::instance(names, &[out, gate, up], &[n]);
        let args = Args::new().view_mut(out).view(gate).view(up).u64(n as u64);
        cuda.launch(&SWIGLU, kernel, rows::eights(n), args)
    }

    pub(super) fn backward(
        cuda: Cuda,
        d_gate: &mut Tensor,
        d_up: &mut Tensor,
        d_out: &Tensor,
        gate: &Tensor,
        up: &Tensor,
    ) -> Result<()> {
        let n = gate.numel();
        let names = ["swiglu_backward_bf16", "swiglu_backward_any"];
        let kernel = rows::instance(names, &[d_gate, d_up, d_out, gate, up], &[n]);
        let args = Args::new()
            .view_mut(d_gate)
            .view_mut(d_up)
            .view(d_out)
            .view(gate)
            .view(up)
            .u64(n as u64);
        cuda.launch(&SWIGLU, kernel, rows::eights(n), args)
    }
}

pub(crate) mod examples {
    use crate::DType;
    use crate::example::{ELEMENTS, Example, PAIRS, Sizes};

    pub(crate) fn compared() -> Vec<Example> {
        let mut all = Vec::new();
        for types in PAIRS {
            for n in ELEMENTS {
                all.push(forward(&[n], types));
                all.push(backward(&[n], types));
            }
        }
        all
    }

    pub(crate) fn timed(sizes: &Sizes) -> Vec<Example> {
        let shape = [sizes.n_tokens, sizes.feed_forward];
        let types = [sizes.dtype; 2];
        vec![forward(&shape, types), backward(&shape, types)]
    }

    fn example(name: &'static str, shape: &[usize]) -> Example {
        let label = match shape {
            [t, f] => format!("t{t}_f{f}"),
            _ => format!("n{}", shape.iter().product::<usize>()),
        };
        Example::new(name, label)
    }

    pub(super) fn forward(shape: &[usize], [x_type, out_type]: [DType; 2]) -> Example {
        example("swiglu/forward", shape)
            .out("out", shape, out_type)
            .input_in("gate", shape, x_type, [-4.0, 4.0])
            .input_in("up", shape, x_type, [-1.0, 1.0])
            .run(|[out], [gate, up]| super::forward(out, gate, up))
    }

    pub(super) fn backward(shape: &[usize], [x_type, d_type]: [DType; 2]) -> Example {
        example("swiglu/backward", shape)
            .out("d_gate", shape, d_type)
            .out("d_up", shape, d_type)
            .input("d_out", shape, d_type)
            .input_in("gate", shape, x_type, [-4.0, 4.0])
            .input_in("up", shape, x_type, [-1.0, 1.0])
            .run(|[d_gate, d_up], [d_out, gate, up]| super::backward(d_gate, d_up, d_out, gate, up))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::example::PAIRS;
    use crate::ops::testing::{assert_agrees, dot, gradient, tensor};

    fn define(gate: &[f64], up: &[f64]) -> Vec<f64> {
        let silu = |x: f64| x / (1.0 + (-x).exp());
        gate.iter().zip(up).map(|(g, u)| silu(*g) * u).collect()
    }

    #[test]
    fn forward_agrees_with_definition() {
        for types in PAIRS {
            for shape in [&[1, 1][..], &[3, 7], &[31, 4, 260], &[129, 1031]] {
                let example = examples::forward(shape, types);
                assert_agrees(&example, |ins| vec![define(&ins[0], &ins[1])]);
            }
        }
    }

    #[test]
    fn backward_agrees_with_differences() {
        for types in PAIRS {
            let example = examples::backward(&[3, 37], types);
            assert_agrees(&example, |ins| {
                let loss = |at: &[Vec<f64>]| dot(&ins[0], &define(&at[0], &at[1]));
                [0, 1].map(|which| gradient(&ins[1..], which, loss)).into()
            });
        }
    }

    #[test]
    fn differing_shapes_are_refused() {
        let (a, b) = (
            tensor(&[2, 3], 1, crate::DType::F32),
            tensor(&[3, 2], 1, crate::DType::F32),
        );
        let error = forward(&mut a.clone(), &a, &b).unwrap_err();
        assert_eq!(
            error.to_string(),
            "swiglu::forward: expected [2, 3] for `up_tf`, got [3, 2]"
        );
    }
}
