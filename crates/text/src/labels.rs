//! Training rows: ids and which of them carry loss, as ms-swift 4.6 encodes for its template `qwen3_5`.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::chat_template::{ChatTemplate, RenderOptions};
use crate::conversation::{Conversation, Message, Part, Turn, strip};
use crate::error::{Error, Result};
use crate::tokenizer::{TURN_END, Tokenizer};

/// Label of a position without loss.
pub const IGNORE: i32 = -100;

/// One document or conversation as training sees it.
/// `labels[t]` is `input_ids[t]` where that id is to be predicted (from the ids before it) and [`IGNORE`] elsewhere; position 0 is always ignored.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Encoded {
    pub input_ids: Vec<u32>,
    pub labels: Vec<i32>,
}

impl Encoded {
    /// Number of ids that carry loss.
    pub fn n_trained(&self) -> usize {
        self.labels.iter().filter(|&&l| l != IGNORE).count()
    }

    /// Positions that a model is asked for: labels of all but the first position, which nothing comes before.
    pub fn n_targets(&self) -> u64 {
        let labels = self.labels.iter().skip(1);
        labels.filter(|&&label| label != IGNORE).count() as u64
    }

    /// The ids that carry loss, in order.
    pub fn trained_ids(&self) -> impl Iterator<Item = u32> {
        let pairs = self.input_ids.iter().zip(&self.labels);
        pairs.filter(|&(_, &l)| l != IGNORE).map(|(&id, _)| id)
    }
}

/// Which parts of the answers carry loss.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LossScale {
    /// Every answer and its end, but not an empty think block (ms-swift 4.6: `default+ignore_empty_think`).
    #[default]
    IgnoreEmptyThink,
    /// Every answer and its end, the empty think block too (ms-swift 4.2 and 4.3: `default`).
    Default,
    /// The last answer only; earlier ones stand without their think block (`last_round+ignore_empty_think`).
    LastRound,
}

/// How a conversation becomes a row.
#[derive(Clone, Copy, Debug)]
pub struct SftOptions<'a> {
    pub loss_scale: LossScale,
    /// Put an empty think block in front of answers without thoughts (ms-swift: `add_non_thinking_prefix`).
    pub empty_think_prefix: bool,
    /// Tools, told in the words of the given template.
    pub tools: Option<(&'a ChatTemplate, &'a [Value])>,
}

impl Default for SftOptions<'_> {
    fn default() -> Self {
        LossScale::default().into()
    }
}

impl From<LossScale> for SftOptions<'_> {
    fn from(loss_scale: LossScale) -> Self {
        SftOptions {
            loss_scale,
            empty_think_prefix: true,
            tools: None,
        }
    }
}

/// Encodes a conversation: an answer that is not trained is masked with its end, save the end of the last answer.
/// The ids are those of [`ChatTemplate::history_stable`] (except under `LastRound`).
/// Source: ms-swift 4.6.0, template `qwen3_5`.
///
/// # Errors
/// [`Error::NoFinalAnswer`] if no answer ends the conversation; as [`Tokenizer::encode`].
pub fn sft<'a>(
    tokenizer: &Tokenizer,
    conversation: &Conversation,
    options: impl Into<SftOptions<'a>>,
) -> Result<Encoded> {
    let options = options.into();
    if !conversation.ends_with_answer() {
        let index = conversation.n_messages.saturating_sub(1);
        return Err(Error::NoFinalAnswer { index });
    }
    let mut segments = Segments::default();
    segments.push(&system_block(&conversation.system, &options)?, false);
    let n_rounds = conversation.turns.len() / 2;
    for (round_idx, round) in conversation.turns.chunks_exact(2).enumerate() {
        let (user, answer) = (round[0].text(), &round[1]);
        let opening = format!("<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n");
        segments.push(&opening, false);
        push_answer(&mut segments, answer, round_idx + 1 == n_rounds, &options);
    }
    segments.encode(tokenizer)
}

/// Encodes a document for continued pre-training: the stripped text and `<|im_end|>`, loss on all but the first id.
/// Source: ms-swift 4.6.0, `swift pt`.
///
/// # Errors
/// As [`Tokenizer::encode`].
pub fn pt(tokenizer: &Tokenizer, text: &str) -> Result<Encoded> {
    pt_with_end(tokenizer, text, tokenizer.eos())
}

