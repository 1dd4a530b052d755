//! One request's replies as they grow: options read from its fields, sequences in the engine, updates for whoever writes the answer.

use std::task::{Context, Poll};
use std::time::Instant;

use engine::{Event, EventReceiver, FinishReason, Request, Sampling};
use tracing::info;

use crate::error::ApiError;
use crate::fields::Fields;
use crate::reply::{Delta, Reply, ReplyOptions};
use crate::state::AppState;

/// Fields that would change the answer and that nobody here understands.
const UNSUPPORTED: [&str; 6] = [
    "logit_bias",
    "suffix",
    "echo",
    "tools",
    "functions",
    "bad_words",
];

/// What both kinds of completion share.
#[derive(Debug, Clone)]
pub(crate) struct Options {
    pub sampling: Sampling,
    pub max_tokens: Option<usize>,
    pub stop_ids: Vec<u32>,
    pub top_logprobs: usize,
    pub n: usize,
    pub stream: bool,
    pub include_usage: bool,
    pub reply: ReplyOptions,
}

/// How a reply ended, in OpenAI's words.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Finish {
    Stop,
    Length,
}

/// Tokens of all replies of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Tokens {
    pub prompt: usize,
    pub cached: usize,
    pub completion: usize,
}

/// The replies of one request; dropping it cancels those that are not done.
pub(crate) struct Generation {
    choices: Vec<Choice>,
    tokens: Tokens,
    started: Instant,
}

struct Choice {
    /// `None` once the reply is done.
    events: Option<EventReceiver>,
    reply: Reply,
    n_tokens: usize,
}

/// One step of one reply.
#[derive(Debug)]
pub(crate) struct Update {
    pub index: usize,
    pub delta: Delta,
    pub finish: Option<Finish>,
}

impl Options {
    /// Reads everything but prompt, model and logprobs; what is absent comes from the profile.
    pub fn parse(fields: &Fields, state: &AppState) -> Result<Self, ApiError> {
        let setup = state.setup();
        fields.refuse(&UNSUPPORTED)?;

        // 1. sampling: profile, then the request's own values
        let profiles = &setup.profiles;
        let name = fields.string("profile")?;
        let Some(profile) = profiles.find(name.unwrap_or(profiles.active_name())) else {
            return Err(ApiError::field(
                fields.name("profile"),
                format!("must be one of {}", profiles.names()),
            ));
        };
        let mut sampling = profile.sampling();
        let numbers: [(&str, f64, f64, &mut f32); 5] = [
            ("temperature", 0.0, 10.0, &mut sampling.temperature),
            ("top_p", 1e-6, 1.0, &mut sampling.top_p),
            ("min_p", 0.0, 1.0, &mut sampling.min_p),
            (
                "presence_penalty",
                -10.0,
                10.0,
                &mut sampling.presence_penalty,
            ),
            (
                "frequency_penalty",
                -10.0,
                10.0,
                &mut sampling.frequency_penalty,
            ),
        ];
        for (field, least, most, target) in numbers {
            if let Some(value) = fields.number(field, least..=most)? {
                *target = value as f32;
            }
        }
        if fields
            .number("repetition_penalty", 0.0..=10.0)?
            .unwrap_or(1.0)
            != 1.0
        {
            return Err(ApiError::field(
                fields.name("repetition_penalty"),
                "is not supported by this server; use presence_penalty or frequency_penalty",
            ));
        }
        sampling.top_k = read_top_k(fields)?.unwrap_or(sampling.top_k);
        sampling.seed = fields.integer("seed", 0..=u64::MAX)?;
        sampling.vocab_limit = u32::try_from(setup.chat.tokenizer().vocab_size()).ok();

        // 2. length and stops
        let most = u64::from(u32::MAX);
        let max_tokens = match fields.integer("max_completion_tokens", 1..=most)? {
            Some(n) => Some(n),
            None => fields.integer("max_tokens", 1..=most)?,
        };
        let mut stop_ids = match fields.boolean("ignore_eos")? {
            Some(true) => Vec::new(),
            _ => setup.chat.tokenizer().end_ids(),
        };
        stop_ids.extend(fields.ids("stop_token_ids", 64)?);

        // 3. form of the answer
        let options = fields.object("stream_options")?;
        let include_usage = match &options {
            Some(options) => options.boolean("include_usage")?.unwrap_or(false),
            None => false,
        };
        let n = fields.integer("n", 1..=setup.limits.n)?.unwrap_or(1);
        Ok(Options {
            sampling,
            max_tokens: max_tokens.map(|n| n as usize),
            stop_ids,
            top_logprobs: 0,
            n: n as usize,
            stream: fields.boolean("stream")?.unwrap_or(false),
            include_usage,
            reply: ReplyOptions {
                stops: fields.strings("stop", setup.limits.stop_strings)?,
                lines: fields.boolean("cyrene_lines")?.unwrap_or(false),
                ..ReplyOptions::default()
            },
        })
    }
}

