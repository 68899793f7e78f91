//! `agent -> /run/flannel/subnet.env -> CNI plugin`
//!
//! The file in which the agent tells the CNI plugin this node's share of the pod network,
//! in Flannel's format (`WriteSubnetFile` in Flannel's `pkg/subnet/subnet.go`).

use std::fmt::Write as _;
use std::fs;
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use ipnet::IpNet;
use thiserror::Error;

use crate::files;

/// Where the file is unless configured otherwise.
pub const DEFAULT_PATH: &str = "/run/flannel/subnet.env";

const MODE: u32 = 0o644;
const NETWORK: &str = "FLANNEL_NETWORK";
const SUBNET: &str = "FLANNEL_SUBNET";
const IPV6_NETWORK: &str = "FLANNEL_IPV6_NETWORK";
const IPV6_SUBNET: &str = "FLANNEL_IPV6_SUBNET";
const MTU: &str = "FLANNEL_MTU";
const IPMASQ: &str = "FLANNEL_IPMASQ";

/// The contents of subnet.env.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SubnetEnv {
    /// The cluster's pod networks, IPv4 before IPv6.
    pub networks: Vec<IpNet>,
    /// This node's gateway address in its pod CIDR, with the prefix length of that pod CIDR;
    /// at most one per family, IPv4 before IPv6.
    pub subnets: Vec<IpNet>,
    /// MTU of pod interfaces, in bytes.
    pub mtu: u32,
    /// Whether the agent masquerades what leaves the pod network.
    pub ip_masq: bool,
}

/// Why subnet.env cannot be used. Each message names the file and where to look.
#[derive(Debug, Error)]
pub enum SubnetEnvError {
    /// There is no file.
    #[error(
        "{} does not exist yet. The Gambeson agent (in a mixed cluster also flanneld) on this \
         node writes it once the node has a pod CIDR and the network is in place. Look at the \
         log of the agent on this node, `gambeson status`, and `kubectl get node -o yaml` for \
         spec.podCIDRs", path.display()
    )]
    Missing {
        /// The file.
        path: PathBuf,
    },
    /// The file is there and cannot be read.
    #[error("cannot read {}, which the Gambeson agent on this node writes", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The file does not say what it must.
    #[error(
        "{} is corrupt: {problem}. The Gambeson agent on this node writes the file: remove it \
         and the agent writes it again within 30 s; if it stays away, look at the agent's log",
        path.display()
    )]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        problem: ParseError,
    },
    /// The file cannot be written.
    #[error("cannot write {}: check that its directory is writable and not full", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
}

/// What is wrong with the text of a subnet.env.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum ParseError {
    /// A line is not an assignment.
    #[error("line {line} is not KEY=VALUE")]
    NotAnAssignment {
        /// Counted from 1.
        line: usize,
    },
    /// A key has a value of the wrong kind.
    #[error("{key} on line {line} is {value:?}, where {expected} is expected")]
    Value {
        /// The key.
        key: &'static str,
        /// Counted from 1.
        line: usize,
        /// What it is, cut after 64 characters.
        value: String,
        /// What it should be.
        expected: &'static str,
    },
    /// A key is assigned twice.
    #[error("{key} appears again on line {line}")]
    Twice {
        /// The key.
        key: &'static str,
        /// Counted from 1.
        line: usize,
    },
    /// A key is not there.
    #[error("{0} is missing")]
    Absent(&'static str),
}

/// A pod CIDR has no room for a gateway address.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("pod CIDR {0} has no second address for the gateway: /30 (IPv6: /126) or larger is needed")]
pub struct TooSmall(pub IpNet);

