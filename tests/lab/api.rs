//! The kube crate against the lab's API server: lists, watches, conflicts, restarts, faults.

use std::collections::BTreeSet;
use std::pin::pin;
use std::time::{Duration, Instant};

use futures::{StreamExt, TryStreamExt};
use gambeson_lab::api::{Effect, Fault};
use gambeson_lab::{Lab, Options, Patch};
use k8s_openapi::api::core::v1::Node;
use kube::api::{
    Api, DeleteParams, ListParams, Patch as KubePatch, PatchParams, PostParams, WatchEvent,
    WatchParams,
};
use kube::runtime::watcher::{self, Event};
use kube::{Client, Config, ResourceExt};
use serde_json::json;

use crate::common::lab::{lab_options, lab_up};

const SOON: Duration = Duration::from_secs(10);

fn lab() -> Lab {
    lab_up(Options { start: false, pods_per_node: 0, ..lab_options() })
}

fn nodes(lab: &Lab) -> Api<Node> {
    let config = Config::new(lab.api_url().parse().unwrap());
    Api::all(Client::try_from(config).unwrap())
}

fn run<T>(future: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async { tokio::time::timeout(Duration::from_secs(60), future).await }).unwrap()
}

async fn soon<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(SOON, future).await.expect("nothing came in time")
}

fn code(error: kube::Error) -> u16 {
    match error {
        kube::Error::Api(status) => status.code,
        other => panic!("not an answer of the API server: {other}"),
    }
}

fn annotation(value: &str) -> KubePatch<serde_json::Value> {
    KubePatch::Merge(json!({"metadata": {"annotations": {"test/value": value}}}))
}

#[test]
fn optimistic_concurrency_holds() {
    let lab = lab();
    run(async {
        let nodes = nodes(&lab);
        let mut stale = nodes.get("node-1").await.unwrap();
        let params = PatchParams::default();
        let patched = nodes.patch("node-1", &params, &annotation("a")).await.unwrap();
        assert_ne!(stale.resource_version(), patched.resource_version());
        let same = nodes.patch("node-1", &params, &annotation("a")).await.unwrap();
        assert_eq!(same.resource_version(), patched.resource_version());

        stale.labels_mut().insert("late".into(), "yes".into());
        let replace = nodes.replace("node-1", &PostParams::default(), &stale).await;
        assert_eq!(code(replace.unwrap_err()), 409);
        let version = json!({"metadata": {"resourceVersion": stale.resource_version()}});
        let patch = nodes.patch("node-1", &params, &KubePatch::Merge(version)).await;
        assert_eq!(code(patch.unwrap_err()), 409);

        let mut fresh = patched;
        fresh.metadata.resource_version = same.resource_version();
        fresh.labels_mut().insert("late".into(), "no".into());
        nodes.replace("node-1", &PostParams::default(), &fresh).await.unwrap();
        let again = nodes.create(&PostParams::default(), &fresh).await;
        assert_eq!(code(again.unwrap_err()), 409);
        nodes.delete("node-1", &DeleteParams::default()).await.unwrap();
        assert_eq!(code(nodes.get("node-1").await.unwrap_err()), 404);
    });
}

#[test]
fn status_and_spec_change_apart() {
    let lab = lab();
    let both = json!({
        "metadata": {"annotations": {"gambeson.io/public-key": "k"}},
        "spec": {"podCIDR": "10.9.9.0/24"},
        "status": {"conditions": [
            {"type": "NetworkUnavailable", "status": "False", "reason": "GambesonIsUp"},
        ]},
    });
    let node = lab.api().unwrap().patch_status("node-1", Patch::Strategic, &both).unwrap();
    assert_eq!(node["metadata"]["annotations"]["gambeson.io/public-key"], "k");
    assert_eq!(node["spec"]["podCIDR"], "10.244.1.0/24");
    let conditions = node["status"]["conditions"].as_array().unwrap();
    assert_eq!(conditions.len(), 2, "{node}");
    assert_eq!(conditions[1]["reason"], "GambesonIsUp");
    let node = lab.api().unwrap().patch_node("node-1", Patch::Merge, &both).unwrap();
    assert_eq!(node["spec"]["podCIDR"], "10.9.9.0/24");
    assert_eq!(node["status"]["conditions"].as_array().unwrap().len(), 2);
}

/// The state of the watcher after its next relevant event.
async fn next_value(
    events: &mut (impl futures::Stream<Item = watcher::Result<Event<Node>>> + Unpin),
    seen: &mut BTreeSet<(String, String)>,
    wanted: (&str, &str),
) {
    let wanted = (wanted.0.to_owned(), wanted.1.to_owned());
    while !seen.contains(&wanted) {
        // Errors are part of the exercise: the watcher recovers from them.
        if let Some(Ok(Event::Apply(node) | Event::InitApply(node))) = soon(events.next()).await {
            let value = node.annotations().get("test/value").cloned().unwrap_or_default();
            seen.insert((node.name_any(), value));
        }
    }
}

