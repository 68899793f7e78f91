//! What each stage of the data path does on one core: `make stages`.

use std::hint::black_box;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use gambeson_tunnel::internals::{HEADER_LEN, Merger, Routes, pair, split};
use gambeson_tunnel::{Batch, Datagram, Device, Origin, Outbox};

/// Of a packet through a tunnel over an underlay of 1,500 bytes, bytes.
const PACKET: usize = 1440;
/// Headers of IPv4 and TCP, without options, bytes.
const HEADERS: usize = 40;
/// Packets of a super-packet.
const PACKETS: usize = 46;

/// A segment of TCP over IPv4 from 10.0.0.0 to .1, all but its payload's checksum right.
fn segment(sequence: u32, len: usize) -> Vec<u8> {
    let mut packet = vec![0; len];
    packet[..4].copy_from_slice(&[0x45, 0, (len >> 8) as u8, len as u8]);
    packet[6..10].copy_from_slice(&[0x40, 0, 64, 6]);
    packet[12..20].copy_from_slice(&[10, 0, 0, 0, 10, 0, 0, 1]);
    let sum: u32 = packet[..20].chunks(2).map(|w| u32::from(w[0]) << 8 | u32::from(w[1])).sum();
    let sum = !((sum & 0xffff) + (sum >> 16)) as u16;
    packet[10..12].copy_from_slice(&sum.to_be_bytes());
    packet[20..24].copy_from_slice(&[0, 80, 0, 81]);
    packet[24..28].copy_from_slice(&sequence.to_be_bytes());
    packet[32..34].copy_from_slice(&[0x50, 0x10]);
    packet
}

/// A super-packet of [`PACKETS`], with its header (`struct virtio_net_hdr`).
fn super_packet() -> ([u8; HEADER_LEN], Vec<u8>) {
    let size = (PACKET - HEADERS) as u16;
    let mut header = [0; HEADER_LEN];
    // NEEDS_CSUM, TCPV4; lengths in the order of the host.
    header[..2].copy_from_slice(&[1, 1]);
    for (at, value) in [(2, HEADERS as u16), (4, size), (6, 20), (8, 16)] {
        header[at..at + 2].copy_from_slice(&value.to_ne_bytes());
    }
    (header, segment(1, HEADERS + PACKETS * usize::from(size)))
}

fn segments() -> Vec<Vec<u8>> {
    let step = (PACKET - HEADERS) as u32;
    (0..PACKETS as u32).map(|number| segment(1 + number * step, PACKET)).collect()
}

/// Two devices with a session, the first of them the one to seal.
fn devices() -> [Device; 2] {
    let devices = pair(PACKET);
    let mut batch = Batch::new();
    batch.push(&segment(1, PACKET));
    let [mut there, mut back] = [(); 2].map(|()| Outbox::new());
    devices[0].seal(&batch, &mut there);
    for _ in 0..2 {
        pass(&devices[1], &there, &mut back);
        there.clear();
        pass(&devices[0], &back, &mut there);
        back.clear();
    }
    devices
}

/// Lets a device receive what is in an outbox, handshakes included. Returns the packets' count.
fn pass(to: &Device, outbox: &Outbox, answers: &mut Outbox) -> usize {
    let mut bytes: Vec<_> = outbox.datagrams().map(|(bytes, _)| bytes.to_vec()).collect();
    open(to, &mut bytes, answers)
}

fn open(device: &Device, datagrams: &mut [Vec<u8>], answers: &mut Outbox) -> usize {
    let from = SocketAddr::from(([192, 0, 2, 1], 9));
    let origin = Origin { from, to: None, ecn: 0 };
    let datagrams = datagrams.iter_mut().map(|bytes| Datagram { bytes, origin: &origin });
    let (mut packets, mut handshakes) = (Vec::with_capacity(PACKETS), Vec::new());
    device.open(datagrams, &mut packets, answers, |message| handshakes.push(message));
    let count = packets.len();
    handshakes.into_iter().for_each(|message| device.answer(message, answers));
    count
}

fn stages(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("stages");
    group.throughput(Throughput::Bytes((PACKETS * PACKET) as u64));

    let (header, packet) = super_packet();
    let mut out = vec![0; 2 * PACKETS * PACKET];
    assert_eq!(split(&header, &packet, &mut out).map(|lengths| lengths.len()), Some(PACKETS));
    group.bench_function("split", |b| b.iter(|| split(&header, black_box(&packet), &mut out)));

    let segments = segments();
    let packets: Vec<&[u8]> = segments.iter().map(Vec::as_slice).collect();
    let mut merger = Merger::default();
    assert_eq!(merger.group(&packets), 1);
    group.bench_function("coalesce", |b| b.iter(|| merger.group(black_box(&packets))));

    let [sealer, opener] = devices();
    let mut batch = Batch::new();
    segments.iter().for_each(|segment| batch.push(segment));
    let mut outbox = Outbox::new();
    let mut seal = || {
        outbox.clear();
        sealer.seal(&batch, &mut outbox);
        assert_eq!(outbox.datagrams().count(), PACKETS);
        outbox.datagrams().map(|(bytes, _)| bytes.to_vec()).collect::<Vec<_>>()
    };
    assert_eq!(open(&opener, &mut seal(), &mut Outbox::new()), PACKETS);
    let mut answers = Outbox::new();
    group.bench_function("open", |b| {
        let open = |mut sealed: Vec<Vec<u8>>| {
            answers.clear();
            assert_eq!(open(&opener, &mut sealed, &mut answers), PACKETS);
            sealed
        };
        b.iter_batched(&mut seal, open, BatchSize::SmallInput);
    });
    let mut outbox = Outbox::new();
    group.bench_function("seal", |b| {
        b.iter(|| {
            outbox.clear();
            sealer.seal(black_box(&batch), &mut outbox);
        });
    });
    group.finish();

    let prefixes = (0..10_000u32).map(|n| (Ipv4Addr::from(10 << 24 | n << 8), n));
    let prefixes = prefixes.filter_map(|(ip, n)| Some((format!("{ip}/24").parse().ok()?, n)));
    let routes = Routes::new(prefixes);
    let mut address = 10 << 24;
    assert_eq!(routes.lookup(IpAddr::from([10, 1, 2, 3])), Some(258));
    criterion.bench_function("route, of 10,000 prefixes", |b| {
        b.iter(|| {
            address = (10 << 24) + (address + 7919 * 256) % (10_000 << 8);
            routes.lookup(black_box(Ipv4Addr::from(address).into()))
        });
    });
}

criterion_group!(benches, stages);
criterion_main!(benches);
