//! One request's replies as they grow: sequences in the engine, updates for whoever writes the answer.

use std::task::{Context, Poll};
use std::time::Instant;

use engine::{EngineHandle, Event, EventReceiver, FinishReason, Request, Scored};
use tracing::info;

use crate::error::ApiError;
use crate::options::Options;
use crate::reply::{Delta, Reply};
use crate::shares::{Client, Place, Shares};
use crate::state::AppState;

/// Replies of one request that are in the engine at once: a long list of prompts must not fill the queue that all share.
const MOST_AT_ONCE: usize = 16;

/// What a reply follows.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Prompt {
    pub ids: Vec<u32>,
    /// The request's field that it comes from, which errors name.
    pub field: &'static str,
    /// Its text, where the reply is to begin with it.
    pub echo: Option<String>,
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

/// The replies of one request, `n` to each prompt in order; dropping it cancels those that are not done.
pub(crate) struct Generation {
    engine: EngineHandle,
    shares: Shares,
    client: Option<Client>,
    choices: Vec<Choice>,
    n: usize,
    tokens: Tokens,
    started: Instant,
}

struct Choice {
    progress: Progress,
    reply: Reply,
    /// The prompt's ids and text, until the reply has begun with them.
    echo: Option<(Vec<u32>, String)>,
    n_tokens: usize,
}

/// How far a reply is.
enum Progress {
    /// Not in the engine yet.
    Waiting(Box<Request>),
    /// With its place in its client's share of the queue, until the engine is known to be at it.
    Running(EventReceiver, Option<Place>),
    Done,
}

/// One step of one reply.
#[derive(Debug)]
pub(crate) struct Update {
    pub index: usize,
    pub delta: Delta,
    pub finish: Option<Finish>,
}

impl Generation {
    /// Begins the replies, or none if one of them could never be given or the first finds no place.
    pub fn start(
        state: &AppState,
        client: Option<Client>,
        prompts: Vec<Prompt>,
        options: &Options,
    ) -> Result<Self, ApiError> {
        let engine = state.loaded_engine()?.clone();
        let mut choices = Vec::with_capacity(prompts.len() * options.n);
        let mut n_prompt = 0;
        for prompt in prompts {
            n_prompt += prompt.ids.len();
            for index in 0..options.n {
                let request = request(&prompt, index as u64, options);
                let checked = engine.check(&request);
                checked.map_err(|error| ApiError::of_request(error, prompt.field))?;
                let echo = prompt.echo.clone();
                choices.push(Choice {
                    progress: Progress::Waiting(Box::new(request)),
                    reply: Reply::new(state.setup().chat.tokenizer(), &options.reply),
                    echo: echo.map(|text| (prompt.ids.clone(), text)),
                    n_tokens: 0,
                });
            }
        }
        let mut generation = Generation {
            engine,
            shares: state.shares().clone(),
            client,
            choices,
            n: options.n,
            tokens: Tokens {
                prompt: n_prompt,
                ..Tokens::default()
            },
            started: Instant::now(),
        };
        generation.submit_waiting()?;
        Ok(generation)
    }

