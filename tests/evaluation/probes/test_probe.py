"""The whole probing command on a real open_clip model and real task folders with a train split."""

import copy
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from coloured_tasks import coloured, write_task
from PIL import Image
from sklearn.linear_model import Ridge
from wds_folder import picture, png, tiny_model, write_folder, write_tiny_run

from focalclip.base.errors import UserError
from focalclip.cli.probe import main
from focalclip.evaluation.data import read_task_folder
from focalclip.evaluation.features.images import encode_images
from focalclip.evaluation.features.model import weights_sha256
from focalclip.evaluation.opened import open_checked
from focalclip.evaluation.probes.result import Journal, ProbeRun, ProbeSettings, summarise
from focalclip.evaluation.probes.run import probe
from focalclip.evaluation.probes.table_and_plot import probe_table, write_plot
from focalclip.evaluation.probes.train import every_other
from focalclip.evaluation.task import Benchmark, Task, load_benchmark


def run(folder, shots=(5, "full"), methods=("ridge", "logistic", "language", "knn"), **options):
    return probe(tiny_model(), folder, ProbeSettings(shots, methods), progress=False, **options)


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    labels = [i % 3 for i in range(60)]
    return write_task(tmp_path_factory.mktemp("tasks") / "colours", labels, labels[:30])


@pytest.fixture(scope="module")
def result(task):
    return run(task)


def test_probes_learn_what_zero_shot_does_not_know(result):
    (colours,) = result.tasks.values()
    values = {(row.shots, row.method): row.value for row in colours.rows}
    assert len(values) == 1 + 2 * 4
    for method in ("ridge", "logistic", "language", "knn"):
        assert values["full", method] > max(0.8, colours.zero_shot)
    assert {run.n_train for run in colours.runs if run.shots == 5} == {15}
    assert {run.n_train for run in colours.runs if run.shots == "full"} == {60}
    assert [run.seed for run in colours.runs if run.shots == "full"] == [0] * 4
    assert (colours.n, colours.n_train, colours.chance) == (30, 60, pytest.approx(1 / 3))


def test_full_ridge_equals_scikit_learns_at_the_strength_that_it_chose(task, result):
    (found,) = [r for r in result.tasks["colours"].runs if (r.shots, r.method) == ("full", "ridge")]
    train, test = (read_task_folder(task, split) for split in ("train", "test"))
    with torch.no_grad():
        x, z = (encode_images(tiny_model(), d.entries, batch_size=64, progress=False).embeds for d in (train, test))
    theirs = Ridge(alpha=found.strength).fit(x.double().numpy(), 2 * np.eye(3)[train.labels] - 1)
    assert found.value == pytest.approx((theirs.predict(z.double().numpy()).argmax(1) == test.labels).mean())


def test_a_task_without_a_train_split_may_be_halved(tmp_path):
    """As the demo tasks are, which the command probes by default; no image is on both sides."""
    write_folder(tmp_path / "alone", [i % 3 for i in range(30)] + [3], names=("red", "green", "blue", "rare"))
    plain = Benchmark("b", "wds", (Task(id="alone"),), tmp_path)
    assert "has no train split" in run(plain).missing["alone"]
    halved = Benchmark("b", "wds", (Task(id="alone", halved_for_probes=True),), tmp_path)
    result = run(halved, shots=("full",), methods=("ridge",))
    task = result.tasks["alone"]
    assert (task.n_train, task.n, task.classes) == (15, 16, 4)
    assert task.train_sha256 != task.task_sha256
    assert task.differences[0].startswith("no train split: trained on every other test image of each class")
    assert [task.id for task in load_benchmark("demo").tasks if task.halved_for_probes] == [
        "emoji-concepts", "fashion-mnist", "mnist",
    ]  # fmt: skip


@pytest.mark.parametrize(("labels", "chosen"), [([0, 1, 0, 0, 1, 2], [0, 0, 1, 0, 1, 0]), ([5], [0])])
def test_every_other_image_of_each_class(labels, chosen):
    assert every_other(np.array(labels)).tolist() == [bool(is_chosen) for is_chosen in chosen]


@pytest.mark.trap("0.8", "the linear probe chooses its epoch on the test set")
def test_trap_probe_never_selects_on_test(task, result, tmp_path):
    rng = np.random.default_rng(1)
    garbage = [png(rng.integers(0, 256, (16, 16, 3))) for _ in range(30)]
    labels = [i % 3 for i in range(60)]
    spoilt = run(write_task(tmp_path / "colours", labels, rng.permutation(labels[:30]).tolist(), test_images=garbage))
    before, after = (r.tasks["colours"] for r in (result, spoilt))
    assert [r.strength for r in after.runs] == [r.strength for r in before.runs]
    assert [r.held_out_value for r in after.runs] == [r.held_out_value for r in before.runs]
    assert [r.value for r in after.runs] != [r.value for r in before.runs]


