//! Head projection and cross-entropy in row chunks, so that the logits of a whole batch never exist.
//!
//! logits = x headᵀ; nll = logsumexp(logits) - logits[target]; gradient of the logits = d_nll (softmax(logits) - onehot(target)),
//! of x that times head, of head its transpose times x. Only rows with a target are projected.
//! Where a CPU has instructions for products of bf16, and x and head are bf16, the logits' gradient is rounded to it for these two,
//! as on a GPU; the logits themselves and what is made of them stay f32.
//! Source: the chunking is that of arXiv 2410.10989 (Liger) and 2411.09009 (Cut Cross-Entropy); the loss PyTorch's `cross_entropy`.

use super::check;
use crate::cuda::DeviceProperties;
use crate::{DType, Device, Error, Result, Tensor};

/// Rows of logits that exist at a time, at most; fewer where the vocabulary is large (see [`LOGIT_BYTES`]).
pub const ROW_CHUNK: usize = 1024;
/// Memory that the logits of a chunk may take, as far as one vector-sized group of rows allows.
pub const LOGIT_BYTES: usize = 256 << 20;
/// As [`ROW_CHUNK`], on a GPU: every chunk reads the whole head twice and its f32 gradient once and writes that, which 4,096 rows
/// of products outweigh.
pub const GPU_ROW_CHUNK: usize = 4096;
/// As [`LOGIT_BYTES`], on a GPU: room for 4,096 rows of 248,320 bf16 logits (2.03 GB). A GPU gives no more than its
/// [`GPU_LOGIT_SHARE`]th part.
pub const GPU_LOGIT_BYTES: usize = 2 << 30;
/// See [`GPU_LOGIT_BYTES`].
pub const GPU_LOGIT_SHARE: usize = 24;
/// Target of a position without loss.
pub const NO_TARGET: i32 = -1;

/// nll_t[t] = logsumexp(head x_t) - (head x_t)[targets[t]] (natural log), 0 where the target is [`NO_TARGET`]; assigned.
/// Shapes: nll_t [T] f32; x_td [T,D]; head_cd [C,D]; targets_t [T]. On a GPU x, logits and their gradient have the head's type, on a
/// CPU with instructions for bf16 the gradient has, if x does.
///
/// # Errors
/// [`Error::Shape`] where shapes disagree, [`Error::DType`] where nll_t is not f32, [`Error::Index`] for a target of C or above
/// or below [`NO_TARGET`].
pub fn forward(
    nll_t: &mut Tensor,
    x_td: &Tensor,
    head_cd: &Tensor,
    targets_t: &[i32],
) -> Result<()> {
    const OP: &str = "linear_cross_entropy::forward";
    let dims = Dims::new(OP, nll_t, x_td, head_cd, targets_t)?;
    match check::device(OP, nll_t, &[("x_td", x_td), ("head_cd", head_cd)])? {
        Device::Cpu => cpu::forward(nll_t, x_td, head_cd, targets_t, dims),
        Device::Cuda(cuda) => cuda::run(cuda, nll_t, None, x_td, head_cd, targets_t, dims)?,
    }
    Ok(())
}

/// Most bytes of scratch that [`forward`] and [`forward_backward`] take on a GPU for the shape [T,D,C] of x and head, whatever rows
/// carry a target. `d_x_dtype` is that of the gradient of x.
pub fn scratch_bytes(
    gpu: DeviceProperties,
    [t, d, c]: [usize; 3],
    dtype: DType,
    d_x_dtype: DType,
) -> usize {
    cuda::scratch_bytes(gpu, t, Dims { d, c }, dtype, d_x_dtype)
}

