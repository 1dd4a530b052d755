//! The memory plan: what of an optimizer step stays on the GPU, what is recomputed in the backward pass, how many rows go at once.
//!
//! Everything is counted before anything is allocated, from the configuration alone, so that `doctor` says what training will do and
//! training does what `doctor` said. Of all plans that fit, the one with the least extra time is chosen; what a plan costs is
//! reckoned in round figures of a GPU's class, which decide between plans and are shown to nobody.

use std::fmt;
use std::ops::RangeInclusive;

use kernel::cuda::{DeviceProperties, WORKSPACE_BYTES, footprint, nccl, table_bytes};
use kernel::host::HostMemory;
use kernel::ops::adamw_host::stream_bytes;
use kernel::{DType, Device};
use model::{Config, LoraConfig, Model, Recompute, TensorSpec, TrainPass};

use crate::error::{Error, Result};
use crate::job::Job;
use crate::ranks::{Owners, Ranks};

/// The rows of an optimizer step as a recipe asks for them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StepRows {
    /// Rows of a micro-batch, at most.
    pub rows: usize,
    /// Tokens of a row.
    pub row_tokens: usize,
    /// Micro-batches of that many rows.
    pub accumulate: usize,
    /// Rows at a time, at most: all of a micro-batch, or fewer in as many more of them.
    pub at_once: usize,
}

impl StepRows {
    /// What the job's recipe asks for.
    pub fn of(job: &Job) -> Self {
        StepRows {
            rows: job.batch.rows,
            row_tokens: job.data.row_tokens,
            accumulate: job.batch.accumulate,
            at_once: job
                .rows_at_once
                .map_or(job.batch.rows, |at_once| at_once.clamp(1, job.batch.rows)),
        }
    }

    /// Micro-batches of a step where each has at most `rows_per_batch` rows.
    pub fn micro_batches(self, rows_per_batch: usize) -> usize {
        (self.rows * self.accumulate).div_ceil(rows_per_batch.max(1))
    }
}

/// What is to be trained.
#[derive(Debug, Clone, Copy)]
pub struct Training<'a> {
    /// Of the model.
    pub config: &'a Config,
    /// Of weights and activations.
    pub dtype: DType,
    /// None: all weights train.
    pub lora: Option<&'a LoraConfig>,
    /// The rows of a step.
    pub rows: StepRows,
    /// Which of the processes that train together is planned for; 0 where there is one.
    pub rank: usize,
    /// How many train together, each with a GPU of its own.
    pub n_ranks: usize,
}

impl<'a> Training<'a> {
    /// Training of `model` by this rank.
    pub fn of(model: &'a Model, rows: StepRows, ranks: &Ranks) -> Self {
        Training {
            config: model.config(),
            dtype: model.dtype(),
            lora: model.lora(),
            rows,
            rank: ranks.rank(),
            n_ranks: ranks.n_ranks(),
        }
    }

    /// Bytes that a CPU needs: weights, for what trains gradient and two moments in f32, activations of a micro-batch.
    pub fn cpu_bytes(&self) -> u64 {
        let pass = self.pass(self.rows.rows);
        let weights = pass.weights();
        let weights = weights.iter().map(|spec| spec.numel() * spec.dtype.size());
        let trained: usize = pass.trained().iter().map(TensorSpec::numel).sum();
        (weights.sum::<usize>() + 12 * trained + pass.activation_bytes(&[])) as u64
    }

    /// The pass over `rows` rows.
    pub fn pass(&self, rows: usize) -> TrainPass<'a> {
        TrainPass {
            config: self.config,
            dtype: self.dtype,
            lora: self.lora,
            n_tokens: rows * self.rows.row_tokens,
            longest: self.rows.row_tokens,
        }
    }
}

/// Bytes on the GPU by what they are for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize)]
pub struct Bytes {
    /// Of all weights, an adapter's included.
    pub weights: usize,
    /// Of what trains, in f32.
    pub gradients: usize,
    /// Of the tensors that the rank owns: those that stay on the GPU, and the ring that the others pass through.
    pub moments: usize,
    /// Kept from forward to backward, and the gradients of activations.
    pub activations: usize,
    /// Of ops, cuBLASLt's workspace included.
    pub scratch: usize,
    /// Tokens, targets and document borders.
    pub tables: usize,
    /// Of NCCL, where several ranks train together; it allocates by itself.
    pub nccl: usize,
}

