//! The Qwen3.5 text model: an embedding, layers of gated delta nets and gated attention, a head.
// T tokens (packed), D hidden, C vocabulary, B sequences.

pub(crate) mod attention;
pub(crate) mod block;
pub(crate) mod delta_net;
pub(crate) mod folder;
pub mod memory;
pub(crate) mod mlp;
pub(crate) mod names;
pub(crate) mod saved;
pub(crate) mod state;

use std::sync::Arc;

use kernel::ops::rope::Rotation;
use kernel::ops::{embedding, linear_cross_entropy, matmul, rms_norm};
use kernel::{DType, Device, Tensor};
use rayon::prelude::*;

use crate::checkpoint::Checkpoint;
use crate::config::{CONV_WIDTH, Config, LayerType};
use crate::lora::{self, LoraConfig};
use crate::parameter::{Gradients, Parameter};
use crate::{Batch, Error, Result, check_borders, random, rows};

use attention::Place;
use block::Pass;
use saved::Arena;

pub use saved::{Keep, Saved};
pub use state::SequenceState;

/// Weights and what is needed to write them back.
#[derive(Debug)]
pub struct Qwen3_5 {
    pub(crate) config: Config,
    pub(crate) dtype: DType,
    pub(crate) device: Device,
    /// [C,D]
    pub(crate) embed_tokens: Parameter,
    pub(crate) layers: Vec<block::Weights>,
    /// [D], scales by 1 + w
    pub(crate) norm: Parameter,
    /// [C,D]; None: the embedding is the head.
    pub(crate) lm_head: Option<Parameter>,
    pub(crate) lora: Option<LoraConfig>,
    rotation: Rotation,
    /// The files that the model was read from, for the tensors carried through.
    source: Option<Arc<Checkpoint>>,
}

impl Qwen3_5 {
    /// All weights zero.
    fn zeros(config: Config, dtype: DType) -> Self {
        let table = [config.vocab_size, config.hidden_size];
        let mut model = Qwen3_5 {
            dtype,
            device: Device::Cpu,
            embed_tokens: Parameter::zeros(&table, dtype),
            layers: config
                .layer_types
                .iter()
                .map(|layer_type| block::Weights::zeros(*layer_type, &config, dtype))
                .collect(),
            norm: Parameter::zeros(&[config.hidden_size], dtype),
            lm_head: (!config.tie_word_embeddings).then(|| Parameter::zeros(&table, dtype)),
            lora: None,
            rotation: Rotation::new(config.rope_theta, config.rotary_dims),
            source: None,
            config,
        };
        model.number_parameters();
        model
    }

    /// See [`crate::Model::init`].
    pub(crate) fn init(config: Config, seed: u64, dtype: DType) -> Self {
        let std = config.initializer_range;
        let mut model = Qwen3_5::zeros(config, dtype);
        for (number, (name, parameter)) in names::parameters_mut(&mut model).into_iter().enumerate()
        {
            let stream = number as u64;
            let value = |i: u64| match names::initial(&name) {
                names::Initial::Normal => random::normal(seed, stream, i) * std,
                names::Initial::Convolution => {
                    (2.0 * random::uniform(seed, stream, i) - 1.0) / (CONV_WIDTH as f64).sqrt()
                }
                // The open interval keeps the logarithm finite.
                names::Initial::ALog => (16.0 * random::uniform(seed, stream, i)).ln(),
                names::Initial::One => 1.0,
                names::Initial::Zero => 0.0,
            };
            let n = parameter.tensor.numel() as u64;
            let values = (0..n).into_par_iter().map(|i| value(i) as f32).collect();
            let fresh = Tensor::from_f32(parameter.tensor.shape(), values);
            parameter.tensor = fresh.to_dtype(parameter.tensor.dtype());
        }
        model
    }

    /// Gives each trainable parameter its gradient: all weights, or A and B of every adapter while LoRA is attached.
    pub(crate) fn number_parameters(&mut self) {
        let with_lora = self.lora.is_some();
        let mut next = 0;
        let mut number = |parameter: &mut Parameter, trains: bool| {
            parameter.slot = trains.then_some(next);
            next += usize::from(trains);
        };
        for (_, part) in names::parts_mut(self) {
            match part {
                names::Part::Plain(parameter) => number(parameter, !with_lora),
                names::Part::Linear(linear) => {
                    number(&mut linear.weight, !with_lora);
                    if let Some(adapter) = &mut linear.adapter {
                        number(&mut adapter.a_ri, true);
                        number(&mut adapter.b_or, true);
                    }
                }
            }
        }
    }

