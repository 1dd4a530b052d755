//! Reads the plain `story` format: JSON lines of scenes and texts, plain or gzipped, one file or a folder of them.
//! A line is checked key by key, because the people who write such files by hand need to know which key is wrong.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

use flate2::read::MultiGzDecoder;
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};

use crate::error::{Error, Result, shorten, without_position};
use crate::import;
use crate::language::{ByLanguage, Language};
use crate::scene::{Line, LineKind, Scene, Speaker, Story, Text};
use files::hex;
use files::outside::{self, Bounded, TooMuch};
use text::json::Unambiguous;
use text::near;

/// What JSON allows behind a value.
const JSON_SPACE: [char; 4] = ['\n', '\r', '\t', ' '];

/// Reads a story.
///
/// # Errors
/// Nothing to read, a file that is not UTF-8 or breaks off, broken JSON, a missing or mistyped key, an unknown
/// language, a scene id used twice: each with file and line.
pub fn read(root: &Path) -> Result<Story> {
    let mut reader = StoryReader::default();
    let mut all = Sha256::new();
    for path in story_files(root).map_err(|error| name_form(error, root))? {
        let file_hash = reader
            .read_file(&path)
            .map_err(|error| name_form(error, &path))?;
        all.update(path.file_name().map_or(&[][..], |n| n.as_encoded_bytes()));
        all.update([0]);
        all.update(file_hash);
    }
    let mut story = reader.story;
    if story.scenes.is_empty() && story.texts.is_empty() {
        return Err(Error::EmptyStory {
            path: root.to_owned(),
        });
    }
    story.sha256 = hex(&all.finalize());
    Ok(story)
}

/// The error, or what the file or folder is, where that is something that can be made into a story.
fn name_form(error: Error, path: &Path) -> Error {
    match import::recognise(path) {
        Some(recognised) => Error::Importable(recognised),
        None => error,
    }
}

/// The files of a story in the order of their names: the file itself, or a folder's regular files that end in `.jsonl` or `.jsonl.gz`.
///
/// # Errors
/// Nothing there, or a folder without such a file.
fn story_files(root: &Path) -> Result<Vec<PathBuf>> {
    let read_error = |source| Error::Read {
        path: root.to_owned(),
        source,
    };
    let kind = std::fs::metadata(root).map_err(read_error)?;
    if kind.is_file() {
        return Ok(vec![root.to_owned()]);
    }
    if !kind.is_dir() {
        return Err(Error::NoStoryFile {
            path: root.to_owned(),
        });
    }
    let mut files = Vec::new();
    for entry in std::fs::read_dir(root).map_err(read_error)? {
        let path = entry.map_err(read_error)?.path();
        let name = path
            .file_name()
            .map_or_else(Default::default, |n| n.to_string_lossy().into_owned());
        if (name.ends_with(".jsonl") || name.ends_with(".jsonl.gz")) && path.is_file() {
            files.push(path);
        }
    }
    if files.is_empty() {
        return Err(Error::NoStoryFile {
            path: root.to_owned(),
        });
    }
    files.sort();
    Ok(files)
}

/// SHA-256 of a story: of its file, or of a folder's story files with their names, and of nothing else that lies there.
///
/// # Errors
/// Nothing there, or a file that cannot be read.
pub fn story_sha256(root: &Path) -> Result<String> {
    let files = story_files(root)?;
    if files == [root] {
        return Ok(files::sha256_of(root)?);
    }
    let mut hashes = Vec::new();
    for path in &files {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        hashes.push((name.into_owned(), files::sha256_of(path)?));
    }
    let listed =
        serde_json::Value::from_iter(hashes.into_iter().map(|(name, hash)| vec![name, hash]));
    Ok(files::sha256(listed.to_string().as_bytes()))
}

#[derive(Default)]
struct StoryReader {
    story: Story,
    /// Scene id -> where it stands first.
    seen: HashMap<String, (PathBuf, usize)>,
    /// Text id without its number -> how often it was used.
    text_ids: HashMap<String, usize>,
}

impl StoryReader {
    /// Reads one file; gives the SHA-256 of its bytes as they lie on the disk.
    fn read_file(&mut self, path: &Path) -> Result<Vec<u8>> {
        let read_error = |source| Error::Read {
            path: path.to_owned(),
            source,
        };
        let file = outside::open(path).map_err(read_error)?;
        let n_bytes = file.metadata().map_err(read_error)?.len();
        let mut hashed = HashingReader {
            inner: file,
            hash: Sha256::new(),
        };
        let is_gzip = path.extension().is_some_and(|e| e == "gz");
        if is_gzip {
            let unpacked = Bounded::unpacking(MultiGzDecoder::new(&mut hashed), n_bytes);
            self.read_lines(path, BufReader::new(unpacked), true)?;
        } else {
            self.read_lines(path, BufReader::new(&mut hashed), false)?;
        }
        Ok(hashed.hash.finalize().to_vec())
    }

