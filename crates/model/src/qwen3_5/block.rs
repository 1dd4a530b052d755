//! One layer: x + mixer(norm(x)), then the same with the feed-forward.
// T tokens (packed), D hidden.

use kernel::ops::rms_norm;
use kernel::{DType, Device, Tensor};

use crate::Result;
use crate::config::{Config, LayerType};
use crate::linear::Linear;
use crate::parameter::Parameter;

use super::arena::arena;
use super::pass::{Backward, Branch, BranchBackward, Pass};
use super::recompute::Recompute;
use super::state::LayerState;
use super::weights::{Part, Row, weights};
use super::{attention, delta_net, mlp};

/// The weights of one layer.
#[derive(Debug)]
pub(crate) struct Weights {
    pub norms: Norms,
    pub mixer: Mixer,
    pub mlp: mlp::Weights,
}

weights! {
    /// The norms before the mixer and before the feed-forward.
    Norms(c) {
        /// [D], scales by 1 + w
        input_layernorm: Plain "input_layernorm.weight" [c.hidden_size] Zero,
        /// [D], scales by 1 + w
        post_attention_layernorm: Plain "post_attention_layernorm.weight" [c.hidden_size] Zero,
    }
}

/// What lets tokens see each other.
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
    /// In the place of the shared scratch where nothing is recomputed.
    own: Scratch,
}

/// What backward needs of a mixer.
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
    /// The inputs of both branches.
    Normed(c, t) {
        /// Input of the mixer [T,D].
        normed_td: act [t, c.hidden_size],
        /// Input of the feed-forward [T,D].
        mid_normed_td: act [t, c.hidden_size],
    }
}

arena! {
    /// The gradient of the residual stream.
    StreamGradient(c, t) {
        /// f32 because every layer adds to it [T,D].
        d_x_td: f32 [t, c.hidden_size],
        /// The same as it enters a branch, in the type of the products there [T,D].
        d_out_td: act [t, c.hidden_size],
        /// [T,D]
        d_normed_td: act [t, c.hidden_size],
    }
}

/// Values that cost no matrix product, shared by all layers that recompute them.
#[derive(Debug)]
pub(crate) struct Scratch {
    pub stream: Normed,
    pub delta_net: delta_net::Scratch,
    pub attention: attention::Scratch,
    pub mlp: mlp::Scratch,
}

