//! What training takes of a GPU's memory, from the configuration alone, so that it can be said before anything is loaded.

use kernel::DType;
use kernel::cuda::{DeviceProperties, footprint};
use kernel::ops::{
    attention, delta_gate, delta_inputs, gated_delta_rule, gated_rms_norm, grad_norm,
    linear_cross_entropy, low_rank, rms_norm,
};

use crate::config::{Config, LayerType};
use crate::lora::{self, LoraConfig};

use super::recompute::Recompute;
use super::saved::Saved;
use super::table::{TensorSpec, rows};
use super::{adapters, block};

/// One forward and backward pass of training.
#[derive(Debug, Clone, Copy)]
pub struct TrainPass<'a> {
    /// Of the model that trains.
    pub config: &'a Config,
    /// Of weights and activations.
    pub dtype: DType,
    /// None: all weights train.
    pub lora: Option<&'a LoraConfig>,
    /// Tokens of the row, over all documents.
    pub n_tokens: usize,
    /// Most tokens of a document.
    pub longest: usize,
}

impl TrainPass<'_> {
    /// All weights, an adapter's behind the others.
    pub fn weights(&self) -> Vec<TensorSpec> {
        let mut specs = self.base();
        if let Some(lora) = self.lora {
            specs.extend(adapters::specs(self.config, lora));
        }
        specs
    }

    /// The tensors that train, in the order of `Model::trainable_names`.
    pub fn trained(&self) -> Vec<TensorSpec> {
        match self.lora {
            Some(lora) => adapters::specs(self.config, lora),
            None => self.base(),
        }
    }

    /// The weights of the model without an adapter.
    fn base(&self) -> Vec<TensorSpec> {
        let rows = rows(self.config).into_iter();
        rows.map(|row| TensorSpec {
            dtype: row.dtype(self.dtype),
            name: row.name,
            shape: row.shape,
        })
        .collect()
    }

    /// Bytes of activations and their gradients.
    pub fn activation_bytes(&self, policy: &[Recompute]) -> usize {
        let lora = self.lora.map_or(0, |lora| {
            let n_adapters = adapters::specs(self.config, lora).len() / 2;
            lora::Scratch::bytes_for(n_adapters, lora.rank, self.n_tokens, self.dtype)
        });
        Saved::bytes_for(self.config, self.n_tokens, self.dtype, policy) + lora
    }

    /// Bytes of the scratch of ops: the largest one's, since all share one block.
    pub fn scratch_bytes(&self, gpu: DeviceProperties) -> usize {
        let c = self.config;
        let (t, dtype) = (self.n_tokens, self.dtype);
        let (h, v) = (c.linear_num_value_heads, c.linear_value_head_dim);
        let (g, k) = (c.linear_num_key_heads, c.linear_key_head_dim);
        let heads = [t, c.num_attention_heads, c.num_key_value_heads, c.head_dim];
        let head = [t, c.hidden_size, c.vocab_size];
        // Products of the layers need none: all their operands have the model's type.
        let adapters = self.lora.map_or(0, |lora| {
            let specs = adapters::specs(c, lora).into_iter();
            let sides = specs.map(|spec| [t, spec.numel() / lora.rank, lora.rank]);
            let bytes = sides.map(|dims| low_rank::backward_scratch_bytes(gpu, dims, dtype));
            bytes.max().unwrap_or(0)
        });
        let ops = [
            linear_cross_entropy::scratch_bytes(gpu, head, dtype, DType::F32),
            attention::backward_scratch_bytes(gpu, heads, self.longest),
            gated_delta_rule::scratch_bytes([t, h, g, k, v], dtype),
            delta_inputs::backward_scratch_bytes(gpu, [t, h, g, k, v]),
            delta_gate::backward_scratch_bytes(gpu, [t, h]),
            gated_rms_norm::backward_scratch_bytes(gpu, t * h, v),
            rms_norm::backward_scratch_bytes(gpu, t, c.hidden_size),
            rms_norm::backward_scratch_bytes(gpu, t * c.num_attention_heads, c.head_dim),
            adapters,
            grad_norm::scratch_bytes(self.trained().iter().map(TensorSpec::numel)),
        ];
        footprint(ops.into_iter().max().unwrap_or(0))
    }

    /// Operations of matrix products, attention and delta rule that a backward pass under this policy computes again.
    pub fn recomputed_operations(&self, policy: &[Recompute]) -> f64 {
        let layers = self.config.layer_types.iter().enumerate();
        layers
            .map(
                |(layer, layer_type)| match Recompute::of_layer(policy, layer) {
                    Recompute::Nothing | Recompute::Elementwise => 0.0,
                    Recompute::FeedForward => self.wide_operations(),
                    Recompute::Layer => self.wide_operations() + self.mixer_operations(*layer_type),
                },
            )
            .sum()
    }

    /// Bytes that a backward pass under this policy moves to compute norms, convolutions and gates again.
    pub fn recomputed_bytes(&self, policy: &[Recompute]) -> f64 {
        let layers = self.config.layer_types.iter().enumerate();
        let written: usize = layers
            .filter(|(layer, _)| Recompute::of_layer(policy, *layer) > Recompute::Nothing)
            .map(|(_, layer_type)| {
                block::Scratch::own_bytes_for(*layer_type, self.config, self.n_tokens, self.dtype)
            })
            .sum();
        // Half of what is read lies in a cache still: measured on an H100, as long as writing once and a half.
        1.5 * written as f64
    }

    /// The projections to the feed-forward's width.
    fn wide_operations(&self) -> f64 {
        let c = self.config;
        4.0 * (self.n_tokens * c.hidden_size) as f64 * c.intermediate_size as f64
    }

    fn mixer_operations(&self, layer_type: LayerType) -> f64 {
        let c = self.config;
        let (width, mixing) = match layer_type {
            LayerType::Linear => {
                let value_width = c.value_width();
                let width = c.conv_channels() + 2 * value_width + 2 * c.linear_num_value_heads;
                // A chunk's pairs twice, the state three times: measured at a quarter of the products' rate.
                let pairs = 2 * gated_delta_rule::CHUNK + 3 * c.linear_key_head_dim;
                (width, 4 * 2 * value_width * pairs)
            }
            LayerType::Full => {
                let query_width = c.query_width();
                let width = 3 * query_width + 2 * c.key_width();
                (width, 2 * query_width * self.longest)
            }
        };
        self.n_tokens as f64 * (2 * c.hidden_size * width + mixing) as f64
    }
}
