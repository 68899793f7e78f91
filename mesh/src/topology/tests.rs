use super::*;
use crate::fixtures::{key, local, net, record, records};

mod hostile;
mod restart;

fn resolve(topology: &mut Topology, nodes: &[NodeRecord]) -> Mesh {
    topology.resolve(&local(1, 0), &records(nodes))
}

fn set(record: &mut NodeRecord, name: &str, value: &str) {
    record.annotations.insert(name.to_owned(), value.to_owned());
}

fn names(mesh: &Mesh) -> Vec<&str> {
    mesh.peers.keys().map(String::as_str).collect()
}

#[test]
fn every_other_node_is_a_peer() {
    let nodes: Vec<_> = (1..=3).map(|i| record(&local(i, 0))).collect();
    let mesh = resolve(&mut Topology::new(), &nodes);
    assert_eq!(names(&mesh), ["node-2", "node-3"]);
    assert_eq!(mesh.refused, BTreeMap::new());
}

#[test]
fn a_vxlan_device_has_one_owner() {
    let vxlan = |i| Local { transports: [Transport::Vxlan].into(), ..local(i, 0) };
    let own = vxlan(1);
    let mut topology = Topology::new();
    let records_of = |thief: &NodeRecord| records(&[record(&vxlan(2)), thief.clone()]);
    let mut thief = record(&vxlan(3));
    assert_eq!(names(&topology.resolve(&own, &records_of(&thief))), ["node-2", "node-3"]);
    for (victim, name, said) in
        [(2, "vtep-mac", "node-2"), (2, "vtep-mac-v6", "node-2"), (1, "vtep-mac", "node-1")]
    {
        let mac = vxlan(victim).vteps.v4.unwrap().to_string();
        let honest = thief.clone();
        set(&mut thief, name, &mac);
        let mesh = topology.resolve(&own, &records_of(&thief));
        let refused = mesh.refused["node-3"].to_string();
        assert!(refused.contains(name) && refused.contains(said), "{refused}");
        assert_eq!(names(&mesh), ["node-2", "node-3"], "its last good state stays");
        thief = honest;
    }
}

#[test]
fn a_node_that_is_gone_is_forgotten() {
    let mut topology = Topology::new();
    resolve(&mut topology, &[record(&local(2, 0)), record(&local(3, 0))]);
    let mesh = resolve(&mut topology, &[record(&local(3, 0))]);
    assert_eq!(names(&mesh), ["node-3"]);
}

// Fault 17.
#[test]
fn a_bad_value_keeps_the_last_good_state_of_that_node_alone() {
    let mut topology = Topology::new();
    let (second, third) = (record(&local(2, 0)), record(&local(3, 0)));
    let good = resolve(&mut topology, &[second.clone(), third.clone()]);
    for (name, value) in [
        ("public-key", "garbage"),
        ("endpoint", "127.0.0.1"),
        ("port", "0"),
        ("mtu", "9"),
        ("vtep-mac", "01:00:5e:00:00:01"),
    ] {
        let mut bad = second.clone();
        set(&mut bad, name, value);
        let mesh = resolve(&mut topology, &[bad.clone(), third.clone()]);
        assert_eq!(mesh.peers, good.peers);
        assert_eq!(mesh.refused.keys().collect::<Vec<_>>(), ["node-2"]);
        let unknown = resolve(&mut Topology::new(), &[bad, third.clone()]);
        assert_eq!(names(&unknown), ["node-3"]);
    }
    assert_eq!(resolve(&mut topology, &[second, third]), good);
}

// Fault 17.
#[test]
fn removed_annotations_keep_the_peer_and_say_so() {
    let mut topology = Topology::new();
    let good = resolve(&mut topology, &[record(&local(2, 0))]);
    let mut bare = record(&local(2, 0));
    bare.annotations.clear();
    let mesh = resolve(&mut topology, std::slice::from_ref(&bare));
    assert_eq!(mesh.peers, good.peers);
    assert_eq!(mesh.refused["node-2"], Refusal::KeyGone);
    let mesh = resolve(&mut Topology::new(), &[bare]);
    assert_eq!(mesh.refused["node-2"], Refusal::NoKey);
    assert!(mesh.refused["node-2"].is_waiting());
}

