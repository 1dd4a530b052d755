//! The primitives: one file each, forward and backward side by side.
//!
//! The contract, for every op:
//! - outputs first, inputs next, scalars last;
//! - activation gradients are assigned, weight gradients are added to (`+=`), unless the name says `accumulate` or a [`Write`] is given;
//! - storage is f32 or bf16, freely mixed between arguments unless a doc line fixes it; every sum is f32; weight gradients are f32
//!   (a product on a GPU rounds an f32 operand to bf16 where the other operand or the result is bf16);
//! - every element of an assigned output is written (tests hand in NaN);
//! - no atomics and no order that depends on timing: the same inputs give the same bytes;
//! - an op that looks along the sequence takes document boundaries `cu_seqlens` (n_docs + 1 row offsets, first 0, last T), and nothing crosses them;
//! - ops never log, and allocate nothing on a device but the scratch and small tables that all ops of a GPU share and that grow
//!   at first use (CPU code may use stack or thread-local scratch).
//!
//! Legend of shape suffixes: T tokens (packed), D hidden, H query or value heads, G key (and key:value) heads, K key dim,
//! V value dim, N attention head dim, F feed-forward, C vocabulary or channels, O out features, I in features, S cached positions.

use crate::example::Examples;

pub mod adamw;
pub mod adamw_host;
pub mod attention;
pub mod causal_conv1d;
pub(crate) mod check;
pub mod copy;
pub mod decode_attention;
pub mod decode_delta_net;
pub mod decode_product;
pub mod delta_gate;
pub mod delta_inputs;
pub mod dropout;
pub mod embedding;
pub mod gated_delta_rule;
pub mod gated_delta_step;
pub mod gated_rms_norm;
pub mod grad_norm;
pub mod l2_norm;
pub mod linear_cross_entropy;
pub mod low_rank;
pub mod matmul;
pub mod quantize_fp8;
pub mod rms_norm;
pub mod rope;
pub(crate) mod rows;
pub mod sigmoid_gate;
pub mod split;
pub mod swiglu;
#[cfg(test)]
mod testing;
pub mod top_candidates;

/// What an op does to an output that it can also add to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Write {
    /// `=`: what was there is not read.
    Assign,
    /// `+=`
    Accumulate,
}

/// [`Examples`] of these ops, of which the second are not part of a training step.
macro_rules! examples {
    ($($op:ident),*; $($not_timed:ident),*) => {
        &[
            $(Examples {
                op: stringify!($op),
                compared: $op::examples::compared,
                timed: $op::examples::timed,
            },)*
            $(Examples {
                op: stringify!($not_timed),
                compared: $not_timed::examples::compared,
                timed: |_| Vec::new(),
            },)*
        ]
    };
}

/// Every op that has kernels.
pub const EXAMPLES: &[Examples] = examples!(
    matmul,
    low_rank,
    rms_norm,
    swiglu,
    attention,
    rope,
    sigmoid_gate,
    split,
    gated_delta_rule,
    delta_inputs,
    delta_gate,
    gated_rms_norm,
    linear_cross_entropy,
    embedding,
    grad_norm,
    adamw;
    adamw_host,
    causal_conv1d,
    copy,
    decode_attention,
    decode_delta_net,
    decode_product,
    gated_delta_step,
    l2_norm,
    top_candidates
);
