//! What the plaintext transports need of the kernel: VXLAN devices with their tables, routes
//! through them, and routes through another node.

use std::collections::{BTreeMap, BTreeSet};

use gambeson_keys::{Generation, PrivateKey};
use gambeson_mesh::desired::{Desired, Implementation, Vxlan};
use gambeson_mesh::family::Family;
use gambeson_mesh::node::{Endpoints, Local, NodeRecord, Transport};
use gambeson_mesh::plan::{Action, Plan};
use gambeson_mesh::topology::Topology;
use gambeson_mesh::transport::{self, Paths};
use ipnet::IpNet;

use crate::common::namespace::{attempt, in_namespace, kernel, keys, sh};
use gambeson::apply::{ApplyError, Kernel};

fn node(i: u8, transport: Transport) -> Local {
    let pods = [format!("10.244.{i}.0/24"), format!("fd00:10:244:{i}::/64")];
    let pod_cidrs: BTreeSet<IpNet> = pods.iter().map(|cidr| cidr.parse().unwrap()).collect();
    let endpoints =
        Endpoints { v4: Some([192, 0, 2, i].into()), v6: format!("2001:db8::{i}").parse().ok() };
    Local {
        name: format!("node-{i}"),
        prefix: "gambeson.io".to_owned(),
        vteps: Local::default_vteps(&pod_cidrs, endpoints),
        pod_cidrs,
        cluster_networks: ["10.244.0.0/16", "fd00:10:244::/48"]
            .map(|network| network.parse().unwrap())
            .into(),
        keys: BTreeMap::from([(Generation::FIRST, PrivateKey::generate().public())]),
        secrets: BTreeMap::new(),
        known_secrets: Vec::new(),
        promoted: false,
        endpoints,
        addresses: endpoints,
        port: 51820,
        persistent_keepalive: None,
        underlay: "eth0".to_owned(),
        underlay_index: index(),
        underlay_mtu: 1500,
        implementation: Implementation::Kernel,
        transports: [transport].into(),
        vxlan: Vxlan::default(),
        on_link: BTreeSet::new(),
        flannel: None,
        bridge: "cni0".to_owned(),
        masquerade: Family::ALL.into(),
    }
}

fn index() -> u32 {
    sh("ip -o link show eth0 | cut -d: -f1").trim().parse().unwrap()
}

fn records(others: &[Local]) -> BTreeMap<String, NodeRecord> {
    let record = |local: &Local| NodeRecord {
        name: local.name.clone(),
        uid: local.name.clone(),
        created: 1,
        pod_cidrs: local.pod_cidrs.iter().map(ToString::to_string).collect(),
        annotations: local
            .annotations()
            .into_iter()
            .filter_map(|(name, value)| Some((name, value?)))
            .collect(),
    };
    others.iter().map(|local| (local.name.clone(), record(local))).collect()
}

fn desired(own: &Local, others: &[Local]) -> Desired {
    transport::desired(&Topology::new().resolve(own, &records(others)), own, &Paths::default())
}

/// An underlay with this node's addresses.
fn prepare() {
    sh("ip link add eth0 type veth peer name eth0p; ip link set eth0p up; ip link set eth0 up");
    sh("ip addr add 192.0.2.1/24 dev eth0; ip addr add 2001:db8::1/64 dev eth0 nodad");
}

/// Carries out what is to be done, after which nothing must be left.
async fn settle(kernel: &mut Kernel, desired: &Desired, step: &str) -> Vec<Action> {
    let plan = Plan::new(desired, &kernel.observe().await.unwrap());
    let errors = kernel.execute(&plan, &keys()).await;
    assert!(errors.is_empty(), "{step}: {errors:?}");
    let next = Plan::new(desired, &kernel.observe().await.unwrap());
    assert_eq!(next.actions, [], "{step}");
    plan.actions
}

