//! OpenAI-compatible HTTP API and the chat page over one engine: the only crate that knows tokio and HTTP.

mod api;
mod connections;
mod cors;
mod error;
mod fields;
mod generation;
mod hosts;
mod keys;
mod lines;
mod options;
mod parameters;
mod profiles;
mod reply;
mod server;
mod shares;
mod stall;
mod state;
mod stop;

pub use api::app;
pub use connections::ConnectionLimits;
pub use cors::AllowedOrigins;
pub use error::{Error, Result};
pub use hosts::AllowedHosts;
pub use keys::GuessLimits;
pub use parameters::fields_markdown;
pub use profiles::{Profile, Profiles};
pub use server::{bind, run};
pub use state::{AppState, Limits, Setup};
