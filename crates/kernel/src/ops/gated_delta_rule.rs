//! Gated delta rule over packed documents, in chunks, so that nearly all work is matrix products; the recurrence it equals:
//! S_t = exp(g_t) S_{t-1} + k_t d_tᵀ, d_t = beta_t (v_t - exp(g_t) S_{t-1}ᵀ k_t), out_t = S_tᵀ q_t, S = 0 at each document's start.
//!
//! Source: arXiv 2412.06464 (rule), arXiv 2406.06484 (chunked form), transformers 5.17 `torch_chunk_gated_delta_rule` (conventions).
//! Derivation of both passes, and of how the gradient of g keeps its relative precision: docs/gated_delta_rule.md.

// T tokens (packed), H value heads, G key heads (H a multiple of G), K key dim, V value dim, C tokens of a chunk (64, fewer at a document's end).

use super::check;
use crate::cpu::documents;
use crate::{DType, Device, Result, Tensor};

/// Tokens handled together; states exist at chunk borders only.
pub const CHUNK: usize = 64;

/// `out` assigned. Value head h reads key head h·G/H; q and k come normalised and q scaled; g <= 0 is the log of the decay.
///
/// Shapes: out_thv, v_thv [T,H,V]; q_tgk, k_tgk [T,G,K]; g_th, beta_th [T,H] f32. Inputs in any storage, arithmetic f32.
///
/// # Errors
/// [`crate::Error::Shape`] where shapes disagree, H is no multiple of G, or `cu_seqlens` does not rise from 0 to T;
/// [`crate::Error::DType`] where g or beta is not f32.
pub fn forward(
    out_thv: &mut Tensor,
    q_tgk: &Tensor,
    k_tgk: &Tensor,
    v_thv: &Tensor,
    g_th: &Tensor,
    beta_th: &Tensor,
    cu_seqlens: &[u32],
) -> Result<()> {
    const OP: &str = "gated_delta_rule::forward";
    let inputs = Inputs::new(OP, q_tgk, k_tgk, v_thv, g_th, beta_th)?;
    check::shape(OP, "out_thv", out_thv, v_thv.shape())?;
    check::cu_seqlens(OP, cu_seqlens, inputs.dims.t)?;
    match inputs.device(OP, out_thv, &[])? {
        Device::Cpu => cpu::forward(out_thv, None, &inputs, &documents(cu_seqlens)),
        Device::Cuda(cuda) => cuda::forward(cuda, out_thv, None, &inputs, cu_seqlens)?,
    }
    Ok(())
}

/// All five gradients assigned (d_g_th, d_beta_th f32). Chunk states are recomputed, not saved by the forward pass.
///
/// Shapes: d_q_tgk, d_k_tgk [T,G,K]; d_v_thv, d_out_thv [T,H,V]; d_g_th, d_beta_th [T,H] f32; the inputs as in [`forward`].
/// Scratch per thread: one f32 state and one [C,V] block for each chunk of a document and each value head of a key head.
///
/// # Errors
/// As [`forward`].
pub fn backward(
    d_q_tgk: &mut Tensor,
    d_k_tgk: &mut Tensor,
    d_v_thv: &mut Tensor,
    d_g_th: &mut Tensor,
    d_beta_th: &mut Tensor,
    d_out_thv: &Tensor,
    q_tgk: &Tensor,
    k_tgk: &Tensor,
    v_thv: &Tensor,
    g_th: &Tensor,
    beta_th: &Tensor,
    cu_seqlens: &[u32],
) -> Result<()> {
    const OP: &str = "gated_delta_rule::backward";
    let inputs = Inputs::new(OP, q_tgk, k_tgk, v_thv, g_th, beta_th)?;
    check::shape(OP, "d_q_tgk", d_q_tgk, q_tgk.shape())?;
    check::shape(OP, "d_k_tgk", d_k_tgk, k_tgk.shape())?;
    check::shape(OP, "d_v_thv", d_v_thv, v_thv.shape())?;
    check::shape(OP, "d_out_thv", d_out_thv, v_thv.shape())?;
    check::shape(OP, "d_g_th", d_g_th, g_th.shape())?;
    check::shape(OP, "d_beta_th", d_beta_th, g_th.shape())?;
    check::f32(OP, "d_g_th", d_g_th)?;
    check::f32(OP, "d_beta_th", d_beta_th)?;
    check::cu_seqlens(OP, cu_seqlens, inputs.dims.t)?;
    let device = inputs.device(
        OP,
        d_q_tgk,
        &[
            ("d_k_tgk", &*d_k_tgk),
            ("d_v_thv", &*d_v_thv),
            ("d_g_th", &*d_g_th),
            ("d_beta_th", &*d_beta_th),
            ("d_out_thv", d_out_thv),
        ],
    )?;
    let gradients = Gradients {
        d_q_tgk,
        d_k_tgk,
        d_v_thv,
        d_g_th,
        d_beta_th,
    };
    match device {
        Device::Cpu => cpu::backward(gradients, d_out_thv, &inputs, &documents(cu_seqlens)),
        Device::Cuda(cuda) => cuda::backward(cuda, gradients, d_out_thv, &inputs, cu_seqlens)?,
    }
    Ok(())
}

/// Most bytes of scratch that [`forward`] and [`backward`] take on a GPU, whatever documents the `shape` [T,H,G,K,V] is packed from.
pub fn scratch_bytes([t, h, g, k, v]: [usize; 5], dtype: DType) -> usize {
    cuda::scratch_bytes(Dims { t, h, g, k, v }, dtype)
}

/// T tokens of one sequence from `state_hkv` [H,K,V] f32, which is updated to the state after them; `out` assigned.
///
/// Shapes otherwise as in [`forward`]. Feeding a sequence in pieces gives the outputs of the whole up to f32 rounding.
///
/// # Errors
/// As [`forward`]; also where `state_hkv` is not [H,K,V] f32.
pub fn forward_with_state(
    out_thv: &mut Tensor,
    state_hkv: &mut Tensor,
    q_tgk: &Tensor,
    k_tgk: &Tensor,
    v_thv: &Tensor,
    g_th: &Tensor,
    beta_th: &Tensor,
) -> Result<()> {
    const OP: &str = "gated_delta_rule::forward_with_state";
    let inputs = Inputs::new(OP, q_tgk, k_tgk, v_thv, g_th, beta_th)?;
    let Dims { t, h, k, v, .. } = inputs.dims;
    check::shape(OP, "out_thv", out_thv, v_thv.shape())?;
    check::shape(OP, "state_hkv", state_hkv, &[h, k, v])?;
    check::f32(OP, "state_hkv", state_hkv)?;
    let cu_seqlens = [0, t as u32];
    match inputs.device(OP, out_thv, &[("state_hkv", &*state_hkv)])? {
        Device::Cpu => cpu::forward(out_thv, Some(state_hkv), &inputs, &documents(&cu_seqlens)),
        Device::Cuda(cuda) => cuda::forward(cuda, out_thv, Some(state_hkv), &inputs, &cu_seqlens)?,
    }
    Ok(())
}

