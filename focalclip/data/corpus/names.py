"""Which Unicode emoji a drawing shows: an exact join of icons to code points, and the concepts that are held out."""

import hashlib
import json
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Concept:
    """What a picture shows: a Unicode emoji, or something else that sets draw (``codepoint`` and ``group`` empty)."""

    name: str
    codepoint: str = ""
    group: str = ""
    keywords: tuple[str, ...] = ()

    @property
    def slug(self) -> str:
        """The name in lower-case letters, digits and dashes."""
        return slugify(self.name)

    @property
    def held_out(self) -> bool:
        """Every tenth concept by a hash of its name; no flags, whose names say nothing of their pictures."""
        number = int(hashlib.sha256(self.name.encode()).hexdigest()[:4], 16)
        return self.group not in ("", "Flags") and number % 10 == 2


@dataclass(frozen=True)
class Icon:
    """One drawing of one set."""

    style: str
    name: str
    svg: str
    concept: Concept


class IconSet:
    """A set in the layout of Iconify's npm packages: ``icons.json``, and ``chars.json`` where code points are known."""

    def __init__(self, folder: Path) -> None:
        self._data: dict[str, Any] = json.loads((folder / "icons.json").read_text())
        chars = folder / "chars.json"
        self.codepoints = defaultdict(list)
        for code, name in (json.loads(chars.read_text()) if chars.exists() else {}).items():
            self.codepoints[name].append(_codepoint(code.split("-")))
        self.style: str = self._data["prefix"]
        self.synonyms = {a: v["parent"] for a, v in self._data.get("aliases", {}).items() if set(v) == {"parent"}}

    def names(self) -> list[str]:
        """Visible icons without the variants in skin tones."""
        icons = self._data["icons"]
        return [name for name, icon in icons.items() if not icon.get("hidden") and not _is_toned(name, icons)]

    def svg(self, name: str) -> str:
        """A complete SVG document of one icon (Iconify's defaults: a view box of 16 units from 0, 0)."""
        icon = self._data["icons"][name]
        left, top, width, height = (
            icon.get(key, self._data.get(key, default))
            for key, default in {"left": 0, "top": 0, "width": 16, "height": 16}.items()
        )
        return (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="{left} {top} {width} {height}" width="{width}" height="{height}">{icon["body"]}</svg>'
        )


def join(sets: Iterable[IconSet], concepts: Iterable[Concept]) -> Iterator[Icon]:
    """Give each icon its concept.

    In this order: the set's own code points; an unambiguous name (``_name_table``); that name without the spelling
    habits of a set (``flag-for-X``, ``X-2`` for a second drawing, names run together). An icon that shows no emoji
    becomes a concept under its own name, unless the name is run together or comes close to a held-out one.
    """
    sets = list(sets)
    by_code = {concept.codepoint: concept for concept in concepts}
    names, ambiguous = _name_table(sets, by_code)
    squashed = {name.replace("-", ""): concept for name, concept in names.items()}
    held_out = [set(concept.slug.split("-")) for concept in by_code.values() if concept.held_out]
    for icons in sets:
        names_here = icons.names()
        run_together = sum("-" in name for name in names_here) < 0.1 * len(names_here)
        for name in names_here:
            known = [by_code[code] for code in icons.codepoints[name] if code in by_code]
            stem = re.sub(r"(?<=[a-z])-?\d$", "", name)
            spellings = (name, re.sub("^flag-for-(flag-)?", "flag-", name), f"flag-{name}", stem)
            known += [names[spelling] for spelling in spellings if spelling in names]
            known += [squashed[name]] if name in squashed else []
            if known:
                yield Icon(icons.style, name, icons.svg(name), known[0])
            elif not run_together and name not in ambiguous and not _is_close(name, held_out):
                yield Icon(icons.style, name, icons.svg(name), Concept(stem.replace("-", " ")))


