//! The nearest known word to a misspelt one, so that an error can name what was probably meant.

/// The known word within two edits (or a third of the word) of `word`; ties go to the first.
pub fn near_miss<'a>(word: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let limit = (word.chars().count() / 3).max(2);
    known
        .into_iter()
        .map(|k| (distance(word, k), k))
        .filter(|(d, k)| *d <= limit && *d < k.chars().count())
        .min_by_key(|(d, _)| *d)
        .map(|(_, k)| k)
}

/// "; did you mean `x`?" or nothing: the tail of an error text.
pub fn hint<'a>(word: &str, known: impl IntoIterator<Item = &'a str>) -> String {
    near_miss(word, known).map_or_else(String::new, |k| format!("; did you mean `{k}`?"))
}

/// The known word with the fewest edits to `word`, however many; ties go to the first.
pub fn nearest<'a>(word: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    known.into_iter().min_by_key(|known| distance(word, known))
}

/// Levenshtein distance in characters.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, ca) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, cb) in b.iter().enumerate() {
            let substituted = diagonal + usize::from(ca != *cb);
            diagonal = row[j + 1];
            row[j + 1] = substituted.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn near_miss_names_the_close_word_only() {
        let known = ["speaker_ids", "player", "languages"];
        assert_eq!(near_miss("speaker_id", known), Some("speaker_ids"));
        assert_eq!(near_miss("lanugages", known), Some("languages"));
        assert_eq!(near_miss("temperature", known), None);
        assert_eq!(nearest("lanugages", known), Some("languages"));
        assert_eq!(nearest("languages", []), None);
    }
}