// Fault 17.
#[test]
fn our_own_key_is_refused() {
    for name in ["public-key", "next-public-key"] {
        let mut thief = record(&local(2, 0));
        set(&mut thief, name, &key(1).to_string());
        let mesh = resolve(&mut Topology::new(), &[thief]);
        assert_eq!(names(&mesh), [""; 0]);
        let message = mesh.refused["node-2"].to_string();
        assert!(message.contains(name) && message.contains("own key"), "{message}");
    }
}

// Fault 17.
#[test]
fn the_key_of_another_node_is_refused_whoever_comes_first_in_order() {
    for thief in [2, 4] {
        let mut topology = Topology::new();
        let owner = record(&local(3, 0));
        resolve(&mut topology, std::slice::from_ref(&owner));
        let mut claimant = record(&local(thief, 0));
        claimant.created = 1;
        set(&mut claimant, "public-key", &key(3).to_string());
        let mesh = resolve(&mut topology, &[owner, claimant]);
        assert_eq!(names(&mesh), ["node-3"]);
        let message = mesh.refused[&format!("node-{thief}")].to_string();
        assert!(message.contains("key of node node-3"), "{message}");
    }
}

// Fault 17.
#[test]
fn a_peer_that_takes_the_key_of_another_keeps_its_own() {
    let mut topology = Topology::new();
    let (second, third) = (record(&local(2, 0)), record(&local(3, 0)));
    let good = resolve(&mut topology, &[second.clone(), third.clone()]);
    let mut thief = second;
    set(&mut thief, "next-public-key", &key(3).to_string());
    let mesh = resolve(&mut topology, &[thief, third]);
    assert_eq!(mesh.peers, good.peers);
    assert!(matches!(mesh.refused["node-2"], Refusal::DuplicateKey { .. }));
}

#[test]
fn a_refused_incumbent_keeps_what_it_had_in_the_same_set() {
    let mut topology = Topology::new();
    let (second, third) = (record(&local(2, 0)), record(&local(3, 0)));
    let good = resolve(&mut topology, &[second.clone(), third.clone()]);
    let mut greedy = second.clone();
    set(&mut greedy, "next-public-key", &key(3).to_string());
    let mut vulture = record(&local(4, 0));
    vulture.pod_cidrs = second.pod_cidrs;
    let mesh = resolve(&mut topology, &[greedy, third, vulture]);
    assert_eq!(mesh.peers, good.peers);
    assert!(matches!(&mesh.refused["node-4"], Refusal::Overlap { owner, .. } if owner == "node-2"));
}

// Fault 17.
#[test]
fn a_generation_that_goes_back_is_ignored_and_reported() {
    let mut topology = Topology::new();
    let good = resolve(&mut topology, &[record(&local(2, 5))]);
    let mesh = resolve(&mut topology, &[record(&local(2, 4))]);
    assert_eq!(mesh.peers, good.peers);
    let message = mesh.refused["node-2"].to_string();
    assert!(message.contains("from 5 to 4"), "{message}");
    let mesh = resolve(&mut topology, &[record(&local(2, 6))]);
    assert_eq!(mesh.peers["node-2"].generation.number(), 6);
    assert_eq!(mesh.refused, BTreeMap::new());
}

// Fault 18.
#[test]
fn an_overlapping_pod_cidr_is_refused_and_the_incumbent_stays() {
    let mut topology = Topology::new();
    let second = record(&local(2, 0));
    resolve(&mut topology, std::slice::from_ref(&second));
    for cidr in ["10.244.2.0/24", "10.244.2.128/25", "10.244.2.0/23", "10.244.0.0/17"] {
        let mut claimant = record(&local(3, 0));
        (claimant.created, claimant.pod_cidrs) = (1, vec![cidr.to_owned()]);
        let mesh = resolve(&mut topology, &[second.clone(), claimant]);
        assert_eq!(names(&mesh), ["node-2"]);
        let message = mesh.refused["node-3"].to_string();
        let owner = if cidr.ends_with("/17") { "node-" } else { "node-2" };
        assert!(message.contains(cidr) && message.contains(owner), "{message}");
    }
}

