//! Labs, and running programs.

use std::path::PathBuf;
use std::process::{Command, Output};
use std::sync::atomic::{AtomicU32, Ordering};

use gambeson_lab::{Lab, LabName, Options, Progress};

/// The program under test.
pub(crate) const GAMBESON: &str = env!("CARGO_BIN_EXE_gambeson");

/// A lab name that no other test has, in this process or another.
pub(crate) fn unique_name() -> LabName {
    static NEXT: AtomicU32 = AtomicU32::new(1);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    format!("t{}-{number}", std::process::id()).parse().unwrap()
}

/// Options of a small lab under a unique name.
pub(crate) fn lab_options() -> Options {
    Options { nodes: 2, pods_per_node: 1, ..Options::new(unique_name(), PathBuf::from(GAMBESON)) }
}

/// A lab that is taken down at the end of the test, however it ends.
pub(crate) fn lab_up(options: Options) -> Lab {
    Lab::up(options, &Progress::silent()).unwrap_or_else(|error| panic!("{}", chain(&error)))
}

/// The standard output of a command that must succeed.
pub(crate) fn stdout_of(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|error| {
        panic!("cannot run {}: {error}", command.get_program().to_string_lossy())
    });
    assert!(output.status.success(), "{command:?} failed: {}", both(&output));
    String::from_utf8(output.stdout).unwrap()
}

/// Standard output and error of a command, for messages.
pub(crate) fn both(output: &Output) -> String {
    let text = [&output.stdout, &output.stderr].map(|bytes| String::from_utf8_lossy(bytes));
    text.join("\n")
}

/// An error with all its causes.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(Some(error), |error| error.source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}
