use std::net::IpAddr;
use std::path::PathBuf;

use ipnet::IpNet;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::environment::{IDENTIFIER, is_identifier};
use super::{CniError, DEFAULT_BRIDGE, SUPPORTED_VERSIONS};
use crate::subnet_env::{self, SubnetEnv};

/// Where Flannel's plugin keeps its delegates' configurations, and so do we: pods that one of
/// the two added are deleted by the other.
const DEFAULT_DATA_DIR: &str = "/var/lib/cni/flannel";
/// What the specification has for a configuration without a version.
const IMPLIED_VERSION: &str = "0.1.0";
const FIRST_VERSION_WITH_CHECK: &str = "0.4.0";
/// Where the agent has what is gone after a boot.
const DEFAULT_RUN_DIR: &str = "/run/gambeson";
/// Where host-local keeps its leases.
const DEFAULT_LEASES_DIR: &str = "/var/lib/cni/networks";
const FIRST_VERSION_WITH_STATUS: &str = "1.1.0";
const DEFAULT_DELEGATE: &str = "bridge";
const DEFAULT_IPAM: &str = "host-local";

/// The network configuration that the container runtime passes on standard input.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct NetConf {
    cni_version: Option<String>,
    name: Option<String>,
    subnet_file: Option<PathBuf>,
    data_dir: Option<PathBuf>,
    run_dir: Option<PathBuf>,
    #[serde(rename = "cni.dev/valid-attachments")]
    valid_attachments: Option<Vec<Attachment>>,
    delegate: Option<Map<String, Value>>,
    runtime_config: Option<Map<String, Value>>,
    ipam: Option<Map<String, Value>>,
    prev_result: Option<Value>,
}

impl NetConf {
    /// Parses and checks what every command needs.
    pub(super) fn parse(bytes: &[u8]) -> Result<Self, CniError> {
        let conf: Self = serde_json::from_slice(bytes).map_err(CniError::Decode)?;
        if !SUPPORTED_VERSIONS.contains(&conf.version()) {
            return Err(CniError::IncompatibleVersion(conf.version().to_owned()));
        }
        if !is_identifier(conf.name()) {
            let problem = format!("\"name\" is {:?}, but it must be {IDENTIFIER}", conf.name());
            return Err(CniError::Config(problem));
        }
        Ok(conf)
    }

    /// The version of the specification to speak.
    pub(super) fn version(&self) -> &str {
        non_empty(&self.cni_version).unwrap_or(IMPLIED_VERSION)
    }

    /// Fails unless the version has CHECK.
    pub(super) fn require_check(&self) -> Result<(), CniError> {
        self.require("CHECK", FIRST_VERSION_WITH_CHECK)
    }

    /// Fails unless the version has STATUS and GC.
    pub(super) fn require_status(&self, command: &'static str) -> Result<(), CniError> {
        self.require(command, FIRST_VERSION_WITH_STATUS)
    }

    fn require(&self, command: &'static str, first: &'static str) -> Result<(), CniError> {
        let order = |version| SUPPORTED_VERSIONS.iter().position(|known| *known == version);
        if order(self.version()) < order(first) {
            let version = self.version().to_owned();
            return Err(CniError::NotInVersion { command, version, first });
        }
        Ok(())
    }

    /// The attachments that GC leaves alone; without the list it would take away all.
    pub(super) fn valid_attachments(&self) -> Result<&[Attachment], CniError> {
        self.valid_attachments.as_deref().ok_or_else(|| {
            CniError::Config("GC needs \"cni.dev/valid-attachments\", a list".to_owned())
        })
    }

    pub(super) fn run_dir(&self) -> PathBuf {
        path_or(&self.run_dir, DEFAULT_RUN_DIR)
    }

    pub(super) fn subnet_file(&self) -> PathBuf {
        path_or(&self.subnet_file, subnet_env::DEFAULT_PATH)
    }

    pub(super) fn data_dir(&self) -> PathBuf {
        path_or(&self.data_dir, DEFAULT_DATA_DIR)
    }

