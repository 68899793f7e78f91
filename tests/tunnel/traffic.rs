use super::host::{Host, Pair, keys, wait_for, wire};

#[test]
fn packets_pass_and_wg_shows_them() {
    let pair = Pair::over_ipv4();
    for address in ["10.9.0.2", "fd00:9::2"] {
        pair.a.sh(&format!("ping -n -c 3 -i 0.1 -W 2 {address}"));
    }
    let dump = pair.b.sh("wg show wg0 dump");
    let peer: Vec<_> = dump.lines().nth(1).unwrap().split('\t').collect();
    assert_eq!(peer[0], pair.key_a);
    assert_eq!(peer[2], "192.0.2.1:5001");
    assert_eq!(peer[3], "10.9.0.1/32,fd00:9::1/128");
    let age = pair.b.sh("echo $(($(date +%s) - $(wg show wg0 latest-handshakes | cut -f2)))");
    assert!((0..=20).contains(&age.parse::<i64>().unwrap()), "{age}");
    // Six pings of 84 or 104 bytes, padded and sealed, the handshake and the keepalive.
    let transferred = 3 * (96 + 32) + 3 * (112 + 32) + 148 + 32;
    assert_eq!(peer[5].parse::<u32>().unwrap(), transferred);
}

#[test]
fn it_works_over_ipv6() {
    let pair = Pair::over("[2001:db8::1]", "[2001:db8::2]");
    pair.a.sh("ping -n -c 3 -i 0.1 -W 2 10.9.0.2");
    assert_eq!(pair.b.sh("wg show wg0 endpoints | cut -f2"), "[2001:db8::1]:5001");
}

#[test]
fn it_works_over_link_local_addresses() {
    let pair = Pair::over_ipv4();
    // At first while our own is still checked for duplicates, and we send from another.
    let local =
        |host: &Host| host.sh("ip -6 -o addr show dev eth0 scope link | grep -o 'fe80[^/]*'");
    let (local_a, local_b) = (local(&pair.a), local(&pair.b));
    let spoken_to = format!("[{local_b}%eth0]:5002");
    let key = &pair.key_b;
    pair.a.sh(&format!("wg set wg0 peer {key} endpoint '{spoken_to}'"));
    pair.a.wait_for_ping("10.9.0.2");
    assert_eq!(pair.a.sh("wg show wg0 endpoints | cut -f2"), spoken_to);
    for host in [&pair.a, &pair.b] {
        wait_for("the link-local address", || {
            host.sh("ip -6 addr show dev eth0 scope link tentative").is_empty()
        });
    }
    pair.a.sh(&format!("wg set wg0 peer {key} endpoint 192.0.2.2:5002"));
    pair.a.sh(&format!("wg set wg0 peer {key} endpoint '{spoken_to}'"));
    pair.a.wait_for_ping("10.9.0.2");
    pair.b.wait_for_ping("10.9.0.1");
    assert_eq!(pair.a.sh("wg show wg0 endpoints | cut -f2"), spoken_to);
    let heard_from = format!("[{local_a}%eth0]:5001");
    assert_eq!(pair.b.sh("wg show wg0 endpoints | cut -f2"), heard_from);
}

#[test]
fn it_works_on_a_host_without_ipv6() {
    let pair = Pair::over_ipv4();
    pair.a.sh("ip link del wg0");
    pair.a.wait_for_end_of("wg0");
    pair.a.sh("sysctl -qw net.ipv6.conf.all.disable_ipv6=1 net.ipv6.conf.default.disable_ipv6=1");
    pair.a.tunnel("wg0");
    let (key, peer) = (pair.a.sh("wg genkey"), &pair.key_b);
    let public = pair.a.sh_with("wg pubkey", &key);
    pair.a.sh_with(
        &format!(
            "wg set wg0 listen-port 5001 private-key /dev/stdin peer {peer} \
             endpoint 192.0.2.2:5002 allowed-ips 10.9.0.2/32 \
             && ip addr add 10.9.0.1/24 dev wg0 && ip link set wg0 up"
        ),
        &key,
    );
    pair.b.sh(&format!("wg set wg0 peer {public} allowed-ips 10.9.0.1/32"));
    pair.a.wait_for_ping("10.9.0.2");
}

#[test]
fn tcp_and_large_packets_pass_whole() {
    let pair = Pair::over_ipv4();
    pair.a.wait_for_ping("10.9.0.2");
    for size in [1392, 1393, 8000, 60_000] {
        pair.a.sh(&format!("ping -n -c 2 -i 0.1 -W 2 -s {size} 10.9.0.2"));
    }
    let rate = tcp_rate(&pair, 3);
    assert!(rate > 20e6, "{rate} bit/s");
}

