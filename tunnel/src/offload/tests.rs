//! Cutting and merging against each other, and against checksums that others compute.

use etherparse::{NetSlice, PacketBuilder, SlicedPacket, TcpOptionElement, TransportSlice};
use proptest::prelude::*;

use super::header::{Checksum, Cut, Protocol};
use super::{Coalescer, Header, Offload, Split};
use crate::ip::Family;

/// A flow: family, protocol, ports.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Flow {
    is_v6: bool,
    is_tcp: bool,
    port: u16,
}

impl Flow {
    fn transport(self) -> usize {
        if self.is_v6 { 40 } else { 20 }
    }

    fn header(self, headers: usize, size: u16) -> Header {
        let protocol = match (self.is_tcp, self.is_v6) {
            (true, false) => Protocol::TcpV4,
            (true, true) => Protocol::TcpV6,
            (false, _) => Protocol::Udp,
        };
        let offset = if self.is_tcp { 16 } else { 6 };
        Header {
            cut: Some(Cut { protocol, size, headers: headers as u16 }),
            checksum: Some(Checksum { start: self.transport() as u16, offset }),
        }
    }
}

/// What a packet says besides its payload.
#[derive(Debug, Clone, Copy)]
struct Says {
    sequence: u32,
    identification: u16,
    /// 0 to 3: nothing, PSH, FIN, SYN.
    flag: u8,
    timestamp: Option<u32>,
}

fn payload(len: usize, seed: u8) -> Vec<u8> {
    (0..len).map(|n| (n as u8).wrapping_mul(31).wrapping_add(seed)).collect()
}

fn packet(flow: Flow, says: Says, payload: &[u8]) -> Vec<u8> {
    let builder = match flow.is_v6 {
        true => PacketBuilder::ipv6([1; 16], [2; 16], 64),
        false => PacketBuilder::ip(etherparse::IpHeaders::Ipv4(
            etherparse::Ipv4Header {
                identification: says.identification,
                dont_fragment: false,
                time_to_live: 64,
                source: [10, 0, 0, 1],
                destination: [10, 0, 0, 2],
                ..Default::default()
            },
            Default::default(),
        )),
    };
    let mut bytes = Vec::new();
    if !flow.is_tcp {
        builder.udp(flow.port, 9).write(&mut bytes, payload).unwrap();
        return bytes;
    }
    let mut builder = builder.tcp(flow.port, 9, says.sequence, 500).ack(77);
    builder = match says.flag {
        1 => builder.psh(),
        2 => builder.fin(),
        3 => builder.syn(),
        _ => builder,
    };
    if let Some(timestamp) = says.timestamp {
        builder = builder.options(&[TcpOptionElement::Timestamp(timestamp, 9)]).unwrap();
    }
    builder.write(&mut bytes, payload).unwrap();
    bytes
}

fn cut(header: &Header, packet: &[u8]) -> Vec<Vec<u8>> {
    let split = Split::of(header, packet).unwrap();
    let write = |number| {
        let mut out = vec![0xee; split.len(number)];
        split.write(number, &mut out);
        out
    };
    (0..split.count()).map(write).collect()
}

/// What the TUN device would be given, and what the kernel would make of it.
fn merged_and_cut(packets: &[Vec<u8>], offload: Offload) -> (usize, Vec<Vec<u8>>) {
    let packets: Vec<&[u8]> = packets.iter().map(Vec::as_slice).collect();
    let mut coalescer = Coalescer::default();
    coalescer.group(&packets, offload);
    let mut out = Vec::new();
    for group in coalescer.groups() {
        let members: Vec<_> = coalescer.members(group).map(|number| packets[number]).collect();
        match group.merged(&packets) {
            Some(merged) => {
                let mut whole = merged.bytes().to_vec();
                members.iter().for_each(|m| whole.extend(merged.payload(m).unwrap()));
                assert!(whole.len() <= 65_535);
                assert_eq!(Header::read(&merged.header.write()), Some(merged.header));
                out.extend(cut(&merged.header, &whole));
            }
            None => out.extend(members.iter().map(|packet| packet.to_vec())),
        }
    }
    (coalescer.groups().len(), out)
}

