//! The engine's loop: admit, prefill a chunk, decode everyone by one token, retire, again.
//! One prompt is prefilled at a time and in chunks, so that those already speaking never wait for more than a chunk.

use std::collections::VecDeque;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use tracing::debug;

use crate::channel::EventSender;
use crate::config::EngineConfig;
use crate::error::{Error, Result};
use crate::queue::Shared;
use crate::request::{Event, FinishReason};
use crate::runner::{Logits, Runner, guarded};
use crate::sequence::{Ending, Sequence};
use crate::snapshots::{Snapshot, Snapshots};
use crate::stats::{add, set};

/// How long the loop sleeps when every reader is behind.
const PAUSE: Duration = Duration::from_millis(5);

/// Prompt tokens computed at once where each one's logits are wanted: their rows are a vocabulary wide.
const SCORED_CHUNK: usize = 64;

pub(crate) struct Scheduler<R: Runner> {
    runner: R,
    config: EngineConfig,
    shared: Arc<Shared>,
    /// In order of admission: the first one without a `next` is the one being prefilled.
    running: Vec<Sequence<R::State>>,
    snapshots: Snapshots<R::State>,
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
            // A kept state has no scores of the tokens it has seen.
            let hit = if sequence.request.prompt_logprobs {
                None
            } else {
                self.snapshots.longest_prefix(&sequence.request.ids)
            };
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

        // 2. the next chunk
        let n_new = match advance(&self.runner, sequence, self.config.prefill_chunk) {
            Ok(None) => 0,
            Ok(Some(chunk)) => {
                logits = Some(chunk.last_logits);
                chunk.n_tokens
            }
            Err(error) => {
                sequence.ending = Some(Ending::Failed(error));
                return;
            }
        };
        add(&counters.prefill_tokens, n_new);

        // 3. the prompt is done: keep its state, draw the first token
        if sequence.seen.len() < sequence.request.ids.len() {
            return;
        }
        let (Some(state), Some(logits)) = (sequence.state.as_ref(), logits) else {
            return;
        };
        let bytes = snapshot_bytes(&self.runner, state, sequence.seen.len(), logits.len());
        // A device without room for the copy loses a shortcut, nothing else.
        if n_new > 0
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
        sequence.begin(Logits::All(logits), self.config.context);
        add(&counters.generated_tokens, sequence.usage.n_generated);
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
            Ok(rows) => {
                let tokens = tokens_b.into_iter();
                for (row, ((sequence, logits), token)) in
                    speaking.iter_mut().zip(rows).zip(tokens).enumerate()
                {
                    sequence.seen.push(token);
                    let whole = || self.runner.logits_of(row);
                    sequence.accept(logits, whole, self.config.context);
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
                Ending::Finished { reason, stop } => {
                    match reason {
                        FinishReason::Cancelled => add(&counters.cancelled, 1),
                        FinishReason::Stop | FinishReason::Length => add(&counters.finished, 1),
                    }
                    let farewell = sequence.farewell(reason, stop);
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
                    farewell
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

/// What a chunk of a prompt gave.
struct Chunk {
    n_tokens: usize,
    /// Logits behind its last token [C].
    last_logits: Vec<f32>,
}

/// Computes at most `most` further tokens of a sequence's prompt, scoring them if asked for; `None` where none is left.
fn advance<R: Runner>(
    runner: &R,
    sequence: &mut Sequence<R::State>,
    most: usize,
) -> Result<Option<Chunk>> {
    let n_seen = sequence.seen.len();
    let rest = &sequence.request.ids[n_seen..];
    let is_scored = sequence.request.prompt_logprobs;
    let most = if is_scored {
        most.min(SCORED_CHUNK)
    } else {
        most
    };
    let chunk = &rest[..rest.len().min(most.max(1))];
    let Some(state) = sequence.state.as_mut().filter(|_| !chunk.is_empty()) else {
        return Ok(None);
    };
    let n_tokens = chunk.len();
    let mut last_logits = if is_scored {
        guarded(|| runner.prefill_all(state, chunk))?
    } else {
        guarded(|| runner.prefill(state, chunk))?
    }
    .to_f32_vec();
    sequence.seen.extend_from_slice(chunk);
    if is_scored {
        let n_ids = runner.vocab_size();
        sequence.score_prompt(n_seen, &last_logits, n_ids);
        last_logits.drain(..last_logits.len() - n_ids);
    }
    Ok(Some(Chunk {
        n_tokens,
        last_logits,
    }))
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
