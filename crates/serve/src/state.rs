//! What every handler shares: the engine, the way from text to ids, the character's words, limits and counters.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use engine::EngineHandle;
use text::{ChatEncoder, Persona};

use crate::cors::AllowedOrigins;
use crate::error::ApiError;
use crate::hosts::AllowedHosts;
use crate::keys::{GuessLimits, Keys};
use crate::profiles::Profiles;
use crate::shares::Shares;

/// What the caller gives a server: everything but the engine, which may come later.
#[derive(Debug)]
pub struct Setup {
    /// The model's name in the API.
    pub model: String,
    /// The way from conversations to ids.
    pub chat: ChatEncoder,
    /// Sampling values by name.
    pub profiles: Profiles,
    /// The character's words, stored with the weights.
    pub persona: Persona,
    /// Trainable numbers of the model, for the page's plain sentence about it; 0 = unknown.
    pub n_params: u64,
    /// Keys that open every route but `/health` and the page; none = open to all who reach the port.
    pub api_keys: Vec<String>,
    /// Origins of web pages that may use the API.
    pub allowed_origins: AllowedOrigins,
    /// Names under which the server answers.
    pub allowed_hosts: AllowedHosts,
    /// Caps on one request, and on wrong keys.
    pub limits: Limits,
}

/// Caps on one request, and on wrong keys.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Bytes of its body.
    pub body_bytes: usize,
    /// How long its body may take, from its headers on.
    pub body_time: Duration,
    /// Replies to each prompt.
    pub n: u64,
    /// Messages of a conversation.
    pub messages: usize,
    /// Strings that end a reply.
    pub stop_strings: usize,
    /// Tokens of a reply when the request names none; the context's end may come earlier.
    pub default_max_tokens: usize,
    /// How wrong keys are slowed down.
    pub guesses: GuessLimits,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            body_bytes: 1 << 20,
            body_time: Duration::from_secs(30),
            n: 8,
            messages: 1000,
            stop_strings: 256,
            default_max_tokens: 2048,
            guesses: GuessLimits::default(),
        }
    }
}

/// Shared by all handlers; cheap to clone.
#[derive(Debug, Clone)]
pub struct AppState {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    setup: Setup,
    keys: Keys,
    shares: Shares,
    engine: OnceLock<EngineHandle>,
    started: Instant,
    next_id: Mutex<u64>,
    /// Answers by HTTP status.
    statuses: Mutex<BTreeMap<u16, u64>>,
}

impl AppState {
    /// A state without an engine: `/health` says `loading` until [`AppState::set_engine`].
    pub fn new(setup: Setup) -> Self {
        let keys = Keys::new(&setup.api_keys, setup.limits.guesses);
        AppState {
            inner: Arc::new(Inner {
                setup,
                keys,
                shares: Shares::default(),
                engine: OnceLock::new(),
                started: Instant::now(),
                next_id: Mutex::new(0),
                statuses: Mutex::new(BTreeMap::new()),
            }),
        }
    }

    /// Brings the engine, once the weights are read. A second call changes nothing.
    pub fn set_engine(&self, engine: EngineHandle) {
        // The handle that is not taken is dropped, and its engine ends.
        drop(self.inner.engine.set(engine));
    }

    /// The engine, or `None` while the model is loading.
    pub fn engine(&self) -> Option<&EngineHandle> {
        self.inner.engine.get()
    }

    /// What the server was started with.
    pub fn setup(&self) -> &Setup {
        &self.inner.setup
    }

    pub(crate) fn loaded_engine(&self) -> Result<&EngineHandle, ApiError> {
        self.engine().ok_or(ApiError::Loading)
    }

    pub(crate) fn uptime_s(&self) -> u64 {
        self.inner.started.elapsed().as_secs()
    }

    /// A name for an answer, unique while the server lives.
    pub(crate) fn answer_id(&self, prefix: &str) -> String {
        let mut next = self.lock(&self.inner.next_id);
        *next += 1;
        format!("{prefix}-{:x}-{:x}", unix_time(), *next)
    }

    /// The keys that open the protected routes.
    pub(crate) fn keys(&self) -> &Keys {
        &self.inner.keys
    }

    /// What each client has waiting.
    pub(crate) fn shares(&self) -> &Shares {
        &self.inner.shares
    }

    pub(crate) fn count_status(&self, status: u16) {
        *self.lock(&self.inner.statuses).entry(status).or_insert(0) += 1;
    }

    pub(crate) fn statuses(&self) -> BTreeMap<u16, u64> {
        self.lock(&self.inner.statuses).clone()
    }

    fn lock<'a, T>(&self, mutex: &'a Mutex<T>) -> std::sync::MutexGuard<'a, T> {
        mutex.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Seconds since 1970.
pub(crate) fn unix_time() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |elapsed| elapsed.as_secs())
}
