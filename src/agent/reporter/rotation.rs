//! Says how the replacement of this node's key goes: the audit log, Events and the status.

use std::time::Instant;

use gambeson_keys::{Generation, PublicKey};
use gambeson_mesh::rotation::{Progress, Step};
use tracing::{info, warn};

use super::View;
use crate::agent::words;
use crate::cluster::{Note, Reason, Recorder};
use crate::status::{RotationStatus, WaitingPeer};

/// Remembers what was said last.
#[derive(Debug, Default)]
pub(super) struct RotationReport {
    last: Option<(Progress, Option<PublicKey>)>,
}

impl RotationReport {
    /// Says what has changed since the last look.
    pub(super) fn report(&mut self, view: &View, events: &Recorder, now: Instant) {
        let key = |generation: Generation| view.local.keys.get(&generation).copied();
        let last = self.last.take();
        self.last = view.rotation.clone().map(|progress| {
            let old = key(progress.from).or(last.as_ref().and_then(|(_, old)| *old));
            (progress, old)
        });
        let note = |reason, message| {
            let node_uid = view.node_uid.clone();
            events.record(Note { node_uid, reason, message });
        };
        match (&last, &self.last) {
            (Some((done, old)), None) => {
                let message = finished(done, *old, key(done.to), now);
                note(Reason::KeyRotated, message);
            }
            (before, Some((progress, old))) => {
                let before = before.as_ref().map(|(before, _)| before);
                if before.map(|before| before.step) != Some(progress.step) {
                    let message = describe(progress);
                    info!(from = progress.from.number(), to = progress.to.number(), "{message}");
                    if progress.step != Step::Say {
                        note(Reason::KeyRotation, message);
                    }
                }
                let is_news = before.is_none_or(|before| before.waiting != progress.waiting);
                let was_blocked = before.is_some_and(|before| before.blocked);
                if progress.blocked && (is_news || !was_blocked) {
                    let message = words::blocked(progress);
                    warn!(old_key = old.map(tracing::field::display), "{message}");
                    if !was_blocked {
                        note(Reason::RotationBlocked, message);
                    }
                }
            }
            (None, None) => {}
        }
    }
}

/// What the status says of it.
pub(super) fn status(progress: &Progress, now: Instant) -> RotationStatus {
    let waiting = progress.waiting.iter();
    RotationStatus {
        from: progress.from.number(),
        to: progress.to.number(),
        step: step_name(progress.step).to_owned(),
        seconds: now.duration_since(progress.since).as_secs(),
        peers: progress.peers,
        moved: progress.moved,
        waiting: waiting
            .map(|(name, wait)| WaitingPeer {
                name: name.clone(),
                reason: words::reason(*wait).to_owned(),
            })
            .collect(),
        away: progress.away.iter().cloned().collect(),
        blocked: progress.blocked,
    }
}

/// The audit record of a rotation that is done.
fn finished(
    done: &Progress,
    old: Option<PublicKey>,
    new: Option<PublicKey>,
    now: Instant,
) -> String {
    let seconds = now.duration_since(done.since).as_secs_f64();
    let away: Vec<_> = done.away.iter().map(String::as_str).take(words::NAMED).collect();
    info!(
        from = done.from.number(),
        to = done.to.number(),
        old_key = old.map(tracing::field::display),
        new_key = new.map(tracing::field::display),
        seconds = format!("{seconds:.1}"),
        moved = done.moved,
        peers = done.peers,
        away = away.join(","),
        revoke = done.revoke,
        "key rotation ends; the old key is erased"
    );
    format!(
        "Key generation {} has replaced {} after {seconds:.1} s; {} of {} peers moved",
        done.to, done.from, done.moved, done.peers
    )
}

fn describe(progress: &Progress) -> String {
    let Progress { from, to, peers, .. } = progress;
    match progress.step {
        Step::Say => format!("Key generation {to} is kept and staged"),
        Step::Move => format!("Key generation {to} is published beside {from}; {peers} peers move"),
        Step::Promote if progress.revoke => {
            format!("Key generation {from} is revoked; packets under way with it may be lost")
        }
        Step::Promote => format!("No peer uses key generation {from} any more"),
        Step::Retire => format!("Key generation {to} is published as the one in use"),
    }
}

fn step_name(step: Step) -> &'static str {
    match step {
        Step::Say => "say",
        Step::Move => "move",
        Step::Promote => "promote",
        Step::Retire => "retire",
    }
}