impl SubnetEnv {
    /// What the agent publishes for these pod CIDRs: gateways are the first address + 1.
    /// Of several pod CIDRs of one family the first counts, as with Flannel.
    ///
    /// # Errors
    /// [`TooSmall`] when a pod CIDR has fewer than four addresses.
    pub fn new(
        networks: &[IpNet],
        pod_cidrs: &[IpNet],
        mtu: u32,
        ip_masq: bool,
    ) -> Result<Self, TooSmall> {
        let mut subnets = Vec::new();
        for is_family in [is_ipv4, is_ipv6] {
            if let Some(cidr) = pod_cidrs.iter().find(|cidr| is_family(cidr)) {
                subnets.push(gateway(cidr)?);
            }
        }
        let networks = networks.iter().map(IpNet::trunc);
        let (mut sorted, ipv6): (Vec<_>, Vec<_>) = networks.partition(is_ipv4);
        sorted.extend(ipv6);
        Ok(Self { networks: sorted, subnets, mtu, ip_masq })
    }

    /// Reads the file.
    ///
    /// # Errors
    /// [`SubnetEnvError::Missing`], [`SubnetEnvError::Read`] or [`SubnetEnvError::Corrupt`].
    pub fn read(path: &Path) -> Result<Self, SubnetEnvError> {
        let bytes = fs::read(path).map_err(|source| match source.kind() {
            io::ErrorKind::NotFound => SubnetEnvError::Missing { path: path.to_owned() },
            _ => SubnetEnvError::Read { path: path.to_owned(), source },
        })?;
        Self::parse(&String::from_utf8_lossy(&bytes))
            .map_err(|problem| SubnetEnvError::Corrupt { path: path.to_owned(), problem })
    }

    /// Writes the file in one step with mode 0644, unless it says the same already. Returns
    /// whether it wrote.
    ///
    /// # Errors
    /// [`SubnetEnvError::Write`]; an old file is then still there, whole.
    pub fn write(&self, path: &Path) -> Result<bool, SubnetEnvError> {
        let text = self.render();
        if files::holds(path, text.as_bytes(), MODE) {
            return Ok(false);
        }
        let directory = path.parent().unwrap_or(Path::new("/"));
        files::create_directory(directory, 0o755)
            .and_then(|()| files::write_atomic(path, text.as_bytes(), MODE))
            .map_err(|source| SubnetEnvError::Write { path: path.to_owned(), source })?;
        Ok(true)
    }

    /// The text of the file. Unknown keys are accepted, known ones must be right.
    ///
    /// # Errors
    /// [`ParseError`], naming the line and the key.
    pub fn parse(text: &str) -> Result<Self, ParseError> {
        let mut fields = Fields::default();
        for (index, line) in text.lines().enumerate() {
            let line = (index + 1, line.trim_end());
            if !line.1.is_empty() && !line.1.starts_with('#') {
                fields.assign(line)?;
            }
        }
        fields.finish()
    }

    /// The text of the file, as Flannel writes it.
    pub fn render(&self) -> String {
        let mut text = String::new();
        self.render_family(&mut text, NETWORK, SUBNET, is_ipv4);
        self.render_family(&mut text, IPV6_NETWORK, IPV6_SUBNET, is_ipv6);
        // Writing to a String cannot fail.
        let _ = writeln!(text, "{MTU}={}", self.mtu);
        let _ = writeln!(text, "{IPMASQ}={}", self.ip_masq);
        text
    }

    fn render_family(
        &self,
        text: &mut String,
        network_key: &str,
        subnet_key: &str,
        is_family: fn(&IpNet) -> bool,
    ) {
        let networks: Vec<_> =
            self.networks.iter().filter(|net| is_family(net)).map(ToString::to_string).collect();
        let subnet = self.subnets.iter().find(|net| is_family(net));
        if let (Some(subnet), false) = (subnet, networks.is_empty()) {
            let _ = writeln!(text, "{network_key}={}", networks.join(","));
            let _ = writeln!(text, "{subnet_key}={subnet}");
        }
    }
}

#[derive(Default)]
struct Fields {
    ipv4_networks: Option<Vec<IpNet>>,
    ipv4_subnet: Option<IpNet>,
    ipv6_networks: Option<Vec<IpNet>>,
    ipv6_subnet: Option<IpNet>,
    mtu: Option<u32>,
    ip_masq: Option<bool>,
}