#[derive(Clone, Copy)]
struct Dims {
    t: usize,
    /// Value heads.
    h: usize,
    /// Key heads.
    g: usize,
    k: usize,
    v: usize,
}

impl Dims {
    /// Value heads that read one key head.
    fn ratio(&self) -> usize {
        self.h / self.g
    }
}

struct Inputs<'a> {
    q_tgk: &'a Tensor,
    k_tgk: &'a Tensor,
    v_thv: &'a Tensor,
    g_th: &'a Tensor,
    beta_th: &'a Tensor,
    dims: Dims,
}

struct Gradients<'a> {
    d_q_tgk: &'a mut Tensor,
    d_k_tgk: &'a mut Tensor,
    d_v_thv: &'a mut Tensor,
    d_g_th: &'a mut Tensor,
    d_beta_th: &'a mut Tensor,
}

impl<'a> Inputs<'a> {
    fn new(
        op: &'static str,
        q_tgk: &'a Tensor,
        k_tgk: &'a Tensor,
        v_thv: &'a Tensor,
        g_th: &'a Tensor,
        beta_th: &'a Tensor,
    ) -> Result<Self> {
        let [t, h, v] = check::dims(op, "v_thv", v_thv, "[T,H,V]")?;
        let [_, g, k] = check::dims(op, "q_tgk", q_tgk, "[T,G,K]")?;
        if h * g * k * v == 0 || h % g != 0 {
            let expected = format!("[T,H,V] with H, V > 0 and H a multiple of {g} key heads");
            return Err(check::shape_error(op, "v_thv", v_thv, expected));
        }
        check::shape(op, "q_tgk", q_tgk, &[t, g, k])?;
        check::shape(op, "k_tgk", k_tgk, &[t, g, k])?;
        check::shape(op, "g_th", g_th, &[t, h])?;
        check::shape(op, "beta_th", beta_th, &[t, h])?;
        check::f32(op, "g_th", g_th)?;
        check::f32(op, "beta_th", beta_th)?;
        Ok(Inputs {
            q_tgk,
            k_tgk,
            v_thv,
            g_th,
            beta_th,
            dims: Dims { t, h, g, k, v },
        })
    }

