//! A connection that gives up on a reader that takes nothing of what is written for it, so that a reply does not hold its slot for nobody.

use std::io::{self, ErrorKind, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::Sleep;

/// A stream whose writes fail once the other side has taken no byte for `limit`. Reads are as they were.
#[derive(Debug)]
pub(crate) struct Unstalled<T> {
    stream: T,
    limit: Duration,
    /// Runs while a write waits.
    deadline: Option<Pin<Box<Sleep>>>,
}

impl<T> Unstalled<T> {
    pub fn new(stream: T, limit: Duration) -> Self {
        Unstalled {
            stream,
            limit,
            deadline: None,
        }
    }

    /// `progress` of a write, or the error where there has been none for too long.
    fn within_limit<R>(
        &mut self,
        context: &mut Context<'_>,
        progress: Poll<io::Result<R>>,
    ) -> Poll<io::Result<R>> {
        if progress.is_ready() {
            self.deadline = None;
            return progress;
        }
        let limit = self.limit;
        let deadline = self
            .deadline
            .get_or_insert_with(|| Box::pin(tokio::time::sleep(limit)));
        match deadline.as_mut().poll(context) {
            Poll::Pending => Poll::Pending,
            Poll::Ready(()) => Poll::Ready(Err(io::Error::new(
                ErrorKind::TimedOut,
                "the reader takes nothing",
            ))),
        }
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for Unstalled<T> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Unstalled<T> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let progress = Pin::new(&mut self.stream).poll_write(context, bytes);
        self.within_limit(context, progress)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let progress = Pin::new(&mut self.stream).poll_write_vectored(context, slices);
        self.within_limit(context, progress)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    // A flush of a socket never waits, and so says nothing of the reader.
    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};
    use tokio::time::{Instant, sleep};

    use super::*;

    const LIMIT: Duration = Duration::from_secs(20);

    #[tokio::test(start_paused = true)]
    async fn reader_that_takes_nothing_fails_the_write() {
        let (ours, _theirs) = duplex(4);
        let mut stream = Unstalled::new(ours, LIMIT);
        let started = Instant::now();
        let error = stream.write_all(b"more than four").await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::TimedOut);
        assert!(started.elapsed() >= LIMIT);
    }

    #[tokio::test(start_paused = true)]
    async fn reader_that_is_slow_is_waited_for() {
        let (ours, mut theirs) = duplex(1);
        let mut stream = Unstalled::new(ours, LIMIT);
        let reading = tokio::spawn(async move {
            let mut seen = Vec::new();
            let mut byte = [0];
            // Each byte in time, all of them far beyond it.
            while seen.len() < 14 {
                sleep(LIMIT * 3 / 4).await;
                theirs.read_exact(&mut byte).await.unwrap();
                seen.push(byte[0]);
            }
            seen
        });
        stream.write_all(b"more than four").await.unwrap();
        assert_eq!(reading.await.unwrap(), b"more than four");
    }

    #[tokio::test(start_paused = true)]
    async fn pause_in_which_nothing_is_written_is_no_stall() {
        let (ours, mut theirs) = duplex(64);
        let mut stream = Unstalled::new(ours, LIMIT);
        stream.write_all(b"one").await.unwrap();
        sleep(LIMIT * 2).await;
        stream.write_all(b"two").await.unwrap();
        let mut seen = [0; 6];
        theirs.read_exact(&mut seen).await.unwrap();
        assert_eq!(&seen, b"onetwo");
    }
}
