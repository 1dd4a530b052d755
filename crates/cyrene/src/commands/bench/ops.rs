//! `cyrene bench ops`: each primitive of a training step by itself at the shapes of a model, held against the time that its bytes and
//! operations need at the least on this machine.

use anyhow::Result;
use kernel::example::{Example, Sizes};
use kernel::host::HostMemory;
use kernel::ops::EXAMPLES;
use kernel::timing::{self, Ceilings};
use kernel::{DType, Device};
use model::Config;
use serde::Serialize;

use super::{device_name, shapes, storage};
use crate::cli::BenchOps as Args;
use crate::ui::{Ui, size};
use crate::{load, misuse};

/// Of the adapters that `bench train --tuner lora` has.
const RANK: usize = 16;

/// One case, as `--json` prints it.
#[derive(Debug, Serialize)]
struct Line {
    bench: &'static str,
    size: String,
    /// Primitive and direction, such as `swiglu/backward`.
    op: &'static str,
    /// Such as `t5120_f9216`.
    shape: String,
    dtype: String,
    /// Median of the runs.
    ms: f64,
    /// The longest run less the shortest.
    spread_ms: f64,
    /// Bytes that are read or written at the least: each input once, each result once.
    bytes: f64,
    /// Operations of products at the least.
    operations: f64,
    /// What the larger of the two takes at the ceilings; what fits into a cache can be faster.
    floor_ms: f64,
    /// Which of the two: `memory` or `arithmetic`.
    bound: &'static str,
    /// Floor over median.
    share: f64,
    copy_bytes_per_s: f64,
    ceiling_tflops: f64,
    device_name: String,
}

/// Runs the command; the error is a [`crate::ui::Misuse`] where the arguments are at fault.
pub fn run(args: &Args, ui: &Ui) -> Result<()> {
    let device = load::device_within(&args.device.device, &args.memory)?;
    let config = shapes(&args.size)?;
    let document_tokens = args.document_tokens.unwrap_or(args.row_tokens);
    if args.row_tokens == 0 || document_tokens == 0 || args.runs == 0 {
        misuse!("row-tokens, document-tokens and runs must be 1 or more");
    }
    let dtype = storage(args.dtype, device);
    let sizes = sizes(&config, args, dtype);
    let timed: Vec<(&str, Vec<Example>)> = EXAMPLES
        .iter()
        .map(|examples| (examples.op, (examples.timed)(&sizes)))
        .filter(|(_, examples)| !examples.is_empty())
        .collect();
    for name in &args.ops {
        if !timed.iter().any(|(known, _)| known == name) {
            let known: Vec<&str> = timed.iter().map(|(known, _)| *known).collect();
            misuse!(
                "no primitive `{name}` is measured; there are {}",
                known.join(", ")
            );
        }
    }
    let asked = |name: &str| args.ops.is_empty() || args.ops.iter().any(|op| op == name);
    let examples = timed.iter().filter(|(name, _)| asked(name));
    let examples = examples.flat_map(|(_, examples)| examples);
    let needed = examples.map(Example::memory_bytes).fold(0.0, f64::max) as u64;
    let free = match device {
        Device::Cpu => HostMemory::now().available_bytes,
        Device::Cuda(_) => u64::MAX,
    };
    if needed > free {
        misuse!(
            "the largest of the calls needs {} of memory, and {} are free; choose a smaller --size or fewer --row-tokens, or name primitives that need less",
            size(needed),
            size(free)
        );
    }
    let bench = Bench {
        size: args.size.clone(),
        device,
        device_name: device_name(device),
        dtype,
        runs: args.runs,
        ceilings: Ceilings::measure(device, dtype, args.runs)?,
    };
    ui.note(format_args!(
        "{}: copies move {:.0} GB/s, products {:.1} TFLOP/s",
        bench.device_name,
        bench.ceilings.copy_bytes_per_s / 1e9,
        bench.ceilings.tflops
    ));
    if !ui.json() {
        ui.line("      ms   floor  share  bound       case")?;
    }
    for (name, examples) in timed {
        if !asked(name) {
            continue;
        }
        for example in examples {
            let line = bench.measure(&example)?;
            ui.result(&line, || {
                format!(
                    "{:8.3} {:7.3} {:5.0}%  {:10}  {} {}",
                    line.ms,
                    line.floor_ms,
                    100.0 * line.share,
                    line.bound,
                    line.op,
                    line.shape
                )
            })?;
        }
    }
    Ok(())
}

/// At which every primitive is timed.
fn sizes(config: &Config, args: &Args, dtype: DType) -> Sizes {
    let t = args.row_tokens;
    let document_tokens = args.document_tokens.unwrap_or(t).min(t);
    let borders = (0..t).step_by(document_tokens).chain([t]);
    Sizes {
        dtype,
        n_tokens: t,
        cu_seqlens: borders.map(|border| border as u32).collect(),
        hidden: config.hidden_size,
        feed_forward: config.intermediate_size,
        vocabulary: config.vocab_size,
        attention: [
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        ],
        rotary_dims: config.rotary_dims,
        rope_theta: config.rope_theta,
        delta: [
            config.linear_num_key_heads,
            config.linear_num_value_heads,
            config.linear_key_head_dim,
            config.linear_value_head_dim,
        ],
        rank: RANK,
    }
}

/// What the lines share: the device and its ceilings.
struct Bench {
    size: String,
    device: Device,
    device_name: String,
    dtype: DType,
    runs: usize,
    ceilings: Ceilings,
}

impl Bench {
    fn measure(&self, example: &Example) -> Result<Line> {
        let times = timing::example(example, self.device, self.runs)?;
        let floor = self.ceilings.floor(example);
        Ok(Line {
            bench: "ops",
            size: self.size.clone(),
            op: example.name(),
            shape: example.shape().to_owned(),
            dtype: self.dtype.to_string(),
            ms: times.median_ms,
            spread_ms: times.spread_ms,
            bytes: example.bytes(),
            operations: example.operations(),
            floor_ms: floor.ms,
            bound: floor.bound,
            share: floor.ms / times.median_ms,
            copy_bytes_per_s: self.ceilings.copy_bytes_per_s,
            ceiling_tflops: self.ceilings.tflops,
            device_name: self.device_name.clone(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_those_of_the_model_and_the_row() {
        let args = Args {
            ops: Vec::new(),
            size: "tiny".to_owned(),
            row_tokens: 70,
            document_tokens: Some(33),
            runs: 1,
            dtype: None,
            device: crate::cli::Device {
                device: "cpu".to_owned(),
            },
            memory: crate::cli::Memory { memory: None },
        };
        let config = shapes("tiny").unwrap();
        let sizes = sizes(&config, &args, DType::F32);
        assert_eq!(sizes.cu_seqlens, [0, 33, 66, 70]);
        assert_eq!(sizes.hidden, config.hidden_size);
    }
}
