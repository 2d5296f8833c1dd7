"""What keeps the code easy to live in: few files, short parameter lists, one name for one thing, every trap marked."""

import ast
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "focalclip").rglob("*.py"))
TREES = {str(path.relative_to(ROOT)): ast.parse(path.read_text(encoding="utf-8")) for path in FILES}

# Places in sections 0, 5.2 and 5.3 of the fact sheet on ELEVATER, with the number of traps each describes.
TRAPS = {
    "0.1": 1,
    "0.2": 2,
    "0.3": 1,
    "0.4": 1,
    "0.5": 1,
    "0.6": 2,
    "0.7": 1,
    "0.8": 1,
    "0.9": 2,
    "0.10": 1,
    "5.2 amp": 2,
    "5.2 probe": 5,
    "5.2 cache": 2,
    "5.2 flags": 1,
    "5.2 speed": 3,
    "5.2 result": 2,
    "5.2 prompts": 4,
    "5.2 download": 3,
    "5.2 request": 1,
    "5.3": 9,
}


def test_each_trap_of_the_sheet_is_marked_at_a_test():
    found = Counter()
    for path in (ROOT / "tests").rglob("test_*.py"):
        for function in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(function, ast.FunctionDef) and function.name.startswith("test_"):
                for mark in function.decorator_list:
                    if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.trap":
                        place, what = map(ast.literal_eval, mark.args)
                        assert what
                        found[place] += 1
    assert found == TRAPS


def _has_too_many_parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    parameters = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
    parameters += [name for name in (function.args.vararg, function.args.kwarg) if name]
    return len([name for name in parameters if name.arg not in ("self", "cls")]) > 8


@pytest.mark.parametrize("path", TREES)
def test_no_function_has_more_than_8_parameters(path):
    functions = [node for node in ast.walk(TREES[path]) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    long = [f"{function.name}, line {function.lineno}" for function in functions if _has_too_many_parameters(function)]
    assert not long


def _statements(path: str) -> list[ast.stmt]:
    """What a module does besides its docstring, imports and ``__all__``."""
    return [
        node
        for node in TREES[path].body
        if not isinstance(node, (ast.Import, ast.ImportFrom))
        and not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))
        and not (isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == ["__all__"])
    ]


@pytest.mark.parametrize("path", [path for path in TREES if not path.endswith("/__init__.py")])
def test_no_module_only_passes_on_what_others_define(path):
    assert _statements(path)


def test_the_package_has_at_most_165_files():
    assert len(FILES) <= 165


def test_no_two_classes_have_one_name():
    homes: dict[str, list[str]] = {}
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                homes.setdefault(node.name, []).append(path)
    assert not {name: paths for name, paths in homes.items() if len(paths) > 1}


def test_the_readme_is_short_and_narrow():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 150
    assert not [f"line {i}: {len(line)} columns" for i, line in enumerate(lines, 1) if len(line) > 100]
