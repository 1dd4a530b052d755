//! What can go wrong while a model is fetched.

use std::path::{Path, PathBuf};

use hf_hub::api::sync::ApiError;

/// What the functions of this crate give.
pub type Result<T> = std::result::Result<T, Error>;

/// Errors of `hub`.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A name that no repository can have.
    #[error("`{text}` is no Hub id; expected owner/name, e.g. Qwen/Qwen3.5-4B-Base")]
    NoHubId {
        /// What was given.
        text: String,
    },
    /// Something else has the name of the folder.
    #[error(
        "{} exists and is not a fetched {hub_id} at {revision}; move it away or choose another --out", path.display()
    )]
    Exists {
        /// The folder.
        path: PathBuf,
        /// What was to be fetched.
        hub_id: String,
        /// At which revision.
        revision: String,
    },
    /// The client cannot be set up.
    #[error("setting up the Hub client")]
    Client(#[source] ApiError),
    /// The host does not answer, or not as a Hub does.
    #[error(
        "asking {endpoint} for {hub_id} at {revision}; check the name, the network, or set HF_ENDPOINT to a mirror (HF_TOKEN for a gated model)"
    )]
    Ask {
        /// The host.
        endpoint: String,
        /// What was to be fetched.
        hub_id: String,
        /// At which revision.
        revision: String,
        /// What was wrong.
        source: Answer,
    },
    /// A download broke off.
    #[error("getting {name}; run the same command again to go on from {}", part.display())]
    Download {
        /// The file.
        name: String,
        /// Where what is there lies.
        part: PathBuf,
        /// What the client said.
        source: ApiError,
    },
    /// Bytes that are not those of the repository.
    #[error("{name} differs from its published hash and was removed; run the same command again")]
    Damaged {
        /// The file.
        name: String,
    },
    /// The record of what was fetched has no JSON form.
    #[error("writing what was fetched")]
    Record(#[source] serde_json::Error),
    /// A file or folder that cannot be read, made or moved.
    #[error(transparent)]
    Files(#[from] files::Error),
    /// The same, where the system was asked directly: `action` is a verb with -ing.
    #[error("{action} {}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// With what.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
}

/// What is wrong with an answer of the Hub.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Answer {
    /// There is none.
    #[error(transparent)]
    Request(#[from] ApiError),
    /// It lacks a part: `the answer names no commit`.
    #[error("the answer {lacks}")]
    Lacks {
        /// What, as a verb and its object.
        lacks: &'static str,
    },
    /// A file that nothing can be held against.
    #[error("the answer gives no hash for {name}; this mirror cannot be trusted with weights")]
    NoHash {
        /// The file.
        name: String,
    },
    /// A file of unknown length.
    #[error("the answer gives no size for {name}")]
    NoSize {
        /// The file.
        name: String,
    },
    /// Not a model, or one in another format.
    #[error("the repository holds no .safetensors file")]
    NoWeights,
}

impl Error {
    /// Whether the arguments are at fault, and not the network or the disk.
    pub fn is_misuse(&self) -> bool {
        matches!(self, Error::NoHubId { .. } | Error::Exists { .. })
    }
}

/// Names the action and the path of an input or output error.
pub(crate) trait During<T> {
    fn during(self, action: &'static str, path: &Path) -> Result<T>;
}

impl<T> During<T> for std::io::Result<T> {
    fn during(self, action: &'static str, path: &Path) -> Result<T> {
        self.map_err(|source| Error::Io {
            action,
            path: path.to_owned(),
            source,
        })
    }
}
