//! Every ordered pair: three echoes and one TCP conversation.

use std::net::{IpAddr, SocketAddr};
use std::sync::Mutex;
use std::sync::PoisonError;
use std::thread;
use std::time::Duration;

use super::between::Transports;
use super::{IpFamily, PairResult};
use crate::error::LabError;
use crate::instance::{Lab, in_parallel};
use crate::netns::Netns;
use crate::probe::ping::{Echo, Pinger};
use crate::probe::tcp::{self, EchoServer};

const ECHOES: usize = 3;

/// A pod, or a node by the address it has in the pod network.
struct Place {
    name: String,
    node: String,
    netns: Netns,
    is_node: bool,
    addresses: Vec<IpAddr>,
}

/// Checks every ordered pair of pods, and of nodes and pods.
pub(super) fn check(
    lab: &Lab,
    transports: &Transports,
) -> Result<(Vec<PairResult>, Vec<PairResult>), LabError> {
    let places = places(lab);
    let servers = start_servers(&places)?;
    let results = Mutex::new(Vec::new());
    let workers = thread::available_parallelism().map_or(2, usize::from) * 2;
    let queue = Mutex::new(places.iter());
    let checked = in_parallel((0..workers).collect(), |_| -> Result<(), LabError> {
        while let Some(from) = locked(&queue).next() {
            let targets: Vec<_> = places
                .iter()
                .zip(&servers)
                .filter(|(to, _)| to.name != from.name && !(from.is_node && to.is_node))
                .collect();
            let of_place = from.netns.run(|| {
                let pairs = targets.iter().flat_map(|(to, server)| {
                    to.addresses.iter().map(|ip| {
                        check_pair(from, to, SocketAddr::new(*ip, server.port()), transports)
                    })
                });
                pairs.collect::<Vec<_>>()
            })?;
            locked(&results).extend(of_place);
        }
        Ok(())
    });
    for (place, server) in places.iter().zip(servers) {
        place.netns.run(|| server.stop())?;
    }
    checked?;
    let mut results = results.into_inner().unwrap_or_else(PoisonError::into_inner);
    results.sort_by_cached_key(|pair| {
        (pair.family, position(&places, &pair.from), position(&places, &pair.to))
    });
    let is_node = |name: &str| places.iter().any(|place| place.is_node && place.name == name);
    Ok(results.into_iter().partition(|pair| !is_node(&pair.from) && !is_node(&pair.to)))
}

/// The pairs that failed, in words.
pub(super) fn failures<'a>(
    pairs: impl Iterator<Item = &'a PairResult>,
) -> impl Iterator<Item = String> {
    pairs.filter_map(|pair| {
        let error = pair.error.as_ref()?;
        Some(format!("{} to {}: {error}", pair.from, pair.to))
    })
}

fn places(lab: &Lab) -> Vec<Place> {
    let nodes = lab.nodes().into_iter().map(|node| Place {
        name: node.name(),
        node: node.name(),
        netns: node.netns(),
        is_node: true,
        addresses: node.pod_gateways(),
    });
    let pods = lab.pods().into_iter().map(|pod| Place {
        name: pod.name(),
        node: pod.node().name(),
        netns: pod.netns(),
        is_node: false,
        addresses: pod.addresses(),
    });
    nodes.chain(pods).collect()
}

fn start_servers(places: &[Place]) -> Result<Vec<EchoServer>, LabError> {
    let start = |place: &Place| {
        place.netns.run(EchoServer::start)?.map_err(|source| LabError::Measure {
            what: format!("start a TCP server in {}", place.name),
            source,
        })
    };
    places.iter().map(start).collect()
}

fn check_pair(from: &Place, to: &Place, server: SocketAddr, transports: &Transports) -> PairResult {
    let outcome = probe(server);
    let transport = if from.node == to.node {
        "local"
    } else {
        transports.name(&from.node, &to.node).unwrap_or("unknown")
    };
    let unnamed = (transport == "unknown" && outcome.is_ok())
        .then(|| format!("the agent of {} does not name its transport", from.node));
    PairResult {
        from: from.name.clone(),
        to: to.name.clone(),
        family: IpFamily::of(server.ip()),
        ok: outcome.is_ok() && unnamed.is_none(),
        rtt_us: outcome.as_ref().ok().and_then(|rtt| rtt.as_micros().try_into().ok()),
        transport: transport.to_owned(),
        error: outcome.err().or(unnamed),
    }
}

/// Median round-trip time, or what went wrong.
fn probe(server: SocketAddr) -> Result<Duration, String> {
    let ip = server.ip();
    let failed = |error: std::io::Error| format!("cannot ping {ip}: {error}");
    let mut pinger = Pinger::new(ip).map_err(failed)?;
    let mut times = Vec::with_capacity(ECHOES);
    for _ in 0..ECHOES {
        match pinger.echo().map_err(failed)? {
            Echo::Answered(time) => times.push(time),
            Echo::TooLarge => return Err(format!("an ordinary ping to {ip} is too large")),
            Echo::Lost => return Err(format!("a ping to {ip} was not answered")),
        }
    }
    match tcp::echoes(server, b"gambeson") {
        Ok(true) => {}
        Ok(false) => return Err(format!("TCP to {server} came back changed")),
        Err(error) => return Err(format!("TCP to {server} failed: {error}")),
    }
    times.sort();
    Ok(times[ECHOES / 2])
}

fn position(places: &[Place], name: &str) -> Option<usize> {
    places.iter().position(|place| place.name == name)
}

fn locked<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
