//! An engine over random weights of a real shape, and prompts for it: what `bench decode` and `bench prefill` share.

use anyhow::Result;
use engine::{Engine, EngineConfig, EngineHandle, Request, Sampling};
use kernel::Device;
use model::{Decoder, Model};

use super::{device_name, shapes, storage};
use crate::cli::BenchSpeaker as Args;
use crate::load;
use crate::ui::Ui;

/// An engine that keeps nothing between requests.
pub struct Speaker {
    pub engine: EngineHandle,
    pub device: Device,
    pub dtype: String,
    pub vocab_size: usize,
    /// Bytes that a step of these sequences moves at the least.
    pub step_bytes: usize,
}

/// Starts an engine for `batch` conversations of up to `most_tokens` tokens.
///
/// # Errors
/// Misuse for a size or device that there is not; no room for the weights.
pub fn start(args: &Args, batch: usize, most_tokens: usize, ui: &Ui) -> Result<Speaker> {
    let device = load::device_within(&args.device.device, &args.memory)?;
    let config = shapes(&args.size)?;
    let dtype = storage(args.dtype, device);
    ui.note(format_args!(
        "{} parameters, random, on {}",
        config.n_params(),
        device_name(device)
    ));
    let vocab_size = config.vocab_size;
    let model = Model::init(config, 1, dtype).to_device(device)?;
    let step_bytes = Decoder::bytes_at_least(&model, batch, args.context);
    let engine = Engine::start(
        model,
        EngineConfig {
            max_sequences: batch,
            max_waiting: batch,
            context: most_tokens,
            max_snapshots: 0,
            max_unread: most_tokens,
            ..EngineConfig::default()
        },
    )?;
    Ok(Speaker {
        engine,
        device,
        dtype: dtype.to_string(),
        vocab_size,
        step_bytes,
    })
}

impl Speaker {
    /// A prompt of `context` tokens, another for each number, answered as a chat page asks it: sampled, never cut short.
    pub fn request(&self, number: usize, context: usize, max_tokens: usize) -> Request {
        let spread = |i: usize| (number * 7919 + i * 104_729 + i * i % 997) % self.vocab_size;
        Request {
            ids: (0..context.max(1)).map(|i| spread(i) as u32).collect(),
            max_tokens,
            sampling: Sampling {
                temperature: 0.7,
                top_k: 20,
                top_p: 0.8,
                presence_penalty: 1.5,
                seed: Some(number as u64),
                ..Sampling::default()
            },
            ..Request::default()
        }
    }
}
