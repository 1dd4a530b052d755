//! Where the tokens of a data set are: every one is trained, held out, or left out by a rule that has a name; and how often a recipe shows a scene.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use serde::Serialize;

use crate::error::Result;
use crate::examples;
use crate::manifest::{DataFile, RowScenes};
use crate::rows;
use crate::split::{Side, Split};
use crate::stats::{self, MANY_PASSES, Passes};
use crate::weighted_source::WeightedSource;

/// The tokens of one file of a data set: a language, or a vendor set.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Account {
    /// Name of the data set: `sft/cyrene`.
    pub task: String,
    /// Language code, or the name of a vendor set.
    pub key: String,
    /// All tokens that the data set was made from; what follows adds up to it.
    pub total: u64,
    /// Tokens of rows by side; without a split all are on `train`.
    pub sides: BTreeMap<Side, u64>,
    /// Tokens that are in no row, or kept from training, by the rule's name.
    pub filtered: BTreeMap<String, u64>,
}

impl Account {
    /// Tokens of rows on a side.
    pub fn on(&self, side: Side) -> u64 {
        self.sides.get(&side).copied().unwrap_or(0)
    }

    /// Tokens that are in no row or kept from training, over all rules.
    pub fn n_filtered(&self) -> u64 {
        self.filtered.values().sum()
    }
}

/// The accounts of a data set's files: of its folder, or of one file of it.
///
/// # Errors
/// As [`rows::load`]; a file of token counts that does not fit.
pub fn account(path: &Path, split: Option<&Split>) -> Result<Vec<Account>> {
    let found = rows::find(path, split)?;
    let counts = found.token_counts()?;
    let of_file = |file: &DataFile| -> Result<Account> {
        let mut account = Account {
            task: found.task.clone(),
            key: file.key.clone(),
            total: 0,
            sides: BTreeMap::new(),
            filtered: BTreeMap::new(),
        };
        for (rule, tally) in &file.filtered {
            account.total += tally.tokens;
            *account.filtered.entry(rule.clone()).or_default() += tally.tokens;
        }
        let mut add = |scene: &str, tokens: u64| -> Result<()> {
            match found.side(file, split, scene)? {
                Side::Filtered => {
                    let rule = split.and_then(|s| s.rule(scene)).unwrap_or_default();
                    *account.filtered.entry(rule.to_owned()).or_default() += tokens;
                }
                side => *account.sides.entry(side).or_default() += tokens,
            }
            Ok(())
        };
        for (origin, tokens) in file.rows.iter().zip(found.tokens_of(file, &counts)?) {
            account.total += tokens;
            match origin {
                RowScenes::One(scene) => add(found.scene(file, *scene)?, *tokens)?,
                RowScenes::Several(parts) => {
                    for (scene, _, tokens) in parts {
                        add(found.scene(file, *scene)?, u64::from(*tokens))?;
                    }
                }
            }
        }
        Ok(account)
    };
    found.files.iter().map(of_file).collect()
}

/// Of the sources of a recipe.
#[derive(Debug, Clone, Serialize)]
pub struct SourceAccount {
    /// Each file once, however many sources name it.
    pub tokens: Vec<Account>,
    /// Passes over a scene in one epoch.
    pub passes: Passes,
}

/// The account of sources; None if one of them was not built here, so that nobody knows its scenes.
///
/// # Errors
/// Data sets that do not fit their manifest or the split.
pub(crate) fn of_sources(
    sources: &[WeightedSource],
    split: Option<&Split>,
) -> Result<Option<SourceAccount>> {
    for WeightedSource { path, .. } in sources {
        if !examples::was_built(path)? {
            return Ok(None);
        }
    }
    let mut seen = BTreeSet::new();
    let mut tokens = Vec::new();
    for WeightedSource { path, .. } in sources {
        for account in account(path, split)? {
            if seen.insert((account.task.clone(), account.key.clone())) {
                tokens.push(account);
            }
        }
    }
    Ok(Some(SourceAccount {
        tokens,
        passes: stats::passes(sources, split)?,
    }))
}