@pytest.mark.trap("5.2 probe", "no multi-label")
def test_trap_multi_label_probe(tmp_path):
    rng = np.random.default_rng(0)
    vectors = np.eye(3, dtype=int)[rng.integers(0, 3, 90)]
    vectors[:, 2] |= rng.random(90) < 0.2  # some have two labels
    vectors[:4] = 0  # and some none
    result = run(write_task(tmp_path / "t", vectors[:60], vectors[60:], kind="multilabel"))
    (found,) = result.tasks.values()
    assert found.metric == "map_11point"
    for row in found.rows[1:]:
        assert row.value > found.chance + 0.1
        assert row.interval[0] < row.value <= row.interval[1]
    assert all(run.n_train < 60 for run in found.runs if run.shots == 5)


@pytest.mark.trap("5.2 probe", "train and val ignore custom prompts")
def test_trap_train_and_val_have_the_prompts_of_test(task):
    own = Task(id="colours", classes=3, names=("BLUE", "Green", "red"), templates=("a {c} thing",))
    benchmark = Benchmark("b", "wds", (own,), task.parent)
    train, test = (open_checked(own, benchmark, split=split).data for split in ("train", "test"))
    assert train.templates == test.templates == ("a {c} thing",)
    assert train.class_names == test.class_names == ("BLUE", "Green", "red")


@pytest.mark.trap("5.3", "the official val split is loaded and never used")
def test_trap_the_official_val_split_is_loaded_and_never_used(task, result, tmp_path):
    """Nothing is loaded that is not used: the strength is chosen on a part of train, whatever val holds."""
    folder = tmp_path / "colours"
    shutil.copytree(task, folder)
    (folder / "val").mkdir()
    (folder / "val" / "0.tar").write_bytes(b"not read")
    again = run(folder, methods=("ridge",)).tasks["colours"]
    before = [r.strength for r in result.tasks["colours"].runs if r.method == "ridge"]
    assert [r.strength for r in again.runs] == before


class OtherNames(torch.nn.Module):
    """The tiny model under names that no prefix rule would know."""

    def __init__(self, model):
        super().__init__()
        self.backbone_of_pictures = model
        self.preprocess, self.tokenizer = model.preprocess, model.tokenizer

    def encode_image(self, images):
        return self.backbone_of_pictures.encode_image(images)

    def encode_text(self, tokens):
        return self.backbone_of_pictures.encode_text(tokens)


def test_trap_frozen_by_name_prefix(task, result):
    model = OtherNames(copy.deepcopy(tiny_model())).train()
    before = weights_sha256(model)
    renamed = probe(model, task, ProbeSettings((5, "full")), progress=False).tasks["colours"]
    assert weights_sha256(model) == before
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(module.training for module in model.modules())
    assert [run.value for run in renamed.runs] == [run.value for run in result.tasks["colours"].runs]


def test_interval_is_for_both_the_draws_and_the_test_images():
    def made(seed, value):
        return ProbeRun(5, "ridge", seed, value, (value - 0.05, value + 0.05), 1.0, 0.5, 15, 0.1)

    row = summarise([made(0, 0.5), made(1, 0.6), made(2, 0.7)])
    assert row.value == pytest.approx(0.6)
    half = math.hypot(4.3027 * 0.1 / math.sqrt(3), 0.05)  # t with 2 degrees of freedom; deviation of the seeds 0.1
    assert row.interval == pytest.approx((0.6 - half, 0.6 + half))
    assert summarise([made(0, 0.5)]).interval == (0.45, 0.55)


def test_task_without_a_train_split_is_missing_with_the_remedy(tmp_path):
    result = run(write_folder(tmp_path / "t", [0, 1, 2]))
    assert "has no train split (it has test)" in result.missing["t"]
    assert "missing: not evaluated for lack of data" in probe_table(result)


def test_single_shot_leaves_nothing_to_choose_a_strength_on(task):
    assert "1 shots leave 0 of 3" in run(task, shots=(1,), methods=("ridge",)).failed["colours"]
    assert run(task, shots=(1,), methods=("knn",)).tasks["colours"].runs[0].n_train == 3


def test_damaged_images_of_both_splits_are_left_out_and_named(tmp_path):
    labels = [i % 3 for i in range(15)]
    images = [coloured(y, i) for i, y in enumerate(labels[:6])]
    images[2] = images[2][:-40]
    folder = write_task(tmp_path / "t", labels, labels[:6], test_images=images)
    found = run(folder, shots=("full",), methods=("ridge",)).tasks["t"]
    assert (found.n, found.n_train) == (5, 15)
    assert [name.split(" ")[0] for name in found.broken] == ["test/0.tar:s0000002"]


def test_finished_probes_are_not_trained_again(task, tmp_path):
    journal = tmp_path / "probes.jsonl"
    first = run(task, shots=(5,), methods=("ridge",), journal=journal)
    assert len(journal.read_text().splitlines()) == 3
    journal.write_bytes(journal.read_bytes()[:-30])  # killed while it wrote the last one
    again = run(task, shots=(5,), methods=("ridge", "knn"), journal=journal)
    assert len(journal.read_text().splitlines()) == 6
    kept, new = first.tasks["colours"].runs, again.tasks["colours"].runs[:3]
    assert kept[:2] == new[:2]  # the seconds that they took included
    assert (kept[2].value, kept[2].strength) == (new[2].value, new[2].strength)