/// Bits per second that two TCP streams from `a` to `b` carry.
fn tcp_rate(pair: &Pair, seconds: u32) -> f64 {
    let mut server = pair.b.command("iperf3");
    server.args(["--server", "--one-off", "--forceflush"]).stdout(std::process::Stdio::piped());
    let mut server = server.spawn().expect("iperf3 (apt-get install iperf3)");
    wait_for("the iperf3 server", || !pair.b.sh("ss -Htln sport = 5201").is_empty());
    let client = format!("iperf3 --client 10.9.0.2 --time {seconds} --parallel 2 --json");
    let report: serde_json::Value = serde_json::from_str(&pair.a.sh(&client)).unwrap();
    server.wait().unwrap();
    report["end"]["sum_received"]["bits_per_second"].as_f64().unwrap()
}

#[test]
fn the_mtu_can_change_while_it_runs() {
    let pair = Pair::over_ipv4();
    for host in [&pair.a, &pair.b] {
        host.sh("ip link set eth0 mtu 9000 && ip link set wg0 mtu 8920");
    }
    pair.a.wait_for_ping("10.9.0.2");
    pair.a.sh("ping -n -c 2 -i 0.1 -W 2 -M do -s 8892 10.9.0.2");
    // The underlay gets smaller than what the tunnel sends: datagrams go in fragments, and
    // no longer many in one send.
    for host in [&pair.a, &pair.b] {
        host.sh("ip link set eth0 mtu 1300");
    }
    pair.a.sh("ping -n -c 2 -i 0.1 -W 2 -M do -s 8892 10.9.0.2");
    let rate = tcp_rate(&pair, 1);
    assert!(rate > 1e6, "{rate} bit/s");
}

#[test]
fn a_peer_that_moves_is_followed() {
    let pair = Pair::over_ipv4();
    pair.a.wait_for_ping("10.9.0.2");
    pair.b.sh("wg set wg0 listen-port 6002");
    pair.b.wait_for_ping("10.9.0.1");
    assert_eq!(pair.a.sh("wg show wg0 endpoints | cut -f2"), "192.0.2.2:6002");
    pair.b.sh("ip addr del 192.0.2.2/24 dev eth0 && ip addr add 192.0.2.77/24 dev eth0");
    pair.b.wait_for_ping("10.9.0.1");
    assert_eq!(pair.a.sh("wg show wg0 endpoints | cut -f2"), "192.0.2.77:6002");
    pair.a.wait_for_ping("10.9.0.2");
}

#[test]
fn a_peer_may_change_between_ipv4_and_ipv6() {
    let pair = Pair::over_ipv4();
    pair.loses_nothing_while(|| {
        for endpoint in ["[2001:db8::2]:5002", "192.0.2.2:5002", "[2001:db8::2]:5002"] {
            pair.a.sh(&format!("wg set wg0 peer {} endpoint {endpoint}", pair.key_b));
            let theirs = if endpoint.starts_with('[') { "[2001:db8::1]" } else { "192.0.2.1" };
            wait_for("the other end to follow", || {
                pair.b.sh("wg show wg0 endpoints").ends_with(&format!("{theirs}:5001"))
            });
        }
    });
}

#[test]
fn replies_leave_from_the_address_that_was_spoken_to() {
    let pair = Pair::over_ipv4();
    pair.b.sh("ip addr add 192.0.2.99/24 dev eth0");
    let (key_a, key_b) = (&pair.key_a, &pair.key_b);
    pair.b.sh(&format!("wg set wg0 peer {key_a} remove"));
    pair.b.sh(&format!("wg set wg0 peer {key_a} allowed-ips 10.9.0.1/32"));
    pair.a.sh(&format!("wg set wg0 peer {key_b} endpoint 192.0.2.99:5002"));
    pair.a.wait_for_ping("10.9.0.2");
    pair.b.wait_for_ping("10.9.0.1");
    assert_eq!(pair.a.sh("wg show wg0 endpoints | cut -f2"), "192.0.2.99:5002");
    // That address goes away: the next packet leaves from another.
    pair.b.sh("ip addr del 192.0.2.99/24 dev eth0");
    pair.b.wait_for_ping("10.9.0.1");
    assert_eq!(pair.a.sh("wg show wg0 endpoints | cut -f2"), "192.0.2.2:5002");
}

#[test]
fn a_link_that_goes_down_and_up_works_again() {
    let pair = Pair::over_ipv4();
    pair.a.wait_for_ping("10.9.0.2");
    pair.a.sh("ip link set wg0 down");
    assert!(!pair.b.pings("10.9.0.1"));
    pair.a.sh("ip link set wg0 up");
    pair.a.wait_for_ping("10.9.0.2");
    pair.b.wait_for_ping("10.9.0.1");
}

