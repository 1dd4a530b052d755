//! Names of repositories on the Hub.

use std::path::{Path, PathBuf};

/// Whether a text has the form of a Hub id: `owner/name` of letters, digits, `-`, `_` and `.`, each beginning with a letter or digit.
/// `../model` and `C:\\model` are places on a disk.
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

/// `models/<name>` for `owner/name`.
pub fn default_folder(hub_id: &str) -> PathBuf {
    Path::new("models").join(hub_id.rsplit('/').next().unwrap_or(hub_id))
}

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
}
