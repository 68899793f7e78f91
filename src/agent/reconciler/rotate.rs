//! The part of a pass that replaces this node's key: `Rotation` decides, and this does it.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::{Duration, Instant, SystemTime};

use gambeson_keys::{Answer, ClusterSecret, KeyRing, KeyStoreError, SecretId};
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
        let due = self.due(outdated);
        let Answer { request, revoke } = self.keys.as_ref()?.answer().clone();
        let answered = request.as_deref();
        let sight = Sight { mesh, local, pairs, observed, own, answered, revoke, due, now };
        let task = self.rotation.follow(&sight);
        let probes = self.rotation.probes(&sight);
        let held_up: Vec<&str> = self.rotation.held_up(&sight).map(String::as_str).collect();
        if !held_up.is_empty() {
            let names = held_up.join(", ");
            pass.advice.push(format!(
                "this node's key is to be replaced, and {names} cannot follow, which Flannel \
                 drives; it is done when they have moved over"
            ));
        }
        if let Some(progress) = self.rotation.progress() {
            self.crash_at(step_name(progress));
        }
        let changed = match task {
            Task::None => self.forget_older_secrets(mesh, local).map(|()| None),
            Task::Add(request) => self.begin(request, now).map(|()| Some("stage")),
            Task::Retire => self.retire().map(|()| Some("retire")),
        };
        let keys = self.keys.as_ref()?;
        self.kernel.set_secrets(keys.secrets());
        local.secrets = keys.secret_ids();
        local.known_secrets = keys.secrets().iter().map(ClusterSecret::id).collect();
        local.keys = keys.publics();
        local.promoted = local.keys.len() > 1 && self.rotation.is_promoted();
        probe(probes).await;
        changed.unwrap_or_else(|error| {
            pass.problems.push(chain(&error));
            None
        })
    }

    /// What a new key is due for without being asked for.
    fn due(&self, outdated: bool) -> Option<Cause> {
        let keys = self.keys.as_ref()?;
        let given = self.secret.as_ref().map(ClusterSecret::id);
        if given.is_some() && given != bound(keys) {
            return Some(Cause::Secret);
        }
        if self.config.rotate_every.is_some_and(|every| is_old(keys, every)) {
            return Some(Cause::Age);
        }
        outdated.then_some(Cause::Upgrade)
    }

    /// Makes the next key, bound to the secret that this node was given, or else has.
    fn begin(&mut self, request: Request, now: Instant) -> Result<(), KeyStoreError> {
        let Some(keys) = &mut self.keys else { return Ok(()) };
        let Request { cause, text, revoke } = request;
        let kept = bound(keys).and_then(|id| keys.secrets().get(id)).cloned();
        let secret = self.secret.clone().or(kept);
        let old = keys.newest();
        self.key_store.add_next(keys, Answer { request: text.clone(), revoke }, secret)?;
        let (from, to) = (old.number(), keys.newest().number());
        let cause_name = cause_name(cause);
        info!(from, to, cause = cause_name, request = text, revoke, "key rotation begins");
        if cause == Cause::Upgrade {
            self.upgraded = Some(now);
        }
        self.crash_at("keep");
        Ok(())
    }

    fn retire(&mut self) -> Result<(), KeyStoreError> {
        let Some(keys) = &mut self.keys else { return Ok(()) };
        self.key_store.retire_older(keys)?;
        self.crash_at("erase");
        Ok(())
    }

    /// Forgets secrets that no key is bound to any more, this node's or another's.
    fn forget_older_secrets(&mut self, mesh: &Mesh, local: &Local) -> Result<(), KeyStoreError> {
        let Some(keys) = &mut self.keys else { return Ok(()) };
        let newest = bound(keys);
        let is_newest = |secret: Option<SecretId>| secret.is_none() || secret == newest;
        let is_done = newest.is_some()
            && keys.secrets().iter().count() > 1
            && local.secrets.values().all(|secret| is_newest(Some(*secret)))
            && mesh
                .peers
                .values()
                .all(|node| is_newest(node.secret) && is_newest(node.next_secret));
        if is_done { self.key_store.forget_older_secrets(keys) } else { Ok(()) }
    }

    /// Whether an older program serves this node's devices, so that the newer is to serve those of
    /// a new key. Where that did not help, it is not tried again for some time.
    async fn has_outdated_tunnels(&self, observed: &Observed, now: Instant) -> bool {
        let tried = self.upgraded.is_some_and(|last| now.duration_since(last) < UPGRADE_AGAIN);
        if tried || self.rotation.progress().is_some() {
            return false;
        }
        self.kernel.has_outdated_tunnels(observed).await
    }

    /// Ends the process if the file of --crash-at says that it is to end at this step, once.
    pub(super) fn crash_at(&self, step: &str) {
        let Some(file) = &self.config.crash_at else { return };
        let named = fs::read_to_string(file).is_ok_and(|text| text.trim() == step);
        if named && fs::remove_file(file).is_ok() {
            std::process::abort();
        }
    }
}

/// The secret that the newest key is bound to.
fn bound(keys: &KeyRing) -> Option<SecretId> {
    keys.secret_ids().get(&keys.newest()).copied()
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
