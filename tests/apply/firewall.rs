use std::collections::BTreeMap;
use std::fs::File;
use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use gambeson_mesh::desired::Ruleset;
use gambeson_mesh::family::Family;
use gambeson_mesh::plan::Action;

use nix::sched::{CloneFlags, setns};
use nix::sys::socket::{setsockopt, sockopt::Mark};
use socket2::{Domain, Protocol, Socket, Type};

use crate::common::namespace::{attempt, execute, in_namespace, kernel, sh};
use gambeson::apply::GuardDrops;

pub(super) fn ruleset(masquerade: bool) -> Ruleset {
    let networks = ["10.244.0.0/16", "fd00:10:244::/48"];
    let links = ["cni0", "gambeson0", "gambeson1", "gambeson2", "gambeson3", "lo"];
    Ruleset {
        cluster_networks: networks.iter().map(|n| n.parse().unwrap()).collect(),
        trusted_links: links.iter().map(|&l| l.to_owned()).collect(),
        plaintext: BTreeMap::new(),
        masquerade: if masquerade { Family::ALL.into() } else { Default::default() },
    }
}

#[test]
fn a_written_ruleset_is_observed_until_somebody_changes_it() {
    in_namespace(async || {
        let mut kernel = kernel().await;
        for masquerade in [true, false, true] {
            let ruleset = ruleset(masquerade);
            execute(&mut kernel, [Action::SetRuleset(ruleset.clone())]).await;
            assert_eq!(kernel.observe().await.unwrap().ruleset, Some(ruleset));
        }
        let changes = [
            "nft flush ruleset",
            "nft flush chain inet gambeson guard_out",
            "nft add rule inet gambeson guard_in accept",
            "nft add chain inet gambeson other",
            "nft add chain inet gambeson late '{ type filter hook input priority 0; }'",
            "nft delete table inet gambeson",
            "nft add table inet gambeson '{ flags dormant; }'",
            "nft add chain inet gambeson guard_out '{ policy drop; }'",
        ];
        for change in changes {
            sh(change);
            assert_eq!(kernel.observe().await.unwrap().ruleset, None, "{change}");
            execute(&mut kernel, [Action::SetRuleset(ruleset(true))]).await;
            assert_eq!(kernel.observe().await.unwrap().ruleset, Some(ruleset(true)), "{change}");
        }
    });
}

/// Changes that fall between a write and the look at what it made must not be taken for what
/// was meant.
#[test]
fn a_ruleset_that_is_changed_while_it_is_written_is_not_taken_for_whole() {
    in_namespace(async || {
        let mut kernel = kernel().await;
        for _ in 0..5 {
            let stop = Arc::new(AtomicBool::new(false));
            let attackers = [stop.clone(), stop.clone()].map(|stop| {
                std::thread::spawn(move || {
                    while !stop.load(Ordering::Relaxed) {
                        sh("nft flush chain inet gambeson guard_out 2> /dev/null || true");
                    }
                })
            });
            // That it could not be written undisturbed is an error; to believe it was, is worse.
            attempt(&mut kernel, [Action::SetRuleset(ruleset(true))]).await;
            stop.store(true, Ordering::Relaxed);
            attackers.into_iter().for_each(|attacker| attacker.join().unwrap());
            let observed = kernel.observe().await.unwrap().ruleset;
            let rules = sh("nft list chain inet gambeson guard_out");
            assert_eq!(observed.is_some(), rules.matches(" drop").count() == 4, "{rules}");
        }
        execute(&mut kernel, [Action::SetRuleset(ruleset(true))]).await;
        assert_eq!(kernel.observe().await.unwrap().ruleset, Some(ruleset(true)));
        assert!(kernel.guard_seen_whole().is_some());
    });
}

#[test]
fn other_tables_stay() {
    in_namespace(async || {
        sh("nft add table inet other; nft add chain inet other c");
        let before = sh("nft list table inet other");
        let mut kernel = kernel().await;
        execute(&mut kernel, [Action::SetRuleset(ruleset(true))]).await;
        execute(&mut kernel, [Action::SetRuleset(ruleset(false))]).await;
        assert_eq!(sh("nft list table inet other"), before);
    });
}

