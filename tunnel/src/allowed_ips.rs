//! Longest-prefix match over the allowed IPs of all peers of a device.
//!
//! The prefixes are flattened into disjoint ranges, so that a lookup is one binary search
//! over a contiguous array. The table is built whole and never changed; a change of the
//! configuration makes a new one.

use std::net::IpAddr;

use ipnet::IpNet;

/// An immutable longest-prefix table from prefix to `T`.
#[derive(Debug, Clone)]
pub(crate) struct AllowedIps<T> {
    v4: Ranges<u32, T>,
    v6: Ranges<u128, T>,
}

impl<T: Copy> AllowedIps<T> {
    /// Builds the table. Each prefix may be given once; host bits are ignored.
    pub(crate) fn new(prefixes: impl IntoIterator<Item = (IpNet, T)>) -> Self {
        let mut v4 = Vec::new();
        let mut v6 = Vec::new();
        for (prefix, owner) in prefixes {
            match prefix {
                IpNet::V4(net) => v4.push((
                    u32::from(net.network()),
                    u32::from(net.broadcast()),
                    net.prefix_len(),
                    owner,
                )),
                IpNet::V6(net) => v6.push((
                    u128::from(net.network()),
                    u128::from(net.broadcast()),
                    net.prefix_len(),
                    owner,
                )),
            }
        }
        Self { v4: Ranges::new(v4), v6: Ranges::new(v6) }
    }

    /// The owner of the longest prefix that contains `address`.
    pub(crate) fn lookup(&self, address: IpAddr) -> Option<T> {
        match address {
            IpAddr::V4(address) => self.v4.lookup(address.into()),
            IpAddr::V6(address) => self.v6.lookup(address.into()),
        }
    }
}

impl<T: Copy> Default for AllowedIps<T> {
    fn default() -> Self {
        Self::new([])
    }
}

/// An address as a number.
trait Address: Copy + Ord {
    const FIRST: Self;

    /// The address after this one; `None` after the last.
    fn next(self) -> Option<Self>;
}

impl Address for u32 {
    const FIRST: Self = 0;

    fn next(self) -> Option<Self> {
        self.checked_add(1)
    }
}

impl Address for u128 {
    const FIRST: Self = 0;

    fn next(self) -> Option<Self> {
        self.checked_add(1)
    }
}

/// Range `i` is `starts[i]..starts[i + 1]`; `starts[0]` is the first address of all.
#[derive(Debug, Clone)]
struct Ranges<A, T> {
    starts: Vec<A>,
    owners: Vec<Option<T>>,
}

impl<A: Address, T: Copy> Ranges<A, T> {
    /// From `(first, last, prefix length, owner)`.
    fn new(mut prefixes: Vec<(A, A, u8, T)>) -> Self {
        prefixes.sort_by_key(|&(first, _, len, _)| (first, len));
        let mut ranges = Self { starts: vec![A::FIRST], owners: vec![None] };
        // The prefixes that contain the current position, outermost first.
        let mut open: Vec<(A, T)> = Vec::new();
        for (first, last, _, owner) in prefixes {
            while let Some(&(end, _)) = open.last() {
                if end >= first {
                    break;
                }
                ranges.close(&mut open, end);
            }
            ranges.begin(first, Some(owner));
            open.push((last, owner));
        }
        while let Some(&(end, _)) = open.last() {
            ranges.close(&mut open, end);
        }
        ranges
    }

    /// Ends the innermost prefix at `end`: what follows belongs to the one around it.
    fn close(&mut self, open: &mut Vec<(A, T)>, end: A) {
        open.pop();
        if let Some(next) = end.next() {
            self.begin(next, open.last().map(|&(_, owner)| owner));
        }
    }

    fn begin(&mut self, start: A, owner: Option<T>) {
        if self.starts.last() == Some(&start) {
            self.owners.pop();
        } else {
            self.starts.push(start);
        }
        self.owners.push(owner);
    }