    /// In the order of `number_parameters`, as the three after it.
    pub(crate) fn trainable_names(&self) -> Vec<String> {
        let form = self.config.form;
        if self.lora.is_none() {
            let parameters = names::parameters(self).into_iter();
            return parameters
                .map(|(name, _)| names::full(form, &name))
                .collect();
        }
        names::linears(self)
            .into_iter()
            .filter(|(_, linear)| linear.adapter.is_some())
            .flat_map(|(module, _)| names::lora(form, &module))
            .collect()
    }

    pub(crate) fn trainable(&self) -> Vec<&Tensor> {
        if self.lora.is_none() {
            let parameters = names::parameters(self).into_iter();
            return parameters.map(|(_, parameter)| &parameter.tensor).collect();
        }
        names::linears(self)
            .into_iter()
            .filter_map(|(_, linear)| linear.adapter.as_ref())
            .flat_map(|adapter| [&adapter.a_ri.tensor, &adapter.b_or.tensor])
            .collect()
    }

    /// Whether each trainable tensor is the weight of a linear layer.
    pub(crate) fn trains_linear(&self) -> Vec<bool> {
        let mut trains = vec![false; self.trainable().len()];
        for (_, linear) in names::linears(self) {
            if let Some(slot) = linear.weight.slot {
                trains[slot] = true;
            }
        }
        trains
    }

    pub(crate) fn trainable_mut(&mut self) -> Vec<&mut Tensor> {
        if self.lora.is_none() {
            let parameters = names::parameters_mut(self).into_iter();
            return parameters
                .map(|(_, parameter)| &mut parameter.tensor)
                .collect();
        }
        names::linears_mut(self)
            .into_iter()
            .filter_map(|(_, linear)| linear.adapter.as_mut())
            .flat_map(|adapter| [&mut adapter.a_ri.tensor, &mut adapter.b_or.tensor])
            .collect()
    }

    /// See [`crate::Model::forward_backward`].
    pub(crate) fn forward_backward(
        &self,
        saved: &mut Saved,
        grads: &mut Gradients,
        batch: &Batch,
        d_nll: f32,
        dropout_seed: u64,
    ) -> Result<Vec<f32>> {
        batch.check()?;
        assert_eq!(
            grads.tensors.len(),
            self.trainable().len(),
            "gradients of another set of parameters"
        );
        let arena = self.forward(saved, batch.tokens_t, batch.cu_seqlens, Some(dropout_seed))?;
        let n_tokens = batch.tokens_t.len();
        arena.gradient.resize(&self.config, n_tokens)?;
        let Arena {
            layers,
            keeps,
            lent,
            last,
            scratch,
            gradient,
            lora,
            positions_t,
            ..
        } = arena;

        // head and loss
        linear_cross_entropy::forward_backward(
            &mut last.nll_t,
            &mut gradient.block.d_normed_td,
            grads.of(self.head()),
            &last.normed_td,
            &self.head().tensor,
            batch.targets_t,
            d_nll,
        )?;
        rms_norm::backward(
            &mut gradient.block.d_x_td,
            grads.of(&self.norm),
            &gradient.block.d_normed_td,
            &last.x_td,
            &self.norm.tensor,
            &last.rstd_t,
        )?;
        let block::Gradient {
            d_x_td, d_out_td, ..
        } = &mut gradient.block;
        rows::copy(d_out_td, d_x_td)?;
        // layers
        let pass = self.pass(batch.cu_seqlens, positions_t);
        let kept = layers.iter_mut().zip(keeps.iter());
        for (weights, (kept, keep)) in self.layers.iter().zip(kept).rev() {
            let lent = &mut lent[kept.lender()];
            kept.exchange(lent, scratch, *keep);
            let done = weights.backward(grads, gradient, kept, *keep, scratch, &pass, lora);
            kept.exchange(lent, scratch, *keep);
            done?;
        }
        // embedding: into the head's gradient when tied
        if let Some(d_table) = grads.of(&self.embed_tokens) {
            embedding::backward(d_table, &gradient.block.d_x_td, batch.tokens_t)?;
        }
        Ok(last.nll_t.read_f32()?)
    }