/// `top_k`: 0 and, as vLLM has it, -1 mean off.
fn read_top_k(fields: &Fields) -> Result<Option<u32>, ApiError> {
    if fields.get("top_k").and_then(|value| value.as_i64()) == Some(-1) {
        return Ok(Some(0));
    }
    let value = fields.integer("top_k", 0..=u64::from(u32::MAX))?;
    Ok(value.map(|k| k as u32))
}

impl Generation {
    /// Submits all replies, or none if one of them is refused.
    pub fn start(state: &AppState, prompt: Vec<u32>, options: &Options) -> Result<Self, ApiError> {
        let engine = state.loaded_engine()?;
        let setup = state.setup();
        let n_prompt = prompt.len();
        let max_tokens = options
            .max_tokens
            .unwrap_or(setup.limits.default_max_tokens);
        let mut choices = Vec::with_capacity(options.n);
        for index in 0..options.n {
            let mut sampling = options.sampling.clone();
            sampling.seed = sampling.seed.map(|seed| seed.wrapping_add(index as u64));
            let events = engine.submit(Request {
                ids: prompt.clone(),
                sampling,
                max_tokens,
                stop_ids: options.stop_ids.clone(),
                top_logprobs: options.top_logprobs,
            })?;
            choices.push(Choice {
                events: Some(events),
                reply: Reply::new(setup.chat.tokenizer(), &options.reply),
                n_tokens: 0,
            });
        }
        Ok(Generation {
            choices,
            tokens: Tokens {
                prompt: n_prompt,
                ..Tokens::default()
            },
            started: Instant::now(),
        })
    }

    /// The next update of any reply; `None` when all are done.
    pub fn poll_update(
        &mut self,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Update, ApiError>>> {
        for index in 0..self.choices.len() {
            while let Some(events) = &mut self.choices[index].events {
                let Poll::Ready(event) = events.poll_recv(context) else {
                    break;
                };
                match self.take(index, event) {
                    Ok(update) if update.finish.is_none() && update.delta.is_empty() => {}
                    update => return Poll::Ready(Some(update)),
                }
            }
        }
        if self.choices.iter().any(|choice| choice.events.is_some()) {
            return Poll::Pending;
        }
        Poll::Ready(None)
    }

    /// Waits for all replies; each whole, with how it ended, in the order of their indices.
    pub async fn collect(&mut self) -> Result<Vec<(Delta, Finish)>, ApiError> {
        let mut replies: Vec<(Delta, Finish)> = (0..self.choices.len())
            .map(|_| (Delta::default(), Finish::Stop))
            .collect();
        while let Some(update) = std::future::poll_fn(|context| self.poll_update(context)).await {
            let update = update?;
            let (whole, finish) = &mut replies[update.index];
            whole.extend(update.delta);
            *finish = update.finish.unwrap_or(*finish);
        }
        Ok(replies)
    }

    /// Tokens so far; final when all replies are done.
    pub fn tokens(&self) -> Tokens {
        Tokens {
            completion: self.choices.iter().map(|choice| choice.n_tokens).sum(),
            ..self.tokens
        }
    }

    fn take(&mut self, index: usize, event: Option<Event>) -> Result<Update, ApiError> {
        let choice = &mut self.choices[index];
        let (delta, finish) = match event {
            Some(Event::Token { id, logprob, top }) => {
                choice.n_tokens += 1;
                let delta = choice.reply.push(id, logprob, &top);
                let finish = delta.stopped.then_some(Finish::Stop);
                (delta, finish)
            }
            Some(Event::Finished { reason, usage, .. }) => {
                choice.n_tokens = usage.n_generated;
                if index == 0 {
                    self.tokens.cached = usage.n_cached;
                }
                let finish = match reason {
                    FinishReason::Stop => Finish::Stop,
                    FinishReason::Length => Finish::Length,
                    FinishReason::Cancelled => return Err(ApiError::Stopping),
                };
                (choice.reply.finish(), Some(finish))
            }
            Some(Event::Failed(error)) => return Err(error.into()),
            None => return Err(engine::Error::Stopped.into()),
        };
        if finish.is_some() {
            // After a stop string this also tells the engine to stop.
            choice.events = None;
        }
        Ok(Update {
            index,
            delta,
            finish,
        })
    }
}

impl Drop for Generation {
    /// The request log: counts only, never content.
    fn drop(&mut self) {
        let tokens = self.tokens();
        let unfinished = self.choices.iter().filter(|c| c.events.is_some()).count();
        info!(
            prompt_tokens = tokens.prompt,
            cached_tokens = tokens.cached,
            completion_tokens = tokens.completion,
            replies = self.choices.len(),
            unfinished,
            elapsed_ms = self.started.elapsed().as_millis() as u64,
            "generated"
        );
    }
}

/// Makes special tokens in a message plain text: `<|im_end|>` becomes `< |im_end|>`, which no vocabulary holds as one token.
pub(crate) fn disarm(content: &str) -> String {
    content.replace("<|", "< |")
}
