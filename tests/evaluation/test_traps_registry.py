"""The known traps of ELEVATER's data sets and of the tools that measure on them, one test each.

They concern names, orders, prompts, metrics and protocols. Where a trap has cost somebody points, the test shows the
wrong way beside ours, on real task folders and a real model with random weights.
"""

import numpy as np
import pytest
import references
import torch
from wds_folder import picture, tiny_model, write_folder, zero_shot

from focalclip.base.errors import UserError
from focalclip.evaluation.data import read_task_folder
from focalclip.evaluation.features.images import encode_images
from focalclip.evaluation.features.texts import class_matrix
from focalclip.evaluation.metrics import definitions as metrics
from focalclip.evaluation.metrics.label_check import check_labels
from focalclip.evaluation.opened import join, places
from focalclip.evaluation.protocols import PROTOCOLS
from focalclip.evaluation.scoring import score
from focalclip.evaluation.task import Benchmark, Task, load_benchmark, registered_tasks
from focalclip.reports.tables import result_table

ELEVATER = {task.id: task for task in registered_tasks("elevater")}
NAMES = ("cat", "dog", "ankle boot", "fire engine", "owl", "bus", "tree")


def measure(folder, task):
    return zero_shot(tiny_model(), Benchmark("b", "elevater", (task,), folder.parent)).tasks[task.id]


def test_trap_imagenet_is_beside_the_mean_never_inside():
    elevater = load_benchmark("elevater", ".")
    assert [task.id for task in elevater.tasks if not task.in_score] == ["imagenet-1k"]
    assert elevater.expected == 20
    assert all(task.in_score for task in load_benchmark("datacomp", ".").tasks if task.id == "imagenet-1k")


@pytest.mark.trap("0.2", "14 accuracies, 4 mean-per-class, 11-point mAP, ROC AUC")
def test_trap_fourteen_accuracies_four_mean_per_class_one_map_one_auc():
    counts = {}
    for task in ELEVATER.values():
        if task.in_score:
            counts[task.metric] = counts.get(task.metric, 0) + 1
    assert counts == {"accuracy": 14, "mean_per_class": 4, "map_11point": 1, "roc_auc": 1}


@pytest.mark.trap("0.3", "class order differs between sources")
def test_trap_class_order_differs_so_names_are_joined_by_name(tmp_path):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 7, size=40)
    task = Task(id="t", classes=7, names=NAMES, templates=("a {c}.",))
    straight = measure(write_folder(tmp_path / "straight" / "t", labels.tolist(), names=NAMES), task)
    order = rng.permutation(7)
    mixed = [int(np.flatnonzero(order == label)[0]) for label in labels]
    folder = write_folder(tmp_path / "mixed" / "t", mixed, names=[NAMES[i].upper() for i in order])
    by_name = measure(folder, task)
    assert (by_name.value, by_name.extras, by_name.task_sha256) == (
        straight.value,
        straight.extras,
        straight.task_sha256,
    )
    assert "joined by name" in by_name.differences[0]


@pytest.mark.parametrize(
    ("task_id", "places_that_differ"),
    [("cifar-100", 99), ("fgvc-aircraft-2013b-variants102", 22), ("food-101", 2)],
)
def test_trap_elevater_numbers_classes_otherwise_than_openai(task_id, places_that_differ):
    openai = sorted(ELEVATER[task_id].under(PROTOCOLS["clip_benchmark"]).names)  # these three are sorted in prompts.md
    assert sum(a != b for a, b in zip(ELEVATER[task_id].names, openai, strict=True)) == places_that_differ


def test_trap_pets_joined_by_position_score_next_to_nothing_and_the_label_check_says_so():
    # openai/CLIP issue 346: 9.9% on Pets from a list in another order
    names = ELEVATER["oxford-iiit-pets"].names
    other = sorted(names)
    by_position = np.array([other.index(name) for name in names])
    labels = np.repeat(np.arange(37), 40)
    answers = np.where(np.random.default_rng(0).random(len(labels)) < 0.88, labels, (labels + 5) % 37)
    assert np.mean(by_position[answers] == labels) < 0.2
    assert check_labels(by_position[answers], labels, names).warning
    assert not check_labels(answers, labels, names).warning


