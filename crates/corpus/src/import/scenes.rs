//! What a reader of any form hands on: lines gathered into scenes of a sensible length, and notes of what was not kept.

use crate::language::{ByLanguage, Language};
use crate::scene::{Line, LineKind, Scene};

/// From so many lines or characters on a scene ends at the next place that suits.
const ENOUGH: Size = Size {
    lines: 40,
    chars: 4000,
};
/// At so many lines or characters a scene ends wherever it is.
const MOST: Size = Size {
    lines: 80,
    chars: 8000,
};
/// Fewer lines behind the last cut stay with the scene before.
const TAIL_LINES: usize = 8;
/// Characters of a scene's id that come from its title.
const TITLE_CHARS: usize = 80;

#[derive(Clone, Copy)]
struct Size {
    lines: usize,
    chars: usize,
}

impl Size {
    fn is_reached(self, lines: usize, chars: usize) -> bool {
        lines >= self.lines || chars >= self.chars
    }
}

/// The scenes of one file and what was not kept of it; ids are unique within nothing yet, campaigns are empty.
#[derive(Debug, Default)]
pub(crate) struct Imported {
    pub scenes: Vec<Scene>,
    pub notes: Notes,
}

/// What was left out or changed, by kind.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Notes(pub Vec<Kind>);

/// A kind of thing that was left out or changed, how often, and the line where it stands first.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Kind {
    pub what: &'static str,
    pub count: usize,
    pub line: usize,
}

impl Notes {
    // What several forms give: equal texts are counted together.
    pub const EMPTY: &'static str = "messages without a text";
    pub const MACROS: &'static str =
        "macros that only a front end fills in (they stay in the text)";
    pub const DEFAULTS: &'static str =
        "variables in texts, replaced by the value that they begin with";
    pub const VARIABLES: &'static str = "lines with variables ($name in the story: give their values in [story.variables] of the character file)";

    /// Counts one thing at a line.
    pub fn add(&mut self, what: &'static str, line: usize) {
        self.add_many(what, 1, line);
    }

    /// Counts several things, the first of which stands at `line`.
    pub fn add_many(&mut self, what: &'static str, count: usize, line: usize) {
        if count == 0 {
            return;
        }
        match self.0.iter_mut().find(|kind| kind.what == what) {
            Some(kind) => kind.count += count,
            None => self.0.push(Kind { what, count, line }),
        }
    }
}

/// What cannot be read, and where.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Fault {
    pub line: usize,
    pub problem: String,
}

impl Fault {
    pub fn new(line: usize, problem: impl Into<String>) -> Fault {
        Fault {
            line,
            problem: problem.into(),
        }
    }
}

/// Who speaks a line: the id, and the name shown if there is one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Voice {
    pub id: String,
    pub name: Option<String>,
}

/// Gathers the lines of one file in their order.
pub(crate) struct Gatherer {
    language: Language,
    title: String,
    lines: Vec<Line>,
    /// Places in `lines` before which a long scene may be cut.
    may_cut: Vec<usize>,
    n_untitled: usize,
    done: Vec<Scene>,
    pub notes: Notes,
}

impl Gatherer {
    pub fn new(language: Language) -> Gatherer {
        Gatherer {
            language,
            title: String::new(),
            lines: Vec::new(),
            may_cut: Vec::new(),
            n_untitled: 0,
            done: Vec::new(),
            notes: Notes::default(),
        }
    }

    pub fn narration(&mut self, text: &str) {
        self.push(self.line(LineKind::Narration, None, text));
    }

    pub fn dialogue(&mut self, voice: &Voice, text: &str) {
        self.push(self.line(LineKind::Dialogue, Some(voice), text));
    }

    /// A line that names its speaker (`Name: text`), or narration.
    pub fn named_or_narration(&mut self, text: &str) {
        match super::name::split(text) {
            Some((name, text)) => self.dialogue(&super::name::voice(&name), &text),
            None => self.narration(text),
        }
    }

    /// A line with the text in the file's language; narration where a speaker has neither name nor id.
    pub fn line(&self, kind: LineKind, voice: Option<&Voice>, text: &str) -> Line {
        let voice = voice.filter(|voice| !voice.id.trim().is_empty());
        let mut line = Line {
            kind: match (kind, voice) {
                (LineKind::Dialogue, None) => LineKind::Narration,
                (kind, _) => kind,
            },
            speaker_id: String::new(),
            speaker_name: ByLanguage::default(),
            text: ByLanguage::default(),
            has_variables: false,
        };
        if let Some(voice) = voice {
            line.speaker_id.clone_from(&voice.id);
            if let Some(name) = &voice.name {
                line.speaker_name.set(self.language, name);
            }
        }
        let text = text.trim();
        if !text.is_empty() {
            line.text.set(self.language, text);
        }
        line
    }