/// Asserts that checksums and lengths are right, as another implementation sees them.
fn check(packet: &[u8]) {
    let sliced = SlicedPacket::from_ip(packet).unwrap();
    let transport = sliced.transport.unwrap();
    match (sliced.net.unwrap(), transport) {
        (NetSlice::Ipv4(ip), transport) => {
            let header = ip.header().to_header();
            assert_eq!(header.header_checksum, header.calc_header_checksum());
            assert_eq!(usize::from(header.total_len), packet.len());
            match transport {
                TransportSlice::Tcp(tcp) => {
                    let sum = tcp.calc_checksum_ipv4(header.source, header.destination);
                    assert_eq!(tcp.checksum(), sum.unwrap());
                }
                TransportSlice::Udp(udp) => {
                    let sum = udp.to_header().calc_checksum_ipv4(&header, udp.payload());
                    assert_eq!(udp.checksum(), sum.unwrap());
                }
                _ => panic!("another protocol"),
            }
        }
        (NetSlice::Ipv6(ip), transport) => {
            let header = ip.header().to_header();
            assert_eq!(usize::from(header.payload_length) + 40, packet.len());
            match transport {
                TransportSlice::Tcp(tcp) => {
                    let sum = tcp.calc_checksum_ipv6(header.source, header.destination);
                    assert_eq!(tcp.checksum(), sum.unwrap());
                }
                TransportSlice::Udp(udp) => {
                    let sum = udp.to_header().calc_checksum_ipv6(&header, udp.payload());
                    assert_eq!(udp.checksum(), sum.unwrap());
                }
                _ => panic!("another protocol"),
            }
        }
        _ => panic!("not IP"),
    }
}

fn flows() -> impl Strategy<Value = Flow> {
    (any::<bool>(), any::<bool>(), 1u16..4).prop_map(|(is_v6, is_tcp, port)| Flow {
        is_v6,
        is_tcp,
        port,
    })
}

proptest! {
    #[test]
    fn a_super_packet_is_cut_into_sound_packets_and_merged_back(
        flow in flows(),
        len in 1usize..60_000,
        size in 1u16..9000,
        flag in 0u8..3,
        timestamp in any::<Option<u32>>(),
        sequence in any::<u32>(),
        identification in any::<u16>(),
    ) {
        let size = size.max((len / 60) as u16 + 1);
        let says = Says { sequence, identification, flag, timestamp };
        let payload = payload(len, 3);
        let whole = packet(flow, says, &payload);
        let headers = whole.len() - payload.len();
        let packets = cut(&flow.header(headers, size), &whole);
        prop_assert_eq!(packets.len(), len.div_ceil(size.into()));
        packets.iter().for_each(|packet| check(packet));
        let payloads: Vec<u8> = packets.iter().flat_map(|packet| packet[headers..].to_vec()).collect();
        prop_assert_eq!(&payloads, &payload);
        for (n, packet) in packets.iter().enumerate().filter(|_| flow.is_tcp) {
            let at = flow.transport();
            let own = u32::from_be_bytes(packet[at + 4..at + 8].try_into().unwrap());
            prop_assert_eq!(own, sequence.wrapping_add(n as u32 * u32::from(size)));
            let is_marked = packet[at + 13] & 0x09 != 0;
            prop_assert_eq!(is_marked, flag != 0 && n + 1 == packets.len());
        }
        let (groups, again) = merged_and_cut(&packets, Offload::TcpAndUdp);
        // FIN stays alone.
        let alone = usize::from(flow.is_tcp && flag == 2 && packets.len() > 1);
        prop_assert_eq!(groups, 1 + alone);
        prop_assert_eq!(again, packets);
    }

    #[test]
    fn whatever_is_merged_and_cut_is_the_same_flow_by_flow(
        steps in prop::collection::vec(
            (
                prop::sample::select(vec![(false, true, 1), (false, true, 1), (true, true, 2),
                    (false, true, 2), (false, false, 1), (true, false, 3)]),
                prop::sample::select(vec![0usize, 1, 7, 100, 100, 100, 100, 100, 100, 1400]),
                prop::sample::select(vec![0u8, 0, 0, 0, 0, 1, 2, 3]),
                prop::sample::select(vec![true, true, true, true, false]),
                prop::sample::select(vec![Some(1), Some(1), Some(1), Some(1), Some(1), Some(2), None]),
            ),
            1..120,
        ),
        offload in prop::sample::select(vec![Offload::Nothing, Offload::Tcp, Offload::TcpAndUdp]),
    ) {
        let mut next = std::collections::BTreeMap::new();
        let mut by_flow = std::collections::BTreeMap::<_, Vec<Vec<u8>>>::new();
        let mut packets = Vec::new();
        for (n, (flow, len, flag, follows, timestamp)) in steps.into_iter().enumerate() {
            let (is_v6, is_tcp, port) = flow;
            let flow = Flow { is_v6, is_tcp, port };
            let (sequence, identification) = next.entry(flow).or_insert((u32::MAX - 300, 65_530));
            *sequence = sequence.wrapping_add(u32::from(!follows && n % 2 == 0));
            *identification = u16::wrapping_add(*identification, u16::from(!follows));
            let says = Says { sequence: *sequence, identification: *identification, flag, timestamp };
            let packet = packet(flow, says, &payload(len, n as u8));
            *sequence = sequence.wrapping_add(len as u32);
            *identification = identification.wrapping_add(1);
            by_flow.entry(flow).or_default().push(packet.clone());
            packets.push(packet);
        }
        let (_, again) = merged_and_cut(&packets, offload);
        for (flow, expected) in by_flow {
            let is_of_flow = |packet: &&Vec<u8>| {
                let at = flow.transport();
                packet[0] >> 4 == if flow.is_v6 { 6 } else { 4 }
                    && packet[if flow.is_v6 { 6 } else { 9 }] == if flow.is_tcp { 6 } else { 17 }
                    && packet[at..at + 2] == flow.port.to_be_bytes()
            };
            let got: Vec<_> = again.iter().filter(is_of_flow).cloned().collect();
            prop_assert_eq!(got, expected);
        }
    }

    #[test]
    fn no_bytes_make_cutting_or_merging_panic(
        header in any::<[u8; 10]>(),
        packets in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..200), 0..20),
        versions in prop::collection::vec(prop::sample::select(vec![0x45u8, 0x46, 0x60, 0]), 20),
    ) {
        let mut packets = packets;
        for (packet, version) in packets.iter_mut().zip(versions) {
            if let Some(first) = packet.first_mut() {
                *first = version;
            }
            let split = Header::read(&header).and_then(|header| Split::of(&header, packet));
            if let Some(split) = split {
                for number in 0..split.count() {
                    split.write(number, &mut vec![0; split.len(number)]);
                }
            }
        }
        let count = packets.len();
        prop_assert_eq!(merged_and_cut(&packets, Offload::TcpAndUdp).1.len(), count);
    }
}