def test_trap_caltech_faces_stand_the_other_way_round_in_the_mirror(tmp_path):
    task = ELEVATER["caltech-101"]
    mirror = list(task.names)
    mirror[37], mirror[38] = mirror[38], mirror[37]
    assert (task.names[37], mirror[37]) == ("centered face", "off-center face")
    data = read_task_folder(write_folder(tmp_path / "c", [37, 38, 0], names=mirror))
    assert places(task, data)[[37, 38, 0]].tolist() == [38, 37, 0]


@pytest.mark.trap("5.2 prompts", "KITTI in the wrong order (#21)")
def test_trap_kitti_prompts_in_a_wrong_order_are_joined_by_name(tmp_path):
    # CLIP_benchmark issue 21: the four sentences stood in a wrong order
    task = ELEVATER["kitti-distance"]
    data = read_task_folder(write_folder(tmp_path / "k", [0, 1, 2, 3], names=task.names[::-1], templates=("{c}",)))
    assert join(task.model_copy(update={"sizes": {}}), data).data.labels.tolist() == [3, 2, 1, 0]


def test_trap_kitti_alone_is_squashed_and_the_other_harnesses_crop_it():
    for protocol, squashed in {"elevater": ["kitti-distance"], "clip_benchmark": [], "datacomp": []}.items():
        tasks = load_benchmark("elevater", ".", protocol).tasks
        assert [task.id for task in tasks if task.resize == "squash"] == squashed


@pytest.mark.trap("0.4", "VOC: softmax and 11 points, or cosine and full AP")
def test_trap_voc2007_is_ranked_by_the_softmax_not_by_the_cosine(tmp_path):
    # openai/CLIP issue 153 (75 instead of the paper's number) and Chinese-CLIP issue 104
    vectors = (np.random.default_rng(0).random((40, 7)) < 0.3).astype(int)
    data = read_task_folder(write_folder(tmp_path / "v", vectors, names=NAMES, kind="multilabel"))
    model = tiny_model()
    with torch.no_grad():
        images = encode_images(model, data.entries, batch_size=40, progress=False).embeds
        classes = class_matrix(model, NAMES, ("a {c}.",))
    task = Task(id="v", metric="map_11point")
    elevater, peer = (
        score(task.under(PROTOCOLS[p]), images, classes, data.labels) for p in ("elevater", "clip_benchmark")
    )
    cosines = (images @ classes.T).double().numpy()
    assert elevater.value == pytest.approx(references.map_11point(references.softmax(100 * cosines), data.labels))
    assert peer.value == pytest.approx(references.mean_average_precision(cosines, data.labels))
    assert abs(elevater.value - peer.value) > 0.01


def test_trap_the_11_point_curve_has_an_artificial_end_point():
    scores, positives = np.array([0.9, 0.8]), np.array([False, True])
    with_it = metrics.average_precision_11point(scores, positives)[0]
    without = metrics.average_precision_11point(scores, positives, end_point=False)[0]
    assert (with_it, without) == (pytest.approx((1 + 10 * 0.5) / 11), 0.5)


def test_trap_the_scale_is_100_whatever_the_model_learned(tmp_path):
    vectors = (np.random.default_rng(1).random((30, 7)) < 0.3).astype(int)
    folder = write_folder(tmp_path / "v", vectors, names=NAMES, kind="multilabel")
    model = tiny_model()
    before = measure(folder, Task(id="v", metric="map_11point")).value
    scale = model.logit_scale.data.clone()
    try:
        model.logit_scale.data.fill_(0.0)
        assert measure(folder, Task(id="v", metric="map_11point")).value == before
    finally:
        model.logit_scale.data.copy_(scale)


