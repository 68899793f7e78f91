//! How packets are moved: every fallback with every other and with other implementations, order,
//! and packets of all sizes and kinds.

use std::process::Stdio;

use super::host::{Host, Maker, Pair, wait_for};

const NO_TUN_OFFLOAD: &str = "--no-tun-offload";
const NO_UDP_GSO: &str = "--no-udp-gso";
const NO_UDP_GRO: &str = "--no-udp-gro";
const ONE_QUEUE: &str = "--queues=1";
const FOUR_QUEUES: &str = "--queues=4";
const NO_AVX512: &str = "--no-avx512";
const NOTHING: &str = "--no-tun-offload --no-udp-gso --no-udp-gro --no-avx512 --queues=1";
const OPTIONS: [&str; 8] =
    ["", NO_TUN_OFFLOAD, NO_UDP_GSO, NO_UDP_GRO, NO_AVX512, ONE_QUEUE, FOUR_QUEUES, NOTHING];

/// Bytes of a stream.
const STREAM: u64 = 20_000_000;
/// Of what a full packet carries, at most, bytes.
const SEGMENT: u64 = 1400;

/// Sends a stream both ways in both families, and compares.
#[track_caller]
fn streams_arrive(pair: &Pair, bytes: u64) {
    pair.a.wait_for_ping("10.9.0.2");
    for (from, to, n) in [(&pair.a, &pair.b, 2), (&pair.b, &pair.a, 1)] {
        from.sh(&format!("head -c {bytes} /dev/urandom > /run/sent"));
        for (family, address) in [("4", format!("10.9.0.{n}")), ("6", format!("[fd00:9::{n}]"))] {
            let received = stream([from, to], "FILE:/run/sent", family, &address, "sha256sum");
            assert_eq!(received, from.sh("sha256sum < /run/sent"));
        }
    }
}

/// Sends what socat reads from `source` by TCP to an address of the other host, and returns what a
/// program there says of it.
#[track_caller]
fn stream(
    [from, to]: [&Host; 2],
    source: &str,
    family: &str,
    address: &str,
    program: &str,
) -> String {
    let receive = format!("socat -u TCP{family}-LISTEN:9000,reuseaddr - | {program}");
    let mut receiver = to.command("bash");
    let receiver = receiver.args(["-c", &receive]).stdout(Stdio::piped()).spawn().unwrap();
    wait_for("the receiver", || !to.sh("ss -Htln sport = 9000").is_empty());
    from.sh(&format!("timeout 20 socat -u {source} TCP{family}:{address}:9000"));
    let received = receiver.wait_with_output().unwrap().stdout;
    String::from_utf8(received).unwrap().trim().to_owned()
}

/// Five million bytes.
const ZEROS: &str = "SYSTEM:'head -c 5000000 /dev/zero'";

/// One of the kernel's counters of a host.
fn counter(host: &Host, name: &str) -> u64 {
    let said = host.sh(&format!("nstat -asz {name}"));
    let value = said.lines().last().and_then(|line| line.split_whitespace().nth(1));
    value.and_then(|value| value.parse().ok()).unwrap_or_else(|| panic!("nstat: {said}"))
}

/// Asserts that a tunnel does what its options leave it, and nothing else. It has sent and
/// received four streams of [`STREAM`].
#[track_caller]
fn is_as_asked(host: &Host, options: &str) {
    let features = host.sh("ethtool -k wg0");
    let on = if options.contains(NO_TUN_OFFLOAD) { "off" } else { "on" };
    for feature in ["tcp-segmentation-offload", "tx-checksumming"] {
        assert!(features.contains(&format!("{feature}: {on}")), "{options}: {features}");
    }
    let queues = host.sh("ls -d /sys/class/net/wg0/queues/tx-* | wc -l");
    let processors = host.sh("nproc").parse::<usize>().unwrap().min(8).to_string();
    let expected = options.split_once("--queues=").map_or(&*processors, |(_, queues)| queues);
    assert_eq!(queues, expected, "{options}");
    let has_avx512 = std::fs::read_to_string("/proc/cpuinfo").unwrap();
    let has_avx512 =
        ["avx512f", "avx512bw", "avx512ifma"].iter().all(|name| has_avx512.contains(name));
    let avx512 = has_avx512 && !options.contains(NO_AVX512);
    host.sh(&format!("grep 'cipher avx512={avx512}' /run/wg0.log"));
    // Of datagrams that are sent or received as one, the kernel counts one.
    let packets = 2 * STREAM / SEGMENT;
    for (name, flag) in [("UdpOutDatagrams", NO_UDP_GSO), ("UdpInDatagrams", NO_UDP_GRO)] {
        let count = counter(host, name);
        let is_single = options.contains(flag);
        // What arrives merged, or goes out in runs, depends on the other end and on
        // super-packets.
        if is_single {
            assert!(count >= packets, "{options}: {name} {count}");
        } else if options.is_empty() && flag == NO_UDP_GSO {
            assert!(count < packets, "{options}: {name} {count}");
        }
    }
}

#[test]
fn every_fallback_speaks_with_every_other() {
    for (n, one) in OPTIONS.into_iter().enumerate() {
        for other in OPTIONS.into_iter().skip(n) {
            let pair = Pair::of([one, other].map(Maker::Gambeson));
            streams_arrive(&pair, STREAM);
            is_as_asked(&pair.a, one);
            is_as_asked(&pair.b, other);
        }
    }
}

