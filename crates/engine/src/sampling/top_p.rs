//! Top-p (nucleus): the unlikely tail goes, as long as what goes holds at most 1 - p of the probability.

use super::{Candidate, softmax};

/// Sorts ascending (equal logits: lower id first) and drops from the bottom while the running sum of probabilities is at most
/// 1 - top_p; the best token always stays; 1 = off. Order by id is kept.
/// Source: vLLM's rule; the order of ties is the convention of the sampler cases.
pub fn keep(candidates: &mut Vec<Candidate>, top_p: f32) {
    if top_p >= 1.0 || candidates.len() < 2 {
        return;
    }
    let probs = softmax::probabilities(candidates);
    let budget = 1.0 - f64::from(top_p);

    // Tokens below an even share of the budget all go, whatever their order: no need to sort a vocabulary of 248 thousand.
    let share = budget / candidates.len() as f64;
    let mut dropped = 0.0;
    let mut rest: Vec<usize> = Vec::new();
    let mut stays = vec![false; candidates.len()];
    for (index, prob) in probs.iter().enumerate() {
        if *prob < share {
            dropped += prob;
        } else {
            rest.push(index);
        }
    }

    rest.sort_unstable_by(|a, b| {
        candidates[*a]
            .logit
            .total_cmp(&candidates[*b].logit)
            .then(a.cmp(b))
    });
    for (rank, index) in rest.iter().enumerate() {
        dropped += probs[*index];
        let is_best = rank + 1 == rest.len();
        stays[*index] = is_best || dropped > budget;
    }
    let mut stays = stays.into_iter();
    candidates.retain(|_| stays.next().unwrap_or(false));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_logits_lose_their_lower_ids_first() {
        let mut candidates: Vec<Candidate> =
            (0..4).map(|id| Candidate { id, logit: 0.0 }).collect();
        keep(&mut candidates, 0.6);
        let ids: Vec<u32> = candidates.iter().map(|c| c.id).collect();
        assert_eq!(ids, [1, 2, 3]);
    }

    #[test]
    fn tiny_top_p_keeps_the_best() {
        let mut candidates: Vec<Candidate> =
            (0..4).map(|id| Candidate { id, logit: 0.0 }).collect();
        keep(&mut candidates, 1e-6);
        let ids: Vec<u32> = candidates.iter().map(|c| c.id).collect();
        assert_eq!(ids, [3]);
    }
}