@pytest.mark.trap("0.5", "voc2007 of the mirrors is object crops")
def test_trap_voc2007_crops_are_not_voc_classification(tmp_path):
    (tmp_path / "wds_voc2007").mkdir()
    voc = ELEVATER["voc-2007-classification"]
    assert voc.find(tmp_path) is None
    (tmp_path / "wds_voc2007_multilabel").mkdir()
    assert voc.find(tmp_path) == tmp_path / "wds_voc2007_multilabel"
    crops = next(task for task in registered_tasks("datacomp") if task.id == "voc-2007-crops")
    assert crops.find(tmp_path) == tmp_path / "wds_voc2007"
    assert crops.sizes["test"] == {"wds": 14976}
    # and data with one label per image is refused under any name
    data = read_task_folder(write_folder(tmp_path / "crops", [0] * 3, names=voc.names))
    with pytest.raises(UserError, match="one label per image, which map_11point cannot score"):
        join(voc, data)


@pytest.mark.trap("0.6", "five mirrors have other test images")
def test_trap_five_mirrors_hold_other_test_images_and_the_result_says_which():
    differ = {t.id: t.sizes["test"] for t in ELEVATER.values() if len({*t.sizes["test"].values()}) > 1}
    assert differ == {
        "caltech-101": {"elevater": 6084, "wds": 6085},
        "eurosat_clip": {"elevater": 5000, "wds": 5400},
        "fer-2013": {"elevater": 3589, "wds": 7178},
        "resisc45_clip": {"elevater": 25200, "wds": 6300},
    }  # the fifth is VOC 2007, whose crops are a task of their own
    assert all(ELEVATER[task_id].differences for task_id in differ)
    assert ELEVATER["resisc45_clip"].which_set(6300) == "wds"


@pytest.mark.trap("0.6", "PatchCamelyon and RESISC45 have other prompts there")
def test_trap_pcam_and_resisc45_have_other_prompts_in_the_mirror():
    differ = set()
    for task in ELEVATER.values():
        if task.under(PROTOCOLS["clip_benchmark"]).templates != task.templates:
            differ.add(task.id)
    assert differ == {"patch-camelyon", "resisc45_clip"}


def test_trap_prompts_of_a_folder_are_not_overwritten_in_silence(tmp_path):
    # CLIP_benchmark 1.5.0 overwrote the folder's prompts with defaults (issue 109); DataComp had to be measured again
    task = Task(id="t", classes=3, names=("red", "green", "blue"), templates=("a {c}.",))
    data = read_task_folder(write_folder(tmp_path / "t", [0], templates=("one {c}", "two {c}")))
    assert join(task, data).differences == ("the protocol's 1 prompts are used instead of the data's 2",)
    assert join(task, data).data.templates == ("a {c}.",)
    own = Task(id="t")
    assert join(own, data).data.templates == ("one {c}", "two {c}")  # a task without prompts has the folder's


@pytest.mark.trap("0.7", "Hateful Memes has no mirror")
def test_trap_hateful_memes_has_no_mirror_and_says_how_to_get_it():
    missing = [task for task in ELEVATER.values() if task.hub is None]
    assert [task.id for task in missing] == ["hateful-memes"]
    assert "licence" in missing[0].obtain
    assert missing[0].names[1] == "hatespeech meme"  # class 1 is the positive one


@pytest.mark.trap("5.2 prompts", "ImageNet's equal names (#124)")
def test_trap_imagenet_has_two_pairs_of_equal_names_and_one_of_each_can_never_win():
    names = ELEVATER["imagenet-1k"].names
    assert len(set(names)) == 998
    twice = [i for i, name in enumerate(names) if names.count(name) > 1]
    assert [names[i] for i in twice] == ["missile", "missile", "sunglasses", "sunglasses"]
    images = torch.nn.functional.normalize(torch.eye(3), dim=-1)
    values = [score(Task(id="t"), images[:2], images[[0, 1, 1]], np.array([0, label])).value for label in (1, 2)]
    assert values == [1, 0.5]  # the lower of two equal classes is said


def test_trap_unicl_measures_imagenet_by_a_protocol_of_its_own():
    unicl, elevater = ELEVATER["imagenet-1k"].under(PROTOCOLS["unicl"]), ELEVATER["imagenet-1k"]
    changed = {i: (a, b) for i, (a, b) in enumerate(zip(elevater.names, unicl.names, strict=True)) if a != b}
    assert changed == {744: ("missile", "projectile"), 837: ("sunglasses", "dark glasses")}
    assert len(set(unicl.names)) == 1000
    assert (len(unicl.templates), set(unicl.templates) - set(elevater.templates)) == (81, {"{c}."})
    assert (unicl.resize, elevater.resize) == ("resize256_crop224", "model")


