"""Pooled features of a folder of pictures, in one file that numpy or any Parquet reader opens.

OUT.npz      names (N,), features (N, D), model, model_sha256, broken; no pickles
OUT.parquet  columns name and features (a list of D numbers); the rest in the metadata, under focalclip.*
"""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from focalclip.base.errors import UserError, require
from focalclip.base.files import user_path, whole_file
from focalclip.data.images import PICTURE_SUFFIXES, decode
from focalclip.data.reader import files_below
from focalclip.evaluation.features.images import num_threads, prefetch
from focalclip.evaluation.features.model import check_preprocess, device_and_dtype, weights_sha256
from focalclip.interop.encoder import ImageEncoder, Preprocess

FORMATS = (".npz", ".parquet")


@dataclass(frozen=True)
class Extraction:
    """What was written, and what could not be."""

    num_pictures: int
    num_features: int
    broken: tuple[str, ...]
    """Pictures that cannot be read, each with the reason."""
    num_others: int
    """Files in the folder without the suffix of a picture."""
    model_sha256: str


class _Picture(NamedTuple):
    """One picture, read."""

    name: str
    image: Tensor | None
    problem: str = ""


def extract(
    encoder: ImageEncoder,
    folder: str | Path,
    output: str | Path,
    *,
    source: str = "",
    batch_size: int = 64,
    dtype: Literal["float32", "float16"] = "float32",
    progress: bool = True,
) -> Extraction:
    """Write the pooled features of every picture under ``folder``, in order of name.

    Args:
        encoder: the frozen tower.
        folder: searched with all its subfolders; names are paths relative to it, with forward slashes.
        output: ``.npz`` or ``.parquet``; appears whole, under this name, or not at all.
        source: where the encoder comes from; recorded in the file.
        batch_size: pictures per forward pass.
        dtype: of the features in the file.
        progress: show a progress bar.

    Raises:
        UserError: if there is no readable picture, the output is of no known format, the encoder's preprocessing gives
            no tensors of one shape, or features are not finite.
    """
    folder, output = user_path(folder), user_path(output)
    check_format(output)
    paths, num_others = find_pictures(folder)
    check_preprocess(encoder)
    digest = weights_sha256(encoder.tower)
    names, broken = [], []
    features = np.empty((len(paths), encoder.num_features), dtype)
    device, _ = device_and_dtype(encoder)
    batches = [paths[i : i + batch_size] for i in range(0, len(paths), batch_size)]
    bar = tqdm(total=len(paths), desc="extract", unit=" pictures", disable=None if progress else True)
    with ThreadPoolExecutor(num_threads()) as pool, bar:
        for batch in prefetch(pool, _loader(encoder.preprocess, folder), batches, device):
            if whole := [(it.name, it.image) for it in batch if it.image is not None]:
                pooled = encoder(torch.stack([image for _, image in whole]).to(device))
                features[len(names) : len(names) + len(whole)] = pooled.float().cpu().numpy()
                names += [name for name, _ in whole]
            broken += [f"{it.name} ({it.problem})" for it in batch if it.image is None]
            bar.update(len(batch))
    if not names:
        raise UserError(f"{folder}: none of the {len(paths):,} pictures can be read ({broken[0]})")
    features = features[: len(names)]
    if not np.isfinite(features).all():
        raise UserError(f"features hold NaN or infinity in {dtype}; use float32, or weights from before a divergence")
    _write(output, names, features, {"model": source, "model_sha256": digest, "broken": json.dumps(broken)})
    return Extraction(len(names), encoder.num_features, tuple(broken), num_others, digest)


def check_format(output: Path) -> None:
    """Raise UserError unless :func:`extract` can write this file."""
    if output.suffix not in FORMATS:
        raise UserError(f"{output}: the output is {' or '.join(FORMATS)}; name such a file")
    if output.suffix == ".parquet":
        require(f"{output}: Parquet", "shards", "pyarrow")


def find_pictures(folder: Path) -> tuple[list[Path], int]:
    """All pictures under ``folder`` in order of name, and how many other files there are (see ``reader.is_data``).

    Raises:
        UserError: if there is none.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; name a folder of pictures")
    files = files_below(folder)
    paths = [folder / path for path in files if path.lower().endswith(PICTURE_SUFFIXES)]
    if not paths:
        raise UserError(f"{folder}: no picture in it ({', '.join(PICTURE_SUFFIXES)}) among {len(files):,} files")
    return paths, len(files) - len(paths)


def _loader(preprocess: Preprocess, folder: Path) -> Callable[[Path], _Picture]:
    """A function that reads, decodes and preprocesses one picture of ``folder``."""

    def load(path: Path) -> _Picture:
        name = path.relative_to(folder).as_posix()
        try:
            return _Picture(name, preprocess(decode(path.read_bytes())))
        except (ValueError, OSError) as error:
            return _Picture(name, None, str(error))

    return load


def _write(output: Path, names: list[str], features: np.ndarray, facts: dict[str, str]) -> None:
    with whole_file(output) as new:
        if output.suffix == ".npz":
            with new.open("wb") as file:
                arrays: dict[str, Any] = {"names": np.array(names), "features": features, **facts}
                np.savez(file, **arrays)
        else:
            _write_parquet(new, names, features, facts)


def _write_parquet(path: Path, names: list[str], features: np.ndarray, facts: dict[str, str]) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(features.reshape(-1)), features.shape[1])
    table = pyarrow.table({"name": names, "features": rows})
    pyarrow.parquet.write_table(
        table.replace_schema_metadata({f"focalclip.{key}": value for key, value in facts.items()}), path
    )
