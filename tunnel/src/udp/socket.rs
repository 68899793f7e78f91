//! Making the sockets: options, port, mark.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::AsRawFd as _;
use std::sync::OnceLock;

use nix::errno::Errno;
use socket2::{Domain, Protocol, Socket, Type};

/// Socket buffers, bytes.
const BUFFER: libc::c_int = 7 << 20;
/// Those of sockets for slow peers, which only send: what waits there for long is late anyway.
const SLOW_BUFFER: libc::c_int = 1 << 20;
/// Attempts to find a random port that is free in both families.
const PORT_ATTEMPTS: u32 = 64;

/// What a pair of sockets is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Role {
    /// It takes the port.
    First,
    /// It receives beside the first.
    Further,
    /// It only sends, to slow peers.
    Slow,
}

/// How sockets are made.
#[derive(Debug, Clone, Copy)]
pub(crate) struct How {
    /// Mark of outgoing datagrams, 0 for none.
    pub(crate) fwmark: u32,
    /// Whether the kernel may merge what is received (`UDP_GRO`, udp(7)).
    pub(crate) merges: bool,
}

/// A socket for each family of the host, on one port.
pub(super) struct Pair {
    v4: Option<Socket>,
    v6: Option<Socket>,
    port: u16,
}

impl Pair {
    /// Binds both families to `port`, or to one random port if it is 0.
    ///
    /// # Errors
    /// That of the bind, EADDRINUSE above all.
    pub(super) fn bind(port: u16, how: How) -> io::Result<Self> {
        let mut attempts = 0;
        loop {
            attempts += 1;
            match Self::of(port, how, Role::First) {
                Err(error) if port == 0 && attempts < PORT_ATTEMPTS && is_in_use(&error) => {}
                result => return result,
            }
        }
    }

    /// A pair of this role: but for the first one, on the port of one that shares it.
    pub(super) fn of(port: u16, how: How, role: Role) -> io::Result<Self> {
        let v4 = socket((Ipv4Addr::UNSPECIFIED, port).into(), how, role)?;
        let port = bound_port(v4.as_ref()).unwrap_or(port);
        let v6 = socket((Ipv6Addr::UNSPECIFIED, port).into(), how, role)?;
        let port = bound_port(v6.as_ref()).unwrap_or(port);
        if v4.is_none() && v6.is_none() {
            return Err(Errno::EAFNOSUPPORT.into());
        }
        Ok(Self { v4, v6, port })
    }

    pub(super) fn port(&self) -> u16 {
        self.port
    }

    /// Lets others be bound beside this pair, and returns those that receive with it: what a
    /// peer sends goes to one of `count` in all, always to the same while its address stays.
    ///
    /// The port is shared only after it was bound, so that one that is taken is noticed. The
    /// sockets of a port are one group as soon as there are two, in the order that they were
    /// bound, and a group has a program that says which one receives
    /// (`SO_ATTACH_REUSEPORT_CBPF`, socket(7)).
    pub(super) fn share(&self, count: usize, how: How) -> io::Result<Vec<Self>> {
        self.each().try_for_each(|socket| socket.set_reuse_port(true))?;
        let beside = |role| Self::of(self.port, how, role);
        let others = (1..count).map(|_| beside(Role::Further)).collect::<io::Result<Vec<_>>>()?;
        let second = others.is_empty().then(|| beside(Role::Slow)).transpose()?;
        for (socket, sender) in [(&self.v4, SENDER_V4), (&self.v6, SENDER_V6)] {
            socket.iter().try_for_each(|socket| choose_by(socket, sender, count))?;
        }
        drop(second);
        Ok(others)
    }

    pub(super) fn set_fwmark(&self, fwmark: u32) -> io::Result<()> {
        self.each().try_for_each(|socket| socket.set_mark(fwmark))
    }

    /// Whether both split a send into datagrams.
    pub(super) fn sends_segments(&self) -> bool {
        self.each().all(sends_segments)
    }

    pub(super) fn each(&self) -> impl Iterator<Item = &Socket> {
        self.v4.iter().chain(&self.v6)
    }

    pub(super) fn to(&self, address: &SocketAddr) -> Option<&Socket> {
        match address {
            SocketAddr::V4(_) => self.v4.as_ref(),
            SocketAddr::V6(_) => self.v6.as_ref(),
        }
    }
}

