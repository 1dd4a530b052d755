//! Who belongs together: union-find over numbered things.

use std::collections::BTreeMap;

#[derive(Debug, Clone)]
pub(crate) struct Components {
    parents: Vec<usize>,
}

impl Components {
    /// `n` things, each alone.
    pub fn new(n: usize) -> Components {
        Components {
            parents: (0..n).collect(),
        }
    }

    /// Ties two; says whether that was new.
    pub fn tie(&mut self, a: usize, b: usize) -> bool {
        let (a, b) = (self.root(a), self.root(b));
        // The smaller place is the root, so that the order of ties does not matter.
        self.parents[a.max(b)] = a.min(b);
        a != b
    }

    pub fn are_tied(&mut self, a: usize, b: usize) -> bool {
        self.root(a) == self.root(b)
    }

    /// The first member of every thing's group.
    pub fn roots(&mut self) -> Vec<usize> {
        (0..self.parents.len()).map(|n| self.root(n)).collect()
    }

    /// The groups by their first members, members ascending.
    pub fn groups(&mut self) -> Vec<Vec<usize>> {
        let mut groups: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
        for n in 0..self.parents.len() {
            groups.entry(self.root(n)).or_default().push(n);
        }
        groups.into_values().collect()
    }

    fn root(&mut self, mut n: usize) -> usize {
        while self.parents[n] != n {
            self.parents[n] = self.parents[self.parents[n]];
            n = self.parents[n];
        }
        n
    }
}
