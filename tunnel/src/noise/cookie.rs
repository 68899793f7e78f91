//! The two MACs of handshake messages, and cookies: proof of an address, asked for under load
//! (WireGuard paper, 5.4.4 and 5.4.7).

use std::net::{IpAddr, SocketAddr};

use chacha20poly1305::aead::AeadInPlace as _;
use chacha20poly1305::{KeyInit as _, Tag, XChaCha20Poly1305, XNonce};
use parking_lot::Mutex;
use rand_core::{OsRng, RngCore as _};
use zeroize::Zeroizing;

use super::aead::TAG;
use super::bucket::Buckets;
use super::crypto::{self, Key};
use super::message::{COOKIE, COOKIE_LEN, MAC, array, word};
use super::remote::Remote;

/// For how long a cookie, and the secret that it is made of, holds, ms.
const LIFETIME: u64 = 120_000;
/// Handshake messages per second that are answered without asking for a cookie. One costs
/// about 100 us, so that a flood of them takes a 25th of a core.
const UNASKED_PER_SECOND: u32 = 400;

type Cookie = Zeroizing<[u8; MAC]>;

pub(super) fn mac1_key(public: &[u8; 32]) -> [u8; 32] {
    crypto::hash(&[b"mac1----", public])
}

pub(super) fn cookie_key(public: &[u8; 32]) -> [u8; 32] {
    crypto::hash(&[b"cookie--", public])
}

/// Signs our messages to one peer with the newest cookie that it gave us.
#[derive(Default)]
pub(super) struct Jar {
    cookie: Option<(Cookie, u64)>,
    /// The first MAC of the message that a cookie may answer.
    asked: Option<[u8; MAC]>,
}

impl Jar {
    /// Fills in the two MACs at the end of a message.
    pub(super) fn sign(&mut self, remote: &Remote, message: &mut [u8], now: u64) {
        let Some(body) = message.len().checked_sub(2 * MAC) else { return };
        let (body, macs) = message.split_at_mut(body);
        let mac1 = crypto::mac(&remote.mac1_key, &[body]);
        self.cookie.take_if(|(_, since)| now.saturating_sub(*since) >= LIFETIME);
        let mac2 = match &self.cookie {
            Some((cookie, _)) => crypto::mac(&**cookie, &[body, &mac1]),
            None => [0; MAC],
        };
        macs[..MAC].copy_from_slice(&mac1);
        macs[MAC..].copy_from_slice(&mac2);
        self.asked = Some(mac1);
    }

    /// Takes the cookie of a reply, if it answers our last message.
    pub(super) fn take(&mut self, remote: &Remote, reply: &[u8], now: u64) {
        if let Some(cookie) = self.asked.as_ref().and_then(|mac1| open(remote, mac1, reply)) {
            self.cookie = Some((cookie, now));
            self.asked = None;
        }
    }
}

fn open(remote: &Remote, mac1: &[u8; MAC], reply: &[u8]) -> Option<Cookie> {
    let nonce = XNonce::from(array::<24>(reply, 8)?);
    let mut cookie = Zeroizing::new(array::<MAC>(reply, 32)?);
    let tag = Tag::from(array::<TAG>(reply, 48)?);
    let cipher = XChaCha20Poly1305::new(&remote.cookie_key.into());
    cipher.decrypt_in_place_detached(&nonce, mac1, &mut *cookie, &tag).ok()?;
    Some(cookie)
}

/// Decides which handshake messages are worth a computation.
pub(crate) struct Gate {
    mac1_key: [u8; 32],
    cookie_key: [u8; 32],
    state: Mutex<State>,
}

struct State {
    secret: Key,
    since: u64,
    /// Messages in this second.
    second: u64,
    messages: u32,
    buckets: Buckets,
}

/// What becomes of a handshake message.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    Answer,
    /// Send this many bytes of the reply buffer: a cookie.
    Cookie(usize),
    Drop,
}

impl Gate {
    pub(super) fn new(public: &[u8; 32]) -> Self {
        let state = State {
            secret: secret(),
            since: 0,
            second: 0,
            messages: 0,
            buckets: Buckets::default(),
        };
        Self {
            mac1_key: mac1_key(public),
            cookie_key: cookie_key(public),
            state: Mutex::new(state),
        }
    }

    /// Checks an initiation or a response. Under load it has to carry a cookie, which is bound
    /// to address and port, and an address gets 20 a second through. `reply` has room for a
    /// cookie of [`COOKIE_LEN`] bytes; `now` is the device's clock, ms.
    pub(crate) fn check(
        &self,
        from: SocketAddr,
        message: &[u8],
        now: u64,
        reply: &mut [u8],
    ) -> Verdict {
        let Some(body) = message.len().checked_sub(2 * MAC) else { return Verdict::Drop };
        let (body, macs) = message.split_at(body);
        let (mac1, mac2) = macs.split_at(MAC);
        if !crypto::is_mac(&self.mac1_key, &[body], mac1) {
            return Verdict::Drop;
        }
        let mut state = self.state.lock();
        if !state.is_loaded(now) {
            return Verdict::Answer;
        }
        let cookie = state.cookie(from, now);
        if crypto::is_mac(&*cookie, &[body, mac1], mac2) {
            let passes = state.buckets.allow(from.ip(), now);
            return if passes { Verdict::Answer } else { Verdict::Drop };
        }
        drop(state);
        let sender = word(message, 4).unwrap_or_default();
        match self.write_reply(sender, &cookie, mac1, reply) {
            Some(len) => Verdict::Cookie(len),
            None => Verdict::Drop,
        }
    }

    fn write_reply(
        &self,
        receiver: u32,
        cookie: &[u8; MAC],
        mac1: &[u8],
        out: &mut [u8],
    ) -> Option<usize> {
        let out = out.get_mut(..COOKIE_LEN)?;
        let mut nonce = [0; 24];
        OsRng.fill_bytes(&mut nonce);
        out[..4].copy_from_slice(&COOKIE.to_le_bytes());
        out[4..8].copy_from_slice(&receiver.to_le_bytes());
        out[8..32].copy_from_slice(&nonce);
        out[32..48].copy_from_slice(cookie);
        let cipher = XChaCha20Poly1305::new(&self.cookie_key.into());
        let tag = cipher.encrypt_in_place_detached(&nonce.into(), mac1, &mut out[32..48]).ok()?;
        out[48..].copy_from_slice(&tag);
        Some(COOKIE_LEN)
    }
}

impl State {
    /// Counts a message, and says whether there are too many.
    fn is_loaded(&mut self, now: u64) -> bool {
        if self.second != now / 1000 {
            (self.second, self.messages) = (now / 1000, 0);
        }
        self.messages = self.messages.saturating_add(1);
        self.messages > UNASKED_PER_SECOND
    }

    fn cookie(&mut self, from: SocketAddr, now: u64) -> Cookie {
        if now.saturating_sub(self.since) >= LIFETIME {
            (self.secret, self.since) = (secret(), now);
        }
        let port = from.port().to_be_bytes();
        Cookie::new(match from.ip() {
            IpAddr::V4(ip) => crypto::mac(&*self.secret, &[&ip.octets(), &port]),
            IpAddr::V6(ip) => crypto::mac(&*self.secret, &[&ip.octets(), &port]),
        })
    }
}

fn secret() -> Key {
    let mut secret = Key::default();
    OsRng.fill_bytes(&mut *secret);
    secret
}
