//! The data sets that can be built, by the names of the command line and of the folders they go to.

use crate::error::{Error, Result};
use text::near;

/// A data set: stage and selection. `Amphoreus` is the character's part of the story, whatever the story.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Task {
    /// Documents of the whole story.
    PtEverything,
    /// Documents of the character's part of the story.
    PtAmphoreus,
    /// Documents of a folder of pages about the story.
    PtVendor,
    /// Conversations in which everybody is the assistant.
    SftEverything,
    /// The same of the character's part of the story.
    SftAmphoreus,
    /// Conversations in which the character is the assistant.
    SftCyrene,
}

impl Task {
    /// All of them, in the order of every listing.
    pub const ALL: [Task; 6] = [
        Task::PtEverything,
        Task::PtAmphoreus,
        Task::PtVendor,
        Task::SftEverything,
        Task::SftAmphoreus,
        Task::SftCyrene,
    ];

    /// `pt/everything`, ...: the folder below the output folder, and the name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Task::PtEverything => "pt/everything",
            Task::PtAmphoreus => "pt/amphoreus",
            Task::PtVendor => "pt/vendor",
            Task::SftEverything => "sft/everything",
            Task::SftAmphoreus => "sft/amphoreus",
            Task::SftCyrene => "sft/cyrene",
        }
    }

    /// Reads a name; `sft/character` and `pt/character` stand for `sft/cyrene` and `pt/amphoreus`.
    ///
    /// # Errors
    /// No task has this name.
    pub fn parse(name: &str) -> Result<Task> {
        match name {
            "sft/character" => return Ok(Task::SftCyrene),
            "pt/character" => return Ok(Task::PtAmphoreus),
            _ => {}
        }
        Task::ALL
            .into_iter()
            .find(|task| task.name() == name)
            .ok_or_else(|| Error::UnknownTask {
                task: name.to_owned(),
                near: near::hint(name, Task::ALL.map(Task::name)),
                known: Task::ALL.map(Task::name).join(", "),
            })
    }

    /// Whether it is for continued pre-training (one assistant message a record).
    pub fn is_pt(self) -> bool {
        matches!(
            self,
            Task::PtEverything | Task::PtAmphoreus | Task::PtVendor
        )
    }
}

impl std::fmt::Display for Task {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}
