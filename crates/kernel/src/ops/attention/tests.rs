//! Tiles against the definition in f64, borders of documents, the cache, and the plans of the GPU's backward pass.

use super::*;
use crate::DType;
use crate::ops::testing::{
    BF16_REL, Random, assert_close, bits_from_row, dot, f64s, gradient, offsets, poison_like, pool,
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

    fn inputs(&self) -> Inputs<'_> {
        Inputs {
            q_thn: &self.q,
            k_tgn: &self.k,
            v_tgn: &self.v,
            cu_seqlens: &self.cu_seqlens,
            scale: self.scale,
        }
    }

    /// out, lse, d_q, d_k, d_v.
    fn run(&self) -> [Tensor; 5] {
        let dtype = self.q.dtype();
        let Case { q, k, v, .. } = self;
        let mut out = poison_like(q, dtype);
        let mut lse = Tensor::poison(&q.shape()[..2], DType::F32);
        forward(&mut out, &mut lse, &self.inputs()).unwrap();
        let [mut d_q, mut d_k, mut d_v] = [q, k, v].map(|x| poison_like(x, dtype));
        let gradients = Gradients {
            d_q_thn: &mut d_q,
            d_k_tgn: &mut d_k,
            d_v_tgn: &mut d_v,
        };
        let saved = Saved {
            d_out_thn: &self.d_out,
            out_thn: &out,
            lse_th: &lse,
        };
        backward(gradients, &saved, &self.inputs()).unwrap();
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
                    let before = dims.ratio() * (keys64 * n_tiles - cut * cut.saturating_sub(1));
                    for tile in
                        (position / 32..(position + n_rows).div_ceil(32)).filter(|x| *x >= begin)
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
        let gpu = DeviceProperties::with_memory(memory_bytes);
        for longest in [1, 31, 65, 700, 4100, 6000] {
            let said = cuda::scratch_bytes(gpu, dims, longest);
            for spread in [1, longest, longest / 2 + 1, longest / 30 + 1] {
                let mut lengths = Vec::new();
                while lengths.iter().sum::<usize>() < dims.t {
                    let left = dims.t - lengths.iter().sum::<usize>();
                    lengths.push((longest - random(spread)).min(left));
                }
                let taken = cuda::planned_bytes(gpu, dims, &documents(&offsets(&lengths)));
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
    let refused = forward(&mut out, &mut lse, &case.inputs());
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
