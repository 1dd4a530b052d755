//! Packing: documents cut to fit a row, and pieces laid end to end in rows, with no token and no loss left out.

use crate::error::{Error, Result};
use crate::labels::{Encoded, IGNORE};
use crate::tokenizer::Tokenizer;

/// Tokens that a later piece of a split document repeats from the one before it, without loss, so that its first new token is predicted too.
pub const CONTEXT_TOKENS: usize = 1;

/// Pieces looked at together by [`Strategy::BinPack`]; ms-swift's packing window.
const WINDOW: usize = 1000;

/// What one training row holds: T tokens of one or more documents.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Row {
    /// [T]
    pub tokens_t: Vec<u32>,
    /// [T] the id that position t must predict, -1 where none; never one of the next document.
    pub targets_t: Vec<i32>,
    /// [pieces + 1] borders, from 0 to T.
    pub cu_seqlens: Vec<u32>,
    /// [pieces] which document each piece came from.
    pub documents: Vec<usize>,
}

/// A document, or a part of one that was too long.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    pub document: usize,
    pub encoded: Encoded,
}

/// How pieces are put into rows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Strategy {
    /// Longest first, each into the emptiest row, in windows of 1000 pieces, the last row of a window staying open for the next.
    /// Source: ms-swift 4.6.0 over `binpacking.to_constant_volume`.
    #[default]
    BinPack,
    /// In order: a piece that does not fit opens the next row.
    Sequential,
}

/// Cuts every document that is longer than a row; see [`split`].
///
/// # Errors
/// As [`split`].
pub fn pieces(
    tokenizer: &Tokenizer,
    documents: &[Encoded],
    row_tokens: usize,
) -> Result<Vec<Piece>> {
    let mut pieces = Vec::with_capacity(documents.len());
    for (document, encoded) in documents.iter().enumerate() {
        let parts = split(tokenizer, encoded, row_tokens)?;
        pieces.extend(parts.into_iter().map(|encoded| Piece { document, encoded }));
    }
    Ok(pieces)
}

/// Cuts a document into pieces of at most `row_tokens` tokens, as few as that allows within the rule for the place: after the last
/// sentence end in the second half of what fits, else the last whole character there, else where it is full.
/// Every label is kept exactly once: a later piece starts with [`CONTEXT_TOKENS`] repeated tokens without loss
/// (a trainer that drops the first label of each piece would lose one per cut).
///
/// # Errors
/// [`Error::RowTooShort`] if a row cannot hold the context and one token more.
pub fn split(tokenizer: &Tokenizer, encoded: &Encoded, row_tokens: usize) -> Result<Vec<Encoded>> {
    let least = CONTEXT_TOKENS + 1;
    if row_tokens < least {
        return Err(Error::RowTooShort { row_tokens, least });
    }
    let n_tokens = encoded.input_ids.len();
    if n_tokens <= row_tokens {
        return Ok(vec![encoded.clone()]);
    }
    let text = TokenText::new(tokenizer, &encoded.input_ids);
    let mut pieces = Vec::new();
    // `start` is the first token of a piece that no piece before it had.
    let mut start = 0;
    while start < n_tokens {
        let first = start.saturating_sub(CONTEXT_TOKENS);
        let limit = first + row_tokens;
        let end = if limit >= n_tokens {
            n_tokens
        } else {
            text.cut(start + (limit - start) / 2, limit)
        };
        let mut labels = encoded.labels[first..end].to_vec();
        labels[..start - first].fill(IGNORE);
        pieces.push(Encoded {
            input_ids: encoded.input_ids[first..end].to_vec(),
            labels,
        });
        start = end;
    }
    Ok(pieces)
}

/// Puts pieces into rows of at most `row_tokens` tokens; the same pieces give the same rows. Empty pieces are left out.
///
/// # Errors
/// [`Error::PieceTooLong`] for a piece that no row can hold.
pub fn rows(pieces: &[Piece], row_tokens: usize, strategy: Strategy) -> Result<Vec<Row>> {
    let kept: Vec<usize> = (0..pieces.len())
        .filter(|&i| !pieces[i].encoded.input_ids.is_empty())
        .collect();
    let lengths: Vec<usize> = kept
        .iter()
        .map(|&i| pieces[i].encoded.input_ids.len())
        .collect();
    let bins = bins(&lengths, row_tokens, strategy)?;
    let row_of = |bin: &Vec<usize>| row(bin.iter().map(|&i| &pieces[kept[i]]));
    Ok(bins.iter().map(row_of).collect())
}

/// Lays pieces end to end, shifting labels to targets.
pub fn row<'a>(pieces: impl Iterator<Item = &'a Piece>) -> Row {
    let mut row = Row {
        cu_seqlens: vec![0],
        ..Row::default()
    };
    for piece in pieces {
        let Encoded { input_ids, labels } = &piece.encoded;
        row.tokens_t.extend(input_ids);
        let targets = labels.iter().skip(1).chain([&IGNORE]);
        row.targets_t
            .extend(targets.map(|&l| if l == IGNORE { -1 } else { l }));
        row.cu_seqlens.push(row.tokens_t.len() as u32);
        row.documents.push(piece.document);
    }
    row
}

/// Indices into `lengths`, grouped so that each group sums to `capacity` at most.
///
/// # Errors
/// [`Error::PieceTooLong`] for a length above `capacity`.
pub fn bins(lengths: &[usize], capacity: usize, strategy: Strategy) -> Result<Vec<Vec<usize>>> {
    if let Some(&length) = lengths.iter().find(|&&l| l > capacity) {
        return Err(Error::PieceTooLong {
            length,
            row_tokens: capacity,
        });
    }
    Ok(match strategy {
        Strategy::Sequential => next_fit(lengths, capacity),
        Strategy::BinPack => {
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
