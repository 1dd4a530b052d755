//! Where stories come from: one module a source, which builds, splits and checks.

pub(crate) mod story;
pub(crate) mod turn_based_game;

use crate::error::{Error, Result};
use crate::request::{BuildRequest, Progress, SplitRequest};
use crate::rules::Counters;
use crate::split::Split;
use crate::staged::Built;
use crate::stopwatch::Stopwatch;
use text::near;

/// A kind of source.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SourceKind {
    /// JSON lines of scenes and texts (docs/story-format.md).
    Story,
    /// Tables and text maps of a turn-based game.
    TurnBasedGame,
}

/// Builds what a request asks for, counting tokens, telling of finished files and where the time goes.
type Build = fn(
    &BuildRequest<'_>,
    Counters<'_>,
    &(dyn Fn(Progress) + Sync),
    &Stopwatch,
) -> Result<Vec<Built>>;

/// What a source does.
pub(crate) struct Source {
    /// Its name on the command line.
    pub name: &'static str,
    /// Writes the files of the request's tasks, which are different ones, up to their names.
    pub build: Build,
    /// Splits the story.
    pub split: fn(&SplitRequest<'_>) -> Result<Split>,
    /// Holds a split against what is about to be built beside it.
    pub check: fn(&BuildRequest<'_>, &Split) -> Result<()>,
}

impl SourceKind {
    /// Every source.
    const ALL: [SourceKind; 2] = [SourceKind::Story, SourceKind::TurnBasedGame];

    /// What it does.
    pub(crate) fn source(self) -> &'static Source {
        match self {
            SourceKind::Story => &story::SOURCE,
            SourceKind::TurnBasedGame => &turn_based_game::SOURCE,
        }
    }

    /// The source of a name.
    ///
    /// # Errors
    /// No source has this name.
    pub fn parse(name: &str) -> Result<SourceKind> {
        SourceKind::ALL
            .into_iter()
            .find(|kind| kind.name() == name)
            .ok_or_else(|| Error::UnknownSource {
                name: name.to_owned(),
                near: near::hint(name, SourceKind::ALL.map(SourceKind::name)),
            })
    }

    /// The name that the command line uses.
    pub fn name(self) -> &'static str {
        self.source().name
    }
}
