//! Files as the rules spell them, written beside their final names and moved there only when all is well.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use files::{NewFile, hex};
use sha2::{Digest, Sha256};
use text::Role;

use crate::error::Result;
use crate::task::Task;

/// Appends a JSON string: only `"`, `\` and what is below U+0020 is escaped.
pub(crate) fn push_json_string(out: &mut Vec<u8>, text: &str) {
    out.push(b'"');
    let mut rest = text.as_bytes();
    loop {
        let clean = clean_length(rest);
        out.extend_from_slice(&rest[..clean]);
        let Some(byte) = rest.get(clean) else { break };
        let escaped: &[u8] = match byte {
            b'"' => b"\\\"",
            b'\\' => b"\\\\",
            b'\n' => b"\\n",
            b'\r' => b"\\r",
            b'\t' => b"\\t",
            0x08 => b"\\b",
            0x0c => b"\\f",
            _ => b"",
        };
        if escaped.is_empty() {
            out.extend_from_slice(format!("\\u{byte:04x}").as_bytes());
        } else {
            out.extend_from_slice(escaped);
        }
        rest = &rest[clean + 1..];
    }
    out.push(b'"');
}

/// Bytes before the first one that must be escaped; eight at a time, for most texts have none.
fn clean_length(bytes: &[u8]) -> usize {
    const ONES: u64 = 0x0101_0101_0101_0101;
    const HIGHS: u64 = 0x8080_8080_8080_8080;
    let has_zero = |word: u64| word.wrapping_sub(ONES) & !word & HIGHS;
    let mut done = 0;
    for chunk in bytes.chunks_exact(8) {
        let mut word = [0; 8];
        word.copy_from_slice(chunk);
        let word = u64::from_le_bytes(word);
        let below_space = word.wrapping_sub(ONES * 0x20) & !word & HIGHS;
        let quote = has_zero(word ^ (ONES * u64::from(b'"')));
        let backslash = has_zero(word ^ (ONES * u64::from(b'\\')));
        if below_space | quote | backslash != 0 {
            break;
        }
        done += 8;
    }
    let tail = &bytes[done..];
    let is_escaped = |b: &u8| *b < 0x20 || *b == b'"' || *b == b'\\';
    done + tail.iter().position(is_escaped).unwrap_or(tail.len())
}

/// Appends one record and its line feed.
pub(crate) fn push_record<'m>(
    out: &mut Vec<u8>,
    messages: impl IntoIterator<Item = (Role, &'m str)>,
) {
    out.extend_from_slice(b"{\"messages\": [");
    for (idx, (role, content)) in messages.into_iter().enumerate() {
        if idx > 0 {
            out.extend_from_slice(b", ");
        }
        out.extend_from_slice(b"{\"role\": \"");
        out.extend_from_slice(role.name().as_bytes());
        out.extend_from_slice(b"\", \"content\": ");
        push_json_string(out, content);
        out.push(b'}');
    }
    out.extend_from_slice(b"]}\n");
}

/// The token counts of a data set: `{"chs": [1, 2], "cht": []}`, without a line feed at the end.
pub(crate) fn tokens_json<'a>(counts: impl IntoIterator<Item = (&'a str, &'a [u64])>) -> Vec<u8> {
    let mut out = vec![b'{'];
    for (idx, (key, tokens)) in counts.into_iter().enumerate() {
        if idx > 0 {
            out.extend_from_slice(b", ");
        }
        push_json_string(&mut out, key);
        out.extend_from_slice(b": [");
        for (idx, n) in tokens.iter().enumerate() {
            if idx > 0 {
                out.extend_from_slice(b", ");
            }
            out.extend_from_slice(n.to_string().as_bytes());
        }
        out.push(b']');
    }
    out.push(b'}');
    out
}

/// A file on its way: written as `<name>.tmp` beside its final name, hashed as it goes; removed if it never arrives.
pub(crate) struct Pending {
    path: PathBuf,
    file: NewFile,
    hash: Sha256,
    bytes: u64,
    spent: Duration,
}

/// Size and hash of a finished file.
#[derive(Debug, Clone)]
pub(crate) struct Written {
    pub sha256: String,
    pub bytes: u64,
}

