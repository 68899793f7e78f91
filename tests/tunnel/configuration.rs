use std::fmt::Write as _;
use std::thread::sleep;
use std::time::{Duration, Instant};

use super::host::{GAMBESON, Host, Pair, Pings, wait_for, wired};

#[test]
fn setconf_and_showconf_agree_and_syncconf_loses_nothing() {
    let pair = Pair::over_ipv4();
    let conf = pair.a.sh("wg showconf wg0");
    assert!(conf.contains("ListenPort = 5001") && conf.contains("Endpoint = 192.0.2.2:5002"));
    pair.a.sh_with("wg setconf wg0 /dev/stdin", &conf);
    assert_eq!(pair.a.sh("wg showconf wg0"), conf);
    pair.loses_nothing_while(|| {
        for n in 0..20 {
            pair.a.sh_with("wg syncconf wg0 /dev/stdin", &conf);
            let more = format!(
                "{conf}\n[Peer]\nPublicKey = {}\nAllowedIPs = 10.77.0.0/16\n",
                pair.key_a.replace(|c: char| c.is_ascii_digit(), "A")
            );
            pair.a.sh_with("wg syncconf wg0 /dev/stdin", &more);
            assert_eq!(pair.a.sh("wg show wg0 peers").lines().count(), 2, "round {n}");
        }
    });
    pair.a.sh_with("wg syncconf wg0 /dev/stdin", &conf);
    assert_eq!(pair.a.sh("wg showconf wg0"), conf);
    // Without a port in it, a random one is chosen once and kept.
    let portless = conf.replace("ListenPort = 5001\n", "");
    pair.a.sh_with("wg syncconf wg0 /dev/stdin", &portless);
    let port = pair.a.sh("wg show wg0 listen-port");
    assert!(port != "5001" && port != "0");
    pair.a.sh_with("wg syncconf wg0 /dev/stdin", &portless);
    assert_eq!(pair.a.sh("wg show wg0 listen-port"), port);
}

#[test]
fn attributes_of_a_peer_change_without_a_loss() {
    let pair = Pair::over_ipv4();
    let (key, other) = (pair.key_b.clone(), pair.key_a.clone());
    let psk = pair.a.sh("wg genpsk");
    pair.loses_nothing_while(|| {
        for seconds in [25, 7, 0, 25] {
            pair.a.sh(&format!("wg set wg0 peer {key} persistent-keepalive {seconds}"));
        }
        pair.a.sh(&format!("wg set wg0 peer {key} allowed-ips 10.9.0.2/32,10.10.0.0/16"));
        pair.a.sh_with(&format!("wg set wg0 peer {key} preshared-key /dev/stdin"), &psk);
        pair.b.sh_with(&format!("wg set wg0 peer {other} preshared-key /dev/stdin"), &psk);
        pair.a.sh("wg set wg0 fwmark 51");
        pair.a.sh("wg set wg0 fwmark 0");
    });
    assert_eq!(pair.a.sh("wg show wg0 preshared-keys | cut -f2"), psk);
    assert_eq!(pair.a.sh("wg show wg0 persistent-keepalive | cut -f2"), "25");
    assert_eq!(pair.a.sh("wg show wg0 allowed-ips | cut -f2"), "10.9.0.2/32 10.10.0.0/16");
}

#[test]
fn fifty_changes_of_the_preshared_key_lose_nothing() {
    let pair = Pair::over_ipv4();
    pair.a.wait_for_ping("10.9.0.2");
    let pings = [
        pair.a.start_pings("10.9.0.2", "0.001", 12_000),
        pair.b.start_pings("10.9.0.1", "0.001", 12_000),
    ];
    for n in 0..50 {
        let psk = pair.a.sh("wg genpsk");
        let set = |host: &Host, peer: &str| {
            host.sh_with(&format!("wg set wg0 peer {peer} preshared-key /dev/stdin"), &psk);
        };
        let (a, b) = ((&pair.a, &pair.key_b), (&pair.b, &pair.key_a));
        let (first, second) = if n % 2 == 0 { (a, b) } else { (b, a) };
        set(first.0, first.1);
        sleep(Duration::from_millis(n * 7 % 150));
        set(second.0, second.1);
        sleep(Duration::from_millis(100));
    }
    pings.into_iter().for_each(Pings::assert_all_answered);
    assert!(pair.a.pings("10.9.0.2"));
}

