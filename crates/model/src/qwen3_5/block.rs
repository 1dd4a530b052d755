//! One layer: x + mixer(norm(x)), then the same with the feed-forward.
// T tokens (packed), D hidden.

use kernel::ops::rms_norm;
use kernel::{DType, Device, Tensor};

use crate::config::{Config, LayerType};
use crate::parameter::{Gradients, Parameter};
use crate::{Result, lora};

use super::attention::{self, Place};
use super::saved::{self, Keep, arena};
use super::state::LayerState;
use super::{delta_net, mlp};

#[derive(Debug)]
pub(crate) struct Weights {
    /// [D], scales by 1 + w
    pub input_layernorm: Parameter,
    pub mixer: Mixer,
    /// [D], scales by 1 + w
    pub post_attention_layernorm: Parameter,
    pub mlp: mlp::Weights,
}

#[derive(Debug)]
#[expect(
    clippy::large_enum_variant,
    reason = "one a layer, never moved after loading"
)]
pub(crate) enum Mixer {
    DeltaNet(delta_net::Weights),
    Attention(attention::Weights),
}

/// What backward needs of one layer.
#[derive(Debug)]
pub(crate) struct Saved {
    pub input: Input,
    pub residual: Residual,
    pub mixer: MixerSaved,
    pub mlp: mlp::Saved,
    /// In the place of the shared scratch where the layer keeps all.
    own: saved::Scratch,
}

#[derive(Debug)]
pub(crate) enum MixerSaved {
    DeltaNet(delta_net::Saved),
    Attention(attention::Saved),
}

arena! {
    /// The residual stream of one layer before the mixer.
    Input(c, t) {
        /// [T,D]
        x_td: act [t, c.hidden_size],
    }
}

arena! {
    /// The residual stream of one layer, and its norms.
    Residual(c, t) {
        /// Reciprocal norm before the mixer [T].
        rstd_t: f32 [t],
        /// After the mixer [T,D].
        mid_td: act [t, c.hidden_size],
        /// Its reciprocal norm [T].
        mid_rstd_t: f32 [t],
    }
}

arena! {
    Scratch(c, t) {
        /// Input of the mixer [T,D].
        normed_td: act [t, c.hidden_size],
        /// Input of the feed-forward [T,D].
        mid_normed_td: act [t, c.hidden_size],
    }
}

arena! {
    Gradient(c, t) {
        /// Gradient of the residual stream, f32 because every layer adds to it [T,D].
        d_x_td: f32 [t, c.hidden_size],
        /// The same as it enters a branch, in the type of the products there [T,D].
        d_out_td: act [t, c.hidden_size],
        /// [T,D]
        d_normed_td: act [t, c.hidden_size],
    }
}

/// What the layers of one pass share.
pub(crate) struct Pass<'a> {
    pub cu_seqlens: &'a [u32],
    pub place: Place<'a>,
}

impl Saved {
    pub fn new(layer_type: LayerType, dtype: DType, device: Device) -> Self {
        Saved {
            input: Input::new(dtype, device),
            residual: Residual::new(dtype, device),
            mixer: match layer_type {
                LayerType::Linear => MixerSaved::DeltaNet(delta_net::Saved::new(dtype, device)),
                LayerType::Full => MixerSaved::Attention(attention::Saved::new(dtype, device)),
            },
            mlp: mlp::Saved::new(dtype, device),
            own: saved::Scratch::new(dtype, device),
        }
    }

    /// Sizes what the layer keeps for `n_tokens`.
    pub fn resize(&mut self, config: &Config, n_tokens: usize, keep: Keep) -> Result<()> {
        self.input.resize(config, n_tokens)?;
        if keep >= Keep::Mixer {
            self.resize_mixer(config, n_tokens)?;
        }
        if keep >= Keep::Products {
            self.mlp.resize(config, n_tokens)?;
        }
        if keep == Keep::All {
            self.own.resize_own(self.layer_type(), config, n_tokens)?;
        }
        Ok(())
    }

