//! Bytes of a file to text: UTF-8, or UTF-16 with its mark; other encodings are named with the command that turns them.

use std::path::Path;

use crate::error::{Error, Result};
use crate::language::Language;

/// Files of other programs that somebody may take for a text: first bytes, what it is, what to do.
const BINARY: [(&[u8], &str, &str); 8] = [
    (
        b"PK\x03\x04",
        "a zip archive (as .docx, .odt, .epub and .charx are)",
        "save it as plain text, or unpack it",
    ),
    (b"%PDF", "a PDF", "save its text as a .txt file"),
    (b"\x1f\x8b", "gzipped", "unpack it with gunzip"),
    (
        b"RENPY RPC",
        "a compiled Ren'Py script",
        "take the .rpy file beside it",
    ),
    (
        b"RPA-",
        "a Ren'Py archive",
        "unpack it and take its .rpy files",
    ),
    (
        b"\xd0\xcf\x11\xe0",
        "an old Office file",
        "save it as plain text or CSV",
    ),
    (
        b"\xff\xd8\xff",
        "a JPEG picture, which holds no card",
        "take the card as PNG or JSON",
    ),
    (
        b"RIFF",
        "a WebP picture or a sound",
        "take the card as PNG or JSON",
    ),
];

/// The text of a file, without its byte order mark and with `\n` behind each line.
///
/// # Errors
/// Bytes of another encoding or of another kind of file, by name and with the remedy.
pub(crate) fn text(path: &Path, bytes: &[u8], language: Language) -> Result<String> {
    let encoding = |found: &str, remedy: String| Error::Encoding {
        path: path.to_owned(),
        found: found.to_owned(),
        remedy,
    };
    for (magic, found, remedy) in BINARY {
        if bytes.starts_with(magic) {
            return Err(encoding(found, remedy.to_owned()));
        }
    }
    let iconv = |from: &str| {
        let name = path
            .file_name()
            .map_or_else(Default::default, |n| n.to_string_lossy());
        format!("turn it into UTF-8: `iconv -f {from} -t UTF-8 {name} > utf8-{name}`")
    };
    let text = match bytes {
        [0xff, 0xfe, 0, 0, ..] | [0, 0, 0xfe, 0xff, ..] => {
            return Err(encoding("UTF-32", iconv("UTF-32")));
        }
        [0xff, 0xfe, rest @ ..] => utf16(path, rest, u16::from_le_bytes)?,
        [0xfe, 0xff, rest @ ..] => utf16(path, rest, u16::from_be_bytes)?,
        [0xef, 0xbb, 0xbf, rest @ ..] => {
            utf8(path, rest, &iconv(usual(language)), usual(language))?
        }
        _ => {
            if let Some(name) = unmarked_utf16(bytes) {
                let found = format!("{name} without a byte order mark");
                return Err(encoding(&found, iconv(name)));
            }
            utf8(path, bytes, &iconv(usual(language)), usual(language))?
        }
    };
    if text.contains('\0') {
        let remedy = "give a text file".to_owned();
        return Err(encoding("no text (it holds zero bytes)", remedy));
    }
    Ok(if text.contains('\r') {
        text.replace("\r\n", "\n").replace('\r', "\n")
    } else {
        text
    })
}

fn utf8(path: &Path, bytes: &[u8], remedy: &str, usual: &str) -> Result<String> {
    std::str::from_utf8(bytes)
        .map(str::to_owned)
        .map_err(|error| {
            let line = bytes[..error.valid_up_to()]
                .iter()
                .filter(|b| **b == b'\n')
                .count()
                + 1;
            Error::Encoding {
                path: path.to_owned(),
                found: format!("not UTF-8 (line {line}); perhaps {usual}"),
                remedy: remedy.to_owned(),
            }
        })
}

fn utf16(path: &Path, bytes: &[u8], unit: fn([u8; 2]) -> u16) -> Result<String> {
    let units = bytes.chunks(2).map(|pair| match pair {
        [a, b] => unit([*a, *b]),
        // Half a unit at the end: half of a pair, which the decoder refuses.
        _ => 0xd800,
    });
    let mut text = String::with_capacity(bytes.len());
    for c in char::decode_utf16(units) {
        match c {
            Ok(c) => text.push(c),
            Err(_) => {
                let line = text.matches('\n').count() + 1;
                return Err(Error::Encoding {
                    path: path.to_owned(),
                    found: format!("damaged UTF-16 (line {line})"),
                    remedy: "save it as UTF-8".to_owned(),
                });
            }
        }
    }
    Ok(text)
}

/// UTF-16 of a text in a Latin script: every second byte is zero.
fn unmarked_utf16(bytes: &[u8]) -> Option<&'static str> {
    let head = &bytes[..bytes.len().min(4096) & !1];
    let zeros = |from: usize| {
        head.iter()
            .skip(from)
            .step_by(2)
            .filter(|b| **b == 0)
            .count()
    };
    let (even, odd) = (zeros(0), zeros(1));
    let most = head.len() / 4;
    if head.is_empty() || even.max(odd) <= most {
        None
    } else if odd > even {
        Some("UTF-16LE")
    } else {
        Some("UTF-16BE")
    }
}

/// What files in a language that are not UTF-8 mostly are.
fn usual(language: Language) -> &'static str {
    match language {
        Language::Chs => "GB18030",
        Language::Cht => "BIG5",
        Language::Jp => "CP932",
        Language::Kr => "CP949",
        Language::Ru => "CP1251",
        Language::Th => "CP874",
        Language::Vi => "CP1258",
        _ => "CP1252",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(bytes: &[u8]) -> Result<String> {
        text(Path::new("a/story.txt"), bytes, Language::Jp)
    }

    #[test]
    fn marks_go_and_lines_end_in_one_way() {
        assert_eq!(read(b"\xef\xbb\xbfa\r\nb\rc\n").unwrap(), "a\nb\nc\n");
        assert_eq!(read(b"\xff\xfea\0\n\0\x42\x30").unwrap(), "a\nあ");
        assert_eq!(read(b"\xfe\xff\0a\x30\x42").unwrap(), "aあ");
        assert_eq!(read(b"").unwrap(), "");
    }

    #[test]
    fn other_encodings_are_named_with_the_remedy() {
        let message = |bytes: &[u8]| read(bytes).unwrap_err().to_string();
        assert_eq!(
            message(b"a\n\x82\xa0"),
            "a/story.txt is not UTF-8 (line 2); perhaps CP932; turn it into UTF-8: `iconv -f CP932 -t UTF-8 story.txt > utf8-story.txt`"
        );
        assert!(message(b"\xff\xfe\0\0a\0\0\0").contains("UTF-32"));
        assert!(message(b"a\0b\0c\0").contains("UTF-16LE without a byte order mark"));
        assert!(message(b"\0a\0b\0c").contains("UTF-16BE without"));
        assert!(message(b"\xff\xfea\0\x42").contains("damaged UTF-16 (line 1)"));
        assert!(message(b"\xff\xfe\0\xd8a\0").contains("damaged UTF-16"));
        assert!(message(b"PK\x03\x04xyz").contains("zip archive"));
        assert!(message(b"RENPY RPC2").contains("take the .rpy file"));
        assert!(message(b"abc\0def, more").contains("zero bytes"));
    }
}