/// A table for each data set: a line a language, a column for each side that has tokens, and the rules below.
pub fn table(accounts: &[Account]) -> String {
    let mut text = String::new();
    for of_task in accounts.chunk_by(|a, b| a.task == b.task) {
        let sides: Vec<Side> = Side::ALL
            .into_iter()
            .filter(|side| *side != Side::Filtered && of_task.iter().any(|a| a.on(*side) > 0))
            .collect();
        text.push_str(&format!("{:<18}", format!("tokens {}", of_task[0].task)));
        for side in &sides {
            let name = if *side == Side::Train {
                "trained"
            } else {
                side.name()
            };
            text.push_str(&format!("{name:>13}"));
        }
        text.push_str(&format!("{:>13}{:>13}\n", "filtered", "total"));
        let mut lines: Vec<(&str, Vec<u64>)> = of_task
            .iter()
            .map(|account| {
                let mut cells: Vec<u64> = sides.iter().map(|side| account.on(*side)).collect();
                cells.extend([account.n_filtered(), account.total]);
                (account.key.as_str(), cells)
            })
            .collect();
        if lines.len() > 1 {
            let sum = |at: usize| lines.iter().map(|(_, cells)| cells[at]).sum();
            let all = (0..sides.len() + 2).map(sum).collect();
            lines.push(("all", all));
        }
        for (key, cells) in lines {
            text.push_str(&format!("{key:<18}"));
            for cell in cells {
                text.push_str(&format!("{cell:>13}"));
            }
            text.push('\n');
        }
        let rules: BTreeSet<&str> = of_task
            .iter()
            .flat_map(|a| a.filtered.keys().map(String::as_str))
            .collect();
        for rule in rules {
            let n: u64 = of_task.iter().filter_map(|a| a.filtered.get(rule)).sum();
            text.push_str(&format!("  filtered: {rule}: {n}\n"));
        }
    }
    text
}

/// Passes over a scene in a run of so many epochs, with a warning where they are many.
pub fn passes(passes: &Passes, epochs: f64) -> String {
    let mut text = format!(
        "passes over a scene: {:.2} in one language (at most {:.2}), {:.2} in all languages together (at most {:.2})",
        epochs * passes.same_language_mean,
        epochs * passes.same_language_most,
        epochs * passes.all_languages_mean,
        epochs * passes.all_languages_most,
    );
    let n_many: u64 = passes
        .same_language
        .iter()
        .filter(|count| epochs * count.passes > MANY_PASSES)
        .map(|count| count.count)
        .sum();
    if n_many > 0 {
        text.push_str(&format!(
            "\nwarning: {n_many} texts (a scene in a language) are shown more than {MANY_PASSES} times; they may be learned by heart: lower the weights of data.sources, run.epochs or run.steps"
        ));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stats::PassCount;

    #[test]
    fn table_names_sides_and_rules_and_sums() {
        let account = |key: &str, train, val| Account {
            task: "sft/cyrene".to_owned(),
            key: key.to_owned(),
            total: train + val + 5,
            sides: [(Side::Train, train), (Side::Val, val)].into(),
            filtered: [("too long".to_owned(), 5)].into(),
        };
        let table = table(&[account("chs", 100, 7), account("en", 200, 0)]);
        let words: Vec<Vec<&str>> = table
            .lines()
            .map(|l| l.split_whitespace().collect())
            .collect();
        assert_eq!(
            words,
            [
                vec![
                    "tokens",
                    "sft/cyrene",
                    "trained",
                    "val",
                    "filtered",
                    "total"
                ],
                vec!["chs", "100", "7", "5", "112"],
                vec!["en", "200", "0", "5", "205"],
                vec!["all", "300", "7", "10", "317"],
                vec!["filtered:", "too", "long:", "10"],
            ]
        );
    }

    #[test]
    fn more_than_four_passes_in_one_language_are_warned_of() {
        let mut many = Passes {
            n_scenes: 3,
            same_language_mean: 3.0,
            same_language_most: 4.0,
            all_languages_mean: 9.0,
            all_languages_most: 12.0,
            n_above_limit: 0,
            languages: Vec::new(),
            same_language: vec![
                PassCount {
                    passes: 2.0,
                    count: 5,
                },
                PassCount {
                    passes: 4.0,
                    count: 2,
                },
            ],
            all_languages: Vec::new(),
        };
        assert!(!passes(&many, 1.0).contains("warning"));
        assert!(passes(&many, 1.5).contains("warning: 2 texts"));
        many.same_language[1].passes = 5.0;
        assert!(passes(&many, 1.0).contains("warning: 2 texts"));
    }
}