impl Bytes {
    /// Their sum: the peak.
    pub fn total(&self) -> usize {
        let of_step = self.moments + self.activations + self.scratch + self.tables;
        self.weights + self.gradients + of_step + self.nccl
    }
}

/// How an optimizer step is done on a GPU.
#[derive(Debug, Clone, PartialEq)]
pub struct MemoryPlan {
    /// Rows of a micro-batch; the step has as many rows as were asked for.
    pub rows: usize,
    /// What each layer recomputes in the backward pass.
    pub policy: Vec<Recompute>,
    /// Of each trained tensor, whether its moments lie in host memory.
    pub offloaded: Vec<bool>,
    /// What the step takes on the GPU.
    pub bytes: Bytes,
    /// Bytes of moments in pinned host memory.
    pub host_bytes: usize,
    /// Scratch to reserve, of `bytes.scratch`.
    pub op_scratch_bytes: usize,
}

/// Layers by what they recompute in the backward pass, see [`Recompute`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize)]
pub struct Recomputing {
    /// Layers that recompute nothing.
    pub nothing: usize,
    /// Layers that recompute norms, convolutions and gates.
    pub elementwise: usize,
    /// Layers that recompute those and the feed-forward.
    pub feed_forward: usize,
    /// Layers that recompute everything.
    pub layer: usize,
}

impl Recomputing {
    /// Counts the layers of a policy.
    pub fn of(policy: &[Recompute]) -> Self {
        let count = |choice| policy.iter().filter(|other| **other == choice).count();
        Recomputing {
            nothing: count(Recompute::Nothing),
            elementwise: count(Recompute::Elementwise),
            feed_forward: count(Recompute::FeedForward),
            layer: count(Recompute::Layer),
        }
    }

    /// Layers that recompute matrix products.
    pub fn n_products(self) -> usize {
        self.feed_forward + self.layer
    }
}

impl fmt::Display for Recomputing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Recomputing {
            nothing,
            elementwise,
            feed_forward,
            layer,
        } = *self;
        let n_layers = nothing + elementwise + feed_forward + layer;
        let mut first = true;
        for (n, what) in [
            (elementwise, "their norms and gates"),
            (feed_forward, "their feed-forward"),
            (layer, "everything"),
        ] {
            match (n, first) {
                (0, _) => continue,
                (n, true) => write!(
                    f,
                    "to save memory {n} of {n_layers} layers recompute {what} in the backward pass"
                )?,
                (n, false) => write!(f, ", {n} {what}")?,
            }
            first = false;
        }
        match first {
            true => write!(f, "no layer has to recompute anything"),
            false => Ok(()),
        }
    }
}

/// What a plan may use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Room {
    /// Bytes of the GPU for buffers, weights included.
    pub gpu_bytes: usize,
    /// Bytes of the host that may be page-locked.
    pub host_bytes: usize,
}

impl MemoryPlan {
    /// The best plan on `gpu` that takes no more than `room`.
    ///
    /// # Errors
    /// [`Error::DoesNotFit`] and [`Error::DoesNotFitHost`] with the least that is needed.
    pub fn new(training: &Training, gpu: DeviceProperties, room: Room) -> Result<MemoryPlan> {
        MemoryPlan::best(training, gpu, room, 1..=training.rows.at_once)
    }

