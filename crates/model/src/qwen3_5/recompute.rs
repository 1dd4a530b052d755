//! The recompute policy: what of a layer's activations the backward pass computes again, instead of keeping it.

use crate::config::Config;

/// What the backward pass computes again of one layer; each choice recomputes what the one before it does, and more.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Recompute {
    /// Nothing but the delta rule's chunk states.
    Nothing,
    /// Outputs of norms, convolutions, rotations and gates: whatever costs no matrix product.
    #[default]
    Elementwise,
    /// Those, and the two wide projections of the feed-forward.
    FeedForward,
    /// The whole layer, from the residual stream before it.
    Layer,
}

impl Recompute {
    /// All choices, from the least to the most.
    pub const ALL: [Recompute; 4] = [
        Recompute::Nothing,
        Recompute::Elementwise,
        Recompute::FeedForward,
        Recompute::Layer,
    ];

    /// The policies of a whole model, from the least to the most: one layer after the other recomputes what costs no matrix product,
    /// then its feed-forward, then all.
    pub fn policies(config: &Config) -> Vec<Vec<Recompute>> {
        let n_layers = config.layer_types.len();
        let mut policy = vec![Recompute::Nothing; n_layers];
        let mut policies = vec![policy.clone()];
        for more in [
            Recompute::Elementwise,
            Recompute::FeedForward,
            Recompute::Layer,
        ] {
            for layer_idx in 0..n_layers {
                policy[layer_idx] = more;
                policies.push(policy.clone());
            }
        }
        policies
    }

    /// What a policy says of one layer; layers beyond its end have the default.
    pub(crate) fn of_layer(policy: &[Recompute], layer_idx: usize) -> Recompute {
        policy.get(layer_idx).copied().unwrap_or_default()
    }
}
