"""Each trap has its test."""

import ast
from pathlib import Path

import pytest
from traps import TRAPS


def _names_of_tests():
    trees = [ast.parse(path.read_text()) for path in Path(__file__).parents[1].rglob("test_*.py")]
    return {node.name for tree in trees for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


NAMES = _names_of_tests()


@pytest.mark.parametrize("trap", TRAPS, ids=lambda trap: trap.test)
def test_the_trap_has_a_test_named_after_it(trap):
    assert trap.test.startswith("test_trap_")
    assert trap.test in NAMES, f"{trap.place}, {trap.what}: no test of this name"
