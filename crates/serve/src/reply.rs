//! From token events to what a client may see: text in whole characters, cut at stop strings, with the tokens behind it.

use std::collections::VecDeque;

use engine::Scored;
use serde_json::{Value, json};
use text::{StreamDecoder, Tokenizer};

use crate::lines::{Line, LineMeter};
use crate::stop::StopStrings;

/// JSON has no infinity; OpenAI writes this for what cannot happen.
const LEAST_LOGPROB: f32 = -9999.0;

/// How a reply is to be reported.
#[derive(Debug, Clone, Default)]
pub(crate) struct ReplyOptions {
    pub stops: Vec<String>,
    /// What stopped the reply is part of its text.
    pub include_stop: bool,
    /// Tokens in which no stop string is looked for.
    pub min_tokens: usize,
    /// Special tokens in the text (`<|im_end|>`), for clients that asked for them.
    pub keep_special: bool,
    pub logprobs: bool,
    /// The token that stopped the reply is among its tokens, as the older shape of log-probabilities has it.
    pub stop_logprob: bool,
    pub lines: bool,
}

/// The state of one growing reply.
pub(crate) struct Reply {
    tokenizer: Tokenizer,
    decoder: StreamDecoder,
    stops: StopStrings,
    meter: Option<LineMeter>,
    options: ReplyOptions,
    n_tokens: usize,
    /// Tokens whose text is not wholly shown yet.
    waiting: VecDeque<Waiting>,
    /// Bytes of text decoded and shown so far.
    n_decoded: usize,
    n_shown: usize,
    /// Characters of text decoded so far, an echoed prompt's among them.
    n_chars: usize,
}

struct Waiting {
    start: usize,
    piece: String,
    logprob: f32,
    shown: Option<TokenLogprob>,
}

/// What became visible by one event.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Delta {
    pub text: String,
    /// The tokens behind the text, if asked for.
    pub tokens: Vec<TokenLogprob>,
    /// The lines that ended, if asked for.
    pub lines: Vec<Line>,
    /// A stop string came.
    pub stopped: bool,
}

/// A token with its log-probability, spelt out.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct TokenLogprob {
    pub spelling: Spelling,
    /// `None` for a prompt's first token, of which nothing is said.
    pub logprob: Option<f32>,
    pub top: Vec<(Spelling, f32)>,
    /// Where its text begins in the reply, in characters.
    pub offset: usize,
}

/// A token's bytes, and their text as far as they are UTF-8.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Spelling {
    pub text: String,
    pub bytes: Vec<u8>,
}

impl Reply {
    pub fn new(tokenizer: &Tokenizer, options: &ReplyOptions) -> Self {
        Reply {
            tokenizer: tokenizer.clone(),
            decoder: StreamDecoder::new(tokenizer, !options.keep_special),
            stops: StopStrings::new(options.stops.clone(), options.include_stop),
            meter: options.lines.then(LineMeter::default),
            options: options.clone(),
            n_tokens: 0,
            waiting: VecDeque::new(),
            n_decoded: 0,
            n_shown: 0,
            n_chars: 0,
        }
    }

    /// The prompt as the beginning of the reply: its text, and its tokens if asked for. `scored` from the second token on.
    pub fn echo(&mut self, text: String, ids: &[u32], scored: &[Scored]) -> Delta {
        let mut delta = Delta::default();
        if self.options.logprobs {
            let mut decoder = StreamDecoder::new(&self.tokenizer, false);
            let scores = std::iter::once(None).chain(scored.iter().map(Some));
            for (id, score) in ids.iter().zip(scores) {
                delta.tokens.push(TokenLogprob {
                    logprob: score.map(|score| score.logprob.max(LEAST_LOGPROB)),
                    top: score.map_or_else(Vec::new, |score| self.spell_all(&score.top)),
                    spelling: self.spell(*id),
                    offset: self.n_chars,
                });
                self.n_chars += decoder.push(*id).chars().count();
            }
        }
        self.n_chars = text.chars().count();
        delta.text = text;
        delta
    }

    /// Takes a token; gives what it makes visible. After `stopped` nothing may be pushed any more.
    pub fn push(&mut self, id: u32, logprob: f32, top: &[(u32, f32)]) -> Delta {
        self.n_tokens += 1;
        let piece = self.decoder.push(id);
        let shown = self.options.logprobs.then(|| TokenLogprob {
            spelling: self.spell(id),
            logprob: Some(logprob.max(LEAST_LOGPROB)),
            top: self.spell_all(top),
            offset: self.n_chars,
        });
        self.waiting.push_back(Waiting {
            start: self.n_decoded,
            piece: piece.clone(),
            logprob,
            shown,
        });
        self.n_decoded += piece.len();
        self.n_chars += piece.chars().count();
        if self.n_tokens <= self.options.min_tokens {
            return self.reveal(piece, false);
        }
        let next = self.stops.push(&piece);
        self.reveal(next.text, next.stopped)
    }

    /// As [`Reply::finish`], with the stop token that ended the reply, if one did.
    pub fn end(&mut self, stop: Option<Scored>) -> Delta {
        let mut delta = self.finish();
        let Some(stop) = stop else {
            return delta;
        };
        if self.options.include_stop {
            delta.text.push_str(&self.decoder.push(stop.id));
            delta.text.push_str(&self.decoder.finish());
        }
        if self.options.logprobs && self.options.stop_logprob {
            delta.tokens.push(TokenLogprob {
                spelling: self.spell(stop.id),
                logprob: Some(stop.logprob.max(LEAST_LOGPROB)),
                top: self.spell_all(&stop.top),
                offset: self.n_chars,
            });
        }
        delta
    }

