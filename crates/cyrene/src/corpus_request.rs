//! What the arguments of `corpus build` ask `corpus` for.

use std::path::Path;

use anyhow::Result;
use corpus::{BuildRequest, Character, Language, SourceKind, Task, Tokenizers};
use text::WordPattern;

use crate::cli::{CorpusBuild, CountWith};
use crate::ui::misused;

/// The tokenizers that count as the arguments say.
///
/// # Errors
/// A tokenizer that cannot be read.
pub fn tokenizers(args: &CorpusBuild) -> text::Result<Tokenizers> {
    let pattern = match args.count_with {
        CountWith::Qwen2 => WordPattern::Qwen2,
        CountWith::Qwen3_5 => WordPattern::Qwen3_5,
    };
    Tokenizers::load(&args.tokenizer, pattern)
}

/// The arguments as `corpus` takes them.
pub struct Plan<'a> {
    source: SourceKind,
    root: &'a Path,
    /// Which data sets.
    pub tasks: Vec<Task>,
    languages: Vec<Language>,
    out: &'a Path,
}

/// Reads the character and the names of data sets, languages and source.
///
/// # Errors
/// A character file that cannot be read, an unknown task, language or source.
pub fn plan(args: &CorpusBuild) -> Result<(Character, Plan<'_>)> {
    let character = misused(Character::load(&args.character))?;
    let tasks = args.tasks.iter().map(|name| misused(Task::parse(name)));
    let tasks = tasks.collect::<Result<Vec<_>>>()?;
    let languages = misused(Language::parse_all(&args.languages))?;
    let plan = Plan {
        source: misused(SourceKind::parse(&args.source))?,
        root: &args.root,
        tasks,
        languages,
        out: &args.out,
    };
    Ok((character, plan))
}

impl Plan<'_> {
    /// What `corpus` is asked for.
    pub fn request<'r>(&'r self, character: &'r Character) -> BuildRequest<'r> {
        BuildRequest {
            source: self.source,
            root: self.root,
            character,
            tasks: &self.tasks,
            languages: (!self.languages.is_empty()).then_some(&self.languages[..]),
            out: self.out,
        }
    }
}
