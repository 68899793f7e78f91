//! The program by itself. What it does is tested with the agents, in `tests/` of the workspace;
//! cargo builds the program for those because this test needs it.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::process::Command;

#[test]
fn a_missing_agent_is_named_with_the_remedy() {
    let folder = tempfile::tempdir().unwrap();
    let alone = folder.path().join("gambeson-lab");
    fs::hard_link(env!("CARGO_BIN_EXE_gambeson-lab"), &alone)
        .or_else(|_| fs::copy(env!("CARGO_BIN_EXE_gambeson-lab"), &alone).map(|_| ()))
        .unwrap();
    let output = Command::new(&alone).arg("up").env("PATH", folder.path()).output().unwrap();
    let message = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{message}");
    assert!(message.contains("the agents' program, gambeson, is neither beside"), "{message}");
    assert!(message.contains("cargo build --release -p gambeson"), "{message}");
}
