//! The multiplicative repetition penalty over prompt and reply, as transformers and vLLM define it.

use super::{Candidate, DrawContext};

/// logit = logit > 0 ? logit / penalty : logit * penalty, once for every id among the last `window` ids of prompt and reply
/// (`None` = all of them); a penalty of 1 changes nothing. `candidates` ordered by id; changed in place.
/// Source: arXiv 1909.05858; the window is llama.cpp's `repeat_last_n`.
pub fn apply(
    candidates: &mut [Candidate],
    context: &DrawContext<'_>,
    penalty: f32,
    window: Option<usize>,
) {
    if penalty == 1.0 {
        return;
    }
    let window = window.unwrap_or(usize::MAX);
    let generated = last(context.generated, window);
    let prompt = last(context.prompt, window - generated.len());
    let mut ids = [prompt, generated].concat();
    ids.sort_unstable();
    ids.dedup();
    for id in ids {
        if let Ok(index) = candidates.binary_search_by_key(&id, |candidate| candidate.id) {
            let logit = &mut candidates[index].logit;
            *logit = if *logit > 0.0 {
                *logit / penalty
            } else {
                *logit * penalty
            };
        }
    }
}

fn last(ids: &[u32], n: usize) -> &[u32] {
    &ids[ids.len().saturating_sub(n)..]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sampling::Counts;

    fn check(penalty: f32, window: Option<usize>, expect: [f32; 4]) {
        let mut candidates: Vec<Candidate> = [4.0, -4.0, 4.0, 4.0]
            .into_iter()
            .enumerate()
            .map(|(id, logit)| Candidate {
                id: id as u32,
                logit,
            })
            .collect();
        let counts = Counts::new();
        let context = DrawContext {
            prompt: &[0, 1, 0, 99],
            generated: &[2],
            ..DrawContext::of_counts(&counts)
        };
        apply(&mut candidates, &context, penalty, window);
        let logits: Vec<f32> = candidates.iter().map(|c| c.logit).collect();
        assert_eq!(logits, expect);
    }

    #[test]
    fn ids_of_prompt_and_reply_are_penalised_once_by_sign() {
        check(2.0, None, [2.0, -8.0, 2.0, 4.0]);
        check(1.0, None, [4.0, -4.0, 4.0, 4.0]);
    }

    #[test]
    fn window_counts_back_from_the_last_id() {
        check(2.0, Some(0), [4.0, -4.0, 4.0, 4.0]);
        check(2.0, Some(1), [4.0, -4.0, 2.0, 4.0]);
        check(2.0, Some(3), [2.0, -4.0, 2.0, 4.0]);
        check(2.0, Some(4), [2.0, -8.0, 2.0, 4.0]);
    }
}
