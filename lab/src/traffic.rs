//! Numbered UDP packets between pods: what was sent, and what of it arrived, once and
//! unchanged. The proof of no loss.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, HashMap};
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
///
/// A pod has one thread that sends to all others and one that receives from them, so that the
/// packets cost the machine more than their generator does.
#[derive(Debug)]
pub struct Traffic {
    stop_sending: Arc<AtomicBool>,
    stop_receiving: Arc<AtomicBool>,
    flows: Vec<Flow>,
    senders: Vec<JoinHandle<Vec<Sent>>>,
    receivers: Vec<JoinHandle<Vec<Received>>>,
}

#[derive(Debug)]
struct Flow {
    from: String,
    to: String,
    address: IpAddr,
    counters: Arc<Counters>,
}

#[derive(Debug, Default)]
struct Counters {
    sent: AtomicU64,
    received: AtomicU64,
}

/// What became of the flow with this index.
#[derive(Debug, Default, Clone, Copy)]
struct Sent {
    flow: usize,
    packets: u64,
    refused: u64,
}

/// What became of the flow with this index.
#[derive(Debug, Default, Clone, Copy)]
struct Received {
    flow: usize,
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
        let mut crew = Crew::new(rate, window);
        for (a, b) in pairs {
            for (from, to) in [(a, b), (b, a)] {
                for (source, target) in from.addresses().into_iter().zip(to.addresses()) {
                    crew.add(from, to, source, target)?;
                }
            }
        }
        crew.start()
    }

    /// Packets sent and received so far, over all flows.
    pub fn so_far(&self) -> (u64, u64) {
        let sum = |counter: fn(&Counters) -> &AtomicU64| {
            self.flows.iter().map(|flow| counter(&flow.counters).load(Ordering::Relaxed)).sum()
        };
        (sum(|counters| &counters.sent), sum(|counters| &counters.received))
    }

    /// Stops sending, gives what is still on its way `grace`, and reports each flow.
    pub fn finish(mut self, grace: Duration) -> Vec<FlowReport> {
        self.end(grace)
    }

    fn end(&mut self, grace: Duration) -> Vec<FlowReport> {
        self.stop_sending.store(true, Ordering::Relaxed);
        let mut sent = results(&mut self.senders);
        sent.sort_by_key(|sent| sent.flow);
        let all_arrived = || {
            let mut pairs = self.flows.iter().zip(&sent);
            pairs
                .all(|(flow, sent)| flow.counters.received.load(Ordering::Relaxed) >= sent.packets)
                .then_some(())
        };
        // Whether all arrived in time is what the report says.
        let _ = until(Instant::now() + grace, all_arrived);
        self.stop_receiving.store(true, Ordering::Relaxed);
        let mut received = results(&mut self.receivers);
        received.sort_by_key(|received| received.flow);
        let flows = std::mem::take(&mut self.flows);
        let all = flows.into_iter().zip(sent).zip(received);
        all.map(|((flow, sent), received)| report(flow, sent, received)).collect()
    }
}

impl Drop for Traffic {
    fn drop(&mut self) {
        self.end(Duration::ZERO);
    }
}

fn report(flow: Flow, sent: Sent, received: Received) -> FlowReport {
    FlowReport {
        from: flow.from,
        to: flow.to,
        address: flow.address,
        sent: sent.packets,
        received: received.different,
        lost: sent.packets.saturating_sub(received.different),
        duplicated: received.duplicated,
        corrupt: received.corrupt,
        refused: sent.refused,
        longest_gap_ms: received.longest_gap.as_millis().try_into().unwrap_or(u64::MAX),
    }
}

/// The threads to be, one sender and one receiver for each address of a pod.
struct Crew {
    rate: Rate,
    window: u64,
    stop_sending: Arc<AtomicBool>,
    stop_receiving: Arc<AtomicBool>,
    flows: Vec<Flow>,
    senders: BTreeMap<(String, IpAddr), Sender>,
    receivers: BTreeMap<(String, IpAddr), Receiver>,
}

