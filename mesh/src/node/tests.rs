use super::*;
use crate::fixtures::{key, local, net, record};

/// Node 2 as node 1 reads it, with one annotation changed or taken away.
fn with(name: &str, value: Option<&str>) -> Result<Node, Refusal> {
    let mut record = record(&local(2, 0));
    match value {
        Some(value) => _ = record.annotations.insert(name.to_owned(), value.to_owned()),
        None => _ = record.annotations.remove(name),
    }
    Node::parse(&record, &local(1, 0))
}

fn with_cidrs(cidrs: &[&str]) -> Result<Node, Refusal> {
    let mut record = record(&local(2, 0));
    record.pod_cidrs = cidrs.iter().map(|&cidr| cidr.to_owned()).collect();
    Node::parse(&record, &local(1, 0))
}

/// The message of a refusal, which has to name the annotation. Of an option that people set,
/// it is no refusal: the option counts as not set.
fn refused(name: &str, value: &str) -> String {
    let message = if name.starts_with(annotation::CONFIG) {
        let mut node = with(name, Some(value)).unwrap();
        let problem = node.ignored.pop().expect(value);
        assert_eq!(node, with(name, None).unwrap());
        problem.to_string()
    } else {
        with(name, Some(value)).expect_err(value).to_string()
    };
    let key = annotation::key(DEFAULT_PREFIX, name);
    assert!(message.contains(&format!("annotation {key} ")), "{message}");
    assert!(message.len() < 500, "{message}");
    message
}

#[test]
fn a_node_reads_what_another_publishes() {
    let (mut theirs, ours) = (local(2, 6), local(1, 0));
    theirs.keys.insert(Generation::new(7), key(77));
    let node = Node::parse(&record(&theirs), &ours).unwrap();
    assert_eq!(node.generation, Generation::new(6));
    assert_eq!(node.public_key, Some(key(2)));
    assert_eq!(node.next_public_key, Some(key(77)));
    assert_eq!(node.endpoints, theirs.endpoints);
    assert_eq!(node.port, DEFAULT_PORT);
    assert_eq!(node.mtu, Some(1420));
    assert_eq!(node.pod_cidrs, theirs.pod_cidrs);
    assert_eq!(node.transports, theirs.transports);
}

#[test]
fn what_no_longer_applies_is_deleted() {
    let mut own = local(1, 6);
    own.endpoints.v6 = None;
    let published = own.annotations();
    assert_eq!(published["next-public-key"], None);
    assert_eq!(published["endpoint-v6"], None);
    assert_eq!(published["endpoint"].as_deref(), Some("192.168.240.1"));
    assert_eq!(published["key-generation"].as_deref(), Some("6"));
    assert_eq!(published["transports"].as_deref(), Some("wireguard"));
    assert_eq!(published["port"].as_deref(), Some("51820"));
    assert_eq!(published["mtu"].as_deref(), Some("1440"));
}

#[test]
fn the_inner_mtu_leaves_room_for_the_larger_header() {
    let mtu = |underlay_mtu, v6: bool| {
        let mut own = Local { underlay_mtu, ..local(1, 0) };
        own.endpoints.v6 = own.endpoints.v6.filter(|_| v6);
        own.inner_mtu()
    };
    assert_eq!(mtu(1500, false), 1440);
    assert_eq!(mtu(1500, true), 1420);
    assert_eq!(mtu(9000, false), 8940);
    assert_eq!(mtu(50, true), 0);
}

// Fault 17.
#[test]
fn a_bad_key_is_refused_and_named() {
    use base64_of as encode;
    for name in ["public-key", "next-public-key"] {
        assert!(refused(name, "not base64").contains("\"not base64\""));
        for text in [encode(&[9; 31]), encode(&[9; 33]), "A".repeat(44), String::new()] {
            assert!(refused(name, &text).contains("base64 of 32 bytes"), "{text}");
        }
        assert!(refused(name, &encode(&[0; 32])).contains("low-order"));
        let mut one = [0; 32];
        one[0] = 1;
        assert!(refused(name, &encode(&one)).contains("low-order"));
        let message = refused(name, &"A".repeat(256 * 1024));
        assert!(message.contains("over 256 bytes long"), "{message}");
    }
    assert!(refused("next-public-key", &key(2).to_string()).contains("same as public-key"));
}

