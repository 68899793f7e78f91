use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::PathBuf;
use std::process::{Command, Stdio};

use gambeson_keys::{Generation, KeyRing, PrivateKey};
use gambeson_mesh::plan::{Action, Plan};
use gambeson_mesh::session::DeviceName;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

use gambeson::apply::{ApplyError, Kernel, Scope};

/// Runs a test in new namespaces, with lo up and an empty `/run`. Needs root.
pub(crate) fn in_namespace(test: impl AsyncFnOnce() + Send + 'static) {
    std::thread::spawn(move || {
        unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS)
            .expect("new namespaces (run the tests as root)");
        let none = None::<&str>;
        let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
        mount(none, "/", none, private, none).unwrap();
        mount(Some("tmpfs"), "/run", Some("tmpfs"), MsFlags::empty(), none).unwrap();
        sh("ip link set lo up");
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let result = catch_unwind(AssertUnwindSafe(|| runtime.block_on(test())));
        // A tunnel process ends with its device, and would keep the namespaces otherwise.
        sh("for i in 0 1 2 3; do ip link delete gambeson$i 2>/dev/null; done; true");
        if let Err(panic) = result {
            resume_unwind(panic);
        }
    })
    .join()
    .unwrap_or_else(|panic| resume_unwind(panic));
}

/// Runs a command in the namespace, which must succeed, and gives what it printed.
pub(crate) fn sh(command: &str) -> String {
    let output = Command::new("sh")
        .args(["-c", command])
        .stdin(Stdio::null())
        .output()
        .expect("sh can be run");
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "`{command}` failed: {error}");
    String::from_utf8(output.stdout).unwrap()
}

pub(crate) fn device(number: u8) -> DeviceName {
    DeviceName::parse(&format!("gambeson{number}")).unwrap()
}

/// A TUN device of ours as `gambeson tunnel` makes it, but without a process behind it.
pub(crate) fn make_tun(number: u8) -> DeviceName {
    sh(&format!(
        "ip tuntap add gambeson{number} mode tun && ip link set gambeson{number} alias gambeson"
    ));
    device(number)
}

pub(crate) async fn kernel() -> Kernel {
    Kernel::with_program(PathBuf::from("/nonexistent/gambeson"), Scope::default()).await.unwrap()
}

pub(crate) fn keys() -> KeyRing {
    KeyRing::new(Generation::FIRST, PrivateKey::generate())
}

/// Carries out actions, all of which must succeed.
pub(crate) async fn execute(kernel: &mut Kernel, actions: impl IntoIterator<Item = Action>) {
    let errors = attempt(kernel, actions).await;
    assert!(errors.is_empty(), "{errors:?}");
}

pub(crate) async fn attempt(
    kernel: &mut Kernel,
    actions: impl IntoIterator<Item = Action>,
) -> Vec<ApplyError> {
    let plan = Plan { actions: actions.into_iter().collect(), ..Plan::default() };
    kernel.execute(&plan, &keys()).await
}
