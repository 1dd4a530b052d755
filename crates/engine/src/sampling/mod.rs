//! From one row of logits to the next token: pure functions on candidate lists, in vLLM's order.
//! bans -> bias -> penalties -> temperature -> min-p -> top-k -> top-p -> softmax -> one seeded draw.

pub mod bans;
pub mod bias;
pub mod logprobs;
pub mod min_p;
pub mod penalty;
pub mod repetition;
pub mod rng;
pub mod shortlist;
pub mod softmax;
pub mod temperature;
pub mod top_k;
pub mod top_p;

use std::collections::BTreeMap;

use crate::error::{Error, Result};

/// Below this a temperature means greedy: dividing by it would overflow f32.
pub const GREEDY_BELOW: f32 = 1e-5;

/// How often each id was generated so far in this reply; prompt tokens do not count.
pub type Counts = BTreeMap<u32, u32>;

/// A token that may still be drawn. Lists of candidates are ordered by id, ascending, all through the chain.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Candidate {
    /// The token's id.
    pub id: u32,
    /// Its logit, as far as the chain has changed it.
    pub logit: f32,
}

/// What a draw depends on beside the logits and the request's values.
#[derive(Debug, Clone, Copy)]
pub struct DrawContext<'a> {
    /// Ids of the prompt.
    pub prompt: &'a [u32],
    /// Ids generated so far, in order.
    pub generated: &'a [u32],
    /// How often each of them was.
    pub counts: &'a Counts,
    /// Ids that may not be drawn at this position: stop ids before the least number of tokens is reached.
    pub barred: &'a [u32],
}

impl<'a> DrawContext<'a> {
    /// A context in which only counts matter.
    pub fn of_counts(counts: &'a Counts) -> Self {
        DrawContext {
            prompt: &[],
            generated: &[],
            counts,
            barred: &[],
        }
    }
}

/// How the next token is chosen; the default draws from the model's own distribution.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampling {
    /// Divides the logits; 0 = greedy, the lowest id among equal maxima.
    pub temperature: f32,
    /// Keeps the smallest set of best tokens holding this share of probability; 1 = off.
    pub top_p: f32,
    /// Keeps the k best and every tie with the k-th; 0 = off.
    pub top_k: u32,
    /// Drops tokens less likely than this share of the best one's probability; 0 = off.
    pub min_p: f32,
    /// Subtracted once from every token already generated.
    pub presence_penalty: f32,
    /// Subtracted once per time that a token was generated.
    pub frequency_penalty: f32,
    /// Divides positive logits of ids in prompt and reply, multiplies negative ones; 1 = off.
    pub repetition_penalty: f32,
    /// How many of the last ids of prompt and reply the repetition penalty looks at; `None` = all.
    pub repetition_window: Option<usize>,
    /// Added to the logits of single ids.
    pub bias: Vec<(u32, f32)>,
    /// Ids that alone may be drawn; empty = all.
    pub allowed: Vec<u32>,
    /// Ids that are not drawn one after the other: the last of each may not follow the others.
    pub bad_sequences: Vec<Vec<u32>>,
    /// The same seed and request give the same tokens; `None` takes a fresh seed for each request.
    pub seed: Option<u64>,
    /// Ids that are never drawn.
    pub banned: Vec<u32>,
    /// Ids from here on are never drawn: rows of the head that stand for no token.
    pub vocab_limit: Option<u32>,
}

impl Default for Sampling {
    fn default() -> Self {
        Sampling {
            temperature: 1.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            repetition_penalty: 1.0,
            repetition_window: None,
            bias: Vec::new(),
            allowed: Vec::new(),
            bad_sequences: Vec::new(),
            seed: None,
            banned: Vec::new(),
            vocab_limit: None,
        }
    }
}

impl Sampling {
    /// Temperature 0 and nothing else.
    pub fn greedy() -> Self {
        Sampling {
            temperature: 0.0,
            ..Sampling::default()
        }
    }

