use std::time::Duration;

use gambeson_mesh::plan::Action;
use tokio::time::timeout;

use super::firewall::ruleset;
use crate::common::namespace::{execute, in_namespace, kernel, make_tun, sh};
use gambeson::apply::Events;

const SOON: Duration = Duration::from_secs(5);
const QUIET: Duration = Duration::from_millis(100);

/// Waits until nothing more comes in, so that the next event has one cause.
async fn settle(events: &mut Events) {
    while let Ok(result) = timeout(QUIET, events.changed()).await {
        result.unwrap();
    }
}

#[test]
fn every_kind_of_change_is_an_event() {
    in_namespace(async || {
        make_tun(0);
        sh("ip link set gambeson0 up");
        let mut kernel = kernel().await;
        execute(&mut kernel, [Action::SetRuleset(ruleset(true))]).await;
        let mut events = Events::subscribe().unwrap();
        settle(&mut events).await;
        for change in [
            "ip link set gambeson0 mtu 1400",
            "ip addr add 10.244.1.0/32 dev gambeson0",
            "ip addr add fd00::1/128 dev gambeson0",
            "ip route add 10.244.2.0/24 dev gambeson0 proto 151",
            "ip route del 10.244.2.0/24 dev gambeson0",
            "ip -6 route add fd00:2::/64 dev gambeson0 proto 151",
            "echo 0 > /proc/sys/net/ipv4/conf/gambeson0/rp_filter; \
             echo 2 > /proc/sys/net/ipv4/conf/gambeson0/rp_filter",
            "echo 1 > /proc/sys/net/ipv4/ip_forward",
            "echo 1 > /proc/sys/net/ipv6/conf/all/forwarding",
            "nft flush chain inet gambeson guard_out",
            "nft flush ruleset",
            "ip rule add to 10.244.0.0/16 unreachable",
            "ip -6 rule add to fd00::/48 unreachable",
            "ip link delete gambeson0",
        ] {
            sh(change);
            timeout(SOON, events.changed()).await.expect(change).unwrap();
            settle(&mut events).await;
        }
    });
}

#[test]
fn a_burst_is_few_events_and_observing_is_none() {
    in_namespace(async || {
        make_tun(0);
        sh("ip link set gambeson0 up");
        let mut kernel = kernel().await;
        execute(&mut kernel, [Action::SetRuleset(ruleset(true))]).await;
        let mut events = Events::subscribe().unwrap();
        settle(&mut events).await;
        kernel.observe().await.unwrap();
        assert!(timeout(QUIET, events.changed()).await.is_err());
        sh("for i in $(seq 250); do echo route add 10.244.$i.0/24 dev gambeson0; done | ip -b -");
        timeout(SOON, events.changed()).await.unwrap().unwrap();
        assert!(timeout(QUIET, events.changed()).await.is_err());
    });
}

#[test]
fn what_others_do_all_the_time_is_no_event() {
    in_namespace(async || {
        let mut kernel = kernel().await;
        execute(&mut kernel, [Action::SetRuleset(ruleset(true))]).await;
        let mut events = Events::subscribe().unwrap();
        settle(&mut events).await;
        sh(
            "nft add table inet other; nft add chain inet other c; nft add rule inet other c accept",
        );
        sh("ip route add 10.9.0.0/16 dev lo table 100; ip -6 route add fd09::/64 dev lo table 100");
        assert!(timeout(QUIET, events.changed()).await.is_err());
        // The other table's changes do not hide ours.
        sh("nft delete table inet other; nft delete table inet gambeson");
        timeout(SOON, events.changed()).await.unwrap().unwrap();
        assert_eq!(kernel.observe().await.unwrap().ruleset, None);
    });
}
