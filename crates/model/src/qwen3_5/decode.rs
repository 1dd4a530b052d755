//! Decoding: one token of each of several sequences, a launch an op. On a GPU a step is recorded once for each number of sequences and
//! queued again as a whole; what changes (tokens, positions, addresses of states) lies in a table.
//!
//! A sequence keeps its states to itself (one slab a layer, caches that grow by doubling), so that snapshots and prefill know nothing of
//! the step; the kernels find them by address. A row's result depends neither on the rows beside it nor on their number.
// B sequences, D hidden, C vocabulary, P parts of a sequence's positions.

use kernel::cuda::{Graph, Placed, Slot, StepTable};
use kernel::ops::top_candidates::{self, Candidates};
use kernel::ops::{copy, decode_attention, decode_delta_net, decode_product};
use kernel::{DType, Device, Tensor};

use decode_product::{Input, Stream};

use crate::config::{Config, LayerType};
use crate::{Error, Result};

use super::arena::arena;
use super::block::{self, Mixer};
use super::state::{LayerState, SequenceState};
use super::{Model, attention, delta_net, mlp};

/// Candidates of each row that a step finds, at the least.
const N_CANDIDATES: usize = 64;

/// Recorded steps kept; the oldest goes.
const MOST_GRAPHS: usize = 64;

arena! {
    /// What a step keeps from launch to launch.
    Scratch(c, b) {
        /// Channels of the delta net before the convolution [B,2·G·K + H·V].
        qkv_bc: act [b, c.conv_channels()],
        /// [B,H·V]
        z_bhv: act [b, c.value_width()],
        /// [B,H]
        a_bh: act [b, c.linear_num_value_heads],
        /// [B,H]
        b_bh: act [b, c.linear_num_value_heads],
        /// Input of the delta net's last product [B,H·V].
        gated_bhv: act [b, c.value_width()],
        /// [B,H·2N]
        qg_bh2n: act [b, 2 * c.query_width()],
        /// [B,G·N]
        k_bgn: act [b, c.key_width()],
        /// [B,G·N]
        v_bgn: act [b, c.key_width()],
        /// Input of attention's last product [B,H·N].
        gated_bhn: act [b, c.query_width()],
        /// Cosines and sines of the positions [B,R/2,2].
        turns_bp2: f32 [b, c.rotary_dims / 2, 2],
        /// [B,F]
        product_bf: act [b, c.intermediate_size],
        /// [B,C]
        logits_bc: f32 [b, c.vocab_size],
    }
}

/// Takes sequences of one model on by a token each.
#[derive(Debug)]
pub struct Decoder {
    /// Sequences that there is room for.
    rows: usize,
    table: StepTable,
    stream: Stream,
    scratch: Scratch,
    /// [B,H,P,N + 2]
    parts: Tensor,
    candidates: top_candidates::Scratch,
    /// Frequencies of the rotation [R/2].
    inv_freq: Tensor,
    steps: Vec<Recorded>,
}

/// A step that has run.
#[derive(Debug)]
struct Recorded {
    /// Sequences, and parts of the longest one.
    shape: [usize; 2],
    /// None after the first time: what is made at first use must be there before anything is recorded.
    graph: Option<Graph>,
}

/// Where a step's numbers and addresses are in the table.
struct Slots {
    tokens_b: Slot,
    positions_b: Slot,
    layers: Vec<LayerSlots>,
}

enum LayerSlots {
    DeltaNet([Slot; 3]),
    Attention([Slot; 2]),
}

impl Decoder {
    /// Whether this is the way to decode with `model`: on a GPU, in bf16, without an adapter beside the weights, with heads that the
    /// kernels know. [`Model::step`] takes every other.
    pub fn supports(model: &Model) -> bool {
        let c = model.config();
        let widths = [
            c.hidden_size,
            c.value_width(),
            c.query_width(),
            c.intermediate_size,
        ];
        let repeat = c.num_attention_heads / c.num_key_value_heads.max(1);
        matches!(model.device(), Device::Cuda(_))
            && model.dtype() == DType::Bf16
            && model.lora().is_none()
            && widths.into_iter().all(decode_product::supports)
            && decode_delta_net::supports(c.linear_key_head_dim, c.linear_value_head_dim)
            && decode_attention::supports(repeat, c.head_dim)
    }

