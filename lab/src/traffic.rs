//! Numbered UDP packets between pods: what was sent, and what of it arrived, once and
//! unchanged. The proof of no loss.

use std::io;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use nix::sys::socket::{setsockopt, sockopt};
use serde::Serialize;

use super::error::LabError;
use super::node::Pod;
use super::report::{BAD, GOOD, new_table};
use super::wait::until;

/// Identifier, number and filling.
const HEADER: usize = 16;
/// Socket buffers in bytes, so that what gets lost was lost on the way.
const BUFFER: usize = 16 << 20;
/// How often a receiver looks whether it should end.
const TICK: Duration = Duration::from_millis(50);
/// How far a sender that was held up may fall behind its rate and still catch up.
const LONGEST_LAG: Duration = Duration::from_millis(5);
/// Pause between bursts of a fast sender.
const SHORTEST_PAUSE: Duration = Duration::from_micros(500);

/// How the packets are sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rate {
    /// Packets per second in each direction.
    pub packets_per_second: u32,
    /// UDP payload in bytes, at least 16.
    pub payload: usize,
}

impl Default for Rate {
    fn default() -> Self {
        Self { packets_per_second: 1000, payload: 256 }
    }
}

/// What became of the packets from one pod to another over one address family.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct FlowReport {
    /// The sender.
    pub from: String,
    /// The receiver.
    pub to: String,
    /// The receiver's address.
    pub address: IpAddr,
    /// Packets sent, or refused to the sender.
    pub sent: u64,
    /// Different packets received.
    pub received: u64,
    /// Packets sent and never received.
    pub lost: u64,
    /// Packets received again.
    pub duplicated: u64,
    /// Packets with a wrong content.
    pub corrupt: u64,
    /// Packets that the sender's kernel refused. They are among the lost.
    pub refused: u64,
    /// Longest time between two packets that arrived, in milliseconds.
    pub longest_gap_ms: u64,
}

impl FlowReport {
    /// Whether every packet arrived once and unchanged.
    pub fn is_perfect(&self) -> bool {
        self.sent > 0
            && self.received == self.sent
            && (self.lost, self.duplicated, self.corrupt, self.refused) == (0, 0, 0, 0)
    }
}

/// Running traffic. Ends when it is dropped.
#[derive(Debug)]
pub struct Traffic {
    window: u64,
    stop_sending: Arc<AtomicBool>,
    stop_receiving: Arc<AtomicBool>,
    flows: Vec<Flow>,
}

#[derive(Debug)]
struct Flow {
    from: String,
    to: String,
    address: IpAddr,
    sent: Arc<AtomicU64>,
    received: Arc<AtomicU64>,
    sender: Option<JoinHandle<Sent>>,
    receiver: Option<JoinHandle<Received>>,
}

#[derive(Debug, Default, Clone, Copy)]
struct Sent {
    packets: u64,
    refused: u64,
}

#[derive(Debug, Default, Clone, Copy)]
struct Received {
    different: u64,
    duplicated: u64,
    corrupt: u64,
    longest_gap: Duration,
}

impl Traffic {
    /// Starts sending between these pods, both ways and over every address family they have.
    pub fn start(pairs: &[(Pod<'_>, Pod<'_>)], rate: Rate) -> Result<Self, LabError> {
        Self::start_within(pairs, rate, u64::MAX)
    }

    /// As [`Traffic::start`], with at most `window` packets of a flow on their way, which
    /// includes the lost. A machine too slow for the rate then sends less, instead of losing
    /// packets in full queues: whatever is lost was lost for another reason.
    pub fn start_within(
        pairs: &[(Pod<'_>, Pod<'_>)],
        rate: Rate,
        window: u64,
    ) -> Result<Self, LabError> {
        let mut traffic = Self {
            window,
            stop_sending: Arc::default(),
            stop_receiving: Arc::default(),
            flows: Vec::new(),
        };
        for (a, b) in pairs {
            for (from, to) in [(a, b), (b, a)] {
                for (source, target) in from.addresses().into_iter().zip(to.addresses()) {
                    traffic.add(from, to, source, target, rate)?;
                }
            }
        }
        Ok(traffic)
    }

    /// Packets sent and received so far, over all flows.
    pub fn so_far(&self) -> (u64, u64) {
        let sum = |counter: fn(&Flow) -> &AtomicU64| {
            self.flows.iter().map(|flow| counter(flow).load(Ordering::Relaxed)).sum()
        };
        (sum(|flow| &flow.sent), sum(|flow| &flow.received))
    }