/// As [`forward`], and gradients of d_nll · Σ nll: d_x_td [T,D] assigned (0 in rows without a target), d_head_cd [C,D] f32
/// added to (None: frozen).
///
/// # Errors
/// As [`forward`], and [`Error::DType`] where d_head_cd is not f32.
pub fn forward_backward(
    nll_t: &mut Tensor,
    d_x_td: &mut Tensor,
    d_head_cd: Option<&mut Tensor>,
    x_td: &Tensor,
    head_cd: &Tensor,
    targets_t: &[i32],
    d_nll: f32,
) -> Result<()> {
    const OP: &str = "linear_cross_entropy::forward_backward";
    let dims = Dims::new(OP, nll_t, x_td, head_cd, targets_t)?;
    check::shape(OP, "d_x_td", d_x_td, x_td.shape())?;
    if let Some(d_head_cd) = &d_head_cd {
        check::shape(OP, "d_head_cd", d_head_cd, head_cd.shape())?;
        check::f32(OP, "d_head_cd", d_head_cd)?;
    }
    let mut others = vec![("d_x_td", &*d_x_td), ("x_td", x_td), ("head_cd", head_cd)];
    others.extend(
        d_head_cd
            .as_deref()
            .map(|d_head_cd| ("d_head_cd", d_head_cd)),
    );
    let device = check::device(OP, nll_t, &others)?;
    let gradients = Gradients {
        d_x_td,
        d_head_cd,
        d_nll,
    };
    match device {
        Device::Cpu => cpu::forward_backward(nll_t, gradients, x_td, head_cd, targets_t, dims),
        Device::Cuda(cuda) => {
            let gradients = Some(gradients);
            cuda::run(cuda, nll_t, gradients, x_td, head_cd, targets_t, dims)?;
        }
    }
    Ok(())
}

struct Gradients<'a> {
    d_x_td: &'a mut Tensor,
    d_head_cd: Option<&'a mut Tensor>,
    d_nll: f32,
}

/// C vocabulary, D hidden.
#[derive(Debug, Clone, Copy)]
struct Dims {
    c: usize,
    d: usize,
}

impl Dims {
    fn new(
        op: &'static str,
        nll_t: &Tensor,
        x_td: &Tensor,
        head_cd: &Tensor,
        targets_t: &[i32],
    ) -> Result<Self> {
        let [c, d] = check::dims(op, "head_cd", head_cd, "[C,D]")?;
        check::shape(op, "x_td", x_td, &[targets_t.len(), d])?;
        check::shape(op, "nll_t", nll_t, &[targets_t.len()])?;
        check::f32(op, "nll_t", nll_t)?;
        let valid = |target: i32| target == NO_TARGET || (0..c as i64).contains(&(target as i64));
        match targets_t.iter().position(|target| !valid(*target)) {
            Some(row) => Err(Error::Index {
                op,
                arg: "targets_t",
                row,
                value: targets_t[row] as i64,
                bound: c,
            }),
            None => Ok(Dims { c, d }),
        }
    }
}

mod cpu {
    use half::bf16;
    use rayon::prelude::*;

    use super::{Dims, Gradients, LOGIT_BYTES, NO_TARGET, ROW_CHUNK};
    use crate::Tensor;
    use crate::cpu::gemm_bf16;
    use crate::cpu::math::{exp_in_place, max, scale, sum_exp};
    use crate::cpu::{View, ViewMut, simd, with_scratch};
    use crate::ops::Write;
    use crate::ops::matmul::{self, cpu as product};

    /// Elements that a task rounds.
    const NARROW_PIECE: usize = 1 << 16;

    pub(super) fn forward(
        nll_t: &mut Tensor,
        x_td: &Tensor,
        head_cd: &Tensor,
        targets_t: &[i32],
        dims: Dims,
    ) {
        for_chunks(nll_t, x_td, head_cd, targets_t, dims, |_| {});
    }

