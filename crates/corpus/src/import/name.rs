//! Names of speakers: the id that a name gives, and the name in front of a line.

use super::scenes::Voice;

/// Words of a name that may begin with a small letter.
const PARTICLES: [&str; 16] = [
    "of", "the", "von", "van", "de", "der", "den", "da", "di", "du", "la", "le", "and", "y", "el",
    "no",
];
/// A name has at most so many words and characters.
const MOST_WORDS: usize = 4;
const MOST_CHARS: usize = 40;

/// The id of whoever has this name: small letters and digits, `-` for everything between them; the name itself where
/// nothing of it is a letter (`???`).
pub(crate) fn id(name: &str) -> String {
    let mut id = String::new();
    for c in name.chars() {
        if c.is_alphanumeric() {
            id.extend(c.to_lowercase());
        } else if !id.is_empty() && !id.ends_with('-') {
            id.push('-');
        }
    }
    id.truncate(id.trim_end_matches('-').len());
    match id.is_empty() {
        true => name.trim().to_owned(),
        false => id,
    }
}

/// Somebody who is known by the name alone.
pub(crate) fn voice(name: &str) -> Voice {
    Voice {
        id: id(name),
        name: Some(name.trim().to_owned()),
    }
}

/// Name and text of `Name: text` or `Name：text`; a remark behind the name, `Bo (softly): Gone.`, goes to the text.
/// `None` where what stands before the colon does not look like a name.
pub(crate) fn split(line: &str) -> Option<(String, String)> {
    let line = line.trim();
    let at = line.find([':', '：'])?;
    let (before, behind) = line.split_at(at);
    let is_wide = behind.starts_with('：');
    let behind = behind.trim_start_matches([':', '：']);
    if !is_wide
        && !behind.starts_with(|c: char| c.is_whitespace() || "\"“'*(".contains(c) || !c.is_ascii())
    {
        return None;
    }
    let (name, remark) = part_remark(before);
    // Bold names: `**Bo:** text`.
    let (name, behind) = match name.strip_prefix("**") {
        Some(name) => (
            name.trim_end_matches("**"),
            behind.strip_prefix("**").unwrap_or(behind),
        ),
        None => (name, behind),
    };
    let (name, text) = (name.trim(), behind.trim());
    if text.is_empty() || !is_name(name) {
        return None;
    }
    let text = match remark {
        Some(remark) => format!("({remark}) {text}"),
        None => text.to_owned(),
    };
    Some((name.to_owned(), text))
}

/// A name and what stands in parentheses behind it.
fn part_remark(before: &str) -> (&str, Option<&str>) {
    let trimmed = before.trim_end();
    let open = |c| trimmed.rfind(c).filter(|at| *at > 0);
    let (close, at) = match trimmed.chars().next_back() {
        Some(')') => (')', open('(')),
        Some('）') => ('）', open('（')),
        _ => return (before, None),
    };
    match at {
        Some(at) => {
            let remark = trimmed[at..].trim_start_matches(['(', '（']);
            let remark = remark.trim_end_matches(close).trim();
            (
                trimmed[..at].trim_end(),
                (!remark.is_empty()).then_some(remark),
            )
        }
        None => (before, None),
    }
}

fn is_name(name: &str) -> bool {
    if !name.is_empty() && name.chars().all(|c| c == '?' || c == '？') {
        return true;
    }
    let words: Vec<&str> = name.split_whitespace().collect();
    if words.is_empty() || words.len() > MOST_WORDS || name.chars().count() > MOST_CHARS {
        return false;
    }
    let is_part = |(at, word): (usize, &&str)| {
        let is_short_form = word.ends_with('.') && word.chars().count() <= 4;
        let word = if is_short_form {
            word.trim_end_matches('.')
        } else {
            word
        };
        let is_clean = word
            .chars()
            .all(|c| c.is_alphanumeric() || "-'’_·・&#".contains(c));
        let first = word.chars().next();
        let begins_well =
            first.is_some_and(|c| !c.is_lowercase() && (at > 0 || !c.is_ascii_digit()));
        is_clean && (begins_well || (at > 0 && PARTICLES.contains(&word)) || words.len() == 1)
    };
    let begins_with_letter = name.chars().next().is_some_and(char::is_alphabetic);
    begins_with_letter && words.iter().enumerate().all(is_part)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(line: &str, expect: Option<(&str, &str)>) {
        let got = split(line);
        let got = got
            .as_ref()
            .map(|(name, text)| (name.as_str(), text.as_str()));
        assert_eq!(got, expect, "{line}");
    }

    #[test]
    fn id_is_the_name_in_small_letters() {
        assert_eq!(id("Bo"), "bo");
        assert_eq!(id(" Old  Bo! "), "old-bo");
        assert_eq!(id("ボー"), "ボー");
        assert_eq!(id("???"), "???");
    }

    #[test]
    fn names_before_a_colon_are_split_off() {
        check("Bo: Gone.", Some(("Bo", "Gone.")));
        check("ボー：船はどこだ。", Some(("ボー", "船はどこだ。")));
        check("bo: gone", Some(("bo", "gone")));
        check(
            "Mr. Ash: At six: sharp.",
            Some(("Mr. Ash", "At six: sharp.")),
        );
        check("Ann of the Hill: Yes?", Some(("Ann of the Hill", "Yes?")));
        check("Bo (softly): Gone.", Some(("Bo", "(softly) Gone.")));
        check("**Bo:** Gone.", Some(("Bo", "Gone.")));
        check("???: Who?", Some(("???", "Who?")));
        check("老人（小声）：走了。", Some(("老人", "(小声) 走了。")));
    }

    #[test]
    fn sentences_times_and_addresses_are_no_names() {
        check("He said: go on.", None);
        check("It is 12:30 now.", None);
        check("12:30: the boat", None);
        check("http://example.org", None);
        check("Gone. Bo: x", None);
        check("Bo:", None);
        check(": x", None);
        check("nothing here", None);
    }
}