#[test]
fn a_watcher_follows_through_restarts_and_every_fault() {
    let lab = lab();
    run(async {
        let nodes = nodes(&lab);
        let params = PatchParams::default();
        for strategy in [watcher::Config::default(), watcher::Config::default().streaming_lists()] {
            let mut seen = BTreeSet::new();
            let mut events = pin!(watcher::watcher(nodes.clone(), strategy));
            next_value(&mut events, &mut seen, ("node-2", "")).await;
            for (value, effect) in [
                ("gone", Effect::Gone),
                ("cut", Effect::Cut),
                ("twice", Effect::Duplicate),
                ("late", Effect::Delay { milliseconds: 200 }),
                ("refused", Effect::Status { code: 500, retry_after: None }),
            ] {
                let fault = Fault::every(effect).on("watch").times(1);
                in_another_thread(|| set(&lab, &[fault]));
                nodes.patch("node-1", &params, &annotation(value)).await.unwrap();
                next_value(&mut events, &mut seen, ("node-1", value)).await;
            }
        }
    });
}

#[test]
fn a_watch_resumes_over_a_restart_of_the_server() {
    let lab = lab();
    let from = run(async { nodes(&lab).list(&ListParams::default()).await.unwrap() })
        .metadata
        .resource_version
        .unwrap();
    run(async {
        nodes(&lab).patch("node-1", &PatchParams::default(), &annotation("before")).await.unwrap()
    });
    lab.kill_api().unwrap();
    assert!(!lab.status().api_up);
    run(async { nodes(&lab).get("node-1").await.unwrap_err() });
    lab.start_api().unwrap();
    run(async {
        let nodes = nodes(&lab);
        nodes.patch("node-2", &PatchParams::default(), &annotation("after")).await.unwrap();
        let params = WatchParams::default().timeout(5);
        let mut events = pin!(nodes.watch(&params, &from).await.unwrap());
        for wanted in ["node-1", "node-2"] {
            match soon(events.try_next()).await.unwrap() {
                Some(WatchEvent::Modified(node)) => assert_eq!(node.name_any(), wanted),
                other => panic!("{other:?} instead of a change of {wanted}"),
            }
        }
    });
}

#[test]
fn a_watch_that_asks_for_too_much_gets_410() {
    let lab = lab();
    run(async {
        let nodes = nodes(&lab);
        let mut events = pin!(nodes.watch(&WatchParams::default(), "999999").await.unwrap());
        match soon(events.try_next()).await.unwrap() {
            Some(WatchEvent::Error(status)) => assert_eq!(status.code, 410),
            other => panic!("{other:?} instead of an error"),
        }
    });
}

#[test]
fn a_watch_ends_in_time_and_bookmarks_its_initial_state() {
    let lab = lab();
    run(async {
        let nodes = nodes(&lab);
        let params = WatchParams::default().initial_events().timeout(1);
        let start = Instant::now();
        let events = nodes.watch(&params, "0").await.unwrap();
        let events: Vec<_> = soon(events.try_collect()).await.unwrap();
        assert!(start.elapsed() >= Duration::from_secs(1), "{:?}", start.elapsed());
        match events.as_slice() {
            [WatchEvent::Added(_), WatchEvent::Added(_), WatchEvent::Bookmark(mark)] => {
                let end = mark.metadata.annotations.get("k8s.io/initial-events-end");
                assert_eq!(end.map(String::as_str), Some("true"));
            }
            other => panic!("{other:?}"),
        }
    });
}

#[test]
fn faults_answer_hang_and_empty_lists() {
    let lab = lab();
    let list = |lab: &Lab| run(async { nodes(lab).list(&ListParams::default()).await });
    let status = |code, retry_after| Fault::every(Effect::Status { code, retry_after }).on("list");
    for wanted in [401, 403, 409, 500] {
        set(&lab, &[status(wanted, None)]);
        assert_eq!(code(list(&lab).unwrap_err()), wanted);
    }
    // The kube crate tries again by itself.
    set(&lab, &[status(429, Some(1)).times(1)]);
    assert_eq!(list(&lab).unwrap().items.len(), 2);
    set(&lab, &[Fault::every(Effect::EmptyList).times(1)]);
    assert_eq!(list(&lab).unwrap().items.len(), 0);
    assert_eq!(list(&lab).unwrap().items.len(), 2);
    set(&lab, &[Fault::every(Effect::Hang).on("list")]);
    run(async {
        let nodes = nodes(&lab);
        let params = ListParams::default();
        let hanging = tokio::time::timeout(Duration::from_millis(300), nodes.list(&params)).await;
        assert!(hanging.is_err());
        nodes.get("node-1").await.unwrap();
    });
}

/// The lab's own client waits, which must not happen inside an async runtime.
fn in_another_thread(work: impl FnOnce() + Send) {
    std::thread::scope(|scope| scope.spawn(work).join().unwrap());
}

fn set(lab: &Lab, faults: &[Fault]) {
    lab.api().unwrap().set_faults(faults).unwrap();
}
