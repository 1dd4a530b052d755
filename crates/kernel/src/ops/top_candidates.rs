//! The likeliest of many logits, and what the probability of each needs: a few numbers of a row instead of a vocabulary of them.
//!
//! A row is cut into equal groups; the floor is the K-th largest of the groups' maxima, which at least K logits reach. All that are not
//! below it are candidates, so every other logit is strictly below every candidate's floor. sum exp(logit - largest) runs over the row.

// B rows, C vocabulary.

use super::check;
use crate::{Device, Result, Tensor};

/// Groups of a row, at the most.
const MOST_GROUPS: usize = 2048;

/// Room for candidates of a row.
const ROOM: usize = 256;

/// Numbers before the candidates of a row.
const HEADER: usize = 4;

/// Candidates of one row.
#[derive(Debug, Clone, PartialEq)]
pub struct Candidates {
    /// Ids, ascending.
    pub ids: Vec<u32>,
    /// Their logits.
    pub logits: Vec<f32>,
    /// Every logit that is no candidate's is below this.
    pub floor: f32,
    /// The largest logit.
    pub largest: f32,
    /// sum exp(logit - largest) over the whole row.
    pub mass: f32,
}

/// What the op writes, and needs on its way; sized at first use.
#[derive(Debug)]
pub struct Scratch {
    maxima_bg: Tensor,
    masses_bg: Tensor,
    /// [B, HEADER + 2·ROOM], bits of 32-bit words.
    out: Tensor,
}

impl Scratch {
    /// For rows on `device`.
    pub fn new(device: Device) -> Self {
        let empty = || Tensor::empty_on(device, crate::DType::F32);
        Scratch {
            maxima_bg: empty(),
            masses_bg: empty(),
            out: empty(),
        }
    }

    /// Room for `b` rows of `c` logits.
    ///
    /// # Errors
    /// [`crate::Error::OutOfMemory`]
    pub fn resize(&mut self, b: usize, c: usize) -> Result<()> {
        let [_, n_groups] = groups(c);
        self.maxima_bg.resize(&[b, n_groups])?;
        self.masses_bg.resize(&[b, n_groups])?;
        self.out.resize(&[b, HEADER + 2 * ROOM])
    }

    /// What [`select`] found in each row; None where the row must be looked at whole: too many logits are alike, or one is NaN or infinite.
    ///
    /// # Errors
    /// [`crate::Error::Cuda`] if the GPU failed.
    pub fn read(&self) -> Result<Vec<Option<Candidates>>> {
        let words: Vec<u32> = self.out.read_f32()?.iter().map(|x| x.to_bits()).collect();
        Ok(words.chunks_exact(HEADER + 2 * ROOM).map(row).collect())
    }
}

/// Finds the candidates of every row: logits_bc [B,C] f32, at least `k` of each row where it has as many.
///
/// # Errors
/// [`crate::Error::Shape`] where `scratch` has another size, [`crate::Error::DType`] where logits are not f32.
pub fn select(scratch: &mut Scratch, logits_bc: &Tensor, k: usize) -> Result<()> {
    const OP: &str = "top_candidates::select";
    let [b, c] = check::dims(OP, "logits_bc", logits_bc, "[B,C]")?;
    let [_, n_groups] = groups(c);
    check::f32(OP, "logits_bc", logits_bc)?;
    check::shape(OP, "maxima_bg", &scratch.maxima_bg, &[b, n_groups])?;
    check::shape(OP, "out", &scratch.out, &[b, HEADER + 2 * ROOM])?;
    match check::device(OP, logits_bc, &[("out", &scratch.out)])? {
        Device::Cpu => cpu::select(scratch, logits_bc, k),
        Device::Cuda(cuda) => cuda::select(cuda, scratch, logits_bc, k)?,
    }
    Ok(())
}

/// Logits in a group, and groups in a row.
fn groups(c: usize) -> [usize; 2] {
    let group = c.div_ceil(MOST_GROUPS).max(1);
    [group, c.div_ceil(group)]
}

fn row(words: &[u32]) -> Option<Candidates> {
    let [n, is_broken, largest, mass] = [0, 1, 2, 3].map(|i| words[i]);
    let n = n as usize;
    if is_broken != 0 || n == 0 || n > ROOM {
        return None;
    }
    let logits: Vec<f32> = words[HEADER + ROOM..][..n]
        .iter()
        .map(|bits| f32::from_bits(*bits))
        .collect();
    Some(Candidates {
        ids: words[HEADER..][..n].to_vec(),
        floor: logits.iter().copied().fold(f32::INFINITY, f32::min),
        logits,
        largest: f32::from_bits(largest),
        mass: f32::from_bits(mass),
    })
}

/// The definition, plainly.
mod cpu {
    use super::{HEADER, ROOM, Scratch, groups};
    use crate::Tensor;

    pub(super) fn select(scratch: &mut Scratch, logits: &Tensor, k: usize) {
        let c = logits.shape()[1];
        let out = scratch.out.f32s_mut();
        for (row, out) in logits
            .f32s()
            .chunks_exact(c)
            .zip(out.chunks_exact_mut(HEADER + 2 * ROOM))
        {
            out.fill(0.0);
            let [group, _] = groups(c);
            let largest = |x: &[f32]| x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let mut maxima: Vec<f32> = row.chunks(group).map(largest).collect();
            maxima.sort_by(|a, b| b.total_cmp(a));
            let most = maxima[0];
            let is_broken = row.iter().any(|x| x.is_nan()) || most == f32::INFINITY;
            if is_broken || most == f32::NEG_INFINITY {
                out[1] = f32::from_bits(u32::from(is_broken));
                out[2] = most;
                continue;
            }
            let floor = maxima
                .get(k.max(1) - 1)
                .copied()
                .unwrap_or(f32::NEG_INFINITY);
            let ids: Vec<usize> = (0..c).filter(|id| row[*id] >= floor).collect();
            let mass: f64 = row.iter().map(|x| f64::from((x - most).exp())).sum();
            out[0] = f32::from_bits(ids.len() as u32);
            out[2] = most;
            out[3] = mass as f32;
            if ids.len() <= ROOM {
                for (i, id) in ids.into_iter().enumerate() {
                    out[HEADER + i] = f32::from_bits(id as u32);
                    out[HEADER + ROOM + i] = row[id];
                }
            }
        }
    }
}

