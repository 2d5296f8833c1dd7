"""Each metric against scikit-learn, against naive loops and against cases worked by hand."""

import numpy as np
import pytest
import references
from sklearn import metrics as sk

from focalclip.evaluation.metrics import definitions as metrics
from focalclip.evaluation.metrics.intervals import bootstrap_interval, wilson_interval


def rng(seed=0):
    return np.random.default_rng(seed)


def value(draws):
    assert draws.shape == (1,)
    assert draws.dtype == np.float64
    return draws[0]


def test_ranks_are_exactly_argmax_and_top_k_with_ties_to_the_lower_class():
    scores = rng().integers(0, 4, size=(500, 7)).astype(np.float32)  # many ties
    labels = rng(1).integers(0, 7, size=500)
    ranks = metrics.true_class_ranks(scores, labels)
    np.testing.assert_array_equal(ranks == 0, scores.argmax(1) == labels)
    stable = np.argsort(-scores, axis=1, kind="stable")
    np.testing.assert_array_equal(ranks, np.argmax(stable == labels[:, None], axis=1))


def test_top_k_equals_scikit_learn_without_ties():
    scores, labels = rng().normal(size=(300, 9)), rng(1).integers(0, 9, size=300)
    ranks = metrics.true_class_ranks(scores, labels)
    for k in (1, 3, 5):
        assert value(metrics.accuracy(ranks < k)) == pytest.approx(
            sk.top_k_accuracy_score(labels, scores, k=k, labels=range(9)), abs=1e-12
        )


def test_mean_per_class_by_hand():
    labels = np.array([0, 0, 0, 0, 2, 2])  # class 1 does not occur
    correct = np.array([1, 1, 1, 0, 0, 0], dtype=bool)
    assert value(metrics.mean_per_class(correct, labels)) == pytest.approx((0.75 + 0.0) / 2)


def test_mean_per_class_equals_balanced_accuracy():
    labels = np.append(rng().choice(12, size=800 - 12, p=rng(2).dirichlet(np.ones(12))), range(12))
    predicted = np.where(rng(1).random(800) < 0.6, labels, rng(3).integers(0, 12, size=800))
    ours = value(metrics.mean_per_class(predicted == labels, labels))
    assert ours == pytest.approx(sk.balanced_accuracy_score(labels, predicted), abs=1e-12)


def test_occurring_classes_drops_empty_columns_before_the_argmax():
    scores = np.array([[0.1, 0.9, 0.2], [0.3, 0.9, 0.1]])  # class 1 would win, but no image has it
    labels = np.array([2, 0])
    classes, index = metrics.occurring_classes(labels)
    np.testing.assert_array_equal(classes, [0, 2])
    np.testing.assert_array_equal(metrics.true_class_ranks(scores[:, classes], index), [0, 0])


def test_roc_auc_by_hand_with_a_tie():
    # positives 0.9 and 0.5, negatives 0.5 and 0.1: wins 2 + (tie 0.5 + win 1) of 4 pairs
    scores, positives = np.array([0.9, 0.5, 0.5, 0.1]), np.array([1, 1, 0, 0], dtype=bool)
    assert value(metrics.roc_auc(scores, positives)) == pytest.approx(3.5 / 4)


@pytest.mark.parametrize("levels", [3, 10_000_000])
def test_roc_auc_equals_scikit_learn(levels):
    scores = rng().integers(0, levels, size=400) / levels
    positives = rng(1).random(400) < 0.3
    assert value(metrics.roc_auc(scores, positives)) == pytest.approx(sk.roc_auc_score(positives, scores), abs=1e-12)


def test_11_point_by_hand_with_and_without_help_of_the_end_point():
    # ranking: negative, positive, positive -> precision 0, 1/2, 2/3 at recall 0, 1/2, 1
    scores, positives = np.array([0.9, 0.8, 0.7]), np.array([0, 1, 1], dtype=bool)
    # recall 0 takes the artificial 1; 0.1 ... 1.0 take 2/3, the highest precision at that recall or above
    assert value(metrics.average_precision_11point(scores, positives)) == pytest.approx((1 + 10 * 2 / 3) / 11)


def test_11_point_recall_of_exactly_three_tenths_counts_at_three_tenths():
    # 10 positives; the first three are ranked first, then 90 negatives, then the other seven
    scores = np.linspace(1, 0, 100)
    positives = np.zeros(100, dtype=bool)
    positives[:3] = positives[-7:] = True
    expected = (4 * 1 + 7 * 10 / 100) / 11  # recalls 0, 0.1, 0.2, 0.3 at precision 1; the rest at 10/100
    assert value(metrics.average_precision_11point(scores, positives)) == pytest.approx(expected)


