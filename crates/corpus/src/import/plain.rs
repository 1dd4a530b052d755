//! Plain text: `Name: text` lines among narration, or prose.

use crate::language::Language;

use super::name;
use super::scenes::{Gatherer, Imported};
use super::subtitles::is_han;

/// Words that, with a number or alone, head a chapter.
const CHAPTERS: [&str; 7] = [
    "chapter", "scene", "act", "part", "episode", "prologue", "epilogue",
];

const TIMES: &str = "time stamps in front of lines";
const RULES: &str = "headings and rules between scenes (a heading became the scene's id)";
const WRAPPED: &str = "line ends inside paragraphs of prose";

/// The scenes of a text: headings, rules such as `***` and two empty lines end one.
pub(crate) fn read(text: &str, language: Language) -> Imported {
    let mut out = Gatherer::new(language);
    let has_names = text
        .lines()
        .any(|line| name::split(unstamped(line)).is_some());
    let joined;
    let text = match has_names {
        true => text,
        false => {
            joined = paragraphs(text, &mut out);
            &joined
        }
    };
    let mut n_empty = 0;
    for (at, line) in text.lines().enumerate() {
        let shown = unstamped(line);
        if shown.is_empty() {
            n_empty += 1;
            continue;
        }
        if n_empty > 1 {
            out.border("");
        } else if n_empty == 1 {
            out.may_cut();
        }
        n_empty = 0;
        if let Some(title) = heading(shown) {
            out.notes.add(RULES, at + 1);
            out.border(title);
            continue;
        }
        if shown.len() < line.trim().len() {
            out.notes.add(TIMES, at + 1);
        }
        out.named_or_narration(shown);
    }
    out.finish()
}

/// Prose that was wrapped at a width, a paragraph a line; each line where no empty lines part paragraphs.
fn paragraphs(text: &str, out: &mut Gatherer) -> String {
    let is_wrapped = text.contains("\n\n");
    let mut joined = String::with_capacity(text.len());
    let mut before: Option<&str> = None;
    for (at, line) in text.lines().enumerate() {
        let shown = line.trim();
        let goes_on = is_wrapped
            && !shown.is_empty()
            && heading(shown).is_none()
            && before.is_some_and(|before| !before.is_empty() && heading(before).is_none());
        if goes_on {
            out.notes.add(WRAPPED, at);
            let ends_wide = joined.chars().next_back().is_some_and(is_han);
            if !(ends_wide && shown.chars().next().is_some_and(is_han)) {
                joined.push(' ');
            }
        } else if before.is_some() {
            joined.push('\n');
        }
        joined.push_str(shown);
        before = Some(shown);
    }
    joined
}

/// The title of a heading; empty for a rule.
fn heading(line: &str) -> Option<&str> {
    let rule = line.replace(' ', "");
    let is_rule = rule.chars().count() >= 3
        && ["*", "-", "=", "_", "~", "#", "•", "＊", "―", "—"]
            .iter()
            .any(|mark| rule.trim_start_matches(mark).is_empty());
    if is_rule {
        return Some("");
    }
    let title = line.trim_start_matches('#');
    if title.len() < line.len() && title.starts_with(' ') {
        return Some(title.trim());
    }
    let word_end = line
        .find(|c: char| !c.is_alphabetic())
        .unwrap_or(line.len());
    let (word, rest) = line.split_at(word_end);
    let is_alone = rest.trim_matches([':', '.', ' ']).is_empty();
    let is_chapter = CHAPTERS.contains(&word.to_lowercase().as_str())
        && (is_alone || is_numbered(rest.trim_start()));
    let is_short = line.chars().count() <= 80;
    ((is_chapter || is_wide_chapter(line)) && is_short).then_some(line)
}

/// Whether a text begins with a number in digits or Roman ones and goes on as a title does: `2`, `IV: The sea`, but not `Icelandic`, and
/// not `I remember best`.
fn is_numbered(text: &str) -> bool {
    let end = text
        .find(|c: char| !c.is_alphanumeric())
        .unwrap_or(text.len());
    let (number, rest) = text.split_at(end);
    let is_roman = !number.is_empty() && number.chars().all(|c| "IVXLC".contains(c));
    let is_number = is_roman || number.starts_with(|c: char| c.is_ascii_digit());
    let goes_on = |c: char| c.is_lowercase() || "'’".contains(c);
    is_number && !rest.trim_start().starts_with(goes_on)
}

