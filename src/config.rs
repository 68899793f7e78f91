//! What an operator can set, as options of `gambeson agent` and as environment variables,
//! and the checked [`Config`] made of it. Names that Flannel has keep Flannel's meaning.

mod check;
mod k3s;
mod net_conf;
mod net_conf_watch;
mod options;

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use gambeson_mesh::family::Family;
use gambeson_mesh::node::{DEFAULT_PORT, MAX_PORT, Transport};
use ipnet::IpNet;
use regex::Regex;

pub use check::ConfigError;
pub(crate) use check::check_interface_name;
use check::{
    can_be_sent_to, check_prefix, checked_node_name, cluster_networks, invalid, parse, transports,
};
pub use net_conf::Backend;
use net_conf::NetConf;
pub use net_conf_watch::{NetConfWatch, Reading};
pub use options::{DEFAULT_KEY_FILE, DEFAULT_SOCKET, K3sBackend, Options, WireGuardMode};

use crate::cni::install;
use crate::underlay::Choice;

/// MTUs in bytes that leave IPv6 its 1280 inside WireGuard over IPv6.
const MTU: std::ops::RangeInclusive<u32> = 1360..=65_535;

/// Options that were checked: every value parsed.
#[derive(Debug, Clone)]
pub struct Config {
    /// Kubeconfig file, or `None` for the pod's service account.
    pub kubeconfig: Option<PathBuf>,
    /// How to find this machine's Node.
    pub node: NodeIdentity,
    /// The cluster's pod networks, one or two.
    pub cluster_networks: BTreeSet<IpNet>,
    /// How to find the underlay interface.
    pub underlay: Choice,
    /// Base UDP port; all session ports exist.
    pub port: u16,
    /// Largest MTU of the underlay in bytes, whatever the interface has.
    pub mtu: Option<u32>,
    /// Kernel or userspace.
    pub wireguard: WireGuardMode,
    /// Userspace also in FIPS mode.
    pub allow_userspace_in_fips: bool,
    /// The family that endpoints are of, unless both may be.
    pub endpoints: Option<Family>,
    /// Seconds between keepalives, unless the Node says.
    pub persistent_keepalive: Option<u16>,
    /// How packets may travel.
    pub backend: Backend,
    /// The file to follow for changes of that, unless an option says it.
    pub net_conf: Option<NetConfWatch>,
    /// The backend of nodes that Flannel still drives, where there may be some.
    pub flannel: Option<Transport>,
    /// Publish the Node's external addresses.
    pub external_ip: bool,
    /// Families of which what leaves the cluster networks is masqueraded.
    pub masquerade: BTreeSet<Family>,
    /// Accept the cluster networks' packets in the host's firewall.
    pub forward_rules: bool,
    /// `subnet.env`.
    pub subnet_file: PathBuf,
    /// What the CNI configuration list is made of, if not ours.
    pub cni_conf_file: Option<PathBuf>,
    /// Folder of the CNI configuration list.
    pub cni_conf_dir: PathBuf,
    /// Folder of the CNI plugins.
    pub cni_bin_dir: PathBuf,
    /// Private keys.
    pub key_file: PathBuf,
    /// Where to serve health and metrics, if at all.
    pub healthz: Option<SocketAddr>,
    /// Unix socket of `gambeson status`.
    pub socket: PathBuf,
    /// Where `net/...` of `/proc/sys` can be written.
    pub proc_sys: PathBuf,
    /// What serves userspace devices, if not this program.
    pub tunnel_program: Option<PathBuf>,
    /// Folder of the tunnel supervisors.
    pub tunnel_dir: Option<PathBuf>,
    /// Annotation prefix, e.g. `gambeson.io`.
    pub prefix: String,
    /// Be ready only where the admission policies are enforced.
    pub require_admission: bool,
    /// Pod bridge.
    pub bridge: String,
    /// At what age this node's key is replaced.
    pub rotate_every: Option<Duration>,
    /// A secret of the cluster for preshared keys.
    pub psk_file: Option<PathBuf>,
    /// Names the step of a rotation at which this process is to end.
    pub crash_at: Option<PathBuf>,
    /// Keys of net-conf.json that this version does nothing with.
    pub unknown_keys: Vec<String>,
}

/// How this machine's Node is found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NodeIdentity {
    /// By its name.
    Name(String),
    /// By asking the API server which Node this pod runs on.
    Pod {
        /// Namespace of the pod.
        namespace: String,
        /// Name of the pod.
        name: String,
    },
}

