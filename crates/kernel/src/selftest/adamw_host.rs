//! Moments in host memory: the bytes of moments on the CPU, through a ring far smaller than they are.

use crate::ops::adamw;
use crate::ops::adamw_host::{HostMoments, HostStep, Stream};
use crate::tensor::Storage;
use crate::{DType, Device, Result, Tensor};

use super::{Check, Tolerance};

/// Not a bit apart.
const EXACT: Tolerance = Tolerance {
    f32: 0.0,
    bf16: 0.0,
};
const N_STEPS: u64 = 3;
/// Full pieces, a piece cut short, a tensor within one, an odd end.
const SIZES: [usize; 5] = [4096, 1000, 24, 3001, 8];

pub(super) fn run(check: &mut Check) -> Result<()> {
    for (w_type, dtype) in [(DType::Bf16, DType::Bf16), (DType::F32, DType::F32)] {
        for (n_slots, piece_bytes) in [(4, 512), (2, 4096), (3, 1 << 20)] {
            let mut outputs = Vec::new();
            for n in SIZES {
                outputs.push(("w", check.tensor(&[n], w_type)));
                outputs.push(("m", check.range(&[n], dtype, -0.1, 0.1)));
                outputs.push(("v", check.range(&[n], dtype, 0.0, 0.01)));
            }
            let gradients: Vec<Tensor> = SIZES.map(|n| check.tensor(&[n], DType::F32)).into();
            let gradients: Vec<&Tensor> = gradients.iter().collect();
            check.both(
                &format!("{dtype} moments, {n_slots} pieces of {piece_bytes} bytes"),
                EXACT,
                outputs,
                &gradients,
                |out, gradients| steps(out, gradients, n_slots, piece_bytes),
            )?;
        }
    }
    Ok(())
}

fn update(step: u64, seed: usize) -> adamw::Update {
    adamw::Update {
        lr: 1e-4,
        beta1: 0.9,
        beta2: 0.95,
        eps: 1e-8,
        weight_decay: 0.1,
        step,
        grad_scale: 0.37,
        seed: seed as u64,
        rounding: adamw::Rounding::Stochastic,
    }
}

/// Some steps over (w, m, v) of every tensor: with the moments where they are on a CPU, with all in host memory for a GPU.
fn steps(
    out: &mut [Tensor],
    gradients: &[Tensor],
    n_slots: usize,
    piece_bytes: usize,
) -> Result<()> {
    let Device::Cuda(cuda) = out[0].device() else {
        for step in 1..=N_STEPS {
            for (seed, (tensors, grad)) in out.chunks_mut(3).zip(gradients).enumerate() {
                let [w, m, v] = tensors else {
                    unreachable!("three outputs a tensor were handed in")
                };
                adamw::step(w, m, v, grad, &update(step, seed))?;
            }
        }
        return Ok(());
    };
    let mut stream = Stream::with_pieces(cuda, n_slots, piece_bytes)?;
    let mut moments = Vec::new();
    for tensors in out.chunks(3) {
        let (m, v) = (&tensors[1], &tensors[2]);
        let mut host = HostMoments::zeros(m.shape(), m.dtype(), cuda)?;
        host.m.bytes_mut()?.copy_from_slice(&bytes(m)?);
        host.v.bytes_mut()?.copy_from_slice(&bytes(v)?);
        moments.push(host);
    }
    for step in 1..=N_STEPS {
        // The second step goes without fetching ahead.
        if step != 2 {
            stream.prefetch(&moments.iter().collect::<Vec<_>>())?;
        }
        let mut host_steps: Vec<HostStep> = out
            .chunks_mut(3)
            .zip(&mut moments)
            .zip(gradients)
            .enumerate()
            .map(|(seed, ((tensors, moments), grad))| HostStep {
                w: &mut tensors[0],
                moments,
                grad,
                update: update(step, seed),
            })
            .collect();
        stream.step(&mut host_steps)?;
    }
    for (tensors, host) in out.chunks_mut(3).zip(&moments) {
        for (tensor, bytes) in tensors[1..].iter_mut().zip([&host.m, &host.v]) {
            let mut copy = Tensor::zeros(tensor.shape(), tensor.dtype());
            match copy.storage_mut() {
                Storage::F32(data) => {
                    bytemuck::cast_slice_mut(data).copy_from_slice(bytes.bytes()?)
                }
                Storage::Bf16(data) => {
                    bytemuck::cast_slice_mut(data).copy_from_slice(bytes.bytes()?);
                }
                Storage::Cuda(..) => unreachable!("made on the host"),
            }
            tensor.copy_from(&copy)?;
        }
    }
    Ok(())
}

fn bytes(tensor: &Tensor) -> Result<Vec<u8>> {
    let host = tensor.to_device(Device::Cpu)?;
    Ok(match host.storage() {
        Storage::F32(data) => bytemuck::cast_slice(data).to_vec(),
        Storage::Bf16(data) => bytemuck::cast_slice(data).to_vec(),
        Storage::Cuda(..) => unreachable!("copied to the host"),
    })
}
