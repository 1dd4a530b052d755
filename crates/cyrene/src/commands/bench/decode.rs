//! `cyrene bench decode`: several conversations that speak at once, with random weights of a real shape. Everything but text and HTTP is
//! in the time: scheduling, the step, the draws, and the way of each token to its reader.

use std::time::Instant;

use anyhow::{Context, Result, bail};
use engine::{Event, EventReceiver};
use kernel::cuda::{Cuda, Timer};
use kernel::{DType, Device, Tensor};
use serde::Serialize;

use super::{device_name, speaker};
use crate::cli::BenchDecode as Args;
use crate::misuse;
use crate::ui::Ui;

/// Elements of the copy that bandwidth is measured with: 1 GiB of f32.
const COPY: usize = 1 << 28;
const COPIES: usize = 9;

/// Prompt tokens that the engine computes between two steps.
const CHUNK: usize = 512;

/// One case, as `--json` prints it.
#[derive(Debug, Serialize)]
struct Line {
    bench: &'static str,
    size: String,
    dtype: String,
    batch: usize,
    context: usize,
    /// Of all conversations together.
    tokens_per_s: f64,
    /// Mean of a step.
    ms_step: f64,
    /// Bytes that a step moves at the least.
    step_bytes: usize,
    /// Bytes a second, read and written, of a large copy in the same run; `None` on a CPU.
    copy_bytes_per_s: Option<f64>,
    /// What a step's bytes need at that rate.
    floor_ms: Option<f64>,
    device: String,
    device_name: String,
}

/// Runs the command; the error is a [`crate::ui::Misuse`] where the arguments are at fault.
pub fn run(args: &Args, ui: &Ui) -> Result<()> {
    let (batch, context) = (args.batch, args.speaker.context);
    if batch == 0 || context == 0 || args.tokens < 2 {
        misuse!("batch and context must be 1 or more, tokens 2 or more");
    }
    // While the later prompts are read, the earlier conversations speak on.
    let n_tokens = args.tokens + batch * (context.div_ceil(CHUNK) + 1);
    let speaker = speaker::start(&args.speaker, batch, context + n_tokens, ui)?;
    let copy_bytes_per_s = match speaker.device {
        Device::Cpu => None,
        Device::Cuda(card) => Some(copy_bytes_per_s(card)?),
    };

    // Once without a clock: kernels are compiled and steps recorded.
    speak(&speaker, batch, context, n_tokens)?;
    let tokens_per_s = speak(&speaker, batch, context, n_tokens)?;
    if args.profile {
        profile(&speaker, batch, context, n_tokens, ui)?;
    }
    let floor_ms = copy_bytes_per_s.map(|rate| speaker.step_bytes as f64 / rate * 1e3);
    let line = Line {
        bench: "decode",
        size: args.speaker.size.clone(),
        dtype: speaker.dtype.clone(),
        batch,
        context,
        tokens_per_s,
        ms_step: batch as f64 / tokens_per_s * 1e3,
        step_bytes: speaker.step_bytes,
        copy_bytes_per_s,
        floor_ms,
        device: speaker.device.to_string(),
        device_name: device_name(speaker.device),
    };
    ui.result(&line, || line.text())
}

/// Tokens a second of all conversations while all of them speak.
fn speak(speaker: &speaker::Speaker, batch: usize, context: usize, n_tokens: usize) -> Result<f64> {
    let receivers = (0..batch)
        .map(|number| {
            Ok(speaker
                .engine
                .submit(speaker.request(number, context, n_tokens))?)
        })
        .collect::<Result<Vec<EventReceiver>>>()?;
    let readers: Vec<_> = receivers
        .into_iter()
        .map(|receiver| std::thread::spawn(move || arrivals(receiver)))
        .collect();
    let mut arrivals = Vec::new();
    for reader in readers {
        match reader.join() {
            Ok(times) => arrivals.push(times?),
            Err(_) => bail!("a reader failed"),
        }
    }
    let first = arrivals.iter().filter_map(|times| times.first()).max();
    let last = arrivals.iter().filter_map(|times| times.last()).min();
    let (first, last) = first.zip(last).context("no token came")?;
    let is_within = |time: &&Instant| *time > first && *time <= last;
    let n = arrivals.iter().flatten().filter(is_within).count();
    let seconds = last.saturating_duration_since(*first).as_secs_f64();
    if n == 0 || seconds == 0.0 {
        bail!("the conversations never spoke all at once; raise --tokens");
    }
    Ok(n as f64 / seconds)
}

/// When each token came.
fn arrivals(receiver: EventReceiver) -> Result<Vec<Instant>> {
    let mut times = Vec::new();
    for event in receiver {
        match event {
            Event::Token { .. } => times.push(Instant::now()),
            Event::Failed(error) => return Err(error.into()),
            Event::Prompt(_) | Event::Finished { .. } => {}
        }
    }
    Ok(times)
}

/// Says what each kernel took of prompts and replies.
fn profile(
    speaker: &speaker::Speaker,
    batch: usize,
    context: usize,
    n_tokens: usize,
    ui: &Ui,
) -> Result<()> {
    let Device::Cuda(card) = speaker.device else {
        misuse!("--profile times the kernels of a GPU; this is the CPU");
    };
    card.start_profile();
    speak(speaker, batch, context, n_tokens)?;
    for (name, ms, calls) in card.take_profile() {
        ui.note(format_args!("{ms:9.2} ms {calls:5} x {name}"));
    }
    Ok(())
}

/// Bytes read and written a second by a copy of 1 GiB; median of nine.
fn copy_bytes_per_s(card: Cuda) -> Result<f64> {
    let device = Device::Cuda(card);
    let from = Tensor::zeros_on(&[COPY], DType::F32, device)?;
    let mut to = Tensor::zeros_on(&[COPY], DType::F32, device)?;
    let mut seconds = Vec::new();
    for _ in 0..COPIES {
        let timer = Timer::start(card)?;
        to.copy_from(&from)?;
        seconds.push(f64::from(timer.stop()?) / 1e3);
    }
    seconds.sort_by(f64::total_cmp);
    Ok(2.0 * from.bytes() as f64 / seconds[COPIES / 2])
}

impl Line {
    fn text(&self) -> String {
        let floor = self.floor_ms.map_or(String::new(), |floor| {
            let share = 100.0 * floor / self.ms_step;
            format!(" (floor {floor:.2} ms, {share:.0} % of it reached)")
        });
        format!(
            "{} {} · {} at {} tokens: {:.0} tokens/s, {:.2} ms a step{floor}",
            self.size, self.dtype, self.batch, self.context, self.tokens_per_s, self.ms_step,
        )
    }
}
