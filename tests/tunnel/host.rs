//! Throw-away hosts: private network, mounts and processes, gone when the test is.

use std::ffi::OsStr;
use std::io::{BufRead as _, BufReader, Write as _};
use std::process::{Child, ChildStdin, Command, Output, Stdio};
use std::time::{Duration, Instant};

pub(super) const GAMBESON: &str = env!("CARGO_BIN_EXE_gambeson");

/// A host without a name. Its first process reads from us, so that it ends with us however
/// we end, and takes all processes of the host with it.
pub(super) struct Host {
    holder: Child,
    input: Option<ChildStdin>,
    init: u32,
}

impl Host {
    pub(super) fn new() -> Self {
        let script = "set -e; mount -t tmpfs tmpfs /run; mount -t sysfs sysfs /sys; \
                      ip link set lo up; echo ready; cat > /dev/null; :";
        let mut holder = Command::new("unshare")
            .args(["--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"])
            .args(["sh", "-c", script])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("unshare (apt-get install util-linux)");
        let mut line = String::new();
        let stdout = holder.stdout.take().expect("piped");
        BufReader::new(stdout).read_line(&mut line).expect("a line");
        assert_eq!(line, "ready\n", "no new namespaces: run as root");
        let children = format!("/proc/{0}/task/{0}/children", holder.id());
        let children = std::fs::read_to_string(children).expect("the holder's children");
        let init = children.trim().parse().expect("one child");
        let input = holder.stdin.take();
        Self { holder, input, init }
    }

    /// A command on this host.
    pub(super) fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new("nsenter");
        command.args(["--target", &self.init.to_string(), "--net", "--mount", "--pid", "--"]);
        command.arg(program).stdin(Stdio::null());
        command
    }

    pub(super) fn attempt(&self, script: &str) -> Output {
        self.command("bash").args(["-c", script]).output().expect("bash can be run")
    }

    /// Runs a shell script, which must succeed, and gives what it printed.
    #[track_caller]
    pub(super) fn sh(&self, script: &str) -> String {
        let output = self.attempt(script);
        assert!(output.status.success(), "`{script}`: {output:?}");
        String::from_utf8(output.stdout).expect("text").trim().to_owned()
    }

    /// Runs a shell script with this on its standard input.
    #[track_caller]
    pub(super) fn sh_with(&self, script: &str, input: &str) -> String {
        let mut child = self
            .command("bash")
            .args(["-c", script])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("bash can be run");
        child.stdin.take().expect("piped").write_all(input.as_bytes()).expect("it reads");
        let output = child.wait_with_output().expect("it ends");
        assert!(output.status.success(), "`{script}`: {output:?}");
        String::from_utf8(output.stdout).expect("text").trim().to_owned()
    }

    /// Starts a tunnel in the background.
    #[track_caller]
    pub(super) fn tunnel(&self, arguments: &str) {
        self.sh(&format!("{GAMBESON} tunnel {arguments}"));
    }

    /// The process of a tunnel, by the host's own numbers.
    #[track_caller]
    pub(super) fn tunnel_pid(&self, name: &str) -> String {
        self.sh(&format!("pgrep -f '^gambeson tunnel --background-child {name}( |$)'"))
    }

    /// How often each of these is in the memory of a tunnel, as bytes or in hexadecimal.
    pub(super) fn find_in_memory(&self, name: &str, secrets: &[[u8; 32]]) -> Vec<usize> {
        let memory = self.memory(&self.tunnel_pid(name));
        let find = |what: &[u8]| memory.windows(what.len()).filter(|bytes| *bytes == what).count();
        let hexadecimal = |secret: &[u8; 32]| {
            secret.iter().map(|byte| format!("{byte:02x}")).collect::<String>().into_bytes()
        };
        secrets.iter().map(|secret| find(secret) + find(&hexadecimal(secret))).collect()
    }

    /// All that a process may write to, one mapping after the other.
    fn memory(&self, pid: &str) -> Vec<u8> {
        let script = format!(
            "while read range rights rest; do case $rights in rw*) \
                 from=$((16#${{range%-*}})); to=$((16#${{range#*-}})); \
                 dd if=/proc/{pid}/mem bs=4096 skip=$((from/4096)) count=$(((to-from)/4096)) \
                     2> /dev/null;; \
             esac; done < /proc/{pid}/maps; true"
        );
        self.command("bash").args(["-c", &script]).output().expect("bash can be run").stdout
    }

    pub(super) fn link_exists(&self, name: &str) -> bool {
        self.attempt(&format!("ip link show {name}")).status.success()
    }

    pub(super) fn pings(&self, address: &str) -> bool {
        self.attempt(&format!("ping -n -c 1 -W 1 {address}")).status.success()
    }

    /// Starts so many pings, with a pause in seconds between two.
    pub(super) fn start_pings(&self, address: &str, pause: &str, count: u32) -> Pings {
        let mut ping = self.command("ping");
        ping.args(["-n", "-q", "-i", pause, "-c", &count.to_string(), "-W", "2", address]);
        let child = ping.stdout(Stdio::piped()).spawn();
        Pings { child: child.expect("ping (apt-get install iputils-ping)"), count }
    }

    /// Waits until an address answers.
    #[track_caller]
    pub(super) fn wait_for_ping(&self, address: &str) {
        wait_for(&format!("an answer from {address}"), || self.pings(address));
    }

    /// Waits until there is nothing left of a tunnel.
    #[track_caller]
    pub(super) fn wait_for_end_of(&self, name: &str) {
        wait_for(&format!("the end of {name}"), || {
            let socket = format!("test -e /run/wireguard/{name}.sock");
            let process = format!("pgrep -f '^gambeson tunnel.* {name}( |$)'");
            !self.link_exists(name)
                && !self.attempt(&socket).status.success()
                && !self.attempt(&process).status.success()
        });
    }
}

