//! How much one TCP connection moves between two pods.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use super::THROUGHPUT_TIME;
use crate::error::{LabError, chain};
use crate::instance::Lab;
use crate::node::Pod;
use crate::probe::tcp;

const BUFFER: usize = 1 << 18;
/// How long a connection may take to open, or to stand still.
const TIMEOUT: Duration = Duration::from_secs(3);

/// Measures the first pair of pods on different nodes, or on one where there is only one.
pub(super) fn check(lab: &Lab, failures: &mut Vec<String>) -> Result<Option<f64>, LabError> {
    let pods = lab.pods();
    let pair = lab.first_pod_pairs().into_iter().next();
    let pair = pair.or_else(|| Some((*pods.first()?, *pods.get(1)?)));
    let Some((from, to)) = pair else { return Ok(None) };
    match measure(from, to, THROUGHPUT_TIME) {
        Ok(gbps) if gbps > 0.0 => Ok(Some(gbps)),
        Ok(_) => {
            failures.push(format!("nothing got from {} to {} over TCP", from.name(), to.name()));
            Ok(Some(0.0))
        }
        Err(error @ LabError::Measure { .. }) => {
            failures.push(chain(&error));
            Ok(Some(0.0))
        }
        Err(error) => Err(error),
    }
}

/// Sends as much as goes from one pod to another for some time. In gigabits per second, as
/// they arrive.
pub fn measure(from: Pod<'_>, to: Pod<'_>, time: Duration) -> Result<f64, LabError> {
    let failed = |source| LabError::Measure {
        what: format!("measure the throughput from {} to {}", from.name(), to.name()),
        source,
    };
    let address = to.addresses().into_iter().next();
    let address =
        address.ok_or_else(|| failed(io::Error::new(ErrorKind::AddrNotAvailable, "no address")))?;
    let listener = to.netns().run(tcp::listen)?.map_err(failed)?;
    let port = listener.local_addr().map_err(failed)?.port();
    let stream = from
        .netns()
        .run(|| TcpStream::connect_timeout(&SocketAddr::new(address, port), TIMEOUT))?
        .map_err(failed)?;
    let (received, _) = listener.accept().map_err(failed)?;
    thread::scope(|scope| {
        let receiver = scope.spawn(|| receive(received, time));
        let sent = send(stream, time);
        let received = receiver.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        // The receiver hangs up first, which is no failure of the sender.
        match received {
            Ok(rate) if rate > 0.0 => Ok(rate),
            received => sent.and(received),
        }
    })
    .map_err(failed)
}

fn send(mut stream: TcpStream, time: Duration) -> io::Result<()> {
    stream.set_write_timeout(Some(TIMEOUT))?;
    let bytes = vec![0x67; BUFFER];
    let start = Instant::now();
    while start.elapsed() < time {
        stream.write_all(&bytes)?;
    }
    Ok(())
}

#[expect(clippy::cast_precision_loss, reason = "three digits are shown")]
fn receive(mut stream: TcpStream, time: Duration) -> io::Result<f64> {
    stream.set_read_timeout(Some(TIMEOUT))?;
    let mut bytes = vec![0; BUFFER];
    let mut total = 0_u64;
    let start = Instant::now();
    while start.elapsed() < time {
        match stream.read(&mut bytes)? {
            0 => break,
            length => total += length as u64,
        }
    }
    Ok(total as f64 * 8.0 / start.elapsed().as_secs_f64() / 1e9)
}
