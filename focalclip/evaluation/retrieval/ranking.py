"""Ranks of the best right answer, both ways, from blocks of the score matrix: never the whole of it.

Scores are the inner products of the float32 vectors. Those of the true pairs are known first; then every block of
images x texts is multiplied once in float32, and each row and each column counts what lies ahead of its true score.
A float32 product is off by up to D x 6e-8, which would break ties by chance and let results follow the block size, the
device and the number of processes. So pairs closer to the true score than that are settled in float64, in which equal
vectors tie. The result is that of the exact inner products, at the cost of the float32 ones.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from focalclip.distributed import is_main, rank, sum_with_grad, world_size

CHUNK = 2048  # images, and texts, per block: 16 MB of scores
TIE = 1e-12  # scores that differ by less are equal: float64 rounding of a unit vector's inner product is below it
_FLOAT32_ROUNDING = 2.0**-24
_DENSE = 16  # above one close pair in so many, one float64 product of the block is cheaper than many single ones


class Ranks(NamedTuple):
    """Place of the best right answer among all candidates; 1 is the first."""

    image_to_text: NDArray[np.int64]
    """(N,): each image asks for one of its texts."""
    text_to_image: NDArray[np.int64]
    """(M,): each text asks for (one of) its images."""


class _Target(NamedTuple):
    """Each query's best right answer."""

    score: Tensor
    """float64 (queries,)."""
    index: Tensor
    """int64 (queries,): among equally good right answers the first."""


def retrieval_ranks(
    images: Tensor,
    texts: Tensor,
    pairs: NDArray[np.int64],
    *,
    chunk: int = CHUNK,
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> Ranks:
    """Rank the best right answer of every image among the texts, and of every text among the images.

    Of equal scores the lower index comes first, as in zero-shot classification: a model that answers everything alike
    scores at chance. The other right answers of a query never lie ahead of its best one, so that rank <= K says that
    any of an image's captions is among the first K.

    On several ranks each counts its share of the images' blocks, and all get the whole result.

    Args:
        images: float32 (N, D), unit length, the same on every rank.
        texts: float32 (M, D), likewise.
        pairs: (P, 2): image and text that belong together; every image and every text is in one at least.
        chunk: images, and texts, per block. It bounds the memory, and does not change the result.
        device: where the products are taken.
        progress: show a bar.
    """
    with torch.no_grad(), _whole_float32(torch.device(device)):
        of = torch.from_numpy(np.ascontiguousarray(pairs.T))
        true = _pair_scores(images, texts, of, chunk)
        for_image = _targets(true, of[0], of[1], len(images), device)
        for_text = _targets(true, of[1], of[0], len(texts), device)
        ahead_image = torch.zeros(len(images), dtype=torch.int64, device=device)
        ahead_text = torch.zeros(len(texts), dtype=torch.int64, device=device)
        own = range(rank() * chunk, len(images), world_size() * chunk)
        hidden = None if progress and is_main() else True
        steps = len(own) * -(-len(texts) // chunk)
        with tqdm(total=steps, desc="ranking", unit=" blocks", leave=False, disable=hidden) as bar:
            for row in own:
                a = images[row : row + chunk].to(device)
                for column in range(0, len(texts), chunk):
                    b = texts[column : column + chunk].to(device)
                    scores = a @ b.T
                    _count(scores, 1, a, b, for_image, ahead_image, row, column)
                    _count(scores, 0, b, a, for_text, ahead_text, column, row)
                    bar.update()
        return Ranks(*(1 + sum_with_grad(ahead).cpu().numpy() for ahead in (ahead_image, ahead_text)))


def _count(
    scores: Tensor,
    axis: int,
    queries: Tensor,
    candidates: Tensor,
    target: _Target,
    ahead: Tensor,
    start: int,
    first: int,
) -> None:
    """Add to ``ahead`` how many of these candidates lie ahead of each query's target.

    Args:
        scores: float32 (images, texts) of the block.
        axis: of the scores, along which the candidates lie.
        queries: (q, D); they are ``start`` ... of all.
        candidates: (c, D); they are ``first`` ... of all.
        target: of all queries.
        ahead: counts of all queries.
        start: index of the first query.
        first: index of the first candidate.
    """
    rows = slice(start, start + len(queries))
    true = target.score[rows].unsqueeze(axis)
    # The bound on |float32 product - exact| of unit vectors is D x rounding (Higham, Accuracy and Stability of
    # Numerical Algorithms, section 3.1); the 8 are for lengths a little above 1 and for rounding the limits.
    doubt = (queries.shape[1] + 8) * _FLOAT32_ROUNDING
    above = scores > (true + doubt).float()
    ahead[rows] += above.sum(axis, dtype=torch.int32)  # ten times as fast as into int64
    close = ((scores >= (true - doubt).float()) & ~above).nonzero(as_tuple=True)
    q, c = close[1 - axis], close[axis]
    gap = _exact(queries, candidates, q, c) - target.score[rows][q]
    before = (gap > TIE) | ((gap >= -TIE) & (first + c < target.index[rows][q]))
    ahead[rows].index_add_(0, q, before.long())


def _exact(a: Tensor, b: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Inner products ``a[rows] . b[columns]`` in float64."""
    if len(rows) * _DENSE > len(a) * len(b):
        return (a.double() @ b.double().T)[rows, columns]
    step = max(1, (1 << 22) // a.shape[1])  # 32 MB a factor
    blocks = [
        (a[rows[i : i + step]].double() * b[columns[i : i + step]].double()).sum(1) for i in range(0, len(rows), step)
    ]
    return torch.cat(blocks) if blocks else a.new_empty(0, dtype=torch.float64)


def _pair_scores(images: Tensor, texts: Tensor, of: Tensor, chunk: int) -> Tensor:
    """Scores of the true pairs ``of`` (2, P), float64 (P,)."""
    blocks = [(images[i].double() * texts[t].double()).sum(1) for i, t in of.split(chunk, dim=1)]
    return torch.cat(blocks)


def _targets(true: Tensor, query: Tensor, answer: Tensor, n: int, device: str | torch.device) -> _Target:
    """The best right answer of each of ``n`` queries, from the scores (P,) of all pairs."""
    best = torch.full((n,), -torch.inf, dtype=torch.float64).scatter_reduce_(0, query, true, "amax")
    assert bool(torch.isfinite(best).all()), "a query without a right answer, or features that are not finite"
    tied = true >= best[query] - TIE
    first = torch.full((n,), torch.iinfo(torch.int64).max).scatter_reduce_(0, query[tied], answer[tied], "amin")
    return _Target(best.to(device), first.to(device))


@contextmanager
def _whole_float32(device: torch.device) -> Iterator[None]:
    """Products in true float32: neither autocast nor TF32 or bfloat16 behind float32's back."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)
