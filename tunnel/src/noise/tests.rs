//! The protocol against another implementation of it: boringtun.

use std::net::SocketAddr;
use std::sync::Arc;

use boringtun::noise::rate_limiter::RateLimiter;
use boringtun::noise::{Tunn, TunnResult};
use x25519_dalek::{PublicKey, StaticSecret};

use super::{
    Claimed, DATA_HEADER, HANDSHAKE_LEN, Identity, Indices, Message, Noise, OVERHEAD, Opened,
    Sealed, Verdict,
};

const NOW: u64 = 1000;

fn packet() -> Vec<u8> {
    let mut packet = vec![7; 96];
    packet[0] = 0x45;
    packet[2..4].copy_from_slice(&96u16.to_be_bytes());
    packet
}

fn from() -> SocketAddr {
    "192.0.2.1:51820".parse().unwrap()
}

/// Our end and boringtun's.
struct Pair {
    identity: Arc<Identity>,
    ours: Noise,
    theirs: Tunn,
}

impl Pair {
    fn new(preshared_key: [u8; 32]) -> Self {
        let (ours, theirs) = (StaticSecret::from([1; 32]), StaticSecret::from([2; 32]));
        let public = PublicKey::from(&theirs);
        let identity = Arc::new(Identity::new(ours.as_bytes()));
        let indices = Arc::new(Indices::default());
        let preshared = (preshared_key != [0; 32]).then_some(preshared_key);
        let limiter = Arc::new(RateLimiter::new(&public, u64::MAX));
        let known = PublicKey::from(&ours);
        Self {
            ours: Noise::new(0, indices, public.as_bytes(), &preshared_key, Some(&identity)),
            theirs: Tunn::new(theirs, known, preshared, None, 9, Some(limiter)),
            identity,
        }
    }

    /// Hands a datagram to boringtun, and its answer back.
    fn theirs(&mut self, datagram: &[u8]) -> Result<Vec<u8>, String> {
        let mut out = vec![0; 2048];
        match self.theirs.decapsulate(Some(from().ip()), datagram, &mut out) {
            TunnResult::WriteToNetwork(answer) | TunnResult::WriteToTunnelV4(answer, _) => {
                Ok(answer.to_vec())
            }
            TunnResult::Done => Ok(Vec::new()),
            other => Err(format!("{other:?}")),
        }
    }

    /// Hands a datagram to our end.
    fn ours(&mut self, datagram: &[u8]) -> (Opened, Vec<u8>) {
        let mut out = vec![0; 2048];
        let opened = match Message::of(datagram).unwrap() {
            Message::Initiation => {
                let claimed = Claimed::read(&self.identity, datagram).unwrap();
                self.ours.open_initiation(claimed, NOW, &mut out)
            }
            Message::Response { receiver } => {
                self.ours.open_response(receiver, datagram, NOW, &mut out)
            }
            Message::Data { receiver } => {
                let mut datagram = datagram.to_vec();
                let opened = self.ours.open(receiver, &mut datagram, NOW);
                out = datagram.split_off(DATA_HEADER);
                opened
            }
            Message::Cookie { .. } => {
                self.ours.open_cookie(datagram, NOW);
                Opened::Keepalive
            }
        };
        match opened {
            Opened::Packet(len) | Opened::Reply(len) => out.truncate(len),
            _ => out.clear(),
        }
        (opened, out)
    }

    fn sealed(&mut self) -> Vec<u8> {
        let mut out = vec![0; HANDSHAKE_LEN.max(packet().len() + OVERHEAD)];
        out[DATA_HEADER..][..packet().len()].copy_from_slice(&packet());
        let (Sealed::Datagram(len) | Sealed::Initiation(len)) =
            self.ours.seal(packet().len(), NOW, &mut out)
        else {
            panic!("nothing to send")
        };
        out.truncate(len);
        out
    }

