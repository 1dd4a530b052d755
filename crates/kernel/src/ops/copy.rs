//! Copy with a change of storage type: bf16 rounds to nearest even.

use super::check;
use crate::{Device, Result, Tensor};

/// Elements `src_from..src_from + n` of `src` to `dst_from..` of `dst`, both taken as flat; assigned.
///
/// # Errors
/// [`crate::Error::Shape`] where a range ends beyond its tensor.
pub fn forward(
    dst: &mut Tensor,
    dst_from: usize,
    src: &Tensor,
    src_from: usize,
    n: usize,
) -> Result<()> {
    const OP: &str = "copy::forward";
    for (arg, tensor, end) in [("dst", &*dst, dst_from + n), ("src", src, src_from + n)] {
        if end > tensor.numel() {
            let expected = format!("at least {end} elements");
            return Err(check::shape_error(OP, arg, tensor, expected));
        }
    }
    match check::device(OP, dst, &[("src", src)])? {
        Device::Cpu => cpu::forward(dst, dst_from, src, src_from, n),
        Device::Cuda(cuda) => cuda::forward(cuda, dst, dst_from, src, src_from, n)?,
    }
    Ok(())
}

mod cpu {
    use crate::Tensor;
    use crate::bf16;
    use crate::dtype::Element;
    use crate::tensor::Storage;

    pub(super) fn forward(
        dst: &mut Tensor,
        dst_from: usize,
        src: &Tensor,
        src_from: usize,
        n: usize,
    ) {
        let to = dst_from..dst_from + n;
        let from = src_from..src_from + n;
        match (dst.storage_mut(), src.storage()) {
            (Storage::F32(dst), Storage::F32(src)) => dst[to].copy_from_slice(&src[from]),
            (Storage::Bf16(dst), Storage::Bf16(src)) => dst[to].copy_from_slice(&src[from]),
            (Storage::F32(dst), Storage::Bf16(src)) => {
                for (d, s) in dst[to].iter_mut().zip(&src[from]) {
                    *d = s.to_f32();
                }
            }
            (Storage::Bf16(dst), Storage::F32(src)) => {
                for (d, s) in dst[to].iter_mut().zip(&src[from]) {
                    *d = <bf16 as Element>::from_f32(*s);
                }
            }
            (Storage::Cuda(..), _) | (_, Storage::Cuda(..)) => {
                unreachable!("the device was matched")
            }
        }
    }
}

pub(super) mod cuda {
    use crate::cuda::sources::COPY;
    use crate::cuda::{Args, Cuda, Grid};
    use crate::{DType, Result, Tensor};

    const THREADS: u32 = 256;

    /// All of `src`, rounded to bf16, to scratch at `pointer`.
    pub(in crate::ops) fn to_bf16(cuda: Cuda, pointer: u64, src: &Tensor) -> Result<()> {
        let args = Args::new().view_at(pointer, DType::Bf16).view(src);
        queue(cuda, args, [0, 0, src.numel()])
    }

    pub(super) fn forward(
        cuda: Cuda,
        dst: &mut Tensor,
        dst_from: usize,
        src: &Tensor,
        src_from: usize,
        n: usize,
    ) -> Result<()> {
        let args = Args::new().view_mut(dst).view(src);
        queue(cuda, args, [dst_from, src_from, n])
    }

    fn queue(cuda: Cuda, mut args: Args, numbers: [usize; 3]) -> Result<()> {
        for number in numbers {
            args = args.u64(number as u64);
        }
        let n = numbers[2];
        if numbers.iter().all(|x| x.is_multiple_of(8)) {
            return cuda.launch(&COPY, "copy_forward_8", Grid::each(n / 8, THREADS), args);
        }
        cuda.launch(&COPY, "copy_forward", Grid::each(n, THREADS), args)
    }
}

pub(crate) mod examples {
    use crate::DType::{Bf16, F32};
    use crate::example::{Example, Tolerance};

    pub(crate) fn compared() -> Vec<Example> {
        let mut all = Vec::new();
        for (from, to) in [(F32, F32), (F32, Bf16), (Bf16, F32), (Bf16, Bf16)] {
            for (n, offset) in [(1024, 0), (1021, 3)] {
                let n_copied = n - offset;
                let example = Example::new("copy/forward", format!("{n}_from{offset}"))
                    .out("dst", &[n_copied], to)
                    .input("src", &[n], from)
                    .tolerance(Tolerance::EXACT)
                    .run(move |[dst], [src]| super::forward(dst, 0, src, offset, n_copied));
                all.push(example);
            }
        }
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::DType;
    use crate::ops::testing::tensor;

    #[test]
    fn forward_rounds_a_range_and_leaves_the_rest() {
        let src = tensor(&[10], 3, DType::F32);
        let mut dst = Tensor::zeros(&[6], DType::Bf16);
        forward(&mut dst, 2, &src, 5, 3).unwrap();
        let want: Vec<f32> = src.to_dtype(DType::Bf16).to_f32_vec();
        assert_eq!(dst.to_f32_vec(), [&[0.0; 2], &want[5..8], &[0.0]].concat());
    }

    #[test]
    fn forward_refuses_a_range_beyond_the_end() {
        let src = Tensor::zeros(&[4], DType::F32);
        let mut dst = Tensor::zeros(&[9], DType::F32);
        assert!(forward(&mut dst, 0, &src, 2, 3).is_err());
    }
}
