//! Exit codes: a contract with scripts and unit files, shared by the errors of every layer.

/// Exit codes of `gambeson`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    /// Anything without a code of its own.
    Failure = 1,
    /// Wrong usage: the same code as for what the argument parser itself refuses.
    Usage = 2,
    /// The key store was refused.
    KeyStore = 3,
    /// A UDP port is taken.
    PortTaken = 4,
    /// No TUN device can be made.
    NoTun = 5,
    /// A capability is missing.
    NoPermission = 6,
    /// A device with our name belongs to somebody else.
    ForeignDevice = 7,
    /// A check does not hold: `lab verify`, `status --check`.
    CheckFailed = 8,
}
