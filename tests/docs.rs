//! docs/flannel.md says of each of Flannel's and k3s's options what it does here: so it is.
//! docs/faults.md and docs/tunnel.md name tests: there they are.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::common::lab::{GAMBESON, both, stdout_of};

const FAULTS: &str = include_str!("../docs/faults.md");
const TUNNEL: &str = include_str!("../docs/tunnel.md");
const GUIDE: &str = include_str!("../docs/flannel.md");

/// The rows of the table below a heading: options, and what is said of them.
fn rows(heading: &str) -> Vec<(Vec<&'static str>, &'static str)> {
    let (_, section) = GUIDE.split_once(&format!("\n## {heading}\n")).unwrap();
    let section = section.split("\n## ").next().unwrap();
    let rows = section.lines().filter_map(|line| line.strip_prefix("| `"));
    let cells = rows.map(|row| row.trim_end_matches(" |").split_once(" | ").unwrap());
    cells.map(|(options, said)| (options.split('`').step_by(2).collect(), said)).collect()
}

fn help() -> String {
    stdout_of(Command::new(GAMBESON).args(["agent", "--help"]))
}

/// What the agent says to an option that it should not take, or take only with something else.
fn refusal(option: &str) -> String {
    let output = Command::new(GAMBESON).args(["agent", option]).output().unwrap();
    assert_eq!(output.status.code(), Some(2), "{option}: {}", both(&output));
    both(&output)
}

#[test]
fn every_option_of_flannel_does_what_the_guide_says() {
    let help = help();
    let (mut same, mut refused) = (0, 0);
    for (options, said) in rows("Flannel's options") {
        for option in options.into_iter().filter(|option| option.starts_with("--")) {
            if said.starts_with("refused") {
                let any = option.replace('*', "endpoints");
                assert!(refusal(&any).contains("unexpected argument"), "{option}");
                refused += 1;
            } else if said.starts_with("the same") {
                assert!(help.contains(option), "{option} is not in the help");
                same += 1;
            }
        }
    }
    assert!(same > 10 && refused > 3, "{same} {refused}");
}

#[test]
fn every_option_of_k3s_does_what_the_guide_says() {
    let help = help();
    for (options, said) in rows("k3s") {
        for option in options {
            match option.split_once('=') {
                Some((name, value)) => assert!(help.contains(name) && help.contains(value)),
                None if option.starts_with("--") => assert!(help.contains(option), "{option}"),
                None if said.starts_with("refused") => {
                    let wrong = format!("--flannel-backend={option}");
                    assert!(refusal(&wrong).contains("wireguard-native"), "{option}");
                }
                None => assert!(help.contains(option), "{option}"),
            }
        }
    }
    assert!(refusal("--flannel-backend=ipsec").contains("wireguard-native"));
}

/// Every Rust file below a folder.
fn sources(folder: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let (folders, files): (Vec<_>, Vec<_>) = entries.partition(|path| path.is_dir());
    let rust = files.into_iter().filter(|path| path.extension().is_some_and(|e| e == "rs"));
    rust.chain(folders.iter().flat_map(|folder| sources(folder))).collect()
}

#[test]
fn every_test_that_a_list_names_is_there() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let files = ["tests", "tunnel/src"].into_iter().flat_map(|folder| sources(&root.join(folder)));
    let all: String = files.map(|file| std::fs::read_to_string(file).unwrap()).collect();
    let lines = FAULTS.lines().chain(TUNNEL.lines()).filter(|line| line.starts_with("| "));
    // The last column.
    let cells = lines.filter_map(|line| line.trim_end_matches(" |").rsplit_once(" | "));
    let names = cells.flat_map(|(_, tests)| tests.split('`').skip(1).step_by(2));
    let names: Vec<_> = names.map(|name| name.rsplit("::").next().unwrap()).collect();
    assert!(names.len() > 80, "{}", names.len());
    for name in names {
        assert!(all.contains(&format!("fn {name}(")), "there is no test {name}");
    }
}
