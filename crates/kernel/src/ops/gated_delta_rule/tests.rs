//! Chunks against the recurrence in f64, borders of documents, pieces and single steps.

use super::*;
use crate::DType;
use crate::ops::gated_delta_step;
use crate::ops::testing::{
    BF16_REL, Random, assert_close, bits_from_row, f64s, offsets, poison_like, pool,
    relative_error, rows,
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

    fn inputs(&self) -> Inputs<'_> {
        Inputs {
            q_tgk: &self.q,
            k_tgk: &self.k,
            v_thv: &self.v,
            g_th: &self.g,
            beta_th: &self.beta,
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
        forward(&mut out, &self.inputs(), &self.cu_seqlens).unwrap();
        let gradients = Gradients {
            d_q_tgk: &mut d_q,
            d_k_tgk: &mut d_k,
            d_v_thv: &mut d_v,
            d_g_th: &mut d_g,
            d_beta_th: &mut d_beta,
        };
        backward(gradients, &self.d_out, &self.inputs(), &self.cu_seqlens).unwrap();
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
        forward_with_state(&mut out, &mut state, &piece.inputs()).unwrap();
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
        gated_delta_step::forward(&mut out, &mut [&mut step_state], &token.inputs()).unwrap();
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
    let refused = forward(&mut out, &case.inputs(), &case.cu_seqlens);
    assert!(matches!(
        refused,
        Err(crate::Error::Shape { arg: "v_thv", .. })
    ));

    let case = Case::new(&[4], [2, 2, 8, 8], [-0.1, 0.0]);
    let mut out = poison_like(&case.v, DType::F32);
    let refused = forward(&mut out, &case.inputs(), &[0, 3]);
    assert!(matches!(
        refused,
        Err(crate::Error::Shape {
            arg: "cu_seqlens",
            ..
        })
    ));
    let g = case.g.to_dtype(DType::Bf16);
    let inputs = Inputs {
        g_th: &g,
        ..case.inputs()
    };
    let refused = forward(&mut out, &inputs, &[0, 4]);
    assert!(matches!(
        refused,
        Err(crate::Error::DType { arg: "g_th", .. })
    ));
}
