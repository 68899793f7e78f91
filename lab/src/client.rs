//! A client of the lab's API server for code that is not async.

use std::fmt;
use std::time::Duration;

use axum::http::uri::InvalidUri;
use axum::http::{Method, Request, header};
use kube::{Client, Config};
use serde_json::Value;
use tokio::runtime::Runtime;

use super::api::{Fault, LoggedRequest};
use super::error::LabError;

/// How long a request may take. The server is on this machine.
const TIMEOUT: Duration = Duration::from_secs(10);

/// How a patch is merged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Patch {
    /// RFC 7386.
    Merge,
    /// Lists such as conditions by their keys.
    Strategic,
}

/// Talks to the lab's API server as kubectl would. Must not be used inside an async runtime.
pub struct Api {
    runtime: Runtime,
    client: Client,
}

impl fmt::Debug for Api {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Api").finish_non_exhaustive()
    }
}

impl Api {
    /// A client of the server at this URL.
    pub fn at(url: &str) -> Result<Self, LabError> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(LabError::Runtime)?;
        let client = {
            let _in_runtime = runtime.enter();
            let uri = url.parse().map_err(|error: InvalidUri| kube::Error::HttpError(error.into()));
            let client = uri.and_then(|uri| {
                let mut config = Config::new(uri);
                config.connect_timeout = Some(TIMEOUT);
                config.read_timeout = Some(TIMEOUT);
                Client::try_from(config)
            });
            client.map_err(|error| LabError::Api {
                what: format!("a client for {url}"),
                source: Box::new(error),
            })?
        };
        Ok(Self { runtime, client })
    }

    /// All Nodes.
    pub fn nodes(&self) -> Result<Vec<Value>, LabError> {
        let mut list = self.request(&Method::GET, "/api/v1/nodes", None, None)?;
        Ok(match list["items"].take() {
            Value::Array(nodes) => nodes,
            _ => Vec::new(),
        })
    }

    /// One Node.
    pub fn node(&self, name: &str) -> Result<Value, LabError> {
        self.request(&Method::GET, &format!("/api/v1/nodes/{name}"), None, None)
    }

    /// Creates a Node.
    pub fn create_node(&self, node: &Value) -> Result<Value, LabError> {
        self.request(&Method::POST, "/api/v1/nodes", Some("application/json"), Some(node))
    }

    /// Deletes a Node.
    pub fn delete_node(&self, name: &str) -> Result<(), LabError> {
        self.request(&Method::DELETE, &format!("/api/v1/nodes/{name}"), None, None).map(|_| ())
    }

    /// Patches a Node, status excepted.
    pub fn patch_node(&self, name: &str, kind: Patch, patch: &Value) -> Result<Value, LabError> {
        self.patch(&format!("/api/v1/nodes/{name}"), kind, patch)
    }

    /// Patches a Node's status, labels or annotations.
    pub fn patch_status(&self, name: &str, kind: Patch, patch: &Value) -> Result<Value, LabError> {
        self.patch(&format!("/api/v1/nodes/{name}/status"), kind, patch)
    }

    /// All Events.
    pub fn events(&self) -> Result<Vec<Value>, LabError> {
        let mut list = self.request(&Method::GET, "/api/v1/events", None, None)?;
        Ok(match list["items"].take() {
            Value::Array(events) => events,
            _ => Vec::new(),
        })
    }

    /// Puts exactly these faults in force.
    pub fn set_faults(&self, faults: &[Fault]) -> Result<(), LabError> {
        let body = serde_json::to_value(faults)
            .map_err(|error| api_error("PUT /lab/faults", kube::Error::SerdeError(error)))?;
        let content_type = Some("application/json");
        self.text(&Method::PUT, "/lab/faults", content_type, Some(&body)).map(|_| ())
    }

    /// The newest requests that the server has got, oldest first.
    pub fn requests(&self) -> Result<Vec<LoggedRequest>, LabError> {
        const PATH: &str = "/lab/requests";
        let requests = self.request(&Method::GET, PATH, None, None)?;
        serde_json::from_value(requests)
            .map_err(|error| api_error(PATH, kube::Error::SerdeError(error)))
    }

    /// Any request to any path, answered in JSON.
    pub fn request(
        &self,
        method: &Method,
        path: &str,
        content_type: Option<&str>,
        body: Option<&Value>,
    ) -> Result<Value, LabError> {
        let text = self.text(method, path, content_type, body)?;
        serde_json::from_str(&text)
            .map_err(|error| api_error(&format!("{method} {path}"), kube::Error::SerdeError(error)))
    }

    fn patch(&self, path: &str, kind: Patch, patch: &Value) -> Result<Value, LabError> {
        let content_type = match kind {
            Patch::Merge => "application/merge-patch+json",
            Patch::Strategic => "application/strategic-merge-patch+json",
        };
        self.request(&Method::PATCH, path, Some(content_type), Some(patch))
    }

    fn text(
        &self,
        method: &Method,
        path: &str,
        content_type: Option<&str>,
        body: Option<&Value>,
    ) -> Result<String, LabError> {
        let what = format!("{method} {path}");
        let mut request = Request::builder().method(method).uri(path);
        if let Some(content_type) = content_type {
            request = request.header(header::CONTENT_TYPE, content_type);
        }
        let body = body.map(|body| body.to_string().into_bytes()).unwrap_or_default();
        let request =
            request.body(body).map_err(|error| api_error(&what, kube::Error::HttpError(error)))?;
        self.runtime
            .block_on(self.client.request_text(request))
            .map_err(|error| api_error(&what, error))
    }
}

fn api_error(what: &str, source: kube::Error) -> LabError {
    LabError::Api { what: what.to_owned(), source: Box::new(source) }
}
