//! Which connections are taken: so many in all and by address, and a reserve beyond them on which `/health` alone is answered.

use std::collections::{HashMap, VecDeque};
use std::fmt::{self, Display};
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::extract::Request;
use axum::middleware::Next;
use axum::response::Response;
use tokio::task::AbortHandle;

use crate::error::ApiError;

/// What one connection may take of the server's time and room.
#[derive(Debug, Clone, Copy)]
pub struct ConnectionLimits {
    /// Connections at once.
    pub in_all: usize,
    /// Connections at once from one address; the addresses of an IPv6 network (/64) count as one, for whoever has one of them has all.
    pub by_address: usize,
    /// Connections beyond these, on which `/health` alone is answered; the newest takes the oldest's place.
    pub reserve: usize,
    /// How long a request's headers may take, from the opening or from the answer before; an idle connection is closed as well.
    pub header_time: Duration,
    /// Bytes of a request's headers, its first line counted in.
    pub header_bytes: usize,
    /// How long nothing more may be written for a reader. TCP tells of what it took in steps (a third of the send buffer, half of its window), so that
    /// one of 2 KB/s is heard of once a minute.
    pub stall_time: Duration,
}

impl Default for ConnectionLimits {
    fn default() -> Self {
        // Well below the 1,024 descriptors that a process has by default.
        ConnectionLimits {
            in_all: 512,
            by_address: 128,
            reserve: 32,
            header_time: Duration::from_secs(10),
            header_bytes: 16 << 10,
            stall_time: Duration::from_secs(180),
        }
    }
}

/// Who asks, as far as the connection tells; among the extensions of every request that came over one.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Caller {
    /// As [`network`] gives it.
    pub network: IpAddr,
    /// Which cap the connection is beyond, if it is.
    pub crowd: Option<Crowd>,
}

/// Which cap on connections is reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Crowd {
    InAll,
    ByAddress,
}

impl Display for Crowd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Crowd::InAll => "at this server",
            Crowd::ByAddress => "from this address",
        })
    }
}

/// What addresses are told apart by: an IPv4 address, an IPv6 network of 64 bits.
pub(crate) fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) if !address.is_loopback() => {
            let host_bits = u128::from(u64::MAX);
            IpAddr::V6(Ipv6Addr::from_bits(address.to_bits() & !host_bits))
        }
        address => address,
    }
}

/// Lets nothing but `/health` through where the connection is beyond a cap.
pub(crate) async fn turn_away(request: Request, next: Next) -> Result<Response, ApiError> {
    let crowd = request
        .extensions()
        .get::<Caller>()
        .and_then(|caller| caller.crowd);
    match crowd {
        Some(crowd) if request.uri().path() != "/health" => Err(ApiError::Crowd(crowd)),
        _ => Ok(next.run(request).await),
    }
}

/// The connections that are open within the caps.
#[derive(Debug)]
pub(crate) struct Seats {
    in_all: usize,
    by_address: usize,
    /// How many each network has; none that has none.
    taken: Arc<Mutex<HashMap<IpAddr, usize>>>,
}

/// A connection's place within the caps, until it is dropped.
#[derive(Debug)]
pub(crate) struct Seat {
    network: IpAddr,
    taken: Arc<Mutex<HashMap<IpAddr, usize>>>,
}

impl Seats {
    pub fn new(limits: &ConnectionLimits) -> Self {
        Seats {
            in_all: limits.in_all,
            by_address: limits.by_address,
            taken: Arc::default(),
        }
    }

    /// A place for a connection from `network`, or the cap that leaves none.
    pub fn take(&self, network: IpAddr) -> Result<Seat, Crowd> {
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        if taken.get(&network).is_some_and(|n| *n >= self.by_address) {
            return Err(Crowd::ByAddress);
        }
        if taken.values().sum::<usize>() >= self.in_all {
            return Err(Crowd::InAll);
        }
        *taken.entry(network).or_insert(0) += 1;
        Ok(Seat {
            network,
            taken: Arc::clone(&self.taken),
        })
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(n) = taken.get_mut(&self.network) {
            *n -= 1;
            if *n == 0 {
                taken.remove(&self.network);
            }
        }
    }
}

/// The connections beyond the caps: few, and none that a crowd of idle ones could hold against a new one.
#[derive(Debug)]
pub(crate) struct Reserve {
    limit: usize,
    /// Oldest first.
    tasks: VecDeque<AbortHandle>,
}

impl Reserve {
    pub fn new(limits: &ConnectionLimits) -> Self {
        Reserve {
            limit: limits.reserve,
            tasks: VecDeque::new(),
        }
    }

    /// Adds a connection's task, ending the oldest where there are too many. An answer here takes no time: what lingers is idle.
    pub fn add(&mut self, task: AbortHandle) {
        self.tasks.retain(|task| !task.is_finished());
        self.tasks.push_back(task);
        while self.tasks.len() > self.limit {
            if let Some(oldest) = self.tasks.pop_front() {
                oldest.abort();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn addresses_of_one_ipv6_network_are_one() {
        for (address, expect) in [
            ("192.0.2.7", "192.0.2.7"),
            ("::ffff:192.0.2.7", "192.0.2.7"),
            ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::"),
            ("2001:db8:1:2:ffff::", "2001:db8:1:2::"),
            ("2001:db8:1:3::1", "2001:db8:1:3::"),
            ("127.0.0.1", "127.0.0.1"),
            ("::1", "::1"),
        ] {
            assert_eq!(network(ip(address)), ip(expect), "{address}");
        }
    }

    #[test]
    fn seats_are_counted_in_all_and_by_address_and_come_back() {
        let seats = Seats::new(&ConnectionLimits {
            in_all: 3,
            by_address: 2,
            ..ConnectionLimits::default()
        });
        let (here, there) = (ip("192.0.2.1"), ip("192.0.2.2"));
        let first = seats.take(here).unwrap();
        let _second = seats.take(here).unwrap();
        assert_eq!(seats.take(here).unwrap_err(), Crowd::ByAddress);
        let _third = seats.take(there).unwrap();
        assert_eq!(seats.take(there).unwrap_err(), Crowd::InAll);
        drop(first);
        assert!(seats.take(there).is_ok());
        assert!(seats.take(here).is_ok());
        assert_eq!(seats.taken.lock().unwrap().values().sum::<usize>(), 2);
    }

    #[tokio::test]
    async fn newest_of_the_reserve_takes_the_oldests_place() {
        let mut reserve = Reserve::new(&ConnectionLimits {
            reserve: 2,
            ..ConnectionLimits::default()
        });
        let mut tasks = Vec::new();
        for _ in 0..3 {
            let task = tokio::spawn(std::future::pending::<()>());
            reserve.add(task.abort_handle());
            tasks.push(task);
        }
        let oldest = tasks.remove(0);
        assert!(oldest.await.unwrap_err().is_cancelled());
        // One that ended by itself leaves its place to nobody's cost.
        tasks[0].abort();
        assert!(tasks.remove(0).await.unwrap_err().is_cancelled());
        let newest = tokio::spawn(std::future::pending::<()>());
        reserve.add(newest.abort_handle());
        tokio::task::yield_now().await;
        assert!(!tasks[0].is_finished() && !newest.is_finished());
    }
}
