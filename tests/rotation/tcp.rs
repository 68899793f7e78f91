//! TCP streams between pods, and how many segments they had to send again.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use gambeson_lab::{Lab, Netns, Pod};

/// Bytes of each write, with a pause between two: a stream that never waits for the other end.
const CHUNK: usize = 4096;
const PAUSE: Duration = Duration::from_millis(10);

/// Segments that were sent again.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct SentAgain {
    pub(crate) all: u64,
    /// Those that the other end had already (DSACK, RFC 2883): an answer was late, by the two
    /// milliseconds that Linux waits where the way takes 70 microseconds, and nothing was lost.
    pub(crate) needless: u64,
}

/// One stream from the first pod of each node to that of the next.
pub(crate) struct Streams {
    stop: Arc<AtomicBool>,
    senders: Vec<JoinHandle<SentAgain>>,
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
    pub(crate) fn finish(self) -> SentAgain {
        self.stop.store(true, Ordering::Relaxed);
        let ended = self.senders.into_iter().map(|sender| sender.join().unwrap());
        ended.fold(SentAgain::default(), |sum, one| SentAgain {
            all: sum.all + one.all,
            needless: sum.needless + one.needless,
        })
    }
}

fn stream(from: Pod<'_>, to: Pod<'_>, stop: &Arc<AtomicBool>) -> JoinHandle<SentAgain> {
    let address = to.addresses()[0];
    let listener = to.netns().run(|| TcpListener::bind((address, 0))).unwrap().unwrap();
    let to = listener.local_addr().unwrap();
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
        sent_again(&netns, to)
    })
}

/// What `ss` says of the connection: `retrans:NOW/ALL` and `dsack_dups:N`, each absent for none.
fn sent_again(netns: &Netns, to: SocketAddr) -> SentAgain {
    let command = ["-Htin", "dst", &to.to_string()];
    let ss = || std::process::Command::new("ss").args(command).output();
    let output = netns.run(ss).unwrap().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.contains("bytes_acked"), "no connection to {to}: {text}");
    let value = |name: &str| {
        let mut words = text.split_whitespace().filter_map(|word| word.strip_prefix(name));
        words.next().map_or(0, |value| value.rsplit('/').next().unwrap().parse().unwrap())
    };
    SentAgain { all: value("retrans:"), needless: value("dsack_dups:") }
}
