//! A low-rank update beside a linear layer: y = scale · dropout(x) Aᵀ Bᵀ, in two steps with u = dropout(x) Aᵀ between them.
//!
//! d_u = scale · d_y B, d_b += scale · d_yᵀ u; d_a += d_uᵀ dropout(x), d_x = dropout(d_u A) with the same elements dropped.
//! dropout(x) is never stored: it is made again from the seed where it is needed.
//! On a GPU the update costs one reading of x and d_y and one writing of y and d_x where x and u are bf16 and all widths fit
//! (features a multiple of 8, an even rank); A and B are rounded to bf16 then, and products are summed in f32.
// T tokens, I in features, O out features, R rank.

use super::dropout::Dropout;
use super::{Write, check};
use crate::cuda::DeviceProperties;
use crate::{DType, Device, Result, Tensor};

/// u_tr = dropout(x_ti) a_riᵀ, assigned. Shapes: u_tr [T,R], x_ti [..., I], leading dimensions flattened to T; a_ri [R,I] f32.
///
/// # Errors
/// [`crate::Error::Shape`] where shapes disagree, [`crate::Error::DType`] where a_ri is not f32.
pub fn down_forward(
    u_tr: &mut Tensor,
    x_ti: &Tensor,
    a_ri: &Tensor,
    dropout: Option<&Dropout>,
) -> Result<()> {
    const OP: &str = "low_rank::down_forward";
    let down = Down::new(OP, ("u_tr", u_tr), x_ti, a_ri, dropout)?;
    match check::device(OP, u_tr, &[("x_ti", x_ti), ("a_ri", a_ri)])? {
        Device::Cpu => cpu::down_forward(u_tr, &down),
        Device::Cuda(cuda) => cuda::down_forward(cuda, u_tr, &down)?,
    }
    Ok(())
}

/// y_to = or += scale · u_tr b_orᵀ. Shapes: y_to [..., O], u_tr [T,R], b_or [O,R] f32.
///
/// # Errors
/// As [`down_forward`].
pub fn up_forward(
    y_to: &mut Tensor,
    u_tr: &Tensor,
    b_or: &Tensor,
    scale: f32,
    write: Write,
) -> Result<()> {
    const OP: &str = "low_rank::up_forward";
    let up = Up::new(OP, ("y_to", y_to), u_tr, b_or, scale)?;
    match check::device(OP, y_to, &[("u_tr", u_tr), ("b_or", b_or)])? {
        Device::Cpu => cpu::up_forward(y_to, &up, write),
        Device::Cuda(cuda) => cuda::up_forward(cuda, y_to, &up, write)?,
    }
    Ok(())
}

/// d_u_tr = scale · d_y_to b_or, assigned; d_b_or += scale · d_y_toᵀ u_tr. Shapes as in [`up_forward`], d_b_or f32.
///
/// # Errors
/// As [`down_forward`].
pub fn up_backward(
    d_u_tr: &mut Tensor,
    d_b_or: Option<&mut Tensor>,
    d_y_to: &Tensor,
    u_tr: &Tensor,
    b_or: &Tensor,
    scale: f32,
) -> Result<()> {
    const OP: &str = "low_rank::up_backward";
    let up = Up::new(OP, ("d_y_to", d_y_to), u_tr, b_or, scale)?;
    check::shape(OP, "d_u_tr", d_u_tr, u_tr.shape())?;
    let mut others = vec![("d_y_to", d_y_to), ("u_tr", u_tr), ("b_or", b_or)];
    if let Some(d_b_or) = &d_b_or {
        check::shape(OP, "d_b_or", d_b_or, b_or.shape())?;
        check::f32(OP, "d_b_or", d_b_or)?;
        others.push(("d_b_or", d_b_or));
    }
    match check::device(OP, d_u_tr, &others)? {
        Device::Cpu => cpu::up_backward(d_u_tr, d_b_or, d_y_to, &up),
        Device::Cuda(cuda) => cuda::up_backward(cuda, d_u_tr, d_b_or, d_y_to, &up)?,
    }
    Ok(())
}