    /// Checks every number's range.
    ///
    /// # Errors
    /// [`Error::Sampling`] naming the first field out of range.
    pub fn validate(&self) -> Result<()> {
        let fields = [
            ("temperature", self.temperature, 0.0, 100.0),
            ("top_p", self.top_p, f32::MIN_POSITIVE, 1.0),
            ("min_p", self.min_p, 0.0, 1.0),
            ("presence_penalty", self.presence_penalty, -100.0, 100.0),
            ("frequency_penalty", self.frequency_penalty, -100.0, 100.0),
            (
                "repetition_penalty",
                self.repetition_penalty,
                f32::MIN_POSITIVE,
                100.0,
            ),
        ];
        for (field, value, least, most) in fields {
            // Written so that a NaN is out of range as well.
            if !(value >= least && value <= most) {
                return Err(Error::Sampling {
                    field,
                    value,
                    expected: if least == f32::MIN_POSITIVE {
                        format!("above 0 and at most {most}")
                    } else {
                        format!("{least} to {most}")
                    },
                });
            }
        }
        match self
            .bias
            .iter()
            .find(|(_, bias)| !(-100.0..=100.0).contains(bias))
        {
            Some((_, bias)) => Err(Error::Sampling {
                field: "logit_bias",
                value: *bias,
                expected: "-100 to 100".to_owned(),
            }),
            None => Ok(()),
        }
    }

    /// Checks that every id named is one of the model's.
    ///
    /// # Errors
    /// [`Error::UnknownId`] naming the first field with an id of `vocab_size` or beyond.
    pub fn validate_ids(&self, vocab_size: usize) -> Result<()> {
        let biased: Vec<u32> = self.bias.iter().map(|(id, _)| *id).collect();
        let bad: Vec<u32> = self.bad_sequences.iter().flatten().copied().collect();
        for (field, ids) in [
            ("logit_bias", &biased),
            ("allowed_token_ids", &self.allowed),
            ("bad_words", &bad),
        ] {
            if let Some(id) = ids.iter().find(|id| **id as usize >= vocab_size) {
                return Err(Error::UnknownId {
                    field,
                    id: *id,
                    vocab_size,
                });
            }
        }
        Ok(())
    }
}

/// The distribution that the next token is drawn from: candidates by ascending id, and their probabilities.
/// Shapes: logits [C]. Greedy gives one candidate with probability 1.
///
/// # Errors
/// [`Error::NotFinite`] if a logit is NaN or +inf, [`Error::NoCandidates`] if everything is banned.
///
/// Source: vLLM's order of penalties and filters; the tie conventions of the sampler cases this crate is tested with.
pub fn distribution(
    logits: &[f32],
    context: &DrawContext<'_>,
    sampling: &Sampling,
) -> Result<(Vec<Candidate>, Vec<f64>)> {
    // 1. candidates, without banned ids, and what is added to single ones
    let mut candidates = candidates(logits, context, sampling)?;
    bias::apply(&mut candidates, &sampling.bias);

    // 2. penalties
    repetition::apply(
        &mut candidates,
        context,
        sampling.repetition_penalty,
        sampling.repetition_window,
    );
    penalty::apply(
        &mut candidates,
        context.counts,
        sampling.presence_penalty,
        sampling.frequency_penalty,
    );

    // 3. temperature, or greedy
    if sampling.temperature < GREEDY_BELOW {
        let best = greedy(&candidates).ok_or(Error::NoCandidates)?;
        return Ok((vec![best], vec![1.0]));
    }
    temperature::apply(&mut candidates, sampling.temperature);

    // 4. filters
    min_p::keep(&mut candidates, sampling.min_p);
    top_k::keep(&mut candidates, sampling.top_k);
    top_p::keep(&mut candidates, sampling.top_p);

    // 5. probabilities of what is left
    let probs = softmax::probabilities(&candidates);
    Ok((candidates, probs))
}

/// Draws the next token. `seed` and `position` (tokens generated so far) alone decide the draw, so a request's tokens do not
/// depend on what runs beside it.
///
/// # Errors
/// As [`distribution`].
pub fn draw(
    logits: &[f32],
    context: &DrawContext<'_>,
    sampling: &Sampling,
    seed: u64,
    position: u64,
) -> Result<u32> {
    let (candidates, probs) = distribution(logits, context, sampling)?;
    pick(&candidates, &probs, seed, position)
}

/// The candidate that the draw for `position` falls on.
fn pick(candidates: &[Candidate], probs: &[f64], seed: u64, position: u64) -> Result<u32> {
    let target = rng::uniform(seed, position);
    let mut sum = 0.0;
    for (candidate, prob) in candidates.iter().zip(probs) {
        sum += prob;
        if target < sum {
            return Ok(candidate.id);
        }
    }
    // Rounding can leave the sum a hair below 1: the draw then belongs to the last token that has any probability.
    candidates
        .iter()
        .zip(probs)
        .rev()
        .find(|(_, prob)| **prob > 0.0)
        .map(|(candidate, _)| candidate.id)
        .ok_or(Error::NoCandidates)
}

