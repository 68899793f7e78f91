//! `--k3s`: where k3s has what elsewhere is in `/etc` and `/opt`.

use std::path::{Path, PathBuf};

use regex::Regex;

use super::check::{ConfigError, invalid};
use crate::cni::install;

/// Of a server, which is an admin's; of an agent, which is its kubelet's.
const KUBECONFIGS: [&str; 2] =
    ["etc/rancher/k3s/k3s.yaml", "var/lib/rancher/k3s/agent/kubelet.kubeconfig"];
/// What k3s tells its containerd.
const CONTAINERD: &str = "var/lib/rancher/k3s/agent/etc/containerd/config.toml";
/// Where k3s has CNI for its own Flannel. With `--flannel-backend=none` it tells containerd
/// nothing, which then looks where it does everywhere.
const CNI_CONF_DIR: &str = "var/lib/rancher/k3s/agent/etc/cni/net.d";
const CNI_BIN_DIR: &str = "var/lib/rancher/k3s/data/cni";
/// The default `--cluster-cidr` of k3s.
pub(super) const CLUSTER_CIDR: &str = "10.42.0.0/16";

/// The places on one node.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Places {
    pub(super) cni_conf_dir: PathBuf,
    pub(super) cni_bin_dir: PathBuf,
}

impl Places {
    /// As k3s has told its containerd. `root` is `/`.
    pub(super) fn find(root: &Path) -> Self {
        let config = std::fs::read_to_string(root.join(CONTAINERD)).ok();
        let told = |key: &str, own: &str, elsewhere: &str| {
            let Some(config) = &config else { return root.join(own) };
            let pattern = Regex::new(&format!(r#"(?m)^\s*{key}\s*=\s*\[?\s*["']([^"']+)["']"#));
            let captured = pattern.ok().and_then(|pattern| pattern.captures(config));
            let path = captured.map(|found| PathBuf::from(&found[1]));
            path.filter(|path| path.is_absolute()).unwrap_or_else(|| elsewhere.into())
        };
        Self {
            cni_conf_dir: told("conf_dir", CNI_CONF_DIR, install::DEFAULT_CONF_DIR),
            cni_bin_dir: told("bin_dirs?", CNI_BIN_DIR, install::DEFAULT_BIN_DIR),
        }
    }
}

/// The kubeconfig of a server or an agent of k3s. `root` is `/`.
///
/// # Errors
/// Neither is there.
pub(super) fn kubeconfig(root: &Path) -> Result<PathBuf, ConfigError> {
    let files = KUBECONFIGS.map(|file| root.join(file));
    files.iter().find(|file| file.exists()).cloned().ok_or_else(|| {
        let [server, agent] = files.map(|file| file.display().to_string());
        let problem = format!("neither {server} nor {agent} is there");
        invalid("--k3s", problem, "start k3s first, or give --kubeconfig")
    })
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn the_places_are_those_that_containerd_is_told() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path();
        let default = Places {
            cni_conf_dir: root.join("var/lib/rancher/k3s/agent/etc/cni/net.d"),
            cni_bin_dir: root.join("var/lib/rancher/k3s/data/cni"),
        };
        assert_eq!(Places::find(root), default);
        let config = root.join(CONTAINERD);
        fs::create_dir_all(config.parent().unwrap()).unwrap();
        for (text, bin) in [
            ("[plugins.cri.cni]\n  bin_dir = \"/a/bin\"\n  conf_dir = \"/a/net.d\"\n", "/a/bin"),
            ("[x.cni]\n  bin_dirs = ['/b/bin', '/c']\n  conf_dir = '/a/net.d'\n", "/b/bin"),
        ] {
            fs::write(&config, text).unwrap();
            let places = Places::find(root);
            assert_eq!(places.cni_bin_dir, Path::new(bin));
            assert_eq!(places.cni_conf_dir, Path::new("/a/net.d"));
        }
        for text in ["conf_dir = \"relative\"\n", "# no Flannel\n"] {
            fs::write(&config, text).unwrap();
            let places = Places::find(root);
            assert_eq!(places.cni_conf_dir, Path::new("/etc/cni/net.d"));
            assert_eq!(places.cni_bin_dir, Path::new("/opt/cni/bin"));
        }
    }

    #[test]
    fn a_server_and_an_agent_have_a_kubeconfig_each() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path();
        let error = kubeconfig(root).unwrap_err().to_string();
        assert!(error.contains("k3s.yaml") && error.contains("--kubeconfig"), "{error}");
        for file in KUBECONFIGS.iter().rev() {
            let file = root.join(file);
            fs::create_dir_all(file.parent().unwrap()).unwrap();
            fs::write(&file, "").unwrap();
            assert_eq!(kubeconfig(root).unwrap(), file);
        }
    }
}
