"""The probes' solvers against scikit-learn's, and the draws that they are trained on."""

import math
import random

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.neighbors import KNeighborsClassifier

from focalclip.evaluation.probes.solvers import (
    Head,
    PrincipalAxes,
    choose_strength,
    knn,
    language_head,
    logistic,
    ridge,
)
from focalclip.evaluation.probes.train import choose_shots, hold_out


def features_and_labels(n=80, dim=12, classes=4, seed=0):
    """Unit vectors in overlapping clusters around an off-centre direction, as those of a real model are."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % classes
    centres = torch.randn(classes, dim, generator=generator)
    features = 1 + 0.7 * centres[labels] + torch.randn(n, dim, generator=generator)
    return torch.nn.functional.normalize(features, dim=1), labels


def signs(labels, classes=4):
    return 2.0 * (labels.numpy()[:, None] == np.arange(classes)) - 1


@pytest.mark.parametrize("dim", [12, 150])  # more images than features, and fewer
@pytest.mark.parametrize("strength", [1e-3, 1.0, 100.0])
def test_ridge_equals_scikit_learns(dim, strength):
    features, labels = features_and_labels(dim=dim)
    head = ridge(features, labels, 4)(strength)
    theirs = Ridge(alpha=strength).fit(features.double().numpy(), signs(labels))
    np.testing.assert_allclose(head.weight.numpy(), theirs.coef_, atol=1e-6)
    np.testing.assert_allclose(head.bias.numpy(), theirs.intercept_, atol=1e-6)


@pytest.mark.parametrize("dim", [12, 150])
@pytest.mark.parametrize("strength", [1e-2, 1.0, 100.0])
def test_logistic_regression_equals_scikit_learns(dim, strength):
    features, labels = features_and_labels(dim=dim)
    x = features.double().numpy()
    theirs = LogisticRegression(C=1 / strength, tol=1e-10, max_iter=10_000).fit(x, labels.numpy())
    head = logistic(features, labels, 4, tolerance=1e-7)(strength)
    np.testing.assert_allclose(head.weight.numpy(), theirs.coef_, atol=1e-4)
    np.testing.assert_allclose(head(features).softmax(dim=1).numpy(), theirs.predict_proba(x), atol=1e-6)
    as_probed = logistic(features, labels, 4)(strength)
    np.testing.assert_allclose(as_probed(features).softmax(dim=1).numpy(), theirs.predict_proba(x), atol=1e-3)


@pytest.mark.parametrize("strength", [1e-2, 1.0])
def test_binary_regressions_of_several_labels_equal_scikit_learns(strength):
    features, _ = features_and_labels()
    labels = torch.rand(80, 3, generator=torch.Generator().manual_seed(1)) < 0.3
    head = logistic(features, labels, 3, tolerance=1e-7)(strength)
    x = features.double().numpy()
    for c in range(3):
        theirs = LogisticRegression(C=1 / strength, tol=1e-10, max_iter=10_000).fit(x, labels[:, c].numpy())
        np.testing.assert_allclose(head(features)[:, c].sigmoid(), theirs.predict_proba(x)[:, 1], atol=1e-4)


@pytest.mark.trap("5.3", "the final run differs from the sweep (#3)")
def test_trap_the_final_fit_is_that_of_the_choice():
    """A convex problem solved to its optimum: what was tried before leaves no trace."""
    features, labels = features_and_labels()
    fit = logistic(features, labels, 4, tolerance=1e-6)
    first = fit(0.1)
    for strength in (1e-3, 1e3):
        fit(strength)
    torch.testing.assert_close(fit(0.1)(features).softmax(dim=1), first(features).softmax(dim=1), atol=1e-4, rtol=0)


@pytest.mark.trap("5.2 probe", "a grid of strengths that diverges")
def test_trap_no_strength_of_the_grid_diverges():
    """Strong regularisation shrinks the head; a step size that it makes unstable does not exist."""
    features, labels = features_and_labels()
    norms = []
    for strength in 10.0 ** np.arange(-4, 5):
        head = logistic(features, labels, 4)(float(strength))
        loss = torch.nn.functional.cross_entropy(head(features), labels)
        assert loss <= math.log(4) + 1e-6  # never worse than saying nothing
        norms.append(float(head.weight.norm()))
    assert norms == sorted(norms, reverse=True)


def test_knn_equals_scikit_learns():
    features, labels = features_and_labels()
    queries, _ = features_and_labels(seed=1)
    votes = knn(features, labels, 4, neighbours=7, temperature=0.07)(queries)
    theirs = KNeighborsClassifier(7, metric="cosine", algorithm="brute", weights=lambda d: np.exp((1 - d) / 0.07))
    theirs.fit(features.double().numpy(), labels.numpy())
    np.testing.assert_allclose(votes.numpy(), theirs.predict_proba(queries.double().numpy()), atol=1e-4)


def test_knn_of_several_labels_and_of_fewer_images_than_neighbours():
    features, labels = features_and_labels(n=6)
    several = torch.nn.functional.one_hot(labels, 4).bool()
    several[1, 3] = True  # one image with two labels votes for both
    votes = knn(features, several, 4, temperature=0.07)(features)
    expected = torch.zeros(6, 4).double()
    for i, query in enumerate(features.double()):
        weights = [math.exp(float(query @ other) / 0.07) for other in features.double()]
        for weight, row in zip(weights, several, strict=True):
            expected[i] += weight / sum(weights) * row
    torch.testing.assert_close(votes, expected, atol=1e-4, rtol=0)


def test_principal_axes_keep_all_that_the_features_span():
    for dim in (12, 150):
        features, _ = features_and_labels(dim=dim)
        space = PrincipalAxes.of(features)
        assert len(space.variances) == min(dim, 79)  # centring costs one dimension
        back = space.coordinates @ space.axes.T + space.mean
        torch.testing.assert_close(back, features.double(), atol=1e-9, rtol=0)


def test_trap_language_initialisation_matters_although_the_problem_is_convex():
    features, labels = features_and_labels()
    text = torch.nn.functional.normalize(torch.stack([features[labels == c].mean(dim=0) for c in range(4)]), dim=1)
    prior = language_head(features, labels, text)
    fit = logistic(features, labels, 4, prior, tolerance=1e-5)
    torch.testing.assert_close(fit(1e8).weight, prior.weight, atol=1e-4, rtol=0)  # strong: the zero-shot classifier
    plain = logistic(features, labels, 4)
    weak = [f(1e-6)(features).softmax(dim=1) for f in (fit, plain)]
    torch.testing.assert_close(weak[0], weak[1], atol=1e-2, rtol=0)  # weak: it is forgotten
    assert (fit(1.0).weight - plain(1.0).weight).abs().max() > 0.5


def test_language_scale_is_the_best_fit_and_no_more_than_clips_bound():
    features, labels = features_and_labels(n=200)
    text = torch.nn.functional.normalize(torch.stack([features[labels == c].mean(dim=0) for c in range(4)]), dim=1)
    scale = float(language_head(features, labels, text).weight.norm(dim=1).mean())
    cosines = features.double() @ text.double().T

    def loss(s):
        return float(torch.nn.functional.cross_entropy(s * cosines, labels))

    assert loss(scale) < min(loss(0.99 * scale), loss(1.01 * scale))
    wrong = language_head(features, labels, text.roll(1, dims=0))
    assert float(wrong.weight.abs().max()) == 0.0  # names in the wrong order: the probe is the plain one
    alike = torch.nn.functional.normalize(1 + 0.05 * torch.eye(4), dim=1)
    assert float(language_head(alike, torch.arange(4), alike).weight[0].norm()) == pytest.approx(100.0)


def test_a_class_without_images_is_never_predicted():
    features, labels = features_and_labels()
    some = labels != 2
    head = logistic(features[some], labels[some], 4)(1.0)
    scores = head(features)
    assert bool((scores[:, 2] == -torch.inf).all())
    present = logistic(features[some], torch.tensor([0, 1, 9, 2])[labels[some]], 3)(1.0)
    torch.testing.assert_close(scores[:, [0, 1, 3]], present(features))


def test_head_is_a_linear_map():
    head = Head(torch.tensor([[1.0, 2.0]]).double(), torch.tensor([3.0]).double())
    assert head(torch.tensor([[10.0, 100.0]])).tolist() == [[213.0]]


@pytest.mark.parametrize("best", [1e-4, 2e-3, 1.0, 42.0, 1e4])
def test_strength_search_ends_at_the_best(best):
    tried = []

    def quality(strength):
        tried.append(strength)
        return -abs(np.log(strength / 0.5 / best))

    assert choose_strength(quality, unit=0.5) == pytest.approx(0.5 * best, rel=0.16)  # an eighth of a decade apart
    assert len(tried) == len(set(tried)) <= 13


def test_of_equally_good_strengths_the_middle_is_taken():
    assert choose_strength(lambda _: 0.5, unit=1.0) == 1.0  # of 1e-4 to 1e4


def test_shots_are_k_per_class_and_differ_by_seed():
    labels = np.arange(200) % 10
    draws = [choose_shots(labels, 5, seed) for seed in (0, 1, 2, 0)]
    for draw in draws:
        assert np.bincount(labels[draw]).tolist() == [5] * 10
        assert (np.diff(draw) > 0).all()
    assert draws[0].tolist() == draws[3].tolist()
    assert len({tuple(draw) for draw in draws}) == 3


@pytest.mark.trap("5.2 probe", "a class with fewer than k images ends it in silence")
def test_trap_class_with_fewer_than_k_images():
    labels = np.array([0] * 30 + [1] * 3 + [2] * 30)
    assert np.bincount(labels[choose_shots(labels, 5, 0)]).tolist() == [5, 3, 5]  # it gives what it has


def in_walk_order(rows, classes=4, seed=0):
    """Labels of several classes in an order that the seed's shuffle turns into this one, and where each row is."""
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    labels = np.zeros((len(rows), classes), dtype=bool)
    for place, columns in zip(order, rows, strict=True):
        labels[place, columns] = True
    return labels, order


