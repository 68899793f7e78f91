//! What needs the kernel's WireGuard runs in a virtual machine with Debian's kernel: the
//! tests of `tests/kernel.rs`, in this same program.

use std::process::{Command, Output, Stdio};

/// The command's output and exit status from inside the machine.
fn run(command: &[&str]) -> Output {
    Command::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/vm/run"))
        .args(["--timeout", "1100", "--"])
        .args(command)
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

#[test]
fn vm_has_the_kernels_wireguard_and_hands_back_output_and_status() {
    let script = "ip link add wg0 type wireguard && wg show wg0 dump && ip -d link show wg0; \
                  touch /etc/x; echo an error >&2; exit 7";
    let output = run(&["sh", "-c", script]);
    let text = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(7), "{output:?}");
    for part in ["(none)\t(none)\t0\toff", "POINTOPOINT", "an error", "Read-only file system"] {
        assert!(text.contains(part), "no {part:?} in: {text}");
    }
}

#[test]
fn vm_passes_the_kernel_tests() {
    let this = std::env::current_exe().unwrap();
    let output = run(&[this.to_str().unwrap(), "kernel::", "--test-threads=1", "--nocapture"]);
    let text = String::from_utf8_lossy(&output.stdout);
    let complaint = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{text}\n{complaint}");
    assert!(!text.contains(" 0 passed"), "no test ran: {text}");
    println!("{text}");
}
