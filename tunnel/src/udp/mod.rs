//! The UDP sockets of a device: both families on one port, replies from the address that the
//! peer sent to. Nothing waits for a socket.
//!
//! A socket's buffer holds what the network has not taken yet. A peer behind a slow link would
//! fill it, and all others' datagrams with it would be dropped: such a peer gets a [`Lane`] of
//! its own, which is another socket on the same port, for sending only.

mod message;
mod receive;
mod socket;

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use parking_lot::Mutex;

use crate::batch::{Destination, Outbox};
use crate::device::{Device, PeerId};
use crate::endpoint::Endpoint;
use message::send_message;
pub(crate) use receive::Receiver;
pub(crate) use socket::How;
use socket::{Pair, Role};

/// At most this many datagrams in one send (the kernel's limit until 6.8).
const SEGMENTS: usize = 64;
/// How many lanes there are for slow peers.
const LANES: u32 = 16;
/// For how long a peer stays in its lane after a buffer was full.
const SLOW_FOR: Duration = Duration::from_secs(10);

/// The sockets. A family that the host does not have is absent.
pub(crate) struct Sockets {
    /// One for each worker, or one for all.
    mains: Vec<Pair>,
    port: u16,
    merges: bool,
    fwmark: AtomicU32,
    /// Whether runs of datagrams leave in one send.
    segments: AtomicBool,
    /// Whether there can be lanes.
    is_shared: bool,
    /// Made when the first peer comes to it.
    lanes: [Lane; LANES as usize],
    slow: Slow,
}

/// Another pair of sockets on the port; `None` if there is none to be had.
type Lane = OnceLock<Option<Pair>>;

/// Peers for which a buffer was full, and until when they count as slow.
#[derive(Default)]
struct Slow {
    any: AtomicBool,
    until: Mutex<HashMap<PeerId, Instant>>,
}

impl Sockets {
    /// Binds both families to `port`, or to one random port if it is 0, for so many workers.
    /// `segments` allows runs of datagrams in one send (`UDP_SEGMENT`, udp(7)).
    ///
    /// # Errors
    /// That of the bind, EADDRINUSE above all.
    pub(crate) fn bind(port: u16, how: How, workers: usize, segments: bool) -> io::Result<Self> {
        let first = Pair::bind(port, how)?;
        let others = first.share(workers, how);
        if let Err(error) = &others {
            tracing::info!(%error, "workers and slow peers get no sockets of their own");
        }
        let is_shared = others.is_ok();
        let (port, segments) = (first.port(), segments && first.sends_segments());
        Ok(Self {
            mains: std::iter::once(first).chain(others.unwrap_or_default()).collect(),
            port,
            merges: how.merges,
            fwmark: AtomicU32::new(how.fwmark),
            segments: AtomicBool::new(segments),
            is_shared,
            lanes: Default::default(),
            slow: Slow::default(),
        })
    }

    pub(crate) fn port(&self) -> u16 {
        self.port
    }

    /// Marks outgoing datagrams, 0 for none.
    pub(crate) fn set_fwmark(&self, fwmark: u32) -> io::Result<()> {
        self.fwmark.store(fwmark, Ordering::Relaxed);
        let lanes = self.lanes.iter().filter_map(OnceLock::get).flatten();
        self.mains.iter().chain(lanes).try_for_each(|pair| pair.set_fwmark(fwmark))
    }

