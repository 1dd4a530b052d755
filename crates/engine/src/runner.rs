//! What the scheduler needs of a model. A trait, because the scheduler's tests drive it with a toy that can fail on demand.

use std::panic::{AssertUnwindSafe, catch_unwind};

use kernel::Tensor;
use model::{Model, SequenceState};

use crate::error::{Error, Result};

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
    /// Appends one token to each sequence; logits [B, C] f32.
    fn step(&self, states: &mut [&mut Self::State], tokens_b: &[u32]) -> Result<Tensor>;
}

impl Runner for Model {
    type State = SequenceState;

    fn vocab_size(&self) -> usize {
        self.config().vocab_size
    }

    fn new_state(&self) -> Result<SequenceState> {
        Model::new_state(self).map_err(failed)
    }

    fn snapshot(&self, state: &SequenceState) -> Result<SequenceState> {
        state.snapshot().map_err(failed)
    }

    fn state_bytes(&self, state: &SequenceState) -> usize {
        state.bytes()
    }

    fn prefill(&self, state: &mut SequenceState, tokens_t: &[u32]) -> Result<Tensor> {
        Model::prefill(self, state, tokens_t).map_err(failed)
    }

    fn prefill_all(&self, state: &mut SequenceState, tokens_t: &[u32]) -> Result<Tensor> {
        Model::prefill_all(self, state, tokens_t).map_err(failed)
    }

    fn step(&self, states: &mut [&mut SequenceState], tokens_b: &[u32]) -> Result<Tensor> {
        Model::step(self, states, tokens_b).map_err(failed)
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
