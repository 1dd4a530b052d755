//! Hashes as lower-case hex digits, and what computes them while a file arrives.

use std::fmt::{self, Display};

use serde::{Deserialize, Serialize};
use sha1::Digest;

use crate::error::{Error, Result};
use crate::said::Said;

/// So many digits of `0-9a-f`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
struct Hex<const DIGITS: usize>(String);

impl<const DIGITS: usize> Hex<DIGITS> {
    fn parse(text: &str, what: &'static str) -> Result<Self> {
        let is_digit = |byte: u8| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
        match text.len() == DIGITS && text.bytes().all(is_digit) {
            true => Ok(Hex(text.to_owned())),
            false => Err(Error::NotHex {
                what,
                digits: DIGITS,
                said: Said::new(text),
            }),
        }
    }
}

impl<const DIGITS: usize> TryFrom<String> for Hex<DIGITS> {
    type Error = Error;

    fn try_from(text: String) -> Result<Self> {
        Self::parse(&text, "hash")
    }
}

impl<const DIGITS: usize> From<Hex<DIGITS>> for String {
    fn from(hex: Hex<DIGITS>) -> String {
        hex.0
    }
}

/// A commit of git: 40 digits.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Commit(Hex<40>);

impl Commit {
    /// Reads a commit.
    ///
    /// # Errors
    /// The text is no 40 digits of `0-9a-f`.
    pub fn parse(text: &str) -> Result<Commit> {
        Hex::parse(text, "commit").map(Commit)
    }

    /// Its digits.
    pub fn as_str(&self) -> &str {
        &self.0.0
    }
}

impl Display for Commit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// SHA-256 of a file's bytes: 64 digits.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Sha256(Hex<64>);

impl Sha256 {
    /// Reads a hash.
    ///
    /// # Errors
    /// The text is no 64 digits of `0-9a-f`.
    pub fn parse(text: &str) -> Result<Sha256> {
        Hex::parse(text, "SHA-256").map(Sha256)
    }
}

/// Git's id of a file: SHA-1 of `blob <size>\0` and its bytes, 40 digits.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct GitBlobId(Hex<40>);

impl GitBlobId {
    /// Reads a blob's id.
    ///
    /// # Errors
    /// The text is no 40 digits of `0-9a-f`.
    pub fn parse(text: &str) -> Result<GitBlobId> {
        Hex::parse(text, "git blob id").map(GitBlobId)
    }
}

/// What a file is held against: large ones are known by their SHA-256, small ones by git's blob id.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Hash {
    /// Of a file in large file storage.
    Sha256(Sha256),
    /// Of a file in the repository itself.
    GitBlob(GitBlobId),
}

impl Hash {
    /// Begins to hash a file of `bytes` bytes.
    pub(crate) fn begin(&self, bytes: u64) -> Hasher {
        match self {
            Hash::Sha256(_) => Hasher::Sha256(sha2::Sha256::new()),
            Hash::GitBlob(_) => {
                Hasher::GitBlob(sha1::Sha1::new_with_prefix(format!("blob {bytes}\0")))
            }
        }
    }

    /// Whether that is what `hasher` was given.
    pub(crate) fn is_of(&self, hasher: &Hasher) -> bool {
        let expected = match self {
            Hash::Sha256(Sha256(hex)) => &hex.0,
            Hash::GitBlob(GitBlobId(hex)) => &hex.0,
        };
        hasher.digits() == *expected
    }
}

/// A hash on its way.
#[derive(Debug, Clone)]
pub(crate) enum Hasher {
    Sha256(sha2::Sha256),
    GitBlob(sha1::Sha1),
}

impl Hasher {
    pub fn update(&mut self, bytes: &[u8]) {
        match self {
            Hasher::Sha256(hasher) => hasher.update(bytes),
            Hasher::GitBlob(hasher) => hasher.update(bytes),
        }
    }

    fn digits(&self) -> String {
        match self.clone() {
            Hasher::Sha256(hasher) => files::hex(&hasher.finalize()),
            Hasher::GitBlob(hasher) => files::hex(&hasher.finalize()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_lower_case_digits_in_their_number_are_a_commit() {
        let right = "0123456789abcdef0123456789abcdef01234567";
        assert_eq!(Commit::parse(right).unwrap().as_str(), right);
        for wrong in [
            &right[..39],
            &format!("{right}0"),
            &right.to_uppercase(),
            &right.replace('f', "g"),
            &format!("{}/..", &right[..37]),
            "..",
            "",
            "０123456789abcdef0123456789abcdef01234",
        ] {
            assert!(Commit::parse(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn record_holds_the_same_types() {
        let text = format!("\"{}\"", "0".repeat(40));
        assert!(serde_json::from_str::<Commit>(&text).is_ok());
        assert!(serde_json::from_str::<Commit>("\"../../x\"").is_err());
        let hash = Hash::Sha256(Sha256::parse(&"a".repeat(64)).unwrap());
        let text = serde_json::to_string(&hash).unwrap();
        assert_eq!(text, format!("{{\"sha256\":\"{}\"}}", "a".repeat(64)));
        assert_eq!(serde_json::from_str::<Hash>(&text).unwrap(), hash);
    }

    /// `git hash-object` of "hello\n"; SHA-256 of "abc" from FIPS 180-4.
    #[test]
    fn hashes_are_those_of_git_and_of_the_standard() {
        let blob = GitBlobId::parse("ce013625030ba8dba906f756967f9e9ca394464a").unwrap();
        let blob = Hash::GitBlob(blob);
        let mut hasher = blob.begin(6);
        hasher.update(b"hel");
        assert!(!blob.is_of(&hasher));
        hasher.update(b"lo\n");
        assert!(blob.is_of(&hasher));

        let abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        let abc = Hash::Sha256(Sha256::parse(abc).unwrap());
        let mut hasher = abc.begin(3);
        hasher.update(b"abc");
        assert!(abc.is_of(&hasher));
    }
}
