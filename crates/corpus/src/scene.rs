//! A story as its source gives it: scenes of lines and other texts, each text in all its languages.

use crate::language::ByLanguage;

/// A whole story, in the order of its files.
#[derive(Debug, Clone, Default)]
pub struct Story {
    pub scenes: Vec<Scene>,
    pub texts: Vec<Text>,
    /// SHA-256 over the names and contents of the files it was read from.
    pub sha256: String,
    /// Keys of the files that mean nothing here, with how often they stand there.
    pub unknown_keys: std::collections::BTreeMap<String, usize>,
}

/// One scene: the unit of splitting and accounting.
#[derive(Debug, Clone)]
pub struct Scene {
    pub id: String,
    pub campaign: String,
    pub scenario: String,
    pub lines: Vec<Line>,
}

/// One line of a scene.
#[derive(Debug, Clone)]
pub struct Line {
    pub kind: LineKind,
    pub speaker_id: String,
    pub speaker_name: ByLanguage,
    pub text: ByLanguage,
    /// Whether `$name` in the text stands for a value that the game fills in.
    pub has_variables: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum LineKind {
    Dialogue,
    Narration,
    Objective,
    /// A choice of the player.
    Option,
}

/// A text outside the scenes: a voice line, or a page of any other kind.
#[derive(Debug, Clone)]
pub struct Text {
    /// `<campaign>/<kind>/<id>`, with `#2`, `#3`, ... behind a repeated one.
    pub id: String,
    pub campaign: String,
    pub kind: String,
    pub title: ByLanguage,
    pub text: ByLanguage,
    /// Who speaks a voice line.
    pub speaker: Option<Speaker>,
}

#[derive(Debug, Clone)]
pub struct Speaker {
    pub id: String,
    pub name: ByLanguage,
}

impl Text {
    pub fn is_voice(&self) -> bool {
        self.speaker.is_some()
    }
}
