//! Looks for byte strings in every packet on an interface, over AF_PACKET.

use std::collections::BTreeSet;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Instant;

use nix::errno::Errno;
use nix::net::if_::if_nametoindex;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, LinkAddr, SockFlag, SockProtocol, SockType, recvfrom, setsockopt, socket,
    sockopt,
};

use crate::error::LabError;
use crate::netns::Netns;
use crate::wait::until;

/// How soon a capture notices that it should end, in milliseconds.
const TICK: u16 = 20;
/// Socket buffer in bytes: a burst must not push out the packet that gives us away.
const BUFFER: usize = 64 << 20;
/// Largest packet, offloads included, with its link header.
const LARGEST_FRAME: usize = (1 << 16) + 64;

/// A place to look: a namespace and one of its interfaces, or all of them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CapturePoint {
    /// The namespace.
    pub netns: Netns,
    /// The interface, or `None` for all of the namespace.
    pub interface: Option<String>,
}

/// A running search on several points. Ends when it is dropped.
#[derive(Debug)]
pub struct Capture {
    stop: Arc<AtomicBool>,
    seen: Arc<Mutex<Sightings>>,
    threads: Vec<JoinHandle<()>>,
}

/// What was seen.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Sightings {
    /// Packets looked at.
    pub packets: u64,
    /// Which needle was seen in which namespace: its position in the list, and the name.
    pub found: BTreeSet<(usize, String)>,
}

impl Sightings {
    /// Names of the namespaces where a needle was seen.
    pub fn places(&self, needle: usize) -> Vec<&str> {
        let places = self.found.iter().filter(|(found, _)| *found == needle);
        places.map(|(_, place)| place.as_str()).collect()
    }
}

impl Capture {
    /// Starts looking for any of these needles. Every point is watched when this returns.
    pub fn start(points: &[CapturePoint], needles: &[Vec<u8>]) -> Result<Self, LabError> {
        let mut capture = Self {
            stop: Arc::default(),
            seen: Arc::default(),
            threads: Vec::with_capacity(points.len()),
        };
        for point in points {
            let (ready, started) = mpsc::channel();
            let search = Search {
                point: point.clone(),
                needles: needles.to_vec(),
                stop: Arc::clone(&capture.stop),
                seen: Arc::clone(&capture.seen),
            };
            let failed = |source| LabError::Measure {
                what: format!("capture packets in {}", point.netns.name()),
                source,
            };
            let thread = thread::Builder::new().name(format!("capture-{}", point.netns.name()));
            capture.threads.push(thread.spawn(move || search.run(&ready)).map_err(failed)?);
            let started = started.recv().map_err(|error| failed(io::Error::other(error)))?;
            started.map_err(failed)?;
        }
        Ok(capture)
    }

    /// Waits until this needle has been seen in all of these namespaces. False when it was
    /// not before the deadline.
    pub fn wait_for(&self, needle: usize, places: &[&str], deadline: Instant) -> bool {
        let all_seen = || {
            let seen = self.seen();
            let found = seen.places(needle);
            places.iter().all(|place| found.contains(place)).then_some(())
        };
        until(deadline, all_seen).is_some()
    }

    /// What was seen so far.
    pub fn seen(&self) -> Sightings {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Ends the search, and gives what it saw.
    pub fn finish(mut self) -> Sightings {
        self.end();
        self.seen()
    }

    fn end(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            // It has told what it saw up to a panic.
            let _ = thread.join();
        }
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        self.end();
    }
}

struct Search {
    point: CapturePoint,
    needles: Vec<Vec<u8>>,
    stop: Arc<AtomicBool>,
    seen: Arc<Mutex<Sightings>>,
}

impl Search {
    fn run(self, ready: &Sender<io::Result<()>>) {
        // The other end only goes away when the capture was given up.
        match self.open() {
            Err(error) => {
                let _ = ready.send(Err(error));
            }
            Ok((socket, interface)) => {
                let _ = ready.send(Ok(()));
                self.look(&socket, interface);
            }
        }
    }

    fn open(&self) -> io::Result<(OwnedFd, Option<usize>)> {
        self.point.netns.enter().map_err(io::Error::other)?;
        let interface = match &self.point.interface {
            Some(name) => usize::try_from(if_nametoindex(name.as_str())?).ok(),
            None => None,
        };
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let socket = socket(AddressFamily::Packet, SockType::Raw, flags, SockProtocol::EthAll)?;
        setsockopt(&socket, sockopt::RcvBufForce, &BUFFER)?;
        Ok((socket, interface))
    }

    fn look(&self, socket: &OwnedFd, interface: Option<usize>) {
        let mut frame = vec![0; LARGEST_FRAME];
        loop {
            match recvfrom::<LinkAddr>(socket.as_raw_fd(), &mut frame) {
                Ok((length, from)) => {
                    let index = from.map(|address| address.ifindex());
                    if interface.is_none() || index == interface {
                        self.inspect(&frame[..length]);
                    }
                }
                Err(Errno::EAGAIN) if self.stop.load(Ordering::Relaxed) => return,
                Err(_) => {
                    let mut fds = [PollFd::new(socket.as_fd(), PollFlags::POLLIN)];
                    // Interrupted or not, the next look decides.
                    let _ = poll(&mut fds, PollTimeout::from(TICK));
                }
            }
        }
    }

    fn inspect(&self, frame: &[u8]) {
        let found = self.needles.iter().enumerate().filter(|(_, needle)| contains(frame, needle));
        let found: Vec<usize> = found.map(|(index, _)| index).collect();
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        seen.packets += 1;
        let place = self.point.netns.name();
        seen.found.extend(found.into_iter().map(|needle| (needle, place.to_owned())));
    }
}

fn contains(haystack: &[u8], needle: &[u8]) -> bool {
    haystack.windows(needle.len().max(1)).any(|window| window == needle)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn needles_are_found_anywhere() {
        assert!(contains(b"abcdef", b"abc"));
        assert!(contains(b"abcdef", b"def"));
        assert!(!contains(b"abcdef", b"abd"));
        assert!(!contains(b"ab", b"abc"));
    }
}
