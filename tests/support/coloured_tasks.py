"""Task folders with a train and a test split, of pictures that a probe can learn to tell apart."""

import numpy as np
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
