//! `/healthz`, `/readyz` and `/metrics` of the agent.

use std::fmt;
use std::net::SocketAddr;
use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::text::encode;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::{ConstCounter, Counter};
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::Registry;
use tokio::net::TcpListener;

use crate::status::{Admission, PeerStatus, Source, Status};

/// Upper bounds of the reconcile histogram in seconds.
const BUCKETS: [f64; 10] = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0];
/// What Prometheus accepts as OpenMetrics text.
const METRICS_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// What the reconcile loop counts.
#[derive(Debug, Clone)]
pub struct Reconciles {
    duration: Histogram,
    errors: Counter,
}

/// The server could not be started.
#[derive(Debug, thiserror::Error)]
#[error(
    "cannot serve health and metrics on {address}; choose another --healthz-ip or \
     --healthz-port (0 turns them off)"
)]
pub struct HttpError {
    address: SocketAddr,
    #[source]
    source: std::io::Error,
}

impl Default for Reconciles {
    fn default() -> Self {
        Self { duration: Histogram::new(BUCKETS), errors: Counter::default() }
    }
}

impl Reconciles {
    /// Counts one pass of the loop and the errors it ended with.
    pub fn record(&self, took: Duration, errors: usize) {
        self.duration.observe(took.as_secs_f64());
        self.errors.inc_by(errors as u64);
    }
}

/// Takes the address, so that a conflict is an error at start.
///
/// # Errors
/// [`HttpError`], when the address cannot be used.
pub async fn bind(address: SocketAddr) -> Result<TcpListener, HttpError> {
    TcpListener::bind(address).await.map_err(|source| HttpError { address, source })
}

/// Serves until the listener fails.
///
/// # Errors
/// What the listener failed with.
pub async fn serve(
    listener: TcpListener,
    status: Source,
    reconciles: &Reconciles,
) -> std::io::Result<()> {
    axum::serve(listener, router(status, reconciles)).await
}

fn router(status: Source, reconciles: &Reconciles) -> Router {
    Router::new()
        .route("/healthz", get(healthz))
        .route("/readyz", get(readyz))
        .route("/metrics", get(metrics))
        .with_state(Shared { status, reconciles: reconciles.clone() })
}

#[derive(Clone)]
struct Shared {
    status: Source,
    reconciles: Reconciles,
}

async fn healthz(State(shared): State<Shared>) -> Response {
    answer(shared.status.last().unhealthy())
}

async fn readyz(State(shared): State<Shared>) -> Response {
    answer(shared.status.last().unready())
}

fn answer(problem: Option<String>) -> Response {
    match problem {
        None => "ok\n".into_response(),
        Some(why) => (StatusCode::SERVICE_UNAVAILABLE, format!("{why}\n")).into_response(),
    }
}

async fn metrics(State(shared): State<Shared>) -> Response {
    let status = shared.status.fresh().await;
    let mut text = String::new();
    match encode(&mut text, &registry(status, &shared.reconciles)) {
        Ok(()) => ([(header::CONTENT_TYPE, METRICS_TYPE)], text).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")).into_response(),
    }
}

fn registry(status: Status, reconciles: &Reconciles) -> Registry {
    let mut registry = Registry::with_prefix("gambeson");
    let version = Info::new([("version", env!("CARGO_PKG_VERSION"))]);
    registry.register("build", "Version of the agent", version);
    registry.register(
        "reconcile_duration_seconds",
        "Time from the start of a pass to the last change of the kernel",
        reconciles.duration.clone(),
    );
    registry.register(
        "reconcile_errors",
        "Operations that failed and were tried again",
        reconciles.errors.clone(),
    );
    registry.register_collector(Box::new(StatusMetrics(status)));
    registry
}

/// A status, as metrics.
#[derive(Debug)]
struct StatusMetrics(Status);

