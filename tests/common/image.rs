//! The image that `make image` left behind.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

use super::lab::{GAMBESON, stdout_of};

/// The build folder.
pub(crate) fn target() -> PathBuf {
    Path::new(GAMBESON).ancestors().nth(2).unwrap().to_owned()
}

/// A file that `make image` made.
pub(crate) fn made(name: &str) -> PathBuf {
    let path = target().join("image").join(name);
    assert!(path.exists(), "{} is missing: run `make image`", path.display());
    path
}

fn member(archive: &Path, name: &str) -> Vec<u8> {
    let output = Command::new("tar").arg("-xOf").arg(archive).arg(name).output().unwrap();
    assert!(output.status.success(), "{name}: {}", String::from_utf8_lossy(&output.stderr));
    output.stdout
}

/// A JSON document of the archive.
pub(crate) fn json(archive: &Path, name: &str) -> Value {
    serde_json::from_slice(&member(archive, name)).unwrap()
}

/// What a container of the image runs with.
pub(crate) fn config(archive: &Path) -> Value {
    let name = json(archive, "manifest.json")[0]["Config"].as_str().unwrap().to_owned();
    json(archive, &name)["config"].clone()
}

/// Unpacks the image's only layer.
pub(crate) fn unpack(archive: &Path, root: &Path) {
    let manifest = json(archive, "manifest.json");
    let layers = manifest[0]["Layers"].as_array().unwrap();
    assert_eq!(layers.len(), 1, "{manifest}");
    let layer = root.with_extension("layer");
    fs::write(&layer, member(archive, layers[0].as_str().unwrap())).unwrap();
    stdout_of(Command::new("tar").arg("-xf").arg(&layer).arg("-C").arg(root));
    fs::remove_file(layer).unwrap();
}
