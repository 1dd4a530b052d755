//! Tables of tiles for the kernels, made from the document boundaries: the longest first, so that none begins when the others
//! are done. Backward keeps the gradients of the scores between its two kernels, as much at a time as it may.

use std::cmp::Reverse;
use std::ops::Range;

use super::{Dims, Gradients, Saved, Sequences};
use crate::cuda::sources::ATTENTION;
use crate::cuda::{Args, Cuda, DeviceProperties, Grid, Pieces};
use crate::{DType, Error, Result, Tensor};

const MAX_HEAD_DIM: usize = 256;
/// Rows of a tile of the kernels for any type: queries of forward, keys or queries of backward.
const ANY_QUERIES: usize = 32;
const ANY_ROWS: usize = 16;
/// Rows that attention_cached_bf16 takes for one key:value head.
const CACHED_ROWS: usize = 16;
/// Fewest keys that are worth a block of their own.
const SPLIT_KEYS: usize = 128;
/// Shared memory of the larger of the forward kernels.
const LARGE_SHARED_BYTES: usize = 192 << 10;
/// Compute capability whose warps multiply in groups of four.
const WARPGROUPS: u32 = 90;
/// Keys of an item of backward's first kernel, queries of one of its second, queries that share a block of score gradients.
const BACKWARD_KEYS: usize = 64;
const BACKWARD_QUERIES: usize = 128;
const BLOCK_QUERIES: usize = 32;
const BLOCK_BYTES: usize = BACKWARD_KEYS * BLOCK_QUERIES * 2;
/// Share of the GPU's memory that score gradients may take.
const SCORE_SHARE: usize = 64;

impl Sequences<'_> {
    /// # Errors
    /// [`Error::Unsupported`] for heads wider than a kernel takes.
    fn check_head_dim(&self, op: &'static str) -> Result<()> {
        if self.dims.n <= MAX_HEAD_DIM {
            return Ok(());
        }
        let what = format!("head dim {} is above {MAX_HEAD_DIM}", self.dims.n);
        Err(Error::Unsupported { op, what })
    }

    /// Whether the matrix units can do it. Their kernels look for the largest score before it is scaled.
    fn is_fast(&self, others: &[&Tensor]) -> bool {
        let mut tensors = [self.q_thn, self.k_sgn, self.v_sgn]
            .into_iter()
            .chain(others.iter().copied());
        matches!(self.dims.n, 64 | 128 | 256)
            && self.scale > 0.0
            && tensors.all(|tensor| tensor.dtype() == DType::Bf16)
    }
}

pub(super) fn forward(
    cuda: Cuda,
    out_thn: &mut Tensor,
    lse_th: &mut Tensor,
    sequences: &Sequences,
    documents: &[Range<usize>],
) -> Result<()> {
    sequences.check_head_dim("attention::forward")?;
    let kernel = if sequences.is_fast(&[out_thn]) {
        Forward::fast(cuda, sequences.dims)
    } else {
        Forward::any(sequences.dims)
    };
    let tiles = forward_tiles(documents, kernel.rows);
    let queries = Queries {
        tiles: cuda.upload(&tiles)?,
        n_tiles: tiles.len() / 4,
        past: 0,
    };
    kernel.queue(
        cuda,
        out_thn,
        Some(lse_th),
        sequences,
        &queries,
        &Split::none(),
    )
}

pub(super) fn forward_cached(
    cuda: Cuda,
    out_thn: &mut Tensor,
    sequences: &Sequences,
    past: usize,
) -> Result<()> {
    sequences.check_head_dim("attention::forward_cached")?;
    let dims = sequences.dims;
    let n_keys = past + dims.t;
    let is_fast = sequences.is_fast(&[out_thn]);
    if is_fast && dims.t * dims.ratio() <= CACHED_ROWS {
        let split = Split::new(cuda, dims, n_keys, dims.g)?;
        queue_cached(cuda, out_thn, sequences, past, &split)?;
        return split.combine(cuda, out_thn, dims);
    }
    let kernel = if is_fast {
        Forward::fast(cuda, dims)
    } else {
        Forward::any(dims)
    };
    let queries = Queries {
        tiles: 0,
        n_tiles: dims.t.div_ceil(kernel.rows),
        past,
    };
    let split = if is_fast {
        Split::none()
    } else {
        Split::new(cuda, dims, n_keys, queries.n_tiles * dims.h)?
    };
    kernel.queue(cuda, out_thn, None, sequences, &queries, &split)?;
    split.combine(cuda, out_thn, dims)
}

