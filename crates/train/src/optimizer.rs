//! AdamW over a model's trainable tensors: the moments, who decays, and clipping at the global norm.

use kernel::ops::{adamw, grad_norm};
use kernel::{DType, Device, Tensor};

use crate::error::Result;
use crate::job::OptimizerConfig;

/// Moments and scalars of AdamW; tensors in the order of the model's trainable names.
///
/// w ← w − lr·wd·w, m ← β₁m + (1−β₁)g, v ← β₂v + (1−β₂)g², w ← w − lr · (m / (1−β₁ᵗ)) / (√(v / (1−β₂ᵗ)) + ε).
/// Source: arXiv 1711.05101, as torch.optim.AdamW.
#[derive(Debug)]
pub struct AdamW {
    config: OptimizerConfig,
    /// Updates made so far.
    pub steps: u64,
    /// First moments, shapes and device of the weights.
    pub m: Vec<Tensor>,
    /// Second moments, as `m`.
    pub v: Vec<Tensor>,
    /// Decay of each tensor.
    weight_decay: Vec<f32>,
}

impl AdamW {
    /// Zero moments for these tensors, by name.
    ///
    /// # Errors
    /// The device has no room.
    pub fn new<'a>(
        config: &OptimizerConfig,
        tensors: impl Iterator<Item = (&'a str, &'a Tensor)>,
    ) -> Result<Self> {
        let mut optimizer = AdamW {
            config: config.clone(),
            steps: 0,
            m: Vec::new(),
            v: Vec::new(),
            weight_decay: Vec::new(),
        };
        for (name, tensor) in tensors {
            let zeros = || Tensor::zeros_on(tensor.shape(), moment_dtype(tensor), tensor.device());
            optimizer.m.push(zeros()?);
            optimizer.v.push(zeros()?);
            optimizer.weight_decay.push(match decays(name) {
                true => config.weight_decay as f32,
                false => 0.0,
            });
        }
        Ok(optimizer)
    }

    /// One update of all `weights` by `gradients` (f32, same order and shapes), which are multiplied by `grad_scale` first.
    ///
    /// # Errors
    /// Shapes that do not match.
    pub fn step(
        &mut self,
        weights: Vec<&mut Tensor>,
        gradients: &[Tensor],
        lr: f64,
        grad_scale: f32,
    ) -> Result<()> {
        assert_eq!(weights.len(), self.m.len(), "one moment a weight");
        assert_eq!(weights.len(), gradients.len(), "one gradient a weight");
        self.steps += 1;
        let update = adamw::Update {
            lr: lr as f32,
            beta1: self.config.betas[0] as f32,
            beta2: self.config.betas[1] as f32,
            eps: self.config.eps as f32,
            weight_decay: self.config.weight_decay as f32,
            step: self.steps,
            grad_scale,
            seed: 0,
        };
        let moments = self.m.iter_mut().zip(&mut self.v);
        let tensors = weights.into_iter().zip(gradients).zip(moments);
        // A tensor's number seeds its rounding, where it is stored as bf16: no two tensors share a pattern.
        let own = self.weight_decay.iter().zip(0..);
        let mut parts: Vec<adamw::Part> = tensors
            .zip(own)
            .map(|(((w, grad), (m, v)), (weight_decay, seed))| adamw::Part {
                w,
                m,
                v,
                grad,
                weight_decay: *weight_decay,
                seed,
            })
            .collect();
        adamw::step_all(&mut parts, &update)?;
        Ok(())
    }
}

/// Moments are f32, except those of bf16 weights on a GPU: there both are rounded stochastically, which keeps small updates on
/// average, and half the bytes are saved and moved.
pub fn moment_dtype(weight: &Tensor) -> DType {
    match weight.device() {
        Device::Cpu => DType::F32,
        Device::Cuda(_) => weight.dtype(),
    }
}

/// Global norm of all gradients together.
///
/// # Errors
/// Gradients that are not f32.
pub fn global_norm(gradients: &[Tensor]) -> Result<f32> {
    let gradients: Vec<&Tensor> = gradients.iter().collect();
    Ok(grad_norm::forward(&gradients)?)
}

/// What gradients are multiplied by so that their norm does not exceed `grad_clip`: min(1, grad_clip / (norm + 1e-6)); 0 turns clipping off.
/// Source: torch.nn.utils.clip_grad_norm_.
pub fn clip_factor(norm: f32, grad_clip: f64) -> f32 {
    if grad_clip == 0.0 {
        return 1.0;
    }
    (grad_clip as f32 / (norm + 1e-6)).min(1.0)
}

/// Whether weight decay applies to a tensor of this name: norms and biases (`dt_bias` too) are spared.
/// Source: transformers `get_decay_parameter_names`.
pub fn decays(name: &str) -> bool {
    let name = name.to_lowercase();
    let spared = ["bias", "layernorm", "rmsnorm"]
        .iter()
        .any(|part| name.contains(part))
        || name
            .split('.')
            .any(|part| part == "norm" || part.ends_with("_norm"));
    !spared
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn norms_and_biases_are_spared_from_decay() {
        for (name, expect) in [
            ("lm_head.weight", true),
            ("model.language_model.embed_tokens.weight", true),
            ("model.language_model.layers.0.linear_attn.A_log", true),
            (
                "model.language_model.layers.0.linear_attn.conv1d.weight",
                true,
            ),
            ("model.language_model.layers.0.linear_attn.dt_bias", false),
            (
                "model.language_model.layers.0.linear_attn.norm.weight",
                false,
            ),
            (
                "model.language_model.layers.0.input_layernorm.weight",
                false,
            ),
            (
                "model.language_model.layers.3.self_attn.k_norm.weight",
                false,
            ),
            ("model.language_model.norm.weight", false),
            (
                "base_model.model.model.language_model.layers.0.mlp.up_proj.lora_A.weight",
                true,
            ),
        ] {
            assert_eq!(decays(name), expect, "{name}");
        }
    }

    #[test]
    fn clip_factor_only_ever_shrinks() {
        assert_eq!(clip_factor(0.5, 1.0), 1.0);
        assert_eq!(clip_factor(4.0, 1.0), 1.0 / (4.0 + 1e-6));
        assert_eq!(clip_factor(4.0, 0.0), 1.0);
    }
}