// Fault 17.
#[test]
fn missing_annotations_are_named() {
    for name in ["public-key", "key-generation"] {
        let refusal = with(name, None).unwrap_err();
        assert!(refusal.to_string().contains(&format!("annotation gambeson.io/{name} is missing")));
        assert!(!refusal.is_waiting());
    }
    let mut bare = record(&local(2, 0));
    bare.annotations.clear();
    bare.annotations.insert("config/endpoint".to_owned(), "192.0.2.1".to_owned());
    let refusal = Node::parse(&bare, &local(1, 0)).unwrap_err();
    assert_eq!(refusal, Refusal::NoKey);
    assert!(refusal.is_waiting());
    for name in ["port", "transports", "mtu"] {
        assert!(with(name, None).is_ok(), "{name} has a default");
    }
}

#[test]
fn numbers_are_plain() {
    for bad in ["-1", "+1", "01", "1.0", "1 ", "", "18446744073709551616", "0x1", "\u{663}"] {
        refused("key-generation", bad);
    }
    let last = u64::MAX.to_string();
    assert_eq!(with("key-generation", Some(&last)).unwrap().generation.number(), u64::MAX);
    let mut record = record(&local(2, u64::MAX));
    record.annotations.insert("next-public-key".to_owned(), key(77).to_string());
    assert!(Node::parse(&record, &local(1, 0)).is_err());
}

// Fault 19.
#[test]
fn a_bad_endpoint_is_refused_and_named() {
    for (address, problem) in [
        ("127.0.0.1", "loopback"),
        ("127.255.0.9", "loopback"),
        ("224.0.0.1", "multicast"),
        ("239.1.1.1", "multicast"),
        ("0.0.0.0", "unspecified"),
        ("0.1.2.3", "unspecified"),
        ("255.255.255.255", "broadcast"),
        ("10.244.9.9", "cluster network 10.244.0.0/16"),
        ("10.244.0.0", "cluster network 10.244.0.0/16"),
        ("192.168.240.2:51820", "not an IPv4 address"),
        ("192.168.240.02", "not an IPv4 address"),
        ("fd00:240::2", "not an IPv4 address"),
        ("node-2.example.com", "not an IPv4 address"),
        ("", "not an IPv4 address"),
    ] {
        for name in ["endpoint", "config/endpoint"] {
            assert!(refused(name, address).contains(problem), "{address}");
        }
    }
    for (address, problem) in [
        ("::1", "loopback"),
        ("ff02::1", "multicast"),
        ("::", "unspecified"),
        ("fe80::1", "link-local"),
        ("febf::1", "link-local"),
        ("fd00:10:244:9::1", "cluster network fd00:10:244::/48"),
        ("::ffff:192.168.240.2", "IPv4 address in IPv6 form"),
        ("::192.168.240.2", "IPv4 address in IPv6 form"),
        ("192.168.240.2", "not an IPv6 address"),
        ("fd00:240::2%eth0", "not an IPv6 address"),
        ("[fd00:240::2]", "not an IPv6 address"),
    ] {
        for name in ["endpoint-v6", "config/endpoint-v6"] {
            assert!(refused(name, address).contains(problem), "{address}");
        }
    }
}

// Fault 19.
#[test]
fn a_base_port_leaves_room_for_four_sessions() {
    for bad in ["0", "65530", "65535", "65536", "-1", "http", "51820/udp"] {
        assert!(refused("port", bad).contains("1 to 65529"), "{bad}");
    }
    assert_eq!(MAX_PORT, 65529);
    assert_eq!(with("port", Some("65529")).unwrap().port, MAX_PORT);
    assert_eq!(with("port", Some("1")).unwrap().port, 1);
    assert_eq!(with("port", None).unwrap().port, DEFAULT_PORT);
}

#[test]
fn an_operators_endpoint_wins() {
    let node = with("config/endpoint", Some("203.0.113.7")).unwrap();
    assert_eq!(node.endpoints.v4, Some([203, 0, 113, 7].into()));
    assert_eq!(node.endpoints.v6, local(2, 0).endpoints.v6);
    let node = with("config/endpoint-v6", Some("2001:db8::7")).unwrap();
    assert_eq!(node.endpoints.v6, Some("2001:db8::7".parse().unwrap()));
}

#[test]
fn a_node_without_any_endpoint_is_refused() {
    let mut record = record(&local(2, 0));
    record.annotations.retain(|name, _| !name.starts_with("endpoint"));
    assert_eq!(Node::parse(&record, &local(1, 0)), Err(Refusal::NoEndpoint));
}

