//! `cyrene eval`: the losses of a model on both sides of a split, what counting models reach on the same rows, and replies to held-out turns.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use corpus::examples::{self, Encoding, SourceExample, TrainingStage};
use corpus::split::{Side as SplitSide, Split};
use engine::Request;
use eval::metric::char_ngram::CharNgram;
use eval::metric::known_words::Vocabulary;
use eval::metric::loss_gap::{self, Gap};
use eval::metric::unigram;
use eval::report::{Baseline, Reply, Report, StageReport};
use eval::score::{self, Score};
use eval::{Sample, Side};
use model::Model;
use text::labels::LossScale;
use text::probe::{Kind, matched};
use text::{Conversation, Message, Persona, PromptOptions, Role};

use crate::cli::Eval;
use crate::trained::TrainedRows;
use crate::ui::{Ui, of_rows};
use crate::{load, misuse, speak};

/// Rows of this many tokens are scored together.
const ROW_TOKENS: usize = 2048;
/// Longest reply.
const REPLY_TOKENS: usize = 128;

pub fn run(args: &Eval, ui: &Ui) -> Result<()> {
    let model = load::model(&args.model)?;
    let out = args
        .out
        .clone()
        .unwrap_or_else(|| args.model.model.with_file_name("eval"));
    let base = args
        .base
        .as_deref()
        .map(|dir| {
            let base = Model::load(dir, load::dtype(args.model.dtype))
                .with_context(|| format!("loading {}", dir.display()))?;
            Ok::<_, anyhow::Error>(base.to_device(model.device())?)
        })
        .transpose()?;
    let report = evaluate(
        &Evaluation {
            folder: &args.model.model,
            adapter: args.model.adapter.as_deref(),
            trained: TrainedRows::read(args.model.adapter.as_ref().unwrap_or(&args.model.model))?,
            split: &args.split,
            out: &out,
            n_replies: args.replies,
            seed: args.seed,
            profile: args.profile.as_deref(),
            persona: load::persona(&args.model.model, args.model.adapter.as_deref(), None)?,
        },
        model,
        base,
        ui,
    )?;
    ui.result(&report, || describe(&report, &out))
}

/// What to evaluate where.
pub struct Evaluation<'a> {
    /// Folder of the model: tokenizer, template, persona.
    pub folder: &'a Path,
    /// Folder of an adapter on top.
    pub adapter: Option<&'a Path>,
    /// What the model, or its adapter, was trained on.
    pub trained: Option<TrainedRows>,
    /// `split.json`, with the data sets beside it.
    pub split: &'a Path,
    pub out: &'a Path,
    /// Replies by language.
    pub n_replies: usize,
    pub seed: u64,
    /// Sampling profile of the replies; None: the persona's, else `Adopted`.
    pub profile: Option<&'a str>,
    /// Who speaks.
    pub persona: Persona,
}

