//! Training rows: ids and which of them carry loss, as ms-swift 4.6 encodes for its template `qwen3_5`.

use std::borrow::Cow;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::added_tokens::Added;
use crate::chat_template::{ChatTemplate, RenderOptions};
use crate::conversation::{Conversation, Message, Part, Turn, strip};
use crate::error::{Error, Result};
use crate::example::{Example, IGNORE, Round};
use crate::tokenizer::{TURN_END, Tokenizer};

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

/// What an added token (`<think>`, `<|im_end|>`, ..) becomes that a content spells.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Contents {
    /// Text, to the letter: the rule, as in prompts.
    #[default]
    AreText,
    /// The token, and a last answer that spells `<|im_end|>` at its end gets none, as ms-swift does, for which template and contents are
    /// one text; only for holding the rows recorded from it against ours.
    AsMsSwift,
}

/// How a conversation becomes a row.
#[derive(Clone, Copy, Debug)]
pub struct SftOptions<'a> {
    /// Which parts of answers carry loss.
    pub loss_scale: LossScale,
    /// Put an empty think block in front of answers without thoughts (ms-swift: `add_non_thinking_prefix`).
    pub empty_think_prefix: bool,
    /// Tools, told in the words of the given template.
    pub tools: Option<(&'a ChatTemplate, &'a [Value])>,
    /// What added tokens become that contents spell.
    pub contents: Contents,
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
            contents: Contents::default(),
        }
    }
}

/// Encodes a conversation: an answer that is not trained is masked with its end, save the end of the last answer.
/// The ids are those of prompts by [`ChatTemplate::history_stable`] (except under `LastRound`): added tokens that contents spell are text.
/// Source: ms-swift 4.6.0, template `qwen3_5`, save for what contents spell ([`Contents`]).
///
/// # Errors
/// [`Error::NoFinalAnswer`] if no answer ends the conversation; as [`Tokenizer::encode`].
pub fn sft<'a>(
    tokenizer: &Tokenizer,
    conversation: &Conversation,
    options: impl Into<SftOptions<'a>>,
) -> Result<Example> {
    Ok(segments(tokenizer, conversation, &options.into())?.encode(tokenizer))
}

/// Tokens of a conversation as training sees it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SftCounts {
    /// All of them, with what the template writes between the contents.
    pub tokens: usize,
    /// Those that carry loss.
    pub trained: usize,
}

/// How many ids [`sft`] gives, and how many of them carry loss.
///
/// # Errors
/// As [`sft`].
pub fn sft_counts<'a>(
    tokenizer: &Tokenizer,
    conversation: &Conversation,
    options: impl Into<SftOptions<'a>>,
) -> Result<SftCounts> {
    let segments = segments(tokenizer, conversation, &options.into())?;
    let mut counts = SftCounts::default();
    for (text, is_trained) in &segments.texts {
        let n = tokenizer.n_ids(text, segments.added);
        counts.tokens += n;
        counts.trained += if *is_trained { n } else { 0 };
    }
    Ok(counts)
}

/// The text of a conversation, parted by what carries loss.
fn segments(
    tokenizer: &Tokenizer,
    conversation: &Conversation,
    options: &SftOptions<'_>,
) -> Result<Segments> {
    if !conversation.ends_with_answer() {
        let index = conversation.n_messages.saturating_sub(1);
        return Err(Error::NoFinalAnswer { index });
    }
    let (conversation, added) = match options.contents {
        Contents::AreText => (
            Cow::Owned(conversation.escaped(tokenizer)),
            Added::Unescaped,
        ),
        Contents::AsMsSwift => (Cow::Borrowed(conversation), Added::All),
    };
    let mut segments = Segments {
        added,
        texts: Vec::new(),
        marks: Vec::new(),
    };
    segments.push(&system_block(&conversation.system, options)?, false);
    let n_rounds = conversation.turns.len() / 2;
    for (round_idx, round) in conversation.turns.chunks_exact(2).enumerate() {
        let (user, answer) = (round[0].text(), &round[1]);
        let opening = format!("<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n");
        segments.mark();
        segments.push(&opening, false);
        push_answer(&mut segments, answer, round_idx + 1 == n_rounds, options);
    }
    Ok(segments)
}

/// Encodes a document for continued pre-training: the stripped text, in which added tokens are text, and `<|im_end|>`, loss on all but the
/// first id.
/// Source: ms-swift 4.6.0, `swift pt`, save for what the text spells ([`Contents`]).
///
/// # Errors
/// As [`Tokenizer::encode`].
pub fn pt(tokenizer: &Tokenizer, text: &str) -> Result<Example> {
    pt_with_end(tokenizer, text, tokenizer.eos(), Contents::default())
}

