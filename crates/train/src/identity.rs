//! What decides the numbers of a run, key by key: a checkpoint remembers it, so that nobody goes on with another recipe unawares.
//!
//! Keys that only say when to look or to save are not part of it: they may change between starts.

use kernel::DType;
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};
use text::Example;

use crate::job::Job;

/// The identity of a job: recipe keys by their names in the recipe, the type that its numbers are kept in, and digests of base and data.
pub fn of(job: &Job, dtype: DType) -> Map<String, Value> {
    let mut identity = Map::new();
    flatten(
        &mut identity,
        "",
        json!({
            "seed": job.seed,
            "base": job.base_name,
            "base_sha256": job.base_sha256,
            "dtype": dtype.to_string(),
            "data": job.data,
            "tuner": job.tuner,
            "optimizer": job.optimizer,
            "batch": job.batch,
            "run": { "epochs": job.run.epochs, "steps": job.run.steps },
            "source_weights": job.source_weights,
            "split_at": if job.tokenizer.is_some() { "sentence ends" } else { "row ends" },
            "conversations_split_at": split_at_rounds(job).then_some("rounds"),
            "training_data": digest(&job.train),
            "held_out_data": digest(job.held_out()),
        }),
    );
    identity
}

/// Whether some conversation is cut, and so otherwise than a document would be.
fn split_at_rounds(job: &Job) -> bool {
    let mut documents = job.train.iter().chain(job.held_out());
    documents.any(|document| {
        let example = document;
        !example.rounds.is_empty() && example.input_ids.len() > job.data.row_tokens
    })
}

/// Keys that checkpoints of the first form did not remember.
pub const NEW_IN_FORM_2: [&str; 2] = ["base_sha256", "dtype"];

/// `key: was X, is Y` for every key that differs.
pub fn differences(was: &Map<String, Value>, is: &Map<String, Value>) -> Vec<String> {
    let mut keys: Vec<&String> = was.keys().chain(is.keys()).collect();
    keys.sort_unstable();
    keys.dedup();
    keys.into_iter()
        .filter(|key| was.get(*key) != is.get(*key))
        .map(|key| format!("{key}: was {}, is {}", shown(was, key), shown(is, key)))
        .collect()
}

fn shown(identity: &Map<String, Value>, key: &str) -> String {
    identity
        .get(key)
        .map_or("absent".to_string(), Value::to_string)
}

fn flatten(out: &mut Map<String, Value>, prefix: &str, value: Value) {
    match value {
        Value::Object(table) => {
            for (key, value) in table {
                let name = match prefix {
                    "" => key,
                    _ => format!("{prefix}.{key}"),
                };
                flatten(out, &name, value);
            }
        }
        Value::Null => {}
        value => {
            out.insert(prefix.to_string(), value);
        }
    }
}

/// Start of the SHA-256 of everything about documents that training sees.
fn digest<'d>(documents: impl IntoIterator<Item = &'d Example>) -> String {
    let mut hash = Sha256::new();
    for document in documents {
        let language = document.origin.language.as_deref().unwrap_or_default();
        hash.update(document.origin.source_idx.to_le_bytes());
        hash.update((language.len() as u64).to_le_bytes());
        hash.update(language.as_bytes());
        hash.update((document.input_ids.len() as u64).to_le_bytes());
        for id in &document.input_ids {
            hash.update(id.to_le_bytes());
        }
        for label in &document.labels {
            hash.update(label.to_le_bytes());
        }
    }
    files::hex(&hash.finalize()[..8])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn differences_name_the_key_and_both_values() {
        let mut was = Map::new();
        flatten(
            &mut was,
            "",
            json!({ "seed": 7, "optimizer": { "lr": 0.001 } }),
        );
        let mut is = Map::new();
        flatten(
            &mut is,
            "",
            json!({ "seed": 7, "optimizer": { "lr": 0.002, "warmup_steps": 3 } }),
        );
        assert_eq!(
            differences(&was, &is),
            [
                "optimizer.lr: was 0.001, is 0.002",
                "optimizer.warmup_steps: was absent, is 3"
            ]
        );
        assert_eq!(differences(&is, &is), Vec::<String>::new());
    }
}
