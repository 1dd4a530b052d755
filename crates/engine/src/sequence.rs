//! One request being computed: what it has seen, what it drew last, and how it ends.

use std::time::Instant;

use crate::channel::EventSender;
use crate::error::{Error, Result};
use crate::queue::Job;
use crate::request::{Event, FinishReason, Request, Scored, Usage};
use crate::runner::Logits;
use crate::sampling::{self, Counts, DrawContext, logprobs, shortlist};

// Legend: T tokens of a chunk, C vocabulary.

/// A sequence in the engine; `S` is the model's state of it.
pub(crate) struct Sequence<S> {
    pub request: Request,
    seed: u64,
    pub events: EventSender,
    /// `None` until its prefill begins.
    pub state: Option<S>,
    /// The tokens that `state` has seen.
    pub seen: Vec<u32>,
    /// The token drawn last, which the next step feeds; `None` while the prompt is being computed.
    pub next: Option<u32>,
    generated: Vec<u32>,
    counts: Counts,
    /// Scores of the prompt's tokens so far, if asked for.
    prompt: Vec<Scored>,
    pub usage: Usage,
    pub stalled_since: Option<Instant>,
    pub ending: Option<Ending>,
}

/// Why a sequence is to leave.
pub(crate) enum Ending {
    Finished {
        reason: FinishReason,
        stop: Option<Scored>,
    },
    Failed(Error),
}

impl<S> Sequence<S> {
    pub fn new(job: Job) -> Self {
        let usage = Usage {
            n_prompt: job.request.ids.len(),
            ..Usage::default()
        };
        Sequence {
            request: job.request,
            seed: job.seed,
            events: job.events,
            state: None,
            seen: Vec::new(),
            next: None,
            generated: Vec::new(),
            counts: Counts::new(),
            prompt: Vec::new(),
            usage,
            stalled_since: None,
            ending: None,
        }
    }

    pub fn finish(&mut self, reason: FinishReason, stop: Option<Scored>) {
        if self.ending.is_none() {
            self.ending = Some(Ending::Finished { reason, stop });
        }
    }

    /// The last event of a sequence that ended in `reason`.
    pub fn farewell(&self, reason: FinishReason, stop: Option<Scored>) -> Event {
        Event::Finished {
            reason,
            stop,
            seed: self.seed,
            usage: self.usage,
        }
    }

    /// Scores the prompt's tokens that follow the chunk which begins at `n_seen`. Shapes: logits_tc [T, C].
    pub fn score_prompt(&mut self, n_seen: usize, logits_tc: &[f32], n_ids: usize) {
        let following = &self.request.ids[n_seen + 1..];
        for (row, id) in logits_tc.chunks(n_ids).zip(following) {
            self.prompt.push(score(row, *id, self.request.top_logprobs));
        }
    }

    /// Takes the logits behind the whole prompt: reports the prompt's scores and draws the first token, if one is asked for.
    pub fn begin(&mut self, logits: Logits, context: usize) {
        if self.request.prompt_logprobs {
            self.events
                .send(Event::Prompt(std::mem::take(&mut self.prompt)));
        }
        if self.request.max_tokens == 0 {
            self.finish(FinishReason::Length, None);
        } else {
            self.accept(logits, || Ok(Vec::new()), context);
        }
    }

    /// Draws a token, sends it, and decides whether it was the last. `whole` gives all logits [C] where a few do not tell.
    pub fn accept(
        &mut self,
        logits: Logits,
        whole: impl FnOnce() -> Result<Vec<f32>>,
        context: usize,
    ) {
        match self.draw(logits, whole) {
            Ok(scored) => {
                let id = scored.id;
                self.usage.n_generated += 1;
                if self.request.stop_ids.contains(&id) {
                    self.finish(FinishReason::Stop, Some(scored));
                    return;
                }
                self.generated.push(id);
                *self.counts.entry(id).or_insert(0) += 1;
                let Scored { id, logprob, top } = scored;
                self.events.send(Event::Token { id, logprob, top });
                self.next = Some(id);
                let n_tokens = self.usage.n_prompt + self.usage.n_generated;
                if self.usage.n_generated >= self.request.max_tokens || n_tokens >= context {
                    self.finish(FinishReason::Length, None);
                }
            }
            Err(error) => self.ending = Some(Ending::Failed(error)),
        }
    }

    fn draw(&self, logits: Logits, whole: impl FnOnce() -> Result<Vec<f32>>) -> Result<Scored> {
        let barred = if self.usage.n_generated < self.request.min_tokens {
            self.request.stop_ids.as_slice()
        } else {
            &[]
        };
        let context = DrawContext {
            prompt: &self.request.ids,
            generated: &self.generated,
            counts: &self.counts,
            barred,
        };
        let (sampling, n_top) = (&self.request.sampling, self.request.top_logprobs);
        let position = self.usage.n_generated as u64;
        let logits = match logits {
            Logits::All(logits) => logits,
            Logits::Short(list) => {
                let drawn = shortlist::draw(&list, &context, sampling, self.seed, position);
                let id = drawn.transpose()?;
                let scored = id.and_then(|id| Some((id, shortlist::logprobs(&list, id, n_top)?)));
                if let Some((id, (logprob, top))) = scored {
                    return Ok(Scored { id, logprob, top });
                }
                whole()?
            }
        };
        let id = sampling::draw(&logits, &context, sampling, self.seed, position)?;
        Ok(score(&logits, id, n_top))
    }
}

/// Shapes: logits [C].
fn score(logits: &[f32], id: u32, n_top: usize) -> Scored {
    let (logprob, top) = logprobs::raw(logits, id, n_top);
    Scored { id, logprob, top }
}
