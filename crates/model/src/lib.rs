//! Qwen3.5 as a function with saved state: configuration, checkpoints, forward and backward, LoRA, quantized formats.
//!
//! The only crate that knows Hugging Face tensor names. It knows no optimizer, no data set, no request and no text.

#![allow(
    rustdoc::broken_intra_doc_links,
    reason = "a shape such as [T,D] is no link"
)]

pub mod checkpoint;
pub mod config;
mod error;
#[doc(hidden)]
pub mod fuzz;
mod linear;
pub mod lora;
mod parameter;
mod peft;
pub mod quant;
pub mod qwen3_5;
mod random;
mod rows;

use std::path::Path;

use kernel::{DType, Device, Tensor};

pub use checkpoint::SaveOptions;
pub use config::{Config, LayerType};
pub use error::{Error, Result};
pub use lora::LoraConfig;
pub use parameter::Gradients;
pub use qwen3_5::memory::{TensorSpec, TrainPass};
pub use qwen3_5::{Keep, Saved, SequenceState};

/// One packed row of documents.
#[derive(Debug, Clone, Copy)]
pub struct Batch<'a> {
    /// Token ids, documents laid end to end.
    pub tokens_t: &'a [u32],
    /// The id that position t must predict (already shifted), or -1 for none. The last position of a document is always -1.
    pub targets_t: &'a [i32],
    /// Document borders: n_docs + 1 offsets, the first 0, the last T.
    pub cu_seqlens: &'a [u32],
}

impl Batch<'_> {
    pub(crate) fn check(&self) -> Result<()> {
        if self.targets_t.len() != self.tokens_t.len() {
            return Err(Error::Batch {
                what: format!(
                    "{} targets for {} tokens",
                    self.targets_t.len(),
                    self.tokens_t.len()
                ),
            });
        }
        check_borders(self.tokens_t, self.cu_seqlens)
    }
}

fn check_borders(tokens_t: &[u32], cu_seqlens: &[u32]) -> Result<()> {
    let ordered = cu_seqlens.windows(2).all(|pair| pair[0] < pair[1]);
    let spans = cu_seqlens.len() >= 2
        && cu_seqlens[0] == 0
        && cu_seqlens.last().copied() == u32::try_from(tokens_t.len()).ok();
    if ordered && spans {
        return Ok(());
    }
    Err(Error::Batch {
        what: format!(
            "cu_seqlens {cu_seqlens:?} do not rise from 0 to {} tokens",
            tokens_t.len()
        ),
    })
}

/// A model of any supported family, chosen by `model_type`.
#[derive(Debug)]
pub enum Model {
    Qwen3_5(qwen3_5::Qwen3_5),
}

impl Model {
    /// Reads a Hugging Face folder: `config.json`, one or several safetensors, nested (`model.language_model.*`) or text-only (`model.*`)
    /// names, tied or untied head. Block-quantized FP8 weights are dequantized to `dtype`. `visual` and `mtp` tensors stay mapped, to be
    /// carried through [`Model::save`] byte for byte; do not change the folder's files in place while the model lives.
    ///
    /// # Errors
    /// A missing or unreadable file, another architecture, a tensor that is missing, unexpected, of another shape or of an unreadable type.
    pub fn load(dir: &Path, dtype: DType) -> Result<Model> {
        let config = Config::load(dir)?;
        Ok(Model::Qwen3_5(qwen3_5::Qwen3_5::load(dir, config, dtype)?))
    }

    /// A fresh model: matrices normal(0, `initializer_range`), convolutions uniform(±1/√4), (1 + w) norms 0, gated norms 1,
    /// `A_log` = ln uniform(0, 16), `dt_bias` 1. The same seed gives the same weights on every platform.
    ///
    /// # Errors
    /// None today: the weights are made on the host, see [`Model::to_device`].
    pub fn init(config: Config, seed: u64, dtype: DType) -> Result<Model> {
        Ok(Model::Qwen3_5(qwen3_5::Qwen3_5::init(config, seed, dtype)))
    }