/// d_x_ti = or += dropout(d_u_tr a_ri); d_a_ri += d_u_trᵀ dropout(x_ti). Shapes as in [`down_forward`], d_a_ri f32; the same
/// `dropout` drops the same elements.
///
/// # Errors
/// As [`down_forward`].
pub fn down_backward(
    d_x_ti: &mut Tensor,
    d_a_ri: Option<&mut Tensor>,
    d_u_tr: &Tensor,
    x_ti: &Tensor,
    a_ri: &Tensor,
    dropout: Option<&Dropout>,
    write: Write,
) -> Result<()> {
    const OP: &str = "low_rank::down_backward";
    let down = Down::new(OP, ("d_u_tr", d_u_tr), x_ti, a_ri, dropout)?;
    check::numel(OP, "d_x_ti", d_x_ti, x_ti.numel())?;
    let mut others = vec![("d_u_tr", d_u_tr), ("x_ti", x_ti), ("a_ri", a_ri)];
    if let Some(d_a_ri) = &d_a_ri {
        check::shape(OP, "d_a_ri", d_a_ri, a_ri.shape())?;
        check::f32(OP, "d_a_ri", d_a_ri)?;
        others.push(("d_a_ri", d_a_ri));
    }
    match check::device(OP, d_x_ti, &others)? {
        Device::Cpu => cpu::down_backward(d_x_ti, d_a_ri, d_u_tr, &down, write),
        Device::Cuda(cuda) => cuda::down_backward(cuda, d_x_ti, d_a_ri, d_u_tr, &down, write)?,
    }
    Ok(())
}

/// Most bytes of scratch that [`up_backward`] and [`down_backward`] take on a GPU for `t` rows between `rank` and a side of `wide`
/// features, where u is of type `dtype`.
pub fn backward_scratch_bytes(
    gpu: DeviceProperties,
    [t, wide, rank]: [usize; 3],
    dtype: DType,
) -> usize {
    cuda::scratch_bytes(gpu, Dims { t, wide, rank }, dtype)
}

/// T rows between a wide side (I or O features) and a narrow one of rank R.
#[derive(Debug, Clone, Copy)]
struct Dims {
    t: usize,
    wide: usize,
    rank: usize,
}

/// What the step from the features to the rank reads, checked.
struct Down<'a> {
    x_ti: &'a Tensor,
    a_ri: &'a Tensor,
    dropout: Option<&'a Dropout>,
    dims: Dims,
}

impl<'a> Down<'a> {
    /// `u_tr`: the output, or its gradient, with its argument's name.
    fn new(
        op: &'static str,
        (u_arg, u_tr): (&'static str, &Tensor),
        x_ti: &'a Tensor,
        a_ri: &'a Tensor,
        dropout: Option<&'a Dropout>,
    ) -> Result<Self> {
        let [rank, wide] = check::dims(op, "a_ri", a_ri, "[R,I]")?;
        check::f32(op, "a_ri", a_ri)?;
        let t = check::rows(op, "x_ti", x_ti, wide)?;
        check::shape(op, u_arg, u_tr, &[t, rank])?;
        Ok(Down {
            x_ti,
            a_ri,
            dropout,
            dims: Dims { t, wide, rank },
        })
    }
}

/// What the step from the rank to the features reads, checked.
struct Up<'a> {
    u_tr: &'a Tensor,
    b_or: &'a Tensor,
    scale: f32,
    dims: Dims,
}

impl<'a> Up<'a> {
    /// `y_to`: the output, or its gradient, with its argument's name.
    fn new(
        op: &'static str,
        (y_arg, y_to): (&'static str, &Tensor),
        u_tr: &'a Tensor,
        b_or: &'a Tensor,
        scale: f32,
    ) -> Result<Self> {
        let [wide, rank] = check::dims(op, "b_or", b_or, "[O,R]")?;
        check::f32(op, "b_or", b_or)?;
        let t = check::rows(op, y_arg, y_to, wide)?;
        check::shape(op, "u_tr", u_tr, &[t, rank])?;
        Ok(Up {
            u_tr,
            b_or,
            scale,
            dims: Dims { t, wide, rank },
        })
    }
}

/// The products of `matmul`, over blocks of rows whose dropped inputs fit into scratch.
mod cpu {
    use rayon::prelude::*;

    use super::{Down, Up, Write};
    use crate::Tensor;
    use crate::cpu::{View, ViewMut, simd, with_scratch};
    use crate::ops::matmul::{self, cpu as products};

    /// Rows whose dropped inputs are held together; few in tests, so that small shapes cross a border.
    const ROW_BLOCK: usize = if cfg!(test) { 16 } else { 256 };