impl Crew {
    fn new(rate: Rate, window: u64) -> Self {
        Self {
            rate,
            window,
            stop_sending: Arc::default(),
            stop_receiving: Arc::default(),
            flows: Vec::new(),
            senders: BTreeMap::new(),
            receivers: BTreeMap::new(),
        }
    }

    fn add(
        &mut self,
        from: &Pod<'_>,
        to: &Pod<'_>,
        source: IpAddr,
        target: IpAddr,
    ) -> Result<(), LabError> {
        let failed = |source| LabError::Measure {
            what: format!("send packets from {} to {}", from.name(), to.name()),
            source,
        };
        let receiver = match self.receivers.entry((to.name(), target)) {
            Entry::Occupied(entry) => entry.into_mut(),
            Entry::Vacant(entry) => {
                let socket = to.netns().run(|| socket(target))?.map_err(failed)?;
                entry.insert(Receiver {
                    socket,
                    payload: self.rate.payload.max(HEADER),
                    stop: Arc::clone(&self.stop_receiving),
                    flows: HashMap::new(),
                })
            }
        };
        let sender = match self.senders.entry((from.name(), source)) {
            Entry::Occupied(entry) => entry.into_mut(),
            Entry::Vacant(entry) => {
                let socket = from.netns().run(|| socket(source))?.map_err(failed)?;
                entry.insert(Sender {
                    socket,
                    rate: self.rate,
                    window: self.window,
                    stop: Arc::clone(&self.stop_sending),
                    flows: Vec::new(),
                })
            }
        };
        let port = receiver.socket.local_addr().map_err(failed)?.port();
        let (flow, identifier) = (self.flows.len(), rand::random());
        let counters = Arc::<Counters>::default();
        receiver.flows.insert(identifier, Incoming::new(flow, Arc::clone(&counters)));
        sender.flows.push(Outgoing {
            to: SocketAddr::new(target, port),
            identifier,
            counters: Arc::clone(&counters),
            sent: Sent { flow, ..Sent::default() },
        });
        self.flows.push(Flow { from: from.name(), to: to.name(), address: target, counters });
        Ok(())
    }

