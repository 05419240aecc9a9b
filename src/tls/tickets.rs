//! Session tickets that die with the generation that made them.
//!
//! A resumed handshake calls no certificate verifier, so a ticket must not outlive the grounds on which its session was
//! admitted. The generation and the time of issue stand inside the seal; what does not match is no ticket, and the
//! connection falls back to a full handshake. Each configuration has sealing keys of its own besides.

use std::sync::Arc;

use rustls::server::ProducesTickets;

use crate::clock::Clock;

/// How long a ticket may be used, seconds.
pub const TICKET_LIFETIME: u32 = 600;

/// Seals tickets for one generation.
#[derive(Debug)]
pub struct GenerationTicketer {
    generation: u64,
    clock: Clock,
    seal: Arc<dyn ProducesTickets>,
}

impl GenerationTicketer {
    /// A ticketer with new random keys.
    ///
    /// # Errors
    /// The system gave no random bytes.
    pub fn new(generation: u64, clock: Clock) -> Result<Self, rustls::Error> {
        Ok(Self { generation, clock, seal: rustls::crypto::aws_lc_rs::Ticketer::new()? })
    }

    #[cfg(test)]
    fn of_next_generation(&self) -> Self {
        Self { generation: self.generation + 1, clock: self.clock.clone(), seal: Arc::clone(&self.seal) }
    }
}

impl ProducesTickets for GenerationTicketer {
    fn enabled(&self) -> bool {
        true
    }

    fn lifetime(&self) -> u32 {
        TICKET_LIFETIME
    }

    fn encrypt(&self, plain: &[u8]) -> Option<Vec<u8>> {
        let mut sealed = zeroize::Zeroizing::new(Vec::with_capacity(16 + plain.len()));
        sealed.extend_from_slice(&self.generation.to_be_bytes());
        sealed.extend_from_slice(&self.clock.now().to_be_bytes());
        sealed.extend_from_slice(plain);
        self.seal.encrypt(&sealed)
    }

    fn decrypt(&self, cipher: &[u8]) -> Option<Vec<u8>> {
        let opened = zeroize::Zeroizing::new(self.seal.decrypt(cipher)?);
        let (generation, rest) = opened.split_first_chunk::<8>()?;
        let (issued, plain) = rest.split_first_chunk::<8>()?;
        let issued = u64::from_be_bytes(*issued);
        let now = self.clock.now();
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
        time.jump(-602);
        assert_eq!(now.decrypt(&ticket), None, "issued in the future: the clock went back");
    }

    #[test]
    fn garbage_is_no_ticket() {
        let ticketer = GenerationTicketer::new(1, Clock::system()).unwrap();
        for length in [0, 1, 15, 16, 17, 64, 1000] {
            assert_eq!(ticketer.decrypt(&vec![0xAA; length]), None);
        }
    }
}
