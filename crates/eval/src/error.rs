//! What can go wrong while a model is evaluated.

use std::path::PathBuf;

/// What the functions of this crate give.
pub type Result<T> = std::result::Result<T, Error>;

/// Errors of `eval`.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Nothing to measure on one side.
    #[error(
        "no {side} rows with a trainable token in the {stage} data; check the split and the languages"
    )]
    Empty {
        /// `train` or `held-out`.
        side: &'static str,
        /// `pt` or `sft`.
        stage: &'static str,
    },
    /// The model cannot say a loss.
    #[error(transparent)]
    Model(#[from] model::Error),
    /// The report cannot be written.
    #[error("cannot write {path}: {source}; free some space or choose another --out")]
    Write {
        /// Its file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The report holds what JSON cannot.
    #[error("cannot serialise the report: {0}")]
    Json(#[from] serde_json::Error),
}

impl From<files::Error> for Error {
    fn from(error: files::Error) -> Self {
        let (_, path, source) = error.into_parts();
        Error::Write { path, source }
    }
}
