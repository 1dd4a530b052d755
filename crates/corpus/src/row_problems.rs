//! Rows that cannot be used, the first of them with their places, always the same ones in the same order.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::{self, Display, Formatter};
use std::path::PathBuf;

use crate::error::{Error, Result};

/// How many rows an error names; the others it counts.
const N_NAMED: usize = 10;

/// A row that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BadRow {
    /// File that it stands in.
    pub path: PathBuf,
    /// Place among the rows of its file, from 1.
    pub number: usize,
    /// Line of the file, from 1.
    pub line: usize,
    /// Place in the line, from 1, where the JSON itself is at fault.
    pub column: Option<usize>,
    /// Whether other rows begin on its line too, so that its number has to tell it from them.
    pub shares_line: bool,
    /// What is wrong and what would be right.
    pub problem: String,
}

impl Display for BadRow {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.path.display(), self.line)?;
        if let Some(column) = self.column {
            write!(f, ":{column}")?;
        }
        if self.shares_line {
            write!(f, ": row {}", self.number)?;
        }
        write!(f, ": {}", self.problem)
    }
}

/// All rows of a reading that cannot be used: the first ten, and how many there are.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct BadRows {
    named: Vec<BadRow>,
    /// Which rows of each file.
    numbers: BTreeMap<PathBuf, BTreeSet<usize>>,
}

impl BadRows {
    /// Takes the next one; rows come in the order of files and lines. A row that a second source names again is the same one.
    pub fn add(&mut self, row: BadRow) {
        let numbers = self.numbers.entry(row.path.clone()).or_default();
        if numbers.insert(row.number) && self.named.len() < N_NAMED {
            self.named.push(row);
        }
    }

    /// Takes those of the next file or source.
    pub fn append(&mut self, others: BadRows) {
        others.named.into_iter().for_each(|row| self.add(row));
        for (path, numbers) in others.numbers {
            self.numbers.entry(path).or_default().extend(numbers);
        }
    }

    /// Those that are named, at most ten.
    pub fn named(&self) -> &[BadRow] {
        &self.named
    }

    /// How many there are.
    pub fn n_rows(&self) -> usize {
        self.numbers.values().map(BTreeSet::len).sum()
    }

    /// # Errors
    /// [`Error::BadRows`] if there is one.
    pub fn into_result(self) -> Result<()> {
        match self.named.is_empty() {
            true => Ok(()),
            false => Err(Error::BadRows(self)),
        }
    }
}

impl Display for BadRows {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let n_more = self.n_rows() - self.named.len();
        if let ([only], 0) = (&self.named[..], n_more) {
            return only.fmt(f);
        }
        write!(f, "{} rows cannot be used:", self.n_rows())?;
        for row in &self.named {
            write!(f, "\n  {row}")?;
        }
        match n_more {
            0 => Ok(()),
            n => write!(f, "\n  and {n} more"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(line: usize) -> BadRow {
        BadRow {
            path: PathBuf::from("a.jsonl"),
            number: line,
            line,
            column: None,
            shares_line: false,
            problem: "no".to_owned(),
        }
    }

    #[test]
    fn ten_are_named_and_the_others_counted() {
        let mut bad = BadRows::default();
        (1..=13).for_each(|line| bad.add(row(line)));
        let said = bad.to_string();
        let lines: Vec<&str> = said.lines().collect();
        assert_eq!(lines.len(), 12, "{said}");
        assert_eq!(lines[0], "13 rows cannot be used:");
        assert_eq!(lines[1], "  a.jsonl:1: no");
        assert_eq!(lines[10], "  a.jsonl:10: no");
        assert_eq!(lines[11], "  and 3 more");
    }

    #[test]
    fn one_stands_alone() {
        let mut bad = BadRows::default();
        bad.add(row(4));
        assert_eq!(bad.to_string(), "a.jsonl:4: no");
    }

    #[test]
    fn rows_that_two_sources_name_are_told_and_counted_once() {
        let mut bad = BadRows::default();
        let mut again = BadRows::default();
        (1..=15).for_each(|line| bad.add(row(line)));
        (1..=16).for_each(|line| again.add(row(line)));
        bad.append(again);
        assert_eq!((bad.named().len(), bad.n_rows()), (10, 16));
    }

    #[test]
    fn rows_of_one_line_are_told_apart_by_their_numbers() {
        let mut bad = BadRows::default();
        for number in [1, 3] {
            bad.add(BadRow {
                number,
                shares_line: true,
                ..row(1)
            });
        }
        assert_eq!(
            bad.to_string(),
            "2 rows cannot be used:\n  a.jsonl:1: row 1: no\n  a.jsonl:1: row 3: no"
        );
    }
}
