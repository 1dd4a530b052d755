//! Packing: documents and conversations cut to fit a row, and pieces laid end to end in rows, with no token and no loss left out.

use std::ops::Range;

use crate::error::{Error, Result};
use crate::example::{Example, IGNORE};
use crate::tokenizer::Tokenizer;

/// Tokens that a later piece of a split document repeats from the one before it, without loss, so that its first new token is predicted too.
pub const CONTEXT_TOKENS: usize = 1;

/// Pieces looked at together by [`Packing::BinPack`]; ms-swift's packing window.
const WINDOW: usize = 1000;

/// What one training row holds: T tokens of one or more documents.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PackedRow {
    /// [T]
    pub tokens_t: Vec<u32>,
    /// [T] the id that position t must predict, -1 where none; never one of the next document.
    pub targets_t: Vec<i32>,
    /// [pieces + 1] borders, from 0 to T.
    pub cu_seqlens: Vec<u32>,
    /// [pieces] which example each piece came from.
    pub examples: Vec<usize>,
}

/// An example, or a part of one that was too long.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Place of the example among all.
    pub example_idx: usize,
    /// Its tokens and labels.
    pub example: Example,
}

/// How pieces are put into rows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Packing {
    /// Longest first, each into the emptiest row, in windows of 1000 pieces, the last row of a window staying open for the next.
    /// Source: ms-swift 4.6.0 over `binpacking.to_constant_volume`.
    #[default]
    BinPack,
    /// In order: a piece that does not fit opens the next row.
    Sequential,
}

/// Cuts every example that is longer than a row; see [`split`].
///
/// # Errors
/// As [`split`].
pub fn pieces<'e>(
    tokenizer: Option<&Tokenizer>,
    examples: impl IntoIterator<Item = &'e Example>,
    row_tokens: usize,
) -> Result<Vec<Piece>> {
    let mut pieces = Vec::new();
    for (example_idx, example) in examples.into_iter().enumerate() {
        let parts = split(tokenizer, example, row_tokens)?;
        pieces.extend(parts.into_iter().map(|example| Piece {
            example_idx,
            example,
        }));
    }
    Ok(pieces)
}

/// Cuts an example into pieces of at most `row_tokens` tokens; one that fits stays whole. Every label is kept exactly once.
///
/// A document is cut after the last sentence end in the second half of what fits, else the last whole character there, else where it is
/// full; without a tokenizer, which alone sees sentences, always there. A later piece starts with [`CONTEXT_TOKENS`] repeated tokens without
/// loss (a trainer that drops the first label of each piece would lose one per cut).
///
/// A conversation is cut between rounds, as many to a piece as fit, its system message in front of each without loss. A round that does not
/// fit alone is cut inside its answer, as a document is, with its question too in front of each piece.
///
/// # Errors
/// [`Error::RowTooShort`] if a row cannot hold the context and one token more; [`Error::NoRoomForAnswer`] if it cannot hold the system
/// message and the question with them.
pub fn split(
    tokenizer: Option<&Tokenizer>,
    example: &Example,
    row_tokens: usize,
) -> Result<Vec<Example>> {
    let least = CONTEXT_TOKENS + 1;
    if row_tokens < least {
        return Err(Error::RowTooShort { row_tokens, least });
    }
    if example.input_ids.len() <= row_tokens {
        return Ok(vec![example.clone()]);
    }
    check_room(example, row_tokens)?;
    let mut pieces = Vec::new();
    if example.rounds.is_empty() {
        let whole = 0..example.input_ids.len();
        cut_text(tokenizer, example, &[], whole, row_tokens, &mut pieces);
    } else {
        cut_rounds(tokenizer, example, row_tokens, &mut pieces);
    }
    Ok(pieces)
}

/// Whether a row has room for the beginning of every answer that [`split`] has to cut, found without cutting.
///
/// # Errors
/// [`Error::NoRoomForAnswer`] if the system message and a question leave none.
pub fn check_room(example: &Example, row_tokens: usize) -> Result<()> {
    let system = example.rounds.first().map_or(0, |first| first.start);
    for (round, n_tokens) in example.rounds.iter().zip(example.round_tokens()) {
        let prompt_tokens = system + round.said - round.start;
        if n_tokens > row_tokens && prompt_tokens + CONTEXT_TOKENS >= row_tokens {
            return Err(Error::NoRoomForAnswer {
                prompt_tokens,
                row_tokens,
            });
        }
    }
    Ok(())
}

/// What stands in front of each piece: tokens, and whether those of the first piece keep their loss; the others' never do.
type Front = (Range<usize>, bool);