    /// Writes the folder that [`Model::load`] reads, each tensor in the type that it was read in unless `dtype` says otherwise
    /// (then `A_log` and the gated norms stay f32, as released). Shards of at most 5 GB. See [`Model::save_with`].
    ///
    /// # Errors
    /// As [`Model::save_with`].
    pub fn save(&self, dir: &Path, dtype: Option<DType>) -> Result<()> {
        self.save_with(
            dir,
            &SaveOptions {
                dtype,
                ..SaveOptions::default()
            },
        )
    }

    /// As [`Model::save`], with all options. Everything is written beside `dir`, flushed, then renamed into place.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::UnmergedAdapter`] while LoRA is attached.
    pub fn save_with(&self, dir: &Path, options: &SaveOptions) -> Result<()> {
        self.get().save(dir, options)
    }

    pub fn config(&self) -> &Config {
        &self.get().config
    }

    /// Storage type of the weights and activations.
    pub fn dtype(&self) -> DType {
        self.get().dtype
    }

    /// Names of the trainable tensors in a fixed order: checkpoint names, or PEFT names while LoRA is attached.
    pub fn trainable_names(&self) -> Vec<String> {
        self.get().trainable_names()
    }

    /// The trainable tensors, in the order of [`Model::trainable_names`].
    pub fn trainable_mut(&mut self) -> Vec<&mut Tensor> {
        self.get_mut().trainable_mut()
    }

    /// The trainable tensors, in the order of [`Model::trainable_names`].
    pub fn trainable(&self) -> Vec<&Tensor> {
        self.get().trainable()
    }

    /// f32 zeros, one tensor for each trainable one.
    ///
    /// # Errors
    /// [`Error::Kernel`] if the GPU has no room.
    pub fn gradients(&self) -> Result<Gradients> {
        let device = self.device();
        let zeros = |tensor: &Tensor| Ok(Tensor::zeros_on(tensor.shape(), DType::F32, device)?);
        let tensors = self.trainable().into_iter().map(zeros);
        Ok(Gradients::new(
            tensors.collect::<Result<_>>()?,
            self.get().trains_linear(),
        ))
    }

    /// Where the weights are and the arithmetic happens.
    pub fn device(&self) -> Device {
        self.get().device
    }

    /// Moves the weights, and an adapter beside them, to `device`; states, gradients and [`Saved`] are made anew by the caller.
    ///
    /// # Errors
    /// [`Error::Kernel`] if the GPU has no room or failed; the model is then of no use.
    pub fn to_device(mut self, device: Device) -> Result<Model> {
        self.get_mut().move_to(device)?;
        Ok(self)
    }

    /// Negative log-likelihood of each target (natural log; 0 where there is none) and, added to `grads`, the gradient of `d_nll · Σ nll`.
    /// `dropout_seed` feeds LoRA dropout; the same seed drops the same elements.
    ///
    /// # Errors
    /// [`Error::Batch`] for borders that do not fit, [`Error::Kernel`] for an id beyond the vocabulary.
    pub fn forward_backward(
        &self,
        saved: &mut Saved,
        grads: &mut Gradients,
        batch: &Batch,
        d_nll: f32,
        dropout_seed: u64,
    ) -> Result<Vec<f32>> {
        self.get()
            .forward_backward(saved, grads, batch, d_nll, dropout_seed)
    }

    /// Negative log-likelihood of each target, without dropout and without gradients.
    ///
    /// # Errors
    /// As [`Model::forward_backward`].
    pub fn nll(&self, saved: &mut Saved, batch: &Batch) -> Result<Vec<f32>> {
        self.get().nll(saved, batch)
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
        self.get().hidden_states(saved, tokens_t, cu_seqlens)
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
        self.get().logits(saved, tokens_t, cu_seqlens)
    }