/// Gradients of activations, shared by all layers.
#[derive(Debug)]
pub(crate) struct Gradient {
    pub stream: StreamGradient,
    pub delta_net: delta_net::Gradient,
    pub attention: attention::Gradient,
    pub mlp: mlp::Gradient,
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
            own: Scratch::new(dtype, device),
        }
    }

    /// Sizes what the layer keeps of `n_tokens`.
    pub fn resize(&mut self, config: &Config, n_tokens: usize, recompute: Recompute) -> Result<()> {
        self.input.resize(config, n_tokens)?;
        if recompute < Recompute::Layer {
            self.resize_mixer(config, n_tokens)?;
        }
        if recompute < Recompute::FeedForward {
            self.mlp.resize(config, n_tokens)?;
        }
        if recompute == Recompute::Nothing {
            self.own.resize_own(self.layer_type(), config, n_tokens)?;
        }
        Ok(())
    }

    /// Sizes what layers that recompute `most` at the most share.
    pub fn resize_shared(
        &mut self,
        config: &Config,
        n_tokens: usize,
        most: Recompute,
    ) -> Result<()> {
        if most >= Recompute::Layer {
            self.resize_mixer(config, n_tokens)?;
        }
        if most >= Recompute::FeedForward {
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

    /// Swaps in, from `shared`, what a layer that recomputes `recompute` has not of its own, and its own scratch for the shared one if it
    /// recomputes nothing; the same call swaps all back.
    pub fn swap(&mut self, shared: &mut Saved, scratch: &mut Scratch, recompute: Recompute) {
        if recompute >= Recompute::Layer {
            std::mem::swap(&mut self.residual, &mut shared.residual);
            std::mem::swap(&mut self.mixer, &mut shared.mixer);
        }
        if recompute >= Recompute::FeedForward {
            std::mem::swap(&mut self.mlp, &mut shared.mlp);
        }
        if recompute == Recompute::Nothing {
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
    pub fn type_idx(&self) -> usize {
        match self.layer_type() {
            LayerType::Linear => 0,
            LayerType::Full => 1,
        }
    }

    /// Bytes of `resize`.
    pub fn bytes_for(
        layer_type: LayerType,
        config: &Config,
        n_tokens: usize,
        dtype: DType,
        recompute: Recompute,
    ) -> usize {
        let kept = Recompute::ALL.into_iter().filter(|part| *part >= recompute);
        kept.map(|part| Saved::part_bytes(layer_type, config, n_tokens, dtype, part))
            .sum()
    }

    /// Bytes of `resize_shared`.
    pub fn shared_bytes_for(
        layer_type: LayerType,
        config: &Config,
        n_tokens: usize,
        dtype: DType,
        most: Recompute,
    ) -> usize {
        [Recompute::Elementwise, Recompute::FeedForward]
            .into_iter()
            .filter(|part| *part < most)
            .map(|part| Saved::part_bytes(layer_type, config, n_tokens, dtype, part))
            .sum()
    }

    /// Bytes of what a layer that recomputes `part` keeps beyond one of the next choice.
    fn part_bytes(
        layer_type: LayerType,
        config: &Config,
        n_tokens: usize,
        dtype: DType,
        part: Recompute,
    ) -> usize {
        match (part, layer_type) {
            (Recompute::Layer, _) => Input::bytes_for(config, n_tokens, dtype),
            (Recompute::FeedForward, LayerType::Linear) => {
                Residual::bytes_for(config, n_tokens, dtype)
                    + delta_net::Saved::bytes_for(config, n_tokens, dtype)
            }
            (Recompute::FeedForward, LayerType::Full) => {
                Residual::bytes_for(config, n_tokens, dtype)
                    + attention::Saved::bytes_for(config, n_tokens, dtype)
            }
            (Recompute::Elementwise, _) => mlp::Saved::bytes_for(config, n_tokens, dtype),
            (Recompute::Nothing, _) => Scratch::own_bytes_for(layer_type, config, n_tokens, dtype),
        }
    }

    /// Every tensor by name.
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
    /// The lines of the table, below the layer.
    pub fn rows(layer_type: LayerType, config: &Config) -> Vec<Row> {
        let mixer = match layer_type {
            LayerType::Linear => delta_net::Weights::rows(config),
            LayerType::Full => attention::Weights::rows(config),
        };
        in_order(Norms::rows(config), mixer, mlp::Weights::rows(config))
    }

    /// All zero.
    pub fn zeros(layer_type: LayerType, config: &Config, dtype: DType) -> Self {
        Weights {
            norms: Norms::zeros(config, dtype),
            mixer: match layer_type {
                LayerType::Linear => Mixer::DeltaNet(delta_net::Weights::zeros(config, dtype)),
                LayerType::Full => Mixer::Attention(attention::Weights::zeros(config, dtype)),
            },
            mlp: mlp::Weights::zeros(config, dtype),
        }
    }

    /// The weights, in the order of the table.
    pub fn parts(&self) -> Vec<Part<&Linear, &Parameter>> {
        let mixer = match &self.mixer {
            Mixer::DeltaNet(weights) => weights.parts(),
            Mixer::Attention(weights) => weights.parts(),
        };
        in_order(self.norms.parts(), mixer, self.mlp.parts())
    }

    /// As `parts`, exclusively.
    pub fn parts_mut(&mut self) -> Vec<Part<&mut Linear, &mut Parameter>> {
        let mixer = match &mut self.mixer {
            Mixer::DeltaNet(weights) => weights.parts_mut(),
            Mixer::Attention(weights) => weights.parts_mut(),
        };
        in_order(self.norms.parts_mut(), mixer, self.mlp.parts_mut())
    }

    /// out_td assigned from `saved.input.x_td`.
    pub fn forward(
        &self,
        out_td: &mut Tensor,
        saved: &mut Saved,
        scratch: &mut Scratch,
        pass: &mut Pass,
    ) -> Result<()> {
        self.mix(saved, scratch, pass)?;
        self.feed_forward(out_td, saved, scratch, pass)
    }

    /// Fills what the mixer saves, and the residual stream behind it.
    fn mix(&self, saved: &mut Saved, scratch: &mut Scratch, pass: &mut Pass) -> Result<()> {
        // 1. normalise
        self.normalise_input(saved, scratch, pass.eps)?;
        // 2. mix
        let branch = Branch {
            out_td: &mut saved.residual.mid_td,
            in_td: &saved.input.x_td,
            x_td: &scratch.stream.normed_td,
        };
        match (&self.mixer, &mut saved.mixer) {
            (Mixer::DeltaNet(weights), MixerSaved::DeltaNet(kept)) => {
                weights.forward(branch, kept, &mut scratch.delta_net, pass)
            }
            (Mixer::Attention(weights), MixerSaved::Attention(kept)) => {
                weights.forward(branch, kept, &mut scratch.attention, pass)
            }
            _ => unreachable!("an arena is made from the same layer types as its model"),
        }
    }

    /// `d_x_td` and `d_out_td` of `gradient.stream` come in as the gradient of the layer's output and leave as that of its input.
    /// What `recompute` says is computed again first; a layer that recomputes nothing finds it in `scratch`, as its forward pass left it.
    pub fn backward(
        &self,
        gradient: &mut Gradient,
        saved: &mut Saved,
        recompute: Recompute,
        scratch: &mut Scratch,
        backward: &mut Backward,
    ) -> Result<()> {
        let eps = backward.pass.eps;
        if recompute >= Recompute::Layer {
            self.mix(saved, scratch, &mut backward.pass)?;
        }
        let StreamGradient {
            d_x_td,
            d_out_td,
            d_normed_td,
        } = &mut gradient.stream;
        backward.has_scratch = recompute == Recompute::Nothing;
        // 4. feed forward
        if !backward.has_scratch {
            self.normalise_mid(saved, scratch, eps)?;
        }
        if recompute >= Recompute::FeedForward {
            let x_td = &scratch.stream.mid_normed_td;
            self.mlp.project(&mut saved.mlp, x_td, &mut backward.pass)?;
        }
        let branch = BranchBackward {
            d_x_td: d_normed_td,
            d_out_td,
            x_td: &scratch.stream.mid_normed_td,
        };
        self.mlp.backward(
            branch,
            &mut gradient.mlp,
            &saved.mlp,
            &mut scratch.mlp,
            backward,
        )?;
        // 3. normalise
        rms_norm::backward_accumulate(
            d_x_td,
            d_out_td,
            backward.grads.of(&self.norms.post_attention_layernorm),
            d_normed_td,
            &saved.residual.mid_td,
            &self.norms.post_attention_layernorm.tensor,
            &saved.residual.mid_rstd_t,
        )?;
        // 2. mix
        if !backward.has_scratch {
            self.normalise_input(saved, scratch, eps)?;
        }
        let branch = BranchBackward {
            d_x_td: d_normed_td,
            d_out_td,
            x_td: &scratch.stream.normed_td,
        };
        match (&self.mixer, &mut saved.mixer) {
            (Mixer::DeltaNet(weights), MixerSaved::DeltaNet(kept)) => weights.backward(
                branch,
                &mut gradient.delta_net,
                kept,
                &mut scratch.delta_net,
                backward,
            )?,
            (Mixer::Attention(weights), MixerSaved::Attention(kept)) => weights.backward(
                branch,
                &mut gradient.attention,
                kept,
                &mut scratch.attention,
                backward,
            )?,
            _ => unreachable!("an arena is made from the same layer types as its model"),
        }
        // 1. normalise
        rms_norm::backward_accumulate(
            d_x_td,
            d_out_td,
            backward.grads.of(&self.norms.input_layernorm),
            d_normed_td,
            &saved.input.x_td,
            &self.norms.input_layernorm.tensor,
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
        scratch: &mut Scratch,
        step_scratch: &mut delta_net::StepScratch,
        pass: &mut Pass,
    ) -> Result<()> {
        // 1. normalise
        self.normalise_input(saved, scratch, pass.eps)?;
        // 2. mix
        let branch = Branch {
            out_td: &mut saved.residual.mid_td,
            in_td: &saved.input.x_td,
            x_td: &scratch.stream.normed_td,
        };
        match (&self.mixer, &mut saved.mixer) {
            (Mixer::DeltaNet(weights), MixerSaved::DeltaNet(kept)) => weights.step(
                branch,
                &mut LayerState::delta_nets(states),
                kept,
                &mut scratch.delta_net,
                step_scratch,
                pass,
            )?,
            (Mixer::Attention(weights), MixerSaved::Attention(kept)) => weights.step(
                branch,
                &mut LayerState::attentions(states),
                kept,
                &mut scratch.attention,
                pass,
            )?,
            _ => unreachable!("an arena is made from the same layer types as its model"),
        }
        // 3. normalise
        // 4. feed forward
        self.feed_forward(out_td, saved, scratch, pass)
    }

    fn normalise_input(&self, saved: &mut Saved, scratch: &mut Scratch, eps: f32) -> Result<()> {
        rms_norm::forward(
            &mut scratch.stream.normed_td,
            &mut saved.residual.rstd_t,
            &saved.input.x_td,
            &self.norms.input_layernorm.tensor,
            eps,
        )?;
        Ok(())
    }

    fn normalise_mid(&self, saved: &mut Saved, scratch: &mut Scratch, eps: f32) -> Result<()> {
        rms_norm::forward(
            &mut scratch.stream.mid_normed_td,
            &mut saved.residual.mid_rstd_t,
            &saved.residual.mid_td,
            &self.norms.post_attention_layernorm.tensor,
            eps,
        )?;
        Ok(())
    }

    fn feed_forward(
        &self,
        out_td: &mut Tensor,
        saved: &mut Saved,
        scratch: &mut Scratch,
        pass: &mut Pass,
    ) -> Result<()> {
        self.normalise_mid(saved, scratch, pass.eps)?;
        let branch = Branch {
            out_td,
            in_td: &saved.residual.mid_td,
            x_td: &scratch.stream.mid_normed_td,
        };
        self.mlp
            .forward(branch, &mut saved.mlp, &mut scratch.mlp, pass)
    }
}

/// The norm before the mixer, the mixer, the norm after it, the feed-forward.
fn in_order<T>(norms: Vec<T>, mixer: Vec<T>, mlp: Vec<T>) -> Vec<T> {
    let mut norms = norms.into_iter();
    let first = norms.next();
    let in_order = first.into_iter().chain(mixer).chain(norms).chain(mlp);
    in_order.collect()
}

/// The same four methods for a struct of one arena a module.
macro_rules! arenas {
    ($name:ident, $stream:ident) => {
        impl $name {
            pub fn new(dtype: DType, device: Device) -> Self {
                $name {
                    stream: $stream::new(dtype, device),
                    delta_net: delta_net::$name::new(dtype, device),
                    attention: attention::$name::new(dtype, device),
                    mlp: mlp::$name::new(dtype, device),
                }
            }

            pub fn resize(&mut self, config: &Config, n_tokens: usize) -> Result<()> {
                self.stream.resize(config, n_tokens)?;
                self.delta_net.resize(config, n_tokens)?;
                self.attention.resize(config, n_tokens)?;
                self.mlp.resize(config, n_tokens)
            }

            pub fn bytes_for(config: &Config, n_tokens: usize, dtype: DType) -> usize {
                $stream::bytes_for(config, n_tokens, dtype)
                    + delta_net::$name::bytes_for(config, n_tokens, dtype)
                    + attention::$name::bytes_for(config, n_tokens, dtype)
                    + mlp::$name::bytes_for(config, n_tokens, dtype)
            }

            pub fn tensors(&self) -> Vec<(&'static str, &Tensor)> {
                let mut tensors = self.stream.tensors();
                tensors.extend(self.delta_net.tensors());
                tensors.extend(self.attention.tensors());
                tensors.extend(self.mlp.tensors());
                tensors
            }
        }
    };
}
arenas!(Scratch, Normed);
arenas!(Gradient, StreamGradient);

impl Scratch {
    /// As `resize`, for a layer that has its own.
    pub fn resize_own(
        &mut self,
        layer_type: LayerType,
        config: &Config,
        n_tokens: usize,
    ) -> Result<()> {
        self.stream.resize(config, n_tokens)?;
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
        Normed::bytes_for(config, n_tokens, dtype)
            + mixer
            + mlp::Scratch::bytes_for(config, n_tokens, dtype)
    }
}
