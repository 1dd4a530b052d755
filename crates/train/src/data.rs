//! From documents to micro-batches: weights, order, splitting, packing, and the account of every label.
//!
//! All of it is decided before the first step from the seed and the documents alone, so that the number of a step is its place in the data.

use std::collections::BTreeMap;
use std::ops::Range;

use text::pack::{self, PackedRow, Packing, Piece};
use text::{Example, Tokenizer};

use crate::error::{Error, Result};
use crate::job::{DataConfig, Job};
use crate::seed::{Purpose, Rng, derive};

/// Documents cut to row length. A piece without a target is left out: it could teach nothing.
#[derive(Debug)]
pub struct Pieces {
    pieces: Vec<Piece>,
    /// Range of each document's pieces.
    of_document: Vec<Range<usize>>,
}

/// What one packed row will hold: the pieces that share it, and their tokens together.
#[derive(Debug, Clone, PartialEq)]
pub struct Bin {
    /// Indices of its pieces.
    pub pieces: Vec<usize>,
    /// Tokens of all of them.
    pub n_tokens: u64,
}

impl Pieces {
    /// Cuts what is longer than a row, as [`pack::split`] does.
    ///
    /// # Errors
    /// A token id beyond the vocabulary, ids and labels that differ in number, or a conversation that no row has room for; `split` names the
    /// data in the text.
    pub fn new(
        documents: &[Example],
        split: &'static str,
        row_tokens: usize,
        tokenizer: Option<&Tokenizer>,
        vocab_size: usize,
    ) -> Result<Self> {
        let mut pieces = Vec::new();
        let mut of_document = Vec::with_capacity(documents.len());
        for (document_idx, document) in documents.iter().enumerate() {
            check_ids(document, split, document_idx, vocab_size)?;
            let parts =
                pack::split(tokenizer, document, row_tokens).map_err(|reason| Error::Cut {
                    split,
                    document: document_idx,
                    source_idx: document.origin.source_idx,
                    reason,
                })?;
            let first = pieces.len();
            pieces.extend(
                parts
                    .into_iter()
                    .filter(|example| example.n_targets() > 0)
                    .map(|example| Piece {
                        example_idx: document_idx,
                        example,
                    }),
            );
            of_document.push(first..pieces.len());
        }
        Ok(Pieces {
            pieces,
            of_document,
        })
    }

    /// The pieces of some documents, in their order.
    pub fn of(&self, documents: &[usize]) -> Vec<usize> {
        documents
            .iter()
            .flat_map(|document| self.of_document[*document].clone())
            .collect()
    }

    /// Packs pieces into rows.
    ///
    /// # Errors
    /// A piece longer than a row.
    pub fn pack(&self, piece_indices: &[usize], data: &DataConfig) -> Result<Vec<Bin>> {
        let lengths: Vec<usize> = piece_indices
            .iter()
            .map(|piece_idx| self.pieces[*piece_idx].example.input_ids.len())
            .collect();
        let rows = pack::bins(&lengths, data.row_tokens, data.packing)?;
        let row = |places: Vec<usize>| Bin {
            n_tokens: places.iter().map(|place| lengths[*place] as u64).sum(),
            pieces: places.iter().map(|place| piece_indices[*place]).collect(),
        };
        Ok(rows.into_iter().map(row).collect())
    }

    /// Lays rows end to end as one: what the model sees at once.
    pub fn micro_batch(&self, rows: &[Bin]) -> PackedRow {
        pack::row(self.in_rows(rows))
    }

    /// Documents that these rows are made of, each as often as it has pieces in them.
    pub fn documents<'a>(&'a self, rows: &'a [Bin]) -> impl Iterator<Item = usize> + 'a {
        self.in_rows(rows).map(|piece| piece.example_idx)
    }

    /// Positions that carry loss in these rows.
    fn n_targets(&self, rows: &[Bin]) -> u64 {
        self.in_rows(rows)
            .map(|piece| piece.example.n_targets())
            .sum()
    }

    fn in_rows<'a>(&'a self, rows: &'a [Bin]) -> impl Iterator<Item = &'a Piece> {
        rows.iter()
            .flat_map(|row| &row.pieces)
            .map(|piece_idx| &self.pieces[*piece_idx])
    }
}