impl Fields {
    fn assign(&mut self, (line, text): (usize, &str)) -> Result<(), ParseError> {
        let (key, value) = text.split_once('=').ok_or(ParseError::NotAnAssignment { line })?;
        let at = Place { line, value };
        match key {
            NETWORK => at.set(&mut self.ipv4_networks, NETWORK, IPV4_NETWORKS, ipv4_networks),
            SUBNET => at.set(&mut self.ipv4_subnet, SUBNET, IPV4_SUBNET_HINT, ipv4),
            IPV6_NETWORK => {
                at.set(&mut self.ipv6_networks, IPV6_NETWORK, IPV6_NETWORKS, ipv6_networks)
            }
            IPV6_SUBNET => at.set(&mut self.ipv6_subnet, IPV6_SUBNET, IPV6_SUBNET_HINT, ipv6),
            MTU => at.set(&mut self.mtu, MTU, "a number of bytes from 68 to 65535", mtu),
            IPMASQ => at.set(&mut self.ip_masq, IPMASQ, "true or false", |v| v.parse().ok()),
            _ => Ok(()),
        }
    }

    fn finish(self) -> Result<SubnetEnv, ParseError> {
        let family = |networks: Option<Vec<IpNet>>, subnet: Option<IpNet>, keys: [_; 2]| match (
            networks, subnet,
        ) {
            (Some(networks), Some(subnet)) => Ok(Some((networks, subnet))),
            (None, None) => Ok(None),
            (None, Some(_)) => Err(ParseError::Absent(keys[0])),
            (Some(_), None) => Err(ParseError::Absent(keys[1])),
        };
        let ipv4 = family(self.ipv4_networks, self.ipv4_subnet, [NETWORK, SUBNET])?;
        let ipv6 = family(self.ipv6_networks, self.ipv6_subnet, [IPV6_NETWORK, IPV6_SUBNET])?;
        if ipv4.is_none() && ipv6.is_none() {
            return Err(ParseError::Absent("FLANNEL_SUBNET or FLANNEL_IPV6_SUBNET"));
        }
        let (networks, subnets): (Vec<_>, Vec<_>) = ipv4.into_iter().chain(ipv6).unzip();
        Ok(SubnetEnv {
            networks: networks.concat(),
            subnets,
            mtu: self.mtu.ok_or(ParseError::Absent(MTU))?,
            ip_masq: self.ip_masq.ok_or(ParseError::Absent(IPMASQ))?,
        })
    }
}

const IPV4_NETWORKS: &str = "IPv4 networks like 10.244.0.0/16, separated by commas,";
const IPV4_SUBNET_HINT: &str = "an IPv4 gateway and prefix length like 10.244.1.1/24";
const IPV6_NETWORKS: &str = "IPv6 networks like fd00:10:244::/48, separated by commas,";
const IPV6_SUBNET_HINT: &str = "an IPv6 gateway and prefix length like fd00:10:244:1::1/64";

#[derive(Clone, Copy)]
struct Place<'a> {
    line: usize,
    value: &'a str,
}

impl Place<'_> {
    fn set<T>(
        self,
        field: &mut Option<T>,
        key: &'static str,
        expected: &'static str,
        parse: impl Fn(&str) -> Option<T>,
    ) -> Result<(), ParseError> {
        let Self { line, value } = self;
        if field.is_some() {
            return Err(ParseError::Twice { key, line });
        }
        let parsed = parse(value).ok_or_else(|| ParseError::Value {
            key,
            line,
            value: value.chars().take(64).collect(),
            expected,
        })?;
        *field = Some(parsed);
        Ok(())
    }
}

fn mtu(value: &str) -> Option<u32> {
    value.parse().ok().filter(|mtu| (68..=65535).contains(mtu))
}

fn ipv4(value: &str) -> Option<IpNet> {
    value.parse().ok().filter(is_ipv4)
}

