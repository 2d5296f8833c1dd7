"""Recall, chance, ceiling and interval of one direction, against enumeration, resampling and simulation."""

import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import references
import torch
import torch.nn.functional as F

from focalclip.data.reader import FileEntry
from focalclip.evaluation.metrics.intervals import bootstrap_interval
from focalclip.evaluation.retrieval.pairs import PairData
from focalclip.evaluation.retrieval.ranks import retrieval_ranks
from focalclip.evaluation.retrieval.recall import chance_recall, clustered_interval, image_to_text, text_to_image


def pair_data(captions_of):
    """A set from one list of captions per image; no image is ever read."""
    image = np.repeat(np.arange(len(captions_of)), [len(texts) for texts in captions_of])
    captions = tuple(itertools.chain.from_iterable(captions_of))
    entries = tuple(FileEntry(Path(f"{i}.png"), f"{i}.png") for i in range(len(captions_of)))
    return PairData("t", "t", entries, captions, np.stack([image, np.arange(len(captions))], axis=1))


def perfect_ranks(data):
    """A model that sees exactly which words stand under an image, where each image has one caption."""
    words, word = data.distinct()
    texts = F.one_hot(torch.from_numpy(word), len(words)).float()
    image, text = torch.from_numpy(data.pairs.T.copy())
    images = torch.zeros(len(data.entries), len(words)).index_add_(0, image, texts[text])
    images = F.normalize(images, dim=-1)
    return retrieval_ranks(images, texts, data.pairs, progress=False)


def test_numbers_of_a_direction_are_those_of_its_ranks():
    data = pair_data([["a", "b"], ["c"], ["d", "e", "f"]])
    way = image_to_text(np.array([1, 4, 6]), data)
    assert {k: recall.value for k, recall in way.recall.items()} == {1: 1 / 3, 5: 2 / 3, 10: 1.0}
    assert way.recall[5].interval == pytest.approx(references.wilson_interval(2, 3))
    assert (way.median_rank, way.mean_rank, way.mrr) == (4, 11 / 3, pytest.approx((1 + 1 / 4 + 1 / 6) / 3))
    assert (way.queries, way.candidates) == (3, 6)
    assert way.to_json()["recall@1"]["ceiling"] == 1
    back = text_to_image(np.array([1, 2, 3, 1, 1, 2]), data)
    assert (back.queries, back.candidates, back.recall[1].value) == (6, 3, 0.5)


def test_trap_more_answers_are_asked_for_than_there_are():
    data = pair_data([["a"], ["b"]])
    recall = text_to_image(np.array([1, 2]), data).recall
    assert (recall[5].value, recall[5].chance) == (1, 1)  # and not an error, as of top-k


@pytest.mark.parametrize("k", [1, 2, 3, 7])
def test_chance_is_the_share_of_all_orders(k):
    right = np.array([1, 2, 2, 4])
    expected = [
        np.mean([any(place < count for place in chosen) for chosen in itertools.combinations(range(6), min(k, 6))])
        for count in right
    ]
    assert chance_recall(6, right, k) == pytest.approx(np.mean(expected))


def test_chance_at_scale_is_what_random_vectors_reach():
    rng = np.random.default_rng(0)
    data = pair_data([[f"{i} {j}" for j in range(rng.integers(1, 6))] for i in range(3000)])
    images, texts = (F.normalize(torch.from_numpy(rng.standard_normal((n, 24))).float(), dim=-1)
                     for n in (3000, len(data.captions)))  # fmt: skip
    ranks = retrieval_ranks(images, texts, data.pairs, progress=False)
    for way in (image_to_text(ranks.image_to_text, data), text_to_image(ranks.text_to_image, data)):
        for recall in way.recall.values():
            assert recall.interval[0] < recall.chance < recall.interval[1]


def test_ceiling_is_what_a_perfect_model_reaches_where_words_repeat():
    words = ["cat"] * 12 + ["dog"] * 3 + ["owl"] + ["cat"] * 2
    data = pair_data([[word] for word in words])
    assert data.repeated == 17
    ranks = perfect_ranks(data)
    for way in (image_to_text(ranks.image_to_text, data), text_to_image(ranks.text_to_image, data)):
        assert [recall.value for recall in way.recall.values()] == [recall.ceiling for recall in way.recall.values()]
        assert [recall.ceiling for recall in way.recall.values()] == [3 / 18, 9 / 18, 14 / 18]


