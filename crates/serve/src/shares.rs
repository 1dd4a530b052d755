//! A share of the engine's queue for each client, so that none fills it for all others.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};

/// Who is told apart from whom in the queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Client {
    /// The key, by its place among several.
    Key(usize),
    /// The address, where no keys tell clients apart.
    Address(IpAddr),
}

impl Client {
    /// By key where there are several, else by address; `None` for this machine's own programs, which have the queue to themselves as far as can be told.
    pub fn of(key: Option<usize>, n_keys: usize, network: Option<IpAddr>) -> Option<Self> {
        match (key, network) {
            (Some(key), _) if n_keys > 1 => Some(Client::Key(key)),
            (_, Some(network)) if !network.is_loopback() => Some(Client::Address(network)),
            _ => None,
        }
    }
}

/// How many replies each client has waiting.
#[derive(Debug, Clone, Default)]
pub(crate) struct Shares {
    waiting: Arc<Mutex<HashMap<Client, usize>>>,
}

/// A reply's place in its client's share, until it is dropped.
#[derive(Debug)]
pub(crate) struct Place {
    client: Client,
    waiting: Arc<Mutex<HashMap<Client, usize>>>,
}

impl Shares {
    /// A place for a reply of `client`, unless `most` of its replies wait already.
    pub fn take(&self, client: Client, most: usize) -> Option<Place> {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        let n = waiting.get(&client).copied().unwrap_or(0);
        if n >= most {
            return None;
        }
        waiting.insert(client, n + 1);
        Some(Place {
            client,
            waiting: Arc::clone(&self.waiting),
        })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(n) = waiting.get_mut(&self.client) {
            *n -= 1;
            if *n == 0 {
                waiting.remove(&self.client);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn share_of_one_client_leaves_the_others_theirs() {
        let shares = Shares::default();
        let places: Vec<Place> = (0..2)
            .map(|_| shares.take(Client::Key(0), 2).unwrap())
            .collect();
        assert!(shares.take(Client::Key(0), 2).is_none());
        let other = shares.take(Client::Key(1), 2);
        assert!(other.is_some());
        drop(places);
        assert!(shares.take(Client::Key(0), 2).is_some());
        drop(other);
        assert!(shares.waiting.lock().unwrap().is_empty());
    }

    #[test]
    fn clients_are_told_apart_by_key_else_by_address() {
        let near = Some(IpAddr::from([127, 0, 0, 1]));
        let far = IpAddr::from([192, 0, 2, 1]);
        assert_eq!(Client::of(Some(1), 2, near), Some(Client::Key(1)));
        assert_eq!(Client::of(Some(1), 2, Some(far)), Some(Client::Key(1)));
        assert_eq!(
            Client::of(Some(0), 1, Some(far)),
            Some(Client::Address(far))
        );
        assert_eq!(Client::of(None, 0, Some(far)), Some(Client::Address(far)));
        assert_eq!(Client::of(Some(0), 1, near), None);
        assert_eq!(Client::of(None, 0, None), None);
    }
}
