//! Any bytes to the configuration socket: no panic, and the device can be shown afterwards.

#![no_main]

use gambeson_tunnel::Device;
use gambeson_tunnel::internals::configure;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|request: &[u8]| {
    let device = Device::new(1420);
    configure(&device, request);
    let shown = configure(&device, b"get=1\n\n");
    assert!(shown.ends_with(b"errno=0\n\n"), "{}", String::from_utf8_lossy(&shown));
});
