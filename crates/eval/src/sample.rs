//! A row of a data set as evaluation sees it.

use corpus::split::Side;
use text::Example;

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
    pub encoded: Example,
    /// UTF-8 bytes of the text behind the predicted tokens; end tokens count none.
    pub bytes: usize,
    /// The row's text, for models that count characters and words.
    pub text: String,
}
