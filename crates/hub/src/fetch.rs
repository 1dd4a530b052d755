//! One repository into one folder. Files gather in `<out>.part`; the folder gets its name only when all of them are there and right.

use std::path::{Path, PathBuf};

use hf_hub::api::Progress;
use hf_hub::api::sync::{ApiBuilder, ApiError, ApiRepo};
use hf_hub::{Repo, RepoType};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha1::Digest;

use crate::error::{Answer, During, Error, Result};
use crate::id::is_hub_id;

/// Who is asked.
#[derive(Debug, Clone, Copy)]
pub struct Host<'a> {
    /// Address of the Hub or a mirror.
    pub endpoint: &'a str,
    /// For models that not everybody may have.
    pub token: Option<&'a str>,
}

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
    /// Of the bytes.
    Sha256(String),
    /// SHA-1 of `blob`, the length and the bytes.
    GitBlob(String),
}

impl Fetched {
    /// Bytes of all files.
    pub fn bytes(&self) -> u64 {
        self.files.iter().map(|file| file.bytes).sum()
    }
}

/// What an earlier fetch of `hub_id` at `revision` left in `folder`, if all its files are still there with their sizes.
pub fn fetched(hub_id: &str, revision: &str, folder: &Path) -> Option<Fetched> {
    let bytes = std::fs::read(folder.join("fetch.json")).ok()?;
    let fetched: Fetched = serde_json::from_slice(&bytes).ok()?;
    let is_meant = fetched.hub_id == hub_id && (revision == "main" || revision == fetched.commit);
    let is_whole = fetched.files.iter().all(|file| {
        std::fs::metadata(folder.join(&file.name)).is_ok_and(|meta| meta.len() == file.bytes)
    });
    (is_meant && is_whole).then_some(fetched)
}

/// Gets `hub_id` at `revision` into `out`, which must not be there; `progress` is told the file that is on its way, and the bytes that are
/// there of how many.
///
/// # Errors
/// An unreachable host, a repository or revision that does not exist, a file whose hash differs (it is removed), a full disk;
/// [`Error::is_misuse`] says which are of the arguments.
pub fn fetch(
    host: Host<'_>,
    hub_id: &str,
    revision: &str,
    out: &Path,
    progress: &mut dyn FnMut(&str, u64, u64),
) -> Result<Fetched> {
    if !is_hub_id(hub_id) {
        return Err(Error::NoHubId {
            text: hub_id.to_owned(),
        });
    }
    if out.exists() {
        return Err(Error::Exists {
            path: out.to_owned(),
            hub_id: hub_id.to_owned(),
            revision: revision.to_owned(),
        });
    }
    let mut part_name = out.file_name().unwrap_or_default().to_owned();
    part_name.push(".part");
    let part = out.with_file_name(part_name);
    std::fs::create_dir_all(&part).during("making", &part)?;

    // 1. what the revision means, and what is in it
    let builder = ApiBuilder::new()
        .with_endpoint(host.endpoint.trim_end_matches('/').to_owned())
        .with_cache_dir(part.join(".hub"))
        .with_token(host.token.map(str::to_owned))
        .with_user_agent("cyrene", env!("CARGO_PKG_VERSION"))
        .with_retries(3)
        .with_progress(false);
    let api = builder.build().map_err(Error::Client)?;
    let repo = |revision: &str| {
        api.repo(Repo::with_revision(
            hub_id.to_owned(),
            RepoType::Model,
            revision.to_owned(),
        ))
    };
    let (commit, files) = list(&repo(revision)).map_err(|source| Error::Ask {
        endpoint: host.endpoint.to_owned(),
        hub_id: hub_id.to_owned(),
        revision: revision.to_owned(),
        source,
    })?;

    // 2. each file: get, check, move into place
    let repo = repo(&commit);
    let total: u64 = files.iter().map(|file| file.bytes).sum();
    let mut before = 0;
    for file in &files {
        if !part.join(&file.name).exists() {
            let gauge = Gauge {
                got: 0,
                told: &mut |got| progress(&file.name, before + got, total),
            };
            download(&repo, file, &part, gauge)?;
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
        std::fs::remove_dir_all(&cache).during("removing", &cache)?;
    }
    let record = serde_json::to_vec_pretty(&fetched).map_err(Error::Record)?;
    files::write(&part.join("fetch.json"), &record)?;
    files::move_folder(&part, out)?;
    Ok(fetched)
}

/// Commit and wanted files of a revision.
fn list(repo: &ApiRepo) -> std::result::Result<(String, Vec<File>), Answer> {
    let lacks = |lacks| Answer::Lacks { lacks };
    let mut response = repo
        .info_request()
        .query("blobs", "true")
        .call()
        .map_err(|error| ApiError::from(Box::new(error)))?;
    let info: Value = response
        .body_mut()
        .read_json()
        .map_err(|error| ApiError::from(Box::new(error)))?;
    let commit = info["sha"].as_str().ok_or(lacks("names no commit"))?;
    let siblings = info["siblings"].as_array().ok_or(lacks("lists no files"))?;
    let mut files = Vec::new();
    for sibling in siblings {
        let name = sibling["rfilename"].as_str();
        let name = name.ok_or(lacks("lists a file without a name"))?.to_owned();
        if !wanted(&name) {
            continue;
        }
        let hash = match (
            sibling["lfs"]["sha256"].as_str(),
            sibling["blobId"].as_str(),
        ) {
            (Some(sha256), _) => Hash::Sha256(sha256.to_owned()),
            (None, Some(id)) => Hash::GitBlob(id.to_owned()),
            (None, None) => return Err(Answer::NoHash { name }),
        };
        let Some(bytes) = sibling["size"].as_u64() else {
            return Err(Answer::NoSize { name });
        };
        files.push(File { name, bytes, hash });
    }
    if !files.iter().any(|file| file.name.ends_with(".safetensors")) {
        return Err(Answer::NoWeights);
    }
    Ok((commit.to_owned(), files))
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

/// Gets a file into the folder `part`, and sees that it is the one that was promised.
fn download(repo: &ApiRepo, file: &File, part: &Path, gauge: Gauge<'_>) -> Result<()> {
    let got = repo.download_with_progress(&file.name, gauge);
    let got = got.map_err(|source| Error::Download {
        name: file.name.clone(),
        part: part.to_owned(),
        source,
    })?;
    let got: PathBuf = got.canonicalize().during("finding", &got)?;
    if !matches(&got, file)? {
        let cache = part.join(".hub");
        std::fs::remove_dir_all(&cache).during("removing the damaged", &got)?;
        return Err(Error::Damaged {
            name: file.name.clone(),
        });
    }
    std::fs::rename(&got, part.join(&file.name)).during("moving into place", &got)
}

/// Whether the bytes at `path` have the size and hash that the repository states.
fn matches(path: &Path, file: &File) -> Result<bool> {
    let meta = std::fs::metadata(path).during("reading", path)?;
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

/// Adds up what comes of one file.
struct Gauge<'a> {
    got: u64,
    told: &'a mut dyn FnMut(u64),
}

impl Progress for Gauge<'_> {
    fn init(&mut self, _size: usize, _filename: &str) {
        self.got = 0;
    }

    fn update(&mut self, size: usize) {
        self.got += size as u64;
        (self.told)(self.got);
    }

    fn finish(&mut self) {}
}