/// Cuts the tokens of `range` into pieces, each behind `front`.
fn cut_text(
    tokenizer: Option<&Tokenizer>,
    example: &Example,
    front: &[Front],
    range: Range<usize>,
    row_tokens: usize,
    pieces: &mut Vec<Example>,
) {
    let room = row_tokens - front.iter().map(|(part, _)| part.len()).sum::<usize>();
    let text = tokenizer.map(|t| TokenText::new(t, &example.input_ids[range.clone()]));
    // `start` is the first token of a piece that no piece before it had.
    let mut start = range.start;
    while start < range.end {
        let is_first = start == range.start;
        let first = if is_first {
            start
        } else {
            start - CONTEXT_TOKENS
        };
        let limit = first + room;
        let end = match &text {
            _ if limit >= range.end => range.end,
            None => limit,
            Some(text) => {
                let from = start + (limit - start) / 2;
                range.start + text.cut(from - range.start, limit - range.start)
            }
        };
        let mut piece = Example::default();
        for (part, with_loss) in front {
            piece.append(example, part.clone(), is_first && *with_loss);
        }
        piece.append(example, first..start, false);
        piece.append(example, start..end, true);
        pieces.push(piece);
        start = end;
    }
}

/// Cuts a conversation that a row has room for between rounds, and a round that is too long inside its answer.
fn cut_rounds(
    tokenizer: Option<&Tokenizer>,
    example: &Example,
    row_tokens: usize,
    pieces: &mut Vec<Example>,
) {
    let rounds = &example.rounds;
    let system = 0..rounds[0].start;
    let end_of = |round: usize| {
        let next = rounds.get(round + 1).map(|next| next.start);
        next.unwrap_or(example.input_ids.len())
    };
    let mut first = 0;
    while first < rounds.len() {
        let start = rounds[first].start;
        // 1. as many rounds as fit
        let fits = |round: &usize| system.len() + end_of(*round) - start <= row_tokens;
        if let Some(last) = (first..rounds.len()).take_while(fits).last() {
            let mut piece = Example::default();
            piece.append(example, system.clone(), first == 0);
            piece.append(example, start..end_of(last), true);
            pieces.push(piece);
            first = last + 1;
            continue;
        }
        // 2. one that is too long alone
        let question = start..rounds[first].said;
        let front = [(system.clone(), first == 0), (question, true)];
        let answer = rounds[first].said..end_of(first);
        cut_text(tokenizer, example, &front, answer, row_tokens, pieces);
        first += 1;
    }
}

/// Puts pieces into rows of at most `row_tokens` tokens; the same pieces give the same rows. Empty pieces are left out.
///
/// # Errors
/// [`Error::PieceTooLong`] for a piece that no row can hold.
pub fn rows(pieces: &[Piece], row_tokens: usize, packing: Packing) -> Result<Vec<PackedRow>> {
    let kept: Vec<usize> = (0..pieces.len())
        .filter(|&i| !pieces[i].example.input_ids.is_empty())
        .collect();
    let lengths: Vec<usize> = kept
        .iter()
        .map(|&i| pieces[i].example.input_ids.len())
        .collect();
    let bins = bins(&lengths, row_tokens, packing)?;
    let row_of = |bin: &Vec<usize>| row(bin.iter().map(|&i| &pieces[kept[i]]));
    Ok(bins.iter().map(row_of).collect())
}

/// Lays pieces end to end, shifting labels to targets.
pub fn row<'a>(pieces: impl IntoIterator<Item = &'a Piece>) -> PackedRow {
    let mut row = PackedRow {
        cu_seqlens: vec![0],
        ..PackedRow::default()
    };
    for piece in pieces {
        let Example {
            input_ids, labels, ..
        } = &piece.example;
        row.tokens_t.extend(input_ids);
        let targets = labels.iter().skip(1).chain([&IGNORE]);
        row.targets_t
            .extend(targets.map(|&l| if l == IGNORE { -1 } else { l }));
        row.cu_seqlens.push(row.tokens_t.len() as u32);
        row.examples.push(piece.example_idx);
    }
    row
}

/// Indices into `lengths`, grouped so that each group sums to `capacity` at most.
///
/// # Errors
/// [`Error::PieceTooLong`] for a length above `capacity`.
pub fn bins(lengths: &[usize], capacity: usize, packing: Packing) -> Result<Vec<Vec<usize>>> {
    if let Some(&length) = lengths.iter().find(|&&l| l > capacity) {
        return Err(Error::PieceTooLong {
            length,
            row_tokens: capacity,
        });
    }
    Ok(match packing {
        Packing::Sequential => next_fit(lengths, capacity),
        Packing::BinPack => {
            let indices: Vec<usize> = (0..lengths.len()).collect();
            let mut bins: Vec<Vec<usize>> = Vec::new();
            for window in indices.chunks(WINDOW) {
                let mut open = bins.pop().unwrap_or_default();
                open.extend(window);
                bins.extend(emptiest_fit_decreasing(&open, lengths, capacity));
            }
            bins
        }
    })
}

