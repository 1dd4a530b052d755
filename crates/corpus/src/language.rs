//! The thirteen languages a story may come in, in the order that every output keeps.

use serde::{Deserialize, Deserializer, Serialize, de};

use crate::error::Error;
use text::near;

/// The codes, for messages.
const CODES: [&str; 13] = [
    "chs", "cht", "de", "en", "es", "fr", "id", "jp", "kr", "pt", "ru", "th", "vi",
];

/// Scripts that may stand behind a code; the last two are Windows' old names (`zh-CHS`).
const SCRIPTS: [&str; 9] = [
    "hans", "hant", "latn", "cyrl", "jpan", "kore", "thai", "chs", "cht",
];

/// A language code of the data sets; the order of the variants is the order of every listing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Language {
    /// Simplified Chinese.
    Chs,
    /// Traditional Chinese.
    Cht,
    /// German.
    De,
    /// English.
    En,
    /// Spanish.
    Es,
    /// French.
    Fr,
    /// Indonesian.
    Id,
    /// Japanese.
    Jp,
    /// Korean.
    Kr,
    /// Portuguese.
    Pt,
    /// Russian.
    Ru,
    /// Thai.
    Th,
    /// Vietnamese.
    Vi,
}

impl Language {
    /// Every language, in the order of every listing.
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

    /// The language with exactly this code, as this program writes it.
    pub fn from_code(code: &str) -> Option<Language> {
        Language::ALL.into_iter().find(|l| l.code() == code)
    }

    /// The language that people name: its code, or the codes that are common elsewhere, in any case: `zh` (`zh-CN`, `zh-Hans`),
    /// `zh-TW` (`zh-HK`, `zh-Hant`), `ja`, `ko`, and any of them with a script and a region behind it (`en-US`, `pt_BR`, `zh-Hans-HK`).
    /// With anything else behind it (`en_comment`) it names no language.
    pub fn from_name(name: &str) -> Option<Language> {
        if let Some(language) = Language::from_code(name) {
            return Some(language);
        }
        let name = name.trim().to_ascii_lowercase().replace('_', "-");
        let mut parts = name.split('-').peekable();
        let code = parts.next()?;
        let script = parts.next_if(|part| SCRIPTS.contains(part));
        let region = parts.next_if(|part| is_region(part));
        if parts.next().is_some() {
            return None;
        }
        Some(match (code, script, region) {
            ("zh", Some("hant" | "cht"), _) | ("zh", None, Some("tw" | "hk" | "mo")) => {
                Language::Cht
            }
            ("zh", ..) => Language::Chs,
            ("ja", ..) => Language::Jp,
            ("ko", ..) => Language::Kr,
            (code, ..) => Language::from_code(code)?,
        })
    }

    /// Reads a list of languages as a command line has it, each once, in the order of every listing.
    ///
    /// # Errors
    /// [`Error::UnknownLanguageCode`] for a name that [`Language::from_name`] does not know.
    pub fn parse_all(names: &[String]) -> crate::Result<Vec<Language>> {
        let mut languages = Vec::new();
        for name in names {
            let language = Language::from_name(name).ok_or_else(|| Error::UnknownLanguageCode {
                code: name.clone(),
                near: near::hint(name, Language::ALL.map(Language::code)),
            })?;
            languages.push(language);
        }
        languages.sort_unstable();
        languages.dedup();
        Ok(languages)
    }

    /// Whether the language is written with full-width punctuation (`：`, `（`, `）`) in the records.
    pub fn is_fullwidth(self) -> bool {
        matches!(self, Language::Chs | Language::Cht)
    }
}

/// Whether this is how codes name regions: `us`, `419`.
fn is_region(part: &str) -> bool {
    let is_letters = part.len() == 2 && part.bytes().all(|b| b.is_ascii_alphabetic());
    is_letters || part.len() == 3 && part.bytes().all(|b| b.is_ascii_digit())
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
    /// The text in a language.
    pub fn get(&self, language: Language) -> Option<&str> {
        self.0[language as usize].as_deref()
    }

    /// Puts a text in, in place of the one that was there.
    pub fn set(&mut self, language: Language, text: &str) {
        self.0[language as usize] = Some(text.into());
    }

    /// Whether no language has a text.
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

impl<'de> Deserialize<'de> for Language {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let name = String::deserialize(deserializer)?;
        Language::from_name(&name).ok_or_else(|| de::Error::unknown_variant(&name, &CODES))
    }
}

impl<'de> Deserialize<'de> for ByLanguage {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Texts;

        impl<'de> de::Visitor<'de> for Texts {
            type Value = ByLanguage;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("texts by language, like en = \"...\"")
            }

            fn visit_map<A: de::MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut texts = ByLanguage::default();
                while let Some((language, text)) = map.next_entry::<Language, String>()? {
                    if texts.get(language).is_some() {
                        let problem = format!("the language `{language}` is named twice");
                        return Err(de::Error::custom(problem));
                    }
                    texts.set(language, &text);
                }
                Ok(texts)
            }
        }

        deserializer.deserialize_map(Texts)
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
    fn codes_that_are_common_elsewhere_are_taken() {
        use Language::{Chs, Cht, De, En, Es, Jp, Kr, Pt};
        for (name, expect) in [
            ("zh", Some(Chs)),
            ("zh-CN", Some(Chs)),
            ("zh_Hans", Some(Chs)),
            ("zh-Hans-SG", Some(Chs)),
            ("zh-TW", Some(Cht)),
            ("zh_HK", Some(Cht)),
            ("zh-Hant", Some(Cht)),
            ("zh-Hant-MO", Some(Cht)),
            ("zh-Hans-HK", Some(Chs)),
            ("zh_Hans_MO", Some(Chs)),
            ("zh-CHT", Some(Cht)),
            ("ja", Some(Jp)),
            ("ja-JP", Some(Jp)),
            ("ko", Some(Kr)),
            ("EN", Some(En)),
            ("en-US", Some(En)),
            (" de ", Some(De)),
            ("pt_BR", Some(Pt)),
            ("chs", Some(Chs)),
            ("es-419", Some(Es)),
            ("en_comment", None),
            ("ja_voice", None),
            ("de_note", None),
            ("en-US-old", None),
            ("zh-", None),
            ("klingon", None),
            ("z", None),
            ("", None),
        ] {
            assert_eq!(Language::from_name(name), expect, "{name}");
        }
    }

    #[test]
    fn list_of_names_has_each_language_once_in_order() {
        let names = ["en", "zh", "chs", "ja"].map(str::to_owned);
        let languages = Language::parse_all(&names).unwrap();
        assert_eq!(languages, [Language::Chs, Language::En, Language::Jp]);
        let error = Language::parse_all(&["enn".to_owned()]).unwrap_err();
        assert!(error.to_string().ends_with("did you mean `en`?"), "{error}");
    }

    #[test]
    fn language_named_twice_is_refused() {
        let error = serde_json::from_str::<ByLanguage>(r#"{"zh": "a", "chs": "b"}"#).unwrap_err();
        assert!(
            error.to_string().contains("`chs` is named twice"),
            "{error}"
        );
        let texts: ByLanguage = serde_json::from_str(r#"{"zh-TW": "a", "ko": "b"}"#).unwrap();
        assert_eq!(
            serde_json::to_string(&texts).unwrap(),
            r#"{"cht":"a","kr":"b"}"#
        );
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
