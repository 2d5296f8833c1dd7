"""A retrieval run: both towers over a set, ranks both ways, one record."""

import resource
import sys
import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from focalclip.errors import UserError
from focalclip.evaluation.classifier import encode_prompts
from focalclip.evaluation.features import ImageFeatures, encode_images
from focalclip.evaluation.model import DualEncoder, device_and_dtype, evaluating, weights_sha256
from focalclip.evaluation.retrieval.pairs import PairData
from focalclip.evaluation.retrieval.ranking import CHUNK, retrieval_ranks
from focalclip.evaluation.retrieval.recall import image_to_text, text_to_image
from focalclip.evaluation.retrieval.result import RetrievalResult, Seconds
from focalclip.evaluation.zeroshot import _name, _versions


def evaluate(
    model: DualEncoder,
    data: PairData,
    *,
    batch_size: int = 256,
    chunk: int = CHUNK,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> RetrievalResult:
    """Measure retrieval both ways; the model's modes are as before afterwards, so that training can go on.

    Args:
        model: anything with ``encode_image``, ``encode_text``, ``tokenizer`` and ``preprocess``.
        data: images and captions; see :func:`~focalclip.evaluation.retrieval.sources.open_pairs`.
        batch_size: images, and captions, per forward pass.
        chunk: images, and captions, per block of scores; bounds the memory and changes no number.
        device: where to move the model first; None leaves it where it is. Scores are taken there too.
        progress: show bars on stderr.

    Raises:
        UserError: if no image can be read, or features are not finite.
    """
    start = time.perf_counter()
    if device is not None:
        model.to(device)  # pyrefly: ignore[missing-attribute]
    where, precision = device_and_dtype(model)
    with evaluating(model):
        features = _image_features(model, data, batch_size, progress)
        data = data.keep(features.readable)
        texts_start = time.perf_counter()
        texts = _text_embeds(model, data, batch_size, progress)
    ranking_start = time.perf_counter()
    ranks = retrieval_ranks(features.embeds, texts, data.pairs, chunk=chunk, device=where, progress=progress)
    end = time.perf_counter()
    return RetrievalResult(
        data=data,
        ranks=ranks,
        image_to_text=image_to_text(ranks.image_to_text, data),
        text_to_image=text_to_image(ranks.text_to_image, data),
        broken=features.broken,
        data_sha256=data.digest(features.sha256),
        model={"sha256": weights_sha256(model), "precision": _name(precision), "device": _name(where)},
        versions=_versions(),
        seconds=Seconds(end - start, features.seconds, ranking_start - texts_start, end - ranking_start),
        peak_memory_mib=_peak_memory(where),
    )


def _image_features(model: Any, data: PairData, batch_size: int, progress: bool) -> ImageFeatures:
    """The one place where images become vectors."""
    return encode_images(model, data.entries, batch_size=batch_size, label=data.name, progress=progress)  # pyrefly: ignore[bad-argument-type]


def _text_embeds(model: Any, data: PairData, batch_size: int, progress: bool) -> Tensor:
    """Unit vectors of the captions, float32 (M, D); equal captions are encoded once and so have equal vectors."""
    captions, place = data.distinct()
    hidden = None if progress else True
    with tqdm(total=len(captions), desc="captions", unit=" texts", leave=False, disable=hidden) as bar:
        blocks = []
        for i in range(0, len(captions), batch_size):
            blocks.append(encode_prompts(model, captions[i : i + batch_size], batch_size))
            bar.update(len(blocks[-1]))
    embeds = F.normalize(torch.cat(blocks), dim=-1)
    if not bool(torch.isfinite(embeds).all()):
        raise UserError("the model's text features hold NaN or infinity; evaluate weights from before the divergence")
    return embeds if len(captions) == len(place) else embeds[torch.from_numpy(place)]


def _peak_memory(device: torch.device) -> dict[str, float]:
    """The most memory that this process held so far, in MiB, and on a GPU the most that tensors held there."""
    unit = 2**20 if sys.platform == "darwin" else 2**10  # bytes there, KiB on Linux
    peak = {"process": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, 1)}
    if device.type == "cuda":
        peak["gpu"] = round(torch.cuda.max_memory_allocated(device) / 2**20, 1)
    return peak
