//! Subtitles: SubRip, WebVTT and SubStation Alpha; a cue is a line, a long silence may end a scene.

use crate::language::Language;

use super::scenes::{Fault, Gatherer, Imported};
use super::{html, name};

/// A silence after which a long scene may be cut, and one that ends a scene.
const PAUSE_MS: u64 = 4_000;
const SCENE_MS: u64 = 20_000;
/// Fewer lines than this are no scene of their own.
const SCENE_LINES: usize = 8;
/// Bytes of the longest tag.
const LONGEST_TAG: usize = 200;

const STYLES: &str = "tags of style and position in subtitles";
const NAMELESS: &str = "cues that name no speaker (they became narration)";
const REPEATED: &str = "cues that repeat the one before";
const DRAWINGS: &str = "drawings and empty cues";
const COMMENTS: &str = "comments, notes and style sheets";

/// One cue: when it is shown, who speaks if the file says so, its lines.
#[derive(Debug, PartialEq, Eq)]
struct Cue {
    start_ms: u64,
    end_ms: u64,
    speaker: String,
    text: String,
    line: usize,
}

/// The scenes of a SubRip or WebVTT file.
///
/// # Errors
/// A timing line that cannot be read.
pub(crate) fn read_srt(text: &str, language: Language) -> Result<Imported, Fault> {
    let mut out = Gatherer::new(language);
    let lines: Vec<&str> = text.lines().collect();
    let mut cues: Vec<Cue> = Vec::new();
    let mut at = 0;
    while at < lines.len() {
        let line = lines[at].trim();
        if !line.contains("-->") {
            let is_block = ["NOTE", "STYLE", "REGION"].iter().any(|word| {
                line.strip_prefix(word)
                    .is_some_and(|rest| !rest.starts_with(char::is_alphanumeric))
            });
            if is_block {
                out.notes.add(COMMENTS, at + 1);
                at += lines[at..]
                    .iter()
                    .take_while(|line| !line.trim().is_empty())
                    .count();
            } else {
                let is_identifier = lines.get(at + 1).is_some_and(|next| timing(next).is_some());
                if let Some(cue) = cues
                    .last_mut()
                    .filter(|_| !is_identifier && !line.is_empty())
                {
                    // An empty line stood inside the text of the cue.
                    cue.text.push('\n');
                    cue.text.push_str(line);
                }
                at += 1;
            }
            continue;
        }
        let (start_ms, end_ms) = timing(line).ok_or_else(|| {
            Fault::new(
                at + 1,
                format!(
                    "`{}` is no timing like 00:00:01,000 --> 00:00:02,500",
                    crate::error::shorten(line, 60)
                ),
            )
        })?;
        let first = at + 1;
        let n_lines = cue_lines(&lines[first..]);
        cues.push(Cue {
            start_ms,
            end_ms,
            speaker: String::new(),
            text: lines[first..first + n_lines].join("\n"),
            line: at + 1,
        });
        at = first + n_lines;
    }
    gather(cues, out)
}

/// How many of the lines behind a timing belong to the cue: up to an empty line or the next cue.
fn cue_lines(lines: &[&str]) -> usize {
    let is_empty = |at: usize| lines.get(at).is_none_or(|line| line.trim().is_empty());
    let mut end = 0;
    while end < lines.len() && !is_empty(end) {
        if timing(lines[end]).is_some() {
            // No empty line before the next cue: its number is not ours.
            let has_number = end > 0 && lines[end - 1].trim().parse::<u64>().is_ok();
            return end - usize::from(has_number);
        }
        end += 1;
    }
    end
}

/// Start and end of `00:00:01,000 --> 00:00:02.500 position:50%`, in milliseconds.
pub(crate) fn timing(line: &str) -> Option<(u64, u64)> {
    let (start, rest) = line.split_once("-->")?;
    let end = rest.split_whitespace().next()?;
    Some((time(start.trim())?, time(end)?))
}

/// Milliseconds of `01:02:03,456`, `02:03.456`, `1:02:03.45`.
fn time(text: &str) -> Option<u64> {
    let (clock, fraction) = text.split_once([',', '.']).unwrap_or((text, "0"));
    let digits: String = fraction.chars().take(3).collect();
    let n_digits = digits.len();
    let fraction = digits.parse::<u64>().ok()? * [1, 100, 10, 1][n_digits.min(3)];
    let mut seconds: u64 = 0;
    for part in clock.split(':') {
        let part: u64 = part.trim().parse().ok()?;
        seconds = seconds.checked_mul(60)?.checked_add(part)?;
    }
    seconds.checked_mul(1000)?.checked_add(fraction)
}