pub(super) fn backward(
    cuda: Cuda,
    gradients: Gradients,
    saved: &Saved,
    sequences: &Sequences,
    documents: &[Range<usize>],
    score_bytes: Option<usize>,
) -> Result<()> {
    sequences.check_head_dim("attention::backward")?;
    let written = [
        &*gradients.d_q_thn,
        &*gradients.d_k_tgn,
        &*gradients.d_v_tgn,
    ];
    let is_fast =
        sequences.is_fast(&written) && sequences.is_fast(&[saved.d_out_thn, saved.out_thn]);
    if !is_fast {
        return backward_any(cuda, gradients, saved, sequences, documents);
    }
    let blocks = score_bytes.map_or(score_blocks(cuda.properties()), |bytes| bytes / BLOCK_BYTES);
    let plan = Plan::new(documents, sequences.dims, blocks);
    backward_fast(cuda, gradients, saved, sequences, &plan)
}

/// Documents cut into `rows` queries: row of q, rows, row of its document's first key, position; the most keys first.
fn forward_tiles(documents: &[Range<usize>], rows: usize) -> Vec<u32> {
    let mut tiles: Vec<[usize; 4]> = cut(documents, rows)
        .map(|(document, tile)| {
            [
                tile.start,
                tile.len(),
                document.start,
                tile.start - document.start,
            ]
        })
        .collect();
    tiles.sort_by_key(|[_, n_rows, _, position]| Reverse(position + n_rows));
    words(&tiles)
}

/// Each document with its pieces of `rows` rows.
fn cut(
    documents: &[Range<usize>],
    rows: usize,
) -> impl Iterator<Item = (&Range<usize>, Range<usize>)> {
    documents.iter().flat_map(move |document| {
        let starts = document.clone().step_by(rows);
        starts.map(move |start| (document, start..(start + rows).min(document.end)))
    })
}

fn words<const N: usize>(entries: &[[usize; N]]) -> Vec<u32> {
    entries.iter().flatten().map(|x| *x as u32).collect()
}

/// One of the forward kernels.
struct Forward {
    kernel: &'static str,
    /// Queries and heads of a block.
    rows: usize,
    heads: usize,
    threads: u32,
    shared_bytes: usize,
    is_fast: bool,
}

/// Which tokens attend: a table of tiles, or none and T tokens after `past` others.
struct Queries {
    tiles: u64,
    n_tiles: usize,
    past: usize,
}

impl Forward {
    fn fast(cuda: Cuda, dims: Dims) -> Self {
        // A prompt of a few tokens is better spread over more and smaller blocks.
        let is_large = dims.t > 64 && cuda.shared_bytes_per_block() >= LARGE_SHARED_BYTES;
        let in_pairs = dims.ratio().is_multiple_of(2) && cuda.compute() == WARPGROUPS;
        let (kernel, rows, heads, n_stages) = match dims.n {
            64 => ("attention_forward_bf16_64", 128, 1, 2),
            128 => ("attention_forward_bf16_128", 128, 1, 2),
            _ if is_large && in_pairs => ("attention_forward_warpgroups_256", 64, 2, 2),
            _ if is_large => ("attention_forward_bf16_256_large", 128, 1, 2),
            _ => ("attention_forward_bf16_256", 64, 1, 1),
        };
        let n_keys = 64;
        Forward {
            kernel,
            rows,
            heads,
            threads: (2 * rows * heads) as u32,
            shared_bytes: (rows * heads + 2 * n_stages * n_keys) * dims.n * 2,
            is_fast: true,
        }
    }

