"""What a model answered for every image of a task, compact enough to keep: one ``.npz`` file of a task.

From it come, without the model, the data or torch: the metric, exactly; its difference to another model's on the same
images; calibration; per-class numbers; the worst mistakes, with their pictures.
"""

import hashlib
import io
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from focalclip.base.errors import UserError, first_line
from focalclip.base.files import whole_file
from focalclip.evaluation.metrics import METRICS
from focalclip.evaluation.metrics.definitions import Floats, softmax
from focalclip.evaluation.metrics.metric import SCALE, Answers

SIDE = 96  # pixels, of the longer side of a thumbnail

WORST = 12  # mistakes that are shown

TOP = 5

_FORMAT = 1


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
        """The pictures in a file's arrays, which are removed from them."""
        rows, sizes, data = (arrays.pop(name) for name in ("picture_rows", "picture_sizes", "picture_bytes"))
        parts = np.split(data, np.cumsum(sizes)[:-1]) if len(sizes) else []
        return cls(rows, tuple(part.tobytes() for part in parts))


@dataclass(frozen=True)
class Predictions:
    """A model's answers for the N readable images of one task with C classes."""

    task: str
    metric: str
    ranking: str
    """``softmax`` or ``cosine``: what a ranking metric ranks by."""
    task_sha256: str
    images_sha256: str
    """Of the compressed images alone, independent of the prompts."""
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

    def all_probabilities(self) -> Floats:
        """softmax(100 x cosine) over all classes (N, C).

        Raises:
            UserError: if not all scores were kept.
        """
        if not self.has_all:
            raise UserError(f"{self.task}: the result keeps only the top {TOP} classes; evaluate with --keep-all")
        return softmax(SCALE * self.cosines.astype(np.float64))

    @property
    def fingerprint(self) -> str:
        """SHA-256 of what decides all the rest: the task with its data, and the scores."""
        digest = hashlib.sha256(f"{_FORMAT} {self.task_sha256} {self.metric} {self.ranking}".encode())
        for array in (self.predicted, self.top_cosines, self.scales, self.cosines, self.official):
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()

    @property
    def answers(self) -> Answers:
        """What the metric is computed from."""
        return Answers(
            labels=self.labels,
            num_classes=len(self.class_names),
            predicted=self.predicted.astype(np.int64),
            true_rank=self.true_rank,
            scores=self.cosines,
            ranking=self.ranking,
        )

    def statistic(self, weights: Floats | None = None) -> Floats:
        """The metric, or its bootstrap for weights (draws, N): see :mod:`focalclip.evaluation.metrics.definitions`."""
        return METRICS[self.metric].definition(self.answers, weights)

    def save(self, path: Path) -> None:
        """Write the file atomically; one that holds the same answers is left unchanged."""
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
            UserError: if it is not such a file, or of another version.
        """
        try:
            with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as file:
                values = {name: file[name] for name in file.files}
            if int(values.pop("format", -1)) != _FORMAT:
                raise UserError(f"{path}: predictions of another version of focalclip; evaluate again")
            stored = str(values.pop("fingerprint"))
            values["pictures"] = Pictures.from_arrays(values)
            for name, array in values.items():
                if isinstance(array, np.ndarray) and array.ndim == 0:
                    values[name] = array.item()
            predictions = cls(**values | {"class_names": tuple(values["class_names"].tolist())})
            if predictions.fingerprint != stored:
                raise ValueError("damaged")
        except UserError:
            raise
        except Exception as error:  # noqa: BLE001 (damaged files make zipfile, zlib and numpy raise errors of any kind)
            raise UserError(f"{path}: no predictions can be read ({first_line(error)}); evaluate again") from None
        return predictions


def _fingerprint_in(path: Path) -> str | None:
    """Of the answers in a file, if it holds any."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return str(file["fingerprint"])
    except Exception:  # noqa: BLE001 (as in load)
        return None
