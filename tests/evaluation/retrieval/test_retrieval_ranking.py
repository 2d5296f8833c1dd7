"""Ranks from blocks of scores, against sorting the full matrix, in one process and in two."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import run_ranks

from focalclip.evaluation.retrieval.ranks import retrieval_ranks


def unit(rows, dim, seed, spread=1.0):
    """Random unit vectors; a small spread puts them all into one narrow cone."""
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.ones(dim) + spread * torch.randn(rows, dim, generator=generator), dim=-1)


def several_captions(n, m, seed):
    """Pairs (M, 2) in which every image has a caption, in no order."""
    rng = np.random.default_rng(seed)
    image = rng.permutation(np.concatenate([np.arange(n), rng.integers(n, size=m - n)]))
    return np.stack([image, np.arange(m)], axis=1)


def naive_ranks(images, texts, pairs):
    """Sort every query's candidates by exact score, equal ones by index; place of the first right one."""
    scores = (images.double() @ texts.double().T).numpy().round(13)  # equal vectors have equal scores
    right = {(int(i), int(t)) for i, t in pairs}
    of_image = [sorted(range(len(texts)), key=lambda t: (-scores[i, t], t)) for i in range(len(images))]
    of_text = [sorted(range(len(images)), key=lambda i: (-scores[i, t], i)) for t in range(len(texts))]
    return (
        [1 + next(place for place, t in enumerate(order) if (i, t) in right) for i, order in enumerate(of_image)],
        [1 + next(place for place, i in enumerate(order) if (i, t) in right) for t, order in enumerate(of_text)],
    )


def data_with_copies(spread=1.0):
    """40 images and 90 texts, of which some are exact copies of others."""
    images, texts = unit(40, 16, 0, spread), unit(90, 16, 1, spread)
    images[[3, 17, 31]] = images[8].clone()
    texts[[5, 44, 89]] = texts[20].clone()
    texts[60:70] = texts[70:80].clone()
    return images, texts, several_captions(40, 90, 2)


@pytest.mark.parametrize("spread", [1.0, 1e-2, 1e-4, 0.0], ids=["wide", "cone", "below float32", "all alike"])
@pytest.mark.parametrize("chunk", [1, 7, 32, 1000])
def test_equals_sorting_the_full_matrix_whatever_the_chunk(spread, chunk):
    images, texts, pairs = data_with_copies(spread)
    ranks = retrieval_ranks(images, texts, pairs, chunk=chunk, progress=False)
    of_image, of_text = naive_ranks(images, texts, pairs)
    assert ranks.image_to_text.tolist() == of_image
    assert ranks.text_to_image.tolist() == of_text


def test_texts_that_belong_to_several_images():
    images, texts, pairs = data_with_copies()
    pairs = np.concatenate([pairs, [[0, 5], [1, 5], [2, 5], [39, 88]]])
    ranks = retrieval_ranks(images, texts, pairs, chunk=11, progress=False)
    assert tuple(way.tolist() for way in ranks) == naive_ranks(images, texts, pairs)


def test_vectors_of_other_lengths_are_refused():
    images, texts, pairs = data_with_copies()
    with pytest.raises(ValueError, match="texts: not all vectors are of unit length"):
        retrieval_ranks(images, 2 * texts, pairs)


def ranks_of_process():
    ranks = retrieval_ranks(*data_with_copies(), chunk=9, progress=False)
    return [torch.from_numpy(way) for way in ranks]


def test_two_processes_get_what_one_gets():
    alone = retrieval_ranks(*data_with_copies(), progress=False)
    for result in run_ranks(ranks_of_process, 2):
        for one, two in zip(alone, result, strict=True):
            assert one.tolist() == two.tolist()


def test_hand_worked_case():
    """Two captions an image; angles in degrees, so that every order can be read off."""
    angle = torch.tensor([0.0, 40.0, 90.0, 5.0, 60.0, 35.0, 44.0, 80.0, 10.0]).deg2rad()
    vectors = torch.stack([angle.cos(), angle.sin()], dim=1)
    images, texts = vectors[:3], vectors[3:]  # 0, 40, 90;  5, 60 | 35, 44 | 80, 10
    pairs = np.array([[0, 0], [0, 1], [1, 2], [1, 3], [2, 4], [2, 5]])
    ranks = retrieval_ranks(images, texts, pairs, progress=False)
    # image 0: 5 degrees is nearest and its own; image 1: 44 is; image 2: 80 is
    assert ranks.image_to_text.tolist() == [1, 1, 1]
    # text at 60: images at 40 and 90 are nearer than its own at 0; at 10: 0 and 40 are nearer than its own at 90
    assert ranks.text_to_image.tolist() == [1, 3, 1, 1, 1, 3]
    swapped = pairs[:, [0, 1]].copy()
    swapped[:, 0] = [2, 2, 0, 0, 1, 1]
    ranks = retrieval_ranks(images, texts, swapped, progress=False)
    # image 0 owns 35 and 44: 5 and 10 come first; image 1 owns 80 and 10: 44, 35, 60 come first; image 2 owns 5, 60
    assert ranks.image_to_text.tolist() == [3, 4, 2]
    assert ranks.text_to_image.tolist() == [3, 2, 2, 2, 2, 2]


