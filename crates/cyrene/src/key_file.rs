//! A file of API keys: one a line, empty lines and comments (`# ...`) passed over.

use std::path::Path;

use anyhow::Result;

use crate::misuse;
use crate::ui::Ui;

/// The keys of a file; a note where other users of the machine can read them too.
///
/// # Errors
/// A [`crate::ui::Misuse`]: a file that cannot be read, holds no key, or one that no request can carry.
pub fn read(path: &Path, ui: &Ui) -> Result<Vec<String>> {
    let text = match std::fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::InvalidData => misuse!(
            "{} is no UTF-8 (PowerShell's `>` writes UTF-16); write it with `Set-Content -Encoding utf8`, one key a line",
            path.display()
        ),
        Err(error) => misuse!(
            "cannot read {}: {error}; expected one key a line",
            path.display()
        ),
    };
    let keys = parse(path, &text)?;
    if others_may_read(path) {
        ui.note(format_args!(
            "warning: other users of this machine can read the keys in {0}; `chmod o-r {0}` stops that",
            path.display()
        ));
    }
    Ok(keys)
}

fn parse(path: &Path, text: &str) -> Result<Vec<String>> {
    let mut keys = Vec::new();
    // Editors of Windows put a byte order mark in front.
    let lines = text.strip_prefix('\u{feff}').unwrap_or(text).lines();
    for (at, line) in lines.enumerate() {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        // What a header of a request can hold, without what would end or begin elsewhere.
        if !line.chars().all(|c| c.is_ascii_graphic()) {
            misuse!(
                "{}:{}: a key is letters, digits and signs of ASCII without blanks, and this line has others; a comment begins with # on a line of its own",
                path.display(),
                at + 1
            );
        }
        keys.push(line.to_owned());
    }
    if keys.is_empty() {
        misuse!("{} holds no key; expected one a line", path.display());
    }
    Ok(keys)
}

#[cfg(unix)]
fn others_may_read(path: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt;
    const READ_BY_OTHERS: u32 = 0o004;
    std::fs::metadata(path).is_ok_and(|data| data.permissions().mode() & READ_BY_OTHERS != 0)
}

/// Who may read a file on Windows is in its list of rights, which the standard library does not show.
#[cfg(not(unix))]
fn others_may_read(_path: &Path) -> bool {
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keys(text: &str) -> Result<Vec<String>, String> {
        parse(Path::new("keys.txt"), text).map_err(|error| error.to_string())
    }

    #[test]
    fn comments_and_empty_lines_are_no_keys() {
        let text = "\u{feff}# of the house\r\nsk-1\r\n\r\n  #sk-old\n\t sk-2#b  \n# end";
        assert_eq!(keys(text).unwrap(), ["sk-1", "sk-2#b"]);
    }

    #[test]
    fn file_without_a_key_is_refused() {
        for text in ["", "\n \n", "# none yet\n", "\u{feff}"] {
            let error = keys(text).unwrap_err();
            assert!(error.contains("keys.txt holds no key"), "{error}");
        }
    }

    #[test]
    fn key_that_no_request_can_carry_is_refused_by_its_line() {
        for line in ["sk 1", "schlüssel", "sk-1 # mine", "sk\u{0}1"] {
            let error = keys(&format!("sk-0\n{line}\n")).unwrap_err();
            assert!(error.contains("keys.txt:2"), "{error}");
            assert!(!error.contains(line), "a key is not shown: {error}");
        }
    }
}
