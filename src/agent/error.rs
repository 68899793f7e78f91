use std::io;

use gambeson_keys::KeyStoreError;
use gambeson_mesh::session::DeviceName;

use crate::apply::ApplyError;
use crate::cluster::ConnectError;
use crate::config::ConfigError;
use crate::exit::Exit;
use crate::http::HttpError;
use crate::status::SocketError;

/// Why the agent cannot start or go on. The data plane and the guard stay as they are.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// An option has a value that cannot be used.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A cluster network is not the pods' alone.
    #[error(
        "--cluster-cidr: {0}; the guard would cut this node off, so nothing was touched; give \
         the cluster's pod networks, which no host may use"
    )]
    Overlap(String),
    /// The key store was refused.
    #[error(transparent)]
    Keys(#[from] KeyStoreError),
    /// The cluster configuration cannot be used.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// No status socket.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// No health and metrics.
    #[error(transparent)]
    Http(#[from] HttpError),
    /// The kernel refused something that the agent cannot do without.
    #[error(transparent)]
    Kernel(#[from] ApplyError),
    /// The process's capabilities cannot be read.
    #[error("cannot read /proc/self/status")]
    ReadCapabilities(#[source] io::Error),
    /// The process may not configure the network.
    #[error(
        "missing capability CAP_NET_ADMIN; run as root, or add NET_ADMIN to the container's \
         capabilities"
    )]
    NoNetAdmin,
    /// No TUN device can be made, and a userspace device is to be used.
    #[error(
        "cannot open /dev/net/tun, which a userspace device needs; load it with `modprobe tun`, \
         give the container /dev/net/tun, or use --wireguard kernel"
    )]
    NoTun(#[source] io::Error),
    /// `--wireguard kernel` on a kernel without it.
    #[error(
        "this kernel cannot make a link of type wireguard; load it with `modprobe wireguard`, or \
         use --wireguard userspace"
    )]
    NoKernelWireGuard,
    /// A userspace device on a host in FIPS mode.
    #[error(
        "this host is in FIPS mode, where a userspace WireGuard device is not allowed; load the \
         kernel module with `modprobe wireguard`, or give --allow-userspace-in-fips if whoever \
         has to approve it does"
    )]
    Fips,
    /// A UDP port is taken.
    #[error(
        "UDP port {port} is taken by another program; find it with `ss -lunp sport = :{port}`, or \
         choose another --port"
    )]
    PortTaken {
        /// The port.
        port: u16,
        /// What binding to it failed with.
        #[source]
        source: io::Error,
    },
    /// A link with one of our names was made by somebody else.
    #[error(
        "link {0} was not made by gambeson (it lacks the alias `gambeson`) and is left alone; \
         rename or delete it (`ip link delete {0}`)"
    )]
    ForeignDevice(DeviceName),
    /// A part of the agent ended that never should.
    #[error("the {task} task ended{}", .why.as_deref().map(|w| format!(": {w}")).unwrap_or_default())]
    TaskEnded {
        /// What it does.
        task: &'static str,
        /// What it panicked or failed with.
        why: Option<String>,
    },
}

impl AgentError {
    /// The exit code that tells what kind of help is needed.
    pub fn exit(&self) -> Exit {
        match self {
            Self::Config(_) | Self::Overlap(_) => Exit::Usage,
            Self::Keys(_) => Exit::KeyStore,
            Self::Kernel(error) => error.exit().unwrap_or(Exit::Failure),
            Self::NoNetAdmin => Exit::NoPermission,
            Self::NoTun(_) => Exit::NoTun,
            Self::PortTaken { .. } => Exit::PortTaken,
            Self::ForeignDevice(_) => Exit::ForeignDevice,
            Self::Connect(_)
            | Self::Socket(_)
            | Self::Http(_)
            | Self::ReadCapabilities(_)
            | Self::NoKernelWireGuard
            | Self::Fips
            | Self::TaskEnded { .. } => Exit::Failure,
        }
    }
}
