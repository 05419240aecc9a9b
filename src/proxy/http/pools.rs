//! The pools of one state of a listener: one for what is declared, or, for captured traffic, one for each address that
//! connections were for.

use std::fmt;
use std::net::SocketAddr;
use std::num::NonZeroUsize;
use std::sync::{Arc, Mutex, PoisonError};

use lru::LruCache;

use super::pool::Pool;

/// Addresses with a pool at once; the one that was used least recently gives way.
const MOST: NonZeroUsize = NonZeroUsize::MIN.saturating_add(255);

/// Where the requests of a listener go.
#[derive(Debug)]
pub enum Pools {
    /// It carries no requests.
    None,
    /// To what is declared.
    One(Arc<Pool>),
    /// To where each captured connection was for.
    ByAddress(ByAddress),
}

impl Pools {
    /// The pool for a connection that was captured on its way to `original`, if it was captured.
    pub fn of(&self, original: Option<SocketAddr>) -> Option<Arc<Pool>> {
        match self {
            Self::None => None,
            Self::One(pool) => Some(Arc::clone(pool)),
            Self::ByAddress(pools) => Some(pools.of(original?)),
        }
    }

    /// Nothing new begins on any of them.
    pub fn retire(&self) {
        match self {
            Self::None => {}
            Self::One(pool) => pool.retire(),
            Self::ByAddress(pools) => pools.retire(),
        }
    }
}

/// A pool for each address, made when it is first wanted.
pub struct ByAddress {
    make: Box<dyn Fn(SocketAddr) -> Arc<Pool> + Send + Sync>,
    known: Mutex<Known>,
}

struct Known {
    pools: LruCache<SocketAddr, Arc<Pool>>,
    retired: bool,
}

impl ByAddress {
    /// None yet.
    pub fn new(make: impl Fn(SocketAddr) -> Arc<Pool> + Send + Sync + 'static) -> Self {
        Self { make: Box::new(make), known: Mutex::new(Known { pools: LruCache::new(MOST), retired: false }) }
    }

    fn of(&self, address: SocketAddr) -> Arc<Pool> {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(pool) = known.pools.get(&address) {
            return Arc::clone(pool);
        }
        let pool = (self.make)(address);
        if known.retired {
            pool.retire();
        }
        if let Some((_, least)) = known.pools.push(address, Arc::clone(&pool)) {
            least.retire();
        }
        pool
    }

    fn retire(&self) {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        known.retired = true;
        known.pools.iter().for_each(|(_, pool)| pool.retire());
    }
}

impl fmt::Debug for ByAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ByAddress").finish_non_exhaustive()
    }
}
