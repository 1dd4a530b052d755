//! The engine's loop: admit, prefill a chunk, decode everyone by one token, retire, again.
//! One prompt is prefilled at a time and in chunks, so that those already speaking never wait for more than a chunk.

use std::collections::VecDeque;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use tracing::debug;

use crate::channel::EventSender;
use crate::error::{Error, Result};
use crate::handle::{EngineConfig, Job, Shared};
use crate::request::{Event, FinishReason, Request, Usage};
use crate::runner::{Runner, guarded};
use crate::sampling::{self, Counts, logprobs};
use crate::snapshots::{Snapshot, Snapshots};
use crate::stats::{add, set};

/// How long the loop sleeps when every reader is behind.
const PAUSE: Duration = Duration::from_millis(5);

pub(crate) struct Scheduler<R: Runner> {
    runner: R,
    config: EngineConfig,
    shared: Arc<Shared>,
    /// In order of admission: the first one without a `next` is the one being prefilled.
    running: Vec<Sequence<R::State>>,
    snapshots: Snapshots<R::State>,
}

/// One request being computed.
struct Sequence<S> {
    request: Request,
    seed: u64,
    events: EventSender,
    /// `None` until its prefill begins.
    state: Option<S>,
    /// The tokens that `state` has seen.
    seen: Vec<u32>,
    /// The token drawn last, which the next step feeds; `None` while the prompt is being computed.
    next: Option<u32>,
    counts: Counts,
    usage: Usage,
    stalled_since: Option<Instant>,
    ending: Option<Ending>,
}

enum Ending {
    Finished {
        reason: FinishReason,
        stop_id: Option<u32>,
    },
    Failed(Error),
}

impl<R: Runner> Scheduler<R> {
    pub fn new(runner: R, config: EngineConfig, shared: Arc<Shared>) -> Self {
        let snapshots = Snapshots::new(config.max_snapshots, config.snapshot_bytes);
        Scheduler {
            runner,
            config,
            shared,
            running: Vec::new(),
            snapshots,
        }
    }

    /// Runs until the last handle is gone.
    pub fn run(mut self) {
        // However the thread ends, nobody may go on queueing for it.
        let _close = CloseOnDrop(Arc::clone(&self.shared));
        while self.admit() {
            self.end_abandoned();
            self.prefill_chunk();
            self.decode();
            self.retire();
        }
        debug!(running = self.running.len(), "engine stops");
        for sequence in &mut self.running {
            sequence.finish(FinishReason::Cancelled, None);
        }
        self.retire();
    }

    /// Takes waiting requests while there is room, sleeping while there is nothing to do; false when the engine is to end.
    fn admit(&mut self) -> bool {
        let mut queue = self.shared.lock();
        while !queue.is_closed && queue.jobs.is_empty() && self.running.is_empty() {
            queue = self
                .shared
                .wake
                .wait(queue)
                .unwrap_or_else(PoisonError::into_inner);
        }
        if queue.is_closed {
            let counters = &self.shared.counters;
            self.running.extend(queue.jobs.drain(..).map(Sequence::new));
            set(&counters.running, self.running.len());
            return false;
        }
        queue.drop_cancelled(&self.shared.counters);
        while self.running.len() < self.config.max_sequences.max(1) {
            let Some(job) = queue.jobs.pop_front() else {
                break;
            };
            self.running.push(Sequence::new(job));
        }
        set(&self.shared.counters.running, self.running.len());
        true
    }

    /// Ends sequences whose reader left or fell asleep.
    fn end_abandoned(&mut self) {
        for sequence in &mut self.running {
            if sequence.events.is_closed() {
                sequence.finish(FinishReason::Cancelled, None);
            } else if sequence.events.has_room() {
                sequence.stalled_since = None;
            } else {
                let since = *sequence.stalled_since.get_or_insert_with(Instant::now);
                if since.elapsed() > self.config.reader_timeout {
                    sequence.ending = Some(Ending::Failed(Error::Stalled {
                        stalled_s: self.config.reader_timeout.as_secs(),
                    }));
                }
            }
        }
    }

