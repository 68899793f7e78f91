//! Changes of WireGuard's own configuration, of which the kernel says nothing: `wg set` by
//! somebody else, and a tunnel process that no longer answers.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use gambeson_keys::Secrets;
use gambeson_mesh::desired::WireGuardDevice;
use gambeson_mesh::session::DeviceName;
use tokio::sync::watch;
use tokio::time::sleep;
use tracing::debug;

use crate::apply;

/// Time between two looks: with the pass that follows, damage is repaired within a second.
const SHORTEST_PAUSE: Duration = Duration::from_millis(400);
/// A look at very many peers takes its time: the watch takes a 200th of a processor at most.
const PAUSE_PER_LOOK: u32 = 200;
const LONGEST_PAUSE: Duration = Duration::from_secs(10);

/// The devices as they should be, or `None` while they are not all as they should.
pub(super) type Devices = Option<Arc<Meant>>;

/// Devices, and of which secrets their preshared keys may be made.
pub(super) type Meant = (BTreeMap<DeviceName, WireGuardDevice>, Secrets);

/// Counts up in `changed` whenever a device is not what it should be, once for each set of
/// devices that a pass has left behind. Never ends.
pub(super) async fn watch(mut devices: watch::Receiver<Devices>, changed: watch::Sender<u64>) {
    let mut pause = SHORTEST_PAUSE;
    loop {
        sleep(pause).await;
        let Some(wanted) = devices.borrow_and_update().clone() else { continue };
        let started = Instant::now();
        let Some(device) = first_changed(&wanted).await else {
            let rest = started.elapsed().saturating_mul(PAUSE_PER_LOOK);
            pause = rest.clamp(SHORTEST_PAUSE, LONGEST_PAUSE);
            continue;
        };
        debug!(%device, "changed by somebody else");
        changed.send_modify(|count| *count += 1);
        if devices.changed().await.is_err() {
            std::future::pending().await
        }
        // How long that took says nothing about what a look takes.
        pause = SHORTEST_PAUSE;
    }
}

async fn first_changed((devices, secrets): &Meant) -> Option<DeviceName> {
    for (name, device) in devices {
        if !apply::is_configured(*name, device, secrets).await {
            return Some(*name);
        }
    }
    None
}
