use gambeson_mesh::desired::{Implementation, LinkKind, NextHop, Route, RouteKey, Sysctl};
use gambeson_mesh::plan::Action;

use crate::common::namespace::{attempt, device, execute, in_namespace, kernel, make_tun, sh};
use gambeson::apply::{ApplyError, Kernel, Scope};
use gambeson::exit::Exit;

#[test]
fn an_empty_namespace_has_nothing_of_ours() {
    in_namespace(async || {
        let observed = kernel().await.observe().await.unwrap();
        assert!(observed.links.is_empty() && observed.routes.is_empty());
        assert_eq!(observed.ruleset, None);
        assert_eq!(
            observed.sysctls.keys().cloned().collect::<Vec<_>>(),
            [Sysctl::Ipv4Forward, Sysctl::Ipv6Forward]
        );
    });
}

#[test]
fn changes_of_a_link_are_observed() {
    in_namespace(async || {
        let device = make_tun(1);
        let mut kernel = kernel().await;
        let v4 = "10.244.1.0/32".parse().unwrap();
        let v6 = "fd00:10:244:1::/128".parse().unwrap();
        execute(
            &mut kernel,
            [
                Action::SetLinkMtu { device, mtu: 1420 },
                Action::SetLinkUp(device),
                Action::AddAddress { device, address: v4 },
                Action::AddAddress { device, address: v6 },
                Action::AddAddress { device, address: v6 },
            ],
        )
        .await;
        let link = kernel.observe().await.unwrap().links.remove(&device).unwrap();
        assert!(link.ours && link.up);
        assert_eq!(link.kind, Some(LinkKind::WireGuard(Implementation::Userspace)));
        assert_eq!(link.mtu, 1420);
        assert_eq!(link.addresses, [v4, v6].into());
        assert_eq!(link.wireguard, None);
        // Usable at once: no duplicate address detection.
        assert!(!sh("ip -6 addr show dev gambeson1 scope global").contains("tentative"));

        execute(
            &mut kernel,
            [
                Action::DeleteAddress { device, address: v4 },
                Action::DeleteAddress { device, address: v4 },
            ],
        )
        .await;
        let link = kernel.observe().await.unwrap().links.remove(&device).unwrap();
        assert_eq!(link.addresses, [v6].into());

        execute(&mut kernel, [Action::DeleteLink(device), Action::DeleteLink(device)]).await;
        assert!(kernel.observe().await.unwrap().links.is_empty());
    });
}

#[test]
fn a_foreign_link_is_observed_and_never_touched() {
    in_namespace(async || {
        sh("ip link add gambeson0 type bridge && ip link set gambeson0 mtu 1300");
        let device = device(0);
        let mut kernel = kernel().await;
        let link = kernel.observe().await.unwrap().links.remove(&device).unwrap();
        assert!(!link.ours);
        assert_eq!(link.kind, None);

        let address = "10.244.1.0/32".parse().unwrap();
        let errors = attempt(
            &mut kernel,
            [
                Action::DeleteLink(device),
                Action::SetLinkMtu { device, mtu: 1420 },
                Action::SetLinkUp(device),
                Action::AddAddress { device, address },
            ],
        )
        .await;
        assert_eq!(errors.len(), 4);
        for error in errors {
            assert!(matches!(error, ApplyError::ForeignLink { .. }), "{error}");
            assert_eq!(error.exit(), Some(Exit::ForeignDevice));
        }
        let after = kernel.observe().await.unwrap().links.remove(&device).unwrap();
        assert_eq!(after, link);
    });
}

#[test]
fn a_failed_action_does_not_stop_the_next() {
    in_namespace(async || {
        let present = make_tun(2);
        let mut kernel = kernel().await;
        let errors =
            attempt(&mut kernel, [Action::SetLinkUp(device(0)), Action::SetLinkUp(present)]).await;
        assert!(matches!(errors.as_slice(), [ApplyError::LinkGone { .. }]), "{errors:?}");
        assert!(kernel.observe().await.unwrap().links[&present].up);
    });
}