/// A packed row as the model takes it.
pub fn as_batch(row: &PackedRow) -> model::Batch<'_> {
    model::Batch {
        tokens_t: &row.tokens_t,
        targets_t: &row.targets_t,
        cu_seqlens: &row.cu_seqlens,
    }
}

/// All steps of a run.
#[derive(Debug)]
pub struct Plan {
    pieces: Pieces,
    epochs: Vec<Vec<Bin>>,
    steps: Vec<Step>,
    /// Rows of a micro-batch: as the job says, or fewer where the memory plan of a rank's GPU has it so. The same on all ranks.
    pub rows_per_batch: usize,
    account: Account,
}

/// One optimizer step: some rows of one epoch.
#[derive(Debug, Clone, PartialEq)]
pub struct Step {
    /// The epoch, from 0.
    pub epoch_idx: usize,
    /// Rows of the epoch that the step sees.
    pub rows: Range<usize>,
    /// Tokens of all of them.
    pub n_tokens: u64,
    /// Positions that carry loss, over all micro-batches: the loss is divided by this.
    pub n_targets: u64,
}

/// Where every label went.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize)]
pub struct Account {
    /// Training documents given.
    pub documents: u64,
    /// Of these, documents without a label to train on, left out.
    pub documents_without_label: u64,
    /// Documents longer than a row, split at sentence ends.
    pub documents_split: u64,
    /// Conversations longer than a row, cut between rounds.
    pub conversations_split: u64,
    /// Pieces of these that carry loss.
    pub conversation_pieces: u64,
    /// Rounds of these that are longer than a row alone, cut inside the answer.
    pub rounds_split: u64,
    /// Labels of all training documents that can be predicted (a document's first token cannot).
    pub labels: u64,
    /// Trained labels of the first epoch: with all weights 1, exactly `labels`.
    pub trained_labels_per_epoch: u64,
    /// Tokens of the first epoch's rows, trained or not.
    pub tokens_per_epoch: u64,
    /// Rows of the first epoch.
    pub rows_per_epoch: u64,
    /// Labels of the held-out documents.
    pub held_out_labels: u64,
    /// Tokens that the whole run processes.
    pub tokens: u64,
    /// Labels that the whole run trains on.
    pub trained_labels: u64,
}

impl Account {
    /// What was longer than a row, and what became of it; None where nothing was.
    pub fn describe_cuts(&self, row_tokens: usize) -> Option<String> {
        let n = |n: u64, what: &str| format!("{n} {what}{}", if n == 1 { "" } else { "s" });
        let verbs = |n: u64| {
            if n == 1 {
                ("is", "was")
            } else {
                ("are", "were")
            }
        };
        let mut parts = Vec::new();
        if self.conversations_split > 0 {
            let (are, were) = verbs(self.conversations_split);
            let rounds = match self.rounds_split {
                0 => String::new(),
                rounds => format!(
                    "; {} of them {} longer than a row alone and cut inside the answer, behind the same question",
                    n(rounds, "round"),
                    verbs(rounds).0
                ),
            };
            parts.push(format!(
                "{} {are} longer than a row of {row_tokens} tokens and {were} cut between rounds into {}, the system message in front of each{rounds}",
                n(self.conversations_split, "conversation"),
                n(self.conversation_pieces, "piece"),
            ));
        }
        if self.documents_split > 0 {
            let (are, were) = verbs(self.documents_split);
            parts.push(format!(
                "{} {are} longer than a row of {row_tokens} tokens and {were} cut at sentence ends",
                n(self.documents_split, "document")
            ));
        }
        (!parts.is_empty()).then(|| parts.join("\n"))
    }
}

