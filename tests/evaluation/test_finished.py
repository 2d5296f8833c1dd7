"""A repeated command measures what is new, a killed one goes on, and nothing stale is taken over."""

import copy
import json

import numpy as np
import pytest
import torch
from wds_folder import picture, tiny_model, write_folder, zero_shot

from focalclip.evaluation import zeroshot
from focalclip.evaluation.task import Benchmark, Task


@pytest.fixture
def model():
    return copy.deepcopy(tiny_model())


@pytest.fixture
def tasks(tmp_path):
    for i, name in enumerate("abc"):
        write_folder(tmp_path / "tasks" / name, [0, 1, 2, i], templates=[f"{name} {{c}}"])
    return tmp_path / "tasks"


@pytest.fixture
def measured(monkeypatch):
    """Ids of the tasks that were really measured, as they come."""
    found, measure = [], zeroshot._Run._measure

    def noted(self, opened, *rest):
        found.append(opened.task.id)
        return measure(self, opened, *rest)

    monkeypatch.setattr(zeroshot._Run, "_measure", noted)
    return found


def run(model, tasks, output, **options):
    return zero_shot(model, tasks, outputs=[output], **options)


def values(result):
    return {name: (task.value, task.interval, task.n, task.extras) for name, task in result.tasks.items()}


def test_a_repeated_command_takes_over_what_is_finished(model, tasks, tmp_path, measured):
    first = run(model, tasks, tmp_path / "r.json")
    again = run(model, tasks, tmp_path / "r.json")
    assert measured == ["a", "b", "c"]
    assert again.tasks == first.tasks
    assert again.score == first.score
    run(model, tasks, tmp_path / "r.json", fresh=True)
    assert measured == ["a", "b", "c"] * 2
    written = json.loads((tmp_path / "r.json").read_text())
    assert written["tasks"]["a"] == json.loads(json.dumps(again.to_json()))["tasks"]["a"] | {
        name: written["tasks"]["a"][name] for name in ("seconds", "images_per_second", "text_seconds", "image_seconds")
    }


def test_a_killed_run_goes_on_and_its_old_result_stays_until_it_is_done(model, tasks, tmp_path, measured, monkeypatch):
    old = run(model, tasks, tmp_path / "r.json").to_json()
    with torch.no_grad():
        model.visual.proj += 0.1
    encode = zeroshot.encode_images

    def killed(model, entries, **options):
        if "b (2 of 3)" in options["label"]:
            raise KeyboardInterrupt
        return encode(model, entries, **options)

    monkeypatch.setattr(zeroshot, "encode_images", killed)
    with pytest.raises(KeyboardInterrupt):
        run(model, tasks, tmp_path / "r.json")
    monkeypatch.setattr(zeroshot, "encode_images", encode)
    assert json.loads((tmp_path / "r.json").read_text())["score"] == old["score"]
    assert list(json.loads((tmp_path / "r.json.part").read_text())["tasks"]) == ["a"]
    measured.clear()
    result = run(model, tasks, tmp_path / "r.json")
    assert measured == ["b", "c"]
    assert values(result) == values(zero_shot(model, tasks))
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["r.json"]


@pytest.mark.parametrize(
    "change", ["weights", "precision", "a picture", "a label", "a name", "a template", "class prompts", "part", "batch"]
)
def test_what_has_changed_is_measured_anew(model, tasks, tmp_path, measured, change):
    run(model, tasks / "a", tmp_path / "r.json")
    folder, options, names, labels, pictures = tasks / "a", {}, ("red", "green", "blue"), [0, 1, 2, 0], [0, 1, 2, 3]
    templates = ["a {c}"]
    match change:
        case "weights":
            with torch.no_grad():
                model.text_projection[0, 0] += 1e-3
        case "precision":
            model.bfloat16()
        case "a picture":
            pictures[3] = 77
        case "a label":
            labels[3] = 1
        case "a name":
            names = ("red", "green", "azure")
        case "a template":
            templates = ["the {c}"]
        case "class prompts":
            options["class_prompts"] = {name: [f"a {name}"] for name in names}
        case "part":
            options["max_images"] = 3
        case "batch":
            options["batch_size"] = 2
    write_folder(folder, labels, names=names, templates=templates, images=[picture(i) for i in pictures])
    result = run(model, folder, tmp_path / "r.json", **options)
    assert measured == ["a", "a"]
    assert values(result) == values(zero_shot(model, folder, **options))


def test_a_change_of_the_tasks_definition_is_measured_anew(model, tasks, tmp_path, measured):
    for task in (Task(id="a"), Task(id="a", version=2), Task(id="a", metric="mean_per_class"), Task(id="a")):
        run(model, Benchmark("x", "wds", (task,), tasks), tmp_path / "r.json")
    assert measured == ["a"] * 4  # the file holds the last one alone


def test_data_that_moved_is_the_same_data(model, tasks, tmp_path, measured):
    run(model, tasks, tmp_path / "r.json")
    tasks.rename(tmp_path / "moved")
    run(model, tmp_path / "moved", tmp_path / "r.json")
    assert measured == ["a", "b", "c"]


def test_a_failed_task_is_tried_again_and_the_others_are_not(model, tasks, tmp_path, measured):
    names = tasks / "b" / "classnames.txt"
    whole = names.read_text()
    names.write_text("red\n\nblue\n")
    assert set(run(model, tasks, tmp_path / "r.json").failed) == {"b"}
    names.write_text(whole)
    result = run(model, tasks, tmp_path / "r.json")
    assert measured == ["a", "c", "b"]
    assert list(result.tasks) == ["a", "b", "c"]
    assert not result.failed


@pytest.mark.parametrize("content", ["", "{", "[]", '{"tasks": {"a": {"value": 1}}}', '{"tasks": 3}'])
def test_a_file_that_is_no_result_is_told_and_replaced(model, tasks, tmp_path, capsys, content):
    (tmp_path / "r.json").write_text(content)
    result = run(model, tasks, tmp_path / "r.json")
    assert "r.json: not a result of this version; its tasks are measured again" in capsys.readouterr().err
    assert json.loads((tmp_path / "r.json").read_text())["score"] == result.score


def test_multilabel_results_come_back_as_they_were(model, tmp_path, measured):
    vectors = (np.random.default_rng(0).random((20, 3)) < 0.4).astype(int)
    write_folder(tmp_path / "m", vectors, kind="multilabel")
    first, again = (run(model, tmp_path / "m", tmp_path / "r.json") for _ in range(2))
    assert measured == ["m"]
    assert again.tasks == first.tasks
