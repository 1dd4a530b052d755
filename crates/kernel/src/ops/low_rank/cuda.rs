//! Both products on a GPU: in one reading of x where the widths fit tensor cores, else as products of their own.

use super::{Dims, Down, Dropout, Up, Write};
use crate::cuda::sources::LOW_RANK;
use crate::cuda::{Args, Cuda, DeviceProperties, Grid, Pieces};
use crate::{DType, Result, Tensor};

const THREADS: u32 = 256;
/// Ranks that one kernel takes; more go in slices.
const SLICE: usize = 64;
/// Warps of a block, side by side over the wide dimension.
const WARPS: usize = 8;
/// Blocks that a multiprocessor holds at once, by registers.
const BLOCKS_EACH: usize = 2;

pub(super) fn down_forward(cuda: Cuda, u: &mut Tensor, down: &Down) -> Result<()> {
    const KERNELS: [&str; 4] = [
        "low_rank_down_forward_1",
        "low_rank_down_forward_2",
        "low_rank_down_forward_3",
        "low_rank_down_forward_4",
    ];
    let (x, a, dims) = (down.x_ti, down.a_ri, down.dims);
    let Dims { t, wide, rank } = dims;
    let drops = Drops::of(down.dropout);
    if !(fits(dims, u.dtype()) && x.dtype() == DType::Bf16) {
        return narrow(cuda, u, x, Weights::down(down), dims, drops);
    }
    for slice in slices(rank) {
        let args = Args::new()
            .pointer(slice.of_columns(u))
            .tensor(x)
            .pointer(slice.of_rows(a, wide))
            .u64(drops.key);
        let args = slice
            .sizes(args, dims)
            .u32(drops.threshold as usize)
            .f32(drops.scale);
        // Two warps over each other where registers allow: each reads A once more.
        let halves = if slice.tiles() <= 2 { 2 } else { 1 };
        let grid = Grid::line(t.div_ceil(32 * halves), THREADS * halves as u32);
        cuda.launch(&LOW_RANK, KERNELS[slice.tiles() - 1], grid, args)?;
    }
    Ok(())
}

pub(super) fn up_forward(cuda: Cuda, y: &mut Tensor, up: &Up, write: Write) -> Result<()> {
    const ASSIGNING: [&str; 4] = [
        "low_rank_up_forward_1",
        "low_rank_up_forward_2",
        "low_rank_up_forward_3",
        "low_rank_up_forward_4",
    ];
    const ADDING: [&str; 4] = [
        "low_rank_up_forward_accumulate_1",
        "low_rank_up_forward_accumulate_2",
        "low_rank_up_forward_accumulate_3",
        "low_rank_up_forward_accumulate_4",
    ];
    const ROWS: usize = 128;
    let (u, b, dims) = (up.u_tr, up.b_or, up.dims);
    let Dims { t, wide, rank } = dims;
    if !fits(dims, u.dtype()) {
        return broad(cuda, y, u, Weights::up(up), dims, Drops::of(None), write);
    }
    for slice in slices(rank) {
        let kernel = slice.kernel([ASSIGNING, ADDING], write);
        let args = Args::new()
            .view_mut(y)
            .pointer(slice.of_columns(u))
            .pointer(slice.of_columns(b));
        let args = slice.sizes(args, dims).f32(up.scale);
        let grid = grid(wide.div_ceil(64 * WARPS), t.div_ceil(ROWS));
        cuda.launch(&LOW_RANK, kernel, grid, args)?;
    }
    Ok(())
}

