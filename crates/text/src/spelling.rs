//! How byte-level BPE spells bytes as printable characters, so that a vocabulary can be a JSON file.

/// The character that spells a byte: printable Latin-1 as itself, the 68 others as U+0100 and on, in byte order (GPT-2's table).
pub(crate) fn char_of(byte: u8) -> char {
    match byte {
        b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff => byte as char,
        0..=0x20 => char_from(0x100 + u32::from(byte)),
        0x7f..=0xa0 => char_from(0x121 + u32::from(byte - 0x7f)),
        0xad => '\u{143}',
    }
}

fn char_from(code: u32) -> char {
    char::from_u32(code).unwrap_or(char::REPLACEMENT_CHARACTER)
}

fn byte_of(spelling: char) -> Option<u8> {
    let code = spelling as u32;
    match code {
        0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff => Some(code as u8),
        0x100..=0x120 => Some((code - 0x100) as u8),
        0x121..=0x142 => Some((code - 0x121) as u8 + 0x7f),
        0x143 => Some(0xad),
        _ => None,
    }
}

/// Bytes of a token; one with a character that spells no byte stands for itself (added tokens with spaces).
pub(crate) fn append_bytes(token: &str, out: &mut Vec<u8>) {
    let start = out.len();
    for spelling in token.chars() {
        match byte_of(spelling) {
            Some(byte) => out.push(byte),
            None => {
                out.truncate(start);
                out.extend_from_slice(token.as_bytes());
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn byte_spellings_are_one_to_one() {
        let bytes: Vec<Option<u8>> = (0..=255).map(|b| byte_of(char_of(b))).collect();
        assert_eq!(bytes, (0..=255).map(Some).collect::<Vec<_>>());
    }
}
