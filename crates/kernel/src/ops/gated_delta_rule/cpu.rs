//! One task is one key head of one document with the value heads that read it; it walks its chunks in order, so nothing
//! is summed across threads. Letters as in docs/gated_delta_rule.md.

use std::ops::Range;

use rayon::prelude::*;

use super::{CHUNK, Dims, Gradients, Inputs};
use crate::Tensor;
use crate::cpu::gemm::{self, Mat, MatMut, Threads};
use crate::cpu::{View, ViewMut, load_rows, math, simd, split_rows};

/// Rows of a diagonal block of the triangular solves; what lies left of it is a matrix product.
const BLOCK: usize = 16;
/// Columns that a triangular solve keeps in registers.
const STRIP: usize = 32;

pub(super) fn forward(
    out_thv: &mut Tensor,
    state_hkv: Option<&mut Tensor>,
    inputs: &Inputs,
    documents: &[Range<usize>],
) {
    let dims = inputs.dims();
    let Dims { k, v, .. } = dims;
    let ratio = dims.ratio();
    let given_states: Vec<Option<&mut [f32]>> = match state_hkv {
        Some(state) => {
            let states_rkv = state.f32s_mut().chunks_exact_mut(ratio * k * v);
            states_rkv.map(Some).collect()
        }
        None => (0..documents.len() * dims.g).map(|_| None).collect(),
    };
    split_rows(out_thv, documents, dims.g)
        .into_par_iter()
        .zip(given_states)
        .enumerate()
        .for_each_init(
            || (Chunk::new(dims), vec![0.0; ratio * k * v]),
            |(chunk, own_states), (task_idx, (mut out, given_states))| {
                let key_head = task_idx % dims.g;
                let starts_empty = given_states.is_none();
                let states_rkv = given_states.unwrap_or(own_states);
                if starts_empty {
                    states_rkv.fill(0.0);
                }
                for (chunk_idx, range) in chunks(&documents[task_idx / dims.g]).enumerate() {
                    chunk.load(inputs, key_head, &range);
                    let out = &mut out[chunk_idx * CHUNK..][..range.len()];
                    for head in 0..ratio {
                        let state_kv = &mut states_rkv[head * k * v..][..k * v];
                        chunk.load_head(inputs, key_head * ratio + head, &range);
                        let is_zero = starts_empty && chunk_idx == 0;
                        chunk.read_state((!is_zero).then_some(&*state_kv), 2 * range.len());
                        chunk.solve();
                        chunk.write_out(out, head);
                        chunk.advance(state_kv);
                    }
                }
            },
        );
}

pub(super) fn backward(
    gradients: Gradients,
    d_out_thv: &Tensor,
    inputs: &Inputs,
    documents: &[Range<usize>],
) {
    let dims = inputs.dims();
    let split = |tensor| split_rows(tensor, documents, dims.g);
    split(gradients.d_q_tgk)
        .into_par_iter()
        .zip(split(gradients.d_k_tgk))
        .zip(split(gradients.d_v_thv))
        .zip(split(gradients.d_g_th))
        .zip(split(gradients.d_beta_th))
        .enumerate()
        .for_each_init(
            || (Chunk::new(dims), Reverse::new(dims)),
            |(chunk, reverse), (task_idx, ((((d_q, d_k), d_v), d_g), d_beta))| {
                let task = Task {
                    document: documents[task_idx / dims.g].clone(),
                    key_head: task_idx % dims.g,
                    d_q,
                    d_k,
                    d_v,
                    d_g,
                    d_beta,
                };
                task.run(chunk, reverse, inputs, d_out_thv);
            },
        );
}

fn chunks(
    document: &Range<usize>,
) -> impl DoubleEndedIterator<Item = Range<usize>> + ExactSizeIterator {
    let Range { start, end } = *document;
    (0..document.len().div_ceil(CHUNK))
        .map(move |i| start + i * CHUNK..(start + (i + 1) * CHUNK).min(end))
}