    pub(super) fn forward_backward(
        nll_t: &mut Tensor,
        gradients: Gradients,
        x_td: &Tensor,
        head_cd: &Tensor,
        targets_t: &[i32],
        dims: Dims,
    ) {
        let Dims { c, d } = dims;
        let Gradients {
            d_x_td,
            d_head_cd,
            d_nll,
        } = gradients;
        let mut d_head_cd = d_head_cd.map(Tensor::f32s_mut);
        let mut d_x = ViewMut::of(d_x_td);
        d_x.fill_zero();
        for_chunks(nll_t, x_td, head_cd, targets_t, dims, |chunk| {
            let Chunk {
                rows,
                x_rd,
                logits_rc,
            } = chunk;
            let n = rows.len();
            let product_dims = matmul::Dims { t: n, i: d, o: c };
            // 1. logits become their gradient
            logits_rc
                .par_chunks_mut(c)
                .zip(rows.par_iter())
                .for_each(|(logits, row)| {
                    simd(
                        #[inline(always)]
                        || {
                            let sum = exp_in_place(logits, max(logits));
                            scale(logits, d_nll / sum);
                        },
                    );
                    logits[targets_t[*row] as usize] -= d_nll;
                });
            let head = View::of(head_cd);
            with_products_type(logits_rc, x_rd, head, |d_logits| {
                // 2. through the head to x
                with_scratch(n * d, |d_x_rd| {
                    let d_x_view = ViewMut::F32(d_x_rd);
                    let write = Write::Assign;
                    product::backward_input(d_x_view, d_logits, head, product_dims, 1.0, write);
                    for (d_row, row) in d_x_rd.chunks_exact(d).zip(rows) {
                        d_x.slice(row * d..(row + 1) * d).store(d_row);
                    }
                });
                // 3. to the head
                if let Some(d_head_cd) = &mut d_head_cd {
                    let write = Write::Accumulate;
                    product::backward_weight(d_head_cd, d_logits, x_rd, product_dims, 1.0, write);
                }
            });
        });
    }

    /// Lends the gradient of the logits as bf16 where both that it is multiplied by are, and there are instructions for that.
    fn with_products_type(d_logits: &[f32], x: View, head: View, body: impl FnOnce(View)) {
        if x.is_f32() || head.is_f32() || gemm_bf16::native().is_none() {
            return body(View::F32(d_logits));
        }
        with_bf16_scratch(d_logits.len(), |narrow| {
            narrow
                .par_chunks_mut(NARROW_PIECE)
                .zip(d_logits.par_chunks(NARROW_PIECE))
                .for_each(|(narrow, d_logits)| {
                    simd(
                        #[inline(always)]
                        || ViewMut::Bf16(narrow).store(d_logits),
                    );
                });
            body(View::Bf16(narrow));
        });
    }

    /// As [`with_scratch`].
    fn with_bf16_scratch<R>(n: usize, body: impl FnOnce(&mut [bf16]) -> R) -> R {
        with_scratch(n.div_ceil(2), |scratch| {
            body(&mut bytemuck::cast_slice_mut(scratch)[..n])
        })
    }

    /// Lends the rows of x that are listed, one behind the other, in their own type.
    fn with_rows(x: View, rows: &[usize], d: usize, body: impl FnOnce(View)) {
        let at = |row: &usize| row * d..(row + 1) * d;
        let n = rows.len() * d;
        match x {
            View::F32(x) => with_scratch(n, |x_rd| {
                for (x_d, row) in x_rd.chunks_exact_mut(d.max(1)).zip(rows) {
                    x_d.copy_from_slice(&x[at(row)]);
                }
                body(View::F32(x_rd));
            }),
            View::Bf16(x) => with_bf16_scratch(n, |x_rd| {
                for (x_d, row) in x_rd.chunks_exact_mut(d.max(1)).zip(rows) {
                    x_d.copy_from_slice(&x[at(row)]);
                }
                body(View::Bf16(x_rd));
            }),
        }
    }