/// [`pt`] with another last id, such as that of `<|endoftext|>`, and with added tokens in the text as `contents` says.
///
/// # Errors
/// As [`Tokenizer::encode`].
pub fn pt_with_end(
    tokenizer: &Tokenizer,
    text: &str,
    end_id: u32,
    contents: Contents,
) -> Result<Example> {
    let mut input_ids = match contents {
        Contents::AreText => tokenizer.encode_ordinary(strip(text))?,
        Contents::AsMsSwift => tokenizer.encode(strip(text))?,
    };
    input_ids.push(end_id);
    let mut labels: Vec<i32> = input_ids.iter().map(|&id| id as i32).collect();
    labels[0] = IGNORE;
    Ok(Example::document(input_ids, labels))
}

/// UTF-8 bytes of the text behind the ids that carry loss, the divisor of bits per byte; added tokens count 0.
pub fn text_bytes(tokenizer: &Tokenizer, encoded: &Example) -> usize {
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
pub fn preview(tokenizer: &Tokenizer, encoded: &Example) -> Result<String> {
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
struct Segments {
    /// What is an added token in them.
    added: Added,
    /// Text and whether it carries loss.
    texts: Vec<(String, bool)>,
    /// Where rounds begin, and what is said in them: segment and byte in it, in turn.
    marks: Vec<(usize, usize)>,
}

impl Segments {
    fn push(&mut self, text: &str, trained: bool) {
        match self.texts.last_mut() {
            Some((last, kind)) if *kind == trained => last.push_str(text),
            _ => self.texts.push((text.to_owned(), trained)),
        }
    }

    /// Remembers the place of what comes next; a token begins there.
    fn mark(&mut self) {
        let last = self.texts.last().map(|(text, _)| text.len());
        let place = (self.texts.len().saturating_sub(1), last.unwrap_or(0));
        self.marks.push(place);
    }

    fn encode(self, tokenizer: &Tokenizer) -> Example {
        let mut example = Example::default();
        let mut starts = Vec::with_capacity(self.marks.len());
        let mut marks = self.marks.into_iter().peekable();
        for (idx, (text, trained)) in self.texts.iter().enumerate() {
            let first = example.input_ids.len();
            example.input_ids.extend(tokenizer.ids(text, self.added));
            let ids = &example.input_ids[first..];
            while let Some((_, at)) = marks.next_if(|(segment, _)| *segment == idx) {
                // Tokens before a mark are those of the text before it: marks stand where words part.
                let before = if at == text.len() {
                    ids.len()
                } else {
                    tokenizer.n_ids(&text[..at], self.added)
                };
                starts.push(first + before);
            }
            let labels = ids.iter();
            let labels = labels.map(|&id| if *trained { id as i32 } else { IGNORE });
            example.labels.extend(labels);
        }
        if let Some(first) = example.labels.first_mut() {
            *first = IGNORE;
        }
        let (rounds, _) = starts.as_chunks::<2>();
        example.rounds = rounds
            .iter()
            .map(|&[start, said]| Round { start, said })
            .collect();
        example
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
        segments.mark();
        segments.push(&format!("{said}{TURN_END}\n"), false);
        return;
    }
    // 1. the think block, then what is said
    push_thoughts(segments, answer, options);
    segments.mark();
    for part in &answer.parts {
        segments.push(&part.text, part.is_trained);
    }
    // 2. its end
    let ends_itself = options.contents == Contents::AsMsSwift && said.ends_with(TURN_END);
    if !(is_last && ends_itself) {
        let is_trained = is_trained(answer.parts.last()) || is_last;
        segments.push(&format!("{TURN_END}\n"), is_trained);
    }
}

/// A think block: thoughts carry loss as the message that they came with does, the marks as the thoughts beside them.
fn push_thoughts(segments: &mut Segments, answer: &Turn, options: &SftOptions) {
    let thoughts = &answer.thoughts;
    if thoughts.is_empty() && !options.empty_think_prefix {
        return;
    }
    // A block that nobody wrote is the first message's.
    let first = is_trained(thoughts.first().or(answer.parts.first()));
    let last = is_trained(thoughts.last().or(answer.parts.first()));
    let is_masked = answer.thoughts_text().is_empty() && options.loss_scale != LossScale::Default;
    segments.push("<think>\n", first && !is_masked);
    for part in thoughts {
        segments.push(&part.text, part.is_trained && !is_masked);
    }
    segments.push("\n</think>\n\n", last && !is_masked);
}

fn is_trained(part: Option<&Part>) -> bool {
    part.is_some_and(|part| part.is_trained)
}