/// The scenes of an .ass or .ssa file.
///
/// # Errors
/// Events without the line that says their columns, or times that cannot be read.
pub(crate) fn read_ass(text: &str, language: Language) -> Result<Imported, Fault> {
    let mut out = Gatherer::new(language);
    let mut columns: Option<Columns> = None;
    let mut is_events = false;
    let mut cues = Vec::new();
    for (at, line) in text.lines().enumerate() {
        let line = line.trim_start();
        let number = at + 1;
        if line.starts_with('[') {
            is_events = line.to_ascii_lowercase().starts_with("[events]");
        } else if !is_events {
        } else if let Some(format) = line.strip_prefix("Format:") {
            columns = Some(Columns::read(format).ok_or_else(|| {
                Fault::new(
                    number,
                    "this line must name the columns Start, End and, as the last, Text",
                )
            })?);
        } else if line.starts_with("Comment:") {
            out.notes.add(COMMENTS, number);
        } else if let Some(event) = line.strip_prefix("Dialogue:") {
            let Some(columns) = &columns else {
                return Err(Fault::new(
                    number,
                    "no line `Format: ...` stands before this event",
                ));
            };
            cues.push(columns.cue(event, number).ok_or_else(|| {
                Fault::new(number, "this event has fewer columns than its `Format:` line, or no times like 0:00:01.00")
            })?);
        }
    }
    gather(cues, out)
}

/// Where the columns of an event stand.
struct Columns {
    start: usize,
    end: usize,
    name: Option<usize>,
    n: usize,
}

impl Columns {
    fn read(format: &str) -> Option<Columns> {
        let names: Vec<String> = format
            .split(',')
            .map(|name| name.trim().to_ascii_lowercase())
            .collect();
        let find = |wanted: &str| names.iter().position(|name| name == wanted);
        (names.last()? == "text").then_some(())?;
        Some(Columns {
            start: find("start")?,
            end: find("end")?,
            name: find("name").or_else(|| find("actor")),
            n: names.len(),
        })
    }

    fn cue(&self, event: &str, line: usize) -> Option<Cue> {
        let cells: Vec<&str> = event.splitn(self.n, ',').collect();
        (cells.len() == self.n).then_some(())?;
        Some(Cue {
            start_ms: time(cells[self.start].trim())?,
            end_ms: time(cells[self.end].trim())?,
            speaker: self.name.map_or("", |at| cells[at].trim()).to_owned(),
            text: cells[self.n - 1]
                .replace("\\N", "\n")
                .replace("\\n", "\n")
                .replace("\\h", " "),
            line,
        })
    }
}

/// Lines of the cues in the order of their times.
fn gather(mut cues: Vec<Cue>, mut out: Gatherer) -> Result<Imported, Fault> {
    cues.sort_by_key(|cue| cue.start_ms);
    let mut last: Option<(String, u64)> = None;
    let mut n_lines = 0;
    for cue in cues {
        if cue.text.contains("\\p1") {
            out.notes.add(DRAWINGS, cue.line);
            continue;
        }
        let (said, n_styles) = styled(&cue);
        out.notes.add_many(STYLES, n_styles, cue.line);
        let texts: Vec<&str> = said.iter().map(|said| said.text.as_str()).collect();
        let text = texts.join("\n");
        if text.is_empty() {
            out.notes.add(DRAWINGS, cue.line);
            continue;
        }
        if let Some((said, end_ms)) = &mut last {
            // Layers of one text, and captions that roll, show again what still stands there.
            if cue.start_ms <= *end_ms + 100 && *said == text {
                out.notes.add(REPEATED, cue.line);
                *end_ms = cue.end_ms.max(*end_ms);
                continue;
            }
            let silence = cue.start_ms.saturating_sub(*end_ms);
            if silence >= SCENE_MS && n_lines >= SCENE_LINES {
                out.border("");
                n_lines = 0;
            } else if silence >= PAUSE_MS {
                out.may_cut();
            }
        }
        for said in &said {
            n_lines += say(&mut out, said, cue.line);
        }
        let end_ms = last.map_or(0, |(_, end_ms)| end_ms).max(cue.end_ms);
        last = Some((text, end_ms));
    }
    Ok(out.finish())
}

/// Gives the lines of what is said, and how many they are. A dash in front of each line means several speakers.
fn say(out: &mut Gatherer, said: &Said, line: usize) -> usize {
    let Said { speaker, text } = said;
    let is_dashed = |line: &str| line.starts_with(['-', '–', '—']);
    let several = text.lines().count() > 1 && text.lines().all(is_dashed);
    let named = text.lines().count() > 1 && text.lines().all(|line| name::split(line).is_some());
    let parts: Vec<String> = match several || named {
        true => text
            .lines()
            .map(|line| line.trim_start_matches(['-', '–', '—', ' ']).to_owned())
            .collect(),
        false => vec![joined(text)],
    };
    let n = parts.len();
    for part in parts {
        if !speaker.is_empty() {
            out.dialogue(&name::voice(speaker), &part);
        } else if let Some((name, text)) =
            name::split(part.trim_start_matches(['-', '–', '—', ' ']))
        {
            out.dialogue(&name::voice(&name), &text);
        } else {
            out.notes.add(NAMELESS, line);
            out.narration(&part);
        }
    }
    n
}

