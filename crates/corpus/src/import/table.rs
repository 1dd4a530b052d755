//! Tables: CSV and TSV with a header that names the columns, or two columns of speaker and text.

use crate::language::Language;
use crate::scene::{Line, LineKind};

use super::name;
use super::scenes::{Fault, Gatherer, Imported, Voice};

const TEXT: [&str; 9] = [
    "text",
    "line",
    "dialogue",
    "dialog",
    "message",
    "content",
    "utterance",
    "sentence",
    "mes",
];
const SPEAKER: [&str; 6] = [
    "speaker",
    "name",
    "character",
    "who",
    "speaker_name",
    "actor",
];
const SPEAKER_ID: [&str; 3] = ["speaker_id", "speaker id", "character_id"];
const KIND: [&str; 2] = ["kind", "type"];
const SCENE: [&str; 4] = ["scene", "scene_id", "conversation", "dialogue_id"];
const SCENARIO: [&str; 4] = ["scenario", "chapter", "act", "episode"];

const COLUMNS: &str = "cells of columns that a story has no place for";
const NO_TEXT: &str = "rows without a text";
const KINDS: &str = "rows of a kind that a story does not know (taken for dialogue or narration)";

/// A row and the line where it begins.
#[derive(Debug, PartialEq, Eq)]
struct Row {
    cells: Vec<String>,
    line: usize,
}

/// The scenes of a table: rows of one scene stand together.
///
/// # Errors
/// A quote that is never closed; a header without a column of texts, or with two of one language.
pub(crate) fn read(text: &str, language: Language) -> Result<Imported, Fault> {
    let rows = rows(text, separator(text))?;
    let Some(header) = rows.first() else {
        return Ok(Gatherer::new(language).finish());
    };
    let (columns, has_header) = match Columns::of(header)? {
        Some(columns) => (columns, true),
        None => (
            Columns::bare(&rows).ok_or_else(|| no_columns(header))?,
            false,
        ),
    };
    let mut out = Gatherer::new(language);
    let (mut scene, mut scenario): (Option<String>, String) = (None, String::new());
    let mut scenarios = Vec::new();
    for row in &rows[usize::from(has_header)..] {
        let here = (
            columns.cell(row, columns.scenario),
            columns.cell(row, columns.scene),
        );
        if scene.as_deref() != Some(here.1) || scenario != here.0 {
            out.border(here.1);
            scenarios.push((out.n_scenes(), here.0.to_owned()));
            scene = Some(here.1.to_owned());
            scenario = here.0.to_owned();
        }
        let n_other = row
            .cells
            .iter()
            .enumerate()
            .filter(|(at, cell)| !columns.is_known(*at) && !cell.trim().is_empty())
            .count();
        out.notes.add_many(COLUMNS, n_other, row.line);
        let line = line(&columns, row, &mut out);
        match line.text.is_empty() {
            true => out.notes.add(NO_TEXT, row.line),
            false => out.push(line),
        }
    }
    let mut imported = out.finish();
    let mut scenarios = scenarios.into_iter().peekable();
    let mut scenario = String::new();
    for (at, scene) in imported.scenes.iter_mut().enumerate() {
        while let Some((_, next)) = scenarios.next_if(|(first, _)| *first <= at) {
            scenario = next;
        }
        scene.scenario.clone_from(&scenario);
    }
    Ok(imported)
}

fn no_columns(header: &Row) -> Fault {
    let shown = crate::error::shorten(&header.cells.join(", "), 100);
    Fault::new(
        header.line,
        format!(
            "no column of texts in the header `{shown}`; name one `text`, or one for each language (en, zh, ja, ...), and those of `speaker`, `scene` and `kind`"
        ),
    )
}

fn line(columns: &Columns, row: &Row, out: &mut Gatherer) -> Line {
    let (speaker, id) = (
        columns.cell(row, columns.speaker),
        columns.cell(row, columns.speaker_id),
    );
    let spoken = if speaker.is_empty() && id.is_empty() {
        LineKind::Narration
    } else {
        LineKind::Dialogue
    };
    let kind = match columns.cell(row, columns.kind).to_lowercase().as_str() {
        "" => spoken,
        "dialogue" | "dialog" | "say" => spoken,
        "narration" | "narrator" => LineKind::Narration,
        "option" | "choice" => LineKind::Option,
        "objective" | "quest" => LineKind::Objective,
        _ => {
            out.notes.add(KINDS, row.line);
            spoken
        }
    };
    let voice = (kind == LineKind::Dialogue).then(|| Voice {
        id: if id.is_empty() {
            name::id(speaker)
        } else {
            id.to_owned()
        },
        name: (!speaker.is_empty()).then(|| speaker.to_owned()),
    });
    let mut line = out.line(kind, voice.as_ref(), columns.cell(row, columns.text));
    for (at, language) in &columns.languages {
        let text = columns.cell(row, Some(*at));
        if !text.is_empty() {
            line.text.set(*language, text);
        }
        if let Some(name) = voice.as_ref().and_then(|voice| voice.name.as_deref()) {
            line.speaker_name.set(*language, name);
        }
    }
    line
}

