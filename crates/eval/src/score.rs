//! Token losses of samples under a model: cut and packed as training cuts and packs, never seeing each other.

use model::{Batch, Model, Saved};
use text::Tokenizer;
use text::pack::{self, Strategy};

use crate::{Result, Sample};

/// Sum of token losses (nats) and number of predicted tokens of one sample.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Score {
    /// Sum over the predicted tokens.
    pub nll: f64,
    /// How many these are.
    pub tokens: usize,
}

/// Scores every sample, in order, in rows of at most `row_tokens` tokens; what is longer is cut as [`pack::split`] does, and its pieces'
/// losses are added. `progress` hears how many samples are done.
///
/// # Errors
/// A sample that no row has room for; whatever the model's forward pass reports (a token id beyond the vocabulary, above all).
pub fn samples(
    model: &Model,
    tokenizer: Option<&Tokenizer>,
    samples: &[Sample],
    row_tokens: usize,
    mut progress: impl FnMut(usize),
) -> Result<Vec<Score>> {
    let examples = samples.iter().map(|sample| &sample.encoded);
    let pieces = pack::pieces(tokenizer, examples, row_tokens)?;
    let mut scores = vec![Score::default(); samples.len()];
    let mut saved = Saved::forward_only(model.config());
    for row in pack::rows(&pieces, row_tokens, Strategy::Sequential)? {
        let nll_t = model.nll(
            &mut saved,
            &Batch {
                tokens_t: &row.tokens_t,
                targets_t: &row.targets_t,
                cu_seqlens: &row.cu_seqlens,
            },
        )?;
        for (bounds, &example_idx) in row.cu_seqlens.windows(2).zip(&row.examples) {
            let piece = bounds[0] as usize..bounds[1] as usize;
            let score = &mut scores[example_idx];
            score.nll += nll_t[piece.clone()]
                .iter()
                .map(|&x| f64::from(x))
                .sum::<f64>();
            let targets = row.targets_t[piece].iter();
            score.tokens += targets.filter(|&&target| target >= 0).count();
        }
        progress(row.examples.last().map_or(0, |last| last + 1));
    }
    progress(samples.len());
    Ok(scores)
}