impl Pending {
    pub fn create(path: PathBuf) -> Result<Pending> {
        Ok(Pending {
            file: NewFile::create(&path)?,
            path,
            hash: Sha256::new(),
            bytes: 0,
            spent: Duration::ZERO,
        })
    }

    pub fn write(&mut self, bytes: &[u8]) -> Result<()> {
        let start = Instant::now();
        self.hash.update(bytes);
        self.bytes += bytes.len() as u64;
        let written = self.file.write(bytes);
        self.spent += start.elapsed();
        Ok(written?)
    }

    /// Ends the file, which keeps its temporary name, and begins to bring it to the disk.
    pub fn finish(&mut self) -> Result<Written> {
        self.file.close()?;
        Ok(Written {
            sha256: hex(&self.hash.clone().finalize()),
            bytes: self.bytes,
        })
    }

    /// Waits until a finished file is on the disk; gives the time that writing took.
    pub fn settle(&mut self) -> Result<Duration> {
        self.file.settle()?;
        Ok(self.spent)
    }

    /// Gives a finished file its final name; gives the folder, which [`files::sync_folder`] makes remember it.
    pub fn publish(self) -> Result<Option<PathBuf>> {
        self.file.publish()?;
        Ok(self.path.parent().map(Path::to_owned))
    }
}

/// Takes away what a build that was killed left below an output folder: the temporary files of data sets and manifest.
pub(crate) fn remove_leftovers(out: &Path) {
    let mut folders = vec![out.to_owned(), out.join("pt"), out.join("sft")];
    folders.extend(Task::ALL.map(|task| out.join(task.name())));
    for folder in folders.iter().filter(|folder| folder.is_dir()) {
        // One that cannot be removed cannot be written again either, and that error names it.
        let _ = files::clear_leftovers(folder, |name| {
            name.ends_with(".jsonl") || name.ends_with(".json")
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn record_has_the_spacing_and_escapes_of_the_rules() {
        let mut out = Vec::new();
        push_record(
            &mut out,
            [
                (Role::System, "A\"\\/"),
                (Role::User, "\u{8}\t\n\u{c}\r\u{1}\u{1f}\u{7f}\u{2028}é"),
            ],
        );
        assert_eq!(
            String::from_utf8(out).unwrap(),
            "{\"messages\": [{\"role\": \"system\", \"content\": \"A\\\"\\\\/\"}, {\"role\": \"user\", \"content\": \
             \"\\b\\t\\n\\f\\r\\u0001\\u001f\u{7f}\u{2028}é\"}]}\n"
        );
    }

    #[test]
    fn escapes_are_found_at_every_place() {
        for byte in (0..0x80).chain([0xa0, 0xe9]) {
            for place in 0..20 {
                let text = format!("{}{}{}", "x".repeat(place), char::from(byte), "é".repeat(6));
                let mut out = Vec::new();
                push_json_string(&mut out, &text);
                let back: String = serde_json::from_slice(&out).unwrap();
                assert_eq!(back, text);
                assert!(out.iter().all(|b| *b >= 0x20));
            }
        }
    }

    #[test]
    fn tokens_file_has_no_line_feed() {
        let json = tokens_json([("chs", &[1, 2][..]), ("cht", &[][..])]);
        assert_eq!(json, b"{\"chs\": [1, 2], \"cht\": []}");
    }

    #[test]
    fn unpublished_file_leaves_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a/b.jsonl");
        let mut pending = Pending::create(path.clone()).unwrap();
        pending.write(b"x").unwrap();
        drop(pending);
        assert_eq!(
            std::fs::read_dir(path.parent().unwrap()).unwrap().count(),
            0
        );
    }

    #[test]
    fn published_file_is_whole() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("b.jsonl");
        let mut pending = Pending::create(path.clone()).unwrap();
        pending.write(b"abc").unwrap();
        let written = pending.finish().unwrap();
        pending.publish().unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"abc");
        assert_eq!(written.bytes, 3);
        assert_eq!(written.sha256, files::sha256(b"abc"));
    }
}
