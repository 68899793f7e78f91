//! Two nodes whose lists change, each with a kernel of its own and its own idea of the time at
//! which it saw the other's Node.

use super::*;
use crate::desired::Desired;
use crate::fixtures::{key, local, record, records};
use crate::plan::Plan;
use crate::sim;
use crate::topology::Topology;
use crate::transport::{self, Paths};

use Transport::{HostGw, Vxlan, Wireguard};

/// A node with its kernel.
struct Side {
    own: Local,
    topology: Topology,
    changeover: Changeover,
    observed: Observed,
    desired: Desired,
}

impl Side {
    fn new(i: u8, transports: &[Transport]) -> Self {
        let transports = transports.iter().copied().collect();
        // Both on one link.
        let on_link = [1, 2].iter().flat_map(|i| local(*i, 0).endpoints.addresses()).collect();
        Self {
            own: Local { transports, on_link, ..local(i, 0) },
            topology: Topology::new(),
            changeover: Changeover::default(),
            observed: Observed::default(),
            desired: Desired::default(),
        }
    }

    fn accept(&mut self, transports: &[Transport]) {
        self.own.transports = transports.iter().copied().collect();
    }

    /// One pass, with the other's Node as it is known here.
    fn pass(&mut self, other: &NodeRecord, announced: bool, now: Instant) {
        let nodes = records([&record(&self.own), other]);
        let mesh = self.topology.resolve(&self.own, &nodes);
        let changes = self.changeover.follow(&mesh, &self.own, &self.observed, announced, now);
        let paths = Paths { changes, ..Paths::default() };
        self.desired = transport::desired(&mesh, &self.own, &paths);
        let plan = Plan::new(&self.desired, &self.observed);
        sim::apply(&plan, &self.desired, &mut self.observed);
    }

    /// How packets to the other leave.
    fn sends_by(&self) -> Option<Transport> {
        let pods = if self.own.name == "node-1" { "10.244.2.0/24" } else { "10.244.1.0/24" };
        let key = RouteKey { destination: pods.parse().unwrap(), metric: PEER_ROUTE_METRIC };
        Transport::of(self.observed.routes.get(&key)?.next_hop)
    }

    /// Whether packets that the other sends by this would come in.
    fn takes(&self, transport: Transport) -> bool {
        let plaintext = |link: &str| self.desired.ruleset.plaintext.contains_key(link);
        let other = key(if self.own.name == "node-1" { 2 } else { 1 });
        match transport {
            Wireguard => self.desired.devices.values().any(|d| d.peers.contains_key(&other)),
            HostGw => plaintext("eth0"),
            Vxlan => plaintext("gambeson-vx4"),
        }
    }

    fn handshake(&mut self) {
        sim::handshakes(&mut self.observed, Some(Duration::ZERO));
    }

    fn provokes(&self) -> bool {
        let peers = self.desired.devices.values().flat_map(|device| device.peers.values());
        peers.into_iter().any(|peer| peer.persistent_keepalive.is_some())
    }
}

/// Both nodes through a change of the first one's list, of which the second hears `late`, with
/// a look at the other's acceptance at every moment. Gives back after how long each moved.
fn changes(
    before: [&[Transport]; 2],
    after: &[Transport],
    late: Duration,
) -> [Option<Duration>; 2] {
    let (mut one, mut two) = (Side::new(1, before[0]), Side::new(2, before[1]));
    let start = Instant::now();
    for _ in 0..2 {
        one.pass(&record(&two.own), true, start);
        two.pass(&record(&one.own), true, start);
    }
    let from = one.sends_by().unwrap();
    let old = record(&one.own);
    one.accept(after);
    let new = record(&one.own);
    let mut moved = [None, None];
    for tick in 0..400 {
        let elapsed = Duration::from_millis(100) * tick;
        let now = start + elapsed;
        let heard = elapsed >= late;
        one.pass(&record(&two.own), true, now);
        two.pass(if heard { &new } else { &old }, true, now);
        if one.takes(Wireguard) && two.takes(Wireguard) {
            one.handshake();
            two.handshake();
        }
        for (side, other) in [(&one, &two), (&two, &one)] {
            let by = side.sends_by().unwrap();
            assert!(other.takes(by), "{elapsed:?}: {} sends by {by}", side.own.name);
        }
        for (side, moved) in [&one, &two].into_iter().zip(&mut moved) {
            if side.sends_by() != Some(from) {
                moved.get_or_insert(elapsed);
            }
        }
    }
    assert_eq!((one.changeover.steps.len(), two.changeover.steps.len()), (0, 0));
    assert!(!one.provokes() && !two.provokes());
    assert!(!one.takes(from) && !two.takes(from), "the old way is still open");
    moved
}

