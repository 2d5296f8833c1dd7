"""What each protocol fixes, and that scores under it are what its definition says."""

import numpy as np
import pytest
import references
import torch
from PIL import Image
from sklearn import metrics as sk
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize, ToTensor
from wds_folder import tiny_model, write_folder, zero_shot

from focalclip.base.errors import UserError
from focalclip.evaluation.features.images import resizer
from focalclip.evaluation.protocols import PROTOCOLS, lines_sha256, load_protocol
from focalclip.evaluation.scoring import metric_value, score, score_matrix
from focalclip.evaluation.task import Task, load_benchmark, registered_benchmarks, registered_tasks
from focalclip.reports.tables import result_table

ELEVATER = {task.id: task for task in registered_tasks("elevater")}


def under(protocol, task_id):
    return ELEVATER[task_id].under(load_protocol(protocol))


def unit(rng, n, dim):
    vectors = torch.from_numpy(rng.normal(size=(n, dim))).float()
    return torch.nn.functional.normalize(vectors, dim=-1)


def test_elevater_is_what_the_task_files_say():
    for task in ELEVATER.values():
        assert task.under(load_protocol("elevater")) == task


@pytest.mark.parametrize(
    ("protocol", "task_id", "expected"),
    [  # metric, what ranks, classes that compete, resize, prompts
        ("elevater", "voc-2007-classification", ("map_11point", "softmax", "occurring", "model", 1)),
        ("clip_benchmark", "voc-2007-classification", ("map", "cosine", "all", "model", 1)),
        ("datacomp", "voc-2007-classification", ("map", "cosine", "all", "model", 1)),
        ("elevater", "kitti-distance", ("accuracy", "softmax", "occurring", "squash", 1)),
        ("clip_benchmark", "kitti-distance", ("accuracy", "cosine", "all", "model", 1)),
        ("unicl", "kitti-distance", ("accuracy", "softmax", "occurring", "squash", 1)),
        ("elevater", "patch-camelyon", ("accuracy", "softmax", "occurring", "model", 1)),
        ("datacomp", "patch-camelyon", ("accuracy", "cosine", "all", "model", 2)),
        ("elevater", "resisc45_clip", ("accuracy", "softmax", "occurring", "model", 18)),
        ("clip_benchmark", "resisc45_clip", ("accuracy", "cosine", "all", "model", 4)),
        ("datacomp", "caltech-101", ("mean_per_class", "cosine", "all", "model", 34)),
        ("elevater", "imagenet-1k", ("accuracy", "softmax", "occurring", "model", 80)),
        ("unicl", "imagenet-1k", ("accuracy", "softmax", "occurring", "resize256_crop224", 81)),
    ],
)
def test_what_each_protocol_fixes(protocol, task_id, expected):
    task = under(protocol, task_id)
    assert (task.metric, task.scores, task.candidates, task.resize, len(task.templates)) == expected


def test_datacomp_has_mean_per_class_for_the_same_four_and_macro_f1_for_iwildcam():
    tasks = load_benchmark("datacomp", ".").tasks
    special = {task.id: task.metric for task in tasks if task.metric != "accuracy"}
    four = ("caltech-101", "fgvc-aircraft-2013b-variants102", "oxford-flower-102", "oxford-iiit-pets")
    assert special == dict.fromkeys(four, "mean_per_class") | {"iwildcam": "macro_f1"}


def test_a_protocol_that_has_no_such_task_says_what_is_done():
    assert "scored as in ELEVATER" in under("datacomp", "hateful-memes").note
    assert "scored as in CLIP_benchmark" in under("datacomp", "fer-2013").note
    assert under("elevater", "hateful-memes").note is None


def test_the_result_can_state_what_was_fixed():
    task = under("clip_benchmark", "oxford-iiit-pets")
    stated = task.statement(task.names, task.templates)
    assert stated == {
        "metric": "mean_per_class",
        "scores": "100 x cosine",
        "candidates": "all",
        "resize": "model",
        "names_sha256": lines_sha256(task.names),
        "templates_sha256": lines_sha256(["a photo of a {c}, a type of pet."]),
    }
    assert lines_sha256(["a", "b"]) != lines_sha256(["b", "a"])


def test_a_misspelt_protocol_is_named():
    with pytest.raises(UserError, match="--protocol clip-benchmark: no such protocol; did you mean clip_benchmark"):
        load_benchmark("elevater", ".", "clip-benchmark")
    with pytest.raises(UserError, match="known: elevater, clip_benchmark, datacomp, unicl"):
        load_protocol("x")