pub(super) fn up_backward(
    cuda: Cuda,
    d_u: &mut Tensor,
    d_b: Option<&mut Tensor>,
    d_y: &Tensor,
    up: &Up,
) -> Result<()> {
    const FROM_BF16: [&str; 4] = [
        "low_rank_up_backward_bf16_1",
        "low_rank_up_backward_bf16_2",
        "low_rank_up_backward_bf16_3",
        "low_rank_up_backward_bf16_4",
    ];
    const FROM_F32: [&str; 4] = [
        "low_rank_up_backward_f32_1",
        "low_rank_up_backward_f32_2",
        "low_rank_up_backward_f32_3",
        "low_rank_up_backward_f32_4",
    ];
    let (u, b, dims, scale) = (up.u_tr, up.b_or, up.dims, up.scale);
    let Dims { t, wide, rank } = dims;
    if !(fits(dims, u.dtype()) && d_u.dtype() == DType::Bf16) {
        let none = Drops::of(None);
        if let Some(d_b) = d_b {
            weight(cuda, d_b, d_y, u, [t, wide, rank], scale, none)?;
        }
        return narrow(cuda, d_u, d_y, Weights::up(up), dims, none);
    }
    let kernels = match d_y.dtype() {
        DType::Bf16 => FROM_BF16,
        DType::F32 => FROM_F32,
    };
    for slice in slices(rank) {
        let parts = Parts::new(cuda.properties(), dims, slice);
        let [partial_u, partial_b] = parts.pieces(dims, slice).take(cuda)?;
        let args = Args::new()
            .pointer(partial_u)
            .pointer(partial_b)
            .tensor(d_y)
            .pointer(slice.of_columns(u))
            .pointer(slice.of_columns(b));
        let args = slice.sizes(args, dims).u32(parts.rows_each);
        let kernel = kernels[slice.tiles() - 1];
        cuda.launch(&LOW_RANK, kernel, parts.grid(), args)?;

        let u_blocks = (t * slice.width()).div_ceil(2 * THREADS as usize);
        let b_blocks = match d_b {
            Some(_) => wide.div_ceil(32) * slice.width() / 8,
            None => 0,
        };
        let args = Args::new()
            .pointer(slice.of_columns(d_u))
            .pointer(d_b.as_deref().map_or(0, |d_b| slice.of_columns(d_b)))
            .pointer(partial_u)
            .pointer(partial_b)
            .u32(parts.across)
            .u32(parts.down)
            .u32(u_blocks)
            .u32(t)
            .u32(wide)
            .u32(slice.width())
            .u32(slice.len)
            .u32(rank)
            .f32(scale);
        let grid = Grid::line(u_blocks + b_blocks, THREADS);
        cuda.launch(&LOW_RANK, "low_rank_up_backward_sum", grid, args)?;
    }
    Ok(())
}

pub(super) fn down_backward(
    cuda: Cuda,
    d_x: &mut Tensor,
    d_a: Option<&mut Tensor>,
    d_u: &Tensor,
    down: &Down,
    write: Write,
) -> Result<()> {
    const ASSIGNING: [&str; 4] = [
        "low_rank_down_backward_1",
        "low_rank_down_backward_2",
        "low_rank_down_backward_3",
        "low_rank_down_backward_4",
    ];
    const ADDING: [&str; 4] = [
        "low_rank_down_backward_accumulate_1",
        "low_rank_down_backward_accumulate_2",
        "low_rank_down_backward_accumulate_3",
        "low_rank_down_backward_accumulate_4",
    ];
    let (x, a, dims) = (down.x_ti, down.a_ri, down.dims);
    let Dims { t, wide, rank } = dims;
    let drops = Drops::of(down.dropout);
    if !(fits(dims, d_u.dtype()) && x.dtype() == DType::Bf16) {
        if let Some(d_a) = d_a {
            weight(cuda, d_a, d_u, x, [t, rank, wide], 1.0, drops)?;
        }
        return broad(cuda, d_x, d_u, Weights::down(down), dims, drops, write);
    }
    for slice in slices(rank) {
        let parts = Parts::new(cuda.properties(), dims, slice);
        let partials = cuda.scratch(parts.over_rows(dims, slice))?;
        let kernel = slice.kernel([ASSIGNING, ADDING], write);
        let args = Args::new()
            .view_mut(d_x)
            .pointer(partials)
            .pointer(slice.of_columns(d_u))
            .tensor(x)
            .pointer(slice.of_rows(a, wide))
            .u64(drops.key);
        let args = slice
            .sizes(args, dims)
            .u32(parts.rows_each)
            .u32(drops.threshold as usize)
            .f32(drops.scale);
        cuda.launch(&LOW_RANK, kernel, parts.grid(), args)?;

        let Some(d_a) = &d_a else { continue };
        let args = Args::new()
            .pointer(slice.of_rows(d_a, wide))
            .pointer(partials)
            .u32(parts.down)
            .u32(wide)
            .u32(slice.width())
            .u32(slice.len)
            .f32(drops.scale);
        let grid = Grid::each(slice.len * wide, THREADS);
        cuda.launch(&LOW_RANK, "low_rank_down_backward_sum", grid, args)?;
    }
    Ok(())
}