def test_probes_of_other_weights_or_data_are_trained_anew(task, tmp_path):
    journal = tmp_path / "probes.jsonl"
    run(task, shots=(5,), methods=("knn",), journal=journal)
    other = copy.deepcopy(tiny_model())
    torch.nn.init.normal_(other.visual.proj)
    probe(other, task, ProbeSettings((5,), ("knn",)), journal=journal, progress=False)
    labels = [i % 3 for i in range(60)]
    run(write_task(tmp_path / "colours", labels, labels[:29]), shots=(5,), methods=("knn",), journal=journal)
    assert len(journal.read_text().splitlines()) == 9


def test_damaged_lines_of_the_journal_are_named_and_these_probes_trained_again(task, tmp_path, capsys):
    journal = tmp_path / "probes.jsonl"
    first = run(task, shots=(5,), methods=("ridge",), journal=journal).tasks["colours"].runs
    lines = journal.read_bytes().split(b"\n")
    journal.write_bytes(b"\n".join([lines[0], b"\xff" + lines[1][:40], lines[2], b""]))
    capsys.readouterr()
    again = run(task, shots=(5,), methods=("ridge",), journal=journal).tasks["colours"].runs
    assert f"warning: {journal}: 1 damaged lines, the first being line 2; these probes are trained again" in (
        capsys.readouterr().err
    )
    assert [(probe.seed, probe.value) for probe in again] == [(probe.seed, probe.value) for probe in first]
    assert (again[0], again[2]) == (first[0], first[2])  # the seconds that they took included


def test_a_file_that_is_no_journal_is_refused(tmp_path):
    (tmp_path / "notes.jsonl").write_text('{"mine": 1}\n')
    with pytest.raises(UserError, match=r"notes\.jsonl: line 1 is no finished probe; remove the file"):
        Journal(tmp_path / "notes.jsonl")


def test_table_and_picture(result, tmp_path):
    text = probe_table(result)
    assert "colours: accuracy, chance 33.3%, 3 classes, 60 training and 30 test images" in text
    assert len(text.splitlines()) == 2 + 1 + 2 + 1 + 8
    with Image.open(write_plot(result, tmp_path / "plot.png")) as image:
        assert len(set(image.convert("RGB").get_flattened_data())) > 50


@pytest.fixture(scope="module")
def workplace(task, tmp_path_factory):
    """A folder with a run in runs/tiny; the tasks are beside the one of the other tests."""
    root = tmp_path_factory.mktemp("cli")
    write_folder(task.parent / "bare", [0, 1, 2], images=[picture(i) for i in range(3)])
    write_tiny_run(root)
    return root


def test_command_probes_the_newest_run_and_writes_result_picture_and_journal(workplace, task, monkeypatch, capsys):
    monkeypatch.chdir(workplace)
    words = ["--benchmark", str(task.parent), "--shots", "5", "full", "--methods", "ridge", "--device", "cpu"]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "colours: accuracy" in printed
    assert "has no train split" in printed
    folder = Path("runs/tiny/eval")
    stem = f"probe-{task.parent.name}"
    assert {path.name for path in folder.iterdir()} == {f"{stem}.json", f"{stem}.png", f"{stem}.jsonl"}
    content = json.loads((folder / f"{stem}.json").read_text())
    assert [(row["shots"], row["method"]) for row in content["scores"]] == [
        (0, "zero-shot"),
        (5, "ridge"),
        ("full", "ridge"),
    ]
    assert content["model"]["source"] == str(Path("runs/tiny"))
    assert content["tasks"]["colours"]["probes"][0]["seeds"] == [0, 1, 2]


@pytest.mark.trap("5.2 probe", "CUDA alone")
def test_trap_probe_runs_on_cpu(workplace, task):
    script = Path(__file__).parents[3] / "eval" / "probe.py"
    command = [sys.executable, str(script), "--benchmark", str(task), "--model", "runs/tiny", "--shots", "5"]
    hidden = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=workplace, capture_output=True, text=True, env=hidden, check=False)
    assert done.returncode == 0, done.stderr
    assert "logistic" in done.stdout
    assert "float32 on cpu" in done.stdout
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--benchmark", "nowhere"], "error: --benchmark nowhere: not one of"),
        (["--benchmark", "TASKS", "--tasks", "c"], "error: --tasks: "),
        (["--benchmark", "TASKS", "--output", "runs"], "error: --output runs: is a folder"),
        (["--benchmark", "TASKS", "--output", "x.jsonl"], "error: --output x.jsonl: is the name of what is written"),
    ],
)
def test_a_mistake_is_one_line_and_exit_status_2(workplace, task, monkeypatch, capsys, words, message):
    monkeypatch.chdir(workplace)
    assert main([str(task.parent) if word == "TASKS" else word for word in words]) == 2
    err = capsys.readouterr().err
    assert err.startswith(message)
    assert err.count("\n") == 1


def test_shots_are_numbers_or_full(capsys):
    with pytest.raises(SystemExit):
        main(["--shots", "few"])
    assert "'few' is neither full nor a number of images per class" in capsys.readouterr().err