#[test]
fn settings_are_written_and_observed() {
    in_namespace(async || {
        let device = make_tun(3);
        sh("ip link add cni0 type bridge");
        let scope = Scope { bridge: "cni0".to_owned(), ..Scope::default() };
        let mut kernel = Kernel::with_program("/nonexistent".into(), scope).await.unwrap();
        let settings = [
            (Sysctl::Ipv4Forward, "1"),
            (Sysctl::Ipv6Forward, "1"),
            (Sysctl::RpFilter(device), "2"),
            (Sysctl::Forwarding(device), "0"),
            (Sysctl::DisableIpv6(device), "1"),
            (Sysctl::BridgeForwarding("cni0".to_owned()), "0"),
            (Sysctl::BridgeDisableIpv6("cni0".to_owned()), "1"),
        ];
        execute(&mut kernel, settings.clone().map(|(s, v)| Action::SetSysctl(s, v.to_owned())))
            .await;
        let observed = kernel.observe().await.unwrap();
        assert_eq!(observed.sysctls, settings.map(|(s, v)| (s, v.to_owned())).into());
    });
}

#[test]
fn a_missing_program_is_named() {
    in_namespace(async || {
        let add = Action::AddLink {
            device: device(0),
            kind: LinkKind::WireGuard(Implementation::Userspace),
            mtu: 1420,
        };
        let errors = attempt(&mut kernel().await, [add]).await;
        let [error] = errors.as_slice() else { panic!("{errors:?}") };
        assert!(error.to_string().contains("/nonexistent/gambeson tunnel gambeson0"), "{error}");
    });
}

/// On a kernel with WireGuard the link is made; on one without, the error says what to do.
#[test]
fn a_kernel_link_is_made_or_the_missing_module_named() {
    in_namespace(async || {
        let mut kernel = kernel().await;
        let device = device(0);
        let add = Action::AddLink {
            device,
            kind: LinkKind::WireGuard(Implementation::Kernel),
            mtu: 1420,
        };
        let available = kernel.kernel_wireguard_available().await;
        let errors = attempt(&mut kernel, [add]).await;
        let observed = kernel.observe().await.unwrap();
        if available {
            assert!(errors.is_empty(), "{errors:?}");
            let link = &observed.links[&device];
            assert!(link.ours && !link.up && link.mtu == 1420);
            assert_eq!(link.kind, Some(LinkKind::WireGuard(Implementation::Kernel)));
        } else {
            assert!(matches!(errors.as_slice(), [ApplyError::NoWireGuard { .. }]), "{errors:?}");
        }
        assert!(!sh("ip link").contains("gmbtmp"));
    });
}

/// Set in the process that has lost the capability.
const DENIED: &str = "GAMBESON_TEST_DENIED";

#[test]
fn a_missing_capability_is_named() {
    const NAME: &str = "apply::links::a_missing_capability_is_named";
    if std::env::var_os(DENIED).is_none() {
        let this = std::env::current_exe().unwrap();
        let output = std::process::Command::new("unshare")
            .args(["--net", "setpriv", "--bounding-set=-net_admin", "--inh-caps=-net_admin"])
            .arg(this)
            .args(["--exact", NAME, "--nocapture"])
            .env(DENIED, "1")
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success() && text.contains("1 passed"), "{output:?}");
        return;
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let mut kernel =
            Kernel::with_program(env!("CARGO_BIN_EXE_gambeson").into(), Scope::default())
                .await
                .unwrap();
        let device = device(0);
        let add = |implementation| Action::AddLink {
            device,
            kind: LinkKind::WireGuard(implementation),
            mtu: 1420,
        };
        let destination = "10.244.0.0/16".parse().unwrap();
        let route = Route { next_hop: NextHop::Unreachable, mtu: None, source: None };
        for action in [
            add(Implementation::Kernel),
            add(Implementation::Userspace),
            Action::PutRoute(RouteKey { destination, metric: 1 }, route),
            Action::SetRuleset(super::firewall::ruleset(true)),
        ] {
            let errors = attempt(&mut kernel, [action]).await;
            let [error] = errors.as_slice() else { panic!("{errors:?}") };
            assert_eq!(error.exit(), Some(Exit::NoPermission), "{error}");
            assert!(error.to_string().contains("CAP_NET_ADMIN"), "{error}");
        }
    });
}
