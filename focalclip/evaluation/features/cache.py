"""Image features and class vectors, cached by content; names of models and data sets are not part of any key.

    FOLDER/KEY/probe.npz      one model: its features of a fixed picture and of fixed prompts
    FOLDER/KEY/HASH.npz       one batch of images, or the class vectors of one list of prompts
    FOLDER/digests/HASH.npy   SHA-256 of every image of a data set, by place, size and times of its files

KEY is the hash of weights, architecture, precision, and of what preprocessing and tokenizer make of the probes. A
change that no hash covers, such as in the code of a user's own model, shows in the features of the probes: where they
differ from the cached ones, the model's cache is emptied. HASH covers the images' bytes, the resize and whether
pictures are turned. A batch is written as soon as it is done, so a killed run resumes within a data set. Features are
float32: in 16 bits they would move cosines by 1e-4, and a result would depend on whether its features came from here.

The folder may be deleted at any time; beyond ``MAX_BYTES`` the models that were not used for longest are dropped.
"""

import contextlib
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from focalclip.base.errors import first_line
from focalclip.base.files import cache_dir as user_cache_dir
from focalclip.base.files import user_path, whole_file
from focalclip.base.ranks import in_turns
from focalclip.evaluation.data import Entry
from focalclip.evaluation.features.model import device_and_dtype, evaluating, known_weights

VERSION = 2  # raised whenever decoding, normalisation or the files here change

MAX_BYTES = 20 * 2**30

PROBE_PROMPTS = ["a photo of a Dog.", "itap of the F-16A/B, a type of aircraft!", "naïve café", "七 2,000"]

_FRESH_SECONDS = 2.0  # a file may change again within the tick of its times: one just written is not remembered


def default_folder() -> Path:
    """``features`` in the user's cache (``FOCALCLIP_CACHE`` names another)."""
    return user_cache_dir() / "features"


class FeatureCache:
    """What is kept of one model. A file that cannot be written or read costs a line on stderr, never the evaluation.

    Args:
        folder: that of the model, which is there.

    Attributes:
        is_new: whether nothing was kept of this model when the cache was opened.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.is_new = not any(path.name != "probe.npz" for path in folder.glob("*.npz"))
        self._is_writable = True

    def images_key(self, digests: Sequence[bytes], rule: str) -> str:
        """Of one batch of images, by the SHA-256 of each and the rule by which they are read."""
        return _sha256(rule.encode(), *digests)

    def text_key(self, prompts: Sequence[Sequence[str]], batch_size: int) -> str:
        """Key of the class vectors that these prompts of each class give."""
        return _sha256(b"text", json.dumps([batch_size, *map(list, prompts)]).encode())

    def get(self, key: str) -> dict[str, np.ndarray] | None:
        """The arrays that were kept under ``key``; None where there are none, or a damaged file is in their place."""
        return _read(self.folder / f"{key}.npz")

    def put(self, key: str, **arrays: np.ndarray) -> None:
        """Keep arrays, whole or not at all."""
        self._write(self.folder / f"{key}.npz", lambda file: np.savez(file, allow_pickle=False, **arrays))

    def digests(self, entries: Sequence[Entry]) -> list[bytes] | None:
        """SHA-256 of each image, if their files are those that :meth:`keep_digests` saw."""
        path = self._digests_path(entries)
        kept = _read(path) if path is not None else None
        return None if kept is None else [row.tobytes() for row in kept["rows"]]

    def keep_digests(self, entries: Sequence[Entry], digests: Sequence[bytes]) -> None:
        """Remember the SHA-256 of each image as long as the files keep their size and times."""
        path = self._digests_path(entries)
        if path is not None:
            rows = np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 32)
            self._write(path, lambda file: np.savez(file, rows=rows))

    def _digests_path(self, entries: Sequence[Entry]) -> Path | None:
        """None where an entry's file is not known, or was written a moment ago."""
        files = {entry.file for entry in entries if entry.file is not None}
        if any(entry.file is None for entry in entries):
            return None
        stats = [(str(file.resolve()), file.stat()) for file in sorted(files)]
        if time.time() - max(max(s.st_mtime, s.st_ctime) for _, s in stats) < _FRESH_SECONDS:
            return None
        lines = [f"{path} {s.st_size} {s.st_mtime_ns} {s.st_ctime_ns}" for path, s in stats]
        lines += [f"{entry.name} {getattr(entry, 'offset', '')}" for entry in entries]
        return self.folder.parent / "digests" / f"{_sha256(*(line.encode() for line in lines))}.npz"

    def _write(self, path: Path, save: Any) -> None:
        if not self._is_writable:
            return
        try:
            with whole_file(path) as temporary, temporary.open("wb") as file:
                save(file)
        except OSError as error:
            self._is_writable = False
            _tell(f"{path.parent}: cannot be written ({first_line(error)}); features are not kept from here on")


