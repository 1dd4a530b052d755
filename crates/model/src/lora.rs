//! Low-rank adapters on linear layers: settings, arithmetic, how they are put beside the weights and into them.
// T tokens, I in features, O out features, R rank.

use std::ops::RangeInclusive;

use kernel::cuda::footprint;
use kernel::ops::dropout::Dropout;
use kernel::ops::{Write, low_rank};
use kernel::{DType, Device, Tensor};
use serde::{Deserialize, Serialize};

use crate::parameter::{Gradients, Parameter};
use crate::{Error, Result};

/// Ranks that an adapter can have; no layer is wider than the last.
pub(crate) const RANKS: RangeInclusive<usize> = 1..=65_536;

/// Settings of an adapter.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LoraConfig {
    /// Columns of B and rows of A.
    pub rank: usize,
    /// The update is scaled by alpha / rank.
    pub alpha: f32,
    /// Share of A's inputs that are zeroed in training; the rest is scaled up.
    #[serde(default)]
    pub dropout: f32,
    /// Last parts of module names, such as `q_proj`; empty: every linear layer of the text model but the head.
    #[serde(default)]
    pub targets: Vec<String>,
}

impl LoraConfig {
    /// Refuses values that no adapter has.
    ///
    /// # Errors
    /// [`Error::LoraConfig`] with the key.
    pub(crate) fn check(&self) -> Result<()> {
        if !RANKS.contains(&self.rank) {
            return Err(Error::LoraConfig {
                key: "rank",
                value: self.rank as f64,
                expected: "give 1 to 65536",
            });
        }
        if !(0.0..1.0).contains(&self.dropout) {
            return Err(Error::LoraConfig {
                key: "dropout",
                value: f64::from(self.dropout),
                expected: "give 0 or more, less than 1",
            });
        }
        Ok(())
    }
}

/// What alpha is divided by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Scaling {
    /// The rank.
    Rank,
    /// Its square root: rank-stabilised LoRA (arXiv 2312.03732), PEFT's `use_rslora`.
    RankRoot,
}

/// The adapter of one linear layer: y += scale · dropout(x) Aᵀ Bᵀ.
#[derive(Debug)]
pub(crate) struct Adapter {
    /// A [R,I] f32
    pub a_ri: Parameter,
    /// B [O,R] f32
    pub b_or: Parameter,
    pub alpha: f32,
    pub scaling: Scaling,
    pub dropout: f32,
    /// The layer's number among all linear ones, so that no two layers drop the same pattern.
    pub layer_number: u64,
    /// Its number among the adapted ones: its place in [`Scratch`], from 0.
    pub place: usize,
}

/// What the adapters of one pass share.
#[derive(Debug)]
pub(crate) struct Scratch {
    /// Seed of a training pass's dropout; None: nothing is dropped, and nothing kept for backward.
    pub dropout_seed: Option<u64>,
    dtype: DType,
    device: Device,
    /// dropout(x) Aᵀ [T,R] of each adapter by its place, kept from forward to backward; without training all use the first.
    u_tr: Vec<Tensor>,
    /// Its gradient [T,R].
    d_u_tr: Tensor,
}

impl Scratch {
    /// f32 on the CPU; on a GPU the model's type, whose products are many times faster there.
    pub fn new(dtype: DType, device: Device) -> Self {
        let dtype = match device {
            Device::Cpu => DType::F32,
            Device::Cuda(_) => dtype,
        };
        Scratch {
            dropout_seed: None,
            dtype,
            device,
            u_tr: Vec::new(),
            d_u_tr: Tensor::empty_on(device, dtype),
        }
    }

    pub fn bytes(&self) -> usize {
        let tensors = self.u_tr.iter().chain([&self.d_u_tr]);
        tensors.map(|tensor| footprint(tensor.bytes())).sum()
    }

    /// Bytes on a GPU once every layer has had its turn: one [T,R] for each adapter, and one gradient.
    pub fn bytes_for(n_adapters: usize, rank: usize, n_tokens: usize, dtype: DType) -> usize {
        (n_adapters + 1) * footprint(n_tokens * rank * dtype.size())
    }

    /// Allocates what a training pass over `n_tokens` needs.
    ///
    /// # Errors
    /// [`Error::Kernel`] if the GPU has no room.
    pub fn reserve(&mut self, n_adapters: usize, rank: usize, n_tokens: usize) -> Result<()> {
        self.make_places(n_adapters);
        for tensor in self.u_tr.iter_mut().chain([&mut self.d_u_tr]) {
            tensor.resize(&[n_tokens, rank])?;
        }
        Ok(())
    }

    fn make_places(&mut self, n: usize) {
        let n = n.max(self.u_tr.len());
        let empty = || Tensor::empty_on(self.device, self.dtype);
        self.u_tr.resize_with(n, empty);
    }
}

impl Adapter {
    /// Rows of A and columns of B.
    pub fn rank(&self) -> usize {
        self.a_ri.tensor.shape()[0]
    }

    /// alpha / rank, or alpha / √rank.
    pub fn scale(&self) -> f32 {
        let rank = self.rank() as f32;
        match self.scaling {
            Scaling::Rank => self.alpha / rank,
            Scaling::RankRoot => self.alpha / rank.sqrt(),
        }
    }

