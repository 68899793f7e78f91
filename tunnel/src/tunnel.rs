//! A tunnel from start to end: threads, signals, timers.

use std::io;
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

use nix::poll::PollTimeout;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::net::UnixStream;

use crate::batch::Outbox;
use crate::device::TICK;
use crate::error::TunnelError;
use crate::handshakes;
use crate::netlink;
use crate::noise::allow_avx512;
use crate::shared::{End, Shared, UseOfUdp};
use crate::tun::Tun;
use crate::uapi::{self, Listener};
use crate::worker::{self, Worker};

/// The MTU of a tunnel over any underlay of 1500 bytes (1500 less 40 IPv6, 8 UDP, 32
/// WireGuard), bytes.
pub const DEFAULT_MTU: u32 = 1420;

/// Where configuration sockets are, for `wg` and everything else.
pub const SOCKET_DIRECTORY: &str = "/var/run/wireguard";

/// How to make a tunnel.
#[derive(Debug, Clone)]
pub struct Options {
    /// Name of the device.
    pub name: String,
    /// MTU of the device, bytes.
    pub mtu: u32,
    /// Alias of the device; it never has its name without it.
    pub alias: Option<String>,
    /// Where the configuration socket goes.
    pub socket_directory: PathBuf,
    /// How packets are moved.
    pub datapath: Datapath,
}

/// How packets are moved. The defaults are the fastest; what the kernel does not know is left out
/// without being told.
#[derive(Debug, Clone, Copy)]
pub struct Datapath {
    /// Queues of the TUN device, each with a thread and sockets of its own.
    pub queues: usize,
    /// Whether the TUN device may hand over super-packets, and take them.
    pub tun_offload: bool,
    /// Whether the kernel may cut what is sent into datagrams (`UDP_SEGMENT`, udp(7)).
    pub udp_gso: bool,
    /// Whether the kernel may merge datagrams that are received (`UDP_GRO`, udp(7)).
    pub udp_gro: bool,
    /// Whether long messages may be sealed and opened with AVX-512; of the whole process.
    pub avx512: bool,
}

/// More queues than this are not made unless asked for.
const QUEUES: usize = 8;

impl Default for Datapath {
    fn default() -> Self {
        let processors = std::thread::available_parallelism().map_or(1, NonZeroUsize::get);
        Self {
            queues: processors.min(QUEUES),
            tun_offload: true,
            udp_gso: true,
            udp_gro: true,
            avx512: true,
        }
    }
}

impl Options {
    /// A device of this name with the defaults.
    pub fn new(name: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            mtu: DEFAULT_MTU,
            alias: None,
            socket_directory: SOCKET_DIRECTORY.into(),
            datapath: Datapath::default(),
        }
    }
}

/// A tunnel whose configuration socket answers.
pub struct Tunnel {
    shared: Arc<Shared>,
    listener: Arc<Listener>,
    threads: Vec<JoinHandle<()>>,
    signals: SignalFd,
    /// Says that links, addresses, routes or rules have changed.
    network: OwnedFd,
    started: Instant,
}

/// Starts a tunnel and waits for its end.
///
/// # Errors
/// As [`Tunnel::start`] and [`Tunnel::wait`].
pub fn run(options: &Options) -> Result<(), TunnelError> {
    Tunnel::start(options)?.wait()
}

impl Tunnel {
    /// Makes the device and serves its configuration socket. SIGTERM, SIGINT, SIGHUP and SIGQUIT
    /// are blocked in the calling thread and those it makes, and end the tunnel.
    ///
    /// # Errors
    /// [`TunnelError`], with nothing left behind.
    pub fn start(options: &Options) -> Result<Self, TunnelError> {
        let signals = block_signals().map_err(TunnelError::system("wait for signals"))?;
        let network = netlink::watch().map_err(TunnelError::system("watch the network"))?;
        let Datapath { queues, tun_offload, udp_gso, udp_gro, avx512 } = options.datapath;
        tracing::info!(avx512 = allow_avx512(avx512), "cipher");
        let alias = options.alias.as_deref();
        let tun = Tun::create(&options.name, options.mtu, alias, queues.max(1), tun_offload)?;
        let listener = Listener::bind(&options.socket_directory, &options.name)?;
        let use_of_udp = UseOfUdp { cuts: udp_gso, merges: udp_gro };
        let shared = Shared::new(tun, options.mtu as usize, use_of_udp)
            .map_err(TunnelError::system("make an event descriptor"))?;
        let mut tunnel = Self {
            shared: Arc::new(shared),
            listener: Arc::new(listener),
            threads: Vec::new(),
            signals,
            network,
            started: Instant::now(),
        };
        let (queue, waiting) = handshakes::queue();
        tunnel.spawn("handshakes", move |shared, _| handshakes::answer(shared, &waiting))?;
        for number in 0..queues.max(1) {
            // The last of them to end takes the end of the queue along, and ends the thread above.
            let queue = queue.clone();
            tunnel.spawn("worker", move |shared, _| Worker::new(shared, number, queue).run())?;
        }
        drop(queue);
        tunnel.spawn("config", accept)?;
        Ok(tunnel)
    }

