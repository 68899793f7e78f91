//! The configuration that a reboot takes away until the guard is up: the file in the runtime's
//! folder is a symbolic link into `/run`, where the agent writes what it leads to.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::conflist;
use super::install::{CONFLIST_MODE, CONFLIST_NAME, InstallError, make_directory, write};
use crate::files;

/// The three places of the configuration.
#[derive(Debug, Clone)]
pub struct Places {
    /// Where container runtimes look for it.
    pub conf_dir: PathBuf,
    /// A folder that is empty after a boot.
    pub run_dir: PathBuf,
    /// A folder that outlives a boot, for what an operator has added.
    pub state_dir: PathBuf,
    /// What an operator gave in place of all that.
    pub given: Option<PathBuf>,
}

impl Places {
    /// With the run folder of the agent's socket and the state folder of its key file.
    pub fn of_agent(conf_dir: &Path, socket: &Path, key_file: &Path) -> Self {
        let folder = |file: &Path| file.parent().unwrap_or(file).to_owned();
        let [run_dir, state_dir] = [socket, key_file].map(folder);
        Self { conf_dir: conf_dir.to_owned(), run_dir, state_dir, given: None }
    }

    /// Puts the configuration for pods on `bridge` in place, in this version of the CNI
    /// specification unless an operator has chosen another, with all that an operator has
    /// added to what is there. Returns whether something changed.
    ///
    /// A runtime takes the network for ready as soon as the link leads somewhere, so the agent
    /// calls this only once the guard and subnet.env are in place.
    ///
    /// # Errors
    /// [`InstallError`]; what was there before is then still there, whole.
    pub fn hand_over(&self, bridge: &str, version: &str) -> Result<bool, InstallError> {
        let [link, target, kept] = [&self.conf_dir, &self.run_dir, &self.state_dir]
            .map(|folder| folder.join(CONFLIST_NAME));
        let source = self.given.as_ref().unwrap_or(&link);
        let refuse = |problem| InstallError::Conflist { path: source.clone(), problem };
        let cannot = |error: io::Error| refuse(format!("cannot be read: {error}"));
        let present = match &self.given {
            Some(given) => Some(fs::read(given).map_err(cannot)?),
            None => first_of(&[&link, &target, &kept]).map_err(cannot)?,
        };
        if let Some(given) = present.as_deref().filter(|_| self.given.is_some())
            && !conflist::has_our_plugin(given)
        {
            return Err(refuse("has no plugin of the type flannel or gambeson-cni".to_owned()));
        }
        let contents = conflist::wanted(present.as_deref(), bridge, version).map_err(refuse)?;
        for folder in [&self.conf_dir, &self.run_dir, &self.state_dir] {
            make_directory(folder)?;
        }
        write(&kept, &contents, CONFLIST_MODE)?;
        let changed = write(&target, &contents, CONFLIST_MODE)?;
        let leads_there = fs::read_link(&link).is_ok_and(|found| found == target);
        if !changed && leads_there {
            return Ok(false);
        }
        // A fresh link each time: what a link leads to, runtimes do not watch.
        files::symlink_atomic(&target, &link)
            .map_err(|source| InstallError::Write { path: link, source })?;
        Ok(true)
    }
}

impl Places {
    /// Takes away what [`Places::hand_over`] has put in place, but for what an operator added,
    /// and gives the paths. What somebody else has put in its place stays.
    ///
    /// # Errors
    /// [`InstallError::Remove`].
    pub fn take_back(&self) -> Result<impl Iterator<Item = PathBuf>, InstallError> {
        let link = self.conf_dir.join(CONFLIST_NAME);
        let target = self.run_dir.join(CONFLIST_NAME);
        let leads_there = fs::read_link(&link).is_ok_and(|found| found == target);
        let mut removed = Vec::new();
        for path in leads_there.then_some(link).into_iter().chain([target]) {
            match fs::remove_file(&path) {
                Ok(()) => removed.push(path),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(source) => return Err(InstallError::Remove { path, source }),
            }
        }
        Ok(removed.into_iter())
    }
}

