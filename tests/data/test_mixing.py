"""Several weighted sources: exact proportions, one order per source, and nothing lost at a resume."""

import itertools
import math
import random
from collections import Counter, defaultdict
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_shards import ByteTokenizer, picture, write_shards, write_tar

from focalclip.base.errors import UserError
from focalclip.config import AugmentConfig, DataConfig, SourceConfig
from focalclip.data.loader import Dealing, TrainLoader
from focalclip.data.mixing import (
    LARGEST_PERIOD,
    MixedOrder,
    Segment,
    SourceShare,
    continued,
    deal,
    identities,
    read_segments,
    shares_of,
)
from focalclip.data.order import SampleOrder
from focalclip.data.prepared import training_shards
from focalclip.data.samples import label_of_names

IDS = ["a", "b", "c"]


def share(identity: str, number: int, place: int = 0, **rules) -> SourceShare:
    return SourceShare(identity, identity, number, place, rules)


def deviations(shares: tuple[int, ...]) -> np.ndarray:
    """Samples of each source among the first n of a period, less its part of n, in 1/period: (period + 1, k)."""
    sources, _ = deal(shares)
    counts = np.vstack([np.zeros(len(shares), int), np.cumsum(sources[:, None] == np.arange(len(shares)), axis=0)])
    return counts * len(sources) - np.arange(len(sources) + 1)[:, None] * np.array(shares)


# Proportions