    /// Waits until the device is deleted, the configuration socket is deleted, or a signal
    /// asks for the end; then everything of the tunnel is gone.
    ///
    /// # Errors
    /// [`TunnelError::ThreadDied`].
    pub fn wait(self) -> Result<(), TunnelError> {
        let end = self.control();
        for thread in self.threads {
            let _ = thread.join();
        }
        tracing::info!(reason = ?end, "tunnel ended");
        match end {
            End::Fault(thread) => Err(TunnelError::ThreadDied { thread }),
            End::Asked | End::DeviceGone | End::SocketGone => Ok(()),
        }
    }

    /// The loop of the main thread: signals, link changes, timers.
    fn control(&self) -> End {
        let mut outbox = Outbox::new();
        let mut next_tick = Instant::now() + TICK;
        let mut next_look = Instant::now();
        let descriptors = [self.signals.as_fd(), self.shared.stop.as_fd(), self.network.as_fd()];
        let mut has_changed = false;
        loop {
            if let Some(end) = self.shared.stop.reason() {
                return end;
            }
            let left = next_tick.saturating_duration_since(Instant::now());
            // One millisecond more, so that a wake-up is not just before the time.
            let timeout = PollTimeout::try_from(left + Duration::from_millis(1));
            match worker::wait_for(&descriptors, timeout.unwrap_or(PollTimeout::ZERO)) {
                Some(ready) if ready[0] => self.shared.stop.now(End::Asked),
                Some(ready) if ready[2] => {
                    netlink::drain(&self.network);
                    self.shared.follow_link();
                    has_changed = true;
                }
                Some(_) => {}
                None => self.shared.stop.now(End::Fault("control")),
            }
            let now = Instant::now();
            if now >= next_tick {
                next_tick = now + TICK;
                if std::mem::take(&mut has_changed) {
                    self.shared.check_sources();
                }
                outbox.clear();
                self.shared.device.tick(self.started.elapsed(), &mut outbox);
                self.shared.send(&outbox);
            }
            if now >= next_look {
                next_look = now + Duration::from_secs(1);
                if !self.listener.is_in_place() {
                    self.shared.stop.now(End::SocketGone);
                }
            }
        }
    }

    fn spawn(
        &mut self,
        name: &'static str,
        body: impl FnOnce(&Arc<Shared>, &Listener) + Send + 'static,
    ) -> Result<(), TunnelError> {
        let shared = Arc::clone(&self.shared);
        let listener = Arc::clone(&self.listener);
        let thread = Builder::new().name(name.to_owned()).spawn(move || {
            // Whatever way the thread ends, the tunnel does not go on without it.
            let guard = StopOnDrop { shared: &shared, name };
            body(&shared, &listener);
            drop(guard);
        });
        match thread {
            Ok(thread) => {
                self.threads.push(thread);
                Ok(())
            }
            Err(source) => {
                self.shared.stop.now(End::Asked);
                Err(TunnelError::System { operation: "start a thread", source })
            }
        }
    }
}

struct StopOnDrop<'a> {
    shared: &'a Shared,
    name: &'static str,
}

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        // Does nothing after an orderly end, which has given its reason.
        self.shared.stop.now(End::Fault(self.name));
    }
}

fn block_signals() -> io::Result<SignalFd> {
    let mut signals = SigSet::empty();
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP, Signal::SIGQUIT] {
        signals.add(signal);
    }
    signals.thread_block()?;
    Ok(SignalFd::with_flags(&signals, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?)
}

/// Accepts configuration connections. Each is served by a thread of its own, which ends with
/// the connection or the process.
fn accept(shared: &Arc<Shared>, listener: &Listener) {
    loop {
        match worker::wait(&[listener.as_fd(), shared.stop.as_fd()]) {
            Some(ready) if ready[1] => return,
            Some(_) => {}
            None => return,
        }
        let Ok(stream) = listener.accept() else { continue };
        let shared = Arc::clone(shared);
        let served = Builder::new().name("config-peer".to_owned()).spawn(move || {
            if let Err(error) = serve(&shared, stream) {
                tracing::debug!(%error, "configuration connection ended");
            }
        });
        if let Err(error) = served {
            tracing::warn!(%error, "configuration connection not served");
        }
    }
}

fn serve(shared: &Shared, stream: UnixStream) -> io::Result<()> {
    stream.set_nonblocking(false)?;
    uapi::serve(&stream, shared)
}
