//! The Qwen3.5 text model: an embedding, layers of gated delta nets and gated attention, a head.
// T tokens (packed), D hidden, C vocabulary.

mod adapters;
mod arena;
mod attention;
mod block;
mod decode;
mod delta_net;
mod folder;
mod generate;
pub(crate) mod memory;
mod mlp;
pub(crate) mod names;
mod pass;
pub(crate) mod recompute;
pub(crate) mod saved;
pub(crate) mod state;
pub(crate) mod table;
mod weights;

use std::sync::Arc;

use kernel::ops::rope::Rotation;
use kernel::ops::{embedding, linear_cross_entropy, matmul, rms_norm};
use kernel::{DType, Device, Tensor};
use rayon::prelude::*;

use crate::batch::{Batch, check_borders};
use crate::checkpoint::Checkpoint;
use crate::config::Config;
use crate::lora::{self, LoraConfig};
use crate::parameter::{Gradients, Parameter};
use crate::{Result, rows};

use pass::{Backward, Pass};
use saved::{Arena, Saved};
use weights::{Part, weights};

pub use decode::Decoder;
pub(crate) use folder::check_head;
pub(crate) use weights::Kind;

/// A Qwen3.5 text model: weights, and what is needed to write them back.
#[derive(Debug)]
pub struct Model {
    pub(crate) config: Config,
    dtype: DType,
    device: Device,
    outer: Outer,
    layers: Vec<block::Weights>,
    /// None: the embedding is the head.
    head: Option<Head>,
    pub(crate) lora: Option<LoraConfig>,
    rotation: Rotation,
    /// The files that the model was read from, for the tensors carried through.
    source: Option<Arc<Checkpoint>>,
}

weights! {
    /// What stands before the layers and behind them.
    Outer(c) {
        /// [C,D]
        embed_tokens: Plain "embed_tokens.weight" [c.vocab_size, c.hidden_size] Normal,
        /// [D], scales by 1 + w
        norm: Plain "norm.weight" [c.hidden_size] Zero,
    }
}

weights! {
    /// A head of its own.
    Head(c) {
        /// [C,D]
        lm_head: Plain "lm_head.weight" [c.vocab_size, c.hidden_size] Normal,
    }
}

impl Model {
    /// A fresh model: matrices normal(0, `initializer_range`), convolutions uniform(±1/√4), (1 + w) norms 0, gated norms 1,
    /// `A_log` = ln uniform(0, 16), `dt_bias` 1. The same seed gives the same weights on every platform; they are made on the host, see
    /// [`Model::to_device`].
    pub fn init(config: Config, seed: u64, dtype: DType) -> Self {
        let std = config.initializer_range;
        let mut model = Model::zeros(config, dtype);
        for (number, (row, parameter)) in model.parameters_mut().into_iter().enumerate() {
            let n = parameter.tensor.numel() as u64;
            let value = |i| row.initial.value(std, seed, number as u64, i);
            let values = (0..n).into_par_iter().map(value).collect();
            let fresh = Tensor::from_f32(parameter.tensor.shape(), values);
            parameter.tensor = fresh.to_dtype(parameter.tensor.dtype());
        }
        model
    }

    /// The text configuration.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Storage type of the weights and activations.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Where the weights are and the arithmetic happens.
    pub fn device(&self) -> Device {
        self.device
    }

    /// The attached adapter's settings.
    pub fn lora(&self) -> Option<&LoraConfig> {
        self.lora.as_ref()
    }

    /// Moves the weights, and an adapter beside them, to `device`; states, gradients and [`Saved`] are made anew by the caller.
    ///
    /// # Errors
    /// [`crate::Error::Kernel`] if the GPU has no room or failed; the model is then of no use.
    pub fn to_device(mut self, device: Device) -> Result<Self> {
        self.move_to(device)?;
        Ok(self)
    }

    /// Names of the trainable tensors in a fixed order: checkpoint names, or PEFT names while LoRA is attached.
    pub fn trainable_names(&self) -> Vec<String> {
        let form = self.config.form;
        if self.lora.is_none() {
            let parameters = self.parameters().into_iter();
            return parameters
                .map(|(row, _)| names::full(form, &row.name))
                .collect();
        }
        self.linears()
            .into_iter()
            .filter(|(_, linear)| linear.adapter.is_some())
            .flat_map(|(module, _)| names::lora(form, &module))
            .collect()
    }

