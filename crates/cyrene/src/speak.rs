//! One prompt through the engine and back to text, for `generate`, `chat` and `eval`.

use anyhow::{Result, bail};
use engine::{Engine, EngineConfig, EngineHandle, Event, FinishReason, Request, Sampling};
use model::Model;
use serve::Profiles;
use text::{Persona, StreamDecoder, Tokenizer};

use crate::misuse;
use crate::ui::Misuse;

/// A finished reply.
#[derive(Debug, Clone, serde::Serialize)]
pub struct Reply {
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

/// The sampling values of the profile that `--profile` names, else of the persona's, else of `Adopted`.
///
/// # Errors
/// [`Misuse`] for an unknown name.
pub fn profile(name: Option<&str>, persona: &Persona) -> Result<Sampling> {
    let profiles = profiles(name, persona)?;
    match profiles.find(profiles.active_name()) {
        Some(profile) => Ok(profile.sampling()),
        None => misuse!("no profile `{}`", profiles.active_name()),
    }
}

/// The built-in profiles and the persona's, with the one active that [`profile`] takes.
///
/// # Errors
/// [`Misuse`] for an unknown name.
pub fn profiles(name: Option<&str>, persona: &Persona) -> Result<Profiles> {
    let misuse = |error: serve::Error| anyhow::Error::new(Misuse(error.to_string()));
    let built_in = Profiles::built_in()?;
    let profiles = match &persona.profile {
        Some(profile) => built_in.with_persona(profile).map_err(misuse)?,
        None => built_in,
    };
    match name {
        Some(name) => profiles.with_active(name).map_err(misuse),
        None => Ok(profiles),
    }
}

/// Submits a request and waits for its end; `hear` gets the text piece by piece.
///
/// # Errors
/// A request that can never run, or a failure of the engine.
pub fn reply(
    engine: &EngineHandle,
    request: Request,
    tokenizer: Option<&Tokenizer>,
    mut hear: impl FnMut(&str) -> Result<()>,
) -> Result<Reply> {
    let events = engine.submit(request)?;
    let mut decoder = tokenizer.map(|tokenizer| StreamDecoder::new(tokenizer, true));
    let mut reply = Reply {
        ids: Vec::new(),
        text: tokenizer.map(|_| String::new()),
        logprobs: Vec::new(),
        finish_reason: "cancelled",
    };
    let mut say = |reply: &mut Reply, piece: String| -> Result<()> {
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
            Event::Failed(error) => return Err(error.into()),
        }
    }
    bail!("the engine ended before the reply did")
}

/// Keeps out of a reply what no reply may hold.
pub fn mask(sampling: &mut Sampling, tokenizer: &Tokenizer) {
    let mask = tokenizer.sampling_mask(false);
    sampling.banned = mask.banned;
    sampling.vocab_limit = Some(mask.vocab_limit);
}