    /// See [`crate::Model::nll`].
    pub(crate) fn nll(&self, saved: &mut Saved, batch: &Batch) -> Result<Vec<f32>> {
        batch.check()?;
        let last = &mut self
            .forward(saved, batch.tokens_t, batch.cu_seqlens, None)?
            .last;
        linear_cross_entropy::forward(
            &mut last.nll_t,
            &last.normed_td,
            &self.head().tensor,
            batch.targets_t,
        )?;
        Ok(last.nll_t.read_f32()?)
    }

    /// See [`crate::Model::hidden_states`].
    pub(crate) fn hidden_states(
        &self,
        saved: &mut Saved,
        tokens_t: &[u32],
        cu_seqlens: &[u32],
    ) -> Result<Vec<Tensor>> {
        check_borders(tokens_t, cu_seqlens)?;
        let arena = self.forward(saved, tokens_t, cu_seqlens, None)?;
        let mut states: Vec<&Tensor> = arena.layers.iter().map(|layer| &layer.input.x_td).collect();
        states.push(&arena.last.x_td);
        states.push(&arena.last.normed_td);
        states
            .into_iter()
            .map(|state| Ok(state.to_device(Device::Cpu)?))
            .collect()
    }

    /// See [`crate::Model::logits`].
    pub(crate) fn logits(
        &self,
        saved: &mut Saved,
        tokens_t: &[u32],
        cu_seqlens: &[u32],
    ) -> Result<Tensor> {
        check_borders(tokens_t, cu_seqlens)?;
        let arena = self.forward(saved, tokens_t, cu_seqlens, None)?;
        self.project(&arena.last.normed_td)
    }

    pub(crate) fn new_state(&self) -> Result<SequenceState> {
        SequenceState::new(&self.config, self.dtype, self.device)
    }

    /// See [`crate::Model::to_device`].
    pub(crate) fn move_to(&mut self, device: Device) -> Result<()> {
        for (_, part) in names::parts_mut(self) {
            match part {
                names::Part::Plain(parameter) => parameter.move_to(device)?,
                names::Part::Linear(linear) => {
                    linear.weight.move_to(device)?;
                    if let Some(adapter) = &mut linear.adapter {
                        adapter.a_ri.move_to(device)?;
                        adapter.b_or.move_to(device)?;
                    }
                }
            }
        }
        self.device = device;
        Ok(())
    }

    /// See [`crate::Model::prefill`].
    pub(crate) fn prefill(&self, state: &mut SequenceState, tokens_t: &[u32]) -> Result<Tensor> {
        let x_td = self.advance(&mut [state], tokens_t)?;
        let hidden = self.config.hidden_size;
        let mut x_1d = Tensor::zeros_on(&[1, hidden], self.dtype, self.device)?;
        rows::copy_rows(&mut x_1d, 0, &x_td, tokens_t.len() - 1, 1, hidden)?;
        let mut logits = self.normed_logits(&x_1d)?;
        logits.reshape(&[self.config.vocab_size]);
        Ok(logits)
    }

    /// See [`crate::Model::prefill_all`].
    pub(crate) fn prefill_all(
        &self,
        state: &mut SequenceState,
        tokens_t: &[u32],
    ) -> Result<Tensor> {
        let x_td = self.advance(&mut [state], tokens_t)?;
        self.normed_logits(&x_td)
    }

    /// See [`crate::Model::step`].
    pub(crate) fn step(
        &self,
        states: &mut [&mut SequenceState],
        tokens_b: &[u32],
    ) -> Result<Tensor> {
        if states.len() != tokens_b.len() {
            return Err(Error::Batch {
                what: format!("{} tokens for {} sequences", tokens_b.len(), states.len()),
            });
        }
        let x_bd = self.advance(states, tokens_b)?;
        self.normed_logits(&x_bd)
    }

