//! A flow of numbered packets through a tunnel: how many arrive, and when.

use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle, sleep};
use std::time::{Duration, Instant};

/// Bytes of each packet.
const SIZE: usize = 256;
/// For how long packets under way are waited for.
const GRACE: Duration = Duration::from_secs(1);

/// What became of a flow.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Outcome {
    /// Parts of a hundred.
    pub(crate) lost: f64,
    /// From one end to the other.
    pub(crate) median: Duration,
    /// Of a hundred packets, one took longer.
    pub(crate) slowest: Duration,
}

/// A running flow.
pub(crate) struct Flow {
    stop: Arc<AtomicBool>,
    sender: JoinHandle<u64>,
    receiver: JoinHandle<Vec<Duration>>,
}

impl Flow {
    /// Sends so many packets a second from one socket to the other.
    pub(crate) fn start(from: UdpSocket, to: UdpSocket, per_second: u32) -> io::Result<Self> {
        let address = to.local_addr()?;
        to.set_read_timeout(Some(GRACE))?;
        let (stop, epoch) = (Arc::new(AtomicBool::new(false)), Instant::now());
        let asked = Arc::clone(&stop);
        let interval = Duration::from_secs(1) / per_second;
        Ok(Self {
            stop,
            sender: thread::spawn(move || send(&from, address, interval, epoch, &asked)),
            receiver: thread::spawn(move || receive(&to, epoch)),
        })
    }

    pub(crate) fn finish(self) -> io::Result<Outcome> {
        self.stop.store(true, Ordering::Relaxed);
        let ended = || io::Error::other("a thread of the flow has ended");
        let sent = self.sender.join().map_err(|_| ended())?;
        let mut times = self.receiver.join().map_err(|_| ended())?;
        times.sort_unstable();
        let at = |part: usize| times.get(times.len() * part / 100).copied().unwrap_or_default();
        let lost = sent.saturating_sub(times.len() as u64);
        Ok(Outcome {
            lost: 100.0 * lost as f64 / sent.max(1) as f64,
            median: at(50),
            slowest: at(99),
        })
    }
}

fn send(
    socket: &UdpSocket,
    to: SocketAddr,
    interval: Duration,
    epoch: Instant,
    stop: &AtomicBool,
) -> u64 {
    let (mut sent, mut packet) = (0, [0; SIZE]);
    let mut due = epoch.elapsed();
    while !stop.load(Ordering::Relaxed) {
        sleep(due.saturating_sub(epoch.elapsed()));
        due += interval;
        let now = u64::try_from(epoch.elapsed().as_nanos()).unwrap_or(u64::MAX);
        packet[..8].copy_from_slice(&now.to_le_bytes());
        // A packet that is refused is lost.
        let _ = socket.send_to(&packet, to);
        sent += 1;
    }
    sent
}

/// Until nothing has come for a while.
fn receive(socket: &UdpSocket, epoch: Instant) -> Vec<Duration> {
    let (mut times, mut packet) = (Vec::new(), [0; SIZE]);
    while socket.recv(&mut packet).is_ok() {
        let sent = packet.first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes));
        times.push(epoch.elapsed().saturating_sub(Duration::from_nanos(sent)));
    }
    times
}