fn product(dst: MatMut, alpha: f32, lhs: Mat, rhs: Mat, beta: f32) {
    gemm::gemm(dst, alpha, lhs, rhs, beta, Threads::One);
}

/// Gradient rows of one key head of one document, one entry a token.
struct Task<'a> {
    document: Range<usize>,
    key_head: usize,
    d_q: Vec<ViewMut<'a>>,
    d_k: Vec<ViewMut<'a>>,
    d_v: Vec<ViewMut<'a>>,
    d_g: Vec<ViewMut<'a>>,
    d_beta: Vec<ViewMut<'a>>,
}

impl Task<'_> {
    fn run(
        mut self,
        chunk: &mut Chunk,
        reverse: &mut Reverse,
        inputs: &Inputs,
        d_out_thv: &Tensor,
    ) {
        let Dims { k, v, .. } = inputs.dims();
        let ratio = inputs.dims().ratio();
        let n_chunks = chunks(&self.document).len();

        // 1. forward again, keeping the state before each chunk and the chunk's deltas
        reverse.start(n_chunks);
        for (chunk_idx, range) in chunks(&self.document).enumerate() {
            chunk.load(inputs, self.key_head, &range);
            for head in 0..ratio {
                let slot = head * n_chunks + chunk_idx;
                chunk.load_head(inputs, self.key_head * ratio + head, &range);
                let (before, after) = reverse.states[slot * k * v..].split_at_mut(k * v);
                chunk.read_state((chunk_idx > 0).then_some(&*before), range.len());
                chunk.solve();
                reverse.deltas[slot * CHUNK * v..][..range.len() * v]
                    .copy_from_slice(&chunk.delta_cv[..range.len() * v]);
                if chunk_idx + 1 < n_chunks {
                    after[..k * v].copy_from_slice(before);
                    chunk.advance(&mut after[..k * v]);
                }
            }
        }

        // 2. the chunks in reverse, carrying the gradient of the state after the chunk
        for (chunk_idx, range) in chunks(&self.document).enumerate().rev() {
            let c = range.len();
            let rows = chunk_idx * CHUNK..chunk_idx * CHUNK + c;
            chunk.load(inputs, self.key_head, &range);
            reverse.start_chunk(c);
            for head in 0..ratio {
                let value_head = self.key_head * ratio + head;
                chunk.load_head(inputs, value_head, &range);
                reverse.load(d_out_thv, inputs.dims(), value_head, &range);
                let at = At {
                    slot: head * n_chunks + chunk_idx,
                    head,
                    is_first: chunk_idx == 0,
                    is_last: chunk_idx + 1 == n_chunks,
                };
                simd(
                    #[inline(always)]
                    || reverse.head(chunk, at),
                );
                store_rows(&mut self.d_v[rows.clone()], head * v, &reverse.d_v_cv, v);
                store_rows(&mut self.d_g[rows.clone()], head, &reverse.d_g_c, 1);
                store_rows(&mut self.d_beta[rows.clone()], head, &reverse.d_beta_c, 1);
            }
            reverse.finish_keys(chunk);
            store_rows(&mut self.d_k[rows.clone()], 0, &reverse.d_kq, k);
            store_rows(&mut self.d_q[rows], 0, &reverse.d_kq[c * k..], k);
        }
    }
}

/// Writes `width` columns of each row, from column `first` on.
fn store_rows(rows: &mut [ViewMut], first: usize, values: &[f32], width: usize) {
    simd(
        #[inline(always)]
        || {
            for (row, values) in rows.iter_mut().zip(values.chunks_exact(width)) {
                row.slice(first..first + width).store(values);
            }
        },
    );
}