    fn start(self) -> Result<Traffic, LabError> {
        let mut traffic = Traffic {
            stop_sending: self.stop_sending,
            stop_receiving: self.stop_receiving,
            flows: self.flows,
            senders: Vec::new(),
            receivers: Vec::new(),
        };
        let failed =
            |source| LabError::Measure { what: "start a thread that counts".to_owned(), source };
        let name = |what, pod: &str| thread::Builder::new().name(format!("{what}-{pod}"));
        for ((pod, _), receiver) in self.receivers {
            let thread = name("receive", &pod).spawn(move || receiver.run()).map_err(failed)?;
            traffic.receivers.push(thread);
        }
        for ((pod, _), sender) in self.senders {
            let thread = name("send", &pod).spawn(move || sender.run()).map_err(failed)?;
            traffic.senders.push(thread);
        }
        Ok(traffic)
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

fn results<T>(threads: &mut Vec<JoinHandle<Vec<T>>>) -> Vec<T> {
    let ended = threads
        .drain(..)
        .flat_map(|thread| thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
    ended.collect()
}

fn socket(address: IpAddr) -> io::Result<UdpSocket> {
    let socket = UdpSocket::bind((address, 0))?;
    setsockopt(&socket, sockopt::RcvBufForce, &BUFFER)?;
    setsockopt(&socket, sockopt::SndBuf, &BUFFER)?;
    Ok(socket)
}

struct Sender {
    socket: UdpSocket,
    rate: Rate,
    window: u64,
    stop: Arc<AtomicBool>,
    flows: Vec<Outgoing>,
}

struct Outgoing {
    to: SocketAddr,
    identifier: u64,
    counters: Arc<Counters>,
    sent: Sent,
}

impl Sender {
    fn run(mut self) -> Vec<Sent> {
        let mut packet = vec![0; self.rate.payload.max(HEADER)];
        let interval = Duration::from_secs(1) / self.rate.packets_per_second.max(1);
        let mut due = Instant::now();
        while !self.stop.load(Ordering::Relaxed) {
            let now = Instant::now();
            if due > now + SHORTEST_PAUSE {
                thread::sleep(due - now);
            }
            // A sender that was held up does not make up for it with a burst: that would
            // measure queues.
            due = (due + interval).max(now.checked_sub(LONGEST_LAG).unwrap_or(now));
            let mut is_idle = true;
            for flow in &mut self.flows {
                if flow.on_their_way() < self.window {
                    flow.send(&self.socket, &mut packet);
                    is_idle = false;
                }
            }
            if is_idle {
                thread::sleep(SHORTEST_PAUSE);
            }
        }
        self.flows.into_iter().map(|flow| flow.sent).collect()
    }
}

impl Outgoing {
    fn on_their_way(&self) -> u64 {
        self.sent.packets.saturating_sub(self.counters.received.load(Ordering::Relaxed))
    }

    fn send(&mut self, socket: &UdpSocket, packet: &mut [u8]) {
        fill(packet, self.identifier, self.sent.packets);
        if socket.send_to(packet, self.to).is_err() {
            self.sent.refused += 1;
        }
        self.sent.packets += 1;
        self.counters.sent.store(self.sent.packets, Ordering::Relaxed);
    }
}

struct Receiver {
    socket: UdpSocket,
    payload: usize,
    stop: Arc<AtomicBool>,
    /// By identifier.
    flows: HashMap<u64, Incoming>,
}

struct Incoming {
    counters: Arc<Counters>,
    seen: Vec<bool>,
    last: Option<Instant>,
    received: Received,
}

impl Receiver {
    fn run(mut self) -> Vec<Received> {
        let mut packet = vec![0; (1 << 16) + 1];
        let mut expected = vec![0; self.payload];
        // Without a time limit the thread would never end, and the traffic with it.
        if self.socket.set_read_timeout(Some(TICK)).is_ok() {
            loop {
                match self.socket.recv(&mut packet) {
                    Ok(length) => self.take(&packet[..length], &mut expected),
                    Err(_) if self.stop.load(Ordering::Relaxed) => break,
                    Err(_) => {}
                }
            }
        }
        self.flows.into_values().map(|flow| flow.received).collect()
    }

    fn take(&mut self, packet: &[u8], expected: &mut [u8]) {
        let word = |at: usize| {
            let bytes = packet.get(at..at + 8).and_then(|bytes| bytes.try_into().ok());
            bytes.map_or(u64::MAX, u64::from_be_bytes)
        };
        let (identifier, number) = (word(0), word(8));
        let Some(flow) = self.flows.get_mut(&identifier) else {
            // Nobody's: it counts against one of those that it may have been for.
            self.flows.values_mut().take(1).for_each(|flow| flow.received.corrupt += 1);
            return;
        };
        fill(expected, identifier, number);
        if packet == expected { flow.count(number) } else { flow.received.corrupt += 1 }
    }
}

impl Incoming {
    fn new(flow: usize, counters: Arc<Counters>) -> Self {
        let received = Received { flow, ..Received::default() };
        Self { counters, seen: Vec::new(), last: None, received }
    }

    fn count(&mut self, number: u64) {
        let now = Instant::now();
        let gap = self.last.replace(now).map_or(Duration::ZERO, |last| now - last);
        self.received.longest_gap = self.received.longest_gap.max(gap);
        if mark(&mut self.seen, number) {
            self.received.different += 1;
            self.counters.received.store(self.received.different, Ordering::Relaxed);
        } else {
            self.received.duplicated += 1;
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
