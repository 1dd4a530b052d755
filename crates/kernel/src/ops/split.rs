//! Takes fused projections apart: query and gate of each head, forward and backward; q, k and v of the delta rule, in single steps.
//!
//! Copies, exact but for a change of storage type. Source: `Qwen3_5Attention` and `Qwen3_5GatedDeltaNet` of transformers 5.17.

use super::check;
use crate::{Device, Result, Tensor};

/// Each head's 2N columns are its query, then its gate. Both assigned. Shapes: q_thn, gate_thn [T,H,N]; qg_th2n [T,H,2N].
///
/// # Errors
/// [`crate::Error::Shape`] where shapes disagree.
pub fn query_gate(q_thn: &mut Tensor, gate_thn: &mut Tensor, qg_th2n: &Tensor) -> Result<()> {
    const OP: &str = "split::query_gate";
    let [t, h, n] = check::dims(OP, "q_thn", q_thn, "[T,H,N]")?;
    check::shape(OP, "gate_thn", gate_thn, &[t, h, n])?;
    check::shape(OP, "qg_th2n", qg_th2n, &[t, h, 2 * n])?;
    match check::device(OP, q_thn, &[("gate_thn", gate_thn), ("qg_th2n", qg_th2n)])? {
        Device::Cpu => cpu::split([q_thn, gate_thn], [n, n], qg_th2n),
        Device::Cuda(cuda) => cuda::split(cuda, [q_thn, gate_thn], [n, n], qg_th2n)?,
    }
    Ok(())
}

/// d_qg assigned from d_q and d_gate. Shapes as in [`query_gate`].
///
/// # Errors
/// [`crate::Error::Shape`] where shapes disagree.
pub fn query_gate_backward(
    d_qg_th2n: &mut Tensor,
    d_q_thn: &Tensor,
    d_gate_thn: &Tensor,
) -> Result<()> {
    const OP: &str = "split::query_gate_backward";
    let [t, h, n] = check::dims(OP, "d_q_thn", d_q_thn, "[T,H,N]")?;
    check::shape(OP, "d_gate_thn", d_gate_thn, &[t, h, n])?;
    check::shape(OP, "d_qg_th2n", d_qg_th2n, &[t, h, 2 * n])?;
    let others = [("d_q_thn", d_q_thn), ("d_gate_thn", d_gate_thn)];
    match check::device(OP, d_qg_th2n, &others)? {
        Device::Cpu => cpu::join(d_qg_th2n, [d_q_thn, d_gate_thn], [n, n]),
        Device::Cuda(cuda) => cuda::join(cuda, d_qg_th2n, [d_q_thn, d_gate_thn], [n, n])?,
    }
    Ok(())
}

/// The convolved row is q, then k, then v, each with all its heads. All three assigned.
/// Shapes: q_tgk, k_tgk [T,G,K]; v_thv [T,H,V]; qkv_tc [T, 2·G·K + H·V].
///
/// # Errors
/// [`crate::Error::Shape`] where shapes disagree.
pub fn qkv(
    q_tgk: &mut Tensor,
    k_tgk: &mut Tensor,
    v_thv: &mut Tensor,
    qkv_tc: &Tensor,
) -> Result<()> {
    const OP: &str = "split::qkv";
    let [t, g, k] = check::dims(OP, "q_tgk", q_tgk, "[T,G,K]")?;
    let [v_t, h, v] = check::dims(OP, "v_thv", v_thv, "[T,H,V]")?;
    check::shape(OP, "k_tgk", k_tgk, &[t, g, k])?;
    check::len(OP, "v_thv", v_t, t)?;
    check::shape(OP, "qkv_tc", qkv_tc, &[t, 2 * g * k + h * v])?;
    let widths = [g * k, g * k, h * v];
    let others = [("k_tgk", &*k_tgk), ("v_thv", v_thv), ("qkv_tc", qkv_tc)];
    match check::device(OP, q_tgk, &others)? {
        Device::Cpu => cpu::split([q_tgk, k_tgk, v_thv], widths, qkv_tc),
        Device::Cuda(cuda) => cuda::split(cuda, [q_tgk, k_tgk, v_thv], widths, qkv_tc)?,
    }
    Ok(())
}

mod cpu {
    use crate::Tensor;
    use crate::cpu::{In, Out, for_rows};