    /// The trainable tensors, in the order of [`Model::trainable_names`].
    pub fn trainable(&self) -> Vec<&Tensor> {
        if self.lora.is_none() {
            let parameters = self.parameters().into_iter();
            return parameters.map(|(_, parameter)| &parameter.tensor).collect();
        }
        self.linears()
            .into_iter()
            .filter_map(|(_, linear)| linear.adapter.as_ref())
            .flat_map(|adapter| [&adapter.a_ri.tensor, &adapter.b_or.tensor])
            .collect()
    }

    /// The trainable tensors, in the order of [`Model::trainable_names`].
    pub fn trainable_mut(&mut self) -> Vec<&mut Tensor> {
        if self.lora.is_none() {
            let parameters = self.parameters_mut().into_iter();
            return parameters
                .map(|(_, parameter)| &mut parameter.tensor)
                .collect();
        }
        self.linears_mut()
            .into_iter()
            .filter_map(|(_, linear)| linear.adapter.as_mut())
            .flat_map(|adapter| [&mut adapter.a_ri.tensor, &mut adapter.b_or.tensor])
            .collect()
    }

    /// f32 zeros, one tensor for each trainable one.
    ///
    /// # Errors
    /// [`crate::Error::Kernel`] if the GPU has no room.
    pub fn gradients(&self) -> Result<Gradients> {
        let zeros =
            |tensor: &Tensor| Ok(Tensor::zeros_on(tensor.shape(), DType::F32, self.device)?);
        let tensors = self.trainable().into_iter().map(zeros);
        Ok(Gradients::new(
            tensors.collect::<Result<_>>()?,
            self.trains_linear(),
        ))
    }

    /// Allocates in `saved` all that rows of up to `n_tokens` need for training, so that what does not fit fails before the first one.
    ///
    /// # Errors
    /// [`crate::Error::Kernel`] if the GPU has no room.
    pub fn reserve(&self, saved: &mut Saved, n_tokens: usize) -> Result<()> {
        let borders = [0, n_tokens as u32];
        let arena = saved.prepare(&self.config, self.dtype, self.device, &borders, None)?;
        if let Some(lora) = &self.lora {
            let linears = self.linears().into_iter();
            let n_adapters = linears
                .filter(|(_, linear)| linear.adapter.is_some())
                .count();
            arena.lora.reserve(n_adapters, lora.rank, n_tokens)?;
        }
        arena.gradient.resize(&self.config, n_tokens)
    }

