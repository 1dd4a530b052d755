//! The Hub's answer to "what is in this repository": JSON of anybody, read into a [`Snapshot`].

use std::fmt;

use serde::Deserialize;
use serde::de::{Deserializer, Error as _, SeqAccess, Visitor};

use crate::error::{Error, Result};
use crate::hash::{Commit, GitBlobId, Hash, Sha256};
use crate::name::{FileName, HubId};
use crate::said::Said;
use crate::snapshot::{File, MAX_FILES, Snapshot};

/// Commit and files of a revision, as `GET /api/models/<id>/revision/<revision>?blobs=true` gives them.
#[derive(Deserialize)]
struct Answer {
    sha: String,
    siblings: Siblings,
}

#[derive(Deserialize)]
struct Sibling {
    rfilename: String,
    size: Option<u64>,
    #[serde(rename = "blobId")]
    blob_id: Option<String>,
    lfs: Option<LargeFile>,
}

#[derive(Deserialize)]
struct LargeFile {
    sha256: Option<String>,
}

/// A list that ends in an error before it fills the memory.
struct Siblings(Vec<Sibling>);

impl<'de> Deserialize<'de> for Siblings {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct Bounded;

        impl<'de> Visitor<'de> for Bounded {
            type Value = Siblings;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a list of files")
            }

            fn visit_seq<A: SeqAccess<'de>>(
                self,
                mut list: A,
            ) -> std::result::Result<Siblings, A::Error> {
                let mut siblings = Vec::new();
                while let Some(sibling) = list.next_element()? {
                    if siblings.len() == MAX_FILES {
                        return Err(A::Error::custom(Error::TooManyFiles));
                    }
                    siblings.push(sibling);
                }
                Ok(Siblings(siblings))
            }
        }

        deserializer.deserialize_seq(Bounded)
    }
}

/// Reads an answer: the files that are wanted, all of them checked.
///
/// # Errors
/// What is no such list, and each name, hash and size that cannot be.
pub(crate) fn read(hub_id: &HubId, json: &[u8]) -> Result<Snapshot> {
    let answer: Answer = serde_json::from_slice(json).map_err(|error| Error::NotAList {
        said: Said::new(error),
    })?;
    let commit = Commit::parse(&answer.sha)?;
    let wanted = answer.siblings.0.iter();
    let wanted = wanted.filter(|sibling| is_wanted(&sibling.rfilename));
    let files: Vec<File> = wanted.map(file).collect::<Result<_>>()?;
    let is_weights = |file: &File| file.name.as_str().ends_with(".safetensors");
    if !files.iter().any(is_weights) {
        return Err(Error::NoWeights);
    }
    Snapshot::new(hub_id.clone(), commit, files)
}

fn file(sibling: &Sibling) -> Result<File> {
    let name = FileName::parse(&sibling.rfilename)?;
    let missing = |what| Error::Missing {
        what,
        name: name.clone(),
    };
    let hash = match (&sibling.lfs, &sibling.blob_id) {
        // The blob of a large file is a pointer to it.
        (Some(LargeFile { sha256 }), _) => {
            let sha256 = sha256.as_ref().ok_or_else(|| missing("SHA-256"))?;
            Hash::Sha256(Sha256::parse(sha256)?)
        }
        (None, Some(id)) => Hash::GitBlob(GitBlobId::parse(id)?),
        (None, None) => return Err(missing("hash")),
    };
    let bytes = sibling.size.ok_or_else(|| missing("size"))?;
    Ok(File { name, bytes, hash })
}

/// Weights, configurations, tokenizers, templates, licences; not pictures, other frameworks' weights or anything in folders.
pub(crate) fn is_wanted(name: &str) -> bool {
    let extension = name.rsplit('.').next().unwrap_or("");
    let is_kind = matches!(
        extension,
        "safetensors" | "json" | "jinja" | "txt" | "model"
    );
    !name.contains('/') && (is_kind || name.starts_with("LICENSE"))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

    fn id() -> HubId {
        HubId::parse("someone/Tiny").unwrap()
    }

    fn weights() -> serde_json::Value {
        json!({ "rfilename": "model.safetensors", "size": 9, "blobId": COMMIT, "lfs": { "sha256": "a".repeat(64) } })
    }

    fn read_files(siblings: &[serde_json::Value]) -> Result<Snapshot> {
        let json = json!({ "sha": COMMIT, "siblings": siblings, "tags": [{}] });
        read(&id(), json.to_string().as_bytes())
    }

    #[test]
    fn wanted_files_are_taken_with_the_hash_of_their_bytes() {
        let snapshot = read_files(&[
            json!({ "rfilename": "config.json", "size": 3, "blobId": COMMIT, "lfs": null }),
            weights(),
            json!({ "rfilename": "picture.png" }),
            json!({ "rfilename": "onnx/model.json" }),
            json!({ "rfilename": "../up.json" }),
        ])
        .unwrap();
        assert_eq!(snapshot.commit().as_str(), COMMIT);
        assert_eq!(snapshot.bytes(), 12);
        let names: Vec<_> = snapshot.files().iter().map(|f| f.name.as_str()).collect();
        assert_eq!(names, ["config.json", "model.safetensors"]);
        assert!(matches!(snapshot.files()[0].hash, Hash::GitBlob(_)));
        assert!(matches!(snapshot.files()[1].hash, Hash::Sha256(_)));
    }

    #[test]
    fn lists_that_cannot_be_are_refused_with_the_reason() {
        let config = |size: serde_json::Value| json!({ "rfilename": "config.json", "size": size, "blobId": COMMIT });
        let cases = [
            (vec![], "no .safetensors"),
            (vec![weights(), config(json!(1u64 << 63))], "TiB"),
            (vec![weights(), config(json!(u64::MAX))], "TiB"),
            (vec![weights(), config(json!(-1))], "no list"),
            (vec![weights(), config(json!(1.5))], "no list"),
            (vec![weights(), config(json!(null))], "no size"),
            (vec![weights(), weights()], "twice"),
            (
                vec![
                    weights(),
                    json!({ "rfilename": "MODEL.safetensors", "size": 1, "blobId": COMMIT }),
                ],
                "twice",
            ),
            (
                vec![
                    weights(),
                    json!({ "rfilename": "fetch.json", "size": 1, "blobId": COMMIT }),
                ],
                "needed here",
            ),
            (
                vec![
                    weights(),
                    json!({ "rfilename": "LICENSE.incomplete", "size": 1, "blobId": COMMIT }),
                ],
                "needed here",
            ),
            (
                vec![
                    json!({ "rfilename": "a.safetensors", "size": 1, "blobId": COMMIT, "lfs": {} }),
                ],
                "no SHA-256",
            ),
            (
                vec![json!({ "rfilename": "a.safetensors", "size": 1 })],
                "no hash",
            ),
            (
                vec![json!({ "rfilename": "a\\b.safetensors", "size": 1, "blobId": COMMIT })],
                "no plain name",
            ),
        ];
        for (siblings, reason) in cases {
            let error = read_files(&siblings).unwrap_err().to_string();
            assert!(error.contains(reason), "{siblings:?}: {error}");
        }
        let many = vec![json!({ "rfilename": "x" }); MAX_FILES + 1];
        let error = read_files(&many).unwrap_err().to_string();
        assert!(error.contains("4096"), "{error}");
    }
}
