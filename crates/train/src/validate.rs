//! Held-out loss, honestly: the same packing as training, no dropout, by language, beside the loss on training documents of the same kind.
//!
//! The trainer's running mean is not compared with the held-out loss: its weights moved while it was taken. A [train probe](crate::probe), a
//! fixed seeded sample of training documents matched to the held-out ones in language and length, is measured with the same weights instead.

use std::collections::BTreeMap;

use model::{Model, Saved};

use crate::data::{Bin, Pieces, Plan, as_batch};
use crate::error::Result;
use crate::job::{Job, ValidationSet};
use crate::metrics::{AlertLine, ValidationLine};
use crate::ranks::Ranks;
use crate::seed::{Purpose, Rng, derive};
use kernel::ops::linear_cross_entropy::NO_TARGET;
use text::Example;
use text::pack::PackedRow;
use text::probe::{Kind, matched};

/// held-out loss / probe loss − 1 above which a person is warned.
pub const GAP_LIMIT: f64 = 0.10;
/// The name of all languages together.
pub const ALL: &str = "all";

/// The sets that are measured together.
#[derive(Debug)]
pub struct Validator {
    sets: Vec<Set>,
}

/// Held-out documents, cut and packed, and the probe that they are compared with.
#[derive(Debug)]
struct Set {
    /// Place in [`Job::validation`].
    set_idx: usize,
    held_out: Pieces,
    held_out_rows: Vec<Bin>,
    /// Empty for all sets but the first: one probe is enough, and each costs as much as its set.
    probe_rows: Vec<Bin>,
}

/// Sums of one language.
#[derive(Debug, Clone, Copy, Default)]
struct Sums {
    nll: f64,
    targets: u64,
}

impl Validator {
    /// Packs the held-out documents and chooses the probe.
    ///
    /// # Errors
    /// As [`Pieces::new`], of held-out documents.
    pub fn new(job: &Job, plan: &Plan, vocab_size: usize) -> Result<Self> {
        let mut sets: Vec<Set> = Vec::new();
        for (set_idx, set) in job.validation.iter().enumerate() {
            let held_out = Pieces::new(
                &set.examples,
                "held-out",
                job.data.row_tokens,
                job.tokenizer.as_deref(),
                vocab_size,
            )?;
            let all: Vec<usize> = (0..set.examples.len()).collect();
            let held_out_rows = held_out.pack(&held_out.of(&all), &job.data)?;
            if held_out_rows.is_empty() {
                continue;
            }
            let probe_rows = if sets.is_empty() {
                let probe = probe_documents(job, plan, &set.examples);
                plan.pieces().pack(&plan.pieces().of(&probe), &job.data)?
            } else {
                Vec::new()
            };
            sets.push(Set {
                set_idx,
                held_out,
                held_out_rows,
                probe_rows,
            });
        }
        Ok(Validator { sets })
    }

    /// Whether there is nothing to measure: no held-out document has a label.
    pub fn is_empty(&self) -> bool {
        self.sets.is_empty()
    }

    /// Tokens of one measurement.
    pub fn n_tokens(&self) -> u64 {
        let rows = |set: &'_ Set| -> u64 {
            let rows = set.held_out_rows.iter().chain(&set.probe_rows);
            rows.map(|row| row.n_tokens).sum()
        };
        self.sets.iter().map(rows).sum()
    }

    /// Measures all sets: the lines of the first, then those of the others, the same on all ranks, which take the batches in turn. None if
    /// it was stopped.
    ///
    /// # Errors
    /// The model's.
    pub fn measure(&self, mut pass: Pass<'_>) -> Result<Option<Vec<ValidationLine>>> {
        let (job, plan, step) = (pass.job, pass.plan, pass.step);
        let mut all = Vec::new();
        for set in &self.sets {
            let of_set = &job.validation[set.set_idx];
            let held_out = pass.sums(&set.held_out, &set.held_out_rows, &of_set.examples)?;
            let Some(held_out) = held_out else {
                return Ok(None);
            };
            let Some(probe) = pass.sums(plan.pieces(), &set.probe_rows, &job.train)? else {
                return Ok(None);
            };
            all.extend(lines(step, of_set, &held_out, &probe));
        }
        Ok(Some(all))
    }
}

/// One measurement: whose loss, where the run stands, and who is told.
pub struct Pass<'a> {
    /// The weights.
    pub model: &'a Model,
    /// Room for what a forward pass keeps.
    pub saved: &'a mut Saved,
    /// The job that the validator was made for.
    pub job: &'a Job,
    /// Its training documents, which the probe is of, and the rows of a batch.
    pub plan: &'a Plan,
    /// Who shares the batches.
    pub ranks: &'a Ranks,
    /// Steps that are done.
    pub step: u64,
    /// Tokens that all ranks have measured; 0 at the start.
    pub tokens_done: u64,
    /// Is told them after every batch of each rank, and stops the measurement by returning false on any of them.
    pub go_on: &'a mut dyn FnMut(u64) -> bool,
}

