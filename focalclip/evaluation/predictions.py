"""What a model answered for every image of a task, compact enough to keep: one ``.npz`` file of a task.

From it come, without the model or the data: the metric again, exactly; its difference to another model's on the same
images; calibration; per-class numbers; the worst mistakes, with their pictures.
"""

import hashlib
import io
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from focalclip.base.errors import UserError
from focalclip.base.files import whole_file
from focalclip.base.machine import full_float32_matmul
from focalclip.evaluation.data import Entry, TaskData, decode
from focalclip.evaluation.features.images import ImageFeatures
from focalclip.evaluation.metrics import definitions as metrics
from focalclip.evaluation.metrics.calibration import FIT_IMAGES, fit_scale
from focalclip.evaluation.metrics.definitions import Floats
from focalclip.evaluation.protocols import SCALE, Metric
from focalclip.evaluation.scoring import MAP
from focalclip.evaluation.task import MULTILABEL_METRICS, Task

SIDE = 96  # pixels

WORST, _PAIRS = 12, 8


@dataclass(frozen=True)
class Pictures:
    """Some of a task's images, small."""

    rows: NDArray[np.int64]
    """(M,), which of the predictions' rows they belong to, the worst mistakes first."""
    webp: tuple[bytes, ...]

    def of(self, row: int) -> bytes | None:
        """The thumbnail of a row of the predictions, if it was kept."""
        found = np.flatnonzero(self.rows == row)
        return self.webp[found[0]] if len(found) else None

    def to_arrays(self) -> dict[str, NDArray[Any]]:
        """As arrays for an ``.npz`` file."""
        return {
            "picture_rows": self.rows,
            "picture_sizes": np.array([len(data) for data in self.webp], dtype=np.int64),
            "picture_bytes": np.frombuffer(b"".join(self.webp), dtype=np.uint8),
        }

    @classmethod
    def from_arrays(cls, arrays: dict[str, NDArray[Any]]) -> "Pictures":
        """Take its arrays out of those of a file."""
        rows, sizes = arrays.pop("picture_rows"), arrays.pop("picture_sizes")
        parts = np.split(arrays.pop("picture_bytes"), np.cumsum(sizes)[:-1]) if len(sizes) else []
        return cls(rows, tuple(part.tobytes() for part in parts))


def mistakes(
    predicted: NDArray[np.integer], confidence: NDArray[Any], labels: NDArray[Any], true_confidence: NDArray[Any]
) -> list[int]:
    """Rows worth a picture: the worst mistakes, then one of each of the commonest confusions.

    The worst mistake is the one whose answer lies farthest above the truth (for multi-label data, above nothing). Where
    there are many pairs of true and given class, each gets one picture, so that no two look-alikes fill the page.

    Args:
        predicted: (N,).
        confidence: (N,), cosine of the answer.
        labels: (N,), or bool (N, C).
        true_confidence: (N,), cosine of the true class; empty for multi-label data.
    """
    if labels.ndim == 2:
        wrong = np.flatnonzero(~labels[np.arange(len(labels)), predicted])
        order = wrong[np.argsort(-confidence[wrong], kind="stable")]
        return _spread(order, predicted.astype(np.int64))
    wrong = np.flatnonzero(predicted != labels)
    order = wrong[np.argsort(-(confidence - true_confidence)[wrong], kind="stable")]
    pair = labels * (int(predicted.max(initial=0)) + 1) + predicted
    worst = _spread(order, pair)
    kinds, counts = np.unique(pair[wrong], return_counts=True)
    commonest = set(kinds[np.argsort(-counts, kind="stable")][:_PAIRS].tolist())
    examples = [row for row in _first(order, pair, 1) if int(pair[row]) in commonest]
    return list(dict.fromkeys([*worst, *examples]))


def take(rows: Sequence[int], entries: Sequence[Entry]) -> Pictures:
    """Read and shrink the images of some rows."""
    return Pictures(np.array(rows, dtype=np.int64), tuple(_thumbnail(entry.read()) for entry in entries))


