//! Labs come up whole or not at all, and leave nothing behind.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use gambeson_lab::wait::until;
use gambeson_lab::{Lab, LabError, LabName, Options, Progress, state_dir};

use crate::common::lab::{GAMBESON, both, chain, lab_options, lab_up, stdout_of, unique_name};

fn gambeson(arguments: &[&str]) -> Command {
    let mut command = Command::new(GAMBESON);
    command.args(arguments).stdin(Stdio::null());
    command
}

/// Everything on this machine that still bears the lab's name.
fn traces(name: &LabName) -> Vec<String> {
    let mut traces = Vec::new();
    if state_dir(name).exists() {
        traces.push(state_dir(name).display().to_string());
    }
    let named = |folder: &str| {
        let entries = fs::read_dir(folder).into_iter().flatten().flatten();
        entries.map(|entry| entry.path()).collect::<Vec<PathBuf>>()
    };
    let prefix = format!("{name}-");
    traces.extend(
        named("/run/netns")
            .iter()
            .filter(|path| path.file_name().unwrap().to_str().unwrap().starts_with(&prefix))
            .map(|path| path.display().to_string()),
    );
    let mounts = fs::read_to_string("/proc/mounts").unwrap();
    traces.extend(mounts.lines().filter(|m| m.contains(&format!("/{prefix}"))).map(str::to_owned));
    for process in named("/proc") {
        let line = fs::read(process.join("cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line).replace('\0', " ");
        let mounts = fs::read_to_string(process.join("mountinfo")).unwrap_or_default();
        let own = process.file_name().unwrap().to_str() == Some(&std::process::id().to_string());
        let ours = line.contains(&format!("--name {name}"))
            || mounts.contains(&format!("/gambeson-lab/{name}/"));
        if ours && !own {
            traces.push(format!("{}: {line}", process.display()));
        }
    }
    traces
}

#[test]
fn a_lab_goes_without_a_trace() {
    let lab = lab_up(lab_options());
    let name = lab.options().name.clone();
    assert!(traces(&name).len() > 6, "{:?}", traces(&name));
    drop(lab);
    assert_eq!(traces(&name), Vec::<String>::new());
}

#[test]
fn a_killed_lab_up_is_cleaned_up_after() {
    // At each of these moments there is something else to clean up.
    for (number, moment) in ["lab.json", "api.journal", "node-1/agent.log"].iter().enumerate() {
        let name = unique_name();
        let arguments = ["lab", "up", "--name", name.as_str(), "--nodes", "2"];
        let mut child =
            gambeson(&arguments).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        let path = state_dir(&name).join(moment);
        let deadline = Instant::now() + Duration::from_secs(30);
        let reached = until(deadline, || path.exists().then_some(()));
        // Later moments also get a little of what follows.
        thread::sleep(Duration::from_millis(20 * number as u64));
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(reached.is_some(), "no {moment}");
        let again = gambeson(&arguments).output().unwrap();
        assert!(both(&again).contains("exists already"), "{}", both(&again));
        let status = gambeson(&["lab", "status", "--name", name.as_str()]).output().unwrap();
        assert!(both(&status).contains("was never finished"), "{}", both(&status));
        stdout_of(&mut gambeson(&["lab", "down", "--name", name.as_str()]));
        assert_eq!(traces(&name), Vec::<String>::new(), "{moment}");
    }
}

#[test]
fn an_interrupted_lab_up_takes_itself_down() {
    let name = unique_name();
    let mut child = gambeson(&["lab", "up", "--name", name.as_str(), "--nodes", "3"])
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let path = state_dir(&name).join("node-1/agent.log");
    until(Instant::now() + Duration::from_secs(30), || path.exists().then_some(())).unwrap();
    stdout_of(Command::new("kill").args(["-INT", &child.id().to_string()]));
    let status = child.wait().unwrap();
    assert!(!status.success());
    assert_eq!(traces(&name), Vec::<String>::new());
}

#[test]
fn a_lab_that_fails_says_why_and_is_gone() {
    let folder = tempfile::tempdir().unwrap();
    let binary = folder.path().join("broken");
    // Serves the API as it should, and fails as an agent.
    let script = format!(
        "#!/bin/sh\n[ \"$1\" = agent ] || exec {GAMBESON} \"$@\"\necho the dog ate it >&2\nexit 1\n"
    );
    fs::write(&binary, script).unwrap();
    stdout_of(Command::new("chmod").arg("755").arg(&binary));
    let options = Options { binary, ..lab_options() };
    let name = options.name.clone();
    let error = Lab::up(options, &Progress::silent()).unwrap_err();
    let message = chain(&error);
    assert!(message.contains("the agent of node-"), "{message}");
    assert!(message.contains("the dog ate it"), "{message}");
    assert_eq!(traces(&name), Vec::<String>::new());
}

#[test]
fn labs_stand_side_by_side_and_names_are_taken_once() {
    let bare = || Options { start: false, ..lab_options() };
    let (first, second) = (lab_up(bare()), lab_up(bare()));
    assert_ne!(first.api_url(), second.api_url());
    let again = Lab::up(first.options().clone(), &Progress::silent()).unwrap_err();
    assert!(matches!(again, LabError::Exists(_)), "{again}");
    let name = first.options().name.clone();
    drop(first);
    assert_eq!(traces(&name), Vec::<String>::new());
    assert!(second.status().api_up);
    assert!(matches!(Lab::open(&name).unwrap_err(), LabError::Missing(_)));
    assert!(!Lab::down(&name, &Progress::silent()).unwrap());
}

#[test]
fn programs_run_on_nodes_and_in_pods() {
    let lab = lab_up(Options { start: false, ..lab_options() });
    let name = lab.options().name.as_str();
    let run = |place: &str, command: &[&str]| {
        let arguments = [&["lab", "exec", "--name", name, place, "--"], command].concat();
        gambeson(&arguments).output().unwrap()
    };
    let addresses = run("node-2", &["ip", "-brief", "address", "show", "eth0"]);
    assert!(both(&addresses).contains("192.168.240.2/24"), "{}", both(&addresses));
    // What a node writes below /run and /var/lib is its own.
    assert!(run("node-1", &["touch", "/run/mine", "/var/lib/mine"]).status.success());
    assert!(!run("node-2", &["test", "-e", "/run/mine"]).status.success());
    assert!(!Path::new("/run/mine").exists() && !Path::new("/var/lib/mine").exists());
    assert!(run("node-1", &["test", "-e", "/run/mine"]).status.success());
    // Devices below /sys are those of the place.
    let devices = run("pod-1-1", &["ls", "/sys/class/net"]);
    assert_eq!(String::from_utf8_lossy(&devices.stdout), "lo\n");
    assert_eq!(run("pod-1-1", &["sh", "-c", "exit 7"]).status.code(), Some(7));
    let unknown = run("pod-9-9", &["true"]);
    assert!(both(&unknown).contains("it has node-1, node-2, pod-1-1"), "{}", both(&unknown));
}

#[test]
fn a_gambeson_without_the_lab_says_where_to_get_it() {
    let folder = tempfile::tempdir().unwrap();
    let alone = folder.path().join("gambeson");
    fs::copy(GAMBESON, &alone).unwrap();
    let mut command = Command::new(&alone);
    let output = command.args(["lab", "up"]).env("PATH", folder.path()).output().unwrap();
    let message = both(&output);
    assert_eq!(output.status.code(), Some(1), "{message}");
    assert!(message.contains("gambeson-lab, which is neither beside"), "{message}");
    assert!(message.contains("cargo build --release -p gambeson-lab"), "{message}");
}
