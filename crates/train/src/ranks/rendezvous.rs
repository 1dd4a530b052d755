//! The rendezvous: rank 0 listens, the others connect, and each side makes sure that the other is the one it looks for.
//!
//! ```text
//! from the rank that connects   "cyrene ranks 1\n", rank u32, ranks u32, length u32, text on what is run
//! from rank 0                   "cyrene ranks 1\n", 0: admitted | 1: refused, length u32, why
//! ```

use std::io::{self, ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::thread;
use std::time::{Duration, Instant};

use super::Limits;
use super::hub::{DATA, FAILED, Hub, read_frame, write_frame};
use crate::error::{Error, Result};

/// First bytes of both sides of a handshake.
const MAGIC: &[u8; 15] = b"cyrene ranks 1\n";
/// How long one side waits for the other's part of the handshake, which is sent at once.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);
/// Between two looks whether somebody connects, or listens.
const RETRY_INTERVAL: Duration = Duration::from_millis(50);
/// Most bytes of a text.
const TEXT_LIMIT: u32 = 1 << 12;

/// A rank's place in a run, and where rank 0 listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// This process's number, from 0.
    pub rank: usize,
    /// How many processes train together.
    pub n_ranks: usize,
    /// Name or address of rank 0's host.
    pub host: String,
    /// Ports of that host that rank 0 tries, in this order; the others look at all of them.
    pub ports: Vec<u16>,
    /// What is run, in a text that is the same for all ranks: another run on the same port is not taken for this one.
    pub run: String,
}

impl Place {
    fn describe(&self) -> String {
        let ports: Vec<String> = self.ports.iter().map(u16::to_string).collect();
        format!("{}:{}", self.host, ports.join(" or "))
    }
}

/// Connects all ranks of a run; returns when every one has joined.
///
/// # Errors
/// [`Error::Rendezvous`] with which rank did not join in time, or why rank 0 could not be reached.
pub fn rendezvous(place: &Place, limits: Limits) -> Result<Hub> {
    assert!(place.rank < place.n_ranks, "ranks count from 0");
    let peers = match (place.rank, place.n_ranks) {
        (_, 1) => Vec::new(),
        (0, _) => accept_all(place, limits)?,
        _ => vec![(0, connect_to_first(place, limits)?)],
    };
    Hub::new(place.rank, peers, limits).map_err(|error| failed(place, error.to_string()))
}

fn failed(place: &Place, what: String) -> Error {
    Error::Rendezvous {
        rank: place.rank,
        n_ranks: place.n_ranks,
        place: place.describe(),
        what,
    }
}

/// Rank 0: one connection to every other rank.
fn accept_all(place: &Place, limits: Limits) -> Result<Vec<(usize, TcpStream)>> {
    let listener = listen(place)?;
    let started = Instant::now();
    let mut joined: Vec<Option<TcpStream>> = (1..place.n_ranks).map(|_| None).collect();
    while joined.iter().any(Option::is_none) {
        if started.elapsed() >= limits.rendezvous {
            let missing: Vec<String> = (1..place.n_ranks)
                .filter(|rank| joined[rank - 1].is_none())
                .map(|rank| rank.to_string())
                .collect();
            let what = format!(
                "rank {} of {} did not come within {:.0} s; its own log says why, if it was started at all",
                missing.join(", "),
                place.n_ranks,
                limits.rendezvous.as_secs_f64()
            );
            // Those that joined wait for an answer: the failure is theirs too.
            let peers = (1..place.n_ranks).zip(joined);
            let peers = peers.filter_map(|(rank, stream)| Some((rank, stream?)));
            for (_, stream) in peers {
                let _ = write_frame(&stream, FAILED, what.as_bytes());
            }
            return Err(failed(place, what));
        }
        match listener.accept() {
            Ok((stream, _)) => {
                // A stranger, or one who went away again, is not waited for.
                if let Ok(Some((rank, stream))) = admit(place, &joined, stream) {
                    joined[rank - 1] = Some(stream);
                }
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => thread::sleep(RETRY_INTERVAL),
            Err(error) => return Err(failed(place, format!("listening: {error}"))),
        }
    }
    let mut peers = Vec::new();
    for (rank, stream) in (1..place.n_ranks).zip(joined) {
        if let Some(stream) = stream {
            // One that is gone again is noticed by the hub.
            let _ = write_frame(&stream, DATA, &[]);
            peers.push((rank, stream));
        }
    }
    Ok(peers)
}

/// The first free port of the place, on all addresses of this host unless the place is one of its own to itself.
fn listen(place: &Place) -> Result<TcpListener> {
    let only_here = place.host == "localhost"
        || (place.host.parse::<IpAddr>()).is_ok_and(|address| address.is_loopback());
    let addresses: &[IpAddr] = match only_here {
        true if place.host.contains(':') => &[IpAddr::V6(Ipv6Addr::LOCALHOST)],
        true => &[IpAddr::V4(Ipv4Addr::LOCALHOST)],
        // On Windows each takes its own kind alone; elsewhere the first takes both, where there is IPv6.
        false if cfg!(windows) => &[IpAddr::V4(Ipv4Addr::UNSPECIFIED)],
        false => &[
            IpAddr::V6(Ipv6Addr::UNSPECIFIED),
            IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        ],
    };
    let mut last = None;
    for port in &place.ports {
        for address in addresses {
            match TcpListener::bind((*address, *port)) {
                Ok(listener) => {
                    return listener
                        .set_nonblocking(true)
                        .map(|()| listener)
                        .map_err(|error| failed(place, error.to_string()));
                }
                Err(error) => last = Some(format!("port {port}: {error}")),
            }
        }
    }
    let why = last.unwrap_or_else(|| "no port was given".to_owned());
    Err(failed(
        place,
        format!("no port is free to listen on ({why}); give another MASTER_PORT"),
    ))
}

/// Reads a rank's part of the handshake and answers it; None for one that is refused.
fn admit(
    place: &Place,
    joined: &[Option<TcpStream>],
    mut stream: TcpStream,
) -> io::Result<Option<(usize, TcpStream)>> {
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(HANDSHAKE_TIMEOUT))?;
    stream.set_write_timeout(Some(HANDSHAKE_TIMEOUT))?;
    let mut magic = [0; MAGIC.len()];
    stream.read_exact(&mut magic)?;
    if magic != *MAGIC {
        return Ok(None);
    }
    let rank = read_u32(&mut stream)? as usize;
    let n_ranks = read_u32(&mut stream)? as usize;
    let run = read_text(&mut stream)?;
    let no = if n_ranks != place.n_ranks {
        format!(
            "it counts {n_ranks} ranks, rank 0 {}: start all with one WORLD_SIZE",
            place.n_ranks
        )
    } else if run != place.run {
        format!(
            "it runs {run}, rank 0 {}: start all with one recipe and one version of cyrene, and give every run its own MASTER_PORT",
            place.run
        )
    } else if rank == 0 || rank >= n_ranks {
        format!("there is no place for rank {rank} beside rank 0 of {n_ranks}")
    } else if joined[rank - 1].is_some() {
        format!("rank {rank} came twice: give every process its own RANK")
    } else {
        stream.write_all(MAGIC)?;
        stream.write_all(&[0])?;
        return Ok(Some((rank, stream)));
    };
    stream.write_all(MAGIC)?;
    stream.write_all(&[1])?;
    write_text(&mut stream, &no)?;
    Ok(None)
}

