//! Rows that cannot be used, the first of them with their places, always the same ones in the same order.

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
    /// Line of the file, from 1.
    pub line: usize,
    /// Place in the line, from 1, where the JSON itself is at fault.
    pub column: Option<usize>,
    /// What is wrong and what would be right.
    pub problem: String,
}

impl Display for BadRow {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.path.display(), self.line)?;
        if let Some(column) = self.column {
            write!(f, ":{column}")?;
        }
        write!(f, ": {}", self.problem)
    }
}

/// All rows of a reading that cannot be used: the first ten, and how many more there are.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct BadRows {
    named: Vec<BadRow>,
    n_more: usize,
}

impl BadRows {
    /// Takes the next one; rows come in the order of files and lines. A row that a second source names again is the same one.
    pub fn add(&mut self, row: BadRow) {
        if self.named.len() == N_NAMED {
            self.n_more += 1;
        } else if !self.named.contains(&row) {
            self.named.push(row);
        }
    }

    /// Takes those of the next file or source.
    pub fn append(&mut self, others: BadRows) {
        others.named.into_iter().for_each(|row| self.add(row));
        self.n_more += others.n_more;
    }

    /// Those that are named, at most ten.
    pub fn named(&self) -> &[BadRow] {
        &self.named
    }

    /// How many there are.
    pub fn n_rows(&self) -> usize {
        self.named.len() + self.n_more
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
        if let ([only], 0) = (&self.named[..], self.n_more) {
            return only.fmt(f);
        }
        write!(f, "{} rows cannot be used:", self.n_rows())?;
        for row in &self.named {
            write!(f, "\n  {row}")?;
        }
        match self.n_more {
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
            line,
            column: None,
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
    fn row_that_two_sources_name_is_told_once() {
        let mut bad = BadRows::default();
        bad.add(row(4));
        let mut again = BadRows::default();
        again.add(row(4));
        again.add(row(5));
        bad.append(again);
        assert_eq!(bad.n_rows(), 2);
    }
}