    /// Bytes that a step of `b` sequences at `position` reads and writes at the least: each weight once, states twice, caches once.
    pub fn bytes_at_least(model: &Model, b: usize, position: usize) -> usize {
        let c = model.config();
        // Of an embedding that is not the head, a row a sequence.
        let weights = model
            .parameters()
            .into_iter()
            .map(|(_, weight)| &weight.tensor);
        let all: usize = weights.map(Tensor::bytes).sum();
        let unread = match &model.head {
            Some(_) => model.outer.embed_tokens.tensor.bytes(),
            None => 0,
        };
        let state = c.linear_num_value_heads * c.linear_key_head_dim * c.linear_value_head_dim;
        let of_sequence = c.layer_types.iter().map(|layer_type| match layer_type {
            LayerType::Linear => 2 * state * DType::F32.size(),
            LayerType::Full => 2 * position * c.key_width() * model.dtype().size(),
        });
        all - unread + b * of_sequence.sum::<usize>()
    }

    /// With room for `rows` sequences at once.
    ///
    /// # Errors
    /// [`Error::Kernel`] if the GPU has no room.
    pub fn new(model: &Model, rows: usize) -> Result<Self> {
        let (config, device, dtype) = (model.config(), model.device(), model.dtype());
        let inv_freq = model.rotation.inv_freq.clone();
        let mut decoder = Decoder {
            rows: 0,
            table: StepTable::new(device, 0)?,
            stream: Stream::new(dtype, device),
            scratch: Scratch::new(dtype, device),
            parts: Tensor::empty_on(device, DType::F32),
            candidates: top_candidates::Scratch::new(device),
            inv_freq: Tensor::from_f32(&[inv_freq.len()], inv_freq).to_device(device)?,
            steps: Vec::new(),
        };
        decoder.reserve(config, device, rows.max(1))?;
        Ok(decoder)
    }

    /// Appends one token to each sequence. Logits and candidates of all of them can be read until the next step.
    ///
    /// # Errors
    /// [`Error::Batch`] for no sequences, or tokens that are not one a sequence or not of the vocabulary; [`Error::Kernel`], and the
    /// states are then unusable.
    pub fn step(
        &mut self,
        model: &Model,
        states: &mut [&mut SequenceState],
        tokens_b: &[u32],
    ) -> Result<()> {
        let config = model.config();
        if states.len() != tokens_b.len() {
            return Err(Error::Batch {
                what: format!("{} tokens for {} sequences", tokens_b.len(), states.len()),
            });
        }
        let c = config.vocab_size;
        if let Some(id) = tokens_b.iter().find(|id| **id as usize >= c) {
            return Err(Error::Batch {
                what: format!("token {id} of a vocabulary of {c}"),
            });
        }
        model.check_states(states, tokens_b)?;

        // 1. room
        let b = states.len();
        self.reserve(config, model.device(), b)?;
        for state in states.iter_mut() {
            state.reserve_step()?;
        }
        let lengths = states.iter().map(|state| state.position + 1);
        let n_parts = lengths.map(decode_attention::n_parts).max().unwrap_or(1);
        let n_parts = n_parts.next_power_of_two();
        self.resize(config, b, n_parts)?;

        // 2. what changes
        let slots = self.fill(states, tokens_b);
        self.table.upload()?;

        // 3. compute
        self.run(model, states, &slots, [b, n_parts])?;
        for state in states {
            state.position += 1;
            state.turn();
        }
        Ok(())
    }

    /// Logits of every row of the last step [B,C] f32, on the host.
    ///
    /// # Errors
    /// [`Error::Kernel`] if the GPU failed.
    pub fn logits(&self) -> Result<Tensor> {
        Ok(self.scratch.logits_bc.to_device(Device::Cpu)?)
    }

    /// Logits of one row of the last step [C].
    ///
    /// # Errors
    /// As [`Decoder::logits`].
    pub fn logits_of(&self, row: usize) -> Result<Vec<f32>> {
        let logits_bc = &self.scratch.logits_bc;
        let c = logits_bc.shape()[1];
        let mut logits_c = Tensor::zeros_on(&[c], DType::F32, logits_bc.device())?;
        copy::forward(&mut logits_c, 0, logits_bc, row * c, c)?;
        Ok(logits_c.read_f32()?)
    }