    /// Where `first`, the inputs and `others` all lie.
    fn device(
        &self,
        op: &'static str,
        first: &Tensor,
        others: &[(&'static str, &Tensor)],
    ) -> Result<Device> {
        check::device(op, first, others)?;
        let inputs = [
            ("q_tgk", self.q_tgk),
            ("k_tgk", self.k_tgk),
            ("v_thv", self.v_thv),
            ("g_th", self.g_th),
            ("beta_th", self.beta_th),
        ];
        check::device(op, first, &inputs)
    }
}

mod cpu {
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
        let dims = inputs.dims;
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
        let dims = inputs.dims;
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
            let Dims { k, v, .. } = inputs.dims;
            let ratio = inputs.dims.ratio();
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
                    reverse.load(d_out_thv, inputs.dims, value_head, &range);
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
            let stride = inputs.dims.g * k;
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
            let Dims { h, v, .. } = inputs.dims;
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

        fn load(
            &mut self,
            d_out_thv: &Tensor,
            dims: Dims,
            value_head: usize,
            range: &Range<usize>,
        ) {
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
            let (c, k, v) = (chunk.c, self.k, self.v);
            let state_kv = &self.states[at.slot * k * v..][..k * v];
            let delta_cv = &self.deltas[at.slot * CHUNK * v..][..c * v];
            let d_state_kv = &mut self.d_states[at.head * k * v..][..k * v];
            let decay = &chunk.decay_from_start_c[..c];

            // 1. the deltas, from the outputs and from the state after the chunk
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

            // 2. the right side of the solve, and v with it
            solve_lower_transposed(d_rhs, v, &chunk.a_cc, c);
            scale_rows(&mut self.d_v_cv, d_rhs, v, &chunk.beta_c[..c]);
            let values = chunk.v_cv.chunks_exact(v);
            let rows = d_rhs.chunks_exact(v).zip(values);
            for (d_beta, (d_rhs, value)) in self.d_beta_c.iter_mut().zip(rows) {
                *d_beta = math::dot(d_rhs, value);
            }

            // 3. keys and queries, through their products with the state before the chunk
            //    `from_start[i]`: gradient of the log of the decay from the chunk's start to token i
            let mut from_start = [0.0f32; CHUNK];
            if !at.is_first {
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
                    from_start[i] = chunk.beta_c[i] * d_beta
                        + decay[i] * math::dot(&chunk.kq[query.clone()], d_query);
                    let key_factor = -decay[i] * chunk.beta_c[i];
                    math::add_scaled(&mut self.d_kq[key], d_key, key_factor);
                    math::add_scaled(&mut self.d_kq[query], d_query, decay[i]);
                }
            }

            // 4. keys, through the state after the chunk
            //    `to_end[j]`: gradient of the log of the decay from token j to the chunk's end; `through`: from its start
            let mut to_end = [0.0f32; CHUNK];
            let mut through = 0.0;
            if !at.is_last {
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
                through = decay[c - 1] * math::dot(state_kv, d_state_kv);
            }

            // 5. the pairs of tokens inside the chunk, and with them the gates
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
            add_spans(&mut self.d_g_c[..c], through, &to_end[..c - 1]);

            // 6. the state before the chunk
            if !at.is_first {
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
}

mod cuda {
    //! Scratch is indexed by token or by border (between two chunks of one document), never by chunk, so that many short
    //! documents take no more of it than a long one; where it would grow too large, key heads are handled in groups.

    use super::{Dims, Gradients, Inputs};
    use crate::cuda::{Args, Cuda};
    use crate::{DType, Result, Tensor};

    /// See [`super::scratch_bytes`]. Forward takes a part of what backward does.
    pub(super) fn scratch_bytes(dims: Dims, dtype: DType) -> usize {
        let per_head = match dtype {
            DType::Bf16 if bf16_kernels::take_dims(dims) => {
                bf16_kernels::backward_bytes(dims, dims.t / bf16_kernels::CHUNK).to_vec()
            }
            _ => f32_kernels::backward_bytes(dims, dims.t / f32_kernels::SPAN).to_vec(),
        };
        // The heads are shared out evenly, so that a pass takes less than one key head's more than what is worth its room.
        let per_head: usize = per_head.iter().map(|bytes| bytes + 256).sum();
        (per_head * dims.h).min(SCRATCH + per_head * dims.ratio())
    }

    /// Scratch that is worth its room; one key head's is taken in any case.
    const SCRATCH: usize = 768 << 20;
    const F32: usize = 4;
    const BF16: usize = 2;

    pub(super) fn forward(
        cuda: Cuda,
        out_thv: &mut Tensor,
        state_hkv: Option<&mut Tensor>,
        inputs: &Inputs,
        cu_seqlens: &[u32],
    ) -> Result<()> {
        let state = state_hkv.map_or(0, |state| state.device_pointer());
        if inputs.dims.t == 0 {
            Ok(())
        } else if bf16_kernels::take(inputs, &[out_thv]) {
            bf16_kernels::forward(cuda, out_thv, state, inputs, cu_seqlens)
        } else {
            f32_kernels::forward(cuda, out_thv, state, inputs, cu_seqlens)
        }
    }

    pub(super) fn backward(
        cuda: Cuda,
        gradients: Gradients,
        d_out_thv: &Tensor,
        inputs: &Inputs,
        cu_seqlens: &[u32],
    ) -> Result<()> {
        let Gradients {
            d_q_tgk,
            d_k_tgk,
            d_v_thv,
            ..
        } = &gradients;
        if inputs.dims.t == 0 {
            Ok(())
        } else if bf16_kernels::take(inputs, &[d_q_tgk, d_k_tgk, d_v_thv, d_out_thv]) {
            bf16_kernels::backward(cuda, gradients, d_out_thv, inputs, cu_seqlens)
        } else {
            f32_kernels::backward(cuda, gradients, d_out_thv, inputs, cu_seqlens)
        }
    }

    mod f32_kernels {
        use super::{Args, Cuda, Dims, F32, Gradients, Heads, Inputs, Result, Tables, Tensor};
        use super::{carve, heads_at_once};
        use crate::Error;
        use crate::cuda::Grid;
        use crate::cuda::sources::GATED_DELTA_RULE;

        /// Tokens of a chunk.
        pub(super) const SPAN: usize = 32;
        /// Value columns of a block of a scan.
        const COLUMNS: usize = 16;
        /// Most key dims that a block holds.
        const MAX_K: usize = 256;

        /// Bytes of the kernels' shared structs and of [SPAN, K + 1].
        const PREPARE_BYTES: usize = (4 * SPAN + 2 * SPAN * (SPAN + 1)) * F32;
        const SCAN_BYTES: usize =
            (4 * SPAN + 2 * SPAN * (SPAN + 1) + 3 * SPAN * (COLUMNS + 1)) * F32;
        const GRADIENT_BYTES: usize =
            (3 * 32 * (SPAN + 4) + 4 * SPAN + 5 * SPAN * (SPAN + 1) + 3 * SPAN) * F32;
        fn row_bytes(k: usize) -> usize {
            SPAN * (k + 1) * F32
        }

        pub(super) fn forward(
            cuda: Cuda,
            out_thv: &mut Tensor,
            state: u64,
            inputs: &Inputs,
            cu_seqlens: &[u32],
        ) -> Result<()> {
            let Dims { t, .. } = inputs.dims;
            check_dims("gated_delta_rule::forward", inputs.dims)?;
            let tables = Tables::upload(cuda, cu_seqlens, SPAN)?;
            let per_head = [t * SPAN * F32; 2];
            for heads in heads_at_once(inputs.dims, per_head.iter().sum()) {
                let [p, m] = carve(cuda, per_head.map(|bytes| bytes * heads.n))?;
                let pass = Pass {
                    cuda,
                    inputs,
                    tables: &tables,
                    heads,
                    p,
                    m,
                };
                pass.prepare(0)?;
                pass.scan(Args::new().view_mut(out_thv), 0, 0, state)?;
            }
            Ok(())
        }

        pub(super) fn backward(
            cuda: Cuda,
            gradients: Gradients,
            d_out_thv: &Tensor,
            inputs: &Inputs,
            cu_seqlens: &[u32],
        ) -> Result<()> {
            let k = inputs.dims.k;
            check_dims("gated_delta_rule::backward", inputs.dims)?;
            let tables = Tables::upload(cuda, cu_seqlens, SPAN)?;
            let per_head = backward_bytes(inputs.dims, tables.n_borders);
            for heads in heads_at_once(inputs.dims, per_head.iter().sum()) {
                let [p, m, n, e, d_r, states, d_states] =
                    carve(cuda, per_head.map(|bytes| bytes * heads.n))?;
                let pass = Pass {
                    cuda,
                    inputs,
                    tables: &tables,
                    heads,
                    p,
                    m,
                };
                pass.prepare(n)?;
                pass.scan(Args::new().pointer(0), e, states, 0)?;
                pass.reverse(gradients.d_v_thv, d_r, d_states, d_out_thv)?;
                let args = Args::new()
                    .view_mut(gradients.d_q_tgk)
                    .view_mut(gradients.d_k_tgk)
                    .tensor_mut(gradients.d_g_th)
                    .tensor_mut(gradients.d_beta_th)
                    .view(d_out_thv);
                let args = [m, n, e, d_r, states, d_states, tables.chunks]
                    .into_iter()
                    .fold(pass.keys(args), Args::pointer);
                let grid = Grid {
                    blocks: [
                        (tables.n_chunks * heads.n / inputs.dims.ratio()) as u32,
                        1,
                        1,
                    ],
                    threads: (2 * k).next_multiple_of(32).max(64) as u32,
                    shared_bytes: GRADIENT_BYTES + row_bytes(k),
                };
                let args = pass.dims(args, true);
                cuda.launch(&GATED_DELTA_RULE, "gated_delta_rule_gradient", grid, args)?;
            }
            Ok(())
        }

        /// Bytes of p, m, n, e, d_r and of the states and their gradients for one head.
        pub(super) fn backward_bytes(dims: Dims, n_borders: usize) -> [usize; 7] {
            let Dims { t, k, v, .. } = dims;
            let (pairs, values, states) = (t * SPAN, t * v, n_borders * k * v);
            [pairs, pairs, pairs, values, values, states, states].map(|n| n * F32)
        }

        fn check_dims(op: &'static str, dims: Dims) -> Result<()> {
            if dims.k <= MAX_K {
                return Ok(());
            }
            let what = format!("{} key dims; at most {MAX_K}", dims.k);
            Err(Error::Unsupported { op, what })
        }

        /// The kernels over some of the heads.
        struct Pass<'a> {
            cuda: Cuda,
            inputs: &'a Inputs<'a>,
            tables: &'a Tables,
            heads: Heads,
            p: u64,
            m: u64,
        }

        impl Pass<'_> {
            fn prepare(&self, n: u64) -> Result<()> {
                let args = self
                    .keys(Args::new())
                    .pointer(self.p)
                    .pointer(self.m)
                    .pointer(n)
                    .pointer(self.tables.chunks);
                let grid = Grid {
                    blocks: [(self.tables.n_chunks * self.heads.n) as u32, 1, 1],
                    threads: 256,
                    shared_bytes: PREPARE_BYTES + 2 * row_bytes(self.inputs.dims.k),
                };
                let args = self.dims(args, false);
                self.cuda
                    .launch(&GATED_DELTA_RULE, "gated_delta_rule_prepare", grid, args)
            }

            /// `out` holds the first argument; null pointers are not written.
            fn scan(&self, out: Args, e: u64, states: u64, state: u64) -> Result<()> {
                let args = out
                    .pointer(e)
                    .pointer(states)
                    .pointer(state)
                    .view(self.inputs.q_tgk)
                    .view(self.inputs.k_tgk)
                    .view(self.inputs.v_thv)
                    .tensor(self.inputs.g_th)
                    .tensor(self.inputs.beta_th);
                self.over_documents("gated_delta_rule_scan", args)
            }

            fn reverse(
                &self,
                d_v_thv: &mut Tensor,
                d_r: u64,
                d_states: u64,
                d_out_thv: &Tensor,
            ) -> Result<()> {
                let args = Args::new()
                    .view_mut(d_v_thv)
                    .pointer(d_r)
                    .pointer(d_states)
                    .view(d_out_thv);
                self.over_documents("gated_delta_rule_reverse", self.keys(args))
            }

            fn over_documents(&self, kernel: &'static str, args: Args) -> Result<()> {
                let Dims { k, v, .. } = self.inputs.dims;
                let args = args
                    .pointer(self.p)
                    .pointer(self.m)
                    .pointer(self.tables.documents);
                let n_blocks = self.tables.n_documents * self.heads.n * v.div_ceil(COLUMNS);
                let grid = Grid {
                    blocks: [n_blocks as u32, 1, 1],
                    threads: 256,
                    shared_bytes: SCAN_BYTES + 2 * row_bytes(k) + k * (COLUMNS + 1) * F32,
                };
                self.cuda
                    .launch(&GATED_DELTA_RULE, kernel, grid, self.dims(args, true))
            }

            fn keys(&self, args: Args) -> Args {
                args.view(self.inputs.q_tgk)
                    .view(self.inputs.k_tgk)
                    .tensor(self.inputs.g_th)
                    .tensor(self.inputs.beta_th)
            }

            fn dims(&self, args: Args, with_v: bool) -> Args {
                let Dims { h, g, k, v, .. } = self.inputs.dims;
                let args = args.u32(h).u32(g).u32(k);
                let args = if with_v { args.u32(v) } else { args };
                args.u32(self.heads.first).u32(self.heads.n)
            }
        }
    }

    mod bf16_kernels {
        use super::{Args, BF16, Cuda, DType, Dims, F32, Gradients, Heads, Inputs, Result};
        use super::{Tables, Tensor, carve, heads_at_once};
        use crate::cuda::Grid;
        use crate::cuda::sources::GATED_DELTA_RULE_BF16;

        /// Tokens of a chunk.
        pub(super) const CHUNK: usize = 64;
        /// Key dims, and value dims.
        const DIM: usize = 128;
        /// Value columns of a warp of a scan.
        const COLUMNS: usize = 16;

        /// Bytes of the kernels' shared structs, of the scans with one and with two tiles of columns.
        const PREPARE_BYTES: usize = 51_264;
        const SCAN_BYTES: [usize; 2] = [91_136, 99_328];
        const REVERSE_BYTES: [usize; 2] = [82_944, 99_328];
        const GRADIENT_BYTES: usize = 100_384;

        /// Whether these kernels take the dims and types.
        pub(super) fn take(inputs: &Inputs, others: &[&Tensor]) -> bool {
            let Inputs {
                q_tgk,
                k_tgk,
                v_thv,
                dims,
                ..
            } = inputs;
            take_dims(*dims)
                && [*q_tgk, *k_tgk, *v_thv]
                    .iter()
                    .chain(others)
                    .all(|x| x.dtype() == DType::Bf16)
        }

        pub(super) fn take_dims(dims: Dims) -> bool {
            dims.k == DIM && dims.v == DIM
        }

        pub(super) fn forward(
            cuda: Cuda,
            out_thv: &mut Tensor,
            state: u64,
            inputs: &Inputs,
            cu_seqlens: &[u32],
        ) -> Result<()> {
            let tables = Tables::upload(cuda, cu_seqlens, CHUNK)?;
            let per_head = pair_bytes(inputs.dims.t);
            for heads in heads_at_once(inputs.dims, per_head.iter().sum()) {
                let [p, m, decays] = carve(cuda, per_head.map(|bytes| bytes * heads.n))?;
                let pass = Pass {
                    cuda,
                    inputs,
                    tables: &tables,
                    heads,
                    p,
                    m,
                    decays,
                };
                pass.prepare()?;
                let args = Args::new()
                    .tensor_mut(out_thv)
                    .pointer(state)
                    .tensor(inputs.q_tgk)
                    .tensor(inputs.k_tgk)
                    .tensor(inputs.v_thv)
                    .pointer(p)
                    .pointer(m);
                pass.over_documents(
                    [
                        "gated_delta_rule_bf16_scan_1",
                        "gated_delta_rule_bf16_scan_2",
                    ],
                    SCAN_BYTES,
                    args,
                )?;
            }
            Ok(())
        }

        pub(super) fn backward(
            cuda: Cuda,
            gradients: Gradients,
            d_out_thv: &Tensor,
            inputs: &Inputs,
            cu_seqlens: &[u32],
        ) -> Result<()> {
            let tables = Tables::upload(cuda, cu_seqlens, CHUNK)?;
            let per_head = backward_bytes(inputs.dims, tables.n_borders);
            for heads in heads_at_once(inputs.dims, per_head.iter().sum()) {
                let [p, m, decays, e, states, d_states] =
                    carve(cuda, per_head.map(|bytes| bytes * heads.n))?;
                let pass = Pass {
                    cuda,
                    inputs,
                    tables: &tables,
                    heads,
                    p,
                    m,
                    decays,
                };
                pass.prepare()?;
                // 1. the states and e again
                let args = Args::new()
                    .pointer(e)
                    .pointer(states)
                    .tensor(inputs.k_tgk)
                    .tensor(inputs.v_thv)
                    .pointer(p);
                pass.over_documents(
                    [
                        "gated_delta_rule_bf16_again_1",
                        "gated_delta_rule_bf16_again_2",
                    ],
                    SCAN_BYTES,
                    args,
                )?;
                // 2. gradients of the states; dR to the place of d_v, which the last kernel makes of it
                let args = Args::new()
                    .tensor_mut(gradients.d_v_thv)
                    .pointer(d_states)
                    .tensor(d_out_thv)
                    .tensor(inputs.q_tgk)
                    .tensor(inputs.k_tgk)
                    .pointer(p)
                    .pointer(m);
                pass.over_documents(
                    [
                        "gated_delta_rule_bf16_reverse_1",
                        "gated_delta_rule_bf16_reverse_2",
                    ],
                    REVERSE_BYTES,
                    args,
                )?;
                // 3. the rest
                let args = Args::new()
                    .tensor_mut(gradients.d_q_tgk)
                    .tensor_mut(gradients.d_k_tgk)
                    .tensor_mut(gradients.d_v_thv)
                    .tensor_mut(gradients.d_g_th)
                    .tensor_mut(gradients.d_beta_th)
                    .tensor(d_out_thv)
                    .tensor(inputs.q_tgk)
                    .tensor(inputs.k_tgk)
                    .pointer(decays)
                    .pointer(e)
                    .pointer(states)
                    .pointer(d_states);
                pass.over_chunks("gated_delta_rule_bf16_gradient", GRADIENT_BYTES, args)?;
            }
            Ok(())
        }

        /// Bytes of P, M, the decays, e and of the states and their gradients for one head.
        pub(super) fn backward_bytes(dims: Dims, n_borders: usize) -> [usize; 6] {
            let [p, m, decays] = pair_bytes(dims.t);
            let states = n_borders * DIM * DIM * BF16;
            [p, m, decays, dims.t * DIM * BF16, states, states]
        }

        /// Bytes of P, M and the decays of a head.
        fn pair_bytes(t: usize) -> [usize; 3] {
            [t * CHUNK * BF16, t * CHUNK * BF16, t * 4 * F32]
        }

        /// The kernels over some of the heads.
        struct Pass<'a> {
            cuda: Cuda,
            inputs: &'a Inputs<'a>,
            tables: &'a Tables,
            heads: Heads,
            p: u64,
            m: u64,
            decays: u64,
        }

        impl Pass<'_> {
            fn prepare(&self) -> Result<()> {
                let args = Args::new()
                    .pointer(self.p)
                    .pointer(self.m)
                    .pointer(self.decays)
                    .tensor(self.inputs.q_tgk)
                    .tensor(self.inputs.k_tgk)
                    .tensor(self.inputs.g_th)
                    .tensor(self.inputs.beta_th);
                self.over_chunks("gated_delta_rule_bf16_prepare", PREPARE_BYTES, args)
            }

            fn over_chunks(
                &self,
                kernel: &'static str,
                shared_bytes: usize,
                args: Args,
            ) -> Result<()> {
                let n_key_heads = self.heads.n / self.inputs.dims.ratio();
                let grid = Grid {
                    blocks: [(self.tables.n_chunks * n_key_heads) as u32, 1, 1],
                    threads: 256,
                    shared_bytes,
                };
                let args = self.dims(args.pointer(self.tables.chunks));
                self.cuda.launch(&GATED_DELTA_RULE_BF16, kernel, grid, args)
            }

            /// `kernels` have one and two tiles of columns: the first where the second would leave multiprocessors without work.
            fn over_documents(
                &self,
                kernels: [&'static str; 2],
                shared_bytes: [usize; 2],
                args: Args,
            ) -> Result<()> {
                let blocks = |n_tiles: usize| {
                    self.tables.n_documents * self.heads.n * DIM / (COLUMNS * n_tiles)
                };
                let few = blocks(2) * 4 < self.cuda.n_multiprocessors() as usize * 3;
                let n_tiles = if few { 1 } else { 2 };
                let grid = Grid {
                    blocks: [blocks(n_tiles) as u32, 1, 1],
                    threads: 64 * n_tiles as u32,
                    shared_bytes: shared_bytes[n_tiles - 1],
                };
                let args = args.pointer(self.decays).pointer(self.tables.documents);
                self.cuda.launch(
                    &GATED_DELTA_RULE_BF16,
                    kernels[n_tiles - 1],
                    grid,
                    self.dims(args),
                )
            }

            fn dims(&self, args: Args) -> Args {
                let Dims { h, g, .. } = self.inputs.dims;
                args.u32(h).u32(g).u32(self.heads.first).u32(self.heads.n)
            }
        }
    }

