//! A model for tests: its logits are a hash of everything a sequence has seen, and it fails, panics or dawdles on demand.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use kernel::Tensor;

use crate::error::{Error, Result};
use crate::runner::{Logits, Runner};
use crate::sampling::Candidate;
use crate::sampling::shortlist::Shortlist;

pub const VOCAB: usize = 32;
/// Feeding this token is an error.
pub const FAILS: u32 = 30;
/// Feeding this token is a panic.
pub const PANICS: u32 = 31;

/// What the scheduler asked for: tokens of a prefill, or sequences of a step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Call {
    Prefill(usize),
    Step(usize),
}

#[derive(Debug, Default, Clone)]
pub struct Toy {
    pub calls: Arc<Mutex<Vec<Call>>>,
    /// Time that each call takes.
    pub pace: Duration,
    /// Says of a step no more than its few likeliest ids.
    pub is_brief: bool,
    /// Logits of the last step.
    pub rows: Vec<Vec<f32>>,
}

impl Toy {
    pub fn calls(&self) -> Vec<Call> {
        self.calls.lock().unwrap().clone()
    }

    fn row_of(&self, logits: Vec<f32>) -> Logits {
        if !self.is_brief {
            return Logits::All(logits);
        }
        let mut sorted = logits.clone();
        sorted.sort_by(|a, b| b.total_cmp(a));
        let (largest, floor) = (sorted[0], sorted[4]);
        let ids = (0..).zip(&logits).filter(|(_, logit)| **logit >= floor);
        Logits::Short(Shortlist {
            candidates: ids
                .map(|(id, logit)| Candidate { id, logit: *logit })
                .collect(),
            floor,
            largest,
            mass: logits.iter().map(|x| (x - largest).exp()).sum(),
        })
    }

    fn called(&self, call: Call) {
        self.calls.lock().unwrap().push(call);
        std::thread::sleep(self.pace);
    }
}

/// Logits after `seen`: pseudo-random in 0..4, and very low for the two tokens that break things.
pub fn logits(seen: &[u32]) -> Vec<f32> {
    let hash = seen.iter().fold(0x9E37_79B9u32, |hash, id| {
        (hash ^ id).wrapping_mul(0x0100_0193).rotate_left(7)
    });
    (0..VOCAB as u32)
        .map(|id| match id {
            FAILS | PANICS => -50.0,
            _ => {
                let mixed = (hash ^ id.wrapping_mul(0x85EB_CA6B)).wrapping_mul(0xC2B2_AE35);
                (mixed >> 16) as f32 / 16384.0
            }
        })
        .collect()
}

impl Runner for Toy {
    type State = Vec<u32>;

    fn vocab_size(&self) -> usize {
        VOCAB
    }

    fn new_state(&self) -> Result<Vec<u32>> {
        Ok(Vec::new())
    }

    fn snapshot(&self, state: &Vec<u32>) -> Result<Vec<u32>> {
        Ok(state.clone())
    }

    fn state_bytes(&self, state: &Vec<u32>) -> usize {
        state.len() * 4
    }

    fn prefill(&self, state: &mut Vec<u32>, tokens_t: &[u32]) -> Result<Tensor> {
        self.called(Call::Prefill(tokens_t.len()));
        feed(state, tokens_t)?;
        Ok(Tensor::from_f32(&[VOCAB], logits(state)))
    }

    fn prefill_all(&self, state: &mut Vec<u32>, tokens_t: &[u32]) -> Result<Tensor> {
        self.called(Call::Prefill(tokens_t.len()));
        let mut rows = Vec::new();
        for token in tokens_t {
            feed(state, &[*token])?;
            rows.extend(logits(state));
        }
        Ok(Tensor::from_f32(&[tokens_t.len(), VOCAB], rows))
    }

    fn step(&mut self, states: &mut [&mut Vec<u32>], tokens_b: &[u32]) -> Result<Vec<Logits>> {
        self.called(Call::Step(tokens_b.len()));
        self.rows.clear();
        for (state, token) in states.iter_mut().zip(tokens_b) {
            feed(state, &[*token])?;
            self.rows.push(logits(state));
        }
        let rows = self.rows.iter();
        Ok(rows.map(|row| self.row_of(row.clone())).collect())
    }

    fn logits_of(&self, row: usize) -> Result<Vec<f32>> {
        Ok(self.rows[row].clone())
    }
}

fn feed(state: &mut Vec<u32>, tokens: &[u32]) -> Result<()> {
    for token in tokens {
        assert_ne!(*token, PANICS, "told to panic");
        if *token == FAILS {
            return Err(Error::Model {
                reason: "told to fail".to_owned(),
            });
        }
        state.push(*token);
    }
    Ok(())
}