    /// The likeliest ids of every row of the last step; None for one whose logits must be looked at whole.
    ///
    /// # Errors
    /// As [`Decoder::logits`].
    pub fn candidates(&self) -> Result<Vec<Option<Candidates>>> {
        Ok(self.candidates.read()?)
    }

    /// Makes room for `rows` sequences. What was recorded has addresses of the room before.
    fn reserve(&mut self, config: &Config, device: Device, rows: usize) -> Result<()> {
        if rows <= self.rows {
            return Ok(());
        }
        self.steps.clear();
        self.rows = rows;
        // Tokens and positions, with a word between them; two words an address, three addresses of a delta net.
        let n_words = rows * (2 + 6 * config.layer_types.len()) + 2;
        self.table = StepTable::new(device, n_words)?;
        let most_parts = decode_attention::n_parts(usize::MAX / 2);
        self.resize(config, rows, most_parts.next_power_of_two())
    }

    /// Shapes for `b` sequences, of which the longest has `n_parts`; within the room nothing moves.
    fn resize(&mut self, config: &Config, b: usize, n_parts: usize) -> Result<()> {
        self.stream.resize(b, config.hidden_size)?;
        self.scratch.resize(config, b)?;
        self.candidates.resize(b, config.vocab_size)?;
        let (h, n) = (config.num_attention_heads, config.head_dim);
        Ok(self.parts.resize(&[b, h, n_parts, n + 2])?)
    }

    /// Writes the step's numbers and addresses into the table, each always at the same place for as many sequences.
    fn fill(&mut self, states: &[&mut SequenceState], tokens_b: &[u32]) -> Slots {
        let table = &mut self.table;
        table.clear();
        let tokens_b = table.push(tokens_b.iter().copied());
        let positions_b = table.push(states.iter().map(|state| state.position as u32));
        let n_layers = states.first().map_or(0, |state| state.layers.len());
        let mut layers = Vec::with_capacity(n_layers);
        for layer_idx in 0..n_layers {
            let of_layer = states.iter().map(|state| &state.layers[layer_idx]);
            let (delta_nets, caches) = LayerState::by_kind(of_layer);
            layers.push(if caches.is_empty() {
                LayerSlots::DeltaNet([
                    table.push_tensors(delta_nets.iter().map(|state| &state.state_hkv)),
                    table.push_tensors(delta_nets.iter().map(|state| &state.conv_3c)),
                    table.push_tensors(delta_nets.iter().map(|state| &state.next_conv_3c)),
                ])
            } else {
                LayerSlots::Attention([
                    table.push_tensors(caches.iter().map(|cache| &cache.k_sgn)),
                    table.push_tensors(caches.iter().map(|cache| &cache.v_sgn)),
                ])
            });
        }
        Slots {
            tokens_b,
            positions_b,
            layers,
        }
    }

    /// Queues the step: launch by launch the first time, recorded the second time, from then on as a whole.
    fn run(
        &mut self,
        model: &Model,
        states: &mut [&mut SequenceState],
        slots: &Slots,
        shape: [usize; 2],
    ) -> Result<()> {
        let cuda = match model.device() {
            Device::Cuda(cuda) if !cuda.is_profiled() => cuda,
            _ => return self.compute(model, states, slots),
        };
        let Some(idx) = self.steps.iter().position(|step| step.shape == shape) else {
            self.compute(model, states, slots)?;
            if self.steps.len() == MOST_GRAPHS {
                self.steps.remove(0);
            }
            self.steps.push(Recorded { shape, graph: None });
            return Ok(());
        };
        if let Some(graph) = &self.steps[idx].graph {
            return Ok(graph.launch()?);
        }
        let mut computed = Ok(());
        let graph = cuda.record(|| {
            computed = self.compute(model, states, slots);
            Ok(())
        });
        computed?;
        let graph = graph?;
        graph.launch()?;
        self.steps[idx].graph = Some(graph);
        Ok(())
    }