/// Evaluates and writes `report.json`, `report.html`, `eval/replies.jsonl`.
///
/// # Errors
/// Missing data sets or split, rows that do not fit, a model that fails.
pub fn evaluate(
    evaluation: &Evaluation<'_>,
    model: Model,
    base: Option<Model>,
    ui: &Ui,
) -> Result<Report> {
    let encoder = load::chat_encoder(evaluation.folder, evaluation.adapter)?;
    let tokenizer = encoder.tokenizer();
    let persona = &evaluation.persona;
    if !evaluation.split.is_file() {
        misuse!(
            "{} is no file; `cyrene corpus split` writes one beside the data sets",
            evaluation.split.display()
        );
    }
    let split = Split::load(evaluation.split)?;
    let corpus = evaluation.split.parent().unwrap_or(Path::new("."));

    // 1. rows of both kinds: all that is held out, and a train probe of the same languages and lengths
    let mut stages = Vec::new();
    let mut prompts = Vec::new();
    let mut vocabulary = Vocabulary::default();
    for (name, kind) in [("pt", TrainingStage::Cpt), ("sft", TrainingStage::Sft)] {
        let Some(path) = data_set(corpus, name)? else {
            continue;
        };
        let encoding = Encoding {
            stage: kind,
            loss_scale: LossScale::IgnoreEmptyThink,
            tokenizer: Some(tokenizer),
            vocab_size: Some(model.config().vocab_size),
        };
        let rows = of_rows(examples::source(&path, Some(&split), encoding))?.examples;
        if name == "pt" {
            vocabulary = Vocabulary::of(rows.iter().map(|row| row.text.as_str()));
        } else {
            prompts = held_out_prompts(&rows, evaluation.n_replies, evaluation.seed);
        }
        stages.push(stage(
            name,
            &rows,
            evaluation,
            &model,
            base.as_ref(),
            tokenizer.vocab_size(),
            ui,
        )?);
    }
    if stages.is_empty() {
        misuse!(
            "no data set beside {}; `cyrene corpus build --out {}` makes them",
            evaluation.split.display(),
            corpus.display()
        );
    }

    // 2. replies, seeded, to turns that nobody trained on
    let n_params = model.config().n_params();
    let mut sampling = speak::profile(evaluation.profile, persona)?;
    speak::mask(&mut sampling, tokenizer);
    let engine = speak::engine(model, 1, None)?;
    let mut replies = Vec::new();
    let mut bar = ui.bar("replies", prompts.len() as u64);
    for (at, prompt) in prompts.into_iter().enumerate() {
        sampling.seed = Some(evaluation.seed + at as u64);
        let conversation = Conversation::new(prompt.messages.iter().cloned());
        let request = Request {
            ids: encoder.prompt(&conversation, PromptOptions::default())?,
            sampling: sampling.clone(),
            max_tokens: REPLY_TOKENS,
            stop_ids: tokenizer.end_ids(),
            ..Request::default()
        };
        let said = speak::reply(&engine, request, Some(tokenizer), |_| Ok(()))?;
        let text = said.text.unwrap_or_default();
        replies.push(Reply {
            language: prompt.language,
            scene: prompt.scene,
            prompt: prompt
                .messages
                .last()
                .map(|message| message.content.clone())
                .unwrap_or_default(),
            known_words: vocabulary.share(&text),
            reply: text,
            finish_reason: said.finish_reason.to_owned(),
        });
        bar.set(at as u64 + 1, "");
    }
    bar.finish();

    // 3. the report
    let shares: Vec<f64> = replies
        .iter()
        .filter_map(|reply| reply.known_words)
        .collect();
    let report = Report {
        model: persona
            .shown_name()
            .map_or_else(|| evaluation.folder.display().to_string(), str::to_owned),
        n_params,
        note: persona.shown_note().unwrap_or_default().to_owned(),
        version: format!("cyrene {}", env!("CARGO_PKG_VERSION")),
        split_sha256: files::sha256_of(evaluation.split)?,
        red_flag: stages
            .iter()
            .any(|stage| stage.gaps.first().is_some_and(|gap| gap.red_flag)),
        stages,
        known_words: (!shares.is_empty()).then(|| shares.iter().sum::<f64>() / shares.len() as f64),
        replies,
    };
    report.write(evaluation.out)?;
    Ok(report)
}

/// The widest data set of a kind that stands beside the split.
fn data_set(corpus: &Path, kind: &str) -> Result<Option<PathBuf>> {
    const ORDER: [&str; 3] = ["cyrene", "amphoreus", "everything"];
    let mut found: Vec<PathBuf> = ORDER
        .iter()
        .map(|name| corpus.join(kind).join(name))
        .filter(|path| path.is_dir())
        .collect();
    // Story text: the widest set; conversations: the character's own.
    Ok(if kind == "pt" {
        found.pop()
    } else {
        found.into_iter().next()
    })
}

fn stage(
    name: &'static str,
    rows: &[SourceExample],
    evaluation: &Evaluation<'_>,
    model: &Model,
    base: Option<&Model>,
    vocab_size: usize,
    ui: &Ui,
) -> Result<StageReport> {
    let (samples, probe_not_recorded) = samples(rows, evaluation.trained.as_ref(), evaluation.seed);
    for side in [Side::Train, Side::Val] {
        if !samples
            .iter()
            .any(|sample| sample.side == side && sample.targets() > 0)
        {
            let side = if side == Side::Train {
                "train"
            } else {
                "held-out"
            };
            return Err(eval::Error::Empty { side, stage: name }.into());
        }
    }
    let measure = |model: &Model, label: &str| -> Result<Vec<Score>> {
        let mut bar = ui.bar(label, samples.len() as u64);
        let scores = score::samples(model, &samples, ROW_TOKENS, |done| {
            bar.set(done as u64, name)
        })?;
        bar.finish();
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
        baselines: baselines(name, rows, vocab_size),
        gaps,
        sides,
        base,
        gap_over_base,
    })
}

