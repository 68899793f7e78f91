//! `Mesh + Local -> Desired` for WireGuard over IPv4 and IPv6 underlays.

use crate::desired::Desired;
use crate::node::Local;
use crate::topology::Mesh;

/// Adds the devices, peers and routes of every peer that is reached over WireGuard.
pub fn desire(_mesh: &Mesh, _local: &Local, _desired: &mut Desired) {}