    /// Appends a line; one without any text is passed over.
    pub fn push(&mut self, line: Line) {
        if !line.text.is_empty() {
            self.lines.push(line);
        }
    }

    /// The last line of the scene that is being gathered.
    pub fn last(&mut self) -> Option<&mut Line> {
        self.lines.last_mut()
    }

    /// A long scene may be cut here.
    pub fn may_cut(&mut self) {
        self.may_cut.push(self.lines.len());
    }

    /// Ends a scene; the next one has this title, or a number if it is empty.
    pub fn border(&mut self, title: &str) {
        self.close();
        self.title = crate::error::shorten(title.trim(), TITLE_CHARS);
    }

    /// How many scenes have ended.
    pub fn n_scenes(&self) -> usize {
        self.done.len()
    }

    pub fn finish(mut self) -> Imported {
        self.close();
        Imported {
            scenes: self.done,
            notes: self.notes,
        }
    }

    fn close(&mut self) {
        let lines = std::mem::take(&mut self.lines);
        let may_cut = std::mem::take(&mut self.may_cut);
        let mut rest = lines.into_iter();
        let mut start = 0;
        for (idx, end) in ends(rest.as_slice(), &may_cut).into_iter().enumerate() {
            let id = if self.title.is_empty() {
                self.n_untitled += 1;
                self.n_untitled.to_string()
            } else if idx == 0 {
                self.title.clone()
            } else {
                format!("{}/{}", self.title, idx + 1)
            };
            self.done.push(Scene {
                id,
                campaign: String::new(),
                scenario: String::new(),
                lines: rest.by_ref().take(end - start).collect(),
            });
            start = end;
        }
        self.title.clear();
    }
}

/// Where the scenes end into which a stretch of lines is cut.
fn ends(lines: &[Line], may_cut: &[usize]) -> Vec<usize> {
    let n_chars = |line: &Line| -> usize {
        let longest = line.text.iter().map(|(_, text)| text.chars().count());
        longest.max().unwrap_or(0)
    };
    let mut ends = Vec::new();
    let (mut start, mut chars) = (0, 0);
    let mut borders = may_cut.iter().copied().peekable();
    for (at, line) in lines.iter().enumerate() {
        while borders.next_if(|border| *border < at).is_some() {}
        let suits = borders.peek() == Some(&at);
        let n = n_chars(line);
        let is_full = ENOUGH.is_reached(at - start, chars) && suits
            || MOST.is_reached(at - start, chars)
            || chars + n > MOST.chars;
        if at > start && is_full {
            ends.push(at);
            (start, chars) = (at, 0);
        }
        chars += n;
    }
    if lines.is_empty() {
        return ends;
    }
    let is_short = lines.len() - start < TAIL_LINES && chars < ENOUGH.chars / 4;
    if is_short && !ends.is_empty() {
        ends.pop();
    }
    ends.push(lines.len());
    ends
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gather(n: usize, cuts: &[usize], text: &str) -> Vec<usize> {
        let mut gatherer = Gatherer::new(Language::En);
        for at in 0..n {
            if cuts.contains(&at) {
                gatherer.may_cut();
            }
            gatherer.narration(text);
        }
        let scenes = gatherer.finish().scenes;
        scenes.iter().map(|scene| scene.lines.len()).collect()
    }

    #[test]
    fn long_scenes_are_cut_where_it_suits_and_short_ones_never() {
        assert_eq!(gather(39, &[5, 10, 20], "x"), [39]);
        assert_eq!(gather(100, &[5, 44, 50], "x"), [44, 56]);
        assert_eq!(gather(200, &[], "x"), [80, 80, 40]);
        assert_eq!(gather(83, &[], "x"), [83], "a short tail stays");
        assert_eq!(gather(0, &[], "x"), [0; 0]);
    }

    #[test]
    fn long_lines_count_by_their_characters() {
        assert_eq!(gather(4, &[], &"x".repeat(3000)), [2, 2]);
        assert_eq!(gather(3, &[], &"x".repeat(9000)), [1, 1, 1]);
    }

    #[test]
    fn cut_scenes_keep_their_title_and_get_a_number() {
        let mut gatherer = Gatherer::new(Language::En);
        gatherer.border("start");
        (0..100).for_each(|_| gatherer.narration("x"));
        gatherer.border("");
        gatherer.narration("y");
        gatherer.border("empty");
        let ids: Vec<String> = gatherer.finish().scenes.into_iter().map(|s| s.id).collect();
        assert_eq!(ids, ["start", "start/2", "1"]);
    }
}
