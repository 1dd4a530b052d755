//! Keys: which one a request brings, and a wait before it is told for an address that has brought wrong ones.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use sha2::{Digest, Sha256};
use tokio::time::Instant;

use crate::error::ApiError;

/// How wrong keys are slowed down, by address (an IPv6 network of 64 bits counts as one).
#[derive(Debug, Clone, Copy)]
pub struct GuessLimits {
    /// Wrong keys that cost nothing: a mistyped one, a page that still has yesterday's.
    pub free: u32,
    /// The wait after the first that does; it doubles with each.
    pub first_wait: Duration,
    /// The longest wait.
    pub most_wait: Duration,
    /// Requests of one address that may wait at once; further ones are turned away.
    pub waiting: usize,
    /// How long an address is remembered after its last wrong key.
    pub forget_after: Duration,
    /// Addresses that are remembered; the one whose wrong key is the oldest makes room.
    pub addresses: usize,
}

impl Default for GuessLimits {
    fn default() -> Self {
        GuessLimits {
            free: 5,
            first_wait: Duration::from_millis(200),
            most_wait: Duration::from_secs(5),
            waiting: 8,
            forget_after: Duration::from_secs(600),
            addresses: 4096,
        }
    }
}

impl GuessLimits {
    /// How long an address waits that has brought `n_wrong` wrong keys.
    fn wait(&self, n_wrong: u32) -> Duration {
        let Some(doublings) = n_wrong.checked_sub(self.free + 1) else {
            return Duration::ZERO;
        };
        let wait = 1u32
            .checked_shl(doublings)
            .and_then(|factor| self.first_wait.checked_mul(factor));
        wait.map_or(self.most_wait, |wait| wait.min(self.most_wait))
    }
}

/// The keys that open the protected routes, and who guessed at them.
#[derive(Debug)]
pub(crate) struct Keys {
    hashes: Vec<[u8; 32]>,
    limits: GuessLimits,
    guessers: Guessers,
}

type Guessers = Arc<Mutex<HashMap<IpAddr, Guesser>>>;

/// An address that has brought a wrong key.
#[derive(Debug)]
struct Guesser {
    n_wrong: u32,
    /// When the last one came.
    last: Instant,
    /// Requests that wait now.
    waiting: usize,
    /// Keys that were right from here: those who share the address with a guesser wait once.
    right: Vec<usize>,
}

impl Guesser {
    /// After the first wrong key.
    fn new() -> Self {
        Guesser {
            n_wrong: 1,
            last: Instant::now(),
            waiting: 0,
            right: Vec::new(),
        }
    }
}

impl Keys {
    pub fn new(keys: &[String], limits: GuessLimits) -> Self {
        Keys {
            hashes: keys.iter().map(|key| hash(key)).collect(),
            limits,
            guessers: Arc::default(),
        }
    }

    /// How many there are; none means that everybody may ask.
    pub fn n_keys(&self) -> usize {
        self.hashes.len()
    }

    /// Which key a request brings, told after the wait that its address is in for; `None` where none is asked for.
    ///
    /// # Errors
    /// [`ApiError::Unauthorized`], or [`ApiError::Guesses`] where too many of the address wait already.
    pub async fn check(
        &self,
        key: Option<[u8; 32]>,
        network: Option<IpAddr>,
    ) -> Result<Option<usize>, ApiError> {
        if self.hashes.is_empty() {
            return Ok(None);
        }
        // Who brings no key guesses nothing.
        let key = key.ok_or(ApiError::Unauthorized)?;
        let index = self.find(key);
        if let Some(network) = network {
            if let Some((wait, _waiting)) = self.wait(network, index)? {
                tokio::time::sleep(wait).await;
            }
            self.remember(network, index);
        }
        index.map(Some).ok_or(ApiError::Unauthorized)
    }

