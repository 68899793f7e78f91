//! The watch and the publisher against an API server that misbehaves on request.

use std::collections::{BTreeMap, VecDeque};
use std::convert::Infallible;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::{Path, Query, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, patch};
use axum::{Json, Router};
use serde_json::{Value, json};
use tokio::sync::{broadcast, watch};
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::*;

/// What the server does with one request instead of answering it.
#[derive(Debug, Clone, Copy)]
enum Fault {
    Code(u16),
    Hang,
    EmptyList,
    GoneInStream,
}

#[derive(Debug, Clone)]
struct Server {
    inner: Arc<Mutex<Inner>>,
    events: broadcast::Sender<Value>,
}

#[derive(Debug, Default)]
struct Inner {
    nodes: BTreeMap<String, Value>,
    version: u64,
    faults: VecDeque<Fault>,
    lists: usize,
    patches: Vec<Value>,
}

impl Server {
    /// Starts on a free port; the kubeconfig that leads there lives as long as the folder.
    async fn start(tasks: &mut JoinSet<()>) -> (Self, Connector, tempfile::TempDir) {
        let server = Self { inner: Arc::default(), events: broadcast::Sender::new(64) };
        let app = Router::new()
            .route("/api/v1/nodes", get(nodes))
            .route("/api/v1/nodes/{name}/status", patch(patch_status))
            .with_state(server.clone());
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tasks.spawn(async move { axum::serve(listener, app).await.unwrap() });
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("kubeconfig");
        let kubeconfig = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "c",
            "clusters": [{"name": "c", "cluster": {"server": format!("http://{address}")}}],
            "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
            "users": [{"name": "u", "user": {}}],
        });
        std::fs::write(&path, kubeconfig.to_string()).unwrap();
        (server, Connector::new(Some(path)).with_patience(Duration::from_secs(2)), folder)
    }

    fn put(&self, name: &str, annotations: Value) {
        let mut inner = self.inner.lock().unwrap();
        inner.version += 1;
        let node = json!({
            "apiVersion": "v1", "kind": "Node",
            "metadata": {
                "name": name, "uid": format!("uid-{name}"), "annotations": annotations,
                "resourceVersion": inner.version.to_string(),
            },
            "spec": {"podCIDRs": ["10.244.1.0/24"]},
        });
        inner.nodes.insert(name.to_owned(), node.clone());
        self.send(json!({"type": "MODIFIED", "object": node}));
    }

    /// Sends an event to whoever watches; `null` ends the watch.
    fn send(&self, event: Value) {
        let _ = self.events.send(event);
    }

    fn fail(&self, faults: &[Fault]) {
        self.inner.lock().unwrap().faults.extend(faults);
    }

    fn patches(&self) -> Vec<Value> {
        self.inner.lock().unwrap().patches.clone()
    }
}

fn gone() -> Value {
    json!({"type": "ERROR", "object": {
        "status": "Failure", "code": 410, "reason": "Expired", "message": "too old",
    }})
}

fn failure(code: u16) -> Response {
    let status = json!({
        "apiVersion": "v1", "kind": "Status", "status": "Failure", "code": code,
        "message": "because of the test", "reason": "Test", "metadata": {},
    });
    (StatusCode::from_u16(code).unwrap(), Json(status)).into_response()
}

async fn nodes(
    State(server): State<Server>,
    Query(query): Query<BTreeMap<String, String>>,
) -> Response {
    let fault = server.inner.lock().unwrap().faults.pop_front();
    match fault {
        Some(Fault::Code(code)) => return failure(code),
        Some(Fault::Hang) => std::future::pending::<()>().await,
        Some(Fault::EmptyList) => {
            let version = server.inner.lock().unwrap().version.to_string();
            return Json(json!({
                "apiVersion": "v1", "kind": "NodeList", "items": [],
                "metadata": {"resourceVersion": version},
            }))
            .into_response();
        }
        Some(Fault::GoneInStream) => {
            return format!("{}\n", gone()).into_response();
        }
        None => {}
    }
    let receiver = server.events.subscribe();
    let mut inner = server.inner.lock().unwrap();
    if !query.contains_key("watch") {
        inner.lists += 1;
        return Json(json!({
            "apiVersion": "v1", "kind": "NodeList",
            "items": inner.nodes.values().collect::<Vec<_>>(),
            "metadata": {"resourceVersion": inner.version.to_string()},
        }))
        .into_response();
    }
    let lines = futures::stream::unfold(receiver, |mut receiver| async {
        match receiver.recv().await {
            Ok(Value::Null) | Err(_) => None,
            Ok(event) => Some((Ok::<_, Infallible>(Bytes::from(format!("{event}\n"))), receiver)),
        }
    });
    Body::from_stream(lines).into_response()
}

async fn patch_status(
    State(server): State<Server>,
    Path(name): Path<String>,
    Json(patch): Json<Value>,
) -> Response {
    let fault = server.inner.lock().unwrap().faults.pop_front();
    if let Some(Fault::Code(code)) = fault {
        return failure(code);
    }
    server.inner.lock().unwrap().patches.push(patch.clone());
    server.put(&name, patch["metadata"]["annotations"].clone());
    let node = server.inner.lock().unwrap().nodes[&name].clone();
    Json(node).into_response()
}

struct Watching {
    server: Server,
    connector: Connector,
    store: NodeStore,
    health: watch::Receiver<Option<String>>,
    tasks: JoinSet<()>,
    _folder: tempfile::TempDir,
}

