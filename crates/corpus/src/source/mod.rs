//! Where stories come from: one module a source.

pub(crate) mod story;
pub(crate) mod turn_based_game;

use crate::error::{Error, Result};
use crate::near;

/// A kind of source.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SourceKind {
    /// JSON lines of scenes and texts (docs/story-format.md).
    Story,
    /// Tables and text maps of a turn-based game.
    TurnBasedGame,
}

/// Every source by the name that the command line uses.
pub const ALL: [(&str, SourceKind); 2] = [
    ("story", SourceKind::Story),
    ("turn-based-game", SourceKind::TurnBasedGame),
];

impl SourceKind {
    /// # Errors
    /// No source has this name.
    pub fn parse(name: &str) -> Result<SourceKind> {
        ALL.into_iter()
            .find(|(known, _)| *known == name)
            .map(|(_, kind)| kind)
            .ok_or_else(|| Error::UnknownSource {
                name: name.to_owned(),
                near: near::hint(name, ALL.map(|(known, _)| known)),
            })
    }

    pub fn name(self) -> &'static str {
        match self {
            SourceKind::Story => "story",
            SourceKind::TurnBasedGame => "turn-based-game",
        }
    }
}
