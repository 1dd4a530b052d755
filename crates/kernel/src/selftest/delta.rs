//! The gated delta rule in chunks and in single steps, with the decays and document lengths at which it is known to break.

use super::{Check, Tolerance};
use crate::ops::{gated_delta_rule, gated_delta_step};
use crate::{DType, Result, Tensor};

/// bf16 operands of matrix products, also behind outputs that are stored as f32.
const ROUNDED: Tolerance = Tolerance {
    f32: 1e-2,
    bf16: 1e-2,
};

/// One-token documents, ones that end at, before and behind the end of a chunk, an empty one.
const LENGTHS: &[usize] = &[1, 63, 0, 64, 65, 3, 130, 1, 2];
const USUAL: [f32; 2] = [-0.5, 0.0];

pub(super) fn rule(check: &mut Check) -> Result<()> {
    // Value heads, key heads, key dim, value dim.
    for dims in [
        [2, 2, 32, 32],
        [4, 2, 64, 64],
        [3, 1, 32, 64],
        [2, 1, 128, 128],
        [1, 1, 256, 40],
        [1, 1, 17, 5],
    ] {
        both_passes(check, LENGTHS, dims, USUAL, DType::F32)?;
    }
    for dims in [
        [2, 2, 128, 128],
        [4, 2, 128, 128],
        [6, 2, 128, 128],
        [4, 2, 32, 32],
        [2, 1, 64, 256],
    ] {
        both_passes(check, LENGTHS, dims, USUAL, DType::Bf16)?;
    }
    // The heads of a 4B model, and one document of many chunks.
    both_passes(check, &[90, 40], [32, 16, 128, 128], USUAL, DType::Bf16)?;
    both_passes(check, &[1000], [2, 1, 128, 128], [-1e-2, 0.0], DType::Bf16)?;
    for dtype in [DType::F32, DType::Bf16] {
        for gates in [
            // So slow that whatever leaks into the next document stays.
            [-1e-4, -1e-5],
            [-20.0, 0.0],
            [-50.0, -15.0],
            [-1e4, -1e3],
        ] {
            both_passes(check, &[70, 150, 5], [2, 1, 128, 128], gates, dtype)?;
        }
    }
    zero_rows(check)?;
    with_state(check)
}

pub(super) fn step(check: &mut Check) -> Result<()> {
    for dtype in [DType::F32, DType::Bf16] {
        for (n, dims) in [
            (1, [32, 16, 128, 128]),
            (3, [3, 1, 128, 128]),
            (2, [4, 2, 32, 32]),
            (2, [2, 1, 64, 40]),
            (2, [2, 2, 5, 7]),
            (1, [1, 1, 256, 33]),
        ] {
            let [h, _, k, v] = dims;
            let case = Case::new(check, n, dims, [-20.0, 0.0], dtype);
            let mut outputs = vec![("out", Tensor::poison(&[n, h, v], dtype))];
            for _ in 0..n {
                outputs.push(("state", check.tensor(&[h, k, v], DType::F32)));
            }
            check.both(
                &format!("{dtype} {n} sequences, {}", heads(dims)),
                Tolerance::USUAL,
                outputs,
                &case.inputs(),
                |out, ins| {
                    let [out, states @ ..] = out else {
                        unreachable!("the first output is `out`")
                    };
                    let mut states: Vec<&mut Tensor> = states.iter_mut().collect();
                    gated_delta_step::forward(
                        out,
                        &mut states,
                        &ins[0],
                        &ins[1],
                        &ins[2],
                        &ins[3],
                        &ins[4],
                    )
                },
            )?;
        }
    }
    Ok(())
}

struct Case {
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    d_out: Tensor,
}

impl Case {
    fn new(
        check: &mut Check,
        t: usize,
        [h, g, k, v]: [usize; 4],
        [low, high]: [f32; 2],
        dtype: DType,
    ) -> Case {
        let mut unit = |scale: f32| {
            let mut x = check.tensor(&[t, g, k], DType::F32);
            for row in x.f32s_mut().chunks_mut(k) {
                let norm = row.iter().map(|x| x * x).sum::<f32>().sqrt();
                row.iter_mut().for_each(|x| *x *= scale / norm);
            }
            x.to_dtype(dtype)
        };
        Case {
            q: unit(1.0 / (k as f32).sqrt()),
            k: unit(1.0),
            v: check.tensor(&[t, h, v], dtype),
            g: check.range(&[t, h], DType::F32, low, high),
            beta: check.range(&[t, h], DType::F32, 0.0, 1.0),
            d_out: check.tensor(&[t, h, v], dtype),
        }
    }

