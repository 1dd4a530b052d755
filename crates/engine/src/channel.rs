//! A bounded channel of events that can be read by a thread or polled by a future, and that knows when its reader has left.
//! The standard library's channel can do neither of the last two, and this crate brings no async runtime.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use crate::request::Event;

/// The reading end. Dropping it cancels the request.
#[derive(Debug)]
pub struct EventReceiver {
    shared: Arc<Shared>,
}

/// The writing end, held by the scheduler; dropping it ends the stream.
#[derive(Debug)]
pub(crate) struct EventSender {
    shared: Arc<Shared>,
    capacity: usize,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    ready: Condvar,
}

#[derive(Debug, Default)]
struct State {
    events: VecDeque<Event>,
    sender_gone: bool,
    receiver_gone: bool,
    waker: Option<Waker>,
}

/// Both ends of a channel that asks its writer to pause at `capacity` unread events.
pub(crate) fn channel(capacity: usize) -> (EventSender, EventReceiver) {
    let shared = Arc::new(Shared::default());
    let sender = EventSender {
        shared: Arc::clone(&shared),
        capacity,
    };
    (sender, EventReceiver { shared })
}

impl EventReceiver {
    /// Waits for the next event; `None` when no more will come.
    pub fn recv(&self) -> Option<Event> {
        let mut state = self.shared.lock();
        loop {
            if let Some(event) = state.events.pop_front() {
                return Some(event);
            }
            if state.sender_gone {
                return None;
            }
            state = self
                .shared
                .ready
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// As [`EventReceiver::recv`], giving up after `timeout` (then also `None`).
    pub fn recv_timeout(&self, timeout: Duration) -> Option<Event> {
        let deadline = Instant::now() + timeout;
        let mut state = self.shared.lock();
        loop {
            if let Some(event) = state.events.pop_front() {
                return Some(event);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if state.sender_gone || left.is_zero() {
                return None;
            }
            state = self
                .shared
                .ready
                .wait_timeout(state, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    /// For futures: the next event, or registers the task to be woken by it.
    pub fn poll_recv(&mut self, context: &mut Context<'_>) -> Poll<Option<Event>> {
        let mut state = self.shared.lock();
        if let Some(event) = state.events.pop_front() {
            return Poll::Ready(Some(event));
        }
        if state.sender_gone {
            return Poll::Ready(None);
        }
        state.waker = Some(context.waker().clone());
        Poll::Pending
    }
}

impl Iterator for EventReceiver {
    type Item = Event;

    fn next(&mut self) -> Option<Event> {
        self.recv()
    }
}

impl Drop for EventReceiver {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        state.receiver_gone = true;
        state.events.clear();
    }
}

impl EventSender {
    /// Whether another token may be sent now.
    pub fn has_room(&self) -> bool {
        self.shared.lock().events.len() < self.capacity
    }

    /// Whether the reader has left.
    pub fn is_closed(&self) -> bool {
        self.shared.lock().receiver_gone
    }

    /// Adds an event; the caller has asked [`EventSender::has_room`] before computing it, and the last event always fits.
    pub fn send(&self, event: Event) {
        let mut state = self.shared.lock();
        if state.receiver_gone {
            return;
        }
        state.events.push_back(event);
        self.shared.notify(state);
    }
}

impl Drop for EventSender {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        state.sender_gone = true;
        self.shared.notify(state);
    }
}

impl Shared {
    /// A panic while the lock was held cannot leave a half-written queue, so poisoning is ignored.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn notify(&self, mut state: MutexGuard<'_, State>) {
        let waker = state.waker.take();
        drop(state);
        self.ready.notify_all();
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::task::Wake;

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
