//! What training takes of a GPU's memory, from the configuration alone, so that it can be said before anything is loaded.

use kernel::DType;
use kernel::cuda::{DeviceProperties, footprint};
use kernel::ops::{
    attention, delta_gate, delta_inputs, gated_delta_rule, gated_rms_norm, grad_norm,
    linear_cross_entropy, low_rank, rms_norm,
};

use crate::config::{CONV_WIDTH, Config, LayerType};
use crate::lora::{self, LoraConfig};

use super::names;
use super::saved::{self, Keep, Saved};

/// A weight, or a part of an adapter.
#[derive(Debug, Clone, PartialEq)]
pub struct TensorSpec {
    /// Below the text model, such as `layers.0.mlp.up_proj.weight`.
    pub name: String,
    pub shape: Vec<usize>,
    pub dtype: DType,
}

impl TensorSpec {
    pub fn numel(&self) -> usize {
        self.shape.iter().product()
    }
}

/// One forward and backward pass of training.
#[derive(Debug, Clone, Copy)]
pub struct TrainPass<'a> {
    pub config: &'a Config,
    /// Of weights and activations.
    pub dtype: DType,
    /// None: all weights train.
    pub lora: Option<&'a LoraConfig>,
    pub n_tokens: usize,
    /// Most tokens of a document.
    pub longest: usize,
}

impl TrainPass<'_> {
    /// All weights, an adapter's behind the others.
    pub fn weights(&self) -> Vec<TensorSpec> {
        let mut specs = weights(self.config, self.dtype);
        if self.lora.is_some() {
            specs.extend(self.trained());
        }
        specs
    }

    /// The tensors that train, in the order of `Model::trainable_names`.
    pub fn trained(&self) -> Vec<TensorSpec> {
        match self.lora {
            Some(lora) => adapters(self.config, lora),
            None => weights(self.config, self.dtype),
        }
    }

    /// Bytes of activations and their gradients.
    pub fn activation_bytes(&self, keeps: &[Keep]) -> usize {
        let lora = self.lora.map_or(0, |lora| {
            lora::Scratch::bytes_for(self.config, lora, self.n_tokens, self.dtype)
        });
        Saved::bytes_for(self.config, self.n_tokens, self.dtype, keeps) + lora
    }

    /// Bytes of the scratch of ops: the largest one's, since all share one block.
    pub fn scratch_bytes(&self, card: DeviceProperties) -> usize {
        let c = self.config;
        let (t, dtype) = (self.n_tokens, self.dtype);
        let (h, v) = (c.linear_num_value_heads, c.linear_value_head_dim);
        let (g, k) = (c.linear_num_key_heads, c.linear_key_head_dim);
        let heads = [t, c.num_attention_heads, c.num_key_value_heads, c.head_dim];
        let head = [t, c.hidden_size, c.vocab_size];
        // Products of the layers need none: all their operands have the model's type.
        let adapters = self.lora.map_or(0, |lora| {
            let specs = adapters(c, lora).into_iter();
            let sides = specs.map(|spec| [t, spec.numel() / lora.rank, lora.rank]);
            let bytes = sides.map(|dims| low_rank::backward_scratch_bytes(card, dims, dtype));
            bytes.max().unwrap_or(0)
        });
        let ops = [
            linear_cross_entropy::scratch_bytes(card, head, dtype, DType::F32),
            attention::backward_scratch_bytes(card, heads, self.longest),
            gated_delta_rule::scratch_bytes([t, h, g, k, v], dtype),
            delta_inputs::backward_scratch_bytes(card, [t, h, g, k, v]),
            delta_gate::backward_scratch_bytes(card, [t, h]),
            gated_rms_norm::backward_scratch_bytes(card, t * h, v),
            rms_norm::backward_scratch_bytes(card, t, c.hidden_size),
            rms_norm::backward_scratch_bytes(card, t * c.num_attention_heads, c.head_dim),
            adapters,
            grad_norm::scratch_bytes(self.trained().iter().map(TensorSpec::numel)),
        ];
        footprint(ops.into_iter().max().unwrap_or(0))
    }

    /// Operations of matrix products, attention and delta rule that a backward pass repeats because they were not kept.
    pub fn repeated_operations(&self, keeps: &[Keep]) -> f64 {
        let keep = |layer: usize| keeps.get(layer).copied().unwrap_or_default();
        let layers = self.config.layer_types.iter().enumerate();
        layers
            .map(|(layer, layer_type)| match keep(layer) {
                Keep::All | Keep::Products => 0.0,
                Keep::Mixer => self.wide_operations(),
                Keep::Input => self.wide_operations() + self.mixer_operations(*layer_type),
            })
            .sum()
    }

    /// Bytes that a backward pass moves to repeat norms, convolutions and gates that were not kept.
    pub fn repeated_bytes(&self, keeps: &[Keep]) -> f64 {
        let keep = |layer: usize| keeps.get(layer).copied().unwrap_or_default();
        let layers = self.config.layer_types.iter().enumerate();
        let written: usize = layers
            .filter(|(layer, _)| keep(*layer) < Keep::All)
            .map(|(_, layer_type)| {
                saved::Scratch::own_bytes_for(*layer_type, self.config, self.n_tokens, self.dtype)
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
                let h = c.linear_num_value_heads;
                let value_width = h * c.linear_value_head_dim;
                let width = c.conv_channels() + 2 * value_width + 2 * h;
                // A chunk's pairs twice, the state three times: measured at a quarter of the products' rate.
                let pairs = 2 * gated_delta_rule::CHUNK + 3 * c.linear_key_head_dim;
                (width, 4 * 2 * value_width * pairs)
            }
            LayerType::Full => {
                let query_width = c.num_attention_heads * c.head_dim;
                let width = 3 * query_width + 2 * c.num_key_value_heads * c.head_dim;
                (width, 2 * query_width * self.longest)
            }
        };
        self.n_tokens as f64 * (2 * c.hidden_size * width + mixing) as f64
    }
}

