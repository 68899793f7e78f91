//! ICMP echo with control over the size of the packet, which is never fragmented.

use std::io::{self, ErrorKind};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::socket::{setsockopt, sockopt};
use socket2::{Domain, Protocol, Socket, Type};

/// How long one echo may take before it counts as lost.
pub const ECHO_TIMEOUT: Duration = Duration::from_millis(500);

const IPV4_HEADER: usize = 20;
const IPV6_HEADER: usize = 40;
const ICMP_HEADER: usize = 8;
/// Of an ordinary echo, as `ping` sends it.
const PAYLOAD: usize = 56;

/// Sends echo requests to one address, from the namespace it was made in.
#[derive(Debug)]
pub struct Pinger {
    socket: Socket,
    target: IpAddr,
    identifier: u16,
    sequence: u16,
}

/// What became of an echo request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Echo {
    /// Answered, with the same payload, after this time.
    Answered(Duration),
    /// Not sent, or refused on the way: larger than the path takes.
    TooLarge,
    /// No answer in time, or an ICMP error.
    Lost,
}

impl Pinger {
    /// A pinger of this address.
    pub fn new(target: IpAddr) -> io::Result<Self> {
        let socket = match target {
            // The header is ours, which is the one way to set DF without the kernel's leave.
            IpAddr::V4(_) => {
                let socket = Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::ICMPV4))?;
                socket.set_header_included_v4(true)?;
                socket
            }
            IpAddr::V6(_) => {
                let socket = Socket::new(Domain::IPV6, Type::DGRAM, Some(Protocol::ICMPV6))?;
                setsockopt(&socket.as_fd(), sockopt::Ipv6DontFrag, &true)?;
                socket
            }
        };
        socket.connect(&SocketAddr::new(target, 0).into())?;
        Ok(Self { socket, target, identifier: rand::random(), sequence: 0 })
    }

    /// One echo request like those of `ping`.
    pub fn echo(&mut self) -> io::Result<Echo> {
        self.echo_payload(&[0x67; PAYLOAD])
    }

    /// One echo request in an IP packet of this many bytes.
    pub fn echo_of_size(&mut self, packet: usize) -> io::Result<Echo> {
        let header = if self.target.is_ipv4() { IPV4_HEADER } else { IPV6_HEADER };
        let payload = packet.saturating_sub(header + ICMP_HEADER);
        self.echo_payload(&vec![0x67; payload])
    }

    /// One echo request with this payload.
    pub fn echo_payload(&mut self, payload: &[u8]) -> io::Result<Echo> {
        self.sequence = self.sequence.wrapping_add(1);
        let request = self.request(payload);
        let sent = Instant::now();
        if let Err(error) = self.send(&request) {
            return match error.raw_os_error().map(Errno::from_raw) {
                Some(Errno::EMSGSIZE) => Ok(Echo::TooLarge),
                Some(
                    Errno::EHOSTUNREACH
                    | Errno::ENETUNREACH
                    | Errno::ECONNREFUSED
                    | Errno::EACCES
                    | Errno::EPERM
                    | Errno::EADDRNOTAVAIL,
                ) => Ok(Echo::Lost),
                _ => Err(error),
            };
        }
        let deadline = sent + ECHO_TIMEOUT;
        loop {
            let received = match self.receive(deadline) {
                // A router on the way said so.
                Err(error) if error.raw_os_error() == Some(Errno::EMSGSIZE as i32) => {
                    return Ok(Echo::TooLarge);
                }
                received => received?,
            };
            match received {
                Some(packet) if self.is_answer(&packet, payload) => {
                    return Ok(Echo::Answered(sent.elapsed()));
                }
                Some(_) => {}
                None => return Ok(Echo::Lost),
            }
        }
    }

    /// Tries until the deadline, or until it is told to stop. Gives whether there was an answer.
    pub fn answers_before(&mut self, deadline: Instant, stop: &AtomicBool) -> io::Result<bool> {
        loop {
            let tried = Instant::now();
            if matches!(self.echo()?, Echo::Answered(_)) {
                return Ok(true);
            }
            if Instant::now() >= deadline || stop.load(Ordering::Relaxed) {
                return Ok(false);
            }
            // An error that comes back at once must not keep a core busy.
            std::thread::sleep(Duration::from_millis(20).saturating_sub(tried.elapsed()));
        }
    }

    fn send(&self, request: &[u8]) -> io::Result<()> {
        match self.socket.send(request) {
            // An error that an earlier packet met is reported to the next call, once.
            Err(error) if is_pending_error(&error) => self.socket.send(request).map(|_| ()),
            sent => sent.map(|_| ()),
        }
    }

    /// The next packet from the target, or `None` at the deadline.
    fn receive(&self, deadline: Instant) -> io::Result<Option<Vec<u8>>> {
        let mut packet = vec![0; 1 << 16];
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(None);
            }
            self.socket.set_read_timeout(Some(left))?;
            match io::Read::read(&mut &self.socket, &mut packet) {
                Ok(length) => {
                    packet.truncate(length);
                    return Ok(Some(packet));
                }
                Err(error) if is_pending_error(&error) => {}
                Err(error)
                    if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
                Err(error) => return Err(error),
            }
        }
    }

    fn request(&self, payload: &[u8]) -> Vec<u8> {
        // Type 8 is echo request in ICMP, 128 in ICMPv6.
        let kind = if self.target.is_ipv4() { 8 } else { 128 };
        let mut message = vec![kind, 0, 0, 0];
        message.extend(self.identifier.to_be_bytes());
        message.extend(self.sequence.to_be_bytes());
        message.extend(payload);
        let IpAddr::V4(target) = self.target else { return message };
        let checksum = internet_checksum(&message);
        message[2..4].copy_from_slice(&checksum.to_be_bytes());
        let mut packet = ipv4_header(target, message.len());
        packet.extend(message);
        packet
    }

    fn is_answer(&self, packet: &[u8], payload: &[u8]) -> bool {
        let (kind, message) = match self.target {
            IpAddr::V4(_) => {
                let header = usize::from(packet.first().copied().unwrap_or_default() & 0x0f) * 4;
                (0, packet.get(header..).unwrap_or_default())
            }
            IpAddr::V6(_) => (129, packet),
        };
        let identifier = message.get(4..6);
        message.first() == Some(&kind)
            // The kernel chooses the identifier of its ping sockets.
            && (self.target.is_ipv6() || identifier == Some(&self.identifier.to_be_bytes()))
            && message.get(6..8) == Some(&self.sequence.to_be_bytes())
            && message.get(ICMP_HEADER..) == Some(payload)
    }
}

/// ICMP errors that earlier packets met.
fn is_pending_error(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error().map(Errno::from_raw),
        Some(Errno::EHOSTUNREACH | Errno::ENETUNREACH | Errno::ECONNREFUSED | Errno::EPROTO)
    )
}

/// A header with DF set. The kernel fills in source, identification and checksum.
fn ipv4_header(target: Ipv4Addr, payload: usize) -> Vec<u8> {
    let length = u16::try_from(IPV4_HEADER + payload).unwrap_or(u16::MAX);
    let mut header = vec![0x45, 0];
    header.extend(length.to_be_bytes());
    header.extend([0, 0, 0x40, 0, 64, 1, 0, 0, 0, 0, 0, 0]);
    header.extend(target.octets());
    header
}

/// RFC 1071.
fn internet_checksum(bytes: &[u8]) -> u16 {
    let words = bytes.chunks(2).map(|pair| {
        u32::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or_default()]))
    });
    let mut sum: u32 = words.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !u16::try_from(sum).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksums_are_those_of_the_rfc() {
        let bytes = [0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7];
        assert_eq!(internet_checksum(&bytes), !0xddf2);
        assert_eq!(internet_checksum(&[0xff]), !0xff00);
    }
}
