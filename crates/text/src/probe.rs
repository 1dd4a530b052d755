//! The train probe: training rows of the same kind as the held-out ones, so that the gap between the two losses is not one between
//! texts. A long row is easier to predict, token by token, than a short one, and one language than another.

use std::collections::{BTreeMap, BTreeSet};

/// What a row is matched by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Kind<'a> {
    /// Language code, where one is known.
    pub language: Option<&'a str>,
    /// Labels that are learned from.
    pub targets: u64,
}

/// For each held-out row the place in `trained` of a row of the same language with the nearest number of targets, each taken once; of
/// equally near ones the shorter, of equally long ones the first, so that whoever shuffles `trained` draws by chance.
/// Held-out rows without a target have none, nor have those of a language whose training rows are all taken.
pub fn matched<'a>(
    held_out: impl IntoIterator<Item = Kind<'a>>,
    trained: impl IntoIterator<Item = Kind<'a>>,
) -> Vec<usize> {
    // By language: (targets, place).
    let mut free = BTreeMap::<Option<&str>, BTreeSet<(u64, usize)>>::new();
    for (place, kind) in trained.into_iter().enumerate() {
        let of_language = free.entry(kind.language).or_default();
        of_language.insert((kind.targets, place));
    }
    let mut probe = Vec::new();
    for Kind { language, targets } in held_out {
        let Some(free) = free.get_mut(&language).filter(|_| targets > 0) else {
            continue;
        };
        // 1. the first of the shortest that are at least as long, and the first of the longest that are shorter
        let first_from = |least| free.range((least, 0)..).next().copied();
        let above = first_from(targets);
        let below = free.range(..(targets, 0)).next_back();
        let below = below.and_then(|(length, _)| first_from(*length));
        // 2. the nearer of both
        let nearest = [below, above]
            .into_iter()
            .flatten()
            .min_by_key(|(length, _)| length.abs_diff(targets));
        if let Some(key) = nearest {
            free.remove(&key);
            probe.push(key.1);
        }
    }
    probe
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kinds<'a>(language: &'a str, targets: &[u64]) -> Vec<Kind<'a>> {
        let kind = |&targets| Kind {
            language: Some(language),
            targets,
        };
        targets.iter().map(kind).collect()
    }

    #[test]
    fn nearest_length_of_the_same_language_is_taken_once() {
        let mut trained = kinds("de", &[100, 30]);
        trained.extend(kinds("en", &[10, 20, 100, 101, 20]));
        let of = |targets: &[u64]| matched(kinds("en", targets), trained.clone());
        // The first of those of 20, then the other, then the nearest that is left.
        assert_eq!(of(&[20, 20, 20]), [3, 6, 2]);
        assert_eq!(of(&[1000, 99, 0]), [5, 4]);
        // The shorter of two that are equally near.
        assert_eq!(of(&[15]), [2]);
        // Below, the first of equally long ones too.
        assert_eq!(of(&[25]), [3]);
        // No more than there are, and none of another language.
        assert_eq!(of(&[1; 6]).len(), 5);
        assert!(matched(kinds("fr", &[20]), trained.clone()).is_empty());
    }
}