    /// Stops sending, gives what is still on its way `grace`, and reports each flow.
    pub fn finish(mut self, grace: Duration) -> Vec<FlowReport> {
        self.end(grace)
    }

    fn end(&mut self, grace: Duration) -> Vec<FlowReport> {
        self.stop_sending.store(true, Ordering::Relaxed);
        let mut flows = std::mem::take(&mut self.flows);
        let sent: Vec<Sent> = flows.iter_mut().map(|flow| result(flow.sender.take())).collect();
        let all_arrived = || {
            let mut pairs = flows.iter().zip(&sent);
            pairs
                .all(|(flow, sent)| flow.received.load(Ordering::Relaxed) >= sent.packets)
                .then_some(())
        };
        // Whether all arrived in time is what the report says.
        let _ = until(Instant::now() + grace, all_arrived);
        self.stop_receiving.store(true, Ordering::Relaxed);
        let reports = flows.iter_mut().zip(sent).map(|(flow, sent)| {
            let received = result(flow.receiver.take());
            FlowReport {
                from: std::mem::take(&mut flow.from),
                to: std::mem::take(&mut flow.to),
                address: flow.address,
                sent: sent.packets,
                received: received.different,
                lost: sent.packets.saturating_sub(received.different),
                duplicated: received.duplicated,
                corrupt: received.corrupt,
                refused: sent.refused,
                longest_gap_ms: received.longest_gap.as_millis().try_into().unwrap_or(u64::MAX),
            }
        });
        reports.collect()
    }

    fn add(
        &mut self,
        from: &Pod<'_>,
        to: &Pod<'_>,
        source: IpAddr,
        target: IpAddr,
        rate: Rate,
    ) -> Result<(), LabError> {
        let failed = |source| LabError::Measure {
            what: format!("send packets from {} to {}", from.name(), to.name()),
            source,
        };
        let receiving = to.netns().run(|| socket(target))?.map_err(failed)?;
        let sending = from.netns().run(|| socket(source))?.map_err(failed)?;
        let port = receiving.local_addr().map_err(failed)?.port();
        sending.connect(SocketAddr::new(target, port)).map_err(failed)?;
        let identifier = rand::random();
        let (sent, received) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
        let receiver = Receiver {
            socket: receiving,
            identifier,
            payload: rate.payload.max(HEADER),
            stop: Arc::clone(&self.stop_receiving),
            count: Arc::clone(&received),
        };
        let sender = Sender {
            socket: sending,
            identifier,
            rate,
            stop: Arc::clone(&self.stop_sending),
            count: Arc::clone(&sent),
            arrived: Arc::clone(&received),
            window: self.window,
        };
        let name = |what| thread::Builder::new().name(format!("{what}-{}", to.name()));
        let receiver = name("receive").spawn(move || receiver.run()).map_err(failed)?;
        let sender = name("send").spawn(move || sender.run()).map_err(failed)?;
        self.flows.push(Flow {
            from: from.name(),
            to: to.name(),
            address: target,
            sent,
            received,
            sender: Some(sender),
            receiver: Some(receiver),
        });
        Ok(())
    }
}

impl Drop for Traffic {
    fn drop(&mut self) {
        self.end(Duration::ZERO);
    }
}

/// The reports as a table.
pub fn report_table(reports: &[FlowReport]) -> String {
    let header = ["from", "to", "sent", "lost", "twice", "corrupt", "longest gap", ""];
    let mut table = new_table(&header);
    for report in reports {
        table.add_row([
            report.from.clone(),
            format!("{} {}", report.to, report.address),
            report.sent.to_string(),
            report.lost.to_string(),
            report.duplicated.to_string(),
            report.corrupt.to_string(),
            format!("{} ms", report.longest_gap_ms),
            if report.is_perfect() { GOOD } else { BAD }.to_owned(),
        ]);
    }
    table.to_string()
}

