//! Log-probabilities as the model gives them: before bans, penalties and temperature.

/// ln p of `id` and of the `n_top` likeliest ids (best first, equal ones by id), natural log.
/// ln p_i = logit_i - max - ln sum_j exp(logit_j - max); the sum in f64.
/// Shapes: logits [C]; `id` must be below C.
pub fn raw(logits: &[f32], id: u32, n_top: usize) -> (f32, Vec<(u32, f32)>) {
    let best = logits
        .iter()
        .fold(f32::NEG_INFINITY, |best, x| best.max(*x));
    let sum: f64 = logits.iter().map(|x| f64::from((x - best).exp())).sum();
    let log_sum = f64::from(best) + sum.ln();
    let log_prob = |logit: f32| (f64::from(logit) - log_sum) as f32;

    let n_top = n_top.min(logits.len());
    let mut top: Vec<(u32, f32)> = Vec::new();
    if n_top > 0 {
        let mut ids: Vec<u32> = (0..logits.len() as u32).collect();
        let by_rank = |a: &u32, b: &u32| {
            logits[*b as usize]
                .total_cmp(&logits[*a as usize])
                .then(a.cmp(b))
        };
        if n_top < ids.len() {
            ids.select_nth_unstable_by(n_top - 1, by_rank);
            ids.truncate(n_top);
        }
        ids.sort_unstable_by(by_rank);
        top = ids
            .into_iter()
            .map(|id| (id, log_prob(logits[id as usize])))
            .collect();
    }
    (log_prob(logits[id as usize]), top)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn raw_matches_the_plain_definition() {
        let logits = [0.5f32, -1.0, 2.0, 2.0];
        let sum: f64 = logits.iter().map(|x| f64::from(*x).exp()).sum();
        let (logprob, top) = raw(&logits, 0, 3);
        // f32 results of an f64 sum: one rounding.
        assert!((f64::from(logprob) - (0.5 - sum.ln())).abs() < 1e-6);
        let ids: Vec<u32> = top.iter().map(|(id, _)| *id).collect();
        assert_eq!(ids, [2, 3, 0]);
        assert_eq!(top[2].1, logprob);
    }
}