    /// Value heads handled together: all those of some key heads.
    #[derive(Clone, Copy)]
    struct Heads {
        first: usize,
        n: usize,
    }

    fn heads_at_once(dims: Dims, scratch_per_head: usize) -> impl Iterator<Item = Heads> {
        let per_key_head = scratch_per_head * dims.ratio();
        let n_passes = (dims.g * per_key_head).div_ceil(SCRATCH).clamp(1, dims.g);
        let step = dims.g.div_ceil(n_passes) * dims.ratio();
        (0..dims.h).step_by(step).map(move |first| Heads {
            first,
            n: step.min(dims.h - first),
        })
    }

    /// Pieces of the scratch, each at a multiple of 256 bytes.
    fn carve<const N: usize>(cuda: Cuda, bytes: [usize; N]) -> Result<[u64; N]> {
        let bytes = bytes.map(|bytes| bytes.next_multiple_of(256));
        let mut next = cuda.scratch(bytes.iter().sum())?;
        Ok(bytes.map(|bytes| {
            let piece = next;
            next += bytes as u64;
            piece
        }))
    }

    /// Documents and chunks on the GPU, four numbers each, as the kernel files say.
    struct Tables {
        documents: u64,
        chunks: u64,
        n_documents: usize,
        n_chunks: usize,
        n_borders: usize,
    }