@pytest.mark.parametrize(
    ("before", "own", "is_kept"),
    [
        ([], [0], True),
        ([[0]] * 3, [0], True),
        ([[0]] * 4, [0], False),  # full
        ([[0]] * 4, [0, 1], True),  # the rarest has at most half
        ([[0]] * 4 + [[1]] * 3, [0, 1], True),  # the commonest has at most one and a half times as many
        ([[0, 2]] * 4 + [[0, 3]] * 3 + [[1]] * 3, [0, 1], False),  # the commonest has 7, the rarest 3
        ([[]] * 3, [], True),
        ([[]] * 4, [], False),
    ],
)
def test_shots_of_several_labels_follow_the_toolkits_tolerance(before, own, is_kept):
    labels, order = in_walk_order([*before, own])
    assert (order[-1] in choose_shots(labels, 4, seed=0)) == is_kept


@pytest.mark.trap("5.3", "validation is the first images of each class")
def test_trap_validation_is_random_not_the_first_images():
    labels = np.arange(100) % 4
    splits = [hold_out(labels, seed) for seed in (0, 1)]
    for split in splits:
        assert np.bincount(labels[split.held_out]).tolist() == [5] * 4  # a fifth of 25
        assert sorted([*split.fit, *split.held_out]) == list(range(100))
        assert split.held_out.tolist() != list(range(20))  # the toolkit's: the first of each class
    assert splits[0].held_out.tolist() != splits[1].held_out.tolist()


def test_a_fifth_is_rounded_up_and_the_last_image_of_a_class_is_never_held_out():
    labels = np.array([0] * 1 + [1] * 2 + [2] * 5 + [3] * 6)
    assert np.bincount(labels[hold_out(labels, 0).held_out], minlength=4).tolist() == [0, 1, 1, 2]


def test_several_labels_are_held_out_of_every_class_that_can_spare_some():
    labels = np.random.default_rng(0).random((120, 6)) < [0.5, 0.3, 0.2, 0.1, 0.05, 0.0]
    labels[0] = [False] * 4 + [True, False]
    split = hold_out(labels, 0)
    total, held = labels.sum(axis=0), labels[split.held_out].sum(axis=0)
    for c in range(5):
        assert -(-total[c] // 5) <= held[c] < total[c]
    assert (~labels[split.held_out].any(axis=1)).any()  # images without a label too