    fn their_packet(&mut self) -> Vec<u8> {
        let mut out = vec![0; 2048];
        let TunnResult::WriteToNetwork(datagram) = self.theirs.encapsulate(&packet(), &mut out)
        else {
            panic!("nothing to send")
        };
        datagram.to_vec()
    }

    fn assert_data_passes(&mut self) {
        for _ in 0..3 {
            let sealed = self.sealed();
            assert_eq!(self.theirs(&sealed).unwrap(), packet());
            let sealed = self.their_packet();
            assert_eq!(self.ours(&sealed), (Opened::Packet(96), packet()));
        }
    }
}

#[test]
fn boringtun_answers_us() {
    for preshared_key in [[0; 32], [5; 32]] {
        let mut pair = Pair::new(preshared_key);
        let initiation = pair.sealed();
        let response = pair.theirs(&initiation).unwrap();
        let (opened, keepalive) = pair.ours(&response);
        assert_eq!(opened, Opened::Reply(OVERHEAD));
        assert_eq!(pair.theirs(&keepalive).unwrap(), []);
        pair.assert_data_passes();
    }
}

#[test]
fn we_answer_boringtun() {
    for preshared_key in [[0; 32], [5; 32]] {
        let mut pair = Pair::new(preshared_key);
        let initiation = pair.their_packet();
        let (_, response) = pair.ours(&initiation);
        let keepalive = pair.theirs(&response).unwrap();
        assert_eq!(pair.ours(&keepalive).0, Opened::Keepalive);
        pair.assert_data_passes();
    }
}

#[test]
fn a_preshared_key_that_differs_is_noticed_at_both_ends() {
    let mut pair = Pair::new([5; 32]);
    pair.ours.set_preshared_key(&[6; 32]);
    let initiation = pair.sealed();
    let response = pair.theirs(&initiation).unwrap();
    assert_eq!(pair.ours(&response).0, Opened::Refused);
    let initiation = pair.their_packet();
    let (_, response) = pair.ours(&initiation);
    assert!(pair.theirs(&response).is_err());
}

#[test]
fn cookies_are_boringtuns() {
    let mut pair = Pair::new([0; 32]);
    let initiation = pair.sealed();
    // Its limiter asks for a cookie at once, and takes what carries one.
    let limiter = RateLimiter::new(&PublicKey::from(&StaticSecret::from([2; 32])), 0);
    let mut out = [0; 64];
    let Err(TunnResult::WriteToNetwork(cookie)) =
        limiter.verify_packet(Some(from().ip()), &initiation, &mut out)
    else {
        panic!("no cookie")
    };
    let cookie = cookie.to_vec();
    pair.ours(&cookie);
    let len = pair.ours.initiate(true, NOW, &mut [0; 200]).unwrap();
    let mut out = [0; 200];
    pair.ours.initiate(true, NOW, &mut out).unwrap();
    assert!(limiter.verify_packet(Some(from().ip()), &out[..len], &mut [0; 64]).is_ok());
    // It takes ours, and we take what carries it.
    let mut reply = [0; 64];
    let initiation = pair.their_packet();
    let verdicts: Vec<_> =
        (0..500).map(|_| pair.identity.gate.check(from(), &initiation, NOW, &mut reply)).collect();
    assert_eq!(verdicts.first(), Some(&Verdict::Answer));
    assert_eq!(verdicts.last(), Some(&Verdict::Cookie(64)));
    assert_eq!(pair.theirs(&reply).unwrap(), []);
    let mut out = vec![0; 200];
    let TunnResult::WriteToNetwork(next) = pair.theirs.format_handshake_initiation(&mut out, true)
    else {
        panic!("no initiation")
    };
    assert_eq!(pair.identity.gate.check(from(), next, NOW, &mut reply), Verdict::Answer);
    let elsewhere = SocketAddr::new(from().ip(), 9);
    let asked = pair.identity.gate.check(elsewhere, next, NOW, &mut reply);
    assert_eq!(asked, Verdict::Cookie(64), "a cookie proves address and port");
}
