//! Faults on demand, so that tests can show what the agent makes of a bad API server.

use std::net::IpAddr;
use std::sync::{Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use tokio::sync::watch;

/// Which requests go wrong, and how. A field left out matches everything.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Fault {
    /// `get`, `list`, `watch`, `create`, `update`, `patch` or `delete`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub verb: Option<String>,
    /// Plural name, e.g. `nodes`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resource: Option<String>,
    /// Address of the client.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub client: Option<IpAddr>,
    /// How many requests (or watch events) it hits before it is over; `None` for all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub times: Option<u32>,
    /// What goes wrong.
    pub effect: Effect,
}

/// What goes wrong.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum Effect {
    /// The request is answered with this status code.
    Status {
        /// HTTP status code.
        code: u16,
        /// `Retry-After` in seconds.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        retry_after: Option<u32>,
    },
    /// The request is never answered; a running watch falls silent until the fault is lifted.
    Hang,
    /// A list has no items.
    EmptyList,
    /// A list lacks the object of this name.
    Omit {
        /// `metadata.name`.
        name: String,
    },
    /// A watch, new or running, gets an ERROR event with code 410 and ends.
    Gone,
    /// A watch, new or running, ends without a word.
    Cut,
    /// Every watch event is sent twice.
    Duplicate,
    /// Every watch event is held back.
    Delay {
        /// For so many milliseconds.
        milliseconds: u64,
    },
    /// Every two watch events change places.
    Reorder,
}

/// The faults in force.
#[derive(Debug)]
pub(super) struct Faults {
    faults: Mutex<Vec<Fault>>,
    changed: watch::Sender<()>,
}

/// What a fault may match.
#[derive(Debug, Clone)]
pub(super) struct Request {
    pub(super) verb: &'static str,
    pub(super) resource: &'static str,
    pub(super) client: Option<IpAddr>,
}

impl Faults {
    pub(super) fn new() -> Self {
        Self { faults: Mutex::default(), changed: watch::Sender::new(()) }
    }

    pub(super) fn set(&self, faults: Vec<Fault>) {
        *self.lock() = faults;
        self.changed.send_replace(());
    }

    pub(super) fn list(&self) -> Vec<Fault> {
        self.lock().clone()
    }

    /// Told whenever the faults change.
    pub(super) fn subscribe(&self) -> watch::Receiver<()> {
        self.changed.subscribe()
    }

    /// The first fault that hits this request with an effect that `applies`; uses it up once.
    pub(super) fn take(
        &self,
        request: &Request,
        applies: impl Fn(&Effect) -> bool,
    ) -> Option<Effect> {
        let mut faults = self.lock();
        let index = faults.iter().position(|f| f.hits(request) && applies(&f.effect))?;
        let effect = faults[index].effect.clone();
        if let Some(times) = &mut faults[index].times {
            *times = times.saturating_sub(1);
            if *times == 0 {
                faults.remove(index);
            }
        }
        Some(effect)
    }

    /// Whether a fault with this effect hits the request, without using it up.
    pub(super) fn applies(&self, request: &Request, effect: &Effect) -> bool {
        self.lock().iter().any(|f| f.hits(request) && f.effect == *effect)
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Fault>> {
        self.faults.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Fault {
    /// A fault that hits every request.
    pub fn every(effect: Effect) -> Self {
        Self { verb: None, resource: None, client: None, times: None, effect }
    }

    /// Only requests with this verb.
    #[must_use]
    pub fn on(mut self, verb: &str) -> Self {
        self.verb = Some(verb.to_owned());
        self
    }

    /// Only requests from this client.
    #[must_use]
    pub fn from(mut self, client: IpAddr) -> Self {
        self.client = Some(client);
        self
    }

    /// Only so many times.
    #[must_use]
    pub fn times(mut self, times: u32) -> Self {
        self.times = Some(times);
        self
    }

    fn hits(&self, request: &Request) -> bool {
        self.times != Some(0)
            && self.verb.as_ref().is_none_or(|verb| verb == request.verb)
            && self.resource.as_ref().is_none_or(|resource| resource == request.resource)
            && self.client.is_none_or(|client| request.client == Some(client))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn faults_hit_what_they_name_and_wear_off() {
        let faults = Faults::new();
        let fault = Fault::every(Effect::Hang).on("patch").times(2);
        faults.set(vec![fault]);
        let patch = Request { verb: "patch", resource: "nodes", client: None };
        let list = Request { verb: "list", ..patch.clone() };
        assert_eq!(faults.take(&list, |_| true), None);
        assert_eq!(faults.take(&patch, |effect| *effect == Effect::Cut), None);
        assert_eq!(faults.take(&patch, |_| true), Some(Effect::Hang));
        assert_eq!(faults.take(&patch, |_| true), Some(Effect::Hang));
        assert_eq!(faults.take(&patch, |_| true), None);
        assert_eq!(faults.list(), []);
    }

    #[test]
    fn faults_are_readable_json() {
        let text = r#"{"verb":"list","effect":{"kind":"status","code":429,"retry_after":1}}"#;
        let fault: Fault = serde_json::from_str(text).unwrap();
        assert_eq!(serde_json::to_string(&fault).unwrap(), text);
        assert!(serde_json::from_str::<Fault>(r#"{"verbs":"x","effect":{"kind":"cut"}}"#).is_err());
    }
}