/// See [`super::backward_scratch_bytes`]: up_backward's, which has the sums of d_u besides. The other kernels take none.
pub(super) fn scratch_bytes(gpu: DeviceProperties, dims: Dims, dtype: DType) -> usize {
    if !fits(dims, dtype) {
        return 0;
    }
    let bytes =
        slices(dims.rank).map(|slice| Parts::new(gpu, dims, slice).pieces(dims, slice).bytes());
    bytes.max().unwrap_or(0)
}

/// Whether the fast kernels take a bf16 u of these sizes: whole vectors of eight features, words of two ranks.
fn fits(dims: Dims, u_dtype: DType) -> bool {
    u_dtype == DType::Bf16 && dims.wide.is_multiple_of(8) && dims.rank.is_multiple_of(2)
}

/// Ranks `start` to `start + len`.
#[derive(Clone, Copy)]
struct Slice {
    start: usize,
    len: usize,
}

fn slices(rank: usize) -> impl Iterator<Item = Slice> {
    (0..rank).step_by(SLICE).map(move |start| Slice {
        start,
        len: SLICE.min(rank - start),
    })
}

impl Slice {
    /// Tiles of 16 ranks.
    fn tiles(self) -> usize {
        self.len.div_ceil(16)
    }

    fn width(self) -> usize {
        16 * self.tiles()
    }

