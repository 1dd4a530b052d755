//! Rows of ids: labels checked, padding taken off, and documents that somebody packed into one row parted at their borders,
//! so that none sees another.

use std::ops::Range;

use serde_json::{Map, Value};
use text::IGNORE;

/// The ids of one document with their labels.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct IdsPart {
    pub input_ids: Vec<u32>,
    pub labels: Vec<i32>,
}

/// Keys that name a document for every token.
const DOCUMENTS: [&str; 3] = ["seq_idx", "sequence_ids", "document_ids"];
/// Keys that list the borders, from 0 to the number of tokens.
const BORDERS: [&str; 4] = [
    "cu_seqlens",
    "cu_seq_lens",
    "cu_seq_lens_q",
    "cu_seq_lens_k",
];
/// Keys that list the lengths of the documents.
const LENGTHS: [&str; 3] = ["seq_lengths", "seq_lens", "sequence_lengths"];

/// Keys that are read here.
pub(crate) fn keys() -> impl Iterator<Item = &'static str> {
    let own = ["input_ids", "labels", "attention_mask", "position_ids"];
    let borders = DOCUMENTS.into_iter().chain(BORDERS).chain(LENGTHS);
    own.into_iter().chain(borders)
}

/// Where documents begin, by a key that tells it.
type Told = (&'static str, Vec<usize>);

/// Takes the keys of ids out of a row and gives its documents.
///
/// # Errors
/// What is wrong, and what would be right.
pub(crate) fn parts(fields: &mut Map<String, Value>) -> Result<Vec<IdsPart>, String> {
    let input_ids = ids(fields)?;
    let labels = labels(fields, input_ids.len())?;
    let mask = match fields.remove("attention_mask") {
        None => vec![1; input_ids.len()],
        Some(mask) => numbers_of(mask, "attention_mask", input_ids.len())?,
    };
    // 1. without padding at either end  2. parted at the borders that any key tells  3. which must agree where tokens are
    let seen = seen(&mask, &labels)?;
    let told = told(fields, &mask, &seen)?;
    let starts = agreed(told, &seen)?;
    Ok(starts
        .windows(2)
        .map(|range| IdsPart {
            input_ids: input_ids[range[0]..range[1]].to_vec(),
            labels: labels[range[0]..range[1]].to_vec(),
        })
        .collect())
}

/// The tokens that are no padding.
fn seen(mask: &[i64], labels: &[i32]) -> Result<Range<usize>, String> {
    let is_seen = |m: &i64| *m != 0;
    let (Some(start), Some(last)) = (
        mask.iter().position(is_seen),
        mask.iter().rposition(is_seen),
    ) else {
        return Err(
            "`attention_mask` is 0 everywhere, so that no token is seen; take the row out"
                .to_owned(),
        );
    };
    let seen = start..last + 1;
    if let Some(at) = seen.clone().find(|at| mask[*at] == 0) {
        return Err(format!(
            "`attention_mask` is 0 at position {at}, between tokens that are seen; such rows are not trained here: take those tokens out of `input_ids` and `labels`"
        ));
    }
    let mut padding = (0..mask.len()).filter(|at| !seen.contains(at));
    if let Some(at) = padding.find(|at| labels[*at] != IGNORE) {
        return Err(format!(
            "the label at position {at} is {}, but `attention_mask` is 0 there; padding has labels of {IGNORE}",
            labels[at]
        ));
    }
    Ok(seen)
}

/// Where documents begin, by every key that tells it; a mask of several numbers says whose every token is.
fn told(
    fields: &mut Map<String, Value>,
    mask: &[i64],
    seen: &Range<usize>,
) -> Result<Vec<Told>, String> {
    let n = mask.len();
    let mut told: Vec<Told> = Vec::new();
    if mask[seen.clone()].iter().any(|m| *m != 1) {
        let key = "attention_mask";
        told.push((key, changes(mask, seen.start, seen.end, key)?));
    }
    if let Some(value) = fields.remove("position_ids") {
        let positions = numbers_of(value, "position_ids", n)?;
        let starts = restarts(&positions, seen.start, seen.end)?;
        told.push(("position_ids", starts));
    }
    for key in DOCUMENTS {
        if let Some(value) = fields.remove(key) {
            let documents = numbers_of(value, key, n)?;
            told.push((key, changes(&documents, seen.start, seen.end, key)?));
        }
    }
    for key in BORDERS {
        if let Some(value) = fields.remove(key) {
            told.push((key, borders(&numbers(value, key)?, n, key)?));
        }
    }
    for key in LENGTHS {
        if let Some(value) = fields.remove(key) {
            let lengths = numbers(value, key)?;
            let mut sums = vec![0_i64];
            sums.extend(lengths.iter().scan(0_i64, |sum, length| {
                *sum = sum.saturating_add(*length);
                Some(*sum)
            }));
            told.push((key, borders(&sums, n, key)?));
        }
    }
    Ok(told)
}

/// The borders that all keys tell, with both ends of what is seen.
fn agreed(told: Vec<Told>, seen: &Range<usize>) -> Result<Vec<usize>, String> {
    let inside = |starts: Vec<usize>| -> Vec<usize> {
        let is_inside = |at: &usize| *at > seen.start && *at < seen.end;
        let inner = starts.into_iter().filter(is_inside);
        [seen.start]
            .into_iter()
            .chain(inner)
            .chain([seen.end])
            .collect()
    };
    let mut told = told.into_iter().map(|(key, starts)| (key, inside(starts)));
    let Some((key, starts)) = told.next() else {
        return Ok(vec![seen.start, seen.end]);
    };
    match told.find(|(_, others)| *others != starts) {
        None => Ok(starts),
        Some((other, _)) => Err(format!(
            "`{key}` and `{other}` part the row at different places; take the wrong one away"
        )),
    }
}

fn ids(fields: &mut Map<String, Value>) -> Result<Vec<u32>, String> {
    let ids = numbers(fields.remove("input_ids").unwrap_or_default(), "input_ids")?;
    if ids.is_empty() {
        return Err("`input_ids` holds no token; take the row out".to_owned());
    }
    let ids = ids.into_iter().enumerate().map(|(at, id)| {
        u32::try_from(id)
            .ok()
            .filter(|id| i32::try_from(*id).is_ok())
            .ok_or_else(|| format!("`input_ids` holds {id} at position {at}, which is no token id"))
    });
    ids.collect()
}

/// Labels as Hugging Face has them: as many as ids, not shifted, -100 for no loss.
fn labels(fields: &mut Map<String, Value>, n_ids: usize) -> Result<Vec<i32>, String> {
    let Some(labels) = fields.remove("labels") else {
        return Err(format!(
            "`input_ids` without `labels`; add as many, each the id itself or {IGNORE} where nothing is to be learned"
        ));
    };
    let labels = numbers(labels, "labels")?;
    if labels.len() != n_ids {
        return Err(format!(
            "{n_ids} input_ids but {} labels; they must be equally many",
            labels.len()
        ));
    }
    let labels = labels.into_iter().enumerate().map(|(at, label)| {
        let label32 = i32::try_from(label).ok();
        label32.filter(|label| *label >= 0 || *label == IGNORE).ok_or_else(|| {
            format!(
                "the label at position {at} is {label}; a label is {IGNORE} (no loss) or a token id"
            )
        })
    });
    labels.collect()
}

/// Where the number of a document changes; each document stands in one piece.
fn changes(documents: &[i64], start: usize, end: usize, key: &str) -> Result<Vec<usize>, String> {
    let mut starts = Vec::new();
    let mut seen = std::collections::HashSet::new();
    for at in start..end {
        if at > start && documents[at] == documents[at - 1] {
            continue;
        }
        if !seen.insert(documents[at]) {
            return Err(format!(
                "`{key}` comes back to {} at position {at}; a document stands in one piece",
                documents[at]
            ));
        }
        starts.push(at);
    }
    Ok(starts)
}

/// Where positions begin again at 0; between those places each is one more than the one before.
fn restarts(positions: &[i64], start: usize, end: usize) -> Result<Vec<usize>, String> {
    let mut starts = Vec::new();
    for at in start..end {
        let expected = match at > start {
            true => positions[at - 1].saturating_add(1),
            false => 0,
        };
        match positions[at] {
            0 => starts.push(at),
            position if position == expected => {}
            position => {
                return Err(format!(
                    "`position_ids` has {position} at position {at}, where {expected} or 0 (a new document) would follow; other positions are not trained here: take the key away, or part the row"
                ));
            }
        }
    }
    Ok(starts)
}

/// Checks borders that are listed: rising, from 0 to the number of tokens.
fn borders(listed: &[i64], n: usize, key: &str) -> Result<Vec<usize>, String> {
    let rises = listed.windows(2).all(|pair| pair[0] < pair[1]);
    let reaches = listed.first() == Some(&0) && listed.last() == i64::try_from(n).ok().as_ref();
    match rises && reaches {
        true => Ok(listed
            .iter()
            .filter_map(|at| usize::try_from(*at).ok())
            .collect()),
        false => Err(format!(
            "`{key}` does not part {n} tokens into documents: borders rise from 0 to {n}, lengths add up to it"
        )),
    }
}

/// A list with a number for every token.
fn numbers_of(value: Value, key: &str, n: usize) -> Result<Vec<i64>, String> {
    let numbers = numbers(value, key)?;
    match numbers.len() == n {
        true => Ok(numbers),
        false => Err(format!(
            "{n} input_ids but {} numbers in `{key}`; they must be equally many",
            numbers.len()
        )),
    }
}

/// A list of whole numbers; true and false are 1 and 0, as masks have them.
fn numbers(value: Value, key: &str) -> Result<Vec<i64>, String> {
    let Value::Array(list) = value else {
        return Err(format!("`{key}` must be a list of whole numbers"));
    };
    let numbers = list.into_iter().enumerate().map(|(at, value)| {
        let number = match &value {
            Value::Bool(is_set) => Some(i64::from(*is_set)),
            value => value.as_i64(),
        };
        number.ok_or_else(|| {
            let got = match value {
                Value::Array(_) => {
                    "a list: one row, one document or several behind each other".to_owned()
                }
                other => other.to_string(),
            };
            format!("`{key}` must be a list of whole numbers; at position {at} stands {got}")
        })
    });
    numbers.collect()
}