def test_ceiling_counts_other_images_only():
    data = pair_data([["cat", "cat"], ["dog", "cat"], ["cat"]])
    assert data.repeated == 4
    to_text = image_to_text(np.ones(3, dtype=int), data)
    assert to_text.recall[1].ceiling == pytest.approx(2 / 3)  # the third image's only caption comes after three others
    assert to_text.recall[5].ceiling == 1
    assert text_to_image(np.ones(5, dtype=int), data).recall[1].ceiling == pytest.approx(3 / 5)  # both of the first's


def test_merged_captions_belong_to_all_their_images():
    data = pair_data([["cat", "cat"], ["dog", "cat"], ["cat"], ["owl"]])
    merged = data.merged()
    assert merged.captions == ("cat", "dog", "owl")
    assert sorted(map(tuple, merged.pairs.tolist())) == [(0, 0), (1, 0), (1, 1), (2, 0), (3, 2)]
    assert (data.repeated, merged.repeated, merged.is_merged) == (4, 1, True)
    ranks = perfect_ranks(merged)
    assert ranks.text_to_image.tolist() == [1, 1, 1]
    assert ranks.image_to_text.tolist() == [1, 1, 1, 1]
    assert text_to_image(ranks.text_to_image, merged).recall[1].ceiling == 1


def test_keeping_some_images_drops_the_others_captions():
    data = pair_data([["a", "b"], ["c"], ["d"]])
    kept = data.keep(np.array([True, False, True]))
    assert kept.captions == ("a", "b", "d")
    assert kept.pairs.tolist() == [[0, 0], [0, 1], [1, 2]]
    assert [entry.key for entry in kept.entries] == ["0.png", "2.png"]
    shared = pair_data([["a"], ["a", "b"]]).merged().keep(np.array([True, False]))
    assert (shared.captions, shared.pairs.tolist()) == (("a",), [[0, 0]])


def test_interval_is_wilsons_where_nothing_hangs_together():
    hits = (np.arange(50) < 13).astype(float)
    assert clustered_interval(hits, np.arange(50)) == pytest.approx(references.wilson_interval(13, 50))


def test_captions_that_always_agree_count_as_one_each_image():
    hits = np.repeat(np.arange(40) < 9, 5).astype(float)
    assert clustered_interval(hits, np.repeat(np.arange(40), 5)) == pytest.approx(references.wilson_interval(9, 40))


@pytest.mark.parametrize("value", [False, True])
def test_interval_is_honest_where_all_are_right_or_wrong(value):
    low, high = clustered_interval(np.full(100, float(value)), np.arange(100) // 5)
    assert (low, high) == pytest.approx(references.wilson_interval(20 * value, 20))
    assert high - low > 0.15


def clustered_hits(rng, images, captions=5):
    """Hits whose chance differs from image to image."""
    return (rng.random((images, captions)) < rng.beta(0.8, 1.2, size=(images, 1))).astype(float)


def test_interval_agrees_with_the_bootstrap_over_images():
    hits = clustered_hits(np.random.default_rng(1), 1000)
    interval = clustered_interval(hits.ravel(), np.arange(5000) // 5)
    bootstrap = bootstrap_interval(lambda weights: weights @ hits.mean(axis=1) / weights.sum(axis=1), 1000)
    assert interval == pytest.approx(bootstrap, abs=0.003)
    assert interval[1] - interval[0] > 1.3 * np.diff(
        references.wilson_interval(int(hits.sum()), 5000)
    )  # far wider than naively


def test_interval_covers_the_truth_19_times_in_20():
    rng = np.random.default_rng(2)
    truth, clusters = 0.8 / 2.0, np.arange(300) // 5
    intervals = [clustered_interval(clustered_hits(rng, 60).ravel(), clusters) for _ in range(1500)]
    coverage = np.mean([low <= truth <= high for low, high in intervals])
    assert 0.93 < coverage < 0.97


def test_the_records_of_results_import_no_torch():
    code = (
        "import sys, focalclip.evaluation.probes.result, focalclip.evaluation.retrieval.result\n"
        "print([name for name in ('torch', 'torchvision', 'matplotlib', 'jinja2') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "[]\n", done.stderr
