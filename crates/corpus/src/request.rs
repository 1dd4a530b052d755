//! What is asked of a build or a split, and how far a build is.

use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::character::Character;
use crate::language::Language;
use crate::source::SourceKind;
use crate::split::SplitOptions;
use crate::task::Task;

/// What to build from what.
#[derive(Debug, Clone, Copy)]
pub struct BuildRequest<'a> {
    /// Where the story comes from.
    pub source: SourceKind,
    /// The story's file or folder; the game's tree; for `pt/vendor` the vendor folder.
    pub root: &'a Path,
    /// The character's file, read.
    pub character: &'a Character,
    /// What is named twice is built once.
    pub tasks: &'a [Task],
    /// Languages to build; `None`: those of the character file.
    pub languages: Option<&'a [Language]>,
    /// Output folder; data sets of other tasks in it stay.
    pub out: &'a Path,
}

impl BuildRequest<'_> {
    /// The languages to build, in the order of every listing.
    pub(crate) fn languages(&self) -> Vec<Language> {
        match self.languages {
            None => self.character.languages(),
            Some(asked) => Language::ALL
                .into_iter()
                .filter(|l| asked.contains(l))
                .collect(),
        }
    }
}

/// How far a build is.
#[derive(Debug, Clone, Copy)]
pub struct Progress {
    /// The file just finished; `None` at the beginning.
    pub file: Option<(Task, Option<Language>)>,
    /// Files that are finished.
    pub done: usize,
    /// Files that there will be.
    pub total: usize,
}

/// Which story to split for which character.
#[derive(Debug, Clone, Copy)]
pub struct SplitRequest<'a> {
    /// Where the story comes from.
    pub source: SourceKind,
    /// The story's file or folder, or the game's tree.
    pub root: &'a Path,
    /// The vendor folder of a game's tree, whose pages are split with it.
    pub vendor: Option<&'a Path>,
    /// The character's file, read.
    pub character: &'a Character,
    /// Shares and seed.
    pub options: SplitOptions,
}

/// Counts finished files for the progress callback.
pub(crate) struct Steps<'a> {
    done: AtomicUsize,
    total: usize,
    progress: &'a (dyn Fn(Progress) + Sync),
}

impl<'a> Steps<'a> {
    pub fn new(total: usize, progress: &'a (dyn Fn(Progress) + Sync)) -> Steps<'a> {
        progress(Progress {
            file: None,
            done: 0,
            total,
        });
        Steps {
            done: AtomicUsize::new(0),
            total,
            progress,
        }
    }

    pub fn done(&self, task: Task, language: Option<Language>) {
        let done = self.done.fetch_add(1, Ordering::Relaxed) + 1;
        (self.progress)(Progress {
            file: Some((task, language)),
            done,
            total: self.total,
        });
    }
}
