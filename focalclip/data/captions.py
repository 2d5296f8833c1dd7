"""The texts of a training sample, and which of them a position takes."""

import json
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from focalclip.config import DataConfig
from focalclip.data.order import Draw


class Captions(NamedTuple):
    """All texts of a sample, each once."""

    captions: list[str]
    """One or more; each describes the picture alone."""
    keywords: list[str]
    """Too general to stand alone: they are only joined to the first caption."""


def read_captions(text: bytes | None, record: bytes | None) -> Captions:
    """The texts of a sample: first its text, then ``captions`` or ``caption`` of its JSON; and the JSON's ``keywords``.

    Raises:
        ValueError: if there is no caption, or the members cannot be read.
    """
    try:
        captions = [text.decode()] if text is not None else []
        values = json.loads(record.decode()) if record is not None else {}
    except UnicodeDecodeError:
        raise ValueError("caption is not UTF-8") from None
    except ValueError as error:
        raise ValueError(f"unreadable JSON ({error})") from None
    keywords = []
    if isinstance(values, dict):  # JSON of another kind is other metadata
        single = values.get("caption")
        captions += _texts("captions", values.get("captions") or ([] if single is None else [single]))
        keywords = _texts("keywords", values.get("keywords") or [])
    captions = _each_once(captions)
    if not captions:
        raise ValueError("no caption")
    return Captions(captions, [keyword for keyword in _each_once(keywords) if keyword not in captions])


def _texts(name: str, value: Any) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise ValueError(f"{name} in its JSON are not text")
    return value


def _each_once(texts: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(stripped for text in texts if (stripped := text.strip())))


def choose_caption(texts: Captions, draws: Sequence[float], data: DataConfig) -> str:
    """The first caption, or it joined with one or two others, or any: see the two probabilities of :class:`DataConfig`.

    Args:
        texts: The sample's captions and keywords.
        draws: The position's row of :func:`focalclip.data.order.uniform_draws`.
        data: The probabilities.
    """
    first, *others = texts.captions
    others += texts.keywords
    rule = draws[Draw.CAPTION_FIRST] - data.first_caption
    if rule < 0 or not others:
        return first
    if rule >= data.joined_captions:
        return texts.captions[int(draws[Draw.CAPTION] * len(texts.captions))]
    picked = [others[int(draws[Draw.CAPTION] * len(others))]]
    more = 2 * draws[Draw.CAPTION_MORE] - 1  # uniform in [0, 1) in half of all cases
    if more >= 0 and (second := others[int(more * len(others))]) not in picked:
        picked.append(second)
    is_behind = rule < data.joined_captions / 2
    return ", ".join([first, *picked] if is_behind else [*picked, first])