impl Collector for StatusMetrics {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let Self(status) = self;
        let guard = status.guard;
        let gauges = [
            ("peers", "Peers in use", status.peers.len()),
            ("refused_peers", "Nodes that are refused as peers", status.refused.len()),
            ("ready", "Whether the guard and subnet.env are in place", usize::from(status.ready)),
            (
                "key_rotation_under_way",
                "Whether this node's key is being replaced",
                usize::from(status.rotation.is_some()),
            ),
            (
                "admission_enforced",
                "Whether the API server keeps each agent to its own Node",
                usize::from(status.admission == Admission::Enforced),
            ),
        ];
        for (name, help, value) in gauges {
            gauge(&mut encoder, name, help, u64::try_from(value).unwrap_or(u64::MAX))?;
        }
        self.keys(&mut encoder)?;
        if let Some(time) = guard.seen_whole {
            let help = "When the guard was last seen exactly as it has to be, in Unix time";
            gauge(&mut encoder, "guard_seen_whole_timestamp_seconds", help, time)?;
        }
        let drops = [("out", guard.out_packets), ("in", guard.in_packets)]
            .map(|(direction, packets)| ([("direction", direction)], packets));
        counters(&mut encoder, "guard_drops", "Packets in clear that the guard stopped", drops)?;
        self.peers(&mut encoder)
    }
}

impl StatusMetrics {
    fn keys(&self, encoder: &mut DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let Self(Status { generation, rotation, .. }) = self;
        if let Some(generation) = *generation {
            let help = "Generation of this node's key in use";
            gauge(encoder, "key_generation", help, generation)?;
        }
        let blocked = rotation.iter().filter(|rotation| rotation.blocked);
        let peers = blocked.flat_map(|rotation| &rotation.waiting);
        let peers = peers.map(|peer| ([("peer", peer.name.as_str())], 1));
        let help = "Peers that hold up the replacement of this node's key";
        gauges(encoder, "key_rotation_blocked", help, peers)
    }

    fn peers(&self, encoder: &mut DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let peers = &self.0.peers;
        let ages = peers
            .iter()
            .filter_map(|peer| Some(([("peer", peer.name.as_str())], peer.handshake_age_seconds?)));
        let help = "Time since the last completed handshake; absent before the first";
        gauges(encoder, "peer_handshake_age_seconds", help, ages)?;
        let encrypted = peers.iter().map(|peer| {
            let labels = [("peer", peer.name.as_str()), ("transport", peer.transport.as_str())];
            (labels, u64::from(peer.is_encrypted()))
        });
        let help = "Whether what pods send to the peer is encrypted";
        gauges(encoder, "peer_encrypted", help, encrypted)?;
        let bytes = |value: fn(&PeerStatus) -> u64| {
            peers.iter().map(move |peer| ([("peer", peer.name.as_str())], value(peer)))
        };
        let received = bytes(|peer| peer.rx_bytes);
        counters(encoder, "peer_receive_bytes", "Bytes received from the peer", received)?;
        let sent = bytes(|peer| peer.tx_bytes);
        counters(encoder, "peer_transmit_bytes", "Bytes sent to the peer", sent)
    }
}

/// One gauge.
fn gauge(
    encoder: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    value: u64,
) -> Result<(), fmt::Error> {
    let metric = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
    ConstGauge::new(i64::try_from(value).unwrap_or(i64::MAX)).encode(metric)
}

/// A gauge family.
fn gauges<L: EncodeLabelSet>(
    encoder: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    values: impl IntoIterator<Item = (L, u64)>,
) -> Result<(), fmt::Error> {
    let mut family = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
    for (labels, value) in values {
        let gauge = ConstGauge::new(i64::try_from(value).unwrap_or(i64::MAX));
        gauge.encode(family.encode_family(&labels)?)?;
    }
    Ok(())
}