#[test]
fn every_fallback_speaks_with_wireguard_go() {
    for options in OPTIONS {
        let pair = Pair::of([Maker::Gambeson(options), Maker::WireguardGo]);
        streams_arrive(&pair, STREAM);
        is_as_asked(&pair.a, options);
    }
}

/// Where there is one: a test in the virtual machine.
pub(crate) fn every_fallback_speaks_with_the_kernel() {
    for options in OPTIONS {
        let pair = Pair::of([Maker::Gambeson(options), Maker::Kernel]);
        streams_arrive(&pair, 300_000);
    }
}

#[test]
fn parallel_streams_keep_their_order() {
    let pair = Pair::of([Maker::Gambeson(FOUR_QUEUES); 2]);
    pair.a.wait_for_ping("10.9.0.2");
    let mut server = pair.b.command("iperf3");
    let mut server = server.arg("--server").stdout(Stdio::null()).spawn().unwrap();
    wait_for("the iperf3 server", || !pair.b.sh("ss -Htln sport = 5201").is_empty());
    let run = |options: &str| {
        let client = format!("iperf3 --client 10.9.0.2 --time 3 --parallel 4 --json {options}");
        serde_json::from_str::<serde_json::Value>(&pair.a.sh(&client)).unwrap()
    };
    run("");
    run("--bidir");
    for host in [&pair.a, &pair.b] {
        assert_eq!(counter(host, "TcpExtTCPOFOQueue"), 0, "segments out of order");
    }
    let report = run("--udp --bitrate 50M --length 1000 --get-server-output");
    let streams = report["end"]["streams"].as_array().unwrap();
    assert_eq!(streams.len(), 4);
    for stream in streams {
        assert_eq!(stream["udp"]["out_of_order"], 0, "{stream}");
        assert!(stream["udp"]["packets"].as_u64().unwrap() > 10_000, "{stream}");
    }
    server.kill().unwrap();
    server.wait().unwrap();
}

#[test]
fn packets_of_all_sizes_pass() {
    let pair = Pair::over_ipv4();
    // The largest MTU of a veth, and the least that IPv6 and IPv4 allow.
    for (outer, inner) in [(65_535, 65_455), (9000, 8920), (1500, 1440), (1400, 1280), (656, 576)] {
        for host in [&pair.a, &pair.b] {
            host.sh(&format!("ip link set eth0 mtu {outer} && ip link set wg0 mtu {inner}"));
        }
        pair.a.wait_for_ping("10.9.0.2");
        for payload in [0, 1, 15, 16, 17, inner - 29, inner - 28] {
            let ping = "ping -n -c 2 -i 0.05 -W 2 -M do";
            pair.a.sh(&format!("{ping} -s {payload} 10.9.0.2"));
        }
        // In fragments, and as large as it gets.
        pair.a.sh("ping -n -c 2 -i 0.05 -W 2 -s 65507 10.9.0.2");
        let received = stream([&pair.a, &pair.b], ZEROS, "4", "10.9.0.2", "wc -c");
        assert_eq!(received, "5000000", "MTU {inner}");
    }
}

#[test]
fn vxlan_fragments_and_extension_headers_pass() {
    let pair = Pair::over_ipv4();
    pair.a.wait_for_ping("10.9.0.2");
    for (host, n, other) in [(&pair.a, 1, 2), (&pair.b, 2, 1)] {
        for (name, id, checksum) in [("vx0", 7, "noudpcsum"), ("vx1", 8, "udpcsum")] {
            host.sh(&format!(
                "ip link add {name} type vxlan id {id} remote 10.9.0.{other} local 10.9.0.{n} \
                     dstport 478{id} {checksum}; ip addr add 10.{id}.0.{n}/24 dev {name}; \
                 ip link set {name} up"
            ));
        }
    }
    for id in [7, 8] {
        let address = format!("10.{id}.0.2");
        pair.a.wait_for_ping(&address);
        pair.a.sh(&format!("ping -n -c 3 -i 0.05 -W 2 -s 9000 {address}"));
        assert_eq!(stream([&pair.a, &pair.b], ZEROS, "4", &address, "wc -c"), "5000000");
    }
    // Fragments of IPv6 have an extension header each.
    pair.a.sh("ping -n -c 3 -i 0.05 -W 2 -s 20000 fd00:9::2");
    pair.a.sh("ping -n -c 3 -i 0.05 -W 2 -R 10.9.0.2");
}

#[test]
fn counters_agree_with_the_traffic() {
    let pair = Pair::over_ipv4();
    pair.a.wait_for_ping("10.9.0.2");
    streams_arrive(&pair, STREAM);
    let bytes = |host: &Host| -> [u64; 2] {
        let said = host.sh("wg show wg0 transfer");
        let mut numbers = said.split_whitespace().skip(1).map(|number| number.parse().unwrap());
        [numbers.next().unwrap(), numbers.next().unwrap()]
    };
    // A keepalive may be under way.
    wait_for("both ends to agree", || {
        let ([received, sent], [theirs, ours]) = (bytes(&pair.a), bytes(&pair.b));
        received == ours && sent == theirs
    });
    let [received, sent] = bytes(&pair.a);
    // What the wire has carried, without what Ethernet, IP and UDP add: 42 bytes a datagram.
    let wire = |direction: &str| -> u64 {
        pair.a.sh(&format!("cat /sys/class/net/eth0/statistics/{direction}_bytes")).parse().unwrap()
    };
    assert!(received > 2 * STREAM && sent > 2 * STREAM);
    for (counted, carried) in [(received, wire("rx")), (sent, wire("tx"))] {
        assert!(counted < carried && counted > carried / 100 * 90, "{counted} of {carried}");
    }
}
