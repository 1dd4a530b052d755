//! Everything that can go wrong between a repository and a folder.

use std::path::{Path, PathBuf};

use crate::hash::Commit;
use crate::name::FileName;
use crate::said::Said;
use crate::snapshot::{MAX_BYTES, MAX_FILES};

/// What the functions of this crate give.
pub type Result<T> = std::result::Result<T, Error>;

/// Errors of `hub`.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A name that no repository can have.
    #[error("`{said}` is no Hub id; expected owner/name, e.g. Qwen/Qwen3.5-4B-Base")]
    HubId {
        /// What was given.
        said: Said,
    },
    /// A name that no branch, tag or commit can have.
    #[error("`{said}` is no revision; expected a branch, a tag or a commit, e.g. main")]
    Revision {
        /// What was given.
        said: Said,
    },
    /// An address at which no server can be.
    #[error(
        "`{said}` is no address of the Hub or of a mirror; expected https://host, without user, query or fragment"
    )]
    Endpoint {
        /// What was given.
        said: Said,
    },
    /// A token that no header can hold.
    #[error("the token holds characters that no token has; copy it again")]
    Token,
    /// Something has the name of the folder.
    #[error("{} is there already; move it away or choose another place", out.display())]
    Exists {
        /// The folder.
        out: PathBuf,
    },

    /// No answer.
    #[error("{host} cannot be reached: {said}; check the address and the network")]
    Unreachable {
        /// Who was asked.
        host: Said,
        /// What is wrong.
        said: Said,
        /// Whether another try may help.
        passing: bool,
    },
    /// An answer that says no.
    #[error("{host} answers with status {status}; {}", remedy(*status))]
    Status {
        /// Who was asked.
        host: Said,
        /// Of HTTP.
        status: u16,
    },
    /// A redirect that is not followed.
    #[error("{host} redirects to `{said}`, {why}; use another mirror")]
    Redirect {
        /// Who was asked.
        host: Said,
        /// Where it leads.
        said: Said,
        /// What is wrong with that.
        why: &'static str,
    },
    /// Redirects without end.
    #[error("{host} redirects more than {limit} times; use another mirror")]
    Redirects {
        /// Who was asked last.
        host: Said,
        /// So many are followed.
        limit: u32,
    },

    /// A list that would fill the memory.
    #[error(
        "the answer is larger than {limit} bytes, which no list of a model's files is; use another mirror"
    )]
    AnswerTooLarge {
        /// So many are read.
        limit: u64,
    },
    /// Not JSON, or not that of a list.
    #[error("the answer is no list of a repository's files ({said}); use another mirror")]
    NotAList {
        /// What is wrong.
        said: Said,
    },
    /// A hash or a commit that is none.
    #[error(
        "`{said}` is no {what}, which has {digits} digits of 0-9a-f; what says so cannot be trusted, use another mirror"
    )]
    NotHex {
        /// What it was to be.
        what: &'static str,
        /// Of that.
        digits: usize,
        /// What was given.
        said: Said,
    },
    /// A name that could lead out of a folder, or that some system takes for something else.
    #[error(
        "`{said}` is no plain name of a file; what says so cannot be trusted, use another mirror"
    )]
    FileName {
        /// What was given.
        said: Said,
    },
    /// A file that nothing can be held against.
    #[error(
        "no {what} is given for {name}; a mirror that gives none cannot be trusted with weights, use another"
    )]
    Missing {
        /// Hash or size.
        what: &'static str,
        /// The file.
        name: FileName,
    },
    /// Two files of one name.
    #[error(
        "the file {name} is listed twice, or once more with capitals changed; use another mirror"
    )]
    Duplicate {
        /// The second one.
        name: FileName,
    },
    /// A file with a name that a fetched folder needs for itself.
    #[error(
        "the repository has a file {name}, a name that is needed here; nothing of it can be fetched"
    )]
    Reserved {
        /// The file.
        name: FileName,
    },
    /// A list that is no model's.
    #[error("more than {MAX_FILES} files are listed; no model has so many")]
    TooManyFiles,
    /// Sizes that are no model's.
    #[error("more than {} TiB are listed; no model is so large", MAX_BYTES >> 40)]
    TooManyBytes,
    /// Not a model, or one in another format.
    #[error("the repository holds no .safetensors file; choose one with weights in that format")]
    NoWeights,
    /// Not the commit that was pinned.
    #[error("commit {asked} was asked for and {got} was answered; use another mirror")]
    OtherCommit {
        /// By the user.
        asked: Commit,
        /// By the server.
        got: Commit,
    },

    /// A file that did not come.
    #[error("getting {name}{}", go_on(source, part))]
    Getting {
        /// The file.
        name: FileName,
        /// Where what is there lies.
        part: PathBuf,
        /// Why.
        #[source]
        source: Box<Error>,
    },
    /// A body that ended early.
    #[error("{host} ended after {got} of {expected} bytes: {said}")]
    Cut {
        /// Who sent it.
        host: Said,
        /// Bytes that came.
        got: u64,
        /// Bytes that were to come.
        expected: u64,
        /// What is wrong.
        said: Said,
    },
    /// A body announced with another length than the list's.
    #[error("{host} sends {got} bytes where {expected} were listed; use another mirror")]
    Length {
        /// Who sends it.
        host: Said,
        /// Its length.
        got: u64,
        /// By the list.
        expected: u64,
    },
    /// A body that did not end where it had to.
    #[error(
        "{host} goes on after the {expected} bytes that were listed, and was cut off; use another mirror"
    )]
    Overlong {
        /// Who sent it.
        host: Said,
        /// By the list.
        expected: u64,
    },
    /// Another part of a file than the one that was asked for.
    #[error(
        "{host} was asked for bytes {first} to {last} and answers `{said}`; use another mirror"
    )]
    Range {
        /// Who sent it.
        host: Said,
        /// The first byte that was asked for.
        first: u64,
        /// The last one.
        last: u64,
        /// `Content-Range` of the answer.
        said: Said,
    },
    /// Bytes that are not those of the repository.
    #[error("{name} differs from its published hash and was removed; run the same command again")]
    Damaged {
        /// The file.
        name: FileName,
    },

    /// A disk that is too small.
    #[error(
        "{} MiB are needed in {} and {} MiB are free; make room or choose another place",
        needed.div_ceil(1 << 20), part.display(), free >> 20
    )]
    Room {
        /// Bytes that are still to come.
        needed: u64,
        /// Bytes that are free.
        free: u64,
        /// Where they were to lie.
        part: PathBuf,
    },
    /// Something else, a link perhaps, has the name of the folder beside.
    #[error("{} is no folder; take it away or choose another place", part.display())]
    Part {
        /// The folder.
        part: PathBuf,
    },
    /// Two fetches into one folder.
    #[error("another process is fetching into {}; wait for it", part.display())]
    Busy {
        /// The folder.
        part: PathBuf,
    },
    /// A file or folder that cannot be read, written or moved.
    #[error(transparent)]
    Files(#[from] files::Error),
}