    /// The step's launches in their order.
    fn compute(
        &mut self,
        model: &Model,
        states: &mut [&mut SequenceState],
        slots: &Slots,
    ) -> Result<()> {
        let table = &self.table;
        let eps = model.config().rms_norm_eps;
        let norms = model
            .layers
            .iter()
            .map(|layer| &layer.norms.input_layernorm);
        let mut norms = norms.chain([&model.outer.norm]).map(|norm| &norm.tensor);
        let Some(first_norm) = norms.next() else {
            return Ok(());
        };

        // 1. embed
        let embedding = &model.outer.embed_tokens.tensor;
        let tokens_b = table.at(slots.tokens_b);
        decode_product::embed(&mut self.stream, embedding, first_norm, tokens_b)?;
        let positions_b = table.at(slots.positions_b);
        decode_attention::turns(&mut self.scratch.turns_bp2, &self.inv_freq, positions_b)?;

        // 2. layers
        let mut work = Work {
            stream: &mut self.stream,
            scratch: &mut self.scratch,
            parts: &mut self.parts,
            positions_b,
            eps,
        };
        for (layer_idx, (layer, next_norm)) in model.layers.iter().zip(norms).enumerate() {
            let of_layer = states.iter_mut().map(|state| &mut state.layers[layer_idx]);
            let of_layer = of_layer.collect();
            match (&layer.mixer, &slots.layers[layer_idx]) {
                (Mixer::DeltaNet(weights), LayerSlots::DeltaNet(slots)) => {
                    let states = LayerState::delta_nets(of_layer);
                    work.delta_net(weights, states, slots.map(|slot| table.at(slot)))?;
                }
                (Mixer::Attention(weights), LayerSlots::Attention(slots)) => {
                    let states = LayerState::attentions(of_layer);
                    work.attention(weights, states, slots.map(|slot| table.at(slot)))?;
                }
                _ => unreachable!("a state is of its model's layer types"),
            }
            work.feed_forward(layer, next_norm)?;
        }

        // 3. head, and what draws look at
        let logits_bc = &mut self.scratch.logits_bc;
        let input = self.stream.normed(eps);
        decode_product::forward(&mut [&mut *logits_bc], input, &[&model.head().tensor])?;
        top_candidates::select(&mut self.candidates, logits_bc, N_CANDIDATES)?;
        Ok(())
    }
}

/// What the launches of a layer share.
struct Work<'a> {
    stream: &'a mut Stream,
    scratch: &'a mut Scratch,
    parts: &'a mut Tensor,
    positions_b: Placed<'a>,
    eps: f32,
}