    impl Tables {
        fn upload(cuda: Cuda, cu_seqlens: &[u32], span: usize) -> Result<Tables> {
            let (documents, chunks, n_borders) = tables(cu_seqlens, span as u32);
            let both = [documents.as_flattened(), chunks.as_flattened()].concat();
            let pointer = cuda.upload(&both)?;
            Ok(Tables {
                documents: pointer,
                chunks: pointer + size_of_val(documents.as_slice()) as u64,
                n_documents: documents.len(),
                n_chunks: chunks.len(),
                n_borders,
            })
        }
    }

    /// No state before a document's first chunk or behind its last.
    const NONE: u32 = u32::MAX;

    /// Documents, the longest first, so that the blocks that take longest start first; chunks; the number of borders.
    fn tables(cu_seqlens: &[u32], span: u32) -> (Vec<[u32; 4]>, Vec<[u32; 4]>, usize) {
        let (mut documents, mut chunks, mut n_borders) = (Vec::new(), Vec::new(), 0);
        for ends in cu_seqlens.windows(2).filter(|ends| ends[0] < ends[1]) {
            let (start, len) = (ends[0], ends[1] - ends[0]);
            documents.push([start, len, n_borders, 0]);
            let n_chunks = len.div_ceil(span);
            for i in 0..n_chunks {
                let before = if i == 0 { NONE } else { n_borders + i - 1 };
                let after = if i + 1 == n_chunks {
                    NONE
                } else {
                    n_borders + i
                };
                let count = span.min(len - i * span);
                chunks.push([start + i * span, count, before, after]);
            }
            n_borders += n_chunks - 1;
        }
        documents.sort_by_key(|[_, len, ..]| std::cmp::Reverse(*len));
        (documents, chunks, n_borders as usize)
    }