/// A socket for this address' family, or `None` if the host does not have the family.
fn socket(address: SocketAddr, how: How, role: Role) -> io::Result<Option<Socket>> {
    let domain = Domain::for_address(address);
    let socket = match Socket::new(domain, Type::DGRAM, Some(Protocol::UDP)) {
        Err(error) if error.raw_os_error() == Some(libc::EAFNOSUPPORT) => return Ok(None),
        result => result?,
    };
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
        set_flag(&socket, libc::IPPROTO_IPV6, libc::IPV6_RECVPKTINFO)?;
        set_flag(&socket, libc::IPPROTO_IPV6, libc::IPV6_RECVTCLASS)?;
    } else {
        set_flag(&socket, libc::IPPROTO_IP, libc::IP_PKTINFO)?;
        set_flag(&socket, libc::IPPROTO_IP, libc::IP_RECVTOS)?;
    }
    if how.merges && kernel_version() >= (5, 12, 0) {
        // Without it, datagrams come one by one.
        let _ = set_flag(&socket, libc::SOL_UDP, libc::UDP_GRO);
    }
    // Beyond the host's limit with CAP_NET_ADMIN, otherwise up to it.
    for (force, plain) in
        [(libc::SO_RCVBUFFORCE, libc::SO_RCVBUF), (libc::SO_SNDBUFFORCE, libc::SO_SNDBUF)]
    {
        let size = if role == Role::Slow { SLOW_BUFFER } else { BUFFER };
        if set_option(&socket, libc::SOL_SOCKET, force, size).is_err() {
            let _ = set_option(&socket, libc::SOL_SOCKET, plain, size);
        }
    }
    if how.fwmark != 0 {
        socket.set_mark(how.fwmark)?;
    }
    socket.set_reuse_port(role != Role::First)?;
    match socket.bind(&address.into()) {
        // IPv6 is compiled in but switched off.
        Err(error) if error.raw_os_error() == Some(libc::EADDRNOTAVAIL) => Ok(None),
        result => result.map(|()| Some(socket)),
    }
}

/// Where a program finds the end of the sender's address and the sender's port: in the network
/// header and, if that has no options, right behind it.
type Sender = [libc::c_int; 2];
const SENDER_V4: Sender = [libc::SKF_NET_OFF + 12, libc::SKF_NET_OFF + 20];
const SENDER_V6: Sender = [libc::SKF_NET_OFF + 20, libc::SKF_NET_OFF + 40];

/// Makes one of the first `count` sockets of a group receive what comes for any of it, by the
/// sender.
fn choose_by(socket: &Socket, sender: Sender, count: usize) -> io::Result<()> {
    let step = |code: u32, k: u32| libc::sock_filter { code: code as u16, jt: 0, jf: 0, k };
    let [address, port] = sender.map(|at| at as u32);
    let count = u32::try_from(count).map_err(|_| Errno::EINVAL)?.max(1);
    let mut steps = [
        step(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, address),
        step(libc::BPF_MISC | libc::BPF_TAX, 0),
        step(libc::BPF_LD | libc::BPF_H | libc::BPF_ABS, port),
        step(libc::BPF_ALU | libc::BPF_ADD | libc::BPF_X, 0),
        step(libc::BPF_ALU | libc::BPF_MOD | libc::BPF_K, count),
        step(libc::BPF_RET | libc::BPF_A, 0),
    ];
    let program = libc::sock_fprog { len: steps.len() as u16, filter: steps.as_mut_ptr() };
    // SAFETY: the program and its instructions outlive the call, which copies them.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_ATTACH_REUSEPORT_CBPF,
            (&raw const program).cast(),
            size_of::<libc::sock_fprog>() as libc::socklen_t,
        )
    };
    Errno::result(result)?;
    Ok(())
}

/// Whether the kernel splits one send into datagrams, and does it right.
fn sends_segments(socket: &Socket) -> bool {
    // These versions corrupt runs of equal datagrams.
    let broken = (7, 0, 0)..=(7, 1, 4);
    !broken.contains(&kernel_version())
        && set_option(socket, libc::SOL_UDP, libc::UDP_SEGMENT, 0).is_ok()
}

/// Major, minor and patch level; zeros if it cannot be told.
fn kernel_version() -> (u32, u32, u32) {
    static VERSION: OnceLock<(u32, u32, u32)> = OnceLock::new();
    *VERSION.get_or_init(|| {
        parse_version(&std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default())
    })
}

fn parse_version(release: &str) -> (u32, u32, u32) {
    let mut numbers =
        release.split(|c: char| !c.is_ascii_digit()).map(|number| number.parse().unwrap_or(0));
    let mut next = || numbers.next().unwrap_or(0);
    (next(), next(), next())
}

fn bound_port(socket: Option<&Socket>) -> Option<u16> {
    socket?.local_addr().ok()?.as_socket().map(|address| address.port())
}

fn is_in_use(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::EADDRINUSE)
}

fn set_flag(socket: &Socket, level: libc::c_int, name: libc::c_int) -> io::Result<()> {
    set_option(socket, level, name, 1)
}

fn set_option(
    socket: &Socket,
    level: libc::c_int,
    name: libc::c_int,
    value: libc::c_int,
) -> io::Result<()> {
    // SAFETY: the value is a C int that outlives the call, and its length is given.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            name,
            (&raw const value).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        )
    };
    Errno::result(result)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernel_versions_are_read() {
        assert_eq!(parse_version("6.18.44-something-595\n"), (6, 18, 44));
        assert_eq!(parse_version("7.1-rc3"), (7, 1, 0));
        assert_eq!(parse_version(""), (0, 0, 0));
        assert!(kernel_version() > (4, 0, 0));
    }

    #[test]
    fn a_port_that_is_shared_is_taken_all_the_same() {
        let how = How { fwmark: 0, merges: true };
        for count in [1, 4] {
            let pair = Pair::bind(0, how).unwrap();
            assert_eq!(pair.share(count, how).unwrap().len(), count - 1);
            let error = Pair::bind(pair.port(), how).err().unwrap();
            assert!(is_in_use(&error), "{error}");
            assert!(Pair::of(pair.port(), how, Role::Slow).is_ok());
        }
    }
}
