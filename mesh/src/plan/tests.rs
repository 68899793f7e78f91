use super::*;
use crate::fixtures::local;
use crate::topology::Mesh;

#[test]
fn the_guard_comes_first() {
    let desired = Desired::new(&Mesh::default(), &local(1, 0));
    let plan = Plan::new(&desired, &Observed::default());
    assert_eq!(plan.actions[0], Action::SetRuleset(desired.ruleset));
}