/// Another rank: its connection to rank 0.
fn connect_to_first(place: &Place, limits: Limits) -> Result<TcpStream> {
    let started = Instant::now();
    let mut last = String::new();
    while started.elapsed() < limits.rendezvous {
        for port in &place.ports {
            match handshake(place, *port) {
                Ok(Answer::Admitted(stream)) => return wait_for_all(place, stream, limits),
                Ok(Answer::Refused(why)) => return Err(failed(place, why)),
                Err(error) => last = format!("port {port}: {error}"),
            }
        }
        thread::sleep(RETRY_INTERVAL);
    }
    Err(failed(
        place,
        format!(
            "rank 0 was not there within {:.0} s ({last}); see that MASTER_ADDR names the host of rank 0 and that its ports are open",
            limits.rendezvous.as_secs_f64()
        ),
    ))
}

/// Waits until rank 0 says that every rank has joined.
fn wait_for_all(place: &Place, mut stream: TcpStream, limits: Limits) -> Result<TcpStream> {
    let answer = stream
        .set_read_timeout(Some(limits.rendezvous + HANDSHAKE_TIMEOUT))
        .and_then(|()| read_frame(&mut stream));
    match answer {
        Ok((DATA, _)) => Ok(stream),
        Ok((_, why)) => Err(failed(place, String::from_utf8_lossy(&why).into_owned())),
        Err(error) => Err(failed(
            place,
            format!("rank 0 went away before all ranks had come ({error}); its own log says why"),
        )),
    }
}

/// What rank 0 says to a rank that connects.
enum Answer {
    Admitted(TcpStream),
    Refused(String),
}

fn handshake(place: &Place, port: u16) -> io::Result<Answer> {
    let addresses = (place.host.as_str(), port).to_socket_addrs()?;
    let mut stream = connect(addresses)?;
    stream.set_read_timeout(Some(HANDSHAKE_TIMEOUT))?;
    stream.set_write_timeout(Some(HANDSHAKE_TIMEOUT))?;
    stream.write_all(MAGIC)?;
    stream.write_all(&(place.rank as u32).to_le_bytes())?;
    stream.write_all(&(place.n_ranks as u32).to_le_bytes())?;
    write_text(&mut stream, &place.run)?;
    let mut magic = [0; MAGIC.len()];
    stream.read_exact(&mut magic)?;
    if magic != *MAGIC {
        return Err(io::Error::new(
            ErrorKind::InvalidData,
            "another program answers there",
        ));
    }
    let mut answer = [0];
    stream.read_exact(&mut answer)?;
    match answer {
        [0] => Ok(Answer::Admitted(stream)),
        _ => Ok(Answer::Refused(read_text(&mut stream)?)),
    }
}

fn connect(addresses: impl Iterator<Item = SocketAddr>) -> io::Result<TcpStream> {
    let mut last = io::Error::new(ErrorKind::NotFound, "the host has no address");
    for address in addresses {
        match TcpStream::connect_timeout(&address, HANDSHAKE_TIMEOUT) {
            Ok(stream) => return Ok(stream),
            Err(error) => last = error,
        }
    }
    Err(last)
}

fn read_u32(stream: &mut TcpStream) -> io::Result<u32> {
    let mut bytes = [0; 4];
    stream.read_exact(&mut bytes)?;
    Ok(u32::from_le_bytes(bytes))
}

fn read_text(stream: &mut TcpStream) -> io::Result<String> {
    let length = read_u32(stream)?.min(TEXT_LIMIT);
    let mut bytes = vec![0; length as usize];
    stream.read_exact(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

fn write_text(stream: &mut TcpStream, text: &str) -> io::Result<()> {
    let bytes = &text.as_bytes()[..text.len().min(TEXT_LIMIT as usize)];
    stream.write_all(&(bytes.len() as u32).to_le_bytes())?;
    stream.write_all(bytes)
}
