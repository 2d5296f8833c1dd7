"""Small shards made on the spot, written with plain tarfile so that the reader is not tested against our own writer."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image


def picture(seed: int, size: tuple[int, int] = (24, 20), format: str = "PNG", mode: str = "RGB") -> bytes:
    """A smooth random picture, encoded."""
    noise = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).convert(mode).save(buffer, format)
    return buffer.getvalue()


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    """A tar that holds exactly these members."""
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def good_sample(number: int, **options) -> list[tuple[str, bytes]]:
    """Image, two captions and a class number; number and caption can be told from each other's."""
    key = f"{number:06d}"
    return [
        (f"{key}.png", picture(number, **options)),
        (f"{key}.txt", f"caption {number}".encode()),
        (f"{key}.json", json.dumps({"captions": [f"caption {number}", f"keyword {number}"]}).encode()),
        (f"{key}.cls", str(number).encode()),
    ]


def write_shards(folder: Path, sizes: list[int]) -> list[Path]:
    """Shards 00000.tar, 00001.tar, ... of good samples, numbered through: the class number is the sample's number."""
    folder.mkdir(parents=True, exist_ok=True)
    numbers = iter(range(sum(sizes)))
    return [
        write_tar(folder / f"{i:05d}.tar", [m for _ in range(size) for m in good_sample(next(numbers))])
        for i, size in enumerate(sizes)
    ]


class ByteTokenizer:
    """The bytes of each caption, padded with 0; picklable."""

    def __call__(self, captions: list[str]):
        import torch

        return torch.tensor([list(caption.encode()[:32].ljust(32, b"\0")) for caption in captions])