impl Work<'_> {
    /// From the stream to the input of the delta net's last product.
    fn delta_net(
        &mut self,
        weights: &delta_net::Weights,
        mut states: Vec<&mut delta_net::State>,
        addresses: [Placed; 3],
    ) -> Result<()> {
        let Scratch {
            qkv_bc,
            z_bhv,
            a_bh,
            b_bh,
            gated_bhv,
            ..
        } = &mut *self.scratch;
        // 1. normalise and project
        let projections = [
            &weights.in_proj_qkv,
            &weights.in_proj_z,
            &weights.in_proj_b,
            &weights.in_proj_a,
        ];
        decode_product::forward(
            &mut [&mut *qkv_bc, &mut *z_bhv, &mut *b_bh, &mut *a_bh],
            self.stream.normed(self.eps),
            &projections.map(|linear| &linear.weight.tensor),
        )?;
        // 2. convolve, take the state on, normalise and gate
        let mut state_hkv = Vec::with_capacity(states.len());
        let mut conv_3c = Vec::with_capacity(states.len());
        let mut next_conv_3c = Vec::with_capacity(states.len());
        for state in &mut states {
            state_hkv.push(&mut state.state_hkv);
            conv_3c.push(&state.conv_3c);
            next_conv_3c.push(&mut state.next_conv_3c);
        }
        let key_dim = state_hkv.first().map_or(1, |state| state.shape()[1]);
        let states = decode_delta_net::States {
            state_hkv: &mut state_hkv,
            conv_3c: &conv_3c,
            next_conv_3c: &mut next_conv_3c,
            addresses,
        };
        let inputs = decode_delta_net::Inputs {
            qkv_bc,
            z_bhv,
            a_bh,
            b_bh,
            conv_w: &weights.conv1d.tensor,
            a_log_h: &weights.a_log.tensor,
            dt_bias_h: &weights.dt_bias.tensor,
            norm_v: &weights.norm.tensor,
            q_scale: inverse_root(key_dim),
            l2_eps: delta_net::L2_EPS,
            eps: self.eps,
        };
        decode_delta_net::forward(gated_bhv, states, &inputs)?;
        Ok(())
    }

    /// From the stream to the input of attention's last product.
    fn attention(
        &mut self,
        weights: &attention::Weights,
        states: Vec<&mut attention::State>,
        addresses: [Placed; 2],
    ) -> Result<()> {
        let Scratch {
            qg_bh2n,
            k_bgn,
            v_bgn,
            gated_bhn,
            turns_bp2,
            ..
        } = &mut *self.scratch;
        // 1. normalise and project
        let projections = [&weights.q_proj, &weights.k_proj, &weights.v_proj];
        decode_product::forward(
            &mut [&mut *qg_bh2n, &mut *k_bgn, &mut *v_bgn],
            self.stream.normed(self.eps),
            &projections.map(|linear| &linear.weight.tensor),
        )?;
        // 2. normalise, rotate, attend, gate
        let (mut k_sgn, mut v_sgn): (Vec<_>, Vec<_>) = states
            .into_iter()
            .map(|state| (&mut state.k_sgn, &mut state.v_sgn))
            .unzip();
        let caches = decode_attention::Caches {
            k_sgn: &mut k_sgn,
            v_sgn: &mut v_sgn,
            addresses,
        };
        let inputs = decode_attention::Inputs {
            qg_bh2n,
            k_bgn,
            v_bgn,
            q_norm_n: &weights.q_norm.tensor,
            k_norm_n: &weights.k_norm.tensor,
            turns_bp2,
            positions_b: self.positions_b,
            scale: inverse_root(weights.q_norm.tensor.numel()),
            eps: self.eps,
        };
        decode_attention::forward(gated_bhn, self.parts, caches, &inputs)?;
        Ok(())
    }

    /// From the mixer's last product to the stream behind the layer; `next_norm` is that of what follows.
    fn feed_forward(&mut self, layer: &block::Weights, next_norm: &Tensor) -> Result<()> {
        let (gated, back) = match &layer.mixer {
            Mixer::DeltaNet(weights) => (&self.scratch.gated_bhv, &weights.out_proj),
            Mixer::Attention(weights) => (&self.scratch.gated_bhn, &weights.o_proj),
        };
        let mid_norm = &layer.norms.post_attention_layernorm.tensor;
        let stream = &mut *self.stream;
        decode_product::accumulate(stream, Input::plain(gated), &back.weight.tensor, mid_norm)?;
        let mlp::Weights {
            gate_proj,
            up_proj,
            down_proj,
        } = &layer.mlp;
        let product_bf = &mut self.scratch.product_bf;
        decode_product::swiglu(
            product_bf,
            stream.normed(self.eps),
            &gate_proj.weight.tensor,
            &up_proj.weight.tensor,
        )?;
        let input = Input::plain(product_bf);
        decode_product::accumulate(stream, input, &down_proj.weight.tensor, next_norm)?;
        Ok(())
    }
}

/// n^-1/2
fn inverse_root(n: usize) -> f32 {
    1.0 / (n as f32).sqrt()
}

impl SequenceState {
    /// Makes room for what the next token writes.
    fn reserve_step(&mut self) -> Result<()> {
        let position = self.position;
        for layer in &mut self.layers {
            match layer {
                LayerState::Attention(cache) => cache.reserve(position, position + 1)?,
                LayerState::DeltaNet(state) => {
                    let shape = state.conv_3c.shape().to_vec();
                    state.next_conv_3c.resize(&shape)?;
                }
            }
        }
        Ok(())
    }

    /// What a step left for the next one takes its place.
    fn turn(&mut self) {
        for layer in &mut self.layers {
            if let LayerState::DeltaNet(state) = layer {
                std::mem::swap(&mut state.conv_3c, &mut state.next_conv_3c);
            }
        }
    }
}

impl LayerState {
    /// States of one layer, which are all of one kind.
    fn by_kind<'a>(
        states: impl Iterator<Item = &'a LayerState>,
    ) -> (Vec<&'a delta_net::State>, Vec<&'a attention::State>) {
        let (mut delta_nets, mut caches) = (Vec::new(), Vec::new());
        for state in states {
            match state {
                LayerState::DeltaNet(state) => delta_nets.push(state),
                LayerState::Attention(state) => caches.push(state),
            }
        }
        (delta_nets, caches)
    }
}
