//! The text chunks of a PNG picture, in which cards travel, and base64.

/// What every PNG begins with.
pub(crate) const MAGIC: &[u8] = b"\x89PNG\r\n\x1a\n";

/// The text of the first `tEXt` chunk with one of these keywords, by their order.
///
/// # Errors
/// A sentence that says what is wrong with the picture.
pub(crate) fn text(bytes: &[u8], keywords: &[&str]) -> Result<Option<Vec<u8>>, String> {
    let mut found: Option<(usize, &[u8])> = None;
    let mut rest = bytes
        .strip_prefix(MAGIC)
        .ok_or("it does not begin like a PNG")?;
    while let Some((head, behind)) = rest.split_at_checked(8) {
        let length = u32::from_be_bytes([head[0], head[1], head[2], head[3]]) as usize;
        let kind = &head[4..8];
        if kind == b"IEND" {
            break;
        }
        // Data and its checksum.
        let Some((data, behind)) = behind
            .split_at_checked(length)
            .filter(|(_, behind)| behind.len() >= 4)
        else {
            return Err("the picture breaks off inside a chunk".to_owned());
        };
        if kind == b"tEXt"
            && let Some(zero) = data.iter().position(|b| *b == 0)
            && let Some(rank) = keywords
                .iter()
                .position(|keyword| keyword.as_bytes() == &data[..zero])
            && found.is_none_or(|(best, _)| rank < best)
        {
            found = Some((rank, &data[zero + 1..]));
        }
        rest = &behind[4..];
    }
    Ok(found.map(|(_, text)| text.to_vec()))
}

/// Bytes of a base64 text (RFC 4648, also its form for addresses); white space is passed over.
pub(crate) fn base64(text: &[u8]) -> Option<Vec<u8>> {
    let mut bytes = Vec::with_capacity(text.len() / 4 * 3);
    let (mut buffer, mut n_bits) = (0u32, 0);
    let mut n_padding = 0;
    for c in text {
        let value = match c {
            b'A'..=b'Z' => c - b'A',
            b'a'..=b'z' => c - b'a' + 26,
            b'0'..=b'9' => c - b'0' + 52,
            b'+' | b'-' => 62,
            b'/' | b'_' => 63,
            b'=' => {
                n_padding += 1;
                continue;
            }
            b' ' | b'\t' | b'\r' | b'\n' => continue,
            _ => return None,
        };
        if n_padding > 0 {
            return None;
        }
        buffer = buffer << 6 | u32::from(value);
        n_bits += 6;
        if n_bits >= 8 {
            n_bits -= 8;
            bytes.push((buffer >> n_bits) as u8);
            buffer &= (1 << n_bits) - 1;
        }
    }
    (n_bits < 6 && n_padding <= 2).then_some(bytes)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A PNG of no picture, with these text chunks.
    pub(crate) fn png(texts: &[(&str, &str)]) -> Vec<u8> {
        let mut bytes = MAGIC.to_vec();
        let mut chunk = |kind: &[u8], data: &[u8]| {
            bytes.extend((data.len() as u32).to_be_bytes());
            bytes.extend(kind);
            bytes.extend(data);
            bytes.extend([0; 4]);
        };
        chunk(b"IHDR", &[0; 13]);
        for (keyword, text) in texts {
            chunk(
                b"tEXt",
                &[keyword.as_bytes(), b"\0", text.as_bytes()].concat(),
            );
        }
        chunk(b"IEND", b"");
        bytes
    }

    /// Base64 as a card's maker writes it.
    pub(crate) fn to_base64(bytes: &[u8]) -> String {
        const ALPHABET: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
        let mut text = String::new();
        for chunk in bytes.chunks(3) {
            let all = chunk.iter().fold(0u32, |all, b| all << 8 | u32::from(*b))
                << (8 * (3 - chunk.len()));
            for at in 0..4 {
                let c = ALPHABET[(all >> (18 - 6 * at) & 63) as usize];
                text.push(if at <= chunk.len() { c.into() } else { '=' });
            }
        }
        text
    }

    #[test]
    fn base64_follows_the_vectors_of_rfc_4648() {
        for (bytes, text) in [
            ("", ""),
            ("f", "Zg=="),
            ("fo", "Zm8="),
            ("foo", "Zm9v"),
            ("foob", "Zm9vYg=="),
            ("fooba", "Zm9vYmE="),
            ("foobar", "Zm9vYmFy"),
        ] {
            assert_eq!(base64(text.as_bytes()).unwrap(), bytes.as_bytes());
            assert_eq!(to_base64(bytes.as_bytes()), text);
        }
        assert_eq!(base64(b"_-8").unwrap(), [0xff, 0xef]);
        for damaged in ["Z", "Zg=a", "Zg===", "Zm9v!", "Zm9vY"] {
            assert_eq!(base64(damaged.as_bytes()), None, "{damaged}");
        }
    }

    #[test]
    fn the_better_keyword_wins_whatever_the_order() {
        let picture = png(&[
            ("Title", "t"),
            ("chara", "two"),
            ("ccv3", "three"),
            ("chara", "again"),
        ]);
        assert_eq!(
            text(&picture, &["ccv3", "chara"]).unwrap().unwrap(),
            b"three"
        );
        assert_eq!(text(&picture, &["chara"]).unwrap().unwrap(), b"two");
        assert_eq!(text(&picture, &["none"]).unwrap(), None);
    }

    #[test]
    fn pictures_that_break_off_are_refused() {
        let mut picture = png(&[("chara", "two")]);
        picture.truncate(picture.len() - 14);
        assert_eq!(
            text(&picture, &["chara"]).unwrap_err(),
            "the picture breaks off inside a chunk"
        );
        let huge = [MAGIC, &[0xff; 12]].concat();
        assert!(text(&huge, &["chara"]).is_err());
        assert!(text(b"GIF", &["chara"]).is_err());
    }
}