    /// Computes one chunk of the first prompt that is not done; at its end draws the first token.
    fn prefill_chunk(&mut self) {
        let counters = &self.shared.counters;
        let Some(sequence) = self
            .running
            .iter_mut()
            .find(|sequence| sequence.next.is_none() && sequence.ending.is_none())
        else {
            return;
        };

        // 1. begin: from the longest kept prefix, if there is one
        let mut logits = None;
        if sequence.state.is_none() {
            let hit = self.snapshots.longest_prefix(&sequence.request.ids);
            let n_cached = hit.as_ref().map_or(0, |hit| hit.n_tokens);
            sequence.seen = sequence.request.ids[..n_cached].to_vec();
            sequence.usage.n_cached = n_cached;
            add(&counters.prefix_hit_tokens, n_cached);
            let state = match hit {
                Some(hit) => {
                    logits = hit.logits.map(<[f32]>::to_vec);
                    self.runner.snapshot(hit.state)
                }
                None => self.runner.new_state(),
            };
            match state {
                Ok(state) => sequence.state = Some(state),
                Err(error) => {
                    sequence.ending = Some(Ending::Failed(error));
                    return;
                }
            }
        }
        let Some(state) = sequence.state.as_mut() else {
            return;
        };

        // 2. the next chunk
        let n_seen = sequence.seen.len();
        let rest = &sequence.request.ids[n_seen..];
        let chunk = &rest[..rest.len().min(self.config.prefill_chunk.max(1))];
        if !chunk.is_empty() {
            match guarded(|| self.runner.prefill(state, chunk)) {
                Ok(tensor) => {
                    add(&counters.prefill_tokens, chunk.len());
                    sequence.seen.extend_from_slice(chunk);
                    logits = Some(tensor.to_f32_vec());
                }
                Err(error) => {
                    sequence.ending = Some(Ending::Failed(error));
                    return;
                }
            }
        }

        // 3. the prompt is done: keep its state, draw the first token
        if sequence.seen.len() < sequence.request.ids.len() {
            return;
        }
        let Some(logits) = logits else {
            return;
        };
        let bytes = snapshot_bytes(&self.runner, state, sequence.seen.len(), logits.len());
        // A device without room for the copy loses a shortcut, nothing else.
        if !chunk.is_empty()
            && self.snapshots.takes(bytes)
            && let Ok(copy) = self.runner.snapshot(state)
        {
            self.snapshots.insert(Snapshot {
                tokens: sequence.seen.clone(),
                state: copy,
                logits: Some(logits.clone()),
                bytes,
            });
        }
        sequence.accept(&logits, self.config.context);
        add(&counters.generated_tokens, 1);
    }

    /// One token more for every sequence that speaks and whose reader keeps up.
    fn decode(&mut self) {
        let mut speaking: Vec<&mut Sequence<R::State>> = self
            .running
            .iter_mut()
            .filter(|sequence| {
                sequence.next.is_some() && sequence.ending.is_none() && sequence.events.has_room()
            })
            .collect();
        if speaking.is_empty() {
            let all_wait = self
                .running
                .iter()
                .all(|sequence| sequence.next.is_some() && sequence.ending.is_none());
            if all_wait && !self.running.is_empty() {
                std::thread::sleep(PAUSE);
            }
            return;
        }

        let tokens_b: Vec<u32> = speaking.iter().filter_map(|s| s.next).collect();
        let mut states: Vec<&mut R::State> = speaking
            .iter_mut()
            .filter_map(|s| s.state.as_mut())
            .collect();
        let result = guarded(|| self.runner.step(&mut states, &tokens_b));
        drop(states);

        let counters = &self.shared.counters;
        add(&counters.decode_steps, 1);
        match result {
            Ok(logits_bc) => {
                let n_ids = self.runner.vocab_size();
                let logits = logits_bc.to_f32_vec();
                for ((sequence, row), token) in
                    speaking.iter_mut().zip(logits.chunks(n_ids)).zip(tokens_b)
                {
                    sequence.seen.push(token);
                    sequence.accept(row, self.config.context);
                    add(&counters.generated_tokens, 1);
                }
            }
            // The states may be half written, so everyone in the step ends.
            Err(error) => {
                for sequence in &mut speaking {
                    sequence.ending = Some(Ending::Failed(error.clone()));
                }
            }
        }
    }

