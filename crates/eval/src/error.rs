//! What can go wrong while a model is evaluated.

use std::path::PathBuf;

pub type Result<T> = std::result::Result<T, Error>;

/// Errors of `eval`.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    #[error(
        "no {side} rows with a trainable token in the {stage} data; check the split and the languages"
    )]
    Empty {
        side: &'static str,
        stage: &'static str,
    },
    #[error(transparent)]
    Model(#[from] model::Error),
    #[error("cannot write {path}: {source}; free some space or choose another --out")]
    Write {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("cannot serialise the report: {0}")]
    Json(#[from] serde_json::Error),
}

impl From<files::Error> for Error {
    fn from(error: files::Error) -> Self {
        let (_, path, source) = error.into_parts();
        Error::Write { path, source }
    }
}
