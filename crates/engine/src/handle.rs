//! Starting the engine and speaking to it: a queue with a bound, a thread of its own, and handles that end it with the last one.

use std::collections::VecDeque;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use model::Model;

use crate::channel::{self, EventReceiver, EventSender};
use crate::error::{Error, Result};
use crate::request::Request;
use crate::runner::Runner;
use crate::scheduler::Scheduler;
use crate::stats::{self, Counters, Stats};

/// Limits of the engine; the defaults suit one host and a few friends.
#[derive(Debug, Clone, PartialEq)]
pub struct EngineConfig {
    /// Sequences computed at once; further requests wait.
    pub max_sequences: usize,
    /// Requests that may wait; further ones are refused with [`Error::QueueFull`].
    pub max_waiting: usize,
    /// Tokens of prompt and reply together.
    pub context: usize,
    /// Prompt tokens computed between two decode steps.
    pub prefill_chunk: usize,
    /// States kept for reuse, by count and by bytes; 0 turns reuse off.
    pub max_snapshots: usize,
    pub snapshot_bytes: usize,
    /// Unread events at which a sequence pauses, and how long it may stay paused before it is ended.
    pub max_unread: usize,
    pub reader_timeout: Duration,
}

impl Default for EngineConfig {
    fn default() -> Self {
        EngineConfig {
            max_sequences: 8,
            max_waiting: 64,
            context: 8192,
            prefill_chunk: 512,
            max_snapshots: 16,
            snapshot_bytes: 1 << 30,
            max_unread: 256,
            reader_timeout: Duration::from_secs(60),
        }
    }
}

/// The engine's starting point; everything after it goes through the handle.
pub struct Engine;

impl Engine {
    /// Starts the thread that owns `model`. It ends when the last clone of the handle is dropped.
    ///
    /// # Errors
    /// [`Error::Thread`] if the system gives no thread.
    pub fn start(model: Model, config: EngineConfig) -> Result<EngineHandle> {
        start(model, config)
    }
}

pub(crate) fn start<R: Runner>(runner: R, config: EngineConfig) -> Result<EngineHandle> {
    let shared = Arc::new(Shared::default());
    let vocab_size = runner.vocab_size();
    let scheduler = Scheduler::new(runner, config.clone(), Arc::clone(&shared));
    std::thread::Builder::new()
        .name("engine".to_owned())
        .spawn(move || scheduler.run())
        .map_err(|error| Error::Thread {
            reason: error.to_string(),
        })?;
    Ok(EngineHandle {
        owner: Arc::new(Owner {
            shared,
            config,
            vocab_size,
        }),
    })
}

/// Submits requests and reads counters; cheap to clone.
#[derive(Debug, Clone)]
pub struct EngineHandle {
    owner: Arc<Owner>,
}

impl EngineHandle {
    /// Queues a request. Its events come through the receiver; dropping that cancels it.
    ///
    /// # Errors
    /// A request that can never run (prompt, ids, numbers), [`Error::QueueFull`], [`Error::Stopped`].
    pub fn submit(&self, request: Request) -> Result<EventReceiver> {
        let owner = &*self.owner;
        request.validate(owner.vocab_size, owner.config.context)?;
        let seed = request.sampling.seed.unwrap_or_else(fresh_seed);
        let (sender, receiver) = channel::channel(owner.config.max_unread.max(1));

        let counters = &owner.shared.counters;
        let mut queue = owner.shared.lock();
        if queue.is_closed {
            return Err(Error::Stopped);
        }
        queue.drop_cancelled(counters);
        if queue.jobs.len() >= owner.config.max_waiting {
            stats::add(&counters.refused, 1);
            return Err(Error::QueueFull {
                waiting: queue.jobs.len(),
            });
        }
        queue.jobs.push_back(Job {
            request,
            seed,
            events: sender,
        });
        stats::add(&counters.requests, 1);
        drop(queue);
        owner.shared.wake.notify_one();
        Ok(receiver)
    }

    /// The counters now.
    pub fn stats(&self) -> Stats {
        let shared = &self.owner.shared;
        let waiting = shared.lock().jobs.len() as u64;
        shared.counters.read(waiting)
    }

    /// Whether the engine's thread still takes requests.
    pub fn is_running(&self) -> bool {
        !self.owner.shared.lock().is_closed
    }

    pub fn config(&self) -> &EngineConfig {
        &self.owner.config
    }

    /// Ids from here on are not known to the model.
    pub fn vocab_size(&self) -> usize {
        self.owner.vocab_size
    }
}

/// What all clones of a handle share; its drop is the last handle's drop.
#[derive(Debug)]
struct Owner {
    shared: Arc<Shared>,
    config: EngineConfig,
    vocab_size: usize,
}

impl Drop for Owner {
    fn drop(&mut self) {
        self.shared.close();
    }
}

/// A request that waits for its turn.
#[derive(Debug)]
pub(crate) struct Job {
    pub request: Request,
    pub seed: u64,
    pub events: EventSender,
}

/// What the handles and the thread have in common.
#[derive(Debug, Default)]
pub(crate) struct Shared {
    queue: Mutex<Queue>,
    pub wake: Condvar,
    pub counters: Counters,
}

#[derive(Debug, Default)]
pub(crate) struct Queue {
    pub jobs: VecDeque<Job>,
    pub is_closed: bool,
}

impl Shared {
    pub fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes no more requests; the thread ends those it has and leaves.
    pub fn close(&self) {
        self.lock().is_closed = true;
        self.wake.notify_all();
    }
}

impl Queue {
    /// Forgets waiting requests whose reader has left.
    pub fn drop_cancelled(&mut self, counters: &Counters) {
        let before = self.jobs.len();
        self.jobs.retain(|job| !job.events.is_closed());
        stats::add(&counters.cancelled, before - self.jobs.len());
    }
}

/// A seed nobody asked for. 32 bits, so that it survives JSON numbers in a browser and can be typed again.
fn fresh_seed() -> u64 {
    u64::from(RandomState::new().build_hasher().finish() as u32)
}