/// The contents of the first of these that is there.
fn first_of(paths: &[&Path]) -> io::Result<Option<Vec<u8>>> {
    for path in paths {
        match fs::read(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            read => return read.map(Some),
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::cni::DEFAULT_BRIDGE;

    fn places(folder: &Path) -> Places {
        let [conf_dir, run_dir, state_dir] = ["conf", "run", "state"].map(|name| folder.join(name));
        Places { conf_dir, run_dir, state_dir, given: None }
    }

    fn read(path: &Path) -> Value {
        serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
    }

    #[test]
    fn after_a_boot_the_link_dangles_until_the_agent_hands_over() {
        let folder = tempfile::tempdir().unwrap();
        let places = places(folder.path());
        let link = places.conf_dir.join(CONFLIST_NAME);
        assert!(places.hand_over(DEFAULT_BRIDGE, "1.1.0").unwrap());
        assert!(!places.hand_over(DEFAULT_BRIDGE, "1.1.0").unwrap());
        assert_eq!(fs::read_link(&link).unwrap(), places.run_dir.join(CONFLIST_NAME));
        assert_eq!(read(&link)["cniVersion"], "1.1.0");

        fs::remove_dir_all(&places.run_dir).unwrap();
        assert!(!link.exists() && link.is_symlink());
        assert!(places.hand_over(DEFAULT_BRIDGE, "0.3.1").unwrap());
        // Other plugins are there now.
        assert_eq!(read(&link)["cniVersion"], "0.3.1");
    }

    #[test]
    fn what_an_operator_added_outlives_a_boot() {
        let folder = tempfile::tempdir().unwrap();
        let places = places(folder.path());
        let link = places.conf_dir.join(CONFLIST_NAME);
        fs::create_dir_all(&places.conf_dir).unwrap();
        let own = json!({
            "name": "cbr0", "cniVersion": "1.0.0",
            "plugins": [{ "type": "flannel", "delegate": { "vlan": 7 } }, { "type": "bandwidth" }],
        });
        fs::write(&link, own.to_string()).unwrap();
        assert!(places.hand_over(DEFAULT_BRIDGE, "1.1.0").unwrap());
        let mut expected = own;
        expected["plugins"][0]["type"] = "gambeson-cni".into();
        for _ in 0..2 {
            assert!(link.is_symlink());
            assert_eq!(read(&link), expected);
            fs::remove_dir_all(&places.run_dir).unwrap();
            assert!(places.hand_over(DEFAULT_BRIDGE, "1.1.0").unwrap());
        }
        // Edited in place, through the link.
        expected["plugins"][1]["type"] = "tuning".into();
        fs::write(&link, expected.to_string()).unwrap();
        places.hand_over(DEFAULT_BRIDGE, "1.1.0").unwrap();
        fs::remove_dir_all(&places.run_dir).unwrap();
        places.hand_over(DEFAULT_BRIDGE, "1.1.0").unwrap();
        assert_eq!(read(&link), expected);
    }

    #[test]
    fn what_an_operator_gives_is_taken_and_followed() {
        let folder = tempfile::tempdir().unwrap();
        let given = folder.path().join("cni-conf.json");
        let places = Places { given: Some(given.clone()), ..places(folder.path()) };
        let link = places.conf_dir.join(CONFLIST_NAME);
        // As in Flannel's own manifest.
        let mut conf = json!({
            "name": "cbr0", "cniVersion": "0.3.1",
            "plugins": [
                { "type": "flannel", "delegate": { "hairpinMode": true, "isDefaultGateway": true } },
                { "type": "portmap", "capabilities": { "portMappings": true } },
            ],
        });
        for mode in [true, false] {
            conf["plugins"][0]["delegate"]["hairpinMode"] = mode.into();
            fs::write(&given, conf.to_string()).unwrap();
            assert!(places.hand_over(DEFAULT_BRIDGE, "0.3.1").unwrap());
            assert!(!places.hand_over(DEFAULT_BRIDGE, "0.3.1").unwrap());
            assert_eq!(read(&link)["plugins"][0]["delegate"]["hairpinMode"], mode);
            assert_eq!(read(&link)["plugins"][0]["type"], "gambeson-cni");
        }
        for (broken, says) in [("{", "no plugin of the type"), ("", "no plugin of the type")] {
            fs::write(&given, broken).unwrap();
            let error = places.hand_over(DEFAULT_BRIDGE, "0.3.1").unwrap_err().to_string();
            assert!(error.contains(says) && error.contains("cni-conf.json"), "{error}");
        }
        fs::remove_file(&given).unwrap();
        let error = places.hand_over(DEFAULT_BRIDGE, "0.3.1").unwrap_err().to_string();
        assert!(error.contains("cni-conf.json: cannot be read"), "{error}");
        assert_eq!(read(&link)["plugins"][0]["delegate"]["hairpinMode"], false, "it is kept");
    }

    #[test]
    fn what_was_handed_over_can_be_taken_back() {
        let folder = tempfile::tempdir().unwrap();
        let places = places(folder.path());
        let link = places.conf_dir.join(CONFLIST_NAME);
        places.hand_over(DEFAULT_BRIDGE, "1.1.0").unwrap();
        assert_eq!(places.take_back().unwrap().count(), 2);
        assert!(!link.is_symlink() && !places.run_dir.join(CONFLIST_NAME).exists());
        assert_eq!(places.take_back().unwrap().count(), 0);
        fs::write(&link, "{}").unwrap();
        assert_eq!(places.take_back().unwrap().count(), 0);
        assert!(link.exists(), "it is somebody else's");
    }

    #[test]
    fn what_cannot_be_read_is_named_and_kept() {
        let folder = tempfile::tempdir().unwrap();
        let places = places(folder.path());
        fs::create_dir_all(places.conf_dir.join(CONFLIST_NAME)).unwrap();
        let error = places.hand_over(DEFAULT_BRIDGE, "1.1.0").unwrap_err().to_string();
        assert!(error.contains(CONFLIST_NAME), "{error}");
        assert!(!places.run_dir.exists());
    }
}
