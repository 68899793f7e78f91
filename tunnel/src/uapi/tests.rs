use std::cell::RefCell;
use std::fmt::Write as _;
use std::io::{self, Read, Write};

use nix::errno::Errno;
use proptest::prelude::*;

use super::*;
use crate::Outbox;
use crate::device::AllowedIpChange;

const KEY: &str = "0807060504030201080706050403020108070605040302010807060504030261";
const PEER: &str = "b85996fecc9c7f1fc6d2572a76eda11d59bcd20be8e543b15ce4bd85a8e75a33";

/// A device whose sockets are numbers.
struct Target {
    device: Device,
    port: RefCell<u16>,
    mark: RefCell<u32>,
    refuse: Option<Errno>,
    updates: RefCell<Vec<DeviceUpdate>>,
}

impl Target {
    fn new() -> Self {
        Self {
            device: Device::new(1420),
            port: RefCell::default(),
            mark: RefCell::default(),
            refuse: None,
            updates: RefCell::default(),
        }
    }
}

impl Configurable for Target {
    fn device(&self) -> &Device {
        &self.device
    }

    fn listen_port(&self) -> u16 {
        *self.port.borrow()
    }

    fn fwmark(&self) -> u32 {
        *self.mark.borrow()
    }

    fn set(&self, update: &DeviceUpdate) -> Result<(), Errno> {
        if let Some(errno) = self.refuse {
            return Err(errno);
        }
        self.port.replace(update.listen_port.unwrap_or(self.listen_port()));
        self.mark.replace(update.fwmark.unwrap_or(self.fwmark()));
        self.device.apply(update, &mut Outbox::new());
        self.updates.borrow_mut().push(update.clone());
        Ok(())
    }
}

/// Gives its input in pieces of these lengths, then the rest byte by byte.
struct Stream<'a> {
    input: &'a [u8],
    pieces: Vec<usize>,
    output: Vec<u8>,
}

impl Read for Stream<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let piece = self.pieces.pop().unwrap_or(1).max(1);
        let len = piece.min(buffer.len()).min(self.input.len());
        buffer[..len].copy_from_slice(&self.input[..len]);
        self.input = &self.input[len..];
        Ok(len)
    }
}

