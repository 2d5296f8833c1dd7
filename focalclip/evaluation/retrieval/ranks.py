"""Ranks of the best right answer, both ways, from blocks of the score matrix: never the whole of it.

Scores are the inner products of the float32 vectors. Those of the true pairs are known first; then every block of
images x texts is multiplied once in float32, and each row and each column counts what lies ahead of its true score.
A float32 product is off by up to D x 6e-8, which would break ties by chance and let results follow the block size, the
device and the number of processes. So pairs closer to the true score than that are settled in float64, in which equal
vectors tie. The result is that of the exact inner products, at the cost of the float32 ones.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from focalclip.base.machine import full_float32_matmul
from focalclip.base.ranks import is_main, rank, world_size
from focalclip.evaluation.retrieval.result import Ranks
from focalclip.losses.exchange import sum_with_grad

CHUNK = 2048  # images, and texts, per block: 16 MB of scores

TIE = 1e-12  # scores that differ by less are equal: float64 rounding of a unit vector's inner product is below it

_UNIT = 1e-3  # how far a length may be from 1

_FLOAT32_ROUNDING = 2.0**-24

_DENSE = 16  # above one close pair in so many, one float64 product of the block is cheaper than many single ones


class _Queries:
    """All queries of one direction: their best right answers, and how many candidates were found to lie ahead.

    Args:
        scores: float64 (P,) of the true pairs.
        query: int64 (P,).
        answer: int64 (P,).
        n: number of queries.
        axis: of a block of scores, along which the candidates lie.
        device: where counts are kept.
    """

    def __init__(
        self, scores: Tensor, query: Tensor, answer: Tensor, n: int, axis: int, device: str | torch.device
    ) -> None:
        best = torch.full((n,), -torch.inf, dtype=torch.float64).scatter_reduce_(0, query, scores, "amax")
        assert bool(torch.isfinite(best).all()), "a query without a right answer, or features that are not finite"
        tied = scores >= best[query] - TIE
        last = torch.full((n,), torch.iinfo(torch.int64).max)
        first = last.scatter_reduce_(0, query[tied], answer[tied], "amin")  # among equally good right answers
        self.best, self.answer, self.axis = best.to(device), first.to(device), axis
        self.ahead = torch.zeros(n, dtype=torch.int64, device=device)

    def count(self, scores: Tensor, queries: Tensor, candidates: Tensor, start: int, first: int) -> None:
        """Count how many candidates of a block lie ahead.

        Args:
            scores: float32 (images, texts) of the block.
            queries: (q, D), the block's; ``start`` is the index of its first.
            candidates: (c, D), the block's; ``first`` is the index of its first.
            start: see above.
            first: see above.
        """
        rows = slice(start, start + len(queries))
        best = self.best[rows].unsqueeze(self.axis)
        # The bound on |float32 product - exact| of unit vectors is D x rounding (Higham, Accuracy and Stability of
        # Numerical Algorithms, section 3.1); the 8 are for lengths a little above 1 and for rounding the limits.
        doubt = (queries.shape[1] + 8) * _FLOAT32_ROUNDING
        above = scores > (best + doubt).float()
        self.ahead[rows] += above.sum(self.axis, dtype=torch.int32)  # ten times as fast as into int64
        close = ((scores >= (best - doubt).float()) & ~above).nonzero(as_tuple=True)
        q, c = close[1 - self.axis], close[self.axis]
        gap = _exact(queries, candidates, q, c) - self.best[rows][q]
        before = (gap > TIE) | ((gap >= -TIE) & (first + c < self.answer[rows][q]))
        self.ahead[rows].index_add_(0, q, before.long())

    def ranks(self) -> NDArray[np.int64]:
        """Ranks from 1, from the counts of all processes."""
        return 1 + sum_with_grad(self.ahead).cpu().numpy()


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

    Raises:
        ValueError: if the vectors are not of unit length.
    """
    for name, vectors in (("images", images), ("texts", texts)):
        if not bool(((vectors.norm(dim=1) - 1).abs() < _UNIT).all()):
            raise ValueError(f"{name}: not all vectors are of unit length; divide each by its length first")
    with torch.no_grad(), full_float32_matmul(torch.device(device)):
        image, text = torch.from_numpy(np.ascontiguousarray(pairs.T, dtype=np.int64))
        true = _pair_scores(images, texts, image, text, chunk)
        of_images = _Queries(true, image, text, len(images), 1, device)
        of_texts = _Queries(true, text, image, len(texts), 0, device)
        own = range(rank() * chunk, len(images), world_size() * chunk)
        hidden = None if progress and is_main() else True
        steps = len(own) * -(-len(texts) // chunk)
        with tqdm(total=steps, desc="ranking", unit=" blocks", leave=False, disable=hidden) as bar:
            for row in own:
                a = images[row : row + chunk].to(device)
                for column in range(0, len(texts), chunk):
                    b = texts[column : column + chunk].to(device)
                    scores = a @ b.T
                    of_images.count(scores, a, b, row, column)
                    of_texts.count(scores, b, a, column, row)
                    bar.update()
        return Ranks(of_images.ranks(), of_texts.ranks())


def _exact(a: Tensor, b: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Inner products ``a[rows] . b[columns]`` in float64."""
    if len(rows) * _DENSE > len(a) * len(b):
        return (a.double() @ b.double().T)[rows, columns]
    step = max(1, (1 << 22) // a.shape[1])  # 32 MB a factor
    blocks = [
        (a[rows[i : i + step]].double() * b[columns[i : i + step]].double()).sum(1) for i in range(0, len(rows), step)
    ]
    return torch.cat(blocks) if blocks else a.new_empty(0, dtype=torch.float64)


def _pair_scores(images: Tensor, texts: Tensor, image: Tensor, text: Tensor, chunk: int) -> Tensor:
    """Scores of the true pairs, float64 (P,) on the CPU."""
    parts = zip(image.split(chunk), text.split(chunk), strict=True)
    return torch.cat([(images[i].double() * texts[t].double()).sum(1).cpu() for i, t in parts])