def test_every_beginning_and_every_window_keeps_the_proven_bound():
    """Beginnings: 1 - 1/(2k-2), by Tijdeman. A window is a difference of two, and periods join without a rest."""
    draw = random.Random(0)
    for k in (1, 2, 3, 4, 7):
        for _ in range(120 // k):
            shares = tuple(draw.randint(1, 40) for _ in range(k))
            found, period = deviations(shares), sum(shares)
            bound = Fraction(1) - Fraction(1, 2 * k - 2) if k > 1 else Fraction(0)
            assert abs(found).max() <= bound * period
            assert (found.max(axis=0) - found.min(axis=0)).max() <= 2 * bound * period
            assert not found[-1].any()


@pytest.mark.parametrize(
    ("shares", "largest"),
    [((1, 1), 1), ((3, 4), 1), ((5, 3, 2), 1), ((11, 11, 12), 1), ((4, 3, 2, 1), 1), ((7, 5, 4), 1.5)],
)
def test_windows_by_brute_force_over_borders_of_periods(shares, largest):
    sources = np.tile(deal(shares)[0], 3)
    counts = np.vstack([np.zeros(len(shares)), np.cumsum(sources[:, None] == np.arange(len(shares)), axis=0)])
    parts = np.array(shares) / sum(shares)
    worst = max(
        abs(counts[stop] - counts[start] - parts * (stop - start)).max()
        for start, stop in itertools.combinations(range(len(counts)), 2)
    )
    assert worst <= largest + 1e-9


def can_be_within_one(shares: tuple[int, ...]) -> bool:
    """Whether any order at all has all windows within one sample, by following every way of dealing them out."""
    period = sum(shares)
    alive = {((0, 0, 0),) * len(shares)}  # of each source: deviation now, least, largest, in 1/period
    for _ in range(3 * period):
        after = set()
        for state, chosen in itertools.product(alive, range(len(shares))):
            now = [d + (period if i == chosen else 0) - shares[i] for i, (d, _, _) in enumerate(state)]
            new = tuple((d, min(d, low), max(d, high)) for d, (_, low, high) in zip(now, state, strict=True))
            if all(high - low <= period for _, low, high in new):
                after.add(new)
        alive = after
    return bool(alive)


def test_every_window_is_within_one_sample_where_any_order_is():
    """No order is better for 7 : 5 : 4: so the bound of more than one is not for want of trying."""
    assert not can_be_within_one((7, 5, 4))
    for period in range(3, 15):
        for shares in itertools.combinations_with_replacement(range(1, period), 3):
            if sum(shares) == period and math.gcd(*shares) == 1:
                found = deviations(shares)
                is_within = (found.max(axis=0) - found.min(axis=0)).max() <= period
                assert is_within == can_be_within_one(shares), shares


@pytest.mark.parametrize(
    ("weights", "shares"),
    [
        ([0.5, 0.3, 0.2], (5, 3, 2)),
        ([1, 1, 1], (1, 1, 1)),
        ([2, 0, 1], (2, 0, 1)),
        ([0.1, 0.2], (1, 2)),
        ([0.7], (1,)),
        ([1e-4, 0.9999], (1, 9999)),
    ],
)
def test_weights_as_written_are_exact(weights, shares):
    assert shares_of(weights) == shares


def test_weights_without_a_short_period_are_rounded_and_none_is_lost():
    weights = [12_423_374, 3_318_333, 1_000]
    shares = shares_of(weights)
    assert sum(shares) <= LARGEST_PERIOD
    parts = np.array(weights) / sum(weights)
    assert abs(np.array(shares) / sum(shares) - parts).max() < 1 / LARGEST_PERIOD
    with pytest.raises(UserError, match=r"weight 1 is less than 1/65,536 of the sum"):
        shares_of([1, 10**9 + 7])


# Places


def test_each_source_comes_in_its_own_order_without_a_gap():
    segment = Segment(0, (share("a", 5), share("b", 3, 40), share("c", 2)))
    places = defaultdict(list)
    for position in range(1_000):
        number, place = segment.at(position)
        places[number].append(place)
    assert places == {0: [*range(500)], 1: [*range(40, 340)], 2: [*range(200)]}
    for position in (0, 1, 17, 999, 10**9):
        before = segment.drawn(position)
        number, place = segment.at(position)
        assert before[IDS[number]] == place
    assert segment.at(10**9) == (segment.at(0)[0], segment.at(0)[1] + 10**8 * segment.shares[segment.at(0)[0]])


def orders(counts: dict[str, list[int]], seed: int = 3) -> dict[str, SampleOrder]:
    return {name: SampleOrder(np.array(own), seed, 2, name) for name, own in counts.items()}


def test_a_source_keeps_its_order_beside_any_others():
    two = orders({"a": [5, 6], "b": [5, 6]})
    assert [two["a"].locate(p) for p in range(22)] != [two["b"].locate(p) for p in range(22)]
    mixed = MixedOrder(
        [np.array([3, 4]), np.array([0, 1])],
        [two["a"], two["b"]],
        ["a", "b"],
        [Segment(0, (share("a", 1), share("b", 2)))],
    )
    found = [mixed.locate(p) for p in range(60)]
    of_b = [place for place in found if place[0] < 2]
    assert of_b == [two["b"].locate(p) for p in range(40)]
    assert [(shard - 3, sample) for shard, sample in found if shard > 2] == [two["a"].locate(p) for p in range(20)]


def test_order_is_the_one_that_earlier_runs_used():
    """These literals must never change: a resumed run would silently see other samples."""
    periods = ["".join("abc"[i] for i in deal(shares)[0]) for shares in ((5, 3, 2), (12, 5, 3))]
    assert periods == ["abacabacba", "abaacabaabacaabacaba"]  # by the search, and by Tijdeman's algorithm
    own = orders({"a": [5, 3], "b": [4, 4, 2], "c": [6]}, seed=42)
    numbers = [np.arange(2), np.arange(2, 5), np.array([5])]
    parts = (share("a", 5), share("b", 3), share("c", 2))
    mixed = MixedOrder(numbers, list(own.values()), IDS, [Segment(0, parts)])
    found = [mixed.locate(p) for p in (0, 1, 2, 3, 11, 1200, 10**9)]
    assert found == [(0, 1), (3, 3), (0, 4), (5, 1), (3, 0), (1, 2), (0, 3)]


def test_a_later_segment_does_not_touch_what_came_before():
    first = [Segment(0, (share("a", 1), share("b", 1)))]
    later, changes = continued(first, (share("a", 3), share("b", 1)), 11)
    assert changes == [
        "a from weight 0.5 to 0.75, from its sample 6 on",
        "b from weight 0.5 to 0.25, from its sample 5 on",
    ]
    assert later[0] == first[0]
    assert [part.place for part in later[1].parts] == [6, 5]
    assert continued(later, (share("b", 1), share("a", 3)), 50) == (later, [])
    again, _ = continued(later, (share("a", 1), share("b", 1)), 11)
    assert [segment.start for segment in again] == [0, 11]
    assert read_segments([segment.to_json() for segment in later]) == later


def test_sources_may_join_and_rest_but_not_vanish_or_change_their_rules():
    first, _ = continued([], (share("a", 1, use_labels=False), share("b", 1)), 0)
    more, changes = continued(first, (share("c", 2), share("a", 1, use_labels=False), share("b", 0)), 10)
    assert changes == [
        "c added with weight 0.666667",
        "a from weight 0.5 to 0.333333, from its sample 5 on",
        "b from weight 0.5 to 0, from its sample 5 on",
    ]
    back, _ = continued(more, (share("a", 1, use_labels=False), share("b", 1), share("c", 1)), 40)
    assert {part.id: part.place for part in back[-1].parts} == {"a": 15, "b": 5, "c": 20}
    with pytest.raises(UserError, match=r"was drawing from b, which is not in the list .* with weight 0"):
        continued(first, (share("a", 1, use_labels=False),), 10)
    with pytest.raises(UserError, match=r"a had use_labels=False until now, and now has None"):
        continued(first, (share("a", 1), share("b", 1)), 10)


def test_identity_is_what_a_source_holds():
    one, other = [(Path("x/0.tar"), 3)], [(Path("y/0.tar"), 3)]
    assert identities([(b"9", one)]) == identities([(b"9", other)])
    assert len(set(identities([(b"9", one), (b"8", other), (b"9", other), (b"9", [(Path("0.tar"), 4)])]))) == 4


def check_nothing_lost(total: int, counts: dict[str, list[int]]) -> None:
    """A run killed and resumed with other ranks, batches and weights draws every place of every source once."""
    schedule = [(1, 96, (5, 3, 2)), (2, 96, (5, 3, 2)), (4, 48, (1, 1, 1)), (2, 144, (0, 7, 1)), (1, 48, (2, 2, 5))]
    segments, start, seen = [], 0, Counter()
    by_source, order_of = defaultdict(list), orders(counts)
    first, ids = dict(zip(counts, np.cumsum([0, *map(len, counts.values())]).tolist(), strict=False)), list(counts)
    numbers = [np.arange(len(own)) + first[name] for name, own in counts.items()]
    for run, (ranks, batch, shares) in enumerate(schedule):
        parts = tuple(share(name, number) for name, number in zip(ids, shares, strict=True))
        segments, _ = continued(read_segments([s.to_json() for s in segments]), parts, start)
        order = MixedOrder(numbers, [order_of[name] for name in ids], ids, segments)
        steps = total // len(schedule) // batch + run
        accumulation = 1 + run % 2
        for step in range(steps + 2):  # the last two were fetched ahead and are lost in the kill
            for micro, rank in itertools.product(range(accumulation), range(ranks)):
                dealing = Dealing(rank, ranks, accumulation, start)
                for position in dealing.positions(batch, step * accumulation + micro):
                    if step < steps:
                        seen[position] += 1
                        by_source[_source(order.locate(position)[0], numbers, ids)].append(order.locate(position))
        start += steps * batch
    assert len(seen) == start
    assert set(seen.values()) == {1}
    assert max(seen) == start - 1
    for name in ids:  # ranks deal a batch out in order, so the same samples in the same order as without any kill
        own = [(int(numbers[ids.index(name)][shard]), sample)
               for shard, sample in map(order_of[name].locate, range(len(by_source[name])))]  # fmt: skip
        assert by_source[name] == own


def _source(shard: int, numbers: list[np.ndarray], ids: list[str]) -> str:
    return next(name for name, own in zip(ids, numbers, strict=True) if shard in own)


def test_nothing_is_lost_or_repeated_over_kills_ranks_and_weights():
    check_nothing_lost(5_000, {"a": [60, 80], "b": [30] * 5, "c": [11]})


@pytest.mark.long
def test_nothing_is_lost_or_repeated_in_a_million_positions():
    check_nothing_lost(1_000_000, {"a": [1_000] * 60, "b": [500] * 31, "c": [77]})


# Loading


def classes(folder: Path, name: str, names: list[str], *, numbers: bool = True) -> str:
    members = []
    for i, label in enumerate(names):
        members += [(f"{i}.png", picture(i)), (f"{i}.txt", f"{name} {i}".encode())]
        members += [(f"{i}.json", f'{{"class_names": ["{label}"]}}'.encode())] if label else []
        members += [(f"{i}.cls", b"%d" % i)] if numbers else []
    (folder / name).mkdir(parents=True)
    write_tar(folder / name / "0.tar", members)
    return str(folder / name)


def load(train: list, steps: int, **options) -> list:
    data = DataConfig(train=train, **{"batch_size": 6, "workers": 0, **options})
    batches = iter(TrainLoader(training_shards(data.train), data, 16, ByteTokenizer(), 0))
    return [next(batches) for _ in range(steps)]


def labels(batches: list) -> dict[str, int]:
    texts = [bytes(row).rstrip(b"\0").decode() for batch in batches for row in batch.tokens.tolist()]
    return dict(zip(texts, torch.cat([batch.labels for batch in batches]).tolist(), strict=True))


def test_classes_by_name_are_one_class_in_all_sources(tmp_path):
    a = classes(tmp_path, "a", ["Siamese cat", "dog", ""])
    b = classes(tmp_path, "b", ["truck", " siamese_CAT ", "dog"], numbers=False)
    found = labels(load([a, b], 1, label_space="name"))
    assert found["a 0"] == found["b 1"] == label_of_names(["siamese cat"])
    assert found["a 1"] == found["b 2"]
    assert len({*found.values()}) == 4
    assert min(found.values()) >= 0
    (batch,) = load([a, b], 1, label_space="name")
    assert [part.reason for part in batch.ignored] == [
        "its class has a number and no name: it counts within its source"
    ]
    own = labels(load([a, {"source": b, "use_labels": False}], 1, label_space="name"))
    assert {own[f"b {i}"] for i in range(3)} == {-1}


def test_prompts_take_the_place_of_captions_in_one_source(tmp_path):
    a = classes(tmp_path, "a", ["cat", "dog", "cow"])
    b = classes(tmp_path, "b", ["cat", "dog", "cow"])
    train = [{"source": a, "templates": ["a photo of a {c}", "{c}"], "first_caption": 1.0}, b]
    assert set(labels(load(train, 1))) == {"b 0", "b 1", "b 2", *(f"a photo of a {c}" for c in ("cat", "dog", "cow"))}
    nameless = classes(tmp_path, "c", ["", "cat", "dog"])
    (batch,) = load([{"source": nameless, "templates": ["{c}"]}], 1, batch_size=3)
    assert batch.faults == ["0.tar: 0: no class_names in its JSON for templates"]


def test_each_source_is_augmented_by_its_own_rules(tmp_path):
    a, b = classes(tmp_path, "a", [""] * 3), classes(tmp_path, "b", [""] * 3)
    still = AugmentConfig(scale=(1, 1), ratio=(1, 1))
    mixed = load([a, {"source": b, "augment": {"scale": [1, 1], "ratio": [1, 1], "invert": 1}}], 2, augment=still)
    plain = load([a, b], 2, augment=still)
    for batch, before in zip(mixed, plain, strict=True):
        inverted = batch.ids >= 3
        assert torch.equal(batch.ids, before.ids)
        assert torch.equal(batch.images[~inverted], before.images[~inverted])
        assert torch.equal(batch.images[inverted], 255 - before.images[inverted])


def test_without_weights_a_list_is_one_order_over_everything(tmp_path):
    shards = write_shards(tmp_path, [3, 5, 4])
    paths = [str(path) for path in shards]
    apart, whole = load(paths, 5, batch_size=4), load([str(tmp_path)], 5, batch_size=4)
    assert [batch.ids.tolist() for batch in apart] == [batch.ids.tolist() for batch in whole]
    order = SampleOrder(np.array([3, 5, 4]), 0, 16)
    first = np.array([0, 3, 8])
    located = [order.locate(p) for p in range(20)]
    assert [int(first[shard]) + sample for shard, sample in located] == torch.cat([b.ids for b in apart]).tolist()


def test_weights_decide_what_a_batch_holds_and_a_broken_sample_is_replaced_from_its_source(tmp_path):
    a, b = classes(tmp_path, "a", [""] * 8), classes(tmp_path, "b", [""] * 8)
    members = [("0.png", b"no picture"), ("0.txt", b"x"), *[(f"{i}.{e}", x) for i in range(1, 8)
               for e, x in (("png", picture(i)), ("txt", b"c"))]]  # fmt: skip
    (tmp_path / "c").mkdir()
    write_tar(tmp_path / "c" / "0.tar", members)
    train = [{"source": s, "weight": w} for s, w in ((a, 3), (b, 2), (str(tmp_path / "c"), 1))]
    batches = load(train, 16, batch_size=6)
    for batch in batches:
        assert Counter((batch.ids // 8).tolist()) == {0: 3, 1: 2, 2: 1}
    assert sum(len(batch.faults) for batch in batches) == 2


def test_sources_of_one_size_have_orders_of_their_own_which_another_source_leaves_alone(tmp_path):
    a, b, c = (classes(tmp_path, name, [""] * (8 + i // 2)) for i, name in enumerate("abc"))

    def orders_in(batches: list) -> dict[str, list[int]]:
        texts = [bytes(row).rstrip(b"\0").decode() for batch in batches for row in batch.tokens.tolist()]
        return {name: [int(text[2:]) for text in texts if text[0] == name] for name in "abc"}

    two = orders_in(load([{"source": a, "weight": 1}, {"source": b, "weight": 1}], 8))
    three = orders_in(load([{"source": s, "weight": w} for s, w in ((c, 1), (b, 4), (a, 1))], 24))
    assert two["a"] != two["b"]
    assert (three["a"], three["b"][:24]) == (two["a"], two["b"])


def test_mistakes_are_one_sentence(tmp_path):
    a = classes(tmp_path, "a", [""] * 3)
    with pytest.raises(UserError, match=r"a has 3 pairs, fewer than its 4 of data.batch_size=6; a batch would hold"):
        load([{"source": a, "weight": 2}, {"source": classes(tmp_path, "b", [""] * 5), "weight": 1}], 1)
    with pytest.raises(ValueError, match="give a weight to all or to none"):
        DataConfig(train=[SourceConfig(source="a", weight=1), "b"])
    with pytest.raises(ValueError, match="all weights are 0"):
        DataConfig(train=[SourceConfig(source="a", weight=0)])