#[test]
fn unknown_transports_are_for_later_versions() {
    let node = with("transports", Some("quic,wireguard,host-gw")).unwrap();
    assert_eq!(node.transports, BTreeSet::from([Transport::Wireguard, Transport::HostGw]));
    assert_eq!(with("transports", Some("quic")).unwrap().transports, BTreeSet::new());
    for bad in ["", "wireguard,", "Wireguard", "wireguard, vxlan", "wire\nguard"] {
        refused("transports", bad);
    }
    for transport in [Transport::Wireguard, Transport::HostGw, Transport::Vxlan] {
        assert_eq!(Transport::parse(transport.as_str()), Some(transport));
    }
}

#[test]
fn an_absurd_mtu_or_keepalive_is_refused() {
    for bad in ["0", "575", "65521", "4294967296", "1420 bytes"] {
        refused("mtu", bad);
    }
    for bad in ["-1", "65536", "on", "25s"] {
        refused("config/persistent-keepalive", bad);
    }
    let keepalive =
        |value| with("config/persistent-keepalive", Some(value)).unwrap().persistent_keepalive;
    assert_eq!(keepalive("25"), Some(25));
    assert_eq!(keepalive("0"), None);
    assert_eq!(keepalive("off"), None);
}

// Fault 18.
#[test]
fn a_node_without_pod_cidr_waits() {
    let refusal = with_cidrs(&[]).unwrap_err();
    assert_eq!(refusal, Refusal::NoPodCidr);
    assert!(refusal.is_waiting());
}

// Fault 18.
#[test]
fn a_pod_cidr_outside_of_or_as_large_as_the_cluster_network_is_refused() {
    for cidr in [
        "10.245.1.0/24",
        "0.0.0.0/0",
        "::/0",
        "10.244.0.0/16",
        "10.244.0.0/15",
        "10.0.0.0/8",
        "fd00:10:244::/48",
        "fd00:10:245::/64",
        "::ffff:10.244.2.0/120",
    ] {
        let refusal = with_cidrs(&[cidr]).unwrap_err();
        let message = refusal.to_string();
        assert!(matches!(refusal, Refusal::PodCidrOutside { .. }), "{message}");
        assert!(message.contains("10.244.0.0/16, fd00:10:244::/48"), "{message}");
    }
}

// Fault 18.
#[test]
fn a_malformed_pod_cidr_is_refused() {
    let long = "1".repeat(10_000);
    for cidr in
        ["", "10.244.2.0", "10.244.2.0/33", "10.244.2.1/24", "fd00:10:244:2::1/64", "/24", &long]
    {
        let refusal = with_cidrs(&[cidr]).unwrap_err();
        assert!(matches!(refusal, Refusal::PodCidr { .. }), "{refusal}");
        assert!(refusal.to_string().len() < 300);
    }
    let nested = with_cidrs(&["10.244.2.0/24", "10.244.2.128/25"]).unwrap_err();
    assert!(nested.to_string().contains("same Node"), "{nested}");
    let many: Vec<_> = (0..17).map(|i| format!("10.244.{i}.0/24")).collect();
    let many: Vec<_> = many.iter().map(String::as_str).collect();
    assert_eq!(with_cidrs(&many), Err(Refusal::TooManyPodCidrs { count: 17 }));
}

#[test]
fn a_family_that_is_switched_off_is_left_out() {
    let v4 = BTreeSet::from([net("10.244.0.0/16")]);
    let node = record(&local(2, 0));
    assert_eq!(pod_cidrs(&node, &v4), Ok(BTreeSet::from([net("10.244.2.0/24")])));
    let mut only_v6 = node.clone();
    only_v6.pod_cidrs.retain(|cidr| cidr.contains(':'));
    let refusal = pod_cidrs(&only_v6, &v4).unwrap_err();
    assert!(matches!(refusal, Refusal::NoPodCidrInUse { .. }), "{refusal}");
}

#[test]
fn messages_are_safe_to_print() {
    let message = refused("endpoint", "\u{1b}[2J\"\n\u{202e}x");
    assert!(!message.contains(['\u{1b}', '\n', '\u{202e}']), "{message}");
    let message = refused("transports", &"\u{1f600}".repeat(60));
    assert!(message.contains('\u{1f600}'));
}

/// Strict base64 with padding, by hand: this crate has no need of the library.
fn base64_of(bytes: &[u8]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let group = |chunk: &[u8]| {
        let at = |i: usize| u32::from(chunk.get(i).copied().unwrap_or(0));
        let bits = at(0) << 16 | at(1) << 8 | at(2);
        let digit = |i: usize| match i <= chunk.len() {
            true => char::from(ALPHABET[(bits >> (18 - 6 * i)) as usize & 63]),
            false => '=',
        };
        (0..4).map(digit).collect::<String>()
    };
    bytes.chunks(3).map(group).collect()
}
