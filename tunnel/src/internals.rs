//! What benchmarks and fuzz targets need of the inside (feature `internals`). No promise is made
//! about it.

use std::io::{self, Read, Write};
use std::net::IpAddr;

use ipnet::IpNet;
use nix::errno::Errno;

use crate::allowed_ips::AllowedIps;
use crate::batch::Outbox;
use crate::device::{Device, DeviceUpdate};
use crate::offload::{Coalescer, Header, Offload, Split};
use crate::uapi::{self, Configurable};

/// Of the header that comes before each packet of a TUN device (`struct virtio_net_hdr`), bytes.
pub const HEADER_LEN: usize = crate::offload::HEADER_LEN;

/// Cuts a packet as its header says, into `out`, back to back. Returns the packets' lengths, or
/// `None` if header and packet do not agree, or `out` is too short.
pub fn split(header: &[u8; HEADER_LEN], packet: &[u8], out: &mut [u8]) -> Option<Vec<usize>> {
    let split = Split::of(&Header::read(header)?, packet)?;
    let mut lengths = Vec::with_capacity(split.count());
    let mut used = 0;
    for number in 0..split.count() {
        let len = split.len(number);
        split.write(number, out.get_mut(used..used + len)?);
        lengths.push(len);
        used += len;
    }
    Some(lengths)
}

/// Merges neighbours of a flow, as they are written to a TUN device.
#[derive(Debug, Default)]
pub struct Merger(Coalescer);

/// A packet for a TUN device, with its header, and how many packets it is made of.
#[derive(Debug)]
pub struct Merged {
    /// The header.
    pub header: [u8; HEADER_LEN],
    /// The packet.
    pub bytes: Vec<u8>,
    /// How many packets it was.
    pub count: usize,
}

impl Merger {
    /// How many packets are left of these, after grouping alone.
    pub fn group(&mut self, packets: &[&[u8]]) -> usize {
        self.0.group(packets, Offload::TcpAndUdp);
        self.0.groups().len()
    }

    /// Merges packets.
    pub fn merge(&mut self, packets: &[&[u8]]) -> Vec<Merged> {
        self.0.group(packets, Offload::TcpAndUdp);
        let groups = self.0.groups().iter().map(|group| {
            let members: Vec<_> = self.0.members(group).filter_map(|n| packets.get(n)).collect();
            let count = members.len();
            match group.merged(packets) {
                Some(merged) => {
                    let payloads = members.iter().filter_map(|packet| merged.payload(packet));
                    let bytes = std::iter::once(merged.bytes()).chain(payloads).flatten();
                    Merged { header: merged.header.write(), bytes: bytes.copied().collect(), count }
                }
                None => {
                    let bytes = members.iter().flat_map(|packet| packet.iter()).copied().collect();
                    Merged { header: Header::default().write(), bytes, count }
                }
            }
        });
        groups.collect()
    }
}

/// The table of allowed IPs.
#[derive(Debug)]
pub struct Routes(AllowedIps<u32>);

impl Routes {
    /// Of prefixes and their owners.
    pub fn new(prefixes: impl IntoIterator<Item = (IpNet, u32)>) -> Self {
        Self(AllowedIps::new(prefixes))
    }

    /// The owner of the longest prefix around an address.
    pub fn lookup(&self, address: IpAddr) -> Option<u32> {
        self.0.lookup(address)
    }
}

/// Two devices that are up and know each other: number n has the address 192.0.2.n and the
/// packets to 10.0.0.n.
pub fn pair(mtu: usize) -> [Device; 2] {
    // Keys of 32 bytes of 1 and of 2, and their public keys.
    let public = [
        "a4e09292b651c278b9772c569f5fa9bb13d906b46ab68c9df9dc2b4409f8a209",
        "ce8d3ad1ccb633ec7b70c17814a5c76ecd029685050d344745ba05870e587d59",
    ];
    [0, 1].map(|number| {
        let device = Device::new(mtu);
        let (private, other) = (["01", "02"][number].repeat(32), 1 - number);
        let request = format!(
            "set=1\nprivate_key={private}\npublic_key={}\nendpoint=192.0.2.{other}:9\n\
             allowed_ip=10.0.0.{other}/32\n\n",
            public[other]
        );
        configure(&device, request.as_bytes());
        device.set_up(true, &mut Outbox::new());
        device
    })
}

/// What the configuration protocol answers for a device without sockets.
pub fn configure(device: &Device, request: &[u8]) -> Vec<u8> {
    let mut client = Client { request, answer: Vec::new() };
    // It ends with an error where a line is too long.
    let _ = uapi::serve(&mut client, &Bare(device));
    client.answer
}

struct Client<'a> {
    request: &'a [u8],
    answer: Vec<u8>,
}

impl Read for Client<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.request.read(buffer)
    }
}

impl Write for Client<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.answer.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

struct Bare<'d>(&'d Device);

impl Configurable for Bare<'_> {
    fn device(&self) -> &Device {
        self.0
    }

    fn listen_port(&self) -> u16 {
        0
    }

    fn fwmark(&self) -> u32 {
        0
    }

    fn set(&self, update: &DeviceUpdate) -> Result<(), Errno> {
        self.0.apply(update, &mut Outbox::new());
        Ok(())
    }
}
