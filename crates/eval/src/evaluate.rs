//! An evaluation: losses on both sides of a split, what counting models reach on the same rows, and replies to held-out turns.

use std::path::{Path, PathBuf};

use corpus::Language;
use corpus::examples::{self, Encoding, SourceExample, TrainingStage};
use corpus::split::{Side, Split};
use engine::Sampling;
use model::Model;
use text::ChatEncoder;

use crate::baselines::baselines;
use crate::metric::known_words::Vocabulary;
use crate::metric::loss_gap;
use crate::progress::Progress;
use crate::replies::{Speaker, held_out_prompts, replies};
use crate::report::{Report, StageReport};
use crate::samples::samples;
use crate::score::{self, Score};
use crate::trained_rows::TrainedRows;
use crate::{Error, Result};

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

/// Measures `model`, and `base` on the same rows.
///
/// # Errors
/// Missing data sets or split, rows that do not fit, a model that fails.
pub fn evaluate(
    evaluation: &Evaluation<'_>,
    model: Model,
    base: Option<Model>,
    progress: &mut dyn Progress,
) -> Result<Report> {
    let path = evaluation.split;
    if !path.is_file() {
        return Err(Error::NoSplit { path: path.into() });
    }
    let split = Split::load(path)?;
    let corpus = path.parent().unwrap_or(Path::new("."));

    // 1. rows of both kinds: all that is held out, and a train probe of the same languages and lengths
    let mut stages = Vec::new();
    let mut prompts = Vec::new();
    let mut vocabulary = Vocabulary::default();
    let mut read = Vec::new();
    for (name, kind) in [("pt", TrainingStage::Cpt), ("sft", TrainingStage::Sft)] {
        let Some(path) = data_set(corpus, name) else {
            continue;
        };
        let encoding = encoding(evaluation, kind, model.config().vocab_size);
        let mut rows = examples::source(&path, Some(&split), encoding)?.examples;
        rows.retain(|row| {
            let code = row.encoded.origin.language.as_deref();
            let mut wanted = evaluation.languages.iter();
            evaluation.languages.is_empty() || wanted.any(|language| Some(language.code()) == code)
        });
        if name == "pt" {
            vocabulary = Vocabulary::of(rows.iter().map(|row| row.text.as_str()));
        } else {
            prompts = held_out_prompts(&rows, evaluation.n_replies, evaluation.seed);
        }
        let models = (&model, base.as_ref());
        let baselines = baselines(&rows, &read, evaluation.encoder.tokenizer().vocab_size());
        stages.push(StageReport {
            baselines,
            ..stage(name, &rows, evaluation, models, progress)?
        });
        let train = rows
            .into_iter()
            .filter(|row| row.side == corpus::Side::Train);
        read.extend(train.map(|row| row.text));
    }
    if stages.is_empty() {
        return Err(Error::NoDataSet {
            split: path.into(),
            folder: corpus.into(),
        });
    }

    // 2. replies, seeded, to turns that nobody trained on
    let n_params = model.config().n_params();
    let speaker = Speaker {
        encoder: evaluation.encoder,
        sampling: &evaluation.sampling,
        seed: evaluation.seed,
        vocabulary: &vocabulary,
    };
    let replies = replies(model, prompts, &speaker, progress)?;

    // 3. the report
    let shares: Vec<f64> = replies
        .iter()
        .filter_map(|reply| reply.known_words)
        .collect();
    Ok(Report {
        model: evaluation.name.clone(),
        n_params,
        note: evaluation.note.clone(),
        version: format!("cyrene {}", env!("CARGO_PKG_VERSION")),
        split_sha256: files::sha256_of(path)?,
        red_flag: stages
            .iter()
            .any(|stage| stage.gaps.first().is_some_and(|gap| gap.red_flag)),
        stages,
        known_words: (!shares.is_empty()).then(|| shares.iter().sum::<f64>() / shares.len() as f64),
        replies,
    })
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

fn stage(
    name: &'static str,
    rows: &[SourceExample],
    evaluation: &Evaluation<'_>,
    models: (&Model, Option<&Model>),
    progress: &mut dyn Progress,
) -> Result<StageReport> {
    let (model, base) = models;
    let (samples, probe_not_recorded) = samples(rows, evaluation.trained, evaluation.seed);
    for side in [Side::Train, Side::Val] {
        if !samples
            .iter()
            .any(|sample| sample.side == side && sample.encoded.n_targets() > 0)
        {
            let side = if side == Side::Train {
                "train"
            } else {
                "held-out"
            };
            return Err(Error::Empty { side, stage: name });
        }
    }
    let known = evaluation.trained.and_then(|rows| rows.row_tokens);
    let row_tokens = known.unwrap_or(ROW_TOKENS);
    let mut measure = |model: &Model, label: &str| -> Result<Vec<Score>> {
        progress.begin(label, samples.len() as u64);
        let tokenizer = Some(evaluation.encoder.tokenizer());
        let scores = score::samples(model, tokenizer, &samples, row_tokens, |done| {
            progress.advance(done as u64, name)
        })?;
        progress.end();
        Ok(scores)
    };
    let scores = measure(model, "losses")?;
    let gaps = loss_gap::by_language(&samples, &scores);
    let sides = loss_gap::by_side(&samples, &scores);
    let base = base
        .map(|base| measure(base, "base"))
        .transpose()?
        .map(|scores| loss_gap::by_language(&samples, &scores));
    let gap_over_base = base
        .as_ref()
        .and_then(|base| Some((1.0 + gaps.first()?.gap) / (1.0 + base.first()?.gap) - 1.0));
    Ok(StageReport {
        stage: name,
        probe_not_recorded,
        baselines: Vec::new(),
        gaps,
        sides,
        base,
        gap_over_base,
    })
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