    fn any(dims: Dims) -> Self {
        Forward {
            kernel: "attention_forward_any",
            rows: ANY_QUERIES,
            heads: 1,
            threads: 256,
            shared_bytes: any_shared_bytes(dims),
            is_fast: false,
        }
    }

    fn queue(
        &self,
        cuda: Cuda,
        out_thn: &mut Tensor,
        lse_th: Option<&mut Tensor>,
        sequences: &Sequences,
        queries: &Queries,
        split: &Split,
    ) -> Result<()> {
        let Dims { t, h, g, n } = sequences.dims;
        let n_blocks = queries.n_tiles * h / self.heads;
        let grid = Grid {
            blocks: [n_blocks as u32, split.n_splits as u32, 1],
            threads: self.threads,
            shared_bytes: self.shared_bytes,
        };
        let lse = lse_th.map_or(0, |lse| lse.device_pointer());
        let args = if self.is_fast {
            Args::new()
                .tensor_mut(out_thn)
                .pointer(lse)
                .tensor(sequences.q_thn)
                .tensor(sequences.k_sgn)
                .tensor(sequences.v_sgn)
        } else {
            Args::new()
                .view_mut(out_thn)
                .pointer(lse)
                .pointer(split.partial)
                .pointer(split.runs)
                .view(sequences.q_thn)
                .view(sequences.k_sgn)
                .view(sequences.v_sgn)
        };
        let args = args
            .pointer(queries.tiles)
            .u32(t)
            .u32(queries.past)
            .u32(h)
            .u32(g);
        let args = if self.is_fast {
            args
        } else {
            args.u32(n).u32(split.n_keys)
        };
        cuda.launch(&ATTENTION, self.kernel, grid, args.f32(sequences.scale))
    }
}

/// Keys distributed over several blocks, whose sums are put together afterwards.
struct Split {
    n_splits: usize,
    /// Keys of a split; more than there are where there is only one.
    n_keys: usize,
    /// [splits,T·H,N] sums and [splits,T·H,2] maxima and sums of weights; null where there is only one.
    partial: u64,
    runs: u64,
}

impl Split {
    fn none() -> Self {
        Split {
            n_splits: 1,
            n_keys: u32::MAX as usize,
            partial: 0,
            runs: 0,
        }
    }

    /// Enough for two blocks a multiprocessor, where `n_blocks` there are anyway.
    fn new(cuda: Cuda, dims: Dims, n_keys: usize, n_blocks: usize) -> Result<Self> {
        let wanted = (2 * cuda.n_multiprocessors() as usize).div_ceil(n_blocks.max(1));
        let n_splits = wanted.min(n_keys.div_ceil(SPLIT_KEYS)).max(1);
        let split_keys = n_keys.div_ceil(n_splits).next_multiple_of(64);
        let n_splits = n_keys.div_ceil(split_keys.max(1));
        if n_splits <= 1 {
            return Ok(Split::none());
        }
        let n_rows = dims.t * dims.h;
        let numels = [n_splits * n_rows * dims.n, n_splits * n_rows * 2];
        let pieces = Pieces::new(numels.map(|numel| numel * size_of::<f32>()));
        let [partial, runs] = pieces.take(cuda)?;
        Ok(Split {
            n_splits,
            n_keys: split_keys,
            partial,
            runs,
        })
    }

    fn combine(&self, cuda: Cuda, out_thn: &mut Tensor, dims: Dims) -> Result<()> {
        if self.n_splits == 1 {
            return Ok(());
        }
        let n_rows = dims.t * dims.h;
        let grid = Grid {
            shared_bytes: self.n_splits * size_of::<f32>(),
            ..Grid::line(n_rows, 256)
        };
        let args = Args::new()
            .view_mut(out_thn)
            .pointer(self.partial)
            .pointer(self.runs)
            .u32(self.n_splits)
            .u32(n_rows)
            .u32(dims.n);
        cuda.launch(&ATTENTION, "attention_combine", grid, args)
    }
}

