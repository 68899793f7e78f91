//! Who asks, by the token of the request, and what the policies of the manifests say to it.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::http::{HeaderMap, header};
use serde_json::Value;

use super::admission::{Policies, PolicyError, Review, User};
use super::error::ApiError;
use super::object::metadata;
use super::resource::Resource;
use super::target::Subresource;

/// What is applied to a cluster.
const MANIFESTS: &str = include_str!("../../../deploy/gambeson.yaml");
/// The service account of the agents there.
const AGENTS: &str = "system:serviceaccount:kube-system:gambeson";
/// Where a bound token names its node, since Kubernetes 1.30.
const NODE_NAME: &str = "authentication.kubernetes.io/node-name";

/// The token of the agent on this node, for as long as `lifetime`; without a node one that is
/// bound to none, as in a Secret.
pub fn token(secret: &str, node: Option<&str>, lifetime: Duration) -> String {
    let expiry = (SystemTime::now() + lifetime).duration_since(UNIX_EPOCH).unwrap_or_default();
    format!("{}:{}:{secret}", node.unwrap_or_default(), expiry.as_secs())
}

/// Authentication and admission.
#[derive(Debug)]
pub struct Access {
    secret: String,
    policies: Policies,
}

impl Access {
    /// Knows the tokens made with `secret`, and enforces the policies of the manifests if so.
    ///
    /// # Errors
    /// When the policies cannot be used.
    pub fn new(secret: String, admission: bool) -> Result<Self, PolicyError> {
        let policies =
            if admission { Policies::from_yaml(MANIFESTS)? } else { Policies::default() };
        Ok(Self { secret, policies })
    }

    /// Whoever asks without a token is a person who may do everything.
    pub(super) fn user(&self, headers: &HeaderMap) -> Result<User, ApiError> {
        let Some(given) = headers.get(header::AUTHORIZATION) else {
            let groups = ["system:masters", "gambeson:break-glass"].map(str::to_owned).to_vec();
            return Ok(User { username: "admin".to_owned(), groups, ..User::default() });
        };
        let given = given.to_str().ok().and_then(|text| text.strip_prefix("Bearer "));
        given.and_then(|token| self.agent(token)).ok_or_else(ApiError::unauthorized)
    }

    fn agent(&self, token: &str) -> Option<User> {
        let [node, expiry, secret] = token.split(':').collect::<Vec<_>>().try_into().ok()?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        if secret != self.secret || expiry.parse::<u64>().ok()? <= now {
            return None;
        }
        let extra = match node {
            "" => BTreeMap::new(),
            node => BTreeMap::from([(NODE_NAME.to_owned(), vec![node.to_owned()])]),
        };
        let groups = ["system:serviceaccounts", "system:authenticated"].map(str::to_owned).to_vec();
        Some(User { username: AGENTS.to_owned(), groups, extra })
    }

    /// Lets a write pass that every policy lets pass.
    pub(super) fn admit(
        &self,
        user: &User,
        (resource, subresource): (&Resource, Subresource),
        old: Option<&Value>,
        object: &Value,
    ) -> Result<(), ApiError> {
        let operation = if old.is_some() { "UPDATE" } else { "CREATE" };
        let name = match subresource {
            Subresource::Main => resource.plural.to_owned(),
            Subresource::Status => format!("{}/status", resource.plural),
        };
        let review = Review { user, operation, resource: &name, object, old };
        self.policies
            .judge(&review)
            .map_err(|why| ApiError::denied(resource, metadata(object, "name"), &why))
    }
}