    /// Negative log-likelihood of each target (natural log; 0 where there is none) and, added to `grads`, the gradient of `d_nll · Σ nll`.
    /// `dropout_seed` feeds LoRA dropout; the same seed drops the same elements.
    ///
    /// # Errors
    /// [`crate::Error::Batch`] for borders that do not fit, [`crate::Error::Kernel`] for an id beyond the vocabulary.
    pub fn forward_backward(
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
            policy,
            shared,
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
            &mut gradient.stream.d_normed_td,
            grads.of(self.head()),
            &last.normed_td,
            &self.head().tensor,
            batch.targets_t,
            d_nll,
        )?;
        rms_norm::backward(
            &mut gradient.stream.d_x_td,
            grads.of(&self.outer.norm),
            &gradient.stream.d_normed_td,
            &last.x_td,
            &self.outer.norm.tensor,
            &last.rstd_t,
        )?;
        let block::StreamGradient {
            d_x_td, d_out_td, ..
        } = &mut gradient.stream;
        rows::copy(d_out_td, d_x_td)?;
        // layers
        let mut backward = Backward {
            pass: self.pass(batch.cu_seqlens, positions_t, lora),
            grads: &mut *grads,
            has_scratch: false,
        };
        let kept = layers.iter_mut().zip(policy.iter());
        for (weights, (kept, recompute)) in self.layers.iter().zip(kept).rev() {
            let shared = &mut shared[kept.type_idx()];
            kept.swap(shared, scratch, *recompute);
            let done = weights.backward(gradient, kept, *recompute, scratch, &mut backward);
            kept.swap(shared, scratch, *recompute);
            done?;
        }
        // embedding: into the head's gradient when tied
        if let Some(d_table) = grads.of(&self.outer.embed_tokens) {
            embedding::backward(d_table, &gradient.stream.d_x_td, batch.tokens_t)?;
        }
        Ok(last.nll_t.read_f32()?)
    }

    /// Negative log-likelihood of each target, without dropout and without gradients.
    ///
    /// # Errors
    /// As [`Model::forward_backward`].
    pub fn nll(&self, saved: &mut Saved, batch: &Batch) -> Result<Vec<f32>> {
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

    /// The residual stream [T,D] before each layer, after the last one, and after the final norm: n_layers + 2 tensors.
    ///
    /// # Errors
    /// As [`Model::forward_backward`].
    pub fn hidden_states(
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

    /// Logits of every position [T,C] f32. Meant for tests and short texts: all T × C exist at once.
    ///
    /// # Errors
    /// As [`Model::forward_backward`].
    pub fn logits(
        &self,
        saved: &mut Saved,
        tokens_t: &[u32],
        cu_seqlens: &[u32],
    ) -> Result<Tensor> {
        check_borders(tokens_t, cu_seqlens)?;
        let arena = self.forward(saved, tokens_t, cu_seqlens, None)?;
        self.project(&arena.last.normed_td)
    }

    /// All weights zero.
    fn zeros(config: Config, dtype: DType) -> Self {
        let layers = config.layer_types.iter();
        let mut model = Model {
            dtype,
            device: Device::Cpu,
            outer: Outer::zeros(&config, dtype),
            layers: layers
                .map(|layer_type| block::Weights::zeros(*layer_type, &config, dtype))
                .collect(),
            head: (!config.tie_word_embeddings).then(|| Head::zeros(&config, dtype)),
            lora: None,
            rotation: Rotation::new(config.rope_theta, config.rotary_dims),
            source: None,
            config,
        };
        model.number_parameters();
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
        for (_, part) in self.parts_mut() {
            match part {
                Part::Plain(parameter) => number(parameter, !with_lora),
                Part::Linear(linear) => {
                    number(&mut linear.weight, !with_lora);
                    if let Some(adapter) = &mut linear.adapter {
                        number(&mut adapter.a_ri, true);
                        number(&mut adapter.b_or, true);
                    }
                }
            }
        }
    }

    /// Whether each trainable tensor is the weight of a linear layer.
    pub(crate) fn trains_linear(&self) -> Vec<bool> {
        let mut trains = vec![false; self.trainable().len()];
        for (_, linear) in self.linears() {
            if let Some(slot) = linear.weight.slot {
                trains[slot] = true;
            }
        }
        trains
    }

    /// Moves every weight, and an adapter beside it, to `device`.
    pub(crate) fn move_to(&mut self, device: Device) -> Result<()> {
        for (_, part) in self.parts_mut() {
            match part {
                Part::Plain(parameter) => parameter.move_to(device)?,
                Part::Linear(linear) => {
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
            policy,
            shared,
            last,
            scratch,
            lora,
            positions_t,
            ..
        } = &mut *arena;
        let mut pass = self.pass(cu_seqlens, positions_t, lora);
        embedding::forward(
            &mut layers[0].input.x_td,
            &self.outer.embed_tokens.tensor,
            tokens_t,
        )?;
        for (layer_idx, weights) in self.layers.iter().enumerate() {
            let (now, later) = layers.split_at_mut(layer_idx + 1);
            let out_td = match later.first_mut() {
                Some(next) => &mut next.input.x_td,
                None => &mut last.x_td,
            };
            let kept = &mut now[layer_idx];
            let shared = &mut shared[kept.type_idx()];
            kept.swap(shared, scratch, policy[layer_idx]);
            let done = weights.forward(out_td, kept, scratch, &mut pass);
            kept.swap(shared, scratch, policy[layer_idx]);
            done?;
        }
        rms_norm::forward(
            &mut last.normed_td,
            &mut last.rstd_t,
            &last.x_td,
            &self.outer.norm.tensor,
            self.config.rms_norm_eps,
        )?;
        Ok(arena)
    }

    /// Logits of rows that are normalised already [T,C], on the host.
    fn project(&self, normed_td: &Tensor) -> Result<Tensor> {
        let shape = [normed_td.shape()[0], self.config.vocab_size];
        let mut logits_tc = Tensor::zeros_on(&shape, DType::F32, self.device)?;
        matmul::forward(&mut logits_tc, normed_td, &self.head().tensor)?;
        match self.device {
            Device::Cpu => Ok(logits_tc),
            Device::Cuda(_) => Ok(logits_tc.to_device(Device::Cpu)?),
        }
    }

    /// The weight of the head, which may be the embedding's.
    fn head(&self) -> &Parameter {
        match &self.head {
            Some(head) => &head.lm_head,
            None => &self.outer.embed_tokens,
        }
    }

    fn pass<'a>(
        &'a self,
        cu_seqlens: &'a [u32],
        positions_t: &'a [u32],
        lora: &'a mut lora::Scratch,
    ) -> Pass<'a> {
        Pass {
            cu_seqlens,
            positions_t,
            rotation: &self.rotation,
            eps: self.config.rms_norm_eps,
            lora,
        }
    }
}
