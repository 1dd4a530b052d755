//! Draws from the likeliest ids of a row, where they tell as much as the whole row: the same token, to the bit.

use super::{Candidate, DrawContext, GREEDY_BELOW, Sampling};
use super::{bans, min_p, penalty, pick, repetition, softmax, temperature, top_k, top_p};
use crate::error::Result;

/// The likeliest ids of a row and what the rest of it comes to.
#[derive(Debug, Clone, PartialEq)]
pub struct Shortlist {
    /// Every id whose logit is `floor` or more, ascending.
    pub candidates: Vec<Candidate>,
    /// All other logits are below.
    pub floor: f32,
    /// The largest logit.
    pub largest: f32,
    /// sum exp(logit - largest) over the whole row.
    pub mass: f32,
}

/// Draws as [`super::draw`] would from the whole row; None where this list does not tell: something may raise an id that is not on it,
/// too many of those on it are barred, or the filters let through more than it has.
pub fn draw(
    list: &Shortlist,
    context: &DrawContext<'_>,
    sampling: &Sampling,
    seed: u64,
    position: u64,
) -> Option<Result<u32>> {
    if may_raise(sampling) {
        return None;
    }
    // 1. candidates, and what lowers them
    let mut candidates = list.candidates.clone();
    if let Some(limit) = sampling.vocab_limit {
        candidates.retain(|candidate| candidate.id < limit);
    }
    bans::remove_all(&mut candidates, context, sampling);
    repetition::apply(
        &mut candidates,
        context,
        sampling.repetition_penalty,
        sampling.repetition_window,
    );
    penalty::apply(
        &mut candidates,
        context.counts,
        sampling.presence_penalty,
        sampling.frequency_penalty,
    );

    // 2. greedy: all others were below the floor before anything lowered them
    let best = super::greedy(&candidates)?;
    if sampling.temperature < GREEDY_BELOW {
        return (best.logit >= list.floor).then_some(Ok(best.id));
    }

    // 3. filters: the list is whole as soon as one of them asks for more than others can have
    temperature::apply(&mut candidates, sampling.temperature);
    let floor = list.floor / sampling.temperature;
    let lowest = |candidates: &[Candidate]| {
        let logits = candidates.iter().map(|candidate| candidate.logit);
        logits.fold(f32::INFINITY, f32::min)
    };
    min_p::keep(&mut candidates, sampling.min_p);
    let best = best.logit / sampling.temperature;
    let mut is_whole = sampling.min_p > 0.0 && best + sampling.min_p.ln() > floor;
    let k = sampling.top_k as usize;
    let has_k = k > 0 && candidates.len() >= k;
    top_k::keep(&mut candidates, sampling.top_k);
    is_whole |= has_k && lowest(&candidates) > floor;
    if !is_whole {
        return None;
    }
    top_p::keep(&mut candidates, sampling.top_p);

    // 4. draw
    let probs = softmax::probabilities(&candidates);
    Some(pick(&candidates, &probs, seed, position))
}

/// Whether an id that is not on the list could come above one that is.
fn may_raise(sampling: &Sampling) -> bool {
    !sampling.bias.is_empty()
        || !sampling.allowed.is_empty()
        || sampling.presence_penalty < 0.0
        || sampling.frequency_penalty < 0.0
        || sampling.repetition_penalty < 1.0
}

