//! What an operator can set, as options of `gambeson agent` and as environment variables,
//! and the checked [`Config`] made of it. Names that Flannel has keep Flannel's meaning.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;

use gambeson_mesh::node::{DEFAULT_PORT, DEFAULT_PREFIX, MAX_PORT, Transport, overlap};
use ipnet::IpNet;
use regex::Regex;

use crate::cni::DEFAULT_BRIDGE;
use crate::underlay::Choice;

/// Where the agent answers `gambeson status`.
pub const DEFAULT_SOCKET: &str = "/run/gambeson/agent.sock";
/// Longest name of a Linux network interface in bytes (`IFNAMSIZ` less the final NUL).
const INTERFACE_NAME_MAX: usize = 15;

/// Options of `gambeson agent`, as given.
#[derive(Debug, Clone, clap::Args)]
pub struct Options {
    /// Kubeconfig file of the cluster
    ///
    /// Without it the service account of the agent's pod is used.
    #[arg(long, visible_alias = "kubeconfig-file", env = "KUBECONFIG", value_name = "FILE")]
    pub kubeconfig: Option<PathBuf>,

    /// Name of this machine's Node
    ///
    /// Without it: the Node that the pod in POD_NAME and POD_NAMESPACE runs on, or else the
    /// host name.
    #[arg(long, env = "NODE_NAME", value_name = "NAME")]
    pub node_name: Option<String>,

    /// Name of the agent's own pod, to find its Node
    #[arg(long, env = "POD_NAME", value_name = "NAME", hide_short_help = true)]
    pub pod_name: Option<String>,

    /// Namespace of the agent's own pod, to find its Node
    #[arg(long, env = "POD_NAMESPACE", value_name = "NAME", hide_short_help = true)]
    pub pod_namespace: Option<String>,

    /// The cluster's pod networks, at most one per family
    ///
    /// The agent routes, guards and masquerades these networks and nothing else. As in
    /// `--cluster-cidr` of kube-controller-manager.
    #[arg(long, env = "CLUSTER_CIDR", value_name = "CIDR[,CIDR]", value_delimiter = ',')]
    pub cluster_cidr: Vec<String>,

    /// Underlay interface, by name or address; the first that exists is used
    #[arg(long, env = "FLANNELD_IFACE", value_name = "NAME|IP", value_delimiter = ',')]
    pub iface: Vec<String>,

    /// Underlay interface, by a regular expression on its name or address
    #[arg(long, env = "FLANNELD_IFACE_REGEX", value_name = "REGEX")]
    pub iface_regex: Vec<String>,

    /// Underlay interface: the one with the route to this address
    #[arg(long, env = "FLANNELD_IFACE_CAN_REACH", value_name = "IP")]
    pub iface_can_reach: Option<String>,

    /// IPv4 address other nodes send to, when it is not on the interface (NAT)
    #[arg(long, env = "FLANNELD_PUBLIC_IP", value_name = "IP")]
    pub public_ip: Option<String>,

    /// IPv6 address other nodes send to, when it is not on the interface
    #[arg(long, env = "FLANNELD_PUBLIC_IPV6", value_name = "IP")]
    pub public_ipv6: Option<String>,

    /// Base UDP port; this port and +2, +4 and +6 are used
    #[arg(long, env = "GAMBESON_PORT", value_name = "PORT", default_value_t = DEFAULT_PORT)]
    pub port: u16,

    /// Who implements WireGuard
    ///
    /// `auto` keeps what a running device uses, else takes the kernel module where a
    /// `wireguard` link can be made, else a userspace device.
    #[arg(long, env = "GAMBESON_WIREGUARD", value_name = "MODE", default_value = "auto")]
    pub wireguard: WireGuardMode,