    pub(super) fn down_forward(u: &mut Tensor, down: &Down) {
        let (mut u, a) = (ViewMut::of(u), View::of(down.a_ri));
        let (wide, rank) = (down.dims.wide, down.dims.rank);
        down.for_dropped(|rows, x| {
            let u = u.slice(rows.start * rank..rows.end * rank);
            let dims = product(rows.len(), wide, rank);
            products::forward(u, x, a, dims, 1.0, Write::Assign);
        });
    }

    pub(super) fn up_forward(y: &mut Tensor, up: &Up, write: Write) {
        let (y, u, b) = (ViewMut::of(y), View::of(up.u_tr), View::of(up.b_or));
        let dims = product(up.dims.t, up.dims.rank, up.dims.wide);
        products::forward(y, u, b, dims, up.scale, write);
    }

    pub(super) fn up_backward(d_u: &mut Tensor, d_b: Option<&mut Tensor>, d_y: &Tensor, up: &Up) {
        let (d_y, u, b) = (View::of(d_y), View::of(up.u_tr), View::of(up.b_or));
        let dims = product(up.dims.t, up.dims.rank, up.dims.wide);
        if let Some(d_b) = d_b {
            let write = Write::Accumulate;
            products::backward_weight(d_b.f32s_mut(), d_y, u, dims, up.scale, write);
        }
        let d_u = ViewMut::of(d_u);
        products::backward_input(d_u, d_y, b, dims, up.scale, Write::Assign);
    }

    pub(super) fn down_backward(
        d_x: &mut Tensor,
        d_a: Option<&mut Tensor>,
        d_u: &Tensor,
        down: &Down,
        write: Write,
    ) {
        let (mut d_x, d_u, a) = (ViewMut::of(d_x), View::of(d_u), View::of(down.a_ri));
        let (t, wide, rank) = (down.dims.t, down.dims.wide, down.dims.rank);
        if let Some(d_a) = d_a {
            down.for_dropped(|rows, x| {
                let d_u = d_u.slice(rows.start * rank..rows.end * rank);
                let dims = product(rows.len(), wide, rank);
                let write = Write::Accumulate;
                products::backward_weight(d_a.f32s_mut(), d_u, x, dims, 1.0, write);
            });
        }
        let Some(dropout) = down.dropout else {
            let dims = product(t, wide, rank);
            return products::backward_input(d_x, d_u, a, dims, 1.0, write);
        };
        for start in (0..t).step_by(ROW_BLOCK) {
            let rows = start..(start + ROW_BLOCK).min(t);
            let d_u = d_u.slice(rows.start * rank..rows.end * rank);
            let n = rows.len() * wide;
            with_scratch(n, |d_dropped| {
                let dims = product(rows.len(), wide, rank);
                let whole = ViewMut::F32(d_dropped);
                products::backward_input(whole, d_u, a, dims, 1.0, Write::Assign);
                let first = rows.start * wide;
                d_x.slice(first..first + n)
                    .chunks(wide)
                    .into_par_iter()
                    .zip(d_dropped.par_chunks_mut(wide))
                    .enumerate()
                    .for_each(|(row, (mut d_x, d_dropped))| {
                        simd(
                            #[inline(always)]
                            || {
                                let first = (first + row * wide) as u64;
                                dropout.apply(d_dropped, first);
                                match write {
                                    Write::Accumulate => d_x.add(d_dropped),
                                    Write::Assign => d_x.store(d_dropped),
                                }
                            },
                        );
                    });
            });
        }
    }

    impl Down<'_> {
        /// Blocks of rows of dropout(x), all of x at once where nothing is dropped.
        fn for_dropped(&self, mut body: impl FnMut(std::ops::Range<usize>, View)) {
            let (t, wide, x) = (self.dims.t, self.dims.wide, View::of(self.x_ti));
            let Some(dropout) = self.dropout else {
                return body(0..t, x);
            };
            for start in (0..t).step_by(ROW_BLOCK) {
                let rows = start..(start + ROW_BLOCK).min(t);
                with_scratch(rows.len() * wide, |dropped| {
                    let chunks = dropped.par_chunks_mut(wide).zip(rows.clone());
                    chunks.for_each(|(dropped, row)| {
                        let row = row * wide..(row + 1) * wide;
                        simd(
                            #[inline(always)]
                            || {
                                x.slice(row.clone()).read_into(dropped);
                                dropout.apply(dropped, row.start as u64);
                            },
                        );
                    });
                    body(rows, View::F32(dropped));
                });
            }
        }
    }

