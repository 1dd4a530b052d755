//! The greedy cut of a list of sentences or rounds at a number of tokens.

use std::ops::Range;

/// Cuts `tokens` (one count an item) into runs: a run is closed before the item that would make it exceed `limit`.
/// An item above the limit stands alone. No items give no run.
pub(crate) fn pieces(tokens: impl IntoIterator<Item = usize>, limit: usize) -> Vec<Range<usize>> {
    let mut runs = Vec::new();
    let mut start = 0;
    let mut sum = 0;
    let mut n_items = 0;
    for (idx, n) in tokens.into_iter().enumerate() {
        if idx > start && sum + n > limit {
            runs.push(start..idx);
            start = idx;
            sum = 0;
        }
        sum += n;
        n_items = idx + 1;
    }
    if n_items > start {
        runs.push(start..n_items);
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(tokens: &[usize], expect: &[(usize, usize)]) {
        let runs = pieces(tokens.iter().copied(), 10);
        let runs: Vec<_> = runs.into_iter().map(|r| (r.start, r.end)).collect();
        assert_eq!(runs, expect);
    }

    #[test]
    fn pieces_are_cut_before_the_item_that_exceeds() {
        check(&[], &[]);
        check(&[4, 6], &[(0, 2)]);
        check(&[4, 7], &[(0, 1), (1, 2)]);
        check(&[11, 1, 20, 0], &[(0, 1), (1, 2), (2, 3), (3, 4)]);
        check(&[0, 0], &[(0, 2)]);
        check(&[10, 0, 1], &[(0, 2), (2, 3)]);
    }
}
