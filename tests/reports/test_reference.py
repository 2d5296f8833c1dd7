"""Results against published numbers: what passes, what fails, and what cannot be compared."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from focalclip.cli import zeroshot
from focalclip.cli.check_reference import main
from focalclip.evaluation.task import registered_tasks
from focalclip.reports.published import SCORE, published
from focalclip.studies.bench.parity import MODEL
from focalclip.studies.bench.synthetic import SyntheticTask, write_model

OPENAI = published().models["openai-vit-b-32"]


def result_of(reference, protocol, shift=0.0):
    """A result JSON that says exactly what was published under a protocol, ``shift`` points off."""
    tasks = {
        number.task: {"metric": number.metric, "value": (number.value + shift) / 100, "n": number.n or 1000}
        for number in reversed(reference.numbers)
        if protocol in number.protocols and number.task != "score"
    }
    return {"protocol": protocol, "tasks": tasks, "score": 0.5, "n_tasks": 20, "n_tasks_expected": 20}


def check(tmp_path, result, *options):
    path = tmp_path / "result.json"
    path.write_text(json.dumps(result))
    return main([str(path), *options])


def test_the_published_numbers_themselves_pass(tmp_path, capsys):
    assert check(tmp_path, result_of(OPENAI, "clip_benchmark")) == 0
    printed = capsys.readouterr().out
    assert printed.strip().endswith("\n20 pass")
    assert "open_clip: open_clip's table of 38 data sets (DataComp's evaluator, wds data), https://" in printed
    assert "docs/openclip_results.csv" in printed


@pytest.mark.parametrize(("shift", "status"), [(0.3, 0), (0.31, 1), (-0.3, 0), (-0.31, 1)])
def test_a_number_passes_within_its_tolerance_alone(tmp_path, capsys, shift, status):
    result = result_of(OPENAI, "clip_benchmark")
    result["tasks"]["stanford-cars"]["value"] += shift / 100
    assert check(tmp_path, result) == status
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("stanford-cars"))
    assert line.split()[-1] == ("fail" if status else "pass")
    assert f"{shift:+.2f}" in line


def test_missing_tasks_are_named_and_no_success(tmp_path, capsys):
    result = result_of(OPENAI, "clip_benchmark")
    del result["tasks"]["dtd"], result["tasks"]["gtsrb"]
    result["failed"] = {"gtsrb": "gtsrb/test/0.tar: cut short"}
    assert check(tmp_path, result) == 1
    printed = capsys.readouterr().out
    assert "missing: not in the result" in printed
    assert "missing: gtsrb/test/0.tar: cut short" in printed
    assert "18 pass, 2 missing" in printed or "2 missing, 18 pass" in printed
    assert check(tmp_path, result, "--tasks", "food-101", "cifar-10") == 0


def test_other_test_sets_and_metrics_are_not_compared(tmp_path, capsys):
    result = result_of(OPENAI, "clip_benchmark")
    result["tasks"]["eurosat_clip"]["n"] = 5000
    result["tasks"]["voc-2007-classification"]["metric"] = "map_11point"
    assert check(tmp_path, result) == 1
    printed = capsys.readouterr().out
    assert "not comparable: 5,000 test images, the reference has 5,400" in printed
    assert "not comparable: metric map_11point, the reference has map" in printed


def test_a_metric_beside_the_main_one_counts(tmp_path):
    result = result_of(OPENAI, "clip_benchmark")
    pets = result["tasks"]["oxford-iiit-pets"]
    pets |= {"metric": "accuracy", "mean_per_class": pets["value"], "value": 0.1}
    assert check(tmp_path, result) == 0


def test_weak_numbers_never_fail_and_never_pass_alone(tmp_path, capsys):
    result = result_of(OPENAI, "elevater")
    result["tasks"]["voc-2007-classification"]["value"] = 0.76
    assert check(tmp_path, result) == 0
    assert "weak" in next(line for line in capsys.readouterr().out.splitlines() if line.startswith("voc-2007"))
    assert check(tmp_path, result, "--tasks", "voc-2007-classification") == 1


def test_the_number_of_the_result_s_own_test_set_counts(tmp_path, capsys):
    result = result_of(OPENAI, "elevater")
    result["tasks"]["eurosat_clip"] |= {"n": 5400, "value": 0.40}
    assert check(tmp_path, result) == 1
    assert "50.44" in next(line for line in capsys.readouterr().out.splitlines() if line.startswith("eurosat"))


def test_the_mean_is_compared_only_when_it_is_whole(tmp_path, capsys):
    result = result_of(published().models["unicl-focal-b-in21k-gcc15m-yfcc14m"], "elevater") | {"score": 0.4465}
    assert check(tmp_path, result, "--reference", "unicl-focal-b-in21k-gcc15m-yfcc14m") == 0
    result["n_tasks"] = 19
    assert check(tmp_path, result, "--reference", "unicl-focal-b-in21k-gcc15m-yfcc14m") == 1
    assert "mean of 19 of 20 tasks" in capsys.readouterr().out


def test_every_number_names_a_task_and_a_source():
    ids = {task.id for task in registered_tasks("elevater")} | {"score"}
    for reference in published().models.values():
        for number in reference.numbers:
            assert number.task in ids
            assert (number.source or reference.source) in published().sources
            assert (number.tolerance is None) == number.weak
    sizes = {task.id: set(task.sizes["test"].values()) for task in registered_tasks("elevater")}
    assert all(number.n in sizes[number.task] for number in OPENAI.numbers if number.n)


def test_the_mean_of_openais_models_is_shown_and_never_checked():
    for name in ("openai-vit-b-32", "openai-vit-b-16"):
        mean = published().models[name].on_page()[SCORE]
        assert (mean.protocols, mean.weak) == ((), True)


def test_the_table_in_the_documentation_is_the_file_s():
    text = (Path(__file__).parents[2] / "docs" / "elevater.md").read_text()
    references = published().models
    for small, large in zip(OPENAI.numbers, references["openai-vit-b-16"].numbers, strict=True):
        if not small.protocols:  # the mean, which the page alone shows
            continue
        numbers = [
            f"{number.value:.2f} ± {number.tolerance:g}" if number.tolerance else f"({number.value:g})"
            for number in (small, large)
        ]
        images = f"{small.n:,}" if small.n else ""
        protocols = "any of the three" if len(small.protocols) == 3 else ", ".join(small.protocols)
        assert f"| {small.task} | {small.metric} | {images} | {protocols} | {' | '.join(numbers)} |" in text
    for name, reference in references.items():
        if name.startswith("unicl"):
            assert f"| {name} | {' | '.join(str(number.value) for number in reference.numbers)} |" in text


def test_what_is_no_result_is_one_line_and_exit_status_2(tmp_path, capsys):
    (tmp_path / "x.json").write_text("{}")
    (tmp_path / "y.json").write_text("{")
    for words, message in [
        ([str(tmp_path / "none.json")], "cannot be read"),
        ([str(tmp_path / "x.json")], "not a zero-shot result"),
        ([str(tmp_path / "y.json")], "is not JSON"),
        (["x", "--reference", "clip"], "--reference clip: not one of openai-vit-b-32"),
    ]:
        assert main(words) == 2
        assert message in capsys.readouterr().err
    assert check(tmp_path, result_of(OPENAI, "clip_benchmark"), "--tasks", "x") == 2
    assert check(tmp_path, result_of(OPENAI, "clip_benchmark") | {"protocol": "unicl"}) == 2
    assert "no numbers under the protocol unicl; use clip_benchmark or datacomp or elevater" in capsys.readouterr().err


def test_a_result_of_the_harness_itself_is_read(tmp_path, capsys):
    kitti = next(task for task in registered_tasks("elevater") if task.id == "kitti-distance")
    labels = np.arange(kitti.sizes["test"]["wds"]) % len(kitti.names)
    SyntheticTask(kitti.names, kitti.templates, labels, 0, ((8, 24),)).write(tmp_path / "data" / "kitti-distance")
    write_model(tmp_path / "model", MODEL)
    words = ["--benchmark", "elevater", "--data-root", str(tmp_path / "data"), "--protocol", "clip_benchmark"]
    words += ["--tasks", "kitti-distance", "--no-cache", "--device", "cpu", "--output", str(tmp_path / "r.json")]
    assert zeroshot.main([*words, "--model", f"open_clip:local-dir:{tmp_path / 'model'}"]) == 0
    capsys.readouterr()
    assert main([str(tmp_path / "r.json"), "--tasks", "kitti-distance"]) == 1
    printed = capsys.readouterr().out
    value = json.loads((tmp_path / "r.json").read_text())["tasks"]["kitti-distance"]["value"]
    assert f"open_clip:local-dir:{tmp_path / 'model'}" in printed
    assert f"27.43       0.01  {100 * value:.2f}" in printed
    assert printed.endswith("1 fail\n")


def test_script_in_a_process_of_its_own(tmp_path):
    path = tmp_path / "result.json"
    path.write_text(json.dumps(result_of(OPENAI, "clip_benchmark")))
    script = Path(__file__).parents[2] / "scripts" / "check_reference.py"
    done = subprocess.run([sys.executable, str(script), str(path)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "20 pass" in done.stdout


@pytest.mark.parametrize("tasks", ['{"dtd": 3}', '{"dtd": {"metric": "accuracy"}}', "[]"])
def test_tasks_of_another_form_are_one_clear_sentence(tmp_path, capsys, tasks):
    (tmp_path / "r.json").write_text(f'{{"protocol": "elevater", "score": 1, "tasks": {tasks}}}')
    assert main([str(tmp_path / "r.json")]) == 2
    assert "r.json: its tasks have no metric, value and n; give one of" in capsys.readouterr().err
