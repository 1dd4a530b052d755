//! What the scheduler needs of a model. A trait, because the scheduler's tests drive it with a toy that can fail on demand.

use std::panic::{AssertUnwindSafe, catch_unwind};

use kernel::Tensor;
use kernel::ops::top_candidates::Candidates;
use model::{Decoder, Model, SequenceState};

use crate::error::{Error, Result};
use crate::sampling::Candidate;
use crate::sampling::shortlist::Shortlist;

/// What a step says of one sequence's next token.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Logits {
    /// Of every id [C].
    All(Vec<f32>),
    /// Of the likeliest; [`Runner::logits_of`] has the rest until the next step.
    Short(Shortlist),
}

// Legend: T tokens of one sequence, B sequences of a step, C vocabulary.
pub(crate) trait Runner: Send + 'static {
    /// What a sequence has seen.
    type State: Send;

    fn vocab_size(&self) -> usize;
    fn new_state(&self) -> Result<Self::State>;
    /// A copy that goes on by itself.
    fn snapshot(&self, state: &Self::State) -> Result<Self::State>;
    fn state_bytes(&self, state: &Self::State) -> usize;
    /// Appends `tokens_t`; logits of the last position [C] f32.
    fn prefill(&self, state: &mut Self::State, tokens_t: &[u32]) -> Result<Tensor>;
    /// As `prefill`, with the logits of every new position [T, C] f32.
    fn prefill_all(&self, state: &mut Self::State, tokens_t: &[u32]) -> Result<Tensor>;
    /// Appends one token to each sequence; what follows each, B of them.
    fn step(&mut self, states: &mut [&mut Self::State], tokens_b: &[u32]) -> Result<Vec<Logits>>;
    /// All logits of a row of the last step [C].
    fn logits_of(&self, row: usize) -> Result<Vec<f32>>;
}

/// A model, and what takes its sequences on where it is on a GPU.
pub(crate) struct ModelRunner {
    model: Model,
    decoder: Option<Decoder>,
}

impl ModelRunner {
    /// For up to `max_sequences` at once.
    ///
    /// # Errors
    /// [`Error::Model`] if the GPU has no room for a step.
    pub fn new(model: Model, max_sequences: usize) -> Result<Self> {
        let decoder = match Decoder::supports(&model) {
            true => Some(Decoder::new(&model, max_sequences).map_err(failed)?),
            false => None,
        };
        Ok(ModelRunner { model, decoder })
    }
}

impl Runner for ModelRunner {
    type State = SequenceState;

    fn vocab_size(&self) -> usize {
        self.model.config().vocab_size
    }

    fn new_state(&self) -> Result<SequenceState> {
        self.model.new_state().map_err(failed)
    }

    fn snapshot(&self, state: &SequenceState) -> Result<SequenceState> {
        state.snapshot().map_err(failed)
    }

    fn state_bytes(&self, state: &SequenceState) -> usize {
        state.bytes()
    }

    fn prefill(&self, state: &mut SequenceState, tokens_t: &[u32]) -> Result<Tensor> {
        self.model.prefill(state, tokens_t).map_err(failed)
    }

    fn prefill_all(&self, state: &mut SequenceState, tokens_t: &[u32]) -> Result<Tensor> {
        self.model.prefill_all(state, tokens_t).map_err(failed)
    }

    fn step(&mut self, states: &mut [&mut SequenceState], tokens_b: &[u32]) -> Result<Vec<Logits>> {
        let Some(decoder) = &mut self.decoder else {
            let logits_bc = self.model.step(states, tokens_b).map_err(failed)?;
            let logits = logits_bc.to_f32_vec();
            let rows = logits.chunks(self.model.config().vocab_size);
            return Ok(rows.map(|row| Logits::All(row.to_vec())).collect());
        };
        decoder
            .step(&self.model, states, tokens_b)
            .map_err(failed)?;
        let rows = decoder.candidates().map_err(failed)?.into_iter();
        rows.enumerate()
            .map(|(row, candidates)| match candidates {
                Some(candidates) => Ok(Logits::Short(shortlist(candidates))),
                None => Ok(Logits::All(decoder.logits_of(row).map_err(failed)?)),
            })
            .collect()
    }

    fn logits_of(&self, row: usize) -> Result<Vec<f32>> {
        match &self.decoder {
            Some(decoder) => decoder.logits_of(row).map_err(failed),
            None => unreachable!("a step without a decoder gives whole rows"),
        }
    }
}

fn shortlist(found: Candidates) -> Shortlist {
    let pairs = found.ids.into_iter().zip(found.logits);
    Shortlist {
        candidates: pairs.map(|(id, logit)| Candidate { id, logit }).collect(),
        floor: found.floor,
        largest: found.largest,
        mass: found.mass,
    }
}

/// Runs one call of the model; a panic in it (a broken invariant of the arithmetic) ends the sequences of the call, not the engine.
/// The states handed to a call that failed must not be used again.
pub(crate) fn guarded<T>(call: impl FnOnce() -> Result<T>) -> Result<T> {
    catch_unwind(AssertUnwindSafe(call)).unwrap_or_else(|panic| {
        let text = panic
            .downcast_ref::<String>()
            .map(String::as_str)
            .or_else(|| panic.downcast_ref::<&str>().copied());
        Err(Error::Model {
            reason: text.unwrap_or("a panic without a message").to_owned(),
        })
    })
}

fn failed(error: model::Error) -> Error {
    Error::Model {
        reason: error.to_string(),
    }
}