/// One chunk of one key head, and the value head in hand.
struct Chunk {
    k: usize,
    v: usize,
    /// Tokens in the chunk.
    c: usize,
    /// Keys, then queries: [2C,K].
    kq: Vec<f32>,
    /// keys·keysᵀ, then queries·keysᵀ: [2C,C].
    kk_qk: Vec<f32>,
    v_cv: Vec<f32>,
    beta_c: Vec<f32>,
    /// L[i,j] = exp(g_{j+1} + .. + g_i) for j <= i, else 0: [C,C].
    decay_cc: Vec<f32>,
    /// exp(g_0 + .. + g_i).
    decay_from_start_c: Vec<f32>,
    /// A[i,j] = beta_i L[i,j] k_i·k_j for j < i, else 0: [C,C].
    a_cc: Vec<f32>,
    /// (keys, then queries)·S: [2C,V].
    from_state: Vec<f32>,
    /// The solution d of (I + A) d = beta (v - decayed Sᵀk): [C,V].
    delta_cv: Vec<f32>,
    /// M = L ⊙ queries·keysᵀ: [C,C].
    m_cc: Vec<f32>,
    /// Keys decayed to the chunk's end: [C,K].
    keys_at_end: Vec<f32>,
}

impl Chunk {
    fn new(dims: Dims) -> Self {
        let Dims { k, v, .. } = dims;
        let zeros = |n: usize| vec![0.0f32; n];
        Chunk {
            k,
            v,
            c: 0,
            kq: zeros(2 * CHUNK * k),
            kk_qk: zeros(2 * CHUNK * CHUNK),
            v_cv: zeros(CHUNK * v),
            beta_c: zeros(CHUNK),
            decay_cc: zeros(CHUNK * CHUNK),
            decay_from_start_c: zeros(CHUNK),
            a_cc: zeros(CHUNK * CHUNK),
            from_state: zeros(2 * CHUNK * v),
            delta_cv: zeros(CHUNK * v),
            m_cc: zeros(CHUNK * CHUNK),
            keys_at_end: zeros(CHUNK * k),
        }
    }

    /// What all value heads of a key head share.
    fn load(&mut self, inputs: &Inputs, key_head: usize, range: &Range<usize>) {
        let (c, k) = (range.len(), self.k);
        self.c = c;
        let stride = inputs.dims().g * k;
        let first = range.start * stride + key_head * k;
        let (keys, queries) = self.kq[..2 * c * k].split_at_mut(c * k);
        simd(
            #[inline(always)]
            || {
                load_rows(keys, View::of(inputs.k_tgk), first, stride, k);
                load_rows(queries, View::of(inputs.q_tgk), first, stride, k);
            },
        );
        product(
            MatMut::new(&mut self.kk_qk, 2 * c, c),
            1.0,
            Mat::new(&self.kq, 2 * c, k),
            Mat::new(&self.kq, c, k).t(),
            0.0,
        );
    }

    /// One value head's values and gates, and the matrices A and M that follow from them.
    fn load_head(&mut self, inputs: &Inputs, value_head: usize, range: &Range<usize>) {
        let Dims { h, v, .. } = inputs.dims();
        let c = self.c;
        let (g_th, beta_th) = (inputs.g_th.f32s(), inputs.beta_th.f32s());
        for (i, t) in range.clone().enumerate() {
            self.beta_c[i] = beta_th[t * h + value_head];
        }
        let gates = range.clone().map(|t| g_th[t * h + value_head]);
        let first = (range.start * h + value_head) * v;
        simd(
            #[inline(always)]
            || {
                let v_cv = &mut self.v_cv[..c * v];
                load_rows(v_cv, View::of(inputs.v_thv), first, h * v, v);
                // Each exponent is the sum of its own gates, masked before exp: a difference of two cumulative sums would
                // lose digits where the decay is strong, and overflow above the diagonal.
                let mut exponents = [0.0f32; CHUNK];
                let mut from_start = 0.0;
                for (i, g) in gates.clone().enumerate() {
                    from_start += g;
                    self.decay_from_start_c[i] = math::exp(from_start);
                    for exponent in &mut exponents[..i] {
                        *exponent += g;
                    }
                    let row = &mut self.decay_cc[i * c..(i + 1) * c];
                    for (l, &exponent) in row[..=i].iter_mut().zip(&exponents) {
                        *l = math::exp(exponent);
                    }
                    row[i + 1..].fill(0.0);
                }
                let (kk, qk) = self.kk_qk.split_at(c * c);
                for i in 0..c {
                    let beta = self.beta_c[i];
                    let row = i * c..(i + 1) * c;
                    let decay = &self.decay_cc[row.clone()];
                    let (kk, qk) = (&kk[row.clone()], &qk[row.clone()]);
                    let (a, m) = (&mut self.a_cc[row.clone()], &mut self.m_cc[row]);
                    for j in 0..c {
                        a[j] = beta * decay[j] * kk[j];
                        m[j] = decay[j] * qk[j];
                    }
                    a[i] = 0.0;
                }
                let to_end = &self.decay_cc[(c - 1) * c..c * c];
                scale_rows(&mut self.keys_at_end, &self.kq, self.k, to_end);
            },
        );
    }