/// Counting models see the whole train side, as training did.
fn baselines(name: &str, rows: &[SourceExample], vocab_size: usize) -> Vec<Baseline> {
    let all: Vec<Sample> = rows.iter().filter_map(sample).collect();
    let held_out =
        |scores: &[Score]| loss_gap::Loss::of(&all, scores, |sample| sample.side == Side::Val);
    let tokens = held_out(&unigram::scores(&all, vocab_size));
    let mut baselines = vec![Baseline {
        name: "token unigram",
        nats_per_token: Some(tokens.nats_per_token),
        bits_per_byte: tokens.bits_per_byte,
    }];
    if name == "pt" {
        let model = CharNgram::train(
            all.iter()
                .filter(|sample| sample.side == Side::Train)
                .map(|sample| sample.text.as_str()),
        );
        let (mut nll, mut bytes) = (0.0, 0);
        for sample in all.iter().filter(|sample| sample.side == Side::Val) {
            nll += model.nll(&sample.text);
            bytes += sample.text.len();
        }
        baselines.push(Baseline {
            name: "character 5-gram",
            nats_per_token: None,
            bits_per_byte: nll / std::f64::consts::LN_2 / bytes.max(1) as f64,
        });
    }
    baselines
}

/// Every held-out row, and for each of side `val` a train row of the same language and nearly the same length, ties broken by seed, from
/// those that were trained on. Languages of which `trained` has no row take any of the train side; they are named.
fn samples(
    rows: &[SourceExample],
    trained: Option<&TrainedRows>,
    seed: u64,
) -> (Vec<Sample>, Vec<String>) {
    let mut out: Vec<Sample> = rows
        .iter()
        .filter(|row| row.side.is_held_out())
        .filter_map(sample)
        .collect();
    // 1. by language the train side, and the part of it that was trained on
    let mut side: BTreeMap<String, (Vec<&SourceExample>, Vec<&SourceExample>)> = BTreeMap::new();
    for row in rows.iter().filter(|row| row.side == SplitSide::Train) {
        let language = row.language.clone().unwrap_or_default();
        let (all, known) = side.entry(language).or_default();
        all.push(row);
        if trained.is_some_and(|trained| trained.contains(&row.encoded.input_ids)) {
            known.push(row);
        }
    }
    // 2. what can be drawn, shuffled by seed
    let val = || rows.iter().filter(|row| row.side == SplitSide::Val);
    let wanted: BTreeSet<&str> = val()
        .map(|row| row.language.as_deref().unwrap_or_default())
        .collect();
    let mut not_recorded = Vec::new();
    let mut candidates = Vec::new();
    for (language, (all, known)) in side {
        if known.is_empty() && wanted.contains(language.as_str()) {
            candidates.extend(all);
            not_recorded.push(language);
        } else {
            candidates.extend(known);
        }
    }
    candidates.sort_by_cached_key(|row| {
        let scene = row.scene.as_deref().unwrap_or("");
        files::sha256(format!("{seed} {scene} {:?}", row.language).as_bytes())
    });
    // 3. one for each held-out row
    let probe = matched(val().map(kind), candidates.iter().copied().map(kind));
    out.extend(
        probe
            .into_iter()
            .filter_map(|place| sample(candidates[place])),
    );
    (out, not_recorded)
}

/// What a row's probe is matched by.
fn kind(row: &SourceExample) -> Kind<'_> {
    Kind {
        language: row.language.as_deref(),
        targets: row.encoded.n_targets(),
    }
}

/// A row as metrics take it; None for rows on neither side.
pub fn sample(row: &SourceExample) -> Option<Sample> {
    Some(Sample {
        scene: row.scene.clone().unwrap_or_default(),
        language: row.language.clone().unwrap_or_default(),
        side: match row.side {
            SplitSide::Val => Side::Val,
            SplitSide::ValStrict => Side::ValStrict,
            SplitSide::ProbeX => Side::ProbeX,
            SplitSide::Train => Side::Train,
            SplitSide::Contaminated | SplitSide::Filtered => return None,
        },
        encoded: row.encoded.clone(),
        bytes: row.bytes,
        text: row.text.clone(),
    })
}

/// A conversation up to the turn that the model shall say.
struct Prompt {
    language: String,
    scene: String,
    messages: Vec<Message>,
}

/// The first rounds of held-out conversations, `n` a language, drawn by seed.
fn held_out_prompts(rows: &[SourceExample], n: usize, seed: u64) -> Vec<Prompt> {
    let mut rows: Vec<&SourceExample> = rows
        .iter()
        .filter(|row| row.side == SplitSide::Val)
        .collect();
    rows.sort_by_cached_key(|row| {
        files::sha256(format!("{seed} {}", row.scene.as_deref().unwrap_or("")).as_bytes())
    });
    let mut taken: BTreeMap<String, usize> = Default::default();
    let mut prompts = Vec::new();
    for row in rows {
        let language = row.language.clone().unwrap_or_default();
        let Some(at) = row
            .messages
            .iter()
            .position(|message| message.role == Role::User && !message.content.trim().is_empty())
        else {
            continue;
        };
        let taken = taken.entry(language.clone()).or_default();
        if *taken < n {
            *taken += 1;
            prompts.push(Prompt {
                language,
                scene: row.scene.clone().unwrap_or_default(),
                messages: row.messages[..=at].to_vec(),
            });
        }
    }
    prompts.sort_by(|a, b| a.language.cmp(&b.language));
    prompts
}

