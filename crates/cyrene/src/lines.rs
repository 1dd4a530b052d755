//! Lines that a person types, with arrow keys and a history, or that a program sends through a pipe.

use std::io::{BufRead, IsTerminal, Lines, StdinLock};

use anyhow::{Context, Result};
use rustyline::DefaultEditor;
use rustyline::error::ReadlineError;

/// Where lines come from.
pub enum Input {
    /// A terminal.
    Editor(Box<DefaultEditor>),
    /// A pipe or a file.
    Pipe(Lines<StdinLock<'static>>),
}

impl Input {
    /// A line editor where both ends are a terminal, else plain lines.
    ///
    /// # Errors
    /// A terminal that cannot be asked.
    pub fn open() -> Result<Input> {
        if std::io::stdin().is_terminal() && std::io::stdout().is_terminal() {
            let editor = DefaultEditor::new().context("opening the terminal")?;
            return Ok(Input::Editor(Box::new(editor)));
        }
        Ok(Input::Pipe(std::io::stdin().lock().lines()))
    }

    /// The next line; None at the end, or when a person presses Ctrl-C or Ctrl-D. A pipe sees no prompt.
    ///
    /// # Errors
    /// What cannot be read, or is no UTF-8.
    pub fn next(&mut self, prompt: &str) -> Result<Option<String>> {
        match self {
            Input::Editor(editor) => match editor.readline(prompt) {
                Ok(line) => {
                    // Only within this talk: what was said is nobody else's business.
                    editor.add_history_entry(line.as_str())?;
                    Ok(Some(line))
                }
                Err(ReadlineError::Eof | ReadlineError::Interrupted) => Ok(None),
                Err(error) => Err(error).context("reading what was typed"),
            },
            Input::Pipe(lines) => lines.next().transpose().context("reading standard input"),
        }
    }
}