    fn read_lines(&mut self, path: &Path, mut input: impl BufRead, is_gzip: bool) -> Result<()> {
        let mut bytes = Vec::new();
        let mut line = 0;
        loop {
            bytes.clear();
            let n = outside::read_line(&mut input, &mut bytes).map_err(|source| {
                match is_gzip && !TooMuch::is(&source) {
                    true => Error::Gzip {
                        path: path.to_owned(),
                        line,
                        problem: source.to_string(),
                    },
                    false => Error::reading(path, line + 1, source),
                }
            })?;
            if n == 0 {
                return Ok(());
            }
            line += 1;
            if line == 1 && bytes.starts_with(b"\xef\xbb\xbf") {
                return Err(Error::ByteOrderMark {
                    path: path.to_owned(),
                });
            }
            let text = std::str::from_utf8(&bytes).map_err(|error| Error::NotUtf8 {
                path: path.to_owned(),
                line,
                column: error.valid_up_to() + 1,
            })?;
            if !text.trim().is_empty() {
                // Without its end, so that JSON that breaks off does so in this line.
                self.read_line(&Place { path, line }, text.trim_end_matches(JSON_SPACE))?;
            }
        }
    }

    fn read_line(&mut self, place: &Place<'_>, text: &str) -> Result<()> {
        let parsed = serde_json::from_str(text);
        let Unambiguous(value) = parsed.map_err(|error| Error::Json {
            path: place.path.to_owned(),
            line: place.line,
            column: error.column().max(1),
            problem: without_position(&error.to_string()),
        })?;
        let Value::Object(object) = &value else {
            return Err(place.wrong_type("the line", "an object", &value));
        };
        if object.contains_key("scene") || object.contains_key("lines") {
            self.read_scene(place, object)
        } else {
            self.read_text(place, object)
        }
    }

    fn read_scene(&mut self, place: &Place<'_>, object: &Map<String, Value>) -> Result<()> {
        const KEYS: [&str; 5] = ["campaign", "scenario", "scenario_name", "scene", "lines"];
        let keys = Keys {
            place,
            prefix: "",
            object,
            known: &KEYS,
        };
        let id = keys.text("scene")?;
        let mut lines = Vec::new();
        let listed = keys.required("lines")?;
        let Value::Array(items) = listed else {
            return Err(place.wrong_type("lines", "a list", listed));
        };
        for (idx, item) in items.iter().enumerate() {
            lines.push(self.read_scene_line(place, idx, item)?);
        }
        let scene = Scene {
            id: id.to_owned(),
            campaign: keys.text("campaign")?.to_owned(),
            scenario: keys
                .optional_text("scenario")?
                .unwrap_or_default()
                .to_owned(),
            lines,
        };
        keys.by_language("scenario_name")?;
        self.count_unknown(&keys);
        self.claim(place, &scene.id)?;
        self.story.scenes.push(scene);
        Ok(())
    }

    fn read_scene_line(&mut self, place: &Place<'_>, idx: usize, item: &Value) -> Result<Line> {
        const KEYS: [&str; 5] = ["kind", "speaker_id", "speaker_name", "text", "variables"];
        let prefix = format!("lines[{idx}]");
        let Value::Object(object) = item else {
            return Err(place.wrong_type(&prefix, "an object", item));
        };
        let keys = Keys {
            place,
            prefix: &prefix,
            object,
            known: &KEYS,
        };
        let kind = match keys.text("kind")? {
            "dialogue" => LineKind::Dialogue,
            "narration" => LineKind::Narration,
            "objective" => LineKind::Objective,
            "option" => LineKind::Option,
            other => {
                return Err(Error::WrongType {
                    path: place.path.to_owned(),
                    line: place.line,
                    key: keys.name("kind"),
                    expected: "dialogue, narration, objective or option",
                    got: format!(
                        "`{}`{}",
                        shorten(other, 40),
                        near::hint(other, ["dialogue", "narration", "objective", "option"])
                    ),
                });
            }
        };
        let speaker_id = match kind {
            LineKind::Dialogue => keys.text("speaker_id")?,
            _ => keys.optional_text("speaker_id")?.unwrap_or_default(),
        };
        let has_variables = match object.get("variables") {
            None => false,
            Some(Value::Bool(on)) => *on,
            Some(other) => {
                return Err(place.wrong_type(&keys.name("variables"), "true or false", other));
            }
        };
        keys.required("text")?;
        let line = Line {
            kind,
            speaker_id: speaker_id.to_owned(),
            speaker_name: keys.by_language("speaker_name")?,
            text: keys.by_language("text")?,
            has_variables,
        };
        self.count_unknown(&keys);
        Ok(line)
    }