/// Whether a line is `第`, a number and what it counts, alone or with a title behind it: `第三章 海`, but not `第一节车厢里没有人。`
fn is_wide_chapter(line: &str) -> bool {
    let Some(number) = line.strip_prefix('第').map(str::trim_start) else {
        return false;
    };
    let is_numeral = |c: char| {
        c.is_ascii_digit()
            || ('０'..='９').contains(&c)
            || "〇零一二三四五六七八九十百千两兩".contains(c)
    };
    let counter = number.trim_start_matches(is_numeral);
    let title = counter
        .trim_start()
        .strip_prefix(['章', '話', '话', '幕', '回', '节', '節']);
    let begins_title = |c: char| c.is_whitespace() || "：:・·—―－-「『《【（(．.".contains(c);
    counter.len() < number.len()
        && title.is_some_and(|title| title.is_empty() || title.starts_with(begins_title))
}

/// A line without the time in front of it: `[12:30] Bo: Gone.`, `1/2/26, 10:00 - Bo: Gone.`
fn unstamped(line: &str) -> &str {
    let line = line.trim();
    let is_time = |stamp: &str| {
        let has_clock = stamp.contains(':') && stamp.starts_with(|c: char| c.is_ascii_digit());
        let rest = stamp.trim_end_matches(|c: char| "APMapm. ".contains(c));
        has_clock
            && rest
                .chars()
                .all(|c| c.is_ascii_digit() || ":/.-, T".contains(c))
    };
    if let Some((stamp, rest)) = line
        .strip_prefix('[')
        .and_then(|inner| inner.split_once(']'))
    {
        return if is_time(stamp.trim()) {
            rest.trim_start()
        } else {
            line
        };
    }
    match line.split_once(" - ") {
        Some((stamp, rest)) if is_time(stamp.trim()) => rest.trim_start(),
        _ => line,
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::show;
    use super::*;

    fn check(text: &str, expect: &str) {
        assert_eq!(show(&read(text, Language::En)), expect);
    }

    #[test]
    fn names_speak_and_the_rest_is_narration() {
        check(
            "The tide turns.\nBo: Where is the boat?\nAnn (softly): Gone: to sea.\n",
            "== 1\n- The tide turns.\n<bo Bo> Where is the boat?\n<ann Ann> (softly) Gone: to sea.\n",
        );
        check(
            "船长：船在哪里？\n潮水退了。\n",
            "== 1\n<船长 船长> 船在哪里？\n- 潮水退了。\n",
        );
    }

    #[test]
    fn headings_rules_and_two_empty_lines_end_a_scene() {
        check(
            "# The harbour\nBo: One.\n\nBo: Two.\n\n\nBo: Three.\n***\nBo: Four.\nChapter 2: The sea\nBo: Five.\n第三章 海\nBo: Six.\n",
            "== The harbour\n<bo Bo> One.\n<bo Bo> Two.\n== 1\n<bo Bo> Three.\n== 2\n<bo Bo> Four.\n== Chapter 2: The sea\n<bo Bo> Five.\n== 第三章 海\n<bo Bo> Six.\n! 4 headings and rules between scenes (a heading became the scene's id), first at line 1\n",
        );
    }

    #[test]
    fn headings_have_a_number_and_sentences_are_text() {
        for line in [
            "Chapter 2",
            "Part IV: The sea",
            "Act I",
            "Scene 3 The Harbour",
            "EPILOGUE",
            "第十二話",
            "第3幕：海",
            "第２回「海」",
            "第 三 章 海",
        ] {
            assert_eq!(heading(line), Some(line));
        }
        for line in [
            "Part Icelandic, part Dutch.",
            "Part I remember best.",
            "Act I'd rather forget.",
            "Part 2 of the plan was simple.",
            "Scene Victor knew.",
            "第一节车厢里没有人。",
            "第一回見た時の話だ。",
            "第二天，他说话了。",
            "第章 海",
        ] {
            assert_eq!(heading(line), None, "{line}");
        }
        check(
            "Bo: Gone.\nPart Icelandic, part Dutch.\n",
            "== 1\n<bo Bo> Gone.\n- Part Icelandic, part Dutch.\n",
        );
    }

    #[test]
    fn wrapped_prose_becomes_paragraphs() {
        check(
            "The tide turned,\nand the boat was gone.\n\nHe said: go on.\n",
            "== 1\n- The tide turned, and the boat was gone.\n- He said: go on.\n! 1 line ends inside paragraphs of prose, first at line 1\n",
        );
        check(
            "潮水\n退了。\n\n船不见了。",
            "== 1\n- 潮水退了。\n- 船不见了。\n! 1 line ends inside paragraphs of prose, first at line 1\n",
        );
        check(
            "One line.\nAnother line.",
            "== 1\n- One line.\n- Another line.\n",
        );
    }

    #[test]
    fn times_in_front_of_lines_go() {
        check(
            "[1/2/26, 10:00:05 AM] Bo: Gone.\n2.1.2026, 10:01 - Ann: Where?\n[10:02] Bo: To sea.\n[aside] no time\n",
            "== 1\n<bo Bo> Gone.\n<ann Ann> Where?\n<bo Bo> To sea.\n- [aside] no time\n! 3 time stamps in front of lines, first at line 1\n",
        );
    }
}