#[test]
fn the_listen_port_changes_and_a_taken_one_is_refused() {
    let pair = Pair::over_ipv4();
    pair.a.wait_for_ping("10.9.0.2");
    pair.a.sh("wg set wg0 listen-port 7001");
    pair.a.wait_for_ping("10.9.0.2");
    assert_eq!(pair.b.sh("wg show wg0 endpoints | cut -f2"), "192.0.2.1:7001");
    assert_eq!(listening(&pair.a, 7001), BOTH);
    assert_eq!(listening(&pair.a, 5001), "");
    pair.a.tunnel("wg1");
    let output = pair.a.attempt("wg set wg1 listen-port 7001 fwmark 9");
    assert!(!output.status.success());
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(said.contains("Address already in use"), "{said}");
    assert_eq!(pair.a.sh("wg show wg1 fwmark"), "off", "nothing of it is applied");
}

#[test]
fn no_port_is_bound_while_the_link_is_down() {
    let (a, _) = wired();
    a.tunnel("wg0");
    let listening = || listening(&a, 7777);
    let key = a.sh("wg genkey");
    a.sh_with("wg set wg0 listen-port 7777 private-key /dev/stdin", &key);
    assert_eq!(listening(), "");
    assert_eq!(a.sh("wg show wg0 listen-port"), "7777");
    a.sh("ip link set wg0 up");
    wait_for("the port", || listening() == BOTH);
    a.sh("ip link set wg0 down");
    wait_for("the port to be free", || listening().is_empty());
    a.sh("ip link set wg0 up");
    wait_for("the port", || listening() == BOTH);
}

const BOTH: &str = "0.0.0.0\n[::]";

/// The addresses that sockets of this port are bound to; there may be several on each.
fn listening(host: &Host, port: u16) -> String {
    host.sh(&format!(
        "ss -Huln sport = {port} | awk '{{ sub(/:[0-9]+$/, \"\", $4); print $4 }}' | sort -u"
    ))
}

#[test]
fn the_fwmark_is_on_what_leaves() {
    let pair = Pair::over_ipv4();
    pair.a.wait_for_ping("10.9.0.2");
    pair.a.sh("ip rule add fwmark 0x33 blackhole");
    pair.a.sh("wg set wg0 fwmark 0x33");
    assert_eq!(pair.a.sh("wg show wg0 fwmark"), "0x33");
    assert!(!pair.a.pings("10.9.0.2"));
    // A new port keeps the mark.
    pair.a.sh("wg set wg0 listen-port 7001");
    assert!(!pair.a.pings("10.9.0.2"));
    pair.a.sh("wg set wg0 fwmark 0");
    pair.a.wait_for_ping("10.9.0.2");
}

#[test]
fn a_removed_peer_is_not_heard_any_more() {
    let pair = Pair::over_ipv4();
    pair.a.wait_for_ping("10.9.0.2");
    let (key_a, key_b) = (&pair.key_a, &pair.key_b);
    pair.a.sh(&format!("wg set wg0 peer {key_b} remove"));
    assert_eq!(pair.a.sh("wg show wg0 peers"), "");
    assert!(!pair.b.pings("10.9.0.1"));
    // Our own key as a peer is ignored, as the kernel does.
    pair.a.sh(&format!("wg set wg0 peer {key_a} allowed-ips 10.9.0.0/24"));
    assert_eq!(pair.a.sh("wg show wg0 peers"), "");
    pair.a.sh(&format!("wg set wg0 peer {key_b} endpoint 192.0.2.2:5002 allowed-ips 10.9.0.2/32"));
    pair.a.wait_for_ping("10.9.0.2");
}

/// The beginning of a peer's section, with a key of its own for each number.
fn peer(n: u32) -> String {
    let mut key = [7; 32];
    key[..4].copy_from_slice(&n.to_be_bytes());
    let key = base64::Engine::encode(&base64::engine::general_purpose::STANDARD, key);
    format!("[Peer]\nPublicKey = {key}\nEndpoint = 192.0.2.2:{}\n", n + 1)
}

#[test]
fn two_thousand_peers_are_set_and_shown() {
    let (a, _b) = wired();
    a.tunnel("wg0");
    let mut conf = String::from("[Interface]\nListenPort = 5001\n");
    for n in 0..2000u32 {
        conf += &peer(n);
        writeln!(conf, "AllowedIPs = 10.{}.{}.0/24, fd00:{n:x}::/64", n / 256, n % 256).unwrap();
    }
    a.sh("wg genkey > /run/key && wg set wg0 private-key /run/key && ip link set wg0 up");
    a.sh_with("cat > /run/conf", &conf);
    for _ in 0..2 {
        a.sh("wg addconf wg0 /run/conf");
        let dump = a.sh("wg show wg0 dump");
        assert_eq!(dump.lines().count(), 2001);
        assert_eq!(dump.matches("/24,fd00:").count(), 2000);
    }
    a.sh("echo '[Interface]' > /run/empty && wg syncconf wg0 /run/empty");
    assert_eq!(a.sh("wg show wg0 dump").lines().count(), 1);
}