#[test]
fn packets_that_would_leave_in_clear_are_counted_and_dropped() {
    in_namespace(async || {
        sh(
            "ip link add away type veth peer name far; ip link set away arp off up; ip link set far up",
        );
        sh("ip addr add 192.0.2.1/24 dev away && ip addr add 2001:db8::1/64 dev away nodad");
        sh("ip route add default dev away && ip -6 route add default dev away");
        let mut kernel = kernel().await;
        let send = |source: &str, to: &str| {
            let socket = UdpSocket::bind(source).unwrap();
            let _ = socket.send_to(&[7; 100], to);
        };
        let tx = || {
            let text = sh("ip -s -j link show away");
            let value: serde_json::Value = serde_json::from_str(&text).unwrap();
            value[0]["stats64"]["tx"]["packets"].as_u64().unwrap()
        };
        execute(&mut kernel, [Action::SetRuleset(ruleset(true))]).await;
        assert_eq!(kernel.guard_drops().await.unwrap(), GuardDrops::default());
        let before = tx();
        send("192.0.2.1:0", "10.244.3.4:9");
        send("[2001:db8::1]:0", "[fd00:10:244:3::4]:9");
        send("[2001:db8::1]:0", "[fd00:10:244:3::4]:9");
        let drops = kernel.guard_drops().await.unwrap();
        assert_eq!((drops.out_packets, drops.out_bytes), (3, 128 + 2 * 148));
        assert_eq!((drops.in_packets, drops.in_bytes), (0, 0));
        let quiet = tx();
        // Elsewhere it may go.
        send("192.0.2.1:0", "198.51.100.1:9");
        assert!(tx() > quiet, "{before} {quiet}");

        // Counters survive a new ruleset, whether it is brought up to date or made anew.
        execute(&mut kernel, [Action::SetRuleset(ruleset(true))]).await;
        assert_eq!(kernel.guard_drops().await.unwrap(), drops);
        execute(&mut kernel, [Action::SetRuleset(ruleset(false))]).await;
        assert_eq!(kernel.guard_drops().await.unwrap(), drops);
    });
}

/// A namespace `far` at the other end of `near0`, with addresses of both families.
fn make_far() {
    sh("ip netns add far && ip link add near0 type veth peer name far0 netns far");
    sh("ip addr add 192.0.2.1/24 dev near0; ip addr add 2001:db8::1/64 dev near0 nodad");
    sh("ip link set near0 up");
    sh("ip -n far addr add 192.0.2.2/24 dev far0; ip -n far link set far0 up");
    sh("ip -n far addr add 2001:db8::2/64 dev far0 nodad");
}

/// Calls it with the thread in the namespace `far`.
fn in_far<T: Send>(call: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            setns(File::open("/run/netns/far").unwrap(), CloneFlags::CLONE_NEWNET).unwrap();
            call()
        });
        thread.join().unwrap()
    })
}

/// Sends a datagram and gives the address that it came from, as the receiver saw it. One that
/// the guard stops is an error at the sender.
fn seen_source(receiver: &UdpSocket, from: &str, mark: u32) -> Option<IpAddr> {
    let sender = UdpSocket::bind((from, 0)).unwrap();
    setsockopt(&sender, Mark, &mark).unwrap();
    sender.send_to(b"hello", receiver.local_addr().unwrap()).ok()?;
    receiver.recv_from(&mut [0; 9]).ok().map(|(_, address)| address.ip())
}

fn receiver(address: &str) -> UdpSocket {
    let socket = UdpSocket::bind((address, 9999)).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    socket
}

#[test]
fn packets_that_arrive_in_clear_are_counted_and_dropped() {
    in_namespace(async || {
        make_far();
        let mut kernel = kernel().await;
        let own = ["192.0.2.1", "2001:db8::1"].map(receiver);
        for address in ["10.244.9.9/32", "fd00:10:244:9::9/128"] {
            sh(&format!("ip -n far addr add {address} dev far0 nodad"));
        }
        let clear = ["10.244.9.9", "fd00:10:244:9::9"];
        // The control: without the guard they arrive.
        sh("echo 0 > /proc/sys/net/ipv4/conf/all/rp_filter");
        sh("echo 0 > /proc/sys/net/ipv4/conf/near0/rp_filter");
        for (socket, source) in own.iter().zip(clear) {
            let seen = in_far(|| seen_source(socket, source, 0));
            assert_eq!(seen, source.parse().ok());
        }
        execute(&mut kernel, [Action::SetRuleset(ruleset(false))]).await;
        for (socket, source) in own.iter().zip(clear) {
            socket.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
            assert_eq!(in_far(|| seen_source(socket, source, 0)), None);
        }
        let drops = kernel.guard_drops().await.unwrap();
        assert_eq!((drops.in_packets, drops.out_packets), (2, 0));
        assert_eq!(drops.in_bytes, (20 + 8 + 5) + (40 + 8 + 5));
        // A trusted link may carry them.
        let mut trusting = ruleset(false);
        trusting.trusted_links.insert("near0".to_owned());
        execute(&mut kernel, [Action::SetRuleset(trusting)]).await;
        for (socket, source) in own.iter().zip(clear) {
            assert_eq!(in_far(|| seen_source(socket, source, 0)), source.parse().ok());
        }
    });
}