    fn find(&self, key: [u8; 32]) -> Option<usize> {
        // Every key is compared, and each to its end, so that time tells nothing.
        let mut found = None;
        for (index, expected) in self.hashes.iter().enumerate() {
            let difference = expected
                .iter()
                .zip(&key)
                .fold(0u8, |difference, (a, b)| difference | (a ^ b));
            if difference == 0 {
                found = Some(index);
            }
        }
        found
    }

    /// How long a request waits, if it does, and its place among those that wait.
    fn wait(
        &self,
        network: IpAddr,
        index: Option<usize>,
    ) -> Result<Option<(Duration, Waiting)>, ApiError> {
        let mut guessers = lock(&self.guessers);
        let Some(guesser) = guessers.get_mut(&network) else {
            return Ok(None);
        };
        if guesser.last.elapsed() >= self.limits.forget_after && guesser.waiting == 0 {
            guessers.remove(&network);
            return Ok(None);
        }
        let wait = self.limits.wait(guesser.n_wrong);
        let is_known = index.is_some_and(|index| guesser.right.contains(&index));
        if wait.is_zero() || is_known {
            return Ok(None);
        }
        if guesser.waiting >= self.limits.waiting {
            return Err(ApiError::Guesses);
        }
        guesser.waiting += 1;
        let waiting = Waiting {
            guessers: Arc::clone(&self.guessers),
            network,
        };
        Ok(Some((wait, waiting)))
    }

    /// Counts a wrong key, or knows a right one again where its address has brought wrong ones.
    fn remember(&self, network: IpAddr, index: Option<usize>) {
        let mut guessers = lock(&self.guessers);
        let Some(guesser) = guessers.get_mut(&network) else {
            if index.is_none() {
                self.make_room(&mut guessers);
                guessers.insert(network, Guesser::new());
            }
            return;
        };
        match index {
            Some(index) if !guesser.right.contains(&index) => guesser.right.push(index),
            Some(_) => {}
            None => {
                guesser.n_wrong = guesser.n_wrong.saturating_add(1);
                guesser.last = Instant::now();
            }
        }
    }

    fn make_room(&self, guessers: &mut HashMap<IpAddr, Guesser>) {
        if guessers.len() < self.limits.addresses {
            return;
        }
        let oldest = guessers.iter().min_by_key(|(_, guesser)| guesser.last);
        if let Some(network) = oldest.map(|(network, _)| *network) {
            guessers.remove(&network);
        }
    }
}

/// A request that waits, until it is dropped, as it also is where its client leaves.
#[derive(Debug)]
struct Waiting {
    guessers: Guessers,
    network: IpAddr,
}

impl Drop for Waiting {
    fn drop(&mut self) {
        if let Some(guesser) = lock(&self.guessers).get_mut(&self.network) {
            // The address may have been forgotten in between and be counted anew.
            guesser.waiting = guesser.waiting.saturating_sub(1);
        }
    }
}

/// What keys are kept and compared as.
pub(crate) fn hash(key: &str) -> [u8; 32] {
    Sha256::digest(key.as_bytes()).into()
}

