//! Names that a file from outside gives: of a file in the same folder, and of nothing else.

use std::fmt::{self, Display};
use std::path::{Path, PathBuf};

/// Characters of a refused name in a message.
const MOST_SHOWN: usize = 80;

/// The name of a file in a folder, on every system: letters, digits and `-_.+ ()[]=,@`; no folder, no device of Windows, no blank or full stop
/// at the end, no name by which Windows shortens others (`~`). There is no other way to one than the check.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FileName(String);

/// A text that is no [`FileName`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{shown}` is no plain file name: letters, digits and `-_.+ ()[]=,@` may stand in one, and no way to another folder"
)]
pub struct NoFileName {
    /// The text, harmless to show, and cut.
    shown: String,
}

impl FileName {
    /// Systems take 255 bytes; what is written beside a file has an ending more.
    const MAX_BYTES: usize = 240;

    /// Reads a name.
    ///
    /// # Errors
    /// The text is not such a name.
    pub fn parse(text: &str) -> Result<FileName, NoFileName> {
        let is_safe = |c: char| c.is_alphanumeric() || "-_.+ ()[]=,@".contains(c);
        let is_plain = (1..=Self::MAX_BYTES).contains(&text.len())
            && text.chars().all(is_safe)
            && !text.starts_with(' ')
            && !text.ends_with([' ', '.'])
            && !is_device(text);
        match is_plain {
            true => Ok(FileName(text.to_owned())),
            false => {
                let shown = text.escape_debug().take(MOST_SHOWN).collect();
                Err(NoFileName { shown })
            }
        }
    }

    /// A name that this program gives itself.
    ///
    /// # Panics
    /// It is none: a fault of the caller.
    pub fn of_ours(name: &'static str) -> FileName {
        match FileName::parse(name) {
            Ok(name) => name,
            Err(error) => panic!("{error}"),
        }
    }

    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Where the file lies whose folder is `folder`.
    pub fn within(&self, folder: &Path) -> PathBuf {
        folder.join(&self.0)
    }
}

impl Display for FileName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Whether Windows takes a name for a device, whatever its ending.
fn is_device(name: &str) -> bool {
    let stem = name.split('.').next().unwrap_or(name).trim_end();
    let stem = stem.to_ascii_uppercase();
    let is_number = |text: &str| {
        let is_digit = text.len() == 1 && text.bytes().all(|byte| byte.is_ascii_digit());
        is_digit || matches!(text, "¹" | "²" | "³")
    };
    match stem.as_str() {
        "CON" | "PRN" | "AUX" | "NUL" => true,
        _ => ["COM", "LPT"]
            .iter()
            .any(|port| stem.strip_prefix(port).is_some_and(is_number)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_files_in_a_folder_are_taken() {
        for name in [
            "config.json",
            "model-00001-of-00004.safetensors",
            ".gitattributes",
            "chat template (old).jinja",
            "说明.txt",
            "console.json",
            "COM10.json",
            "a..b",
        ] {
            let parsed = FileName::parse(name).unwrap();
            assert_eq!(parsed.as_str(), name);
            assert_eq!(parsed.within(Path::new("x")), Path::new("x").join(name));
        }
    }

    #[test]
    fn names_that_lead_elsewhere_are_refused_and_shown_harmless() {
        let long = "a".repeat(10_000);
        for name in [
            "",
            ".",
            "..",
            "../x",
            "a/x",
            "/x",
            "..\\x",
            "C:x",
            "x:stream",
            "a\0",
            "a\n",
            "a\u{1b}[2J",
            "a\u{202e}b",
            "a.",
            "a ",
            " a",
            "MODEL~1.SAF",
            "*",
            "con",
            "Nul .json",
            "aux.tar.json",
            "lpt9",
            "com¹.json",
            &long,
        ] {
            let error = FileName::parse(name).unwrap_err().to_string();
            assert!(!error.contains(char::is_control), "{name:?}");
            assert!(!error.contains('\u{202e}') && error.len() < 500, "{name:?}");
        }
    }
}