    fn product(t: usize, i: usize, o: usize) -> matmul::Dims {
        matmul::Dims { t, i, o }
    }
}

mod cuda {
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
}

pub(crate) mod examples {
    use super::{Dropout, Write};
    use crate::DType::{self, Bf16, F32};
    use crate::example::{Example, PAIRS, Sizes, Tolerance};

    /// T, I, O, R: ranks and widths of the fast kernels, in slices too, and odd ones.
    const SHAPES: [[usize; 4]; 10] = [
        [70, 128, 96, 16],
        [37, 72, 40, 8],
        [1, 256, 128, 64],
        [129, 520, 1032, 32],
        [200, 64, 136, 48],
        [16, 32, 32, 4],
        [600, 1208, 1096, 16],
        [90, 104, 80, 130],
        [33, 40, 24, 3],
        [50, 33, 47, 16],
    ];

    const SCALE: f32 = 2.5;
    /// Of dropout.
    const RATES: [f32; 2] = [0.0, 0.1];
    const WRITES: [Write; 2] = [Write::Assign, Write::Accumulate];

    pub(crate) fn compared() -> Vec<Example> {
        let mut all = Vec::new();
        for shape in SHAPES {
            for dtype in [F32, Bf16] {
                all.extend(RATES.map(|rate| down_forward(shape, dtype, rate)));
                all.extend(WRITES.map(|write| up_forward(shape, dtype, write)));
            }
            // Gradients of the residual stream are f32.
            for types in PAIRS {
                all.push(up_backward(shape, types));
                for rate in RATES {
                    all.extend(WRITES.map(|write| down_backward(shape, types, rate, write)));
                    all.push(down_backward_frozen(shape, types, rate));
                }
            }
        }
        all
    }

    pub(crate) fn timed(sizes: &Sizes) -> Vec<Example> {
        let (d, f) = (sizes.hidden, sizes.feed_forward);
        let shape = [sizes.n_tokens, d, f, sizes.rank];
        let types = [sizes.dtype; 2];
        let rate = 0.01;
        vec![
            down_forward(shape, sizes.dtype, rate),
            up_forward(shape, sizes.dtype, Write::Assign),
            up_backward(shape, types),
            down_backward(shape, types, rate, Write::Assign),
        ]
    }

    /// `x_type`: of x, u and y. A shape with dropout ends in its rate.
    fn example(name: &'static str, shape: [usize; 4], x_type: DType, rate: f32) -> Example {
        let [t, i, o, r] = shape;
        let drops = match rate > 0.0 {
            true => format!("_dropout{rate}"),
            false => String::new(),
        };
        // Beside bf16 a GPU rounds A, B and d_y to bf16.
        let f32 = if x_type == F32 { 1e-5 } else { 6e-3 };
        Example::new(name, format!("t{t}_i{i}_o{o}_r{r}{drops}"))
            .tolerance(Tolerance { f32, bf16: 6e-3 })
    }

    fn product(t: usize, wide: usize, rank: usize) -> f64 {
        2.0 * (t * wide * rank) as f64
    }

    fn dropout(rate: f32) -> Option<Dropout> {
        (rate > 0.0).then_some(Dropout {
            rate,
            seed: 77,
            stream: 3,
        })
    }

    fn down_forward(shape: [usize; 4], dtype: DType, rate: f32) -> Example {
        let [t, i, _, r] = shape;
        let drops = dropout(rate);
        example("low_rank/down_forward", shape, dtype, rate)
            .out("u", &[t, r], dtype)
            .input("x", &[t, i], dtype)
            .input("a", &[r, i], F32)
            .operations_at_least(product(t, i, r))
            .run(move |[u], [x, a]| super::down_forward(u, x, a, drops.as_ref()))
    }

    fn up_forward(shape: [usize; 4], dtype: DType, write: Write) -> Example {
        let [t, _, o, r] = shape;
        let example = example("low_rank/up_forward", shape, dtype, 0.0);
        let example = match write {
            Write::Assign => example.out("y", &[t, o], dtype),
            Write::Accumulate => example.updated("y added", &[t, o], dtype),
        };
        example
            .input("u", &[t, r], dtype)
            .input("b", &[o, r], F32)
            .operations_at_least(product(t, o, r))
            .run(move |[y], [u, b]| super::up_forward(y, u, b, SCALE, write))
    }

