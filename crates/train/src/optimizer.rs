//! AdamW over a model's trainable tensors: the moments, who decays, and clipping at the global norm.

use kernel::ops::adamw_host::{HostMoments, HostStep, Stream};
use kernel::ops::{adamw, grad_norm};
use kernel::{DType, Device, Tensor};

use crate::error::Result;
use crate::job::OptimizerConfig;
use crate::ranks::{Owners, Ranks};

/// Moments and scalars of AdamW; tensors in the order of the model's trainable names.
///
/// w ← w − lr·wd·w, m ← β₁m + (1−β₁)g, v ← β₂v + (1−β₂)g², w ← w − lr · (m / (1−β₁ᵗ)) / (√(v / (1−β₂ᵗ)) + ε).
/// Source: arXiv 1711.05101, as torch.optim.AdamW.
#[derive(Debug)]
pub struct AdamW {
    config: OptimizerConfig,
    /// Updates made so far.
    pub steps: u64,
    /// Of weights and moments that are stored as bf16; stochastic, but where a bench measures what nearest would cost.
    pub rounding: adamw::Rounding,
    /// Which tensors have their moments here, and are updated here.
    pub owners: Owners,
    /// Of each tensor, with the weight's shape.
    pub moments: Vec<Moments>,
    /// Decay of each tensor.
    weight_decay: Vec<f32>,
    /// The way of moments in host memory through the GPU; None where there are none.
    stream: Option<Stream>,
}

/// First and second moments of one tensor.
#[derive(Debug)]
pub enum Moments {
    /// On the weight's device.
    Resident {
        /// The first moment.
        m: Tensor,
        /// The second.
        v: Tensor,
    },
    /// In pinned host memory, while the weight lies on a GPU.
    Host(HostMoments),
    /// With the rank that owns the tensor; here nothing but their shape and type.
    Elsewhere {
        /// The weight's.
        shape: Vec<usize>,
        /// The moments'.
        dtype: DType,
    },
}

impl AdamW {
    /// Zero moments for those of these tensors, by name, that are owned here; in host memory where `offloaded` says so of a tensor on a
    /// GPU (beyond its end: not).
    ///
    /// # Errors
    /// The device, or the host, has no room.
    pub fn new<'a>(
        config: &OptimizerConfig,
        tensors: impl Iterator<Item = (&'a str, &'a Tensor)>,
        owners: Owners,
        offloaded: &[bool],
    ) -> Result<Self> {
        let mut optimizer = AdamW {
            config: config.clone(),
            steps: 0,
            rounding: adamw::Rounding::Stochastic,
            owners,
            moments: Vec::new(),
            weight_decay: Vec::new(),
            stream: None,
        };
        for (idx, (name, tensor)) in tensors.enumerate() {
            let (shape, dtype) = (tensor.shape(), moment_dtype(tensor));
            optimizer.moments.push(match tensor.device() {
                _ if !optimizer.owners.has(idx) => Moments::Elsewhere {
                    shape: shape.to_vec(),
                    dtype,
                },
                Device::Cuda(cuda) if offloaded.get(idx) == Some(&true) => {
                    if optimizer.stream.is_none() {
                        optimizer.stream = Some(Stream::new(cuda)?);
                    }
                    Moments::Host(HostMoments::zeros(shape, dtype, cuda)?)
                }
                device => Moments::Resident {
                    m: written_zeros(shape, dtype, device)?,
                    v: written_zeros(shape, dtype, device)?,
                },
            });
            optimizer.weight_decay.push(match decays(name) {
                true => config.weight_decay as f32,
                false => 0.0,
            });
        }
        Ok(optimizer)
    }

    /// Starts to fetch moments from the host, beside the work that makes the gradients of the next update.
    ///
    /// # Errors
    /// The GPU failed.
    pub fn prefetch(&mut self) -> Result<()> {
        let Some(stream) = &mut self.stream else {
            return Ok(());
        };
        let hosted = self.moments.iter().filter_map(|moments| match moments {
            Moments::Host(moments) => Some(moments),
            Moments::Resident { .. } | Moments::Elsewhere { .. } => None,
        });
        Ok(stream.prefetch(&hosted.collect::<Vec<_>>())?)
    }

    /// One update of those of all `weights` that are owned here by `gradients` (f32, same order and shapes), which are multiplied by
    /// `grad_scale` first.
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
        assert_eq!(weights.len(), self.moments.len(), "moments for each weight");
        assert_eq!(weights.len(), gradients.len(), "one gradient a weight");
        self.steps += 1;
        let shared = adamw::Update {
            lr: lr as f32,
            beta1: self.config.betas[0] as f32,
            beta2: self.config.betas[1] as f32,
            eps: self.config.eps as f32,
            weight_decay: self.config.weight_decay as f32,
            step: self.steps,
            grad_scale,
            seed: 0,
            rounding: self.rounding,
        };
        let tensors = weights.into_iter().zip(gradients).zip(&mut self.moments);
        // A tensor's number seeds its rounding, where it is stored as bf16: no two tensors share a pattern.
        let own = self.weight_decay.iter().zip(0..);
        let (mut hosted, mut resident) = (Vec::new(), Vec::new());
        for (((w, grad), moments), (weight_decay, seed)) in tensors.zip(own) {
            let weight_decay = *weight_decay;
            match moments {
                Moments::Resident { m, v } => resident.push(adamw::Part {
                    w,
                    m,
                    v,
                    grad,
                    weight_decay,
                    seed,
                }),
                Moments::Host(moments) => hosted.push(HostStep {
                    w,
                    moments,
                    grad,
                    update: adamw::Update {
                        weight_decay,
                        seed,
                        ..shared
                    },
                }),
                Moments::Elsewhere { .. } => {}
            }
        }
        // The link to the host is what takes longest: it starts first, and the others are updated while the last pieces go back.
        if let Some(stream) = &mut self.stream {
            stream.step(&mut hosted)?;
        }
        adamw::step_all(&mut resident, &shared)?;
        Ok(())
    }
}

/// Zeros that have been written on a CPU. Pages that the first step read before it wrote them would each be mapped twice, and the
/// second time interrupts every other core: that took longer than the step itself.
fn written_zeros(shape: &[usize], dtype: DType, device: Device) -> Result<Tensor> {
    let mut tensor = Tensor::zeros_on(shape, dtype, device)?;
    if device == Device::Cpu {
        tensor.fill_zero()?;
    }
    Ok(tensor)
}

/// Moments are f32, except those of bf16 weights on a GPU: there both are rounded stochastically, which keeps small updates on
/// average, and half the bytes are saved and moved.
pub fn moment_dtype(weight: &Tensor) -> DType {
    match weight.device() {
        Device::Cpu => DType::F32,
        Device::Cuda(_) => weight.dtype(),
    }
}

/// Global norm of all gradients together, of which each rank adds those that it owns.
///
/// # Errors
/// Gradients that are not f32; a rank that is gone.
pub fn global_norm(gradients: &[Tensor], owners: &Owners, ranks: &Ranks) -> Result<f32> {
    let owned = gradients.iter().enumerate();
    let owned = owned.filter(|(tensor, _)| owners.has(*tensor));
    let owned: Vec<&Tensor> = owned.map(|(_, gradient)| gradient).collect();
    // The square of an f32 is exact in f64, so that one rank alone gets its norm back bit for bit.
    let norm = f64::from(grad_norm::forward(&owned)?);
    let mut squares = [norm * norm];
    ranks.sum(&mut squares)?;
    Ok(squares[0].sqrt() as f32)
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