/// Pings under way.
pub(super) struct Pings {
    child: Child,
    count: u32,
}

impl Pings {
    #[track_caller]
    pub(super) fn assert_all_answered(self) {
        let output = self.child.wait_with_output().expect("it ends");
        let said = String::from_utf8_lossy(&output.stdout);
        assert!(said.contains(&format!(" {} received", self.count)), "{said}");
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        drop(self.input.take());
        let _ = self.holder.wait();
    }
}

/// Waits up to 20 s for a condition.
#[track_caller]
pub(super) fn wait_for(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !condition() {
        assert!(Instant::now() < deadline, "waited 20 s in vain for {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// A wire between two hosts, with this name at both ends, down.
pub(super) fn wire(name: &str, a: &Host, b: &Host) {
    let status = Command::new("ip")
        .args(["link", "add", name, "netns", &a.init.to_string(), "type", "veth"])
        .args(["peer", "name", name, "netns", &b.init.to_string()])
        .status()
        .expect("ip (apt-get install iproute2)");
    assert!(status.success());
}

/// Two hosts on one wire: `eth0` with 192.0.2.1 and .2, 2001:db8::1 and ::2.
pub(super) fn wired() -> (Host, Host) {
    let (a, b) = (Host::new(), Host::new());
    wire("eth0", &a, &b);
    for (host, n) in [(&a, 1), (&b, 2)] {
        host.sh(&format!(
            "ip addr add 192.0.2.{n}/24 dev eth0 && ip addr add 2001:db8::{n}/64 dev eth0 nodad \
             && ip link set eth0 up"
        ));
    }
    (a, b)
}

/// What makes a `wg0`.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Maker {
    /// Gambeson, with these options.
    Gambeson(&'static str),
    WireguardGo,
    Kernel,
}

impl Maker {
    fn make(self, host: &Host) {
        match self {
            Self::Gambeson(options) => {
                host.tunnel(&format!("{options} --log-file /run/wg0.log wg0"));
            }
            Self::WireguardGo => drop(host.sh("wireguard-go wg0 2> /dev/null")),
            Self::Kernel => drop(host.sh("ip link add wg0 type wireguard")),
        }
    }
}

/// Two hosts with a tunnel `wg0` each, ports 5001 and 5002, inside addresses 10.9.0.1 and .2,
/// fd00:9::1 and ::2, over the underlay `192.0.2.` or `2001:db8::`.
pub(super) struct Pair {
    pub(super) a: Host,
    pub(super) b: Host,
    pub(super) key_a: String,
    pub(super) key_b: String,
}

impl Pair {
    pub(super) fn over_ipv4() -> Self {
        Self::over("192.0.2.1", "192.0.2.2")
    }

    pub(super) fn over(underlay_a: &str, underlay_b: &str) -> Self {
        Self::set_up([underlay_a, underlay_b], [Maker::Gambeson(""); 2])
    }

    /// Whose tunnels are made by these.
    pub(super) fn of(makers: [Maker; 2]) -> Self {
        Self::set_up(["192.0.2.1", "192.0.2.2"], makers)
    }

    fn set_up([underlay_a, underlay_b]: [&str; 2], makers: [Maker; 2]) -> Self {
        let (a, b) = wired();
        let (key_a, public_a) = keys(&a);
        let (key_b, public_b) = keys(&b);
        for (host, n, key, peer, at) in
            [(&a, 1, &key_a, &public_b, underlay_b), (&b, 2, &key_b, &public_a, underlay_a)]
        {
            let other = 3 - n;
            makers[n - 1].make(host);
            host.sh_with(
                &format!(
                    "wg set wg0 listen-port 500{n} private-key /dev/stdin peer {peer} \
                     endpoint '{at}:500{other}' allowed-ips 10.9.0.{other}/32,fd00:9::{other}/128 \
                     && ip addr add 10.9.0.{n}/24 dev wg0 \
                     && ip addr add fd00:9::{n}/64 dev wg0 nodad && ip link set wg0 up"
                ),
                key,
            );
        }
        Self { key_a: public_a, key_b: public_b, a, b }
    }

    /// Runs `change` while `a` pings `b` every 5 ms, and asserts that every ping is answered.
    #[track_caller]
    pub(super) fn loses_nothing_while(&self, change: impl FnOnce()) {
        self.a.wait_for_ping("10.9.0.2");
        let pings = self.a.start_pings("10.9.0.2", "0.005", 600);
        change();
        pings.assert_all_answered();
    }
}

/// A private and its public key.
pub(super) fn keys(host: &Host) -> (String, String) {
    let private = host.sh("wg genkey");
    let public = host.sh_with("wg pubkey", &private);
    (private, public)
}