/// [`pt`] with another last id, such as that of `<|endoftext|>`.
///
/// # Errors
/// As [`Tokenizer::encode`].
pub fn pt_with_end(tokenizer: &Tokenizer, text: &str, end_id: u32) -> Result<Encoded> {
    let mut input_ids = tokenizer.encode(strip(text))?;
    input_ids.push(end_id);
    let mut labels: Vec<i32> = input_ids.iter().map(|&id| id as i32).collect();
    labels[0] = IGNORE;
    Ok(Encoded { input_ids, labels })
}

/// UTF-8 bytes of the text behind the ids that carry loss, the divisor of bits per byte; added tokens count 0.
pub fn text_bytes(tokenizer: &Tokenizer, encoded: &Encoded) -> usize {
    let mut bytes = Vec::new();
    for id in encoded.trained_ids().filter(|&id| !tokenizer.is_added(id)) {
        tokenizer.append_bytes(id, false, &mut bytes);
    }
    bytes.len()
}

/// What a person checks at a glance: `·` for each id without loss, the text for the others.
///
/// # Errors
/// As [`Tokenizer::decode`].
pub fn preview(tokenizer: &Tokenizer, encoded: &Encoded) -> Result<String> {
    let mut text = String::new();
    let mut run = Vec::new();
    for (&id, &label) in encoded.input_ids.iter().zip(&encoded.labels) {
        if label == IGNORE {
            text.push_str(&tokenizer.decode(&run, false)?);
            run.clear();
            text.push('·');
        } else {
            run.push(id);
        }
    }
    text.push_str(&tokenizer.decode(&run, false)?);
    Ok(text)
}

/// Text pieces with and without loss; neighbours of one kind are joined before encoding, as tokens may span them.
#[derive(Default)]
struct Segments(Vec<(String, bool)>);

impl Segments {
    fn push(&mut self, text: &str, trained: bool) {
        match self.0.last_mut() {
            Some((last, kind)) if *kind == trained => last.push_str(text),
            _ => self.0.push((text.to_owned(), trained)),
        }
    }

    fn encode(self, tokenizer: &Tokenizer) -> Result<Encoded> {
        let mut encoded = Encoded::default();
        for (text, trained) in self.0 {
            let ids = tokenizer.encode(&text)?;
            let labels = ids
                .iter()
                .map(|&id| if trained { id as i32 } else { IGNORE });
            encoded.labels.extend(labels);
            encoded.input_ids.extend(ids);
        }
        if let Some(first) = encoded.labels.first_mut() {
            *first = IGNORE;
        }
        Ok(encoded)
    }
}

fn system_block(system: &str, options: &SftOptions) -> Result<String> {
    let Some((template, tools)) = options.tools else {
        return Ok(if system.is_empty() {
            String::new()
        } else {
            format!("<|im_start|>system\n{system}<|im_end|>\n")
        });
    };
    // The wording belongs to the template: render it before an empty question, and keep what stands before that.
    let mut messages = vec![Message::user("")];
    if !system.is_empty() {
        messages.insert(0, Message::system(system));
    }
    let render_options = RenderOptions {
        tools: Some(tools.to_vec()),
        ..RenderOptions::default()
    };
    let mut text = template.render(&Conversation::new(messages), &render_options)?;
    text.truncate(text.rfind("<|im_start|>user").unwrap_or(text.len()));
    Ok(text)
}

fn push_answer(segments: &mut Segments, answer: &Turn, is_last: bool, options: &SftOptions) {
    let last_round_only = options.loss_scale == LossScale::LastRound;
    let said = answer.text();
    if last_round_only && !is_last {
        segments.push(&format!("{said}{TURN_END}\n"), false);
        return;
    }
    let is_trained = |part: Option<&Part>| part.is_some_and(|part| part.is_trained);
    // 1. the think block, then what is said
    let thoughts = match &answer.thoughts {
        None if options.empty_think_prefix => Some(""),
        thoughts => thoughts.as_deref(),
    };
    if let Some(thoughts) = thoughts {
        let is_masked = thoughts.is_empty() && options.loss_scale != LossScale::Default;
        let block = format!("<think>\n{thoughts}\n</think>\n\n");
        segments.push(&block, is_trained(answer.parts.first()) && !is_masked);
    }
    for part in &answer.parts {
        segments.push(&part.text, part.is_trained);
    }
    // 2. its end
    if !(is_last && said.ends_with(TURN_END)) {
        let is_trained = is_trained(answer.parts.last()) || is_last;
        segments.push(&format!("{TURN_END}\n"), is_trained);
    }
}
