//! `cyrene bench prefill`: how long a fresh prompt takes until its first token, with random weights of a real shape.

use std::time::Instant;

use anyhow::{Result, bail};
use engine::Event;
use serde::Serialize;

use super::{device_name, speaker};
use crate::cli::BenchPrefill as Args;
use crate::misuse;
use crate::ui::Ui;

/// One case, as `--json` prints it.
#[derive(Debug, Serialize)]
struct Line {
    bench: &'static str,
    size: String,
    dtype: String,
    context: usize,
    /// Median from the request to its first token.
    ms_first_token: f64,
    tokens_per_s: f64,
    device: String,
    device_name: String,
}

/// Runs the command; the error is a [`crate::ui::Misuse`] where the arguments are at fault.
pub fn run(args: &Args, ui: &Ui) -> Result<()> {
    let context = args.speaker.context;
    if context == 0 || args.prompts == 0 {
        misuse!("context and prompts must be 1 or more");
    }
    let speaker = speaker::start(&args.speaker, 1, context + 1, ui)?;
    let mut milliseconds = Vec::new();
    for number in 0..=args.prompts {
        let start = Instant::now();
        let mut events = speaker.engine.submit(speaker.request(number, context, 1))?;
        match events.next() {
            Some(Event::Token { .. }) => {}
            Some(Event::Failed(error)) => return Err(error.into()),
            other => bail!("no token came but {other:?}"),
        }
        // The first compiles kernels.
        if number > 0 {
            milliseconds.push(start.elapsed().as_secs_f64() * 1e3);
        }
    }
    milliseconds.sort_by(f64::total_cmp);
    let ms_first_token = milliseconds[milliseconds.len() / 2];
    let line = Line {
        bench: "prefill",
        size: args.speaker.size.clone(),
        dtype: speaker.dtype.clone(),
        context,
        ms_first_token,
        tokens_per_s: context as f64 / ms_first_token * 1e3,
        device: speaker.device.to_string(),
        device_name: device_name(speaker.device),
    };
    ui.result(&line, || {
        format!(
            "{} {} · a prompt of {} tokens: first token after {:.1} ms, {:.0} tokens/s",
            line.size, line.dtype, line.context, line.ms_first_token, line.tokens_per_s,
        )
    })
}