#[derive(Debug, Default)]
struct Columns {
    text: Option<usize>,
    languages: Vec<(usize, Language)>,
    speaker: Option<usize>,
    speaker_id: Option<usize>,
    kind: Option<usize>,
    scene: Option<usize>,
    scenario: Option<usize>,
}

impl Columns {
    /// The columns that a header names; `None` where it names no text.
    fn of(header: &Row) -> Result<Option<Columns>, Fault> {
        let names: Vec<String> = header
            .cells
            .iter()
            .map(|name| name.trim().to_lowercase())
            .collect();
        let find = |wanted: &[&str]| {
            let first = |wanted: &&str| names.iter().position(|name| name == wanted);
            wanted.iter().find_map(first)
        };
        let text = find(&TEXT);
        let by_language = |(at, name): (usize, &String)| Some((at, Language::from_name(name)?));
        let languages: Vec<_> = names.iter().enumerate().filter_map(by_language).collect();
        let speaker_id = find(&SPEAKER_ID);
        // `id` is a language code as well: Indonesian stands beside other languages only.
        let languages = if text.is_some() {
            Vec::new()
        } else {
            languages
        };
        if text.is_none() && languages.iter().all(|(at, _)| names[*at] == "id") {
            return Ok(None);
        }
        for (nth, (at, language)) in languages.iter().enumerate() {
            let mut before = languages[..nth].iter();
            if let Some((first, _)) = before.find(|(_, other)| other == language) {
                return Err(Fault::new(
                    header.line,
                    format!(
                        "the columns `{}` and `{}` are both `{language}`; give one of them another name",
                        header.cells[*first].trim(),
                        header.cells[*at].trim()
                    ),
                ));
            }
        }
        Ok(Some(Columns {
            text,
            languages,
            speaker: find(&SPEAKER),
            speaker_id,
            kind: find(&KIND),
            scene: find(&SCENE),
            scenario: find(&SCENARIO),
        }))
    }

    /// Speaker and text, where every row has these two cells.
    fn bare(rows: &[Row]) -> Option<Columns> {
        rows.iter()
            .all(|row| row.cells.len() == 2)
            .then(|| Columns {
                speaker: Some(0),
                text: Some(1),
                ..Columns::default()
            })
    }

    fn cell<'a>(&self, row: &'a Row, at: Option<usize>) -> &'a str {
        at.and_then(|at| row.cells.get(at))
            .map_or("", |cell| cell.trim())
    }

    fn is_known(&self, at: usize) -> bool {
        let single = [
            self.text,
            self.speaker,
            self.speaker_id,
            self.kind,
            self.scene,
            self.scenario,
        ];
        single.contains(&Some(at)) || self.languages.iter().any(|(known, _)| *known == at)
    }
}

/// The character that parts cells: what stands most often in the first line.
fn separator(text: &str) -> char {
    let first = text
        .lines()
        .find(|line| !line.trim().is_empty())
        .unwrap_or("");
    let count = |separator: &char| first.matches(*separator).count();
    // Of equals the last wins.
    [';', '\t', ',']
        .into_iter()
        .max_by_key(count)
        .unwrap_or(',')
}

/// Rows as RFC 4180 has them: cells in quotes may hold separators, line feeds and doubled quotes. Written here rather than
/// taken from a crate, because a quote that is never closed must be named with its line and not swallow the rest.
fn rows(text: &str, separator: char) -> Result<Vec<Row>, Fault> {
    let mut rows = Vec::new();
    let mut row = Row {
        cells: Vec::new(),
        line: 1,
    };
    let mut cell = String::new();
    let mut number = 1;
    let mut rest = text;
    while let Some(c) = rest.chars().next() {
        rest = &rest[c.len_utf8()..];
        if c == '"' && cell.trim().is_empty() {
            let opened = number;
            cell.clear();
            loop {
                let Some(at) = rest.find('"') else {
                    return Err(Fault::new(
                        opened,
                        "a quote opens a cell here and is never closed",
                    ));
                };
                cell.push_str(&rest[..at]);
                number += rest[..at].matches('\n').count();
                rest = &rest[at + 1..];
                match rest.strip_prefix('"') {
                    Some(behind) => {
                        cell.push('"');
                        rest = behind;
                    }
                    None => break,
                }
            }
        } else if c == separator {
            row.cells.push(std::mem::take(&mut cell));
        } else if c == '\n' {
            number += 1;
            row.cells.push(std::mem::take(&mut cell));
            let next = Row {
                cells: Vec::new(),
                line: number,
            };
            rows.push(std::mem::replace(&mut row, next));
        } else {
            cell.push(c);
        }
    }
    row.cells.push(cell);
    rows.push(row);
    rows.retain(|row| row.cells.iter().any(|cell| !cell.trim().is_empty()));
    Ok(rows)
}

