//! Reused f32 buffers, one pool a thread, so that ops in a loop do not ask the allocator for fresh pages.

use std::cell::RefCell;

/// Buffers larger than this many elements are given back to the allocator instead of being kept.
const KEEP_ELEMENTS: usize = 8 << 20;
/// Elements of a cache line: where a buffer begins, since vectors that straddle lines cost twice.
const LINE: usize = 16;
/// Buffers kept per thread.
const KEEP_BUFFERS: usize = 16;

thread_local! {
    static POOL: RefCell<Vec<Vec<f32>>> = const { RefCell::new(Vec::new()) };
}

/// Lends a buffer of `n` elements with unspecified contents. Calls may nest: each gets a buffer of its own.
pub(crate) fn with_scratch<R>(n: usize, body: impl FnOnce(&mut [f32]) -> R) -> R {
    let mut buffer = take();
    if buffer.len() < n + LINE {
        buffer.resize(n + LINE, 0.0);
    }
    let start = buffer.as_ptr().align_offset(4 * LINE).min(LINE);
    let result = body(&mut buffer[start..start + n]);
    put(buffer);
    result
}

/// A buffer of any length from the pool, for holders that grow it themselves.
pub(super) fn take() -> Vec<f32> {
    POOL.with_borrow_mut(|pool| pool.pop().unwrap_or_default())
}

pub(super) fn put(buffer: Vec<f32>) {
    if buffer.capacity() <= KEEP_ELEMENTS {
        POOL.with_borrow_mut(|pool| {
            if pool.len() < KEEP_BUFFERS {
                pool.push(buffer);
            }
        });
    }
}