    /// Transports this node accepts, best first
    ///
    /// Only `wireguard` in this version.
    #[arg(
        long,
        env = "GAMBESON_TRANSPORTS",
        value_name = "LIST",
        value_delimiter = ',',
        default_value = "wireguard"
    )]
    pub transports: Vec<String>,

    /// Masquerade what leaves the pod networks
    #[arg(
        long,
        env = "FLANNELD_IP_MASQ",
        value_name = "BOOL",
        num_args = 0..=1,
        require_equals = true,
        default_value_t = false,
        default_missing_value = "true",
        action = clap::ArgAction::Set
    )]
    pub ip_masq: bool,

    /// Accept the cluster networks' packets in the host's firewall
    ///
    /// Adds rules to the chain FORWARD of iptables-nft when its policy is DROP, as Docker sets
    /// it, and reports other chains that drop what pods send to other nodes.
    #[arg(
        long,
        env = "FLANNELD_IPTABLES_FORWARD_RULES",
        default_value_t = true,
        default_missing_value = "true",
        num_args = 0..=1,
        require_equals = true,
        value_name = "BOOL",
        hide_short_help = true,
        action = clap::ArgAction::Set
    )]
    pub iptables_forward_rules: bool,

    /// File that tells the CNI plugin this node's subnet and MTU
    #[arg(
        long,
        env = "FLANNELD_SUBNET_FILE",
        value_name = "FILE",
        default_value = "/run/flannel/subnet.env"
    )]
    pub subnet_file: PathBuf,

    /// Folder for the CNI configuration list, written once this node is ready
    #[arg(
        long,
        env = "GAMBESON_CNI_CONF_DIR",
        value_name = "DIR",
        default_value = "/etc/cni/net.d"
    )]
    pub cni_conf_dir: PathBuf,

    /// This node's private keys; made at first start, never replaced
    #[arg(
        long,
        env = "GAMBESON_KEY_FILE",
        value_name = "FILE",
        default_value = "/var/lib/gambeson/keys.json"
    )]
    pub key_file: PathBuf,

    /// Address of /healthz, /readyz and /metrics
    #[arg(long, env = "FLANNELD_HEALTHZ_IP", value_name = "IP", default_value = "127.0.0.1")]
    pub healthz_ip: String,

    /// TCP port of /healthz, /readyz and /metrics; 0 turns them off
    #[arg(long, env = "FLANNELD_HEALTHZ_PORT", value_name = "PORT", default_value_t = 9480)]
    pub healthz_port: u16,

    /// Unix socket that `gambeson status` asks
    #[arg(long, env = "GAMBESON_SOCKET", value_name = "FILE", default_value = DEFAULT_SOCKET)]
    pub socket: PathBuf,

    /// Prefix of the Node annotations
    #[arg(
        long,
        env = "GAMBESON_ANNOTATION_PREFIX",
        value_name = "DOMAIN",
        default_value = DEFAULT_PREFIX,
        hide_short_help = true
    )]
    pub annotation_prefix: String,

    /// Bridge that the CNI plugin attaches pods to
    #[arg(
        long,
        env = "GAMBESON_BRIDGE",
        value_name = "NAME",
        default_value = DEFAULT_BRIDGE,
        hide_short_help = true
    )]
    pub bridge: String,
}

/// `--wireguard`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum WireGuardMode {
    /// The kernel module where it can be used, else userspace.
    Auto,
    /// Only the kernel module.
    Kernel,
    /// Only a userspace device.
    Userspace,
}

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
    /// Kernel or userspace.
    pub wireguard: WireGuardMode,
    /// Transports this node accepts, at least one.
    pub transports: BTreeSet<Transport>,
    /// Masquerade what leaves the cluster networks.
    pub ip_masq: bool,
    /// Accept the cluster networks' packets in the host's firewall.
    pub forward_rules: bool,
    /// `subnet.env`.
    pub subnet_file: PathBuf,
    /// Folder of the CNI configuration list.
    pub cni_conf_dir: PathBuf,
    /// Private keys.
    pub key_file: PathBuf,
    /// Where to serve health and metrics, if at all.
    pub healthz: Option<SocketAddr>,
    /// Unix socket of `gambeson status`.
    pub socket: PathBuf,
    /// Annotation prefix, e.g. `gambeson.io`.
    pub prefix: String,
    /// Pod bridge.
    pub bridge: String,
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

/// An option with a value that cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("{option}: {problem}; {remedy}")]
pub struct ConfigError {
    option: &'static str,
    problem: String,
    remedy: &'static str,
}

