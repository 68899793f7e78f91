//! Link-layer addresses of VXLAN devices.

use std::fmt;
use std::net::{IpAddr, Ipv6Addr};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// What a locally administered address starts with whose rest is an IP address; the same that
/// reference CNI plugins use.
const LOCAL: [u8; 2] = [0x0a, 0x58];

/// A unicast Ethernet address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Mac([u8; 6]);

impl Mac {
    /// The address of the device whose IP address is this one: the same at every start, and
    /// different for different subnets of a cluster network.
    pub fn of(address: IpAddr) -> Self {
        let [a, b, c, d] = match address {
            IpAddr::V4(v4) => v4.octets(),
            IpAddr::V6(v6) => {
                let bits = u128::from(v6);
                let word = |shift: u32| (bits >> shift) as u32;
                (word(0) ^ word(32) ^ word(64) ^ word(96)).to_be_bytes()
            }
        };
        Self([LOCAL[0], LOCAL[1], a, b, c, d])
    }

    /// The IPv6 address that the device gives itself (RFC 4291, appendix A).
    pub fn link_local(self) -> Ipv6Addr {
        let [a, b, c, d, e, f] = self.0;
        let identifier = [a ^ 2, b, c, 0xff, 0xfe, d, e, f];
        Ipv6Addr::from((0xfe80 << 112) | u128::from(u64::from_be_bytes(identifier)))
    }

    /// The address in these six bytes, if one device can have it.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let bytes: [u8; 6] = bytes.try_into().ok()?;
        let group = bytes[0] & 1 == 1;
        (!group && bytes != [0; 6]).then_some(Self(bytes))
    }

    /// Its six bytes.
    pub fn octets(self) -> [u8; 6] {
        self.0
    }
}

/// A text that is no address of a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not an Ethernet address of one device, such as 0a:58:0a:f4:01:00")]
pub struct MacError;

impl FromStr for Mac {
    type Err = MacError;

    fn from_str(text: &str) -> Result<Self, MacError> {
        let byte = |part: &str| {
            let digits = part.len() == 2 && part.bytes().all(|b| b.is_ascii_hexdigit());
            u8::from_str_radix(part, 16).ok().filter(|_| digits)
        };
        let bytes: Option<Vec<u8>> = text.split(':').map(byte).collect();
        bytes.and_then(|bytes| Self::from_bytes(&bytes)).ok_or(MacError)
    }
}

impl TryFrom<String> for Mac {
    type Error = MacError;

    fn try_from(text: String) -> Result<Self, MacError> {
        text.parse()
    }
}

impl From<Mac> for String {
    fn from(mac: Mac) -> Self {
        mac.to_string()
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_spelled_as_the_kernel_spells_it() {
        let mac: Mac = "0A:58:0a:f4:01:00".parse().unwrap();
        assert_eq!(mac.to_string(), "0a:58:0a:f4:01:00");
        assert_eq!(mac, Mac::of("10.244.1.0".parse().unwrap()));
    }

    #[test]
    fn a_device_gives_itself_an_address_as_the_kernel_does() {
        let mac: Mac = "0a:58:0a:f4:01:00".parse().unwrap();
        assert_eq!(mac.link_local().to_string(), "fe80::858:aff:fef4:100");
    }

    #[test]
    fn what_no_device_can_have_is_refused() {
        for text in [
            "",
            "0a:58:0a:f4:01",
            "0a:58:0a:f4:01:00:00",
            "0a-58-0a-f4-01-00",
            "0a:58:0a:f4:01:+1",
            "0a:58:0a:f4:01:0",
            "00:00:00:00:00:00",
            "ff:ff:ff:ff:ff:ff",
            "01:00:5e:00:00:01",
        ] {
            assert_eq!(text.parse::<Mac>(), Err(MacError), "{text}");
        }
    }

    #[test]
    fn subnets_of_a_cluster_have_addresses_of_their_own() {
        let macs: std::collections::BTreeSet<_> = (0..=u16::MAX)
            .map(|n| Mac::of(std::net::Ipv6Addr::new(0xfd00, 0x10, 0x244, n, 0, 0, 0, 0).into()))
            .collect();
        assert_eq!(macs.len(), 1 << 16);
        assert!(macs.iter().all(|mac| Mac::from_bytes(&mac.octets()) == Some(*mac)));
    }
}
