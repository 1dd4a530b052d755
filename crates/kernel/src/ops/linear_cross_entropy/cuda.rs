//! Chunks of rows on a GPU, whose number follows from its memory.

use super::{Dims, GPU_LOGIT_BYTES, GPU_LOGIT_SHARE, GPU_ROW_CHUNK, Gradients, NO_TARGET};
use crate::cuda::sources::LINEAR_CROSS_ENTROPY;
use crate::cuda::{Args, Cuda, DeviceProperties, Gemm, Grid, Operand, Pieces};
use crate::ops::embedding::cuda::{NO_ROW, gather, scatter};
use crate::{DType, Result, Tensor};

const THREADS: u32 = 512;
/// Chunks have a multiple of this many rows, the last ones of no token: a tile of a product takes them anyway, and products
/// come in few distinct shapes, each planned once.
pub(super) const ROW_GROUP: usize = 128;

pub(super) fn run(
    cuda: Cuda,
    nll_t: &mut Tensor,
    mut gradients: Option<Gradients>,
    x_td: &Tensor,
    head_cd: &Tensor,
    targets_t: &[i32],
    dims: Dims,
) -> Result<()> {
    nll_t.fill_zero()?;
    if let Some(gradients) = &mut gradients {
        gradients.d_x_td.fill_zero()?;
    }
    let Some(table) = row_table(targets_t) else {
        return Ok(());
    };
    let n_rows = table.len() / 2;
    let dtype = head_cd.dtype();
    let d_x_dtype = match &gradients {
        Some(gradients) => d_x_of_chunk(dtype, gradients.d_x_td.dtype()),
        None => dtype,
    };
    let n_with_target = targets_t.iter().filter(|t| **t != NO_TARGET).count();
    let chunk = rows_per_chunk(n_with_target, dims.c, dtype, cuda.properties());
    let n_d_x = if gradients.is_some() { chunk } else { 0 };
    let [logits, x, d_x] = pieces([chunk, n_d_x], dims, dtype, d_x_dtype).take(cuda)?;
    let table = cuda.upload(&table)?;
    for first in (0..n_rows).step_by(chunk) {
        let chunk = Chunk {
            n_rows: chunk.min(n_rows - first),
            rows: table + 4 * first as u64,
            targets: table + 4 * (n_rows + first) as u64,
            logits,
            stride: stride(dims.c),
            x,
            d_x,
        };
        // 1. gather  2. project  3. losses, and logits become their gradient
        gather(cuda, (chunk.x, dtype), x_td, chunk.rows, chunk.n_rows)?;
        cuda.gemm(&chunk.project(head_cd, dims))?;
        let d_nll = gradients.as_ref().map(|gradients| gradients.d_nll);
        chunk.losses(cuda, nll_t, dims, dtype, d_nll)?;
        let Some(Gradients {
            d_x_td, d_head_cd, ..
        }) = &mut gradients
        else {
            continue;
        };
        // 2. through the head to x
        cuda.gemm(&chunk.to_x(head_cd, dims, d_x_dtype))?;
        scatter(
            cuda,
            d_x_td,
            (chunk.d_x, d_x_dtype),
            chunk.rows,
            chunk.n_rows,
        )?;
        // 3. to the head
        if let Some(d_head_cd) = d_head_cd {
            cuda.gemm(&chunk.to_head(d_head_cd, dims, dtype))?;
        }
    }
    Ok(())
}

/// The type of x's gradient in a chunk: cuBLASLt has no product of f32 that ends in bf16.
fn d_x_of_chunk(dtype: DType, d_x_dtype: DType) -> DType {
    match dtype {
        DType::Bf16 => d_x_dtype,
        DType::F32 => DType::F32,
    }
}

pub(super) fn scratch_bytes(
    gpu: DeviceProperties,
    n_tokens: usize,
    dims: Dims,
    dtype: DType,
    d_x_dtype: DType,
) -> usize {
    let most = n_tokens.next_multiple_of(ROW_GROUP);
    let chunk = most.min(most_rows(dims.c, dtype, gpu));
    pieces([chunk; 2], dims, dtype, d_x_of_chunk(dtype, d_x_dtype)).bytes()
}

#[cfg(test)]
pub(super) fn chunk_bytes(n: usize, dims: Dims, dtype: DType, d_x_dtype: DType) -> usize {
    pieces([n; 2], dims, dtype, d_x_of_chunk(dtype, d_x_dtype)).bytes()
}

/// Rows with a target, filled up to whole groups by [`NO_ROW`], then their targets; None without any.
pub(super) fn row_table(targets_t: &[i32]) -> Option<Vec<u32>> {
    let with_target = |row: &u32| targets_t[*row as usize] != NO_TARGET;
    let mut table: Vec<u32> = (0..targets_t.len() as u32).filter(with_target).collect();
    let n = table.len().next_multiple_of(ROW_GROUP);
    let targets: Vec<u32> = table
        .iter()
        .map(|row| targets_t[*row as usize] as u32)
        .collect();
    table.resize(n, NO_ROW);
    table.extend(targets);
    table.resize(2 * n, 0);
    (n > 0).then_some(table)
}

