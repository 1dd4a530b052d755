//! The story and the character that come with the program.

/// The story, JSON lines.
pub const STORY: &str = include_str!("../../../demo/story.jsonl");
/// Its character file.
pub const CHARACTER: &str = include_str!("../../../characters/ovelle.toml");
