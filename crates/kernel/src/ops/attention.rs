//! Causal softmax attention with grouped key:value heads, over packed documents or over a cache; memory grows with T, not T².
//!
//! out_t = Σ_{s<=t} p_ts v_s, p_ts = exp(scale q_t·k_s - lse_t), lse_t = ln Σ_{s<=t} exp(scale q_t·k_s), s and t in one document.
//! Source: arXiv 2205.14135 (tiles with a running maximum), arXiv 2307.08691 (backward from lse); transformers 5.17 (conventions).

// T tokens (packed), H query heads, G key:value heads (H a multiple of G), N head dim, S cached positions.

use super::check;
use crate::cpu::documents;
use crate::cuda::Card;
use crate::{Device, Result, Tensor};

/// `out` and `lse` assigned. Query head h reads key:value head h·G/H.
///
/// Shapes: out_thn, q_thn [T,H,N]; k_tgn, v_tgn [T,G,N]; lse_th [T,H] f32, natural log, kept for [`backward`].
///
/// # Errors
/// [`crate::Error::Shape`] where shapes disagree, H is no multiple of G, or `cu_seqlens` does not rise from 0 to T;
/// [`crate::Error::DType`] where lse is not f32.
pub fn forward(
    out_thn: &mut Tensor,
    lse_th: &mut Tensor,
    q_thn: &Tensor,
    k_tgn: &Tensor,
    v_tgn: &Tensor,
    cu_seqlens: &[u32],
    scale: f32,
) -> Result<()> {
    const OP: &str = "attention::forward";
    let dims = Dims::new(OP, q_thn, "k_tgn", k_tgn)?;
    let Dims { t, h, g, n } = dims;
    check::shape(OP, "out_thn", out_thn, &[t, h, n])?;
    check::shape(OP, "lse_th", lse_th, &[t, h])?;
    check::f32(OP, "lse_th", lse_th)?;
    check::shape(OP, "k_tgn", k_tgn, &[t, g, n])?;
    check::shape(OP, "v_tgn", v_tgn, &[t, g, n])?;
    check::cu_seqlens(OP, cu_seqlens, t)?;
    let others = [
        ("lse_th", &*lse_th),
        ("q_thn", q_thn),
        ("k_tgn", k_tgn),
        ("v_tgn", v_tgn),
    ];
    match check::device(OP, out_thn, &others)? {
        Device::Cpu => {
            let inputs = cpu::Inputs::new(q_thn, k_tgn, v_tgn, dims, scale);
            cpu::forward(out_thn, Some(lse_th), &inputs, &documents(cu_seqlens), 0);
        }
        Device::Cuda(cuda) => {
            let inputs = cuda::Inputs::new(OP, q_thn, k_tgn, v_tgn, dims, scale)?;
            cuda::forward(cuda, out_thn, lse_th, &inputs, &documents(cu_seqlens))?;
        }
    }
    Ok(())
}

/// d_q, d_k, d_v assigned; the probabilities are recomputed from `lse`. Shapes as in [`forward`], gradients as their inputs.
///
/// # Errors
/// As [`forward`].
pub fn backward(
    d_q_thn: &mut Tensor,
    d_k_tgn: &mut Tensor,
    d_v_tgn: &mut Tensor,
    d_out_thn: &Tensor,
    out_thn: &Tensor,
    lse_th: &Tensor,
    q_thn: &Tensor,
    k_tgn: &Tensor,
    v_tgn: &Tensor,
    cu_seqlens: &[u32],
    scale: f32,
) -> Result<()> {
    backward_within(
        [d_q_thn, d_k_tgn, d_v_tgn],
        [d_out_thn, out_thn, lse_th],
        [q_thn, k_tgn, v_tgn],
        cu_seqlens,
        scale,
        None,
    )
}

/// Most bytes of scratch that [`backward`] takes on a GPU, whatever documents of at most `longest` tokens the `shape` [T,H,G,N] is
/// packed from.
pub fn backward_scratch_bytes(card: Card, [t, h, g, n]: [usize; 4], longest: usize) -> usize {
    cuda::scratch_bytes(card, Dims { t, h, g, n }, longest)
}

/// [`backward`] with at most about so many bytes of score gradients kept at a time on a GPU; none: a part of its memory.
pub(crate) fn backward_within(
    [d_q_thn, d_k_tgn, d_v_tgn]: [&mut Tensor; 3],
    [d_out_thn, out_thn, lse_th]: [&Tensor; 3],
    [q_thn, k_tgn, v_tgn]: [&Tensor; 3],
    cu_seqlens: &[u32],
    scale: f32,
    score_bytes: Option<usize>,
) -> Result<()> {
    const OP: &str = "attention::backward";
    let dims = Dims::new(OP, q_thn, "k_tgn", k_tgn)?;
    let Dims { t, h, g, n } = dims;
    check::shape(OP, "d_q_thn", d_q_thn, &[t, h, n])?;
    check::shape(OP, "d_k_tgn", d_k_tgn, &[t, g, n])?;
    check::shape(OP, "d_v_tgn", d_v_tgn, &[t, g, n])?;
    check::shape(OP, "d_out_thn", d_out_thn, &[t, h, n])?;
    check::shape(OP, "out_thn", out_thn, &[t, h, n])?;
    check::shape(OP, "lse_th", lse_th, &[t, h])?;
    check::f32(OP, "lse_th", lse_th)?;
    check::shape(OP, "k_tgn", k_tgn, &[t, g, n])?;
    check::shape(OP, "v_tgn", v_tgn, &[t, g, n])?;
    check::cu_seqlens(OP, cu_seqlens, t)?;
    let others = [
        ("d_k_tgn", &*d_k_tgn),
        ("d_v_tgn", &*d_v_tgn),
        ("d_out_thn", d_out_thn),
        ("out_thn", out_thn),
        ("lse_th", lse_th),
        ("q_thn", q_thn),
        ("k_tgn", k_tgn),
        ("v_tgn", v_tgn),
    ];
    let device = check::device(OP, d_q_thn, &others)?;
    let gradients = [d_q_thn, d_k_tgn, d_v_tgn];
    let documents = documents(cu_seqlens);
    match device {
        Device::Cpu => {
            let inputs = cpu::Inputs::new(q_thn, k_tgn, v_tgn, dims, scale);
            let saved = cpu::Saved {
                d_out_thn,
                out_thn,
                lse_th: lse_th.f32s(),
            };
            cpu::backward(gradients, &saved, &inputs, &documents);
        }
        Device::Cuda(cuda) => {
            let inputs = cuda::Inputs::new(OP, q_thn, k_tgn, v_tgn, dims, scale)?;
            let saved = cuda::Saved {
                d_out_thn,
                out_thn,
                lse_th,
            };
            cuda::backward(cuda, gradients, &saved, &inputs, &documents, score_bytes)?;
        }
    }
    Ok(())
}

