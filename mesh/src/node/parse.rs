//! `NodeRecord -> Node`, with every value checked.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use gambeson_keys::{Generation, PublicKey, SecretId, SecretIdError};
use ipnet::IpNet;

use super::{
    DEFAULT_PORT, Endpoints, Local, MAX_PORT, Node, NodeRecord, Refusal, Transport, Vteps,
    annotation, excerpt,
};
use crate::family::Family;
use crate::mac::{Mac, MacError};

/// Longest value that is looked at, in bytes. The longest valid one is a list of transports.
const LONGEST: usize = 256;
/// Most pod CIDRs of a node. Kubernetes gives one per family.
const MOST_POD_CIDRS: usize = 16;
/// Smallest MTU that is believed: what every IPv4 host must be able to receive (RFC 791).
const SMALLEST_MTU: u32 = 576;
/// Largest MTU of a route (`ip_metrics_convert` in net/ipv4/metrics.c).
pub(crate) const LARGEST_MTU: u32 = 65_535 - 15;

impl Node {
    /// Reads a Node's record, as its own agent has written it.
    pub(super) fn parse_own(record: &NodeRecord, local: &Local) -> Result<Self, Refusal> {
        let values = Values { annotations: &record.annotations, prefix: &local.prefix };
        let others = [annotation::CONFIG, annotation::FLANNEL];
        let is_own = |name: &String| !others.iter().any(|other| name.starts_with(other));
        if !record.annotations.keys().any(is_own) {
            return Err(Refusal::NoKey);
        }
        let public_key = values
            .public_key(annotation::PUBLIC_KEY)?
            .ok_or_else(|| Refusal::Missing { annotation: values.key(annotation::PUBLIC_KEY) })?;
        let mut ignored = Vec::new();
        let generation = values
            .number(annotation::KEY_GENERATION, "not a whole number from 0 to 2^64-1")?
            .map(Generation::new)
            .ok_or_else(|| Refusal::Missing {
                annotation: values.key(annotation::KEY_GENERATION),
            })?;
        Ok(Self {
            name: record.name.clone(),
            uid: record.uid.clone(),
            created: record.created,
            generation,
            public_key: Some(public_key),
            next_public_key: values.next_public_key(generation, public_key)?,
            secret: values.secret(annotation::PSK_ID)?,
            next_secret: values.secret(annotation::NEXT_PSK_ID)?,
            endpoints: values.endpoints(&local.cluster_networks, &mut ignored)?,
            port: values.port()?,
            transports: values.transports()?,
            vteps: Vteps {
                v4: values.mac(annotation::VTEP_MAC)?,
                v6: values.mac(annotation::VTEP_MAC_V6)?,
            },
            mtu: values.mtu()?,
            persistent_keepalive: option(persistent_keepalive(record, &local.prefix), &mut ignored),
            pod_cidrs: pod_cidrs(record, &local.cluster_networks)?,
            flannel: false,
            ignored,
        })
    }
}

/// What an operator set, or nothing when it cannot be used: a typing error costs the option.
fn option<T>(value: Result<Option<T>, Refusal>, ignored: &mut Vec<Refusal>) -> Option<T> {
    value.unwrap_or_else(|problem| {
        ignored.push(problem);
        None
    })
}

/// Seconds between keepalives that an operator set on a Node.
pub(crate) fn persistent_keepalive(
    record: &NodeRecord,
    prefix: &str,
) -> Result<Option<u16>, Refusal> {
    let values = Values { annotations: &record.annotations, prefix };
    let name = annotation::CONFIG_PERSISTENT_KEEPALIVE;
    if values.text(name)? == Some("off") {
        return Ok(None);
    }
    let seconds = values.number::<u16>(name, "not a number of seconds from 0 to 65535, or off")?;
    Ok(seconds.filter(|seconds| *seconds != 0))
}

/// The request for a new key that an operator set on a Node.
pub(crate) fn rotate<'a>(
    record: &'a NodeRecord,
    prefix: &'a str,
) -> Result<Option<&'a str>, Refusal> {
    let values = Values { annotations: &record.annotations, prefix };
    Ok(values.text(annotation::CONFIG_ROTATE)?.filter(|text| !text.is_empty()))
}