/// The lines of a cue as one: a blank between words, none between characters of Chinese and Japanese.
fn joined(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for line in text.lines().map(str::trim).filter(|line| !line.is_empty()) {
        let is_spaced = |c: Option<char>| c.is_none_or(|c| !is_han(c));
        if !out.is_empty() && (is_spaced(out.chars().next_back()) || is_spaced(line.chars().next()))
        {
            out.push(' ');
        }
        out.push_str(line);
    }
    out
}

/// Whether a character belongs to a script that puts no blanks between words.
pub(crate) fn is_han(c: char) -> bool {
    matches!(c, '\u{3000}'..='\u{30ff}' | '\u{3400}'..='\u{9fff}' | '\u{ff00}'..='\u{ffef}' | '\u{20000}'..='\u{3ffff}')
}

/// What one speaker says in a cue; the name is empty where nothing tells it.
#[derive(Debug, PartialEq, Eq)]
struct Said {
    speaker: String,
    text: String,
}

/// What is said in a cue, without tags, parted where a voice tag names another speaker (where no column names one), and how many tags
/// there were.
fn styled(cue: &Cue) -> (Vec<Said>, usize) {
    let by = |speaker: &str| Said {
        speaker: speaker.to_owned(),
        text: String::new(),
    };
    let mut said = Vec::new();
    let mut now = by(&cue.speaker);
    let mut n_tags = 0;
    let mut rest = cue.text.as_str();
    while let Some(at) = rest.find(['<', '{']) {
        now.text.push_str(&rest[..at]);
        rest = &rest[at..];
        let Some(tag) = tag(rest) else {
            now.text.push_str(&rest[..1]);
            rest = &rest[1..];
            continue;
        };
        rest = &rest[tag.len() + 2..];
        let voice = voice(tag);
        n_tags += usize::from(voice.is_none());
        let speaker = match voice {
            _ if !cue.speaker.is_empty() => continue,
            None if tag != "/v" => continue,
            voice => voice.unwrap_or_default(),
        };
        if now.speaker != speaker {
            said.push(std::mem::replace(&mut now, by(speaker)));
        }
    }
    now.text.push_str(rest);
    said.push(now);
    (tidied(said), n_tags)
}

/// The inside of the tag that a text begins with: of `<i>`, `</i>`, `<v Bo>`, `<00:01.000>`, `{\an8}`; `None` where it only looks so (`<3`).
fn tag(text: &str) -> Option<&str> {
    let close = if text.starts_with('<') { b'>' } else { b'}' };
    let mut bytes = text.as_bytes().iter().take(LONGEST_TAG);
    let inside = &text[1..bytes.position(|b| *b == close)?];
    let is_tag = match inside.as_bytes().first()? {
        b'\\' => close == b'}',
        b'0'..=b'9' => close == b'>' && inside.contains(':') && time(inside).is_some(),
        first => close == b'>' && (first.is_ascii_alphabetic() || *first == b'/'),
    };
    is_tag.then_some(inside)
}

/// The name in a voice tag such as `v Bo` or `v.loud Bo`.
fn voice(tag: &str) -> Option<&str> {
    let voice = tag.strip_prefix('v')?;
    let (_, name) = voice.split_once(' ').unwrap_or_default();
    voice.starts_with([' ', '.']).then_some(name.trim())
}

/// The same with characters for their references and without empty lines. What nobody says and holds no word (a dash, a blank between two
/// voices) goes, and what one speaker says then stands together.
fn tidied(said: Vec<Said>) -> Vec<Said> {
    let is_parted = said.len() > 1;
    let mut out: Vec<Said> = Vec::new();
    for Said { speaker, text } in said {
        let text = html::unescape(&text);
        let lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
        let text = lines.collect::<Vec<_>>().join("\n");
        let speaker = html::unescape(&speaker);
        let is_word = text.contains(char::is_alphanumeric);
        if text.is_empty() || is_parted && speaker.is_empty() && !is_word {
            continue;
        }
        match out.last_mut().filter(|last| last.speaker == speaker) {
            Some(last) => {
                last.text.push('\n');
                last.text.push_str(&text);
            }
            None => out.push(Said { speaker, text }),
        }
    }
    out
}

#[cfg(test)]
mod tests;
