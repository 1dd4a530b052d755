//! Presence and frequency penalties over generated tokens only, as OpenAI and vLLM define them.

use super::{Candidate, Counts};

/// logit -= presence + frequency * count, for every id with a count above 0. `candidates` ordered by id; changed in place.
pub fn apply(candidates: &mut [Candidate], counts: &Counts, presence: f32, frequency: f32) {
    if presence == 0.0 && frequency == 0.0 {
        return;
    }
    for (id, count) in counts.iter().filter(|(_, count)| **count > 0) {
        if let Ok(index) = candidates.binary_search_by_key(id, |candidate| candidate.id) {
            candidates[index].logit -= presence + frequency * *count as f32;
        }
    }
}
