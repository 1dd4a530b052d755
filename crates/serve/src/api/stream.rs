//! Server-sent events of a growing answer: chunks as OpenAI writes them, `line` events for the page, `[DONE]` at the end.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::response::sse::{Event, KeepAlive, Sse};
use serde_json::Value;
use tokio_stream::Stream;

use super::answer::{Head, line_json};
use crate::error::ApiError;
use crate::generation::{Generation, Update};

/// Pause after which a comment keeps proxies from closing a quiet connection.
const PING_EVERY: Duration = Duration::from_secs(10);

/// The two kinds of completion, as far as streaming tells them apart.
pub(crate) trait Shape: Send + Unpin + 'static {
    /// Choices to send before anything was generated.
    fn opening(&self, n: usize) -> Vec<Value>;
    /// The choice that tells of an update.
    fn choice(&self, update: &Update) -> Value;
}

/// Starts the answer. Dropping the response body drops the generation, which cancels it.
pub(crate) fn respond<S: Shape>(
    head: Head,
    shape: S,
    generation: Generation,
    include_usage: bool,
) -> Sse<impl Stream<Item = Result<Event, Infallible>>> {
    let mut ready = VecDeque::new();
    for choice in shape.opening(generation.n_choices()) {
        ready.push_back(data(&head.around(vec![choice], None)));
    }
    let events = Events {
        head,
        shape,
        generation: Some(generation),
        include_usage,
        ready,
    };
    Sse::new(events).keep_alive(KeepAlive::new().interval(PING_EVERY).text("ping"))
}

struct Events<S> {
    head: Head,
    shape: S,
    /// `None` when the last event is in `ready`.
    generation: Option<Generation>,
    include_usage: bool,
    ready: VecDeque<Event>,
}

impl<S: Shape> Stream for Events<S> {
    type Item = Result<Event, Infallible>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let events = &mut *self;
        loop {
            if let Some(event) = events.ready.pop_front() {
                return Poll::Ready(Some(Ok(event)));
            }
            let Some(generation) = &mut events.generation else {
                return Poll::Ready(None);
            };
            match generation.poll_update(context) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(Some(Ok(update))) => events.tell(&update),
                Poll::Ready(Some(Err(error))) => events.end(Some(&error)),
                Poll::Ready(None) => events.end(None),
            }
        }
    }
}

impl<S: Shape> Events<S> {
    fn tell(&mut self, update: &Update) {
        let choice = self.shape.choice(update);
        let chunk = self.head.around(vec![choice], None);
        self.ready.push_back(data(&chunk));
        for line in &update.delta.lines {
            let line = line_json(update.index, line).to_string();
            self.ready
                .push_back(Event::default().event("line").data(line));
        }
    }

    fn end(&mut self, error: Option<&ApiError>) {
        let Some(generation) = self.generation.take() else {
            return;
        };
        if let Some(error) = error {
            self.ready.push_back(data(&error.body()));
        } else if self.include_usage {
            let chunk = self.head.around(Vec::new(), Some(generation.tokens()));
            self.ready.push_back(data(&chunk));
        }
        self.ready.push_back(Event::default().data("[DONE]"));
    }
}

fn data(value: &Value) -> Event {
    Event::default().data(value.to_string())
}
