//! Depthwise causal convolution of width 4 with SiLU, a sequence at a time; over packed documents it is part of
//! [`super::delta_inputs`], which shares this file's code.
//!
//! out[t,c] = silu(y[t,c]), y[t,c] = Σ_j w[c,0,j] x[t-3+j,c], with zeros for what lies before a document's start.
//! Source: transformers 5.17 Qwen3.5 (`conv1d.weight`, no bias).

// T tokens (packed), C channels.

use super::check;
use crate::{Device, Result, Tensor};

/// Taps of the filter.
pub(super) const WIDTH: usize = 4;
/// Earlier tokens that one output sees.
const PAST: usize = WIDTH - 1;

/// T new tokens of one sequence; `out` assigned. Shapes: out_tc, x_tc [T,C]; w [C,1,4]. `state_3c` [3,C] f32 holds the last three
/// inputs (oldest first; zeros at the sequence's start) and is updated. A sequence in pieces gives the bits of the whole where x
/// is stored alike.
///
/// # Errors
/// [`crate::Error::Shape`] where shapes disagree, [`crate::Error::DType`] where the state is not f32.
pub fn forward_with_state(
    out_tc: &mut Tensor,
    state_3c: &mut Tensor,
    x_tc: &Tensor,
    w: &Tensor,
) -> Result<()> {
    const OP: &str = "causal_conv1d::forward_with_state";
    let [t, c] = check::dims(OP, "x_tc", x_tc, "[T,C]")?;
    check::shape(OP, "out_tc", out_tc, &[t, c])?;
    check::shape(OP, "state_3c", state_3c, &[PAST, c])?;
    check::f32(OP, "state_3c", state_3c)?;
    check::shape(OP, "w", w, &[c, 1, WIDTH])?;
    match check::device(
        OP,
        out_tc,
        &[("state_3c", &*state_3c), ("x_tc", x_tc), ("w", w)],
    )? {
        Device::Cpu => {
            cpu::forward(out_tc, state_3c.f32s(), x_tc, w);
            cpu::update_state(state_3c.f32s_mut(), x_tc);
        }
        Device::Cuda(cuda) => cuda::forward_with_state(cuda, out_tc, state_3c, x_tc, w)?,
    }
    Ok(())
}

pub(super) mod cpu {
    //! Tasks are fixed blocks of rows, walked in tiles of rows and channels that stay in the L1 cache as f32; a tile never
    //! crosses a document's border, and carries the rows around it that the filter reaches.

    use std::ops::Range;

    use rayon::prelude::*;

    use super::{PAST, WIDTH};
    use crate::Tensor;
    use crate::cpu::{View, ViewMut, add_rows, documents, load_rows, math, simd};

    /// Rows of a task; fixed, because d_w is summed task by task.
    const TASK_ROWS: usize = 128;
    const TILE_ROWS: usize = 32;
    const TILE_CHANNELS: usize = 128;

    pub(super) fn forward(out_tc: &mut Tensor, state_3c: &[f32], x_tc: &Tensor, w: &Tensor) {
        let [t, c] = [x_tc.shape()[0], x_tc.shape()[1]];
        let sequence = Convolution {
            x_tc,
            w,
            documents: &documents(&[0, t as u32]),
            tiles: &tiles(0..c),
        };
        sequence.forward(
            vec![Output::of(out_tc, c)],
            Some(state_3c),
            #[inline(always)]
            |outs, row, channels, y| outs[0].row(row, channels.clone()).store(y),
        );
    }

