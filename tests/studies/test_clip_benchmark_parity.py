"""Our numbers against those that CLIP_benchmark 1.6.2 gave for the same weights and the same task folders.

``python scripts/bench.py parity`` runs both side by side and writes the numbers that are kept here.
"""

import json
from pathlib import Path

import numpy as np
import pytest

from focalclip.cli import bench, retrieval, zeroshot
from focalclip.studies.bench import parity
from focalclip.studies.bench.parity import PAIRS_NAME, TASKS, NumberPair, number_pairs, write_case
from focalclip.studies.bench.peers import OurRun, PeerRun

NUMBERS = json.loads((Path(__file__).parent / "clip_benchmark_numbers.json").read_text())
THEIRS = {name: task["metrics"] for name, task in NUMBERS["tasks"].items()}


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """The model and the task folders, made anew; what they hold must be what CLIP_benchmark was given."""
    folder = tmp_path_factory.mktemp("case")
    digests = write_case(folder)
    known = {"model": NUMBERS["model"]} | NUMBERS["tasks"]
    for name, digest in digests.items():
        assert digest == known[name]["sha256"], (
            f"{name} is not what CLIP_benchmark was measured on: its seed gives other values now (another numpy or "
            "Pillow, or a change in focalclip/studies/bench); run scripts/bench.py parity --output again"
        )
    return folder


@pytest.fixture(scope="module")
def result(case):
    """Our result by the command."""
    words = ["--benchmark", str(case / "tasks"), "--protocol", "clip_benchmark", "--no-cache"]
    return measured(zeroshot.main, case, words)


def measured(command, case, words):
    """What a command writes about the case's model."""
    output = case / "result.json"
    model = f"open_clip:local-dir:{case / 'model'}"
    assert command([*words, "--model", model, "--device", "cpu", "--output", str(output)]) == 0
    return json.loads(output.read_text())


@pytest.mark.parametrize("name", TASKS)
def test_numbers_equal_clip_benchmarks_to_a_millionth(result, name):
    pairs = number_pairs({name: THEIRS[name]}, result)
    assert {pair.metric for pair in pairs} == THEIRS[name].keys()
    for pair in pairs:
        assert pair.ours == pytest.approx(pair.theirs, abs=1e-6), pair.metric


def test_recall_equals_clip_benchmarks_to_a_millionth(case):
    words = ["--data", str(case / "retrieval" / PAIRS_NAME)]
    pairs = number_pairs({PAIRS_NAME: THEIRS[PAIRS_NAME]}, measured(retrieval.main, case, words))
    assert len(pairs) == 6
    for pair in pairs:
        assert pair.ours == pytest.approx(pair.theirs, abs=1e-6), pair.metric


def test_the_result_names_the_protocol_and_counts_every_image(result):
    assert result["protocol"] == "clip_benchmark"
    assert {name: task["n"] for name, task in result["tasks"].items()} == {n: len(t.labels) for n, t in TASKS.items()}


def test_the_case_tells_definitions_apart():
    """Chance, accuracy and mean per class are different numbers here, so that one cannot pass for the other."""
    assert THEIRS["unbalanced"]["acc1"] - THEIRS["unbalanced"]["mean_per_class_recall"] > 0.1
    for name, task in TASKS.items():
        assert THEIRS[name].get("acc1", 1) > 1.5 / len(task.names)
    absent = np.bincount(TASKS["absent-classes"].labels, minlength=6) == 0
    assert absent.sum() == 2
    assert not TASKS["multilabel-absent"].labels.any(axis=0).all()


def test_a_missing_or_differing_number_is_no_agreement():
    assert not NumberPair("t", "acc1", 0.5, None).is_equal
    assert not NumberPair("t", "acc1", 0.5, 0.500002).is_equal
    assert NumberPair("t", "acc1", 0.5, 0.5000005).is_equal
    assert [pair.ours for pair in number_pairs({"t": {"acc1": 0.5, "acc5": float("nan")}}, {"tasks": {}})] == [None]


def test_the_command_compares_both_sides_and_writes_what_is_kept_here(case, result, tmp_path, monkeypatch, capsys):
    """Both sides are played by what is known of them; the case, its margins, the comparison and the file are made."""
    pairs = measured(retrieval.main, case, ["--data", str(case / "retrieval" / PAIRS_NAME)])
    monkeypatch.setattr(parity, "install_clip_benchmark", lambda: Path("python"))
    monkeypatch.setattr(parity, "installed_versions", lambda python: NUMBERS["versions"])
    monkeypatch.setattr(parity, "run_zeroshot", lambda model, tasks: OurRun(result, 1.0))
    monkeypatch.setattr(parity, "run_retrieval", lambda model, folder: OurRun(pairs, 1.0))
    monkeypatch.setattr(
        parity,
        "run_clip_benchmark",
        lambda python, model, tasks, names, task="": PeerRun({name: THEIRS[name] for name in names}, 1.0, 0.5, 0.5),
    )
    assert bench.main(["parity", "--output", str(tmp_path / "numbers.json")]) == 0
    written = json.loads((tmp_path / "numbers.json").read_text())
    assert (written["versions"], written["model"]) == (NUMBERS["versions"], NUMBERS["model"])
    for name, task in NUMBERS["tasks"].items():
        assert written["tasks"][name] | {"margin": None} == task | {"margin": None}
        assert written["tasks"][name]["margin"] == pytest.approx(task["margin"], rel=0.1)
    count = sum(map(len, THEIRS.values()))
    assert f"{count} of {count} numbers agree to 1e-6" in capsys.readouterr().out

    monkeypatch.setitem(THEIRS["unbalanced"], "acc1", THEIRS["unbalanced"]["acc1"] + 1e-3)
    assert bench.main(["parity", "--output", str(tmp_path / "other.json")]) == 1
    assert f"{count - 1} of {count} numbers agree to 1e-6" in capsys.readouterr().out
    assert not (tmp_path / "other.json").exists()
