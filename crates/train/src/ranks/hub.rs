//! The connections of a run: every rank to rank 0, kept open from the rendezvous to the end, so that a rank that fails, dies or
//! falls silent is known everywhere within moments.
//!
//! ```text
//! frame   kind: u8, length: u64 (little endian), bytes
//! kind    0 data   1 heartbeat   2 failed: rank u32, text   3 bye
//! ```

use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::thread;
use std::time::{Duration, Instant};

use super::Limits;
use crate::error::{Error, Result};

pub(super) const DATA: u8 = 0;
const HEARTBEAT: u8 = 1;
pub(super) const FAILED: u8 = 2;
const BYE: u8 = 3;
/// Frames of a connection that wait to be taken; a faster sender waits.
const INBOX_FRAMES: usize = 4;
/// How often a rank that waits looks whether another failed.
const POLL_INTERVAL: Duration = Duration::from_millis(20);
/// How long a rank that failed stays to be heard.
const FAILURE_LINGER: Duration = Duration::from_secs(2);

/// A rank that failed, and how.
#[derive(Debug, Clone)]
pub struct Failure {
    /// Its number.
    pub rank: usize,
    /// What happened, for people.
    pub what: String,
}

impl From<Failure> for Error {
    fn from(failure: Failure) -> Error {
        Error::Rank {
            rank: failure.rank,
            what: failure.what,
        }
    }
}

/// This rank's connections: rank 0 has one to every other, the others have one to rank 0.
#[derive(Debug)]
pub struct Hub {
    shared: Arc<Shared>,
    /// What arrived, by connection.
    inboxes: Vec<Mutex<Receiver<Vec<u8>>>>,
    limits: Limits,
}

/// What the threads of the connections share.
#[derive(Debug)]
struct Shared {
    rank: usize,
    links: Vec<Link>,
    failure: Mutex<Option<Failure>>,
    failed: AtomicBool,
    /// Connections on which something may still arrive.
    open: AtomicUsize,
}

#[derive(Debug)]
struct Link {
    peer: usize,
    stream: TcpStream,
    writer: Mutex<()>,
}

impl Hub {
    /// Takes over connections to `peers`, in the order of their ranks.
    ///
    /// # Errors
    /// A connection that does not take its settings.
    pub fn new(rank: usize, peers: Vec<(usize, TcpStream)>, limits: Limits) -> io::Result<Hub> {
        let mut links = Vec::new();
        let mut readers = Vec::new();
        for (peer, stream) in peers {
            stream.set_nodelay(true)?;
            stream.set_read_timeout(Some(limits.silence))?;
            stream.set_write_timeout(Some(limits.collective))?;
            readers.push((peer, stream.try_clone()?));
            links.push(Link {
                peer,
                stream,
                writer: Mutex::new(()),
            });
        }
        let shared = Arc::new(Shared {
            rank,
            open: AtomicUsize::new(links.len()),
            links,
            failure: Mutex::new(None),
            failed: AtomicBool::new(false),
        });
        let mut inboxes = Vec::new();
        for (link_idx, (peer, stream)) in readers.into_iter().enumerate() {
            let (sender, inbox) = sync_channel(INBOX_FRAMES);
            inboxes.push(Mutex::new(inbox));
            let reader = Arc::clone(&shared);
            thread::Builder::new()
                .name(format!("from rank {peer}"))
                .spawn(move || reader.listen(peer, stream, &sender))?;
            let weak = Arc::downgrade(&shared);
            thread::Builder::new()
                .name(format!("heartbeat for rank {peer}"))
                .spawn(move || send_heartbeats(&weak, link_idx, limits.heartbeat))?;
        }
        Ok(Hub {
            shared,
            inboxes,
            limits,
        })
    }

    /// Sends bytes to `peer`.
    ///
    /// # Errors
    /// [`Error::Rank`] if it, or any rank, is gone.
    pub fn send(&self, peer: usize, bytes: &[u8]) -> Result<()> {
        self.check()?;
        let link = &self.shared.links[self.link_idx(peer)];
        if let Err(error) = link.write(DATA, bytes) {
            self.shared
                .fail(peer, format!("its connection broke: {error}"));
            return self.check();
        }
        Ok(())
    }

    /// The next bytes from `peer`.
    ///
    /// # Errors
    /// [`Error::Rank`] if it, or any rank, is gone, or does not send within the limit.
    pub fn receive(&self, peer: usize) -> Result<Vec<u8>> {
        let inbox = self.inboxes[self.link_idx(peer)]
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let started = Instant::now();
        loop {
            match inbox.recv_timeout(POLL_INTERVAL) {
                Ok(bytes) => return Ok(bytes),
                Err(RecvTimeoutError::Timeout) if started.elapsed() < self.limits.collective => {
                    self.check()?;
                }
                Err(RecvTimeoutError::Timeout) => {
                    let limit = self.limits.collective.as_secs_f64();
                    let what = format!("the others have waited {limit:.0} s for it");
                    self.shared.fail(peer, what);
                    self.check()?;
                }
                Err(RecvTimeoutError::Disconnected) => {
                    let what = "it ended before the others".to_owned();
                    self.shared.fail(peer, what);
                    self.check()?;
                }
            }
        }
    }

    /// Whether no rank has failed, as far as is known here.
    pub fn is_whole(&self) -> bool {
        !self.shared.failed.load(Ordering::Acquire)
    }

    /// Whether no rank has failed, as an error that says which and how.
    ///
    /// # Errors
    /// [`Error::Rank`] with the first failure that became known.
    pub fn check(&self) -> Result<()> {
        match self.is_whole() {
            true => Ok(()),
            false => match self.shared.first_failure() {
                Some(failure) => Err(failure.into()),
                None => Ok(()),
            },
        }
    }