/// Rows of a chunk, a multiple of [`ROW_GROUP`]: as few chunks of nearly one size as the GPU allows.
pub(super) fn rows_per_chunk(n: usize, c: usize, dtype: DType, gpu: DeviceProperties) -> usize {
    let most = most_rows(c, dtype, gpu);
    n.div_ceil(n.div_ceil(most).max(1))
        .next_multiple_of(ROW_GROUP)
}

fn most_rows(c: usize, dtype: DType, gpu: DeviceProperties) -> usize {
    let bytes = GPU_LOGIT_BYTES.min(gpu.memory_bytes / GPU_LOGIT_SHARE);
    let fitting = bytes / (stride(c) * dtype.size());
    (fitting / ROW_GROUP * ROW_GROUP).clamp(ROW_GROUP, GPU_ROW_CHUNK)
}

/// Elements from one row of logits to the next, so that every row begins at a multiple of 16 bytes.
fn stride(c: usize) -> usize {
    c.next_multiple_of(8)
}

/// The scratch of a chunk of `n` rows: logits, rows of x, and of its gradient `n_d_x`.
fn pieces([n, n_d_x]: [usize; 2], dims: Dims, dtype: DType, d_x_dtype: DType) -> Pieces<3> {
    Pieces::new([
        n * stride(dims.c) * dtype.size(),
        n * dims.d * dtype.size(),
        n_d_x * dims.d * d_x_dtype.size(),
    ])
}

/// Addresses of one chunk.
struct Chunk {
    n_rows: usize,
    rows: u64,
    targets: u64,
    logits: u64,
    stride: usize,
    x: u64,
    d_x: u64,
}

impl Chunk {
    /// logits [R,C] = x [R,D] headᵀ.
    fn project(&self, head_cd: &Tensor, dims: Dims) -> Gemm {
        let dtype = head_cd.dtype();
        Gemm {
            a: operand(self.x, dims.d),
            b: transposed(head_cd.device_pointer(), dims.d),
            d: self.logits,
            d_stride: self.stride,
            m: self.n_rows,
            n: dims.c,
            k: dims.d,
            alpha: 1.0,
            base: None,
            in_dtype: dtype,
            out_dtype: dtype,
        }
    }

    /// d_x [R,D] = d_logits head.
    fn to_x(&self, head_cd: &Tensor, dims: Dims, out_dtype: DType) -> Gemm {
        Gemm {
            a: operand(self.logits, self.stride),
            b: operand(head_cd.device_pointer(), dims.d),
            d: self.d_x,
            d_stride: dims.d,
            m: self.n_rows,
            n: dims.d,
            k: dims.c,
            alpha: 1.0,
            base: None,
            in_dtype: head_cd.dtype(),
            out_dtype,
        }
    }

    /// d_head [C,D] += d_logitsᵀ x.
    fn to_head(&self, d_head_cd: &Tensor, dims: Dims, in_dtype: DType) -> Gemm {
        Gemm {
            a: transposed(self.logits, self.stride),
            b: operand(self.x, dims.d),
            d: d_head_cd.device_pointer(),
            d_stride: dims.d,
            m: dims.c,
            n: dims.d,
            k: self.n_rows,
            alpha: 1.0,
            base: Some(d_head_cd.device_pointer()),
            in_dtype,
            out_dtype: DType::F32,
        }
    }

    fn losses(
        &self,
        cuda: Cuda,
        nll_t: &mut Tensor,
        dims: Dims,
        dtype: DType,
        d_nll: Option<f32>,
    ) -> Result<()> {
        let kernel = match (dtype, d_nll) {
            (DType::F32, None) => "linear_cross_entropy_forward_f32",
            (DType::Bf16, None) => "linear_cross_entropy_forward_bf16",
            (DType::F32, Some(_)) => "linear_cross_entropy_forward_backward_f32",
            (DType::Bf16, Some(_)) => "linear_cross_entropy_forward_backward_bf16",
        };
        let args = Args::new().tensor_mut(nll_t).pointer(self.logits);
        let args = args.pointer(self.rows).pointer(self.targets);
        let args = args.u32(dims.c).u32(self.stride);
        let args = args.f32(d_nll.unwrap_or(0.0));
        let grid = Grid::line(self.n_rows, THREADS);
        cuda.launch(&LINEAR_CROSS_ENTROPY, kernel, grid, args)
    }
}

fn operand(pointer: u64, stride: usize) -> Operand {
    Operand {
        pointer,
        transposed: false,
        stride,
    }
}

fn transposed(pointer: u64, stride: usize) -> Operand {
    Operand {
        transposed: true,
        ..operand(pointer, stride)
    }
}