fn candidates(
    logits: &[f32],
    context: &DrawContext<'_>,
    sampling: &Sampling,
) -> Result<Vec<Candidate>> {
    if let Some(id) = logits
        .iter()
        .position(|x| x.is_nan() || *x == f32::INFINITY)
    {
        return Err(Error::NotFinite { id: id as u32 });
    }
    let limit = sampling
        .vocab_limit
        .map_or(logits.len(), |limit| logits.len().min(limit as usize));
    let mut candidates: Vec<Candidate> = logits[..limit]
        .iter()
        .enumerate()
        .map(|(id, logit)| Candidate {
            id: id as u32,
            logit: *logit,
        })
        .collect();
    bans::keep(&mut candidates, &sampling.allowed);
    bans::remove_all(&mut candidates, context, sampling);
    if candidates.iter().all(|c| c.logit == f32::NEG_INFINITY) {
        return Err(Error::NoCandidates);
    }
    Ok(candidates)
}

/// The best candidate, the lowest id among equal ones.
fn greedy(candidates: &[Candidate]) -> Option<Candidate> {
    candidates
        .iter()
        .copied()
        .reduce(|best, next| if next.logit > best.logit { next } else { best })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counts(pairs: &[(u32, u32)]) -> Counts {
        pairs.iter().copied().collect()
    }

    #[test]
    fn greedy_takes_the_lowest_id_among_equal_maxima() {
        let id = draw(
            &[1.0, 3.0, 3.0],
            &DrawContext::of_counts(&Counts::new()),
            &Sampling::greedy(),
            0,
            0,
        );
        assert_eq!(id.unwrap(), 1);
    }

    #[test]
    fn banned_ids_are_never_drawn() {
        let sampling = Sampling {
            banned: vec![1, 1, 7],
            vocab_limit: Some(3),
            ..Sampling::default()
        };
        for position in 0..200 {
            let id = draw(
                &[0.0, 9.0, 0.0, 9.0],
                &DrawContext::of_counts(&Counts::new()),
                &sampling,
                3,
                position,
            )
            .unwrap();
            assert!(id == 0 || id == 2, "{id}");
        }
    }

    #[test]
    fn banning_everything_is_an_error() {
        let sampling = Sampling {
            banned: vec![1, 0],
            ..Sampling::default()
        };
        let result = draw(
            &[0.0, 1.0],
            &DrawContext::of_counts(&Counts::new()),
            &sampling,
            0,
            0,
        );
        assert_eq!(result, Err(Error::NoCandidates));
    }

    #[test]
    fn nan_logits_are_an_error_naming_the_id() {
        let result = draw(
            &[0.0, f32::NAN],
            &DrawContext::of_counts(&Counts::new()),
            &Sampling::default(),
            0,
            0,
        );
        assert_eq!(result, Err(Error::NotFinite { id: 1 }));
    }

    #[test]
    fn frequency_penalty_counts_every_repetition() {
        let sampling = Sampling {
            temperature: 0.0,
            frequency_penalty: 1.0,
            ..Sampling::default()
        };
        let logits = [2.5, 0.0];
        let thrice = draw(
            &logits,
            &DrawContext::of_counts(&counts(&[(0, 3)])),
            &sampling,
            0,
            0,
        )
        .unwrap();
        let twice = draw(
            &logits,
            &DrawContext::of_counts(&counts(&[(0, 2)])),
            &sampling,
            0,
            0,
        )
        .unwrap();
        assert_eq!((twice, thrice), (0, 1));
    }

    #[test]
    fn draws_follow_the_distribution() {
        let logits = [0.0, (3.0f32).ln()];
        let n = (0..4000)
            .filter(|position| {
                draw(
                    &logits,
                    &DrawContext::of_counts(&Counts::new()),
                    &Sampling::default(),
                    11,
                    *position,
                )
                .unwrap()
                    == 1
            })
            .count();
        // Mean 3000, standard deviation 27: five of them on each side.
        assert!((2860..=3140).contains(&n), "{n}");
    }

    #[test]
    fn range_errors_name_the_field() {
        let sampling = Sampling {
            top_p: 0.0,
            ..Sampling::default()
        };
        let error = sampling.validate().unwrap_err();
        assert!(error.to_string().contains("top_p"), "{error}");
        let nan = Sampling {
            temperature: f32::NAN,
            ..Sampling::default()
        };
        assert!(nan.validate().is_err());
    }
}