fn lock(guessers: &Guessers) -> MutexGuard<'_, HashMap<IpAddr, Guesser>> {
    guessers.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: GuessLimits = GuessLimits {
        free: 2,
        first_wait: Duration::from_secs(1),
        most_wait: Duration::from_secs(5),
        waiting: 2,
        forget_after: Duration::from_secs(600),
        addresses: 2,
    };

    fn keys() -> Keys {
        Keys::new(&["first".to_owned(), "second".to_owned()], LIMITS)
    }

    fn ip(last: u8) -> IpAddr {
        IpAddr::from([192, 0, 2, last])
    }

    /// What becomes of `key`, and the seconds until it is told. Time stands still but for waits.
    async fn check(keys: &Keys, key: &str, last: u8) -> (bool, u64) {
        let started = Instant::now();
        let checked = keys.check(Some(hash(key)), Some(ip(last))).await;
        (checked.is_ok(), started.elapsed().as_secs())
    }

    #[tokio::test(start_paused = true)]
    async fn wrong_keys_wait_ever_longer_and_other_addresses_do_not() {
        let keys = keys();
        let mut waits = Vec::new();
        for _ in 0..8 {
            let (is_right, wait) = check(&keys, "guess", 1).await;
            assert!(!is_right);
            waits.push(wait);
        }
        assert_eq!(waits, [0, 0, 0, 1, 2, 4, 5, 5]);
        assert_eq!(check(&keys, "guess", 2).await, (false, 0));
        assert_eq!(check(&keys, "first", 2).await, (true, 0));
        // A right key tells no sooner than a wrong one, the first time; whoever has it does not wait again.
        assert_eq!(check(&keys, "second", 1).await, (true, 5));
        assert_eq!(check(&keys, "second", 1).await, (true, 0));
        assert_eq!(check(&keys, "first", 1).await, (true, 5));
        assert_eq!(check(&keys, "guess", 1).await, (false, 5));
    }

    #[tokio::test(start_paused = true)]
    async fn address_is_forgotten_after_a_while() {
        let keys = keys();
        for _ in 0..6 {
            check(&keys, "guess", 1).await;
        }
        tokio::time::sleep(LIMITS.forget_after).await;
        assert_eq!(check(&keys, "guess", 1).await, (false, 0));
    }

    #[tokio::test(start_paused = true)]
    async fn guesses_at_once_gain_nothing() {
        let keys = Arc::new(keys());
        for _ in 0..3 {
            check(&keys, "guess", 1).await;
        }
        let waiting: Vec<_> = (0..2)
            .map(|_| {
                let keys = Arc::clone(&keys);
                tokio::spawn(async move { check(&keys, "guess", 1).await })
            })
            .collect();
        tokio::task::yield_now().await;
        let third = keys.check(Some(hash("first")), Some(ip(1))).await;
        assert!(matches!(third, Err(ApiError::Guesses)));
        // Who leaves makes room, and has learnt nothing.
        waiting[0].abort();
        for task in waiting {
            drop(task.await);
        }
        assert_eq!(keys.guessers.lock().unwrap()[&ip(1)].waiting, 0);
        assert_eq!(keys.guessers.lock().unwrap()[&ip(1)].n_wrong, 4);
    }

    #[tokio::test(start_paused = true)]
    async fn table_of_addresses_is_bounded() {
        let keys = keys();
        for last in 0..20 {
            check(&keys, "guess", last).await;
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        let guessers = keys.guessers.lock().unwrap();
        let mut left: Vec<&IpAddr> = guessers.keys().collect();
        left.sort();
        assert_eq!(left, [&ip(18), &ip(19)]);
    }

    #[tokio::test]
    async fn no_key_is_no_guess_and_no_address_no_wait() {
        let keys = keys();
        for _ in 0..20 {
            assert!(keys.check(None, Some(ip(1))).await.is_err());
            assert!(keys.check(Some(hash("guess")), None).await.is_err());
        }
        assert!(keys.guessers.lock().unwrap().is_empty());
        let second = keys.check(Some(hash("second")), None).await;
        assert_eq!(second.ok(), Some(Some(1)));
        let open = Keys::new(&[], LIMITS);
        assert_eq!(open.check(None, Some(ip(1))).await.ok(), Some(None));
    }

    #[test]
    fn waits_grow_to_the_longest_and_stay_there() {
        let limits = GuessLimits::default();
        assert_eq!(limits.wait(limits.free), Duration::ZERO);
        assert_eq!(limits.wait(limits.free + 1), limits.first_wait);
        assert_eq!(limits.wait(limits.free + 2), limits.first_wait * 2);
        for n in [limits.free + 10, limits.free + 40, u32::MAX] {
            assert_eq!(limits.wait(n), limits.most_wait, "{n}");
        }
    }
}
