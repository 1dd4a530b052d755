//! The events of one request: a channel that can be read by a thread or polled by a future, and that knows when its reader has left.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use flume::r#async::RecvStream;
use futures_core::Stream;

use crate::request::Event;

/// The reading end. Dropping it cancels the request.
#[derive(Debug)]
pub struct EventReceiver {
    events: flume::Receiver<Event>,
    /// The same end, for futures: it holds the waker.
    stream: RecvStream<'static, Event>,
}

/// The writing end, held by the scheduler; dropping it ends the stream.
#[derive(Debug)]
pub(crate) struct EventSender {
    events: flume::Sender<Event>,
    capacity: usize,
}

/// Both ends of a channel that asks its writer to pause at `capacity` unread events.
pub(crate) fn channel(capacity: usize) -> (EventSender, EventReceiver) {
    // Without a bound of its own: the last event must always fit, and the scheduler never waits.
    let (sender, events) = flume::unbounded();
    let stream = events.clone().into_stream();
    let sender = EventSender {
        events: sender,
        capacity,
    };
    (sender, EventReceiver { events, stream })
}

impl EventReceiver {
    /// Waits for the next event; `None` when no more will come.
    pub fn recv(&self) -> Option<Event> {
        self.events.recv().ok()
    }

    /// As [`EventReceiver::recv`], giving up after `timeout` (then also `None`).
    pub fn recv_timeout(&self, timeout: Duration) -> Option<Event> {
        self.events.recv_timeout(timeout).ok()
    }

    /// For futures: the next event, or registers the task to be woken by it.
    pub fn poll_recv(&mut self, context: &mut Context<'_>) -> Poll<Option<Event>> {
        Pin::new(&mut self.stream).poll_next(context)
    }
}

impl Iterator for EventReceiver {
    type Item = Event;

    fn next(&mut self) -> Option<Event> {
        self.recv()
    }
}

impl EventSender {
    /// Whether another token may be sent now.
    pub fn has_room(&self) -> bool {
        self.events.len() < self.capacity
    }

    /// Whether the reader has left.
    pub fn is_closed(&self) -> bool {
        self.events.is_disconnected()
    }

    /// Adds an event; the caller has asked [`EventSender::has_room`] before computing it, and the last event always fits.
    pub fn send(&self, event: Event) {
        // Nobody reads it if the reader has left, which the scheduler asks for by itself.
        drop(self.events.send(event));
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::task::{Wake, Waker};

    use super::*;
    use crate::error::Error;

    fn event(id: u32) -> Event {
        Event::Token {
            id,
            logprob: 0.0,
            top: Vec::new(),
        }
    }

    #[test]
    fn events_arrive_in_order_and_then_end() {
        let (sender, receiver) = channel(2);
        std::thread::spawn(move || {
            sender.send(event(1));
            sender.send(Event::Failed(Error::Stopped));
        });
        let got: Vec<Event> = receiver.collect();
        assert_eq!(got, [event(1), Event::Failed(Error::Stopped)]);
    }

    #[test]
    fn full_channel_has_no_room_until_read() {
        let (sender, receiver) = channel(1);
        sender.send(event(1));
        assert!(!sender.has_room());
        receiver.recv();
        assert!(sender.has_room());
    }

    #[test]
    fn sender_sees_the_reader_leave() {
        let (sender, receiver) = channel(1);
        assert!(!sender.is_closed());
        drop(receiver);
        assert!(sender.is_closed());
    }

    #[test]
    fn pending_future_is_woken_by_an_event() {
        struct Count(AtomicUsize);
        impl Wake for Count {
            fn wake(self: Arc<Self>) {
                self.0.fetch_add(1, Ordering::SeqCst);
            }
        }
        let count = Arc::new(Count(AtomicUsize::new(0)));
        let waker = Waker::from(Arc::clone(&count));
        let (sender, mut receiver) = channel(1);
        let mut context = Context::from_waker(&waker);
        assert!(receiver.poll_recv(&mut context).is_pending());
        sender.send(event(7));
        assert_eq!(count.0.load(Ordering::SeqCst), 1);
        assert_eq!(
            receiver.poll_recv(&mut context),
            Poll::Ready(Some(event(7)))
        );
    }
}
