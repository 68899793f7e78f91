//! The container image that `make image` left behind.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::Read;
use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::Value;

use crate::common::image::{config, made, target, unpack};
use crate::common::lab::stdout_of;

/// Largest size of the compressed image in bytes.
const LARGEST: u64 = 60_000_000;

fn names(folder: &Path) -> BTreeSet<String> {
    let entries = fs::read_dir(folder).unwrap();
    entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

#[test]
fn the_image_is_small_and_holds_what_it_needs_alone() {
    let archive = made("gambeson.tar");
    let mut gzip = Command::new("gzip")
        .arg("-c")
        .stdin(File::open(&archive).unwrap())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut compressed = Vec::new();
    gzip.stdout.take().unwrap().read_to_end(&mut compressed).unwrap();
    assert!(gzip.wait().unwrap().success());
    assert!((compressed.len() as u64) < LARGEST, "{} bytes", compressed.len());

    let root = tempfile::tempdir().unwrap();
    unpack(&archive, root.path());
    for (folder, held) in [
        ("usr/bin", &["gambeson"][..]),
        ("usr/sbin", &["nft"]),
        ("usr/lib/cni", &["bridge", "host-local", "loopback", "portmap", "static"]),
        ("etc/ssl/certs", &["ca-certificates.crt"]),
    ] {
        let held = held.iter().map(|name| (*name).to_owned()).collect();
        assert_eq!(names(&root.path().join(folder)), held, "{folder}");
    }
    // Without a shell in the image, nft itself tells that all its libraries are there.
    let nft = stdout_of(Command::new("chroot").arg(root.path()).args(["/usr/sbin/nft", "-v"]));
    assert!(nft.starts_with("nftables v1."), "{nft}");

    let labels = config(&archive)["Labels"].clone();
    let revision = labels["org.opencontainers.image.revision"].as_str().unwrap();
    assert_eq!(labels["org.opencontainers.image.version"], env!("CARGO_PKG_VERSION"));
    let version = stdout_of(Command::new(root.path().join("usr/bin/gambeson")).arg("--version"));
    let expected = format!("gambeson {} ({revision})\n", env!("CARGO_PKG_VERSION"));
    assert_eq!(version, expected);
}

#[test]
fn the_contents_are_listed_and_in_the_program_too() {
    let text = fs::read(made("gambeson.cdx.json")).unwrap();
    let list: Value = serde_json::from_slice(&text).unwrap();
    assert_eq!(list["bomFormat"], "CycloneDX");
    let components = list["components"].as_array().unwrap();
    for (name, purl) in [("ring", "pkg:cargo/ring@"), ("nftables", "pkg:deb/debian/")] {
        let is_it = |component: &Value| {
            component["name"] == name && component["purl"].as_str().unwrap().starts_with(purl)
        };
        assert!(components.iter().any(is_it), "{name}");
    }
}

#[test]
fn the_same_inputs_make_the_same_bytes() {
    let first = made("gambeson.tar");
    let again = tempfile::tempdir().unwrap();
    let build = concat!(env!("CARGO_MANIFEST_DIR"), "/deploy/image/build");
    let mut build = Command::new(build);
    build.arg(again.path());
    // What cargo tells a test of its package makes build scripts start anew.
    let tells =
        |name: &str| name == "OUT_DIR" || name.starts_with("CARGO_") && name != "CARGO_HOME";
    for (name, _) in std::env::vars().filter(|(name, _)| tells(name)) {
        build.env_remove(name);
    }
    stdout_of(build.env("CARGO_TARGET_DIR", target()));
    for name in ["gambeson.tar", "gambeson.cdx.json"] {
        let same = fs::read(made(name)).unwrap() == fs::read(again.path().join(name)).unwrap();
        assert!(same, "{name} differs from the first: is {} of this commit?", first.display());
    }
}
