"""Answers kept beside a result: exact, small, readable; and two results compared by them."""

import copy
import json
import shutil

import numpy as np
import pytest
import references
import torch
from wds_folder import picture, tiny_model, write_folder, zero_shot

from focalclip.base.errors import UserError
from focalclip.evaluation.compare import compare
from focalclip.evaluation.data import decode, read_task_folder
from focalclip.evaluation.features.images import ImageFeatures
from focalclip.evaluation.predictions import Predictions
from focalclip.evaluation.result import Result, find_results
from focalclip.evaluation.scoring import mistakes, predict
from focalclip.evaluation.task import Benchmark, Task
from focalclip.reports.classes import class_numbers, confusions
from focalclip.reports.tables import comparison_table

NAMES = ("cat", "dog", "ankle boot", "fire engine", "owl", "bus", "tree")
TASKS = (
    Task(id="plain"),
    Task(id="balanced", metric="mean_per_class"),
    Task(id="many", metric="map_11point"),
    Task(id="memes", metric="roc_auc"),
    Task(id="beside", in_score=False),
)


def other_model():
    """The tiny model with its weights stirred: it answers much alike."""
    model = copy.deepcopy(tiny_model())
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.visual.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Two results, a.json and b.json, of two models on five tasks."""
    root = tmp_path_factory.mktemp("results")
    rng = np.random.default_rng(0)
    images = [picture(i) for i in range(60)]
    write_folder(root / "plain", rng.integers(7, size=60).tolist(), names=NAMES, images=images, shard_size=60)
    labels = rng.choice([0, 1, 2, 5], size=60).tolist()  # three classes do not occur
    write_folder(root / "balanced", labels, names=NAMES, images=images, shard_size=60)
    vectors = (rng.random((60, 7)) < 0.3).astype(int)
    write_folder(root / "many", vectors, names=NAMES, images=images, shard_size=60, kind="multilabel")
    write_folder(root / "memes", [0, 1] * 30, names=NAMES[:2], images=images, shard_size=60)
    damaged = [b"rubbish", *images[1:12]]
    write_folder(root / "beside", [i % 3 for i in range(12)], images=damaged)
    benchmark = Benchmark("five", "wds", TASKS, root)
    for name, model in (("a", tiny_model()), ("b", other_model())):
        zero_shot(model, benchmark).with_source(name).write(root / f"{name}.json")
    return root


@pytest.mark.trap("5.2 result", "no saved predictions")
def test_trap_no_predictions_are_kept(root):
    """They are, and give the result again to the last bit."""
    result = Result.read(root / "a.json")
    assert result.tasks.keys() == {task.id for task in TASKS}
    for name, task in result.tasks.items():
        assert float(task.predictions.statistic()[0]) == task.value, name
        assert task.predictions.n == task.n


def test_saved_answers_are_read_back_equal_and_are_small(root):
    path = root / "a.predictions" / "plain.npz"
    first = Predictions.load(path)
    first.save(root / "again.npz")
    second = Predictions.load(root / "again.npz")
    assert second.class_names == NAMES
    for name in ("keys", "places", "labels", "predicted", "top_classes", "top_cosines", "log_partition", "scales"):
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name))
    assert second.pictures.webp == first.pictures.webp
    assert not list(root.glob(".*tmp"))
    assert first.cosines.shape == (60, 0)  # only the top classes are kept
    assert path.stat().st_size < 60 * 100 + 16 * 800  # answers, and up to 20 small pictures


def test_answers_at_both_scales_are_the_softmax(root):
    p = Predictions.load(root / "a.predictions" / "many.npz")  # this one holds all cosines too
    np.testing.assert_allclose(p.scales[:2], [100, 1 / 0.07], rtol=1e-5)
    for which in (0, 1):
        full = references.softmax(p.scales[which] * p.cosines.astype(np.float64))
        top = np.take_along_axis(full, p.top_classes.astype(np.int64), axis=1)
        np.testing.assert_allclose(p.probabilities(which), top, rtol=2e-4)
    assert (np.diff(p.top_cosines, axis=1) <= 0).all()
    assert (p.top_classes[:, 0] == p.cosines.argmax(axis=1)).all()


def test_trap_classes_that_do_not_occur_cannot_win_in_mean_per_class(root):
    p = Predictions.load(root / "a.predictions" / "balanced.npz")
    assert set(np.unique(p.predicted)) <= {0, 1, 2, 5}
    assert not set(np.unique(p.top_classes[:, 0])) <= {0, 1, 2, 5}  # they would have won among all
    recalls = [(p.predicted[p.labels == c] == c).mean() for c in (0, 1, 2, 5)]
    assert float(p.statistic()[0]) == pytest.approx(np.mean(recalls), abs=1e-12)


def synthetic(cosines, labels, names, metric="accuracy", folder=None):
    """Predictions from cosines alone: unit vectors of one dimension per class, and a rest."""
    cosines = torch.tensor(cosines, dtype=torch.float32)
    rest = (1 - (cosines**2).sum(dim=1, keepdim=True)).sqrt()
    embeds = torch.cat([cosines, rest], dim=1)
    classes = torch.eye(cosines.shape[1], embeds.shape[1])
    data = read_task_folder(write_folder(folder, labels, names=names))
    images = ImageFeatures(embeds, np.ones(len(embeds), dtype=bool), (), "0" * 64, 1.0)
    return predict(Task(id="t", metric=metric), data, images, classes)[0]


def test_trap_equal_names_tie_to_the_first_class(tmp_path):
    # as missile and sunglasses, which ImageNet's list holds twice
    p = synthetic([[0.1, 0.4, 0.4], [0.2, 0.1, 0.1]], [2, 0], ("tench", "missile", "missile"), folder=tmp_path / "t")
    assert p.top_classes.tolist() == [[1, 2, 0], [0, 1, 2]]
    assert p.correct.tolist() == [False, True]
    assert p.true_rank.tolist() == [1, 0]


def test_per_class_numbers_and_confusions_by_hand(tmp_path):
    answers = [0, 0, 1, 1, 1, 2, 0]
    labels = [0, 0, 0, 1, 1, 1, 3]
    cosines = 0.1 + 0.3 * np.eye(4)[answers]
    p = synthetic(cosines, labels, ("a", "b", "c", "d"), folder=tmp_path / "t")
    rows = {row.name: row for row in class_numbers(p)}
    assert (rows["a"].n, rows["a"].given) == (3, 3)
    assert (rows["a"].value, rows["a"].precision) == (pytest.approx(2 / 3), pytest.approx(2 / 3))
    assert (rows["b"].value, rows["b"].precision) == (pytest.approx(2 / 3), pytest.approx(2 / 3))
    assert np.isnan(rows["c"].value)
    assert rows["c"].precision == 0
    assert np.isnan(rows["d"].precision)
    assert rows["d"].value == 0
    found = [(c.true, c.given, c.count, c.rows.tolist()) for c in confusions(p)]
    assert found == [(3, 0, 1, [6]), (0, 1, 1, [2]), (1, 2, 1, [5])]  # of equal counts the larger share first


def test_pictures_show_the_worst_mistakes_and_an_example_of_each_confusion(root):
    p = Predictions.load(root / "a.predictions" / "plain.npz")
    assert (p.top_classes[p.pictures.rows, 0] != p.labels[p.pictures.rows]).all()
    gaps = (p.top_cosines[:, 0] - p.true_cosine)[p.pictures.rows[:5]]
    assert (np.diff(gaps) <= 0).all()
    assert {(c.true, c.given) for c in confusions(p)[:8]} <= {(p.labels[r], p.predicted[r]) for r in p.pictures.rows}
    entries = read_task_folder(root / "plain").entries
    for row in p.pictures.rows[:3]:
        small = np.asarray(decode(p.pictures.of(row)), dtype=float)
        whole = np.asarray(decode(entries[p.places[row]].read()), dtype=float)
        assert small.shape == whole.shape
        assert abs(small - whole).mean() < 15  # WEBP of four flat colours
    assert p.pictures.of(-1) is None


def test_a_pair_of_look_alikes_does_not_fill_the_page():
    predicted, labels = np.array([1] * 30 + [2] * 3), np.array([0] * 30 + [1] * 3)
    rows = mistakes(predicted, np.linspace(1, 0.5, 33), labels, np.zeros(33))
    assert sum(row < 30 for row in rows) == 6
    assert sum(row >= 30 for row in rows) == 3
    assert mistakes(np.array([1]), np.ones(1), np.array([1]), np.ones(1)) == []


def test_damaged_image_is_left_out_and_the_places_say_so(root):
    p = Predictions.load(root / "a.predictions" / "beside.npz")
    assert (p.n, p.entries, p.places.tolist()) == (11, 12, list(range(1, 12)))


def _damaged(content):
    """Rubbish, nothing, halves, and a flipped bit in many places of an ``.npz`` file."""
    yield from (b"PK\x03\x04 rubbish", b"", content[:100], content[: len(content) // 2])
    rng = np.random.default_rng(0)
    for place in [*range(64), *range(len(content) - 64, len(content)), *rng.integers(len(content), size=100)]:
        flipped = bytearray(content)
        flipped[place] ^= 1 << int(rng.integers(8))
        yield bytes(flipped)


def test_damaged_answers_are_named_and_the_others_used(root, tmp_path, capsys):
    shutil.copytree(root / "a.predictions", tmp_path / "x.predictions")
    shutil.copy(root / "a.json", tmp_path / "x.json")
    path, whole = tmp_path / "x.predictions" / "plain.npz", Result.read(root / "a.json")
    answers = whole.tasks["plain"].predictions
    noticed = 0
    for content in _damaged(path.read_bytes()):
        path.write_bytes(content)
        result = Result.read(tmp_path / "x.json")
        warning = capsys.readouterr().err
        read = result.tasks["plain"].predictions
        assert (read is None) == bool(warning)
        if warning:
            noticed += 1
            assert warning.startswith(f"warning: {path}: no predictions can be read (")
            assert warning.count("\n") == 1
        else:  # in a part of the file that no reader needs, such as a time
            assert read.pictures.webp == answers.pictures.webp
            for name in vars(answers).keys() - {"pictures"}:
                np.testing.assert_array_equal(getattr(read, name), getattr(answers, name))
        assert result.tasks["beside"].predictions.n == 11
    assert noticed > 100


def test_a_task_with_damaged_answers_is_measured_again(root, tmp_path, capsys):
    benchmark, output = Benchmark("one", "wds", TASKS[:2], root), tmp_path / "r.json"
    first = zero_shot(tiny_model(), benchmark, outputs=[output]).tasks
    path = tmp_path / "r.predictions" / "plain.npz"
    path.write_bytes(path.read_bytes()[:200])
    second = zero_shot(tiny_model(), benchmark, outputs=[output]).tasks
    assert "plain.npz: no predictions can be read" in capsys.readouterr().err
    np.testing.assert_array_equal(second["plain"].predictions.labels, first["plain"].predictions.labels)
    assert Result.read(output).tasks["plain"].predictions.n == 60
    others = [name for name in first if name != "plain"]
    assert [second[name].seconds for name in others] == [first[name].seconds for name in others]


def test_answers_of_another_result_are_refused(root, tmp_path):
    (tmp_path / "x.predictions").mkdir()
    (tmp_path / "x.json").write_text((root / "a.json").read_text())
    for name in ("plain", "beside"):
        (tmp_path / "x.predictions" / f"{name}.npz").write_bytes((root / "a.predictions" / f"{name}.npz").read_bytes())
    assert Result.read(tmp_path / "x.json").tasks["many"].predictions is None  # not there: no mistake
    content = json.loads((tmp_path / "x.json").read_text())
    content["tasks"]["plain"]["value"] += 1 / 60
    (tmp_path / "x.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"plain.npz: these answers do not belong"):
        Result.read(tmp_path / "x.json")
    (tmp_path / "x.json").write_text("[]")
    with pytest.raises(UserError, match=r"x.json: no zero-shot result can be read"):
        Result.read(tmp_path / "x.json")


def test_comparison_counts_and_differences_are_the_naive_ones(root):
    comparison = compare(root / "a.json", root / "b.json", progress=False)
    a, b = Result.read(root / "a.json"), Result.read(root / "b.json")
    assert comparison.tasks.keys() == a.tasks.keys()
    for name, difference in comparison.tasks.items():
        assert difference.difference == pytest.approx(b.tasks[name].value - a.tasks[name].value, abs=1e-12)
        assert difference.interval[0] <= difference.difference <= difference.interval[1]
        assert difference.p <= difference.p_holm <= 1
    plain, right = comparison.tasks["plain"], [r.tasks["plain"].predictions.correct for r in (a, b)]
    assert plain.only_a == sum(x and not y for x, y in zip(*right, strict=True))
    assert plain.only_b == sum(y and not x for x, y in zip(*right, strict=True))
    assert plain.only_a + plain.only_b > 0
    assert plain.test == "McNemar exact"
    assert comparison.tasks["many"].test == "paired bootstrap"


def test_trap_imagenet_stands_beside_the_compared_mean(root):
    comparison = compare(root / "a.json", root / "b.json", progress=False)
    scored = [d for name, d in comparison.tasks.items() if name != "beside"]
    assert comparison.beside == ("beside",)
    assert comparison.score.difference == pytest.approx(np.mean([d.difference for d in scored]))
    half = (comparison.score.interval[1] - comparison.score.interval[0]) / 2
    halves = [(d.interval[1] - d.interval[0]) / 2 for d in scored]
    assert half == pytest.approx(np.sqrt(np.sum(np.square(halves))) / len(halves), rel=0.15)
    assert "mean of 4" in comparison_table(comparison)
    assert "(beside)" in comparison_table(comparison)


def test_a_result_equals_itself(root):
    comparison = compare(root / "a.json", root / "a.json", progress=False)
    assert comparison.score.interval == (0.0, 0.0)
    assert {d.p for d in comparison.tasks.values()} == {1.0}


def test_comparison_as_json_and_what_is_in_one_alone(root, tmp_path):
    content = json.loads((root / "b.json").read_text())
    del content["tasks"]["memes"]
    (tmp_path / "b.json").write_text(json.dumps(content))
    (tmp_path / "b.predictions").symlink_to(root / "b.predictions")
    comparison = compare(root / "a.json", tmp_path / "b.json", progress=False)
    assert comparison.only_a == ("memes",)
    assert "only in A: memes" in comparison_table(comparison)
    saved = json.loads(comparison.write(tmp_path / "out" / "c.json").read_text())
    assert saved["tasks"]["plain"]["difference"] == comparison.tasks["plain"].difference
    assert saved["score"]["p"] == comparison.score.p


def test_other_images_labels_or_metrics_are_refused_and_named(root, tmp_path):
    images = [picture(i) for i in range(60)]
    labels = read_task_folder(root / "plain").labels.tolist()
    cases = {
        "other images (60 in A, 60 in B)": (labels, images[::-1], "accuracy"),
        "other labels": (labels[::-1], images, "accuracy"),
        "A has accuracy (softmax), B has mean_per_class": (labels, images, "mean_per_class"),
        "60 images could be read for A, 59 for B": (labels, None, "accuracy"),
    }
    for i, (message, (other, pictures, metric)) in enumerate(cases.items()):
        folder = tmp_path / str(i)
        write_folder(folder / "plain", other, names=NAMES, images=pictures or images, shard_size=60)
        result = zero_shot(
            tiny_model(), Benchmark("x", "wds", (Task(id="plain", metric=metric),), folder), progress=False
        )
        if pictures is None:  # one machine could not read one of the same images
            p = result.tasks["plain"].predictions
            keep = {name: getattr(p, name)[1:] for name in ("keys", "places", "labels", "predicted", "true_rank")}
            object.__setattr__(result.tasks["plain"], "predictions", Predictions(**vars(p) | keep))
            object.__setattr__(result.tasks["plain"], "value", float(result.tasks["plain"].predictions.statistic()[0]))
        result.write(folder / "b.json")
        comparison = compare(root / "a.json", folder / "b.json", progress=False)
        assert message in comparison.refused["plain"]
        assert not comparison.tasks
        assert "no task can be compared" in comparison_table(comparison)


def test_runs_are_compared_by_the_benchmark_that_both_have(root, tmp_path):
    for run, names in (("x", ("demo", "elevater")), ("y", ("demo",)), ("z", ("elevater", "demo"))):
        (tmp_path / run / "eval").mkdir(parents=True)
        for name in names:
            (tmp_path / run / "eval" / f"{name}.json").write_text((root / "a.json").read_text())
        (tmp_path / run / "eval" / "retrieval.json").write_text('{"tasks": {"flickr30k": {"recall": 0.5}}}')
    x, y, z = (tmp_path / run for run in "xyz")
    assert find_results(x, y) == (x / "eval" / "demo.json", y / "eval" / "demo.json")
    assert find_results(x / "eval" / "elevater.json", z) == (x / "eval" / "elevater.json", z / "eval" / "elevater.json")
    with pytest.raises(UserError, match=r"several results \(demo, elevater\); name the files"):
        find_results(x, z)
    with pytest.raises(UserError, match="neither a result's JSON nor a run directory"):
        find_results(tmp_path, y)
    unkept = compare(x / "eval" / "demo.json", y, progress=False).refused
    assert unkept["plain"] == "the answers of A were not kept beside its JSON; evaluate it again"


def test_a_task_taken_over_keeps_its_answers_and_leaves_no_part_behind(root, tmp_path):
    benchmark, output = Benchmark("one", "wds", TASKS[:1], root), tmp_path / "r.json"

    def run(**options):
        return zero_shot(tiny_model(), benchmark, outputs=[output], **options).tasks["plain"]

    first = run()
    assert {path.name for path in tmp_path.iterdir()} == {"r.json", "r.predictions"}
    written = (tmp_path / "r.predictions" / "plain.npz").stat().st_mtime_ns
    second = run()
    assert second.seconds == first.seconds  # not measured again
    np.testing.assert_array_equal(second.predictions.top_cosines, first.predictions.top_cosines)
    assert (tmp_path / "r.predictions" / "plain.npz").stat().st_mtime_ns == written
    assert not second.predictions.has_all
    third = run(keep_all=True)  # what was not kept is measured again
    assert third.predictions.has_all
    assert third.value == first.value
    assert Result.read(output).tasks["plain"].predictions.cosines.shape == (60, 7)
    assert run().predictions.has_all


@pytest.mark.parametrize("scores", ["softmax", "cosine"])
@pytest.mark.parametrize("metric", ["map", "map_11point", "map_11point_voc"])
def test_trap_each_multilabel_metric_is_kept_with_what_it_ranks_by(root, metric, scores):
    benchmark = Benchmark("one", "wds", (Task(id="many", metric=metric, scores=scores),), root)
    task = zero_shot(tiny_model(), benchmark).tasks["many"]
    assert float(task.predictions.statistic()[0]) == task.value
    rows = class_numbers(task.predictions)
    assert np.nanmean([row.value for row in rows]) == pytest.approx(task.value, abs=1e-12)
    assert [row.n for row in rows] == task.predictions.labels.sum(axis=0).tolist()
    assert confusions(task.predictions) == []


@pytest.mark.parametrize(("metric", "candidates"), [("macro_f1", "all"), ("mean_per_class", "all")])
def test_metrics_of_the_answer_alone_are_kept(root, metric, candidates):
    benchmark = Benchmark("one", "wds", (Task(id="balanced", metric=metric, candidates=candidates),), root)
    task = zero_shot(tiny_model(), benchmark).tasks["balanced"]
    assert float(task.predictions.statistic()[0]) == task.value
    assert (task.predictions.predicted == task.predictions.top_classes[:, 0]).all()
