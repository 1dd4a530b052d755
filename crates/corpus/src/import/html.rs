//! Character references of HTML, as far as stories use them.

/// Named references that stories use.
const NAMED: [(&str, &str); 16] = [
    ("amp", "&"),
    ("lt", "<"),
    ("gt", ">"),
    ("quot", "\""),
    ("apos", "'"),
    ("nbsp", " "),
    ("lrm", ""),
    ("rlm", ""),
    ("hellip", "…"),
    ("mdash", "—"),
    ("ndash", "–"),
    ("lsquo", "‘"),
    ("rsquo", "’"),
    ("ldquo", "“"),
    ("rdquo", "”"),
    ("eacute", "é"),
];
/// Bytes of the longest reference, `&` and `;` left out.
const LONGEST: usize = 10;

/// Puts the characters in that references such as `&lt;` and `&#39;` stand for; unknown ones stay.
pub(crate) fn unescape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('&') {
        out.push_str(&rest[..at]);
        rest = &rest[at + 1..];
        let end = rest.bytes().take(LONGEST).position(|b| b == b';');
        let character = end.and_then(|end| Some((reference(&rest[..end])?, end)));
        match character {
            Some((character, end)) => {
                out.push_str(&character);
                rest = &rest[end + 1..];
            }
            None => out.push('&'),
        }
    }
    out.push_str(rest);
    out
}

fn reference(name: &str) -> Option<String> {
    let code = match name.strip_prefix('#') {
        Some(number) => match number.strip_prefix(['x', 'X']) {
            Some(hex) => u32::from_str_radix(hex, 16).ok()?,
            None => number.parse().ok()?,
        },
        None => {
            let (_, text) = NAMED.iter().find(|(known, _)| *known == name)?;
            return Some((*text).to_owned());
        }
    };
    char::from_u32(code)
        .filter(|c| *c != '\0')
        .map(String::from)
}

#[cfg(test)]
mod tests {
    use super::unescape;

    #[test]
    fn references_become_characters_and_unknown_ones_stay() {
        assert_eq!(
            unescape("a &lt;b&gt; &amp;amp; &#39;c&#x27;"),
            "a <b> &amp; 'c'"
        );
        assert_eq!(
            unescape("&nosuch; & &; &#0; &#xd800; 日&"),
            "&nosuch; & &; &#0; &#xd800; 日&"
        );
    }
}
