//! What training keeps between forward and backward, and the scratch both use: this page is the training memory.
//!
//! Kept for each layer: the residual stream before and after the mixer, every projection's output, the outputs of attention and
//! of the delta rule, and the reciprocal norms. What costs no matrix product is kept where there is room, and computed again in
//! backward elsewhere: outputs of norms, rotation, convolution, l2 norms, gates and SwiGLU. The delta rule recomputes its chunk states
//! by itself.
//! All of it is an arena: tensors are resized for each row, and a row no longer than an earlier one allocates nothing.

use kernel::cuda::footprint;
use kernel::{DType, Device, Tensor};

use crate::config::{Config, LayerType};
use crate::lora;
use crate::{Error, Result};

use super::arena::arena;
use super::block;
use super::recompute::Recompute;

arena! {
    /// What lies behind the last layer.
    Last(c, t) {
        /// The residual stream after the last layer [T,D].
        x_td: act [t, c.hidden_size],
        /// Its reciprocal norm [T].
        rstd_t: f32 [t],
        /// The head's input [T,D].
        normed_td: act [t, c.hidden_size],
        /// Negative log-likelihoods [T].
        nll_t: f32 [t],
    }
}

/// Reusable activations of one pass; start with `Saved::default()`, which recomputes what costs no matrix product, and hand the same one
/// in again and again.
#[derive(Debug, Default)]
pub struct Saved {
    arena: Option<Arena>,
    /// One entry a layer; layers beyond have the default.
    policy: Vec<Recompute>,
}

/// All that one pass writes.
#[derive(Debug)]
pub(crate) struct Arena {
    dtype: DType,
    device: Device,
    layer_types: Vec<LayerType>,
    pub layers: Vec<block::Saved>,
    pub policy: Vec<Recompute>,
    /// What layers that recompute more than the elementwise use in turns, one of each type.
    pub shared: [block::Saved; 2],
    pub last: Last,
    pub scratch: block::Scratch,
    pub gradient: block::Gradient,
    pub lora: lora::Scratch,
    /// Position of each token in its document.
    pub positions_t: Vec<u32>,
}

impl Saved {
    /// Recomputes of each layer what `policy` says (layers beyond its end: what costs no matrix product).
    pub fn with_policy(policy: Vec<Recompute>) -> Self {
        Saved {
            arena: None,
            policy,
        }
    }

    /// Keeps as little as a forward pass alone needs.
    pub fn forward_only(config: &Config) -> Self {
        Saved::with_policy(vec![Recompute::Layer; config.layer_types.len()])
    }

    /// Bytes that a row of `n_tokens` needs in training, exactly, but for LoRA's and the scratch of ops: see
    /// [`TrainPass`](super::memory::TrainPass). In the pages of a GPU's memory, of which a CPU needs a little less.
    pub fn bytes_for(
        config: &Config,
        n_tokens: usize,
        dtype: DType,
        policy: &[Recompute],
    ) -> usize {
        let recompute = |layer: usize| Recompute::of_layer(policy, layer);
        let types = config.layer_types.iter().enumerate();
        let layers: usize = types
            .clone()
            .map(|(layer, layer_type)| {
                block::Saved::bytes_for(*layer_type, config, n_tokens, dtype, recompute(layer))
            })
            .sum();
        let shared: usize = [LayerType::Linear, LayerType::Full]
            .into_iter()
            .map(|layer_type| {
                let most = types
                    .clone()
                    .filter(|(_, other)| **other == layer_type)
                    .map(|(layer, _)| recompute(layer))
                    .max();
                let most = most.unwrap_or_default();
                block::Saved::shared_bytes_for(layer_type, config, n_tokens, dtype, most)
            })
            .sum();
        let all_own = types
            .clone()
            .all(|(layer, _)| recompute(layer) == Recompute::Nothing);
        let scratch = match all_own {
            true => 0,
            false => block::Scratch::bytes_for(config, n_tokens, dtype),
        };
        layers
            + shared
            + Last::bytes_for(config, n_tokens, dtype)
            + scratch
            + block::Gradient::bytes_for(config, n_tokens, dtype)
    }

