//! What the cipher alone costs on this machine: no tunnel on it can be cheaper.

use std::hint::black_box;
use std::time::Instant;

use ring::aead::{Aad, CHACHA20_POLY1305, LessSafeKey, Nonce, UnboundKey};

use crate::Error;

/// A full packet, bytes.
const PACKET: usize = 1440;
/// Packets of one measurement.
const PACKETS: u32 = 100_000;

/// Processor time per GB of full packets, s.
#[derive(Debug, Clone, Copy)]
pub struct Floor {
    /// To seal them.
    pub seal: f64,
    /// To open them.
    pub open: f64,
}

impl Floor {
    /// Seals and opens packets with ring.
    ///
    /// # Errors
    /// The cipher's.
    pub fn measure() -> Result<Self, Error> {
        let failed = |_| "the cipher has failed";
        let key = LessSafeKey::new(UnboundKey::new(&CHACHA20_POLY1305, &[7; 32]).map_err(failed)?);
        let nonce = || Nonce::assume_unique_for_key([0; 12]);
        let mut packet = vec![0x5a; PACKET];
        let start = Instant::now();
        for _ in 0..PACKETS {
            let tag = key.seal_in_place_separate_tag(nonce(), Aad::empty(), &mut packet);
            let _ = black_box(tag.map_err(failed)?);
        }
        let seal = per_gb(start);
        packet.truncate(PACKET);
        key.seal_in_place_append_tag(nonce(), Aad::empty(), &mut packet).map_err(failed)?;
        let mut copy = packet.clone();
        let start = Instant::now();
        for _ in 0..PACKETS {
            copy.copy_from_slice(&packet);
            key.open_in_place(nonce(), Aad::empty(), &mut copy).map_err(failed)?;
        }
        Ok(Self { seal, open: per_gb(start) })
    }
}

fn per_gb(start: Instant) -> f64 {
    start.elapsed().as_secs_f64() * 1e9 / (PACKET as f64 * f64::from(PACKETS))
}
