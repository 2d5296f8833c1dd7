"""Reading a result and writing reports from it: cheap, and without the libraries that measuring it needs."""

import json
import subprocess
import sys

import numpy as np
import pytest
from wds_folder import picture, tiny_model, write_folder, zero_shot

from focalclip.base.errors import UserError
from focalclip.evaluation.result import Result
from focalclip.evaluation.task import Benchmark, Task

MODELS = ("torch", "torchvision", "transformers", "timm", "open_clip")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A result with predictions of one label and of several per image."""
    root = tmp_path_factory.mktemp("result")
    rng = np.random.default_rng(0)
    write_folder(root / "plain", rng.integers(3, size=20).tolist(), images=[picture(i) for i in range(20)])
    write_folder(root / "many", (rng.random((20, 3)) < 0.4).astype(int), kind="multilabel")
    tasks = (Task(id="plain"), Task(id="many", metric="map_11point"))
    zero_shot(tiny_model(), Benchmark("two", "wds", tasks, root)).write(root / "r.json")
    return root / "r.json"


def in_a_fresh_process(code, *words):
    """What ``code`` prints, as JSON, followed by its CPU seconds and the modules that are loaded at its end."""
    end = "\nimport sys, time\nprint(json.dumps([time.process_time(), list(sys.modules)]))"
    command = [sys.executable, "-c", f"import json, sys\n{code}{end}", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    *printed, last = done.stdout.splitlines()
    seconds, modules = json.loads(last)
    return printed, seconds, set(modules)


def test_a_result_is_read_without_torch_and_within_a_second(saved):
    code = """
from focalclip.evaluation.result import Result
result = Result.read(sys.argv[1])
print(result.score, *(len(task.predictions.labels) for task in result.tasks.values()))"""
    printed, seconds, modules = in_a_fresh_process(code, saved)
    assert printed == [f"{Result.read(saved).score} 20 20"]
    assert not modules & {*MODELS, "jinja2", "scipy"}
    assert seconds <= 1


def test_reports_and_comparisons_are_written_without_torch(saved, tmp_path):
    code = """
from focalclip.cli.report import main
assert main([sys.argv[1], *sys.argv[2:]]) == 0
assert main(["--compare", sys.argv[1], sys.argv[1]]) == 0"""
    files = [tmp_path / f"r{suffix}" for suffix in (".html", ".csv", ".md", ".tex", ".json")]
    _, _, modules = in_a_fresh_process(code, saved, *files)
    assert all(file.is_file() for file in files)
    assert not modules & {*MODELS}


def test_a_result_with_a_metric_of_another_version_is_refused_by_name(saved, tmp_path):
    content = json.loads(saved.read_text())
    content["tasks"]["plain"]["metric"] = "acuracy"
    (tmp_path / "r.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"there is no metric 'acuracy'; did you mean accuracy\?"):
        Result.read(tmp_path / "r.json")
