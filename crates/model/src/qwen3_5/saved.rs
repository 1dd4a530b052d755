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
use crate::{Error, Model, Result};

use super::{attention, block, delta_net, mlp};

/// Declares a struct of tensors whose shapes follow from the config `c` and the token count `t`, so that the same lines
/// allocate, resize and predict. Types: `act` is the model's storage type, `f32` is always f32.
macro_rules! arena {
    (
        $(#[$about:meta])*
        $name:ident($c:ident, $t:ident) {
            $( $(#[$doc:meta])* $field:ident: $kind:ident [$($dim:expr),+], )+
        }
    ) => {
        $(#[$about])*
        #[derive(Debug)]
        pub(crate) struct $name {
            $( $(#[$doc])* pub $field: kernel::Tensor, )+
        }

        #[allow(dead_code, reason = "not every arena is counted or looked into")]
        impl $name {
            #[allow(unused_variables, reason = "some arenas are f32 throughout")]
            pub fn new(dtype: kernel::DType, device: kernel::Device) -> Self {
                $name { $( $field: kernel::Tensor::empty_on(device, arena!(@dtype $kind, dtype)), )+ }
            }

            /// Gives every tensor its shape for `t` tokens; contents are unspecified.
            pub fn resize(&mut self, $c: &crate::config::Config, $t: usize) -> crate::Result<()> {
                $( self.$field.resize(&[$($dim),+])?; )+
                Ok(())
            }

            /// Bytes of a GPU behind what `resize` will need.
            #[allow(unused_variables, reason = "some arenas are f32 throughout")]
            pub fn bytes_for($c: &crate::config::Config, $t: usize, dtype: kernel::DType) -> usize {
                0 $( + kernel::cuda::footprint(arena!(@dtype $kind, dtype).size() * [$($dim),+].iter().product::<usize>()) )+
            }

            /// Every tensor by name.
            pub fn tensors(&self) -> Vec<(&'static str, &kernel::Tensor)> {
                vec![ $( (stringify!($field), &self.$field), )+ ]
            }
        }
    };
    (@dtype act, $dtype:ident) => { $dtype };
    (@dtype f32, $dtype:ident) => { kernel::DType::F32 };
}
pub(crate) use arena;

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

/// What a layer keeps from forward to backward; what it does not keep is computed again there.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Keep {
    /// The residual stream before the layer: the whole layer runs forward twice.
    Input,
    /// All but the two wide tensors of the feed-forward, whose projections run twice.
    Mixer,
    /// Everything that costs a matrix product; outputs of norms, convolutions and gates are computed again.
    #[default]
    Products,
    /// Those outputs too: nothing runs twice but inside the delta rule.
    All,
}

/// Reusable activations of one pass; start with `Saved::default()`, which keeps products, and hand the same one in again and again.
#[derive(Debug, Default)]
pub struct Saved {
    arena: Option<Arena>,
    /// One entry a layer; layers beyond keep products.
    keeps: Vec<Keep>,
}

#[derive(Debug)]
pub(crate) struct Arena {
    dtype: DType,
    device: Device,
    layer_types: Vec<LayerType>,
    pub layers: Vec<block::Saved>,
    pub keeps: Vec<Keep>,
    /// What layers that do not keep everything borrow for the time of their pass, one of each type.
    pub lent: [block::Saved; 2],
    pub last: Last,
    pub scratch: Scratch,
    pub gradient: Gradient,
    pub lora: lora::Scratch,
    /// Position of each token in its document.
    pub positions_t: Vec<u32>,
}

/// Values that cost no matrix product, shared by all layers that do not keep their own.
#[derive(Debug)]
pub(crate) struct Scratch {
    pub block: block::Scratch,
    pub delta_net: delta_net::Scratch,
    pub attention: attention::Scratch,
    pub mlp: mlp::Scratch,
}

/// Gradients of activations, shared by all layers.
#[derive(Debug)]
pub(crate) struct Gradient {
    pub block: block::Gradient,
    pub delta_net: delta_net::Gradient,
    pub attention: attention::Gradient,
    pub mlp: mlp::Gradient,
}

impl Saved {
    /// Keeps of each layer what `keeps` says (layers beyond its end keep products).
    pub fn keeping(keeps: Vec<Keep>) -> Self {
        Saved { arena: None, keeps }
    }

    /// Keeps as little as a forward pass alone needs.
    pub fn forward_only(config: &Config) -> Self {
        Saved::keeping(vec![Keep::Input; config.layer_types.len()])
    }

    /// Bytes that a row of `n_tokens` needs in training, exactly, but for LoRA's and the scratch of ops: see
    /// [`TrainPass`](super::memory::TrainPass). In the pages of a GPU's memory, of which a CPU needs a little less.
    pub fn bytes_for(config: &Config, n_tokens: usize, dtype: DType, keeps: &[Keep]) -> usize {
        let keep = |layer: usize| keeps.get(layer).copied().unwrap_or_default();
        let types = config.layer_types.iter().enumerate();
        let layers: usize = types
            .clone()
            .map(|(layer, layer_type)| {
                block::Saved::bytes_for(*layer_type, config, n_tokens, dtype, keep(layer))
            })
            .sum();
        let lent: usize = [LayerType::Linear, LayerType::Full]
            .into_iter()
            .map(|layer_type| {
                let least = types
                    .clone()
                    .filter(|(_, other)| **other == layer_type)
                    .map(|(layer, _)| keep(layer))
                    .min();
                let least = least.unwrap_or_default();
                block::Saved::lent_bytes_for(layer_type, config, n_tokens, dtype, least)
            })
            .sum();
        let all_own = types.clone().all(|(layer, _)| keep(layer) == Keep::All);
        let shared = match all_own {
            true => 0,
            false => Scratch::bytes_for(config, n_tokens, dtype),
        };
        layers
            + lent
            + Last::bytes_for(config, n_tokens, dtype)
            + shared
            + Gradient::bytes_for(config, n_tokens, dtype)
    }

    /// What layers may keep, from all to least: one after the other gives up what costs no product, then its feed-forward, then all it has.
    pub fn choices(config: &Config) -> Vec<Vec<Keep>> {
        let n_layers = config.layer_types.len();
        let mut keeps = vec![Keep::All; n_layers];
        let mut choices = vec![keeps.clone()];
        for less in [Keep::Products, Keep::Mixer, Keep::Input] {
            for layer in 0..n_layers {
                keeps[layer] = less;
                choices.push(keeps.clone());
            }
        }
        choices
    }

    /// Allocates all that rows of up to `n_tokens` need for training, so that what does not fit fails before the first one.
    ///
    /// # Errors
    /// [`Error::Kernel`] if the GPU has no room.
    pub fn reserve(&mut self, model: &Model, n_tokens: usize) -> Result<()> {
        let (config, dtype, device) = (model.config(), model.dtype(), model.device());
        let arena = self.prepare(config, dtype, device, &[0, n_tokens as u32], None)?;
        if let Some(lora) = model.lora() {
            arena.lora.reserve(config, lora, n_tokens)?;
        }
        arena.gradient.resize(config, n_tokens)
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
        arena.keeps.clone_from(&self.keeps);
        arena
            .keeps
            .resize(config.layer_types.len(), Keep::default());
        let mut least = [Keep::All; 2];
        for (layer, keep) in arena.layers.iter_mut().zip(&arena.keeps) {
            layer.resize(config, n_tokens, *keep)?;
            let least = &mut least[layer.lender()];
            *least = (*least).min(*keep);
        }
        for (lent, least) in arena.lent.iter_mut().zip(least) {
            lent.resize_lent(config, n_tokens, least)?;
        }
        arena.last.resize(config, n_tokens)?;
        if least.into_iter().any(|least| least < Keep::All) {
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
            keeps: vec![Keep::default(); layer_types.len()],
            lent: [LayerType::Linear, LayerType::Full]
                .map(|layer_type| block::Saved::new(layer_type, dtype, device)),
            last: Last::new(dtype, device),
            scratch: Scratch::new(dtype, device),
            gradient: Gradient::new(dtype, device),
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
        let layers = self.layers.iter().chain(&self.lent);
        let layers = layers.flat_map(block::Saved::tensors);
        layers
            .chain(self.last.tensors())
            .chain(self.scratch.tensors())
            .chain(self.gradient.tensors())
            .map(|(_, tensor)| footprint(tensor.bytes()))
            .sum()
    }
}

/// The same four methods for a struct of one arena a module.
macro_rules! arenas {
    ($name:ident) => {
        impl $name {
            pub fn new(dtype: DType, device: Device) -> Self {
                $name {
                    block: block::$name::new(dtype, device),
                    delta_net: delta_net::$name::new(dtype, device),
                    attention: attention::$name::new(dtype, device),
                    mlp: mlp::$name::new(dtype, device),
                }
            }

            pub fn resize(&mut self, config: &Config, n_tokens: usize) -> Result<()> {
                self.block.resize(config, n_tokens)?;
                self.delta_net.resize(config, n_tokens)?;
                self.attention.resize(config, n_tokens)?;
                self.mlp.resize(config, n_tokens)
            }

            pub fn bytes_for(config: &Config, n_tokens: usize, dtype: DType) -> usize {
                block::$name::bytes_for(config, n_tokens, dtype)
                    + delta_net::$name::bytes_for(config, n_tokens, dtype)
                    + attention::$name::bytes_for(config, n_tokens, dtype)
                    + mlp::$name::bytes_for(config, n_tokens, dtype)
            }

            pub fn tensors(&self) -> Vec<(&'static str, &Tensor)> {
                let mut tensors = self.block.tensors();
                tensors.extend(self.delta_net.tensors());
                tensors.extend(self.attention.tensors());
                tensors.extend(self.mlp.tensors());
                tensors
            }
        }
    };
}
arenas!(Scratch);
arenas!(Gradient);

impl Scratch {
    /// As `resize`, for a layer that keeps its own.
    pub fn resize_own(
        &mut self,
        layer_type: LayerType,
        config: &Config,
        n_tokens: usize,
    ) -> Result<()> {
        self.block.resize(config, n_tokens)?;
        match layer_type {
            LayerType::Linear => self.delta_net.resize(config, n_tokens)?,
            LayerType::Full => self.attention.resize(config, n_tokens)?,
        }
        self.mlp.resize(config, n_tokens)
    }

    /// Bytes of `resize_own`.
    pub fn own_bytes_for(
        layer_type: LayerType,
        config: &Config,
        n_tokens: usize,
        dtype: DType,
    ) -> usize {
        let mixer = match layer_type {
            LayerType::Linear => delta_net::Scratch::bytes_for(config, n_tokens, dtype),
            LayerType::Full => attention::Scratch::bytes_for(config, n_tokens, dtype),
        };
        block::Scratch::bytes_for(config, n_tokens, dtype)
            + mixer
            + mlp::Scratch::bytes_for(config, n_tokens, dtype)
    }
}