    /// Sizes what layers of which the least keeps `least` have to borrow.
    pub fn resize_lent(&mut self, config: &Config, n_tokens: usize, least: Keep) -> Result<()> {
        if least < Keep::Mixer {
            self.resize_mixer(config, n_tokens)?;
        }
        if least < Keep::Products {
            self.mlp.resize(config, n_tokens)?;
        }
        Ok(())
    }

    fn resize_mixer(&mut self, config: &Config, n_tokens: usize) -> Result<()> {
        self.residual.resize(config, n_tokens)?;
        match &mut self.mixer {
            MixerSaved::DeltaNet(saved) => saved.resize(config, n_tokens),
            MixerSaved::Attention(saved) => saved.resize(config, n_tokens),
        }
    }

    /// Exchanges with `lent` what a layer that keeps `keep` does not own, and its own scratch with the shared one if it keeps that;
    /// the same call gives all back.
    pub fn exchange(&mut self, lent: &mut Saved, scratch: &mut saved::Scratch, keep: Keep) {
        if keep < Keep::Mixer {
            std::mem::swap(&mut self.residual, &mut lent.residual);
            std::mem::swap(&mut self.mixer, &mut lent.mixer);
        }
        if keep < Keep::Products {
            std::mem::swap(&mut self.mlp, &mut lent.mlp);
        }
        if keep == Keep::All {
            std::mem::swap(&mut self.own, scratch);
        }
    }

    fn layer_type(&self) -> LayerType {
        match self.mixer {
            MixerSaved::DeltaNet(_) => LayerType::Linear,
            MixerSaved::Attention(_) => LayerType::Full,
        }
    }

    /// Index of the layer type, for what is there once for each type.
    pub fn lender(&self) -> usize {
        match self.layer_type() {
            LayerType::Linear => 0,
            LayerType::Full => 1,
        }
    }

    pub fn bytes_for(
        layer_type: LayerType,
        config: &Config,
        n_tokens: usize,
        dtype: DType,
        keep: Keep,
    ) -> usize {
        [Keep::Input, Keep::Mixer, Keep::Products, Keep::All]
            .into_iter()
            .filter(|part| *part <= keep)
            .map(|part| Saved::part_bytes(layer_type, config, n_tokens, dtype, part))
            .sum()
    }

    /// Bytes of `resize_lent`.
    pub fn lent_bytes_for(
        layer_type: LayerType,
        config: &Config,
        n_tokens: usize,
        dtype: DType,
        least: Keep,
    ) -> usize {
        [Keep::Mixer, Keep::Products]
            .into_iter()
            .filter(|part| least < *part)
            .map(|part| Saved::part_bytes(layer_type, config, n_tokens, dtype, part))
            .sum()
    }

    /// Bytes of what `part` keeps beyond the step below it.
    fn part_bytes(
        layer_type: LayerType,
        config: &Config,
        n_tokens: usize,
        dtype: DType,
        part: Keep,
    ) -> usize {
        match (part, layer_type) {
            (Keep::Input, _) => Input::bytes_for(config, n_tokens, dtype),
            (Keep::Mixer, LayerType::Linear) => {
                Residual::bytes_for(config, n_tokens, dtype)
                    + delta_net::Saved::bytes_for(config, n_tokens, dtype)
            }
            (Keep::Mixer, LayerType::Full) => {
                Residual::bytes_for(config, n_tokens, dtype)
                    + attention::Saved::bytes_for(config, n_tokens, dtype)
            }
            (Keep::Products, _) => mlp::Saved::bytes_for(config, n_tokens, dtype),
            (Keep::All, _) => saved::Scratch::own_bytes_for(layer_type, config, n_tokens, dtype),
        }
    }

    pub fn tensors(&self) -> Vec<(&'static str, &Tensor)> {
        let mut tensors = self.input.tensors();
        tensors.extend(self.residual.tensors());
        tensors.extend(match &self.mixer {
            MixerSaved::DeltaNet(saved) => saved.tensors(),
            MixerSaved::Attention(saved) => saved.tensors(),
        });
        tensors.extend(self.mlp.tensors());
        tensors.extend(self.own.tensors());
        tensors
    }
}

