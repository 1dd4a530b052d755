//! SHA-256 of bytes, files and folders, and hex.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::Path;

use sha2::{Digest, Sha256};

use crate::error::{During, Result};

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

/// SHA-256 of a file's bytes, or of a folder's files by name and bytes, in name order; in hex.
///
/// # Errors
/// Names the path that cannot be read.
pub fn sha256_of(path: &Path) -> Result<String> {
    let mut hash = Sha256::new();
    add(&mut hash, path)?;
    Ok(hex(&hash.finalize()))
}

/// Any hash of a file's bytes, after what `hash` was given before; in hex.
///
/// # Errors
/// Names the file that cannot be read.
pub fn digest_file<D: Digest>(mut hash: D, path: &Path) -> Result<String> {
    add_file(&mut hash, path)?;
    Ok(hex(&hash.finalize()))
}

fn add(hash: &mut Sha256, path: &Path) -> Result<()> {
    if !path.is_dir() {
        return add_file(hash, path);
    }
    let entries = fs::read_dir(path).during("read", path)?;
    let entries: io::Result<Vec<_>> = entries.map(|entry| Ok(entry?.path())).collect();
    let mut entries = entries.during("read", path)?;
    entries.sort();
    for entry in entries {
        hash.update(entry.file_name().unwrap_or_default().as_encoded_bytes());
        add(hash, &entry)?;
    }
    Ok(())
}

fn add_file<D: Digest>(hash: &mut D, path: &Path) -> Result<()> {
    let mut file = File::open(path).during("read", path)?;
    let mut buffer = vec![0; 1 << 20];
    loop {
        let n = file.read(&mut buffer).during("read", path)?;
        if n == 0 {
            return Ok(());
        }
        hash.update(&buffer[..n]);
    }
}

#[cfg(test)]
mod tests {
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
    fn hash_of_a_folder_sees_names_and_bytes() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("a"), "1").unwrap();
        let first = sha256_of(dir.path()).unwrap();
        fs::rename(dir.path().join("a"), dir.path().join("b")).unwrap();
        assert_ne!(first, sha256_of(dir.path()).unwrap());
    }

    #[test]
    fn what_cannot_be_read_is_named() {
        let error = sha256_of(Path::new("no/such/file")).unwrap_err();
        assert!(error.to_string().contains("cannot read no/such/file"));
    }
}
