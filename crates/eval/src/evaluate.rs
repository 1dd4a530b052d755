//! An evaluation: losses on both sides of a split, what counting models reach on the same rows, and replies to held-out turns.

use std::path::{Path, PathBuf};

use corpus::Language;
use corpus::examples::{self, Encoding, TrainingStage};
use corpus::split::{Side, Split};
use engine::Sampling;
use model::Model;
use text::ChatEncoder;

use crate::baselines::baselines;
use crate::metric::known_words::Vocabulary;
use crate::metric::loss_gap;
use crate::progress::Progress;
use crate::replies::{Prompt, Speaker, held_out_prompts, replies};
use crate::report::{Baseline, Report, StageReport};
use crate::samples::samples;
use crate::score::{self, Score};
use crate::trained_rows::TrainedRows;
use crate::{Error, Result, Sample};

/// Tokens of a row where nobody knows how long the model's were in training: a recipe's default.
const ROW_TOKENS: usize = 5120;

/// What to evaluate with what.
pub struct Evaluation<'a> {
    /// The way from a conversation to ids, as the model was trained.
    pub encoder: &'a ChatEncoder,
    /// What the report calls the model.
    pub name: String,
    /// A plain sentence on what this model can and cannot be.
    pub note: String,
    /// What the model, or its adapter, was trained on, where that is known.
    pub trained: Option<&'a TrainedRows>,
    /// `split.json`, with the data sets beside it.
    pub split: &'a Path,
    /// Replies by language.
    pub n_replies: usize,
    /// Of the train probe, the choice of turns, and replies.
    pub seed: u64,
    /// How replies are drawn.
    pub sampling: Sampling,
    /// Languages to look at; none: all.
    pub languages: &'a [Language],
}

/// Rows to measure models on, one model after the other: a device needs room for one at a time.
pub struct Measurement<'e> {
    evaluation: &'e Evaluation<'e>,
    stages: Vec<StageRows>,
    /// Turns to answer, and the words of the story.
    prompts: Vec<Prompt>,
    vocabulary: Vocabulary,
}

/// What one data set gives: all that is held out, and a train probe of the same languages and lengths.
struct StageRows {
    name: &'static str,
    samples: Vec<Sample>,
    probe_not_recorded: Vec<String>,
    baselines: Vec<Baseline>,
}

/// Losses of a model on the rows of a measurement, by data set and row.
pub struct Losses(Vec<Vec<Score>>);

impl<'e> Measurement<'e> {
    /// Reads the rows that `evaluation` names, in the ids of models of `vocab_size`.
    ///
    /// # Errors
    /// Missing data sets or split, rows that do not fit.
    pub fn new(evaluation: &'e Evaluation<'e>, vocab_size: usize) -> Result<Self> {
        let path = evaluation.split;
        if !path.is_file() {
            return Err(Error::NoSplit { path: path.into() });
        }
        let split = Split::load(path)?;
        let corpus = path.parent().unwrap_or(Path::new("."));
        let mut measurement = Measurement {
            evaluation,
            stages: Vec::new(),
            prompts: Vec::new(),
            vocabulary: Vocabulary::default(),
        };
        let mut read = Vec::new();
        for (name, kind) in [("pt", TrainingStage::Cpt), ("sft", TrainingStage::Sft)] {
            let Some(path) = data_set(corpus, name) else {
                continue;
            };
            let encoding = encoding(evaluation, kind, vocab_size);
            let mut rows = examples::source(&path, Some(&split), encoding)?.examples;
            rows.retain(|row| {
                let code = row.encoded.origin.language.as_deref();
                let mut wanted = evaluation.languages.iter();
                evaluation.languages.is_empty()
                    || wanted.any(|language| Some(language.code()) == code)
            });
            if name == "pt" {
                measurement.vocabulary = Vocabulary::of(rows.iter().map(|row| row.text.as_str()));
            } else {
                measurement.prompts =
                    held_out_prompts(&rows, evaluation.n_replies, evaluation.seed);
            }
            let (samples, probe_not_recorded) = samples(&rows, evaluation.trained, evaluation.seed);
            require_both_sides(name, &samples)?;
            measurement.stages.push(StageRows {
                name,
                samples,
                probe_not_recorded,
                baselines: baselines(&rows, &read, evaluation.encoder.tokenizer().vocab_size()),
            });
            let train = rows
                .into_iter()
                .filter(|row| row.side == corpus::Side::Train);
            read.extend(train.map(|row| row.text));
        }
        if measurement.stages.is_empty() {
            return Err(Error::NoDataSet {
                split: path.into(),
                folder: corpus.into(),
            });
        }
        Ok(measurement)
    }

    /// Losses of a model on all rows; `label` is what the progress calls it.
    ///
    /// # Errors
    /// A model that fails.
    pub fn losses(
        &self,
        model: &Model,
        label: &str,
        progress: &mut dyn Progress,
    ) -> Result<Losses> {
        let known = self.evaluation.trained.and_then(|rows| rows.row_tokens);
        // What is longer than the model's context is cut, as a row of training cuts it.
        let context = model.config().max_position_embeddings;
        let row_tokens = known.unwrap_or(ROW_TOKENS).min(context);
        let tokenizer = Some(self.evaluation.encoder.tokenizer());
        let of_stage = |stage: &StageRows| {
            progress.begin(label, stage.samples.len() as u64);
            let scores = score::samples(model, tokenizer, &stage.samples, row_tokens, |done| {
                progress.advance(done as u64, stage.name)
            })?;
            progress.end();
            Ok(scores)
        };
        Ok(Losses(
            self.stages.iter().map(of_stage).collect::<Result<_>>()?,
        ))
    }

