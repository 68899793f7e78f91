//! Tells the program which commit it was built from.

use std::env;
use std::path::Path;
use std::process::Command;

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-env-changed=GAMBESON_COMMIT");
    let commit = match env::var("GAMBESON_COMMIT") {
        Ok(commit) if !commit.is_empty() => commit,
        // A build for development does not start anew for every commit.
        _ if env::var("PROFILE").as_deref() == Ok("release") => head(),
        _ => "development".to_owned(),
    };
    println!("cargo::rustc-env=GAMBESON_BUILT_FROM={commit}");
}

/// The commit that is checked out, where this is a clone.
fn head() -> String {
    let log = Path::new(".git/logs/HEAD");
    if log.exists() {
        println!("cargo::rerun-if-changed={}", log.display());
    }
    let git = Command::new("git").args(["rev-parse", "--short=12", "HEAD"]).output();
    let commit = git.ok().filter(|output| output.status.success());
    let commit = commit.and_then(|output| String::from_utf8(output.stdout).ok());
    commit.map_or_else(|| "unknown".to_owned(), |commit| commit.trim().to_owned())
}
