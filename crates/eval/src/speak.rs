//! One prompt through the engine and back to text.

use engine::{Engine, EngineConfig, EngineHandle, Event, FinishReason, Request, Sampling};
use model::Model;
use text::{StreamDecoder, Tokenizer};

use crate::{Error, Result};

/// A finished reply.
#[derive(Debug, Clone, serde::Serialize)]
pub struct Said {
    /// What was drawn.
    pub ids: Vec<u32>,
    /// `None` without a tokenizer.
    pub text: Option<String>,
    /// Natural log of the model's own probability of each id, before temperature and penalties.
    pub logprobs: Vec<f32>,
    /// `stop`, `length` or `cancelled`.
    pub finish_reason: &'static str,
}

/// Starts an engine for a few sequences.
///
/// # Errors
/// The system gives no thread.
pub fn engine(model: Model, max_sequences: usize, context: Option<usize>) -> Result<EngineHandle> {
    let context = context.unwrap_or(model.config().max_position_embeddings.min(32_768));
    Ok(Engine::start(
        model,
        EngineConfig {
            max_sequences,
            context,
            ..EngineConfig::default()
        },
    )?)
}

/// Submits a request and waits for its end; `hear` gets the text piece by piece.
///
/// # Errors
/// A request that can never run, a failure of the engine, or what `hear` gives.
pub fn reply<E: From<Error>>(
    engine: &EngineHandle,
    request: Request,
    tokenizer: Option<&Tokenizer>,
    mut hear: impl FnMut(&str) -> std::result::Result<(), E>,
) -> std::result::Result<Said, E> {
    let events = engine.submit(request).map_err(Error::from)?;
    let mut decoder = tokenizer.map(|tokenizer| StreamDecoder::new(tokenizer, true));
    let mut reply = Said {
        ids: Vec::new(),
        text: tokenizer.map(|_| String::new()),
        logprobs: Vec::new(),
        finish_reason: "cancelled",
    };
    let mut say = |reply: &mut Said, piece: String| -> std::result::Result<(), E> {
        if !piece.is_empty() {
            hear(&piece)?;
            if let Some(text) = &mut reply.text {
                text.push_str(&piece);
            }
        }
        Ok(())
    };
    while let Some(event) = events.recv() {
        match event {
            Event::Token { id, logprob, .. } => {
                reply.ids.push(id);
                reply.logprobs.push(logprob);
                if let Some(decoder) = &mut decoder {
                    let piece = decoder.push(id);
                    say(&mut reply, piece)?;
                }
            }
            Event::Finished { reason, .. } => {
                if let Some(decoder) = &mut decoder {
                    let piece = decoder.finish();
                    say(&mut reply, piece)?;
                }
                reply.finish_reason = match reason {
                    FinishReason::Stop => "stop",
                    FinishReason::Length => "length",
                    FinishReason::Cancelled => "cancelled",
                };
                return Ok(reply);
            }
            // Nobody asks for the prompt's scores here.
            Event::Prompt(_) => {}
            Event::Failed(error) => return Err(Error::from(error).into()),
        }
    }
    Err(Error::EngineEnded.into())
}

/// Keeps out of a reply what no reply may hold.
pub fn mask(sampling: &mut Sampling, tokenizer: &Tokenizer) {
    let mask = tokenizer.sampling_mask(false);
    sampling.banned = mask.banned;
    sampling.vocab_limit = Some(mask.vocab_limit);
}