def open_cache(model: Any, folder: str | Path | None, weights: str | None = None) -> FeatureCache | None:
    """The cache of a model; all ranks call this together.

    Args:
        model: as for :func:`~focalclip.evaluation.zeroshot.evaluate`.
        folder: of all caches; None: nothing is kept.
        weights: the model's weights hash where it is known already.

    Returns:
        None where nothing is kept, or cannot be: an object without ``weights_sha256``, a folder that
        cannot be written.
    """
    weights = weights or known_weights(model)
    if folder is None:
        return None
    if weights is None:
        _tell(f"{type(model).__name__} has no weights_sha256, so its features are not cached")
        return None
    key, probe = _identify(model, weights)
    return in_turns(lambda: _open(user_path(folder), key, probe))


def _identify(model: Any, weights: str) -> tuple[str, dict[str, np.ndarray]]:
    """The model's key, and what it makes of the probes: unit vectors in float32."""
    device, dtype = device_and_dtype(model)
    noise = np.random.default_rng(0).integers(0, 256, (61, 97, 3), dtype=np.uint8)
    pixels = model.preprocess(Image.fromarray(noise))
    code = str(model) if isinstance(model, nn.Module) else f"{type(model).__module__}.{type(model).__qualname__}"
    parts = [str(VERSION), weights, str(dtype), code, _tensor_sha256(pixels)]
    with evaluating(model):
        probe = {"image": _unit(model.encode_image(pixels[None].to(device, dtype)))}
        if hasattr(model, "encode_text"):
            tokens = model.tokenizer(PROBE_PROMPTS)
            parts.append(_tensor_sha256(tokens))
            probe["text"] = _unit(model.encode_text(tokens.to(device)))
    tolerance = 1e-5 if dtype in (torch.float32, torch.float64) else 1e-3  # of 1 - cosine: machines round differently
    return _sha256(*(part.encode() for part in parts)), probe | {"tolerance": np.array(tolerance)}


def _open(root: Path, key: str, probe: dict[str, np.ndarray]) -> FeatureCache | None:
    folder = root / key[:32]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        kept = _read(folder / "probe.npz")
        if kept is not None and not _is_same_function(kept, probe):
            _tell(f"{folder}: the model has these weights, but other features; those kept are dropped")
            for path in folder.glob("*.npz"):
                path.unlink()
            kept = None
        cache = FeatureCache(folder)
        if kept is None:
            cache.put("probe", **probe)
        os.utime(folder)
        with contextlib.suppress(OSError):  # another process prunes, too
            _prune(root, folder)
    except OSError as error:
        _tell(f"{root}: cannot be used ({first_line(error)}); features are not kept")
        return None
    return cache


def _is_same_function(kept: dict[str, np.ndarray], probe: dict[str, np.ndarray]) -> bool:
    if kept.keys() != probe.keys():
        return False
    vectors = [name for name in probe if name != "tolerance"]
    return all(
        kept[name].shape == probe[name].shape
        and bool(((kept[name] * probe[name]).sum(1) > 1 - float(probe["tolerance"])).all())
        for name in vectors
    )


def _prune(root: Path, current: Path) -> None:
    """Drop the models used longest ago until all the others take ``MAX_BYTES`` at most."""
    folders = sorted((path for path in root.iterdir() if path.is_dir()), key=lambda path: path.stat().st_mtime)
    sizes = {folder: sum(file.stat().st_size for file in folder.iterdir()) for folder in folders}
    for folder in folders:
        if sum(sizes.values()) <= MAX_BYTES:
            return
        if folder not in (current, root / "digests"):
            shutil.rmtree(folder, ignore_errors=True)
            del sizes[folder]


def _read(path: Path) -> dict[str, np.ndarray] | None:
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except FileNotFoundError:
        return None
    except Exception as error:  # noqa: BLE001 (damaged files make zipfile and numpy raise errors of any kind)
        _tell(f"{path}: damaged ({first_line(error)}); computed again")
        return None


def _unit(features: Tensor) -> np.ndarray:
    return F.normalize(features.float().cpu(), dim=-1).numpy()


def _tensor_sha256(tensor: Tensor) -> str:
    tensor = tensor.detach().cpu().contiguous()
    return _sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode(), tensor.numpy().tobytes())


def _sha256(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()


def _tell(message: str) -> None:
    tqdm.write(message, file=sys.stderr)
