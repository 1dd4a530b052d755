//! Decoding a reply while it grows: what comes out is always whole characters.

use crate::tokenizer::Tokenizer;

/// Turns ids into text one by one; the pieces joined are what [`Tokenizer::decode`] gives for all ids at once
/// (with the byte-level decoder, which every Qwen tokenizer has).
#[derive(Clone, Debug)]
pub struct StreamDecoder {
    tokenizer: Tokenizer,
    skip_special: bool,
    /// Bytes of a character that is not complete yet, at most three.
    pending: Vec<u8>,
}

impl StreamDecoder {
    /// A decoder that has seen nothing; `skip_special` leaves out the text of added tokens that the tokenizer calls special.
    pub fn new(tokenizer: &Tokenizer, skip_special: bool) -> Self {
        StreamDecoder {
            tokenizer: tokenizer.clone(),
            skip_special,
            pending: Vec::new(),
        }
    }

    /// The text that `id` completes, empty while a character is still open; bytes that can never be one become U+FFFD at once.
    pub fn push(&mut self, id: u32) -> String {
        self.tokenizer
            .append_bytes(id, self.skip_special, &mut self.pending);
        let mut text = String::new();
        let mut done = 0;
        for chunk in self.pending.utf8_chunks() {
            text.push_str(chunk.valid());
            done += chunk.valid().len();
            let invalid = chunk.invalid();
            if !invalid.is_empty() {
                let rest = &self.pending[done..];
                if rest.len() == invalid.len() && may_grow(rest) {
                    break;
                }
                text.push(char::REPLACEMENT_CHARACTER);
                done += invalid.len();
            }
        }
        self.pending.drain(..done);
        text
    }

    /// What is left when no id follows: U+FFFD for an unfinished character, else nothing. The decoder starts anew.
    pub fn finish(&mut self) -> String {
        let text = String::from_utf8_lossy(&self.pending).into_owned();
        self.pending.clear();
        text
    }
}

/// Whether more bytes could complete `bytes` to a character.
fn may_grow(bytes: &[u8]) -> bool {
    matches!(std::str::from_utf8(bytes), Err(e) if e.error_len().is_none())
}
