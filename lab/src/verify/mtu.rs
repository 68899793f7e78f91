//! The largest packet between every two nodes, to the byte, with DF set.

use std::io;
use std::net::IpAddr;

use super::{IpFamily, MtuResult};
use crate::error::LabError;
use crate::instance::Lab;
use crate::probe::ping::{Echo, Pinger};
use crate::runtime::interface_mtu;

/// Every path takes this, in bytes.
const SMALLEST: u32 = 1280;
/// Largest IP packet in bytes.
const LARGEST: u32 = 65_535;
/// How often a packet may get lost until its size is held to be the reason.
const TRIES: usize = 3;

/// What a path between two pods takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Boundary {
    largest_ok: u32,
    /// The first larger size, and whether its sender was told.
    next: u32,
    told: bool,
}

/// Finds the boundary between the first pods of all nodes. `None` when there are no two
/// nodes with pods of this family.
pub(super) fn check(
    lab: &Lab,
    family: IpFamily,
    failures: &mut Vec<String>,
) -> Result<Option<MtuResult>, LabError> {
    let options = lab.options();
    let mut result: Option<MtuResult> = None;
    for (from, to) in lab.first_pod_pairs() {
        let addresses = to.addresses();
        let Some(address) = addresses.into_iter().find(|ip| IpFamily::of(*ip) == family) else {
            continue;
        };
        let own = options.pod_mtu_of(from.node().index());
        let expected = own.min(options.pod_mtu_of(to.node().index()));
        let pod = interface_mtu(&from.netns())?;
        let found = from.netns().run(|| find(address, pod))?.map_err(|source| {
            LabError::Measure { what: format!("ping {address} from {}", from.name()), source }
        })?;
        let path = format!("{} to {} ({address})", from.name(), to.name());
        let (largest_ok, first_refused) = match found {
            None => {
                failures.push(format!("{path}: not even {SMALLEST} bytes get through"));
                (None, None)
            }
            Some(Boundary { largest_ok, next, told }) => {
                if largest_ok != expected {
                    failures.push(format!(
                        "{path}: the largest packet is {largest_ok} bytes and should be {expected}"
                    ));
                }
                if !told {
                    failures
                        .push(format!("{path}: {next} bytes vanish, and the sender is not told"));
                }
                (Some(largest_ok), told.then_some(next))
            }
        };
        if pod != own {
            failures
                .push(format!("{}: the pod's MTU is {pod} bytes and should be {own}", from.name()));
        }
        let worst = result.get_or_insert(MtuResult { pod, expected, largest_ok, first_refused });
        worst.pod = worst.pod.min(pod);
        worst.expected = worst.expected.min(expected);
        worst.largest_ok = worst.largest_ok.min(largest_ok);
        worst.first_refused = worst.first_refused.min(first_refused);
    }
    Ok(result)
}

/// Starts where the boundary should be, and searches only if it is not there.
fn find(address: IpAddr, likely: u32) -> io::Result<Option<Boundary>> {
    let mut pinger = Pinger::new(address)?;
    let mut probe = |size: u32| probe(&mut pinger, size);
    if probe(SMALLEST)? != Fate::Answered {
        return Ok(None);
    }
    let (mut low, mut high) = (SMALLEST, LARGEST + 1);
    let likely = likely.clamp(SMALLEST, LARGEST);
    for size in [likely, likely + 1] {
        match probe(size)? {
            Fate::Answered => low = low.max(size),
            Fate::Refused | Fate::Vanished => high = high.min(size),
        }
    }
    while high - low > 1 {
        let middle = low + (high - low) / 2;
        match probe(middle)? {
            Fate::Answered => low = middle,
            Fate::Refused | Fate::Vanished => high = middle,
        }
    }
    // The second time a size is tried, an ICMP answer to the first has arrived.
    let told = high > LARGEST || probe(high)? == Fate::Refused;
    Ok(Some(Boundary { largest_ok: low, next: high, told }))
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    Answered,
    Refused,
    Vanished,
}

fn probe(pinger: &mut Pinger, size: u32) -> io::Result<Fate> {
    let bytes = usize::try_from(size).unwrap_or(usize::MAX);
    for _ in 0..TRIES {
        match pinger.echo_of_size(bytes)? {
            Echo::Answered(_) => return Ok(Fate::Answered),
            Echo::TooLarge => return Ok(Fate::Refused),
            Echo::Lost => {}
        }
    }
    Ok(Fate::Vanished)
}
