//! `cyrene generate`: text from a model, for ids, messages or a plain prompt.

use anyhow::{Context, Result};
use engine::Request;
use serde::Deserialize;
use text::{Message, RenderOptions};

use crate::cli::Generate;
use crate::ui::Ui;
use crate::{jsonl, load, misuse, speak};

#[derive(Deserialize)]
struct Ids {
    input_ids: Vec<u32>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Messages {
    List(Vec<Message>),
    Row { messages: Vec<Message> },
}

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
    let speech = if needs_text || has_tokenizer {
        Some(load::speech(&args.model.model)?)
    } else {
        None
    };

    let mut prompts: Vec<Vec<u32>> = Vec::new();
    if let Some(path) = &args.input.ids {
        prompts.extend(
            jsonl::read::<Ids>(path, "{\"input_ids\":[...]}")?
                .into_iter()
                .map(|row| row.input_ids),
        );
    }
    if let (Some(path), Some((tokenizer, template))) = (&args.input.messages, &speech) {
        for mut messages in read_messages(path)? {
            persona.lead(&mut messages);
            let rendered = template.render(&messages, &RenderOptions::generation())?;
            prompts.push(tokenizer.encode(&rendered)?);
        }
    }
    if let (Some(prompt), Some((tokenizer, _))) = (&args.input.prompt, &speech) {
        prompts.push(tokenizer.encode(prompt)?);
    }
    if prompts.is_empty() {
        misuse!("nothing to go on from: the file holds no row");
    }

    let mut stop_ids = match &speech {
        Some((tokenizer, _)) => tokenizer.end_ids(),
        None => load::end_ids_of_config(&args.model.model, &model),
    };
    stop_ids.sort_unstable();
    stop_ids.dedup();
    if let Some((tokenizer, _)) = &speech {
        if args.input.messages.is_some() {
            sampling.banned = speak::think_ids(tokenizer);
        }
        sampling.vocab_limit = u32::try_from(tokenizer.vocab_size()).ok();
    }
    let engine = speak::engine(model, 1, None)?;
    let tokenizer = speech.as_ref().map(|(tokenizer, _)| tokenizer);
    for (at, ids) in prompts.into_iter().enumerate() {
        let request = Request {
            ids,
            sampling: sampling.clone(),
            max_tokens: args.max_tokens,
            stop_ids: stop_ids.clone(),
            top_logprobs: 0,
        };
        let reply = speak::reply(&engine, request, tokenizer, |piece| {
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
    let text = match std::fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) => misuse!("cannot read {}: {error}", path.display()),
    };
    if let Ok(whole) = serde_json::from_str::<Messages>(&text) {
        return Ok(vec![match whole {
            Messages::List(messages) | Messages::Row { messages } => messages,
        }]);
    }
    let rows = jsonl::read::<Messages>(path, "a list of messages, or {\"messages\":[...]} a line")?;
    Ok(rows
        .into_iter()
        .map(|row| match row {
            Messages::List(messages) | Messages::Row { messages } => messages,
        })
        .collect())
}
