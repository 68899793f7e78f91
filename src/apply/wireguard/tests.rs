use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, SystemTime};

use gambeson_keys::{PrivateKey, PublicKey, Secrets};
use gambeson_mesh::observed::{ObservedPeer, ObservedWireGuard, Preshared};
use gambeson_mesh::plan::{PeerChange, WireGuardChange};
use ipnet::IpNet;
use proptest::prelude::*;
use zeroize::Zeroizing;

use super::userspace::{parse, render};
use super::{PeerEntry, Update, entries};

const SCRATCH: [u8; 32] = [0xee; 32];

fn peer_key(number: u8) -> PublicKey {
    let mut bytes = [9; 32];
    bytes[1] = number;
    PublicKey::from_bytes(bytes).unwrap()
}

fn prefix(number: u8) -> IpNet {
    IpNet::new([10, 244, number, 0].into(), 24).unwrap()
}

fn prefixes(numbers: impl IntoIterator<Item = u8>) -> BTreeSet<IpNet> {
    numbers.into_iter().map(prefix).collect()
}

/// The owner of each prefix after the entries, as WireGuard carries them out. Fails when a
/// prefix in `keep` is without its owner at any moment.
fn carry_out(
    entries: &[PeerEntry],
    mut owners: BTreeMap<IpNet, [u8; 32]>,
    keep: &BTreeMap<IpNet, [u8; 32]>,
) -> BTreeMap<IpNet, [u8; 32]> {
    for entry in entries {
        for network in &entry.add_allowed_ips {
            owners.insert(*network, entry.key);
        }
        if entry.remove {
            owners.retain(|_, owner| *owner != entry.key);
        }
        for (network, owner) in keep {
            assert_eq!(owners.get(network), Some(owner), "{network} lost its owner");
        }
    }
    owners
}

fn owners_of(state: &BTreeMap<PublicKey, BTreeSet<IpNet>>) -> BTreeMap<IpNet, [u8; 32]> {
    let pairs = state.iter().flat_map(|(key, set)| set.iter().map(|n| (*n, *key.as_bytes())));
    pairs.collect()
}

/// Peers 0 to 4, some of whom own prefixes 0 to 11, no prefix twice.
fn table() -> impl Strategy<Value = BTreeMap<PublicKey, BTreeSet<IpNet>>> {
    let owner = prop::option::of(0_u8..5);
    (prop::collection::vec(owner, 12), prop::collection::btree_set(0_u8..5, 0..5)).prop_map(
        |(owners, idle)| {
            let mut table: BTreeMap<_, BTreeSet<_>> =
                idle.into_iter().map(|peer| (peer_key(peer), BTreeSet::new())).collect();
            for (number, owner) in (0_u8..).zip(owners) {
                if let Some(peer) = owner {
                    table.entry(peer_key(peer)).or_default().insert(prefix(number));
                }
            }
            table
        },
    )
}

proptest! {
    /// From any table to any other, and what stays is never away.
    #[test]
    fn entries_reach_the_wanted_table(from in table(), to in table()) {
        let peer = |set: &BTreeSet<IpNet>| ObservedPeer { allowed_ips: set.clone(), ..Default::default() };
        let current = ObservedWireGuard {
            peers: from.iter().map(|(key, set)| (*key, peer(set))).collect(),
            ..Default::default()
        };
        let change = WireGuardChange {
            set_peers: to
                .iter()
                .filter(|(key, set)| from.get(key) != Some(set))
                .map(|(key, set)| {
                    (*key, PeerChange {
                        allowed_ips: Some(set.clone()),
                        ..PeerChange::default()
                    })
                })
                .collect(),
            remove_peers: from.keys().filter(|key| !to.contains_key(key)).copied().collect(),
            ..Default::default()
        };
        let (before, after) = (owners_of(&from), owners_of(&to));
        let keep: BTreeMap<_, _> =
            before.iter().filter(|(n, o)| after.get(n) == Some(o)).map(|(n, o)| (*n, *o)).collect();
        let entries = entries(&change, &current, (None, &Secrets::default()), SCRATCH);
        prop_assert_eq!(carry_out(&entries, before, &keep), after);
        let scratch_removed = entries.iter().rfind(|e| e.key == SCRATCH).is_none_or(|e| e.remove);
        prop_assert!(scratch_removed);
    }

    #[test]
    fn an_answer_of_any_text_is_read_or_refused(text in "([a-z_]{0,12}=?[0-9a-f:./]{0,70}\n){0,9}") {
        let _ = parse(&text, SystemTime::now());
    }
}

#[test]
fn an_unchanged_peer_keeps_its_prefixes_untouched() {
    let current = ObservedWireGuard {
        peers: [(peer_key(1), ObservedPeer { allowed_ips: prefixes([1]), ..Default::default() })]
            .into(),
        ..Default::default()
    };
    let endpoint = "192.0.2.1:51820".parse().unwrap();
    let change = WireGuardChange {
        set_peers: [(
            peer_key(1),
            PeerChange { endpoint: Some(endpoint), ..PeerChange::default() },
        )]
        .into(),
        ..Default::default()
    };
    let expected =
        PeerEntry { endpoint: Some(endpoint), ..PeerEntry::new(*peer_key(1).as_bytes()) };
    assert_eq!(entries(&change, &current, (None, &Secrets::default()), SCRATCH), [expected]);
}

