//! The threads that move packets: `TUN -> seal -> UDP` and `UDP -> open -> TUN`.

use std::os::fd::{AsFd as _, BorrowedFd};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::batch::{Batch, Outbox};
use crate::handshakes::Handshakes;
use crate::offload::Coalescer;
use crate::shared::{End, Shared};
use crate::tun::Alive;
use crate::udp::Receiver;

/// For how many packets of one receive there is room from the start.
const PACKETS: usize = 256;

/// Seals what the TUN device hands over, until the tunnel ends.
pub(crate) fn outbound(shared: &Shared) {
    let mut batch = Batch::new();
    let mut outbox = Outbox::new();
    loop {
        match wait(&[shared.tun.as_fd(), shared.stop.as_fd()]) {
            Some(ready) if ready[1] => return,
            Some(_) => {}
            None => return shared.stop.now(End::Fault("outbound")),
        }
        batch.clear();
        if shared.tun.read(&mut batch) == Alive::Gone {
            return shared.stop.now(End::DeviceGone);
        }
        if batch.is_empty() {
            continue;
        }
        if !shared.device.is_up() {
            // A packet is the first sign that the device has come up.
            shared.follow_link();
        }
        outbox.clear();
        shared.device.seal(&batch, &mut outbox);
        shared.send(&outbox);
    }
}

/// Opens what the UDP sockets receive, until the tunnel ends. Handshake messages are left to
/// another thread.
pub(crate) fn inbound(shared: &Shared, handshakes: &Handshakes) {
    let mut receiver = Receiver::new();
    let mut coalescer = Coalescer::default();
    let mut outbox = Outbox::new();
    loop {
        let sockets = shared.sockets();
        let mut descriptors = vec![shared.stop.as_fd(), shared.rebound.as_fd()];
        if let Some(sockets) = &sockets {
            descriptors.extend(sockets.descriptors());
        }
        loop {
            let Some(ready) = wait(&descriptors) else {
                return shared.stop.now(End::Fault("inbound"));
            };
            if ready[0] {
                return;
            }
            if ready[1] {
                shared.rebound.clear();
                break;
            }
            for (descriptor, _) in descriptors[2..].iter().zip(&ready[2..]).filter(|(_, r)| **r) {
                receive(
                    shared,
                    *descriptor,
                    &mut receiver,
                    &mut coalescer,
                    &mut outbox,
                    handshakes,
                );
            }
        }
    }
}

/// Takes one round of datagrams from one socket; a full one leaves the rest to the next
/// round, so that the families take turns.
fn receive(
    shared: &Shared,
    socket: BorrowedFd<'_>,
    receiver: &mut Receiver,
    coalescer: &mut Coalescer,
    outbox: &mut Outbox,
    handshakes: &Handshakes,
) {
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
    shared.tun.write(&packets, coalescer);
    shared.send(outbox);
}

/// Waits until one of the descriptors has something to read. `None` if that cannot be told.
pub(crate) fn wait(descriptors: &[BorrowedFd<'_>]) -> Option<Vec<bool>> {
    wait_for(descriptors, PollTimeout::NONE)
}

/// As [`wait`], for a while; then none is ready.
pub(crate) fn wait_for(descriptors: &[BorrowedFd<'_>], timeout: PollTimeout) -> Option<Vec<bool>> {
    let mut polled: Vec<_> =
        descriptors.iter().map(|fd| PollFd::new(*fd, PollFlags::POLLIN)).collect();
    match poll(&mut polled, timeout) {
        Ok(_) | Err(Errno::EINTR) => {
            Some(polled.iter().map(|fd| fd.any().unwrap_or(false)).collect())
        }
        Err(_) => None,
    }
}