// Fault 18.
#[test]
fn our_own_pod_cidr_is_never_given_away() {
    for cidr in ["10.244.1.0/24", "10.244.1.64/26", "10.244.0.0/23"] {
        let mut claimant = record(&local(2, 0));
        (claimant.created, claimant.pod_cidrs) = (1, vec![cidr.to_owned()]);
        let mesh = resolve(&mut Topology::new(), &[claimant]);
        assert_eq!(names(&mesh), [""; 0]);
        let overlap = &mesh.refused["node-2"];
        assert!(matches!(overlap, Refusal::Overlap { owner, .. } if owner == "node-1"));
    }
}

#[test]
fn among_strangers_the_elder_wins_then_the_name() {
    let mut nodes = [record(&local(2, 0)), record(&local(3, 0))];
    nodes[1].pod_cidrs = nodes[0].pod_cidrs.clone();
    assert_eq!(names(&resolve(&mut Topology::new(), &nodes)), ["node-2"]);
    nodes[1].created = nodes[0].created - 1;
    assert_eq!(names(&resolve(&mut Topology::new(), &nodes)), ["node-3"]);
}

#[test]
fn a_subnet_may_be_handed_on_in_one_set() {
    let mut topology = Topology::new();
    let (second, third) = (record(&local(2, 0)), record(&local(3, 0)));
    resolve(&mut topology, &[second.clone(), third.clone()]);
    let (mut taker, mut giver) = (second, third);
    taker.pod_cidrs = giver.pod_cidrs.clone();
    giver.pod_cidrs = vec!["10.244.9.0/24".to_owned()];
    let mesh = resolve(&mut topology, &[taker, giver]);
    assert_eq!(mesh.refused, BTreeMap::new());
    assert!(mesh.peers["node-2"].pod_cidrs.contains(&net("10.244.3.0/24")));
    assert!(mesh.peers["node-3"].pod_cidrs.contains(&net("10.244.9.0/24")));
}

// Fault 20.
#[test]
fn a_node_made_again_starts_anew() {
    let mut topology = Topology::new();
    resolve(&mut topology, &[record(&local(2, 5))]);
    let mut again = record(&local(2, 0));
    again.uid = "another".to_owned();
    set(&mut again, "public-key", &key(22).to_string());
    let mut bare = again.clone();
    bare.annotations.clear();
    let mesh = resolve(&mut topology, &[bare]);
    assert_eq!((names(&mesh), &mesh.refused["node-2"]), (vec![], &Refusal::NoKey));

    resolve(&mut topology, &[record(&local(2, 5))]);
    let mesh = resolve(&mut topology, &[again]);
    assert_eq!(mesh.peers["node-2"].public_key, Some(key(22)));
    assert_eq!(mesh.peers["node-2"].generation.number(), 0);
    assert_eq!(mesh.refused, BTreeMap::new());
}

// Fault 20.
#[test]
fn a_node_made_again_is_no_longer_the_incumbent() {
    let mut topology = Topology::new();
    let (second, mut third) = (record(&local(2, 0)), record(&local(3, 0)));
    resolve(&mut topology, std::slice::from_ref(&second));
    third.pod_cidrs = second.pod_cidrs.clone();
    let mut again = second;
    again.uid = "another".to_owned();
    again.created = third.created + 1;
    assert_eq!(names(&resolve(&mut topology, &[again, third])), ["node-3"]);
}

#[test]
fn pairs_without_a_way_to_talk_are_refused_but_keep_their_claims() {
    let mut topology = Topology::new();
    let mut vxlan = record(&local(2, 0));
    resolve(&mut topology, std::slice::from_ref(&vxlan));
    set(&mut vxlan, "transports", "vxlan");
    let mut thief = record(&local(3, 0));
    thief.pod_cidrs = vxlan.pod_cidrs.clone();
    let mesh = resolve(&mut topology, &[vxlan, thief]);
    assert_eq!(names(&mesh), [""; 0]);
    let message = mesh.refused["node-2"].to_string();
    assert!(message.contains("vxlan") && message.contains("wireguard"), "{message}");
    assert!(matches!(mesh.refused["node-3"], Refusal::Overlap { .. }));

    let mut own = local(1, 0);
    own.endpoints.v6 = None;
    let mut other = local(2, 0);
    other.endpoints.v4 = None;
    let mesh = Topology::new().resolve(&own, &records(&[record(&other)]));
    let message = mesh.refused["node-2"].to_string();
    assert!(message.contains("IPv6 endpoint only"), "{message}");
}

