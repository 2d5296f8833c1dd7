"""Small task folders in the wds layout, written with tarfile alone, and a small real model to measure on them."""

import functools
import io
import tarfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import focalclip
from focalclip.config import ImageTowerConfig, ModelConfig, TextTowerConfig
from focalclip.evaluation.zeroshot import ZeroShotOptions, evaluate
from focalclip.models.clip import FocalCLIP


def png(pixels):
    buffer = io.BytesIO()
    Image.fromarray(np.asarray(pixels, dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def picture(seed, size=(12, 12)):
    """A picture of four random colours, so that even random weights tell pictures apart."""
    colours = np.random.default_rng(seed).integers(0, 256, (2, 2, 3))
    return png(colours.repeat(size[0] // 2, axis=0).repeat(size[1] // 2, axis=1))


def npy(vector):
    buffer = io.BytesIO()
    np.save(buffer, np.asarray(vector))
    return buffer.getvalue()


def write_tar(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def write_folder(
    folder, labels, *, names=("red", "green", "blue"), templates=("a {c}.",), shard_size=4, images=None, kind=None
):
    """Write labels (ints or 0/1 vectors) with seeded pictures as a task folder; returns it."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "classnames.txt").write_text("".join(f"{name}\n" for name in names))
    (folder / "zeroshot_classification_templates.txt").write_text("".join(f"{line}\n" for line in templates))
    if kind:
        (folder / "dataset_type.txt").write_text(f"{kind}\n")
    starts = range(0, len(labels), shard_size)
    for shard, start in enumerate(starts):
        members = []
        for i in range(start, min(start + shard_size, len(labels))):
            label = labels[i]
            members.append((f"s{i:07d}.png", picture(i) if images is None else images[i]))
            members.append(
                (f"s{i:07d}.cls", str(label).encode()) if np.ndim(label) == 0 else (f"s{i:07d}.npy", npy(label))
            )
        write_tar(folder / "test" / f"{shard}.tar", members)
    (folder / "test" / "nshards.txt").write_text(f"{len(starts)}\n")
    return folder


@functools.cache
def tiny_model():
    """A real open_clip model with random weights, in the four attributes that the harness asks for."""
    import open_clip
    from open_clip.transform import image_transform

    torch.manual_seed(0)
    model = open_clip.CLIP(
        embed_dim=16,
        vision_cfg={"image_size": 16, "patch_size": 8, "width": 32, "layers": 1, "head_width": 16},
        text_cfg={"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    )
    for parameter in model.visual.parameters():
        torch.nn.init.normal_(parameter, std=0.5)  # the usual small weights answer every picture alike
    model.preprocess = image_transform((16, 16), is_train=False, mean=(0.5,) * 3, std=(0.25,) * 3)
    model.tokenizer = open_clip.SimpleTokenizer(context_length=16)
    return model.eval()


def write_tiny_run(root):
    """A run in ``root/runs/tiny``: its configuration's name and an exported model with fresh weights."""
    config = ModelConfig(
        embed_dim=16,
        image=ImageTowerConfig(name="focalnet_pico", image_size=32),
        text=TextTowerConfig(context_length=12, width=16, heads=2, layers=1),
    )
    torch.manual_seed(0)
    (root / "runs" / "tiny").mkdir(parents=True)
    (root / "runs" / "tiny" / "config.yaml").write_text("name: tiny\n")
    focalclip.save(FocalCLIP(config), root / "runs" / "tiny" / "model")


def zero_shot(model, benchmark, data_root=None, *, opened=None, **options):
    """A zero-shot result without progress on stderr; ``options`` are those of ``ZeroShotOptions``."""
    return evaluate(model, benchmark, data_root, ZeroShotOptions(**{"progress": False} | options), opened=opened)
