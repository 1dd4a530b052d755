//! One file a metric; each is a pure function.

pub mod char_ngram;
pub mod difference;
pub mod known_words;
pub mod loss_gap;
pub mod unigram;