    /// The rest, when no more tokens come: what was held back is no stop string after all.
    pub fn finish(&mut self) -> Delta {
        let tail = self.decoder.finish();
        if let Some(last) = self.waiting.back_mut() {
            last.piece.push_str(&tail);
        }
        self.n_decoded += tail.len();
        // The tail is part of a character at most, which a stop string cannot end in.
        let text = self.stops.finish() + &tail;
        Delta {
            stopped: false,
            ..self.reveal(text, true)
        }
    }

    /// Lets the tokens go that `text` completes; with `is_last` also the one that it cuts, and the last line.
    fn reveal(&mut self, text: String, is_last: bool) -> Delta {
        self.n_shown += text.len();
        let mut delta = Delta {
            text,
            stopped: is_last,
            ..Delta::default()
        };
        while let Some(token) = self.waiting.pop_front() {
            let end = token.start + token.piece.len();
            if end > self.n_shown && !(is_last && token.start < self.n_shown) {
                self.waiting.push_front(token);
                break;
            }
            let n_visible = token.piece.len().min(self.n_shown - token.start);
            if let Some(meter) = &mut self.meter {
                let visible = &token.piece[..n_visible];
                delta.lines.extend(meter.push(visible, token.logprob));
            }
            delta.tokens.extend(token.shown);
        }
        if is_last && let Some(meter) = &mut self.meter {
            delta.lines.extend(meter.finish());
        }
        delta
    }

    fn spell_all(&self, scored: &[(u32, f32)]) -> Vec<(Spelling, f32)> {
        scored
            .iter()
            .map(|(id, logprob)| (self.spell(*id), logprob.max(LEAST_LOGPROB)))
            .collect()
    }

    fn spell(&self, id: u32) -> Spelling {
        let mut bytes = Vec::new();
        self.tokenizer.append_bytes(id, false, &mut bytes);
        Spelling {
            text: String::from_utf8_lossy(&bytes).into_owned(),
            bytes,
        }
    }
}

impl Delta {
    pub fn is_empty(&self) -> bool {
        self.text.is_empty() && self.tokens.is_empty()
    }

    /// Appends a later delta.
    pub fn extend(&mut self, later: Delta) {
        self.text.push_str(&later.text);
        self.tokens.extend(later.tokens);
        self.lines.extend(later.lines);
        self.stopped |= later.stopped;
    }
}

impl TokenLogprob {
    /// As chat completions have it: token, bytes, logprob, top_logprobs.
    pub fn chat_json(&self) -> Value {
        let top: Vec<Value> = self
            .top
            .iter()
            .map(|(spelling, logprob)| spelling.json(Some(*logprob)))
            .collect();
        let mut entry = self.spelling.json(self.logprob);
        entry["top_logprobs"] = Value::Array(top);
        entry
    }
}

impl Spelling {
    fn json(&self, logprob: Option<f32>) -> Value {
        json!({"token": self.text, "logprob": logprob, "bytes": self.bytes})
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tokenizer() -> Tokenizer {
        let texts = ["the cat sat on the mat\nthe end", "你好，世界\n"];
        Tokenizer::train(texts.into_iter(), 320).unwrap()
    }

    fn run(reply: &mut Reply, ids: &[u32]) -> Delta {
        let mut all = Delta::default();
        for id in ids {
            all.extend(reply.push(*id, -1.0, &[]));
            if all.stopped {
                return all;
            }
        }
        all.extend(reply.finish());
        all
    }

    #[test]
    fn characters_split_over_tokens_come_out_whole() {
        let tokenizer = tokenizer();
        let text = "猫 sat 🐈";
        let ids = tokenizer.encode(text).unwrap();
        let mut reply = Reply::new(&tokenizer, &ReplyOptions::default());
        for id in &ids {
            let delta = reply.push(*id, -1.0, &[]);
            assert!(!delta.text.contains('\u{fffd}'));
        }
        let mut again = Reply::new(&tokenizer, &ReplyOptions::default());
        assert_eq!(run(&mut again, &ids).text, text);
    }

    #[test]
    fn stop_string_cuts_text_tokens_and_line() {
        let tokenizer = tokenizer();
        let ids = tokenizer.encode("the cat sat on the mat").unwrap();
        let options = ReplyOptions {
            stops: vec!["t on".to_owned()],
            logprobs: true,
            lines: true,
            ..ReplyOptions::default()
        };
        let delta = run(&mut Reply::new(&tokenizer, &options), &ids);
        assert!(delta.stopped);
        assert_eq!(delta.text, "the cat sa");
        assert_eq!(delta.lines.len(), 1);
        assert_eq!(delta.lines[0].text, "the cat sa");
        let spelt: String = delta
            .tokens
            .iter()
            .map(|t| t.spelling.text.as_str())
            .collect();
        assert!(
            spelt.starts_with("the cat sa") && !spelt.contains("mat"),
            "{spelt}"
        );
    }

    #[test]
    fn tokens_and_text_keep_together() {
        let tokenizer = tokenizer();
        let text = "你好，世界\nthe end";
        let ids = tokenizer.encode(text).unwrap();
        let options = ReplyOptions {
            logprobs: true,
            lines: true,
            ..ReplyOptions::default()
        };
        let delta = run(&mut Reply::new(&tokenizer, &options), &ids);
        assert_eq!(delta.tokens.len(), ids.len());
        let bytes: Vec<u8> = delta
            .tokens
            .iter()
            .flat_map(|t| t.spelling.bytes.clone())
            .collect();
        assert_eq!(String::from_utf8(bytes).unwrap(), text);
        let lines: Vec<&str> = delta.lines.iter().map(|l| l.text.as_str()).collect();
        assert_eq!(lines, ["你好，世界", "the end"]);
        assert!((delta.lines[0].ppl - 1f64.exp()).abs() < 1e-6);
    }
}
