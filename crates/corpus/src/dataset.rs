//! Takes sentences and conversations of one data set in one language, cuts them by the rules and writes the rows.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use text::{Conversation, Message, Role, WrittenTokens};

use crate::error::Result;
use crate::language::Language;
use crate::manifest::{DataFile, RowScenes, Tally, TrainingTokens};
use crate::output::{Pending, push_record};
use crate::rules::conversation::{self, Limits, Round};
use crate::rules::{Counters, PIECE_TOKENS, Shown, TrainingRow, split_tokens};

/// One file of rows on its way.
pub(crate) struct DatasetWriter<'a> {
    pub counters: Counters<'a>,
    relative: String,
    key: String,
    language: Option<Language>,
    pending: Pending,
    buffer: Vec<u8>,
    tokens: Vec<u64>,
    training: Option<TrainingTokens>,
    written: WrittenTokens,
    scene_idx: HashMap<String, u32>,
    scenes: Vec<String>,
    rows: Vec<RowScenes>,
    holes: BTreeMap<String, u64>,
    filtered: BTreeMap<String, Tally>,
}

/// A finished file of rows, still under its temporary name.
pub(crate) struct DatasetPart {
    pub pending: Pending,
    pub file: DataFile,
    pub tokens: Vec<u64>,
    /// Added tokens that the rows' contents spell.
    pub written: WrittenTokens,
    /// The scenes that `file.rows` points into; made one list for all files later.
    pub scenes: Vec<String>,
}

