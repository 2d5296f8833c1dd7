"""The comparison of towers: what is equal in it, what it plans, what it reports, and the command as a user runs it."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import helpers_run
import pytest
import torch
import wds_folder
import yaml
from scipy import stats

from focalclip.base.errors import UserError
from focalclip.base.strict import from_dict, load_yaml
from focalclip.config import RunConfig, config_dir
from focalclip.losses import LOSSES
from focalclip.models.cost import count
from focalclip.models.focalnet.mixers import MIXERS
from focalclip.models.image import create_image_tower
from focalclip.studies.towers import plan as planning
from focalclip.studies.towers import report
from focalclip.studies.towers.plan import (
    IMAGE_SIZE,
    REFERENCE,
    TOLERANCE,
    TOWERS,
    Plan,
    StepCost,
    check_base,
    read_plan,
    run_name,
    tower_config,
)
from focalclip.studies.towers.report import write_plot
from focalclip.studies.towers.runs import Run, _shares
from focalclip.training import engine

BASE = load_yaml(RunConfig, config_dir() / "focalclip_pico.yaml")
COSTS = {"focalnet": StepCost(0.25, 2_296_680, 16_880_640), "swin": StepCost(0.4, 2_397_762, 23_003_136)}


def a_plan(**changes) -> Plan:
    return Plan(**{"base": BASE, "seconds": 100.0, "device": "cpu", "costs": COSTS, "failed": {}} | changes)


@pytest.fixture(scope="module")
def reference():
    return count(create_image_tower(REFERENCE), IMAGE_SIZE)


@pytest.mark.parametrize("tower", TOWERS)
def test_every_tower_has_as_many_parameters_and_its_maps(tower, reference):
    image = tower_config(BASE, tower).model.image
    mixer = {} if image.name.startswith("timm:") else {"mixer": image.mixer}
    built = create_image_tower(image.name, init=image.init, **mixer, **image.options)
    assert count(built, IMAGE_SIZE).parameters == pytest.approx(reference.parameters, rel=TOLERANCE)
    if tower.startswith("vit"):  # one map per layer, all of one size
        stride = int(tower[-1])
        assert (built.strides, built.feature_dims) == ([stride] * 5, [192] * 5)
    else:
        assert (built.strides, built.feature_dims) == ([2, 4, 8, 16], [24, 48, 96, 192])
    with torch.no_grad():
        maps = built.eval().feature_maps(torch.zeros(1, 3, IMAGE_SIZE, IMAGE_SIZE))
    sides = [IMAGE_SIZE // stride for stride in built.strides]
    assert [x.shape for x in maps] == [(1, width, n, n) for width, n in zip(built.feature_dims, sides, strict=True)]


def test_the_table_holds_all_mixers():
    mixers = {tower.image["mixer"] for tower in TOWERS.values() if "mixer" in tower.image}
    assert mixers == set(MIXERS) - {"focal_modulation"}


def test_seconds_become_steps_and_the_warm_up_keeps_its_part(tmp_path):
    plan = a_plan()
    assert (plan.steps("focalnet"), plan.steps("swin")) == (400, 250)
    config = plan.run_config("swin", 7, tmp_path)
    assert config.run_dir == tmp_path / "swin-seed7"
    assert (config.seed, config.train.steps) == (7, 250)
    assert config.optim.warmup_steps == round(250 * 100 / 1800)
    assert config.model.image.name == "timm:swin_tiny_patch4_window7_224"
    for same in ("data", "eval"):
        assert getattr(config, same) == getattr(BASE, same)
    assert config.optim == BASE.optim.model_copy(update={"warmup_steps": config.optim.warmup_steps})
    assert (config.model.image.init, config.model.image.feature_norm) == ("fan_in", "batch")
    assert a_plan(seconds=0.01).steps("swin") == 1


def test_a_plan_is_kept_and_grows_in_proportion_to_its_first_tower(tmp_path, monkeypatch):
    a_plan().write(tmp_path)
    assert read_plan(tmp_path) == a_plan()
    asked = []

    def measured(configs):  # the machine has become half as fast
        asked.extend(configs)
        return planning.Measured("cpu", {"focalnet": StepCost(0.5, 1, 1), "convnext": StepCost(0.6, 2, 3)}, {})

    monkeypatch.setattr(planning, "_in_another_process", measured)
    plan = planning.make_plan(BASE, 100.0, ["focalnet", "convnext"], tmp_path)
    assert asked == ["focalnet", "convnext"]
    assert plan.costs == COSTS | {"convnext": StepCost(0.3, 2, 3)}
    assert read_plan(tmp_path) == plan
    asked.clear()
    assert planning.make_plan(BASE, 100.0, ["swin"], tmp_path) == plan
    assert not asked


CALLS = []


def counted_loss(image, text, *, labels):
    """A loss of another name than the default one."""
    CALLS.append((len(image), labels.unique().tolist()))
    return (image * text).mean()


class PlainEngine:
    """What DeepSpeed's engine does, without a process group."""

    def __init__(self, model):
        self.model, self.steps = model, 0

    def __call__(self, images, tokens):
        return self.model(images, tokens)

    def backward(self, loss):
        loss.backward()

    def step(self):
        self.steps += 1