fn ipv6(value: &str) -> Option<IpNet> {
    value.parse().ok().filter(is_ipv6)
}

fn ipv4_networks(value: &str) -> Option<Vec<IpNet>> {
    networks(value, ipv4)
}

fn ipv6_networks(value: &str) -> Option<Vec<IpNet>> {
    networks(value, ipv6)
}

// Flannel's plugin takes several networks and drops the repeated ones.
fn networks(value: &str, parse: fn(&str) -> Option<IpNet>) -> Option<Vec<IpNet>> {
    let mut found = Vec::new();
    for text in value.split(',') {
        let network = parse(text)?.trunc();
        if !found.contains(&network) {
            found.push(network);
        }
    }
    Some(found)
}

fn is_ipv4(net: &IpNet) -> bool {
    matches!(net, IpNet::V4(_))
}

fn is_ipv6(net: &IpNet) -> bool {
    matches!(net, IpNet::V6(_))
}

fn gateway(pod_cidr: &IpNet) -> Result<IpNet, TooSmall> {
    let too_small = || TooSmall(*pod_cidr);
    if pod_cidr.max_prefix_len() - pod_cidr.prefix_len() < 2 {
        return Err(too_small());
    }
    let address: IpAddr = match pod_cidr.network() {
        IpAddr::V4(base) => {
            u32::from(base).checked_add(1).map(|a| IpAddr::V4(a.into())).ok_or_else(too_small)?
        }
        IpAddr::V6(base) => {
            u128::from(base).checked_add(1).map(|a| IpAddr::V6(a.into())).ok_or_else(too_small)?
        }
    };
    IpNet::new(address, pod_cidr.prefix_len()).map_err(|_| too_small())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use proptest::prelude::*;

    use super::*;

    const DUAL: &str = "FLANNEL_NETWORK=10.244.0.0/16\n\
                        FLANNEL_SUBNET=10.244.1.1/24\n\
                        FLANNEL_IPV6_NETWORK=fd00:10:244::/48\n\
                        FLANNEL_IPV6_SUBNET=fd00:10:244:1::1/64\n\
                        FLANNEL_MTU=1440\n\
                        FLANNEL_IPMASQ=true\n";

    fn nets(texts: &[&str]) -> Vec<IpNet> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    fn dual() -> SubnetEnv {
        let networks = nets(&["fd00:10:244::/48", "10.244.0.0/16"]);
        let pod_cidrs = nets(&["fd00:10:244:1::/64", "10.244.1.0/24"]);
        SubnetEnv::new(&networks, &pod_cidrs, 1440, true).unwrap()
    }

    #[test]
    fn renders_flannels_bytes() {
        assert_eq!(dual().render(), DUAL);
        let v4 = SubnetEnv::new(&nets(&["10.244.0.0/16"]), &nets(&["10.244.1.0/24"]), 1420, false);
        assert_eq!(
            v4.unwrap().render(),
            "FLANNEL_NETWORK=10.244.0.0/16\nFLANNEL_SUBNET=10.244.1.1/24\n\
             FLANNEL_MTU=1420\nFLANNEL_IPMASQ=false\n"
        );
    }

    #[test]
    fn parses_what_it_renders_and_unknown_keys() {
        assert_eq!(SubnetEnv::parse(DUAL).unwrap(), dual());
        let more = format!("# comment\n\nSOMETHING=else\n{DUAL}FLANNEL_FUTURE=1\n");
        assert_eq!(SubnetEnv::parse(&more).unwrap(), dual());
    }

    #[test]
    fn takes_several_networks_and_drops_repeated_ones() {
        let text = DUAL.replace("10.244.0.0/16", "10.244.0.0/16,10.9.0.0/16,10.244.0.0/16");
        let parsed = SubnetEnv::parse(&text).unwrap();
        assert_eq!(parsed.networks, nets(&["10.244.0.0/16", "10.9.0.0/16", "fd00:10:244::/48"]));
    }

    #[test]
    fn refuses_wrong_values_by_name() {
        for (from, to, message) in [
            ("10.244.1.1/24", "10.244.1.1", "FLANNEL_SUBNET on line 2"),
            ("10.244.1.1/24", "fd00::1/64", "FLANNEL_SUBNET on line 2"),
            ("1440", "many", "FLANNEL_MTU on line 5"),
            ("1440", "67", "FLANNEL_MTU on line 5"),
            ("=true", "=yes", "FLANNEL_IPMASQ on line 6"),
            ("FLANNEL_MTU=1440\n", "", "FLANNEL_MTU is missing"),
            ("FLANNEL_SUBNET=10.244.1.1/24\n", "", "FLANNEL_SUBNET is missing"),
            ("FLANNEL_MTU=", "FLANNEL_MTU ", "line 5 is not KEY=VALUE"),
            ("FLANNEL_IPMASQ=true\n", "FLANNEL_MTU=1\n", "FLANNEL_MTU appears again on line 6"),
        ] {
            let text = DUAL.replace(from, to);
            let error = SubnetEnv::parse(&text).unwrap_err().to_string();
            assert!(error.contains(message), "{error}");
        }
    }

    #[test]
    fn refuses_a_pod_cidr_without_room() {
        for cidr in ["10.244.1.0/31", "255.255.255.255/32", "fd00::/127"] {
            let cidrs = nets(&[cidr]);
            assert_eq!(SubnetEnv::new(&[], &cidrs, 1440, true), Err(TooSmall(cidrs[0])));
        }
    }

    #[test]
    fn writes_once_with_mode_0644_and_repairs() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("flannel/subnet.env");
        assert!(dual().write(&path).unwrap());
        assert!(!dual().write(&path).unwrap());
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o7777, 0o644);
        assert_eq!(SubnetEnv::read(&path).unwrap(), dual());
        fs::write(&path, "FLANNEL_").unwrap();
        assert!(dual().write(&path).unwrap());
        assert_eq!(fs::read_to_string(&path).unwrap(), DUAL);
    }

    #[test]
    fn missing_and_corrupt_files_say_which_file_who_writes_it_and_where_to_look() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("subnet.env");
        let missing = SubnetEnv::read(&path).unwrap_err();
        assert!(matches!(missing, SubnetEnvError::Missing { .. }));
        fs::write(&path, b"FLANNEL_MTU=\xff\xfe\n").unwrap();
        let corrupt = SubnetEnv::read(&path).unwrap_err();
        assert!(matches!(corrupt, SubnetEnvError::Corrupt { .. }));
        for error in [missing, corrupt] {
            let text = error.to_string();
            for part in [path.to_str().unwrap(), "Gambeson agent", "log"] {
                assert!(text.contains(part), "{text}");
            }
        }
    }

    proptest! {
        #[test]
        fn no_text_panics(text in "(FLANNEL_[A-Z0-9_]{3,12}=[ -~]{0,30}\n|\\PC*\n){0,8}") {
            let _ = SubnetEnv::parse(&text);
        }

        #[test]
        fn round_trips(
            base in any::<u32>(), len in 8u8..=30, wide in any::<u128>(), wide_len in 8u8..=126,
            mtu in 68u32..=65535, ip_masq: bool, families in 1usize..=3,
        ) {
            let ipv4: IpNet = IpNet::new(IpAddr::V4(base.into()), len).unwrap().trunc();
            let ipv6: IpNet = IpNet::new(IpAddr::V6(wide.into()), wide_len).unwrap().trunc();
            let both = [ipv4, ipv6];
            let cidrs = [&both[..1], &both[1..], &both[..]][families - 1];
            let env = SubnetEnv::new(cidrs, cidrs, mtu, ip_masq).unwrap();
            prop_assert_eq!(SubnetEnv::parse(&env.render()).unwrap(), env);
        }
    }
}