#[test]
fn two_nodes_may_publish_one_endpoint() {
    let mut successor = record(&local(3, 0));
    for name in ["endpoint", "endpoint-v6"] {
        let taken = record(&local(2, 0)).annotations[name].clone();
        set(&mut successor, name, &taken);
    }
    let mesh = resolve(&mut Topology::new(), &[record(&local(2, 0)), successor]);
    assert_eq!(names(&mesh), ["node-2", "node-3"]);
}

#[test]
fn our_own_node_gives_a_keepalive_or_a_reason() {
    let mut own = record(&local(1, 0));
    set(&mut own, "config/persistent-keepalive", "25");
    let mesh = resolve(&mut Topology::new(), std::slice::from_ref(&own));
    assert_eq!(mesh.persistent_keepalive, Some(25));
    let with_default = Local { persistent_keepalive: Some(60), ..local(1, 0) };
    let seconds = |own: &NodeRecord| {
        Topology::new().resolve(&with_default, &records([own])).persistent_keepalive
    };
    assert_eq!(seconds(&own), Some(25), "the Node says");
    set(&mut own, "config/persistent-keepalive", "off");
    assert_eq!(seconds(&own), None);
    assert_eq!(seconds(&record(&local(1, 0))), Some(60));
    set(&mut own, "config/persistent-keepalive", "often");
    assert_eq!(seconds(&own), Some(60), "what cannot be used counts as not set");
    let mesh = resolve(&mut Topology::new(), &[own, record(&local(2, 0))]);
    assert_eq!(mesh.persistent_keepalive, None);
    assert_eq!(names(&mesh), ["node-2"]);
    assert!(mesh.ignored.contains_key("node-1"));
    assert_eq!(mesh.refused, BTreeMap::new());
}

// Fault 5.
#[test]
fn a_list_without_us_is_not_believed() {
    let all = records(&[record(&local(1, 0)), record(&local(2, 0))]);
    assert_eq!(plausible(&all, "node-1"), Ok(()));
    assert_eq!(plausible(&BTreeMap::new(), "node-1"), Err(Implausible::Empty));
    let message = plausible(&all, "node-3").unwrap_err().to_string();
    assert!(message.contains("node-3"), "{message}");
}

#[test]
fn a_node_that_had_a_preshared_key_is_not_taken_without_and_a_new_one_neither() {
    let id = gambeson_keys::SecretId::from_bytes([1; 8]);
    let with = |i: u8| {
        let own = local(i, 0);
        let secrets = own.keys.keys().map(|generation| (*generation, id)).collect();
        Local { secrets, known_secrets: vec![id], ..own }
    };
    let mut topology = Topology::new();
    let resolve =
        |topology: &mut Topology, nodes: &[NodeRecord]| topology.resolve(&with(1), &records(nodes));
    // One that was there before this node had any may go on.
    let old = record(&local(4, 0));
    topology.resolve(&local(1, 0), &records(std::slice::from_ref(&old)));
    let mesh = resolve(&mut topology, &[record(&with(2)), record(&local(3, 0)), old.clone()]);
    assert_eq!(names(&mesh), ["node-2", "node-4"]);
    for name in ["node-3", "node-4"] {
        assert_eq!(mesh.refused[name], Refusal::NoPresharedKey);
    }
    let mesh = resolve(&mut topology, &[record(&local(2, 0)), old]);
    assert_eq!(mesh.refused["node-2"], Refusal::NoPresharedKey);
    assert_eq!(mesh.peers["node-2"].secret, Some(id), "its last good state stays");
}
