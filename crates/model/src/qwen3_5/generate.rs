//! Generation: tokens appended to sequences, many at once or one of each.
// T tokens, C vocabulary, B sequences.

use kernel::ops::{embedding, rms_norm};
use kernel::{DType, Tensor};

use crate::config::LayerType;
use crate::{Error, Result, lora, rows};

use super::recompute::Recompute;
use super::state::SequenceState;
use super::{Model, block, delta_net};

impl Model {
    /// An empty sequence.
    ///
    /// # Errors
    /// [`Error::Kernel`] if the GPU has no room.
    pub fn new_state(&self) -> Result<SequenceState> {
        SequenceState::new(&self.config, self.dtype, self.device)
    }

    /// Appends tokens to a sequence; logits of the last one [C] f32. Any split of the tokens into calls gives the same result.
    ///
    /// # Errors
    /// [`Error::Batch`] for no tokens, [`Error::Kernel`] for an id beyond the vocabulary; the state is then unusable.
    pub fn prefill(&self, state: &mut SequenceState, tokens_t: &[u32]) -> Result<Tensor> {
        let x_td = self.advance(&mut [state], tokens_t)?;
        let hidden = self.config.hidden_size;
        let mut x_1d = Tensor::zeros_on(&[1, hidden], self.dtype, self.device)?;
        rows::copy_rows(&mut x_1d, 0, &x_td, tokens_t.len() - 1, 1, hidden)?;
        let mut logits = self.normed_logits(&x_1d)?;
        logits.reshape(&[self.config.vocab_size]);
        Ok(logits)
    }

    /// As [`Model::prefill`], with the logits of every new position [T,C] f32.
    ///
    /// # Errors
    /// As [`Model::prefill`].
    pub fn prefill_all(&self, state: &mut SequenceState, tokens_t: &[u32]) -> Result<Tensor> {
        let x_td = self.advance(&mut [state], tokens_t)?;
        self.normed_logits(&x_td)
    }

    /// One token for each sequence, all through the same matrix products; logits [B,C] f32.
    ///
    /// # Errors
    /// As [`Model::prefill`], and [`Error::Batch`] if there are not as many tokens as states.
    pub fn step(&self, states: &mut [&mut SequenceState], tokens_b: &[u32]) -> Result<Tensor> {
        if states.len() != tokens_b.len() {
            return Err(Error::Batch {
                what: format!("{} tokens for {} sequences", tokens_b.len(), states.len()),
            });
        }
        let x_bd = self.advance(states, tokens_b)?;
        self.normed_logits(&x_bd)
    }

    /// Runs T tokens of one sequence, or one token of each of several, and returns the residual stream after the last layer [T,D].
    fn advance(&self, states: &mut [&mut SequenceState], tokens_t: &[u32]) -> Result<Tensor> {
        self.check_states(states, tokens_t)?;
        let n_tokens = tokens_t.len();
        let positions_t: Vec<u32> = match states {
            [state] => (0..n_tokens).map(|t| (state.position + t) as u32).collect(),
            _ => states.iter().map(|state| state.position as u32).collect(),
        };
        let mut linear = block::Saved::new(LayerType::Linear, self.dtype, self.device);
        let mut full = block::Saved::new(LayerType::Full, self.dtype, self.device);
        let mut scratch = block::Scratch::new(self.dtype, self.device);
        let mut step_scratch = delta_net::StepScratch::new(self.dtype, self.device);
        let mut lora = lora::Scratch::new(self.dtype, self.device);
        step_scratch.resize(&self.config, n_tokens)?;
        linear.resize(&self.config, n_tokens, Recompute::Elementwise)?;
        full.resize(&self.config, n_tokens, Recompute::Elementwise)?;
        scratch.resize(&self.config, n_tokens)?;

        let borders = [0, n_tokens as u32];
        let mut pass = self.pass(&borders, &positions_t, &mut lora);
        let shape = [n_tokens, self.config.hidden_size];
        let mut x_td = Tensor::zeros_on(&shape, self.dtype, self.device)?;
        embedding::forward(&mut x_td, &self.outer.embed_tokens.tensor, tokens_t)?;
        for (layer_idx, weights) in self.layers.iter().enumerate() {
            let kept = match self.config.layer_types[layer_idx] {
                LayerType::Linear => &mut linear,
                LayerType::Full => &mut full,
            };
            std::mem::swap(&mut kept.input.x_td, &mut x_td);
            let layer_states = states
                .iter_mut()
                .map(|state| &mut state.layers[layer_idx])
                .collect();
            weights.step(
                &mut x_td,
                layer_states,
                kept,
                &mut scratch,
                &mut step_scratch,
                &mut pass,
            )?;
        }
        let each = n_tokens / states.len();
        for state in states {
            state.position += each;
        }
        Ok(x_td)
    }

    pub(super) fn check_states(
        &self,
        states: &[&mut SequenceState],
        tokens_t: &[u32],
    ) -> Result<()> {
        if tokens_t.is_empty() {
            return Err(Error::Batch {
                what: "no tokens".to_owned(),
            });
        }
        let n_layers = self.layers.len();
        match states.iter().find(|state| state.layers.len() != n_layers) {
            Some(state) => Err(Error::Batch {
                what: format!(
                    "a state of {} layers for a model of {n_layers}",
                    state.layers.len()
                ),
            }),
            None => Ok(()),
        }
    }

    /// Final norm and head of any rows.
    fn normed_logits(&self, x_td: &Tensor) -> Result<Tensor> {
        let n_tokens = x_td.shape()[0];
        let mut normed_td = Tensor::zeros_on(x_td.shape(), self.dtype, self.device)?;
        let mut rstd_t = Tensor::zeros_on(&[n_tokens], DType::F32, self.device)?;
        rms_norm::forward(
            &mut normed_td,
            &mut rstd_t,
            x_td,
            &self.outer.norm.tensor,
            self.config.rms_norm_eps,
        )?;
        self.project(&normed_td)
    }
}
