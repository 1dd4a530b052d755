//! The way from one place to another, as files write it that name others.

use std::borrow::Cow;
use std::fs;
use std::path::{Path, PathBuf};

use crate::error::{During, Result};

/// The way from the folder `from` to `place`, with `/` between names, so that both can move together; the whole path where they have nothing
/// in common, as on two drives. The empty path is the working folder.
///
/// # Errors
/// One of them is not there.
pub fn relative(place: &Path, from: &Path) -> Result<String> {
    let whole = |path: &Path| -> Result<PathBuf> { fs::canonicalize(path).during("find", path) };
    let from = match from.as_os_str().is_empty() {
        true => Path::new("."),
        false => from,
    };
    let (place, from) = (whole(place)?, whole(from)?);
    let shared = place
        .components()
        .zip(from.components())
        .take_while(|(a, b)| a == b)
        .count();
    if shared == 0 {
        return Ok(place.display().to_string());
    }
    let up = from.components().skip(shared).map(|_| "..".into());
    let down = place.components().skip(shared);
    let down = down.map(|part| part.as_os_str().to_string_lossy());
    let way: Vec<Cow<'_, str>> = up.chain(down).collect();
    Ok(match way.is_empty() {
        true => ".".to_owned(),
        false => way.join("/"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn way_goes_up_to_what_is_shared_and_down_again() {
        let dir = tempfile::tempdir().unwrap();
        let [a, b] = ["x/a", "x/b/c"].map(|name| dir.path().join(name));
        fs::create_dir_all(&a).unwrap();
        fs::create_dir_all(&b).unwrap();
        assert_eq!(relative(&b, &a).unwrap(), "../b/c");
        assert_eq!(relative(&a, &b).unwrap(), "../../a");
        assert_eq!(relative(&a, &a).unwrap(), ".");
        assert_eq!(relative(&b, &dir.path().join("x")).unwrap(), "b/c");
        assert!(relative(&dir.path().join("none"), &a).is_err());
    }
}