    /// What forward and backward share: inputs, filter, documents, and the channels of each tile.
    pub(in crate::ops) struct Convolution<'a> {
        pub x_tc: &'a Tensor,
        pub w: &'a Tensor,
        pub documents: &'a [Range<usize>],
        pub tiles: &'a [Range<usize>],
    }

    impl Convolution<'_> {
        /// Hands every row of every tile to `put`, convolved and passed through SiLU: the task's part of `outs`, the row among the
        /// task's, its channels, their values.
        pub(in crate::ops) fn forward(
            &self,
            outs: Vec<Output>,
            state_3c: Option<&[f32]>,
            put: impl Fn(&mut [Output], usize, &Range<usize>, &mut [f32]) + Sync,
        ) {
            let [t, c] = [self.x_tc.shape()[0], self.x_tc.shape()[1]];
            let taps = taps(self.w);
            let widest = widest(self.tiles);
            let tasks = tasks(outs, t, self.documents);
            tasks.into_par_iter().for_each(|task| {
                let mut x = vec![0.0; (PAST + TILE_ROWS) * widest];
                let mut y = vec![0.0; widest];
                task.run(
                    self.tiles,
                    #[inline(always)]
                    |tile, outs| {
                        let n = tile.channels.len();
                        tile.load_past(&mut x, View::of(self.x_tc), c, state_3c, tile.rows.end);
                        let taps = tile.taps(&taps, c);
                        for (i, row) in tile.rows.clone().enumerate() {
                            let y = &mut y[..n];
                            filter(y, &x[i * n..(i + WIDTH) * n], taps);
                            y.iter_mut().for_each(|y| *y = math::silu(*y));
                            put(outs, row - tile.task_start, &tile.channels, y);
                        }
                    },
                );
            });
        }

        /// d_x assigned, d_w added to. `load` gives the gradients of what came out of SiLU, or what they are made of, for rows from
        /// one on of a tile's channels; `finish` makes the former of the latter, a row at a time: gradients, row, channels, what
        /// went into SiLU.
        pub(in crate::ops) fn backward(
            &self,
            d_x_tc: &mut Tensor,
            d_w: Option<&mut Tensor>,
            load: impl Fn(&mut [f32], usize, &Range<usize>) + Sync,
            finish: impl Fn(&mut [f32], usize, &Range<usize>, &[f32]) + Sync,
        ) {
            let [t, c] = [self.x_tc.shape()[0], self.x_tc.shape()[1]];
            let taps = taps(self.w);
            let widest = widest(self.tiles);
            let tasks = tasks(vec![Output::of(d_x_tc, c)], t, self.documents);
            let n_sums = if d_w.is_some() { WIDTH * c } else { 0 };
            let mut partial = vec![0.0; tasks.len() * n_sums];
            let mut no_sums: Vec<[f32; 0]> = vec![[]; tasks.len()];
            let sums: Vec<&mut [f32]> = match n_sums {
                0 => no_sums.iter_mut().map(|sums| &mut sums[..]).collect(),
                _ => partial.chunks_exact_mut(n_sums).collect(),
            };
            tasks.into_par_iter().zip(sums).for_each(|(task, sums)| {
                let mut x = vec![0.0; (2 * PAST + TILE_ROWS) * widest];
                let mut d_y = vec![0.0; (PAST + TILE_ROWS) * widest];
                let mut y = vec![0.0; widest];
                task.run(
                    self.tiles,
                    #[inline(always)]
                    |tile, outs| {
                        let n = tile.channels.len();
                        let taps = tile.taps(&taps, c);
                        // 2. silu, also of the rows behind the tile that see into it; none lie beyond the document
                        let n_rows = tile.rows.len();
                        let end = (tile.rows.end + PAST).min(tile.document.end);
                        tile.load_past(&mut x, View::of(self.x_tc), c, None, end);
                        let n_seen = end - tile.rows.start;
                        load(&mut d_y[..n_seen * n], tile.rows.start, &tile.channels);
                        d_y[n_seen * n..(n_rows + PAST) * n].fill(0.0);
                        for (i, d_y) in d_y[..n_seen * n].chunks_exact_mut(n).enumerate() {
                            let y = &mut y[..n];
                            filter(y, &x[i * n..(i + WIDTH) * n], taps);
                            finish(d_y, tile.rows.start + i, &tile.channels, y);
                            for (d_y, &y) in d_y.iter_mut().zip(y.iter()) {
                                *d_y *= math::d_silu(y);
                            }
                        }
                        // 1. the filter
                        let [w0, w1, w2, w3] = taps;
                        for (i, row) in tile.rows.clone().enumerate() {
                            let y = &mut y[..n];
                            filter(y, &d_y[i * n..(i + WIDTH) * n], [w3, w2, w1, w0]);
                            let mut d_x = outs[0].row(row - tile.task_start, tile.channels.clone());
                            d_x.store(y);
                        }
                        add_weight_gradient(sums, tile, c, &x, &d_y);
                    },
                );
            });
            if let Some(d_w) = d_w {
                add_weight_sums(d_w, &partial);
            }
        }
    }

    /// A tile's part of d_w as [4,C], added to its task's `sums` (empty where w is frozen), from its inputs and d_y.
    #[inline(always)]
    fn add_weight_gradient(sums: &mut [f32], tile: &Tile, c: usize, x: &[f32], d_y: &[f32]) {
        let n = tile.channels.len();
        for (j, sums) in sums.chunks_exact_mut(c).enumerate() {
            let sums = &mut sums[tile.channels.clone()];
            for i in 0..tile.rows.len() {
                let x = &x[(i + j) * n..(i + j + 1) * n];
                let d_y = &d_y[i * n..(i + 1) * n];
                for ((sum, &x), &d_y) in sums.iter_mut().zip(x).zip(d_y) {
                    *sum += d_y * x;
                }
            }
        }
    }

    /// d_w [C,1,4] += the tasks' sums, each [4,C].
    fn add_weight_sums(d_w: &mut Tensor, partial: &[f32]) {
        let c = d_w.shape()[0];
        let mut sums = vec![0.0; WIDTH * c];
        simd(
            #[inline(always)]
            || add_rows(&mut sums, partial),
        );
        for (channel, d_w) in d_w.f32s_mut().chunks_exact_mut(WIDTH).enumerate() {
            for (j, d_w) in d_w.iter_mut().enumerate() {
                *d_w += sums[j * c + channel];
            }
        }
    }

    /// Channels in pieces of a tile's width.
    pub(in crate::ops) fn tiles(channels: Range<usize>) -> Vec<Range<usize>> {
        let end = channels.end;
        channels
            .step_by(TILE_CHANNELS)
            .map(|start| start..(start + TILE_CHANNELS).min(end))
            .collect()
    }

    fn widest(tiles: &[Range<usize>]) -> usize {
        tiles.iter().map(Range::len).max().unwrap_or(0)
    }

    /// Rows to write, of `width` elements each.
    pub(in crate::ops) struct Output<'a> {
        rows: ViewMut<'a>,
        width: usize,
    }

    impl<'a> Output<'a> {
        pub(in crate::ops) fn of(tensor: &'a mut Tensor, width: usize) -> Self {
            Output {
                rows: ViewMut::of(tensor),
                width,
            }
        }

        /// Some columns of a row.
        #[inline(always)]
        pub(in crate::ops) fn row(&mut self, row: usize, columns: Range<usize>) -> ViewMut<'_> {
            let start = row * self.width;
            self.rows.slice(start + columns.start..start + columns.end)
        }
    }

    /// The last three rows of the old state followed by x.
    pub(super) fn update_state(state_3c: &mut [f32], x_tc: &Tensor) {
        let (t, c) = (x_tc.shape()[0], x_tc.shape()[1]);
        let n_new = t.min(PAST);
        state_3c.copy_within(n_new * c.., 0);
        View::of(x_tc)
            .slice((t - n_new) * c..t * c)
            .read_into(&mut state_3c[(PAST - n_new) * c..]);
    }

    /// w [C,1,4] as [4,C] f32.
    fn taps(w: &Tensor) -> Vec<f32> {
        let w = w.to_f32_vec();
        (0..WIDTH)
            .flat_map(|j| w.iter().skip(j).step_by(WIDTH).copied())
            .collect()
    }

    /// y = Σ_j taps[j] · row j of x [4,n].
    #[inline(always)]
    fn filter(y: &mut [f32], x: &[f32], [w0, w1, w2, w3]: [&[f32]; WIDTH]) {
        let n = y.len();
        let (x0, rest) = x.split_at(n);
        let (x1, rest) = rest.split_at(n);
        let (x2, x3) = rest.split_at(n);
        assert!(x3.len() == n && w0.len() == n && w1.len() == n && w2.len() == n && w3.len() == n);
        for i in 0..n {
            y[i] = x0[i] * w0[i] + x1[i] * w1[i] + (x2[i] * w2[i] + x3[i] * w3[i]);
        }
    }

    /// A block of output rows with the documents that have rows in it.
    struct Task<'a> {
        rows: Range<usize>,
        documents: &'a [Range<usize>],
        outs: Vec<Output<'a>>,
    }

    fn tasks<'a>(
        mut outs: Vec<Output<'a>>,
        t: usize,
        documents: &'a [Range<usize>],
    ) -> Vec<Task<'a>> {
        (0..t)
            .step_by(TASK_ROWS)
            .map(|start| {
                let end = (start + TASK_ROWS).min(t);
                let first = documents.partition_point(|document| document.end <= start);
                let last = documents.partition_point(|document| document.start < end);
                let of_task = outs.iter_mut().map(|out| Output {
                    rows: out.rows.take_front((end - start) * out.width),
                    width: out.width,
                });
                Task {
                    rows: start..end,
                    documents: &documents[first..last],
                    outs: of_task.collect(),
                }
            })
            .collect()
    }

    impl Task<'_> {
        /// Calls `body` with each tile and the task's output rows.
        fn run(mut self, tiles: &[Range<usize>], mut body: impl FnMut(&Tile, &mut [Output])) {
            for document in self.documents {
                let end = document.end.min(self.rows.end);
                let mut start = document.start.max(self.rows.start);
                while start < end {
                    let rows = start..(start + TILE_ROWS).min(end);
                    start = rows.end;
                    for channels in tiles {
                        let tile = Tile {
                            task_start: self.rows.start,
                            document: document.clone(),
                            rows: rows.clone(),
                            channels: channels.clone(),
                        };
                        simd(
                            #[inline(always)]
                            || body(&tile, &mut self.outs),
                        );
                    }
                }
            }
        }
    }

    struct Tile {
        task_start: usize,
        document: Range<usize>,
        rows: Range<usize>,
        channels: Range<usize>,
    }

    impl Tile {
        #[inline(always)]
        fn taps<'a>(&self, taps: &'a [f32], c: usize) -> [&'a [f32]; WIDTH] {
            [0, 1, 2, 3].map(|j| &taps[j * c..][self.channels.clone()])
        }

        /// Rows from three before the tile up to `end`, as f32; what lies before the document comes from the state, or is zero.
        #[inline(always)]
        fn load_past(
            &self,
            x: &mut [f32],
            view: View,
            c: usize,
            state_3c: Option<&[f32]>,
            end: usize,
        ) {
            let n = self.channels.len();
            // How many of the three rows lie before the document's start.
            let n_before = PAST - PAST.min(self.rows.start - self.document.start);
            for (i, x) in x[..n_before * n].chunks_exact_mut(n).enumerate() {
                match state_3c {
                    Some(state) => {
                        let row = self.rows.start - self.document.start + i;
                        x.copy_from_slice(&state[row * c..][self.channels.clone()]);
                    }
                    None => x.fill(0.0),
                }
            }
            let start = self.rows.start + n_before - PAST;
            let x = &mut x[n_before * n..(PAST + end - self.rows.start) * n];
            load_rows(x, view, start * c + self.channels.start, c, n);
        }
    }
}

