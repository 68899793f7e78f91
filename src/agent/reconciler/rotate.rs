//! The part of a pass that replaces this node's key: `Rotation` decides, and this does it.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::Path;
use std::time::{Duration, Instant, SystemTime};

use gambeson_keys::{Answer, KeyRing};
use gambeson_mesh::live::Pairs;
use gambeson_mesh::node::{Local, NodeRecord};
use gambeson_mesh::observed::Observed;
use gambeson_mesh::rotation::{Cause, Progress, Request, Sight, Step, Task, Wait, due_at};
use gambeson_mesh::topology::Mesh;
use tokio::net::UdpSocket;
use tracing::{debug, info};

use super::{Pass, Reconciler};
use crate::agent::words::chain;

/// Nobody listens there, so that the answer is an ICMP error (RFC 863).
const DISCARD: u16 = 9;

/// How long after one rotation because of an older tunnel program there is no other.
const UPGRADE_AGAIN: Duration = Duration::from_secs(600);

impl Reconciler {
    /// Goes on with the rotation of this node's key, and begins one that is asked for. What
    /// cannot be done is said and tried again in the next pass. Gives the name of the step that
    /// the kernel is to follow with.
    pub(super) async fn rotate(
        &mut self,
        local: &mut Local,
        (mesh, pairs, observed, own): (&Mesh, &Pairs, &Observed, &NodeRecord),
        now: Instant,
        pass: &mut Pass,
    ) -> Option<&'static str> {
        let outdated = self.has_outdated_tunnels(observed, now).await;
        let keys = self.keys.as_mut()?;
        let answer = keys.answer().clone();
        let due = self.config.rotate_every.filter(|every| is_old(keys, *every));
        let due = due.map(|_| Cause::Age).or(outdated.then_some(Cause::Upgrade));
        let (answered, revoke) = (answer.request.as_deref(), answer.revoke);
        let sight = Sight { mesh, local, pairs, observed, own, answered, revoke, due, now };
        let task = self.rotation.follow(&sight);
        let probes = self.rotation.probes(&sight);
        let crash_file = self.config.crash_at.as_deref();
        if let Some(progress) = self.rotation.progress() {
            crash_at(crash_file, step_name(progress));
        }
        let mut next_step = None;
        let changed = match task {
            Task::None => Ok(()),
            Task::Add(request) => {
                let old = keys.newest();
                let Request { cause, text, revoke } = request;
                let added = self.key_store.add_next(keys, Answer { request: text.clone(), revoke });
                if added.is_ok() {
                    crash_at(crash_file, "keep");
                    next_step = Some("stage");
                    if cause == Cause::Upgrade {
                        self.upgraded = Some(now);
                    }
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
            Task::Retire => self.key_store.retire_older(keys).inspect(|()| {
                crash_at(crash_file, "erase");
                next_step = Some("retire");
            }),
        };
        if let Err(error) = changed {
            pass.problems.push(chain(&error));
        }
        local.keys = keys.publics();
        local.promoted = local.keys.len() > 1 && self.rotation.is_promoted();
        probe(probes).await;
        next_step
    }
}

impl Reconciler {
    /// Whether an older program serves this node's devices, so that the newer is to serve those of
    /// a new key. Where that did not help, it is not tried again for some time.
    async fn has_outdated_tunnels(&mut self, observed: &Observed, now: Instant) -> bool {
        let tried = self.upgraded.is_some_and(|last| now.duration_since(last) < UPGRADE_AGAIN);
        if tried || self.rotation.progress().is_some() {
            return false;
        }
        self.kernel.has_outdated_tunnels(observed).await
    }
}

/// Ends the process if this file says that it is to end at this step, once.
pub(super) fn crash_at(file: Option<&Path>, step: &str) {
    let Some(file) = file else { return };
    let named = fs::read_to_string(file).is_ok_and(|text| text.trim() == step);
    if named && fs::remove_file(file).is_ok() {
        std::process::abort();
    }
}

/// The name of what has just come to be.
fn step_name(progress: &Progress) -> &'static str {
    match progress.step {
        Step::Say => "",
        Step::Move if progress.waiting.values().any(|wait| *wait == Wait::Drain) => "flip",
        Step::Move => "say",
        Step::Promote => "drain",
        Step::Retire => "promote",
    }
}

/// Whether the key is to be replaced for its age. A key of unknown age is older than any limit.
fn is_old(keys: &KeyRing, every: Duration) -> bool {
    let publics = keys.publics();
    let Some(key) = publics.get(&keys.newest()) else { return false };
    keys.age(SystemTime::now()).is_none_or(|age| age >= due_at(every, key))
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