#[test]
fn a_device_moved_to_another_namespace_works_there() {
    let pair = Pair::over_ipv4();
    pair.a.wait_for_ping("10.9.0.2");
    pair.a.sh("mkdir -p /run/netns && ip netns add inner && ip link set wg0 netns inner \
         && ip -n inner addr add 10.9.0.1/24 dev wg0 && ip -n inner link set wg0 up");
    wait_for("an answer inside", || {
        pair.a.attempt("ip netns exec inner ping -n -c 1 -W 1 10.9.0.2").status.success()
    });
    pair.a.sh("ip -n inner link del wg0");
    pair.a.wait_for_end_of("wg0");
}

#[test]
fn congestion_is_told_through_the_tunnel() {
    let pair = Pair::over_ipv4();
    pair.a.wait_for_ping("10.9.0.2");
    let rules = "add table ip t
        add chain ip t outside { type filter hook prerouting priority 0; }
        add rule ip t outside iifname eth0 udp dport 5002 ip ecn ect0 ip ecn set ce
        add chain ip t inside { type filter hook input priority 0; }
        add rule ip t inside iifname wg0 ip ecn ce counter";
    pair.b.sh_with("nft -f -", rules);
    pair.a.sh("ping -n -c 3 -i 0.1 -W 2 -Q 2 10.9.0.2");
    let counted = pair.b.sh("nft list chain ip t inside");
    assert!(counted.contains("packets 3 "), "{counted}");
    pair.a.sh("ping -n -c 3 -i 0.1 -W 2 10.9.0.2");
    let counted = pair.b.sh("nft list chain ip t inside");
    assert!(counted.contains("packets 3 "), "{counted}");
}

#[test]
fn an_uplink_that_fails_over_is_left_at_once() {
    let pair = Pair::over_ipv4();
    let (a, b) = (&pair.a, &pair.b);
    second_wire(a, b);
    // The peer is behind both wires, and the default route says which one is used.
    b.sh("ip addr add 203.0.113.2/32 dev lo");
    a.sh("ip route add default via 192.0.2.2");
    a.sh(&format!("wg set wg0 peer {} endpoint 203.0.113.2:5002", pair.key_b));
    a.wait_for_ping("10.9.0.2");
    b.wait_for_ping("10.9.0.1");
    // The first one is cut; its address stays where it is.
    b.sh("ip link set eth0 down");
    a.sh("ip route replace default via 198.51.100.2");
    let said = a.sh("ping -n -q -i 0.1 -c 20 -W 2 10.9.0.2 || true");
    let received = said.split(", ").find_map(|part| part.strip_suffix(" received"));
    let received: u32 = received.and_then(|number| number.parse().ok()).unwrap();
    assert!(received >= 16, "{said}");
    assert_eq!(b.sh("wg show wg0 endpoints | cut -f2"), "198.51.100.1:5001");
}

#[test]
fn a_peer_behind_a_slow_link_does_not_starve_the_others() {
    let pair = Pair::over_ipv4();
    let (a, slow, fast) = (&pair.a, &pair.b, Host::new());
    second_wire(a, &fast);
    let (key, public) = keys(&fast);
    fast.tunnel("wg0");
    fast.sh_with(
        &format!(
            "wg set wg0 listen-port 5003 private-key /dev/stdin peer {} allowed-ips 10.9.0.1/32 \
             && ip addr add 10.9.0.3/24 dev wg0 && ip link set wg0 up",
            pair.key_a
        ),
        &key,
    );
    let set = "allowed-ips 10.9.0.3/32 endpoint 198.51.100.2:5003";
    a.sh(&format!("wg set wg0 peer {public} {set}"));
    a.wait_for_ping("10.9.0.2");
    a.wait_for_ping("10.9.0.3");
    // A queue longer than a socket's buffer, and somebody who fills it.
    a.sh("tc qdisc add dev eth0 root tbf rate 10mbit burst 32k limit 64m");
    let mut flood = a.command("timeout");
    flood.args(["6", "socat", "-u", "-b1300", "OPEN:/dev/zero", "UDP4-SENDTO:10.9.0.2:9"]);
    let mut flood = flood.spawn().expect("socat (apt-get install socat)");
    a.sh("sleep 2");
    let said = a.sh("ping -n -q -i 0.05 -c 60 -W 1 10.9.0.3 || true");
    flood.wait().unwrap();
    assert!(said.contains("60 received"), "{said}");
    assert!(slow.link_exists("wg0"));
}

/// Another wire between two hosts: `eth1` with 198.51.100.1 and .2.
fn second_wire(a: &Host, b: &Host) {
    wire("eth1", a, b);
    for (host, n) in [(a, 1), (b, 2)] {
        host.sh(&format!("ip addr add 198.51.100.{n}/24 dev eth1 && ip link set eth1 up"));
    }
}
