"""The pytree decorator: leaves and static fields, and structures that differ between classes."""

import itertools

import jax

import sparseopt as so
from sparseopt.core.base.types import pytree, static


@pytree
class Scaled:
    factor: float
    power: int = static(default=1)


@pytree
class Shifted:
    factor: float
    power: int = static(default=1)


def test_numbers_are_leaves_named_by_their_field_and_choices_are_structure():
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(Scaled(2.0))]
    assert paths == [".factor"]
    assert jax.tree.map(lambda leaf: leaf + 1, Scaled(2.0, 5)) == Scaled(3.0, 5)
    assert jax.tree.structure(Scaled(1.0)) == jax.tree.structure(Scaled(4.0)) != jax.tree.structure(Scaled(1.0, 2))


def test_structures_of_different_classes_differ():
    for nodes in ((Scaled(1.0), Shifted(1.0)), (so.L0(1.0), so.L1(1.0), so.GroupL2(1.0)), (so.MCP(1.0), so.SCAD(1.0))):
        for one, other in itertools.combinations(nodes, 2):
            assert jax.tree.structure(one) != jax.tree.structure(other)
            assert jax.tree.structure([one, 1]) != jax.tree.structure([other, 1])
