//! Temperature: below 1 sharpens the distribution, above 1 flattens it.

use super::Candidate;

/// logit /= temperature, in place; `temperature` must be above 0 (greedy is decided by the caller).
pub fn apply(candidates: &mut [Candidate], temperature: f32) {
    debug_assert!(temperature > 0.0, "greedy never comes here");
    for candidate in candidates {
        candidate.logit /= temperature;
    }
}
