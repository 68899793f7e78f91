//! Nodes that Flannel drives, and how this one looks to them: Flannel's own annotations, to the
//! byte, for a cluster that moves from one to the other (`--flannel-compat`).
//!
//! A Node whose two sets of annotations do not agree was Gambeson's and is Flannel's again.

use std::collections::BTreeSet;

use gambeson_keys::{Generation, PublicKey};
use serde::{Deserialize, Serialize};

use super::annotation::{self, flannel};
use super::parse::{Values, pod_cidrs};
use super::{Endpoints, Local, Node, NodeRecord, Refusal, Transport, Vteps, excerpt};
use crate::family::Family;
use crate::mac::Mac;
use crate::session::Session;

/// Bytes that Flannel takes off for WireGuard, over either family.
const WIREGUARD_OVERHEAD: u32 = 80;

/// `backend-data` of vxlan.
#[derive(Debug, Serialize, Deserialize)]
struct VxlanData {
    #[serde(rename = "VNI")]
    vni: u32,
    #[serde(rename = "VtepMAC")]
    mac: Mac,
}

/// `backend-data` of wireguard.
#[derive(Debug, Serialize, Deserialize)]
struct WireguardData {
    #[serde(rename = "PublicKey")]
    public_key: String,
    #[serde(rename = "Port", default)]
    port: Option<u16>,
}

/// Whether Flannel drives the Node by now.
pub(super) fn drives(record: &NodeRecord) -> bool {
    let text = |name: &str| record.annotations.get(name).map(String::as_str);
    let Some(kind) = text(flannel::BACKEND_TYPE) else { return false };
    let Some(key) = text(annotation::PUBLIC_KEY) else { return true };
    let data = text(flannel::BACKEND_DATA).or(text(flannel::BACKEND_V6_DATA)).unwrap_or_default();
    match Transport::parse(kind) {
        Some(Transport::Vxlan) => serde_json::from_str(data).is_ok_and(|data: VxlanData| {
            let ours = [annotation::VTEP_MAC, annotation::VTEP_MAC_V6].map(text);
            !ours.contains(&Some(data.mac.to_string().as_str()))
        }),
        Some(Transport::Wireguard) => {
            serde_json::from_str(data).is_ok_and(|data: WireguardData| data.public_key != key)
        }
        // They have nothing of their own to compare.
        Some(Transport::HostGw) | None => false,
    }
}

/// Reads the record of a Node that Flannel drives.
pub(super) fn parse(record: &NodeRecord, local: &Local) -> Result<Node, Refusal> {
    let values = Values { annotations: &record.annotations, prefix: &local.prefix };
    let refuse = |annotation: &'static str, problem| Refusal::Value {
        annotation: annotation::key(&local.prefix, annotation),
        value: record.annotations.get(annotation).map(|text| excerpt(text)).unwrap_or_default(),
        problem,
    };
    let kind = values.text(flannel::BACKEND_TYPE)?.and_then(Transport::parse);
    let problem = "not vxlan, host-gw or wireguard";
    let kind = kind.ok_or_else(|| refuse(flannel::BACKEND_TYPE, problem))?;
    let mut node = Node {
        name: record.name.clone(),
        uid: record.uid.clone(),
        created: record.created,
        pod_cidrs: pod_cidrs(record, &local.cluster_networks)?,
        generation: Generation::FIRST,
        public_key: None,
        next_public_key: None,
        secret: None,
        next_secret: None,
        endpoints: endpoints(&values, local)?,
        port: local.port,
        transports: BTreeSet::from([kind]),
        vteps: Vteps::default(),
        mtu: None,
        persistent_keepalive: None,
        flannel: true,
        ignored: Vec::new(),
    };
    match kind {
        Transport::Vxlan => {
            let mac = |name| {
                let Some(text) = values.text(name)? else { return Ok(None) };
                let problem = "not a VNI and a VtepMAC";
                let data: VxlanData =
                    serde_json::from_str(text).map_err(|_| refuse(name, problem))?;
                if data.vni != local.vxlan.vni {
                    return Err(refuse(name, "of another VNI than Backend.VNI here"));
                }
                Ok(Some(data.mac))
            };
            node.vteps =
                Vteps { v4: mac(flannel::BACKEND_DATA)?, v6: mac(flannel::BACKEND_V6_DATA)? };
        }
        Transport::Wireguard => {
            let name = match record.annotations.contains_key(flannel::BACKEND_DATA) {
                true => flannel::BACKEND_DATA,
                false => flannel::BACKEND_V6_DATA,
            };
            let data = serde_json::from_str(values.text(name)?.unwrap_or_default());
            let problem = "not a PublicKey and a Port";
            let data: WireguardData = data.map_err(|_| refuse(name, problem))?;
            node.public_key = Some(data.public_key.parse().map_err(|_| refuse(name, problem))?);
            node.port = data.port.unwrap_or(local.port);
            node.mtu = Some(local.underlay_mtu.saturating_sub(WIREGUARD_OVERHEAD));
        }
        Transport::HostGw => {}
    }
    Ok(node)
}