impl Weights {
    pub fn zeros(layer_type: LayerType, config: &Config, dtype: DType) -> Self {
        Weights {
            input_layernorm: Parameter::zeros(&[config.hidden_size], dtype),
            mixer: match layer_type {
                LayerType::Linear => Mixer::DeltaNet(delta_net::Weights::zeros(config, dtype)),
                LayerType::Full => Mixer::Attention(attention::Weights::zeros(config, dtype)),
            },
            post_attention_layernorm: Parameter::zeros(&[config.hidden_size], dtype),
            mlp: mlp::Weights::zeros(config, dtype),
        }
    }

    /// out_td assigned from `saved.input.x_td`.
    pub fn forward(
        &self,
        out_td: &mut Tensor,
        saved: &mut Saved,
        scratch: &mut saved::Scratch,
        pass: &Pass,
        lora: &mut lora::Scratch,
    ) -> Result<()> {
        self.mix(saved, scratch, pass, lora)?;
        self.feed_forward(out_td, saved, scratch, pass.place.eps, lora)
    }

    /// Fills what the mixer saves, and the residual stream behind it.
    fn mix(
        &self,
        saved: &mut Saved,
        scratch: &mut saved::Scratch,
        pass: &Pass,
        lora: &mut lora::Scratch,
    ) -> Result<()> {
        let eps = pass.place.eps;
        // 1. normalise
        self.normalise_input(saved, scratch, eps)?;
        // 2. mix
        match (&self.mixer, &mut saved.mixer) {
            (Mixer::DeltaNet(weights), MixerSaved::DeltaNet(kept)) => weights.forward(
                &mut saved.residual.mid_td,
                &saved.input.x_td,
                kept,
                &mut scratch.delta_net,
                &scratch.block.normed_td,
                pass.cu_seqlens,
                eps,
                lora,
            )?,
            (Mixer::Attention(weights), MixerSaved::Attention(kept)) => weights.forward(
                &mut saved.residual.mid_td,
                &saved.input.x_td,
                kept,
                &mut scratch.attention,
                &scratch.block.normed_td,
                pass.cu_seqlens,
                &pass.place,
                lora,
            )?,
            _ => unreachable!("an arena is made from the same layer types as its model"),
        }
        Ok(())
    }

    /// `d_x_td` and `d_out_td` of `gradient.block` come in as the gradient of the layer's output and leave as that of its input.
    /// What `keep` did not keep is computed again first; a layer that keeps all finds it in `scratch`, as its forward pass left it.
    pub fn backward(
        &self,
        grads: &mut Gradients,
        gradient: &mut saved::Gradient,
        saved: &mut Saved,
        keep: Keep,
        scratch: &mut saved::Scratch,
        pass: &Pass,
        lora: &mut lora::Scratch,
    ) -> Result<()> {
        let eps = pass.place.eps;
        if keep < Keep::Mixer {
            self.mix(saved, scratch, pass, lora)?;
        }
        let Gradient {
            d_x_td,
            d_out_td,
            d_normed_td,
        } = &mut gradient.block;
        let kept_all = keep == Keep::All;
        // 4. feed forward
        if !kept_all {
            self.normalise_mid(saved, scratch, eps)?;
        }
        if keep < Keep::Products {
            self.mlp
                .project(&mut saved.mlp, &scratch.block.mid_normed_td, lora)?;
        }
        self.mlp.backward(
            d_normed_td,
            grads,
            &mut gradient.mlp,
            d_out_td,
            &saved.mlp,
            &mut scratch.mlp,
            kept_all,
            &scratch.block.mid_normed_td,
            lora,
        )?;
        // 3. normalise
        rms_norm::backward_accumulate(
            d_x_td,
            d_out_td,
            grads.of(&self.post_attention_layernorm),
            d_normed_td,
            &saved.residual.mid_td,
            &self.post_attention_layernorm.tensor,
            &saved.residual.mid_rstd_t,
        )?;
        // 2. mix
        if !kept_all {
            self.normalise_input(saved, scratch, eps)?;
        }
        match (&self.mixer, &mut saved.mixer) {
            (Mixer::DeltaNet(weights), MixerSaved::DeltaNet(kept)) => weights.backward(
                d_normed_td,
                grads,
                &mut gradient.delta_net,
                d_out_td,
                kept,
                &mut scratch.delta_net,
                kept_all,
                &scratch.block.normed_td,
                pass.cu_seqlens,
                eps,
                lora,
            )?,
            (Mixer::Attention(weights), MixerSaved::Attention(kept)) => weights.backward(
                d_normed_td,
                grads,
                &mut gradient.attention,
                d_out_td,
                kept,
                &mut scratch.attention,
                kept_all,
                &scratch.block.normed_td,
                pass.cu_seqlens,
                &pass.place,
                lora,
            )?,
            _ => unreachable!("an arena is made from the same layer types as its model"),
        }
        // 1. normalise
        rms_norm::backward_accumulate(
            d_x_td,
            d_out_td,
            grads.of(&self.input_layernorm),
            d_normed_td,
            &saved.input.x_td,
            &self.input_layernorm.tensor,
            &saved.residual.rstd_t,
        )?;
        Ok(())
    }