/// A stray RST is a part of no connection, so that it is not masqueraded.
#[test]
fn what_connection_tracking_does_not_know_does_not_leave_with_a_pods_source() {
    in_namespace(async || {
        make_far();
        sh("ip addr add 10.244.1.5/32 dev lo");
        sh(
            "ip netns exec far nft 'add table inet seen; add chain inet seen in { type filter hook \
             prerouting priority -400; }; add rule inet seen in ip saddr 10.244.1.5 counter'",
        );
        let seen = || sh("ip netns exec far nft list chain inet seen in").contains("packets 1 ");
        let send_reset = || {
            let socket = Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::TCP)).unwrap();
            socket.bind(&"10.244.1.5:0".parse::<SocketAddr>().unwrap().into()).unwrap();
            // Ports 4660 and 80, acknowledging something, five words of header, RST and ACK.
            let reset = [0x12, 0x34, 0, 80, 0, 0, 0, 1, 0, 0, 0, 1, 0x50, 0x14, 0, 0, 0, 0, 0, 0];
            let to = "192.0.2.2:80".parse::<SocketAddr>().unwrap();
            // The sender on this host is told that it was stopped.
            socket.send_to(&reset, &to.into()).map(drop).map_err(|error| error.kind())
        };
        let mut kernel = kernel().await;
        execute(&mut kernel, [Action::SetRuleset(ruleset(true))]).await;
        assert_eq!(send_reset(), Err(ErrorKind::PermissionDenied));
        assert_eq!(kernel.guard_drops().await.unwrap().out_packets, 1);
        assert!(!seen());
        // The control, and what holds without --ip-masq: pods' addresses may be routed outside.
        execute(&mut kernel, [Action::SetRuleset(ruleset(false))]).await;
        assert_eq!(send_reset(), Ok(()));
        assert!(seen());
    });
}

#[test]
fn pods_are_masqueraded_to_the_outside_only() {
    in_namespace(async || {
        make_far();
        let mut kernel = kernel().await;
        execute(&mut kernel, [Action::SetRuleset(ruleset(true))]).await;
        let cases = [
            ("192.0.2.2", "10.244.1.5/32", "192.0.2.1"),
            ("2001:db8::2", "fd00:10:244:1::5/128", "2001:db8::1"),
        ];
        for (outside, pod, node) in cases {
            sh(&format!("ip addr add {pod} dev lo nodad"));
            let pod = pod.split('/').next().unwrap();
            sh(&format!("ip -n far route add {pod} dev far0"));
            let receiver = in_far(|| receiver(outside));
            assert_eq!(seen_source(&receiver, pod, 0), node.parse().ok());
            // What has kube-proxy's mark is left to it, and stopped if it does nothing.
            receiver.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
            let before = kernel.guard_drops().await.unwrap().out_packets;
            assert_eq!(seen_source(&receiver, pod, 0x4000), None);
            assert_eq!(kernel.guard_drops().await.unwrap().out_packets, before + 1);
            sh(
                "nft add table inet kube; nft add chain inet kube post '{ type nat hook postrouting \
                 priority 90; }'; nft add rule inet kube post meta mark 0x4000 masquerade",
            );
            assert_eq!(seen_source(&receiver, pod, 0x4000), node.parse().ok());
            sh("nft delete table inet kube");
            // What the node itself sends stays as it is.
            assert_eq!(seen_source(&receiver, node, 0), node.parse().ok());
        }
        execute(&mut kernel, [Action::SetRuleset(ruleset(false))]).await;
        for (outside, pod, _) in cases {
            let pod = pod.split('/').next().unwrap();
            let receiver = in_far(|| receiver(outside));
            assert_eq!(seen_source(&receiver, pod, 0), pod.parse().ok());
        }
    });
}