pub(super) mod cuda {
    use super::PAST;
    use crate::cuda::sources::CAUSAL_CONV1D;
    use crate::cuda::{Args, Cuda, DeviceProperties, Grid};
    use crate::ops::rows;
    use crate::{Result, Tensor};

    const THREADS: usize = 128;
    /// Channels of a thread.
    const CHANNELS: usize = 8;
    /// Tokens that are worth a thread of their own: it reads three more and four weights a channel.
    const MIN_RUN: usize = 16;
    /// Blocks of the forward kernels that a multiprocessor holds, by their registers, and how many times over it should be filled.
    const FORWARD_BLOCKS: usize = 4 * 3;
    /// The same of the backward kernels. Each run leaves a row of d_w, so one filling it is.
    const BACKWARD_BLOCKS: usize = 2;

    /// How T tokens and a row's threads are shared out: blocks along the row, then runs of tokens.
    #[derive(Debug, Clone, Copy)]
    pub(in crate::ops) struct Walk {
        pub run: usize,
        pub n_runs: usize,
        blocks_of_row: usize,
    }

    impl Walk {
        pub fn forward(gpu: DeviceProperties, n_tokens: usize, threads_of_row: usize) -> Walk {
            let n_blocks = FORWARD_BLOCKS * gpu.n_multiprocessors as usize;
            Walk::new(n_blocks, n_tokens, threads_of_row)
        }

