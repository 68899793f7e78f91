//! Follows net-conf.json while an agent runs, as a ConfigMap in a pod or an operator's editor
//! changes it.

use std::path::PathBuf;
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::spawn_blocking;
use tokio::time::sleep;

use super::check::ConfigError;
use super::net_conf::{Backend, NetConf};

/// How often the file is read: it is small, and a folder's watch would miss a remounted one.
const PAUSE: Duration = Duration::from_secs(1);

/// What the file says by now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reading {
    /// How packets may travel, as it said last when it could be used.
    pub backend: Backend,
    /// What of it cannot be used, or only after a restart.
    pub problem: Option<String>,
}

/// The file, and what it said when the agent started.
#[derive(Debug, Clone)]
pub struct NetConfWatch {
    path: PathBuf,
    started_with: NetConf,
}

impl NetConfWatch {
    pub(super) fn new(path: PathBuf, started_with: NetConf) -> Self {
        Self { path, started_with }
    }

    /// Gives each new reading. Never ends.
    pub async fn run(self, reading: watch::Sender<Reading>) {
        loop {
            sleep(PAUSE).await;
            let path = self.path.clone();
            let Ok(read) = spawn_blocking(move || NetConf::read(&path)).await else { continue };
            reading.send_if_modified(|before| {
                let new = self.judge(read, &before.backend);
                let is_new = *before != new;
                *before = new;
                is_new
            });
        }
    }

    /// What a look at the file means. A file that cannot be used changes nothing.
    fn judge(&self, read: Result<NetConf, ConfigError>, before: &Backend) -> Reading {
        match read {
            Err(error) => Reading {
                backend: before.clone(),
                problem: Some(format!("{error}; keeping what it said before")),
            },
            Ok(read) => {
                let NetConf { backend, kind, .. } = self.started_with.clone();
                // Whether Flannel's backend matters was decided at start.
                let kind = read.kind.filter(|_| kind.is_some());
                let rest = NetConf { backend, kind, ..read.clone() };
                let problem = (rest != self.started_with).then(|| {
                    format!(
                        "{} changed in more than how packets travel: restart the agent for the \
                         rest",
                        self.path.display()
                    )
                });
                Reading { backend: read.backend, problem }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use gambeson_mesh::node::Transport;

    use super::*;

    #[test]
    fn only_how_packets_travel_is_taken_from_a_changed_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("net-conf.json");
        let write = |text: &str| {
            std::fs::write(&path, text).unwrap();
            NetConf::read(&path)
        };
        let network = r#""Network": "10.9.0.0/16""#;
        let started_with =
            write(&format!(r#"{{{network}, "Backend": {{"Type": "wireguard"}}}}"#)).unwrap();
        let started_with = NetConf { kind: None, ..started_with };
        let watch = NetConfWatch::new(path.clone(), started_with);
        let vxlan = r#""Backend": {"Type": "vxlan"}"#;
        let vxlan_only = BTreeSet::from([Transport::Vxlan]);
        let read = write(&format!("{{{network}, {vxlan}}}"));
        let Reading { backend, problem } = watch.judge(read, &Backend::default());
        assert_eq!((&backend.transports, problem), (&vxlan_only, None));
        let read = write(&format!("{{{vxlan}}}"));
        let Reading { backend, problem } = watch.judge(read, &Backend::default());
        assert_eq!(backend.transports, vxlan_only);
        assert!(problem.unwrap().contains("restart the agent"));
        for broken in ["{", r#"{"Backend": {"Type": "udp"}}"#] {
            let reading = watch.judge(write(broken), &backend);
            assert_eq!(reading.backend, backend);
            let problem = reading.problem.unwrap();
            assert!(problem.contains("net-conf.json") && problem.contains("keeping"), "{problem}");
        }
    }
}
