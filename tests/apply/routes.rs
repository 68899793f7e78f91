use gambeson_mesh::desired::{FAIL_CLOSED_METRIC, NextHop, PEER_ROUTE_METRIC, Route, RouteKey};
use gambeson_mesh::plan::Action;

use crate::common::namespace::{attempt, execute, in_namespace, kernel, make_tun, sh};
use gambeson::apply::ApplyError;

fn key(destination: &str, metric: u32) -> RouteKey {
    RouteKey { destination: destination.parse().unwrap(), metric }
}

fn unreachable() -> Route {
    Route { next_hop: NextHop::Unreachable, mtu: None, source: None }
}

#[test]
fn routes_of_both_families_are_put_replaced_and_deleted() {
    in_namespace(async || {
        let (first, second) = (make_tun(0), make_tun(1));
        let mut kernel = kernel().await;
        let (v4, v6) = (key("10.244.2.0/24", PEER_ROUTE_METRIC), key("fd00:2::/64", 1));
        let closed =
            [key("10.244.0.0/16", FAIL_CLOSED_METRIC), key("fd00::/48", FAIL_CLOSED_METRIC)];
        let route = |device, mtu, source: &str| Route {
            next_hop: NextHop::Device(device),
            mtu: Some(mtu),
            source: Some(source.parse().unwrap()),
        };
        let (own4, own6) = ("10.244.1.0", "fd00:1::");
        let mut setup = vec![];
        for device in [first, second] {
            setup.push(Action::SetLinkUp(device));
            for own in [own4, own6] {
                let address = own.parse::<std::net::IpAddr>().unwrap().into();
                setup.push(Action::AddAddress { device, address });
            }
        }
        execute(&mut kernel, setup).await;
        execute(
            &mut kernel,
            [
                Action::PutRoute(closed[0], unreachable()),
                Action::PutRoute(closed[1], unreachable()),
                Action::PutRoute(v4, route(first, 1400, own4)),
                Action::PutRoute(v6, route(first, 1400, own6)),
            ],
        )
        .await;
        let mut expected = std::collections::BTreeMap::from([
            (closed[0], unreachable()),
            (closed[1], unreachable()),
            (v4, route(first, 1400, own4)),
            (v6, route(first, 1400, own6)),
        ]);
        assert_eq!(kernel.observe().await.unwrap().routes, expected);

        execute(
            &mut kernel,
            [Action::PutRoute(v4, route(second, 1380, own4)), Action::PutRoute(v6, unreachable())],
        )
        .await;
        expected.insert(v4, route(second, 1380, own4));
        expected.insert(v6, unreachable());
        assert_eq!(kernel.observe().await.unwrap().routes, expected);

        execute(&mut kernel, expected.into_keys().map(Action::DeleteRoute)).await;
        execute(&mut kernel, [Action::DeleteRoute(v4), Action::DeleteRoute(v6)]).await;
        assert!(kernel.observe().await.unwrap().routes.is_empty());
    });
}

#[test]
fn a_foreign_route_is_named_and_stays() {
    in_namespace(async || {
        make_tun(0);
        sh("ip link set gambeson0 up");
        let keys = [key("10.244.2.0/24", 1), key("fd00:2::/64", 1)];
        for key in keys {
            sh(&format!("ip route add {} dev gambeson0 metric 1 proto 42", key.destination));
        }
        let mut kernel = kernel().await;
        let before = sh("ip route; ip -6 route");
        assert!(kernel.observe().await.unwrap().routes.is_empty());
        for key in keys {
            let errors = attempt(&mut kernel, [Action::PutRoute(key, unreachable())]).await;
            assert!(
                matches!(errors.as_slice(), [ApplyError::ForeignRoute { protocol: 42, .. }]),
                "{errors:?}"
            );
            execute(&mut kernel, [Action::DeleteRoute(key)]).await;
        }
        assert_eq!(sh("ip route; ip -6 route"), before);
    });
}

#[test]
fn our_route_that_was_bent_elsewhere_is_put_right() {
    in_namespace(async || {
        let device = make_tun(0);
        sh("ip link set gambeson0 up");
        sh("ip link add away type bridge && ip link set away up");
        sh("ip route add 10.244.2.0/24 dev away metric 1 proto 151");
        let mut kernel = kernel().await;
        let key = key("10.244.2.0/24", 1);
        assert!(kernel.observe().await.unwrap().routes.is_empty());
        let route = Route { next_hop: NextHop::Device(device), mtu: None, source: None };
        execute(&mut kernel, [Action::PutRoute(key, route.clone())]).await;
        assert_eq!(kernel.observe().await.unwrap().routes, [(key, route)].into());
    });
}

#[test]
fn other_tables_and_protocols_are_not_ours() {
    in_namespace(async || {
        make_tun(0);
        sh("ip link set gambeson0 up");
        sh("ip route add 10.9.0.0/16 dev gambeson0 table 100 proto 151");
        sh("ip -6 route add fd09::/16 dev gambeson0 table 100 proto 151");
        sh("ip route add 10.9.0.0/16 dev gambeson0");
        assert!(kernel().await.observe().await.unwrap().routes.is_empty());
    });
}