impl Options {
    /// Checks every value before anything is touched.
    ///
    /// # Errors
    /// The first value that cannot be used, with what the option takes.
    pub fn validate(self) -> Result<Config, ConfigError> {
        let node = self.node_identity()?;
        let kubeconfig = match (&self.kubeconfig, self.k3s) {
            (None, true) => Some(k3s::kubeconfig(Path::new("/"))?),
            (given, _) => given.clone(),
        };
        let file = self.net_config_path.as_deref().map(NetConf::read).transpose()?;
        let mut file = file.unwrap_or_default();
        file.kind = file.kind.filter(|_| self.flannel_compat);
        let cluster_networks = self.cluster_networks(&file.networks)?;
        // An option is fixed for the life of the agent; a file can be written anew.
        let by_file = self.transports.iter().all(String::is_empty);
        let path = self.net_config_path.clone().filter(|_| by_file);
        let net_conf = path.map(|path| NetConfWatch::new(path, file.clone()));
        let backend = self.flannel_backend.and_then(K3sBackend::transport);
        let transports = match (by_file, backend.filter(|_| self.net_config_path.is_none())) {
            (false, _) => transports(&self.transports)?,
            (true, Some(backend)) => BTreeSet::from([backend]),
            (true, None) => file.backend.transports,
        };
        let wireguard = match (self.wireguard, file.userspace) {
            (WireGuardMode::Auto, Some(true)) => WireGuardMode::Userspace,
            (given, _) => given,
        };
        let underlay = self.underlay()?;
        let port = self.port.or(file.port).unwrap_or(DEFAULT_PORT);
        if !(1..=MAX_PORT).contains(&port) {
            let problem = format!("{port} leaves no room for the four session ports");
            return Err(invalid("--port", problem, "give a port from 1 to 65529"));
        }
        let mtu = self.mtu.or(file.mtu);
        if let Some(mtu) = mtu.filter(|mtu| !MTU.contains(mtu)) {
            let problem = format!("{mtu} bytes cannot be the MTU between nodes");
            return Err(invalid("--mtu", problem, "give one from 1360 to 65535, in bytes"));
        }
        let healthz_ip: IpAddr = parse("--healthz-ip", &self.healthz_ip, "give an IP address")?;
        let (cni_conf_dir, cni_bin_dir) = self.cni_folders();
        let mut masquerade = if self.ip_masq { Family::ALL.into() } else { BTreeSet::new() };
        masquerade.extend(self.flannel_ipv6_masq.then_some(Family::V6));
        masquerade.extend(self.k3s.then_some(Family::V4));
        check_prefix(&self.annotation_prefix)?;
        check_interface_name("--bridge", &self.bridge)?;
        for (option, path) in [
            ("--subnet-file", &self.subnet_file),
            ("--cni-conf-dir", &cni_conf_dir),
            ("--cni-bin-dir", &cni_bin_dir),
            ("--key-file", &self.key_file),
            ("--socket", &self.socket),
            ("--proc-sys", &self.proc_sys),
        ] {
            if !path.is_absolute() {
                let problem = format!("\"{}\" is not an absolute path", path.display());
                return Err(invalid(option, problem, "give a path that starts with /"));
            }
        }
        Ok(Config {
            kubeconfig,
            node,
            cluster_networks,
            underlay,
            port,
            mtu,
            wireguard,
            allow_userspace_in_fips: self.allow_userspace_in_fips,
            endpoints: file.endpoints,
            persistent_keepalive: file.persistent_keepalive,
            backend: Backend { transports, vxlan: file.backend.vxlan },
            net_conf,
            flannel: file.kind,
            external_ip: self.flannel_external_ip,
            masquerade,
            forward_rules: self.iptables_forward_rules,
            subnet_file: self.subnet_file,
            cni_conf_file: self.cni_conf_file,
            cni_conf_dir,
            cni_bin_dir,
            key_file: self.key_file,
            healthz: (self.healthz_port != 0)
                .then(|| SocketAddr::new(healthz_ip, self.healthz_port)),
            socket: self.socket,
            proc_sys: self.proc_sys,
            tunnel_program: self.tunnel_program,
            tunnel_dir: self.tunnel_dir,
            prefix: self.annotation_prefix,
            require_admission: self.require_admission,
            bridge: self.bridge,
            rotate_every: self.rotate_every,
            psk_file: self.psk_file,
            crash_at: self.crash_at,
            unknown_keys: file.unknown,
        })
    }