@pytest.mark.parametrize("k", [1, 5, 10])
def test_recall_is_any_right_answer_among_the_top_k(k):
    """CLIP_benchmark's definition, on its own terms: top-k of the full matrix."""
    images, texts, pairs = unit(40, 16, 0), unit(90, 16, 1), several_captions(40, 90, 2)
    positive = torch.zeros(90, 40, dtype=torch.bool)
    positive[pairs[:, 1], pairs[:, 0]] = True
    scores = texts @ images.T
    text_retrieval = positive.T.gather(1, scores.T.topk(k).indices).any(dim=1).float().mean()
    image_retrieval = positive.gather(1, scores.topk(k).indices).any(dim=1).float().mean()
    ranks = retrieval_ranks(images, texts, pairs, progress=False)
    assert (ranks.image_to_text <= k).mean() == pytest.approx(text_retrieval.item())
    assert (ranks.text_to_image <= k).mean() == pytest.approx(image_retrieval.item())


def test_trap_a_model_that_answers_everything_alike_scores_at_chance():
    """Counting only what is strictly better would give it rank 1 everywhere."""
    images, texts = F.normalize(torch.ones(50, 8), dim=-1), F.normalize(torch.ones(100, 8), dim=-1)
    pairs = np.stack([np.arange(100) // 2, np.arange(100)], axis=1)
    ranks = retrieval_ranks(images, texts, pairs, chunk=13, progress=False)
    assert (ranks.text_to_image <= 5).mean() == 5 / 50
    assert (ranks.image_to_text <= 10).mean() == 5 / 50


def test_trap_equal_captions_are_not_ordered_by_rounding():
    """200 copies of one caption: float32 products of equal vectors differ by where they lie in a block."""
    images = unit(200, 61, 3)
    texts = unit(1, 61, 4).expand(200, 61).contiguous()
    pairs = np.stack([np.arange(200), np.arange(200)], axis=1)
    for chunk in (3, 50, 64, 199):
        ranks = retrieval_ranks(images, texts, pairs, chunk=chunk, progress=False)
        assert ranks.image_to_text.tolist() == list(range(1, 201))


@pytest.mark.parametrize("interface", ["legacy", "per backend"])
def test_trap_scores_under_mixed_precision_or_reduced_float32(interface):
    images, texts, pairs = data_with_copies(1e-2)
    expected = retrieval_ranks(images, texts, pairs, progress=False)
    backend = torch.backends.mkldnn.matmul
    before = torch.get_float32_matmul_precision(), backend.fp32_precision
    if interface == "legacy":
        torch.set_float32_matmul_precision("medium")
    else:  # after which the legacy getter raises
        backend.fp32_precision = "bf16"
    try:
        with torch.autocast("cpu", torch.bfloat16):
            assert (images @ texts.T).dtype == torch.bfloat16  # the trap is set
            ranks = retrieval_ranks(images, texts, pairs, progress=False)
        assert backend.fp32_precision == "bf16"
    finally:
        torch.set_float32_matmul_precision(before[0])
        backend.fp32_precision = before[1]
    assert all((one == two).all() for one, two in zip(expected, ranks, strict=True))


MEMORY = """
import resource, numpy as np, torch
from focalclip.evaluation.retrieval.ranks import retrieval_ranks
torch.manual_seed(0)
images, texts = (torch.nn.functional.normalize(torch.randn(n, 16), dim=-1) for n in (6_000, 30_000))
pairs = np.stack([np.arange(30_000) // 5, np.arange(30_000)], axis=1)
few = retrieval_ranks(images[:8], texts[:40], pairs[:40], progress=False)  # what the libraries take is taken now
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
ranks = retrieval_ranks(images, texts, pairs, chunk=512, progress=False)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, ranks.text_to_image.mean())
"""


@pytest.mark.trap("5.2 speed", "retrieval builds the full score matrix")
def test_trap_retrieval_builds_the_full_score_matrix():
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, env=os.environ, check=True)
    kibibytes, mean_rank = map(float, done.stdout.split())
    assert mean_rank == pytest.approx(3000, rel=0.05)  # random vectors: the middle
    full_matrix = 6_000 * 30_000 * 4 / 1024  # 687 MiB
    assert kibibytes < full_matrix / 30
