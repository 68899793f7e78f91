//! The way to the API server, and how an attempt to use it can fail.

use std::fmt;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::http::Response;
use axum::http::header::RETRY_AFTER;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use k8s_openapi::api::core::v1::Pod;
use kube::api::ListParams;
use kube::client::{Body, ConfigExt as _};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Api, Client, Config};
use serde::de::DeserializeOwned;
use tokio::time::{Instant, sleep_until, timeout};
use tower::{BoxError, ServiceBuilder};

use crate::config::NodeIdentity;

/// Longest wait for a connection, and for an answer, before it is given up.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);

/// A watch may be silent for minutes. After this time without a packet the other end is asked
/// whether it is there, and again in this interval, so that a dead connection is noticed
/// within 20 s.
const SILENCE: Duration = Duration::from_secs(8);
const PROBE_INTERVAL: Duration = Duration::from_secs(4);
const PROBES: u32 = 3;
/// Objects per page of a list.
const PAGE: u32 = 500;
/// The API server's `Retry-After` is heeded up to this.
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

/// Makes clients of one API server. Credentials are read again for each, so that a renewed
/// kubeconfig or token is picked up without a restart.
#[derive(Debug, Clone)]
pub struct Connector {
    kubeconfig: Option<PathBuf>,
    patience: Duration,
    /// Until when the API server wants to be left alone.
    pause: Pause,
}

/// What `Retry-After` asks for, shared by all requests.
type Pause = Arc<Mutex<Option<Instant>>>;

/// A cluster configuration that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The kubeconfig file is missing or wrong.
    #[error("cannot use the kubeconfig {}; give --kubeconfig a readable file", path.display())]
    Kubeconfig {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// There is no kubeconfig, and this process does not run in a pod with a service account.
    #[error(
        "no way to reach the API server; give --kubeconfig, or run as a pod with a service \
         account"
    )]
    InCluster(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The client could not be built from the configuration.
    #[error("cannot make a client of the API server at {server}")]
    Client {
        /// Its address.
        server: String,
        /// Why.
        #[source]
        source: Box<kube::Error>,
    },
}

/// A request that brought no usable answer.
#[derive(Debug, thiserror::Error)]
pub enum RequestError {
    /// There is no client to send it with.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// The API server could not be reached, or refused.
    #[error("{}", describe(.0))]
    Refused(Box<kube::Error>),
    /// Nothing came back in time.
    #[error("no answer within {:.1} s", .0.as_secs_f32())]
    Timeout(Duration),
}

impl RequestError {
    /// Status code of the API server's answer, if it answered.
    pub fn code(&self) -> Option<u16> {
        match self {
            Self::Refused(error) => match error.as_ref() {
                kube::Error::Api(status) => Some(status.code),
                _ => None,
            },
            Self::Connect(_) | Self::Timeout(_) => None,
        }
    }
}

impl From<kube::Error> for RequestError {
    fn from(error: kube::Error) -> Self {
        Self::Refused(Box::new(error))
    }
}

impl Connector {
    /// Through this kubeconfig, or else the service account of this pod.
    pub fn new(kubeconfig: Option<PathBuf>) -> Self {
        Self { kubeconfig, patience: REQUEST_TIMEOUT, pause: Pause::default() }
    }

    /// With another limit on how long a connection or an answer may take.
    #[must_use]
    pub fn with_patience(self, patience: Duration) -> Self {
        Self { patience, ..self }
    }

    /// Address of the API server, where the configuration can be read and has one.
    pub async fn server_address(&self) -> Option<IpAddr> {
        let config = self.config().await.ok()?;
        let host = config.cluster_url.host()?;
        host.trim_matches(['[', ']']).parse().ok()
    }

    async fn config(&self) -> Result<Config, ConnectError> {
        match &self.kubeconfig {
            Some(path) => from_kubeconfig(path).await,
            None => Config::incluster().map_err(|e| ConnectError::InCluster(Box::new(e))),
        }
    }

    /// A client with fresh credentials and connections. It sends nothing yet.
    ///
    /// # Errors
    /// [`ConnectError`], when the configuration cannot be used.
    pub async fn client(&self) -> Result<Client, ConnectError> {
        let config = self.config().await?;
        let server = config.cluster_url.to_string();
        client_of(&config, self.patience, self.pause.clone())
            .map_err(|source| ConnectError::Client { server, source: Box::new(source) })
    }

    /// Name of this machine's Node. `None` while the agent's pod is not bound to one.
    ///
    /// # Errors
    /// [`RequestError`], when the pod has to be asked for and cannot be read.
    pub async fn node_name(&self, node: &NodeIdentity) -> Result<Option<String>, RequestError> {
        let (namespace, name) = match node {
            NodeIdentity::Name(name) => return Ok(Some(name.clone())),
            NodeIdentity::Pod { namespace, name } => (namespace, name),
        };
        let pods: Api<Pod> = Api::namespaced(self.client().await?, namespace);
        let pod = self.in_time(pods.get(name)).await?;
        Ok(pod.spec.and_then(|spec| spec.node_name))
    }

