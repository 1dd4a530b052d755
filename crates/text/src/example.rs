//! A training example: ids, which of them carry loss, and where it may be cut.

/// Label of a position without loss.
pub const IGNORE: i32 = -100;

/// One document or conversation as training sees it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Example {
    /// [T]
    pub input_ids: Vec<u32>,
    /// [T] `input_ids[t]` where that id is to be predicted (from the ids before it) and [`IGNORE`] elsewhere; position 0 is always ignored.
    pub labels: Vec<i32>,
    /// The rounds of a conversation, in order, which it is cut between; a document has none.
    pub rounds: Vec<Round>,
    /// What is known of it beside its ids; a part of an example that was cut has lost it.
    pub origin: Origin,
}

/// Where an example comes from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Origin {
    /// Language code, where it is known.
    pub language: Option<String>,
    /// UTF-8 bytes of the text behind the targets, for bits per byte; 0 where they are not known, as of rows that came as ids.
    pub bytes: usize,
    /// Place of its source among those that are trained on.
    pub source_idx: u32,
}

/// A question and its answer, which go up to the next round or the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Round {
    /// First token of the question.
    pub start: usize,
    /// First token of what is said, behind the answer's think block.
    pub said: usize,
}

impl Example {
    /// A document, or ids that nobody knows the rounds of.
    pub fn document(input_ids: Vec<u32>, labels: Vec<i32>) -> Self {
        Example {
            input_ids,
            labels,
            rounds: Vec::new(),
            origin: Origin::default(),
        }
    }

    /// Number of ids that carry loss.
    pub fn n_trained(&self) -> usize {
        self.labels.iter().filter(|&&l| l != IGNORE).count()
    }

    /// The ids that carry loss, in order.
    pub fn trained_ids(&self) -> impl Iterator<Item = u32> {
        let pairs = self.input_ids.iter().zip(&self.labels);
        pairs.filter(|&(_, &l)| l != IGNORE).map(|(&id, _)| id)
    }

    /// Targets of a model that sees it: labels of all positions but the first, which nothing comes before.
    pub fn n_targets(&self) -> u64 {
        let labels = self.labels.iter().skip(1);
        labels.filter(|&&label| label != IGNORE).count() as u64
    }

    /// Tokens of each round with everything that stands before the first.
    pub(crate) fn round_tokens(&self) -> impl Iterator<Item = usize> {
        let starts = self.rounds.iter().map(|round| round.start);
        let ends = starts.clone().skip(1).chain([self.input_ids.len()]);
        let system = self.rounds.first().map_or(0, |first| first.start);
        starts
            .zip(ends)
            .map(move |(start, end)| system + end - start)
    }

    /// Rounds that no row of `row_tokens` holds whole.
    pub fn n_rounds_longer_than(&self, row_tokens: usize) -> usize {
        self.round_tokens().filter(|&n| n > row_tokens).count()
    }

    /// Takes tokens of another example, with their labels or without loss.
    pub(crate) fn append(
        &mut self,
        other: &Example,
        range: std::ops::Range<usize>,
        with_loss: bool,
    ) {
        self.input_ids.extend(&other.input_ids[range.clone()]);
        let labels = other.labels[range].iter();
        self.labels
            .extend(labels.map(|&label| if with_loss { label } else { IGNORE }));
    }
}
