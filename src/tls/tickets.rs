//! Session tickets that die with the generation that made them.
//!
//! A resumed handshake calls no certificate verifier, so a ticket must not outlive the grounds on which its session was
//! admitted. The generation and the time of issue stand inside the seal; what does not match is no ticket, and the
//! connection falls back to a full handshake. Each configuration has sealing keys of its own besides.

use std::sync::{Arc, Mutex, PoisonError};

use aws_lc_rs::aead::{AES_256_GCM, Aad, Nonce, RandomizedNonceKey};
use aws_lc_rs::rand;
use rustls::server::ProducesTickets;
use zeroize::Zeroizing;

use crate::clock::Clock;

/// How long a ticket may be used, and how long a key seals, seconds.
pub const TICKET_LIFETIME: u32 = 600;

/// Bytes of the random nonce that stand before the sealed part.
const NONCE: usize = 12;

/// Seals tickets for one generation: AES-256-GCM with random nonces, keys that live for the time of one ticket and are
/// forgotten after the time of a second.
pub struct GenerationTicketer {
    generation: u64,
    clock: Clock,
    keys: Mutex<Keys>,
}

struct Keys {
    current: Arc<RandomizedNonceKey>,
    previous: Option<Arc<RandomizedNonceKey>>,
    /// Since when the current one seals, seconds since the Unix epoch.
    since: u64,
}

impl std::fmt::Debug for GenerationTicketer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("GenerationTicketer").field("generation", &self.generation).finish_non_exhaustive()
    }
}

impl GenerationTicketer {
    /// A ticketer with a new random key.
    ///
    /// # Errors
    /// The system gave no random bytes.
    pub fn new(generation: u64, clock: Clock) -> Result<Self, rustls::Error> {
        let current = new_key().ok_or(rustls::Error::FailedToGetRandomBytes)?;
        let since = clock.now();
        Ok(Self { generation, clock, keys: Mutex::new(Keys { current, previous: None, since }) })
    }

    /// The keys of now: a new one if the current has sealed long enough, or if the clock went back behind it.
    fn keys(&self, now: u64) -> (Arc<RandomizedNonceKey>, Option<Arc<RandomizedNonceKey>>) {
        let mut keys = self.keys.lock().unwrap_or_else(PoisonError::into_inner);
        let age = now.checked_sub(keys.since);
        if age.is_none_or(|age| age >= u64::from(TICKET_LIFETIME))
            && let Some(next) = new_key()
        {
            let last = std::mem::replace(&mut keys.current, next);
            keys.previous = age.filter(|age| *age < 2 * u64::from(TICKET_LIFETIME)).map(|_| last);
            keys.since = now;
        }
        (Arc::clone(&keys.current), keys.previous.clone())
    }

    #[cfg(test)]
    fn of_next_generation(&self) -> Self {
        let (current, previous) = self.keys(self.clock.now());
        let since = self.clock.now();
        let keys = Mutex::new(Keys { current, previous, since });
        Self { generation: self.generation + 1, clock: self.clock.clone(), keys }
    }
}

fn new_key() -> Option<Arc<RandomizedNonceKey>> {
    let mut bytes = Zeroizing::new([0; 32]);
    rand::fill(&mut *bytes).ok()?;
    RandomizedNonceKey::new(&AES_256_GCM, &*bytes).ok().map(Arc::new)
}

fn open(key: &RandomizedNonceKey, cipher: &[u8]) -> Option<Zeroizing<Vec<u8>>> {
    let (nonce, sealed) = cipher.split_first_chunk::<NONCE>()?;
    let mut bytes = Zeroizing::new(sealed.to_vec());
    let length = key.open_in_place(Nonce::from(nonce), Aad::empty(), &mut bytes).ok()?.len();
    bytes.truncate(length);
    Some(bytes)
}

impl ProducesTickets for GenerationTicketer {
    fn enabled(&self) -> bool {
        true
    }

    fn lifetime(&self) -> u32 {
        TICKET_LIFETIME
    }

    fn encrypt(&self, plain: &[u8]) -> Option<Vec<u8>> {
        let now = self.clock.now();
        let (key, _) = self.keys(now);
        let mut bytes = Vec::with_capacity(16 + plain.len());
        bytes.extend_from_slice(&self.generation.to_be_bytes());
        bytes.extend_from_slice(&now.to_be_bytes());
        bytes.extend_from_slice(plain);
        // Sealed in place, so the plaintext is gone afterwards.
        let (nonce, tag) = key.seal_in_place_separate_tag(Aad::empty(), &mut bytes).ok()?;
        let mut ticket = Vec::with_capacity(NONCE + bytes.len() + tag.as_ref().len());
        ticket.extend_from_slice(nonce.as_ref());
        ticket.append(&mut bytes);
        ticket.extend_from_slice(tag.as_ref());
        Some(ticket)
    }

    fn decrypt(&self, cipher: &[u8]) -> Option<Vec<u8>> {
        let now = self.clock.now();
        let (current, previous) = self.keys(now);
        let opened = open(&current, cipher).or_else(|| open(previous.as_ref()?, cipher))?;
        let (generation, rest) = opened.split_first_chunk::<8>()?;
        let (issued, plain) = rest.split_first_chunk::<8>()?;
        let issued = u64::from_be_bytes(*issued);
        let fresh = issued <= now && now - issued <= u64::from(TICKET_LIFETIME);
        (u64::from_be_bytes(*generation) == self.generation && fresh).then(|| plain.to_vec())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::SteppedClock;

    #[tokio::test]
    async fn a_ticket_dies_with_its_generation_and_after_ten_minutes() {
        let time = SteppedClock::starting_at(1_000_000);
        let now = GenerationTicketer::new(7, time.clock()).unwrap();
        let ticket = now.encrypt(b"session").unwrap();
        assert_eq!(now.decrypt(&ticket).as_deref(), Some(&b"session"[..]));
        assert_eq!(now.of_next_generation().decrypt(&ticket), None, "same keys, next generation");
        assert_eq!(GenerationTicketer::new(7, time.clock()).unwrap().decrypt(&ticket), None, "other keys");
        time.jump(600);
        assert!(now.decrypt(&ticket).is_some());
        time.jump(1);
        assert_eq!(now.decrypt(&ticket), None, "too old");
        let later = now.encrypt(b"later").unwrap();
        assert!(now.decrypt(&later).is_some());
        time.jump(-700);
        assert_eq!(now.decrypt(&later), None, "issued in the future: the clock went back");
    }

    #[test]
    fn garbage_is_no_ticket() {
        let ticketer = GenerationTicketer::new(1, Clock::system()).unwrap();
        for length in [0, 1, 15, 16, 17, 64, 1000] {
            assert_eq!(ticketer.decrypt(&vec![0xAA; length]), None);
        }
    }
}