    /// Rows of one chunk, gathered: which they are, their hidden states, their logits.
    struct Chunk<'a> {
        rows: &'a [usize],
        x_rd: View<'a>,
        logits_rc: &'a mut [f32],
    }

    /// Assigns all of nll_t and shows each chunk of rows with a target to `then`.
    fn for_chunks(
        nll_t: &mut Tensor,
        x_td: &Tensor,
        head_cd: &Tensor,
        targets_t: &[i32],
        dims: Dims,
        mut then: impl FnMut(Chunk),
    ) {
        let Dims { c, d } = dims;
        let nll_t = nll_t.f32s_mut();
        nll_t.fill(0.0);
        let rows: Vec<usize> = (0..targets_t.len())
            .filter(|t| targets_t[*t] != NO_TARGET)
            .collect();
        let x = View::of(x_td);
        for rows in rows.chunks(rows_per_chunk(c)) {
            let n = rows.len();
            // 1. gather  2. project  3. losses
            with_rows(x, rows, d, |x_rd| {
                with_scratch(n * c, |logits_rc| {
                    product::forward(
                        ViewMut::F32(logits_rc),
                        x_rd,
                        View::of(head_cd),
                        matmul::Dims { t: n, i: d, o: c },
                        1.0,
                        Write::Assign,
                    );
                    let nll_r: Vec<f32> = logits_rc
                        .par_chunks(c)
                        .zip(rows.par_iter())
                        .map(|(logits, row)| nll(logits, targets_t[*row] as usize))
                        .collect();
                    for (nll, row) in nll_r.iter().zip(rows) {
                        nll_t[*row] = *nll;
                    }
                    then(Chunk {
                        rows,
                        x_rd,
                        logits_rc,
                    });
                });
            });
        }
    }

    /// logsumexp(logits) - logits[target].
    fn nll(logits: &[f32], target: usize) -> f32 {
        simd(
            #[inline(always)]
            || {
                let top = max(logits);
                sum_exp(logits, top).ln() + (top - logits[target])
            },
        )
    }

    pub(super) fn rows_per_chunk(c: usize) -> usize {
        let fitting = LOGIT_BYTES / (4 * c.max(1));
        // A multiple of 16 rows fills gemm's tiles.
        (fitting / 16 * 16).clamp(16, ROW_CHUNK)
    }
}

mod cuda {
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
}

pub(crate) mod examples {
    use super::NO_TARGET;
    use crate::DType::{self, Bf16, F32};
    use crate::example::{Example, Sizes, Tolerance};

    /// Rows of the released head.
    const VOCABULARY: usize = 248_320;

    /// Shape of the head, and targets: one, none, few, some, one class for all, several chunks, the ends of the vocabulary.
    fn heads() -> [([usize; 2], Vec<i32>); 8] {
        let some = |t: usize, c: usize| -> Vec<i32> {
            let target = |t: usize| match t % 3 {
                1 => NO_TARGET,
                _ => (t * 31 % c) as i32,
            };
            (0..t).map(target).collect()
        };
        let last = VOCABULARY as i32 - 1;
        [
            ([96, 64], vec![95]),
            ([96, 64], vec![NO_TARGET; 9]),
            ([136, 40], [vec![NO_TARGET; 8], vec![3]].concat()),
            ([131, 36], some(77, 131)),
            ([520, 128], vec![519; 200]),
            ([72, 24], some(6300, 72)),
            ([1000, 2560], some(150, 1000)),
            ([VOCABULARY, 32], vec![last, NO_TARGET, 0, last - 1, 7]),
        ]
    }

    pub(crate) fn compared() -> Vec<Example> {
        let mut all = Vec::new();
        for (shape, targets) in heads() {
            // x, head
            for types in [[F32, F32], [Bf16, Bf16], [F32, Bf16], [Bf16, F32]] {
                all.push(forward(shape, targets.clone(), types));
                all.push(forward_backward(shape, targets.clone(), types, 0.125));
                if shape == [131, 36] {
                    all.push(frozen(shape, targets.clone(), types));
                }
            }
        }
        all
    }

    pub(crate) fn timed(sizes: &Sizes) -> Vec<Example> {
        let (t, d, c) = (sizes.n_tokens, sizes.hidden, sizes.vocabulary);
        let targets = sizes.spread().map(|id| id as i32).collect();
        let example = forward_backward([c, d], targets, [sizes.dtype; 2], 1.0 / t as f32);
        vec![example.operations_at_least(3.0 * 2.0 * (t * d) as f64 * c as f64)]
    }

    fn example(name: &'static str, [c, d]: [usize; 2], t: usize, head_type: DType) -> Example {
        // With a bf16 head the GPU rounds x, the logits and their gradient to 8 bits; the CPU none of them.
        let f32 = if head_type == F32 { 1e-5 } else { 5e-3 };
        Example::new(name, format!("t{t}_d{d}_c{c}")).tolerance(Tolerance { f32, bf16: 1e-2 })
    }