    /// The best of those with as many rows at a time.
    fn best(
        training: &Training,
        gpu: DeviceProperties,
        room: Room,
        at_once: RangeInclusive<usize>,
    ) -> Result<MemoryPlan> {
        let budget = room.gpu_bytes;
        let policies = Recompute::policies(training.config);
        let fixed = Fixed::of(training);
        let mut best: Option<(f64, MemoryPlan)> = None;
        let (mut least, mut least_host) = (usize::MAX, usize::MAX);
        for rows in at_once.rev() {
            let pass = training.pass(rows);
            let micro_batches = training.rows.micro_batches(rows);
            let n_passes = micro_batches.div_ceil(training.n_ranks);
            let waiting_s = fixed.waiting_seconds(training, gpu, rows);
            let op_scratch_bytes = pass.scratch_bytes(gpu);
            for policy in &policies {
                // 1. all but the moments
                let mut bytes = fixed.bytes;
                bytes.activations = pass.activation_bytes(policy);
                bytes.scratch = op_scratch_bytes + footprint(WORKSPACE_BYTES);
                bytes.tables = table_bytes(pass.n_tokens);
                // 2. as many moments as fit
                let for_moments = budget.saturating_sub(bytes.total());
                let Hosted {
                    offloaded,
                    resident_bytes,
                    host_bytes,
                } = fixed.host(for_moments);
                bytes.moments = resident_bytes;
                least = least.min(bytes.total());
                if bytes.total() > budget {
                    continue;
                }
                least_host = least_host.min(host_bytes);
                if host_bytes > room.host_bytes {
                    continue;
                }
                // 3. what it costs
                let seconds = n_passes as f64 * fixed.pass_seconds(&pass, gpu, policy)
                    + waiting_s
                    + host_bytes as f64 / Rates::of(gpu).link_bytes;
                if best.as_ref().is_none_or(|(other, _)| seconds < *other) {
                    let plan = MemoryPlan {
                        rows,
                        policy: policy.clone(),
                        offloaded,
                        bytes,
                        host_bytes,
                        op_scratch_bytes,
                    };
                    best = Some((seconds, plan));
                }
                // Whatever recomputes more takes longer, and has nothing to win by it.
                if host_bytes == 0 {
                    break;
                }
            }
        }
        best.map(|(_, plan)| plan).ok_or(match least_host {
            usize::MAX => Error::DoesNotFit {
                needed: least,
                available: budget,
                row_tokens: training.rows.row_tokens,
                is_lora: training.lora.is_some(),
            },
            needed => Error::DoesNotFitHost {
                needed,
                available: room.host_bytes,
                gpu_bytes: budget,
                is_lora: training.lora.is_some(),
            },
        })
    }

    /// Rows at a time, the same on all ranks, and the plan for a model that lies on a GPU; None on a CPU, which needs none. As many rows
    /// as fit where least do: all ranks must cut a step into the same micro-batches, or rows would be lost or learned from twice.
    ///
    /// # Errors
    /// As [`MemoryPlan::new`]; [`Error::Rank`] if a rank is gone.
    pub fn among(
        model: &Model,
        rows: StepRows,
        ranks: &Ranks,
    ) -> Result<(usize, Option<MemoryPlan>)> {
        let Device::Cuda(cuda) = model.device() else {
            return Ok((ranks.least(rows.at_once)?, None));
        };
        let training = Training::of(model, rows, ranks);
        let room = Room {
            // The weights are there already.
            gpu_bytes: cuda.available_bytes()? + weight_bytes(&training),
            // The ranks of a host lock its memory at the same time; as if all were on this one.
            host_bytes: HostMemory::now().lockable_bytes() / ranks.n_ranks(),
        };
        let mut plan = MemoryPlan::new(&training, cuda.properties(), room)?;
        let agreed = ranks.least(plan.rows)?;
        if agreed < plan.rows {
            plan = MemoryPlan::best(&training, cuda.properties(), room, agreed..=agreed)?;
        }
        Ok((agreed, Some(plan)))
    }

    /// Most bytes of buffers at a time.
    pub fn peak_bytes(&self) -> usize {
        self.bytes.total()
    }

    /// Layers by what they recompute in the backward pass.
    pub fn recomputing(&self) -> Recomputing {
        Recomputing::of(&self.policy)
    }

    /// One line for people.
    pub fn describe(&self) -> String {
        let mut text = format!("{} rows at a time; {}", self.rows, self.recomputing());
        if self.host_bytes > 0 {
            text.push_str(&format!(
                "; moments of {} of {} tensors in host memory, {:.1} GiB",
                self.n_offloaded(),
                self.offloaded.len(),
                self.host_bytes as f64 / f64::from(1 << 30)
            ));
        }
        text
    }

