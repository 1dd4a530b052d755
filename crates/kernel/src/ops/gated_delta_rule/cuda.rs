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
    // Passes hold equal numbers of whole key heads, as few as bring each to about SCRATCH bytes: at most one key head more.
    let per_head: usize = per_head.iter().map(|bytes| bytes + 256).sum();
    (per_head * dims.h).min(SCRATCH + per_head * dims.ratio())
}

/// Bytes of scratch that a pass aims at; a single key head may need more.
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
    if inputs.dims().t == 0 {
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
    if inputs.dims().t == 0 {
        Ok(())
    } else if bf16_kernels::take(inputs, &[d_q_tgk, d_k_tgk, d_v_thv, d_out_thv]) {
        bf16_kernels::backward(cuda, gradients, d_out_thv, inputs, cu_seqlens)
    } else {
        f32_kernels::backward(cuda, gradients, d_out_thv, inputs, cu_seqlens)
    }
}

mod f32_kernels {
    use super::heads_at_once;
    use super::{Args, Cuda, Dims, F32, Gradients, Heads, Inputs, Result, Tables, Tensor};
    use crate::Error;
    use crate::cuda::sources::GATED_DELTA_RULE;
    use crate::cuda::{Grid, Pieces};

    /// Tokens of a chunk.
    pub(super) const SPAN: usize = 32;
    /// Value columns of a block of a scan.
    const COLUMNS: usize = 16;
    /// Most key dims that a block holds.
    const MAX_K: usize = 256;

    /// Bytes of the kernels' shared structs and of [SPAN, K + 1].
    const PREPARE_BYTES: usize = (4 * SPAN + 2 * SPAN * (SPAN + 1)) * F32;
    const SCAN_BYTES: usize = (4 * SPAN + 2 * SPAN * (SPAN + 1) + 3 * SPAN * (COLUMNS + 1)) * F32;
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
        let Dims { t, .. } = inputs.dims();
        check_dims("gated_delta_rule::forward", inputs.dims())?;
        let tables = Tables::upload(cuda, cu_seqlens, SPAN)?;
        let per_head = [t * SPAN * F32; 2];
        for heads in heads_at_once(inputs.dims(), per_head.iter().sum()) {
            let [p, m] = Pieces::new(per_head.map(|bytes| bytes * heads.n)).take(cuda)?;
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
        let k = inputs.dims().k;
        check_dims("gated_delta_rule::backward", inputs.dims())?;
        let tables = Tables::upload(cuda, cu_seqlens, SPAN)?;
        let per_head = backward_bytes(inputs.dims(), tables.n_borders);
        for heads in heads_at_once(inputs.dims(), per_head.iter().sum()) {
            let [p, m, n, e, d_r, states, d_states] =
                Pieces::new(per_head.map(|bytes| bytes * heads.n)).take(cuda)?;
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
                    (tables.n_chunks * heads.n / inputs.dims().ratio()) as u32,
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
                shared_bytes: PREPARE_BYTES + 2 * row_bytes(self.inputs.dims().k),
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
            let Dims { k, v, .. } = self.inputs.dims();
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
            let Dims { h, g, k, v, .. } = self.inputs.dims();
            let args = args.u32(h).u32(g).u32(k);
            let args = if with_v { args.u32(v) } else { args };
            args.u32(self.heads.first).u32(self.heads.n)
        }
    }
}

mod bf16_kernels {
    use super::{Args, BF16, Cuda, DType, Dims, F32, Gradients, Heads, Inputs, Result};
    use super::{Tables, Tensor, heads_at_once};
    use crate::cuda::sources::GATED_DELTA_RULE_BF16;
    use crate::cuda::{Grid, Pieces};

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
        take_dims(inputs.dims())
            && [inputs.q_tgk, inputs.k_tgk, inputs.v_thv]
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
        let per_head = pair_bytes(inputs.dims().t);
        for heads in heads_at_once(inputs.dims(), per_head.iter().sum()) {
            let [p, m, decays] = Pieces::new(per_head.map(|bytes| bytes * heads.n)).take(cuda)?;
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
        let per_head = backward_bytes(inputs.dims(), tables.n_borders);
        for heads in heads_at_once(inputs.dims(), per_head.iter().sum()) {
            let [p, m, decays, e, states, d_states] =
                Pieces::new(per_head.map(|bytes| bytes * heads.n)).take(cuda)?;
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

        fn over_chunks(&self, kernel: &'static str, shared_bytes: usize, args: Args) -> Result<()> {
            let n_key_heads = self.heads.n / self.inputs.dims().ratio();
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
            let blocks =
                |n_tiles: usize| self.tables.n_documents * self.heads.n * DIM / (COLUMNS * n_tiles);
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
            let Dims { h, g, .. } = self.inputs.dims();
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
    use crate::cuda::Pieces;

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
                    let taken = Pieces::new(per_head.map(|bytes| bytes * heads.n)).bytes();
                    assert!(taken <= said, "{taken} of {said}, {t} tokens");
                }
            }
        }
    }
}
