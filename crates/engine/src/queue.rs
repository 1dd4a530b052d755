//! The waiting line between the handles and the engine's thread.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use crate::channel::EventSender;
use crate::request::Request;
use crate::stats::{self, Counters};

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
