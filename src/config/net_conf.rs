//! Flannel's `net-conf.json`: what of it an agent needs beside its options.

use std::collections::BTreeSet;
use std::path::Path;

use gambeson_mesh::desired::Vxlan;
use gambeson_mesh::family::Family;
use gambeson_mesh::node::Transport;
use serde_json::{Map, Value};

use super::check::{ConfigError, invalid};

const OPTION: &str = "--net-config-path";
/// Keys that mean something to Flannel and need nothing here: pod CIDRs come from the Nodes,
/// nftables is always used, and one tunnel carries both families.
const NEEDLESS: [&str; 8] = [
    "Backend.ListenPortV6",
    "EnableNFTables",
    "SubnetLen",
    "SubnetMin",
    "SubnetMax",
    "IPv6SubnetLen",
    "IPv6SubnetMin",
    "IPv6SubnetMax",
];

/// What the file says.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct NetConf {
    /// `Network` and `IPv6Network` that are enabled, as given.
    pub(super) networks: Vec<String>,
    /// `Backend.ListenPort`.
    pub(super) port: Option<u16>,
    /// `Backend.MTU`, before WireGuard takes its part, in bytes.
    pub(super) mtu: Option<u32>,
    /// `Backend.Mode`, where it is one family: that of the endpoints.
    pub(super) endpoints: Option<Family>,
    /// `Backend.PersistentKeepaliveInterval` in seconds.
    pub(super) persistent_keepalive: Option<u16>,
    /// `Backend.Userspace`, which is ours.
    pub(super) userspace: Option<bool>,
    /// `Backend.Type`: what Flannel's nodes use, where this is their file.
    pub(super) kind: Option<Transport>,
    /// How packets may travel.
    pub(super) backend: Backend,
    /// Keys that this version does nothing with.
    pub(super) unknown: Vec<String>,
}

/// What of a net-conf.json can be changed while an agent runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Backend {
    /// Transports this node accepts, at least one: by `Backend.Type` and `DirectRouting`, or
    /// `Backend.Transports`, which is ours.
    pub transports: BTreeSet<Transport>,
    /// What VXLAN devices are: `Backend.VNI`, `Port`, `Learning` and `GBP` of a VXLAN backend.
    pub vxlan: Vxlan,
}

impl Default for Backend {
    /// WireGuard alone.
    fn default() -> Self {
        Self { transports: BTreeSet::from([Transport::Wireguard]), vxlan: Vxlan::default() }
    }
}

impl NetConf {
    /// Reads the file.
    pub(super) fn read(path: &Path) -> Result<Self, ConfigError> {
        const REMEDY: &str = "give Flannel's net-conf.json";
        let text = std::fs::read_to_string(path).map_err(|error| {
            invalid(OPTION, format!("cannot read {}: {error}", path.display()), REMEDY)
        })?;
        let map: Map<String, Value> = serde_json::from_str(&text).map_err(|error| {
            let problem = format!("{} is not a JSON object: {error}", path.display());
            invalid(OPTION, problem, REMEDY)
        })?;
        Self::parse(map).map_err(|Wrong { key, value, takes }| {
            invalid(OPTION, format!("{}: {key} is {value}", path.display()), takes)
        })
    }

    fn parse(mut map: Map<String, Value>) -> Result<Self, Wrong> {
        let mut conf = Self::default();
        for (enabled, default, network) in
            [("EnableIPv4", true, "Network"), ("EnableIPv6", false, "IPv6Network")]
        {
            let enabled = take(&mut map, enabled, "give true or false", Value::as_bool)?;
            let takes = "give a network such as \"10.244.0.0/16\"";
            let text = |value: &Value| value.as_str().map(str::to_owned);
            let network = take(&mut map, network, takes, text)?;
            conf.networks.extend(network.filter(|_| enabled.unwrap_or(default)));
        }
        if let Some(backend) = map.remove("Backend") {
            conf.backend(backend)?;
        }
        conf.unknown.extend(map.into_iter().map(|(key, _)| key));
        conf.unknown.retain(|key| !NEEDLESS.contains(&key.as_str()));
        Ok(conf)
    }