    /// The configuration of the delegate, which also has its `type`. Serialised, its keys are
    /// in the order in which Go marshals a map, as in what Flannel's plugin saves.
    pub(super) fn delegate(&self, env: &SubnetEnv) -> Result<Delegate, CniError> {
        let mut conf = self.delegate.clone().unwrap_or_default();
        for key in ["name", "ipam"] {
            if conf.contains_key(key) {
                let problem = format!("\"delegate\" may not contain {key:?}: the plugin sets it");
                return Err(CniError::Config(problem));
            }
        }
        let mut default = |key: &str, value: Value| {
            conf.entry(key).or_insert(value);
        };
        default("type", DEFAULT_DELEGATE.into());
        // Somebody has to masquerade: the bridge plugin, if the agent does not.
        default("ipMasq", (!env.ip_masq).into());
        default("mtu", env.mtu.into());
        let plugin = plugin_name(&conf)?;
        if plugin == DEFAULT_DELEGATE {
            conf.entry("isGateway").or_insert(true.into());
        }
        conf.insert("name".into(), self.name().into());
        if let Some(version) = non_empty(&self.cni_version) {
            conf.insert("cniVersion".into(), version.into());
        }
        if let Some(runtime_config) = &self.runtime_config {
            conf.insert("runtimeConfig".into(), runtime_config.clone().into());
        }
        conf.insert("ipam".into(), self.ipam(env)?.into());
        Ok(Delegate { plugin, conf })
    }

    /// The saved configuration of the delegate for CHECK: what the container got at ADD goes in.
    pub(super) fn for_check(&self, saved: Delegate) -> Result<Delegate, CniError> {
        let Some(Value::Object(previous)) = &self.prev_result else {
            return Err(CniError::Config("CHECK needs \"prevResult\", an object".into()));
        };
        let Delegate { plugin, mut conf } = saved;
        conf.insert("cniVersion".into(), self.version().into());
        conf.insert("prevResult".into(), with_gateways(previous.clone()).into());
        Ok(Delegate { plugin, conf })
    }

    pub(super) fn name(&self) -> &str {
        self.name.as_deref().unwrap_or_default()
    }

    fn ipam(&self, env: &SubnetEnv) -> Result<Map<String, Value>, CniError> {
        let mut ipam = self.ipam.clone().unwrap_or_default();
        let mut routes = match ipam.remove("routes") {
            None | Some(Value::Null) => Vec::new(),
            Some(Value::Array(routes)) if routes.iter().all(is_route) => routes,
            Some(_) => {
                let problem = "\"ipam.routes\" must be a list of objects with a CIDR as \"dst\"";
                return Err(CniError::Config(problem.into()));
            }
        };
        routes.extend(env.networks.iter().map(|network| json!({ "dst": network.to_string() })));
        let ranges: Vec<Value> = env
            .subnets
            .iter()
            .map(|subnet| json!([{ "subnet": subnet.trunc().to_string() }]))
            .collect();
        ipam.entry("type").or_insert(DEFAULT_IPAM.into());
        ipam.insert("ranges".into(), ranges.into());
        ipam.insert("routes".into(), routes.into());
        Ok(ipam)
    }
}

/// One interface of a container.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub(super) struct Attachment {
    #[serde(rename = "containerID")]
    pub(super) container_id: String,
    #[serde(rename = "ifname")]
    pub(super) interface: String,
}

/// What the delegate is told, and who it is.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Delegate {
    pub(super) plugin: String,
    conf: Map<String, Value>,
}

impl Delegate {
    /// Reads what [`Self::to_bytes`] gave, or what Flannel's plugin saved.
    pub(super) fn from_bytes(bytes: &[u8]) -> Result<Self, CniError> {
        let conf = serde_json::from_slice(bytes).map_err(CniError::Decode)?;
        Ok(Self { plugin: plugin_name(&conf)?, conf })
    }

    /// Name of the network that the container was attached to.
    pub(super) fn network(&self) -> &str {
        self.conf.get("name").and_then(Value::as_str).unwrap_or_default()
    }

    /// The bridge that the reference plugin attaches to.
    pub(super) fn bridge(&self) -> &str {
        self.conf.get("bridge").and_then(Value::as_str).unwrap_or(DEFAULT_BRIDGE)
    }

    /// Where host-local keeps the leases of this network.
    pub(super) fn leases_dir(&self) -> PathBuf {
        let ipam = self.conf.get("ipam");
        let folder = ipam.and_then(|ipam| ipam.get("dataDir")).and_then(Value::as_str);
        let folder = folder.filter(|folder| !folder.is_empty()).unwrap_or(DEFAULT_LEASES_DIR);
        PathBuf::from(folder).join(self.network())
    }

    pub(super) fn to_bytes(&self) -> Vec<u8> {
        Value::Object(self.conf.clone()).to_string().into_bytes()
    }
}