/// The pod CIDRs of a Node, this one or another: inside the cluster networks and disjoint.
/// Those of a family that the cluster networks do not have are left out.
///
/// # Errors
/// [`Refusal::NoPodCidr`] while none is assigned, and whatever is wrong with one.
pub fn pod_cidrs(
    record: &NodeRecord,
    cluster_networks: &BTreeSet<IpNet>,
) -> Result<BTreeSet<IpNet>, Refusal> {
    if record.pod_cidrs.is_empty() {
        return Err(Refusal::NoPodCidr);
    }
    if record.pod_cidrs.len() > MOST_POD_CIDRS {
        return Err(Refusal::TooManyPodCidrs { count: record.pod_cidrs.len() });
    }
    let mut cidrs = BTreeSet::new();
    for text in &record.pod_cidrs {
        let cidr = pod_cidr(text)?;
        let same = |network: &&IpNet| Family::of_net(network) == Family::of_net(&cidr);
        let mut family = cluster_networks.iter().filter(same).peekable();
        if family.peek().is_none() {
            continue;
        }
        if !family.any(|n| n.contains(&cidr) && n.prefix_len() < cidr.prefix_len()) {
            return Err(Refusal::PodCidrOutside { cidr, networks: join(cluster_networks) });
        }
        if cidrs.iter().any(|other| overlap(other, &cidr) && *other != cidr) {
            let problem = "overlaps another pod CIDR of the same Node";
            return Err(Refusal::PodCidr { value: excerpt(text), problem });
        }
        cidrs.insert(cidr);
    }
    if cidrs.is_empty() {
        return Err(Refusal::NoPodCidrInUse { networks: join(cluster_networks) });
    }
    Ok(cidrs)
}

/// Whether two prefixes have an address in common.
pub fn overlap(a: &IpNet, b: &IpNet) -> bool {
    a.contains(b) || b.contains(a)
}

fn pod_cidr(text: &str) -> Result<IpNet, Refusal> {
    let refuse = |problem| Refusal::PodCidr { value: excerpt(text), problem };
    let cidr = if text.len() > LONGEST { None } else { IpNet::from_str(text).ok() };
    let cidr = cidr.ok_or_else(|| refuse("is not an address and prefix length"))?;
    if cidr != cidr.trunc() {
        return Err(refuse("has bits set after the prefix"));
    }
    Ok(cidr)
}

fn join(networks: &BTreeSet<IpNet>) -> String {
    networks.iter().map(IpNet::to_string).collect::<Vec<_>>().join(", ")
}

pub(super) struct Values<'a> {
    pub(super) annotations: &'a BTreeMap<String, String>,
    pub(super) prefix: &'a str,
}

impl<'a> Values<'a> {
    /// The whole key, for a message.
    fn key(&self, annotation: &str) -> String {
        annotation::key(self.prefix, annotation)
    }

