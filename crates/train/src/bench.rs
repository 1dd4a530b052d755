//! Optimizer steps on random tokens, timed: what training costs at a shape, whatever the data.

use std::time::Instant;

use kernel::random;
use model::{Config, LayerType};
use text::Example;
use text::pack::{self, PackedRow, Piece};

use crate::error::Result;
use crate::memory::StepRows;
use crate::step::Trainer;

/// Steps before those that count: kernels are compiled, memory taken.
pub const WARMUP: usize = 2;
/// Learning rate of the steps.
const LR: f64 = 2e-5;

/// What each step learns from.
#[derive(Debug, Clone, Copy)]
pub struct RandomSteps {
    /// Rows of a step and their tokens.
    pub rows: StepRows,
    /// Length of the documents in a row, but for the last.
    pub document_tokens: usize,
    /// Ids are below this.
    pub vocab_size: usize,
    /// Rows that go at once.
    pub micro_rows: usize,
}

/// What steps took.
#[derive(Debug, Clone, PartialEq)]
pub struct Timing {
    /// From the call of the first step to its end, in milliseconds.
    pub ms_first_step: f64,
    /// Median of the steps behind the warmup, in milliseconds.
    pub ms_step: f64,
    /// Of the last step.
    pub loss: f64,
}

impl RandomSteps {
    /// Tokens of a step.
    pub fn n_tokens(&self) -> usize {
        self.n_rows() * self.rows.row_tokens
    }

    /// Takes [`WARMUP`] steps and then `n_steps`, 1 or more, that count; `said` is told of each: its number from 1, milliseconds, loss.
    ///
    /// # Errors
    /// As [`Trainer::step`]; a device that fails.
    pub fn time(
        &self,
        trainer: &mut Trainer,
        n_steps: usize,
        mut said: impl FnMut(usize, f64, f64),
    ) -> Result<Timing> {
        let mut milliseconds = Vec::new();
        let mut loss = 0.0;
        for step in 0..WARMUP + n_steps {
            let rows = self.micro_batches(step);
            let n_targets = n_targets(&rows);
            let start = Instant::now();
            loss = trainer.step(rows.into_iter(), n_targets, LR)?.loss;
            trainer.model.device().synchronize()?;
            milliseconds.push(1e3 * start.elapsed().as_secs_f64());
            said(step + 1, milliseconds[step], loss);
        }
        let ms_first_step = milliseconds[0];
        let mut timed = milliseconds.split_off(WARMUP);
        timed.sort_by(f64::total_cmp);
        Ok(Timing {
            ms_first_step,
            ms_step: timed[timed.len() / 2],
            loss,
        })
    }

    /// One step more, for whoever watches it.
    ///
    /// # Errors
    /// As [`Trainer::step`].
    pub fn once(&self, trainer: &mut Trainer) -> Result<()> {
        let rows = self.micro_batches(0);
        let n_targets = n_targets(&rows);
        trainer.step(rows.into_iter(), n_targets, LR)?;
        Ok(())
    }

    fn n_rows(&self) -> usize {
        self.rows.rows * self.rows.accumulate
    }

    fn micro_batches(&self, step: usize) -> Vec<PackedRow> {
        let n_rows = self.n_rows();
        let batch = |first: usize| {
            let n_tokens = self.micro_rows.min(n_rows - first) * self.rows.row_tokens;
            self.random_row(n_tokens, (step * n_rows + first) as u64)
        };
        (0..n_rows).step_by(self.micro_rows).map(batch).collect()
    }

    fn random_row(&self, n_tokens: usize, seed: u64) -> PackedRow {
        let id = |t: u64| (random::bits(seed, 0, t) % self.vocab_size as u64) as u32;
        let tokens_t: Vec<u32> = (0..n_tokens as u64).map(id).collect();
        let documents = tokens_t.chunks(self.document_tokens).enumerate();
        let pieces: Vec<Piece> = documents
            .map(|(example_idx, ids)| Piece {
                example_idx,
                example: Example::document(ids.to_vec(), ids.iter().map(|id| *id as i32).collect()),
            })
            .collect();
        pack::row(&pieces)
    }
}

fn n_targets(rows: &[PackedRow]) -> u64 {
    let targets = rows.iter().flat_map(|row| &row.targets_t);
    targets.filter(|target| **target >= 0).count() as u64
}

/// Operations a token, recomputation not counted: 6 a weight of the matrices (4 where the base is frozen below an adapter), and the
/// attention of a document's mean context.
pub fn flops_per_token(config: &Config, is_adapter: bool, document_tokens: usize) -> f64 {
    let head = config.vocab_size * config.hidden_size;
    let tables = if config.tie_word_embeddings {
        head
    } else {
        2 * head
    };
    let matrices = (config.n_params() as usize - tables + head) as f64;
    let layers = config.layer_types.iter();
    let n_attention = layers.filter(|layer| **layer == LayerType::Full).count();
    let attention = (n_attention * config.num_attention_heads * config.head_dim) as f64
        * 2.0
        * document_tokens as f64;
    let passes = if is_adapter { 2.0 } else { 3.0 };
    passes * 2.0 * matrices + 3.5 * attention
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn random_rows_part_into_documents_and_learn_nothing_across_borders() {
        let steps = RandomSteps {
            rows: StepRows {
                rows: 3,
                row_tokens: 10,
                accumulate: 1,
                at_once: 3,
            },
            document_tokens: 4,
            vocab_size: 7,
            micro_rows: 2,
        };
        let batches = steps.micro_batches(1);
        let tokens: Vec<usize> = batches.iter().map(|row| row.tokens_t.len()).collect();
        assert_eq!(tokens, [20, 10]);
        assert_eq!(steps.n_tokens(), 30);
        let row = &batches[1];
        assert_eq!(row.cu_seqlens, [0, 4, 8, 10]);
        assert!(row.tokens_t.iter().all(|id| *id < 7));
        for t in 0..10 {
            let expect = match t {
                3 | 7 | 9 => -1,
                _ => row.tokens_t[t + 1] as i32,
            };
            assert_eq!(row.targets_t[t], expect);
        }
        assert_eq!(n_targets(&batches[1..]), 7);
        assert_eq!(steps.micro_batches(1)[0].tokens_t, batches[0].tokens_t);
        assert_ne!(steps.micro_batches(2)[0].tokens_t, batches[0].tokens_t);
    }
}
