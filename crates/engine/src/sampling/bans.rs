//! Ids that may or may not be drawn: lists by id, and sequences that may not be completed.

use super::{Candidate, DrawContext, Sampling};

/// Takes `ids` out of `candidates` (ordered by id). Order and repetitions of `ids` do not matter.
pub fn remove(candidates: &mut Vec<Candidate>, ids: &[u32]) {
    if ids.is_empty() {
        return;
    }
    // Both are in order, so one walk finds them all.
    let ids = sorted(ids);
    let mut next = ids.iter().peekable();
    candidates.retain(|candidate| {
        while next.next_if(|id| **id < candidate.id).is_some() {}
        next.next_if_eq(&&candidate.id).is_none()
    });
}

/// Takes out every id that may not be drawn now: banned ones, those barred at this position, and the ends of sequences.
pub fn remove_all(candidates: &mut Vec<Candidate>, context: &DrawContext<'_>, sampling: &Sampling) {
    remove(candidates, &sampling.banned);
    remove(candidates, context.barred);
    let bad = sequence_ends(&sampling.bad_sequences, context.generated);
    remove(candidates, &bad);
}

/// Leaves only `ids` in `candidates` (ordered by id); an empty list leaves all.
pub fn keep(candidates: &mut Vec<Candidate>, ids: &[u32]) {
    if ids.is_empty() {
        return;
    }
    let ids = sorted(ids);
    candidates.retain(|candidate| ids.binary_search(&candidate.id).is_ok());
}

/// The last id of every sequence whose other ids are what was `generated` last.
/// Source: vLLM's `bad_words`, which looks at generated ids only.
pub fn sequence_ends(sequences: &[Vec<u32>], generated: &[u32]) -> Vec<u32> {
    sequences
        .iter()
        .filter_map(|sequence| sequence.split_last())
        .filter(|(_, before)| generated.ends_with(before))
        .map(|(last, _)| *last)
        .collect()
}

fn sorted(ids: &[u32]) -> Vec<u32> {
    let mut ids = ids.to_vec();
    ids.sort_unstable();
    ids.dedup();
    ids
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ids_after(change: impl Fn(&mut Vec<Candidate>)) -> Vec<u32> {
        let mut candidates: Vec<Candidate> =
            (0..5).map(|id| Candidate { id, logit: 0.0 }).collect();
        change(&mut candidates);
        candidates.iter().map(|c| c.id).collect()
    }

    #[test]
    fn lists_remove_and_keep_by_id() {
        assert_eq!(ids_after(|c| remove(c, &[3, 0, 3, 9])), [1, 2, 4]);
        assert_eq!(ids_after(|c| remove(c, &[])), [0, 1, 2, 3, 4]);
        assert_eq!(ids_after(|c| keep(c, &[4, 1, 9])), [1, 4]);
        assert_eq!(ids_after(|c| keep(c, &[])), [0, 1, 2, 3, 4]);
    }

    #[test]
    fn sequences_bar_their_last_id_after_the_others_only() {
        let sequences = [vec![7], vec![1, 2, 8], vec![2, 9], vec![]];
        assert_eq!(sequence_ends(&sequences, &[]), [7]);
        assert_eq!(sequence_ends(&sequences, &[2]), [7, 9]);
        assert_eq!(sequence_ends(&sequences, &[5, 1, 2]), [7, 8, 9]);
        assert_eq!(sequence_ends(&sequences, &[1, 2, 5]), [7]);
    }
}
