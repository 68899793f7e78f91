//! Kernel settings below `/proc/sys`, in the network namespace of the calling thread.

use std::collections::BTreeMap;
use std::path::Path;
use std::{fs, io};

use gambeson_mesh::desired::Sysctl;
use gambeson_mesh::session::DeviceName;

use super::ApplyError;

/// Reads the global settings, those of each device in `devices`, and those of the bridge. A
/// file that does not exist (no IPv6, a device that just went) is left out.
pub(super) fn observe(
    devices: impl Iterator<Item = DeviceName>,
    bridge: &str,
    proc_sys: &Path,
) -> Result<BTreeMap<Sysctl, String>, ApplyError> {
    let mut values = BTreeMap::new();
    let global = [Sysctl::Ipv4Forward, Sysctl::Ipv6Forward];
    let of_device = |device| {
        [Sysctl::RpFilter(device), Sysctl::Forwarding(device), Sysctl::DisableIpv6(device)]
    };
    let of_bridge =
        [Sysctl::BridgeForwarding(bridge.to_owned()), Sysctl::BridgeDisableIpv6(bridge.to_owned())];
    for sysctl in global.into_iter().chain(devices.flat_map(of_device)).chain(of_bridge) {
        // Procfs answers from memory: no need to leave the thread, whose namespace counts.
        match fs::read_to_string(proc_sys.join(sysctl.path())) {
            Ok(text) => {
                values.insert(sysctl, text.trim().to_owned());
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(source) => {
                let path = proc_sys.join(sysctl.path());
                return Err(ApplyError::ReadSysctl { path, source });
            }
        }
    }
    Ok(values)
}

/// Writes one setting.
pub(super) fn write(sysctl: &Sysctl, value: &str, proc_sys: &Path) -> Result<(), ApplyError> {
    let path = proc_sys.join(sysctl.path());
    match fs::write(&path, value) {
        // A kernel without IPv6 has nothing to enable; the address that is missing is said.
        Err(error)
            if error.kind() == io::ErrorKind::NotFound
                && matches!(sysctl, Sysctl::DisableIpv6(_)) =>
        {
            Ok(())
        }
        result => result.map_err(|source| ApplyError::WriteSysctl {
            path,
            value: value.to_owned(),
            source,
        }),
    }
}