/// T new tokens of one sequence against its cache, which already holds their keys and values: query t sees cache rows
/// 0..=past+t. `out` assigned. Shapes: out_thn, q_thn [T,H,N]; k_sgn, v_sgn [S,G,N] with S >= past + T (later rows are ignored).
///
/// # Errors
/// [`crate::Error::Shape`] where shapes disagree, H is no multiple of G, or the cache is too short.
pub fn forward_cached(
    out_thn: &mut Tensor,
    q_thn: &Tensor,
    k_sgn: &Tensor,
    v_sgn: &Tensor,
    past: usize,
    scale: f32,
) -> Result<()> {
    const OP: &str = "attention::forward_cached";
    let dims = Dims::new(OP, q_thn, "k_sgn", k_sgn)?;
    let Dims { t, h, g, n } = dims;
    check::shape(OP, "out_thn", out_thn, &[t, h, n])?;
    let s = k_sgn.shape()[0];
    if s < past + t {
        let expected = format!("[S,{g},{n}] with S >= {past} + {t}");
        return Err(check::shape_error(OP, "k_sgn", k_sgn, expected));
    }
    check::shape(OP, "k_sgn", k_sgn, &[s, g, n])?;
    check::shape(OP, "v_sgn", v_sgn, &[s, g, n])?;
    let others = [("q_thn", q_thn), ("k_sgn", k_sgn), ("v_sgn", v_sgn)];
    match check::device(OP, out_thn, &others)? {
        Device::Cpu => {
            let inputs = cpu::Inputs::new(q_thn, k_sgn, v_sgn, dims, scale);
            cpu::forward(out_thn, None, &inputs, &documents(&[0, t as u32]), past);
        }
        Device::Cuda(cuda) => {
            let inputs = cuda::Inputs::new(OP, q_thn, k_sgn, v_sgn, dims, scale)?;
            cuda::forward_cached(cuda, out_thn, &inputs, past)?;
        }
    }
    Ok(())
}

#[derive(Clone, Copy)]
struct Dims {
    t: usize,
    /// Query heads.
    h: usize,
    /// Key:value heads.
    g: usize,
    n: usize,
}

impl Dims {
    fn new(op: &'static str, q_thn: &Tensor, arg: &'static str, keys: &Tensor) -> Result<Self> {
        let [t, h, n] = check::dims(op, "q_thn", q_thn, "[T,H,N]")?;
        let [_, g, _] = check::dims(op, arg, keys, "[tokens,G,N]")?;
        if h * g * n == 0 || h % g != 0 {
            let expected = format!("[T,H,N] with H, N > 0 and H a multiple of {g} key:value heads");
            return Err(check::shape_error(op, "q_thn", q_thn, expected));
        }
        Ok(Dims { t, h, g, n })
    }

    /// Query heads that read one key:value head.
    fn ratio(&self) -> usize {
        self.h / self.g
    }
}

mod cpu {
    //! A tile is some tokens of one document with all query heads of one key:value head: [tokens · ratio, N], token by token,
    //! which is how they lie in memory. It meets its keys in tiles as well, and only one tile of scores exists at a time.

    use std::ops::Range;

    use rayon::prelude::*;

    use super::Dims;
    use crate::Tensor;
    use crate::cpu::gemm::{self, Mat, MatMut, Threads};
    use crate::cpu::{View, ViewMut, load_rows, math, simd, split_rows};

    /// Rows (tokens · ratio) that a query tile aims at, and its bounds in tokens.
    const QUERY_ROWS: usize = 256;
    const QUERY_TOKENS: Range<usize> = 16..128;
    const KEY_TILE: usize = 256;
    /// Tokens whose gradients of keys and values are summed by one task; fixed, so that the order of sums is.
    const SLAB_TOKENS: usize = 1024;