        pub fn backward(gpu: DeviceProperties, n_tokens: usize, threads_of_row: usize) -> Walk {
            let n_blocks = BACKWARD_BLOCKS * gpu.n_multiprocessors as usize;
            Walk::new(n_blocks, n_tokens, threads_of_row)
        }

        pub(super) fn new(n_blocks: usize, n_tokens: usize, threads_of_row: usize) -> Walk {
            let blocks_of_row = threads_of_row.div_ceil(THREADS);
            let n_runs = (n_blocks / blocks_of_row.max(1)).max(1);
            let run = n_tokens.div_ceil(n_runs).max(MIN_RUN);
            Walk {
                run,
                n_runs: n_tokens.div_ceil(run),
                blocks_of_row,
            }
        }

        pub fn grid(self) -> Grid {
            Grid {
                blocks: [self.blocks_of_row as u32, self.n_runs as u32, 1],
                threads: THREADS as u32,
                shared_bytes: 0,
            }
        }
    }

    pub(super) fn forward_with_state(
        cuda: Cuda,
        out: &mut Tensor,
        state: &mut Tensor,
        x: &Tensor,
        w: &Tensor,
    ) -> Result<()> {
        let (t, c) = (x.shape()[0], x.shape()[1]);
        let walk = Walk::forward(cuda.properties(), t, c.div_ceil(CHANNELS));
        let pointer = state.device_pointer();
        if walk.n_runs <= 1 {
            return launch_forward(cuda, walk, out, x, w, [pointer, pointer]);
        }
        // The first run reads the old state while the last one ends: the new one is written after both.
        launch_forward(cuda, walk, out, x, w, [pointer, 0])?;
        let args = Args::new().tensor_mut(state).view(x).u32(t).u32(c);
        let grid = Grid::each(PAST * c, THREADS as u32);
        cuda.launch(&CAUSAL_CONV1D, "causal_conv1d_keep_state", grid, args)
    }