impl<'a> DatasetWriter<'a> {
    /// `relative`: the file's path below `out`, with `/`.
    pub fn create(
        out: &Path,
        relative: String,
        key: &str,
        language: Option<Language>,
        counters: Counters<'a>,
    ) -> Result<DatasetWriter<'a>> {
        let path: PathBuf = out.join(&relative);
        Ok(DatasetWriter {
            counters,
            relative,
            key: key.to_owned(),
            language,
            pending: Pending::create(path)?,
            buffer: Vec::new(),
            tokens: Vec::new(),
            training: None,
            written: WrittenTokens::default(),
            scene_idx: HashMap::new(),
            scenes: Vec::new(),
            rows: Vec::new(),
            holes: BTreeMap::new(),
            filtered: BTreeMap::new(),
        })
    }

    /// Something is absent in this language.
    pub fn hole(&mut self, what: &str) {
        self.holes(what, 1);
    }

    pub fn holes(&mut self, what: &str, count: usize) {
        if count > 0 {
            *self.holes.entry(what.to_owned()).or_default() += count as u64;
        }
    }

    /// A paragraph, cut greedily; `scenes` is one scene for all or one for each sentence.
    pub fn paragraph(&mut self, sentences: &[Shown<'_>], scenes: &[&str]) -> Result<()> {
        let runs = split_tokens::pieces(sentences.iter().map(|s| s.tokens), PIECE_TOKENS);
        for run in runs {
            self.row(
                &sentences[run.clone()],
                &scenes[if scenes.len() == 1 { 0..1 } else { run }],
            )?;
        }
        Ok(())
    }

    /// One row for all sentences, however long.
    pub fn row(&mut self, sentences: &[Shown<'_>], scenes: &[&str]) -> Result<()> {
        let content = join(sentences.iter().filter(|s| !s.text.is_empty()));
        let origin = if scenes.iter().all(|s| *s == scenes[0]) {
            RowScenes::One(self.scene(scenes[0]))
        } else {
            self.origins(sentences, scenes)
        };
        let tokens = sentences.iter().map(|s| s.tokens as u64).sum();
        self.buffer.clear();
        push_record(&mut self.buffer, [(Role::Assistant, content.as_str())]);
        self.count_training(TrainingRow::Document(&content))?;
        self.push_row(tokens, origin)
    }

    /// A conversation: clipped, cut and filtered, then one row a piece.
    pub fn conversation(
        &mut self,
        scene: &str,
        system: &str,
        rounds: Vec<Round>,
        lines: &[Shown<'_>],
        limits: Limits,
    ) -> Result<()> {
        let answered = rounds.last().map_or(0, |round| round.assistant.end);
        if answered < lines.len() {
            let tokens = lines[answered..].iter().map(|l| l.tokens).sum();
            self.filtered("user lines that nobody answers", 1, tokens);
        }
        let outcome = conversation::finish(rounds, lines, limits);
        if outcome.clipped_tokens > 0 {
            self.filtered("user lines before the last ten", 1, outcome.clipped_tokens);
        }
        for tokens in outcome.over_limit {
            self.filtered("conversation above the token limit", 1, tokens);
        }
        for tokens in outcome.alone {
            self.filtered("assistant talks to nobody", 1, tokens);
        }
        for (piece, tokens) in outcome.kept {
            self.buffer.clear();
            let contents: Vec<(Role, String)> = piece
                .iter()
                .flat_map(|round| {
                    [
                        (Role::User, join(&lines[round.user.clone()])),
                        (Role::Assistant, join(&lines[round.assistant.clone()])),
                    ]
                })
                .collect();
            let contents = contents.iter().map(|(role, text)| (*role, text.as_str()));
            let messages = std::iter::once((Role::System, system)).chain(contents);
            push_record(&mut self.buffer, messages.clone());
            let messages = messages.map(|(role, text)| Message::new(role, text));
            let conversation = Conversation::new(messages);
            self.count_training(TrainingRow::Conversation(&conversation))?;
            let origin = RowScenes::One(self.scene(scene));
            self.push_row(tokens as u64, origin)?;
        }
        Ok(())
    }

    /// A rule left something out.
    pub fn filtered(&mut self, rule: &str, rows: u64, tokens: usize) {
        let tally = self.filtered.entry(rule.to_owned()).or_default();
        tally.rows += rows;
        tally.tokens += tokens as u64;
    }

    pub fn finish(mut self) -> Result<DatasetPart> {
        let written = self.pending.finish()?;
        Ok(DatasetPart {
            pending: self.pending,
            file: DataFile {
                path: self.relative,
                key: self.key,
                language: self.language,
                sha256: written.sha256,
                bytes: written.bytes,
                n_rows: self.tokens.len() as u64,
                n_tokens: self.tokens.iter().sum(),
                training: self.training,
                holes: self.holes,
                filtered: self.filtered,
                rows: self.rows,
            },
            tokens: self.tokens,
            written: self.written,
            scenes: self.scenes,
        })
    }

    /// Adds what training makes of a row.
    fn count_training(&mut self, row: TrainingRow<'_>) -> Result<()> {
        let Some(count) = self.counters.training else {
            return Ok(());
        };
        let counts = count(row)?;
        let tokens = counts.conversation.map(|conversation| TrainingTokens {
            tokens: conversation.tokens as u64,
            trained: conversation.trained as u64,
        });
        self.training = TrainingTokens::sum([self.training, tokens].into_iter());
        self.written.append(&counts.written);
        Ok(())
    }

    fn push_row(&mut self, tokens: u64, origin: RowScenes) -> Result<()> {
        self.pending.write(&self.buffer)?;
        self.tokens.push(tokens);
        self.rows.push(origin);
        Ok(())
    }

    /// Which lines and tokens of a row come from which scene; neighbours of the same scene are one entry.
    fn origins(&mut self, sentences: &[Shown<'_>], scenes: &[&str]) -> RowScenes {
        let mut parts: Vec<(u32, u32, u32)> = Vec::new();
        for (sentence, scene) in sentences.iter().zip(scenes) {
            if sentence.text.is_empty() {
                continue;
            }
            let idx = self.scene(scene);
            let n_lines = 1 + sentence.text.matches('\n').count() as u32;
            match parts.last_mut() {
                Some((last, n, tokens)) if *last == idx => {
                    *n += n_lines;
                    *tokens += sentence.tokens as u32;
                }
                _ => parts.push((idx, n_lines, sentence.tokens as u32)),
            }
        }
        RowScenes::Several(parts)
    }

    fn scene(&mut self, id: &str) -> u32 {
        if let Some(idx) = self.scene_idx.get(id) {
            return *idx;
        }
        let idx = self.scenes.len() as u32;
        self.scenes.push(id.to_owned());
        self.scene_idx.insert(id.to_owned(), idx);
        idx
    }
}

/// Texts joined by line feeds.
fn join<'s, 'a: 's>(sentences: impl IntoIterator<Item = &'s Shown<'a>>) -> String {
    let mut out = String::new();
    for (idx, sentence) in sentences.into_iter().enumerate() {
        if idx > 0 {
            out.push('\n');
        }
        out.push_str(&sentence.text);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(text: &str) -> Shown<'_> {
        Shown::new(text.into(), &|t| t.len())
    }

    fn write(f: impl FnOnce(&mut DatasetWriter<'_>)) -> (String, DatasetPart) {
        let folder = tempfile::tempdir().unwrap();
        let mut writer = DatasetWriter::create(
            folder.path(),
            "x.jsonl".to_owned(),
            "en",
            None,
            Counters::of_rules(&|t| t.len()),
        )
        .unwrap();
        f(&mut writer);
        let part = writer.finish().unwrap();
        let text = std::fs::read_to_string(folder.path().join("x.jsonl.tmp")).unwrap();
        (text, part)
    }

    #[test]
    fn paragraph_is_cut_and_keeps_an_overlong_sentence_whole() {
        let long = "x".repeat(5000);
        let (text, part) = write(|w| {
            w.paragraph(&[shown("ab"), shown(""), shown(&long), shown("c")], &["s"])
                .unwrap();
            w.paragraph(&[], &["t"]).unwrap();
        });
        assert_eq!(part.tokens, [2, 5000, 1]);
        assert!(
            text.starts_with("{\"messages\": [{\"role\": \"assistant\", \"content\": \"ab\"}]}\n")
        );
        assert_eq!(part.scenes, ["s"]);
    }

    #[test]
    fn empty_piece_still_gives_a_row() {
        let (text, part) = write(|w| w.paragraph(&[shown("")], &["s"]).unwrap());
        assert_eq!(
            text,
            "{\"messages\": [{\"role\": \"assistant\", \"content\": \"\"}]}\n"
        );
        assert_eq!(part.tokens, [0]);
    }

    #[test]
    fn row_of_two_scenes_counts_lines_of_each() {
        let (_, part) = write(|w| {
            w.paragraph(&[shown("a"), shown("b\nc"), shown("d")], &["s", "s", "t"])
                .unwrap();
        });
        assert_eq!(
            part.file.rows,
            [RowScenes::Several(vec![(0, 3, 4), (1, 1, 1)])]
        );
    }

    #[test]
    fn conversation_without_user_lines_has_an_empty_user_message() {
        let rounds = vec![
            Round {
                user: 0..0,
                assistant: 0..1,
            },
            Round {
                user: 1..2,
                assistant: 2..3,
            },
        ];
        let limits = Limits {
            split: None,
            most: 100,
        };
        let (text, _) = write(|w| {
            w.conversation(
                "s",
                "Ada",
                rounds,
                &[shown("a"), shown("b"), shown("c")],
                limits,
            )
            .unwrap();
        });
        assert_eq!(
            text,
            "{\"messages\": [{\"role\": \"system\", \"content\": \"Ada\"}, {\"role\": \"user\", \"content\": \"\"}, \
             {\"role\": \"assistant\", \"content\": \"a\"}, {\"role\": \"user\", \"content\": \"b\"}, \
             {\"role\": \"assistant\", \"content\": \"c\"}]}\n"
        );
    }
}