fn result<T: Default>(thread: Option<JoinHandle<T>>) -> T {
    thread
        .map(|thread| thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
        .unwrap_or_default()
}

fn socket(address: IpAddr) -> io::Result<UdpSocket> {
    let socket = UdpSocket::bind((address, 0))?;
    setsockopt(&socket, sockopt::RcvBufForce, &BUFFER)?;
    setsockopt(&socket, sockopt::SndBuf, &BUFFER)?;
    Ok(socket)
}

struct Sender {
    socket: UdpSocket,
    identifier: u64,
    rate: Rate,
    stop: Arc<AtomicBool>,
    count: Arc<AtomicU64>,
    arrived: Arc<AtomicU64>,
    window: u64,
}

impl Sender {
    fn run(self) -> Sent {
        let mut sent = Sent::default();
        let mut packet = vec![0; self.rate.payload.max(HEADER)];
        let interval = Duration::from_secs(1) / self.rate.packets_per_second.max(1);
        let mut due = Instant::now();
        while !self.stop.load(Ordering::Relaxed) {
            let on_their_way = sent.packets.saturating_sub(self.arrived.load(Ordering::Relaxed));
            if on_their_way >= self.window {
                thread::sleep(SHORTEST_PAUSE);
                continue;
            }
            let now = Instant::now();
            if due > now + SHORTEST_PAUSE {
                thread::sleep(due - now);
            }
            // A sender that was held up does not make up for it with a burst: that would
            // measure queues.
            due = (due + interval).max(now.checked_sub(LONGEST_LAG).unwrap_or(now));
            fill(&mut packet, self.identifier, sent.packets);
            if !self.send(&packet) {
                sent.refused += 1;
            }
            sent.packets += 1;
            self.count.store(sent.packets, Ordering::Relaxed);
        }
        sent
    }

    /// An error that an earlier packet met is reported to the next call, once, instead of
    /// sending. It says nothing about this packet.
    fn send(&self, packet: &[u8]) -> bool {
        (0..2).any(|_| self.socket.send(packet).is_ok())
    }
}

struct Receiver {
    socket: UdpSocket,
    identifier: u64,
    payload: usize,
    stop: Arc<AtomicBool>,
    count: Arc<AtomicU64>,
}

impl Receiver {
    fn run(self) -> Received {
        let mut received = Received::default();
        let mut seen = Vec::new();
        let mut last: Option<Instant> = None;
        let mut packet = vec![0; (1 << 16) + 1];
        let mut expected = vec![0; self.payload];
        // Without a time limit the thread would never end, and the traffic with it.
        if self.socket.set_read_timeout(Some(TICK)).is_err() {
            return received;
        }
        loop {
            let Ok(length) = self.socket.recv(&mut packet) else {
                if self.stop.load(Ordering::Relaxed) {
                    return received;
                }
                continue;
            };
            let number = packet[8..HEADER].try_into().map_or(u64::MAX, u64::from_be_bytes);
            fill(&mut expected, self.identifier, number);
            if packet[..length] != expected {
                received.corrupt += 1;
                continue;
            }
            let now = Instant::now();
            let gap = last.replace(now).map_or(Duration::ZERO, |last| now - last);
            received.longest_gap = received.longest_gap.max(gap);
            if mark(&mut seen, number) {
                received.different += 1;
                self.count.store(received.different, Ordering::Relaxed);
            } else {
                received.duplicated += 1;
            }
        }
    }
}

/// Whether this number is new.
fn mark(seen: &mut Vec<bool>, number: u64) -> bool {
    let Ok(index) = usize::try_from(number) else { return false };
    if index >= seen.len() {
        seen.resize(index + 1, false);
    }
    !std::mem::replace(&mut seen[index], true)
}

/// Everything in a packet follows from its flow and its number.
fn fill(packet: &mut [u8], identifier: u64, number: u64) {
    let mut state = identifier ^ number.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    for chunk in packet[HEADER..].chunks_mut(8) {
        // xorshift64: cheap, and no two packets are alike.
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        chunk.copy_from_slice(&state.to_be_bytes()[..chunk.len()]);
    }
    packet[..8].copy_from_slice(&identifier.to_be_bytes());
    packet[8..HEADER].copy_from_slice(&number.to_be_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packets_differ_and_numbers_count_once() {
        let (mut a, mut b) = (vec![0; 64], vec![0; 64]);
        fill(&mut a, 7, 1);
        fill(&mut b, 7, 2);
        assert_ne!(a[HEADER..], b[HEADER..]);
        let mut seen = Vec::new();
        assert!(mark(&mut seen, 5));
        assert!(mark(&mut seen, 0));
        assert!(!mark(&mut seen, 5));
    }
}