    /// Tensors whose moments lie in host memory.
    pub fn n_offloaded(&self) -> usize {
        self.offloaded
            .iter()
            .filter(|offloaded| **offloaded)
            .count()
    }
}

/// Bytes of the weights on a GPU.
pub fn weight_bytes(training: &Training) -> usize {
    spec_bytes(&training.pass(1).weights(), |spec| spec.dtype)
}

fn spec_bytes(specs: &[TensorSpec], dtype: impl Fn(&TensorSpec) -> DType) -> usize {
    let specs = specs.iter();
    specs
        .map(|spec| footprint(spec.numel() * dtype(spec).size()))
        .sum()
}

/// What does not depend on rows and the recompute policy.
struct Fixed {
    /// Weights, gradients and what NCCL takes.
    bytes: Bytes,
    /// Moments of each trained tensor: bytes on the GPU, and in host memory; none of a tensor that another rank owns.
    moments: Vec<(usize, usize)>,
    n_trained: usize,
    n_weights: usize,
    n_layers: usize,
}

/// Which moments lie where.
struct Hosted {
    offloaded: Vec<bool>,
    resident_bytes: usize,
    host_bytes: usize,
}

/// Moments below this stay: a copy of so few bytes costs more than they take.
const LEAST_OFFLOADED: usize = 1 << 20;

impl Fixed {
    fn of(training: &Training) -> Self {
        let trained = training.pass(1).trained();
        // Both moments have the weight's type: see `optimizer::moment_dtype`.
        let sizes: Vec<usize> = trained.iter().map(TensorSpec::numel).collect();
        let owners = Owners::assign(&sizes, training.rank, training.n_ranks);
        let moments = trained.iter().enumerate().map(|(tensor, spec)| {
            let bytes = spec.numel() * spec.dtype.size();
            match owners.has(tensor) {
                true => (2 * footprint(bytes), 2 * bytes),
                false => (0, 0),
            }
        });
        Fixed {
            bytes: Bytes {
                weights: weight_bytes(training),
                gradients: spec_bytes(&trained, |_| DType::F32),
                nccl: match training.n_ranks {
                    1 => 0,
                    _ => nccl::RESERVED_BYTES,
                },
                ..Bytes::default()
            },
            moments: moments.collect(),
            n_trained: sizes.iter().sum(),
            n_weights: training.config.n_params() as usize,
            n_layers: training.config.layer_types.len(),
        }
    }

    /// Moves the moments of as few tensors as need be to the host, the largest first, so that the others and the ring take at most
    /// `room` bytes, if that can be.
    fn host(&self, room: usize) -> Hosted {
        let all: usize = self.moments.iter().map(|(bytes, _)| bytes).sum();
        let mut hosted = Hosted {
            offloaded: vec![false; self.moments.len()],
            resident_bytes: all,
            host_bytes: 0,
        };
        if all <= room {
            return hosted;
        }
        hosted.resident_bytes += footprint(stream_bytes());
        let mut order: Vec<usize> = (0..self.moments.len())
            .filter(|idx| self.moments[*idx].1 >= LEAST_OFFLOADED)
            .collect();
        order.sort_by_key(|idx| std::cmp::Reverse(self.moments[*idx]));
        let mut offload = |idx: usize| {
            hosted.offloaded[idx] = true;
            hosted.resident_bytes -= self.moments[idx].0;
            hosted.host_bytes += self.moments[idx].1;
            hosted.resident_bytes
        };
        let mut taken = all + footprint(stream_bytes());
        let mut left = Vec::new();
        for idx in order {
            match taken.saturating_sub(room) {
                0 => break,
                missing if self.moments[idx].0 <= missing => taken = offload(idx),
                _ => left.push(idx),
            }
        }
        // One more makes up for the rest: the smallest that is large enough.
        if taken > room
            && let Some(idx) = left.pop()
        {
            offload(idx);
        }
        hosted
    }