    fn read_text(&mut self, place: &Place<'_>, object: &Map<String, Value>) -> Result<()> {
        const KEYS: [&str; 7] = [
            "campaign",
            "kind",
            "id",
            "title",
            "text",
            "speaker_id",
            "speaker_name",
        ];
        let keys = Keys {
            place,
            prefix: "",
            object,
            known: &KEYS,
        };
        if !object.contains_key("kind") {
            // Neither a scene nor a text: name what either would need.
            return Err(keys.missing("scene"));
        }
        let kind = keys.text("kind")?;
        let campaign = keys.text("campaign")?;
        keys.required("text")?;
        let speaker = if kind == "voice" {
            Some(Speaker {
                id: keys.text("speaker_id")?.to_owned(),
                name: keys.by_language("speaker_name")?,
            })
        } else {
            None
        };
        let mut id = format!(
            "{campaign}/{kind}/{}",
            keys.optional_text("id")?.unwrap_or_default()
        );
        let n = self.text_ids.entry(id.clone()).or_default();
        *n += 1;
        if *n > 1 {
            id = format!("{id}#{n}");
        }
        self.claim(place, &id)?;
        let text = Text {
            id,
            campaign: campaign.to_owned(),
            kind: kind.to_owned(),
            title: keys.by_language("title")?,
            text: keys.by_language("text")?,
            speaker,
        };
        self.count_unknown(&keys);
        self.story.texts.push(text);
        Ok(())
    }

    /// Takes an id for the scene or text of this line.
    fn claim(&mut self, place: &Place<'_>, id: &str) -> Result<()> {
        let here = (place.path.to_owned(), place.line);
        match self.seen.insert(id.to_owned(), here) {
            None => Ok(()),
            Some((first_path, first_line)) => Err(Error::DuplicateScene {
                path: place.path.to_owned(),
                line: place.line,
                scene: shorten(id, 80),
                first_path,
                first_line,
            }),
        }
    }

    fn count_unknown(&mut self, keys: &Keys<'_>) {
        let counts: &mut BTreeMap<String, usize> = &mut self.story.unknown_keys;
        for key in keys.object.keys() {
            if !keys.known.contains(&key.as_str()) {
                *counts.entry(key.clone()).or_default() += 1;
            }
        }
    }
}

/// File and line, for messages.
struct Place<'a> {
    path: &'a Path,
    line: usize,
}

impl Place<'_> {
    fn wrong_type(&self, key: &str, expected: &'static str, got: &Value) -> Error {
        let got = match got {
            Value::Null => "null".to_owned(),
            Value::Bool(b) => b.to_string(),
            Value::Number(n) => format!("the number {n}"),
            Value::String(s) => format!("the text `{}`", shorten(s, 40)),
            Value::Array(_) => "a list".to_owned(),
            Value::Object(_) => "an object".to_owned(),
        };
        Error::WrongType {
            path: self.path.to_owned(),
            line: self.line,
            key: key.to_owned(),
            expected,
            got,
        }
    }
}

/// The keys of one object, with the way to it for messages.
struct Keys<'a> {
    place: &'a Place<'a>,
    prefix: &'a str,
    object: &'a Map<String, Value>,
    known: &'a [&'static str],
}

impl<'a> Keys<'a> {
    fn name(&self, key: &str) -> String {
        if self.prefix.is_empty() {
            key.to_owned()
        } else {
            format!("{}.{key}", self.prefix)
        }
    }

    fn missing(&self, key: &str) -> Error {
        let unknown = self
            .object
            .keys()
            .map(String::as_str)
            .filter(|k| !self.known.contains(k));
        let near = near::near_miss(key, unknown)
            .map_or_else(String::new, |k| format!(" (there is a `{k}`)"));
        Error::MissingField {
            path: self.place.path.to_owned(),
            line: self.place.line,
            key: self.name(key),
            near,
        }
    }

    fn required(&self, key: &str) -> Result<&'a Value> {
        self.object.get(key).ok_or_else(|| self.missing(key))
    }

    fn optional_text(&self, key: &str) -> Result<Option<&'a str>> {
        match self.object.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => Err(self.place.wrong_type(&self.name(key), "a text", other)),
        }
    }

    fn text(&self, key: &str) -> Result<&'a str> {
        self.required(key)?;
        self.optional_text(key)?.ok_or_else(|| self.missing(key))
    }

    /// An object language -> text; absent counts as empty.
    fn by_language(&self, key: &str) -> Result<ByLanguage> {
        let mut texts = ByLanguage::default();
        let object = match self.object.get(key) {
            None => return Ok(texts),
            Some(Value::Object(object)) => object,
            Some(other) => {
                let expected = "an object of texts by language, like {\"en\": \"...\"}";
                return Err(self.place.wrong_type(&self.name(key), expected, other));
            }
        };
        for (code, value) in object {
            let language = Language::from_name(code).ok_or_else(|| Error::UnknownLanguage {
                path: self.place.path.to_owned(),
                line: self.place.line,
                key: self.name(key),
                code: shorten(code, 40),
                near: near::hint(code, Language::ALL.map(Language::code)),
            })?;
            if texts.get(language).is_some() {
                return Err(Error::LanguageTwice {
                    path: self.place.path.to_owned(),
                    line: self.place.line,
                    key: self.name(key),
                    code: language.code(),
                });
            }
            match value {
                Value::String(text) => texts.set(language, text),
                other => {
                    let key = format!("{}.{code}", self.name(key));
                    return Err(self.place.wrong_type(&key, "a text", other));
                }
            }
        }
        Ok(texts)
    }
}

struct HashingReader {
    inner: File,
    hash: Sha256,
}

impl Read for HashingReader {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let n = self.inner.read(buffer)?;
        self.hash.update(&buffer[..n]);
        Ok(n)
    }
}
