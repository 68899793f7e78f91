use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

use super::host::{GAMBESON, Host, wait_for};

/// What a failing start says, and its exit code.
#[track_caller]
fn refused(host: &Host, script: &str) -> (i32, String) {
    let output = host.attempt(script);
    assert!(!output.status.success(), "`{script}`: {output:?}");
    (output.status.code().unwrap(), String::from_utf8(output.stderr).unwrap())
}

#[test]
fn the_background_process_is_on_its_own_and_ready() {
    let host = Host::new();
    host.tunnel("wg0 --alias 'an alias' --mtu 1380");
    assert_eq!(host.sh("wg show interfaces"), "wg0");
    let link = host.sh("ip -d link show wg0");
    assert!(link.contains("mtu 1380") && link.contains("alias an alias"), "{link}");
    assert_eq!(host.sh("stat -c %a /run/wireguard/wg0.sock"), "600");
    let pid = host.tunnel_pid("wg0");
    for descriptor in 0..3 {
        assert_eq!(host.sh(&format!("readlink /proc/{pid}/fd/{descriptor}")), "/dev/null");
    }
    assert_eq!(host.sh(&format!("readlink /proc/{pid}/cwd")), "/");
    assert_eq!(host.sh(&format!("ps -o sid= -p {pid}")).trim(), pid);
}

#[test]
fn it_ends_with_its_device() {
    let host = Host::new();
    host.tunnel("wg0");
    host.sh("ip link set wg0 up && ip link del wg0");
    host.wait_for_end_of("wg0");
}

#[test]
fn it_ends_with_its_socket() {
    let host = Host::new();
    host.tunnel("wg0");
    host.sh("rm /run/wireguard/wg0.sock");
    host.wait_for_end_of("wg0");
}

#[test]
fn it_ends_by_a_signal() {
    for signal in ["TERM", "INT", "HUP", "QUIT"] {
        let host = Host::new();
        host.tunnel("wg0");
        host.sh(&format!("kill -{signal} {}", host.tunnel_pid("wg0")));
        host.wait_for_end_of("wg0");
    }
}

#[test]
fn a_killed_one_leaves_a_socket_that_the_next_replaces() {
    let host = Host::new();
    host.tunnel("wg0");
    host.sh(&format!("kill -KILL {}", host.tunnel_pid("wg0")));
    wait_for("the device's end", || !host.link_exists("wg0"));
    host.sh("test -S /run/wireguard/wg0.sock");
    host.tunnel("wg0");
    assert_eq!(host.sh("wg show interfaces"), "wg0");
}

#[test]
fn in_the_foreground_it_stays_and_logs() {
    let host = Host::new();
    let mut tunnel = host.command(GAMBESON);
    tunnel.args(["tunnel", "--foreground", "wg0"]).stderr(std::process::Stdio::piped());
    let tunnel = tunnel.spawn().unwrap();
    wait_for("the socket", || host.attempt("wg show wg0").status.success());
    host.sh("wg set wg0 listen-port 5001 && ip link set wg0 up");
    wait_for("the port", || !host.sh("ss -Huln sport = 5001").is_empty());
    host.sh("ip link del wg0");
    let output = tunnel.wait_with_output().unwrap();
    assert!(output.status.success());
    let log = String::from_utf8(output.stderr).unwrap();
    assert!(log.contains("listening port=5001") && log.contains("DeviceGone"), "{log}");
}

#[test]
fn a_log_file_is_written_in_the_background_without_keys() {
    let host = Host::new();
    host.tunnel("wg0 --log-file /run/log --log-level trace");
    let key = host.sh("wg genkey | tee /run/key");
    host.sh("wg set wg0 private-key /run/key listen-port 5001 && ip link set wg0 up");
    host.sh("ip link del wg0");
    host.wait_for_end_of("wg0");
    let log = host.sh("cat /run/log");
    assert!(log.contains("listening port=5001"), "{log}");
    assert!(!log.contains(&key));
}

#[test]
fn a_second_one_of_the_same_name_is_refused() {
    let host = Host::new();
    host.tunnel("wg0");
    let pid = host.tunnel_pid("wg0");
    for arguments in ["wg0", "wg0 --alias gambeson", "-f wg0"] {
        let (code, said) = refused(&host, &format!("{GAMBESON} tunnel {arguments}"));
        assert_eq!(code, 7);
        assert!(said.contains("there is a network device `wg0` already"), "{said}");
    }
    assert_eq!(host.tunnel_pid("wg0"), pid);
    assert_eq!(host.sh("wg show interfaces"), "wg0");
    assert_eq!(host.sh("ls /sys/class/net | grep -c gbn || true"), "0", "no leftovers");
}

