//! The options of `gambeson agent`, as given. Names that Flannel or k3s has keep their meaning.

use std::path::PathBuf;
use std::time::Duration;

use gambeson_mesh::node::{DEFAULT_PREFIX, Transport};
use k8s_openapi::jiff::{Span, SpanRelativeTo};

use crate::cni::DEFAULT_BRIDGE;

/// Private keys of a node.
pub const DEFAULT_KEY_FILE: &str = "/var/lib/gambeson/keys.json";
/// Where the agent answers `gambeson status`.
pub const DEFAULT_SOCKET: &str = "/run/gambeson/agent.sock";

/// A rotation takes some seconds, and longer where a peer is away.
const SHORTEST_ROTATION: Duration = Duration::from_secs(10 * 60);

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

    /// Flannel's net-conf.json, for the networks, the port and the MTU that no option gives
    #[arg(
        long,
        visible_alias = "flannel-conf",
        env = "FLANNELD_NET_CONFIG_PATH",
        value_name = "FILE"
    )]
    pub net_config_path: Option<PathBuf>,

    /// Underlay interface, by name or address; the first that exists is used
    #[arg(
        long,
        visible_alias = "flannel-iface",
        env = "FLANNELD_IFACE",
        value_name = "NAME|IP",
        value_delimiter = ','
    )]
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

    /// Publish the addresses of the type ExternalIP that the Node has, as k3s does
    #[arg(long, env = "GAMBESON_EXTERNAL_IP")]
    pub flannel_external_ip: bool,

    /// Base UDP port, 51820 unless it is given; this port and +2, +4 and +6 are used
    #[arg(long, env = "GAMBESON_PORT", value_name = "PORT")]
    pub port: Option<u16>,

    /// MTU of the way between the nodes in bytes, where it is smaller than the interface's
    ///
    /// The pods' MTU is 60 bytes less, 80 over IPv6.
    #[arg(long, env = "GAMBESON_MTU", value_name = "BYTES")]
    pub mtu: Option<u32>,

    /// Who implements WireGuard
    ///
    /// `auto` keeps what a running device uses, else takes the kernel module where a
    /// `wireguard` link can be made, else a userspace device.
    #[arg(long, env = "GAMBESON_WIREGUARD", value_name = "MODE", default_value = "auto")]
    pub wireguard: WireGuardMode,

    /// Use a userspace device although the host is in FIPS mode
    ///
    /// Neither its ChaCha20-Poly1305 nor the kernel's is a validated module: ask whoever has to
    /// approve it first.
    #[arg(long, env = "GAMBESON_ALLOW_USERSPACE_IN_FIPS", hide_short_help = true)]
    pub allow_userspace_in_fips: bool,

    /// Transports this node accepts: wireguard, host-gw, vxlan; wireguard alone by default
    ///
    /// Each pair of nodes uses the best that both accept, in this order. host-gw and vxlan are
    /// not encrypted, and are never used unless both nodes name them.
    #[arg(long, env = "GAMBESON_TRANSPORTS", value_name = "LIST", value_delimiter = ',')]
    pub transports: Vec<String>,

    /// Transport by k3s's name for it, where neither --transports nor net-conf.json says
    ///
    /// `none` is what k3s is told so that it does not run Flannel itself, and means nothing here.
    #[arg(long, value_name = "BACKEND", hide_short_help = true)]
    pub flannel_backend: Option<K3sBackend>,

    /// Take k3s's places: its kubeconfig, its CNI folders and its default --cluster-cidr
    ///
    /// IPv4 is masqueraded, and IPv6 with --flannel-ipv6-masq, as k3s's own Flannel does.
    #[arg(long, env = "GAMBESON_K3S")]
    pub k3s: bool,

    /// Be Flannel to nodes that still run it, and take over what it left on this one
    ///
    /// Publishes Flannel's annotations beside our own for the backend in net-conf.json, and
    /// reads them of Nodes that Flannel drives. They are reached by that backend, if
    /// --transports or net-conf.json accepts it.
    #[arg(long, env = "GAMBESON_FLANNEL_COMPAT", requires = "net_config_path")]
    pub flannel_compat: bool,

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

    /// Masquerade IPv6 that leaves the pod networks
    #[arg(long, hide_short_help = true)]
    pub flannel_ipv6_masq: bool,

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

    /// Flannel's cni-conf.json, in place of the CNI configuration list of our own
    ///
    /// Its plugin of the type flannel becomes gambeson-cni; everything else stays.
    #[arg(
        long,
        visible_alias = "flannel-cni-conf",
        env = "GAMBESON_CNI_CONF_FILE",
        value_name = "FILE"
    )]
    pub cni_conf_file: Option<PathBuf>,

    /// Folder for the CNI configuration list, written once this node is ready: /etc/cni/net.d,
    /// unless it is given or --k3s
    #[arg(long, env = "GAMBESON_CNI_CONF_DIR", value_name = "DIR")]
    pub cni_conf_dir: Option<PathBuf>,

    /// Folder of the CNI plugins, to see which version of the specification they speak:
    /// /opt/cni/bin, unless it is given or --k3s
    #[arg(long, env = "GAMBESON_CNI_BIN_DIR", value_name = "DIR", hide_short_help = true)]
    pub cni_bin_dir: Option<PathBuf>,

    /// This node's private keys; made at first start, never replaced
    #[arg(
        long,
        env = "GAMBESON_KEY_FILE",
        value_name = "FILE",
        default_value = DEFAULT_KEY_FILE
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

    /// Where the kernel settings of this network namespace can be written
    ///
    /// In a container /proc/sys is read-only: give the folder at whose net/ the host's
    /// /proc/sys/net is mounted.
    #[arg(
        long,
        env = "GAMBESON_PROC_SYS",
        value_name = "DIR",
        default_value = "/proc/sys",
        hide_short_help = true
    )]
    pub proc_sys: PathBuf,

    /// Have userspace devices served by the supervisors with a socket in this folder
    ///
    /// Without it their processes are children of this one, which in a pod end with the pod.
    #[arg(long, env = "GAMBESON_TUNNEL_DIR", value_name = "DIR", hide_short_help = true)]
    pub tunnel_dir: Option<PathBuf>,

    /// Program that serves userspace devices, where the agent is a part of another program
    #[arg(long, value_name = "FILE", hide_short_help = true)]
    pub tunnel_program: Option<PathBuf>,

    /// Prefix of the Node annotations
    #[arg(
        long,
        env = "GAMBESON_ANNOTATION_PREFIX",
        value_name = "DOMAIN",
        default_value = DEFAULT_PREFIX,
        hide_short_help = true
    )]
    pub annotation_prefix: String,

    /// Be ready only where the API server keeps each agent to its own Node
    ///
    /// Without it a missing admission policy is a warning in `gambeson status`.
    #[arg(long, env = "GAMBESON_REQUIRE_ADMISSION")]
    pub require_admission: bool,

    /// Bridge that the CNI plugin attaches pods to
    #[arg(
        long,
        env = "GAMBESON_BRIDGE",
        value_name = "NAME",
        default_value = DEFAULT_BRIDGE,
        hide_short_help = true
    )]
    pub bridge: String,

    /// Replace this node's key when it is this old, e.g. 90d or 36h
    ///
    /// Each node does it up to a tenth of the time earlier, so that not all do at once.
    #[arg(long, env = "GAMBESON_ROTATE_EVERY", value_name = "TIME", value_parser = duration)]
    pub rotate_every: Option<Duration>,

    /// File with a secret of the cluster, of which each pair's preshared keys are made
    ///
    /// What `wg genpsk` prints, the same on every node. Another secret in it takes effect by a
    /// rotation of this node's key.
    #[arg(long, env = "GAMBESON_PSK_FILE", value_name = "FILE")]
    pub psk_file: Option<PathBuf>,

    /// End at once, as a crash would, at the step of a rotation that this file names
    #[arg(long, value_name = "FILE", hide = true)]
    pub crash_at: Option<PathBuf>,
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

/// `--flannel-backend`, by k3s's names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum K3sBackend {
    /// k3s runs no Flannel.
    None,
    /// VXLAN, in clear.
    Vxlan,
    /// Plain routes on one L2 segment.
    HostGw,
    /// WireGuard.
    WireguardNative,
}

/// A time as people write it: 90d, 36h, 1h 30m. Days have 24 hours.
fn duration(text: &str) -> Result<Duration, String> {
    let span: Span = text.parse().map_err(|_| "not a time such as 90d or 36h".to_owned())?;
    let whole = span.to_duration(SpanRelativeTo::days_are_24_hours());
    let time = whole.ok().and_then(|time| Duration::try_from(time).ok());
    time.filter(|time| *time >= SHORTEST_ROTATION).ok_or_else(|| {
        format!("not a time of {} minutes or more", SHORTEST_ROTATION.as_secs() / 60)
    })
}

impl K3sBackend {
    pub(super) fn transport(self) -> Option<Transport> {
        match self {
            Self::None => None,
            Self::Vxlan => Some(Transport::Vxlan),
            Self::HostGw => Some(Transport::HostGw),
            Self::WireguardNative => Some(Transport::Wireguard),
        }
    }
}