@pytest.mark.parametrize("levels", [5, 10_000_000])
def test_11_point_equals_scikit_learns_curve(levels):
    for seed in range(20):
        scores = rng(seed).integers(0, levels, size=300) / levels
        positives = rng(seed + 100).random(300) < 0.1 + 0.3 * scores
        for end_point in (True, False):
            ours = value(metrics.average_precision_11point(scores, positives, end_point=end_point))
            expected = references.average_precision_11point(scores, positives, end_point)
            assert ours == pytest.approx(expected, abs=1e-12)


def test_11_point_with_and_without_the_end_point_by_hand():
    # ranking: negative, positive, negative, positive -> precision 0, 1/2, 1/3, 2/4 at recall 0, 1/2, 1/2, 1
    scores, positives = np.array([0.9, 0.8, 0.7, 0.6]), np.array([0, 1, 0, 1], dtype=bool)
    assert value(metrics.average_precision_11point(scores, positives)) == pytest.approx((1 + 10 * 1 / 2) / 11)
    assert value(metrics.average_precision_11point(scores, positives, end_point=False)) == pytest.approx(1 / 2)


def naive_voc_11_point(scores, positives):
    """As VOC 2007 defines it: precision and recall after each image, best first; no point of its own at recall 0."""
    order = np.argsort(-scores, kind="stable")
    hits = np.cumsum(positives[order])
    precision = hits / np.arange(1, len(order) + 1)
    return np.mean([precision[10 * hits >= tenth * positives.sum()].max(initial=0) for tenth in range(11)])


def test_11_point_without_the_end_point_equals_the_definition_of_voc():
    for seed in range(20):
        scores, positives = rng(seed).random(200), rng(seed + 100).random(200) < 0.2
        ours = value(metrics.average_precision_11point(scores, positives, end_point=False))
        assert ours == pytest.approx(naive_voc_11_point(scores, positives), abs=1e-12)


def test_average_precision_by_hand():
    # positives at ranks 1 and 3: (1/1 + 2/3) / 2
    scores, positives = np.array([0.9, 0.8, 0.7]), np.array([1, 0, 1], dtype=bool)
    assert value(metrics.average_precision(scores, positives)) == pytest.approx((1 + 2 / 3) / 2)
    # all scores equal: one threshold, whose precision is the share of positives
    assert value(metrics.average_precision(np.ones(4), np.array([1, 0, 0, 0], dtype=bool))) == pytest.approx(1 / 4)
    assert value(metrics.average_precision(np.ones(3), np.zeros(3, dtype=bool))) == 0


@pytest.mark.parametrize("levels", [5, 10_000_000])
def test_average_precision_equals_scikit_learn(levels):
    for seed in range(10):
        scores = rng(seed).integers(0, levels, size=300) / levels
        positives = rng(seed + 100).random(300) < 0.1 + 0.3 * scores
        ours = value(metrics.average_precision(scores, positives))
        assert ours == pytest.approx(sk.average_precision_score(positives, scores), abs=1e-12)


def test_full_map_equals_scikit_learns_macro_average_also_with_an_empty_class():
    scores, positives = rng().random((200, 4)), rng(1).random((200, 4)) < 0.2
    ours = value(metrics.mean_average_precision(scores, positives))
    assert ours == pytest.approx(sk.average_precision_score(positives, scores, average="macro"), abs=1e-12)
    positives[:, 2] = False
    each = [sk.average_precision_score(positives[:, c], scores[:, c]) for c in (0, 1, 3)]
    assert value(metrics.mean_average_precision(scores, positives)) == pytest.approx(sum(each) / 4, abs=1e-12)


def test_macro_f1_by_hand():
    labels, said = np.array([0, 0, 0, 1, 1]), np.array([0, 0, 1, 1, 2])  # class 2 is said and never occurs
    # class 0: 2 x 2 / (2 said + 3 occurring); class 1: 2 x 1 / (2 said + 2 occurring)
    assert value(metrics.macro_f1(said, labels)) == pytest.approx((4 / 5 + 2 / 4) / 2)


def test_macro_f1_equals_scikit_learn_over_the_classes_that_occur():
    labels = rng().choice(12, size=600, p=rng(2).dirichlet(np.ones(12)))
    said = np.where(rng(1).random(600) < 0.5, labels, rng(3).integers(0, 15, size=600))
    expected = sk.f1_score(labels, said, average="macro", labels=np.unique(labels))
    assert value(metrics.macro_f1(said, labels)) == pytest.approx(expected, abs=1e-12)