def _spread(order: NDArray[np.integer], kind: NDArray[np.integer]) -> list[int]:
    """The first rows of ``order``, no kind oftener than needed to fill the page."""
    kinds = max(1, len(np.unique(kind[order])))
    return _first(order, kind, -(-WORST // kinds))[:WORST]


def _first(order: NDArray[np.integer], kind: NDArray[np.integer], times: int) -> list[int]:
    """The rows of ``order`` whose kind came fewer than ``times`` times before."""
    seen: dict[int, int] = {}
    kept = []
    for row in order.tolist():
        seen[int(kind[row])] = seen.get(int(kind[row]), 0) + 1
        if seen[int(kind[row])] <= times:
            kept.append(row)
    return kept


def _thumbnail(data: bytes) -> bytes:
    image = decode(data)
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=75, method=4)
    return buffer.getvalue()


TOP = 5

_CHUNK = 8192  # images per block of the score matrix

_FORMAT = 1

RANKING: tuple[Metric, ...] = ("roc_auc", *MULTILABEL_METRICS)
"""Metrics that rank images by their scores, for which all scores are kept."""


@dataclass(frozen=True)
class Predictions:
    """A model's answers for the N readable images of one task with C classes."""

    task: str
    metric: Metric
    ranking: str
    """``softmax`` or ``cosine``: what a ranking metric ranks by."""
    task_sha256: str
    images_sha256: str
    """Of the compressed images alone, whatever the prompts."""
    class_names: tuple[str, ...]
    entries: int
    """Images of the test set, the damaged ones among them."""
    keys: NDArray[np.str_]
    places: NDArray[np.int32]
    """(N,), each image's place in the test set."""
    labels: NDArray[Any]
    """int64 (N,), or bool (N, C)."""
    predicted: NDArray[np.uint16]
    """(N,), the class that the metric counts: for ``mean_per_class`` the best of those that occur."""
    top_classes: NDArray[np.uint16]
    """(N, at most 5), best first."""
    top_cosines: NDArray[np.float32]
    true_rank: NDArray[np.uint16]
    """(N,), place of the true class among all, 0 for the best; empty for multi-label data."""
    true_cosine: NDArray[np.float32]
    """(N,); empty for multi-label data."""
    scales: Floats
    """(S,): 100, the model's own (NaN where it has none), the one fitted to these answers (NaN for multi-label)."""
    log_partition: NDArray[np.float32]
    """(N, S), log of the sum over classes of exp(scale x cosine): turns a cosine into a probability."""
    cosines: NDArray[np.float32]
    """(N, C) where the metric ranks by them, or all were asked for; else (N, 0)."""
    official: NDArray[np.int64]
    """(entries,), which entry is the i-th of ELEVATER's own order of the test set; empty where it is not known."""
    pictures: Pictures

    @classmethod
    @full_float32_matmul()
    def of(
        cls,
        task: Task,
        data: TaskData,
        images: ImageFeatures,
        classes: Tensor,
        own_scale: float | None = None,
        keep_all: bool = False,
    ) -> "Predictions":
        """Take down the answers that :func:`~focalclip.evaluation.scoring.score` counts.

        Args:
            task: what was scored, under the protocol that was used.
            data: its data; a few pictures are read from it.
            images: unit vectors (N, D).
            classes: unit vectors (C, D).
            own_scale: what the model multiplies cosines with.
            keep_all: keep all N x C cosines, as a submission to ELEVATER's server needs them.
        """
        labels, names = data.labels[images.readable], data.class_names
        single = not data.multilabel
        scales = np.array([SCALE, own_scale or np.nan, np.nan])
        if single:
            every = -(-len(labels) // FIT_IMAGES)
            scales[2] = fit_scale(images.embeds[::every] @ classes.T, labels[::every])
        whole = keep_all or task.metric in RANKING
        competing = _competing(task, labels, len(names))
        blocks = [
            _answers(images.embeds[i : i + _CHUNK], classes, labels[i : i + _CHUNK], scales, competing, whole)
            for i in range(0, len(labels), _CHUNK)
        ]
        columns: dict[str, Any] = {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}
        places = np.flatnonzero(images.readable).astype(np.int32)
        official = data.official_order
        shown = mistakes(columns["top_classes"][:, 0], columns["top_cosines"][:, 0], labels, columns["true_cosine"])
        return cls(
            task=task.id,
            metric=task.metric,
            ranking=task.scores,
            task_sha256=data.digest(images.sha256),
            images_sha256=images.sha256,
            class_names=names,
            entries=len(data.entries),
            keys=np.array([data.entries[i].key for i in places]),
            places=places,
            labels=labels,
            scales=scales,
            official=np.array([] if official is None else official, dtype=np.int64),
            pictures=take(shown, [data.entries[places[i]] for i in shown]),
            **columns,
        )

    @property
    def multilabel(self) -> bool:
        """Whether an image may have several labels."""
        return self.labels.ndim == 2

    @property
    def best(self) -> NDArray[np.int64]:
        """(N,), the class with the highest score of all."""
        return self.top_classes[:, 0].astype(np.int64)

    @property
    def n(self) -> int:
        """Images that were scored."""
        return len(self.labels)

    @property
    def correct(self) -> NDArray[np.bool_]:
        """(N,), whether the class that the metric counts is right; for multi-label data, whether it is present."""
        if self.multilabel:
            return self.labels[np.arange(self.n), self.predicted]
        return self.predicted == self.labels

    @property
    def has_all(self) -> bool:
        """Whether the scores of all classes were kept."""
        return self.cosines.shape[1] > 0

    def top_correct(self) -> NDArray[np.bool_]:
        """(N,), whether the best of all classes is right; differs from ``correct`` where classes do not occur."""
        return self.top_classes[:, 0] == self.labels

    def probabilities(self, which: int = 0) -> Floats:
        """Of the top classes (N, at most 5), at the ``which``-th of ``scales``."""
        return np.exp(self.scales[which] * self.top_cosines.astype(np.float64) - self.log_partition[:, which, None])

    def true_probability(self, which: int = 0) -> Floats:
        """Of the true class (N,), at the ``which``-th of ``scales``."""
        return np.exp(self.scales[which] * self.true_cosine.astype(np.float64) - self.log_partition[:, which])

    def all_probabilities(self) -> Floats:
        """softmax(100 x cosine) over all classes (N, C).

        Raises:
            UserError: if not all scores were kept.
        """
        if not self.has_all:
            raise UserError(f"{self.task}: the result keeps only the top {TOP} classes; evaluate with --keep-all")
        return metrics.softmax(SCALE * self.cosines.astype(np.float64))

    @property
    def ranked(self) -> Floats:
        """What a multi-label metric ranks the images by (N, C)."""
        return self.cosines.astype(np.float64) if self.ranking == "cosine" else self.all_probabilities()

    @property
    def fingerprint(self) -> str:
        """SHA-256 of what decides all the rest: the task with its data, and the scores."""
        digest = hashlib.sha256(f"{_FORMAT} {self.task_sha256} {self.metric} {self.ranking}".encode())
        for array in (self.predicted, self.top_cosines, self.scales, self.cosines, self.official):
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()

    def statistic(self, weights: Floats | None = None) -> Floats:
        """The metric, or its bootstrap for weights (draws, N): see :mod:`focalclip.evaluation.metrics.definitions`."""
        if self.metric == "accuracy":
            return metrics.accuracy(self.correct, weights)
        if self.metric == "mean_per_class":
            return metrics.mean_per_class(self.correct, self.labels, weights)
        if self.metric == "roc_auc":
            margin = self.cosines[:, 1].astype(np.float64) - self.cosines[:, 0]
            return metrics.roc_auc(margin, self.labels == 1, weights)
        if self.metric == "macro_f1":
            return metrics.macro_f1(self.predicted.astype(np.int64), self.labels, weights)
        return MAP[self.metric](self.ranked, self.labels, weights)

    def save(self, path: Path) -> None:
        """Write the file, whole or not at all; one that holds the same answers is left as it is."""
        if _fingerprint_in(path) == self.fingerprint:
            return
        names = [field.name for field in fields(self) if field.name != "pictures"]
        values: dict[str, Any] = {name: np.asarray(getattr(self, name)) for name in names}
        values |= {"format": np.array(_FORMAT), "fingerprint": np.array(self.fingerprint)} | self.pictures.to_arrays()
        with whole_file(path) as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, **values)

    @classmethod
    def load(cls, path: Path) -> "Predictions":
        """Read the file.

        Raises:
            UserError: if it is none of ours, or of another version.
        """
        try:
            with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as file:
                values = {name: file[name] for name in file.files}
        except (OSError, ValueError, zipfile.BadZipFile) as error:
            raise UserError(f"{path}: no predictions can be read ({error}); evaluate again") from None
        if int(values.pop("format", -1)) != _FORMAT:
            raise UserError(f"{path}: predictions of another version of focalclip; evaluate again")
        values.pop("fingerprint", None)
        values["pictures"] = Pictures.from_arrays(values)
        for name, array in values.items():
            if isinstance(array, np.ndarray) and array.ndim == 0:
                values[name] = array.item()
        return cls(**values | {"class_names": tuple(values["class_names"].tolist())})


def _fingerprint_in(path: Path) -> str | None:
    """Of the answers in a file, if it holds any."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return str(file["fingerprint"])
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        return None


def _competing(task: Task, labels: NDArray[Any], size: int) -> NDArray[np.int64]:
    """The classes that may win: as in ELEVATER, for ``mean_per_class`` those without images cannot."""
    if task.metric == "mean_per_class" and task.candidates == "occurring":
        return metrics.occurring_classes(labels)[0]
    return np.arange(size)


def _answers(
    images: Tensor, classes: Tensor, labels: NDArray[Any], scales: Floats, competing: NDArray[np.int64], whole: bool
) -> dict[str, Any]:
    """One block's columns."""
    cosines = images @ classes.T
    scores, rows = cosines.numpy(), np.arange(len(labels))
    values, best = (x.numpy() for x in cosines.topk(min(TOP, scores.shape[1]), dim=1))
    order = np.lexsort((best, -values), axis=-1)  # of equal scores the lower class comes first, as for the metrics
    best, values = np.take_along_axis(best, order, 1), np.take_along_axis(values, order, 1)
    best[:, 0] = scores.argmax(axis=1)
    single = labels.ndim == 1
    log_partition = [torch.logsumexp(float(scale) * cosines, dim=1).numpy() for scale in scales]
    return {
        "predicted": competing[scores[:, competing].argmax(axis=1)].astype(np.uint16),
        "top_classes": best.astype(np.uint16),
        "top_cosines": values,
        "true_rank": metrics.true_class_ranks(scores, labels).astype(np.uint16) if single else np.empty(0, np.uint16),
        "true_cosine": scores[rows, labels] if single else np.empty(0, np.float32),
        "log_partition": np.stack(log_partition, axis=1).astype(np.float32),
        "cosines": scores if whole else np.empty((len(labels), 0), np.float32),
    }