    /// Bytes behind what the last row used, counted as in [`Saved::bytes_for`], without LoRA's.
    pub fn bytes(&self) -> usize {
        self.arena.as_ref().map_or(0, Arena::bytes)
    }

    /// Bytes in use by LoRA's scratch.
    pub fn lora_bytes(&self) -> usize {
        self.arena.as_ref().map_or(0, |arena| arena.lora.bytes())
    }

    /// What the last pass kept of one layer, by name; for tests and for looking inside.
    pub fn layer(&self, layer_idx: usize) -> Vec<(&'static str, &Tensor)> {
        match &self.arena {
            Some(arena) if layer_idx < arena.layers.len() => arena.layers[layer_idx].tensors(),
            _ => Vec::new(),
        }
    }

    /// The arena, sized for the forward pass of a row.
    pub(crate) fn prepare(
        &mut self,
        config: &Config,
        dtype: DType,
        device: Device,
        cu_seqlens: &[u32],
        dropout_seed: Option<u64>,
    ) -> Result<&mut Arena> {
        let arena = self
            .arena
            .get_or_insert_with(|| Arena::new(&config.layer_types, dtype, device));
        if arena.dtype != dtype {
            return Err(Error::SavedType {
                saved: arena.dtype,
                model: dtype,
            });
        }
        if arena.layer_types != config.layer_types || arena.device != device {
            *arena = Arena::new(&config.layer_types, dtype, device);
        }
        arena.set_positions(cu_seqlens);
        arena.lora.dropout_seed = dropout_seed;
        let n_tokens = arena.positions_t.len();
        arena.policy.clone_from(&self.policy);
        let n_layers = config.layer_types.len();
        arena.policy.resize(n_layers, Recompute::default());
        let mut most = [Recompute::Nothing; 2];
        for (layer, recompute) in arena.layers.iter_mut().zip(&arena.policy) {
            layer.resize(config, n_tokens, *recompute)?;
            let most = &mut most[layer.type_idx()];
            *most = (*most).max(*recompute);
        }
        for (shared, most) in arena.shared.iter_mut().zip(most) {
            shared.resize_shared(config, n_tokens, most)?;
        }
        arena.last.resize(config, n_tokens)?;
        if most.into_iter().any(|most| most > Recompute::Nothing) {
            arena.scratch.resize(config, n_tokens)?;
        }
        Ok(arena)
    }
}

impl Arena {
    fn new(layer_types: &[LayerType], dtype: DType, device: Device) -> Self {
        Arena {
            dtype,
            device,
            layer_types: layer_types.to_vec(),
            layers: layer_types
                .iter()
                .map(|layer_type| block::Saved::new(*layer_type, dtype, device))
                .collect(),
            policy: vec![Recompute::default(); layer_types.len()],
            shared: [LayerType::Linear, LayerType::Full]
                .map(|layer_type| block::Saved::new(layer_type, dtype, device)),
            last: Last::new(dtype, device),
            scratch: block::Scratch::new(dtype, device),
            gradient: block::Gradient::new(dtype, device),
            lora: lora::Scratch::new(dtype, device),
            positions_t: Vec::new(),
        }
    }

    fn set_positions(&mut self, cu_seqlens: &[u32]) {
        self.positions_t.clear();
        for border in cu_seqlens.windows(2) {
            self.positions_t.extend(0..border[1] - border[0]);
        }
    }

    fn bytes(&self) -> usize {
        let layers = self.layers.iter().chain(&self.shared);
        let layers = layers.flat_map(block::Saved::tensors);
        layers
            .chain(self.last.tensors())
            .chain(self.scratch.tensors())
            .chain(self.gradient.tensors())
            .map(|(_, tensor)| footprint(tensor.bytes()))
            .sum()
    }
}
