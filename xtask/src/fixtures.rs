//! The small part of the reference pack that tests need in a fresh clone, copied from `../shared/reference`.

use std::path::Path;

use anyhow::{Context, Result, bail};

/// (file or folder in the pack, place in the repository)
const COPIES: &[(&str, &str)] = &[];

pub fn run(root: &Path) -> Result<()> {
    let pack = root.join("../shared/reference");
    if !pack.is_dir() {
        bail!("no reference pack at {}", pack.display());
    }
    for (from, to) in COPIES {
        let target = root.join(to);
        if let Some(parent) = target.parent() {
            std::fs::create_dir_all(parent)?;
        }
        std::fs::copy(pack.join(from), &target)
            .with_context(|| format!("copying {from} to {to}"))?;
        println!("{to}");
    }
    Ok(())
}
