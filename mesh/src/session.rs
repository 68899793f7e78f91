//! Which device carries the session between one of our keys and one of a peer's.
//!
//! Allowed IPs belong to one peer per device, so two keys of one peer can only be
//! configured at once on two devices. The session between our generation `i` and the
//! peer's `j` lives on device `gambeson<s>` with `s = 2*(i % 2) + (j % 2)`, listening on
//! UDP port `base + 2*s`. Even offsets leave 51821 to Flannel's IPv6 device.

use std::fmt;

use gambeson_keys::Generation;
use serde::{Deserialize, Serialize};

use crate::family::Family;

/// Number of session devices a node can have.
pub const SESSIONS: u8 = 4;

/// One of the four session devices of a node, by the parities of both key generations.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Session(u8);

impl Session {
    /// The session between our generation and a peer's, seen from our side.
    pub fn between(own: Generation, peer: Generation) -> Self {
        Self(2 * own.parity() + peer.parity())
    }

    /// All sessions a node can have, in order.
    pub fn all() -> impl Iterator<Item = Session> {
        (0..SESSIONS).map(Session)
    }

    /// The same session seen from the peer's side.
    pub fn reversed(self) -> Self {
        Self(2 * (self.0 % 2) + self.0 / 2)
    }

    /// Parity of our generation: 0 or 1.
    pub fn own_parity(self) -> u8 {
        self.0 / 2
    }

    /// Parity of the peer's generation: 0 or 1.
    pub fn peer_parity(self) -> u8 {
        self.0 % 2
    }

    /// Name of the device that carries this session, `gambeson0` to `gambeson3`.
    pub fn device(self) -> DeviceName {
        DeviceName::Session(self)
    }

    /// UDP port of this session on a node whose base port is `base`, or `None` past 65535.
    pub fn port(self, base: u16) -> Option<u16> {
        base.checked_add(2 * u16::from(self.0))
    }

    /// The base port of a node that uses `port` for this session, or `None` where no base
    /// port gives that.
    pub fn base_port(self, port: u16) -> Option<u16> {
        port.checked_sub(2 * u16::from(self.0)).filter(|base| *base != 0)
    }
}

/// Name of one of our network devices. There are only six, so no string can be wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub enum DeviceName {
    /// WireGuard, for one session.
    Session(Session),
    /// VXLAN, over an underlay of one family.
    Vxlan(Family),
}

impl DeviceName {
    /// Every device that a node can have, in order.
    pub fn all() -> impl Iterator<Item = Self> {
        Session::all().map(Self::Session).chain(Family::ALL.map(Self::Vxlan))
    }

    /// The session that it carries, if it is a WireGuard device.
    pub fn session(self) -> Option<Session> {
        match self {
            Self::Session(session) => Some(session),
            Self::Vxlan(_) => None,
        }
    }

    /// The device as the kernel names it.
    pub fn as_str(self) -> &'static str {
        const SESSION: [&str; SESSIONS as usize] =
            ["gambeson0", "gambeson1", "gambeson2", "gambeson3"];
        match self {
            Self::Session(session) => SESSION[usize::from(session.0 % SESSIONS)],
            Self::Vxlan(Family::V4) => "gambeson-vx4",
            Self::Vxlan(Family::V6) => "gambeson-vx6",
        }
    }

    /// The device with this name, if it is one of ours by name.
    pub fn parse(name: &str) -> Option<Self> {
        Self::all().find(|device| device.as_str() == name)
    }
}

impl TryFrom<String> for DeviceName {
    type Error = String;

    fn try_from(name: String) -> Result<Self, String> {
        Self::parse(&name).ok_or_else(|| format!("{name:?} is no device of ours"))
    }
}

impl From<DeviceName> for String {
    fn from(name: DeviceName) -> Self {
        name.as_str().to_owned()
    }
}

impl fmt::Display for DeviceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_ends_agree_on_every_session() {
        for (own, peer, device, offset) in [
            (0, 0, "gambeson0", 0),
            (0, 1, "gambeson1", 2),
            (1, 0, "gambeson2", 4),
            (7, 9, "gambeson3", 6),
        ] {
            let (own, peer) = (Generation::new(own), Generation::new(peer));
            let session = Session::between(own, peer);
            assert_eq!(session.device().as_str(), device);
            assert_eq!(session.port(51820), Some(51820 + offset));
            assert_eq!(session.base_port(51820 + offset), Some(51820));
            assert_eq!(session.device().session(), Some(session));
            assert_eq!(
                (session.own_parity(), session.peer_parity()),
                (own.parity(), peer.parity())
            );
            assert_eq!(session.reversed(), Session::between(peer, own));
        }
    }

    #[test]
    fn names_are_read_back() {
        for device in DeviceName::all() {
            assert_eq!(DeviceName::parse(device.as_str()), Some(device));
            assert!(device.as_str().len() <= 15, "IFNAMSIZ");
        }
        for other in ["gambeson", "gambeson4", "gambeson00", "gambeson-vx", "eth0", ""] {
            assert_eq!(DeviceName::parse(other), None);
        }
    }

    #[test]
    fn ports_end_at_65535() {
        let last = Session::between(Generation::new(1), Generation::new(1));
        assert_eq!(last.port(65529), Some(65535));
        assert_eq!(last.port(65530), None);
        assert_eq!((last.base_port(7), last.base_port(6)), (Some(1), None));
    }
}
