//! What was asked of the server, so that tests can show how often an agent asks, and what
//! it writes.

use std::collections::VecDeque;
use std::net::IpAddr;
use std::sync::{Mutex, PoisonError};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::fault::Request;

/// Requests that are remembered. Older ones are forgotten.
const REMEMBERED: usize = 4096;
/// Longest body that is remembered, in bytes.
const BODY_MAX: usize = 64 << 10;

/// A request as it arrived, whatever became of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LoggedRequest {
    /// Position among all requests since the server started, from 1.
    pub number: u64,
    /// `get`, `list`, `watch`, `create`, `update`, `patch` or `delete`.
    pub verb: String,
    /// Plural name, e.g. `nodes`.
    pub resource: String,
    /// Name of the object, if it was about one.
    pub name: Option<String>,
    /// Address of the client.
    pub client: Option<IpAddr>,
    /// Whether it was for show.
    pub dry_run: bool,
    /// The body; null when there was none, or one that is too long or not JSON.
    pub body: Value,
}

impl LoggedRequest {
    /// Whether it was to change something.
    pub fn is_write(&self) -> bool {
        !self.dry_run && !matches!(self.verb.as_str(), "get" | "list" | "watch")
    }
}

/// The newest requests.
#[derive(Debug, Default)]
pub(super) struct RequestLog(Mutex<(u64, VecDeque<LoggedRequest>)>);

impl RequestLog {
    pub(super) fn add(&self, request: &Request, name: Option<&str>, dry_run: bool, body: &[u8]) {
        let body = if body.len() > BODY_MAX { &[] } else { body };
        let mut log = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (number, requests) = &mut *log;
        *number += 1;
        if requests.len() == REMEMBERED {
            requests.pop_front();
        }
        requests.push_back(LoggedRequest {
            number: *number,
            verb: request.verb.to_owned(),
            resource: request.resource.to_owned(),
            name: name.map(str::to_owned),
            client: request.client,
            dry_run,
            body: serde_json::from_slice(body).unwrap_or_default(),
        });
    }

    pub(super) fn list(&self) -> Vec<LoggedRequest> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).1.iter().cloned().collect()
    }
}
