//! A row of a data set as evaluation sees it.

use text::labels::Encoded;

/// On which side of the split a row's scene stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Side {
    /// Trained on.
    Train,
    /// Held out in all languages.
    Val,
    /// Held out with its whole mission and what retells it.
    ValStrict,
    /// Held out in this language, trained in the others.
    ProbeX,
}

/// One row: what the model is asked to predict, and where it comes from.
#[derive(Debug, Clone)]
pub struct Sample {
    /// Language-free scene id: the unit of independence.
    pub scene: String,
    /// Its code.
    pub language: String,
    /// Of the split, in this language.
    pub side: Side,
    /// Ids, and which of them are predicted.
    pub encoded: Encoded,
    /// UTF-8 bytes of the text behind the predicted tokens; end tokens count none.
    pub bytes: usize,
    /// The row's text, for models that count characters and words.
    pub text: String,
}

impl Sample {
    /// Predicted positions: labels from the second position on that are not masked.
    pub fn targets(&self) -> usize {
        self.encoded
            .labels
            .iter()
            .skip(1)
            .filter(|&&label| label >= 0)
            .count()
    }
}