fn endpoints(values: &Values<'_>, local: &Local) -> Result<Endpoints, Refusal> {
    let networks = &local.cluster_networks;
    let v4 = |name| values.endpoint_v4(name, networks);
    let v6 = |name| values.endpoint_v6(name, networks);
    let endpoints = Endpoints {
        v4: v4(flannel::PUBLIC_IP_OVERWRITE)?.or(v4(flannel::PUBLIC_IP)?),
        v6: v6(flannel::PUBLIC_IPV6_OVERWRITE)?.or(v6(flannel::PUBLIC_IPV6)?),
    };
    if endpoints == Endpoints::default() { Err(Refusal::NoEndpoint) } else { Ok(endpoints) }
}

/// What a node publishes for those that Flannel drives, where their backend is `kind`.
pub(super) fn published(local: &Local, kind: Transport) -> Vec<(&'static str, Option<String>)> {
    let data = |family| {
        let has_pods = local.pod_cidrs.iter().any(|cidr| Family::of_net(cidr) == family);
        local.endpoints.get(family).filter(|_| has_pods)?;
        match kind {
            Transport::Vxlan => {
                let data = VxlanData { vni: local.vxlan.vni, mac: local.vteps.get(family)? };
                serde_json::to_string(&data).ok()
            }
            Transport::HostGw => Some("null".to_owned()),
            Transport::Wireguard => {
                let (generation, key) = local.current_key()?;
                let session = Session::between(generation, Generation::FIRST);
                let port = session.port(local.port);
                let data = WireguardData { public_key: PublicKey::to_string(&key), port };
                serde_json::to_string(&data).ok()
            }
        }
    };
    let (v4, v6) = (data(Family::V4), data(Family::V6));
    let text = |text: &str| Some(text.to_owned());
    vec![
        (flannel::KUBE_SUBNET_MANAGER, text("true")),
        (flannel::BACKEND_TYPE, text(kind.as_str())),
        (flannel::PUBLIC_IP, local.endpoints.v4.filter(|_| v4.is_some()).map(|ip| ip.to_string())),
        (flannel::BACKEND_DATA, v4),
        (
            flannel::PUBLIC_IPV6,
            local.endpoints.v6.filter(|_| v6.is_some()).map(|ip| ip.to_string()),
        ),
        (flannel::BACKEND_V6_DATA, v6),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixtures::{key, local, record};
    use crate::pair;

    fn compatible(i: u8, kind: Transport) -> Local {
        Local { flannel: Some(kind), transports: [kind].into(), ..local(i, 0) }
    }

    /// A Node that has never seen Gambeson.
    fn flannels(i: u8, kind: Transport) -> NodeRecord {
        let mut record = record(&compatible(i, kind));
        record.annotations.retain(|name, _| name.starts_with(annotation::FLANNEL));
        record
    }

    fn text<'a>(record: &'a NodeRecord, name: &str) -> &'a str {
        &record.annotations[name]
    }

    #[test]
    fn what_is_published_is_flannels_to_the_byte() {
        let record = flannels(2, Transport::Vxlan);
        assert_eq!(text(&record, "flannel/kube-subnet-manager"), "true");
        assert_eq!(text(&record, "flannel/backend-type"), "vxlan");
        let data = r#"{"VNI":1,"VtepMAC":"0a:58:0a:f4:02:00"}"#;
        assert_eq!(text(&record, "flannel/backend-data"), data);
        assert_eq!(text(&record, "flannel/backend-v6-data"), data);
        assert_eq!(text(&record, "flannel/public-ip"), "192.168.240.2");
        assert_eq!(text(&record, "flannel/public-ipv6"), "fd00:240::2");
        assert_eq!(text(&flannels(2, Transport::HostGw), "flannel/backend-data"), "null");
        let data = format!(r#"{{"PublicKey":"{}","Port":51820}}"#, key(2));
        assert_eq!(text(&flannels(2, Transport::Wireguard), "flannel/backend-data"), data);
        assert!(!record_without_compat().annotations.keys().any(|name| name.contains("flannel")));
    }

    fn record_without_compat() -> NodeRecord {
        record(&local(2, 0))
    }

    #[test]
    fn a_node_of_flannel_is_a_peer_by_its_backend_alone() {
        for kind in Transport::ALL {
            let theirs = flannels(2, kind);
            let mut own = Local { transports: Transport::ALL.into(), ..compatible(1, kind) };
            own.on_link = local(2, 0).endpoints.addresses().collect();
            let node = Node::parse(&theirs, &own).unwrap();
            assert_eq!(pair::transport(&own, &node), Ok(kind));
            assert_eq!(node.public_key, (kind == Transport::Wireguard).then_some(key(2)));
            let strict = Local { flannel: None, ..own };
            assert_eq!(Node::parse(&theirs, &strict), Err(Refusal::NoKey), "only when asked to");
        }
    }

    #[test]
    fn a_node_that_flannel_took_back_is_flannels() {
        let own = compatible(1, Transport::Vxlan);
        let both = record(&compatible(2, Transport::Vxlan));
        assert!(!Node::parse(&both, &own).unwrap().flannel);
        let mut taken = both.clone();
        let data = r#"{"VNI":1,"VtepMAC":"2a:00:00:00:00:02"}"#;
        taken.annotations.insert(flannel::BACKEND_DATA.to_owned(), data.to_owned());
        let node = Node::parse(&taken, &own).unwrap();
        assert!(node.flannel);
        assert_eq!(node.vteps.v4.unwrap().to_string(), "2a:00:00:00:00:02");
    }

    #[test]
    fn what_cannot_be_flannels_is_refused_by_name() {
        for (kind, name, value, says) in [
            (Transport::Vxlan, "flannel/backend-type", "udp", "backend-type is \"udp\""),
            (Transport::Vxlan, "flannel/backend-data", "{", "not a VNI and a VtepMAC"),
            (
                Transport::Vxlan,
                "flannel/backend-data",
                r#"{"VNI":2,"VtepMAC":"0a:58:0a:f4:02:00"}"#,
                "another VNI",
            ),
            (Transport::Vxlan, "flannel/public-ip", "10.244.0.1", "inside the cluster network"),
            (Transport::Wireguard, "flannel/backend-data", "null", "not a PublicKey"),
        ] {
            let mut theirs = flannels(2, kind);
            theirs.annotations.insert(name.to_owned(), value.to_owned());
            let error = Node::parse(&theirs, &compatible(1, kind)).unwrap_err().to_string();
            assert!(error.contains(says) && error.contains("flannel.alpha."), "{error}");
        }
    }

    #[test]
    fn flannels_wireguard_has_one_port_whatever_our_generation() {
        let own = Local { flannel: Some(Transport::Wireguard), ..local(1, 1) };
        let mut theirs = flannels(2, Transport::Wireguard);
        let data = format!(r#"{{"PublicKey":"{}","Port":51999}}"#, key(2));
        theirs.annotations.insert(flannel::BACKEND_DATA.to_owned(), data);
        let records = crate::fixtures::records(&[theirs]);
        let mesh = crate::topology::Topology::new().resolve(&own, &records);
        let desired = crate::transport::desired(&mesh, &own, &Default::default());
        let device = desired.devices.values().find(|device| device.peers.contains_key(&key(2)));
        let device = device.unwrap();
        assert_eq!(device.peers[&key(2)].endpoint.port(), 51999);
        let published = published(&own, Transport::Wireguard);
        let (_, data) = published.iter().find(|(name, _)| *name == flannel::BACKEND_DATA).unwrap();
        let port = format!("\"Port\":{}", device.listen_port);
        assert!(data.as_deref().unwrap().contains(&port), "{data:?} {port}");
        assert_eq!(mesh.peers["node-2"].mtu, Some(1420));
    }
}