impl Pass<'_> {
    /// Sums of some rows by language, over all ranks; None if it was stopped.
    fn sums(
        &mut self,
        pieces: &Pieces,
        rows: &[Bin],
        documents: &[Example],
    ) -> Result<Option<BTreeMap<Option<String>, Sums>>> {
        // All ranks know all languages, so that their sums can be added.
        let mut sums = BTreeMap::<Option<String>, Sums>::new();
        for document in pieces.documents(rows) {
            sums.entry(documents[document].origin.language.clone())
                .or_default();
        }
        let batches: Vec<&[Bin]> = rows.chunks(self.plan.rows_per_batch).collect();
        for turn in batches.chunks(self.ranks.n_ranks()) {
            if let Some(rows) = turn.get(self.ranks.rank()) {
                let batch = pieces.micro_batch(rows);
                let nll_t = self.model.nll(self.saved, &as_batch(&batch))?;
                add_up(&mut sums, &batch, &nll_t, documents);
            }
            let rows = turn.iter().copied().flatten();
            self.tokens_done += rows.map(|row| row.n_tokens).sum::<u64>();
            if self.ranks.any(!(self.go_on)(self.tokens_done))? {
                return Ok(None);
            }
        }
        let mut totals: Vec<f64> = sums
            .values()
            .flat_map(|sum| [sum.nll, sum.targets as f64])
            .collect();
        self.ranks.sum(&mut totals)?;
        let (totals, _) = totals.as_chunks::<2>();
        for (sum, [nll, targets]) in sums.values_mut().zip(totals) {
            *sum = Sums {
                nll: *nll,
                targets: *targets as u64,
            };
        }
        Ok(Some(sums))
    }
}

/// Adds the losses of a batch to the sums of its documents' languages.
fn add_up(
    sums: &mut BTreeMap<Option<String>, Sums>,
    batch: &PackedRow,
    nll_t: &[f32],
    documents: &[Example],
) {
    for (piece, document) in batch.cu_seqlens.windows(2).zip(&batch.examples) {
        let range = piece[0] as usize..piece[1] as usize;
        let sum = sums
            .entry(documents[*document].origin.language.clone())
            .or_default();
        sum.nll += nll_t[range.clone()]
            .iter()
            .map(|nll| f64::from(*nll))
            .sum::<f64>();
        let targets = batch.targets_t[range].iter();
        sum.targets += targets.filter(|target| **target != NO_TARGET).count() as u64;
    }
}

/// The alert that a held-out line calls for, if any.
pub fn gap_alert(line: &ValidationLine) -> Option<AlertLine> {
    let gap = line.gap.filter(|gap| *gap > GAP_LIMIT)?;
    Some(AlertLine {
        step: line.step,
        alert: "gap".to_string(),
        level: "warn".to_string(),
        text: format!(
            "held-out loss is {:.0} % above the loss on training documents of the same kind (limit {:.0} %): the model is learning them by heart; stop here, train fewer epochs, or take checkpoints/best",
            gap * 100.0,
            GAP_LIMIT * 100.0
        ),
    })
}

/// `all` first, then each language by name.
fn lines(
    step: u64,
    set: &ValidationSet,
    held_out: &BTreeMap<Option<String>, Sums>,
    probe: &BTreeMap<Option<String>, Sums>,
) -> Vec<ValidationLine> {
    let documents = &set.examples;
    let total = |sums: &BTreeMap<_, Sums>| {
        sums.values().fold(Sums::default(), |a, b| Sums {
            nll: a.nll + b.nll,
            targets: a.targets + b.targets,
        })
    };
    let mut lines = vec![line(
        step,
        (&set.name, ALL),
        total(held_out),
        total(probe),
        bytes_of(documents.iter()),
    )];
    for (language, sums) in held_out {
        if let Some(name) = language {
            let of_language = documents
                .iter()
                .filter(|document| document.origin.language == *language);
            let probe = probe.get(language).copied().unwrap_or_default();
            lines.push(line(
                step,
                (&set.name, name),
                *sums,
                probe,
                bytes_of(of_language),
            ));
        }
    }
    lines
}

fn line(
    step: u64,
    (split, language): (&str, &str),
    held_out: Sums,
    probe: Sums,
    bytes: Option<u64>,
) -> ValidationLine {
    let loss = held_out.nll / held_out.targets as f64;
    let train_probe_loss = (probe.targets > 0).then(|| probe.nll / probe.targets as f64);
    ValidationLine {
        step,
        split: split.to_string(),
        language: language.to_string(),
        loss,
        bits_per_byte: bytes.map(|bytes| held_out.nll / std::f64::consts::LN_2 / bytes as f64),
        train_probe_loss,
        gap: train_probe_loss.map(|probe| loss / probe - 1.0),
    }
}

/// Bytes behind the targets of these documents; None if one of them does not know.
fn bytes_of<'a>(documents: impl Iterator<Item = &'a Example>) -> Option<u64> {
    let trained = documents.filter(|document| document.n_targets() > 0);
    trained
        .map(|document| (document.origin.bytes > 0).then_some(document.origin.bytes as u64))
        .sum()
}

/// Training documents that match the held-out ones, ties broken by seed. Only documents that the run trains on.
fn probe_documents(job: &Job, plan: &Plan, held_out: &[Example]) -> Vec<usize> {
    let is_trained = plan.is_trained(plan.total_steps());
    let mut order: Vec<usize> = (0..job.train.len())
        .filter(|document| is_trained[*document])
        .collect();
    Rng::new(derive(job.seed, Purpose::Probe, 0, 0)).shuffle(&mut order);
    let trained = order.iter().map(|document| kind(&job.train[*document]));
    let probe = matched(held_out.iter().map(kind), trained);
    probe.into_iter().map(|place| order[place]).collect()
}

fn kind(document: &Example) -> Kind<'_> {
    Kind {
        language: document.origin.language.as_deref(),
        targets: document.n_targets(),
    }
}
