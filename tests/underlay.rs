use gambeson::underlay::{Choice, Families, UnderlayError, pick};
use gambeson_mesh::node::Endpoints;

use crate::common::namespace::{in_namespace, sh};

/// Two interfaces with addresses of both families; the default route leads out of `far0`.
fn prepare() {
    for (name, number) in [("near0", 1), ("far0", 2)] {
        sh(&format!("ip link add {name} type veth peer name {name}p"));
        sh(&format!("ip link set {name}p up; ip link set {name} mtu 1400 up"));
        sh(&format!("ip addr add 192.0.2.{number}/32 dev {name}"));
        sh(&format!("ip addr add 198.51.{number}.7/24 dev {name}"));
        sh(&format!("ip addr add 198.51.{number}.8/24 dev {name}"));
        sh(&format!("ip addr add 2001:db8:{number}::7/64 dev {name} nodad"));
    }
    sh("ip route add default via 198.51.2.1");
    sh("ip -6 route add default via 2001:db8:1::1");
}

async fn pick_name(choice: Choice) -> String {
    pick(&choice, Families::default()).await.unwrap().name
}

fn endpoints(v4: &str, v6: &str) -> Endpoints {
    Endpoints { v4: v4.parse().ok(), v6: v6.parse().ok() }
}

#[test]
fn the_default_route_chooses_and_ipv4_comes_first() {
    in_namespace(async || {
        prepare();
        let both = pick(&Choice::default(), Families::default()).await.unwrap();
        assert_eq!((both.name.as_str(), both.mtu), ("far0", 1400));
        assert_eq!(both.endpoints, endpoints("198.51.2.7", "2001:db8:2::7"));
        let v6 = pick(&Choice::default(), Families { v4: false, v6: true }).await.unwrap();
        assert_eq!(v6.name, "near0");
        assert_eq!(v6.endpoints, endpoints("", "2001:db8:1::7"));
        // A better metric, and its source address.
        sh("ip route add default via 198.51.2.1 metric 200; ip route del default metric 0");
        sh("ip route add default via 198.51.1.1 src 198.51.1.8 metric 10");
        let moved = pick(&Choice::default(), Families::default()).await.unwrap();
        assert_eq!(moved.endpoints, endpoints("198.51.1.8", "2001:db8:1::7"));
    });
}

#[test]
fn options_choose() {
    in_namespace(async || {
        prepare();
        let iface = |names: &[&str]| Choice {
            iface: names.iter().map(|&n| n.to_owned()).collect(),
            ..Choice::default()
        };
        assert_eq!(pick_name(iface(&["near0"])).await, "near0");
        assert_eq!(pick_name(iface(&["none0", "near0"])).await, "near0");
        let exact = pick(&iface(&["192.0.2.1"]), Families::default()).await.unwrap();
        assert_eq!(exact.endpoints, endpoints("192.0.2.1", "2001:db8:1::7"));
        for pattern in ["^near", r"^198\.51\.1\.", "2001:db8:1:"] {
            let iface_regex = vec!["^none".to_owned(), pattern.to_owned()];
            let choice = Choice { iface_regex, ..Choice::default() };
            assert_eq!(pick_name(choice).await, "near0", "{pattern}");
        }
        for reach in ["198.51.1.99", "2001:db8:1::99", "198.51.1.8"] {
            let choice = Choice { iface_can_reach: reach.parse().ok(), ..Choice::default() };
            assert_eq!(pick_name(choice).await, "near0", "{reach}");
        }
        let public = Choice {
            public_ip: "203.0.113.9".parse().ok(),
            public_ipv6: "2001:db8:9::9".parse().ok(),
            ..Choice::default()
        };
        let published = pick(&public, Families::default()).await.unwrap();
        assert_eq!(published.endpoints, endpoints("203.0.113.9", "2001:db8:9::9"));
    });
}

#[test]
fn unusable_addresses_are_not_published() {
    in_namespace(async || {
        sh("ip link add up0 type veth peer name up0p; ip link set up0p up");
        sh("ip link set up0 up");
        sh("ip addr add 169.254.1.1/16 dev up0; ip addr add 10.0.0.1/8 scope link dev up0");
        sh("ip addr add 2001:db8::1/64 dev up0 nodad preferred_lft 0");
        let choice = Choice { iface: vec!["up0".to_owned()], ..Choice::default() };
        let error = pick(&choice, Families::default()).await.unwrap_err();
        assert!(matches!(error, UnderlayError::NoAddress { .. }), "{error}");
        sh("ip addr add 2001:db8::2/64 dev up0 nodad");
        let underlay = pick(&choice, Families::default()).await.unwrap();
        assert_eq!(underlay.endpoints, endpoints("", "2001:db8::2"));
    });
}

#[test]
fn errors_name_what_was_asked_for_and_what_is_there() {
    in_namespace(async || {
        let default = Choice::default();
        let error = pick(&default, Families::default()).await.unwrap_err();
        assert!(error.to_string().contains("none that is up"), "{error}");
        prepare();
        sh("ip route del default; ip -6 route del default");
        let mut errors = vec![pick(&default, Families::default()).await.unwrap_err()];
        let wanted = [
            Choice { iface: vec!["eth7".to_owned()], ..default.clone() },
            Choice { iface_regex: vec!["^wlan".to_owned()], ..default.clone() },
            Choice { iface_can_reach: "203.0.113.1".parse().ok(), ..default.clone() },
        ];
        for choice in &wanted {
            errors.push(pick(choice, Families::default()).await.unwrap_err());
        }
        for (error, word) in errors.iter().zip(["--iface", "eth7", "^wlan", "203.0.113.1"]) {
            let text = error.to_string();
            assert!(text.contains(word) && text.contains("near0 (198.51.1.7"), "{text}");
        }
        let bad = Choice { iface_regex: vec!["(".to_owned()], ..default };
        let error = pick(&bad, Families::default()).await.unwrap_err();
        assert!(matches!(error, UnderlayError::Pattern { .. }), "{error}");
    });
}
