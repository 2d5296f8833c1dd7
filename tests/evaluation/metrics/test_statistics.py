"""Intervals, paired tests, calibration and efficiency against hand-worked cases, scipy and simulation."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from focalclip.evaluation.compare import PAIRED_DRAWS, bootstrap_p, holm, mcnemar_exact, paired_draws
from focalclip.evaluation.metrics import definitions as metrics
from focalclip.evaluation.metrics.calibration import fit_scale, learned_scale, reliability
from focalclip.evaluation.metrics.intervals import Z95, mean_interval, percentile_interval, wilson_interval

# value in percent and test images, at the level of CLIP ViT-B/32 (sheet of public runs: open_clip's table)
CLIP_B32 = [
    (87.58, 6084), (89.83, 10000), (64.23, 10000), (17.20, 21100), (44.36, 1880), (50.44, 5000), (41.2, 3589),
    (19.53, 3333), (84.00, 25250), (32.58, 12630), (57.6, 500), (27.43, 711), (48.39, 10000), (66.70, 6149),
    (87.00, 3669), (62.24, 32768), (58.65, 1821), (53.62, 25200), (59.63, 8041), (83.1, 4952),
]  # fmt: skip


@pytest.mark.trap("0.10", "no interval on any number or on the mean")
def test_trap_sampling_noise_of_the_mean_of_20_is_a_third_of_a_point_and_of_kitti_over_three():
    values = [percent / 100 for percent, _ in CLIP_B32]
    intervals = [wilson_interval(round(v * n), n) for v, (_, n) in zip(values, CLIP_B32, strict=True)]
    low, high = mean_interval(values, intervals)
    assert (high - low) / 2 == pytest.approx(0.0037, abs=0.0002)
    halves = {n: (high - low) / 2 for (low, high), (_, n) in zip(intervals, CLIP_B32, strict=True)}
    assert halves[500] == pytest.approx(0.043, abs=0.001)
    assert halves[711] == pytest.approx(0.033, abs=0.001)
    variances = {n: half**2 for n, half in halves.items()}
    assert (variances[500] + variances[711]) / sum(variances.values()) == pytest.approx(0.53, abs=0.03)


def test_mean_interval_covers_the_truth_19_times_of_20():
    rng = np.random.default_rng(0)
    truth, sizes = rng.uniform(0.05, 0.98, 6), [80, 150, 300, 500, 700, 1000]
    hits = 0
    for _ in range(2000):
        right = rng.binomial(sizes, truth)
        intervals = [wilson_interval(int(k), n) for k, n in zip(right, sizes, strict=True)]
        low, high = mean_interval((right / sizes).tolist(), intervals)
        hits += low <= truth.mean() <= high
    assert hits / 2000 == pytest.approx(0.95, abs=0.015)


def test_mean_interval_stays_in_its_range_and_is_lopsided_where_its_parts_are():
    perfect = wilson_interval(20, 20)
    low, high = mean_interval([1.0, 1.0], [perfect, perfect])
    assert high == 1.0
    assert low == pytest.approx(1 - (1 - perfect[0]) / math.sqrt(2))


@pytest.mark.parametrize(("only_a", "only_b"), [(0, 0), (1, 0), (3, 8), (8, 3), (40, 41), (900, 1020), (12000, 12345)])
def test_mcnemar_is_the_exact_binomial_test(only_a, only_b):
    n = only_a + only_b
    expected = stats.binomtest(only_b, n, 0.5).pvalue if n else 1.0
    assert mcnemar_exact(only_a, only_b) == pytest.approx(expected, rel=1e-7)


def test_mcnemar_by_hand():
    # 1 of 8: 2 x (1 + 8) / 2^8
    assert mcnemar_exact(1, 7) == pytest.approx(18 / 256)


def test_holm_by_hand_and_in_the_order_given():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def paired_answers(n=600, seed=1):
    """Two models that agree on most images."""
    rng = np.random.default_rng(seed)
    a = rng.random(n) < 0.6
    b = np.where(rng.random(n) < 0.12, rng.random(n) < 0.8, a)
    return a, b


def test_paired_bootstrap_has_the_analytical_spread():
    a, b = paired_answers()
    draws = paired_draws(lambda w: metrics.accuracy(a, w), lambda w: metrics.accuracy(b, w), len(a), "t")
    each = b.astype(float) - a
    assert draws.mean() == pytest.approx(each.mean(), abs=1e-12)
    assert draws.std() == pytest.approx(each.std() / math.sqrt(len(a)), rel=0.06)
    low, high = percentile_interval(draws)
    assert (high - low) / 2 == pytest.approx(Z95 * each.std() / math.sqrt(len(a)), rel=0.1)


def test_bootstrap_p_follows_the_normal_one_and_is_never_zero():
    a, b = paired_answers(seed=3)
    each = b.astype(float) - a
    draws = paired_draws(lambda w: metrics.accuracy(a, w), lambda w: metrics.accuracy(b, w), len(a), "t")
    expected = 2 * stats.norm.sf(abs(each.mean()) / (each.std() / math.sqrt(len(a))))
    assert 0.001 < expected < 0.9  # else this would test nothing
    assert bootstrap_p(draws) == pytest.approx(expected, rel=0.35)
    assert bootstrap_p(np.full(PAIRED_DRAWS, 0.3)) == pytest.approx(2 / (PAIRED_DRAWS + 1))
    assert bootstrap_p(np.zeros(PAIRED_DRAWS)) == 1.0


def test_trap_unpaired_intervals_hide_a_difference_that_the_paired_test_sees():
    a, b = np.zeros(1000, dtype=bool), np.zeros(1000, dtype=bool)
    a[:500], b[:520] = True, True  # B is right wherever A is, and on 20 more
    overlap = wilson_interval(500, 1000)[1] - wilson_interval(520, 1000)[0]
    assert overlap > 0.03  # the two intervals say nothing
    assert mcnemar_exact(0, 20) < 1e-5
    draws = paired_draws(lambda w: metrics.accuracy(a, w), lambda w: metrics.accuracy(b, w), 1000, "t")
    assert percentile_interval(draws)[0] > 0.01


def test_tasks_of_equal_size_are_resampled_independently():
    a, b = paired_answers()
    statistic = [lambda w: metrics.accuracy(a, w), lambda w: metrics.accuracy(b, w)]
    first, second, again = (paired_draws(*statistic, len(a), name) for name in ("dtd", "gtsrb", "dtd"))
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.08
    np.testing.assert_array_equal(first, again)


def test_ece_by_hand_with_guos_bins():
    confidence = np.array([0.05, 0.55, 0.6, 0.95, 0.95, 1.0])
    correct = np.array([False, True, False, True, True, False])
    # 5 bins ((m-1)/5, m/5]: {.05}, {.55, .6}, {.95, .95, 1.0}
    expected = (1 * abs(0 - 0.05) + 2 * abs(0.5 - 0.575) + 3 * abs(2 / 3 - 2.9 / 3)) / 6
    bins = reliability(confidence, correct, bins=5)
    assert bins.ece == pytest.approx(expected)
    assert bins.count.tolist() == [1, 2, 3]
    mass = reliability(confidence, correct, bins=3, equal_mass=True)
    assert mass.count.tolist() == [2, 2, 2]
    assert mass.ece == pytest.approx((2 * abs(0.5 - 0.3) + 2 * abs(0.5 - 0.775) + 2 * abs(0.5 - 0.975)) / 6)


def test_ece_equals_the_naive_loop_and_true_probabilities_are_calibrated():
    rng = np.random.default_rng(0)
    confidence = rng.beta(4, 2, 40000)
    correct = rng.random(40000) < confidence
    naive = 0.0
    for m in range(15):
        inside = [i for i in range(40000) if m / 15 < confidence[i] <= (m + 1) / 15]
        if inside:
            naive += len(inside) / 40000 * abs(correct[inside].mean() - confidence[inside].mean())
    assert reliability(confidence, correct).ece == pytest.approx(naive, abs=1e-12)
    assert naive < 0.01
    assert reliability(confidence**0.3, correct).ece > 0.1  # too sure


def test_fitted_scale_finds_the_one_that_made_the_labels():
    generator = torch.Generator().manual_seed(0)
    cosines = torch.rand(4000, 6, generator=generator) - 0.5
    labels = torch.multinomial(torch.softmax(12.0 * cosines, dim=1), 1, generator=generator)[:, 0].numpy()
    scale = fit_scale(cosines, labels)
    assert scale == pytest.approx(12.0, rel=0.06)
    true = torch.from_numpy(labels)
    losses = {s: torch.nn.functional.cross_entropy(s * cosines, true) for s in (scale * 0.98, scale, scale * 1.02)}
    assert min(losses, key=lambda s: losses[s]) == scale


def test_trap_the_scale_of_100_is_not_the_models_own():
    import open_clip

    model = open_clip.CLIP(
        8,
        {"image_size": 16, "patch_size": 8, "width": 16, "layers": 1, "head_width": 8},
        {"context_length": 8, "vocab_size": 50, "width": 8, "heads": 1, "layers": 1},
    )
    assert learned_scale(model) == pytest.approx(1 / 0.07, rel=1e-5)
    assert learned_scale(torch.nn.Linear(2, 2)) is None
