//! TCP between namespaces: echo servers, and one connection that asks.

use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

/// How long a connection may take to open, and to answer.
const TIMEOUT: Duration = Duration::from_secs(3);

/// Answers every connection with what it says, until it is dropped.
#[derive(Debug)]
pub struct EchoServer {
    port: u16,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl EchoServer {
    /// Listens on all addresses of the namespace it is called in.
    pub fn start() -> io::Result<Self> {
        let listener = listen()?;
        let port = listener.local_addr()?.port();
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = thread::Builder::new().name(format!("echo-{port}")).spawn(move || {
            for stream in listener.incoming() {
                if stopped.load(Ordering::Relaxed) {
                    return;
                }
                // A client that breaks off finds out by itself.
                let _ = stream.and_then(echo);
            }
        })?;
        Ok(Self { port, stop, thread: Some(thread) })
    }

    /// Its port.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Ends it. Must be called in the namespace it was started in.
    pub fn stop(mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let woken = TcpStream::connect_timeout(&(Ipv4Addr::LOCALHOST, self.port).into(), TIMEOUT);
        if let (Ok(_), Some(thread)) = (woken, self.thread.take()) {
            let _ = thread.join();
        }
    }
}

/// Connects, says `message`, and gives whether exactly that came back.
pub fn echoes(server: SocketAddr, message: &[u8]) -> io::Result<bool> {
    let mut stream = TcpStream::connect_timeout(&server, TIMEOUT)?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    stream.write_all(message)?;
    stream.shutdown(Shutdown::Write)?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    Ok(answer == message)
}

/// A listener on a free port of every address of this namespace.
pub fn listen() -> io::Result<TcpListener> {
    TcpListener::bind(SocketAddr::new(IpAddr::V6(Ipv6Addr::UNSPECIFIED), 0))
}

fn echo(mut stream: TcpStream) -> io::Result<()> {
    stream.set_read_timeout(Some(TIMEOUT))?;
    let mut message = Vec::new();
    (&stream).take(1 << 20).read_to_end(&mut message)?;
    stream.write_all(&message)
}