def test_the_cost_of_a_step_is_that_of_the_configured_loss_at_the_trained_batch(monkeypatch):
    engines = []
    monkeypatch.setattr(
        engine, "create_engine", lambda model, *_, **__: engines.append(PlainEngine(model)) or engines[0]
    )
    monkeypatch.setitem(LOSSES, "counted", f"{__name__}:counted_loss")
    config = from_dict(RunConfig, yaml.safe_load(helpers_run.TINY) | {"loss": {"name": "counted"}}, "tiny")
    config = config.model_copy(update={"train": config.train.model_copy(update={"accumulation": 2})})
    seconds, size = planning._turn(config, is_cpu=True)
    assert (len(seconds), min(seconds) > 0) == (planning.STEPS, True)
    assert CALLS == [(8, [-1])] * 2 * (1 + planning.STEPS)
    assert engines[0].steps == len(CALLS)
    assert size == count(create_image_tower(REFERENCE), IMAGE_SIZE)


def test_a_plan_is_for_one_time_and_one_configuration(tmp_path):
    a_plan().write(tmp_path)
    with pytest.raises(UserError, match=r"--cpu-seconds 50: .* holds runs of 100 s; choose another --output"):
        planning.make_plan(BASE, 50.0, ["swin"], tmp_path)
    other = BASE.model_copy(update={"optim": BASE.optim.model_copy(update={"lr": 1e-4})})
    with pytest.raises(UserError, match="another base configuration"):
        planning.make_plan(other, 100.0, ["swin"], tmp_path)
    (tmp_path / "plan.json").write_text("{}")
    with pytest.raises(UserError, match=r"plan.json: is not the plan of a comparison"):
        read_plan(tmp_path)


def test_a_base_that_the_towers_do_not_fit_is_refused():
    check_base(BASE, "x.yaml")
    with pytest.raises(UserError, match=r"x.yaml: the towers are sized for model.image.name=focalnet_pico"):
        check_base(load_yaml(RunConfig, config_dir() / "focalclip_tiny_lrf.yaml"), "x.yaml")
    nothing = BASE.model_copy(update={"eval": BASE.eval.model_copy(update={"benchmark": None})})
    with pytest.raises(UserError, match=r"eval\.benchmark is null"):
        check_base(nothing, "x.yaml")


@pytest.mark.parametrize("n", [2, 3, 5, 10, 11, 12, 40])
def test_intervals_are_students(n):
    values = [math.sin(i) for i in range(n)]
    low, high = stats.t.interval(0.95, n - 1, loc=0, scale=stats.sem(values))
    assert report.half_interval(values) == pytest.approx((high - low) / 2, rel=1e-4)


def test_one_seed_has_no_interval():
    assert report.half_interval([0.5]) is None
    assert report.half_interval([]) is None


def result(folder: Path, tower: str, seed: int, **tasks: float) -> None:
    values = {name.replace("_", "-"): {"value": value, "chance": 0.1} for name, value in tasks.items()}
    score = sum(tasks.values()) / len(tasks)
    path = folder / run_name(tower, seed) / "eval" / "demo.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"score": score, "tasks": values, "missing": {}, "failed": {}}))


