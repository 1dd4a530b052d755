//! Min-p: a floor relative to the best token, which widens where the model is unsure.

use super::Candidate;

/// Keeps candidates with p >= min_p * max p, that is logit >= max logit + ln(min_p); 0 = off.
pub fn keep(candidates: &mut Vec<Candidate>, min_p: f32) {
    if min_p <= 0.0 {
        return;
    }
    let best = candidates
        .iter()
        .fold(f32::NEG_INFINITY, |best, c| best.max(c.logit));
    let floor = best + min_p.ln();
    candidates.retain(|candidate| candidate.logit >= floor);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn floor_is_relative_to_the_best() {
        let mut candidates: Vec<Candidate> = [8.0f32, 4.0, 1.0]
            .iter()
            .enumerate()
            .map(|(id, p)| Candidate {
                id: id as u32,
                logit: p.ln(),
            })
            .collect();
        keep(&mut candidates, 0.25);
        let ids: Vec<u32> = candidates.iter().map(|c| c.id).collect();
        assert_eq!(ids, [0, 1]);
    }
}