    #[cfg(test)]
    mod tests {
        use super::*;

        #[test]
        fn borders_lie_between_chunks_of_one_document() {
            let (documents, chunks, n_borders) = tables(&[0, 3, 3, 40, 104], 32);
            assert_eq!(documents, [[40, 64, 1, 0], [3, 37, 0, 0], [0, 3, 0, 0]]);
            let want = [
                [0, 3, NONE, NONE],
                [3, 32, NONE, 0],
                [35, 5, 0, NONE],
                [40, 32, NONE, 1],
                [72, 32, 1, NONE],
            ];
            assert_eq!((chunks.as_slice(), n_borders), (want.as_slice(), 2));
        }

        #[test]
        fn heads_come_in_groups_of_whole_key_heads() {
            let dims = Dims {
                t: 1,
                h: 15,
                g: 5,
                k: 1,
                v: 1,
            };
            let groups = |bytes| {
                heads_at_once(dims, bytes)
                    .map(|heads| (heads.first, heads.n))
                    .collect::<Vec<_>>()
            };
            assert_eq!(groups(0), [(0, 15)]);
            assert_eq!(groups(SCRATCH / 7), [(0, 6), (6, 6), (12, 3)]);
            assert_eq!(groups(2 * SCRATCH).len(), 5);
        }