/// A counter family; the encoder appends `_total` to its name.
fn counters<L: EncodeLabelSet>(
    encoder: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    values: impl IntoIterator<Item = (L, u64)>,
) -> Result<(), fmt::Error> {
    let mut family = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
    for (labels, value) in values {
        ConstCounter::new(value).encode(family.encode_family(&labels)?)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpStream;
    use tokio::sync::{mpsc, watch};

    use super::*;
    use crate::rounds::Rounds;
    use crate::status::{GuardStatus, RefusedStatus, RotationStatus, WaitingPeer};

    fn status() -> Status {
        Status {
            peers: vec![PeerStatus {
                name: "node-2".into(),
                pod_cidrs: vec![],
                endpoint: None,
                transport: "wireguard-kernel".into(),
                device: "gambeson0".into(),
                key_generation: 0,
                handshake_age_seconds: Some(5),
                rx_bytes: 10,
                tx_bytes: 20,
                mtu: 1440,
            }],
            refused: vec![RefusedStatus { name: "n".into(), reason: "r".into(), kept: false }],
            generation: Some(6),
            rotation: Some(RotationStatus {
                from: 6,
                to: 7,
                step: "move".into(),
                seconds: 20,
                peers: 1,
                moved: 0,
                waiting: vec![WaitingPeer { name: "node-2".into(), reason: "r".into() }],
                away: vec![],
                blocked: true,
            }),
            guard: GuardStatus { seen_whole: Some(7), out_packets: 3, ..GuardStatus::default() },
            ..Status::starting("node-1")
        }
    }

    #[test]
    fn every_metric_has_its_name_and_labels() {
        let reconciles = Reconciles::default();
        reconciles.record(Duration::from_millis(30), 2);
        let mut text = String::new();
        encode(&mut text, &registry(status(), &reconciles)).unwrap();
        for line in [
            "gambeson_peers 1",
            "gambeson_refused_peers 1",
            "gambeson_admission_enforced 0",
            "gambeson_peer_handshake_age_seconds{peer=\"node-2\"} 5",
            "gambeson_peer_receive_bytes_total{peer=\"node-2\"} 10",
            "gambeson_peer_transmit_bytes_total{peer=\"node-2\"} 20",
            "gambeson_guard_seen_whole_timestamp_seconds 7",
            "gambeson_guard_drops_total{direction=\"out\"} 3",
            "gambeson_guard_drops_total{direction=\"in\"} 0",
            "gambeson_key_generation 6",
            "gambeson_key_rotation_under_way 1",
            "gambeson_key_rotation_blocked{peer=\"node-2\"} 1",
            "gambeson_reconcile_errors_total 2",
            "gambeson_reconcile_duration_seconds_bucket{le=\"0.05\"} 1",
            "gambeson_build_info{version=",
        ] {
            assert!(text.contains(line), "{line} is missing in\n{text}");
        }
    }

    async fn request(address: SocketAddr, path: &str) -> String {
        let mut stream = TcpStream::connect(address).await.unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    }

    #[tokio::test]
    async fn readiness_follows_the_status() {
        let (last, receiver) = watch::channel(status());
        let (questions, asked) = mpsc::channel(1);
        drop(asked);
        let listener = bind("127.0.0.1:0".parse().unwrap()).await.unwrap();
        let address = listener.local_addr().unwrap();
        let limit = Duration::from_secs(5);
        let rounds = Rounds::new(limit);
        let source = Source::new(receiver, questions, rounds.clone());
        let reconciles = Reconciles::default();
        let task = tokio::spawn(async move { serve(listener, source, &reconciles).await });
        assert!(request(address, "/healthz").await.starts_with("HTTP/1.1 200"));
        assert!(request(address, "/readyz").await.starts_with("HTTP/1.1 503"));
        last.send_modify(|status| status.ready = true);
        assert!(request(address, "/readyz").await.starts_with("HTTP/1.1 200"));
        // A loop that hangs is neither healthy nor ready.
        rounds.stood_still_for(2 * limit);
        for path in ["/healthz", "/readyz"] {
            let answer = request(address, path).await;
            assert!(answer.starts_with("HTTP/1.1 503"), "{answer}");
            assert!(answer.contains("has not gone round for 10 s"), "{answer}");
        }
        rounds.went_round();
        assert!(request(address, "/healthz").await.starts_with("HTTP/1.1 200"));
        let metrics = request(address, "/metrics").await;
        assert!(metrics.contains("gambeson_ready 1"), "{metrics}");
        let error = bind(address).await.unwrap_err().to_string();
        assert!(error.contains("--healthz-port"), "{error}");
        task.abort();
    }
}