    fn cluster_networks(&self, in_file: &[String]) -> Result<BTreeSet<IpNet>, ConfigError> {
        let k3s = [k3s::CLUSTER_CIDR.to_owned()];
        match self.cluster_cidr.iter().all(String::is_empty) {
            false => cluster_networks(&self.cluster_cidr),
            true if in_file.is_empty() && self.k3s => cluster_networks(&k3s),
            true => cluster_networks(in_file),
        }
    }

    /// Of the configuration and of the plugins.
    fn cni_folders(&self) -> (PathBuf, PathBuf) {
        let default = match self.k3s {
            true => k3s::Places::find(Path::new("/")),
            false => k3s::Places {
                cni_conf_dir: install::DEFAULT_CONF_DIR.into(),
                cni_bin_dir: install::DEFAULT_BIN_DIR.into(),
            },
        };
        (
            self.cni_conf_dir.clone().unwrap_or(default.cni_conf_dir),
            self.cni_bin_dir.clone().unwrap_or(default.cni_bin_dir),
        )
    }

    fn node_identity(&self) -> Result<NodeIdentity, ConfigError> {
        let set = |value: &Option<String>| value.clone().filter(|v| !v.is_empty());
        if let Some(name) = set(&self.node_name) {
            return Ok(NodeIdentity::Name(checked_node_name("--node-name", name)?));
        }
        match (set(&self.pod_name), set(&self.pod_namespace)) {
            (Some(name), Some(namespace)) => Ok(NodeIdentity::Pod {
                namespace: checked_node_name("--pod-namespace", namespace)?,
                name: checked_node_name("--pod-name", name)?,
            }),
            (Some(_), None) => Err(invalid(
                "--pod-namespace",
                "missing, but --pod-name is set".to_owned(),
                "set both POD_NAME and POD_NAMESPACE, or NODE_NAME",
            )),
            (None, _) => {
                let host = nix::unistd::gethostname()
                    .ok()
                    .and_then(|name| name.into_string().ok())
                    .unwrap_or_default();
                Ok(NodeIdentity::Name(checked_node_name("--node-name", host.to_lowercase())?))
            }
        }
    }

