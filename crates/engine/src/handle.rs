//! Starting the engine and speaking to it: a queue with a bound, a thread of its own, and handles that end it with the last one.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::sync::Arc;

use model::Model;

use crate::channel::{self, EventReceiver};
use crate::config::EngineConfig;
use crate::error::{Error, Result};
use crate::queue::{Job, Shared};
use crate::request::Request;
use crate::runner::{ModelRunner, Runner};
use crate::scheduler::Scheduler;
use crate::stats::{self, Stats};

/// The engine's starting point; everything after it goes through the handle.
pub struct Engine;

impl Engine {
    /// Starts the thread that owns `model`. It ends when the last clone of the handle is dropped.
    ///
    /// # Errors
    /// [`Error::Thread`] if the system gives no thread; [`Error::Model`] if the GPU has no room for a step.
    pub fn start(model: Model, config: EngineConfig) -> Result<EngineHandle> {
        start(ModelRunner::new(model, config.max_sequences)?, config)
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
        self.check(&request)?;
        let owner = &*self.owner;
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

    /// Whether a request could ever run.
    ///
    /// # Errors
    /// What is wrong with its prompt, ids or numbers.
    pub fn check(&self, request: &Request) -> Result<()> {
        request.validate(self.owner.vocab_size, self.owner.config.context)
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

    /// The limits that the engine was started with.
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

/// A seed nobody asked for. 32 bits, so that it survives JSON numbers in a browser and can be typed again.
fn fresh_seed() -> u64 {
    u64::from(RandomState::new().build_hasher().finish() as u32)
}
