//! A ring of buffers on a GPU through which host memory is streamed: while kernels work on one slot, others are filled and emptied,
//! each by a stream of its own, so that copies run in both directions at once and beside everything else.

use std::ops::Range;

use cudarc::driver::{result, sys};

use super::{Buffer, Cuda, Pinned, check};
use crate::Result;

/// Streams for copies alone.
pub(super) struct Copies {
    pub up: sys::CUstream,
    pub down: sys::CUstream,
}

impl Copies {
    pub fn new() -> Result<Copies> {
        let create = || {
            check(
                "create stream",
                result::stream::create(result::stream::StreamKind::NonBlocking),
            )
        };
        Ok(Copies {
            up: create()?,
            down: create()?,
        })
    }
}

/// Slots for pieces of host memory, each of several parts.
#[derive(Debug)]
pub struct Ring {
    buffer: Buffer,
    n_parts: usize,
    part_bytes: usize,
    slots: Vec<Slot>,
}

/// When the last piece in a slot was there, was worked on, was fetched.
#[derive(Debug)]
struct Slot {
    uploaded: Event,
    computed: Event,
    downloaded: Event,
}

impl Ring {
    /// # Errors
    /// [`crate::Error::OutOfMemory`], [`crate::Error::OverLimit`].
    pub fn new(cuda: Cuda, n_slots: usize, n_parts: usize, part_bytes: usize) -> Result<Ring> {
        let slot = |_| {
            Ok(Slot {
                uploaded: Event::new(cuda)?,
                computed: Event::new(cuda)?,
                downloaded: Event::new(cuda)?,
            })
        };
        Ok(Ring {
            buffer: Buffer::new(cuda, Ring::bytes(n_slots, n_parts, part_bytes))?,
            n_parts,
            part_bytes,
            slots: (0..n_slots).map(slot).collect::<Result<_>>()?,
        })
    }

    /// Bytes of the buffer of [`Ring::new`].
    pub fn bytes(n_slots: usize, n_parts: usize, part_bytes: usize) -> usize {
        n_slots * n_parts * part_bytes.next_multiple_of(256)
    }

    /// The GPU that it lies on.
    pub fn cuda(&self) -> Cuda {
        self.buffer.cuda()
    }

    /// Pieces that it holds at a time.
    pub fn n_slots(&self) -> usize {
        self.slots.len()
    }

    /// Address of a part of piece `number`.
    pub(crate) fn pointer(&self, number: usize, part: usize) -> u64 {
        let place = number % self.slots.len() * self.n_parts + part;
        self.buffer.pointer() + (place * self.part_bytes.next_multiple_of(256)) as u64
    }

    /// Queues the way of piece `number` to its slot, after what the slot held before has been fetched. `parts`: memory and the range
    /// of its bytes.
    pub(crate) fn upload(&self, number: usize, parts: &[(&Pinned, Range<usize>)]) -> Result<()> {
        let slot = self.slot(number);
        slot.downloaded.await_by(self.cuda().copies().up)?;
        for (part, (pinned, range)) in parts.iter().enumerate() {
            self.check(part, range);
            pinned.upload(range.start, range.len(), self.pointer(number, part))?;
        }
        slot.uploaded.record(self.cuda().copies().up)
    }

    /// Runs `queue`, which queues the kernels that work on piece `number`, between its upload and what comes next.
    pub(crate) fn compute(&self, number: usize, queue: impl FnOnce() -> Result<()>) -> Result<()> {
        let slot = self.slot(number);
        slot.uploaded.await_by(self.cuda().stream())?;
        queue()?;
        slot.computed.record(self.cuda().stream())
    }

    /// Queues the way of piece `number` back, after its kernels; `parts` as in [`Ring::upload`].
    pub(crate) fn download(
        &self,
        number: usize,
        parts: &mut [(&mut Pinned, Range<usize>)],
    ) -> Result<()> {
        let slot = self.slot(number);
        slot.computed.await_by(self.cuda().copies().down)?;
        for (part, (pinned, range)) in parts.iter_mut().enumerate() {
            self.check(part, range);
            pinned.download(range.start, range.len(), self.pointer(number, part))?;
        }
        slot.downloaded.record(self.cuda().copies().down)
    }

    fn check(&self, part: usize, range: &Range<usize>) {
        assert!(part < self.n_parts, "more parts than a slot has");
        assert!(range.len() <= self.part_bytes, "a part beyond its place");
    }

    fn slot(&self, number: usize) -> &Slot {
        &self.slots[number % self.slots.len()]
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        // The buffer must outlive the copies; a GPU that is gone makes none.
        let _ = self.cuda().settle_copies();
    }
}

/// A place in a stream that others wait for. Waiting for one that was never recorded waits for nothing.
#[derive(Debug)]
struct Event {
    cuda: Cuda,
    event: sys::CUevent,
}

// SAFETY: the handle is an opaque name that the driver lets any thread use.
unsafe impl Send for Event {}

impl Event {
    fn new(cuda: Cuda) -> Result<Event> {
        cuda.bind()?;
        let event = result::event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING);
        Ok(Event {
            cuda,
            event: check("create event", event)?,
        })
    }

    fn record(&self, stream: sys::CUstream) -> Result<()> {
        self.cuda.bind()?;
        // SAFETY: event and stream are alive.
        check("record event", unsafe {
            result::event::record(self.event, stream)
        })
    }

    fn await_by(&self, stream: sys::CUstream) -> Result<()> {
        self.cuda.bind()?;
        let flags = sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
        // SAFETY: as above.
        check("wait for event", unsafe {
            result::stream::wait_event(stream, self.event, flags)
        })
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: created in `new`, destroyed once; the driver frees it once it is reached.
        let _ = unsafe { result::event::destroy(self.event) };
    }
}
