"""Towers by depth: groups of parameters from the stem up, and towers locked below the last of them.

A locked tower is a fixed function: its parameters need no gradient and are not in the optimiser; it stays in evaluation
mode, so its stochastic depth and dropout are off and its running statistics stay; no activation of it is kept. The
linear projection behind it is trained (Zhai et al. 2022, "LiT", https://arxiv.org/abs/2111.07991; as open_clip does it
for a tower of timm).
"""

import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from focalclip.base.errors import UserError
from focalclip.models.norm import GlobalBatchNorm
from focalclip.models.text import text_entry

TOWERS = {"image": "visual.trunk.", "text": "text."}
"""The towers of a model, and how the names of their parameters begin; a text tower holds its projection."""


def depth_groups(model: Any, tower: str) -> list[list[str]]:
    """Names of the parameters of a tower of ``model`` by depth, the stem or embeddings first, without the projection.

    A tower's own ``depth_groups()`` tells them; without it, blocks are the items of its longest ``nn.ModuleList``, what
    comes before them is the first group, and what comes behind belongs to the last block.

    Args:
        model: a :class:`~focalclip.models.clip.FocalCLIP`.
        tower: a key of :data:`TOWERS`.
    """
    module = model.visual.trunk if tower == "image" else model.text
    if hasattr(module, "depth_groups"):
        return [group for group in module.depth_groups() if group]
    projection = None if tower == "image" else text_entry(model.config.text).projection
    own = [name for name, _ in module.named_parameters() if projection is None or name.split(".")[0] != projection]
    lists = {name: child for name, child in module.named_modules() if isinstance(child, nn.ModuleList)}
    longest = max(lists, key=lambda name: len(lists[name]), default=None)
    if longest is None:
        return [own]
    before, after = [], []
    blocks: list[list[str]] = [[] for _ in lists[longest]]
    for name in own:
        if name.startswith(f"{longest}."):
            blocks[int(name.removeprefix(f"{longest}.").split(".")[0])].append(name)
        else:
            # the parameters of a module come before those of its parts, so an embedding beside the blocks is found here
            (after if any(blocks) else before).append(name)
    blocks[-1] += after
    return [group for group in (before, *blocks) if group]


def lock_towers(model: Any, *, with_feature_norm: bool = False) -> None:
    """Lock what the configuration of ``model`` says; all is in training mode or not as before.

    Args:
        model: a :class:`~focalclip.models.clip.FocalCLIP`.
        with_feature_norm: the statistics of its feature_norm are of trained weights: lock them with the image tower.

    Raises:
        UserError: if a tower has not so many groups to unlock, or cannot be locked.
    """
    for tower in TOWERS:
        settings = getattr(model.config, tower)
        if settings.lock:
            model.locked += _lock(model, tower, settings.unlocked_groups)
    if with_feature_norm and model.config.image.lock and isinstance(model.visual.norm, GlobalBatchNorm):
        model.locked.append(model.visual.norm)
    model.train(model.training)


def _lock(model: Any, tower: str, unlocked: int) -> list[nn.Module]:
    """Lock a tower below its last groups; returns the modules that are to stay in evaluation mode."""
    if tower == "text" and text_entry(model.config.text).projection is None:
        raise UserError(
            f"model.text.lock: the projection of {model.config.text.name} is not known, and would be locked"
        )
    module = model.visual.trunk if tower == "image" else model.text
    groups = depth_groups(model, tower)
    if unlocked >= len(groups):
        raise UserError(
            f"model.{tower}.unlocked_groups={unlocked}: the {tower} tower has {len(groups)} groups, so nothing would "
            f"be locked; use at most {len(groups) - 1}, or set lock=false"
        )
    locked = {name for group in groups[: len(groups) - unlocked] for name in group}
    for name, parameter in module.named_parameters():
        if name in locked:
            parameter.requires_grad_(False)
    if not unlocked and tower == "image":
        model.visual.is_locked = True
        return [module]
    fixed, is_below = [], True
    for name, part in module.named_modules():
        own = {f"{name}.{parameter}" if name else parameter for parameter, _ in part.named_parameters()}
        if own & locked == own and (own or is_below):  # those without parameters, such as dropout, by their place
            fixed.append(part)
        elif next(part.parameters(recurse=False), None) is not None and not own & locked:
            is_below = False
    return fixed