    fn inputs(
        example: Example,
        [c, d]: [usize; 2],
        t: usize,
        [x_type, head_type]: [DType; 2],
    ) -> Example {
        // Logits of some units, as a model's are.
        let width = 6.0 / (d as f32).sqrt();
        example
            .input("x", &[t, d], x_type)
            .input_in("head", &[c, d], head_type, [-width, width])
    }

    fn forward(shape: [usize; 2], targets: Vec<i32>, types: [DType; 2]) -> Example {
        let t = targets.len();
        let example = example("linear_cross_entropy/forward", shape, t, types[1]);
        inputs(example.out("nll", &[t], F32), shape, t, types)
            .run(move |[nll], [x, head]| super::forward(nll, x, head, &targets))
    }

    fn forward_backward(
        shape: [usize; 2],
        targets: Vec<i32>,
        types: [DType; 2],
        d_nll: f32,
    ) -> Example {
        let t = targets.len();
        let name = "linear_cross_entropy/forward_backward";
        let example = example(name, shape, t, types[1])
            .out("nll", &[t], F32)
            .out("d_x", &[t, shape[1]], types[0])
            // Small before, so that what is added shows.
            .updated_in("d_head", &shape, F32, [-1e-3, 1e-3]);
        inputs(example, shape, t, types).run(move |[nll, d_x, d_head], [x, head]| {
            super::forward_backward(nll, d_x, Some(d_head), x, head, &targets, d_nll)
        })
    }