    pub(super) struct Inputs<'a> {
        q_thn: View<'a>,
        k_sgn: View<'a>,
        v_sgn: View<'a>,
        dims: Dims,
        scale: f32,
    }

    impl<'a> Inputs<'a> {
        pub(super) fn new(
            q_thn: &'a Tensor,
            k_sgn: &'a Tensor,
            v_sgn: &'a Tensor,
            dims: Dims,
            scale: f32,
        ) -> Self {
            Inputs {
                q_thn: View::of(q_thn),
                k_sgn: View::of(k_sgn),
                v_sgn: View::of(v_sgn),
                dims,
                scale,
            }
        }

        /// Rows (tokens · ratio) of a tile, out of a [T,H,N] tensor.
        fn load_tile(&self, out: &mut [f32], view: View, tile: &Tile) {
            let Dims { h, n, .. } = self.dims;
            let width = self.dims.ratio() * n;
            let first = tile.rows.start * h * n + tile.kv_head * width;
            let out = &mut out[..tile.rows.len() * width];
            simd(
                #[inline(always)]
                || load_rows(out, view, first, h * n, width),
            );
        }

        /// Keys or values of a tile's sequence, positions `keys`: the memory itself, or widened into `scratch`.
        fn key_tile<'s>(
            &self,
            view: View<'s>,
            tile: &Tile,
            keys: &Range<usize>,
            scratch: &'s mut [f32],
        ) -> Mat<'s> {
            let Dims { g, n, .. } = self.dims;
            let first = ((tile.first_key + keys.start) * g + tile.kv_head) * n;
            match view {
                View::F32(data) => Mat::strided(&data[first..], keys.len(), n, g * n),
                View::Bf16(_) => {
                    simd(
                        #[inline(always)]
                        || load_rows(&mut scratch[..keys.len() * n], view, first, g * n, n),
                    );
                    Mat::new(scratch, keys.len(), n)
                }
            }
        }
    }

    pub(super) struct Saved<'a> {
        pub d_out_thn: &'a Tensor,
        pub out_thn: &'a Tensor,
        pub lse_th: &'a [f32],
    }

    /// Queries of one tile.
    struct Tile {
        /// Rows of q.
        rows: Range<usize>,
        kv_head: usize,
        /// Position in its sequence of the first token.
        position: usize,
        /// Row of k and v that holds the sequence's position 0.
        first_key: usize,
        ratio: usize,
    }

    impl Tile {
        /// Tiles of keys that some query of this tile sees.
        fn key_tiles(&self) -> impl Iterator<Item = Range<usize>> + use<> {
            let end = self.position + self.rows.len();
            (0..end)
                .step_by(KEY_TILE)
                .map(move |start| start..(start + KEY_TILE).min(end))
        }

        /// How many of `keys` row `row` of the tile sees.
        #[inline(always)]
        fn n_seen(&self, row: usize, keys: &Range<usize>) -> usize {
            let n_causal = self.position + row / self.ratio + 1;
            n_causal.saturating_sub(keys.start).min(keys.len())
        }
    }

    fn tile_tokens(dims: Dims) -> usize {
        (QUERY_ROWS / dims.ratio()).clamp(QUERY_TOKENS.start, QUERY_TOKENS.end)
    }

    fn pieces(range: &Range<usize>, length: usize) -> impl Iterator<Item = Range<usize>> + use<> {
        let Range { start, end } = *range;
        (start..end)
            .step_by(length)
            .map(move |first| first..(first + length).min(end))
    }

    fn product(dst: MatMut, alpha: f32, lhs: Mat, rhs: Mat, beta: f32) {
        gemm::gemm(dst, alpha, lhs, rhs, beta, Threads::One);
    }

    /// `past`: positions before the first document's first token; its keys then start at row 0.
    pub(super) fn forward(
        out_thn: &mut Tensor,
        lse_th: Option<&mut Tensor>,
        inputs: &Inputs,
        documents: &[Range<usize>],
        past: usize,
    ) {
        let dims = inputs.dims;
        let tokens = tile_tokens(dims);
        let tiles: Vec<(usize, Range<usize>)> = documents
            .iter()
            .flat_map(|document| pieces(document, tokens).map(|rows| (document.start, rows)))
            .collect();
        let ranges: Vec<Range<usize>> = tiles.iter().map(|(_, rows)| rows.clone()).collect();
        let outs = split_rows(out_thn, &ranges, dims.g);
        let lses = match lse_th {
            Some(lse) => split_rows(lse, &ranges, dims.g),
            None => (0..outs.len()).map(|_| Vec::new()).collect(),
        };
        outs.into_par_iter().zip(lses).enumerate().for_each_init(
            Scratch::default,
            |scratch, (task_idx, (out, lse))| {
                let (document_start, rows) = &tiles[task_idx / dims.g];
                let tile = Tile {
                    rows: rows.clone(),
                    kv_head: task_idx % dims.g,
                    position: past + rows.start - document_start,
                    first_key: *document_start,
                    ratio: dims.ratio(),
                };
                scratch.resize(&tile, dims);
                scratch.attend(inputs, &tile);
                store_rows(out, &scratch.out, dims.ratio() * dims.n);
                store_rows(lse, &scratch.lse, dims.ratio());
            },
        );
    }

    pub(super) fn backward(
        [d_q_thn, d_k_tgn, d_v_tgn]: [&mut Tensor; 3],
        saved: &Saved,
        inputs: &Inputs,
        documents: &[Range<usize>],
    ) {
        let dims = inputs.dims;
        let slabs: Vec<(usize, Range<usize>)> = documents
            .iter()
            .enumerate()
            .flat_map(|(i, document)| pieces(document, SLAB_TOKENS).map(move |rows| (i, rows)))
            .collect();
        let ranges: Vec<Range<usize>> = slabs.iter().map(|(_, rows)| rows.clone()).collect();

        // 1. each slab of queries on its own: d_q, and its share of d_k and d_v
        let shares: Vec<KeyGradients> = split_rows(d_q_thn, &ranges, dims.g)
            .into_par_iter()
            .enumerate()
            .map_init(Scratch::default, |scratch, (task_idx, d_q)| {
                let (document_idx, rows) = &slabs[task_idx / dims.g];
                let document_start = documents[*document_idx].start;
                let kv_head = task_idx % dims.g;
                scratch.backward_slab(d_q, saved, inputs, document_start, rows, kv_head)
            })
            .collect();

        // 2. the shares of a document's slabs, in order
        split_rows(d_k_tgn, documents, dims.g)
            .into_par_iter()
            .zip(split_rows(d_v_tgn, documents, dims.g))
            .enumerate()
            .for_each(|(task_idx, (d_k, d_v))| {
                let (document_idx, kv_head) = (task_idx / dims.g, task_idx % dims.g);
                let first = slabs.partition_point(|(i, _)| *i < document_idx);
                let last = slabs.partition_point(|(i, _)| *i <= document_idx);
                let own = (first..last).map(|slab| &shares[slab * dims.g + kv_head]);
                let d_k_sums = own.clone().map(|share| share.d_k_sn.as_slice());
                let d_v_sums = own.map(|share| share.d_v_sn.as_slice());
                store_sums(d_k, d_k_sums, dims.n);
                store_sums(d_v, d_v_sums, dims.n);
            });
    }

    /// What one slab of queries gives to the keys and values it sees (from its document's start on).
    struct KeyGradients {
        d_k_sn: Vec<f32>,
        d_v_sn: Vec<f32>,
    }

    fn store_rows(mut rows: Vec<ViewMut>, values: &[f32], width: usize) {
        simd(
            #[inline(always)]
            || {
                for (row, values) in rows.iter_mut().zip(values.chunks_exact(width)) {
                    row.store(values);
                }
            },
        );
    }

    /// Each row = Σ over `shares` (in order) of that row, where a share reaches so far.
    fn store_sums<'a>(
        mut rows: Vec<ViewMut>,
        shares: impl Iterator<Item = &'a [f32]> + Clone,
        n: usize,
    ) {
        simd(
            #[inline(always)]
            || {
                let mut sum = vec![0.0; n];
                for (i, row) in rows.iter_mut().enumerate() {
                    sum.fill(0.0);
                    for share in shares.clone() {
                        if let Some(share) = share.get(i * n..(i + 1) * n) {
                            math::add(&mut sum, share);
                        }
                    }
                    row.store(&sum);
                }
            },
        );
    }

    /// Working memory of one tile; grows to the largest tile seen.
    #[derive(Default)]
    struct Scratch {
        q: Vec<f32>,
        out: Vec<f32>,
        /// Scores, then probabilities: [rows, KEY_TILE].
        p: Vec<f32>,
        k: Vec<f32>,
        v: Vec<f32>,
        /// Running maximum, running sum of exp, ln of the whole sum: one a row.
        max: Vec<f32>,
        sum: Vec<f32>,
        lse: Vec<f32>,
        /// Backward only.
        d_out: Vec<f32>,
        d_q: Vec<f32>,
        d_p: Vec<f32>,
        delta: Vec<f32>,
    }

    impl Scratch {
        fn resize(&mut self, tile: &Tile, dims: Dims) {
            let n_rows = tile.rows.len() * tile.ratio;
            let n_keys = KEY_TILE.min(tile.position + tile.rows.len());
            for wide in [&mut self.q, &mut self.out] {
                grow(wide, n_rows * dims.n);
            }
            for wide in [&mut self.k, &mut self.v] {
                grow(wide, n_keys * dims.n);
            }
            grow(&mut self.p, n_rows * n_keys);
            for narrow in [&mut self.max, &mut self.sum, &mut self.lse] {
                grow(narrow, n_rows);
            }
        }

        fn resize_backward(&mut self, tile: &Tile, dims: Dims) {
            self.resize(tile, dims);
            let n_rows = tile.rows.len() * tile.ratio;
            for wide in [&mut self.d_out, &mut self.d_q] {
                grow(wide, n_rows * dims.n);
            }
            grow(&mut self.d_p, self.p.len());
            grow(&mut self.delta, n_rows);
        }

        /// out and lse of a tile.
        fn attend(&mut self, inputs: &Inputs, tile: &Tile) {
            let n = inputs.dims.n;
            let n_rows = tile.rows.len() * tile.ratio;
            inputs.load_tile(&mut self.q, inputs.q_thn, tile);
            self.out[..n_rows * n].fill(0.0);
            self.max[..n_rows].fill(f32::NEG_INFINITY);
            self.sum[..n_rows].fill(0.0);
            for keys in tile.key_tiles() {
                self.score(inputs, tile, &keys);
                simd(
                    #[inline(always)]
                    || self.renormalise(tile, &keys, n),
                );
                let values = inputs.key_tile(inputs.v_sgn, tile, &keys, &mut self.v);
                product(
                    MatMut::new(&mut self.out, n_rows, n),
                    1.0,
                    Mat::new(&self.p, n_rows, keys.len()),
                    values,
                    1.0,
                );
            }
            simd(
                #[inline(always)]
                || {
                    for (row, &sum) in self.out.chunks_exact_mut(n).zip(&self.sum[..n_rows]) {
                        math::scale(row, 1.0 / sum);
                    }
                },
            );
            for row in 0..n_rows {
                self.lse[row] = self.max[row] + self.sum[row].ln();
            }
        }

        /// p = scale q kᵀ.
        fn score(&mut self, inputs: &Inputs, tile: &Tile, keys: &Range<usize>) {
            let n_rows = tile.rows.len() * tile.ratio;
            let key_mat = inputs.key_tile(inputs.k_sgn, tile, keys, &mut self.k);
            product(
                MatMut::new(&mut self.p, n_rows, keys.len()),
                inputs.scale,
                Mat::new(&self.q, n_rows, inputs.dims.n),
                key_mat.t(),
                0.0,
            );
        }

        /// p = exp(p - max) with the maximum so far, 0 where masked; what was summed under an older maximum is scaled down.
        #[inline(always)]
        fn renormalise(&mut self, tile: &Tile, keys: &Range<usize>, n: usize) {
            let rows = self.p.chunks_exact_mut(keys.len());
            let n_rows = tile.rows.len() * tile.ratio;
            for (row, p) in rows.take(n_rows).enumerate() {
                let (seen, masked) = p.split_at_mut(tile.n_seen(row, keys));
                masked.fill(0.0);
                if seen.is_empty() {
                    continue;
                }
                let old = self.max[row];
                let max = old.max(math::max(seen));
                let factor = math::exp(old - max);
                let sum = math::exp_in_place(seen, max);
                self.max[row] = max;
                self.sum[row] = self.sum[row] * factor + sum;
                if factor != 1.0 {
                    math::scale(&mut self.out[row * n..(row + 1) * n], factor);
                }
            }
        }

        fn backward_slab(
            &mut self,
            d_q: Vec<ViewMut>,
            saved: &Saved,
            inputs: &Inputs,
            document_start: usize,
            slab: &Range<usize>,
            kv_head: usize,
        ) -> KeyGradients {
            let dims = inputs.dims;
            let n_keys = slab.end - document_start;
            let mut gradients = KeyGradients {
                d_k_sn: vec![0.0; n_keys * dims.n],
                d_v_sn: vec![0.0; n_keys * dims.n],
            };
            let mut d_q = d_q.into_iter();
            for rows in pieces(slab, tile_tokens(dims)) {
                let d_q_tile = d_q.by_ref().take(rows.len()).collect();
                let tile = Tile {
                    position: rows.start - document_start,
                    rows,
                    kv_head,
                    first_key: document_start,
                    ratio: dims.ratio(),
                };
                self.resize_backward(&tile, dims);
                self.backward_tile(&mut gradients, saved, inputs, &tile);
                store_rows(d_q_tile, &self.d_q, dims.ratio() * dims.n);
            }
            gradients
        }

        /// d_q of a tile; what it gives to keys and values is added to `gradients`.
        fn backward_tile(
            &mut self,
            gradients: &mut KeyGradients,
            saved: &Saved,
            inputs: &Inputs,
            tile: &Tile,
        ) {
            let Dims { h, n, .. } = inputs.dims;
            let n_rows = tile.rows.len() * tile.ratio;

            // 1. the tile's rows, and delta = d_out · out, which is Σ_s p d_p
            inputs.load_tile(&mut self.q, inputs.q_thn, tile);
            inputs.load_tile(&mut self.out, View::of(saved.out_thn), tile);
            inputs.load_tile(&mut self.d_out, View::of(saved.d_out_thn), tile);
            for (i, row) in tile.rows.clone().enumerate() {
                let lse = &saved.lse_th[row * h + tile.kv_head * tile.ratio..][..tile.ratio];
                self.lse[i * tile.ratio..][..tile.ratio].copy_from_slice(lse);
            }
            simd(
                #[inline(always)]
                || {
                    let rows = self.out.chunks_exact(n).zip(self.d_out.chunks_exact(n));
                    for (delta, (out, d_out)) in self.delta[..n_rows].iter_mut().zip(rows) {
                        *delta = math::dot(out, d_out);
                    }
                },
            );
            self.d_q[..n_rows * n].fill(0.0);

            for keys in tile.key_tiles() {
                let (d_out, q) = (
                    Mat::new(&self.d_out, n_rows, n),
                    Mat::new(&self.q, n_rows, n),
                );
                // 2. p and d_p
                let key_mat = inputs.key_tile(inputs.k_sgn, tile, &keys, &mut self.k);
                let p = MatMut::new(&mut self.p, n_rows, keys.len());
                product(p, inputs.scale, q, key_mat.t(), 0.0);
                let value_mat = inputs.key_tile(inputs.v_sgn, tile, &keys, &mut self.v);
                let d_p = MatMut::new(&mut self.d_p, n_rows, keys.len());
                product(d_p, 1.0, d_out, value_mat.t(), 0.0);
                simd(
                    #[inline(always)]
                    || {
                        let rows = self.p.chunks_exact_mut(keys.len());
                        let rows = rows.zip(self.d_p.chunks_exact_mut(keys.len()));
                        for (row, (p, d_p)) in rows.take(n_rows).enumerate() {
                            let n_seen = tile.n_seen(row, &keys);
                            let (lse, delta) = (self.lse[row], self.delta[row]);
                            for (p, d_p) in p[..n_seen].iter_mut().zip(&mut d_p[..n_seen]) {
                                *p = math::exp(*p - lse);
                                *d_p = *p * (*d_p - delta) * inputs.scale;
                            }
                            p[n_seen..].fill(0.0);
                            d_p[n_seen..].fill(0.0);
                        }
                    },
                );
                // 3. values, queries, keys
                let p = Mat::new(&self.p, n_rows, keys.len());
                let d_scores = Mat::new(&self.d_p, n_rows, keys.len());
                let d_v = &mut gradients.d_v_sn[keys.start * n..keys.end * n];
                product(MatMut::new(d_v, keys.len(), n), 1.0, p.t(), d_out, 1.0);
                let d_q = MatMut::new(&mut self.d_q, n_rows, n);
                product(d_q, 1.0, d_scores, key_mat, 1.0);
                let d_k = &mut gradients.d_k_sn[keys.start * n..keys.end * n];
                product(MatMut::new(d_k, keys.len(), n), 1.0, d_scores.t(), q, 1.0);
            }
        }
    }

    fn grow(buffer: &mut Vec<f32>, len: usize) {
        if buffer.len() < len {
            buffer.resize(len, 0.0);
        }
    }
}