#[cfg(test)]
mod tests {
    use super::super::tests::show;
    use super::*;

    fn check(text: &str, expect: &str) {
        let got = match read(text, Language::En) {
            Ok(imported) => show(&imported),
            Err(fault) => format!("{}: {}", fault.line, fault.problem),
        };
        assert_eq!(got, expect);
    }

    #[test]
    fn header_names_the_columns_in_any_order() {
        check(
            "scene,text,speaker,mood\nharbour,The tide turns.,,\nharbour,Where is the boat?,Bo,gruff\nsea,Gone.,Ann,\n",
            "== harbour\n- The tide turns.\n<bo Bo> Where is the boat?\n== sea\n<ann Ann> Gone.\n! 1 cells of columns that a story has no place for, first at line 3\n",
        );
    }

    #[test]
    fn quotes_hold_commas_line_ends_and_quotes() {
        check(
            "speaker;text\nBo;\"Gone; she said \"\"gone\"\".\nTo sea.\"\nAnn;Oh.\n",
            "== 1\n<bo Bo> Gone; she said \"gone\".\nTo sea.\n<ann Ann> Oh.\n",
        );
        check(
            "speaker\ttext\nBo\tsays \"no\", twice\n",
            "== 1\n<bo Bo> says \"no\", twice\n",
        );
    }

    #[test]
    fn columns_of_languages_are_translations() {
        let imported = read(
            "speaker,en,ja\nBo,Gone.,いない。\nBo,,海へ。\n",
            Language::En,
        )
        .unwrap();
        let lines = &imported.scenes[0].lines;
        assert_eq!(lines[0].text.get(Language::En), Some("Gone."));
        assert_eq!(lines[0].text.get(Language::Jp), Some("いない。"));
        assert_eq!(lines[1].text.get(Language::En), None);
        assert_eq!(lines[1].speaker_name.get(Language::Jp), Some("Bo"));
    }

    #[test]
    fn column_that_only_begins_with_a_code_is_no_translation() {
        check(
            "speaker,en,en_comment,ja_voice\nBo,Gone.,sadly,7.ogg\n",
            "== 1\n<bo Bo> Gone.\n! 2 cells of columns that a story has no place for, first at line 2\n",
        );
        check(
            "speaker,zh-CN,zh-SG\nBo,船,船\n",
            "1: the columns `zh-CN` and `zh-SG` are both `chs`; give one of them another name",
        );
    }

    #[test]
    fn two_columns_without_a_header_are_speaker_and_text() {
        check(
            "Bo,Where is the boat?\n,The tide turns.\n",
            "== 1\n<bo Bo> Where is the boat?\n- The tide turns.\n",
        );
    }

    #[test]
    fn kinds_and_chapters_are_kept() {
        let text = "chapter,kind,speaker,text\n1,option,Bo,Ask\n1,objective,,Find the boat.\n2,shout,Bo,Oi!\n2,dialogue,,\n";
        let imported = read(text, Language::En).unwrap();
        let scenarios: Vec<&str> = imported
            .scenes
            .iter()
            .map(|scene| scene.scenario.as_str())
            .collect();
        assert_eq!(scenarios, ["1", "2"]);
        check(
            text,
            "== 1\n* Ask\n+ Find the boat.\n== 2\n<bo Bo> Oi!\n! 1 rows of a kind that a story does not know (taken for dialogue or narration), first at line 4\n! 1 rows without a text, first at line 5\n",
        );
    }

    #[test]
    fn faults_name_their_line() {
        check(
            "speaker,text\nBo,fine\nBo,\"not closed\n",
            "3: a quote opens a cell here and is never closed",
        );
        check(
            "a,b,c\n1,2,3\n",
            "1: no column of texts in the header `a, b, c`; name one `text`, or one for each language (en, zh, ja, ...), and those of `speaker`, `scene` and `kind`",
        );
        check("", "");
    }
}