impl Error {
    /// Whether what the user asked for cannot be, whatever a server says.
    pub fn is_misuse(&self) -> bool {
        matches!(
            self,
            Error::HubId { .. }
                | Error::Revision { .. }
                | Error::Endpoint { .. }
                | Error::Token
                | Error::Exists { .. }
        )
    }

    /// Whether the same request may succeed a moment later.
    pub(crate) fn is_passing(&self) -> bool {
        match self {
            Error::Unreachable { passing, .. } => *passing,
            Error::Status { status, .. } => {
                matches!(status, 408 | 425 | 429 | 500 | 502 | 503 | 504)
            }
            Error::Cut { .. } => true,
            _ => false,
        }
    }
}

/// What brings the rest of a file, where that can come at all.
fn go_on(source: &Error, part: &Path) -> String {
    match source.is_passing() || matches!(source, Error::Files(_)) {
        true => format!(
            "; run the same command again to go on from {}",
            part.display()
        ),
        false => String::new(),
    }
}

fn remedy(status: u16) -> &'static str {
    match status {
        401 | 403 => {
            "check the name; where the model is gated or private, accept its terms and give a token"
        }
        404 | 410 => "check the name and the revision",
        408 | 425 | 429 | 500..=599 => "try again later",
        _ => "use another mirror",
    }
}
