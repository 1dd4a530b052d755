//! `cyrene chat`: talk in the terminal, or through a pipe, a line a turn.

use anyhow::Result;
use engine::Request;
use text::{Conversation, Message, Persona, PromptOptions, Role};

use crate::cli::Chat;
use crate::lines::Input;
use crate::ui::Ui;
use crate::{load, speak};

const HELP: &str = "/again  another answer to what you said last\n\
                    /undo   take your last words and the answer back\n\
                    /new    begin again\n\
                    /help   this list\n\
                    /quit   end; Ctrl-D does the same\n\
                    Arrow keys move in a line and fetch earlier ones.";

/// Runs the command; the error is a [`crate::ui::Misuse`] where the arguments are at fault.
pub fn run(args: &Chat, ui: &Ui) -> Result<()> {
    load::folder(&args.model.model)?;
    let adapter = args.model.adapter.as_deref();
    let mut persona = load::persona(&args.model.model, adapter, args.character.as_deref())?;
    if let Some(name) = &args.language {
        persona = persona.speaking(load::language(name)?.code());
    }
    let mut sampling = speak::profile(args.profile.as_deref(), &persona)?;
    sampling.seed = args.seed;
    let model = load::model(&args.model)?;
    let encoder = load::chat_encoder(&args.model.model, adapter)?;
    let tokenizer = encoder.tokenizer();
    eval::speak::mask(&mut sampling, tokenizer);
    let stop_ids = tokenizer.end_ids();
    let engine = eval::speak::engine(model, 1, None)?;

    let mut talk = Talk::new(args.system.as_deref(), &persona);
    let mut input = Input::open()?;
    let label = persona
        .shown_name()
        .map_or(String::new(), |name| format!("{name}: "));
    introduce(&persona, &input, &label, ui)?;
    while let Some(line) = input.next("> ")? {
        match talk.hear(line.trim()) {
            Heard::Say(text) => {
                ui.note(text);
                continue;
            }
            Heard::End => break,
            Heard::Nothing => continue,
            Heard::Greet => {
                greet(&persona, &label, ui)?;
                continue;
            }
            Heard::Answer => {}
        }
        let conversation = Conversation::new(talk.messages.clone());
        let request = Request {
            ids: encoder.prompt(&conversation, PromptOptions::default())?,
            sampling: sampling.clone(),
            max_tokens: args.max_tokens,
            stop_ids: stop_ids.clone(),
            ..Request::default()
        };
        if !ui.json() {
            ui.text(&label)?;
        }
        let reply = eval::speak::reply(&engine, request, Some(tokenizer), |piece| {
            if ui.json() { Ok(()) } else { ui.text(piece) }
        });
        let reply = match reply {
            Err(error) if is_full(&error) => {
                talk.take_back();
                ui.note(format_args!(
                    "{error:#}\nyour last words were taken back; say it shorter, /undo takes more back, /new begins again"
                ));
                continue;
            }
            reply => reply?,
        };
        ui.result(&reply, String::new)?;
        if !ui.json() {
            ui.line("")?;
        }
        if reply.finish_reason == "length" {
            ui.note("(cut off; a larger --max-tokens lets answers be longer)");
        }
        talk.messages
            .push(Message::assistant(reply.text.unwrap_or_default()));
    }
    Ok(())
}

/// Whether the conversation has grown beyond what the model can read.
fn is_full(error: &anyhow::Error) -> bool {
    let mut causes = error.chain();
    causes.any(|cause| {
        matches!(
            cause.downcast_ref(),
            Some(engine::Error::PromptTooLong { .. })
        )
    })
}

/// The note and the greeting, and to a person that there is a /help.
fn introduce(persona: &Persona, input: &Input, label: &str, ui: &Ui) -> Result<()> {
    if let Some(note) = persona.shown_note() {
        ui.note(note);
    }
    if matches!(input, Input::Editor(_)) {
        ui.note("/help lists what can be done here, /quit ends");
    }
    greet(persona, label, ui)
}

fn greet(persona: &Persona, label: &str, ui: &Ui) -> Result<()> {
    match persona.greeting_line() {
        Some(greeting) if !ui.json() => ui.line(&format!("{label}{greeting}")),
        _ => Ok(()),
    }
}

/// What a line asks for.
#[derive(Debug, PartialEq, Eq)]
enum Heard {
    Answer,
    Greet,
    Nothing,
    Say(String),
    End,
}

/// A conversation and its beginning, which stays.
struct Talk {
    /// System prompt and greeting.
    n_start: usize,
    messages: Vec<Message>,
}

