//! Token losses of samples under a model: documents packed end to end, never seeing each other.

use model::{Batch, Model, Saved};

use crate::{Result, Sample};

/// Sum of token losses (nats) and number of predicted tokens of one sample.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Score {
    /// Sum over the predicted tokens, in nats.
    pub nll: f64,
    /// How many they are.
    pub tokens: usize,
}

/// Scores every sample, in order. Samples share rows of at most `row_tokens` tokens; a sample longer than that runs alone, whole.
///
/// # Errors
/// Whatever the model's forward pass reports (a token id beyond the vocabulary, above all).
pub fn samples(
    model: &Model,
    samples: &[Sample],
    row_tokens: usize,
    mut progress: impl FnMut(usize),
) -> Result<Vec<Score>> {
    let mut scores = Vec::with_capacity(samples.len());
    let mut saved = Saved::forward_only(model.config());
    let mut start = 0;
    while start < samples.len() {
        // 1. take samples while they fit the row
        let mut tokens_t: Vec<u32> = Vec::new();
        let mut targets_t: Vec<i32> = Vec::new();
        let mut cu_seqlens = vec![0u32];
        let mut end = start;
        while end < samples.len() {
            let encoded = &samples[end].encoded;
            if end > start && tokens_t.len() + encoded.input_ids.len() > row_tokens {
                break;
            }
            tokens_t.extend(&encoded.input_ids);
            targets_t.extend(
                encoded
                    .labels
                    .iter()
                    .skip(1)
                    .map(|&label| if label >= 0 { label } else { -1 }),
            );
            targets_t.resize(tokens_t.len(), -1);
            cu_seqlens.push(tokens_t.len() as u32);
            end += 1;
        }
        // 2. one forward pass, then a sum per document
        let nll_t = model.nll(
            &mut saved,
            &Batch {
                tokens_t: &tokens_t,
                targets_t: &targets_t,
                cu_seqlens: &cu_seqlens,
            },
        )?;
        for bounds in cu_seqlens.windows(2) {
            let document = bounds[0] as usize..bounds[1] as usize;
            scores.push(Score {
                nll: nll_t[document.clone()].iter().map(|&x| f64::from(x)).sum(),
                tokens: targets_t[document]
                    .iter()
                    .filter(|&&target| target >= 0)
                    .count(),
            });
        }
        start = end;
        progress(end);
    }
    Ok(scores)
}
