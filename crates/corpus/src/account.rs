//! Where the tokens of a data set are: every one is trained, held out, or left out by a rule that has a name.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Serialize;

use crate::error::Result;
use crate::manifest::{DataFile, RowScenes};
use crate::rows;
use crate::split::{Side, Split};

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
    pub fn on(&self, side: Side) -> u64 {
        self.sides.get(&side).copied().unwrap_or(0)
    }

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