    /// Every object of a kind, page by page, and the version to watch from.
    pub(super) async fn list<K>(
        &self,
        api: &Api<K>,
    ) -> Result<(Vec<K>, Option<String>), RequestError>
    where
        K: Clone + fmt::Debug + DeserializeOwned,
    {
        let mut params = ListParams::default().limit(PAGE);
        let mut objects = Vec::new();
        loop {
            let page = self.in_time(api.list(&params)).await?;
            objects.extend(page.items);
            params.continue_token = page.metadata.continue_.filter(|token| !token.is_empty());
            if params.continue_token.is_none() {
                let version = page.metadata.resource_version.filter(|v| !v.is_empty());
                return Ok((objects, version));
            }
        }
    }

    /// Waits for as long as the API server has asked to be left alone.
    async fn pause(&self) {
        let until = *self.pause.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(until) = until {
            sleep_until(until).await;
        }
    }

    /// Sends a request no sooner than the API server wants it, and gives up on one that a dead
    /// connection or a stuck server would hold for ever.
    pub(super) async fn in_time<T>(
        &self,
        request: impl Future<Output = Result<T, kube::Error>>,
    ) -> Result<T, RequestError> {
        self.pause().await;
        match timeout(self.patience, request).await {
            Ok(answer) => answer.map_err(RequestError::from),
            Err(_) => Err(RequestError::Timeout(self.patience)),
        }
    }
}

/// kube's own stack, less retries, which are the callers' business: they know when an answer
/// no longer matters. Its connections notice when the other end is gone without a word.
fn client_of(config: &Config, patience: Duration, pause: Pause) -> Result<Client, kube::Error> {
    let mut tcp = HttpConnector::new();
    tcp.enforce_http(false);
    tcp.set_nodelay(true);
    tcp.set_connect_timeout(Some(patience));
    tcp.set_keepalive(Some(SILENCE));
    tcp.set_keepalive_interval(Some(PROBE_INTERVAL));
    tcp.set_keepalive_retries(Some(PROBES));
    tcp.set_tcp_user_timeout(Some(SILENCE + PROBE_INTERVAL * PROBES));
    let connector = config.rustls_https_connector_with_connector(tcp)?;
    let transport = hyper_util::client::legacy::Client::builder(TokioExecutor::new());
    let service = ServiceBuilder::new()
        .layer(config.base_uri_layer())
        .option_layer(config.auth_layer()?)
        .layer(config.extra_headers_layer()?)
        .map_err(BoxError::from)
        .map_response(move |response| {
            heed_retry_after(&response, &pause);
            response
        })
        .service(transport.build::<_, Body>(connector));
    Ok(Client::new(service, config.default_namespace.clone()))
}

/// Takes in for how long the API server wants to be left alone, at most a while: it may be a
/// proxy with odd ideas.
fn heed_retry_after<B>(response: &Response<B>, pause: &Pause) {
    let seconds = response.headers().get(RETRY_AFTER).and_then(|value| value.to_str().ok());
    if let Some(seconds) = seconds.and_then(|seconds| seconds.parse().ok()) {
        let until = Instant::now() + Duration::from_secs(seconds).min(LONGEST_PAUSE);
        *pause.lock().unwrap_or_else(PoisonError::into_inner) = Some(until);
    }
}

async fn from_kubeconfig(path: &Path) -> Result<Config, ConnectError> {
    let wrong = |source: kube::config::KubeconfigError| ConnectError::Kubeconfig {
        path: path.to_owned(),
        source: Box::new(source),
    };
    let kubeconfig = Kubeconfig::read_from(path).map_err(wrong)?;
    Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await.map_err(wrong)
}

/// The error in an operator's words: kube prints its own variant names and debug text.
fn describe(error: &kube::Error) -> String {
    if let kube::Error::Api(status) = error {
        return format!("{} ({})", status.message, status.code);
    }
    let mut text = String::new();
    let mut cause: Option<&dyn std::error::Error> = std::error::Error::source(error);
    while let Some(error) = cause {
        let part = error.to_string();
        // "client error (Connect)" says nothing that its cause does not say better.
        if !text.contains(&part) && !part.starts_with("client error") {
            let separator = if text.is_empty() { "" } else { ": " };
            text = format!("{text}{separator}{part}");
        }
        cause = error.source();
    }
    if text.is_empty() { error.to_string() } else { text }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_missing_kubeconfig_is_named() {
        let connector = Connector::new(Some("/nonexistent/kubeconfig".into()));
        let Err(error) = connector.client().await else { panic!("no error") };
        assert!(error.to_string().contains("/nonexistent/kubeconfig"), "{error}");
        assert!(error.to_string().contains("--kubeconfig"), "{error}");
    }
}
