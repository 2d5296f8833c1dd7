"""Classification task folders made from seeds, in the wds layout of CLIP_benchmark."""

import hashlib
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from focalclip.data.write import write_shards
from focalclip.evaluation.features.model import weights_sha256

CELLS = 4  # along each side of a picture


def patterns(number: int, rng: np.random.Generator) -> np.ndarray:
    """Colours of the cells, int64 (number, CELLS, CELLS, 3)."""
    return rng.integers(0, 256, (number, CELLS, CELLS, 3))


def collage(of_classes: np.ndarray, classes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A pattern whose cells are taken from the patterns of several classes; random colours where there is no class."""
    if len(classes) == 0:
        return rng.integers(0, 256, of_classes.shape[1:])
    owners = classes[rng.integers(0, len(classes), (CELLS, CELLS))]
    rows, columns = np.indices(owners.shape)
    return of_classes[owners, rows, columns]


def draw(pattern: np.ndarray, noise: int, size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """The pattern with other colours, enlarged to (H, W), and some noise on each pixel."""
    colours = pattern + rng.integers(-noise, noise + 1, pattern.shape)
    rows, columns = (np.arange(side) * CELLS // side for side in size)
    pixels = colours[rows][:, columns] + rng.integers(-8, 9, (*size, 3))
    return pixels.clip(0, 255).astype(np.uint8)


def compressed(pixels: np.ndarray, extension: str) -> bytes:
    """The file; both formats are lossless."""
    buffer = io.BytesIO()
    options: dict[str, Any] = {"lossless": True, "method": 0} if extension == "webp" else {"compress_level": 1}
    Image.fromarray(pixels).save(buffer, extension, **options)
    return buffer.getvalue()


def update_digest(digest: Any, pixels: np.ndarray) -> None:
    """Add a picture's size and pixels."""
    digest.update(repr(pixels.shape).encode() + pixels.tobytes())


WEIGHTS, CONFIG = "open_clip_model.safetensors", "open_clip_config.json"  # open_clip's names

PREPROCESSING = {
    "mean": [0.48145466, 0.4578275, 0.40821073],  # OpenAI's
    "std": [0.26862954, 0.26130258, 0.27577711],
    "interpolation": "bicubic",
    "resize_mode": "shortest",
}


def write_model(folder: Path, model_config: dict[str, Any], seed: int = 0, gain: float = 1.0) -> str:
    """Write an open_clip model with random weights for ``local-dir:FOLDER``; returns the SHA-256 of its weights.

    Args:
        folder: is created.
        model_config: ``embed_dim``, ``vision_cfg`` and ``text_cfg``, as in open_clip's model configurations.
        seed: of the weights.
        gain: of the weight matrices; 1 keeps the scale of what goes through.
    """
    import open_clip
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    model: Any = open_clip.CLIP(**model_config)
    _randomise(model, seed, gain)
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, folder / WEIGHTS)
    config = {"model_cfg": model_config, "preprocess_cfg": PREPROCESSING}
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    return weights_sha256(model)


def _randomise(model: Any, seed: int, gain: float) -> None:
    """Fill every parameter with uniform numbers: matrices keep the scale of their input."""
    import torch

    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if parameter.ndim == 0:
                continue  # the temperature
            noise = torch.from_numpy(2 * rng.random(parameter.shape, dtype=np.float32) - 1)
            if parameter.ndim > 1:
                parameter.copy_(noise * (gain * (3 / parameter[0].numel()) ** 0.5))  # the variance of noise is 1/3
            else:
                parameter.copy_(noise * 0.3 + (0.0 if name.endswith("bias") else 0.7))


@dataclass(frozen=True)
class SyntheticPairs:
    """A folder of images with one or more captions each."""

    captions: tuple[tuple[str, ...], ...]
    """Of each image."""
    seed: int
    shards: int = 1
    size: tuple[int, int] = (40, 52)

    def pictures(self) -> Iterator[np.ndarray]:
        """uint8 (H, W, 3) pictures, each with its own pattern."""
        rng = np.random.default_rng(self.seed)
        for pattern in patterns(len(self.captions), rng):
            yield draw(pattern, 0, self.size, rng)

    def write(self, folder: Path) -> str:
        """Write the folder; returns the SHA-256 of captions and pixels."""
        digest = hashlib.sha256("\n\n".join("\n".join(own) for own in self.captions).encode())
        per_shard = -(-len(self.captions) // self.shards)
        shards = write_shards(self._samples(digest), folder / "test", per_shard, name="{}.tar")
        (folder / "test" / "nshards.txt").write_text(f"{shards}\n")
        (folder / "dataset_type.txt").write_text("retrieval\n")
        return digest.hexdigest()

    def _samples(self, digest: Any) -> Iterator[dict[str, Any]]:
        for i, (pixels, own) in enumerate(zip(self.pictures(), self.captions, strict=True)):
            update_digest(digest, pixels)
            yield {"__key__": f"s{i:07d}", "png": compressed(pixels, "png"), "txt": "\n".join(own)}


@dataclass(frozen=True)
class SyntheticTask:
    """A task folder to be made."""

    names: tuple[str, ...]
    templates: tuple[str, ...]
    labels: np.ndarray
    """int64 (N,), or bool (N, C) for a multi-label task."""
    seed: int
    sizes: tuple[tuple[int, int], ...] = ((40, 52),)
    """Heights and widths of the pictures, in turn."""
    extensions: tuple[str, ...] = ("png",)
    """``png`` or ``webp`` (lossless, as clip_benchmark's exporter writes it), in turn."""
    shards: int = 1
    """At most."""
    noise: int = 40
    """How far the colours of a class's pictures lie apart, of 255."""

    def pictures(self) -> Iterator[np.ndarray]:
        """uint8 (H, W, 3) pictures, one per label: those of one class share a pattern of coloured cells."""
        rng = np.random.default_rng(self.seed)
        of_classes = patterns(len(self.names), rng)
        for i, label in enumerate(self.labels):
            pattern = of_classes[label] if label.ndim == 0 else collage(of_classes, np.flatnonzero(label), rng)
            yield draw(pattern, self.noise, self.sizes[i % len(self.sizes)], rng)

    def write(self, folder: Path) -> str:
        """Write the folder in the wds layout; returns the SHA-256 of names, prompts, labels and pixels."""
        digest = hashlib.sha256("\n".join([*self.names, "", *self.templates]).encode() + self.labels.tobytes())
        per_shard = -(-len(self.labels) // self.shards)
        shards = write_shards(self._samples(digest), folder / "test", per_shard, name="{}.tar")
        (folder / "test" / "nshards.txt").write_text(f"{shards}\n")
        (folder / "classnames.txt").write_text("".join(f"{name}\n" for name in self.names))
        (folder / "zeroshot_classification_templates.txt").write_text("".join(f"{line}\n" for line in self.templates))
        if self.labels.ndim == 2:
            (folder / "dataset_type.txt").write_text("multilabel\n")
        return digest.hexdigest()

    def _samples(self, digest: Any) -> Iterator[dict[str, Any]]:
        for i, (pixels, label) in enumerate(zip(self.pictures(), self.labels, strict=True)):
            update_digest(digest, pixels)
            extension = self.extensions[i % len(self.extensions)]
            truth = {"cls": int(label)} if label.ndim == 0 else {"npy": _npy(label.astype(np.int64))}
            yield {"__key__": f"s{i:07d}", extension: compressed(pixels, extension), **truth}


def _npy(vector: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, vector)
    return buffer.getvalue()
