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
    /// Nobody says what was held out.
    #[error("{} is no file; `cyrene corpus split` writes one beside the data sets", path.display())]
    NoSplit {
        /// Where it was looked for.
        path: PathBuf,
    },
    /// Nothing to measure on.
    #[error("no data set beside {}; `cyrene corpus build --out {}` makes them", split.display(), folder.display())]
    NoDataSet {
        /// The split.
        split: PathBuf,
        /// Its folder.
        folder: PathBuf,
    },
    /// The record of what a model was trained on cannot be read.
    #[error("reading {}: {source}; remove it to evaluate without it", path.display())]
    TrainedRows {
        /// Its file.
        path: PathBuf,
        /// What the system or the reader of JSON said.
        source: std::io::Error,
    },
    /// That record is another program's.
    #[error("{} is of version {version}, and {known} is known; remove it to evaluate without it", path.display())]
    TrainedRowsVersion {
        /// Its file.
        path: PathBuf,
        /// What it says.
        version: u32,
        /// What this program writes.
        known: u32,
    },
    /// Rows or split that cannot be read.
    #[error(transparent)]
    Corpus(#[from] corpus::Error),
    /// A conversation that the template refuses, or a row that cannot be cut to length.
    #[error(transparent)]
    Text(#[from] text::Error),
    /// The engine refuses or fails.
    #[error(transparent)]
    Engine(#[from] engine::Error),
    /// The engine's thread is gone.
    #[error("the engine ended before the reply did; run the same command again")]
    EngineEnded,
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

impl Error {
    /// Whether what the user named is at fault, not the machine.
    pub fn is_misuse(&self) -> bool {
        match self {
            Error::Empty { .. }
            | Error::NoSplit { .. }
            | Error::NoDataSet { .. }
            | Error::TrainedRowsVersion { .. } => true,
            Error::Corpus(error) => error.is_of_rows(),
            _ => false,
        }
    }
}

impl From<files::Error> for Error {
    fn from(error: files::Error) -> Self {
        let (_, path, source) = error.into_parts();
        Error::Write { path, source }
    }
}
