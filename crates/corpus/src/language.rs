//! The thirteen languages a story may come in, in the order that every output keeps.

use serde::{Deserialize, Serialize};

/// A language code of the data sets; the order of the variants is the order of every listing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Language {
    Chs,
    Cht,
    De,
    En,
    Es,
    Fr,
    Id,
    Jp,
    Kr,
    Pt,
    Ru,
    Th,
    Vi,
}

impl Language {
    pub const ALL: [Language; 13] = [
        Language::Chs,
        Language::Cht,
        Language::De,
        Language::En,
        Language::Es,
        Language::Fr,
        Language::Id,
        Language::Jp,
        Language::Kr,
        Language::Pt,
        Language::Ru,
        Language::Th,
        Language::Vi,
    ];

    /// The code as files and tables write it: `chs`, `cht`, `de`, ...
    pub fn code(self) -> &'static str {
        match self {
            Language::Chs => "chs",
            Language::Cht => "cht",
            Language::De => "de",
            Language::En => "en",
            Language::Es => "es",
            Language::Fr => "fr",
            Language::Id => "id",
            Language::Jp => "jp",
            Language::Kr => "kr",
            Language::Pt => "pt",
            Language::Ru => "ru",
            Language::Th => "th",
            Language::Vi => "vi",
        }
    }

    pub fn from_code(code: &str) -> Option<Language> {
        Language::ALL.into_iter().find(|l| l.code() == code)
    }

    /// Whether the language is written with full-width punctuation (`：`, `（`, `）`) in the records.
    pub fn is_fullwidth(self) -> bool {
        matches!(self, Language::Chs | Language::Cht)
    }
}

impl std::fmt::Display for Language {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.code())
    }
}

/// One optional value a language: a text in all its translations.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct ByLanguage([Option<Box<str>>; 13]);

impl ByLanguage {
    pub fn get(&self, language: Language) -> Option<&str> {
        self.0[language as usize].as_deref()
    }

    pub fn set(&mut self, language: Language, text: &str) {
        self.0[language as usize] = Some(text.into());
    }

    pub fn is_empty(&self) -> bool {
        self.0.iter().all(Option::is_none)
    }

    /// The translations that are there, in the order of the languages.
    pub fn iter(&self) -> impl Iterator<Item = (Language, &str)> {
        Language::ALL
            .into_iter()
            .filter_map(|l| self.get(l).map(|t| (l, t)))
    }

    /// The text in `language`, else in English, else in the first language that has one.
    pub fn get_or_any(&self, language: Language) -> Option<&str> {
        self.get(language)
            .or_else(|| self.get(Language::En))
            .or_else(|| self.iter().next().map(|(_, text)| text))
    }
}

impl<'de> Deserialize<'de> for ByLanguage {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let map = std::collections::BTreeMap::<Language, String>::deserialize(deserializer)?;
        let mut texts = ByLanguage::default();
        for (language, text) in &map {
            texts.set(*language, text);
        }
        Ok(texts)
    }
}

impl Serialize for ByLanguage {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.iter())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_round_trip_in_order() {
        let codes: Vec<_> = Language::ALL.iter().map(|l| l.code()).collect();
        assert_eq!(codes.join(" "), "chs cht de en es fr id jp kr pt ru th vi");
        for (idx, l) in Language::ALL.into_iter().enumerate() {
            assert_eq!(l as usize, idx);
            assert_eq!(Language::from_code(l.code()), Some(l));
        }
    }

    #[test]
    fn missing_language_falls_back_to_english() {
        let mut name = ByLanguage::default();
        name.set(Language::Jp, "デルファドール");
        assert_eq!(name.get_or_any(Language::Th), Some("デルファドール"));
        name.set(Language::En, "Delfador");
        assert_eq!(name.get_or_any(Language::Th), Some("Delfador"));
    }
}