    /// The next update of any reply; `None` when all are done.
    pub fn poll_update(
        &mut self,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Update, ApiError>>> {
        if let Err(error) = self.submit_waiting() {
            return Poll::Ready(Some(Err(error)));
        }
        for index in 0..self.choices.len() {
            while let Progress::Running(events, place) = &mut self.choices[index].progress {
                let Poll::Ready(event) = events.poll_recv(context) else {
                    break;
                };
                // It waits no longer.
                *place = None;
                match self.take(index, event) {
                    Ok(update) if update.finish.is_none() && update.delta.is_empty() => {}
                    update => return Poll::Ready(Some(update)),
                }
            }
        }
        if self.choices.iter().all(Choice::is_done) {
            return Poll::Ready(None);
        }
        Poll::Pending
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

    /// Replies, done and to come.
    pub fn n_choices(&self) -> usize {
        self.choices.len()
    }

    /// Tokens so far; final when all replies are done.
    pub fn tokens(&self) -> Tokens {
        Tokens {
            completion: self.choices.iter().map(|choice| choice.n_tokens).sum(),
            ..self.tokens
        }
    }

    /// Hands waiting replies to the engine while few are there; a full queue, or share of it, is an error only if nothing of this request runs.
    fn submit_waiting(&mut self) -> Result<(), ApiError> {
        let is_running = |choice: &&Choice| matches!(choice.progress, Progress::Running(..));
        let mut n_running = self.choices.iter().filter(is_running).count();
        // Half of the queue is always for others.
        let most = (self.engine.config().max_waiting / 2).max(1);
        for choice in &mut self.choices {
            if n_running >= MOST_AT_ONCE {
                break;
            }
            let Progress::Waiting(request) = &choice.progress else {
                continue;
            };
            // Asked first: this comes again with every token, and a request that is refused counts as one that was turned away.
            if n_running > 0 && is_queue_full(&self.engine) {
                break;
            }
            let place = match self.client {
                None => None,
                Some(client) => match self.shares.take(client, most) {
                    Some(place) => Some(place),
                    None if n_running > 0 => break,
                    None => return Err(ApiError::Share { most }),
                },
            };
            match self.engine.submit((**request).clone()) {
                Ok(events) => choice.progress = Progress::Running(events, place),
                Err(engine::Error::QueueFull { .. }) if n_running > 0 => break,
                Err(error) => return Err(error.into()),
            }
            n_running += 1;
        }
        Ok(())
    }

    fn take(&mut self, index: usize, event: Option<Event>) -> Result<Update, ApiError> {
        let choice = &mut self.choices[index];
        let (delta, finish) = match event {
            Some(Event::Prompt(scored)) => (choice.begin(&scored), None),
            Some(Event::Token { id, logprob, top }) => {
                choice.n_tokens += 1;
                let mut delta = choice.begin(&[]);
                delta.extend(choice.reply.push(id, logprob, &top));
                let finish = delta.stopped.then_some(Finish::Stop);
                (delta, finish)
            }
            Some(Event::Finished {
                reason,
                stop,
                usage,
                ..
            }) => {
                choice.n_tokens = usage.n_generated;
                // Replies to one prompt share its kept state.
                if index.is_multiple_of(self.n) {
                    self.tokens.cached += usage.n_cached;
                }
                let finish = match reason {
                    FinishReason::Stop => Finish::Stop,
                    FinishReason::Length => Finish::Length,
                    FinishReason::Cancelled => return Err(ApiError::Stopping),
                };
                let mut delta = choice.begin(&[]);
                delta.extend(choice.reply.end(stop));
                (delta, Some(finish))
            }
            Some(Event::Failed(error)) => return Err(error.into()),
            None => return Err(engine::Error::Stopped.into()),
        };
        if finish.is_some() {
            // After a stop string this also tells the engine to stop.
            choice.progress = Progress::Done;
        }
        Ok(Update {
            index,
            delta,
            finish,
        })
    }
}

impl Choice {
    fn is_done(&self) -> bool {
        matches!(self.progress, Progress::Done)
    }

    /// The echo of the prompt, if the reply is to begin with it and has not yet.
    fn begin(&mut self, scored: &[Scored]) -> Delta {
        match self.echo.take() {
            Some((ids, text)) => self.reply.echo(text, &ids, scored),
            None => Delta::default(),
        }
    }
}

fn is_queue_full(engine: &EngineHandle) -> bool {
    engine.stats().waiting >= engine.config().max_waiting as u64
}

/// The engine's request for reply `index` to a prompt; a seed gives each another draw.
fn request(prompt: &Prompt, index: u64, options: &Options) -> Request {
    let mut sampling = options.sampling.clone();
    sampling.seed = sampling.seed.map(|seed| seed.wrapping_add(index));
    Request {
        ids: prompt.ids.clone(),
        sampling,
        max_tokens: options.max_tokens,
        min_tokens: options.min_tokens,
        stop_ids: options.stop_ids.clone(),
        top_logprobs: options.top_logprobs,
        // With no token to generate the engine has nothing else to tell.
        prompt_logprobs: options.echo && (options.reply.logprobs || options.max_tokens == 0),
    }
}

impl Drop for Generation {
    /// The request log: counts only, never content.
    fn drop(&mut self) {
        let tokens = self.tokens();
        let unfinished = self.choices.iter().filter(|c| !c.is_done()).count();
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