    /// Of kernels by tiles, assigning and adding ones: only the first slice assigns, the others add to it.
    fn kernel(self, [assigning, adding]: [[&'static str; 4]; 2], write: Write) -> &'static str {
        let kernels = if write == Write::Accumulate || self.start > 0 {
            adding
        } else {
            assigning
        };
        kernels[self.tiles() - 1]
    }

    /// T, the wide side, the slice's ranks, all ranks.
    fn sizes(self, args: Args, dims: Dims) -> Args {
        args.u32(dims.t).u32(dims.wide).u32(self.len).u32(dims.rank)
    }

    /// Of [T,R] or [O,R].
    fn of_columns(self, tensor: &Tensor) -> u64 {
        tensor.device_pointer() + (self.start * tensor.dtype().size()) as u64
    }

    /// Of [R,I] f32.
    fn of_rows(self, tensor: &Tensor, wide: usize) -> u64 {
        tensor.device_pointer() + (self.start * wide * tensor.dtype().size()) as u64
    }
}

/// How a backward pass is cut into blocks: as many as run at once, each over all the rows it can have.
struct Parts {
    across: usize,
    down: usize,
    rows_each: usize,
}

impl Parts {
    fn new(gpu: DeviceProperties, dims: Dims, slice: Slice) -> Parts {
        // A warp has 64 columns, or 32 where ranks take the registers.
        let columns = if slice.tiles() == 1 { 64 } else { 32 };
        let across = dims.wide.div_ceil(columns * WARPS);
        let at_once = gpu.n_multiprocessors as usize * BLOCKS_EACH;
        let down = (at_once / across).max(1);
        let rows_each = dims.t.div_ceil(down).next_multiple_of(16).max(16);
        Parts {
            across,
            down: dims.t.div_ceil(rows_each),
            rows_each,
        }
    }

    /// Of the partial sums over the wide dimension [across, T, width], and over rows.
    fn pieces(&self, dims: Dims, slice: Slice) -> Pieces<2> {
        let over_wide = size_of::<f32>() * self.across * dims.t * slice.width();
        Pieces::new([over_wide, self.over_rows(dims, slice)])
    }

    /// Bytes of the partial sums over rows [down, width, wide].
    fn over_rows(&self, dims: Dims, slice: Slice) -> usize {
        size_of::<f32>() * self.down * slice.width() * dims.wide
    }

    fn grid(&self) -> Grid {
        grid(self.across, self.down)
    }
}

fn grid(across: usize, down: usize) -> Grid {
    Grid {
        blocks: [across as u32, down as u32, 1],
        threads: THREADS,
        shared_bytes: 0,
    }
}

/// A dropout as kernels get it; threshold 0: nothing is dropped.
#[derive(Clone, Copy)]
struct Drops {
    key: u64,
    threshold: u32,
    scale: f32,
}

impl Drops {
    fn of(dropout: Option<&Dropout>) -> Drops {
        match dropout {
            Some(dropout) => Drops {
                key: dropout.key(),
                threshold: dropout.threshold(),
                scale: dropout.keep_scale(),
            },
            None => Drops {
                key: 0,
                threshold: 0,
                scale: 1.0,
            },
        }
    }

    fn args(self, args: Args) -> Args {
        args.u64(self.key)
            .u32(self.threshold as usize)
            .f32(self.scale)
    }
}

/// A or B for the kernels of any type: the element of rank r and feature c lies at r · by_rank + c · by_feature; `alpha` is
/// what its products are multiplied by.
struct Weights<'a> {
    w: &'a Tensor,
    by_rank: usize,
    by_feature: usize,
    alpha: f32,
}

impl<'a> Weights<'a> {
    fn down(down: &Down<'a>) -> Self {
        Weights {
            w: down.a_ri,
            by_rank: down.dims.wide,
            by_feature: 1,
            alpha: 1.0,
        }
    }

    fn up(up: &Up<'a>) -> Self {
        Weights {
            w: up.b_or,
            by_rank: 1,
            by_feature: up.dims.rank,
            alpha: up.scale,
        }
    }
}

/// out [T,R] = alpha dropout(x) wᵀ.
fn narrow(
    cuda: Cuda,
    out: &mut Tensor,
    x: &Tensor,
    weights: Weights,
    dims: Dims,
    drops: Drops,
) -> Result<()> {
    let args = Args::new().view_mut(out).view(x).view(weights.w);
    let args = args
        .u32(dims.rank)
        .u32(dims.wide)
        .u32(weights.by_rank)
        .u32(weights.by_feature)
        .f32(weights.alpha);
    let grid = grid(dims.t, dims.rank.div_ceil(8));
    cuda.launch(&LOW_RANK, "low_rank_any_narrow", grid, drops.args(args))
}

/// out [T,wide] = or += dropout(alpha u w).
fn broad(
    cuda: Cuda,
    out: &mut Tensor,
    u: &Tensor,
    weights: Weights,
    dims: Dims,
    drops: Drops,
    write: Write,
) -> Result<()> {
    let n = dims.t * dims.wide;
    let args = Args::new().view_mut(out).view(u).view(weights.w);
    let args = args
        .u64(n as u64)
        .u32(dims.rank)
        .u32(dims.wide)
        .u32(weights.by_rank)
        .u32(weights.by_feature)
        .u32(usize::from(write == Write::Accumulate))
        .f32(weights.alpha);
    let grid = Grid::each(n, THREADS);
    cuda.launch(&LOW_RANK, "low_rank_any_wide", grid, drops.args(args))
}

/// d_w [P,Q] += alpha pᵀ dropout(q) over T rows.
fn weight(
    cuda: Cuda,
    d_w: &mut Tensor,
    p: &Tensor,
    q: &Tensor,
    [t, p_width, q_width]: [usize; 3],
    alpha: f32,
    drops: Drops,
) -> Result<()> {
    let args = Args::new().tensor_mut(d_w).view(p).view(q);
    let args = args.u32(t).u32(p_width).u32(q_width).f32(alpha);
    let grid = Grid::each(p_width * q_width, THREADS);
    cuda.launch(&LOW_RANK, "low_rank_any_weight", grid, drops.args(args))
}