impl Plan {
    /// Decides every step of the job.
    ///
    /// # Errors
    /// No document has a token to train on; as [`Pieces::new`].
    pub fn new(job: &Job, vocab_size: usize) -> Result<Self> {
        let pieces = Pieces::new(
            &job.train,
            "training",
            job.data.row_tokens,
            job.tokenizer.as_deref(),
            vocab_size,
        )?;
        let rows_per_step = job.batch.rows * job.batch.accumulate;
        let mut plan = Plan {
            pieces,
            epochs: Vec::new(),
            steps: Vec::new(),
            rows_per_batch: job.batch.rows,
            account: Account::default(),
        };
        while match job.run.steps {
            Some(steps) => plan.total_steps() < steps,
            None => (plan.epochs.len() as u64) < job.run.epochs,
        } {
            let rows = epoch_rows(job, &plan.pieces, plan.epochs.len() as u64)?;
            if rows.is_empty() {
                return Err(Error::NoTrainableToken {
                    documents: job.train.len(),
                });
            }
            plan.add_epoch(rows, rows_per_step);
        }
        if let Some(steps) = job.run.steps {
            plan.steps.truncate(steps as usize);
        }
        plan.account = plan.account_for(job);
        Ok(plan)
    }

    /// Optimizer steps of the whole run.
    pub fn total_steps(&self) -> u64 {
        self.steps.len() as u64
    }

    /// The step of this index; the first has index 0.
    pub fn step(&self, step_idx: u64) -> &Step {
        &self.steps[step_idx as usize]
    }

    /// The micro-batches of a step, made one at a time.
    pub fn micro_batches(&self, step: &Step) -> impl Iterator<Item = PackedRow> {
        self.epochs[step.epoch_idx][step.rows.clone()]
            .chunks(self.rows_per_batch)
            .map(|rows| self.pieces.micro_batch(rows))
    }

    /// Passes over the data after this step, as a fraction of rows.
    pub fn epoch_after(&self, step: &Step) -> f64 {
        let rows = self.epochs[step.epoch_idx].len();
        let epoch = step.epoch_idx as f64 + step.rows.end as f64 / rows as f64;
        (epoch * 1e6).round() / 1e6
    }

    /// Tokens of all steps from this index on.
    pub fn tokens_from(&self, step_idx: u64) -> u64 {
        let steps = self.steps.get(step_idx as usize..).unwrap_or_default();
        steps.iter().map(|step| step.n_tokens).sum()
    }

    /// Where the documents and tokens are.
    pub fn account(&self) -> &Account {
        &self.account
    }

    /// For each training document whether the first `n_steps` steps train on every label of it; false for one without labels, of a
    /// source of weight 0, or behind those steps.
    pub fn is_trained(&self, n_steps: u64) -> Vec<bool> {
        let mut is_seen = vec![false; self.pieces.pieces.len()];
        for step in self.steps.iter().take(n_steps as usize) {
            for row in &self.epochs[step.epoch_idx][step.rows.clone()] {
                for piece_idx in &row.pieces {
                    is_seen[*piece_idx] = true;
                }
            }
        }
        let of_document = self.pieces.of_document.iter();
        of_document
            .map(|pieces| !pieces.is_empty() && pieces.clone().all(|idx| is_seen[idx]))
            .collect()
    }

    /// The training documents, cut to row length.
    pub fn pieces(&self) -> &Pieces {
        &self.pieces
    }

    fn add_epoch(&mut self, rows: Vec<Bin>, rows_per_step: usize) {
        for first in (0..rows.len()).step_by(rows_per_step) {
            let range = first..rows.len().min(first + rows_per_step);
            self.steps.push(Step {
                epoch_idx: self.epochs.len(),
                n_tokens: rows[range.clone()].iter().map(|row| row.n_tokens).sum(),
                n_targets: self.pieces.n_targets(&rows[range.clone()]),
                rows: range,
            });
        }
        self.epochs.push(rows);
    }

    fn account_for(&self, job: &Job) -> Account {
        let first_epoch = &self.epochs[0];
        let row_tokens = job.data.row_tokens;
        let too_long = |document: &&Example| document.input_ids.len() > row_tokens;
        let (mut conversations, mut conversation_pieces, mut rounds_split) = (0, 0, 0);
        let pieces = job.train.iter().zip(&self.pieces.of_document);
        for (document, pieces) in pieces.filter(|(document, _)| too_long(document)) {
            let example = document;
            if !example.rounds.is_empty() {
                conversations += 1;
                conversation_pieces += pieces.len() as u64;
                rounds_split += example.n_rounds_longer_than(row_tokens) as u64;
            }
        }
        Account {
            documents: job.train.len() as u64,
            documents_without_label: job
                .train
                .iter()
                .filter(|document| document.n_targets() == 0)
                .count() as u64,
            documents_split: job.train.iter().filter(too_long).count() as u64 - conversations,
            conversations_split: conversations,
            conversation_pieces,
            rounds_split,
            labels: labels_of(job.train.iter()),
            trained_labels_per_epoch: self.pieces.n_targets(first_epoch),
            tokens_per_epoch: first_epoch.iter().map(|row| row.n_tokens).sum(),
            rows_per_epoch: first_epoch.len() as u64,
            held_out_labels: labels_of(job.held_out()),
            tokens: self.tokens_from(0),
            trained_labels: self.steps.iter().map(|step| step.n_targets).sum(),
        }
    }
}