    fn up_backward(shape: [usize; 4], [x_type, d_y_type]: [DType; 2]) -> Example {
        let [t, _, o, r] = shape;
        example("low_rank/up_backward", shape, x_type, 0.0)
            .out("d_u", &[t, r], x_type)
            .updated("d_b", &[o, r], F32)
            .input("d_y", &[t, o], d_y_type)
            .input("u", &[t, r], x_type)
            .input("b", &[o, r], F32)
            .operations_at_least(2.0 * product(t, o, r))
            .run(|[d_u, d_b], [d_y, u, b]| super::up_backward(d_u, Some(d_b), d_y, u, b, SCALE))
    }

    fn down_backward(
        shape: [usize; 4],
        [x_type, d_x_type]: [DType; 2],
        rate: f32,
        write: Write,
    ) -> Example {
        let [t, i, _, r] = shape;
        let drops = dropout(rate);
        let example = example("low_rank/down_backward", shape, x_type, rate);
        let example = match write {
            Write::Assign => example
                .out("d_x", &[t, i], d_x_type)
                .updated("d_a", &[r, i], F32),
            Write::Accumulate => example.updated("d_x added", &[t, i], d_x_type).updated(
                "d_a where d_x is added",
                &[r, i],
                F32,
            ),
        };
        example
            .input("d_u", &[t, r], x_type)
            .input("x", &[t, i], x_type)
            .input("a", &[r, i], F32)
            .operations_at_least(2.0 * product(t, i, r))
            .run(move |[d_x, d_a], [d_u, x, a]| {
                super::down_backward(d_x, Some(d_a), d_u, x, a, drops.as_ref(), write)
            })
    }