fn queue_cached(
    cuda: Cuda,
    out_thn: &mut Tensor,
    sequences: &Sequences,
    past: usize,
    split: &Split,
) -> Result<()> {
    let Dims { t, h, g, n } = sequences.dims;
    let kernel = match n {
        64 => "attention_cached_bf16_64",
        128 => "attention_cached_bf16_128",
        _ => "attention_cached_bf16_256",
    };
    let n_blocks = if t == 0 { 0 } else { split.n_splits };
    let (n_warps, n_slots, n_keys) = (4, 3, 16);
    let grid = Grid {
        blocks: [n_blocks as u32, g as u32, 1],
        threads: 32 * n_warps as u32,
        shared_bytes: n_warps * n_slots * n_keys * n * 2,
    };
    let args = Args::new()
        .tensor_mut(out_thn)
        .pointer(split.partial)
        .pointer(split.runs)
        .tensor(sequences.q_thn)
        .tensor(sequences.k_sgn)
        .tensor(sequences.v_sgn)
        .u32(t)
        .u32(past)
        .u32(h)
        .u32(g)
        .u32(split.n_keys)
        .f32(sequences.scale);
    cuda.launch(&ATTENTION, kernel, grid, args)
}

/// Three tiles of 32 rows, or two of 16 and two of 32, of padded f32 rows.
fn any_shared_bytes(dims: Dims) -> usize {
    3 * ANY_QUERIES * (dims.n.next_multiple_of(32) + 4) * size_of::<f32>()
}

fn backward_any(
    cuda: Cuda,
    gradients: Gradients,
    saved: &Saved,
    sequences: &Sequences,
    documents: &[Range<usize>],
) -> Result<()> {
    let Dims { t, h, g, n } = sequences.dims;
    let delta = cuda.scratch(t * h * size_of::<f32>())?;
    let args = Args::new()
        .pointer(delta)
        .view(saved.d_out_thn)
        .view(saved.out_thn)
        .u32(t * h)
        .u32(n);
    let grid = Grid::line((t * h).div_ceil(8), 256);
    cuda.launch(&ATTENTION, "attention_backward_delta_any", grid, args)?;

    let finish = |args: Args, tiles: &[u32]| -> Result<Args> {
        Ok(args
            .view(saved.d_out_thn)
            .view(sequences.q_thn)
            .view(sequences.k_sgn)
            .view(sequences.v_sgn)
            .tensor(saved.lse_th)
            .pointer(delta)
            .pointer(cuda.upload(tiles)?)
            .u32(h)
            .u32(g)
            .u32(n)
            .f32(sequences.scale))
    };
    let grid = |n_blocks| Grid {
        shared_bytes: any_shared_bytes(sequences.dims),
        ..Grid::line(n_blocks, 256)
    };
    // Keys that many queries see come first, and queries that see many keys.
    let mut keys: Vec<[usize; 4]> = cut(documents, ANY_ROWS)
        .map(|(document, tile)| [tile.start, tile.len(), document.end, 0])
        .collect();
    keys.sort_by_key(|[first, _, end, _]| Reverse(end - first));
    let args = finish(
        Args::new()
            .view_mut(gradients.d_k_tgn)
            .view_mut(gradients.d_v_tgn),
        &words(&keys),
    )?;
    cuda.launch(
        &ATTENTION,
        "attention_backward_keys_any",
        grid(keys.len() * g),
        args,
    )?;
    let mut queries: Vec<[usize; 4]> = cut(documents, ANY_ROWS)
        .map(|(document, tile)| [tile.start, tile.len(), document.start, 0])
        .collect();
    queries.sort_by_key(|[first, _, start, _]| Reverse(first - start));
    let args = finish(Args::new().view_mut(gradients.d_q_thn), &words(&queries))?;
    cuda.launch(
        &ATTENTION,
        "attention_backward_queries_any",
        grid(queries.len() * h),
        args,
    )
}

