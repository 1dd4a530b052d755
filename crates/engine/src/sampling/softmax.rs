//! Probabilities of a candidate list.

use super::Candidate;

/// p_i = exp(logit_i - max) / sum_j exp(logit_j - max), in f64, in the order of `candidates`.
pub fn probabilities(candidates: &[Candidate]) -> Vec<f64> {
    let best = candidates
        .iter()
        .fold(f32::NEG_INFINITY, |best, c| best.max(c.logit));
    let mut probs: Vec<f64> = candidates
        .iter()
        .map(|c| f64::from(c.logit - best).exp())
        .collect();
    let sum: f64 = probs.iter().sum();
    for prob in &mut probs {
        *prob /= sum;
    }
    probs
}