def _name_table(sets: list[IconSet], by_code: Mapping[str, Concept]) -> tuple[dict[str, Concept], set[str]]:
    """Names that mean one emoji alone, and the names that mean several.

    Collected from Unicode's names of emoji and of characters, from the sets that state code points, and from the
    synonyms that sets list.
    """
    meanings: dict[str, set[str]] = defaultdict(set)
    for code, concept in by_code.items():
        meanings[concept.slug].add(code)
        if "-" not in code and (character := unicodedata.name(chr(int(code, 16)), "")):
            meanings[slugify(character)].add(code)
    for icons in sets:
        for name, codes in icons.codepoints.items():
            meanings[name].update(code for code in codes if code in by_code)
    stated = {name: set(codes) for name, codes in meanings.items()}
    for icons in sets:
        for synonym, name in icons.synonyms.items():
            meanings[synonym] |= stated.get(name, set())
    names = {name: by_code[next(iter(codes))] for name, codes in meanings.items() if len(codes) == 1}
    return names, {name for name, codes in meanings.items() if len(codes) > 1}


def read_concepts(unicode_emoji: Path, emojilib: Path, emojibase: Path) -> list[Concept]:
    """All emoji in Unicode's order: names, groups (unicode-emoji-json) and keywords (emojilib, emojibase-data)."""
    emoji = json.loads((unicode_emoji / "data-by-emoji.json").read_text())
    keywords = json.loads((emojilib / "dist" / "emoji-en-US.json").read_text())
    tags = {
        _codepoint(entry["hexcode"].split("-")): entry.get("tags", [])
        for entry in json.loads((emojibase / "en" / "data.json").read_text())
    }
    concepts = []
    for symbol, entry in emoji.items():
        codepoint = _codepoint(f"{ord(character):x}" for character in symbol)
        words = [*keywords.get(symbol, [])[1:], *tags.get(codepoint, [])]  # emojilib's first repeats the name
        concepts.append(Concept(entry["name"], codepoint, entry["group"], _clean_keywords(words, entry["name"])))
    return concepts


def find_synonyms(concepts: Iterable[Concept]) -> dict[str, list[str]]:
    """Keywords that can stand for a name, such as trousers for jeans: at most two concepts have them, none as its name.

    Returns:
        Name of a concept -> its synonyms.
    """
    by_name = {concept.name: concept for concept in concepts}
    texts = [text.lower() for concept in by_name.values() for text in {concept.name, *concept.keywords}]
    count, names = Counter(texts), {name.lower() for name in by_name}
    return {
        name: [word for word in concept.keywords if count[word.lower()] <= 2 and word.lower() not in names]
        for name, concept in by_name.items()
    }


def _clean_keywords(words: Iterable[str], name: str) -> tuple[str, ...]:
    """Spaces for underscores, quotes off, emoticons such as ``:)`` out, no repetitions."""
    plain = (" ".join(word.replace("_", " ").split()).strip("“”") for word in words)
    return tuple(dict.fromkeys(w for w in plain if w and w != name and w[0].isalnum() and w[-1].isalnum()))


def slugify(name: str) -> str:
    """``man\u2019s shoe`` -> ``mans-shoe``: how the sets spell Unicode names."""
    return re.sub("[^a-z0-9]+", "-", name.lower().replace("\u2019", "")).strip("-")


def _codepoint(parts: Iterable[str]) -> str:
    """Hexadecimal code points without leading zeros and without U+FE0F, which sets add and leave out at will."""
    return "-".join(f"{int(part, 16):x}" for part in parts if int(part, 16) != 0xFE0F)


def _is_toned(name: str, icons: Mapping[str, Any]) -> bool:
    """``X-dark-skin-tone``; Fluent says ``X-dark``, for all tones of an ``X`` (``police-car-light`` is none)."""
    stem = re.sub("-(light|medium-light|medium|medium-dark|dark)$", "", name)
    return "skin-tone" in name or (stem != name and f"{stem}-medium-dark" in icons)


def _is_close(name: str, held_out: Iterable[set[str]]) -> bool:
    """Whether the words of a name include all words of a held-out name, or are among them."""
    words = set(name.split("-"))
    return any(words <= other or other <= words for other in held_out)