/// As [`super::logprobs::raw`]; None for an id that is not on the list, or more alternatives than it has.
pub fn logprobs(list: &Shortlist, id: u32, n_top: usize) -> Option<(f32, Vec<(u32, f32)>)> {
    let of_id = list.candidates.binary_search_by_key(&id, |c| c.id).ok()?;
    if list.candidates.len() < n_top {
        return None;
    }
    let log_sum = f64::from(list.largest) + f64::from(list.mass).ln();
    let log_prob = |candidate: &Candidate| (f64::from(candidate.logit) - log_sum) as f32;
    let mut ranked: Vec<&Candidate> = list.candidates.iter().collect();
    ranked.sort_by(|a, b| b.logit.total_cmp(&a.logit).then(a.id.cmp(&b.id)));
    let top = ranked.into_iter().take(n_top);
    let top = top.map(|candidate| (candidate.id, log_prob(candidate)));
    Some((log_prob(&list.candidates[of_id]), top.collect()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sampling::{self, Counts, rng};

    const VOCAB: u32 = 500;

    fn row(seed: u64) -> Vec<f32> {
        (0..u64::from(VOCAB))
            .map(|id| (12.0 * rng::uniform(seed, id)) as f32)
            .collect()
    }

    /// The `n` likeliest of a row.
    fn shortlist(logits: &[f32], n: usize) -> Shortlist {
        let mut sorted = logits.to_vec();
        sorted.sort_by(|a, b| b.total_cmp(a));
        let floor = sorted[n - 1];
        let candidates = (0..VOCAB)
            .zip(logits)
            .filter(|(_, logit)| **logit >= floor)
            .map(|(id, logit)| Candidate { id, logit: *logit })
            .collect();
        Shortlist {
            candidates,
            floor,
            largest: sorted[0],
            mass: logits.iter().map(|x| (x - sorted[0]).exp()).sum(),
        }
    }

    /// Draws from both for many rows and positions; how many of them the list told.
    fn compare(sampling: &Sampling) -> usize {
        let counts: Counts = (0..VOCAB).step_by(7).map(|id| (id, 2)).collect();
        let generated: Vec<u32> = counts.keys().copied().collect();
        let mut n_told = 0;
        for seed in 0..40 {
            let logits = row(seed);
            let context = DrawContext {
                prompt: &[3, 4, 5],
                generated: &generated,
                counts: &counts,
                barred: &[1, 2],
            };
            let list = shortlist(&logits, 64);
            let want = sampling::draw(&logits, &context, sampling, 9, seed);
            if let Some(got) = draw(&list, &context, sampling, 9, seed) {
                n_told += 1;
                assert_eq!(got, want, "{sampling:?}");
            }
        }
        n_told
    }

    #[test]
    fn what_the_list_tells_is_what_the_whole_row_gives() {
        let penalised = Sampling {
            presence_penalty: 1.5,
            frequency_penalty: 0.1,
            repetition_penalty: 1.1,
            banned: vec![9, 10],
            vocab_limit: Some(480),
            ..Sampling::default()
        };
        for temperature in [0.0, 0.7, 1.3] {
            let with = |top_k, top_p, min_p| Sampling {
                temperature,
                top_k,
                top_p,
                min_p,
                ..penalised.clone()
            };
            assert_eq!(compare(&with(20, 0.8, 0.0)), 40);
            assert_eq!(compare(&with(0, 0.9, 0.5)), 40);
            assert_eq!(compare(&with(20, 1.0, 0.05)), 40);
        }
    }

    #[test]
    fn what_may_lie_beyond_the_list_is_not_told() {
        let plain = Sampling::default();
        assert_eq!(compare(&plain), 0);
        let nucleus = Sampling {
            top_p: 0.9,
            ..plain.clone()
        };
        assert_eq!(compare(&nucleus), 0);
        let wide = Sampling {
            top_k: 70,
            ..plain.clone()
        };
        assert_eq!(compare(&wide), 0);
        let biased = Sampling {
            top_k: 20,
            bias: vec![(400, 50.0)],
            ..plain
        };
        assert_eq!(compare(&biased), 0);
    }

    #[test]
    fn penalties_that_take_every_id_of_the_list_below_the_rest_are_seen() {
        let logits = row(3);
        let list = shortlist(&logits, 64);
        let counts: Counts = list.candidates.iter().map(|c| (c.id, 1)).collect();
        let context = DrawContext::of_counts(&counts);
        let heavy = Sampling {
            temperature: 0.0,
            presence_penalty: 50.0,
            ..Sampling::default()
        };
        assert_eq!(draw(&list, &context, &heavy, 9, 0), None);
    }

    #[test]
    fn logprobs_agree_with_the_whole_row() {
        let logits = row(5);
        let list = shortlist(&logits, 64);
        let id = list.candidates[7].id;
        let (logprob, top) = logprobs(&list, id, 20).unwrap();
        let (want, want_top) = sampling::logprobs::raw(&logits, id, 20);
        assert!((logprob - want).abs() < 1e-5);
        for ((id, got), (want_id, want)) in top.iter().zip(&want_top) {
            assert_eq!(id, want_id);
            assert!((got - want).abs() < 1e-5);
        }
        assert_eq!(logprobs(&list, id, 65), None);
    }
}