def test_every_named_benchmark_has_its_protocol_and_any_can_be_measured_under_another(tmp_path):
    for name, entry in registered_benchmarks().items():
        assert entry.protocol in PROTOCOLS
        assert load_benchmark(name, tmp_path).protocol == entry.protocol
    for protocol in ("elevater", "clip_benchmark", "datacomp", "unicl"):
        assert load_benchmark("elevater", tmp_path, protocol).protocol == protocol
        assert len(load_benchmark("elevater", tmp_path, protocol).tasks) == 21


def test_a_folder_of_ones_own_keeps_its_names_and_prompts_under_every_protocol(tmp_path):
    write_folder(tmp_path / "several", [[0, 1, 0]], kind="multilabel")
    write_folder(tmp_path / "single", [0, 1])
    tasks = {task.id: task for task in load_benchmark(tmp_path, protocol="clip_benchmark").tasks}
    assert (tasks["several"].metric, tasks["several"].scores) == ("map", "cosine")
    assert (tasks["single"].metric, tasks["single"].names, tasks["single"].templates) == ("accuracy", None, None)
    own = {task.id: task for task in load_benchmark(tmp_path).tasks}
    assert (own["several"].metric, own["several"].scores) == ("map_11point", "softmax")


def peers_average_precision(scores, labels):
    """CLIP_benchmark's definition in naive code: no interpolation, ranks without ties, an empty class counts zero."""
    each = []
    for c in range(scores.shape[1]):
        truth = labels[np.argsort(-scores[:, c]), c]
        precision = [truth[: i + 1].sum() / (i + 1) for i in range(len(truth)) if truth[i]]
        each.append(sum(precision) / max(len(precision), 1))
    return np.mean(each)


def test_multi_label_scores_of_every_kind_and_the_protocols_own_among_them():
    rng = np.random.default_rng(0)
    images, classes, labels = unit(rng, 150, 12), unit(rng, 6, 12), rng.random((150, 6)) < 0.25
    labels[:, 4] = False  # no image of this class
    cosines = (images @ classes.T).double().numpy()
    softmax = references.softmax(100 * cosines)
    task = Task(id="voc", metric="map_11point")
    results = {name: score(task.under(PROTOCOLS[name]), images, classes, labels) for name in PROTOCOLS}
    assert results["clip_benchmark"].value == pytest.approx(peers_average_precision(cosines, labels), abs=1e-12)
    assert results["elevater"].value == pytest.approx(references.map_11point(softmax, labels), abs=1e-12)
    extras = results["elevater"].extras
    assert len(extras) == 6
    assert extras == results["clip_benchmark"].extras
    each = [sk.average_precision_score(labels[:, c], softmax[:, c]) for c in (0, 1, 2, 3, 5)]  # has ties at 0 and 1
    assert extras["map_softmax"] == pytest.approx(sum(each) / 6, abs=1e-12)
    expected = references.map_11point(cosines, labels, end_point=False)
    assert extras["map_11point_voc_cosine"] == pytest.approx(expected, abs=1e-12)
    assert len({round(value, 9) for value in extras.values()}) == 6  # six different numbers for one model
    for result in results.values():
        assert result.interval[0] < result.value < result.interval[1]
    assert results["elevater"].chance > results["clip_benchmark"].chance + 0.03


def test_a_matrix_of_scores_is_scored_as_vectors_are():
    rng = np.random.default_rng(0)
    images, classes = unit(rng, 90, 12), unit(rng, 6, 12)
    cosines = (images @ classes.T).numpy()
    labels, several = rng.integers(0, 4, size=90), rng.random((90, 6)) < 0.3
    for metric in ("accuracy", "mean_per_class", "macro_f1"):
        task = Task(id="t", metric=metric, chance=0.25)
        assert score_matrix(task, cosines, labels) == score(task, images, classes, labels)
        assert metric_value(metric, cosines, labels) == score(task, images, classes, labels).value
    for metric in ("map_11point", "map_11point_voc", "map"):
        task = Task(id="t", metric=metric, scores="cosine", chance=0.25)
        by_vectors, by_matrix = score(task, images, classes, several), score_matrix(task, cosines, several)
        assert (by_matrix.value, by_matrix.interval) == (by_vectors.value, by_vectors.interval)
        assert metric_value(metric, cosines, several) == by_vectors.value
    pair = Task(id="t", metric="roc_auc")
    assert score_matrix(pair, cosines[:, :2], labels % 2) == score(pair, images, classes[:2], labels % 2)
    expected = score(pair, images, classes[:2], labels % 2).value
    assert metric_value("roc_auc", cosines[:, :2], labels % 2) == expected


