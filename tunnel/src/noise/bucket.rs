//! Token buckets: how many handshakes an address, and a peer, may cost us.

use std::collections::HashMap;
use std::net::IpAddr;

/// Of an address under load, as in the kernel (drivers/net/wireguard/ratelimiter.c).
const ADDRESS: Rate = Rate { per_second: 20, burst: 5 };
/// Addresses that are remembered; more are refused until one has been quiet for a second.
const ADDRESSES: usize = 8192;
/// For how long a quiet address is remembered, ms.
const MEMORY: u64 = 1000;

/// How often something may happen.
#[derive(Debug, Clone, Copy)]
pub(super) struct Rate {
    pub(super) per_second: u64,
    /// How often at once.
    pub(super) burst: u64,
}

/// What is left of a rate, in thousandths of a token.
#[derive(Debug)]
pub(super) struct Bucket {
    left: u64,
    since: u64,
}

impl Bucket {
    pub(super) fn full(rate: Rate, now: u64) -> Self {
        Self { left: rate.burst * 1000, since: now }
    }

    /// Takes a token, if there is one. `now` is in ms.
    pub(super) fn take(&mut self, rate: Rate, now: u64) -> bool {
        let gained = now.saturating_sub(self.since).saturating_mul(rate.per_second);
        self.left = self.left.saturating_add(gained).min(rate.burst * 1000);
        self.since = now;
        match self.left.checked_sub(1000) {
            Some(left) => {
                self.left = left;
                true
            }
            None => false,
        }
    }
}

/// A bucket for each source: an IPv4 address or an IPv6 /64, which is what one host has.
#[derive(Debug, Default)]
pub(super) struct Buckets(HashMap<IpAddr, Bucket>);

impl Buckets {
    pub(super) fn allow(&mut self, from: IpAddr, now: u64) -> bool {
        let from = match from {
            IpAddr::V4(_) => from,
            IpAddr::V6(ip) => IpAddr::V6((u128::from(ip) >> 64 << 64).into()),
        };
        if self.0.len() >= ADDRESSES && !self.0.contains_key(&from) {
            self.0.retain(|_, bucket| now.saturating_sub(bucket.since) < MEMORY);
            if self.0.len() >= ADDRESSES {
                return false;
            }
        }
        self.0.entry(from).or_insert_with(|| Bucket::full(ADDRESS, now)).take(ADDRESS, now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn passed(buckets: &mut Buckets, from: &str, now: u64) -> usize {
        (0..100).filter(|_| buckets.allow(from.parse().unwrap(), now)).count()
    }

    #[test]
    fn an_address_gets_a_burst_and_then_its_rate() {
        let mut buckets = Buckets::default();
        assert_eq!(passed(&mut buckets, "192.0.2.1", 0), 5);
        assert_eq!(passed(&mut buckets, "192.0.2.2", 0), 5);
        assert_eq!(passed(&mut buckets, "192.0.2.1", 100), 2);
        let second: usize =
            (1..=10).map(|n| passed(&mut buckets, "192.0.2.1", 100 + n * 100)).sum();
        assert_eq!(second, 20);
        assert_eq!(passed(&mut buckets, "192.0.2.1", 1 << 40), 5);
    }

    #[test]
    fn a_host_with_a_64_is_one() {
        let mut buckets = Buckets::default();
        assert_eq!(passed(&mut buckets, "2001:db8::1", 0), 5);
        assert_eq!(passed(&mut buckets, "2001:db8::2:3", 0), 0);
        assert_eq!(passed(&mut buckets, "2001:db8:0:1::1", 0), 5);
    }

    #[test]
    fn the_table_is_bounded_and_forgets_the_quiet() {
        let mut buckets = Buckets::default();
        let address = |n: usize| IpAddr::V4(u32::try_from(n).unwrap().into());
        assert!((0..ADDRESSES).all(|n| buckets.allow(address(n), 0)));
        assert!(!buckets.allow(address(ADDRESSES), 999));
        assert!(buckets.allow(address(1), 999), "who is known stays known");
        assert!(buckets.allow(address(ADDRESSES), 1000));
        assert_eq!(buckets.0.len(), 2);
    }
}