    /// The first `n_rows` keys and queries times the state before the chunk (None: it is zero).
    fn read_state(&mut self, state_kv: Option<&[f32]>, n_rows: usize) {
        let (k, v) = (self.k, self.v);
        match state_kv {
            None => self.from_state[..n_rows * v].fill(0.0),
            Some(state_kv) => product(
                MatMut::new(&mut self.from_state, n_rows, v),
                1.0,
                Mat::new(&self.kq, n_rows, k),
                Mat::new(state_kv, k, v),
                0.0,
            ),
        }
    }

    /// d of the chunk, after the keys have read the state.
    fn solve(&mut self) {
        let (c, v) = (self.c, self.v);
        simd(
            #[inline(always)]
            || {
                for i in 0..c {
                    let (beta, decay) = (self.beta_c[i], self.decay_from_start_c[i]);
                    let row = i * v..(i + 1) * v;
                    let (values, predicted) =
                        (&self.v_cv[row.clone()], &self.from_state[row.clone()]);
                    let delta = self.delta_cv[row].iter_mut();
                    for ((delta, &value), &predicted) in delta.zip(values).zip(predicted) {
                        *delta = beta * (value - decay * predicted);
                    }
                }
                solve_lower(&mut self.delta_cv[..c * v], v, &self.a_cc, c);
            },
        );
    }

    /// out = decayed Sᵀq + M d, after the queries have read the state.
    fn write_out(&mut self, out: &mut [ViewMut], head: usize) {
        let (c, v) = (self.c, self.v);
        let out_cv = &mut self.from_state[c * v..2 * c * v];
        simd(
            #[inline(always)]
            || {
                for (row, &decay) in out_cv.chunks_exact_mut(v).zip(&self.decay_from_start_c) {
                    math::scale(row, decay);
                }
            },
        );
        product(
            MatMut::new(out_cv, c, v),
            1.0,
            Mat::new(&self.m_cc, c, c),
            Mat::new(&self.delta_cv, c, v),
            1.0,
        );
        store_rows(out, head * v, out_cv, v);
    }

    /// S = exp(sum of g) S + (keys decayed to the end)ᵀ d.
    fn advance(&mut self, state_kv: &mut [f32]) {
        let (c, k, v) = (self.c, self.k, self.v);
        product(
            MatMut::new(state_kv, k, v),
            1.0,
            Mat::new(&self.keys_at_end, c, k).t(),
            Mat::new(&self.delta_cv, c, v),
            self.decay_from_start_c[c - 1],
        );
    }
}

/// Which chunk of which head, and whether nothing comes before or after it.
#[derive(Clone, Copy)]
struct At {
    /// Index into the saved states and deltas.
    slot: usize,
    head: usize,
    is_first: bool,
    is_last: bool,
}