#[test]
fn the_new_way_is_open_at_both_ends_before_it_is_used_and_the_old_one_after() {
    for late in [0, 100, 1_000, 2_900] {
        let late = Duration::from_millis(late);
        let three = Duration::from_secs(3);
        let both = |at| [Some(at), Some(at + late)];
        // To what is in clear: as late as both have seen it.
        let moved = changes([&[Wireguard, Vxlan], &[Wireguard, Vxlan]], &[Vxlan], late);
        assert_eq!(moved, both(three));
        let moved = changes([&[Vxlan], &[HostGw, Vxlan]], &[HostGw, Vxlan], late);
        assert_eq!(moved, both(three));
        // To WireGuard: as soon as there is a session.
        let moved = changes([&[Vxlan], &[Wireguard, Vxlan]], &[Wireguard, Vxlan], late);
        for moved in moved {
            let wait = moved.unwrap() - late;
            assert!(wait <= Duration::from_millis(200), "{late:?}: {moved:?}");
        }
    }
}

/// One node's changes, the other's Node being what it is.
fn one_sided(
    before: &[Transport],
    after: &[Transport],
    theirs: &[Transport],
) -> (Side, NodeRecord, Instant) {
    let mut one = Side::new(1, before);
    let other = record(&Side::new(2, theirs).own);
    let start = Instant::now();
    one.pass(&other, true, start);
    one.pass(&other, true, start);
    one.accept(after);
    one.pass(&other, true, start);
    (one, other, start)
}

#[test]
fn a_way_in_clear_that_one_node_no_longer_allows_is_left_at_once() {
    let (one, ..) = one_sided(&[Vxlan], &[Wireguard], &[Wireguard, Vxlan]);
    assert_eq!(one.sends_by(), Some(Wireguard));
    assert!(!one.takes(Vxlan));
    assert!(one.desired.ruleset.plaintext.is_empty());
}

#[test]
fn a_pair_without_a_session_is_encrypted_in_the_end() {
    let (mut one, other, start) = one_sided(&[Vxlan], &[Wireguard, Vxlan], &[Wireguard, Vxlan]);
    assert!(one.provokes());
    for (seconds, by) in [(0, Vxlan), (29, Vxlan), (30, Wireguard)] {
        one.pass(&other, true, start + Duration::from_secs(seconds));
        assert_eq!(one.sends_by(), Some(by), "{seconds} s");
    }
    assert!(!one.provokes());
}

#[test]
fn no_peer_is_left_behind_that_cannot_know() {
    let (mut one, other, start) = one_sided(&[Wireguard, Vxlan], &[Vxlan], &[Wireguard, Vxlan]);
    let minute = start + Duration::from_secs(60);
    one.pass(&other, false, minute);
    assert_eq!(one.sends_by(), Some(Wireguard), "the API server has not taken the new list");
    assert_eq!(one.changeover.next_look(minute), None, "its answer wakes the agent");
    one.pass(&other, true, minute + Duration::from_millis(2_900));
    assert_eq!(one.sends_by(), Some(Wireguard));
    one.pass(&other, true, minute + SEEN_BY_ALL);
    assert_eq!(one.sends_by(), Some(Vxlan));
    let mut published = record(&one.own);
    assert!(is_announced(&one.own, &published));
    published.annotations.remove(annotation::TRANSPORTS);
    assert!(!is_announced(&one.own, &published));
}

#[test]
fn a_restart_goes_on_where_the_last_agent_stood() {
    let (mut one, other, start) = one_sided(&[Wireguard, Vxlan], &[Vxlan], &[Wireguard, Vxlan]);
    one.changeover = Changeover::default();
    let later = start + Duration::from_secs(100);
    one.pass(&other, true, later);
    assert_eq!(one.sends_by(), Some(Wireguard), "it has waited for nobody yet");
    assert!(one.takes(Vxlan) && one.takes(Wireguard));
    assert_eq!(one.changeover.next_look(later), Some(SEEN_BY_ALL));
    one.pass(&other, true, later + SEEN_BY_ALL);
    assert_eq!(one.sends_by(), Some(Vxlan));
}

#[test]
fn a_list_that_is_changed_back_leaves_the_other_way_open_for_a_while() {
    let (mut one, other, start) = one_sided(&[Wireguard, Vxlan], &[Vxlan], &[Wireguard, Vxlan]);
    one.accept(&[Wireguard, Vxlan]);
    let mut at = |seconds| {
        one.pass(&other, true, start + Duration::from_secs(seconds));
        (one.sends_by(), one.takes(Vxlan))
    };
    assert_eq!(at(1), (Some(Wireguard), true));
    assert_eq!(at(30), (Some(Wireguard), true));
    assert_eq!(at(31), (Some(Wireguard), false));
}

#[test]
fn a_device_that_cannot_be_made_keeps_the_old_way() {
    let (mut one, other, start) = one_sided(&[Wireguard, Vxlan], &[Vxlan], &[Wireguard, Vxlan]);
    for device in [Family::V4, Family::V6].map(DeviceName::Vxlan) {
        one.observed.links.remove(&device);
    }
    let late = start + Duration::from_secs(40);
    let mesh = one.topology.resolve(&one.own, &records([&record(&one.own), &other]));
    let changes = one.changeover.follow(&mesh, &one.own, &one.observed, true, late);
    assert!(!changes["node-2"].moved);
}