    /// What one pass costs beside the arithmetic that every plan needs: work done again, weights and gradients read and gradients
    /// written once more, launches.
    fn pass_seconds(&self, pass: &TrainPass, gpu: DeviceProperties, policy: &[Recompute]) -> f64 {
        let rates = Rates::of(gpu);
        let moved = 3 * self.bytes.weights + 2 * 4 * self.n_trained;
        pass.recomputed_operations(policy) / rates.operations
            + (moved as f64 + pass.recomputed_bytes(policy)) / rates.memory_bytes
            + self.n_layers as f64 * LAUNCHES_PER_LAYER * LAUNCH_S
    }

    /// What ranks wait for the one that computes most rows, where they cannot be shared out evenly; nothing where there is one rank.
    fn waiting_seconds(&self, training: &Training, gpu: DeviceProperties, at_once: usize) -> f64 {
        let StepRows {
            rows,
            accumulate,
            row_tokens,
            ..
        } = training.rows;
        let even = (rows * accumulate) as f64 / training.n_ranks as f64;
        let waiting = most_rows(training.rows, at_once, training.n_ranks) as f64 - even;
        // Forward and backward, in round figures: six operations a weight and token, four where the weights are frozen.
        let per_weight = if training.lora.is_some() { 4.0 } else { 6.0 };
        let operations = per_weight * (self.n_weights * row_tokens) as f64;
        waiting * operations / Rates::of(gpu).operations
    }
}

/// Rows of a step that rank 0 computes, who has the most: micro-batches of at most `at_once` rows go to the ranks round-robin.
fn most_rows(rows: StepRows, at_once: usize, n_ranks: usize) -> usize {
    let micro_batches = rows.micro_batches(at_once);
    let full = micro_batches.div_ceil(n_ranks) * at_once;
    let has_last = micro_batches % n_ranks == 1 % n_ranks;
    match has_last {
        true => full - (micro_batches * at_once - rows.rows * rows.accumulate),
        false => full,
    }
}

/// Kernels of a layer, forward and backward, and what the host takes to launch one.
const LAUNCHES_PER_LAYER: f64 = 100.0;
const LAUNCH_S: f64 = 4e-6;

/// A second's work of a GPU's class, in round figures.
struct Rates {
    /// Of bf16 products.
    operations: f64,
    memory_bytes: f64,
    /// To and from the host, in both directions at once.
    link_bytes: f64,
}

