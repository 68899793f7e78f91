//! Names of annotations, without the prefix, as [`super::NodeRecord`] keys them.

/// Base64 X25519 key of the generation in use.
pub const PUBLIC_KEY: &str = "public-key";
/// Generation of [`PUBLIC_KEY`]; only ever grows.
pub const KEY_GENERATION: &str = "key-generation";
/// Key of the next generation, only during a rotation.
pub const NEXT_PUBLIC_KEY: &str = "next-public-key";
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
/// What the names of annotations written by people start with.
pub const CONFIG: &str = "config/";
/// What their prefix starts with.
pub const CONFIG_PREFIX: &str = "config.";

/// The whole key of an annotation, as a Node has it.
pub fn key(prefix: &str, name: &str) -> String {
    match name.strip_prefix(CONFIG) {
        Some(name) => format!("{CONFIG_PREFIX}{prefix}/{name}"),
        None => format!("{prefix}/{name}"),
    }
}