#[test]
fn many_prefixes_of_a_peer_are_split() {
    let change = WireGuardChange {
        set_peers: [(
            peer_key(1),
            PeerChange {
                allowed_ips: Some(prefixes(0..=200)),
                persistent_keepalive: Some(25),
                ..PeerChange::default()
            },
        )]
        .into(),
        ..Default::default()
    };
    let entries =
        entries(&change, &ObservedWireGuard::default(), (None, &Secrets::default()), SCRATCH);
    assert_eq!(entries.iter().map(|e| e.add_allowed_ips.len()).sum::<usize>(), 201);
    assert!(entries.iter().all(|e| e.add_allowed_ips.len() <= super::PREFIXES_PER_ENTRY));
    assert_eq!(entries.iter().filter(|e| e.persistent_keepalive.is_some()).count(), 1);
}

#[test]
fn a_request_is_written_as_the_protocol_wants() {
    let key = PrivateKey::generate();
    let peer = PeerEntry {
        endpoint: "[2001:db8::1]:51820".parse().ok(),
        persistent_keepalive: Some(0),
        preshared_key: Some(Zeroizing::new([0x0b; 32])),
        add_allowed_ips: vec![prefix(1), "fd00::/64".parse().unwrap()],
        ..PeerEntry::new([0x0a; 32])
    };
    let peers = vec![peer, PeerEntry::removal([0xff; 32])];
    let text =
        render(&Update { key: Some(&key), listen_port: Some(51820), clear_fwmark: true, peers });
    let hex: String = key.as_bytes().iter().map(|b| format!("{b:02x}")).collect();
    let expected = format!(
        "set=1\nprivate_key={hex}\nlisten_port=51820\nfwmark=0\npublic_key={}\n\
         endpoint=[2001:db8::1]:51820\npersistent_keepalive_interval=0\npreshared_key={}\n\
         allowed_ip=10.244.1.0/24\nallowed_ip=fd00::/64\npublic_key={}\nremove=true\n\n",
        "0a".repeat(32),
        "0b".repeat(32),
        "ff".repeat(32)
    );
    assert_eq!(text, expected);
}

#[test]
fn an_answer_is_read() {
    let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000);
    let hex =
        |key: PublicKey| key.as_bytes().iter().map(|b| format!("{b:02x}")).collect::<String>();
    let private = PrivateKey::generate();
    let secret: String = private.as_bytes().iter().map(|b| format!("{b:02x}")).collect();
    let text = format!(
        "private_key={secret}\nlisten_port=51822\nfwmark=1\npublic_key={}\npreshared_key={secret}\nprotocol_version=1\n\
         endpoint=192.0.2.1:51820\nlast_handshake_time_sec=999990\n\
         last_handshake_time_nsec=500000000\ntx_bytes=7\nrx_bytes=8\n\
         persistent_keepalive_interval=25\nallowed_ip=10.244.1.0/24\nallowed_ip=fd00::/64\n\
         something_new=1\npublic_key={}\npreshared_key={}\nlast_handshake_time_sec=0\nlast_handshake_time_nsec=0\n\
         tx_bytes=0\nrx_bytes=0\npersistent_keepalive_interval=0\nerrno=0\n\n",
        hex(peer_key(1)),
        hex(peer_key(2)),
        "0".repeat(64)
    );
    let found = parse(&text, now).unwrap();
    assert_eq!(*found.preshared_keys[&peer_key(1)], *private.as_bytes());
    assert_eq!(found.preshared_keys.len(), 1);
    let state = found.state(&Secrets::default());
    assert_eq!(state.public_key, Some(private.public()));
    assert_eq!((state.listen_port, state.fwmark), (51822, 1));
    let first = &state.peers[&peer_key(1)];
    assert_eq!(first.endpoint, "192.0.2.1:51820".parse().ok());
    assert_eq!(first.handshake_age, Some(Duration::from_millis(9_500)));
    assert_eq!((first.tx_bytes, first.rx_bytes), (7, 8));
    assert_eq!((first.persistent_keepalive, first.preshared), (Some(25), Preshared::Foreign));
    assert_eq!(first.allowed_ips, [prefix(1), "fd00::/64".parse().unwrap()].into());
    assert_eq!(state.peers[&peer_key(2)], ObservedPeer::default());
    // A clock that was set back.
    let early = parse(&text, SystemTime::UNIX_EPOCH).unwrap().state;
    assert_eq!(early.peers[&peer_key(1)].handshake_age, Some(Duration::ZERO));
}

#[test]
fn an_answer_that_is_cut_short_or_an_error_is_refused() {
    let now = SystemTime::now();
    for text in ["listen_port=1\n\n", "errno=x\n\n", "garbage\nerrno=0\n\n", "listen_port=70000\n"]
    {
        assert!(parse(text, now).is_err(), "{text:?}");
    }
    let taken = parse("errno=98\n\n", now).unwrap_err();
    assert_eq!(taken.raw_os_error(), Some(nix::libc::EADDRINUSE));
}

#[test]
fn a_kernel_peer_that_spans_messages_is_one() {
    use wireguard_control::{Key, PeerInfo};
    let mut first = PeerInfo::from_public_key(Key(*peer_key(1).as_bytes()));
    first.stats.rx_bytes = 5;
    let mut rest = PeerInfo::from_public_key(Key(*peer_key(1).as_bytes()));
    for (peer, number) in [(&mut first, 1), (&mut rest, 2)] {
        let ip = wireguard_control::AllowedIp { address: prefix(number).addr(), cidr: 24 };
        peer.config.allowed_ips.push(ip);
    }
    let merged = super::kernel::merge_peers(&[first, rest], SystemTime::now());
    let peer = &merged[&peer_key(1)];
    assert_eq!(peer.allowed_ips, prefixes([1, 2]));
    assert_eq!(peer.rx_bytes, 5);
}
