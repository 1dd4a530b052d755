//! SHA-256 of bytes and files, and hex.

use std::io::Read;
use std::path::Path;

use sha2::{Digest, Sha256};

use crate::error::{During, Result};
use crate::outside;

/// Lower-case hex digits, two a byte.
pub fn hex(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let digits = bytes.iter().flat_map(|byte| [byte >> 4, byte & 15]);
    digits
        .map(|digit| char::from(DIGITS[usize::from(digit)]))
        .collect()
}

/// SHA-256 of bytes, in hex.
pub fn sha256(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

/// SHA-256 of a file's bytes, in hex.
///
/// # Errors
/// Names the file that cannot be read.
pub fn sha256_of(path: &Path) -> Result<String> {
    digest_file(Sha256::new(), path)
}

/// Any hash of a file's bytes, after what `hash` was given before; in hex.
///
/// # Errors
/// Names the file that cannot be read.
pub fn digest_file<D: Digest>(mut hash: D, path: &Path) -> Result<String> {
    let mut file = outside::open(path).during("read", path)?;
    let mut buffer = vec![0; 1 << 20];
    loop {
        let n = file.read(&mut buffer).during("read", path)?;
        if n == 0 {
            return Ok(hex(&hash.finalize()));
        }
        hash.update(&buffer[..n]);
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    /// SHA-256 of "abc", FIPS 180-4.
    const ABC: &str = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";

    #[test]
    fn sha256_of_bytes_and_of_a_file_is_the_published_one() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("abc");
        fs::write(&path, "abc").unwrap();
        assert_eq!(sha256(b"abc"), ABC);
        assert_eq!(sha256_of(&path).unwrap(), ABC);
        assert_eq!(digest_file(Sha256::new(), &path).unwrap(), ABC);
    }

    #[test]
    fn digest_goes_on_from_what_was_hashed_before() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("c");
        fs::write(&path, "c").unwrap();
        let hash = Sha256::new().chain_update("ab");
        assert_eq!(digest_file(hash, &path).unwrap(), ABC);
    }

    #[test]
    fn what_cannot_be_read_is_named() {
        let error = sha256_of(Path::new("no/such/file")).unwrap_err();
        assert!(error.to_string().contains("cannot read no/such/file"));
    }
}