/// Scratch of the backward pass.
struct Reverse {
    k: usize,
    v: usize,
    ratio: usize,
    /// The state before each chunk: [ratio, chunks, K, V].
    states: Vec<f32>,
    /// d of each chunk: [ratio, chunks, CHUNK, V].
    deltas: Vec<f32>,
    /// Gradient of the state after the chunk in hand: [ratio, K, V].
    d_states: Vec<f32>,
    /// Gradient of the solve's right side, then gradient of out: [2C,V].
    d_rhs_out: Vec<f32>,
    /// d_rhs_out·Sᵀ: [2C,K].
    d_from_state: Vec<f32>,
    /// d_rhs_out·dᵀ, which becomes the gradients of keys·keysᵀ and queries·keysᵀ: [2C,C].
    d_pairs: Vec<f32>,
    /// The same summed over value heads.
    d_pairs_sum: Vec<f32>,
    /// Gradients of keys, then of queries, summed over value heads: [2C,K].
    d_kq: Vec<f32>,
    d_v_cv: Vec<f32>,
    d_g_c: Vec<f32>,
    d_beta_c: Vec<f32>,
    /// Room for [2C,K].
    wide: Vec<f32>,
}

impl Reverse {
    fn new(dims: Dims) -> Self {
        let Dims { k, v, .. } = dims;
        let zeros = |n: usize| vec![0.0f32; n];
        Reverse {
            k,
            v,
            ratio: dims.ratio(),
            states: Vec::new(),
            deltas: Vec::new(),
            d_states: zeros(dims.ratio() * k * v),
            d_rhs_out: zeros(2 * CHUNK * v),
            d_from_state: zeros(2 * CHUNK * k),
            d_pairs: zeros(2 * CHUNK * CHUNK),
            d_pairs_sum: zeros(2 * CHUNK * CHUNK),
            d_kq: zeros(2 * CHUNK * k),
            d_v_cv: zeros(CHUNK * v),
            d_g_c: zeros(CHUNK),
            d_beta_c: zeros(CHUNK),
            wide: zeros(2 * CHUNK * k),
        }
    }

    fn start(&mut self, n_chunks: usize) {
        let state_len = self.k * self.v;
        let n_slots = self.ratio * n_chunks;
        self.states.resize(n_slots * state_len, 0.0);
        self.deltas.resize(n_slots * CHUNK * self.v, 0.0);
        for slot in (0..n_slots).step_by(n_chunks.max(1)) {
            self.states[slot * state_len..][..state_len].fill(0.0);
        }
    }

    fn start_chunk(&mut self, c: usize) {
        self.d_kq[..2 * c * self.k].fill(0.0);
        self.d_pairs_sum[..2 * c * c].fill(0.0);
    }

    fn load(&mut self, d_out_thv: &Tensor, dims: Dims, value_head: usize, range: &Range<usize>) {
        let (c, v) = (range.len(), self.v);
        let first = (range.start * dims.h + value_head) * v;
        let d_out_cv = &mut self.d_rhs_out[c * v..2 * c * v];
        simd(
            #[inline(always)]
            || load_rows(d_out_cv, View::of(d_out_thv), first, dims.h * v, v),
        );
    }

    /// One value head of one chunk: d_v, d_g and d_beta become final, d_kq and d_pairs_sum grow, d_states moves from the
    /// chunk's end to its start.
    #[inline(always)]
    fn head(&mut self, chunk: &Chunk, at: At) {
        let c = chunk.c;
        // 1. the deltas, from the outputs and from the state after the chunk
        self.deltas(chunk, at);
        // 2. the right side of the solve, and v with it
        self.right_side(chunk);
        // 3. keys and queries, through their products with the state before the chunk
        let from_start = self.through_state_before(chunk, at);
        // 4. keys, through the state after the chunk
        let (to_end, through) = self.through_state_after(chunk, at);
        // 5. the pairs of tokens inside the chunk, and with them the gates
        self.pairs(chunk, at, &from_start);
        add_spans(&mut self.d_g_c[..c], through, &to_end[..c - 1]);
        // 6. the state before the chunk
        if !at.is_first {
            self.state_before(chunk, at);
        }
    }