    fn down_backward_frozen(
        shape: [usize; 4],
        [x_type, d_x_type]: [DType; 2],
        rate: f32,
    ) -> Example {
        let [t, i, _, r] = shape;
        let drops = dropout(rate);
        example("low_rank/down_backward", shape, x_type, rate)
            .updated("d_x added, frozen", &[t, i], d_x_type)
            .input("d_u", &[t, r], x_type)
            .input("x", &[t, i], x_type)
            .input("a", &[r, i], F32)
            .run(move |[d_x], [d_u, x, a]| {
                super::down_backward(d_x, None, d_u, x, a, drops.as_ref(), Write::Accumulate)
            })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Error;
    use crate::ops::matmul;
    use crate::ops::testing::{STORAGES, assert_close, f64s, plus, tensor};

    /// Fewer rows than a block of them, several blocks, nothing a multiple of a vector.
    const SHAPES: [(usize, usize, usize, usize); 3] =
        [(1, 5, 3, 1), (9, 40, 7, 3), (50, 33, 64, 16)];
    const SCALE: f32 = 2.5;

    fn dropouts() -> [Option<Dropout>; 2] {
        let some = Dropout {
            rate: 0.3,
            seed: 4,
            stream: 9,
        };
        [None, Some(some)]
    }

    fn dropped(x: &Tensor, drops: Option<&Dropout>) -> Tensor {
        let mut dropped = x.to_dtype(DType::F32);
        if let Some(drops) = drops {
            drops.apply(dropped.f32s_mut(), 0);
        }
        dropped
    }

    fn zeros(shape: &[usize]) -> Tensor {
        Tensor::zeros(shape, DType::F32)
    }

    #[test]
    fn forward_agrees_with_dropout_and_products() {
        for (dtype, tolerance) in STORAGES {
            for (t, i, o, r) in SHAPES {
                for drops in dropouts() {
                    let x = tensor(&[t, i], 1, dtype);
                    let a = tensor(&[r, i], 2, DType::F32);
                    let b = tensor(&[o, r], 3, DType::F32);
                    let mut want = zeros(&[t, r]);
                    matmul::forward(&mut want, &dropped(&x, drops.as_ref()), &a).unwrap();
                    let mut u = Tensor::poison(&[t, r], dtype);
                    down_forward(&mut u, &x, &a, drops.as_ref()).unwrap();
                    assert_close("u", &u, &f64s(&want), tolerance);

                    let mut want = zeros(&[t, o]);
                    matmul::forward_accumulate(&mut want, &u, &b, SCALE).unwrap();
                    let mut y = Tensor::poison(&[t, o], dtype);
                    up_forward(&mut y, &u, &b, SCALE, Write::Assign).unwrap();
                    assert_close("y", &y, &f64s(&want), tolerance);
                    let before = tensor(&[t, o], 4, dtype);
                    let mut y = before.clone();
                    up_forward(&mut y, &u, &b, SCALE, Write::Accumulate).unwrap();
                    assert_close("y added to", &y, &plus(&f64s(&want), &before), tolerance);
                }
            }
        }
    }

    #[test]
    fn backward_agrees_with_dropout_and_products() {
        for (dtype, tolerance) in STORAGES {
            for (t, i, o, r) in SHAPES {
                for drops in dropouts() {
                    let drops = drops.as_ref();
                    let x = tensor(&[t, i], 1, dtype);
                    let a = tensor(&[r, i], 2, DType::F32);
                    let b = tensor(&[o, r], 3, DType::F32);
                    let u = tensor(&[t, r], 4, dtype);
                    let d_y = tensor(&[t, o], 5, dtype);

                    let mut want_u = zeros(&[t, r]);
                    matmul::backward_input(&mut want_u, &d_y, &b, SCALE, Write::Assign).unwrap();
                    let before = tensor(&[o, r], 6, DType::F32);
                    let mut want_b = before.clone();
                    matmul::backward_weight(&mut want_b, &d_y, &u, SCALE, Write::Accumulate)
                        .unwrap();
                    let (mut d_u, mut d_b) = (Tensor::poison(&[t, r], dtype), before.clone());
                    up_backward(&mut d_u, Some(&mut d_b), &d_y, &u, &b, SCALE).unwrap();
                    assert_close("d_u", &d_u, &f64s(&want_u), tolerance);
                    assert_close("d_b", &d_b, &f64s(&want_b), 1e-5);

                    let mut product = zeros(&[t, i]);
                    matmul::backward_input(&mut product, &d_u, &a, 1.0, Write::Assign).unwrap();
                    let want_x = f64s(&dropped(&product, drops));
                    let before = tensor(&[r, i], 7, DType::F32);
                    let mut want_a = before.clone();
                    let x_dropped = dropped(&x, drops);
                    matmul::backward_weight(&mut want_a, &d_u, &x_dropped, 1.0, Write::Accumulate)
                        .unwrap();
                    let (mut d_x, mut d_a) = (Tensor::poison(&[t, i], dtype), before.clone());
                    down_backward(&mut d_x, Some(&mut d_a), &d_u, &x, &a, drops, Write::Assign)
                        .unwrap();
                    assert_close("d_x", &d_x, &want_x, tolerance);
                    assert_close("d_a", &d_a, &f64s(&want_a), 1e-5);
                    let before = tensor(&[t, i], 8, dtype);
                    let mut d_x = before.clone();
                    down_backward(&mut d_x, None, &d_u, &x, &a, drops, Write::Accumulate).unwrap();
                    assert_close("d_x added to", &d_x, &plus(&want_x, &before), tolerance);
                }
            }
        }
    }

    /// As the kernels lay out what blocks add up apart, an H100's at the shapes of a released size.
    #[test]
    fn scratch_holds_the_partial_sums_of_every_slice() {
        let gpu = DeviceProperties {
            compute: 90,
            n_multiprocessors: 132,
            memory_bytes: 80 << 30,
        };
        let bytes = |dims, dtype| backward_scratch_bytes(gpu, dims, dtype);
        // 18 blocks across, so 14 of 592 rows each down.
        let want = 4 * 16 * (18 * 8192 + 14 * 9216);
        assert_eq!(bytes([8192, 9216, 16], DType::Bf16), want);
        // Ranks 64 and 16: 36 across and 7 down at the larger.
        let want = 4 * 64 * (36 * 8192 + 7 * 9216);
        assert_eq!(bytes([8192, 9216, 80], DType::Bf16), want);
        assert_eq!(bytes([8192, 9216, 16], DType::F32), 0);
        assert_eq!(bytes([8192, 9216, 3], DType::Bf16), 0);
        assert_eq!(bytes([0, 9216, 16], DType::Bf16), 0);
    }

    #[test]
    fn factors_in_bf16_are_refused() {
        let a = tensor(&[2, 8], 1, DType::Bf16);
        let mut u = zeros(&[3, 2]);
        let refused = down_forward(&mut u, &zeros(&[3, 8]), &a, None);
        assert!(matches!(refused, Err(Error::DType { arg: "a_ri", .. })));
    }
}