    pub(super) fn text(&self, annotation: &'static str) -> Result<Option<&'a str>, Refusal> {
        match self.annotations.get(annotation) {
            Some(text) if text.len() > LONGEST => {
                Err(Refusal::TooLong { annotation: self.key(annotation), limit: LONGEST })
            }
            other => Ok(other.map(String::as_str)),
        }
    }

    /// A decimal number spelled as it would be printed: no sign, no leading zero.
    fn number<T>(
        &self,
        annotation: &'static str,
        problem: &'static str,
    ) -> Result<Option<T>, Refusal>
    where
        T: FromStr + ToString,
    {
        let Some(text) = self.text(annotation)? else { return Ok(None) };
        match text.parse::<T>() {
            Ok(number) if number.to_string() == text => Ok(Some(number)),
            _ => Err(Refusal::Value {
                annotation: self.key(annotation),
                value: excerpt(text),
                problem,
            }),
        }
    }

    fn public_key(&self, annotation: &'static str) -> Result<Option<PublicKey>, Refusal> {
        let Some(text) = self.text(annotation)? else { return Ok(None) };
        match text.parse() {
            Ok(key) => Ok(Some(key)),
            Err(source) => {
                Err(Refusal::Key { annotation: self.key(annotation), value: excerpt(text), source })
            }
        }
    }

    fn secret(&self, annotation: &'static str) -> Result<Option<SecretId>, Refusal> {
        let Some(text) = self.text(annotation)? else { return Ok(None) };
        let id = text.parse().map_err(|SecretIdError| Refusal::Value {
            annotation: self.key(annotation),
            value: excerpt(text),
            problem: "not 16 hexadecimal digits",
        })?;
        Ok(Some(id))
    }

    fn next_public_key(
        &self,
        generation: Generation,
        current: PublicKey,
    ) -> Result<Option<PublicKey>, Refusal> {
        let annotation = annotation::NEXT_PUBLIC_KEY;
        let Some(next) = self.public_key(annotation)? else { return Ok(None) };
        let refuse = |problem| Refusal::Value {
            annotation: self.key(annotation),
            value: next.to_string(),
            problem,
        };
        if next == current {
            return Err(refuse("the same as public-key"));
        }
        if generation.next().is_none() {
            return Err(refuse("after the last possible key-generation"));
        }
        Ok(Some(next))
    }

    /// An operator's endpoint wins over the published one of its family; both are checked.
    fn endpoints(
        &self,
        cluster_networks: &BTreeSet<IpNet>,
        ignored: &mut Vec<Refusal>,
    ) -> Result<Endpoints, Refusal> {
        let v4 = |name| self.endpoint_v4(name, cluster_networks);
        let v6 = |name| self.endpoint_v6(name, cluster_networks);
        let (published_v4, published_v6) =
            (v4(annotation::ENDPOINT)?, v6(annotation::ENDPOINT_V6)?);
        let endpoints = Endpoints {
            v4: option(v4(annotation::CONFIG_ENDPOINT), ignored).or(published_v4),
            v6: option(v6(annotation::CONFIG_ENDPOINT_V6), ignored).or(published_v6),
        };
        if endpoints == Endpoints::default() { Err(Refusal::NoEndpoint) } else { Ok(endpoints) }
    }

    pub(super) fn endpoint_v4(
        &self,
        annotation: &'static str,
        cluster_networks: &BTreeSet<IpNet>,
    ) -> Result<Option<Ipv4Addr>, Refusal> {
        self.endpoint(annotation, cluster_networks, problem_v4)
    }

    pub(super) fn endpoint_v6(
        &self,
        annotation: &'static str,
        cluster_networks: &BTreeSet<IpNet>,
    ) -> Result<Option<Ipv6Addr>, Refusal> {
        self.endpoint(annotation, cluster_networks, problem_v6)
    }

    fn endpoint<A>(
        &self,
        annotation: &'static str,
        cluster_networks: &BTreeSet<IpNet>,
        problem: fn(Result<A, std::net::AddrParseError>) -> Result<A, &'static str>,
    ) -> Result<Option<A>, Refusal>
    where
        A: FromStr<Err = std::net::AddrParseError> + Copy + Into<std::net::IpAddr>,
    {
        let Some(text) = self.text(annotation)? else { return Ok(None) };
        let address = problem(text.parse()).map_err(|problem| Refusal::Value {
            annotation: self.key(annotation),
            value: excerpt(text),
            problem,
        })?;
        let ip = address.into();
        match cluster_networks.iter().find(|network| network.contains(&ip)) {
            Some(network) => Err(Refusal::EndpointInPodNetwork {
                annotation: self.key(annotation),
                address: ip,
                network: *network,
            }),
            None => Ok(Some(address)),
        }
    }

    fn port(&self) -> Result<u16, Refusal> {
        let (annotation, problem) = (annotation::PORT, "not a base port from 1 to 65529");
        match self.number::<u16>(annotation, problem)? {
            None => Ok(DEFAULT_PORT),
            Some(port) if (1..=MAX_PORT).contains(&port) => Ok(port),
            Some(port) => Err(Refusal::Value {
                annotation: self.key(annotation),
                value: port.to_string(),
                problem,
            }),
        }
    }

    /// Names of transports that a later version may know are left out; what could not be a
    /// name is refused.
    fn transports(&self) -> Result<BTreeSet<Transport>, Refusal> {
        let annotation = annotation::TRANSPORTS;
        let Some(text) = self.text(annotation)? else {
            return Ok(BTreeSet::from([Transport::Wireguard]));
        };
        let is_name = |name: &str| {
            let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
            !name.is_empty() && name.bytes().all(plain)
        };
        if !text.split(',').all(is_name) {
            let problem = "not a list such as wireguard,vxlan";
            return Err(Refusal::Value {
                annotation: self.key(annotation),
                value: excerpt(text),
                problem,
            });
        }
        Ok(text.split(',').filter_map(Transport::parse).collect())
    }

    fn mac(&self, annotation: &'static str) -> Result<Option<Mac>, Refusal> {
        let Some(text) = self.text(annotation)? else { return Ok(None) };
        let mac = text.parse().map_err(|_: MacError| Refusal::Value {
            annotation: self.key(annotation),
            value: excerpt(text),
            problem: "not an Ethernet address of one device",
        })?;
        Ok(Some(mac))
    }

    fn mtu(&self) -> Result<Option<u32>, Refusal> {
        let (annotation, problem) = (annotation::MTU, "not a number of bytes from 576 to 65520");
        match self.number::<u32>(annotation, problem)? {
            Some(mtu) if !(SMALLEST_MTU..=LARGEST_MTU).contains(&mtu) => Err(Refusal::Value {
                annotation: self.key(annotation),
                value: mtu.to_string(),
                problem,
            }),
            mtu => Ok(mtu),
        }
    }
}

fn problem_v4<E>(parsed: Result<Ipv4Addr, E>) -> Result<Ipv4Addr, &'static str> {
    let address = parsed.map_err(|_| "not an IPv4 address")?;
    if address.octets()[0] == 0 {
        Err("an unspecified address")
    } else if address.is_loopback() {
        Err("a loopback address")
    } else if address.is_multicast() {
        Err("a multicast address")
    } else if address.is_broadcast() {
        Err("the broadcast address")
    } else {
        Ok(address)
    }
}

fn problem_v6<E>(parsed: Result<Ipv6Addr, E>) -> Result<Ipv6Addr, &'static str> {
    let address = parsed.map_err(|_| "not an IPv6 address")?;
    if address.is_unspecified() {
        Err("the unspecified address")
    } else if address.is_loopback() {
        Err("the loopback address")
    } else if address.is_multicast() {
        Err("a multicast address")
    } else if address.is_unicast_link_local() {
        Err("a link-local address, which means nothing without an interface")
    } else if address.to_ipv4().is_some() {
        Err("an IPv4 address in IPv6 form")
    } else {
        Ok(address)
    }
}