/// A few lines for the terminal.
pub fn describe(report: &Report, out: &Path) -> String {
    let mut text = String::new();
    for stage in &report.stages {
        let all: &Gap = match stage.gaps.first() {
            Some(all) => all,
            None => continue,
        };
        text.push_str(&format!(
            "{}: held-out {:.4} nats a token, {:.3} bits a byte; gap {:+.1} %",
            stage.stage,
            all.held_out.nats_per_token,
            all.held_out.bits_per_byte,
            100.0 * all.gap
        ));
        if let Some(base) = stage.base.as_ref().and_then(|base| base.first()) {
            text.push_str(&format!(
                "; before training {:.4}",
                base.held_out.nats_per_token
            ));
        }
        for baseline in &stage.baselines {
            text.push_str(&format!(
                "; {} {:.3} bits a byte",
                baseline.name, baseline.bits_per_byte
            ));
        }
        if let Some(all) = stage.sides.first() {
            for (name, loss) in [("val-strict", all.val_strict), ("probe-x", all.probe_x)] {
                if let Some(loss) = loss {
                    text.push_str(&format!("; {name} {:.3} bits a byte", loss.bits_per_byte));
                }
            }
            if let Some(transfer) = all.transfer {
                text.push_str(&format!("; X {transfer:+.3}"));
            }
        }
        text.push('\n');
    }
    if report.red_flag {
        text.push_str("RED FLAG: the gap is above 10 %\n");
    }
    text.push_str(&out.join("report.html").display().to_string());
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use text::labels::Encoded;

    fn row(id: u32, language: &str, side: SplitSide) -> SourceExample {
        SourceExample {
            encoded: Encoded {
                input_ids: vec![id; 4],
                labels: vec![id as i32; 4],
            },
            language: Some(language.to_owned()),
            scene: Some(format!("s{id}")),
            side,
            bytes: 4,
            text: String::new(),
            messages: Vec::new(),
        }
    }

    #[test]
    fn train_probe_is_drawn_from_rows_that_were_trained_on() {
        let mut rows: Vec<SourceExample> =
            (0..20).map(|id| row(id, "en", SplitSide::Train)).collect();
        rows.extend((20..30).map(|id| row(id, "chs", SplitSide::Train)));
        rows.extend((30..33).map(|id| row(id, "en", SplitSide::Val)));
        rows.extend((40..42).map(|id| row(id, "chs", SplitSide::Val)));
        let probe = |trained: Option<&TrainedRows>| -> (Vec<u32>, Vec<String>) {
            let (samples, not_recorded) = samples(&rows, trained, 7);
            let probe = samples.iter().filter(|s| s.side == Side::Train);
            let mut ids: Vec<u32> = probe.map(|s| s.encoded.input_ids[0]).collect();
            ids.sort_unstable();
            (ids, not_recorded)
        };
        let mut trained = TrainedRows::default();
        for id in [3, 5, 7, 9] {
            trained.insert(&[id; 4]);
        }
        // Three of the four English ones; of Chinese nothing is known.
        let (ids, not_recorded) = probe(Some(&trained));
        assert_eq!(ids.len(), 5);
        assert!(ids[..3].iter().all(|id| [3, 5, 7, 9].contains(id)));
        assert!(ids[3..].iter().all(|id| (20..30).contains(id)));
        assert_eq!(not_recorded, ["chs"]);
        // Without a record: any of the train side, and it is said.
        let (ids, not_recorded) = probe(None);
        assert_eq!(ids.len(), 5);
        assert_eq!(not_recorded, ["chs", "en"]);
    }

    #[test]
    fn train_probe_has_rows_as_long_as_the_held_out_ones() {
        let of_length = |id: u32, n: usize, side| SourceExample {
            encoded: Encoded {
                input_ids: vec![id; n],
                labels: vec![id as i32; n],
            },
            ..row(id, "en", side)
        };
        let mut rows: Vec<SourceExample> = (0..200)
            .map(|id| of_length(id, 2 + id as usize, SplitSide::Train))
            .collect();
        rows.extend([150, 90, 151].map(|n| of_length(300 + n as u32, n, SplitSide::Val)));
        let (samples, _) = samples(&rows, None, 7);
        let lengths: Vec<usize> = samples.iter().map(Sample::targets).collect();
        // The held-out rows, then a train row for each.
        assert_eq!(lengths, [149, 89, 150, 149, 89, 150]);
        assert!(samples[3..].iter().all(|s| s.side == Side::Train));
    }
}
