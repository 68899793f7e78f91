//! Taking a lab down, from whatever there is of it: a crash may have happened anywhere.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use nix::mount::{MntFlags, umount2};

use super::error::{LabError, file_error};
use super::layout::{NETNS_ROOT, STATE_ROOT, is_netns_of, state_dir};
use super::netns::Netns;
use super::options::{LabName, Options};
use super::process::{self, ProcessId};
use super::progress::Progress;
use super::runtime::ConfList;
use super::state::State;
use super::{daemon, instance};

/// How long a child of a killed `lab up` may still be at work.
const SETTLE_TIME: Duration = Duration::from_millis(50);

/// Removes everything that belongs to the lab. False when there was nothing.
pub(super) fn take_down(name: &LabName, progress: &Progress) -> Result<bool, LabError> {
    let folder = state_dir(name);
    if namespaces_of(name).is_empty() && !folder.exists() {
        return Ok(false);
    }
    progress.step(format!("taking down lab {name}"));
    // A state that was cut short names nothing that its namespaces do not have.
    let state = State::load(name).ok().flatten();
    if let Some(state) = &state {
        detach_pods(state);
    }
    let finished = state.as_ref().is_some_and(|state| state.finished);
    loop {
        end_processes(name, state.as_ref()).map_err(|error| left(name, error))?;
        for netns in namespaces_of(name) {
            remove_netns(&netns.path()).map_err(|error| left(name, error))?;
        }
        if finished {
            break;
        }
        // A `lab up` that was killed may have a child that is still making something.
        thread::sleep(SETTLE_TIME);
        if namespaces_of(name).is_empty() && processes_of(name, state.as_ref()).is_empty() {
            break;
        }
    }
    remove_folder(&folder).map_err(|error| left(name, error))?;
    // Only the last lab takes the folder of all labs with it.
    let _ = fs::remove_dir(STATE_ROOT);
    Ok(true)
}

fn left(name: &LabName, source: LabError) -> LabError {
    LabError::Left { lab: name.clone(), source: Box::new(source) }
}

/// All namespaces with a name that only this lab gives.
fn namespaces_of(name: &LabName) -> Vec<Netns> {
    let entries = fs::read_dir(NETNS_ROOT).into_iter().flatten().flatten();
    let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
    names.filter(|netns| is_netns_of(name, netns)).map(Netns::named).collect()
}

fn end_processes(name: &LabName, state: Option<&State>) -> Result<(), LabError> {
    // There is nothing that they could put in order which does not go anyway.
    let ended = process::kill_all(|| processes_of(name, state));
    if ended { Ok(()) } else { Err(LabError::Stuck("a process of the lab".to_owned())) }
}

/// What runs in the namespaces, and the API server, which runs outside.
fn processes_of(name: &LabName, state: Option<&State>) -> Vec<ProcessId> {
    let identities: Vec<_> = namespaces_of(name).iter().filter_map(Netns::identity).collect();
    let mut processes = process::in_namespaces(&identities);
    let api = daemon::api_arguments(name);
    processes.extend(process::with_arguments(&api.each_ref().map(String::as_str)));
    let recorded = state.and_then(|state| state.api.as_ref()).map(|api| api.process);
    processes.extend(recorded.filter(|process| process.is_alive()));
    // This very process may be in a namespace of the lab, by `lab exec`.
    let own = i32::try_from(std::process::id()).unwrap_or_default();
    processes.retain(|process| process.pid != own);
    processes
}

/// A runtime's last duty to its pods. What it fails to undo goes with the namespaces.
fn detach_pods(state: &State) {
    let options: &Options = &state.options;
    let nodes = options.node_indices().collect();
    let _ = instance::in_parallel(nodes, |node| -> Result<(), ()> {
        let environment = daemon::environment(options, node);
        let Ok(Some(configuration)) = ConfList::first_on(&environment) else { return Ok(()) };
        for pod in options.pod_indices(node) {
            if state.pods.contains_key(&pod.name()) {
                let netns = Netns::named(pod.netns(&options.name));
                let _ = configuration.delete(&environment, &netns);
            }
        }
        Ok(())
    });
}

/// The namespace itself goes with the last process in it.
pub(super) fn remove_netns(path: &Path) -> Result<(), LabError> {
    // A crash between making the file and mounting the namespace on it leaves a plain file.
    let _ = umount2(path, MntFlags::MNT_DETACH);
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(file_error("remove", path)(error))
        }
        _ => Ok(()),
    }
}

fn remove_folder(folder: &Path) -> Result<(), LabError> {
    // Nothing is mounted below in this mount namespace unless somebody did it by hand; then
    // what is mounted must not be removed with the folder.
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let below = mounts.lines().filter_map(|line| line.split(' ').nth(1)).map(PathBuf::from);
    let mut below: Vec<PathBuf> = below.filter(|mount| mount.starts_with(folder)).collect();
    below.sort();
    for mount in below.iter().rev() {
        umount2(mount, MntFlags::MNT_DETACH)
            .map_err(|errno| file_error("unmount", mount)(errno.into()))?;
    }
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(file_error("remove", folder)(error))
        }
        _ => Ok(()),
    }
}
