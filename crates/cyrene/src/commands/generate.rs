//! `cyrene generate`: text from a model, for ids, messages or a plain prompt.

use anyhow::{Context, Result};
use corpus::row_file;
use engine::Request;
use serde::Deserialize;
use serde_json::Value;
use text::{ChatEncoder, Conversation, Message, PromptOptions};

use crate::cli::Generate;
use crate::ui::{Ui, of_rows};
use crate::{load, misuse, speak};

#[derive(Deserialize)]
struct Ids {
    input_ids: Vec<u32>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Messages {
    List(Vec<Value>),
    Row { messages: Vec<Value> },
}

/// Runs the command; the error is a [`crate::ui::Misuse`] where the arguments are at fault.
pub fn run(args: &Generate, ui: &Ui) -> Result<()> {
    load::folder(&args.model.model)?;
    let persona = load::persona(&args.model.model, args.model.adapter.as_deref(), None)?;
    let mut sampling = if args.greedy {
        engine::Sampling::greedy()
    } else {
        speak::profile(args.profile.as_deref(), &persona)?
    };
    sampling.seed = args.seed;
    let model = load::model(&args.model)?;
    let needs_text = args.input.ids.is_none();
    let has_tokenizer = args.model.model.join("tokenizer.json").exists();
    let encoder = if needs_text || has_tokenizer {
        Some(load::chat_encoder(
            &args.model.model,
            args.model.adapter.as_deref(),
        )?)
    } else {
        None
    };

    let mut prompts: Vec<Vec<u32>> = Vec::new();
    if let Some(path) = &args.input.ids {
        prompts.extend(
            of_rows(row_file::read::<Ids>(path, "{\"input_ids\":[...]}"))?
                .into_iter()
                .map(|row| row.input_ids),
        );
    }
    if let (Some(path), Some(encoder)) = (&args.input.messages, &encoder) {
        for mut messages in read_messages(path)? {
            persona.lead(&mut messages);
            let conversation = Conversation::new(messages);
            prompts.push(encoder.prompt(&conversation, PromptOptions::default())?);
        }
    }
    if let (Some(prompt), Some(encoder)) = (&args.input.prompt, &encoder) {
        prompts.push(encoder.tokenizer().encode(prompt)?);
    }
    if prompts.is_empty() {
        misuse!("nothing to go on from: the file holds no row");
    }

    let tokenizer = encoder.as_ref().map(ChatEncoder::tokenizer);
    let mut stop_ids = match tokenizer {
        Some(tokenizer) => tokenizer.end_ids(),
        None => model.config().end_ids(&args.model.model),
    };
    stop_ids.sort_unstable();
    stop_ids.dedup();
    if let Some(tokenizer) = tokenizer {
        eval::speak::mask(&mut sampling, tokenizer);
        if args.input.messages.is_none() {
            // Text and ids go on as whoever wrote them likes.
            sampling.banned.clear();
        }
    }
    let engine = eval::speak::engine(model, 1, None)?;
    for (at, ids) in prompts.into_iter().enumerate() {
        let request = Request {
            ids,
            sampling: sampling.clone(),
            max_tokens: args.max_tokens,
            stop_ids: stop_ids.clone(),
            ..Request::default()
        };
        let reply = eval::speak::reply(&engine, request, tokenizer, |piece| {
            if ui.json() { Ok(()) } else { ui.text(piece) }
        })
        .with_context(|| format!("prompt {}", at + 1))?;
        if reply.ids.is_empty() {
            ui.note(format_args!(
                "prompt {}: the model ended the text at once; a text that goes on, --messages for a conversation, or another --seed gets more",
                at + 1
            ));
        }
        ui.result(&reply, || {
            if reply.text.is_some() {
                "\n".to_owned()
            } else {
                format!("{:?}", reply.ids)
            }
        })?;
    }
    Ok(())
}

/// A JSON list of messages, or JSON lines of `{"messages":[...]}`.
fn read_messages(path: &std::path::Path) -> Result<Vec<Vec<Message>>> {
    let expected = "a list of messages, or {\"messages\":[...]} a line";
    let rows: Vec<Messages> = of_rows(row_file::read(path, expected))?;
    let mut conversations = Vec::with_capacity(rows.len());
    for (at, row) in rows.into_iter().enumerate() {
        let (Messages::List(messages) | Messages::Row { messages }) = row;
        match Message::list_from_json(&messages) {
            Ok(messages) => conversations.push(messages),
            Err(error) => misuse!("conversation {} of {}: {error}", at + 1, path.display()),
        }
    }
    Ok(conversations)
}