/// Longest first, each into the emptiest bin, a new one if it does not fit there; equal lengths and equally full bins in their order.
/// Source: `binpacking.to_constant_volume`.
fn emptiest_fit_decreasing(
    indices: &[usize],
    lengths: &[usize],
    capacity: usize,
) -> Vec<Vec<usize>> {
    let mut order = indices.to_vec();
    order.sort_by_key(|&i| std::cmp::Reverse(lengths[i]));
    let mut bins: Vec<(usize, Vec<usize>)> = Vec::new();
    for i in order {
        match bins.iter_mut().min_by_key(|(filled, _)| *filled) {
            Some((filled, members)) if *filled + lengths[i] <= capacity => {
                *filled += lengths[i];
                members.push(i);
            }
            _ => bins.push((lengths[i], vec![i])),
        }
    }
    bins.into_iter().map(|(_, members)| members).collect()
}

fn next_fit(lengths: &[usize], capacity: usize) -> Vec<Vec<usize>> {
    let mut bins: Vec<Vec<usize>> = Vec::new();
    let mut filled = capacity;
    for (i, &length) in lengths.iter().enumerate() {
        match bins.last_mut() {
            Some(bin) if filled + length <= capacity => {
                bin.push(i);
                filled += length;
            }
            _ => {
                bins.push(vec![i]);
                filled = length;
            }
        }
    }
    bins
}

/// The bytes of a document with the byte offset at which each token starts.
struct TokenText {
    bytes: Vec<u8>,
    /// [tokens + 1]
    offsets: Vec<usize>,
}

impl TokenText {
    fn new(tokenizer: &Tokenizer, ids: &[u32]) -> Self {
        let mut bytes = Vec::new();
        let mut offsets = vec![0];
        for &id in ids {
            tokenizer.append_bytes(id, false, &mut bytes);
            offsets.push(bytes.len());
        }
        TokenText { bytes, offsets }
    }

    /// Where to cut at `limit` at the latest and after `from` if possible.
    fn cut(&self, from: usize, limit: usize) -> usize {
        let last = |is_good: &dyn Fn(usize) -> bool| {
            (from + 1..=limit)
                .rev()
                .find(|&token_idx| is_good(self.offsets[token_idx]))
        };
        last(&|at| self.is_sentence_end(at))
            .or_else(|| last(&|at| self.is_whole(at)))
            .unwrap_or(limit)
    }

    /// Whether no character is cut in two at byte `at`.
    fn is_whole(&self, at: usize) -> bool {
        self.bytes.get(at).is_none_or(|b| b & 0xc0 != 0x80)
    }

    /// Whether a sentence ends at byte `at`: a line feed, or a full stop, question or exclamation mark or ellipsis with the quotes and
    /// brackets that close it. After an ASCII mark white space must follow (`3.14`), and nothing that still belongs to the end may.
    fn is_sentence_end(&self, at: usize) -> bool {
        if !self.is_whole(at) {
            return false;
        }
        let next = first_char(&self.bytes[at..]);
        let mut before = &self.bytes[..at];
        let mut closed = 0;
        loop {
            let Some(c) = last_char(before) else {
                return false;
            };
            before = &before[..before.len() - c.len_utf8()];
            match c {
                '\n' => return closed == 0 && next != Some('\n'),
                '。' | '！' | '？' | '…' | '︒' | '।' => {
                    return !next.is_some_and(belongs_to_end);
                }
                '.' | '!' | '?' => return next.is_none_or(char::is_whitespace),
                c if is_closing(c) && closed < MAX_CLOSING => closed += 1,
                _ => return false,
            }
        }
    }
}

/// Quotes and brackets looked through behind a full stop.
const MAX_CLOSING: usize = 4;

fn is_closing(c: char) -> bool {
    matches!(
        c,
        '"' | '\''
            | ')'
            | ']'
            | '”'
            | '’'
            | '」'
            | '』'
            | '）'
            | '】'
            | '》'
            | '〉'
            | '»'
            | '♪'
            | '～'
            | '~'
            | '*'
    )
}

fn belongs_to_end(c: char) -> bool {
    is_closing(c) || matches!(c, '。' | '！' | '？' | '…' | '.' | '!' | '?' | '\n')
}

fn first_char(bytes: &[u8]) -> Option<char> {
    let head = &bytes[..bytes.len().min(4)];
    let valid = head.utf8_chunks().next()?.valid();
    valid.chars().next()
}

fn last_char(bytes: &[u8]) -> Option<char> {
    let tail = &bytes[bytes.len().saturating_sub(4)..];
    let start = tail.iter().rposition(|b| b & 0xc0 != 0x80)?;
    std::str::from_utf8(&tail[start..]).ok()?.chars().next()
}