    #[inline(always)]
    fn deltas(&mut self, chunk: &Chunk, at: At) {
        let (c, k, v) = (chunk.c, self.k, self.v);
        let d_state_kv = &self.d_states[at.head * k * v..][..k * v];
        let (d_rhs, d_out) = self.d_rhs_out[..2 * c * v].split_at_mut(c * v);
        product(
            MatMut::new(d_rhs, c, v),
            1.0,
            Mat::new(&chunk.m_cc, c, c).t(),
            Mat::new(d_out, c, v),
            0.0,
        );
        if !at.is_last {
            product(
                MatMut::new(d_rhs, c, v),
                1.0,
                Mat::new(&chunk.keys_at_end, c, k),
                Mat::new(d_state_kv, k, v),
                1.0,
            );
        }
    }

    #[inline(always)]
    fn right_side(&mut self, chunk: &Chunk) {
        let (c, v) = (chunk.c, self.v);
        let d_rhs = &mut self.d_rhs_out[..c * v];
        solve_lower_transposed(d_rhs, v, &chunk.a_cc, c);
        scale_rows(&mut self.d_v_cv, d_rhs, v, &chunk.beta_c[..c]);
        let values = chunk.v_cv.chunks_exact(v);
        let rows = d_rhs.chunks_exact(v).zip(values);
        for (d_beta, (d_rhs, value)) in self.d_beta_c.iter_mut().zip(rows) {
            *d_beta = math::dot(d_rhs, value);
        }
    }

    /// Entry i: gradient of the log of the decay from the chunk's start to token i.
    #[inline(always)]
    fn through_state_before(&mut self, chunk: &Chunk, at: At) -> [f32; CHUNK] {
        let (c, k, v) = (chunk.c, self.k, self.v);
        let decay = &chunk.decay_from_start_c[..c];
        let mut from_start = [0.0f32; CHUNK];
        if at.is_first {
            return from_start;
        }
        let state_kv = &self.states[at.slot * k * v..][..k * v];
        product(
            MatMut::new(&mut self.d_from_state, 2 * c, k),
            1.0,
            Mat::new(&self.d_rhs_out, 2 * c, v),
            Mat::new(state_kv, k, v).t(),
            0.0,
        );
        for i in 0..c {
            let key = i * k..(i + 1) * k;
            let query = (c + i) * k..(c + i + 1) * k;
            let d_key = &self.d_from_state[key.clone()];
            let d_query = &self.d_from_state[query.clone()];
            let d_beta = -decay[i] * math::dot(&chunk.kq[key.clone()], d_key);
            self.d_beta_c[i] += d_beta;
            from_start[i] =
                chunk.beta_c[i] * d_beta + decay[i] * math::dot(&chunk.kq[query.clone()], d_query);
            let key_factor = -decay[i] * chunk.beta_c[i];
            math::add_scaled(&mut self.d_kq[key], d_key, key_factor);
            math::add_scaled(&mut self.d_kq[query], d_query, decay[i]);
        }
        from_start
    }

    /// Entry j: gradient of the log of the decay from token j to the chunk's end; and of that from its start to its end.
    #[inline(always)]
    fn through_state_after(&mut self, chunk: &Chunk, at: At) -> ([f32; CHUNK], f32) {
        let (c, k, v) = (chunk.c, self.k, self.v);
        let mut to_end = [0.0f32; CHUNK];
        if at.is_last {
            return (to_end, 0.0);
        }
        let state_kv = &self.states[at.slot * k * v..][..k * v];
        let delta_cv = &self.deltas[at.slot * CHUNK * v..][..c * v];
        let d_state_kv = &self.d_states[at.head * k * v..][..k * v];
        product(
            MatMut::new(&mut self.wide, c, k),
            1.0,
            Mat::new(delta_cv, c, v),
            Mat::new(d_state_kv, k, v).t(),
            0.0,
        );
        let decay_to_end = &chunk.decay_cc[(c - 1) * c..c * c];
        for (j, (to_end, &decay)) in to_end.iter_mut().zip(decay_to_end).enumerate() {
            let row = j * k..(j + 1) * k;
            let d_key = &self.wide[row.clone()];
            *to_end = decay * math::dot(&chunk.kq[row.clone()], d_key);
            math::add_scaled(&mut self.d_kq[row], d_key, decay);
        }
        let through = chunk.decay_from_start_c[c - 1] * math::dot(state_kv, d_state_kv);
        (to_end, through)
    }