impl Watching {
    /// Watches a server that has Nodes `a`, the agent's own, and `b`, after `faults`.
    async fn start(faults: &[Fault]) -> Self {
        let mut tasks = JoinSet::new();
        let (server, connector, folder) = Server::start(&mut tasks).await;
        server.put("a", json!({}));
        server.put("b", json!({"gambeson.io/port": "1"}));
        server.fail(faults);
        let store = NodeStore::new("a", "gambeson.io");
        let (sender, health) = watch::channel(None);
        tasks.spawn(NodeWatch::new(connector.clone(), store.clone(), sender).run());
        Self { server, connector, store, health, tasks, _folder: folder }
    }

    async fn until(&self, what: &str, holds: impl Fn(&Nodes) -> bool) {
        let mut changes = self.store.changes();
        let held = async {
            while !holds(&self.store.nodes()) {
                changes.changed().await.unwrap();
            }
        };
        timeout(Duration::from_secs(20), held).await.expect(what);
    }

    /// Repeats a change until it comes through: the watch may be between two connections.
    async fn follows(&self) {
        for n in 2.. {
            self.server.put("b", json!({"gambeson.io/port": n.to_string()}));
            let seen = |nodes: &Nodes| {
                nodes.records()["b"].annotations.get("port") == Some(&n.to_string())
            };
            let arrived = timeout(Duration::from_millis(200), self.until("", seen)).await;
            if arrived.is_ok() {
                return;
            }
            assert!(n < 100, "changes are not followed");
        }
    }
}

#[tokio::test]
async fn lists_then_follows_changes() {
    let watching = Watching::start(&[]).await;
    watching.until("listed", |nodes| nodes.records().len() == 2).await;
    watching.follows().await;
    assert_eq!(watching.server.inner.lock().unwrap().lists, 1);
}

#[tokio::test]
async fn survives_every_status_code() {
    let faults = [403, 429, 500, 401].map(Fault::Code);
    let mut watching = Watching::start(&faults).await;
    let trouble = watching.health.wait_for(Option::is_some);
    let text = timeout(Duration::from_secs(5), trouble).await.unwrap().unwrap().clone().unwrap();
    assert_eq!(text, "cannot follow the Nodes: because of the test (403)");
    watching.until("listed", |nodes| nodes.records().len() == 2).await;
    watching.follows().await;
    assert_eq!(*watching.health.borrow(), None);
}

#[tokio::test]
async fn lists_again_when_the_version_is_gone() {
    for gone in [Fault::GoneInStream, Fault::Code(410)] {
        let watching = Watching::start(&[]).await;
        watching.until("listed", |nodes| nodes.records().len() == 2).await;
        watching.follows().await;
        watching.server.inner.lock().unwrap().nodes.remove("b");
        watching.server.fail(&[gone]);
        watching.server.send(Value::Null);
        watching.until("the list without b", |nodes| nodes.records().len() == 1).await;
    }
}

#[tokio::test]
async fn an_empty_list_deletes_nothing() {
    let mut watching = Watching::start(&[]).await;
    watching.until("listed", |nodes| nodes.records().len() == 2).await;
    watching.follows().await;
    watching.server.fail(&[Fault::EmptyList, Fault::EmptyList]);
    watching.server.send(gone());
    let trouble = watching.health.wait_for(Option::is_some);
    let text = timeout(Duration::from_secs(5), trouble).await.unwrap().unwrap().clone().unwrap();
    assert!(text.contains("listed no Node at all"), "{text}");
    assert_eq!(watching.store.nodes().records().len(), 2);
    watching.follows().await;
}

#[tokio::test]
async fn a_connection_that_hangs_is_given_up() {
    let watching = Watching::start(&[Fault::Hang]).await;
    watching.until("listed after the hang", |nodes| nodes.records().len() == 2).await;
}

#[tokio::test]
async fn publishes_once_and_then_never_writes() {
    let mut watching = Watching::start(&[]).await;
    watching.until("listed", |nodes| nodes.own().is_some()).await;
    watching.follows().await;
    watching.server.fail(&[Fault::Code(409), Fault::Code(429), Fault::Code(500)]);
    let publication = Publication {
        annotations: BTreeMap::from([
            ("port".to_owned(), Some("51820".to_owned())),
            ("mtu".to_owned(), None),
        ]),
        network_up: false,
        encrypted: true,
        rotation_blocked: None,
    };
    let (wanted, receiver) = watch::channel(Some(publication));
    let (health, mut trouble) = watch::channel(None);
    let publisher = Publisher::new(
        watching.connector.clone(),
        watching.store.clone(),
        "a",
        "gambeson.io",
        receiver,
        health,
    );
    watching.tasks.spawn(publisher.run());
    timeout(Duration::from_secs(5), trouble.wait_for(Option::is_some)).await.unwrap().unwrap();
    let published = |nodes: &Nodes| nodes.own().is_some_and(|n| n.annotations.contains_key("port"));
    watching.until("published", published).await;
    timeout(Duration::from_secs(5), trouble.wait_for(Option::is_none)).await.unwrap().unwrap();
    wanted.send_modify(|_| ());
    watching.follows().await;
    let annotations = json!({"metadata": {"annotations": {"gambeson.io/port": "51820"}}});
    assert_eq!(watching.server.patches(), [annotations]);
}