def test_the_report_sorts_by_score_and_names_what_is_missing(tmp_path):
    for seed, value in enumerate((0.2, 0.3, 0.4)):
        result(tmp_path, "focalnet", seed, mnist=value, emoji_style=0.1)
        if seed != 1:
            result(tmp_path, "swin", seed, mnist=value + 0.1, emoji_style=0.1)
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "swin-seed1.failed").write_text("exit status 2: the loss became nan\n")
    plan = a_plan(failed={"convnext": "no such operator"})
    runs = [Run(tower, seed, tmp_path) for seed in range(3) for tower in ("convnext", "focalnet", "swin")]
    rows = report.collect(plan, runs)
    assert [row.tower for row in rows] == ["swin", "focalnet", "convnext"]
    assert rows[0].remarks == ("seed 1: failed: exit status 2: the loss became nan",)
    text = report.markdown(plan, rows, [0, 1, 2])
    half = 100 * stats.t.ppf(0.975, 2) * 0.1 / math.sqrt(3)  # of 0.2, 0.3, 0.4
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    assert cells[0][:4] == ["tower", "score %", "score - focalnet's", "emoji-style %"]
    assert [line[2] for line in cells[2:]] == ["+5.0 ± 0.0", "", ""]  # on seeds 0 and 2, which both have
    focalnet = dict(zip(cells[0], cells[3], strict=True))
    assert focalnet["mnist %"] == f"30.0 ± {half:.1f}"
    assert focalnet["emoji-style %"] == "10.0 ± 0.0"
    assert (focalnet["ms per step"], focalnet["images/s"], focalnet["steps"]) == ("250", "768", "400")
    assert focalnet["samples k"] == f"{400 * 192 / 1000:.0f}"
    assert cells[4][:2] == ["convnext", "failed"]
    assert "- convnext: failed: no such operator" in text
    assert write_plot(plan, rows, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000

    report.write(plan, rows, [0, 1, 2], tmp_path)
    swin, row = json.loads((tmp_path / "results.json").read_text())["rows"][:2]
    apart = swin["scores"]["mnist"]["minus_focalnet"]
    assert [apart["mean"], *apart["interval"]] == pytest.approx([0.1, 0.1, 0.1])
    assert "minus_focalnet" not in row["scores"]["mnist"]
    assert row["scores"]["mnist"]["seeds"] == {"0": 0.2, "1": 0.3, "2": 0.4}
    assert row["scores"]["mnist"]["interval"] == pytest.approx([0.3 - half / 100, 0.3 + half / 100], rel=1e-4)
    assert row["samples"] == 400 * 192


def test_a_tower_without_any_result_yet_does_not_keep_the_others_from_being_written(tmp_path):
    result(tmp_path, "focalnet", 0, mnist=0.2)
    plan = a_plan()
    rows = report.collect(plan, [Run(tower, 0, tmp_path) for tower in ("swin", "focalnet")])
    report.write(plan, rows, [0], tmp_path)
    written = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [(row["tower"], list(row["scores"])) for row in written] == [("focalnet", ["score", "mnist"]), ("swin", [])]
    assert written[1]["remarks"] == ["seed 0: not finished"]


def test_cores_are_dealt_out(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 5}, raising=False)
    assert _shares(1) == [[0, 1, 2, 5]]
    assert _shares(2) == [[0, 2], [1, 5]]
    assert _shares(5) == [[0], [1], [2], [5], [0]]


def compare(folder: Path, *args: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(helpers_run.ROOT / "scripts/compare_towers.py"), "--output", str(folder / "out")]
    return subprocess.run([*command, *args], cwd=folder, capture_output=True, text=True, timeout=300)


@pytest.mark.long
def test_the_command_trains_evaluates_reports_and_goes_on(tmp_path, shards):
    wds_folder.write_folder(tmp_path / "tasks" / "colours", [0, 1, 2, 0])
    text = helpers_run.TINY.replace("benchmark: null", f"benchmark: {tmp_path / 'tasks'}")
    config = tmp_path / "tiny.yaml"
    config.write_text(text.replace("data: {", f"data: {{train: {shards}, "))
    args = ["--towers", "focalnet", "poolformer", "--seeds", "0", "--cpu-seconds", "0.2", "--config", str(config)]
    first = compare(tmp_path, *args, "--jobs", "2")
    assert first.returncode == 0, first.stderr
    assert "2/2 " in first.stderr
    out = tmp_path / "out"
    plan = read_plan(out)
    for tower in ("focalnet", "poolformer"):
        run = out / f"{tower}-seed0"
        assert load_yaml(RunConfig, run / "config.yaml").train.steps == plan.steps(tower)
        assert helpers_run.metrics(run)[-1]["step"] == plan.steps(tower)
        assert not (run / "checkpoints").exists()
        assert f"| {tower} |" in first.stdout
    table = (out / "table.md").read_text()
    assert table in first.stdout
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}

    again = compare(tmp_path, *args)
    assert again.returncode == 0, again.stderr
    assert (out / "table.md").read_text() == table
    after = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    assert {path.name for path in after if after[path] != before.get(path)} == {"table.md", "results.json", "plot.png"}


def test_mistakes_get_one_sentence(tmp_path):
    for args, message in (
        (["--towers", "swim"], "--towers swim: not one of focalnet, swin"),
        (["--report-only"], "--report-only: there is no comparison in"),
    ):
        found = compare(tmp_path, *args)
        assert found.returncode == 2
        assert message in found.stderr
        assert "Traceback" not in found.stderr
