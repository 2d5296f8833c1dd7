"""The label-sanity probe: permuted names are found, and weak models with right names are left in peace."""

import itertools
import math

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier

from focalclip.evaluation.metrics.label_check import (
    MAX_CLASSES,
    UNLIKELY_FEW,
    _best_order,
    _chance_of_distinct,
    _recalls,
    check_labels,
)


def names(count):
    return tuple(f"class {i}" for i in range(count))


def answers_of(labels, num_classes, right, seed=0):
    """Right for a share of the images, another class at random for the others."""
    rng = np.random.default_rng(seed)
    return np.where(rng.random(len(labels)) < right, labels, rng.integers(num_classes, size=len(labels)))


@pytest.fixture(scope="module")
def digits():
    """Real pictures and real answers: scikit-learn's 1,797 digits, a nearest-neighbour model of 300 of them."""
    data = load_digits()
    model = KNeighborsClassifier(3).fit(data.data[:300], data.target[:300])
    return model.predict(data.data[300:]), data.target[300:]


def test_right_names_are_left_in_peace(digits):
    answers, labels = digits
    found = check_labels(answers, labels, names(10))
    assert (found.moved, found.warning) == ((), "")
    recalls = [np.mean(answers[labels == c] == c) for c in range(10)]
    assert found.as_named == pytest.approx(np.mean(recalls), abs=0.02)


def test_too_many_classes_are_not_judged():
    labels = np.arange(MAX_CLASSES + 1).repeat(8)
    found = check_labels(labels[::-1], labels, names(MAX_CLASSES + 1))  # 200 MB a table if it were
    assert (found.moved, found.warning) == ((), "")
    assert math.isnan(found.as_named)


def test_two_names_that_changed_places_are_named(digits):
    answers, labels = digits
    swapped = np.arange(10)
    swapped[[3, 8]] = 8, 3
    found = check_labels(answers, swapped[labels], names(10))
    assert found.moved == ((3, 8),)
    assert (
        "2 class names may have changed places ('class 3' looks like 'class 8', 'class 8' looks like" in found.warning
    )
    assert found.relabelled > found.as_named + 0.1


@pytest.mark.parametrize("seed", range(5))
def test_an_order_that_is_wrong_throughout_is_found(digits, seed):
    answers, labels = digits
    order = np.random.default_rng(seed).permutation(10)
    found = check_labels(answers, order[labels], names(10))
    moved = {place for cycle in found.moved for place in cycle}
    assert moved == {int(order[c]) for c in range(10) if order[c] != c}
    assert found.relabelled == pytest.approx(check_labels(answers, labels, names(10)).as_named, abs=0.02)


def test_four_classes_in_a_wrong_order_are_found_as_with_kitti():
    labels = np.repeat(np.arange(4), [210, 200, 150, 151])
    answers = answers_of(labels, 4, right=0.85)
    assert not check_labels(answers, labels, names(4)).warning
    assert check_labels(answers, (labels + 1) % 4, names(4)).moved == ((0, 3, 2, 1),)


def test_two_faces_among_102_classes_are_found_as_with_caltech():
    labels = np.repeat(np.arange(102), 60)
    answers = answers_of(labels, 102, right=0.87)
    swapped = np.arange(102)
    swapped[[37, 38]] = 38, 37
    assert not check_labels(answers, labels, names(102)).warning
    assert check_labels(answers, swapped[labels], names(102)).moved == ((37, 38),)


def test_multi_label_data_is_judged_by_its_images_with_one_label(digits):
    answers, labels = digits
    onehot = np.eye(10, dtype=bool)[(labels + 1) % 10]
    onehot[:400] = True
    found = check_labels(answers, onehot, names(10))
    assert len(found.moved) == 1
    assert len(found.moved[0]) == 10


def test_a_model_that_says_one_name_gains_nothing_however_uneven_the_classes():
    labels = np.repeat(np.arange(5), [400, 20, 20, 20, 40])
    found = check_labels(np.full(500, 4), labels, names(5))
    assert found.as_named == found.relabelled == pytest.approx(0.2)
    assert not found.warning


@pytest.mark.parametrize(("num_classes", "right"), [(2, 0.0), (4, 0.0), (10, 0.0), (10, 0.1), (47, 0.05), (100, 0.2)])
def test_weak_models_raise_no_alarm(num_classes, right):
    for seed in range(20):
        labels = np.random.default_rng(seed).integers(num_classes, size=30 * num_classes)
        answers = answers_of(labels, num_classes, right, seed=100 + seed)
        assert not check_labels(answers, labels, names(num_classes)).warning


@pytest.mark.parametrize("num_classes", [2, 3, 4])
def test_sharp_features_under_every_meaningless_naming_of_few_classes(num_classes):
    """Each class gets one name at random: what an untrained text tower does to separable image features."""
    labels = np.repeat(np.arange(num_classes), 30)
    namings = [np.array(naming) for naming in itertools.product(range(num_classes), repeat=num_classes)]
    alarms = sum(bool(check_labels(n[labels], labels, names(num_classes)).warning) for n in namings)
    assert alarms == {2: 0, 3: 0, 4: 23}[num_classes]  # 4! - 1 of 4^4; fewer classes can never be told from chance
    assert alarms < UNLIKELY_FEW * len(namings)


@pytest.mark.parametrize("num_classes", [10, 100])
def test_sharp_features_under_meaningless_names_of_many_classes(num_classes):
    labels = np.repeat(np.arange(num_classes), 20)
    gains = []
    for naming in np.random.default_rng(0).integers(num_classes, size=(100, num_classes)):
        found = check_labels(naming[labels], labels, names(num_classes))
        assert not found.warning
        gains.append(found.relabelled - found.as_named)
    assert np.mean(gains) > 0.5  # a comparison of the two scores alone would have raised 100 alarms


def test_random_towers_on_separable_features_raise_no_alarm():
    rng = np.random.default_rng(0)
    for _ in range(20):
        centres, texts = rng.normal(size=(10, 32)), rng.normal(size=(10, 32))
        labels = np.repeat(np.arange(10), 40)
        images = centres[labels] + 0.3 * rng.normal(size=(400, 32))
        assert not check_labels((images @ texts.T).argmax(axis=1), labels, names(10)).warning


def test_classes_without_images_and_tiny_data_are_harmless():
    assert not check_labels(np.array([1]), np.array([0]), names(3)).warning
    assert not check_labels(np.array([0, 1, 1]), np.array([1, 0, 0]), names(40)).warning
    assert check_labels(np.array([], dtype=int), np.zeros((0, 3), dtype=bool), names(3)).as_named == 0.0


def test_the_best_order_is_the_best_of_all_orders():
    for seed in range(5):
        recalls = _recalls(np.random.default_rng(seed).integers(0, 9, size=(5, 5)))
        best = max(itertools.permutations(range(5)), key=lambda order: sum(recalls[range(5), list(order)]))
        assert tuple(_best_order(recalls)) == best
    assert _best_order(np.full((4, 4), 0.25)).tolist() == [0, 1, 2, 3]  # of equal orders, the one that is


def test_probability_of_different_names_by_hand_and_by_drawing():
    assert _chance_of_distinct(4, 4, 4) == pytest.approx(math.factorial(4) / 4**4)
    assert _chance_of_distinct(2, 3, 2) == pytest.approx(1 - 2 / 8)
    rng = np.random.default_rng(0)
    drawn = np.array([len(set(rng.integers(12, size=9).tolist())) for _ in range(20_000)])
    assert _chance_of_distinct(8, 9, 12) == pytest.approx((drawn >= 8).mean(), abs=0.01)