fn plugin_name(conf: &Map<String, Value>) -> Result<String, CniError> {
    match conf.get("type") {
        Some(Value::String(name)) if !name.is_empty() && !name.contains(['/', '\0']) => {
            Ok(name.clone())
        }
        _ => Err(CniError::Config("\"delegate.type\" must be the file name of a plugin".into())),
    }
}

fn is_route(route: &Value) -> bool {
    route.get("dst").and_then(Value::as_str).is_some_and(|dst| dst.parse::<IpNet>().is_ok())
}

// At ADD the reference plugins send a route without a gateway through the gateway of its
// family, at CHECK they look for it without one (ValidateExpectedRoute in their pkg/ip), and
// so would fail every healthy pod.
fn with_gateways(mut result: Map<String, Value>) -> Map<String, Value> {
    let ips = result.get("ips").and_then(Value::as_array).cloned().unwrap_or_default();
    let gateways: Vec<IpAddr> =
        ips.iter().filter_map(|ip| ip.get("gateway")?.as_str()?.parse().ok()).collect();
    let routes = result.get_mut("routes").and_then(Value::as_array_mut);
    for route in routes.into_iter().flatten().filter_map(Value::as_object_mut) {
        let family = route.get("dst").and_then(Value::as_str).and_then(|dst| dst.parse().ok());
        let gateway = family
            .and_then(|dst: IpNet| gateways.iter().find(|gw| gw.is_ipv4() == dst.addr().is_ipv4()));
        if let (None | Some(Value::Null), Some(gateway)) = (route.get("gw"), gateway) {
            route.insert("gw".into(), gateway.to_string().into());
        }
    }
    result
}

fn non_empty(text: &Option<String>) -> Option<&str> {
    text.as_deref().filter(|text| !text.is_empty())
}