impl Talk {
    /// Begins with the system prompt, and with the greeting as the character's first words: what was shown was also said.
    fn new(system: Option<&str>, persona: &Persona) -> Talk {
        let system = system.or(persona.system_prompt()).map(Message::system);
        let greeting = persona.greeting_line().map(Message::assistant);
        let messages: Vec<Message> = system.into_iter().chain(greeting).collect();
        Talk {
            n_start: messages.len(),
            messages,
        }
    }

    fn hear(&mut self, line: &str) -> Heard {
        match line {
            "" => Heard::Nothing,
            "/quit" | "/exit" => Heard::End,
            "/help" | "/?" => Heard::Say(HELP.to_owned()),
            "/new" | "/clear" => {
                self.messages.truncate(self.n_start);
                Heard::Greet
            }
            "/undo" => match self.take_back() {
                true => Heard::Nothing,
                false => Heard::Say("there is nothing to take back".to_owned()),
            },
            "/again" => match self.last_said() {
                Some(at) => {
                    self.messages.truncate(at + 1);
                    Heard::Answer
                }
                None => Heard::Say("there is no answer yet".to_owned()),
            },
            // A path or a slip of the keys; two slashes say a line that begins with one.
            command if command.starts_with('/') && !command.starts_with("//") => {
                Heard::Say(format!("there is no {command}; /help lists what there is"))
            }
            said => {
                let said = said.strip_prefix('/').unwrap_or(said);
                self.messages.push(Message::user(said));
                Heard::Answer
            }
        }
    }

    /// Removes the user's last words and what followed; false where there are none.
    fn take_back(&mut self) -> bool {
        let at = self.last_said();
        at.map(|at| self.messages.truncate(at)).is_some()
    }

    /// Place of the user's last words.
    fn last_said(&self) -> Option<usize> {
        self.messages
            .iter()
            .rposition(|message| message.role == Role::User)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn talk() -> Talk {
        let words = |text: &str| [("en".to_owned(), text.to_owned())].into();
        let persona = Persona {
            system: words("Bo"),
            greeting: words("Mind the step."),
            ..Persona::default()
        };
        Talk::new(None, &persona)
    }

    fn contents(talk: &Talk) -> Vec<&str> {
        let messages = talk.messages.iter();
        messages.map(|message| message.content.as_str()).collect()
    }

    #[test]
    fn greeting_is_the_first_thing_said_and_is_never_taken_back() {
        let mut talk = talk();
        assert_eq!(contents(&talk), ["Bo", "Mind the step."]);
        assert_eq!(talk.messages[1].role, Role::Assistant);
        assert!(matches!(talk.hear("/undo"), Heard::Say(_)));
        assert!(matches!(talk.hear("/again"), Heard::Say(_)));
        assert_eq!(talk.hear("hello"), Heard::Answer);
        talk.messages.push(Message::assistant("Hm."));
        assert_eq!(talk.hear("/undo"), Heard::Nothing);
        assert_eq!(contents(&talk), ["Bo", "Mind the step."]);
    }

    #[test]
    fn again_asks_once_more_and_new_begins_anew() {
        let mut talk = talk();
        for said in ["hello", "late?"] {
            assert_eq!(talk.hear(said), Heard::Answer);
            talk.messages.push(Message::assistant("Hm."));
        }
        assert_eq!(talk.hear("/again"), Heard::Answer);
        let expect = ["Bo", "Mind the step.", "hello", "Hm.", "late?"];
        assert_eq!(contents(&talk), expect);
        // An answer that did not come can be asked for again.
        assert_eq!(talk.hear("/again"), Heard::Answer);
        assert_eq!(contents(&talk), expect);
        assert_eq!(talk.hear("/new"), Heard::Greet);
        assert_eq!(contents(&talk), ["Bo", "Mind the step."]);
    }

    #[test]
    fn commands_are_not_said_and_unknown_ones_are_named() {
        let mut talk = talk();
        assert_eq!(talk.hear("/quit"), Heard::End);
        assert_eq!(talk.hear(""), Heard::Nothing);
        let Heard::Say(text) = talk.hear("/hlep") else {
            panic!("not said");
        };
        assert!(text.contains("/hlep") && text.contains("/help"));
        assert_eq!(contents(&talk).len(), 2);
        assert_eq!(talk.hear("//me waves"), Heard::Answer);
        assert_eq!(contents(&talk)[2], "/me waves");
    }
}
