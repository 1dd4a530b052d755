//! Kept sequence states, so that the next turn of a conversation computes only what is new.
//! A linear-attention state cannot be cut back to a shorter prefix, so whole states are kept where a prompt or a reply ended;
//! the chat template is append-only, which makes one of them a prefix of the next turn's prompt.

use std::collections::VecDeque;

/// A state and the tokens it has seen.
pub(crate) struct Snapshot<S> {
    pub tokens: Vec<u32>,
    pub state: S,
    /// Logits after the last token [C], where they are known: the same prompt again then needs no computing at all.
    pub logits: Option<Vec<f32>>,
    pub bytes: usize,
}

/// The most recently used states, within a count and a size.
pub(crate) struct Snapshots<S> {
    /// Least recently used first.
    entries: VecDeque<Snapshot<S>>,
    max_entries: usize,
    max_bytes: usize,
    bytes: usize,
}

/// What a lookup found: a state to go on from, once copied.
pub(crate) struct Hit<'a, S> {
    pub n_tokens: usize,
    pub state: &'a S,
    pub logits: Option<&'a [f32]>,
}

impl<S> Snapshots<S> {
    pub fn new(max_entries: usize, max_bytes: usize) -> Self {
        Snapshots {
            entries: VecDeque::new(),
            max_entries,
            max_bytes,
            bytes: 0,
        }
    }

    pub fn len(&self) -> usize {
        self.entries.len()
    }

    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// The longest kept state whose tokens `ids` begins with. One that has seen all of `ids` counts only with its logits.
    pub fn longest_prefix(&mut self, ids: &[u32]) -> Option<Hit<'_, S>> {
        let index = (0..self.entries.len())
            .filter(|index| {
                let entry = &self.entries[*index];
                let is_usable = entry.tokens.len() < ids.len() || entry.logits.is_some();
                is_usable && ids.starts_with(&entry.tokens)
            })
            .max_by_key(|index| self.entries[*index].tokens.len())?;
        let entry = self.entries.remove(index)?;
        self.entries.push_back(entry);
        let entry = self.entries.back()?;
        Some(Hit {
            n_tokens: entry.tokens.len(),
            state: &entry.state,
            logits: entry
                .logits
                .as_deref()
                .filter(|_| entry.tokens.len() == ids.len()),
        })
    }

    /// Whether a state of this size would be kept at all: asked before a copy is made.
    pub fn takes(&self, bytes: usize) -> bool {
        self.max_entries > 0 && bytes <= self.max_bytes
    }

    /// Keeps a state, in place of one that has seen the same tokens, and lets the least recently used ones go.
    pub fn insert(&mut self, snapshot: Snapshot<S>) {
        if !self.takes(snapshot.bytes) || snapshot.tokens.is_empty() {
            return;
        }
        let same = self
            .entries
            .iter()
            .position(|entry| entry.tokens == snapshot.tokens);
        if let Some(old) = same.and_then(|index| self.entries.remove(index)) {
            self.bytes -= old.bytes;
        }
        self.bytes += snapshot.bytes;
        self.entries.push_back(snapshot);
        while self.entries.len() > self.max_entries || self.bytes > self.max_bytes {
            let Some(oldest) = self.entries.pop_front() else {
                break;
            };
            self.bytes -= oldest.bytes;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn snapshot(tokens: &[u32], logits: Option<Vec<f32>>) -> Snapshot<u32> {
        Snapshot {
            tokens: tokens.to_vec(),
            state: tokens.len() as u32,
            logits,
            bytes: 10,
        }
    }

    fn kept(snapshots: &mut Snapshots<u32>, ids: &[u32]) -> Option<usize> {
        snapshots.longest_prefix(ids).map(|hit| hit.n_tokens)
    }

    #[test]
    fn longest_prefix_wins_and_strangers_never_match() {
        let mut snapshots = Snapshots::new(4, 1000);
        snapshots.insert(snapshot(&[1], None));
        snapshots.insert(snapshot(&[1, 2, 3], None));
        snapshots.insert(snapshot(&[1, 2, 9, 9], None));
        assert_eq!(kept(&mut snapshots, &[1, 2, 3, 4, 5]), Some(3));
        assert_eq!(kept(&mut snapshots, &[1, 7]), Some(1));
        assert_eq!(kept(&mut snapshots, &[2, 1]), None);
    }

    #[test]
    fn whole_prompt_is_reused_only_with_its_logits() {
        let mut snapshots = Snapshots::new(4, 1000);
        snapshots.insert(snapshot(&[1, 2], None));
        assert_eq!(kept(&mut snapshots, &[1, 2]), None);
        snapshots.insert(snapshot(&[1, 2], Some(vec![0.5])));
        assert_eq!(snapshots.len(), 1);
        let hit = snapshots.longest_prefix(&[1, 2]).unwrap();
        assert_eq!(hit.logits, Some(&[0.5][..]));
    }

    #[test]
    fn least_recently_used_goes_first() {
        let mut snapshots = Snapshots::new(2, 1000);
        snapshots.insert(snapshot(&[1], None));
        snapshots.insert(snapshot(&[2], None));
        kept(&mut snapshots, &[1, 5]);
        snapshots.insert(snapshot(&[3], None));
        assert_eq!(kept(&mut snapshots, &[1, 5]), Some(1));
        assert_eq!(kept(&mut snapshots, &[2, 5]), None);
    }

    #[test]
    fn size_stays_within_the_budget() {
        let mut snapshots = Snapshots::new(9, 25);
        for id in 0..5 {
            snapshots.insert(snapshot(&[id], None));
        }
        assert_eq!((snapshots.len(), snapshots.bytes()), (2, 20));
    }
}
