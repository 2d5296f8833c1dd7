"""From a run to a folder that another library loads: weights, configuration, model card; whole or not at all."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from focalclip.errors import UserError
from focalclip.export import image_tower, onnx_graphs, two_towers
from focalclip.export.card import model_card
from focalclip.export.trained import Trained


class Format(NamedTuple):
    """How to write a format, and how to read what was written."""

    write: Callable[[Trained, Path], list[str]]
    """Write into an empty folder; returns what the reader has to know besides, one sentence each."""
    usage: Callable[[Trained, str], str]
    """Python that loads the exported folder of this name."""
    library: str
    """What the Hugging Face hub calls the library."""


FORMATS: dict[str, Format] = {
    "open_clip": Format(two_towers.write_open_clip, two_towers.open_clip_usage, "open_clip"),
    "timm": Format(image_tower.write_timm, image_tower.timm_usage, "timm"),
    "transformers": Format(two_towers.write_transformers, two_towers.transformers_usage, "transformers"),
    "onnx": Format(onnx_graphs.write_onnx, onnx_graphs.onnx_usage, "onnx"),
}


def export(source: str | Path, folder: str | Path, kind: str, *, license_id: str = "unknown") -> list[str]:
    """Write a trained model for another library, with a model card.

    Args:
        source: a run directory or an exported folder.
        folder: where to; it must not exist yet, or be empty.
        kind: a key of :data:`FORMATS`.
        license_id: licence of the weights for the card, by the hub's names (``mit``, ``cc-by-sa-4.0`` ...).

    Returns:
        What the user has to know besides, one sentence each.

    Raises:
        UserError: if the source is no trained model of ours, the folder is taken, or the format cannot hold the model.
    """
    folder = Path(folder)
    if kind not in FORMATS:
        raise UserError(f"--format {kind}: not known; use one of {', '.join(FORMATS)}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: exists already; remove it or choose another folder")
    trained = Trained.read(source)
    if kind in ("open_clip", "timm") and not trained.model.config.image.is_as_named:
        raise UserError(f"--format {kind}: {kind} cannot build a tower with options or another mixer; use onnx")
    new = folder.with_name(f".{folder.name}.new.tmp")
    shutil.rmtree(new, ignore_errors=True)  # of a process that was killed in here
    new.mkdir(parents=True)
    try:
        notes = FORMATS[kind].write(trained, new)
        usage = FORMATS[kind].usage(trained, folder.name)
        card = model_card(trained, usage, library=FORMATS[kind].library, license_id=license_id, notes=notes)
        (new / "README.md").write_text(card, encoding="utf-8")
        if folder.exists():
            folder.rmdir()
        new.rename(folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    return notes
