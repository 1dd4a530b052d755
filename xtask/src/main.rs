//! Chores of the repository: `cargo xtask tidy | kernels | size | fixtures`.

mod fixtures;
mod kernels;
mod size;
mod tidy;

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, bail};

fn main() -> ExitCode {
    let mut args = std::env::args().skip(1);
    let task = args.next().unwrap_or_default();
    match run(&task, &args.collect::<Vec<_>>()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask {task}: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(task: &str, args: &[String]) -> Result<()> {
    let root = root()?;
    match task {
        "tidy" => tidy::run(&root),
        "kernels" => kernels::run(args),
        "size" => size::run(&root),
        "fixtures" => fixtures::run(&root),
        _ => bail!("expected tidy, kernels, size or fixtures"),
    }
}

/// The folder of the workspace.
fn root() -> Result<PathBuf> {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
    Ok(manifest
        .parent()
        .context("xtask lies in the workspace")?
        .to_owned())
}

/// Paths of all tracked files, relative to the root.
fn tracked(root: &Path) -> Result<Vec<String>> {
    let output = Command::new("git")
        .args([
            "ls-files",
            "--cached",
            "--others",
            "--exclude-standard",
            "-z",
        ])
        .current_dir(root)
        .output()
        .context("running git ls-files")?;
    if !output.status.success() {
        bail!("git ls-files: {}", String::from_utf8_lossy(&output.stderr));
    }
    let text = String::from_utf8(output.stdout).context("a file name that is not UTF-8")?;
    Ok(text
        .split('\0')
        .filter(|path| !path.is_empty() && root.join(path).exists())
        .map(str::to_owned)
        .collect())
}
