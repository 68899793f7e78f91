//! Names of annotations, without the prefix, as [`super::NodeRecord`] keys them.

/// Base64 X25519 key of the generation in use.
pub const PUBLIC_KEY: &str = "public-key";
/// Generation of [`PUBLIC_KEY`]; only ever grows.
pub const KEY_GENERATION: &str = "key-generation";
/// Key of the next generation, only during a rotation.
pub const NEXT_PUBLIC_KEY: &str = "next-public-key";
/// Which of the cluster's secrets is in preshared keys of sessions of [`PUBLIC_KEY`].
pub const PSK_ID: &str = "psk-id";
/// The same of [`NEXT_PUBLIC_KEY`].
pub const NEXT_PSK_ID: &str = "next-psk-id";
/// IPv4 address that other nodes send to.
pub const ENDPOINT: &str = "endpoint";
/// IPv6 address that other nodes send to.
pub const ENDPOINT_V6: &str = "endpoint-v6";
/// Base UDP port.
pub const PORT: &str = "port";
/// Transports the node accepts, separated by commas.
pub const TRANSPORTS: &str = "transports";
/// Ethernet address of the VXLAN device over IPv4, when the node offers VXLAN.
pub const VTEP_MAC: &str = "vtep-mac";
/// Ethernet address of the VXLAN device over IPv6.
pub const VTEP_MAC_V6: &str = "vtep-mac-v6";
/// Inner MTU of the node in bytes.
pub const MTU: &str = "mtu";
/// An operator's IPv4 address in place of [`ENDPOINT`].
pub const CONFIG_ENDPOINT: &str = "config/endpoint";
/// An operator's IPv6 address in place of [`ENDPOINT_V6`].
pub const CONFIG_ENDPOINT_V6: &str = "config/endpoint-v6";
/// Seconds between keepalives on every session of the node; 0 or `off` for none.
pub const CONFIG_PERSISTENT_KEEPALIVE: &str = "config/persistent-keepalive";
/// A request for a new key: any value that was not there before.
pub const CONFIG_ROTATE: &str = "config/rotate";
/// What the names of annotations written by people start with.
pub const CONFIG: &str = "config/";
/// What their prefix starts with.
pub const CONFIG_PREFIX: &str = "config.";

/// What the names of Flannel's annotations start with, and their prefix.
pub const FLANNEL: &str = "flannel/";
/// Flannel's default `--kube-annotation-prefix`.
pub const FLANNEL_PREFIX: &str = "flannel.alpha.coreos.com";

/// Flannel's annotations.
pub mod flannel {
    /// `"true"` where Flannel takes its subnets from the Nodes.
    pub const KUBE_SUBNET_MANAGER: &str = "flannel/kube-subnet-manager";
    /// `vxlan`, `host-gw` or `wireguard`.
    pub const BACKEND_TYPE: &str = "flannel/backend-type";
    /// What peers need to know, as JSON; for IPv4, or for both families.
    pub const BACKEND_DATA: &str = "flannel/backend-data";
    /// The same for IPv6.
    pub const BACKEND_V6_DATA: &str = "flannel/backend-v6-data";
    /// IPv4 address that other nodes send to.
    pub const PUBLIC_IP: &str = "flannel/public-ip";
    /// IPv6 address that other nodes send to.
    pub const PUBLIC_IPV6: &str = "flannel/public-ipv6";
    /// An operator's in place of the former.
    pub const PUBLIC_IP_OVERWRITE: &str = "flannel/public-ip-overwrite";
    /// An operator's in place of the former.
    pub const PUBLIC_IPV6_OVERWRITE: &str = "flannel/public-ipv6-overwrite";
}

/// The whole key of an annotation, as a Node has it.
pub fn key(prefix: &str, name: &str) -> String {
    match (name.strip_prefix(CONFIG), name.strip_prefix(FLANNEL)) {
        (Some(name), _) => format!("{CONFIG_PREFIX}{prefix}/{name}"),
        (_, Some(name)) => format!("{FLANNEL_PREFIX}/{name}"),
        (None, None) => format!("{prefix}/{name}"),
    }
}