fn path_or(path: &Option<PathBuf>, default: &str) -> PathBuf {
    path.as_ref().filter(|path| !path.as_os_str().is_empty()).cloned().unwrap_or(default.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cni::conflist;

    const IPV4: &str = "FLANNEL_NETWORK=10.244.0.0/16\nFLANNEL_SUBNET=10.244.1.1/24\n\
                        FLANNEL_MTU=1440\nFLANNEL_IPMASQ=true\n";
    const DUAL: &str = "FLANNEL_NETWORK=10.244.0.0/16\nFLANNEL_SUBNET=10.244.1.1/24\n\
                        FLANNEL_IPV6_NETWORK=fd00:10:244::/48\n\
                        FLANNEL_IPV6_SUBNET=fd00:10:244:1::1/64\n\
                        FLANNEL_MTU=1420\nFLANNEL_IPMASQ=false\n";

    fn delegate(conf: &Value, env: &str) -> Result<String, CniError> {
        let env = SubnetEnv::parse(env).unwrap();
        let delegate = NetConf::parse(conf.to_string().as_bytes())?.delegate(&env)?;
        Ok(String::from_utf8(delegate.to_bytes()).unwrap())
    }

    #[test]
    fn the_installed_configuration_gives_flannels_bytes() {
        let mut conflist: Value = serde_json::from_str(conflist::DEFAULT).unwrap();
        let mut conf = conflist["plugins"][0].take();
        conf["name"] = conflist["name"].take();
        conf["cniVersion"] = conflist["cniVersion"].take();
        let expected = concat!(
            r#"{"cniVersion":"0.3.1","hairpinMode":true,"ipMasq":false,"#,
            r#""ipam":{"ranges":[[{"subnet":"10.244.1.0/24"}]],"#,
            r#""routes":[{"dst":"10.244.0.0/16"}],"type":"host-local"},"#,
            r#""isDefaultGateway":true,"isGateway":true,"mtu":1440,"name":"cbr0","type":"bridge"}"#
        );
        assert_eq!(delegate(&conf, IPV4).unwrap(), expected);
    }

    #[test]
    fn dual_stack_adds_a_range_and_a_route() {
        let expected = concat!(
            r#"{"ipMasq":true,"ipam":{"ranges":[[{"subnet":"10.244.1.0/24"}],"#,
            r#"[{"subnet":"fd00:10:244:1::/64"}]],"routes":[{"dst":"10.244.0.0/16"},"#,
            r#"{"dst":"fd00:10:244::/48"}],"type":"host-local"},"#,
            r#""isGateway":true,"mtu":1420,"name":"n","type":"bridge"}"#
        );
        assert_eq!(delegate(&json!({ "name": "n" }), DUAL).unwrap(), expected);
    }

    #[test]
    fn the_users_values_win() {
        let conf = json!({
            "name": "n",
            "cniVersion": "1.0.0",
            "delegate": {
                "type": "ptp", "ipMasq": true, "mtu": 1300, "cniVersion": "0.2.0", "vlan": 7
            },
            "runtimeConfig": { "portMappings": [{ "hostPort": 80 }] },
            "ipam": { "dataDir": "/x", "routes": [{ "dst": "0.0.0.0/0", "gw": "10.244.1.9" }] },
        });
        let expected = concat!(
            r#"{"cniVersion":"1.0.0","ipMasq":true,"ipam":{"dataDir":"/x","#,
            r#""ranges":[[{"subnet":"10.244.1.0/24"}]],"#,
            r#""routes":[{"dst":"0.0.0.0/0","gw":"10.244.1.9"},{"dst":"10.244.0.0/16"}],"#,
            r#""type":"host-local"},"mtu":1300,"name":"n","#,
            r#""runtimeConfig":{"portMappings":[{"hostPort":80}]},"type":"ptp","vlan":7}"#
        );
        assert_eq!(delegate(&conf, IPV4).unwrap(), expected);
        let conf = json!({ "name": "n", "delegate": { "isGateway": false } });
        assert!(delegate(&conf, IPV4).unwrap().contains(r#""isGateway":false"#));
    }

    #[test]
    fn refuses_what_it_would_have_to_overrule() {
        for (conf, code, part) in [
            (json!({ "name": "n", "delegate": { "name": "x" } }), 7, "\"name\""),
            (json!({ "name": "n", "delegate": { "ipam": {} } }), 7, "\"ipam\""),
            (json!({ "name": "n", "delegate": { "type": 1 } }), 7, "delegate.type"),
            (json!({ "name": "n", "delegate": { "type": "../bridge" } }), 7, "delegate.type"),
            (json!({ "name": "n", "delegate": [] }), 6, "standard input"),
            (json!({ "name": "n", "ipam": { "routes": [{ "dst": 1 }] } }), 7, "ipam.routes"),
            (json!({ "name": "../n" }), 7, "\"name\""),
            (json!({}), 7, "\"name\""),
            (json!({ "name": "n", "cniVersion": "1.2.0" }), 1, "1.2.0"),
            (json!({ "name": "n", "cniVersion": 1 }), 6, "standard input"),
            (json!([]), 6, "standard input"),
        ] {
            let error = delegate(&conf, IPV4).unwrap_err();
            assert_eq!(error.code(), code, "{error}");
            assert!(error.to_string().contains(part), "{error}");
        }
    }

    #[test]
    fn check_needs_a_version_and_a_previous_result() {
        let conf = |value: Value| NetConf::parse(value.to_string().as_bytes()).unwrap();
        assert!(conf(json!({ "name": "n" })).require_check().is_err());
        assert!(conf(json!({ "name": "n", "cniVersion": "0.3.1" })).require_check().is_err());
        assert!(conf(json!({ "name": "n", "cniVersion": "0.4.0" })).require_check().is_ok());
        let saved = || Delegate::from_bytes(br#"{"type":"bridge"}"#).unwrap();
        assert!(conf(json!({ "name": "n" })).for_check(saved()).is_err());
        let check = conf(json!({ "name": "n", "cniVersion": "0.4.0", "prevResult": {} }));
        let bytes = check.for_check(saved()).unwrap().to_bytes();
        assert_eq!(bytes, br#"{"cniVersion":"0.4.0","prevResult":{},"type":"bridge"}"#);
    }

    #[test]
    fn check_expects_routes_through_the_gateway_of_their_family() {
        let previous = json!({
            "ips": [{ "gateway": "10.0.0.1" }, { "gateway": "fd00::1" }, { "gateway": 5 }],
            "routes": [{ "dst": "10.0.0.0/8" }, { "dst": "fd00::/8", "gw": null },
                       { "dst": "0.0.0.0/0", "gw": "10.0.0.9" }, { "dst": "x" }, 7],
        });
        let Value::Object(previous) = previous else { unreachable!() };
        let expected = json!([
            { "dst": "10.0.0.0/8", "gw": "10.0.0.1" }, { "dst": "fd00::/8", "gw": "fd00::1" },
            { "dst": "0.0.0.0/0", "gw": "10.0.0.9" }, { "dst": "x" }, 7
        ]);
        assert_eq!(with_gateways(previous)["routes"], expected);
    }
}
