"""A retrieval run: both towers over a set, ranks both ways, one record."""

import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from focalclip.base.errors import require
from focalclip.base.machine import peak_memory, versions
from focalclip.base.ranks import is_main
from focalclip.evaluation.features.cache import FeatureCache, open_cache
from focalclip.evaluation.features.images import ImageFeatures, encode_images
from focalclip.evaluation.features.model import (
    DualEncoder,
    check_model,
    describe,
    device_and_dtype,
    evaluating,
    known_weights,
)
from focalclip.evaluation.features.texts import encode_prompts
from focalclip.evaluation.retrieval.pairs import PairData
from focalclip.evaluation.retrieval.ranks import CHUNK, retrieval_ranks
from focalclip.evaluation.retrieval.recall import image_to_text, text_to_image
from focalclip.evaluation.retrieval.result import RetrievalResult, RetrievalSeconds

_CAPTIONS_AT_ONCE = 65_536  # bounds the tokens that are held


def evaluate(
    model: DualEncoder,
    data: PairData,
    *,
    batch_size: int = 256,
    chunk: int = CHUNK,
    device: str | torch.device | None = None,
    progress: bool = True,
    source: str = "",
    cache_dir: str | Path | None = None,
) -> RetrievalResult:
    """Measure retrieval both ways; the model's modes are as before afterwards, so that training can go on.

    Where there are several ranks, all call this together: they share images, captions and blocks of scores, and the
    numbers are those of one process.

    Args:
        model: anything with ``encode_image``, ``encode_text``, ``tokenizer`` and ``preprocess``.
        data: images and captions; see :func:`~focalclip.evaluation.retrieval.pairs.open_pairs`.
        batch_size: images, and captions, per forward pass.
        chunk: images, and captions, per block of scores; bounds the memory and changes no number.
        device: where to move the model first; None leaves it where it is. Scores are taken there too.
        progress: show bars on stderr.
        source: the model's name in the result.
        cache_dir: where image features are kept by content (see ``features.cache``); None: not at all.

    Raises:
        UserError: if no image can be read, or features are not finite.
    """
    require("retrieval", "eval", "scipy")
    start = time.perf_counter()
    if device is not None and hasattr(model, "to"):
        model.to(device)
    where, _ = device_and_dtype(model)
    check_model(model)
    weights = known_weights(model)
    cache = open_cache(model, cache_dir, weights)
    encoding_start = time.perf_counter()
    features, data, texts = embed_pairs(model, data, batch_size=batch_size, progress=progress, cache=cache)
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
        model=({"source": source} if source else {})
        | {"sha256": weights or "unknown"}
        | describe(model)
        | peak_memory(where),
        versions=versions(),
        seconds=RetrievalSeconds(
            end - start, features.seconds, ranking_start - encoding_start - features.seconds, end - ranking_start
        ),
    )


def embed_pairs(
    model: Any, data: PairData, *, batch_size: int = 256, progress: bool = True, cache: FeatureCache | None = None
) -> tuple[ImageFeatures, PairData, Tensor]:
    """Encode both sides of a set; ranks share the work and all get the whole. Modes and generators stay as they were.

    Args:
        model: see :func:`evaluate`.
        data: images and captions.
        batch_size: images, and captions, per forward pass.
        progress: show bars on stderr.
        cache: where image features are looked up by content, and stored.

    Returns:
        The images' features; the data without images that are damaged and without their captions; unit vectors of its
        captions, float32 (M, D).

    Raises:
        UserError: if no image can be read, or features are not finite.
    """
    with evaluating(model):
        features = encode_images(
            model, data.entries, batch_size=batch_size, label=data.name, progress=progress, cache=cache
        )  # fmt: skip
        data = data.keep(features.readable)
        return features, data, _text_embeds(model, data, batch_size, progress)


def _text_embeds(model: Any, data: PairData, batch_size: int, progress: bool) -> Tensor:
    """Unit vectors of the captions, float32 (M, D); equal captions are encoded once and so have equal vectors."""
    captions, place = data.distinct()
    label = "captions" if progress and is_main() else ""
    parts = [captions[i : i + _CAPTIONS_AT_ONCE] for i in range(0, len(captions), _CAPTIONS_AT_ONCE)]
    embeds = torch.cat([encode_prompts(model, part, batch_size, label) for part in parts])
    return embeds if len(captions) == len(place) else embeds[torch.from_numpy(place)]