    /// Freezes the weights and puts a low-rank adapter beside each target: A kaiming-uniform (±1/√in), B 0, so that nothing changes yet.
    ///
    /// # Errors
    /// [`Error::LoraTarget`] for a name that is no linear layer, [`Error::LoraConfig`] for a rank or dropout out of range.
    pub fn attach_lora(&mut self, lora: &LoraConfig, seed: u64) -> Result<()> {
        lora::attach(self.get_mut(), lora, seed)?;
        let device = self.device();
        self.get_mut().move_to(device)
    }

    /// The attached adapter's settings.
    pub fn lora(&self) -> Option<&LoraConfig> {
        self.get().lora.as_ref()
    }

    /// Attaches the adapter of a PEFT folder (`adapter_config.json`, `adapter_model.safetensors`), replacing any attached one.
    ///
    /// # Errors
    /// A missing or unreadable file; a setting of adapter_config.json that changes the arithmetic in a way that is not computed here; a
    /// tensor without its other half, of NaN or infinite numbers, or that fits no linear layer; a target without tensors.
    pub fn load_adapter(&mut self, dir: &Path) -> Result<()> {
        peft::load(self.get_mut(), dir)?;
        let device = self.device();
        self.get_mut().move_to(device)
    }

    /// Writes the attached adapter as PEFT does; `base_name` becomes `base_model_name_or_path`.
    ///
    /// # Errors
    /// [`Error::NoAdapter`] without an adapter, [`Error::Io`].
    pub fn save_adapter(&self, dir: &Path, base_name: &str) -> Result<()> {
        peft::save(self.get(), dir, base_name)
    }

    /// Refuses weights that no model has, before they are written for others to use.
    ///
    /// # Errors
    /// [`Error::NotFinite`] with the first tensor that holds NaN or infinities; [`Error::Kernel`] if the GPU failed.
    pub fn check_finite(&self) -> Result<()> {
        self.get().check_finite()
    }

    /// W += scale · B A for every adapted layer; the adapter is gone and all weights train again.
    ///
    /// # Errors
    /// [`Error::NoAdapter`] without an adapter.
    pub fn merge_lora(&mut self) -> Result<()> {
        lora::merge(self.get_mut())
    }

    /// An empty sequence.
    ///
    /// # Errors
    /// [`Error::Kernel`] if the GPU has no room.
    pub fn new_state(&self) -> Result<SequenceState> {
        self.get().new_state()
    }

    /// Appends tokens to a sequence; logits of the last one [C] f32. Any split of the tokens into calls gives the same result.
    ///
    /// # Errors
    /// [`Error::Batch`] for no tokens, [`Error::Kernel`] for an id beyond the vocabulary; the state is then unusable.
    pub fn prefill(&self, state: &mut SequenceState, tokens_t: &[u32]) -> Result<Tensor> {
        self.get().prefill(state, tokens_t)
    }

    /// As [`Model::prefill`], with the logits of every new position [T,C] f32.
    ///
    /// # Errors
    /// As [`Model::prefill`].
    pub fn prefill_all(&self, state: &mut SequenceState, tokens_t: &[u32]) -> Result<Tensor> {
        self.get().prefill_all(state, tokens_t)
    }

    /// One token for each sequence, all through the same matrix products; logits [B,C] f32.
    ///
    /// # Errors
    /// As [`Model::prefill`], and [`Error::Batch`] if there are not as many tokens as states.
    pub fn step(&self, states: &mut [&mut SequenceState], tokens_b: &[u32]) -> Result<Tensor> {
        self.get().step(states, tokens_b)
    }

    fn get(&self) -> &qwen3_5::Qwen3_5 {
        match self {
            Model::Qwen3_5(model) => model,
        }
    }

    fn get_mut(&mut self) -> &mut qwen3_5::Qwen3_5 {
        match self {
            Model::Qwen3_5(model) => model,
        }
    }
}