/// What backward does in which order: every head range meets every group of items. Usually there is one of each; more where
/// their score gradients would take too much memory.
#[derive(Debug, PartialEq)]
pub(super) struct Plan {
    /// (row, rows) of each 32 queries, by document.
    tiles: Vec<[usize; 2]>,
    groups: Vec<Group>,
    /// Key:value heads of a pass.
    n_pass: usize,
    /// Tiles of keys whose sums are carried from one group to the next.
    n_carried: usize,
}

#[derive(Debug, Default, PartialEq)]
struct Group {
    /// KeyItem and QueryItem of attention.cu.
    keys: Vec<[usize; 8]>,
    queries: Vec<[usize; 8]>,
    /// Blocks of score gradients for one key:value head.
    n_blocks: usize,
}

const CARRY_IN: usize = 1;
const CARRY_OUT: usize = 2;

/// Some queries of a document, counted from its start, with all keys that they see.
struct Piece {
    document: Range<usize>,
    queries: Range<usize>,
    /// Number of the document's first tile, and of its first carried one.
    first_tile: usize,
    first_carried: usize,
}

impl Piece {
    fn n_tiles(&self) -> usize {
        self.queries.len().div_ceil(BLOCK_QUERIES)
    }

    /// Blocks of one query head before those of the `keys`-th 64 keys: each 64 keys have a block for every 32 of the queries
    /// that do not all come before them.
    fn blocks_before(&self, keys: usize) -> usize {
        let whole = keys.min(self.queries.start / BACKWARD_KEYS);
        let cut = keys - whole;
        keys * self.n_tiles() - cut * cut.saturating_sub(1)
    }

    fn n_blocks(&self) -> usize {
        self.blocks_before(self.queries.end.div_ceil(BACKWARD_KEYS))
    }
}

impl Group {
    fn add(&mut self, piece: &Piece, ratio: usize) {
        let Piece {
            document, queries, ..
        } = piece;
        let n_tokens = document.len();
        for (number, key) in (0..queries.end).step_by(BACKWARD_KEYS).enumerate() {
            let first = key.max(queries.start);
            let carries_in = if key < queries.start { CARRY_IN } else { 0 };
            let carries_out = if queries.end < n_tokens { CARRY_OUT } else { 0 };
            self.keys.push([
                document.start + key,
                BACKWARD_KEYS.min(n_tokens - key),
                document.start + first,
                document.start + queries.end,
                piece.first_tile + first / BLOCK_QUERIES,
                self.n_blocks + ratio * piece.blocks_before(number),
                piece.first_carried + number,
                carries_in | carries_out,
            ]);
        }
        for position in queries.clone().step_by(BACKWARD_QUERIES) {
            self.queries.push([
                document.start + position,
                BACKWARD_QUERIES.min(queries.end - position),
                document.start,
                position,
                self.n_blocks,
                queries.start / BLOCK_QUERIES,
                piece.n_tiles(),
                0,
            ]);
        }
        self.n_blocks += ratio * piece.n_blocks();
    }
}

impl Plan {
    /// Items of keys, items of queries and blocks of each group.
    #[cfg(test)]
    pub(super) fn groups(&self) -> impl Iterator<Item = (Vec<[usize; 8]>, Vec<[usize; 8]>, usize)> {
        let groups = self.groups.iter();
        groups.map(|group| (group.keys.clone(), group.queries.clone(), group.n_blocks))
    }

    #[cfg(test)]
    pub(super) fn tile(&self, number: usize) -> [usize; 2] {
        self.tiles[number]
    }