    /// New tokens after what the states hold; out_td assigned from `saved.input.x_td`.
    pub fn step(
        &self,
        out_td: &mut Tensor,
        states: Vec<&mut LayerState>,
        saved: &mut Saved,
        scratch: &mut saved::Scratch,
        step_scratch: &mut delta_net::StepScratch,
        place: &Place,
        lora: &mut lora::Scratch,
    ) -> Result<()> {
        // 1. normalise
        self.normalise_input(saved, scratch, place.eps)?;
        // 2. mix
        match (&self.mixer, &mut saved.mixer) {
            (Mixer::DeltaNet(weights), MixerSaved::DeltaNet(kept)) => weights.step(
                &mut saved.residual.mid_td,
                &saved.input.x_td,
                &mut LayerState::delta_nets(states),
                kept,
                &mut scratch.delta_net,
                step_scratch,
                &scratch.block.normed_td,
                place.eps,
                lora,
            )?,
            (Mixer::Attention(weights), MixerSaved::Attention(kept)) => weights.step(
                &mut saved.residual.mid_td,
                &saved.input.x_td,
                &mut LayerState::attentions(states),
                kept,
                &mut scratch.attention,
                &scratch.block.normed_td,
                place,
                lora,
            )?,
            _ => unreachable!("an arena is made from the same layer types as its model"),
        }
        // 3. normalise
        // 4. feed forward
        self.feed_forward(out_td, saved, scratch, place.eps, lora)
    }

    fn normalise_input(
        &self,
        saved: &mut Saved,
        scratch: &mut saved::Scratch,
        eps: f32,
    ) -> Result<()> {
        rms_norm::forward(
            &mut scratch.block.normed_td,
            &mut saved.residual.rstd_t,
            &saved.input.x_td,
            &self.input_layernorm.tensor,
            eps,
        )?;
        Ok(())
    }

    fn normalise_mid(
        &self,
        saved: &mut Saved,
        scratch: &mut saved::Scratch,
        eps: f32,
    ) -> Result<()> {
        rms_norm::forward(
            &mut scratch.block.mid_normed_td,
            &mut saved.residual.mid_rstd_t,
            &saved.residual.mid_td,
            &self.post_attention_layernorm.tensor,
            eps,
        )?;
        Ok(())
    }

    fn feed_forward(
        &self,
        out_td: &mut Tensor,
        saved: &mut Saved,
        scratch: &mut saved::Scratch,
        eps: f32,
        lora: &mut lora::Scratch,
    ) -> Result<()> {
        self.normalise_mid(saved, scratch, eps)?;
        self.mlp.forward(
            out_td,
            &saved.residual.mid_td,
            &mut saved.mlp,
            &mut scratch.mlp,
            &scratch.block.mid_normed_td,
            lora,
        )
    }
}