    fn lookup(&self, address: A) -> Option<T> {
        let after = self.starts.partition_point(|start| *start <= address);
        self.owners.get(after.wrapping_sub(1)).copied().flatten()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::net::{Ipv4Addr, Ipv6Addr};

    use ipnet::{Ipv4Net, Ipv6Net};
    use proptest::prelude::*;

    use super::*;

    fn table(prefixes: &[(&str, u8)]) -> AllowedIps<u8> {
        AllowedIps::new(prefixes.iter().map(|(net, owner)| (net.parse().unwrap(), *owner)))
    }

    fn lookup(table: &AllowedIps<u8>, address: &str) -> Option<u8> {
        table.lookup(address.parse().unwrap())
    }

    #[test]
    fn the_longest_prefix_wins_and_its_end_returns_to_the_outer_one() {
        let table = table(&[("10.0.0.0/8", 1), ("10.1.0.0/16", 2), ("10.1.2.3/32", 3)]);
        assert_eq!(lookup(&table, "9.255.255.255"), None);
        assert_eq!(lookup(&table, "10.0.255.255"), Some(1));
        assert_eq!(lookup(&table, "10.1.2.2"), Some(2));
        assert_eq!(lookup(&table, "10.1.2.3"), Some(3));
        assert_eq!(lookup(&table, "10.1.2.4"), Some(2));
        assert_eq!(lookup(&table, "10.2.0.0"), Some(1));
        assert_eq!(lookup(&table, "11.0.0.0"), None);
    }

    #[test]
    fn default_routes_and_the_last_address_are_covered() {
        let table = table(&[("0.0.0.0/0", 1), ("255.255.255.255/32", 2), ("::/0", 3)]);
        assert_eq!(lookup(&table, "0.0.0.0"), Some(1));
        assert_eq!(lookup(&table, "255.255.255.254"), Some(1));
        assert_eq!(lookup(&table, "255.255.255.255"), Some(2));
        assert_eq!(lookup(&table, "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff"), Some(3));
    }

    #[test]
    fn an_empty_table_owns_nothing() {
        assert_eq!(lookup(&table(&[]), "10.0.0.1"), None);
        assert_eq!(lookup(&table(&[]), "::1"), None);
    }

    fn naive(prefixes: &BTreeMap<IpNet, u8>, address: IpAddr) -> Option<u8> {
        prefixes
            .iter()
            .filter(|(net, _)| net.contains(&address))
            .max_by_key(|(net, _)| net.prefix_len())
            .map(|(_, owner)| *owner)
    }

    /// Addresses from a small space, so that prefixes nest and share ends.
    fn net() -> impl Strategy<Value = IpNet> {
        let v4 = (0u32..64, 0u8..=32).prop_map(|(bits, len)| {
            IpNet::V4(Ipv4Net::new_assert(Ipv4Addr::from(bits << 26 | bits), len)).trunc()
        });
        let v6 = (0u128..64, 0u8..=128).prop_map(|(bits, len)| {
            IpNet::V6(Ipv6Net::new_assert(Ipv6Addr::from(bits << 122 | bits), len)).trunc()
        });
        prop_oneof![v4, v6]
    }

    proptest! {
        #[test]
        fn agrees_with_the_naive_model(
            prefixes in prop::collection::btree_map(net(), any::<u8>(), 0..40),
            probes in prop::collection::vec(any::<(u32, u128)>(), 0..20),
        ) {
            let table = AllowedIps::new(prefixes.clone());
            let edges = prefixes.keys().flat_map(|net| [net.network(), net.broadcast()]);
            let random = probes.iter().flat_map(|(v4, v6)| {
                [IpAddr::V4(Ipv4Addr::from(*v4)), IpAddr::V6(Ipv6Addr::from(*v6))]
            });
            for address in edges.chain(random) {
                for address in neighbours(address) {
                    prop_assert_eq!(table.lookup(address), naive(&prefixes, address));
                }
            }
        }
    }

    fn neighbours(address: IpAddr) -> [IpAddr; 3] {
        match address {
            IpAddr::V4(a) => {
                let bits = u32::from(a);
                [bits.wrapping_sub(1), bits, bits.wrapping_add(1)].map(|b| Ipv4Addr::from(b).into())
            }
            IpAddr::V6(a) => {
                let bits = u128::from(a);
                [bits.wrapping_sub(1), bits, bits.wrapping_add(1)].map(|b| Ipv6Addr::from(b).into())
            }
        }
    }
}
