//! `cyrene fetch`: a base model from the Hub or a mirror of it, resumable, every file checked by its hash, at a pinned commit.
//!
//! Files gather in `<out>.part`; the folder gets its name only when all of them are there and right.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use hf_hub::api::Progress;
use hf_hub::api::sync::{ApiBuilder, ApiRepo};
use hf_hub::{Repo, RepoType};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha1::Digest;

use crate::cli::Fetch;
use crate::ui::{Ui, size};
use crate::{env, misuse};

/// What a finished folder says of its origin, as `fetch.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Fetched {
    /// `owner/name`.
    pub hub_id: String,
    /// The commit that the revision meant.
    pub commit: String,
    /// What was fetched.
    pub files: Vec<File>,
}

/// One file of the repository.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct File {
    /// Its name, without a folder.
    pub name: String,
    /// Its size.
    pub bytes: u64,
    /// What it was held against.
    pub hash: Hash,
}

/// Large files are known by their SHA-256, small ones by git's blob id.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Hash {
    Sha256(String),
    GitBlob(String),
}

/// Runs the command; the error is a [`crate::ui::Misuse`] where the arguments are at fault.
pub fn run(args: &Fetch, ui: &Ui) -> Result<()> {
    let out = args
        .out
        .clone()
        .unwrap_or_else(|| default_folder(&args.hub_id));
    let fetched = fetch(&args.hub_id, &args.revision, &out, ui)?;
    let bytes: u64 = fetched.files.iter().map(|file| file.bytes).sum();
    ui.result(
        &serde_json::json!({ "folder": out, "fetched": fetched }),
        || {
            format!(
                "{} at {}: {} files, {} in {}",
                fetched.hub_id,
                fetched.commit,
                fetched.files.len(),
                size(bytes),
                out.display()
            )
        },
    )
}

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

/// Gets `hub_id` at `revision` into `out`, or finds it there already.
///
/// # Errors
/// An unreachable host, a repository or revision that does not exist, a file whose hash differs (it is removed), a full disk.
pub fn fetch(hub_id: &str, revision: &str, out: &Path, ui: &Ui) -> Result<Fetched> {
    if !is_hub_id(hub_id) {
        misuse!("`{hub_id}` is no Hub id; expected owner/name, e.g. Qwen/Qwen3.5-4B-Base");
    }
    let present = read_fetched(out);
    if let Some(present) = present.filter(|present| {
        present.hub_id == hub_id && (revision == "main" || revision == present.commit)
    }) {
        ui.note(format_args!(
            "{} is already in {} (commit {})",
            hub_id,
            out.display(),
            present.commit
        ));
        return Ok(present);
    }
    if out.exists() {
        misuse!(
            "{} exists and is not a fetched {hub_id} at {revision}; move it away or choose another --out",
            out.display()
        );
    }
    let mut part_name = out.file_name().unwrap_or_default().to_owned();
    part_name.push(".part");
    let part = out.with_file_name(part_name);
    std::fs::create_dir_all(&part).with_context(|| format!("making {}", part.display()))?;

    // 1. what the revision means, and what is in it
    let endpoint =
        env::get(env::HF_ENDPOINT).unwrap_or_else(|| "https://huggingface.co".to_owned());
    let builder = ApiBuilder::new()
        .with_endpoint(endpoint.trim_end_matches('/').to_owned())
        .with_cache_dir(part.join(".hub"))
        .with_token(env::get(env::HF_TOKEN))
        .with_user_agent("cyrene", env!("CARGO_PKG_VERSION"))
        .with_retries(3)
        .with_progress(false);
    let api = builder.build().context("setting up the Hub client")?;
    let repo = |revision: &str| {
        api.repo(Repo::with_revision(
            hub_id.to_owned(),
            RepoType::Model,
            revision.to_owned(),
        ))
    };
    let (commit, files) = list(&repo(revision)).with_context(|| {
        format!("asking {endpoint} for {hub_id} at {revision}; check the name, the network, or set {} to a mirror ({} for a gated model)", env::HF_ENDPOINT, env::HF_TOKEN)
    })?;

    // 2. each file: get, check, move into place
    let repo = repo(&commit);
    let total: u64 = files.iter().map(|file| file.bytes).sum();
    let mut before = 0;
    for file in &files {
        let place = part.join(&file.name);
        if !place.exists() {
            download(
                &repo,
                file,
                &place,
                &part,
                Gauge {
                    bar: ui.bar("fetch", total),
                    before,
                    name: file.name.clone(),
                    got: 0,
                },
            )?;
        }
        before += file.bytes;
    }

    // 3. the folder gets its name
    let fetched = Fetched {
        hub_id: hub_id.to_owned(),
        commit,
        files,
    };
    let cache = part.join(".hub");
    if cache.exists() {
        std::fs::remove_dir_all(&cache).with_context(|| format!("removing {}", cache.display()))?;
    }
    files::write(
        &part.join("fetch.json"),
        &serde_json::to_vec_pretty(&fetched)?,
    )?;
    files::move_folder(&part, out)?;
    Ok(fetched)
}

