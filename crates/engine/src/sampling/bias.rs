//! What is added to the logits of single ids, as OpenAI's `logit_bias` has it.

use super::Candidate;

/// logit += bias, for every pair (id, bias) whose id is still a candidate. `candidates` ordered by id; changed in place.
pub fn apply(candidates: &mut [Candidate], biases: &[(u32, f32)]) {
    for (id, bias) in biases {
        if let Ok(index) = candidates.binary_search_by_key(id, |candidate| candidate.id) {
            candidates[index].logit += bias;
        }
    }
}
