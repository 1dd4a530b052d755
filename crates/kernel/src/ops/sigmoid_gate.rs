//! out = x · sigmoid(gate), element by element: the output gate of full attention.
//!
//! Gradients: d_x = d_out s, d_gate = d_out x s (1 - s) with s = sigmoid(gate).
//! Source: `Qwen3_5Attention` of transformers 5.17 (`attn_output_gate`).

use super::check;
use crate::{Device, Result, Tensor};

/// `out` assigned. Shapes: any, all alike.
///
/// # Errors
/// [`crate::Error::Shape`] where shapes differ.
pub fn forward(out: &mut Tensor, x: &Tensor, gate: &Tensor) -> Result<()> {
    const OP: &str = "sigmoid_gate::forward";
    check::shape(OP, "x", x, out.shape())?;
    check::shape(OP, "gate", gate, out.shape())?;
    match check::device(OP, out, &[("x", x), ("gate", gate)])? {
        Device::Cpu => cpu::forward(out, x, gate),
        Device::Cuda(cuda) => cuda::forward(cuda, out, x, gate)?,
    }
    Ok(())
}

/// d_x, d_gate assigned. Shapes: any, all alike.
///
/// # Errors
/// [`crate::Error::Shape`] where shapes differ.
pub fn backward(
    d_x: &mut Tensor,
    d_gate: &mut Tensor,
    d_out: &Tensor,
    x: &Tensor,
    gate: &Tensor,
) -> Result<()> {
    const OP: &str = "sigmoid_gate::backward";
    check::shape(OP, "d_gate", d_gate, d_x.shape())?;
    check::shape(OP, "d_out", d_out, d_x.shape())?;
    check::shape(OP, "x", x, d_x.shape())?;
    check::shape(OP, "gate", gate, d_x.shape())?;
    let others = [
        ("d_gate", &*d_gate),
        ("d_out", d_out),
        ("x", x),
        ("gate", gate),
    ];
    match check::device(OP, d_x, &others)? {
        Device::Cpu => cpu::backward(d_x, d_gate, d_out, x, gate),
        Device::Cuda(cuda) => cuda::backward(cuda, d_x, d_gate, d_out, x, gate)?,
    }
    Ok(())
}

mod cpu {
    use crate::Tensor;
    use crate::cpu::math::sigmoid;
    use crate::cpu::{In, Out, for_rows};

    pub(super) fn forward(out: &mut Tensor, x: &Tensor, gate: &Tensor) {
        for_rows(
            [Out::assign(out, 1)],
            [In::new(x, 1), In::new(gate, 1)],
            #[inline(always)]
            |_, [out], [x, gate]| {
                for ((out, x), gate) in out.iter_mut().zip(x).zip(gate) {
                    *out = x * sigmoid(*gate);
                }
            },
        );
    }

    pub(super) fn backward(
        d_x: &mut Tensor,
        d_gate: &mut Tensor,
        d_out: &Tensor,
        x: &Tensor,
        gate: &Tensor,
    ) {
        for_rows(
            [Out::assign(d_x, 1), Out::assign(d_gate, 1)],
            [In::new(d_out, 1), In::new(x, 1), In::new(gate, 1)],
            #[inline(always)]
            |_, [d_x, d_gate], [d_out, x, gate]| {
                let outs = d_x.iter_mut().zip(d_gate);
                let ins = d_out.iter().zip(x).zip(gate);
                for ((d_x, d_gate), ((d_out, x), gate)) in outs.zip(ins) {
                    let s = sigmoid(*gate);
                    *d_x = d_out * s;
                    *d_gate = d_out * x * (s * (1.0 - s));
                }
            },
        );
    }
}

mod cuda {
    use crate::cuda::sources::SIGMOID_GATE;
    use crate::cuda::{Args, Cuda};
    use crate::ops::rows;
    use crate::{Result, Tensor};

    pub(super) fn forward(cuda: Cuda, out: &mut Tensor, x: &Tensor, gate: &Tensor) -> Result<()> {
        let n = x.numel();
        let names = ["sigmoid_gate_forward_bf16", "sigmoid_gate_forward_any"];
        let kernel = rows::instance(names, &[out, x, gate], &[n]);
        let args = Args::new().view_mut(out).view(x).view(gate).u64(n as u64);
        cuda.launch(&SIGMOID_GATE, kernel, rows::eights(n), args)
    }

    pub(super) fn backward(
        cuda: Cuda,
        d_x: &mut Tensor,
        d_gate: &mut Tensor,
        d_out: &Tensor,
        x: &Tensor,
        gate: &Tensor,
    ) -> Result<()> {
        let n = x.numel();
        let names = ["sigmoid_gate_backward_bf16", "sigmoid_gate_backward_any"];
        let kernel = rows::instance(names, &[d_x, d_gate, d_out, x, gate], &[n]);
        let args = Args::new()
            .view_mut(d_x)
            .view_mut(d_gate)
            .view(d_out)
            .view(x)
            .view(gate)
            .u64(n as u64);
        cuda.launch(&SIGMOID_GATE, kernel, rows::eights(n), args)
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
        let [h, _, n] = sizes.attention;
        let shape = [sizes.n_tokens, h, n];
        let types = [sizes.dtype; 2];
        vec![forward(&shape, types), backward(&shape, types)]
    }

    fn example(name: &'static str, shape: &[usize]) -> Example {
        let label = match shape {
            [t, h, n] => format!("t{t}_h{h}_n{n}"),
            _ => format!("n{}", shape.iter().product::<usize>()),
        };
        Example::new(name, label)
    }

    pub(super) fn forward(shape: &[usize], [x_type, out_type]: [DType; 2]) -> Example {
        example("sigmoid_gate/forward", shape)
            .out("out", shape, out_type)
            .input_in("x", shape, x_type, [-1.0, 1.0])
            .input_in("gate", shape, x_type, [-4.0, 4.0])
            .run(|[out], [x, gate]| super::forward(out, x, gate))
    }

    pub(super) fn backward(shape: &[usize], [x_type, d_type]: [DType; 2]) -> Example {
        example("sigmoid_gate/backward", shape)
            .out("d_x", shape, d_type)
            .out("d_gate", shape, d_type)
            .input("d_out", shape, d_type)
            .input_in("x", shape, x_type, [-1.0, 1.0])
            .input_in("gate", shape, x_type, [-4.0, 4.0])
            .run(|[d_x, d_gate], [d_out, x, gate]| super::backward(d_x, d_gate, d_out, x, gate))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::example::PAIRS;
    use crate::ops::testing::{assert_agrees, dot, gradient, tensor};

    fn define(x: &[f64], gate: &[f64]) -> Vec<f64> {
        x.iter()
            .zip(gate)
            .map(|(x, g)| x / (1.0 + (-g).exp()))
            .collect()
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
            let example = examples::backward(&[2, 3, 17], types);
            assert_agrees(&example, |ins| {
                let loss = |at: &[Vec<f64>]| dot(&ins[0], &define(&at[0], &at[1]));
                [0, 1].map(|which| gradient(&ins[1..], which, loss)).into()
            });
        }
    }

    #[test]
    fn differing_shapes_are_refused() {
        let a = tensor(&[6], 1, crate::DType::F32);
        let b = tensor(&[5], 1, crate::DType::F32);
        assert!(forward(&mut a.clone(), &a, &b).is_err());
        assert!(backward(&mut a.clone(), &mut b.clone(), &a, &a, &a).is_err());
    }
}