/// What an earlier fetch left in `folder`, if all its files are still there with their sizes.
fn read_fetched(folder: &Path) -> Option<Fetched> {
    let fetched: Fetched =
        serde_json::from_slice(&std::fs::read(folder.join("fetch.json")).ok()?).ok()?;
    let whole = fetched.files.iter().all(|file| {
        std::fs::metadata(folder.join(&file.name)).is_ok_and(|meta| meta.len() == file.bytes)
    });
    whole.then_some(fetched)
}

/// Commit and wanted files of a revision.
fn list(repo: &ApiRepo) -> Result<(String, Vec<File>)> {
    let mut response = repo.info_request().query("blobs", "true").call()?;
    let info: Value = response.body_mut().read_json()?;
    let commit = info["sha"]
        .as_str()
        .context("the answer names no commit")?
        .to_owned();
    let siblings = info["siblings"]
        .as_array()
        .context("the answer lists no files")?;
    let mut files = Vec::new();
    for sibling in siblings {
        let name = sibling["rfilename"]
            .as_str()
            .context("a file without a name")?
            .to_owned();
        if !wanted(&name) {
            continue;
        }
        let hash = match (
            sibling["lfs"]["sha256"].as_str(),
            sibling["blobId"].as_str(),
        ) {
            (Some(sha256), _) => Hash::Sha256(sha256.to_owned()),
            (None, Some(id)) => Hash::GitBlob(id.to_owned()),
            (None, None) => bail!(
                "the answer gives no hash for {name}; this mirror cannot be trusted with weights"
            ),
        };
        let bytes = sibling["size"]
            .as_u64()
            .with_context(|| format!("the answer gives no size for {name}"))?;
        files.push(File { name, bytes, hash });
    }
    if !files.iter().any(|file| file.name.ends_with(".safetensors")) {
        bail!("the repository holds no .safetensors file");
    }
    Ok((commit, files))
}

/// Weights, configurations, tokenizers, templates, licences; not pictures, other frameworks' weights or anything in folders.
fn wanted(name: &str) -> bool {
    let extension = name.rsplit('.').next().unwrap_or("");
    !name.contains(['/', '\\'])
        && (matches!(
            extension,
            "safetensors" | "json" | "jinja" | "txt" | "model"
        ) || name.starts_with("LICENSE"))
}

fn download(repo: &ApiRepo, file: &File, place: &Path, part: &Path, gauge: Gauge) -> Result<()> {
    let got = repo
        .download_with_progress(&file.name, gauge)
        .with_context(|| {
            format!(
                "getting {}; run the same command again to go on from {}",
                file.name,
                part.display()
            )
        })?;
    let got = got
        .canonicalize()
        .with_context(|| format!("finding {}", got.display()))?;
    if !matches(&got, file)? {
        std::fs::remove_dir_all(part.join(".hub"))
            .with_context(|| format!("removing the damaged {}", got.display()))?;
        bail!(
            "{} differs from its published hash and was removed; run the same command again",
            file.name
        );
    }
    std::fs::rename(&got, place).with_context(|| format!("moving {} into place", file.name))
}

/// Whether the bytes at `path` have the size and hash that the repository states.
fn matches(path: &Path, file: &File) -> Result<bool> {
    let meta = std::fs::metadata(path).with_context(|| format!("reading {}", path.display()))?;
    if meta.len() != file.bytes {
        return Ok(false);
    }
    Ok(match &file.hash {
        Hash::Sha256(expected) => files::sha256_of(path)? == *expected,
        Hash::GitBlob(expected) => {
            let header = format!("blob {}\0", file.bytes);
            files::digest_file(sha1::Sha1::new_with_prefix(header), path)? == *expected
        }
    })
}

/// Feeds the download's progress into one bar over all files.
struct Gauge {
    bar: crate::ui::Bar,
    before: u64,
    name: String,
    got: u64,
}

impl Progress for Gauge {
    fn init(&mut self, _size: usize, _filename: &str) {
        self.got = 0;
    }

    fn update(&mut self, size: usize) {
        self.got += size as u64;
        let name = self.name.clone();
        self.bar.set(self.before + self.got, &name);
    }

    fn finish(&mut self) {}
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