def test_mean_per_class_lets_empty_classes_compete_or_not_as_the_protocol_says():
    images = torch.eye(3)[[0, 0, 1]]
    classes = torch.nn.functional.normalize(torch.tensor([[1.0, 0, 0], [0, 0.6, 0], [0.0, 1, 0.1]]) + 0.01, dim=-1)
    labels = np.array([0, 0, 1])  # the third class, which has no image, lies nearest to the last image of none
    classes[2] = images[2]
    task = Task(id="t", metric="mean_per_class")
    dropped = score(task.under(PROTOCOLS["elevater"]), images, classes, labels)
    kept = score(task.under(PROTOCOLS["clip_benchmark"]), images, classes, labels)
    assert (dropped.value, kept.value) == (1.0, 0.5)
    answers = (images @ classes.T).argmax(dim=1)
    with pytest.warns(UserWarning, match="y_pred contains classes not in y_true"):
        assert kept.value == sk.balanced_accuracy_score(labels, answers)  # as CLIP_benchmark computes it
    assert (dropped.chance, kept.chance) == (1 / 2, 1 / 3)
    assert score(Task(id="t"), images, classes, labels).extras["mean_per_class"] == 1.0  # comes along with accuracy


def test_macro_f1_through_the_scores():
    rng = np.random.default_rng(0)
    images, classes, labels = unit(rng, 300, 8), unit(rng, 7, 8), rng.integers(0, 5, size=300)
    result = score(Task(id="wild", metric="macro_f1"), images, classes, labels)
    answers = (images @ classes.T).argmax(dim=1).numpy()
    assert result.value == pytest.approx(sk.f1_score(labels, answers, average="macro", labels=range(5)), abs=1e-12)
    assert result.interval[0] < result.value < result.interval[1]
    assert result.chance == pytest.approx(1 / 7, abs=0.06)


@pytest.mark.parametrize("size", [(300, 200), (64, 91), (500, 120)])
def test_unicl_resizes_to_256_and_crops_224(size):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8))
    preprocess = Compose([Resize(224, InterpolationMode.BICUBIC), CenterCrop(224), ToTensor()])
    expected = Compose([Resize(256, InterpolationMode.BICUBIC), CenterCrop(224), ToTensor()])(picture)
    torch.testing.assert_close(preprocess(resizer(preprocess, "resize256_crop224")(picture)), expected)
    assert resizer(preprocess, "model")(picture) is picture
    squashed = resizer(preprocess, "squash")(picture)
    assert squashed.size == (224, 224)
    np.testing.assert_array_equal(squashed, picture.resize((224, 224), Image.Resampling.BICUBIC))


def test_resize_follows_the_models_own_size():
    preprocess = tiny_model().preprocess  # 16 pixels: the shorter side becomes int(16 x 256 / 224) = 18
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))
    by_hand = picture.resize((27, 18), Image.Resampling.BICUBIC).crop((6, 1, 22, 17))
    np.testing.assert_array_equal(resizer(preprocess, "resize256_crop224")(picture), by_hand)


def test_datacomp_lists_what_it_leaves_out_and_never_calls_32_tasks_the_whole(tmp_path):
    result = zero_shot(tiny_model(), "datacomp", tmp_path)
    assert result.expected == 38
    assert "no score: 0 of 38 tasks" in result_table(result)
    assert {
        "dollar-street",
        "geode",
        "flickr30k",
        "mscoco",
        "winogavil",
        "fmow (worst region)",
    } <= result.missing.keys()
    assert len(result.missing) == 33 + 6
    assert load_benchmark("elevater", tmp_path).expected == 20


def test_vtab_plus_is_the_collection_of_clip_benchmark():
    tasks = {task.id: task for task in load_benchmark("vtab_plus", ".").tasks}
    assert len(tasks) == 36
    assert tasks["imagenet-1k"].in_score
    assert {"voc-2007-crops", "voc-2007-classification", "smallnorb-azimuth", "dmlab"} <= tasks.keys()
    assert "food-101" not in tasks