#[test]
fn a_foreign_device_is_left_alone() {
    for kind in ["br0 type bridge", "tun0 type tun"] {
        let host = Host::new();
        let name = kind.split(' ').next().unwrap();
        match name {
            "tun0" => host.sh("ip tuntap add tun0 mode tun"),
            _ => host.sh(&format!("ip link add {kind}")),
        };
        let (code, said) = refused(&host, &format!("{GAMBESON} tunnel {name}"));
        assert_eq!(code, 7);
        assert!(said.contains(&format!("ip link del {name}")), "{said}");
        assert!(host.link_exists(name));
        assert!(!host.attempt(&format!("test -e /run/wireguard/{name}.sock")).status.success());
    }
}

#[test]
fn a_socket_that_answers_and_a_file_in_its_place_are_left_alone() {
    let host = Host::new();
    host.tunnel("wg0");
    // Another device, but the socket's name is taken by the running one.
    host.sh("ip link set wg0 name wg9");
    let (code, said) = refused(&host, &format!("{GAMBESON} tunnel wg0"));
    assert_eq!(code, 7);
    assert!(said.contains("another process serves /var/run/wireguard/wg0.sock"), "{said}");
    assert!(!host.link_exists("wg0"));
    host.sh("touch /run/wireguard/wg1.sock");
    let (code, said) = refused(&host, &format!("{GAMBESON} tunnel wg1"));
    assert_eq!(code, 1);
    assert!(said.contains("not a socket"), "{said}");
    host.sh("test -f /run/wireguard/wg1.sock");
    assert!(!host.link_exists("wg1"));
}

#[test]
fn a_missing_tun_driver_and_a_missing_capability_are_named() {
    let host = Host::new();
    let bounded = format!("setpriv --bounding-set=-net_admin {GAMBESON} tunnel wg0");
    let (code, said) = refused(&host, &bounded);
    assert_eq!(code, 6);
    assert!(said.contains("CAP_NET_ADMIN"), "{said}");
    host.sh("mount -t tmpfs tmpfs /dev/net");
    let (code, said) = refused(&host, &format!("{GAMBESON} tunnel wg0"));
    assert_eq!(code, 5);
    assert!(said.contains("/dev/net/tun") && said.contains("modprobe tun"), "{said}");
}

#[test]
fn a_name_that_no_device_can_have_is_refused() {
    let host = Host::new();
    for name in ["a/b", "sixteen-letters-", "''", "..", "wg%d", "'a b'"] {
        let (_, said) = refused(&host, &format!("{GAMBESON} tunnel {name}"));
        assert!(said.contains("is not a device name"), "{name}: {said}");
    }
}

#[test]
fn it_takes_no_descriptors_along_and_dumps_no_core() {
    let host = Host::new();
    let script =
        format!("ulimit -c unlimited; exec 9< /etc/passwd; {GAMBESON} tunnel wg0; exec 9<&-");
    host.sh(&script);
    let pid = host.tunnel_pid("wg0");
    let open = host.sh(&format!("ls -l /proc/{pid}/fd"));
    assert!(!open.contains("/etc/passwd"), "{open}");
    let limit = host.sh(&format!("grep 'Max core file size' /proc/{pid}/limits"));
    assert!(
        limit.split_whitespace().eq(["Max", "core", "file", "size", "0", "0", "bytes"]),
        "{limit}"
    );
}

#[test]
fn keys_are_gone_from_memory_when_they_are_removed() {
    let host = Host::new();
    host.tunnel("wg0");
    let key = |byte: u8| STANDARD.encode([byte; 32]);
    let (private, preshared, peer) = (key(0x58), key(0xa7), key(9));
    let give = "{ read private; read preshared; \
                wg set wg0 private-key <(echo $private) peer $PEER preshared-key <(echo $preshared) \
                allowed-ips 10.9.0.2/32 endpoint 192.0.2.2:1; }";
    let give = give.replace("$PEER", &peer);
    host.sh_with(&give, &format!("{private}\n{preshared}\n"));
    let secrets = [[0x58; 32], [0xa7; 32]];
    let found = host.find_in_memory("wg0", &secrets);
    assert!(found.iter().all(|count| *count > 0), "{found:?}");
    host.sh(&format!("wg set wg0 private-key /dev/null peer {peer} remove"));
    wait_for("keys to be gone from memory", || {
        host.find_in_memory("wg0", &secrets).iter().all(|count| *count == 0)
    });
}

#[test]
fn nobody_without_the_capability_to_trace_reads_its_memory() {
    let host = Host::new();
    let without = "setpriv --bounding-set -sys_ptrace";
    host.sh(&format!("{without} {GAMBESON} tunnel wg0"));
    let pid = host.tunnel_pid("wg0");
    let read = |pid: &str| host.attempt(&format!("{without} bash -c ': < /proc/{pid}/mem'"));
    assert!(!read(&pid).status.success());
    let other = host.sh(&format!("{without} sleep 60 > /dev/null 2>&1 & echo $!"));
    assert!(read(&other).status.success());
}