@contextmanager
def without_projection(tower: nn.Module, name: str) -> Iterator[Any]:
    """Context in which a text tower ends before its projection: a parameter, as open_clip has it, or a module.

    Args:
        tower: the text tower.
        name: of the attribute that holds the projection.

    Yields:
        The projection.
    """
    projection = getattr(tower, name)
    setattr(tower, name, nn.Identity() if isinstance(projection, nn.Module) else None)
    try:
        yield projection
    finally:
        setattr(tower, name, projection)


class LockedFeatures:
    """Features of a locked tower by its input, in a file: what was met before is read instead of computed.

    An input is known by its content, so it does not matter how it came about. Once the file is full nothing is added,
    as inputs that come round in turn would push each other out. The file outlasts the process: a run that is continued
    reads what it would have read, since features computed in another batch may differ in their last bits.

    Args:
        path: the file; records that are there are used.
        width: C of the features.
        limit: of the file, in bytes.

    Attributes:
        read: rows that were read so far.
        computed: rows that were computed.
    """

    def __init__(self, path: Path, width: int, limit: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        self._width, self._limit = width, limit
        self._record = _KEY_BYTES + 4 * width + _CHECK_BYTES
        self._keys: list[bytes] = []
        self.read = self.computed = 0
        size = os.fstat(self._file).st_size
        size -= size % self._record  # of a process that was killed
        os.ftruncate(self._file, size)
        self._end = size
        keys = (os.pread(self._file, _KEY_BYTES, place) for place in range(0, size, self._record))
        self._places = {key: number * self._record for number, key in enumerate(keys)}

    def announce(self, rows: Tensor) -> None:
        """Tell the content of the next inputs, (b, ...) on the CPU; each row is hashed.

        Zeros at the end do not count: they are where captions are padded to the longest one of a batch.
        """
        self._keys = [blake2b(row.tobytes().rstrip(b"\0"), digest_size=_KEY_BYTES).digest() for row in rows.numpy()]

    def __call__(self, compute: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
        """Features (b, C), float32, of the inputs (b, ...) that were announced; ``compute`` makes those of new ones."""
        features = {key: row for key in set(self._keys) if (row := self._known(key)) is not None}
        missing = {key: i for i, key in reversed(list(enumerate(self._keys))) if key not in features}
        if missing:
            numbers = sorted(missing.values())
            with torch.no_grad():
                new = compute(inputs[torch.tensor(numbers, device=inputs.device)]).float().cpu().numpy()
            for number, row in zip(numbers, new, strict=True):
                features[self._keys[number]] = row
                self._add(self._keys[number], row)
        self.read, self.computed = self.read + len(self._keys) - len(missing), self.computed + len(missing)
        return torch.from_numpy(np.stack([features[key] for key in self._keys])).to(inputs.device)

    def _known(self, key: bytes) -> np.ndarray | None:
        """The features on record; None where there are none, or the record is damaged."""
        if key not in self._places:
            return None
        record = os.pread(self._file, self._record, self._places[key])
        if zlib.crc32(record[:-_CHECK_BYTES]).to_bytes(_CHECK_BYTES, "little") != record[-_CHECK_BYTES:]:
            return None
        return np.frombuffer(record, np.float32, self._width, _KEY_BYTES)

    def _add(self, key: bytes, row: np.ndarray) -> None:
        place = self._places.get(key, self._end)
        if place + self._record > self._limit or not np.isfinite(row).all():
            return
        content = key + row.tobytes()
        try:
            os.pwrite(self._file, content + zlib.crc32(content).to_bytes(_CHECK_BYTES, "little"), place)
        except OSError:  # the disk is full: what is there is enough
            self._limit = 0
            return
        self._places[key] = place
        self._end = max(self._end, place + self._record)


_KEY_BYTES, _CHECK_BYTES = 16, 4
