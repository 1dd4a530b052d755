//! The macros of role-play front ends: `{{char}}` and `{{user}}` in cards and chat logs.

/// What the two macros stand for.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Names<'a> {
    pub character: &'a str,
    pub user: &'a str,
}

/// A text with the names put in.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Filled {
    pub text: String,
    /// How often the user's name was put in.
    pub n_user: usize,
    /// Macros that a front end fills in as it runs (`{{time}}`, `{{random:a,b}}`); they stay.
    pub n_unknown: usize,
}

/// Characters of the longest macro.
const LONGEST: usize = 300;

/// Puts the names in for `{{char}}`, `<BOT>`, `{{user}}` and `<USER>`, whatever their case; comments (`{{// ...}}`) and
/// `{{original}}` go.
pub(crate) fn fill(text: &str, names: Names<'_>) -> Filled {
    let mut filled = Filled::default();
    let mut rest = text;
    while let Some(at) = rest.find(['{', '<']) {
        filled.text.push_str(&rest[..at]);
        rest = &rest[at..];
        let (name, length) = match rest.strip_prefix("{{") {
            Some(inner) => {
                let window = inner
                    .char_indices()
                    .nth(LONGEST)
                    .map_or(inner.len(), |(at, _)| at);
                let end = inner[..window].find("}}");
                end.map_or(("", 0), |end| (inner[..end].trim(), end + 4))
            }
            None => ["<BOT>", "<CHAR>", "<USER>"]
                .iter()
                .find(|tag| {
                    rest.get(..tag.len())
                        .is_some_and(|begin| begin.eq_ignore_ascii_case(tag))
                })
                .map_or(("", 0), |tag| (&rest[1..tag.len() - 1], tag.len())),
        };
        match name.to_ascii_lowercase().as_str() {
            "" => {
                let length = length.max(1);
                filled.text.push_str(&rest[..length]);
                rest = &rest[length..];
                continue;
            }
            "char" | "bot" => filled.text.push_str(names.character),
            "user" => {
                filled.n_user += 1;
                filled.text.push_str(names.user);
            }
            "original" | "trim" | "noop" => {}
            "newline" => filled.text.push('\n'),
            name if name.starts_with("//") => {}
            _ => {
                filled.n_unknown += 1;
                filled.text.push_str(&rest[..length]);
            }
        }
        rest = &rest[length..];
    }
    filled.text.push_str(rest);
    filled
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_put_in_and_other_macros_stay() {
        let names = Names {
            character: "Bo",
            user: "Ann",
        };
        let filled = fill(
            "{{char}} and <bot> know {{ User }}, <USER>. {{// a note}}{{original}}{{time}} {{}} {{ {a} < b é",
            names,
        );
        assert_eq!(
            filled.text,
            "Bo and Bo know Ann, Ann. {{time}} {{}} {{ {a} < b é"
        );
        assert_eq!((filled.n_user, filled.n_unknown), (2, 1));
    }
}