    /// Tells all ranks that this one failed, unless they know of a failure already, and stays until they have heard it.
    pub fn fail(&self, what: &str) {
        let shared = &self.shared;
        let what = what.to_owned();
        match shared.rank {
            0 => shared.fail(0, what),
            rank => {
                if self.is_whole() {
                    shared.tell(&Failure { rank, what });
                }
            }
        }
        self.end();
        let started = Instant::now();
        while shared.open.load(Ordering::Acquire) > 0 && started.elapsed() < FAILURE_LINGER {
            thread::sleep(POLL_INTERVAL);
        }
    }

    /// Ends this rank's part in good order.
    pub fn leave(&self) {
        for link in &self.shared.links {
            let _ = link.write(BYE, &[]);
        }
        self.end();
    }

    fn end(&self) {
        for link in &self.shared.links {
            let _ = link.stream.shutdown(Shutdown::Write);
        }
    }

    fn link_idx(&self, peer: usize) -> usize {
        match self.shared.rank {
            0 => peer - 1,
            _ => {
                assert_eq!(peer, 0, "ranks speak through rank 0");
                0
            }
        }
    }
}

impl Drop for Hub {
    /// Ends the threads; ranks that were not told goodbye take it for a failure.
    fn drop(&mut self) {
        // The others are not the ones that end now: nothing must be told of them while the connections go one by one.
        self.shared.close();
        for link in &self.shared.links {
            let _ = link.stream.shutdown(Shutdown::Both);
        }
    }
}

impl Link {
    fn write(&self, kind: u8, bytes: &[u8]) -> io::Result<()> {
        let _one_at_a_time = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
        write_frame(&self.stream, kind, bytes)
    }
}

impl Shared {
    /// Takes what `peer` sends until it says goodbye, fails, or is gone.
    fn listen(&self, peer: usize, stream: TcpStream, inbox: &SyncSender<Vec<u8>>) {
        let mut stream = stream;
        loop {
            match read_frame(&mut stream) {
                Ok((DATA, bytes)) => {
                    if inbox.send(bytes).is_err() {
                        break;
                    }
                }
                Ok((HEARTBEAT, _)) => {}
                Ok((BYE, _)) => break,
                Ok((FAILED, bytes)) => {
                    let (rank, what) = bytes.split_at(bytes.len().min(4));
                    let rank = rank
                        .try_into()
                        .map_or(peer, |le| u32::from_le_bytes(le) as usize);
                    self.fail(rank, String::from_utf8_lossy(what).into_owned());
                    break;
                }
                Ok((kind, _)) => {
                    self.fail(peer, format!("it sent a frame of unknown kind {kind}"));
                    break;
                }
                Err(error) => {
                    self.fail(peer, silence(&error));
                    break;
                }
            }
        }
        self.open.fetch_sub(1, Ordering::AcqRel);
    }

    /// Remembers the first failure; rank 0 tells it on.
    fn fail(&self, rank: usize, what: String) {
        let failure = Failure { rank, what };
        {
            let mut first = self.failure.lock().unwrap_or_else(PoisonError::into_inner);
            if first.is_some() {
                return;
            }
            *first = Some(failure.clone());
        }
        self.failed.store(true, Ordering::Release);
        if self.rank == 0 {
            self.tell(&failure);
        }
    }

    /// From now on this process takes nothing for a failure of another.
    fn close(&self) {
        let mut first = self.failure.lock().unwrap_or_else(PoisonError::into_inner);
        first.get_or_insert_with(|| Failure {
            rank: self.rank,
            what: "it ended".to_owned(),
        });
    }

    fn tell(&self, failure: &Failure) {
        let mut bytes = (failure.rank as u32).to_le_bytes().to_vec();
        bytes.extend_from_slice(failure.what.as_bytes());
        for link in &self.links {
            if link.peer != failure.rank {
                // Whoever cannot be told notices by itself that this connection ends.
                let _ = link.write(FAILED, &bytes);
            }
        }
    }

    fn first_failure(&self) -> Option<Failure> {
        self.failure
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }
}

/// Says again and again that this process lives, whatever its main thread does.
fn send_heartbeats(shared: &Weak<Shared>, link_idx: usize, pause: Duration) {
    loop {
        thread::sleep(pause);
        let Some(shared) = shared.upgrade() else {
            return;
        };
        if shared.links[link_idx].write(HEARTBEAT, &[]).is_err() {
            return;
        }
    }
}

/// What an error of a connection says about the process at its other end.
fn silence(error: &io::Error) -> String {
    match error.kind() {
        ErrorKind::WouldBlock | ErrorKind::TimedOut => {
            "nothing was heard of it any more: its host or the network is down, or it was stopped"
                .to_owned()
        }
        ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset | ErrorKind::ConnectionAborted => {
            "it ended without a word (killed, or out of memory?)".to_owned()
        }
        _ => format!("its connection broke: {error}"),
    }
}

pub(super) fn write_frame(mut stream: &TcpStream, kind: u8, bytes: &[u8]) -> io::Result<()> {
    let mut head = [kind; 9];
    head[1..].copy_from_slice(&(bytes.len() as u64).to_le_bytes());
    stream.write_all(&head)?;
    stream.write_all(bytes)
}

/// Kind and bytes.
pub(super) fn read_frame(stream: &mut TcpStream) -> io::Result<(u8, Vec<u8>)> {
    let mut head = [0; 9];
    stream.read_exact(&mut head)?;
    let [kind, length @ ..] = head;
    let length = u64::from_le_bytes(length);
    let mut bytes = Vec::new();
    let read = stream.take(length).read_to_end(&mut bytes)?;
    if (read as u64) < length {
        return Err(ErrorKind::UnexpectedEof.into());
    }
    Ok((kind, bytes))
}
