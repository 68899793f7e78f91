//! The part of a pass that replaces this node's key: `Rotation` decides, and this does it.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Instant;

use gambeson_keys::Answer;
use gambeson_mesh::live::Pairs;
use gambeson_mesh::node::{Local, NodeRecord};
use gambeson_mesh::observed::Observed;
use gambeson_mesh::rotation::{Cause, Request, Sight, Task};
use gambeson_mesh::topology::Mesh;
use tokio::net::UdpSocket;
use tracing::{debug, info};

use super::{Pass, Reconciler};
use crate::agent::words::chain;

/// Nobody listens there, so that the answer is an ICMP error (RFC 863).
const DISCARD: u16 = 9;

impl Reconciler {
    /// Goes on with the rotation of this node's key, and begins one that is asked for. What
    /// cannot be done is said and tried again in the next pass.
    pub(super) async fn rotate(
        &mut self,
        local: &mut Local,
        (mesh, pairs, observed, own): (&Mesh, &Pairs, &Observed, &NodeRecord),
        now: Instant,
        pass: &mut Pass,
    ) {
        let Some(keys) = &mut self.keys else { return };
        let answer = keys.answer().clone();
        let (answered, revoke) = (answer.request.as_deref(), answer.revoke);
        let sight = Sight { mesh, local, pairs, observed, own, answered, revoke, due: None, now };
        let task = self.rotation.follow(&sight);
        let probes = self.rotation.probes(&sight);
        let changed = match task {
            Task::None => Ok(()),
            Task::Add(request) => {
                let old = keys.newest();
                let Request { cause, text, revoke } = request;
                let added = self.key_store.add_next(keys, Answer { request: text.clone(), revoke });
                if added.is_ok() {
                    info!(
                        from = old.number(),
                        to = keys.newest().number(),
                        cause = cause_name(cause),
                        request = text,
                        revoke,
                        "key rotation begins"
                    );
                }
                added
            }
            Task::Retire => self.key_store.retire_older(keys),
        };
        if let Err(error) = changed {
            pass.problems.push(chain(&error));
        }
        local.keys = keys.publics();
        local.promoted = local.keys.len() > 1 && self.rotation.is_promoted();
        probe(probes).await;
    }
}

fn cause_name(cause: Cause) -> &'static str {
    match cause {
        Cause::Request => "request",
        Cause::Age => "age",
        Cause::Upgrade => "upgrade",
    }
}

/// Sends a packet to each of these addresses. One that does not leave is as good as lost.
async fn probe(addresses: Vec<IpAddr>) {
    for address in addresses {
        let any: IpAddr = match address {
            IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
            IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
        };
        let sent =
            async { UdpSocket::bind((any, 0)).await?.send_to(&[0], (address, DISCARD)).await };
        if let Err(error) = sent.await {
            debug!(%address, %error, "cannot probe");
        }
    }
}
