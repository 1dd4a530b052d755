//! Replies to held-out turns: which turns are asked, and what the model says.

use std::collections::BTreeMap;

use corpus::examples::SourceExample;
use corpus::split::Side;
use engine::{Request, Sampling};
use model::Model;
use text::{ChatEncoder, Conversation, Message, PromptOptions, Role};

use crate::metric::known_words::Vocabulary;
use crate::progress::Progress;
use crate::report::Reply;
use crate::{Error, Result, speak};

/// Longest reply, in tokens.
const REPLY_TOKENS: usize = 128;

/// A conversation up to the turn that the model shall say.
pub(crate) struct Prompt {
    language: String,
    scene: String,
    messages: Vec<Message>,
}

/// The first rounds of held-out conversations, `n` a language, drawn by seed.
pub(crate) fn held_out_prompts(rows: &[SourceExample], n: usize, seed: u64) -> Vec<Prompt> {
    let mut rows: Vec<&SourceExample> = rows.iter().filter(|row| row.side == Side::Val).collect();
    rows.sort_by_cached_key(|row| {
        files::sha256(format!("{seed} {}", row.scene.as_deref().unwrap_or("")).as_bytes())
    });
    let mut taken: BTreeMap<String, usize> = Default::default();
    let mut prompts = Vec::new();
    for row in rows {
        let language = row.encoded.origin.language.clone().unwrap_or_default();
        let Some(at) = row
            .messages
            .iter()
            .position(|message| message.role == Role::User && !message.content.trim().is_empty())
        else {
            continue;
        };
        let taken = taken.entry(language.clone()).or_default();
        if *taken < n {
            *taken += 1;
            prompts.push(Prompt {
                language,
                scene: row.scene.clone().unwrap_or_default(),
                messages: row.messages[..=at].to_vec(),
            });
        }
    }
    prompts.sort_by(|a, b| a.language.cmp(&b.language));
    prompts
}

/// How replies are drawn.
pub(crate) struct Speaker<'a> {
    pub encoder: &'a ChatEncoder,
    pub sampling: &'a Sampling,
    pub seed: u64,
    /// What counts as a word of the story.
    pub vocabulary: &'a Vocabulary,
}

/// A reply to each prompt, each with a seed of its own.
///
/// # Errors
/// A conversation that the template refuses; a failure of the engine.
pub(crate) fn replies(
    model: Model,
    prompts: Vec<Prompt>,
    speaker: &Speaker<'_>,
    progress: &mut dyn Progress,
) -> Result<Vec<Reply>> {
    let tokenizer = speaker.encoder.tokenizer();
    let mut sampling = speaker.sampling.clone();
    speak::mask(&mut sampling, tokenizer);
    let engine = speak::engine(model, 1, None)?;
    let mut replies = Vec::new();
    progress.begin("replies", prompts.len() as u64);
    for (at, prompt) in prompts.into_iter().enumerate() {
        sampling.seed = Some(speaker.seed + at as u64);
        let conversation = Conversation::new(prompt.messages.iter().cloned());
        let request = Request {
            ids: speaker
                .encoder
                .prompt(&conversation, PromptOptions::default())?,
            sampling: sampling.clone(),
            max_tokens: REPLY_TOKENS,
            stop_ids: tokenizer.end_ids(),
            ..Request::default()
        };
        let said = speak::reply(&engine, request, Some(tokenizer), |_| Ok::<_, Error>(()))?;
        let text = said.text.unwrap_or_default();
        let turn = prompt.messages.last();
        replies.push(Reply {
            language: prompt.language,
            scene: prompt.scene,
            prompt: turn
                .map(|message| message.content.clone())
                .unwrap_or_default(),
            known_words: speaker.vocabulary.share(&text),
            reply: text,
            finish_reason: said.finish_reason.to_owned(),
        });
        progress.advance(at as u64 + 1, "");
    }
    progress.end();
    Ok(replies)
}