    fn frozen(shape: [usize; 2], targets: Vec<i32>, types: [DType; 2]) -> Example {
        let t = targets.len();
        let name = "linear_cross_entropy/forward_backward";
        let example = example(name, shape, t, types[1])
            .out("nll, frozen", &[t], F32)
            .out("d_x, frozen", &[t, shape[1]], types[0]);
        inputs(example, shape, t, types).run(move |[nll, d_x], [x, head]| {
            super::forward_backward(nll, d_x, None, x, head, &targets, 1.0)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::DType;
    use crate::ops::testing::{BF16_REL, STORAGES, assert_close, f64s, gradient, plus, tensor};

    /// (nll, gradient of the logits for d_nll = 1).
    fn define(x: &[f64], head: &[f64], targets: &[i32], d: usize) -> (Vec<f64>, Vec<f64>) {
        let c = head.len() / d;
        let (mut nll, mut d_logits) = (vec![0.0; targets.len()], vec![0.0; targets.len() * c]);
        for (t, target) in targets
            .iter()
            .enumerate()
            .filter(|(_, target)| **target != NO_TARGET)
        {
            let x = &x[t * d..(t + 1) * d];
            let logits: Vec<f64> = head
                .chunks(d)
                .map(|w| w.iter().zip(x).map(|(w, x)| w * x).sum())
                .collect();
            let sum: f64 = logits.iter().map(|l| l.exp()).sum();
            nll[t] = sum.ln() - logits[*target as usize];
            for (i, logit) in logits.iter().enumerate() {
                d_logits[t * c + i] =
                    logit.exp() / sum - if i == *target as usize { 1.0 } else { 0.0 };
            }
        }
        (nll, d_logits)
    }

    fn targets(t: usize, c: usize) -> Vec<i32> {
        (0..t)
            .map(|t| {
                if t % 3 == 1 {
                    NO_TARGET
                } else {
                    (t * 31 % c) as i32
                }
            })
            .collect()
    }

    #[test]
    fn loss_and_gradients_agree_with_f64() {
        for (dtype, _) in STORAGES {
            for (t, d, c) in [(1, 1, 1), (5, 7, 33), (23, 40, 131), (2000, 3, 65)] {
                let (x, head) = (tensor(&[t, d], 1, dtype), tensor(&[c, d], 2, dtype));
                let targets = targets(t, c);
                let d_nll = 0.125;
                let (want, d_logits) = define(&f64s(&x), &f64s(&head), &targets, d);
                let (mut want_x, mut want_head) = (vec![0.0; t * d], vec![0.0; c * d]);
                let (x_64, head_64) = (f64s(&x), f64s(&head));
                for t in 0..t {
                    for c_idx in 0..c {
                        let g = d_nll as f64 * d_logits[t * c + c_idx];
                        for i in 0..d {
                            want_x[t * d + i] += g * head_64[c_idx * d + i];
                            want_head[c_idx * d + i] += g * x_64[t * d + i];
                        }
                    }
                }

                let mut nll = Tensor::poison(&[t], DType::F32);
                forward(&mut nll, &x, &head, &targets).unwrap();
                assert_close("nll", &nll, &want, 2e-6);

                let mut again = Tensor::poison(&[t], DType::F32);
                let mut d_x = Tensor::poison(&[t, d], dtype);
                let before = tensor(&[c, d], 3, DType::F32);
                let mut d_head = before.clone();
                forward_backward(
                    &mut again,
                    &mut d_x,
                    Some(&mut d_head),
                    &x,
                    &head,
                    &targets,
                    d_nll,
                )
                .unwrap();
                assert_eq!(again, nll);
                let tolerance = if dtype == DType::F32 { 1e-5 } else { BF16_REL };
                assert_close("d_x", &d_x, &want_x, tolerance);
                // Where there are instructions for it, the gradient of the logits is bf16.
                assert_close("d_head", &d_head, &plus(&want_head, &before), tolerance);

                let mut frozen = Tensor::poison(&[t, d], dtype);
                forward_backward(&mut again, &mut frozen, None, &x, &head, &targets, d_nll)
                    .unwrap();
                assert_eq!(frozen, d_x);
            }
        }
    }

    #[test]
    fn definition_agrees_with_differences() {
        let (t, d, c) = (4, 3, 6);
        let at = [
            tensor(&[t, d], 1, DType::F32),
            tensor(&[c, d], 2, DType::F32),
        ]
        .map(|x| f64s(&x));
        let targets = targets(t, c);
        let (_, d_logits) = define(&at[0], &at[1], &targets, d);
        let loss = |x: &[Vec<f64>]| define(&x[0], &x[1], &targets, d).0.iter().sum();
        let d_x = gradient(&at, 0, loss);
        for t in 0..t {
            for i in 0..d {
                let want: f64 = (0..c)
                    .map(|c_idx| d_logits[t * c + c_idx] * at[1][c_idx * d + i])
                    .sum();
                assert!((d_x[t * d + i] - want).abs() < 1e-8);
            }
        }
    }

    #[test]
    fn rows_without_a_target_are_not_read() {
        let (t, d, c) = (6, 4, 9);
        let (mut x, head) = (
            tensor(&[t, d], 1, DType::F32),
            tensor(&[c, d], 2, DType::F32),
        );
        let targets = targets(t, c);
        for (x, target) in x.f32s_mut().chunks_mut(d).zip(&targets) {
            if *target == NO_TARGET {
                x.fill(f32::NAN);
            }
        }
        let (mut nll, mut d_x) = (
            Tensor::poison(&[t], DType::F32),
            Tensor::poison(&[t, d], DType::F32),
        );
        let mut d_head = Tensor::zeros(&[c, d], DType::F32);
        forward_backward(
            &mut nll,
            &mut d_x,
            Some(&mut d_head),
            &x,
            &head,
            &targets,
            1.0,
        )
        .unwrap();
        assert!(
            nll.f32s()
                .iter()
                .chain(d_x.f32s())
                .chain(d_head.f32s())
                .all(|x| x.is_finite())
        );
        for (t, target) in targets
            .iter()
            .enumerate()
            .filter(|(_, target)| **target == NO_TARGET)
        {
            assert_eq!((nll.f32s()[t], *target), (0.0, NO_TARGET));
            assert_eq!(d_x.f32s()[t * d..(t + 1) * d], [0.0; 4]);
        }
    }

    #[test]
    fn large_logits_do_not_overflow() {
        let x = Tensor::from_f32(&[1, 1], vec![1.0]);
        let head = Tensor::from_f32(&[3, 1], vec![1e4, 1e4, -1e4]);
        let mut nll = Tensor::poison(&[1], DType::F32);
        forward(&mut nll, &x, &head, &[1]).unwrap();
        assert_close("nll", &nll, &[2f64.ln()], 1e-6);
        forward(&mut nll, &x, &head, &[2]).unwrap();
        assert_close("nll", &nll, &[2e4 + 2f64.ln()], 1e-6);
    }

    #[test]
    fn no_targets_leave_the_head_gradient() {
        let (x, head) = (
            tensor(&[3, 2], 1, DType::Bf16),
            tensor(&[5, 2], 2, DType::Bf16),
        );
        let (mut nll, mut d_x) = (
            Tensor::poison(&[3], DType::F32),
            Tensor::poison(&[3, 2], DType::Bf16),
        );
        let before = tensor(&[5, 2], 3, DType::F32);
        let mut d_head = before.clone();
        forward_backward(
            &mut nll,
            &mut d_x,
            Some(&mut d_head),
            &x,
            &head,
            &[NO_TARGET; 3],
            1.0,
        )
        .unwrap();
        assert_eq!(nll, Tensor::zeros(&[3], DType::F32));
        assert_eq!(d_x, Tensor::zeros(&[3, 2], DType::Bf16));
        assert_eq!(d_head, before);
    }

    #[test]
    fn logits_of_the_released_vocabulary_fit_the_budget() {
        let rows = cpu::rows_per_chunk(248_320);
        assert!(rows >= 128 && rows * 248_320 * 4 <= LOGIT_BYTES, "{rows}");
        assert_eq!(cpu::rows_per_chunk(2048), ROW_CHUNK);
    }

    #[test]
    fn gpu_chunks_fit_the_budget_and_balance() {
        let rows = |n, c, dtype, gib: usize| {
            cuda::rows_per_chunk(n, c, dtype, DeviceProperties::with_memory(gib << 30))
        };
        assert_eq!(rows(15_360, 248_320, DType::Bf16, 80), 3840);
        assert_eq!(rows(4096, 248_320, DType::Bf16, 80), 4096);
        assert_eq!(rows(4097, 248_320, DType::Bf16, 80), 2176);
        assert_eq!(rows(4096, 248_320, DType::F32, 80), 2048);
        assert_eq!(rows(4096, 248_320, DType::Bf16, 12), 1024);
        assert_eq!(rows(1, 248_320, DType::Bf16, 80), cuda::ROW_GROUP);
        assert_eq!(rows(5000, 65, DType::F32, 80), 2560);
    }

    #[test]
    fn no_share_of_targets_takes_more_scratch_than_is_said() {
        for dtype in [DType::F32, DType::Bf16] {
            for memory_bytes in [4 << 30, 30 << 30, 80 << 30] {
                let gpu = DeviceProperties::with_memory(memory_bytes);
                let dims = Dims {
                    c: 248_320,
                    d: 2560,
                };
                let said = scratch_bytes(gpu, [5120, dims.d, dims.c], dtype, DType::F32);
                for n_targets in (1..=5120).step_by(13) {
                    let rows = cuda::rows_per_chunk(n_targets, dims.c, dtype, gpu);
                    let taken = cuda::chunk_bytes(rows, dims, dtype, DType::F32);
                    assert!(taken <= said, "{taken} of {said}, {n_targets} targets");
                }
            }
        }
    }

    #[test]
    fn gpu_row_table_is_filled_up_to_whole_groups() {
        assert_eq!(cuda::row_table(&[NO_TARGET; 5]), None);
        let table = cuda::row_table(&[NO_TARGET, 7, NO_TARGET, 0]).unwrap();
        assert_eq!(table.len(), 2 * cuda::ROW_GROUP);
        assert_eq!(table[..3], [1, 3, u32::MAX]);
        assert_eq!(table[cuda::ROW_GROUP..][..3], [7, 0, 0]);
    }

    #[test]
    fn target_outside_the_vocabulary_is_refused() {
        let (x, head) = (
            tensor(&[2, 2], 1, DType::F32),
            tensor(&[5, 2], 2, DType::F32),
        );
        let mut nll = Tensor::poison(&[2], DType::F32);
        for bad in [5, -100] {
            let error = forward(&mut nll, &x, &head, &[0, bad]).unwrap_err();
            let want = format!(
                "linear_cross_entropy::forward: `targets_t` holds {bad} at row 1, outside 0..5"
            );
            assert_eq!(error.to_string(), want);
        }
    }
}