    /// Deals each row of `whole` out to the parts, `widths` elements each.
    pub(super) fn split<const N: usize>(
        parts: [&mut Tensor; N],
        widths: [usize; N],
        whole: &Tensor,
    ) {
        let total: usize = widths.iter().sum();
        let mut i = 0;
        let parts = parts.map(|part| {
            i += 1;
            Out::assign(part, widths[i - 1])
        });
        for_rows(
            parts,
            [In::new(whole, total)],
            #[inline(always)]
            |_, parts, [whole]| {
                let mut start = 0;
                for (part, width) in parts.into_iter().zip(widths) {
                    let rows = part.chunks_exact_mut(width).zip(whole.chunks_exact(total));
                    for (part, whole) in rows {
                        part.copy_from_slice(&whole[start..start + width]);
                    }
                    start += width;
                }
            },
        );
    }

    /// The reverse of [`split`].
    pub(super) fn join<const N: usize>(
        whole: &mut Tensor,
        parts: [&Tensor; N],
        widths: [usize; N],
    ) {
        let total: usize = widths.iter().sum();
        let mut i = 0;
        let parts = parts.map(|part| {
            i += 1;
            In::new(part, widths[i - 1])
        });
        for_rows(
            [Out::assign(whole, total)],
            parts,
            #[inline(always)]
            |_, [whole], parts| {
                let mut start = 0;
                for (part, width) in parts.into_iter().zip(widths) {
                    let rows = whole.chunks_exact_mut(total).zip(part.chunks_exact(width));
                    for (whole, part) in rows {
                        whole[start..start + width].copy_from_slice(part);
                    }
                    start += width;
                }
            },
        );
    }
}

mod cuda {
    use crate::cuda::sources::SPLIT;
    use crate::cuda::{Args, Cuda, Grid};
    use crate::ops::rows;
    use crate::{Result, Tensor};

    const THREADS: u32 = 256;
    /// The kernels take up to three parts.
    const PARTS: usize = 3;

    pub(super) fn split<const N: usize>(
        cuda: Cuda,
        parts: [&mut Tensor; N],
        widths: [usize; N],
        whole: &Tensor,
    ) -> Result<()> {
        let names = ["split_deal_bf16", "split_deal_any"];
        let (mut args, mut tensors) = (Args::new(), vec![whole]);
        let parts = parts.map(|part| &*part);
        for idx in 0..PARTS {
            args = args.view_or_null(parts.get(idx).copied());
        }
        tensors.extend(parts);
        let args = args.view(whole);
        launch(cuda, names, args, &tensors, &widths)
    }

    pub(super) fn join<const N: usize>(
        cuda: Cuda,
        whole: &mut Tensor,
        parts: [&Tensor; N],
        widths: [usize; N],
    ) -> Result<()> {
        let names = ["split_join_bf16", "split_join_any"];
        let mut args = Args::new().view_mut(whole);
        for idx in 0..PARTS {
            args = args.view_or_null(parts.get(idx).copied());
        }
        let mut tensors = vec![&*whole];
        tensors.extend(parts);
        launch(cuda, names, args, &tensors, &widths)
    }

    /// `tensors`: the whole first.
    fn launch(
        cuda: Cuda,
        names: [&'static str; 2],
        mut args: Args,
        tensors: &[&Tensor],
        widths: &[usize],
    ) -> Result<()> {
        let kernel = rows::instance(names, tensors, widths);
        for idx in 0..PARTS {
            args = args.u32(widths.get(idx).copied().unwrap_or(0));
        }
        let n = tensors[0].numel();
        let n_steps = if kernel == names[0] { n / 8 } else { n };
        let args = args.u64(n_steps as u64);
        cuda.launch(&SPLIT, kernel, Grid::each(n_steps, THREADS), args)
    }
}

pub(crate) mod examples {
    use crate::DType;
    use crate::example::{Example, PAIRS, Sizes, Tolerance};

    pub(crate) fn compared() -> Vec<Example> {
        let mut all = Vec::new();
        for types in PAIRS {
            for shape in [[1, 8, 256], [37, 24, 256], [9, 3, 20]] {
                all.push(query_gate(shape, types));
                all.push(query_gate_backward(shape, types));
            }
            for shape in [
                [1, 16, 128, 16, 128],
                [41, 16, 128, 48, 128],
                [7, 2, 12, 6, 10],
            ] {
                all.push(qkv(shape, types));
            }
        }
        let exact = |example: Example| example.tolerance(Tolerance::EXACT);
        all.into_iter().map(exact).collect()
    }