    fn backend(&mut self, backend: Value) -> Result<(), Wrong> {
        let Value::Object(mut backend) = backend else {
            let takes = "give an object such as {\"Type\": \"wireguard\"}";
            return Err(Wrong { key: "Backend", value: backend, takes });
        };
        let takes = "give \"wireguard\", \"host-gw\" or \"vxlan\"";
        let transport = |value: &Value| Transport::parse(value.as_str()?);
        let kind = take(&mut backend, "Type", takes, transport)?.unwrap_or(Transport::Wireguard);
        self.kind = Some(kind);
        self.backend.transports = BTreeSet::from([kind]);
        let takes = "give a list such as [\"wireguard\", \"vxlan\"]";
        let list = |value: &Value| {
            let list: Option<BTreeSet<_>> = value.as_array()?.iter().map(transport).collect();
            list.filter(|list| !list.is_empty())
        };
        if let Some(transports) = take(&mut backend, "Transports", takes, list)? {
            self.backend.transports = transports;
        }
        if self.backend.transports.contains(&Transport::Vxlan) {
            self.vxlan(&mut backend)?;
        }
        if self.backend.transports.contains(&Transport::Wireguard) {
            self.wireguard(&mut backend)?;
        }
        let bytes = |value: &Value| u32::try_from(value.as_u64()?).ok();
        self.mtu = take(&mut backend, "MTU", "give a number of bytes, or leave it out", bytes)?
            // As in Flannel: what the interface has.
            .filter(|mtu| *mtu != 0);
        self.unknown.extend(backend.into_iter().map(|(key, _)| format!("Backend.{key}")));
        Ok(())
    }

    fn wireguard(&mut self, backend: &mut Map<String, Value>) -> Result<(), Wrong> {
        self.port = take(backend, "ListenPort", "give a UDP port", port)?;
        let takes = "give \"separate\", \"auto\", \"ipv4\" or \"ipv6\"";
        let mode = |value: &Value| match value.as_str()? {
            // One tunnel carries both families, over IPv4 where both nodes have it.
            "separate" | "auto" => Some(None),
            "ipv4" => Some(Some(Family::V4)),
            "ipv6" => Some(Some(Family::V6)),
            _ => None,
        };
        self.endpoints = take(backend, "Mode", takes, mode)?.flatten();
        let takes = "give a number of seconds from 0 to 65535";
        let seconds = |value: &Value| u16::try_from(value.as_u64()?).ok();
        let interval = take(backend, "PersistentKeepaliveInterval", takes, seconds)?;
        self.persistent_keepalive = interval.filter(|seconds| *seconds != 0);
        self.userspace = take(backend, "Userspace", "give true or false", Value::as_bool)?;
        Ok(())
    }

    fn vxlan(&mut self, backend: &mut Map<String, Value>) -> Result<(), Wrong> {
        let vni = |value: &Value| u32::try_from(value.as_u64()?).ok().filter(|vni| vni >> 24 == 0);
        let takes = "give a number from 0 to 16777215";
        let Vxlan { vni: default, port: default_port, .. } = self.backend.vxlan;
        let mut flag = |key| take(backend, key, "give true or false", Value::as_bool);
        let (learning, gbp) = (flag("Learning")?, flag("GBP")?);
        let direct = flag("DirectRouting")?.unwrap_or(false);
        // Flannel's for "route where there is no router in between, else VXLAN".
        self.backend.transports.extend(direct.then_some(Transport::HostGw));
        self.backend.vxlan = Vxlan {
            vni: take(backend, "VNI", takes, vni)?.unwrap_or(default),
            // As in Flannel: the kernel's own default port.
            port: take(backend, "Port", "give a UDP port", port)?
                .filter(|port| *port != 0)
                .unwrap_or(default_port),
            learning: learning.unwrap_or(false),
            gbp: gbp.unwrap_or(false),
        };
        Ok(())
    }
}

fn port(value: &Value) -> Option<u16> {
    u16::try_from(value.as_u64()?).ok()
}

/// A value that cannot be, and what the key takes.
struct Wrong {
    key: &'static str,
    value: Value,
    takes: &'static str,
}

