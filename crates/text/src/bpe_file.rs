//! The model of tokenizer.json: its tokens and merges, read into flat texts and made into what encodes.

use serde::de::{DeserializeSeed, MapAccess, SeqAccess, Visitor};
use serde::ser::SerializeStruct;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::bpe::{Bpe, MAX_IDS, MAX_MERGES};
use crate::error::{Error, Result};
use crate::vocab::Vocab;

/// Fewer are looked up before a thread has started.
const MERGES_WORTH_A_THREAD: usize = 8192;

#[derive(Deserialize)]
pub(crate) struct BpeFile {
    pub vocab: Tokens,
    pub merges: Merges,
    #[serde(flatten)]
    pub options: BpeOptions,
}

#[derive(Clone, Debug, Default, Deserialize)]
pub(crate) struct BpeOptions {
    /// What stands for characters without a token, of which there are none where every byte has one; as it was read, for saves.
    unk_token: Option<String>,
    continuing_subword_prefix: Option<String>,
    end_of_word_suffix: Option<String>,
    #[serde(default)]
    fuse_unk: bool,
    #[serde(default)]
    byte_fallback: bool,
    /// Whether a word that the vocabulary has is one token, whatever the merges say.
    #[serde(default)]
    pub ignore_merges: bool,
}

/// Tokens and their ids as a file lists them.
#[derive(Default)]
pub(crate) struct Tokens {
    text: String,
    /// End of each token in `text`, and its id.
    ends: Vec<(usize, u32)>,
}

/// Pairs of tokens, best first.
#[derive(Default)]
pub(crate) struct Merges {
    text: String,
    /// End of the left and of the right token in `text`.
    ends: Vec<(usize, usize)>,
}

/// What a file's model says, ready for use.
#[derive(Clone, Debug)]
pub(crate) struct Model {
    pub vocab: Vocab,
    pub bpe: Bpe,
    pub options: BpeOptions,
}

impl BpeFile {
    /// # Errors
    /// Marked subwords, a merge of tokens that the vocabulary lacks, or more of either than [`Bpe`] can hold.
    pub fn build(self) -> Result<Model> {
        self.options.check()?;
        let n_merges = self.merges.ends.len();
        // Before the table is made: it has a place for every id up to the highest.
        let n_ids = self.vocab.ends.iter().map(|(_, id)| *id as usize + 1);
        let n_ids = n_ids.max().unwrap_or(0);
        if n_ids > MAX_IDS || n_merges > MAX_MERGES {
            return Err(Error::VocabTooLarge { n_ids, n_merges });
        }
        let vocab = Vocab::new(self.vocab.iter());
        let bpe = Bpe::new(&self.merges.ids(&vocab)?);
        Ok(Model {
            vocab,
            bpe,
            options: self.options,
        })
    }
}

impl BpeOptions {
    /// # Errors
    /// [`Error::SubwordMark`] if tokens carry a mark of their place in the word, as no byte-level vocabulary does.
    fn check(&self) -> Result<()> {
        for mark in [&self.continuing_subword_prefix, &self.end_of_word_suffix] {
            if let Some(mark) = mark.as_ref().filter(|mark| !mark.is_empty()) {
                return Err(Error::SubwordMark { mark: mark.clone() });
            }
        }
        Ok(())
    }
}

/// As the `tokenizers` crate writes it: tokens by id, merges by rank.
impl Serialize for Model {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        struct Ids<'a>(&'a Vocab);
        impl Serialize for Ids<'_> {
            fn serialize<S: Serializer>(&self, to: S) -> std::result::Result<S::Ok, S::Error> {
                to.collect_map(self.0.iter())
            }
        }
        let token = |id| self.vocab.token(id).unwrap_or_default();
        let merges = self.bpe.merges().into_iter();
        let merges: Vec<_> = merges.map(|(l, r)| (token(l), token(r))).collect();
        let options = &self.options;
        let mut model = serializer.serialize_struct("BPE", 10)?;
        model.serialize_field("type", "BPE")?;
        model.serialize_field("dropout", &())?;
        model.serialize_field("unk_token", &options.unk_token)?;
        model.serialize_field("continuing_subword_prefix", &())?;
        model.serialize_field("end_of_word_suffix", &())?;
        model.serialize_field("fuse_unk", &options.fuse_unk)?;
        model.serialize_field("byte_fallback", &options.byte_fallback)?;
        model.serialize_field("ignore_merges", &options.ignore_merges)?;
        model.serialize_field("vocab", &Ids(&self.vocab))?;
        model.serialize_field("merges", &merges)?;
        model.end()
    }
}

impl Tokens {
    pub fn push(&mut self, token: &str, id: u32) {
        self.text.push_str(token);
        self.ends.push((self.text.len(), id));
    }

    pub fn len(&self) -> usize {
        self.ends.len()
    }

    fn iter(&self) -> impl Iterator<Item = (&str, u32)> {
        let starts = std::iter::once(0).chain(self.ends.iter().map(|(end, _)| *end));
        starts
            .zip(&self.ends)
            .map(|(start, (end, id))| (&self.text[start..*end], *id))
    }
}

