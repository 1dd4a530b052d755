//! A tile is some tokens of one document with all query heads of one key:value head: [tokens · ratio, N], token by token,
//! which is how they lie in memory. It meets its keys in tiles as well, and only one tile of scores exists at a time.

use std::ops::Range;

use rayon::prelude::*;

use super::{Dims, Gradients, Saved, Sequences};
use crate::Tensor;
use crate::cpu::gemm::{self, Mat, MatMut, Threads};
use crate::cpu::{View, ViewMut, load_rows, math, simd, split_rows};

/// Rows (tokens · ratio) that a query tile aims at, and its bounds in tokens.
const QUERY_ROWS: usize = 256;
const QUERY_TOKENS: Range<usize> = 16..128;
const KEY_TILE: usize = 256;
/// Tokens whose gradients of keys and values are summed by one task; fixed, so that the order of sums is.
const SLAB_TOKENS: usize = 1024;

impl Sequences<'_> {
    /// Rows (tokens · ratio) of a tile, out of a [T,H,N] tensor.
    fn load_tile(&self, out: &mut [f32], tensor: &Tensor, tile: &Tile) {
        let Dims { h, n, .. } = self.dims;
        let width = self.dims.ratio() * n;
        let first = tile.rows.start * h * n + tile.kv_head * width;
        let out = &mut out[..tile.rows.len() * width];
        simd(
            #[inline(always)]
            || load_rows(out, View::of(tensor), first, h * n, width),
        );
    }

    /// Keys or values of a tile's sequence, positions `keys`: the memory itself, or widened into `scratch`.
    fn key_tile<'s>(
        &self,
        tensor: &'s Tensor,
        tile: &Tile,
        keys: &Range<usize>,
        scratch: &'s mut [f32],
    ) -> Mat<'s> {
        let Dims { g, n, .. } = self.dims;
        let first = ((tile.first_key + keys.start) * g + tile.kv_head) * n;
        let view = View::of(tensor);
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
    sequences: &Sequences,
    documents: &[Range<usize>],
    past: usize,
) {
    let dims = sequences.dims;
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
            scratch.attend(sequences, &tile);
            store_rows(out, &scratch.out, dims.ratio() * dims.n);
            store_rows(lse, &scratch.lse, dims.ratio());
        },
    );
}

pub(super) fn backward(
    gradients: Gradients,
    saved: &Saved,
    sequences: &Sequences,
    documents: &[Range<usize>],
) {
    let dims = sequences.dims;
    let slabs: Vec<(usize, Range<usize>)> = documents
        .iter()
        .enumerate()
        .flat_map(|(i, document)| pieces(document, SLAB_TOKENS).map(move |rows| (i, rows)))
        .collect();
    let ranges: Vec<Range<usize>> = slabs.iter().map(|(_, rows)| rows.clone()).collect();

    // 1. each slab of queries on its own: d_q, and its share of d_k and d_v
    let shares: Vec<KeyGradients> = split_rows(gradients.d_q_thn, &ranges, dims.g)
        .into_par_iter()
        .enumerate()
        .map_init(Scratch::default, |scratch, (task_idx, d_q)| {
            let (document_idx, rows) = &slabs[task_idx / dims.g];
            let document_start = documents[*document_idx].start;
            let kv_head = task_idx % dims.g;
            scratch.backward_slab(d_q, saved, sequences, document_start, rows, kv_head)
        })
        .collect();

    // 2. the shares of a document's slabs, in order
    split_rows(gradients.d_k_tgn, documents, dims.g)
        .into_par_iter()
        .zip(split_rows(gradients.d_v_tgn, documents, dims.g))
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
    fn attend(&mut self, sequences: &Sequences, tile: &Tile) {
        let n = sequences.dims.n;
        let n_rows = tile.rows.len() * tile.ratio;
        sequences.load_tile(&mut self.q, sequences.q_thn, tile);
        self.out[..n_rows * n].fill(0.0);
        self.max[..n_rows].fill(f32::NEG_INFINITY);
        self.sum[..n_rows].fill(0.0);
        for keys in tile.key_tiles() {
            self.score(sequences, tile, &keys);
            simd(
                #[inline(always)]
                || self.renormalise(tile, &keys, n),
            );
            let values = sequences.key_tile(sequences.v_sgn, tile, &keys, &mut self.v);
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
    fn score(&mut self, sequences: &Sequences, tile: &Tile, keys: &Range<usize>) {
        let n_rows = tile.rows.len() * tile.ratio;
        let key_mat = sequences.key_tile(sequences.k_sgn, tile, keys, &mut self.k);
        product(
            MatMut::new(&mut self.p, n_rows, keys.len()),
            sequences.scale,
            Mat::new(&self.q, n_rows, sequences.dims.n),
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
        sequences: &Sequences,
        document_start: usize,
        slab: &Range<usize>,
        kv_head: usize,
    ) -> KeyGradients {
        let dims = sequences.dims;
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
            self.backward_tile(&mut gradients, saved, sequences, &tile);
            store_rows(d_q_tile, &self.d_q, dims.ratio() * dims.n);
        }
        gradients
    }

    /// d_q of a tile; what it gives to keys and values is added to `gradients`.
    fn backward_tile(
        &mut self,
        gradients: &mut KeyGradients,
        saved: &Saved,
        sequences: &Sequences,
        tile: &Tile,
    ) {
        let Dims { h, n, .. } = sequences.dims;
        let n_rows = tile.rows.len() * tile.ratio;

        // 1. the tile's rows, and delta = d_out · out, which is Σ_s p d_p
        sequences.load_tile(&mut self.q, sequences.q_thn, tile);
        sequences.load_tile(&mut self.out, saved.out_thn, tile);
        sequences.load_tile(&mut self.d_out, saved.d_out_thn, tile);
        let lse_th = saved.lse_th.f32s();
        for (i, row) in tile.rows.clone().enumerate() {
            let lse = &lse_th[row * h + tile.kv_head * tile.ratio..][..tile.ratio];
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
            let key_mat = sequences.key_tile(sequences.k_sgn, tile, &keys, &mut self.k);
            let p = MatMut::new(&mut self.p, n_rows, keys.len());
            product(p, sequences.scale, q, key_mat.t(), 0.0);
            let value_mat = sequences.key_tile(sequences.v_sgn, tile, &keys, &mut self.v);
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
                            *d_p = *p * (*d_p - delta) * sequences.scale;
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