def test_trap_fer2013_uses_the_first_synonym():
    assert ELEVATER["fer-2013"].names == ("angry", "disgusted", "fearful", "happy", "neutral", "sad", "surprised")


def test_trap_empty_classes_are_dropped_before_the_argmax(tmp_path):
    labels = [0, 1, 2] * 6  # four of the seven classes have no image
    folder = write_folder(tmp_path / "t", labels, names=NAMES)
    dropped = measure(folder, Task(id="t", metric="mean_per_class"))
    kept = measure(folder, Task(id="t", metric="mean_per_class", candidates="all"))
    assert dropped.value >= kept.value
    assert dropped.chance == pytest.approx(1 / 3)
    alone = write_folder(tmp_path / "three" / "t", labels, names=NAMES[:3])
    assert measure(alone, Task(id="t", metric="mean_per_class")).value == dropped.value


@pytest.mark.trap("5.2 prompts", "a class line is missing (LOVM #3)")
def test_trap_a_missing_class_line_is_refused(tmp_path):
    # LOVM issue 3: one of the names of CLEVR distance was missing, and every later label meant another class
    data = read_task_folder(write_folder(tmp_path / "k", [0], names=ELEVATER["kitti-distance"].names[:3]))
    with pytest.raises(UserError, match="3 class names, the task has 4"):
        join(ELEVATER["kitti-distance"], data)


def test_trap_the_mean_of_datacomp_is_of_38_tasks_of_which_32_are_measured():
    datacomp = load_benchmark("datacomp", ".")
    assert (datacomp.expected, sum(task.in_score for task in datacomp.tasks)) == (38, 32)
    elevater = {task.id for task in ELEVATER.values() if task.in_score}
    inside = elevater & {task.id for task in datacomp.tasks}
    assert elevater - inside == {"fer-2013", "hateful-memes", "voc-2007-classification"}


@pytest.mark.trap("5.3", "custom data has no multi-label")
def test_trap_a_folder_of_ones_own_may_have_several_labels(tmp_path):
    # the toolkit takes custom data as folders of classes, one label per image
    vectors = [[1, 1, 0], [0, 1, 0], [1, 0, 1], [0, 0, 1]]
    write_folder(tmp_path / "mine", vectors, kind="multilabel")
    result = zero_shot(tiny_model(), tmp_path)
    assert result.tasks["mine"].metric == "map_11point"
    assert 0 < result.tasks["mine"].value <= 1


@pytest.mark.trap("5.3", "a failed run counts as a score of zero")
def test_trap_a_failed_task_is_no_score_of_zero(tmp_path):
    # the toolkit swallows exceptions and goes on with a score of 0
    write_folder(tmp_path / "good", [0, 1, 2])
    write_folder(tmp_path / "bad", [0, 1, 2])
    (tmp_path / "bad" / "test" / "0.tar").write_bytes(b"not a tar")
    result = zero_shot(tiny_model(), tmp_path)
    assert set(result.failed) == {"bad"}
    assert result.score == result.tasks["good"].value
    assert "mean of 1 of 2 tasks" in result_table(result)


def test_trap_difficult_objects_of_voc_are_stated():
    assert "difficult" in ELEVATER["voc-2007-classification"].differences[0]


def test_trap_pictures_do_not_depend_on_the_order_of_classes(tmp_path):
    """The images of a folder in another class order are the same bytes, so cached features stay good."""
    task = Task(id="t", classes=3, names=("red", "green", "blue"), templates=("a {c}.",))
    images = [picture(i) for i in range(3)]
    one = read_task_folder(write_folder(tmp_path / "one", [0, 1, 2], images=images))
    two = read_task_folder(write_folder(tmp_path / "two", [2, 1, 0], names=("blue", "green", "red"), images=images))
    assert join(task, one).data.digest("x") == join(task, two).data.digest("x")
