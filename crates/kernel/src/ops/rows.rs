//! What the kernels over rows share: which instance to launch, how threads share a row, and the second stage of sums over rows.

use crate::cuda::sources::ROWS;
use crate::cuda::{Args, Cuda, DeviceProperties, Grid};
use crate::{DType, Error, Result, Tensor};

/// Threads of a block whose rows are shorter than its warps' reach.
const THREADS: usize = 256;
/// Columns of one thread.
const COLUMNS: usize = 8;
/// Threads of a block of the second stage.
const ADD_THREADS: u32 = 1024;
/// Columns of a block of the second stage.
const ADD_COLUMNS: usize = 32;

/// Of the names of a kernel's two instances, the first (16 bytes an access) where every tensor is bf16 and every width a multiple of
/// eight, else the second.
pub(crate) fn instance(
    [bf16, any]: [&'static str; 2],
    tensors: &[&Tensor],
    widths: &[usize],
) -> &'static str {
    let aligned = widths.iter().all(|width| width.is_multiple_of(COLUMNS));
    let all_bf16 = tensors.iter().all(|tensor| tensor.dtype() == DType::Bf16);
    if aligned && all_bf16 { bf16 } else { any }
}

/// One thread for eight of `n` elements.
pub(crate) fn eights(n: usize) -> Grid {
    Grid::each(n.div_ceil(COLUMNS), THREADS as u32)
}

/// How threads share rows, eight columns each: `group` of them a row, part of a warp or the whole block.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Rows {
    pub group: usize,
    n_rows: usize,
    threads: usize,
}

impl Rows {
    /// `n_rows` rows of `width` columns.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for rows wider than a block.
    pub fn new(op: &'static str, n_rows: usize, width: usize) -> Result<Rows> {
        let n_threads = width.div_ceil(COLUMNS).max(1);
        let (group, threads) = match n_threads {
            ..=32 => (n_threads.next_power_of_two(), THREADS),
            33..=1024 => {
                let threads = n_threads.next_multiple_of(32);
                (threads, threads)
            }
            _ => {
                let what = format!("rows of {width} columns (at most {})", 1024 * COLUMNS);
                return Err(Error::Unsupported { op, what });
            }
        };
        Ok(Rows {
            group,
            n_rows,
            threads,
        })
    }

    /// Each row once.
    pub fn grid(self) -> Grid {
        let rows_of_block = self.threads / self.group;
        Grid::line(self.n_rows.div_ceil(rows_of_block), self.threads as u32)
    }

    /// As many blocks as the GPU holds at a time (of kernels with 64 registers), each walking many rows.
    pub fn walking_grid(self, gpu: DeviceProperties) -> Grid {
        let mut grid = self.grid();
        let at_a_time = gpu.n_multiprocessors * (1024 / grid.threads);
        grid.blocks[0] = grid.blocks[0].min(at_a_time);
        grid
    }
}

/// Sums over rows that each block leaves in scratch: one row a block, begun at a multiple of eight.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Partials {
    /// 0 where no sums are wanted: what the kernels take for that.
    pub pointer: u64,
    n: usize,
    stride: usize,
}

impl Partials {
    /// Room for `n` partial sums of `width` columns, if `wanted`. Takes the op's scratch.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`]
    pub fn new(cuda: Cuda, wanted: bool, n: usize, width: usize) -> Result<Partials> {
        let pointer = match wanted {
            true => cuda.scratch(Partials::bytes(n, width))?,
            false => 0,
        };
        let stride = Partials::stride(width);
        Ok(Partials { pointer, n, stride })
    }

    /// The scratch of [`Partials::new`].
    pub fn bytes(n: usize, width: usize) -> usize {
        n * Partials::stride(width) * size_of::<f32>()
    }

    fn stride(width: usize) -> usize {
        width.next_multiple_of(COLUMNS)
    }

    /// out += the partial sums, columns `from..from + out.numel()` of them, in the order of the blocks.
    ///
    /// # Errors
    /// [`Error::Cuda`]
    pub fn add_to(self, cuda: Cuda, out: &mut Tensor, from: usize) -> Result<()> {
        let n_columns = out.numel();
        let args = Args::new()
            .tensor_mut(out)
            .pointer(self.pointer + (from * size_of::<f32>()) as u64)
            .u32(self.n)
            .u32(self.stride)
            .u32(n_columns);
        let grid = Grid::line(n_columns.div_ceil(ADD_COLUMNS), ADD_THREADS);
        cuda.launch(&ROWS, "rows_add_partials", grid, args)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_go_to_parts_of_a_warp_or_to_a_block() {
        for (width, group, threads) in [
            (1, 1, 256),
            (64, 8, 256),
            (100, 16, 256),
            (256, 32, 256),
            (257, 64, 64),
            (2560, 320, 320),
            (5120, 640, 640),
        ] {
            let rows = Rows::new("test", 1000, width).unwrap();
            assert_eq!((rows.group, rows.threads), (group, threads), "{width}");
            let reached = rows.grid().blocks[0] as usize * threads / group;
            assert!(reached >= 1000, "{width}");
        }
        assert!(Rows::new("test", 1, 8193).is_err());
    }
}