    /// `budget`: blocks of score gradients at a time. One piece of 128 queries is done whatever it takes.
    pub(super) fn new(documents: &[Range<usize>], dims: Dims, budget: usize) -> Self {
        let ratio = dims.ratio();
        let tiles: Vec<[usize; 2]> = cut(documents, BLOCK_QUERIES)
            .map(|(_, tile)| [tile.start, tile.len()])
            .collect();
        let mut groups = vec![Group::default()];
        let (mut first_tile, mut n_carried) = (0, 0);
        for document in documents {
            let n_tokens = document.len();
            let n_key_tiles = n_tokens.div_ceil(BACKWARD_KEYS);
            let whole = Piece {
                document: document.clone(),
                queries: 0..n_tokens,
                first_tile,
                first_carried: n_carried,
            };
            let is_cut = ratio * whole.n_blocks() > budget;
            let rows = if is_cut {
                let n_tiles = budget / (ratio * n_key_tiles);
                let rows = n_tiles * BLOCK_QUERIES / BACKWARD_QUERIES * BACKWARD_QUERIES;
                rows.max(BACKWARD_QUERIES)
            } else {
                n_tokens.max(1)
            };
            for start in (0..n_tokens).step_by(rows) {
                let piece = Piece {
                    document: document.clone(),
                    queries: start..(start + rows).min(n_tokens),
                    ..whole
                };
                let n_blocks = ratio * piece.n_blocks();
                match groups.last_mut() {
                    Some(last) if last.n_blocks == 0 || last.n_blocks + n_blocks <= budget => {
                        last.add(&piece, ratio);
                    }
                    _ => {
                        let mut group = Group::default();
                        group.add(&piece, ratio);
                        groups.push(group);
                    }
                }
            }
            first_tile += n_tokens.div_ceil(BLOCK_QUERIES);
            if is_cut {
                n_carried += n_key_tiles;
            }
        }
        for group in &mut groups {
            group
                .keys
                .sort_by_key(|[_, _, query, query_end, ..]| Reverse(query_end - query));
            group
                .queries
                .sort_by_key(|[_, n_rows, _, position, ..]| Reverse(position + n_rows));
        }
        // All heads at once where one group is all there is and leaves room; evenly, if not all.
        let fit = match &groups[..] {
            [all] => (budget / all.n_blocks.max(1)).clamp(1, dims.g),
            _ => 1,
        };
        let n_pass = dims.g.div_ceil(dims.g.div_ceil(fit));
        Plan {
            tiles,
            groups,
            n_pass,
            n_carried,
        }
    }
}

/// Backward's scratch: two numbers a query, score gradients, sums carried from one group to the next.
fn pieces(dims: Dims, n_tiles: usize, n_blocks: usize, n_carried: usize) -> Pieces<3> {
    Pieces::new([
        n_tiles * dims.h * 2 * BLOCK_QUERIES * size_of::<f32>(),
        n_blocks * BLOCK_BYTES,
        n_carried * 2 * BACKWARD_KEYS * dims.n * size_of::<f32>(),
    ])
}

impl Plan {
    fn pieces(&self, dims: Dims) -> Pieces<3> {
        let n_blocks = self.groups.iter().map(|group| group.n_blocks).max();
        pieces(
            dims,
            self.tiles.len(),
            self.n_pass * n_blocks.unwrap_or(0),
            self.n_pass * self.n_carried,
        )
    }
}

/// Blocks of score gradients that may exist at a time.
fn score_blocks(gpu: DeviceProperties) -> usize {
    gpu.memory_bytes / SCORE_SHARE / BLOCK_BYTES
}

#[cfg(test)]
pub(super) fn planned_bytes(
    gpu: DeviceProperties,
    dims: Dims,
    documents: &[Range<usize>],
) -> usize {
    Plan::new(documents, dims, score_blocks(gpu))
        .pieces(dims)
        .bytes()
}

/// See [`super::backward_scratch_bytes`]: no packing of `dims.t` tokens in documents of at most `longest` makes a larger plan.
pub(super) fn scratch_bytes(gpu: DeviceProperties, dims: Dims, longest: usize) -> usize {
    let budget = score_blocks(gpu);
    let longest = longest.min(dims.t);
    let n_key_tiles = longest.div_ceil(BACKWARD_KEYS);
    // A document of 64 n tokens has n (n + 1) blocks for each query head, one of a single token has one.
    let all =
        dims.ratio() * (dims.t * (n_key_tiles + 1).max(BACKWARD_KEYS)).div_ceil(BACKWARD_KEYS);
    let largest_document = dims.ratio() * n_key_tiles * (n_key_tiles + 1);
    let smallest_piece = dims.ratio() * n_key_tiles * (BACKWARD_QUERIES / BLOCK_QUERIES);
    let n_blocks = (dims.g * all).min(budget.max(smallest_piece));
    let n_carried = match largest_document > budget {
        true => dims.t.div_ceil(BACKWARD_KEYS) + dims.t.div_ceil(longest.max(1)),
        false => 0,
    };
    // A tile of its own for every token is what documents of one token have.
    pieces(dims, dims.t, n_blocks, n_carried).bytes()
}