    pub(crate) fn timed(sizes: &Sizes) -> Vec<Example> {
        let [h, _, n] = sizes.attention;
        vec![query_gate([sizes.n_tokens, h, n], [sizes.dtype; 2])]
    }

    fn query_gate([t, h, n]: [usize; 3], [whole_type, part_type]: [DType; 2]) -> Example {
        Example::new("split/query_gate", format!("t{t}_h{h}_n{n}"))
            .out("q", &[t, h, n], part_type)
            .out("gate", &[t, h, n], part_type)
            .input("qg", &[t, h, 2 * n], whole_type)
            .run(|[q, gate], [qg]| super::query_gate(q, gate, qg))
    }

    fn query_gate_backward([t, h, n]: [usize; 3], [whole_type, part_type]: [DType; 2]) -> Example {
        Example::new("split/query_gate_backward", format!("t{t}_h{h}_n{n}"))
            .out("d_qg", &[t, h, 2 * n], whole_type)
            .input("d_q", &[t, h, n], part_type)
            .input("d_gate", &[t, h, n], part_type)
            .run(|[d_qg], [d_q, d_gate]| super::query_gate_backward(d_qg, d_q, d_gate))
    }

    fn qkv([t, g, k, h, v]: [usize; 5], [whole_type, part_type]: [DType; 2]) -> Example {
        Example::new("split/qkv", format!("t{t}_g{g}_h{h}_k{k}_v{v}"))
            .out("q", &[t, g, k], part_type)
            .out("k", &[t, g, k], part_type)
            .out("v", &[t, h, v], part_type)
            .input("qkv", &[t, 2 * g * k + h * v], whole_type)
            .run(|[q, k, v], [qkv]| super::qkv(q, k, v, qkv))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{STORAGES, tensor};
    use crate::{DType, Error};

    fn poison(shape: &[usize], dtype: DType) -> Tensor {
        Tensor::poison(shape, dtype)
    }

    #[test]
    fn query_and_gate_lie_side_by_side_in_each_head() {
        for (dtype, _) in STORAGES {
            let (t, h, n) = (37, 3, 20);
            let whole = tensor(&[t, h, 2 * n], 1, dtype);
            let (mut q, mut gate) = (poison(&[t, h, n], dtype), poison(&[t, h, n], dtype));
            query_gate(&mut q, &mut gate, &whole).unwrap();
            let (values, q_values, gate_values) =
                (whole.to_f32_vec(), q.to_f32_vec(), gate.to_f32_vec());
            for row in 0..t * h {
                assert_eq!(q_values[row * n..][..n], values[row * 2 * n..][..n]);
                assert_eq!(gate_values[row * n..][..n], values[row * 2 * n + n..][..n]);
            }
            let mut back = poison(&[t, h, 2 * n], dtype);
            query_gate_backward(&mut back, &q, &gate).unwrap();
            assert_eq!(back, whole);
        }
    }

    #[test]
    fn q_k_and_v_lie_one_after_the_other() {
        for (dtype, _) in STORAGES {
            let (t, g, k, h, v) = (41, 2, 12, 6, 10);
            let width = 2 * g * k + h * v;
            let whole = tensor(&[t, width], 1, dtype);
            let (mut q, mut key) = (poison(&[t, g, k], dtype), poison(&[t, g, k], dtype));
            let mut value = poison(&[t, h, v], dtype);
            qkv(&mut q, &mut key, &mut value, &whole).unwrap();
            let values = whole.to_f32_vec();
            for row in 0..t {
                let values = &values[row * width..][..width];
                assert_eq!(q.to_f32_vec()[row * g * k..][..g * k], values[..g * k]);
                assert_eq!(
                    key.to_f32_vec()[row * g * k..][..g * k],
                    values[g * k..2 * g * k]
                );
                assert_eq!(
                    value.to_f32_vec()[row * h * v..][..h * v],
                    values[2 * g * k..]
                );
            }
        }
    }

    #[test]
    fn wrong_widths_are_refused() {
        let mut part = poison(&[2, 3, 4], DType::F32);
        let whole = poison(&[2, 3, 9], DType::F32);
        let got = query_gate(&mut part.clone(), &mut part, &whole);
        assert!(matches!(got, Err(Error::Shape { arg: "qg_th2n", .. })));
        let short = poison(&[1, 3, 4], DType::F32);
        let got = qkv(&mut part.clone(), &mut part, &mut short.clone(), &whole);
        assert!(matches!(got, Err(Error::Shape { arg: "v_thv", .. })));
    }
}
