//! What can go wrong while files are written.

use std::io;
use std::path::{Path, PathBuf};

/// What the functions of this crate give.
pub type Result<T> = std::result::Result<T, Error>;

/// Errors of `files`.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The system refused: `action` is a verb (`write`, `read`, `replace`).
    #[error("cannot {action} {}: {source}; {}", path.display(), remedy(source))]
    Io {
        /// What was tried.
        action: &'static str,
        /// With which file or folder.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

impl Error {
    /// Action, path and what the system said, for errors of other crates that have words of their own.
    pub fn into_parts(self) -> (&'static str, PathBuf, io::Error) {
        let Error::Io {
            action,
            path,
            source,
        } = self;
        (action, path, source)
    }
}

fn remedy(source: &io::Error) -> &'static str {
    match source.kind() {
        io::ErrorKind::NotFound => "check that it is there",
        io::ErrorKind::NotADirectory | io::ErrorKind::InvalidInput => "choose another place",
        _ => "check the free space and the permissions of its folder",
    }
}

/// Names the action and the path of an input or output error.
pub(crate) trait During<T> {
    fn during(self, action: &'static str, path: &Path) -> Result<T>;
}

impl<T> During<T> for io::Result<T> {
    fn during(self, action: &'static str, path: &Path) -> Result<T> {
        self.map_err(|source| Error::Io {
            action,
            path: path.to_owned(),
            source,
        })
    }
}
