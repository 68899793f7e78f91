//! What the threads of a tunnel share.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::eventfd::{EfdFlags, EventFd};
use parking_lot::{Mutex, RwLock};

use crate::batch::Outbox;
use crate::device::{Device, DeviceUpdate};
use crate::netlink::Routes;
use crate::tun::Tun;
use crate::uapi::Configurable;
use crate::udp::{How, Sockets};

/// A running tunnel.
pub(crate) struct Shared {
    pub(crate) device: Device,
    pub(crate) tun: Tun,
    pub(crate) stop: Stop,
    /// Says to each worker that the sockets are others now.
    pub(crate) rebound: Vec<Event>,
    use_of_udp: UseOfUdp,
    routes: Routes,
    sockets: RwLock<Option<Arc<Sockets>>>,
    settings: Mutex<Settings>,
}

/// What the kernel may be asked to do with datagrams.
#[derive(Debug, Clone, Copy)]
pub(crate) struct UseOfUdp {
    /// Cut what is sent.
    pub(crate) cuts: bool,
    /// Merge what is received.
    pub(crate) merges: bool,
}

/// Settings of the sockets. Its lock is held while they are changed.
#[derive(Debug, Default)]
struct Settings {
    /// As configured: 0 for a random one.
    listen_port: u16,
    fwmark: u32,
    /// The link is up and the port is somebody else's, which was said.
    is_port_missing: bool,
}

/// Why a tunnel ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    /// By a signal.
    Asked,
    /// The TUN device was deleted.
    DeviceGone,
    /// The configuration socket was deleted.
    SocketGone,
    /// This thread cannot go on.
    Fault(&'static str),
}

impl Shared {
    pub(crate) fn new(tun: Tun, mtu: usize, use_of_udp: UseOfUdp) -> io::Result<Self> {
        Ok(Self {
            device: Device::new(mtu),
            stop: Stop { event: Event::new()?, end: Mutex::new(None) },
            rebound: tun.queues().iter().map(|_| Event::new()).collect::<io::Result<_>>()?,
            tun,
            use_of_udp,
            routes: Routes::open()?,
            sockets: RwLock::default(),
            settings: Mutex::default(),
        })
    }

    pub(crate) fn sockets(&self) -> Option<Arc<Sockets>> {
        self.sockets.read().clone()
    }

    /// Sends what is in the outbox, by the sockets of a worker; without any, it is dropped.
    pub(crate) fn send_by(&self, worker: usize, outbox: &Outbox) {
        if outbox.is_empty() {
            return;
        }
        if let Some(sockets) = self.sockets() {
            sockets.send(worker, outbox, &self.device);
        }
    }

    /// Sends what is in the outbox of a thread that is no worker.
    pub(crate) fn send(&self, outbox: &Outbox) {
        self.send_by(0, outbox);
    }

    /// Stops replying from addresses that the routes do not lead over any more.
    pub(crate) fn check_sources(&self) {
        let fwmark = self.settings.lock().fwmark;
        self.device.keep_sources(|to, source| {
            source.scope() != 0
                || self.routes.interface(source.ip, to, fwmark) == Some(source.interface)
        });
    }

    /// Follows the TUN device: its MTU, and whether it is up.
    pub(crate) fn follow_link(&self) {
        // Held all the while, so that what was seen first is not applied last.
        let mut settings = self.settings.lock();
        let up = match self.tun.link().state() {
            Ok(state) => {
                self.device.set_mtu(state.mtu);
                state.up
            }
            // It has moved to another network namespace, where it cannot be asked: take
            // packets from it as they come. (A deleted one makes its reader end.)
            Err(_) => true,
        };
        if up == self.device.is_up() {
            return;
        }
        if !up {
            *self.sockets.write() = None;
            self.rebound.iter().for_each(Event::notify);
        } else if let Err(error) = self.listen(&settings) {
            // It stays down, and the next packet tries again.
            if !std::mem::replace(&mut settings.is_port_missing, true) {
                tracing::warn!(%error, port = settings.listen_port, "cannot listen");
            }
            return;
        }
        settings.is_port_missing = false;
        tracing::info!(up, "TUN device");
        let mut outbox = Outbox::new();
        self.device.set_up(up, &mut outbox);
        self.send(&outbox);
    }