/// The rows of one epoch: documents by weight, shuffled across all repeats, packed, and shuffled again where packing sorts them.
fn epoch_rows(job: &Job, pieces: &Pieces, epoch_idx: u64) -> Result<Vec<Bin>> {
    let documents = epoch_documents(job, epoch_idx);
    let mut rows = pieces.pack(&pieces.of(&documents), &job.data)?;
    if job.data.packing == Packing::BinPack {
        Rng::new(derive(job.seed, Purpose::Rows, epoch_idx, 0)).shuffle(&mut rows);
    }
    Ok(rows)
}

/// Each document as often as its source's weight says; the part after the point is a seeded draw of documents, new in every epoch.
fn epoch_documents(job: &Job, epoch_idx: u64) -> Vec<usize> {
    let mut by_source: BTreeMap<u32, Vec<usize>> = BTreeMap::new();
    for (document_idx, document) in job.train.iter().enumerate() {
        by_source
            .entry(document.origin.source_idx)
            .or_default()
            .push(document_idx);
    }
    let mut order = Vec::new();
    for (source, mut documents) in by_source {
        let weight = job.source_weight(source);
        for _ in 0..weight.floor() as u64 {
            order.extend_from_slice(&documents);
        }
        let drawn = (weight.fract() * documents.len() as f64).round() as usize;
        let seed = derive(job.seed, Purpose::Remainder, epoch_idx, u64::from(source));
        Rng::new(seed).shuffle(&mut documents);
        order.extend_from_slice(&documents[..drawn]);
    }
    Rng::new(derive(job.seed, Purpose::Documents, epoch_idx, 0)).shuffle(&mut order);
    order
}

fn check_ids(
    document: &Example,
    split: &'static str,
    document_idx: usize,
    vocab_size: usize,
) -> Result<()> {
    let Example {
        input_ids, labels, ..
    } = document;
    if input_ids.len() != labels.len() {
        return Err(Error::LabelCount {
            split,
            document: document_idx,
            source_idx: document.origin.source_idx,
            ids: input_ids.len(),
            labels: labels.len(),
        });
    }
    match input_ids.iter().position(|id| *id as usize >= vocab_size) {
        None => Ok(()),
        Some(position) => Err(Error::TokenBeyondVocabulary {
            split,
            document: document_idx,
            source_idx: document.origin.source_idx,
            position,
            id: input_ids[position],
            vocab_size,
        }),
    }
}

fn labels_of<'d>(documents: impl Iterator<Item = &'d Example>) -> u64 {
    documents.map(|document| document.n_targets()).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_cut_is_said_with_its_numbers() {
        let none = Account::default();
        assert_eq!(none.describe_cuts(96), None);
        let some = Account {
            conversations_split: 3,
            conversation_pieces: 8,
            ..none
        };
        assert_eq!(
            some.describe_cuts(96).unwrap(),
            "3 conversations are longer than a row of 96 tokens and were cut between rounds into 8 pieces, the system message in front of each"
        );
        let long_round = Account {
            conversations_split: 1,
            conversation_pieces: 4,
            rounds_split: 1,
            documents_split: 1,
            ..none
        };
        let said = long_round.describe_cuts(96).unwrap();
        assert!(said.contains("1 conversation is longer"), "{said}");
        assert!(
            said.contains("1 round of them is longer than a row alone"),
            "{said}"
        );
        assert!(
            said.ends_with(
                "1 document is longer than a row of 96 tokens and was cut at sentence ends"
            ),
            "{said}"
        );
    }
}