    /// What the worker of this number receives from.
    pub(crate) fn descriptors(&self, worker: usize) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.mains.get(worker).into_iter().flat_map(Pair::each).map(|socket| socket.as_fd())
    }

    /// Sends what is in the outbox, and never waits: a datagram that cannot be sent now is
    /// dropped, as the network would drop it.
    pub(crate) fn send(&self, worker: usize, outbox: &Outbox, device: &Device) {
        let Some(main) = self.mains.get(worker).or(self.mains.first()) else { return };
        let limit = if self.segments.load(Ordering::Relaxed) { SEGMENTS } else { 1 };
        for run in outbox.runs(limit) {
            if !run.is_one() {
                match self.send_by_lane(main, run.to, run.bytes, run.segment) {
                    Ok(()) => continue,
                    Err(error) if is_full(&error) => continue,
                    Err(error) => self.run_failed(&error),
                }
            }
            for datagram in run.datagrams() {
                self.send_one(main, datagram, run.to, device);
            }
        }
    }

    /// A run may fail where its datagrams do not: they are too long for the path and have to
    /// be fragmented, or the device cannot do checksums (EIO), and then it never can.
    fn run_failed(&self, error: &io::Error) {
        if error.raw_os_error() == Some(libc::EIO) && self.segments.swap(false, Ordering::Relaxed) {
            tracing::info!(%error, "sending datagrams one by one");
        }
    }

    fn send_one(&self, main: &Pair, bytes: &[u8], to: &Destination, device: &Device) {
        let Err(error) = self.send_by_lane(main, to, bytes, bytes.len()) else { return };
        if let (Some(source), true) = (to.endpoint.source, is_lost_source(&error)) {
            if let Some(peer) = to.peer {
                device.forget_source(peer, source);
            }
            let to = Destination { endpoint: Endpoint { source: None, ..to.endpoint }, ..*to };
            if self.send_by_lane(main, &to, bytes, bytes.len()).is_ok() {
                return;
            }
        }
        tracing::debug!(to = %to.endpoint.address, %error, "datagram not sent");
    }

    /// Sends by a worker's sockets, or by a lane, if there was no room for the peer of late.
    fn send_by_lane(
        &self,
        main: &Pair,
        to: &Destination,
        bytes: &[u8],
        segment: usize,
    ) -> io::Result<()> {
        if !to.peer.is_some_and(|peer| self.slow.has(peer)) {
            match send_to(main, to, bytes, segment) {
                Err(error) if is_full(&error) => to.peer.map(|peer| self.slow.insert(peer)),
                result => return result,
            };
        }
        let Some((peer, lane)) = to.peer.and_then(|peer| Some((peer, self.lane(peer)?))) else {
            return Err(Errno::EAGAIN.into());
        };
        let result = send_to(lane, to, bytes, segment);
        if result.as_ref().is_err_and(is_full) {
            self.slow.insert(peer);
        }
        result
    }

    fn lane(&self, peer: PeerId) -> Option<&Pair> {
        if !self.is_shared {
            return None;
        }
        let lane = self.lanes.get((peer.index() % LANES) as usize)?;
        let how = How { fwmark: self.fwmark.load(Ordering::Relaxed), merges: self.merges };
        lane.get_or_init(|| Pair::of(self.port, how, Role::Slow).ok()).as_ref()
    }
}

impl Slow {
    fn insert(&self, peer: PeerId) {
        self.until.lock().insert(peer, Instant::now() + SLOW_FOR);
        self.any.store(true, Ordering::Relaxed);
    }

    fn has(&self, peer: PeerId) -> bool {
        if !self.any.load(Ordering::Relaxed) {
            return false;
        }
        let mut until = self.until.lock();
        let is_slow = until.get(&peer).is_some_and(|until| *until > Instant::now());
        if !is_slow && until.remove(&peer).is_some() {
            self.any.store(!until.is_empty(), Ordering::Relaxed);
        }
        is_slow
    }
}

fn send_to(pair: &Pair, to: &Destination, bytes: &[u8], segment: usize) -> io::Result<()> {
    let Some(socket) = pair.to(&to.endpoint.address) else {
        return Err(Errno::EAFNOSUPPORT.into());
    };
    send_message(socket.as_raw_fd(), bytes, segment, to)
}

/// Whether there was no room for a datagram.
fn is_full(error: &io::Error) -> bool {
    matches!(error.raw_os_error().map(Errno::from_raw), Some(Errno::EAGAIN | Errno::ENOBUFS))
}

