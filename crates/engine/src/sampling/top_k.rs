//! Top-k: only the k best tokens stay.

use super::Candidate;

/// Keeps the `k` largest logits and every tie with the k-th; 0 = off. Order by id is kept.
pub fn keep(candidates: &mut Vec<Candidate>, k: u32) {
    let k = k as usize;
    if k == 0 || k >= candidates.len() {
        return;
    }
    let mut logits: Vec<f32> = candidates.iter().map(|c| c.logit).collect();
    let (_, floor, _) = logits.select_nth_unstable_by(k - 1, |a, b| b.total_cmp(a));
    let floor = *floor;
    candidates.retain(|candidate| candidate.logit >= floor);
}
