//! Handshake messages on their way from the thread that receives them to the one that answers,
//! so that data messages do not wait for computations.

use std::sync::mpsc::{self, Receiver, SyncSender};

use crate::batch::Outbox;
use crate::device::{Datagram, Origin};
use crate::noise::HANDSHAKE_LEN;
use crate::shared::Shared;

/// How many may wait, as in the kernel (`MAX_QUEUED_INCOMING_HANDSHAKES`); more are dropped.
const WAITING: usize = 4096;
/// How many are answered before the answers are sent.
const BATCH: usize = 16;

/// A copy of a handshake message.
pub(crate) struct Handshake {
    bytes: [u8; HANDSHAKE_LEN],
    len: usize,
    origin: Origin,
}

/// The end that messages are put in at.
#[derive(Clone)]
pub(crate) struct Handshakes(SyncSender<Handshake>);

pub(crate) fn queue() -> (Handshakes, Receiver<Handshake>) {
    let (sender, receiver) = mpsc::sync_channel(WAITING);
    (Handshakes(sender), receiver)
}

impl Handshakes {
    /// Lets a message wait, or drops it if there are too many.
    pub(crate) fn push(&self, datagram: &Datagram<'_>) {
        let Datagram { bytes, origin } = datagram;
        let (len, origin) = (bytes.len(), **origin);
        let mut handshake = Handshake { bytes: [0; HANDSHAKE_LEN], len, origin };
        let Some(room) = handshake.bytes.get_mut(..bytes.len()) else { return };
        room.copy_from_slice(bytes);
        let _ = self.0.try_send(handshake);
    }
}

impl Handshake {
    fn datagram(&mut self) -> Datagram<'_> {
        let bytes = self.bytes.get_mut(..self.len).unwrap_or_default();
        Datagram { bytes, origin: &self.origin }
    }
}

/// Answers what is put in, until the other end is gone.
pub(crate) fn answer(shared: &Shared, waiting: &Receiver<Handshake>) {
    let mut outbox = Outbox::new();
    while let Ok(first) = waiting.recv() {
        outbox.clear();
        for mut handshake in std::iter::once(first).chain(waiting.try_iter().take(BATCH - 1)) {
            shared.device.answer(handshake.datagram(), &mut outbox);
        }
        shared.send(&outbox);
    }
}
