//! The listening sockets.

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;

use axum::Router;
use axum::extract::DefaultBodyLimit;
use axum::routing::get;
use tokio::task::JoinSet;

use super::access::Access;
use super::fault::Faults;
use super::handler::{self, Shared};
use super::log::RequestLog;
use super::store::Store;

/// kube-apiserver's limit on a request body, in bytes.
const BODY_LIMIT: usize = 3 << 20;

/// Why the server stopped.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// A socket could not be handed to the runtime.
    #[error("cannot use a listening socket of the API server")]
    Listener(#[source] io::Error),
    /// Accepting connections failed for good.
    #[error("the API server stopped")]
    Serve(#[source] io::Error),
}

/// The Node API server.
#[derive(Debug)]
pub struct Server {
    shared: Shared,
}

impl Server {
    /// A server of this store, without faults.
    pub fn new(store: Store, access: Access) -> Self {
        let (store, faults, access) = (Arc::new(store), Arc::new(Faults::new()), Arc::new(access));
        let requests = Arc::new(RequestLog::default());
        Self { shared: Shared { store, faults, access, requests } }
    }

    /// Serves on all of these sockets, which may be in different network namespaces, until
    /// one of them fails.
    pub async fn serve(self, listeners: Vec<TcpListener>) -> Result<(), ServeError> {
        let app = Router::new()
            .route("/lab/faults", get(handler::get_faults).put(handler::put_faults))
            .route("/lab/requests", get(handler::get_requests))
            .fallback(handler::handle)
            .layer(DefaultBodyLimit::max(BODY_LIMIT))
            .with_state(self.shared);
        let mut servers = JoinSet::new();
        for listener in listeners {
            listener.set_nonblocking(true).map_err(ServeError::Listener)?;
            let listener =
                tokio::net::TcpListener::from_std(listener).map_err(ServeError::Listener)?;
            let service = app.clone().into_make_service_with_connect_info::<SocketAddr>();
            servers.spawn(async move { axum::serve(listener, service).await });
        }
        while let Some(result) = servers.join_next().await {
            result
                .map_err(io::Error::other)
                .and_then(|served| served)
                .map_err(ServeError::Serve)?;
        }
        Ok(())
    }
}
