"""The order of samples: a permutation per epoch, pure, and never silently another one."""

from collections import Counter

import numpy as np
import pytest

from focalclip.data.order import Draw, SampleOrder, uniform_draws

COUNTS = np.array([3, 1, 4, 1, 5, 9, 2])


@pytest.mark.parametrize("window_shards", [1, 2, 3, 7, 100])
def test_every_sample_comes_once_per_epoch(window_shards):
    order = SampleOrder(COUNTS, seed=1, window_shards=window_shards)
    everything = {(shard, sample) for shard, count in enumerate(COUNTS) for sample in range(count)}
    for epoch in range(3):
        seen = [order.locate(epoch * 25 + place) for place in range(25)]
        assert len(seen) == len(set(seen))
        assert set(seen) == everything


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = [
        tuple(SampleOrder(COUNTS, seed, 3).locate(epoch * 25 + place) for place in range(25))
        for seed in (0, 1)
        for epoch in (0, 1)
    ]
    assert len(set(orders)) == 4


def test_order_does_not_depend_on_what_was_asked_before():
    order = SampleOrder(COUNTS, seed=5, window_shards=2)
    positions = np.random.default_rng(0).integers(0, 200, 300)
    assert all(order.locate(int(p)) == SampleOrder(COUNTS, 5, 2).locate(int(p)) for p in positions)


def test_a_window_reads_its_own_shards_only():
    order = SampleOrder(np.full(12, 10), seed=3, window_shards=4)
    for window in range(3):
        shards = Counter(order.locate(window * 40 + place)[0] for place in range(40))
        assert sorted(shards.values()) == [10, 10, 10, 10]
    assert len({order.locate(place)[0] for place in range(8)}) > 1, "samples of different shards are mixed"


def test_samples_are_spread_evenly_over_a_window():
    """The first place of a window of 8 samples must take each of them about equally often."""
    order = SampleOrder(np.array([4, 4]), seed=0, window_shards=2)
    firsts = Counter(order.locate(epoch * 8) for epoch in range(2000))
    assert len(firsts) == 8
    assert min(firsts.values()) > 180  # mean 250, standard deviation 15


def test_order_is_the_one_that_earlier_runs_used():
    """These literals must never change: a resumed run would silently see other samples."""
    order = SampleOrder(np.array([5, 3, 4]), seed=42, window_shards=2)
    assert [order.locate(p) for p in (0, 1, 2, 11, 12, 13, 1200, 10**9)] == PINNED_ORDER


def test_draws_are_the_ones_that_earlier_runs_used():
    np.testing.assert_array_equal(uniform_draws(42, 7, 1)[0, :4], PINNED_DRAWS)


def test_draws_belong_to_the_position_alone():
    whole = uniform_draws(9, 100, 50)
    np.testing.assert_array_equal(whole[20:30], uniform_draws(9, 120, 10))
    assert (whole != uniform_draws(10, 100, 50)).all()


def test_draws_are_uniform_and_independent():
    draws = uniform_draws(0, 0, 20000)
    assert len(Draw) <= draws.shape[1]
    assert draws.min() >= 0
    assert draws.max() < 1
    np.testing.assert_allclose(draws.mean(axis=0), 0.5, atol=0.01)  # 5 standard errors
    np.testing.assert_allclose(np.corrcoef(draws, rowvar=False), np.eye(draws.shape[1]), atol=0.04)


def test_positions_beyond_32_bits():
    order = SampleOrder(COUNTS, seed=0, window_shards=3)
    assert order.locate(10**15 + 3) == SampleOrder(COUNTS, 0, 3).locate(10**15 + 3)
    assert uniform_draws(0, 10**15, 2).shape == (2, 16)


PINNED_ORDER = [(0, 0), (2, 1), (0, 3), (1, 1), (2, 2), (2, 0), (1, 2), (2, 0)]
PINNED_DRAWS = [0.5166585028225019, 0.7037643294090133, 0.09185783963094107, 0.18302166468421865]
