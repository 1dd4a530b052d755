//! What one sequence carries from token to token: caches of attention layers, states of delta nets, the position.

use kernel::{DType, Device};

use crate::Result;
use crate::config::{Config, LayerType};

use super::{attention, delta_net};

/// One sequence in progress.
#[derive(Debug)]
pub struct SequenceState {
    pub(crate) position: usize,
    pub(crate) layers: Vec<LayerState>,
}

#[derive(Debug)]
pub(crate) enum LayerState {
    DeltaNet(delta_net::State),
    Attention(attention::State),
}

impl SequenceState {
    pub(crate) fn new(config: &Config, dtype: DType, device: Device) -> Result<Self> {
        let layers = config.layer_types.iter().map(|layer_type| {
            Ok(match layer_type {
                LayerType::Linear => LayerState::DeltaNet(delta_net::State::new(config, device)?),
                LayerType::Full => {
                    LayerState::Attention(attention::State::new(config, dtype, device))
                }
            })
        });
        Ok(SequenceState {
            position: 0,
            layers: layers.collect::<Result<_>>()?,
        })
    }

    /// A copy that goes on by itself.
    ///
    /// # Errors
    /// [`crate::Error::Kernel`] if the GPU has no room.
    pub fn snapshot(&self) -> Result<Self> {
        let layers = self.layers.iter().map(|layer| {
            Ok(match layer {
                LayerState::DeltaNet(state) => LayerState::DeltaNet(state.snapshot()?),
                LayerState::Attention(state) => LayerState::Attention(state.snapshot()?),
            })
        });
        Ok(SequenceState {
            position: self.position,
            layers: layers.collect::<Result<_>>()?,
        })
    }

    /// Tokens taken in so far.
    pub fn position(&self) -> usize {
        self.position
    }

    /// Memory held.
    pub fn bytes(&self) -> usize {
        self.layers
            .iter()
            .map(|layer| match layer {
                LayerState::DeltaNet(state) => state.bytes(),
                LayerState::Attention(state) => state.bytes(),
            })
            .sum()
    }
}

impl LayerState {
    pub fn delta_nets(states: Vec<&mut LayerState>) -> Vec<&mut delta_net::State> {
        states
            .into_iter()
            .map(|state| match state {
                LayerState::DeltaNet(state) => state,
                LayerState::Attention(_) => unreachable!("a state is of its model's layer types"),
            })
            .collect()
    }

    pub fn attentions(states: Vec<&mut LayerState>) -> Vec<&mut attention::State> {
        states
            .into_iter()
            .map(|state| match state {
                LayerState::Attention(state) => state,
                LayerState::DeltaNet(_) => unreachable!("a state is of its model's layer types"),
            })
            .collect()
    }
}