def test_map_is_the_mean_over_classes_with_a_positive():
    scores, positives = rng().random((200, 4)), rng(1).random((200, 4)) < 0.2
    positives[:, 2] = False
    expected = np.mean([references.average_precision_11point(scores[:, c], positives[:, c]) for c in (0, 1, 3)])
    assert value(metrics.map_11point(scores, positives)) == pytest.approx(expected, abs=1e-12)


def test_random_scores_with_5_percent_positives_score_13_9_points_for_the_end_point_alone():
    # the sheet's measured trap: the artificial end point lifts chance far above the share of positives
    scores, positives = rng().random((5000, 40)), rng(1).random((5000, 40)) < 0.05
    assert value(metrics.map_11point(scores, positives)) == pytest.approx(0.139, abs=0.006)
    without = value(metrics.map_11point(scores, positives, end_point=False))
    assert without == pytest.approx(np.mean([naive_voc_11_point(scores[:, c], positives[:, c]) for c in range(40)]))
    assert value(metrics.mean_average_precision(scores, positives)) < without < 0.07
    assert value(metrics.mean_average_precision(scores, positives)) == pytest.approx(0.05, abs=0.003)


def test_softmax_over_classes_changes_the_ranking_over_images():
    cosine = np.array([[0.30, 0.29], [0.25, 0.10]])  # by cosine image 0 leads in class 0, by softmax image 1
    assert cosine[:, 0].argmax() == 0
    assert metrics.softmax(100 * cosine)[:, 0].argmax() == 1
    np.testing.assert_allclose(metrics.softmax(100 * cosine).sum(1), 1)


def test_wilson_interval_known_values():
    # Newcombe (1998), table I, method 3: 81/263 and 0/20
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    low, high = wilson_interval(20, 20)
    assert (low, high) == pytest.approx((1 - 0.1611, 1.0), abs=5e-5)


def test_weights_mean_that_an_image_counts_so_often():
    draws = rng().integers(0, 4, size=(3, 60))
    scores, positives = rng(1).random((60, 3)).round(1), rng(2).random((60, 3)) < 0.4
    correct, labels, said = rng(3).random(60) < 0.5, rng(4).integers(0, 5, size=60), rng(5).integers(0, 6, size=60)
    weights = draws.astype(float)
    for row, draw in enumerate(draws):
        repeat = np.repeat(np.arange(60), draw)
        pairs = [
            (metrics.accuracy(correct, weights), metrics.accuracy(correct[repeat])),
            (
                metrics.mean_per_class(correct, labels, weights),
                metrics.mean_per_class(correct[repeat], labels[repeat]),
            ),
            (
                metrics.roc_auc(scores[:, 0], positives[:, 0], weights),
                metrics.roc_auc(scores[repeat, 0], positives[repeat, 0]),
            ),
            (
                metrics.map_11point(scores, positives, weights),
                metrics.map_11point(scores[repeat], positives[repeat]),
            ),
            (
                metrics.map_11point(scores, positives, weights, end_point=False),
                metrics.map_11point(scores[repeat], positives[repeat], end_point=False),
            ),
            (
                metrics.mean_average_precision(scores, positives, weights),
                metrics.mean_average_precision(scores[repeat], positives[repeat]),
            ),
            (
                metrics.macro_f1(said, labels, weights),
                metrics.macro_f1(said[repeat], labels[repeat]),
            ),
        ]
        for weighted, repeated in pairs:
            assert weighted[row] == pytest.approx(value(repeated), abs=1e-12)


def test_bootstrap_of_accuracy_agrees_with_wilson_and_repeats_with_its_seed():
    correct = np.arange(1000) < 700
    interval = bootstrap_interval(lambda w: metrics.accuracy(correct, w), 1000)
    assert interval == pytest.approx(wilson_interval(700, 1000), abs=0.006)
    assert interval == bootstrap_interval(lambda w: metrics.accuracy(correct, w), 1000)
    assert interval != bootstrap_interval(lambda w: metrics.accuracy(correct, w), 1000, seed=1)


def test_bootstrap_interval_of_map_at_chance_is_centred_on_the_value():
    scores, positives = rng().random((600, 5)), rng(1).random((600, 5)) < 0.07
    low, high = bootstrap_interval(lambda w: metrics.map_11point(scores, positives, w), 600, draws=300)
    assert (low + high) / 2 == pytest.approx(value(metrics.map_11point(scores, positives)), abs=(high - low) / 6)


def test_11_point_without_a_positive_is_not_a_number():
    assert np.isnan(metrics.average_precision_11point(np.ones(3), np.zeros(3, dtype=bool)))