/// Whether a send failed as it does when its source address is not ours any more.
fn is_lost_source(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error().map(Errno::from_raw),
        Some(
            Errno::EINVAL
                | Errno::EADDRNOTAVAIL
                | Errno::ENETUNREACH
                | Errno::EHOSTUNREACH
                | Errno::ENODEV
                | Errno::ENXIO
        )
    )
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use super::*;
    use crate::device::Origin;
    use crate::endpoint::Source;

    fn exchange(segment: usize, lengths: &[usize]) {
        let how = How { fwmark: 0, merges: segment > 1 };
        let bind = || Sockets::bind(0, how, 1, segment > 1).unwrap();
        let (receiver, sender) = (bind(), bind());
        let source = Source::new([127, 0, 0, 5].into(), 0);
        let address = SocketAddr::from(([127, 0, 0, 7], receiver.port()));
        let mut outbox = Outbox::new();
        for (n, len) in (1..).zip(lengths) {
            outbox.space(*len).fill(n);
            let to = Endpoint { address, source: Some(source) };
            outbox.commit(*len, Destination { endpoint: to, peer: None, tos: 0x02 });
        }
        sender.send(0, &outbox, &Device::new(1420));
        let mut buffers = Receiver::new();
        let mut got = Vec::new();
        while got.len() < lengths.len() {
            let socket = receiver.descriptors(0).next().unwrap();
            crate::worker::wait(&[socket]).unwrap();
            buffers.receive(socket).unwrap();
            got.extend(buffers.datagrams().map(|datagram| {
                let from = SocketAddr::from(([127, 0, 0, 5], sender.port()));
                let to = Some(Source::new([127, 0, 0, 7].into(), 1));
                assert_eq!(*datagram.origin, Origin { from, to, ecn: 2 });
                datagram.bytes.to_vec()
            }));
        }
        let sent: Vec<_> = outbox.datagrams().map(|(bytes, _)| bytes.to_vec()).collect();
        assert_eq!(got, sent);
    }

    #[test]
    fn what_a_peer_sends_goes_to_one_worker_and_peers_are_spread() {
        const WORKERS: usize = 4;
        let how = How { fwmark: 0, merges: true };
        let bind = |workers| Sockets::bind(0, how, workers, true).unwrap();
        for (ours, family) in [("127.0.0.7", 0), ("::1", 1)] {
            let receiver = bind(WORKERS);
            let address = SocketAddr::new(ours.parse().unwrap(), receiver.port());
            let senders: Vec<_> = (0..32).map(|_| bind(1)).collect();
            for sender in senders.iter().flat_map(|sender| [sender; 3]) {
                let mut outbox = Outbox::new();
                outbox.space(100).fill(1);
                let endpoint = Endpoint::new(address);
                outbox.commit(100, Destination { endpoint, peer: None, tos: 0 });
                sender.send(0, &outbox, &Device::new(1420));
            }
            let mut buffers = Receiver::new();
            let mut workers = HashMap::<u16, Vec<usize>>::new();
            for worker in 0..WORKERS {
                let socket = receiver.descriptors(worker).nth(family).unwrap();
                for _ in 0..32 {
                    buffers.receive(socket).unwrap();
                    for datagram in buffers.datagrams() {
                        workers.entry(datagram.origin.from.port()).or_default().push(worker);
                    }
                }
            }
            assert_eq!(workers.len(), senders.len());
            assert!(
                workers
                    .values()
                    .all(|seen| seen.len() == 3 && seen.windows(2).all(|w| w[0] == w[1]))
            );
            let used: std::collections::HashSet<_> = workers.values().map(|seen| seen[0]).collect();
            assert_eq!(used.len(), WORKERS);
        }
    }

    #[test]
    fn datagrams_arrive_as_they_were_sent_in_runs_or_one_by_one() {
        for segment in [1, SEGMENTS] {
            exchange(segment, &[100]);
            exchange(segment, &[1000; 200]);
            exchange(segment, &[500, 500, 500, 32, 500, 1400, 1400, 60_000, 60_000, 32]);
        }
    }
}
