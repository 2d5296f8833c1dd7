"""Tasks of colours: folders with both splits that a probe can learn, and a model that is always right."""

import numpy as np
import torch
from PIL import Image
from wds_folder import png, write_folder

COLOURS = ((220, 30, 30), (30, 200, 30), (30, 30, 220))


def coloured(label, seed):
    """A picture in which one of three colours prevails: no two are alike, and a probe can tell them apart."""
    noise = np.random.default_rng(seed).integers(0, 120, (4, 4, 3))
    return png(((noise + COLOURS[label]) // 2).repeat(4, axis=0).repeat(4, axis=1))


def write_task(folder, train, test, *, test_images=None, **options):
    """A task folder with both splits; labels are class numbers, or vectors of which the first 1 decides the colour."""

    def pictures(labels, first):
        return [coloured(int(np.argmax(y)) if np.ndim(y) else y, first + i) for i, y in enumerate(labels)]

    write_folder(folder, train, images=pictures(train, 0), **options)
    (folder / "test").rename(folder / "train")
    write_folder(folder, test, images=pictures(test, 10_000) if test_images is None else test_images, **options)
    return folder


PURE = {"red": (220, 20, 20), "green": (20, 200, 20), "blue": (20, 20, 220)}


class ColourModel:
    """Right for every picture of one of the pure colours: whatever it gets wrong has a wrong label."""

    device, weights_sha256 = "cpu", None

    def preprocess(self, picture):
        small = picture.convert("RGB").resize((4, 4))
        return torch.from_numpy(np.asarray(small, dtype=np.float32) / 255).permute(2, 0, 1)

    def tokenizer(self, texts):
        return torch.tensor([[next((i for i, name in enumerate(PURE) if name in text), 3)] for text in texts])

    def encode_image(self, images):
        return images.mean((2, 3)) - 0.4

    def encode_text(self, tokens):
        return (torch.tensor([*PURE.values(), (200, 200, 200)]) / 255 - 0.4)[tokens[:, 0]]


def write_pure(path, colour):
    """A picture of one pure colour at a path, whose folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (16, 16), PURE[colour]).save(path)


def write_class_folders(folder, splits=("test",), count=3):
    """``folder/SPLIT/COLOUR/*.png``; returns the folder."""
    for split in splits:
        for colour in PURE:
            for i in range(count):
                write_pure(folder / split / colour / f"{split}{i}.png", colour)
    return folder


def write_bench(folder, *names):
    """A YAML file of tasks whose folders lie beside it; returns it."""
    tasks = "".join(f"  - {{id: {name}, templates: ['a {{c}} thing']}}\n" for name in names)
    (folder / "bench.yaml").write_text(f"tasks:\n{tasks}")
    return folder / "bench.yaml"


def write_pure_wds(folder, labels=(0, 1, 2)):
    """A task folder of one picture of each pure colour, labelled as asked; returns it."""
    pictures = [png(np.broadcast_to(np.array(rgb, np.uint8), (16, 16, 3))) for rgb in PURE.values()]
    return write_folder(folder, labels, names=tuple(PURE), templates=("a {c} thing",), images=pictures)