#[test]
fn a_partial_checksum_is_completed() {
    for (is_v6, is_tcp) in [(false, false), (false, true), (true, false), (true, true)] {
        let flow = Flow { is_v6, is_tcp, port: 5 };
        let says = Says { sequence: 1, identification: 1, flag: 0, timestamp: None };
        let right = packet(flow, says, &payload(333, 1));
        let mut partial = right.clone();
        let mut header = flow.header(0, 0);
        header.cut = None;
        let at = flow.transport() + if is_tcp { 16 } else { 6 };
        let covered = (right.len() - flow.transport()) as u16;
        let family = if is_v6 { Family::V6 } else { Family::V4 };
        let protocol = if is_tcp { 6 } else { 17 };
        let sum = super::checksum::Sum::pseudo_header(family, &right, protocol, covered.into());
        partial[at..at + 2].copy_from_slice(&sum.fold().to_ne_bytes());
        assert_eq!(cut(&header, &partial), [right]);
    }
}

/// In UDP, 0 says that there is none (RFC 768).
#[test]
fn a_cut_udp_packet_whose_sum_is_zero_has_its_other_zero() {
    let flow = Flow { is_v6: false, is_tcp: false, port: 5 };
    let says = Says { sequence: 1, identification: 1, flag: 0, timestamp: None };
    let header = flow.header(28, 100);
    let mut super_packet = packet(flow, says, &payload(200, 1));
    let mut zeros = 0;
    for word in 0..=u16::MAX {
        super_packet[28..30].copy_from_slice(&word.to_be_bytes());
        let first = &cut(&header, &super_packet)[0];
        assert_ne!(first[26..28], [0; 2]);
        zeros += usize::from(first[26..28] == [0xff; 2]);
    }
    assert_eq!(zeros, 1);
}

/// Makes an IPv4 header's own checksum right.
fn seal_header(packet: &mut [u8]) {
    let header = etherparse::Ipv4Header::from_slice(packet).unwrap().0;
    packet[10..12].copy_from_slice(&header.calc_header_checksum().to_be_bytes());
}

#[test]
fn fragments_and_what_has_no_checksum_pass_as_they_are() {
    let flow = |is_v6| Flow { is_v6, is_tcp: false, port: 5 };
    let numbered = |is_v6, identification| {
        let says = Says { sequence: 1, identification, flag: 0, timestamp: None };
        packet(flow(is_v6), says, &payload(100, 1))
    };
    let whole = [1, 2, 3].map(|number| numbered(false, number)).to_vec();
    assert_eq!(merged_and_cut(&whole, Offload::TcpAndUdp), (1, whole.clone()));
    let mut fragments = whole.clone();
    for fragment in &mut fragments {
        fragment[6] = 0x20;
        seal_header(fragment);
    }
    assert_eq!(merged_and_cut(&fragments, Offload::TcpAndUdp), (3, fragments.clone()));
    // What follows a fragment does not overtake it.
    let mixed = vec![whole[0].clone(), fragments[1].clone(), whole[1].clone()];
    assert_eq!(merged_and_cut(&mixed, Offload::TcpAndUdp), (3, mixed));
    let mut no_checksums = vec![numbered(true, 0); 2];
    no_checksums.iter_mut().for_each(|packet| packet[46..48].fill(0));
    assert_eq!(merged_and_cut(&no_checksums, Offload::TcpAndUdp), (2, no_checksums));
    let mut damaged = whole;
    damaged[1][10] ^= 1;
    assert_eq!(merged_and_cut(&damaged, Offload::TcpAndUdp), (3, damaged));
}