    /// `from_start`: as [`Reverse::through_state_before`] gives it.
    #[inline(always)]
    fn pairs(&mut self, chunk: &Chunk, at: At, from_start: &[f32; CHUNK]) {
        let (c, v) = (chunk.c, self.v);
        let delta_cv = &self.deltas[at.slot * CHUNK * v..][..c * v];
        product(
            MatMut::new(&mut self.d_pairs, 2 * c, c),
            1.0,
            Mat::new(&self.d_rhs_out, 2 * c, v),
            Mat::new(delta_cv, c, v).t(),
            0.0,
        );
        self.d_g_c[..c].fill(0.0);
        let (d_kk, d_qk) = self.d_pairs[..2 * c * c].split_at_mut(c * c);
        let (sum_kk, sum_qk) = self.d_pairs_sum[..2 * c * c].split_at_mut(c * c);
        let (kk, qk) = chunk.kk_qk[..2 * c * c].split_at(c * c);
        let mut pairs = [0.0f32; CHUNK];
        for i in 0..c {
            let beta = chunk.beta_c[i];
            // Up to the diagonal, which holds no decay and no product of keys.
            let row = i * c..i * c + i + 1;
            let decay = &chunk.decay_cc[row.clone()];
            let (kk, qk) = (&kk[row.clone()], &qk[row.clone()]);
            let (d_kk, d_qk) = (&mut d_kk[row.clone()], &mut d_qk[row.clone()]);
            d_kk[i] = 0.0;
            for j in 0..=i {
                d_kk[j] *= -decay[j];
                pairs[j] = d_kk[j] * kk[j];
            }
            self.d_beta_c[i] += math::sum(&pairs[..i]);
            for j in 0..=i {
                d_kk[j] *= beta;
                d_qk[j] *= decay[j];
                pairs[j] = beta * pairs[j] + d_qk[j] * qk[j];
            }
            math::add(&mut sum_kk[row.clone()], d_kk);
            math::add(&mut sum_qk[row], d_qk);
            add_spans(&mut self.d_g_c[..=i], from_start[i], &pairs[..i]);
        }
    }

    #[inline(always)]
    fn state_before(&mut self, chunk: &Chunk, at: At) {
        let (c, k, v) = (chunk.c, self.k, self.v);
        let decay = &chunk.decay_from_start_c[..c];
        let d_state_kv = &mut self.d_states[at.head * k * v..][..k * v];
        let (keys, queries) = chunk.kq[..2 * c * k].split_at(c * k);
        let (scaled_keys, scaled_queries) = self.wide[..2 * c * k].split_at_mut(c * k);
        let mut key_factors = [0.0f32; CHUNK];
        for i in 0..c {
            key_factors[i] = -decay[i] * chunk.beta_c[i];
        }
        scale_rows(scaled_keys, keys, k, &key_factors[..c]);
        scale_rows(scaled_queries, queries, k, decay);
        product(
            MatMut::new(d_state_kv, k, v),
            1.0,
            Mat::new(&self.wide, 2 * c, k).t(),
            Mat::new(&self.d_rhs_out, 2 * c, v),
            if at.is_last { 0.0 } else { decay[c - 1] },
        );
    }

    /// What the pairs inside the chunk give to keys and queries, all value heads at once.
    fn finish_keys(&mut self, chunk: &Chunk) {
        let (c, k) = (chunk.c, self.k);
        let d_kk = &mut self.d_pairs_sum[..c * c];
        for i in 0..c {
            for j in 0..i {
                d_kk[j * c + i] = d_kk[i * c + j];
            }
        }
        product(
            MatMut::new(&mut self.d_kq, 2 * c, k),
            1.0,
            Mat::new(&self.d_pairs_sum, 2 * c, c),
            Mat::new(&chunk.kq, c, k),
            1.0,
        );
        product(
            MatMut::new(&mut self.d_kq, c, k),
            1.0,
            Mat::new(&self.d_pairs_sum[c * c..], c, c).t(),
            Mat::new(&chunk.kq[c * k..], c, k),
            1.0,
        );
    }
}