#[test]
fn vxlan_devices_are_made_as_they_should_be_and_repaired() {
    in_namespace(async || {
        prepare();
        let mut kernel = kernel().await;
        let own = node(1, Transport::Vxlan);
        let desired = desired(&own, &[node(2, Transport::Vxlan), node(3, Transport::Vxlan)]);
        settle(&mut kernel, &desired, "from nothing").await;
        let link = sh("ip -d link show gambeson-vx4");
        for part in [
            "vxlan id 1 ",
            "local 192.0.2.1 dev eth0",
            "dstport 8472",
            "nolearning",
            "mtu 1450",
            "0a:58:0a:f4:01:00",
            "alias gambeson",
        ] {
            assert!(link.contains(part), "{part} is not in {link}");
        }
        assert!(sh("ip -d link show gambeson-vx6").contains("local 2001:db8::1 dev eth0"));
        let route = sh("ip route get 10.244.2.7");
        assert!(route.contains("via 10.244.2.0 dev gambeson-vx4 src 10.244.1.0"), "{route}");
        let route = sh("ip -6 route get fd00:10:244:3::7");
        assert!(route.contains("via fe80::858:aff:fef4:300 dev gambeson-vx6"), "{route}");
        let table = sh("bridge fdb show dev gambeson-vx4");
        assert!(table.contains("0a:58:0a:f4:02:00 dst 192.0.2.2 self permanent"), "{table}");

        for (damage, repaired) in [
            ("ip neigh del 10.244.2.0 dev gambeson-vx4", 1),
            ("ip -6 neigh flush dev gambeson-vx6 nud permanent", 2),
            ("ip neigh replace 10.244.3.0 lladdr 02:00:00:00:00:01 dev gambeson-vx4 nud perm", 1),
            ("ip neigh add 10.244.9.9 lladdr 02:00:00:00:00:01 dev gambeson-vx4 nud perm", 1),
            ("bridge fdb del 0a:58:0a:f4:02:00 dst 192.0.2.2 dev gambeson-vx4", 1),
            ("bridge fdb replace 0a:58:0a:f4:02:00 dst 192.0.2.9 dev gambeson-vx4", 1),
            ("bridge fdb add 02:00:00:00:00:02 dst 192.0.2.9 dev gambeson-vx4", 1),
            ("ip link set gambeson-vx4 mtu 1400", 1),
            ("ip route del 10.244.2.0/24", 1),
            (
                "ip route replace 10.244.2.0/24 metric 1 via 10.244.2.0 dev gambeson-vx4 onlink proto 151",
                1,
            ),
        ] {
            sh(damage);
            let actions = settle(&mut kernel, &desired, damage).await;
            assert!((1..=repaired).contains(&actions.len()), "{damage}: {actions:#?}");
        }
        for damage in [
            "ip link del gambeson-vx4",
            "ip link set gambeson-vx4 down",
            "ip link set gambeson-vx6 address 02:00:00:00:00:03",
            "ip link set gambeson-vx4 alias other; ip link set gambeson-vx4 type vxlan learning",
        ] {
            sh(damage);
            settle(&mut kernel, &desired, damage).await;
        }
        // What is no longer wanted goes, devices and all.
        let nothing = self::desired(&node(1, Transport::HostGw), &[]);
        settle(&mut kernel, &nothing, "no VXLAN").await;
        assert_eq!(sh("ip -br link show type vxlan"), "");
    });
}

#[test]
fn a_vni_that_another_device_has_is_named() {
    in_namespace(async || {
        prepare();
        let mut kernel = kernel().await;
        sh("ip link add flannel.1 type vxlan id 1 dstport 8472 local 192.0.2.1 dev eth0");
        let desired = desired(&node(1, Transport::Vxlan), &[]);
        let plan = Plan::new(&desired, &kernel.observe().await.unwrap());
        let errors = attempt(&mut kernel, plan.actions).await;
        let error = errors.iter().find(|error| matches!(error, ApplyError::VniTaken { .. }));
        let error = error.unwrap_or_else(|| panic!("{errors:?}")).to_string();
        for part in ["VNI 1 on UDP port 8472", "flannel.1", "Backend.VNI"] {
            assert!(error.contains(part), "{error}");
        }
        assert!(sh("ip -br link show type vxlan").starts_with("flannel.1"));
    });
}

#[test]
fn host_gw_routes_are_put_where_the_kernel_needs_no_router() {
    in_namespace(async || {
        prepare();
        sh("ip route add 198.51.100.0/24 via 192.0.2.254");
        let mut kernel = kernel().await;
        let mut own = node(1, Transport::HostGw);
        let mut far = node(3, Transport::HostGw);
        far.endpoints.v4 = Some([198, 51, 100, 3].into());
        let others = [node(2, Transport::HostGw), far];
        let hops = gambeson_mesh::topology::next_hops(&own, &records(&others));
        assert_eq!(hops.len(), 4);
        own.on_link = kernel.on_link(hops, index()).await;
        let on_link: Vec<_> = own.on_link.iter().map(ToString::to_string).collect();
        assert_eq!(on_link, ["192.0.2.2", "2001:db8::2", "2001:db8::3"]);
        assert!(kernel.on_link(own.on_link.clone(), index() + 1).await.is_empty());

        let mesh = Topology::new().resolve(&own, &records(&others));
        let refused = mesh.refused["node-3"].to_string();
        assert!(refused.contains("from node-1 without a router"), "{refused}");
        let desired = transport::desired(&mesh, &own, &Paths::default());
        settle(&mut kernel, &desired, "from nothing").await;
        let route = sh("ip route get 10.244.2.7");
        assert!(route.contains("via 192.0.2.2 dev eth0"), "{route}");
        let route = sh("ip -6 route get fd00:10:244:2::7");
        assert!(route.contains("via 2001:db8::2 dev eth0"), "{route}");
        sh("ip route replace 10.244.2.0/24 metric 1 via 192.0.2.9 proto 151");
        assert_eq!(settle(&mut kernel, &desired, "another router").await.len(), 1);
        let guard = sh("nft list chain inet gambeson guard_out");
        assert!(guard.contains("192.0.2.2") && guard.contains("10.244.2.0/24"), "{guard}");
        assert!(!guard.contains("10.244.3.0/24"), "{guard}");
    });
}
