use std::net::UdpSocket;

use gambeson_mesh::desired::Ruleset;
use gambeson_mesh::plan::Action;

use crate::common::namespace::{execute, in_namespace, kernel, sh};
use gambeson::apply::GuardDrops;

pub(super) fn ruleset(masquerade: bool) -> Ruleset {
    let networks = ["10.244.0.0/16", "fd00:10:244::/48"];
    let links = ["cni0", "gambeson0", "gambeson1", "gambeson2", "gambeson3", "lo"];
    Ruleset {
        cluster_networks: networks.iter().map(|n| n.parse().unwrap()).collect(),
        trusted_links: links.iter().map(|&l| l.to_owned()).collect(),
        masquerade,
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