/// Row i of `out` = factors[i] · row i of `x`, both `width` wide.
#[inline(always)]
fn scale_rows(out: &mut [f32], x: &[f32], width: usize, factors: &[f32]) {
    let rows = out.chunks_exact_mut(width).zip(x.chunks_exact(width));
    for ((out, x), &factor) in rows.zip(factors) {
        for (out, &x) in out.iter_mut().zip(x) {
            *out = factor * x;
        }
    }
}

/// d_g[t] += before + Σ_{j < t} spans[j]: a span (j, i] gives its gradient to the gates inside it and to no other, so
/// that a strong gate's tiny gradient is never the difference of two large sums.
#[inline(always)]
fn add_spans(d_g: &mut [f32], before: f32, spans: &[f32]) {
    let mut sum = before;
    d_g[0] += sum;
    for (d_g, &span) in d_g[1..].iter_mut().zip(spans) {
        sum += span;
        *d_g += sum;
    }
}

/// x = (I + a)⁻¹ x for the strictly lower triangular a [n,n]; x [n,width].
#[inline(always)]
fn solve_lower(x: &mut [f32], width: usize, a: &[f32], n: usize) {
    for first in (0..n).step_by(BLOCK) {
        let last = (first + BLOCK).min(n);
        let (solved, rest) = x.split_at_mut(first * width);
        if first > 0 {
            product(
                MatMut::new(rest, last - first, width),
                -1.0,
                Mat::strided(&a[first * n..], last - first, first, n),
                Mat::new(solved, first, width),
                1.0,
            );
        }
        for i in 1..last - first {
            let (above, row) = rest.split_at_mut(i * width);
            let factors = &a[(first + i) * n + first..][..i];
            subtract_rows(&mut row[..width], factors, above);
        }
    }
}

/// x = (I + a)⁻ᵀ x for the strictly lower triangular a [n,n]; x [n,width].
#[inline(always)]
fn solve_lower_transposed(x: &mut [f32], width: usize, a: &[f32], n: usize) {
    for first in (0..n).step_by(BLOCK).rev() {
        let last = (first + BLOCK).min(n);
        let (head, solved) = x.split_at_mut(last * width);
        let block = &mut head[first * width..];
        if last < n {
            product(
                MatMut::new(block, last - first, width),
                -1.0,
                Mat::strided(&a[last * n + first..], n - last, last - first, n).t(),
                Mat::new(solved, n - last, width),
                1.0,
            );
        }
        let mut factors = [0.0f32; BLOCK];
        for i in (first..last).rev() {
            let (row, below) = block[(i - first) * width..].split_at_mut(width);
            for (factor, l) in factors.iter_mut().zip(i + 1..last) {
                *factor = a[l * n + i];
            }
            subtract_rows(row, &factors[..last - i - 1], below);
        }
    }
}

/// row -= Σ_l factors[l] rows[l].
#[inline(always)]
fn subtract_rows(row: &mut [f32], factors: &[f32], rows: &[f32]) {
    let width = row.len();
    let (strips, rest) = row.as_chunks_mut::<STRIP>();
    for (strip_idx, strip) in strips.iter_mut().enumerate() {
        let mut acc = *strip;
        for (l, &factor) in factors.iter().enumerate() {
            let x = &rows[l * width + strip_idx * STRIP..][..STRIP];
            for (acc, &x) in acc.iter_mut().zip(x) {
                *acc -= factor * x;
            }
        }
        *strip = acc;
    }
    let first = width - rest.len();
    for (l, &factor) in factors.iter().enumerate() {
        let x = &rows[l * width + first..(l + 1) * width];
        for (y, &x) in rest.iter_mut().zip(x) {
            *y -= factor * x;
        }
    }
}
