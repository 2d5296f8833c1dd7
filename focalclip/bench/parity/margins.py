"""How far the closest decision of the case is from a tie, as a difference of cosines."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import normalize

from focalclip.bench.clip_benchmark import RECALLS
from focalclip.bench.synthetic_pairs import SyntheticPairs
from focalclip.evaluation.datasets import read_task_folder
from focalclip.evaluation.features.classifier import class_matrix, encode_prompts
from focalclip.evaluation.features.encode import encode_images

MIN_MARGIN = 5e-5
"""Smallest accepted margin of a task; float32 instead of float64 moves these cosines by less than 1e-6."""


def task_margin(model: Any, folder: Path) -> float:
    """Margin of a task folder.

    For one label per image: the smallest lead of the best class over the second, and of the fifth over the sixth. For
    several: the smallest difference between an image that has a class and one that has not, over all classes.
    """
    data = read_task_folder(folder)
    images = encode_images(model, data.entries, batch_size=64, progress=False).embeds.double()
    cosines = (images @ class_matrix(model, data.class_names, data.templates).double().T).numpy()
    if not data.multilabel:
        leads = -np.diff(-np.sort(-cosines, axis=1), axis=1)
        return float(leads[:, [0, 4] if leads.shape[1] > 4 else [0]].min())
    differences = cosines[:, None] - cosines[None]
    rivals = data.labels[:, None] & ~data.labels[None]
    return float(np.abs(differences[rivals]).min())


def pairs_margin(model: Any, pairs: SyntheticPairs, ks: tuple[int, ...] = RECALLS) -> float:
    """Margin of retrieval: the smallest lead of a K-th place over the next, where one is right and the other wrong."""
    pictures = torch.stack([model.preprocess(Image.fromarray(pixels)) for pixels in pairs.pictures()])
    images = normalize(model.encode_image(pictures), dim=-1).double()
    texts = encode_prompts(model, [caption for own in pairs.captions for caption in own]).double()
    owner = np.repeat(np.arange(len(pairs.captions)), [len(own) for own in pairs.captions])
    right = owner[:, None] == np.arange(len(pairs.captions))[None]
    cosines = (texts @ images.T).numpy()
    return min(_closest_place(cosines, right, ks), _closest_place(cosines.T, right.T, ks))


def _closest_place(scores: np.ndarray, right: np.ndarray, ks: tuple[int, ...]) -> float:
    order = np.argsort(-scores, axis=1)
    ranked, hits = np.take_along_axis(scores, order, axis=1), np.take_along_axis(right, order, axis=1)
    leads = [(ranked[:, k - 1] - ranked[:, k])[hits[:, k - 1] != hits[:, k]] for k in ks]
    return float(np.concatenate(leads).min())