    fn underlay(&self) -> Result<Choice, ConfigError> {
        for pattern in &self.iface_regex {
            Regex::new(pattern).map_err(|error| {
                let problem = format!("\"{pattern}\" is not a regular expression ({error})");
                invalid("--iface-regex", problem, "give one such as '^eth[0-9]+$'")
            })?;
        }
        let given = |value: &Option<String>| value.clone().filter(|v| !v.is_empty());
        let iface_can_reach = given(&self.iface_can_reach)
            .map(|v| parse("--iface-can-reach", &v, "give an IP address"))
            .transpose()?;
        let public_ip: Option<Ipv4Addr> = given(&self.public_ip)
            .map(|v| parse("--public-ip", &v, "give an IPv4 address"))
            .transpose()?;
        let public_ipv6: Option<Ipv6Addr> = given(&self.public_ipv6)
            .map(|v| parse("--public-ipv6", &v, "give an IPv6 address"))
            .transpose()?;
        for (option, address) in [
            ("--public-ip", public_ip.map(IpAddr::from)),
            ("--public-ipv6", public_ipv6.map(IpAddr::from)),
        ] {
            if let Some(address) = address.filter(|a| !can_be_sent_to(*a)) {
                let problem = format!("other nodes cannot send to {address}");
                return Err(invalid(option, problem, "give an address that they can reach"));
            }
        }
        Ok(Choice {
            iface: self.iface.iter().filter(|i| !i.is_empty()).cloned().collect(),
            iface_regex: self.iface_regex.iter().filter(|r| !r.is_empty()).cloned().collect(),
            iface_can_reach,
            public_ip,
            public_ipv6,
        })
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Cli {
        #[command(flatten)]
        options: Options,
    }

    fn validate(args: &[&str]) -> Result<Config, ConfigError> {
        // An option given twice would be a usage error: the test's own value replaces the base.
        let named = |option: &str| args.iter().any(|a| a.split('=').next() == Some(option));
        let mut line = vec!["agent"];
        for base in ["--node-name=node-1", "--cluster-cidr=10.244.0.0/16"] {
            if !base.split('=').next().is_some_and(named) {
                line.push(base);
            }
        }
        line.extend(args);
        Cli::try_parse_from(line).unwrap().options.validate()
    }

    #[test]
    fn defaults_are_complete() {
        let config = validate(&[]).unwrap();
        assert_eq!(config.node, NodeIdentity::Name("node-1".into()));
        assert_eq!(config.port, 51820);
        assert_eq!(config.healthz, Some("127.0.0.1:9480".parse().unwrap()));
        assert_eq!(config.backend.transports, BTreeSet::from([Transport::Wireguard]));
        assert!(config.masquerade.is_empty() && config.forward_rules);
        assert_eq!(config.cni_conf_dir, Path::new("/etc/cni/net.d"));
    }

    #[test]
    fn flags_can_be_switched_like_flannels() {
        assert_eq!(validate(&["--ip-masq"]).unwrap().masquerade, Family::ALL.into());
        assert!(validate(&["--ip-masq=false"]).unwrap().masquerade.is_empty());
        assert_eq!(validate(&["--healthz-port=0"]).unwrap().healthz, None);
    }

    #[test]
    fn dual_stack_networks() {
        let config = validate(&["--cluster-cidr=10.0.0.0/8,fd00::/48"]).unwrap();
        assert_eq!(config.cluster_networks.len(), 2);
    }

    #[test]
    fn wrong_values_name_the_option_and_the_remedy() {
        for (args, says) in [
            (&["--cluster-cidr=10.244.0.0/33"][..], "--cluster-cidr: \"10.244.0.0/33\""),
            (&["--cluster-cidr=10.244.0.1/16"], "the network is 10.244.0.0/16"),
            (&["--cluster-cidr=0.0.0.0/0"], "every address"),
            (&["--cluster-cidr=127.1.0.0/16"], "127.1.0.0/16 overlaps the loopback network"),
            (&["--cluster-cidr=168.0.0.0/6"], "the link-local network (169.254.0.0/16)"),
            (&["--cluster-cidr=239.0.0.0/8"], "multicast and reserved addresses"),
            (&["--cluster-cidr=fe80::/64"], "the link-local network (fe80::/10)"),
            (&["--cluster-cidr=ff05::/16"], "multicast addresses"),
            (&["--cluster-cidr=::/64"], "the loopback address (::1)"),
            (&["--cluster-cidr=10.0.0.0/16,10.1.0.0/16"], "more than one network of a family"),
            (&["--cluster-cidr="], "--cluster-cidr: not given"),
            (&["--port=65530"], "--port: 65530"),
            (&["--port=0"], "from 1 to 65529"),
            (&["--mtu=1280"], "--mtu: 1280 bytes"),
            (&["--net-config-path=/nonexistent"], "--net-config-path: cannot read /nonexistent"),
            (&["--transports=wireguard,carrier-pigeon"], "unknown transport \"carrier-pigeon\""),
            (&["--iface-regex=("], "--iface-regex"),
            (&["--iface-can-reach=example"], "--iface-can-reach"),
            (&["--public-ip=127.0.0.1"], "cannot send to 127.0.0.1"),
            (&["--public-ipv6=10.0.0.1"], "--public-ipv6"),
            (&["--node-name=Node_1"], "--node-name"),
            (&["--annotation-prefix=nodot"], "--annotation-prefix"),
            (&["--bridge=a-name-that-is-too-long"], "--bridge"),
            (&["--key-file=keys.json"], "not an absolute path"),
            (&["--healthz-ip=localhost"], "--healthz-ip"),
        ] {
            let error = validate(args).unwrap_err().to_string();
            assert!(error.contains(says), "{args:?}: {error}");
        }
    }

    #[test]
    fn what_no_option_gives_is_in_net_conf() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("net-conf.json");
        std::fs::write(
            &file,
            r#"{"Network": "10.9.0.0/16", "Backend": {"Type": "wireguard", "ListenPort": 5000,
                "MTU": 1400}, "Extra": 1}"#,
        )
        .unwrap();
        let option = format!("--net-config-path={}", file.display());
        let config = validate(&["--cluster-cidr=", &option]).unwrap();
        assert_eq!(config.cluster_networks, BTreeSet::from(["10.9.0.0/16".parse().unwrap()]));
        assert_eq!((config.port, config.mtu), (5000, Some(1400)));
        assert_eq!(config.unknown_keys, ["Extra"]);
        assert_eq!(config.backend.transports, BTreeSet::from([Transport::Wireguard]));
        let config = validate(&[&option, "--port=6000", "--mtu=1450"]).unwrap();
        assert_eq!(config.cluster_networks, BTreeSet::from(["10.244.0.0/16".parse().unwrap()]));
        assert_eq!((config.port, config.mtu), (6000, Some(1450)));
        let wireguard = r#"{"Backend": {"Userspace": true, "Mode": "ipv6"}}"#;
        std::fs::write(&file, wireguard).unwrap();
        let config = validate(&[&option]).unwrap();
        assert_eq!(config.wireguard, WireGuardMode::Userspace);
        assert_eq!(config.endpoints, Some(Family::V6));
        let config = validate(&[&option, "--wireguard=kernel"]).unwrap();
        assert_eq!(config.wireguard, WireGuardMode::Kernel);
        std::fs::write(&file, r#"{"Backend": {"Type": "vxlan", "VNI": 7}}"#).unwrap();
        let config = validate(&[&option]).unwrap();
        assert_eq!(config.backend.transports, BTreeSet::from([Transport::Vxlan]));
        let config = validate(&[&option, "--transports=vxlan,wireguard"]).unwrap();
        assert_eq!(
            config.backend.transports,
            BTreeSet::from([Transport::Vxlan, Transport::Wireguard])
        );
        assert_eq!((config.backend.vxlan.vni, config.backend.vxlan.port), (7, 8472));
    }

    #[test]
    fn k3s_names_mean_what_they_mean_to_k3s() {
        for (backend, transport) in [
            ("none", Transport::Wireguard),
            ("vxlan", Transport::Vxlan),
            ("host-gw", Transport::HostGw),
            ("wireguard-native", Transport::Wireguard),
        ] {
            let config = validate(&[&format!("--flannel-backend={backend}")]).unwrap();
            assert_eq!(config.backend.transports, BTreeSet::from([transport]), "{backend}");
        }
        let said = ["--flannel-backend=vxlan", "--transports=wireguard"];
        let config = validate(&said).unwrap();
        assert_eq!(config.backend.transports, BTreeSet::from([Transport::Wireguard]));
        let config = validate(&["--flannel-iface=eth1", "--flannel-external-ip"]).unwrap();
        assert_eq!((config.underlay.iface, config.external_ip), (vec!["eth1".to_owned()], true));
        let config = validate(&["--flannel-cni-conf=/a", "--flannel-ipv6-masq"]).unwrap();
        assert_eq!(config.cni_conf_file.as_deref(), Some(Path::new("/a")));
        assert_eq!(config.masquerade, BTreeSet::from([Family::V6]));

        let k3s = ["--k3s", "--kubeconfig=/k", "--cluster-cidr="];
        let config = validate(&k3s).unwrap();
        assert_eq!(config.cluster_networks, BTreeSet::from(["10.42.0.0/16".parse().unwrap()]));
        assert_eq!(config.masquerade, BTreeSet::from([Family::V4]));
        let folder = Path::new("/var/lib/rancher/k3s/agent/etc/cni/net.d");
        assert_eq!(config.cni_conf_dir, folder);
        assert_eq!(config.kubeconfig.as_deref(), Some(Path::new("/k")));
        let config = validate(&["--k3s", "--kubeconfig=/k", "--cni-conf-dir=/own"]).unwrap();
        assert_eq!(config.cni_conf_dir, Path::new("/own"));
        assert!(validate(&["--k3s"]).unwrap_err().to_string().starts_with("--k3s: neither"));
        let removed = Cli::try_parse_from(["agent", "--flannel-backend=ipsec"]).unwrap_err();
        assert!(removed.to_string().contains("wireguard-native"), "{removed}");
    }

    #[test]
    fn the_pod_identifies_the_node() {
        let line = ["agent", "--cluster-cidr=10.244.0.0/16", "--pod-name=a", "--pod-namespace=b"];
        let config = Cli::try_parse_from(line).unwrap().options.validate().unwrap();
        let pod = NodeIdentity::Pod { namespace: "b".into(), name: "a".into() };
        assert_eq!(config.node, pod);
        let error = Cli::try_parse_from(&line[..3]).unwrap().options.validate().unwrap_err();
        assert!(error.to_string().contains("--pod-namespace"), "{error}");
    }
}
