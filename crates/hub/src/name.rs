//! Names: of a repository, of a revision, of a file in it.

use std::fmt::{self, Display};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::said::Said;

/// A repository: `owner/name`, each of letters, digits, `-`, `_` and `.`, beginning with a letter or digit.
/// `../model` and `C:\\model` are places on a disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct HubId(String);

impl HubId {
    /// Reads an id.
    ///
    /// # Errors
    /// The text has another form.
    pub fn parse(text: &str) -> Result<HubId> {
        match is_hub_id(text) {
            true => Ok(HubId(text.to_owned())),
            false => Err(Error::HubId {
                said: Said::new(text),
            }),
        }
    }

    /// `owner/name`.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// Whether a text has the form of a [`HubId`].
pub fn is_hub_id(text: &str) -> bool {
    let is_name = |name: &str| {
        name.starts_with(|c: char| c.is_ascii_alphanumeric())
            && name
                .chars()
                .all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
    };
    text.split_once('/')
        .is_some_and(|(owner, name)| is_name(owner) && is_name(name))
}

/// `models/<name>` for `owner/name`: where a fetched model lies unless the user says otherwise.
pub fn default_folder(hub_id: &str) -> PathBuf {
    Path::new("models").join(hub_id.rsplit('/').next().unwrap_or(hub_id))
}

/// A branch, a tag or a commit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Revision(String);

impl Revision {
    /// Reads a revision.
    ///
    /// # Errors
    /// The text is empty, longer than 255 bytes, or holds what git allows in no name: blanks, control characters, `..`.
    pub fn parse(text: &str) -> Result<Revision> {
        let is_odd = |c: char| c.is_whitespace() || c.is_control();
        let is_name = (1..=255).contains(&text.len()) && !text.contains(is_odd);
        match is_name && !text.contains("..") && text != "." {
            true => Ok(Revision(text.to_owned())),
            false => Err(Error::Revision {
                said: Said::new(text),
            }),
        }
    }

    /// As the user wrote it.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// The name of a file in a folder, on every system: letters, digits and `-_.+ ()[]=,@`; no folder, no device of Windows, no blank or full stop
/// at the end, no name by which Windows shortens others (`~`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct FileName(String);

impl FileName {
    /// Systems take 255 bytes; what is written beside a file has an ending more.
    const MAX_BYTES: usize = 240;

    /// Reads a name.
    ///
    /// # Errors
    /// The text is not such a name.
    pub fn parse(text: &str) -> Result<FileName> {
        let is_safe = |c: char| c.is_alphanumeric() || "-_.+ ()[]=,@".contains(c);
        let is_plain = (1..=Self::MAX_BYTES).contains(&text.len())
            && text.chars().all(is_safe)
            && !text.starts_with(' ')
            && !text.ends_with([' ', '.'])
            && !is_device(text);
        match is_plain {
            true => Ok(FileName(text.to_owned())),
            false => Err(Error::FileName {
                said: Said::new(text),
            }),
        }
    }

    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The same for names that some systems take for one.
    pub(crate) fn folded(&self) -> String {
        self.0.to_lowercase()
    }
}

/// Whether Windows takes a name for a device, whatever its ending.
fn is_device(name: &str) -> bool {
    let stem = name.split('.').next().unwrap_or(name).trim_end();
    let stem = stem.to_ascii_uppercase();
    let is_port = |number: &str| matches!(number, "¹" | "²" | "³") || is_digit(number);
    match stem.as_str() {
        "CON" | "PRN" | "AUX" | "NUL" => true,
        _ => ["COM", "LPT"]
            .iter()
            .any(|port| stem.strip_prefix(port).is_some_and(is_port)),
    }
}

fn is_digit(text: &str) -> bool {
    text.len() == 1 && text.bytes().all(|byte| byte.is_ascii_digit())
}

/// A part of an address's path: everything but letters, digits and `-_.~` as `%XX` (RFC 3986).
pub(crate) fn percent_encoded(text: &str) -> String {
    let mut encoded = String::new();
    for byte in text.bytes() {
        match byte.is_ascii_alphanumeric() || b"-_.~".contains(&byte) {
            true => encoded.push(char::from(byte)),
            false => encoded.push_str(&format!("%{byte:02X}")),
        }
    }
    encoded
}

/// A checked text: shown as it is, and read from a record with the same check.
macro_rules! checked_text {
    ($($type:ident),*) => { $(
        impl Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl TryFrom<String> for $type {
            type Error = Error;

            fn try_from(text: String) -> Result<Self> {
                Self::parse(&text)
            }
        }

        impl From<$type> for String {
            fn from(checked: $type) -> String {
                checked.0
            }
        }
    )* };
}
checked_text!(HubId, Revision, FileName);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_on_a_disk_are_no_hub_ids() {
        for id in ["Qwen/Qwen3.5-4B-Base", "a/b", "0x1/m_2.5"] {
            assert!(is_hub_id(id), "{id}");
        }
        for place in [
            "fetch",
            "../model",
            "./model",
            "/model",
            "model/",
            "../runs/cpt/model",
            "runs/cpt/model",
            "C:\\model",
            "~/model",
            "my model/x",
            "",
        ] {
            assert!(!is_hub_id(place), "{place}");
        }
    }

    #[test]
    fn names_of_models_files_are_plain() {
        for name in [
            "config.json",
            "model-00001-of-00004.safetensors",
            "LICENSE",
            ".gitattributes",
            "chat template (old).jinja",
            "说明.txt",
            "console.json",
            "com.json",
            "COM10.json",
            "a..b",
        ] {
            assert_eq!(FileName::parse(name).unwrap().as_str(), name);
        }
    }

    #[test]
    fn names_that_lead_elsewhere_are_refused() {
        let long = "a".repeat(241);
        for name in [
            "",
            ".",
            "..",
            "...",
            "../x.json",
            "a/x.json",
            "/x.json",
            "a\\x.json",
            "..\\x.json",
            "C:x.json",
            "x.json:stream",
            "a\0.json",
            "a\n.json",
            "a\u{1b}[2J.json",
            "a\u{202e}nosj.x",
            "a.json.",
            "a.json ",
            " a.json",
            "MODEL~1.SAF",
            "*.json",
            "con",
            "CON.json",
            "Nul .json",
            "aux.tar.json",
            "COM1.json",
            "lpt9",
            "com¹.json",
            &long,
        ] {
            assert!(FileName::parse(name).is_err(), "{name:?}");
        }
    }

    #[test]
    fn revision_is_a_name_of_git() {
        for revision in ["main", "refs/pr/1", "v1.0", "größe"] {
            assert!(Revision::parse(revision).is_ok(), "{revision}");
        }
        for revision in ["", ".", "..", "a/../../b", "a b", "a\n"] {
            assert!(Revision::parse(revision).is_err(), "{revision}");
        }
    }

    #[test]
    fn what_has_a_meaning_in_an_address_is_encoded() {
        assert_eq!(percent_encoded("refs/pr/1"), "refs%2Fpr%2F1");
        assert_eq!(percent_encoded("a b?#%é"), "a%20b%3F%23%25%C3%A9");
    }
}
