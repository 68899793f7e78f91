//! Any bytes to the configuration socket: no panic, and the device can be shown afterwards.

#![no_main]

use std::io::{self, Read, Write};

use gambeson_tunnel::{Device, internals};
use libfuzzer_sys::fuzz_target;

/// A client that sends this, and what it is answered.
struct Client<'a> {
    request: &'a [u8],
    answer: Vec<u8>,
}

impl Read for Client<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.request.read(buffer)
    }
}

impl Write for Client<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.answer.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn ask(device: &Device, request: &[u8]) -> Vec<u8> {
    let mut client = Client { request, answer: Vec::new() };
    // It ends with an error where a line is too long.
    let _ = internals::configure(device, &mut client);
    client.answer
}

fuzz_target!(|request: &[u8]| {
    let device = Device::new(1420);
    ask(&device, request);
    let shown = ask(&device, b"get=1\n\n");
    assert!(shown.ends_with(b"errno=0\n\n"), "{}", String::from_utf8_lossy(&shown));
});