    /// Binds the configured port if nothing is bound yet.
    fn listen(&self, settings: &Settings) -> io::Result<()> {
        if self.sockets.read().is_some() {
            return Ok(());
        }
        let bind = || self.bind(settings.listen_port, settings.fwmark);
        let sockets = bind().or_else(|_| {
            // Those that receive may have the sockets from before the link went down.
            std::thread::sleep(Duration::from_millis(20));
            bind()
        })?;
        self.rebind(sockets);
        Ok(())
    }

    fn bind(&self, port: u16, fwmark: u32) -> io::Result<Sockets> {
        let UseOfUdp { cuts, merges } = self.use_of_udp;
        Sockets::bind(port, How { fwmark, merges }, self.tun.queues().len(), cuts)
    }

    fn rebind(&self, sockets: Sockets) {
        tracing::info!(port = sockets.port(), "listening");
        *self.sockets.write() = Some(Arc::new(sockets));
        self.rebound.iter().for_each(Event::notify);
    }

    /// New sockets, if the update asks for another port and the link is up.
    fn bind_for(
        &self,
        settings: &Settings,
        update: &DeviceUpdate,
    ) -> Result<Option<Sockets>, Errno> {
        let current = self.sockets();
        let port = match update.listen_port {
            // A random port stays: `wg syncconf` says 0 each time.
            Some(0) if settings.listen_port == 0 && current.is_some() => return Ok(None),
            Some(port) if current.as_ref().is_some_and(|sockets| sockets.port() == port) => {
                return Ok(None);
            }
            Some(port) => port,
            None if current.is_none() && update.sets_private_key() => settings.listen_port,
            None => return Ok(None),
        };
        let fwmark = update.fwmark.unwrap_or(settings.fwmark);
        let sockets = self.bind(port, fwmark).map_err(|error| errno(&error))?;
        // While the link is down no port is bound, but whether it can be is worth knowing.
        Ok(Some(sockets).filter(|_| self.device.is_up()))
    }
}

impl Configurable for Shared {
    fn device(&self) -> &Device {
        &self.device
    }

    fn listen_port(&self) -> u16 {
        match self.sockets() {
            Some(sockets) => sockets.port(),
            None => self.settings.lock().listen_port,
        }
    }

    fn fwmark(&self) -> u32 {
        self.settings.lock().fwmark
    }

    fn set(&self, update: &DeviceUpdate) -> Result<(), Errno> {
        let mut settings = self.settings.lock();
        // What may fail goes first.
        if !self.device.has_room_for(update) {
            return Err(Errno::ENOMEM);
        }
        let sockets = self.bind_for(&settings, update)?;
        if let (Some(fwmark), None, Some(current)) = (update.fwmark, &sockets, self.sockets())
            && fwmark != settings.fwmark
        {
            current.set_fwmark(fwmark).map_err(|error| errno(&error))?;
        }
        let is_another_way =
            sockets.is_some() || update.fwmark.is_some_and(|fwmark| fwmark != settings.fwmark);
        settings.fwmark = update.fwmark.unwrap_or(settings.fwmark);
        settings.listen_port = update.listen_port.unwrap_or(settings.listen_port);
        if let Some(sockets) = sockets {
            self.rebind(sockets);
        }
        if is_another_way {
            self.device.keep_sources(|_, _| false);
        }
        let mut outbox = Outbox::new();
        self.device.apply(update, &mut outbox);
        drop(settings);
        self.send(&outbox);
        Ok(())
    }
}

fn errno(error: &io::Error) -> Errno {
    error.raw_os_error().map_or(Errno::EIO, Errno::from_raw)
}

/// Ends the tunnel. The first reason counts.
pub(crate) struct Stop {
    event: Event,
    end: Mutex<Option<End>>,
}

impl Stop {
    pub(crate) fn now(&self, end: End) {
        self.end.lock().get_or_insert(end);
        self.event.notify();
    }

    /// Why, once it has been said.
    pub(crate) fn reason(&self) -> Option<End> {
        *self.end.lock()
    }
}

impl AsFd for Stop {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }
}

/// Wakes threads that poll.
pub(crate) struct Event(EventFd);

impl Event {
    fn new() -> io::Result<Self> {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        Ok(Self(EventFd::from_value_and_flags(0, flags)?))
    }

    /// Readable from now on.
    pub(crate) fn notify(&self) {
        // It fails only when the counter is at its limit, and then it is readable.
        let _ = self.0.write(1);
    }

    pub(crate) fn clear(&self) {
        let _ = self.0.read();
    }
}

impl AsFd for Event {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