impl Merges {
    pub fn push(&mut self, left: &str, right: &str) {
        self.text.push_str(left);
        let end = self.text.len();
        self.text.push_str(right);
        self.ends.push((end, self.text.len()));
    }

    /// Left, right and result of every merge. To look up three quarters of a million tokens is most of loading a vocabulary, so all
    /// cores share it.
    ///
    /// # Errors
    /// [`Error::UnknownMerge`] with the first token that the vocabulary lacks.
    fn ids(&self, vocab: &Vocab) -> Result<Vec<[u32; 3]>> {
        let n_threads = std::thread::available_parallelism().map_or(1, usize::from);
        let size = self
            .ends
            .len()
            .div_ceil(n_threads)
            .max(MERGES_WORTH_A_THREAD);
        let parts = std::thread::scope(|scope| {
            let workers: Vec<_> = (0..self.ends.len())
                .step_by(size)
                .map(|from| scope.spawn(move || self.ids_of(vocab, from, size)))
                .collect();
            let joined = workers.into_iter().map(|worker| {
                let done = worker.join();
                done.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            });
            joined.collect::<Result<Vec<_>>>()
        })?;
        Ok(parts.concat())
    }

    /// Of the merges behind `from`, at most `n`.
    fn ids_of(&self, vocab: &Vocab, from: usize, n: usize) -> Result<Vec<[u32; 3]>> {
        let id = |token: &str| {
            vocab.id(token).ok_or_else(|| Error::UnknownMerge {
                token: token.to_owned(),
            })
        };
        let mut start = match from {
            0 => 0,
            _ => self.ends[from - 1].1,
        };
        // Most merges build the token behind that of the merge before; to look there first spares a third of the searches.
        let mut guess = 0;
        let ends = self.ends[from..].iter().take(n);
        ends.map(|(middle, end)| {
            let both = &self.text[start..*end];
            let result = match vocab.token(guess) {
                Some(token) if token == both => guess,
                _ => id(both)?,
            };
            guess = result + 1;
            let left = id(&self.text[start..*middle])?;
            start = *end;
            Ok([left, id(&self.text[*middle..*end])?, result])
        })
        .collect()
    }
}

impl<'de> Deserialize<'de> for Tokens {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct TokensVisitor;
        impl<'de> Visitor<'de> for TokensVisitor {
            type Value = Tokens;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("an object of ids by token")
            }

            fn visit_map<A: MapAccess<'de>>(
                self,
                mut map: A,
            ) -> std::result::Result<Tokens, A::Error> {
                let mut tokens = Tokens::default();
                while map.next_key_seed(Append(&mut tokens.text))?.is_some() {
                    tokens.ends.push((tokens.text.len(), map.next_value()?));
                }
                Ok(tokens)
            }
        }
        deserializer.deserialize_map(TokensVisitor)
    }
}

impl<'de> Deserialize<'de> for Merges {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct MergesVisitor;
        impl<'de> Visitor<'de> for MergesVisitor {
            type Value = Merges;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a list of merges")
            }

            fn visit_seq<A: SeqAccess<'de>>(
                self,
                mut seq: A,
            ) -> std::result::Result<Merges, A::Error> {
                let mut merges = Merges::default();
                while seq.next_element_seed(AppendMerge(&mut merges))?.is_some() {}
                Ok(merges)
            }
        }
        deserializer.deserialize_seq(MergesVisitor)
    }
}

/// One merge, written `["a", "b"]` or, in older files, `"a b"`.
struct AppendMerge<'m>(&'m mut Merges);

impl<'de> DeserializeSeed<'de> for AppendMerge<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(
        self,
        deserializer: D,
    ) -> std::result::Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for AppendMerge<'_> {
    type Value = ();

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("a merge, [\"a\", \"b\"] or \"a b\"")
    }

    fn visit_str<E: serde::de::Error>(self, text: &str) -> std::result::Result<(), E> {
        let (left, right) = text
            .split_once(' ')
            .ok_or_else(|| E::invalid_value(serde::de::Unexpected::Str(text), &self))?;
        self.0.push(left, right);
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut parts: A) -> std::result::Result<(), A::Error> {
        let missing = |n| <A::Error as serde::de::Error>::invalid_length(n, &"2 parts");
        let Merges { text, ends } = self.0;
        parts
            .next_element_seed(Append(text))?
            .ok_or_else(|| missing(0))?;
        let middle = text.len();
        parts
            .next_element_seed(Append(text))?
            .ok_or_else(|| missing(1))?;
        ends.push((middle, text.len()));
        Ok(())
    }
}

/// Appends a text to another.
struct Append<'t>(&'t mut String);

impl<'de> DeserializeSeed<'de> for Append<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(
        self,
        deserializer: D,
    ) -> std::result::Result<(), D::Error> {
        deserializer.deserialize_str(self)
    }
}

impl Visitor<'_> for Append<'_> {
    type Value = ();

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("a token")
    }

    fn visit_str<E>(self, text: &str) -> std::result::Result<(), E> {
        self.0.push_str(text);
        Ok(())
    }
}
