//! Counters that the engine's thread writes and anyone may read at any time.

use std::sync::atomic::{AtomicU64, Ordering};

/// The engine's state at one moment. Counts of tokens and requests only ever grow; the others go up and down.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Stats {
    /// Sequences being prefilled or decoded now.
    pub running: u64,
    /// Requests in the queue now.
    pub waiting: u64,
    /// Requests taken so far.
    pub requests: u64,
    /// Of these, replies that ended by themselves.
    pub finished: u64,
    /// Those whose reader left.
    pub cancelled: u64,
    /// Those that broke off.
    pub failed: u64,
    /// Requests refused because the queue was full.
    pub refused: u64,
    /// Prompt tokens computed.
    pub prefill_tokens: u64,
    /// Prompt tokens taken from kept states.
    pub prefix_hit_tokens: u64,
    /// Tokens generated, stop tokens included.
    pub generated_tokens: u64,
    /// Batched decode steps.
    pub decode_steps: u64,
    /// States kept for reuse now.
    pub snapshots: u64,
    /// Their size.
    pub snapshot_bytes: u64,
}

/// What the engine's thread counts.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub running: AtomicU64,
    pub requests: AtomicU64,
    pub finished: AtomicU64,
    pub cancelled: AtomicU64,
    pub failed: AtomicU64,
    pub refused: AtomicU64,
    pub prefill_tokens: AtomicU64,
    pub prefix_hit_tokens: AtomicU64,
    pub generated_tokens: AtomicU64,
    pub decode_steps: AtomicU64,
    pub snapshots: AtomicU64,
    pub snapshot_bytes: AtomicU64,
}

impl Counters {
    pub fn read(&self, waiting: u64) -> Stats {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Stats {
            running: get(&self.running),
            waiting,
            requests: get(&self.requests),
            finished: get(&self.finished),
            cancelled: get(&self.cancelled),
            failed: get(&self.failed),
            refused: get(&self.refused),
            prefill_tokens: get(&self.prefill_tokens),
            prefix_hit_tokens: get(&self.prefix_hit_tokens),
            generated_tokens: get(&self.generated_tokens),
            decode_steps: get(&self.decode_steps),
            snapshots: get(&self.snapshots),
            snapshot_bytes: get(&self.snapshot_bytes),
        }
    }
}

pub(crate) fn add(counter: &AtomicU64, n: usize) {
    counter.fetch_add(n as u64, Ordering::Relaxed);
}

pub(crate) fn set(counter: &AtomicU64, value: usize) {
    counter.store(value as u64, Ordering::Relaxed);
}
