//! The part of a pass that replaces this node's key: `Rotation` decides, and this does it.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::Path;
use std::time::{Duration, Instant, SystemTime};

use gambeson_keys::{Answer, ClusterSecret, KeyRing, SecretId};
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
        let bound = keys.secret_ids().get(&keys.newest()).copied();
        let given = self.secret.as_ref().map(ClusterSecret::id);
        let due = if given.is_some() && given != bound { Some(Cause::Secret) } else { due };
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
            Task::None if has_done_with_older_secrets(keys, mesh, local) => {
                self.key_store.forget_older_secrets(keys)
            }
            Task::None => Ok(()),
            Task::Add(request) => {
                let old = keys.newest();
                let Request { cause, text, revoke } = request;
                let kept = bound.and_then(|id| keys.secrets().get(id)).cloned();
                let secret = self.secret.clone().or(kept);
                let answer = Answer { request: text.clone(), revoke };
                let added = self.key_store.add_next(keys, answer, secret);
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
        self.kernel.set_secrets(keys.secrets());
        local.secrets = keys.secret_ids();
        local.known_secrets = keys.secrets().iter().map(ClusterSecret::id).collect();
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

/// Whether no key, this node's or another's, is bound to another secret than the newest.
fn has_done_with_older_secrets(keys: &KeyRing, mesh: &Mesh, local: &Local) -> bool {
    let Some(newest) = keys.secret_ids().get(&keys.newest()).copied() else { return false };
    let is_newest = |secret: Option<SecretId>| secret.is_none_or(|secret| secret == newest);
    keys.secrets().iter().count() > 1
        && local.secrets.values().all(|secret| *secret == newest)
        && mesh.peers.values().all(|node| is_newest(node.secret) && is_newest(node.next_secret))
}

fn cause_name(cause: Cause) -> &'static str {
    match cause {
        Cause::Request => "request",
        Cause::Age => "age",
        Cause::Secret => "psk-file",
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