fn take<T>(
    map: &mut Map<String, Value>,
    key: &'static str,
    takes: &'static str,
    read: impl Fn(&Value) -> Option<T>,
) -> Result<Option<T>, Wrong> {
    let Some(value) = map.remove(key) else { return Ok(None) };
    match read(&value) {
        Some(read) => Ok(Some(read)),
        None => Err(Wrong { key, value, takes }),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn parse(value: Value) -> Result<NetConf, String> {
        let Value::Object(map) = value else { panic!("not an object") };
        NetConf::parse(map)
            .map_err(|wrong| format!("{} {} {}", wrong.key, wrong.value, wrong.takes))
    }

    #[test]
    fn families_are_enabled_as_in_flannel() {
        let both = json!({ "Network": "10.244.0.0/16", "IPv6Network": "fd00::/48" });
        assert_eq!(parse(both.clone()).unwrap().networks, ["10.244.0.0/16"]);
        let mut on = both.clone();
        on["EnableIPv6"] = true.into();
        assert_eq!(parse(on.clone()).unwrap().networks, ["10.244.0.0/16", "fd00::/48"]);
        on["EnableIPv4"] = false.into();
        assert_eq!(parse(on).unwrap().networks, ["fd00::/48"]);
    }

    #[test]
    fn what_is_not_used_is_told_from_what_is_not_needed() {
        let backend = json!({ "Type": "wireguard", "PSK": "x", "MTU": 0 });
        let conf = parse(json!({ "SubnetLen": 24, "Extra": 1, "Backend": backend })).unwrap();
        assert_eq!(conf.unknown, ["Backend.PSK", "Extra"]);
        assert_eq!((conf.port, conf.mtu), (None, None));
    }

    #[test]
    fn the_backends_of_flannel_are_transports() {
        use Transport::{HostGw, Vxlan, Wireguard};
        for (backend, transports) in [
            (json!({}), &[Wireguard][..]),
            (json!({ "Type": "wireguard" }), &[Wireguard]),
            (json!({ "Type": "host-gw" }), &[HostGw]),
            (json!({ "Type": "vxlan" }), &[Vxlan]),
            (json!({ "Type": "vxlan", "DirectRouting": true }), &[HostGw, Vxlan]),
            (json!({ "Type": "vxlan", "Transports": ["wireguard", "vxlan"] }), &[Wireguard, Vxlan]),
        ] {
            let conf = parse(json!({ "Backend": backend })).unwrap();
            assert_eq!(conf.backend.transports, transports.iter().copied().collect(), "{conf:?}");
            assert!(conf.unknown.is_empty(), "{conf:?}");
        }
        let backend = json!({
            "Type": "vxlan", "VNI": 4096, "Port": 4789, "Learning": true, "GBP": true,
        });
        let conf = parse(json!({ "Backend": backend })).unwrap();
        let vxlan = self::Vxlan { vni: 4096, port: 4789, learning: true, gbp: true };
        assert_eq!((conf.backend.vxlan, conf.unknown), (vxlan, vec![]));
    }

    #[test]
    fn the_keys_of_a_wireguard_backend_are_read() {
        let backend = |mode: &str| {
            json!({ "Backend": {
                "Type": "wireguard", "ListenPort": 51900, "ListenPortV6": 51901, "Mode": mode,
                "PersistentKeepaliveInterval": 25, "Userspace": true,
            } })
        };
        for (mode, family) in [
            ("separate", None),
            ("auto", None),
            ("ipv4", Some(Family::V4)),
            ("ipv6", Some(Family::V6)),
        ] {
            let conf = parse(backend(mode)).unwrap();
            assert_eq!((conf.endpoints, conf.port), (family, Some(51900)));
            assert_eq!((conf.persistent_keepalive, conf.userspace), (Some(25), Some(true)));
            assert_eq!(conf.unknown, Vec::<String>::new());
        }
        let off = json!({ "Backend": { "PersistentKeepaliveInterval": 0 } });
        assert_eq!(parse(off).unwrap().persistent_keepalive, None);
    }

    #[test]
    fn a_wrong_value_is_named_with_what_its_key_takes() {
        for (value, says) in [
            (json!({ "Network": 10 }), "Network 10 give a network"),
            (json!({ "EnableIPv6": "yes" }), "EnableIPv6 \"yes\" give true or false"),
            (json!({ "Backend": "vxlan" }), "Backend \"vxlan\" give an object such as"),
            (
                json!({ "Backend": { "Type": "udp" } }),
                "Type \"udp\" give \"wireguard\", \"host-gw\"",
            ),
            (json!({ "Backend": { "Type": "vxlan", "VNI": 1 << 24 } }), "VNI 16777216 give a num"),
            (json!({ "Backend": { "Type": "vxlan", "GBP": 1 } }), "GBP 1 give true or false"),
            (json!({ "Backend": { "Transports": ["udp"] } }), "Transports [\"udp\"] give a list"),
            (json!({ "Backend": { "Transports": [] } }), "Transports [] give a list"),
            (json!({ "Backend": { "ListenPort": 70_000 } }), "ListenPort 70000 give a UDP port"),
            (json!({ "Backend": { "Mode": "both" } }), "Mode \"both\" give \"separate\""),
            (
                json!({ "Backend": { "PersistentKeepaliveInterval": "25s" } }),
                "PersistentKeepaliveInterval \"25s\" give a number of seconds",
            ),
            (json!({ "Backend": { "Userspace": 1 } }), "Userspace 1 give true or false"),
            (json!({ "Backend": { "MTU": -1 } }), "MTU -1 give a number of bytes"),
        ] {
            let error = parse(value).unwrap_err();
            assert!(error.starts_with(says), "{error}");
        }
    }
}
