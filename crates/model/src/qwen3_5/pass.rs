//! What the layers of one pass share, so that a layer's functions take it as one argument.

use kernel::Tensor;
use kernel::ops::rope::Rotation;

use crate::lora;
use crate::parameter::Gradients;

/// A pass over a row of tokens.
pub(crate) struct Pass<'a> {
    /// Borders of documents; nothing crosses them.
    pub cu_seqlens: &'a [u32],
    /// Position of each token in its document.
    pub positions_t: &'a [u32],
    /// How a position turns a head.
    pub rotation: &'a Rotation,
    /// Added to mean squares by the norms.
    pub eps: f32,
    pub lora: &'a mut lora::Scratch,
}

/// A backward pass.
pub(crate) struct Backward<'a> {
    pub pass: Pass<'a>,
    /// Gradients of the weights that train, added up.
    pub grads: &'a mut Gradients,
    /// Whether the scratch of the layer at hand is as the forward pass left it; else what lies there is computed again.
    pub has_scratch: bool,
}

/// A branch of the residual stream: out = in + f(x).
pub(crate) struct Branch<'a> {
    /// [T,D], assigned.
    pub out_td: &'a mut Tensor,
    /// [T,D]
    pub in_td: &'a Tensor,
    /// `in_td` normalised [T,D].
    pub x_td: &'a Tensor,
}

/// The gradient through a branch.
pub(crate) struct BranchBackward<'a> {
    /// [T,D], assigned.
    pub d_x_td: &'a mut Tensor,
    /// [T,D]
    pub d_out_td: &'a Tensor,
    /// As in forward [T,D].
    pub x_td: &'a Tensor,
}
