//! The engine's limits.

use std::time::Duration;

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
    /// States kept for reuse; 0 turns reuse off.
    pub max_snapshots: usize,
    /// Bytes that those states may take together.
    pub snapshot_bytes: usize,
    /// Unread events at which a sequence pauses.
    pub max_unread: usize,
    /// How long a sequence may stay paused before it is ended.
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
            reader_timeout: Duration::from_secs(180),
        }
    }
}