    /// One document. `states`: the old, and the new or 0.
    fn launch_forward(
        cuda: Cuda,
        walk: Walk,
        out: &mut Tensor,
        x: &Tensor,
        w: &Tensor,
        states: [u64; 2],
    ) -> Result<()> {
        let (t, c) = (x.shape()[0], x.shape()[1]);
        let names = ["causal_conv1d_forward_bf16", "causal_conv1d_forward_any"];
        let kernel = rows::instance(names, &[out, x], &[c]);
        let args = Args::new()
            .view_mut(out)
            .view(x)
            .view(w)
            .pointer(states[0])
            .pointer(states[1])
            .pointer(0)
            .u32(1)
            .u32(t)
            .u32(c)
            .u32(walk.run);
        cuda.launch(&CAUSAL_CONV1D, kernel, walk.grid(), args)
    }
}

pub(crate) mod examples {
    use crate::DType::F32;
    use crate::example::{Example, TYPES};

    pub(crate) fn compared() -> Vec<Example> {
        let mut all = Vec::new();
        for [x_type, out_type, w_type] in TYPES {
            for [t, c] in [[1, 8192], [2, 8192], [3, 30], [16, 24], [17, 24], [700, 30]] {
                let name = "causal_conv1d/forward_with_state";
                let example = Example::new(name, format!("t{t}_c{c}"))
                    .out("out", &[t, c], out_type)
                    .updated("state", &[3, c], F32)
                    .input_in("x", &[t, c], x_type, [-2.0, 2.0])
                    .input("w", &[c, 1, 4], w_type)
                    .run(|[out, state], [x, w]| super::forward_with_state(out, state, x, w));
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
    use crate::ops::testing::{BF16_REL, Random, assert_close, f64s, poison_like, rows};

    /// Relative error (of norms) of f32 sums.
    const F32_REL: f64 = 1e-6;

    /// One sequence, of which the first inputs are the state.
    fn define(state_and_x: &[f64], w: &[f64]) -> Vec<f64> {
        let c = w.len() / 4;
        let n_outputs = state_and_x.len() - 3 * c;
        (0..n_outputs)
            .map(|i| {
                let channel = i % c;
                let taps = w[channel * 4..][..4].iter().enumerate();
                let y: f64 = taps.map(|(j, w)| w * state_and_x[j * c + i]).sum();
                y / (1.0 + (-y).exp())
            })
            .collect()
    }

    fn inputs(t: usize, c: usize, dtype: DType) -> [Tensor; 3] {
        let mut random = Random::new(c as u64);
        [
            random.tensor(&[t, c], -2.0, 2.0).to_dtype(dtype),
            random.tensor(&[c, 1, 4], -1.0, 1.0).to_dtype(dtype),
            random.tensor(&[3, c], -2.0, 2.0).to_dtype(dtype),
        ]
    }

    #[test]
    fn outputs_and_state_agree_with_the_definition() {
        for (dtype, tolerance) in [(DType::F32, F32_REL), (DType::Bf16, BF16_REL)] {
            for (t, c) in [(1, 24), (2, 1), (3, 128), (129, 24), (300, 150)] {
                let [x, w, state] = inputs(t, c, dtype);
                let all = [f64s(&state), f64s(&x)].concat();
                let mut state = state.to_dtype(DType::F32);
                let mut out = poison_like(&x, dtype);
                forward_with_state(&mut out, &mut state, &x, &w).unwrap();
                assert_close("out", &out, &define(&all, &f64s(&w)), tolerance);
                assert_eq!(f64s(&state), all[t * c..]);
            }
        }
    }

    #[test]
    fn pieces_with_state_equal_the_whole() {
        for dtype in [DType::F32, DType::Bf16] {
            let [x, w, _] = inputs(300, 150, dtype);
            let zeros = Tensor::zeros(&[3, 150], DType::F32);
            let (mut whole, mut end) = (poison_like(&x, dtype), zeros.clone());
            forward_with_state(&mut whole, &mut end, &x, &w).unwrap();
            let (mut state, mut start) = (zeros, 0);
            for length in [1, 1, 2, 0, 1, 64, 100, 3, 128] {
                let range = start..start + length;
                let x = rows(&x, range.clone());
                let mut out = poison_like(&x, dtype);
                forward_with_state(&mut out, &mut state, &x, &w).unwrap();
                assert_eq!(out, rows(&whole, range));
                start += length;
            }
            assert_eq!(start, 300);
            assert_eq!(state, end);
            assert_eq!(state.f32s(), rows(&x, 297..300).to_f32_vec());
        }
    }

    #[test]
    fn runs_cover_the_tokens_of_any_length() {
        for (n_tokens, threads) in [(0, 8), (1, 1024), (16, 1), (17, 1024), (15_360, 1024)] {
            let walk = cuda::Walk::new(264, n_tokens, threads);
            assert!(walk.run >= WIDTH && walk.n_runs * walk.run >= n_tokens);
            assert!(n_tokens == 0 || (walk.n_runs - 1) * walk.run < n_tokens);
        }
    }

    #[test]
    fn wrong_shapes_are_refused() {
        let [x, w, state] = inputs(4, 8, DType::F32);
        let (mut out, mut state) = (x.clone(), state);
        let short = Tensor::zeros(&[8, 1, 3], DType::F32);
        let refused = forward_with_state(&mut out, &mut state, &x, &short);
        assert!(matches!(refused, Err(crate::Error::Shape { arg: "w", .. })));
        let mut state = state.to_dtype(DType::Bf16);
        let refused = forward_with_state(&mut out, &mut state, &x, &w);
        let arg = "state_3c";
        assert!(matches!(refused, Err(crate::Error::DType { arg: a, .. }) if a == arg));
    }
}
