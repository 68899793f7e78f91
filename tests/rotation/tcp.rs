//! TCP streams between pods: what they sent, again or not, and what of it arrived.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use gambeson_lab::{Lab, Netns, Pod};

/// Bytes of each write, with a pause between two: a stream that never waits for the other end.
const CHUNK: usize = 4096;
const PAUSE: Duration = Duration::from_millis(10);

/// Of an IPv4 and a TCP header with timestamps, bytes.
const HEADERS: u64 = 20 + 32;
/// For what is under way when a stream ends.
const PATIENCE: Duration = Duration::from_secs(10);

/// What became of streams.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Streamed {
    /// Payload, each time that it was sent, bytes.
    pub(crate) sent: u64,
    /// Payload that reached the other end, each time, bytes.
    pub(crate) arrived: u64,
    /// Packets whose checksum was wrong there.
    pub(crate) damaged: u64,
    /// Segments that were sent again: an answer was late, by the two milliseconds that Linux
    /// waits where the way takes 70 microseconds.
    again: u64,
    /// Those of which the other end said that it had them already (DSACK, RFC 2883). Of two that
    /// come before it answers it may name one, so that a few are missing on a busy machine.
    needless: u64,
}

/// One stream from the first pod of each node to that of the next.
pub(crate) struct Streams {
    stop: Arc<AtomicBool>,
    senders: Vec<JoinHandle<Streamed>>,
}

impl Streams {
    pub(crate) fn start(lab: &Lab) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let pods: Vec<Pod<'_>> = lab.nodes().iter().map(|node| node.pods()[0]).collect();
        let next = pods.iter().cycle().skip(1);
        let senders = pods.iter().zip(next).map(|(from, to)| stream(*from, *to, &stop)).collect();
        Self { stop, senders }
    }

    /// Ends them.
    pub(crate) fn finish(self) -> Streamed {
        self.stop.store(true, Ordering::Relaxed);
        let ended = self.senders.into_iter().map(|sender| sender.join().unwrap());
        ended.fold(Streamed::default(), |sum, one| Streamed {
            sent: sum.sent + one.sent,
            arrived: sum.arrived + one.arrived,
            damaged: sum.damaged + one.damaged,
            again: sum.again + one.again,
            needless: sum.needless + one.needless,
        })
    }
}

fn stream(from: Pod<'_>, to: Pod<'_>, stop: &Arc<AtomicBool>) -> JoinHandle<Streamed> {
    let address = to.addresses()[0];
    let listener = to.netns().run(|| TcpListener::bind((address, 0))).unwrap().unwrap();
    let (receiver, to) = (to.netns(), listener.local_addr().unwrap());
    count(&receiver, to);
    thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut buffer = vec![0; 1 << 16];
        while stream.read(&mut buffer).unwrap() > 0 {}
    });
    let (netns, stop) = (from.netns(), Arc::clone(stop));
    thread::spawn(move || {
        let mut stream = netns.run(|| TcpStream::connect(to)).unwrap().unwrap();
        while !stop.load(Ordering::Relaxed) {
            stream.write_all(&[7; CHUNK]).unwrap();
            thread::sleep(PAUSE);
        }
        // What is under way arrives yet, or never.
        let mut streamed = became(&netns, &receiver, to);
        let deadline = Instant::now() + PATIENCE;
        while streamed.sent != streamed.arrived && Instant::now() < deadline {
            thread::sleep(PAUSE);
            streamed = became(&netns, &receiver, to);
        }
        streamed
    })
}

/// Counts what comes for a port, whole packets and merged ones alike, but for the SYN, which has
/// more options.
fn count(receiver: &Netns, to: SocketAddr) {
    let rules = format!(
        "table inet streams {{ chain in {{ type filter hook input priority 0; \
         tcp dport {} tcp flags & syn == 0 counter; }}; }}",
        to.port()
    );
    said(receiver, "nft", &[&rules]);
}

/// What `ss` says of the connection, each absent for none: `bytes_sent:N`, `retrans:NOW/ALL` and
/// `dsack_dups:N`; and what the other end has counted.
fn became(sender: &Netns, receiver: &Netns, to: SocketAddr) -> Streamed {
    let text = said(sender, "ss", &["-Htin", "dst", &to.to_string()]);
    assert!(text.contains("bytes_acked"), "no connection to {to}: {text}");
    let value = |name: &str| {
        let mut words = text.split_whitespace().filter_map(|word| word.strip_prefix(name));
        words.next().map_or(0, |value| value.rsplit('/').next().unwrap().parse().unwrap())
    };
    let counted = said(receiver, "nft", &["list chain inet streams in"]);
    let after = |text: &str, name: &str| -> u64 {
        let mut words = text.split_whitespace().skip_while(|word| *word != name);
        words.nth(1).and_then(|number| number.parse().ok()).unwrap()
    };
    let errors = said(receiver, "nstat", &["-asz", "TcpInCsumErrors"]);
    Streamed {
        sent: value("bytes_sent:"),
        // Each packet, or merged ones, has one header.
        arrived: after(&counted, "bytes") - HEADERS * after(&counted, "packets"),
        damaged: after(&errors, "TcpInCsumErrors"),
        again: value("retrans:"),
        needless: value("dsack_dups:"),
    }
}

/// What a command says in a namespace.
fn said(netns: &Netns, program: &str, arguments: &[&str]) -> String {
    let command = || std::process::Command::new(program).args(arguments).output();
    let output = netns.run(command).unwrap().unwrap();
    assert!(output.status.success(), "{program} {arguments:?}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}
