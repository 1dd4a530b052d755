//! The one way from a conversation to the ids of a prompt: a folder's tokenizer and its template, asked with thinking off.

use std::path::Path;

use crate::added_tokens::{Added, unescape};
use crate::chat_template::{ChatTemplate, RenderOptions};
use crate::conversation::Conversation;
use crate::error::{Error, Result};
use crate::tokenizer::{TURN_END, Tokenizer};

/// A tokenizer and the template that speaks to its model.
#[derive(Clone, Debug)]
pub struct ChatEncoder {
    tokenizer: Tokenizer,
    template: ChatTemplate,
}

/// What a prompt asks for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PromptOptions {
    /// Whether the template is asked to open a think block. Off, it is told so: sizes differ in what they do when told nothing.
    pub thinking: bool,
    /// Whether the last answer goes on where it ends, in place of a new one.
    pub continue_final: bool,
}

impl ChatEncoder {
    /// Puts a tokenizer and a template together.
    pub fn new(tokenizer: Tokenizer, template: ChatTemplate) -> Self {
        ChatEncoder {
            tokenizer,
            template,
        }
    }

    /// Reads a model's folder, and that of an adapter on top. The adapter's template holds, for the adapter was trained with it; else the
    /// model's own, in a file or in its `tokenizer_config.json`; without any the project's.
    ///
    /// # Errors
    /// No tokenizer, or one or a template that cannot be read.
    pub fn load(dir: &Path, adapter: Option<&Path>) -> Result<Self> {
        let tokenizer = Tokenizer::load(dir)?;
        for folder in adapter.into_iter().chain([dir]) {
            match ChatTemplate::load(folder) {
                Err(Error::NoChatTemplate { .. }) => {}
                template => return Ok(Self::new(tokenizer, template?)),
            }
        }
        Ok(Self::new(tokenizer, ChatTemplate::history_stable()?))
    }

    /// The tokenizer.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// The template.
    pub fn template(&self) -> &ChatTemplate {
        &self.template
    }

    /// The ids that an answer follows. Added tokens are the template's own: one that is written in a message is text.
    ///
    /// # Errors
    /// What the template refuses; [`Error::NothingToContinue`] and [`Error::CannotContinue`] if the last answer shall go on.
    pub fn prompt(&self, conversation: &Conversation, options: PromptOptions) -> Result<Vec<u32>> {
        let text = self.escaped_text(conversation, options)?;
        Ok(self.tokenizer.ids(&text, Added::Unescaped))
    }

    /// The text of [`ChatEncoder::prompt`].
    ///
    /// # Errors
    /// As [`ChatEncoder::prompt`].
    pub fn prompt_text(
        &self,
        conversation: &Conversation,
        options: PromptOptions,
    ) -> Result<String> {
        let text = self.escaped_text(conversation, options)?;
        Ok(unescape(&text).into_owned())
    }

    /// The text of a prompt with what people wrote escaped, so that the template takes none of it for a mark of its own either.
    fn escaped_text(&self, conversation: &Conversation, options: PromptOptions) -> Result<String> {
        let conversation = conversation.escaped(&self.tokenizer);
        let render_options = RenderOptions {
            add_generation_prompt: !options.continue_final,
            enable_thinking: Some(options.thinking),
            ..RenderOptions::default()
        };
        if !options.continue_final {
            return self
                .template
                .render(&conversation.with_a_turn(), &render_options);
        }
        if !conversation.ends_with_answer() {
            let index = conversation.n_messages.saturating_sub(1);
            return Err(Error::NothingToContinue { index });
        }
        let text = self.template.render(&conversation, &render_options)?;
        let open = text.trim_end().strip_suffix(TURN_END);
        open.map(str::to_owned).ok_or(Error::CannotContinue)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::conversation::Message;

    #[test]
    fn prompt_text_is_what_its_ids_say() {
        let tokenizer = Tokenizer::train(["<|im_end|> who is there?"].into_iter(), 300).unwrap();
        let chat = ChatEncoder::new(tokenizer, ChatTemplate::history_stable().unwrap());
        let said = "<\u{fdd0}|im_end|> <think>\u{fdd0}\u{fdd0} <|im_end|>";
        let conversation = Conversation::new([Message::system(said), Message::user(said)]);
        let options = PromptOptions::default();
        let text = chat.prompt_text(&conversation, options).unwrap();
        assert_eq!(text.matches(&format!("\n{said}<|im_end|>\n")).count(), 2);
        let ids = chat.prompt(&conversation, options).unwrap();
        assert_eq!(chat.tokenizer().decode(&ids, false).unwrap(), text);
    }
}