    fn inputs(&self) -> [&Tensor; 6] {
        [&self.q, &self.k, &self.v, &self.g, &self.beta, &self.d_out]
    }

    fn run(&self, check: &mut Check, name: &str, cu_seqlens: &[u32]) -> Result<()> {
        let dtype = self.v.dtype();
        let tolerance = match dtype {
            DType::F32 => Tolerance::USUAL,
            DType::Bf16 => ROUNDED,
        };
        let like = |x: &Tensor| Tensor::poison(x.shape(), x.dtype());
        check.both(
            name,
            tolerance,
            vec![("out", like(&self.v))],
            &self.inputs(),
            |out, ins| {
                gated_delta_rule::forward(
                    &mut out[0],
                    &ins[0],
                    &ins[1],
                    &ins[2],
                    &ins[3],
                    &ins[4],
                    cu_seqlens,
                )
            },
        )?;
        check.both(
            name,
            tolerance,
            vec![
                ("d_q", like(&self.q)),
                ("d_k", like(&self.k)),
                ("d_v", like(&self.v)),
                ("d_g", like(&self.g)),
                ("d_beta", like(&self.beta)),
            ],
            &self.inputs(),
            |out, ins| {
                let [d_q, d_k, d_v, d_g, d_beta] = out else {
                    unreachable!("five outputs were given")
                };
                gated_delta_rule::backward(
                    d_q, d_k, d_v, d_g, d_beta, &ins[5], &ins[0], &ins[1], &ins[2], &ins[3],
                    &ins[4], cu_seqlens,
                )
            },
        )
    }
}

fn heads([h, g, k, v]: [usize; 4]) -> String {
    format!("{h}:{g} heads of {k}x{v}")
}

fn offsets(lengths: &[usize]) -> Vec<u32> {
    let mut end = 0;
    let ends = lengths.iter().map(|length| {
        end += *length as u32;
        end
    });
    std::iter::once(0).chain(ends).collect()
}

fn both_passes(
    check: &mut Check,
    lengths: &[usize],
    dims: [usize; 4],
    gates: [f32; 2],
    dtype: DType,
) -> Result<()> {
    let case = Case::new(check, lengths.iter().sum(), dims, gates, dtype);
    let name = format!(
        "{dtype} {} documents, {}, gates {gates:?}",
        lengths.len(),
        heads(dims)
    );
    case.run(check, &name, &offsets(lengths))
}

/// Rows of zeros in everything, and tokens that write nothing.
fn zero_rows(check: &mut Check) -> Result<()> {
    for dtype in [DType::F32, DType::Bf16] {
        let (h, width) = (2, 128);
        let mut case = Case::new(check, 150, [h, 1, width, width], USUAL, DType::F32);
        for row in [0, 1, 5, 63, 64, 70, 149] {
            for x in [&mut case.q, &mut case.k] {
                x.f32s_mut()[row * width..][..width].fill(0.0);
            }
            for x in [&mut case.v, &mut case.d_out] {
                x.f32s_mut()[row * h * width..][..h * width].fill(0.0);
            }
            case.beta.f32s_mut()[(row + 3) % 150 * h..][..h].fill(0.0);
        }
        for x in [&mut case.q, &mut case.k, &mut case.v, &mut case.d_out] {
            *x = x.to_dtype(dtype);
        }
        case.run(check, &format!("{dtype} zero rows"), &[0, 70, 150])?;
    }
    Ok(())
}

fn with_state(check: &mut Check) -> Result<()> {
    for (dtype, dims) in [
        (DType::F32, [4, 2, 32, 64]),
        (DType::F32, [2, 1, 128, 128]),
        (DType::Bf16, [4, 2, 32, 64]),
        (DType::Bf16, [6, 2, 128, 128]),
    ] {
        let [h, _, k, v] = dims;
        let tolerance = match dtype {
            DType::F32 => Tolerance::USUAL,
            DType::Bf16 => ROUNDED,
        };
        for t in [1, 63, 64, 200] {
            let case = Case::new(check, t, dims, [-0.05, 0.0], dtype);
            let state = check.tensor(&[h, k, v], DType::F32);
            check.both(
                &format!("{dtype} {t} tokens from a state, {}", heads(dims)),
                tolerance,
                vec![("out", Tensor::poison(&[t, h, v], dtype)), ("state", state)],
                &case.inputs(),
                |out, ins| {
                    let [out, state] = out else {
                        unreachable!("two outputs were given")
                    };
                    gated_delta_rule::forward_with_state(
                        out, state, &ins[0], &ins[1], &ins[2], &ins[3], &ins[4],
                    )
                },
            )?;
        }
    }
    Ok(())
}