    /// Says goodbye to sequences that ended, and keeps their states.
    fn retire(&mut self) {
        let counters = &self.shared.counters;
        let mut still_running = Vec::with_capacity(self.running.len());
        let mut farewells: VecDeque<(EventSender, Event)> = VecDeque::new();
        for mut sequence in self.running.drain(..) {
            let Some(ending) = sequence.ending.take() else {
                still_running.push(sequence);
                continue;
            };
            let event = match ending {
                Ending::Failed(error) => {
                    add(&counters.failed, 1);
                    Event::Failed(error)
                }
                Ending::Finished { reason, stop_id } => {
                    match reason {
                        FinishReason::Cancelled => add(&counters.cancelled, 1),
                        FinishReason::Stop | FinishReason::Length => add(&counters.finished, 1),
                    }
                    if let Some(state) = sequence.state {
                        let bytes = snapshot_bytes(&self.runner, &state, sequence.seen.len(), 0);
                        // At the prompt's very end a state with its logits is kept already.
                        if sequence.seen.len() != sequence.request.ids.len() {
                            self.snapshots.insert(Snapshot {
                                tokens: sequence.seen,
                                state,
                                logits: None,
                                bytes,
                            });
                        }
                    }
                    Event::Finished {
                        reason,
                        stop_id,
                        seed: sequence.seed,
                        usage: sequence.usage,
                    }
                }
            };
            farewells.push_back((sequence.events, event));
        }
        self.running = still_running;
        set(&counters.running, self.running.len());
        set(&counters.snapshots, self.snapshots.len());
        set(&counters.snapshot_bytes, self.snapshots.bytes());
        // After the counters, so that whoever has the last event reads counters that include it.
        for (events, event) in farewells {
            events.send(event);
        }
    }
}

impl<S> Sequence<S> {
    fn new(job: Job) -> Self {
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
            counts: Counts::new(),
            usage,
            stalled_since: None,
            ending: None,
        }
    }

    fn finish(&mut self, reason: FinishReason, stop_id: Option<u32>) {
        if self.ending.is_none() {
            self.ending = Some(Ending::Finished { reason, stop_id });
        }
    }

    /// Draws a token from logits [C], sends it, and decides whether it was the last.
    fn accept(&mut self, logits: &[f32], context: usize) {
        match self.draw(logits) {
            Ok(id) => {
                self.usage.n_generated += 1;
                if self.request.stop_ids.contains(&id) {
                    self.finish(FinishReason::Stop, Some(id));
                    return;
                }
                *self.counts.entry(id).or_insert(0) += 1;
                let (logprob, top) = logprobs::raw(logits, id, self.request.top_logprobs);
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

    fn draw(&self, logits: &[f32]) -> Result<u32> {
        sampling::draw(
            logits,
            &self.counts,
            &self.request.sampling,
            self.seed,
            self.usage.n_generated as u64,
        )
    }
}

/// Closes the queue when the thread leaves, by return or by panic.
struct CloseOnDrop(Arc<Shared>);

impl Drop for CloseOnDrop {
    fn drop(&mut self) {
        self.0.close();
    }
}

fn snapshot_bytes<R: Runner>(
    runner: &R,
    state: &R::State,
    n_tokens: usize,
    n_logits: usize,
) -> usize {
    runner.state_bytes(state) + 4 * (n_tokens + n_logits)
}