impl Options {
    /// Checks every value before anything is touched.
    ///
    /// # Errors
    /// The first value that cannot be used, with what the option takes.
    pub fn validate(self) -> Result<Config, ConfigError> {
        let node = self.node_identity()?;
        let cluster_networks = cluster_networks(&self.cluster_cidr)?;
        let underlay = self.underlay()?;
        if !(1..=MAX_PORT).contains(&self.port) {
            return Err(invalid(
                "--port",
                format!("{} leaves no room for the four session ports", self.port),
                "give a port from 1 to 65529",
            ));
        }
        let healthz_ip: IpAddr = parse("--healthz-ip", &self.healthz_ip, "give an IP address")?;
        check_prefix(&self.annotation_prefix)?;
        check_interface_name("--bridge", &self.bridge)?;
        for (option, path) in [
            ("--subnet-file", &self.subnet_file),
            ("--cni-conf-dir", &self.cni_conf_dir),
            ("--key-file", &self.key_file),
            ("--socket", &self.socket),
        ] {
            if !path.is_absolute() {
                let problem = format!("\"{}\" is not an absolute path", path.display());
                return Err(invalid(option, problem, "give a path that starts with /"));
            }
        }
        Ok(Config {
            kubeconfig: self.kubeconfig,
            node,
            cluster_networks,
            underlay,
            port: self.port,
            wireguard: self.wireguard,
            transports: transports(&self.transports)?,
            ip_masq: self.ip_masq,
            forward_rules: self.iptables_forward_rules,
            subnet_file: self.subnet_file,
            cni_conf_dir: self.cni_conf_dir,
            key_file: self.key_file,
            healthz: (self.healthz_port != 0)
                .then(|| SocketAddr::new(healthz_ip, self.healthz_port)),
            socket: self.socket,
            prefix: self.annotation_prefix,
            bridge: self.bridge,
        })
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

fn invalid(option: &'static str, problem: String, remedy: &'static str) -> ConfigError {
    ConfigError { option, problem, remedy }
}

fn parse<T: std::str::FromStr>(
    option: &'static str,
    value: &str,
    remedy: &'static str,
) -> Result<T, ConfigError> {
    value.parse().map_err(|_| invalid(option, format!("\"{value}\" cannot be used"), remedy))
}

fn can_be_sent_to(address: IpAddr) -> bool {
    let broadcast = matches!(address, IpAddr::V4(v4) if v4.is_broadcast());
    !(address.is_unspecified() || address.is_loopback() || address.is_multicast() || broadcast)
}

fn cluster_networks(given: &[String]) -> Result<BTreeSet<IpNet>, ConfigError> {
    const OPTION: &str = "--cluster-cidr";
    const REMEDY: &str = "give the cluster's pod networks, for example 10.244.0.0/16 or \
                          10.244.0.0/16,fd00:10:244::/48";
    let mut networks = BTreeSet::new();
    for text in given.iter().map(|t| t.trim()).filter(|t| !t.is_empty()) {
        let network: IpNet = parse(OPTION, text, REMEDY)?;
        if network.prefix_len() == 0 {
            return Err(invalid(OPTION, format!("{text} is every address"), REMEDY));
        }
        if let Some(what) = never_for_pods(&network) {
            return Err(invalid(OPTION, format!("{text} overlaps {what}"), REMEDY));
        }
        if network.trunc() != network {
            let problem = format!("{text} has host bits set, the network is {}", network.trunc());
            return Err(invalid(OPTION, problem, REMEDY));
        }
        networks.insert(network);
    }
    let v4 = networks.iter().filter(|n| matches!(n, IpNet::V4(_))).count();
    let v6 = networks.len() - v4;
    if networks.is_empty() {
        return Err(invalid(OPTION, "not given".to_owned(), REMEDY));
    }
    if v4 > 1 || v6 > 1 {
        return Err(invalid(OPTION, "more than one network of a family".to_owned(), REMEDY));
    }
    Ok(networks)
}

/// Addresses that mean something else on every host, if the network has any.
fn never_for_pods(network: &IpNet) -> Option<&'static str> {
    let reserved = [
        ("0.0.0.0/8", "the unspecified addresses (0.0.0.0/8)"),
        ("127.0.0.0/8", "the loopback network (127.0.0.0/8)"),
        ("169.254.0.0/16", "the link-local network (169.254.0.0/16)"),
        ("224.0.0.0/3", "multicast and reserved addresses (224.0.0.0/3)"),
        ("::/127", "the loopback address (::1)"),
        ("fe80::/10", "the link-local network (fe80::/10)"),
        ("ff00::/8", "multicast addresses (ff00::/8)"),
    ];
    let overlaps = |text: &str| text.parse().is_ok_and(|other| overlap(&other, network));
    reserved.into_iter().find(|(text, _)| overlaps(text)).map(|(_, what)| what)
}

fn transports(given: &[String]) -> Result<BTreeSet<Transport>, ConfigError> {
    const OPTION: &str = "--transports";
    const REMEDY: &str = "give wireguard";
    let mut transports = BTreeSet::new();
    for text in given.iter().map(|t| t.trim()).filter(|t| !t.is_empty()) {
        match text {
            "wireguard" => transports.insert(Transport::Wireguard),
            "host-gw" | "vxlan" => {
                let problem = format!("{text} is not supported by this version");
                return Err(invalid(OPTION, problem, REMEDY));
            }
            _ => return Err(invalid(OPTION, format!("unknown transport \"{text}\""), REMEDY)),
        };
    }
    if transports.is_empty() {
        return Err(invalid(OPTION, "empty".to_owned(), REMEDY));
    }
    Ok(transports)
}

/// A DNS-1123 subdomain: what names a Node, a pod, a namespace and an annotation's prefix.
fn is_dns_subdomain(name: &str) -> bool {
    let alphanumeric = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    name.len() <= 253
        && name.split('.').all(|label| {
            let bytes = label.as_bytes();
            bytes.first().is_some_and(|b| alphanumeric(*b))
                && bytes.last().is_some_and(|b| alphanumeric(*b))
                && bytes.iter().all(|b| alphanumeric(*b) || *b == b'-')
        })
}

fn checked_node_name(option: &'static str, name: String) -> Result<String, ConfigError> {
    if is_dns_subdomain(&name) {
        return Ok(name);
    }
    let problem = format!("\"{name}\" cannot be the name of a Kubernetes object");
    Err(invalid(option, problem, "give the name as `kubectl get nodes` shows it"))
}

fn check_prefix(prefix: &str) -> Result<(), ConfigError> {
    // "config." is put before it, and the whole may have 253 characters.
    if is_dns_subdomain(prefix) && prefix.contains('.') && prefix.len() <= 246 {
        return Ok(());
    }
    let problem = format!("\"{prefix}\" is not a domain");
    Err(invalid("--annotation-prefix", problem, "give one such as gambeson.io"))
}

pub(crate) fn check_interface_name(option: &'static str, name: &str) -> Result<(), ConfigError> {
    let fits = (1..=INTERFACE_NAME_MAX).contains(&name.len()) && name != "." && name != "..";
    let clean = name.bytes().all(|b| b.is_ascii_graphic() && !matches!(b, b'/' | b':' | b'"'));
    if fits && clean {
        return Ok(());
    }
    let problem = format!("\"{name}\" cannot be the name of a network interface");
    Err(invalid(option, problem, "give up to 15 characters, for example cni0"))
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
        assert_eq!(config.transports, BTreeSet::from([Transport::Wireguard]));
        assert!(!config.ip_masq && config.forward_rules);
    }

    #[test]
    fn flags_can_be_switched_like_flannels() {
        assert!(validate(&["--ip-masq"]).unwrap().ip_masq);
        assert!(!validate(&["--ip-masq=false"]).unwrap().ip_masq);
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
            (&["--transports=wireguard,vxlan"], "vxlan is not supported by this version"),
            (&["--transports=carrier-pigeon"], "unknown transport"),
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
    fn the_pod_identifies_the_node() {
        let line = ["agent", "--cluster-cidr=10.244.0.0/16", "--pod-name=a", "--pod-namespace=b"];
        let config = Cli::try_parse_from(line).unwrap().options.validate().unwrap();
        let pod = NodeIdentity::Pod { namespace: "b".into(), name: "a".into() };
        assert_eq!(config.node, pod);
        let error = Cli::try_parse_from(&line[..3]).unwrap().options.validate().unwrap_err();
        assert!(error.to_string().contains("--pod-namespace"), "{error}");
    }
}