        #[test]
        fn no_packing_takes_more_scratch_than_is_said() {
            for (t, h, g) in [
                (100, 4, 4),
                (15_360, 32, 16),
                (16_384, 48, 16),
                (40_000, 32, 16),
            ] {
                let dims = Dims {
                    t,
                    h,
                    g,
                    k: 128,
                    v: 128,
                };
                let said = scratch_bytes(dims, DType::Bf16);
                for n_borders in (0..=t / 64).step_by(7) {
                    let per_head = bf16_kernels::backward_bytes(dims, n_borders);
                    for heads in heads_at_once(dims, per_head.iter().sum()) {
                        let pieces = per_head.map(|bytes| (bytes * heads.n).next_multiple_of(256));
                        let taken: usize = pieces.iter().sum();
                        assert!(taken <= said, "{taken} of {said}, {t} tokens");
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::DType;
    use crate::ops::gated_delta_step;
    use crate::ops::testing::{
        BF16_REL, Random, assert_close, bits_from_row, f64s, offsets, poison_like, relative_error,
        rows,
    };

    /// Relative error (of norms) of f32 sums; measured: 4e-7 at worst.
    const F32_REL: f64 = 1e-6;
    const LENGTHS: [usize; 9] = [1, 63, 0, 64, 65, 3, 130, 1, 2];

    /// Inputs and the gradient of the output.
    #[derive(Clone)]
    struct Case {
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        beta: Tensor,
        d_out: Tensor,
        cu_seqlens: Vec<u32>,
    }

    impl Case {
        /// Gates uniform in `gates`.
        fn new(lengths: &[usize], [h, g, k, v]: [usize; 4], gates: [f64; 2]) -> Self {
            let mut random = Random::new((h * 1000 + k) as u64);
            let cu_seqlens = offsets(lengths);
            let t = lengths.iter().sum();
            let unit = 1.0 / (k as f64 / 3.0).sqrt();
            Case {
                q: random.tensor(&[t, g, k], -unit, unit),
                k: normalised(random.tensor(&[t, g, k], -1.0, 1.0)),
                v: random.tensor(&[t, h, v], -1.0, 1.0),
                g: random.tensor(&[t, h], gates[0], gates[1]),
                beta: random.tensor(&[t, h], 0.0, 1.0),
                d_out: random.tensor(&[t, h, v], -1.0, 1.0),
                cu_seqlens,
            }
        }

        fn stored_as(&self, dtype: DType) -> Self {
            Case {
                q: self.q.to_dtype(dtype),
                k: self.k.to_dtype(dtype),
                v: self.v.to_dtype(dtype),
                d_out: self.d_out.to_dtype(dtype),
                ..self.clone()
            }
        }

        /// The documents' rows `range` as one document.
        fn piece(&self, range: std::ops::Range<usize>) -> Self {
            let cut = |tensor: &Tensor| rows(tensor, range.clone());
            Case {
                q: cut(&self.q),
                k: cut(&self.k),
                v: cut(&self.v),
                g: cut(&self.g),
                beta: cut(&self.beta),
                d_out: cut(&self.d_out),
                cu_seqlens: vec![0, range.len() as u32],
            }
        }

        /// out, d_q, d_k, d_v, d_g, d_beta.
        fn run(&self) -> [Tensor; 6] {
            let dtype = self.v.dtype();
            let mut out = poison_like(&self.v, dtype);
            let mut d_q = poison_like(&self.q, dtype);
            let mut d_k = poison_like(&self.k, dtype);
            let mut d_v = poison_like(&self.v, dtype);
            let mut d_g = poison_like(&self.g, DType::F32);
            let mut d_beta = poison_like(&self.g, DType::F32);
            forward(
                &mut out,
                &self.q,
                &self.k,
                &self.v,
                &self.g,
                &self.beta,
                &self.cu_seqlens,
            )
            .unwrap();
            backward(
                &mut d_q,
                &mut d_k,
                &mut d_v,
                &mut d_g,
                &mut d_beta,
                &self.d_out,
                &self.q,
                &self.k,
                &self.v,
                &self.g,
                &self.beta,
                &self.cu_seqlens,
            )
            .unwrap();
            [out, d_q, d_k, d_v, d_g, d_beta]
        }

        fn define(&self) -> [Vec<f64>; 6] {
            let [t, g, k] = *self.q.shape() else { panic!() };
            let (h, v) = (self.v.shape()[1], self.v.shape()[2]);
            let mut all = [
                vec![0.0; t * h * v],
                vec![0.0; t * g * k],
                vec![0.0; t * g * k],
                vec![0.0; t * h * v],
                vec![0.0; t * h],
                vec![0.0; t * h],
            ];
            let [qs, ks, vs] = [&self.q, &self.k, &self.v].map(f64s);
            let [gs, betas, d_outs] = [&self.g, &self.beta, &self.d_out].map(f64s);
            for head in 0..h {
                let key_head = head * g / h;
                for ends in self.cu_seqlens.windows(2) {
                    let tokens: Vec<Token> = (ends[0] as usize..ends[1] as usize)
                        .map(|t| Token {
                            q: &qs[(t * g + key_head) * k..][..k],
                            k: &ks[(t * g + key_head) * k..][..k],
                            v: &vs[(t * h + head) * v..][..v],
                            g: gs[t * h + head],
                            beta: betas[t * h + head],
                            d_out: &d_outs[(t * h + head) * v..][..v],
                        })
                        .collect();
                    for (i, result) in recurrence(&tokens).into_iter().enumerate() {
                        let t = ends[0] as usize + i;
                        let places = [
                            (t * h + head) * v,
                            (t * g + key_head) * k,
                            (t * g + key_head) * k,
                            (t * h + head) * v,
                            t * h + head,
                            t * h + head,
                        ];
                        for ((all, place), values) in all.iter_mut().zip(places).zip(result) {
                            for (sum, value) in all[place..].iter_mut().zip(values) {
                                *sum += value;
                            }
                        }
                    }
                }
            }
            all
        }

        #[track_caller]
        fn check(&self) {
            let names = ["out", "d_q", "d_k", "d_v", "d_g", "d_beta"];
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

    fn normalised(mut x_tgk: Tensor) -> Tensor {
        let k = x_tgk.shape()[2];
        for row in x_tgk.f32s_mut().chunks_mut(k) {
            let norm = row.iter().map(|x| x * x).sum::<f32>().sqrt();
            row.iter_mut().for_each(|x| *x /= norm);
        }
        x_tgk
    }

    struct Token<'a> {
        q: &'a [f64],
        k: &'a [f64],
        v: &'a [f64],
        g: f64,
        beta: f64,
        d_out: &'a [f64],
    }

    /// The definition, token by token and back again: for each token out, d_q, d_k, d_v, d_g, d_beta.
    fn recurrence(tokens: &[Token]) -> Vec<[Vec<f64>; 6]> {
        let Some(first) = tokens.first() else {
            return Vec::new();
        };
        let (n_k, n_v) = (first.k.len(), first.v.len());
        // x·S and S·x for a state [K,V].
        let down = |s: &[f64], x: &[f64]| -> Vec<f64> {
            (0..n_v)
                .map(|j| (0..n_k).map(|i| x[i] * s[i * n_v + j]).sum())
                .collect()
        };
        let across = |s: &[f64], x: &[f64]| -> Vec<f64> {
            (0..n_k)
                .map(|i| (0..n_v).map(|j| x[j] * s[i * n_v + j]).sum())
                .collect()
        };
        let dot = |a: &[f64], b: &[f64]| -> f64 { a.iter().zip(b).map(|(a, b)| a * b).sum() };

        let mut state = vec![0.0; n_k * n_v];
        let mut saved = Vec::new();
        for token in tokens {
            let decayed: Vec<f64> = state.iter().map(|s| token.g.exp() * s).collect();
            let error: Vec<f64> = (down(&decayed, token.k).iter().zip(token.v))
                .map(|(predicted, v)| v - predicted)
                .collect();
            state = decayed.clone();
            for i in 0..n_k {
                for j in 0..n_v {
                    state[i * n_v + j] += token.k[i] * token.beta * error[j];
                }
            }
            saved.push((decayed, error, state.clone()));
        }

        let mut results = Vec::new();
        let mut d_state = vec![0.0; n_k * n_v];
        for (token, (decayed, error, state)) in tokens.iter().zip(&saved).rev() {
            let out = down(state, token.q);
            let d_q = across(state, token.d_out);
            for i in 0..n_k {
                for j in 0..n_v {
                    d_state[i * n_v + j] += token.q[i] * token.d_out[j];
                }
            }
            let d_delta = down(&d_state, token.k);
            let d_beta = dot(&d_delta, error);
            let d_v: Vec<f64> = d_delta.iter().map(|d| token.beta * d).collect();
            let delta: Vec<f64> = error.iter().map(|e| token.beta * e).collect();
            let (by_write, by_read) = (across(&d_state, &delta), across(decayed, &d_v));
            let d_k = (0..n_k).map(|i| by_write[i] - by_read[i]).collect();
            for i in 0..n_k {
                for j in 0..n_v {
                    d_state[i * n_v + j] -= token.k[i] * d_v[j];
                }
            }
            let d_g = dot(&d_state, decayed);
            d_state.iter_mut().for_each(|d| *d *= token.g.exp());
            results.push([out, d_q, d_k, d_v, vec![d_g], vec![d_beta]]);
        }
        results.reverse();
        results
    }

    #[test]
    fn definition_agrees_with_finite_differences() {
        // A loss Σ d_out · out in f64; each input moved by ± h.
        let case = Case::new(&[5, 4], [2, 1, 3, 2], [-1.0, 0.0]);
        let want = case.define();
        let loss = |case: &Case| -> f64 {
            let d_out = f64s(&case.d_out);
            case.define()[0].iter().zip(d_out).map(|(o, d)| o * d).sum()
        };
        let parts: [fn(&mut Case) -> &mut Tensor; 5] = [
            |c| &mut c.q,
            |c| &mut c.k,
            |c| &mut c.v,
            |c| &mut c.g,
            |c| &mut c.beta,
        ];
        for (part, want) in parts.iter().zip(&want[1..]) {
            for (i, want) in want.iter().enumerate() {
                let moved = |step: f32| {
                    let mut case = case.clone();
                    part(&mut case).f32s_mut()[i] += step;
                    (f64::from(part(&mut case).f32s()[i]), loss(&case))
                };
                let ((x1, l1), (x0, l0)) = (moved(1e-3), moved(-1e-3));
                let slope = (l1 - l0) / (x1 - x0);
                assert!((slope - want).abs() < 1e-5, "{slope} for {want}");
            }
        }
    }

    #[test]
    fn chunks_agree_with_the_recurrence_for_every_head_ratio_and_dim() {
        for dims in [
            [2, 2, 32, 32],
            [4, 2, 64, 64],
            [3, 1, 32, 64],
            [2, 1, 128, 128],
            [1, 1, 17, 5],
        ] {
            Case::new(&LENGTHS, dims, [-0.5, 0.0]).check();
        }
    }

    #[test]
    fn chunks_agree_with_the_recurrence_for_bf16_storage() {
        for dims in [[2, 1, 32, 32], [2, 2, 128, 128]] {
            let case = Case::new(&LENGTHS, dims, [-0.5, 0.0]);
            case.stored_as(DType::Bf16).check();
        }
    }

    #[test]
    fn chunks_agree_with_the_recurrence_for_slow_and_strong_decay() {
        Case::new(&LENGTHS, [2, 1, 32, 32], [-1e-4, -1e-5]).check();
        Case::new(&LENGTHS, [2, 1, 32, 32], [-20.0, 0.0]).check();
        Case::new(&LENGTHS, [2, 1, 32, 32], [-20.0, -15.0]).check();
        Case::new(&LENGTHS, [1, 1, 32, 32], [-1e4, -1e3]).check();
    }

    #[test]
    fn gradient_of_a_strong_gate_among_slow_ones_keeps_its_digits() {
        // Its true size is exp(-20): what cancels in a reverse cumulative sum would bury it.
        let mut case = Case::new(&[200, 70], [2, 1, 32, 32], [-1e-2, 0.0]);
        let strong: Vec<usize> = (0..case.g.numel()).filter(|i| i % 13 == 7).collect();
        strong.iter().for_each(|i| case.g.f32s_mut()[*i] = -20.0);
        let pick = |all: &[f64]| -> Vec<f64> { strong.iter().map(|i| all[*i]).collect() };
        let (got, want) = (pick(&f64s(&case.run()[4])), pick(&case.define()[4]));
        assert!(want.iter().all(|x| x.abs() < 1e-6));
        // An exponent near -20 is rounded by 1e-6 of the result.
        let error = relative_error(&got, &want);
        assert!(error < 1e-5, "{error:e}");
    }

    #[test]
    fn zero_rows_give_zero_and_finite_gradients() {
        let mut case = Case::new(&[70, 3], [2, 1, 32, 32], [-0.5, 0.0]);
        for row in [0, 1, 5, 63, 64, 70] {
            case.q.f32s_mut()[row * 32..][..32].fill(0.0);
            case.k.f32s_mut()[row * 32..][..32].fill(0.0);
            case.d_out.f32s_mut()[row * 64..][..64].fill(0.0);
        }
        case.check();
        assert!(
            case.run()[0].f32s()[5 * 64..][..64]
                .iter()
                .all(|x| *x == 0.0)
        );
        case.v.fill_zero().unwrap();
        case.beta.fill_zero().unwrap();
        assert!(
            case.run()
                .iter()
                .all(|x| x.f32s().iter().all(|x| x.is_finite()))
        );
    }

    #[test]
    fn packed_equals_separate_bit_for_bit() {
        let case = Case::new(&LENGTHS, [4, 2, 32, 32], [-1e-3, 0.0]);
        let packed = case.run();
        for ends in case.cu_seqlens.windows(2).filter(|ends| ends[0] < ends[1]) {
            let range = ends[0] as usize..ends[1] as usize;
            let want = packed.each_ref().map(|x| rows(x, range.clone()));
            assert!(case.piece(range).run() == want);
        }
    }

    #[test]
    fn changing_one_document_changes_no_bit_of_the_next() {
        let case = Case::new(&[70, 90], [2, 1, 32, 32], [-1e-4, -1e-5]);
        let other = Case::new(&[70], [2, 1, 32, 32], [-3e-4, -1e-4]);
        let mut changed = case.clone();
        for (to, from) in [
            (&mut changed.q, &other.k),
            (&mut changed.k, &other.q),
            (&mut changed.v, &other.d_out),
            (&mut changed.g, &other.g),
            (&mut changed.beta, &other.beta),
            (&mut changed.d_out, &other.v),
        ] {
            to.f32s_mut()[..from.numel()].copy_from_slice(from.f32s());
        }
        let (before, after) = (case.run(), changed.run());
        assert!(bits_from_row(&before, 0) != bits_from_row(&after, 0));
        assert!(bits_from_row(&before, 70) == bits_from_row(&after, 70));
    }

    #[test]
    fn the_number_of_threads_changes_no_bit() {
        let case = Case::new(&LENGTHS, [6, 2, 32, 32], [-0.5, 0.0]);
        let pool = |n| {
            rayon::ThreadPoolBuilder::new()
                .num_threads(n)
                .build()
                .unwrap()
        };
        assert!(pool(1).install(|| case.run()) == pool(5).install(|| case.run()));
    }

    #[test]
    fn pieces_and_single_steps_agree_with_the_whole() {
        let [h, g, k, v] = [4, 2, 32, 64];
        let t = 300;
        let case = Case::new(&[t], [h, g, k, v], [-0.1, 0.0]);
        let whole = &case.run()[0];
        let mut piecewise = Vec::new();
        let mut state = Tensor::zeros(&[h, k, v], DType::F32);
        let mut start = 0;
        for length in [1, 64, 100, 7, 63, 65] {
            let piece = case.piece(start..start + length);
            let mut out = poison_like(&piece.v, DType::F32);
            forward_with_state(
                &mut out,
                &mut state,
                &piece.q,
                &piece.k,
                &piece.v,
                &piece.g,
                &piece.beta,
            )
            .unwrap();
            piecewise.extend(f64s(&out));
            start += length;
        }
        assert_eq!(start, t);
        assert_close("pieces", whole, &piecewise, 1e-5);

        let mut stepwise = Vec::new();
        let mut step_state = Tensor::zeros(&[h, k, v], DType::F32);
        for t in 0..t {
            let token = case.piece(t..t + 1);
            let mut out = poison_like(&token.v, DType::F32);
            gated_delta_step::forward(
                &mut out,
                &mut [&mut step_state],
                &token.q,
                &token.k,
                &token.v,
                &token.g,
                &token.beta,
            )
            .unwrap();
            stepwise.extend(f64s(&out));
        }
        assert_close("steps", whole, &stepwise, 1e-5);
        assert_close("states", &state, &f64s(&step_state), 1e-5);
    }

    #[test]
    fn no_tokens_are_allowed() {
        let case = Case::new(&[0, 0], [2, 1, 32, 32], [-0.1, 0.0]);
        assert!(case.run().iter().all(|x| x.numel() == 0));
    }

    #[test]
    fn wrong_shapes_are_refused() {
        let case = Case::new(&[4], [3, 2, 8, 8], [-0.1, 0.0]);
        let mut out = poison_like(&case.v, DType::F32);
        let refused = forward(
            &mut out,
            &case.q,
            &case.k,
            &case.v,
            &case.g,
            &case.beta,
            &case.cu_seqlens,
        );
        assert!(matches!(
            refused,
            Err(crate::Error::Shape { arg: "v_thv", .. })
        ));

        let case = Case::new(&[4], [2, 2, 8, 8], [-0.1, 0.0]);
        let mut out = poison_like(&case.v, DType::F32);
        let refused = forward(
            &mut out,
            &case.q,
            &case.k,
            &case.v,
            &case.g,
            &case.beta,
            &[0, 3],
        );
        assert!(matches!(
            refused,
            Err(crate::Error::Shape {
                arg: "cu_seqlens",
                ..
            })
        ));
        let g = case.g.to_dtype(DType::Bf16);
        let refused = forward(&mut out, &case.q, &case.k, &case.v, &g, &case.beta, &[0, 4]);
        assert!(matches!(
            refused,
            Err(crate::Error::DType { arg: "g_th", .. })
        ));
    }
}
