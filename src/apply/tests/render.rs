use gambeson_mesh::desired::Ruleset;

use super::firewall::ruleset;
use crate::apply::nft::render;

#[test]
fn a_ruleset_is_one_transaction() {
    insta::assert_snapshot!(render(&ruleset(true)).unwrap());
}

#[test]
fn what_is_not_asked_for_is_left_out() {
    let v4_only = Ruleset {
        cluster_networks: ["10.244.0.0/17", "10.244.128.0/17", "10.245.1.1/16"]
            .map(|n| n.parse().unwrap())
            .into(),
        trusted_links: ["lo".to_owned()].into(),
        masquerade: false,
    };
    insta::assert_snapshot!(render(&v4_only).unwrap());
}

#[test]
fn a_link_name_cannot_smuggle_in_a_rule() {
    for name in ["", "eth*", "a\" accept", "a b", "a;b", "a\nb", "sixteen-letters-"] {
        let ruleset = Ruleset { trusted_links: [name.to_owned()].into(), ..ruleset(true) };
        let error = render(&ruleset).unwrap_err();
        assert!(error.to_string().contains("cannot be used in firewall rules"), "{error}");
    }
}
