"""The benchmark is measured while a model trains, and the training does not notice."""

import json
import random

import helpers_run
import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wds_folder import tiny_model, write_folder, zero_shot

import focalclip
from focalclip.base.errors import UserError
from focalclip.base.strict import from_dict, load_yaml
from focalclip.config import RunConfig
from focalclip.evaluation.zeroshot import Evaluator
from focalclip.models.clip import FocalCLIP

WORDS = ["--eval.every", "3", "--eval.max-images", "20", "--train.save-every", "3", "--train.keep-checkpoints", "9"]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    write_folder(folder / "a", [i % 3 for i in range(40)], shard_size=100)
    write_folder(folder / "b", [0, 1, 2, 1])
    return folder


def train(folder, shards, *words, ranks=0):
    done = helpers_run.run(folder, shards, *words, ranks=ranks)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "runs" / "tiny", done


def lines(run_dir, name):
    return [line for line in helpers_run.metrics(run_dir) if name in line]


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory, shards, tasks):
    return train(tmp_path_factory.mktemp("evaluated"), shards, "--eval.benchmark", str(tasks), *WORDS)


def test_training_goes_on_bit_for_bit_as_without(evaluated, tmp_path, shards):
    run_dir, _ = evaluated
    plain, _ = train(tmp_path, shards)
    assert [line["loss"] for line in lines(run_dir, "loss")] == helpers_run.losses(plain)
    ours, theirs = (focalclip.load(folder).state_dict() for folder in (run_dir, plain))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert not (plain / "eval").exists()


def test_what_is_logged_is_what_the_weights_of_that_step_give(evaluated, tasks):
    run_dir, done = evaluated
    found = lines(run_dir, "zeroshot")
    assert [line["step"] for line in found] == [3, 6]  # at the end the whole benchmark follows
    config = load_yaml(RunConfig, run_dir / "config.yaml")
    model = FocalCLIP(config.model)
    saved = torch.load(run_dir / "checkpoints/step-6/mp_rank_00_model_states.pt", weights_only=False)
    model.load_state_dict(saved["module"])
    result = zero_shot(model, tasks, max_images=20)
    assert found[1]["zeroshot"] == {"score": result.score} | {name: t.value for name, t in result.tasks.items()}
    assert result.tasks["a"].n == 20
    board = EventAccumulator(str(run_dir / "tensorboard"))
    board.Reload()
    assert [event.step for event in board.Scalars("zeroshot/score")] == [3, 6]
    assert board.Scalars("zeroshot/a")[1].value == pytest.approx(result.tasks["a"].value)
    assert f"step 6: zero-shot score {100 * result.score:.1f}%, a " in done.stderr


def test_the_end_has_the_whole_benchmark(evaluated, tasks):
    run_dir, done = evaluated
    whole = json.loads((run_dir / "eval" / f"{tasks.name}.json").read_text())
    assert [task["n"] for task in whole["tasks"].values()] == [40, 4]
    assert done.stdout.count("mean of 2 of 2 tasks") == 1


def test_the_data_and_the_tasks_are_settings(tmp_path, shards, tasks):
    benchmark = tmp_path / "mine.yaml"
    benchmark.write_text("data_root: elsewhere\ntasks: [{id: a}, {id: b}]\n")
    words = ["--eval.benchmark", str(benchmark), "--eval.data-root", str(tasks), "--eval.tasks", "b"]
    run_dir, _ = train(tmp_path, shards, *words, "--eval.every", "4", "--train.steps", "6")
    assert [set(line["zeroshot"]) for line in lines(run_dir, "zeroshot")] == [{"score", "b"}]
    assert list(json.loads((run_dir / "eval" / "mine-b.json").read_text())["tasks"]) == ["b"]


@pytest.mark.parametrize("stage", [1, pytest.param(3, marks=pytest.mark.long)])
def test_two_ranks_measure_together(evaluated, tmp_path, shards, tasks, stage):
    words = ["--eval.benchmark", str(tasks), *WORDS, "--train.zero-stage", str(stage)]
    run_dir, done = train(tmp_path, shards, *words, ranks=2)
    one, two = (lines(folder, "zeroshot") for folder in (evaluated[0], run_dir))
    assert [line["step"] for line in two] == [3, 6]
    assert two[0]["zeroshot"].keys() == one[0]["zeroshot"].keys()
    # the gradients of two ranks are summed in another order, so a picture or two may fall to another class
    assert two[1]["zeroshot"]["a"] == pytest.approx(one[1]["zeroshot"]["a"], abs=0.101)
    assert done.stdout.count("mean of 2 of 2 tasks") == 1
    assert json.loads((run_dir / "eval" / f"{tasks.name}.json").read_text())["model"]["ranks"] == 2


@pytest.mark.trap("5.2 request", "evaluation in training is too slow (open_clip #137)")
def test_trap_evaluation_in_training_has_a_fixed_budget(tasks):
    """open_clip's users wished for it (#137: too slow): so many images of each task, the same ones each time."""
    model = tiny_model()
    evaluator = Evaluator(tasks, max_images=7)
    first = evaluator(model)
    second = evaluator(model)
    assert [task.value for task in first.tasks.values()] == [task.value for task in second.tasks.values()]
    assert first.tasks["a"].task_sha256 == second.tasks["a"].task_sha256
    assert (first.tasks["a"].n, first.tasks["b"].n) == (7, 4)
    assert first.tasks["a"].differences == ("7 images only, evenly spaced (max_images)",)


def test_no_generator_is_moved(tasks):
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002
    Evaluator(tasks, max_images=7)(tiny_model())
    assert before == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())  # noqa: NPY002


def test_evaluations_without_a_benchmark_are_a_mistake():
    with pytest.raises(UserError, match=r"eval: every=5 would be ignored without a benchmark"):
        from_dict(RunConfig, {"eval": {"benchmark": None, "every": 5}}, "x.yaml")