mod cuda {
    //! Tables of tiles for the kernels, made from the document boundaries: the longest first, so that none begins when the others
    //! are done. Backward keeps the gradients of the scores between its two kernels, as much at a time as it may.

    use std::cmp::Reverse;
    use std::ops::Range;

    use super::Dims;
    use crate::cuda::sources::ATTENTION;
    use crate::cuda::{Args, Card, Cuda, Grid};
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

    pub(super) struct Inputs<'a> {
        q_thn: &'a Tensor,
        k_sgn: &'a Tensor,
        v_sgn: &'a Tensor,
        dims: Dims,
        scale: f32,
    }

    pub(super) struct Saved<'a> {
        pub d_out_thn: &'a Tensor,
        pub out_thn: &'a Tensor,
        pub lse_th: &'a Tensor,
    }

    impl<'a> Inputs<'a> {
        pub(super) fn new(
            op: &'static str,
            q_thn: &'a Tensor,
            k_sgn: &'a Tensor,
            v_sgn: &'a Tensor,
            dims: Dims,
            scale: f32,
        ) -> Result<Self> {
            if dims.n > MAX_HEAD_DIM {
                let what = format!("head dim {} is above {MAX_HEAD_DIM}", dims.n);
                return Err(Error::Unsupported { op, what });
            }
            Ok(Inputs {
                q_thn,
                k_sgn,
                v_sgn,
                dims,
                scale,
            })
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
        inputs: &Inputs,
        documents: &[Range<usize>],
    ) -> Result<()> {
        let kernel = if inputs.is_fast(&[out_thn]) {
            Forward::fast(cuda, inputs.dims)
        } else {
            Forward::any(inputs.dims)
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
            inputs,
            &queries,
            &Split::none(),
        )
    }

    pub(super) fn forward_cached(
        cuda: Cuda,
        out_thn: &mut Tensor,
        inputs: &Inputs,
        past: usize,
    ) -> Result<()> {
        let dims = inputs.dims;
        let n_keys = past + dims.t;
        let is_fast = inputs.is_fast(&[out_thn]);
        if is_fast && dims.t * dims.ratio() <= CACHED_ROWS {
            let split = Split::new(cuda, dims, n_keys, dims.g)?;
            queue_cached(cuda, out_thn, inputs, past, &split)?;
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
        kernel.queue(cuda, out_thn, None, inputs, &queries, &split)?;
        split.combine(cuda, out_thn, dims)
    }

    pub(super) fn backward(
        cuda: Cuda,
        gradients: [&mut Tensor; 3],
        saved: &Saved,
        inputs: &Inputs,
        documents: &[Range<usize>],
        score_bytes: Option<usize>,
    ) -> Result<()> {
        let [d_q, d_k, d_v] = &gradients;
        if !inputs.is_fast(&[d_q, d_k, d_v, saved.d_out_thn, saved.out_thn]) {
            return backward_any(cuda, gradients, saved, inputs, documents);
        }
        let blocks = score_bytes.map_or(score_blocks(cuda.card()), |bytes| bytes / BLOCK_BYTES);
        let plan = Plan::new(documents, inputs.dims, blocks);
        backward_fast(cuda, gradients, saved, inputs, &plan)
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
            inputs: &Inputs,
            queries: &Queries,
            split: &Split,
        ) -> Result<()> {
            let Dims { t, h, g, n } = inputs.dims;
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
                    .tensor(inputs.q_thn)
                    .tensor(inputs.k_sgn)
                    .tensor(inputs.v_sgn)
            } else {
                Args::new()
                    .view_mut(out_thn)
                    .pointer(lse)
                    .pointer(split.partial)
                    .pointer(split.runs)
                    .view(inputs.q_thn)
                    .view(inputs.k_sgn)
                    .view(inputs.v_sgn)
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
            cuda.launch(&ATTENTION, self.kernel, grid, args.f32(inputs.scale))
        }
    }

    /// Keys dealt out to several blocks, whose sums are put together afterwards.
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
            let mut scratch = Carved::default();
            let partial = scratch.take(n_splits * n_rows * dims.n * size_of::<f32>());
            let runs = scratch.take(n_splits * n_rows * 2 * size_of::<f32>());
            let base = cuda.scratch(scratch.bytes)?;
            Ok(Split {
                n_splits,
                n_keys: split_keys,
                partial: base + partial,
                runs: base + runs,
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
        inputs: &Inputs,
        past: usize,
        split: &Split,
    ) -> Result<()> {
        let Dims { t, h, g, n } = inputs.dims;
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
            .tensor(inputs.q_thn)
            .tensor(inputs.k_sgn)
            .tensor(inputs.v_sgn)
            .u32(t)
            .u32(past)
            .u32(h)
            .u32(g)
            .u32(split.n_keys)
            .f32(inputs.scale);
        cuda.launch(&ATTENTION, kernel, grid, args)
    }

    /// Pieces of scratch at multiples of 256 bytes.
    #[derive(Default)]
    struct Carved {
        bytes: usize,
    }

    impl Carved {
        /// Offset of the next piece.
        fn take(&mut self, bytes: usize) -> u64 {
            let offset = self.bytes;
            self.bytes += bytes.next_multiple_of(256);
            offset as u64
        }
    }

    /// Three tiles of 32 rows, or two of 16 and two of 32, of padded f32 rows.
    fn any_shared_bytes(dims: Dims) -> usize {
        3 * ANY_QUERIES * (dims.n.next_multiple_of(32) + 4) * size_of::<f32>()
    }

    fn backward_any(
        cuda: Cuda,
        [d_q_thn, d_k_tgn, d_v_tgn]: [&mut Tensor; 3],
        saved: &Saved,
        inputs: &Inputs,
        documents: &[Range<usize>],
    ) -> Result<()> {
        let Dims { t, h, g, n } = inputs.dims;
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
                .view(inputs.q_thn)
                .view(inputs.k_sgn)
                .view(inputs.v_sgn)
                .tensor(saved.lse_th)
                .pointer(delta)
                .pointer(cuda.upload(tiles)?)
                .u32(h)
                .u32(g)
                .u32(n)
                .f32(inputs.scale))
        };
        let grid = |n_blocks| Grid {
            shared_bytes: any_shared_bytes(inputs.dims),
            ..Grid::line(n_blocks, 256)
        };
        // Keys that many queries see come first, and queries that see many keys.
        let mut keys: Vec<[usize; 4]> = cut(documents, ANY_ROWS)
            .map(|(document, tile)| [tile.start, tile.len(), document.end, 0])
            .collect();
        keys.sort_by_key(|[first, _, end, _]| Reverse(end - first));
        let args = finish(
            Args::new().view_mut(d_k_tgn).view_mut(d_v_tgn),
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
        let args = finish(Args::new().view_mut(d_q_thn), &words(&queries))?;
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
        pub(super) fn groups(
            &self,
        ) -> impl Iterator<Item = (Vec<[usize; 8]>, Vec<[usize; 8]>, usize)> {
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

    /// Backward's scratch.
    struct Parts {
        rows: u64,
        d_s: u64,
        carry: u64,
        bytes: usize,
    }

    impl Parts {
        fn of(dims: Dims, plan: &Plan) -> Self {
            let n_blocks = plan.groups.iter().map(|group| group.n_blocks).max();
            Parts::new(
                dims,
                plan.tiles.len(),
                plan.n_pass * n_blocks.unwrap_or(0),
                plan.n_pass * plan.n_carried,
            )
        }

        fn new(dims: Dims, n_tiles: usize, n_blocks: usize, n_carried: usize) -> Self {
            let mut scratch = Carved::default();
            Parts {
                rows: scratch.take(n_tiles * dims.h * 2 * BLOCK_QUERIES * size_of::<f32>()),
                d_s: scratch.take(n_blocks * BLOCK_BYTES),
                carry: scratch.take(n_carried * 2 * BACKWARD_KEYS * dims.n * size_of::<f32>()),
                bytes: scratch.bytes,
            }
        }
    }

    /// Blocks of score gradients that may exist at a time.
    fn score_blocks(card: Card) -> usize {
        card.memory_bytes / SCORE_SHARE / BLOCK_BYTES
    }

    #[cfg(test)]
    pub(super) fn planned_bytes(card: Card, dims: Dims, documents: &[Range<usize>]) -> usize {
        Parts::of(dims, &Plan::new(documents, dims, score_blocks(card))).bytes
    }

    /// See [`super::backward_scratch_bytes`]: no packing of `dims.t` tokens in documents of at most `longest` makes a larger plan.
    pub(super) fn scratch_bytes(card: Card, dims: Dims, longest: usize) -> usize {
        let budget = score_blocks(card);
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
        Parts::new(dims, dims.t, n_blocks, n_carried).bytes
    }

    fn backward_fast(
        cuda: Cuda,
        [d_q_thn, d_k_tgn, d_v_tgn]: [&mut Tensor; 3],
        saved: &Saved,
        inputs: &Inputs,
        plan: &Plan,
    ) -> Result<()> {
        let Dims { h, g, n, .. } = inputs.dims;
        let parts = Parts::of(inputs.dims, plan);
        let base = cuda.scratch(parts.bytes)?;
        let [rows, d_s, carry] = [parts.rows, parts.d_s, parts.carry].map(|offset| base + offset);

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
                        .f32(inputs.scale))
                };
                // 2. d_k, d_v and the gradients of the scores
                let args = Args::new()
                    .tensor_mut(d_k_tgn)
                    .tensor_mut(d_v_tgn)
                    .pointer(d_s)
                    .pointer(carry)
                    .pointer(rows)
                    .tensor(saved.d_out_thn)
                    .tensor(inputs.q_thn)
                    .tensor(inputs.k_sgn)
                    .tensor(inputs.v_sgn);
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
                    .tensor_mut(d_q_thn)
                    .pointer(d_s)
                    .tensor(inputs.k_sgn);
                let grid = Grid {
                    // Four stages of 32 keys and the gradients of their scores with 128 queries.
                    shared_bytes: 4 * (32 * n * 2 + 32 * BACKWARD_QUERIES * 2),
                    ..Grid::line(group.queries.len() * n_pass * inputs.dims.ratio(), 256)
                };
                let args = heads(args, &group.queries)?;
                cuda.launch(&ATTENTION, queries_kernel, grid, args)?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::DType;
    use crate::ops::testing::{
        BF16_REL, Random, assert_close, bits_from_row, dot, f64s, gradient, offsets, poison_like,
        rows,
    };

    /// Relative error (of norms) of f32 sums and of exp of scores up to about 10.
    const F32_REL: f64 = 2e-6;
    const LENGTHS: [usize; 9] = [1, 63, 0, 64, 65, 3, 130, 1, 2];

    #[derive(Clone)]
    struct Case {
        q: Tensor,
        k: Tensor,
        v: Tensor,
        d_out: Tensor,
        cu_seqlens: Vec<u32>,
        scale: f32,
    }

    impl Case {
        fn new(lengths: &[usize], [h, g, n]: [usize; 3], dtype: DType) -> Self {
            let mut random = Random::new((h * 1000 + n) as u64);
            let t = lengths.iter().sum();
            Case {
                q: random.tensor(&[t, h, n], -3.0, 3.0).to_dtype(dtype),
                k: random.tensor(&[t, g, n], -1.0, 1.0).to_dtype(dtype),
                v: random.tensor(&[t, g, n], -1.0, 1.0).to_dtype(dtype),
                d_out: random.tensor(&[t, h, n], -1.0, 1.0).to_dtype(dtype),
                cu_seqlens: offsets(lengths),
                scale: (n as f32).powf(-0.5),
            }
        }

        fn piece(&self, range: std::ops::Range<usize>) -> Self {
            let cut = |tensor: &Tensor| rows(tensor, range.clone());
            Case {
                q: cut(&self.q),
                k: cut(&self.k),
                v: cut(&self.v),
                d_out: cut(&self.d_out),
                cu_seqlens: vec![0, range.len() as u32],
                scale: self.scale,
            }
        }

        /// out, lse, d_q, d_k, d_v.
        fn run(&self) -> [Tensor; 5] {
            let dtype = self.q.dtype();
            let Case { q, k, v, .. } = self;
            let mut out = poison_like(q, dtype);
            let mut lse = Tensor::poison(&q.shape()[..2], DType::F32);
            forward(&mut out, &mut lse, q, k, v, &self.cu_seqlens, self.scale).unwrap();
            let [mut d_q, mut d_k, mut d_v] = [q, k, v].map(|x| poison_like(x, dtype));
            backward(
                &mut d_q,
                &mut d_k,
                &mut d_v,
                &self.d_out,
                &out,
                &lse,
                q,
                k,
                v,
                &self.cu_seqlens,
                self.scale,
            )
            .unwrap();
            [out, lse, d_q, d_k, d_v]
        }

        fn define(&self) -> [Vec<f64>; 5] {
            let at = [&self.q, &self.k, &self.v].map(f64s);
            let [h, n] = self.q.shape()[1..] else {
                panic!()
            };
            let d_out = f64s(&self.d_out);
            define(
                &at,
                &d_out,
                &self.cu_seqlens,
                [h, self.k.shape()[1], n],
                self.scale.into(),
            )
        }

        #[track_caller]
        fn check(&self) {
            let names = ["out", "lse", "d_q", "d_k", "d_v"];
            let want = self.define();
            for ((name, got), want) in names.iter().zip(&self.run()).zip(&want) {
                let tolerance = match got.dtype() {
                    DType::F32 => F32_REL,
                    DType::Bf16 => BF16_REL,
                };
                assert_close(name, got, want, tolerance);
            }
        }
    }

    /// The definition, query by query: out, lse, d_q, d_k, d_v.
    fn define(
        [q, k, v]: &[Vec<f64>; 3],
        d_out: &[f64],
        cu_seqlens: &[u32],
        [h, g, n]: [usize; 3],
        scale: f64,
    ) -> [Vec<f64>; 5] {
        let mut out = vec![0.0; q.len()];
        let mut lse = vec![0.0; q.len() / n];
        let (mut d_q, mut d_k, mut d_v) = (out.clone(), vec![0.0; k.len()], vec![0.0; v.len()]);
        for ends in cu_seqlens.windows(2) {
            for t in ends[0] as usize..ends[1] as usize {
                for head in 0..h {
                    let row = (t * h + head) * n..(t * h + head + 1) * n;
                    let keys: Vec<_> = (ends[0] as usize..=t)
                        .map(|s| (s * g + head / (h / g)) * n..(s * g + head / (h / g) + 1) * n)
                        .collect();
                    let scores: Vec<f64> = (keys.iter())
                        .map(|key| scale * dot(&q[row.clone()], &k[key.clone()]))
                        .collect();
                    let max = scores.iter().copied().fold(f64::MIN, f64::max);
                    let sum: f64 = scores.iter().map(|s| (s - max).exp()).sum();
                    lse[t * h + head] = max + sum.ln();
                    let p: Vec<f64> = scores.iter().map(|s| (s - max).exp() / sum).collect();
                    for (p, key) in p.iter().zip(&keys) {
                        for i in 0..n {
                            out[row.start + i] += p * v[key.start + i];
                        }
                    }
                    let d_row = &d_out[row.clone()];
                    let delta = dot(d_row, &out[row.clone()]);
                    for (p, key) in p.iter().zip(&keys) {
                        let d_score = p * (dot(d_row, &v[key.clone()]) - delta) * scale;
                        for i in 0..n {
                            d_v[key.start + i] += p * d_row[i];
                            d_q[row.start + i] += d_score * k[key.start + i];
                            d_k[key.start + i] += d_score * q[row.start + i];
                        }
                    }
                }
            }
        }
        [out, lse, d_q, d_k, d_v]
    }

    #[test]
    fn definition_agrees_with_finite_differences() {
        let case = Case::new(&[5, 1, 3], [2, 1, 4], DType::F32);
        let at = [&case.q, &case.k, &case.v].map(f64s);
        let d_out = f64s(&case.d_out);
        let outputs = |at: &[Vec<f64>]| {
            let at = [at[0].clone(), at[1].clone(), at[2].clone()];
            define(&at, &d_out, &case.cu_seqlens, [2, 1, 4], 0.5)
        };
        let loss = |at: &[Vec<f64>]| dot(&d_out, &outputs(at)[0]);
        for (which, want) in outputs(&at)[2..].iter().enumerate() {
            for (slope, want) in gradient(&at, which, loss).iter().zip(want) {
                assert!((slope - want).abs() < 1e-8, "{slope} for {want}");
            }
        }
    }

    #[test]
    fn tiles_agree_with_the_definition_for_every_head_ratio_and_dim() {
        for dims in [[2, 2, 32], [4, 2, 64], [3, 1, 128], [2, 1, 256], [1, 1, 5]] {
            Case::new(&LENGTHS, dims, DType::F32).check();
        }
    }

    #[test]
    fn tiles_agree_with_the_definition_for_bf16_storage() {
        for dims in [[4, 2, 32], [2, 1, 256]] {
            Case::new(&LENGTHS, dims, DType::Bf16).check();
        }
    }

    #[test]
    fn tiles_agree_with_the_definition_beyond_a_tile_of_keys_and_a_slab() {
        Case::new(&[300, 1100], [2, 1, 16], DType::F32).check();
        Case::new(&[600], [20, 1, 8], DType::F32).check();
    }

    #[test]
    fn large_scores_neither_overflow_nor_vanish() {
        let mut case = Case::new(&[300, 2], [2, 1, 32], DType::F32);
        case.scale = 40.0;
        let want = case.define();
        let got = case.run();
        // Scores of some hundreds: their rounding alone is 1e-5 of a probability.
        assert_close("out", &got[0], &want[0], 1e-4);
        assert_close("lse", &got[1], &want[1], 1e-6);
        assert!(got.iter().all(|x| x.f32s().iter().all(|x| x.is_finite())));
    }

    #[test]
    fn zero_rows_average_what_they_see() {
        let mut case = Case::new(&[70, 3], [2, 1, 32], DType::F32);
        case.q.f32s_mut()[69 * 64..70 * 64].fill(0.0);
        case.k.f32s_mut()[5 * 32..6 * 32].fill(0.0);
        case.d_out.f32s_mut()[7 * 64..8 * 64].fill(0.0);
        case.check();
        let lse = &case.run()[1];
        assert!((lse.f32s()[69 * 2] - 70f32.ln()).abs() < 1e-6);
    }

    #[test]
    fn packed_equals_separate_bit_for_bit() {
        let case = Case::new(&LENGTHS, [4, 2, 32], DType::F32);
        let packed = case.run();
        for ends in case.cu_seqlens.windows(2).filter(|ends| ends[0] < ends[1]) {
            let range = ends[0] as usize..ends[1] as usize;
            let want = packed.each_ref().map(|x| rows(x, range.clone()));
            assert!(case.piece(range).run() == want);
        }
    }

    #[test]
    fn changing_one_document_changes_no_bit_of_the_next() {
        let case = Case::new(&[70, 90], [2, 1, 32], DType::F32);
        let mut changed = case.clone();
        for (tensor, width) in [
            (&mut changed.q, 64),
            (&mut changed.k, 32),
            (&mut changed.v, 32),
            (&mut changed.d_out, 64),
        ] {
            let first = &mut tensor.f32s_mut()[..70 * width];
            first.iter_mut().for_each(|x| *x = 2.0 - *x);
        }
        let (before, after) = (case.run(), changed.run());
        assert!(bits_from_row(&before, 0) != bits_from_row(&after, 0));
        assert!(bits_from_row(&before, 70) == bits_from_row(&after, 70));
    }

    #[test]
    fn the_number_of_threads_changes_no_bit() {
        let case = Case::new(&[1100, 63, 1], [4, 2, 16], DType::F32);
        let pool = |n| {
            rayon::ThreadPoolBuilder::new()
                .num_threads(n)
                .build()
                .unwrap()
        };
        assert!(pool(1).install(|| case.run()) == pool(5).install(|| case.run()));
    }

    #[test]
    fn pieces_and_single_steps_over_a_cache_agree_with_the_whole() {
        for dtype in [DType::F32, DType::Bf16] {
            let case = Case::new(&[300], [4, 2, 64], dtype);
            let whole = &case.define()[0];
            let mut got = Vec::new();
            let mut past = 0;
            // The cache beyond the present tokens is never read.
            let (mut k, mut v) = (
                Tensor::poison(&[310, 2, 64], dtype),
                Tensor::poison(&[310, 2, 64], dtype),
            );
            for length in [1, 1, 64, 100, 1, 0, 130, 1, 1, 1] {
                for (cache, new) in [(&mut k, &case.k), (&mut v, &case.v)] {
                    let mut values = cache.to_f32_vec();
                    let range = past * 128..(past + length) * 128;
                    values[range.clone()].copy_from_slice(&new.to_f32_vec()[range]);
                    *cache = Tensor::from_f32(&[310, 2, 64], values).to_dtype(dtype);
                }
                let q = rows(&case.q, past..past + length);
                let mut out = poison_like(&q, DType::F32);
                forward_cached(&mut out, &q, &k, &v, past, case.scale).unwrap();
                got.extend(out.to_f32_vec());
                past += length;
            }
            let got = Tensor::from_f32(&[300, 4, 64], got);
            assert_close("cached", &got, whole, F32_REL);
        }
    }

    /// What the two backward kernels make of a plan: every 64 keys meet every 32 queries that see them once, in a block of score
    /// gradients of their own, and both kernels look for it in the same place.
    #[test]
    fn a_plan_gives_every_key_and_query_one_block() {
        let documents = documents(&offsets(&[1, 0, 64, 65, 700, 31, 129, 4]));
        let dims = Dims {
            t: 994,
            h: 6,
            g: 3,
            n: 64,
        };
        for budget in [1, 40, 500, 1_000_000] {
            let plan = cuda::Plan::new(&documents, dims, budget);
            let mut met = std::collections::BTreeSet::new();
            for (keys, queries, n_blocks) in plan.groups() {
                let mut blocks = std::collections::BTreeMap::new();
                for [key, n_keys, query, query_end, tile, block, ..] in keys {
                    assert!(n_keys <= 64 && query >= key && (query - key) % 32 == 0);
                    let n_tiles = (query_end - query).div_ceil(32);
                    for i in 0..n_tiles {
                        assert!(met.insert((key, query + 32 * i)), "met twice");
                        assert_eq!(plan.tile(tile + i)[0], query + 32 * i);
                        for head in 0..dims.ratio() {
                            let at = block + head * n_tiles + i;
                            assert!(at < n_blocks);
                            let earlier = blocks.insert(at, (key, query + 32 * i, head));
                            assert_eq!(earlier, None);
                        }
                    }
                }
                let mut n_found = 0;
                for [query, n_rows, first_key, position, block, first, n_tiles, _] in queries {
                    assert_eq!(query, first_key + position);
                    for keys64 in 0..(position + n_rows).div_ceil(64) {
                        // As attention_backward_queries reckons.
                        let cut = keys64 - keys64.min(first / 2);
                        let begin = first.max(2 * keys64);
                        let before =
                            dims.ratio() * (keys64 * n_tiles - cut * cut.saturating_sub(1));
                        for tile in (position / 32..(position + n_rows).div_ceil(32))
                            .filter(|x| *x >= begin)
                        {
                            for head in 0..dims.ratio() {
                                let at = block + before + head * (n_tiles - 2 * cut) + tile - begin;
                                let want = (first_key + 64 * keys64, first_key + 32 * tile, head);
                                assert_eq!(blocks.get(&at), Some(&want));
                                n_found += 1;
                            }
                        }
                    }
                }
                assert_eq!(n_found, blocks.len());
            }
            let pairs = |n: usize| {
                (0..n.div_ceil(64))
                    .map(move |j| n.div_ceil(32) - 2 * j)
                    .sum::<usize>()
            };
            assert_eq!(
                met.len(),
                documents.iter().map(|x| pairs(x.len())).sum::<usize>()
            );
        }
    }

    #[test]
    fn no_packing_takes_more_scratch_than_is_said() {
        let dims = Dims {
            t: 6000,
            h: 6,
            g: 3,
            n: 64,
        };
        let mut state = 7_u64;
        let mut random = |below: usize| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            (state >> 33) as usize % below
        };
        for memory_bytes in [1 << 20, 1 << 30, 16 << 30, 80 << 30] {
            let card = Card::with_memory(memory_bytes);
            for longest in [1, 31, 65, 700, 4100, 6000] {
                let said = cuda::scratch_bytes(card, dims, longest);
                for spread in [1, longest, longest / 2 + 1, longest / 30 + 1] {
                    let mut lengths = Vec::new();
                    while lengths.iter().sum::<usize>() < dims.t {
                        let left = dims.t - lengths.iter().sum::<usize>();
                        lengths.push((longest - random(spread)).min(left));
                    }
                    let taken = cuda::planned_bytes(card, dims, &documents(&offsets(&lengths)));
                    assert!(taken <= said, "{taken} of {said}: {lengths:?}");
                }
            }
        }
    }

    #[test]
    fn no_tokens_are_allowed() {
        let case = Case::new(&[0, 0], [2, 1, 32], DType::F32);
        assert!(case.run().iter().all(|x| x.numel() == 0));
    }

    #[test]
    fn wrong_shapes_are_refused() {
        let case = Case::new(&[4], [3, 2, 8], DType::F32);
        let (mut out, mut lse) = (case.q.clone(), Tensor::zeros(&[4, 3], DType::F32));
        let refused = forward(&mut out, &mut lse, &case.q, &case.k, &case.v, &[0, 4], 1.0);
        assert!(matches!(
            refused,
            Err(crate::Error::Shape { arg: "q_thn", .. })
        ));
        let case = Case::new(&[4], [2, 1, 8], DType::F32);
        let mut out = case.q.clone();
        let refused = forward_cached(&mut out, &case.q, &case.k, &case.v, 1, 1.0);
        assert!(matches!(
            refused,
            Err(crate::Error::Shape { arg: "k_sgn", .. })
        ));
    }
}
