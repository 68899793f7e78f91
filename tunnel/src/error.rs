//! Why a tunnel cannot start or go on.

use std::io;
use std::path::PathBuf;

/// Why a tunnel could not be started, or ended other than as asked.
#[derive(Debug, thiserror::Error)]
pub enum TunnelError {
    /// Not a name that a network device can have.
    #[error("`{name}` is not a device name: 1 to 15 bytes, without `/`, `:`, `%` and blanks")]
    InvalidName {
        /// The name asked for.
        name: String,
    },
    /// There is no TUN driver.
    #[error(
        "no TUN driver: /dev/net/tun cannot be opened; load it with `modprobe tun`, or give the container the device"
    )]
    NoTun {
        /// Of the open.
        #[source]
        source: io::Error,
    },
    /// A capability is missing.
    #[error("no permission to {operation}: {capability} is missing")]
    NoPermission {
        /// What was not allowed.
        operation: &'static str,
        /// The capability that allows it.
        capability: &'static str,
        /// Of the call.
        #[source]
        source: io::Error,
    },
    /// Another device has the name.
    #[error(
        "there is a network device `{name}` already, which this program did not make; remove it with `ip link del {name}` or choose another name"
    )]
    NameTaken {
        /// The name asked for.
        name: String,
    },
    /// The TUN device could not be made or set up.
    #[error("cannot {operation} of the TUN device `{name}`")]
    Tun {
        /// What failed.
        operation: &'static str,
        /// The device.
        name: String,
        /// Of the call.
        #[source]
        source: io::Error,
    },
    /// Another process answers on the configuration socket.
    #[error("another process serves {}; end it first", path.display())]
    SocketInUse {
        /// The socket.
        path: PathBuf,
    },
    /// The configuration socket could not be made.
    #[error("cannot {operation} {}", path.display())]
    Socket {
        /// What failed.
        operation: &'static str,
        /// The socket or its directory.
        path: PathBuf,
        /// Of the call.
        #[source]
        source: io::Error,
    },
    /// A system call that does not fail for a reason of the operator's.
    #[error("cannot {operation}")]
    System {
        /// What failed.
        operation: &'static str,
        /// Of the call.
        #[source]
        source: io::Error,
    },
    /// A thread ended in a panic.
    #[error("the thread `{thread}` ended by a fault; the tunnel has stopped, please report this")]
    ThreadDied {
        /// Its name.
        thread: &'static str,
    },
}

impl TunnelError {
    pub(crate) fn system(operation: &'static str) -> impl Fn(io::Error) -> Self {
        move |source| Self::System { operation, source }
    }
}