mod cuda {
    use super::{ROOM, Scratch, groups};
    use crate::cuda::sources::TOP_CANDIDATES;
    use crate::cuda::{Args, Cuda, Grid};
    use crate::{Result, Tensor};

    /// Warps of a block of the first kernel, one a group.
    const GROUPS_OF_BLOCK: usize = 8;

    pub(super) fn select(
        cuda: Cuda,
        scratch: &mut Scratch,
        logits: &Tensor,
        k: usize,
    ) -> Result<()> {
        let [b, c] = [logits.shape()[0], logits.shape()[1]];
        let [group, n_groups] = groups(c);
        let args = Args::new()
            .tensor_mut(&mut scratch.maxima_bg)
            .tensor_mut(&mut scratch.masses_bg)
            .tensor(logits)
            .u32(c)
            .u32(group)
            .u32(n_groups);
        let grid = Grid {
            blocks: [n_groups.div_ceil(GROUPS_OF_BLOCK) as u32, b as u32, 1],
            threads: 256,
            shared_bytes: 0,
        };
        cuda.launch_early(&TOP_CANDIDATES, "top_candidates_groups", grid, args)?;
        let args = Args::new()
            .tensor_mut(&mut scratch.out)
            .tensor(&scratch.maxima_bg)
            .tensor(&scratch.masses_bg)
            .tensor(logits)
            .u32(c)
            .u32(group)
            .u32(n_groups)
            .u32(k.max(1))
            .u32(ROOM);
        let grid = Grid::line(b, 1024);
        cuda.launch_early(&TOP_CANDIDATES, "top_candidates_select", grid, args)
    }
}

pub(crate) mod examples {
    use super::{ROOM, Scratch};
    use crate::DType::F32;
    use crate::Tensor;
    use crate::example::Example;
    use crate::ops::copy;

    pub(crate) fn compared() -> Vec<Example> {
        [(3, 248_320, 64), (2, 2112, 64), (2, 512, 20), (1, 65, 300)]
            .into_iter()
            .map(|(b, c, k)| {
                let shape = format!("b{b}_c{c}_k{k}");
                Example::new("top_candidates/select", shape)
                    .out("ids", &[b, ROOM], F32)
                    .out("logits", &[b, ROOM], F32)
                    .out("largest_and_mass", &[b, 2], F32)
                    .input_in("row", &[b, c], F32, [-9.0, 9.0])
                    .run(move |[ids, logits, sums], [row]| {
                        let mut scratch = Scratch::new(row.device());
                        scratch.resize(b, c)?;
                        super::select(&mut scratch, row, k)?;
                        // Ids as numbers: as bits they are too small for a norm.
                        let mut found = [Vec::new(), Vec::new(), Vec::new()];
                        for row in scratch.read()? {
                            let Some(row) = row else { continue };
                            let padded = |x: Vec<f32>| {
                                let rest = ROOM - x.len();
                                x.into_iter().chain(std::iter::repeat_n(0.0, rest))
                            };
                            found[0].extend(padded(row.ids.iter().map(|id| *id as f32).collect()));
                            found[1].extend(padded(row.logits));
                            found[2].extend([row.largest, row.mass]);
                        }
                        for (out, found) in [ids, logits, sums].into_iter().zip(found) {
                            let found =
                                Tensor::from_f32(out.shape(), found).to_device(out.device())?;
                            copy::forward(out, 0, &found, 0, found.numel())?;
                        }
                        Ok(())
                    })
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::Random;

    fn found(logits: &Tensor, k: usize) -> Vec<Option<Candidates>> {
        let mut scratch = Scratch::new(Device::Cpu);
        scratch
            .resize(logits.shape()[0], logits.shape()[1])
            .unwrap();
        select(&mut scratch, logits, k).unwrap();
        scratch.read().unwrap()
    }

    #[test]
    fn candidates_are_all_that_reach_the_floor_and_at_least_k() {
        let c = 5000;
        let logits = Random::new(4).tensor(&[2, c], -5.0, 5.0);
        for (row, candidates) in logits.f32s().chunks(c).zip(found(&logits, 40)) {
            let candidates = candidates.unwrap();
            assert!(candidates.ids.len() >= 40);
            let above: Vec<u32> = (0..c as u32)
                .filter(|id| row[*id as usize] >= candidates.floor)
                .collect();
            assert_eq!(candidates.ids, above);
            let mass: f64 = row
                .iter()
                .map(|x| f64::from(x - candidates.largest).exp())
                .sum();
            assert!((f64::from(candidates.mass) / mass - 1.0).abs() < 1e-6);
        }
    }

    #[test]
    fn rows_that_a_few_candidates_cannot_stand_for_are_left_out() {
        let c = 600;
        let broken = |x: f32| {
            let mut row = vec![0.5; c];
            row[7] = x;
            row
        };
        let all_alike = vec![1.0; c];
        let nothing = vec![f32::NEG_INFINITY; c];
        let rows = [broken(f32::NAN), broken(f32::INFINITY), all_alike, nothing].concat();
        let logits = Tensor::from_f32(&[4, c], rows);
        assert_eq!(found(&logits, 5), [None, None, None, None]);
    }
}