    /// Fills the arena up to the head's input.
    fn forward<'a>(
        &self,
        saved: &'a mut Saved,
        tokens_t: &[u32],
        cu_seqlens: &[u32],
        dropout_seed: Option<u64>,
    ) -> Result<&'a mut Arena> {
        let arena = saved.prepare(
            &self.config,
            self.dtype,
            self.device,
            cu_seqlens,
            dropout_seed,
        )?;
        let Arena {
            layers,
            keeps,
            lent,
            last,
            scratch,
            lora,
            positions_t,
            ..
        } = &mut *arena;
        let pass = self.pass(cu_seqlens, positions_t);
        embedding::forward(
            &mut layers[0].input.x_td,
            &self.embed_tokens.tensor,
            tokens_t,
        )?;
        for (layer_idx, weights) in self.layers.iter().enumerate() {
            let (now, later) = layers.split_at_mut(layer_idx + 1);
            let out_td = match later.first_mut() {
                Some(next) => &mut next.input.x_td,
                None => &mut last.x_td,
            };
            let kept = &mut now[layer_idx];
            let lent = &mut lent[kept.lender()];
            kept.exchange(lent, scratch, keeps[layer_idx]);
            let done = weights.forward(out_td, kept, scratch, &pass, lora);
            kept.exchange(lent, scratch, keeps[layer_idx]);
            done?;
        }
        rms_norm::forward(
            &mut last.normed_td,
            &mut last.rstd_t,
            &last.x_td,
            &self.norm.tensor,
            self.config.rms_norm_eps,
        )?;
        Ok(arena)
    }

    /// Runs T tokens of one sequence, or one token of each of several, and returns the residual stream after the last layer [T,D].
    fn advance(&self, states: &mut [&mut SequenceState], tokens_t: &[u32]) -> Result<Tensor> {
        self.check_states(states, tokens_t)?;
        let n_tokens = tokens_t.len();
        let positions_t: Vec<u32> = match states {
            [state] => (0..n_tokens).map(|t| (state.position + t) as u32).collect(),
            _ => states.iter().map(|state| state.position as u32).collect(),
        };
        let place = self.place(&positions_t);
        let mut linear = block::Saved::new(LayerType::Linear, self.dtype, self.device);
        let mut full = block::Saved::new(LayerType::Full, self.dtype, self.device);
        let mut scratch = saved::Scratch::new(self.dtype, self.device);
        let mut step_scratch = delta_net::StepScratch::new(self.dtype, self.device);
        let mut lora = lora::Scratch::new(self.dtype, self.device);
        step_scratch.resize(&self.config, n_tokens)?;
        linear.resize(&self.config, n_tokens, Keep::Products)?;
        full.resize(&self.config, n_tokens, Keep::Products)?;
        scratch.resize(&self.config, n_tokens)?;

        let shape = [n_tokens, self.config.hidden_size];
        let mut x_td = Tensor::zeros_on(&shape, self.dtype, self.device)?;
        embedding::forward(&mut x_td, &self.embed_tokens.tensor, tokens_t)?;
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
                &place,
                &mut lora,
            )?;
        }
        let each = n_tokens / states.len();
        for state in states {
            state.position += each;
        }
        Ok(x_td)
    }

    fn check_states(&self, states: &[&mut SequenceState], tokens_t: &[u32]) -> Result<()> {
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
            &self.norm.tensor,
            self.config.rms_norm_eps,
        )?;
        self.project(&normed_td)
    }

    fn project(&self, normed_td: &Tensor) -> Result<Tensor> {
        let shape = [normed_td.shape()[0], self.config.vocab_size];
        let mut logits_tc = Tensor::zeros_on(&shape, DType::F32, self.device)?;
        matmul::forward(&mut logits_tc, normed_td, &self.head().tensor)?;
        match self.device {
            Device::Cpu => Ok(logits_tc),
            Device::Cuda(_) => Ok(logits_tc.to_device(Device::Cpu)?),
        }
    }

    fn head(&self) -> &Parameter {
        self.lm_head.as_ref().unwrap_or(&self.embed_tokens)
    }

    fn pass<'a>(&'a self, cu_seqlens: &'a [u32], positions_t: &'a [u32]) -> Pass<'a> {
        Pass {
            cu_seqlens,
            place: self.place(positions_t),
        }
    }

    fn place<'a>(&'a self, positions_t: &'a [u32]) -> Place<'a> {
        Place {
            positions_t,
            rotation: &self.rotation,
            eps: self.config.rms_norm_eps,
        }
    }
}