/// Every weight, in the order of the walk in `names`.
pub fn weights(config: &Config, dtype: DType) -> Vec<TensorSpec> {
    let c = config;
    let (hidden, wide) = (c.hidden_size, c.intermediate_size);
    let table = || vec![c.vocab_size, hidden];
    let mut specs = Vec::new();
    let mut add = |name: String, shape: Vec<usize>| {
        let dtype = match names::keeps_f32(&name) {
            true => DType::F32,
            false => dtype,
        };
        specs.push(TensorSpec { name, shape, dtype });
    };
    add("embed_tokens.weight".to_owned(), table());
    for (layer_idx, layer_type) in c.layer_types.iter().enumerate() {
        let mut add = |name: &str, shape: &[usize]| {
            add(format!("layers.{layer_idx}.{name}"), shape.to_vec());
        };
        add("input_layernorm.weight", &[hidden]);
        match layer_type {
            LayerType::Linear => {
                let h = c.linear_num_value_heads;
                let value_width = h * c.linear_value_head_dim;
                add("linear_attn.A_log", &[h]);
                add(
                    "linear_attn.conv1d.weight",
                    &[c.conv_channels(), 1, CONV_WIDTH],
                );
                add("linear_attn.dt_bias", &[h]);
                add("linear_attn.in_proj_a.weight", &[h, hidden]);
                add("linear_attn.in_proj_b.weight", &[h, hidden]);
                add(
                    "linear_attn.in_proj_qkv.weight",
                    &[c.conv_channels(), hidden],
                );
                add("linear_attn.in_proj_z.weight", &[value_width, hidden]);
                add("linear_attn.norm.weight", &[c.linear_value_head_dim]);
                add("linear_attn.out_proj.weight", &[hidden, value_width]);
            }
            LayerType::Full => {
                let query_width = c.num_attention_heads * c.head_dim;
                let key_width = c.num_key_value_heads * c.head_dim;
                add("self_attn.k_norm.weight", &[c.head_dim]);
                add("self_attn.k_proj.weight", &[key_width, hidden]);
                add("self_attn.o_proj.weight", &[hidden, query_width]);
                add("self_attn.q_norm.weight", &[c.head_dim]);
                add("self_attn.q_proj.weight", &[2 * query_width, hidden]);
                add("self_attn.v_proj.weight", &[key_width, hidden]);
            }
        }
        add("post_attention_layernorm.weight", &[hidden]);
        add("mlp.down_proj.weight", &[hidden, wide]);
        add("mlp.gate_proj.weight", &[wide, hidden]);
        add("mlp.up_proj.weight", &[wide, hidden]);
    }
    add("norm.weight".to_owned(), vec![hidden]);
    if !c.tie_word_embeddings {
        add("lm_head.weight".to_owned(), table());
    }
    specs
}

/// A and B of every adapted layer, f32.
pub fn adapters(config: &Config, lora: &LoraConfig) -> Vec<TensorSpec> {
    let is_target = |module: &str| {
        lora.targets.is_empty() || lora.targets.iter().any(|t| t == names::last_part(module))
    };
    let linears = weights(config, DType::F32).into_iter().filter_map(|spec| {
        let module = names::linear_module(&spec.name)?.to_owned();
        Some((module, spec.shape))
    });
    linears
        .filter(|(module, _)| is_target(module))
        .flat_map(|(module, shape)| {
            let part = |name: &str, shape: [usize; 2]| TensorSpec {
                name: format!("{module}.{name}.weight"),
                shape: shape.to_vec(),
                dtype: DType::F32,
            };
            [
                part("lora_A", [lora.rank, shape[1]]),
                part("lora_B", [shape[0], lora.rank]),
            ]
        })
        .collect()
}