    /// y_to assigned or added to.
    pub fn forward(
        &self,
        y_to: &mut Tensor,
        x_ti: &Tensor,
        scratch: &mut Scratch,
        write: Write,
    ) -> Result<()> {
        let u_tr = self.down(x_ti, scratch)?;
        low_rank::up_forward(y_to, u_tr, &self.b_or.tensor, self.scale(), write)?;
        Ok(())
    }

    /// d_x_ti assigned or added to; gradients of A and B are added up in `grads`. Needs what forward kept of the same x under the same seed.
    pub fn backward(
        &self,
        d_x_ti: &mut Tensor,
        grads: &mut Gradients,
        d_y_to: &Tensor,
        x_ti: &Tensor,
        scratch: &mut Scratch,
        write: Write,
    ) -> Result<()> {
        self.up_backward(grads, d_y_to, scratch)?;
        low_rank::down_backward(
            d_x_ti,
            grads.of(&self.a_ri),
            &scratch.d_u_tr,
            x_ti,
            &self.a_ri.tensor,
            self.drops(scratch).as_ref(),
            write,
        )?;
        Ok(())
    }

    /// dropout(x) Aᵀ, at its place in the scratch.
    fn down<'a>(&self, x_ti: &Tensor, scratch: &'a mut Scratch) -> Result<&'a Tensor> {
        let [rank, n_in] = [self.a_ri.tensor.shape()[0], self.a_ri.tensor.shape()[1]];
        let drops = self.drops(scratch);
        let place = match scratch.dropout_seed {
            Some(_) => self.place,
            None => 0,
        };
        scratch.make_places(place + 1);
        let u_tr = &mut scratch.u_tr[place];
        u_tr.resize(&[x_ti.numel() / n_in, rank])?;
        low_rank::down_forward(u_tr, x_ti, &self.a_ri.tensor, drops.as_ref())?;
        Ok(u_tr)
    }

    /// The gradient of `down`'s result, and that of B.
    fn up_backward(
        &self,
        grads: &mut Gradients,
        d_y_to: &Tensor,
        scratch: &mut Scratch,
    ) -> Result<()> {
        let u_tr = &scratch.u_tr[self.place];
        scratch.d_u_tr.resize(u_tr.shape())?;
        low_rank::up_backward(
            &mut scratch.d_u_tr,
            grads.of(&self.b_or),
            d_y_to,
            u_tr,
            &self.b_or.tensor,
            self.scale(),
        )?;
        Ok(())
    }

    /// What this layer drops in the pass.
    fn drops(&self, scratch: &Scratch) -> Option<Dropout> {
        let seed = scratch.dropout_seed.filter(|_| self.dropout > 0.0)?;
        Some(Dropout {
            rate: self.dropout,
            seed,
            stream: self.layer_number,
        })
    }
}

#[cfg(test)]
mod tests {
    use crate::random;

    use super::*;

    fn adapter(dropout: f32) -> Adapter {
        let values = |n: usize, stream| {
            (0..n)
                .map(|i| random::normal(11, stream, i as u64) as f32)
                .collect()
        };
        let mut a_ri = Parameter::of(Tensor::from_f32(&[3, 40], values(120, 0)));
        let mut b_or = Parameter::of(Tensor::from_f32(&[7, 3], values(21, 1)));
        a_ri.slot = Some(0);
        b_or.slot = Some(1);
        Adapter {
            a_ri,
            b_or,
            alpha: 6.0,
            scaling: Scaling::Rank,
            dropout,
            layer_number: 5,
            place: 2,
        }
    }

    fn normals(shape: &[usize], stream: u64) -> Tensor {
        let n: usize = shape.iter().product();
        Tensor::from_f32(
            shape,
            (0..n as u64)
                .map(|i| random::normal(3, stream, i) as f32)
                .collect(),
        )
    }

    #[test]
    fn backward_recomputes_the_forward_mask() {
        // <d_y, y(x)> is linear in x, so it equals <d_x, x> exactly when both passes drop the same inputs.
        let adapter = adapter(0.5);
        let x = normals(&[9, 40], 1);
        let d_y = normals(&[9, 7], 2);
        let mut scratch = Scratch {
            dropout_seed: Some(99),
            ..Scratch::new(DType::F32, Device::Cpu)
        };
        let mut y = Tensor::zeros(&[9, 7], DType::F32);
        adapter
            .forward(&mut y, &x, &mut scratch, Write::Accumulate)
            .unwrap();
        let mut d_x = Tensor::zeros(&[9, 40], DType::F32);
        let tensors = vec![
            Tensor::zeros(&[3, 40], DType::F32),
            Tensor::zeros(&[7, 3], DType::F32),
        ];
        let mut grads = Gradients::new(tensors, vec![false; 2]);
        adapter
            .backward(
                &mut d_x,
                &mut grads,
                &d_y,
                &x,
                &mut scratch,
                Write::Accumulate,
            )
            .unwrap();
        let dot = |a: &Tensor, b: &Tensor| -> f64 {
            std::iter::zip(a.f32s(), b.f32s())
                .map(|(a, b)| f64::from(*a) * f64::from(*b))
                .sum()
        };
        let through_y = dot(&d_y, &y);
        for through in [
            dot(&d_x, &x),
            dot(&grads.tensors[0], &adapter.a_ri.tensor),
            dot(&grads.tensors[1], &adapter.b_or.tensor),
        ] {
            assert!(
                (through - through_y).abs() < 1e-3 * through_y.abs(),
                "{through} {through_y}"
            );
        }
        assert!(y.f32s().iter().any(|v| *v != 0.0));
    }
}