fn backward_fast(
    cuda: Cuda,
    gradients: Gradients,
    saved: &Saved,
    sequences: &Sequences,
    plan: &Plan,
) -> Result<()> {
    let Dims { h, g, n, .. } = sequences.dims;
    let [rows, d_s, carry] = plan.pieces(sequences.dims).take(cuda)?;

    // 1. what every query contributes by itself
    let args = Args::new()
        .pointer(rows)
        .tensor(saved.d_out_thn)
        .tensor(saved.out_thn)
        .tensor(saved.lse_th)
        .pointer(cuda.upload(&words(&plan.tiles))?)
        .u32(h)
        .u32(n);
    let grid = Grid::line(plan.tiles.len() * h, 256);
    cuda.launch(&ATTENTION, "attention_backward_rows_bf16", grid, args)?;

    let (keys_kernel, n_stages) = match n {
        64 => ("attention_backward_keys_bf16_64", 2),
        128 => ("attention_backward_keys_bf16_128", 2),
        _ if cuda.compute() == WARPGROUPS => ("attention_backward_keys_warpgroups_256", 4),
        _ => ("attention_backward_keys_bf16_256", 2),
    };
    let queries_kernel = match n {
        64 => "attention_backward_queries_bf16_64",
        128 => "attention_backward_queries_bf16_128",
        _ => "attention_backward_queries_bf16_256",
    };
    for first_head in (0..g).step_by(plan.n_pass) {
        let n_pass = plan.n_pass.min(g - first_head);
        for group in &plan.groups {
            let heads = |args: Args, items: &[[usize; 8]]| -> Result<Args> {
                Ok(args
                    .pointer(cuda.upload(&words(items))?)
                    .u32(first_head)
                    .u32(n_pass)
                    .u32(group.n_blocks)
                    .u32(h)
                    .u32(g)
                    .f32(sequences.scale))
            };
            // 2. d_k, d_v and the gradients of the scores
            let args = Args::new()
                .tensor_mut(gradients.d_k_tgn)
                .tensor_mut(gradients.d_v_tgn)
                .pointer(d_s)
                .pointer(carry)
                .pointer(rows)
                .tensor(saved.d_out_thn)
                .tensor(sequences.q_thn)
                .tensor(sequences.k_sgn)
                .tensor(sequences.v_sgn);
            let grid = Grid {
                // Stages of q and d_out and of what belongs to their rows; p in f32; the item.
                shared_bytes: n_stages * BLOCK_QUERIES * (2 * n * 2 + 2 * 4)
                    + BACKWARD_KEYS * BLOCK_QUERIES * 4
                    + 32,
                ..Grid::line(group.keys.len() * n_pass, 256)
            };
            cuda.launch(&ATTENTION, keys_kernel, grid, heads(args, &group.keys)?)?;
            // 3. d_q
            let args = Args::new()
                .tensor_mut(gradients.d_q_thn)
                .pointer(d_s)
                .tensor(sequences.k_sgn);
            let grid = Grid {
                // Four stages of 32 keys and the gradients of their scores with 128 queries.
                shared_bytes: 4 * (32 * n * 2 + 32 * BACKWARD_QUERIES * 2),
                ..Grid::line(group.queries.len() * n_pass * sequences.dims.ratio(), 256)
            };
            let args = heads(args, &group.queries)?;
            cuda.launch(&ATTENTION, queries_kernel, grid, args)?;
        }
    }
    Ok(())
}