impl Write for Stream<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.output.extend(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn talk_in(target: &Target, input: &[u8], pieces: Vec<usize>) -> String {
    let mut stream = Stream { input, pieces, output: Vec::new() };
    // The stream is lent, so that the answer can be read after the connection.
    struct Lent<'s, 'a>(&'s mut Stream<'a>);
    impl Read for Lent<'_, '_> {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            self.0.read(buffer)
        }
    }
    impl Write for Lent<'_, '_> {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.write(bytes)
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    serve(Lent(&mut stream), target).unwrap();
    String::from_utf8(stream.output).unwrap()
}

fn talk(target: &Target, input: &str) -> String {
    talk_in(target, input.as_bytes(), vec![usize::MAX; 8])
}

#[test]
fn settings_are_read_back_as_they_were_set() {
    let target = Target::new();
    let answer = talk(
        &target,
        &format!(
            "set=1\nprivate_key={KEY}\nlisten_port=51820\nfwmark=1234\nreplace_peers=true\n\
             public_key={PEER}\nprotocol_version=1\nreplace_allowed_ips=true\npreshared_key={PEER}\n\
             endpoint=[2001:db8::1]:51821\npersistent_keepalive_interval=25\n\
             allowed_ip=10.1.0.0/16\nallowed_ip=fd00::/64\n\n"
        ),
    );
    assert_eq!(answer, "errno=0\n\n");
    assert_eq!(
        talk(&target, "get=1\n\n"),
        format!(
            "private_key={KEY}\nlisten_port=51820\nfwmark=1234\npublic_key={PEER}\n\
             preshared_key={PEER}\nprotocol_version=1\nendpoint=[2001:db8::1]:51821\n\
             last_handshake_time_sec=0\nlast_handshake_time_nsec=0\ntx_bytes=0\nrx_bytes=0\n\
             persistent_keepalive_interval=25\nallowed_ip=10.1.0.0/16\nallowed_ip=fd00::/64\n\
             errno=0\n\n"
        )
    );
}

#[test]
fn an_empty_device_has_nothing_to_say() {
    assert_eq!(talk(&Target::new(), "get=1\n\n"), "errno=0\n\n");
}

#[test]
fn one_connection_serves_many_requests() {
    let target = Target::new();
    assert_eq!(
        talk(&target, "set=1\nfwmark=5\n\nget=1\n\nset=1\nfwmark=0\n\nget=1\n\n"),
        "errno=0\n\nfwmark=5\nerrno=0\n\nerrno=0\n\nerrno=0\n\n"
    );
}

#[test]
fn anything_else_ends_the_connection() {
    let target = Target::new();
    for input in ["", "\n", "hello\n", "get=2\n\n", "set=2\n\n", "GET / HTTP/1.1\r\n\r\n"] {
        assert_eq!(talk(&target, input), "", "{input:?}");
    }
}

#[test]
fn mistakes_have_the_errno_that_wg_knows_and_change_nothing() {
    let target = Target::new();
    let invalid = -(Errno::EINVAL as i32);
    let protocol = -(Errno::EPROTO as i32);
    let long = "0".repeat(5000);
    for (line, code) in [
        ("private_key=00", invalid),
        ("private_key=zz07060504030201080706050403020108070605040302010807060504030261", invalid),
        ("listen_port=65536", invalid),
        ("listen_port=-1", invalid),
        ("listen_port=+1", invalid),
        ("listen_port=", invalid),
        ("fwmark=4294967296", invalid),
        ("fwmark=0x", invalid),
        ("replace_peers=false", invalid),
        ("unknown=1", invalid),
        ("allowed_ip=10.0.0.0/8", invalid),
        ("protocol_version=2", invalid),
        ("no equals sign", protocol),
        (long.as_str(), invalid),
    ] {
        let answer = talk(&target, &format!("set=1\nfwmark=77\n{line}\n\n"));
        assert_eq!(answer, format!("errno={code}\n\n"), "{line}");
    }
    for line in [
        "remove=false",
        "update_only=1",
        "preshared_key=1",
        "endpoint=10.0.0.1",
        "endpoint=10.0.0.1:0",
        "endpoint=host:1",
        "endpoint=[fe80::1%nosuchdevice]:1",
        "persistent_keepalive_interval=65536",
        "persistent_keepalive_interval=off",
        "replace_allowed_ips=no",
        "allowed_ip=10.0.0.0/33",
        "allowed_ip=10.0.0.0",
        "allowed_ip=--10.0.0.0/8",
        "listen_port=5",
        "protocol_version=0",
    ] {
        let request = format!("set=1\nfwmark=77\npublic_key={PEER}\n{line}\n\n");
        assert_eq!(talk(&target, &request), format!("errno={invalid}\n\n"), "{line}");
    }
    assert!(target.updates.borrow().is_empty());
    assert_eq!(talk(&target, "get=1\n\n"), "errno=0\n\n");
}

#[test]
fn a_request_that_is_cut_off_changes_nothing() {
    let target = Target::new();
    let whole = format!("set=1\nfwmark=7\npublic_key={PEER}\nallowed_ip=10.0.0.0/8\n\n");
    for cut in 6..whole.len() - 1 {
        talk(&target, &whole[..cut]);
    }
    assert!(target.updates.borrow().is_empty());
    talk(&target, &whole);
    assert_eq!(target.updates.borrow().len(), 1);
}

#[test]
fn what_the_device_refuses_is_told() {
    let target = Target { refuse: Some(Errno::EADDRINUSE), ..Target::new() };
    assert_eq!(talk(&target, "set=1\nlisten_port=1\n\n"), "errno=-98\n\n");
}

#[test]
fn zeros_unset_keys_and_signs_add_or_remove_allowed_ips() {
    let target = Target::new();
    let zeros = "0".repeat(64);
    talk(&target, &format!("set=1\nprivate_key={KEY}\n\n"));
    talk(&target, &format!("set=1\nprivate_key={zeros}\n\n"));
    assert!(!target.device.has_private_key());
    let answer = talk(
        &target,
        &format!(
            "set=1\npublic_key={PEER}\nallowed_ip=+10.0.0.0/8\nallowed_ip=10.1.2.3/16\n\
             allowed_ip=-10.0.0.0/8\npreshared_key={zeros}\n\n"
        ),
    );
    assert_eq!(answer, "errno=0\n\n");
    let updates = target.updates.borrow();
    let changes = &updates.last().unwrap().peers[0].allowed_ips;
    assert_eq!(changes[2], AllowedIpChange::Remove("10.0.0.0/8".parse().unwrap()));
    drop(updates);
    assert!(talk(&target, "get=1\n\n").contains("allowed_ip=10.1.0.0/16\nerrno=0"));
}

#[test]
fn ten_thousand_peers_are_set_and_got_in_small_pieces() {
    let target = Target::new();
    let mut request = String::from("set=1\nreplace_peers=true\n");
    for n in 0..10_000u32 {
        writeln!(request, "public_key={n:08x}{}", &PEER[8..]).unwrap();
        writeln!(request, "endpoint=192.0.2.1:{}", n % 60_000 + 1).unwrap();
        writeln!(request, "replace_allowed_ips=true").unwrap();
        writeln!(request, "allowed_ip=10.{}.{}.0/24", n / 256, n % 256).unwrap();
        writeln!(request, "allowed_ip=fd00:{n:x}::/64").unwrap();
    }
    request.push('\n');
    let answer = talk_in(&target, request.as_bytes(), vec![1000; request.len() / 1000 + 1]);
    assert_eq!(answer, "errno=0\n\n");
    let got = talk(&target, "get=1\n\n");
    assert_eq!(got.matches("public_key=").count(), 10_000);
    assert_eq!(got.matches("allowed_ip=").count(), 20_000);
    assert!(got.ends_with("\nerrno=0\n\n"));
}

fn update() -> impl Strategy<Value = DeviceUpdate> {
    let key = any::<[u8; 32]>();
    let net = prop_oneof![
        (any::<[u8; 4]>(), 0u8..=32)
            .prop_map(|(a, l)| format!("{}/{l}", std::net::Ipv4Addr::from(a))),
        (any::<[u8; 16]>(), 0u8..=128)
            .prop_map(|(a, l)| format!("{}/{l}", std::net::Ipv6Addr::from(a))),
    ];
    let change = (0u8..3, net).prop_map(|(kind, net)| match kind {
        0 => AllowedIpChange::Clear,
        1 => AllowedIpChange::Add(net.parse().unwrap()),
        _ => AllowedIpChange::Remove(net.parse().unwrap()),
    });
    let endpoint = prop_oneof![
        (1..u32::MAX, 1u16..).prop_map(|(a, p)| (std::net::Ipv4Addr::from(a), p).into()),
        (1..u128::MAX, 1u16..).prop_map(|(a, p)| (std::net::Ipv6Addr::from(a), p).into()),
    ];
    let peer = (
        key,
        any::<(bool, bool)>(),
        prop::option::of(key),
        prop::option::of(endpoint),
        any::<Option<u16>>(),
        prop::collection::vec(change, 0..4),
    )
        .prop_map(
            |(public_key, (remove, update_only), psk, endpoint, keepalive, allowed_ips)| {
                crate::PeerUpdate {
                    public_key,
                    remove,
                    update_only,
                    preshared_key: psk.map(Zeroizing::new),
                    endpoint,
                    persistent_keepalive: keepalive,
                    allowed_ips,
                }
            },
        );
    (
        prop::option::of(key),
        any::<(Option<u16>, Option<u32>, bool)>(),
        prop::collection::vec(peer, 0..4),
    )
        .prop_map(|(private_key, (listen_port, fwmark, replace_peers), peers)| DeviceUpdate {
            private_key: private_key.map(Zeroizing::new),
            listen_port,
            fwmark,
            replace_peers,
            peers,
        })
}

fn hex(key: &[u8; 32]) -> String {
    key.iter().fold(String::new(), |text, byte| text + &format!("{byte:02x}"))
}

/// An update as `wg` would write it.
fn write(update: &DeviceUpdate) -> String {
    let mut text = String::from("set=1\n");
    let mut line = |key: &str, value: String| writeln!(text, "{key}={value}").unwrap();
    update.private_key.iter().for_each(|key| line("private_key", hex(key)));
    update.listen_port.iter().for_each(|port| line("listen_port", port.to_string()));
    update.fwmark.iter().for_each(|mark| line("fwmark", mark.to_string()));
    if update.replace_peers {
        line("replace_peers", "true".into());
    }
    for peer in &update.peers {
        line("public_key", hex(&peer.public_key));
        if peer.remove {
            line("remove", "true".into());
        }
        if peer.update_only {
            line("update_only", "true".into());
        }
        peer.preshared_key.iter().for_each(|key| line("preshared_key", hex(key)));
        peer.endpoint.iter().for_each(|endpoint| line("endpoint", endpoint.to_string()));
        if let Some(seconds) = &peer.persistent_keepalive {
            line("persistent_keepalive_interval", seconds.to_string());
        }
        for change in &peer.allowed_ips {
            match change {
                AllowedIpChange::Clear => line("replace_allowed_ips", "true".into()),
                AllowedIpChange::Add(net) => line("allowed_ip", net.to_string()),
                AllowedIpChange::Remove(net) => line("allowed_ip", format!("-{net}")),
            }
        }
    }
    text.push('\n');
    text
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn an_update_survives_being_written_and_read_in_pieces(
        update in update(),
        pieces in prop::collection::vec(0usize..200, 0..40),
    ) {
        let target = Target::new();
        let answer = talk_in(&target, write(&update).as_bytes(), pieces);
        prop_assert_eq!(answer, "errno=0\n\n");
        prop_assert_eq!(target.updates.take(), vec![update]);
    }

    #[test]
    fn no_input_makes_the_server_panic(
        bytes in prop::collection::vec(any::<u8>(), 0..400),
        lines in prop::collection::vec("[a-z_]{0,12}=[-+0-9a-f:./%\\[\\]]{0,70}", 0..12),
    ) {
        let target = Target::new();
        talk_in(&target, &bytes, vec![]);
        let mut request = b"set=1\n".to_vec();
        request.extend(&bytes);
        talk_in(&target, &request, vec![7; 20]);
        talk(&target, &format!("set=1\npublic_key={PEER}\n{}\n\nget=1\n\n", lines.join("\n")));
    }
}
