//! `report.json` for machines and `report.html` for eyes, from the same data.

mod html;

use std::path::Path;

use serde::Serialize;

use crate::Result;
use crate::metric::loss_gap::{Gap, SideLosses};

/// Everything an evaluation found.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// The character's name, or the model's folder.
    pub model: String,
    /// Parameters of the model.
    pub n_params: u64,
    /// A plain sentence on what this model can and cannot be.
    pub note: String,
    /// Of the program: `cyrene 0.1.0`.
    pub version: String,
    /// SHA-256 of the split file: what was held out.
    pub split_sha256: String,
    /// One per kind of rows: story text, then conversations.
    pub stages: Vec<StageReport>,
    /// What the model answers to held-out turns.
    pub replies: Vec<Reply>,
    /// Mean share of the replies' words that the story holds.
    pub known_words: Option<f64>,
    /// Any stage's overall gap is above the red flag.
    pub red_flag: bool,
}

/// Losses on one kind of rows.
#[derive(Debug, Clone, Serialize)]
pub struct StageReport {
    /// `pt` or `sft`.
    pub stage: &'static str,
    /// Languages whose train probe is drawn from the train side of the split, for want of a record that the model was trained on any row
    /// of it; the others' are rows that it was trained on.
    pub probe_not_recorded: Vec<String>,
    /// The evaluated model: `all` first, then by language.
    pub gaps: Vec<Gap>,
    /// The model before training on the same rows, if one was given.
    pub base: Option<Vec<Gap>>,
    /// (held-out gap of the model) over (held-out gap of the base) - 1: what training added.
    pub gap_over_base: Option<f64>,
    /// The held-out sides beside each other, `all` first, then by language; empty if nothing but `val` is held out.
    pub sides: Vec<SideLosses>,
    /// Held-out losses of models that only count.
    pub baselines: Vec<Baseline>,
}

/// A counting model's held-out loss.
#[derive(Debug, Clone, Serialize)]
pub struct Baseline {
    /// What it counts.
    pub name: &'static str,
    /// `None` for a model that does not see tokens.
    pub nats_per_token: Option<f64>,
    /// On the held-out rows.
    pub bits_per_byte: f64,
}

/// One prompt and what the model answered.
#[derive(Debug, Clone, Serialize)]
pub struct Reply {
    /// Its code.
    pub language: String,
    /// Scene of the held-out turn the prompt was taken from.
    pub scene: String,
    /// The last turn before the reply.
    pub prompt: String,
    /// What the model said.
    pub reply: String,
    /// `stop`, `length` or `cancelled`.
    pub finish_reason: String,
    /// Share of its words that the story holds.
    pub known_words: Option<f64>,
}

impl Report {
    /// Writes `report.json`, `report.html` and `eval/replies.jsonl` into `dir`, each whole or not at all.
    ///
    /// # Errors
    /// [`crate::Error::Write`] names the file; the old one, if any, is still there.
    pub fn write(&self, dir: &Path) -> Result<()> {
        files::write(
            &dir.join("report.json"),
            serde_json::to_string_pretty(self)?.as_bytes(),
        )?;
        files::write(&dir.join("report.html"), html::page(self).as_bytes())?;
        let mut lines = String::new();
        for reply in &self.replies {
            lines.push_str(&serde_json::to_string(reply)?);
            lines.push('\n');
        }
        files::write(&dir.join("eval").join("replies.jsonl"), lines.as_bytes())?;
        Ok(())
    }
}