    /// The report on `model`, beside the losses that its base has on the same rows.
    ///
    /// # Errors
    /// A model that fails.
    pub fn report(
        self,
        model: Model,
        base: Option<Losses>,
        progress: &mut dyn Progress,
    ) -> Result<Report> {
        // 1. losses
        let losses = self.losses(&model, "losses", progress)?;
        let evaluation = self.evaluation;
        let mut bases = base.map(|losses| losses.0.into_iter());
        let stages = self.stages.into_iter().zip(losses.0);
        let stages: Vec<StageReport> = stages
            .map(|(stage, scores)| stage.report(&scores, bases.as_mut().and_then(Iterator::next)))
            .collect();

        // 2. replies, seeded, to turns that nobody trained on
        let n_params = model.config().n_params();
        let speaker = Speaker {
            encoder: evaluation.encoder,
            sampling: &evaluation.sampling,
            seed: evaluation.seed,
            vocabulary: &self.vocabulary,
        };
        let replies = replies(model, self.prompts, &speaker, progress)?;

        // 3. the report
        let shares: Vec<f64> = replies
            .iter()
            .filter_map(|reply| reply.known_words)
            .collect();
        let known_words = shares.iter().sum::<f64>() / shares.len() as f64;
        let is_flagged = |stage: &StageReport| stage.gaps.first().is_some_and(|gap| gap.red_flag);
        Ok(Report {
            model: evaluation.name.clone(),
            n_params,
            note: evaluation.note.clone(),
            version: format!("cyrene {}", env!("CARGO_PKG_VERSION")),
            split_sha256: files::sha256_of(evaluation.split)?,
            red_flag: stages.iter().any(is_flagged),
            stages,
            known_words: (!shares.is_empty()).then_some(known_words),
            replies,
        })
    }
}

impl StageRows {
    fn report(self, scores: &[Score], base: Option<Vec<Score>>) -> StageReport {
        let gaps = loss_gap::by_language(&self.samples, scores);
        let base = base.map(|scores| loss_gap::by_language(&self.samples, &scores));
        let gap_over_base = base
            .as_ref()
            .and_then(|base| Some((1.0 + gaps.first()?.gap) / (1.0 + base.first()?.gap) - 1.0));
        StageReport {
            stage: self.name,
            probe_not_recorded: self.probe_not_recorded,
            baselines: self.baselines,
            sides: loss_gap::by_side(&self.samples, scores),
            gaps,
            base,
            gap_over_base,
        }
    }
}

/// # Errors
/// Nothing to measure on the train side, or nothing that is held out.
fn require_both_sides(stage: &'static str, samples: &[Sample]) -> Result<()> {
    for (side, name) in [(Side::Train, "train"), (Side::Val, "held-out")] {
        let mut of_side = samples.iter().filter(|sample| sample.side == side);
        if !of_side.any(|sample| sample.encoded.n_targets() > 0) {
            return Err(Error::Empty { side: name, stage });
        }
    }
    Ok(())
}

/// How rows become ids: as they did in the training that is measured.
fn encoding<'a>(
    evaluation: &Evaluation<'a>,
    stage: TrainingStage,
    vocab_size: usize,
) -> Encoding<'a> {
    let trained = evaluation.trained;
    Encoding {
        stage,
        loss_scale: trained.map(|rows| rows.loss_scale).unwrap_or_default(),
        tokenizer: Some(evaluation.encoder.tokenizer()),
        vocab_size: Some(vocab_size),
        // Of all these rows only a sample is scored.
        row_tokens: None,
    }
}

/// The widest data set of a kind that stands beside the split.
fn data_set(corpus: &Path, kind: &str) -> Option<PathBuf> {
    const ORDER: [&str; 3] = ["cyrene", "amphoreus", "everything"];
    let mut found: Vec<PathBuf> = ORDER
        .iter()
        .map(|name| corpus.join(kind).join(name))
        .filter(|path| path.is_dir())
        .collect();
    // Story text: the widest set; conversations: the character's own.
    if kind == "pt" {
        found.pop()
    } else {
        found.into_iter().next()
    }
}

#[cfg(test)]
mod tests {
    use text::labels::LossScale;
    use text::{ChatTemplate, Tokenizer};

    use super::*;

    #[test]
    fn rows_become_ids_as_in_the_training_that_is_measured() {
        let encoder = ChatEncoder::new(
            Tokenizer::train(["who is there?"].into_iter(), 320).unwrap(),
            ChatTemplate::history_stable().unwrap(),
        );
        let loss_scale = |trained: Option<&TrainedRows>| {
            let evaluation = Evaluation {
                encoder: &encoder,
                name: String::new(),
                note: String::new(),
                trained,
                split: Path::new("split.json"),
                n_replies: 0,
                seed: 7,
                sampling: Sampling::default(),
                languages: &[],
            };
            encoding(&evaluation, TrainingStage::Sft, 320).loss_scale
        };
        let mut trained = TrainedRows::default();
        trained.loss_scale = LossScale::LastRound;
        assert_eq!(loss_scale(Some(&trained)), LossScale::LastRound);
        assert_eq!(loss_scale(None), LossScale::default());
    }
}
