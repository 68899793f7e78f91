use std::collections::BTreeMap;
use std::time::Instant;

use gambeson_mesh::desired::{
    Desired, FAIL_CLOSED_METRIC, NextHop, Route, RouteKey, Rule, RuleStep, Sysctl,
};
use gambeson_mesh::plan::{Action, Plan};

use super::firewall::ruleset;
use crate::common::namespace::{in_namespace, kernel, keys, make_tun, sh};

fn desired() -> Desired {
    let unreachable = Route { next_hop: NextHop::Unreachable, mtu: None, source: None };
    let key = |network: &str| RouteKey {
        destination: network.parse().unwrap(),
        metric: FAIL_CLOSED_METRIC,
    };
    Desired {
        devices: BTreeMap::new(),
        vteps: BTreeMap::new(),
        routes: ["10.244.0.0/16", "fd00:10:244::/48"]
            .map(|network| (key(network), unreachable.clone()))
            .into(),
        rules: ["10.244.0.0/16", "fd00:10:244::/48"]
            .into_iter()
            .flat_map(|network| {
                let destination = network.parse().unwrap();
                RuleStep::ALL.map(|step| Rule { destination, step })
            })
            .collect(),
        sysctls: [Sysctl::Ipv4Forward, Sysctl::Ipv6Forward].map(|s| (s, "1".to_owned())).into(),
        ruleset: ruleset(true),
    }
}

#[test]
fn the_plan_after_a_plan_is_empty_and_damage_is_repaired() {
    in_namespace(async || {
        let mut kernel = kernel().await;
        let desired = desired();
        // A device of ours that should not be goes.
        make_tun(3);
        let damage = [
            "true",
            "nft flush ruleset",
            "ip route del unreachable 10.244.0.0/16",
            "ip -6 route del unreachable fd00:10:244::/48 metric 4294967295",
            "ip rule del pref 15100",
            "ip -6 rule del pref 15101",
            "ip rule flush; ip rule add pref 32766 lookup main; ip -6 rule flush",
            "ip rule add to 10.244.7.0/24 pref 15101 unreachable proto 151",
            "ip rule del pref 15100; ip rule add to 10.244.0.0/16 pref 15100 lookup main proto 151",
            "echo 0 > /proc/sys/net/ipv4/ip_forward",
        ];
        for step in damage {
            sh(step);
            let plan = Plan::new(&desired, &kernel.observe().await.unwrap());
            assert!(!plan.is_empty(), "{step}");
            let errors = kernel.execute(&plan, &keys()).await;
            assert!(errors.is_empty(), "{errors:?}");
            let next = Plan::new(&desired, &kernel.observe().await.unwrap());
            assert_eq!(next, Plan::default(), "{step}");
        }
        // A new agent does not know yet that the ruleset is its own, and nothing else is done.
        let mut restarted = crate::common::namespace::kernel().await;
        let plan = Plan::new(&desired, &restarted.observe().await.unwrap());
        assert_eq!(plan.actions, [Action::SetRuleset(ruleset(true))]);
    });
}

/// Looking must be cheap: it follows every event.
#[test]
fn observing_is_quick() {
    in_namespace(async || {
        let mut kernel = kernel().await;
        let plan = Plan::new(&desired(), &kernel.observe().await.unwrap());
        kernel.execute(&plan, &keys()).await;
        for number in 0..4 {
            make_tun(number);
        }
        sh("for i in $(seq 250); do echo route add 10.9.$i.0/24 dev lo proto 42; done | ip -b -");
        let start = Instant::now();
        for _ in 0..20 {
            kernel.observe().await.unwrap();
        }
        let each = start.elapsed() / 20;
        eprintln!("observe: {each:?}");
        assert!(each.as_millis() < 200, "{each:?}");
    });
}
