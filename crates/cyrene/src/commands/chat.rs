//! `cyrene chat`: talk in the terminal. `/undo`, `/again`, `/clear` and `/quit` do what they say.

use std::io::BufRead;

use anyhow::Result;
use engine::Request;
use text::{Conversation, Message, PromptOptions, Role};

use crate::cli::Chat;
use crate::ui::Ui;
use crate::{load, speak};

pub fn run(args: &Chat, ui: &Ui) -> Result<()> {
    load::folder(&args.model.model)?;
    let adapter = args.model.adapter.as_deref();
    let persona = load::persona(&args.model.model, adapter, args.character.as_deref())?;
    let mut sampling = speak::profile(args.profile.as_deref(), &persona)?;
    sampling.seed = args.seed;
    let model = load::model(&args.model)?;
    let encoder = load::chat_encoder(&args.model.model, adapter)?;
    let tokenizer = encoder.tokenizer();
    eval::speak::mask(&mut sampling, tokenizer);
    let stop_ids = tokenizer.end_ids();
    let engine = eval::speak::engine(model, 1, None)?;

    let system = args
        .system
        .clone()
        .or_else(|| persona.system_prompt().map(str::to_owned));
    let start: Vec<Message> = system.into_iter().map(Message::system).collect();
    let mut messages = start.clone();
    if let Some(note) = persona.shown_note() {
        ui.note(note);
    }
    ui.note("/undo  /again  /clear  /quit");
    let mut lines = std::io::stdin().lock().lines();
    loop {
        ui.text("> ")?;
        let Some(line) = lines.next() else {
            return ui.line("");
        };
        let line = line?;
        match line.trim() {
            "" => continue,
            "/quit" => return Ok(()),
            "/clear" => {
                messages.clone_from(&start);
                continue;
            }
            "/undo" => {
                drop_round(&mut messages, 2);
                continue;
            }
            "/again" => drop_round(&mut messages, 1),
            said => messages.push(Message::user(said)),
        }
        if messages
            .last()
            .is_none_or(|message| message.role != Role::User)
        {
            continue;
        }
        let conversation = Conversation::new(messages.clone());
        let request = Request {
            ids: encoder.prompt(&conversation, PromptOptions::default())?,
            sampling: sampling.clone(),
            max_tokens: args.max_tokens,
            stop_ids: stop_ids.clone(),
            ..Request::default()
        };
        let reply = eval::speak::reply(&engine, request, Some(tokenizer), |piece| {
            if ui.json() { Ok(()) } else { ui.text(piece) }
        })?;
        ui.result(&reply, String::new)?;
        if !ui.json() {
            ui.line("")?;
        }
        messages.push(Message::assistant(reply.text.unwrap_or_default()));
    }
}

/// Takes the last `n` messages back, but never the system message.
fn drop_round(messages: &mut Vec<Message>, n: usize) {
    for _ in 0..n {
        if messages
            .last()
            .is_some_and(|message| message.role != Role::System)
        {
            messages.pop();
        }
    }
}
