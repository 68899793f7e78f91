//! The threads that move packets: `TUN -> seal -> UDP` and `UDP -> open -> TUN`.
//!
//! Each has a queue of the TUN device and a pair of sockets of its own, and does by itself all
//! that a packet needs. What answers a packet comes by the queue that the packet was written to,
//! so it is mostly there already when the thread looks next.

use std::os::fd::{AsFd as _, BorrowedFd};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::batch::{Batch, Outbox};
use crate::handshakes::Handshakes;
use crate::offload::Coalescer;
use crate::shared::{End, Shared};
use crate::tun::{Alive, Queue};
use crate::udp::{Receiver, Sockets};

/// For how many packets of one receive there is room from the start.
const PACKETS: usize = 256;

/// One of the threads.
pub(crate) struct Worker<'a> {
    shared: &'a Shared,
    number: usize,
    queue: &'a Queue,
    handshakes: Handshakes,
    batch: Batch,
    outbox: Outbox,
    receiver: Receiver,
    coalescer: Coalescer,
}

impl<'a> Worker<'a> {
    /// The one of this number, which there is a queue of the TUN device for.
    pub(crate) fn new(shared: &'a Shared, number: usize, handshakes: Handshakes) -> Self {
        Self {
            shared,
            number,
            queue: &shared.tun.queues()[number],
            handshakes,
            batch: Batch::new(),
            outbox: Outbox::new(),
            receiver: Receiver::new(),
            coalescer: Coalescer::default(),
        }
    }

    /// Moves packets until the tunnel ends.
    pub(crate) fn run(mut self) {
        while self.shared.stop.reason().is_none() {
            let sockets = self.shared.sockets();
            if let Err(end) = self.serve(sockets.as_deref()) {
                self.shared.stop.now(end);
            }
        }
    }

    /// Moves packets until there are other sockets, or the tunnel ends.
    fn serve(&mut self, sockets: Option<&Sockets>) -> Result<(), End> {
        let Self { shared, number, queue, .. } = *self;
        let rebound = &shared.rebound[number];
        let own: Vec<_> = sockets.into_iter().flat_map(|all| all.descriptors(number)).collect();
        let control = [shared.stop.as_fd(), rebound.as_fd(), queue.as_fd()];
        let mut polled: Vec<_> = control.iter().chain(&own).map(readable).collect();
        loop {
            if poll(&mut polled, PollTimeout::NONE).is_err_and(|error| error != Errno::EINTR) {
                return Err(End::Fault("worker"));
            }
            let mut is_ready = polled.iter().map(|fd| fd.any().unwrap_or(false));
            let mut next = || is_ready.next().unwrap_or(false);
            let (is_over, is_rebound, mut has_packets) = (next(), next(), next());
            if is_rebound {
                rebound.clear();
            }
            if is_over || is_rebound {
                return Ok(());
            }
            for (socket, _) in own.iter().zip(is_ready).filter(|(_, is_ready)| *is_ready) {
                self.inbound(*socket);
                has_packets = true;
            }
            if has_packets && self.outbound() == Alive::Gone {
                return Err(End::DeviceGone);
            }
        }
    }

    /// Seals what the TUN device hands over, up to a full batch.
    fn outbound(&mut self) -> Alive {
        let Self { shared, queue, batch, outbox, .. } = self;
        batch.clear();
        let alive = queue.read(batch);
        if batch.is_empty() {
            return alive;
        }
        if !shared.device.is_up() {
            // A packet is the first sign that the device has come up.
            shared.follow_link();
        }
        outbox.clear();
        shared.device.seal(batch, outbox);
        shared.send_by(self.number, outbox);
        alive
    }

    /// Opens one round of datagrams of a socket; a full one leaves the rest to the next round, so
    /// that all take turns. Handshake messages are left to another thread.
    fn inbound(&mut self, socket: BorrowedFd<'_>) {
        let Self { shared, queue, handshakes, outbox, receiver, coalescer, .. } = self;
        if let Err(error) = receiver.receive(socket) {
            tracing::debug!(%error, "receive failed");
            return;
        }
        if !shared.device.is_up() {
            shared.follow_link();
        }
        let mut packets = Vec::with_capacity(PACKETS);
        outbox.clear();
        let datagrams = receiver.datagrams();
        shared.device.open(datagrams, &mut packets, outbox, |message| handshakes.push(&message));
        queue.write(&packets, coalescer);
        shared.send_by(self.number, outbox);
    }
}

fn readable<'f>(descriptor: &BorrowedFd<'f>) -> PollFd<'f> {
    PollFd::new(*descriptor, PollFlags::POLLIN)
}

/// Waits until one of the descriptors has something to read. `None` if that cannot be told.
pub(crate) fn wait(descriptors: &[BorrowedFd<'_>]) -> Option<Vec<bool>> {
    wait_for(descriptors, PollTimeout::NONE)
}

/// As [`wait`], for a while; then none is ready.
pub(crate) fn wait_for(descriptors: &[BorrowedFd<'_>], timeout: PollTimeout) -> Option<Vec<bool>> {
    let mut polled: Vec<_> = descriptors.iter().map(readable).collect();
    match poll(&mut polled, timeout) {
        Ok(_) | Err(Errno::EINTR) => {
            Some(polled.iter().map(|fd| fd.any().unwrap_or(false)).collect())
        }
        Err(_) => None,
    }
}