impl Rates {
    fn of(gpu: DeviceProperties) -> Self {
        let (operations_per_multiprocessor, memory_bytes, link_bytes) = match gpu.compute {
            90 => (4.2e12, 2.6e12, 4.5e10),
            100..120 => (1e13, 6e12, 4.5e10),
            120.. => (1.1e12, 1.5e12, 4.5e10),
            80 => (2.2e12, 1.6e12, 2.2e10),
            _ => (1.1e12, 8e11, 2.2e10),
        };
        Rates {
            operations: f64::from(gpu.n_multiprocessors) * operations_per_multiprocessor,
            memory_bytes,
            link_bytes,
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const GIB: usize = 1 << 30;

    fn config_4b() -> Config {
        let layer_types: Vec<&str> = (1..=32)
            .map(|layer| match layer % 4 {
                0 => "full_attention",
                _ => "linear_attention",
            })
            .collect();
        let json = json!({
            "architectures": ["Qwen3_5ForCausalLM"],
            "model_type": "qwen3_5_text",
            "vocab_size": 248_320,
            "hidden_size": 2560,
            "intermediate_size": 9216,
            "num_hidden_layers": 32,
            "layer_types": layer_types,
            "num_attention_heads": 16,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "linear_num_key_heads": 16,
            "linear_num_value_heads": 32,
            "linear_key_head_dim": 128,
            "linear_value_head_dim": 128,
            "tie_word_embeddings": true,
            "rope_parameters": { "rope_theta": 1e7, "partial_rotary_factor": 0.25 }
        });
        Config::from_json(&json).unwrap()
    }

    fn h100(memory_bytes: usize) -> DeviceProperties {
        DeviceProperties {
            compute: 90,
            n_multiprocessors: 132,
            memory_bytes,
        }
    }

    /// With as much host memory as anyone could want.
    fn room(gpu_bytes: usize) -> Room {
        Room {
            gpu_bytes,
            host_bytes: usize::MAX,
        }
    }

    fn training(config: &Config, rows: usize) -> Training<'_> {
        Training {
            config,
            dtype: DType::Bf16,
            lora: None,
            rows: StepRows {
                rows,
                row_tokens: 5120,
                accumulate: 1,
                at_once: rows,
            },
            rank: 0,
            n_ranks: 1,
        }
    }

    #[test]
    fn plans_stay_within_their_budget_and_spend_it() {
        let config = config_4b();
        let mut last = f64::INFINITY;
        for gib in [30, 40, 50, 60, 76, 90, 140] {
            let training = training(&config, 3);
            let gpu = h100(gib * GIB);
            let budget = gpu.buffer_bytes();
            let plan = MemoryPlan::new(&training, gpu, room(budget)).unwrap();
            assert!(plan.peak_bytes() <= budget, "{gib} GiB");
            // More memory is never slower.
            let fixed = Fixed::of(&training);
            let seconds = 3_usize.div_ceil(plan.rows) as f64
                * fixed.pass_seconds(&training.pass(plan.rows), gpu, &plan.policy)
                + plan.host_bytes as f64 / Rates::of(gpu).link_bytes;
            assert!(seconds <= last, "{gib} GiB");
            last = seconds;
            let full = plan.recomputing().nothing == 32 && plan.host_bytes == 0;
            assert!(full || budget - plan.peak_bytes() < 2 * GIB, "{gib} GiB");
        }
    }

    #[test]
    fn no_more_moments_go_to_the_host_than_need_be() {
        let config = config_4b();
        let fixed = Fixed::of(&training(&config, 1));
        let all: usize = fixed.moments.iter().map(|(bytes, _)| bytes).sum();
        let hosted = fixed.host(all);
        assert_eq!((hosted.host_bytes, hosted.resident_bytes), (0, all));
        for room in [all - 1, all - GIB, all / 2, all / 10] {
            let hosted = fixed.host(room);
            assert!(hosted.resident_bytes <= room);
            assert!(room - hosted.resident_bytes < GIB / 32, "{room}");
            let missing = all + footprint(stream_bytes()) - room;
            assert!(hosted.host_bytes < missing + GIB / 32, "{room}");
        }
    }

    #[test]
    fn what_does_not_fit_is_refused_with_what_it_needs() {
        let config = config_4b();
        let training = training(&config, 3);
        let gpu = h100(24 * GIB);
        let refused = MemoryPlan::new(&training, gpu, room(gpu.buffer_bytes())).err();
        let Some(Error::DoesNotFit { needed, .. }) = refused else {
            panic!("{refused:?}");
        };
        assert!(needed > gpu.buffer_bytes());
        let plan = MemoryPlan::new(&training, gpu, room(needed)).unwrap();
        assert_eq!((plan.rows, plan.peak_bytes()), (1, needed));
        assert!(MemoryPlan::new(&training, gpu, room(needed - 1)).is_err());
    }

    #[test]
    fn a_host_with_less_memory_gets_another_plan_or_is_told_what_is_needed() {
        let config = config_4b();
        // Of many micro-batches, so that recomputing costs more than moving moments.
        let mut training = training(&config, 3);
        training.rows.accumulate = 16;
        let gpu = h100(40 * GIB);
        let budget = gpu.buffer_bytes();
        let plan = |gpu_bytes, host_bytes| {
            let room = Room {
                gpu_bytes,
                host_bytes,
            };
            MemoryPlan::new(&training, gpu, room)
        };
        // 1. enough: what is fastest keeps more activations on the GPU and moves more moments
        let ample = plan(budget, usize::MAX).unwrap();
        assert!(ample.host_bytes > 0);
        // 2. less: a plan that is slower, and stays within
        let within = ample.host_bytes - 1;
        let tight = plan(budget, within).unwrap();
        assert!(tight.host_bytes <= within && tight.peak_bytes() <= budget);
        assert!((tight.rows, &tight.policy) != (ample.rows, &ample.policy));
        // 3. too little: what the least demanding plan needs
        let small = 30 * GIB;
        let Err(Error::DoesNotFitHost { needed, .. }) = plan(small, GIB) else {
            panic!("moments of gigabytes in one");
        };
        assert!(plan(small, needed - 1).is_err());
        assert_eq!(plan(small, needed).unwrap().host_bytes, needed);
    }

    #[test]
    fn ranks_count_their_own_moments_and_leave_room_for_nccl() {
        let config = config_4b();
        let gpu = h100(140 * GIB);
        let plan = |rank, n_ranks| {
            let mut training = training(&config, 1);
            training.rows.accumulate = 4;
            (training.rank, training.n_ranks) = (rank, n_ranks);
            MemoryPlan::new(&training, gpu, room(gpu.buffer_bytes())).unwrap()
        };
        let alone = plan(0, 1).bytes;
        assert_eq!(alone.nccl, 0);
        let each = [0, 1, 2, 3].map(|rank| plan(rank, 4).bytes);
        assert_eq!(each.iter().map(|b| b.moments).sum::<usize>(), alone.moments);
        for bytes in each {
            assert!(bytes.moments < alone.moments * 3 / 10);
            assert_eq!(bytes.nccl, nccl::RESERVED_BYTES);
            assert_eq!(
                (bytes.weights, bytes.gradients),
                (alone.weights, alone.gradients)
            );
        }
    }

    #[test]
    fn a_rank_moves_no_moments_to_the_host_that_another_owns() {
        let config = config_4b();
        let gpu = h100(34 * GIB);
        let offloaded = [0, 1].map(|rank| {
            let mut training = training(&config, 1);
            training.rows.accumulate = 2;
            (training.rank, training.n_ranks) = (rank, 2);
            let trained = training.pass(1).trained();
            let sizes: Vec<usize> = trained.iter().map(TensorSpec::numel).collect();
            let owners = Owners::assign(&sizes, rank, 2);
            let plan = MemoryPlan::new(&training, gpu, room(gpu.buffer_bytes())).unwrap();
            assert!(plan.n_offloaded() > 0, "{}", plan.describe());
            for (tensor, offloaded) in plan.offloaded.iter().enumerate() {
                assert!(!offloaded || owners.has(tensor));
            }
            plan.host_bytes
        });
        assert!(offloaded.into_iter().all(|bytes| bytes < 8 * GIB));
    }

    #[test]
    fn a_plan_says_in_words_what_is_recomputed() {
        let said = |nothing, elementwise, feed_forward, layer| {
            let counts = Recomputing {
                nothing,
                elementwise,
                feed_forward,
                layer,
            };
            counts.to_string()
        };
        assert_eq!(said(32, 0, 0, 0), "no layer has to recompute anything");
        assert_eq!(
            said(20, 0, 12, 0),
            "to save memory 12 of 32 layers recompute their feed-forward in the backward pass"
        );
        assert_eq!(
            said(0, 3, 2, 1),
            "to save memory 3 of 6 layers recompute their norms and gates in the backward pass, 2 their feed-forward, 1 everything"
        );
    }

    #[test]
    fn rows_are_cut_so_that_ranks_wait_little() {
        let step = |rows, accumulate| StepRows {
            rows,
            row_tokens: 5120,
            accumulate,
            at_once: rows,
        };
        for (rows, accumulate, at_once, n_ranks, expect) in [
            (3, 8, 3, 1, 24),
            (3, 8, 2, 8, 4),
            (3, 8, 3, 8, 3),
            (3, 1, 2, 2, 2),
            (3, 1, 2, 1, 3),
            (5, 1, 2, 2, 3),
        ] {
            let most = most_rows(step(rows, accumulate), at_once, n_ranks);
            assert_eq!(most, expect, "{rows} x {accumulate}, {at_once}, {n_ranks}");
        }
        // Three rows for two ranks: two at once and one beside them.
        let config = config_4b();
        let gpu = h100(140 * GIB);
        let mut training = training(&config, 3);
        training.n_ranks = 2;
        let plan = MemoryPlan::new(&training, gpu, room(gpu.buffer_bytes())).unwrap();
        assert_eq!(plan.rows, 2);
    }
}