#[test]
fn ten_thousand_peers_are_set_at_once_in_little_time_and_memory() {
    let (a, _b) = wired();
    a.tunnel("wg0");
    let mut conf = String::from("[Interface]\nListenPort = 5001\n");
    for n in 0..10_000u32 {
        conf += &peer(n);
        writeln!(conf, "AllowedIPs = 10.{}.{}.0/24", n / 256, n % 256).unwrap();
    }
    a.sh("wg genkey > /run/key && ip link set wg0 up");
    conf.insert_str(
        conf.find("[Peer]").unwrap(),
        &format!("PrivateKey = {}\n", a.sh("cat /run/key")),
    );
    a.sh_with("cat > /run/conf", &conf);
    let start = Instant::now();
    a.sh("wg setconf wg0 /run/conf");
    let taken = start.elapsed();
    assert!(taken < Duration::from_secs(2), "{taken:?}");
    assert_eq!(a.sh("wg show wg0 dump").lines().count(), 10_001);
    let pid = a.tunnel_pid("wg0");
    let most = a.sh(&format!("awk '/^VmHWM/ {{ print $2 }}' /proc/{pid}/status"));
    assert!(most.parse::<u32>().unwrap() < 100 << 10, "{most} KiB");
    let ticks = || -> u64 {
        a.sh(&format!("awk '{{ print $14 + $15 }}' /proc/{pid}/stat")).parse().unwrap()
    };
    // They have nothing to say: each 1,000 cost less than 0.5 % of a processor, without
    // optimisation less than 1 %.
    let limit = if cfg!(debug_assertions) { 10.0 } else { 5.0 };
    let before = ticks();
    sleep(Duration::from_secs(4));
    let percent = (ticks() - before) as f64 / 4.0;
    assert!(percent < limit, "{percent} %");
}

#[test]
fn a_peer_may_have_131_000_prefixes() {
    let pair = Pair::over_ipv4();
    let mut conf = format!("[Peer]\nPublicKey = {}\nAllowedIPs = 10.9.0.2/32", pair.key_b);
    for n in 0..131_000u32 {
        let separator = if n % 1000 == 0 { "\nAllowedIPs = " } else { "," };
        write!(conf, "{separator}11.{}.{}.{}/32", n >> 16, n >> 8 & 0xff, n & 0xff).unwrap();
    }
    pair.a.sh_with("cat > /run/conf", &format!("{conf}\n"));
    pair.loses_nothing_while(|| drop(pair.a.sh("wg addconf wg0 /run/conf")));
    assert_eq!(pair.a.sh("wg show wg0 allowed-ips | wc -w"), "131002");
    pair.a.wait_for_ping("10.9.0.2");
}

#[test]
fn wg_quick_brings_it_up_and_down() {
    let pair = Pair::over_ipv4();
    let (private, key_b) = (pair.a.sh("wg genkey"), &pair.key_b);
    let public = pair.a.sh_with("wg pubkey", &private);
    pair.a.sh(&format!("ln -s {GAMBESON} /run/gambeson-tunnel && mkdir /run/conf"));
    pair.a.sh_with(
        "umask 077; cat > /run/conf/wgq.conf",
        &format!(
            "[Interface]\nPrivateKey = {private}\nAddress = 10.9.0.3/24\nMTU = 1400\n\
             [Peer]\nPublicKey = {key_b}\nEndpoint = 192.0.2.2:5002\n\
             AllowedIPs = 10.9.0.2/32, 10.8.0.0/16\n"
        ),
    );
    pair.a.sh("ip link del wg0");
    pair.b.sh(&format!("wg set wg0 peer {public} allowed-ips 10.9.0.3/32"));
    let wg_quick = "WG_QUICK_USERSPACE_IMPLEMENTATION=/run/gambeson-tunnel wg-quick";
    pair.a.sh(&format!("{wg_quick} up /run/conf/wgq.conf"));
    assert!(pair.a.sh("ip link show wgq").contains("mtu 1400"));
    assert!(pair.a.sh("ip route show 10.8.0.0/16").contains("dev wgq"));
    pair.a.wait_for_ping("10.9.0.2");
    pair.a.sh(&format!("{wg_quick} down /run/conf/wgq.conf"));
    pair.a.wait_for_end_of("wgq");
    wait_for("the next start", || {
        pair.a.attempt(&format!("{wg_quick} up /run/conf/wgq.conf")).status.success()
    });
    pair.a.wait_for_ping("10.9.0.2");
}
